//! A page store whose files cannot grow. The limit is one of a process, so the test has a process
//! of its own.

use std::{
    env,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use migration_core::{
    PAGE_SIZE,
    store::{
        Namespace, Owner, PageStore as _, PageToGet, PageToPut, Purpose, Record, StoreError, Stored, Urgency,
        VmNamespace,
    },
    vm::VmId,
};
use migration_transport::{FilePageStore, FilePageStoreOptions};

/// Set to the store's folder in the process that has the limit.
const FOLDER: &str = "MIGRATION_TEST_FULL_DISK";
/// Files of that process end here, in pages.
const MAX_PAGES: u64 = 64;
const LEASE: Duration = Duration::from_secs(60);

#[test]
fn a_put_that_fails_for_want_of_space_spoils_no_other_page() {
    if let Some(folder) = env::var_os(FOLDER) {
        return with_small_files(Path::new(&folder));
    }
    let parent = tempfile::tempdir().unwrap();
    // 512 bytes are a block. The signal has to be ignored, or it would end the process
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", MAX_PAGES * 8);
    let child = Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", "a_put_that_fails_for_want_of_space_spoils_no_other_page", "--nocapture"])
        .env(FOLDER, parent.path().join("pages"))
        .output()
        .unwrap();
    let shown = format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{shown}");
}

fn put(store: &FilePageStore, of: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
    let value = [generation as u8; PAGE_SIZE];
    let run: Vec<_> = pages.iter().map(|&page| PageToPut { page, value: &value }).collect();
    store.put(of, generation, &run)
}

fn has(store: &FilePageStore, of: VmNamespace, generation: u32, page: u64) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut same = false;
    let result = store.get(of, &[PageToGet { page, generation }], Urgency::Fault, deadline, &mut |_, data| {
        same = data.bytes() == [generation as u8; PAGE_SIZE];
    });
    assert_eq!(result.is_ok(), same, "{result:?}");
    same
}

fn with_small_files(folder: &Path) {
    let limit = Some(1 << 20);
    let options = FilePageStoreOptions { limit, synchronise: false, ..FilePageStoreOptions::default() };
    let store = FilePageStore::open(folder, "small", options).unwrap();
    let record = Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7").unwrap() };
    let of = Namespace::new([7; 16]).of(record.vm);
    let incarnation = store.create(of.id, &record, LEASE).unwrap();
    put(&store, of, 1, &[3, MAX_PAGES - 1]).unwrap();

    // the first run has room, the second one has half of what it needs
    let room = store.room();
    for generation in 2..200 {
        let failed = put(&store, of, generation, &[10, MAX_PAGES - 1, MAX_PAGES, MAX_PAGES + 1]);
        assert!(matches!(&failed, Err(error @ StoreError::Io { .. }) if !error.can_retry()), "{failed:?}");
        assert!(store.room() >= room - 2 * (PAGE_SIZE as u64 + 128), "failed puts use up the room");
    }
    // what was stored of it is right, and what was not is missing
    assert!(has(&store, of, 199, 10));
    assert!(!has(&store, of, 199, MAX_PAGES) && !has(&store, of, 199, MAX_PAGES + 1));
    assert!(has(&store, of, 1, 3));
    // the store goes on, and has lost nothing that it would have to tell its users
    let stored = put(&store, of, 200, &[3, MAX_PAGES - 1]).unwrap();
    assert_eq!((stored.incarnation, stored.taken), (incarnation, vec![true, true]));
    assert!(has(&store, of, 200, MAX_PAGES - 1));
    store.forget(of).unwrap();
    assert_eq!(store.room(), 1 << 20);
}
