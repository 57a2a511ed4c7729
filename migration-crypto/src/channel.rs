//! The two directions of a channel, in records.

use std::{
    io, mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
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

/// Pieces of guest memory of so many bytes and more have records of their own, which the cipher writes and reads without a
/// further copy. Smaller ones share records: each costs some calls and 24 bytes.
const DIRECT: usize = 32 << 10;
/// Room for small records beside a large one, all of which are sent by one call.
const BESIDE: usize = 4 << 10;

/// Seals what is written: guest memory straight into a record, or by way of one copy where a record takes several pieces.
pub(crate) struct SecureWriter {
    inner: Box<dyn WriteHalf>,
    sealer: RecordSealer,
    /// Records that are not sent yet, up to `filled`; keeps its memory.
    records: Vec<u8>,
    filled: usize,
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
        Self { inner, sealer, records: Vec::new(), filled: 0, most, healthy: true, closed }
    }

    /// Sends an empty record: proves that this side has the keys, or says that nothing follows.
    pub(crate) fn send_empty(&mut self, last: bool) -> io::Result<()> {
        self.healthy = false;
        let record = self.room(0)?;
        self.sealer.seal(&mut self.records[record], last)?;
        self.flush()?;
        self.healthy = !last;
        Ok(())
    }

    /// Makes room for a record of `len` bytes behind those that are not sent yet, which it sends if need be: where it is.
    fn room(&mut self, len: usize) -> io::Result<Range<usize>> {
        if self.filled > 0 && self.filled + len + OVERHEAD > self.most + OVERHEAD + BESIDE {
            self.flush()?;
        }
        let record = self.filled..self.filled + len + OVERHEAD;
        // never shortened: what is there from before is overwritten, and only growth has to be filled
        if self.records.len() < record.end {
            self.records.resize(record.end, 0);
        }
        self.filled = record.end;
        Ok(record)
    }

    fn flush(&mut self) -> io::Result<()> {
        let records = &self.records[..mem::take(&mut self.filled)];
        self.inner.write_all(records, &[])
    }
}

/// What is to be written, from its beginning on.
struct Rest<'a, S> {
    head: &'a [u8],
    /// The present piece; not empty.
    slice: Option<RamSlice<'a>>,
    slices: S,
}

impl<'a, S: Iterator<Item = RamSlice<'a>>> Rest<'a, S> {
    fn new(head: &'a [u8], mut slices: S) -> Self {
        let slice = slices.find(|slice| !slice.is_empty());
        Self { head, slice, slices }
    }

    /// At most `most` bytes of guest memory that come next and get a record of their own.
    fn direct(&mut self, most: usize) -> Option<RamSlice<'a>> {
        let slice = self.slice.filter(|slice| self.head.is_empty() && slice.len() >= DIRECT)?.take(most);
        self.pass(slice.len());
        Some(slice)
    }

    /// Bytes, at most `most`, that come before the next piece with a record of its own.
    fn gathered(&self, most: usize) -> usize
    where
        S: Clone,
    {
        let mut sum = self.head.len();
        let small = |slice: &RamSlice<'_>| slice.len() < DIRECT;
        for slice in self.slice.into_iter().chain(self.slices.clone()).take_while(small) {
            if sum >= most {
                break;
            }
            sum += slice.len();
        }
        sum.min(most)
    }

    /// Copies what comes next.
    fn copy(&mut self, mut to: &mut [u8]) {
        let (now, later) = self.head.split_at(self.head.len().min(to.len()));
        to[..now.len()].copy_from_slice(now);
        (self.head, to) = (later, &mut to[now.len()..]);
        while let Some(slice) = self.slice
            && !to.is_empty()
        {
            let taken = slice.len().min(to.len());
            slice.copy_to(&mut to[..taken]);
            to = &mut to[taken..];
            self.pass(taken);
        }
    }

    /// Goes on behind `bytes` bytes of the present piece.
    fn pass(&mut self, bytes: usize) {
        let left = self.slice.map(|slice| slice.skip(bytes)).filter(|slice| !slice.is_empty());
        self.slice = left.or_else(|| self.slices.find(|slice| !slice.is_empty()));
    }
}

impl WriteHalf for SecureWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.healthy = false;
        let mut rest = Rest::new(head, slices.iter().copied());
        while !rest.head.is_empty() || rest.slice.is_some() {
            if let Some(slice) = rest.direct(self.most) {
                let record = self.room(slice.len())?;
                self.sealer.seal_from(slice, &mut self.records[record])?;
                continue;
            }
            let len = rest.gathered(self.most);
            let record = self.room(len)?;
            let record = &mut self.records[record];
            rest.copy(&mut record[HEADER_LEN..HEADER_LEN + len]);
            self.sealer.seal(record, false)?;
        }
        self.flush()?;
        self.healthy = true;
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.inner.set_deadline(deadline);
    }

    fn ahead_of_limit(&self) -> Duration {
        self.inner.ahead_of_limit()
    }

    fn keep_queue_short(&mut self) {
        self.inner.keep_queue_short();
    }
}

impl Drop for SecureWriter {
    fn drop(&mut self) {
        if self.healthy && !self.closed.load(Ordering::Acquire) {
            // without it the peer takes the end for a cut, which is true of a link that does not take it
            self.inner.set_deadline(Instant::now().checked_add(CLOSING_PATIENCE));
            let _ = self.inner.set_idle_timeout(Some(CLOSING_PATIENCE)).and_then(|()| self.send_empty(true));
        }
        // a record that failed to be sealed would be plaintext
        self.records.zeroize();
    }
}

/// Opens what arrives. Nothing of a record is handed out before all of it is authentic: where it is opened into guest memory,
/// one that is not leaves zeros, and ends the lane.
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

    /// Receives the next record: into `to`, if that is long enough for it. How many bytes of `to` it has filled.
    fn next_record(&mut self, to: Option<RamSlice<'_>>) -> io::Result<usize> {
        (self.at, self.end) = (0, 0);
        if self.opener.ended() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        let mut header = [0; HEADER_LEN];
        self.inner.read_exact(&mut header).map_err(cut_off)?;
        let len = self.opener.following(&header)?;
        // never shortened: only growth has to be filled
        if self.record.len() < len {
            self.record.resize(len, 0);
        }
        let sealed = &mut self.record[..len];
        self.inner.read_exact(sealed).map_err(cut_off)?;
        let plain = len - TAG_LEN;
        let filled = match to.filter(|to| plain > 0 && plain <= to.len()) {
            Some(to) => {
                self.opener.open_into(&header, sealed, to.take(plain))?;
                plain
            }
            None => {
                self.opener.open(&header, sealed)?;
                self.end = plain;
                0
            }
        };
        if self.opener.ended() && plain == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        Ok(filled)
    }

    /// Up to `most` bytes of plaintext, at least one unless `most` is 0.
    fn take(&mut self, most: usize) -> io::Result<&[u8]> {
        while self.at == self.end && most > 0 {
            self.next_record(None)?;
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
                if self.at == self.end {
                    rest = rest.skip(self.next_record(Some(rest))?);
                    continue;
                }
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

#[cfg(test)]
mod tests;
