//! Both engines over channels in memory, with a VM of which pages are in a page store when its
//! migration begins: strategies that keep them there, and strategies that send them. The numbers in
//! the names are those of the design's rules.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use migration_core::{
    MigrationError, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    checkpoint::FailSafe,
    engine::{Controller, ReceiverOptions, SnapshotOptions, SourceOptions, SourceStores, snapshot},
    fence::NoFence,
    page_map::{PageMap, StoreCopy},
    paged_memory::{EntryStore, PagedMemory, PagedMemoryParts, StoreEntry},
    pager::Pager,
    report::{Event, Observer, Outcome, Report},
    shared_map::SharedPageMap,
    store::{
        Incarnation, MemoryPageStore, MemoryVersions, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet,
        PageToPut, Purpose, Record, StoreError, Stored, Urgency, VmNamespace,
    },
    strategy::{
        self, Agile, Done, HandOver, Hybrid, Linear, Place, PostCopy, PreCopy, Running, ScatterGather, StopAndCopy,
        Strategy,
    },
    vm::VmDescription,
    wire::LaneKind,
};

use crate::{
    HANG, VM,
    destination::Destination,
    guest::{Arrived, Host, RecordedVm, checksums, description_of},
    live::{Direction, Link, run_by},
    pager::{HeapPager, Paging},
    streams::frames,
};

const PAGES: u64 = 1400;
/// The pages that were evicted: each of them holds data.
const COLD: [PageRange; 2] = [PageRange { first: 101, count: 300 }, PageRange { first: 901, count: 350 }];
const LEASE: Duration = Duration::from_secs(60);
const OWNER: Owner = match Owner::new("host-7") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};
/// The control frames that say where pages are, and the offer.
const STORE_TABLE: u8 = 0x14;
const LOCATED: u8 = 0x16;
const OFFER: u8 = 0x07;

/// What the guest writes at last. One of the pages was evicted, and comes back for it.
const DURING: [(u64, u8); 4] = [(3, 0), (50, 9), (200, 11), (1300, 10)];

/// As above, without an evicted page.
const RESIDENT: [(u64, u8); 3] = [(3, 0), (50, 9), (1300, 10)];

fn vm() -> VmDescription {
    let regions = vec![RamRegion { gpa: 0, len: 700 << 12 }, RamRegion { gpa: 1 << 30, len: (PAGES - 700) << 12 }];
    description_of(RamLayout::new(regions).unwrap())
}

/// All pages but each tenth hold data, and so do all that are cold.
fn byte(page: u64) -> u8 {
    let cold = COLD.iter().any(|run| run.pages().contains(&page));
    if page.is_multiple_of(10) && !cold { 0 } else { (page % 250) as u8 + 1 }
}

/// A guest of which all pages are in RAM.
fn resident(during: &'static [(u64, u8)]) -> RecordedVm {
    let data: Vec<_> = (0..PAGES).map(|page| (page, byte(page))).filter(|(_, byte)| *byte != 0).collect();
    RecordedVm::of(vm(), &data, during)
}

/// The pages as they are when the guest has written for the last time.
fn last_pages(during: &'static [(u64, u8)]) -> BTreeMap<u64, u32> {
    let mut vm = resident(during);
    vm.write_more();
    checksums(&vm.ram)
}

/// The store as one host sees it.
struct Handle {
    inner: Arc<MemoryPageStore>,
    name: &'static str,
    gets: AtomicU64,
    /// How many reads are to fail.
    failing: AtomicU64,
}

impl Handle {
    fn new(inner: &Arc<MemoryPageStore>, name: &'static str) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), name, gets: AtomicU64::new(0), failing: AtomicU64::new(0) })
    }

    fn gets(&self) -> u64 {
        self.gets.load(Ordering::SeqCst)
    }

    fn fail(&self, reads: u64) {
        self.failing.store(reads, Ordering::SeqCst);
    }
}

impl PageStore for Handle {
    fn name(&self) -> &str {
        self.name
    }

    fn room(&self) -> u64 {
        self.inner.room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner.create(id, record, lease)
    }

    fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner.renew(of, owner, lease)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.inner.put(of, generation, pages)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        let fails = self.failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if fails.is_ok() {
            return Err(StoreError::io("reading")(io::ErrorKind::ConnectionReset.into()));
        }
        self.inner.get(of, pages, urgency, deadline.max(Instant::now() + HANG), take)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.inner.record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.inner.forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.inner.expired()
    }
}

/// A VM at home of which pages are in a store, and that store as both hosts see it.
struct World {
    vm: RecordedVm,
    memory: Arc<PagedMemory>,
    here: Arc<Handle>,
    there: Arc<Handle>,
    during: &'static [(u64, u8)],
}

fn home() -> Namespace {
    Namespace::new([2; 16])
}

impl World {
    fn new(during: &'static [(u64, u8)]) -> Self {
        let inner = Arc::new(MemoryPageStore::new("rack-7", 64 << 20));
        let (here, there) = (Handle::new(&inner, "rack-7"), Handle::new(&inner, "rack-7"));
        let mut vm = resident(during);
        // an entry to which no page refers, and the one that has all cold pages
        let entry = |namespace: Namespace| {
            let record = Record { vm: VM, purpose: Purpose::Home, owner: OWNER };
            let incarnation = inner.create(namespace.id(), &record, LEASE).unwrap();
            StoreEntry::new(namespace, vec![EntryStore { name: "rack-7".into(), incarnation }]).unwrap()
        };
        let entries = [entry(Namespace::new([1; 16])), entry(home())];
        let mut map = PageMap::new(PAGES);
        map.received(PageRange::new(0, PAGES)).unwrap();
        for (run, generation) in COLD.iter().zip([5, 3]) {
            let copy = StoreCopy { entry: 1, generation };
            map.put_started(*run, copy).unwrap();
            let values: Vec<_> = run.pages().map(|page| [byte(page); PAGE_SIZE]).collect();
            let pages = run.pages().zip(&values).map(|(page, value)| PageToPut { page, value: &value[..] });
            inner.put(home().of(VM), generation, &pages.collect::<Vec<_>>()).unwrap();
            map.put_done(*run, copy);
            map.evicted(*run).unwrap();
        }
        let map = Arc::new(SharedPageMap::new(map));
        let pager = Arc::new(HeapPager::new(vm.ram.clone(), &paging(&[], &[])));
        // RAM holds something else there now: who reads it in place of the store is found out
        pager.arm(&map).unwrap();
        let parts = PagedMemoryParts { vm: VM, map, pager, stores: vec![here.clone()] };
        let memory = Arc::new(PagedMemory::new(parts));
        memory.receive(0, &entries).unwrap();
        vm.memory = Some(memory.clone());
        Self { vm, memory, here, there, during }
    }

    fn cold(&self) -> u64 {
        self.memory.map().read(|map| map.in_store().len())
    }

    /// Whether the namespace of the cold pages is still in the store.
    fn has_namespace(&self) -> bool {
        self.here.inner.record(home().id()).unwrap().is_some()
    }

    /// The VM has arrived, whole.
    fn check(&self, arrived: &Arrived, said: &str) {
        assert_eq!(arrived.pages(), last_pages(self.during), "{said}");
    }
}

fn paging(faults: &[u64], touched: &[u64]) -> Paging {
    Paging { block_pages: 1, faults: faults.iter().map(|&page| vec![page]).collect(), touched: touched.to_vec() }
}

/// A destination with these stores. Pages that are missing are asked for, some of them before the
/// VM runs.
fn destination(stores: Vec<Arc<dyn PageStore>>) -> Destination {
    let options = ReceiverOptions { idle_timeout: HANG, stores, ..ReceiverOptions::default() };
    let paging = paging(&[150, 50, 1249], &[150, 50]);
    Destination::with(options, |to| Host { description: vm(), to, paging: Some(paging) })
}

/// A destination that cannot serve missing pages.
fn plain_destination() -> Destination {
    let options = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
    Destination::with(options, |to| Host { description: vm(), to, paging: None })
}

fn options() -> SourceOptions {
    SourceOptions { demand_lanes: 1, ..SourceOptions::default() }
}

fn linear() -> Box<Linear> {
    Box::default()
}

fn agile() -> Agile {
    Agile { order: linear() }
}

/// Runs a migration of the world's VM.
fn run(
    world: &mut World,
    strategy: impl Strategy + 'static,
    destination: &Destination,
    options: SourceOptions,
) -> (Report, Link) {
    let vm = std::mem::replace(&mut world.vm, resident(&[]));
    let (report, vm, link) = run_by(strategy, destination, Link::new(destination, None), vm, options);
    world.vm = vm;
    (report, link)
}

/// The kinds of the frames that the source has sent on its first control lane.
fn kinds(link: &Link) -> Vec<u8> {
    let sent = link.sent((LaneKind::Control, 0, false));
    let mut starts = frames(&sent);
    starts.pop();
    starts.into_iter().map(|at| sent[at]).collect()
}

#[test]
fn agile_moves_the_locations_of_cold_pages_and_reads_no_store_at_the_source() {
    let mut world = World::new(&RESIDENT);
    let destination = destination(vec![world.there.clone()]);
    let (report, link) = run(&mut world, agile(), &destination, options());
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, said) = destination.finish();
    world.check(&arrived, &said);
    arrived.pager.as_ref().unwrap().check();
    assert_eq!((world.here.gets(), world.cold()), (0, 650));
    assert!(world.there.gets() > 0);
    // rule 14: the destination forgets the namespaces of which it was told
    assert!(!world.has_namespace(), "{said}");
    // rule 16: all locations are sent and acknowledged before the first round, and none in the pause
    let kinds = kinds(&link);
    let about_stores: Vec<_> = kinds.iter().filter(|kind| [STORE_TABLE, LOCATED, OFFER].contains(kind)).collect();
    assert_eq!(about_stores, [&STORE_TABLE, &LOCATED, &LOCATED, &STORE_TABLE, &OFFER]);
}

#[test]
fn a_page_that_comes_back_during_the_migration_is_sent() {
    for touches in [&[][..], &[101, 333, 1249]] {
        let mut world = World::new(&DURING);
        world.vm.touches = touches;
        let destination = destination(vec![world.there.clone()]);
        let (report, link) = run(&mut world, agile(), &destination, options());
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        let (arrived, said) = destination.finish();
        world.check(&arrived, &said);
        arrived.pager.as_ref().unwrap().check();
        // the guest has read them, and nobody else
        assert_eq!(world.here.gets(), touches.len() as u64 + 1);
        assert_eq!(kinds(&link).iter().filter(|kind| **kind == LOCATED).count(), 2);
    }
}

/// A strategy that keeps pages in stores and sends all others in rounds.
struct KeepAndFinish;

impl Strategy for KeepAndFinish {
    fn name(&self) -> &'static str {
        "keep and finish"
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        vm.send(&pages)?;
        let dirty = vm.harvest()?;
        let mut vm = vm.pause()?;
        vm.send_rest(dirty)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

#[test]
fn what_comes_back_is_part_of_the_last_round_and_the_rest_stays_in_the_store() {
    let mut world = World::new(&DURING);
    let options_there = ReceiverOptions { idle_timeout: HANG, stores: vec![world.there.clone()], ..Default::default() };
    let paging = paging(&[150], &[150]);
    let destination = Destination::with(options_there, |to| Host { description: vm(), to, paging: Some(paging) });
    let (report, _) = run(&mut world, KeepAndFinish, &destination, options());
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, said) = destination.finish();
    world.check(&arrived, &said);
    assert_eq!(arrived.pager.as_ref().unwrap().installed(), 649, "the cold pages but one");
    assert_eq!(world.here.gets(), 1);
}

#[test]
fn rule_20_stored_pages_are_read_and_sent_before_the_pause() {
    for strategy in [Box::<PreCopy>::default() as Box<dyn Strategy>, Box::new(StopAndCopy)] {
        let name = strategy.name();
        let mut world = World::new(&DURING);
        let destination = plain_destination();
        let (report, link) = run(&mut world, Boxed(strategy), &destination, options());
        assert_eq!(report.outcome, Outcome::Completed, "{name}: {:?}", report.reason);
        let (arrived, said) = destination.finish();
        world.check(&arrived, &said);
        // but for the page that the guest has touched, none has become resident
        assert_eq!(world.cold(), 649, "{name}");
        assert!(world.here.gets() >= 11, "{name}: {} reads of at most 64 pages", world.here.gets());
        assert!(!kinds(&link).iter().any(|kind| [STORE_TABLE, LOCATED].contains(kind)), "{name}");
        // rule 14: nobody needs it, and the destination does not know it
        assert!(!world.has_namespace(), "{name}");
    }
}

/// A strategy in a box.
struct Boxed(Box<dyn Strategy>);

impl Strategy for Boxed {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn needs_post_copy(&self) -> bool {
        self.0.needs_post_copy()
    }

    fn keeps_stored_pages(&self) -> bool {
        self.0.keeps_stored_pages()
    }

    fn can_switch_over(&self) -> bool {
        self.0.can_switch_over()
    }

    fn shares_ram(&self) -> bool {
        self.0.shares_ram()
    }

    fn stores(&self) -> Vec<Place> {
        self.0.stores()
    }

    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError> {
        self.0.migrate(vm)
    }
}

#[test]
fn rule_20_a_store_that_fails_while_pages_are_fetched_keeps_the_pause_from_beginning() {
    for strategy in [Box::<PreCopy>::default() as Box<dyn Strategy>, Box::new(StopAndCopy)] {
        let mut world = World::new(&DURING);
        let failing = plain_destination();
        world.here.fail(u64::MAX);
        let (report, _) = run(&mut world, Boxed(strategy), &failing, options());
        assert_eq!(report.outcome, Outcome::Failed);
        let reason = report.reason.unwrap();
        assert!(reason.contains("rack-7"), "{reason}");
        assert!(report.downtime.is_none() && world.vm.calls.lock().unwrap().is_empty(), "{reason}");
        assert_eq!((world.cold(), world.has_namespace()), (650, true));
        // and the next attempt moves it
        world.here.fail(0);
        let destination = plain_destination();
        let again = SourceOptions { last_epoch: report.epoch, ..options() };
        let (report, _) = run(&mut world, <PreCopy>::default(), &destination, again);
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        let (arrived, said) = destination.finish();
        world.check(&arrived, &said);
    }
}

#[test]
fn what_post_copy_has_not_fetched_is_at_the_source_which_reads_its_store() {
    for (failing, during) in [(0, &DURING[..]), (3, &RESIDENT)] {
        let strategies: [Box<dyn Strategy>; 2] =
            [Box::new(PostCopy { order: linear() }), Box::new(Hybrid { rounds: 1, order: linear() })];
        for strategy in strategies {
            let (name, reads) = (strategy.name(), if strategy.name() == "hybrid" { 0 } else { failing });
            let mut world = World::new(during);
            let destination = destination(vec![]);
            world.here.fail(reads);
            let (report, _) = run(&mut world, Boxed(strategy), &destination, options());
            assert_eq!(report.outcome, Outcome::Completed, "{name}: {:?}", report.reason);
            let (arrived, said) = destination.finish();
            world.check(&arrived, &said);
            arrived.pager.as_ref().unwrap().check();
            assert!(!world.has_namespace(), "{name}");
            if name == "post-copy" {
                let installed = arrived.pager.as_ref().unwrap().installed();
                assert_eq!(report.pages.pushed + report.pages.demanded, installed, "{report:?}");
                assert!(report.pages.demanded >= 2, "{report:?}");
            }
        }
    }
}

#[test]
fn rule_15_a_store_that_only_the_source_knows_is_refused_before_anything_moves() {
    for (stores, why) in [(false, "the destination does not fetch from any"), (true, "no page store rack-7")] {
        let mut world = World::new(&DURING);
        let other = Handle::new(&world.here.inner, "rack-9");
        let destination = destination(if stores { vec![other] } else { vec![] });
        let (report, link) = run(&mut world, agile(), &destination, options());
        assert_eq!(report.outcome, Outcome::Failed);
        let reason = report.reason.unwrap();
        assert!(reason.contains(why), "{reason}");
        assert!(report.downtime.is_none() && report.rounds.is_empty(), "{reason}");
        assert!(world.vm.calls.lock().unwrap().is_empty());
        assert!(!kinds(&link).contains(&LOCATED), "{reason}");
        // nothing was made for this attempt, so nothing is forgotten
        assert!(world.has_namespace());
    }
}

/// Scatter-gather has namespaces of its own beside those of the VM, and puts nothing that is in a
/// store already. A strategy that puts pages and keeps none reads cold ones and sends them.
#[test]
fn a_strategy_that_puts_pages_leaves_those_alone_that_are_in_a_store() {
    for strategy in [Box::new(ScatterGather::new(["rack-7"], Linear::default())) as Box<dyn Strategy>, Box::new(PutAll)]
    {
        let name = strategy.name();
        let mut world = World::new(&DURING);
        let destination = destination(vec![world.there.clone()]);
        let next = AtomicU64::new(40);
        let stores = SourceStores {
            stores: vec![world.here.clone()],
            new_namespace: Arc::new(move || Namespace::new([next.fetch_add(1, Ordering::SeqCst) as u8; 16])),
            owner: OWNER,
            lease: LEASE,
            gather_rate: None,
        };
        let options = SourceOptions { stores: Some(stores), ..options() };
        let (report, _) = run(&mut world, Boxed(strategy), &destination, options);
        assert_eq!(report.outcome, Outcome::Completed, "{name}: {:?}", report.reason);
        let (arrived, said) = destination.finish();
        world.check(&arrived, &said);
        arrived.pager.as_ref().unwrap().check();
        assert!(!world.has_namespace(), "{name}");
        assert!(world.here.inner.record(Namespace::new([40; 16]).id()).unwrap().is_none(), "{name}");
        // the guest has read a page, and the engine all others, if it does not keep them there
        let reads = world.here.gets();
        assert!(if name == "scatter-gather" { reads == 1 } else { reads > 10 }, "{name}: {reads}");
    }
}

/// Puts all pages that it can, and leaves the others behind.
struct PutAll;

impl Strategy for PutAll {
    fn name(&self) -> &'static str {
        "put all"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        vec![Place::attempt(["rack-7"])]
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut pages = vm.start_tracking()?;
        vm.put(&mut pages, &Place::attempt(["rack-7"]))?.or_fail()?;
        // those of zeros, and the cold ones
        assert!((650..800).contains(&pages.len()), "{pages:?}");
        let dirty = vm.harvest()?;
        vm.pause()?.hand_over(dirty)?.serve(&mut Linear::default())
    }
}

#[test]
fn what_does_not_go_with_stored_pages_is_refused() {
    let mut world = World::new(&DURING);
    let destination = destination(vec![world.there.clone()]);
    let fail_safe = FailSafe::in_memory(Arc::new(NoFence));
    let protected = SourceOptions { fail_safe: Some(fail_safe), ..options() };
    let cases: [(Box<dyn Strategy>, SourceOptions, &str); 2] = [
        (Box::new(agile()), protected, "fail-safe post-copy does not go with that"),
        (Box::new(HandOver), options(), "a process that maps its RAM"),
    ];
    for (strategy, options, why) in cases {
        let (report, _) = run(&mut world, Boxed(strategy), &destination, options);
        let reason = report.reason.unwrap();
        assert!(reason.contains(why) && reason.contains("650 pages are in page stores"), "{reason}");
    }
    let mut versions = MemoryVersions::default();
    let taken = snapshot(&mut world.vm, &mut versions, &SnapshotOptions::default(), Controller::new().1);
    let error = taken.unwrap_err().to_string();
    assert!(error.contains("650 pages are not in RAM"), "{error}");
    assert!(world.vm.calls.lock().unwrap().is_empty());
    // a page that is out of the guest's reach
    world.memory.map().change(|map| map.evicting(PageRange::new(5, 2))).unwrap();
    let (report, _) = run(&mut world, agile(), &destination, options());
    let reason = report.reason.unwrap();
    assert!(reason.contains("2 pages are about to be evicted"), "{reason}");
    world.memory.map().change(|map| map.mapped_again(PageRange::new(5, 2)));
    // a VM that still needs its last source
    world.memory.map().change(|map| map.leave_behind(&PageSet::full(PAGES))).unwrap();
    let (report, _) = run(&mut world, agile(), &destination, options());
    let reason = report.reason.unwrap();
    assert!(reason.contains("have not come from its last source yet"), "{reason}");
}

/// Notes of what the user is told.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn event(&self, event: &Event) {
        if let Event::Warning(why) = event {
            self.0.lock().unwrap().push(why.clone());
        }
    }
}

/// Agile that tries one destination after the other.
struct Wandering(&'static [&'static str]);

impl Strategy for Wandering {
    fn name(&self) -> &'static str {
        "wandering"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn connects_itself(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut resident = vm.start_tracking()?;
        for name in self.0 {
            if let Err(error) = vm.connect(&strategy::Destination::named(*name)) {
                vm.report(&error);
            }
        }
        resident.union_with(&vm.harvest()?);
        vm.send(&resident)?;
        let dirtied = vm.harvest()?;
        vm.pause()?.hand_over(dirtied)?.serve(&mut Linear::default())
    }
}

#[test]
fn a_strategy_that_connects_itself_goes_on_after_a_destination_that_refuses() {
    let mut world = World::new(&DURING);
    let (lacking, good) = (destination(vec![]), destination(vec![world.there.clone()]));
    let doors =
        [("lacking", lacking.door.clone()), ("good", good.door.clone())].map(|(name, door)| (name, Mutex::new(door)));
    let find = move |to: &strategy::Destination| {
        let (_, door) = doors.iter().find(|(name, _)| *name == to.name()).ok_or(io::ErrorKind::NotFound)?;
        let door = door.lock().unwrap().clone();
        Ok(Arc::new(Link::to(door, None)) as Arc<dyn migration_core::channel::Connector>)
    };
    let notes = Arc::new(Notes::default());
    let options = SourceOptions { destinations: Some(Arc::new(find)), observer: notes.clone(), ..options() };
    let wandering = Wandering(&["nowhere", "lacking", "good", "nowhere"]);
    let (report, _) = run(&mut world, wandering, &good, options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    // an epoch for each destination that was reached
    assert_eq!(report.epoch, 2);
    let (arrived, said) = good.finish();
    world.check(&arrived, &said);
    arrived.pager.as_ref().unwrap().check();
    let notes = notes.0.lock().unwrap().join("\n");
    for why in ["nowhere", "does not fetch from any", "a destination is connected"] {
        assert!(notes.contains(why), "{why}: {notes}");
    }
    assert!(lacking.arrived.try_recv().is_err());
}

#[test]
fn a_strategy_that_has_not_connected_pauses_nobody() {
    let mut world = World::new(&DURING);
    let destination = destination(vec![world.there.clone()]);
    let (report, _) = run(&mut world, Hasty, &destination, options());
    let reason = report.reason.unwrap();
    assert!(reason.contains("before a destination is connected"), "{reason}");
    assert!(world.vm.calls.lock().unwrap().is_empty());
}

/// Forgets to connect.
struct Hasty;

impl Strategy for Hasty {
    fn name(&self) -> &'static str {
        "hasty"
    }

    fn connects_itself(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

/// Whichever lane ends, wherever: before *run* the VM stays, and moves with the next attempt;
/// after it, no page is lost.
#[test]
fn rule_18_cut_while_cold_pages_move() {
    let directions: [Direction; 5] = [
        (LaneKind::Control, 0, false),
        (LaneKind::Control, 0, true),
        (LaneKind::Bulk, 0, false),
        (LaneKind::Demand, 0, false),
        (LaneKind::Demand, 0, true),
    ];
    for keeps in [true, false] {
        let strategy = || match keeps {
            true => Boxed(Box::new(agile())),
            false => Boxed(Box::new(PostCopy { order: linear() })),
        };
        let there = |world: &World| destination(if keeps { vec![world.there.clone()] } else { vec![] });
        let mut world = World::new(&DURING);
        let whole = there(&world);
        let (_, link) = run(&mut world, strategy(), &whole, options());
        whole.finish();
        let mut recovered = 0;
        for direction in directions {
            let len = link.sent(direction).len();
            for after in [60, len / 2, len * 9 / 10, len.saturating_sub(40)] {
                let what = format!("{direction:?} is cut after {after} of {len} bytes, keeps {keeps}");
                let mut world = World::new(&DURING);
                let destination = there(&world);
                let vm = std::mem::replace(&mut world.vm, resident(&[]));
                let link = Link::new(&destination, Some((direction, after)));
                let (mut report, vm, _) = run_by(strategy(), &destination, link, vm, options());
                world.vm = vm;
                recovered += report.recoveries;
                if report.outcome == Outcome::Failed {
                    assert!(destination.arrived.try_recv().is_err(), "{what}: it runs twice");
                    let again = SourceOptions { last_epoch: report.epoch, ..options() };
                    report = run(&mut world, strategy(), &destination, again).0;
                }
                assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
                let (arrived, said) = destination.finish();
                world.check(&arrived, &said);
                assert!(!world.has_namespace(), "{what}");
            }
        }
        assert!(recovered > 3, "only {recovered} cuts came after the hand-over, keeps {keeps}");
    }
}
