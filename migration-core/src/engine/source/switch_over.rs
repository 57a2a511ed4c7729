//! The pause, from its first step to its last.
//!
//! The guest waits during these steps. Their order has the following reasons:
//!
//! 1. **Ask how large the state will be**, while the guest still runs: a state that the destination
//!    cannot take is refused without a pause. **Send the pages that are in stores**, too, unless
//!    they stay there or are sent after the hand-over: from here on nothing waits for a store (rule
//!    20).
//! 2. **Raise the priority** of this thread, if RAM is shared: the guest waits for it now.
//! 3. **Pause** vCPUs and devices. From here on the pause is watched ([`PauseLimits`]): until step
//!    12 the VM is ours, and a silent destination must not keep it from running.
//! 4. **Save the state.** This comes before the harvest, because saving writes guest memory.
//! 5. **Harvest** for the last time. The pages that the map has as unsent now are all that the
//!    destination lacks. Nothing is re-armed any more, because a paused guest writes nothing.
//! 6. **Send the pages, or leave them at the source.** Without post-copy, all of them are sent as
//!    the last round. With post-copy, only the pages that the vCPUs touch at once are sent. The
//!    lanes send while the control lane continues.
//! 7. **List** the missing pages, which are sent after the hand-over. The list takes effect at the
//!    destination when the round has arrived.
//! 8. **Send the state**, and with its last piece the *offer*, so that the destination is woken
//!    only once.
//! 9. **Complete the forward checkpoint**, if there is one, while the destination loads the state.
//!    From *run* on this side may die.
//! 10. **Wait for *ready***, which also acknowledges the round.
//! 11. **Handle the inputs that have come in**: a cancel, or the end of the VM, is still in time.
//! 12. **Send *run*.** This side gives up ownership of the VM before the frame is written: the
//!     destination may run the VM from then on, whether or not the answer arrives.
//! 13. **Wait for *running***, which ends the downtime.
//!
//! After an error up to step 11 the guest is resumed here. After an error in a later step the
//! engine reconnects and asks until it knows which side owns the VM.

use super::*;
use crate::state::Section;

/// The most pages that are sent in the pause of a post-copy for the first steps of the guest: these
/// take half a millisecond at 10 Gbit/s.
const MAX_ENTRY_PAGES: u64 = 128;

/// What happens to the pages that the destination lacks when the guest is paused.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They are sent in the pause.
    Sent,
    /// They are sent after the guest runs at the destination.
    LeftBehind,
}

impl Engine<'_> {
    /// Performs steps 1 to 3.
    pub(super) fn pause_guest(&mut self) -> Result<(), MigrationError> {
        if self.machine.phase() != SourcePhase::Copying {
            return Err(MigrationError::Blocked("the guest is not paused before a destination is connected".into()));
        }
        self.send_stored()?;
        self.check_state_limits()?;
        self.guest.paused_at = Some(Instant::now());
        self.report.downtime = None;
        self.report.forced_switch_over = self.switch_over_wanted();
        self.guest.paused = true;
        self.report_controllers();
        if self.strategy.shares_ram {
            self.options.spawner.begin_switch_over();
        }
        self.vm.pause().map_err(MigrationError::vm("pausing the guest"))?;
        self.begin_watch();
        Ok(())
    }

    /// Sends the pages that are in stores and that the destination lacks, unless pages are to be
    /// sent after the hand-over. If a store fails, the pause does not begin.
    fn send_stored(&mut self) -> Result<(), MigrationError> {
        let stored = self.rounds.due_from_stores();
        if stored.is_empty() || self.strategy.needs_post_copy || self.known().post_copy_wanted {
            return Ok(());
        }
        self.send_round(&stored, false).map(drop)
    }

    /// Resumes the guest here, after a pause that ends without a hand-over.
    pub(super) fn go_on(&mut self) -> Result<(), MigrationError> {
        self.vm.resume().map_err(MigrationError::vm("resuming the guest"))?;
        self.guest.paused = false;
        self.rounds.map().taken_back();
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            fetcher.take_back();
        }
        self.end_watch();
        self.report_controllers();
        self.report.downtime = self.guest.paused_at.map(|at| at.elapsed());
        Ok(())
    }

    /// Performs steps 4 to 10: saves the state and offers the VM. `pages`, and the pages that were
    /// dirtied up to the save, are sent in the pause, or after the hand-over, as `rest` says.
    pub(super) fn offer(&mut self, pages: PageSet, rest: Rest) -> Result<(), MigrationError> {
        let began = Instant::now();
        let before = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        let mut state = self.vm.save_state().map_err(MigrationError::vm("saving the state"))?;
        state.sections.extend(self.log_to_carry()?);
        check_state(&state)?;
        let round = if self.strategy.shares_ram { None } else { self.begin_last_round(pages, rest, &state)? };
        self.send_state(&state)?;
        if rest == Rest::LeftBehind && !self.strategy.shares_ram {
            self.put_rest_of_checkpoint()?;
        }
        self.await_ready(round.is_some())?;
        if let Some((generation, pages)) = round {
            self.end_round(generation, &pages, &[], began)?;
            if rest == Rest::LeftBehind {
                // They count as entry pages, not as a round.
                self.report.rounds.pop();
                self.measured.pages_due = self.measured.pages_due.saturating_sub(pages.len());
            }
        }
        self.report.downtime_bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed).saturating_sub(before);
        Ok(())
    }

    /// Performs steps 5 to 7. Returns the round that has begun, and its pages.
    fn begin_last_round(
        &mut self,
        mut pages: PageSet,
        rest: Rest,
        state: &VmState,
    ) -> Result<Option<(u32, Arc<PageSet>)>, MigrationError> {
        let stored = {
            let map = self.rounds.map();
            pages.subtract(map.with_copies());
            !map.with_copies().is_empty()
        };
        if let Some(stored) = self.rounds.stored() {
            // Pages that are in stores and were not sent before the pause are unsent, even if the
            // strategy passes them.
            pages.subtract(&stored.pages());
        }
        self.rounds.map().sending(&pages)?;
        let mut missing = self.harvest()?;
        if rest == Rest::Sent {
            self.check_no_store_is_read()?;
            let now = Arc::new(missing);
            let round = self.begin_round(&now)?.0;
            if stored {
                // The destination lacks the pages that are in stores, although no page is sent
                // after the hand-over.
                self.leave_behind(PageSet::empty(pages.capacity()))?;
            }
            return Ok(Some((round, now)));
        }
        let now = Arc::new(self.entry_pages(state, &missing));
        self.report.pages.entry = now.len();
        missing.subtract(&now);
        let round = if now.is_empty() { None } else { Some((self.begin_round(&now)?.0, now)) };
        self.leave_behind(missing)?;
        Ok(round)
    }

    /// Returns an error if the pause would have to wait for a store (rule 20).
    fn check_no_store_is_read(&self) -> Result<(), MigrationError> {
        match self.rounds.due_from_stores().len() {
            0 => Ok(()),
            pages => {
                let why = format!("{pages} pages are in page stores only, and were not sent before the pause");
                Err(MigrationError::Blocked(why))
            }
        }
    }

    /// Returns those of the `rest` of the pages that the guest needs at once.
    fn entry_pages(&mut self, state: &VmState, rest: &PageSet) -> PageSet {
        let mut entry = PageSet::empty(rest.capacity());
        if self.post_copy.left.block.load(Ordering::Relaxed) > 1 {
            // The pages would have to be sent as whole huge pages.
            return entry;
        }
        self.vm.entry_pages(state, &mut entry);
        entry.intersect_with(rest);
        entry.subtract(&self.rounds.due_from_stores());
        entry.keep_first(MAX_ENTRY_PAGES);
        entry
    }

    /// Returns the dirty log of a VMM that had started the tracker itself. The log moves with a VM
    /// whose RAM stays in place.
    fn log_to_carry(&mut self) -> Result<Option<Section>, MigrationError> {
        if !self.strategy.shares_ram || !self.vm.tracker().is_active() {
            return Ok(None);
        }
        Ok(Some(dirty_log::section(&self.rounds.written(self.vm.tracker())?)))
    }

    /// Performs step 8.
    fn send_state(&mut self, state: &VmState) -> Result<(), MigrationError> {
        let state = Bytes::from(state.encode());
        if self.options.fail_safe.is_some() {
            self.fail_safe.handed_over = state.clone();
        }
        self.report.state_bytes += state.len() as u64;
        let mut chunks: Vec<_> = (0..state.len())
            .step_by(STATE_CHUNK)
            .map(|at| state.slice(at..state.len().min(at + STATE_CHUNK)))
            .collect();
        let last = chunks.pop().map(Control::State);
        for chunk in chunks {
            self.send_control(&Control::State(chunk))?;
            self.within_pause()?;
        }
        let offer = self.machine.offer(state.len() as u64, self.vm.starts_running())?;
        self.send_all_control(&last.into_iter().chain([offer]).collect::<Vec<_>>())
    }

    /// Performs step 10. If there is a `round`, also waits until its lanes have sent it.
    fn await_ready(&mut self, round: bool) -> Result<(), MigrationError> {
        // *Ready* may have come while the forward checkpoint was completed.
        let (mut ready, mut heard, mut sent) = (self.machine.phase() == SourcePhase::Ready, Instant::now(), 0);
        while round && self.lanes_done < self.report.streams || !ready {
            if let Some(Input::Control(epoch, frame)) = self.next_input(heard + self.options.setup_timeout)? {
                ready |= self.frame(epoch, frame)? == SourceEvent::Ready;
            }
            if !ready {
                self.within_pause()?;
            }
            // As long as pages move or frames come, the destination is alive.
            let bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
            if bytes != sent {
                (sent, heard) = (bytes, Instant::now());
            }
            self.in_time(heard + self.options.setup_timeout, "the destination to get ready")?;
        }
        Ok(())
    }

    /// Performs steps 11 to 13.
    pub(super) fn run(&mut self) -> Result<(), MigrationError> {
        self.heed()?;
        let run = self.machine.run()?;
        self.end_watch();
        self.vm.owner_in_doubt();
        if self.options.fail_safe.is_some() {
            self.fail_safe.kept.handed_over.store(true, Ordering::Relaxed);
            self.options.observer.event(&Event::Checkpoint(self.fail_safe.kept.counts()));
        }
        self.send_control(&run)?;
        self.await_running()
    }

    /// Performs step 13.
    pub(super) fn await_running(&mut self) -> Result<(), MigrationError> {
        let running = |event| matches!(event, SourceEvent::Running).then_some(());
        let patience = self.peer.hurry.map_or(self.patience(), |hurry| hurry.answer);
        self.wait("the destination to run the VM", patience, running)?;
        if self.strategy.shares_ram {
            self.options.spawner.end_switch_over();
        }
        if let Some(paused) = self.guest.paused_at {
            self.report.downtime.get_or_insert(paused.elapsed());
        }
        Ok(())
    }
}
