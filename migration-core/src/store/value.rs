//! The values that are put into a store and read from it, and the trailer that proves the identity
//! of a value.

use std::{ops::Range, time::Duration};

use crc32fast::Hasher;

use super::{
    error::StoreError,
    limits::{MAX_LEASE, MAX_RUN_PAGES, MAX_VALUE_BYTES},
    name::Incarnation,
};
use crate::{PAGE_SIZE, page::MAX_PAGES, vm_id::VmId};

/// A page to be put into a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToPut<'a> {
    /// The number of the page.
    pub page: u64,
    /// The value of the page: its content, or what a wrapper made of it. 1 to [`MAX_VALUE_BYTES`]
    /// bytes, not all of them zero.
    pub value: &'a [u8],
}

/// A page to be read from a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageToGet {
    /// The number of the page.
    pub page: u64,
    /// The generation of the put that has stored the page. A value of any other generation is not
    /// returned.
    pub generation: u32,
}

/// A value that a store returns. Its trailer was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageData<'a>(&'a [u8]);

impl<'a> PageData<'a> {
    /// Returns the page data of a value whose trailer was checked.
    pub fn new(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// Returns the value as it was put: at most [`MAX_VALUE_BYTES`] bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Returns the value if its length is exactly that of a page.
    pub fn page(self) -> Option<&'a [u8; PAGE_SIZE]> {
        self.0.try_into().ok()
    }
}

/// The urgency of a get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Urgency {
    /// A vCPU waits for the page. The get bypasses rate limits and never waits for a prefetch.
    Fault,
    /// The page will be needed later.
    Prefetch,
}

/// The result of a put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The present incarnation of the store. If it differs from the one that `create` returned,
    /// pages that were put before may be lost.
    pub incarnation: Incarnation,
    /// For each page of the put, in its order: whether the store now has the page in the generation
    /// of the put. `false` means that the store has a newer generation.
    pub taken: Vec<bool>,
}

/// The proof that a value belongs to a VM, a page and a generation (rule 3).
///
/// A store keeps the trailer after the value or in a table, and checks it when it reads the value.
/// The checksum detects damage and mix-ups. It does not stop an attacker who can write to the
/// store: to do that, seal the pages.
///
/// ```
/// use migration_core::{store::Trailer, vm::VmId};
/// let vm = VmId([1; 16]);
/// let kept = Trailer::new(vm, 7, 3, b"value").encode();
/// assert!(Trailer::decode(&kept).proves(vm, 7, 3, b"value"));
/// assert!(!Trailer::decode(&kept).proves(vm, 7, 4, b"value"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    vm: VmId,
    page: u64,
    generation: u32,
    checksum: u32,
}

impl Trailer {
    /// The length of an encoded trailer in bytes.
    pub const BYTES: usize = 32;

    /// Returns the trailer of `value`.
    pub fn new(vm: VmId, page: u64, generation: u32, value: &[u8]) -> Self {
        Self { vm, page, generation, checksum: checksum(vm, page, generation, value) }
    }

    /// Returns the generation of the put. It is not verified until [`proves`](Self::proves) has
    /// returned `true`.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Returns whether `value` belongs to this VM, page and generation.
    pub fn proves(&self, vm: VmId, page: u64, generation: u32, value: &[u8]) -> bool {
        *self == Self::new(vm, page, generation, value)
    }

    /// Returns the trailer in the form in which stores keep it.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.vm.0);
        bytes[16..24].copy_from_slice(&self.page.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.generation.to_le_bytes());
        bytes[28..].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// Decodes a trailer. Any 32 bytes are a trailer; [`proves`](Self::proves) says whether it is
    /// right.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        // each part has the length of its field, so no conversion fails
        let part = |range: Range<usize>| &bytes[range];
        Self {
            vm: VmId(part(0..16).try_into().unwrap_or_default()),
            page: u64::from_le_bytes(part(16..24).try_into().unwrap_or_default()),
            generation: u32::from_le_bytes(part(24..28).try_into().unwrap_or_default()),
            checksum: u32::from_le_bytes(part(28..32).try_into().unwrap_or_default()),
        }
    }
}

/// Returns the checksum of the value and of the trailer's other fields, so that damage to a field
/// is found as well.
fn checksum(vm: VmId, page: u64, generation: u32, value: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&vm.0);
    hasher.update(&page.to_le_bytes());
    hasher.update(&generation.to_le_bytes());
    hasher.update(&(value.len() as u64).to_le_bytes());
    hasher.update(value);
    hasher.finalize()
}

/// Checks the conditions under which every store refuses a put. An implementation calls this before
/// it does anything else.
///
/// # Errors
/// Returns [`StoreError::BadRun`], [`StoreError::BadValue`] or [`StoreError::Zeros`].
pub fn check_put(pages: &[PageToPut<'_>]) -> Result<(), StoreError> {
    check_run(pages.iter().map(|page| page.page))?;
    for &PageToPut { page, value } in pages {
        if value.is_empty() || value.len() > MAX_VALUE_BYTES {
            return Err(StoreError::BadValue { page, len: value.len() });
        }
        if value.iter().all(|&byte| byte == 0) {
            return Err(StoreError::Zeros(page));
        }
    }
    Ok(())
}

/// Checks the conditions under which every store refuses a get. An implementation calls this before
/// it does anything else.
///
/// # Errors
/// Returns [`StoreError::BadRun`].
pub fn check_get(pages: &[PageToGet]) -> Result<(), StoreError> {
    check_run(pages.iter().map(|page| page.page))
}

/// Checks the lease of a `create` or a renewal.
///
/// # Errors
/// Returns [`StoreError::BadLease`] if the lease is zero or above [`MAX_LEASE`].
pub fn check_lease(lease: Duration) -> Result<(), StoreError> {
    match lease.is_zero() || lease > MAX_LEASE {
        true => Err(StoreError::BadLease(lease)),
        false => Ok(()),
    }
}

fn check_run(pages: impl ExactSizeIterator<Item = u64>) -> Result<(), StoreError> {
    if pages.len() == 0 || pages.len() > MAX_RUN_PAGES {
        return Err(StoreError::BadRun(format!("{} pages", pages.len())));
    }
    let mut least = 0;
    for page in pages {
        if page < least || page >= MAX_PAGES {
            return Err(StoreError::BadRun(format!("page {page} in its place")));
        }
        least = page + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailer_proves_one_value_only() {
        let (vm, other) = (VmId([1; 16]), VmId([2; 16]));
        let trailer = Trailer::decode(&Trailer::new(vm, 7, 3, b"value").encode());
        assert!(trailer.proves(vm, 7, 3, b"value"));
        assert_eq!(trailer.generation(), 3);
        assert!(!trailer.proves(other, 7, 3, b"value"));
        assert!(!trailer.proves(vm, 8, 3, b"value"));
        assert!(!trailer.proves(vm, 7, 2, b"value"));
        assert!(!trailer.proves(vm, 7, 3, b"velue"));
        assert!(!trailer.proves(vm, 7, 3, b"value\0"));
        for at in 0..Trailer::BYTES {
            let mut bytes = trailer.encode();
            bytes[at] ^= 1;
            assert!(!Trailer::decode(&bytes).proves(vm, 7, 3, b"value"), "byte {at}");
        }
        // a hole of a sparse file reads as these zeros
        assert!(!Trailer::decode(&[0; 32]).proves(VmId([0; 16]), 0, 0, &[0; PAGE_SIZE]));
    }

    #[test]
    fn a_put_is_as_large_as_its_bounds() {
        let put = |pages: usize, len: usize| {
            let value = vec![1; len];
            let pages: Vec<_> = (0..pages as u64).map(|page| PageToPut { page, value: &value }).collect();
            check_put(&pages)
        };
        assert!(put(1, 1).is_ok() && put(MAX_RUN_PAGES, MAX_VALUE_BYTES).is_ok());
        assert!(matches!(put(1, 0), Err(StoreError::BadValue { page: 0, len: 0 })));
        assert!(matches!(put(1, MAX_VALUE_BYTES + 1), Err(StoreError::BadValue { .. })));
        for pages in [0, MAX_RUN_PAGES + 1] {
            assert!(matches!(put(pages, 1), Err(StoreError::BadRun(_))), "{pages}");
        }
    }
}
