//! What the source does before a round, before the pause, and in it: pieces of device state, the
//! pages of the guest's first steps, forward checkpoints, and RAM that is shared.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    channel::{Channel, Connector},
    checkpoint::FailSafe,
    engine::{Controller, HugePages, ReceiverOptions, SnapshotOptions, SourceOptions, migrate, snapshot},
    report::{Outcome, Report},
    state::{MAX_SECTIONS, Section, VmState},
    store::{MemoryVersions, PageContent, VersionStore},
    strategy::{HandOver, Hybrid, Linear, PostCopy, Strategy},
    text::describe,
    tracker::{DirtyBitmap, DirtyTracker},
    vm::{SourceVm, VmDescription, VmError},
    wire::{LaneKind, STATE_CHUNK},
};

use crate::{
    HANG,
    destination::Destination,
    guest::{FILLER, Host, RecordedVm, checksums, description_of, state},
    live::Link,
    pager::Paging,
    post_copy::paged_description,
    protected::{Arbiter, NEVER, ProtectedHost, Seen},
    rounds::Rounds,
};

/// What is asked for at once of devices whose state goes in pieces.
const BUDGET: u64 = STATE_CHUNK as u64 / 2;

/// A VM whose answers a test chooses.
struct Stepped {
    vm: RecordedVm,
    /// What it answers when it is asked for pieces, call by call: their lengths, and how many bytes
    /// are pending then. Without an answer there are none.
    pieces: Vec<(Vec<usize>, u64)>,
    asked: usize,
    /// The pages of the guest's first steps.
    entry: PageRange,
    files: Option<Vec<File>>,
    paused: Arc<AtomicBool>,
}

impl Stepped {
    fn new(vm: RecordedVm) -> Self {
        let (pieces, entry) = (Vec::new(), PageRange::new(0, 0));
        Self { vm, pieces, asked: 0, entry, files: None, paused: Arc::default() }
    }
}

impl SourceVm for Stepped {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        self.vm.describe()
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        SourceVm::ram(&self.vm)
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.vm.tracker()
    }

    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        let files = self.files.as_ref().ok_or_else(|| VmError::new("its RAM is in private memory"))?;
        Ok(files.iter().map(File::as_fd).collect())
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        assert_eq!(budget as u64, BUDGET);
        let answer = self.pieces.get(self.asked).cloned();
        self.asked += 1;
        let (lengths, pending) = answer.unwrap_or_default();
        let piece = |len| Section { name: FILLER.into(), instance: 0, version: 1, data: Bytes::from(vec![0; len]) };
        Ok((lengths.into_iter().map(piece).collect(), pending))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.paused.store(true, Ordering::SeqCst);
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.paused.store(false, Ordering::SeqCst);
        self.vm.resume()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.vm.throttle(percent)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.vm.save_state()
    }

    fn entry_pages(&mut self, saved: &VmState, into: &mut PageSet) {
        assert_eq!(*saved, state());
        into.insert_range(self.entry);
    }

    fn released(&mut self) {
        self.vm.released();
    }
}

fn pages(count: u64) -> VmDescription {
    description_of(RamLayout::new(vec![RamRegion { gpa: 0, len: count << 12 }]).unwrap())
}

fn paged() -> Paging {
    Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() }
}

/// Moves the VM, whose pages may follow it.
fn moved(vm: &mut Stepped, strategy: &mut dyn Strategy, options: &SourceOptions) -> Report {
    let (description, paging) = (vm.describe().unwrap(), (options.demand_lanes > 0).then(paged));
    let destination = Destination::of(HANG, |to| Host { description, to, paging });
    let report = migrate(vm, &Link::new(&destination, None), strategy, options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, told) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.vm.ram), "{told}");
    report
}

#[test]
fn pieces_are_asked_for_until_devices_come_to_an_end_or_do_not_get_nearer() {
    let few = |pending: &[u64]| pending.iter().map(|&pending| (vec![7], pending)).collect::<Vec<_>>();
    let slow = |len| (0..9).map(|call| (vec![len], 2 * BUDGET - call)).collect::<Vec<_>>();
    for (pieces, asked) in [
        // less is pending than is asked for at once
        (few(&[0, 0]), 1),
        (few(&[BUDGET - 1, 0]), 1),
        (few(&[3 * BUDGET, 2 * BUDGET, BUDGET, BUDGET - 1, 0]), 4),
        // as much as before, or more
        (few(&[3 * BUDGET, 3 * BUDGET, 2 * BUDGET, 0]), 2),
        (few(&[3 * BUDGET, 4 * BUDGET, 2 * BUDGET, 0]), 2),
        // more was sent than was pending at first
        (slow(BUDGET as usize), 3),
        (slow(BUDGET as usize + 1), 2),
    ] {
        let mut vm = Stepped::new(RecordedVm::of(pages(8), &[(1, 1)], &[]));
        vm.pieces = pieces.clone();
        let options = SourceOptions { demand_lanes: 0, ..SourceOptions::default() };
        let report = moved(&mut vm, &mut Rounds(1), &options);
        assert_eq!(vm.asked, asked, "{pieces:?}");
        let sent: usize = pieces[..asked].iter().flat_map(|(lengths, _)| lengths).sum();
        assert_eq!(report.state_bytes, (state().encode().len() + sent) as u64, "{pieces:?}");
    }
}

#[test]
fn a_snapshot_holds_so_many_pieces_and_no_more() {
    for (count, fits) in [(MAX_SECTIONS, true), (MAX_SECTIONS + 1, false)] {
        let mut vm = Stepped::new(RecordedVm::of(pages(8), &[(1, 1)], &[]));
        vm.pieces = vec![(vec![0; count], 0)];
        let mut store = MemoryVersions::default();
        let taken = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), Controller::new().1);
        let refused = taken.err().map(|error| describe(&error));
        assert_eq!(refused.is_none(), fits, "{refused:?}");
        assert!(refused.is_none_or(|why| why.contains("more than 8192 pieces")));
    }
}

/// So many pages with data.
fn full_of_data(count: u64) -> Vec<(u64, u8)> {
    (0..count).map(|page| (page, 1 + (page % 250) as u8)).collect()
}

#[test]
fn pages_of_the_first_steps_go_in_the_pause_but_not_too_many_and_no_huge_ones() {
    for (huge, wanted, sent) in [
        (HugePages::Split, 100, 100),
        // the guest needs more than that at once, it says
        (HugePages::Split, 300, 128),
        (HugePages::Whole, 100, 0),
    ] {
        let mut vm = Stepped::new(RecordedVm::of(pages(512), &full_of_data(200), &[]));
        vm.entry = PageRange::new(0, wanted);
        let options = SourceOptions { huge, demand_lanes: 1, ..SourceOptions::default() };
        let report = moved(&mut vm, &mut PostCopy { order: Box::new(Linear::default()) }, &options);
        assert_eq!(report.pages.entry, sent, "{huge:?}");
        // and they are no round
        assert!(report.rounds.is_empty(), "{huge:?}");
    }
}

#[test]
fn a_round_that_nobody_stops_sends_all_although_the_rest_could_follow() {
    let mut vm = Stepped::new(RecordedVm::of(pages(2048), &full_of_data(2048), &[(5, 9)]));
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let report = moved(&mut vm, &mut Hybrid { rounds: 1, order: Box::new(Linear::default()) }, &options);
    let rounds: Vec<_> = report.rounds.iter().map(|round| round.pages).collect();
    assert_eq!((rounds, report.pages.pushed + report.pages.demanded), (vec![2048], 1));
}

/// A store for a forward checkpoint. While the first page is put the guest writes many others.
struct Ahead {
    store: MemoryVersions,
    paused: Arc<AtomicBool>,
    written: Option<(Arc<DirtyBitmap>, u64)>,
    put_in_the_pause: u64,
}

impl VersionStore for Ahead {
    fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()> {
        if let Some((dirty, count)) = self.written.take() {
            (0..count).for_each(|page| dirty.mark_page(page));
        }
        self.put_in_the_pause += u64::from(self.paused.load(Ordering::SeqCst));
        self.store.put(page, content)
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.store.commit(number, state)
    }

    fn discard(&mut self) {
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
}

#[test]
fn a_forward_checkpoint_has_what_is_left_behind_and_leaves_little_to_the_pause() {
    // pages that the guest writes while it is put, and those of them that wait for the pause
    for (written, waiting) in [(1024, 1024), (1025, 0)] {
        // one more is written when the guest is paused
        let mut vm = Stepped::new(RecordedVm::of(pages(2048), &full_of_data(1500), &[(1400, 9)]));
        let store = Ahead {
            store: MemoryVersions::default(),
            paused: vm.paused.clone(),
            written: Some((vm.vm.dirty.clone(), written)),
            put_in_the_pause: 0,
        };
        let store = Arc::new(Mutex::new(store));
        let fence = Arbiter::new(false, &[]);
        let fail_safe = FailSafe { interval: NEVER, detect: NEVER, reverse: None, forward: Some(store.clone()), fence };
        let receiver = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
        let destination = Destination::with(receiver, |to| {
            let host = Host { description: pages(2048), to, paging: Some(paged()) };
            ProtectedHost { host, seen: Arc::<Seen>::default(), stops: true }
        });
        let options = SourceOptions { fail_safe: Some(fail_safe), demand_lanes: 1, ..SourceOptions::default() };
        let mut strategy = PostCopy { order: Box::new(Linear::default()) };
        let link = Link::new(&destination, None);
        let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        let (arrived, told) = destination.finish();
        assert_eq!(arrived.pages(), checksums(&vm.vm.ram), "{told}");
        let mut store = store.lock().unwrap();
        assert_eq!(store.put_in_the_pause, waiting + 1, "{written} written");
        assert_eq!(store.latest(), Some((1, state().encode().into())));
        let all: Vec<u64> = (0..1500).collect();
        assert_eq!(store.list().unwrap().iter().collect::<Vec<_>>(), all);
        let mut differ = Vec::new();
        let read = store.read(&all, &mut |page, content| {
            let mut here = [0; PAGE_SIZE];
            vm.vm.ram.slice(PageRange::new(page, 1)).unwrap().copy_to(&mut here);
            if content != Some(&here) {
                differ.push(page);
            }
            Ok(())
        });
        read.unwrap();
        assert!(differ.is_empty(), "{written} written: pages {differ:?} differ");
    }
}

/// A link that no source may use.
struct Unused {
    carries_files: bool,
}

impl Connector for Unused {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        panic!("the destination is asked");
    }

    fn connect_as(&self, _kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.connect()
    }

    fn carries_files(&self) -> bool {
        self.carries_files
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

#[test]
fn ram_that_cannot_be_shared_is_refused_before_a_destination_is_asked() {
    let protected = FailSafe::in_memory(Arbiter::new(false, &[]));
    let regions = paged_description().layout.regions().len();
    for (files, carries_files, fail_safe, why) in [
        (None, true, None, "its RAM is in private memory"),
        (Some(regions - 1), true, None, "1 memory files for 2 regions"),
        (Some(regions + 1), true, None, "3 memory files for 2 regions"),
        (Some(regions), false, None, "over a Unix socket"),
        (Some(regions), true, Some(protected), "no checkpoints are taken of RAM that is shared"),
    ] {
        let mut vm = Stepped::new(RecordedVm::of(paged_description(), &[], &[]));
        // a dirty log of this size would go along
        vm.tracker().start().unwrap();
        vm.files = files.map(|count| (0..count).map(|_| File::open("/dev/null").unwrap()).collect());
        let options = SourceOptions { fail_safe, ..SourceOptions::default() };
        let report = migrate(&mut vm, &Unused { carries_files }, &mut HandOver, &options, Controller::new().1);
        let reason = report.reason.unwrap_or_default();
        assert_eq!(report.outcome, Outcome::Failed, "{why}");
        assert!(reason.starts_with("blocked: ") && reason.contains(why), "{reason} instead of {why}");
        assert!(vm.tracker().is_active(), "{why}: the VMM's log has ended");
    }
}

/// The pause copies in memory: the store, which may be slow, gets that after it.
#[test]
fn a_guest_goes_on_before_the_store_has_its_last_pages() {
    let mut vm = Stepped::new(RecordedVm::of(pages(2048), &full_of_data(600), &[(5, 9), (700, 3)]));
    let paused = vm.paused.clone();
    let mut store = Ahead { store: MemoryVersions::default(), paused, written: None, put_in_the_pause: 0 };
    let report = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), Controller::new().1).unwrap();
    assert_eq!((report.copied, store.put_in_the_pause), (2, 0));
    assert_eq!(store.list().unwrap().len(), 601);
}
