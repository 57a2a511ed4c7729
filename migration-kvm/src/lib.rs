//! Live migration on Linux and KVM: guest RAM, dirty trackers, a pager, vCPU and VM state, threads.
//!
//! Everything here implements a trait of migration-core, and a VMM can replace each part by its
//! own. A VMM takes the parts that it lacks:
//! - [`ram`], if it does not map guest memory by itself (there is an adapter for vm-memory),
//! - a [`tracker`] that [`probe`] finds available,
//! - a [`pager`] for post-copy,
//! - a [`swapper`] that keeps cold pages of a running VM in a page store,
//! - [`state`] for its vCPUs, and threads that run them ([`vcpu`]),
//! - a [`spawner`] for threads with priorities,
//! - a [`fence`] for fail-safe post-copy on one host,
//! - a [`handover`] to a [`successor`] that replaces the VMM's process,
//! - [`lending`] for guests that leave their home for a while.
//!
//! Unsafe code is in named modules only, and each block has the reason why it is sound.
#![deny(unsafe_code)]

pub mod fence;
pub mod handover;
pub mod lending;
pub mod pager;
pub mod probe;
pub mod ram;
pub mod spawner;
pub mod state;
pub mod successor;
pub mod swapper;
#[cfg(test)]
mod testing;
pub mod tracker;
pub mod vcpu;

/// The example of `README.md`, which is run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
