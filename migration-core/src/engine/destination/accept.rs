//! The accept loop of a receiver. It starts a thread for each connection. The number of connections
//! and threads has limits that no peer can change.

use super::*;
use crate::wire::MAX_DEMAND_LANES;

/// Returns the largest number of connection threads of a receiver of this many VMs: one for each
/// unidentified connection and each lane of the largest sessions, and as many again because some
/// threads are about to end.
fn max_threads(vms: usize) -> usize {
    let session = usize::from(MAX_STREAMS + MAX_DEMAND_LANES) + 4;
    let sessions = session.saturating_mul(vms.max(1));
    sessions.saturating_add(connections::MAX_SILENT + connections::MAX_GREETING).saturating_mul(2)
}

/// The longest time to send the reason to a connection that is refused for lack of resources.
const LAST_WORD: Duration = Duration::from_millis(200);

/// The accept loop.
pub(super) struct Accepting {
    destination: Arc<Destination>,
    threads: HashMap<u64, Box<dyn Joiner>>,
    ended_tx: mpsc::Sender<u64>,
    ended: mpsc::Receiver<u64>,
    next: u64,
    /// Whether the observer was informed that no connection can be accepted. Reset by the next
    /// connection.
    told: bool,
}

impl Accepting {
    pub(super) fn new(destination: Arc<Destination>) -> Self {
        let (ended_tx, ended) = mpsc::channel();
        Self { destination, threads: HashMap::new(), ended_tx, ended, next: 0, told: false }
    }

    /// Waits for a connection for a short time, and starts a thread for it.
    ///
    /// # Errors
    /// Returns an error if the listener fails.
    pub(super) fn step(&mut self, listener: &mut dyn Listener) -> io::Result<()> {
        let common = &self.destination.common;
        lock(&common.connections).close_overdue(common.options.idle_timeout);
        for entry in self.destination.entries() {
            entry.end_attempt("the attempt has made too little progress for the time it took", Allowance::is_exceeded);
        }
        self.destination.sweep();
        self.reap(Duration::ZERO);
        if self.threads.len() >= max_threads(self.destination.common.options.max_vms) {
            // most of them are about to end
            self.reap(ACCEPT_TICK);
            return Ok(());
        }
        let accepted = listener.accept(ACCEPT_TICK)?;
        if let Some(error) = listener.trouble() {
            self.trouble(listener, &error);
        }
        let Some(channel) = accepted else { return Ok(()) };
        self.told = false;
        self.serve(channel);
        Ok(())
    }

    /// Joins all threads. Their connections are closed, so they end.
    pub(super) fn join(&mut self) {
        for (_, thread) in self.threads.drain() {
            thread.join();
        }
    }

    fn reap(&mut self, patience: Duration) {
        let first = self.ended.recv_timeout(patience).ok();
        for id in first.into_iter().chain(self.ended.try_iter()).collect::<Vec<_>>() {
            if let Some(thread) = self.threads.remove(&id) {
                thread.join();
            }
        }
    }

    /// Makes room for waiting connections that cannot be accepted. The oldest connection that has
    /// sent nothing is closed to free its descriptor. If there is no such connection, one of the
    /// waiting connections is accepted and refused with the reason.
    fn trouble(&mut self, listener: &mut dyn Listener, error: &io::Error) {
        if !std::mem::replace(&mut self.told, true) {
            let why = format!("no connection can be accepted at the moment: {}", Chain(error));
            self.destination.common.options.observer.event(&Event::Warning(why));
        }
        if lock(&self.destination.common.connections).close_oldest_silent(None) {
            return;
        }
        if let Some(channel) = listener.accept_to_refuse() {
            let peer = channel.peer();
            if let Ok(Halves { writer, .. }) = channel.split() {
                self.refuse(
                    writer,
                    &peer,
                    &format!("the destination cannot take another connection: {}", Chain(error)),
                );
            }
        }
    }

    fn serve(&mut self, channel: Box<dyn Channel>) {
        let (id, peer) = (self.next, channel.peer());
        self.next += 1;
        let Halves { reader, writer, closer } = match channel.split() {
            Ok(halves) => halves,
            Err(error) => return self.destination.common.bad_peer(&peer, &describe(&error)),
        };
        let closer: Arc<dyn Closer> = closer.into();
        if !lock(&self.destination.common.connections).enter(id, closer.clone()) {
            return;
        }
        // in a cell, from which the halves are taken back if no thread can be started
        let cell = Arc::new(Mutex::new(Some((reader, writer))));
        let body = || -> Box<dyn FnOnce() + Send> {
            let destination = self.destination.clone();
            let (name, ended, taken) = (peer.clone(), self.ended_tx.clone(), cell.clone());
            let closer = closer.clone();
            Box::new(move || {
                let halves = lock(&taken).take();
                if let Some((reader, writer)) = halves {
                    destination.serve(Incoming { id, reader, writer, closer }, &name);
                }
                lock(&destination.common.connections).remove(id);
                // fails if the loop has ended; the loop then joins all threads
                let _ = ended.send(id);
            })
        };
        match self.destination.common.spawn_for(id, body) {
            Ok(thread) => drop(self.threads.insert(id, thread)),
            Err(error) => {
                let halves = lock(&cell).take();
                lock(&self.destination.common.connections).remove(id);
                if let Some((_reader, writer)) = halves {
                    self.refuse(
                        writer,
                        &peer,
                        &format!("the destination has no thread for a connection: {}", Chain(&error)),
                    );
                }
            }
        }
    }

    /// Refuses a connection with the reason. The connection may be a lane of a session that waits
    /// for its lanes. If there is exactly one such session, it is ended with the same reason. If
    /// there are several, the session of the connection is not known: that session then ends by its
    /// time-out.
    fn refuse(&self, mut writer: Box<dyn WriteHalf>, peer: &str, why: &str) {
        self.destination.common.bad_peer(peer, why);
        // best effort: the connection ends either way
        if writer.set_idle_timeout(Some(LAST_WORD)).is_ok() {
            let mut control = ControlWriter::new(writer, peer.to_owned(), self.destination.common.bytes.clone());
            let _ = control.send(0, &Control::error(ErrorCode::Resources, why));
        }
        if let [session] = &self.destination.preparing()[..] {
            session.fail(ErrorCode::Resources, why);
        }
    }
}
