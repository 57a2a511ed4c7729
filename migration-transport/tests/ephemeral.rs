//! Tests of ephemeral virtualization over Unix sockets: a guest moves back and forth between two
//! VMMs that both have its VM.
//!
//! The RAM that the VMMs share is on the heap of this process; the files that are sent only take
//! the place of its memory files.

#[allow(dead_code, reason = "shared with other tests")]
mod common;

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use common::layout;
use migration_core::{
    GuestRam, HeapRam, PageSet,
    checkpoint::FailSafe,
    engine::{
        Controller, ReceiveError, ReceiverOptions, SourceOptions,
        ephemeral::{Active, Awaiting, PersistentVm, Standby},
    },
    fence::NoFence,
    report::{Outcome, Report},
    state::{Section, VmState},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationVm, SourceVm, VmDescription, VmError, VmId},
};
use migration_transport::{Address, ConnectOptions, bind, connector};
use tempfile::TempDir;

/// What both VMMs share.
struct Shared {
    ram: Arc<HeapRam>,
    files: Vec<File>,
    /// The number of VMMs in which the guest runs.
    running: AtomicU32,
}

/// The VM in one VMM.
struct Seat {
    shared: Arc<Shared>,
    id: VmId,
    /// The guest's only register: the number of times that it has begun to run in a VMM.
    stays: AtomicU64,
    bitmap: Arc<DirtyBitmap>,
    tracker: Mutex<Option<BitmapTracker>>,
    failing_loads: AtomicU32,
    keeps_no_log: bool,
}

impl Seat {
    fn new(shared: &Arc<Shared>) -> Arc<Self> {
        Self::with(shared, VmId([3; 16]), false)
    }

    fn with(shared: &Arc<Shared>, id: VmId, keeps_no_log: bool) -> Arc<Self> {
        let bitmap = DirtyBitmap::new(layout());
        let tracker = Mutex::new(Some(BitmapTracker::new(bitmap.clone())));
        let (stays, failing_loads) = (AtomicU64::new(0), AtomicU32::new(0));
        Arc::new(Self { shared: shared.clone(), id, stays, bitmap, tracker, failing_loads, keeps_no_log })
    }

    /// Writes a page as the guest, which must run in this VMM.
    fn write(&self, page: u64) {
        assert_eq!(self.shared.running.load(Ordering::SeqCst), 1);
        self.bitmap.mark_page(page);
    }

    fn log(&self) -> Vec<u64> {
        let mut log = PageSet::empty(layout().pages());
        self.tracker.lock().unwrap().as_mut().unwrap().harvest(&mut log).unwrap();
        log.iter().collect()
    }
}

struct Vm(Arc<Seat>);

impl PersistentVm for Vm {
    type Coming = Coming;

    fn id(&self) -> VmId {
        self.0.id
    }

    fn leaving(&mut self) -> Box<dyn SourceVm> {
        let tracker = self.0.tracker.lock().unwrap().take().unwrap();
        Box::new(Leaving { seat: self.0.clone(), tracker: Some(tracker) })
    }

    fn coming(&mut self, _vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Coming, VmError> {
        assert_eq!(files.len(), 2);
        Ok(Coming(self.0.clone()))
    }
}

struct Leaving {
    seat: Arc<Seat>,
    tracker: Option<BitmapTracker>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        *self.seat.tracker.lock().unwrap() = self.tracker.take();
    }
}

impl SourceVm for Leaving {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        let (id, layout, devices) = (self.seat.id, layout(), Vec::new());
        Ok(VmDescription { id, layout, devices, host_needs: Bytes::new(), config: Bytes::new() })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.seat.shared.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.tracker.as_mut().unwrap()
    }

    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        Ok(self.seat.shared.files.iter().map(AsFd::as_fd).collect())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        assert_eq!(self.seat.shared.running.fetch_sub(1, Ordering::SeqCst), 1);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert_eq!(self.seat.shared.running.fetch_add(1, Ordering::SeqCst), 0);
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        // saving also writes RAM
        self.seat.bitmap.mark_page(7);
        let data = Bytes::copy_from_slice(&self.seat.stays.load(Ordering::SeqCst).to_le_bytes());
        Ok(VmState { sections: vec![Section { name: "cpu".into(), instance: 0, version: 1, data }] })
    }

    fn released(&mut self) {
        self.tracker.as_mut().unwrap().stop().unwrap();
    }
}

struct Coming(Arc<Seat>);

impl DestinationVm for Coming {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.0.shared.ram.clone()
    }

    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        if self.0.keeps_no_log {
            return Err(VmError::new("there is no log here"));
        }
        let mut tracker = self.0.tracker.lock().unwrap();
        let tracker = tracker.as_mut().unwrap();
        tracker.start().unwrap();
        tracker.mark_dirty(dirty);
        Ok(())
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        let failing = self.0.failing_loads.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if failing.is_ok() {
            return Err(VmError::new("the state is refused, as asked"));
        }
        assert_eq!(state.sections.len(), 1, "the log is not a device's affair");
        let cpu = state.find("cpu", 0).ok_or_else(|| VmError::new("no cpu"))?;
        let stays = u64::from_le_bytes(*cpu.data.first_chunk().unwrap());
        self.0.stays.store(stays, Ordering::SeqCst);
        Ok(())
    }

    fn start(&mut self, _running: bool) -> Result<(), VmError> {
        assert_eq!(self.0.shared.running.fetch_add(1, Ordering::SeqCst), 0, "it runs in two VMMs");
        self.0.stays.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct World {
    folder: TempDir,
    shared: Arc<Shared>,
}

impl World {
    fn new() -> Self {
        let files = layout().regions().iter().map(|_| tempfile::tempfile().unwrap()).collect();
        let ram = Arc::new(HeapRam::new(layout()).unwrap());
        let running = AtomicU32::new(1);
        Self { folder: tempfile::tempdir().unwrap(), shared: Arc::new(Shared { ram, files, running }) }
    }

    fn address(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Moves the guest. Both sides work at the same time.
    fn switch(&self, from: Active<Vm>, to: Standby<Vm>) -> (Standby<Vm>, Active<Vm>) {
        let ((gone, report), came) = self.attempt(from, to.await_guest(options()));
        let why = report.reason;
        (gone.ok().expect("it went"), came.map_err(|(_, e)| format!("{e} {why:?}")).expect("it came"))
    }

    fn attempt(&self, from: Active<Vm>, to: Awaiting<Vm>) -> (Gone, Came) {
        let path = self.address("switch");
        let _ = std::fs::remove_file(&path);
        let mut listener = bind(&Address::Unix(path.clone())).unwrap();
        let handle = to.handle();
        thread::scope(|scope| {
            let came = scope.spawn(move || to.wait_for_guest(&mut *listener));
            let gone = relinquish(from, path);
            if gone.0.is_err() {
                handle.stop();
            }
            (gone, came.join().unwrap())
        })
    }
}

type Gone = (Result<Standby<Vm>, Active<Vm>>, Report);
type Came = Result<Active<Vm>, (Standby<Vm>, ReceiveError)>;

fn relinquish(from: Active<Vm>, to: PathBuf) -> Gone {
    let (_controller, commands) = Controller::new();
    // it does not apply to a VM whose RAM is shared
    let fail_safe = Some(FailSafe::in_memory(Arc::new(NoFence)));
    let options = SourceOptions { idle_timeout: Duration::from_secs(20), fail_safe, ..SourceOptions::default() };
    from.relinquish(&*connector(&Address::Unix(to), ConnectOptions::default()), &options, commands)
}

fn options() -> ReceiverOptions {
    let idle_timeout = Duration::from_secs(20);
    ReceiverOptions { idle_timeout, patience: Some(Duration::from_secs(20)), ..ReceiverOptions::default() }
}

#[test]
fn a_guest_goes_back_and_forth_and_its_log_with_it() {
    let world = World::new();
    let (lean, feature) = (Seat::new(&world.shared), Seat::new(&world.shared));
    lean.tracker.lock().unwrap().as_mut().unwrap().start().unwrap();
    let mut home = Active::new(Vm(lean.clone()), 0);
    let mut borrower = Standby::new(Vm(feature.clone()));
    for trip in 0..10u64 {
        lean.write(100 + trip);
        let (away, guest) = world.switch(home, borrower);
        assert_eq!((guest.epoch(), feature.stays.load(Ordering::SeqCst)), (2 * trip as u32 + 1, 2 * trip + 1));
        feature.write(200 + trip);
        if trip % 2 == 1 {
            // all pages written since the feature last read its log, in either VMM, also those of
            // saving the state
            let mut expected = vec![7, 100 + trip - 1, 100 + trip, 200 + trip - 1, 200 + trip];
            expected.sort_unstable();
            assert_eq!(feature.log(), expected, "trip {trip}");
        }
        (borrower, home) = world.switch(guest, away);
        assert!(!feature.tracker.lock().unwrap().as_ref().unwrap().is_active());
    }
    assert_eq!((home.epoch(), lean.stays.load(Ordering::SeqCst)), (20, 20));
    drop(borrower);
}

#[test]
fn a_guest_that_is_not_taken_stays_and_may_try_again() {
    let world = World::new();
    let (lean, feature) = (Seat::new(&world.shared), Seat::new(&world.shared));
    feature.failing_loads.store(3, Ordering::SeqCst);
    let mut home = Active::new(Vm(lean.clone()), 0);
    let mut borrower = Standby::new(Vm(feature.clone()));
    for failed in 1..=3 {
        let ((stays, report), came) = world.attempt(home, borrower.await_guest(options()));
        assert_eq!(report.outcome, Outcome::Failed);
        assert!(report.reason.unwrap().contains("refused, as asked"));
        home = stays.err().expect("it stays");
        let (waits, why) = came.err().expect("it does not come");
        assert!(matches!(why, ReceiveError::Stopped), "{why}");
        assert_eq!((home.epoch(), world.shared.running.load(Ordering::SeqCst)), (failed, 1));
        borrower = waits;
    }
    let (away, guest) = world.switch(home, borrower);
    // The guest moves back; the first attempts to do so fail.
    lean.failing_loads.store(2, Ordering::SeqCst);
    let ((stays, _), came) = world.attempt(guest, away.await_guest(options()));
    let ((stays, _), came) = world.attempt(stays.err().unwrap(), came.err().unwrap().0.await_guest(options()));
    let (_, home) = world.switch(stays.err().unwrap(), came.err().unwrap().0);
    assert_eq!((home.epoch(), world.shared.running.load(Ordering::SeqCst)), (7, 1));
}

#[test]
fn a_log_that_cannot_go_on_holds_the_guest_back() {
    let world = World::new();
    let lean = Seat::new(&world.shared);
    lean.tracker.lock().unwrap().as_mut().unwrap().start().unwrap();
    let feature = Seat::with(&world.shared, lean.id, true);
    lean.write(5);
    let home = Active::new(Vm(lean.clone()), 0);
    let ((stays, report), _) = world.attempt(home, Standby::new(Vm(feature)).await_guest(options()));
    assert!(report.reason.unwrap().contains("there is no log here"));
    let home = stays.err().expect("it stays");
    // the log is still there
    assert_eq!(lean.log(), [5, 7]);
    lean.tracker.lock().unwrap().as_mut().unwrap().stop().unwrap();
    let feature = Seat::with(&world.shared, lean.id, true);
    world.switch(home, Standby::new(Vm(feature)));
}

#[test]
fn only_the_guest_that_went_comes_back_and_by_nothing_older() {
    let world = World::new();
    let (lean, feature) = (Seat::new(&world.shared), Seat::new(&world.shared));
    let (away, guest) = world.switch(Active::new(Vm(lean), 4), Standby::new(Vm(feature)));
    assert_eq!(guest.epoch(), 5);
    let path = world.address("home");
    let mut listener = bind(&Address::Unix(path.clone())).unwrap();
    let awaiting = away.await_guest(options());
    thread::scope(|scope| {
        let home = scope.spawn(move || awaiting.wait_for_guest(&mut *listener));
        // VMMs with RAM of their own that claim to have the guest
        for (id, epoch, words) in [([3; 16], 0, "epoch"), ([3; 16], 4, "epoch"), ([9; 16], 80, "another VM")] {
            let liar = Seat::with(&World::new().shared, VmId(id), false);
            let (stays, report) = relinquish(Active::new(Vm(liar), epoch), path.clone());
            let reason = report.reason.unwrap();
            assert!(stays.is_err() && reason.contains(words), "{reason}");
        }
        let (gone, report) = relinquish(guest, path.clone());
        assert!(gone.is_ok(), "{:?}", report.reason);
        assert_eq!(home.join().unwrap().ok().expect("it is back").epoch(), 6);
    });
}

#[test]
fn a_wait_ends_in_time_and_can_be_taken_up_again() {
    let world = World::new();
    let (lean, feature) = (Seat::new(&world.shared), Seat::new(&world.shared));
    let (away, guest) = world.switch(Active::new(Vm(lean), 0), Standby::new(Vm(feature)));
    let mut listener = bind(&Address::Unix(world.address("nobody comes"))).unwrap();
    let patience = Some(Duration::from_millis(20));
    let (away, why) =
        away.await_guest(ReceiverOptions { patience, ..options() }).wait_for_guest(&mut *listener).err().unwrap();
    assert!(matches!(why, ReceiveError::TimedOut(_)), "{why}");
    let (_, home) = world.switch(guest, away);
    assert_eq!(home.epoch(), 2);
}
