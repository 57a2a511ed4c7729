//! Why a minivmm does not move or save its VM.

use std::io;

use migration_core::{strategy::push_order::UnknownOrder, text::describe};
use minivmm_client::encryption::EncryptionError;
use thiserror::Error;

use crate::page_stores::StoresError;

/// Why a migration or a snapshot that a client has asked for does not begin. The client gets the
/// text.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    /// No VM is here, or something else is under way.
    #[error("{0}")]
    Busy(String),
    /// The options of encryption do not go together, or a key cannot be read.
    #[error(transparent)]
    Encryption(#[from] EncryptionError),
    /// No push order has this name.
    #[error(transparent)]
    PushOrder(#[from] UnknownOrder),
    /// Open files pass through a plain Unix socket only.
    #[error(
        "migrate: a hand-over passes open files to a process of this machine, which no encrypted channel can carry: leave \
         --encrypt out, at both ends"
    )]
    EncryptedHandOver,
    /// The page stores cannot be used.
    #[error("migrate")]
    PageStores(#[from] StoresError),
    /// The stores for the VM's protection cannot be made.
    #[error("migrate: {0}")]
    Protection(String),
    /// Whoever restarts the VM, or is its home, is not told that it leaves.
    #[error("migrate: {0}")]
    NotToldOfLeaving(String),
    /// The snapshot's file cannot be made.
    #[error("snapshot")]
    Store(#[source] io::Error),
    /// There is no thread for it.
    #[error("{what}: no thread")]
    Thread {
        /// What does not begin.
        what: &'static str,
        /// Why there is none.
        #[source]
        cause: io::Error,
    },
    /// It has begun, and the process or its thread ends before it does.
    #[error("the migration has not ended, but this minivmm or its thread ends")]
    Orphaned,
}

/// For requests whose failures are texts.
impl From<Refused> for String {
    fn from(refused: Refused) -> Self {
        describe(refused)
    }
}
