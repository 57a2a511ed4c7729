//! The files of a [`DirVersions`](super::DirVersions): how they are written, and how they are read
//! without trusting them.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use migration_core::{
    PAGE_SIZE,
    codec::{DecodeError, Reader, Writer},
    state::MAX_STATE,
    store::PageContent,
};

use crate::{
    atomic_file::open_regular,
    file_errors::{at, cut, damaged},
};

const MAGIC: [u8; 8] = *b"LMCHECKP";
const VERSION: u32 = 1;
/// How an increment may be damaged.
const SHORT: &str = "it ends inside a record";

/// Page number, length, CRC-32.
const HEAD: usize = 8 + 4 + 4;

/// Increments that one checkpoint may be made of. More are merged, as each commit writes their list
/// again.
pub(super) const MAX_INCREMENTS: usize = 4096;

/// The longest manifest there can be: nothing longer is read.
pub(super) const MAX_MANIFEST: u64 = (8 + 4 + 4 + 4 + MAX_INCREMENTS * (4 + 8 + 8) + 4 + MAX_STATE + 4) as u64;

/// Records are gathered up to this size before they are written.
const BUFFER: usize = 256 << 10;

/// Files that reading keeps open: far below the usual limit of a process.
const OPEN_FILES: usize = 64;

/// Where the newest record of each page is.
pub(super) type Index = BTreeMap<u64, Place>;

#[derive(Clone, Copy)]
pub(super) struct Place {
    file: u32,
    /// Whether data follows the head.
    data: bool,
    offset: u64,
}

/// A finished file of records.
#[derive(Clone, Copy)]
pub(super) struct Increment {
    pub(super) file: u32,
    bytes: u64,
    pub(super) records: u64,
}

impl Increment {
    /// Checks every record, and enters them into `index`.
    pub(super) fn scan(&self, dir: &Path, pages: u64, index: &mut Index) -> io::Result<()> {
        let path = dir.join(increment_name(self.file));
        let (file, bytes) = open_regular(&path)?.ok_or_else(|| damaged(&path, "missing, and the manifest names it"))?;
        if bytes != self.bytes {
            return Err(damaged(&path, format!("{bytes} bytes, the manifest says {}", self.bytes)));
        }
        let mut input = BufReader::with_capacity(BUFFER, file);
        let mut buffer = [0; HEAD + PAGE_SIZE];
        let (mut offset, mut records) = (0, 0);
        while offset < bytes {
            input.read_exact(&mut buffer[..HEAD]).map_err(cut(&path, SHORT))?;
            // the length decides how much is read; the check below is of all of it
            let data = buffer[8..12] != [0; 4];
            let record = &mut buffer[..record_len(data)];
            input.read_exact(&mut record[HEAD..]).map_err(cut(&path, SHORT))?;
            let (page, _) = decode_record(record).map_err(|error| damaged(&path, format!("at {offset}: {error}")))?;
            if page >= pages {
                return Err(damaged(&path, format!("at {offset}: page {page} of a VM with {pages}")));
            }
            index.insert(page, Place { file: self.file, data, offset });
            offset += record.len() as u64;
            records += 1;
        }
        if records != self.records {
            return Err(damaged(&path, format!("{records} records, the manifest says {}", self.records)));
        }
        Ok(())
    }
}

/// An increment that is being written.
pub(super) struct Appender {
    out: BufWriter<File>,
    path: PathBuf,
    pub(super) increment: Increment,
    pub(super) index: Index,
}

impl Appender {
    pub(super) fn create(dir: &Path, file: u32) -> io::Result<Self> {
        let path = dir.join(increment_name(file));
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(at(&path))?;
        let increment = Increment { file, bytes: 0, records: 0 };
        Ok(Self { out: BufWriter::with_capacity(BUFFER, out), path, increment, index: Index::new() })
    }

    pub(super) fn append(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        let head = encode_head(page, data);
        self.out.write_all(&head).map_err(at(&self.path))?;
        self.out.write_all(data.map_or(&[], |data| data)).map_err(at(&self.path))?;
        let Increment { file, bytes: offset, .. } = self.increment;
        self.index.insert(page, Place { file, data: data.is_some(), offset });
        self.increment.bytes += record_len(data.is_some()) as u64;
        self.increment.records += 1;
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush().map_err(at(&self.path))
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.out.get_ref().sync_all().map_err(at(&self.path))
    }

    /// Closes the file without writing what is buffered.
    pub(super) fn abandon(self) {
        drop(self.out.into_parts());
    }
}

/// Reads single records.
pub(super) struct Files<'a> {
    dir: &'a Path,
    open: HashMap<u32, File>,
    buffer: [u8; HEAD + PAGE_SIZE],
}

impl<'a> Files<'a> {
    pub(super) fn new(dir: &'a Path) -> Self {
        Self { dir, open: HashMap::new(), buffer: [0; HEAD + PAGE_SIZE] }
    }

    pub(super) fn read(&mut self, page: u64, place: Place) -> io::Result<PageContent<'_>> {
        let path = || self.dir.join(increment_name(place.file));
        if !self.open.contains_key(&place.file) {
            if self.open.len() == OPEN_FILES {
                self.open.clear();
            }
            let (file, _) = open_regular(&path())?.ok_or_else(|| damaged(&path(), "missing"))?;
            self.open.insert(place.file, file);
        }
        let record = &mut self.buffer[..record_len(place.data)];
        self.open[&place.file].read_exact_at(record, place.offset).map_err(|error| cut(&path(), SHORT)(error))?;
        match decode_record(record) {
            Ok((found, data)) if found == page => Ok(data),
            Ok((found, _)) => Err(damaged(&path(), format!("at {}: page {found} instead of {page}", place.offset))),
            Err(error) => Err(damaged(&path(), format!("at {}: {error}", place.offset))),
        }
    }
}

fn record_len(data: bool) -> usize {
    HEAD + if data { PAGE_SIZE } else { 0 }
}

fn record_crc(start: &[u8], data: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(start);
    crc.update(data);
    crc.finalize()
}

fn encode_head(page: u64, data: PageContent<'_>) -> Vec<u8> {
    let data = data.map_or(&[][..], |data| data);
    let mut head = Writer::new();
    head.u64(page).count(data.len());
    let mut head = head.into_bytes();
    head.extend(record_crc(&head, data).to_le_bytes());
    head
}

fn decode_record(record: &[u8]) -> Result<(u64, PageContent<'_>), DecodeError> {
    let mut r = Reader::new(record);
    let (page, len, crc) = (r.u64("page")?, r.u32("length")? as usize, r.u32("crc")?);
    let data = r.bytes(len, "data")?;
    r.finish()?;
    if record_crc(&record[..HEAD - 4], data) != crc {
        return Err(DecodeError::Checksum { field: "record" });
    }
    match data.try_into() {
        _ if data.is_empty() => Ok((page, None)),
        Ok(data) => Ok((page, Some(data))),
        Err(_) => Err(DecodeError::invalid("length", len.to_string())),
    }
}

pub(super) struct Manifest {
    pub(super) number: u32,
    pub(super) increments: Vec<Increment>,
    pub(super) state: Bytes,
}

impl Manifest {
    pub(super) fn encode(number: u32, increments: &[Increment], state: &[u8]) -> Vec<u8> {
        let mut w = Writer::new();
        w.bytes(&MAGIC).u32(VERSION).u32(number).count(increments.len());
        for &Increment { file, bytes, records } in increments {
            w.u32(file).u64(bytes).u64(records);
        }
        w.blob(state);
        let mut bytes = w.into_bytes();
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// `None` if there is none.
    pub(super) fn read(path: &Path) -> io::Result<Option<Self>> {
        let Some((file, len)) = open_regular(path)? else { return Ok(None) };
        if len > MAX_MANIFEST {
            return Err(damaged(path, format!("{len} bytes, above the limit of {MAX_MANIFEST}")));
        }
        let mut bytes = Vec::new();
        file.take(len).read_to_end(&mut bytes).map_err(at(path))?;
        Self::decode(&bytes).map(Some).map_err(|error| damaged(path, error.to_string()))
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (bytes, crc) = bytes.split_last_chunk().ok_or(DecodeError::Truncated { field: "manifest" })?;
        if crc32fast::hash(bytes) != u32::from_le_bytes(*crc) {
            return Err(DecodeError::Checksum { field: "manifest" });
        }
        let mut r = Reader::new(bytes);
        if r.array("magic")? != MAGIC {
            return Err(DecodeError::invalid("magic", "not a manifest"));
        }
        match r.u32("version")? {
            VERSION => {}
            other => return Err(DecodeError::invalid("version", format!("{other}, only {VERSION} is known"))),
        }
        let number = r.u32("number")?;
        let mut increments: Vec<Increment> = Vec::new();
        for _ in 0..r.count(MAX_INCREMENTS, "increments")? {
            let increment = Increment { file: r.u32("file")?, bytes: r.u64("bytes")?, records: r.u64("records")? };
            if increments.last().is_some_and(|last| last.file >= increment.file) {
                return Err(DecodeError::invalid("increments", "they do not ascend"));
            }
            increments.push(increment);
        }
        let state = Bytes::copy_from_slice(r.blob(MAX_STATE, "state")?);
        r.finish()?;
        Ok(Self { number, increments, state })
    }
}

pub(super) fn increment_name(file: u32) -> String {
    format!("pages-{file}")
}

pub(super) fn increment_of(name: &str) -> Option<u32> {
    let file = name.strip_prefix("pages-")?.parse().ok()?;
    (increment_name(file) == name).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_stay_open_but_not_too_many_and_a_record_of_another_page_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let most = OPEN_FILES as u32;
        let place = |file: u32| Place { file, data: false, offset: 0 };
        for file in 1..=most + 1 {
            let mut out = Appender::create(dir.path(), file).unwrap();
            out.append(file.into(), None).unwrap();
            out.flush().unwrap();
        }
        let mut files = Files::new(dir.path());
        for file in 1..=most {
            assert_eq!(files.read(file.into(), place(file)).unwrap(), None);
            assert_eq!(files.open.len(), file as usize);
        }
        files.read(u64::from(most) + 1, place(most + 1)).unwrap();
        assert_eq!(files.open.len(), 1);
        // its sum is right: only its number tells
        let error = files.read(7, place(8)).unwrap_err();
        assert!(error.to_string().contains("page 8 instead of 7"), "{error}");
    }
}
