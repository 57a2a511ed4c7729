//! `minivmm bench --stores`: the clients of page stores by themselves, without any VM.
//!
//! | file | what is in it |
//! |---|---|
//! | server.rs | a Valkey or Redis server, and what its client reaches |
//! | files.rs | the store of sparse files, beside `dd` with blocks of the same size |

mod files;
mod server;

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use migration_core::{
    PAGE_SIZE,
    store::{
        Incarnation, Namespace, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, StoreError, Urgency,
        VmNamespace,
    },
    text::describe,
    vm::VmId,
};
use minivmm_client::log;
use serde::Serialize;
use serde_json::json;

use super::{
    Bench,
    figures::{Machine, median},
    output::{self, Table, machine, number},
    process::{Folder, field, high_water},
    tell,
};

/// The section of a Markdown file that the figures go into.
const SECTION: &str = "stores";
/// Pages of one put and one get: 2 MiB, as in a migration.
const RUN: usize = 512;
/// Bytes of a run.
const RUN_BYTES: usize = RUN * PAGE_SIZE;
/// How often everything is put and gathered.
const REPEAT: u32 = 5;
/// For how long a namespace is kept if this process dies.
const LEASE: Duration = Duration::from_secs(3600);

/// Pages that are put or gathered each second, at least.
const TARGET_RATE: f64 = 300_000.0;
/// The 99th percentile of a fault beside a gather, at most, in µs.
const TARGET_FAULT: f64 = 500.0;
/// What the store of files reaches of `dd`, at least.
const TARGET_FILES: f64 = 0.8;
/// Memory of the clients beyond the pages themselves, at most, in MiB.
const TARGET_MEMORY: f64 = 64.0;

/// RAM that is put, and a plain buffer into which it is gathered.
struct Pages {
    ram: Vec<u8>,
    buffer: Vec<u8>,
}

impl Pages {
    /// Makes as many whole runs as `bytes` have, at least one. No page is like another, and both
    /// buffers have been touched.
    fn new(bytes: u64) -> Self {
        let runs = (bytes as usize / RUN_BYTES).max(1);
        let mut ram = vec![0x5a; runs * RUN_BYTES];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in ram.chunks_exact_mut(8) {
            // xorshift: quick, and nothing compresses it
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        Self { buffer: vec![0xa5; ram.len()], ram }
    }

    fn count(&self) -> u64 {
        (self.ram.len() / PAGE_SIZE) as u64
    }

    /// Returns the pages of each run.
    fn runs(&self) -> impl Iterator<Item = Vec<PageToPut<'_>>> {
        self.ram.chunks_exact(RUN_BYTES).zip(0..).map(|(run, number)| {
            let pages = run.chunks_exact(PAGE_SIZE).zip(number * RUN as u64..);
            pages.map(|(value, page)| PageToPut { page, value }).collect()
        })
    }

    /// Returns whether the buffer has what was put, and spoils it for the next time.
    fn check(&mut self) -> Result<(), String> {
        if self.buffer != self.ram {
            return Err("pages are not as they were put".into());
        }
        self.buffer.fill(0xa5);
        Ok(())
    }
}

/// A namespace of the bench in a store.
struct Space<'a> {
    store: &'a dyn PageStore,
    namespace: VmNamespace,
    incarnation: Incarnation,
}

impl<'a> Space<'a> {
    fn create(store: &'a dyn PageStore) -> Result<Self, String> {
        let vm = VmId([0xbe; 16]);
        // nobody else uses the store: the name need not be a secret
        let namespace = Namespace::new(Incarnation::random().0).of(vm);
        let owner = Owner::new("minivmm bench").map_err(describe)?;
        let record = Record { vm, purpose: Purpose::Attempt, owner };
        let incarnation = store.create(namespace.id, &record, LEASE).map_err(describe)?;
        Ok(Self { store, namespace, incarnation })
    }

    /// Puts all pages. Returns pages per second.
    fn put(&self, pages: &Pages, generation: u32) -> Result<f64, String> {
        let begin = Instant::now();
        for run in pages.runs() {
            self.put_run(&run, generation)?;
        }
        Ok(pages.count() as f64 / begin.elapsed().as_secs_f64())
    }

    fn put_run(&self, run: &[PageToPut<'_>], generation: u32) -> Result<(), String> {
        let stored = self.store.put(self.namespace, generation, run).map_err(describe)?;
        if stored.incarnation != self.incarnation || !stored.taken.iter().all(|taken| *taken) {
            return Err("the store has not taken all pages".into());
        }
        Ok(())
    }

    /// Gathers one run into its part of a buffer.
    fn gather_run(&self, number: usize, generation: u32, into: &mut [u8]) -> Result<(), String> {
        let first = (number * RUN) as u64;
        let wanted: Vec<_> = (first..first + RUN as u64).map(|page| PageToGet { page, generation }).collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        let got = self.store.get(self.namespace, &wanted, Urgency::Prefetch, deadline, &mut |page, data| {
            let at = (page - first) as usize * PAGE_SIZE;
            if let Some(page) = data.page() {
                into[at..at + PAGE_SIZE].copy_from_slice(page);
            }
        });
        got.map_err(describe)
    }

    /// Gathers all pages. Returns pages per second.
    fn gather(&self, pages: &mut Pages, generation: u32) -> Result<f64, String> {
        let begin = Instant::now();
        for (number, into) in pages.buffer.chunks_exact_mut(RUN_BYTES).enumerate() {
            self.gather_run(number, generation, into)?;
        }
        let rate = pages.count() as f64 / begin.elapsed().as_secs_f64();
        pages.check()?;
        Ok(rate)
    }

    /// Reads one page as a fault does. Returns how long it took.
    fn fault(&self, page: u64, generation: u32, expected: &[u8]) -> Result<Duration, String> {
        let (begin, deadline) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        let wanted = [PageToGet { page, generation }];
        let mut good = false;
        let got = self.store.get(self.namespace, &wanted, Urgency::Fault, deadline, &mut |_, data| {
            good = data.bytes() == expected;
        });
        let time = begin.elapsed();
        got.map_err(describe)?;
        if good { Ok(time) } else { Err(format!("page {page} is not as it was put")) }
    }

    fn forget(self) -> Result<(), StoreError> {
        self.store.forget(self.namespace)
    }
}

/// What a store reaches.
#[derive(Debug, Serialize)]
struct Rates {
    put_pages_per_s: f64,
    gather_pages_per_s: f64,
    /// Of each time.
    puts: Vec<f64>,
    gathers: Vec<f64>,
}

/// Puts and gathers everything, once to warm the store and `repeat` times to measure.
fn rates(store: &dyn PageStore, pages: &mut Pages, repeat: u32) -> Result<Rates, String> {
    let (mut puts, mut gathers) = (Vec::new(), Vec::new());
    for round in 0..=repeat {
        let space = Space::create(store)?;
        let (put, gather) = (space.put(pages, 1)?, space.gather(pages, 1)?);
        space.forget().map_err(describe)?;
        if round > 0 {
            puts.push(put);
            gathers.push(gather);
        }
    }
    let middle = |rates: &[f64]| median(rates.iter().copied()).unwrap_or_default();
    Ok(Rates { put_pages_per_s: middle(&puts), gather_pages_per_s: middle(&gathers), puts, gathers })
}

/// Lets the kernel forget the most memory that this process ever had. Returns what it has now.
fn memory_now() -> u64 {
    // without this the figure is too high, never too low
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let kib = field("/proc/self/status".as_ref(), "VmRSS").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Measures, and prints the tables. Returns whether all figures are within their targets.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { REPEAT });
    let (bar, folder) = (ProgressBar::hidden(), Folder::new()?);
    let mut pages = Pages::new(args.unit);
    let before = memory_now();
    tell(&bar, "a server on a Unix socket");
    let server = server::measure(&folder, &mut pages, repeat)?;
    let after = high_water(std::process::id()).unwrap_or(0);
    let memory_mib = after.saturating_sub(before) as f64 / super::MIB as f64;
    tell(&bar, "sparse files, and dd");
    let files = files::measure(&folder, &mut pages, repeat)?;

    let mut targets = server.targets();
    targets.extend(files.iter().filter_map(files::Row::target));
    targets.push(Target {
        what: "memory of the client beyond the pages (MiB)".into(),
        is: Some(memory_mib),
        bound: TARGET_MEMORY,
        at_least: false,
    });
    let tables = [server.rate_table(), server.fault_table(), files::table(&files), target_table(&targets)];
    let here = machine(&Machine::here(None));
    let what = format!("{here}, {}. {} pages in runs of {RUN}; medians of {repeat}.", server.version, pages.count());
    if args.json {
        let figures = json!({
            "machine": here,
            "server": server,
            "files": files,
            "memory_mib": memory_mib,
            "targets": targets,
            "pages": pages.count(),
        });
        out!("{figures}");
    } else {
        log::print(&format!("{what}\n\n{}", tables.each_ref().map(Table::text).join("\n")));
    }
    if let Some(path) = &args.markdown {
        let by = "_Written by `minivmm bench --stores --markdown`; do not edit by hand._";
        let text = format!("{by}\n\n{what}\n\n{}", tables.each_ref().map(Table::markdown).join("\n"));
        output::write_section(path, SECTION, &text)?;
    }
    Ok(targets.iter().all(Target::is_met))
}

/// A figure and its bound.
#[derive(Debug, Serialize)]
struct Target {
    what: String,
    /// `None` if there is no such figure, which misses the target.
    is: Option<f64>,
    bound: f64,
    at_least: bool,
}

impl Target {
    fn is_met(&self) -> bool {
        self.is.is_some_and(|is| if self.at_least { is >= self.bound } else { is <= self.bound })
    }
}

fn target_table(targets: &[Target]) -> Table {
    let row = |target: &Target| {
        let bound = format!("{} {}", if target.at_least { "≥" } else { "≤" }, target.bound);
        let is = match target.is {
            Some(is) if is < 10.0 => format!("{is:.2}"),
            is => number(is),
        };
        vec![target.what.clone(), is, bound, if target.is_met() { "met".into() } else { "missed".into() }]
    };
    Table {
        title: "Targets of the stores' clients".into(),
        head: vec!["figure", "measured", "target", ""],
        rows: targets.iter().map(row).collect(),
    }
}
