//! The memory that guest and VMM share: the addresses of the board and the parameter page, and
//! their layout.
//!
//! This file is compiled into the guest (`main.rs`) and into the crate `guests`, so that both use
//! the same layout. All numbers are little endian; all offsets are in bytes from the start of the
//! page.

/// The guest-physical address of the board page, the first page of the image. The guest writes it,
/// the VMM reads it.
pub const BOARD_ADDRESS: u64 = 0x10_0000;
/// The guest-physical address of the parameter page. The VMM writes it into the file, the guest
/// reads it.
pub const PARAMS_ADDRESS: u64 = 0x10_1000;
/// The bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// The largest number of vCPUs that the guest runs on: the number of records that fit on the board.
pub const MAX_CPUS: usize = 16;

/// The first word of the board ("MVMMBOR1"). Without it the page is not the board of this guest.
pub const BOARD_MAGIC: u64 = 0x314b_524f_4d4d_564d;
/// The version of the layout, in [`board::VERSION`].
pub const BOARD_VERSION: u32 = 1;
/// The first word of the parameter page ("MVMMPAR1").
pub const PARAMS_MAGIC: u64 = 0x3152_4150_4d4d_564d;
/// The number of buckets for the durations of accesses: eight for each doubling, so that the width
/// of a bucket is at most an eighth of its start.
pub const ACCESS_BUCKETS: usize = 192;
/// The first bucket begins at two to the power of this, in ticks: 20 µs even with a clock of 205
/// MHz.
const ACCESS_FIRST: u32 = 12;
/// The longest spec, in bytes, that fits on the parameter page.
pub const MAX_SPEC: usize = 2048;

/// Offsets on the board page.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod board {
    /// u64: [`super::BOARD_MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// u32: [`super::BOARD_VERSION`].
    pub const VERSION: usize = 0x08;
    /// u32: the number of CPUs that run.
    pub const CPUS: usize = 0x0c;
    /// u64: one of [`super::state`].
    pub const STATE: usize = 0x10;
    /// u64: the TSC frequency that the guest uses, in kHz.
    pub const TSC_KHZ: usize = 0x18;
    /// u64: TSC ticks from the guest's first instruction in ring 3 until its loop started.
    pub const FILL_TICKS: usize = 0x20;
    /// Four u64: kind ([`super::fault`]), address, expected, found. Kind 0 means that there was no
    /// error.
    pub const FIRST_ERROR: usize = 0x40;
    /// u64, written by the VMM: each new value makes every CPU clear its longest gap and measure
    /// again.
    pub const CONTROL: usize = 0x80;
    /// u64, written by the VMM: each new value makes every CPU check all its data pages once,
    /// besides its other work.
    pub const VERIFY: usize = 0x88;
    /// Two pairs of u64, address and pages: the workload's pages (two ranges, as the hole at 3–4
    /// GiB may split RAM).
    pub const WORK_RANGES: usize = 0x90;
    /// Two pairs of u64, address and pages: the `data` pages.
    pub const DATA_RANGES: usize = 0xb0;
    /// u64: pages in the balloons of all CPUs.
    pub const BALLOON_PAGES: usize = 0xd0;
    /// u64: how often a balloon was inflated.
    pub const INFLATIONS: usize = 0xd8;
    /// u64: how often a balloon was deflated because memory was short.
    pub const DEFLATIONS: usize = 0xe0;
    /// The records of the CPUs, [`RECORD_SIZE`] bytes each.
    pub const RECORDS: usize = 0x100;
    /// The bytes of a CPU's record, which is a cache line of its own.
    pub const RECORD_SIZE: usize = 64;
    /// u64: the number of ticks from which on the access to a page is counted; 0 if the workload
    /// does not measure accesses.
    pub const ACCESS_LIMIT: usize = 0x500;
    /// u64: the longest access, in ticks.
    pub const ACCESS_LONGEST: usize = 0x508;
    /// [`super::ACCESS_BUCKETS`] u64: the accesses of all CPUs by their duration, see
    /// [`super::access_bucket`]. They are cleared together with the longest gaps, see [`CONTROL`].
    pub const ACCESS_COUNTS: usize = 0x600;
}

/// Returns the bucket of a duration in ticks. A duration that is shorter or longer than all buckets
/// belongs to the first or the last one.
#[allow(dead_code)] // The guest's half.
pub const fn access_bucket(ticks: u64) -> usize {
    if ticks < 1 << ACCESS_FIRST {
        return 0;
    }
    let doubling = ticks.ilog2();
    let bucket = ((doubling - ACCESS_FIRST) as usize) * 8 + (ticks >> (doubling - 3) & 7) as usize;
    if bucket < ACCESS_BUCKETS { bucket } else { ACCESS_BUCKETS - 1 }
}

/// Returns the ticks at which a bucket begins, also for the one after the last.
#[allow(dead_code)] // The host's half.
pub const fn access_bucket_start(bucket: usize) -> u64 {
    (8 + bucket as u64 % 8) << (ACCESS_FIRST as usize - 3 + bucket / 8)
}

/// Offsets in a CPU's record on the board, all u64.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod record {
    /// How often the CPU read its clock.
    pub const HEARTBEATS: usize = 0x00;
    /// Operations of the workload: pages written, queries, sorted segments, ticks.
    pub const OPERATIONS: usize = 0x08;
    /// The longest time between two heartbeats, in TSC ticks.
    pub const LONGEST_GAP: usize = 0x10;
    /// The number of wrong pages and records.
    pub const ERRORS: usize = 0x18;
    /// The TSC at the end of the longest gap.
    pub const GAP_END: usize = 0x20;
    /// The value of [`super::board::CONTROL`] that this CPU has obeyed.
    pub const RESET_SEEN: usize = 0x28;
    /// The value of [`super::board::VERIFY`] that this CPU has completed.
    pub const VERIFY_DONE: usize = 0x30;
    /// Data pages checked so far, over all verifications.
    pub const VERIFIED_PAGES: usize = 0x38;
}

/// Offsets on the parameter page.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod params {
    /// u64: [`super::PARAMS_MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// u32: the number of CPUs to start; 0 means 1.
    pub const CPUS: usize = 0x08;
    /// u64: the TSC frequency in kHz; with 0 the guest determines it.
    pub const TSC_KHZ: usize = 0x10;
    /// u32: the bytes of the spec.
    pub const SPEC_LENGTH: usize = 0x18;
    /// The spec. If it is empty, the guest takes `workload=…` from its command line.
    pub const SPEC: usize = 0x1c;
}

/// The ports of the balloon, one byte each.
///
/// The first eight hold two little-endian u32, which locate the bitmap of free pages: the bitmap's
/// frame number, and the number of frames that it covers, from frame 0 on. Writes to them have no
/// effect while the device is on.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod balloon {
    /// The first port.
    pub const BASE: u16 = 0x560;
    /// The number of ports.
    pub const PORTS: u16 = 10;
    /// The offset of the port that takes [`ON`] or [`OFF`] and returns the state. Without a device
    /// it reads 0xff.
    pub const COMMAND: u16 = 8;
    /// The offset of the port that takes the number of a slot.
    ///
    /// The slots lie after the bitmap's words, [`SLOT_SIZE`] bytes each: two u64, the first frame
    /// and the number of frames. When the write completes, the host may have taken the memory of
    /// those of these frames whose bits are set; they then read as zeros. The guest must not take
    /// back any of them until the write completes.
    pub const DISCARD: u16 = 9;
    /// The number of slots: one for each CPU.
    pub const SLOTS: u64 = super::MAX_CPUS as u64;
    /// The bytes of a slot.
    pub const SLOT_SIZE: u64 = 16;
    /// The largest number of frames in a slot: the CPU stops while the VMM handles them.
    pub const MAX_DISCARD: u64 = 4096;
    /// The VMM does not read the bitmap.
    pub const OFF: u8 = 0;
    /// The VMM may read the bitmap at any time.
    pub const ON: u8 = 1;
    /// The bitmap that the registers describe is not in RAM.
    pub const REFUSED: u8 = 2;
}

/// The states of the guest.
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod state {
    /// It initializes its memory.
    pub const BOOTING: u64 = 0;
    /// It runs the workload.
    pub const RUNNING: u64 = 1;
    /// The time given by the key `for` has passed, and all pages have been checked once more.
    pub const FINISHED: u64 = 2;
    /// The guest stopped because of a trap, a panic, or a spec that it could not read.
    pub const FAILED: u64 = 3;
}

/// The kinds of errors in [`board::FIRST_ERROR`].
#[allow(dead_code)] // Each side uses the half that it needs.
pub mod fault {
    /// The page's record has another address: a misplaced page.
    pub const MISPLACED: u64 = 1;
    /// The record has another generation: an old or a lost page.
    pub const STALE: u64 = 2;
    /// Address and generation are right, but not the checksum over them: a torn page.
    pub const CHECKSUM: u64 = 3;
    /// The page's body differs from what was written there.
    pub const CONTENT: u64 = 4;
    /// A sorted segment is out of order, or its sum has changed.
    pub const ORDER: u64 = 5;
    /// An exception: address is rip, expected is vector × 2³² + error code, found is CR2.
    pub const TRAP: u64 = 6;
    /// A panic of the guest's own code: address is the line.
    pub const PANIC: u64 = 7;
    /// The guest could not start: no memory map (expected 1), bad spec (2), too little RAM (3).
    pub const SETUP: u64 = 8;
}
