//! Pages and the layout of guest RAM.
//!
//! A *page* is always 4 KiB, whatever backs it. Inside the SDK and on the wire a page is named by
//! its **page number**: its position when the RAM regions are laid end to end in ascending order of
//! guest physical address (GPA). So holes of the address space cost nothing, and the check "is this
//! address RAM?" is one comparison with [`RamLayout::pages`]. [`RamLayout`] converts between page
//! numbers and addresses.

use std::ops::Range;

use thiserror::Error;

use crate::codec::{DecodeError, Reader, Writer};
pub use crate::limits::{MAX_PAGES, MAX_REGIONS};

/// The size of a page in bytes.
pub const PAGE_SIZE: usize = 4096;
/// The base-2 logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The number of pages of a stripe: 2 MiB of RAM. All pages of a stripe travel on one lane, so an
/// older copy of a page never overtakes a newer one, and a transparent huge page at the destination
/// is filled by one thread.
pub const STRIPE_PAGES: u64 = 512;

/// A run of consecutive pages, by page number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The number of the first page.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
}

impl PageRange {
    /// Returns the range of `count` pages from `first`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// Returns the number after the last page; saturates instead of wrapping.
    pub const fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Returns the size of the range in bytes.
    pub const fn bytes(self) -> u64 {
        self.count << PAGE_SHIFT
    }

    /// Returns the page numbers.
    pub fn pages(self) -> Range<u64> {
        self.first..self.end()
    }

    /// Returns the maximal runs of consecutive numbers in `pages`, which must ascend.
    pub(crate) fn runs_of(pages: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.end() == page => run.count += 1,
                _ => runs.push(Self::new(page, 1)),
            }
        }
        runs
    }
}

/// A contiguous piece of guest physical address space that is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RamRegion {
    /// The guest physical address of the first byte, a multiple of [`PAGE_SIZE`].
    pub gpa: u64,
    /// The length in bytes, a multiple of [`PAGE_SIZE`] and not zero.
    pub len: u64,
}

/// The reason why a list of regions is not a RAM layout.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// There is no region.
    #[error("a RAM layout needs at least one region")]
    Empty,
    /// The list has more than [`MAX_REGIONS`] regions.
    #[error("{0} RAM regions, more than the {MAX_REGIONS} supported")]
    TooManyRegions(usize),
    /// An address or a length is not a multiple of the page size, the length is zero, or the end
    /// overflows.
    #[error("RAM region {index} (address {gpa:#x}, length {len:#x}) is empty, unaligned or wraps around")]
    BadRegion {
        /// The position of the region in the list.
        index: usize,
        /// The address of the region.
        gpa: u64,
        /// The length of the region in bytes.
        len: u64,
    },
    /// A region starts before the preceding one ends.
    #[error("RAM region {0} overlaps its predecessor or is out of order")]
    Overlap(usize),
    /// There are more than [`MAX_PAGES`] pages in all.
    #[error("more RAM than the {MAX_PAGES} pages supported")]
    TooLarge,
}

/// The layout of guest RAM: regions in ascending order, disjoint and page-aligned. The constructors
/// check this.
///
/// ```
/// use migration_core::{RamLayout, RamRegion};
/// // 4 GiB of RAM with the usual hole below 4 GiB
/// let layout = RamLayout::new(vec![
///     RamRegion { gpa: 0, len: 3 << 30 },
///     RamRegion { gpa: 4 << 30, len: 1 << 30 },
/// ])?;
/// assert_eq!(layout.pages(), 1 << 20);
/// assert_eq!(layout.page_of(4 << 30), Some(3 << 18));
/// assert_eq!(layout.page_of(3 << 30), None);
/// assert_eq!(layout.gpa_of(3 << 18), Some(4 << 30));
/// # Ok::<(), migration_core::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    regions: Vec<RamRegion>,
    /// The page number of each region's first page, and as the last element the number of all
    /// pages.
    first: Vec<u64>,
}

impl RamLayout {
    /// Checks `regions` and returns the layout that they form.
    ///
    /// # Errors
    /// Returns an error if `regions` is empty, has more than [`MAX_REGIONS`] regions or
    /// [`MAX_PAGES`] pages, or if a region is empty, unaligned, wraps around, or begins before the
    /// preceding one ends.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(LayoutError::TooManyRegions(regions.len()));
        }
        let mask = PAGE_SIZE as u64 - 1;
        let mut first = Vec::with_capacity(regions.len() + 1);
        let (mut pages, mut last_end) = (0u64, 0u64);
        for (index, &RamRegion { gpa, len }) in regions.iter().enumerate() {
            let end = gpa.checked_add(len);
            let Some(end) = end.filter(|_| gpa & mask == 0 && len & mask == 0 && len != 0) else {
                return Err(LayoutError::BadRegion { index, gpa, len });
            };
            if gpa < last_end {
                return Err(LayoutError::Overlap(index));
            }
            last_end = end;
            first.push(pages);
            // cannot overflow: the regions are disjoint parts of 2^64 bytes
            pages += len >> PAGE_SHIFT;
            if pages > MAX_PAGES {
                return Err(LayoutError::TooLarge);
            }
        }
        first.push(pages);
        Ok(Self { regions, first })
    }

    /// Writes the number of regions, then the address and the length of each region.
    pub fn encode(&self, w: &mut Writer) {
        w.count(self.regions.len());
        for region in &self.regions {
            w.u64(region.gpa).u64(region.len);
        }
    }

    /// Reads a layout that [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// Returns an error if there are more than `most` regions, or if the regions are not a valid
    /// layout.
    pub fn decode(r: &mut Reader<'_>, most: usize) -> Result<Self, DecodeError> {
        let mut regions = Vec::new();
        for _ in 0..r.count(most, "number of RAM regions")? {
            regions.push(RamRegion { gpa: r.u64("region address")?, len: r.u64("region length")? });
        }
        Self::new(regions).map_err(|e| DecodeError::invalid("RAM layout", e.to_string()))
    }

    /// Returns the regions in ascending order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Returns the number of pages of all regions together.
    pub fn pages(&self) -> u64 {
        self.first.last().copied().unwrap_or(0)
    }

    /// Returns the number of bytes of all regions together.
    pub fn bytes(&self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// Returns the range of all pages of RAM.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.pages())
    }

    /// Returns the number of the page that holds guest physical address `gpa`, or `None` if `gpa`
    /// is outside RAM.
    pub fn page_of(&self, gpa: u64) -> Option<u64> {
        let index = self.regions.partition_point(|r| r.gpa <= gpa).checked_sub(1)?;
        let offset = gpa - self.regions[index].gpa;
        (offset < self.regions[index].len).then(|| self.first[index] + (offset >> PAGE_SHIFT))
    }

    /// Returns the guest physical address of `page`, or `None` if there is no such page.
    pub fn gpa_of(&self, page: u64) -> Option<u64> {
        let (region, offset) = self.locate(page)?;
        Some(self.regions[region].gpa + offset)
    }

    /// Returns the index of the region in which `page` lies, and the offset of the page in it in
    /// bytes. Returns `None` if there is no such page.
    pub fn locate(&self, page: u64) -> Option<(usize, u64)> {
        if page >= self.pages() {
            return None;
        }
        let region = self.first.partition_point(|&first| first <= page) - 1;
        Some((region, (page - self.first[region]) << PAGE_SHIFT))
    }

    /// Returns the pages of region `index`, or `None` if there is no such region.
    pub fn region_pages(&self, index: usize) -> Option<PageRange> {
        let (first, end) = (*self.first.get(index)?, *self.first.get(index + 1)?);
        Some(PageRange::new(first, end - first))
    }

    /// Cuts `range` at the borders of regions. Returns for each piece the index of its region, the
    /// offset of the piece in that region in bytes, and its pages. The part of `range` beyond the
    /// end of RAM is left out.
    pub fn split(&self, range: PageRange) -> impl Iterator<Item = (usize, u64, PageRange)> + '_ {
        let (mut at, end) = (range.first, range.end().min(self.pages()));
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (region, offset) = self.locate(at)?;
            let piece = PageRange::new(at, end.min(self.first[region + 1]) - at);
            at = piece.end();
            Some((region, offset, piece))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> RamLayout {
        RamLayout::new(vec![RamRegion { gpa: 0, len: 0x4000 }, RamRegion { gpa: 0x10000, len: 0x2000 }]).unwrap()
    }

    #[test]
    fn page_numbers_skip_holes() {
        let l = layout();
        assert_eq!((l.pages(), l.bytes()), (6, 0x6000));
        assert_eq!(
            [0, 1, 2].map(|r| l.region_pages(r)),
            [Some(PageRange::new(0, 4)), Some(PageRange::new(4, 2)), None]
        );
        assert_eq!(l.page_of(0x3fff), Some(3));
        assert_eq!(l.page_of(0x4000), None);
        assert_eq!(l.page_of(0x10000), Some(4));
        assert_eq!(l.gpa_of(5), Some(0x11000));
        assert_eq!(l.gpa_of(6), None);
        let pieces: Vec<_> = l.split(PageRange::new(2, 100)).collect();
        assert_eq!(pieces, [(0, 0x2000, PageRange::new(2, 2)), (1, 0, PageRange::new(4, 2))]);
    }

    #[test]
    fn bad_layouts_are_refused() {
        let new = |r: &[(u64, u64)]| RamLayout::new(r.iter().map(|&(gpa, len)| RamRegion { gpa, len }).collect());
        assert_eq!(new(&[]), Err(LayoutError::Empty));
        for bad in [(1, 0x1000), (0, 0), (0, 5), (u64::MAX - 0xfff, 0x2000)] {
            assert!(matches!(new(&[bad]), Err(LayoutError::BadRegion { .. })), "{bad:?}");
        }
        assert_eq!(new(&[(0, 0x2000), (0x1000, 0x1000)]), Err(LayoutError::Overlap(1)));
        assert_eq!(new(&[(0, (MAX_PAGES + 1) << 12)]), Err(LayoutError::TooLarge));
    }
}
