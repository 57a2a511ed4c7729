//! What a swapper has done, and how the VM's memory stands.

use migration_core::{histogram::Latencies, working_set::ResidentLimit};

use super::{Swapper, bytes, lock};

/// What is counted.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) resident: u64,
    pub(super) working_set: Option<u64>,
    pub(super) limit_bytes: Option<u64>,
    pub(super) evicted: u64,
    pub(super) zeros: u64,
    pub(super) kept: u64,
    pub(super) refused: u64,
    pub(super) faults: u64,
    pub(super) fetched: u64,
    pub(super) failed_puts: u64,
    pub(super) failed_fetches: u64,
    pub(super) lost: u64,
    pub(super) fetch_latency: Latencies,
    pub(super) problem: Option<String>,
}

/// How the memory of a VM with a [`Swapper`] stands. Counts are those since the swapper was made.
#[derive(Clone, Debug)]
pub struct PagingStatus {
    /// The names of the stores of cold pages.
    pub stores: Vec<String>,
    /// The name of the source of references.
    pub references: &'static str,
    /// Bytes of RAM that were resident at the last step, pages on probation among them.
    pub resident_bytes: u64,
    /// Bytes that are only in the stores.
    pub cold_bytes: u64,
    /// The estimate of the working set in bytes; `None` unless the limit is automatic.
    pub working_set_bytes: Option<u64>,
    /// The limit of resident memory.
    pub limit: ResidentLimit,
    /// What the limit came to in bytes at the last step; `None` without a limit.
    pub limit_bytes: Option<u64>,
    /// Pages that were put into the stores and dropped.
    pub evicted_pages: u64,
    /// Pages of zeros that were dropped.
    pub zero_pages: u64,
    /// Pages that the guest has touched while they were on probation.
    pub kept_pages: u64,
    /// Pages that could not be taken out of the guest's reach: in use by the kernel or a device, or not
    /// populated.
    pub refused_pages: u64,
    /// Faults of pages in the stores.
    pub faults: u64,
    /// Pages that were fetched for faults, neighbours among them.
    pub fetched_pages: u64,
    /// Pages that somebody waits for at the moment.
    pub waiting_pages: u64,
    /// Pages that were only in a namespace of which a store has lost pages. Whoever touches one waits
    /// until a store has it: another one of the namespace, or this one again.
    pub lost_pages: u64,
    /// Puts that have failed.
    pub failed_puts: u64,
    /// Fetches that have failed, and were or will be repeated.
    pub failed_fetches: u64,
    /// How long it took from the first fault of a page until it was there.
    pub fetch_latency: Latencies,
    /// What went wrong last.
    pub problem: Option<String>,
}

impl Swapper {
    /// Returns how the VM's memory stands, and what was done so far.
    pub fn status(&self) -> PagingStatus {
        let references = lock(&self.references).name();
        let limit = self.limit();
        let waiting_pages = lock(&self.waiting).len() as u64;
        let cold = self.map.read(|map| map.in_store().len());
        let counters = lock(&self.counters);
        PagingStatus {
            stores: self.store_names.clone(),
            references,
            resident_bytes: bytes(counters.resident),
            cold_bytes: bytes(cold),
            working_set_bytes: counters.working_set,
            limit,
            limit_bytes: counters.limit_bytes,
            evicted_pages: counters.evicted,
            zero_pages: counters.zeros,
            kept_pages: counters.kept,
            refused_pages: counters.refused,
            faults: counters.faults,
            fetched_pages: counters.fetched,
            waiting_pages,
            lost_pages: counters.lost,
            failed_puts: counters.failed_puts,
            failed_fetches: counters.failed_fetches,
            fetch_latency: counters.fetch_latency.clone(),
            problem: counters.problem.clone(),
        }
    }
}
