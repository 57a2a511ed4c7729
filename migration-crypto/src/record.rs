//! Records: the format of a lane's data on the wire. This module does no I/O.
//!
//! A record is a header of 8 bytes, the sealed plaintext, and a tag of 16 bytes.
//!
//! | offset | type | meaning |
//! |---|---|---|
//! | 0 | `u32` | bits 0 to 23: length of the plaintext in bytes; bit 24: last record of the stream; other bits 0 |
//! | 4 | `u32` | number of the key |
//!
//! The header is authenticated as associated data. The nonce consists of the number of the key and
//! the number of the record. The latter counts from the beginning of the direction and is not sent.
//! So a record that is replayed, dropped or moved is opened with the wrong nonce, and fails. Each
//! direction of each lane has a secret of its own, and each key of a direction is derived from the
//! one before by HKDF. So no nonce is used twice under one key.

use migration_core::RamSlice;
use thiserror::Error;

use crate::{
    Suite,
    aead::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN},
    secret::Secret,
};

/// The length of a record's header in bytes.
pub const HEADER_LEN: usize = 8;
/// The number of bytes that a record has beyond its plaintext.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// The largest plaintext of a record in bytes, whatever the sender chooses. A receiver's buffer
/// must have room for it.
pub const MAX_PLAINTEXT: usize = 1 << 20;
/// The smallest limit in bytes to which a sender may set the plaintext of its records.
pub const MIN_PLAINTEXT: usize = 64 << 10;

const FINAL: u32 = 1 << 24;
const LENGTH: u32 = FINAL - 1;

/// The limits after which a key is replaced by the next one. The sender chooses them; the receiver
/// follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLimits {
    /// The number of records under one key, at least 1.
    pub records: u64,
    /// The number of bytes under one key. The last record may exceed it.
    pub bytes: u64,
    /// The number of keys for one direction of one lane. After the last one the lane ends with
    /// [`RecordError::Exhausted`].
    pub keys: u32,
}

impl Default for KeyLimits {
    /// Returns limits of 2³² records and 64 GiB for each key. An attacker's advantage against GCM
    /// grows with the square of the number of blocks under one key; with 2³² blocks it is below
    /// 2⁻⁶⁰ (RFC 9001, appendix B, has the formulas). To replace a key takes about a microsecond.
    fn default() -> Self {
        Self { records: 1 << 32, bytes: 64 << 30, keys: u32::MAX }
    }
}

/// The reason why a record was refused or could not be sealed. The lane ends with it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// The record was changed, replayed, dropped or reordered, or belongs to another lane or
    /// session. It is not possible to find out which.
    #[error("a record is not authentic: it was changed, replayed, dropped, reordered, or belongs to another lane")]
    NotAuthentic,
    /// The header of the record is invalid.
    #[error("a record's header is invalid (does the peer encrypt?)")]
    Header,
    /// The record names neither the current key nor the next one.
    #[error("a record names key {found}, but key {expected} is in use")]
    Key {
        /// The number of the current key.
        expected: u32,
        /// The number in the header.
        found: u32,
    },
    /// A record came after the closing one.
    #[error("a record came after the last one")]
    AfterEnd,
    /// The stream ended without a closing record, so data may have been cut off.
    #[error("the stream was cut off: it ended without its closing record")]
    Truncated,
    /// All keys of this direction are used up. The caller can open a new lane.
    #[error("all keys of this lane are used up: open a new one")]
    Exhausted,
    /// An earlier record failed, so later ones cannot be trusted.
    #[error("an earlier record of this lane failed")]
    Broken,
}

/// The sequence of keys of one direction.
struct Keys {
    suite: Suite,
    backend: &'static dyn Backend,
    secret: Secret,
    key: Box<dyn AeadKey>,
    /// The number of the current key.
    number: u32,
    /// The number of the next record. It counts all records of the direction, whatever their key,
    /// so that a record dropped just before a change of keys is noticed.
    next: u64,
}

impl Keys {
    fn new(suite: Suite, backend: &'static dyn Backend, secret: Secret) -> Result<Self, RecordError> {
        let key = secret.key(suite, backend).map_err(|AeadError| RecordError::Broken)?;
        Ok(Self { suite, backend, secret, key, number: 0, next: 0 })
    }

    /// Replaces the key by the next one. The old key cannot be computed from the new one.
    fn update(&mut self) -> Result<(), RecordError> {
        self.number = self.number.checked_add(1).ok_or(RecordError::Exhausted)?;
        self.secret = self.secret.derive(&[b"next key"]);
        self.key = self.secret.key(self.suite, self.backend).map_err(|AeadError| RecordError::Broken)?;
        Ok(())
    }

    /// Returns the nonce of the next record and advances the counter.
    fn nonce(&mut self) -> Result<[u8; NONCE_LEN], RecordError> {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&self.number.to_le_bytes());
        nonce[4..].copy_from_slice(&self.next.to_le_bytes());
        self.next = self.next.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(nonce)
    }
}

/// Seals the records of one direction, in order.
pub(crate) struct RecordSealer {
    keys: Keys,
    limits: KeyLimits,
    /// The number of records under the current key.
    records: u64,
    bytes: u64,
    state: State,
}

/// Opens the records of one direction, in order.
pub(crate) struct RecordOpener {
    keys: Keys,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Broken,
}

impl State {
    fn check(self) -> Result<(), RecordError> {
        match self {
            Self::Open => Ok(()),
            Self::Ended => Err(RecordError::AfterEnd),
            Self::Broken => Err(RecordError::Broken),
        }
    }
}

impl RecordSealer {
    pub(crate) fn new(
        suite: Suite,
        backend: &'static dyn Backend,
        secret: Secret,
        limits: KeyLimits,
    ) -> Result<Self, RecordError> {
        Ok(Self { keys: Keys::new(suite, backend, secret)?, limits, records: 0, bytes: 0, state: State::Open })
    }

    /// Seals a record in place. `record` consists of [`HEADER_LEN`] bytes for the header, up to
    /// [`MAX_PLAINTEXT`] bytes of plaintext, and [`TAG_LEN`] bytes for the tag.
    pub(crate) fn seal(&mut self, record: &mut [u8], last: bool) -> Result<(), RecordError> {
        self.seal_or_break(record, None, last)
    }

    /// Seals guest memory into `record`, which must be [`OVERHEAD`] bytes longer than `from`.
    pub(crate) fn seal_from(&mut self, from: RamSlice<'_>, record: &mut [u8]) -> Result<(), RecordError> {
        self.seal_or_break(record, Some(from), false)
    }

    fn seal_or_break(&mut self, record: &mut [u8], from: Option<RamSlice<'_>>, last: bool) -> Result<(), RecordError> {
        self.state.check()?;
        let sealed = self.seal_next(record, from, last);
        self.state = match sealed {
            Ok(()) if last => State::Ended,
            Ok(()) => State::Open,
            Err(_) => State::Broken,
        };
        sealed
    }

    fn seal_next(&mut self, record: &mut [u8], from: Option<RamSlice<'_>>, last: bool) -> Result<(), RecordError> {
        let len = record.len().checked_sub(OVERHEAD).filter(|&len| len <= MAX_PLAINTEXT).ok_or(RecordError::Header)?;
        if self.records >= self.limits.records || self.bytes >= self.limits.bytes {
            if self.keys.number.saturating_add(1) >= self.limits.keys {
                return Err(RecordError::Exhausted);
            }
            self.keys.update()?;
            (self.records, self.bytes) = (0, 0);
        }
        let header = Header { len, last, key: self.keys.number }.encode();
        let nonce = self.keys.nonce()?;
        let (head, rest) = record.split_at_mut(HEADER_LEN);
        let (data, tag) = rest.split_at_mut(len);
        head.copy_from_slice(&header);
        let sealed = match from {
            Some(from) => self.keys.key.seal_from(&nonce, &header, from, data),
            None => self.keys.key.seal(&nonce, &header, data),
        };
        tag.copy_from_slice(&sealed.map_err(|AeadError| RecordError::Broken)?);
        self.records += 1;
        self.bytes = self.bytes.saturating_add(len as u64);
        Ok(())
    }
}

impl RecordOpener {
    pub(crate) fn new(suite: Suite, backend: &'static dyn Backend, secret: Secret) -> Result<Self, RecordError> {
        Ok(Self { keys: Keys::new(suite, backend, secret)?, state: State::Open })
    }

    /// Returns whether the closing record was opened.
    pub(crate) fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Returns the number of bytes that follow `header`. The header is not authenticated yet, so
    /// the number is only good as a bound.
    pub(crate) fn sealed_len(&self, header: &[u8; HEADER_LEN]) -> Result<usize, RecordError> {
        self.state.check()?;
        Ok(Header::decode(header)?.len + TAG_LEN)
    }

    /// Opens the record with this header in place. The plaintext is `sealed` without its last
    /// [`TAG_LEN`] bytes.
    pub(crate) fn open(&mut self, header: &[u8; HEADER_LEN], sealed: &mut [u8]) -> Result<(), RecordError> {
        self.open_or_break(header, sealed, None)
    }

    /// Opens the record with this header into guest memory of the length of its plaintext.
    pub(crate) fn open_into(
        &mut self,
        header: &[u8; HEADER_LEN],
        sealed: &mut [u8],
        to: RamSlice<'_>,
    ) -> Result<(), RecordError> {
        self.open_or_break(header, sealed, Some(to))
    }

    fn open_or_break(
        &mut self,
        header: &[u8; HEADER_LEN],
        sealed: &mut [u8],
        to: Option<RamSlice<'_>>,
    ) -> Result<(), RecordError> {
        self.state.check()?;
        let opened = self.open_next(header, sealed, to);
        self.state = match opened {
            Ok(true) => State::Ended,
            Ok(false) => State::Open,
            Err(_) => State::Broken,
        };
        opened.map(drop)
    }

    fn open_next(
        &mut self,
        header: &[u8; HEADER_LEN],
        sealed: &mut [u8],
        to: Option<RamSlice<'_>>,
    ) -> Result<bool, RecordError> {
        let Header { len, last, key } = Header::decode(header)?;
        if sealed.len() != len + TAG_LEN {
            return Err(RecordError::Header);
        }
        let expected = self.keys.number;
        if key != expected {
            // Only a step to the next key is accepted. A forged number costs at most one
            // derivation, and a lane opens nothing after a failure.
            if Some(key) != expected.checked_add(1) {
                return Err(RecordError::Key { expected, found: key });
            }
            self.keys.update()?;
        }
        let nonce = self.keys.nonce()?;
        let opened = match to {
            Some(to) => self.keys.key.open_into(&nonce, header, sealed, to),
            None => self.keys.key.open(&nonce, header, sealed),
        };
        opened.map_err(|AeadError| RecordError::NotAuthentic)?;
        Ok(last)
    }
}

struct Header {
    len: usize,
    last: bool,
    key: u32,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_LEN] {
        // cannot truncate: the length is at most MAX_PLAINTEXT
        let first = self.len as u32 | if self.last { FINAL } else { 0 };
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&first.to_le_bytes());
        bytes[4..].copy_from_slice(&self.key.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, RecordError> {
        let [a, b, c, d, e, f, g, h] = *bytes;
        let (first, key) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let len = (first & LENGTH) as usize;
        if first & !(LENGTH | FINAL) != 0 || len > MAX_PLAINTEXT {
            return Err(RecordError::Header);
        }
        Ok(Self { len, last: first & FINAL != 0, key })
    }
}

#[cfg(test)]
mod tests;
