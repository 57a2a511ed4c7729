//! A CPU as the workloads see it: its heartbeat, its counters, and the reports of errors.

use core::fmt::Write;
use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence};

use crate::layout::{ACCESS_BUCKETS, BOARD_ADDRESS, BOARD_VERSION, access_bucket, board, fault, record, state};
use crate::platform;

/// A difference between what is in memory and what should be there.
#[derive(Clone, Copy)]
pub struct Fault {
    /// The kind, one of [`fault`].
    pub kind: u64,
    /// The address.
    pub address: u64,
    /// The expected value.
    pub expected: u64,
    /// The value that was found.
    pub found: u64,
}

fn board_read(offset: usize) -> u64 {
    // SAFETY: the board is a page of the image, and all offsets (layout.rs) are within it. The
    // access is volatile because the VMM may write at any time.
    unsafe { read_volatile((BOARD_ADDRESS + offset as u64) as *const u64) }
}

/// Writes a word of the board.
#[inline(always)]
pub fn board_write(offset: usize, value: u64) {
    // SAFETY: as in `board_read`.
    unsafe { write_volatile((BOARD_ADDRESS + offset as u64) as *mut u64, value) }
}

/// Writes the first state and the version on the board.
pub fn set_up_board() {
    board_write(board::STATE, state::BOOTING);
    // SAFETY: as in `board_read`.
    unsafe { write_volatile((BOARD_ADDRESS + board::VERSION as u64) as *mut u32, BOARD_VERSION) };
}

/// Returns the number of running CPUs, a word of the board.
fn online() -> &'static AtomicU32 {
    // SAFETY: this is an aligned word of the board that the guest's CPUs only use as an atomic.
    unsafe { AtomicU32::from_ptr((BOARD_ADDRESS + board::CPUS as u64) as *mut u32) }
}

/// Returns the number of running CPUs.
pub fn cpus_online() -> usize {
    online().load(Ordering::Acquire) as usize
}

/// Returns a counter that all CPUs share. They add to it rarely.
fn shared(offset: usize) -> &'static AtomicU64 {
    // SAFETY: as in `online`, for the words of the board that do not belong to one CPU.
    unsafe { AtomicU64::from_ptr((BOARD_ADDRESS + offset as u64) as *mut u64) }
}

/// Adds to a counter of the board that all CPUs share; they do so rarely.
pub fn count(offset: usize, by: u64) {
    shared(offset).fetch_add(by, Ordering::Relaxed);
}

/// Counts the calling CPU as running.
pub fn come_online() {
    online().fetch_add(1, Ordering::AcqRel);
}

/// Records a fault as the first one and prints it on the serial port. Returns false if another
/// fault came first.
pub fn report(what: Fault) -> bool {
    let words = (BOARD_ADDRESS + board::FIRST_ERROR as u64) as *mut u64;
    // SAFETY: as in `online`.
    let kind = unsafe { AtomicU64::from_ptr(words) };
    if kind.compare_exchange(0, what.kind, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return false;
    }
    board_write(board::FIRST_ERROR + 8, what.address);
    board_write(board::FIRST_ERROR + 16, what.expected);
    board_write(board::FIRST_ERROR + 24, what.found);
    let mut serial = if what.kind >= fault::TRAP { platform::serial_by_force() } else { platform::serial() };
    let Fault { kind, address, expected, found } = what;
    let _ = writeln!(serial, "error kind {kind} at {address:#x} expected {expected:#x} found {found:#x}");
    true
}

/// Reports why the guest cannot continue, and ends the guest.
pub fn give_up(what: Fault) -> ! {
    let first = report(what);
    board_write(board::STATE, state::FAILED);
    if !first {
        // Another CPU may still be reporting its fault: this leaves time for that before the guest
        // ends.
        platform::spin(100_000);
    }
    platform::shut_down()
}

/// A CPU. Each has its record on the board. It also keeps its counters here, so that a heartbeat
/// writes the board without reading it.
pub struct Cpu {
    /// The number of the CPU, 0 for the first.
    pub index: usize,
    /// The number of CPUs that work.
    pub count: usize,
    last: u64,
    heartbeats: u64,
    operations: u64,
    longest_gap: u64,
    errors: u64,
    reset_seen: u64,
    verified_pages: u64,
    /// The number of the verification that is done, and of the one that the VMM asks for.
    verify: (u64, u64),
    random: u64,
    /// The number of ticks from which on an access is counted.
    access_limit: u64,
}

/// The number of microseconds from which on an access is counted: longer than an access to present
/// memory takes.
const ACCESS_LIMIT: u64 = 20;

impl Cpu {
    /// Returns CPU number `index` of `count`.
    pub fn new(index: usize, count: usize, seed: u64) -> Cpu {
        let last = platform::now();
        Cpu {
            index,
            count,
            last,
            heartbeats: 0,
            operations: 0,
            longest_gap: 0,
            errors: 0,
            reset_seen: 0,
            verified_pages: 0,
            verify: (0, 0),
            random: seed ^ (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            access_limit: u64::MAX,
        }
    }

    #[inline(always)]
    fn put(&self, field: usize, value: u64) {
        board_write(board::RECORDS + self.index * board::RECORD_SIZE + field, value);
    }

    /// Reads the clock, counts a heartbeat, and returns the time.
    ///
    /// This must be called every few microseconds: the longest time between two calls is the
    /// guest's longest gap.
    #[inline(always)]
    pub fn beat(&mut self) -> u64 {
        let now = platform::now();
        // After a migration the guest may find its clock set back.
        let gap = now.saturating_sub(self.last);
        self.last = now;
        self.heartbeats += 1;
        self.put(record::HEARTBEATS, self.heartbeats);
        if gap > self.longest_gap {
            self.longest_gap = gap;
            self.put(record::LONGEST_GAP, gap);
            self.put(record::GAP_END, now);
        }
        let asked = board_read(board::CONTROL);
        if asked != self.reset_seen {
            self.reset(asked);
        }
        now
    }

    /// Restarts all measurements, as the VMM has asked.
    #[cold]
    #[inline(never)]
    fn reset(&mut self, asked: u64) {
        self.reset_seen = asked;
        self.longest_gap = 0;
        self.put(record::LONGEST_GAP, 0);
        self.put(record::GAP_END, 0);
        if self.index == 0 {
            // The first CPU clears the shared words. Until all CPUs have obeyed, the others may
            // count an access too many or too few.
            shared(board::ACCESS_LONGEST).store(0, Ordering::Relaxed);
            (0..ACCESS_BUCKETS).for_each(|n| shared(board::ACCESS_COUNTS + 8 * n).store(0, Ordering::Relaxed));
        }
        // A CPU acknowledges only after it has cleared everything.
        compiler_fence(Ordering::SeqCst);
        self.put(record::RESET_SEEN, asked);
    }

    /// Makes [`Cpu::access`] count from now on.
    pub fn measure_accesses(&mut self) {
        self.access_limit = platform::ticks(ACCESS_LIMIT);
        board_write(board::ACCESS_LIMIT, self.access_limit);
    }

    /// Ends the access to a page that began at the time `since`, counts it if it was slow, and
    /// returns the time, at which the next access begins.
    ///
    /// The clock may be read before a load is complete, but not before the load has faulted: faults
    /// are taken in program order.
    #[inline(always)]
    pub fn access(&mut self, since: u64) -> u64 {
        let now = platform::now();
        let time = now.saturating_sub(since);
        if time >= self.access_limit {
            self.slow_access(time);
        }
        now
    }

    #[cold]
    #[inline(never)]
    fn slow_access(&mut self, time: u64) {
        shared(board::ACCESS_COUNTS + 8 * access_bucket(time)).fetch_add(1, Ordering::Relaxed);
        shared(board::ACCESS_LONGEST).fetch_max(time, Ordering::Relaxed);
    }

    /// Counts operations.
    #[inline(always)]
    pub fn done(&mut self, operations: u64) {
        self.operations += operations;
        self.put(record::OPERATIONS, self.operations);
    }

    /// Counts a fault if there is one.
    #[inline(always)]
    pub fn check(&mut self, result: Result<(), Fault>) {
        if let Err(what) = result {
            self.fail(what);
        }
    }

    /// Counts a fault.
    #[cold]
    #[inline(never)]
    pub fn fail(&mut self, what: Fault) {
        self.errors += 1;
        self.put(record::ERRORS, self.errors);
        report(what);
    }

    /// Returns the number of faults so far.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Returns a random number (splitmix64).
    #[inline(always)]
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Returns a random number below `n`.
    #[inline(always)]
    pub fn random_below(&mut self, n: u64) -> u64 {
        ((u128::from(self.random()) * u128::from(n)) >> 64) as u64
    }

    /// Returns whether the VMM waits for a verification.
    pub fn verify_wanted(&mut self) -> bool {
        self.verify.1 = board_read(board::VERIFY);
        self.verify.0 != self.verify.1
    }

    /// Counts data pages that were checked.
    pub fn verified(&mut self, pages: u64) {
        self.verified_pages += pages;
        self.put(record::VERIFIED_PAGES, self.verified_pages);
    }

    /// Reports that the verification for which the VMM waits is done.
    pub fn verify_done(&mut self) {
        self.verify.0 = self.verify.1;
        self.put(record::VERIFY_DONE, self.verify.0);
    }

    /// Clears the longest gap, which until now includes the initialization.
    pub fn restart(&mut self) {
        self.longest_gap = 0;
        self.put(record::LONGEST_GAP, 0);
        self.put(record::GAP_END, 0);
        self.last = platform::now();
    }
}

/// A barrier at which all CPUs wait for each other, once.
pub struct Barrier(AtomicU32);

impl Barrier {
    /// Returns a barrier that no CPU has reached.
    pub const fn new() -> Barrier {
        Barrier(AtomicU32::new(0))
    }

    /// Waits until every CPU has reached the barrier.
    pub fn wait(&self, cpu: &mut Cpu) {
        self.0.fetch_add(1, Ordering::AcqRel);
        while (self.0.load(Ordering::Acquire) as usize) < cpu.count {
            cpu.beat();
            core::hint::spin_loop();
        }
    }
}
