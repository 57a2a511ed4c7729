//! The memory of a VM: its layout, sets of its pages, the location of each page, dirty tracking,
//! and the loading of missing pages.

pub mod page;
pub mod page_map;
pub mod page_set;
pub mod pager;
pub mod patience;
#[allow(unsafe_code)]
pub mod ram;
pub mod shared_map;
pub mod tracker;
