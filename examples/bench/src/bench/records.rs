//! The record layer compared with the ciphers alone, on one core.
//!
//! Both seal the same memory in pieces of the same length. *Warm* memory is one piece that is
//! sealed repeatedly; the cipher alone seals it in place. *Cold* memory is larger than the caches,
//! as guest RAM is; the cipher alone seals it into a buffer. What is sealed is not sent. Opening
//! reads from a stream in memory; the cipher alone pays for the same copy.

use std::{
    hint::black_box,
    io,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{ReadHalf, WriteHalf},
    page::{RamLayout, RamRegion},
    ram::{GuestRam, HeapRam, RamSlice},
};
use migration_crypto::{
    KeyLimits, Suite,
    aead::{AeadKey, NONCE_LEN, TAG_LEN},
    fixed_key,
    record::OVERHEAD,
};
use serde::Serialize;

use super::figures::median;
use minivmm_client::encryption::Library;

/// The bytes of a piece for which there is a target.
pub(super) const PIECE: usize = 64 << 10;
/// The bytes of records: the smallest limit, a sender's default, and the largest limit.
const RECORDS: [usize; 3] = [PIECE, 256 << 10, 1 << 20];
/// The bytes of cold memory, more than the caches hold.
const COLD: u64 = 128 << 20;
/// The number of records of the stream that is opened.
const STREAM: usize = 16;
/// The time of one measurement, and the number of measurements.
const TIME: Duration = Duration::from_millis(60);
const ROUNDS: usize = 5;

/// The rates of one cipher of one library in GB/s.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rates {
    pub(super) library: &'static str,
    pub(super) suite: &'static str,
    /// In pieces of [`PIECE`], in place.
    pub(super) seal_warm: f64,
    /// In pieces of [`PIECE`], into a buffer.
    pub(super) seal_cold: f64,
    /// Opening in place, with the copy into the place before, because opening destroys the
    /// ciphertext.
    pub(super) open_warm: f64,
    /// The record layer's rates, by the length of records.
    pub(super) records: Vec<Records>,
}

/// The rates of the record layer in GB/s.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Records {
    pub(super) bytes: usize,
    pub(super) seal_warm: f64,
    pub(super) seal_cold: f64,
    pub(super) open_warm: f64,
}

impl Rates {
    /// Returns the record layer's share of the rate of the cipher alone, in records of [`PIECE`]:
    /// for sealing warm memory, for sealing cold memory, and for opening.
    pub(super) fn shares(&self) -> Option<[f64; 3]> {
        let records = self.records.iter().find(|r| r.bytes == PIECE)?;
        Some([
            records.seal_warm / self.seal_warm,
            records.seal_cold / self.seal_cold,
            records.open_warm / self.open_warm,
        ])
    }
}

/// Measures every cipher of both libraries.
pub(super) fn measure() -> Result<Vec<Rates>, String> {
    let libraries = [Library::Fastest, Library::Rust].map(Library::backend);
    let several = libraries[0].name() != libraries[1].name();
    let cold = ram(COLD)?;
    let warm = ram(*RECORDS.last().unwrap_or(&PIECE) as u64)?;
    let mut all = Vec::new();
    for backend in &libraries[if several { 0 } else { 1 }..] {
        for suite in Suite::ALL {
            let key = backend.key(suite, &vec![1; suite.key_len()]).map_err(|e| e.to_string())?;
            let writer = |bytes| {
                let limits = KeyLimits::default();
                fixed_key::writer(Box::new(Nobody), suite, *backend, bytes, limits).map_err(|e| e.to_string())
            };
            let mut writers = Vec::new();
            for bytes in RECORDS {
                let stream =
                    stream(bytes, &warm, |to| fixed_key::writer(to, suite, *backend, bytes, KeyLimits::default()))?;
                writers.push((bytes, writer(bytes)?, stream));
            }
            let mut figures: Vec<Vec<f64>> = vec![Vec::new(); 3 + 3 * RECORDS.len()];
            for _ in 0..ROUNDS {
                let mut column = figures.iter_mut();
                let mut note = |rate: Result<f64, String>| -> Result<(), String> {
                    let rate = rate?;
                    column.next().into_iter().for_each(|c| c.push(rate));
                    Ok(())
                };
                let mut data = vec![0x5a; PIECE];
                note(bare_seal(&*key, &mut data))?;
                note(bare_seal_from(&*key, &cold, &mut data))?;
                note(bare_open(&*key))?;
                for (bytes, writer, stream) in &mut writers {
                    note(records_seal(writer, &warm, *bytes as u64, *bytes))?;
                    note(records_seal(writer, &cold, COLD, *bytes))?;
                    note(records_open(stream, &warm, *bytes, |from| fixed_key::reader(from, suite, *backend)))?;
                }
            }
            let mut medians = figures.into_iter().map(|rates| median(rates).unwrap_or_default());
            let mut next = || medians.next().unwrap_or_default();
            let (seal_warm, seal_cold, open_warm) = (next(), next(), next());
            let records =
                RECORDS.map(|bytes| Records { bytes, seal_warm: next(), seal_cold: next(), open_warm: next() });
            let (library, suite) = (backend.name(), suite.name());
            all.push(Rates { library, suite, seal_warm, seal_cold, open_warm, records: records.into() });
        }
    }
    Ok(all)
}

fn ram(bytes: u64) -> Result<HeapRam, String> {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: bytes }]).map_err(|e| e.to_string())?;
    let ram = HeapRam::new(layout).map_err(|e| e.to_string())?;
    let block = vec![0x5a; 1 << 20];
    for at in (0..bytes).step_by(block.len()) {
        ram.write(at, &block).map_err(|e| e.to_string())?;
    }
    Ok(ram)
}

fn slice(ram: &HeapRam, at: u64, len: usize) -> Result<RamSlice<'_>, String> {
    ram.slice_at(at, len as u64).map_err(|e| e.to_string())
}

/// Returns the rate of `work` in GB/s. `work` returns the bytes that it has processed.
fn rate(mut work: impl FnMut() -> Result<usize, String>) -> Result<f64, String> {
    work()?;
    let (begin, mut done) = (Instant::now(), 0);
    while begin.elapsed() < TIME {
        done += work()?;
    }
    Ok(done as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

fn bare_seal(key: &dyn AeadKey, data: &mut [u8]) -> Result<f64, String> {
    rate(|| {
        black_box(key.seal(&[0; NONCE_LEN], &[0; 8], data).map_err(|e| e.to_string())?);
        Ok(PIECE)
    })
}

fn bare_seal_from(key: &dyn AeadKey, ram: &HeapRam, data: &mut [u8]) -> Result<f64, String> {
    let mut at = 0;
    rate(|| {
        let piece = slice(ram, at, PIECE)?;
        black_box(key.seal_from(&[0; NONCE_LEN], &[0; 8], piece, data).map_err(|e| e.to_string())?);
        at = (at + PIECE as u64) % COLD;
        Ok(PIECE)
    })
}

fn bare_open(key: &dyn AeadKey) -> Result<f64, String> {
    let mut sealed = vec![0; PIECE];
    let tag = key.seal(&[0; NONCE_LEN], &[0; 8], &mut sealed).map_err(|e| e.to_string())?;
    sealed.extend(tag);
    // as many records as the stream has, so that the caches hold the same part of both
    let all = sealed.repeat(STREAM);
    let (mut work, mut at) = (sealed, 0);
    rate(|| {
        work.copy_from_slice(&all[at..at + PIECE + TAG_LEN]);
        black_box(key.open(&[0; NONCE_LEN], &[0; 8], &mut work).map_err(|e| e.to_string())?);
        at = (at + PIECE + TAG_LEN) % all.len();
        Ok(PIECE)
    })
}

fn records_seal(writer: &mut impl WriteHalf, ram: &HeapRam, len: u64, bytes: usize) -> Result<f64, String> {
    let mut at = 0;
    rate(|| {
        writer.write_all(b"", &[slice(ram, at, bytes)?]).map_err(|e| e.to_string())?;
        at = (at + bytes as u64) % len;
        Ok(bytes)
    })
}

/// Returns records as they are on the wire.
fn stream<W: WriteHalf>(
    bytes: usize,
    ram: &HeapRam,
    writer: impl FnOnce(Box<dyn WriteHalf>) -> io::Result<W>,
) -> Result<Vec<u8>, String> {
    let kept = std::sync::Arc::new(std::sync::Mutex::new(Vec::with_capacity(STREAM * (bytes + OVERHEAD))));
    let mut writer = writer(Box::new(Keeper(kept.clone()))).map_err(|e| e.to_string())?;
    for _ in 0..STREAM {
        writer.write_all(b"", &[slice(ram, 0, bytes)?]).map_err(|e| e.to_string())?;
    }
    drop(writer);
    let mut kept = kept.lock().map_err(|e| e.to_string())?;
    Ok(std::mem::take(&mut *kept))
}

fn records_open<R: ReadHalf>(
    stream: &[u8],
    ram: &HeapRam,
    bytes: usize,
    reader: impl Fn(Box<dyn ReadHalf>) -> io::Result<R>,
) -> Result<f64, String> {
    // shared by all readers instead of copied
    let stream: std::sync::Arc<[u8]> = stream.into();
    let mut time = Duration::ZERO;
    let mut done = 0;
    while time < TIME {
        let mut reader = reader(Box::new(Tape(stream.clone(), 0))).map_err(|e| e.to_string())?;
        let slice = slice(ram, 0, bytes)?;
        // the buffer is allocated once in the life of a lane
        reader.read_ram(&[slice]).map_err(|e| e.to_string())?;
        let begin = Instant::now();
        for _ in 1..STREAM {
            reader.read_ram(&[slice]).map_err(|e| e.to_string())?;
            done += bytes;
        }
        time += begin.elapsed();
    }
    Ok(done as f64 / time.as_secs_f64() / 1e9)
}

/// A link that discards everything.
struct Nobody;

impl WriteHalf for Nobody {
    fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        black_box(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// A link that stores everything.
struct Keeper(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl WriteHalf for Keeper {
    fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        self.0.lock().map_err(|e| io::Error::other(e.to_string()))?.extend_from_slice(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// A link that returns the stored bytes.
struct Tape(std::sync::Arc<[u8]>, usize);

impl ReadHalf for Tape {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let next = self.0.get(self.1..self.1 + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(next);
        self.1 += buf.len();
        Ok(())
    }

    fn read_ram(&mut self, _: &[RamSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_same_length() {
        let records = |bytes, rate| Records { bytes, seal_warm: rate, seal_cold: rate, open_warm: rate };
        let rates = Rates {
            library: "l",
            suite: "s",
            seal_warm: 10.0,
            seal_cold: 5.0,
            open_warm: 8.0,
            records: vec![records(1 << 20, 1.0), records(PIECE, 4.0)],
        };
        assert_eq!(rates.shares(), Some([0.4, 0.8, 0.5]));
    }

    #[test]
    fn a_stream_is_opened_as_it_was_sealed() {
        let backend = Library::Rust.backend();
        let memory = ram(1 << 20).unwrap();
        let limits = KeyLimits::default();
        let suite = Suite::Aes128Gcm;
        let stream = stream(PIECE, &memory, |to| fixed_key::writer(to, suite, backend, PIECE, limits)).unwrap();
        // the closing record, too
        assert_eq!(stream.len(), STREAM * (PIECE + OVERHEAD) + OVERHEAD);
        let mut reader = fixed_key::reader(Box::new(Tape(stream.into(), 0)), suite, backend).unwrap();
        let mut got = vec![0; PIECE];
        reader.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == 0x5a));
    }
}
