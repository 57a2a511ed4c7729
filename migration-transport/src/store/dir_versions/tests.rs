//! Crashes are simulated by every state of the directory that one can leave behind.

use std::{collections::BTreeMap, os::unix::fs::symlink};

use migration_core::{
    PAGE_SIZE,
    codec::Writer,
    store::{
        MemoryVersions,
        conformance::versions::{TestVersions, VM_PAGES},
    },
};
use proptest::prelude::*;
use rustix::process::geteuid;
use tempfile::TempDir;

use super::*;
use crate::testing::{Contents, contents};

const PAGES: u64 = 16;

/// The files of a directory.
type Snapshot = BTreeMap<String, Vec<u8>>;

fn put(store: &mut dyn VersionStore, page: u64, fill: Option<u8>) {
    store.put(page, fill.map(|fill| [fill; PAGE_SIZE]).as_ref()).unwrap();
}

fn state(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn created() -> (TempDir, PathBuf, DirVersions) {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("vm");
    let store = DirVersions::create(&dir, PAGES).unwrap();
    (parent, dir, store)
}

/// In memory where that is possible: for tests that open or commit thousands of times.
fn quick_dir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn snapshot(dir: &Path) -> Snapshot {
    let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (name(path.clone()), fs::read(path).unwrap())).collect()
}

/// What a directory with these files opens to, and what it holds then.
fn opened(files: &Snapshot) -> io::Result<(Contents, Snapshot)> {
    let dir = quick_dir();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    let found = contents(&mut DirVersions::open(dir.path(), PAGES)?)?;
    Ok((found, snapshot(dir.path())))
}

fn refused(files: &Snapshot, file: &str, why: &str) {
    let error = opened(files).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(error.to_string().contains(&format!("{file}: ")) && error.to_string().contains(why), "{error}");
}

#[test]
fn a_checkpoint_counts_from_its_commit_on() {
    let (_parent, dir, mut store) = created();
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    put(&mut store, 3, Some(1));
    put(&mut store, 9, Some(8));
    put(&mut store, 9, None);
    assert_eq!(contents(&mut store).unwrap(), (None, vec![]));
    store.commit(1, state("one")).unwrap();
    let one = (Some((1, state("one"))), vec![(3, Some(1)), (9, None)]);
    assert_eq!(contents(&mut store).unwrap(), one);
    // the next one is cut in the middle
    put(&mut store, 3, Some(2));
    put(&mut store, 4, Some(2));
    store.discard();
    assert_eq!(contents(&mut store).unwrap(), one);
    assert_eq!(snapshot(&dir).len(), 2);
    // and comes again
    put(&mut store, 9, Some(3));
    store.commit(3, state("three")).unwrap();
    let three = (Some((3, state("three"))), vec![(3, Some(1)), (9, Some(3))]);
    assert_eq!(contents(&mut store).unwrap(), three);
    drop(store);
    let mut store = DirVersions::open(&dir, PAGES).unwrap();
    assert_eq!(contents(&mut store).unwrap(), three);
    // a commit may bring only a new state
    store.commit(4, state("four")).unwrap();
    assert_eq!(contents(&mut store).unwrap(), (Some((4, state("four"))), three.1));
    store.remove().unwrap();
    assert!(!dir.exists());
}

#[test]
fn directories_that_are_taken() {
    let (parent, dir, mut store) = created();
    let busy = ErrorKind::ResourceBusy;
    assert_eq!(DirVersions::open(&dir, PAGES).err().unwrap().kind(), busy);
    assert_eq!(DirVersions::create(&dir, PAGES).err().unwrap().kind(), busy);
    store.commit(1, state("")).unwrap();
    fs::write(dir.join("notes"), "of others").unwrap();
    drop(store);
    assert_eq!(DirVersions::create(&dir, PAGES).err().unwrap().kind(), ErrorKind::AlreadyExists);
    let store = DirVersions::open(&dir, PAGES).unwrap();
    assert_eq!(store.latest(), Some((1, state(""))));
    assert!(store.remove().is_err());
    assert_eq!(snapshot(&dir).into_keys().collect::<Vec<_>>(), ["notes"]);
    let absent = parent.path().join("absent");
    assert_eq!(DirVersions::create(&absent.join("vm"), PAGES).err().unwrap().kind(), ErrorKind::NotFound);
    assert_eq!(DirVersions::open(&absent, PAGES).err().unwrap().kind(), ErrorKind::NotFound);
}

#[test]
fn after_a_failure_only_discard_goes_on() {
    let (_parent, dir, mut store) = created();
    put(&mut store, 1, Some(1));
    assert_eq!(store.put(PAGES, None).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(store.put(2, None).is_err() && store.commit(1, state("one")).is_err());
    store.discard();
    put(&mut store, 2, Some(2));
    // the manifest cannot be written
    fs::create_dir(dir.join(NEW_MANIFEST)).unwrap();
    assert!(store.commit(1, state("one")).is_err() && store.commit(1, state("one")).is_err());
    fs::remove_dir(dir.join(NEW_MANIFEST)).unwrap();
    store.discard();
    assert!(snapshot(&dir).is_empty());
    // too large a state fails alone
    put(&mut store, 3, Some(3));
    assert_eq!(store.commit(1, vec![0; MAX_STATE + 1].into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    store.commit(1, state("one")).unwrap();
    // the rename fails: no file may go
    fs::rename(dir.join(MANIFEST), dir.join("aside")).unwrap();
    fs::create_dir(dir.join(MANIFEST)).unwrap();
    put(&mut store, 4, Some(4));
    assert!(store.commit(2, state("two")).is_err());
    store.discard();
    let error = store.put(4, None).unwrap_err();
    assert!(error.to_string().contains("open the directory again"), "{error}");
    assert_eq!(contents(&mut store).unwrap(), (Some((1, state("one"))), vec![(3, Some(3))]));
    assert!(dir.join(NEW_MANIFEST).exists());
}

/// Takes `second` on top of a first checkpoint; returns both contents, and the directory before the
/// second one, with its records written, and after it.
fn two_checkpoints(slack: u64, second: &[(u64, Option<u8>)]) -> ([Contents; 2], [Snapshot; 3]) {
    let (_parent, dir, mut store) = created();
    store.slack = slack;
    [(1, None), (2, Some(1)), (5, None)].into_iter().for_each(|(page, fill)| put(&mut store, page, fill));
    store.commit(1, state("one")).unwrap();
    let (before, old) = (snapshot(&dir), contents(&mut store).unwrap());
    for &(page, fill) in second {
        put(&mut store, page, fill);
        // a copy at this moment is the old one
        assert_eq!(opened(&snapshot(&dir)).unwrap(), (old.clone(), before.clone()));
    }
    store.staged.as_mut().unwrap().flush().unwrap();
    let written = snapshot(&dir);
    store.commit(2, state("two")).unwrap();
    ([old, contents(&mut store).unwrap()], [before, written, snapshot(&dir)])
}

#[test]
fn a_crash_leaves_the_old_or_the_new_checkpoint() {
    for (slack, compacted) in [(SLACK, false), (0, true)] {
        let second = [(2, None), (2, Some(2)), (5, None), (5, None), (5, None), (7, None), (7, None)];
        let ([old, new], [before, written, after]) = two_checkpoints(slack, &second);
        assert_eq!(after.contains_key("pages-1"), !compacted);
        let mut state = before.clone();
        // the increments grow, then the new manifest does
        let grow: Snapshot =
            written.into_iter().chain(after.clone()).filter(|(name, _)| !before.contains_key(name)).collect();
        for (name, bytes) in grow {
            for len in 0..=bytes.len() {
                state.insert(name.clone(), bytes[..len].to_vec());
                assert_eq!(opened(&state).unwrap(), (old.clone(), before.clone()));
            }
        }
        for len in 0..=after[MANIFEST].len() {
            state.insert(NEW_MANIFEST.into(), after[MANIFEST][..len].to_vec());
            assert_eq!(opened(&state).unwrap(), (old.clone(), before.clone()));
        }
        // it is renamed, then files go, in any order
        let manifest = state.remove(NEW_MANIFEST).unwrap();
        state.insert(MANIFEST.into(), manifest);
        let going: Vec<_> = state.keys().filter(|&name| !after.contains_key(name)).cloned().collect();
        assert_eq!(going.len(), if compacted { 2 } else { 0 });
        for gone in 0..1 << going.len() {
            let mut state = state.clone();
            going.iter().enumerate().filter(|(i, _)| gone >> i & 1 == 1).for_each(|(_, name)| drop(state.remove(name)));
            assert_eq!(opened(&state).unwrap(), (new.clone(), after.clone()));
        }
    }
}

#[test]
fn damage_is_noticed() {
    let (_, [_, _, whole]) = two_checkpoints(SLACK, &[(2, Some(2)), (7, None)]);
    assert_eq!(whole.len(), 3);
    for (name, bytes) in &whole {
        for at in 0..bytes.len() {
            let mut damaged = whole.clone();
            damaged.get_mut(name).unwrap()[at] ^= 1 << (at % 8);
            refused(&damaged, name, "");
            damaged.get_mut(name).unwrap().clone_from(bytes);
            damaged.get_mut(name).unwrap().truncate(at);
            refused(&damaged, name, "");
        }
        let mut damaged = whole.clone();
        damaged.get_mut(name).unwrap().push(0);
        refused(&damaged, name, "");
    }
    // what becomes damaged while it is open
    let dir = tempfile::tempdir().unwrap();
    whole.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    let mut store = DirVersions::open(dir.path(), PAGES).unwrap();
    for len in [5000, 4000] {
        fs::write(dir.path().join("pages-1"), vec![1; len]).unwrap();
        assert_eq!(contents(&mut store).unwrap_err().kind(), ErrorKind::InvalidData);
    }
    fs::remove_file(dir.path().join("pages-1")).unwrap();
    assert_eq!(contents(&mut store).unwrap_err().kind(), ErrorKind::InvalidData);
}

/// A directory that `fields` of a manifest describe, with a checksum that is right.
fn forged(fields: impl FnOnce(&mut Writer), increment: Vec<u8>) -> Snapshot {
    let mut w = Writer::new();
    fields(&mut w);
    let crc = crc32fast::hash(&w.clone().into_bytes());
    w.u32(crc);
    [(MANIFEST.to_owned(), w.into_bytes()), ("pages-1".to_owned(), increment)].into()
}

#[test]
fn hostile_directories() {
    let record = |page: u64, len: u32, data: &[u8]| {
        let mut w = Writer::new();
        w.u64(page).u32(len);
        let crc = crc32fast::hash(&[&w.clone().into_bytes(), data].concat());
        w.u32(crc).bytes(data);
        w.into_bytes()
    };
    let head = |w: &mut Writer, version: u32, increments: u32| {
        w.bytes(b"LMCHECKP").u32(version).u32(1).u32(increments);
    };
    let list = |file: u32, bytes: usize, records: u64| {
        move |w: &mut Writer| {
            head(w, 1, 1);
            w.u32(file).u64(bytes as u64).u64(records).blob(b"s");
        }
    };
    let good = record(3, 0, &[]);
    assert_eq!(opened(&forged(list(1, 16, 1), good.clone())).unwrap().0.1, [(3, None)]);

    refused(&forged(|w| head(w, 2, 0), vec![]), "latest", "version");
    refused(&forged(|w| head(w, 1, u32::MAX), vec![]), "latest", "limit");
    refused(&forged(|w| head(w, 1, 4000), vec![]), "latest", "truncated");
    let long = |w: &mut Writer| {
        head(w, 1, 0);
        w.u32(u32::MAX);
    };
    refused(&forged(long, vec![]), "latest", "limit");
    let twice = |w: &mut Writer| {
        head(w, 1, 2);
        w.u32(1).u64(16).u64(1).u32(1).u64(16).u64(1);
    };
    refused(&forged(twice, good.clone()), "latest", "ascend");
    refused(&forged(list(7, 16, 1), good.clone()), "pages-7", "missing");
    refused(&forged(list(1, usize::MAX, 1), good.clone()), "pages-1", "manifest says");
    refused(&forged(list(1, 16, u64::MAX), good), "pages-1", "manifest says");
    for page in [PAGES, u64::MAX] {
        refused(&forged(list(1, 16, 1), record(page, 0, &[])), "pages-1", "of a VM with 16");
    }
    for (len, data) in [(1, 1), (4095, 4095), (u32::MAX, 4096)] {
        let bytes = record(3, len, &vec![0; data]);
        refused(&forged(list(1, bytes.len(), 1), bytes), "pages-1", "");
    }

    // increment numbers that end
    let last = forged(list(u32::MAX, 16, 1), vec![]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(MANIFEST), &last[MANIFEST]).unwrap();
    fs::write(dir.path().join("pages-4294967295"), record(3, 0, &[])).unwrap();
    assert!(DirVersions::open(dir.path(), PAGES).unwrap().put(1, None).is_err());

    // not files
    for name in [MANIFEST, "pages-4294967295"] {
        let path = dir.path().join(name);
        fs::rename(&path, dir.path().join("aside")).unwrap();
        let refused = || assert_eq!(DirVersions::open(dir.path(), PAGES).err().unwrap().kind(), ErrorKind::InvalidData);
        symlink(dir.path().join("aside"), &path).unwrap();
        refused();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused();
        fs::remove_dir(&path).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        refused();
        drop(socket);
        fs::remove_file(&path).unwrap();
        fs::rename(dir.path().join("aside"), &path).unwrap();
    }
    // sparse, and far too long
    File::create(dir.path().join(MANIFEST)).unwrap().set_len(1 << 40).unwrap();
    assert!(DirVersions::open(dir.path(), PAGES).err().unwrap().to_string().contains("limit"));
}

#[test]
fn compaction_bounds_the_disk() {
    let (_parent, dir, mut store) = created();
    let mut records = 0;
    for number in 1..=9 {
        put(&mut store, u64::from(number), Some(number as u8));
        (0..5000).for_each(|_| put(&mut store, 15, None));
        store.commit(number, state("s")).unwrap();
        let disk: u64 = snapshot(&dir).values().map(|bytes| bytes.len() as u64).sum();
        let most = 2 * u64::from(number + 1) + SLACK;
        assert!(disk <= most * 16 + 3 * u64::from(number) * 4096, "{disk}");
        let now = store.increments.iter().map(|increment| increment.records).sum();
        assert!(now <= most && (now > records) == (number % 4 != 0), "{number}: {now}");
        records = now;
    }
    let mut pages: Vec<_> = (1..=9).map(|page| (page, Some(page as u8))).collect();
    pages.push((15, None));
    assert_eq!(contents(&mut store).unwrap().1, pages);
    drop(store);
    assert_eq!(contents(&mut DirVersions::open(&dir, PAGES).unwrap()).unwrap().1, pages);
}

#[test]
fn many_small_increments_are_merged() {
    let dir = quick_dir();
    let commits = MAX_INCREMENTS as u32 + 1;
    let mut store = DirVersions::create(dir.path(), commits.into()).unwrap();
    for number in 1..=commits {
        assert_eq!(store.increments.len(), number as usize - 1);
        put(&mut store, u64::from(number) - 1, None);
        store.commit(number, state("")).unwrap();
    }
    assert_eq!((store.increments.len(), snapshot(dir.path()).len()), (1, 2));
    let all = (Some((commits, state(""))), (0..commits.into()).map(|page| (page, None)).collect());
    assert_eq!(contents(&mut store).unwrap(), all);
    drop(store);
    assert_eq!(contents(&mut DirVersions::open(dir.path(), commits.into()).unwrap()).unwrap(), all);
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, Option<u8>),
    Commit(u32, Vec<u8>),
    Discard,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (0..PAGES / 2, any::<Option<u8>>()).prop_map(|(page, fill)| Step::Put(page, fill)),
        3 => (any::<u32>(), any::<Vec<u8>>()).prop_map(|(number, state)| Step::Commit(number, state)),
        1 => Just(Step::Discard),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_memory(steps in steps(), slack in 0_u64..12) {
        let (_parent, dir, mut store) = created();
        store.slack = slack;
        let mut model = MemoryVersions::default();
        for step in steps {
            match step {
                Step::Put(page, fill) => {
                    put(&mut store, page, fill);
                    put(&mut model, page, fill);
                }
                Step::Commit(number, state) => {
                    store.commit(number, state.clone().into()).unwrap();
                    model.commit(number, state.into()).unwrap();
                    let records: u64 = store.increments.iter().map(|increment| increment.records).sum();
                    prop_assert!(records <= 2 * store.index.len() as u64 + slack);
                }
                Step::Discard => {
                    store.discard();
                    model.discard();
                }
                Step::Reopen => {
                    drop(store);
                    store = DirVersions::open(&dir, PAGES).unwrap();
                    store.slack = slack;
                    model.discard();
                }
            }
            prop_assert_eq!(contents(&mut store).unwrap(), contents(&mut model).unwrap());
        }
    }
}

/// What others put into the way is neither followed, nor written through, nor taken over. Just what
/// the bound is: twice the live pages and the slack, and what is merged is what was put last.
#[test]
fn a_commit_merges_as_soon_as_the_bound_is_passed_and_not_before() {
    let (_parent, dir, mut store) = created();
    store.slack = 0;
    let files = |dir| snapshot(dir).into_keys().collect::<Vec<_>>();
    for page in [1, 2, 3] {
        put(&mut store, page, Some(1));
    }
    store.commit(1, state("three records, three pages")).unwrap();
    assert_eq!(files(&dir), ["latest", "pages-1"]);
    for page in [1, 2, 3] {
        put(&mut store, page, Some(2));
    }
    store.commit(2, state("six records, three pages")).unwrap();
    assert_eq!(files(&dir), ["latest", "pages-1", "pages-2"]);
    put(&mut store, 2, Some(3));
    store.commit(3, state("seven records, three pages")).unwrap();
    assert_eq!(files(&dir), ["latest", "pages-4"]);
    let pages = vec![(1, Some(2)), (2, Some(3)), (3, Some(2))];
    assert_eq!(contents(&mut store).unwrap().1, pages);
    drop(store);
    assert_eq!(contents(&mut DirVersions::open(&dir, PAGES).unwrap()).unwrap().1, pages);
}

#[test]
fn what_was_never_committed_can_be_removed() {
    let (_parent, dir, mut store) = created();
    put(&mut store, 1, Some(1));
    store.remove().unwrap();
    assert!(!dir.exists());
}

#[test]
fn limits_are_the_last_that_will_do() {
    let (_parent, dir, mut store) = created();
    let long = Bytes::from(vec![0; MAX_STATE + 1]);
    store.commit(1, long.slice(1..)).unwrap();
    let error = store.commit(2, long.clone()).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("above the limit"), "{error}");
    drop(store);
    assert_eq!(DirVersions::open(&dir, PAGES).unwrap().latest(), Some((1, long.slice(1..))));
    // the longest manifest is read, and found to be none; one that is longer is not read
    for (len, why) in [(files::MAX_MANIFEST, "checksum"), (files::MAX_MANIFEST + 1, "above the limit")] {
        File::create(dir.join(MANIFEST)).unwrap().set_len(len).unwrap();
        let error = DirVersions::open(&dir, PAGES).err().unwrap();
        assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains(why), "{error}");
    }
}

#[test]
fn links_and_directories_of_others() {
    let (parent, dir, mut store) = created();
    let victim = parent.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    for number in 1..3 {
        let new = dir.join(NEW_MANIFEST);
        match number {
            1 => fs::hard_link(&victim, &new).unwrap(),
            _ => symlink(&victim, &new).unwrap(),
        }
        put(&mut store, 1, Some(1));
        store.commit(number, state("s")).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(fs::symlink_metadata(dir.join(MANIFEST)).unwrap().is_file());
    }
    drop(store);
    let link = parent.path().join("link");
    symlink(&dir, &link).unwrap();
    assert!(DirVersions::open(&link, PAGES).is_err() && DirVersions::create(&link, PAGES).is_err());
    let refused = |result: io::Result<DirVersions>, why: &str| {
        let error = result.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains(why), "{error}");
    };
    // others could change it
    fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
    refused(DirVersions::open(&dir, PAGES), "0777");
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
    if !geteuid().is_root() {
        return eprintln!("without directories of another owner: that needs root");
    }
    let empty = parent.path().join("empty");
    fs::create_dir(&empty).unwrap();
    for dir in [&dir, &empty] {
        std::os::unix::fs::chown(dir, Some(54321), None).unwrap();
    }
    refused(DirVersions::open(&dir, PAGES), "another user");
    refused(DirVersions::create(&empty, PAGES), "another user");
}

/// As the conformance suite tests it.
struct InFolder {
    store: Option<DirVersions>,
    dir: PathBuf,
    _parent: TempDir,
}

impl InFolder {
    fn new() -> Self {
        let parent = quick_dir();
        let dir = parent.path().join("vm");
        Self { store: Some(DirVersions::create(&dir, VM_PAGES).unwrap()), dir, _parent: parent }
    }
}

impl TestVersions for InFolder {
    fn store(&mut self) -> &mut dyn VersionStore {
        self.store.as_mut().unwrap()
    }

    fn reopen(&mut self) -> bool {
        // one store at a time may have the folder
        self.store = None;
        self.store = Some(DirVersions::open(&self.dir, VM_PAGES).unwrap());
        true
    }
}

migration_core::version_store_conformance!(InFolder::new);

#[test]
fn a_page_that_is_read_at_random_is_checked() {
    let (_parent, dir, mut store) = created();
    put(&mut store, 3, Some(1));
    put(&mut store, 5, Some(2));
    store.commit(1, state("one")).unwrap();
    let path = dir.join("pages-1");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    store.read(&[3], &mut |_, _| Ok(())).unwrap();
    let error = store.read(&[5], &mut |_, _| panic!("it is handed out")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
}
