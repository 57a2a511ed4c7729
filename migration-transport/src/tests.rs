//! Tests of channels over real sockets and in memory, through the traits only.

use std::{
    io::{self, ErrorKind, Read, Write},
    net, os,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    GuestRam,
    channel::{Channel, Connector, Halves, Listener},
};
use proptest::prelude::*;

use crate::{
    Address, Bandwidth, Congestion, ConnectOptions, Limiter, Relay, SocketOptions, StreamChannel, TcpConnector,
    TcpListener, UnixConnector, UnixListener, bind, connector, memory,
    testing::{pattern, ram},
};

mod sockets;

const SOON: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);

type Pair = (Halves, Halves);

fn accept(listener: &mut dyn Listener) -> Box<dyn Channel> {
    listener.accept(SOON).unwrap().expect("a connection waits")
}

fn tcp_pair(options: &SocketOptions) -> Pair {
    let mut listener = TcpListener::bind("127.0.0.1", 0, options.clone()).unwrap();
    let options = ConnectOptions { socket: options.clone(), ..ConnectOptions::default() };
    let near = TcpConnector::new("127.0.0.1", listener.port(), options).connect().unwrap();
    (near.split().unwrap(), accept(&mut listener).split().unwrap())
}

fn unix_pair(options: &SocketOptions) -> Pair {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut listener = UnixListener::bind(&path, options.clone()).unwrap();
    let options = ConnectOptions { socket: options.clone(), ..ConnectOptions::default() };
    let near = UnixConnector::new(&path, options).connect().unwrap();
    (near.split().unwrap(), accept(&mut listener).split().unwrap())
}

fn memory_pair(capacity: usize) -> Pair {
    let (near, far) = memory::pair(capacity);
    (Box::new(near).split().unwrap(), Box::new(far).split().unwrap())
}

/// Returns a pair of every kind of channel, with buffers so small that writes are partial.
fn pairs() -> Vec<(&'static str, Pair)> {
    let small = SocketOptions { send_buffer: Some(1), receive_buffer: Some(1), ..SocketOptions::default() };
    vec![
        ("tcp", tcp_pair(&SocketOptions::default())),
        ("tcp, small", tcp_pair(&small)),
        ("unix", unix_pair(&SocketOptions::default())),
        ("unix, small", unix_pair(&small)),
        ("memory", memory_pair(memory::DEFAULT_CAPACITY)),
        ("memory, small", memory_pair(1000)),
    ]
}

#[track_caller]
fn kind(result: io::Result<()>) -> ErrorKind {
    result.expect_err("it must fail").kind()
}

#[test]
fn memory_arrives_whole_through_partial_writes_and_many_iovecs() {
    const PAGES: usize = 1500; // more slices than one call takes
    let (from, to) = (ram(PAGES as u64), ram(PAGES as u64));
    let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&from, &to);
    let bytes = pattern(PAGES * 4096);
    from.write(0, &bytes).unwrap();
    for (name, (mut near, mut far)) in pairs() {
        to.slice_at(0, (PAGES * 4096) as u64).unwrap().zero();
        thread::scope(|scope| {
            scope.spawn(|| {
                // odd lengths, with empty slices among them
                let mut slices = vec![from.slice_at(0, 0).unwrap()];
                for page in 0..PAGES as u64 {
                    slices.push(from.slice_at(page * 4096, 3).unwrap());
                    slices.push(from.slice_at(page * 4096 + 3, 0).unwrap());
                    slices.push(from.slice_at(page * 4096 + 3, 4093).unwrap());
                }
                near.writer.write_all(b"head", &slices).unwrap();
                near.writer.write_all(b"", &[]).unwrap();
            });
            let mut head = [0; 4];
            far.reader.read_exact(&mut head).unwrap();
            assert_eq!(&head, b"head", "{name}");
            far.reader.read_exact(&mut []).unwrap();
            far.reader.read_ram(&[]).unwrap();
            let slices: Vec<_> = (0..PAGES as u64).map(|page| to.slice_at(page * 4096, 4096).unwrap()).collect();
            far.reader.read_ram(&slices).unwrap();
        });
        let mut got = vec![0; bytes.len()];
        to.read(0, &mut got).unwrap();
        assert!(got == bytes, "{name}");
    }
}

#[test]
fn the_end_is_an_error_after_what_was_sent() {
    for (name, (mut near, mut far)) in pairs() {
        near.writer.write_all(b"abc", &[]).unwrap();
        drop((near.reader, near.writer)); // the closer does not keep it open
        let mut two = [0; 2];
        far.reader.read_exact(&mut two).unwrap();
        assert_eq!(kind(far.reader.read_exact(&mut two)), ErrorKind::UnexpectedEof, "{name}: in the middle");
        assert_eq!(kind(far.reader.read_exact(&mut two)), ErrorKind::UnexpectedEof, "{name}: again");
        near.closer.close(); // of no effect, and no harm
        let memory = ram(1);
        let slice = memory.slice_at(0, 8).unwrap();
        assert_eq!(kind(far.reader.read_ram(&[slice])), ErrorKind::UnexpectedEof, "{name}");
    }
}

#[test]
fn writing_to_a_vanished_peer_fails_without_a_signal() {
    for (name, (near, mut far)) in pairs() {
        drop((near.reader, near.writer));
        let error = (0..1_000_000).find_map(|_| far.writer.write_all(&[0; 1000], &[]).err()).expect(name);
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{name}: {error}");
    }
}

#[test]
fn silence_times_out() {
    for (name, (mut near, mut far)) in pairs() {
        near.reader.set_idle_timeout(Some(SHORT)).unwrap();
        let error = near.reader.read_exact(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{name}");
        assert!(error.to_string().contains("20ms"), "{name}: {error}");
        // some bytes, but not all
        far.writer.write_all(b"abc", &[]).unwrap();
        assert_eq!(kind(near.reader.read_exact(&mut [0; 4])), ErrorKind::TimedOut, "{name}");
        let memory = ram(1);
        assert_eq!(kind(near.reader.read_ram(&[memory.slice_at(0, 8).unwrap()])), ErrorKind::TimedOut, "{name}");
        // a peer that accepts nothing
        near.writer.set_idle_timeout(Some(SHORT)).unwrap();
        let error = near.writer.write_all(&vec![0; 64 << 20], &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{name}");
        assert!(error.to_string().contains("20ms"), "{name}: {error}");
    }
}

/// Writes to a peer that accepts a byte now and then, until the write returns.
fn write_to_a_slow_peer(near: &mut Halves, far: &mut Halves) -> io::Result<()> {
    let (done, work) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let reader = &mut far.reader;
        scope.spawn(move || {
            let began = Instant::now();
            while reader.read_exact(&mut [0]).is_ok() {
                // a write that takes longer than this has missed its deadline, so let it complete
                let pause = if began.elapsed() < SOON { Duration::from_millis(1) } else { Duration::ZERO };
                if work.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        });
        let written = near.writer.write_all(&vec![0; 64 << 20], &[]);
        drop(done);
        // the peer may wait for a byte
        near.closer.close();
        written
    })
}

#[test]
fn a_peer_that_drips_does_not_outlast_a_deadline() {
    let limiter = Limiter::new("100Gbit/s".parse().unwrap());
    let (limited, far) = memory::pair(1000);
    let limited = (limiter.wrap(Box::new(limited)).split().unwrap(), Box::new(far).split().unwrap());
    for (name, (mut near, mut far)) in pairs().into_iter().chain([("limited", limited)]) {
        near.writer.set_idle_timeout(Some(Duration::from_secs(3600))).unwrap();
        near.writer.set_deadline(Some(Instant::now() + SHORT));
        assert_eq!(kind(write_to_a_slow_peer(&mut near, &mut far)), ErrorKind::TimedOut, "{name}");
    }
}

#[test]
fn a_deadline_that_has_passed_ends_writes_until_it_is_taken_back() {
    for (name, (mut near, mut far)) in pairs() {
        near.writer.set_deadline(Some(Instant::now()));
        assert_eq!(kind(near.writer.write_all(b"a", &[])), ErrorKind::TimedOut, "{name}");
        near.writer.set_deadline(None);
        near.writer.write_all(b"b", &[]).unwrap();
        let mut got = [0];
        far.reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"b", "{name}");
        // the time-out that was set before the deadline is in effect again
        near.writer.set_idle_timeout(Some(SHORT)).unwrap();
        near.writer.set_deadline(Some(Instant::now() + 3600 * SOON));
        near.writer.set_deadline(None);
        assert_eq!(kind(near.writer.write_all(&vec![0; 64 << 20], &[])), ErrorKind::TimedOut, "{name}");
    }
}

#[test]
fn the_smallest_time_out_is_one_and_none_is_none() {
    for (name, (mut near, mut far)) in pairs() {
        near.reader.set_idle_timeout(Some(Duration::ZERO)).unwrap();
        assert_eq!(kind(near.reader.read_exact(&mut [0; 1])), ErrorKind::TimedOut, "{name}");
        near.reader.set_idle_timeout(Some(Duration::MAX)).unwrap();
        near.writer.set_idle_timeout(None).unwrap();
        far.writer.write_all(b"x", &[]).unwrap();
        near.reader.read_exact(&mut [0; 1]).unwrap();
    }
}

#[test]
fn a_time_out_of_the_options_applies_from_the_start() {
    let options = SocketOptions { idle_timeout: Some(SHORT), ..SocketOptions::default() };
    for (mut near, mut far) in [tcp_pair(&options), unix_pair(&options)] {
        assert_eq!(kind(near.reader.read_exact(&mut [0; 1])), ErrorKind::TimedOut);
        assert_eq!(kind(far.reader.read_exact(&mut [0; 1])), ErrorKind::TimedOut);
    }
}

#[test]
fn closing_ends_blocked_reads_and_writes() {
    for (name, (near, far)) in pairs() {
        let Halves { mut reader, mut writer, closer } = near;
        thread::scope(|scope| {
            scope.spawn(move || assert!(reader.read_exact(&mut [0; 1]).is_err(), "{name}"));
            scope.spawn(move || assert!(writer.write_all(&vec![0; 64 << 20], &[]).is_err(), "{name}"));
            closer.close();
            closer.close();
        });
        drop(far);
    }
}

#[test]
fn bad_peers_do_not_end_a_listener() {
    let mut listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    let Address::Tcp { port, .. } = address else { panic!("{address}") };
    for _ in 0..5 {
        // connections that are reset before they are accepted
        let bad = net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket2::SockRef::from(&bad).set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut near = connector(&address, ConnectOptions::default()).connect().unwrap().split().unwrap();
    near.writer.write_all(b"good", &[]).unwrap();
    let found = (0..6).any(|_| {
        let mut far = accept(listener.as_mut()).split().unwrap();
        let mut word = [0; 4];
        far.reader.read_exact(&mut word).is_ok() && &word == b"good"
    });
    assert!(found);
    assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    assert!(listener.accept(SHORT).unwrap().is_none());
}

#[test]
fn peers_and_addresses_have_names() {
    let mut listener = bind(&"tcp:localhost:0".parse().unwrap()).unwrap();
    let address = listener.address();
    assert!(address.starts_with("tcp:localhost:") && !address.ends_with(":0"), "{address}");
    let connector = connector(&address.parse().unwrap(), ConnectOptions::default());
    assert_eq!(connector.address(), address);
    let near = connector.connect().unwrap();
    let far = accept(listener.as_mut());
    for peer in [near.peer(), far.peer()] {
        assert!(matches!(peer.parse(), Ok(Address::Tcp { .. })), "{peer}");
    }
}

#[test]
fn nobody_there_is_refused_and_the_address_is_left_to_the_caller() {
    // a bound port on which nothing listens, so that no other program gets it
    let deaf = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    deaf.bind(&net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let port = deaf.local_addr().unwrap().as_socket().unwrap().port();
    let address = format!("tcp:{}", deaf.local_addr().unwrap().as_socket().unwrap());
    let error = connector(&address.parse().unwrap(), ConnectOptions::default()).connect().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(error.to_string(), "cannot connect: Connection refused (os error 111)");
    // for a host name the error has each address that refused
    let error = TcpConnector::new("localhost", port, ConnectOptions::default()).connect().err().unwrap();
    assert!(error.to_string().contains("127.0.0.1: ") && !error.to_string().contains("localhost"), "{error}");
    let error = UnixConnector::new("/nonexistent/socket", ConnectOptions::default()).connect().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), "cannot connect: No such file or directory (os error 2)");
}

#[test]
fn connecting_gives_up_in_time() {
    // a listener that never accepts, with a full backlog
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let full = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    full.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    full.listen(0).unwrap();
    let options = ConnectOptions { connect_timeout: SHORT, ..ConnectOptions::default() };
    let unix = UnixConnector::new(&path, options.clone());
    let (_taken, error) = fill(&unix);
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");

    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let port = full.local_addr().unwrap().as_socket().unwrap().port();
    let (_taken, error) = fill(&TcpConnector::new("127.0.0.1", port, options));
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}

fn fill(connector: &dyn Connector) -> (Vec<Box<dyn Channel>>, io::Error) {
    let mut taken = Vec::new();
    loop {
        match connector.connect() {
            Ok(channel) if taken.len() < 100 => taken.push(channel),
            Ok(_) => panic!("the backlog does not fill"),
            Err(e) => return (taken, e),
        }
    }
}

#[test]
fn a_unix_listener_takes_over_stale_paths_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let bind = || UnixListener::bind(&path, SocketOptions::default());
    // left by a process that died: the listener of std does not remove its file
    drop(os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let mut listener = bind().unwrap();
    // a living listener is not replaced
    let error = bind().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert!(error.to_string().contains("unix:"), "{error}");
    // the attempt does not harm it, but counts as a connection that ended
    let mut near = UnixConnector::new(&path, ConnectOptions::default()).connect().unwrap().split().unwrap();
    near.writer.write_all(b"x", &[]).unwrap();
    assert!((0..2).any(|_| accept(&mut listener).split().unwrap().reader.read_exact(&mut [0; 1]).is_ok()));
    drop(listener);
    assert!(!path.exists(), "it removes its file");
    // a file that is no socket is not replaced
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(bind().unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
    // a path that was taken over by another socket is not removed
    let first = bind().unwrap();
    std::fs::rename(&path, directory.path().join("moved")).unwrap();
    let _second = bind().unwrap();
    drop(first);
    assert!(path.exists());
}

#[test]
fn a_unix_socket_belongs_to_its_owner_alone() {
    use os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut listener = UnixListener::bind(&path, SocketOptions::default()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
    let _near = UnixConnector::new(&path, ConnectOptions::default()).connect().unwrap();
    let peer = accept(&mut listener).peer();
    assert!(peer.contains(&format!("process {}", std::process::id())), "{peer}");
}

#[test]
fn only_stream_sockets_become_channels() {
    let datagram = net::UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(StreamChannel::new(datagram, "x").unwrap_err().kind(), ErrorKind::InvalidInput);
    let (near, mut far) = os::unix::net::UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut near = Box::new(StreamChannel::new(near, "x").unwrap()).split().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| near.reader.read_exact(&mut [0; 3]).unwrap()); // waits: it is blocking now
        far.write_all(b"abc").unwrap();
    });
}

#[test]
fn loopback_does_not_pace_and_unknown_congestion_control_is_no_error() {
    let mut listener = TcpListener::bind("127.0.0.1", 0, SocketOptions::default()).unwrap();
    let connect = |congestion| {
        let socket = SocketOptions { congestion, ..SocketOptions::default() };
        let options = ConnectOptions { socket, ..ConnectOptions::default() };
        TcpConnector::new("127.0.0.1", listener.port(), options).connect().unwrap()
    };
    let _a = connect(Congestion::Auto);
    let _b = connect(Congestion::Named("no-such-thing".into()));
    let _c = connect(Congestion::System);
    for _ in 0..3 {
        accept(&mut listener);
    }
}

#[test]
fn a_cut_link_in_memory_fails_until_it_is_restored() {
    let (connector, mut listener) = memory::link(1000);
    let cut = connector.cut();
    assert!(!cut.is_cut());
    let mut near = connector.connect().unwrap().split().unwrap();
    let mut far = accept(&mut listener).split().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(kind(far.reader.read_exact(&mut [0; 1])), ErrorKind::ConnectionReset));
        cut.cut();
    });
    assert_eq!(kind(near.writer.write_all(b"x", &[])), ErrorKind::ConnectionReset);
    assert!(cut.is_cut());
    assert_eq!(connector.connect().err().unwrap().kind(), ErrorKind::TimedOut);
    cut.restore();
    assert!(!cut.is_cut());
    connector.connect().unwrap();
    assert_eq!(kind(near.reader.read_exact(&mut [0; 1])), ErrorKind::ConnectionReset, "stays cut");
    drop(listener);
    assert_eq!(connector.connect().err().unwrap().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn links_in_memory_can_be_cut_at_any_byte() {
    for at in 0..=20 {
        for sent in [true, false] {
            let (connector, mut listener) = memory::link(7);
            let cut = connector.cut();
            let lanes = [connector.connect().unwrap(), connector.connect().unwrap()];
            let lanes = lanes.map(|near| (near.split().unwrap(), accept(&mut listener).split().unwrap()));
            if sent {
                cut.after_sent(at)
            } else {
                cut.after_received(at)
            }
            let got: u64 = thread::scope(|scope| {
                let readers: Vec<_> = lanes
                    .into_iter()
                    .map(|(mut near, mut far)| {
                        scope.spawn(move || while near.writer.write_all(b"abc", &[]).is_ok() {});
                        scope.spawn(move || {
                            let mut got = 0;
                            while far.reader.read_exact(&mut [0; 1]).is_ok() {
                                got += 1;
                            }
                            got
                        })
                    })
                    .collect();
                readers.into_iter().map(|reader| reader.join().unwrap()).sum()
            });
            assert_eq!(got, at, "sent: {sent}");
            assert_eq!(cut.received(), at);
            assert!(cut.sent() >= at && cut.is_cut());
        }
    }
}

/// Starts a target that answers each connection with the number of bytes that it received.
fn counting_target() -> (net::SocketAddr, thread::JoinHandle<Vec<u64>>) {
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let counting = thread::spawn(move || {
        let mut counts = Vec::new();
        for stream in listener.incoming() {
            let (mut stream, mut count) = (stream.unwrap(), 0);
            let mut buf = [0; 4096];
            while let Ok(len @ 1..) = stream.read(&mut buf) {
                count += len as u64;
                if buf[..len].contains(&b'!') {
                    return counts;
                }
            }
            counts.push(count);
        }
        counts
    });
    (address, counting)
}

#[test]
fn a_relay_forwards_and_cuts() {
    let (target, counting) = counting_target();
    let relay = Relay::new(target).unwrap();
    relay.set_delay(Duration::from_millis(1));
    relay.set_bandwidth(Bandwidth::from_bytes_per_second(10_000_000));
    let connector = Arc::new(connector(&relay.address(), ConnectOptions::default()));
    for at in [1, 1000, 100_000] {
        let mut near = connector.connect().unwrap().split().unwrap();
        relay.cut_after(at);
        // fails, because this is more than all buffers hold
        assert!(near.writer.write_all(&vec![0; 64 << 20], &[]).is_err());
        assert!(near.reader.read_exact(&mut [0; 1]).is_err());
        relay.restore();
    }
    assert_eq!(relay.relayed(), 101_001);
    // a stall is silence and not an error
    let mut near = connector.connect().unwrap().split().unwrap();
    relay.stall();
    near.writer.write_all(b"x", &[]).unwrap();
    near.reader.set_idle_timeout(Some(SHORT)).unwrap();
    assert_eq!(kind(near.reader.read_exact(&mut [0; 1])), ErrorKind::TimedOut);
    relay.restore();
    relay.set_delay(Duration::ZERO);
    drop(near);
    let mut last = connector.connect().unwrap().split().unwrap();
    last.writer.write_all(b"!", &[]).unwrap();
    assert_eq!(counting.join().unwrap(), [1, 1000, 100_000, 1]);
}

#[test]
fn dropping_a_relay_ends_its_connections() {
    let (target, _counting) = counting_target();
    let relay = Relay::new(target).unwrap();
    let mut near = connector(&relay.address(), ConnectOptions::default()).connect().unwrap().split().unwrap();
    near.writer.write_all(b"abc", &[]).unwrap();
    relay.stall();
    drop(relay);
    assert!(near.reader.read_exact(&mut [0; 1]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn links_in_memory_keep_every_byte_in_order(
        capacity in 0usize..5000,
        writes in prop::collection::vec((0usize..3000, 0u64..9000), 1..12),
        reads in prop::collection::vec((any::<bool>(), 1usize..5000), 1..12),
    ) {
        let (from, to) = (ram(4), ram(4));
        let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&from, &to);
        let bytes = pattern(4 * 4096);
        from.write(0, &bytes).unwrap();
        let mut expected = Vec::new();
        for &(head, len) in &writes {
            expected.extend_from_slice(&bytes[..head]);
            expected.extend_from_slice(&bytes[head..head + len as usize]);
        }
        let (mut near, mut far) = memory_pair(capacity);
        let mut got = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                for &(head, len) in &writes {
                    let half = len / 2;
                    let slices = [(head as u64, half), (head as u64 + half, len - half)];
                    let slices = slices.map(|(at, len)| from.slice_at(at, len).unwrap());
                    near.writer.write_all(&bytes[..head], &slices).unwrap();
                }
            });
            for &(into_ram, len) in reads.iter().cycle() {
                let len = len.min(expected.len() - got.len());
                if len == 0 {
                    break;
                }
                let mut buf = vec![0; len];
                if into_ram {
                    far.reader.read_ram(&[to.slice_at(1, len as u64).unwrap()]).unwrap();
                    to.read(1, &mut buf).unwrap();
                } else {
                    far.reader.read_exact(&mut buf).unwrap();
                }
                got.extend(buf);
            }
        });
        prop_assert!(got == expected);
    }
}
