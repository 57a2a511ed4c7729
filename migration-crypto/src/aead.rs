//! AEADs behind one trait, so that a machine's best implementation can be chosen.

#[cfg(feature = "accelerated")]
#[allow(unsafe_code, reason = "calls a C library")]
mod accelerated;
mod rust_crypto;
#[cfg(test)]
mod tests;

use migration_core::RamSlice;
use thiserror::Error;

#[cfg(feature = "accelerated")]
pub use accelerated::Accelerated;
pub use rust_crypto::RustCrypto;

use crate::Suite;

/// Bytes of a nonce, in every suite.
pub const NONCE_LEN: usize = 12;
/// Bytes of a tag, in every suite.
pub const TAG_LEN: usize = 16;

/// Why an AEAD did not do what it was asked. It says no more: whoever forged the data must not learn how close they came.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the data is not what was sealed under this key")]
pub struct AeadError;

/// An implementation of every [`Suite`].
pub trait Backend: Send + Sync {
    /// Its name, for reports.
    fn name(&self) -> &'static str;

    /// Makes a key ready for use; `key` has [`Suite::key_len`] bytes.
    ///
    /// # Errors
    /// When it has another length.
    fn key(&self, suite: Suite, key: &[u8]) -> Result<Box<dyn AeadKey>, AeadError>;
}

/// A key that is ready for use. It is erased from memory when dropped.
pub trait AeadKey: Send + Sync {
    /// Encrypts `data` in place, and returns the tag that authenticates it and `aad`. The caller sees to it that no nonce
    /// comes twice.
    ///
    /// # Errors
    /// When `data` is longer than the suite can seal, tens of GiB.
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], AeadError>;

    /// Checks and decrypts in place. `sealed` is what was sealed, then its tag, whose place keeps no plaintext.
    ///
    /// # Errors
    /// When anything about it, `aad` or the nonce is not as it was sealed. What `sealed` then holds must not be used.
    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError>;

    /// As [`seal`](AeadKey::seal), of guest memory, which may change at any time, into `to`, which has its length. Each
    /// byte of guest memory is read once: what is encrypted and what is authenticated are the same.
    ///
    /// # Errors
    /// As `seal`, and when the lengths differ. What `to` then holds may be plaintext.
    fn seal_from(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        from: RamSlice<'_>,
        to: &mut [u8],
    ) -> Result<[u8; TAG_LEN], AeadError> {
        if from.len() != to.len() {
            return Err(AeadError);
        }
        from.copy_to(to);
        self.seal(nonce, aad, to)
    }

    /// As [`open`](AeadKey::open), into guest memory of the length of what was sealed.
    ///
    /// # Errors
    /// As `open`, and when the lengths differ. `to` then holds what it held, zeros, or any mixture: never what was not
    /// authentic.
    fn open_into(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: &mut [u8],
        to: RamSlice<'_>,
    ) -> Result<(), AeadError> {
        if sealed.len().checked_sub(TAG_LEN) != Some(to.len()) {
            return Err(AeadError);
        }
        self.open(nonce, aad, sealed)?;
        to.copy_from(sealed);
        Ok(())
    }
}

/// The fastest back-end of this build.
pub fn best() -> &'static dyn Backend {
    #[cfg(feature = "accelerated")]
    return &Accelerated;
    #[cfg(not(feature = "accelerated"))]
    return &RustCrypto;
}
