//! Free pages: a look at the guest's free lists takes time, and the guest goes on (rule 5).

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Free {
    pub rules: Rules,
    /// How often the guest takes the page into use.
    pub uses: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Location {
    Here,
    Zero,
    /// In a store, under a generation.
    Stored(u8),
}

/// The whole state. A content of 0 is zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    /// What the guest must read, and whether it uses the page.
    newest: u8,
    writes: u8,
    used: bool,
    location: Location,
    ram: u8,
    generation: u8,
    stored: u8,
    /// The page came back since the look began. Touches of a resident page are not seen.
    touched: bool,
    /// The location that a page keeps while it is resident and unwritten.
    kept: Option<u8>,
    /// A look that found the page free: the location that the page had when it began.
    look: Option<Location>,
    /// The look's result as it was recorded for the page (only without the rule).
    recorded: bool,
    /// What the destination was told: the location, or the content that was sent.
    announced: Option<Location>,
    sent: Option<u8>,
    handed_over: bool,
}

impl Free {
    fn guest(&self, state: &State, next: &mut Next<State>) {
        if state.used {
            next.step("the guest frees the page", |state| state.used = false);
        }
        if state.location != Location::Here && (state.used || state.writes < self.uses) {
            next.step("the guest touches the page, which comes back", |state| {
                state.ram = match state.location {
                    Location::Stored(_) => state.stored,
                    _ => 0,
                };
                // the content of a free page does not matter: the guest takes what it finds
                if !state.used {
                    state.newest = state.ram;
                }
                state.kept = match state.location {
                    Location::Stored(generation) => Some(generation),
                    _ => None,
                };
                state.used = true;
                state.touched = true;
                state.location = Location::Here;
            });
        }
        if state.location == Location::Here && state.writes < self.uses {
            next.step("the guest takes the page into use and writes", |state| {
                state.writes += 1;
                state.used = true;
                state.kept = None;
                state.newest = state.writes + 1;
                state.ram = state.newest;
                state.sent = None;
            });
        }
        if let (Location::Here, Some(kept)) = (state.location, state.kept) {
            next.step("the page is evicted to its current copy", |state| state.location = Location::Stored(kept));
        } else if state.location == Location::Here && state.generation < 2 {
            next.step("the page is evicted to the store", |state| {
                state.generation += 1;
                state.stored = state.ram;
                state.location = Location::Stored(state.generation);
            });
        }
    }

    fn looks(&self, state: &State, next: &mut Next<State>) {
        if !state.used && state.look.is_none() {
            next.step("a look finds the page free", |state| {
                state.look = Some(state.location);
                state.touched = false;
            });
        }
        let Some(seen) = state.look else { return };
        next.step("the look is applied", |state| {
            state.look = None;
            let same = seen == state.location || !self.rules.has(Rule::LookComparesLocation);
            let untouched = !state.touched || !self.rules.has(Rule::LookUntouched);
            if matches!(state.location, Location::Stored(_)) && same && untouched {
                state.location = Location::Zero;
            }
            state.recorded = state.location == Location::Here && !self.rules.has(Rule::FreeIsNotRecorded);
        });
    }

    fn migration(&self, state: &State, next: &mut Next<State>) {
        if let Location::Stored(_) = state.location
            && state.announced.is_none()
        {
            next.step("the location is announced", |state| state.announced = Some(state.location));
        }
        next.step("the hand-over tells the difference", |state| {
            state.handed_over = true;
            match state.location {
                Location::Here => {
                    let skipped = state.recorded;
                    state.sent = (!skipped).then_some(state.ram);
                    state.announced = None;
                }
                Location::Zero if state.announced.is_some() && !self.rules.has(Rule::ZeroIsAnnounced) => (),
                location => state.announced = Some(location),
            }
        });
    }
}

impl Model for Free {
    type State = State;

    fn initial(&self) -> State {
        State {
            newest: 1,
            writes: 0,
            used: true,
            location: Location::Here,
            ram: 1,
            generation: 0,
            stored: 0,
            touched: false,
            kept: None,
            look: None,
            recorded: false,
            announced: None,
            sent: None,
            handed_over: false,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        if state.handed_over {
            return;
        }
        self.guest(state, next);
        self.looks(state, next);
        self.migration(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        let here = match state.location {
            Location::Here => state.ram,
            Location::Zero => 0,
            Location::Stored(_) => state.stored,
        };
        if state.used && here != state.newest {
            return Some(Violation::WrongContent);
        }
        let there = match (state.sent, state.announced) {
            (Some(content), _) => content,
            (None, Some(Location::Stored(generation))) if generation == state.generation => state.stored,
            _ => 0,
        };
        // a page that the source has as zeros is zeros at the destination, or the guest sees a page
        // change by itself
        let differs = state.used && there != state.newest || state.location == Location::Zero && there != 0;
        (state.handed_over && differs).then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        state.handed_over
    }
}
