//! Guests that leave their home and come back, over Unix sockets. Both VMMs are in this process; a
//! process that has no other task stands for a VMM that dies. RAM is on the heap, and the files
//! that travel only stand for it.

use std::{
    fmt,
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, HeapRam, RamLayout, RamRegion,
    channel::{Connector, Listener},
    engine::{
        Controller, ReceiverOptions, SourceOptions,
        ephemeral::{Active, PersistentVm, Standby},
    },
    report::Report,
    state::VmState,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationVm, SourceVm, VmDescription, VmError, VmId},
};
use migration_kvm::{
    fence::ProcessIdentity,
    lending::{Absence, AbsenceEnd, Answer, GivenBack, HomeVmm, Journey, TakeOverError, fetch, give_back},
};
use migration_transport::{Address, ConnectOptions, bind, connector};
use tempfile::TempDir;

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(60);

fn layout() -> RamLayout {
    RamLayout::new(vec![RamRegion { gpa: 0, len: 2 << 20 }]).unwrap()
}

/// What both VMMs share.
struct Shared {
    ram: Arc<HeapRam>,
    file: File,
    /// In how many VMMs the guest runs.
    running: AtomicU32,
}

/// The VM in one VMM.
#[derive(Clone)]
struct Vm(Arc<Shared>);

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vm")
    }
}

impl PersistentVm for Vm {
    type Coming = Coming;

    fn id(&self) -> VmId {
        VmId([3; 16])
    }

    fn leaving(&mut self) -> Box<dyn SourceVm> {
        Box::new(Leaving { shared: self.0.clone(), tracker: BitmapTracker::new(DirtyBitmap::new(layout())) })
    }

    fn coming(&mut self, _vm: &VmDescription, _files: Vec<OwnedFd>) -> Result<Coming, VmError> {
        Ok(Coming(self.0.clone()))
    }
}

struct Leaving {
    shared: Arc<Shared>,
    tracker: BitmapTracker,
}

impl SourceVm for Leaving {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        Ok(VmDescription { id: VmId([3; 16]), layout: layout(), devices: Vec::new(), host_needs, config })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.shared.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        Ok(vec![self.shared.file.as_fd()])
    }

    fn pause(&mut self) -> Result<(), VmError> {
        assert_eq!(self.shared.running.fetch_sub(1, Ordering::SeqCst), 1);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert_eq!(self.shared.running.fetch_add(1, Ordering::SeqCst), 0);
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        Ok(VmState { sections: Vec::new() })
    }

    fn released(&mut self) {}
}

struct Coming(Arc<Shared>);

impl DestinationVm for Coming {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.0.ram.clone()
    }

    fn load_state(&mut self, _state: &VmState) -> Result<(), VmError> {
        Ok(())
    }

    fn start(&mut self, _running: bool) -> Result<(), VmError> {
        assert_eq!(self.0.running.fetch_add(1, Ordering::SeqCst), 0, "it runs in two VMMs");
        Ok(())
    }
}

/// A home VMM that notes what it is told.
struct Home {
    events: Mutex<Sender<&'static str>>,
    in_doubt: AtomicBool,
}

impl Home {
    fn new() -> (Arc<Self>, Receiver<&'static str>) {
        let (events, told) = mpsc::channel();
        (Arc::new(Self { events: Mutex::new(events), in_doubt: AtomicBool::new(false) }), told)
    }

    fn note(&self, event: &'static str) {
        // a test that has seen enough does not listen any more
        let _ = self.events.lock().unwrap().send(event);
    }
}

impl HomeVmm for Home {
    fn detached(&self, _report: &Report) {
        self.note("detached");
    }

    fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::SeqCst)
    }

    fn lost_in_doubt(&self) {
        self.note("lost in doubt");
    }

    fn overdue(&self) {
        self.note("overdue");
    }

    fn not_taken_over(&self, why: &TakeOverError) {
        panic!("{why}");
    }

    fn unwatched(&self, why: &std::io::Error) {
        panic!("{why}");
    }
}

/// A process that stands for a VMM. It is killed when this is dropped.
struct Vmm(Child);

impl Vmm {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn identity(&self) -> Vec<u8> {
        ProcessIdentity::of(self.0.id()).unwrap().encode()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

struct World {
    folder: TempDir,
    shared: Arc<Shared>,
}

impl World {
    fn new() -> Self {
        let ram = Arc::new(HeapRam::new(layout()).unwrap());
        let shared = Shared { ram, file: tempfile::tempfile().unwrap(), running: AtomicU32::new(1) };
        Self { folder: tempfile::tempdir().unwrap(), shared: Arc::new(shared) }
    }

    fn running(&self) -> u32 {
        self.shared.running.load(Ordering::SeqCst)
    }

    fn address(&self, name: &str) -> Address {
        Address::Unix(self.folder.path().join(name))
    }

    fn listen(&self, name: &str) -> Box<dyn Listener> {
        bind(&self.address(name)).unwrap()
    }

    fn link(&self, name: &str) -> Box<dyn Connector> {
        connector(&self.address(name), ConnectOptions::default())
    }

    /// Has the guest leave for the feature VMM at "out" and come back at "back".
    fn leave(&self, home: Arc<Home>, absence: &Absence) -> JoinHandle<AbsenceEnd<Vm>> {
        let (absence, guest) = (absence.clone(), Active::new(Vm(self.shared.clone()), 0));
        let (to, mut back) = (self.link("out"), self.listen("back"));
        thread::spawn(move || {
            let (_controller, commands) = Controller::new();
            let source = &SourceOptions::default();
            let journey = Journey { to: &*to, source, commands, back: &mut *back, receiver: receiver_options() };
            absence.run(&(home as _), guest, journey)
        })
    }

    /// Waits for the guest at "out".
    fn fetch(&self) -> Active<Vm> {
        let mut listener = self.listen("out");
        let awaiting = Standby::new(Vm(self.shared.clone())).await_guest(receiver_options());
        let home = ProcessIdentity::own().unwrap().encode();
        let fetched = fetch(awaiting, &mut *listener, home, LONG, || Answer { has_left: true, answer: "yes" });
        let fetched = fetched.unwrap();
        assert_eq!(fetched.answer, Some("yes"));
        fetched.guest.map_err(|(_, why)| why).unwrap()
    }

    fn give_back(&self, guest: Active<Vm>, home: &[u8], in_doubt: bool) -> GivenBack<Vm> {
        let (_controller, commands) = Controller::new();
        let link = self.link("back");
        give_back(guest, link, SourceOptions::default(), commands, home, || in_doubt).map_err(|(_, e)| e).unwrap()
    }
}

fn receiver_options() -> ReceiverOptions {
    ReceiverOptions { patience: Some(LONG), ..ReceiverOptions::default() }
}

#[test]
fn a_guest_goes_and_comes_back() {
    let world = World::new();
    let (home, told) = Home::new();
    let feature = Vmm::start();
    let absence = Absence::new(feature.identity(), Duration::ZERO);
    thread::scope(|scope| {
        let fetching = scope.spawn(|| world.fetch());
        while !world.folder.path().join("out").exists() {
            thread::yield_now();
        }
        let away = world.leave(home, &absence);
        let guest = fetching.join().unwrap();
        assert_eq!((guest.epoch(), world.running()), (1, 1));
        assert_eq!([told.recv().unwrap(), told.recv().unwrap()], ["detached", "overdue"]);
        assert!(absence.is_overdue());
        let back = world.give_back(guest, &ProcessIdentity::own().unwrap().encode(), false);
        assert!(matches!(back, GivenBack::AtHome(..)), "{back:?}");
        match away.join().unwrap() {
            AbsenceEnd::Returned(guest) => assert_eq!((guest.epoch(), world.running()), (2, 1)),
            other => panic!("{other:?}"),
        }
    });
}

/// Has the guest leave, and returns when it runs in the feature VMM.
fn away(world: &World, absence: &Absence) -> (JoinHandle<AbsenceEnd<Vm>>, Active<Vm>) {
    let (home, told) = Home::new();
    thread::scope(|scope| {
        let fetching = scope.spawn(|| world.fetch());
        while !world.folder.path().join("out").exists() {
            thread::yield_now();
        }
        let away = world.leave(home, absence);
        assert_eq!(told.recv().unwrap(), "detached");
        (away, fetching.join().unwrap())
    })
}

#[test]
fn a_guest_dies_with_the_feature_vmm() {
    let world = World::new();
    let feature = Vmm::start();
    let (away, _guest) = away(&world, &Absence::new(feature.identity(), LONG));
    drop(feature);
    let end = away.join().unwrap();
    assert!(matches!(end, AbsenceEnd::Lost(_)), "{end:?}");
}

#[test]
fn a_guest_that_went_on_elsewhere_is_not_awaited() {
    let world = World::new();
    let feature = Vmm::start();
    let absence = Absence::new(feature.identity(), LONG);
    let (away, _guest) = away(&world, &absence);
    absence.end();
    let end = away.join().unwrap();
    assert!(matches!(end, AbsenceEnd::Gone), "{end:?}");
    assert!(!absence.is_overdue());
}

#[test]
fn a_guest_that_nobody_awaits_stays() {
    let world = World::new();
    let (home, told) = Home::new();
    let own = ProcessIdentity::own().unwrap().encode();
    match world.leave(home, &Absence::new(own.clone(), LONG)).join().unwrap() {
        AbsenceEnd::Stayed { guest, report } => assert!(guest.epoch() == 1 && report.reason.is_some()),
        other => panic!("{other:?}"),
    }
    assert_eq!((told.try_iter().count(), world.running()), (0, 1));
    let back = world.give_back(Active::new(Vm(world.shared.clone()), 1), &own, false);
    assert!(matches!(back, GivenBack::Stayed(..)), "{back:?}");
    assert_eq!(world.running(), 1);
}

#[test]
fn a_request_that_is_refused_ends_the_wait() {
    let world = World::new();
    let mut listener = world.listen("out");
    let awaiting = Standby::new(Vm(world.shared.clone())).await_guest(receiver_options());
    let home = ProcessIdentity::own().unwrap().encode();
    let fetched = fetch(awaiting, &mut *listener, home, LONG, || Answer { has_left: false, answer: "no" }).unwrap();
    assert!(fetched.guest.is_err());
    assert_eq!(fetched.answer, Some("no"));
}

#[test]
fn a_process_that_dies_in_doubt_takes_the_guest_along() {
    let world = World::new();
    let dead = Vmm::start();
    let identity = dead.identity();
    drop(dead);
    // connections are taken, and nothing is ever said: the threads of these hand-overs do not end
    let _silent = (world.listen("out"), world.listen("back"));
    let back = world.give_back(Active::new(Vm(world.shared.clone()), 1), &identity, true);
    assert!(matches!(back, GivenBack::HomeDied), "{back:?}");
    let elsewhere = World { folder: world.folder, shared: World::new().shared };
    let (home, told) = Home::new();
    home.in_doubt.store(true, Ordering::SeqCst);
    drop(std::fs::remove_file(elsewhere.folder.path().join("back")));
    let _never_ends = elsewhere.leave(home, &Absence::new(identity, LONG));
    assert_eq!(told.recv().unwrap(), "lost in doubt");
}
