//! The memory slots that hold a VM's RAM in KVM, and the ioctls for their dirty logs.

use std::{io, sync::Arc};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use migration_core::{GuestRam, PAGE_SHIFT, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion};
use thiserror::Error;
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref},
    ioctl_iow_nr, ioctl_iowr_nr,
};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, kvm_bindings::KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, kvm_bindings::KVMIO, 0xc0, kvm_clear_dirty_log);

/// The largest number of bytes of RAM that this crate puts into one memory slot.
///
/// KVM sets a slot in one system call. A kernel without preemption does not interrupt it, so every
/// other thread of that core waits. The call takes more than twice as long for twice the size: a
/// slot of 2 TiB takes 10 s, and the longest call for slots of this size 0.15 s.
/// `docs/performance.md` has figures.
pub const MAX_SLOT_BYTES: u64 = 16 << 30;

/// The sizes of pages that KVM can map, the largest first.
const PAGE_SIZES: [u64; 3] = [1 << 30, 2 << 20, PAGE_SIZE as u64];

/// Splits the regions of `layout` into pieces of at most `max_bytes` bytes, for one memory slot
/// each.
///
/// A region is split at multiples of a page size, so that no huge page lies in two slots. It is the
/// largest page size (1 GiB, 2 MiB or 4 KiB) that is not larger than `max_bytes`. Each piece is as
/// large as that permits. A `max_bytes` below 4 KiB counts as 4 KiB.
///
/// ```
/// use migration_core::{RamLayout, RamRegion};
/// use migration_kvm::tracker::slot_pieces;
/// let layout = RamLayout::new(vec![
///     RamRegion { gpa: 0, len: 3 << 30 },
///     RamRegion { gpa: 4 << 30, len: 20 << 30 },
/// ])?;
/// let pieces: Vec<_> = slot_pieces(&layout, 16 << 30).map(|p| (p.gpa >> 30, p.len >> 30)).collect();
/// assert_eq!(pieces, [(0, 3), (4, 16), (20, 4)]);
/// # Ok::<(), migration_core::LayoutError>(())
/// ```
pub fn slot_pieces(layout: &RamLayout, max_bytes: u64) -> impl Iterator<Item = RamRegion> + '_ {
    let max_bytes = max_bytes.max(PAGE_SIZE as u64);
    let align = PAGE_SIZES.into_iter().find(|&size| size <= max_bytes).unwrap_or(PAGE_SIZE as u64);
    layout.regions().iter().flat_map(move |region| {
        // cannot overflow: the regions of a layout do not wrap around
        let end = region.gpa + region.len;
        let mut gpa = region.gpa;
        std::iter::from_fn(move || {
            if gpa == end {
                return None;
            }
            // above `gpa`, because `max_bytes` is at least `align`, and a multiple of pages,
            // because `align` is
            let cut = gpa.checked_add(max_bytes).map_or(end, |to| to / align * align);
            let piece = RamRegion { gpa, len: cut.min(end) - gpa };
            gpa += piece.len;
            Some(piece)
        })
    })
}

/// A memory slot of KVM that holds guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// The slot number in KVM. The upper 16 bits are the address space, for SMM.
    pub slot: u32,
    /// The guest physical address of the first byte.
    pub gpa: u64,
    /// The length in bytes.
    pub len: u64,
    /// The page number of the first page in the RAM layout.
    pub first_page: u64,
    /// The host address of the first byte.
    pub host_address: u64,
    /// The flags of the slot without `KVM_MEM_LOG_DIRTY_PAGES`; usually 0.
    pub flags: u32,
}

impl MemorySlot {
    /// Returns the pages of the slot by page number.
    pub fn pages(&self) -> PageRange {
        PageRange::new(self.first_page, self.len >> PAGE_SHIFT)
    }
}

/// The error for a slot that does not fit the RAM.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("memory slot {slot} ({len:#x} bytes at {gpa:#x}) is not a piece of one RAM region, in whole pages")]
pub struct SlotError {
    /// The slot number in KVM.
    pub slot: u32,
    /// The guest physical address of the slot.
    pub gpa: u64,
    /// The length of the slot in bytes.
    pub len: u64,
}

/// The memory slots that hold a VM's RAM, and the RAM itself.
pub struct GuestSlots {
    ram: Arc<dyn GuestRam>,
    slots: Vec<MemorySlot>,
    /// Positions in `slots`, sorted by slot number. A VM with terabytes of RAM has hundreds of
    /// slots.
    by_number: Vec<usize>,
}

impl GuestSlots {
    /// Describes the slots that the VMM has set in KVM or will set with [`install`](Self::install).
    /// Each is given as `(slot, gpa, len, flags)`. Leave out slots of ROM and devices.
    ///
    /// # Safety
    /// A VM that the result is used with must have these slots with exactly these lengths, or must
    /// have no slots with these numbers. `ram` must outlive that VM. (Descriptors of the VM and of
    /// its vCPUs keep a VM alive.)
    ///
    /// # Errors
    /// Fails if a slot is not a piece of one region of `ram` in whole pages.
    pub unsafe fn new(
        ram: Arc<dyn GuestRam>,
        slots: impl IntoIterator<Item = (u32, u64, u64, u32)>,
    ) -> Result<Self, SlotError> {
        let describe = |(slot, gpa, len, flags): (u32, u64, u64, u32)| {
            let error = SlotError { slot, gpa, len };
            let memory = ram.slice_at(gpa, len).map_err(|_| error)?;
            let first_page = ram.layout().page_of(gpa).ok_or(error)?;
            let aligned = (gpa | len).trailing_zeros() >= PAGE_SHIFT && len != 0;
            let host_address = memory.as_ptr() as u64;
            let flags = flags & !KVM_MEM_LOG_DIRTY_PAGES;
            aligned.then_some(MemorySlot { slot, gpa, len, first_page, host_address, flags }).ok_or(error)
        };
        let slots = slots.into_iter().map(describe).collect::<Result<Vec<_>, _>>()?;
        let mut by_number: Vec<_> = (0..slots.len()).collect();
        by_number.sort_by_key(|&at| slots[at].slot);
        Ok(Self { ram, slots, by_number })
    }

    /// Describes slots of at most [`MAX_SLOT_BYTES`] for all of `ram`, numbered from `first_slot`,
    /// without flags. A larger region gets several slots.
    ///
    /// # Safety
    /// The requirements of [`new`](Self::new).
    ///
    /// # Errors
    /// The slots that are made here cause no error.
    pub unsafe fn of_regions(ram: Arc<dyn GuestRam>, first_slot: u32) -> Result<Self, SlotError> {
        // SAFETY: the caller guarantees what `in_pieces` requires.
        unsafe { Self::in_pieces(ram, first_slot, MAX_SLOT_BYTES) }
    }

    /// Describes slots of at most `max_bytes` bytes for all of `ram`, split like in
    /// [`slot_pieces`], numbered from `first_slot`, without flags.
    ///
    /// # Safety
    /// The requirements of [`new`](Self::new).
    ///
    /// # Errors
    /// The slots that are made here cause no error.
    pub unsafe fn in_pieces(ram: Arc<dyn GuestRam>, first_slot: u32, max_bytes: u64) -> Result<Self, SlotError> {
        let pieces: Vec<_> = slot_pieces(ram.layout(), max_bytes).collect();
        // SAFETY: the caller guarantees what `new` requires.
        unsafe { Self::new(ram, (first_slot..).zip(pieces).map(|(slot, r)| (slot, r.gpa, r.len, 0))) }
    }

    /// Sets all slots in `vm`. Call it when the VM is created: after the irqchip exists it can take
    /// milliseconds per slot.
    ///
    /// # Errors
    /// Fails with KVM's error. The slots before the failing one stay set.
    pub fn install(&self, vm: &VmFd) -> io::Result<()> {
        self.installing(vm).try_for_each(|set| set.map(drop))
    }

    /// Returns an iterator that sets the next slot in `vm` at each step. A VMM can do other work
    /// between the steps, or measure them. Each item is the slot that was set, or KVM's error.
    pub fn installing<'a>(&'a self, vm: &'a VmFd) -> impl Iterator<Item = io::Result<&'a MemorySlot>> + 'a {
        self.slots.iter().map(|slot| set(vm, slot, 0).map(|()| slot))
    }

    /// Returns the RAM.
    pub fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    /// Returns the slots.
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// Returns the page number in RAM of the page at `offset` (in pages) in slot number `slot`.
    /// Returns `None` if there is no such page or the slot holds no RAM.
    pub(super) fn page_in_slot(&self, slot: u32, offset: u64) -> Option<u64> {
        let at = self.by_number.binary_search_by_key(&slot, |&at| self.slots[at].slot).ok()?;
        let pages = self.slots[self.by_number[at]].pages();
        (offset < pages.count).then(|| pages.first + offset)
    }

    /// Returns the number of pages of RAM.
    pub(super) fn capacity(&self) -> u64 {
        self.ram.layout().pages()
    }

    /// Turns dirty logging on or off for all slots. If it cannot be turned on for all, it is turned
    /// off for all.
    pub(super) fn set_logging(&self, vm: &VmFd, on: bool) -> io::Result<()> {
        if !on {
            // continue after an error, because a slot that is still logged slows the guest down
            return self.slots.iter().map(|slot| set(vm, slot, 0)).fold(Ok(()), Result::and);
        }
        for (done, slot) in self.slots.iter().enumerate() {
            if let Err(error) = set(vm, slot, KVM_MEM_LOG_DIRTY_PAGES) {
                for slot in &self.slots[..done] {
                    let _ = set(vm, slot, 0); // report the first error
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Adds the pages of KVM's dirty logs to `into`. Without manual protection this clears the
    /// logs. `buffer` is scratch space.
    pub(super) fn read_logs(&self, vm: &VmFd, buffer: &mut Vec<u64>, into: &mut PageSet) -> io::Result<()> {
        for slot in &self.slots {
            let pages = slot.pages();
            buffer.clear();
            buffer.resize(pages.count.div_ceil(64) as usize, 0);
            let log = kvm_dirty_log {
                slot: slot.slot,
                padding1: 0,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: buffer.as_mut_ptr().cast() },
            };
            // SAFETY: KVM writes one bit for each page of the slot, rounded up to 64 bits. The slot
            // has `pages.count` pages, as guaranteed to `GuestSlots::new`, and the buffer has room
            // for that.
            if unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) } != 0 {
                return Err(io::Error::last_os_error());
            }
            into.insert_bitmap(pages.first, pages.count, buffer);
        }
        Ok(())
    }

    /// Clears the bits of those pages in KVM's dirty logs that are in `pages` and in `range`. That
    /// write-protects these pages.
    pub(super) fn clear_logs(&self, vm: &VmFd, range: PageRange, pages: &PageSet) -> io::Result<()> {
        for slot in &self.slots {
            let Some((first, num_pages, mut bits)) = clear_request(slot.pages(), range, pages) else { continue };
            let mut log = kvm_clear_dirty_log {
                slot: slot.slot,
                num_pages,
                first_page: first,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
            };
            // SAFETY: KVM reads one bit for each of `num_pages` pages, rounded up to 64 bits, and
            // `bits` has that many.
            if unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

fn set(vm: &VmFd, slot: &MemorySlot, flags: u32) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: slot.flags | flags,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the memory is guest RAM, which is mapped for as long as the VM exists, as guaranteed
    // to `GuestSlots::new`.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Makes the arguments of a request that clears exactly the pages in `range` and `pages` of a slot.
/// Returns the first page counted from the start of the slot, the number of pages, and the mask.
///
/// KVM demands multiples of 64 for the first page and for the number, which may also end with the
/// slot. Pages that are added for this have zeros in the mask.
fn clear_request(slot: PageRange, range: PageRange, pages: &PageSet) -> Option<(u64, u32, Vec<u64>)> {
    let first = range.first.max(slot.first);
    let within = PageRange::new(first, range.end().min(slot.end()).saturating_sub(first));
    let mut runs = pages.ranges_in(within).peekable();
    let base = (runs.peek()?.first - slot.first) / 64 * 64;
    let mut bits = Vec::new();
    for run in runs {
        // counted in pages from `base`
        let (mut at, end) = (run.first - slot.first - base, run.end() - slot.first - base);
        bits.resize(end.div_ceil(64) as usize, 0u64);
        while at < end {
            let n = (64 - at % 64).min(end - at);
            bits[(at / 64) as usize] |= (u64::MAX >> (64 - n)) << (at % 64);
            at += n;
        }
    }
    let count = (bits.len() as u64 * 64).min(slot.count - base);
    // never fails: KVM limits a slot to less than 2^31 pages
    Some((base, u32::try_from(count).ok()?, bits))
}

#[cfg(test)]
mod tests {
    use migration_core::ram::HeapRam;
    use proptest::prelude::*;

    use super::*;

    fn layout(regions: &[(u64, u64)]) -> RamLayout {
        RamLayout::new(regions.iter().map(|&(gpa, len)| RamRegion { gpa, len }).collect()).unwrap()
    }

    #[test]
    fn a_slot_is_whole_pages_of_one_region_with_flags_of_the_vmms_own() {
        let new = |gpa, len, flags| {
            let ram = Arc::new(HeapRam::new(layout(&[(0x1000, 0x8000)])).unwrap());
            // SAFETY: no VM uses the slots.
            unsafe { GuestSlots::new(ram, [(3, gpa, len, flags)]) }
        };
        for (gpa, len) in [(0x1800, 0x1000), (0x2000, 0x1800), (0x2000, 0), (0, 0x2000), (0x8000, 0x2000)] {
            let error = new(gpa, len, 0).err().unwrap();
            assert_eq!(error, SlotError { slot: 3, gpa, len });
        }
        let slots = new(0x2000, 0x3000, KVM_MEM_LOG_DIRTY_PAGES | 2).unwrap();
        let slot = slots.slots()[0];
        assert_eq!((slot.flags, slot.pages()), (2, PageRange::new(1, 3)));
    }

    #[test]
    fn a_piece_ends_where_a_huge_page_does() {
        let pieces = |regions: &[(u64, u64)], max_bytes| -> Vec<_> {
            slot_pieces(&layout(regions), max_bytes).map(|piece| (piece.gpa, piece.len)).collect()
        };
        const GIB: u64 = 1 << 30;
        let odd = pieces(&[(0x1000, 40 * GIB)], MAX_SLOT_BYTES);
        assert_eq!(odd.iter().map(|p| p.0 + p.1).collect::<Vec<_>>(), [16 * GIB, 32 * GIB, 40 * GIB + 0x1000]);
        assert_eq!(pieces(&[(0, 3 * GIB), (4 * GIB, 13 * GIB)], MAX_SLOT_BYTES), [(0, 3 * GIB), (4 * GIB, 13 * GIB)]);
        assert_eq!(pieces(&[(0, 2048 * GIB)], MAX_SLOT_BYTES).len(), 128);
        assert_eq!(pieces(&[(0, 0x3000)], 0), [(0, 0x1000), (0x1000, 0x1000), (0x2000, 0x1000)]);
        // up to the end of the address space
        assert_eq!(pieces(&[(0u64.wrapping_sub(0x3000), 0x2000)], u64::MAX).len(), 1);
    }

    #[test]
    fn pages_are_found_by_slot_and_offset() {
        let ram = Arc::new(HeapRam::new(layout(&[(0, 0x5000), (0x8000, 0x3000)])).unwrap());
        let described = [(9, 0x8000, 0x3000, 0), (7, 0x3000, 0x2000, 0), (8, 0, 0x3000, 0)];
        // SAFETY: no VM uses these slots.
        let slots = unsafe { GuestSlots::new(ram, described) }.unwrap();
        let found = [(9, 2), (7, 1), (8, 0), (8, 3), (6, 0), (1 << 16 | 8, 0)].map(|(s, o)| slots.page_in_slot(s, o));
        assert_eq!(found, [Some(7), Some(4), Some(0), None, None, None]);
    }

    proptest! {
        #[test]
        fn pieces_are_the_regions(
            (gap, first, second) in (0u64..700, 1u64..3000, 1u64..3000),
            max_bytes in 0u64..5_000_000,
        ) {
            let regions = [(gap << 12, first << 12), ((gap + first + 1) << 12, second << 12)];
            let pieces: Vec<_> = slot_pieces(&layout(&regions), max_bytes).collect();
            prop_assert!(pieces.iter().all(|p| p.len > 0 && p.len <= max_bytes.max(4096) && (p.gpa | p.len) % 4096 == 0));
            for (gpa, len) in regions {
                let mut at = gpa;
                for piece in pieces.iter().filter(|p| (gpa..gpa + len).contains(&p.gpa)) {
                    prop_assert_eq!(piece.gpa, at);
                    at += piece.len;
                }
                prop_assert_eq!(at, gpa + len);
            }
        }

        #[test]
        fn a_request_clears_exactly_the_pages_in_range_and_set(
            (slot_first, slot_count) in (0u64..200, 1u64..400),
            (first, count) in (0u64..500, 0u64..500),
            runs in prop::collection::vec((0u64..600, 1u64..80), 0..6),
        ) {
            let (slot, range) = (PageRange::new(slot_first, slot_count), PageRange::new(first, count));
            let mut pages = PageSet::empty(600);
            runs.iter().for_each(|&(first, count)| pages.insert_range(PageRange::new(first, count)));
            let want: Vec<_> = pages.ranges_in(range).flat_map(PageRange::pages)
                .filter(|&p| slot.pages().contains(&p)).collect();
            match clear_request(slot, range, &pages) {
                None => prop_assert!(want.is_empty()),
                Some((base, count, bits)) => {
                    prop_assert_eq!(base % 64, 0);
                    let to_end = base + u64::from(count) == slot.count;
                    prop_assert!(count % 64 == 0 || to_end);
                    prop_assert!(base + u64::from(count) <= slot.count);
                    prop_assert_eq!(bits.len() as u64, u64::from(count).div_ceil(64));
                    let got: Vec<_> = (0..bits.len() as u64 * 64)
                        .filter(|&b| bits[(b / 64) as usize] >> (b % 64) & 1 != 0)
                        .map(|b| slot.first + base + b).collect();
                    prop_assert_eq!(got, want);
                }
            }
        }
    }
}
