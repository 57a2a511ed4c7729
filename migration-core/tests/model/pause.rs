//! The pause while pages are in a store that may fall silent for ever, and a snapshot of the same
//! VM (rules 4 and 20).
//!
//! Two pages: page 0 is what VMM and KVM touch while they save, page 1 is one under a vCPU's
//! instruction pointer.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

const PAGES: usize = 2;
const PINNED: usize = 0;
const ENTRY: usize = 1;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Pause {
    pub rules: Rules,
    /// Whether stored pages are read and sent (`fetch`).
    pub fetch: bool,
    /// Whether this is a snapshot: the file must be complete in itself.
    pub snapshot: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Running,
    /// The guest is paused; what is still to be read or saved before it can go on.
    Paused {
        saved: bool,
        entries: bool,
        fetched: bool,
    },
    Done,
    /// The pause did not begin, because a store does not answer.
    GivenUp,
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    phase: Phase,
    resident: [bool; PAGES],
    /// What was sent, or written into the snapshot: the content, or zeros.
    written: [Option<bool>; PAGES],
    silent: bool,
}

impl Pause {
    fn running(&self, state: &State, next: &mut Next<State>) {
        for page in 0..PAGES {
            let stays = page == PINNED && self.rules.has(Rule::PinnedPagesStay);
            if state.resident[page] && !stays {
                next.page("the page is evicted", page, |state| state.resident[page] = false);
            }
            if !state.resident[page] && !state.silent {
                next.page("the page is read back from the store", page, |state| state.resident[page] = true);
            }
            let from_store = !state.resident[page] && self.fetch && !state.silent;
            if state.written[page].is_none() && (state.resident[page] || from_store) {
                next.page("the page is sent or written", page, |state| state.written[page] = Some(true));
            }
        }
        let stored = |page: usize| !state.resident[page] && state.written[page].is_none();
        let complete = !(0..PAGES).any(stored) || !self.fetch || !self.rules.has(Rule::FetchedBeforeThePause);
        if complete {
            next.step("the guest is paused", |state| {
                let entries = self.snapshot;
                state.phase = Phase::Paused { saved: false, entries, fetched: !self.fetch };
            });
        } else if state.silent {
            next.step("the pause does not begin", |state| state.phase = Phase::GivenUp);
        }
    }

    /// Returns whether memory can be read at once: it is resident, or the store answers.
    fn readable(&self, state: &State, page: usize) -> bool {
        state.resident[page] || !state.silent
    }

    fn paused(&self, state: &State, saved: bool, entries: bool, fetched: bool, next: &mut Next<State>) {
        if !saved && self.readable(state, PINNED) {
            next.step("the state is saved", |state| state.phase = Phase::Paused { saved: true, entries, fetched });
        }
        let passes_over = self.rules.has(Rule::ReadersAskTheMap);
        if !entries && (passes_over || self.readable(state, ENTRY)) {
            next.step("the pages under the vCPUs are read, if they are there", |state| {
                state.phase = Phase::Paused { saved, entries: true, fetched };
            });
        }
        let all_readable = (0..PAGES).all(|page| state.written[page].is_some() || self.readable(state, page));
        if !fetched && all_readable {
            next.step("what is left is sent or written", |state| {
                state.phase = Phase::Paused { saved, entries, fetched: true };
                for written in &mut state.written {
                    *written = Some(true);
                }
            });
        }
        if saved && entries && fetched {
            next.step("the guest goes on", |state| {
                state.phase = Phase::Done;
                for page in 0..PAGES {
                    let forgotten = self.snapshot && !self.rules.has(Rule::HolesAskTheMap);
                    if forgotten && !state.resident[page] {
                        state.written[page] = Some(false);
                    }
                }
            });
        }
    }
}

impl Model for Pause {
    type State = State;

    fn initial(&self) -> State {
        let phase = Phase::Running;
        State { phase, resident: [true; PAGES], written: [None; PAGES], silent: false }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        match state.phase {
            Phase::Running => self.running(state, next),
            Phase::Paused { saved, entries, fetched } => self.paused(state, saved, entries, fetched, next),
            Phase::Done | Phase::GivenUp => return,
        }
        if !state.silent {
            next.step("the store falls silent for ever", |state| state.silent = true);
        }
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        let zeros = state.phase == Phase::Done && state.written.contains(&Some(false));
        zeros.then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        matches!(state.phase, Phase::Done | Phase::GivenUp)
    }
}
