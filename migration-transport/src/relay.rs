//! A TCP relay that can be cut, stalled, delayed and slowed down, for tests with a bad network.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use socket2::SockRef;

use crate::{Address, Bandwidth, Limiter, limit::Class};

/// The largest number of bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// The largest number of chunks in transit in one direction of a connection: 64 MiB, for long
/// delays.
const MAX_IN_TRANSIT: usize = 1024;

/// Forwards TCP connections from a port of its own on 127.0.0.1 to a target.
///
/// It runs threads of its own, which end when it is dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    /// A limit for each direction.
    limits: [Limiter; 2],
    ended: AtomicBool,
}

/// A function that finds the position of a cut in bytes that are about to be forwarded.
type Place = Box<dyn FnMut(&[u8]) -> Option<usize> + Send>;

#[derive(Default)]
struct State {
    relayed: u64,
    limit: Option<u64>,
    place: Option<Place>,
    cut: bool,
    stalled: bool,
    delay: Duration,
    connections: Vec<(TcpStream, TcpStream)>,
    pumps: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay to `target`.
    ///
    /// # Errors
    /// Fails if no port is free or no thread can be started.
    pub fn new(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            state: Mutex::default(),
            changed: Condvar::new(),
            limits: [(); 2].map(|()| Limiter::new(Bandwidth::UNLIMITED)),
            ended: AtomicBool::new(false),
        });
        let (incoming, to_accept) = (listener.try_clone()?, Arc::clone(&shared));
        let accepting = thread::Builder::new().name("relay".into()).spawn(move || to_accept.accept(&incoming))?;
        Ok(Self { shared, listener, address, accepting: Some(accepting) })
    }

    /// Returns the address of the relay, to which the source connects.
    pub fn address(&self) -> Address {
        self.address.into()
    }

    /// Cuts all connections as soon as `bytes` further bytes have been forwarded, counted over all
    /// connections and both directions. These bytes still arrive.
    pub fn cut_after(&self, bytes: u64) {
        let mut state = self.shared.lock();
        state.limit = Some(state.relayed.saturating_add(bytes));
        if bytes == 0 {
            state.cut();
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Cuts all connections at the position that `place` returns for bytes that are about to be
    /// forwarded in either direction. The bytes before the position still arrive. `place` gets the
    /// bytes in the pieces in which the socket returned them. A message that is sent after waiting
    /// for an answer is in one piece.
    pub fn cut_where(&self, place: impl FnMut(&[u8]) -> Option<usize> + Send + 'static) {
        self.shared.lock().place = Some(Box::new(place));
    }

    /// Cuts all connections now. Both ends see the end of the stream, or a reset when they send.
    /// New connections end at once in the same way, until [`restore`](Self::restore).
    pub fn cut(&self) {
        self.shared.lock().cut();
        self.shared.changed.notify_all();
    }

    /// Stops forwarding without closing connections, as if a cable was pulled, until
    /// [`restore`](Self::restore).
    pub fn stall(&self) {
        self.shared.lock().stalled = true;
    }

    /// Ends a cut or a stall. Connections that were cut stay cut; new connections work.
    pub fn restore(&self) {
        let mut state = self.shared.lock();
        (state.cut, state.stalled, state.limit, state.place) = (false, false, None, None);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Delays each later byte by `delay` in each direction.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.lock().delay = delay;
    }

    /// Limits the bandwidth of each direction, over all connections.
    pub fn set_bandwidth(&self, bandwidth: Bandwidth) {
        for limit in &self.shared.limits {
            limit.set_bandwidth(bandwidth);
        }
    }

    /// Returns the number of bytes forwarded so far over all connections in both directions.
    pub fn relayed(&self) -> u64 {
        self.shared.lock().relayed
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // on Linux this wakes a blocked accept
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        self.shared.lock().cut();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let mut state = self.shared.lock();
        state.cut(); // what was accepted in between
        let pumps = std::mem::take(&mut state.pumps);
        drop(state);
        self.shared.changed.notify_all();
        self.set_bandwidth(Bandwidth::UNLIMITED);
        for pump in pumps {
            let _ = pump.join();
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("relayed", &self.relayed).field("cut", &self.cut).finish_non_exhaustive()
    }
}

impl State {
    /// Returns how many bytes of a chunk may pass before the cut, or `None` if the cut is not in
    /// this chunk.
    fn grant(&mut self, chunk: &[u8]) -> Option<usize> {
        let left = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.relayed));
        let by_count = usize::try_from(left).ok().filter(|left| *left <= chunk.len());
        let by_place = self.place.as_mut().and_then(|place| place(chunk)).filter(|place| *place <= chunk.len());
        by_count.into_iter().chain(by_place).min()
    }

    fn cut(&mut self) {
        self.cut = true;
        for (near, far) in self.connections.drain(..) {
            for socket in [&near, &far] {
                // Data that was written before still arrives, followed by the end of the stream.
                // The peer's later data is answered by a reset. Threads that are blocked in the
                // socket wake up.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.ended() {
            match listener.accept() {
                // a connection that cannot be forwarded is closed, which the test notices
                Ok((near, _)) => drop(self.forward(near)),
                Err(_) if self.ended() => return,
                Err(_) => thread::yield_now(),
            }
        }
    }

    fn forward(self: &Arc<Self>, near: TcpStream) -> io::Result<()> {
        if self.lock().cut {
            return Ok(());
        }
        let far = TcpStream::connect(self.target)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let ends = (near.try_clone()?, far.try_clone()?);
        let pumps = [(near.try_clone()?, far.try_clone()?), (far, near)];
        let mut state = self.lock();
        if state.cut {
            return Ok(());
        }
        state.connections.push(ends);
        for (limit, (from, to)) in self.limits.iter().zip(pumps) {
            let (sender, receiver) = sync_channel(MAX_IN_TRANSIT);
            let (reading, writing, limit) = (Arc::clone(self), Arc::clone(self), limit.clone());
            state.pumps.push(thread::spawn(move || reading.read(from, &sender)));
            state.pumps.push(thread::spawn(move || writing.write(to, &receiver, &limit)));
        }
        Ok(())
    }

    fn read(&self, mut from: TcpStream, sender: &SyncSender<(Instant, Vec<u8>)>) {
        let mut chunk = vec![0; CHUNK];
        while let Ok(len @ 1..) = from.read(&mut chunk) {
            let due = Instant::now() + self.lock().delay;
            if sender.send((due, chunk[..len].to_vec())).is_err() {
                return;
            }
        }
    }

    fn write(&self, mut to: TcpStream, receiver: &Receiver<(Instant, Vec<u8>)>, limit: &Limiter) {
        while let Ok((due, chunk)) = receiver.recv() {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if !limit.pass(Class::Bulk, chunk.len() as u64, &self.ended) {
                return;
            }
            let mut state = self.lock();
            while state.stalled && !state.cut {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.cut {
                return;
            }
            let granted = state.grant(&chunk);
            let len = granted.unwrap_or(chunk.len());
            state.relayed += len as u64;
            if granted.is_some() {
                // the lock is held until the cut, because a test that sees the new number of
                // bytes may restore the link at once
                let _ = to.write_all(&chunk[..len]);
                return state.cut();
            }
            drop(state);
            if to.write_all(&chunk[..len]).is_err() {
                return;
            }
        }
        // the sender has closed this direction without an error
        let _ = to.shutdown(Shutdown::Write);
    }
}
