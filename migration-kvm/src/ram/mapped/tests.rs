use super::*;

fn layout() -> RamLayout {
    let regions = vec![RamRegion { gpa: 0x1000, len: 0x30_0000 }, RamRegion { gpa: 0x80_0000, len: 0x20_3000 }];
    RamLayout::new(regions).unwrap()
}

fn populated(ram: &MappedRam) -> PageSet {
    let mut set = PageSet::empty(ram.layout().pages());
    ram.populated(&mut set).unwrap();
    set
}

#[test]
fn holes_are_known_and_come_back() {
    for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd] {
        let ram = MappedRam::new(layout(), backing).unwrap();
        assert!(populated(&ram).is_empty(), "{backing}");
        for (index, region) in layout().regions().iter().enumerate() {
            let address = ram.host_address(index).as_ptr() as u64;
            assert_eq!(address % HUGE_PAGE_SIZE, region.gpa % HUGE_PAGE_SIZE);
        }
        ram.write(0x5000, &[1]).unwrap();
        ram.write(0xa0_2fff, &[1]).unwrap();
        let mut byte = [9];
        ram.read(0x9000, &mut byte).unwrap(); // maps the zero page, which is still a hole
        let set = populated(&ram);
        assert!(set.contains(4) && set.contains(0x300 + 0x202), "{backing} {set:?}");
        if backing != Backing::TransparentHuge {
            assert_eq!(set.contains(8), backing == Backing::Memfd, "{backing} {set:?}");
        }
        ram.discard(PageRange::new(4, 1)).unwrap();
        assert!(!populated(&ram).contains(4), "{backing}");
        ram.prefault(PageRange::new(0x2fe, 4)).unwrap();
        assert_eq!(populated(&ram).count_in(PageRange::new(0x2fe, 4)), 4, "{backing}");
        assert!(matches!(ram.prefault(PageRange::new(0x500, 4)), Err(RamError::Outside { .. })));
        assert!(ram.discard(PageRange::new(u64::MAX, 2)).is_err());
    }
}

/// Without `/proc`, every page that may hold data is reported.
#[test]
fn without_proc_holes_of_private_memory_are_not_known() {
    for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd] {
        let mut ram = MappedRam::new(layout(), backing).unwrap();
        ram.pagemap = Pagemap::open_if_at("/no/such/proc/self/pagemap").unwrap();
        assert!(ram.pagemap.is_none());
        ram.write(0x5000, &[1]).unwrap();
        let (found, all) = (populated(&ram), ram.layout().pages());
        assert_eq!(found.len(), if backing == Backing::Memfd { 1 } else { all }, "{backing}");
        assert!(found.contains(4));
    }
}

#[test]
fn a_second_mapping_sees_the_same_memory() {
    let ram = MappedRam::new(layout(), Backing::Memfd).unwrap();
    let alias = ram.alias().unwrap().unwrap();
    alias.write(0x7000, b"x").unwrap();
    let mut byte = [0];
    assert!(populated(&ram).iter().eq([6]), "not mapped here, but in the file");
    ram.read(0x7000, &mut byte).unwrap();
    assert_eq!(&byte, b"x");
    assert!(MappedRam::new(layout(), Backing::Anonymous).unwrap().alias().unwrap().is_none());
}

#[test]
fn wrong_files_are_refused() {
    let files = || [0x30_0000, 0x20_3000].map(|len| map::memory_file(len, false).unwrap());
    let from = |files: Vec<OwnedFd>| MappedRam::from_memory_files(layout(), files, Backing::Memfd).map(|_| ());
    let [a, b] = files();
    assert!(matches!(from(vec![b, a]), Err(RamError::FileSize { index: 0, .. })));
    let [a, _] = files();
    assert!(matches!(from(vec![a]), Err(RamError::FileSize { index: 1, size: 0, .. })));
    let [a, _] = files();
    let open = nix::sys::memfd::memfd_create(c"t", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&open, 0x20_3000).unwrap();
    assert!(matches!(from(vec![a, open]), Err(RamError::Unsealed(1))));
    // a file that may still grow
    let [a, _] = files();
    let open = nix::sys::memfd::memfd_create(c"t", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&open, 0x20_3000).unwrap();
    let seal = nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK);
    nix::fcntl::fcntl(&open, seal).unwrap();
    assert!(matches!(from(vec![a, open]), Err(RamError::Unsealed(1))));
    // a file of a file system, and a descriptor that is no file
    let [a, _] = files();
    let plain = fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let len = plain.metadata().unwrap().len();
    let one = RamLayout::new(vec![RamRegion { gpa: 0, len: len / 4096 * 4096 }]).unwrap();
    let error = MappedRam::from_memory_files(one, vec![plain.into()], Backing::Memfd).map(|_| ()).unwrap_err();
    assert!(matches!(error, RamError::NotMemory { index: 0, .. } | RamError::FileSize { .. }), "{error}");
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    assert!(from(vec![a, pipe]).is_err());
    // files with another page size, too many files, and a private backing
    let [a, b] = files();
    let huge = RamLayout::new(vec![RamRegion { gpa: 0, len: 0x40_0000 }]).unwrap();
    let small = vec![map::memory_file(0x40_0000, false).unwrap()];
    let error = MappedRam::from_memory_files(huge, small, Backing::Hugetlb).map(|_| ()).unwrap_err();
    assert!(matches!(error, RamError::NotMemory { index: 0, backing: Backing::Hugetlb }), "{error}");
    let [c, _] = files();
    assert!(matches!(from(vec![a, b, c]), Err(RamError::FileSize { index: 2, .. })));
    let error = MappedRam::from_memory_files(layout(), files().into(), Backing::Anonymous).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("memfd or hugetlb can"), "{error}");
}

#[test]
fn another_mapping_is_prefaulted_where_it_has_contents() {
    let ram = MappedRam::new(layout(), Backing::Memfd).unwrap();
    ram.write(0x5000, &[1; 0x3000]).unwrap();
    let files = ram.memory_files().unwrap().into_iter().map(|file| file.try_clone_to_owned().unwrap()).collect();
    let other = MappedRam::from_memory_files(layout(), files, Backing::Memfd).unwrap();
    assert!(other.prefault_shared(Duration::from_secs(60)).unwrap());
    // holes stay holes
    assert!(populated(&other).iter().eq([4, 5, 6]), "{:?}", populated(&other));
    let mut byte = [0];
    other.read(0x7fff, &mut byte).unwrap();
    assert_eq!(byte, [1]);
    assert!(MappedRam::new(layout(), Backing::Anonymous).unwrap().memory_files().is_err());
    // with a function of the caller, which gets only populated pages
    let mut pieces = Vec::new();
    let mut note = |piece: PageRange| {
        pieces.push(piece);
        Ok(())
    };
    assert!(other.prefault_shared_by(Duration::from_secs(60), &mut note).unwrap());
    assert_eq!(pieces, [PageRange::new(4, 3)]);
    assert!(!other.prefault_shared_by(Duration::ZERO, &mut |_| Ok(())).unwrap());
    let failed = other.prefault_shared_by(Duration::from_secs(60), &mut |_| Err(RamError::Unsealed(9)));
    assert!(matches!(failed, Err(RamError::Unsealed(9))));
    // unmapping in one mapping changes the contents of neither
    assert!(ram.unmap_shared_in_pieces(Duration::from_secs(60)).unwrap());
    assert!(populated(&ram).iter().eq([4, 5, 6]));
    ram.read(0x7fff, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn pieces_are_filled_in_every_region() {
    let ram = MappedRam::new(layout(), Backing::Memfd).unwrap();
    let last = ram.layout().pages() - 1;
    // across the border of two pieces, and in the second region
    for page in [4, 255, 256, 257, 0x301, last] {
        ram.write(ram.layout().gpa_of(page).unwrap(), &[1]).unwrap();
    }
    let mut pieces = Vec::new();
    let mut note = |piece: PageRange| {
        pieces.push((piece.first, piece.count));
        Ok(())
    };
    assert!(ram.prefault_shared_by(Duration::from_secs(60), &mut note).unwrap());
    assert_eq!(pieces, [(4, 1), (255, 1), (256, 2), (0x301, 1), (last, 1)]);
    // with this process's own page tables, in a mapping that has touched nothing
    let files = ram.memory_files().unwrap().into_iter().map(|file| file.try_clone_to_owned().unwrap()).collect();
    let other = MappedRam::from_memory_files(layout(), files, Backing::Memfd).unwrap();
    assert!(mapped(&other).is_empty());
    assert!(other.prefault_shared(Duration::from_secs(60)).unwrap());
    let filled = mapped(&other);
    assert!([4, 255, 256, 257, 0x301, last].iter().all(|page| filled.contains(page)), "{filled:?}");
}

/// The pages of shared memory that this process has mapped.
fn mapped(ram: &MappedRam) -> Vec<u64> {
    let mut found = Vec::new();
    for index in 0..ram.layout().regions().len() {
        let pages = ram.layout().region_pages(index).unwrap();
        let address = ram.host_address(index).as_ptr() as u64;
        let add = |from: u64, end: u64| {
            let (first, end) = ((from - address) >> PAGE_SHIFT, (end - address) >> PAGE_SHIFT);
            found.extend(PageRange::new(pages.first + first, end - first).pages());
        };
        ram.pagemap.as_ref().unwrap().resident(address, pages.bytes(), add).unwrap();
    }
    found
}

#[test]
fn shared_memory_is_unmapped_and_private_memory_is_not() {
    let regions = [UNMAP_PIECE + 10, 3].map(|pages| pages * PAGE_SIZE as u64);
    let regions = vec![RamRegion { gpa: 0, len: regions[0] }, RamRegion { gpa: 1 << 30, len: regions[1] }];
    let layout = RamLayout::new(regions).unwrap();
    let touched = [0, UNMAP_PIECE - 1, UNMAP_PIECE, UNMAP_PIECE + 9, UNMAP_PIECE + 12];
    let long = Duration::from_secs(60);
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let ram = MappedRam::new(layout.clone(), backing).unwrap();
        let touch = || {
            for page in touched {
                ram.write(ram.layout().gpa_of(page).unwrap(), &[7]).unwrap();
            }
        };
        touch();
        if backing == Backing::Memfd {
            // the kernel maps pages that surround a touched page with it
            assert!(touched.iter().all(|page| mapped(&ram).contains(page)));
            assert!(!ram.unmap_shared_in_pieces(Duration::ZERO).unwrap());
            assert!(touched.iter().all(|page| mapped(&ram).contains(page)));
            assert!(ram.unmap_shared_in_pieces(long).unwrap());
            assert!(mapped(&ram).is_empty());
        } else {
            assert!(ram.unmap_shared_in_pieces(Duration::ZERO).unwrap());
        }
        for page in touched {
            let mut byte = [0];
            ram.read(ram.layout().gpa_of(page).unwrap(), &mut byte).unwrap();
            assert_eq!(byte, [7], "{backing}, page {page}");
        }
    }
}

#[test]
fn a_file_is_full_when_every_page_has_memory() {
    let ram = MappedRam::new(layout(), Backing::Memfd).unwrap();
    let (first, second) = (ram.layout().region_pages(0).unwrap(), ram.layout().region_pages(1).unwrap());
    assert!(!ram.regions[0].is_full(first));
    ram.prefault(PageRange::new(first.first, first.count - 1)).unwrap();
    assert!(!ram.regions[0].is_full(first));
    ram.prefault(first).unwrap();
    assert!(ram.regions[0].is_full(first) && !ram.regions[1].is_full(second));
    let private = MappedRam::new(layout(), Backing::Anonymous).unwrap();
    private.prefault(first).unwrap();
    assert!(!private.regions[0].is_full(first));
}

#[test]
fn rests_get_longer_while_the_core_is_shared() {
    let mut pacer = Pacer::default();
    let mut adapt = |late| {
        pacer.adapt(late);
        pacer.0
    };
    let late = LATE_WAKE_UP + Duration::from_nanos(1);
    assert_eq!([late; 6].map(&mut adapt), [2, 4, 8, 16, 16, 16]);
    assert_eq!([LATE_WAKE_UP; 3].map(&mut adapt), [15, 14, 13]);
    (0..20).for_each(|_| {
        adapt(Duration::ZERO);
    });
    assert_eq!(adapt(Duration::ZERO), 1);
}

#[test]
fn memory_files_are_distinguished() {
    let (ram, other) =
        (MappedRam::new(layout(), Backing::Memfd).unwrap(), MappedRam::new(layout(), Backing::Memfd).unwrap());
    let files = ram.memory_files().unwrap();
    let copies: Vec<OwnedFd> = files.iter().map(|file| file.try_clone_to_owned().unwrap()).collect();
    assert!(ram.is_in(&copies).unwrap() && !other.is_in(&copies).unwrap());
    assert!(!ram.is_in(&copies[1..]).unwrap());
    let swapped: Vec<_> = files.iter().rev().collect();
    assert!(!ram.is_in(&swapped).unwrap());
    assert!(MappedRam::new(layout(), Backing::Anonymous).unwrap().is_in(&copies).is_err());
}

#[test]
fn huge_pages_are_checked_before_use() {
    let error = MappedRam::new(layout(), Backing::Hugetlb).map(|_| ()).unwrap_err();
    assert!(matches!(error, RamError::HugeLength { index: 0, .. }), "{error}");
    // more than any host reserves
    let huge = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 45 }]).unwrap();
    let error = MappedRam::new(huge, Backing::Hugetlb).map(|_| ()).unwrap_err();
    assert!(matches!(error, RamError::NoHugePages { needed: 0x100_0000, .. }), "{error}");
    assert!(error.to_string().contains("/proc/sys/vm/nr_hugepages"));
}
