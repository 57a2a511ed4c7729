//! Tests of single records as they are sent and received.

use std::sync::{Mutex, MutexGuard};

use migration_core::{GuestRam, HeapRam, RamLayout, RamRegion};

use super::*;
use crate::{KeyLimits, Suite, aead::RustCrypto, secret::Secret};

/// The largest plaintext of the writers' records in these tests.
const MAX: usize = MIN_PLAINTEXT;

/// The calls that a link received.
#[derive(Default)]
struct Log {
    writes: Vec<Vec<u8>>,
    idle: Vec<Option<Duration>>,
    short: bool,
    broken: bool,
}

#[derive(Clone, Default)]
struct Tap(Arc<Mutex<Log>>);

impl Tap {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    fn writer(&self, closed: &Arc<AtomicBool>) -> SecureWriter {
        let sealer = RecordSealer::new(Suite::Aes128Gcm, &RustCrypto, Secret::new([1; 32]), KeyLimits::default());
        SecureWriter::new(Box::new(self.clone()), sealer.unwrap(), MAX, closed.clone())
    }

    /// Returns for each write the plaintext length of each record, and whether it is the last.
    fn records(&self) -> Vec<Vec<(usize, bool)>> {
        let log = self.log();
        let cut = |mut bytes: &[u8]| {
            let mut records = Vec::new();
            while let Some((header, rest)) = bytes.split_first_chunk() {
                let len = u32::from_le_bytes(*header) as usize & 0xff_ffff;
                records.push((len, header[3] != 0));
                bytes = &rest[OVERHEAD - 4 + len..];
            }
            records
        };
        log.writes.iter().map(|write| cut(write)).collect()
    }
}

impl WriteHalf for Tap {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        assert!(slices.is_empty());
        let mut log = self.log();
        log.writes.push(head.to_vec());
        if log.broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.log().idle.push(timeout);
        Ok(())
    }

    fn keep_queue_short(&mut self) {
        self.log().short = true;
    }
}

/// Reads what was written.
struct Tape(Vec<u8>);

impl ReadHalf for Tape {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        if buf.len() > self.0.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.copy_from_slice(&self.0[..buf.len()]);
        self.0.drain(..buf.len());
        Ok(())
    }

    fn read_ram(&mut self, _: &[RamSlice<'_>]) -> io::Result<()> {
        unreachable!("sealed bytes are not read into guest memory")
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

fn reader(tap: &Tap) -> SecureReader {
    let opener = RecordOpener::new(Suite::Aes128Gcm, &RustCrypto, Secret::new([1; 32])).unwrap();
    SecureReader::new(Box::new(Tape(tap.log().writes.concat())), opener)
}

fn ram() -> HeapRam {
    HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: 4 * MAX as u64 }]).unwrap()).unwrap()
}

#[test]
fn small_records_go_out_beside_a_large_one_while_there_is_room() {
    let ram = ram();
    let slice = |len: usize| ram.slice_at(0, len as u64).unwrap();
    let beside = SMALL_RECORDS_ROOM - OVERHEAD;
    for (head, slices, expected) in [
        (beside, vec![MAX], vec![vec![beside, MAX]]),
        (beside + 1, vec![MAX], vec![vec![beside + 1], vec![MAX]]),
        // a piece of `OWN_RECORD_MIN` bytes has a record of its own
        (10, vec![OWN_RECORD_MIN], vec![vec![10, OWN_RECORD_MIN]]),
        (10, vec![OWN_RECORD_MIN - 1], vec![vec![10 + OWN_RECORD_MIN - 1]]),
        (10, vec![20, 30, OWN_RECORD_MIN, 40], vec![vec![60, OWN_RECORD_MIN, 40]]),
        (MAX + 1, vec![], vec![vec![MAX, 1]]),
        (0, vec![MAX + OWN_RECORD_MIN], vec![vec![MAX], vec![OWN_RECORD_MIN]]),
    ] {
        let tap = Tap::default();
        let mut writer = tap.writer(&Arc::default());
        let slices: Vec<_> = slices.into_iter().map(slice).collect();
        writer.write_all(&vec![7; head], &slices).unwrap();
        let expected: Vec<Vec<_>> =
            expected.into_iter().map(|records| records.into_iter().map(|len| (len, false)).collect()).collect();
        assert_eq!(tap.records(), expected, "{head} and {slices:?}");
    }
}

#[test]
fn the_closing_record_is_sent_unless_the_lane_failed_or_was_closed() {
    let closed = Arc::new(AtomicBool::new(false));
    // a lane on which only the first empty record was sent is closed in order, too
    let tap = Tap::default();
    let mut writer = tap.writer(&closed);
    writer.send_empty(false).unwrap();
    drop(writer);
    assert_eq!(tap.records(), [[(0, false)], [(0, true)]]);
    assert_eq!(tap.log().idle, [Some(CLOSING_TIMEOUT)]);
    // a closing record is sent once
    let tap = Tap::default();
    let mut writer = tap.writer(&closed);
    writer.send_empty(true).unwrap();
    drop(writer);
    assert_eq!(tap.records(), [[(0, true)]]);
    // after a failed write no closing record is sent
    let tap = Tap::default();
    let mut writer = tap.writer(&closed);
    tap.log().broken = true;
    writer.write_all(b"x", &[]).unwrap_err();
    tap.log().broken = false;
    drop(writer);
    assert_eq!(tap.records(), [[(1, false)]]);
    // nor after the channel was closed
    let tap = Tap::default();
    let mut writer = tap.writer(&closed);
    writer.write_all(b"x", &[]).unwrap();
    closed.store(true, Ordering::Release);
    drop(writer);
    assert_eq!(tap.records(), [[(1, false)]]);
}

#[test]
fn hints_reach_the_link() {
    let tap = Tap::default();
    let mut writer = tap.writer(&Arc::default());
    writer.set_idle_timeout(Some(Duration::from_secs(3))).unwrap();
    writer.keep_queue_short();
    let log = tap.log();
    assert_eq!((&log.idle[..], log.short), (&[Some(Duration::from_secs(3))][..], true));
}

#[test]
fn a_record_goes_straight_into_memory_that_has_room_for_it() {
    let tap = Tap::default();
    let mut writer = tap.writer(&Arc::default());
    writer.write_all(b"abcd", &[]).unwrap();
    writer.write_all(b"efgh", &[]).unwrap();
    let ram = ram();
    let slice = |len| ram.slice_at(0, len).unwrap();
    let mut reader = reader(&tap);
    assert_eq!(reader.next_record(Some(slice(4))).unwrap(), 4);
    assert_eq!((reader.returned, reader.end), (0, 0));
    let mut got = [0; 4];
    <dyn GuestRam>::read(&ram, 0, &mut got).unwrap();
    assert_eq!(&got, b"abcd");
    // the record is opened in the buffer if the memory is too small for it
    assert_eq!(reader.next_record(Some(slice(3))).unwrap(), 0);
    assert_eq!((reader.returned, reader.end), (0, 4));
}

#[test]
fn empty_records_end_nothing_and_the_last_one_may_have_content() {
    let tap = Tap::default();
    let mut writer = tap.writer(&Arc::default());
    writer.send_empty(false).unwrap();
    writer.write_all(b"ab", &[]).unwrap();
    writer.send_empty(false).unwrap();
    // no writer puts data into a closing record, but a reader accepts it
    let record = writer.reserve(2).unwrap();
    writer.records[record.clone()][HEADER_LEN..HEADER_LEN + 2].copy_from_slice(b"cd");
    writer.sealer.seal(&mut writer.records[record], true).unwrap();
    writer.flush().unwrap();
    let ram = ram();
    let slice = ram.slice_at(0, 4).unwrap();
    let mut from = reader(&tap);
    from.read_ram(&[slice]).unwrap();
    let mut got = [0; 4];
    <dyn GuestRam>::read(&ram, 0, &mut got).unwrap();
    assert_eq!(&got, b"abcd");
    let end = from.read_exact(&mut got).unwrap_err();
    assert!(end.to_string().contains("closed the connection"), "{end}");
    reader(&tap).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abcd");
}
