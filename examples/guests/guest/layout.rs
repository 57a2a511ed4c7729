//! The words that guest and VMM share: where the board and the parameter page are, and what is in them.
//!
//! Compiled twice, into the guest (`main.rs`) and into the crate `guests`, so that the two sides cannot disagree.
//! All numbers are little endian, all offsets are bytes from the start of the page.

/// Guest-physical address of the board page, the first page of the image. The guest writes it, the VMM reads it.
pub const BOARD_ADDRESS: u64 = 0x10_0000;
/// Guest-physical address of the parameter page. The VMM writes it into the file, the guest reads it.
pub const PARAMS_ADDRESS: u64 = 0x10_1000;
/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Most vCPUs that the guest runs on: the number of records that fit on the board.
pub const MAX_CPUS: usize = 16;

/// First word of the board ("MVMMBOR1"): without it there is no guest of ours behind the page.
pub const BOARD_MAGIC: u64 = 0x314b_524f_4d4d_564d;
/// Layout version in [`board::VERSION`].
pub const BOARD_VERSION: u32 = 1;
/// First word of the parameter page ("MVMMPAR1").
pub const PARAMS_MAGIC: u64 = 0x3152_4150_4d4d_564d;
/// Buckets of the durations of accesses on the board: eight to each doubling, so that a bucket is at most an eighth wide.
pub const ACCESS_BUCKETS: usize = 192;
/// The first bucket begins at two to the power of this, in ticks: 20 µs even on a clock of 205 MHz.
const ACCESS_FIRST: u32 = 12;
/// Longest workload spec that the parameter page takes.
pub const MAX_SPEC: usize = 2048;

/// Offsets on the board page.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod board {
    /// u64: [`super::BOARD_MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// u32: [`super::BOARD_VERSION`].
    pub const VERSION: usize = 0x08;
    /// u32: CPUs that run.
    pub const CPUS: usize = 0x0c;
    /// u64: one of [`super::state`].
    pub const STATE: usize = 0x10;
    /// u64: the TSC frequency which the guest reckons with, in kHz.
    pub const TSC_KHZ: usize = 0x18;
    /// u64: TSC ticks from the guest's first instruction in ring 3 until its loop started.
    pub const FILL_TICKS: usize = 0x20;
    /// Four u64: kind ([`super::fault`]), address, expected, found. Kind 0 means that nothing went wrong.
    pub const FIRST_ERROR: usize = 0x40;
    /// u64, written by the VMM: each new value makes every CPU forget its longest gap and start measuring again.
    pub const CONTROL: usize = 0x80;
    /// u64, written by the VMM: each new value makes every CPU check all its data pages once, between its other work.
    pub const VERIFY: usize = 0x88;
    /// Two pairs of u64, address and pages: where the workload's own pages are (two, as RAM may be split by the 3–4 GiB hole).
    pub const WORK_RANGES: usize = 0x90;
    /// Two pairs of u64, address and pages: where the `data` pages are.
    pub const DATA_RANGES: usize = 0xb0;
    /// u64: pages in the balloons of all CPUs.
    pub const BALLOON_PAGES: usize = 0xd0;
    /// u64: times that a balloon was inflated.
    pub const INFLATIONS: usize = 0xd8;
    /// u64: times that memory was short, so that a balloon was deflated.
    pub const DEFLATIONS: usize = 0xe0;
    /// The records of the CPUs, [`RECORD_SIZE`] bytes each.
    pub const RECORDS: usize = 0x100;
    /// Bytes of a CPU's record: a cache line of its own.
    pub const RECORD_SIZE: usize = 64;
    /// u64: ticks from which the access to a page is counted; 0 if the workload does not measure accesses.
    pub const ACCESS_LIMIT: usize = 0x500;
    /// u64: the longest access, in ticks.
    pub const ACCESS_LONGEST: usize = 0x508;
    /// [`super::ACCESS_BUCKETS`] u64: accesses of all CPUs by their duration, see [`super::access_bucket`]. Forgotten together with the
    /// longest gaps, see [`CONTROL`].
    pub const ACCESS_COUNTS: usize = 0x600;
}

/// The bucket of a duration in ticks. Those that are shorter or longer than all buckets go to the first and the last.
#[allow(dead_code)] // The guest's half.
pub const fn access_bucket(ticks: u64) -> usize {
    if ticks < 1 << ACCESS_FIRST {
        return 0;
    }
    let doubling = ticks.ilog2();
    let bucket = ((doubling - ACCESS_FIRST) as usize) * 8 + (ticks >> (doubling - 3) & 7) as usize;
    if bucket < ACCESS_BUCKETS { bucket } else { ACCESS_BUCKETS - 1 }
}

/// Where a bucket begins, in ticks. Also for the one behind the last.
#[allow(dead_code)] // The host's half.
pub const fn access_bucket_start(bucket: usize) -> u64 {
    (8 + bucket as u64 % 8) << (ACCESS_FIRST as usize - 3 + bucket / 8)
}

/// Offsets in a CPU's record on the board, all u64.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod record {
    /// Times that the CPU looked at its clock.
    pub const HEARTBEATS: usize = 0x00;
    /// Operations of the workload: pages written, queries, sorted segments, ticks.
    pub const OPERATIONS: usize = 0x08;
    /// Longest time between two heartbeats, in TSC ticks.
    pub const LONGEST_GAP: usize = 0x10;
    /// Pages or records that were not what they had to be.
    pub const ERRORS: usize = 0x18;
    /// TSC at the end of the longest gap.
    pub const GAP_END: usize = 0x20;
    /// The value of [`super::board::CONTROL`] which this CPU has obeyed.
    pub const RESET_SEEN: usize = 0x28;
    /// The value of [`super::board::VERIFY`] which this CPU has finished.
    pub const VERIFY_DONE: usize = 0x30;
    /// Data pages checked so far, over all verifications.
    pub const VERIFIED_PAGES: usize = 0x38;
}

/// Offsets on the parameter page.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod params {
    /// u64: [`super::PARAMS_MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// u32: CPUs to start; 0 stands for 1.
    pub const CPUS: usize = 0x08;
    /// u64: TSC frequency in kHz; 0 lets the guest find it out.
    pub const TSC_KHZ: usize = 0x10;
    /// u32: bytes of the spec.
    pub const SPEC_LENGTH: usize = 0x18;
    /// The spec itself. If it is empty the guest looks for `workload=…` on its command line.
    pub const SPEC: usize = 0x1c;
}

/// The ports of the balloon, all of a byte. Eight say where the bitmap of free pages is: its frame number, then for how many frames it is, from
/// frame 0 on, each a little-endian u32. They take no writes while the device is on.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod balloon {
    /// The first port.
    pub const BASE: u16 = 0x560;
    /// How many there are.
    pub const PORTS: u16 = 10;
    /// Offset of the port that takes [`ON`] or [`OFF`] and tells the state. Without a device it reads 0xff.
    pub const COMMAND: u16 = 8;
    /// Offset of the port that takes the number of a slot. Slots lie behind the bitmap's words, [`SLOT_SIZE`] bytes each: two u64, first frame and
    /// number of frames. When the write is done, the memory of those among them whose bits are set may have been given back to the host: they
    /// then read as zeros. None of them may be taken back while the write goes on.
    pub const DISCARD: u16 = 9;
    /// Slots: a CPU each.
    pub const SLOTS: u64 = super::MAX_CPUS as u64;
    /// Bytes of a slot.
    pub const SLOT_SIZE: u64 = 16;
    /// Most frames in a slot: the CPU stands still while they are seen to.
    pub const MAX_DISCARD: u64 = 4096;
    /// Nobody looks at the bitmap.
    pub const OFF: u8 = 0;
    /// The VMM looks at the bitmap whenever it likes.
    pub const ON: u8 = 1;
    /// What the registers say is not in RAM.
    pub const REFUSED: u8 = 2;
}

/// What the guest is doing.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod state {
    /// Setting up and filling its pages.
    pub const BOOTING: u64 = 0;
    /// In the workload's loop.
    pub const RUNNING: u64 = 1;
    /// The time of the key `for` is over, everything was checked once more.
    pub const FINISHED: u64 = 2;
    /// The guest gave up: a trap, a panic, or a spec it could not read.
    pub const FAILED: u64 = 3;
}

/// Kinds of the first-error record.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod fault {
    /// The page's record names another address: a misplaced page.
    pub const MISPLACED: u64 = 1;
    /// The record is of another generation: a stale or a lost page.
    pub const STALE: u64 = 2;
    /// Address and generation are right, the checksum over them is not: a torn page.
    pub const CHECKSUM: u64 = 3;
    /// The page's body is not what was written there.
    pub const CONTENT: u64 = 4;
    /// A sorted segment is out of order, or its sum changed.
    pub const ORDER: u64 = 5;
    /// An exception: address is rip, expected is vector × 2³² + error code, found is CR2.
    pub const TRAP: u64 = 6;
    /// A panic of the guest's own code: address is the line.
    pub const PANIC: u64 = 7;
    /// The guest could not start: no memory map (expected 1), bad spec (2), too little RAM (3).
    pub const SETUP: u64 = 8;
}
