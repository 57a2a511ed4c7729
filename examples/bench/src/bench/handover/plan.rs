//! Which guests are handed over, how often, and about how long that takes.

use std::time::Duration;

use serde::Serialize;

use crate::bench::{
    DATA, MIB,
    measure::{AFTER, BEFORE},
    ours::Options,
    tuning::DEFAULT_LIMIT_MS,
};

/// Guests that are handed over at once, or the one that is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Guests {
    pub(super) workload: String,
    /// Bytes of RAM of each.
    pub(super) memory: u64,
    pub(super) backing: &'static str,
    pub(super) vms: usize,
}

impl Guests {
    fn one(kind: &str, memory: u64, backing: &'static str) -> Self {
        Self { workload: format!("{kind}data={}M", data(memory)), memory, backing, vms: 1 }
    }

    /// One that is busy and writes nothing, of so many times `unit` bytes.
    pub(super) fn idle(unit: u64, times: u64) -> Self {
        Self::one("idle:", unit * times, "memfd")
    }

    /// The same in huge pages.
    pub(super) fn huge(unit: u64) -> Self {
        Self::one("idle:", unit, "hugetlb")
    }

    /// One that writes most of its data all the time, in pages of 4 KiB.
    pub(super) fn hot(unit: u64) -> Self {
        Self::hot_in(unit, "memfd")
    }

    /// The same in huge pages.
    pub(super) fn hot_huge(unit: u64) -> Self {
        Self::hot_in(unit, "hugetlb")
    }

    fn hot_in(unit: u64, backing: &'static str) -> Self {
        Self::one(&format!("hot:size={}M,", unit / MIB / 2), unit, backing)
    }

    /// Some that sleep from one tick of their clock to the next.
    pub(super) fn sleeping(unit: u64, vms: usize) -> Self {
        Self { vms, ..Self::one("sleep:hz=1000,", unit, "memfd") }
    }

    /// Whether it is one of those whose sizes are compared.
    pub(super) fn is_of_sizes(&self) -> bool {
        self.workload.starts_with("idle") && self.backing == "memfd"
    }

    /// As tables name it.
    pub(super) fn name(&self) -> String {
        let kind = self.workload.split(':').next().unwrap_or_default();
        let size = if self.memory >= 1 << 30 {
            format!("{} GiB", self.memory >> 30)
        } else {
            format!("{} MiB", self.memory / MIB)
        };
        let vms = if self.vms > 1 { format!("{} at once, ", self.vms) } else { String::new() };
        let pages = if self.backing == "hugetlb" { ", huge pages" } else { "" };
        format!("{vms}{kind}, {size}{pages}")
    }

    pub(super) fn options(&self) -> Options {
        Options {
            workload: self.workload.clone(),
            memory: self.memory,
            cpus: 1,
            backing: self.backing,
            streams: 1,
            impact: "balanced",
            strategy: "handover".into(),
            push_order: "linear".into(),
            bandwidth_bits: 0,
            fail_safe: "none".into(),
            downtime_limit_ms: DEFAULT_LIMIT_MS,
            way: Default::default(),
        }
    }

    /// Bytes of RAM of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.memory * self.vms as u64
    }

    /// Rounds until each kind has at least so many hand-overs.
    pub(super) fn rounds(&self, hand_overs: u32) -> u32 {
        hand_overs.div_ceil(self.vms as u32)
    }

    /// Whether the guests are watched without a hand-over after this round: where several are
    /// handed over, as often as they are.
    pub(super) fn stays_after(&self, round: u32) -> bool {
        self.vms > 1 || round % 4 == 1
    }

    /// About how long a round takes, the watch without a hand-over included. (As seen on two
    /// cores.)
    pub(super) fn round_time(&self) -> Duration {
        let filling = Duration::from_millis(200).mul_f64(self.bytes() as f64 / (1u64 << 30) as f64);
        let window = AFTER + Duration::from_millis(50) + filling;
        let starting = Duration::from_millis(40 * self.vms as u64);
        window.mul_f64(if self.vms > 1 { 2.0 } else { 1.25 }) + starting
    }

    /// About how long the guests take to fill their pages, and to check them in the end.
    pub(super) fn start_time(&self) -> Duration {
        BEFORE + Duration::from_secs(2).mul_f64(self.bytes() as f64 / (1u64 << 30) as f64)
    }
}

/// Data of a guest with so much RAM, in MiB.
pub(super) fn data(memory: u64) -> u64 {
    memory / MIB * DATA / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_is_one_and_has_a_name() {
        let unit = 1 << 30;
        let all = [Guests::idle(unit, 8), Guests::huge(unit), Guests::hot(unit), Guests::sleeping(unit, 8)];
        for guests in &all {
            guests::check_spec(&guests.workload).unwrap();
        }
        assert_eq!(all[0].workload, "idle:data=5600M");
        assert_eq!(all[2].workload, "hot:size=512M,data=700M");
        let names = ["idle, 8 GiB", "idle, 1 GiB, huge pages", "hot, 1 GiB", "8 at once, sleep, 1 GiB"];
        assert_eq!(all.each_ref().map(Guests::name), names);
        assert_eq!(all.each_ref().map(Guests::is_of_sizes), [true, false, false, false]);
    }

    #[test]
    fn each_kind_has_enough_hand_overs() {
        assert_eq!([1, 4, 8].map(|vms| Guests::sleeping(1 << 30, vms).rounds(100)), [100, 25, 13]);
        let stays = |guests: Guests| (0..8).filter(|round| guests.stays_after(*round)).count();
        assert_eq!((stays(Guests::idle(1 << 30, 1)), stays(Guests::sleeping(1 << 30, 4))), (2, 8));
    }
}
