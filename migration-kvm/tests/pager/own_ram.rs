//! RAM that a VMM has mapped itself: all of it in one mapping, of one file if it is shared.

use std::{io, os::fd::OwnedFd, ptr, ptr::NonNull, sync::Arc};

use migration_core::{GuestRam, PageRange, RamLayout, RamRegion, pager::Pager};
use migration_kvm::{
    pager::UserFaultPager,
    ram::{BackedRam, Backing, HUGE_PAGE_SIZE, MemoryFile, RegionBacking},
    tracker::UserFault,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::world::{Outcome, World, contents, ensure, expect, range};

/// Where RAM begins in its mapping and in its file.
const HEAD: u64 = HUGE_PAGE_SIZE;

/// A VMM's RAM.
pub struct OwnRam {
    layout: RamLayout,
    base: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
}

// SAFETY: the mapping belongs to this object, and all access goes through raw addresses.
unsafe impl Send for OwnRam {}
// SAFETY: as above.
unsafe impl Sync for OwnRam {}

impl OwnRam {
    fn new(backing: Backing) -> io::Result<Self> {
        let regions = vec![RamRegion { gpa: 0, len: 0x40_0000 }, RamRegion { gpa: 0x100_0000, len: 0x40_0000 }];
        let layout = RamLayout::new(regions).map_err(io::Error::other)?;
        let len = (HEAD + layout.bytes()) as usize;
        let file = match backing {
            Backing::Memfd => Some(memfd_create(c"own", MFdFlags::empty())?),
            Backing::Hugetlb => Some(memfd_create(c"own", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?),
            Backing::Anonymous | Backing::TransparentHuge => None,
        };
        if let Some(file) = &file {
            nix::unistd::ftruncate(file, len as i64)?;
        }
        let (flags, fd) = match &file {
            Some(file) => (libc::MAP_SHARED, std::os::fd::AsRawFd::as_raw_fd(file)),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { layout, base, len, file })
    }

    /// How the VMM names what backs its regions.
    fn backings(&self, backing: Backing) -> io::Result<Vec<RegionBacking>> {
        let mut offset = HEAD;
        let backings = self.layout.regions().iter().map(|region| {
            let begin = offset;
            offset += region.len;
            let file = || -> io::Result<MemoryFile> {
                let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?.try_clone()?;
                Ok(MemoryFile { file, offset: begin })
            };
            Ok(match backing {
                Backing::Anonymous => RegionBacking::Anonymous,
                Backing::TransparentHuge => RegionBacking::TransparentHuge,
                Backing::Memfd => RegionBacking::Memfd(file()?),
                Backing::Hugetlb => RegionBacking::Hugetlb(file()?),
            })
        });
        backings.collect()
    }
}

impl Drop for OwnRam {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped only here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

// SAFETY: all regions lie one after the other in the mapping, which stays until drop; nothing
// borrows it.
unsafe impl GuestRam for OwnRam {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, index: usize) -> NonNull<u8> {
        let before: u64 = self.layout.regions()[..index].iter().map(|region| region.len).sum();
        // SAFETY: the region lies inside the mapping.
        unsafe { self.base.add((HEAD + before) as usize) }
    }
}

fn world(backing: Backing) -> Result<World<OwnRam>, libtest_mimic::Failed> {
    let ram = Arc::new(OwnRam::new(backing)?);
    let fault = Arc::new(UserFault::new()?);
    let backed = BackedRam::new(ram.clone(), ram.backings(backing)?)?;
    let pager = UserFaultPager::over(backed, fault.clone())?;
    Ok(World { ram, fault, pager })
}

/// Missing pages of RAM that this crate has not mapped: what they held is dropped, who touches them
/// sleeps until they are installed, and nothing else is touched.
pub fn ram_of_the_vmms_own(backing: Backing) -> Outcome {
    let world = world(backing)?;
    let block_pages = world.pager.block_pages();
    // what an earlier round has brought, to be replaced or to stay
    world.write(600, &contents(600, 9))?;
    world.write(1030, &contents(1030, 9))?;
    let mut missing = world.all();
    missing.remove_range(PageRange::new(1024, 512));
    world.arm(&missing)?;
    ensure(world.read(1030)? == contents(1030, 9), || "a page that is not missing has changed".into())?;
    let answer = |fault: migration_core::pager::Fault| world.install(world.block(fault.page), 1).map(|_| ());
    let read = world.serve(answer, || world.read(600))??;
    ensure(read == contents(600, 1), || "stale, or torn".into())?;
    // a late copy, then the rest
    expect(world.install(world.block(600), 2)?, 0, block_pages)?;
    world.holds(world.block(600), 1)?;
    expect(world.install(range(0, 512), 1)?, 512, 0)?;
    world.holds(range(0, 512), 1)?;
    let zeros = world.pager.install_zeros(range(512, 512))?;
    expect(zeros, 512 - block_pages, block_pages)?;
    if block_pages == 1 {
        world.zeros(range(601, 400))?;
    }
    expect(world.install(range(1536, 512), 3)?, 512, 0)?;
    world.holds(range(1536, 512), 3)?;
    ensure(world.pager.missing() == 0, || format!("{} are missing", world.pager.missing()))?;
    world.pager.disarm()?;
    world.write(1, b"written as if nothing had been")
}
