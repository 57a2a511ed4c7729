//! The measurements, medians over runs, and the targets.

use serde::Serialize;

use super::{Part, run::Run};
use crate::bench::figures::{Machine, median};

/// All measurements.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) machine: Machine,
    pub(super) seed: u32,
    pub(super) runs: Vec<Run>,
    /// The errors of failed attempts. Each attempt was repeated once.
    pub(super) failures: Vec<String>,
}

/// A figure and its target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Verdict {
    pub(super) what: &'static str,
    pub(super) value: f64,
    pub(super) limit: f64,
    pub(super) unit: &'static str,
    /// The value in the paper, or in another source of the target.
    pub(super) beside: &'static str,
    pub(super) met: bool,
}

impl Figures {
    pub(super) fn new(machine: Machine, seed: u32) -> Self {
        Self { machine, seed, runs: Vec::new(), failures: Vec::new() }
    }

    /// Returns the runs of a kind.
    pub(super) fn of<'a>(&'a self, part: Part, guest: &'a str, kind: &'a str) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().filter(move |r| r.step.part == part && r.step.guest == guest && r.step.kind == kind)
    }

    /// Returns a figure of each run of a kind.
    pub(super) fn values(&self, part: Part, guest: &str, kind: &str, of: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
        self.of(part, guest, kind).filter_map(of).collect()
    }

    pub(super) fn median(&self, part: Part, guest: &str, kind: &str, of: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
        median(self.values(part, guest, kind, of))
    }

    /// Returns a figure of the runs of a kind as a share of the same figure of another kind. Runs
    /// that followed each other are compared.
    pub(super) fn ratios(
        &self,
        part: Part,
        guest: &str,
        [kind, base]: [&str; 2],
        of: impl Fn(&Run) -> Option<f64>,
    ) -> Vec<f64> {
        let mut all = Vec::new();
        for run in self.of(part, guest, kind) {
            let other = self.of(part, guest, base).find(|other| other.step.repeat == run.step.repeat);
            if let (Some(a), Some(b)) = (of(run), other.and_then(&of).filter(|b| *b > 0.0)) {
                all.push(a / b);
            }
        }
        all
    }

    /// Returns the smallest and the largest load before a run.
    pub(super) fn loads(&self) -> (f64, f64) {
        self.runs.iter().fold((f64::MAX, 0.0), |(least, most), run| (least.min(run.load), most.max(run.load)))
    }

    /// Returns every measured figure that has a target.
    pub(super) fn verdicts(&self) -> Vec<Verdict> {
        let mut all = Vec::new();
        let mut add = |what, value: Option<f64>, limit, unit, beside| {
            if let Some(value) = value {
                all.push(Verdict { what, value, limit, unit, beside, met: value <= limit });
            }
        };
        let network = |r: &Run| r.number("/faults/network");
        let pivots = self.ratios(Part::Faults, "quicksort", ["multi-pivot", "linear"], network);
        add(
            "quicksort: network faults, multi-pivot to linear",
            median(pivots),
            1.0 / 3.0,
            "×",
            "1,450 of 5,450: 0.27 ×",
        );
        let share = self.median(Part::Faults, "sequential", "multi-pivot", Run::share);
        add("sequential: network faults, multi-pivot", share, 4.0, "%", "2–4 %, push-only 9–15 %");
        let storm = |r: &Run| Some(r.access("p999")? / r.access("p50").filter(|us| *us > 0.0)?);
        add("storm: p999 to p50, guest's clock", self.median(Part::Storm, "storm", "migrates", storm), 20.0, "×", "");
        let served = |r: &Run| Some(r.number("/faults/p999_us")? / r.number("/faults/p50_us").filter(|us| *us > 0.0)?);
        add("storm: p999 to p50, report", self.median(Part::Storm, "storm", "migrates", served), 20.0, "×", "");
        for (what, key, floor) in [
            ("fault beside a full push: p50, guest's clock", "p50", 150.0f64),
            ("fault beside a full push: p99, guest's clock", "p99", 1000.0),
        ] {
            let of = |kind| self.median(Part::Latency, "random", kind, |r| r.access(key));
            // twice the value of the idle link is also good enough
            let limit = of("idle").map_or(floor, |idle| floor.max(2.0 * idle));
            add(what, of("push"), limit, "µs", "");
        }
        all
    }
}

#[cfg(test)]
pub(super) mod test_util {
    use serde_json::json;

    use super::{
        super::{plan, run::Run},
        *,
    };

    /// Returns runs of all kinds. `network` returns the number of faults of a step.
    pub(crate) fn figures(repeats: u32, network: impl Fn(&plan::Step) -> u64) -> Figures {
        let mut figures = Figures::new(Machine::here(None), 1);
        for step in plan::steps(&[], repeats, 1) {
            let network = network(&step);
            let report = json!({
                "total_ms": 1000.0, "wire_bytes": 5_000_000, "pages": {"pushed": 1000 - network, "demanded": network, "free": 3},
                "faults": {"network": network, "count": network + 1, "p50_us": 50, "p90_us": 60, "p99_us": 70, "p999_us": 400, "max_us": 900},
            });
            let accesses = json!({"above": 20.0, "count": 100, "p50": 60.0, "p90": 70.0, "p99": 80.0, "p999": 1500.0, "max": 2000.0});
            let distribution = vec![(32.0, 70), (64.0, 29), (1024.0, 1)];
            let report = if step.stays.is_some() { json!(null) } else { report };
            figures.runs.push(Run {
                step,
                load: 0.5,
                report,
                accesses,
                distribution,
                gap_ms: 4.0,
                kept: None,
                guest_errors: 0,
            });
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_run_together_is_compared() {
        // the later runs have ten times as many faults, in both orders
        let figures = test_util::figures(3, |step| {
            let base = if step.kind == "linear" { 40 } else { 10 };
            base * if step.repeat == 2 { 10 } else { 1 }
        });
        let network = |r: &Run| r.number("/faults/network");
        assert_eq!(figures.ratios(Part::Faults, "quicksort", ["multi-pivot", "linear"], network), [0.25; 3]);
        assert_eq!(figures.median(Part::Faults, "random", "linear", network), Some(40.0));
        let verdicts = figures.verdicts();
        assert_eq!(verdicts.len(), 6);
        let of = |what: &str| verdicts.iter().find(|v| v.what.starts_with(what)).unwrap();
        assert!(of("quicksort").met && of("sequential").met && of("sequential").value == 1.0);
        assert!(!of("storm: p999 to p50, guest").met && of("storm: p999 to p50, report").met);
        assert_eq!(of("fault beside a full push: p50").limit, 150.0);
    }

    #[test]
    fn nothing_measured_is_nothing_judged() {
        assert!(Figures::new(Machine::here(None), 1).verdicts().is_empty());
    }
}
