//! Both engines over channels in memory, with pages that go through page stores: scatter-gather,
//! and pages that were put while the guest ran. The numbers in the names are those of the design's
//! rules.

use std::{
    num::NonZeroU64,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use migration_core::{
    MigrationError, PageRange, PageSet, RamLayout, RamRegion,
    engine::{ReceiverOptions, SourceOptions, SourceStores},
    report::{Outcome, Report},
    store::{
        Incarnation, MemoryPageStore, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record,
        StoreError, Stored, Urgency, VmNamespace,
    },
    strategy::{Done, Linear, Place, Running, Strategy, push_order::Through},
    vm::VmDescription,
    wire::LaneKind,
};

use crate::{
    HANG,
    destination::Destination,
    guest::{Arrived, Host, RecordedVm, checksums, description_of},
    live::{Direction, Link, run_by},
    pager::Paging,
};

pub(crate) const PAGES: u64 = 3000;
/// Pages that the guest writes as its last act.
pub(crate) const DURING: [(u64, u8); 3] = [(3, 0), (200, 9), (2601, 10)];

pub(crate) fn vm() -> VmDescription {
    let regions = vec![RamRegion { gpa: 0, len: 700 << 12 }, RamRegion { gpa: 1 << 30, len: (PAGES - 700) << 12 }];
    description_of(RamLayout::new(regions).unwrap())
}

/// All pages but each tenth hold data.
pub(crate) fn guest() -> RecordedVm {
    let data: Vec<_> = (0..PAGES).filter(|page| page % 10 != 0).map(|page| (page, (page % 250) as u8 + 1)).collect();
    RecordedVm::of(vm(), &data, &DURING)
}

pub(crate) fn place() -> Place {
    Place::attempt(["rack-7"])
}

/// What a store does beside keeping pages.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Good,
    /// Reads wait until the test opens the gate.
    Gated,
    /// Once it has pages, it loses everything when it is asked whether it has lost anything; reads
    /// wait until then.
    Forgetful,
}

/// A store with moods.
struct Moody {
    inner: Mutex<Arc<MemoryPageStore>>,
    mood: Mood,
    open: Mutex<bool>,
    opened: Condvar,
    /// Whether it was given pages.
    used: AtomicBool,
    lost: AtomicBool,
}

impl Moody {
    fn new(mood: Mood, limit: u64) -> Arc<Self> {
        let inner = Mutex::new(Arc::new(MemoryPageStore::new("rack-7", limit)));
        let open = Mutex::new(mood == Mood::Good);
        Arc::new(Self {
            inner,
            mood,
            open,
            opened: Condvar::new(),
            used: AtomicBool::default(),
            lost: AtomicBool::default(),
        })
    }

    fn inner(&self) -> Arc<MemoryPageStore> {
        self.inner.lock().unwrap().clone()
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn namespaces(&self, id: NamespaceId) -> bool {
        self.inner().record(id).unwrap().is_some()
    }
}

impl PageStore for Moody {
    fn name(&self) -> &str {
        "rack-7"
    }

    fn room(&self) -> u64 {
        self.inner().room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner().create(id, record, lease)
    }

    fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        let loses = self.mood == Mood::Forgetful && self.used.load(Ordering::SeqCst);
        if loses && !self.lost.swap(true, Ordering::SeqCst) {
            *self.inner.lock().unwrap() = Arc::new(MemoryPageStore::new("rack-7", 64 << 20));
            self.open();
        }
        self.inner().renew(of, owner, lease)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.used.store(true, Ordering::SeqCst);
        self.inner().put(of, generation, pages)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        let open = self.opened.wait_timeout_while(self.open.lock().unwrap(), HANG, |open| !*open).unwrap();
        assert!(!open.1.timed_out(), "hangs: a read of a store");
        drop(open);
        self.inner().get(of, pages, urgency, deadline.max(Instant::now() + HANG), take)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.inner().record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.inner().forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.inner().expired()
    }
}

/// Post-copy whose pages may go through the stores of a place.
pub(crate) struct ScatterGather;

impl Strategy for ScatterGather {
    fn name(&self) -> &'static str {
        "scatter-gather"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        vec![place()]
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        vm.pause()?.hand_over(all)?.serve(&mut Through::new(vec![place()], Linear::default()))
    }
}

/// Puts some pages into a store while the guest runs, sends some, and leaves the others behind.
struct PutAhead;

impl Strategy for PutAhead {
    fn name(&self) -> &'static str {
        "put ahead"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        vec![place()]
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut pages = vm.start_tracking()?;
        vm.put(&mut pages, place().at_most(1000))?.or_fail()?;
        let mut some = PageSet::empty(PAGES);
        some.insert_range(PageRange::new(1200, 300));
        vm.send(&some)?;
        let dirty = vm.harvest()?;
        vm.pause()?.hand_over(dirty)?.serve(&mut Linear::default())
    }
}

/// Names of namespaces, as far as a test needs them to be random.
pub(crate) fn names() -> Arc<dyn Fn() -> Namespace + Send + Sync> {
    let next = AtomicU8::new(1);
    Arc::new(move || Namespace::new([next.fetch_add(1, Ordering::Relaxed); 16]))
}

fn options(store: &Arc<Moody>) -> SourceOptions {
    let stores = SourceStores {
        stores: vec![store.clone()],
        new_namespace: names(),
        owner: Owner::new("host-7").unwrap(),
        lease: Duration::from_secs(60),
        gather_rate: None,
    };
    SourceOptions { stores: Some(stores), demand_lanes: 1, ..SourceOptions::default() }
}

pub(crate) fn destination(stores: Vec<Arc<dyn PageStore>>) -> Destination {
    let paging = Paging { block_pages: 1, faults: vec![vec![3], vec![5], vec![2700, 7]], touched: vec![3, 5] };
    let options = ReceiverOptions { idle_timeout: HANG, stores, ..ReceiverOptions::default() };
    Destination::with(options, |to| Host { description: vm(), to, paging: Some(paging) })
}

/// Moves the VM. Returns the report and the source's RAM.
fn moved(strategy: impl Strategy + 'static, destination: &Destination, store: &Arc<Moody>) -> (Report, RecordedVm) {
    let link = Link::new(destination, None);
    let (report, vm, _) = run_by(strategy, destination, link, guest(), options(store));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    (report, vm)
}

pub(crate) fn check(arrived: &Arrived, vm: &RecordedVm, said: &str) {
    let (there, here) = (arrived.pages(), checksums(&vm.ram));
    let differ: Vec<u64> = (0..PAGES).filter(|page| there.get(page) != here.get(page)).collect();
    assert!(differ.is_empty(), "pages {differ:?} differ: {said}");
    arrived.pager.as_ref().unwrap().check();
}

#[test]
fn rule_17_the_source_is_released_while_pages_are_in_stores() {
    let store = Moody::new(Mood::Gated, 64 << 20);
    let destination = destination(vec![store.clone()]);
    let (report, vm) = moved(ScatterGather, &destination, &store);
    // the source is gone, and the store has handed out nothing yet
    assert_eq!(*vm.calls.lock().unwrap(), ["released"]);
    let id = Namespace::new([1; 16]).id();
    assert!(store.namespaces(id));
    let stored = report.pages.stored;
    assert!(stored > 0 && report.pages.direct + stored == report.pages.distinct, "{report:?}");
    let [in_store] = &report.stores[..] else { panic!("{report:?}") };
    assert!(in_store.name == "rack-7" && in_store.failed.is_none(), "{report:?}");
    // a page that was demanded meanwhile came directly
    assert!(in_store.pages >= stored && in_store.bytes == in_store.pages << 12, "{report:?}");
    let gathering = destination.handle.gathering().unwrap();
    assert_eq!((gathering.missing_pages, gathering.source), (gathering.stores["rack-7"], 0), "{gathering:?}");
    assert!(gathering.missing_pages <= stored, "{gathering:?}");
    store.open();
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
    // rule 14: nobody needs the namespace any more
    assert!(!store.namespaces(id), "{said}");
}

#[test]
fn rule_16_locations_are_announced_before_the_hand_over_and_after_it() {
    for mood in [Mood::Good, Mood::Gated] {
        let store = Moody::new(mood, 64 << 20);
        let destination = destination(vec![store.clone()]);
        let (_, vm) = moved(PutAhead, &destination, &store);
        store.open();
        let (arrived, said) = destination.finish();
        check(&arrived, &vm, &said);
    }
}

/// Page 5 is in the store when the state is loaded, which touches it. The store hands out nothing
/// then.
#[test]
fn rule_7_until_the_vm_runs_the_source_sends_what_it_holds() {
    let store = Moody::new(Mood::Gated, 64 << 20);
    let destination = destination(vec![store.clone()]);
    let (report, vm) = moved(PutAhead, &destination, &store);
    assert!(report.pages.demanded >= 2, "{report:?}");
    store.open();
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
}

/// Page 3 is in the store, and the destination was told so, when the guest writes it and frees it.
#[test]
fn rule_5_a_free_page_that_was_announced_is_sent() {
    let store = Moody::new(Mood::Forgetful, 64 << 20);
    let destination = destination(vec![store.clone()]);
    let mut vm = guest();
    vm.free = &[3];
    let (report, vm, _) = run_by(PutAhead, &destination, Link::new(&destination, None), vm, options(&store));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
}

/// A put that fails leaves pages that are sent directly.
#[test]
fn rule_1_a_failed_put_leaves_pages_that_are_sent() {
    // room for a few pages only
    let store = Moody::new(Mood::Good, 1 << 20);
    let destination = destination(vec![store.clone()]);
    let (_, vm) = moved(ScatterGather, &destination, &store);
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
}

#[test]
fn rule_13_a_store_that_loses_its_content_before_released_costs_nothing() {
    let store = Moody::new(Mood::Forgetful, 64 << 20);
    let destination = destination(vec![store.clone()]);
    let (_, vm) = moved(ScatterGather, &destination, &store);
    assert!(store.lost.load(Ordering::SeqCst));
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
    // a read, a renewal, or the question before *released* finds it out, whichever comes first
    assert!(said.contains("a page store has failed: "), "{said}");
}

/// Pages are in the store before the hand-over, and the destination asks the store as soon as the
/// VM is about to run: it may find the loss before it has said *running*.
#[test]
fn rule_13_a_loss_that_is_found_before_running_is_said_after_it() {
    for _ in 0..5 {
        let store = Moody::new(Mood::Forgetful, 64 << 20);
        let destination = destination(vec![store.clone()]);
        let (_, vm) = moved(PutAhead, &destination, &store);
        let (arrived, said) = destination.finish();
        check(&arrived, &vm, &said);
    }
}

#[test]
fn rule_15_a_destination_without_the_store_refuses_before_anything_moves() {
    let other: Arc<dyn PageStore> = Arc::new(MemoryPageStore::new("rack-9", 1 << 20));
    for (stores, why) in [(vec![], "the destination does not fetch from any"), (vec![other], "no page store rack-7")] {
        let store = Moody::new(Mood::Good, 64 << 20);
        let destination = destination(stores);
        let link = Link::new(&destination, None);
        let (report, vm, _) = run_by(ScatterGather, &destination, link, guest(), options(&store));
        assert_eq!(report.outcome, Outcome::Failed);
        let reason = report.reason.unwrap();
        assert!(reason.contains(why), "{reason}");
        assert!(report.downtime.is_none() && vm.calls.lock().unwrap().is_empty(), "{reason}");
        // rule 14: an attempt that fails forgets what it made
        assert!(!store.namespaces(Namespace::new([1; 16]).id()));
    }
}

/// Both sides know the name, and each means another store.
#[test]
fn rule_11_a_store_that_is_another_one_at_the_destination_is_refused_before_anything_moves() {
    let store = Moody::new(Mood::Good, 64 << 20);
    let destination = destination(vec![Moody::new(Mood::Good, 64 << 20)]);
    let link = Link::new(&destination, None);
    let (report, vm, _) = run_by(ScatterGather, &destination, link, guest(), options(&store));
    let reason = report.reason.unwrap();
    assert!(reason.contains("page store rack-7 is not the same at both ends"), "{reason}");
    assert!(report.downtime.is_none() && vm.calls.lock().unwrap().is_empty(), "{reason}");
    assert!(!store.namespaces(Namespace::new([1; 16]).id()));
}

/// The guest ends while its pages are in a store that hands out nothing: nobody needs them.
#[test]
fn rule_14_who_ends_a_vm_forgets_its_namespaces() {
    let store = Moody::new(Mood::Gated, 64 << 20);
    let destination = destination(vec![store.clone()]);
    moved(ScatterGather, &destination, &store);
    let id = Namespace::new([1; 16]).id();
    assert!(store.namespaces(id));
    assert!(destination.handle.forget_stored().is_empty());
    assert!(!store.namespaces(id));
    destination.handle.vm_ended("it was switched off");
    store.open();
    destination.finish();
}

/// With this rate the pages would take hours; a fault is not limited.
#[test]
fn pages_that_nobody_waits_for_keep_to_a_rate() {
    let store = Moody::new(Mood::Good, 64 << 20);
    let destination = destination(vec![store.clone()]);
    let limited = SourceStores { gather_rate: NonZeroU64::new(1), ..options(&store).stores.unwrap() };
    let options = SourceOptions { stores: Some(limited), ..options(&store) };
    let link = Link::new(&destination, None);
    let (report, ..) = run_by(ScatterGather, &destination, link, guest(), options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    // at most one fetch for each of the two threads and each fault
    let gathering = destination.handle.gathering().unwrap();
    assert!(report.pages.stored <= gathering.missing_pages + 6 * 64, "{gathering:?} of {report:?}");
    assert!(destination.handle.forget_stored().is_empty());
    destination.handle.vm_ended("it was switched off");
    destination.finish();
}

#[test]
fn a_source_without_stores_refuses_the_strategy() {
    let destination = destination(vec![]);
    let link = Link::new(&destination, None);
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let (report, ..) = run_by(ScatterGather, &destination, link, guest(), options);
    let reason = report.reason.unwrap();
    assert!(reason.contains("there are no page stores here"), "{reason}");
}

/// Whichever lane ends, wherever: before *run* the VM stays, and moves with the next attempt;
/// behind it, no page is lost.
#[test]
fn rule_18_cut_while_pages_go_through_stores() {
    let mut recovered = 0;
    let directions: [Direction; 6] = [
        (LaneKind::Control, 0, false),
        (LaneKind::Control, 0, true),
        (LaneKind::Bulk, 0, false),
        (LaneKind::Bulk, 1, false),
        (LaneKind::Demand, 0, false),
        (LaneKind::Demand, 0, true),
    ];
    for direction in directions {
        let steps = if direction.0 == LaneKind::Bulk { [60, 500_000, 1_500_001] } else { [60, 700, 1001] };
        for after in steps {
            let what = format!("{direction:?} is cut after {after} bytes");
            let store = Moody::new(Mood::Good, 64 << 20);
            let destination = destination(vec![store.clone()]);
            let link = Link::new(&destination, Some((direction, after)));
            let (mut report, mut vm, _) = run_by(ScatterGather, &destination, link, guest(), options(&store));
            recovered += report.recoveries;
            if report.outcome == Outcome::Failed {
                assert!(destination.arrived.try_recv().is_err(), "{what}: it runs twice");
                let again = SourceOptions { last_epoch: report.epoch, ..options(&store) };
                let names = SourceStores {
                    new_namespace: Arc::new(|| Namespace::new([99; 16])),
                    ..again.stores.clone().unwrap()
                };
                let again = SourceOptions { stores: Some(names), ..again };
                (report, vm, _) = run_by(ScatterGather, &destination, Link::new(&destination, None), vm, again);
            }
            assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
            let (arrived, said) = destination.finish();
            assert_eq!(arrived.pages(), checksums(&vm.ram), "{what}: {said}");
        }
    }
    assert!(recovered > 3, "only {recovered} cuts came behind the hand-over");
}
