//! Tests of the options of sockets, of what a bandwidth limit passes on, and of how a listener
//! refuses.

use std::os::fd::{AsFd, OwnedFd};

use migration_core::wire::LaneKind;
use socket2::{SockRef, Socket};

use super::*;
use crate::Limited;

/// Opens a TCP connection with these options. Returns the accepted socket as well.
fn tcp_sockets(options: &SocketOptions, host: &str) -> (Socket, net::TcpStream) {
    let listener = net::TcpListener::bind((host, 0)).unwrap();
    let socket = Socket::from(net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    options.apply_tcp(SockRef::from(&socket), Some(listener.local_addr().unwrap().ip()));
    (socket, listener.accept().unwrap().0)
}

#[test]
fn options_reach_the_socket() {
    let options = SocketOptions {
        send_buffer: Some(40_000),
        receive_buffer: Some(50_000),
        keepalive: Some(Duration::from_secs(30)),
        ..SocketOptions::default()
    };
    let (socket, _far) = tcp_sockets(&options, "127.0.0.1");
    assert!(socket.tcp_nodelay().unwrap());
    // the kernel doubles what it is given
    assert_eq!((socket.send_buffer_size().unwrap(), socket.recv_buffer_size().unwrap()), (80_000, 100_000));
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
    // the shortest times are a second
    let (socket, _far) =
        tcp_sockets(&SocketOptions { keepalive: Some(Duration::from_millis(1)), ..options.clone() }, "127.0.0.1");
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(1));
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(1));
    let (socket, _far) = tcp_sockets(&SocketOptions { keepalive: None, ..options }, "127.0.0.1");
    assert!(!socket.keepalive().unwrap());
}

#[test]
fn only_a_loopback_peer_changes_the_congestion_control_by_itself() {
    let name = |socket: &Socket| {
        let name = socket.tcp_congestion().unwrap();
        String::from_utf8(name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()).unwrap()
    };
    let (socket, _far) =
        tcp_sockets(&SocketOptions { congestion: Congestion::System, ..Default::default() }, "127.0.0.1");
    let system = name(&socket);
    let apply = |congestion: Congestion, peer: Option<&str>| {
        let (socket, _far) =
            tcp_sockets(&SocketOptions { congestion: Congestion::System, ..Default::default() }, "127.0.0.1");
        let options = SocketOptions { congestion, ..SocketOptions::default() };
        options.apply_tcp(SockRef::from(&socket), peer.map(|peer| peer.parse().unwrap()));
        name(&socket)
    };
    for loopback in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
        let name = apply(Congestion::Auto, Some(loopback));
        assert!(name == "cubic" || name == "reno", "{name}");
    }
    for peer in [Some("192.0.2.1"), Some("2001:db8::1"), None] {
        assert_eq!(apply(Congestion::Auto, peer), system);
    }
    assert_eq!(apply(Congestion::Named("reno".into()), Some("192.0.2.1")), "reno");
    assert_eq!(apply(Congestion::Named("reno".into()), Some("127.0.0.1")), "reno");
}

#[test]
fn unix_sockets_get_a_larger_send_buffer() {
    let most: usize = std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap().trim().parse().unwrap();
    for (send_buffer, wanted) in [(Some(30_000), 30_000), (None, 1 << 20)] {
        let (near, _far) = os::unix::net::UnixStream::pair().unwrap();
        SocketOptions { send_buffer, ..SocketOptions::default() }.apply_unix(SockRef::from(&near));
        assert_eq!(SockRef::from(&near).send_buffer_size().unwrap(), 2 * wanted.min(most));
    }
}

#[test]
fn a_limit_passes_on_everything_but_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut listener = UnixListener::bind(&path, SocketOptions::default()).unwrap();
    let inner = UnixConnector::new(&path, ConnectOptions::default());
    let limited = Limited::new(Box::new(inner.clone()), Bandwidth::from_bits_per_second(1));
    let limiter = limited.limiter();
    assert_eq!(limiter.bandwidth(), Bandwidth::from_bits_per_second(1));
    assert_eq!((limited.address(), limited.carries_files()), (inner.address(), true));
    assert_eq!(limited.inner().address(), format!("unix:{}", path.display()));
    let (memory, _listener) = memory::link(1000);
    assert!(!Limited::new(Box::new(memory), Bandwidth::UNLIMITED).carries_files());

    let channel = limited.connect_as(LaneKind::Control).unwrap();
    assert_eq!(channel.peer(), inner.address());
    let mut near = channel.split().unwrap();
    let mut far = accept(&mut listener).split().unwrap();
    assert_eq!(near.writer.ahead_of_limit(), Duration::ZERO);
    near.writer.write_all(&[0; 32], &[]).unwrap();
    assert!(near.writer.ahead_of_limit() > Duration::ZERO);
    // files do not count
    limiter.set_bandwidth(Bandwidth::from_bits_per_second(2));
    near.writer.send_files(&[directory_file(&directory).as_fd()]).unwrap();
    assert_eq!(near.writer.ahead_of_limit(), Duration::ZERO);
    far.reader.read_exact(&mut [0; 32]).unwrap();
    assert_eq!(far.reader.receive_files(1).unwrap().len(), 1);
    // a peer that accepts nothing
    near.writer.set_idle_timeout(Some(SHORT)).unwrap();
    assert_eq!(kind(near.writer.write_all(&vec![0; 64 << 20], &[])), ErrorKind::TimedOut);
}

fn directory_file(directory: &tempfile::TempDir) -> OwnedFd {
    std::fs::File::open(directory.path()).unwrap().into()
}

#[test]
fn a_short_queue_is_one_of_unsent_bytes() {
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = Socket::from(net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let channel = StreamChannel::new(socket.try_clone().unwrap(), "peer").unwrap();
    let limiter = Limiter::new(Bandwidth::UNLIMITED);
    let mut writer = limiter.wrap(Box::new(channel)).split().unwrap().writer;
    writer.keep_queue_short();
    assert_eq!(socket.tcp_notsent_lowat().unwrap(), 128 << 10);
    // no error for a socket that has no such option
    unix_pair(&SocketOptions::default()).0.writer.keep_queue_short();
}

/// Opens every kind of lane on a link of one bit per second. A lane that waits sends no more than
/// the limit permits after a pause.
#[test]
fn the_kind_of_a_lane_decides_whether_it_waits() {
    const BYTES: usize = 128 << 10;
    let (connector, mut listener) = memory::link(8 << 20);
    let limited = Limited::new(Box::new(connector), Bandwidth::from_bits_per_second(1));
    for (kind_of_lane, waits) in [
        (LaneKind::Control, false),
        (LaneKind::Reattach, false),
        (LaneKind::Checkpoint, false),
        (LaneKind::Demand, true),
        (LaneKind::Bulk, true),
    ] {
        for within in [false, true] {
            let channel = match within {
                false => limited.connect_as(kind_of_lane).unwrap(),
                true => limited.connect_within(kind_of_lane, SOON).unwrap(),
            };
            let Halves { mut writer, closer, .. } = channel.split().unwrap();
            let mut far = accept(&mut listener).split().unwrap();
            // the set-up never waits
            writer.write_all(&[0; 16_000], &[]).unwrap();
            far.reader.read_exact(&mut [0; 16_000]).unwrap();
            limited.limiter().set_bandwidth(Bandwidth::from_bits_per_second(1));
            thread::scope(|scope| {
                let writing = scope.spawn(move || writer.write_all(&vec![0; BYTES], &[]));
                if waits {
                    far.reader.set_idle_timeout(Some(SHORT)).unwrap();
                    let read = far.reader.read_exact(&mut vec![0; BYTES]);
                    assert_eq!(kind(read), ErrorKind::TimedOut, "{kind_of_lane:?}");
                    closer.close();
                }
                assert_eq!(writing.join().unwrap().is_err(), waits, "{kind_of_lane:?}");
            });
        }
    }
}

#[test]
fn a_listener_refuses_one_connection_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut tcp = TcpListener::bind("127.0.0.1", 0, SocketOptions::default()).unwrap();
    assert_eq!(tcp.addresses(), [net::SocketAddr::from(([127, 0, 0, 1], tcp.port()))]);
    let to_tcp = tcp.addresses()[0];
    let mut unix = UnixListener::bind(&path, SocketOptions::default()).unwrap();
    assert_eq!(unix.address(), format!("unix:{}", path.display()));
    let connect_tcp = || OwnedFd::from(net::TcpStream::connect(to_tcp).unwrap());
    let connect_unix = || OwnedFd::from(os::unix::net::UnixStream::connect(&path).unwrap());
    let listeners: [(&mut dyn Listener, &dyn Fn() -> OwnedFd, &str); 2] =
        [(&mut tcp, &connect_tcp, "tcp:127.0.0.1:"), (&mut unix, &connect_unix, "unix:")];
    for (listener, connect, name) in listeners {
        assert!(listener.trouble().is_none());
        assert_eq!(listener.room().unwrap().channels(3), 3);
        let near: Vec<_> = (0..3).map(|_| connect()).collect();
        let refused = listener.accept_to_refuse().expect("one waits");
        assert!(refused.peer().starts_with(name), "{}", refused.peer());
        // the descriptor for this is taken again by the next accept
        assert!(listener.accept_to_refuse().is_none());
        assert!(listener.accept(SOON).unwrap().is_some());
        assert!(listener.accept_to_refuse().is_some());
        assert!(listener.accept(Duration::ZERO).unwrap().is_none());
        drop(near);
    }
}

/// The time of the caller and the time of the options: the shorter one counts.
#[test]
fn a_connector_waits_for_the_shorter_of_two_times() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let full = |domain, address: &socket2::SockAddr| {
        let socket = Socket::new(domain, socket2::Type::STREAM, None).unwrap();
        socket.bind(address).unwrap();
        socket.listen(0).unwrap();
        socket
    };
    let _unix = full(socket2::Domain::UNIX, &socket2::SockAddr::unix(&path).unwrap());
    let tcp = full(socket2::Domain::IPV4, &net::SocketAddr::from(([127, 0, 0, 1], 0)).into());
    let port = tcp.local_addr().unwrap().as_socket().unwrap().port();
    let options = |connect_timeout| ConnectOptions { connect_timeout, ..ConnectOptions::default() };
    let unix = |time| -> Box<dyn Connector> { Box::new(UnixConnector::new(&path, options(time))) };
    let tcp = |time| -> Box<dyn Connector> { Box::new(TcpConnector::new("127.0.0.1", port, options(time))) };
    let connectors: [&dyn Fn(Duration) -> Box<dyn Connector>; 2] = [&unix, &tcp];
    for connector in connectors {
        let (_taken, error) = fill(&*connector(SHORT));
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        for (own, callers) in [(SHORT, 3600 * SOON), (3600 * SOON, SHORT)] {
            let error = connector(own).connect_within(LaneKind::Bulk, callers).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        }
    }
    let error = unix(SHORT).connect().err().unwrap();
    assert_eq!(error.to_string(), "cannot connect: the listener did not accept within 20ms");
}

#[test]
fn channels_in_memory_have_an_address_and_end_in_order() {
    let (connector, mut listener) = memory::link(10);
    assert_eq!((connector.address(), listener.address()), ("memory:".into(), "memory:".into()));
    assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    let near = connector.connect().unwrap();
    let far = accept(&mut listener);
    assert_eq!((near.peer(), far.peer()), ("memory:".into(), "memory:".into()));
    // after a channel has ended in order, a cut does not make an end of it
    let (mut near, mut far) = (near.split().unwrap(), far.split().unwrap());
    near.writer.write_all(b"ab", &[]).unwrap();
    near.closer.close();
    far.reader.read_exact(&mut [0]).unwrap();
    connector.cut().cut();
    assert_eq!(kind(far.reader.read_exact(&mut [0])), ErrorKind::ConnectionReset);
    // and one that was cut stays cut
    far.closer.close();
    assert_eq!(kind(far.reader.read_exact(&mut [0])), ErrorKind::ConnectionReset);
}

/// A relay to a peer that reads and writes on behalf of the test.
fn relayed() -> (Relay, net::TcpStream, net::TcpStream) {
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::new(listener.local_addr().unwrap()).unwrap();
    let Address::Tcp { host, port } = relay.address() else { panic!("{}", relay.address()) };
    let near = net::TcpStream::connect((host.as_str(), port)).unwrap();
    let far = listener.accept().unwrap().0;
    (relay, near, far)
}

#[test]
fn a_relay_cuts_at_a_place_in_the_data() {
    let (relay, mut near, mut far) = relayed();
    relay.cut_where(|bytes| bytes.iter().position(|byte| *byte == b'!'));
    near.write_all(b"abc").unwrap();
    far.read_exact(&mut [0; 3]).unwrap();
    // the other direction, and a byte of it arrives
    far.write_all(b"de!f").unwrap();
    let mut rest = Vec::new();
    let _ = near.read_to_end(&mut rest);
    assert_eq!((rest.as_slice(), relay.relayed()), (&b"de"[..], 5));
    // later connections are cut as well, until the relay is restored
    let Address::Tcp { host, port } = relay.address() else { panic!("{}", relay.address()) };
    let mut again = net::TcpStream::connect((host.as_str(), port)).unwrap();
    assert!(matches!(again.read(&mut [0]), Ok(0) | Err(_)));
    let (relay, mut near, mut far) = relayed();
    relay.cut_where(|bytes| bytes.iter().position(|byte| *byte == b'!'));
    relay.restore();
    near.write_all(b"!").unwrap();
    far.read_exact(&mut [0]).unwrap();
    // of two cuts, the first one counts; a place behind the data is none
    relay.cut_where(|bytes| Some(bytes.len() + 1));
    near.write_all(b"ab").unwrap();
    far.read_exact(&mut [0; 2]).unwrap();
    relay.cut_where(|_| Some(2));
    relay.cut_after(1);
    near.write_all(b"abc").unwrap();
    let mut rest = Vec::new();
    let _ = far.read_to_end(&mut rest);
    assert_eq!((rest.as_slice(), relay.relayed()), (&b"a"[..], 4));
}

#[test]
fn a_relay_that_is_cut_at_once_forwards_nothing() {
    let (relay, mut near, mut far) = relayed();
    relay.cut_after(0);
    for end in [&mut near, &mut far] {
        assert!(matches!(end.read(&mut [0]), Ok(0) | Err(_)));
    }
    let (relay_too, mut near, mut far) = relayed();
    relay_too.cut();
    for end in [&mut near, &mut far] {
        assert!(matches!(end.read(&mut [0]), Ok(0) | Err(_)));
    }
    assert_eq!((relay.relayed(), relay_too.relayed()), (0, 0));
}

#[test]
fn a_relay_that_is_stalled_forwards_when_it_is_restored() {
    let (relay, mut near, mut far) = relayed();
    relay.stall();
    near.write_all(b"a").unwrap();
    far.set_read_timeout(Some(SHORT)).unwrap();
    assert!(far.read_exact(&mut [0]).is_err());
    assert_eq!(relay.relayed(), 0);
    relay.restore();
    far.set_read_timeout(Some(SOON)).unwrap();
    far.read_exact(&mut [0]).unwrap();
}

/// The end of one direction is forwarded, and the other one goes on.
#[test]
fn a_relay_forwards_the_end_of_a_direction() {
    let (_relay, mut near, mut far) = relayed();
    near.write_all(b"ab").unwrap();
    near.shutdown(net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    far.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"ab");
    far.write_all(b"c").unwrap();
    near.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_relay_delays_and_limits_what_it_forwards() {
    let (relay, mut near, mut far) = relayed();
    let delay = Duration::from_millis(30);
    relay.set_delay(delay);
    let start = Instant::now();
    near.write_all(b"a").unwrap();
    far.read_exact(&mut [0]).unwrap();
    far.write_all(b"b").unwrap();
    near.read_exact(&mut [0]).unwrap();
    // never earlier; how much later depends on the host
    assert!(start.elapsed() >= 2 * delay);
    relay.set_delay(Duration::ZERO);
    // more than the burst does not arrive
    relay.set_bandwidth(Bandwidth::from_bits_per_second(1));
    near.write_all(&vec![0; 1 << 20]).unwrap();
    far.set_read_timeout(Some(SHORT)).unwrap();
    assert!(far.read_exact(&mut vec![0; 1 << 20]).is_err());
    relay.set_bandwidth(Bandwidth::UNLIMITED);
    far.set_read_timeout(Some(SOON)).unwrap();
    far.read_exact(&mut [0; 1]).unwrap();
}
