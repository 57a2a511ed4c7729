//! KVM's dirty rings, in which each vCPU lists the pages that it dirties.

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

/// The dirty rings of a VM on which [`DirtyRing::enable`] was called.
pub struct EnabledRing {
    collector: Arc<RingCollector>,
}

impl EnabledRing {
    /// Returns the collector, to which vCPUs are added, and which empties full rings.
    pub fn collector(&self) -> Arc<RingCollector> {
        self.collector.clone()
    }

    /// Returns the number of entries in each vCPU's ring.
    pub fn entries(&self) -> u32 {
        self.collector.entries
    }
}

/// Collects the pages from the dirty rings. The VMM's vCPU loops share it.
///
/// If `KVM_RUN` returns with `KVM_EXIT_DIRTY_RING_FULL` (`VcpuExit::Unsupported(31)` in
/// kvm-ioctls), the loop must call [`collect`](Self::collect) before it runs the vCPU again,
/// because KVM does not run a vCPU with a full ring. This can happen also while no tracker is
/// active or after a migration has failed.
pub struct RingCollector {
    vm: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rings: Vec<RingMap>,
    /// The place for collected pages. `None` while no tracker is active; collected pages are then
    /// ignored.
    tracking: Option<Tracking>,
}

struct Tracking {
    slots: Arc<GuestSlots>,
    /// The pages that were collected or marked dirty again since the last harvest.
    pending: PageSet,
}

impl RingCollector {
    /// Maps the ring of a new vCPU. Must be called for every vCPU of the VM after its creation. If
    /// a tracker is active, it must be called before the vCPU runs.
    ///
    /// # Errors
    /// Fails if the ring cannot be mapped.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), TrackerError> {
        let ring = RingMap::new(vcpu, self.entries).map_err(failed(NAME, "map a vCPU's ring"))?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// Empties all rings and keeps their pages for the next harvest. Returns the number of entries.
    /// May be called from any thread at any time; it waits while another thread collects.
    ///
    /// # Errors
    /// Fails if KVM refuses to reset the rings. The collected pages are kept all the same.
    pub fn collect(&self) -> Result<u64, TrackerError> {
        self.collect_into(&mut self.lock())
    }

    fn collect_into(&self, state: &mut State) -> Result<u64, TrackerError> {
        let mut collected = 0;
        for ring in &mut state.rings {
            // ends, because entries that are taken here become free only by the reset below
            while let Some((slot, offset)) = ring.take() {
                collected += 1;
                let Some(tracking) = &mut state.tracking else { continue };
                // ignore slots that hold no RAM
                if let Some(page) = tracking.slots.page_in_slot(slot, offset) {
                    tracking.pending.insert(page);
                }
            }
        }
        // Still under the lock: a harvest must not return a page before the reset has protected it
        // again. Otherwise a write after the page was read for sending and before the reset would
        // be missed.
        if collected != 0 {
            ring_map::reset(&self.vm).map_err(failed(NAME, "reset the rings"))?;
        }
        Ok(collected)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // no code that can panic leaves the state half changed
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A tracker that uses KVM's dirty rings.
///
/// The cost of collecting depends on the number of dirty pages and not on the size of RAM. In
/// exchange the VMM must [`enable`](Self::enable) the rings before it creates a vCPU (the dirty log
/// is then not available), [add each vCPU](RingCollector::add_vcpu), and collect when a ring is
/// full, see [`RingCollector`].
///
/// **While vCPUs run**, a harvest may miss the latest writes. The hardware (PML) buffers them, and
/// KVM moves them to the ring when the vCPU next leaves guest mode. A later harvest reports them.
/// Nothing is missed after a pause: the buffer of a vCPU is empty once its thread has returned from
/// `KVM_RUN`. A VMM that needs these writes earlier kicks its vCPUs before the harvest.
///
/// Dropping the tracker stops it.
pub struct DirtyRing {
    collector: Arc<RingCollector>,
    slots: Arc<GuestSlots>,
    active: bool,
}

impl DirtyRing {
    /// Gives every later vCPU of `vm` a ring of `entries` entries, or of the largest number that
    /// KVM allows. An entry takes 16 bytes and stands for one page. A full ring stops its vCPU
    /// until it is collected, so use at least 16,384 entries.
    ///
    /// # Errors
    /// Fails if KVM has no dirty rings, if `entries` is no power of two or too small, or if the VM
    /// has a vCPU already.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<EnabledRing, TrackerError> {
        // With ACQ_REL, KVM guarantees the memory ordering on which `RingMap` relies on every
        // architecture.
        let offer = |cap: u32| (cap, vm.check_extension_raw(cap.into()));
        let offers = [offer(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), offer(KVM_CAP_DIRTY_LOG_RING)];
        let Some((cap, max_bytes)) = offers.into_iter().find(|&(_, bytes)| bytes > 0) else {
            return Err(failed(NAME, "enable")("KVM has no dirty rings"));
        };
        if !entries.is_power_of_two() {
            return Err(failed(NAME, "enable")(format!("{entries} is no power of two")));
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

    /// Makes a tracker for these slots of the VM that has the rings. It is not started yet.
    pub fn new(ring: &EnabledRing, slots: Arc<GuestSlots>) -> Self {
        Self { collector: ring.collector(), slots, active: false }
    }

    /// Returns the collector, to which vCPUs are added, and which empties full rings.
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
            // before logging is turned on, so that a vCPU whose ring is full at once has a place
            // for its pages
            let pending = PageSet::empty(self.slots.capacity());
            state.tracking = Some(Tracking { slots: self.slots.clone(), pending });
        }
        self.active = true;
        let logging = self.slots.set_logging(&self.collector.vm, true);
        if logging.is_err() {
            let _ = self.stop(); // report the first error
        }
        logging.map_err(failed(NAME, "turn logging on"))
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        // not under the lock: KVM waits for vCPUs when slots change, and a vCPU may wait for the
        // lock to collect
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

    fn mark_dirty(&mut self, pages: &PageSet) {
        if let Some(tracking) = &mut self.collector.lock().tracking {
            tracking.pending.union_with(pages);
        }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let _ = self.stop(); // ignored: a drop cannot report errors
    }
}
