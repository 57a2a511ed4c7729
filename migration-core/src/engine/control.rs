//! One end of a control lane: sends and receives whole frames.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    FOREIGN_BYTES, MigrationError,
    channel::{FILES_PER_BYTE, ReadHalf, WriteHalf},
    codec::DecodeError,
    describe_foreign_peer,
    text::describe,
    wire::{Control, Header},
};

/// The most bytes of a frame that are written at once.
const PIECE: usize = 64 << 10;

/// Sends frames, counts their bytes, and numbers them.
pub(super) struct ControlWriter {
    half: Box<dyn WriteHalf>,
    peer: String,
    sequence: u32,
    bytes: Arc<AtomicU64>,
    /// When the frames must have been written.
    deadline: Option<Instant>,
}

impl ControlWriter {
    pub(super) fn new(half: Box<dyn WriteHalf>, peer: String, bytes: Arc<AtomicU64>) -> Self {
        Self { half, peer, sequence: 0, bytes, deadline: None }
    }

    /// Sets the time after which nothing more is written, not even the rest of a frame that has
    /// begun. `None` means no limit.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
        self.half.set_deadline(deadline);
    }

    /// Sets how long a write may take while the peer accepts no byte.
    pub(super) fn set_idle_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.half.set_idle_timeout(Some(timeout))
    }

    /// Returns the write half of the channel. Used for a channel on which no frame was sent.
    pub(super) fn into_half(self) -> Box<dyn WriteHalf> {
        self.half
    }

    pub(super) fn send(&mut self, epoch: u32, frame: &Control) -> Result<(), MigrationError> {
        self.send_all(epoch, std::slice::from_ref(frame))
    }

    /// Sends several frames in one go, so that the peer is woken only once.
    pub(super) fn send_all(&mut self, epoch: u32, frames: &[Control]) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.append(&mut frame.encode(0, self.sequence, epoch));
            self.sequence = self.sequence.wrapping_add(1);
        }
        // The data is written in pieces. Each piece is counted, and the deadline is checked before
        // it, because on a slow link the whole takes long.
        for piece in bytes.chunks(PIECE) {
            self.in_time().map_err(MigrationError::link(&self.peer))?;
            self.half.write_all(piece, &[]).map_err(MigrationError::link(&self.peer))?;
            self.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Returns for how long the caller should not send a frame that can wait, because of a
    /// bandwidth limit.
    pub(super) fn ahead_of_limit(&self) -> Duration {
        self.half.ahead_of_limit()
    }

    /// Returns an error if the deadline has passed. The check is needed because not every channel
    /// observes the deadline by itself.
    fn in_time(&self) -> io::Result<()> {
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the time for the write is over"))
            }
            _ => Ok(()),
        }
    }

    /// Sends open files after the frames so far.
    pub(super) fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> Result<(), MigrationError> {
        self.half.send_files(files).map_err(MigrationError::link(&self.peer))?;
        self.bytes.fetch_add(files.len().div_ceil(FILES_PER_BYTE) as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Receives frames, and returns an error for a frame that is out of sequence.
pub(super) struct ControlReader {
    half: Box<dyn ReadHalf>,
    peer: String,
    sequence: u32,
    bytes: Arc<AtomicU64>,
    /// Whether the peer may be something else than a migration destination, because no frame has
    /// come from it yet.
    unknown: bool,
}

/// How long the peer has to finish its line after it was found to be no migration destination. The
/// line is only shown to the user, so little time is enough.
const STRANGER_PATIENCE: Duration = Duration::from_millis(200);

impl ControlReader {
    pub(super) fn new(half: Box<dyn ReadHalf>, peer: String, bytes: Arc<AtomicU64>) -> Self {
        Self { half, peer, sequence: 0, bytes, unknown: false }
    }

    /// Returns a reader for an address at which a destination is expected. If the first bytes are
    /// no frame, the error is [`MigrationError::ForeignPeer`].
    pub(super) fn of_destination(half: Box<dyn ReadHalf>, peer: String, bytes: Arc<AtomicU64>) -> Self {
        Self { unknown: true, ..Self::new(half, peer, bytes) }
    }

    /// Sets how long a read may take while no byte comes from the peer.
    pub(super) fn set_idle_timeout(&mut self, timeout: Duration) -> Result<(), MigrationError> {
        self.half.set_idle_timeout(Some(timeout)).map_err(MigrationError::link(&self.peer))
    }

    /// Receives exactly `count` open files, which follow the frames so far.
    pub(super) fn files(&mut self, count: usize) -> Result<Vec<OwnedFd>, MigrationError> {
        let files = self.half.receive_files(count).map_err(|cause| match cause.kind() {
            io::ErrorKind::InvalidData => DecodeError::invalid("open files", describe(&cause)).into(),
            _ => MigrationError::link(&self.peer)(cause),
        })?;
        self.bytes.fetch_add(count.div_ceil(FILES_PER_BYTE) as u64, Ordering::Relaxed);
        Ok(files)
    }

    /// Returns the next frame, and the epoch in its header.
    pub(super) fn read(&mut self) -> Result<(u32, Control), MigrationError> {
        let (header, body) = if std::mem::take(&mut self.unknown) {
            self.first_frame()?
        } else {
            read_frame(&mut *self.half, &mut self.sequence, &self.peer)?
        };
        self.bytes.fetch_add((Header::LEN + body.len()) as u64, Ordering::Relaxed);
        Ok((header.number, Control::decode(&header, &body)?))
    }
}

impl ControlReader {
    /// Returns the first frame of the connection. It is read byte by byte, because a peer that is
    /// no migration destination may send less than a header.
    fn first_frame(&mut self) -> Result<(Header, Vec<u8>), MigrationError> {
        let mut said = Vec::with_capacity(FOREIGN_BYTES);
        while said.len() < Header::LEN {
            let mut byte = [0];
            if let Err(cause) = self.half.read_exact(&mut byte) {
                let ended = matches!(cause.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
                let unanswered = "it closed the connection without an answer: is that a migration destination?";
                let cause = if ended && said.is_empty() { io::Error::new(cause.kind(), unanswered) } else { cause };
                return Err(MigrationError::link(&self.peer)(cause));
            }
            said.push(byte[0]);
            // In a header, the flags and the reserved bytes are zero.
            if matches!(said.len(), 2..=4) && byte[0] != 0 {
                return Err(self.stranger(said));
            }
        }
        let bytes = said.first_chunk().copied().unwrap_or([0; Header::LEN]);
        if Header::decode(&bytes).is_err() {
            return Err(self.stranger(said));
        }
        read_body(&mut *self.half, bytes, &mut self.sequence, &self.peer)
    }

    /// Reads more of what a foreign peer sends, up to the end of its line. Returns the error that
    /// shows it.
    fn stranger(&mut self, mut said: Vec<u8>) -> MigrationError {
        // If the time-out cannot be set, the one in force is used.
        let _ = self.half.set_idle_timeout(Some(STRANGER_PATIENCE));
        let mut byte = [0];
        while said.len() < FOREIGN_BYTES && !said.ends_with(b"\n") && self.half.read_exact(&mut byte).is_ok() {
            said.push(byte[0]);
        }
        MigrationError::ForeignPeer { peer: self.peer.clone(), what: describe_foreign_peer(&said) }
    }
}

/// Returns the header and body of the next frame of a lane, which must be in sequence. The header's
/// decoder has bounded the length of the body.
pub(super) fn read_frame(
    half: &mut dyn ReadHalf,
    sequence: &mut u32,
    peer: &str,
) -> Result<(Header, Vec<u8>), MigrationError> {
    let mut bytes = [0; Header::LEN];
    half.read_exact(&mut bytes).map_err(MigrationError::link(peer))?;
    read_body(half, bytes, sequence, peer)
}

/// Reads the rest of a frame whose header has these bytes.
fn read_body(
    half: &mut dyn ReadHalf,
    header: [u8; Header::LEN],
    sequence: &mut u32,
    peer: &str,
) -> Result<(Header, Vec<u8>), MigrationError> {
    let header = Header::decode(&header)?;
    if header.sequence != *sequence {
        let why = format!("frame {} where {} is due", header.sequence, sequence);
        return Err(DecodeError::invalid("sequence", why).into());
    }
    if header.vm != 0 {
        return Err(DecodeError::invalid("vm", format!("no VM {} in this session", header.vm)).into());
    }
    *sequence = sequence.wrapping_add(1);
    let mut body = vec![0; header.body as usize];
    half.read_exact(&mut body).map_err(MigrationError::link(peer))?;
    Ok((header, body))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::ram::RamSlice;

    /// A channel that gives these bytes, and then fails with this kind of error.
    struct Said(std::collections::VecDeque<u8>, io::ErrorKind);

    impl ReadHalf for Said {
        fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
            for byte in buf {
                *byte = self.0.pop_front().ok_or(self.1)?;
            }
            Ok(())
        }

        fn read_ram(&mut self, _slices: &[RamSlice<'_>]) -> io::Result<()> {
            unreachable!("no page comes on a control lane")
        }

        fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
            Ok(())
        }
    }

    fn first(said: &[u8], ends: io::ErrorKind) -> Result<(u32, Control), MigrationError> {
        let half = Box::new(Said(said.iter().copied().collect(), ends));
        ControlReader::of_destination(half, "tcp:there:1".into(), Arc::default()).read()
    }

    #[test]
    fn strangers_are_named_whether_they_close_or_stay_silent() {
        for ends in [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::TimedOut] {
            let http = first(b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n", ends).unwrap_err().to_string();
            let named = "tcp:there:1 is not a migration destination: it answers as an HTTP server does: \
                         \"HTTP/1.1 400 Bad Request\"";
            assert_eq!(http, named);
            // Fewer bytes than a header has.
            let short = first(b"220 hi\r\n", ends).unwrap_err().to_string();
            assert!(short.ends_with("it says \"220 hi\""), "{short}");
        }
        // The bytes have a header's zeros, but are no header.
        let database = [&[0x4a, 0, 0, 0, 10][..], &[b'x'; 40]].concat();
        let error = first(&database, io::ErrorKind::TimedOut).unwrap_err();
        assert!(matches!(error, MigrationError::ForeignPeer { .. }), "{error}");
    }

    /// A peer that accepts one piece, and no other one before `until`.
    struct Drips {
        until: Instant,
        taken: Arc<AtomicU64>,
        told: Arc<Mutex<Option<Instant>>>,
    }

    impl WriteHalf for Drips {
        fn write_all(&mut self, head: &[u8], _slices: &[RamSlice<'_>]) -> io::Result<()> {
            self.taken.fetch_add(head.len() as u64, Ordering::Relaxed);
            while Instant::now() < self.until {
                std::thread::yield_now();
            }
            Ok(())
        }

        fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
            Ok(())
        }

        fn set_deadline(&mut self, deadline: Option<Instant>) {
            *self.told.lock().unwrap() = deadline;
        }
    }

    #[test]
    fn a_deadline_ends_a_frame_between_its_pieces() {
        let deadline = Instant::now() + Duration::from_millis(200);
        let (taken, told, bytes) = (Arc::<AtomicU64>::default(), Arc::default(), Arc::<AtomicU64>::default());
        let half = Drips { until: deadline, taken: taken.clone(), told: Arc::clone(&told) };
        let mut control = ControlWriter::new(Box::new(half), "memory:".into(), bytes.clone());
        control.set_deadline(Some(deadline));
        // The channel below has the deadline, too: only the channel can check it within a piece.
        assert_eq!(*told.lock().unwrap(), Some(deadline));
        let large = Control::State(vec![0; 1 << 20].into());
        let Err(MigrationError::Link { cause, .. }) = control.send(1, &large) else { panic!("all of it was sent") };
        assert_eq!(cause.kind(), io::ErrorKind::TimedOut);
        assert_eq!((taken.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed)), (PIECE as u64, PIECE as u64));
        // Nothing is written after that either.
        assert!(control.send(1, &Control::Ping).is_err());
        assert_eq!(taken.load(Ordering::Relaxed), PIECE as u64);
        control.set_deadline(None);
        control.send(1, &large).unwrap();
    }

    #[test]
    fn what_says_nothing_is_no_stranger_and_a_frame_is_read() {
        for (ends, words) in [
            (io::ErrorKind::UnexpectedEof, "without an answer"),
            (io::ErrorKind::ConnectionReset, "without an answer"),
            (io::ErrorKind::TimedOut, "timed out"),
        ] {
            let error = first(b"", ends).unwrap_err();
            assert!(matches!(error, MigrationError::Link { .. }) && describe(&error).contains(words), "{error:?}");
        }
        let frame = Control::Ping.encode(0, 0, 7);
        assert_eq!(first(&frame, io::ErrorKind::TimedOut).unwrap(), (7, Control::Ping));
    }

    #[test]
    fn little_of_what_a_stranger_says_is_read() {
        for (said, read) in [
            (vec![b'x'; 1000], FOREIGN_BYTES),
            // Up to the end of the line.
            (b"HTTP/1.1 400 Bad Request\nServer: x\n".to_vec(), 25),
            // The second byte shows that this is no header.
            (b"20\n\n".to_vec(), 3),
        ] {
            let (rest, shared) = (said.len() - read, Arc::new(Mutex::new(said.iter().copied().collect())));
            let half = Box::new(Shared(Arc::clone(&shared)));
            let error = ControlReader::of_destination(half, "there".into(), Arc::default()).read().unwrap_err();
            assert!(matches!(error, MigrationError::ForeignPeer { .. }), "{error}");
            assert_eq!(shared.lock().unwrap().len(), rest, "{:?}", String::from_utf8_lossy(&said));
        }
    }

    /// A channel that gives the bytes that are left, which a test can count.
    struct Shared(Arc<Mutex<std::collections::VecDeque<u8>>>);

    impl ReadHalf for Shared {
        fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
            for byte in buf {
                *byte = self.0.lock().unwrap().pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            }
            Ok(())
        }

        fn read_ram(&mut self, _slices: &[RamSlice<'_>]) -> io::Result<()> {
            unreachable!("no page comes on a control lane")
        }

        fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
            Ok(())
        }

        fn receive_files(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
            match count {
                0 => Ok(Vec::new()),
                1 => Err(io::Error::new(io::ErrorKind::InvalidData, "another number of files")),
                _ => Err(io::ErrorKind::Unsupported.into()),
            }
        }
    }

    #[test]
    fn a_peer_that_sends_other_files_is_wrong_and_a_link_that_carries_none_has_failed() {
        let mut control = ControlReader::new(Box::new(Shared(Arc::default())), "there".into(), Arc::default());
        assert!(control.files(0).is_ok());
        let error = control.files(1).unwrap_err();
        assert!(matches!(error, MigrationError::Malformed(_)), "{error}");
        assert!(describe(&error).contains("another number of files"), "{error}");
        let error = control.files(2).unwrap_err();
        assert!(matches!(error, MigrationError::Link { .. }), "{error}");
    }

    /// A channel that accepts everything, and records the time-outs.
    struct Timed(Arc<Mutex<Vec<Option<Duration>>>>);

    impl WriteHalf for Timed {
        fn write_all(&mut self, _head: &[u8], _slices: &[RamSlice<'_>]) -> io::Result<()> {
            Ok(())
        }

        fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
            self.0.lock().unwrap().push(timeout);
            Ok(())
        }
    }

    #[test]
    fn the_time_out_of_a_writer_is_that_of_its_channel() {
        let set = Arc::default();
        let mut control = ControlWriter::new(Box::new(Timed(Arc::clone(&set))), "there".into(), Arc::default());
        control.set_idle_timeout(Duration::from_secs(7)).unwrap();
        assert_eq!(*set.lock().unwrap(), [Some(Duration::from_secs(7))]);
    }
}
