//! How a channel becomes secure: both sides prove who they are and agree on a secret that nobody else has, then or later.
//!
//! The source sends a [`Preface`] and a first message, the destination answers, and the source proves by its first record, an
//! empty one, that it is here now. The messages are Noise's (`NNpsk0` for a common key, `KK` for static keys) or TLS 1.3's.
//! A further channel of a session runs `NNpsk0` again, keyed by a secret of that session: fresh ephemeral keys, no
//! certificates, and no other session's lane will do.

pub(crate) mod noise;
pub(crate) mod preface;
#[cfg(feature = "tls")]
pub(crate) mod tls;

use std::{
    error::Error,
    io,
    time::{Duration, Instant},
};

use migration_core::{
    STRANGER_BYTES,
    channel::{ReadHalf, WriteHalf},
    describe_stranger,
    wire::{Control, ErrorCode, Header},
};
use thiserror::Error;

use crate::{Suite, secret::Secret, suite};

/// Largest message of a handshake in one piece; a Noise message here has about a hundred bytes.
pub(crate) const MAX_MESSAGE: usize = 1024;
/// First bytes of what a destination answers to a preface.
const ANSWER: [u8; 4] = *b"SEAL";
/// How long something else than a destination has to finish what it says. It is only shown.
const STRANGER_PATIENCE: Duration = Duration::from_millis(200);
/// Bytes of a refused peer that are read, so that it gets to read why it was refused.
const DRAIN: usize = 16 << 10;

/// Why no secure channel came about. Its text has that of its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The source does not encrypt.
    #[error("this destination takes only encrypted migrations: encrypt at the source, too, with the same kind of key")]
    PlainPeer,
    /// The source does not speak this protocol at all.
    #[error("the peer speaks neither this protocol nor its plain form")]
    Stranger,
    /// Something else than a migration destination listens there.
    #[error("this is not a migration destination: {0}")]
    NotADestination(String),
    /// The other side speaks another version of the handshake.
    #[error("the source's handshake is of version {0}, this destination's of version {VERSION}", VERSION = preface::VERSION)]
    Version(u8),
    /// A preface or a message makes no sense.
    #[error("malformed handshake: {0}")]
    Malformed(&'static str),
    /// The source proves itself in another way than this destination asks for.
    #[error("the source comes with {theirs}, this destination wants {ours}")]
    Credentials {
        /// What the source has.
        theirs: &'static str,
        /// What the destination has.
        ours: &'static str,
    },
    /// The other side does not have the key that is expected of it.
    #[error(
        "the peer is not the one expected: its {0} is another one; check the key at both sides, and that the address is right"
    )]
    WrongKey(&'static str),
    /// No cipher in common.
    #[error("no cipher in common: the source offers {offered}, this destination takes {taken}")]
    Suites {
        /// What the source offers.
        offered: String,
        /// What the destination takes.
        taken: String,
    },
    /// A cipher was chosen that was not offered: somebody meddles.
    #[error(
        "the destination chose no cipher of those offered to it: somebody may meddle, or what listens there is something else"
    )]
    Downgrade,
    /// The session is not remembered here, or the lane was opened before.
    #[error(
        "no such session, or this lane of it was opened before: the destination may have been started anew, begin a new migration"
    )]
    UnknownSession,
    /// A lane was asked for before there was a session.
    #[error("the first channel of a session must be its control lane")]
    NoSession,
    /// The destination said no. This answer is not authenticated.
    #[error("the destination refuses: {text}")]
    Refused {
        /// The kind of reason.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
    /// The destination ended the connection instead of an answer.
    #[error("the destination closed the connection during the handshake: does it take encrypted migrations?")]
    Closed,
    /// The peer took too long.
    #[error("the peer was silent, or did not finish the handshake in time")]
    TimedOut,
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(#[source] Box<dyn Error + Send + Sync>),
    /// The operating system has no random bytes to give, or a primitive failed.
    #[error("cryptography failed: {0}")]
    Crypto(#[source] Box<dyn Error + Send + Sync>),
    /// The link failed.
    #[error(transparent)]
    Link(#[from] io::Error),
}

impl From<HandshakeError> for io::Error {
    fn from(error: HandshakeError) -> Self {
        let kind = match &error {
            HandshakeError::Link(cause) => cause.kind(),
            HandshakeError::TimedOut => io::ErrorKind::TimedOut,
            HandshakeError::Closed => io::ErrorKind::UnexpectedEof,
            HandshakeError::Refused { .. } => io::ErrorKind::ConnectionRefused,
            _ => io::ErrorKind::PermissionDenied,
        };
        Self::new(kind, error)
    }
}

impl HandshakeError {
    /// Under which code the source is told, if it shall be told anything.
    fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Link(_)
            | Self::TimedOut
            | Self::Stranger
            | Self::NotADestination(_)
            | Self::Closed
            | Self::Refused { .. } => None,
            Self::Version(_) => Some(ErrorCode::Version),
            Self::UnknownSession => Some(ErrorCode::UnknownSession),
            Self::Malformed(_) => Some(ErrorCode::Protocol),
            _ => Some(ErrorCode::Security),
        }
    }
}

/// What a handshake comes to.
pub(crate) struct Agreed {
    pub(crate) suite: Suite,
    /// Of this channel, or of the session if it is the first one.
    pub(crate) secret: Secret,
}

/// A channel during the handshake, which has to be over at a certain time.
pub(crate) struct Wire<'a> {
    pub(crate) reader: &'a mut dyn ReadHalf,
    pub(crate) writer: &'a mut dyn WriteHalf,
    pub(crate) deadline: Instant,
}

impl Wire<'_> {
    fn left(&self) -> Result<Duration, HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HandshakeError::TimedOut) } else { Ok(left) }
    }

    /// Fills `buf`. A peer that sends now and then a byte is never idle, so the clock is looked at after each: some hundreds in
    /// all, with certificates some thousands.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> Result<(), HandshakeError> {
        for piece in buf.chunks_mut(1) {
            let left = self.left()?;
            self.reader.set_idle_timeout(Some(left))?;
            self.reader.read_exact(piece).map_err(|error| match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => HandshakeError::TimedOut,
                _ => HandshakeError::Link(error),
            })?;
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let left = self.left()?;
        self.writer.set_idle_timeout(Some(left))?;
        Ok(self.writer.write_all(bytes, &[])?)
    }

    /// Sends an answer with this message.
    pub(crate) fn answer(&mut self, message: &[u8]) -> Result<(), HandshakeError> {
        let mut bytes = ANSWER.to_vec();
        // a message has at most MAX_MESSAGE bytes
        bytes.extend_from_slice(&(message.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(message);
        self.write(&bytes)
    }

    /// Receives an answer's message, or a refusal.
    pub(crate) fn read_answer(&mut self) -> Result<Vec<u8>, HandshakeError> {
        let closed = |error| match error {
            HandshakeError::Link(cause)
                if matches!(cause.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
            {
                HandshakeError::Closed
            }
            other => other,
        };
        let mut head = [0; 8];
        self.read(&mut head).map_err(closed)?;
        if head[..4] != ANSWER {
            return Err(self.refusal(&head).unwrap_or_else(|| self.stranger(&head)));
        }
        let len = usize::from(u16::from_le_bytes([head[4], head[5]]));
        if len > MAX_MESSAGE || head[6..] != [0; 2] {
            return Err(HandshakeError::Malformed("answer"));
        }
        let mut message = vec![0; len];
        self.read(&mut message).map_err(closed)?;
        Ok(message)
    }

    /// Reads some more of what something else than a destination says, to the end of its line.
    fn stranger(&mut self, begun: &[u8]) -> HandshakeError {
        let mut said = begun.to_vec();
        self.deadline = self.deadline.min(Instant::now() + STRANGER_PATIENCE);
        let mut byte = [0];
        while said.len() < STRANGER_BYTES && !said.ends_with(b"\n") && self.read(&mut byte).is_ok() {
            said.push(byte[0]);
        }
        HandshakeError::NotADestination(describe_stranger(&said))
    }

    /// A frame of the plain protocol says why there is no answer.
    fn refusal(&mut self, begun: &[u8; 8]) -> Option<HandshakeError> {
        // flags and what is reserved are zero in a header: without that, nobody waits for the rest of one
        if begun[1..4] != [0; 3] {
            return None;
        }
        let mut header = [0; Header::LEN];
        header[..begun.len()].copy_from_slice(begun);
        self.read(&mut header[begun.len()..]).ok()?;
        let header = Header::decode(&header).ok().filter(|header| header.body as usize <= MAX_MESSAGE)?;
        let mut body = vec![0; header.body as usize];
        self.read(&mut body).ok()?;
        match Control::decode(&header, &body).ok()? {
            Control::Error { code, text } => Some(HandshakeError::Refused { code, text }),
            _ => None,
        }
    }

    /// Tells a source why it is refused, in the plain protocol's words, which every source understands.
    pub(crate) fn refuse(&mut self, error: &HandshakeError) {
        let Some(code) = error.code() else { return };
        let refusal = Control::error(code, error.to_string()).encode(0, 0, 0);
        if self.write(&refusal).is_err() {
            return;
        }
        // what is unread when a connection closes makes some transports forget what was written last
        // it may end before that
        let _ = self.read(&mut [0; DRAIN]);
    }
}

/// The first of what is offered that is also taken, in the order of the destination.
pub(crate) fn choose(offered: &[Suite], taken: &[Suite]) -> Result<Suite, HandshakeError> {
    taken
        .iter()
        .copied()
        .find(|suite| offered.contains(suite))
        .ok_or_else(|| HandshakeError::Suites { offered: suite::names(offered), taken: suite::names(taken) })
}

#[cfg(test)]
mod tests;
