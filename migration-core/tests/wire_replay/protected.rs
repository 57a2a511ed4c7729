//! A VM in fail-safe post-copy, at both of its ends, and the fence between them.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet,
    fence::{Fence, NotFenced},
    pager::Pager,
    state::{Section, VmState},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{CheckpointedVm, DestinationHost, DestinationVm, SourceVm, VmDescription, VmError, VmId},
};

use crate::guest::{ArrivingVm, Host, RecordedVm, state};

/// A page that the guest writes at its destination when it is paused for a checkpoint, and the byte
/// that it is full of then.
pub(crate) const WRITTEN_THERE: (u64, u8) = (4, 77);

/// What each end says of itself.
pub(crate) const SOURCE: Bytes = Bytes::from_static(b"the source");
pub(crate) const DESTINATION: Bytes = Bytes::from_static(b"the destination");

/// A time that no test waits for.
pub(crate) const NEVER: Duration = Duration::from_secs(3600);

/// A fence that answers as a test says.
#[derive(Default)]
pub(crate) struct Arbiter {
    /// Whether the other side is known to be dead.
    pub(crate) dead: AtomicBool,
    /// How often that was asked.
    pub(crate) looks: AtomicU64,
    /// Called each time.
    pub(crate) at_look: Mutex<Option<Box<dyn FnMut() + Send>>>,
    /// Why the fence fails, call by call; after these it succeeds.
    pub(crate) refusals: Mutex<VecDeque<&'static str>>,
    /// Whom it has ended.
    pub(crate) fenced: Mutex<Vec<Bytes>>,
}

impl Arbiter {
    pub(crate) fn new(dead: bool, refusals: &[&'static str]) -> Arc<Self> {
        let refusals = Mutex::new(refusals.iter().copied().collect());
        Arc::new(Self { dead: dead.into(), refusals, ..Self::default() })
    }

    pub(crate) fn fenced(&self) -> Vec<Bytes> {
        self.fenced.lock().unwrap().clone()
    }
}

impl Fence for Arbiter {
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced> {
        if let Some(why) = self.refusals.lock().unwrap().pop_front() {
            return Err(NotFenced(why.into()));
        }
        self.fenced.lock().unwrap().push(Bytes::copy_from_slice(identity));
        Ok(())
    }

    fn is_dead(&self, _identity: &[u8]) -> bool {
        self.looks.fetch_add(1, Ordering::SeqCst);
        if let Some(at_look) = &mut *self.at_look.lock().unwrap() {
            at_look();
        }
        self.dead.load(Ordering::SeqCst)
    }
}

/// What a protected VM has seen at its destination.
#[derive(Default)]
pub(crate) struct Seen {
    /// Up to where output was released.
    pub(crate) released: Mutex<Vec<Option<u64>>>,
    /// How often the host heard that the link is back, or not needed any more.
    pub(crate) found: AtomicU64,
}

/// Builds VMs of which checkpoints can be taken.
pub(crate) struct ProtectedHost {
    pub(crate) host: Host,
    pub(crate) seen: Arc<Seen>,
    /// Whether they can be paused for a checkpoint.
    pub(crate) stops: bool,
}

impl DestinationHost for ProtectedHost {
    type Vm = ProtectedVm;

    fn build(&self, vm: &VmDescription) -> Result<ProtectedVm, VmError> {
        Ok(ProtectedVm { vm: self.host.build(vm)?, seen: self.seen.clone(), stops: self.stops })
    }

    fn link_found(&self, _vm: VmId) {
        self.seen.found.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct ProtectedVm {
    vm: ArrivingVm,
    seen: Arc<Seen>,
    stops: bool,
}

impl DestinationVm for ProtectedVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        self.vm.pager()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.vm.load_piece(piece)
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.vm.load_state(state)
    }

    fn identity(&self) -> Bytes {
        DESTINATION
    }

    fn protected(&mut self) -> Option<Box<dyn CheckpointedVm>> {
        let dirty = DirtyBitmap::new(self.vm.ram().layout().clone());
        let tracker = BitmapTracker::new(dirty.clone());
        let (ram, seen) = (self.vm.ram(), self.seen.clone());
        Some(Box::new(Checkpointed { ram, dirty, tracker, seen, stops: self.stops }))
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.vm.start(running)
    }
}

struct Checkpointed {
    ram: Arc<dyn GuestRam>,
    dirty: Arc<DirtyBitmap>,
    tracker: BitmapTracker,
    seen: Arc<Seen>,
    stops: bool,
}

impl CheckpointedVm for Checkpointed {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn pause(&mut self) -> Result<(), VmError> {
        if !self.stops {
            return Err(VmError::new("a vCPU does not stop"));
        }
        let (page, byte) = WRITTEN_THERE;
        self.ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[byte; PAGE_SIZE]);
        self.dirty.mark_page(page);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        Ok(later_state())
    }

    fn hold_output(&mut self) {}

    fn output(&mut self) -> u64 {
        1
    }

    fn release_output(&mut self, until: Option<u64>) {
        self.seen.released.lock().unwrap().push(until);
    }
}

/// The state of each checkpoint.
pub(crate) fn later_state() -> VmState {
    let mut later = state();
    later.sections[0].data = Bytes::from_static(b"later registers of vCPU 0");
    later
}

/// The VM at its source, which takes it back if it can.
pub(crate) struct ProtectedSource {
    pub(crate) vm: RecordedVm,
    pub(crate) restarts: bool,
    /// With which states it was restarted.
    pub(crate) restarted: Vec<VmState>,
}

impl ProtectedSource {
    pub(crate) fn new(vm: RecordedVm) -> Self {
        Self { vm, restarts: true, restarted: Vec::new() }
    }
}

impl SourceVm for ProtectedSource {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        self.vm.describe()
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        SourceVm::ram(&self.vm)
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.vm.tracker()
    }

    fn referenced_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        self.vm.iterate_state(budget)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.vm.throttle(percent)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.vm.save_state()
    }

    fn identity(&self) -> Bytes {
        SOURCE
    }

    fn restart(&mut self, state: &VmState) -> Result<(), VmError> {
        if !self.restarts {
            return Err(VmError::new("no vCPU starts"));
        }
        self.vm.calls.lock().unwrap().push("restart");
        self.restarted.push(state.clone());
        Ok(())
    }

    fn released(&mut self) {
        self.vm.released();
    }
}
