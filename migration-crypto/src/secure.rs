//! Connectors and listeners whose channels are authenticated and encrypted.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Connector, Halves, Listener, ReadHalf, Room, WriteHalf},
    text::describe,
    wire::LaneKind,
};

use crate::{
    Suite,
    aead::{self, Backend},
    channel::{SecureCloser, SecureReader, SecureWriter},
    handshake::{
        Agreed, HandshakeError, Wire,
        noise::{self, NoiseKeys},
        preface::{Preface, Proof},
    },
    keys::{Psk, PublicKey, StaticKey},
    record::{KeyLimits, OVERHEAD, RecordOpener, RecordSealer},
    session::{Session, Sessions, SourceState},
};

/// The way in which a side proves who it is, and what it demands of the other side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Credentials {
    /// A key that both sides have.
    Psk(Psk),
    /// A key pair for each side. Each side knows the public key of the other.
    Static {
        /// The key of this side.
        own: StaticKey,
        /// The public key of the only accepted peer.
        peer: PublicKey,
    },
    /// Certificates of a common authority, with TLS 1.3.
    #[cfg(feature = "tls")]
    Tls(crate::TlsIdentity),
}

impl Credentials {
    fn proof(&self) -> Proof {
        match self {
            Self::Psk(_) => Proof::Psk,
            Self::Static { .. } => Proof::StaticKeys,
            #[cfg(feature = "tls")]
            Self::Tls(_) => Proof::Tls,
        }
    }
}

/// The settings for secure channels, the same for a source and for a destination.
#[derive(Clone)]
pub struct Security {
    /// The credentials of this side.
    pub credentials: Credentials,
    /// The accepted cipher suites, the preferred one first. The destination's order decides.
    pub suites: Vec<Suite>,
    /// The implementation of the ciphers.
    pub backend: &'static dyn Backend,
    /// The largest plaintext of a record in bytes. Values below 64 KiB or above 1 MiB are replaced
    /// by these.
    pub record_bytes: usize,
    /// The limits after which keys are replaced.
    pub limits: KeyLimits,
    /// The time limit of a whole handshake.
    pub handshake_timeout: Duration,
}

impl Security {
    /// Returns settings with these credentials and defaults for the rest: all cipher suites, the
    /// fastest back-end, records of 256 KiB, and 10 seconds for a handshake.
    pub fn new(credentials: Credentials) -> Self {
        Self {
            credentials,
            suites: Suite::ALL.to_vec(),
            backend: aead::best(),
            record_bytes: 256 << 10,
            limits: KeyLimits::default(),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// A session of a source, which all its channels to one destination share. Clones are the same
/// session.
///
/// Each control channel begins a new session. Every further channel proves that it belongs to the
/// session. It may come from another [`SecureConnector`], which a source uses to reconnect at
/// another address after a link was lost.
#[derive(Clone)]
pub struct SourceSession {
    security: Arc<Security>,
    state: Arc<Mutex<Option<SourceState>>>,
}

impl SourceSession {
    /// Makes a session. Its first channel begins it.
    pub fn new(security: Security) -> Self {
        Self { security: Arc::new(security), state: Arc::default() }
    }

    /// Returns a connector that opens channels of this session over those of `inner`.
    pub fn connector(&self, inner: Box<dyn Connector>) -> SecureConnector {
        SecureConnector { inner, session: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<SourceState>> {
        // no code that can panic runs under this lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn initiate(&self, wire: &mut Wire<'_>, kind: LaneKind) -> Result<Agreed, HandshakeError> {
        let security = &*self.security;
        let mut preface = Preface { proof: Proof::Session, kind, counter: 0, session: [0; 16], message: 0 };
        if kind != LaneKind::Control {
            let session = {
                let mut state = self.lock();
                let state = state.as_mut().ok_or(HandshakeError::NoSession)?;
                state.opened = state.opened.checked_add(1).ok_or(HandshakeError::NoSession)?;
                preface.counter = state.opened;
                state.session.clone()
            };
            preface.session = session.id;
            return noise::initiate(wire, preface, &NoiseKeys::Psk(&session.resumption), &[session.suite]);
        }
        preface.proof = security.credentials.proof();
        let agreed = match &security.credentials {
            Credentials::Psk(key) => noise::initiate(wire, preface, &NoiseKeys::Psk(&key.0), &security.suites)?,
            Credentials::Static { own, peer } => {
                noise::initiate(wire, preface, &NoiseKeys::Static { own, peer }, &security.suites)?
            }
            #[cfg(feature = "tls")]
            Credentials::Tls(identity) => crate::handshake::tls::initiate(wire, &preface, identity, &security.suites)?,
        };
        *self.lock() = Some(SourceState { session: Session::new(&agreed), opened: 0 });
        Ok(agreed)
    }
}

/// A [`Connector`] whose channels are authenticated and encrypted.
///
/// The first channel, for control, begins a session; further channels belong to it. A bandwidth
/// limiter should be the inner connector, so that it counts the bytes on the wire.
pub struct SecureConnector {
    inner: Box<dyn Connector>,
    session: SourceSession,
}

impl SecureConnector {
    /// Makes a connector for the channels of `inner`, with a session of its own.
    pub fn new(inner: Box<dyn Connector>, security: Security) -> Self {
        SourceSession::new(security).connector(inner)
    }
}

impl Connector for SecureConnector {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.connect_as(LaneKind::Control)
    }

    /// # Errors
    /// Fails with an error of the inner connector, or with a [`HandshakeError`] that says why one
    /// side refuses the other.
    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.secure(self.inner.connect_as(kind)?, kind, self.session.security.handshake_timeout)
    }

    /// # Errors
    /// Fails like [`connect_as`](Self::connect_as).
    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let deadline = Instant::now() + timeout;
        let channel = self.inner.connect_within(kind, timeout)?;
        let left = deadline.saturating_duration_since(Instant::now());
        self.secure(channel, kind, left.min(self.session.security.handshake_timeout))
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

impl SecureConnector {
    fn secure(&self, channel: Box<dyn Channel>, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let peer = channel.peer();
        let security = &self.session.security;
        let Halves { mut reader, mut writer, closer } = channel.split()?;
        let deadline = Instant::now() + timeout;
        let mut wire = Wire { reader: &mut *reader, writer: &mut *writer, deadline };
        let agreed = self.session.initiate(&mut wire, kind)?;
        let closed = Arc::new(AtomicBool::new(false));
        let ciphers = LaneCiphers::new(security, &agreed, [TO_DESTINATION, TO_SOURCE])?;
        let (mut reader, mut writer) = ciphers.halves(reader, writer, &closed, security);
        writer.send_empty(false)?;
        reader.set_idle_timeout(None)?;
        writer.set_idle_timeout(None)?;
        let closer = Box::new(SecureCloser { inner: closer, closed });
        let halves = Halves { reader: Box::new(reader), writer: Box::new(writer), closer };
        Ok(Box::new(SecureChannel { halves, peer }))
    }
}

/// A channel after its handshake.
struct SecureChannel {
    halves: Halves,
    peer: String,
}

impl Channel for SecureChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        Ok(self.halves)
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}

/// The labels with which the secrets of a lane's two directions are derived.
const TO_DESTINATION: &[u8] = b"to destination";
const TO_SOURCE: &[u8] = b"to source";

/// The ciphers of one side of a lane, one for each direction.
struct LaneCiphers {
    sealer: RecordSealer,
    opener: RecordOpener,
}

impl LaneCiphers {
    fn new(security: &Security, agreed: &Agreed, [out, back]: [&[u8]; 2]) -> io::Result<Self> {
        // derived again, so that the keys of the first lane's records differ from those that the
        // session keeps
        let lane = agreed.secret.derive(&[b"lane"]);
        let secret = |direction| lane.derive(&[direction]);
        Ok(Self {
            sealer: RecordSealer::new(agreed.suite, security.backend, secret(out), security.limits)?,
            opener: RecordOpener::new(agreed.suite, security.backend, secret(back))?,
        })
    }

    fn halves(
        self,
        reader: Box<dyn ReadHalf>,
        writer: Box<dyn WriteHalf>,
        closed: &Arc<AtomicBool>,
        security: &Security,
    ) -> (SecureReader, SecureWriter) {
        let writer = SecureWriter::new(writer, self.sealer, security.record_bytes, Arc::clone(closed));
        (SecureReader::new(reader, self.opener), writer)
    }
}

/// A [`Listener`] whose channels are authenticated and encrypted.
///
/// To accept a channel takes no longer than with the inner listener. The handshake runs on the
/// thread that first reads from the channel or writes to it, within the idle time-out that is set
/// there. A failed handshake is an error of that read or write.
pub struct SecureListener {
    inner: Box<dyn Listener>,
    acceptor: Arc<Acceptor>,
}

impl SecureListener {
    /// Makes a listener for the channels that `inner` accepts.
    pub fn new(inner: Box<dyn Listener>, security: Security) -> Self {
        Self { inner, acceptor: Arc::new(Acceptor { security, sessions: Sessions::default() }) }
    }
}

impl Listener for SecureListener {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let Some(channel) = self.inner.accept(timeout)? else { return Ok(None) };
        Ok(Some(Box::new(AcceptedChannel { channel, acceptor: Arc::clone(&self.acceptor) })))
    }

    fn address(&self) -> String {
        self.inner.address()
    }

    fn bound(&self) -> Vec<String> {
        self.inner.bound()
    }

    fn trouble(&mut self) -> Option<io::Error> {
        self.inner.trouble()
    }

    // A refusal could only be sent after a handshake, for which there is no time here. So the
    // channel is accepted and dropped.
    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        drop(self.inner.accept_to_refuse());
        None
    }

    fn room(&self) -> Option<Arc<dyn Room>> {
        self.inner.room()
    }
}

struct Acceptor {
    security: Security,
    sessions: Sessions,
}

impl Acceptor {
    fn respond(&self, wire: &mut Wire<'_>) -> Result<(Agreed, Option<Session>), HandshakeError> {
        let mut bytes = [0; Preface::LEN];
        wire.read(&mut bytes)?;
        let preface = Preface::decode(&bytes)?;
        let Security { credentials, suites, .. } = &self.security;
        if preface.proof == Proof::Session {
            let session = self.sessions.find(&preface.session)?;
            let accept = || self.sessions.accept(&session.id, preface.counter);
            let keys = NoiseKeys::Psk(&session.resumption);
            let agreed = noise::respond(wire, &preface, &keys, &[session.suite], accept)?;
            return Ok((agreed, None));
        }
        if preface.proof != credentials.proof() {
            let (theirs, ours) = (preface.proof.name(), credentials.proof().name());
            return Err(HandshakeError::Credentials { theirs, ours });
        }
        let agreed = match credentials {
            Credentials::Psk(key) => noise::respond(wire, &preface, &NoiseKeys::Psk(&key.0), suites, || Ok(()))?,
            Credentials::Static { own, peer } => {
                noise::respond(wire, &preface, &NoiseKeys::Static { own, peer }, suites, || Ok(()))?
            }
            #[cfg(feature = "tls")]
            Credentials::Tls(identity) => crate::handshake::tls::respond(wire, &preface, identity, suites)?,
        };
        let session = Session::new(&agreed);
        Ok((agreed, Some(session)))
    }

    /// Runs the handshake up to the source's empty record, which proves that the source is present.
    fn open(
        &self,
        mut reader: Box<dyn ReadHalf>,
        mut writer: Box<dyn WriteHalf>,
        timeout: Duration,
        closed: &Arc<AtomicBool>,
    ) -> io::Result<(SecureReader, SecureWriter)> {
        let deadline = Instant::now() + timeout;
        let mut wire = Wire { reader: &mut *reader, writer: &mut *writer, deadline };
        let (agreed, session) = self.respond(&mut wire).inspect_err(|error| wire.refuse(error))?;
        let mut ciphers = LaneCiphers::new(&self.security, &agreed, [TO_SOURCE, TO_DESTINATION])?;
        // The record has a fixed length and must arrive by the deadline, so that a peer that
        // replays a message gets neither memory nor time.
        let mut proof = [0; OVERHEAD];
        wire.read(&mut proof)?;
        let (header, sealed) = proof.split_first_chunk_mut().ok_or(HandshakeError::Malformed("proof"))?;
        if ciphers.opener.sealed_len(header)? != sealed.len() {
            return Err(HandshakeError::Malformed("the first record is not empty").into());
        }
        ciphers.opener.open(header, sealed)?;
        let (reader, writer) = ciphers.halves(reader, writer, closed, &self.security);
        if let Some(session) = session {
            self.sessions.insert(session);
        }
        Ok((reader, writer))
    }
}

/// An accepted channel before its handshake.
struct AcceptedChannel {
    channel: Box<dyn Channel>,
    acceptor: Arc<Acceptor>,
}

impl Channel for AcceptedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.channel.split()?;
        let closed = Arc::new(AtomicBool::new(false));
        let pending = Pending { reader, writer, acceptor: self.acceptor, closed: Arc::clone(&closed) };
        let opening = Arc::new(Mutex::new(Opening::Pending(Box::new(pending))));
        let reader = LazyReader { opening: Arc::clone(&opening), opened: None, idle: None };
        let writer = LazyWriter { opening, opened: None, idle: None, deadline: None, short: false };
        let closer = Box::new(SecureCloser { inner: closer, closed });
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer })
    }

    fn peer(&self) -> String {
        self.channel.peer()
    }
}

/// The state that the two halves of an accepted channel share until each has its opened half.
enum Opening {
    Pending(Box<Pending>),
    Done(Option<Box<SecureReader>>, Option<Box<SecureWriter>>),
    Failed(io::ErrorKind, String),
}

struct Pending {
    reader: Box<dyn ReadHalf>,
    writer: Box<dyn WriteHalf>,
    acceptor: Arc<Acceptor>,
    closed: Arc<AtomicBool>,
}

/// Runs the handshake unless the other half did so already, and takes a half with `take`.
fn opened<T>(
    opening: &Mutex<Opening>,
    timeout: Option<Duration>,
    take: impl FnOnce(&mut Option<Box<SecureReader>>, &mut Option<Box<SecureWriter>>) -> Option<T>,
) -> io::Result<T> {
    let mut opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
    if let Opening::Pending(_) = &*opening {
        let interrupted = Opening::Failed(io::ErrorKind::Other, "the handshake was interrupted".into());
        if let Opening::Pending(pending) = std::mem::replace(&mut *opening, interrupted) {
            let Pending { reader, writer, acceptor, closed } = *pending;
            let max = acceptor.security.handshake_timeout;
            let timeout = timeout.map_or(max, |timeout| timeout.min(max));
            match acceptor.open(reader, writer, timeout, &closed) {
                Ok((reader, writer)) => *opening = Opening::Done(Some(Box::new(reader)), Some(Box::new(writer))),
                Err(error) => {
                    *opening = Opening::Failed(error.kind(), describe(&error));
                    return Err(error);
                }
            }
        }
    }
    let taken = match &mut *opening {
        Opening::Done(reader, writer) => take(reader, writer),
        Opening::Failed(kind, why) => return Err(io::Error::new(*kind, why.clone())),
        Opening::Pending(_) => None,
    };
    taken.ok_or_else(|| io::Error::other("this half of the channel is in use"))
}

struct LazyReader {
    opening: Arc<Mutex<Opening>>,
    opened: Option<Box<SecureReader>>,
    idle: Option<Duration>,
}

impl LazyReader {
    fn ready(&mut self) -> io::Result<&mut SecureReader> {
        if self.opened.is_none() {
            let mut reader = opened(&self.opening, self.idle, |reader, _| reader.take())?;
            reader.set_idle_timeout(self.idle)?;
            self.opened = Some(reader);
        }
        self.opened.as_deref_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl ReadHalf for LazyReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.ready()?.read_exact(buf)
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.ready()?.read_ram(slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        self.opened.as_mut().map_or(Ok(()), |reader| reader.set_idle_timeout(timeout))
    }
}

struct LazyWriter {
    opening: Arc<Mutex<Opening>>,
    opened: Option<Box<SecureWriter>>,
    idle: Option<Duration>,
    deadline: Option<Instant>,
    short: bool,
}

impl LazyWriter {
    fn ready(&mut self) -> io::Result<&mut SecureWriter> {
        if self.opened.is_none() {
            let mut writer = opened(&self.opening, self.idle, |_, writer| writer.take())?;
            writer.set_idle_timeout(self.idle)?;
            writer.set_deadline(self.deadline);
            if self.short {
                writer.keep_queue_short();
            }
            self.opened = Some(writer);
        }
        self.opened.as_deref_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl WriteHalf for LazyWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.ready()?.write_all(head, slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        self.opened.as_mut().map_or(Ok(()), |writer| writer.set_idle_timeout(timeout))
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
        if let Some(writer) = &mut self.opened {
            writer.set_deadline(deadline);
        }
    }

    /// Returns zero before the handshake, because nothing was sent then.
    fn ahead_of_limit(&self) -> Duration {
        self.opened.as_ref().map_or(Duration::ZERO, |writer| writer.ahead_of_limit())
    }

    fn keep_queue_short(&mut self) {
        self.short = true;
        if let Some(writer) = &mut self.opened {
            writer.keep_queue_short();
        }
    }
}
