//! Live migration of virtual machines: the parts that need no operating system.
#![deny(unsafe_code)]

pub mod channel;
pub mod codec;
pub mod device;
mod error;
pub mod page;
pub mod page_set;
#[allow(unsafe_code)]
pub mod ram;
pub mod protocol;
pub mod report;
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
