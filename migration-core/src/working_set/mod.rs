//! How much of a VM's RAM has to be resident, and which pages need not be: decisions without I/O.
//!
//! | to | see |
//! |---|---|
//! | estimate the working set of a VM from what it swaps | [`WorkingSetEstimator`] |
//! | turn a limit, set by hand or by the estimate, into pages to evict | [`LimitPolicy`] |
//! | know which pages were not referenced for longest | [`Ages`] |
//!
//! The swapper of migration-kvm joins the three with a VM's memory. See `docs/agile.md`.

mod ages;
mod estimator;
mod limit;

pub use ages::Ages;
pub use estimator::{Adjustment, EstimatorOptions, WorkingSetEstimator};
pub use limit::{BadLimit, LimitPolicy, ResidentLimit};
