//! The beginning of a migration: the checks before anything moves, the pages that are in stores
//! already, and the session with a destination.
//!
//! The steps, and the reason for their order:
//!
//! 1. **Determine which pages are in stores.** The pages that stay there have their location in the
//!    map, and their store has an entry in the store table, before the strategy begins.
//! 2. **Connect.** The destination builds the VM, and grants the features that are needed.
//! 3. **Send the store table**, and wait until the destination has accepted it. A destination
//!    refuses a store that it was not started with, and it does so while nothing has moved.
//! 4. **Send all locations**, while the guest runs, and wait until the destination has read them.
//!    Rounds come after that, so the pages of a round are newer than a location (rule 16).
//!
//! A strategy that [connects by itself](Strategy::connects_itself) begins after step 1.

use super::{fetcher::Fetcher, putter::PlaceThread, *};
use crate::{
    engine::stored::Stored,
    page_map::{LocatedRun, StoreCopy},
    paged_memory::PagedMemory,
    strategy::Destination,
};

impl Engine<'_> {
    pub(super) fn attempt(&mut self, strategy: &mut dyn Strategy) -> Result<(), MigrationError> {
        if strategy.needs_store() {
            let why = format!("{} puts pages into a store, and there is none", strategy.name());
            return Err(MigrationError::Blocked(why));
        }
        let places = strategy.stores();
        if let Some(place) = places.first()
            && (self.options.stores.is_none() || self.options.fail_safe.is_some())
        {
            let lacks = match self.options.stores {
                None => "there are no page stores here",
                Some(_) => "fail-safe post-copy is on, which does not go with page stores",
            };
            return Err(MigrationError::Blocked(format!(
                "{} puts pages elsewhere ({place}): {lacks}",
                strategy.name()
            )));
        }
        self.look_at_stores(strategy.keeps_stored_pages())?;
        self.uses_stores = !places.is_empty() || self.places.has_entries();
        self.places.wanted = places;
        if !strategy.connects_itself() {
            self.open_session()?;
        }
        strategy.migrate(Running::new(self))?;
        Ok(())
    }

    /// Performs step 1. `keeps` says whether the pages that are in stores stay there.
    fn look_at_stores(&mut self, keeps: bool) -> Result<(), MigrationError> {
        let Some(memory) = self.vm.paged_memory() else { return Ok(()) };
        let (pages, stored, at_source) = memory.map().read(|map| (map.pages(), map.in_store().len(), map.at_source()));
        let blocked = |why: &str| Err(MigrationError::Blocked(format!("{stored} pages are in page stores: {why}")));
        let evicting = memory.map().read(|map| map.being_evicted().len());
        if evicting > 0 {
            let why = format!("{evicting} pages are about to be evicted: the VMM maps them again before a migration");
            return Err(MigrationError::Blocked(why));
        }
        if at_source > 0 {
            let why = format!("{at_source} pages of the VM have not come from its last source yet");
            return Err(MigrationError::Blocked(why));
        }
        if stored == 0 {
            // No page is evicted from here on either.
            return Ok(());
        }
        if pages != self.report.pages.total {
            return blocked(&format!("their map is one of {pages} pages, and the VM has {}", self.report.pages.total));
        }
        if self.strategy.shares_ram {
            return blocked("the VM cannot be handed over to a process that maps its RAM");
        }
        if self.options.fail_safe.is_some() {
            return blocked("fail-safe post-copy does not go with that");
        }
        let mut stored = Stored::new(memory.clone(), keeps);
        if keeps {
            self.keep_in_stores(&memory, &mut stored)?;
        }
        self.rounds.set_stored(stored);
        let started = Fetcher::start(memory, self.options)?;
        self.places.threads.extend(started.threads);
        // The fetcher is set only once, so this cannot fail.
        let _ = self.post_copy.left.fetcher.set(started.fetcher);
        Ok(())
    }

    /// Records in the map the location of each page that is in a store, and adds the entries of
    /// these locations to the store table (rule 15). The entries have other numbers there than in
    /// the VM's own table.
    fn keep_in_stores(&mut self, memory: &PagedMemory, stored: &mut Stored) -> Result<(), MigrationError> {
        let runs = memory.map().read(|map| map.located_runs(map.in_store()));
        let mut map = self.rounds.map();
        for of_entry in runs.chunk_by(|a, b| a.copy.entry == b.copy.entry) {
            let Some(&LocatedRun { copy: StoreCopy { entry: number, .. }, .. }) = of_entry.first() else { continue };
            let unknown = || MigrationError::Blocked(format!("pages are in entry {number}, which no store table has"));
            let entry = self.places.keep_entry(number, memory.entry(number).ok_or_else(unknown)?)?;
            for run in of_entry {
                map.located(run.pages, StoreCopy { entry, ..run.copy }, false);
                stored.keep(run.pages);
            }
        }
        // The locations are announced later.
        map.nothing_announced();
        Ok(())
    }

    /// Performs steps 2 to 4.
    pub(super) fn open_session(&mut self) -> Result<(), MigrationError> {
        self.connect()?;
        if self.strategy.needs_post_copy && self.report.demand_lanes == 0 {
            let why = "the destination cannot serve missing pages (no userfaultfd, or not permitted), or demand lanes are off";
            return Err(MigrationError::Blocked(why.into()));
        }
        if self.options.fail_safe.is_some() && self.peer.features & FEATURE_CHECKPOINTS == 0 {
            let why =
                "the destination cannot send checkpoints: its VMM does not support them, or post-copy is ruled out";
            return Err(MigrationError::Blocked(why.into()));
        }
        self.put_checkpoint()?;
        self.open_places()
    }

    /// Connects to the destination that the strategy names. If that fails, nothing has changed, and
    /// the strategy may connect again.
    pub(super) fn connect_to(&mut self, to: &Destination) -> Result<(), MigrationError> {
        self.check_over()?;
        if self.peer.control.is_some() {
            return Err(MigrationError::Blocked(format!("a destination is connected, so {to} cannot be")));
        }
        self.peer.elsewhere = self.way_to(to)?;
        if self.staging.is_some() {
            return self.begin_eviction();
        }
        let before = self.places.opened();
        let connected = self.open_session();
        if let Err(error) = &connected {
            self.leave_destination(error);
            self.close();
            self.inputs.forget_session();
            self.close_session(before);
        }
        connected
    }

    /// Returns the connector for `to`; `None` if `to` is the destination that the migration was
    /// started with.
    fn way_to(&self, to: &Destination) -> Result<Option<Arc<dyn Connector>>, MigrationError> {
        if self.staging.is_some() {
            return self.commanded_way(to).map(Some);
        }
        let unknown = |cause| MigrationError::link(to.name())(cause);
        match &self.options.destinations {
            Some(find) => find(to).map(Some).map_err(unknown),
            None if to.name() == self.peer.connector.address() => Ok(None),
            None => {
                let why = format!("no other destination than {} is known", self.peer.connector.address());
                Err(unknown(io::Error::new(io::ErrorKind::NotFound, why)))
            }
        }
    }

    /// Restores the state before the session, except that the session's epoch is void.
    fn close_session(&mut self, before: places::Opened) {
        self.forget_places_since(before);
        self.rounds.map().nothing_announced();
        self.peer = Peer::new(self.peer.connector);
        self.machine = SourceMachine::new(self.machine.epoch().saturating_add(1));
        self.report.epoch = self.machine.epoch();
        self.report.demand_lanes = 0;
        self.report.streams = self.options.streams.clamp(1, MAX_STREAMS);
        let mut requests = lock(&self.requests);
        requests.post_copy = Err(NoPostCopy::NotYet);
        requests.switch_over = Err(NoSwitchOver::NotYet);
    }

    /// Forgets the namespaces that had pages of the VM and that the destination was not told of
    /// (rule 14). The destination has the VM by then, and needs only the stores that it was told
    /// of.
    pub(super) fn forget_what_nobody_needs(&self) {
        let Some(stored) = self.rounds.stored() else { return };
        let unknown: Vec<u8> = (0..stored.memory.entries()).filter(|&entry| !self.places.is_known(entry)).collect();
        if unknown.is_empty() {
            return;
        }
        // The thread waits for a store that hangs, and the caller does not.
        let (memory, (ends, ended)) = (stored.memory.clone(), mpsc::channel());
        let body = Box::new(move || {
            let errors = unknown.into_iter().flat_map(|entry| memory.forget(entry));
            let errors = errors.map(|cause| Chain(&cause).to_string()).collect();
            // The engine may be gone.
            let _ = ends.send(errors);
        });
        let place = "the stores of the VM".to_owned();
        let what = match self.options.spawner.spawn(Role::Background, self.options.impact, "mig-forget", body) {
            Ok(joiner) => PlaceThread { place, joiner, ended }.end(Instant::now() + self.options.idle_timeout),
            Err(cause) => vec![format!("no thread forgets what is in {place}: {cause}")],
        };
        what.into_iter().for_each(|what| self.options.observer.event(&Event::Warning(what)));
    }
}
