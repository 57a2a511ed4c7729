//! Stores in folders, in files and in servers: pages for several hosts, checkpoints, snapshots.
//!
//! The traits are those of [`migration_core::store`].

mod checkpoint_folders;
mod dir_versions;
mod file;
#[cfg(feature = "redis")]
mod redis;
mod snapshot_file;

#[cfg(feature = "redis")]
pub use self::redis::{RedisPageStore, RedisPageStoreOptions};
pub use {
    checkpoint_folders::{AttemptFolders, CheckpointFolders, CheckpointKind, OpenStore, PlainStores},
    dir_versions::DirVersions,
    file::{FilePageStore, FilePageStoreOptions},
    snapshot_file::SnapshotFile,
};
