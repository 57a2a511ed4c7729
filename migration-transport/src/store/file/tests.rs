use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::{FileExt as _, PermissionsExt as _, symlink},
    sync::atomic::AtomicU32,
    thread,
};

use migration_core::{
    PAGE_SIZE,
    store::{
        ManualClock, Namespace, Purpose,
        conformance::{self, Harm, TestStore},
    },
    vm::VmId,
};
use tempfile::TempDir;

use super::*;

const PAGE: u64 = PAGE_SIZE as u64;
const LEASE: Duration = Duration::from_secs(60);
const ID: NamespaceId = NamespaceId([0x77; 16]);
const OF: VmNamespace = VmNamespace { id: ID, vm: VmId([1; 16]) };
const OWNER: Owner = match Owner::new("host-7") {
    Ok(owner) => owner,
    Err(_) => panic!("it is printable"),
};
const RECORD: Record = Record { vm: OF.vm, purpose: Purpose::Home, owner: OWNER };

/// A store of 4 MiB in a temporary folder, with a clock that stands still.
struct InFolder {
    parent: TempDir,
    store: FilePageStore,
    clock: Arc<ManualClock>,
}

impl InFolder {
    fn new(synchronise: bool) -> Self {
        let parent = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::default());
        clock.advance(Duration::from_secs(1_000_000_000));
        let options = FilePageStoreOptions { limit: Some(4 << 20), synchronise, max_namespaces: 20 };
        let store = open(&parent, options, &clock);
        Self { parent, store, clock }
    }

    fn reopen(&mut self) {
        self.store = open(&self.parent, self.store.options.clone(), &self.clock);
    }

    fn file(&self, id: NamespaceId, kind: Kind) -> File {
        OpenOptions::new().read(true).write(true).open(self.store.folder.path(id, kind)).unwrap()
    }

    /// A namespace with page 3 in generation 1.
    fn with_a_page() -> Self {
        let this = Self::new(false);
        this.store.create(ID, &RECORD, LEASE).unwrap();
        this.put(1, 3).unwrap();
        this
    }

    fn put(&self, generation: u32, page: u64) -> Result<Stored, StoreError> {
        self.store.put(OF, generation, &[PageToPut { page, value: &[generation as u8; PAGE_SIZE] }])
    }

    fn get(&self, generation: u32, page: u64) -> Result<Vec<u8>, StoreError> {
        self.get_until(generation, page, Instant::now() + Duration::from_secs(10))
    }

    fn get_until(&self, generation: u32, page: u64, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        let mut value = Vec::new();
        let mut take = |_, data: PageData<'_>| value = data.bytes().to_vec();
        self.store.get(OF, &[PageToGet { page, generation }], Urgency::Fault, deadline, &mut take)?;
        Ok(value)
    }
}

fn open(parent: &TempDir, options: FilePageStoreOptions, clock: &Arc<ManualClock>) -> FilePageStore {
    FilePageStore::open_with_clock(&parent.path().join("pages"), "folder", options, clock.clone()).unwrap()
}

impl TestStore for InFolder {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn max_namespaces(&self) -> usize {
        self.store.options.max_namespaces
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    fn crash_user(&mut self) {
        self.reopen();
    }

    fn lose_everything(&mut self) {
        fs::remove_dir_all(self.store.folder.dir()).unwrap();
        self.reopen();
    }

    fn harm(&mut self, id: NamespaceId, page: u64, harm: Harm) -> bool {
        let (table, pages) = (self.file(id, Kind::Table), self.file(id, Kind::Pages));
        let entry_at = |page: u64| PAGE + 128 * page;
        match harm {
            Harm::Lose => pages.write_all_at(&[0; PAGE_SIZE], page * PAGE).unwrap(),
            Harm::Damage => {
                let mut byte = [0];
                pages.read_exact_at(&mut byte, page * PAGE + 2000).unwrap();
                pages.write_all_at(&[byte[0] ^ 1], page * PAGE + 2000).unwrap();
            }
            Harm::LoseTrailer => table.write_all_at(&[0; 128], entry_at(page)).unwrap(),
            Harm::MixUp(other) => {
                let (mut value, mut entry) = ([0; PAGE_SIZE], [0; 128]);
                pages.read_exact_at(&mut value, other * PAGE).unwrap();
                pages.write_all_at(&value, page * PAGE).unwrap();
                table.read_exact_at(&mut entry, entry_at(other)).unwrap();
                table.write_all_at(&entry, entry_at(page)).unwrap();
            }
        }
        true
    }
}

migration_core::page_store_conformance!(|| InFolder::new(false));

/// Not all rules: each call waits for the disk.
#[test]
fn a_store_that_synchronises_keeps_the_rules() {
    let rules: [fn(&mut dyn TestStore); 5] = [
        conformance::rule_03_a_page_comes_back_as_it_was_put,
        conformance::rule_10_the_comparison_is_made_for_each_page,
        conformance::rule_11_a_crash_of_a_user_loses_nothing,
        conformance::rule_11_a_loss_changes_the_incarnation,
        conformance::rule_14_nothing_is_left_after_success,
    ];
    for rule in rules {
        rule(&mut InFolder::new(true));
    }
}

#[test]
fn the_incarnation_includes_the_boot_if_pages_do_not_survive_it() {
    let mut test = InFolder::with_a_page();
    let before = test.store.renew(OF, RECORD.owner, LEASE).unwrap();
    assert!(test.store.boot.is_some());
    test.store.boot = Some([9; 16]);
    assert_ne!(test.store.renew(OF, RECORD.owner, LEASE).unwrap(), before);
    assert_ne!(test.put(2, 3).unwrap().incarnation, before);
    assert_eq!(InFolder::new(true).store.boot, None);
    assert_ne!(boot_id().unwrap(), [0; 16]);
}

#[test]
fn a_disk_that_lost_something_changes_the_incarnation_for_all_users() {
    let mut test = InFolder::new(true);
    let before = test.store.create(ID, &RECORD, LEASE).unwrap();
    let other = open(&test.parent, test.store.options.clone(), &test.clock);
    test.store.note_loss(StoreError::TimedOut);
    let after = other.renew(OF, RECORD.owner, LEASE).unwrap();
    assert_ne!(after, before);
    test.reopen();
    assert_eq!(test.put(1, 1).unwrap().incarnation, after);
    // the others cannot be told
    fs::remove_dir_all(test.store.folder.dir()).unwrap();
    test.store.note_loss(StoreError::TimedOut);
    assert!(test.store.broken.load(Ordering::Relaxed));
    assert!(test.store.create(ID, &RECORD, LEASE).is_err());
}

#[test]
fn a_page_in_the_middle_of_a_put_is_not_missing() {
    let test = InFolder::with_a_page();
    // a writer has written the value of generation 2, and not its entry
    let writer = test.file(ID, Kind::Table);
    writer.lock().unwrap();
    test.file(ID, Kind::Pages).write_all_at(&[2; PAGE_SIZE], 3 * PAGE).unwrap();
    let soon = Instant::now() + Duration::from_millis(20);
    assert!(matches!(test.get_until(1, 3, soon), Err(StoreError::TimedOut)));
    // a page that nobody writes is read without waiting for the lock
    test.file(ID, Kind::Pages).write_all_at(&[1; PAGE_SIZE], 3 * PAGE).unwrap();
    assert_eq!(test.get(1, 3).unwrap(), [1; PAGE_SIZE]);
    // the writer crashes: what it has left is neither of the two
    test.file(ID, Kind::Pages).write_all_at(&[2; PAGE_SIZE], 3 * PAGE).unwrap();
    drop(writer);
    assert!(matches!(test.get(1, 3), Err(StoreError::Missing { count: 1, first: 3, .. })));
    assert!(matches!(test.get(2, 3), Err(StoreError::Missing { .. })));
}

#[test]
fn what_a_crash_has_left_is_removed() {
    let mut test = InFolder::with_a_page();
    let other = NamespaceId([5; 16]);
    for kind in [Kind::New, Kind::Pages] {
        fs::write(test.store.folder.path(other, kind), b"half made").unwrap();
    }
    test.store.create(NamespaceId([6; 16]), &RECORD, LEASE).unwrap();
    for kind in [Kind::New, Kind::Pages] {
        assert!(!test.store.folder.path(other, kind).exists());
    }
    assert_eq!(test.get(1, 3).unwrap(), [1; PAGE_SIZE]);
    // forgotten in half: the id is remembered, and the files are still there
    let until = test.clock.now() + LEASE;
    test.store.folder.remember(ID, until, false).unwrap();
    test.reopen();
    assert!(matches!(test.store.create(ID, &RECORD, LEASE), Err(StoreError::Forgotten(_))));
    test.store.forget(OF).unwrap();
    assert!(matches!(test.put(2, 3), Err(StoreError::Absent(_))));
    let names = fs::read_dir(test.store.folder.dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let of_it: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with(&ID.to_string())).collect();
    assert_eq!(of_it.len(), 1, "{of_it:?}");
}

#[test]
fn a_put_that_waited_for_a_forget_fails() {
    let test = InFolder::with_a_page();
    let waiting = Space::open(&test.store.folder, ID).unwrap();
    test.store.forget(OF).unwrap();
    let deadline = Instant::now() + Duration::from_secs(1);
    assert!(matches!(waiting.header_of_reader(deadline), Err(StoreError::Absent(_))));
}

/// Makes a file one that no store has written.
type Spoil = fn(&Path);

#[test]
fn files_that_make_no_sense_are_refused_and_can_be_forgotten() {
    let spoil: [(&str, Spoil); 6] = [
        ("empty", |path| fs::write(path, b"").unwrap()),
        ("of something else", |path| fs::write(path, [0xff; 5000]).unwrap()),
        ("very large", |path| File::create(path).unwrap().set_len(1 << 42).unwrap()),
        ("a link to a good one", |path| {
            let elsewhere = path.with_extension("copy");
            fs::rename(path, &elsewhere).unwrap();
            symlink(&elsewhere, path).unwrap();
        }),
        ("a link", |path| {
            fs::remove_file(path).unwrap();
            symlink("/dev/zero", path).unwrap();
        }),
        ("a folder", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (what, spoil) in spoil {
        let test = InFolder::with_a_page();
        let path = test.store.folder.path(ID, Kind::Table);
        spoil(&path);
        for result in [test.put(2, 3).map(drop), test.get(1, 3).map(drop), test.store.record(ID).map(drop)] {
            assert!(result.is_err_and(|error| !error.can_retry()), "a table that is {what}");
        }
        assert!(test.store.renew(OF, RECORD.owner, LEASE).is_err(), "a table that is {what}");
        if what != "a folder" {
            test.store.forget(OF).unwrap();
            assert!(matches!(test.put(2, 3), Err(StoreError::Absent(_))), "a table that is {what}");
        }
    }
}

/// Whatever is in the files, a page is handed out as it was put or not at all, and the namespace
/// can be forgotten.
#[test]
fn random_bytes_in_the_files_are_never_handed_out() {
    let mut random = 7u64;
    let mut below = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    for _ in 0..200 {
        let test = InFolder::with_a_page();
        test.put(2, 4).unwrap();
        for _ in 0..1 + below(3) {
            let (kind, at) = match below(3) {
                0 => (Kind::Table, below(100)),
                1 => (Kind::Table, PAGE + below(8 * 128)),
                _ => (Kind::Pages, below(5 * PAGE)),
            };
            let bytes: Vec<u8> = (0..1 + below(40)).map(|_| below(256) as u8).collect();
            test.file(ID, kind).write_all_at(&bytes, at).unwrap();
        }
        for (page, generation) in [(3, 1), (4, 2)] {
            if let Ok(value) = test.get(generation, page) {
                assert_eq!(value, [generation as u8; PAGE_SIZE]);
            }
            assert!(test.get(generation + 1, page).is_err());
        }
        // these may fail
        let _ = test.put(9, 3);
        let _ = test.store.expired();
        test.store.forget(OF).unwrap();
        assert_eq!(test.store.room(), 4 << 20);
    }
}

#[test]
fn a_table_of_another_namespace_hands_out_no_page() {
    // somebody has exchanged the tables of two namespaces of different VMs
    let test = InFolder::with_a_page();
    let other = NamespaceId([5; 16]);
    test.store.create(other, &Record { vm: VmId([9; 16]), ..RECORD }, LEASE).unwrap();
    fs::copy(test.store.folder.path(other, Kind::Table), test.store.folder.path(ID, Kind::Table)).unwrap();
    assert!(matches!(test.get(1, 3), Err(StoreError::OtherVm(_))));
    // asked for as that VM's, it has no page either
    let as_other = VmNamespace { id: ID, vm: VmId([9; 16]) };
    let deadline = Instant::now() + Duration::from_secs(10);
    let wanted = [PageToGet { page: 3, generation: 1 }];
    let result = test.store.get(as_other, &wanted, Urgency::Fault, deadline, &mut |_, _| panic!("it is handed out"));
    assert!(matches!(result, Err(StoreError::Missing { .. })), "{result:?}");
    // a length that is not one
    let test = InFolder::with_a_page();
    test.file(ID, Kind::Table).write_all_at(&[0xff; 4], PAGE + 3 * 128 + 32).unwrap();
    assert!(matches!(test.get(1, 3), Err(StoreError::Missing { .. })));
}

#[test]
fn a_folder_that_others_can_change_is_refused() {
    let test = InFolder::with_a_page();
    let dir = test.store.folder.dir();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o770)).unwrap();
    let options = FilePageStoreOptions { synchronise: false, ..FilePageStoreOptions::default() };
    assert!(FilePageStore::open(dir, "x", options.clone()).is_err());
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(FilePageStore::open(dir, "x", options).is_ok());
    fs::write(dir.join("store"), [1; 33]).unwrap();
    let refused = FilePageStore::open(dir, "x", FilePageStoreOptions::default());
    assert!(matches!(refused, Err(StoreError::Damaged { .. })), "{refused:?}");
    let nowhere = dir.join("a/b");
    assert!(FilePageStore::open(&nowhere, "x", FilePageStoreOptions::default()).is_err());
}

#[test]
fn forgotten_ids_leave_no_files_for_ever() {
    let test = InFolder::with_a_page();
    test.store.forget(OF).unwrap();
    let count = || fs::read_dir(test.store.folder.dir()).unwrap().count();
    let with_one = count();
    test.clock.advance(LEASE);
    let other = NamespaceId([5; 16]);
    test.store.create(other, &RECORD, LEASE).unwrap();
    assert_eq!(count(), with_one - 1 + 2);
    // what is not of a store stays
    File::create(test.store.folder.dir().join("notes")).unwrap().write_all(b"of a person").unwrap();
    test.store.forget(VmNamespace { id: other, ..OF }).unwrap();
    assert!(test.store.folder.dir().join("notes").exists());
}

#[test]
fn a_put_waits_until_another_put_has_ended() {
    let test = InFolder::with_a_page();
    let other = test.file(ID, Kind::Table);
    other.lock().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let store = &test.store;
        let put = scope.spawn(|| {
            let value = [2; PAGE_SIZE];
            let stored = store.put(OF, 2, &[PageToPut { page: 3, value: &value }]);
            done.store(true, Ordering::Relaxed);
            stored
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!done.load(Ordering::Relaxed));
        other.unlock().unwrap();
        assert_eq!(put.join().unwrap().unwrap().taken, [true]);
    });
}

/// The comparison and the replacement are one step, whoever else puts: a generation that was taken
/// is never followed by an older one.
#[test]
fn puts_of_several_handles_do_not_mix() {
    let test = InFolder::with_a_page();
    let generations = AtomicU32::new(2);
    let (parent, options, clock) = (&test.parent, &test.store.options, &test.clock);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = open(parent, options.clone(), clock);
                for _ in 0..50 {
                    let generation = generations.fetch_add(1, Ordering::Relaxed);
                    let value = [generation as u8; PAGE_SIZE];
                    let run = [4, 5, 6].map(|page| PageToPut { page, value: &value });
                    store.put(OF, generation, &run).unwrap();
                }
            });
        }
    });
    let newest = generations.into_inner() - 1;
    for page in 4..7 {
        assert_eq!(test.get(newest, page).unwrap(), [newest as u8; PAGE_SIZE], "page {page}");
    }
}

#[test]
fn without_a_limit_the_file_system_says_how_much_room_there_is() {
    let parent = tempfile::tempdir().unwrap();
    let options = FilePageStoreOptions { synchronise: false, ..FilePageStoreOptions::default() };
    let store = FilePageStore::open(&parent.path().join("pages"), "x", options).unwrap();
    assert!(store.room() > 0);
    store.create(Namespace::new([1; 16]).id(), &RECORD, LEASE).unwrap();
    assert_eq!(store.expired().unwrap(), []);
    assert_eq!(store.name(), "x");
}

#[test]
fn a_folder_records_whether_it_synchronises() {
    for made in [false, true] {
        let test = InFolder::new(made);
        let other = FilePageStoreOptions { synchronise: !made, ..FilePageStoreOptions::default() };
        let refused = FilePageStore::open(test.store.folder.dir(), "x", other);
        assert!(matches!(refused, Err(StoreError::OtherOptions { .. })), "{refused:?}");
        // also after a loss
        test.store.note_loss(StoreError::TimedOut);
        assert_eq!(test.store.folder.read_identity().unwrap().synchronise, made);
    }
}

/// A crash of the host leaves any part of a write: the beginning of the value, or of the entry.
#[test]
fn a_torn_write_leaves_a_page_missing_and_its_neighbours_as_they_were() {
    let (old, new) = (InFolder::with_a_page(), InFolder::with_a_page());
    for test in [&old, &new] {
        test.put(1, 2).unwrap();
        test.put(1, 4).unwrap();
    }
    new.put(2, 3).unwrap();
    let mut entry = [0; 128];
    new.file(ID, Kind::Table).read_exact_at(&mut entry, PAGE + 3 * 128).unwrap();
    let first_entry = {
        let mut bytes = [0; 128];
        old.file(ID, Kind::Table).read_exact_at(&mut bytes, PAGE + 3 * 128).unwrap();
        bytes
    };
    let (pages, table) = (old.file(ID, Kind::Pages), old.file(ID, Kind::Table));
    for sectors in 1..=PAGE_SIZE / 512 {
        let written = sectors * 512;
        for entry_bytes in (0..128).step_by(8) {
            pages.write_all_at(&[1; PAGE_SIZE], 3 * PAGE).unwrap();
            pages.write_all_at(&[2; PAGE_SIZE][..written], 3 * PAGE).unwrap();
            table.write_all_at(&first_entry, PAGE + 3 * 128).unwrap();
            table.write_all_at(&entry[..entry_bytes], PAGE + 3 * 128).unwrap();
            for generation in [1, 2] {
                if let Ok(value) = old.get(generation, 3) {
                    // all that differs between the entries was written, and so was the whole value
                    assert_eq!((value, written), (vec![generation as u8; PAGE_SIZE], PAGE_SIZE));
                }
            }
            assert_eq!(old.get(1, 2).unwrap(), [1; PAGE_SIZE]);
            assert_eq!(old.get(1, 4).unwrap(), [1; PAGE_SIZE]);
        }
    }
    assert_eq!(old.put(3, 3).unwrap().taken, [true]);
    assert_eq!(old.get(3, 3).unwrap(), [3; PAGE_SIZE]);
}

#[test]
fn pages_beyond_the_end_of_a_truncated_file_are_missing() {
    let make = || {
        let test = InFolder::with_a_page();
        test.put(1, 9).unwrap();
        test
    };
    let cases = [
        ("the value is cut", Kind::Pages, 9 * PAGE + 2000),
        ("the value is gone", Kind::Pages, 5 * PAGE),
        ("the entry is cut", Kind::Table, PAGE + 9 * 128 + 20),
        ("the entry is gone", Kind::Table, PAGE + 5 * 128),
    ];
    for (what, kind, len) in cases {
        let mut test = make();
        test.file(ID, kind).set_len(len).unwrap();
        test.reopen();
        assert!(matches!(test.get(1, 9), Err(StoreError::Missing { count: 1, first: 9, .. })), "{what}");
        assert_eq!(test.get(1, 3).unwrap(), [1; PAGE_SIZE], "{what}");
        assert_eq!(test.put(2, 9).unwrap().taken, [true], "{what}");
        assert_eq!(test.get(2, 9).unwrap(), [2; PAGE_SIZE], "{what}");
    }
    // a table without its header is no namespace, and can be forgotten
    let test = make();
    test.file(ID, Kind::Table).set_len(40).unwrap();
    assert!(matches!(test.get(1, 3), Err(StoreError::Damaged { .. })));
    assert!(matches!(test.put(2, 3), Err(StoreError::Damaged { .. })));
    test.store.forget(OF).unwrap();
}

/// Entry and value are each good, and do not belong together.
#[test]
fn a_table_that_disagrees_with_the_values_hands_out_nothing() {
    let test = InFolder::with_a_page();
    test.put(2, 4).unwrap();
    let table = test.file(ID, Kind::Table);
    let mut entry = [0; 128];
    table.read_exact_at(&mut entry, PAGE + 3 * 128).unwrap();
    test.put(2, 3).unwrap();
    table.write_all_at(&entry, PAGE + 3 * 128).unwrap();
    // the entry says generation 1, and the value is of generation 2
    for generation in [1, 2] {
        assert!(matches!(test.get(generation, 3), Err(StoreError::Missing { first: 3, .. })));
    }
    // the entry of page 3 stands at page 4
    table.write_all_at(&entry, PAGE + 4 * 128).unwrap();
    for generation in [1, 2] {
        assert!(matches!(test.get(generation, 4), Err(StoreError::Missing { first: 4, .. })));
    }
}

/// Pages that are scattered are read in one request, each as it was put.
#[test]
fn a_request_reads_scattered_pages_in_runs() {
    let test = InFolder::with_a_page();
    let pages: Vec<u64> = (0..300).map(|at| at * 3 + at % 3).collect();
    let values: Vec<_> = pages.iter().map(|&page| [page as u8 | 1; PAGE_SIZE]).collect();
    let run: Vec<_> = iter::zip(&pages, &values).map(|(&page, value)| PageToPut { page, value }).collect();
    test.store.put(OF, 5, &run).unwrap();
    let wanted: Vec<_> = pages.iter().map(|&page| PageToGet { page, generation: 5 }).collect();
    let mut got = Vec::new();
    let mut take = |page, data: PageData<'_>| {
        assert_eq!(data.bytes(), [page as u8 | 1; PAGE_SIZE]);
        got.push(page);
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    test.store.get(OF, &wanted, Urgency::Prefetch, deadline, &mut take).unwrap();
    got.sort_unstable();
    assert_eq!(got, pages);
}

#[test]
fn a_store_is_full_when_no_new_page_fits() {
    let mut this = InFolder::new(false);
    this.store.options.limit = Some(3 * BYTES_PER_PAGE);
    this.store.create(ID, &RECORD, LEASE).unwrap();
    for page in [3, 5, 6] {
        this.put(1, page).unwrap();
    }
    assert_eq!(this.store.room(), 0);
    assert!(matches!(this.put(1, 7), Err(StoreError::NoRoom { needed, room: 0 }) if needed == BYTES_PER_PAGE));
    // a page that is there already needs no room
    this.put(2, 5).unwrap();
    assert_eq!(this.get(2, 5).unwrap(), [2; PAGE_SIZE]);
}

#[test]
fn the_usual_clock_is_the_time_of_day_and_a_boot_has_its_own_id() {
    let year_2020 = Duration::from_secs(50 * 365 * 24 * 3600);
    assert!(WallClock.now() > year_2020);
    let id = fs::read_to_string(BOOT_ID).unwrap().trim().replace('-', "");
    assert_eq!(format!("{:032x}", u128::from_be_bytes(boot_id().unwrap())), id);
}

/// An id that is forgotten again is remembered for as long as the later call says.
#[test]
fn an_id_is_remembered_until_the_last_lease_has_ended() {
    let this = InFolder::with_a_page();
    this.store.forget(OF).unwrap();
    let until = |this: &InFolder| this.store.folder.contents(this.clock.now()).unwrap().forgotten[&ID];
    let first = until(&this);
    this.clock.advance(Duration::from_secs(10));
    this.store.forget(OF).unwrap();
    assert!(until(&this) >= first + Duration::from_secs(10) || until(&this) > first);
    assert!(this.store.create(ID, &RECORD, LEASE).is_err());
}
