//! How long the guest may stay paused before the hand-over: until *run* is sent the VM is ours, and
//! a destination that does not answer must not keep it from running.

use super::*;
use crate::PAGE_SIZE;

/// How long the guest may stay paused for a hand-over that does not come about. When a limit is
/// exceeded before *run* is sent, the guest runs on at the source, everything is rolled back, and
/// the migration has failed.
///
/// A guest that was paused by its user before the migration is not subject to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseLimits {
    /// The longest time in the pause without a sign of life: no frame has come from the
    /// destination, and it has taken no byte. Time in which this process itself did not run does
    /// not count. `None` for four times the downtime limit, but at least
    /// [`LEAST_SILENCE`](Self::LEAST_SILENCE).
    pub silence: Option<Duration>,
    /// The longest pause, although the destination makes progress. `None` for ten times the
    /// downtime limit, or ten times the predicted downtime if that is longer, but at least
    /// [`LEAST_TOTAL`](Self::LEAST_TOTAL). Where no downtime was predicted (stop-and-copy), the
    /// time that the pages need at 1 MiB/s is added.
    pub total: Option<Duration>,
}

impl PauseLimits {
    /// The shortest time without a sign of life that counts as silence if none is given: less would
    /// punish a destination on a busy host.
    pub const LEAST_SILENCE: Duration = Duration::from_secs(2);
    /// The shortest limit of the whole pause if none is given.
    pub const LEAST_TOTAL: Duration = Duration::from_secs(10);
    /// How many downtime limits of silence are allowed if nothing is given.
    const SILENCE_FACTOR: u32 = 4;
    /// How many downtime limits the whole pause may take if nothing is given.
    const TOTAL_FACTOR: u32 = 10;

    fn silence(&self, downtime_limit: Duration) -> Duration {
        self.silence
            .unwrap_or_else(|| downtime_limit.saturating_mul(Self::SILENCE_FACTOR).max(Self::LEAST_SILENCE))
            // a time-out of zero would mean none to a socket
            .max(Duration::from_millis(1))
    }

    fn total(&self, downtime_limit: Duration, predicted: Option<Duration>) -> Duration {
        let expected = predicted.unwrap_or_default().max(downtime_limit);
        self.total.unwrap_or_else(|| expected.saturating_mul(Self::TOTAL_FACTOR).max(Self::LEAST_TOTAL))
    }
}

/// How often the engine looks for a sign of life.
const LOOK: Duration = Duration::from_millis(100);
/// The most time that counts as silence from one look to the next: this process did not run for the
/// rest of it.
const LONGEST_LOOK: Duration = Duration::from_millis(250);
/// Pages move faster than this, in bytes a second, where a pause whose length was not predicted
/// makes progress.
const LEAST_RATE: u64 = 1 << 20;
/// How long the last word to a destination may wait until the destination takes it.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Watches a pause.
pub(super) struct PauseWatch {
    silence: Duration,
    total: Duration,
    /// Whether pages that move in the pause prolong it.
    by_pages: bool,
    began: Instant,
    looked: Instant,
    /// Time without a sign of life.
    silent: Duration,
    /// What was sent and received when the last sign of life was seen.
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

    /// Looks at the number of bytes that have moved. Returns why the pause must end, if it must.
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

    /// Why the pause must end at `now`, although the destination makes progress; `None` before
    /// that.
    fn exceeded(&self, now: Instant) -> Option<String> {
        (now.saturating_duration_since(self.began) >= self.total)
            .then(|| format!("was not ready within {:?}, although it made progress", self.total))
    }

    /// When the pause must end; `None` where that is beyond what a clock shows.
    fn end(&self) -> Option<Instant> {
        self.began.checked_add(self.total)
    }
}

impl Engine<'_> {
    /// The guest has just been paused: from now on the pause has its limits.
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

    /// The guest runs again, or is not ours any more.
    pub(super) fn end_watch(&mut self) {
        if self.guest.watch.take().is_some() {
            self.limit_writes(self.options.idle_timeout, None);
        }
    }

    /// Whether the destination takes it or not, the last word does not hold up the end of the
    /// migration.
    pub(super) fn hurry_last_word(&mut self) {
        self.limit_writes(LAST_WORD, Instant::now().checked_add(LAST_WORD));
    }

    /// Limits the time without a byte taken by the destination, and when all must be written: a
    /// destination that takes a large frame drop by drop is never without a byte.
    fn limit_writes(&mut self, timeout: Duration, deadline: Option<Instant>) {
        if let Some(control) = &mut self.peer.control {
            // it fails where the channel has ended: the next write says so
            let _ = control.set_idle_timeout(timeout);
            control.set_deadline(deadline);
        }
    }

    /// The destination has shown that it is there.
    pub(super) fn is_alive(&mut self) {
        self.peer.unanswered = None;
        if let Some(watch) = &mut self.guest.watch {
            watch.alive();
        }
    }

    /// These bytes are no sign of life: the kernel takes them also for a peer that does not run.
    pub(super) fn discount(&mut self, bytes: u64) {
        if let Some(watch) = &mut self.guest.watch {
            watch.bytes = watch.bytes.saturating_add(bytes);
        }
    }

    /// Pages that are about to move in the pause.
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

    /// When to look next, if the guest is paused.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.guest.watch.as_ref().map(|watch| watch.looked + LOOK)
    }

    /// An error when the guest has been paused for too long.
    pub(super) fn within_pause(&mut self) -> Result<(), MigrationError> {
        if self.machine.phase() == SourcePhase::Ready {
            // nothing is due from the destination any more: what still takes time is done here
            if let Some(watch) = &mut self.guest.watch {
                watch.alive();
            }
        }
        let bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        let why = self.guest.watch.as_mut().and_then(|watch| watch.look(Instant::now(), bytes));
        why.map_or(Ok(()), |why| Err(self.pause_exceeded(why)))
    }

    /// A write in the pause has failed: whether because the destination takes nothing, or too
    /// little.
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
        // a byte that was taken
        now += LOOK;
        assert_eq!(watch.look(now, 1), None);
        for _ in 1..=9 {
            now += LOOK;
            assert_eq!(watch.look(now, 1), None);
        }
        // a frame that came
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
