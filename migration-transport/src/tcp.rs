//! TCP connections.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use migration_core::channel::{Channel, Connector, Listener};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{Address, ConnectOptions, SocketOptions, StreamChannel, accept::accept_within};

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
        let addresses: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        let deadline = Instant::now().checked_add(self.options.connect_timeout);
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

    fn address(&self) -> String {
        Address::Tcp { host: self.host.clone(), port: self.port }.to_string()
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

/// Accepts TCP connections.
#[derive(Debug)]
pub struct TcpListener {
    socket: Socket,
    host: String,
    port: u16,
    options: SocketOptions,
}

impl TcpListener {
    /// Listens on `port` of the first address of `host` that can be bound: an IP address or name of this host, or
    /// `0.0.0.0` or `::` for all of its interfaces. Port 0 picks a free one, which
    /// [`address`](Listener::address) then tells. `options` apply to each connection.
    ///
    /// # Errors
    /// When no address can be bound, for example `AddrInUse`.
    pub fn bind(host: &str, port: u16, options: SocketOptions) -> io::Result<Self> {
        let mut error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen at tcp:{host}:{port}: {e}"));
        for address in (host, port).to_socket_addrs().map_err(named)? {
            match listen(&address, &options) {
                Ok(socket) => {
                    let bound = socket.local_addr()?.as_socket().map_or(port, |address| address.port());
                    return Ok(Self { socket, host: host.to_owned(), port: bound, options });
                }
                Err(e) => error = e,
            }
        }
        let address = Address::Tcp { host: host.to_owned(), port };
        Err(io::Error::new(error.kind(), format!("cannot listen at {address}: {error}")))
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
}

fn listen(address: &SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
    // a migration that failed must not keep the port from the next one for the minute of TIME_WAIT
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
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
        while let Some((socket, peer)) = accept_within(self.socket.as_fd(), left, || self.socket.accept())? {
            let peer = peer.as_socket();
            self.options.apply_tcp(SockRef::from(&socket), peer.map(|peer| peer.ip()));
            let name = peer.map_or_else(|| "tcp:?".into(), |peer| Address::from(peer).to_string());
            match channel(socket, name, &self.options) {
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
}
