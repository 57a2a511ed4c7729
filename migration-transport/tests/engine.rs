//! Tests of the engine over real sockets: moves, cuts, cancels, failures. The guest is a thread,
//! and its memory is checked page by page on arrival.

mod common;

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{CountingSpawner, Destination, Log, TestVm};
use migration_core::{
    channel::{Channel, Connector},
    engine::{Controller, Migration, SourceOptions, migrate},
    protocol::SourcePhase,
    report::{Event, Observer, Outcome, Report},
    strategy::{PreCopy, StopAndCopy, Strategy},
};
use migration_transport::{Address, ConnectOptions, Relay, bind, connector, memory};

fn options() -> SourceOptions {
    SourceOptions { idle_timeout: Duration::from_secs(20), ..SourceOptions::default() }
}

fn move_to(vm: &mut TestVm, to: &Address, strategy: &mut dyn Strategy, options: &SourceOptions) -> Report {
    let link = connector(to, ConnectOptions::default());
    let (_controller, commands) = Controller::new();
    migrate(vm, &*link, strategy, options, commands)
}

fn tcp() -> (Destination, Address) {
    let listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    (Destination::start(listener, 0), address)
}

fn socket_address(address: &Address) -> SocketAddr {
    let text = address.to_string();
    text.strip_prefix("tcp:").unwrap().to_socket_addrs().unwrap().next().unwrap()
}

#[test]
fn every_strategy_over_tcp_and_unix_with_streams_and_checksums() {
    let folder = tempfile::tempdir().unwrap();
    for streams in [1, 2, 8] {
        for payload_crc in [false, true] {
            for unix in [false, true] {
                for which in 0..2 {
                    let url = if unix {
                        format!("unix:{}/{streams}{payload_crc}{which}", folder.path().display())
                    } else {
                        "tcp:127.0.0.1:0".to_owned()
                    };
                    let listener = bind(&url.parse().unwrap()).unwrap();
                    let address = listener.address().parse().unwrap();
                    let destination = Destination::start(listener, 0);
                    let mut vm = TestVm::new();
                    let mut strategy: Box<dyn Strategy> =
                        if which == 0 { Box::new(<PreCopy>::default()) } else { Box::new(StopAndCopy) };
                    let options = SourceOptions { streams, payload_crc, ..options() };
                    let report = move_to(&mut vm, &address, &mut *strategy, &options);
                    assert_eq!(report.outcome, Outcome::Completed, "{url} {streams}: {:?}", report.reason);
                    assert!(vm.released && vm.doubt && !vm.guest.is_running());
                    let guest = destination.arrived.recv().unwrap();
                    assert!(guest.is_running());
                    assert_eq!(report.pages.total, 1024);
                    assert!(report.wire_bytes > 0 && report.state_bytes > 0 && report.downtime.is_some());
                    guest.set_running(false);
                    guest.check();
                }
            }
        }
    }
}

/// If the report of free pages cannot be read, all pages are sent and the user gets a warning.
#[test]
fn free_pages_that_are_not_known_are_sent() {
    let (destination, address) = tcp();
    let mut vm = TestVm::new();
    vm.confused = true;
    let log = Arc::new(Log::default());
    let options = SourceOptions { observer: log.clone(), ..options() };
    let report = move_to(&mut vm, &address, &mut <PreCopy>::default(), &options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    // one page of three is zero until the guest writes it, and may be left out as a hole
    let pages = report.pages;
    assert!(pages.free == 0 && pages.hole <= 342 && pages.distinct >= 1024 - pages.hole, "{pages:?}");
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
    let events = log.0.lock().unwrap();
    assert!(events.iter().any(|e| e.contains("the balloon has burst")), "{events:?}");
}

/// Cuts the link at pseudo-random bytes. In every case exactly one side has the guest, and its
/// memory is complete.
#[test]
fn cut_at_random_bytes_on_real_sockets() {
    let whole = {
        let (destination, address) = tcp();
        let relay = Relay::new(socket_address(&address)).unwrap();
        let report = move_to(&mut TestVm::new(), &relay.address(), &mut <PreCopy>::default(), &options());
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        destination.arrived.recv().unwrap();
        relay.relayed()
    };
    let (mut failed, mut completed) = (0, 0);
    for seed in 0u64..200 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
        random ^= random >> 29;
        let (destination, address) = tcp();
        // a third of the cuts are near the end, where the ownership changes; the number of bytes
        // before that varies
        let at_end = match seed % 6 {
            0 => Some((SourcePhase::Offered, random % 600)),
            3 => Some((SourcePhase::Ready, random % 600)),
            _ => None,
        };
        let restore = RestoreOnDoubt::new(&address, at_end);
        if at_end.is_none() {
            restore.relay.cut_after(random % whole);
        }
        let mut vm = TestVm::new();
        let options = SourceOptions { observer: restore.clone(), ..options() };
        let report = move_to(&mut vm, &restore.relay.address(), &mut <PreCopy>::default(), &options);
        match report.outcome {
            Outcome::Completed => {
                completed += 1;
                let guest = destination.arrived.recv().unwrap();
                assert!(guest.is_running() && !vm.guest.is_running(), "seed {seed}");
                guest.set_running(false);
                guest.check();
            }
            Outcome::Failed => {
                failed += 1;
                assert!(vm.guest.is_running() && !vm.tracks(), "seed {seed}: {:?}", report.reason);
                assert!(destination.arrived.try_recv().is_err(), "seed {seed}: two owners");
                // the retry, without the relay
                restore.relay.restore();
                let options = SourceOptions { last_epoch: report.epoch, ..self::options() };
                let retry = retry_until_free(&mut vm, &address, &options);
                assert_eq!(retry.outcome, Outcome::Completed, "seed {seed}: {:?}", retry.reason);
                let guest = destination.arrived.recv().unwrap();
                guest.set_running(false);
                guest.check();
            }
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(failed > 0 && completed > 0, "{failed} failed, {completed} completed");
}

/// Migrates until the destination accepts, because it may not have noticed yet that the first
/// attempt is dead.
fn retry_until_free(vm: &mut TestVm, to: &Address, options: &SourceOptions) -> Report {
    let mut options = options.clone();
    loop {
        let report = move_to(vm, to, &mut <PreCopy>::default(), &options);
        let busy = report.reason.as_deref().is_some_and(|r| r.contains("another session is under way"));
        if !busy {
            return report;
        }
        options.last_epoch = report.epoch;
    }
}

/// An observer that restores the network when the source is in doubt.
struct RestoreOnDoubt {
    relay: Relay,
    log: Log,
    /// The phase of the source after which the link is cut, and the number of further bytes before
    /// the cut.
    cut: Option<(SourcePhase, u64)>,
}

impl RestoreOnDoubt {
    fn new(to: &Address, cut: Option<(SourcePhase, u64)>) -> Arc<Self> {
        let relay = Relay::new(socket_address(to)).unwrap();
        Arc::new(Self { relay, log: Log::default(), cut })
    }
}

impl Observer for RestoreOnDoubt {
    fn event(&self, event: &Event) {
        self.log.event(event);
        match event {
            Event::Reconnecting { .. } => self.relay.restore(),
            Event::Source(phase) => {
                if let Some((_, bytes)) = self.cut.filter(|(at, _)| at == phase) {
                    self.relay.cut_after(bytes);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn k_failures_of_save_and_load_then_success_and_everything_is_given_back() {
    for failing in 1..3 {
        let listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address: Address = listener.address().parse().unwrap();
        let destination = Destination::start(listener, failing);
        let mut vm = TestVm::new();
        vm.failing_saves = failing;
        let spawner = Arc::new(CountingSpawner::default());
        let mut options = SourceOptions { spawner: spawner.clone(), ..options() };
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut attempts = 0;
        let report = loop {
            let before = descriptors();
            let report = retry_until_free(&mut vm, &address, &options);
            attempts += 1;
            assert_eq!(spawner.running.load(Ordering::SeqCst), 0, "threads are left");
            options.last_epoch = report.epoch;
            if report.outcome == Outcome::Completed {
                break report;
            }
            assert_eq!(report.outcome, Outcome::Failed);
            let reason = report.reason.unwrap();
            assert!(reason.contains("the device is busy") || reason.contains("refused, as asked"), "{reason}");
            assert!(vm.guest.is_running() && !vm.tracks());
            // other tests of this process open descriptors, too, so only an unlimited growth is an
            // error
            assert!(descriptors() <= before + 64);
        };
        assert!(attempts > failing, "{attempts}");
        assert_eq!(report.outcome, Outcome::Completed);
        destination.arrived.recv().unwrap().set_running(false);
    }
}

#[test]
fn cancel_gives_everything_back_at_any_round() {
    for after in 0..5 {
        let (destination, address) = tcp();
        let mut vm = TestVm::new();
        let (controller, commands) = Controller::new();
        let mut strategy = CancelAfter { rounds: after, controller };
        let link = connector(&address, ConnectOptions::default());
        let report = migrate(&mut vm, &*link, &mut strategy, &options(), commands);
        assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
        assert!(vm.guest.is_running() && !vm.tracks() && !vm.doubt);
        assert_eq!(vm.guest.throttle.load(Ordering::SeqCst), 0);
        let options = SourceOptions { last_epoch: report.epoch, ..options() };
        let retry = retry_until_free(&mut vm, &address, &options);
        assert_eq!(retry.outcome, Outcome::Completed, "{:?}", retry.reason);
        destination.arrived.recv().unwrap().set_running(false);
    }
}

/// A strategy of endless rounds with a throttle. The user cancels it in a round or, the last time,
/// in the pause.
struct CancelAfter {
    rounds: u32,
    controller: Controller,
}

impl Strategy for CancelAfter {
    fn name(&self) -> &'static str {
        "cancel-after"
    }

    fn migrate(
        &mut self,
        mut vm: migration_core::strategy::Running<'_>,
    ) -> Result<migration_core::strategy::Done, migration_core::MigrationError> {
        let mut pages = vm.start_tracking()?;
        vm.throttle(50)?;
        for _ in 0..self.rounds {
            vm.send(&pages)?;
            pages = vm.harvest()?;
        }
        self.controller.cancel("the test");
        if self.rounds.is_multiple_of(2) {
            let mut vm = vm.pause()?;
            vm.send_rest(pages)?;
            let nothing = vm.no_pages();
            return Ok(vm.hand_over(nothing)?.finish()?);
        }
        loop {
            vm.send(&pages)?;
            pages = vm.harvest()?;
        }
    }
}

#[test]
fn a_vm_that_was_tracked_before_gets_its_dirty_bits_back() {
    use migration_core::{PageSet, vm::SourceVm};
    let (_destination, address) = tcp();
    let mut vm = TestVm::new();
    vm.guest.set_running(false);
    vm.tracker().start().unwrap();
    for page in [5, 77, 900] {
        vm.tracker().mark_dirty(&{
            let mut set = PageSet::empty(1024);
            set.insert(page);
            set
        });
    }
    let (controller, commands) = Controller::new();
    let mut strategy = CancelAfter { rounds: 3, controller };
    let link = connector(&address, ConnectOptions::default());
    let report = migrate(&mut vm, &*link, &mut strategy, &options(), commands);
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
    assert!(vm.tracks(), "the VMM's tracker goes on");
    let mut dirty = PageSet::empty(1024);
    vm.tracker().harvest(&mut dirty).unwrap();
    for page in [5, 77, 900] {
        assert!(dirty.contains(page), "page {page} is not dirty any more");
    }
}

#[test]
fn a_destination_that_is_not_there_or_silent_is_an_error_not_a_hang() {
    let mut vm = TestVm::new();
    let report = move_to(&mut vm, &"tcp:127.0.0.1:1".parse().unwrap(), &mut StopAndCopy, &options());
    assert_eq!(report.outcome, Outcome::Failed);
    // accepts connections and never answers
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::from(silent.local_addr().unwrap());
    let options = SourceOptions {
        setup_timeout: Duration::from_millis(100),
        idle_timeout: Duration::from_millis(100),
        ..options()
    };
    let report = move_to(&mut vm, &address, &mut StopAndCopy, &options);
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(vm.guest.is_running());
}

/// Tests the handle for VMMs with an event loop: no call blocks, and a callback reports that the
/// result is available.
#[test]
fn a_migration_on_its_own_thread_notifies() {
    let (destination, address) = tcp();
    let link = Arc::from(connector(&address, ConnectOptions::default()));
    let (tx, notified) = std::sync::mpsc::channel();
    let notify = Box::new(move || {
        let _ = tx.send(());
    });
    let started = Migration::start(Box::new(TestVm::new()), link, Box::new(<PreCopy>::default()), options(), notify);
    let mut migration = started.map_err(|(_, error)| error).unwrap();
    notified.recv().unwrap();
    let (_vm, report) = migration.try_take().expect("it has notified");
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(migration.try_take().is_none() && migration.wait(Duration::ZERO).is_none());
    // too late to have an effect
    migration.controller().cancel("late");
    destination.arrived.recv().unwrap().set_running(false);
}

/// A connector that cancels when the channel with this number is opened, and counts the channels.
struct Cancelling {
    inner: memory::MemoryConnector,
    controller: Controller,
    at: usize,
    opened: AtomicUsize,
}

impl Connector for Cancelling {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        if self.opened.fetch_add(1, Ordering::SeqCst) == self.at {
            self.controller.cancel("while a channel is opened");
        }
        self.inner.connect()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

#[test]
fn a_cancel_is_heard_after_the_channel_that_is_being_opened() {
    // the control lane, and lanes for pages
    for at in [0, 1, 4] {
        let (inner, listener) = memory::link(memory::DEFAULT_CAPACITY);
        let _destination = Destination::start(Box::new(listener), 0);
        let (controller, commands) = Controller::new();
        let link = Cancelling { inner, controller, at, opened: AtomicUsize::new(0) };
        let options = SourceOptions { streams: 8, ..SourceOptions::default() };
        let report = migrate(&mut TestVm::new(), &link, &mut <PreCopy>::default(), &options, commands);
        assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
        assert_eq!(link.opened.load(Ordering::SeqCst), at + 1, "channels are opened after the cancel");
    }
}

#[test]
fn a_migration_that_is_cancelled_before_it_begins_opens_no_channel() {
    let (inner, _listener) = memory::link(memory::DEFAULT_CAPACITY);
    let (controller, commands) = Controller::new();
    controller.cancel("never mind");
    let link = Cancelling { inner, controller, at: usize::MAX, opened: AtomicUsize::new(0) };
    let options = SourceOptions::default();
    let report = migrate(&mut TestVm::new(), &link, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
    assert_eq!(link.opened.load(Ordering::SeqCst), 0);
}
