//! Tests of the hand-over with shared RAM over Unix sockets: what is sent, what is refused, and
//! hostile peers.
//!
//! The shared RAM is on the heap of this process; the files that are sent only take the place of
//! its memory files.

mod common;

use std::{
    fs::File,
    io::ErrorKind,
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use common::{CountingSpawner, Destination, TestHost, TestVm, layout};
use migration_core::{
    PageRange,
    channel::{Halves, Listener},
    engine::{Controller, ReceiverOptions, SourceOptions, migrate},
    report::{Outcome, Report},
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    strategy::{Done, HandOver, Running, Strategy},
    vm::SourceVm,
    wire::{
        Bulk, Content, Control, ErrorCode, Extent, FEATURE_CHECKPOINTS, FEATURE_POST_COPY, FEATURE_SHARED_RAM, Header,
        Hello, LaneKind, Preamble, SessionToken, Welcome,
    },
};
use migration_transport::{Address, ConnectOptions, UnixConnector, UnixListener, bind, connector};
use tempfile::TempDir;

struct World {
    folder: TempDir,
    vm: TestVm,
}

impl World {
    fn new() -> Self {
        let mut vm = TestVm::new();
        vm.files = layout().regions().iter().map(|_| tempfile::tempfile().unwrap()).collect();
        Self { folder: tempfile::tempdir().unwrap(), vm }
    }

    fn address(&self) -> Address {
        Address::Unix(self.folder.path().join("socket"))
    }

    fn destination(&self, failing_loads: u32) -> Destination {
        Destination::sharing(bind(&self.address()).unwrap(), failing_loads, Some(self.vm.guest.clone()))
    }

    fn hand_over(&mut self, strategy: &mut dyn Strategy, options: &SourceOptions) -> Report {
        self.hand_over_to(&self.address(), strategy, options)
    }

    fn hand_over_to(&mut self, to: &Address, strategy: &mut dyn Strategy, options: &SourceOptions) -> Report {
        let (_controller, commands) = Controller::new();
        migrate(&mut self.vm, &*connector(to, ConnectOptions::default()), strategy, options, commands)
    }

    /// Asserts that a hand-over is refused before the pause, for this reason, and that the VM is
    /// unchanged.
    fn is_refused(&mut self, to: &Address, words: &str) {
        let report = self.hand_over_to(to, &mut HandOver, &options());
        assert_eq!((report.outcome, report.downtime), (Outcome::Failed, None));
        let reason = report.reason.unwrap();
        assert!(reason.contains(words), "{reason}");
        assert!(self.vm.guest.is_running() && !self.vm.tracks() && !self.vm.released);
    }
}

fn options() -> SourceOptions {
    SourceOptions { idle_timeout: Duration::from_secs(20), ..SourceOptions::default() }
}

#[test]
fn state_moves_and_ram_does_not() {
    let mut world = World::new();
    let destination = world.destination(0);
    let spawner = Arc::new(CountingSpawner::default());
    let report = world.hand_over(&mut HandOver, &SourceOptions { spawner: spawner.clone(), ..options() });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let guest = destination.arrived.recv().unwrap();
    assert!(guest.is_running() && world.vm.released && !world.vm.guest.is_running());
    guest.set_running(false);
    guest.check();
    assert!(report.page_bytes == 0 && report.rounds.is_empty() && report.state_bytes > 0, "{report:?}");
    assert!(report.wire_bytes < 4096, "{report:?}");
    assert_eq!(spawner.running.load(Ordering::SeqCst), 0);
}

/// Records the roles that threads assume in addition to their own.
#[derive(Default)]
struct Roles {
    assumed: Mutex<Vec<(ThreadId, Role)>>,
    /// Whether the engine has told the spawner that the guest waits.
    switching: AtomicBool,
}

impl Spawner for Roles {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<Box<dyn Joiner>> {
        StdSpawner.spawn(role, impact, name, body)
    }

    fn assume(&self, role: Role, _impact: GuestImpact) {
        self.assumed.lock().unwrap().push((thread::current().id(), role));
    }

    fn begin_switch_over(&self) {
        self.switching.store(true, Ordering::SeqCst);
    }

    fn end_switch_over(&self) {
        self.switching.store(false, Ordering::SeqCst);
    }
}

impl Roles {
    /// Returns for each hand-over the role that its thread assumed next.
    fn after_hand_overs(&self) -> Vec<Option<Role>> {
        let all = std::mem::take(&mut *self.assumed.lock().unwrap());
        assert!(!self.switching.load(Ordering::SeqCst), "the guest does not wait any more");
        let after = |(n, (thread, role)): (usize, &(ThreadId, Role))| {
            let next = || all[n + 1..].iter().find(|(id, _)| id == thread).map(|(_, role)| *role);
            (*role == Role::HandOver).then(next)
        };
        all.iter().enumerate().filter_map(after).collect()
    }
}

/// At both ends, also after a failure, the thread of a hand-over returns to a role without urgency.
#[test]
fn the_role_of_a_hand_over_ends_with_it() {
    let mut world = World::new();
    let (mut host, arrived) = TestHost::new(1);
    host.shared = Some(world.vm.guest.clone());
    let (leaving, arriving) = (Arc::new(Roles::default()), Arc::new(Roles::default()));
    let receiving =
        ReceiverOptions { idle_timeout: options().idle_timeout, spawner: arriving.clone(), ..Default::default() };
    let receiver = host.receiver(receiving);
    let mut listener = bind(&world.address()).unwrap();
    let receives = thread::spawn(move || receiver.run(&mut *listener));
    let attempt = |world: &mut World, last_epoch| {
        let options = SourceOptions { last_epoch, spawner: leaving.clone(), ..options() };
        let outcome = world.hand_over(&mut HandOver, &options).outcome;
        (outcome, leaving.after_hand_overs())
    };
    // First the successor cannot load the state, then its predecessor cannot save it, then both
    // can.
    assert_eq!(attempt(&mut world, 0), (Outcome::Failed, vec![Some(Role::Control)]));
    world.vm.failing_saves = 1;
    assert_eq!(attempt(&mut world, 1), (Outcome::Failed, vec![Some(Role::Control)]));
    assert_eq!(attempt(&mut world, 2), (Outcome::Completed, vec![Some(Role::Background)]));
    arrived.recv().unwrap();
    receives.join().unwrap().unwrap();
    assert_eq!(arriving.after_hand_overs(), [Some(Role::Control); 3]);
}

#[test]
fn the_guest_runs_on_where_it_was_when_the_successor_fails() {
    let mut world = World::new();
    let destination = world.destination(3);
    let mut last_epoch = 0;
    for _ in 0..3 {
        let report = world.hand_over(&mut HandOver, &SourceOptions { last_epoch, ..options() });
        assert_eq!(report.outcome, Outcome::Failed);
        assert!(report.reason.unwrap().contains("refused, as asked") && report.downtime.is_some());
        assert!(world.vm.guest.is_running() && !world.vm.doubt);
        last_epoch = report.epoch;
    }
    world.vm.failing_saves = 1;
    let report = world.hand_over(&mut HandOver, &SourceOptions { last_epoch, ..options() });
    assert!(report.reason.unwrap().contains("the device is busy") && world.vm.guest.is_running());
    last_epoch = report.epoch;
    let report = world.hand_over(&mut HandOver, &SourceOptions { last_epoch, ..options() });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
}

#[test]
fn what_cannot_be_shared_is_refused_before_the_pause() {
    let mut world = World::new();
    let tcp = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    world.is_refused(&tcp.address().parse().unwrap(), "Unix socket (unix:PATH)");
    let address = world.address();
    world.is_refused(&address, "cannot connect");
    let unshared = Destination::start(bind(&address).unwrap(), 0);
    world.is_refused(&address, "nobody shares RAM with this host");
    drop(unshared);
    let file = world.vm.files.pop();
    world.is_refused(&address, "1 memory files for 2 regions");
    world.vm.files.clear();
    world.is_refused(&address, "it would have to be a memfd");
    world.vm.files = file.into_iter().collect();
}

/// Requests operations that shared RAM excludes.
struct Sends;

impl Strategy for Sends {
    fn name(&self) -> &'static str {
        "sends"
    }

    fn shares_ram(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, migration_core::MigrationError> {
        let pages = vm.start_tracking()?;
        vm.send(&pages)?;
        vm.cancel("it could send")
    }
}

#[test]
fn a_strategy_that_shares_ram_sends_no_pages() {
    let mut world = World::new();
    let _destination = world.destination(0);
    let report = world.hand_over(&mut Sends, &options());
    assert!(report.reason.unwrap().contains("no page moves"));
    assert!(world.vm.guest.is_running() && !world.vm.tracks());
}

/// A destination of an earlier build makes a VM of its own and does not confirm the feature.
#[test]
fn a_destination_that_does_not_know_shared_ram_is_left() {
    let mut world = World::new();
    let UnixHost { mut listener } = UnixHost::new(&world.address());
    let old = thread::spawn(move || {
        let mut halves = listener.accept(Duration::from_secs(20)).unwrap().unwrap().split().unwrap();
        let mut preamble = [0; Preamble::LEN];
        halves.reader.read_exact(&mut preamble).unwrap();
        let (epoch, _) = frame(&mut halves).unwrap();
        let session = SessionToken([1; 16]);
        say(&mut halves, 0, epoch, &Control::Welcome(Welcome { version: 1, features: 0, streams: 1, session }));
        // read until the source closes the link
        while frame(&mut halves).is_ok() {}
    });
    let address = world.address();
    world.is_refused(&address, "its version is too old");
    old.join().unwrap();
}

struct UnixHost {
    listener: UnixListener,
}

impl UnixHost {
    fn new(address: &Address) -> Self {
        let Address::Unix(path) = address else { unreachable!() };
        Self { listener: UnixListener::bind(path, Default::default()).unwrap() }
    }
}

fn say(halves: &mut Halves, sequence: u32, epoch: u32, frame: &Control) {
    halves.writer.write_all(&frame.encode(0, sequence, epoch), &[]).unwrap();
}

/// Reads the next frame. Returns it with its epoch.
fn frame(halves: &mut Halves) -> std::io::Result<(u32, Control)> {
    let mut header = [0; Header::LEN];
    halves.reader.read_exact(&mut header)?;
    let header = Header::decode(&header).map_err(std::io::Error::other)?;
    let mut body = vec![0; header.body as usize];
    halves.reader.read_exact(&mut body)?;
    let frame = Control::decode(&header, &body).map_err(std::io::Error::other)?;
    Ok((header.number, frame))
}

/// A source that violates the protocol.
struct Hostile(Halves);

impl Hostile {
    fn connect(world: &World, kind: LaneKind, session: SessionToken) -> Self {
        let Address::Unix(path) = world.address() else { unreachable!() };
        let options = ConnectOptions::default();
        let channel = migration_core::channel::Connector::connect(&UnixConnector::new(path, options)).unwrap();
        let mut halves = channel.split().unwrap();
        halves.reader.set_idle_timeout(Some(Duration::from_secs(20))).unwrap();
        halves.writer.write_all(&Preamble::new(kind, 0, session).encode(), &[]).unwrap();
        Self(halves)
    }

    fn greet(world: &mut World, epoch: u32, features: u32) -> Self {
        let mut this = Self::connect(world, LaneKind::Control, SessionToken::default());
        let vm = world.vm.describe().unwrap();
        let hello = Hello { features, streams: 1, strategy: "handover".into(), vm };
        say(&mut this.0, 0, epoch, &Control::Hello(Box::new(hello)));
        this
    }

    fn files(&mut self, count: usize) {
        let files: Vec<File> = (0..count).map(|_| tempfile::tempfile().unwrap()).collect();
        // the destination may already have refused this source, so sending may fail
        let _ = self.0.writer.send_files(&files.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    }

    /// Asserts that the destination sends this error and then closes the link.
    fn ends_with(mut self, code: ErrorCode, words: &str) {
        loop {
            match frame(&mut self.0) {
                Ok((_, Control::Error { code: found, text })) => {
                    assert!(text.contains(words) && found == code, "{found:?}: {text}");
                    break;
                }
                Ok((_, Control::Welcome(_) | Control::Prepared { .. } | Control::Pong)) => {}
                other => panic!("{words}: {other:?}"),
            }
        }
        let end = loop {
            if let Err(end) = frame(&mut self.0) {
                break end;
            }
        };
        assert!(matches!(end.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{words}: {end}");
    }
}

#[test]
fn hostile_sources_are_refused_and_the_next_one_is_served() {
    let mut world = World::new();
    let destination = world.destination(0);
    let shared = FEATURE_SHARED_RAM;
    let mut epoch = 0;
    let mut greet = |world: &mut World, features| {
        epoch += 1;
        Hostile::greet(world, epoch, features)
    };

    // a frame instead of the files
    let mut source = greet(&mut world, shared);
    say(&mut source.0, 1, 1, &Control::Ping);
    source.ends_with(ErrorCode::Mismatch, "sent 0, but 2 are expected");
    // too many files, or too few
    for count in [1, 3, 200] {
        let mut source = greet(&mut world, shared);
        source.files(count);
        let words = if count == 1 {
            "sent 1, but 2 are expected".into()
        } else {
            format!("{count} files were received with a message that may carry 2")
        };
        source.ends_with(ErrorCode::Mismatch, &words);
    }
    // features that exclude each other
    for more in [FEATURE_POST_COPY, FEATURE_CHECKPOINTS, 1] {
        let mut source = greet(&mut world, shared | more);
        source.files(2);
        source.ends_with(ErrorCode::Mismatch, "goes with no other");
    }
    // files without the feature: their byte comes where a frame is expected
    let mut source = greet(&mut world, 0);
    source.files(2);
    drop(source.0.writer);
    drop(source.0.reader);

    // a page although RAM is shared. If the destination still waits for the previous source, this
    // one replaces it
    let mut source = greet(&mut world, shared);
    source.files(2);
    let Control::Welcome(Welcome { features, session, .. }) = frame(&mut source.0).unwrap().1 else {
        panic!("refused")
    };
    assert_eq!(features, shared);
    let mut lane = Hostile::connect(&world, LaneKind::Bulk, session);
    // the destination may close the link without a reason while it waits for lanes, so wait until
    // it has them
    assert_eq!(frame(&mut source.0).unwrap().1, Control::Prepared { load_us: None });
    let extents = vec![Extent { range: PageRange::new(0, 1), content: Content::Zero }];
    lane.0.writer.write_all(&Bulk::Pages { extents, payload_crc: 0 }.encode(0, 0, 1), &[]).unwrap();
    let Control::Error { text: refused, .. } = frame(&mut source.0).unwrap().1 else { panic!("no reason") };
    assert!(refused.contains("no page moves"), "{refused}");
    drop(source);
    epoch_free(&destination);

    let report = world.hand_over(&mut HandOver, &SourceOptions { last_epoch: epoch, ..options() });
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
}

/// Waits until the destination has noticed that the last source has gone.
fn epoch_free(destination: &Destination) {
    while destination.handle.phase() != migration_core::protocol::DestinationPhase::Empty {
        thread::yield_now();
    }
}
