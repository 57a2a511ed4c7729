//! A Valkey or Redis server on a Unix socket, and what its client reaches: pages that are put and
//! gathered, and single faults beside a gather.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use migration_core::{store::StoreError, text::describe};
use migration_transport::{RedisPageStore, RedisPageStoreOptions, StoreUrl};
use serde::Serialize;

use super::{
    super::{
        output::{Table, number, spread},
        process::{Folder, Process},
    },
    Pages, RUN, RUN_BYTES, Rates, Space, TARGET_FAULT, TARGET_RATE, Target, rates,
};

/// The programs that are tried.
const PROGRAMS: [&str; 2] = ["valkey-server", "redis-server"];
/// How long the server may take to start.
const START: Duration = Duration::from_secs(20);
/// Faults that are measured beside each rate, and the time between two of them.
const FAULTS: usize = 2000;
const BETWEEN: Duration = Duration::from_millis(1);
/// Rates of the gather beside the faults, as parts of the highest one.
const SHARES: [f64; 7] = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0];

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) version: String,
    rates: Rates,
    faults: Vec<Faults>,
    /// Seconds of CPU time that the server has used for each million pages put and gathered.
    server_cpu_s_per_million: f64,
}

/// Faults beside a gather.
#[derive(Debug, Serialize)]
struct Faults {
    /// The rate that the gather has reached.
    gather_pages_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
}

/// Starts a server that saves nothing, and keeps memory that it has freed.
fn start(folder: &Folder) -> Result<(Process, String), String> {
    let version = |program: &&'static str| {
        let output = Command::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = text.split_ascii_whitespace().find_map(|word| word.strip_prefix("v="))?;
        Some((*program, format!("{program} {number}")))
    };
    let found = PROGRAMS.iter().find_map(version);
    let (program, version) = found.ok_or("neither valkey-server nor redis-server is installed")?;
    let mut command = Command::new(program);
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(folder.path("store"));
    // the memory of a freed namespace is not given back, so that the next one finds it warm
    for variable in ["MALLOC_CONF", "JE_MALLOC_CONF"] {
        command.env(variable, "dirty_decay_ms:-1,muzzy_decay_ms:-1");
    }
    Ok((Process::start(program, command, folder.path("server.log"))?, version))
}

fn open(folder: &Folder, server: &mut Process) -> Result<RedisPageStore, String> {
    let url = format!("redis+unix:{}", folder.path("store").display());
    let url: StoreUrl = url.parse().map_err(describe)?;
    let StoreUrl::Redis(url) = url else { return Err(format!("{url} is no server")) };
    let deadline = Instant::now() + START;
    loop {
        match RedisPageStore::open(&url, "bench", RedisPageStoreOptions::default()) {
            Err(error) if error.can_retry() && Instant::now() < deadline => server.check()?,
            other => return other.map_err(|error: StoreError| describe(error)),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Measures puts, gathers and faults.
pub(super) fn measure(folder: &Folder, pages: &mut Pages, repeat: u32) -> Result<Figures, String> {
    let (mut server, version) = start(folder)?;
    let store = open(folder, &mut server)?;
    let before = server.cpu_seconds()?;
    let rates = rates(&store, pages, repeat)?;
    let moved = f64::from(repeat + 1) * pages.count() as f64 / 1e6;
    let server_cpu_s_per_million = (server.cpu_seconds()? - before) / moved;

    let space = Space::create(&store)?;
    space.put(pages, 1)?;
    let mut faults = Vec::new();
    for share in SHARES {
        faults.push(beside(&space, pages, share * rates.gather_pages_per_s)?);
    }
    space.forget().map_err(describe)?;
    Ok(Figures { version, rates, faults, server_cpu_s_per_million })
}

/// Faults while pages are gathered at a rate of so many per second, in runs; at 0 none are.
fn beside(space: &Space<'_>, pages: &mut Pages, rate: f64) -> Result<Faults, String> {
    let (ended, Pages { ram, buffer }) = (AtomicBool::new(false), pages);
    let (mut times, gathered) = thread::scope(|scope| {
        let gatherer = scope.spawn(|| {
            let (begin, mut done) = (Instant::now(), 0_u64);
            let runs = buffer.len() / RUN_BYTES;
            while rate > 0.0 && !ended.load(Ordering::Relaxed) {
                let number = (done / RUN as u64) as usize % runs;
                let into = &mut buffer[number * RUN_BYTES..][..RUN_BYTES];
                space.gather_run(number, 1, into)?;
                done += RUN as u64;
                let due = Duration::from_secs_f64(done as f64 / rate);
                thread::sleep(due.saturating_sub(begin.elapsed()));
            }
            Ok::<_, String>(done as f64 / begin.elapsed().as_secs_f64())
        });
        let times = fault_in(space, ram);
        ended.store(true, Ordering::Relaxed);
        let gathered = gatherer.join().unwrap_or_else(|_| Err("the gather has panicked".into()));
        (times, gathered)
    });
    let times = times.as_mut().map_err(|why| why.clone())?;
    times.sort_unstable();
    let at = |part: f64| {
        let time = times.get(((times.len() as f64 * part) as usize).min(times.len() - 1));
        time.map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    let (p50_us, p99_us, longest_us) = (at(0.5), at(0.99), at(1.0));
    Ok(Faults { gather_pages_per_s: gathered?, p50_us, p99_us, longest_us })
}

/// Reads single pages from everywhere, with pauses as a guest makes them.
fn fault_in(space: &Space<'_>, ram: &[u8]) -> Result<Vec<Duration>, String> {
    let count = ram.len() / super::PAGE_SIZE;
    let mut times = Vec::with_capacity(FAULTS);
    for number in 0..FAULTS {
        // an odd step meets every page
        let page = number * 7919 % count;
        let expected = &ram[page * super::PAGE_SIZE..][..super::PAGE_SIZE];
        times.push(space.fault(page as u64, 1, expected)?);
        thread::sleep(BETWEEN);
    }
    Ok(times)
}

impl Figures {
    /// Returns the faults beside the highest rate that keeps their target.
    fn fastest(&self) -> Option<&Faults> {
        let good = self.faults.iter().filter(|faults| faults.p99_us <= TARGET_FAULT);
        good.max_by(|one, other| one.gather_pages_per_s.total_cmp(&other.gather_pages_per_s))
    }

    pub(super) fn targets(&self) -> Vec<Target> {
        let rate = |what: &str, is| Target { what: what.into(), is: Some(is), bound: TARGET_RATE, at_least: true };
        let fastest = self.fastest();
        let beside = fastest.map_or("any gather".into(), |faults| {
            format!("a gather of {} pages/s", number(Some(faults.gather_pages_per_s)))
        });
        vec![
            rate("pages put (pages/s)", self.rates.put_pages_per_s),
            rate("pages gathered (pages/s)", self.rates.gather_pages_per_s),
            Target {
                what: format!("fault beside {beside}, 99th percentile (µs)"),
                is: fastest.map(|faults| faults.p99_us),
                bound: TARGET_FAULT,
                at_least: false,
            },
        ]
    }

    pub(super) fn rate_table(&self) -> Table {
        let row = |what: &str, rates: &[f64], middle: f64| {
            let rate = format!("{:.2}", middle * super::PAGE_SIZE as f64 / 1e9);
            vec![what.to_owned(), spread(rates), rate]
        };
        Table {
            title: "Pages put into a server, and gathered from it".into(),
            head: vec!["", "pages/s", "GB/s"],
            rows: vec![
                row("put", &self.rates.puts, self.rates.put_pages_per_s),
                row("gathered", &self.rates.gathers, self.rates.gather_pages_per_s),
            ],
        }
    }

    pub(super) fn fault_table(&self) -> Table {
        let row = |faults: &Faults| {
            let figures = [faults.gather_pages_per_s, faults.p50_us, faults.p99_us, faults.longest_us];
            figures.map(|figure| number(Some(figure))).to_vec()
        };
        Table {
            title: "Single faults beside a gather (µs)".into(),
            head: vec!["gathered pages/s", "median", "99th percentile", "longest"],
            rows: self.faults.iter().map(row).collect(),
        }
    }
}
