//! The handshake that makes a channel secure: both sides prove who they are and agree on a secret.
//! Nobody else knows the secret, and nobody can compute it later (forward secrecy).
//!
//! The source sends a [`Preface`] and a first message, the destination answers, and the source
//! sends an empty record. The record proves that the source is present and that its messages are no
//! replay. The messages are those of Noise (`NNpsk0` for a pre-shared key, `KK` for static keys) or
//! of TLS 1.3. A further channel of a session runs `NNpsk0` again, keyed by a secret of that
//! session. This handshake has fresh ephemeral keys, needs no certificates, and fails for a lane of
//! another session.

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
    FOREIGN_BYTES,
    channel::{ReadHalf, WriteHalf},
    describe_foreign_peer,
    text::describe,
    wire::{Control, ErrorCode, Header},
};
use thiserror::Error;

use crate::{Suite, secret::Secret, suite};

/// The largest message of a handshake in bytes. Noise messages have about a hundred bytes here.
pub(crate) const MAX_MESSAGE: usize = 1024;
/// The first bytes of a destination's answer to a preface.
const ANSWER: [u8; 4] = *b"SEAL";
/// The longest time to wait for the rest of a line from a peer that is no destination. The line is
/// only shown in the error.
const UNIDENTIFIED_TIMEOUT: Duration = Duration::from_millis(200);
/// The number of bytes that are read from a refused peer before the channel is closed, so that the
/// peer can read the refusal.
const DRAIN_BYTES: usize = 16 << 10;

/// The reason why a handshake failed. Its text does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The source does not encrypt.
    #[error("this destination takes only encrypted migrations: encrypt at the source, too, with the same kind of key")]
    PlainPeer,
    /// The first bytes belong neither to the secure protocol nor to the plain one.
    #[error("the peer speaks neither this protocol nor its plain form")]
    Unidentified,
    /// The peer is no migration destination. The text describes its answer.
    #[error("this is not a migration destination: {0}")]
    NotADestination(String),
    /// The source speaks this other version of the handshake.
    #[error("the source's handshake is of version {0}, this destination's of version {VERSION}", VERSION = preface::VERSION)]
    Version(u8),
    /// A preface or a message is invalid. The text names it.
    #[error("malformed handshake: {0}")]
    Malformed(&'static str),
    /// The two sides use different kinds of credentials.
    #[error("the source uses {theirs}, this destination expects {ours}")]
    Credentials {
        /// The kind of the source's credentials.
        theirs: &'static str,
        /// The kind of the destination's credentials.
        ours: &'static str,
    },
    /// The peer does not have the expected key.
    #[error("the peer is not the one expected: its {0} is another one; check the keys of both sides and the address")]
    WrongKey(&'static str),
    /// The two sides have no cipher suite in common.
    #[error("no cipher in common: the source offers {offered}, this destination takes {accepted}")]
    Suites {
        /// The suites that the source offers.
        offered: String,
        /// The suites that the destination accepts.
        accepted: String,
    },
    /// The destination chose a suite that was not offered, so an attacker may have changed the
    /// messages.
    #[error("the destination chose a cipher that was not offered: the messages may have been changed on the way")]
    Downgrade,
    /// The destination does not remember the session, or the lane was opened before.
    #[error(
        "the session is unknown, or this lane was opened before: the destination may have been restarted; begin a new migration"
    )]
    UnknownSession,
    /// A lane was opened before the control channel, which begins the session.
    #[error("the first channel of a session must be its control lane")]
    NoSession,
    /// The destination refused the source. Its answer is not authenticated.
    #[error("the destination refuses: {text}")]
    Refused {
        /// The kind of the reason.
        code: ErrorCode,
        /// The reason in the destination's words.
        text: String,
    },
    /// The destination closed the connection instead of answering.
    #[error("the destination closed the connection during the handshake: does it take encrypted migrations?")]
    Closed,
    /// The peer was silent, or did not finish the handshake in time.
    #[error("the peer was silent, or did not finish the handshake in time")]
    TimedOut,
    /// The TLS library reported an error.
    #[error("TLS")]
    Tls(#[source] Box<dyn Error + Send + Sync>),
    /// The operating system returned no random bytes, or a cryptographic primitive failed.
    #[error("cryptography failed")]
    Crypto(#[source] Box<dyn Error + Send + Sync>),
    /// Reading from or writing to the link failed.
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
    /// Returns the code that is sent to the source, or `None` if the source is not informed.
    fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Link(_)
            | Self::TimedOut
            | Self::Unidentified
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

/// The result of a handshake.
pub(crate) struct Agreed {
    pub(crate) suite: Suite,
    /// The secret of this channel. That of the first channel is also the secret of the session.
    pub(crate) secret: Secret,
}

/// A channel during the handshake.
pub(crate) struct Wire<'a> {
    pub(crate) reader: &'a mut dyn ReadHalf,
    pub(crate) writer: &'a mut dyn WriteHalf,
    pub(crate) deadline: Instant,
}

impl Wire<'_> {
    fn time_left(&self) -> Result<Duration, HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HandshakeError::TimedOut) } else { Ok(left) }
    }

    /// Fills `buf`. Time-outs of the link measure idle time only, and a peer that sends a byte now
    /// and then is never idle. So the deadline is checked after each byte. A handshake has some
    /// hundreds of bytes, with certificates some thousands.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> Result<(), HandshakeError> {
        for piece in buf.chunks_mut(1) {
            let left = self.time_left()?;
            self.reader.set_idle_timeout(Some(left))?;
            self.reader.read_exact(piece).map_err(|error| match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => HandshakeError::TimedOut,
                _ => HandshakeError::Link(error),
            })?;
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let left = self.time_left()?;
        self.writer.set_idle_timeout(Some(left))?;
        Ok(self.writer.write_all(bytes, &[])?)
    }

    /// Sends `message` as an answer.
    pub(crate) fn answer(&mut self, message: &[u8]) -> Result<(), HandshakeError> {
        let mut bytes = ANSWER.to_vec();
        // cannot truncate: a message has at most MAX_MESSAGE bytes
        bytes.extend_from_slice(&(message.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(message);
        self.write(&bytes)
    }

    /// Receives the message of an answer. A refusal becomes an error.
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
            return Err(self.refusal(&head).unwrap_or_else(|| self.describe_unidentified(&head)));
        }
        let len = usize::from(u16::from_le_bytes([head[4], head[5]]));
        if len > MAX_MESSAGE || head[6..] != [0; 2] {
            return Err(HandshakeError::Malformed("answer"));
        }
        let mut message = vec![0; len];
        self.read(&mut message).map_err(closed)?;
        Ok(message)
    }

    /// Reads the rest of the first line from a peer that is no destination, and describes the peer.
    fn describe_unidentified(&mut self, begun: &[u8]) -> HandshakeError {
        let mut answer = begun.to_vec();
        self.deadline = self.deadline.min(Instant::now() + UNIDENTIFIED_TIMEOUT);
        let mut byte = [0];
        while answer.len() < FOREIGN_BYTES && !answer.ends_with(b"\n") && self.read(&mut byte).is_ok() {
            answer.push(byte[0]);
        }
        HandshakeError::NotADestination(describe_foreign_peer(&answer))
    }

    /// Reads a refusal, which is a frame of the plain protocol.
    fn refusal(&mut self, begun: &[u8; 8]) -> Option<HandshakeError> {
        // In a frame header these bytes are flags and reserved bytes, all zero. If they are not,
        // this is no refusal, and there is no rest to wait for.
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

    /// Reports `error` to the source, in a frame of the plain protocol, which every source
    /// understands.
    pub(crate) fn refuse(&mut self, error: &HandshakeError) {
        let Some(code) = error.code() else { return };
        let refusal = Control::error(code, describe(error)).encode(0, 0, 0);
        if self.write(&refusal).is_err() {
            return;
        }
        // Some transports discard the data written last if a connection closes with unread data. So
        // the rest is read first. That this fails is no error: the source may have closed the
        // connection.
        let _ = self.read(&mut [0; DRAIN_BYTES]);
    }
}

/// Returns the first suite of `accepted` that is also offered: the destination's order decides.
pub(crate) fn choose(offered: &[Suite], accepted: &[Suite]) -> Result<Suite, HandshakeError> {
    accepted
        .iter()
        .copied()
        .find(|suite| offered.contains(suite))
        .ok_or_else(|| HandshakeError::Suites { offered: suite::names(offered), accepted: suite::names(accepted) })
}

#[cfg(test)]
mod tests;
