//! The guest's workloads: the image with a spec patched in, and the board on which the guest says how it is.
//!
//! The guest is a program of its own in `guest/`, compiled by `build.rs`. Its layout and its specs are compiled into both sides from
//! the same two files. The guest's pages are untrusted input as any other: [`Board::parse`] takes whatever is there.

use thiserror::Error;

#[path = "../guest/layout.rs"]
pub mod layout;
#[path = "../guest/spec.rs"]
pub mod spec;

mod listing;
mod needs;

use layout::{
    ACCESS_BUCKETS, BOARD_MAGIC, BOARD_VERSION, MAX_CPUS, MAX_SPEC, PARAMS_ADDRESS, PARAMS_MAGIC, access_bucket_start,
    board, fault, params, record,
};
pub use listing::listing;
pub use needs::least_memory;
pub use spec::{COMMON_KEYS, LIST};
use spec::{Kind, Spec, SpecError};

/// The guest as it was compiled, with an empty spec: it then looks for `workload=…` on its command line.
pub const GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// Why there is no guest for a spec.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum WorkloadError {
    /// No workload has this name.
    #[error("no workload `{name}`; there are: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The workload has no such key.
    #[error("workload `{workload}` has no key `{key}`; it takes: {known}")]
    Key {
        /// The workload.
        workload: &'static str,
        /// What was found where `key=value` was expected.
        key: String,
        /// The keys it takes.
        known: String,
    },
    /// A key occurs twice.
    #[error("key `{0}` occurs twice")]
    Repeated(&'static str),
    /// A key does not take this value.
    #[error("`{value}` is no value for `{key}`, which takes {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What would be one.
        wanted: String,
    },
    /// The spec does not fit on the parameter page.
    #[error("the spec has {0} bytes, more than {MAX_SPEC}")]
    TooLong(usize),
    /// More CPUs than the board has records for, or none.
    #[error("{0} CPUs: the guest runs on 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// The workload has too little to work on, whatever RAM there is.
    #[error(
        "its area has {pages} pages, and {cpus} CPUs need {wanted}: give it a larger size or percent, or fewer CPUs"
    )]
    Area {
        /// Pages of its area.
        pages: u64,
        /// Pages that the CPUs need.
        wanted: u64,
        /// How many CPUs there are.
        cpus: u32,
    },
    /// The compiled image has no parameter page where it should.
    #[error("the guest's image has no parameter page")]
    Image,
}

/// Checks a spec, `NAME[:key=value[,key=value…]]`, and says what would be right if it is wrong.
pub fn check_spec(text: &str) -> Result<(), WorkloadError> {
    if text.len() > MAX_SPEC {
        return Err(WorkloadError::TooLong(text.len()));
    }
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.collect::<Vec<_>>().join(", ");
    match Spec::parse(text) {
        Ok(_) => Ok(()),
        Err(SpecError::Workload(name)) => {
            Err(WorkloadError::Unknown { name: name.into(), known: names(&mut LIST.iter().map(|info| info.name)) })
        }
        Err(SpecError::Key(info, key)) => Err(WorkloadError::Key {
            workload: info.name,
            key: key.into(),
            known: names(
                &mut info
                    .keys
                    .iter()
                    .chain(COMMON_KEYS.iter().filter(|key| !info.keys.iter().any(|own| own.name == key.name)))
                    .map(|key| key.name),
            ),
        }),
        Err(SpecError::Repeated(key)) => Err(WorkloadError::Repeated(key.name)),
        Err(SpecError::Value(key, value)) => {
            Err(WorkloadError::Value { key: key.name, value: value.into(), wanted: wanted(key.kind) })
        }
    }
}

/// What a key takes, for people.
fn wanted(kind: Kind) -> String {
    match kind {
        Kind::Size => "a size such as 64M (units K, M, G)".into(),
        Kind::Count(min, max) => format!("a number from {min} to {max}"),
        Kind::Time => "a time such as 100ms (units us, ms, s), or 0".into(),
        Kind::Choice(words) => words.join(" or "),
    }
}

/// The guest's image for a spec and so many CPUs. `tsc_khz` is the frequency of the guest's clock; 0 if it shall find out by itself.
pub fn elf(spec: &str, cpus: u32, tsc_khz: u64) -> Result<Vec<u8>, WorkloadError> {
    check_spec(spec)?;
    if cpus == 0 || cpus as usize > MAX_CPUS {
        return Err(WorkloadError::Cpus(cpus));
    }
    let mut image = GUEST_ELF.to_vec();
    let start = file_offset(&image, PARAMS_ADDRESS).ok_or(WorkloadError::Image)?;
    let page = image.get_mut(start..start + layout::PAGE_SIZE as usize).ok_or(WorkloadError::Image)?;
    if word(page, params::MAGIC) != PARAMS_MAGIC {
        return Err(WorkloadError::Image);
    }
    // `check_spec` bounds the length, so everything stays within the page.
    page[params::CPUS..][..4].copy_from_slice(&cpus.to_le_bytes());
    page[params::TSC_KHZ..][..8].copy_from_slice(&tsc_khz.to_le_bytes());
    page[params::SPEC_LENGTH..][..4].copy_from_slice(&(spec.len() as u32).to_le_bytes());
    page[params::SPEC..][..spec.len()].copy_from_slice(spec.as_bytes());
    Ok(image)
}

/// The program headers of an ELF64's segments that are loaded.
fn segments(image: &[u8]) -> impl Iterator<Item = &[u8]> {
    const PROGRAM_HEADERS: usize = 32;
    const HEADER_COUNT: usize = 56;
    const HEADER_SIZE: usize = 56;
    const PT_LOAD: u32 = 1;
    let first = word_checked(image, PROGRAM_HEADERS).unwrap_or(u64::MAX) as usize;
    let count = image.get(HEADER_COUNT..HEADER_COUNT + 2).map_or(0, |n| u16::from_le_bytes([n[0], n[1]]));
    let headers = (0..usize::from(count))
        .filter_map(move |n| image.get(first.checked_add(n * HEADER_SIZE)?..)?.get(..HEADER_SIZE));
    headers.filter(|header| word(header, 0) as u32 == PT_LOAD)
}

/// Where in an ELF64 file the byte of a physical address is, by its program headers.
fn file_offset(image: &[u8], address: u64) -> Option<usize> {
    segments(image).find_map(|header| {
        let (offset, start, size) = (word(header, 8), word(header, 24), word(header, 32));
        let inside = address >= start && address - start < size;
        inside.then_some((offset + address - start) as usize)
    })
}

/// The first physical address behind what an ELF64 takes in memory.
fn loaded_end(image: &[u8]) -> u64 {
    segments(image).map(|header| word(header, 24).saturating_add(word(header, 40))).max().unwrap_or(0)
}

fn word_checked(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A word of a page or header that is known to be long enough.
fn word(bytes: &[u8], at: usize) -> u64 {
    word_checked(bytes, at).unwrap_or(0)
}

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

impl std::fmt::Debug for Accesses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
    pub fn longest_gap(&self) -> std::time::Duration {
        self.time(self.longest_gap_ticks)
    }

    /// Ticks of the guest's clock as a time; zero if its frequency is not known yet.
    pub fn time(&self, ticks: u64) -> std::time::Duration {
        let nanoseconds = (u128::from(ticks) * 1_000_000).checked_div(u128::from(self.tsc_khz)).unwrap_or(0);
        std::time::Duration::from_nanos(nanoseconds.min(u128::from(u64::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_good_value() {
        for info in LIST {
            check_spec(info.name).unwrap();
            for key in info.keys.iter().chain(COMMON_KEYS) {
                assert!(key.kind.parse(key.default).is_some(), "{}: {}={}", info.name, key.name, key.default);
                let twice = format!("{}:{}={},{}={}", info.name, key.name, key.default, key.name, key.default);
                assert_eq!(check_spec(&twice), Err(WorkloadError::Repeated(key.name)));
            }
        }
    }

    #[test]
    fn a_spec_says_what_the_guest_gets() {
        let spec = Spec::parse("touch:size=64M,mode=read,every=2s").unwrap();
        assert_eq!((spec.value("size"), spec.value("mode"), spec.value("every")), (64 << 20, 0, 2_000_000));
        assert_eq!((spec.value("seed"), spec.value("data"), spec.value("nothing")), (1, 0, 0));
        assert_eq!(Spec::parse("idle").unwrap().value("data"), 700 << 20);
        let area = |text| Spec::parse(text).unwrap().area();
        assert_eq!(area("quicksort:regions=32,size=16M"), 512 << 20);
        assert_eq!((area("quicksort:size=16M"), area("storm:size=3M"), area("idle")), (16 << 20, 3 << 20, 0));
    }

    #[test]
    fn a_bad_spec_is_refused_with_what_is_allowed() {
        let message = |text: &str| check_spec(text).unwrap_err().to_string();
        assert!(message("hott").contains("hot"));
        assert!(message("").contains("idle"));
        assert!(message("hot:sise=1M").contains("size"));
        assert!(message("hot:size").contains("size"));
        assert!(message("hot:size=1T").contains("64M"));
        assert!(message("hot:size=99999999999999999999").contains("64M"));
        assert!(message("hot:size=99999999999G").contains("64M"));
        assert!(message("rate:pages=0").contains("from 1"));
        assert!(message("touch:mode=both").contains("read or write"));
        assert!(message("quicksort:regions=65").contains("to 64"));
        assert!(message("idle:for=10").contains("units us, ms, s"));
        assert_eq!(check_spec(&"x".repeat(MAX_SPEC + 1)), Err(WorkloadError::TooLong(MAX_SPEC + 1)));
    }

    #[test]
    fn the_image_carries_the_spec() {
        let image = elf("hot:size=64M,data=700M", 4, 2_600_000).unwrap();
        assert_eq!(image.len(), GUEST_ELF.len());
        assert!(image.len() < 200 << 10);
        let page = &image[file_offset(&image, PARAMS_ADDRESS).unwrap()..];
        assert_eq!(word(page, params::CPUS) as u32, 4);
        assert_eq!(word(page, params::TSC_KHZ), 2_600_000);
        assert_eq!(word(page, params::SPEC_LENGTH) as u32, 22);
        assert_eq!(&page[params::SPEC..][..22], b"hot:size=64M,data=700M");
        let board: &[u8; 4096] =
            image[file_offset(&image, layout::BOARD_ADDRESS).unwrap()..][..4096].try_into().unwrap();
        let board = Board::parse(board).unwrap();
        assert_eq!((board.state, board.cpus_online, board.heartbeats, board.first_error), (State::Booting, 0, 0, None));
    }

    #[test]
    fn the_guest_runs_on_one_to_sixteen_cpus() {
        assert_eq!(elf("idle", 0, 0), Err(WorkloadError::Cpus(0)));
        assert_eq!(elf("idle", 17, 0), Err(WorkloadError::Cpus(17)));
        assert!(elf("idle", 16, 0).is_ok());
    }

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
        assert!(wild.longest_gap() > std::time::Duration::ZERO);

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
        assert_eq!(sane.longest_gap(), std::time::Duration::from_millis(3));
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
