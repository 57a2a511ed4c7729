//! Secrets, and the derivation of keys from them.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    Suite,
    aead::{AeadError, AeadKey, Backend},
};

/// The length in bytes of every secret from which keys are derived.
pub(crate) const SECRET_LEN: usize = 32;

/// A secret of 32 bytes. It is erased from memory when it is dropped, and `Debug` does not print
/// it.
#[derive(Clone)]
pub(crate) struct Secret(Box<Zeroizing<[u8; SECRET_LEN]>>);

impl Secret {
    pub(crate) fn new(bytes: [u8; SECRET_LEN]) -> Self {
        Self(Box::new(Zeroizing::new(bytes)))
    }

    /// Makes a secret from `input`, which holds enough entropy but need not be uniform
    /// (HKDF-Extract, RFC 5869). `input` may be several inputs, one after another.
    pub(crate) fn extract(salt: &[u8], input: &[u8]) -> Self {
        let (mut secret, _) = Hkdf::<Sha256>::extract(Some(salt), input);
        let this = Self::new(secret.into());
        secret.as_mut_slice().zeroize();
        this
    }

    /// Makes a random secret with bytes of the operating system.
    ///
    /// # Errors
    /// Fails if the operating system returns no random bytes.
    pub(crate) fn random() -> Result<Self, getrandom::Error> {
        let mut this = Self::new([0; SECRET_LEN]);
        getrandom::fill(&mut this.0[..])?;
        Ok(this)
    }

    pub(crate) fn bytes(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }

    /// Derives the bytes of `key` for `purpose` (HKDF-Expand, RFC 5869). Each part of the purpose
    /// is encoded after its length, so that different lists of parts never give the same bytes.
    pub(crate) fn expand(&self, purpose: &[&[u8]], key: &mut [u8]) {
        let mut info = Vec::new();
        for part in purpose {
            info.extend_from_slice(&(part.len() as u32).to_le_bytes());
            info.extend_from_slice(part);
        }
        // neither step can fail: a secret has the length of the hash, and keys are far shorter than
        // 255 hashes
        let done = Hkdf::<Sha256>::from_prk(&self.0[..]).is_ok_and(|hkdf| hkdf.expand(&info, key).is_ok());
        debug_assert!(done);
    }

    /// Derives the key for `suite` and prepares it for use with `backend`.
    pub(crate) fn key(&self, suite: Suite, backend: &dyn Backend) -> Result<Box<dyn AeadKey>, AeadError> {
        let mut bytes = Zeroizing::new([0; SECRET_LEN]);
        let bytes = &mut bytes[..suite.key_len()];
        self.expand(&[b"key", suite.name().as_bytes()], bytes);
        backend.key(suite, bytes)
    }

    /// Derives another secret, for `purpose`.
    pub(crate) fn derive(&self, purpose: &[&[u8]]) -> Self {
        let mut derived = Self::new([0; SECRET_LEN]);
        self.expand(purpose, &mut derived.0[..]);
        derived
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purposes_do_not_run_into_each_other() {
        let secret = Secret::new([7; 32]);
        assert_ne!(secret.derive(&[b"ab", b"c"]).bytes(), secret.derive(&[b"a", b"bc"]).bytes());
        assert_ne!(secret.derive(&[b"a"]).bytes(), secret.derive(&[b"a", b""]).bytes());
        assert_eq!(secret.derive(&[b"a"]).bytes(), secret.derive(&[b"a"]).bytes());
    }

    #[test]
    fn nothing_is_printed() {
        assert_eq!(format!("{:?}", Secret::new([0x41; 32])), "Secret(…)");
    }

    #[test]
    fn extract_is_hkdf() {
        // RFC 5869, test case 1
        let salt: Vec<u8> = (0..13).collect();
        let secret = Secret::extract(&salt, &[0x0b; 22]);
        let prk = "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5";
        let hex: String = secret.bytes().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, prk);
    }
}
