//! Page stores of this crate: see [`migration_core::store`].

mod dir;

pub use dir::{DirPageStore, DirPageStoreOptions};
