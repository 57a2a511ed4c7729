//! How a migration fails.

use std::{io, time::Duration};

use thiserror::Error;

use crate::{
    codec::DecodeError, page_map::MapError, paged_memory::FetchError, protocol::Violation, ram::OutsideRam,
    store::StoreError, text::describe, tracker::TrackerError, vm::VmError, wire::ErrorCode,
};

/// Why a migration, or a step of it, failed. What became of the VM is not said here but in the
/// [`Report`](crate::report::Report)'s outcome: until the hand-over every failure leaves it running
/// at the source.
///
/// What it displays does not repeat its cause: print it with [`Chain`](crate::text::Chain). A cause
/// can be found by its type, too, by way of [`source`](std::error::Error::source).
///
/// What it displays may hold text of the other end as that was sent: show it to people through
/// [`Escaped`](crate::text::Escaped).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// A connection could not be opened, was lost, or timed out.
    #[error("link to {peer}")]
    Link {
        /// The other end.
        peer: String,
        /// What happened.
        #[source]
        cause: io::Error,
    },
    /// Something else than a migration destination listens there.
    #[error("{peer} is not a migration destination: {what}")]
    ForeignPeer {
        /// Its address.
        peer: String,
        /// What it seems to be: see [`describe_foreign_peer`](crate::describe_foreign_peer).
        what: String,
    },
    /// The other end refused or gave up.
    #[error("the other end: {text} ({code:?})")]
    Peer {
        /// The kind of reason.
        code: ErrorCode,
        /// Its words, as they came: see [`Escaped`](crate::text::Escaped).
        text: String,
    },
    /// The other end broke the protocol, or a strategy asked for a step out of order.
    #[error("protocol")]
    Protocol(#[from] Violation),
    /// Bytes from the other end make no sense.
    #[error("malformed data from the other end")]
    Malformed(#[from] DecodeError),
    /// The VMM failed to do what it was asked.
    #[error("{step}")]
    Vm {
        /// What was asked.
        step: &'static str,
        /// Why it failed.
        #[source]
        cause: VmError,
    },
    /// A store of checkpoints or snapshots failed: there is no room, or it cannot be read. The
    /// guest is not touched by that.
    #[error("{step}")]
    Store {
        /// What was tried.
        step: &'static str,
        /// What the store says, with the file.
        #[source]
        cause: io::Error,
    },
    /// A page store failed. Pages whose put failed are still where they were.
    #[error("page store {store}")]
    PageStore {
        /// The name of the store.
        store: String,
        /// What the store says.
        #[source]
        cause: StoreError,
    },
    /// Pages that are in page stores could not be read to be sent. The VM stays where it is.
    #[error("pages of the VM cannot be read from their page store")]
    Fetch(#[from] FetchError),
    /// The dirty tracker failed.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// Guest memory was asked for where there is none.
    #[error(transparent)]
    Ram(#[from] OutsideRam),
    /// A strategy asked for a step that the pages do not allow, for example to send one that it has
    /// left behind.
    #[error("page map")]
    Pages(#[from] MapError),
    /// No thread could be started.
    #[error("no thread for {role}")]
    Thread {
        /// What it was for.
        role: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The guest has ended by itself, for this reason: there is no VM to move any more.
    #[error("the VM has ended: {0}")]
    VmEnded(String),
    /// The user cancelled.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The strategy ended while pages were missing at the destination.
    #[error(transparent)]
    StillMissing(#[from] StillMissing),
    /// The strategy gave up.
    #[error("gave up: {0}")]
    GaveUp(String),
    /// The guest was paused for the hand-over, and the destination did not get ready in time: the
    /// guest runs on at the source.
    #[error("the guest was paused for {paused:?} for the hand-over, and the destination {why}: the guest runs on here")]
    PausedTooLong {
        /// How long the guest had been paused.
        paused: Duration,
        /// What the destination did or did not do.
        why: String,
    },
    /// The VM cannot move by this strategy.
    #[error("blocked: {0}")]
    Blocked(String),
}

impl MigrationError {
    /// Wraps an error of the VMM with the step that failed. If the step failed because the guest
    /// has ended, that is the error.
    pub fn vm(step: &'static str) -> impl FnOnce(VmError) -> Self {
        move |cause| match cause.has_ended() {
            Some(reason) => Self::VmEnded(reason.to_owned()),
            None => Self::Vm { step, cause },
        }
    }

    /// Wraps an error of a link.
    pub fn link(peer: &str) -> impl FnOnce(io::Error) -> Self {
        let peer = peer.to_owned();
        move |cause| Self::Link { peer, cause }
    }

    /// Returns the text, with all causes, for a message that names the peer already: that of a link
    /// to it is left out.
    pub fn at_peer(&self, peer: &str) -> String {
        match self {
            Self::Link { peer: named, cause } if named == peer => describe(cause),
            other => describe(other),
        }
    }

    /// Returns the code under which the other end is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Peer { code, .. } => *code,
            Self::Protocol(violation) => violation.code,
            Self::Malformed(_) => ErrorCode::Protocol,
            Self::Cancelled(_) | Self::GaveUp(_) => ErrorCode::Cancelled,
            Self::Thread { .. } | Self::Store { .. } | Self::PageStore { .. } | Self::Fetch(_) => ErrorCode::Resources,
            Self::Vm { .. } => ErrorCode::State,
            Self::VmEnded(_) => ErrorCode::VmEnded,
            _ => ErrorCode::Other,
        }
    }
}

/// A strategy has [finished](crate::strategy::HandedOver::finish) a migration that left pages
/// behind. It has to [serve](crate::strategy::HandedOver::serve) them.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{pages} pages are missing at the destination")]
pub struct StillMissing {
    /// How many.
    pub pages: u64,
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    /// Returns the cause with this text, which the whole text has once.
    #[track_caller]
    fn cause<'a, E: Error + 'static>(error: &'a MigrationError, text: &str) -> &'a E {
        let mut next = error.source();
        while let Some(source) = next {
            if let Some(found) = source.downcast_ref::<E>() {
                assert_eq!(describe(error).matches(text).count(), 1, "{error:?}");
                return found;
            }
            next = source.source();
        }
        panic!("{error:?} has not this cause");
    }

    #[test]
    fn every_cause_can_be_found_by_its_type_and_is_printed_once() {
        let disk = || io::Error::new(io::ErrorKind::StorageFull, "the disk is full");
        let kind = |error| cause::<io::Error>(&error, "the disk is full").kind();
        let full = io::ErrorKind::StorageFull;
        assert_eq!(kind(MigrationError::link("tcp:there:1")(disk())), full);
        assert_eq!(kind(MigrationError::Store { step: "writing", cause: disk() }), full);
        assert_eq!(kind(MigrationError::Thread { role: "a lane", cause: disk() }), full);
        // that of a VMM's own error, below the VMM's
        assert_eq!(kind(MigrationError::vm("saving the state")(VmError::because("the disk image", disk()))), full);
        assert_eq!(kind(MigrationError::page_store("rack-7")(StoreError::io("writing")(disk()))), full);
        let silent = |cause| FetchError::Silent { entry: 0, first: 7, store: "rack-7".into(), cause };
        assert_eq!(kind(silent(StoreError::io("reading")(disk())).into()), full);
        assert_eq!(kind(TrackerError::because("dirty-log", "read the log", disk()).into()), full);
        let vm = MigrationError::vm("saving the state")(VmError::new("the device is busy"));
        assert_eq!(cause::<VmError>(&vm, "the device is busy").to_string(), "the device is busy");
        let malformed = MigrationError::from(DecodeError::invalid("length", "odd"));
        cause::<DecodeError>(&malformed, "odd");
    }
}
