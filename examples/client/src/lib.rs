//! The client's side of a running minivmm: the requests, the answers, and their form on a command
//! line.
//!
//! A minivmm serves a Unix socket (`--control SOCK`). A client writes one [`Request`] as a line of
//! JSON and reads lines of JSON until the last one. [`ask`] does that:
//!
//! ```no_run
//! use minivmm_client::{MigrateRequest, Request, StrategyKind, ask};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let request = MigrateRequest::plain("tcp:127.0.0.1:4444".parse()?, StrategyKind::PreCopy, 2);
//! let report = ask("vm.sock".as_ref(), &Request::Migrate(Box::new(request)), |_progress| {})?;
//! assert_eq!(report["outcome"], "completed");
//! # Ok(())
//! # }
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | `request` | requests, and their options as types |
//! | `page_stores` | page stores, as command lines and requests name them |
//! | `connection` | the socket: sending a request, waiting for its answer, errors |
//! | [`values`] | sizes, times, paths and addresses as a command line writes them |
//! | [`encryption`] | the options of an encrypted migration |
//! | [`report`] | the JSON fields of reports and of progress |
//! | [`server`] | the other end of the socket: clients, each on a thread of its own |
//! | [`ctl`] | the command `minivmm ctl` |
//! | [`mod@log`] | stdout and stderr of a process that must not wait for them |
//! | [`whole_file`] | files that appear when they are complete |
#![forbid(unsafe_code)]
// a process that has a VM must neither wait for its log nor end because of it
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
pub mod log;

mod connection;
pub mod ctl;
pub mod encryption;
mod page_stores;
pub mod report;
mod request;
pub mod server;
pub mod values;
pub mod whole_file;

pub use connection::{AskError, ask, ask_peer, ask_within};
pub use page_stores::{PageStoreOptions, StoreSpec};
pub use request::{
    Answer, Impact, LendRequest, MigrateRequest, Plan, Protect, Request, Saved, SnapshotRequest, StrategyKind,
    TimeoutAction, Trigger, Wishes,
};
