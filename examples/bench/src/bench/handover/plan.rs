//! The guests that are handed over, the number of hand-overs, and their approximate duration.

use std::time::Duration;

use serde::Serialize;

use crate::bench::{
    DATA, MIB,
    measure::{AFTER, BEFORE},
    ours::Options,
    tuning::DEFAULT_LIMIT_MS,
};

/// One guest, or several guests that are handed over at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Guests {
    pub(super) workload: String,
    /// Bytes of RAM of each guest.
    pub(super) memory: u64,
    pub(super) backing: &'static str,
    pub(super) vms: usize,
}

impl Guests {
    fn one(kind: &str, memory: u64, backing: &'static str) -> Self {
        Self { workload: format!("{kind}data={}M", data(memory)), memory, backing, vms: 1 }
    }

    /// Returns one busy guest that writes nothing, with `times` times `unit` bytes of RAM.
    pub(super) fn idle(unit: u64, times: u64) -> Self {
        Self::one("idle:", unit * times, "memfd")
    }

    /// Returns the same guest in huge pages.
    pub(super) fn huge(unit: u64) -> Self {
        Self::one("idle:", unit, "hugetlb")
    }

    /// Returns a guest that writes most of its data continuously, in pages of 4 KiB.
    pub(super) fn hot(unit: u64) -> Self {
        Self::hot_in(unit, "memfd")
    }

    /// Returns the same guest in huge pages.
    pub(super) fn hot_huge(unit: u64) -> Self {
        Self::hot_in(unit, "hugetlb")
    }

    fn hot_in(unit: u64, backing: &'static str) -> Self {
        Self::one(&format!("hot:size={}M,", unit / MIB / 2), unit, backing)
    }

    /// Returns guests that sleep from one tick of their clock to the next.
    pub(super) fn sleeping(unit: u64, vms: usize) -> Self {
        Self { vms, ..Self::one("sleep:hz=1000,", unit, "memfd") }
    }

    /// Returns whether this guest is one of those whose sizes are compared.
    pub(super) fn is_of_sizes(&self) -> bool {
        self.workload.starts_with("idle") && self.backing == "memfd"
    }

    /// Returns the name in tables.
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

    /// Returns the bytes of RAM of all guests together.
    pub(super) fn bytes(&self) -> u64 {
        self.memory * self.vms as u64
    }

    /// Returns the number of rounds after which there are at least `hand_overs` hand-overs.
    pub(super) fn rounds(&self, hand_overs: u32) -> u32 {
        hand_overs.div_ceil(self.vms as u32)
    }

    /// Returns whether the guests are observed without a hand-over after this round. Several guests
    /// are observed as often as they are handed over.
    pub(super) fn stays_after(&self, round: u32) -> bool {
        self.vms > 1 || round % 4 == 1
    }

    /// Returns the approximate duration of a round on two cores, including the observation without
    /// a hand-over.
    pub(super) fn round_time(&self) -> Duration {
        let filling = Duration::from_millis(200).mul_f64(self.bytes() as f64 / (1u64 << 30) as f64);
        let window = AFTER + Duration::from_millis(50) + filling;
        let starting = Duration::from_millis(40 * self.vms as u64);
        window.mul_f64(if self.vms > 1 { 2.0 } else { 1.25 }) + starting
    }

    /// Returns the approximate time in which the guests fill their pages, and check them at the
    /// end.
    pub(super) fn start_time(&self) -> Duration {
        BEFORE + Duration::from_secs(2).mul_f64(self.bytes() as f64 / (1u64 << 30) as f64)
    }
}

/// Returns the data of a guest with `memory` bytes of RAM, in MiB.
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
