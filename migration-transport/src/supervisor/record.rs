//! What an owner leaves for the time after it.

use std::{io, process::ExitStatus};

use migration_core::{fence::Fence, vm::VmError};
use thiserror::Error;

use super::{MAX_RESTARTS, RESTART_PERIOD};
use crate::BrokerError;

/// What the owner of a VM leaves with the broker, so that the VM can be restarted. `S` says what
/// it goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartRecord<S> {
    /// What the VM goes on from; `None` if nothing was saved.
    pub saved: Option<S>,
    /// Every process that may run the VM, as the supervisor's [`Fence`] knows it. Empty if the
    /// owner cannot be named: then the VM is not restarted.
    pub holders: Vec<Vec<u8>>,
    /// Where else the VM may run, beyond the reach of the fence.
    pub elsewhere: Option<String>,
    /// Whether the guest has ended by itself.
    pub ended: bool,
}

impl<S> Default for RestartRecord<S> {
    fn default() -> Self {
        Self { saved: None, holders: Vec::new(), elsewhere: None, ended: false }
    }
}

impl<S> RestartRecord<S> {
    /// Returns what the VM goes on from.
    ///
    /// # Errors
    /// Returns an error if the VM must not be restarted, or cannot.
    pub fn restartable(&self) -> Result<&S, NotRestarted> {
        if self.ended {
            return Err(NotRestarted::Ended);
        }
        if let Some(to) = &self.elsewhere {
            return Err(NotRestarted::Elsewhere(to.clone()));
        }
        if self.holders.is_empty() {
            return Err(NotRestarted::UnknownHolder);
        }
        self.saved.as_ref().ok_or(NotRestarted::NothingSaved)
    }

    /// Returns whether every process that may run the VM is dead for certain.
    pub fn all_dead(&self, fence: &dyn Fence) -> bool {
        self.holders.iter().all(|holder| fence.is_dead(holder))
    }
}

/// Why a VM that has no owner any more was not restarted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NotRestarted {
    /// That is no accident of the VMM.
    #[error("its guest has ended by itself")]
    Ended,
    /// The VM may run there. A person has to find out.
    #[error("it was on its way to {0}, and may run there")]
    Elsewhere(String),
    /// Its owner could not be named, so it cannot be known to be dead.
    #[error("it is not known which process ran it")]
    UnknownHolder,
    /// There is nothing to go on from.
    #[error("no snapshot of it was taken")]
    NothingSaved,
    /// Its record cannot be read.
    #[error("what its owner left makes no sense")]
    Record(#[source] VmError),
    /// To go on from its saved state kills it.
    #[error("it was restarted {MAX_RESTARTS} times within {RESTART_PERIOD:?}")]
    TooOften,
    /// The broker cannot be asked who owns the VM.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// Its process could not be started.
    #[error("starting its new process")]
    Start(#[source] io::Error),
    /// Its process has ended before it had the VM.
    #[error("restoring {saved} has failed ({status})")]
    Failed {
        /// What it was to go on from.
        saved: String,
        /// How the process ended.
        status: ExitStatus,
    },
    /// There is no thread for it.
    #[error("no thread")]
    NoThread(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use migration_core::fence::NotFenced;

    use super::*;

    /// Only one process is dead.
    struct OneDead;

    impl Fence for OneDead {
        fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
            Err(NotFenced("as asked".into()))
        }

        fn is_dead(&self, identity: &[u8]) -> bool {
            identity == b"dead"
        }
    }

    #[test]
    fn a_vm_is_dead_when_every_process_is_that_may_run_it() {
        let all_dead = |holders: &[&[u8]]| {
            let holders = holders.iter().map(|holder| holder.to_vec()).collect();
            RestartRecord::<()> { holders, ..RestartRecord::default() }.all_dead(&OneDead)
        };
        assert!(all_dead(&[b"dead"]) && all_dead(&[b"dead", b"dead"]));
        assert!(!all_dead(&[b"lives"]) && !all_dead(&[b"dead", b"lives"]));
    }
}
