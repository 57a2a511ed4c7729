//! Checks the specs of workloads. An error tells the user what would be correct.

use thiserror::Error;

use crate::{
    layout::{MAX_CPUS, MAX_SPEC},
    spec::{COMMON_KEYS, Kind, LIST, Spec, SpecError},
};

/// Why a spec, or a number of CPUs, gives no guest.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum WorkloadError {
    /// No workload has this name.
    #[error("no workload `{name}`; the workloads are: {known}")]
    Unknown {
        /// The name in the spec.
        name: String,
        /// The names of all workloads.
        known: String,
    },
    /// The workload has no such key.
    #[error("workload `{workload}` has no key `{key}`; it takes: {known}")]
    Key {
        /// The workload.
        workload: &'static str,
        /// The text that was found where `key=value` was expected.
        key: String,
        /// The keys that the workload takes.
        known: String,
    },
    /// A key occurs twice.
    #[error("key `{0}` occurs twice")]
    Repeated(&'static str),
    /// A key does not take this value.
    #[error("`{value}` is no value for `{key}`, which takes {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// A description of the values that it takes.
        wanted: String,
    },
    /// The spec does not fit on the parameter page.
    #[error("the spec has {0} bytes, more than {MAX_SPEC}")]
    TooLong(usize),
    /// The number of CPUs is 0 or larger than [`MAX_CPUS`].
    #[error("{0} CPUs: the guest runs on 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// The spec limits the workload's area to fewer pages than the CPUs need, whatever RAM there
    /// is.
    #[error(
        "its area has {pages} pages, and {cpus} CPUs need {wanted}: give it a larger size or percent, or fewer CPUs"
    )]
    Area {
        /// The pages of the area.
        pages: u64,
        /// The pages that the CPUs need.
        wanted: u64,
        /// The number of CPUs.
        cpus: u32,
    },
    /// The compiled image has no parameter page at its address.
    #[error("the guest's image has no parameter page")]
    Image,
}

/// Checks a spec, `NAME[:key=value[,key=value…]]`.
///
/// # Errors
/// When the spec is wrong; the error tells what would be correct.
pub fn check_spec(text: &str) -> Result<(), WorkloadError> {
    if text.len() > MAX_SPEC {
        return Err(WorkloadError::TooLong(text.len()));
    }
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.collect::<Vec<_>>().join(", ");
    match Spec::parse(text) {
        Ok(_) => Ok(()),
        Err(SpecError::Workload(name)) => {
            Err(WorkloadError::Unknown { name: name.into(), known: names(&mut LIST.iter().map(|info| info.name)) })
        }
        Err(SpecError::Key(info, key)) => Err(WorkloadError::Key {
            workload: info.name,
            key: key.into(),
            known: names(
                &mut info
                    .keys
                    .iter()
                    .chain(COMMON_KEYS.iter().filter(|key| !info.keys.iter().any(|own| own.name == key.name)))
                    .map(|key| key.name),
            ),
        }),
        Err(SpecError::Repeated(key)) => Err(WorkloadError::Repeated(key.name)),
        Err(SpecError::Value(key, value)) => {
            Err(WorkloadError::Value { key: key.name, value: value.into(), wanted: wanted(key.kind) })
        }
    }
}

/// Describes the values that a kind of key takes.
pub(crate) fn wanted(kind: Kind) -> String {
    match kind {
        Kind::Size => "a size such as 64M (units K, M, G)".into(),
        Kind::Count(min, max) => format!("a number from {min} to {max}"),
        Kind::Time => "a time such as 100ms (units us, ms, s), or 0".into(),
        Kind::Choice(words) => words.join(" or "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_good_value() {
        for info in LIST {
            check_spec(info.name).unwrap();
            for key in info.keys.iter().chain(COMMON_KEYS) {
                assert!(key.kind.parse(key.default).is_some(), "{}: {}={}", info.name, key.name, key.default);
                let twice = format!("{}:{}={},{}={}", info.name, key.name, key.default, key.name, key.default);
                assert_eq!(check_spec(&twice), Err(WorkloadError::Repeated(key.name)));
            }
        }
    }

    #[test]
    fn a_spec_says_what_the_guest_gets() {
        let spec = Spec::parse("touch:size=64M,mode=read,every=2s").unwrap();
        assert_eq!((spec.value("size"), spec.value("mode"), spec.value("every")), (64 << 20, 0, 2_000_000));
        assert_eq!((spec.value("seed"), spec.value("data"), spec.value("nothing")), (1, 0, 0));
        assert_eq!(Spec::parse("idle").unwrap().value("data"), 700 << 20);
        let area = |text| Spec::parse(text).unwrap().area();
        assert_eq!(area("quicksort:regions=32,size=16M"), 512 << 20);
        assert_eq!((area("quicksort:size=16M"), area("storm:size=3M"), area("idle")), (16 << 20, 3 << 20, 0));
    }

    #[test]
    fn a_bad_spec_is_refused_with_what_is_allowed() {
        let message = |text: &str| check_spec(text).unwrap_err().to_string();
        assert!(message("hott").contains("hot"));
        assert!(message("").contains("idle"));
        assert!(message("hot:sise=1M").contains("size"));
        assert!(message("hot:size").contains("size"));
        assert!(message("hot:size=1T").contains("64M"));
        assert!(message("hot:size=99999999999999999999").contains("64M"));
        assert!(message("hot:size=99999999999G").contains("64M"));
        assert!(message("rate:pages=0").contains("from 1"));
        assert!(message("touch:mode=both").contains("read or write"));
        assert!(message("quicksort:regions=65").contains("to 64"));
        assert!(message("idle:for=10").contains("units us, ms, s"));
        assert_eq!(check_spec(&"x".repeat(MAX_SPEC + 1)), Err(WorkloadError::TooLong(MAX_SPEC + 1)));
    }
}
