//! The threads that talk to page stores, one for each place. A store may be slow, and the engine
//! continues meanwhile.

use std::{
    sync::{Arc, Mutex, Weak, mpsc},
    time::{Duration, Instant},
};

use crate::{
    MigrationError, PageRange, PageSet,
    engine::{handle::Input, pages::Copied},
    lock::lock,
    page_map::StoreCopy,
    paged_memory::EntryStore,
    ram::GuestRam,
    spawner::Joiner,
    store::{Incarnation, Namespace, PageStore, PageToPut, Record, StoreError},
    text::Chain,
    tracker::{Rearm, TrackerError},
};

/// A job for the thread of a place.
pub(super) enum Job {
    /// Creates a namespace in all stores of the place, and forgets the namespace `lost`, whose
    /// pages the stores have lost.
    Open {
        namespace: Namespace,
        lost: Option<Namespace>,
    },
    Put(PutJob),
    /// Renews the lease of the namespace, and finds out whether the stores have lost pages.
    Renew,
    /// Forgets namespaces that are not needed any more. This is the last job.
    Forget(Vec<Namespace>),
}

/// Pages to put into the stores of a place.
pub(super) struct PutJob {
    pub(super) run: PageRange,
    pub(super) copy: StoreCopy,
    pub(super) rearm: Option<Arc<dyn Rearm>>,
}

/// The result of a job of a place's thread.
pub(in crate::engine) struct PlaceDone {
    /// The number of the place.
    pub(super) place: usize,
    pub(super) what: JobDone,
}

/// How a job has ended.
pub(super) enum JobDone {
    /// The namespace was created in these stores, which have these incarnations.
    Opened(Result<Vec<EntryStore>, PutFailure>),
    Put {
        run: PageRange,
        copy: StoreCopy,
        result: Result<PutPages, PutFailure>,
    },
    Renewed(Result<(), PutFailure>),
}

/// The pages of a put that has succeeded.
pub(super) struct PutPages {
    /// Pages that all stores have.
    pub(super) stored: Vec<PageRange>,
    /// Pages that hold zeros, which go to no store.
    pub(super) zeros: Vec<PageRange>,
}

/// Why a job has failed.
pub(super) enum PutFailure {
    /// A failure on this host: a page could not be read, or there is no room in the table.
    Here(MigrationError),
    /// A failure of a store. Without a cause, the store has lost the pages that it had.
    Store { name: String, cause: Option<StoreError> },
}

impl PutFailure {
    /// Returns whether the pages that were put before are lost, too.
    pub(super) fn is_loss(&self) -> bool {
        use StoreError::{Absent, Forgotten, Occupied};
        matches!(self, Self::Store { cause: None | Some(Absent(_) | Forgotten(_) | Occupied(_)), .. })
    }

    pub(super) fn into_error(self) -> MigrationError {
        match self {
            Self::Here(error) => error,
            Self::Store { name, cause: Some(cause) } => MigrationError::page_store(&name)(cause),
            Self::Store { name, cause: None } => MigrationError::Blocked(format!("page store {name} has lost pages")),
        }
    }
}

/// A gate that lets the threads of places re-arm pages until the tracker is given back to the VMM.
/// A put that is late must not re-arm pages that the VMM has to find dirty.
#[derive(Default)]
pub(super) struct RearmGate {
    closed: Mutex<bool>,
}

impl RearmGate {
    /// Returns a [`Rearm`] that re-arms pages by `rearm` until the gate is closed.
    pub(super) fn pass(self: &Arc<Self>, rearm: Arc<dyn Rearm>) -> Arc<dyn Rearm> {
        Arc::new(Gated { gate: self.clone(), rearm })
    }

    /// Closes the gate. Waits for a call that is re-arming pages at this moment. No page is
    /// re-armed afterwards.
    pub(super) fn close(&self) {
        *lock(&self.closed) = true;
    }
}

struct Gated {
    gate: Arc<RearmGate>,
    rearm: Arc<dyn Rearm>,
}

impl Rearm for Gated {
    fn before_read(&self, range: PageRange, pages: &PageSet) -> Result<(), TrackerError> {
        let closed = lock(&self.gate.closed);
        if *closed {
            return Err(TrackerError::new("of a put", "the migration has ended"));
        }
        self.rearm.before_read(range, pages)
    }
}

/// A handle of the engine to a thread that waits for page stores.
pub(super) struct PlaceThread {
    /// A description of these stores, for messages.
    pub(super) place: String,
    pub(super) joiner: Box<dyn Joiner>,
    /// Receives a message when the thread is about to end: the errors of forgetting namespaces.
    pub(super) ended: mpsc::Receiver<Vec<String>>,
}

impl PlaceThread {
    /// Waits until the thread has ended, but not beyond `deadline`. A thread whose store hangs is
    /// not waited for any longer: it ends when the store answers. Returns warnings for the user.
    pub(super) fn end(self, deadline: Instant) -> Vec<String> {
        let left = deadline.saturating_duration_since(Instant::now());
        let errors = match self.ended.recv_timeout(left) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let place = self.place;
                let what = format!("{place}: a store does not answer; what was put stays until it does");
                return vec![what];
            }
            Ok(errors) => errors,
            Err(mpsc::RecvTimeoutError::Disconnected) => Vec::new(),
        };
        self.joiner.join();
        errors.iter().map(|error| format!("what was put stays until its lease ends: {error}")).collect()
    }
}

/// Executes the jobs of one place, on a thread of its own.
pub(super) struct Putter {
    pub(super) place: usize,
    /// RAM, as long as the migration lasts. The reference is weak, because a store that hangs must
    /// not keep RAM allocated.
    pub(super) ram: Weak<dyn GuestRam>,
    pub(super) record: Record,
    pub(super) lease: Duration,
    pub(super) stores: Vec<Arc<dyn PageStore>>,
    /// The namespace that was created last, and the incarnations that the stores had then.
    pub(super) namespace: Namespace,
    pub(super) incarnations: Vec<Incarnation>,
}

impl Putter {
    pub(super) fn run(
        mut self,
        jobs: mpsc::Receiver<Job>,
        inputs: mpsc::Sender<Input>,
        ends: mpsc::Sender<Vec<String>>,
    ) {
        let mut errors = Vec::new();
        while let Ok(job) = jobs.recv() {
            let what = match job {
                Job::Open { namespace, lost } => JobDone::Opened(self.open(namespace, lost)),
                Job::Put(job) => JobDone::Put { run: job.run, copy: job.copy, result: self.put(&job) },
                Job::Renew => JobDone::Renewed(self.renew()),
                Job::Forget(namespaces) => {
                    errors.extend(self.forget(&namespaces));
                    continue;
                }
            };
            // The engine may be gone, because the migration is over. The last job comes next then.
            let _ = inputs.send(Input::Place(PlaceDone { place: self.place, what }));
        }
        self.stores.iter().for_each(|store| store.dismiss(self.namespace.id()));
        // The engine may be gone.
        let _ = ends.send(errors);
    }

    /// Forgets namespaces in all stores. Returns descriptions of the failures.
    fn forget(&self, namespaces: &[Namespace]) -> Vec<String> {
        let mut errors = Vec::new();
        for namespace in namespaces {
            for store in &self.stores {
                let forgotten = store.forget(namespace.of(self.record.vm));
                let failed = forgotten.map_err(MigrationError::page_store(store.name())).err();
                errors.extend(failed.map(|error| Chain(&error).to_string()));
            }
        }
        errors
    }

    /// Creates the namespace in all stores.
    fn open(&mut self, namespace: Namespace, lost: Option<Namespace>) -> Result<Vec<EntryStore>, PutFailure> {
        self.namespace = namespace;
        self.incarnations.clear();
        let mut created = Vec::new();
        for store in &self.stores {
            let name = store.name().to_owned();
            let introduced = store.introduce(&self.namespace, self.record.vm);
            match introduced.and_then(|()| store.create(self.namespace.id(), &self.record, self.lease)) {
                Ok(incarnation) => created.push(EntryStore { name, incarnation }),
                Err(cause) => return Err(PutFailure::Store { name, cause: Some(cause) }),
            }
        }
        self.incarnations = created.iter().map(|store| store.incarnation).collect();
        if let Some(lost) = lost {
            // A store that has lost the namespace may be unable to forget it. Its lease ends in any
            // case.
            self.stores.iter().for_each(|store| drop(store.forget(lost.of(self.record.vm))));
        }
        Ok(created)
    }

    /// Puts the pages into all stores.
    fn put(&self, job: &PutJob) -> Result<PutPages, PutFailure> {
        let copied = self.copy(job).map_err(PutFailure::Here)?;
        let zeros = copied.pages().filter(|(_, data)| data.is_none()).map(|(page, _)| page);
        let zeros = PageRange::runs_of(zeros);
        let pages: Vec<_> = copied.pages().filter_map(|(page, data)| Some(PageToPut { page, value: data? })).collect();
        if pages.is_empty() {
            return Ok(PutPages { stored: Vec::new(), zeros });
        }
        let mut taken = vec![true; pages.len()];
        for (store, incarnation) in self.stores.iter().zip(&self.incarnations) {
            let failure = |cause| PutFailure::Store { name: store.name().to_owned(), cause };
            let put = store.put(self.namespace.of(self.record.vm), job.copy.generation, &pages);
            let stored = put.map_err(|cause| failure(Some(cause)))?;
            if stored.incarnation != *incarnation {
                // The pages that were put before may be gone (rule 11).
                return Err(failure(None));
            }
            taken.iter_mut().zip(stored.taken).for_each(|(all, this)| *all &= this);
        }
        let stored = pages.iter().zip(taken).filter(|(_, taken)| *taken);
        Ok(PutPages { stored: PageRange::runs_of(stored.map(|(page, _)| page.page)), zeros })
    }

    /// Copies the pages. Without a copy, the guest could write a page between two reads of it.
    fn copy(&self, job: &PutJob) -> Result<Copied, MigrationError> {
        let over = || MigrationError::GaveUp("the migration has ended".into());
        let ram = self.ram.upgrade().ok_or_else(over)?;
        let mut wanted = PageSet::empty(ram.layout().pages());
        wanted.insert_range(job.run);
        let mut copied = Copied::default();
        copied.take(&*ram, &wanted, job.rearm.as_deref())?;
        Ok(copied)
    }

    /// Renews the lease in all stores.
    fn renew(&self) -> Result<(), PutFailure> {
        for (store, incarnation) in self.stores.iter().zip(&self.incarnations) {
            let failure = |cause| PutFailure::Store { name: store.name().to_owned(), cause };
            let renewed = store.renew(self.namespace.of(self.record.vm), self.record.owner, self.lease);
            if renewed.map_err(|cause| failure(Some(cause)))? != *incarnation {
                return Err(failure(None));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pages::tests::Noted;

    #[test]
    fn a_put_that_is_late_re_arms_nothing() {
        let (gate, noted) = (Arc::<RearmGate>::default(), Arc::<Noted>::default());
        let rearm = gate.pass(noted.clone());
        let (range, pages) = (PageRange::new(0, 4), PageSet::full(4));
        rearm.before_read(range, &pages).unwrap();
        gate.close();
        let late = rearm.before_read(range, &pages).unwrap_err();
        assert!(late.to_string().contains("the migration has ended"), "{late}");
        assert_eq!(*noted.0.lock().unwrap(), [range]);
    }
}
