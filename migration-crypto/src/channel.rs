//! The two directions of a channel, in records.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use migration_core::{
    RamSlice,
    channel::{Closer, ReadHalf, WriteHalf},
};
use zeroize::Zeroize;

use crate::{
    aead::TAG_LEN,
    record::{HEADER_LEN, MAX_PLAINTEXT, MIN_PLAINTEXT, OVERHEAD, RecordError, RecordOpener, RecordSealer},
};

/// How long the closing record of a writer that is dropped may wait for room in the link. A link that is stuck for longer
/// is as good as cut, and is told so.
const CLOSING_PATIENCE: Duration = Duration::from_millis(200);

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        let kind = match error {
            RecordError::Truncated => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

/// Seals what is written. Guest memory is copied once, into the record, and sealed there.
pub(crate) struct SecureWriter {
    inner: Box<dyn WriteHalf>,
    sealer: RecordSealer,
    /// The record in the making; keeps its memory.
    record: Vec<u8>,
    /// Most bytes of plaintext in a record.
    most: usize,
    /// Whether a closing record can still be sent.
    healthy: bool,
    closed: Arc<AtomicBool>,
}

impl SecureWriter {
    pub(crate) fn new(
        inner: Box<dyn WriteHalf>,
        sealer: RecordSealer,
        record_bytes: usize,
        closed: Arc<AtomicBool>,
    ) -> Self {
        let most = record_bytes.clamp(MIN_PLAINTEXT, MAX_PLAINTEXT);
        Self { inner, sealer, record: Vec::new(), most, healthy: true, closed }
    }

    /// Sends an empty record: proves that this side has the keys, or says that nothing follows.
    pub(crate) fn send_empty(&mut self, last: bool) -> io::Result<()> {
        self.begin(0);
        self.send(last)
    }

    /// Makes room for a record of `len` bytes.
    fn begin(&mut self, len: usize) {
        // what is there from before is overwritten: only growth has to be filled
        self.record.resize(len + OVERHEAD, 0);
    }

    fn send(&mut self, last: bool) -> io::Result<()> {
        self.healthy = false;
        self.sealer.seal(&mut self.record, last)?;
        self.inner.write_all(&self.record, &[])?;
        self.healthy = !last;
        Ok(())
    }
}

impl WriteHalf for SecureWriter {
    fn write_all(&mut self, mut head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut left = slices.iter().fold(head.len(), |sum, slice| sum.saturating_add(slice.len()));
        let mut slices = slices.iter().copied();
        let mut rest = slices.next();
        while left > 0 {
            let len = left.min(self.most);
            self.begin(len);
            let mut room = &mut self.record[HEADER_LEN..HEADER_LEN + len];
            let (now, later) = head.split_at(head.len().min(len));
            room[..now.len()].copy_from_slice(now);
            (head, room) = (later, &mut room[now.len()..]);
            while let Some(slice) = rest
                && !room.is_empty()
            {
                let taken = slice.len().min(room.len());
                slice.copy_to(&mut room[..taken]);
                room = &mut room[taken..];
                rest = Some(slice.skip(taken)).filter(|s| !s.is_empty()).or_else(|| slices.next());
            }
            self.send(false)?;
            left -= len;
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }

    fn keep_queue_short(&mut self) {
        self.inner.keep_queue_short();
    }
}

impl Drop for SecureWriter {
    fn drop(&mut self) {
        if self.healthy && !self.closed.load(Ordering::Acquire) {
            // without it the peer takes the end for a cut, which is true of a link that does not take it
            let _ = self.inner.set_idle_timeout(Some(CLOSING_PATIENCE)).and_then(|()| self.send_empty(true));
        }
        // a record that failed to be sealed would be plaintext
        self.record.zeroize();
    }
}

/// Opens what arrives. Nothing of a record is handed out before all of it is authentic.
pub(crate) struct SecureReader {
    inner: Box<dyn ReadHalf>,
    opener: RecordOpener,
    /// Plaintext of the present record, up to `end`; keeps its memory.
    record: Vec<u8>,
    /// What of it was handed out.
    at: usize,
    end: usize,
}

impl SecureReader {
    pub(crate) fn new(inner: Box<dyn ReadHalf>, opener: RecordOpener) -> Self {
        Self { inner, opener, record: Vec::new(), at: 0, end: 0 }
    }

    /// Receives the next record.
    pub(crate) fn next_record(&mut self) -> io::Result<()> {
        (self.at, self.end) = (0, 0);
        if self.opener.ended() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        let mut header = [0; HEADER_LEN];
        self.inner.read_exact(&mut header).map_err(cut_off)?;
        let len = self.opener.following(&header)?;
        if self.record.len() < len {
            self.record.resize(len, 0);
        }
        let sealed = &mut self.record[..len];
        self.inner.read_exact(sealed).map_err(cut_off)?;
        self.opener.open(&header, sealed)?;
        self.end = len - TAG_LEN;
        if self.opener.ended() && self.end == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        Ok(())
    }

    /// Whether all that has come was handed out.
    pub(crate) fn is_drained(&self) -> bool {
        self.at == self.end
    }

    /// Up to `most` bytes of plaintext, at least one unless `most` is 0.
    fn take(&mut self, most: usize) -> io::Result<&[u8]> {
        while self.at == self.end && most > 0 {
            self.next_record()?;
        }
        let from = self.at;
        self.at += most.min(self.end - self.at);
        Ok(&self.record[from..self.at])
    }
}

/// The end of the stream where a record is due is a cut.
fn cut_off(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { RecordError::Truncated.into() } else { error }
}

impl ReadHalf for SecureReader {
    fn read_exact(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let piece = self.take(buf.len())?;
            let (now, later) = buf.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            buf = later;
        }
        Ok(())
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        for &slice in slices {
            let mut rest = slice;
            while !rest.is_empty() {
                let piece = self.take(rest.len())?;
                rest.copy_from(piece);
                rest = rest.skip(piece.len());
            }
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }
}

impl Drop for SecureReader {
    fn drop(&mut self) {
        self.record.zeroize();
    }
}

/// Passes on, and spares the writer its closing record.
pub(crate) struct SecureCloser {
    pub(crate) inner: Box<dyn Closer>,
    pub(crate) closed: Arc<AtomicBool>,
}

impl Closer for SecureCloser {
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.inner.close();
    }
}
