use std::{fs, os::unix::fs::MetadataExt as _};

use migration_core::store::{
    MemoryVersions,
    conformance::versions::{TestVersions, VM_PAGES},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::testing::{Contents, contents};

const PAGES: u64 = 5;

fn put(store: &mut dyn VersionStore, page: u64, fill: Option<u8>) -> io::Result<()> {
    store.put(page, fill.map(|fill| [fill; PAGE_SIZE]).as_ref())
}

/// In memory where that is possible: for tests that open thousands of files.
fn dir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn new_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn names(dir: &TempDir) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write(path: &Path, fill: u8) -> Contents {
    let mut store = SnapshotFile::create(path, PAGES).unwrap();
    for (page, fill) in [(3, Some(9)), (1, Some(fill)), (2, Some(fill)), (4, None), (3, None)] {
        put(&mut store, page, fill).unwrap();
    }
    store.commit(1, vec![fill; 7].into()).unwrap();
    contents(&mut store).unwrap()
}

fn read(path: &Path) -> io::Result<Contents> {
    contents(&mut SnapshotFile::open(path, PAGES)?)
}

#[test]
fn pages_that_follow_each_other_are_written_together() {
    let dir = dir();
    let pages = RUN as u64 + 10;
    let mut store = SnapshotFile::create(&dir.path().join("vm"), pages).unwrap();
    assert_eq!(store.pages(), pages);
    let mut gathered = |page| {
        put(&mut store, page, Some(1)).unwrap();
        let Stage::Writing(writing) = &store.stage else { panic!("not in writing") };
        (writing.first, writing.run.len() / PAGE_SIZE)
    };
    for page in 0..RUN as u64 {
        assert_eq!(gathered(page), (0, page as usize + 1));
    }
    // no more than that at once, and no hole
    assert_eq!(gathered(RUN as u64), (RUN as u64, 1));
    assert_eq!(gathered(RUN as u64 + 1), (RUN as u64, 2));
    assert_eq!(gathered(RUN as u64 + 3), (RUN as u64 + 3, 1));
    store.commit(1, Bytes::new()).unwrap();
    let found = contents(&mut store).unwrap().1;
    assert_eq!(found.len(), RUN + 3);
}

#[test]
fn limits_are_the_last_that_will_do() {
    let dir = dir();
    let path = dir.path().join("vm");
    let error = SnapshotFile::create(&path, MAX_PAGES + 1).err().unwrap();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("more than"), "{error}");
    assert_eq!(SnapshotFile::create(Path::new("/"), 1).err().unwrap().kind(), ErrorKind::InvalidInput);

    let long = Bytes::from(vec![0; MAX_STATE + 1]);
    let mut store = SnapshotFile::create(&path, PAGES).unwrap();
    (0..PAGES).for_each(|page| put(&mut store, page, Some(1)).unwrap());
    let error = store.commit(1, long.clone()).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("above the limit"), "{error}");
    assert!(error.to_string().contains("vm.new"), "{error}");
    // every page with data and the longest state: that is the longest table
    store.commit(1, long.slice(1..)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), table_at(PAGES) + Table::most(PAGES));
    assert_eq!(SnapshotFile::open(&path, PAGES).unwrap().latest(), Some((1, long.slice(1..))));
    for pages in [0, 1, 64, 65, 1000] {
        let all = PageSet::full(pages);
        let crcs = vec![0; pages as usize];
        let table = Table { number: 1, put: all.clone(), data: all, crcs, state: long.slice(1..) };
        assert_eq!(table.encode().len() as u64, Table::most(pages), "{pages}");
    }
}

#[test]
fn whoever_has_no_room_is_told_how_much_it_takes() {
    for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge] {
        let error = roomless(Path::new("/some/file"), 1 << 18)(kind.into());
        assert_eq!(error.kind(), kind);
        // pages, a table of two bits and four bytes for each, the state
        let text = error.to_string();
        assert!(text.contains("/some/file") && text.contains("up to 1089 MiB"), "{text}");
    }
    let other = roomless(Path::new("/some/file"), 1)(ErrorKind::PermissionDenied.into());
    assert!(other.kind() == ErrorKind::PermissionDenied && !other.to_string().contains("MiB"), "{other}");
}

#[test]
fn a_snapshot_is_there_from_its_commit_on() {
    let dir = dir();
    let path = dir.path().join("vm");
    let mut store = SnapshotFile::create(&path, PAGES).unwrap();
    put(&mut store, 1, Some(1)).unwrap();
    assert_eq!((names(&dir), contents(&mut store).unwrap()), (vec!["vm.new".into()], (None, vec![])));
    assert_eq!(SnapshotFile::create(&path, PAGES).err().unwrap().kind(), ErrorKind::ResourceBusy);
    store.discard();
    assert!(names(&dir).is_empty() && put(&mut store, 1, None).is_err());
    let one = write(&path, 1);
    assert_eq!(one, (Some((1, vec![1; 7].into())), vec![(1, Some(1)), (2, Some(1)), (3, None), (4, None)]));
    assert_eq!((names(&dir), read(&path).unwrap()), (vec!["vm".into()], one.clone()));
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    // pages that were not put, or are zeros again, hold no data in the image
    let bytes = fs::read(&path).unwrap();
    assert!([0, 3, 4].iter().all(|&page| bytes[page_at(page) as usize..][..PAGE_SIZE].iter().all(|&byte| byte == 0)));
    // the next one replaces it when it is complete; dropped before, it does not
    let mut store = SnapshotFile::create(&path, PAGES).unwrap();
    put(&mut store, 1, Some(2)).unwrap();
    drop(store);
    assert_eq!((names(&dir), read(&path).unwrap()), (vec!["vm".into()], one));
    let two = write(&path, 2);
    assert_eq!(read(&path).unwrap(), two);
    // it is finished
    let mut store = SnapshotFile::open(&path, PAGES).unwrap();
    assert!(put(&mut store, 1, None).is_err() && store.commit(2, Bytes::new()).is_err());
    store.discard();
    assert_eq!(contents(&mut store).unwrap(), two);
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let dir = dir();
    let path = dir.path().join("vm");
    let mut store = SnapshotFile::create(&path, PAGES).unwrap();
    assert_eq!(put(&mut store, PAGES, None).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(put(&mut store, 1, None).is_err() && store.commit(1, Bytes::new()).is_err());
    drop(store);
    let mut store = SnapshotFile::create(&path, PAGES).unwrap();
    assert_eq!(store.commit(1, vec![0; MAX_STATE + 1].into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    // its place is taken meanwhile
    fs::create_dir(&path).unwrap();
    store.commit(1, Bytes::new()).unwrap_err();
    drop(store);
    assert_eq!(names(&dir), ["vm"]);
    assert_eq!(SnapshotFile::create(&path, PAGES).err().unwrap().kind(), ErrorKind::AlreadyExists);
    assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::InvalidData);
    let absent = dir.path().join("absent");
    assert_eq!(SnapshotFile::create(&absent.join("vm"), PAGES).err().unwrap().kind(), ErrorKind::NotFound);
    assert_eq!(read(&absent).unwrap_err().kind(), ErrorKind::NotFound);
}

/// A snapshot takes over neither the owner, nor the mode, nor the links of what somebody has put at
/// the unfinished name.
#[test]
fn a_planted_file_is_left_alone() {
    let (dir, outside) = (dir(), dir());
    let (path, victim) = (dir.path().join("vm"), outside.path().join("victim"));
    let plants: [fn(&Path, &Path); 2] = [
        |victim, new| fs::hard_link(victim, new).unwrap(),
        |victim, new| std::os::unix::fs::symlink(victim, new).unwrap(),
    ];
    for plant in plants {
        fs::write(&victim, "untouched").unwrap();
        plant(&victim, &new_path(&path));
        write(&path, 1);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.is_file() && found.nlink() == 1 && found.mode() & 0o777 == 0o600);
        assert_eq!(names(&dir), ["vm", "vm.new"]);
        fs::remove_file(new_path(&path)).unwrap();
        fs::remove_file(&path).unwrap();
    }
}

/// Whatever a crash leaves of the file that is being written, the one before is whole, and the next
/// attempt succeeds.
#[test]
fn a_crash_leaves_the_old_or_the_new_snapshot() {
    let dir = dir();
    let (path, other) = (dir.path().join("vm"), dir.path().join("other"));
    write(&other, 2);
    let written = fs::read(&other).unwrap();
    fs::remove_file(&other).unwrap();
    for len in (0..=written.len()).rev().step_by(7) {
        let old = write(&path, 1);
        fs::write(new_path(&path), &written[..len]).unwrap();
        assert_eq!(read(&path).unwrap(), old);
        let new = write(&path, 3);
        assert_eq!((read(&path).unwrap(), names(&dir)), (new, vec!["vm".into()]));
    }
    // it was renamed, or was not
    let old = write(&path, 1);
    fs::write(new_path(&path), &written).unwrap();
    assert_eq!(read(&path).unwrap(), old);
    fs::rename(new_path(&path), &path).unwrap();
    assert_eq!(read(&path).unwrap().0, Some((1, vec![2; 7].into())));
}

#[test]
fn damage_is_noticed() {
    let dir = dir();
    let path = dir.path().join("vm");
    let whole = write(&path, 1);
    let bytes = fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let refused = |what: &str| {
        let error = read(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{what}: {error}");
        assert!(error.to_string().contains("vm: "), "{error}");
    };
    for at in 0..bytes.len() {
        file.write_all_at(&[bytes[at] ^ 1 << (at % 8)], at as u64).unwrap();
        let page = (at as u64).checked_sub(HEADER).map(|at| at / PAGE_SIZE as u64).filter(|&page| page < PAGES);
        match page {
            // no page of the snapshot lies there
            Some(0 | 3 | 4) => assert_eq!(read(&path).unwrap(), whole),
            _ => refused(&format!("byte {at} flipped")),
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
    file.set_len(bytes.len() as u64 + 1).unwrap();
    refused("a byte too many");
    for len in (0..bytes.len()).rev() {
        file.set_len(len as u64).unwrap();
        refused(&format!("cut to {len}"));
    }
}

/// A file whose checksums are right, with this table.
fn forged(path: &Path, header: impl FnOnce(&mut Header), table: &[u8]) -> io::Result<Contents> {
    let mut head = Header { pages: PAGES, table: table.len() as u64, crc: crc32fast::hash(table) };
    header(&mut head);
    let mut bytes = head.encode();
    bytes.resize(table_at(PAGES) as usize, 0);
    bytes.extend_from_slice(table);
    fs::write(path, bytes)?;
    read(path)
}

#[test]
fn hostile_files() {
    let dir = dir();
    let path = dir.path().join("vm");
    let table = |put: u64, data: u64, crcs: &[u32], state: &[u8]| {
        let mut w = Writer::new();
        w.u32(1).u64(put).u64(data);
        for &crc in crcs {
            w.u32(crc);
        }
        w.blob(state);
        w.into_bytes()
    };
    let zeros = crc32fast::hash(&[0; PAGE_SIZE]);
    let good = table(0b10110, 0b00010, &[zeros], b"s");
    let pages = vec![(1, Some(0)), (2, None), (4, None)];
    assert_eq!(forged(&path, |_| (), &good).unwrap(), (Some((1, b"s".as_slice().into())), pages));
    let refused = |header: fn(&mut Header), table: &[u8], why: &str| {
        let error = forged(&path, header, table).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains(why), "{why}: {error}");
    };
    refused(|_| (), &table(1 << PAGES, 0, &[], b""), "beyond the last one");
    refused(|_| (), &table(0b01, 0b10, &[zeros], b""), "not all of them were put");
    refused(|_| (), &table(0b10, 0b10, &[], b"s"), "truncated");
    refused(|_| (), &table(0b10, 0b10, &[zeros ^ 1], b"s"), "page 1: checksum");
    refused(|_| (), &[&good[..], &[0]].concat(), "too many");
    let long = [&good[..good.len() - 5], &u32::MAX.to_le_bytes()].concat();
    refused(|_| (), &long, "limit");
    refused(|header| header.pages = PAGES + 1, &good, "are allowed");
    refused(|header| header.pages = u64::MAX, &good, "are allowed");
    refused(|header| header.pages = 0, &good, "are said to be");
    refused(|header| header.table = u64::MAX, &good, "are said to be");
    refused(|header| header.crc ^= 1, &good, "table: checksum");
    // far more than is there, in a file that takes no room
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::InvalidData);
    fs::write(&path, b"#!/bin/sh").unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("cut short"));
    fs::write(&path, [b'x'; 10_000]).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("not a snapshot"));
}

/// What a VM of a tebibyte would need is not even read: its table has the wrong checksum, and
/// nobody notices.
#[test]
fn a_snapshot_that_claims_more_than_is_allowed_is_refused_by_its_header() {
    let dir = dir();
    let path = dir.path().join("vm");
    let header = Header { pages: 1 << 28, table: 64 << 20, crc: 7 };
    let file = File::create(&path).unwrap();
    file.write_all_at(&header.encode(), 0).unwrap();
    file.set_len(table_at(header.pages) + header.table).unwrap();
    let error = SnapshotFile::open(&path, 6 << 20).err().unwrap();
    assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains("are allowed"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_memory(puts in prop::collection::vec((0..600u64, any::<Option<u8>>()), 0..80), run in 0..600u64) {
        let dir = dir();
        let path = dir.path().join("vm");
        let mut store = SnapshotFile::create(&path, 1200).unwrap();
        let mut model = MemoryVersions::default();
        let runs = (run..run + 520).map(|page| (page, Some(page as u8)));
        for (page, fill) in puts.iter().copied().chain(runs).chain(puts.iter().rev().copied()) {
            put(&mut store, page, fill).unwrap();
            put(&mut model, page, fill).unwrap();
        }
        store.commit(4, Bytes::from_static(b"s")).unwrap();
        model.commit(4, Bytes::from_static(b"s")).unwrap();
        let expected = contents(&mut model).unwrap();
        prop_assert_eq!(&contents(&mut store).unwrap(), &expected);
        prop_assert_eq!(&contents(&mut SnapshotFile::open(&path, 1200).unwrap()).unwrap(), &expected);
    }
}

/// As the conformance suite tests it.
struct InFile {
    store: SnapshotFile,
    path: PathBuf,
    _dir: TempDir,
}

impl InFile {
    fn new() -> Self {
        let dir = dir();
        let path = dir.path().join("vm");
        Self { store: SnapshotFile::create(&path, VM_PAGES).unwrap(), path, _dir: dir }
    }
}

impl TestVersions for InFile {
    fn store(&mut self) -> &mut dyn VersionStore {
        &mut self.store
    }

    /// A snapshot is complete in itself.
    fn takes_several(&self) -> bool {
        false
    }

    fn reopen(&mut self) -> bool {
        self.store = SnapshotFile::open(&self.path, VM_PAGES).unwrap();
        true
    }
}

migration_core::version_store_conformance!(InFile::new);

#[test]
fn a_page_that_is_read_at_random_is_checked() {
    let dir = dir();
    let path = dir.path().join("vm");
    let pages = RUN as u64 * 3;
    let mut store = SnapshotFile::create(&path, pages).unwrap();
    // holes between them, so that the place of a checksum is not that of its page
    for page in (0..pages).filter(|page| page % 3 != 1) {
        put(&mut store, page, (page % 5 != 0).then_some(page as u8 | 1)).unwrap();
    }
    store.commit(1, Bytes::new()).unwrap();
    let mut store = SnapshotFile::open(&path, pages).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff], page_at(302) + 77).unwrap();
    for page in [0, 2, 299, 300, 303, pages - 1] {
        let mut got = None;
        let mut take = |page, content: PageContent<'_>| {
            got = Some((page, content.map(|content| content[9])));
            Ok(())
        };
        store.read(&[page], &mut take).unwrap();
        assert_eq!(got, Some((page, (page % 5 != 0).then_some(page as u8 | 1))));
    }
    let error = store.read(&[302], &mut |_, _| panic!("it is handed out")).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains("page 302"), "{error}");
}
