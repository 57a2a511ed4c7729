//! A VM's memory: its layout, sets of its pages, where each page is, who writes and who waits.

pub mod page;
pub mod page_map;
pub mod page_set;
pub mod pager;
pub mod patience;
#[allow(unsafe_code)]
pub mod ram;
pub mod shared_map;
pub mod tracker;
