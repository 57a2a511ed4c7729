//! Threads that talk to page stores, one for each place: a store may take its time, and the engine
//! goes on meanwhile.

use std::sync::{Arc, Mutex, mpsc};

use crate::{
    MigrationError, PageRange, PageSet,
    engine::{handle::Input, pages::Copied},
    lock::lock,
    page_map::StoreCopy,
    paged_memory::EntryStore,
    ram::GuestRam,
    store::{Incarnation, Namespace, PageStore, PageToPut, Record, StoreError},
    tracker::{Rearm, TrackerError},
};

/// What the thread of a place is to do.
pub(super) enum Job {
    /// Creates a namespace in all stores of the place. One that was lost there is forgotten.
    Open {
        namespace: Namespace,
        lost: Option<Namespace>,
    },
    Put(PutJob),
    /// Renews the lease of the namespace, and finds out whether the stores have lost anything.
    Renew,
}

/// Pages for a place.
pub(super) struct PutJob {
    pub(super) run: PageRange,
    pub(super) copy: StoreCopy,
    pub(super) rearm: Option<Arc<dyn Rearm>>,
}

/// What the thread of a place has done.
pub(in crate::engine) struct PlaceDone {
    /// The number of the place.
    pub(super) place: usize,
    pub(super) what: JobDone,
}

/// How a job has ended.
pub(super) enum JobDone {
    /// The namespace was created: the stores, with their incarnations.
    Opened(Result<Vec<EntryStore>, PutFailure>),
    Put {
        run: PageRange,
        copy: StoreCopy,
        result: Result<PutPages, PutFailure>,
    },
    Renewed(Result<(), PutFailure>),
}

/// Pages of a put that has succeeded.
pub(super) struct PutPages {
    /// Those that all stores have.
    pub(super) stored: Vec<PageRange>,
    /// Those that hold zeros, which go to no store.
    pub(super) zeros: Vec<PageRange>,
}

/// Why a job has failed.
pub(super) enum PutFailure {
    /// Something here has failed: a page could not be read, or there is no room in the table.
    Here(MigrationError),
    /// A store has failed. Without a cause, it has lost what it had.
    Store { name: String, cause: Option<StoreError> },
}

impl PutFailure {
    /// Whether what was put before is lost, too.
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

/// Lets the threads of places re-arm pages until the tracker is given back to the VMM. A put that is
/// late must not re-arm pages that the VMM is to find dirty.
#[derive(Default)]
pub(super) struct RearmGate {
    closed: Mutex<bool>,
}

impl RearmGate {
    /// Returns what re-arms pages by `rearm` until the gate is closed.
    pub(super) fn pass(self: &Arc<Self>, rearm: Arc<dyn Rearm>) -> Arc<dyn Rearm> {
        Arc::new(Gated { gate: self.clone(), rearm })
    }

    /// Waits for who re-arms pages at this moment. Nobody does afterwards.
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

/// Does the jobs of one place, on a thread of its own.
pub(super) struct Putter {
    pub(super) place: usize,
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) record: Record,
    pub(super) lease: std::time::Duration,
    pub(super) stores: Vec<Arc<dyn PageStore>>,
    /// The namespace that was created last, and the incarnations that the stores had then.
    pub(super) namespace: Namespace,
    pub(super) incarnations: Vec<Incarnation>,
}

impl Putter {
    pub(super) fn run(mut self, jobs: mpsc::Receiver<Job>, inputs: mpsc::Sender<Input>) {
        while let Ok(job) = jobs.recv() {
            let what = match job {
                Job::Open { namespace, lost } => JobDone::Opened(self.open(namespace, lost)),
                Job::Put(job) => JobDone::Put { run: job.run, copy: job.copy, result: self.put(&job) },
                Job::Renew => JobDone::Renewed(self.renew()),
            };
            // the engine may be gone: the migration is over
            if inputs.send(Input::Place(PlaceDone { place: self.place, what })).is_err() {
                return;
            }
        }
    }

    /// Creates the namespace in all stores.
    fn open(&mut self, namespace: Namespace, lost: Option<Namespace>) -> Result<Vec<EntryStore>, PutFailure> {
        self.namespace = namespace;
        self.incarnations.clear();
        let mut created = Vec::new();
        for store in &self.stores {
            let name = store.name().to_owned();
            match store.create(self.namespace.id(), &self.record, self.lease) {
                Ok(incarnation) => created.push(EntryStore { name, incarnation }),
                Err(cause) => return Err(PutFailure::Store { name, cause: Some(cause) }),
            }
        }
        self.incarnations = created.iter().map(|store| store.incarnation).collect();
        if let Some(lost) = lost {
            // a store that has lost it need not be able to; its lease ends
            self.stores.iter().for_each(|store| drop(store.forget(lost.of(self.record.vm))));
        }
        Ok(created)
    }

    /// Puts the pages into all stores.
    fn put(&self, job: &PutJob) -> Result<PutPages, PutFailure> {
        let mut wanted = PageSet::empty(self.ram.layout().pages());
        wanted.insert_range(job.run);
        // a copy: the guest may write between two looks
        let mut copied = Copied::default();
        copied.take(&*self.ram, &wanted, job.rearm.as_deref()).map_err(PutFailure::Here)?;
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
                // what was put before may be gone (rule 11)
                return Err(failure(None));
            }
            taken.iter_mut().zip(stored.taken).for_each(|(all, this)| *all &= this);
        }
        let stored = pages.iter().zip(taken).filter(|(_, taken)| *taken);
        Ok(PutPages { stored: PageRange::runs_of(stored.map(|(page, _)| page.page)), zeros })
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
