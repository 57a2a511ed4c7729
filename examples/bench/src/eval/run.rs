//! One migration between two processes, and the reports of both sides and of the guest.

use std::{fs, thread, time::Instant};

use guests::{Board, layout::access_bucket_start};
use minivmm_client::report::accesses_to_json;
use serde::Serialize;
use serde_json::{Value, json};

use super::plan::Step;
use crate::bench::{
    guest::Guest,
    measure::{AFTER, BEFORE, FILL, ms, warm},
    ours::Source,
    process::Folder,
};

/// The result of a step.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    pub(super) step: Step,
    /// The machine's load over the last minute before the step.
    pub(super) load: f64,
    /// The source's report; null for a guest that was not migrated.
    pub(super) report: Value,
    /// The guest's report of its accesses during and after the migration; null if it does not
    /// measure them.
    pub(super) accesses: Value,
    /// The distribution of the accesses: an upper bound in microseconds, and the number of accesses
    /// between it and the preceding bound.
    pub(super) distribution: Vec<(f64, u64)>,
    /// The guest's longest gap in that time, in ms.
    pub(super) gap_ms: f64,
    /// The guest's operations per second from the request until the end, as a share of those
    /// before, in percent.
    pub(super) kept: Option<f64>,
    /// The number of wrong pages that the guest found when it checked all of them at the end.
    pub(super) guest_errors: u64,
}

impl Run {
    /// Returns a number of the report, by its path.
    pub(super) fn number(&self, pointer: &str) -> Option<f64> {
        self.report.pointer(pointer)?.as_f64()
    }

    /// Returns a number of the guest's accesses, in microseconds.
    pub(super) fn access(&self, key: &str) -> Option<f64> {
        self.accesses[key].as_f64()
    }

    /// Returns the number of pages that were missing at the hand-over.
    pub(super) fn left_behind(&self) -> Option<f64> {
        Some(self.number("/pages/pushed")? + self.number("/pages/demanded")?)
    }

    /// Returns the faults for which a page had to be fetched, as a share of the missing pages, in
    /// percent.
    pub(super) fn share(&self) -> Option<f64> {
        Some(100.0 * self.number("/faults/network")? / self.left_behind().filter(|pages| *pages > 0.0)?)
    }

    /// Returns the most important figures in one line.
    pub(super) fn brief(&self) -> String {
        let figure = |name: &str, value: Option<f64>| value.map_or(String::new(), |v| format!("{name} {v:.0} "));
        let parts = [
            figure("ms", self.number("/total_ms")),
            figure("network faults", self.number("/faults/network")),
            figure("MB", self.number("/wire_bytes").map(|b| b / 1e6)),
            figure("p50 µs", self.access("p50")),
            figure("p999 µs", self.access("p999")),
            format!("load {:.2}", self.load),
        ];
        parts.concat()
    }
}

/// Returns the machine's load over the last minute.
pub(super) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

/// Returns the guest's accesses by the time that they took.
fn distribution(board: &Board) -> Vec<(f64, u64)> {
    let us = |ticks: u64| (board.time(ticks).as_secs_f64() * 1e7).round() / 10.0;
    let counts = board.accesses.iter().flat_map(|a| a.counts.iter().enumerate());
    counts.filter(|(_, n)| **n > 0).map(|(bucket, n)| (us(access_bucket_start(bucket + 1)), *n)).collect()
}

/// Runs a step.
pub(super) fn run(folder: &Folder, step: &Step) -> Result<Run, String> {
    let options = &step.options;
    let load = load();
    let mut source = Source::start(folder, options)?;
    let guest = Guest::find(&mut source.process, options.memory, FILL)?;
    if let Some(window) = step.stays {
        thread::sleep(BEFORE + step.later);
        guest.reset_gap()?;
        thread::sleep(window);
        return finish(step, load, json!(null), None, &guest);
    }
    let mut pair = source.pair(folder, options)?;
    let warm = warm(options.memory)?;
    let (early, began) = (guest.board()?.operations, Instant::now());
    thread::sleep(BEFORE + step.later);
    drop(warm);
    guest.reset_gap()?;
    let (before, asked) = (guest.board()?.operations, Instant::now());
    let usual = (before - early) as f64 / (asked - began).as_secs_f64();
    let report = pair.migrate()?.report;
    let took = asked.elapsed().as_secs_f64();
    let arrived = Guest::find(&mut pair.destination, options.memory, FILL)?;
    let during = arrived.board()?.operations.saturating_sub(before) as f64 / took;
    let kept = (usual > 0.0).then(|| 100.0 * during / usual);
    thread::sleep(AFTER);
    finish(step, load, report, kept, &arrived)
}

/// Reads the guest's figures, then lets it check its pages.
fn finish(step: &Step, load: f64, report: Value, kept: Option<f64>, guest: &Guest) -> Result<Run, String> {
    let board = guest.board()?;
    Ok(Run {
        step: step.clone(),
        load,
        report,
        accesses: accesses_to_json(&board),
        distribution: distribution(&board),
        gap_ms: ms(board.longest_gap()),
        kept,
        guest_errors: guest.verify()?,
    })
}
