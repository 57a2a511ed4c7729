//! How a migration ends at its source. The protocol machine's view of ownership decides that,
//! whatever the strategy returned.

use super::*;
use crate::{PageRange, fence::Fenced, spawner::GuestImpact, state::VmState, store::VersionStore, vm::VmError};

/// The longest time that the end of a failed attempt waits until the destination has received the
/// reason. The guest runs meanwhile.
const GOODBYE: Duration = Duration::from_millis(500);

/// How long an attempt to reconnect may wait for a connection, and for the answer to *run*. The
/// first attempts are short. A connection that proves its session is answered within a few round
/// trips, and an attempt that was under way when the network failed does not delay the next one
/// once the network is back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hurry {
    pub(super) connect: Duration,
    pub(super) answer: Duration,
}

/// The shortest attempt: as a time, and as a number of round trips, which cover a connection, a
/// handshake, and *run*.
const LEAST_ATTEMPT: Duration = Duration::from_millis(500);
const LEAST_ROUND_TRIPS: u32 = 8;
/// The longest wait for a connection, unless round trips are long. A new attempt sends its first
/// packet at once, whereas an older attempt repeats its first packet only after growing pauses.
const MAX_CONNECT: Duration = Duration::from_secs(2);

impl Hurry {
    /// Returns the limits of the attempt with this number, counted from 1.
    fn of_attempt(attempt: u32, round_trip: Duration, patience: Duration) -> Self {
        let least = LEAST_ATTEMPT.max(round_trip.saturating_mul(LEAST_ROUND_TRIPS)).min(patience);
        let time = least.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(patience);
        Self { connect: time.min(MAX_CONNECT.max(least)), answer: time }
    }
}

impl Engine<'_> {
    pub(super) fn conclude(mut self, result: Result<(), MigrationError>) -> Report {
        let mut error = result.err();
        let after = |engine: &Self, role, impact| {
            if engine.strategy.shares_ram {
                engine.options.spawner.end_switch_over();
                engine.options.spawner.assume(role, impact);
            }
        };
        if self.machine.phase() == SourcePhase::InDoubt {
            // The guest does not run here any more, and does not wait for this thread.
            after(&self, Role::Control, self.options.impact);
            let first = error.take().map_or_else(|| "no answer to run".to_owned(), |e| describe(&e));
            self.reconnect(first);
        }
        if self.machine.phase() == SourcePhase::Serving {
            // Whatever the strategy returned, the destination needs these pages.
            error = self.serve_all(&mut Linear::default()).err();
        }
        if let Some((outcome, reason)) = self.fail_safe.aftermath.take() {
            after(&self, Role::Background, GuestImpact::Balanced);
            self.report.outcome = outcome;
            self.report.reason = Some(reason);
            self.report.epoch = self.machine.epoch();
            if outcome == Outcome::Ended {
                self.let_go();
            } else {
                self.resume_guest();
                self.give_tracker_back();
            }
            self.finish_report();
        } else if self.machine.phase() == SourcePhase::Completed {
            // Best effort: without this frame the destination only keeps listening a little longer.
            let _ = self.send_control(&Control::Done);
            // The guest runs by now, on the same cores that free the resources below.
            after(&self, Role::Background, GuestImpact::Balanced);
            self.report.outcome = Outcome::Completed;
            self.finish_report();
            self.close();
            self.vm.released();
        } else {
            let error =
                error.unwrap_or_else(|| MigrationError::GaveUp("the strategy ended without a hand-over".into()));
            let cancelled = matches!(error, MigrationError::Cancelled(_));
            self.report.outcome = if cancelled { Outcome::Cancelled } else { Outcome::Failed };
            self.report.reason = Some(describe(&error));
            // Resume first: all the time until then is downtime.
            self.resume_guest();
            self.guest.watch = None;
            after(&self, Role::Control, self.options.impact);
            self.leave_destination(&error);
            self.finish_report();
            self.close();
            // Only after the lanes have ended: a lane in the middle of a round would re-arm pages
            // that the VMM has to find dirty.
            self.give_tracker_back();
        }
        let failed = self.machine.phase() == SourcePhase::Ended;
        self.close_places(failed);
        if self.machine.phase() == SourcePhase::Completed {
            self.forget_what_nobody_needs();
        }
        lock(&self.requests).end();
        self.report_phase();
        self.report
    }

    /// Sends the destination, if there is one, the reason why it does not get the VM.
    pub(super) fn leave_destination(&mut self, error: &MigrationError) {
        self.hurry_last_word();
        if self.peer.control.is_some() && !matches!(error, MigrationError::Link { .. }) {
            let last_word = match self.machine.abandon() {
                Some(abandon) if matches!(error, MigrationError::Cancelled(_)) => abandon,
                _ => Control::error(error.code(), describe(error)),
            };
            // Best effort: a destination that does not receive this frame notices the closed link.
            if self.send_control(&last_word).is_ok() {
                self.await_goodbye();
            }
        }
        self.machine.link_lost();
    }

    /// Releases the VM after it has ended at the destination. Nobody needs the pages and the state
    /// that are here.
    fn let_go(&mut self) {
        // Best effort: without this frame the destination only keeps listening a little longer.
        if self.send_control(&Control::Done).is_ok() {
            self.await_goodbye();
        }
        self.close();
        self.vm.released();
    }

    /// Waits until the destination has closed the control lane after our last frame. A destination
    /// that sees other lanes end before it has read that frame would not know why.
    fn await_goodbye(&mut self) {
        let deadline = Instant::now() + GOODBYE;
        // The wait is bounded, whatever else the destination sends.
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inputs.recv_timeout(left) {
                Ok(Input::ControlLost(_)) => return,
                Ok(input) => self.take_leftover(input),
                Err(_) => {}
            }
        }
    }

    /// Lets the guest run as it did before the migration: at full speed, unless it was paused then.
    pub(super) fn resume_guest(&mut self) {
        if self.guest.paused {
            let resumed = self.vm.resume();
            self.warn_if("resuming the guest", resumed);
            self.guest.paused = false;
        }
        if self.guest.throttle != 0 {
            let lifted = self.vm.throttle(0);
            self.warn_if("lifting the throttle", lifted);
            self.guest.throttle = 0;
        }
    }

    /// Leaves the tracker as it was before the migration. All lanes must have ended before.
    fn give_tracker_back(&mut self) {
        self.places.gate.close();
        let given_back = self.rounds.give_tracker_back(self.vm.tracker());
        self.warn_if("stopping the tracker", given_back);
    }

    fn warn_if<E: std::fmt::Display>(&self, what: &str, result: Result<(), E>) {
        if let Err(why) = result {
            self.options.observer.event(&Event::Warning(format!("{what}: {why}")));
        }
    }

    fn finish_report(&mut self) {
        self.count_fetched();
        let report = &mut self.report;
        report.total = self.start.elapsed();
        report.downtime_limit = lock(&self.requests).downtime_limit.unwrap_or(report.downtime_limit);
        report.wire_bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        report.checkpoints = self.fail_safe.kept.counts();
        report.pages.zero = self.measured.counters.zero.load(Ordering::Relaxed);
        report.pages.plain = self.measured.counters.plain.load(Ordering::Relaxed);
        report.page_bytes = self.measured.counters.page_bytes.load(Ordering::Relaxed);
        let counts = self.rounds.counts();
        (report.pages.distinct, report.pages.free) = (counts.distinct, counts.free);
        report.pages.demanded = self.post_copy.left.demanded.load(Ordering::Relaxed);
        report.faults.network = self.post_copy.left.requests.load(Ordering::Relaxed);
        if let (None, Some(paused)) = (report.downtime, self.guest.paused_at) {
            report.downtime = Some(paused.elapsed());
        }
        self.count_stored();
    }

    /// Closes all lanes, and waits for their threads.
    pub(super) fn close(&mut self) {
        self.peer.link_ended.store(true, Ordering::Relaxed);
        self.peer.lanes.clear();
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            // Lanes end when no sender of work is left.
            fetcher.detach();
        }
        self.peer.control = None;
        // A lane that is still sending may finish that: closing shuts the stream down after the
        // data that was written.
        for closer in self.peer.closers.drain(..) {
            closer.close();
        }
        for thread in self.peer.threads.drain(..) {
            thread.join();
        }
    }

    /// Reconnects after the link was lost, once *run* was sent: sends *run* again, on new control
    /// lanes, until the destination answers, and in post-copy has listed the pages that it lacks.
    pub(in crate::engine) fn reconnect(&mut self, mut why: String) {
        self.report.recoveries += 1;
        let (lost, mut refused) = (Instant::now(), None);
        let (mut since, mut told, mut back_off) = (lost, false, FIRST_BACK_OFF);
        // The last attempt before the present series of attempts, which grow longer within a
        // series.
        let mut begun = 0;
        for attempt in 1u32.. {
            self.options.observer.event(&Event::Reconnecting { attempt, why: why.clone() });
            if !told && since.elapsed() >= self.options.in_doubt_grace {
                told = true;
                self.finish_report();
                let reason = match self.machine.phase() {
                    SourcePhase::Serving => {
                        format!("the link is lost ({why}); pages that the destination lacks are kept here")
                    }
                    _ => format!("run was sent and not answered ({why}); this side never runs the VM again"),
                };
                let report = Report { outcome: Outcome::InDoubt, reason: Some(reason), ..self.report.clone() };
                self.options.observer.event(&Event::InDoubt(Box::new(report)));
            }
            self.close();
            self.peer.pings.clear();
            // An answer that the lost link still owed says nothing about the next link.
            self.peer.unanswered = None;
            // Inputs of the lost lanes, which their threads sent before they ended.
            while let Ok(input) = self.inputs.try_recv() {
                self.take_leftover(input);
            }
            self.peer.hurry = Some(Hurry::of_attempt(
                attempt - begun,
                self.measured.calibration.shortest_round_trip(),
                self.patience(),
            ));
            let repeated = self.repeat_run();
            self.peer.hurry = None;
            match repeated {
                Ok(()) => return self.report_phase(),
                Err(_) if self.machine.phase() == SourcePhase::Completed => return,
                Err(error) => why = describe(&error),
            }
            let identity = lock(&self.fail_safe.kept.identity).clone();
            if let Some(fail_safe) = self.options.fail_safe.clone()
                && let Some(store) = fail_safe.reverse.clone()
                && let Some(identity) = identity
                && (lost.elapsed() >= fail_safe.detect || fail_safe.fence.is_dead(&identity))
            {
                match Fenced::by(&*fail_safe.fence, &identity) {
                    Ok(dead) => return self.take_back(dead, &store, &why),
                    Err(error) if refused.as_ref() != Some(&error) => {
                        let what = format!("the VM is not restarted from its last checkpoint: {error}");
                        self.options.observer.event(&Event::Warning(what));
                        refused = Some(error);
                    }
                    Err(_) => {}
                }
            }
            let again = Instant::now() + back_off.min(self.patience());
            back_off = (back_off * 2).min(MAX_BACK_OFF);
            while let Ok(input) = self.inputs.recv_timeout(again.saturating_duration_since(Instant::now())) {
                match input {
                    Input::Recover(connector) => {
                        self.peer.elsewhere = Some(connector);
                        // The user who has asked for this attempt wants to be told its result.
                        (since, told, back_off, begun) = (Instant::now(), false, FIRST_BACK_OFF, attempt);
                        break;
                    }
                    other => self.take_leftover(other),
                }
            }
        }
    }

    /// Takes the VM back, as it was at its last checkpoint, because the destination is dead.
    fn take_back(&mut self, dead: Fenced, store: &Mutex<dyn VersionStore>, why: &str) {
        self.close();
        let restarted = match self.machine.restart(dead) {
            Ok(_) => self.restart(store),
            Err(violation) => Err(violation.into()),
        };
        let after = match restarted {
            Ok(0) => "as it was at the hand-over".to_owned(),
            Ok(number) => format!("as it was at checkpoint {number}"),
            Err(error) => {
                let reason = format!("the destination is dead ({why}), and its VM is lost: {}", Chain(&error));
                self.fail_safe.aftermath = Some((Outcome::Lost, reason));
                (self.guest.paused, self.guest.throttle) = (false, 0);
                self.rounds.forget_tracker();
                return self.vm.released();
            }
        };
        let reason = format!("the destination is dead ({why}); the VM runs on here, {after}");
        self.fail_safe.aftermath = Some((Outcome::Restarted, reason));
    }

    /// Restores the last checkpoint into RAM, which is as it was at the hand-over, and restarts the
    /// VM from there.
    fn restart(&mut self, store: &Mutex<dyn VersionStore>) -> Result<u32, MigrationError> {
        let mut store = lock(store);
        let (number, state) = store.latest().unwrap_or_else(|| (0, self.fail_safe.handed_over.clone()));
        let state = VmState::decode(&state)?;
        let ram = self.ram.clone();
        let restored = store.restore(&mut |page, data| {
            let memory = ram.slice(PageRange::new(page, 1)).map_err(io::Error::other)?;
            match data {
                Some(data) => memory.copy_from(data),
                None => memory.zero(),
            }
            Ok(())
        });
        let unreadable = |cause| VmError::because("the checkpoint", cause);
        restored.map_err(unreadable).map_err(MigrationError::vm("restoring RAM"))?;
        self.vm.restart(&state).map_err(MigrationError::vm("restarting the VM"))?;
        // The VM runs. Its RAM is what the checkpoint has made it.
        self.guest.paused = false;
        self.rounds.all_dirty();
        Ok(number)
    }

    /// Returns an error with the reason if streaming missing pages has ended because the VM came
    /// back or has ended.
    pub(in crate::engine) fn came_back(&self) -> Result<(), MigrationError> {
        match &self.fail_safe.aftermath {
            Some((_, reason)) => Err(MigrationError::GaveUp(reason.clone())),
            None => Ok(()),
        }
    }

    fn repeat_run(&mut self) -> Result<(), MigrationError> {
        self.attach(LaneKind::Reattach)?;
        self.places.defer_puts();
        let resumed = self.repeat_run_on_link();
        self.record_deferred_puts();
        resumed
    }

    /// Asks whether the VM runs, and in post-copy which pages are missing. The entries that have
    /// lost pages are sent first, so that the list includes the pages of these entries that this
    /// side holds.
    fn repeat_run_on_link(&mut self) -> Result<(), MigrationError> {
        let [reattach, run] = self.machine.reattach(self.id)?;
        self.send_control(&reattach)?;
        self.repeat_losses()?;
        self.send_control(&run)?;
        self.await_running()?;
        if self.machine.phase() == SourcePhase::Serving {
            self.resume_serving()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_to_reconnect_are_short_at_first_and_grow_to_what_is_allowed() {
        let patience = Duration::from_secs(10);
        let attempt = |number, round_trip| Hurry::of_attempt(number, Duration::from_millis(round_trip), patience);
        assert_eq!(attempt(1, 0).answer, LEAST_ATTEMPT);
        assert_eq!(attempt(1, 300).answer, Duration::from_millis(2400));
        assert_eq!(attempt(2, 0).answer, 2 * LEAST_ATTEMPT);
        assert_eq!((attempt(50, 0).answer, attempt(50, 0).connect), (patience, MAX_CONNECT));
        assert_eq!(attempt(u32::MAX, 400).connect, Duration::from_millis(3200));
        let least = Duration::from_millis(20);
        assert_eq!(Hurry::of_attempt(1, Duration::ZERO, least).answer, least);
    }
}
