//! KVM's dirty rings: each vCPU lists the pages that it dirties.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use migration_core::{
    PageSet,
    tracker::{DirtyTracker, TrackerError},
};

use super::{
    GuestSlots, failed, inactive,
    ring_map::{self, RingMap},
};

const NAME: &str = "dirty-ring";

/// What a VM got by [`DirtyRing::enable`]: rings for its vCPUs.
pub struct EnabledRing {
    collector: Arc<RingCollector>,
}

impl EnabledRing {
    /// Where vCPUs are added, and where they collect when their ring is full.
    pub fn collector(&self) -> Arc<RingCollector> {
        self.collector.clone()
    }

    /// Entries in each vCPU's ring.
    pub fn entries(&self) -> u32 {
        self.collector.entries
    }
}

/// Collects the pages in the dirty rings. The VMM's vCPU loops hold it.
///
/// When `KVM_RUN` returns with `KVM_EXIT_DIRTY_RING_FULL` (`VcpuExit::Unsupported(31)` in kvm-ioctls), the loop calls
/// [`collect`](Self::collect) and runs on: KVM does not let a vCPU run with a full ring. That holds also while no
/// tracker is active or a migration has just failed.
pub struct RingCollector {
    vm: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rings: Vec<RingMap>,
    /// Where what is collected goes; `None` while no tracker is active: then it is forgotten.
    tracking: Option<Tracking>,
}

struct Tracking {
    slots: Arc<GuestSlots>,
    /// What was collected or put back since the last harvest.
    pending: PageSet,
}

impl RingCollector {
    /// Maps the ring of a new vCPU. Call it for every vCPU of the VM after its creation, and before it runs while a
    /// tracker is active.
    ///
    /// # Errors
    /// When the ring cannot be mapped.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), TrackerError> {
        let ring = RingMap::new(vcpu, self.entries).map_err(failed(NAME, "map a vCPU's ring"))?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// Empties all rings and keeps what they listed for the next harvest. Returns how many entries there were. May be
    /// called from any thread, at any time; waits while another thread collects.
    ///
    /// # Errors
    /// When KVM refuses to reset the rings. What was listed is kept all the same.
    pub fn collect(&self) -> Result<u64, TrackerError> {
        self.collect_into(&mut self.lock())
    }

    fn collect_into(&self, state: &mut State) -> Result<u64, TrackerError> {
        let mut taken = 0;
        for ring in &mut state.rings {
            // entries taken here become free only by the reset below, so this ends
            while let Some((slot, offset)) = ring.take() {
                taken += 1;
                let Some(tracking) = &mut state.tracking else { continue };
                // slots that are no RAM are none of ours
                if let Some(page) = tracking.slots.page_in_slot(slot, offset) {
                    tracking.pending.insert(page);
                }
            }
        }
        // Under the lock still: a harvest must not return a page before it is protected again, or a write between its
        // reading for sending and the reset would go unseen.
        if taken != 0 {
            ring_map::reset(&self.vm).map_err(failed(NAME, "reset the rings"))?;
        }
        Ok(taken)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // no code that holds the lock leaves the state half-changed
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// KVM's dirty rings.
///
/// Collecting costs by what is dirty, not by the size of RAM. In exchange the VMM must [`enable`](Self::enable) them before
/// it creates a vCPU (the dirty log is then not available), [add each vCPU](RingCollector::add_vcpu), and collect
/// when a ring is full, see [`RingCollector`].
///
/// **While vCPUs run**, a harvest may miss writes of the last moments: hardware (PML) buffers them, and KVM moves them
/// to the ring when the vCPU next leaves guest mode. They are reported by a later harvest. After a pause nothing is
/// missed: a vCPU whose thread has returned from `KVM_RUN` has an empty buffer. A VMM that wants them earlier kicks its vCPUs
/// before a harvest.
///
/// Dropping it stops it.
pub struct DirtyRing {
    collector: Arc<RingCollector>,
    slots: Arc<GuestSlots>,
    active: bool,
}

impl DirtyRing {
    /// Gives every later vCPU of `vm` a ring of `entries` entries; fewer, if KVM allows only fewer. An entry is 16 bytes
    /// and a page; a full ring stops its vCPU until it is collected, so 16,384 and more are sensible.
    ///
    /// # Errors
    /// When KVM has no dirty ring, `entries` is no power of two or too small, or the VM has a vCPU already.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<EnabledRing, TrackerError> {
        // with ACQ_REL, KVM promises the ordering that `RingMap` relies on also where the architecture does not give it
        let offer = |cap: u32| (cap, vm.check_extension_raw(cap.into()));
        let offers = [offer(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), offer(KVM_CAP_DIRTY_LOG_RING)];
        let Some((cap, max_bytes)) = offers.into_iter().find(|&(_, bytes)| bytes > 0) else {
            return Err(failed(NAME, "enable")("KVM does not offer it"));
        };
        if !entries.is_power_of_two() {
            return Err(failed(NAME, "enable")(format!("{entries} entries are no power of two")));
        }
        let size = size_of::<kvm_dirty_gfn>() as u64;
        let bytes = (u64::from(entries) * size).min(u64::from(max_bytes.unsigned_abs()));
        let request = kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&request).map_err(|error| match error.errno() {
            libc::EINVAL => {
                failed(NAME, "enable")(format!("{error}: a vCPU exists already, or {entries} entries are too few"))
            }
            _ => failed(NAME, "enable")(error),
        })?;
        let entries = (bytes / size) as u32;
        Ok(EnabledRing { collector: Arc::new(RingCollector { vm, entries, state: Mutex::default() }) })
    }

    /// A tracker for these slots of the VM that the rings were enabled on, not started.
    pub fn new(ring: &EnabledRing, slots: Arc<GuestSlots>) -> Self {
        Self { collector: ring.collector(), slots, active: false }
    }

    /// Where vCPUs are added, and where they collect when their ring is full.
    pub fn collector(&self) -> Arc<RingCollector> {
        self.collector.clone()
    }
}

impl DirtyTracker for DirtyRing {
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
        {
            let mut state = self.collector.lock();
            if state.tracking.is_some() {
                return Err(failed(NAME, "start")("another tracker uses these rings"));
            }
            self.collector.collect_into(&mut state)?;
            // before logging is on: a vCPU whose ring fills up at once finds where its pages go
            let pending = PageSet::empty(self.slots.capacity());
            state.tracking = Some(Tracking { slots: self.slots.clone(), pending });
        }
        self.active = true;
        let logging = self.slots.set_logging(&self.collector.vm, true);
        if logging.is_err() {
            let _ = self.stop(); // the first error is the one to tell
        }
        logging.map_err(failed(NAME, "turn logging on"))
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        // not under the lock: a vCPU may be collecting, and KVM waits for vCPUs when slots change
        let logging = self.slots.set_logging(&self.collector.vm, false);
        let mut state = self.collector.lock();
        state.tracking = None;
        let emptied = self.collector.collect_into(&mut state);
        logging.map_err(failed(NAME, "turn logging off")).and(emptied.map(drop))
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        if !self.active {
            return Err(inactive(NAME));
        }
        let mut state = self.collector.lock();
        self.collector.collect_into(&mut state)?;
        let tracking = state.tracking.as_mut().ok_or_else(|| inactive(NAME))?;
        into.union_with(&tracking.pending);
        tracking.pending.clear();
        Ok(())
    }

    fn put_back(&mut self, pages: &PageSet) {
        if let Some(tracking) = &mut self.collector.lock().tracking {
            tracking.pending.union_with(pages);
        }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let _ = self.stop(); // nobody is left to tell
    }
}
