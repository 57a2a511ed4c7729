//! A reserve of huge pages for the time of the tests.

use std::fs;

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";
/// Two VMs of 64 MiB in each of two trials at a time, and some for a VM that is just being taken
/// apart.
const PAGES: u64 = 192;

/// Gives the pages back when dropped.
pub(crate) struct HugePages(u64);

impl HugePages {
    pub(crate) fn reserve() -> Result<Self, String> {
        let before = count()?;
        set(before + PAGES)?;
        let this = Self(count()?.saturating_sub(before));
        if this.0 == PAGES { Ok(this) } else { Err("too little memory is free in pieces of 2 MiB".into()) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // relative: somebody else may have reserved some meanwhile
        let _ = count().and_then(|now| set(now.saturating_sub(self.0)));
    }
}

fn count() -> Result<u64, String> {
    let text = fs::read_to_string(NR_HUGEPAGES).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
    text.trim().parse().map_err(|e| format!("{NR_HUGEPAGES}: {e}"))
}

fn set(pages: u64) -> Result<(), String> {
    fs::write(NR_HUGEPAGES, pages.to_string()).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))
}
