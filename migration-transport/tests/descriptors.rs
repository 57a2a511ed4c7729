//! Tests a destination without free descriptors. It reports this to its user once and to its
//! sources, and continues when descriptors are available again. The test needs a process of its
//! own, because it lowers the limit of the process.

#[allow(dead_code, reason = "these tests need a part of it")]
mod common;

use std::{
    fs::File,
    io::Read,
    net::TcpStream,
    sync::{Arc, mpsc},
    time::Duration,
};

use common::{Log, TestHost, TestVm};
use migration_core::{
    engine::{Controller, ReceiverOptions, SourceOptions, migrate},
    report::Outcome,
    strategy::PreCopy,
    wire::{Control, ErrorCode, Header},
};
use migration_transport::{Address, ConnectOptions, bind, connector};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Reads a frame from this connection.
fn said(stream: &mut TcpStream) -> Control {
    let mut header = [0; Header::LEN];
    stream.read_exact(&mut header).unwrap();
    let header = Header::decode(&header).unwrap();
    let mut body = vec![0; header.body as usize];
    stream.read_exact(&mut body).unwrap();
    Control::decode(&header, &body).unwrap()
}

#[test]
fn without_descriptors_sources_are_told_and_served_again_when_there_are_some() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 128, hard).unwrap();
    let mut listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    let target = address.to_string().trim_start_matches("tcp:").to_owned();
    let room = listener.room().unwrap();
    assert_eq!(room.channels(16), 16);
    let mut waiting: Vec<_> = (0..3).map(|_| TcpStream::connect(&target).unwrap()).collect();
    // take all free descriptors
    let mut taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert_eq!(room.channels(16), 0);
    drop(taken.drain(..5));
    assert_eq!(room.channels(16), 5, "what is left is found out without keeping it");
    taken.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));

    let (host, arrived) = TestHost::new(0);
    let log = Arc::new(Log::default());
    let options = ReceiverOptions { observer: log.clone(), ..ReceiverOptions::default() };
    let receiver = host.receiver(options);
    let (ended_tx, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || ended_tx.send(receiver.run(&mut *listener)).unwrap());
    for stream in &mut waiting {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        match said(stream) {
            Control::Error { code: ErrorCode::Resources, text } => assert!(text.contains("open files"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    let warnings = || log.0.lock().unwrap().iter().filter(|e| e.contains("no connection can be accepted")).count();
    assert_eq!(warnings(), 1, "{:?}", log.0.lock().unwrap());
    drop(taken);
    let link = connector(&address, ConnectOptions::default());
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut TestVm::new(), &*link, &mut <PreCopy>::default(), &SourceOptions::default(), commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let guest = arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
    ended.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    thread.join().unwrap();
}
