//! Page stores, in which pages of a VM can be kept outside the RAM of its source and its
//! destination.
//!
//! A store keeps pages for several users on several hosts. Its pages are in *namespaces*. One
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

/// A store of pages for several users on several hosts.
///
/// Every implementation keeps these rules, which the conformance suite checks:
///
/// - Rule 3: a value is returned only if VM, page, generation and checksum agree with its trailer.
///   Otherwise the page is missing. A missing page is never returned as zeros, and zeros are never
///   put.
/// - Rule 8: no call depends on who the owner of a VM is. The owner in a record is only information
///   for people.
/// - Rule 9: a namespace keeps the newest put of each page and is forgotten as a whole.
/// - Rule 10: a put never replaces a newer generation. A put into a namespace that is absent fails
///   and never creates it. An id that was forgotten cannot be created again for one lease.
/// - Rule 11: `create`, `put` and `renew` return the present incarnation. A store of several
///   servers may have another incarnation for each namespace.
/// - Rule 14: the end of a lease deletes nothing. A namespace is deleted only by a call of
///   `forget`.
/// - Rule 24: a namespace is written, read, renewed or forgotten only for the VM that its record
///   names. The store compares the VMs, so no caller can forget to do so.
///
/// A call blocks until the store has answered. An implementation holds no lock while it calls
/// `take`, and bounds all input from other processes: see [`limits`].
pub trait PageStore: Send + Sync {
    /// Returns the name under which both sides have configured the store. It is never an address: a
    /// peer must not be able to make a host connect to an address that the peer chooses.
    fn name(&self) -> &str;

    /// Returns the approximate number of bytes that the store can still accept, including the
    /// overhead of each page. Returns 0 if the store does not know.
    fn room(&self) -> u64;

    /// Introduces a namespace that this process is about to use for the VM `vm`. A user of the
    /// store calls this before it creates, writes or reads the namespace.
    ///
    /// A store needs only ids, so the default does nothing. A wrapper that seals pages derives the
    /// namespace's key from the name (rule 24). The call may be repeated with the same arguments.
    ///
    /// # Errors
    /// Returns [`StoreError::Occupied`] if the name was introduced for another VM, and
    /// [`StoreError::TooMany`] if too many names are known.
    fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
        let _ = (name, vm);
        Ok(())
    }

    /// Removes the name of a namespace that this process does not use any more. The namespace
    /// itself stays in the store.
    fn dismiss(&self, namespace: NamespaceId) {
        let _ = namespace;
    }

    /// Creates a namespace for the VM and the purpose of `record`. Returns the present incarnation.
    ///
    /// A repeated call with the same VM and purpose succeeds, because the answer to the first call
    /// may have been lost. It changes nothing but the lease, which it never shortens.
    ///
    /// # Errors
    /// Returns [`StoreError::Forgotten`] if the id was forgotten, [`StoreError::Occupied`] if the
    /// namespace exists with another VM or purpose, [`StoreError::TooMany`] if the store has too
    /// many namespaces, [`StoreError::BadLease`], or an error of the store's medium.
    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError>;

    /// Extends the lease so that it ends no earlier than `lease` from now, and records `owner` as
    /// responsible for the namespace. Returns the present incarnation. A lease that has ended can
    /// be renewed.
    ///
    /// # Errors
    /// Returns [`StoreError::Absent`] if there is no such namespace, which counts as a changed
    /// incarnation; [`StoreError::OtherVm`], [`StoreError::BadLease`], or an error of the store's
    /// medium.
    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError>;

    /// Puts pages under one generation. The pages must ascend by page number.
    ///
    /// A page of which the namespace has a newer generation does not change; [`Stored::taken`]
    /// reports these pages. For each page the comparison and the replacement are one atomic step. A
    /// put of the generation that is already there is a repetition, and counts as taken.
    ///
    /// # Errors
    /// Returns [`StoreError::Absent`] if there is no such namespace; nothing is created then.
    /// Returns [`StoreError::OtherVm`] if the namespace belongs to another VM. Returns
    /// [`StoreError::NoRoom`] if nothing was stored for lack of room, and the errors of
    /// [`check_put`]. After any other error the outcome is unknown: each of the pages may have been
    /// stored. The caller then repeats the put under a new generation.
    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError>;

    /// Reads pages, and passes each of them to `take` once, in any order. `pages` must ascend by
    /// page number. A page that the store does not have in the requested generation is left out.
    ///
    /// # Errors
    /// Returns [`StoreError::Missing`] if pages were left out, after all others were passed to
    /// `take`; [`StoreError::Absent`] if there is no such namespace; [`StoreError::OtherVm`] if it
    /// belongs to another VM; [`StoreError::TimedOut`] if `deadline` has passed; the errors of
    /// [`check_get`], or an error of the store's medium. Pages that were passed to `take` before an
    /// error are valid.
    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError>;

    /// Returns the record of the namespace, or `None` if the store has no such namespace.
    ///
    /// # Errors
    /// Returns an error of the store's medium.
    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError>;

    /// Removes a namespace with all its pages, and remembers its id for one lease. An id that the
    /// store does not know is remembered too, for [`limits::UNSEEN_LEASE`]: its `create` may still
    /// be on its way.
    ///
    /// # Errors
    /// Returns [`StoreError::OtherVm`] if the namespace belongs to another VM, and removes nothing
    /// then. Returns [`StoreError::TooMany`] if too many ids are remembered, or an error of the
    /// store's medium. The namespace may then still be there.
    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError>;

    /// Returns the namespaces whose lease has ended, in ascending order, with their records. They
    /// stay until they are forgotten.
    ///
    /// # Errors
    /// Returns an error of the store's medium.
    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError>;
}

/// Compiles and runs the example of the page `docs/stores.md`.
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
