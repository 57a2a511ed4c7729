//! The store under the sealed one is a shelf that others can reach.

mod attacks;
mod conformance;

use std::sync::{Arc, Mutex};

use migration_core::store::MemoryVersions;
use migration_transport::{DirVersions, SnapshotFile};
use proptest::prelude::*;

use super::*;
use crate::aead;

const VM: VmId = VmId([7; 16]);
/// A tree of three levels above the pages.
const TALL: u64 = 16384 + 5;

type Content = Option<Box<[u8; PAGE_SIZE]>>;
type Contents = Vec<(u64, Content)>;

/// Hands out what it has been given, or what somebody has put there instead.
#[derive(Clone, Default)]
struct Shelf(Arc<Mutex<Shelved>>);

#[derive(Clone, Default)]
struct Shelved {
    staged: BTreeMap<u64, Content>,
    pages: Contents,
    latest: Option<(u32, Bytes)>,
    /// How many more pages and commits it takes.
    room: Option<usize>,
    /// Whether it goes on when a page is refused, and says that all is well.
    stubborn: bool,
}

impl Shelf {
    fn with<T>(&self, f: impl FnOnce(&mut Shelved) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }

    /// Another one with the same on it.
    fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.with(|shelved| shelved.clone()))))
    }

    fn len(&self) -> usize {
        self.with(|shelved| shelved.pages.len())
    }

    fn open(&self) -> io::Result<SealedVersions> {
        SealedVersions::open(Box::new(self.clone()), MAX_PAGES, Some(VM), &key(), aead::best())
    }

    /// All that is there, as who opens it gets it; or why not, and what was got by then.
    fn read(&self) -> Result<Contents, (io::Error, Contents)> {
        let mut got = Vec::new();
        match self.open().and_then(|mut store| store.restore(&mut into(&mut got))) {
            Ok(()) => Ok(got),
            Err(error) => Err((error, got)),
        }
    }
}

impl Shelved {
    fn fill(&mut self) -> io::Result<()> {
        match &mut self.room {
            Some(0) => return Err(ErrorKind::StorageFull.into()),
            Some(room) => *room -= 1,
            None => {}
        }
        Ok(())
    }
}

impl VersionStore for Shelf {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.with(|shelved| {
            shelved.fill()?;
            shelved.staged.insert(page, data.map(|data| Box::new(*data)));
            Ok(())
        })
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.with(|shelved| {
            shelved.fill()?;
            let mut pages: BTreeMap<_, _> = mem::take(&mut shelved.pages).into_iter().collect();
            pages.append(&mut shelved.staged);
            shelved.pages = pages.into_iter().collect();
            shelved.latest = Some((number, state));
            Ok(())
        })
    }

    fn discard(&mut self) {
        self.with(|shelved| shelved.staged.clear());
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.with(|shelved| shelved.latest.clone())
    }

    fn list(&mut self) -> io::Result<PageSet> {
        let pages = self.with(|shelved| shelved.pages.clone());
        let mut set = PageSet::empty(pages.iter().map(|(page, _)| page.saturating_add(1)).max().unwrap_or(0));
        pages.iter().for_each(|(page, _)| _ = set.insert(*page));
        Ok(set)
    }

    /// Hands out what it has of these pages, in the order in which it lies there.
    fn read(&mut self, wanted: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let Shelved { pages, stubborn, .. } = self.with(|shelved| shelved.clone());
        for (page, data) in pages.iter().filter(|(page, _)| wanted.contains(page)) {
            let taken = take(*page, data.as_deref());
            if !stubborn {
                taken?;
            }
        }
        Ok(())
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let Shelved { pages, stubborn, .. } = self.with(|shelved| shelved.clone());
        for (page, data) in &pages {
            let taken = take(*page, data.as_deref());
            if !stubborn {
                taken?;
            }
        }
        Ok(())
    }
}

fn key() -> Psk {
    Psk::new([1; 32])
}

fn create(inner: impl VersionStore + 'static, pages: u64) -> SealedVersions {
    SealedVersions::create(Box::new(inner), pages, &key(), VM, Suite::Aes256Gcm, aead::best()).unwrap()
}

fn page(fill: u8) -> Content {
    Some(Box::new([fill; PAGE_SIZE]))
}

fn into(got: &mut Contents) -> impl FnMut(u64, PageContent<'_>) -> io::Result<()> {
    move |page, data| {
        got.push((page, data.map(|data| Box::new(*data))));
        Ok(())
    }
}

fn contents(store: &mut dyn VersionStore) -> Contents {
    let mut got = Vec::new();
    store.restore(&mut into(&mut got)).unwrap();
    got
}

fn put(store: &mut dyn VersionStore, pages: &[(u64, Content)]) {
    pages.iter().for_each(|(page, data)| store.put(*page, data.as_deref()).unwrap());
}

fn state(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

/// Two checkpoints, pages of both in use, in a tree of three levels: the shelf as it was after the
/// first one, and as it is now.
fn two_checkpoints() -> (Shelf, Shelf, Contents) {
    let shelf = Shelf::default();
    let mut store = create(shelf.clone(), TALL);
    put(&mut store, &[(0, page(1)), (1, page(1)), (5, None), (200, page(1)), (TALL - 1, page(1))]);
    store.commit(1, state("one")).unwrap();
    let first = shelf.copy();
    put(&mut store, &[(1, page(2)), (6, None), (300, page(2))]);
    store.commit(2, state("two")).unwrap();
    let expected =
        [(0, page(1)), (1, page(2)), (5, None), (6, None), (200, page(1)), (300, page(2)), (TALL - 1, page(1))];
    assert_eq!(shelf.read().unwrap(), expected);
    (first, shelf, expected.to_vec())
}

#[test]
fn trees_of_every_height() {
    for (pages, all) in [(1, 2), (127, 128), (128, 129), (129, 132), (TALL, TALL + 129 + 2 + 1)] {
        assert_eq!(SealedVersions::store_pages(pages), all);
        let shelf = Shelf::default();
        let mut store = create(shelf.clone(), pages);
        let picked = (0..pages).filter(|page| pages < 1000 || page % 127 == 3 || page + 1 == pages);
        let expected: Contents = picked.map(|at| (at, if at % 3 == 1 { None } else { page(at as u8) })).collect();
        put(&mut store, &expected);
        store.commit(9, state("whole")).unwrap();
        assert_eq!(contents(&mut store), expected);
        assert_eq!(shelf.read().unwrap(), expected);
        assert!(shelf.with(|shelved| shelved.pages.iter().all(|(at, _)| *at < all)));
        let store = shelf.open().unwrap();
        assert_eq!((store.latest(), store.vm(), store.pages()), (Some((9, state("whole"))), VM, pages));
    }
    assert_eq!(SealedVersions::store_pages(0), 1);
    assert_eq!(SealedVersions::store_pages(u64::MAX), u64::MAX);
}

#[test]
fn checkpoints_build_on_each_other() {
    let (first, shelf, mut expected) = two_checkpoints();
    // an older one, whole, is a checkpoint: its number tells
    assert_eq!(first.open().unwrap().latest(), Some((1, state("one"))));
    assert_eq!(first.read().unwrap().len(), 5);

    let mut store = shelf.open().unwrap();
    put(&mut store, &[(0, page(9)), (7, page(9))]);
    assert_eq!(contents(&mut store), expected);
    store.discard();
    put(&mut store, &[(0, None), (5, page(3)), (5, page(4))]);
    store.commit(7, state("seven")).unwrap();
    store.commit(8, Bytes::new()).unwrap();
    (expected[0].1, expected[2].1) = (None, page(4));
    assert_eq!(contents(&mut store), expected);
    assert_eq!(shelf.read().unwrap(), expected);
    assert_eq!(shelf.open().unwrap().latest(), Some((8, Bytes::new())));
}

#[test]
fn commits_are_counted_over_reopenings_and_run_out() {
    let shelf = Shelf::default();
    let mut store = create(shelf.clone(), 1);
    for number in 1..=3 {
        put(&mut store, &[(0, page(number as u8))]);
        store.commit(number, Bytes::new()).unwrap();
        assert_eq!(store.header.generation, number);
        store = shelf.open().unwrap();
        assert_eq!(store.header.generation, number);
        store.load().unwrap();
        assert!(matches!(store.tree.first_sealed(1), Some((1, seal)) if seal.generation == number));
    }
    assert!(format!("{store:?}").contains("generation: 3"));
    store.header.generation = u32::MAX;
    assert!(store.put(0, None).unwrap_err().to_string().contains("ran out"));
    store.discard();
    assert!(store.commit(4, Bytes::new()).unwrap_err().to_string().contains("ran out"));
}

#[test]
fn nothing_rests_in_clear() {
    let shelf = Shelf::default();
    let mut store = create(shelf.clone(), 300);
    put(&mut store, &[(3, page(0x5a)), (4, page(0x5a)), (5, page(0))]);
    store.commit(1, state("a secret state")).unwrap();
    let Shelved { pages, latest, .. } = shelf.with(|shelved| shelved.clone());
    assert!(!latest.unwrap().1.windows(8).any(|bytes| bytes == b"a secret"));
    let mut data: Vec<_> = pages.into_iter().map(|(_, data)| data.unwrap()).collect();
    for (at, page) in data.iter().enumerate() {
        let mut counts = [0; 256];
        page.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        assert!(counts.iter().all(|&count| count < 100), "page {at} of the store");
    }
    data.sort();
    data.dedup();
    assert_eq!(data.len(), 5);
}

#[test]
fn an_empty_checkpoint() {
    for pages in [0, 1, 1000] {
        let shelf = Shelf::default();
        let mut store = create(shelf.clone(), pages);
        assert!(store.put(pages, None).is_err_and(|e| e.kind() == ErrorKind::InvalidInput));
        assert!(store.commit(1, Bytes::new()).is_err_and(|e| e.to_string().contains("must be discarded")));
        store.discard();
        store.commit(1, state("state")).unwrap();
        assert_eq!(shelf.read().unwrap(), []);
        assert_eq!(shelf.open().unwrap().latest(), Some((1, state("state"))));
        shelf.with(|shelved| shelved.pages.push((0, page(1))));
        assert!(shelf.read().unwrap_err().0.to_string().contains("was never put"));
    }
}

#[test]
fn states_have_a_limit() {
    let long = Bytes::from(vec![1; SealedVersions::MAX_STATE + 1]);
    let shelf = Shelf::default();
    let mut store = create(shelf.clone(), 1);
    put(&mut store, &[(0, page(1))]);
    let error = store.commit(1, long.clone()).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("above the limit"), "{error}");
    // nothing was lost by trying
    store.commit(1, long.slice(1..)).unwrap();
    assert_eq!(shelf.latest().unwrap().1.len(), MAX_STATE);
    assert_eq!(shelf.open().unwrap().latest(), Some((1, long.slice(1..))));
    assert_eq!(shelf.read().unwrap(), [(0, page(1))]);
}

#[test]
fn what_cannot_be_kept_is_no_checkpoint() {
    let (_, shelf, expected) = two_checkpoints();
    let mut store = shelf.open().unwrap();
    // three pages, the seal page of each level over them, and the commit
    for room in 0..=7 {
        shelf.with(|shelved| shelved.room = Some(room));
        let pages = [(0, page(9)), (7, page(9)), (5, page(9))];
        let put = pages.iter().try_for_each(|(page, data)| store.put(*page, data.as_deref()));
        let done = put.and_then(|()| store.commit(3, state("three")));
        if room == 7 {
            done.unwrap();
            continue;
        }
        assert_eq!(done.unwrap_err().kind(), ErrorKind::StorageFull);
        shelf.with(|shelved| shelved.room = None);
        for again in [store.put(0, None), store.commit(4, Bytes::new())] {
            assert!(again.unwrap_err().to_string().contains("must be discarded"));
        }
        assert_eq!((contents(&mut store), store.latest()), (expected.clone(), Some((2, state("two")))));
        store.discard();
        assert_eq!((contents(&mut store), store.latest()), (expected.clone(), Some((2, state("two")))));
        assert_eq!(shelf.read().unwrap(), expected);
    }
    let three = shelf.read().unwrap();
    assert_eq!((three.len(), &three[0], shelf.open().unwrap().latest()), (8, &(0, page(9)), Some((3, state("three")))));
}

#[test]
fn opening_says_what_is_wrong() {
    let open = |shelf: &Shelf, most, expected, key: &Psk| {
        SealedVersions::open(Box::new(shelf.clone()), most, expected, key, aead::best()).map(drop).unwrap_err()
    };
    let says = |error: io::Error, kind, words: &str| {
        assert!(error.kind() == kind && error.to_string().contains(words), "{error:?}");
    };
    let (_, shelf, _) = two_checkpoints();
    says(open(&Shelf::default(), TALL, None, &key()), ErrorKind::NotFound, "nothing to open");
    says(open(&shelf, TALL - 1, None, &key()), ErrorKind::InvalidData, "16388 are allowed");
    says(open(&shelf, TALL, Some(VmId([8; 16])), &key()), ErrorKind::InvalidData, "not of VM 08080808");
    let wrong = open(&shelf, TALL, None, &Psk::new([2; 32]));
    let cause: Option<&PageError> = wrong.get_ref().unwrap().source().and_then(|source| source.downcast_ref());
    assert_eq!(cause, Some(&PageError::NotAuthentic));
    says(wrong, ErrorKind::PermissionDenied, "not what was sealed with this key");

    let plain = Shelf::default();
    plain.clone().commit(1, state("plain")).unwrap();
    says(open(&plain, TALL, None, &key()), ErrorKind::InvalidData, "not sealed: open it without a key");
    assert!(!SealedVersions::is_sealed(b"plain") && !SealedVersions::is_sealed(b""));
    assert!(SealedVersions::is_sealed(&shelf.latest().unwrap().1));

    let create = |shelf: &Shelf, pages| {
        let inner = Box::new(shelf.clone());
        SealedVersions::create(inner, pages, &key(), VM, Suite::ChaCha20Poly1305, aead::best()).map(drop).unwrap_err()
    };
    says(create(&shelf, TALL), ErrorKind::AlreadyExists, "has a checkpoint already");
    says(create(&Shelf::default(), MAX_PAGES + 1), ErrorKind::InvalidInput, "more than");
    self::create(Shelf::default(), MAX_PAGES);
}

#[test]
fn stores_on_disk() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, file) = (parent.path().join("dir"), parent.path().join("file"));
    let all = SealedVersions::store_pages(TALL);
    let open = |inner| SealedVersions::open(inner, TALL, None, &key(), aead::best()).unwrap();
    let mut pages = vec![(7, page(7)), (8, page(8)), (200, None), (TALL - 1, page(1))];
    let to_dir = create(DirVersions::create(&dir, all).unwrap(), TALL);
    let to_file = create(SnapshotFile::create(&file, all).unwrap(), TALL);
    for mut store in [to_dir, to_file] {
        // in no order
        put(&mut store, &pages[2..]);
        put(&mut store, &pages[..2]);
        store.commit(5, state("five")).unwrap();
        assert_eq!(contents(&mut store), pages);
    }
    let mut from_dir = open(Box::new(DirVersions::open(&dir, all).unwrap()));
    let mut from_file = open(Box::new(SnapshotFile::open(&file, all).unwrap()));
    for store in [&mut from_dir, &mut from_file] {
        assert_eq!(store.latest(), Some((5, state("five"))));
        assert_eq!(contents(store), pages);
    }
    put(&mut from_dir, &[(200, page(2))]);
    from_dir.commit(6, state("six")).unwrap();
    drop(from_dir);
    pages[2].1 = page(2);
    assert_eq!(contents(&mut open(Box::new(DirVersions::open(&dir, all).unwrap()))), pages);
}

#[test]
fn who_takes_may_fail() {
    let (_, shelf, genuine) = two_checkpoints();
    let mut store = shelf.open().unwrap();
    let error = store.restore(&mut |page, _| if page < 5 { Ok(()) } else { Err(ErrorKind::OutOfMemory.into()) });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::OutOfMemory);
    assert_eq!(contents(&mut store), genuine);
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, Option<u8>),
    Commit,
    Discard,
    /// What is not committed is lost.
    Reopen,
}

fn step(pages: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..pages, any::<Option<u8>>()).prop_map(|(page, fill)| Step::Put(page, fill)),
        3 => Just(Step::Commit),
        1 => Just(Step::Discard),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn as_a_plain_store(
        (pages, steps) in prop::sample::select(vec![1, 128, 129, 300, TALL])
            .prop_flat_map(|pages| (Just(pages), prop::collection::vec(step(pages), 1..80))),
        suite in prop::sample::select(Suite::ALL.to_vec()),
        rust in any::<bool>(),
    ) {
        let shelf = Shelf::default();
        let new = || {
            // whatever library opens it
            let backend = if rust { &aead::RustCrypto } else { aead::best() };
            SealedVersions::create(Box::new(shelf.clone()), pages, &key(), VM, suite, backend).unwrap()
        };
        let (mut store, mut model) = (new(), MemoryVersions::default());
        let mut number = 0;
        for step in steps {
            match step {
                Step::Put(page, fill) => {
                    let data = fill.map(|fill| [fill; PAGE_SIZE]);
                    store.put(page, data.as_ref()).unwrap();
                    model.put(page, data.as_ref()).unwrap();
                    continue;
                }
                Step::Commit => {
                    number += 1;
                    store.commit(number, Bytes::from(vec![number as u8; 100])).unwrap();
                    model.commit(number, Bytes::from(vec![number as u8; 100])).unwrap();
                }
                Step::Discard => {
                    store.discard();
                    model.discard();
                }
                Step::Reopen => {
                    model.discard();
                    shelf.clone().discard();
                    store = shelf.latest().map_or_else(new, |_| shelf.open().unwrap());
                }
            }
            prop_assert_eq!(store.latest(), model.latest());
            prop_assert_eq!(contents(&mut store), contents(&mut model));
        }
    }

    #[test]
    fn arbitrary_states_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), number in any::<u32>()) {
        let shelf = Shelf::default();
        let known = [&MAGIC[..], &VERSION.to_le_bytes(), &[Suite::Aes256Gcm.code()]].concat();
        for state in [bytes.clone(), [&known[..8], &bytes].concat(), [&known[..], &VM.0, &bytes].concat()] {
            shelf.with(|shelved| shelved.latest = Some((number, state.into())));
            prop_assert!(shelf.open().is_err());
        }
    }
}
