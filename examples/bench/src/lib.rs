//! Measurements of minivmm: beside QEMU, and beside what papers report.
//!
//! The commands drive minivmms as child processes, through their command line and their control
//! sockets, as a user's script does. Such a process is the program that this library is linked
//! into: the commands are `minivmm bench`, `minivmm eval` and `minivmm demo`.
//!
//! | module | what is in it |
//! |---|---|
//! | `bench` | minivmm and QEMU side by side: pre-copy, post-copy, encryption, hand-overs, memory slots |
//! | `eval` | our techniques beside what their papers measured: tables and plots |
//! | `demo` | one migration, and a table of what happened |
#![deny(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
extern crate minivmm_client;

mod bench;
mod demo;
mod eval;

pub use bench::{Bench, run as bench};
pub use demo::{Demo, run as demo};
pub use eval::{Eval, push_order, run as eval};
