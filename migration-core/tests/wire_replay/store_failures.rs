//! Both engines over channels in memory, with page stores that fail, hang or are silent while the
//! link is lost, or after the source is gone.

use std::{
    io,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    MigrationError, PageRange, PageSet,
    channel::{Channel, Closer as _, Connector},
    engine::{Commands, Controller, ReceiverOptions, SourceOptions, SourceStores, migrate},
    report::{Outcome, Report},
    store::{
        Incarnation, MemoryPageStore, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record,
        StoreError, Stored, Urgency, VmNamespace,
    },
    strategy::{Done, Linear, Place, Running, Strategy, push_order::Through},
    vm::SourceVm as _,
    wire::LaneKind,
};

use crate::{
    HANG, VM,
    channels::{End, Ends, pair},
    destination::Destination,
    guest::{Arrived, Host, RecordedVm, checksums},
    pager::Paging,
    through_stores::{PAGES, check, guest, names, vm},
};

/// Something for which threads wait until a test lets them go on.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn is_open(&self) -> bool {
        *self.open.lock().unwrap()
    }

    fn wait(&self, what: &str) {
        let open = self.opened.wait_timeout_while(self.open.lock().unwrap(), HANG, |open| !*open).unwrap();
        assert!(!open.1.timed_out(), "hangs: {what}");
    }
}

/// A store as one host sees it. A test says what happens to its calls.
struct Seen {
    inner: Arc<MemoryPageStore>,
    /// Called before a read.
    get: Box<dyn Fn(Urgency) -> Result<(), StoreError> + Send + Sync>,
    /// Called after a put, with its result.
    put: Box<dyn Fn(Stored) -> Result<Stored, StoreError> + Send + Sync>,
}

impl Seen {
    /// The store as it is.
    fn good(inner: &Arc<MemoryPageStore>) -> Self {
        Self { inner: inner.clone(), get: Box::new(|_| Ok(())), put: Box::new(Ok) }
    }

    /// The store as a host sees it whose reads wait at the gate.
    fn gated(inner: &Arc<MemoryPageStore>, gate: &Arc<Gate>) -> Self {
        let gate = gate.clone();
        let get = Box::new(move |_| {
            gate.wait("a read of a store");
            Ok(())
        });
        Self { get, ..Self::good(inner) }
    }
}

impl PageStore for Seen {
    fn name(&self) -> &str {
        self.inner.name()
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
        (self.put)(self.inner.put(of, generation, pages)?)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        _deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        (self.get)(urgency)?;
        self.inner.get(of, pages, urgency, Instant::now() + HANG, take)
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

fn memory(name: &str) -> Arc<MemoryPageStore> {
    Arc::new(MemoryPageStore::new(name, 64 << 20))
}

/// A link that a test cuts. It stays lost until the test says so.
#[derive(Clone)]
struct Fragile {
    door: mpsc::Sender<Option<End>>,
    lines: Arc<Lines>,
}

#[derive(Default)]
struct Lines {
    ends: Mutex<Vec<Ends>>,
    lost: AtomicBool,
    back: Gate,
    /// Whether requests of the destination do not reach the source.
    mute: AtomicBool,
}

impl Fragile {
    fn new(destination: &Destination) -> Self {
        Self { door: destination.door.clone(), lines: Arc::default() }
    }
}

impl Lines {
    /// What was said before still arrives.
    fn cut(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.ends.lock().unwrap().drain(..).for_each(|ends| ends.close());
    }
}

impl Connector for Fragile {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        unreachable!("the engine says what a lane is for")
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        if self.lines.lost.load(Ordering::SeqCst) && !self.lines.back.is_open() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (mut here, there) = pair();
        if kind == LaneKind::Demand && self.lines.mute.load(Ordering::SeqCst) {
            here.incoming = Arc::default();
        }
        let ends = Ends { incoming: here.incoming.clone(), outgoing: here.outgoing.clone() };
        self.lines.ends.lock().unwrap().push(ends);
        self.door.send(Some(there)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(here))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

/// Puts pages into one place after another while the guest runs, sends others, leaves the rest
/// behind, and lets it go through a place.
#[derive(Default)]
struct Script {
    /// Pages from 0 on, so many into each place.
    put: Vec<(Place, u64)>,
    /// Whether all that was not put is sent before the hand-over.
    sends: bool,
    /// Whether all the rest is sent in the pause.
    whole: bool,
    /// What happens as soon as the VM runs at the destination.
    served: Option<Box<dyn FnOnce() + Send>>,
    through: Vec<Place>,
}

impl Strategy for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        let mut places: Vec<_> = self.put.iter().map(|(place, _)| place.clone()).collect();
        places.extend(self.through.iter().filter(|place| !places.contains(place)).cloned().collect::<Vec<_>>());
        places
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        let mut at = 0;
        for (place, count) in &self.put {
            let mut pages = PageSet::empty(PAGES);
            pages.insert_range(PageRange::new(at, *count));
            pages.intersect_with(&all);
            vm.put(&mut pages, place.at_most(*count))?.or_fail()?;
            at += count;
        }
        let mut dirty = vm.harvest()?;
        if self.sends {
            vm.send(&dirty)?;
            dirty = vm.harvest()?;
        }
        let mut vm = vm.pause()?;
        if self.whole {
            vm.send_rest(dirty)?;
            let nothing = vm.no_pages();
            return Ok(vm.hand_over(nothing)?.finish()?);
        }
        let served = vm.hand_over(dirty)?;
        if let Some(then) = self.served.take() {
            then();
        }
        served.serve(&mut Through::new(self.through.clone(), Linear::default()))
    }
}

fn place(store: &str) -> Place {
    Place::attempt([store])
}

fn options(stores: Vec<Seen>) -> SourceOptions {
    let stores = SourceStores {
        stores: stores.into_iter().map(|store| Arc::new(store) as Arc<dyn PageStore>).collect(),
        new_namespace: names(),
        owner: Owner::new("host-7").unwrap(),
        lease: Duration::from_secs(60),
        gather_rate: None,
    };
    SourceOptions { stores: Some(stores), demand_lanes: 1, ..SourceOptions::default() }
}

/// A destination that fetches from these stores, where somebody touches `faults` as soon as pages are
/// missing.
fn destination(stores: Vec<Seen>, faults: &[u64]) -> Destination {
    let stores = stores.into_iter().map(|store| Arc::new(store) as Arc<dyn PageStore>).collect();
    let paging = Paging { block_pages: 1, faults: vec![faults.to_vec()], touched: Vec::new() };
    let options = ReceiverOptions { idle_timeout: HANG, stores, ..ReceiverOptions::default() };
    Destination::with(options, |to| Host { description: vm(), to, paging: Some(paging) })
}

/// A migration on a thread of its own.
struct Moving(mpsc::Receiver<(Report, RecordedVm)>);

impl Moving {
    fn begin(script: Script, link: &Fragile, vm: RecordedVm, options: SourceOptions) -> Self {
        Self::commanded(script, link, vm, options, Controller::new().1)
    }

    fn commanded(
        mut script: Script,
        link: &Fragile,
        mut vm: RecordedVm,
        options: SourceOptions,
        commands: Commands,
    ) -> Self {
        let (tx, rx) = mpsc::channel();
        let link = link.clone();
        thread::spawn(move || {
            let report = migrate(&mut vm, &link, &mut script, &options, commands);
            // a test that hangs has gone
            let _ = tx.send((report, vm));
        });
        Self(rx)
    }

    fn end(self) -> (Report, RecordedVm) {
        self.0.recv_timeout(HANG).expect("hangs: the source")
    }

    fn completed(self) -> RecordedVm {
        let (report, vm) = self.end();
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        vm
    }
}

fn arrived(destination: &Destination) -> Arrived {
    destination.arrived.recv_timeout(HANG).expect("a VM has arrived")
}

/// A guest that writes nothing while it is moved.
fn quiet_guest() -> RecordedVm {
    let data: Vec<_> = data_pages(0..PAGES).map(|page| (page, (page % 250) as u8 + 1)).collect();
    RecordedVm::of(vm(), &data, &[])
}

/// The pages that are not zero.
fn data_pages(pages: Range<u64>) -> impl Iterator<Item = u64> + Clone {
    pages.filter(|page| page % 10 != 0)
}

fn is_empty(store: &MemoryPageStore) -> bool {
    // all names that a test uses
    (1..=3).all(|name| store.record(Namespace::new([name; 16]).id()).unwrap().is_none())
}

/// The first put after the hand-over finds that the store has lost what was put before. The link is
/// lost by then. The destination does not find the loss: its reads wait.
#[test]
fn rule_13_a_loss_that_is_found_while_the_link_is_lost_is_said_on_the_next_one() {
    let (inner, gate) = (memory("rack-7"), Arc::new(Gate::default()));
    let destination = destination(vec![Seen::gated(&inner, &gate)], &[7]);
    let link = Fragile::new(&destination);
    let (lines, served) = (link.lines.clone(), Arc::new(AtomicBool::new(false)));
    let runs = served.clone();
    let put = move |stored: Stored| {
        if !runs.load(Ordering::SeqCst) {
            return Ok(stored);
        }
        lines.cut();
        lines.back.open();
        Ok(Stored { incarnation: Incarnation([0xaa; 16]), ..stored })
    };
    let store = Seen { put: Box::new(put), ..Seen::good(&inner) };
    let served = Some(Box::new(move || served.store(true, Ordering::SeqCst)) as Box<_>);
    let (put, through) = (vec![(place("rack-7"), 1000)], vec![place("rack-7")]);
    let script = Script { put, through, served, ..Script::default() };
    let moving = Moving::begin(script, &link, guest(), options(vec![store]));
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("which the source holds", 0..PAGES);
    let vm = moving.completed();
    gate.open();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
}

/// The store does not answer a few times, and the source cannot be reached meanwhile.
#[test]
fn rule_13_a_silent_store_is_asked_again_while_the_source_cannot_be_reached() {
    let (inner, asked) = (memory("rack-7"), AtomicUsize::new(0));
    let get = move |_| if asked.fetch_add(1, Ordering::SeqCst) < 3 { Err(StoreError::TimedOut) } else { Ok(()) };
    let store = Seen { get: Box::new(get), ..Seen::good(&inner) };
    let destination = destination(vec![store], &[7, 501]);
    let link = Fragile::new(&destination);
    let (lines, cut) = (link.lines.clone(), link.lines.clone());
    let served = Some(Box::new(move || cut.cut()) as Box<_>);
    let script = Script { put: vec![(place("rack-7"), 1000)], served, ..Script::default() };
    let moving = Moving::begin(script, &link, quiet_guest(), options(vec![Seen::good(&inner)]));
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("which the store has", data_pages(0..1000));
    lines.back.open();
    let vm = moving.completed();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
    assert!(said.contains("it is asked again, and the source for "), "{said}");
}

/// A store that is silent for good counts as one that has lost its pages, as long as the source can
/// be reached.
#[test]
fn rule_13_the_source_sends_what_a_silent_store_has() {
    let inner = memory("rack-7");
    let store = Seen { get: Box::new(|_| Err(StoreError::TimedOut)), ..Seen::good(&inner) };
    let destination = destination(vec![store], &[7, 501]);
    let link = Fragile::new(&destination);
    // the source has something to put until all that was put before has arrived
    let (served, gate) = (Arc::new(AtomicBool::new(false)), Arc::new(Gate::default()));
    let (runs, all_there) = (served.clone(), gate.clone());
    let put = move |stored| {
        if runs.load(Ordering::SeqCst) {
            all_there.wait("a put");
        }
        Ok(stored)
    };
    let served = Some(Box::new(move || served.store(true, Ordering::SeqCst)) as Box<_>);
    let (putting, through) = (vec![(place("rack-7"), 1000)], vec![place("rack-7")]);
    let script = Script { put: putting, through, served, ..Script::default() };
    let stores = vec![Seen { put: Box::new(put), ..Seen::good(&inner) }];
    let moving = Moving::begin(script, &link, quiet_guest(), options(stores));
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("which the source holds", data_pages(0..1000));
    gate.open();
    let vm = moving.completed();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
}

/// The fault comes before the VM runs, so the source is asked, which does not hear it. Then the lanes
/// end. Pages that nobody waits for are not read from the store.
#[test]
fn rule_17_when_lanes_end_a_fault_is_asked_of_its_store() {
    let (inner, gate) = (memory("rack-7"), Arc::new(Gate::default()));
    let prefetch = gate.clone();
    let get = move |urgency| {
        if urgency == Urgency::Prefetch {
            prefetch.wait("a prefetch");
        }
        Ok(())
    };
    let store = Seen { get: Box::new(get), ..Seen::good(&inner) };
    let destination = destination(vec![store], &[7]);
    let link = Fragile::new(&destination);
    let (lines, cut) = (link.lines.clone(), link.lines.clone());
    lines.mute.store(true, Ordering::SeqCst);
    let served = Some(Box::new(move || cut.cut()) as Box<_>);
    let script = Script { put: vec![(place("rack-7"), 1000)], served, ..Script::default() };
    let moving = Moving::begin(script, &link, quiet_guest(), options(vec![Seen::good(&inner)]));
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("for which somebody waits", 7..8);
    gate.open();
    lines.mute.store(false, Ordering::SeqCst);
    lines.back.open();
    let vm = moving.completed();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
}

/// One of two stores hangs, after the source is gone. Somebody waits for pages of both.
#[test]
fn rule_13_a_dead_store_does_not_delay_the_pages_of_another() {
    let (dead, good, gate) = (memory("rack-7"), memory("rack-9"), Arc::new(Gate::default()));
    let destination = destination(vec![Seen::gated(&dead, &gate), Seen::good(&good)], &[7, 17, 27, 507]);
    let link = Fragile::new(&destination);
    let put = vec![(place("rack-7"), 500), (place("rack-9"), 500)];
    let script = Script { put, sends: true, ..Script::default() };
    let moving = Moving::begin(script, &link, quiet_guest(), options(vec![Seen::good(&dead), Seen::good(&good)]));
    let vm = moving.completed();
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("which the other store has", data_pages(500..1000));
    gate.open();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
}

/// All pages are in the store, or here, when the source dies before it has said *run*.
#[test]
fn rule_19_a_vm_that_is_taken_over_gathers_its_pages() {
    let (inner, gate) = (memory("rack-7"), Arc::new(Gate::default()));
    let destination = destination(vec![Seen::gated(&inner, &gate)], &[7]);
    let link = Fragile::new(&destination);
    let (cut, mut vm) = (link.lines.clone(), quiet_guest());
    let expected = checksums(&vm.ram);
    vm.in_doubt = Some(Box::new(move || cut.cut()));
    let script = Script { put: vec![(place("rack-7"), 1000)], sends: true, ..Script::default() };
    // it never learns what has become of its VM
    let _source = Moving::begin(script, &link, vm, options(vec![Seen::good(&inner)]));
    let deadline = Instant::now() + HANG;
    while let Err(why) = destination.handle.force_take_over() {
        assert!(Instant::now() < deadline, "hangs: {why}");
        thread::yield_now();
    }
    let there = arrived(&destination);
    gate.open();
    let (arrived, said) = destination.finish_after(there);
    assert!(arrived.pages() == expected, "{said}");
    arrived.pager.as_ref().unwrap().check();
    // rule 14
    assert!(is_empty(&inner), "{said}");
}

/// The store has lost pages of a VM that is held. The source has them, but is not reached.
#[test]
fn rule_19_a_vm_whose_store_has_lost_pages_is_not_taken_over() {
    let inner = memory("rack-7");
    let destination = destination(vec![Seen::good(&inner)], &[]);
    let link = Fragile::new(&destination);
    let (cut, store, mut vm) = (link.lines.clone(), inner.clone(), quiet_guest());
    vm.in_doubt = Some(Box::new(move || {
        store.forget(Namespace::new([1; 16]).of(VM)).unwrap();
        cut.cut();
    }));
    let script = Script { put: vec![(place("rack-7"), 1000)], sends: true, ..Script::default() };
    let moving = Moving::begin(script, &link, vm, options(vec![Seen::good(&inner)]));
    let deadline = Instant::now() + HANG;
    loop {
        let why = destination.handle.force_take_over().unwrap_err().to_string();
        if why.contains("only at its source") {
            break;
        }
        assert!(Instant::now() < deadline, "hangs: {why}");
        thread::yield_now();
    }
    link.lines.back.open();
    let vm = moving.completed();
    let (arrived, said) = destination.finish();
    check(&arrived, &vm, &said);
}

#[test]
fn rule_14_a_namespace_that_no_page_needs_is_forgotten() {
    for (whole, sends) in [(true, false), (false, true)] {
        let inner = memory("rack-7");
        let destination = destination(vec![Seen::good(&inner)], &[]);
        let script = Script { whole, sends, through: vec![place("rack-7")], ..Script::default() };
        let link = Fragile::new(&destination);
        let vm = Moving::begin(script, &link, quiet_guest(), options(vec![Seen::good(&inner)])).completed();
        let (arrived, said) = destination.finish();
        assert!(arrived.pages() == checksums(&vm.ram), "{whole}: {said}");
        assert!(is_empty(&inner), "whole {whole}: {said}");
    }
}

/// The put never ends, as far as the source knows. What it has put is forgotten when it does.
#[test]
fn a_store_that_hangs_does_not_keep_a_migration_from_being_cancelled() {
    let (inner, gate, (controller, commands)) = (memory("rack-7"), Arc::new(Gate::default()), Controller::new());
    let destination = destination(vec![Seen::good(&inner)], &[]);
    let hangs = gate.clone();
    let put = move |stored| {
        controller.cancel("the test says so");
        hangs.wait("a put");
        Ok(stored)
    };
    let store = Seen { put: Box::new(put), ..Seen::good(&inner) };
    let (link, script) = (Fragile::new(&destination), Script { put: vec![(place("rack-7"), 9)], ..Script::default() });
    let moving = Moving::commanded(script, &link, quiet_guest(), options(vec![store]), commands);
    let (report, mut vm) = moving.end();
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
    assert!(!vm.tracker().is_active());
    assert!(!is_empty(&inner), "the put has not ended");
    gate.open();
    let deadline = Instant::now() + HANG;
    while !is_empty(&inner) {
        assert!(Instant::now() < deadline, "hangs: the namespace is not forgotten");
        thread::yield_now();
    }
}
