//! An entry with two stores, one of which may lose everything (rule 12).

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

const STORES: usize = 2;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Replicas {
    pub rules: Rules,
    pub writes: u8,
}

/// The whole state: one page, which the source puts into both stores.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    newest: u8,
    /// The generation of the newest put, and the one for which the page is claimed. 0 is none.
    generation: u8,
    claimed: u8,
    /// The put that is on its way to each store: generation and content.
    puts: [Option<(u8, u8)>; STORES],
    stored: [Option<(u8, u8)>; STORES],
    acknowledged: [bool; STORES],
    /// The generation that the source has announced: acknowledged by the entry.
    located: Option<u8>,
    running: bool,
    released: bool,
    /// A store that has lost everything. Only one does.
    lost: Option<u8>,
    /// The store that the reader asks.
    asks: usize,
    read: Option<u8>,
    missing: bool,
}

impl Replicas {
    fn source(&self, state: &State, next: &mut Next<State>) {
        if !state.running && state.newest <= self.writes {
            next.step("the guest writes", |state| {
                state.newest += 1;
                state.claimed = 0;
                state.located = None;
            });
        }
        let idle = state.claimed == 0 && state.located.is_none();
        if idle && state.puts == [None; STORES] && state.lost.is_none() && !state.running {
            next.step("the source puts the page into both stores", |state| {
                state.generation += 1;
                state.claimed = state.generation;
                state.puts = [Some((state.generation, state.newest)); STORES];
                state.acknowledged = [false; STORES];
            });
        }
        for store in 0..STORES {
            let Some(put) = state.puts[store] else { continue };
            next.step("a store applies the put and acknowledges it", |state| {
                state.puts[store] = None;
                let gone = state.lost == Some(store as u8);
                if !gone {
                    state.stored[store] = Some(put);
                    state.acknowledged[store] |= put.0 == state.claimed;
                }
            });
        }
        let all = state.acknowledged == [true; STORES];
        let any = state.acknowledged.contains(&true) && !self.rules.has(Rule::AllStoresAcknowledge);
        if state.claimed != 0 && (all || any) {
            next.step("the source announces the location", |state| {
                state.located = Some(state.claimed);
                state.claimed = 0;
            });
        }
        if !state.running {
            next.step("the destination runs", |state| state.running = true);
        }
    }

    fn destination(&self, state: &State, next: &mut Next<State>) {
        // rule 11: both incarnations are compared; a page without a location comes from the source
        if !state.released && state.located.is_some() && state.lost.is_none() {
            next.step("the destination says *released*", |state| state.released = true);
        }
        if !state.released && state.read.is_none() {
            next.step("the source delivers the page", |state| {
                state.read = Some(state.newest);
                state.released = true;
            });
        }
        let Some(generation) = state.located.filter(|_| state.read.is_none() && !state.missing) else { return };
        let value = state.stored[state.asks];
        match value.filter(|value| value.0 == generation) {
            Some((_, content)) => next.step("a store answers with the page", |state| state.read = Some(content)),
            None if state.asks + 1 < STORES && self.rules.has(Rule::NextStoreAsked) => {
                next.step("a store lacks the page, and the next one is asked", |state| state.asks += 1);
            }
            None => next.step("a store lacks the page, which is missing", |state| state.missing = true),
        }
    }
}

impl Model for Replicas {
    type State = State;

    fn initial(&self) -> State {
        State {
            newest: 1,
            generation: 0,
            claimed: 0,
            puts: [None; STORES],
            stored: [None; STORES],
            acknowledged: [false; STORES],
            located: None,
            running: false,
            released: false,
            lost: None,
            asks: 0,
            read: None,
            missing: false,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        self.source(state, next);
        if state.running {
            self.destination(state, next);
        }
        for store in (0..STORES).filter(|_| state.lost.is_none()) {
            next.step("a store restarts and is empty", |state| {
                state.lost = Some(store as u8);
                state.stored[store] = None;
                state.acknowledged[store] = false;
            });
        }
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.read.is_some_and(|content| content != state.newest) {
            return Some(Violation::WrongContent);
        }
        let only_there = state.running && state.released && state.read.is_none();
        let readable = state.stored.iter().flatten().any(|&value| Some(value.0) == state.located);
        let missing = state.missing && state.released;
        (only_there && !readable || missing).then_some(Violation::ContentLost)
    }

    fn settled(&self, state: &State) -> bool {
        state.read.is_some()
    }
}
