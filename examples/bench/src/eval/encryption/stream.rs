//! A stream of bytes over the link of a migration, like that of a network application.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, setns};

use crate::bench::encrypt::{Link, Shaper};

/// The bytes of a write.
const PIECE: usize = 64 << 10;

/// A TCP connection to the destination's end of the link that sends as fast as possible, until it
/// is dropped.
pub(super) struct Stream {
    received: Arc<AtomicU64>,
    ends: [TcpStream; 2],
    threads: Vec<JoinHandle<()>>,
}

/// Listens at the destination's end. A socket belongs to the network namespace of the thread that
/// made it.
fn listen(link: Link) -> Result<TcpListener, String> {
    let listen = move || {
        if link == Link::Shaped {
            let path = format!("/run/netns/{}", Shaper::NAMESPACE);
            let namespace = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| format!("{path}: {e}"))?;
        }
        TcpListener::bind((link.host(), 0)).map_err(|e| format!("{}: {e}", link.host()))
    };
    thread::spawn(listen).join().map_err(|_| "the listening thread panicked".to_owned())?
}

impl Stream {
    pub(super) fn start(link: Link) -> Result<Self, String> {
        let said = |e: std::io::Error| format!("the stream beside the migration: {e}");
        let listener = listen(link)?;
        let mut from = TcpStream::connect(listener.local_addr().map_err(said)?).map_err(said)?;
        let (mut to, _) = listener.accept().map_err(said)?;
        let ends = [from.try_clone().map_err(said)?, to.try_clone().map_err(said)?];
        let received = Arc::new(AtomicU64::new(0));
        let count = received.clone();
        let sender = thread::spawn(move || while from.write_all(&[0x5a; PIECE]).is_ok() {});
        let receiver = thread::spawn(move || {
            let mut piece = [0; PIECE];
            while let Ok(n @ 1..) = to.read(&mut piece) {
                count.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
        Ok(Self { received, ends, threads: vec![sender, receiver] })
    }

    /// Returns the number of bytes that have arrived.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        for end in &self.ends {
            // it may be closed already
            let _ = end.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // a thread that panicked has no result
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn bytes_arrive_until_it_ends() {
        let stream = Stream::start(Link::Loopback).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while stream.received() < 1 << 20 {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
        }
        drop(stream);
    }
}
