//! Both engines over channels in memory, with page stores that fail, hang or are silent while the
//! link is lost, or after the source is gone.

use std::{
    io,
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
        Incarnation, MemoryPageStore, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record,
        StoreError, Stored, Urgency, VmNamespace,
    },
    strategy::{Done, Linear, Place, Running, Strategy, push_order::Through},
    wire::LaneKind,
};

use crate::{
    HANG,
    channels::{End, Ends, pair},
    destination::Destination,
    guest::{Arrived, Host, RecordedVm},
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

type Hook<T> = Box<dyn Fn(T) -> Result<T, StoreError> + Send + Sync>;

/// A store as one host sees it. A test says what happens to its calls.
struct Seen {
    inner: Arc<MemoryPageStore>,
    /// Called before a read.
    get: Hook<()>,
    /// Called after a put, with its result.
    put: Hook<Stored>,
}

impl Seen {
    /// The store as it is.
    fn good(inner: &Arc<MemoryPageStore>) -> Self {
        Self { inner: inner.clone(), get: Box::new(Ok), put: Box::new(Ok) }
    }

    /// The store as a host sees it whose reads wait at the gate.
    fn gated(inner: &Arc<MemoryPageStore>, gate: &Arc<Gate>) -> Self {
        let gate = gate.clone();
        let get = Box::new(move |()| {
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
        (self.get)(())?;
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

    fn connect_as(&self, _kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        if self.lines.lost.load(Ordering::SeqCst) && !self.lines.back.is_open() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (here, there) = pair();
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
        vm.start_tracking()?;
        let mut at = 0;
        for (place, count) in &self.put {
            let mut pages = PageSet::empty(PAGES);
            pages.insert_range(PageRange::new(at, *count));
            vm.put(&mut pages, place.at_most(*count))?.or_fail()?;
            at += count;
        }
        let mut dirty = vm.harvest()?;
        if self.sends {
            vm.send(&dirty)?;
            dirty = vm.harvest()?;
        }
        let served = vm.pause()?.hand_over(dirty)?;
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

/// The third put, after the hand-over, finds that the store has lost what the first two put there.
/// The link is lost by then. The destination does not find the loss: it reads nothing.
#[test]
fn rule_13_a_loss_that_is_found_while_the_link_is_lost_is_said_on_the_next_one() {
    let (inner, gate) = (memory("rack-7"), Arc::new(Gate::default()));
    let destination = destination(vec![Seen::gated(&inner, &gate)], &[7]);
    let link = Fragile::new(&destination);
    let (lines, puts) = (link.lines.clone(), AtomicUsize::new(0));
    let put = move |stored: Stored| {
        if puts.fetch_add(1, Ordering::SeqCst) < 2 {
            return Ok(stored);
        }
        lines.cut();
        lines.back.open();
        Ok(Stored { incarnation: Incarnation([0xaa; 16]), ..stored })
    };
    let store = Seen { put: Box::new(put), ..Seen::good(&inner) };
    let script = Script { put: vec![(place("rack-7"), 1000)], through: vec![place("rack-7")], ..Script::default() };
    let moving = Moving::begin(script, &link, guest(), options(vec![store]));
    let there = arrived(&destination);
    there.pager.as_ref().unwrap().wait_for("which the source holds", 0..PAGES);
    let vm = moving.completed();
    gate.open();
    let (arrived, said) = destination.finish_after(there);
    check(&arrived, &vm, &said);
}
