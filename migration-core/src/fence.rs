//! Fences: proof that the other side does not run a VM, which this side needs before it runs the VM
//! again.
//!
//! Two hosts cannot distinguish a crash of the other from a cut link. So a silent owner alone is no
//! reason to restart a VM. First a fence must confirm that the owner is dead, or must end it.

mod lease;

pub use lease::{Holder, Lease, LeaseError, LeaseFence, LeaseHolder, LeaseStore};
use thiserror::Error;

/// The error of a fence that could not confirm that the other side is dead. The VM must not be
/// restarted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the other side is not fenced: {0}")]
pub struct NotFenced(pub String);

/// Ensures that the other side's instance of a VM does not run and will never run again.
pub trait Fence: Send + Sync {
    /// Returns once the other side is fenced. `identity` is what the other side's VMM reported
    /// about itself ([`DestinationVm::identity`](crate::vm::DestinationVm::identity)) in the lost
    /// session. A peer that reports a false identity may harm its own VM, but must not be able to
    /// harm any other.
    ///
    /// May be called again after an error and after a success.
    ///
    /// # Errors
    /// Fails if it is not certain that the other side is dead. The VM then waits. It is never
    /// restarted on a guess.
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced>;

    /// Returns whether the other side is already known to be dead. Takes no action. If it returns
    /// `true`, nobody has to wait for a time-out. The default returns `false`.
    fn is_dead(&self, identity: &[u8]) -> bool {
        let _ = identity;
        false
    }
}

/// A fence for setups without an arbiter. It never confirms that the other side is dead.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFence;

impl Fence for NoFence {
    fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
        Err(NotFenced("there is no arbiter, so a crash cannot be distinguished from a cut link".into()))
    }
}

/// The proof that a [`Fence`] has succeeded. The protocol machine demands it before the VM gets a
/// new owner.
#[derive(Debug)]
pub struct Fenced(());

impl Fenced {
    /// Calls `fence` and returns the proof.
    ///
    /// # Errors
    /// Fails like [`Fence::fence`].
    pub fn by(fence: &dyn Fence, identity: &[u8]) -> Result<Self, NotFenced> {
        fence.fence(identity).map(|()| Self(()))
    }
}
