//! A memory checker, which examines a guest from outside while the guest runs. It reports what the
//! guest's pages contain. It also reports whether a page has changed without being in the dirty
//! log, whichever VMM has run the guest meanwhile. In that case, either the log or the memory is
//! broken.

use std::collections::HashSet;

use migration_core::{GuestRam, PAGE_SIZE, PageRange, PageSet, text::Chain};
use serde_json::{Value, json};

use crate::vmm::Machine;

/// The content of a page at the last check.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// Unknown, because the page was written during the check, or was never checked.
    Unknown,
    Checksum(u32),
}

/// Remembers a checksum of each page from one check to the next.
#[derive(Default)]
pub(crate) struct Checker {
    pages: Vec<Seen>,
}

impl Checker {
    /// Checks all of RAM. Returns the figures, and a text if something is wrong.
    pub(crate) fn check(&mut self, machine: &Machine) -> Result<(Value, Option<String>), String> {
        let ram = machine.ram();
        let count = usize::try_from(machine.pages()).map_err(|e| e.to_string())?;
        let first = self.pages.len() != count;
        self.pages.resize(count, Seen::Unknown);
        let log = || machine.dirty_since_last_time().map_err(|e| format!("check: {}", Chain(&e)));
        let mut dirty = log()?;
        let logged = dirty.len();
        let (mut zero, mut contents, mut changed) = (0u64, HashSet::new(), PageSet::empty(machine.pages()));
        let zeros = crc32fast::hash(&[0; PAGE_SIZE]);
        for (page, seen) in (0..).zip(&mut self.pages) {
            let now = checksum(ram, page)?;
            zero += u64::from(now == zeros);
            contents.insert(now);
            let now = Seen::Checksum(now);
            if *seen != Seen::Unknown && *seen != now {
                changed.insert(page);
            }
            *seen = now;
        }
        // these pages were written during the check, so their checksums are of no single moment
        let meanwhile = log()?;
        for page in meanwhile.iter() {
            if let Some(seen) = usize::try_from(page).ok().and_then(|page| self.pages.get_mut(page)) {
                *seen = Seen::Unknown;
            }
        }
        dirty.union_with(&meanwhile);
        let changes = changed.len();
        changed.subtract(&dirty);
        let workload = machine.snapshot().workload.map(|board| board.errors);
        let figures = json!({
            "pages": count, "zero": zero, "distinct": contents.len(), "logged": if first { json!(null) } else { json!(logged) },
            "changed": changes, "not_logged": changed.len(), "workload_errors": workload,
        });
        let wrong = match (changed.iter().next(), workload) {
            (Some(page), _) => Some(format!("{} pages changed without being logged, page {page} first", changed.len())),
            (None, Some(errors)) if errors > 0 => Some(format!("the guest's workload has found {errors} errors")),
            _ => None,
        };
        Ok((figures, wrong))
    }
}

fn checksum(ram: &dyn GuestRam, page: u64) -> Result<u32, String> {
    let mut copy = [0; PAGE_SIZE];
    ram.slice(PageRange::new(page, 1)).map_err(|e| format!("check: {e}"))?.copy_to(&mut copy);
    Ok(crc32fast::hash(&copy))
}

#[cfg(test)]
mod tests {
    use migration_kvm::{ram::Backing, tracker::TrackerKind};

    use super::*;
    use crate::vmm::{MachineConfig, SerialTarget};

    #[test]
    fn a_page_that_changes_behind_the_log_is_found() {
        let config = MachineConfig::new(16 << 20, 1, Backing::Memfd, TrackerKind::default());
        let machine = Machine::new(config, &SerialTarget::Null).unwrap();
        if machine.snapshot().software {
            note!("skipped: without KVM every write is logged, whoever makes it");
            return;
        }
        let mut checker = Checker::default();
        let (figures, wrong) = checker.check(&machine).unwrap();
        assert_eq!((figures["pages"].as_u64(), figures["zero"].as_u64(), wrong), (Some(4096), Some(4096), None));
        let (figures, wrong) = checker.check(&machine).unwrap();
        assert_eq!((figures["logged"].as_u64(), figures["changed"].as_u64(), wrong), (Some(0), Some(0), None));
        let ram = machine.ram();
        ram.write(77 << 12, b"nobody has logged this").unwrap();
        let (figures, wrong) = checker.check(&machine).unwrap();
        assert_eq!((figures["changed"].as_u64(), figures["not_logged"].as_u64()), (Some(1), Some(1)));
        assert!(wrong.unwrap().contains("page 77"));
        // the change is reported once
        assert_eq!(checker.check(&machine).unwrap().1, None);
    }
}
