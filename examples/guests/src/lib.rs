//! Guest programs to migrate: workloads whose use of memory is known, and that find every page that
//! is wrong.
//!
//! The guest is a program of its own in `guest/`, without an operating system. `build.rs` compiles
//! it into [`GUEST_ELF`], which any VMM with PVH boot runs. Three steps use it:
//!
//! 1. [`check_spec`] checks what a user asks for, `NAME[:key=value,…]`, and [`least_memory`]
//!    returns the RAM that it needs.
//! 2. [`elf`] returns the image with that spec.
//! 3. The guest keeps a page at [`layout::BOARD_ADDRESS`], on which it reports its state, its
//!    operations, its longest interruption and the errors that it has found. [`Board::parse`] reads
//!    a copy of that page.
//!
//! The layout of the page and the grammar of specs are compiled into both sides from the same two
//! files, `guest/layout.rs` and `guest/spec.rs`. The guest's pages are untrusted input:
//! [`Board::parse`] accepts any content.
//!
//! ```
//! # fn main() -> Result<(), guests::WorkloadError> {
//! let image = guests::elf("hot:size=64M,data=700M", 4, 0)?;
//! assert!(image.starts_with(b"\x7fELF"));
//! assert!(guests::least_memory("hot:size=64M", 4)? <= 64 << 20);
//! let error = guests::check_spec("hot:sise=64M").unwrap_err();
//! assert!(error.to_string().contains("no key `sise`"));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

#[path = "../guest/layout.rs"]
pub mod layout;
#[path = "../guest/spec.rs"]
pub mod spec;

mod board;
mod check;
mod image;
mod listing;
mod needs;

pub use board::{Accesses, Balloon, Board, FirstError, State};
pub use check::{WorkloadError, check_spec};
pub use image::{GUEST_ELF, elf};
pub use listing::listing;
pub use needs::least_memory;
