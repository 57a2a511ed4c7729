//! Checkpoints of a VM that runs here while pages of it are missing. The
//! [source](crate::engine::source) keeps the checkpoints.
//!
//! One checkpoint (PostCopyFT, section III) has two stages. *Stage I* sends the pages that were
//! written since the last checkpoint, while the guest runs. *Stage II* pauses the guest, saves its
//! state, copies the pages that it wrote during stage I, and resumes it. The copied pages and the
//! state are sent after that, and then the commit. Output that was made before stage II is released
//! when the source has acknowledged the checkpoint.

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;

use super::{missing::Missing, place::Place};
use crate::{
    MigrationError, PageSet,
    channel::ReadHalf,
    codec::DecodeError,
    engine::{
        control::read_frame,
        lane::{Job, Lane},
        pages::Copied,
        rounds::RoundDriver,
    },
    lock::lock,
    ram::GuestRam,
    report::Observer,
    tracker::Rearm,
    vm::{CheckpointedVm, VmError},
    wire::{Bulk, Checkpoint, Content, Extent, Header, STATE_CHUNK},
};

/// The protection of a VM at its destination by checkpoints.
pub(in crate::engine) struct Protection {
    /// The VM, until it is discarded or does not need checkpoints any more.
    protected: Place<Protected>,
    identity: Bytes,
    /// Whether the source wants checkpoints, and not only the identity of this destination.
    wanted: AtomicBool,
    /// The time without a link after which the source counts as dead, and the identity of the
    /// source.
    pub(in crate::engine) source: Mutex<Option<(Duration, Bytes)>>,
    /// The state with which the VM was handed over. Its forward checkpoint has the same state, and
    /// no other checkpoint has.
    pub(in crate::engine) state: Mutex<Bytes>,
}

struct Protected {
    vm: Box<dyn CheckpointedVm>,
    /// The pages that were written since the last committed checkpoint are due.
    rounds: RoundDriver,
    /// The number of the last checkpoint that was begun.
    number: u32,
}

/// The pages that the guest wrote during stage I, and its state, of the same moment.
struct Frozen {
    copied: Copied,
    state: Vec<u8>,
    output: u64,
}

impl Protection {
    pub(in crate::engine) fn new(
        mut vm: Box<dyn CheckpointedVm>,
        identity: Bytes,
        ram: Arc<dyn GuestRam>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, VmError> {
        let mut rounds = RoundDriver::new(ram, observer);
        rounds.track(&mut *vm).map_err(|e| VmError::because("tracking the VM for checkpoints", e))?;
        let protected = Protected { vm, rounds, number: 0 };
        Ok(Self {
            protected: Place::new(protected),
            identity,
            wanted: AtomicBool::new(false),
            source: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Begins the protection of a VM that is about to be loaded with pages missing. All pages that
    /// were written so far came from the source, so they are not part of a checkpoint. If the
    /// source wants checkpoints, output is held from here on.
    pub(in crate::engine) fn begin(&self) -> Result<(), MigrationError> {
        if let Some(mut protected) = self.protected.borrow() {
            let Protected { vm, rounds, .. } = &mut *protected;
            let written = rounds.harvest(&mut **vm)?.written;
            rounds.arrived(&written)?;
            if self.wanted.load(Ordering::Relaxed) {
                vm.hold_output();
            }
        }
        Ok(())
    }

    /// Ends the protection, because the source will never restart the VM. All held output is
    /// released.
    pub(in crate::engine) fn end(&self) -> Result<(), MigrationError> {
        if let Some(mut protected) = self.protected.take() {
            protected.vm.release_output(None);
            protected.vm.tracker().stop()?;
        }
        Ok(())
    }

    /// Drops the VM's interface for checkpoints, because the VM is discarded.
    pub(in crate::engine) fn give_up(&self) {
        drop(self.protected.take());
    }

    /// Takes a checkpoint, and waits until the source has committed it.
    fn checkpoint(&self, lane: &mut CheckpointLane) -> Result<(), MigrationError> {
        let Some(mut protected) = self.protected.borrow() else { return Ok(()) };
        let Protected { vm, rounds, number } = &mut *protected;
        *number = number.wrapping_add(1);
        let number = *number;
        // stage I
        // (if the tracker reports a page that is still missing, reading the page fetches it)
        rounds.harvest(&mut **vm)?;
        let live = rounds.due();
        let rearm = rounds.begin(vm.tracker(), &live, false)?;
        let mut pages = lane.send_live(&live, rearm.clone(), number)?;
        // stage II
        let paused = vm.pause().map_err(MigrationError::vm("pausing the guest for a checkpoint"));
        let frozen = paused.and_then(|()| freeze(&mut **vm, rounds, &*lane.lane.ram, rearm.as_deref()));
        // also after a pause that has failed: some vCPUs may have stopped
        vm.resume().map_err(MigrationError::vm("resuming the guest after a checkpoint"))?;
        let frozen = frozen?;
        pages += lane.send_copy(&frozen, number)?;
        for chunk in frozen.state.chunks(STATE_CHUNK) {
            lane.send_control(&Checkpoint::State(Bytes::copy_from_slice(chunk)), number)?;
        }
        lane.send_control(&Checkpoint::Commit { pages, state_bytes: frozen.state.len() as u64 }, number)?;
        lane.await_commit(number)?;
        let committed = rounds.due();
        rounds.arrived(&committed)?;
        vm.release_output(Some(frozen.output));
        Ok(())
    }
}

/// Saves the state and copies the written pages, while the guest is paused.
fn freeze(
    vm: &mut dyn CheckpointedVm,
    rounds: &mut RoundDriver,
    ram: &dyn GuestRam,
    rearm: Option<&dyn Rearm>,
) -> Result<Frozen, MigrationError> {
    let state = vm.save_state().map_err(MigrationError::vm("saving the state for a checkpoint"))?.encode();
    let output = vm.output();
    // after the state was saved, because saving it also writes to RAM
    let rest = rounds.harvest(vm)?.written;
    let mut copied = Copied::default();
    copied.take(ram, &rest, rearm)?;
    Ok(Frozen { copied, state, output })
}

/// The destination's end of the checkpoint lane.
pub(in crate::engine) struct CheckpointLane {
    pub(in crate::engine) lane: Lane,
    pub(in crate::engine) reader: Box<dyn ReadHalf>,
    pub(in crate::engine) sequence: u32,
}

impl CheckpointLane {
    /// Takes checkpoints until no page is missing, and then waits for the end of the link.
    /// `wait_running` returns when the VM runs, or when it will not run on this link.
    pub(in crate::engine) fn run(
        &mut self,
        protection: &Protection,
        wait_running: &dyn Fn() -> Option<Arc<Missing>>,
    ) -> Result<(), MigrationError> {
        let (header, body) = self.read()?;
        let Checkpoint::Every { interval_us, detect_us, identity } = Checkpoint::decode(&header, &body)? else {
            return Err(DecodeError::invalid("kind", "a checkpoint lane begins with how often").into());
        };
        let interval = Duration::from_micros(interval_us);
        // before the answer, without which the source does not hand over the VM
        protection.wanted.store(!interval.is_zero(), Ordering::Relaxed);
        *lock(&protection.source) = Some((Duration::from_micros(detect_us), identity));
        self.send_control(&Checkpoint::Identity(protection.identity.clone()), 0)?;
        if !interval.is_zero()
            && let Some(missing) = wait_running()
        {
            while !missing.wait_ended_for(Duration::ZERO) {
                protection.checkpoint(self)?;
                missing.wait_ended_for(interval);
            }
        }
        // the source sends nothing any more; the control lane shows whether it is alive
        self.reader.set_idle_timeout(None).map_err(MigrationError::link(&self.lane.peer))?;
        let (header, _) = self.read()?;
        Err(DecodeError::invalid("kind", format!("{:#x} on an idle checkpoint lane", header.kind)).into())
    }

    fn read(&mut self) -> Result<(Header, Vec<u8>), MigrationError> {
        let read = read_frame(&mut *self.reader, &mut self.sequence, &self.lane.peer)?;
        if read.0.payload != 0 {
            return Err(DecodeError::invalid("payload length", "no pages come from a source here").into());
        }
        Ok(read)
    }

    fn send_control(&mut self, frame: &Checkpoint, number: u32) -> Result<(), MigrationError> {
        let bytes = frame.encode(self.lane.sequence, number);
        self.lane.write(&bytes, &[])
    }

    /// Sends pages of the running guest. Pages that change meanwhile are sent again in stage II.
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
