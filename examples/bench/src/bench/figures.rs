//! The measured values, their medians, and the targets.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::{
    measure::{Run, Vmm},
    postcopy,
    process::field,
    tuning::Tuning,
};

/// The result of a bare copy of the guest's data.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Floor {
    pub(super) streams: u64,
    pub(super) mib: u64,
    pub(super) ms: f64,
}

/// The result of a guest that was not migrated.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Control {
    pub(super) vmm: Vmm,
    pub(super) workload: String,
    /// The number of streams of the copy that ran beside it.
    pub(super) streams: u64,
    pub(super) gap_ms: f64,
}

/// The machine and the versions of its software.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory: String,
    pub(crate) kernel: String,
    pub(crate) minivmm: &'static str,
    pub(crate) optimised: bool,
    pub(crate) qemu: Option<String>,
}

impl Machine {
    /// Returns the description of this machine at this moment.
    pub(crate) fn here(qemu: Option<String>) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        Self {
            date: date(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())),
            cpu: field("/proc/cpuinfo".as_ref(), "model name").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory: field("/proc/meminfo".as_ref(), "MemTotal").unwrap_or_default(),
            kernel: read("/proc/sys/kernel/osrelease"),
            minivmm: env!("CARGO_PKG_VERSION"),
            optimised: !cfg!(debug_assertions),
            qemu,
        }
    }
}

/// All measured values.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) machine: Machine,
    pub(super) floors: Vec<Floor>,
    pub(super) controls: Vec<Control>,
    pub(super) runs: Vec<Run>,
    /// The errors of failed attempts. Each attempt was repeated once.
    pub(super) failures: Vec<String>,
}

/// Returns the name of a VMM.
pub(super) fn name(vmm: Vmm) -> &'static str {
    match vmm {
        Vmm::Minivmm => "minivmm",
        Vmm::Qemu => "QEMU",
    }
}

/// Returns the median, or `None` for no values. For an even number of values it is the mean of the
/// middle two.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// A figure that is compared between VMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figure {
    /// The total time that the client measures.
    Total,
    OwnTotal,
    /// The guest's longest gap.
    Gap,
    /// The time until the guest is as fast as before.
    UntilFast,
    OwnDowntime,
    Cpu,
    /// The part of the CPU time that was not used by vCPU threads.
    CpuBeside,
}

impl Figure {
    pub(super) const ALL: [Self; 7] =
        [Self::Total, Self::OwnTotal, Self::Gap, Self::OwnDowntime, Self::UntilFast, Self::Cpu, Self::CpuBeside];

    pub(super) fn of(self, run: &Run) -> Option<f64> {
        match self {
            Self::Total => Some(run.total_ms),
            Self::OwnTotal => run.own_total_ms,
            Self::Gap => Some(run.gap_ms),
            Self::OwnDowntime => run.own_downtime_ms,
            Self::UntilFast => run.speed.map(|s| s.figure()),
            Self::Cpu => Some(run.cpu_s * 1e3),
            Self::CpuBeside => Some((run.cpu_s - run.cpu_vcpu_s) * 1e3),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Total => "total, client",
            Self::OwnTotal => "total, own figure",
            Self::Gap => "guest's longest gap",
            Self::OwnDowntime => "downtime, own figure",
            Self::UntilFast => "until 90 % of its speed",
            Self::Cpu => "CPU time",
            Self::CpuBeside => "CPU time beside vCPUs",
        }
    }

    /// Returns the largest allowed ratio of our value to QEMU's.
    fn target(self, mode: &str, idle: bool) -> Option<f64> {
        if postcopy::MODES.contains(&mode) {
            return matches!(self, Self::Total | Self::Gap | Self::UntilFast).then_some(0.5);
        }
        match (self, idle) {
            (Self::Total, true) => Some(0.7),
            (Self::Total, false) => Some(1.0),
            (Self::Gap, true) => Some(0.2),
            (Self::Gap, false) => Some(0.3),
            (Self::Cpu, _) => Some(1.0),
            _ => None,
        }
    }
}

/// Returns whether a run belongs to a mode. Our post-copy belongs to two: it is compared with
/// QEMU's post-copy and with QEMU's post-copy with preemption.
pub(super) fn belongs(run: &Run, mode: &str) -> bool {
    let again = mode == postcopy::PREEMPT && run.setup.vmm == Vmm::Minivmm && run.setup.label == postcopy::PLAIN;
    again || run.setup.label == mode
}

/// A value of ours beside QEMU's, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Comparison {
    pub(super) mode: String,
    pub(super) workload: String,
    pub(super) figure: Figure,
    pub(super) ours: Option<f64>,
    pub(super) theirs: Option<f64>,
    pub(super) ratio: Option<f64>,
    pub(super) target: Option<f64>,
    /// Whether the ratio meets its target; `None` if there is no ratio or no target.
    pub(super) good: Option<bool>,
}

/// A value of ours that has a limit.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Limit {
    pub(super) what: String,
    pub(super) value: f64,
    pub(super) limit: Option<f64>,
    pub(super) good: bool,
}

impl Figures {
    pub(super) fn new(qemu: Option<String>) -> Self {
        let machine = Machine::here(qemu);
        Self { machine, floors: Vec::new(), controls: Vec::new(), runs: Vec::new(), failures: Vec::new() }
    }

    /// Returns the workloads of a kind of run, in the order of the runs.
    pub(super) fn workloads(&self, label: &str) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        for run in self.runs.iter().filter(|r| r.setup.label == label) {
            if !all.contains(&run.setup.workload.as_str()) {
                all.push(&run.setup.workload);
            }
        }
        all
    }

    pub(super) fn median(&self, of: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
        median(self.runs.iter().filter_map(of))
    }

    /// Returns every figure of every mode and workload.
    pub(super) fn comparisons(&self) -> Vec<Comparison> {
        let mut all = Vec::new();
        let pre_copy = ["plain", "multifd"].into_iter().flat_map(|mode| Tuning::ALL.map(|tuning| tuning.label(mode)));
        for mode in pre_copy.chain(postcopy::MODES.map(str::to_owned)) {
            let mode = mode.as_str();
            for workload in self.workloads(mode) {
                for figure in Figure::ALL {
                    let of = |vmm| {
                        let wanted = |r: &Run| belongs(r, mode) && r.setup.workload == workload && r.setup.vmm == vmm;
                        self.median(|r| wanted(r).then(|| figure.of(r)).flatten())
                    };
                    let (ours, theirs) = (of(Vmm::Minivmm), of(Vmm::Qemu));
                    if (ours, theirs) == (None, None) {
                        continue;
                    }
                    let ratio = ours.zip(theirs).filter(|(_, t)| *t > 0.0).map(|(o, t)| o / t);
                    let target = figure.target(mode, workload.starts_with("idle"));
                    let good = ratio.zip(target).map(|(r, t)| r <= t);
                    let (mode, workload) = (mode.to_owned(), workload.to_owned());
                    all.push(Comparison { mode, workload, figure, ours, theirs, ratio, target, good });
                }
            }
        }
        all
    }

    /// Returns the peak memory of both sides beyond guest RAM in MiB, and the growth of the total
    /// with the guest's size, each with its limit.
    pub(super) fn limits(&self) -> Vec<Limit> {
        let mut all = Vec::new();
        for run in &self.runs {
            for (side, beyond) in ["source", "destination"].iter().zip(run.beyond.iter().flatten()) {
                let value = beyond.peak as f64 / (1 << 20) as f64;
                let limit = (run.setup.vmm == Vmm::Minivmm).then_some(64.0);
                let what = format!("{}, {side}, {}", name(run.setup.vmm), run.setup.workload);
                all.push(Limit { what, value, limit, good: limit.is_none_or(|l| value <= l) });
            }
        }
        all
    }

    /// Returns the median total for each size of guest, in GiB.
    pub(super) fn sizes(&self) -> Vec<(u64, f64)> {
        let of =
            |gib: u64| self.median(|r| (r.setup.label == "sizes" && r.setup.memory >> 30 == gib).then_some(r.total_ms));
        [1, 2, 4, 8].into_iter().filter_map(|gib| Some((gib, of(gib)?))).collect()
    }

    /// Returns the ratio of the time for each GiB of the largest guest to that of the smallest.
    pub(super) fn growth(&self) -> Option<f64> {
        let sizes = self.sizes();
        let (first, last) = (sizes.first()?, sizes.last()?);
        (last.0 > first.0).then(|| (last.1 / last.0 as f64) / (first.1 / first.0 as f64))
    }

    /// Returns whether every measured figure that has a target meets it.
    pub(super) fn within_targets(&self) -> bool {
        self.failures.is_empty()
            && self.comparisons().iter().all(|c| c.good != Some(false))
            && self.limits().iter().all(|l| l.good)
            && self.growth().is_none_or(|g| g <= 1.0 + NOISE)
    }
}

/// The share by which the total may grow more than in proportion to the size. It covers the spread
/// of medians on a machine that is not idle.
pub(super) const NOISE: f64 = 0.1;

/// Returns the UTC date of a number of seconds since 1970 (Howard Hinnant's algorithm
/// `civil_from_days`).
fn date(seconds: u64) -> String {
    let days = seconds / 86400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_767_225_599), "2025-12-31");
        assert_eq!(date(1_767_225_600), "2026-01-01");
    }
}
