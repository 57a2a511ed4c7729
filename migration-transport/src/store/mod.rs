//! Stores in folders, in files and in servers: pages for several hosts, checkpoints, snapshots.
//!
//! The traits are those of [`migration_core::store`].

mod checkpoint_folders;
mod dir_versions;
mod file;
#[cfg(feature = "redis")]
mod redis;
mod snapshot_file;
mod url;

#[cfg(feature = "redis")]
pub use self::{
    redis::{RedisHealth, RedisMemory, RedisPageStore, RedisPageStoreOptions},
    url::{IdentityFiles, RedisUrl, TlsFiles},
};
pub use {
    checkpoint_folders::{AttemptFolders, CheckpointFolders, CheckpointKind, OpenStore, PlainStores},
    dir_versions::DirVersions,
    file::{FilePageStore, FilePageStoreOptions},
    snapshot_file::SnapshotFile,
    url::{NamedStore, StoreUrl, StoreUrlError},
};
