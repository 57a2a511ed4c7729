//! Measurements of minivmm, compared with QEMU and with the figures of papers.
//!
//! The commands control minivmms as child processes, through their command lines and control
//! sockets, as a user's script does. The program of these processes is the one into which this
//! library is linked: the commands are `minivmm bench`, `minivmm eval` and `minivmm demo`.
//!
//! | module | content |
//! |---|---|
//! | `bench` | minivmm compared with QEMU: pre-copy, post-copy, encryption, hand-overs, memory slots |
//! | `eval` | our techniques compared with the measurements of their papers: tables and plots |
//! | `demo` | one migration and a table of its results |
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
