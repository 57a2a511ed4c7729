//! The balloon: a bitmap in RAM tells the VMM which pages the guest does not need.
//!
//! Setting and clearing a bit costs no exit. Returning memory to the host costs one exit for a few
//! hundred pages. Only the order matters: the guest clears a page's bit before it writes the page
//! again. A reader that still finds the bit set can therefore skip the page without missing a
//! write. The contents of a page whose bit is set are undefined.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{PAGE_SIZE, balloon};
use crate::memory::Area;
use crate::page::store;
use crate::platform;

/// The address of the bitmap, with one bit for each page frame from 0 on; 0 if the VMM has no
/// balloon.
static BITMAP: AtomicU64 = AtomicU64::new(0);
/// The number of frames in the bitmap.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Takes the pages for a bitmap from the front of RAM and tells the VMM their address, if it has a
/// balloon.
///
/// The first CPU calls this before any other CPU uses the balloon.
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

/// Returns whether the VMM reads the bitmap.
pub fn is_on() -> bool {
    BITMAP.load(Ordering::Acquire) != 0
}

/// Returns the word and the bit of a page.
///
/// # Panics
/// When the page is outside the bitmap. Only to be called while the balloon [`is_on`].
fn bit(address: u64) -> (&'static AtomicU64, u64) {
    let frame = address / PAGE_SIZE;
    assert!(frame < FRAMES.load(Ordering::Relaxed), "page outside the balloon's bitmap");
    let word = (BITMAP.load(Ordering::Acquire) + frame / 64 * 8) as *mut u64;
    // SAFETY: the pointer is that of an aligned word in the bitmap's pages, which are used in no
    // other way.
    (unsafe { AtomicU64::from_ptr(word) }, 1 << (frame % 64))
}

/// Marks a page as not needed. Its contents may be lost from now on.
pub fn give(address: u64) {
    let (word, bit) = bit(address);
    word.fetch_or(bit, Ordering::AcqRel);
}

/// Marks a page as needed. This must be called before the page is written; its contents are
/// undefined until then.
pub fn take_back(address: u64) {
    let (word, bit) = bit(address);
    // The instruction is locked, so no later write becomes visible before it. Acquire keeps the
    // compiler from moving a write before it.
    word.fetch_and(!bit, Ordering::AcqRel);
}

/// Lets the host take the memory of those of these consecutive pages that are marked as not needed.
///
/// All of the pages must belong to the calling CPU, so that no other CPU takes one of them back
/// during the call.
pub fn discard(cpu: usize, address: u64, pages: u64) {
    let slots = BITMAP.load(Ordering::Acquire) + FRAMES.load(Ordering::Relaxed).div_ceil(64) * 8;
    let slot = slots + cpu as u64 * balloon::SLOT_SIZE;
    store(slot, address / PAGE_SIZE);
    store(slot + 8, pages);
    platform::write_port(balloon::BASE + balloon::DISCARD, cpu as u8);
}
