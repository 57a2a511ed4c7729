//! A snapshot of a VM in one file.
//!
//! | at | what |
//! |---|---|
//! | 0 | the header, 4096 bytes, with a CRC-32 of itself and of the table |
//! | 4096 × (1 + *n*) | page *n*, where the RAM regions are laid end to end; a hole for a page of zeros |
//! | behind the last page | the table: which pages were put, which of them hold data, a CRC-32 of each of these, the state |

#[cfg(test)]
mod tests;

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{self, Path, PathBuf},
};

use bytes::Bytes;
use migration_core::{
    PAGE_SIZE, PageRange, PageSet,
    codec::{DecodeError, Reader, Writer},
    page::MAX_PAGES,
    state::MAX_STATE,
    store::{PageContent, VersionStore, check_version_read, not_in_version},
};

use crate::{
    atomic_file::AtomicFile,
    file_errors::{at, cut, damaged, invalid},
};

const MAGIC: [u8; 8] = *b"LMSNAPSH";
const VERSION: u32 = 1;
/// How a snapshot may be damaged.
const SHORT: &str = "it is cut short";
/// As long as a page, so that pages are aligned.
const HEADER: u64 = PAGE_SIZE as u64;
/// Pages that are written, or read, at once.
const RUN: usize = 256;

/// Keeps one snapshot of a VM in a file that is whole or not there.
///
/// What is put goes into `FILE.new`, beside the file; [`commit`](VersionStore::commit) renames it
/// when all of it has reached the disk. So a crash at any moment, of the process or of the host,
/// leaves what was there before or the new snapshot, and when `commit` returns it is the new one. A
/// `FILE.new` that a crash has left is removed by the next attempt. If `FILE.new` is something that
/// others have put there, it is left alone, and another name is used (see [`AtomicFile`]).
///
/// It takes **one** checkpoint: after its commit the file is finished, and a further `put` is an
/// error. The file is sparse: pages that were not put and pages of zeros take no room. In memory, a
/// page takes about 4 bytes while the file is written or read.
///
/// CRCs find damage; **they do not stop anyone who can write there from replacing the VM's
/// memory**, and nothing is encrypted. The file's mode is 0600 whatever the umask.
///
/// # Example
///
/// ```
/// use migration_core::{PAGE_SIZE, store::VersionStore};
/// use migration_transport::SnapshotFile;
///
/// # let parent = tempfile::tempdir()?;
/// # let path = parent.path().join("vm-7.snapshot");
/// let mut store = SnapshotFile::create(&path, 1024)?;
/// store.put(3, Some(&[7; PAGE_SIZE]))?;
/// store.put(4, None)?;
/// assert!(!path.exists());
/// store.commit(1, b"state".as_slice().into())?;
///
/// // another process, later
/// let mut store = SnapshotFile::open(&path, 1 << 20)?;
/// assert_eq!(store.latest(), Some((1, b"state".as_slice().into())));
/// let mut pages = Vec::new();
/// store.restore(&mut |page, data| Ok(pages.push((page, data.is_some()))))?;
/// assert_eq!(pages, [(3, true), (4, false)]);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct SnapshotFile {
    path: PathBuf,
    file: Handle,
    pages: u64,
    stage: Stage,
}

/// The file of a snapshot.
enum Handle {
    /// It is, or was, written by this store.
    New(AtomicFile),
    /// It was opened.
    Whole(File),
}

impl Handle {
    fn file(&self) -> &File {
        match self {
            Self::New(new) => new.file(),
            Self::Whole(file) => file,
        }
    }
}

enum Stage {
    Writing(Writing),
    /// Everything but the pages' data was checked.
    Finished(Table),
    /// A part could not be kept: what is left is to discard it.
    Failed,
    /// It was discarded, or it is not known whether the rename reached the disk.
    Ended(&'static str),
}

/// What is put, until it is committed.
struct Writing {
    put: PageSet,
    data: PageSet,
    /// Of every page with data; of others it means nothing.
    crcs: Vec<u32>,
    /// Data that goes to the file in one piece, from the page `first` on.
    run: Vec<u8>,
    first: u64,
}

impl SnapshotFile {
    /// Begins a snapshot of a VM with `pages` pages that is to be found at `path` once it is
    /// committed. A file that is there already stays until then, and is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceBusy`] when a snapshot is just being written to this file;
    /// [`ErrorKind::AlreadyExists`] when something else than a file is there;
    /// [`ErrorKind::PermissionDenied`] when the file there belongs to another user; what the file
    /// system says.
    pub fn create(path: &Path, pages: u64) -> io::Result<Self> {
        let path = path::absolute(path)?;
        if pages > MAX_PAGES || path.file_name().is_none() {
            let why = format!("not a file, or {pages} pages, more than {MAX_PAGES}");
            return Err(at(&path)(io::Error::new(ErrorKind::InvalidInput, why)));
        }
        let new = AtomicFile::create(&path)?;
        // one hole, which pages and table fill
        new.file().set_len(HEADER + pages * PAGE_SIZE as u64).map_err(roomless(&new.unfinished_path(), pages))?;
        let (put, data) = (PageSet::empty(pages), PageSet::empty(pages));
        let crcs = vec![0; pages as usize];
        let stage = Stage::Writing(Writing { put, data, crcs, run: Vec::with_capacity(RUN * PAGE_SIZE), first: 0 });
        Ok(Self { path, file: Handle::New(new), pages, stage })
    }

    /// Opens a snapshot of a VM that has `max_pages` pages at the most, and checks all but its
    /// pages; these are checked one by one when they are [restored](VersionStore::restore).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] when it is no snapshot, damaged or cut short: the words say
    /// where; what the file system says.
    pub fn open(path: &Path, max_pages: u64) -> io::Result<Self> {
        let path = path::absolute(path)?;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(at(&path))?;
        let metadata = file.metadata().map_err(at(&path))?;
        if !metadata.is_file() {
            return Err(damaged(&path, "not a regular file"));
        }
        let header = Header::read(&file, metadata.len(), max_pages.min(MAX_PAGES)).map_err(cut(&path, SHORT))?;
        let table = Table::read(&file, &header).map_err(cut(&path, SHORT))?;
        Ok(Self { path, file: Handle::Whole(file), pages: header.pages, stage: Stage::Finished(table) })
    }

    /// Returns the number of pages the VM has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn writing(&mut self) -> io::Result<(&mut Writing, &File)> {
        let why = match &mut self.stage {
            Stage::Writing(writing) => return Ok((writing, self.file.file())),
            Stage::Finished(_) => "the snapshot is finished: another one needs a store of its own",
            Stage::Failed => "a part of the snapshot could not be kept: it must be discarded",
            Stage::Ended(why) => why,
        };
        Err(at(&self.path)(io::Error::other(why)))
    }

    fn append(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        let pages = self.pages;
        let (writing, file) = self.writing()?;
        if page >= pages {
            return Err(io::Error::new(ErrorKind::InvalidInput, format!("page {page} of a VM with {pages}")));
        }
        writing.put.insert(page);
        let data = match data {
            Some(data) => {
                writing.data.insert(page);
                writing.crcs[page as usize] = crc32fast::hash(data);
                data
            }
            // what was there before must not stay in the image
            None if writing.data.remove(page) => &[0; PAGE_SIZE],
            None => return Ok(()),
        };
        let follows = writing.first + (writing.run.len() / PAGE_SIZE) as u64 == page;
        if !follows || writing.run.len() >= RUN * PAGE_SIZE {
            writing.flush(file)?;
            writing.first = page;
        }
        writing.run.extend_from_slice(data);
        Ok(())
    }

    /// Returns everything of a commit that can be taken back.
    fn prepare(&mut self, number: u32, state: &[u8]) -> io::Result<Table> {
        let pages = self.pages;
        let (writing, file) = self.writing()?;
        writing.flush(file)?;
        let crcs = writing.data.iter().map(|page| writing.crcs[page as usize]).collect();
        let (put, data) = (writing.put.clone(), writing.data.clone());
        let table = Table { number, put, data, crcs, state: Bytes::copy_from_slice(state) };
        let bytes = table.encode();
        file.write_all_at(&bytes, table_at(pages))?;
        let header = Header { pages, table: bytes.len() as u64, crc: crc32fast::hash(&bytes) };
        file.write_all_at(&header.encode(), 0)?;
        file.sync_all()?;
        Ok(table)
    }

    fn fail(&mut self) {
        self.stage = Stage::Failed;
    }

    /// Returns the path of what is written, for messages.
    fn unfinished_path(&self) -> PathBuf {
        match &self.file {
            Handle::New(new) => new.unfinished_path(),
            Handle::Whole(_) => self.path.clone(),
        }
    }
}

impl VersionStore for SnapshotFile {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.writing()?;
        // without this page it would not be a snapshot, even if the caller went on
        let new = self.unfinished_path();
        self.append(page, data).map_err(roomless(&new, self.pages)).inspect_err(|_| self.fail())
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.writing()?;
        let new = self.unfinished_path();
        if state.len() > MAX_STATE {
            let why = format!("a state of {} bytes, above the limit of {MAX_STATE}", state.len());
            return Err(at(&new)(io::Error::new(ErrorKind::InvalidInput, why)));
        }
        let prepared = self.prepare(number, &state).map_err(roomless(&new, self.pages));
        // a failed `fsync` is not tried again: the kernel may have dropped what it could not write,
        // and then says success
        let table = prepared.inspect_err(|_| self.fail())?;
        if let Handle::New(new) = &mut self.file {
            new.rename().inspect_err(|_| self.stage = Stage::Failed)?;
            self.stage = Stage::Ended("whether the snapshot reached the disk is not known: open it to find out");
            new.sync_name()?;
        }
        self.stage = Stage::Finished(table);
        Ok(())
    }

    fn discard(&mut self) {
        if let Stage::Writing(_) | Stage::Failed = self.stage
            && let Handle::New(new) = &mut self.file
        {
            new.discard();
            self.stage = Stage::Ended("the snapshot was discarded: another one needs a store of its own");
        }
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        match &self.stage {
            Stage::Finished(table) => Some((table.number, table.state.clone())),
            _ => None,
        }
    }

    fn list(&mut self) -> io::Result<PageSet> {
        Ok(match &self.stage {
            Stage::Finished(table) => table.put.clone(),
            _ => PageSet::empty(self.pages),
        })
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        check_version_read(pages)?;
        let Some(&first) = pages.first() else { return Ok(()) };
        let Stage::Finished(table) = &self.stage else { return Err(not_in_version(first)) };
        let mut reading = Reading::new(&self.path, self.file.file(), table);
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            match run.iter().find(|&&page| !table.put.contains(page)) {
                Some(&missing) => return Err(not_in_version(missing)),
                None => reading.read(PageRange::new(run[0], run.len() as u64), take)?,
            }
        }
        Ok(())
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let Stage::Finished(table) = &self.stage else { return Ok(()) };
        let mut reading = Reading::new(&self.path, self.file.file(), table);
        table.put.ranges().try_for_each(|run| reading.read(run, take))
    }
}

/// A pass over pages of a finished snapshot.
struct Reading<'a> {
    path: &'a Path,
    file: &'a File,
    table: &'a Table,
    buffer: Vec<u8>,
    /// The number of pages with data are below `counted`: checksums are kept for these, in their
    /// order.
    checksums: usize,
    counted: u64,
}

impl<'a> Reading<'a> {
    fn new(path: &'a Path, file: &'a File, table: &'a Table) -> Self {
        Self { path, file, table, buffer: Vec::new(), checksums: 0, counted: 0 }
    }

    /// Hands out the pages of `run`, all of which were put. Runs ascend.
    fn read(&mut self, run: PageRange, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let Self { path, file, table, buffer, checksums, counted } = self;
        *checksums += table.data.count_in(PageRange::new(*counted, run.first.saturating_sub(*counted))) as usize;
        *counted = run.end();
        let mut page = run.first;
        while page < run.end() {
            if !table.data.contains(page) {
                take(page, None)?;
                page += 1;
                continue;
            }
            let most = (run.end() - page).min(RUN as u64);
            let count = table.data.run_at(page, most).map_or(1, |run| run.count.min(most));
            buffer.resize(count as usize * PAGE_SIZE, 0);
            file.read_exact_at(buffer, page_at(page)).map_err(cut(path, SHORT))?;
            for data in buffer.as_chunks::<PAGE_SIZE>().0 {
                if table.crcs.get(*checksums) != Some(&crc32fast::hash(data)) {
                    return Err(damaged(path, format!("page {page}: checksum mismatch")));
                }
                take(page, Some(data))?;
                *checksums += 1;
                page += 1;
            }
        }
        Ok(())
    }
}

impl Writing {
    fn flush(&mut self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.run, page_at(self.first))?;
        self.run.clear();
        Ok(())
    }
}

/// What stands behind the pages.
struct Table {
    number: u32,
    put: PageSet,
    data: PageSet,
    /// Of the pages with data, ascending.
    crcs: Vec<u32>,
    state: Bytes,
}

/// Returns all words of a set's bitmap.
fn words(set: &PageSet) -> Vec<u64> {
    let mut words = vec![0; set.capacity().div_ceil(64) as usize];
    set.copy_words(0, &mut words);
    words
}

impl Table {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(self.number);
        for set in [&self.put, &self.data] {
            words(set).into_iter().for_each(|word| _ = w.u64(word));
        }
        for &crc in &self.crcs {
            w.u32(crc);
        }
        w.blob(&self.state);
        w.into_bytes()
    }

    /// Returns the longest that there can be for so many pages.
    fn most(pages: u64) -> u64 {
        4 + 2 * 8 * pages.div_ceil(64) + 4 * pages + 4 + MAX_STATE as u64
    }

    fn read(file: &File, header: &Header) -> io::Result<Self> {
        // bounded by the number of pages that are allowed, and by the file's length
        let mut bytes = vec![0; header.table as usize];
        file.read_exact_at(&mut bytes, table_at(header.pages))?;
        if crc32fast::hash(&bytes) != header.crc {
            return Err(invalid(DecodeError::Checksum { field: "table" }));
        }
        Self::decode(&bytes, header.pages).map_err(invalid)
    }

    fn decode(bytes: &[u8], pages: u64) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let number = r.u32("number")?;
        let mut set = |field| {
            let mut set = PageSet::empty(pages);
            let bytes = r.bytes(pages.div_ceil(64) as usize * 8, field)?;
            let words: Vec<u64> = bytes.as_chunks().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
            set.insert_bitmap(0, pages, &words);
            match self::words(&set) == words {
                true => Ok(set),
                false => Err(DecodeError::invalid(field, "there are pages beyond the last one")),
            }
        };
        let (put, data) = (set("pages")?, set("pages with data")?);
        let mut stray = data.clone();
        stray.subtract(&put);
        if !stray.is_empty() {
            return Err(DecodeError::invalid("pages with data", "not all of them were put"));
        }
        let crcs = r.bytes(data.len() as usize * 4, "checksums")?;
        let crcs = crcs.as_chunks().0.iter().map(|&crc| u32::from_le_bytes(crc)).collect();
        let state = Bytes::copy_from_slice(r.blob(MAX_STATE, "state")?);
        r.finish()?;
        Ok(Self { number, put, data, crcs, state })
    }
}

struct Header {
    pages: u64,
    /// Bytes of the table.
    table: u64,
    /// Its CRC-32.
    crc: u32,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.bytes(&MAGIC).u32(VERSION).u64(self.pages).u64(self.table).u32(self.crc);
        let mut bytes = w.into_bytes();
        bytes.resize(HEADER as usize - 4, 0);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    fn read(file: &File, len: u64, max_pages: u64) -> io::Result<Self> {
        let mut bytes = [0; HEADER as usize];
        file.read_exact_at(&mut bytes, 0)?;
        let header = Self::decode(&bytes).map_err(invalid)?;
        let Self { pages, table, .. } = header;
        if pages > max_pages {
            return Err(invalid(format!("a VM of {pages} pages, {max_pages} are allowed")));
        }
        if table > Table::most(pages) || table_at(pages) + table != len {
            return Err(invalid(format!("{len} bytes, {} are said to be", table_at(pages).saturating_add(table))));
        }
        Ok(header)
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (bytes, crc) = bytes.split_last_chunk().ok_or(DecodeError::Truncated { field: "header" })?;
        let mut r = Reader::new(bytes);
        if r.array("magic")? != MAGIC {
            return Err(DecodeError::invalid("magic", "not a snapshot"));
        }
        if crc32fast::hash(bytes) != u32::from_le_bytes(*crc) {
            return Err(DecodeError::Checksum { field: "header" });
        }
        match r.u32("version")? {
            VERSION => {}
            other => return Err(DecodeError::invalid("version", format!("{other}, only {VERSION} is known"))),
        }
        Ok(Self { pages: r.u64("pages")?, table: r.u64("length of the table")?, crc: r.u32("crc")? })
    }
}

fn page_at(page: u64) -> u64 {
    HEADER + page * PAGE_SIZE as u64
}

fn table_at(pages: u64) -> u64 {
    page_at(pages)
}

/// As [`at`], and how much room is needed if there is too little.
fn roomless(path: &Path, pages: u64) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            let most = table_at(pages) + Table::most(pages);
            let why = format!("{error}; make room, up to {} MiB, or name another place", most >> 20);
            at(path)(io::Error::new(error.kind(), why))
        }
        _ => at(path)(error),
    }
}
