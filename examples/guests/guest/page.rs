//! The contents of a page, and how they are checked.
//!
//! The contents of every page follow from its address, its generation (the number of times it was
//! rewritten) and the guest's seed: 512 words that no compressor can shrink. A page can therefore
//! be checked without a copy of it, and no two pages are equal.
//!
//! A page that is written repeatedly begins with a record of three words: address, generation, and
//! a checksum over both. Its owner knows the generation that it must find, from the order of
//! writing or from a [`Ledger`]. A misplaced page, an old page, a lost write and a torn page thus
//! give different errors.

use core::ptr::{read_volatile, write_volatile};

use crate::cpu::Fault;
use crate::layout::{PAGE_SIZE, fault};
use crate::memory::Area;

/// The words of a page.
pub const WORDS: usize = 512;
/// The words of the record at the start of a page; the fourth is not part of the check.
pub const RECORD_WORDS: usize = 4;

const LANES: usize = 8;

/// Mixes two numbers into one that looks random.
#[inline(always)]
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    z = (z ^ z >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    z ^ z >> 32
}

/// A stream of words that no compressor shrinks: eight parallel xorshift generators, which compile
/// to vector instructions.
pub struct Stream([u64; LANES]);

impl Stream {
    /// Returns the stream of a seed.
    #[inline(always)]
    pub fn new(seed: u64) -> Stream {
        let mut lanes = [0; LANES];
        for (lane, n) in lanes.iter_mut().zip(1..) {
            *lane = mix(seed, n) | 1; // A zero state would stay zero.
        }
        Stream(lanes)
    }

    /// Returns the next eight words.
    #[inline(always)]
    pub fn step(&mut self) -> [u64; LANES] {
        for lane in &mut self.0 {
            *lane ^= *lane << 13;
            *lane ^= *lane >> 7;
            *lane ^= *lane << 17;
        }
        self.0
    }
}

/// Returns all words of a page of the guest, for writes and checks of the whole page.
///
/// # Safety
/// The address must be that of a page of RAM outside the image that no other CPU accesses while the
/// result lives.
#[inline(always)]
unsafe fn words<'a>(address: u64) -> &'a mut [u64; WORDS] {
    // SAFETY: see above; every bit pattern is a valid word.
    unsafe { &mut *(address as *mut [u64; WORDS]) }
}

/// Fills a page with the stream of a seed.
#[inline(never)]
pub fn fill(address: u64, seed: u64) {
    let mut stream = Stream::new(seed);
    // SAFETY: callers pass pages of their own part of an area.
    for chunk in unsafe { words(address) }.chunks_exact_mut(LANES) {
        chunk.copy_from_slice(&stream.step());
    }
}

/// Checks a page against the stream of a seed, except for the first `skip` words.
#[inline(never)]
pub fn check(address: u64, seed: u64, skip: usize) -> Result<(), Fault> {
    let mut stream = Stream::new(seed);
    // SAFETY: callers pass pages of their own part of an area.
    for (n, chunk) in unsafe { words(address) }.chunks_exact(LANES).enumerate() {
        let expected = stream.step();
        // The loop collects differences without a branch, so that it compiles to vector
        // instructions.
        let mut different = 0;
        for lane in 0..LANES {
            let counts = if n * LANES + lane < skip { 0 } else { u64::MAX };
            different |= (chunk[lane] ^ expected[lane]) & counts;
        }
        if different != 0 {
            let lane = (0..LANES).find(|&lane| n * LANES + lane >= skip && chunk[lane] != expected[lane]).unwrap_or(0);
            let address = address + ((n * LANES + lane) * 8) as u64;
            return Err(Fault { kind: fault::CONTENT, address, expected: expected[lane], found: chunk[lane] });
        }
    }
    Ok(())
}

/// Reads a word.
#[inline(always)]
pub fn load(address: u64) -> u64 {
    // SAFETY: callers pass addresses in their own part of an area. The access is volatile because
    // the memory may not contain what was written.
    unsafe { read_volatile(address as *const u64) }
}

/// Writes a word.
#[inline(always)]
pub fn store(address: u64, value: u64) {
    // SAFETY: as in `load`.
    unsafe { write_volatile(address as *mut u64, value) }
}

/// Writes a page's record.
#[inline(always)]
pub fn write_record(address: u64, generation: u64) {
    store(address, address);
    store(address + 8, generation);
    store(address + 16, mix(address, generation));
}

/// Checks a page's record.
#[inline(always)]
pub fn check_record(address: u64, generation: u64) -> Result<(), Fault> {
    let (a, g, c) = (load(address), load(address + 8), load(address + 16));
    let sum = mix(address, generation);
    if a == address && g == generation && c == sum {
        return Ok(());
    }
    let fault = |kind, expected, found| Err(Fault { kind, address, expected, found });
    match () {
        () if a != address => fault(fault::MISPLACED, address, a),
        () if g != generation => fault(fault::STALE, generation, g),
        () => fault(fault::CHECKSUM, sum, c),
    }
}

/// Writes a whole page: the record and the body of this generation.
pub fn write_whole(address: u64, generation: u64, seed: u64) {
    fill(address, mix(mix(address, generation), seed));
    write_record(address, generation);
}

/// Checks a whole page: the record has generation `generation` and the body has generation `body`
/// (the same one if the page is always rewritten as a whole).
pub fn check_whole(address: u64, generation: u64, body: u64, seed: u64) -> Result<(), Fault> {
    check_record(address, generation)?;
    check(address, mix(mix(address, body), seed), RECORD_WORDS)
}

/// Counts how often each page was written, for workloads whose order of writing does not tell. It
/// has a u32 per page, in pages of the area itself.
#[derive(Clone, Copy)]
pub struct Ledger(Area);

impl Ledger {
    /// The entries in a page.
    pub const PER_PAGE: u64 = PAGE_SIZE / 4;

    /// Takes the pages for a ledger from the front of an area, enough for the rest of it, and
    /// clears them.
    pub fn take(area: &mut Area) -> Ledger {
        Self::over(area.take(area.pages().div_ceil(Self::PER_PAGE + 1)))
    }

    /// Returns a ledger in these pages, which it clears.
    pub fn over(pages: Area) -> Ledger {
        for page in 0..pages.pages() {
            // SAFETY: this is a page of the caller's part.
            unsafe { words(pages.address(page)).fill(0) };
        }
        Ledger(pages)
    }

    #[inline(always)]
    fn entry(&self, page: u64) -> *mut u32 {
        (self.0.address(page / Self::PER_PAGE) + page % Self::PER_PAGE * 4) as *mut u32
    }

    /// Returns the entry of a page.
    #[inline(always)]
    pub fn read(&self, page: u64) -> u32 {
        // SAFETY: `entry` stays within the ledger's pages.
        unsafe { read_volatile(self.entry(page)) }
    }

    /// Sets the entry of a page.
    #[inline(always)]
    pub fn write(&self, page: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe { write_volatile(self.entry(page), value) }
    }
}
