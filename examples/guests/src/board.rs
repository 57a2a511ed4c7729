//! The board: a page on which the guest reports its state.

use std::{fmt, time::Duration};

use crate::{
    image::word,
    layout::{self, ACCESS_BUCKETS, BOARD_MAGIC, BOARD_VERSION, MAX_CPUS, access_bucket_start, board, fault, record},
};

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It initializes its memory.
    Booting,
    /// It runs the workload.
    Running,
    /// The time given by the key `for` has passed, and all pages have been checked.
    Finished,
    /// The guest stopped because of an error; [`Board::first_error`] has the details.
    Failed,
    /// A value that this version of the guest never writes.
    Unknown(u64),
}

/// The first error that the guest found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstError {
    /// The kind, one of [`layout::fault`]; [`FirstError::name`] returns it as text.
    pub kind: u64,
    /// The address of the wrong word.
    pub address: u64,
    /// The value that should have been there.
    pub expected: u64,
    /// The value that was there.
    pub found: u64,
}

impl FirstError {
    /// Returns the kind as text, in one to three words.
    pub fn name(&self) -> &'static str {
        match self.kind {
            fault::MISPLACED => "misplaced page",
            fault::STALE => "stale page",
            fault::CHECKSUM => "torn page",
            fault::CONTENT => "wrong content",
            fault::ORDER => "wrong order",
            fault::TRAP => "exception",
            fault::PANIC => "panic",
            fault::SETUP => "could not start",
            _ => "unknown",
        }
    }
}

/// The durations of slow accesses to pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Accesses {
    /// The number of ticks from which on an access is counted.
    pub limit: u64,
    /// The longest access, in ticks.
    pub longest: u64,
    /// The number of accesses in each bucket, see [`layout::access_bucket_start`].
    pub counts: [u64; ACCESS_BUCKETS],
}

impl Accesses {
    /// Returns the number of accesses counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Returns the number of ticks within which `permille` thousandths of the counted accesses were
    /// done.
    ///
    /// The result is the middle of a bucket, so it can be wrong by a sixteenth. It is `None` if no
    /// access was counted.
    pub fn permille(&self, permille: u64) -> Option<u64> {
        let rank = (u128::from(self.count()) * u128::from(permille)).div_ceil(1000).max(1);
        let mut sum = 0;
        let bucket = self.counts.iter().position(|n| {
            sum += u128::from(*n);
            sum >= rank
        })?;
        let middle = access_bucket_start(bucket).midpoint(access_bucket_start(bucket + 1));
        // The longest access is known exactly. The page may have been copied between two writes of
        // the guest, so the longest may be below the limit.
        Some(middle.clamp(self.limit, self.longest.max(self.limit)))
    }
}

impl fmt::Debug for Accesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, longest, .. } = self;
        write!(f, "{} accesses of {limit} to {longest} ticks", self.count())
    }
}

/// The state of the guest's balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balloon {
    /// The number of pages that are reported free now.
    pub pages: u64,
    /// How often the balloon was inflated.
    pub inflations: u64,
    /// How often the balloon was deflated because memory was short.
    pub deflations: u64,
}

/// The contents of a board page, with the values of all CPUs combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Board {
    /// How often a CPU read its clock, over all CPUs.
    pub heartbeats: u64,
    /// The number of operations of the workload, over all CPUs.
    pub operations: u64,
    /// The longest time between two heartbeats of the same CPU, in ticks of the clock.
    pub longest_gap_ticks: u64,
    /// The longest time between two heartbeats of each CPU; 0 for CPUs that do not exist.
    pub gap_ticks: [u64; MAX_CPUS],
    /// The number of wrong pages and records, over all CPUs.
    pub errors: u64,
    /// The number of CPUs that run, at most [`MAX_CPUS`].
    pub cpus_online: u32,
    /// The frequency of the clock that the guest uses, in kHz.
    pub tsc_khz: u64,
    /// What the guest is doing.
    pub state: State,
    /// The first error, if there was one.
    pub first_error: Option<FirstError>,
    /// The latest value of [`board::CONTROL`] that every CPU has obeyed: the smallest value of all
    /// CPUs.
    pub reset_seen: u64,
    /// The latest value of [`board::VERIFY`] that every CPU has completed: the smallest value of
    /// all CPUs.
    pub verify_done: u64,
    /// The number of data pages checked so far.
    pub verified_pages: u64,
    /// The state of the balloon, all zeros if the workload has none.
    pub balloon: Balloon,
    /// The slow accesses of all CPUs, if the workload measures them.
    pub accesses: Option<Accesses>,
}

impl Board {
    /// Parses a board page. Returns `None` if the page is no board: another guest runs, or this one
    /// has not started yet.
    ///
    /// The page may be a copy that was taken while the guest wrote it. Each word is then intact,
    /// but the words may be from different times.
    pub fn parse(page: &[u8; 4096]) -> Option<Board> {
        let half = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        if word(page, board::MAGIC) != BOARD_MAGIC {
            return None;
        }
        // The guest's first instructions write the version: before them it is 0.
        if half(board::VERSION) > BOARD_VERSION {
            return None;
        }
        let cpus_online = half(board::CPUS).min(MAX_CPUS as u32);
        let field = |cpu: u32, field: usize| word(page, board::RECORDS + cpu as usize * board::RECORD_SIZE + field);
        let each = |at: usize| (0..cpus_online).map(move |cpu| field(cpu, at));
        let sum = |at: usize| each(at).fold(0u64, u64::saturating_add);
        let mut gap_ticks = [0; MAX_CPUS];
        gap_ticks.iter_mut().zip(each(record::LONGEST_GAP)).for_each(|(to, from)| *to = from);
        let error = |n: usize| word(page, board::FIRST_ERROR + 8 * n);
        let first_error = FirstError { kind: error(0), address: error(1), expected: error(2), found: error(3) };
        Some(Board {
            heartbeats: sum(record::HEARTBEATS),
            operations: sum(record::OPERATIONS),
            longest_gap_ticks: gap_ticks.into_iter().max().unwrap_or(0),
            gap_ticks,
            errors: sum(record::ERRORS),
            cpus_online,
            tsc_khz: word(page, board::TSC_KHZ),
            state: match word(page, board::STATE) {
                layout::state::BOOTING => State::Booting,
                layout::state::RUNNING => State::Running,
                layout::state::FINISHED => State::Finished,
                layout::state::FAILED => State::Failed,
                other => State::Unknown(other),
            },
            first_error: (first_error.kind != 0).then_some(first_error),
            reset_seen: each(record::RESET_SEEN).min().unwrap_or(0),
            verify_done: each(record::VERIFY_DONE).min().unwrap_or(0),
            verified_pages: sum(record::VERIFIED_PAGES),
            balloon: Balloon {
                pages: word(page, board::BALLOON_PAGES),
                inflations: word(page, board::INFLATIONS),
                deflations: word(page, board::DEFLATIONS),
            },
            accesses: Some(Accesses {
                limit: word(page, board::ACCESS_LIMIT),
                longest: word(page, board::ACCESS_LONGEST),
                counts: std::array::from_fn(|n| word(page, board::ACCESS_COUNTS + 8 * n)),
            })
            .filter(|accesses| accesses.limit != 0),
        })
    }

    /// Returns the longest gap as a duration; zero if the frequency is not known yet.
    pub fn longest_gap(&self) -> Duration {
        self.time(self.longest_gap_ticks)
    }

    /// Converts ticks of the guest's clock to a duration; zero if its frequency is not known yet.
    pub fn time(&self, ticks: u64) -> Duration {
        let nanoseconds = (u128::from(ticks) * 1_000_000).checked_div(u128::from(self.tsc_khz)).unwrap_or(0);
        Duration::from_nanos(nanoseconds.min(u128::from(u64::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_board_has_room_for_everything() {
        const { assert!(board::RECORDS + MAX_CPUS * board::RECORD_SIZE <= board::ACCESS_LIMIT) };
        const { assert!(board::ACCESS_LONGEST + 8 <= board::ACCESS_COUNTS) };
        const { assert!(board::ACCESS_COUNTS + 8 * ACCESS_BUCKETS <= layout::PAGE_SIZE as usize) };
    }

    #[test]
    fn every_duration_has_its_bucket() {
        use layout::access_bucket;
        for bucket in 0..ACCESS_BUCKETS {
            let (start, end) = (access_bucket_start(bucket), access_bucket_start(bucket + 1));
            assert!(start < end && end - start <= start / 8, "{bucket}: {start} to {end}");
            assert_eq!((access_bucket(start), access_bucket(end - 1)), (bucket, bucket));
        }
        assert_eq!((access_bucket(0), access_bucket(u64::MAX)), (0, ACCESS_BUCKETS - 1));
    }

    #[test]
    fn percentiles_are_those_of_the_buckets() {
        let mut accesses = Accesses { limit: 40_000, longest: 0, counts: [0; ACCESS_BUCKETS] };
        assert_eq!((accesses.count(), accesses.permille(500)), (0, None));
        let mut add = |ticks: u64, times: u64| {
            accesses.counts[layout::access_bucket(ticks)] += times;
            accesses.longest = accesses.longest.max(ticks);
        };
        add(50_000, 899);
        add(1_000_000, 90);
        add(20_000_000, 10);
        add(300_000_000, 1);
        assert_eq!(accesses.count(), 1000);
        let near = |permille: u64, ticks: u64| {
            let found = accesses.permille(permille).unwrap();
            assert!(found.abs_diff(ticks) <= ticks / 16 + 1, "{permille}: {found} is far from {ticks}");
        };
        near(1, 50_000);
        near(500, 50_000);
        near(899, 50_000);
        near(900, 1_000_000);
        near(990, 20_000_000);
        near(999, 20_000_000);
        near(1000, 300_000_000);
        // The result for a single access is at most the longest access and at least the limit.
        let one = |ticks| {
            let mut counts = [0; ACCESS_BUCKETS];
            counts[layout::access_bucket(ticks)] = 1;
            Accesses { limit: 40_000, longest: ticks, counts }.permille(500)
        };
        assert_eq!((one(40_000), one(49_152)), (Some(40_000), Some(49_152)));
        let wild = Accesses { limit: u64::MAX, longest: 0, counts: [u64::MAX; ACCESS_BUCKETS] };
        assert_eq!(wild.permille(999), Some(u64::MAX));
    }

    #[test]
    fn a_board_is_summed_up_and_nonsense_is_bounded() {
        let mut page = [0xff; 4096];
        assert_eq!(Board::parse(&page), None);
        page[..8].copy_from_slice(&BOARD_MAGIC.to_le_bytes());
        assert_eq!(Board::parse(&page), None, "a version from the future");
        page[board::VERSION..][..4].copy_from_slice(&BOARD_VERSION.to_le_bytes());
        let wild = Board::parse(&page).unwrap();
        assert_eq!((wild.cpus_online, wild.errors, wild.state), (16, u64::MAX, State::Unknown(u64::MAX)));
        assert_eq!(wild.first_error.unwrap().name(), "unknown");
        assert!(wild.longest_gap() > Duration::ZERO);

        page[8..].fill(0);
        let mut put = |at: usize, value: u64| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(board::VERSION, 2 << 32 | 1);
        put(board::TSC_KHZ, 2_000_000);
        put(board::STATE, layout::state::RUNNING);
        for (cpu, beats, gap, seen) in [(0, 10, 4_000_000, 2), (1, 5, 6_000_000, 1), (2, 100, 9_000_000, 0)] {
            let at = board::RECORDS + cpu * board::RECORD_SIZE;
            put(at + record::HEARTBEATS, beats);
            put(at + record::LONGEST_GAP, gap);
            put(at + record::RESET_SEEN, seen);
        }
        let sane = Board::parse(&page).unwrap();
        assert_eq!((sane.cpus_online, sane.heartbeats, sane.longest_gap_ticks, sane.reset_seen), (2, 15, 6_000_000, 1));
        assert_eq!(sane.longest_gap(), Duration::from_millis(3));
        assert_eq!((sane.first_error, sane.accesses), (None, None));
        let mut put = |at: usize, value: u64| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(board::ACCESS_LIMIT, 40_000);
        put(board::ACCESS_COUNTS + 8 * layout::access_bucket(100_000), 3);
        put(board::ACCESS_LONGEST, 102_000);
        let measured = Board::parse(&page).unwrap();
        let accesses = measured.accesses.unwrap();
        assert_eq!((accesses.count(), measured.time(accesses.longest).as_micros()), (3, 51));
    }
}
