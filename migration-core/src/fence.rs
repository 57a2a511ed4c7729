//! Fences: what makes certain that the other side does not run a VM, before this side runs it again.
//!
//! Two hosts cannot tell a death from a cut. So nobody restarts a VM because its owner is silent: somebody who can know,
//! or who can end it, has to say so first.

mod lease;

pub use lease::{Holder, Lease, LeaseError, LeaseFence, LeaseHolder, LeaseStore};
use thiserror::Error;

/// It is not certain that the other side is dead: nothing may be restarted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the other side is not fenced: {0}")]
pub struct NotFenced(pub String);

/// Makes certain that the other side's instance of a VM does not run, and never will.
pub trait Fence: Send + Sync {
    /// Returns once it is certain. `identity` is what the other side's VMM has said of itself
    /// ([`DestinationVm::identity`](crate::vm::DestinationVm::identity)) on the session that is lost; it is not to be
    /// trusted further than that a liar harms only its own VM.
    ///
    /// May be called again after it failed, and after it succeeded.
    ///
    /// # Errors
    /// When it cannot be made certain. The VM then waits: it is never restarted on a guess.
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced>;

    /// Whether it is known to be dead already, without doing anything about it. Then nobody has to wait until silence has
    /// lasted long enough. The default does not know.
    fn is_dead(&self, identity: &[u8]) -> bool {
        let _ = identity;
        false
    }
}

/// No arbiter: the other side is never known to be dead.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFence;

impl Fence for NoFence {
    fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
        Err(NotFenced("there is no arbiter, so its death cannot be told from a cut".into()))
    }
}

/// Proof that a [`Fence`] has returned. The protocol machine takes it before the VM gets a new owner.
#[derive(Debug)]
pub struct Fenced(());

impl Fenced {
    /// Asks `fence`.
    ///
    /// # Errors
    /// As [`Fence::fence`].
    pub fn by(fence: &dyn Fence, identity: &[u8]) -> Result<Self, NotFenced> {
        fence.fence(identity).map(|()| Self(()))
    }
}
