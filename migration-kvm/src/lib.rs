//! Live migration on Linux and KVM: guest RAM, dirty trackers, a pager, vCPU and VM state, threads.
//!
//! Everything here implements a trait of migration-core, and can be replaced by a VMM's own. A VMM takes what it lacks:
//! [`ram`] if it does not map guest memory by itself (or an adapter for vm-memory), a [`tracker`] that [`probe`] finds
//! available, a [`pager`] for post-copy, [`state`] for its vCPUs, threads that run them ([`vcpu`]), [`spawner`] for
//! threads with priorities, and a [`fence`] for fail-safe post-copy on one host.
//!
//! Unsafe code lives in named modules only; each block argues why it is sound.
#![deny(unsafe_code)]

pub mod fence;
pub mod pager;
pub mod probe;
pub mod ram;
pub mod refresh;
pub mod spawner;
pub mod state;
pub mod tracker;
pub mod vcpu;
