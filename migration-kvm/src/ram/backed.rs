//! RAM that a VMM has mapped itself, and its backing.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use migration_core::{GuestRam, PAGE_SIZE, PageRange, RamLayout};

use super::{
    Backing, HUGE_PAGE_SIZE, MappedRam, RamError,
    map::Advice,
    range::{self, RegionFile},
};

/// The backing of one region of RAM.
#[derive(Debug)]
pub enum RegionBacking {
    /// Private anonymous memory of 4 KiB pages.
    Anonymous,
    /// Private anonymous memory for which the kernel is asked to use 2 MiB pages where possible.
    TransparentHuge,
    /// A shared mapping of a memory file, or of any file of tmpfs.
    Memfd(MemoryFile),
    /// A shared mapping of a file of 2 MiB pages of hugetlbfs.
    Hugetlb(MemoryFile),
}

/// The part of a file that is mapped as a region.
#[derive(Debug)]
pub struct MemoryFile {
    /// The file, or a duplicate of its descriptor.
    pub file: OwnedFd,
    /// The offset of the region in the file, in bytes: a multiple of the file's page size.
    pub offset: u64,
}

impl RegionBacking {
    fn backing(&self) -> Backing {
        match self {
            Self::Anonymous => Backing::Anonymous,
            Self::TransparentHuge => Backing::TransparentHuge,
            Self::Memfd(_) => Backing::Memfd,
            Self::Hugetlb(_) => Backing::Hugetlb,
        }
    }

    fn into_file(self) -> Option<MemoryFile> {
        match self {
            Self::Anonymous | Self::TransparentHuge => None,
            Self::Memfd(file) | Self::Hugetlb(file) => Some(file),
        }
    }
}

/// Guest RAM of any kind with the backing of each region. A [pager](crate::pager::UserFaultPager)
/// needs it for memory that a VMM has mapped itself.
///
/// The named backings must be the true ones, which is not checked. If a file is not the file of the
/// mapping, pages cannot be installed, or they get the contents of that file. Memory safety does
/// not depend on it.
pub struct BackedRam {
    ram: Arc<dyn GuestRam>,
    backing: Backing,
    /// One file for each region; empty for private memory.
    files: Vec<MemoryFile>,
}

impl BackedRam {
    /// Returns the RAM with these backings, one for each region in the order of the layout. All
    /// have to be of one kind.
    ///
    /// # Errors
    /// - [`RamError::Regions`] if there is not one backing for each region
    /// - [`RamError::Mixed`] if the backings are of several kinds
    /// - [`RamError::HugeLength`] or [`RamError::Offset`] if a region or its offset is no multiple
    ///   of the page size
    /// - [`RamError::FileSize`] if a file ends before its region does
    /// - [`RamError::System`] if the length of a file cannot be read
    pub fn new(ram: Arc<dyn GuestRam>, regions: Vec<RegionBacking>) -> Result<Self, RamError> {
        let layout = ram.layout();
        if regions.len() != layout.regions().len() {
            return Err(RamError::Regions { named: regions.len(), regions: layout.regions().len() });
        }
        let backing = regions.first().map_or(Backing::Anonymous, RegionBacking::backing);
        if let Some(other) = regions.iter().map(RegionBacking::backing).find(|other| *other != backing) {
            return Err(RamError::Mixed { first: backing, other });
        }
        let page_size = if backing == Backing::Hugetlb { HUGE_PAGE_SIZE } else { PAGE_SIZE as u64 };
        let files: Vec<_> = regions.into_iter().filter_map(RegionBacking::into_file).collect();
        for (index, (file, region)) in files.iter().zip(layout.regions()).enumerate() {
            if !region.len.is_multiple_of(page_size) {
                return Err(RamError::HugeLength { index, len: region.len });
            }
            if !file.offset.is_multiple_of(page_size) {
                return Err(RamError::Offset { index, offset: file.offset, page_size });
            }
            let size = super::mapped::file_size(file.file.as_fd())?;
            if file.offset.checked_add(region.len).is_none_or(|end| end > size) {
                return Err(RamError::FileSize { index, len: region.len, size });
            }
        }
        Ok(Self { ram, backing, files })
    }

    /// Returns RAM that this crate has mapped, with its backing.
    ///
    /// # Errors
    /// [`RamError::System`] if the descriptors of its memory files cannot be duplicated.
    pub fn of(ram: Arc<MappedRam>) -> Result<Self, RamError> {
        let backing = ram.backing();
        let duplicate = |index| {
            let file = ram.memory_file(index)?;
            Some(file.try_clone_to_owned().map(|file| MemoryFile { file, offset: 0 }))
        };
        let files: io::Result<Vec<_>> = (0..ram.layout().regions().len()).filter_map(duplicate).collect();
        let files = files.map_err(RamError::system("duplicate a memory file's descriptor"))?;
        Ok(Self { ram, backing, files })
    }

    /// Returns the backing of the RAM.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Returns the regions of the RAM in guest physical address space.
    pub fn layout(&self) -> &RamLayout {
        self.ram.layout()
    }

    /// Returns the RAM as the VMM has mapped it.
    pub fn guest_ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    pub(crate) fn host_address(&self, index: usize) -> NonNull<u8> {
        self.ram.host_address(index)
    }

    /// Maps the same memory a second time. The second mapping has its own page tables, so neither
    /// userfaultfd nor a write-protecting tracker sees accesses to it. Returns `None` for private
    /// memory.
    pub(crate) fn alias(&self) -> Result<Option<MappedRam>, RamError> {
        if !self.backing.is_shared() {
            return Ok(None);
        }
        MappedRam::second(self.layout().clone(), self.backing, &self.files).map(Some)
    }

    /// See [`MappedRam::assemble_huge_pages`].
    pub(crate) fn assemble_huge_pages(&self, range: PageRange) -> Result<(), RamError> {
        range::advise(&*self.ram, range, Advice::Collapse, "assemble huge pages")
    }

    /// See [`MappedRam::discard`].
    pub(crate) fn discard(&self, range: PageRange) -> Result<(), RamError> {
        let file = |region: usize| {
            let MemoryFile { file, offset } = self.files.get(region)?;
            Some(RegionFile { file: file.as_fd(), offset: *offset })
        };
        range::discard(&*self.ram, self.backing, range, file)
    }

    /// Removes the page table entries of `range`. Shared memory keeps its contents; private memory
    /// loses them.
    pub(crate) fn unmap(&self, range: PageRange) -> Result<(), RamError> {
        range::advise(&*self.ram, range, Advice::Drop, "unmap memory")
    }
}

#[cfg(test)]
mod tests {
    use migration_core::RamRegion;

    use super::*;
    use crate::ram::map;

    fn ram(backing: Backing) -> Arc<MappedRam> {
        let regions = vec![RamRegion { gpa: 0, len: 0x3000 }, RamRegion { gpa: 0x10_0000, len: 0x5000 }];
        Arc::new(MappedRam::new(RamLayout::new(regions).unwrap(), backing).unwrap())
    }

    fn file(len: u64) -> OwnedFd {
        map::memory_file(len, false).unwrap()
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        let new = |regions| BackedRam::new(ram(Backing::Memfd), regions).map(drop);
        let of = |offset| RegionBacking::Memfd(MemoryFile { file: file(0x9000), offset });
        assert!(new(vec![of(0), of(0x4000)]).is_ok());
        assert!(matches!(new(vec![of(0)]), Err(RamError::Regions { named: 1, regions: 2 })));
        assert!(matches!(
            new(vec![of(0), RegionBacking::Anonymous]),
            Err(RamError::Mixed { first: Backing::Memfd, other: Backing::Anonymous })
        ));
        assert!(matches!(new(vec![of(0), of(0x1001)]), Err(RamError::Offset { index: 1, offset: 0x1001, .. })));
        assert!(matches!(new(vec![of(0), of(0x5000)]), Err(RamError::FileSize { index: 1, .. })));
        assert!(matches!(new(vec![of(u64::MAX - 0xfff), of(0)]), Err(RamError::FileSize { index: 0, .. })));
        let huge = |offset| RegionBacking::Hugetlb(MemoryFile { file: file(0x9000), offset });
        assert!(matches!(new(vec![huge(0), huge(0)]), Err(RamError::HugeLength { index: 0, len: 0x3000 })));
    }

    #[test]
    fn pages_are_dropped_where_they_are() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = ram(backing);
            let backed = BackedRam::of(ram.clone()).unwrap();
            let memory = &ram;
            memory.write(0x10_0000, &[1; 0x2000]).unwrap();
            backed.discard(PageRange::new(3, 1)).unwrap();
            let mut bytes = [9; 2];
            memory.read(0x10_0fff, &mut bytes).unwrap();
            assert_eq!(bytes, [0, 1], "{backing}");
            assert!(matches!(backed.discard(PageRange::new(7, 2)), Err(RamError::Outside { .. })));
            assert!(matches!(backed.unmap(PageRange::new(u64::MAX, 2)), Err(RamError::Outside { .. })));
            assert_eq!(backed.alias().unwrap().is_some(), backing.is_shared());
        }
    }
}
