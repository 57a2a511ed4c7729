//! Guest RAM in the address space of the host process.
//!
//! A running guest changes its memory at any time, so guest memory is never accessed as a `&[u8]`
//! while the guest may run. [`RamSlice`] names a piece of it. The kernel may read or write the
//! piece (as an iovec), and the methods here access it by volatile reads and writes. This is the
//! only module of the crate that has unsafe code.

use std::{io, marker::PhantomData, ptr::NonNull};

use thiserror::Error;

use crate::{
    page::{PAGE_SIZE, PageRange, RamLayout},
    page_set::PageSet,
};

/// The number of bytes that one turn of a copy loop copies: enough that the cost of the loop itself
/// does not matter.
const COPY_BLOCK: usize = 64;

/// An access outside guest RAM.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{len} bytes at {at:#x} are not inside one region of guest RAM")]
pub struct OutsideRam {
    /// The guest physical address, or the byte offset of the requested page.
    pub at: u64,
    /// The length in bytes.
    pub len: u64,
}

/// The RAM of one VM, mapped into this process.
///
/// The SDK never maps or unmaps guest memory; it works on memory that the VMM has mapped.
/// migration-kvm has implementations for memory that it allocates itself and for vm-memory.
///
/// # Safety
/// For as long as the object lives, every region of [`layout`](GuestRam::layout) must be mapped
/// readable and writable at [`host_address`](GuestRam::host_address), whole and contiguous, and
/// neither the layout nor the addresses may change. No part of it may be borrowed as a Rust
/// reference while the SDK uses it. The methods that return slices or copy bytes must not be
/// overridden with others: callers rely on the returned memory lying inside RAM.
pub unsafe trait GuestRam: Send + Sync {
    /// Returns the layout of RAM in guest physical address space.
    fn layout(&self) -> &RamLayout;

    /// Returns the host address of the first byte of region `index`, an index into
    /// `layout().regions()`.
    fn host_address(&self, index: usize) -> NonNull<u8>;

    /// Adds to `into` every page that may hold anything but zeros. Pages that were never touched
    /// are *holes*: a migration skips them. The default implementation adds all pages.
    ///
    /// # Errors
    /// Returns an error if the operating system cannot find the holes. The caller then treats all
    /// of RAM as populated.
    fn populated(&self, into: &mut PageSet) -> io::Result<()> {
        into.insert_range(self.layout().all());
        Ok(())
    }

    /// Returns the memory of `range`, which must lie inside one region (see [`RamLayout::split`]).
    ///
    /// # Errors
    /// Returns an error if `range` does not lie inside one region.
    fn slice(&self, range: PageRange) -> Result<RamSlice<'_>, OutsideRam> {
        let outside = OutsideRam { at: range.first.saturating_mul(PAGE_SIZE as u64), len: range.bytes() };
        let (region, offset) = self.layout().locate(range.first).ok_or(outside)?;
        region_slice(self, region, offset, range.bytes()).ok_or(outside)
    }

    /// Returns the `len` bytes of guest memory at guest physical address `gpa`, which must lie
    /// inside one region.
    ///
    /// # Errors
    /// Returns an error if the bytes do not lie inside one region.
    fn slice_at(&self, gpa: u64, len: u64) -> Result<RamSlice<'_>, OutsideRam> {
        let outside = OutsideRam { at: gpa, len };
        let regions = self.layout().regions();
        let region = regions.partition_point(|r| r.gpa <= gpa).checked_sub(1).ok_or(outside)?;
        region_slice(self, region, gpa - regions[region].gpa, len).ok_or(outside)
    }

    /// Copies guest memory at guest physical address `gpa` into `to`.
    ///
    /// # Errors
    /// Returns an error if the bytes do not lie inside one region. Then nothing is copied.
    fn read(&self, gpa: u64, to: &mut [u8]) -> Result<(), OutsideRam> {
        self.slice_at(gpa, to.len() as u64)?.copy_to(to);
        Ok(())
    }

    /// Copies `from` into guest memory at guest physical address `gpa`.
    ///
    /// # Errors
    /// Returns an error if the bytes do not lie inside one region. Then nothing is copied.
    fn write(&self, gpa: u64, from: &[u8]) -> Result<(), OutsideRam> {
        self.slice_at(gpa, from.len() as u64)?.copy_from(from);
        Ok(())
    }
}

/// Returns the `len` bytes at `offset` in a region, or `None` if they do not lie inside it.
fn region_slice<R: GuestRam + ?Sized>(ram: &R, region: usize, offset: u64, len: u64) -> Option<RamSlice<'_>> {
    let end = offset.checked_add(len)?;
    let inside = end <= ram.layout().regions().get(region)?.len;
    // SAFETY: `offset..end` lies inside the region, which the implementer of `GuestRam` promises to
    // be mapped at this address for as long as `ram` lives; the slice borrows `ram`.
    inside.then(|| unsafe { RamSlice::new(ram.host_address(region).add(offset as usize), len as usize) })
}

/// A piece of guest memory that other threads, vCPUs and the kernel may change at any time. It is
/// an address and a length, never a reference.
#[derive(Clone, Copy, Debug)]
pub struct RamSlice<'a> {
    address: NonNull<u8>,
    len: usize,
    _ram: PhantomData<&'a ()>,
}

// SAFETY: a `RamSlice` is only an address that stays valid for `'a` (promised to `RamSlice::new`);
// all accesses through it are volatile or done by the kernel, and races with them are part of its
// contract.
unsafe impl Send for RamSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for RamSlice<'_> {}

impl<'a> RamSlice<'a> {
    /// Returns the slice of the `len` bytes at `address`.
    ///
    /// # Safety
    /// The bytes must be mapped readable and writable, and must not be borrowed as Rust references,
    /// for all of `'a`.
    pub const unsafe fn new(address: NonNull<u8>, len: usize) -> Self {
        Self { address, len, _ram: PhantomData }
    }

    /// Returns the host address of the first byte, for an iovec.
    pub fn as_ptr(self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Returns the length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Returns whether the length is zero.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the slice without its first `bytes` bytes, or the empty slice if it is shorter.
    pub fn skip(self, bytes: usize) -> Self {
        let bytes = bytes.min(self.len);
        // SAFETY: `bytes <= self.len`, so address and length stay inside the memory promised to
        // `new`.
        unsafe { Self::new(self.address.add(bytes), self.len - bytes) }
    }

    /// Returns the first `bytes` bytes of the slice, or the whole slice if it is shorter.
    pub fn take(self, bytes: usize) -> Self {
        Self { len: bytes.min(self.len), ..self }
    }

    /// Copies from the beginning of the slice into `to`, as many bytes as the shorter of the two
    /// has.
    pub fn copy_to(self, to: &mut [u8]) {
        let len = self.len.min(to.len());
        let (blocks, rest) = to[..len].as_chunks_mut::<COPY_BLOCK>();
        let copied = len - rest.len();
        for (block, at) in blocks.iter_mut().zip((0..).step_by(COPY_BLOCK)) {
            for word in (0..COPY_BLOCK).step_by(8) {
                // SAFETY: `at + COPY_BLOCK <= self.len`.
                let value = unsafe { self.load(at + word) };
                block[word..word + 8].copy_from_slice(&value.to_ne_bytes());
            }
        }
        for (byte, at) in rest.iter_mut().zip(copied..) {
            // SAFETY: `at < self.len`, inside the memory promised to `new`.
            *byte = unsafe { self.address.add(at).read_volatile() };
        }
    }

    /// Copies `from` to the beginning of the slice, as many bytes as the shorter of the two has.
    pub fn copy_from(self, from: &[u8]) {
        let from = &from[..self.len.min(from.len())];
        let aligned = (self.address.as_ptr() as usize).is_multiple_of(8);
        let (blocks, rest) = if aligned { from.as_chunks::<COPY_BLOCK>() } else { (&[][..], from) };
        let copied = from.len() - rest.len();
        for (block, at) in blocks.iter().zip((0..).step_by(COPY_BLOCK)) {
            for (value, word) in block.as_chunks::<8>().0.iter().zip((0..).step_by(8)) {
                // SAFETY: `at + COPY_BLOCK <= self.len` and the address is 8-aligned; volatile
                // because the guest may run.
                unsafe { self.address.add(at + word).cast::<u64>().write_volatile(u64::from_ne_bytes(*value)) };
            }
        }
        for (&byte, at) in rest.iter().zip(copied..) {
            // SAFETY: `at < self.len`.
            unsafe { self.address.add(at).write_volatile(byte) };
        }
    }

    /// Fills the slice with zeros.
    pub fn zero(self) {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        let mut rest = self;
        while !rest.is_empty() {
            rest.copy_from(&ZEROS);
            rest = rest.skip(PAGE_SIZE);
        }
    }

    /// Returns whether every byte was zero when it was read. A running guest may change a byte at
    /// any time; its dirty tracker then reports the page again.
    pub fn is_zero(self) -> bool {
        // most pages that are not zero differ in their first words, so the loop returns after the
        // first block that has another bit
        const BLOCK: usize = 64;
        let blocks = self.len / BLOCK * BLOCK;
        for at in (0..blocks).step_by(BLOCK) {
            let mut any = 0;
            for word in (0..BLOCK).step_by(8) {
                // SAFETY: `at + word + 8 <= self.len`.
                any |= unsafe { self.load(at + word) };
            }
            if any != 0 {
                return false;
            }
        }
        // SAFETY: `at < self.len`.
        (blocks..self.len).all(|at| unsafe { self.address.add(at).read_volatile() } == 0)
    }

    /// Returns the eight bytes at offset `at`.
    ///
    /// # Safety
    /// `at + 8 <= self.len`.
    #[inline(always)]
    unsafe fn load(self, at: usize) -> u64 {
        // SAFETY: inside the slice, by the caller's promise.
        let address = unsafe { self.address.add(at) };
        if (address.as_ptr() as usize).is_multiple_of(8) {
            // SAFETY: mapped and aligned.
            return unsafe { address.cast::<u64>().read_volatile() };
        }
        let mut bytes = [0; 8];
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `i < 8`, inside the slice.
            *byte = unsafe { address.add(i).read_volatile() };
        }
        u64::from_ne_bytes(bytes)
    }
}

/// Guest RAM on the heap of this process, for tests, simulations and software guests.
///
/// Pages that were never written count as holes.
pub struct HeapRam {
    layout: RamLayout,
    regions: Vec<NonNull<u8>>,
}

// SAFETY: the memory belongs to this object alone and is reached only through `RamSlice`, whose
// accesses may race.
unsafe impl Send for HeapRam {}
// SAFETY: as above.
unsafe impl Sync for HeapRam {}

impl HeapRam {
    /// Allocates zeroed RAM of this layout.
    ///
    /// # Errors
    /// Returns an error of kind `OutOfMemory` if the allocator fails.
    pub fn new(layout: RamLayout) -> io::Result<Self> {
        let mut ram = Self { layout, regions: Vec::new() };
        for region in ram.layout.regions().to_vec() {
            // SAFETY: `allocation` gives a non-zero size (regions are never empty).
            let memory = unsafe { std::alloc::alloc_zeroed(allocation(region.len)?) };
            ram.regions.push(NonNull::new(memory).ok_or(io::ErrorKind::OutOfMemory)?);
        }
        Ok(ram)
    }
}

fn allocation(len: u64) -> io::Result<std::alloc::Layout> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    std::alloc::Layout::from_size_align(len, PAGE_SIZE).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

impl Drop for HeapRam {
    fn drop(&mut self) {
        for (address, region) in self.regions.iter().zip(self.layout.regions()) {
            if let Ok(layout) = allocation(region.len) {
                // SAFETY: allocated in `new` with this very layout, and freed only here.
                unsafe { std::alloc::dealloc(address.as_ptr(), layout) };
            }
        }
    }
}

// SAFETY: the regions are allocated whole in `new`, live as long as the object, and are never
// borrowed.
unsafe impl GuestRam for HeapRam {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, index: usize) -> NonNull<u8> {
        self.regions[index]
    }

    fn populated(&self, into: &mut PageSet) -> io::Result<()> {
        for page in self.layout.all().pages() {
            if self.slice(PageRange::new(page, 1)).is_ok_and(|s| !s.is_zero()) {
                into.insert(page);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::page::RamRegion;

    fn ram() -> HeapRam {
        let regions = vec![RamRegion { gpa: 0, len: 0x4000 }, RamRegion { gpa: 0x8000, len: 0x1000 }];
        HeapRam::new(RamLayout::new(regions).unwrap()).unwrap()
    }

    #[test]
    fn reads_what_was_written_at_any_alignment() {
        let ram = ram();
        let data: Vec<u8> = (0..100).collect();
        for at in [0, 1, 7, 8, 0xffd] {
            ram.write(at, &data).unwrap();
            let mut back = vec![0; 100];
            ram.read(at, &mut back).unwrap();
            assert_eq!(back, data, "at {at}");
        }
    }

    #[test]
    fn an_implementer_a_trait_object_and_an_arc_have_the_same_methods() {
        let own = Arc::new(ram());
        own.write(0x8000, b"here").unwrap();
        let shared: Arc<dyn GuestRam> = own.clone();
        let mut bytes = [0; 4];
        shared.read(0x8000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        let borrowed: &dyn GuestRam = &*own;
        assert_eq!(borrowed.slice_at(0x8000, 4).unwrap().as_ptr(), own.slice_at(0x8000, 4).unwrap().as_ptr());
        assert!(HeapRam::slice(&own, PageRange::new(5, 1)).is_err());
    }

    #[test]
    fn accesses_outside_are_refused() {
        let ram = ram();
        for (gpa, len) in [(0x4000, 1), (0x3fff, 2), (0x9000, 1), (u64::MAX, 1), (0, u64::MAX), (0x7fff, 1)] {
            assert!(ram.slice_at(gpa, len).is_err(), "{gpa:#x} {len:#x}");
        }
        assert!(ram.slice(PageRange::new(3, 2)).is_err(), "crosses a region");
        assert!(ram.slice(PageRange::new(4, 1)).is_ok());
        assert!(ram.slice(PageRange::new(5, 1)).is_err());
        assert!(ram.slice(PageRange::new(u64::MAX, u64::MAX)).is_err());
    }

    #[test]
    fn zero_pages_are_found() {
        let ram = ram();
        let page = ram.slice(PageRange::new(1, 1)).unwrap();
        assert!(page.is_zero());
        for at in [0, 1, 63, 64, 4095] {
            ram.write(0x1000 + at, &[1]).unwrap();
            assert!(!page.is_zero(), "byte {at}");
            page.zero();
            assert!(page.is_zero());
        }
        ram.write(0x8000, &[1]).unwrap();
        let mut populated = PageSet::empty(5);
        ram.populated(&mut populated).unwrap();
        assert!(populated.iter().eq([4]));
    }

    #[test]
    fn a_zero_is_told_from_anything_else_at_any_length_and_alignment() {
        let ram = ram();
        for len in (0..140).chain([4095]) {
            for start in [0, 3] {
                let slice = ram.slice_at(start, len).unwrap();
                assert!(slice.is_zero());
                for at in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|&at| at < len) {
                    ram.write(start + at, &[0x80]).unwrap();
                    assert!(!slice.is_zero(), "{start}+{at} of {len}");
                    ram.write(start + at, &[0]).unwrap();
                }
                // the byte after the slice does not count
                ram.write(start + len, &[1]).unwrap();
                assert!(slice.is_zero(), "{start}+{len}");
                ram.write(start + len, &[0]).unwrap();
            }
        }
    }

    /// RAM that does not know which of its pages were touched.
    struct Plain(HeapRam);

    // SAFETY: as for `HeapRam`.
    unsafe impl GuestRam for Plain {
        fn layout(&self) -> &RamLayout {
            self.0.layout()
        }

        fn host_address(&self, index: usize) -> NonNull<u8> {
            self.0.host_address(index)
        }
    }

    #[test]
    fn where_holes_are_not_known_there_are_none() {
        let (mut populated, ram) = (PageSet::empty(5), Plain(ram()));
        ram.populated(&mut populated).unwrap();
        assert_eq!(populated, PageSet::full(5));
        let slice = ram.slice_at(0x8010, 4).unwrap();
        assert_eq!(slice.as_ptr(), ram.host_address(1).as_ptr().wrapping_add(0x10));
    }
}
