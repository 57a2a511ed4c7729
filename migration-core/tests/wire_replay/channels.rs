//! Channels in memory.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    time::Duration,
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Halves, Listener, ReadHalf, WriteHalf},
};

use crate::HANG;
/// One direction of a channel.
#[derive(Default)]
pub(crate) struct Pipe {
    pub(crate) state: Mutex<PipeState>,
    pub(crate) changed: Condvar,
}

#[derive(Default)]
pub(crate) struct PipeState {
    pub(crate) bytes: VecDeque<u8>,
    /// No byte will follow.
    pub(crate) ended: bool,
    /// Both ends are cut: what is left is lost.
    pub(crate) closed: bool,
    /// The reader is gone.
    pub(crate) unread: bool,
    /// Who wrote here does not read the other direction any more.
    pub(crate) deaf: bool,
    /// The peer has vanished without a word: nothing comes, not even an end.
    pub(crate) silent: bool,
}

impl Pipe {
    /// Locks, also while a test fails.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut PipeState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    pub(crate) fn wait(&self, what: &str, done: impl Fn(&PipeState) -> bool) -> MutexGuard<'_, PipeState> {
        let (guard, waited) = self.changed.wait_timeout_while(self.lock(), HANG, |s| !done(s)).unwrap();
        if waited.timed_out() {
            drop(guard);
            panic!("hangs: {what}");
        }
        guard
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        if state.closed || state.unread || state.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.bytes.extend(bytes);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn read(&self, to: &mut [u8], idle: Option<Duration>) -> io::Result<()> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if state.bytes.len() >= to.len() {
                state.bytes.drain(..to.len()).zip(to).for_each(|(from, to)| *to = from);
                self.changed.notify_all();
                return Ok(());
            }
            if state.ended {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if state.silent && idle.is_some() {
                // no need to look at the clock: nothing will ever come
                return Err(io::ErrorKind::TimedOut.into());
            }
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// A channel: what this end receives, and what it sends.
pub(crate) struct End {
    pub(crate) incoming: Arc<Pipe>,
    pub(crate) outgoing: Arc<Pipe>,
    /// Gets a copy of what is sent, when a stream is recorded.
    pub(crate) tap: Option<Arc<Mutex<Vec<u8>>>>,
    /// Ends the channel, both ways, after so many bytes were sent.
    pub(crate) cut: Option<Arc<Cut>>,
}

/// How many bytes may still be sent.
pub(crate) struct Cut(Mutex<usize>);

impl Cut {
    pub(crate) fn new(after: usize) -> Self {
        Self(Mutex::new(after))
    }
}

pub(crate) fn pair() -> (End, End) {
    let (a, b) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    (
        End { incoming: a.clone(), outgoing: b.clone(), tap: None, cut: None },
        End { incoming: b, outgoing: a, tap: None, cut: None },
    )
}

impl Channel for End {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let closer = Ends { incoming: self.incoming.clone(), outgoing: self.outgoing.clone() };
        let reader = PipeReader { pipe: self.incoming.clone(), answers: self.outgoing.clone(), idle: None };
        let writer = PipeWriter { pipe: self.outgoing, answers: self.incoming.clone(), tap: self.tap, cut: self.cut };
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        "memory".into()
    }
}

pub(crate) struct PipeReader {
    pub(crate) pipe: Arc<Pipe>,
    pub(crate) answers: Arc<Pipe>,
    pub(crate) idle: Option<Duration>,
}

impl ReadHalf for PipeReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.pipe.read(buf, self.idle)
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        for slice in slices {
            let mut bytes = vec![0; slice.len()];
            self.pipe.read(&mut bytes, self.idle)?;
            slice.copy_from(&bytes);
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        Ok(())
    }

    /// Files take no bytes here: what a peer would send are empty ones.
    fn receive_files(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
        (0..count).map(|_| Ok(File::open("/dev/null")?.into())).collect()
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.pipe.update(|s| s.unread = true);
        self.answers.update(|s| s.deaf = true);
    }
}

pub(crate) struct PipeWriter {
    pub(crate) pipe: Arc<Pipe>,
    pub(crate) answers: Arc<Pipe>,
    pub(crate) cut: Option<Arc<Cut>>,
    pub(crate) tap: Option<Arc<Mutex<Vec<u8>>>>,
}

impl WriteHalf for PipeWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut bytes = head.to_vec();
        for slice in slices {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        if let Some(tap) = &self.tap {
            tap.lock().unwrap().extend_from_slice(&bytes);
        }
        if let Some(cut) = &self.cut {
            let mut left = cut.0.lock().unwrap();
            if *left < bytes.len() {
                // every second cut also loses what is under way
                let lost = *left % 2 == 0;
                let _ = self.pipe.write(&bytes[..*left]);
                *left = 0;
                self.pipe.update(|s| (s.ended, s.closed) = (true, lost));
                self.answers.update(|s| (s.ended, s.closed) = (true, lost));
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            *left -= bytes.len();
        }
        self.pipe.write(&bytes)
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        self.pipe.update(|s| s.ended = true);
    }
}

pub(crate) struct Ends {
    pub(crate) incoming: Arc<Pipe>,
    pub(crate) outgoing: Arc<Pipe>,
}

impl Closer for Ends {
    fn close(&self) {
        // as with a socket that is shut down, what was sent before still arrives
        self.incoming.update(|s| s.closed = true);
        self.outgoing.update(|s| s.ended = true);
    }
}

/// Accepts what is sent to it; `None` only wakes the receiver.
pub(crate) struct Door(pub(crate) mpsc::Receiver<Option<End>>);

impl Listener for Door {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let end = self.0.recv_timeout(timeout).unwrap_or(None);
        Ok(end.map(|end| Box::new(end) as Box<dyn Channel>))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}
