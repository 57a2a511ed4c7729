//! The reasons why a minivmm does not move or save its VM.

use std::io;

use migration_core::{strategy::push_order::UnknownOrder, text::describe};
use minivmm_client::encryption::EncryptionError;
use thiserror::Error;

use crate::page_stores::StoresError;

/// The reason why a migration or a snapshot that a client has requested does not begin. The client
/// gets the text.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    /// No VM is here, or another migration or snapshot is under way.
    #[error("{0}")]
    Busy(String),
    /// The encryption options contradict each other, or a key cannot be read.
    #[error(transparent)]
    Encryption(#[from] EncryptionError),
    /// No push order has this name.
    #[error(transparent)]
    PushOrder(#[from] UnknownOrder),
    /// Open files can pass through an unencrypted Unix socket only.
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
    /// The broker that restarts the VM, or the VM's home, could not be informed that the VM leaves.
    #[error("migrate: {0}")]
    NotToldOfLeaving(String),
    /// The snapshot's file cannot be made.
    #[error("snapshot")]
    Store(#[source] io::Error),
    /// No thread could be started for the migration or snapshot.
    #[error("{what}: no thread")]
    Thread {
        /// What does not begin.
        what: &'static str,
        /// The reason.
        #[source]
        cause: io::Error,
    },
    /// The migration has begun, but this process or the migration's thread ends before the
    /// migration does.
    #[error("the migration has not ended, but this minivmm or its thread ends")]
    Orphaned,
}

/// Returns the text, for requests whose errors are texts.
impl From<Refused> for String {
    fn from(refused: Refused) -> Self {
        describe(refused)
    }
}
