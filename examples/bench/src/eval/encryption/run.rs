//! One migration and its cost.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;
use serde_json::Value;

use super::{
    super::run::load,
    cage::Cage,
    plan::{Cell, Kind, Names, Net},
    stream::Stream,
};
use crate::bench::{
    encrypt::{Link, Way},
    guest::Guest,
    measure::{AFTER, BEFORE, FILL, ms, warm},
    ours::{Options, Pair, Source},
    process::{Folder, VcpuSampler, vcpu_seconds},
    tuning::DEFAULT_LIMIT_MS,
};

/// The time after which a migration that has not handed over is cancelled.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// The time after which a migration that has not completed is killed.
const HOPELESS: Duration = Duration::from_secs(150);

/// The abilities of the machine, and the size of the guests.
pub(super) struct Means {
    /// Whether the link is shaped to 1 Gbit/s. Otherwise the migration limits itself.
    pub(super) shaped: bool,
    /// Whether the CPU time of processes can be limited.
    pub(super) caged: bool,
    /// The bytes that stand for a MiB.
    pub(super) unit: u64,
    pub(super) seed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    Completed,
    /// The migration did not end within its time.
    NotEnded,
}

impl Outcome {
    pub(super) fn name(self) -> &'static str {
        if self == Self::Completed { "completed" } else { "not-ended" }
    }
}

/// The result of a run. Figures of a run that has not completed are null.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    #[serde(skip)]
    pub(super) cell: Cell,
    #[serde(flatten)]
    pub(super) names: Names,
    pub(super) repeat: u32,
    /// The machine's load over the last minute before the run.
    pub(super) load: f64,
    pub(super) outcome: Outcome,
    pub(super) total_ms: Option<f64>,
    pub(super) downtime_ms: Option<f64>,
    pub(super) predicted_downtime_ms: Option<f64>,
    /// The guest's longest gap in ms, by its own clock.
    pub(super) gap_ms: Option<f64>,
    /// The guest's operations per second, or the stream's bytes per second, before and during the
    /// migration.
    pub(super) before: f64,
    pub(super) during: Option<f64>,
    pub(super) kept_percent: Option<f64>,
    pub(super) wire_bytes: Option<f64>,
    /// The CPU seconds of the source until its end, and of the destination until completion,
    /// including vCPU threads.
    pub(super) cpu_source_s: Option<f64>,
    pub(super) cpu_destination_s: Option<f64>,
    /// The part of both that vCPU threads used.
    pub(super) cpu_vcpu_s: Option<f64>,
    /// The number of wrong pages that the guest found at the end.
    pub(super) guest_errors: u64,
    /// The source's report; null if the source was killed.
    pub(super) report: Value,
}

impl Run {
    /// Returns the most important figures in one line.
    pub(super) fn brief(&self) -> String {
        let figure = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1}"));
        format!(
            "{}, total {} ms, downtime {} ms, gap {} ms, kept {} %",
            self.outcome.name(),
            figure(self.total_ms),
            figure(self.downtime_ms),
            figure(self.gap_ms),
            figure(self.kept_percent)
        )
    }
}

/// Returns the source's report, or `None` if the source had to be killed.
fn migrate(pair: &mut Pair) -> Result<Option<Value>, String> {
    let pid = Pid::from_raw(pair.source.pid() as i32);
    thread::scope(|scope| {
        let (done, end) = mpsc::channel::<()>();
        let watch = scope.spawn(move || {
            let late = end.recv_timeout(HOPELESS) == Err(RecvTimeoutError::Timeout);
            // it may have ended just now
            late && kill(pid, Signal::SIGKILL).is_ok()
        });
        let report = pair.attempt(LIMIT);
        drop(done);
        match watch.join() {
            Ok(true) => Ok(None),
            _ => report.map(Some),
        }
    })
}

fn link(net: Net, means: &Means) -> Link {
    if net == Net::Gigabit && means.shaped { Link::Shaped } else { Link::Loopback }
}

fn options(cell: &Cell, means: &Means) -> Options {
    let link = link(cell.net, means);
    let own_limit = cell.net == Net::Gigabit && link == Link::Loopback;
    Options {
        workload: cell.work.spec(means.unit, means.seed),
        memory: cell.memory(means.unit),
        cpus: 1,
        backing: "thp",
        streams: 2,
        impact: "balanced",
        strategy: cell.strategy.into(),
        push_order: "multi-pivot".into(),
        bandwidth_bits: if own_limit { Net::GIGABIT_BITS } else { 0 },
        fail_safe: "none".into(),
        downtime_limit_ms: DEFAULT_LIMIT_MS,
        way: Way { cipher: cell.cipher, link },
    }
}

/// Runs one migration.
pub(super) fn run(folder: &Folder, cell: &Cell, repeat: u32, means: &Means) -> Result<Run, String> {
    let (options, load) = (options(cell, means), load());
    // the groups live longer than the processes in them
    let cage = |name| means.caged.then(|| Cage::new(name, cell.core.percent())).transpose();
    let cages = (cage("source")?, cage("destination")?);
    let mut source = Source::start(folder, &options)?;
    let guest = Guest::find(&mut source.process, options.memory, FILL)?;
    let mut pair = source.pair(folder, &options)?;
    let (from, to) = (pair.source.pid(), pair.destination.pid());
    if let (Some(source), Some(destination)) = &cages {
        source.hold(from)?;
        destination.hold(to)?;
    }
    let stream = (cell.work.kind == Kind::Stream).then(|| Stream::start(options.way.link)).transpose()?;
    let done = |guest: &Guest| match &stream {
        Some(stream) => Ok(stream.received()),
        None => guest.board().map(|board| board.operations),
    };
    let warm = warm(cell.work.mib * means.unit)?;
    let (early, began) = (done(&guest)?, Instant::now());
    thread::sleep(BEFORE);
    drop(warm);
    guest.reset_gap()?;
    let (first, asked) = (done(&guest)?, Instant::now());
    let before = (first - early) as f64 / (asked - began).as_secs_f64();
    let (source_cpu, destination_cpu, vcpu) =
        (pair.source.cpu_seconds()?, pair.destination.cpu_seconds()?, vcpu_seconds(to));
    let sampler = VcpuSampler::start(from)?;

    let report = migrate(&mut pair)?.unwrap_or_default();
    let outcome = match report["outcome"].as_str() {
        Some("completed") => Outcome::Completed,
        Some("cancelled") => Outcome::NotEnded,
        None if report.is_null() => Outcome::NotEnded,
        _ => return Err(format!("the migration is {}: {}", report["outcome"], report["reason"])),
    };
    let number = |key: &str| (outcome == Outcome::Completed).then(|| report[key].as_f64()).flatten();
    let mut run = Run {
        cell: *cell,
        names: cell.names(),
        repeat,
        load,
        outcome,
        total_ms: number("total_ms"),
        downtime_ms: number("downtime_ms"),
        predicted_downtime_ms: number("predicted_downtime_ms"),
        gap_ms: None,
        before: before.round(),
        during: None,
        kept_percent: None,
        wire_bytes: report["wire_bytes"].as_f64(),
        cpu_source_s: None,
        cpu_destination_s: None,
        cpu_vcpu_s: None,
        guest_errors: 0,
        report: report.clone(),
    };
    if report.is_null() {
        return Ok(run);
    }
    let (destination_end, vcpu_end) = (pair.destination.cpu_seconds()?, vcpu_seconds(to));
    let moved = outcome == Outcome::Completed;
    let guest = if moved { Guest::find(&mut pair.destination, options.memory, FILL)? } else { guest };
    // the guest has worked until it was found
    let during = done(&guest)?.saturating_sub(first) as f64 / asked.elapsed().as_secs_f64();
    run.during = Some(during.round());
    run.kept_percent = (before > 0.0).then(|| 100.0 * during / before);
    let source_end = if moved { pair.source.wait()? } else { pair.source.cpu_seconds()? };
    run.cpu_vcpu_s = Some(sampler.finish() + vcpu_end - vcpu);
    run.cpu_source_s = Some(source_end - source_cpu);
    run.cpu_destination_s = Some(destination_end - destination_cpu);
    thread::sleep(AFTER);
    run.gap_ms = Some(ms(guest.board()?.longest_gap()));
    drop(stream);
    run.guest_errors = guest.verify()?;
    Ok(run)
}
