//! Page stores of this crate: see [`migration_core::store`].

mod file;

pub use file::{FilePageStore, FilePageStoreOptions};
