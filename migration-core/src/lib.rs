//! Live migration of virtual machines: the parts that need no operating system.
#![deny(unsafe_code)]

pub mod channel;
pub mod codec;
pub mod device;
pub mod engine;
mod error;
pub mod page;
pub mod page_set;
pub mod protocol;
#[allow(unsafe_code)]
pub mod ram;
pub mod report;
pub mod sim;
pub mod spawner;
pub mod state;
pub mod strategy;
pub mod tracker;
pub mod vm;
pub mod wire;

pub use error::MigrationError;
pub use page::{LayoutError, PAGE_SHIFT, PAGE_SIZE, PageRange, RamLayout, RamRegion};
pub use page_set::PageSet;
pub use ram::{GuestRam, HeapRam, OutsideRam, RamSlice};
