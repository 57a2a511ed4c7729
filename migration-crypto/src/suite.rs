//! The cipher suites from which both sides choose.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// A cipher suite: an AEAD, which keeps the sealed data secret and detects every change to it. All
/// suites have tags of 16 bytes and nonces of 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Suite {
    /// AES with 128-bit keys in GCM (NIST SP 800-38D).
    Aes128Gcm,
    /// AES with 256-bit keys in GCM (NIST SP 800-38D). With [`Aes128Gcm`](Suite::Aes128Gcm) this is
    /// the fastest choice on hosts with AES instructions, which all servers have.
    Aes256Gcm,
    /// ChaCha20-Poly1305 (RFC 8439), for hosts without AES instructions.
    ChaCha20Poly1305,
}

/// The error for a text that is not the name of a [`Suite`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no cipher: use aes128-gcm, aes256-gcm or chacha20-poly1305")]
pub struct UnknownSuite(pub String);

impl Suite {
    /// All suites, in order of preference, the preferred one first.
    pub const ALL: [Self; 3] = [Self::Aes256Gcm, Self::ChaCha20Poly1305, Self::Aes128Gcm];

    /// Returns the length of a key in bytes.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::ChaCha20Poly1305 => 32,
        }
    }

    /// Returns the name of the suite in the form that [`FromStr`] parses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes128-gcm",
            Self::Aes256Gcm => "aes256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Aes128Gcm => 1,
            Self::Aes256Gcm => 2,
            Self::ChaCha20Poly1305 => 3,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|suite| suite.code() == code)
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Suite {
    type Err = UnknownSuite;

    fn from_str(text: &str) -> Result<Self, UnknownSuite> {
        Self::ALL.into_iter().find(|suite| suite.name() == text).ok_or_else(|| UnknownSuite(text.to_owned()))
    }
}

/// Returns the names of `suites`, separated by commas, for messages.
pub(crate) fn names(suites: &[Suite]) -> String {
    suites.iter().map(|suite| suite.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_round_trip() {
        for suite in Suite::ALL {
            assert_eq!(suite.to_string().parse(), Ok(suite));
            assert_eq!(Suite::from_code(suite.code()), Some(suite));
        }
        assert_eq!("none".parse::<Suite>(), Err(UnknownSuite("none".into())));
        assert_eq!(Suite::from_code(0), None);
    }
}
