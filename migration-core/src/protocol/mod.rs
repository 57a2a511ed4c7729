//! Who owns the VM, and which frame may come when: two machines without I/O, clock or thread.
//!
//! The engine and the simulator feed them frames, commands and link losses, and do what they
//! answer. The table of ownership that they implement is in DESIGN.md; in short:
//!
//! | when the link goes | source | destination |
//! |---|---|---|
//! | before *ready* | resumes | discards |
//! | *ready* sent, *run* not | resumes; the epoch is void | holds the VM, paused |
//! | *run* sent | in doubt: reconnects and repeats *run* | holds, or runs if *run* came |
//! | *running* sent | in doubt, until the reconnect answers | owns it |

mod destination;
mod source;

use std::fmt;

use thiserror::Error;

pub use destination::{DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss};
pub use source::{OnSourceLoss, SourceEvent, SourceMachine, SourcePhase};

use crate::wire::ErrorCode;

/// The peer sent a frame that has no place here, or we were about to.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{frame} (epoch {epoch}) has no place in phase {phase}: {why}")]
pub struct Violation {
    /// Name of the frame or command.
    pub frame: &'static str,
    /// The epoch it carried.
    pub epoch: u32,
    /// The phase of the machine.
    pub phase: String,
    /// What is wrong with it.
    pub why: &'static str,
    /// The code under which the peer is told.
    pub code: ErrorCode,
}

impl Violation {
    /// Returns a frame or command that a machine in `phase` cannot take.
    pub(crate) fn new(frame: &'static str, epoch: u32, phase: impl fmt::Debug, why: &'static str) -> Self {
        Self { frame, epoch, phase: format!("{phase:?}"), why, code: ErrorCode::Protocol }
    }

    pub(crate) fn with_code(self, code: ErrorCode) -> Self {
        Self { code, ..self }
    }
}
