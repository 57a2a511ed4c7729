//! The two files of a namespace.
//!
//! | file | what it holds |
//! |---|---|
//! | `<id>.pages` | at 4096 · *n*: the first 4096 bytes of the value of page *n*. Sparse |
//! | `<id>.table` | a header of 4096 bytes; at 4096 + 128 · *n*: the entry of page *n*. Sparse |
//!
//! | entry | bytes |
//! |---|---|
//! | [`Trailer`] | 32 |
//! | length of the value | 4 |
//! | CRC-32 of VM, page number and the rest of the entry | 4 |
//! | unused, zeros | 24 |
//! | the bytes of the value above 4096 | 64 |
//!
//! A hole reads as an entry of length 0, which no value has. The lock of the table (`flock`) is
//! held while an entry is compared and replaced. Readers hold none at first: what they read while a
//! put is under way does not agree with its trailer, and they then read it once more with the lock.

use std::{
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crc32fast::Hasher;
use migration_core::{
    PAGE_SIZE,
    codec::{DecodeError, Reader, Writer},
    store::{NamespaceId, PageToGet, PageToPut, Record, StoreError, Trailer, VmNamespace, limits::MAX_VALUE_BYTES},
    vm::VmId,
};

use super::folder::{Folder, Kind};

const MAGIC: [u8; 8] = *b"LMSPACE\0";
const VERSION: u32 = 2;
/// Bytes of a header that are in use.
const HEADER_BYTES: usize = 8 + 4 + Record::BYTES + 8 + 8 + 8 + 4;
/// Where the entries begin.
const ENTRIES_AT: u64 = PAGE_SIZE as u64;
const ENTRY_BYTES: usize = 128;
/// Bytes of an entry before the bytes of the value above a page.
const ENTRY_HEAD: usize = ENTRY_BYTES - (MAX_VALUE_BYTES - PAGE_SIZE);
/// Pages that are read or written at once: 1 MiB.
const CHUNK_PAGES: usize = 256;
/// Bytes that a page takes on disk, without what the file system adds.
pub(super) const BYTES_PER_PAGE: u64 = (PAGE_SIZE + ENTRY_BYTES) as u64;
/// How long to wait before a lock that is taken is tried again.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// What is known of a namespace as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) record: Record,
    /// The longest lease that was granted.
    pub(super) lease: Duration,
    /// When the lease ends, by the store's clock.
    pub(super) ends: Duration,
    /// The number of pages were put, for the room that they take.
    pub(super) pages: u64,
}

impl Header {
    pub(super) fn extend_lease(&mut self, now: Duration, lease: Duration) {
        self.lease = self.lease.max(lease);
        self.ends = self.ends.max(now.saturating_add(lease));
    }

    /// Makes sure that the namespace is of the caller's VM (rule 24).
    pub(super) fn check_vm(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        match self.record.vm == namespace.vm {
            true => Ok(()),
            false => Err(StoreError::OtherVm(namespace.id)),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut w = Writer::new();
        w.bytes(&MAGIC).u32(VERSION).bytes(&self.record.encode());
        w.u64(millis(self.lease)).u64(millis(self.ends)).u64(self.pages);
        let mut bytes = [0; HEADER_BYTES];
        let content = w.into_bytes();
        bytes[..content.len()].copy_from_slice(&content);
        bytes[content.len()..].copy_from_slice(&crc32fast::hash(&content).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        if r.array("magic")? != MAGIC {
            return Err(DecodeError::invalid("magic", "this is no table of a namespace"));
        }
        let version = r.u32("version")?;
        if version != VERSION {
            return Err(DecodeError::invalid("version", format!("version {version} is not known")));
        }
        let record = Record::decode(&r.array("record")?)?;
        let lease = Duration::from_millis(r.u64("lease")?);
        let ends = Duration::from_millis(r.u64("end of the lease")?);
        let pages = r.u64("pages")?;
        let checksum = r.array("checksum")?;
        r.finish()?;
        if checksum != crc32fast::hash(&bytes[..HEADER_BYTES - 4]).to_le_bytes() {
            return Err(DecodeError::invalid("checksum", "it does not agree with the header"));
        }
        Ok(Self { record, lease, ends, pages })
    }
}

/// Rounds up, so that no lease ends too early.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// The open files of a namespace. The lock ends when this is dropped.
pub(super) struct Space {
    id: NamespaceId,
    table: File,
    pages: File,
    shown: String,
}

impl Space {
    /// Opens the files, without a lock.
    pub(super) fn open(folder: &Folder, id: NamespaceId) -> Result<Self, StoreError> {
        let table = folder.path(id, Kind::Table);
        let pages = folder.path(id, Kind::Pages);
        let open = |path: &Path| match folder.open_file(path) {
            Err(StoreError::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => Err(StoreError::Absent(id)),
            other => other,
        };
        // a namespace exists if its table does, but `forget` may be under way
        Ok(Self { id, table: open(&table)?, pages: open(&pages)?, shown: table.display().to_string() })
    }

    /// Opens the files and waits for the lock that every writer takes.
    pub(super) fn open_to_write(folder: &Folder, id: NamespaceId) -> Result<Self, StoreError> {
        let space = Self::open(folder, id)?;
        space.table.lock().map_err(|cause| space.io("locking", cause))?;
        space.still_there()?;
        Ok(space)
    }

    pub(super) fn id(&self) -> NamespaceId {
        self.id
    }

    /// Makes sure that the namespace was not forgotten while this waited for the lock.
    fn still_there(&self) -> Result<(), StoreError> {
        let metadata = self.table.metadata().map_err(|cause| self.io("looking at", cause))?;
        match metadata.nlink() {
            0 => Err(StoreError::Absent(self.id)),
            _ => Ok(()),
        }
    }

    /// Waits until `deadline` for the lock, together with other readers.
    fn lock_to_read(&self, deadline: Instant) -> Result<(), StoreError> {
        loop {
            match self.table.try_lock_shared() {
                Ok(()) => return Ok(()),
                Err(std::fs::TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(StoreError::TimedOut);
                }
                Err(std::fs::TryLockError::WouldBlock) => thread::sleep(LOCK_POLL),
                Err(std::fs::TryLockError::Error(cause)) => return Err(self.io("locking", cause)),
            }
        }
    }

    fn unlock(&self) -> Result<(), StoreError> {
        self.table.unlock().map_err(|cause| self.io("unlocking", cause))
    }

    /// Reads the header. The caller has the lock.
    pub(super) fn header(&self) -> Result<Header, StoreError> {
        let mut bytes = [0; HEADER_BYTES];
        read_or_zeros(&self.table, &mut bytes, 0).map_err(|cause| self.io("reading", cause))?;
        Header::decode(&bytes).map_err(|cause| StoreError::Damaged { what: self.shown.clone(), cause: Box::new(cause) })
    }

    /// Reads the header without the lock at first: it may be in the middle of a change.
    pub(super) fn header_of_reader(&self, deadline: Instant) -> Result<Header, StoreError> {
        self.still_there()?;
        self.header().or_else(|_| {
            self.lock_to_read(deadline)?;
            let header = self.still_there().and_then(|()| self.header());
            self.unlock()?;
            header
        })
    }

    pub(super) fn set_header(&self, header: &Header) -> Result<(), StoreError> {
        self.table.write_all_at(&header.encode(), 0).map_err(|cause| self.io("writing", cause))
    }

    /// Returns for each page the generation that is there. Damaged entries count as absent.
    pub(super) fn generations(&self, vm: VmId, pages: &[PageToPut<'_>]) -> Result<Vec<Option<u32>>, StoreError> {
        let mut all = Vec::with_capacity(pages.len());
        for run in runs(pages, |page| page.page) {
            let pages = &pages[run];
            for (page, entry) in pages.iter().zip(self.entries(pages[0].page, pages.len())?) {
                all.push(entry.checked(vm, page.page).map(|(trailer, _)| trailer.generation()));
            }
        }
        Ok(all)
    }

    /// Writes the values of pages, and their entries. The caller has the lock.
    pub(super) fn write(&self, vm: VmId, generation: u32, pages: &[PageToPut<'_>]) -> Result<(), StoreError> {
        for run in runs(pages, |page| page.page) {
            let pages = &pages[run];
            let mut values = vec![0; pages.len() * PAGE_SIZE];
            for (place, page) in values.chunks_exact_mut(PAGE_SIZE).zip(pages) {
                let len = page.value.len().min(PAGE_SIZE);
                place[..len].copy_from_slice(&page.value[..len]);
            }
            let at = pages[0].page * PAGE_SIZE as u64;
            self.pages.write_all_at(&values, at).map_err(|cause| self.io("writing the pages of", cause))?;
            let entries: Vec<u8> = pages.iter().flat_map(|page| Entry::new(vm, generation, page).0).collect();
            let at = entry_at(pages[0].page);
            self.table.write_all_at(&entries, at).map_err(|cause| self.io("writing", cause))?;
        }
        Ok(())
    }

    /// Waits until values and entries are on the disk. In which order they get there does not
    /// matter: a value that does not agree with its entry is missing.
    pub(super) fn synchronise(&self) -> Result<(), StoreError> {
        self.pages.sync_data().map_err(|cause| self.io("synchronising the pages of", cause))?;
        self.table.sync_data().map_err(|cause| self.io("synchronising", cause))
    }

    /// Reads what is stored of `pages`, which follow each other, and hands the values to `take`.
    ///
    /// Returns the pages that are missing. No lock is held while `take` is called.
    pub(super) fn read(
        &self,
        vm: VmId,
        pages: &[PageToGet],
        deadline: Instant,
        take: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<Vec<u64>, StoreError> {
        let first = self.load(pages)?;
        let mut again = Vec::new();
        for (at, wanted) in pages.iter().enumerate() {
            match first.value(vm, at, wanted) {
                Some(value) => take(wanted.page, &value),
                None => again.push(at),
            }
        }
        if again.is_empty() {
            return Ok(Vec::new());
        }
        // a put may have been in the middle of these
        self.lock_to_read(deadline)?;
        let second = self.still_there().and_then(|()| self.load(pages));
        self.unlock()?;
        let second = second?;
        let mut missing = Vec::new();
        for at in again {
            let wanted = &pages[at];
            match second.value(vm, at, wanted) {
                Some(value) => take(wanted.page, &value),
                None => missing.push(wanted.page),
            }
        }
        Ok(missing)
    }

    fn load(&self, pages: &[PageToGet]) -> Result<Loaded, StoreError> {
        let first = pages.first().map_or(0, |page| page.page);
        let entries = self.entries(first, pages.len())?;
        let mut values = vec![0; pages.len() * PAGE_SIZE];
        read_or_zeros(&self.pages, &mut values, first * PAGE_SIZE as u64)
            .map_err(|cause| self.io("reading the pages of", cause))?;
        Ok(Loaded { entries, values })
    }

    fn entries(&self, first: u64, count: usize) -> Result<Vec<Entry>, StoreError> {
        let mut bytes = vec![0; count * ENTRY_BYTES];
        read_or_zeros(&self.table, &mut bytes, entry_at(first)).map_err(|cause| self.io("reading", cause))?;
        Ok(bytes.as_chunks().0.iter().map(|&entry| Entry(entry)).collect())
    }

    fn io(&self, step: &str, cause: io::Error) -> StoreError {
        StoreError::io(format!("{step} {}", self.shown))(cause)
    }
}

/// Entries and pages as they were read: nothing of them was checked.
struct Loaded {
    entries: Vec<Entry>,
    values: Vec<u8>,
}

impl Loaded {
    /// Returns the value of the page at position `at`, if it is the wanted one.
    fn value(&self, vm: VmId, at: usize, wanted: &PageToGet) -> Option<Vec<u8>> {
        let entry = self.entries.get(at)?;
        let (trailer, len) = entry.checked(vm, wanted.page)?;
        let mut value = self.values.get(at * PAGE_SIZE..(at + 1) * PAGE_SIZE)?.to_vec();
        value.extend_from_slice(entry.overflow());
        value.truncate(len);
        trailer.proves(vm, wanted.page, wanted.generation, &value).then_some(value)
    }
}

/// An entry of the table.
struct Entry([u8; ENTRY_BYTES]);

impl Entry {
    fn new(vm: VmId, generation: u32, page: &PageToPut<'_>) -> Self {
        let mut entry = Self([0; ENTRY_BYTES]);
        let trailer = Trailer::new(vm, page.page, generation, page.value);
        entry.0[..Trailer::BYTES].copy_from_slice(&trailer.encode());
        entry.0[32..36].copy_from_slice(&(page.value.len() as u32).to_le_bytes());
        let above = page.value.get(PAGE_SIZE..).unwrap_or_default();
        entry.0[ENTRY_HEAD..ENTRY_HEAD + above.len()].copy_from_slice(above);
        let checksum = entry.checksum(vm, page.page);
        entry.0[36..40].copy_from_slice(&checksum.to_le_bytes());
        entry
    }

    /// Returns the trailer and the length of the value, if the entry is one of this page and not
    /// damaged.
    fn checked(&self, vm: VmId, page: u64) -> Option<(Trailer, usize)> {
        let trailer = Trailer::decode(self.0.first_chunk()?);
        let mut r = Reader::new(&self.0[Trailer::BYTES..]);
        let len = r.u32("length").ok()? as usize;
        let checksum = r.array("checksum").ok()?;
        let good = (1..=MAX_VALUE_BYTES).contains(&len) && checksum == self.checksum(vm, page).to_le_bytes();
        good.then_some((trailer, len))
    }

    fn overflow(&self) -> &[u8] {
        &self.0[ENTRY_HEAD..]
    }

    fn checksum(&self, vm: VmId, page: u64) -> u32 {
        let mut hasher = Hasher::new();
        hasher.update(&vm.0);
        hasher.update(&page.to_le_bytes());
        hasher.update(&self.0[..36]);
        hasher.update(self.overflow());
        hasher.finalize()
    }
}

fn entry_at(page: u64) -> u64 {
    ENTRIES_AT + page * ENTRY_BYTES as u64
}

/// Fills `bytes` from the file. What is beyond its end reads as zeros.
fn read_or_zeros(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, at) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                bytes = &mut bytes[read..];
                at += read as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Cuts a list of pages into runs of consecutive pages, none longer than [`CHUNK_PAGES`]. Returns
/// positions in the list.
pub(super) fn runs<T>(pages: &[T], number: impl Fn(&T) -> u64) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, page) in pages.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.len() < CHUNK_PAGES && number(&pages[at - 1]) + 1 == number(page) => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use migration_core::store::{Owner, Purpose};

    use super::*;

    #[test]
    fn a_header_that_is_not_right_is_refused() {
        let record = Record { vm: VmId([1; 16]), purpose: Purpose::Stage, owner: Owner::new("host-7").unwrap() };
        let lease = Duration::from_millis(7);
        let header = Header { record, lease, ends: Duration::from_secs(9), pages: 3 };
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        for at in 0..HEADER_BYTES {
            let mut bytes = header.encode();
            bytes[at] ^= 0x10;
            assert!(Header::decode(&bytes).is_err(), "byte {at}");
        }
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::MAX), u64::MAX);
    }

    #[test]
    fn an_entry_belongs_to_one_page_and_shows_damage() {
        let vm = VmId([1; 16]);
        let value = [7; MAX_VALUE_BYTES];
        let entry = Entry::new(vm, 5, &PageToPut { page: 3, value: &value });
        assert_eq!(entry.checked(vm, 3).map(|(trailer, len)| (trailer.generation(), len)), Some((5, MAX_VALUE_BYTES)));
        assert!(entry.checked(vm, 4).is_none() && entry.checked(VmId([2; 16]), 3).is_none());
        assert!(Entry([0; ENTRY_BYTES]).checked(VmId([0; 16]), 0).is_none());
        for at in (0..40).chain(ENTRY_HEAD..ENTRY_BYTES) {
            let mut bytes = entry.0;
            bytes[at] ^= 1;
            assert!(Entry(bytes).checked(vm, 3).is_none(), "byte {at}");
        }
    }

    #[test]
    fn runs_are_consecutive_and_bounded() {
        let pages = [1, 2, 3, 7, 9, 10];
        assert_eq!(runs(&pages, |&page| page), [0..3, 3..4, 4..6]);
        let long: Vec<u64> = (0..600).collect();
        assert_eq!(runs(&long, |&page| page), [0..256, 256..512, 512..600]);
        assert_eq!(runs(&[], |&page: &u64| page), []);
    }

    #[test]
    fn what_is_beyond_the_end_of_a_file_reads_as_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &[1, 2, 3]).unwrap();
        let mut bytes = [0; 7];
        read_or_zeros(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [1, 2, 3, 0, 0, 0, 0]);
        let mut bytes = [0; 4];
        read_or_zeros(&file, &mut bytes, 2).unwrap();
        assert_eq!(bytes, [3, 0, 0, 0]);
    }
}
