//! Pages, stores, the session and eviction: rules 1–4, 7–11, 13, 14, 16–19, 21 and 22.
//!
//! A VM has one or two pages, and may have evicted them into a store at home. It migrates: the
//! guest writes, pages and locations travel, the destination runs, fetches what is missing, and
//! evicts again. The link is cut, stores lose what they have, hosts crash, answers come late.

mod destination;
mod network;
mod source;
mod state;

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};
pub use state::Budget;
use state::*;

/// A configuration of the model.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    pub rules: Rules,
    /// The number of pages, 1 or 2.
    pub pages: usize,
    /// The number of stores. With two, the attempts' namespaces are in the first, all others in the
    /// second.
    pub stores: usize,
    /// Whether the source sends pages and locations in rounds before the pause.
    pub rounds: bool,
    /// Whether the source reads stored pages and sends them (`fetch`), instead of their locations
    /// (`keep`).
    pub fetch: bool,
    /// Whether the source has a script that forgets pages.
    pub forgetful: bool,
    /// Whether the entry of the attempt's namespace is named after *connect*, instead of with it.
    pub late_entry: bool,
    /// Whether a store that has fallen silent may answer again, with all that it had. If not, the
    /// end must be reachable without it.
    pub returns: bool,
    /// Whether a `create` may be late.
    pub late_create: bool,
    /// How often each thing may happen.
    pub budget: Budget,
}

impl Session {
    fn has(&self, rule: Rule) -> bool {
        self.rules.has(rule)
    }

    /// Returns the store that has the namespace.
    fn store_of(&self, namespace: Namespace) -> usize {
        if self.stores == 1 || namespace.is_attempt() { 0 } else { 1 }
    }

    /// Returns the present incarnation of the namespace's store.
    fn incarnation(&self, state: &State, namespace: Namespace) -> u8 {
        state.stores.incarnations[self.store_of(namespace)]
    }

    /// Returns whether the namespace's store does not answer any more.
    fn is_silent(&self, state: &State, namespace: Namespace) -> bool {
        state.stores.silent[self.store_of(namespace)]
    }

    /// Returns whether the store, asked now, confirms the namespace and the entry's incarnation
    /// (rules 9 and 11).
    fn confirmed(&self, state: &State, namespace: Namespace) -> bool {
        let kept = &state.stores.namespaces[namespace as usize];
        let present = kept.state == NamespaceState::Present || !self.has(Rule::AbsentIsChanged);
        let answers = !self.is_silent(state, namespace);
        answers && present && kept.incarnation == self.incarnation(state, namespace)
    }

    /// Returns what a reader gets from the store: the content, or `None` if the page is missing
    /// (rule 3).
    fn read(&self, state: &State, page: usize, stored: Stored) -> Option<Content> {
        let kept = &state.stores.namespaces[stored.namespace as usize];
        let value = kept.values[page].filter(|_| kept.state == NamespaceState::Present);
        match value {
            Some((generation, content)) if generation == stored.generation => Some(content),
            Some((_, content)) if !self.has(Rule::GenerationChecked) => Some(content),
            _ if !self.has(Rule::MissingIsNotZero) => Some(0),
            _ => None,
        }
    }

    /// Makes a namespace, or sends the `create` that will make it.
    fn create(&self, state: &mut State, namespace: Namespace, late: bool) {
        let incarnation = self.incarnation(state, namespace);
        let silent = self.is_silent(state, namespace);
        let kept = &mut state.stores.namespaces[namespace as usize];
        if kept.state == NamespaceState::Absent && !silent {
            kept.state = if late { NamespaceState::Creating } else { NamespaceState::Present };
            kept.incarnation = incarnation;
        }
    }

    /// Returns where the source would say that the page is, if it is in a store.
    fn location(&self, state: &State, page: usize) -> Option<Stored> {
        let source = &state.source;
        let home = source.pages[page].home.filter(|_| !self.fetch);
        let home = home.map(|generation| Stored { namespace: Namespace::Home, generation });
        let usable = source.entry == Entry::Acknowledged || !self.has(Rule::EntryAcknowledged);
        let attempt = source.pages[page].attempt.filter(|_| usable);
        let attempt = attempt.map(|generation| Stored { namespace: source.attempt, generation });
        home.or(attempt)
    }

    /// Returns the content that the source can send: from its RAM or, with `fetch`, from its store
    /// through a buffer.
    fn content(&self, state: &State, page: usize) -> Option<Content> {
        let own = &state.source.pages[page];
        let home = own.home.filter(|_| self.fetch && !self.is_silent(state, Namespace::Home));
        let home =
            home.and_then(|generation| self.read(state, page, Stored { namespace: Namespace::Home, generation }));
        own.ram.or(home)
    }

    /// Returns whether the store has the newest content of the page under this generation.
    fn has_newest(&self, state: &State, page: usize, stored: Stored) -> bool {
        let kept = &state.stores.namespaces[stored.namespace as usize];
        let newest = Some((stored.generation, state.newest[page]));
        let answers = !self.is_silent(state, stored.namespace);
        answers && kept.state == NamespaceState::Present && kept.values[page] == newest
    }

    /// Returns whether the owner can still obtain the newest content of the page.
    fn obtainable(&self, state: &State, page: usize) -> bool {
        let source = &state.source;
        let newest = Some(state.newest[page]);
        let in_ram = source.pages[page].ram == newest;
        let home = source.pages[page].home.map(|generation| Stored { namespace: Namespace::Home, generation });
        if !state.destination_owns() {
            return source.phase > SourcePhase::HandedOver
                || in_ram
                || home.is_some_and(|stored| self.has_newest(state, page, stored));
        }
        let serving = source.phase == SourcePhase::Serving;
        let own = &state.destination.pages[page];
        match own.location {
            Location::Here => own.ram == newest,
            Location::Source => {
                let stored = home.or_else(|| self.location(state, page));
                serving && (in_ram || stored.is_some_and(|stored| self.has_newest(state, page, stored)))
            }
            Location::Stored(stored) => {
                let known = !stored.namespace.is_attempt() || state.destination.knows_attempt;
                let held = own.held && serving && in_ram && !state.destination.released;
                known && (held || self.has_newest(state, page, stored))
            }
        }
    }

    /// Lets `change` happen, a fault that no rule can prevent, and excuses what it loses at once.
    ///
    /// A page is not excused if the source still has it and it never arrived, or if the destination
    /// relies on the source: it was left there, or announced as held.
    fn fault(&self, state: &mut State, change: impl FnOnce(&mut State)) {
        let before = *state;
        change(state);
        let serving = state.source.phase == SourcePhase::Serving;
        for page in 0..self.pages {
            let lost = self.obtainable(&before, page) && !self.obtainable(state, page);
            let own = &state.destination.pages[page];
            let relied_on = match own.location {
                Location::Here => false,
                Location::Source => !self.fetch,
                Location::Stored(_) => own.held && !state.destination.released,
            };
            let relied_on = relied_on && state.destination_owns();
            let resident = state.source.pages[page].ram == Some(state.newest[page]) && !own.arrived;
            if lost && !(serving && (relied_on || resident)) {
                state.excused[page] = true;
            }
        }
    }

    /// Returns whether the namespace is gone, or somebody will still remove it: the owner of a page
    /// that refers to it, or a person. A person removes what has expired, as its record says, if
    /// the one who made it has crashed and nobody else knows it, or if its store is silent for
    /// ever.
    fn accounted_for(&self, state: &State, namespace: Namespace) -> bool {
        let known = self.knows(state, namespace);
        let orphaned = state.source.phase == SourcePhase::Dead && !known;
        if orphaned || self.is_silent(state, namespace) {
            return true;
        }
        match state.stores.namespaces[namespace as usize].state {
            NamespaceState::Absent | NamespaceState::Forgotten => true,
            NamespaceState::Creating | NamespaceState::ForgottenCreating => false,
            NamespaceState::Present => {
                let pages = &state.destination.pages[..self.pages];
                pages.iter().any(|page| page.refers_to(namespace, self.rules))
            }
        }
    }

    /// Returns whether the destination's table has the source's namespace.
    fn knows(&self, state: &State, namespace: Namespace) -> bool {
        match namespace {
            Namespace::Home => !self.fetch,
            Namespace::Own => true,
            attempt => state.destination.knows_attempt && attempt == state.source.attempt,
        }
    }
}

impl State {
    /// Returns whether the destination owns the VM: it runs it, or the source has sent *run* and
    /// can only repeat it.
    fn destination_owns(&self) -> bool {
        match self.destination.phase {
            DestinationPhase::Running => true,
            DestinationPhase::Ready => matches!(self.source.phase, SourcePhase::Serving | SourcePhase::Dead),
            _ => false,
        }
    }
}

impl DestinationPage {
    /// Returns whether the page refers to the namespace (rule 14).
    fn refers_to(&self, namespace: Namespace, rules: Rules) -> bool {
        let located = match self.location {
            Location::Stored(stored) => stored.namespace == namespace,
            _ => false,
        };
        let kept = self.kept.is_some_and(|stored| stored.namespace == namespace);
        let getting = self.getting.is_some_and(|stored| stored.namespace == namespace);
        let kept = kept && rules.has(Rule::KeptLocationsRefer);
        let getting = getting && rules.has(Rule::GetsRefer);
        located && rules.has(Rule::LocationsRefer) || kept || getting
    }
}

impl Model for Session {
    type State = State;

    fn initial(&self) -> State {
        State::new(self.budget)
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        self.source_steps(state, next);
        self.destination_steps(state, next);
        self.network_steps(state, next);
    }

    fn normalise(&self, state: &mut State) {
        state.network.puts.sort_unstable();
        state.network.gets.sort_unstable();
        if self.has(Rule::HeldEndsAtArrival) {
            for page in &mut state.destination.pages {
                if page.location == Location::Here {
                    page.held = false;
                }
            }
        }
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        let source = &state.source;
        let destination = &state.destination;
        if source.phase <= SourcePhase::Rounds && destination.phase == DestinationPhase::Running {
            return Some(Violation::TwoOwners);
        }
        for page in 0..self.pages {
            let newest = Some(state.newest[page]);
            let there = &destination.pages[page];
            let running = destination.phase == DestinationPhase::Running;
            if running && there.location == Location::Here && there.ram != newest {
                return Some(Violation::WrongContent);
            }
            let resident = source.pages[page].ram;
            if source.phase <= SourcePhase::HandedOver && resident.is_some() && resident != newest {
                return Some(Violation::WrongContent);
            }
            if source.pages[page].pushed > 1 {
                return Some(Violation::SentTwice);
            }
            if !state.excused[page] && !self.obtainable(state, page) {
                return Some(Violation::ContentLost);
            }
        }
        None
    }

    fn settled(&self, state: &State) -> bool {
        let pages = 0..self.pages;
        let excused = pages.clone().any(|page| state.excused[page]);
        let calm = state.network.puts.iter().all(Option::is_none);
        match (state.destination.phase, state.source.phase) {
            (DestinationPhase::Running, SourcePhase::Freed | SourcePhase::Dead) => {
                let here = |page: usize| state.destination.pages[page].location == Location::Here;
                excused || calm && state.destination.released && pages.clone().all(here)
            }
            (DestinationPhase::Running, _) => excused,
            (_, SourcePhase::Dead) => true,
            (_, SourcePhase::Home) => {
                let here = |page: usize| state.source.pages[page].ram.is_some();
                calm && state.source.failed && (excused || pages.clone().all(here))
            }
            _ => false,
        }
    }

    fn clean(&self, state: &State) -> bool {
        let excused = (0..self.pages).any(|page| state.excused[page]);
        let attempts = [Namespace::Attempt, Namespace::SecondAttempt];
        let home = match (state.destination.phase, state.source.phase) {
            (DestinationPhase::Running, _) => excused || self.accounted_for(state, Namespace::Home),
            (_, SourcePhase::Home) => true,
            _ => return true,
        };
        home && attempts.iter().all(|&attempt| excused || self.accounted_for(state, attempt))
    }
}
