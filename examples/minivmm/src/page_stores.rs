//! The page stores of a minivmm. Both ends of a migration know a store by the same name.

use std::{num::NonZeroU64, sync::Arc, time::Duration};

use migration_core::{
    engine::SourceStores,
    store::{Owner, PageStore, StoreError},
};
use migration_crypto::random_namespace;
use migration_transport::{Bandwidth, StoreUrl};
use minivmm_client::{PageStoreOptions, StoreSpec};
use thiserror::Error;

use crate::sealing::Sealing;

/// The time for which stores keep the data of a source. The destination renews this lease.
const LEASE: Duration = Duration::from_secs(3600);

/// The owner that stores record if the host's name is not valid in an owner.
const SOME_MINIVMM: Owner = match Owner::new("a minivmm") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};

/// The reason why page stores cannot be used as the user requests.
#[derive(Debug, Error)]
pub(crate) enum StoresError {
    #[error("page store {0} is named twice, with two URLs")]
    Twice(String),
    #[error("--through names page store {0} twice")]
    NamedTwice(String),
    #[error("there is no page store {0} here: name it by --store {0}=URL, at both ends")]
    Unknown(String),
    #[error("there is no page store here: name one by --store NAME=URL, at both ends")]
    None,
    #[error(
        "page store {0} is in the memory of this process (memory:), where the other end cannot read it: use a store that \
         both ends reach, such as file:DIR on a shared file system"
    )]
    InMemory(String),
    #[error("{replicas} copies of each page go into as many page stores, and there are {stores}")]
    TooFew {
        /// The number of copies that the user requests.
        replicas: usize,
        /// The number of stores.
        stores: usize,
    },
    #[error("page store {name}")]
    Open {
        /// The name of the store.
        name: String,
        /// The error of the store.
        #[source]
        cause: StoreError,
    },
}

/// The page stores that a minivmm was started with.
#[derive(Default)]
pub(crate) struct PageStores(Vec<StoreSpec>);

/// Returns the name of a store.
fn name(spec: &StoreSpec) -> &str {
    &spec.store().name
}

/// Returns whether other processes can use the store, too.
fn is_shared(spec: &StoreSpec) -> bool {
    spec.store().url != StoreUrl::Memory
}

/// Opens a store that both ends of a migration can reach. The store is sealed if this minivmm has a
/// seal key. It is opened separately for each use, because the keys of its namespaces are erased
/// when it is dropped.
fn open(spec: &StoreSpec, sealing: &Sealing) -> Result<Arc<dyn PageStore>, StoresError> {
    if !is_shared(spec) {
        return Err(StoresError::InMemory(name(spec).to_owned()));
    }
    open_any(spec, sealing)
}

/// Opens a store. Accepts a store in the memory of this process.
fn open_any(spec: &StoreSpec, sealing: &Sealing) -> Result<Arc<dyn PageStore>, StoresError> {
    let name = name(spec).to_owned();
    let opened = spec.store().open().map_err(|cause| StoresError::Open { name, cause });
    opened.map(|store| sealing.page_store(store))
}

/// The page stores of one migration.
pub(crate) struct Through {
    pub(crate) names: Vec<String>,
    pub(crate) stores: SourceStores,
}

impl PageStores {
    pub(crate) fn new(specs: &[StoreSpec]) -> Result<Self, StoresError> {
        let mut stores = Self::default();
        specs.iter().try_for_each(|spec| stores.add(spec))?;
        Ok(stores)
    }

    fn add(&mut self, spec: &StoreSpec) -> Result<(), StoresError> {
        match self.0.iter().find(|other| name(other) == name(spec)) {
            Some(other) if other == spec => {}
            Some(_) => return Err(StoresError::Twice(name(spec).to_owned())),
            None => self.0.push(spec.clone()),
        }
        Ok(())
    }

    /// Returns the stores as arguments for the command line of another minivmm.
    pub(crate) fn arguments(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(StoreSpec::text)
    }

    /// Opens the stores from which a destination may fetch pages of an arriving VM.
    pub(crate) fn for_destination(&self, sealing: &Sealing) -> Result<Vec<Arc<dyn PageStore>>, StoresError> {
        self.0.iter().map(|spec| open(spec, sealing)).collect()
    }

    /// Opens the store for cold pages of a VM that is at home here. The store may be in memory.
    pub(crate) fn for_cold_pages(&self, wanted: &str, sealing: &Sealing) -> Result<Arc<dyn PageStore>, StoresError> {
        let spec = self.find(wanted)?;
        open_any(spec, sealing)
    }

    /// Opens the stores through which one migration sends pages.
    pub(crate) fn for_migration(
        &self,
        wanted: &PageStoreOptions,
        replicas: usize,
        sealing: &Sealing,
    ) -> Result<Through, StoresError> {
        let mut known = Self(self.0.clone());
        wanted.stores.iter().try_for_each(|spec| known.add(spec))?;
        let chosen: Vec<&StoreSpec> = match &wanted.through[..] {
            // stores in memory may serve other purposes, so they are left out if there are shared
            // ones
            [] if known.0.iter().any(is_shared) => known.0.iter().filter(|spec| is_shared(spec)).collect(),
            [] => known.0.iter().collect(),
            names => names.iter().map(|name| known.find(name)).collect::<Result<_, _>>()?,
        };
        if chosen.is_empty() {
            return Err(StoresError::None);
        }
        if let Some(twice) = (1..chosen.len()).find(|&at| chosen[..at].contains(&chosen[at])) {
            return Err(StoresError::NamedTwice(name(chosen[twice]).to_owned()));
        }
        if chosen.len() < replicas {
            return Err(StoresError::TooFew { replicas, stores: chosen.len() });
        }
        let stores = SourceStores {
            stores: chosen.iter().map(|spec| open(spec, sealing)).collect::<Result<_, _>>()?,
            new_namespace: Arc::new(|| random_namespace().expect("the operating system has random bytes")),
            owner: owner(),
            lease: LEASE,
            gather_rate: bytes_per_second(wanted.gather_rate),
        };
        Ok(Through { names: chosen.into_iter().map(|spec| name(spec).to_owned()).collect(), stores })
    }

    fn find(&self, wanted: &str) -> Result<&StoreSpec, StoresError> {
        let found = self.0.iter().find(|spec| name(spec) == wanted);
        found.ok_or_else(|| StoresError::Unknown(wanted.to_owned()))
    }
}

/// Returns the owner that stores record for the data of this process.
pub(crate) fn owner() -> Owner {
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host: String = host.to_string_lossy().chars().take(Owner::MAX_BYTES / 2).collect();
    Owner::new(&format!("{host}, minivmm {}", std::process::id())).unwrap_or(SOME_MINIVMM)
}

fn bytes_per_second(bandwidth: Bandwidth) -> Option<NonZeroU64> {
    bandwidth.bits_per_second().map(|bits| NonZeroU64::new(bits / 8).unwrap_or(NonZeroU64::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stores(texts: &[&str]) -> Result<PageStores, StoresError> {
        PageStores::new(&texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>())
    }

    fn through(stores: &PageStores, through: &[&str], replicas: usize) -> Result<Vec<String>, StoresError> {
        let through = through.iter().map(|name| (*name).to_owned()).collect();
        let wanted = PageStoreOptions { through, ..PageStoreOptions::default() };
        stores.for_migration(&wanted, replicas, &Sealing::default()).map(|through| through.names)
    }

    #[test]
    fn a_migration_goes_through_the_stores_that_it_names_or_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| format!("{name}=file:{}", folder.path().join(name).display());
        let both = stores(&[&file("a"), &file("b"), &file("a")]).unwrap();
        assert_eq!(through(&both, &[], 1).unwrap(), ["a", "b"]);
        assert_eq!(through(&both, &["b"], 1).unwrap(), ["b"]);
        assert!(matches!(through(&both, &["c"], 1), Err(StoresError::Unknown(name)) if name == "c"));
        assert!(matches!(through(&both, &["b"], 2), Err(StoresError::TooFew { replicas: 2, stores: 1 })));
        assert!(matches!(through(&stores(&[]).unwrap(), &[], 1), Err(StoresError::None)));
        assert!(matches!(stores(&[&file("a"), "a=memory:"]), Err(StoresError::Twice(_))));
        assert!(matches!(through(&both, &["a", "a"], 2), Err(StoresError::NamedTwice(_))));
        let mixed = stores(&["m=memory:", &file("a")]).unwrap();
        assert_eq!(through(&mixed, &[], 1).unwrap(), ["a"]);
    }

    #[test]
    fn a_store_in_memory_is_for_one_process() {
        let memory = stores(&["a=memory:"]).unwrap();
        assert!(matches!(through(&memory, &["a"], 1), Err(StoresError::InMemory(_))));
        let there = memory.for_destination(&Sealing::default());
        assert!(matches!(there, Err(StoresError::InMemory(name)) if name == "a"));
    }

    #[test]
    fn rates_are_bytes_a_second() {
        assert_eq!(bytes_per_second(Bandwidth::UNLIMITED), None);
        assert_eq!(bytes_per_second(Bandwidth::from_bits_per_second(8_000)), NonZeroU64::new(1000));
        assert_eq!(bytes_per_second(Bandwidth::from_bits_per_second(1)), NonZeroU64::new(1));
        assert!(owner().as_str().contains("minivmm"));
    }
}
