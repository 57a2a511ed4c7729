//! The back-end in Rust, which needs no C compiler. It uses the processor's AES and carry-less
//! multiplication instructions if there are any.

use aes_gcm::{
    Aes128Gcm, Aes256Gcm,
    aead::{AeadInPlace, KeyInit},
};
use chacha20poly1305::ChaCha20Poly1305;

use super::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN};
use crate::Suite;

/// The back-end that uses the crates `aes-gcm` and `chacha20poly1305`.
#[derive(Clone, Copy, Debug, Default)]
pub struct RustCrypto;

impl Backend for RustCrypto {
    fn name(&self) -> &'static str {
        "rust-crypto"
    }

    fn key(&self, suite: Suite, key: &[u8]) -> Result<Box<dyn AeadKey>, AeadError> {
        Ok(match suite {
            Suite::Aes128Gcm => Box::new(Key(Aes128Gcm::new_from_slice(key).map_err(|_| AeadError)?)),
            Suite::Aes256Gcm => Box::new(Key(Aes256Gcm::new_from_slice(key).map_err(|_| AeadError)?)),
            Suite::ChaCha20Poly1305 => Box::new(Key(ChaCha20Poly1305::new_from_slice(key).map_err(|_| AeadError)?)),
        })
    }
}

struct Key<A>(A);

impl<A> AeadKey for Key<A>
where
    A: AeadInPlace<NonceSize = aes_gcm::aead::consts::U12, TagSize = aes_gcm::aead::consts::U16> + Send + Sync,
{
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], AeadError> {
        self.0.encrypt_in_place_detached(nonce.into(), aad, data).map(Into::into).map_err(|_| AeadError)
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError> {
        let (data, tag) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(AeadError)?;
        self.0.decrypt_in_place_detached(nonce.into(), aad, data, (&*tag).into()).map_err(|_| AeadError)
    }
}
