//! Sending and receiving control frames at the source, and how long the source waits for them.

use super::*;

impl Engine<'_> {
    pub(super) fn send_control(&mut self, frame: &Control) -> Result<(), MigrationError> {
        self.send_all_control(std::slice::from_ref(frame))
    }

    /// Sends several frames in one write, so that the destination is woken only once.
    pub(super) fn send_all_control(&mut self, frames: &[Control]) -> Result<(), MigrationError> {
        let lost = || MigrationError::link("the destination")(io::ErrorKind::NotConnected.into());
        let result = self.peer.control.as_mut().ok_or_else(lost)?.send_all(self.machine.epoch(), frames);
        match result {
            Err(error @ MigrationError::Link { .. }) => {
                let error = self.last_words(error);
                Err(self.stuck_in_pause(error))
            }
            other => other,
        }
    }

    /// Returns the error to report after a failed write. If the peer has sent the reason before it
    /// closed the link, that reason is the better error.
    pub(super) fn last_words(&mut self, error: MigrationError) -> MigrationError {
        let deadline = Instant::now() + Duration::from_millis(200);
        while let Ok(input) = self.inputs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            match input {
                Input::Control(epoch, frame @ Control::Error { code: ErrorCode::VmEnded, .. }) => {
                    return self.frame(epoch, frame).err().unwrap_or(error);
                }
                Input::Control(_, Control::Error { code, text }) => return MigrationError::Peer { code, text },
                Input::VmEnded(why) if self.machine.owns() => {
                    return self.end_by(Over::Ended(why)).err().unwrap_or(error);
                }
                // The reader has seen that the peer is not a migration destination, which says more
                // than the failed write.
                Input::ControlLost(lost) if self.machine.phase() == SourcePhase::Greeting => return lost,
                Input::ControlLost(_) => break,
                other => self.take_leftover(other),
            }
        }
        error
    }

    /// Waits for the frame that `pick` accepts, for at most `timeout`. Returns the value that
    /// `pick` has returned for the frame. `what` names the frame in the error.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        mut pick: impl FnMut(SourceEvent) -> Option<T>,
    ) -> Result<T, MigrationError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.next_input(deadline)? {
                Some(Input::Control(epoch, frame)) => {
                    let event = self.frame(epoch, frame)?;
                    if let Some(found) = pick(event) {
                        return Ok(found);
                    }
                }
                Some(_) => {}
                None => {}
            }
            self.in_time(deadline, what)?;
        }
    }

    /// Returns the longest time without data from the destination.
    pub(super) fn patience(&self) -> Duration {
        let detect = self.options.fail_safe.as_ref().filter(|_| !self.machine.owns()).map(|f| f.detect);
        detect.map_or(self.options.idle_timeout, |detect| detect.max(LEAST_SILENCE).min(self.options.idle_timeout))
    }

    /// Returns an error if `deadline` has passed.
    pub(super) fn in_time(&self, deadline: Instant, what: &str) -> Result<(), MigrationError> {
        if Instant::now() < deadline {
            return Ok(());
        }
        let cause = io::Error::new(io::ErrorKind::TimedOut, format!("waited in vain for {what}"));
        Err(MigrationError::link(&self.connector().address())(cause))
    }

    /// Returns the next input for the caller, or `None` if `deadline` or the next tick comes first.
    /// This method handles pings and progress reports, and returns an error for a cancel, a lost
    /// link, or a lane that has failed.
    pub(super) fn next_input(&mut self, deadline: Instant) -> Result<Option<Input>, MigrationError> {
        self.check_over()?;
        let connected = self.is_connected();
        let tick = if connected { self.measured.last_progress + PROGRESS_INTERVAL } else { self.tend_places() };
        let tick = self.next_look().map_or(tick, |look| tick.min(look)).min(deadline);
        let input = self.inputs.recv_timeout(tick.saturating_duration_since(Instant::now()));
        if connected && self.measured.last_progress.elapsed() >= PROGRESS_INTERVAL {
            self.measured.last_progress = Instant::now();
            self.count_fetched();
            self.report_progress();
            if self.fail_safe.kept.heard.swap(false, Ordering::Relaxed) {
                self.is_alive();
            }
            let (phase, patience) = (self.machine.phase(), self.patience());
            if matches!(phase, SourcePhase::Copying | SourcePhase::Offered | SourcePhase::Serving)
                && self.peer.last_ping.elapsed() >= PING_INTERVAL.min(patience / 4)
            {
                let before = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
                self.send_control(&Control::Ping)?;
                self.discount(self.measured.counters.wire_bytes.load(Ordering::Relaxed).saturating_sub(before));
                // Recorded only now, because the ping may have waited for its turn on the link.
                self.peer.last_ping = Instant::now();
                if self.peer.pings.len() < MAX_PINGS {
                    self.peer.pings.push_back(self.peer.last_ping);
                }
                self.peer.unanswered.get_or_insert(self.peer.last_ping);
            }
            let silent = self.peer.unanswered.is_some_and(|since| since.elapsed() >= patience);
            if matches!(phase, SourcePhase::Copying | SourcePhase::Serving) && silent {
                let why = format!("the destination has been silent for {patience:?}");
                let cause = io::Error::new(io::ErrorKind::TimedOut, why);
                return Err(MigrationError::link(&self.connector().address())(cause));
            }
        }
        match input {
            Ok(Input::Cancel(why)) => self.end_by(Over::Cancelled(why)).map(|()| None),
            // Until the hand-over, the VM may still end here.
            Ok(Input::VmEnded(why)) => self.end_by(Over::Ended(why)).map(|()| None),
            Ok(Input::StageOff) => self.end_by(Over::Off).map(|()| None),
            Ok(Input::Evict(command)) => {
                self.commanded(command);
                Ok(None)
            }
            Ok(Input::Recover(connector)) => {
                self.peer.elsewhere = Some(connector);
                Ok(None)
            }
            Ok(Input::Lane(Ok(done))) => {
                self.lanes_done = self.lanes_done.saturating_add(1);
                self.measured.reading = self.measured.reading.saturating_add(done.reading);
                Ok(Some(Input::Lane(Ok(done))))
            }
            Ok(Input::Place(done)) => {
                self.place_done(done);
                Ok(None)
            }
            Ok(Input::PostCopy) => {
                self.post_copy.wanted = true;
                Ok(Some(Input::PostCopy))
            }
            Ok(Input::Demanded(page)) => {
                self.is_alive();
                Ok(Some(Input::Demanded(page)))
            }
            Ok(Input::ControlLost(error)) => Err(error),
            Ok(Input::Lane(Err(error))) => Err(match error {
                MigrationError::Link { .. } => self.last_words(error),
                other => other,
            }),
            Ok(Input::Control(epoch, frame)) => {
                // Any frame is a sign of life, also one that arrives at the last moment.
                self.is_alive();
                Ok(Some(Input::Control(epoch, frame)))
            }
            Ok(other) => Ok(Some(other)),
            // The engine itself holds a sender, so the channel cannot be disconnected.
            Err(_) => self.within_pause().map(|()| None),
        }
    }

    pub(super) fn frame(&mut self, epoch: u32, frame: Control) -> Result<SourceEvent, MigrationError> {
        self.is_alive();
        let frees = matches!(frame, Control::Complete(_) | Control::Released(_));
        if frees && self.machine.phase() == SourcePhase::Serving {
            // After this frame the source would free these pages.
            let fetcher = self.post_copy.left.fetcher.get();
            let unsent = self.rounds.map().never_claimed() + fetcher.map_or(0, |fetcher| fetcher.never_read());
            if unsent > 0 {
                let why = format!("{unsent} pages were never sent");
                return Err(DecodeError::invalid(frame.name(), why).into());
            }
        }
        match self.machine.handle(epoch, frame)? {
            SourceEvent::Refused(code, text) => Err(MigrationError::Peer { code, text }),
            SourceEvent::VmEnded(text) => {
                let left = self.post_copy.lacking;
                let reason = format!("at the destination: {text}; {left} pages that were missing there are not needed");
                self.fail_safe.aftermath = Some((Outcome::Ended, reason));
                Err(MigrationError::VmEnded(text))
            }
            SourceEvent::Pong => {
                // One answer may have been late, for a reason that has nothing to do with the link.
                // While the destination loads the state it reports by itself that it is alive, so
                // the answers of that phase measure no round trip.
                if let Some(asked) = self.peer.pings.pop_front()
                    && self.machine.phase() != SourcePhase::Offered
                {
                    self.measured.calibration.round_trip(asked.elapsed());
                }
                Ok(SourceEvent::Pong)
            }
            SourceEvent::TableReceived(number) => {
                self.table_received(number)?;
                Ok(SourceEvent::TableReceived(number))
            }
            SourceEvent::EntryLost(entry) => {
                self.lose_entry(entry);
                Ok(SourceEvent::EntryLost(entry))
            }
            event => Ok(event),
        }
    }

    pub(super) fn report_phase(&self) {
        self.options.observer.event(&Event::Source(self.machine.phase()));
    }

    /// Handles the inputs that have come in and that no call has waited for. Returns an error for a
    /// cancel or the end of the VM.
    pub(super) fn heed(&mut self) -> Result<(), MigrationError> {
        let now = Instant::now();
        for _ in 0..MAX_HEEDED {
            match self.next_input(now)? {
                Some(Input::Control(epoch, frame)) => drop(self.frame(epoch, frame)?),
                Some(_) => {}
                None => break,
            }
        }
        Ok(())
    }
}
