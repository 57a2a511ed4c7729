//! AWS-LC through the crate `aws-lc-rs`: assembly for each generation of processors, chosen at run time.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN};
use crate::Suite;

/// The crate `aws-lc-rs`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accelerated;

impl Backend for Accelerated {
    fn name(&self) -> &'static str {
        "aws-lc"
    }

    fn key(&self, suite: Suite, key: &[u8]) -> Result<Box<dyn AeadKey>, AeadError> {
        let algorithm = match suite {
            Suite::Aes128Gcm => &AES_128_GCM,
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, key).map_err(|_| AeadError)?;
        // "less safe" in that nonces are the caller's affair
        Ok(Box::new(Key(LessSafeKey::new(key))))
    }
}

struct Key(LessSafeKey);

impl AeadKey for Key {
    fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG_LEN], AeadError> {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), data).map_err(|_| AeadError)?;
        tag.as_ref().try_into().map_err(|_| AeadError)
    }

    fn open(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], sealed: &mut [u8]) -> Result<(), AeadError> {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        self.0.open_in_place(nonce, Aad::from(aad), sealed).map(drop).map_err(|_| AeadError)
    }
}
