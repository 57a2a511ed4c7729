//! What a VMM reports when it cannot do what it was asked: [`vm::VmError`](crate::vm::VmError). It
//! is beside `vm`, because the traits of `memory` have this error, and `vm` names those traits.

use std::{error::Error, fmt};

/// Something that the VMM was asked to do failed.
///
/// What it displays does not repeat its cause: print it with [`Chain`](crate::text::Chain).
#[derive(Debug)]
pub struct VmError {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
    ended: bool,
}

impl VmError {
    /// Returns an error that says what failed, and what the caller can do about it.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None, ended: false }
    }

    /// Returns an error with the one that caused it.
    pub fn because(what: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), cause: Some(cause.into()), ended: false }
    }

    /// What was asked cannot be done because the guest has ended by itself (it has powered off,
    /// crashed, or met an error that its vCPUs do not survive), for this reason. A migration then
    /// fails with [`MigrationError::VmEnded`] at both ends.
    ///
    /// [`MigrationError::VmEnded`]: crate::MigrationError::VmEnded
    pub fn ended(reason: impl Into<String>) -> Self {
        Self { what: reason.into(), cause: None, ended: true }
    }

    /// Returns why the guest has ended, if that is the error.
    pub fn has_ended(&self) -> Option<&str> {
        self.ended.then_some(&self.what)
    }

    /// State of a version that cannot be loaded.
    pub fn version(name: &str, found: u32, oldest: u32, newest: u32) -> Self {
        Self::new(format!("state of {name} has version {found}, this host loads {oldest} to {newest}"))
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ended = if self.ended { "the VM has ended: " } else { "" };
        write!(f, "{ended}{}", self.what)
    }
}

impl Error for VmError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|c| &**c as &(dyn Error + 'static))
    }
}
