//! Bounds of what a page store accepts from other processes.
//!
//! A store serves several users on several hosts. None of them may make it, or another user,
//! allocate without a limit.

use std::time::Duration;

use crate::PAGE_SIZE;

/// The largest number of bytes in one value. A value is a page of 4096 bytes, or what a wrapper has
/// made of one. The 64 bytes above a page leave room for a nonce and a tag (28 bytes).
pub const MAX_VALUE_BYTES: usize = PAGE_SIZE + 64;

/// The largest number of pages in one put or get: 16 MiB of guest RAM. It bounds the memory that a
/// request needs, and the time for which a store is busy with one request.
pub const MAX_RUN_PAGES: usize = 4096;

/// The largest number of namespaces in one store. A VM has a few of them, and a host has some
/// hundreds of VMs.
pub const MAX_NAMESPACES: usize = 4096;

/// The largest number of forgotten ids that one store remembers, each for one lease. It is above
/// [`MAX_NAMESPACES`] because a store can create and forget many namespaces within one lease.
pub const MAX_FORGOTTEN: usize = 65_536;

/// The longest lease. It bounds the time for which a forgotten id is remembered.
pub const MAX_LEASE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The time for which an id is remembered that is forgotten before the store has seen it. The
/// `create` of this id is then still on its way; no network delays a request for an hour.
pub const UNSEEN_LEASE: Duration = Duration::from_secs(3600);
