//! Estimates the duration of a switch-over from the estimates of both VMMs and the measurements of
//! the rounds so far.

use std::time::Duration;

use crate::{PAGE_SIZE, strategy::Link, vm::StateEstimate};

/// The time to pause and start the guest: a few signals, and wake-ups of threads at both ends.
const PAUSE_AND_START: Duration = Duration::from_millis(1);
/// The fixed time to save the state, or to load it, if the VMM does not give an estimate.
const UNKNOWN_STEP: Duration = Duration::from_millis(1);
/// The bytes of state that are saved, or loaded, a second, if the VMM does not give an estimate.
/// The state is copied a few times.
const UNKNOWN_SPEED: f64 = 1e9;
/// The bytes of state of a VM that gives no estimate: the state of one vCPU. The value is low on
/// purpose, because a migration is given up if the estimate is too high.
const UNKNOWN_STATE: u64 = 20 << 10;
/// A round of fewer bytes says more about latency than about bandwidth. As long as there was no
/// larger one, the highest rate of the rounds that are not [tiny](LEAST_HINT) is used.
const LEAST_SAMPLE: u64 = 4 << 20;
/// A round of fewer bytes says nothing about bandwidth. Its time is little more than a round trip.
const LEAST_HINT: u64 = 64 << 10;
/// A round of fewer pages says nothing about the time to read a page, because it has looked at all
/// other pages, too.
const LEAST_PAGES: u64 = 512;
/// The bandwidth in bytes a second as long as no round has shown it: 1 Gbit/s.
const ASSUMED_BANDWIDTH: f64 = 125e6;

/// The measurements of one round.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    /// The number of pages that were sent.
    pub(super) pages: u64,
    /// The number of bytes on the wire.
    pub(super) wire_bytes: u64,
    /// The time from the beginning of the round to the destination's acknowledgement.
    pub(super) time: Duration,
    /// The part of `time` in which a lane did not write, because it read pages.
    pub(super) reading: Duration,
}

/// The measurements of the link, and the estimates of both VMMs. The fields of a [`Link`] are
/// computed from them.
#[derive(Clone, Debug, Default)]
pub(super) struct Calibration {
    round_trip: Option<Duration>,
    round_trips: u32,
    /// The time of a round besides round trip and transfer: waking threads, and reporting the end.
    round_overhead: Option<Duration>,
    /// The rate of a round that was large enough, in bytes a second.
    bandwidth: Option<f64>,
    /// The highest rate of the small rounds, in bytes a second.
    hint: f64,
    /// The last two rounds.
    last: [Sample; 2],
    rounds: u32,
    seconds_per_page: f64,
    state: Option<StateEstimate>,
    pending: u64,
    /// The destination's estimate of the time to load the state.
    load: Option<Duration>,
}

impl Calibration {
    /// Returns the shortest round trip seen, or zero before the first one.
    pub(super) fn shortest_round_trip(&self) -> Duration {
        self.round_trip.unwrap_or_default()
    }

    /// Records the time of a round trip.
    pub(super) fn round_trip(&mut self, time: Duration) {
        self.round_trips = self.round_trips.saturating_add(1);
        // One answer may have been late, for a reason that has nothing to do with the link.
        self.round_trip = Some(self.round_trip.map_or(time, |shortest| shortest.min(time)));
    }

    /// Records the destination's estimate of the time to load the state.
    pub(super) fn loads_in(&mut self, load: Option<Duration>) {
        self.load = load;
    }

    /// Records the estimate of the source's VMM of what the pause has to save.
    pub(super) fn saves(&mut self, state: Option<StateEstimate>) {
        self.state = state;
    }

    /// Records the bytes of state that are still to come in pieces.
    pub(super) fn pending(&mut self, bytes: u64) {
        self.pending = bytes;
    }

    /// Records the measurements of a round that has ended.
    pub(super) fn round(&mut self, sample: Sample) {
        self.rounds = self.rounds.saturating_add(1);
        self.last = [self.last[1], sample];
        if sample.pages >= LEAST_PAGES {
            self.seconds_per_page = sample.reading.as_secs_f64() / sample.pages as f64;
        }
        // A round takes at least the round trip of its end and the answer to that.
        self.round_trip = self.round_trip.map(|shortest| shortest.min(sample.time));
        let round_trip = self.round_trip.unwrap_or_default();
        let moved = sample.time.saturating_sub(sample.reading);
        if sample.wire_bytes < LEAST_HINT {
            // The destination's answer came a little more than a round trip later.
            self.round_trip(moved);
            let transfer = Duration::try_from_secs_f64(sample.wire_bytes as f64 / self.bytes_per_second());
            let beside = moved.saturating_sub(round_trip).saturating_sub(transfer.unwrap_or_default());
            self.round_overhead = Some(self.round_overhead.map_or(beside, |least| least.min(beside)));
            return;
        }
        // The subtraction must leave some time: the round trip is not known to the microsecond.
        let transfer = moved.saturating_sub(round_trip).max(sample.time / 8).max(Duration::from_micros(1));
        let speed = sample.wire_bytes as f64 / transfer.as_secs_f64();
        if sample.wire_bytes >= LEAST_SAMPLE {
            self.bandwidth = Some(speed);
        } else {
            self.hint = self.hint.max(speed);
        }
    }

    /// Returns what the VMM expects to save, if it has given an estimate.
    pub(super) fn state(&self) -> Option<&StateEstimate> {
        self.state.as_ref()
    }

    /// Returns the bytes of state that are pending.
    pub(super) fn pending_bytes(&self) -> u64 {
        self.pending
    }

    fn bytes_per_second(&self) -> f64 {
        match (self.bandwidth, self.hint) {
            (Some(bandwidth), _) => bandwidth,
            (None, hint) if hint > 0.0 => hint,
            _ => ASSUMED_BANDWIDTH,
        }
    }

    fn state_bytes(&self) -> u64 {
        self.state.as_ref().map_or(UNKNOWN_STATE, StateEstimate::bytes)
    }

    /// Returns how long the guest is paused, apart from pages and the transfer of state, when the
    /// state goes to a local store. Nobody loads the state then.
    pub(super) fn pause_and_save(&self) -> Duration {
        let save = self.state.as_ref().and_then(|state| state.save_time);
        PAUSE_AND_START
            .saturating_add(save.unwrap_or_else(|| unknown_step(self.state_bytes().saturating_add(self.pending))))
    }

    /// Returns `link` with the fields that are known here. The session has set the others.
    pub(super) fn describe(&self, link: Link) -> Link {
        let bytes = self.state_bytes().saturating_add(self.pending);
        let load = self.load.unwrap_or_else(|| unknown_step(bytes));
        let (round_trip, overhead) = (self.round_trip.unwrap_or_default(), self.round_overhead.unwrap_or_default());
        let fixed =
            [load, overhead, round_trip, round_trip].into_iter().fold(self.pause_and_save(), Duration::saturating_add);
        let pages: u64 = self.last.iter().map(|sample| sample.pages).sum();
        let wire_bytes: u64 = self.last.iter().map(|sample| sample.wire_bytes).sum();
        Link {
            bytes_per_second: if self.rounds == 0 { 0.0 } else { self.bytes_per_second() },
            bytes_per_page: if pages == 0 { PAGE_SIZE as f64 } else { wire_bytes as f64 / pages as f64 },
            seconds_per_page: self.seconds_per_page,
            fixed_downtime: fixed,
            round_trip,
            round_trips: self.round_trips,
            state_bytes: self.state_bytes(),
            pending_bytes: self.pending,
            ..link
        }
    }
}

/// Returns the time of saving or loading for a VMM that gives no estimate.
fn unknown_step(bytes: u64) -> Duration {
    let copies = Duration::try_from_secs_f64(bytes as f64 / UNKNOWN_SPEED).unwrap_or(Duration::MAX);
    UNKNOWN_STEP.saturating_add(copies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::SectionEstimate;

    const MS: Duration = Duration::from_millis(1);

    fn link() -> Link {
        Link { downtime_limit: 300 * MS, ..Link::default() }
    }

    fn sample(pages: u64, wire_bytes: u64, time: Duration, reading: Duration) -> Sample {
        Sample { pages, wire_bytes, time, reading }
    }

    /// 15 MB in one device, saved in 20 ms.
    fn large() -> StateEstimate {
        let gpu = SectionEstimate { name: "gpu".into(), instance: 0, bytes: 15_000_000 };
        StateEstimate { sections: vec![gpu], save_time: Some(20 * MS) }
    }

    #[test]
    fn the_fixed_costs_are_what_both_ends_say() {
        let mut known = Calibration::default();
        assert_eq!(known.describe(link()).fixed_downtime.as_millis(), 3, "nobody says anything");
        known.round_trip(2 * MS);
        known.round_trip(5 * MS);
        known.saves(Some(large()));
        known.loads_in(Some(100 * MS));
        let link = known.describe(link());
        assert_eq!(link.fixed_downtime, PAUSE_AND_START + (20 + 100 + 2 * 2) * MS);
        assert_eq!((link.round_trip, link.round_trips, link.state_bytes), (2 * MS, 2, 15_000_000));
        assert_eq!(link.floor(), link.fixed_downtime, "as long as the bandwidth is unknown");
        assert_eq!(known.pause_and_save(), PAUSE_AND_START + 20 * MS);
        assert_eq!((known.shortest_round_trip(), known.state()), (2 * MS, Some(&large())));
    }

    #[test]
    fn what_is_not_said_grows_with_what_is_pending() {
        let mut known = Calibration::default();
        let before = known.describe(link());
        known.pending(15_000_000);
        let link = known.describe(link());
        assert_eq!((link.pending_bytes, known.pending_bytes(), known.state()), (15_000_000, 15_000_000, None));
        let bytes = Duration::from_nanos(UNKNOWN_STATE + 15_000_000);
        assert_eq!(known.pause_and_save(), PAUSE_AND_START + UNKNOWN_STEP + bytes);
        assert!(link.fixed_downtime >= before.fixed_downtime + 30 * MS, "{link:?}");
        assert!(link.predict(0) >= link.floor());
    }

    #[test]
    fn state_counts_at_the_bandwidth_that_rounds_have_had() {
        let mut known = Calibration::default();
        known.round_trip(10 * MS);
        known.saves(Some(large()));
        known.loads_in(Some(100 * MS));
        // 100 MB in 1 s, apart from a round trip and 90 ms of reading.
        known.round(sample(25_000, 100_000_000, 1100 * MS, 90 * MS));
        let link = known.describe(link());
        assert!((link.bytes_per_second - 100e6).abs() < 1.0, "{link:?}");
        assert_eq!(link.state_time(), 150 * MS);
        assert_eq!(link.floor(), link.fixed_downtime + 150 * MS);
        let pages = link.predict(25_000) - link.floor();
        assert!((pages.as_secs_f64() - 1.09).abs() < 1e-6, "reading counts for pages: {pages:?}");
    }

    #[test]
    fn a_round_that_is_shorter_than_the_round_trip_shows_that_the_link_has_become_faster() {
        let mut known = Calibration::default();
        known.round_trip(2000 * MS);
        known.round(sample(2000, 8_000_000, 2500 * MS, MS));
        assert_eq!(known.describe(link()).round_trip, 2000 * MS);
        known.round(sample(2000, 8_000_000, 5 * MS, MS));
        let link = known.describe(link());
        assert_eq!(link.round_trip, 5 * MS);
        assert!(link.fixed_downtime < 20 * MS, "{link:?}");
    }

    #[test]
    fn a_guest_of_zeros_does_not_make_the_link_look_slow() {
        let mut known = Calibration::default();
        known.round_trip(MS / 5);
        // A gigabyte of zeros: 100 ms of reading, and only the marks of zero pages on the wire.
        known.round(sample(262_144, 40_000, 101 * MS, 100 * MS));
        let link = known.describe(link());
        assert_eq!(link.bytes_per_second, ASSUMED_BANDWIDTH);
        assert!(link.predict(10) < 5 * MS, "{:?}", link.predict(10));
        // The time of reading at that rate still counts.
        let all = link.predict(262_144) - link.floor();
        assert!(all >= 100 * MS && all < 102 * MS, "{all:?}");
    }

    #[test]
    fn small_rounds_are_a_lower_bound_of_the_bandwidth_and_large_ones_replace_it() {
        let mut known = Calibration::default();
        known.round(sample(16, LEAST_HINT - 1, 100 * MS, Duration::ZERO));
        assert_eq!(known.describe(link()).bytes_per_second, ASSUMED_BANDWIDTH);
        known = Calibration::default();
        known.round(sample(16, LEAST_HINT, 64 * MS, Duration::ZERO));
        assert_eq!(known.describe(link()).bytes_per_second, 1_024_000.0);
        known.round(sample(100, 400_000, 100 * MS, Duration::ZERO));
        assert_eq!(known.describe(link()).bytes_per_second, 4e6);
        known.round(sample(100, 400_000, 10 * MS, Duration::ZERO));
        known.round(sample(100, 400_000, 50 * MS, Duration::ZERO));
        assert_eq!(known.describe(link()).bytes_per_second, 40e6);
        known.round(sample(2000, 8_000_000, 1000 * MS, Duration::ZERO));
        known.round(sample(100, 400_000, 10 * MS, Duration::ZERO));
        assert_eq!(known.describe(link()).bytes_per_second, 8e6);
    }

    #[test]
    fn empty_rounds_are_round_trips_and_show_what_a_round_costs() {
        let mut known = Calibration::default();
        known.round_trip(MS);
        known.round(sample(0, 80, 3 * MS, Duration::ZERO));
        known.round(sample(0, 80, 2 * MS, Duration::ZERO));
        let link = known.describe(link());
        assert_eq!((link.round_trip, link.round_trips), (MS, 3));
        let overhead = link.fixed_downtime - known.pause_and_save() - unknown_step(UNKNOWN_STATE) - 2 * MS;
        assert!(overhead > MS * 99 / 100 && overhead < MS, "{overhead:?}");
    }

    #[test]
    fn claims_of_a_peer_do_not_overflow() {
        let mut known = Calibration::default();
        known.loads_in(Some(Duration::from_micros(u64::MAX)));
        known.pending(u64::MAX);
        let section = SectionEstimate { name: "gpu".into(), instance: 0, bytes: u64::MAX };
        known.saves(Some(StateEstimate { sections: vec![section.clone(), section], save_time: Some(Duration::MAX) }));
        known.round_trip(Duration::MAX);
        known.round(sample(u64::MAX / 2, 5 << 20, Duration::MAX, Duration::ZERO));
        let claimed = known.describe(link());
        assert!(claimed.predict(u64::MAX) > claimed.downtime_limit);
        known.saves(None);
        assert!(known.describe(link()).predict(0) > claimed.downtime_limit);
    }
}
