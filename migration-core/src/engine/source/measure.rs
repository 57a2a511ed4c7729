//! What the source measures of the link and of both VMMs, and what it reports of these
//! measurements.

use super::*;
use crate::engine::{
    estimate::Sample,
    limits::{check_estimate, check_piece},
    progress::Reading,
};

impl Engine<'_> {
    /// Asks the VMM how much state the pause will have to save.
    pub(super) fn estimate_state(&mut self) {
        self.measured.calibration.saves(self.vm.estimate_state());
    }

    /// Asks the VMM for its estimate once more, while the guest still runs. Returns an error if the
    /// state is larger than the destination could take.
    pub(super) fn check_state_limits(&mut self) -> Result<(), MigrationError> {
        self.estimate_state();
        let unknown = StateEstimate::default();
        check_estimate(self.measured.calibration.state().unwrap_or(&unknown), self.measured.calibration.pending_bytes())
    }

    /// Sends pieces of device state: at least as many bytes as one budget, and all that was pending
    /// before, if the devices finish that. Data that a device adds meanwhile waits for the next
    /// round.
    ///
    /// Control frames never wait for a bandwidth limit, so the limit is enforced here: each budget
    /// waits until the bytes sent before it are within the limit.
    pub(super) fn send_pieces(&mut self) -> Result<(), MigrationError> {
        let (mut before, mut sent) = (u64::MAX, 0);
        let mut most = None;
        loop {
            let (pieces, pending) =
                self.vm.iterate_state(PIECE_BUDGET).map_err(MigrationError::vm("saving a piece of device state"))?;
            if !pieces.is_empty() {
                self.await_bandwidth()?;
            }
            for piece in pieces {
                check_piece(&piece)?;
                sent += piece.data.len() as u64;
                self.report.state_bytes += piece.data.len() as u64;
                self.send_control(&Control::Piece(piece))?;
            }
            self.measured.calibration.pending(pending);
            let ends = pending < PIECE_BUDGET as u64 || pending >= before || sent > *most.get_or_insert(pending);
            // The remaining data is part of the state that is saved in the pause.
            if ends || self.round_is_over() {
                return Ok(());
            }
            before = pending;
            // Handles inputs, so that a cancel does not wait.
            self.heed()?;
        }
    }

    /// Waits until the bytes that were sent are within the bandwidth limit. Pings, a cancel and a
    /// changed limit are handled meanwhile. A round that is to end early ends the wait.
    fn await_bandwidth(&mut self) -> Result<(), MigrationError> {
        let mut until = None;
        while !self.round_is_over() {
            let now = Instant::now();
            let ahead = self.peer.control.as_ref().map_or(Duration::ZERO, ControlWriter::ahead_of_limit);
            let within = now.checked_add(ahead).unwrap_or(now + PROGRESS_INTERVAL);
            // Other channels under the same limit may continue to send. The wait does not extend to
            // what they send later.
            let turn = until.map_or(within, |until: Instant| until.min(within));
            if turn <= now {
                break;
            }
            until = Some(turn);
            // Returns at the next tick at the latest.
            if let Some(Input::Control(epoch, frame)) = self.next_input(turn)? {
                self.frame(epoch, frame)?;
            }
        }
        Ok(())
    }

    /// Returns what is known of the link and the session.
    pub(super) fn known(&self) -> Link {
        let can_post_copy = self.report.demand_lanes > 0;
        let post_copy_on_timeout = self.options.on_timeout == OnTimeout::PostCopy;
        self.measured.calibration.describe(Link {
            downtime_limit: self.downtime_limit(),
            elapsed: self.start.elapsed(),
            timed_out: self.timed_out(),
            stop_on_timeout: self.options.on_timeout == OnTimeout::Stop,
            post_copy_on_timeout,
            impact: self.options.impact,
            can_post_copy,
            post_copy_wanted: can_post_copy && (self.post_copy.wanted || self.timed_out() && post_copy_on_timeout),
            ..Link::default()
        })
    }

    /// Updates the measurements with a round that has ended.
    pub(super) fn learn(&mut self, pages: u64, wire_bytes: u64, time: Duration) {
        let lanes = u32::from(self.report.streams.max(1));
        // Lanes read at the same time, so the total is divided by their number.
        let reading = std::mem::take(&mut self.measured.reading) / lanes;
        self.measured.calibration.round(Sample { pages, wire_bytes, time, reading });
        self.estimate_state();
    }

    pub(super) fn report_progress(&mut self) {
        let reading = self.reading();
        let progress = self.measured.meter.read(&reading);
        self.options.observer.event(&Event::Progress(progress));
    }

    /// Begins the measurement of rates.
    pub(super) fn begin_progress(&mut self) {
        let reading = self.reading();
        self.measured.meter.begin(&reading);
    }

    fn reading(&self) -> Reading {
        let rounds = &self.report.rounds;
        let handed_over = !self.machine.owns();
        // After the hand-over, lanes count the pages that they push here, too.
        let under_way = if handed_over { 0 } else { rounds.last().map_or(0, |round| round.pages) };
        let served = self.report.pages.pushed.saturating_add(self.post_copy.left.demanded.load(Ordering::Relaxed));
        Reading {
            at: self.start.elapsed(),
            phase: self.machine.phase(),
            wire_bytes: self.measured.counters.wire_bytes.load(Ordering::Relaxed),
            round: u32::try_from(rounds.len()).unwrap_or(u32::MAX),
            round_pages: under_way,
            round_sent: self.measured.counters.round_sent.load(Ordering::Relaxed).min(under_way),
            earlier_pages: self.measured.pages_due.saturating_sub(under_way),
            missing: if handed_over { self.post_copy.missing_pages } else { 0 },
            served: if handed_over { served } else { 0 },
            total: self.report.pages.total,
            dirty_pages_per_second: self.report.dirty_pages_per_second,
            throttle_percent: self.guest.throttle,
            link: self.known(),
        }
    }
}
