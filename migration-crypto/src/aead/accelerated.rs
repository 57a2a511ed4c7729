//! AWS-LC: assembly for each generation of processors, chosen at run time.
//!
//! Its C interface is called rather than that of the crate `aws-lc-rs`, which takes no guest memory: between two buffers the
//! cipher itself is the copy out of memory that lives.

use std::ptr::NonNull;

use aws_lc_sys::{
    CRYPTO_library_init, EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_open_gather,
    EVP_AEAD_CTX_seal_scatter, EVP_aead_aes_128_gcm, EVP_aead_aes_256_gcm, EVP_aead_chacha20_poly1305,
};
use migration_core::RamSlice;

use super::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN};
use crate::Suite;

/// The library AWS-LC, by the crate `aws-lc-sys`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accelerated;

impl Backend for Accelerated {
    fn name(&self) -> &'static str {
        "aws-lc"
    }

    fn key(&self, suite: Suite, key: &[u8]) -> Result<Box<dyn AeadKey>, AeadError> {
        if key.len() != suite.key_len() {
            return Err(AeadError);
        }
        // SAFETY: may be called any number of times, from any thread; the others return pointers to constants.
        let aead = unsafe {
            CRYPTO_library_init();
            match suite {
                Suite::Aes128Gcm => EVP_aead_aes_128_gcm(),
                Suite::Aes256Gcm => EVP_aead_aes_256_gcm(),
                Suite::ChaCha20Poly1305 => EVP_aead_chacha20_poly1305(),
            }
        };
        // SAFETY: `key` has the length that is said; it is copied.
        let context = unsafe { EVP_AEAD_CTX_new(aead, key.as_ptr(), key.len(), TAG_LEN) };
        Ok(Box::new(Key(NonNull::new(context).ok_or(AeadError)?)))
    }
}

/// A context with a key.
struct Key(NonNull<EVP_AEAD_CTX>);

// SAFETY: a context belongs to no thread.
unsafe impl Send for Key {}
// SAFETY: sealing and opening do not change it ("can be used concurrently", aead.h).
unsafe impl Sync for Key {}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: made by `EVP_AEAD_CTX_new`, freed once. Freeing erases it (`OPENSSL_free`).
        unsafe { EVP_AEAD_CTX_free(self.0.as_ptr()) }
    }
}

impl Key {
    /// Encrypts from one place to another. AWS-LC reads a byte of `from` once and hashes what it has written to `to`, in C
    /// as in assembly, so `from` may change meanwhile. The test `live_memory_is_sealed_as_it_was_read` would see it if a
    /// later version did not.
    ///
    /// # Safety
    /// `len` bytes at `from` are readable; those at `to` are writable and nobody else's. The two are the same or do not overlap.
    unsafe fn encrypt(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        from: *const u8,
        to: *mut u8,
        len: usize,
    ) -> Result<[u8; TAG_LEN], AeadError> {
        let (mut tag, mut tag_len) = ([0; TAG_LEN], 0);
        // SAFETY: `from` and `to` by the caller's promise; nonce, tag and `aad` have the lengths that are said; there is no
        // further input.
        let done = unsafe {
            EVP_AEAD_CTX_seal_scatter(
                self.0.as_ptr(),
                to,
                tag.as_mut_ptr(),
                &mut tag_len,
                TAG_LEN,
                nonce.as_ptr(),
                NONCE_LEN,
                from,
                len,
                std::ptr::null(),
                0,
                aad.as_ptr(),
                aad.len(),
            )
        };
        if done == 1 && tag_len == TAG_LEN { Ok(tag) } else { Err(AeadError) }
    }

    /// Decrypts from one place to another; what is not authentic leaves zeros at `to`.
    ///
    /// # Safety
    /// `len` bytes at `to` are writable. They are the beginning of `sealed`, or do not overlap with it.
    unsafe fn decrypt(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: *const u8,
        tag: &[u8; TAG_LEN],
        to: *mut u8,
        len: usize,
    ) -> Result<(), AeadError> {
        // SAFETY: by the caller's promise; nonce, tag and `aad` have the lengths that are said.
        let done = unsafe {
            EVP_AEAD_CTX_open_gather(
                self.0.as_ptr(),
                to,
                nonce.as_ptr(),
                NONCE_LEN,
                sealed,
                len,
                tag.as_ptr(),
                TAG_LEN,
                aad.as_ptr(),
                aad.len(),
            )
        };
        if done == 1 { Ok(()) } else { Err(AeadError) }
    }
}

impl AeadKey for Key {
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], AeadError> {
        let (data, len) = (data.as_mut_ptr(), data.len());
        // SAFETY: one buffer, borrowed alone.
        unsafe { self.encrypt(nonce, aad, data, data, len) }
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError> {
        let (data, tag) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(AeadError)?;
        let (data, len) = (data.as_mut_ptr(), data.len());
        // SAFETY: one buffer, borrowed alone, and the tag is not in it.
        unsafe { self.decrypt(nonce, aad, data, tag, data, len) }
    }

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
        // SAFETY: a `RamSlice` is readable, and nowhere borrowed, so not part of `to`, which is as long.
        unsafe { self.encrypt(nonce, aad, from.as_ptr(), to.as_mut_ptr(), to.len()) }
    }

    fn open_into(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: &mut [u8],
        to: RamSlice<'_>,
    ) -> Result<(), AeadError> {
        let (data, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(AeadError)?;
        if data.len() != to.len() {
            return Err(AeadError);
        }
        // SAFETY: a `RamSlice` is writable, and nowhere borrowed, so not part of `sealed`; `data` is as long.
        unsafe { self.decrypt(nonce, aad, data.as_ptr(), tag, to.as_ptr(), data.len()) }
    }
}
