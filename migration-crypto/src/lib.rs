//! Encryption for live migration. Both hosts prove who they are, the data on the network is secret
//! and cannot be changed unnoticed, and pages that are kept in untrusted stores are sealed.
//!
//! [`SecureConnector`] and [`SecureListener`] wrap the connector and the listener of any transport.
//! The first channel of a source begins a session: both sides prove who they are ([`Credentials`]:
//! a pre-shared key, static keys, or TLS certificates) and agree on a secret that neither can
//! compute again later. Every further channel proves that it belongs to that session, also after a
//! link was lost. After the handshake the data of a channel travels in [records](record): sealed
//! pieces of up to 1 MiB. A record opens only as a whole and only at its place in the sequence.
//!
//! ```
//! use std::{thread, time::Duration};
//!
//! use migration_core::channel::{Connector, Listener};
//! use migration_crypto::{Credentials, Psk, SecureConnector, SecureListener, Security};
//! use migration_transport::memory;
//!
//! let (connector, listener) = memory::link(1 << 20);
//! // real programs read the key from a file with `Psk::load`
//! let security = || Security::new(Credentials::Psk(Psk::new([7; 32])));
//! let mut listener = SecureListener::new(Box::new(listener), security());
//! let source = SecureConnector::new(Box::new(connector), security());
//!
//! let destination = thread::spawn(move || -> std::io::Result<[u8; 5]> {
//!     let channel = listener.accept(Duration::from_secs(5))?.ok_or(std::io::ErrorKind::TimedOut)?;
//!     let mut word = [0; 5];
//!     channel.split()?.reader.read_exact(&mut word)?;
//!     Ok(word)
//! });
//! source.connect()?.split()?.writer.write_all(b"hello", &[])?;
//! assert_eq!(&destination.join().unwrap()?, b"hello");
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! For data at rest, [`PageSealer`] seals single pages, [`Sealed`] seals all pages of a [page
//! store](migration_core::store), and [`SealedVersions`] seals whole checkpoints and snapshots.
//!
//! Features, both on by default: `accelerated` (ciphers of AWS-LC) and `tls` (TLS certificates).
#![deny(unsafe_code)]

pub mod aead;
mod channel;
#[doc(hidden)]
pub mod fixed_key;
mod handshake;
pub mod keys;
mod page;
mod page_store;
pub mod record;
mod secret;
mod secure;
mod session;
mod store;
mod suite;
#[cfg(test)]
mod tests;

#[cfg(feature = "tls")]
pub use handshake::tls::TlsIdentity;
pub use {
    handshake::HandshakeError,
    keys::{KeyError, Psk, PublicKey, StaticKey},
    page::{PageError, PageSealer, Purpose, SEAL_OVERHEAD},
    page_store::{Sealed, random_namespace},
    record::{KeyLimits, RecordError},
    secure::{Credentials, SecureConnector, SecureListener, Security, SourceSession},
    store::SealedVersions,
    suite::{Suite, UnknownSuite},
};

/// The example of `README.md`, which is run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
