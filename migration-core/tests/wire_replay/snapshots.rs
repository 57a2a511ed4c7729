//! Snapshots of a guest that writes as a script says: what is put, what is counted, and how far it
//! is throttled.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    engine::{Controller, RestoreOptions, SnapshotOptions, SnapshotReport, restore, snapshot},
    report::{Event, Observer},
    spawner::GuestImpact,
    state::{Section, VmState},
    store::{MemoryVersions, VersionStore},
    text::describe,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{SourceVm, VmDescription, VmError, VmId},
};

use crate::VM;
use crate::guest::{Host, description_of, piece, state};

/// A page, and the byte that it is full of.
pub(crate) type Write = (u64, u8);

pub(crate) struct Scripted {
    pub(crate) description: VmDescription,
    ram: Arc<HeapRam>,
    tracker: BitmapTracker,
    dirty: Arc<DirtyBitmap>,
    /// What it writes in each pass, as long as it is throttled by less than so many percent.
    pub(crate) writes: Vec<Write>,
    until: u8,
    /// What saving the state writes.
    saves: Vec<Write>,
    pub(crate) free: PageRange,
    pub(crate) throttled: Vec<u8>,
}

impl Scripted {
    pub(crate) fn new(pages: u64, data: u64) -> Self {
        let regions = vec![RamRegion { gpa: 0, len: pages << 12 }];
        let description = description_of(RamLayout::new(regions).unwrap());
        let dirty = DirtyBitmap::new(description.layout.clone());
        let (ram, tracker) =
            (Arc::new(HeapRam::new(description.layout.clone()).unwrap()), BitmapTracker::new(dirty.clone()));
        let (writes, saves, throttled) = (Vec::new(), Vec::new(), Vec::new());
        let vm =
            Self { description, ram, tracker, dirty, writes, until: 100, saves, free: PageRange::new(0, 0), throttled };
        (0..data).for_each(|page| vm.write((page, page as u8 | 1)));
        vm
    }

    fn write(&self, (page, byte): Write) {
        let ram = &self.ram;
        ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[byte; PAGE_SIZE]);
        self.dirty.mark_page(page);
    }

    fn first_byte(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.ram.read(page << 12, &mut byte).unwrap();
        byte[0]
    }
}

impl SourceVm for Scripted {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        Ok(self.description.clone())
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        into.insert_range(self.free);
        Ok(())
    }

    fn iterate_state(&mut self, _budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        if self.throttled.last().copied().unwrap_or(0) < self.until {
            self.writes.iter().for_each(|&write| self.write(write));
        }
        Ok((vec![piece()], 0))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.throttled.push(percent);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.saves.iter().for_each(|&write| self.write(write));
        Ok(state())
    }

    fn released(&mut self) {}
}

fn take(vm: &mut Scripted, options: SnapshotOptions) -> (SnapshotReport, MemoryVersions) {
    let mut store = MemoryVersions::default();
    let report = snapshot(vm, &mut store, &options, Controller::new().1).unwrap();
    (report, store)
}

#[test]
fn each_page_is_counted_as_what_it_was() {
    let mut vm = Scripted::new(64, 40);
    vm.free = PageRange::new(30, 5);
    (vm.writes, vm.saves) = (vec![(2, 99), (3, 0), (31, 7)], vec![(2, 98), (50, 97)]);
    let (report, mut store) = take(&mut vm, SnapshotOptions { epoch: 4, ..SnapshotOptions::default() });
    let pages = report.pages;
    assert_eq!((pages.total, pages.hole, pages.free), (64, 24, 5));
    // 35 in the pass, one of them zero by then; pages 2, 3 and 50 in the pause
    assert_eq!((pages.plain, pages.zero, pages.distinct), (34 + 2, 1 + 1, 36));
    assert_eq!((report.copied, report.throttle_percent, vm.throttled.len()), (3, 0, 0));
    let rounds: Vec<_> = report.rounds.iter().map(|round| (round.pages, round.wire_bytes)).collect();
    assert_eq!(rounds, [(35, 34 * PAGE_SIZE as u64)]);
    assert!(report.downtime > Duration::ZERO && report.downtime < report.total);
    assert_eq!(report.state_bytes, store.latest().unwrap().1.len() as u64);

    // and it comes back, where there is room for it
    let ((to, arrived), description) = (mpsc::channel(), vm.description.clone());
    let host = Host { description, to, paging: None };
    let bytes = vm.description.layout.bytes();
    let small = RestoreOptions { max_ram_bytes: bytes - 1, ..RestoreOptions::default() };
    let refused = restore(&mut store, &host, &small).err().unwrap();
    assert!(describe(&refused).contains("bytes of RAM"), "{refused:?}");
    let just = RestoreOptions { max_ram_bytes: bytes, ..RestoreOptions::default() };
    let report = restore(&mut store, &host, &just).unwrap().report;
    assert_eq!((report.epoch, report.pages, report.running), (5, 35, true));
    let arrived = arrived.recv().unwrap();
    for page in (0..64).filter(|page| !(30..35).contains(page)) {
        let mut byte = [0];
        arrived.ram.read(page << 12, &mut byte).unwrap();
        assert_eq!(byte[0], vm.first_byte(page), "page {page}");
    }
    assert_eq!((arrived.pieces, arrived.state), (1, Some(state())));
}

/// Panics at each event, after it was noted.
#[derive(Default)]
struct Rounds(Mutex<Vec<(u64, u8)>>);

impl Observer for Rounds {
    fn event(&self, event: &Event) {
        if let Event::RoundEnded(round) = event {
            self.0.lock().unwrap().push((round.pages, round.throttle_percent));
        }
        std::panic::resume_unwind(Box::new("an observer that panics"));
    }
}

/// 1024 pages, which take 4 ms to copy, of a limit of 5 ms, of which 2 ms are fixed costs.
fn busy(until: u8) -> Scripted {
    let mut vm = Scripted::new(1024, 1024);
    (vm.writes, vm.until) = ((0..1024).map(|page| (page, page as u8 | 1)).collect(), until);
    vm
}

fn limited(impact: GuestImpact) -> SnapshotOptions {
    SnapshotOptions { downtime_limit: Duration::from_millis(5), impact, timeout: None, ..SnapshotOptions::default() }
}

#[test]
fn a_guest_is_throttled_until_its_pause_is_short_enough_and_no_longer() {
    let (mut vm, observer) = (busy(75), Arc::new(Rounds::default()));
    let options = SnapshotOptions { observer: observer.clone(), ..limited(GuestImpact::Balanced) };
    let (report, _) = take(&mut vm, options);
    assert_eq!((vm.throttled, report.throttle_percent), (vec![75, 0], 75));
    assert_eq!(*observer.0.lock().unwrap(), [(1024, 0), (1024, 75)]);
    let rounds: Vec<_> = report.rounds.iter().map(|round| (round.pages, round.throttle_percent)).collect();
    assert_eq!(rounds, [(1024, 0), (1024, 75)]);
    assert_eq!(report.copied, 0);
}

#[test]
fn a_guest_that_never_slows_down_is_paused_all_the_same() {
    // as far as its user lets it be throttled
    let mut vm = busy(100);
    let (report, _) = take(&mut vm, limited(GuestImpact::Low));
    assert_eq!((vm.throttled, report.throttle_percent, report.copied), (vec![75, 80, 0], 80, 1024));
    assert!(report.rounds.len() > 3, "{}", report.rounds.len());
    // or when its time is over
    let mut vm = busy(100);
    let (report, _) = take(&mut vm, SnapshotOptions { timeout: Some(Duration::ZERO), ..limited(GuestImpact::Low) });
    assert_eq!((vm.throttled.len(), report.rounds.len(), report.copied), (0, 1, 1024));
    // or at once, where that is within the limit
    let mut vm = busy(100);
    let (report, _) =
        take(&mut vm, SnapshotOptions { downtime_limit: Duration::from_secs(9), ..limited(GuestImpact::Low) });
    assert_eq!((vm.throttled.len(), report.rounds.len(), report.copied), (0, 1, 1024));
}

#[test]
fn a_vm_is_restored_as_the_one_that_was_saved_and_runs_if_its_user_wants_that() {
    let mut vm = Scripted::new(8, 4);
    let (_, mut store) = take(&mut vm, SnapshotOptions::default());
    let mut restored = |options: &RestoreOptions| {
        let ((to, arrived), description) = (mpsc::channel(), vm.description.clone());
        let restored = restore(&mut store, &Host { description, to, paging: None }, options);
        restored.map(|restored| (restored.report.running, arrived.recv().unwrap().running))
    };
    let default = RestoreOptions::default();
    assert_eq!((default.max_ram_bytes, default.paused, default.expected), (1 << 40, false, None));
    assert_eq!(restored(&default).unwrap(), (true, true));
    assert_eq!(restored(&RestoreOptions { paused: true, ..default.clone() }).unwrap(), (false, false));
    assert!(restored(&RestoreOptions { expected: Some(VM), ..default.clone() }).is_ok());
    let other = RestoreOptions { expected: Some(VmId([9; 16])), ..default };
    let refused = describe(restored(&other).unwrap_err());
    assert!(refused.contains("not of VM"), "{refused}");
}
