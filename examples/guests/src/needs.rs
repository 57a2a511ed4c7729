//! Computes how much memory a guest needs for its workload.

use crate::{
    GUEST_ELF, WorkloadError, check_spec,
    image::loaded_end,
    layout::{PAGE_SIZE, balloon},
    spec::{self, Spec},
};

/// The guest uses RAM in units of this size.
const HUGE: u64 = 2 << 20;
/// An amount of RAM that is enough for every workload to start: more only makes the area or the
/// data larger.
const ENOUGH: u64 = 1 << 30;

/// Returns the RAM in bytes that a guest with this number of CPUs needs at least for its workload
/// to start.
///
/// # Errors
/// When the spec is wrong, or the spec limits its area to fewer pages than the CPUs need.
pub fn least_memory(text: &str, cpus: u32) -> Result<u64, WorkloadError> {
    check_spec(text)?;
    // The spec has just been checked.
    let Ok(spec) = Spec::parse(text) else { return Err(WorkloadError::TooLong(text.len())) };
    let wanted = spec::LEAST_AREA * u64::from(cpus);
    let mut pages = 0;
    for memory in (HUGE..=ENOUGH).step_by(HUGE as usize) {
        let ram = usable(&spec, memory);
        pages = spec.shares(ram).work;
        if ram >= spec::LEAST_RAM && pages >= wanted {
            return Ok(memory);
        }
    }
    Err(WorkloadError::Area { pages, wanted, cpus })
}

/// Returns the pages that the guest divides: all above its image and page directories, except those
/// of the balloon.
fn usable(spec: &Spec<'_>, memory: u64) -> u64 {
    let floor = (loaded_end(GUEST_ELF) + PAGE_SIZE).next_multiple_of(HUGE);
    let ram = memory.saturating_sub(floor) / PAGE_SIZE;
    if spec.value("balloon") == 0 {
        return ram;
    }
    let bytes = (memory / PAGE_SIZE).div_ceil(64) * 8 + balloon::SLOTS * balloon::SLOT_SIZE;
    ram.saturating_sub(bytes.div_ceil(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_workload_starts_in_a_few_mebibytes() {
        for info in spec::LIST {
            for cpus in [1, 16] {
                let least = least_memory(info.name, cpus).unwrap();
                assert!((4 << 20..=16 << 20).contains(&least), "{} {cpus}: {least:#x}", info.name);
            }
        }
        // The balloon's pages come on top.
        assert_eq!(least_memory("hot", 1), Ok(4 << 20));
        assert_eq!((least_memory("churn", 1), least_memory("churn:balloon=off", 1)), (Ok(6 << 20), Ok(4 << 20)));
        assert!(least_memory("rate:percent=1", 16).unwrap() > least_memory("rate", 16).unwrap());
        let small = least_memory("hot:size=4K", 16).unwrap_err();
        assert_eq!(small, WorkloadError::Area { pages: 1, wanted: 128, cpus: 16 });
        assert!(least_memory("rate:percent=0", 1).is_err());
    }
}
