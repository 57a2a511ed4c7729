//! Encryption for live migration: a placeholder crate.
//!
//! Nothing is implemented here yet. What it will hold: a handshake by well-kept libraries, a record layer that wraps any
//! [`Channel`](migration_core::channel::Channel), and sealing of pages that rest in stores. Until then, migrate inside a
//! network that you trust.
#![forbid(unsafe_code)]
