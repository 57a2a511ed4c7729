//! The pause, from its first step to its last.
//!
//! The guest waits in all of this. Each step is here, in this order, for a reason:
//!
//! 1. **Ask what the state will take**, while the guest still runs: a state that the destination
//!    cannot take is refused without a pause. And **send the pages that are in stores**, unless they
//!    stay there or are left behind: from here on nobody waits for a store (rule 20).
//! 2. **Raise the priority** of this thread, if RAM is shared: the guest waits for it now.
//! 3. **Pause** vCPUs and devices. From here on the pause is watched ([`PauseLimits`]): until step
//!    12 the VM is ours, and a silent destination must not keep it from running.
//! 4. **Save the state.** Before the harvest, because saving writes guest memory.
//! 5. **Harvest**, the last one. What the map has as unsent now is all that the destination lacks.
//!    Nothing is re-armed any more: a paused guest writes nothing.
//! 6. **Send or leave behind.** Without post-copy, all of it goes as the last round. With
//!    post-copy, only the pages that the vCPUs touch at once go. The lanes send while the control
//!    lane goes on.
//! 7. **List** what is left behind. The list takes effect at the destination when the round is
//!    there.
//! 8. **Send the state**, and with its last piece the *offer*: the destination is woken once.
//! 9. **Complete the forward checkpoint**, if there is one, while the destination loads. From *run*
//!    on this side may die.
//! 10. **Wait for *ready***, which also acknowledges the round.
//! 11. **Heed what has come in**: a cancel, or the end of the VM, is still in time.
//! 12. **Say *run*.** Before the frame goes out this side stops to own the VM: the destination may
//!     run it from then on, whether or not the answer arrives.
//! 13. **Wait for *running***, which ends the downtime.
//!
//! An error up to step 11 resumes the guest here; after it the engine asks until it knows.

use super::*;
use crate::state::Section;

/// Most pages that are sent in the pause of a post-copy for the guest's first steps: half a
/// millisecond at 10 Gbit/s.
const MAX_ENTRY_PAGES: u64 = 128;

/// What becomes of the pages that the destination lacks when the guest is paused.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They are sent in the pause.
    Sent,
    /// They follow when the guest runs at the destination.
    LeftBehind,
}

impl Engine<'_> {
    /// Steps 1 to 3.
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

    /// Sends the pages that are in stores and that the destination lacks, if none are to be left
    /// behind. If a store fails, the pause does not begin.
    fn send_stored(&mut self) -> Result<(), MigrationError> {
        let stored = self.rounds.due_from_stores();
        if stored.is_empty() || self.strategy.needs_post_copy || self.known().post_copy_wanted {
            return Ok(());
        }
        self.send_round(&stored, false).map(drop)
    }

    /// The guest goes on here after all.
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

    /// Steps 4 to 10: saves the state and offers the VM. `pages`, and what was dirtied up to the
    /// save, are sent along or left behind.
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
                // they are counted as what they are
                self.report.rounds.pop();
                self.measured.pages_due = self.measured.pages_due.saturating_sub(pages.len());
            }
        }
        self.report.downtime_bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed).saturating_sub(before);
        Ok(())
    }

    /// Steps 5 to 7. Returns the round that has begun, and its pages.
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
            // those that were not sent before are unsent, whatever a strategy passes
            pages.subtract(&stored.pages());
        }
        self.rounds.map().sending(&pages)?;
        let mut missing = self.harvest()?;
        if rest == Rest::Sent {
            self.check_no_store_is_read()?;
            let now = Arc::new(missing);
            let round = self.begin_round(&now)?.0;
            if stored {
                // what is in stores is missing, though nothing is left behind
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

    /// The pause waits for no store (rule 20).
    fn check_no_store_is_read(&self) -> Result<(), MigrationError> {
        match self.rounds.due_from_stores().len() {
            0 => Ok(()),
            pages => {
                let why = format!("{pages} pages are in page stores only, and were not sent before the pause");
                Err(MigrationError::Blocked(why))
            }
        }
    }

    /// Of the pages that would be left behind, those that the guest needs at once.
    fn entry_pages(&mut self, state: &VmState, rest: &PageSet) -> PageSet {
        let mut entry = PageSet::empty(rest.capacity());
        if self.post_copy.left.block.load(Ordering::Relaxed) > 1 {
            // whole huge pages would have to go
            return entry;
        }
        self.vm.entry_pages(state, &mut entry);
        entry.intersect_with(rest);
        entry.subtract(&self.rounds.due_from_stores());
        entry.keep_first(MAX_ENTRY_PAGES);
        entry
    }

    /// The dirty log of a VMM that tracks for itself: it goes along with a VM whose RAM stays where
    /// it is.
    fn log_to_carry(&mut self) -> Result<Option<Section>, MigrationError> {
        if !self.strategy.shares_ram || !self.vm.tracker().is_active() {
            return Ok(None);
        }
        Ok(Some(dirty_log::section(&self.rounds.written(self.vm.tracker())?)))
    }

    /// Step 8.
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

    /// Step 10. If there is a `round`, its lanes have to be done, too.
    fn await_ready(&mut self, round: bool) -> Result<(), MigrationError> {
        // it may have come while the forward checkpoint was completed
        let (mut ready, mut heard, mut sent) = (self.machine.phase() == SourcePhase::Ready, Instant::now(), 0);
        while round && self.lanes_done < self.report.streams || !ready {
            if let Some(Input::Control(epoch, frame)) = self.next_input(heard + self.options.setup_timeout)? {
                ready |= self.frame(epoch, frame)? == SourceEvent::Ready;
            }
            if !ready {
                self.within_pause()?;
            }
            // as long as pages move or frames come, somebody is there
            let bytes = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
            if bytes != sent {
                (sent, heard) = (bytes, Instant::now());
            }
            self.in_time(heard + self.options.setup_timeout, "the destination to get ready")?;
        }
        Ok(())
    }

    /// Steps 11 to 13.
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

    /// Step 13.
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
