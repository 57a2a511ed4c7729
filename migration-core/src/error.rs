//! How a migration fails.

use std::io;

use thiserror::Error;

use crate::{
    codec::DecodeError, protocol::Violation, ram::OutsideRam, tracker::TrackerError, vm::VmError, wire::ErrorCode,
};

/// Why a migration, or a step of it, failed. What became of the VM is not said here but in the
/// [`Report`](crate::report::Report)'s outcome: until the hand-over every failure leaves it running at the source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// A connection could not be opened, was lost, or timed out.
    #[error("link to {peer}: {cause}")]
    Link {
        /// The other end.
        peer: String,
        /// What happened.
        cause: io::Error,
    },
    /// Something else than a migration destination listens there.
    #[error("{peer} is not a migration destination: {what}")]
    Stranger {
        /// Its address.
        peer: String,
        /// What it seems to be: see [`describe_stranger`](crate::describe_stranger).
        what: String,
    },
    /// The other end refused or gave up.
    #[error("the other end: {text} ({code:?})")]
    Peer {
        /// The kind of reason.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
    /// The other end broke the protocol, or a strategy asked for a step out of order.
    #[error("protocol: {0}")]
    Protocol(#[from] Violation),
    /// Bytes from the other end make no sense.
    #[error("malformed data from the other end: {0}")]
    Malformed(#[from] DecodeError),
    /// The VMM failed to do what it was asked.
    #[error("{step}: {cause}")]
    Vm {
        /// What was asked.
        step: &'static str,
        /// Why it failed.
        cause: VmError,
    },
    /// A store of checkpoints or snapshots failed: there is no room, or it cannot be read. The guest is not touched by that.
    #[error("{step}: {cause}")]
    Store {
        /// What was tried.
        step: &'static str,
        /// What the store says, with the file.
        cause: io::Error,
    },
    /// The dirty tracker failed.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// Guest memory was asked for where there is none.
    #[error(transparent)]
    Ram(#[from] OutsideRam),
    /// No thread could be started.
    #[error("no thread for {role}: {cause}")]
    Thread {
        /// What it was for.
        role: &'static str,
        /// Why not.
        cause: io::Error,
    },
    /// The user cancelled.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The strategy gave up.
    #[error("gave up: {0}")]
    GaveUp(String),
    /// The VM cannot move by this strategy.
    #[error("blocked: {0}")]
    Blocked(String),
}

impl MigrationError {
    /// Wraps an error of the VMM with the step that failed.
    pub fn vm(step: &'static str) -> impl FnOnce(VmError) -> Self {
        move |cause| Self::Vm { step, cause }
    }

    /// Wraps an error of a link.
    pub fn link(peer: &str) -> impl FnOnce(io::Error) -> Self {
        let peer = peer.to_owned();
        move |cause| Self::Link { peer, cause }
    }

    /// Returns the text for a message that names the peer already: that of a link to it is left out.
    pub fn at_peer(&self, peer: &str) -> String {
        match self {
            Self::Link { peer: named, cause } if named == peer => cause.to_string(),
            other => other.to_string(),
        }
    }

    /// The code under which the other end is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Peer { code, .. } => *code,
            Self::Protocol(violation) => violation.code,
            Self::Malformed(_) => ErrorCode::Protocol,
            Self::Cancelled(_) | Self::GaveUp(_) => ErrorCode::Cancelled,
            Self::Thread { .. } | Self::Store { .. } => ErrorCode::Resources,
            Self::Vm { .. } => ErrorCode::State,
            _ => ErrorCode::Other,
        }
    }
}
