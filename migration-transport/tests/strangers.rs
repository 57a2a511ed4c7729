//! Tests that unidentified connections, which never say what they are for, do not keep out a new
//! source or a source that reconnects.

#[allow(dead_code, reason = "these tests need a part of it")]
mod common;

use std::{
    io,
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use common::{Destination, TestVm};
use migration_core::{
    channel::{Channel, Connector, Halves},
    engine::{Controller, SourceOptions, migrate},
    report::{Event, Observer, Outcome, Report},
    strategy::{PreCopy, StopAndCopy},
    wire::{LaneKind, Preamble, SessionToken},
};
use migration_transport::{
    Address, ConnectOptions, Cut, Relay, bind, connector,
    memory::{self, MemoryConnector},
};

/// Longer than any test takes, so that no wait ends because of it.
const FAR: Duration = Duration::from_secs(3600);

fn options() -> SourceOptions {
    SourceOptions { setup_timeout: FAR, in_doubt_grace: FAR, ..SourceOptions::default() }
}

/// The bytes that an unidentified connection sends.
#[derive(Clone, Copy, Debug)]
enum Says {
    Nothing,
    OneByte,
    /// Everything before a hello.
    Preamble,
}

impl Says {
    fn bytes(self) -> Vec<u8> {
        match self {
            Says::Nothing => Vec::new(),
            Says::OneByte => vec![b'L'],
            Says::Preamble => Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode().to_vec(),
        }
    }
}

fn stranger(connector: &MemoryConnector, says: Says) -> Halves {
    let mut halves = connector.connect().and_then(|channel| channel.split()).unwrap();
    // fails if the connection was closed to make room for a newer one
    let _ = halves.writer.write_all(&says.bytes(), &[]);
    halves
}

fn arrives(report: &Report, destination: &Destination, what: &str) {
    assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
}

#[test]
fn a_source_comes_in_past_a_thousand_silent_connections() {
    for says in [Says::Nothing, Says::OneByte, Says::Preamble] {
        for strangers in [220, 1000] {
            let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
            let destination = Destination::patient(Box::new(listener));
            let held: Vec<_> = (0..strangers).map(|_| stranger(&connector, says)).collect();
            let (_controller, commands) = Controller::new();
            let options = SourceOptions { streams: 8, ..options() };
            let report = migrate(&mut TestVm::new(), &connector, &mut StopAndCopy, &options, commands);
            arrives(&report, &destination, &format!("{strangers} that say {says:?}"));
            drop(held);
        }
    }
}

#[test]
fn a_source_comes_in_past_silent_connections_over_tcp() {
    let listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    let target = address.to_string().trim_start_matches("tcp:").to_owned();
    let destination = Destination::patient(listener);
    let held: Vec<_> = (0..220).map(|_| TcpStream::connect(&target).unwrap()).collect();
    let link = connector(&address, ConnectOptions::default());
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut TestVm::new(), &*link, &mut <PreCopy>::default(), &options(), commands);
    arrives(&report, &destination, "past 220");
    drop(held);
}

/// An observer that restores the link before the source's third attempt to reconnect, and opens
/// unidentified connections before that attempt.
struct Mender {
    connector: MemoryConnector,
    cut: Cut,
    held: Mutex<Vec<Halves>>,
}

impl Observer for Mender {
    fn event(&self, event: &Event) {
        if let Event::Reconnecting { attempt: 3, .. } = event {
            self.cut.restore();
            let strangers = (0..192).map(|_| stranger(&self.connector, Says::OneByte));
            self.held.lock().unwrap().extend(strangers);
        }
    }
}

/// The link is cut at the hand-over. When it is back, unidentified connections, with one byte each,
/// hold 192 places.
#[test]
fn a_source_in_doubt_comes_back_past_strangers() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::patient(Box::new(listener));
    let cut = connector.cut();
    let mender = Arc::new(Mender { connector: connector.clone(), cut: cut.clone(), held: Mutex::default() });
    let mut vm = TestVm::new();
    vm.on_doubt = Some(Box::new(move || cut.cut()));
    let options = SourceOptions { observer: mender.clone(), ..options() };
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut vm, &connector, &mut <PreCopy>::default(), &options, commands);
    arrives(&report, &destination, "past strangers");
    assert!(!mender.held.lock().unwrap().is_empty());
}

/// A connector whose first connections that resume a session are never answered.
struct Swallowing {
    inner: MemoryConnector,
    left: AtomicU32,
    /// Both ends of these connections, which keeps them open.
    swallowed: Mutex<Vec<memory::MemoryChannel>>,
}

impl Connector for Swallowing {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.inner.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let left = self.left.load(Ordering::SeqCst);
        if kind != LaneKind::Reattach || left == 0 {
            return self.inner.connect_as(kind);
        }
        self.left.store(left - 1, Ordering::SeqCst);
        let (near, far) = memory::pair(memory::DEFAULT_CAPACITY);
        self.swallowed.lock().unwrap().push(far);
        Ok(Box::new(near))
    }

    fn address(&self) -> String {
        "memory:swallowing".into()
    }
}

/// A source does not wait for answers on connections that were opened while the network was down.
/// The time-outs of the link are one hour here.
#[test]
fn attempts_to_reconnect_are_not_held_up_by_the_time_outs_of_a_link() {
    let (inner, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::patient(Box::new(listener));
    let cut = inner.cut();
    let link = Swallowing { inner, left: AtomicU32::new(3), swallowed: Mutex::default() };
    let mut vm = TestVm::new();
    let mending = cut.clone();
    vm.on_doubt = Some(Box::new(move || {
        mending.cut();
        mending.restore();
    }));
    let options = SourceOptions { idle_timeout: FAR, ..options() };
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut vm, &link, &mut <PreCopy>::default(), &options, commands);
    arrives(&report, &destination, "after three attempts");
    assert_eq!(link.left.load(Ordering::SeqCst), 0);
}

/// Sending one byte at a time does not extend the time in which a connection must identify itself.
#[test]
fn a_preamble_that_drips_has_a_deadline() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let _destination = Destination::with_idle_timeout(Box::new(listener), Duration::from_secs(1));
    let Halves { mut writer, reader: _reader, .. } = connector.connect().and_then(|channel| channel.split()).unwrap();
    let preamble = Says::Preamble.bytes();
    // each byte arrives well before the idle time-out
    let mut sent = 0;
    for byte in &preamble[..35] {
        if writer.write_all(&[*byte], &[]).is_err() {
            break;
        }
        sent += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(sent < 35, "all of it was taken");
}

/// The network fails for a while at the hand-over, while unidentified connections are open, over
/// TCP.
#[test]
fn a_source_in_doubt_comes_back_over_tcp() {
    let listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    let target = address.to_string().trim_start_matches("tcp:").to_owned();
    let destination = Destination::patient(listener);
    let relay = Arc::new(Relay::new(target.parse().unwrap()).unwrap());
    let link = connector(&relay.address(), ConnectOptions::default());
    let held = Arc::new(Mutex::new(Vec::new()));
    let mut vm = TestVm::new();
    let (at_doubt, strangers) = (relay.clone(), held.clone());
    vm.on_doubt = Some(Box::new(move || {
        let come = (0..192).map(|_| TcpStream::connect(&target).unwrap());
        strangers.lock().unwrap().extend(come);
        at_doubt.cut();
    }));
    let mending = Arc::new(Mending(relay.clone()));
    let options = SourceOptions { observer: mending, ..options() };
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut vm, &*link, &mut <PreCopy>::default(), &options, commands);
    arrives(&report, &destination, "over TCP");
    drop(held);
}

struct Mending(Arc<Relay>);

impl Observer for Mending {
    fn event(&self, event: &Event) {
        if let Event::Reconnecting { attempt: 4, .. } = event {
            self.0.restore();
        }
    }
}
