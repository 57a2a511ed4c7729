//! How a page store fails.

use std::{
    io::{self, ErrorKind},
    time::Duration,
};

use thiserror::Error;

use super::{
    limits::{MAX_LEASE, MAX_RUN_PAGES, MAX_VALUE_BYTES},
    name::NamespaceId,
};

/// Why a page store did not do what it was asked.
///
/// What it displays does not repeat its cause: print the chain of
/// [`source`](std::error::Error::source)s. [`can_retry`](Self::can_retry) says whether the same
/// call can succeed later by itself.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store has no such namespace: it was never created, was forgotten, or was lost. The
    /// caller treats all pages of the namespace as lost in this store.
    #[error("the store has no namespace {0}")]
    Absent(NamespaceId),
    /// The namespace was forgotten, and cannot be created again. Make another name.
    #[error("namespace {0} was forgotten: it cannot be created again")]
    Forgotten(NamespaceId),
    /// The namespace exists, and is of another VM or for another purpose. Make another name.
    #[error("namespace {0} exists, and belongs to something else")]
    Occupied(NamespaceId),
    /// The namespace's record names another VM than the caller's (rule 24). Nothing was done. The
    /// caller treats whoever has named the namespace as hostile.
    #[error("namespace {0} is of another VM")]
    OtherVm(NamespaceId),
    /// The store was made with another choice than the one that it is opened with. Open it as its
    /// other users do.
    #[error("{store} was made {made}, and is opened {opened}")]
    OtherOptions {
        /// The store.
        store: String,
        /// What was chosen when it was made.
        made: &'static str,
        /// What is chosen now.
        opened: &'static str,
    },
    /// Some of the pages are not in the store in this generation. The others were handed out. The
    /// caller asks the next store that has the pages.
    #[error("{count} pages of namespace {namespace} are missing, the first of them is page {first}")]
    Missing {
        /// The namespace.
        namespace: NamespaceId,
        /// How many pages are missing.
        count: u64,
        /// The lowest number of a missing page.
        first: u64,
    },
    /// There is not enough room for the put, none of which was stored. Put the pages elsewhere.
    #[error("the store has room for {room} bytes, and {needed} are needed")]
    NoRoom {
        /// Bytes that the put needs.
        needed: u64,
        /// Bytes that the store has.
        room: u64,
    },
    /// The store keeps as many of these as it may.
    #[error("the store has {limit} {what} already, the most that it keeps")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many are kept.
        limit: usize,
    },
    /// More pages than a put or get may have, or the pages do not ascend.
    #[error("a request is for 1 to {MAX_RUN_PAGES} pages in strictly ascending order, not {0}")]
    BadRun(String),
    /// A value is empty or larger than a store takes.
    #[error("a value of {len} bytes for page {page}: a value has 1 to {MAX_VALUE_BYTES}")]
    BadValue {
        /// The page.
        page: u64,
        /// Length of the value in bytes.
        len: usize,
    },
    /// The value has nothing but zeros. Zero pages never go to a store (rule 3).
    #[error("page {0} has only zeros: its location is Zero, and it does not go to a store")]
    Zeros(u64),
    /// The lease is zero or too long.
    #[error("a lease of {0:?}: a lease is above zero, and at most {MAX_LEASE:?}")]
    BadLease(Duration),
    /// This wrapper was not given the name of the namespace, or not for this VM, and so has no key
    /// for it.
    #[error("there is no key for namespace {0}: its name is not known here, or it is of another VM")]
    NoKey(NamespaceId),
    /// A value could not be sealed.
    #[error("page {page} cannot be sealed")]
    Seal {
        /// The page.
        page: u64,
        /// Why not.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The deadline has passed. Pages that were handed out before are good.
    #[error("the store did not answer before the deadline")]
    TimedOut,
    /// What the store keeps makes no sense: it is damaged, or something else has written it.
    #[error("{what} is damaged")]
    Damaged {
        /// What is damaged, with its file if it has one.
        what: String,
        /// What is wrong with it.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store, or the way to it, failed.
    #[error("the store failed: {step}")]
    Io {
        /// What was tried, with the file or the address.
        step: String,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
}

impl StoreError {
    /// Concludes a `get` that has left these pages out: [`Missing`](Self::Missing), unless there
    /// are none.
    ///
    /// # Errors
    /// Returns [`StoreError::Missing`].
    pub fn left_out(namespace: NamespaceId, pages: impl IntoIterator<Item = u64>) -> Result<(), Self> {
        let mut pages = pages.into_iter();
        let Some(first) = pages.next() else { return Ok(()) };
        let (count, first) = pages.fold((1, first), |(count, lowest), page| (count + 1, lowest.min(page)));
        Err(Self::Missing { namespace, count, first })
    }

    /// Returns whether the same call can succeed later without anybody's action: the store did not
    /// answer, or the connection was lost. A put whose outcome is unknown must be repeated under a
    /// new generation.
    pub fn can_retry(&self) -> bool {
        match self {
            Self::TimedOut => true,
            Self::Io { cause, .. } => matches!(
                cause.kind(),
                ErrorKind::Interrupted
                    | ErrorKind::TimedOut
                    | ErrorKind::WouldBlock
                    | ErrorKind::ConnectionRefused
                    | ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::NotConnected
                    | ErrorKind::BrokenPipe
                    | ErrorKind::UnexpectedEof
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
                    | ErrorKind::NetworkDown
                    | ErrorKind::ResourceBusy
                    | ErrorKind::StaleNetworkFileHandle
            ),
            _ => false,
        }
    }

    /// Returns a function that makes an error of an I/O error. `step` says what was tried.
    pub fn io(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { step: step.into(), cause }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_cause_is_in_the_chain_and_is_not_printed_twice() {
        let error = StoreError::io("reading /pages")(io::Error::new(ErrorKind::ConnectionReset, "the peer is gone"));
        assert_eq!(error.to_string(), "the store failed: reading /pages");
        assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("the peer is gone"));
    }

    #[test]
    fn errors_say_whether_a_retry_can_help() {
        let id = NamespaceId([1; 16]);
        for lost in [ErrorKind::ConnectionReset, ErrorKind::TimedOut, ErrorKind::UnexpectedEof] {
            assert!(StoreError::io("x")(lost.into()).can_retry(), "{lost}");
        }
        for firm in [ErrorKind::PermissionDenied, ErrorKind::NotFound, ErrorKind::StorageFull] {
            assert!(!StoreError::io("x")(firm.into()).can_retry(), "{firm}");
        }
        assert!(StoreError::TimedOut.can_retry());
        let firm = [
            StoreError::Absent(id),
            StoreError::Forgotten(id),
            StoreError::OtherVm(id),
            StoreError::Missing { namespace: id, count: 1, first: 0 },
            StoreError::NoRoom { needed: 2, room: 1 },
            StoreError::Zeros(3),
        ];
        assert!(firm.iter().all(|error| !error.can_retry()));
    }
}
