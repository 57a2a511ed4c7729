//! The store table of a session and its limit (rule 15).
//!
//! The source makes a new entry for each share that goes elsewhere, names it to the destination,
//! and sends locations that carry only the entry's number. The table here ends at two entries
//! instead of 255. An entry is never removed during a session: only the next session's table can be
//! shorter.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

/// The number of entries that a table can have.
const LIMIT: usize = 2;
const PAGES: usize = 2;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub rules: Rules,
    /// How many shares go elsewhere during the VM's life.
    pub shares: u8,
}

/// The identity of a namespace. It is never used again; 0 is none.
type Namespace = u8;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Location {
    Here,
    Stored(Namespace),
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    /// The source's map.
    pages: [Location; PAGES],
    table: [Namespace; LIMIT],
    /// How many of the entries the destination has acknowledged.
    acknowledged: [bool; LIMIT],
    made: u8,
    /// The destination's copy of the table, and what it was told of each page.
    known: [Namespace; LIMIT],
    told: [Option<Namespace>; PAGES],
    /// An entry on its way on control: number and namespace.
    entry: Option<(u8, Namespace)>,
    /// A location on its way on the page's lane: page, number of the entry.
    located: Option<(u8, u8)>,
    announced: [Option<Namespace>; PAGES],
    unknown_entry: bool,
}

impl State {
    fn refers_to(&self, namespace: Namespace) -> bool {
        self.pages.contains(&Location::Stored(namespace))
    }

    fn free_entry(&self) -> Option<usize> {
        self.table.iter().position(|&namespace| namespace == 0)
    }
}

impl Table {
    /// A share goes elsewhere: a new namespace, a new entry, and a page that is put there.
    fn shares(&self, state: &State, next: &mut Next<State>) {
        if state.made >= self.shares {
            return;
        }
        let unused = |namespace: &Namespace| *namespace != 0 && !state.refers_to(*namespace);
        let reused = state.table.iter().position(unused).filter(|_| !self.rules.has(Rule::EntriesAreAppended));
        let entry = reused.or(state.free_entry());
        for page in 0..PAGES {
            let Some(entry) = entry.filter(|_| state.entry.is_none()) else { continue };
            next.page("a page goes into a namespace with a new entry", page, |state| {
                state.made += 1;
                let namespace = state.made;
                state.table[entry] = namespace;
                state.acknowledged[entry] = false;
                state.entry = Some((entry as u8, namespace));
                state.pages[page] = Location::Stored(namespace);
            });
        }
    }

    /// Before the table is full the owner copies the oldest entry's pages into its newest
    /// namespace.
    fn copies_oldest(&self, state: &State, next: &mut Next<State>) {
        let newest = state.table.iter().copied().max().unwrap_or(0);
        let oldest = state.table[0];
        let nearly_full = state.table[LIMIT - 1] != 0;
        if nearly_full && state.refers_to(oldest) && oldest != newest && self.rules.has(Rule::OldestIsCopied) {
            next.step("the owner copies the oldest entry's pages into its own namespace", |state| {
                for page in &mut state.pages {
                    if *page == Location::Stored(oldest) {
                        *page = Location::Stored(newest);
                    }
                }
            });
        }
    }

    /// A new session begins: its table has only entries to which pages refer.
    fn new_session(&self, state: &State, next: &mut Next<State>) {
        let calm = state.entry.is_none() && state.located.is_none();
        let told = (0..PAGES).all(|page| match state.pages[page] {
            Location::Here => true,
            Location::Stored(namespace) => state.told[page] == Some(namespace),
        });
        if !calm || !told {
            return;
        }
        next.step("the VM has migrated, and migrates again", |state| {
            let mut table = [0; LIMIT];
            let kept = state.table.iter().filter(|&&namespace| {
                namespace != 0 && (state.refers_to(namespace) || !self.rules.has(Rule::OnlyReferredEntries))
            });
            for (slot, &namespace) in table.iter_mut().zip(kept) {
                *slot = namespace;
            }
            state.table = table;
            state.known = table;
            state.acknowledged = table.map(|namespace| namespace != 0);
        });
    }

    fn messages(&self, state: &State, next: &mut Next<State>) {
        for page in 0..PAGES {
            let Location::Stored(namespace) = state.pages[page] else { continue };
            let entry = state.table.iter().position(|&named| named == namespace);
            let Some(entry) = entry.filter(|_| state.located.is_none()) else { continue };
            let usable = state.acknowledged[entry] || !self.rules.has(Rule::EntryAcknowledged);
            if usable && state.announced[page] != Some(namespace) {
                next.page("the source sends *located* with the entry's number", page, |state| {
                    state.announced[page] = Some(namespace);
                    state.located = Some((page as u8, entry as u8));
                });
            }
        }
        if let Some((entry, namespace)) = state.entry {
            next.step("the destination receives and acknowledges an entry", |state| {
                state.entry = None;
                state.known[entry as usize] = namespace;
                state.acknowledged[entry as usize] = true;
            });
        }
        if let Some((page, entry)) = state.located {
            next.page("the destination receives *located*", page as usize, |state| {
                state.located = None;
                let namespace = state.known[entry as usize];
                state.unknown_entry |= namespace == 0;
                state.told[page as usize] = Some(namespace);
            });
        }
    }
}

impl Model for Table {
    type State = State;

    fn initial(&self) -> State {
        State {
            pages: [Location::Here; PAGES],
            table: [0; LIMIT],
            acknowledged: [false; LIMIT],
            made: 0,
            known: [0; LIMIT],
            told: [None; PAGES],
            entry: None,
            located: None,
            announced: [None; PAGES],
            unknown_entry: false,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        self.shares(state, next);
        self.copies_oldest(state, next);
        self.new_session(state, next);
        self.messages(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.unknown_entry {
            return Some(Violation::ContentLost);
        }
        let settled = state.entry.is_none() && state.located.is_none();
        let wrong = (0..PAGES).any(|page| {
            let announced = state.announced[page].is_some() && state.told[page] != state.announced[page];
            settled && announced
        });
        wrong.then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        state.made == self.shares
    }
}
