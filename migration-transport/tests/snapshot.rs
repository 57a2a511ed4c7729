//! Tests of snapshots of a running guest in a file and in memory, and of guests that are restored
//! from them.

#[allow(dead_code, reason = "the same VM is also moved, in other tests")]
mod common;

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use common::{Guest, TestHost, TestVm, layout};
use migration_core::{
    MigrationError, PageSet,
    engine::{Controller, RestoreOptions, RestoreReport, SnapshotOptions, SnapshotReport, restore, snapshot},
    report::{Event, Observer},
    store::{MemoryVersions, PageContent, VersionStore},
    text::describe,
    vm::{SourceVm, VmId},
};
use migration_transport::SnapshotFile;

fn take(vm: &mut TestVm, store: &mut dyn VersionStore) -> Result<SnapshotReport, MigrationError> {
    let (_controller, commands) = Controller::new();
    snapshot(vm, store, &SnapshotOptions { epoch: 4, ..SnapshotOptions::default() }, commands)
}

fn back(store: &mut dyn VersionStore) -> Result<(Arc<Guest>, RestoreReport), MigrationError> {
    let restored = restore(store, &TestHost::new(0).0, &RestoreOptions::default())?;
    Ok((restored.vm.guest.clone(), restored.report))
}

/// Checks that the guest runs at full speed without tracking, and that its memory is correct.
fn check_untouched(vm: &TestVm) {
    assert!(vm.guest.is_running() && !vm.tracks() && vm.guest.throttle.load(Ordering::SeqCst) == 0);
    vm.guest.set_running(false);
    vm.guest.check();
    vm.guest.set_running(true);
}

fn open(path: &Path) -> io::Result<SnapshotFile> {
    SnapshotFile::open(path, layout().pages())
}

#[test]
fn a_running_guest_is_saved_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    let mut vm = TestVm::new();
    for n in 0..20 {
        let mut memory = MemoryVersions::default();
        let mut file = SnapshotFile::create(&path, layout().pages()).unwrap();
        let store: &mut dyn VersionStore = if n % 2 == 0 { &mut file } else { &mut memory };
        let report = take(&mut vm, store).unwrap();
        assert!(!report.rounds.is_empty() && report.downtime < report.total && report.state_bytes > 0);
        assert!(report.pages.total == 1024 && report.pages.distinct + report.pages.hole >= 1024);
        check_untouched(&vm);
        let at = vm.guest.at.load(Ordering::SeqCst);
        drop(file);
        let mut file = open(&path).unwrap();
        let store: &mut dyn VersionStore = if n % 2 == 0 { &mut file } else { &mut memory };
        // `start` has checked each page against the position in the state
        let (guest, report) = back(store).unwrap();
        assert_eq!((report.id, report.epoch, report.running), (VmId([3; 16]), 5, true));
        assert!(guest.is_running());
        guest.set_running(false);
        guest.check();
        // both guests run
        while vm.guest.at.load(Ordering::SeqCst) <= at {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_guest_that_may_not_run_stays_paused() {
    let mut store = MemoryVersions::default();
    take(&mut TestVm::new(), &mut store).unwrap();
    let paused = RestoreOptions { paused: true, ..RestoreOptions::default() };
    let restored = restore(&mut store, &TestHost::new(0).0, &paused).unwrap();
    assert!(!restored.report.running && !restored.vm.guest.is_running());
}

#[test]
fn another_vm_is_not_restored() {
    let mut store = MemoryVersions::default();
    take(&mut TestVm::new(), &mut store).unwrap();
    let (host, _arrived) = TestHost::new(0);
    let mut restore_as = |id| {
        let options = RestoreOptions { expected: Some(VmId([id; 16])), ..RestoreOptions::default() };
        restore(&mut store, &host, &options).map(|restored| restored.vm)
    };
    let error = describe(restore_as(4).err().unwrap());
    assert!(error.contains(&format!("of VM {}, not of VM {}", VmId([3; 16]), VmId([4; 16]))), "{error}");
    assert!(restore_as(3).unwrap().guest.is_running());
}

/// A store that calls a function at its nth call.
struct At<'a> {
    store: MemoryVersions,
    calls: u64,
    at: u64,
    then: &'a mut (dyn FnMut() -> io::Result<()> + Send),
    discarded: bool,
}

impl At<'_> {
    fn call(&mut self) -> io::Result<()> {
        self.calls += 1;
        if self.calls == self.at { (self.then)() } else { Ok(()) }
    }
}

impl VersionStore for At<'_> {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.call()?;
        self.store.put(page, data)
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.call()?;
        self.store.commit(number, state)
    }

    fn discard(&mut self) {
        self.discarded = true;
        self.store.discard();
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.store.latest()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        self.store.list()
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.store.read(pages, take)
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.store.restore(take)
    }
}

/// Returns the number of calls of a store in one snapshot.
fn calls() -> u64 {
    let mut store = At { store: MemoryVersions::default(), calls: 0, at: 0, then: &mut || Ok(()), discarded: false };
    take(&mut TestVm::new(), &mut store).unwrap();
    store.calls
}

#[test]
fn a_store_that_fails_anywhere_leaves_the_guest_untouched() {
    let all = calls();
    let mut vm = TestVm::new();
    let (mut failed, mut taken) = (0, 0);
    for at in (1..=all).step_by(97).chain(all - 40..all + 10) {
        let mut then = || Err(io::Error::from(io::ErrorKind::StorageFull));
        let mut store = At { store: MemoryVersions::default(), calls: 0, at, then: &mut then, discarded: false };
        match take(&mut vm, &mut store) {
            Err(error) => {
                assert!(matches!(error, MigrationError::Store { .. }), "{error}");
                assert!(store.discarded && store.latest().is_none());
                failed += 1;
            }
            Ok(_) => taken += 1,
        }
        check_untouched(&vm);
    }
    assert!(failed > 10, "{failed} failed, {taken} were taken");
    take(&mut vm, &mut MemoryVersions::default()).unwrap();
}

#[test]
fn cancelled_anywhere() {
    let mut vm = TestVm::new();
    // the first pass has at least two of three pages
    for at in [1, 300, 682] {
        let (controller, commands) = Controller::new();
        let mut then = || {
            controller.cancel("by the test");
            Ok(())
        };
        let mut store = At { store: MemoryVersions::default(), calls: 0, at, then: &mut then, discarded: false };
        let error = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), commands).unwrap_err();
        assert!(matches!(error, MigrationError::Cancelled(_)), "{error}");
        assert!(store.discarded && store.latest().is_none());
        check_untouched(&vm);
    }
}

#[test]
fn a_vm_that_cannot_be_saved_runs_on() {
    let mut vm = TestVm::new();
    vm.failing_saves = 1;
    let mut store = MemoryVersions::default();
    let error = take(&mut vm, &mut store).unwrap_err();
    assert!(describe(&error).contains("the device is busy"), "{error:?}");
    check_untouched(&vm);
    take(&mut vm, &mut store).unwrap();
    back(&mut store).unwrap();
}

/// A VMM that also tracks for itself misses no page that was written before or during a snapshot.
#[test]
fn a_snapshot_returns_the_dirty_bits_of_others() {
    for fails in [false, true] {
        let mut vm = TestVm::new();
        vm.tracker().start().unwrap();
        let first = vm.guest.at.load(Ordering::SeqCst);
        vm.failing_saves = fails.into();
        assert_eq!(take(&mut vm, &mut MemoryVersions::default()).is_err(), fails);
        assert!(vm.tracks() && vm.guest.is_running());
        vm.guest.set_running(false);
        let mut dirty = PageSet::empty(layout().pages());
        vm.tracker().harvest(&mut dirty).unwrap();
        let pages = layout().pages();
        // the first steps may have come before the tracker started
        for step in first + 64..vm.guest.at.load(Ordering::SeqCst) {
            assert!(dirty.contains(step % pages), "step {step}, from {first} on: {dirty:?}");
        }
    }
}

/// Counts the rounds and records the warnings.
#[derive(Default)]
struct Counts {
    rounds: AtomicU64,
    warnings: Mutex<Vec<String>>,
}

impl Observer for Counts {
    fn event(&self, event: &Event) {
        match event {
            Event::RoundEnded(_) => drop(self.rounds.fetch_add(1, Ordering::SeqCst)),
            Event::Warning(why) => self.warnings.lock().unwrap().push(why.clone()),
            _ => {}
        }
    }
}

#[test]
fn free_pages_that_are_not_known_are_saved() {
    let mut vm = TestVm::new();
    vm.confused = true;
    let counts = Arc::new(Counts::default());
    let options = SnapshotOptions { observer: counts.clone(), ..SnapshotOptions::default() };
    let (_controller, commands) = Controller::new();
    let mut store = MemoryVersions::default();
    let report = snapshot(&mut vm, &mut store, &options, commands).unwrap();
    assert_eq!((counts.rounds.load(Ordering::SeqCst), report.pages.free), (report.rounds.len() as u64, 0));
    assert!(counts.warnings.lock().unwrap().iter().all(|why| why.contains("the balloon has burst")));
    back(&mut store).unwrap();
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let reason = |store: &mut dyn VersionStore| describe(back(store).map(|_| ()).unwrap_err());
    let mut none = MemoryVersions::default();
    assert!(reason(&mut none).contains("there is none"));
    none.commit(1, Bytes::from_static(b"state of something else")).unwrap();
    assert!(reason(&mut none).contains("version"));
    // a complete snapshot with one page too many
    let mut store = MemoryVersions::default();
    take(&mut TestVm::new(), &mut store).unwrap();
    let (number, saved) = store.latest().unwrap();
    store.put(layout().pages(), Some(&[1; 4096])).unwrap();
    store.commit(number, saved).unwrap();
    assert!(reason(&mut store).contains("not inside"));
    // a host with too little RAM, and one that cannot load the state
    let mut store = MemoryVersions::default();
    take(&mut TestVm::new(), &mut store).unwrap();
    let (host, _arrived) = TestHost::new(1);
    let small = RestoreOptions { max_ram_bytes: 1 << 20, ..RestoreOptions::default() };
    let error = restore(&mut store, &host, &small).err().unwrap();
    assert!(describe(&error).contains("are allowed"), "{error:?}");
    let error = restore(&mut store, &host, &RestoreOptions::default()).err().unwrap();
    assert!(describe(&error).contains("the state is refused, as asked"), "{error:?}");
    restore(&mut store, &host, &RestoreOptions::default()).unwrap();
}
