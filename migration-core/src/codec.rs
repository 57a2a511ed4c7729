//! Bounded readers and writers for the fields of frames and state sections. All integers are
//! little-endian.

use thiserror::Error;

/// The reason why bytes could not be decoded.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end inside a field.
    #[error("{field}: truncated")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// Bytes are left after the last field.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// A length is above its limit.
    #[error("{field}: length {len} is above the limit of {limit}")]
    TooLong {
        /// The field.
        field: &'static str,
        /// The encoded length.
        len: u64,
        /// The largest accepted length.
        limit: u64,
    },
    /// A field has an invalid value.
    #[error("{field}: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// The reason why the value is invalid.
        why: String,
    },
    /// A checksum does not match.
    #[error("{field}: checksum mismatch")]
    Checksum {
        /// The data that the checksum covers.
        field: &'static str,
    },
}

impl DecodeError {
    /// Makes a [`DecodeError::Invalid`].
    pub fn invalid(field: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { field, why: why.into() }
    }
}

/// Reads fields from a byte slice. Never allocates memory for a length before checking it against a
/// limit.
///
/// The methods return [`DecodeError::Truncated`] if the bytes end inside the field. `field` is the
/// name of the field in errors.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Makes a reader at the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Returns the number of bytes that are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Returns the next `len` bytes.
    pub fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(DecodeError::Truncated { field })?;
        self.rest = rest;
        Ok(head)
    }

    /// Returns the next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated { field })?;
        self.rest = rest;
        Ok(*head)
    }

    /// Returns the next byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array(field).map(|[b]| b)
    }

    /// Returns the next two bytes as an integer.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_le_bytes)
    }

    /// Returns the next four bytes as an integer.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// Returns the next eight bytes as an integer.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Returns the next byte, which must be 0 or 1, as a `bool`.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::invalid(field, format!("{other} is neither 0 nor 1"))),
        }
    }

    /// Returns the next `u32` as a count, which must be at most `limit`.
    pub fn count(&mut self, limit: usize, field: &'static str) -> Result<usize, DecodeError> {
        let len = self.u32(field)?;
        if u64::from(len) > limit as u64 {
            return Err(DecodeError::TooLong { field, len: len.into(), limit: limit as u64 });
        }
        Ok(len as usize)
    }

    /// Returns a byte string of at most `limit` bytes. Its length precedes it as a `u32`.
    pub fn blob(&mut self, limit: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let len = self.count(limit, field)?;
        self.bytes(len, field)
    }

    /// Returns a UTF-8 string of at most `limit` bytes. Its length precedes it as a `u32`.
    pub fn text(&mut self, limit: usize, field: &'static str) -> Result<String, DecodeError> {
        let bytes = self.blob(limit, field)?;
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::invalid(field, "not UTF-8"))?;
        Ok(text.to_owned())
    }

    /// Ends reading.
    ///
    /// # Errors
    /// Fails with [`DecodeError::Trailing`] if bytes are left.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.rest.len())) }
    }
}

/// Writes fields in the format that [`Reader`] reads.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Makes an empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the written bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Appends bytes without their length.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Appends a two-byte integer.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a four-byte integer.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends an eight-byte integer.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a `bool` as 0 or 1.
    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u8(value.into())
    }

    /// Appends a count as a `u32`. A count that does not fit becomes `u32::MAX`, which every reader
    /// refuses.
    pub fn count(&mut self, value: usize) -> &mut Self {
        self.u32(u32::try_from(value).unwrap_or(u32::MAX))
    }

    /// Appends a byte string after its length.
    pub fn blob(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len()).bytes(bytes)
    }

    /// Appends a string after its length.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.blob(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_up_to_their_limit_are_accepted() {
        let mut w = Writer::new();
        w.count(5).blob(b"12345").text("words");
        let bytes = w.into_bytes();
        for limit in 0..8 {
            let mut r = Reader::new(&bytes);
            let read = r.count(limit, "count").and_then(|_| Ok((r.blob(limit, "blob")?, r.text(limit, "text")?)));
            if limit < 5 {
                assert_eq!(read, Err(DecodeError::TooLong { field: "count", len: 5, limit: limit as u64 }));
            } else {
                assert_eq!(read, Ok((&b"12345"[..], "words".to_owned())));
                assert_eq!((r.remaining(), r.finish()), (0, Ok(())));
            }
        }
        assert_eq!(Reader::new(&bytes).finish(), Err(DecodeError::Trailing(bytes.len())));
        // a count that every reader refuses
        let mut w = Writer::new();
        w.count(usize::MAX);
        assert!(Reader::new(&w.into_bytes()).count(u32::MAX as usize - 1, "count").is_err());
    }
}
