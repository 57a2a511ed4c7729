//! Stores the checkpoints that the destination takes of its VM as long as pages are missing there.

#[cfg(test)]
pub(in crate::engine) mod tests;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;

use crate::{
    MigrationError, PAGE_SIZE, PageSet,
    channel::{ReadHalf, WriteHalf},
    checkpoint::FailSafe,
    codec::DecodeError,
    engine::{
        control::read_frame,
        handle::{Input, PeerInputs},
    },
    lock::lock,
    ram::GuestRam,
    report::{CheckpointCounts, Event, Observer},
    state::{MAX_STATE, VmState},
    store::VersionStore,
    wire::{Bulk, Checkpoint, Content, Extent, Header},
};

/// What the source knows of the protection of its VM by checkpoints.
#[derive(Default)]
pub(in crate::engine) struct Protection {
    /// The identity that the destination has sent; `None` before that.
    pub(in crate::engine) identity: Mutex<Option<Bytes>>,
    /// Whether the VM was handed over. From then on it is protected.
    pub(in crate::engine) handed_over: AtomicBool,
    /// Whether data has come from the destination since the engine last checked. If so, the
    /// destination is alive.
    pub(in crate::engine) heard: AtomicBool,
    pub(in crate::engine) count: AtomicU64,
    pub(in crate::engine) bytes: AtomicU64,
}

impl Protection {
    pub(in crate::engine) fn counts(&self) -> CheckpointCounts {
        CheckpointCounts {
            protected: self.handed_over.load(Ordering::Relaxed),
            count: self.count.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// The source's end of the checkpoint lane.
pub(in crate::engine) struct CheckpointReceiver {
    pub(in crate::engine) reader: Box<dyn ReadHalf>,
    pub(in crate::engine) writer: Box<dyn WriteHalf>,
    pub(in crate::engine) peer: String,
    pub(in crate::engine) ram: Arc<dyn GuestRam>,
    pub(in crate::engine) fail_safe: FailSafe,
    pub(in crate::engine) identity: Bytes,
    pub(in crate::engine) kept: Arc<Protection>,
    pub(in crate::engine) wire_bytes: Arc<AtomicU64>,
    pub(in crate::engine) observer: Arc<dyn Observer>,
    pub(in crate::engine) sent: u32,
    /// Pages that were put as zeros over this link, and not with data since. Putting them again
    /// would change nothing, and would cost a peer that wants the store to grow hardly a byte.
    pub(in crate::engine) zeros: PageSet,
}

/// The most times that a checkpoint may hold each page: once from the running guest, and once from
/// the paused one.
const PAGES_A_CHECKPOINT: u64 = 2;

/// A checkpoint that is being received.
#[derive(Default)]
struct Incoming {
    number: u32,
    pages: u64,
    bytes: u64,
    state: Vec<u8>,
}

impl CheckpointReceiver {
    /// Receives and stores checkpoints until the link ends.
    pub(in crate::engine) fn run(mut self, inputs: PeerInputs) {
        // Discards what the lost link has left incomplete. The last committed checkpoint counts.
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
        let mut kept = self.send_control(&first, 0);
        while kept.is_ok() {
            kept = self.frame(&mut sequence, &mut incoming, &inputs);
        }
        if let Err(error) = kept {
            // The engine may be gone, because the migration is over.
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
        let bytes = (Header::LEN + body.len()) as u64 + u64::from(header.payload);
        self.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.kept.heard.store(true, Ordering::Relaxed);
        incoming.bytes += bytes;
        if !Checkpoint::is_kind(header.kind) {
            incoming.check(header.number)?;
            return match Bulk::decode(&header, &body, self.ram.layout().pages())? {
                Bulk::Pages { extents, .. } => self.pages(&extents, incoming),
                Bulk::RoundEnd { .. } => Ok(()),
                Bulk::Request { .. } | Bulk::Vacated { .. } => {
                    Err(DecodeError::invalid("kind", "only pages come on a checkpoint lane").into())
                }
            };
        }
        match Checkpoint::decode(&header, &body)? {
            Checkpoint::Identity(identity) => {
                *lock(&self.kept.identity) = Some(identity);
                // The engine may be gone, because the migration is over.
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

    fn store(&self) -> Result<&Mutex<dyn VersionStore>, DecodeError> {
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
        // A state that could not be loaded is no checkpoint.
        VmState::decode(&complete.state)?;
        lock(self.store()?).commit(complete.number, complete.state.into()).map_err(not_kept)?;
        self.kept.bytes.fetch_add(complete.bytes, Ordering::Relaxed);
        self.kept.count.fetch_add(1, Ordering::Relaxed);
        self.observer.event(&Event::Checkpoint(self.kept.counts()));
        self.send_control(&Checkpoint::Committed, complete.number)
    }

    fn send_control(&mut self, frame: &Checkpoint, number: u32) -> Result<(), MigrationError> {
        let bytes = frame.encode(self.sent, number);
        self.sent = self.sent.wrapping_add(1);
        self.writer.write_all(&bytes, &[]).map_err(MigrationError::link(&self.peer))?;
        self.wire_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Incoming {
    /// Checks that a frame of checkpoint `number` belongs to the checkpoint that is being received.
    /// The first frame determines its number.
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
