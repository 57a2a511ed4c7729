//! The errors of page stores.

use std::{
    io::{self, ErrorKind},
    time::Duration,
};

use thiserror::Error;

use super::{
    limits::{MAX_LEASE, MAX_RUN_PAGES, MAX_VALUE_BYTES},
    name::NamespaceId,
};

/// The reason why a page store did not carry out a call.
///
/// The displayed text does not include the cause: print the chain of
/// [`source`](std::error::Error::source)s. [`can_retry`](Self::can_retry) says whether the same
/// call can succeed later without any action.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store has no such namespace: it was never created, was forgotten, or was lost. The
    /// caller treats all pages of the namespace as lost in this store.
    #[error("the store has no namespace {0}")]
    Absent(NamespaceId),
    /// The namespace was forgotten, and cannot be created again. Use another name.
    #[error("namespace {0} was forgotten: it cannot be created again")]
    Forgotten(NamespaceId),
    /// The namespace exists, and belongs to another VM or has another purpose. Use another name.
    #[error("namespace {0} exists, and belongs to something else")]
    Occupied(NamespaceId),
    /// The namespace's record names another VM than the caller's (rule 24). Nothing was done. The
    /// caller treats the peer that has named the namespace as hostile.
    #[error("namespace {0} is of another VM")]
    OtherVm(NamespaceId),
    /// The store was made with an option that differs from the one with which it is opened. Open it
    /// with the option that its other users have.
    #[error("{store} was made {made}, and is opened {opened}")]
    OtherOptions {
        /// The name of the store.
        store: String,
        /// The option that was chosen when the store was made.
        made: &'static str,
        /// The option that is chosen now.
        opened: &'static str,
    },
    /// Some of the pages are not in the store in this generation. The others were returned. The
    /// caller asks the next store that has the pages.
    #[error("{count} pages of namespace {namespace} are missing, the first of them is page {first}")]
    Missing {
        /// The namespace.
        namespace: NamespaceId,
        /// The number of missing pages.
        count: u64,
        /// The lowest number of a missing page.
        first: u64,
    },
    /// There is not enough room for the put, none of which was stored. Put the pages elsewhere.
    #[error("the store has room for {room} bytes, and {needed} are needed")]
    NoRoom {
        /// The number of bytes that the put needs.
        needed: u64,
        /// The number of free bytes of the store.
        room: u64,
    },
    /// The store has the largest permitted number of these objects.
    #[error("the store has {limit} {what} already, the most that it keeps")]
    TooMany {
        /// The objects of which there are too many.
        what: &'static str,
        /// The largest permitted number.
        limit: usize,
    },
    /// A request has no page or more pages than a put or get may have, or its pages do not ascend.
    #[error("a request is for 1 to {MAX_RUN_PAGES} pages in strictly ascending order, not {0}")]
    BadRun(String),
    /// A value is empty, or larger than a store accepts.
    #[error("a value of {len} bytes for page {page}: a value has 1 to {MAX_VALUE_BYTES}")]
    BadValue {
        /// The page.
        page: u64,
        /// The length of the value in bytes.
        len: usize,
    },
    /// All bytes of the value are zero. Zero pages are never put into a store (rule 3).
    #[error("page {0} has only zeros: its location is Zero, and it does not go to a store")]
    Zeros(u64),
    /// The lease is zero or too long.
    #[error("a lease of {0:?}: a lease is above zero, and at most {MAX_LEASE:?}")]
    BadLease(Duration),
    /// The wrapper has no key for the namespace, because it was not given the name of the
    /// namespace, or was given it for another VM.
    #[error("there is no key for namespace {0}: its name is not known here, or it is of another VM")]
    NoKey(NamespaceId),
    /// A value could not be sealed.
    #[error("page {page} cannot be sealed")]
    Seal {
        /// The page.
        page: u64,
        /// The reason why the page cannot be sealed.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The deadline has passed. Pages that were returned before are valid.
    #[error("the store did not answer before the deadline")]
    TimedOut,
    /// The store's data is damaged, or another program has written it.
    #[error("{what} is damaged")]
    Damaged {
        /// The damaged object, with its file if it has one.
        what: String,
        /// The kind of damage.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store, or the connection to it, failed.
    #[error("the store failed: {step}")]
    Io {
        /// The step that failed, with the file or the address.
        step: String,
        /// The error of the operating system.
        #[source]
        cause: io::Error,
    },
}

impl StoreError {
    /// Returns the result of a `get` that has left out `pages`: `Ok` if there are none.
    ///
    /// # Errors
    /// Returns [`StoreError::Missing`] if pages were left out.
    pub fn left_out(namespace: NamespaceId, pages: impl IntoIterator<Item = u64>) -> Result<(), Self> {
        let mut pages = pages.into_iter();
        let Some(first) = pages.next() else { return Ok(()) };
        let (count, first) = pages.fold((1, first), |(count, lowest), page| (count + 1, lowest.min(page)));
        Err(Self::Missing { namespace, count, first })
    }

    /// Returns whether the same call can succeed later without any action: the store did not
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

    /// Returns a function that converts an I/O error into an error of this type. `step` says what
    /// failed.
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
