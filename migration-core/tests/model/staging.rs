//! A VM is staged at a destination for a long time: the lease, the incarnation, and the return
//! after a loss.
//!
//! The source keeps a map of one page: sent or not. The destination keeps the RAM while the lease
//! runs.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Staging {
    pub rules: Rules,
    pub writes: u8,
    pub losses: u8,
    /// Whether a snapshot is taken meanwhile.
    pub snapshot: bool,
}

/// A page in a round: number of the round and content.
type InRound = (u8, u8);

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    newest: u8,
    /// The source: written since the last harvest, and the round in which the page was sent last.
    dirty: bool,
    sent_in: Option<u8>,
    round: u8,
    /// The incarnation under which the source knows its stage.
    incarnation: u8,
    link: bool,
    /// The page on the lane, and whether the mark of its round follows it.
    lane: Option<InRound>,
    mark: Option<u8>,
    /// The destination.
    staged: Option<u8>,
    complete: u8,
    present: u8,
    snapshot: bool,
    evicted: bool,
    losses: u8,
}

impl Staging {
    fn source(&self, state: &State, next: &mut Next<State>) {
        if state.newest <= self.writes {
            next.step("the guest writes", |state| {
                state.newest += 1;
                state.dirty = true;
            });
        }
        if self.snapshot && !state.snapshot {
            next.step("a snapshot collects from the tracker", |state| {
                state.snapshot = true;
                if self.rules.has(Rule::OneConsumer) {
                    // staging is suspended; afterwards what the snapshot has collected is given
                    // back to it
                } else {
                    state.dirty = false;
                }
            });
        }
        let idle = state.link && state.lane.is_none() && state.mark.is_none();
        let unsent = state.dirty || state.sent_in.is_none();
        if idle && unsent {
            next.step("a round sends the page", |state| {
                state.round += 1;
                state.dirty = false;
                state.sent_in = Some(state.round);
                state.lane = Some((state.round, state.newest));
                state.mark = Some(state.round);
            });
        }
        if idle && !unsent {
            next.step("the VM is evicted to its stage, and runs there", |state| state.evicted = true);
        }
    }

    fn destination(&self, state: &State, next: &mut Next<State>) {
        if let Some((_, content)) = state.lane {
            next.step("the page arrives at the stage", |state| {
                state.lane = None;
                state.staged = Some(content);
            });
        } else if let Some(round) = state.mark {
            next.step("the round is complete at the stage", |state| {
                state.mark = None;
                state.complete = round;
            });
        }
        if !state.link {
            next.step("the lease ends, and the stage is discarded", |state| self.discard(state));
        }
        if state.losses > 0 {
            next.step("the destination restarts", |state| {
                state.losses -= 1;
                self.cut(state);
                self.discard(state);
            });
        }
    }

    fn discard(&self, state: &mut State) {
        if state.staged.take().is_some() {
            state.present += 1;
        }
        state.complete = 0;
    }

    fn cut(&self, state: &mut State) {
        state.link = false;
        state.lane = None;
        state.mark = None;
    }

    /// The answer to a reattachment: the incarnation, and the last complete round.
    fn reattach(&self, state: &mut State) {
        state.link = true;
        let same = state.incarnation == state.present || !self.rules.has(Rule::SameIncarnation);
        state.incarnation = state.present;
        if !same {
            state.sent_in = None;
            return;
        }
        let later = state.sent_in.is_some_and(|round| round > state.complete);
        if later && self.rules.has(Rule::LaterRoundsNotSent) {
            state.sent_in = None;
        }
    }
}

impl Model for Staging {
    type State = State;

    fn initial(&self) -> State {
        State {
            newest: 1,
            dirty: false,
            sent_in: None,
            round: 0,
            incarnation: 0,
            link: true,
            lane: None,
            mark: None,
            staged: None,
            complete: 0,
            present: 0,
            snapshot: false,
            evicted: false,
            losses: self.losses,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        if state.evicted {
            return;
        }
        self.source(state, next);
        self.destination(state, next);
        if state.link && state.losses > 0 {
            next.step("the link is cut", |state| {
                state.losses -= 1;
                self.cut(state);
            });
        }
        if !state.link {
            next.step("the source reattaches", |state| self.reattach(state));
        }
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        let stale = state.evicted && state.staged != Some(state.newest);
        stale.then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        state.evicted
    }
}
