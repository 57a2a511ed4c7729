//! The trait for AEAD ciphers (authenticated encryption with associated data) and its back-ends.

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

/// The length of a nonce in bytes, the same in every suite.
pub const NONCE_LEN: usize = 12;
/// The length of a tag in bytes, the same in every suite.
pub const TAG_LEN: usize = 16;

/// The error of a failed cipher operation. It gives no details, so that an attacker learns nothing
/// from it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the data is not what was sealed under this key")]
pub struct AeadError;

/// A back-end: an implementation of every [`Suite`].
pub trait Backend: Send + Sync {
    /// Returns the name of the back-end, for reports.
    fn name(&self) -> &'static str;

    /// Prepares `key` for use. `key` must have [`Suite::key_len`] bytes.
    ///
    /// # Errors
    /// Fails if `key` has another length.
    fn key(&self, suite: Suite, key: &[u8]) -> Result<Box<dyn AeadKey>, AeadError>;
}

/// A key that is ready for use. Implementations erase it from memory when it is dropped.
pub trait AeadKey: Send + Sync {
    /// Encrypts `data` in place and returns the tag that authenticates `data` and `aad`. The caller
    /// must never use a nonce twice under one key.
    ///
    /// # Errors
    /// Fails if `data` is longer than the suite can seal (tens of GiB).
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], AeadError>;

    /// Authenticates and decrypts `sealed` in place. `sealed` is the ciphertext followed by its
    /// tag. The plaintext replaces the ciphertext; the last [`TAG_LEN`] bytes never hold plaintext.
    ///
    /// # Errors
    /// Fails if the ciphertext, the tag, `aad` or the nonce differs from what was sealed. The
    /// content of `sealed` must not be used after an error.
    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError>;

    /// Encrypts guest memory into `to` and returns the tag, like [`seal`](AeadKey::seal). `from`
    /// and `to` must have the same length. The guest may write to `from` meanwhile: each byte of it
    /// is read once, so the bytes that are encrypted are the bytes that are authenticated.
    ///
    /// # Errors
    /// Fails like `seal`, and if the lengths differ. `to` may hold plaintext after an error.
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

    /// Authenticates `sealed` and decrypts it into guest memory, like [`open`](AeadKey::open). `to`
    /// must be [`TAG_LEN`] bytes shorter than `sealed`.
    ///
    /// # Errors
    /// Fails like `open`, and if the lengths do not fit. After an error `to` holds its earlier
    /// content, zeros, or a mixture of both, but never data that failed authentication.
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

/// Returns the fastest back-end of this build.
pub fn best() -> &'static dyn Backend {
    #[cfg(feature = "accelerated")]
    return &Accelerated;
    #[cfg(not(feature = "accelerated"))]
    return &RustCrypto;
}
