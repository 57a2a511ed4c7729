//! The measurements of hand-overs, their percentiles, and the targets.

use serde::Serialize;

use super::{
    chain::{HandOver, Recovery, Stay},
    plan::Guests,
};
use crate::bench::figures::{Machine, median};

/// The times in papers for taking a VM over on one host, in ms. They were measured on other
/// machines.
pub(super) const PAPERS: [(&str, f64); 3] = [
    ("ephemeral virtualization, 2016 (the paper's figure)", 80.0),
    ("HyperFresh, 2017 (the paper's figure)", 100.0),
    ("HyperFresh's follow-up, 2019 (the paper's figure)", 10.0),
];
/// The largest allowed difference between the medians of guests of all sizes, as a share of the
/// smallest.
const ALIKE: f64 = 0.25;

/// Hand-overs of the same guests, one after the other.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Series {
    pub(super) guests: Guests,
    pub(super) hand_overs: Vec<HandOver>,
    /// Observations of the same guests without a hand-over, for the same time.
    pub(super) stays: Vec<Stay>,
}

/// The result of moving the VM in another way.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Other {
    pub(super) means: Means,
    pub(super) gap_ms: f64,
    pub(super) total_ms: f64,
    /// The downtime that the tool itself reports.
    pub(super) downtime_ms: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Means {
    PreCopy,
    QemuCpr,
}

impl Means {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PreCopy => "our pre-copy, between two processes",
            Self::QemuCpr => "QEMU's cpr-transfer",
        }
    }
}

/// All measurements.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) machine: Machine,
    pub(super) series: Vec<Series>,
    pub(super) others: Vec<Other>,
    pub(super) recoveries: Vec<Recovery>,
    /// The parts that were not measured, with the reasons.
    pub(super) notes: Vec<String>,
    /// The errors of failed attempts. Each attempt was repeated once.
    pub(super) failures: Vec<String>,
}

/// A figure and its target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Verdict {
    pub(super) what: String,
    pub(super) value: f64,
    pub(super) limit: f64,
    pub(super) unit: &'static str,
    pub(super) met: bool,
}

/// Returns the smallest value that at least `percent` percent of all values do not exceed (nearest
/// rank), or `None` for no values.
pub(super) fn percentile(values: &[f64], percent: u32) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent as usize).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// Returns the difference between the largest and the smallest value, as a share of the smallest.
/// Returns `None` for fewer than two values.
pub(super) fn apart(values: &[f64]) -> Option<f64> {
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, m), v| (l.min(*v), m.max(*v)));
    (values.len() > 1 && least > 0.0).then(|| most / least - 1.0)
}

/// The median, the 99th percentile and the largest value of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let at = |percent| percentile(values, percent);
        Some(Self { p50: median(values.iter().copied())?, p99: at(99)?, max: at(100)? })
    }
}

impl Series {
    pub(super) fn values(&self, of: impl Fn(&HandOver) -> f64) -> Vec<f64> {
        self.hand_overs.iter().map(of).collect()
    }

    pub(super) fn spread(&self, of: impl Fn(&HandOver) -> f64) -> Option<Spread> {
        Spread::of(&self.values(of))
    }

    pub(super) fn stay(&self) -> Option<Spread> {
        Spread::of(&self.stays.iter().map(|s| s.gap_ms).collect::<Vec<_>>())
    }

    /// Returns the median gap of the VM with the longest median gap.
    pub(super) fn worst_median(&self) -> Option<f64> {
        let of = |vm| median(self.hand_overs.iter().filter(|h| h.vm == vm).map(|h| h.gap_ms));
        (0..self.guests.vms).filter_map(of).max_by(f64::total_cmp)
    }
}

impl Figures {
    pub(super) fn new(machine: Machine) -> Self {
        let (series, others, recoveries) = (Vec::new(), Vec::new(), Vec::new());
        Self { machine, series, others, recoveries, notes: Vec::new(), failures: Vec::new() }
    }

    /// Adds hand-overs of the same guests.
    pub(super) fn add(&mut self, turn: Series) {
        match self.series.iter_mut().find(|series| series.guests == turn.guests) {
            None => self.series.push(turn),
            Some(series) => {
                series.hand_overs.extend(turn.hand_overs);
                series.stays.extend(turn.stays);
            }
        }
    }

    /// Returns the idle guests of one vCPU with pages of 4 KiB, the smallest first.
    fn idle(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|s| s.guests.is_of_sizes())
    }

    /// Returns the hand-overs with which other ways to move the VM are compared.
    pub(super) fn compared(&self) -> Option<&Series> {
        self.idle().next()
    }

    pub(super) fn verdicts(&self) -> Vec<Verdict> {
        let mut all = Vec::new();
        let mut add = |what: String, value: Option<f64>, limit, unit| {
            if let Some(value) = value {
                all.push(Verdict { what, value, limit, unit, met: value <= limit });
            }
        };
        let gap = |h: &HandOver| h.gap_ms;
        for series in self.idle() {
            let (spread, name) = (series.spread(gap), series.guests.name());
            add(format!("{name}: gap, p50"), spread.map(|s| s.p50), 1.0, "ms");
            add(format!("{name}: gap, p99"), spread.map(|s| s.p99), 3.0, "ms");
        }
        let medians: Vec<f64> = self.idle().filter_map(|s| Some(s.spread(gap)?.p50)).collect();
        let what = "idle, all sizes: by how much the largest median exceeds the least";
        add(what.into(), apart(&medians).map(|share| 100.0 * share), 100.0 * ALIKE, "%");
        for series in self.series.iter().filter(|s| s.guests.vms > 1) {
            let what = format!("{}: gap, p50 of the VM that has the longest", series.guests.name());
            add(what, series.worst_median(), 4.0, "ms");
        }
        all
    }

    /// Returns whether every measured figure that has a target meets it.
    pub(super) fn within_targets(&self) -> bool {
        self.failures.is_empty() && self.verdicts().iter().all(|v| v.met)
    }
}

#[cfg(test)]
pub(super) mod test_util {
    use super::*;

    pub(crate) fn hand_over(vm: usize, gap_ms: f64) -> HandOver {
        HandOver {
            vm,
            gap_ms,
            gap_until_answer_ms: gap_ms / 2.0,
            total_ms: 200.0,
            downtime_ms: 0.5,
            prepare_ms: 180.0,
            state_bytes: 12_345,
            memory_copied_bytes: 0,
        }
    }

    pub(crate) fn series(guests: Guests, gaps: &[f64]) -> Series {
        let hand_overs = gaps.iter().enumerate().map(|(n, gap)| hand_over(n % guests.vms, *gap)).collect();
        let stays = (0..guests.vms).map(|vm| Stay { vm, gap_ms: 0.2 }).collect();
        Series { guests, hand_overs, stays }
    }
}

#[cfg(test)]
mod tests {
    use super::{test_util::series, *};

    #[test]
    fn percentiles() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([1, 50, 99, 100].map(|p| percentile(&values, p)), [1.0, 50.0, 99.0, 100.0].map(Some));
        assert_eq!(percentile(&[7.0], 1), Some(7.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 99), Some(3.0));
        assert_eq!(percentile(&[1.0, 2.0], 0), Some(1.0));
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(Spread::of(&values), Some(Spread { p50: 50.5, p99: 99.0, max: 100.0 }));
    }

    #[test]
    fn how_far_medians_are_apart() {
        assert_eq!(apart(&[1.0, 1.25, 1.1]), Some(0.25));
        assert_eq!((apart(&[1.0]), apart(&[]), apart(&[0.0, 1.0])), (None, None, None));
    }

    #[test]
    fn turns_are_put_together() {
        let mut figures = Figures::new(Machine::here(None));
        for gap in [0.8, 1.2, 1.4] {
            figures.add(series(Guests::idle(1 << 30, 1), &[gap, gap]));
            figures.add(series(Guests::huge(1 << 30), &[gap]));
        }
        let of = |n: usize| figures.series[n].values(|h| h.gap_ms);
        assert_eq!((figures.series.len(), of(0), of(1)), (2, vec![0.8, 0.8, 1.2, 1.2, 1.4, 1.4], vec![0.8, 1.2, 1.4]));
        assert_eq!(figures.series[0].stays.len(), 3);
    }

    #[test]
    fn targets() {
        let mut figures = Figures::new(Machine::here(None));
        assert!(figures.verdicts().is_empty() && figures.within_targets());
        figures.series.push(series(Guests::idle(1 << 30, 1), &[0.8, 0.8, 0.9]));
        figures.series.push(series(Guests::idle(1 << 30, 8), &[0.9, 0.9, 2.9]));
        figures.series.push(series(Guests::sleeping(1 << 30, 2), &[1.0, 4.0, 1.0, 4.0]));
        let verdicts = figures.verdicts();
        assert_eq!(verdicts.iter().map(|v| v.limit).collect::<Vec<_>>(), [1.0, 3.0, 1.0, 3.0, 25.0, 4.0]);
        assert!(figures.within_targets() && verdicts[5].value == 4.0, "{verdicts:?}");
        figures.series.push(series(Guests::idle(1 << 30, 2), &[0.6]));
        assert!(figures.verdicts().iter().any(|v| v.limit == 25.0 && !v.met) && !figures.within_targets());
    }
}
