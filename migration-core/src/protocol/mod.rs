//! The protocol: who owns the VM, and which frames are permitted when. Two state machines without
//! I/O, clock or thread.
//!
//! The engine and the simulator pass frames, commands and link losses to the machines, and do what
//! the machines answer. The table of ownership that they implement is in DESIGN.md. In short:
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

/// The error of a frame that is not permitted in the present phase. Either the peer has sent the
/// frame, or this side was about to send it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{frame} (epoch {epoch}) has no place in phase {phase}: {why}")]
pub struct Violation {
    /// The name of the frame or command.
    pub frame: &'static str,
    /// The epoch of the frame.
    pub epoch: u32,
    /// The phase of the machine.
    pub phase: String,
    /// What is wrong with the frame.
    pub why: &'static str,
    /// The error code to send to the peer.
    pub code: ErrorCode,
}

impl Violation {
    /// Returns the violation that `frame`, a frame or a command, is not permitted in `phase`.
    pub(crate) fn new(frame: &'static str, epoch: u32, phase: impl fmt::Debug, why: &'static str) -> Self {
        Self { frame, epoch, phase: format!("{phase:?}"), why, code: ErrorCode::Protocol }
    }

    pub(crate) fn with_code(self, code: ErrorCode) -> Self {
        Self { code, ..self }
    }
}
