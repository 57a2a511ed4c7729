//! RAM: the loader's memory map, the page directories for it, and areas of pages to work on.

use core::ptr::{read_volatile, write_volatile};

use crate::boot::image_end;
use crate::layout::PAGE_SIZE;

const HUGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The type of an entry for RAM in the PVH memory map.
const RAM: u32 = 1;
/// The number of entries that are read, more than any loader writes; later ones are ignored.
const MAX_MAP_ENTRIES: u32 = 128;
/// The address of the page-directory pointer table. The directories of GiB 0 and GiB 3 follow it
/// (boot.rs).
const DIRECTORY_POINTERS: u64 = 0x10_3000;
/// The end of the RAM that is used: one page-directory pointer table reaches this far.
const MAX_ADDRESS: u64 = 512 * GIB;

/// The largest number of pieces in an area. RAM is usually split once, by the hole below 4 GiB.
pub const MAX_PIECES: usize = 4;

/// Pages of RAM, numbered from 0. They may lie in several pieces.
#[derive(Clone, Copy, Default)]
pub struct Area {
    pieces: [Piece; MAX_PIECES],
}

#[derive(Clone, Copy, Default)]
struct Piece {
    address: u64,
    pages: u64,
}

impl Area {
    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.pages).sum()
    }

    /// Returns the address of a page. Its number must be below [`Area::pages`].
    #[inline(always)]
    pub fn address(&self, mut page: u64) -> u64 {
        for piece in &self.pieces {
            if page < piece.pages {
                return piece.address + page * PAGE_SIZE;
            }
            page -= piece.pages;
        }
        panic!("page outside the area");
    }

    /// Returns the highest address at which a piece ends.
    pub fn end(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.address + piece.pages * PAGE_SIZE).max().unwrap_or(0)
    }

    /// Splits this many pages off the front, or all pages if there are fewer.
    pub fn take(&mut self, mut pages: u64) -> Area {
        let mut taken = Area::default();
        for (from, to) in self.pieces.iter_mut().zip(&mut taken.pieces) {
            let n = pages.min(from.pages);
            *to = Piece { address: from.address, pages: n };
            from.address += n * PAGE_SIZE;
            from.pages -= n;
            pages -= n;
        }
        taken
    }

    /// Returns the part of CPU number `index` of `of` CPUs.
    pub fn part(&self, index: usize, of: usize) -> Area {
        let cut = |n: usize| self.pages() * n as u64 / of as u64;
        let mut rest = *self;
        rest.take(cut(index));
        rest.take(cut(index + 1) - cut(index))
    }

    /// Returns the first two pieces, as pairs of address and pages, for the board.
    pub fn ranges(&self) -> [u64; 4] {
        let mut used = self.pieces.iter().filter(|piece| piece.pages != 0);
        let (first, second) = (used.next(), used.next());
        let pair = |piece: Option<&Piece>| piece.map_or((0, 0), |piece| (piece.address, piece.pages));
        [pair(first).0, pair(first).1, pair(second).0, pair(second).1]
    }
}

/// `hvm_start_info` of the PVH boot protocol, version 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// An entry of its memory map.
#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// The information from the loader.
pub struct Loader(StartInfo);

impl Loader {
    /// Reads `hvm_start_info`. Returns `None` if the address has none, or one without a memory map.
    pub fn read(address: u64) -> Option<Loader> {
        if address == 0 {
            return None;
        }
        // SAFETY: the PVH protocol puts a start info at the address in ebx, in memory below 4 GiB.
        // Anything else fails the checks.
        let info = unsafe { read_volatile(address as *const StartInfo) };
        (info.magic == START_INFO_MAGIC && info.version >= 1 && info.memory_map != 0).then_some(Loader(info))
    }

    /// Copies the command line, as far as it fits, and returns the number of bytes.
    pub fn command_line(&self, to: &mut [u8]) -> usize {
        if self.0.command_line == 0 {
            return 0;
        }
        let mut length = 0;
        while length < to.len() {
            // SAFETY: the loader put a string there that ends with a 0, and no byte after the 0 is
            // read.
            let byte = unsafe { read_volatile((self.0.command_line + length as u64) as *const u8) };
            if byte == 0 {
                break;
            }
            to[length] = byte;
            length += 1;
        }
        length
    }

    /// Maps all RAM above the image and returns it.
    ///
    /// Ranges are cut to multiples of 2 MiB, and only the first four of them are used.
    pub fn ram(&self) -> Area {
        let mut pool = Tables::new();
        // The directories lie between the image and the first area.
        let floor = (pool.next + pool.worst_case(self.entries())).next_multiple_of(HUGE);
        let mut area = Area::default();
        let mut free = area.pieces.iter_mut();
        for entry in self.entries().filter(|entry| entry.kind == RAM) {
            let start = entry.address.max(floor).next_multiple_of(HUGE);
            let end = entry.address.saturating_add(entry.size).min(MAX_ADDRESS) & !(HUGE - 1);
            if start >= end {
                continue;
            }
            let Some(piece) = free.next() else { break };
            pool.map(start, end);
            *piece = Piece { address: start, pages: (end - start) / PAGE_SIZE };
        }
        area
    }

    fn entries(&self) -> impl Iterator<Item = MapEntry> {
        let first = self.0.memory_map;
        (0..u64::from(self.0.memory_map_entries.min(MAX_MAP_ENTRIES))).map(move |n| {
            // SAFETY: the loader states this number of entries, and the table is in memory below 4
            // GiB.
            unsafe { read_volatile((first + n * size_of::<MapEntry>() as u64) as *const MapEntry) }
        })
    }
}

/// Builds page directories in the pages right after the image.
struct Tables {
    next: u64,
}

impl Tables {
    fn new() -> Tables {
        Tables { next: &raw const image_end as u64 }
    }

    fn worst_case(&self, entries: impl Iterator<Item = MapEntry>) -> u64 {
        let top = entries
            .filter(|entry| entry.kind == RAM)
            .map(|entry| entry.address.saturating_add(entry.size))
            .max()
            .unwrap_or(0);
        top.min(MAX_ADDRESS).div_ceil(GIB) * PAGE_SIZE
    }

    /// Maps a range of 2 MiB pages to itself. No part of the range was mapped before, so no
    /// translation can be stale.
    fn map(&mut self, start: u64, end: u64) {
        let mut address = start;
        while address < end {
            let pointer = (DIRECTORY_POINTERS + address / GIB * 8) as *mut u64;
            // SAFETY: the address is below 512 GiB, so the pointer is one of the table's 512
            // entries.
            let old = unsafe { read_volatile(pointer) };
            let directory = if old == 0 { self.next } else { old & !0xfff };
            let stop = end.min((address / GIB + 1) * GIB);
            while address < stop {
                let entry = (directory + address % GIB / HUGE * 8) as *mut u64;
                // SAFETY: a directory is a page that only this code uses. The bits are present,
                // writable, user, accessed, dirty, 2 MiB: the entries in boot.rs already have this
                // value and are not written again.
                unsafe {
                    if read_volatile(entry) != address | 0xe7 {
                        write_volatile(entry, address | 0xe7);
                    }
                }
                address += HUGE;
            }
            if old == 0 {
                // The directory is complete before it is linked: a KVM that shadows page tables
                // would intercept every later write.
                // SAFETY: as above.
                unsafe { write_volatile(pointer, directory | 0x27) };
                self.next += PAGE_SIZE;
            }
        }
    }
}

/// The functions of the C library that the compiler calls.
mod intrinsics {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        // SAFETY: the caller guarantees both ranges.
        unsafe {
            asm!("rep movsb", inout("rcx") length => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= length {
            // SAFETY: copying upwards never overwrites a byte that is still to be read.
            return unsafe { memcpy(to, from, length) };
        }
        let (last_to, last_from) = (to.wrapping_add(length).wrapping_sub(1), from.wrapping_add(length).wrapping_sub(1));
        // SAFETY: as above, downwards; the direction flag is clear again at the end.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") length => _, inout("rdi") last_to => _, inout("rsi") last_from => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, length: usize) -> *mut u8 {
        // SAFETY: the caller guarantees the range.
        unsafe {
            asm!("rep stosb", inout("rcx") length => _, inout("rdi") to => _, in("al") byte as u8, options(nostack))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
        for at in 0..length {
            // SAFETY: the caller guarantees both ranges. The reads are volatile so that the
            // compiler does not turn the loop into a call of this function.
            let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
        // SAFETY: the caller guarantees both ranges.
        unsafe { memcmp(a, b, length) }
    }
}
