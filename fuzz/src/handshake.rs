//! Handshakes of encrypted channels with a peer that says anything.

use std::{
    io::{self, Read},
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Connector, Halves, Listener, ReadHalf, WriteHalf},
};
use migration_crypto::{Credentials, Psk, SecureConnector, SecureListener, Security, StaticKey};

/// In the first byte of an input: the rest is what a source is answered, else what a destination is
/// sent.
pub const SOURCE: u8 = 4;
/// Static keys, else a common key.
const STATIC: u8 = 1;
/// The bytes begin as those of a peer that encrypts do.
const MAGIC: u8 = 2;

/// The first byte says which side and which keys are tried; the rest comes from the other side.
pub fn check(input: &[u8]) {
    let Some((&what, rest)) = input.split_first() else { return };
    let mut bytes = rest.to_vec();
    if what & MAGIC != 0 && what & SOURCE == 0 && bytes.len() > 9 {
        bytes[..9].copy_from_slice(b"LIVESEAL\x01");
    }
    let link = Script { bytes, sent: Arc::default() };
    if what & SOURCE != 0 {
        let connector = SecureConnector::new(Box::new(link), security(what, true));
        assert!(connector.connect().is_err(), "a source trusts a stranger");
        return;
    }
    let mut listener = SecureListener::new(Box::new(link), security(what, false));
    let Ok(Some(channel)) = listener.accept(Duration::ZERO) else { return };
    let Ok(mut halves) = channel.split() else { return };
    assert!(halves.reader.read_exact(&mut [0]).is_err(), "a destination trusts a stranger");
    assert!(halves.writer.write_all(b"secret", &[]).is_err(), "a destination talks to a stranger");
}

/// What a source sends first.
pub fn first_message(what: u8) -> Vec<u8> {
    let link = Script { bytes: Vec::new(), sent: Arc::default() };
    let sent = link.sent.clone();
    drop(SecureConnector::new(Box::new(link), security(what, true)).connect());
    let sent = sent.lock().unwrap_or_else(|e| e.into_inner());
    sent.clone()
}

fn security(what: u8, source: bool) -> Security {
    let (own, peer) = if source { ([1; 32], [2; 32]) } else { ([2; 32], [1; 32]) };
    Security::new(if what & STATIC == 0 {
        Credentials::Psk(Psk::new([7; 32]))
    } else {
        Credentials::Static { own: StaticKey::new(own), peer: StaticKey::new(peer).public() }
    })
}

/// A link whose other end says what was written down, and then ends.
#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) bytes: Vec<u8>,
    pub(crate) sent: Arc<Mutex<Vec<u8>>>,
}

struct Nothing;

impl Closer for Nothing {
    fn close(&self) {}
}

impl Connector for Script {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(self.clone()))
    }

    fn address(&self) -> String {
        "script".into()
    }
}

impl Listener for Script {
    fn accept(&mut self, _: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        Ok(Some(Box::new(self.clone())))
    }

    fn address(&self) -> String {
        "script".into()
    }
}

impl Channel for Script {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let reader = Box::new(Told(io::Cursor::new(self.bytes)));
        Ok(Halves { reader, writer: Box::new(Noted(self.sent)), closer: Box::new(Nothing) })
    }

    fn peer(&self) -> String {
        "script".into()
    }
}

pub(crate) struct Told(pub(crate) io::Cursor<Vec<u8>>);

impl ReadHalf for Told {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        Read::read_exact(&mut self.0, buf)
    }

    fn read_ram(&mut self, _: &[RamSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

struct Noted(Arc<Mutex<Vec<u8>>>);

impl WriteHalf for Noted {
    fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).extend_from_slice(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}
