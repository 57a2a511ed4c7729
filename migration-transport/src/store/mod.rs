//! Stores in folders and files: pages for several hosts, checkpoints, snapshots.
//!
//! The traits are those of [`migration_core::store`].

mod checkpoint_folders;
mod dir_versions;
mod file;
mod snapshot_file;

pub use {
    checkpoint_folders::{AttemptFolders, CheckpointFolders, CheckpointKind, OpenStore, PlainStores},
    dir_versions::DirVersions,
    file::{FilePageStore, FilePageStoreOptions},
    snapshot_file::SnapshotFile,
};
