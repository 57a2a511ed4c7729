//! The workloads, their keys, and the text that selects among them:
//! `NAME[:key=value[,key=value…]]`.
//!
//! This file is compiled into the guest and into the crate `guests`, so that the VMM accepts
//! exactly what the guest understands. It uses no allocation and no operating system.

/// The kind of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number of bytes, with `K`, `M` or `G` (binary). The guest reduces it to the RAM that there
    /// is.
    Size,
    /// A number from the first to the second.
    Count(u64, u64),
    /// A time with its unit `us`, `ms` or `s`. 0 needs no unit.
    Time,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// A key of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its name in the spec.
    pub name: &'static str,
    /// The kind of its value.
    pub kind: Kind,
    /// The value if the spec does not name the key.
    pub default: &'static str,
    /// Its effect, in a few words.
    pub summary: &'static str,
}

/// A workload of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkloadInfo {
    /// Its name in the spec.
    pub name: &'static str,
    /// Its description, in one line.
    pub summary: &'static str,
    /// Its own keys, in addition to [`COMMON_KEYS`].
    pub keys: &'static [Key],
}

const fn key(name: &'static str, kind: Kind, default: &'static str, summary: &'static str) -> Key {
    Key { name, kind, default, summary }
}

const fn size(default: &'static str) -> Key {
    key("size", Kind::Size, default, "size of the area that it works on")
}

/// The largest number of regions of `quicksort`: the guest keeps a few words for each on its stack.
pub const MAX_REGIONS: u64 = 64;

const PERCENT: Kind = Kind::Count(0, 100);
const SWITCH: Kind = Kind::Count(0, 1);
const MODE: Key = key("mode", Kind::Choice(&["read", "write"]), "write", "whether it reads or writes each page");
const SPIN: Key = key("spin", SWITCH, "0", "1: wait for the next write in a busy loop instead of sleeping");

/// The keys that every workload takes.
pub const COMMON_KEYS: &[Key] = &[
    key(
        "data",
        Kind::Size,
        "0",
        "further pages, filled once with incompressible data, each different, and verified on demand",
    ),
    key("seed", Kind::Count(0, u32::MAX as u64), "1", "seed of all content, so that several guests differ"),
    key("serial", SWITCH, "0", "1: print `beat N` to the serial port"),
    key("every", Kind::Time, "100ms", "time between two lines of `serial=1`"),
    key("for", Kind::Time, "0", "check everything and finish after this time; 0: never"),
    key("crash", Kind::Time, "0", "end with a triple fault after this time; 0: never"),
];

/// The workloads.
pub const LIST: &[WorkloadInfo] = &[
    WorkloadInfo {
        name: "idle",
        summary: "a busy loop that writes only its heartbeats; the pages of `data` are filled once",
        keys: &[key("data", Kind::Size, "700M", "pages filled once with incompressible data, verified on demand")],
    },
    WorkloadInfo {
        name: "sleep",
        summary: "sleeps, with a heartbeat at each tick of the LAPIC timer",
        keys: &[key("hz", Kind::Count(1, 5000), "1000", "ticks per second")],
    },
    WorkloadInfo {
        name: "one-edge",
        summary: "increments the first byte of each page in address order, again and again, so that each CPU's part has one edge",
        keys: &[size("256M")],
    },
    WorkloadInfo {
        name: "touch",
        summary: "reads and checks, or rewrites, whole pages in address order",
        keys: &[size("64M"), MODE],
    },
    WorkloadInfo {
        name: "sequential",
        summary: "reads or writes a few bytes of each page in address order, without pauses; measures each access",
        keys: &[size("256M"), MODE],
    },
    WorkloadInfo {
        name: "rate",
        summary: "writes a few bytes per page, `pages` pages per second, spread over a part of RAM",
        keys: &[
            key("pages", Kind::Count(1, 10_000_000), "5000", "pages per second, over all CPUs"),
            key("percent", PERCENT, "80", "percentage of the RAM that `data` leaves"),
            SPIN,
        ],
    },
    WorkloadInfo {
        name: "random",
        summary: "reads or writes a few bytes of pages in random order, each CPU in its own part, without pauses; measures each access",
        keys: &[size("256M"), MODE],
    },
    WorkloadInfo {
        name: "storm",
        summary: "all CPUs access the same pages in random order, each its own word in every page; measures each access",
        keys: &[size("256M"), MODE],
    },
    WorkloadInfo {
        name: "hot",
        summary: "writes a few bytes per page of its area, in address order, without pauses; the area is a part of `data`",
        keys: &[size("64M")],
    },
    WorkloadInfo {
        name: "quicksort",
        summary: "fills and sorts the segments of its area in turn; or, with `regions`, shuffles and sorts that many regions in time slices",
        keys: &[
            key("size", Kind::Size, "1G", "size of the area that it works on; with `regions`, the size of each"),
            key("segment", Kind::Size, "200K", "bytes of a segment, at least 8K"),
            key(
                "regions",
                Kind::Count(0, MAX_REGIONS),
                "0",
                "number of independent regions, as of that many processes; 0: segments instead",
            ),
            key("slice", Kind::Time, "10ms", "time slice of a region"),
        ],
    },
    WorkloadInfo {
        name: "kv",
        summary: "a key-value table over most of RAM; the range of keys that is queried grows in ten steps",
        keys: &[
            key("percent", PERCENT, "90", "percentage of the RAM that `data` leaves"),
            key("step", Kind::Time, "5s", "time until the range grows by a tenth"),
            key("set", PERCENT, "10", "percentage of the queries that write"),
        ],
    },
    WorkloadInfo {
        name: "churn",
        summary: "allocates, writes, checks and frees pages, and tells the VMM which ones it does not need",
        keys: &[
            size("512M"),
            key(
                "live",
                Kind::Count(1, 60),
                "25",
                "average percentage of the pages in use; the number varies by half of it in both directions",
            ),
            key("pages", Kind::Count(1, 10_000_000), "10000", "pages allocated or freed per second, over all CPUs"),
            SPIN,
            key(
                "balloon",
                Kind::Choice(&["off", "on", "discard"]),
                "on",
                "on: report free pages; discard: also return their memory to the host",
            ),
            key("interval", Kind::Time, "5s", "time between two inflations of the balloon"),
        ],
    },
    WorkloadInfo {
        name: "log",
        summary: "appends records to a circular log and updates random old ones",
        keys: &[size("256M"), key("update", PERCENT, "20", "percentage of the operations that update")],
    },
    WorkloadInfo {
        name: "mix",
        summary: "the pages of one of many similar guests: zero, shared by all, nearly shared, unique; reads all, writes some unique ones",
        keys: &[
            size("512M"),
            key("zero", PERCENT, "20", "percentage of the pages that are zero"),
            key("shared", PERCENT, "30", "percentage of the pages that every guest has"),
            key("near", PERCENT, "20", "percentage of the pages that differ from a shared one in a few words"),
            key("pages", Kind::Count(0, 10_000_000), "1000", "unique pages written per second, over all CPUs"),
            SPIN,
        ],
    },
];

impl WorkloadInfo {
    /// Returns the key of this name, one of the workload's own or a common one.
    pub fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().chain(COMMON_KEYS).find(|key| key.name == name)
    }
}

/// Why a spec is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecError<'a> {
    /// No workload has this name.
    Workload(&'a str),
    /// The workload has no such key, or the option is not of the form `key=value`.
    Key(&'static WorkloadInfo, &'a str),
    /// The spec names the key twice.
    Repeated(&'static Key),
    /// The key does not take this value.
    Value(&'static Key, &'a str),
}

/// A checked spec: all names and values in it are valid.
#[derive(Debug, Clone, Copy)]
pub struct Spec<'a> {
    /// The workload.
    pub info: &'static WorkloadInfo,
    options: &'a str,
}

impl<'a> Spec<'a> {
    /// Parses and checks a spec.
    pub fn parse(text: &'a str) -> Result<Self, SpecError<'a>> {
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let info = LIST.iter().find(|info| info.name == name).ok_or(SpecError::Workload(name))?;
        for (at, option) in pairs(options).enumerate() {
            let (name, value) = option.split_once('=').ok_or(SpecError::Key(info, option))?;
            let key = info.key(name).ok_or(SpecError::Key(info, name))?;
            if pairs(options).take(at).any(|earlier| earlier.split_once('=').is_some_and(|(n, _)| n == name)) {
                return Err(SpecError::Repeated(key));
            }
            key.kind.parse(value).ok_or(SpecError::Value(key, value))?;
        }
        Ok(Spec { info, options })
    }

    /// Returns the value of a key: bytes, microseconds, or the position of the chosen word; 0 if
    /// the workload has no such key.
    #[allow(dead_code)] // Only the guest needs values.
    pub fn value(&self, name: &str) -> u64 {
        let Some(key) = self.info.key(name) else { return 0 };
        let chosen = pairs(self.options).filter_map(|option| option.split_once('=')).find(|(n, _)| *n == name);
        key.kind.parse(chosen.map_or(key.default, |(_, value)| value)).unwrap_or(0)
    }
}

impl Spec<'_> {
    /// Returns the bytes of the workload's area: its `size`, or that of all its regions.
    pub fn area(&self) -> u64 {
        self.value("size").saturating_mul(self.value("regions").max(1))
    }

    /// Divides `ram` pages between the workload's area and `data`. Both are reduced to what is
    /// there; the workload, which cannot do without, comes first.
    pub fn shares(&self, ram: u64) -> Shares {
        let data = self.value("data").div_ceil(PAGE);
        if self.info.key("percent").is_some() {
            // A percentage of what `data` leaves; `data` must leave something.
            let data = data.min(ram * 9 / 10);
            return Shares { work: (ram - data) * self.value("percent") / 100, data, data_first: true };
        }
        let work = match self.info.key("size") {
            // An area of nominal size, which idle and sleep do not touch.
            None => LEAST_AREA * MAX_CPUS,
            Some(_) => self.area().div_ceil(PAGE),
        };
        let work = work.min(ram);
        // The hot area is a part of the data.
        let part = if self.info.name == "hot" { work } else { 0 };
        Shares { work, data: data.saturating_sub(part).min(ram - work), data_first: false }
    }
}

/// The bytes of a page.
const PAGE: u64 = 4096;
/// The largest number of CPUs of a guest.
const MAX_CPUS: u64 = 16;
/// The pages that a CPU needs to work on: with fewer, one CPU might have none.
pub const LEAST_AREA: u64 = 8;
/// The pages of RAM that a guest needs besides image and balloon.
pub const LEAST_RAM: u64 = 512;

/// The pages of a guest by their purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// The pages of the area that the workload uses.
    pub work: u64,
    /// The pages that are filled once and verified on demand.
    pub data: u64,
    /// Whether the `data` pages come first.
    #[allow(dead_code)] // Only the guest lays them out.
    pub data_first: bool,
}

fn pairs(options: &str) -> impl Iterator<Item = &str> {
    options.split(',').filter(|option| !option.is_empty())
}

impl Kind {
    /// Parses a value of this kind; returns `None` if the text is not one.
    pub fn parse(&self, text: &str) -> Option<u64> {
        match *self {
            Kind::Size => scaled(text, &[("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("", 1)]),
            Kind::Count(min, max) => scaled(text, &[("", 1)]).filter(|n| (min..=max).contains(n)),
            Kind::Time if text == "0" => Some(0),
            Kind::Time => scaled(text, &[("us", 1), ("ms", 1000), ("s", 1_000_000)]),
            Kind::Choice(words) => words.iter().position(|word| *word == text).map(|at| at as u64),
        }
    }
}

/// The largest number in a spec. Products of two such numbers with anything that the guest counts
/// stay far below 2⁶⁴.
const MAX_VALUE: u64 = 1 << 44;

/// Parses a number with one of these units, the first that fits.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit)?.1;
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|n| *n <= MAX_VALUE)
}
