//! One migration between two processes, and what both sides and the guest say of it.

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

/// What came of a step.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    pub(super) step: Step,
    /// The machine's load over the last minute, just before.
    pub(super) load: f64,
    /// The source's report; null of a guest that stayed.
    pub(super) report: Value,
    /// What the guest says of its accesses during and after the migration; null if it does not
    /// measure them.
    pub(super) accesses: Value,
    /// The same in full: how many took up to so many microseconds, and more than the entry before.
    pub(super) distribution: Vec<(f64, u64)>,
    /// The guest's longest gap in that time.
    pub(super) gap_ms: f64,
    /// The guest's operations a second from the request until the end, as a share of those before,
    /// in percent.
    pub(super) kept: Option<f64>,
    /// Pages that the guest found wrong when it checked all of them at the end.
    pub(super) guest_errors: u64,
}

impl Run {
    /// A number of the report, by its path.
    pub(super) fn number(&self, pointer: &str) -> Option<f64> {
        self.report.pointer(pointer)?.as_f64()
    }

    /// A number of the guest's accesses, in microseconds.
    pub(super) fn access(&self, key: &str) -> Option<f64> {
        self.accesses[key].as_f64()
    }

    /// Pages that had not moved before the hand-over.
    pub(super) fn left_behind(&self) -> Option<f64> {
        Some(self.number("/pages/pushed")? + self.number("/pages/demanded")?)
    }

    /// Faults for which a page had to be fetched, as a share of the pages that were left behind, in
    /// percent.
    pub(super) fn share(&self) -> Option<f64> {
        Some(100.0 * self.number("/faults/network")? / self.left_behind().filter(|pages| *pages > 0.0)?)
    }

    /// The most telling figures in a line.
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

/// The machine's load over the last minute.
pub(super) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

/// The guest's accesses by how long they took.
fn distribution(board: &Board) -> Vec<(f64, u64)> {
    let us = |ticks: u64| (board.time(ticks).as_secs_f64() * 1e7).round() / 10.0;
    let counts = board.accesses.iter().flat_map(|a| a.counts.iter().enumerate());
    counts.filter(|(_, n)| **n > 0).map(|(bucket, n)| (us(access_bucket_start(bucket + 1)), *n)).collect()
}

/// Does a step.
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
