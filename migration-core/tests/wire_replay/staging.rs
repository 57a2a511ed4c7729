//! The engine protects a VM in a page store, and evicts it to a destination that is named late.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    HeapRam, MigrationError,
    channel::Connector,
    engine::{Controller, NoEviction, ReceiverOptions, SourceOptions, SourceStores, stage},
    report::{Event, Observer, Outcome, Report, StagingReport},
    store::{
        Incarnation, MemoryPageStore, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record,
        StoreError, Stored, Urgency, VmNamespace,
    },
    strategy::{self, Done, Finish, Linear, Place, QuickEviction, Running, Strategy, Until, Wake},
    tracker::{DirtyBitmap, DirtyTracker},
};

pub(crate) use crate::through_stores::{guest, vm};
use crate::{
    HANG,
    destination::Destination,
    guest::{Host, RecordedVm, checksums, write},
    live::{Link, run_by},
    pager::Paging,
    through_stores::DURING,
};

/// Pages that hold data when the protection begins: all but each tenth.
pub(crate) const DATA: u64 = 2700;
/// A strategy whose increments are far smaller than what has to be staged, and follow each other at
/// once.
pub(crate) fn quick(finish: Finish) -> QuickEviction {
    QuickEviction {
        stage: Place::stage(["rack-7"]),
        interval: Duration::from_millis(1),
        threshold: 1,
        most: 200,
        finish,
        order: Box::new(Linear::default()),
    }
}

pub(crate) fn there(name: &str) -> strategy::Destination {
    strategy::Destination::named(name)
}

/// A link to where nobody listens.
fn nowhere() -> Link {
    let (door, _) = mpsc::channel();
    Link::to(door, None)
}

/// A store that can fail, lose what it has, and take its time.
pub(crate) struct Flaky {
    inner: Mutex<Arc<MemoryPageStore>>,
    fails: AtomicBool,
    /// Whether puts wait, and whether one does.
    hangs: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Flaky {
    pub(crate) fn new() -> Arc<Self> {
        let (fails, hangs) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { inner: Mutex::new(Self::empty()), fails, hangs, changed: Condvar::new() })
    }

    fn empty() -> Arc<MemoryPageStore> {
        Arc::new(MemoryPageStore::new("rack-7", 64 << 20))
    }

    pub(crate) fn fail(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }

    pub(crate) fn lose_everything(&self) {
        *self.inner.lock().unwrap() = Self::empty();
    }

    /// From now on puts wait until this is called again.
    pub(crate) fn hang(&self, hangs: bool) {
        self.hangs.lock().unwrap().0 = hangs;
        self.changed.notify_all();
    }

    pub(crate) fn wait_for_put(&self) {
        let waited = self.changed.wait_timeout_while(self.hangs.lock().unwrap(), HANG, |hangs| !hangs.1).unwrap();
        assert!(!waited.1.timed_out(), "no put has come");
    }

    fn reach(&self) -> Result<Arc<MemoryPageStore>, StoreError> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(StoreError::io("reaching it")(std::io::ErrorKind::ConnectionReset.into()));
        }
        Ok(self.inner.lock().unwrap().clone())
    }

    /// Returns which of the namespaces that the test has named exist.
    pub(crate) fn namespaces(&self) -> Vec<u8> {
        let inner = self.inner.lock().unwrap().clone();
        (1..100).filter(|&name| inner.record(Namespace::new([name; 16]).id()).unwrap().is_some()).collect()
    }
}

impl PageStore for Flaky {
    fn name(&self) -> &str {
        "rack-7"
    }

    fn room(&self) -> u64 {
        0
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.reach()?.create(id, record, lease)
    }

    fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.reach()?.renew(of, owner, lease)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        let mut hangs = self.hangs.lock().unwrap();
        if hangs.0 {
            hangs.1 = true;
            self.changed.notify_all();
        }
        let waited = self.changed.wait_timeout_while(hangs, HANG, |hangs| hangs.0).unwrap();
        assert!(!waited.1.timed_out(), "a put hangs for ever");
        drop(waited);
        self.reach()?.put(of, generation, pages)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        self.reach()?.get(of, pages, urgency, deadline.max(Instant::now() + HANG), take)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.reach()?.record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.reach()?.forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.reach()?.expired()
    }
}

struct Events(Mutex<mpsc::Sender<Event>>);

impl Observer for Events {
    fn event(&self, event: &Event) {
        // a test that has seen enough has dropped the other end
        let _ = self.0.lock().unwrap().send(event.clone());
    }
}

pub(crate) fn options(store: &Arc<Flaky>) -> SourceOptions {
    let next = AtomicU8::new(1);
    let stores = SourceStores {
        stores: vec![store.clone()],
        new_namespace: Arc::new(move || Namespace::new([next.fetch_add(1, Ordering::Relaxed); 16])),
        owner: Owner::new("host-7").unwrap(),
        lease: Duration::from_secs(60),
        gather_rate: None,
    };
    SourceOptions { stores: Some(stores), demand_lanes: 1, ..SourceOptions::default() }
}

/// A VM that is protected on a thread of its own.
pub(crate) struct Staged {
    pub(crate) controller: Controller,
    events: mpsc::Receiver<Event>,
    ended: mpsc::Receiver<(Report, RecordedVm)>,
    pub(crate) ram: Arc<HeapRam>,
    pub(crate) dirty: Arc<DirtyBitmap>,
    writing: Arc<Mutex<bool>>,
    calls: Arc<Mutex<Vec<&'static str>>>,
}

impl Staged {
    pub(crate) fn new(mut strategy: impl Strategy + 'static, options: SourceOptions) -> Self {
        let (controller, commands) = Controller::new();
        let (tx, ended) = mpsc::channel();
        let (events_tx, events) = mpsc::channel();
        let options = SourceOptions { observer: Arc::new(Events(Mutex::new(events_tx))), ..options };
        let mut vm = guest();
        let (ram, dirty) = (vm.ram.clone(), vm.dirty.clone());
        let (writing, calls) = (vm.writing.clone(), vm.calls.clone());
        thread::spawn(move || {
            let report = stage(&mut vm, &mut strategy, &options, commands);
            drop(options);
            // a test that hangs has gone
            let _ = tx.send((report, vm));
        });
        Self { controller, events, ended, ram, dirty, writing, calls }
    }

    /// Protects the VM by quick eviction, and waits until the store has all pages.
    pub(crate) fn whole(store: &Arc<Flaky>, finish: Finish) -> Self {
        let staged = Self::new(quick(finish), options(store));
        staged.until_whole(DATA);
        staged
    }

    /// Waits for an event. Returns what `wanted` makes of it.
    pub(crate) fn until<T>(&self, what: &str, wanted: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + HANG;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).unwrap_or_else(|error| panic!("{what}: {error}"));
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    }

    pub(crate) fn until_staging(&self, what: &str, wanted: impl Fn(&StagingReport) -> bool) -> StagingReport {
        self.until(what, |event| match event {
            Event::Staging(report) if wanted(report) => Some(report.clone()),
            _ => None,
        })
    }

    /// Waits until the store has the newest content of so many pages, and of all that have any.
    pub(crate) fn until_whole(&self, pages: u64) -> StagingReport {
        self.until_staging("all pages are staged", |report| report.dirty_pages == 0 && report.staged_pages == pages)
    }

    pub(crate) fn write(&self, page: u64, byte: u8) {
        write(&self.ram, &self.dirty, page, byte);
    }

    /// Writes some hundred pages again and again, until the guest is paused.
    pub(crate) fn keep_writing(&self) -> thread::JoinHandle<u32> {
        let (ram, dirty, writing) = (self.ram.clone(), self.dirty.clone(), self.writing.clone());
        *writing.lock().unwrap() = true;
        thread::spawn(move || {
            let mut writes = 0;
            loop {
                let may_write = writing.lock().unwrap();
                if !*may_write {
                    return writes;
                }
                write(&ram, &dirty, 100 + u64::from(writes) % 300, writes as u8);
                writes += 1;
                drop(may_write);
                thread::yield_now();
            }
        })
    }

    pub(crate) fn evict(&self, to: &str, connector: impl Connector + 'static) {
        self.controller.evict(there(to), Arc::new(connector)).unwrap();
    }

    /// Waits until an eviction has failed. Returns why.
    pub(crate) fn until_failed(&self, wanted: &str) -> String {
        self.until("an eviction fails", |event| match event {
            Event::EvictionFailed { to, why } if to == wanted => Some(why.clone()),
            _ => None,
        })
    }

    /// Waits until an eviction has failed, or the session has ended. Returns whether it has ended.
    pub(crate) fn until_decided(&self) -> bool {
        let deadline = Instant::now() + HANG;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::EvictionFailed { .. }) => return false,
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return true,
                Err(error) => panic!("the eviction hangs: {error}"),
            }
        }
    }

    /// Waits until the engine has said that the destination has the VM.
    pub(crate) fn until_released(&self) {
        let deadline = Instant::now() + HANG;
        while self.calls.lock().unwrap().last() != Some(&"released") {
            assert!(Instant::now() < deadline, "the source is not released");
            thread::yield_now();
        }
    }

    pub(crate) fn end(&self) -> (Report, RecordedVm) {
        self.ended.recv_timeout(HANG).expect("the session hangs")
    }

    /// Evicts the VM there, and checks that it arrives as it was.
    pub(crate) fn arrives(self, destination: Destination, store: &Arc<Flaky>) -> Report {
        self.evict("host-2", Link::new(&destination, None));
        let (report, vm) = self.end();
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        check(destination, &vm);
        assert_eq!(store.namespaces(), [] as [u8; 0], "nobody needs the namespaces any more");
        report
    }
}

pub(crate) fn check(destination: Destination, vm: &RecordedVm) {
    assert_eq!(vm.calls.lock().unwrap().last(), Some(&"released"));
    let (arrived, said) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{said}");
    arrived.pager.as_ref().unwrap().check();
}

pub(crate) fn destination(stores: Vec<Arc<dyn PageStore>>) -> Destination {
    let paging = Paging { block_pages: 1, faults: vec![vec![3], vec![5], vec![2700, 7]], touched: vec![3, 5] };
    let options = ReceiverOptions { idle_timeout: HANG, stores, ..ReceiverOptions::default() };
    Destination::with(options, |to| Host { description: vm(), to, paging: Some(paging) })
}

#[test]
fn an_idle_vm_is_evicted_and_only_its_last_writes_come_from_here() {
    for finish in [Finish::PostCopy, Finish::Stop] {
        let store = Flaky::new();
        let staged = Staged::whole(&store, finish);
        assert_eq!(store.namespaces(), [1]);
        let status = staged.controller.staging().unwrap();
        assert!(status.increments >= DATA / 200 && status.age.is_some() && status.degraded.is_none(), "{status:?}");
        let report = staged.arrives(destination(vec![store.clone()]), &store);
        let in_pause: u64 = report.rounds.iter().map(|round| round.pages).sum();
        let (pushed, sent) = (report.pages.pushed + report.pages.demanded, DURING.len() as u64);
        match finish {
            // rule 7: until the VM runs the source sends what loading the state touches
            Finish::PostCopy => assert!(in_pause == 0 && pushed >= sent && pushed < 50, "{report:?}"),
            Finish::Stop => assert!(in_pause == sent && pushed < 50, "{report:?}"),
        }
        assert!(report.downtime.is_some());
    }
}

#[test]
fn a_vm_that_writes_is_evicted() {
    for finish in [Finish::PostCopy, Finish::Stop] {
        let store = Flaky::new();
        let staged = Staged::new(quick(finish), options(&store));
        let writer = staged.keep_writing();
        staged.until_staging("increments", |report| report.increments > 2 * DATA / 200);
        staged.arrives(destination(vec![store.clone()]), &store);
        assert!(writer.join().unwrap() > 0);
    }
}

#[test]
fn a_refused_eviction_leaves_the_vm_protected_and_the_next_one_may_go_elsewhere() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    // nobody listens there
    staged.evict("host-1", nowhere());
    assert!(staged.until_failed("host-1").contains("link to"));
    // it has no stores
    let poor = destination(vec![]);
    staged.evict("host-3", Link::new(&poor, None));
    assert!(staged.until_failed("host-3").contains("does not fetch from any"));
    // it has others
    let other = destination(vec![Arc::new(MemoryPageStore::new("rack-9", 1 << 20))]);
    staged.evict("host-4", Link::new(&other, None));
    assert!(staged.until_failed("host-4").contains("no page store rack-7"));
    let status = staged.controller.staging().unwrap();
    assert_eq!((status.failed_evictions, status.staged_pages), (3, DATA));
    assert!(status.last_failure.unwrap().starts_with("host-4: "));
    // the protection goes on
    staged.write(10, 77);
    staged.until_whole(DATA + 1);
    let report = staged.arrives(destination(vec![store.clone()]), &store);
    assert_eq!(report.epoch, 4);
}

#[test]
fn the_protection_ends_when_the_user_says_so_and_leaves_nothing() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    // there is no eviction to be cancelled
    staged.controller.cancel("by mistake");
    staged.write(10, 77);
    staged.until_whole(DATA + 1);
    staged.controller.stage_off();
    let (report, vm) = staged.end();
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
    assert_eq!(store.namespaces(), [] as [u8; 0]);
    assert!(!vm.tracker.is_active() && vm.calls.lock().unwrap().is_empty() && report.downtime.is_none());
    assert!(staged.controller.staging().is_none());
    let late = staged.controller.evict(there("host-2"), Arc::new(nowhere()));
    assert_eq!(late, Err(NoEviction::Ended));
}

#[test]
fn the_protection_ends_with_the_guest() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    staged.controller.vm_ended("powered off");
    let (report, _) = staged.end();
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.unwrap().contains("powered off"));
    assert_eq!(store.namespaces(), [] as [u8; 0]);
}

/// Notes what its waits have returned.
struct Waits(mpsc::Sender<Result<Wake, String>>);

impl Strategy for Waits {
    fn name(&self) -> &'static str {
        "waits"
    }

    fn stores(&self) -> Vec<Place> {
        vec![Place::stage(["rack-7"])]
    }

    fn connects_itself(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        vm.start_tracking()?;
        vm.harvest()?;
        for until in [
            Until::after(Duration::ZERO),
            Until::dirty(0),
            Until::dirty(3).or_after(HANG * 10),
            Until::command().or_after(HANG * 10),
            Until::command(),
        ] {
            let woken = vm.wait(until);
            let _ = self.0.send(woken.as_ref().map(Clone::clone).map_err(ToString::to_string));
            woken?;
        }
        vm.cancel("it has waited enough")
    }
}

#[test]
fn a_wait_ends_with_time_dirty_pages_and_commands() {
    let store = Flaky::new();
    let (tx, woken) = mpsc::channel();
    let staged = Staged::new(Waits(tx), options(&store));
    let next = || woken.recv_timeout(HANG).expect("a wait hangs");
    assert_eq!(next(), Ok(Wake::Time));
    assert_eq!(next(), Ok(Wake::Dirty), "no page is enough");
    for page in 0..3 {
        staged.write(page, 5);
    }
    assert_eq!(next(), Ok(Wake::Dirty));
    staged.evict("host-1", nowhere());
    assert_eq!(next(), Ok(Wake::Command(there("host-1"))));
    // each command is returned once; the end of the protection ends every wait
    staged.controller.stage_off();
    assert!(next().unwrap_err().contains("not to be protected"));
    assert_eq!(staged.end().0.outcome, Outcome::Cancelled);
}

/// Waits while it is connected, and then stops and copies.
struct WaitsConnected;

impl Strategy for WaitsConnected {
    fn name(&self) -> &'static str {
        "waits while it is connected"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        vm.start_tracking()?;
        assert_eq!(vm.wait(Until::after(Duration::from_millis(1)))?, Wake::Time);
        assert_eq!(vm.wait(Until::dirty(0).or_after(HANG))?, Wake::Dirty);
        let refused = vm.wait(Until::command()).unwrap_err().to_string();
        assert!(refused.contains("no command can come"), "{refused}");
        strategy::StopAndCopy.migrate(vm)
    }
}

#[test]
fn a_migration_with_a_known_destination_waits_for_all_but_commands() {
    let destination = destination(vec![]);
    let (report, vm, _) =
        run_by(WaitsConnected, &destination, Link::new(&destination, None), guest(), SourceOptions::default());
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, said) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{said}");
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_reason() {
    let store = Flaky::new();
    let all = || options(&store);
    let refused = |strategy: Box<dyn Strategy>, options: SourceOptions| {
        let mut strategy = strategy;
        let (mut vm, commands) = (guest(), Controller::new().1);
        let report = stage(&mut vm, &mut *strategy, &options, commands);
        assert_eq!(report.outcome, Outcome::Failed);
        report.reason.unwrap()
    };
    let unknown = QuickEviction { stage: Place::stage(["rack-9"]), ..quick(Finish::PostCopy) };
    let quick = || Box::new(quick(Finish::PostCopy));
    let post_copy = Box::new(strategy::PostCopy { order: Box::new(Linear::default()) });
    for (why, said) in [
        ("does not keep a copy", refused(post_copy, all())),
        ("no page store rack-9", refused(Box::new(unknown), all())),
        ("no page stores here", refused(quick(), SourceOptions { stores: None, ..all() })),
        ("demand lanes are off", refused(quick(), SourceOptions { demand_lanes: 0, ..all() })),
    ] {
        assert!(said.contains(why), "{said}");
    }
    assert_eq!(store.namespaces(), [] as [u8; 0]);
}
