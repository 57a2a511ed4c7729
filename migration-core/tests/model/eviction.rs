//! One page is evicted and comes back, step by step, while the guest, a device and a tracker use it
//! (rules 9, 14, 21, 22).
//!
//! The VM is staged: a migration's tracker collects what the guest writes, and the staged copy is
//! in a store.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Evicting {
    pub rules: Rules,
    pub writes: u8,
    pub puts: u8,
    /// Whether a device may pin the page and write into it.
    pub device: bool,
}

/// Where the page is for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Mapped,
    /// In the side area, out of the guest's reach.
    Aside,
    /// Only in the store.
    Gone,
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    newest: u8,
    place: Place,
    ram: Option<u8>,
    /// What the staged copy in the store contains.
    stored: Option<u8>,
    /// The page has a copy, and was not written since: as the eviction reads it.
    clean: bool,
    /// Written since the migration's last round.
    dirty: bool,
    /// What the last round sent.
    sent: u8,
    /// The eviction has read that the copy is current.
    current: bool,
    /// The content of the put that is under way.
    putting: Option<u8>,
    /// The put is acknowledged, and the page may be dropped.
    drop: bool,
    pinned: bool,
    /// The stage namespace is forgotten.
    off: bool,
    /// The guest is paused, and what is dirty was sent.
    paused: bool,
    puts: u8,
}

impl Evicting {
    /// A write: write protection tells the eviction of it, and the tracker the migration.
    fn write(&self, state: &mut State) {
        state.newest += 1;
        state.dirty = true;
        if self.rules.has(Rule::ReturnedPageIsProtected) {
            state.clean = false;
        }
    }

    fn guest(&self, state: &State, next: &mut Next<State>) {
        let writes = state.newest <= self.writes;
        match state.place {
            Place::Mapped if writes => next.step("the guest writes", |state| {
                self.write(state);
                state.ram = Some(state.newest);
            }),
            Place::Aside => next.step("the guest touches the page, which is mapped again", |state| {
                state.place = Place::Mapped;
                if self.rules.has(Rule::TouchCancels) {
                    state.putting = None;
                    state.drop = false;
                    state.current = false;
                }
            }),
            Place::Gone => {
                if let Some(content) = state.stored {
                    next.step("the guest touches the page, which is read from the store", |state| {
                        state.place = Place::Mapped;
                        state.ram = Some(content);
                        state.clean = true;
                    });
                }
            }
            _ => (),
        }
        if self.device && state.place == Place::Mapped && !state.pinned {
            next.step("a device pins the page", |state| state.pinned = true);
        }
        if state.pinned && writes {
            next.step("a device writes into the page that it has pinned", |state| {
                self.write(state);
                if state.place != Place::Gone {
                    state.ram = Some(state.newest);
                }
            });
        }
        if state.pinned {
            next.step("a device lets go of the page", |state| state.pinned = false);
        }
    }

    /// Step (1): the page leaves the guest's reach. Step (2): it is put, unless its copy is
    /// current.
    fn begins(&self, state: &State, next: &mut Next<State>) {
        let busy = state.pinned && self.rules.has(Rule::BusyPageStays);
        let idle = state.putting.is_none() && !state.drop && !state.current;
        if state.place == Place::Mapped && idle && state.clean && !self.rules.has(Rule::WrittenReadAfterwards) {
            next.step("the eviction reads that the copy is current, before it takes the page away", |state| {
                state.current = true;
            });
        }
        if state.place == Place::Mapped && !busy && !state.off && !state.drop && state.putting.is_none() {
            next.step("the eviction takes the page out of the guest's reach", |state| state.place = Place::Aside);
        }
        if state.place != Place::Aside || state.putting.is_some() || state.drop {
            return;
        }
        if state.clean || state.current {
            next.step("the eviction finds that the copy is current", |state| {
                state.drop = true;
                if !self.rules.has(Rule::TrackerKeepsItsBits) {
                    state.dirty = false;
                }
            });
        } else if state.puts > 0 {
            next.step("the eviction puts the page", |state| {
                state.puts -= 1;
                state.putting = state.ram;
            });
        }
    }

    /// Step (3): after the acknowledgement the page is dropped, unless it was touched.
    fn ends(&self, state: &State, next: &mut Next<State>) {
        if let Some(content) = state.putting {
            next.step("the put is acknowledged", |state| {
                state.putting = None;
                state.stored = Some(content);
                state.drop = true;
            });
            next.step("the put fails, and the page is mapped back", |state| {
                state.putting = None;
                if self.rules.has(Rule::FailedPutMapsBack) {
                    state.place = Place::Mapped;
                }
            });
        }
        if state.drop {
            next.step("the eviction drops the page", |state| {
                state.drop = false;
                state.current = false;
                state.place = Place::Gone;
                state.ram = None;
            });
        }
    }

    /// `stage --off` forgets the namespace, and the migration's tracker collects.
    fn migration(&self, state: &State, next: &mut Next<State>) {
        let calm = state.place == Place::Mapped && state.putting.is_none() && !state.drop;
        if !state.off && (calm || !self.rules.has(Rule::StageOffBringsBack)) {
            next.step("`stage --off` forgets the stage namespace", |state| {
                state.off = true;
                state.stored = None;
                state.clean = false;
                state.putting = None;
                state.drop = false;
                state.current = false;
            });
        }
        if state.place == Place::Gone && !self.rules.has(Rule::ReportsRelocateNothing) {
            next.step("the tracker reports the page, which counts as resident", |state| {
                state.place = Place::Mapped;
                state.ram = Some(0);
            });
        }
        if state.dirty && state.place == Place::Mapped {
            next.step("a round sends the page", |state| {
                state.dirty = false;
                state.sent = state.newest;
            });
        }
        let clean = !state.dirty || state.place == Place::Mapped;
        if clean && state.putting.is_none() && !state.drop {
            next.step("the guest is paused, and what is dirty is sent", |state| {
                state.paused = true;
                if state.dirty {
                    state.sent = state.newest;
                    state.dirty = false;
                }
            });
        }
    }
}

impl Model for Evicting {
    type State = State;

    fn initial(&self) -> State {
        State {
            newest: 1,
            place: Place::Mapped,
            ram: Some(1),
            stored: None,
            clean: false,
            dirty: true,
            sent: 0,
            current: false,
            putting: None,
            drop: false,
            pinned: false,
            off: false,
            paused: false,
            puts: self.puts,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        if state.paused {
            return;
        }
        self.guest(state, next);
        self.begins(state, next);
        self.ends(state, next);
        self.migration(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        let newest = Some(state.newest);
        match state.place {
            Place::Mapped if state.ram != newest => return Some(Violation::WrongContent),
            Place::Gone if state.stored != newest => return Some(Violation::ContentLost),
            _ => (),
        }
        let stale = state.paused && state.sent != state.newest;
        stale.then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        state.paused
    }
}
