//! What the fuzz targets do with their input. Each module's `check` is one target; the program
//! `seeds` writes the corpora they start from.

pub mod frames;
pub mod handshake;
pub mod pager;
pub mod protocol;
pub mod receiver;
pub mod records;
pub mod repair;
pub mod state;
