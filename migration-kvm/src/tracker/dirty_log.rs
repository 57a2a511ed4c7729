//! KVM's dirty log in its classic form: reading clears.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};
use kvm_ioctls::VmFd;
use migration_core::{
    PageSet,
    tracker::{DirtyTracker, TrackerError},
};

use super::{GuestSlots, failed, inactive};

const NAME: &str = "dirty-log";

/// KVM's dirty log: `KVM_GET_DIRTY_LOG`, which also clears the log and write-protects what was dirty, for all of RAM at
/// once.
///
/// Starting sets each memory slot again with `KVM_MEM_LOG_DIRTY_PAGES`; the VMM must not change the slots' flags itself
/// in between. Dropping it stops it.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Arc<GuestSlots>,
    pending: PageSet,
    buffer: Vec<u64>,
    active: bool,
}

impl DirtyLog {
    /// A tracker for these slots of `vm`, not started.
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
        // with manual protection left on, reading would not clear, and every page would stay dirty for ever
        set_manual_protect(&self.vm, 0).map_err(failed(NAME, "switch manual protection off"))?;
        self.slots.set_logging(&self.vm, true).map_err(failed(NAME, "turn logging on"))?;
        self.active = true;
        self.pending.clear();
        // a VM with a dirty ring refuses to give its log: say so now. What this read finds stays to be harvested.
        let read = self.slots.read_logs(&self.vm, &mut self.buffer, &mut self.pending);
        if let Err(error) = read {
            let _ = self.stop(); // the first error is the one to tell
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
        // through `pending`, so that what some slots said is kept when a later one fails
        let read = self.slots.read_logs(&self.vm, &mut self.buffer, &mut self.pending);
        read.map_err(failed(NAME, "read the log"))?;
        into.union_with(&self.pending);
        self.pending.clear();
        Ok(())
    }

    fn put_back(&mut self, pages: &PageSet) {
        self.pending.union_with(pages);
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        let _ = self.stop(); // nobody is left to tell
    }
}

/// Sets the options of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`. Without the capability only "none" can be had.
pub(super) fn set_manual_protect(vm: &VmFd, options: u64) -> std::io::Result<()> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    if options == 0 && vm.check_extension_raw(cap.into()) <= 0 {
        return Ok(());
    }
    let request = kvm_enable_cap { cap, args: [options, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&request).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}
