//! Dirty tracking with the host's page tables, without KVM.

use std::sync::Arc;

use migration_core::{
    GuestRam, PAGE_SHIFT, PageRange, PageSet,
    tracker::{DirtyTracker, TrackerError},
};

use super::{UserFault, failed, features, inactive, user_fault::Modes};
use crate::ram::pagemap::{Pagemap, Query, is_shared};

const NAME: &str = "write-protect";

/// A tracker that write-protects guest RAM in this process's page tables, with userfaultfd's
/// asynchronous mode. The kernel lifts the protection at the first write and remembers the write;
/// no thread handles a fault. A harvest is a PAGEMAP_SCAN.
///
/// The tracker sees every write through this mapping, by vCPUs, KVM, devices and the VMM. It does
/// not see writes through *another* mapping (of another process, of vhost-user, or of
/// [`MappedRam::alias`](crate::ram::MappedRam::alias)). It works with every backing.
///
/// Huge pages:
/// - A write to a huge page of a file (hugetlb or transparent) makes all 512 pages dirty each time.
/// - A transparent huge page of private memory is reported as a whole if it is new or was not split
///   yet. The first write splits it into 4 KiB pages.
///
/// On shared memory, starting marks every page table entry, also those of holes, so page tables for
/// all of RAM are allocated (8 bytes per page). On private memory holes cost nothing.
///
/// The RAM must not be registered with another userfaultfd. Dropping the tracker stops it.
pub struct WriteProtect {
    ram: Arc<dyn GuestRam>,
    user_fault: Arc<UserFault>,
    pending: PageSet,
    active: Option<Active>,
}

struct Active {
    pagemap: Pagemap,
    regions: Vec<Region>,
    /// Pages that are known to be populated, so that the file need not be asked again (6 ms for 512
    /// MiB).
    known: PageSet,
}

#[derive(Clone, Copy)]
struct Region {
    address: u64,
    pages: PageRange,
    shared: bool,
}

impl WriteProtect {
    /// Makes a tracker for all of `ram`. It is not started yet. A pager may use `user_fault` at the
    /// same time.
    pub fn new(ram: Arc<dyn GuestRam>, user_fault: Arc<UserFault>) -> Self {
        let pending = PageSet::empty(ram.layout().pages());
        Self { ram, user_fault, pending, active: None }
    }

    fn begin(&self, regions: &mut Vec<Region>) -> Result<Pagemap, TrackerError> {
        let missing = features::WRITE_TRACKING & !self.user_fault.features();
        if missing != 0 {
            return Err(failed(NAME, "start")(format!("userfaultfd lacks features {missing:#x}")));
        }
        // without `/proc` this tracker cannot work, and the probe offers others
        let pagemap = Pagemap::open().map_err(failed(NAME, "open /proc/self/pagemap (is /proc mounted?)"))?;
        if !pagemap.can_scan() {
            return Err(failed(NAME, "start")("the kernel has no PAGEMAP_SCAN"));
        }
        let layout = self.ram.layout();
        for index in 0..layout.regions().len() {
            let Some(pages) = layout.region_pages(index) else { continue };
            let address = self.ram.host_address(index).as_ptr() as u64;
            let shared = is_shared(address).map_err(failed(NAME, "read /proc/self/maps"))?;
            self.user_fault
                .register(address, pages.bytes(), Modes::WRITE_PROTECT)
                .map_err(failed(NAME, "register RAM"))?;
            let region = Region { address, pages, shared };
            regions.push(region);
            // registering protects nothing; the first scan does
            region.scan(&pagemap, &mut PageSet::empty(0))?;
        }
        Ok(pagemap)
    }

    fn unregister(&self, regions: &[Region]) -> Result<(), TrackerError> {
        // unregistering removes all protection; continue after an error
        let results = regions.iter().map(|r| {
            let done = self.user_fault.unregister(r.address, r.pages.bytes(), Modes::WRITE_PROTECT);
            done.map_err(failed(NAME, "unregister RAM"))
        });
        results.fold(Ok(()), Result::and)
    }
}

impl Region {
    /// Adds the pages written since the last scan to `into`, and protects them again.
    fn scan(&self, pagemap: &Pagemap, into: &mut PageSet) -> Result<(), TrackerError> {
        let query = if self.shared { Query::written_conservative() } else { Query::written() };
        let found = |from: u64, end: u64| {
            let first = self.pages.first + ((from - self.address) >> PAGE_SHIFT);
            into.insert_range(PageRange::new(first, (end - from) >> PAGE_SHIFT));
        };
        pagemap.scan(self.address, self.pages.bytes(), query, found).map_err(failed(NAME, "scan"))
    }
}

impl DirtyTracker for WriteProtect {
    fn name(&self) -> &'static str {
        NAME
    }

    fn is_active(&self) -> bool {
        self.active.is_some()
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        if self.active.is_some() {
            return Ok(());
        }
        self.pending.clear();
        let mut regions = Vec::new();
        match self.begin(&mut regions) {
            Ok(pagemap) => {
                let known = PageSet::empty(self.pending.capacity());
                self.active = Some(Active { pagemap, regions, known });
                Ok(())
            }
            Err(error) => {
                let _ = self.unregister(&regions); // report the first error
                Err(error)
            }
        }
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        self.pending.clear();
        match self.active.take() {
            Some(active) => self.unregister(&active.regions),
            None => Ok(()),
        }
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        let Some(active) = &mut self.active else { return Err(inactive(NAME)) };
        let mut uncertain = PageSet::empty(self.pending.capacity());
        for region in &active.regions {
            // the scan protects its pages again, so they go into `pending` at once and are kept if
            // a later scan fails
            let found = if region.shared { &mut uncertain } else { &mut self.pending };
            let scanned = region.scan(&active.pagemap, found);
            if let Err(error) = scanned {
                self.pending.union_with(&uncertain);
                return Err(error);
            }
        }
        let mut unknown = uncertain.clone();
        unknown.subtract(&active.known);
        // Unpopulated pages of a file look written at their first scan. It is safe to ask for
        // populated pages *after* the scan: a page that is populated in between is among them, and
        // its protection, which the scan set, reports it again.
        if !unknown.is_empty() {
            match self.ram.populated(&mut active.known) {
                Ok(()) => uncertain.intersect_with(&active.known),
                // if that is unknown, the pages count as written
                Err(_) => active.known.union_with(&uncertain),
            }
        }
        self.pending.union_with(&uncertain);
        into.union_with(&self.pending);
        self.pending.clear();
        Ok(())
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        self.pending.union_with(pages);
    }
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        let _ = self.stop(); // ignored: a drop cannot report errors
    }
}
