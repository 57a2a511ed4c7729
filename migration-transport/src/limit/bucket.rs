//! The computation of a bandwidth limit: when bytes may be sent, given when others were sent. The
//! caller provides the time.

use std::time::{Duration, Instant};

use crate::Bandwidth;

/// The usual range of the size in bytes of the pieces into which a write is split. Between the
/// bounds it is the number of bytes that the limit allows in [`PIECE_TIME`].
const PIECES: std::ops::RangeInclusive<u64> = 4 << 10..=1 << 20;
/// The approximate time that a piece takes on the wire. It is short enough for a smooth rate and
/// for a quick reaction to a close, and long enough for the inaccuracy of timers not to matter.
const PIECE_TIME: Duration = Duration::from_millis(4);
/// The longest time that a piece may take at a very low limit, even if it is then smaller than the
/// range in [`PIECES`]. A receiver assumes that a lane is lost if nothing arrives for seconds.
const MAX_PIECE_TIME: Duration = Duration::from_millis(250);
/// The smallest piece in bytes. With smaller pieces the headers of lower layers would be larger
/// than the data.
const MIN_PIECE: u64 = 256;
/// The time whose data may be sent at once after a pause. The burst has at least [`MIN_BURST`]
/// bytes.
const BURST_TIME: Duration = Duration::from_millis(10);
/// The smallest burst in bytes.
pub(super) const MIN_BURST: u64 = 64 << 10;

/// The share of the limit for urgent data. It is large enough that urgent data hardly waits. It is
/// not 1, because a guest may also wait for other data (after a fault on a page that is being
/// pushed).
const URGENT_SHARE: f64 = 0.75;

/// The priority of data under a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Data that never waits but counts, so that other data waits for it. For control frames.
    Exempt,
    /// Data that is sent first, up to three quarters of the limit. For pages for which a guest
    /// waits.
    Urgent,
    /// Data that gets the rest of the limit.
    Bulk,
}

/// A token bucket whose tokens are time. Writers queue by reserving the time that their bytes take.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    pub(super) bandwidth: Bandwidth,
    /// The time at which everything reserved so far will have been sent at exactly the limit. The
    /// bucket is full if that is at least the time of a burst ago.
    next: Instant,
    /// The same time for urgent data, at its share of the limit.
    urgent: Instant,
    /// The number of changes of the limit. A writer that waits under an older limit reserves again.
    pub(super) generation: u64,
}

/// The time at which a writer may send the bytes for which it reserved time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// At this time, which may have passed already.
    At(Instant),
    /// Not before the limit changes: at the present rate the time is beyond the range of the clock.
    Never,
}

impl Bucket {
    /// Makes an empty bucket at the time `now`.
    pub(super) fn new(bandwidth: Bandwidth, now: Instant) -> Self {
        Self { bandwidth, next: now, urgent: now, generation: 0 }
    }

    /// Changes the limit. Reservations under the old limit become void.
    pub(super) fn change(&mut self, bandwidth: Bandwidth, now: Instant) {
        *self = Self { generation: self.generation + 1, ..Self::new(bandwidth, now) };
    }

    /// Returns the largest number of bytes to send in one piece.
    pub(super) fn piece(&self) -> usize {
        let Some(rate) = self.bandwidth.bytes_per_second() else { return usize::MAX };
        let within = |time: Duration| (rate * time.as_secs_f64()) as u64;
        let usual = within(PIECE_TIME).clamp(*PIECES.start(), *PIECES.end());
        usual.min(within(MAX_PIECE_TIME).max(MIN_PIECE)) as usize
    }

    /// Returns the time until everything reserved so far is within the limit.
    pub(super) fn ahead(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }

    /// Reserves the time that `bytes` take, and returns when it begins.
    pub(super) fn reserve(&mut self, now: Instant, class: Class, bytes: u64) -> Turn {
        if self.bandwidth == Bandwidth::UNLIMITED {
            return Turn::At(now);
        }
        let burst = BURST_TIME.max(self.bandwidth.time_for(MIN_BURST));
        let time = self.bandwidth.time_for(bytes);
        let since_full = |next: Instant| now.checked_sub(burst).map_or(next, |full| next.max(full));
        let (next, urgent) = (since_full(self.next), since_full(self.urgent));
        let (turn, urgent_time) = match class {
            // urgent data waits for exempt data like all other data does, so that together they
            // stay within the limit
            Class::Exempt => (now, time),
            Class::Urgent => (urgent, at_urgent_share(time)),
            Class::Bulk => (next, Duration::ZERO),
        };
        let (Some(next), Some(urgent)) = (next.checked_add(time), urgent.checked_add(urgent_time)) else {
            // exempt data is sent all the same
            return if class == Class::Exempt { Turn::At(now) } else { Turn::Never };
        };
        (self.next, self.urgent) = (next, urgent);
        Turn::At(turn)
    }
}

/// Returns the time at the share of the limit for urgent data of what takes `time` at the limit.
fn at_urgent_share(time: Duration) -> Duration {
    Duration::try_from_secs_f64(time.as_secs_f64() / URGENT_SHARE).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes that were allowed to be sent, and until when.
    struct Passed {
        bytes: u64,
        exempt: u64,
        until: Instant,
    }

    /// Simulates two bulk lanes that always have data, for `time`, and control frames of `control`
    /// bytes, one in each interval `every`. The clock advances from one turn to the next.
    fn flood(bucket: &mut Bucket, start: Instant, time: Duration, (control, every): (u64, Duration)) -> Passed {
        let piece = bucket.piece() as u64;
        let end = start + time;
        let mut passed = Passed { bytes: 0, exempt: 0, until: start };
        let mut next_control = start;
        let mut waiting: Vec<Instant> = Vec::new();
        let mut now = start;
        while now < end {
            while waiting.len() < 2 {
                match bucket.reserve(now, Class::Bulk, piece) {
                    Turn::At(turn) => waiting.push(turn.max(now)),
                    Turn::Never => panic!("no turn"),
                }
            }
            now = waiting.iter().copied().min().unwrap_or(end).min(next_control);
            if now == next_control {
                assert_eq!(bucket.reserve(now, Class::Exempt, control), Turn::At(now));
                (passed.exempt, next_control) = (passed.exempt + control, next_control + every);
            }
            let due = waiting.len();
            waiting.retain(|&turn| turn > now);
            passed.bytes += (due - waiting.len()) as u64 * piece;
            passed.until = now;
        }
        passed
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_limit_holds_with_control_frames_that_never_wait(
            kbit in 1u64..10_000_000,
            control in 32u64..4096,
            share in 0.01f64..0.9,
        ) {
            let bandwidth = Bandwidth::from_bits_per_second(kbit * 1000);
            let start = Instant::now();
            let mut bucket = Bucket::new(bandwidth, start);
            let piece = bucket.piece() as u64;
            // long enough for some thousand pieces and frames, and for the burst to be a small part
            let time = bandwidth.time_for((piece * 2000).max(control * 2000).max(100 * MIN_BURST));
            let every = bandwidth.time_for(control).div_f64(share).max(Duration::from_nanos(1));
            let passed = flood(&mut bucket, start, time, (control, every));
            let limit = bandwidth.bytes_per_second().unwrap_or(0.0) * (passed.until - start).as_secs_f64();
            let sent = (passed.bytes + passed.exempt) as f64;
            prop_assert!(sent <= limit * 1.02 + (3 * piece + control) as f64, "{sent} of {limit}");
            prop_assert!(sent >= limit * 0.97 - (3 * piece + control) as f64, "{sent} of {limit}");
        }

        #[test]
        fn control_frames_pass_at_once_whatever_waits(bits in 1u64..1_000_000, waiting in 1u64..1 << 40, frames in 1u64..100) {
            let start = Instant::now();
            let mut bucket = Bucket::new(Bandwidth::from_bits_per_second(bits), start);
            bucket.reserve(start, Class::Bulk, waiting);
            bucket.reserve(start, Class::Urgent, waiting);
            for _ in 0..frames {
                prop_assert_eq!(bucket.reserve(start, Class::Exempt, 32), Turn::At(start));
            }
        }
    }

    #[test]
    fn urgent_data_gets_three_quarters_and_control_frames_count() {
        let start = Instant::now();
        let bandwidth = Bandwidth::from_bytes_per_second(1_000_000);
        let mut bucket = Bucket::new(bandwidth, start);
        bucket.reserve(start, Class::Exempt, 400_000);
        bucket.reserve(start, Class::Urgent, 450_000);
        // 0.4 s for the control frames, and 0.45 s at three quarters of the limit
        let Turn::At(turn) = bucket.reserve(start, Class::Urgent, 1) else { panic!("no turn") };
        assert_eq!(turn - start, Duration::from_secs(1));
    }

    #[test]
    fn data_whose_time_no_clock_can_measure_never_has_its_turn_unless_it_is_exempt() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Bandwidth::from_bits_per_second(1), start);
        assert_eq!(bucket.reserve(start, Class::Bulk, u64::MAX), Turn::Never);
        assert_eq!(bucket.reserve(start, Class::Urgent, u64::MAX), Turn::Never);
        assert_eq!(bucket.reserve(start, Class::Exempt, u64::MAX), Turn::At(start));
        // and none of it counts
        assert_eq!(bucket.reserve(start, Class::Bulk, 1), Turn::At(start));
    }

    #[test]
    fn pieces_are_short_at_every_rate() {
        let piece = |bits| Bucket::new(Bandwidth::from_bits_per_second(bits), Instant::now()).piece();
        assert_eq!([1, 1_000, 8_000, 64_000].map(piece), [256, 256, 256, 2_000]);
        assert_eq!([1_000_000, 100_000_000, 100_000_000_000].map(piece), [4_096, 50_000, 1 << 20]);
        assert_eq!(piece(0), usize::MAX);
    }

    #[test]
    fn exempt_data_is_ahead_of_the_limit_until_its_time_has_passed() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Bandwidth::from_bytes_per_second(1_000_000), start);
        assert_eq!(bucket.ahead(start), Duration::ZERO);
        bucket.reserve(start, Class::Exempt, 500_000);
        assert_eq!(bucket.ahead(start), Duration::from_millis(500));
        assert_eq!(bucket.ahead(start + Duration::from_millis(200)), Duration::from_millis(300));
        assert_eq!(bucket.ahead(start + Duration::from_secs(1)), Duration::ZERO);
        bucket.reserve(start, Class::Exempt, u64::MAX);
        bucket.change(Bandwidth::UNLIMITED, start);
        bucket.reserve(start, Class::Exempt, u64::MAX);
        assert_eq!(bucket.ahead(start), Duration::ZERO);
    }

    #[test]
    fn a_new_limit_voids_reservations() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Bandwidth::from_bits_per_second(1), start);
        bucket.reserve(start, Class::Bulk, 1 << 30);
        bucket.change(Bandwidth::from_bits_per_second(1_000_000), start);
        assert_eq!((bucket.reserve(start, Class::Bulk, 1), bucket.generation), (Turn::At(start), 1));
        assert_eq!(Bucket::new(Bandwidth::UNLIMITED, start).reserve(start, Class::Bulk, u64::MAX), Turn::At(start));
    }
}
