//! The board, a page on which the guest reports how it is.

use std::{fmt, time::Duration};

use crate::{
    image::word,
    layout::{self, ACCESS_BUCKETS, BOARD_MAGIC, BOARD_VERSION, MAX_CPUS, access_bucket_start, board, fault, record},
};

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Setting up and filling its pages.
    Booting,
    /// In the workload's loop.
    Running,
    /// The time of the key `for` is over and everything was checked.
    Finished,
    /// The guest gave up; [`Board::first_error`] says why.
    Failed,
    /// A value that no guest of this version writes.
    Unknown(u64),
}

/// The first thing that the guest found wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstError {
    /// One of [`layout::fault`]; [`FirstError::name`] has it as a word.
    pub kind: u64,
    /// Where.
    pub address: u64,
    /// What should have been there.
    pub expected: u64,
    /// What was there.
    pub found: u64,
}

impl FirstError {
    /// The kind in a word or two.
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

/// How long accesses to pages took, as far as they took long.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Accesses {
    /// Ticks from which an access was counted.
    pub limit: u64,
    /// The longest, in ticks.
    pub longest: u64,
    /// How many there were in each bucket, see [`layout::access_bucket_start`].
    pub counts: [u64; ACCESS_BUCKETS],
}

impl Accesses {
    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The ticks within which so many of a thousand accesses were done, to a sixteenth: the middle of their bucket. `None` without any.
    pub fn permille(&self, permille: u64) -> Option<u64> {
        let rank = (u128::from(self.count()) * u128::from(permille)).div_ceil(1000).max(1);
        let mut sum = 0;
        let bucket = self.counts.iter().position(|n| {
            sum += u128::from(*n);
            sum >= rank
        })?;
        let middle = access_bucket_start(bucket).midpoint(access_bucket_start(bucket + 1));
        // the longest is known exactly, and the page may have been copied between two of the guest's writes
        Some(middle.clamp(self.limit, self.longest.max(self.limit)))
    }
}

impl fmt::Debug for Accesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, longest, .. } = self;
        write!(f, "{} accesses of {limit} to {longest} ticks", self.count())
    }
}

/// What the guest's balloon holds, and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balloon {
    /// Pages that are reported free now.
    pub pages: u64,
    /// Times that it was inflated.
    pub inflations: u64,
    /// Times that memory was short and it was deflated.
    pub deflations: u64,
}

/// What the guest shows, summed up over its CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Board {
    /// Times that a CPU looked at its clock, over all CPUs.
    pub heartbeats: u64,
    /// Operations of the workload, over all CPUs.
    pub operations: u64,
    /// The longest time between two heartbeats of any CPU, in ticks of the clock.
    pub longest_gap_ticks: u64,
    /// The same on each CPU; those of CPUs that are not there are 0.
    pub gap_ticks: [u64; MAX_CPUS],
    /// Pages or records that were not as they had to be, over all CPUs.
    pub errors: u64,
    /// CPUs that run, at most [`MAX_CPUS`].
    pub cpus_online: u32,
    /// Frequency of the clock that the guest reckons with.
    pub tsc_khz: u64,
    /// What the guest is doing.
    pub state: State,
    /// What went wrong first, if anything did.
    pub first_error: Option<FirstError>,
    /// The latest value of [`board::CONTROL`] that every CPU has obeyed (the smallest of theirs).
    pub reset_seen: u64,
    /// The latest value of [`board::VERIFY`] that every CPU is done with (the smallest of theirs).
    pub verify_done: u64,
    /// Data pages checked so far.
    pub verified_pages: u64,
    /// What the guest does not need of its memory, all of 0 if its workload has no balloon.
    pub balloon: Balloon,
    /// Accesses to pages that took long, of all CPUs, if the workload measures them.
    pub accesses: Option<Accesses>,
}

impl Board {
    /// Reads a board page. `None` if it is not one: another guest, or one that is not loaded yet.
    ///
    /// The page may be a copy that was taken while the guest wrote it: words are whole, but not all of the same instant.
    pub fn parse(page: &[u8; 4096]) -> Option<Board> {
        let half = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        if word(page, board::MAGIC) != BOARD_MAGIC {
            return None;
        }
        // The version is written by the guest's first instructions: before them it is 0.
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

    /// The longest gap as a time; zero if the frequency is not known yet.
    pub fn longest_gap(&self) -> Duration {
        self.time(self.longest_gap_ticks)
    }

    /// Ticks of the guest's clock as a time; zero if its frequency is not known yet.
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
        // a single one is at most the longest, and at least the limit
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
