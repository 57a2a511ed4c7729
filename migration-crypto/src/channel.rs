//! The two halves of a secure channel, which write and read records.

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

/// The longest time that the closing record of a dropped writer may wait for room in the link. If
/// it takes longer, no closing record is sent and the peer reports a cut link.
const CLOSING_TIMEOUT: Duration = Duration::from_millis(200);

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        let kind = match error {
            RecordError::Truncated => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

/// The smallest size in bytes of a piece of guest memory that gets records of its own. The cipher
/// reads and writes such pieces without a further copy. Smaller pieces share records, because each
/// record costs a few calls and 24 bytes.
const OWN_RECORD_MIN: usize = 32 << 10;
/// The room in bytes for small records that are sent with a large one by one call.
const SMALL_RECORDS_ROOM: usize = 4 << 10;

/// The writing half: seals data into records and sends them. A large piece of guest memory is
/// sealed directly; small pieces are copied into a common record first.
pub(crate) struct SecureWriter {
    inner: Box<dyn WriteHalf>,
    sealer: RecordSealer,
    /// Records that are not sent yet, up to `filled`. The buffer is reused.
    records: Vec<u8>,
    filled: usize,
    /// The largest plaintext of a record in bytes.
    max_plaintext: usize,
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
        let max_plaintext = record_bytes.clamp(MIN_PLAINTEXT, MAX_PLAINTEXT);
        Self { inner, sealer, records: Vec::new(), filled: 0, max_plaintext, healthy: true, closed }
    }

    /// Sends an empty record. The first one proves that this side has the keys. One with `last` set
    /// closes this direction of the channel.
    pub(crate) fn send_empty(&mut self, last: bool) -> io::Result<()> {
        self.healthy = false;
        let record = self.reserve(0)?;
        self.sealer.seal(&mut self.records[record], last)?;
        self.flush()?;
        self.healthy = !last;
        Ok(())
    }

    /// Reserves the place of a record with `len` bytes of plaintext after the records that are not
    /// sent yet, and returns its range in `records`. Sends these records first if there is not
    /// enough room.
    fn reserve(&mut self, len: usize) -> io::Result<Range<usize>> {
        if self.filled > 0 && self.filled + len + OVERHEAD > self.max_plaintext + OVERHEAD + SMALL_RECORDS_ROOM {
            self.flush()?;
        }
        let record = self.filled..self.filled + len + OVERHEAD;
        // never shortened: old content is overwritten anyway, and only growth has to be initialized
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

/// The part of a write that is not sealed yet.
struct Unsealed<'a, S> {
    head: &'a [u8],
    /// The current piece of guest memory; never empty.
    slice: Option<RamSlice<'a>>,
    slices: S,
}

impl<'a, S: Iterator<Item = RamSlice<'a>>> Unsealed<'a, S> {
    fn new(head: &'a [u8], mut slices: S) -> Self {
        let slice = slices.find(|slice| !slice.is_empty());
        Self { head, slice, slices }
    }

    /// Takes up to `max` bytes of guest memory, if the next piece is large enough for a record of
    /// its own.
    fn take_large(&mut self, max: usize) -> Option<RamSlice<'a>> {
        let slice = self.slice.filter(|slice| self.head.is_empty() && slice.len() >= OWN_RECORD_MIN)?.take(max);
        self.advance(slice.len());
        Some(slice)
    }

    /// Returns how many bytes, at most `max`, come before the next piece that gets a record of its
    /// own.
    fn small_len(&self, max: usize) -> usize
    where
        S: Clone,
    {
        let mut sum = self.head.len();
        let small = |slice: &RamSlice<'_>| slice.len() < OWN_RECORD_MIN;
        for slice in self.slice.into_iter().chain(self.slices.clone()).take_while(small) {
            if sum >= max {
                break;
            }
            sum += slice.len();
        }
        sum.min(max)
    }

    /// Copies the next bytes into `to` and takes them out.
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
            self.advance(taken);
        }
    }

    /// Advances by `bytes` bytes of the current piece.
    fn advance(&mut self, bytes: usize) {
        let left = self.slice.map(|slice| slice.skip(bytes)).filter(|slice| !slice.is_empty());
        self.slice = left.or_else(|| self.slices.find(|slice| !slice.is_empty()));
    }
}

impl WriteHalf for SecureWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.healthy = false;
        let mut rest = Unsealed::new(head, slices.iter().copied());
        while !rest.head.is_empty() || rest.slice.is_some() {
            if let Some(slice) = rest.take_large(self.max_plaintext) {
                let record = self.reserve(slice.len())?;
                self.sealer.seal_from(slice, &mut self.records[record])?;
                continue;
            }
            let len = rest.small_len(self.max_plaintext);
            let record = self.reserve(len)?;
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
            // Without a closing record the peer reports a cut. If the link has no room for one,
            // that is true.
            self.inner.set_deadline(Instant::now().checked_add(CLOSING_TIMEOUT));
            let _ = self.inner.set_idle_timeout(Some(CLOSING_TIMEOUT)).and_then(|()| self.send_empty(true));
        }
        // if sealing failed, the buffer may hold plaintext
        self.records.zeroize();
    }
}

/// The reading half: receives records and opens them. No part of a record is returned before the
/// whole record is authentic. A record that is opened directly into guest memory and fails leaves
/// zeros there, and its failure ends the lane.
pub(crate) struct SecureReader {
    inner: Box<dyn ReadHalf>,
    opener: RecordOpener,
    /// The plaintext of the current record, up to `end`. The buffer is reused.
    record: Vec<u8>,
    /// The number of bytes of `record` that were already returned.
    returned: usize,
    end: usize,
}

impl SecureReader {
    pub(crate) fn new(inner: Box<dyn ReadHalf>, opener: RecordOpener) -> Self {
        Self { inner, opener, record: Vec::new(), returned: 0, end: 0 }
    }

    /// Receives the next record. Opens it into `to` if `to` has room for it, otherwise into
    /// `record`. Returns the number of bytes of `to` that were filled.
    fn next_record(&mut self, to: Option<RamSlice<'_>>) -> io::Result<usize> {
        self.returned = 0;
        self.end = 0;
        if self.opener.ended() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        let mut header = [0; HEADER_LEN];
        self.inner.read_exact(&mut header).map_err(cut_off)?;
        let len = self.opener.sealed_len(&header)?;
        // never shortened: only growth has to be initialized
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

    /// Returns up to `max` bytes of plaintext, and at least one unless `max` is 0.
    fn take(&mut self, max: usize) -> io::Result<&[u8]> {
        while self.returned == self.end && max > 0 {
            self.next_record(None)?;
        }
        let from = self.returned;
        self.returned += max.min(self.end - self.returned);
        Ok(&self.record[from..self.returned])
    }
}

/// Converts the error for an early end of the stream to [`RecordError::Truncated`].
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
                if self.returned == self.end {
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

/// Closes the inner channel and stops the writer from sending its closing record.
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
