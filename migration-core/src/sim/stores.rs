//! Page stores, and the requests to them.

use std::{
    collections::BTreeSet,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Simulation, StoreConfig, StoreFault,
    link::{Event, Pipe, bytes_of},
};
use crate::{
    MigrationError, PageRange,
    page_map::StoreCopy,
    store::{
        Incarnation, ManualClock, MemoryPageStore, Namespace, Owner, PageStore, PageToGet, PageToPut, Purpose, Record,
        StoreError, Urgency, VmNamespace,
    },
    strategy::Place,
    vm::VmId,
};

/// The VM of every simulation.
pub(super) const VM: VmId = VmId([1; 16]);
/// The owners of namespaces.
const SOURCE: Owner = owner("the source");
const DESTINATION: Owner = owner("the destination");
/// The lease of every namespace.
const LEASE: Duration = Duration::from_secs(24 * 3600);
/// The number of bytes that a page of the simulation takes in a store. Such a page is a version
/// number.
const STORED_BYTES: u64 = 8 + 32 + 64;
/// A deadline that no get exceeds in real time. The simulation has its own clock.
const NEVER_LATE: Duration = Duration::from_secs(3600);

const fn owner(name: &str) -> Owner {
    match Owner::new(name) {
        Ok(owner) => owner,
        Err(_) => panic!("not a name"),
    }
}

/// A page store, and the links to it.
pub(super) struct SimStore {
    config: StoreConfig,
    inner: MemoryPageStore,
    clock: Arc<ManualClock>,
    fails: bool,
    takes: Pipe,
    hands_out: Pipe,
}

impl SimStore {
    pub(super) fn new(config: StoreConfig, clock: Arc<ManualClock>) -> Self {
        let inner = Self::empty(&config, &clock);
        Self { config, inner, clock, fails: false, takes: Pipe::new(), hands_out: Pipe::new() }
    }

    fn empty(config: &StoreConfig, clock: &Arc<ManualClock>) -> MemoryPageStore {
        let limit = config.pages.saturating_mul(STORED_BYTES);
        MemoryPageStore::with_clock(config.name.clone(), limit, clock.clone())
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    pub(super) fn fault(&mut self, fault: StoreFault) {
        match fault {
            StoreFault::LosesContent => self.inner = Self::empty(&self.config, &self.clock),
            StoreFault::Fails => self.fails = true,
            StoreFault::Recovers => self.fails = false,
        }
    }

    /// Returns the store, or an error if it does not answer.
    fn reach(&self) -> Result<&MemoryPageStore, StoreError> {
        if self.fails {
            return Err(StoreError::io("reaching it")(io::ErrorKind::ConnectionReset.into()));
        }
        Ok(&self.inner)
    }
}

/// An entry of the store table. Its number is its position.
pub(super) struct Entry {
    names: Vec<String>,
    purpose: Purpose,
    /// The positions of the stores.
    stores: Vec<usize>,
    namespace: VmNamespace,
    /// The incarnations that the stores had when the namespace was created.
    incarnations: Vec<Incarnation>,
    /// The number of the last put.
    generation: u32,
    /// Whether nothing more is put into the entry: a store has lost pages, or has failed in this
    /// attempt.
    pub(super) closed: bool,
    forgotten: bool,
}

impl Entry {
    pub(super) fn is_for(&self, purpose: Purpose) -> bool {
        self.purpose == purpose && !self.forgotten
    }

    fn is(&self, names: &[String], purpose: Purpose) -> bool {
        self.is_for(purpose) && self.names == names
    }

    pub(super) fn store_count(&self) -> usize {
        self.stores.len()
    }
}

/// A request that is on its way to a store.
pub(super) enum Request {
    /// Stores pages. `put` is the number of the put, and `replica` the index of the store in the
    /// entry.
    Put { put: u64, replica: usize },
    /// Reads pages.
    Get { get: u64, side: Side },
    /// Queries the incarnation.
    Renew { entry: u8, replica: usize, check: u64 },
}

/// The reader of a request to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    /// The source, which sends the pages that it reads.
    Buffer,
    Destination,
}

/// An answer that is on its way from a store.
pub(super) enum Answer {
    Put { put: u64, replica: usize, result: Result<Incarnation, StoreError> },
    Get { get: u64, side: Side, found: Vec<(u64, u64)> },
    Renew { entry: u8, check: u64, intact: bool },
}

/// A put that is under way at all stores of an entry.
pub(super) struct PutUnderWay {
    range: PageRange,
    copy: StoreCopy,
    versions: Vec<u64>,
    /// The number of stores that have not answered.
    waiting: usize,
    failed: Option<MigrationError>,
    lost: bool,
}

/// A get that is under way at one store of an entry.
pub(super) struct GetUnderWay {
    pub(super) range: PageRange,
    pub(super) copy: StoreCopy,
    pub(super) replica: usize,
    pub(super) urgent: bool,
}

impl Simulation {
    // ---- entries -------------------------------------------------------------------------------

    /// Returns the open entry for a place in stores.
    pub(super) fn entry_for(&self, place: &Place) -> Option<u8> {
        let Place::Stores { names, purpose } = place else { return None };
        let found = self.entries.iter().position(|entry| entry.is(names, *purpose) && !entry.closed);
        found.and_then(|number| u8::try_from(number).ok())
    }

    /// Creates a namespace in the stores of a place, and an entry for it.
    ///
    /// # Errors
    /// The inner error says which store has failed. The outer error is final: there is no such
    /// store, or the table is full.
    pub(super) fn create_entry(&mut self, place: &Place) -> Result<Result<u8, MigrationError>, MigrationError> {
        let stores = self.stores_of(place)?;
        let Place::Stores { names, purpose } = place else {
            return Err(MigrationError::Blocked(format!("{place} is no place in a store")));
        };
        let number = u8::try_from(self.entries.len()).ok().filter(|&number| number < u8::MAX);
        let number = number.ok_or_else(|| MigrationError::Blocked("the store table is full".into()))?;
        let mut secret = [0; 16];
        secret[0] = number;
        secret[8..].copy_from_slice(&self.epoch.to_le_bytes().repeat(2));
        let namespace = Namespace::new(secret).of(VM);
        let record = Record { vm: VM, purpose: *purpose, owner: SOURCE };
        let mut incarnations = Vec::new();
        for &store in &stores {
            self.pass(self.stores[store].config.latency * 2);
            self.act();
            let created = self.stores[store].reach().and_then(|inner| inner.create(namespace.id, &record, LEASE));
            match created {
                Ok(incarnation) => incarnations.push(incarnation),
                Err(cause) => return Ok(Err(MigrationError::page_store(self.stores[store].name())(cause))),
            }
        }
        self.entries.push(Entry {
            names: names.clone(),
            purpose: *purpose,
            stores,
            namespace,
            incarnations,
            generation: 0,
            closed: false,
            forgotten: false,
        });
        Ok(Ok(number))
    }

    /// Returns the positions of a place's stores.
    pub(super) fn stores_of(&self, place: &Place) -> Result<Vec<usize>, MigrationError> {
        let Place::Stores { names, .. } = place else { return Ok(Vec::new()) };
        let position = |name: &String| self.stores.iter().position(|store| store.name() == name);
        let unknown = |name: &String| MigrationError::Blocked(format!("there is no page store {name}"));
        names.iter().map(|name| position(name).ok_or_else(|| unknown(name))).collect()
    }

    /// Forgets the namespaces of the entries for which `of` returns `true`, in the stores that
    /// answer.
    pub(super) fn forget(&mut self, of: impl Fn(&Entry) -> bool) {
        for entry in self.entries.iter_mut().filter(|entry| !entry.forgotten && of(entry)) {
            (entry.forgotten, entry.closed) = (true, true);
            for &store in &entry.stores {
                // a store that does not answer keeps the namespace until a person removes what has
                // expired
                let _ = self.stores[store].reach().and_then(|inner| inner.forget(entry.namespace));
            }
        }
    }

    /// Returns the number of namespaces that are left in all stores.
    pub fn namespaces(&self) -> usize {
        let has = |store: usize, id| matches!(self.stores[store].inner.record(id), Ok(Some(_)));
        self.entries.iter().flat_map(|entry| entry.stores.iter().filter(|&&s| has(s, entry.namespace.id))).count()
    }

    // ---- requests ------------------------------------------------------------------------------

    /// Puts pages of the source into an entry's stores. The pages must be in RAM.
    pub(super) fn start_put(&mut self, number: u8, range: PageRange) -> Result<(), MigrationError> {
        let entry = &mut self.entries[usize::from(number)];
        entry.generation += 1;
        let copy = StoreCopy { entry: number, generation: entry.generation };
        self.source.map.put_started(range, copy)?;
        let versions: Vec<_> = range.pages().map(|page| self.source.ram[page as usize]).collect();
        let stores = entry.stores.clone();
        let put = self.numbered();
        let under_way = PutUnderWay { range, copy, versions, waiting: stores.len(), failed: None, lost: false };
        self.source.puts.insert(put, under_way);
        let rate = self.egress_for_stores();
        for (replica, store) in stores.into_iter().enumerate() {
            let sent = self.network.to_stores.send(self.clock, range.bytes(), rate);
            let store = &mut self.stores[store];
            let taken = store.takes.send(self.clock, range.bytes(), store.config.bytes_per_second);
            let at = sent.max(taken) + store.config.latency;
            self.network.at(at, Event::AtStore(Request::Put { put, replica }));
        }
        Ok(())
    }

    /// Reads pages from one store of an entry.
    pub(super) fn start_get(&mut self, side: Side, request: GetUnderWay) {
        let store = self.entries[usize::from(request.copy.entry)].stores[request.replica];
        let get = self.numbered();
        self.gets.insert(get, request);
        let at = self.clock + self.stores[store].config.latency;
        self.network.at(at, Event::AtStore(Request::Get { get, side }));
    }

    /// Sends the destination's query to all stores of an entry, whether they have lost anything.
    pub(super) fn start_renew(&mut self, number: u8, check: u64) {
        for replica in 0..self.entries[usize::from(number)].store_count() {
            let store = self.entries[usize::from(number)].stores[replica];
            let at = self.clock + self.stores[store].config.latency;
            self.network.at(at, Event::AtStore(Request::Renew { entry: number, replica, check }));
        }
    }

    pub(super) fn numbered(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// Lets a store answer a request that has arrived.
    pub(super) fn store_takes(&mut self, request: Request) {
        let (store, answer, at) = match request {
            Request::Put { put, replica } => {
                let Some(under_way) = self.source.puts.get(&put) else { return };
                let entry = &self.entries[usize::from(under_way.copy.entry)];
                let store = entry.stores[replica];
                let result = put_versions(&self.stores[store], entry.namespace, under_way);
                (store, Answer::Put { put, replica, result }, self.clock)
            }
            Request::Get { get, side } => {
                let Some(under_way) = self.gets.get(&get) else { return };
                let entry = &self.entries[usize::from(under_way.copy.entry)];
                let store = entry.stores[under_way.replica];
                let found = get_versions(&self.stores[store], entry.namespace, under_way);
                let (urgent, bytes) = (under_way.urgent, bytes_of(found.len() as u64));
                let at = self.hand_out(store, side, bytes, urgent);
                (store, Answer::Get { get, side, found }, at)
            }
            Request::Renew { entry: number, replica, check } => {
                let entry = &self.entries[usize::from(number)];
                let store = entry.stores[replica];
                let renewed = self.stores[store].reach().and_then(|s| s.renew(entry.namespace, DESTINATION, LEASE));
                let intact = renewed.is_ok_and(|incarnation| incarnation == entry.incarnations[replica]);
                (store, Answer::Renew { entry: number, check, intact }, self.clock)
            }
        };
        let at = at + self.stores[store].config.latency;
        self.network.at(at, Event::FromStore(answer));
    }

    /// Returns the time at which `bytes` bytes have left a store and its reader's link.
    fn hand_out(&mut self, store: usize, side: Side, bytes: u64, urgent: bool) -> Duration {
        let (now, store) = (self.clock, &mut self.stores[store]);
        let rate = store.config.bytes_per_second;
        let link = (side == Side::Destination).then_some(&mut self.network.to_destination);
        let link_rate = self.config.bytes_per_second;
        let [out, taken] = if urgent {
            [
                store.hands_out.send_urgently(now, bytes, rate),
                link.map_or(now, |l| l.send_urgently(now, bytes, link_rate)),
            ]
        } else {
            [store.hands_out.send(now, bytes, rate), link.map_or(now, |l| l.send(now, bytes, link_rate))]
        };
        out.max(taken)
    }

    /// Takes a store's answer.
    pub(super) fn take_answer(&mut self, answer: Answer) {
        match answer {
            Answer::Put { put, replica, result } => self.put_answered(put, replica, result),
            Answer::Get { get, side, found } => {
                let Some(under_way) = self.gets.remove(&get) else { return };
                match side {
                    Side::Source => self.got_at_source(under_way, found),
                    Side::Buffer => self.got_in_buffer(under_way, found),
                    Side::Destination => self.got_at_destination(under_way, found),
                }
            }
            Answer::Renew { entry, check, intact } => self.renewed(entry, check, intact),
        }
    }

    /// Takes one store's answer to a put. When all stores have answered, the pages count as put, or
    /// can be claimed again.
    fn put_answered(&mut self, put: u64, replica: usize, result: Result<Incarnation, StoreError>) {
        let Some(under_way) = self.source.puts.get_mut(&put) else { return };
        let entry = &self.entries[usize::from(under_way.copy.entry)];
        let store = self.stores[entry.stores[replica]].name();
        under_way.waiting -= 1;
        match result {
            Ok(incarnation) => under_way.lost |= incarnation != entry.incarnations[replica],
            Err(cause) => {
                under_way.lost |= matches!(cause, StoreError::Absent(_));
                under_way.failed.get_or_insert(MigrationError::page_store(store)(cause));
            }
        }
        if under_way.waiting > 0 {
            return;
        }
        let Some(PutUnderWay { range, copy, failed, lost, .. }) = self.source.puts.remove(&put) else { return };
        if lost {
            // the pages that were put there before do not count any more either
            self.source.map.entry_lost(copy.entry);
        }
        if failed.is_none() && !lost {
            for run in self.source.map.put_done(range, copy) {
                self.source.put.insert_range(run);
                self.attempt.put += run.count;
            }
        } else {
            self.source.map.put_failed(range, copy);
            self.attempt.failed_puts += 1;
            if !self.source.machine.owns() {
                // the pages move over the direct link, or through another store
                self.source.failing.insert(copy.entry);
            }
            let entry = self.entry(copy.entry);
            let absent =
                || MigrationError::page_store(&entry.names.join(" and "))(StoreError::Absent(entry.namespace.id));
            let error = failed.unwrap_or_else(absent);
            self.source.put_failure.get_or_insert(error);
        }
        if lost {
            self.entries[usize::from(copy.entry)].closed = true;
        }
    }

    pub(super) fn is_forgotten(&self, number: u8) -> bool {
        self.entry(number).forgotten
    }

    /// Returns the error of an entry whose stores do not have pages.
    pub(super) fn lacking(&self, number: u8, count: u64, first: u64) -> MigrationError {
        let entry = self.entry(number);
        let missing = StoreError::Missing { namespace: entry.namespace.id, count, first };
        MigrationError::page_store(&entry.names.join(" and "))(missing)
    }

    fn entry(&self, number: u8) -> &Entry {
        &self.entries[usize::from(number)]
    }

    /// Requests the pages in `lacking` from the next store of the entry. Returns whether there is
    /// one.
    pub(super) fn ask_next_store(&mut self, side: Side, asked: &GetUnderWay, lacking: &[PageRange]) -> bool {
        let replica = asked.replica + 1;
        if replica >= self.entry(asked.copy.entry).store_count() {
            return false;
        }
        for &range in lacking {
            self.start_get(side, GetUnderWay { range, replica, ..*asked });
        }
        true
    }
}

/// Returns the runs of pages of `range` that are not in `found`.
pub(super) fn not_found(range: PageRange, found: &[(u64, u64)]) -> Vec<PageRange> {
    let found: BTreeSet<u64> = found.iter().map(|&(page, _)| page).collect();
    PageRange::runs_of(range.pages().filter(|page| !found.contains(page)))
}

/// Stores the versions of pages, as values of 8 bytes.
fn put_versions(store: &SimStore, namespace: VmNamespace, put: &PutUnderWay) -> Result<Incarnation, StoreError> {
    let values: Vec<_> = put.versions.iter().map(|version| version.to_le_bytes()).collect();
    let pages: Vec<_> =
        put.range.pages().zip(&values).map(|(page, value)| PageToPut { page, value: &value[..] }).collect();
    Ok(store.reach()?.put(namespace, put.copy.generation, &pages)?.incarnation)
}

/// Returns the versions of the pages that the store has in the requested generation.
fn get_versions(store: &SimStore, namespace: VmNamespace, get: &GetUnderWay) -> Vec<(u64, u64)> {
    let wanted: Vec<_> = get.range.pages().map(|page| PageToGet { page, generation: get.copy.generation }).collect();
    let urgency = if get.urgent { Urgency::Fault } else { Urgency::Prefetch };
    let mut found = Vec::new();
    if let Ok(inner) = store.reach() {
        // pages that the store returned before an error are valid
        let _ = inner.get(namespace, &wanted, urgency, Instant::now() + NEVER_LATE, &mut |page, data| {
            if let Ok(value) = data.bytes().try_into() {
                found.push((page, u64::from_le_bytes(value)));
            }
        });
    }
    found
}
