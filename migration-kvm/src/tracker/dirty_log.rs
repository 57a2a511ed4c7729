//! KVM's dirty log in its classic form, where reading the log clears it.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};
use kvm_ioctls::VmFd;
use migration_core::{
    PageSet,
    tracker::{DirtyTracker, TrackerError},
};

use super::{GuestSlots, failed, inactive};

const NAME: &str = "dirty-log";

/// A tracker that uses `KVM_GET_DIRTY_LOG`. This ioctl also clears the log and write-protects the
/// pages that were dirty, for a whole memory slot at a time.
///
/// [`start`](DirtyTracker::start) sets every memory slot again, with `KVM_MEM_LOG_DIRTY_PAGES`. The
/// VMM must not change the flags of the slots until [`stop`](DirtyTracker::stop). Dropping the
/// tracker stops it.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Arc<GuestSlots>,
    pending: PageSet,
    buffer: Vec<u64>,
    active: bool,
}

impl DirtyLog {
    /// Makes a tracker for these slots of `vm`. It is not started yet.
    pub fn new(vm: Arc<VmFd>, slots: Arc<GuestSlots>) -> Self {
        let pending = PageSet::empty(slots.capacity());
        Self { vm, slots, pending, buffer: Vec::new(), active: false }
    }
}

impl DirtyTracker for DirtyLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn is_active(&self) -> bool {
        self.active
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        if self.active {
            return Ok(());
        }
        // if manual protection is still on, reading does not clear the log, and every page stays
        // dirty
        set_manual_protect(&self.vm, 0).map_err(failed(NAME, "switch manual protection off"))?;
        self.slots.set_logging(&self.vm, true).map_err(failed(NAME, "turn logging on"))?;
        self.active = true;
        self.pending.clear();
        // A VM with a dirty ring refuses to return its log, so find that out now. Pages that this
        // read returns are kept for the next harvest.
        let read = self.slots.read_logs(&self.vm, &mut self.buffer, &mut self.pending);
        if let Err(error) = read {
            let _ = self.stop(); // report the first error
            return Err(failed(NAME, "read the log")(error));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        self.pending.clear();
        self.slots.set_logging(&self.vm, false).map_err(failed(NAME, "turn logging off"))
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        if !self.active {
            return Err(inactive(NAME));
        }
        // through `pending`, so that the pages of earlier slots are kept if a later slot fails
        let read = self.slots.read_logs(&self.vm, &mut self.buffer, &mut self.pending);
        read.map_err(failed(NAME, "read the log"))?;
        into.union_with(&self.pending);
        self.pending.clear();
        Ok(())
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        self.pending.union_with(pages);
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        let _ = self.stop(); // ignored: a drop cannot report errors
    }
}

/// Sets the options of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`. Without the capability only 0 is
/// possible.
pub(super) fn set_manual_protect(vm: &VmFd, options: u64) -> std::io::Result<()> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    if options == 0 && vm.check_extension_raw(cap.into()) <= 0 {
        return Ok(());
    }
    let request = kvm_enable_cap { cap, args: [options, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&request).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}
