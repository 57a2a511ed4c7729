//! The successor's view of its predecessor.

use std::time::Duration;

use migration_core::{engine::ReceiverHandle, fence::Fence as _, protocol::DestinationPhase};

use super::TICK;
use crate::fence::{ProcessFence, TakeOverError, take_over_from};

/// Why a successor does not watch its predecessor any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PredecessorEnd {
    /// The VM is not awaited any more: it runs here, or the process ends.
    NotAwaited,
    /// The predecessor has died, and its VM did not come. The successor has nothing to wait for.
    NothingCame,
}

/// Watches the process from which `receiver` awaits a VM.
///
/// If the predecessor dies after all of the VM has come, the VM is taken over: it runs here. If it
/// dies earlier, the VM is lost with it. `predecessor` is an encoded [`ProcessIdentity`]. `awaits`
/// waits for at most the time that it is given, and returns whether the VM is still awaited.
///
/// # Errors
/// Returns an error if the predecessor is dead and the VM, which has come as a whole, does not run
/// here.
///
/// [`ProcessIdentity`]: crate::fence::ProcessIdentity
pub fn watch_predecessor(
    receiver: &ReceiverHandle,
    predecessor: &[u8],
    mut awaits: impl FnMut(Duration) -> bool,
) -> Result<PredecessorEnd, TakeOverError> {
    while awaits(TICK) {
        if !ProcessFence.is_dead(predecessor) {
            continue;
        }
        match receiver.phase() {
            DestinationPhase::Empty => return Ok(PredecessorEnd::NothingCame),
            DestinationPhase::Ready => match take_over_from(receiver, predecessor) {
                // the attempt may have ended just now
                Err(why) if receiver.phase() == DestinationPhase::Ready => return Err(why),
                Ok(()) | Err(_) => {}
            },
            // it runs, or what has come is about to be discarded
            _ => {}
        }
    }
    Ok(PredecessorEnd::NotAwaited)
}
