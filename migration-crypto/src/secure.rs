//! Connectors and listeners whose channels are secure.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Connector, Halves, Listener, ReadHalf, Room, WriteHalf},
    wire::LaneKind,
};

use crate::{
    Suite,
    aead::{self, Backend},
    channel::{SecureCloser, SecureReader, SecureWriter},
    handshake::{
        Agreed, HandshakeError, Wire,
        noise::{self, Proofs},
        preface::{Preface, Proof},
    },
    keys::{Psk, PublicKey, StaticKey},
    record::{KeyLimits, OVERHEAD, RecordOpener, RecordSealer},
    session::{Own, Session, Sessions},
};

/// How a side proves who it is, and what it demands of the other side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Credentials {
    /// Both have the same secret.
    Psk(Psk),
    /// Each has a private key, and knows the other's public key.
    Static {
        /// This side's key.
        own: StaticKey,
        /// The only peer that will do.
        peer: PublicKey,
    },
    /// Certificates of one authority, in TLS 1.3.
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

/// How channels are secured: the same choices for a source and for a destination.
#[derive(Clone)]
pub struct Security {
    /// Who may take part.
    pub credentials: Credentials,
    /// The ciphers that will do, the preferred one first. The destination's order counts.
    pub suites: Vec<Suite>,
    /// What encrypts and decrypts.
    pub backend: &'static dyn Backend,
    /// Most bytes of plaintext in a record, from 64 KiB to 1 MiB (what is outside is taken for the nearest).
    pub record_bytes: usize,
    /// When keys are replaced.
    pub limits: KeyLimits,
    /// How long a handshake may take, in all.
    pub handshake_timeout: Duration,
}

impl Security {
    /// With these credentials and defaults for all else: every cipher, the fastest back-end, records of 256 KiB, 10 s.
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

/// A session of a source: what all its channels to one destination have in common. Clones are the same session.
///
/// A control lane begins a new one; every further channel proves that it belongs to it, also over another
/// [`SecureConnector`] (by which a lost link is found again at another address).
#[derive(Clone)]
pub struct SourceSession {
    security: Arc<Security>,
    own: Arc<Mutex<Option<Own>>>,
}

impl SourceSession {
    /// Not begun yet: the first channel does that.
    pub fn new(security: Security) -> Self {
        Self { security: Arc::new(security), own: Arc::default() }
    }

    /// Channels of this session, over those of `inner`.
    pub fn connector(&self, inner: Box<dyn Connector>) -> SecureConnector {
        SecureConnector { inner, session: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Own>> {
        // no code that can panic runs under this lock
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn initiate(&self, wire: &mut Wire<'_>, kind: LaneKind) -> Result<Agreed, HandshakeError> {
        let security = &*self.security;
        let mut preface = Preface { proof: Proof::Session, kind, counter: 0, session: [0; 16], message: 0 };
        if kind != LaneKind::Control {
            let session = {
                let mut own = self.lock();
                let own = own.as_mut().ok_or(HandshakeError::NoSession)?;
                own.opened = own.opened.checked_add(1).ok_or(HandshakeError::NoSession)?;
                preface.counter = own.opened;
                own.session.clone()
            };
            preface.session = session.id;
            return noise::initiate(wire, preface, &Proofs::Psk(&session.resumption), &[session.suite]);
        }
        preface.proof = security.credentials.proof();
        let agreed = match &security.credentials {
            Credentials::Psk(key) => noise::initiate(wire, preface, &Proofs::Psk(&key.0), &security.suites)?,
            Credentials::Static { own, peer } => {
                noise::initiate(wire, preface, &Proofs::Static { own, peer }, &security.suites)?
            }
            #[cfg(feature = "tls")]
            Credentials::Tls(identity) => crate::handshake::tls::initiate(wire, &preface, identity, &security.suites)?,
        };
        *self.lock() = Some(Own { session: Session::new(&agreed), opened: 0 });
        Ok(agreed)
    }
}

/// A [`Connector`] whose channels are authenticated and encrypted.
///
/// The first channel, for control, begins a session; further ones belong to it. Put a bandwidth limit inside of it, so that
/// what is limited are bytes on the wire.
pub struct SecureConnector {
    inner: Box<dyn Connector>,
    session: SourceSession,
}

impl SecureConnector {
    /// Secures the channels of `inner`, in a session of their own.
    pub fn new(inner: Box<dyn Connector>, security: Security) -> Self {
        SourceSession::new(security).connector(inner)
    }
}

impl Connector for SecureConnector {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.connect_as(LaneKind::Control)
    }

    /// # Errors
    /// Beside those of the inner connector, a [`HandshakeError`] that says why one side refuses the other.
    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.secure(self.inner.connect_as(kind)?, kind, self.session.security.handshake_timeout)
    }

    /// # Errors
    /// As those of [`connect_as`](Self::connect_as).
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
    fn secure(&self, channel: Box<dyn Channel>, kind: LaneKind, patience: Duration) -> io::Result<Box<dyn Channel>> {
        let peer = channel.peer();
        let security = &self.session.security;
        let Halves { mut reader, mut writer, closer } = channel.split()?;
        let deadline = Instant::now() + patience;
        let mut wire = Wire { reader: &mut *reader, writer: &mut *writer, deadline };
        let agreed = self.session.initiate(&mut wire, kind)?;
        let closed = Arc::new(AtomicBool::new(false));
        let ends = Ends::new(security, &agreed, [TO_DESTINATION, TO_SOURCE])?;
        let (mut reader, mut writer) = ends.halves(reader, writer, &closed, security);
        writer.send_empty(false)?;
        reader.set_idle_timeout(None)?;
        writer.set_idle_timeout(None)?;
        let closer = Box::new(SecureCloser { inner: closer, closed });
        let halves = Halves { reader: Box::new(reader), writer: Box::new(writer), closer };
        Ok(Box::new(SecureChannel { halves, peer }))
    }
}

/// A channel that is ready.
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

/// What the secrets of a lane's two directions are derived for.
const TO_DESTINATION: &[u8] = b"to destination";
const TO_SOURCE: &[u8] = b"to source";

/// What a side of a lane seals and opens its two directions with.
struct Ends {
    sealer: RecordSealer,
    opener: RecordOpener,
}

impl Ends {
    fn new(security: &Security, agreed: &Agreed, [out, back]: [&[u8]; 2]) -> io::Result<Self> {
        // what a session keeps of its first lane's agreement is not what that lane's records are keyed by
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
/// Accepting is as quick as that of the inner listener: the handshake runs on the thread that first reads from or writes to the
/// channel, under the idle time-out that is set there, and what fails is an error of that call.
pub struct SecureListener {
    inner: Box<dyn Listener>,
    acceptor: Arc<Acceptor>,
}

impl SecureListener {
    /// Secures the channels that `inner` accepts.
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

    // whoever is refused so would have to be told after a handshake: it is not
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
            let proofs = Proofs::Psk(&session.resumption);
            let agreed = noise::respond(wire, &preface, &proofs, &[session.suite], accept)?;
            return Ok((agreed, None));
        }
        if preface.proof != credentials.proof() {
            let (theirs, ours) = (preface.proof.name(), credentials.proof().name());
            return Err(HandshakeError::Credentials { theirs, ours });
        }
        let agreed = match credentials {
            Credentials::Psk(key) => noise::respond(wire, &preface, &Proofs::Psk(&key.0), suites, || Ok(()))?,
            Credentials::Static { own, peer } => {
                noise::respond(wire, &preface, &Proofs::Static { own, peer }, suites, || Ok(()))?
            }
            #[cfg(feature = "tls")]
            Credentials::Tls(identity) => crate::handshake::tls::respond(wire, &preface, identity, suites)?,
        };
        let session = Session::new(&agreed);
        Ok((agreed, Some(session)))
    }

    /// The handshake, up to the source's proof that it is here.
    fn open(
        &self,
        mut reader: Box<dyn ReadHalf>,
        mut writer: Box<dyn WriteHalf>,
        patience: Duration,
        closed: &Arc<AtomicBool>,
    ) -> io::Result<(SecureReader, SecureWriter)> {
        let deadline = Instant::now() + patience;
        let mut wire = Wire { reader: &mut *reader, writer: &mut *writer, deadline };
        let (agreed, session) = self.respond(&mut wire).inspect_err(|error| wire.refuse(error))?;
        let mut ends = Ends::new(&self.security, &agreed, [TO_SOURCE, TO_DESTINATION])?;
        // one of a fixed length, by the deadline: who has only replayed a message gets no memory and no more time
        let mut proof = [0; OVERHEAD];
        wire.read(&mut proof)?;
        let (header, sealed) = proof.split_first_chunk_mut().ok_or(HandshakeError::Malformed("proof"))?;
        if ends.opener.following(header)? != sealed.len() {
            return Err(HandshakeError::Malformed("the first record is not empty").into());
        }
        ends.opener.open(header, sealed)?;
        let (reader, writer) = ends.halves(reader, writer, closed, &self.security);
        if let Some(session) = session {
            self.sessions.insert(session);
        }
        Ok((reader, writer))
    }
}

/// A channel whose handshake is due.
struct AcceptedChannel {
    channel: Box<dyn Channel>,
    acceptor: Arc<Acceptor>,
}

impl Channel for AcceptedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.channel.split()?;
        let closed = Arc::new(AtomicBool::new(false));
        let due = Due { reader, writer, acceptor: self.acceptor, closed: Arc::clone(&closed) };
        let opening = Arc::new(Mutex::new(Opening::Due(Box::new(due))));
        let reader = LateReader { opening: Arc::clone(&opening), opened: None, idle: None };
        let writer = LateWriter { opening, opened: None, idle: None, deadline: None, short: false };
        let closer = Box::new(SecureCloser { inner: closer, closed });
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer })
    }

    fn peer(&self) -> String {
        self.channel.peer()
    }
}

/// What the halves of an accepted channel share until each has its part.
enum Opening {
    Due(Box<Due>),
    Done(Option<Box<SecureReader>>, Option<Box<SecureWriter>>),
    Failed(io::ErrorKind, String),
}

struct Due {
    reader: Box<dyn ReadHalf>,
    writer: Box<dyn WriteHalf>,
    acceptor: Arc<Acceptor>,
    closed: Arc<AtomicBool>,
}

/// Runs the handshake if nobody has, and takes a half.
fn opened<T>(
    opening: &Mutex<Opening>,
    patience: Option<Duration>,
    take: impl FnOnce(&mut Option<Box<SecureReader>>, &mut Option<Box<SecureWriter>>) -> Option<T>,
) -> io::Result<T> {
    let mut opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
    if let Opening::Due(_) = &*opening {
        let again = Opening::Failed(io::ErrorKind::Other, "the handshake was interrupted".into());
        if let Opening::Due(due) = std::mem::replace(&mut *opening, again) {
            let Due { reader, writer, acceptor, closed } = *due;
            let most = acceptor.security.handshake_timeout;
            let patience = patience.map_or(most, |patience| patience.min(most));
            match acceptor.open(reader, writer, patience, &closed) {
                Ok((reader, writer)) => *opening = Opening::Done(Some(Box::new(reader)), Some(Box::new(writer))),
                Err(error) => {
                    *opening = Opening::Failed(error.kind(), error.to_string());
                    return Err(error);
                }
            }
        }
    }
    let taken = match &mut *opening {
        Opening::Done(reader, writer) => take(reader, writer),
        Opening::Failed(kind, why) => return Err(io::Error::new(*kind, why.clone())),
        Opening::Due(_) => None,
    };
    taken.ok_or_else(|| io::Error::other("this half of the channel is in use"))
}

struct LateReader {
    opening: Arc<Mutex<Opening>>,
    opened: Option<Box<SecureReader>>,
    idle: Option<Duration>,
}

impl LateReader {
    fn ready(&mut self) -> io::Result<&mut SecureReader> {
        if self.opened.is_none() {
            let mut reader = opened(&self.opening, self.idle, |reader, _| reader.take())?;
            reader.set_idle_timeout(self.idle)?;
            self.opened = Some(reader);
        }
        self.opened.as_deref_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl ReadHalf for LateReader {
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

struct LateWriter {
    opening: Arc<Mutex<Opening>>,
    opened: Option<Box<SecureWriter>>,
    idle: Option<Duration>,
    deadline: Option<Instant>,
    short: bool,
}

impl LateWriter {
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

impl WriteHalf for LateWriter {
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

    /// Before the handshake nothing was sent.
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
