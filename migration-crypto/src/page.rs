//! Seals for single pages that leave the host: in stores, at intermediaries, in checkpoints.

use std::fmt;

use migration_core::vm::VmId;
use thiserror::Error;

use crate::{
    Suite,
    aead::{AeadError, AeadKey, Backend, NONCE_LEN, TAG_LEN},
    keys::Psk,
    secret::Secret,
};

/// The number of bytes that a sealed page has beyond the page: its nonce and its tag.
pub const SEAL_OVERHEAD: usize = NONCE_LEN + TAG_LEN;
/// The number of random bytes in a nonce. The other bytes are a counter.
const PREFIX: usize = 8;

/// The purpose for which pages are sealed. A key of one purpose does not open pages of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// Pages that are evicted to a store.
    Store,
    /// Pages that travel through intermediaries.
    Transit,
    /// Pages of a checkpoint.
    Checkpoint,
}

impl Purpose {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Store => b"store",
            Self::Transit => b"transit",
            Self::Checkpoint => b"checkpoint",
        }
    }
}

/// The reason why a page could not be sealed or opened.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PageError {
    /// The data is not what was sealed for this VM, page and generation: it was changed, swapped,
    /// replayed or forged.
    #[error("the page is not what was sealed for this VM, address and generation")]
    NotAuthentic,
    /// The data is shorter than any sealed page. The number is its length in bytes.
    #[error("{0} bytes are too few for a sealed page")]
    TooShort(usize),
    /// The operating system returned no random bytes, or the cipher failed.
    #[error("cryptography failed")]
    Crypto,
}

/// Seals pages so that the store that keeps them cannot read, change, swap, replay or forge them.
///
/// A sealed page is bound to its VM, its page number and its generation. Whoever opens it must know
/// all three from another source. A page that is sealed twice gives different bytes each time.
///
/// **Convergent** sealing ([`convergent`](PageSealer::convergent)) gives equal bytes for equal
/// pages, also for those of several VMs. It is meant for stores that keep each content once. Use it
/// only for VMs that trust each other, because it reveals more:
/// - Whoever sees the store sees *which pages are equal*, over time and across VMs.
/// - Whoever can write pages of one VM can find out whether another VM has a page with a guessed
///   content.
/// - A page is not bound to its place. The store can swap pages unless a trusted index names each
///   of them by its hash.
pub struct PageSealer {
    key: Box<dyn AeadKey>,
    mode: Mode,
}

enum Mode {
    Bound { vm: VmId, prefix: [u8; PREFIX], counter: u32 },
    Convergent { nonces: Secret },
}

impl PageSealer {
    /// Makes a sealer for the pages of `vm`. Sealers with the same key, VM and purpose open each
    /// other's pages.
    ///
    /// # Errors
    /// Fails if the operating system returns no random bytes.
    pub fn new(
        master: &Psk,
        vm: VmId,
        purpose: Purpose,
        suite: Suite,
        backend: &dyn Backend,
    ) -> Result<Self, PageError> {
        let secret = master.0.derive(&[b"pages", purpose.name(), &vm.0]);
        Ok(Self { key: key(&secret, suite, backend)?, mode: Mode::Bound { vm, prefix: prefix()?, counter: 0 } })
    }

    /// Makes a sealer for the pages of all VMs of one trust domain. Equal pages give equal bytes;
    /// the type's documentation says what that reveals.
    ///
    /// # Errors
    /// Fails if the cipher refuses its key, which does not happen with the back-ends of this crate.
    pub fn convergent(
        master: &Psk,
        domain: &[u8],
        purpose: Purpose,
        suite: Suite,
        backend: &dyn Backend,
    ) -> Result<Self, PageError> {
        let secret = master.0.derive(&[b"convergent pages", purpose.name(), domain]);
        Ok(Self { key: key(&secret, suite, backend)?, mode: Mode::Convergent { nonces: secret.derive(&[b"nonces"]) } })
    }

    /// Seals page number `page`, with the content that it has in `generation`. Returns the nonce,
    /// the ciphertext and the tag, one after another.
    ///
    /// # Errors
    /// Fails if the operating system returns no random bytes; they are needed once in 2³² pages.
    pub fn seal(&mut self, page: u64, generation: u64, content: &[u8]) -> Result<Vec<u8>, PageError> {
        let mut sealed = Vec::with_capacity(content.len() + SEAL_OVERHEAD);
        sealed.extend_from_slice(&[0; NONCE_LEN]);
        sealed.extend_from_slice(content);
        let (nonce, tag) = self.seal_in_place(page, generation, &mut sealed[NONCE_LEN..])?;
        sealed[..NONCE_LEN].copy_from_slice(&nonce);
        sealed.extend_from_slice(&tag);
        Ok(sealed)
    }

    /// Seals `content` in place, like [`seal`](PageSealer::seal). Returns nonce and tag, which the
    /// caller keeps elsewhere.
    pub(crate) fn seal_in_place(
        &mut self,
        page: u64,
        generation: u64,
        content: &mut [u8],
    ) -> Result<([u8; NONCE_LEN], [u8; TAG_LEN]), PageError> {
        let mut nonce = [0; NONCE_LEN];
        match &mut self.mode {
            // NIST SP 800-38D, 8.2.1, with a random fixed field: a nonce repeats only if two
            // sealers draw the same random bytes
            Mode::Bound { prefix: own, counter, .. } => {
                nonce[..PREFIX].copy_from_slice(own);
                nonce[PREFIX..].copy_from_slice(&counter.to_le_bytes());
                match counter.checked_add(1) {
                    Some(next) => *counter = next,
                    None => (*own, *counter) = (prefix()?, 0),
                }
            }
            // the nonce is a hash of the content, so equal nonces mean equal content (but for a
            // collision of 96 bits)
            Mode::Convergent { nonces } => {
                let hash = Secret::extract(nonces.bytes(), content);
                nonce.copy_from_slice(&hash.bytes()[..NONCE_LEN]);
            }
        }
        let bound = self.bound(page, generation);
        let tag = self.key.seal(&nonce, &bound, content).map_err(|AeadError| PageError::Crypto)?;
        Ok((nonce, tag))
    }

    /// Opens in place what [`seal`](PageSealer::seal) returned. Returns the page.
    ///
    /// # Errors
    /// Fails if `sealed` is anything else. Its content must not be used after an error.
    pub fn open<'a>(&self, page: u64, generation: u64, sealed: &'a mut [u8]) -> Result<&'a [u8], PageError> {
        if sealed.len() < SEAL_OVERHEAD {
            return Err(PageError::TooShort(sealed.len()));
        }
        let (nonce, rest) = sealed.split_first_chunk_mut().ok_or(PageError::TooShort(0))?;
        self.open_in_place(page, generation, nonce, rest)
    }

    /// Opens a page in place, like [`open`](PageSealer::open). The nonce comes from elsewhere, and
    /// `sealed` is the ciphertext followed by its tag.
    pub(crate) fn open_in_place<'a>(
        &self,
        page: u64,
        generation: u64,
        nonce: &[u8; NONCE_LEN],
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], PageError> {
        let content = sealed.len().checked_sub(TAG_LEN).ok_or(PageError::TooShort(sealed.len()))?;
        self.key.open(nonce, &self.bound(page, generation), sealed).map_err(|AeadError| PageError::NotAuthentic)?;
        Ok(&sealed[..content])
    }

    /// Returns the associated data, to which the sealed page is bound.
    fn bound(&self, page: u64, generation: u64) -> Vec<u8> {
        match &self.mode {
            Mode::Bound { vm, .. } => [&vm.0[..], &page.to_le_bytes(), &generation.to_le_bytes()].concat(),
            Mode::Convergent { .. } => Vec::new(),
        }
    }
}

impl fmt::Debug for PageSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageSealer").finish_non_exhaustive()
    }
}

fn key(secret: &Secret, suite: Suite, backend: &dyn Backend) -> Result<Box<dyn AeadKey>, PageError> {
    secret.key(suite, backend).map_err(|AeadError| PageError::Crypto)
}

fn prefix() -> Result<[u8; PREFIX], PageError> {
    let mut prefix = [0; PREFIX];
    getrandom::fill(&mut prefix).map_err(|_| PageError::Crypto)?;
    Ok(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aead::RustCrypto;

    const PAGE: [u8; 4096] = [0x5a; 4096];

    fn sealer(vm: u8, purpose: Purpose) -> PageSealer {
        PageSealer::new(&Psk::new([1; 32]), VmId([vm; 16]), purpose, Suite::Aes256Gcm, &RustCrypto).unwrap()
    }

    #[test]
    fn a_page_opens_only_for_its_vm_number_generation_and_purpose() {
        let mut here = sealer(1, Purpose::Store);
        let sealed = here.seal(7, 3, &PAGE).unwrap();
        assert_eq!(sealed.len(), PAGE.len() + SEAL_OVERHEAD);
        let open = |sealer: &PageSealer, page, generation, mut bytes: Vec<u8>| {
            sealer.open(page, generation, &mut bytes).map(<[u8]>::to_vec)
        };
        assert_eq!(open(&sealer(1, Purpose::Store), 7, 3, sealed.clone()).unwrap(), PAGE);
        let no = Err(PageError::NotAuthentic);
        assert_eq!(open(&here, 8, 3, sealed.clone()), no);
        assert_eq!(open(&here, 7, 2, sealed.clone()), no);
        assert_eq!(open(&sealer(2, Purpose::Store), 7, 3, sealed.clone()), no);
        assert_eq!(open(&sealer(1, Purpose::Transit), 7, 3, sealed.clone()), no);
        for at in (0..sealed.len()).step_by(97).chain([0, 11, 12, sealed.len() - 1]) {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(open(&here, 7, 3, changed), no);
        }
        assert_eq!(open(&here, 7, 3, sealed[..4000].to_vec()), no);
        assert_eq!(open(&here, 7, 3, vec![0; 27]), Err(PageError::TooShort(27)));
        assert_ne!(here.seal(7, 3, &PAGE).unwrap(), sealed);
        // empty content can be sealed, too
        let empty = here.seal(7, 3, &[]).unwrap();
        assert!(open(&here, 7, 3, empty).unwrap().is_empty());
        assert_eq!(format!("{here:?}"), "PageSealer { .. }");
    }

    #[test]
    fn equal_pages_give_equal_bytes_only_in_one_convergent_domain() {
        let domain = |name: &[u8]| {
            PageSealer::convergent(&Psk::new([1; 32]), name, Purpose::Store, Suite::Aes256Gcm, &RustCrypto).unwrap()
        };
        let (mut here, mut there) = (domain(b"a"), domain(b"a"));
        let sealed = here.seal(1, 1, &PAGE).unwrap();
        assert_eq!(there.seal(2, 9, &PAGE).unwrap(), sealed);
        assert_ne!(domain(b"b").seal(1, 1, &PAGE).unwrap(), sealed);
        let mut other = PAGE;
        other[4095] = 0;
        assert_ne!(here.seal(1, 1, &other).unwrap()[..NONCE_LEN], sealed[..NONCE_LEN]);
        assert_eq!(there.open(5, 5, &mut sealed.clone()).unwrap(), PAGE);
    }

    #[test]
    fn nonces_continue_with_a_new_prefix() {
        let mut sealer = sealer(1, Purpose::Store);
        if let Mode::Bound { counter, .. } = &mut sealer.mode {
            *counter = u32::MAX;
        }
        let [last, first] = [0; 2].map(|_| sealer.seal(0, 0, &PAGE).unwrap());
        assert_ne!(last[..PREFIX], first[..PREFIX]);
        assert_eq!(first[PREFIX..NONCE_LEN], [0; 4]);
    }
}
