//! Tests of secure channels over links in memory.

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    GuestRam, HeapRam, RamLayout, RamRegion, RamSlice,
    channel::{Channel, Connector, Halves, Listener, WriteHalf},
    wire::{Control, ErrorCode, Header, LaneKind, MAGIC, Preamble, SessionToken},
};
use migration_transport::memory;

use crate::{
    Credentials, HandshakeError, KeyLimits, Psk, SecureConnector, SecureListener, Security, SourceSession, StaticKey,
    Suite, aead::RustCrypto,
};

mod attacks;
#[cfg(feature = "tls")]
mod certificates;
mod pairs;
mod wrappers;

fn psk(key: u8) -> Security {
    let security = Security::new(Credentials::Psk(Psk::new([key; 32])));
    // long, because only the tests of time-outs depend on it
    Security { handshake_timeout: Duration::from_secs(60), ..security }
}

fn statics(own: u8, peer: u8) -> Security {
    let peer = StaticKey::new([peer; 32]).public();
    Security::new(Credentials::Static { own: StaticKey::new([own; 32]), peer })
}

/// A source and a destination that are connected by one link.
struct Pair {
    source: SourceSession,
    connector: SecureConnector,
    plain: memory::MemoryConnector,
    listener: SecureListener,
}

impl Pair {
    fn new(source: Security, destination: Security) -> Self {
        let (plain, listener) = memory::link(4 << 20);
        let source = SourceSession::new(source);
        let connector = source.connector(Box::new(plain.clone()));
        Self { source, connector, plain, listener: SecureListener::new(Box::new(listener), destination) }
    }

    /// Opens a channel and returns both ends. The source writes one byte and the destination reads
    /// it, which makes the destination run the handshake.
    fn open(&mut self, kind: LaneKind) -> (io::Result<Halves>, io::Result<Halves>) {
        let (connector, listener) = (&self.connector, &mut self.listener);
        thread::scope(|scope| {
            let there = scope.spawn(|| accept(listener));
            let here = connector.connect_as(kind).and_then(|channel| channel.split()).and_then(|mut halves| {
                halves.writer.write_all(b"!", &[])?;
                Ok(halves)
            });
            (here, there.join().unwrap())
        })
    }

    fn open_well(&mut self, kind: LaneKind) -> (Halves, Halves) {
        let (here, there) = self.open(kind);
        (here.unwrap(), there.unwrap())
    }
}

fn accept(listener: &mut dyn Listener) -> io::Result<Halves> {
    let channel = listener.accept(Duration::from_secs(60))?.ok_or(io::ErrorKind::TimedOut)?;
    let mut halves = channel.split()?;
    let mut word = [0];
    halves.reader.read_exact(&mut word)?;
    assert_eq!(&word, b"!");
    Ok(halves)
}

fn why(error: &io::Error) -> &HandshakeError {
    error.get_ref().and_then(|e| e.downcast_ref()).unwrap_or_else(|| panic!("no handshake error: {error:?}"))
}

fn ram(pages: u64) -> HeapRam {
    HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: pages * 4096 }]).unwrap()).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}
