//! Channels for live migration (TCP, Unix sockets and memory) with a bandwidth limit, and stores in
//! files.
//!
//! The engine in `migration-core` uses only the traits of [`migration_core::channel`]. This crate
//! implements them on Linux:
//!
//! | | connect | accept |
//! |---|---|---|
//! | `tcp:HOST:PORT` | [`TcpConnector`] | [`TcpListener`] |
//! | `unix:PATH` | [`UnixConnector`] | [`UnixListener`] |
//! | in one process | [`memory::link`] | [`memory::link`] |
//! | a socket from elsewhere | [`StreamChannel::new`] | [`StreamChannel::new`] |
//!
//! [`connector`] and [`bind`] choose by [`Address`]. [`Limited`] applies a [`Bandwidth`] limit to
//! all lanes of a connector. Encryption wraps these channels and has a crate of its own: **nothing
//! here encrypts or authenticates**. So use this crate alone only on networks where everyone may
//! read and replace a VM's memory.
//!
//! Stores: [`DirVersions`] keeps the checkpoints of a VM in a directory, below
//! [`CheckpointFolders`] that both ends have. [`SnapshotFile`] keeps a snapshot in one file, and
//! [`FilePageStore`] keeps pages for several hosts. [`RamBroker`] keeps the memory files of VMs, so
//! that they outlive a VMM that dies, and a [`supervisor`] restarts such a VM. [`Wakeup`] wakes an
//! event loop that polls.
//!
//! # Example
//!
//! ```
//! use std::time::Duration;
//!
//! use migration_core::channel::{Connector, Listener};
//! use migration_transport::{Address, ConnectOptions, Limited, bind, connector};
//!
//! // the destination: port 0 chooses a free port, which `address` returns
//! let mut listener = bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let address: Address = listener.address().parse()?;
//!
//! // the source
//! let source = Limited::new(connector(&address, ConnectOptions::default()), "10Gbit/s".parse()?);
//! let mut near = source.connect()?.split()?;
//! near.writer.write_all(b"hello", &[])?;
//!
//! // the destination again
//! let far = listener.accept(Duration::from_secs(5))?.ok_or("no connection")?;
//! let mut far = far.split()?;
//! far.reader.set_idle_timeout(Some(Duration::from_secs(30)))?;
//! let mut word = [0; 5];
//! far.reader.read_exact(&mut word)?;
//! assert_eq!(&word, b"hello");
//!
//! // any thread can close the channel; blocked reads and writes return
//! far.closer.close();
//! assert!(near.reader.read_exact(&mut word).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How guest memory is transferred
//!
//! A write is one `sendmsg` with the frame's head and up to 1023 pieces of guest memory. A read is
//! one `recvmsg` into guest memory. No thread is started and nothing is copied in user space.
//! Throughput is best with writes of 0.5 to 1 MiB; `examples/throughput.rs` measures it on a host.
//!
//! # Behaviour of channels
//!
//! - An error ends a channel. It is then unknown how much was transferred.
//! - An idle time-out is for a peer that transfers no byte at all. If a part of a transfer was done
//!   when the time-out passes, the time-out starts again. So silence is noticed after one to two
//!   time-outs.
//! - A channel closes when both of its halves are dropped. If bytes from the peer are unread by
//!   then, TCP sends a reset, and the data written last may not arrive. So read to the end of the
//!   stream before closing, or let the peer send the last message.
//! - Name resolution is done by the system and blocks for as long as that takes.
//!
//! # Features
//!
//! `redis`: `RedisPageStore`, a page store in Valkey or Redis servers.
//!
//! `test-utils`: `Relay`, a TCP relay that can be cut, stalled, delayed and slowed down, and `Cut`,
//! which cuts links in memory at any byte.
#![deny(unsafe_code)]

mod accept;
mod atomic_file;
mod bandwidth;
mod broker;
mod fd_passing;
mod file_errors;
mod gather;
#[allow(unsafe_code)]
mod iovec;
mod lease;
mod limit;
pub mod memory;
mod options;
mod private_socket;
#[cfg(any(test, feature = "test-utils"))]
mod relay;
mod store;
mod stream;
pub mod supervisor;
mod tcp;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unix;
mod url;
mod wakeup;

use std::io;

use migration_core::channel::{Connector, Listener};

#[cfg(any(test, feature = "test-utils"))]
pub use memory::cut::Cut;
#[cfg(any(test, feature = "test-utils"))]
pub use relay::Relay;
#[cfg(feature = "redis")]
pub use store::{IdentityFiles, RedisHealth, RedisMemory, RedisPageStore, RedisPageStoreOptions, RedisUrl, TlsFiles};
pub use {
    accept::Shortage,
    atomic_file::AtomicFile,
    bandwidth::{Bandwidth, BandwidthError},
    broker::{BrokerClient, BrokerError, BrokerOptions, OwnerGone, RamBroker, RamLease, RetainedRam, RetrievedRam},
    fd_passing::{MAX_FILES, receive_files, send_files},
    lease::DirLeases,
    limit::{Limited, Limiter},
    options::{Congestion, ConnectOptions, SocketOptions},
    private_socket::listen_private,
    store::{
        AttemptFolders, CheckpointFolders, CheckpointKind, DirVersions, FilePageStore, FilePageStoreOptions,
        NamedStore, OpenStore, PlainStores, SnapshotFile, StoreUrl, StoreUrlError,
    },
    stream::StreamChannel,
    tcp::{TcpConnector, TcpListener},
    unix::{UnixConnector, UnixListener},
    url::{Address, AddressError, UNIX_PATH_MAX},
    wakeup::Wakeup,
};

/// Returns a connector to `address`. Nothing is opened yet.
pub fn connector(address: &Address, options: ConnectOptions) -> Box<dyn Connector> {
    match address {
        Address::Tcp { host, port } => Box::new(TcpConnector::new(host, *port, options)),
        Address::Unix(path) => Box::new(UnixConnector::new(path, options)),
    }
}

/// Listens at `address` with default options. Port 0 chooses a free port, which
/// [`Listener::address`] then returns.
///
/// # Errors
/// Fails if the address cannot be resolved or bound: see [`TcpListener::bind`] and
/// [`UnixListener::bind`].
pub fn bind(address: &Address) -> io::Result<Box<dyn Listener>> {
    bind_with(address, SocketOptions::default())
}

/// Listens at `address`. `options` apply to each accepted connection.
///
/// # Errors
/// Fails like [`bind`].
pub fn bind_with(address: &Address, options: SocketOptions) -> io::Result<Box<dyn Listener>> {
    Ok(match address {
        Address::Tcp { host, port } => Box::new(TcpListener::bind(host, *port, options)?),
        Address::Unix(path) => Box::new(UnixListener::bind(path, options)?),
    })
}

/// The programs of the documentation compile.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../README.md")]
    struct OwnReadme;

    #[doc = include_str!("../../README.md")]
    struct Readme;

    #[doc = include_str!("../../docs/receiver.md")]
    struct Receiver;
}
