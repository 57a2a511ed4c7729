//! The balloon: which pages nobody needs, told to the VMM through a bitmap in RAM.
//!
//! Setting and clearing a bit costs no exit; giving the memory back to the host costs one for some hundred pages. The order is what counts: the bit is cleared before the page is written again, so whoever still finds
//! it set and leaves the page alone misses nothing; and what a page holds while its bit is set is nobody's business any more.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{PAGE_SIZE, balloon};
use crate::memory::Area;
use crate::page::store;
use crate::platform;

/// Address of the bitmap, a bit for each page frame from 0 on; 0 if the VMM has no balloon.
static BITMAP: AtomicU64 = AtomicU64::new(0);
/// Frames that the bitmap is for.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Takes the pages for a bitmap off the front of RAM and tells the VMM, if it has a balloon. The first CPU does so, before any other looks.
pub fn set_up(ram: &mut Area) {
    if platform::read_port(balloon::BASE + balloon::COMMAND) != balloon::OFF {
        return;
    }
    let frames = ram.end() / PAGE_SIZE;
    let bytes = frames.div_ceil(64) * 8 + balloon::SLOTS * balloon::SLOT_SIZE;
    let pages = ram.take(bytes.div_ceil(PAGE_SIZE));
    let (address, last) = (pages.address(0), pages.address(pages.pages() - 1));
    if last != address + (pages.pages() - 1) * PAGE_SIZE {
        return; // Not in one piece.
    }
    (0..pages.pages() * PAGE_SIZE / 8).for_each(|word| store(address + 8 * word, 0));
    let registers = ((address / PAGE_SIZE) as u32).to_le_bytes().into_iter().chain((frames as u32).to_le_bytes());
    for (port, byte) in (balloon::BASE..).zip(registers) {
        platform::write_port(port, byte);
    }
    platform::write_port(balloon::BASE + balloon::COMMAND, balloon::ON);
    if platform::read_port(balloon::BASE + balloon::COMMAND) == balloon::ON {
        FRAMES.store(frames, Ordering::Relaxed);
        BITMAP.store(address, Ordering::Release);
    }
}

/// Whether the VMM looks at the bitmap.
pub fn is_on() -> bool {
    BITMAP.load(Ordering::Acquire) != 0
}

/// The word and the bit of a page. Only while the balloon [`is_on`].
fn bit(address: u64) -> (&'static AtomicU64, u64) {
    let frame = address / PAGE_SIZE;
    assert!(frame < FRAMES.load(Ordering::Relaxed), "page outside the balloon's bitmap");
    let word = (BITMAP.load(Ordering::Acquire) + frame / 64 * 8) as *mut u64;
    // SAFETY: an aligned word of the bitmap's pages, which are used in no other way.
    (unsafe { AtomicU64::from_ptr(word) }, 1 << (frame % 64))
}

/// The page is not needed. Its contents may be gone from now on.
pub fn give(address: u64) {
    let (word, bit) = bit(address);
    word.fetch_or(bit, Ordering::AcqRel);
}

/// The page is about to be used again: to be called before it is written. What it holds until then is undefined.
pub fn take_back(address: u64) {
    let (word, bit) = bit(address);
    // Locked, so no later write becomes visible before it; acquire, so that the compiler moves none before it either.
    word.fetch_and(!bit, Ordering::AcqRel);
}

/// Lets the host have the memory of those among these pages that are given, which lie one after the other and are all the calling CPU's: no other
/// may take one of them back meanwhile.
pub fn discard(cpu: usize, address: u64, pages: u64) {
    let slots = BITMAP.load(Ordering::Acquire) + FRAMES.load(Ordering::Relaxed).div_ceil(64) * 8;
    let slot = slots + cpu as u64 * balloon::SLOT_SIZE;
    store(slot, address / PAGE_SIZE);
    store(slot + 8, pages);
    platform::write_port(balloon::BASE + balloon::DISCARD, cpu as u8);
}
