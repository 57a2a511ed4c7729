//! The limits of the time for which the guest may stay paused before the hand-over. Until *run* is
//! sent the VM is ours, and a destination that does not answer must not keep it from running.

use super::*;
use crate::PAGE_SIZE;

/// How long the guest may stay paused for a hand-over that does not succeed. When a limit is
/// exceeded before *run* is sent, the guest runs on at the source, everything is rolled back, and
/// the migration fails.
///
/// A guest that was paused by its user before the migration is not subject to these limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseLimits {
    /// The longest time in the pause without a sign of life: no frame has come from the
    /// destination, and the destination has accepted no byte. Time in which this process itself did
    /// not run does not count. `None` means four times the downtime limit, but at least
    /// [`LEAST_SILENCE`](Self::LEAST_SILENCE).
    pub silence: Option<Duration>,
    /// The longest pause, even if the destination makes progress. `None` means ten times the
    /// downtime limit, or ten times the predicted downtime if that is longer, but at least
    /// [`LEAST_TOTAL`](Self::LEAST_TOTAL). If no downtime was predicted (stop-and-copy), the time
    /// that the pages need at 1 MiB/s is added.
    pub total: Option<Duration>,
}

impl PauseLimits {
    /// The shortest limit of the time without a sign of life, if none is given. A shorter limit
    /// would fail migrations to a destination on a busy host.
    pub const LEAST_SILENCE: Duration = Duration::from_secs(2);
    /// The shortest limit of the whole pause, if none is given.
    pub const LEAST_TOTAL: Duration = Duration::from_secs(10);
    /// The silence that is allowed if no limit is given, as a multiple of the downtime limit.
    const SILENCE_FACTOR: u32 = 4;
    /// The total pause that is allowed if no limit is given, as a multiple of the downtime limit.
    const TOTAL_FACTOR: u32 = 10;

    fn silence(&self, downtime_limit: Duration) -> Duration {
        self.silence
            .unwrap_or_else(|| downtime_limit.saturating_mul(Self::SILENCE_FACTOR).max(Self::LEAST_SILENCE))
            // Sockets take a time-out of zero as no time-out.
            .max(Duration::from_millis(1))
    }

    fn total(&self, downtime_limit: Duration, predicted: Option<Duration>) -> Duration {
        let expected = predicted.unwrap_or_default().max(downtime_limit);
        self.total.unwrap_or_else(|| expected.saturating_mul(Self::TOTAL_FACTOR).max(Self::LEAST_TOTAL))
    }
}

/// The interval at which the engine checks for a sign of life.
const LOOK: Duration = Duration::from_millis(100);
/// The most time that counts as silence between two checks. If more time has passed, this process
/// did not run for the rest of it.
const LONGEST_LOOK: Duration = Duration::from_millis(250);
/// The rate, in bytes a second, that a pause without a predicted length has to exceed when it sends
/// pages.
const LEAST_RATE: u64 = 1 << 20;
/// The longest time that the last frame to a destination may wait until the destination accepts it.
const LAST_WORD: Duration = Duration::from_millis(200);

/// A watch over one pause.
pub(super) struct PauseWatch {
    silence: Duration,
    total: Duration,
    /// Whether pages that are sent in the pause prolong it.
    by_pages: bool,
    began: Instant,
    looked: Instant,
    /// The time without a sign of life so far.
    silent: Duration,
    /// The number of bytes sent and received at the last sign of life.
    bytes: u64,
}

impl PauseWatch {
    fn new(
        limits: PauseLimits,
        downtime_limit: Duration,
        predicted: Option<Duration>,
        now: Instant,
        bytes: u64,
    ) -> Self {
        Self {
            silence: limits.silence(downtime_limit),
            total: limits.total(downtime_limit, predicted),
            by_pages: limits.total.is_none() && predicted.is_none(),
            began: now,
            looked: now,
            silent: Duration::ZERO,
            bytes,
        }
    }

    /// Records a sign of life.
    fn alive(&mut self) {
        self.silent = Duration::ZERO;
    }

    /// Checks the number of bytes that have moved. Returns the reason why the pause must end, or
    /// `None` if it may continue.
    fn look(&mut self, now: Instant, bytes: u64) -> Option<String> {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        if bytes != self.bytes {
            self.bytes = bytes;
            self.silent = Duration::ZERO;
        } else {
            self.silent += since.min(LONGEST_LOOK);
        }
        if self.silent >= self.silence {
            return Some(format!("was silent for {:?}", self.silence));
        }
        self.exceeded(now)
    }

    /// Returns the reason why the pause must end at `now` although the destination makes progress,
    /// or `None` before that time.
    fn exceeded(&self, now: Instant) -> Option<String> {
        (now.saturating_duration_since(self.began) >= self.total)
            .then(|| format!("was not ready within {:?}, although it made progress", self.total))
    }

    /// Returns when the pause must end, or `None` if that is beyond the range of the clock.
    fn end(&self) -> Option<Instant> {
        self.began.checked_add(self.total)
    }
}

impl Engine<'_> {
    /// Starts the watch of a pause that has just begun. From now on the pause has its limits.
    pub(super) fn begin_watch(&mut self) {
        if !self.vm.starts_running() {
            return;
        }
        let bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        let (limits, predicted) = (self.options.pause_limits, self.report.predicted_downtime);
        let watch = PauseWatch::new(limits, self.downtime_limit(), predicted, Instant::now(), bytes);
        let (silence, end) = (watch.silence, watch.end());
        self.guest.watch = Some(watch);
        self.limit_writes(silence, end);
    }

    /// Ends the watch, because the guest runs again or this side has given up its ownership.
    pub(super) fn end_watch(&mut self) {
        if self.guest.watch.take().is_some() {
            self.limit_writes(self.options.idle_timeout, None);
        }
    }

    /// Limits the time of the last frame to the destination, so that it does not delay the end of
    /// the migration even if the destination does not accept it.
    pub(super) fn hurry_last_word(&mut self) {
        self.limit_writes(LAST_WORD, Instant::now().checked_add(LAST_WORD));
    }

    /// Limits the time in which the destination accepts no byte, and sets the time at which all
    /// must be written. The second limit is needed for a destination that accepts a large frame a
    /// few bytes at a time: it is never silent.
    fn limit_writes(&mut self, timeout: Duration, deadline: Option<Instant>) {
        if let Some(control) = &mut self.peer.control {
            // This fails if the channel has ended. The next write returns that error.
            let _ = control.set_idle_timeout(timeout);
            control.set_deadline(deadline);
        }
    }

    /// Records a sign of life of the destination.
    pub(super) fn is_alive(&mut self) {
        self.peer.unanswered = None;
        if let Some(watch) = &mut self.guest.watch {
            watch.alive();
        }
    }

    /// Excludes these bytes from the signs of life: the kernel accepts them also for a peer that
    /// does not run.
    pub(super) fn discount(&mut self, bytes: u64) {
        if let Some(watch) = &mut self.guest.watch {
            watch.bytes = watch.bytes.saturating_add(bytes);
        }
    }

    /// Prolongs the pause for pages that are about to be sent in it, if its limit allows that.
    pub(super) fn prolong_pause(&mut self, pages: u64) {
        if let Some(watch) = self.guest.watch.as_mut().filter(|watch| watch.by_pages) {
            let bytes = pages.saturating_mul(PAGE_SIZE as u64);
            watch.total = watch.total.saturating_add(Duration::from_secs(bytes / LEAST_RATE));
            let end = watch.end();
            if let Some(control) = &mut self.peer.control {
                control.set_deadline(end);
            }
        }
    }

    /// Returns when the next check is due, if the guest is paused.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.guest.watch.as_ref().map(|watch| watch.looked + LOOK)
    }

    /// Returns an error if the guest has been paused for too long.
    pub(super) fn within_pause(&mut self) -> Result<(), MigrationError> {
        if self.machine.phase() == SourcePhase::Ready {
            // Nothing is due from the destination any more. What still takes time is done here.
            if let Some(watch) = &mut self.guest.watch {
                watch.alive();
            }
        }
        let bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        let why = self.guest.watch.as_mut().and_then(|watch| watch.look(Instant::now(), bytes));
        why.map_or(Ok(()), |why| Err(self.pause_exceeded(why)))
    }

    /// Returns the error for a write that has failed in the pause, which says whether the
    /// destination accepted nothing, or too little.
    pub(super) fn stuck_in_pause(&self, error: MigrationError) -> MigrationError {
        match (&self.guest.watch, &error) {
            (Some(watch), MigrationError::Link { cause, .. })
                if matches!(cause.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) =>
            {
                let exceeded = watch.exceeded(Instant::now());
                self.pause_exceeded(exceeded.unwrap_or_else(|| format!("took nothing for {:?}", watch.silence)))
            }
            _ => error,
        }
    }

    fn pause_exceeded(&self, why: String) -> MigrationError {
        let paused = self.guest.paused_at.map_or(Duration::ZERO, |at| at.elapsed());
        MigrationError::PausedTooLong { paused, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn watch(limits: PauseLimits, predicted: Option<Duration>) -> (PauseWatch, Instant) {
        let now = Instant::now();
        (PauseWatch::new(limits, SourceOptions::default().downtime_limit, predicted, now, 0), now)
    }

    #[test]
    fn limits_follow_the_downtime_limit_and_the_prediction_above_their_floors() {
        let limits = PauseLimits::default();
        assert_eq!(limits.silence(SECOND / 10), PauseLimits::LEAST_SILENCE);
        assert_eq!(limits.silence(SECOND), 4 * SECOND);
        assert_eq!(limits.total(SECOND / 10, None), PauseLimits::LEAST_TOTAL);
        assert_eq!(limits.total(SECOND, Some(3 * SECOND)), 30 * SECOND);
        assert_eq!(limits.total(2 * SECOND, Some(SECOND)), 20 * SECOND);
        let given = PauseLimits { silence: Some(SECOND), total: Some(2 * SECOND) };
        assert_eq!((given.silence(9 * SECOND), given.total(9 * SECOND, None)), (SECOND, 2 * SECOND));
        assert!(PauseLimits { silence: Some(Duration::ZERO), ..limits }.silence(SECOND) > Duration::ZERO);
    }

    #[test]
    fn silence_ends_the_pause_and_bytes_or_frames_do_not() {
        let (mut watch, mut now) = watch(PauseLimits { silence: Some(SECOND), total: None }, None);
        for i in 1..=9 {
            now += LOOK;
            assert_eq!(watch.look(now, 0), None, "{i}");
        }
        // The destination accepts a byte.
        now += LOOK;
        assert_eq!(watch.look(now, 1), None);
        for _ in 1..=9 {
            now += LOOK;
            assert_eq!(watch.look(now, 1), None);
        }
        // A frame comes.
        watch.alive();
        for _ in 1..=9 {
            now += LOOK;
            assert_eq!(watch.look(now, 1), None);
        }
        now += LOOK;
        assert!(watch.look(now, 1).is_some_and(|why| why.contains("silent")));
    }

    #[test]
    fn time_in_which_nothing_ran_here_is_not_the_destinations_silence() {
        let (mut watch, now) = watch(PauseLimits { silence: Some(SECOND), total: Some(60 * SECOND) }, None);
        assert_eq!(watch.look(now + 20 * SECOND, 0), None);
        assert_eq!(watch.look(now + 40 * SECOND, 0), None);
    }

    #[test]
    fn progress_prolongs_the_pause_to_its_total_limit_only() {
        let (mut watch, now) = watch(PauseLimits { silence: None, total: Some(SECOND) }, None);
        assert_eq!(watch.look(now + LOOK, 1), None);
        assert!(watch.look(now + SECOND, 2).is_some_and(|why| why.contains("progress")));
    }
}
