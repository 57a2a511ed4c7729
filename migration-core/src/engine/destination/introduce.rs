//! The introduction of a new connection: the peer names the purpose of the connection, which then
//! becomes a lane.

use super::{attempt::refuse_reattach, fail_over::CheckpointHalves, *};
use crate::{vm::FailedAttempt, wire::MAGIC};

/// The number of bytes of a preamble by which a preamble is recognized.
///
/// A peer that speaks another protocol may wait for an answer before it has sent the length of a
/// preamble.
const START: usize = 4;

/// A connection that was just accepted.
pub(super) struct Incoming {
    /// The number of the connection. The receiver counts its connections.
    pub(super) id: u64,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) writer: Box<dyn WriteHalf>,
    pub(super) closer: Arc<dyn Closer>,
}

/// A connection whose preamble was read.
struct Named {
    id: u64,
    preamble: Preamble,
    reader: Box<dyn ReadHalf>,
    control: ControlWriter,
    closer: Arc<dyn Closer>,
}

/// What is known about the purpose of a connection so far.
#[derive(Default)]
struct Introduced {
    /// Whether the connection wants to begin a session, as far as that is known.
    wants_session: bool,
    /// The VM that the source wants to migrate.
    vm: Option<VmId>,
}

/// A control lane whose first frame was read.
pub(super) struct ControlLane {
    /// The number of its connection.
    pub(super) id: u64,
    pub(super) frames: ControlReader,
    pub(super) control: ControlWriter,
    pub(super) closer: Arc<dyn Closer>,
}

impl Common {
    pub(super) fn bad_peer(&self, peer: &str, why: &str) {
        self.options.observer.event(&Event::BadPeer { peer: peer.to_owned(), why: why.to_owned() });
    }

    /// Moves a connection to its next stage, because it has shown what it is.
    ///
    /// # Errors
    /// Returns an error if the connection was closed in between, for example because another one
    /// needed its place.
    pub(super) fn advance(&self, id: u64, stage: Stage, peer: &str) -> Result<(), MigrationError> {
        if lock(&self.connections).advance(id, stage) {
            return Ok(());
        }
        Err(MigrationError::link(peer)(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl Destination {
    /// Serves a connection until it ends.
    pub(super) fn serve(self: &Arc<Self>, connection: Incoming, peer: &str) {
        let id = connection.id;
        let mut introduced = Introduced::default();
        let served = self.name(connection, peer, &mut introduced).and_then(|named| match named.preamble.kind {
            LaneKind::Control | LaneKind::Reattach => self.control(named, peer, &mut introduced),
            LaneKind::Bulk | LaneKind::Demand | LaneKind::Checkpoint => self.lane(named, peer),
        });
        if let Err(error) = served {
            // if this side has closed the connection, an error that followed from that is not the
            // reason
            let closed = lock(&self.common.connections).why_closed(id);
            let why = closed.map_or_else(|| error.at_peer(peer), str::to_owned);
            self.common.bad_peer(peer, &why);
            if introduced.wants_session {
                self.common.host.attempt_failed(&FailedAttempt { peer: peer.to_owned(), vm: introduced.vm, why });
            }
        }
    }

    /// Reads the preamble of a new connection, and gives the thread the role of the lane.
    ///
    /// # Errors
    /// Returns an error if the peer speaks another protocol or version, or if the connection was
    /// closed in between.
    fn name(&self, connection: Incoming, peer: &str, introduced: &mut Introduced) -> Result<Named, MigrationError> {
        let link = || MigrationError::link(peer);
        let idle = self.common.options.idle_timeout;
        let Incoming { id, mut reader, mut writer, closer } = connection;
        reader.set_idle_timeout(Some(idle)).map_err(link())?;
        writer.set_idle_timeout(Some(idle)).map_err(link())?;
        let mut bytes = [0; Preamble::LEN];
        let (start, rest) = bytes.split_at_mut(START);
        reader.read_exact(start).map_err(link())?;
        // a connection that sends anything counts as an attempt, until its preamble says otherwise
        introduced.wants_session = true;
        if [MAGIC, SEALED_MAGIC].iter().any(|magic| magic.starts_with(start)) {
            reader.read_exact(rest).map_err(link())?;
        }
        let mut control = ControlWriter::new(writer, peer.to_owned(), self.common.bytes.clone());
        let preamble = Preamble::decode(&bytes).inspect_err(|error| {
            if bytes.starts_with(&SEALED_MAGIC) {
                refuse_sealed(&mut *reader, &mut control, error, idle);
            }
        })?;
        check_version(&preamble, &mut control)?;
        introduced.wants_session = preamble.kind == LaneKind::Control;
        let known = self.find(preamble.session).is_ok();
        let stage = match preamble.kind {
            // on a link that is not encrypted, anybody may have read the token: the token opens
            // only lanes that then occupy a place of the session
            LaneKind::Control => Stage::Greeting,
            LaneKind::Reattach if known => Stage::Returning,
            _ if known => Stage::Identified,
            _ => Stage::Greeting,
        };
        self.common.advance(id, stage, peer)?;
        // the thread was started with the role of a bulk lane, which most connections are
        match preamble.kind {
            LaneKind::Bulk => {}
            LaneKind::Demand => self.common.options.spawner.assume(Role::Demand, GuestImpact::Balanced),
            _ => self.common.options.spawner.assume(Role::Control, GuestImpact::Balanced),
        }
        Ok(Named { id, preamble, reader, control, closer })
    }

    /// Serves a lane that belongs to a session: a bulk lane, a demand lane or a checkpoint lane.
    fn lane(&self, named: Named, peer: &str) -> Result<(), MigrationError> {
        let Named { preamble, reader, control, closer, .. } = named;
        let Found { entry, session } = self.find(preamble.session)?;
        match preamble.kind {
            LaneKind::Demand => {
                let link = session.attach_demand(preamble.index, closer, control.into_half())?;
                if link == 0
                    && let Err(error) = entry.await_faults(&session, preamble.index)
                {
                    session.fail(error.code(), &describe(&error));
                    return Err(error);
                }
                entry.pages(session, &preamble, link, reader, peer)
            }
            LaneKind::Checkpoint => {
                let (protection, link) = session.attach_checkpoint(closer)?;
                let halves = CheckpointHalves { reader, writer: control.into_half() };
                entry.checkpoints(&session, &protection, link, halves, peer)
            }
            _ => {
                let link = session.attach(preamble.index, closer)?;
                entry.pages(session, &preamble, link, reader, peer)
            }
        }
    }

    /// Serves a control lane: of a new attempt, or of a source that comes back to its session.
    fn control(&self, named: Named, peer: &str, introduced: &mut Introduced) -> Result<(), MigrationError> {
        let Named { id, preamble, reader, mut control, closer } = named;
        let mut frames = ControlReader::new(reader, peer.to_owned(), self.common.bytes.clone());
        let first = frames.read().inspect_err(|error| {
            // the user of an honest peer of another build needs the reason
            if !matches!(error, MigrationError::Link { .. }) {
                // best effort: the lane ends either way
                let _ = control.send(0, &Control::error(error.code(), describe(error)));
            }
        });
        match (preamble.kind, first?) {
            (LaneKind::Control, (epoch, Control::Hello(hello))) => {
                let vm = hello.vm.id;
                introduced.vm = Some(vm);
                let served = self.attempt(epoch, hello, ControlLane { id, frames, control, closer }, peer);
                if let Err(MigrationError::Peer { code: ErrorCode::Busy, .. }) = &served {
                    // an attempt that a newer one of the same VM has replaced did not fail
                    introduced.wants_session = !self.has_newer(vm, epoch);
                }
                served
            }
            (LaneKind::Reattach, (epoch, Control::Reattach(vm))) => {
                let Ok(Found { entry, session }) = self.find(preamble.session) else {
                    return Err(refuse_reattach(&mut control, epoch, "this session is not known here"));
                };
                if lock(&entry.state).machine.may_reattach(vm, epoch) {
                    self.common.advance(id, Stage::Identified, peer)?;
                }
                entry.reattach(&session, vm, epoch, ControlLane { id, frames, control, closer }, peer)
            }
            (kind, (epoch, other)) => {
                let why = format!("{} on a new {kind:?} lane", other.name());
                control.send(epoch, &Control::error(ErrorCode::Protocol, why.clone()))?;
                Err(DecodeError::invalid("first frame", why).into())
            }
        }
    }
}

impl VmEntry {
    /// Serves a lane on which pages arrive, until it ends.
    pub(super) fn pages(
        &self,
        session: Arc<Session>,
        preamble: &Preamble,
        link: u32,
        reader: Box<dyn ReadHalf>,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let (kind, index) = (preamble.kind, preamble.index);
        let lane = LaneReceiver::new(kind, index, reader, peer.to_owned(), session.clone(), self.common.bytes.clone());
        let error = lane.run();
        if session.lane_lost(link, error.code(), &describe(&error)) {
            self.lost_while_loading(&session, &describe(&error));
            return Err(error);
        }
        if matches!(error, MigrationError::Link { .. }) && (session.is_sealed() || session.over().is_some()) {
            // the lane has done its part, or was closed because of another lane
            return Ok(());
        }
        if session.missing().is_some() && session.is_sealed() {
            // the VM may run here with all its pages: the session continues
            return Err(error);
        }
        session.fail(error.code(), &describe(&error));
        Err(error)
    }

    /// Locks the state, if `attachment` is still the control lane that speaks for the session.
    ///
    /// # Errors
    /// Returns an error if the attempt was given up here, or if a newer control lane has taken its
    /// place.
    pub(super) fn current(&self, attachment: u64) -> Result<MutexGuard<'_, State>, MigrationError> {
        let state = lock(&self.state);
        if state.attachment == attachment {
            return Ok(state);
        }
        let text = "the attempt was given up here, or a newer one of its source takes its place".to_owned();
        Err(MigrationError::Peer { code: ErrorCode::Busy, text })
    }
}

/// Checks that this build speaks a version of the source, and refuses the source if not.
fn check_version(preamble: &Preamble, control: &mut ControlWriter) -> Result<(), MigrationError> {
    if negotiate(preamble.oldest, preamble.newest).is_some() {
        return Ok(());
    }
    let why = format!(
        "the source speaks versions {} to {}, this destination {OLDEST_VERSION} to {VERSION}",
        preamble.oldest, preamble.newest
    );
    control.send(0, &Control::error(ErrorCode::Version, why.clone()))?;
    Err(MigrationError::Peer { code: ErrorCode::Version, text: why })
}

/// Refuses a source that encrypts, with the reason, and waits until the source closes the
/// connection. If this side closed it while data is unread, some transports would drop what was
/// written last.
fn refuse_sealed(reader: &mut dyn ReadHalf, control: &mut ControlWriter, why: &DecodeError, patience: Duration) {
    // best effort: the lane ends either way
    if control.send(0, &Control::error(ErrorCode::Security, why.to_string())).is_err() {
        return;
    }
    let end = Instant::now() + patience;
    // the first message of a handshake is far shorter; the time bounds a peer that sends a byte at
    // a time
    for _ in 0..4096 {
        if Instant::now() > end || reader.read_exact(&mut [0]).is_err() {
            return;
        }
    }
}
