//! TCP connections.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{Channel, Connector, Listener, Room},
    wire::LaneKind,
};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::{
    Address, ConnectOptions, SocketOptions, StreamChannel,
    accept::{Descriptors, Shortage},
};

/// The number of attempts to find a port that is free at all addresses of a host.
const PORT_ATTEMPTS: usize = 64;
/// The number of connections that the kernel may complete before [`Listener::accept`] is called.
const BACKLOG: i32 = 128;

/// Opens TCP connections to one host and port.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    host: String,
    port: u16,
    options: ConnectOptions,
}

impl TcpConnector {
    /// Makes a connector to `host`, a name or an IP address (IPv6 without brackets). Nothing is
    /// resolved or opened yet.
    pub fn new(host: impl Into<String>, port: u16, options: ConnectOptions) -> Self {
        Self { host: host.into(), port, options }
    }
}

impl Connector for TcpConnector {
    /// Resolves the host again and tries its addresses in order. Each gets an equal share of the
    /// remaining time, so that an address that never answers does not use up the time of the
    /// others.
    ///
    /// # Errors
    /// Fails with the error of the address. For a host name the error has the errors of all its
    /// addresses and the kind of the last one. The host is not in the message: the caller knows its
    /// [`address`](Connector::address).
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.open(self.options.connect_timeout)
    }

    fn connect_within(&self, _kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        self.open(timeout.min(self.options.connect_timeout))
    }

    fn address(&self) -> String {
        Address::Tcp { host: self.host.clone(), port: self.port }.to_string()
    }
}

impl TcpConnector {
    fn open(&self, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let addresses: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        let deadline = Instant::now().checked_add(timeout);
        let mut failures = Vec::new();
        let mut kind = io::ErrorKind::NotFound;
        for (i, address) in addresses.iter().enumerate() {
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            match connect_one(address, share(left, addresses.len(), i), &self.options.socket) {
                Ok(channel) => return Ok(Box::new(channel)),
                Err(e) => {
                    kind = e.kind();
                    let literal = self.host.parse::<IpAddr>().is_ok();
                    failures.push(if literal { e.to_string() } else { format!("{}: {e}", address.ip()) });
                }
            }
        }
        let why = if failures.is_empty() { "the host has no address".into() } else { failures.join("; ") };
        Err(io::Error::new(kind, format!("cannot connect: {why}")))
    }
}

/// Returns the part of the time that is left for the next of `all` addresses, after `tried` of them.
fn share(left: Duration, all: usize, tried: usize) -> Duration {
    left / (all - tried) as u32
}

fn connect_one(address: &SocketAddr, timeout: Duration, options: &SocketOptions) -> io::Result<StreamChannel> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    options.apply_tcp(SockRef::from(&socket), Some(address.ip()));
    // a time-out of zero would be an invalid argument
    socket.connect_timeout(&(*address).into(), timeout.max(Duration::from_millis(1)))?;
    // If nothing listens on a local port of the ephemeral range, TCP may choose that port for the
    // connecting socket and connect it to itself ("simultaneous open"). Such a connection echoes.
    if socket.local_addr()?.as_socket() == Some(*address) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    channel(socket, Address::from(*address).to_string(), options)
}

fn channel(socket: Socket, peer: String, options: &SocketOptions) -> io::Result<StreamChannel> {
    let mut channel = StreamChannel::new(socket, peer)?;
    channel.set_idle_timeout(options.idle_timeout)?;
    Ok(channel)
}

/// Accepts TCP connections at every address of a host.
#[derive(Debug)]
pub struct TcpListener {
    /// The listening sockets, at least one.
    sockets: Vec<Socket>,
    addresses: Vec<SocketAddr>,
    host: String,
    port: u16,
    options: SocketOptions,
    shortage: Shortage,
}

impl TcpListener {
    /// Listens on `port` of every address of `host`: an IP address or name of this host, or
    /// `0.0.0.0` or `::` for all of its interfaces. `options` apply to each connection.
    ///
    /// A name may stand for several addresses, of IPv4 and IPv6; addresses that this host does not
    /// have are left out. Port 0 chooses a port that is free at all of them.
    /// [`address`](Listener::address) then returns that port, and [`addresses`](Self::addresses)
    /// returns each address.
    ///
    /// # Errors
    /// Fails if no address can be bound. Fails with `AddrInUse` also if the port is taken at one of
    /// several addresses, because a source might reach another program there.
    pub fn bind(host: &str, port: u16, options: SocketOptions) -> io::Result<Self> {
        let failed = |error: io::Error| {
            let address = Address::Tcp { host: host.to_owned(), port };
            io::Error::new(error.kind(), format!("cannot listen at {address}: {error}"))
        };
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in (host, port).to_socket_addrs().map_err(failed)? {
            // name services may return an address twice
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        let sockets = bind_all(&addresses, &options).map_err(failed)?;
        let bound: Vec<_> = sockets.iter().map(|s| Ok(s.local_addr()?.as_socket())).collect::<io::Result<_>>()?;
        let addresses: Vec<_> = bound.into_iter().flatten().collect();
        let port = addresses.first().map_or(port, SocketAddr::port);
        Ok(Self { sockets, addresses, host: host.to_owned(), port, options, shortage: Shortage::new() })
    }

    /// Returns the port, which is the same at all addresses.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the addresses at which it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    fn next(&mut self, timeout: Duration) -> io::Result<Option<(Socket, SockAddr)>> {
        let waiting: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        self.shortage.accept_within(&waiting, timeout, |index| self.sockets[index].accept())
    }

    fn channel(&self, socket: Socket, peer: &SockAddr) -> io::Result<StreamChannel> {
        let peer = peer.as_socket();
        self.options.apply_tcp(SockRef::from(&socket), peer.map(|peer| peer.ip()));
        let name = peer.map_or_else(|| "tcp:?".into(), |peer| Address::from(peer).to_string());
        channel(socket, name, &self.options)
    }
}

/// Binds those of the addresses that this host has. For port 0 all get the port that the first one
/// gets. If that port is taken at another address, a new port is tried.
fn bind_all(addresses: &[SocketAddr], options: &SocketOptions) -> io::Result<Vec<Socket>> {
    let alone = addresses.len() == 1;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for _ in 0..PORT_ATTEMPTS {
        let mut sockets: Vec<Socket> = Vec::new();
        let mut port = 0;
        let mut taken = false;
        for &address in addresses {
            let mut at = address;
            if at.port() == 0 {
                at.set_port(port);
            }
            match listen(&at, alone, options) {
                Ok(socket) => {
                    port = socket.local_addr()?.as_socket().map_or(port, |bound| bound.port());
                    sockets.push(socket);
                }
                Err(error) => {
                    taken |= !is_not_of_this_host(&error);
                    last = if alone { error } else { io::Error::new(error.kind(), format!("{at}: {error}")) };
                    if taken {
                        break;
                    }
                }
            }
        }
        match (taken, sockets.is_empty()) {
            (false, false) => return Ok(sockets),
            // the port is free at the first address, but taken at another one
            (true, false) if last.kind() == io::ErrorKind::AddrInUse && addresses[0].port() == 0 => {}
            _ => return Err(last),
        }
    }
    Err(last)
}

/// Returns whether the error means that this host does not have the address or its protocol.
fn is_not_of_this_host(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Listens at one address. `alone` is false if it is one of several.
fn listen(address: &SocketAddr, alone: bool, options: &SocketOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    // after a failed migration the port must not stay blocked for the minute of TIME_WAIT
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() && !alone {
        // IPv4 addresses have sockets of their own
        socket.set_only_v6(true)?;
    }
    // connections inherit these options, and some have an effect from the first packet on
    options.apply_tcp(SockRef::from(&socket), None);
    socket.bind(&(*address).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

impl Listener for TcpListener {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let deadline = Instant::now().checked_add(timeout);
        let mut left = timeout;
        while let Some((socket, peer)) = self.next(left)? {
            match self.channel(socket, &peer) {
                Ok(channel) => return Ok(Some(Box::new(channel))),
                // the connection has failed already, so wait for the next one
                Err(_) => {
                    left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
                }
            }
        }
        Ok(None)
    }

    fn address(&self) -> String {
        Address::Tcp { host: self.host.clone(), port: self.port }.to_string()
    }

    fn bound(&self) -> Vec<String> {
        self.addresses.iter().map(|&address| Address::from(address).to_string()).collect()
    }

    fn trouble(&mut self) -> Option<io::Error> {
        self.shortage.take()
    }

    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        let sockets = &self.sockets;
        let (socket, peer) = self.shortage.accept_to_refuse(sockets.len(), |index| sockets[index].accept())?;
        Some(Box::new(self.channel(socket, &peer).ok()?))
    }

    fn room(&self) -> Option<Arc<dyn Room>> {
        Some(Arc::new(Descriptors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(addresses: &[&str]) -> io::Result<Vec<SocketAddr>> {
        let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let sockets = bind_all(&addresses, &SocketOptions::default())?;
        Ok(sockets.iter().map(|socket| socket.local_addr().unwrap().as_socket().unwrap()).collect())
    }

    /// Makes a listener like one for a name with these addresses.
    fn listener(addresses: &[&str]) -> TcpListener {
        let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let options = SocketOptions::default();
        let sockets = bind_all(&addresses, &options).unwrap();
        let addresses: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap().as_socket().unwrap()).collect();
        TcpListener {
            sockets,
            port: addresses[0].port(),
            addresses,
            host: "name".into(),
            options,
            shortage: Shortage::new(),
        }
    }

    #[test]
    fn every_address_of_a_name_is_bound_to_one_port() {
        // no host has 192.0.2.1 (RFC 5737), so neither has this one
        let mut listener = listener(&["127.8.7.5:0", "192.0.2.1:0", "127.8.7.6:0", "[::1]:0"]);
        let port = listener.port();
        let ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        let mut expected = vec![format!("tcp:127.8.7.5:{port}"), format!("tcp:127.8.7.6:{port}")];
        expected.extend(ipv6.then(|| format!("tcp:[::1]:{port}")));
        assert_eq!((listener.bound(), listener.address()), (expected, format!("tcp:name:{port}")));
        // connections at any of the addresses are accepted, whatever waits at the others
        for address in listener.addresses().to_vec() {
            let _near = std::net::TcpStream::connect(address).unwrap();
            let far = listener.accept(Duration::from_secs(20)).unwrap().expect("a connection waits");
            assert!(far.peer().starts_with("tcp:"), "{}", far.peer());
        }
        let _both: Vec<_> = listener.addresses().iter().map(|at| std::net::TcpStream::connect(at).unwrap()).collect();
        for _ in 0..listener.addresses().len() {
            assert!(listener.accept(Duration::from_secs(20)).unwrap().is_some());
        }
        assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn a_port_that_is_taken_at_one_address_is_an_error_or_another_one_is_chosen() {
        let taken = std::net::TcpListener::bind("127.8.7.6:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = bind(&[&format!("127.8.7.5:{port}"), &format!("127.8.7.6:{port}")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(&format!("127.8.7.6:{port}")), "{error}");
        // the first address is free again
        bind(&[&format!("127.8.7.5:{port}")]).unwrap();
        // with port 0, a port that is free at both is found
        let bound = bind(&["127.8.7.5:0", "127.8.7.6:0"]).unwrap();
        assert!(bound.len() == 2 && bound[0].port() == bound[1].port(), "{bound:?}");
        let elsewhere = bind(&["192.0.2.1:0"]).unwrap_err();
        assert_eq!(elsewhere.kind(), io::ErrorKind::AddrNotAvailable);
        assert_eq!(bind(&[]).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn each_address_gets_an_equal_share_of_the_time() {
        let second = Duration::from_secs(1);
        assert_eq!([0, 1, 2].map(|tried| share(6 * second, 3, tried)), [2 * second, 3 * second, 6 * second]);
        assert_eq!(share(second, 1, 0), second);
    }

    #[test]
    fn a_shortage_is_told_once() {
        let mut listener = listener(&["127.0.0.1:0"]);
        let _near = std::net::TcpStream::connect(listener.addresses()[0]).unwrap();
        let none = |_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE));
        let waiting: Vec<_> = listener.sockets.iter().map(AsFd::as_fd).collect();
        assert!(listener.shortage.accept_within(&waiting, Duration::MAX, none).unwrap().is_none());
        assert_eq!(listener.trouble().unwrap().raw_os_error(), Some(libc::EMFILE));
        assert!(listener.trouble().is_none());
    }

    /// An address of IPv6 for all interfaces also takes connections of IPv4, if it is the only one.
    #[test]
    fn one_address_of_all_interfaces_is_enough() {
        if std::net::TcpListener::bind("[::1]:0").is_err() {
            return eprintln!("skipped: this host has no IPv6");
        }
        let mut listener = listener(&["[::]:0"]);
        let _near = std::net::TcpStream::connect(("127.0.0.1", listener.port())).unwrap();
        assert!(listener.accept(Duration::from_secs(20)).unwrap().is_some());
    }
}
