//! The AWS-LC back-end. It has assembly for each generation of processors and chooses at run time.
//!
//! The C interface is called directly, because the crate `aws-lc-rs` takes no guest memory. With
//! the C interface the cipher reads guest memory and writes to a private buffer, which saves the
//! copy that guest memory otherwise needs because the guest may change it at any time.

use std::ptr::NonNull;

use aws_lc_sys::{
    CRYPTO_library_init, EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_open_gather,
    EVP_AEAD_CTX_seal_scatter, EVP_aead_aes_128_gcm, EVP_aead_aes_256_gcm, EVP_aead_chacha20_poly1305,
};
use migration_core::RamSlice;

use super::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN};
use crate::Suite;

/// The back-end that calls AWS-LC through the crate `aws-lc-sys`.
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
        // SAFETY: `CRYPTO_library_init` may be called any number of times from any thread. The
        // other functions return pointers to constants.
        let aead = unsafe {
            CRYPTO_library_init();
            match suite {
                Suite::Aes128Gcm => EVP_aead_aes_128_gcm(),
                Suite::Aes256Gcm => EVP_aead_aes_256_gcm(),
                Suite::ChaCha20Poly1305 => EVP_aead_chacha20_poly1305(),
            }
        };
        // SAFETY: `key` is valid for `key.len()` bytes, and the function copies it.
        let context = unsafe { EVP_AEAD_CTX_new(aead, key.as_ptr(), key.len(), TAG_LEN) };
        Ok(Box::new(Key(NonNull::new(context).ok_or(AeadError)?)))
    }
}

/// An AWS-LC context that holds a key.
struct Key(NonNull<EVP_AEAD_CTX>);

// SAFETY: an AWS-LC context may be used and freed on any thread.
unsafe impl Send for Key {}
// SAFETY: sealing and opening do not change the context (aead.h: "can be used concurrently").
unsafe impl Sync for Key {}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: the context was made by `EVP_AEAD_CTX_new` and is freed once. `OPENSSL_free`
        // erases the key.
        unsafe { EVP_AEAD_CTX_free(self.0.as_ptr()) }
    }
}

impl Key {
    /// Encrypts `len` bytes at `from` into `to` and returns the tag.
    ///
    /// AWS-LC reads each byte of `from` once and hashes the ciphertext that it wrote to `to`, in
    /// its C code and in its assembly. So `from` may change during the call. The test
    /// `live_memory_is_sealed_as_it_was_read` fails if a later version reads twice.
    ///
    /// # Safety
    /// `from` must be readable for `len` bytes. `to` must be writable for `len` bytes, and nothing
    /// else may access it during the call. The two ranges must be the same or not overlap.
    unsafe fn encrypt(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        from: *const u8,
        to: *mut u8,
        len: usize,
    ) -> Result<[u8; TAG_LEN], AeadError> {
        let (mut tag, mut tag_len) = ([0; TAG_LEN], 0);
        // SAFETY: the caller guarantees `from` and `to`. Nonce, tag and `aad` have the lengths that
        // are passed. There is no extra input.
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

    /// Decrypts `len` bytes at `sealed` into `to`. If authentication fails, `to` is filled with
    /// zeros.
    ///
    /// # Safety
    /// `sealed` must be readable and `to` writable for `len` bytes. The two ranges must begin at
    /// the same address or not overlap.
    unsafe fn decrypt(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: *const u8,
        tag: &[u8; TAG_LEN],
        to: *mut u8,
        len: usize,
    ) -> Result<(), AeadError> {
        // SAFETY: the caller guarantees `sealed` and `to`. Nonce, tag and `aad` have the lengths
        // that are passed.
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
        // SAFETY: both pointers are to one buffer that is borrowed exclusively.
        unsafe { self.encrypt(nonce, aad, data, data, len) }
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError> {
        let (data, tag) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(AeadError)?;
        let (data, len) = (data.as_mut_ptr(), data.len());
        // SAFETY: both pointers are to one buffer that is borrowed exclusively, and the tag is not
        // part of it.
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
        // SAFETY: a `RamSlice` is readable. No Rust reference to guest memory exists, so it does
        // not overlap with `to`, and both have the same length.
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
        // SAFETY: a `RamSlice` is writable. No Rust reference to guest memory exists, so it does
        // not overlap with `sealed`, and `data` has the same length.
        unsafe { self.decrypt(nonce, aad, data.as_ptr(), tag, to.as_ptr(), data.len()) }
    }
}
