//! Page stores: where pages of a VM can be kept outside the RAM of its source and its destination.
//!
//! A store keeps pages for several users on several hosts. Its pages lie in *namespaces*. One
//! process, and no other, puts pages into a namespace, and others read them by namespace, page and
//! generation. The numbered rules that a store keeps are those of the design, see `docs/stores.md`.
//!
//! | to | see |
//! |---|---|
//! | use a store | [`PageStore`] |
//! | keep pages in memory | [`MemoryPageStore`] |
//! | limit the bandwidth of puts and prefetches | [`RateLimited`] |
//! | keep each page in several stores | [`Replicated`] |
//! | implement a store | [`check_put`], [`check_get`], [`check_lease`] and [`Trailer`] do what all stores have in common |
//! | test one's own store | `conformance`, with the feature `test-utils` |
//!
//! # Example
//!
//! ```
//! use std::time::{Duration, Instant};
//!
//! use migration_core::{
//!     PAGE_SIZE,
//!     store::{MemoryPageStore, Namespace, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, Urgency},
//!     vm::VmId,
//! };
//!
//! let store = MemoryPageStore::new("rack-7", 64 << 20);
//! // in earnest the name is random: `migration_crypto::random_namespace`
//! let record = Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7")? };
//! let namespace = Namespace::new([7; 16]).of(record.vm);
//! let lease = Duration::from_secs(60);
//! let incarnation = store.create(namespace.id, &record, lease)?;
//!
//! // the writer: generations of a namespace only grow
//! let stored = store.put(namespace, 1, &[PageToPut { page: 40, value: &[0x5a; PAGE_SIZE] }])?;
//! assert_eq!(stored.incarnation, incarnation); // nothing was lost meanwhile
//! assert_eq!(stored.taken, [true]);
//!
//! // a reader: it was told the namespace and the generation of each page
//! let wanted = [PageToGet { page: 40, generation: 1 }];
//! let deadline = Instant::now() + Duration::from_secs(5);
//! store.get(namespace, &wanted, Urgency::Fault, deadline, &mut |page, data| {
//!     assert_eq!((page, data.page()), (40, Some(&[0x5a; PAGE_SIZE])));
//! })?;
//!
//! store.forget(namespace)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod clock;
#[cfg(any(test, feature = "test-utils"))]
pub mod conformance;
mod error;
pub mod limits;
mod memory;
mod name;
mod rate_limited;
mod replicated;
mod value;
mod versions;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use clock::{Clock, ManualClock, ProcessClock};
pub use error::StoreError;
pub use memory::MemoryPageStore;
pub use name::{BadOwner, Incarnation, Namespace, NamespaceId, Owner, Purpose, Record, VmNamespace};
pub use rate_limited::{Pace, RateLimited};
pub use replicated::Replicated;
pub(crate) use replicated::share;
pub use value::{PageData, PageToGet, PageToPut, Stored, Trailer, Urgency, check_get, check_lease, check_put};
pub use versions::{MemoryVersions, PageContent, VersionStore, check_version_read, not_in_version};

use crate::vm_id::VmId;

/// Keeps pages for several users on several hosts.
///
/// Every implementation keeps these rules, which the conformance suite checks:
///
/// - Rule 3: a value is handed out only if VM, page, generation and checksum agree with its
///   trailer. Otherwise the page is missing. It is never zeros, and zeros are never put.
/// - Rule 8: no call asks a store who the owner of a VM is. The owner in a record is for people
///   only.
/// - Rule 9: a namespace keeps the newest put of each page and is forgotten as a whole.
/// - Rule 10: a put never replaces a newer generation. A put into a namespace that is absent fails
///   and never creates it. An id that was forgotten cannot be created again for one lease.
/// - Rule 11: `create`, `put` and `renew` return the present incarnation. A store of several servers
///   may have another one for each namespace.
/// - Rule 14: a lease that has ended deletes nothing. Whoever forgets, does so by a call.
/// - Rule 24: a namespace is written, read, renewed or forgotten only for the VM that its record
///   names. The store compares, so that no caller can forget to.
///
/// A call blocks until the store has answered. An implementation holds no lock while it calls
/// `take`, and bounds everything that comes from outside: see [`limits`].
pub trait PageStore: Send + Sync {
    /// Returns the name under which both sides have configured the store. It is never an address:
    /// no peer may make a host connect to where the peer likes.
    fn name(&self) -> &str;

    /// Returns about how many more bytes the store can take, the overhead of each page included. 0
    /// if it does not know.
    fn room(&self) -> u64;

    /// Learns the name of a namespace that this process is about to use, for the VM `vm`. A user of
    /// the store calls this before it creates, writes or reads the namespace.
    ///
    /// A store needs only ids: the default does nothing. A wrapper that seals pages derives the
    /// namespace's key from the name (rule 24). The call may be repeated with the same arguments.
    ///
    /// # Errors
    /// Returns [`StoreError::Occupied`] if the name was introduced for another VM, and
    /// [`StoreError::TooMany`] if too many names are known.
    fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
        let _ = (name, vm);
        Ok(())
    }

    /// Forgets the name of a namespace that this process does not use any more. The namespace itself
    /// stays in the store.
    fn dismiss(&self, namespace: NamespaceId) {
        let _ = namespace;
    }

    /// Creates a namespace. `record` says whose it is. Returns the present incarnation.
    ///
    /// A repeated call with the same VM and purpose succeeds and changes nothing but the lease,
    /// which it never shortens: the answer to the first call may have been lost.
    ///
    /// # Errors
    /// Returns [`StoreError::Forgotten`] if the id was forgotten, [`StoreError::Occupied`] if the
    /// namespace exists with another VM or purpose, [`StoreError::TooMany`],
    /// [`StoreError::BadLease`], or what the store's medium says.
    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError>;

    /// Lets the lease end no earlier than `lease` from now, and records `owner` as who answers for
    /// the namespace. Returns the present incarnation. A lease that has ended can be renewed.
    ///
    /// # Errors
    /// Returns [`StoreError::Absent`] if there is no such namespace, which counts as a changed
    /// incarnation; [`StoreError::OtherVm`], [`StoreError::BadLease`], or what the store's medium
    /// says.
    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError>;

    /// Puts pages, which ascend by page number, under one generation.
    ///
    /// A page of which the namespace has a newer generation stays as it is; [`Stored::taken`] says
    /// which. For each page the comparison and the replacement are one step. A put of the
    /// generation that is already there is a repetition, and counts as taken.
    ///
    /// # Errors
    /// Returns [`StoreError::Absent`] if there is no such namespace: nothing is created then.
    /// Returns [`StoreError::OtherVm`] if it is of another VM. Returns [`StoreError::NoRoom`] if
    /// nothing was stored for lack of room, and the errors of [`check_put`]. After any other error
    /// the outcome is unknown: each of the pages may have been stored. The caller then repeats the
    /// put under a new generation.
    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError>;

    /// Reads pages, which ascend by page number, and hands each of them to `take` once, in any
    /// order. A page that is not there in the wanted generation is left out.
    ///
    /// # Errors
    /// Returns [`StoreError::Missing`] if pages were left out, after all others were handed out;
    /// [`StoreError::Absent`] if there is no such namespace; [`StoreError::OtherVm`] if it is of
    /// another VM; [`StoreError::TimedOut`] if `deadline` has passed; the errors of [`check_get`],
    /// or what the store's medium says. What was handed out before an error is good.
    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError>;

    /// Returns whose the namespace is, or `None` if the store has no such namespace.
    ///
    /// # Errors
    /// Returns what the store's medium says.
    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError>;

    /// Removes a namespace with all its pages, and remembers its id for one lease. An id that the
    /// store does not know is remembered too, for [`limits::UNSEEN_LEASE`]: its `create` may still
    /// be on its way.
    ///
    /// # Errors
    /// Returns [`StoreError::OtherVm`] if the namespace is of another VM, and removes nothing then.
    /// Returns [`StoreError::TooMany`] if too many ids are remembered, or what the store's medium
    /// says. The namespace may then still be there.
    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError>;

    /// Returns the namespaces whose lease has ended, in ascending order, with their records. They
    /// stay until somebody forgets them.
    ///
    /// # Errors
    /// Returns what the store's medium says.
    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError>;
}

/// Compiles and runs the example of that page.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/stores.md")]
struct StoresPage;

macro_rules! forward_to_inner {
    ($($inner:ty),*) => {$(
        impl<S: PageStore + ?Sized> PageStore for $inner {
            fn name(&self) -> &str {
                (**self).name()
            }

            fn room(&self) -> u64 {
                (**self).room()
            }

            fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
                (**self).introduce(name, vm)
            }

            fn dismiss(&self, namespace: NamespaceId) {
                (**self).dismiss(namespace);
            }

            fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
                (**self).create(id, record, lease)
            }

            fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
                (**self).renew(of, owner, lease)
            }

            fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
                (**self).put(of, generation, pages)
            }

            fn get(
                &self,
                of: VmNamespace,
                pages: &[PageToGet],
                urgency: Urgency,
                deadline: Instant,
                take: &mut dyn FnMut(u64, PageData<'_>),
            ) -> Result<(), StoreError> {
                (**self).get(of, pages, urgency, deadline, take)
            }

            fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
                (**self).record(id)
            }

            fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
                (**self).forget(of)
            }

            fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
                (**self).expired()
            }
        }
    )*};
}

forward_to_inner!(&S, Box<S>, Arc<S>);
