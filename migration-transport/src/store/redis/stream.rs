//! A connected socket, TCP or Unix, with or without TLS, on which nobody waits for ever.

use std::{
    fs,
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::ToSocketAddrs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::TLS13,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{Address, store::url::TlsFiles};

/// Most parts that one call of the system writes.
const MAX_SLICES: usize = 1000;
/// The largest file with certificates or a key.
const MAX_PEM_BYTES: u64 = 4 << 20;
/// Where systems keep the certificates of the authorities that they trust.
const SYSTEM_CA: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// How long a read or write may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// The longest time without a byte.
    silence: Duration,
    /// When it ends at the latest.
    until: Option<Instant>,
}

impl Wait {
    pub(super) fn silence(silence: Duration) -> Self {
        Self { silence, until: None }
    }

    pub(super) fn until(self, until: Instant) -> Self {
        Self { until: Some(until), ..self }
    }

    /// Returns the time left if a wait begins now. It is never zero.
    pub(super) fn left(self) -> Duration {
        let left = self.until.map_or(self.silence, |at| at.saturating_duration_since(Instant::now()));
        left.min(self.silence).max(Duration::from_millis(1))
    }

    /// Returns whether the time until which it ends has passed.
    pub(super) fn is_over(self) -> bool {
        self.until.is_some_and(|at| at <= Instant::now())
    }
}

/// A connected socket. After an error it is of no use.
pub(super) struct Stream {
    socket: Socket,
    tls: Option<Box<ClientConnection>>,
}

impl Stream {
    /// Connects within `wait`.
    pub(super) fn connect(address: &Address, tls: Option<&Arc<ClientConfig>>, wait: Wait) -> io::Result<Self> {
        match address {
            Address::Unix(path) => connect_unix(path, wait).map(|socket| Self { socket, tls: None }),
            Address::Tcp { host, port } => {
                let socket = connect_tcp(host, *port, wait)?;
                let mut stream = Self { socket, tls: None };
                if let Some(config) = tls {
                    let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                    let session = ClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
                    stream.tls = Some(Box::new(session));
                    stream.shake_hands(wait)?;
                }
                Ok(stream)
            }
        }
    }

    /// Receives some bytes, 0 at the end of the stream.
    pub(super) fn read(&mut self, buffer: &mut [u8], wait: Wait) -> io::Result<usize> {
        let Self { socket, tls } = self;
        let Some(session) = tls else {
            return retry(socket, PollFlags::IN, wait, || (&*socket).read(buffer));
        };
        loop {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            if retry(socket, PollFlags::IN, wait, || session.read_tls(&mut NoSignal(socket)))? == 0 {
                return Ok(0);
            }
            session.process_new_packets().map_err(tls_failed)?;
            // an answer to a change of keys
            flush(session, socket, wait)?;
        }
    }

    /// Sends all of it.
    pub(super) fn write_all(&mut self, bytes: &[u8], wait: Wait) -> io::Result<()> {
        self.write_slices(&mut [IoSlice::new(bytes)], wait)
    }

    /// Sends all slices.
    pub(super) fn write_slices(&mut self, mut slices: &mut [IoSlice<'_>], wait: Wait) -> io::Result<()> {
        let Self { socket, tls } = self;
        if let Some(session) = tls {
            for mut slice in slices.iter().map(|slice| &slice[..]) {
                while !slice.is_empty() {
                    let taken = session.writer().write(slice)?;
                    slice = &slice[taken..];
                    flush(session, socket, wait)?;
                }
            }
            return Ok(());
        }
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let most = slices.len().min(MAX_SLICES);
            let sent = retry(socket, PollFlags::OUT, wait, || {
                socket.send_vectored_with_flags(&slices[..most], libc::MSG_NOSIGNAL)
            })?;
            IoSlice::advance_slices(&mut slices, sent);
        }
        Ok(())
    }

    fn shake_hands(&mut self, wait: Wait) -> io::Result<()> {
        let Self { socket, tls } = self;
        let Some(session) = tls else { return Ok(()) };
        while session.is_handshaking() {
            flush(session, socket, wait)?;
            if session.is_handshaking() && session.wants_read() {
                if retry(socket, PollFlags::IN, wait, || session.read_tls(&mut NoSignal(socket)))? == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                if let Err(error) = session.process_new_packets() {
                    // the alert says to the server what is wrong
                    let _ = flush(session, socket, wait);
                    return Err(tls_failed(error));
                }
            }
        }
        flush(session, socket, wait)
    }
}

/// Writes what a session has for the server.
fn flush(session: &mut ClientConnection, socket: &Socket, wait: Wait) -> io::Result<()> {
    while session.wants_write() {
        retry(socket, PollFlags::OUT, wait, || session.write_tls(&mut NoSignal(socket)))?;
    }
    Ok(())
}

/// What TLS refuses does not change by itself.
fn tls_failed(error: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, error)
}

/// Does it as often as the system wants, and waits until the socket is ready.
fn retry<T>(socket: &Socket, ready: PollFlags, wait: Wait, mut what: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match what() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => await_ready(socket, ready, wait)?,
            done => return done,
        }
    }
}

fn await_ready(socket: &Socket, ready: PollFlags, wait: Wait) -> io::Result<()> {
    if wait.is_over() {
        return Err(ErrorKind::TimedOut.into());
    }
    let left = wait.left();
    let timeout =
        Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::new(socket, ready)], Some(&timeout)) {
        Ok(0) => Err(ErrorKind::TimedOut.into()),
        // a socket with an error is ready, too: the next call returns the error
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A socket whose writes raise no SIGPIPE.
struct NoSignal<'a>(&'a Socket);

impl Read for NoSignal<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut socket = self.0;
        socket.read(buffer)
    }
}

impl Write for NoSignal<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send_with_flags(bytes, libc::MSG_NOSIGNAL)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send_vectored_with_flags(&slices[..slices.len().min(MAX_SLICES)], libc::MSG_NOSIGNAL)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn connect_unix(path: &Path, wait: Wait) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // it bounds how long the server's queue may be full
    socket.set_write_timeout(Some(wait.left()))?;
    socket.connect(&SockAddr::unix(path)?).map_err(|error| match error.kind() {
        // a server makes its socket when it starts
        ErrorKind::NotFound => io::Error::new(ErrorKind::ConnectionRefused, error),
        _ => error,
    })?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Tries the addresses of the host in turn. Each gets an equal share of the time that is left.
fn connect_tcp(host: &str, port: u16, wait: Wait) -> io::Result<Socket> {
    let deadline = Instant::now() + wait.left();
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    let mut failure = io::Error::new(ErrorKind::NotFound, "the host has no address");
    for (at, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = (left / (addresses.len() - at) as u32).max(Duration::from_millis(1));
        let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
        match socket.connect_timeout(&(*address).into(), share) {
            Err(error) => failure = error,
            Ok(()) if socket.local_addr()?.as_socket() == Some(*address) => {
                // TCP has connected the socket to itself: nobody listens there
                failure = ErrorKind::ConnectionRefused.into();
            }
            Ok(()) => {
                socket.set_tcp_nodelay(true)?;
                socket.set_keepalive(true)?;
                socket.set_nonblocking(true)?;
                return Ok(socket);
            }
        }
    }
    Err(failure)
}

/// Reads the files of a client of TLS 1.3.
///
/// # Errors
/// Fails if a file cannot be read, or is not what it should be.
pub(super) fn tls_config(files: &TlsFiles) -> io::Result<Arc<ClientConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    let ca = files.ca.clone().map_or_else(system_ca, Ok)?;
    let own_list = files.ca.is_some();
    for certificate in certificates(&ca)? {
        match roots.add(certificate) {
            // systems trust authorities of which we can make no use
            Err(error) if own_list => return Err(wrong(&ca, error)),
            _ => {}
        }
    }
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .with_root_certificates(roots);
    let Some(identity) = &files.identity else { return Ok(Arc::new(builder.with_no_client_auth())) };
    let chain = certificates(&identity.certificate)?;
    let key = read_key(&identity.key, &provider)?;
    let config = builder.with_client_auth_cert(chain, key).map_err(|error| wrong(&identity.certificate, error))?;
    Ok(Arc::new(config))
}

fn system_ca() -> io::Result<PathBuf> {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let found = named.or_else(|| SYSTEM_CA.iter().map(PathBuf::from).find(|path| path.is_file()));
    let why = "this system has no list of authorities that it trusts: name one with `?ca=FILE`";
    found.ok_or_else(|| io::Error::new(ErrorKind::NotFound, why))
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let pem = read_pem(path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match list {
        Ok(list) if list.is_empty() => Err(wrong(path, "it holds no certificate")),
        Ok(list) => Ok(list),
        Err(error) => Err(wrong(path, error)),
    }
}

fn read_key(path: &Path, provider: &CryptoProvider) -> io::Result<PrivateKeyDer<'static>> {
    let key = PrivateKeyDer::from_pem_slice(&read_pem(path)?).map_err(|error| wrong(path, error))?;
    // a key of a kind that is not supported is found here, with its file
    provider.key_provider.load_private_key(key.clone_key()).map_err(|error| wrong(path, error))?;
    Ok(key)
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_PEM_BYTES).read_to_end(&mut bytes));
    read.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(bytes)
}

fn wrong(path: &Path, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
}

/// Returns a stream and its other end.
#[cfg(test)]
pub(super) fn pair() -> (Stream, Socket) {
    let (near, far) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    near.set_nonblocking(true).unwrap();
    (Stream { socket: near, tls: None }, far)
}
