//! `minivmm bench --scale`: measures the costs that grow with the size of a VM's RAM although its
//! data stays the same.

use std::{
    ops::Range,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use migration_core::{PAGE_SHIFT, PageSet, text::describe, tracker::DirtyTracker};
use migration_kvm::tracker::{DirtyLog, GuestSlots, MAX_SLOT_BYTES, ManualProtect};
use minivmm_client::{MigrateRequest, Request, ask, log};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Bench, DATA, GIB,
    encrypt::Link,
    figures::{Machine, median},
    guest::Guest,
    measure::{BEFORE, FILL, ms, warm},
    ours::{Options, Source, completed, receiver},
    output::{self, Table, machine},
    process::{Folder, MemorySampler, Process},
    slots::{BYTES_A_PAGE, kvm, name, sparse},
    tell,
};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "scale";
/// The sizes of the VM's RAM in GiB.
const SIZES: [u64; 4] = [1, 16, 64, 256];
const STRATEGIES: [&str; 2] = ["pre-copy", "post-copy"];
/// The number of timed runs of each kind.
const REPEAT: u32 = 5;
/// The interval at which the memory of both processes is read in the run that is not timed.
const LOOK: Duration = Duration::from_millis(5);
/// The largest allowed difference between the pauses of the largest and the smallest VM, in
/// milliseconds.
const MAX_LONGER_MS: f64 = 10.0;
/// The constant part in bytes of the memory that is allowed beyond guest RAM.
const MEMORY_BASE: u64 = 64 << 20;
const MEMORY_SHARE: f64 = 0.000_3;

/// The result of one migration.
#[derive(Clone, Debug, Serialize)]
struct Run {
    bytes: u64,
    strategy: &'static str,
    setup_ms: f64,
    prepare_ms: f64,
    downtime_ms: f64,
    total_ms: f64,
    /// The peak memory beyond guest RAM at the source and at the destination, in bytes. Only in the
    /// run that is not timed.
    beyond: Option<[u64; 2]>,
}

/// One harvest of a VM that has written nothing.
#[derive(Clone, Debug, Serialize)]
struct Harvest {
    bytes: u64,
    tracker: &'static str,
    start_ms: f64,
    harvest_ms: f64,
}

/// One kind of run.
struct Plan<'a> {
    folder: &'a Folder,
    bytes: u64,
    strategy: &'static str,
    /// The guest's data in MiB.
    data: u64,
    /// The time that the guest is left alone before it moves.
    rest: Duration,
}

/// Returns the memory in bytes that is allowed beyond `bytes` of guest RAM.
fn allowed(bytes: u64) -> u64 {
    MEMORY_BASE + (bytes as f64 * MEMORY_SHARE) as u64
}

impl Plan<'_> {
    fn options(&self) -> Options {
        Options {
            workload: format!("idle:data={}M", self.data),
            memory: self.bytes,
            cpus: 1,
            backing: "anon",
            streams: 2,
            impact: "balanced",
            strategy: self.strategy.into(),
            push_order: "linear".into(),
            bandwidth_bits: 0,
            fail_safe: "none".into(),
            downtime_limit_ms: 300,
            way: super::encrypt::Way::default(),
        }
    }

    /// Migrates a VM once. Its memory is read only if the run is not timed.
    fn run(&self, watched: bool) -> Result<Run, String> {
        let options = self.options();
        let mut source = Source::start(self.folder, &options)?;
        Guest::find(&mut source.process, self.bytes, FILL)?;
        let most = self.bytes.saturating_add(GIB).to_string();
        let more = ["--max-memory", most.as_str()];
        let (mut to, control, url) = receiver(self.folder, "destination", "tcp:127.0.0.1:0", Link::Loopback, &more)?;
        // what KVM allocates for the destination's slots counts as well
        let warmed = warm((self.data << 20) + (self.bytes >> PAGE_SHIFT) * BYTES_A_PAGE)?;
        thread::sleep(self.rest);
        let watch = |process: &Process| MemorySampler::start(process.pid(), LOOK);
        let samplers = if watched { Some([watch(&source.process)?, watch(&to)?]) } else { None };
        drop(warmed);
        let plain: MigrateRequest = options.request(&url)?;
        let report = completed(ask(&source.socket, &Request::Migrate(Box::new(plain)), |_| {})?)?;
        let beyond = match samplers {
            Some([at_source, at_destination]) => {
                // the RAM above the hole below 4 GiB is a mapping of its own, and no other mapping
                // is as large
                let least = self.bytes.min(2 * GIB);
                let is_ram = |range: &Range<u64>| range.end - range.start >= least;
                Some([at_source.finish_where(is_ram)?.peak, at_destination.finish_where(is_ram)?.peak])
            }
            None => None,
        };
        source.process.wait()?;
        ask(&control, &Request::Quit, |_| {})?;
        to.wait()?;
        let figure = |key: &str| report[key].as_f64().ok_or_else(|| format!("no {key} in {report}"));
        Ok(Run {
            bytes: self.bytes,
            strategy: self.strategy,
            setup_ms: figure("setup_ms")?,
            prepare_ms: figure("prepare_ms")?,
            downtime_ms: figure("downtime_ms")?,
            total_ms: figure("total_ms")?,
            beyond,
        })
    }
}

/// Measures the harvests of a VM with sparse RAM, in slots as minivmm makes them.
fn harvests(bytes: u64, most: u64) -> Result<Vec<Harvest>, String> {
    let ram = sparse(bytes)?;
    let vm = Arc::new(kvm()?.create_vm().map_err(|e| format!("creating a VM: {e}"))?);
    // SAFETY: the VM is new, has no other slots, and ends in this function. The result keeps the
    // RAM.
    let slots = Arc::new(unsafe { GuestSlots::in_pieces(ram, 0, most) }.map_err(|e| e.to_string())?);
    slots.install(&vm).map_err(|e| format!("setting a memory slot: {e}"))?;
    let mut trackers: [Box<dyn DirtyTracker>; 2] =
        [Box::new(ManualProtect::new(vm.clone(), slots.clone())), Box::new(DirtyLog::new(vm.clone(), slots.clone()))];
    let mut all = Vec::new();
    for tracker in &mut trackers {
        let began = Instant::now();
        tracker.start().map_err(describe)?;
        let start_ms = ms(began.elapsed());
        let mut times = Vec::new();
        for _ in 0..REPEAT {
            let (began, mut written) = (Instant::now(), PageSet::empty(slots.ram().layout().pages()));
            tracker.harvest(&mut written).map_err(describe)?;
            times.push(ms(began.elapsed()));
        }
        tracker.stop().map_err(describe)?;
        let harvest_ms = median(times).unwrap_or_default();
        all.push(Harvest { bytes, tracker: tracker.name(), start_ms, harvest_ms });
    }
    Ok(all)
}

/// The runs of one size and one strategy.
struct Group<'a>(Vec<&'a Run>);

impl<'a> Group<'a> {
    fn of(runs: &'a [Run], bytes: u64, strategy: &str) -> Self {
        Self(runs.iter().filter(|run| run.bytes == bytes && run.strategy == strategy).collect())
    }

    fn median(&self, figure: impl Fn(&Run) -> f64) -> f64 {
        median(self.0.iter().filter(|run| run.beyond.is_none()).map(|run| figure(run))).unwrap_or_default()
    }

    fn beyond(&self) -> [u64; 2] {
        let looks = || self.0.iter().filter_map(|run| run.beyond);
        [0, 1].map(|side| looks().map(|beyond| beyond[side]).max().unwrap_or_default())
    }

    fn row(&self) -> Vec<String> {
        let Some(first) = self.0.first() else { return Vec::new() };
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
        let [source, destination] = self.beyond();
        let times = [
            self.median(|run| run.prepare_ms),
            self.median(|run| run.setup_ms),
            self.median(|run| run.downtime_ms),
            self.median(|run| run.total_ms),
        ];
        let mut row = vec![format!("{}, {}", name(first.bytes), first.strategy)];
        row.extend(times.map(|ms| format!("{ms:.1}")));
        row.extend([source, destination, allowed(first.bytes)].map(mib));
        row
    }
}

/// Returns whether every target is met.
fn within_targets(runs: &[Run], sizes: &[u64]) -> bool {
    let (Some(&smallest), Some(&largest)) = (sizes.first(), sizes.last()) else { return true };
    let pause = |bytes, strategy| Group::of(runs, bytes, strategy).median(|run| run.downtime_ms);
    let pauses = STRATEGIES.iter().all(|s| pause(largest, s) <= pause(smallest, s) + MAX_LONGER_MS);
    pauses && runs.iter().all(|run| run.beyond.is_none_or(|both| both.iter().all(|&b| b <= allowed(run.bytes))))
}

fn tables(runs: &[Run], harvests: &[Harvest], sizes: &[u64]) -> [Table; 2] {
    let groups = sizes.iter().flat_map(|&bytes| STRATEGIES.map(|strategy| Group::of(runs, bytes, strategy)));
    let moved = Table {
        title: "The same data in more RAM (median, ms; MiB)".into(),
        head: vec!["RAM", "prepare", "set-up", "pause", "total", "memory, source", "destination", "target"],
        rows: groups.map(|group| group.row()).collect(),
    };
    let row = |h: &Harvest| {
        vec![format!("{}, {}", name(h.bytes), h.tracker), format!("{:.2}", h.start_ms), format!("{:.2}", h.harvest_ms)]
    };
    let harvested = Table {
        title: "Dirty tracking of a VM that writes nothing (ms)".into(),
        head: vec!["RAM, tracker", "start", "harvest"],
        rows: harvests.iter().map(row).collect(),
    };
    [moved, harvested]
}

fn results(runs: &[Run], harvests: &[Harvest], here: &str) -> Value {
    json!({ "machine": here, "runs": runs, "harvests": harvests })
}

/// Runs the measurement and prints the tables.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { REPEAT });
    let (folder, bar) = (Folder::new()?, ProgressBar::hidden());
    let sizes = SIZES.map(|size| size * args.unit);
    // the same data in each size: 700 MiB, or that share of the unit
    let data = ((DATA * args.unit) >> 30).max(1);
    let rest = if args.quick { Duration::ZERO } else { BEFORE };
    let mut runs = Vec::new();
    // the sizes alternate, so that a change of the machine affects all of them
    for turn in 0..=repeat {
        for bytes in sizes {
            for strategy in STRATEGIES {
                tell(&bar, &format!("{}, {strategy}, run {turn}", name(bytes)));
                let plan = Plan { folder: &folder, bytes, strategy, data, rest };
                runs.push(plan.run(turn == 0)?);
            }
        }
    }
    let most = MAX_SLOT_BYTES / GIB * args.unit;
    let mut harvested = Vec::new();
    for bytes in sizes {
        harvested.extend(harvests(bytes, most)?);
    }
    let here = machine(&Machine::here(None));
    let tables = tables(&runs, &harvested, &sizes);
    if args.json {
        out!("{}", results(&runs, &harvested, &here));
    } else {
        log::print(&format!("{here}\n\n{}\n{}", tables[0].text(), tables[1].text()));
    }
    if let Some(path) = &args.markdown {
        let by = "_Written by `minivmm bench --scale --markdown`; do not edit by hand._";
        let text = format!("{by}\n\n{here}.\n\n{}\n{}", tables[0].markdown(), tables[1].markdown());
        output::write_section(path, SECTION, &text)?;
    }
    Ok(within_targets(&runs, &sizes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(bytes: u64, downtime_ms: f64, beyond: Option<[u64; 2]>) -> [Run; 2] {
        STRATEGIES.map(|strategy| Run {
            bytes,
            strategy,
            setup_ms: 1.0,
            prepare_ms: 1.0,
            downtime_ms,
            total_ms: 1.0,
            beyond,
        })
    }

    #[test]
    fn a_longer_pause_or_more_memory_misses_the_target() {
        let sizes = [GIB, 256 * GIB];
        let good = [run(sizes[0], 3.0, None), run(sizes[1], 13.0, None), run(sizes[1], 99.0, Some([100 << 20; 2]))];
        assert!(within_targets(&good.concat(), &sizes));
        let long = [run(sizes[0], 3.0, None), run(sizes[1], 13.1, None)];
        assert!(!within_targets(&long.concat(), &sizes));
        let much = [good.concat(), run(GIB, 3.0, Some([1, 65 << 20])).to_vec()].concat();
        assert!(!within_targets(&much, &sizes));
        let row = Group::of(&good.concat(), sizes[1], "pre-copy").row();
        assert_eq!(row, ["256 GiB, pre-copy", "1.0", "1.0", "13.0", "1.0", "100.0", "100.0", "142.6"]);
    }
}
