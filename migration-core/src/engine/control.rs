//! One end of a control lane: whole frames in, whole frames out.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    MigrationError,
    channel::{FILES_PER_BYTE, ReadHalf, WriteHalf},
    codec::DecodeError,
    wire::{Control, Header},
};

/// Bytes that are written at once.
const PIECE: usize = 64 << 10;

/// Sends frames, counted and numbered.
pub(super) struct ControlWriter {
    half: Box<dyn WriteHalf>,
    peer: String,
    sequence: u32,
    bytes: Arc<AtomicU64>,
}

impl ControlWriter {
    pub(super) fn new(half: Box<dyn WriteHalf>, peer: String, bytes: Arc<AtomicU64>) -> Self {
        Self { half, peer, sequence: 0, bytes }
    }

    /// How long a write may go without a byte taken by the peer.
    pub(super) fn set_idle_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.half.set_idle_timeout(Some(timeout))
    }

    /// The bare half: what was sent so far was no frame.
    pub(super) fn into_half(self) -> Box<dyn WriteHalf> {
        self.half
    }

    pub(super) fn send(&mut self, epoch: u32, frame: &Control) -> Result<(), MigrationError> {
        self.send_all(epoch, std::slice::from_ref(frame))
    }

    /// Sends frames in one go: the peer is woken once.
    pub(super) fn send_all(&mut self, epoch: u32, frames: &[Control]) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.append(&mut frame.encode(0, self.sequence, epoch));
            self.sequence = self.sequence.wrapping_add(1);
        }
        // counted piece by piece: on a slow link all of it takes long
        for piece in bytes.chunks(PIECE) {
            self.half.write_all(piece, &[]).map_err(MigrationError::link(&self.peer))?;
            self.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sends open files behind the frames so far.
    pub(super) fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> Result<(), MigrationError> {
        self.half.send_files(files).map_err(MigrationError::link(&self.peer))?;
        self.bytes.fetch_add(files.len().div_ceil(FILES_PER_BYTE) as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Receives frames, and refuses those that are out of sequence.
pub(super) struct ControlReader {
    half: Box<dyn ReadHalf>,
    peer: String,
    sequence: u32,
    bytes: Arc<AtomicU64>,
}

impl ControlReader {
    pub(super) fn new(half: Box<dyn ReadHalf>, peer: String, bytes: Arc<AtomicU64>) -> Self {
        Self { half, peer, sequence: 0, bytes }
    }

    /// Open files that follow the frames so far: exactly so many.
    pub(super) fn files(&mut self, count: usize) -> Result<Vec<OwnedFd>, MigrationError> {
        let files = self.half.receive_files(count).map_err(|cause| match cause.kind() {
            io::ErrorKind::InvalidData => DecodeError::invalid("open files", cause.to_string()).into(),
            _ => MigrationError::link(&self.peer)(cause),
        })?;
        self.bytes.fetch_add(count.div_ceil(FILES_PER_BYTE) as u64, Ordering::Relaxed);
        Ok(files)
    }

    /// The next frame and the epoch in its header.
    pub(super) fn read(&mut self) -> Result<(u32, Control), MigrationError> {
        let (header, body) = read_frame(&mut *self.half, &mut self.sequence, &self.peer)?;
        self.bytes.fetch_add((Header::LEN + body.len()) as u64, Ordering::Relaxed);
        Ok((header.number, Control::decode(&header, &body)?))
    }
}

/// Header and body of the next frame of a lane, in sequence. The body's length was bounded by the header's decoder.
pub(super) fn read_frame(
    half: &mut dyn ReadHalf,
    sequence: &mut u32,
    peer: &str,
) -> Result<(Header, Vec<u8>), MigrationError> {
    let mut bytes = [0; Header::LEN];
    half.read_exact(&mut bytes).map_err(MigrationError::link(peer))?;
    let header = Header::decode(&bytes)?;
    if header.sequence != *sequence {
        let why = format!("frame {} where {} is due", header.sequence, sequence);
        return Err(DecodeError::invalid("sequence", why).into());
    }
    if header.vm != 0 {
        return Err(DecodeError::invalid("vm", format!("no VM {} in this session", header.vm)).into());
    }
    *sequence = sequence.wrapping_add(1);
    let mut body = vec![0; header.body as usize];
    half.read_exact(&mut body).map_err(MigrationError::link(peer))?;
    Ok((header, body))
}
