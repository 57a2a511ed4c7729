//! `minivmm`, the reference VMM: small but real, and the place to see how a VMM plugs into the
//! migration crates.
//!
//! # As a library
//! A researcher can run their own strategy, push order or convergence policy on real KVM, between
//! two threads or two processes. The following strategy sends pages in two rounds while the guest
//! runs, then stops the guest:
//!
//! ```no_run
//! use migration_core::{MigrationError, strategy::{Done, Running, Strategy}};
//! use minivmm::{Destination, Vm, VmOptions};
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
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
//! let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
//! vm.wait_at_work()?;
//! let report = vm.migrate(destination.address(), &mut Twice)?;
//! println!("downtime {:?}", report.downtime);
//! assert_eq!(destination.wait()?.verify()?, 0);
//! # Ok(())
//! # }
//! ```
//!
//! | item | what it does |
//! |---|---|
//! | [`Vm`] | builds, runs, migrates, saves and restores a VM in this process |
//! | [`Destination`] | waits for a VM to arrive |
//! | [`command`] | the commands of the program `minivmm`, for programs that add to them |
//!
//! The programs in `examples/techniques` show each technique. The glue between a VMM and the crates
//! is `vmm/glue.rs`. All other code is what any VMM has.
#![deny(unsafe_code)]
// a process that has a VM must neither wait for its log nor end because of it
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
extern crate minivmm_client;

mod broker;
mod check;
mod checkpoints;
mod cli;
pub mod command;
mod control;
mod feature;
mod instance;
mod page_stores;
mod refresh;
mod restart;
mod sealing;
mod signals;
mod store;
mod vm;
mod vmm;

pub use vm::{BuildError, Destination, Guest, GuestError, ListenError, MigrateOptions, NotMoved, Vm, VmOptions};
pub use vmm::{MachineError, SerialTarget};
