//! Checkpoints of a VM that runs at its destination before all its pages are there: taken there, kept at the source.
//!
//! One checkpoint (PostCopyFT, section III): *stage I* sends what was written since the last one while the guest runs;
//! *stage II* pauses it, saves its state, copies what it wrote during stage I, and lets it go on. The copy and the state
//! follow, then the commit. Output made before stage II leaves when the source has acknowledged it.

#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;

use super::{
    control::read_frame,
    handle::{Input, PeerInputs, lock},
    lane::{Job, Lane},
    missing::Missing,
    pages::Copied,
    rounds::RoundDriver,
};
use crate::{
    MigrationError, PAGE_SIZE, PageSet,
    channel::{ReadHalf, WriteHalf},
    checkpoint::{CheckpointStore, FailSafe},
    codec::DecodeError,
    ram::GuestRam,
    report::{CheckpointCounts, Event, Observer},
    state::{MAX_STATE, VmState},
    tracker::Rearm,
    vm::{ProtectedVm, VmError},
    wire::{Bulk, Checkpoint, Content, Extent, STATE_CHUNK},
};

// ---- at the destination ------------------------------------------------------------------------------------------

/// A VM at its destination, of which checkpoints are taken.
pub(super) struct Protection {
    /// `None` once the VM was discarded.
    protected: Mutex<Option<Protected>>,
    identity: Bytes,
    /// Whether the source wants checkpoints, and not only to know whom it deals with.
    wanted: AtomicBool,
    /// After how long without a link the source counts as dead, and its identity.
    pub(super) source: Mutex<Option<(Duration, Bytes)>>,
    /// With which the VM was handed over: its forward checkpoint has the same, and no other one has.
    pub(super) state: Mutex<Bytes>,
}

struct Protected {
    vm: Box<dyn ProtectedVm>,
    /// What is due was written since the last committed checkpoint.
    rounds: RoundDriver,
    /// The last checkpoint that was begun.
    number: u32,
}

/// What the guest wrote during stage I, and its state, of one moment.
struct Frozen {
    copied: Copied,
    state: Vec<u8>,
    output: u64,
}

impl Protection {
    pub(super) fn new(
        mut vm: Box<dyn ProtectedVm>,
        identity: Bytes,
        ram: Arc<dyn GuestRam>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, VmError> {
        let mut rounds = RoundDriver::new(ram, observer);
        rounds.track(&mut *vm).map_err(|e| VmError::because("tracking the VM for checkpoints", e))?;
        let protected = Protected { vm, rounds, number: 0 };
        Ok(Self {
            protected: Mutex::new(Some(protected)),
            identity,
            wanted: AtomicBool::new(false),
            source: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// The VM is about to be loaded, with pages missing: what was written so far came from the source, and what comes
    /// out from here on is held.
    pub(super) fn begin(&self) -> Result<(), MigrationError> {
        if let Some(Protected { vm, rounds, .. }) = lock(&self.protected).as_mut() {
            let written = rounds.harvest(&mut **vm)?.written;
            rounds.arrived(&written)?;
            if self.wanted.load(Ordering::Relaxed) {
                vm.hold_output();
            }
        }
        Ok(())
    }

    /// The source will never restart the VM: nothing is held any more.
    pub(super) fn end(&self) -> Result<(), MigrationError> {
        if let Some(mut protected) = lock(&self.protected).take() {
            protected.vm.release_output(None);
            protected.vm.tracker().stop()?;
        }
        Ok(())
    }

    /// The VM is discarded.
    pub(super) fn give_up(&self) {
        drop(lock(&self.protected).take());
    }

    /// Takes a checkpoint, and returns when it is committed.
    fn checkpoint(&self, lane: &mut CheckpointLane) -> Result<(), MigrationError> {
        let mut guard = lock(&self.protected);
        let Some(Protected { vm, rounds, number }) = guard.as_mut() else { return Ok(()) };
        *number = number.wrapping_add(1);
        let number = *number;
        // stage I
        // (if the tracker reports a page that is still missing, to read it fetches it)
        rounds.harvest(&mut **vm)?;
        let live = rounds.due();
        let rearm = rounds.begin(vm.tracker(), &live, false)?;
        let mut pages = lane.send_live(&live, rearm.clone(), number)?;
        // stage II
        let paused = vm.pause().map_err(MigrationError::vm("pausing the guest for a checkpoint"));
        let frozen = paused.and_then(|()| freeze(&mut **vm, rounds, &*lane.lane.ram, rearm.as_deref()));
        // also behind a pause that failed: some vCPUs may have stopped
        vm.resume().map_err(MigrationError::vm("resuming the guest after a checkpoint"))?;
        let frozen = frozen?;
        pages += lane.send_copy(&frozen, number)?;
        for chunk in frozen.state.chunks(STATE_CHUNK) {
            lane.say(&Checkpoint::State(Bytes::copy_from_slice(chunk)), number)?;
        }
        lane.say(&Checkpoint::Commit { pages, state_bytes: frozen.state.len() as u64 }, number)?;
        lane.await_commit(number)?;
        let committed = rounds.due();
        rounds.arrived(&committed)?;
        vm.release_output(Some(frozen.output));
        Ok(())
    }
}

/// While the guest is paused.
fn freeze(
    vm: &mut dyn ProtectedVm,
    rounds: &mut RoundDriver,
    ram: &dyn GuestRam,
    rearm: Option<&dyn Rearm>,
) -> Result<Frozen, MigrationError> {
    let state = vm.save_state().map_err(MigrationError::vm("saving the state for a checkpoint"))?.encode();
    let output = vm.output();
    // behind the save, which writes too
    let rest = rounds.harvest(vm)?.written;
    let mut copied = Copied::default();
    copied.take(ram, &rest, rearm)?;
    Ok(Frozen { copied, state, output })
}

/// The destination's end of the checkpoint lane.
pub(super) struct CheckpointLane {
    pub(super) lane: Lane,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) sequence: u32,
}

impl CheckpointLane {
    /// Takes checkpoints until no page is missing, then waits for the end of the link. `wait_running` returns when the VM
    /// runs, or never will.
    pub(super) fn run(
        &mut self,
        protection: &Protection,
        wait_running: &dyn Fn() -> Option<Arc<Missing>>,
    ) -> Result<(), MigrationError> {
        let (header, body) = self.read()?;
        let Checkpoint::Every { interval_us, detect_us, identity } = Checkpoint::decode(&header, &body)? else {
            return Err(DecodeError::invalid("kind", "a checkpoint lane begins with how often").into());
        };
        let interval = Duration::from_micros(interval_us);
        // before the answer, without which nothing is handed over
        protection.wanted.store(!interval.is_zero(), Ordering::Relaxed);
        *lock(&protection.source) = Some((Duration::from_micros(detect_us), identity));
        self.say(&Checkpoint::Identity(protection.identity.clone()), 0)?;
        if !interval.is_zero()
            && let Some(missing) = wait_running()
        {
            while !missing.wait_ended_for(Duration::ZERO) {
                protection.checkpoint(self)?;
                missing.wait_ended_for(interval);
            }
        }
        // the source does not speak any more; that it is alive is seen on the control lane
        self.reader.set_idle_timeout(None).map_err(MigrationError::link(&self.lane.peer))?;
        let (header, _) = self.read()?;
        Err(DecodeError::invalid("kind", format!("{:#x} on an idle checkpoint lane", header.kind)).into())
    }

    fn read(&mut self) -> Result<(crate::wire::Header, Vec<u8>), MigrationError> {
        let read = read_frame(&mut *self.reader, &mut self.sequence, &self.lane.peer)?;
        if read.0.payload != 0 {
            return Err(DecodeError::invalid("payload length", "no pages come from a source here").into());
        }
        Ok(read)
    }

    fn say(&mut self, frame: &Checkpoint, number: u32) -> Result<(), MigrationError> {
        let bytes = frame.encode(self.lane.sequence, number);
        self.lane.write(&bytes, &[])
    }

    /// Sends pages of the running guest: they may change meanwhile, and come again then.
    fn send_live(
        &mut self,
        pages: &PageSet,
        rearm: Option<Arc<dyn Rearm>>,
        number: u32,
    ) -> Result<u64, MigrationError> {
        let pages = Arc::new(pages.clone());
        let count = pages.len();
        self.lane.round(&Job { generation: number, pages, rearm, stop: Arc::default() })?;
        Ok(count)
    }

    fn send_copy(&mut self, frozen: &Frozen, number: u32) -> Result<u64, MigrationError> {
        let mut pages = 0;
        for (range, data) in frozen.copied.pieces() {
            let extents = vec![Extent { range, content: Content::Plain }];
            let mut frame = Bulk::Pages { extents, payload_crc: 0 }.encode(0, self.lane.sequence, number);
            frame.extend_from_slice(data);
            self.lane.write(&frame, &[])?;
            pages += range.count;
        }
        Ok(pages)
    }

    fn await_commit(&mut self, number: u32) -> Result<(), MigrationError> {
        let (header, body) = self.read()?;
        match Checkpoint::decode(&header, &body)? {
            Checkpoint::Committed if header.number == number => Ok(()),
            _ => Err(DecodeError::invalid("kind", format!("no answer to checkpoint {number}")).into()),
        }
    }
}

// ---- at the source -----------------------------------------------------------------------------------------------

/// What the source knows of the protection of its VM.
#[derive(Default)]
pub(super) struct Kept {
    /// The destination has introduced itself.
    pub(super) identity: Mutex<Option<Bytes>>,
    /// The VM was handed over: from then on it is protected.
    pub(super) handed_over: AtomicBool,
    /// Something came from the destination since the engine last looked: it is alive.
    pub(super) heard: AtomicBool,
    pub(super) count: AtomicU64,
    pub(super) bytes: AtomicU64,
}

impl Kept {
    pub(super) fn counts(&self) -> CheckpointCounts {
        CheckpointCounts {
            protected: self.handed_over.load(Ordering::Relaxed),
            count: self.count.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// The source's end of the checkpoint lane.
pub(super) struct Keeper {
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) writer: Box<dyn WriteHalf>,
    pub(super) peer: String,
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) fail_safe: FailSafe,
    pub(super) identity: Bytes,
    pub(super) kept: Arc<Kept>,
    pub(super) wire_bytes: Arc<AtomicU64>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) sent: u32,
    /// Pages that were put as zeros over this link, and not with data since: to put them again would change nothing, and takes
    /// hardly a byte of a peer that wants the store to grow.
    pub(super) zeros: PageSet,
}

/// How often a checkpoint may hold each page: once from the running guest, and once from the paused one.
const PAGES_A_CHECKPOINT: u64 = 2;

/// A checkpoint that is coming in.
#[derive(Default)]
struct Incoming {
    number: u32,
    pages: u64,
    bytes: u64,
    state: Vec<u8>,
}

impl Keeper {
    /// Keeps checkpoints until the link ends.
    pub(super) fn run(mut self, inputs: PeerInputs) {
        // what the lost link has left half-done; the last committed checkpoint counts
        if let Some(store) = &self.fail_safe.reverse {
            lock(store).discard();
        }
        let mut sequence = 0;
        let mut incoming = Incoming::default();
        let us = |time: Duration| time.as_micros() as u64;
        let first = Checkpoint::Every {
            interval_us: if self.fail_safe.reverse.is_some() { us(self.fail_safe.interval).max(1) } else { 0 },
            detect_us: us(self.fail_safe.detect),
            identity: self.identity.clone(),
        };
        let mut kept = self.say(&first, 0);
        while kept.is_ok() {
            kept = self.frame(&mut sequence, &mut incoming, &inputs);
        }
        if let Err(error) = kept {
            // the engine may be gone: the migration is over
            let _ = inputs.send(Input::Lane(Err(error)));
        }
    }

    fn frame(
        &mut self,
        sequence: &mut u32,
        incoming: &mut Incoming,
        inputs: &PeerInputs,
    ) -> Result<(), MigrationError> {
        let (header, body) = read_frame(&mut *self.reader, sequence, &self.peer)?;
        let bytes = (crate::wire::Header::LEN + body.len()) as u64 + u64::from(header.payload);
        self.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.kept.heard.store(true, Ordering::Relaxed);
        incoming.bytes += bytes;
        if !Checkpoint::is_kind(header.kind) {
            incoming.check(header.number)?;
            return match Bulk::decode(&header, &body, self.ram.layout().pages())? {
                Bulk::Pages { extents, .. } => self.pages(&extents, incoming),
                Bulk::RoundEnd { .. } => Ok(()),
                Bulk::Request { .. } => Err(DecodeError::invalid("kind", "requests on a checkpoint lane").into()),
            };
        }
        match Checkpoint::decode(&header, &body)? {
            Checkpoint::Identity(identity) => {
                *lock(&self.kept.identity) = Some(identity);
                // as above
                let _ = inputs.send(Input::Introduced);
                Ok(())
            }
            Checkpoint::State(chunk) => {
                incoming.check(header.number)?;
                if incoming.state.len() + chunk.len() > MAX_STATE {
                    return Err(DecodeError::invalid("state", "it is above its limit").into());
                }
                incoming.state.extend_from_slice(&chunk);
                Ok(())
            }
            Checkpoint::Commit { pages, state_bytes } => {
                incoming.check(header.number)?;
                if (pages, state_bytes) != (incoming.pages, incoming.state.len() as u64) {
                    let why = format!("{pages} pages were sent, {} came", incoming.pages);
                    return Err(DecodeError::invalid("checkpoint", why).into());
                }
                self.commit(std::mem::take(incoming))
            }
            Checkpoint::Every { .. } | Checkpoint::Committed => {
                Err(DecodeError::invalid("kind", "only a source says that").into())
            }
        }
    }

    fn store(&self) -> Result<&Mutex<dyn CheckpointStore>, DecodeError> {
        let none = || DecodeError::invalid("kind", "no checkpoints were wanted");
        self.fail_safe.reverse.as_deref().ok_or_else(none)
    }

    fn pages(&mut self, extents: &[Extent], incoming: &mut Incoming) -> Result<(), MigrationError> {
        let mut page = [0; PAGE_SIZE];
        let most = PAGES_A_CHECKPOINT.saturating_mul(self.ram.layout().pages());
        for extent in extents {
            incoming.pages += extent.range.count;
            if incoming.pages > most {
                let (field, len) = ("pages of a checkpoint", incoming.pages);
                return Err(DecodeError::TooLong { field, len, limit: most }.into());
            }
            for number in extent.range.pages() {
                let data = match extent.content {
                    Content::Zero if !self.zeros.insert(number) => continue,
                    Content::Zero => None,
                    Content::Plain => {
                        self.zeros.remove(number);
                        self.reader.read_exact(&mut page).map_err(MigrationError::link(&self.peer))?;
                        Some(&page)
                    }
                };
                lock(self.store()?).put(number, data).map_err(not_kept)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, complete: Incoming) -> Result<(), MigrationError> {
        // what could not be loaded is no checkpoint
        VmState::decode(&complete.state)?;
        lock(self.store()?).commit(complete.number, complete.state.into()).map_err(not_kept)?;
        self.kept.bytes.fetch_add(complete.bytes, Ordering::Relaxed);
        self.kept.count.fetch_add(1, Ordering::Relaxed);
        self.observer.event(&Event::Checkpoint(self.kept.counts()));
        self.say(&Checkpoint::Committed, complete.number)
    }

    fn say(&mut self, frame: &Checkpoint, number: u32) -> Result<(), MigrationError> {
        let bytes = frame.encode(self.sent, number);
        self.sent = self.sent.wrapping_add(1);
        self.writer.write_all(&bytes, &[]).map_err(MigrationError::link(&self.peer))?;
        self.wire_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Incoming {
    /// A frame of checkpoint `number` has come.
    fn check(&mut self, number: u32) -> Result<(), DecodeError> {
        if self.number == 0 {
            self.number = number;
        }
        if self.number == number && number != 0 {
            return Ok(());
        }
        Err(DecodeError::invalid("checkpoint", format!("{number} in the middle of {}", self.number)))
    }
}

fn not_kept(cause: io::Error) -> MigrationError {
    MigrationError::Store { step: "keeping a checkpoint", cause }
}
