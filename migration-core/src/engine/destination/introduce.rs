//! A connection says what it is for, and becomes a lane.

use super::{attempt::refuse_reattach, survive::CheckpointHalves, *};
use crate::{vm::FailedAttempt, wire::MAGIC};

/// A connection that has just come.
pub(super) struct Incoming {
    /// Counts the connections of this receiver.
    pub(super) id: u64,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) writer: Box<dyn WriteHalf>,
    pub(super) closer: Arc<dyn Closer>,
}

/// The bytes of a preamble that tell whether it is one.
const START: usize = 4;

/// What a connection has said of itself.
#[derive(Default)]
struct Introduced {
    /// Whether it wants to begin a session, as far as that can be told.
    wants_session: bool,
    /// The VM that it wants to migrate.
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

    /// A connection has shown what it is: it is not one of those any more that give way to others.
    pub(super) fn advance(&self, id: u64, stage: Stage, peer: &str) -> Result<(), MigrationError> {
        if lock(&self.connections).advance(id, stage) {
            return Ok(());
        }
        Err(MigrationError::link(peer)(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl Destination {
    pub(super) fn serve(self: &Arc<Self>, connection: Incoming, peer: &str) {
        let id = connection.id;
        let mut attempt = Introduced::default();
        if let Err(error) = self.introduce(connection, peer, &mut attempt) {
            // what happened on a connection that was closed here is not the reason
            let closed = lock(&self.common.connections).why_closed(id);
            let why = closed.map_or_else(|| error.at_peer(peer), str::to_owned);
            self.common.bad_peer(peer, &why);
            if attempt.wants_session {
                self.common.host.attempt_failed(&FailedAttempt { peer: peer.to_owned(), vm: attempt.vm, why });
            }
        }
    }

    /// Reads the preamble of a new connection and lets it do what it is for.
    ///
    /// # Errors
    /// When it is refused, or its session did not come about.
    fn introduce(
        self: &Arc<Self>,
        connection: Incoming,
        peer: &str,
        introduced: &mut Introduced,
    ) -> Result<(), MigrationError> {
        let link = || MigrationError::link(peer);
        let Incoming { id, mut reader, mut writer, closer } = connection;
        reader.set_idle_timeout(Some(self.common.options.idle_timeout)).map_err(link())?;
        writer.set_idle_timeout(Some(self.common.options.idle_timeout)).map_err(link())?;
        let mut bytes = [0; Preamble::LEN];
        let (start, rest) = bytes.split_at_mut(START);
        reader.read_exact(start).map_err(link())?;
        // whatever it is, it has said something
        introduced.wants_session = true;
        // a peer that speaks another protocol may wait for an answer before it has said this much
        if [MAGIC, SEALED_MAGIC].iter().any(|magic| magic.starts_with(start)) {
            reader.read_exact(rest).map_err(link())?;
        }
        let mut control = ControlWriter::new(writer, peer.to_owned(), self.common.bytes.clone());
        let preamble = Preamble::decode(&bytes).inspect_err(|error| {
            if bytes.starts_with(&SEALED_MAGIC) {
                refuse_sealed(&mut *reader, &mut control, error, self.common.options.idle_timeout);
            }
        })?;
        if negotiate(preamble.oldest, preamble.newest).is_none() {
            let why = format!(
                "the source speaks versions {} to {}, this destination {OLDEST_VERSION} to {VERSION}",
                preamble.oldest, preamble.newest
            );
            control.send(0, &Control::error(ErrorCode::Version, why.clone()))?;
            return Err(MigrationError::Peer { code: ErrorCode::Version, text: why });
        }
        introduced.wants_session = preamble.kind == LaneKind::Control;
        let known = self.find(preamble.session).is_ok();
        let stage = match preamble.kind {
            // on a link that is not encrypted anybody may have read the token: it opens only lanes that then take a place
            LaneKind::Control => Stage::Greeting,
            LaneKind::Reattach if known => Stage::Returning,
            _ if known => Stage::Identified,
            _ => Stage::Greeting,
        };
        self.common.advance(id, stage, peer)?;
        // it was started for pages in volume, which is what most connections carry
        match preamble.kind {
            LaneKind::Bulk => {}
            LaneKind::Demand => self.common.options.spawner.assume(Role::Demand, GuestImpact::Balanced),
            _ => self.common.options.spawner.assume(Role::Control, GuestImpact::Balanced),
        }
        match preamble.kind {
            LaneKind::Bulk => {
                let Found { entry, session } = self.find(preamble.session)?;
                let link = session.attach(preamble.index, closer)?;
                return entry.pages(session, &preamble, link, reader, peer);
            }
            LaneKind::Demand => {
                let Found { entry, session } = self.find(preamble.session)?;
                let link = session.attach_demand(preamble.index, closer, control.into_half())?;
                if link == 0
                    && let Err(error) = entry.await_faults(&session, preamble.index)
                {
                    session.fail(error.code(), &error.to_string());
                    return Err(error);
                }
                return entry.pages(session, &preamble, link, reader, peer);
            }
            LaneKind::Checkpoint => {
                let Found { entry, session } = self.find(preamble.session)?;
                let (protection, link) = session.attach_checkpoint(closer)?;
                return entry.checkpoints(
                    &session,
                    &protection,
                    link,
                    CheckpointHalves { reader, writer: control.into_half() },
                    peer,
                );
            }
            LaneKind::Control | LaneKind::Reattach => {}
        }
        let mut frames = ControlReader::new(reader, peer.to_owned(), self.common.bytes.clone());
        let first = frames.read().inspect_err(|error| {
            // an honest peer of another build has a user who wants to know
            if !matches!(error, MigrationError::Link { .. }) {
                // best effort: the lane ends either way
                let _ = control.send(0, &Control::error(error.code(), error.to_string()));
            }
        });
        match (preamble.kind, first?) {
            (LaneKind::Control, (epoch, Control::Hello(hello))) => {
                introduced.vm = Some(hello.vm.id);
                self.attempt(epoch, hello, ControlLane { id, frames, control, closer }, peer)
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
    /// A lane on which pages come.
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
        if session.lane_lost(link, error.code(), &error.to_string()) {
            self.lost_while_loading(&session, &error.to_string());
            return Err(error);
        }
        if matches!(error, MigrationError::Link { .. }) && (session.is_sealed() || session.over().is_some()) {
            // it has done its part, or was closed because of another lane
            return Ok(());
        }
        if session.missing().is_some() && session.is_sealed() {
            // the VM may run here, and has all its pages
            return Err(error);
        }
        session.fail(error.code(), &error.to_string());
        Err(error)
    }

    /// The state, if `attachment` is still the control lane that speaks for it.
    pub(super) fn current(&self, attachment: u64) -> Result<MutexGuard<'_, State>, MigrationError> {
        let state = lock(&self.state);
        if state.attachment == attachment {
            return Ok(state);
        }
        let text = "the attempt was given up here, or a newer one of its source takes its place".to_owned();
        Err(MigrationError::Peer { code: ErrorCode::Busy, text })
    }
}

/// Tells a source that encrypts why it is refused, and waits until it has gone: what is unread when a connection closes
/// makes some transports forget what was written last.
fn refuse_sealed(reader: &mut dyn ReadHalf, control: &mut ControlWriter, why: &DecodeError, patience: Duration) {
    // best effort: the lane ends either way
    if control.send(0, &Control::error(ErrorCode::Security, why.to_string())).is_err() {
        return;
    }
    let end = Instant::now() + patience;
    // a handshake's first message is far shorter; one that comes a byte at a time is waited for no longer
    for _ in 0..4096 {
        if Instant::now() > end || reader.read_exact(&mut [0]).is_err() {
            return;
        }
    }
}
