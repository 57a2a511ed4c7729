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

/// How often a free port is looked for that is free at all addresses of a host.
const PORTS: usize = 64;
/// Connections that the kernel may finish before [`Listener::accept`] takes them.
const BACKLOG: i32 = 128;

/// Opens TCP connections to one host and port.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    host: String,
    port: u16,
    options: ConnectOptions,
}

impl TcpConnector {
    /// A connector to `host`, a name or an IP address (IPv6 without brackets). Nothing is resolved or opened yet.
    pub fn new(host: impl Into<String>, port: u16, options: ConnectOptions) -> Self {
        Self { host: host.into(), port, options }
    }
}

impl Connector for TcpConnector {
    /// Resolves the host anew and tries each of its addresses in order. Each gets an even share of the time that is
    /// left, so that one which swallows packets does not use up the time of the others.
    ///
    /// # Errors
    /// What the address said; of a host name, what each of its addresses said, under the kind of the last one. The host
    /// itself is not in the message: the caller has its [`address`](Connector::address).
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
            let share = left / (addresses.len() - i) as u32;
            match connect_one(address, share, &self.options.socket) {
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

fn connect_one(address: &SocketAddr, timeout: Duration, options: &SocketOptions) -> io::Result<StreamChannel> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    options.apply_tcp(SockRef::from(&socket), Some(address.ip()));
    // a zero time-out is refused as an argument, not as a time-out
    socket.connect_timeout(&(*address).into(), timeout.max(Duration::from_millis(1)))?;
    // Without a listener on a local port of the ephemeral range, TCP may pick that very port and connect the socket
    // to itself ("simultaneous open"). Such a connection echoes.
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

/// Accepts TCP connections, at every address of a host.
#[derive(Debug)]
pub struct TcpListener {
    /// At least one.
    sockets: Vec<Socket>,
    addresses: Vec<SocketAddr>,
    host: String,
    port: u16,
    options: SocketOptions,
    shortage: Shortage,
}

impl TcpListener {
    /// Listens on `port` of every address of `host`: an IP address or name of this host, or
    /// `0.0.0.0` or `::` for all of its interfaces. A name may stand for several addresses, of IPv4
    /// and IPv6; those that this host does not have are left out. Port 0 picks one that is free at
    /// all of them, which [`address`](Listener::address) then tells, and
    /// [`addresses`](Self::addresses) each address. `options` apply to each connection.
    ///
    /// # Errors
    /// When no address can be bound; `AddrInUse` also when the port is taken at one of several, at
    /// which a source might find a stranger instead.
    pub fn bind(host: &str, port: u16, options: SocketOptions) -> io::Result<Self> {
        let failed = |error: io::Error| {
            let address = Address::Tcp { host: host.to_owned(), port };
            io::Error::new(error.kind(), format!("cannot listen at {address}: {error}"))
        };
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in (host, port).to_socket_addrs().map_err(failed)? {
            // name services repeat them
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

    /// The port it listens on, which is the same at all addresses.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The addresses at which it listens.
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

/// Binds all of these that this host has. For port 0 all get the port that the first one gets;
/// another one is tried where that is taken at a later one.
fn bind_all(addresses: &[SocketAddr], options: &SocketOptions) -> io::Result<Vec<Socket>> {
    let alone = addresses.len() == 1;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for _ in 0..PORTS {
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
                    taken |= !is_elsewhere(&error);
                    last = if alone { error } else { io::Error::new(error.kind(), format!("{at}: {error}")) };
                    if taken {
                        break;
                    }
                }
            }
        }
        match (taken, sockets.is_empty()) {
            (false, false) => return Ok(sockets),
            // free at the first address, and taken at another one
            (true, false) if last.kind() == io::ErrorKind::AddrInUse && addresses[0].port() == 0 => {}
            _ => return Err(last),
        }
    }
    Err(last)
}

/// Whether an address is none of this host: a name's, or of a protocol that the host does not
/// speak.
fn is_elsewhere(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Listens at one address, which is the only one or one of several.
fn listen(address: &SocketAddr, alone: bool, options: &SocketOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    // a migration that failed must not keep the port from the next one for the minute of TIME_WAIT
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() && !alone {
        // those of IPv4 have a socket of their own
        socket.set_only_v6(true)?;
    }
    // connections inherit these, some of which count from their first packet on
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
                // it has failed already: the next one
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

    /// A listener as one for a name with these addresses.
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
        // 192.0.2.1 is nobody's (RFC 5737), so not of this host either
        let mut listener = listener(&["127.8.7.5:0", "192.0.2.1:0", "127.8.7.6:0", "[::1]:0"]);
        let port = listener.port();
        let ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        let mut expected = vec![format!("tcp:127.8.7.5:{port}"), format!("tcp:127.8.7.6:{port}")];
        expected.extend(ipv6.then(|| format!("tcp:[::1]:{port}")));
        assert_eq!((listener.bound(), listener.address()), (expected, format!("tcp:name:{port}")));
        // a peer comes by any of them, whatever waits at the others
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
        // of ports to choose from, one is free at both
        let bound = bind(&["127.8.7.5:0", "127.8.7.6:0"]).unwrap();
        assert!(bound.len() == 2 && bound[0].port() == bound[1].port(), "{bound:?}");
        let elsewhere = bind(&["192.0.2.1:0"]).unwrap_err();
        assert_eq!(elsewhere.kind(), io::ErrorKind::AddrNotAvailable);
        assert_eq!(bind(&[]).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
