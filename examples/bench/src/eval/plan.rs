//! The migrations that are measured, and their order.

use std::{fmt, time::Duration};

use serde::Serialize;

use super::Part;
use crate::bench::{MIB, ours::Options, tuning::DEFAULT_LIMIT_MS};

/// The bandwidth of the link in the papers, in bit/s.
const GIGABIT: u64 = 1_000_000_000;
/// Orders that need no history. The first is the paper's push-only, with which the others are
/// compared.
pub(super) const ORDERS: [&str; 4] = ["linear", "bubbling", "multi-pivot", "random"];
/// Orders that are compared after a round of pre-copy.
pub(super) const HISTORY_ORDERS: [&str; 2] = ["linear", "hot-first"];
/// The number of the guest's CPUs in the storm.
const STORM_CPUS: u32 = 4;
/// The difference between the starts of repeated runs. The guest's work has phases, so each
/// repetition meets another one. Runs that are compared begin in the same phase.
const LATER: Duration = Duration::from_secs(2);
/// The number of faults on the idle link, of a guest with 65,536 pages. It is most of the pages, so
/// the faults after it matter little.
const IDLE_FAULTS: u32 = 55_000;

/// A workload in the tables of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workload {
    pub(super) name: &'static str,
    spec: &'static str,
    memory: u64,
}

pub(super) const WORKLOADS: [Workload; 3] = [
    Workload { name: "sequential", spec: "sequential:size=256M", memory: 512 * MIB },
    Workload { name: "random", spec: "random:size=256M", memory: 512 * MIB },
    Workload { name: "quicksort", spec: "quicksort:regions=32,size=16M", memory: 1024 * MIB },
];

/// The guests that are protected: one writes to pages far apart, the other works on a few.
pub(super) const PROTECTED: [(&str, &str); 2] = [("random", "random:size=256M"), ("hot", "hot:size=16M,data=256M")];
/// The intervals of reverse checkpoints. The first is no protection, with which the others are
/// compared.
pub(super) const INTERVALS: [&str; 5] = ["none", "500ms", "200ms", "100ms", "20ms"];

/// A migration that is measured, or a guest that is only observed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Step {
    pub(super) part: Part,
    /// The name of the workload or guest in tables.
    pub(super) guest: &'static str,
    /// The name of the kind that is compared.
    pub(super) kind: String,
    pub(super) repeat: u32,
    pub(super) options: Options,
    /// The time for which the guest works before the migration, in addition to the usual time.
    pub(super) later: Duration,
    /// The time for which the guest is observed without a migration, if it is not migrated.
    pub(super) stays: Option<Duration>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = format!("{:?}", self.part).to_lowercase();
        write!(f, "{part}: {}, {} ({})", self.options.workload, self.kind, self.repeat + 1)
    }
}

/// Returns the options of a migration over a link of 1 Gbit/s.
fn options(workload: String, memory: u64, strategy: &str, push_order: String) -> Options {
    Options {
        workload,
        memory,
        cpus: 1,
        backing: "thp",
        streams: 2,
        impact: "balanced",
        strategy: strategy.into(),
        push_order,
        bandwidth_bits: GIGABIT,
        fail_safe: "none".into(),
        downtime_limit_ms: DEFAULT_LIMIT_MS,
        way: Default::default(),
    }
}

/// Returns all steps in their order. Steps that are compared follow each other in each repetition.
pub(super) fn steps(only: &[Part], repeats: u32, seed: u32) -> Vec<Step> {
    let wants = |part| only.is_empty() || only.contains(&part);
    let mut all = Vec::new();
    let mut add = |part, guest, kind: &str, repeat, options, stays| {
        let later = if guest == "quicksort" { LATER * repeat } else { Duration::ZERO };
        if wants(part) {
            all.push(Step { part, guest, kind: kind.into(), repeat, options, later, stays });
        }
    };
    let seeded = |order: &str| if order == "random" { format!("random:seed={seed}") } else { order.to_owned() };
    for repeat in 0..repeats {
        for workload in WORKLOADS {
            let spec = format!("{},seed={seed}", workload.spec);
            for order in ORDERS {
                let options = options(spec.clone(), workload.memory, "post-copy", seeded(order));
                add(Part::Faults, workload.name, order, repeat, options, None);
            }
        }
    }
    for repeat in 0..repeats {
        for workload in WORKLOADS {
            let spec = format!("{},seed={seed}", workload.spec);
            for order in HISTORY_ORDERS {
                let options = options(spec.clone(), workload.memory, "hybrid:rounds=1", order.into());
                add(Part::Hybrid, workload.name, order, repeat, options, None);
            }
        }
    }
    for repeat in 0..repeats {
        let spec = format!("storm:size=256M,seed={seed}");
        let storm = Options { cpus: STORM_CPUS, ..options(spec, 512 * MIB, "post-copy", "multi-pivot".into()) };
        // the time of the migration on this link
        let window = Duration::from_secs_f64(256.0 * MIB as f64 * 8.0 / GIGABIT as f64);
        add(Part::Storm, "storm", "migrates", repeat, storm.clone(), None);
        add(Part::Storm, "storm", "stays", repeat, storm, Some(window));
    }
    for repeat in 0..repeats {
        for (kind, order) in [("push", "linear".into()), ("idle", format!("withhold:faults={IDLE_FAULTS}"))] {
            let options = options(format!("random:size=256M,seed={seed}"), 512 * MIB, "post-copy", order);
            add(Part::Latency, "random", kind, repeat, Options { backing: "anon", bandwidth_bits: 0, ..options }, None);
        }
    }
    for repeat in 0..repeats {
        for (guest, spec) in PROTECTED {
            for interval in INTERVALS {
                let options = options(format!("{spec},seed={seed}"), 512 * MIB, "post-copy", "multi-pivot".into());
                let fail_safe = match interval {
                    "none" => "none".into(),
                    time => format!("reverse:interval={time}"),
                };
                add(Part::FailSafe, guest, interval, repeat, Options { fail_safe, ..options }, None);
            }
        }
    }
    for repeat in 0..repeats {
        for (guest, strategy) in [("pre-copy", "pre-copy"), ("post-copy", "post-copy")] {
            for balloon in ["off", "on"] {
                let spec = format!("churn:size=512M,live=25,pages=10000,interval=1s,balloon={balloon},seed={seed}");
                let options = options(spec, 1024 * MIB, strategy, "multi-pivot".into());
                add(Part::Balloon, guest, balloon, repeat, options, None);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use migration_core::strategy::push_order;
    use minivmm_client::{StrategyKind, values::fail_safe};

    use super::*;

    #[test]
    fn what_is_compared_alternates() {
        let all = steps(&[], 2, 1);
        assert_eq!(all.len(), 2 * (3 * 4 + 3 * 2 + 2 + 2 + 2 * 5 + 4));
        let kinds: Vec<_> = steps(&[Part::Latency], 2, 1).into_iter().map(|s| (s.kind, s.repeat)).collect();
        let of = |kind: &str, repeat| (kind.to_owned(), repeat);
        assert_eq!(kinds, [of("push", 0), of("idle", 0), of("push", 1), of("idle", 1)]);
        let faults = steps(&[Part::Faults], 3, 1);
        assert!(faults.chunks(ORDERS.len()).all(|c| c.iter().all(|s| s.guest == c[0].guest && s.later == c[0].later)));
    }

    #[test]
    fn all_of_it_is_understood() {
        for step in steps(&[], 1, 9) {
            guests::check_spec(&step.options.workload).unwrap();
            let order = &step.options.push_order;
            assert!(super::super::push_order(order).is_some() || push_order::parse(order).is_ok(), "{order}");
            fail_safe(&step.options.fail_safe).unwrap();
            step.options.strategy.parse::<StrategyKind>().unwrap();
            assert!(step.options.workload.contains("seed=9"));
        }
    }
}
