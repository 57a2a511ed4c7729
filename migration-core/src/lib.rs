//! Live migration of virtual machines: the parts that need no operating system.
//!
//! | a | starts with |
//! |---|---|
//! | VMM author | [`vm`]: the traits to implement; [`engine`]: what runs them |
//! | researcher | [`strategy`]: verbs, tokens and policies; [`sim`]: where a strategy runs without a VM |
//! | fuzzer | [`wire`], [`protocol`], [`state`]: what a hostile peer reaches |
//!
//! A strategy of one's own is a short script. This one sends everything twice while the guest runs,
//! then stops it:
//!
//! ```
//! use migration_core::{
//!     MigrationError,
//!     sim::{Dirtying, Owner, SimConfig, Simulation},
//!     strategy::{Done, Running, Strategy},
//! };
//!
//! struct Twice;
//!
//! impl Strategy for Twice {
//!     fn name(&self) -> &'static str {
//!         "twice"
//!     }
//!
//!     fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
//!         let mut pages = vm.start_tracking()?;
//!         for _ in 0..2 {
//!             vm.send(&pages)?;
//!             pages = vm.harvest()?;
//!         }
//!         let mut vm = vm.pause()?;
//!         vm.send_rest(pages)?;
//!         let nothing = vm.no_pages();
//!         Ok(vm.hand_over(nothing)?.finish()?)
//!     }
//! }
//!
//! // in the simulator, with the link cut after the 270th action: the guest stays where it was, whole
//! let dirtying = Dirtying::Rate { pages_per_second: 10_000.0, working_set: 4096 };
//! let mut sim = Simulation::new(SimConfig { dirtying, cuts: vec![270], ..SimConfig::default() });
//! assert!(sim.attempt(&mut Twice).error.is_some());
//! assert_eq!(sim.owner(), Owner::Source);
//! // the retry completes
//! assert!(sim.attempt(&mut Twice).error.is_none());
//! assert_eq!(sim.owner(), Owner::Destination);
//! assert_eq!(sim.broken(), &[] as &[String]);
//! ```
//!
//! The crate makes no system call but those of the standard library's threads and clocks, starts
//! threads only through a [`spawner`], and has unsafe code only in [`ram`].
#![deny(unsafe_code)]

pub mod channel;
pub mod checkpoint;
pub mod codec;
pub mod engine;
mod error;
pub mod fence;
mod foreign;
pub mod histogram;
pub mod limits;
mod lock;
mod memory;
pub mod paged_memory;
pub mod protocol;
pub mod report;
pub mod sim;
pub mod snapshot;
pub mod spawner;
pub mod store;
pub mod strategy;
pub mod text;
pub mod vm;
mod vm_error;
mod vm_id;
pub mod wire;
pub mod working_set;

pub use error::MigrationError;
pub use foreign::{FOREIGN_BYTES, describe_foreign_peer};
pub use memory::{page, page_map, page_set, pager, patience, ram, shared_map, tracker};
pub use page::{LayoutError, PAGE_SHIFT, PAGE_SIZE, PageRange, RamLayout, RamRegion};
pub use page_set::PageSet;
pub use ram::{GuestRam, HeapRam, OutsideRam, RamSlice};
pub use vm::{device, state};

/// The example of `README.md`, which is run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
