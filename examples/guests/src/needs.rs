//! How much memory a guest needs for its workload.

use crate::{
    GUEST_ELF, WorkloadError, check_spec,
    image::loaded_end,
    layout::{PAGE_SIZE, balloon},
    spec::{self, Spec},
};

/// The guest uses RAM in pieces of this size.
const HUGE: u64 = 2 << 20;
/// No workload needs more to start: more is only a larger area, or more data.
const ENOUGH: u64 = 1 << 30;

/// Returns the bytes of RAM that a guest with so many CPUs needs at least for its workload to start.
///
/// # Errors
/// When the spec is wrong, or no amount of RAM gives each CPU the pages that it needs, as the spec itself limits them.
pub fn least_memory(text: &str, cpus: u32) -> Result<u64, WorkloadError> {
    check_spec(text)?;
    // it was just checked
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

/// Pages that the guest divides: all above its image and page directories, less what the balloon takes.
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
        // what the balloon needs is on top
        assert_eq!(least_memory("hot", 1), Ok(4 << 20));
        assert_eq!((least_memory("churn", 1), least_memory("churn:balloon=off", 1)), (Ok(6 << 20), Ok(4 << 20)));
        assert!(least_memory("rate:percent=1", 16).unwrap() > least_memory("rate", 16).unwrap());
        let small = least_memory("hot:size=4K", 16).unwrap_err();
        assert_eq!(small, WorkloadError::Area { pages: 1, wanted: 128, cpus: 16 });
        assert!(least_memory("rate:percent=0", 1).is_err());
    }
}
