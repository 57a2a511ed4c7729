//! The end of the pause: the state is saved, and the VM is offered to the destination with the rest of its pages.

use super::*;
use crate::{PageRange, state::Section};

/// Most pages that are sent in the pause of a post-copy for the guest's first steps: half a millisecond at 10 Gbit/s.
const MOST_ENTRY_PAGES: usize = 128;

impl Engine<'_> {
    /// What is to move while the guest is paused: `pages`, and what was dirtied up to now.
    fn rest(&mut self, pages: &PageSet) -> Result<PageSet, MigrationError> {
        self.rounds.map().sending(pages)?;
        self.harvest()
    }

    /// Of the pages that would be left behind, those that the guest needs at once.
    fn entry_pages(&mut self, state: &VmState, rest: &PageSet) -> PageSet {
        let mut entry = PageSet::empty(rest.capacity());
        if self.left.block.load(Ordering::Relaxed) > 1 {
            // whole huge pages would have to go
            return entry;
        }
        self.vm.entry_pages(state, &mut entry);
        entry.intersect_with(rest);
        let beyond = entry.iter().nth(MOST_ENTRY_PAGES);
        if let Some(first) = beyond {
            entry.remove_range(PageRange::new(first, entry.capacity() - first));
        }
        entry
    }

    /// The dirty log of a VMM that tracks for itself: it goes along with a VM whose RAM stays where it is.
    fn log_to_carry(&mut self) -> Result<Option<Section>, MigrationError> {
        if !self.shared || !self.vm.tracker().is_active() {
            return Ok(None);
        }
        Ok(Some(dirty_log::section(&self.rounds.written(self.vm.tracker())?)))
    }

    /// Saves the state and offers the VM, with `pages` and what was dirtied up to the save sent along, or left behind.
    pub(super) fn offer(&mut self, pages: PageSet, leave: bool) -> Result<(), MigrationError> {
        let began = Instant::now();
        let before = self.counters.wire_bytes.load(Ordering::Relaxed);
        let mut state = self.vm.save_state().map_err(MigrationError::vm("saving the state"))?;
        state.sections.extend(self.log_to_carry()?);
        // after saving: that dirtied pages too. RAM that is shared is there already, whatever was dirtied
        let mut rest = if self.shared { PageSet::empty(self.pages()) } else { self.rest(&pages)? };
        let mut now = PageSet::empty(self.pages());
        if leave && !self.shared {
            now = self.entry_pages(&state, &rest);
            self.report.pages.entry = now.len();
            rest.subtract(&now);
        } else {
            std::mem::swap(&mut now, &mut rest);
        }
        check_state(&state)?;
        let state = Bytes::from(state.encode());
        if self.options.fail_safe.is_some() {
            self.handed_over = state.clone();
        }
        self.report.state_bytes += state.len() as u64;
        let now = Arc::new(now);
        let round = if self.shared || leave && now.is_empty() { None } else { Some(self.begin_round(&now)?.0) };
        if leave && !self.shared {
            self.leave_behind(rest)?;
        }
        let mut chunks: Vec<_> = (0..state.len())
            .step_by(STATE_CHUNK)
            .map(|at| state.slice(at..state.len().min(at + STATE_CHUNK)))
            .collect();
        let last = chunks.pop().map(Control::State);
        for chunk in chunks {
            self.say(&Control::State(chunk))?;
            self.within_pause()?;
        }
        let offer = self.machine.offer(state.len() as u64, self.vm.starts_running())?;
        self.say_all(&last.into_iter().chain([offer]).collect::<Vec<_>>())?;
        if leave && !self.shared {
            self.put_rest_ahead()?;
        }
        // it may have come while the forward checkpoint was completed
        let (mut ready, mut heard, mut sent) = (self.machine.phase() == SourcePhase::Ready, Instant::now(), 0);
        while round.is_some() && self.lanes_done < self.report.streams || !ready {
            if let Some(Input::Control(epoch, frame)) = self.next_input(heard + self.options.setup_timeout)? {
                ready |= self.frame(epoch, frame)? == SourceEvent::Ready;
            }
            if !ready {
                self.within_pause()?;
            }
            // as long as pages move or frames come, somebody is there
            let bytes = self.counters.wire_bytes.load(Ordering::Relaxed);
            if bytes != sent {
                (sent, heard) = (bytes, Instant::now());
            }
            self.in_time(heard + self.options.setup_timeout, "the destination to get ready")?;
        }
        if let Some(generation) = round {
            self.end_round(generation, &now, &[], began)?;
            if leave {
                // they are counted as what they are
                self.report.rounds.pop();
                self.pages_due = self.pages_due.saturating_sub(now.len());
            }
        }
        self.report.downtime_bytes = self.counters.wire_bytes.load(Ordering::Relaxed).saturating_sub(before);
        Ok(())
    }
}
