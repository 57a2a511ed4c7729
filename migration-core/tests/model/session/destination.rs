//! What the destination does.

use super::*;

impl Session {
    pub(super) fn destination_steps(&self, state: &State, next: &mut Next<State>) {
        let phase = state.destination.phase;
        for page in 0..self.pages {
            if phase == DestinationPhase::Running {
                self.destination_guest(state, page, next);
                self.destination_faults(state, page, next);
                self.destination_evicts(state, page, next);
            }
            if phase == DestinationPhase::Prepared && !self.has(Rule::NoReadBeforeRun) {
                self.destination_reads_early(state, page, next);
            }
        }
        if phase == DestinationPhase::Running {
            self.destination_releases(state, next);
            self.destination_forgets(state, next);
        }
        let source_pages = |page: usize| state.destination.pages[page].location == Location::Source;
        let complete = !(0..self.pages).any(source_pages);
        if phase == DestinationPhase::Ready && state.source.phase == SourcePhase::Dead && complete {
            next.step("a person adopts the VM at the destination", |state| {
                state.destination.phase = DestinationPhase::Running;
            });
        }
    }

    fn destination_guest(&self, state: &State, page: usize, next: &mut Next<State>) {
        if state.destination.pages[page].location == Location::Here && state.left.writes > 0 {
            next.page("the guest writes at the destination", page, |state| {
                state.left.writes -= 1;
                state.newest[page] += 1;
                let own = &mut state.destination.pages[page];
                own.ram = Some(state.newest[page]);
                own.kept = None;
                if !matches!(own.eviction, Eviction::Checked(_)) {
                    own.eviction = Eviction::None;
                }
            });
        }
    }

    /// A fault asks the page's location (rule 2).
    fn destination_faults(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.destination.pages[page];
        let reachable = state.network.connected && !state.network.to_source.is_full();
        if own.location == Location::Source && !own.demanded && reachable {
            next.page("a fault demands the page of the source", page, |state| {
                state.destination.pages[page].demanded = true;
                state.network.to_source.push(ToSource::Demand { page: page as u8 });
            });
        }
        let waits_elsewhere = own.demanded && !self.has(Rule::AskNewLocation);
        if let Location::Stored(stored) = own.location
            && !waits_elsewhere
        {
            self.get(state, page, stored, "a fault asks the store for the page", next);
        }
    }

    /// Without rule 7: a located page is fetched before *run*.
    fn destination_reads_early(&self, state: &State, page: usize, next: &mut Next<State>) {
        if let Location::Stored(stored) = state.destination.pages[page].location {
            self.get(state, page, stored, "the destination fetches a located page before *run*", next);
        }
    }

    fn get(&self, state: &State, page: usize, stored: Stored, what: &'static str, next: &mut Next<State>) {
        let free = state.network.gets.iter().position(Option::is_none);
        if let (Some(free), None) = (free, state.destination.pages[page].getting) {
            next.page(what, page, |state| {
                state.destination.pages[page].getting = Some(stored);
                state.network.gets[free] = Some(Get { page: page as u8, stored, answer: None });
            });
        }
    }

    /// Evictions at the destination (rules 9, 21 and 22).
    fn destination_evicts(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.destination.pages[page];
        match own.eviction {
            Eviction::Checked(generation) => {
                next.page("the destination drops the page that was clean a moment ago", page, |state| {
                    let namespace = self.evicts_into();
                    state.destination.pages[page].evicted(Stored { namespace, generation });
                });
            }
            Eviction::Putting(_) if self.has(Rule::OutOfReachFirst) => {
                next.page("the guest touches the page: the eviction is cancelled", page, |state| {
                    state.destination.pages[page].eviction = Eviction::None;
                });
            }
            _ => (),
        }
        if own.location != Location::Here || own.eviction != Eviction::None {
            return;
        }
        if let Some(kept) = own.kept {
            let named = state.destination.named[kept.namespace as usize];
            let confirmed = self.confirmed(state, kept.namespace) && !named;
            if confirmed || !self.has(Rule::CurrentCopyConfirmed) {
                next.page("the destination evicts a page whose copy is current", page, |state| {
                    state.destination.pages[page].evicted(kept);
                });
            }
            return;
        }
        let namespace = self.evicts_into();
        let absent = state.stores.namespaces[namespace as usize].state == NamespaceState::Absent;
        let usable = absent && !self.is_silent(state, namespace) || self.confirmed(state, namespace);
        if state.left.own_puts > 0 && usable && state.network.has_room_for_put() {
            next.page("the destination evicts: puts the page", page, |state| {
                state.left.own_puts -= 1;
                self.create(state, namespace, false);
                state.destination.generation = self.next_generation(state, namespace);
                let generation = state.destination.generation;
                let own = &mut state.destination.pages[page];
                own.eviction = Eviction::Putting(generation);
                let content = own.ram.expect("the page is here");
                state.network.put(namespace, page, generation, content);
            });
        }
    }

    /// Returns the namespace into which the destination evicts. Without rule 8 it goes on with that
    /// of the source.
    pub(super) fn evicts_into(&self) -> Namespace {
        if self.has(Rule::OwnNamespaces) { Namespace::Own } else { Namespace::Home }
    }

    /// Returns a generation above all that the destination knows of the namespace.
    fn next_generation(&self, state: &State, namespace: Namespace) -> Generation {
        let known = state.destination.pages.iter().flat_map(|page| {
            let located = match page.location {
                Location::Stored(stored) => Some(stored),
                _ => None,
            };
            [located, page.kept]
        });
        let known = known.flatten().filter(|stored| stored.namespace == namespace);
        let highest = known.map(|stored| stored.generation).max().unwrap_or(0);
        highest.max(state.destination.generation) + 1
    }

    /// Names an entry that has lost something: held pages of it become `Source` (rule 13).
    pub(super) fn name(&self, state: &mut State, namespace: Namespace) {
        let mut pages = [false; PAGES];
        for (page, listed) in pages.iter_mut().enumerate().take(self.pages) {
            let own = &mut state.destination.pages[page];
            let located = matches!(own.location, Location::Stored(stored) if stored.namespace == namespace);
            if located && own.held && self.has(Rule::HeldBecomesSource) {
                *listed = true;
                own.location = Location::Source;
                own.getting = None;
            }
            own.kept = own.kept.filter(|kept| kept.namespace != namespace);
        }
        let new = !state.destination.named[namespace as usize];
        state.destination.named[namespace as usize] = true;
        if (new || pages.contains(&true)) && state.network.connected && !state.network.to_source.is_full() {
            let mut named = [false; 4];
            named[namespace as usize] = true;
            state.network.to_source.push(ToSource::Lacks { pages, named });
        }
    }

    /// Answers *vacated*, or decides *released* alone (rules 11, 17 and 19).
    fn destination_releases(&self, state: &State, next: &mut Next<State>) {
        let destination = &state.destination;
        let at_source = |page: usize| destination.pages[page].location == Location::Source;
        let lacks: [bool; PAGES] = std::array::from_fn(|page| page < self.pages && at_source(page));
        let depends = (0..self.pages).filter_map(|page| match destination.pages[page].location {
            Location::Stored(stored) if destination.pages[page].held => Some(stored.namespace),
            _ => None,
        });
        let depends: Vec<Namespace> = depends.collect();
        let lost = |namespace: Namespace| {
            let ignored = self.is_silent(state, namespace) && !self.has(Rule::SilentIsChanged);
            let changed = !self.confirmed(state, namespace) && !ignored;
            let changed = changed && self.has(Rule::ComparedBeforeReleased);
            changed || destination.named[namespace as usize]
        };
        let lost = depends.iter().copied().find(|&namespace| lost(namespace));
        let incomplete = lacks.contains(&true) && self.has(Rule::NoPageIsSource);
        let room = state.network.connected && !state.network.to_source.is_full();
        if destination.vacated && room {
            self.answer_vacated(state, incomplete.then_some(lacks), lost, next);
        }
        let source_is_dead = state.source.phase == SourcePhase::Dead;
        let cut_off = !state.network.connected && state.source.phase != SourcePhase::Freed;
        let passed = !incomplete && (source_is_dead || lost.is_none());
        let decides = cut_off && passed && !destination.released;
        if decides && self.has(Rule::ReleasedWithoutSource) {
            next.step("the destination decides *released* without the source", |state| {
                state.destination.released = true;
            });
        }
    }

    fn answer_vacated(
        &self,
        state: &State,
        lacks: Option<[bool; PAGES]>,
        lost: Option<Namespace>,
        next: &mut Next<State>,
    ) {
        if state.destination.released {
            next.step("the destination says *released* again", |state| {
                state.destination.vacated = false;
                if self.has(Rule::ReleasedIsRepeated) {
                    state.network.to_source.push(ToSource::Released);
                }
            });
        } else if let Some(pages) = lacks {
            next.step("the destination answers *vacated* with what it lacks", |state| {
                state.destination.vacated = false;
                state.network.to_source.push(ToSource::Lacks { pages, named: [false; 4] });
            });
        } else if let Some(namespace) = lost {
            next.step("the destination answers *vacated*: an entry has lost something", |state| {
                state.destination.vacated = false;
                self.name(state, namespace);
            });
        } else {
            next.step("the destination says *released*", |state| {
                state.destination.vacated = false;
                state.destination.released = true;
                state.network.to_source.push(ToSource::Released);
            });
        }
    }

    /// Forgets namespaces of earlier owners to which no page refers (rule 14).
    fn destination_forgets(&self, state: &State, next: &mut Next<State>) {
        if !state.destination.released && self.has(Rule::ForgetAfterReleased) {
            return;
        }
        for namespace in [Namespace::Home, Namespace::Attempt, Namespace::SecondAttempt] {
            let present = state.stores.namespaces[namespace as usize].state == NamespaceState::Present;
            let known = self.knows(state, namespace);
            let pages = &state.destination.pages[..self.pages];
            let referred = pages.iter().any(|page| page.refers_to(namespace, self.rules));
            let evicts_into = namespace == self.evicts_into();
            if present && known && !referred && !evicts_into {
                next.step("the destination forgets a namespace of the source", |state| {
                    state.stores.forget(namespace);
                });
            }
        }
    }

    /// Delivers the first message on the control channel to the destination.
    pub(super) fn destination_receives(&self, message: ToDestination, next: &mut Next<State>) {
        match message {
            ToDestination::Entry => next.step("the destination receives and acknowledges the entry", |state| {
                state.network.to_destination.pop();
                state.destination.knows_attempt = true;
                state.network.to_source.push(ToSource::Acknowledged);
            }),
            ToDestination::Connect { home, held } => next.step("the destination receives *connect*", |state| {
                state.network.to_destination.pop();
                self.prepare(state, home, held);
                state.network.to_source.push(ToSource::Prepared);
            }),
            ToDestination::Located { page, stored, held } => {
                next.page("the destination receives *located* on control", page as usize, |state| {
                    state.network.to_destination.pop();
                    self.located(state, page as usize, stored, held);
                });
            }
            ToDestination::HandOver { changes, held } => next.step("the destination receives the hand-over", |state| {
                state.network.to_destination.pop();
                state.destination.phase = DestinationPhase::Ready;
                for page in 0..self.pages {
                    self.changed(&mut state.destination.pages[page], changes[page], held[page]);
                }
                state.network.to_source.push(ToSource::Ready);
            }),
            ToDestination::Run => next.step("the destination receives *run*", |state| {
                state.network.to_destination.pop();
                state.destination.phase = DestinationPhase::Running;
            }),
            ToDestination::Vacated => next.step("the destination receives *vacated*", |state| {
                state.network.to_destination.pop();
                state.destination.vacated = true;
            }),
        }
    }

    fn prepare(&self, state: &mut State, home: [Option<Generation>; PAGES], held: [bool; PAGES]) {
        let gets = state.destination.pages.map(|page| page.getting);
        let knows_attempt = state.destination.knows_attempt || !self.late_entry;
        state.destination = Destination::new();
        state.destination.phase = DestinationPhase::Prepared;
        state.destination.knows_attempt = knows_attempt;
        for page in 0..self.pages {
            let own = &mut state.destination.pages[page];
            own.getting = gets[page];
            if let Some(generation) = home[page] {
                own.location = Location::Stored(Stored { namespace: Namespace::Home, generation });
                own.held = held[page];
            }
        }
    }

    /// Applies what the hand-over says of one page.
    fn changed(&self, own: &mut DestinationPage, change: Change, held: bool) {
        own.demanded = false;
        own.getting = own.getting.filter(|_| !self.has(Rule::NoReadBeforeRun));
        match change {
            Change::Same => {
                if self.has(Rule::PauseSendsHeld) {
                    own.held = held;
                }
            }
            Change::Source => own.move_to(Location::Source, true),
            Change::Stored(stored) => own.move_to(Location::Stored(stored), held),
            Change::Forgotten => {
                own.move_to(Location::Here, false);
                own.ram = Some(0);
            }
        }
    }

    /// Applies a *located* (rule 2).
    pub(super) fn located(&self, state: &mut State, page: usize, stored: Stored, held: bool) {
        let phase = state.destination.phase;
        let own = &mut state.destination.pages[page];
        let before = phase == DestinationPhase::Prepared;
        let replaces = match before {
            true => self.has(Rule::NewestMessageReplaces) || own.location == Location::Source,
            false => !self.has(Rule::LocatedOnlyForSource) || own.location == Location::Source,
        };
        if replaces {
            own.move_to(Location::Stored(stored), held);
        }
    }

    /// Applies a page that arrives from the source (rule 2).
    pub(super) fn arrived(&self, state: &mut State, page: usize, content: Content, on_demand: bool) {
        let phase = state.destination.phase;
        let own = &mut state.destination.pages[page];
        let wanted = match phase {
            DestinationPhase::Absent | DestinationPhase::Prepared => true,
            DestinationPhase::Dead => false,
            _ if !self.has(Rule::InstallUnderClaim) => own.location != Location::Here,
            _ => own.location == Location::Source || on_demand && own.demanded,
        };
        if wanted {
            let kept = match own.location {
                Location::Stored(stored) if phase == DestinationPhase::Running => Some(stored),
                _ => None,
            };
            own.move_to(Location::Here, true);
            own.ram = Some(content);
            own.kept = kept;
        }
        if on_demand || wanted {
            own.demanded = false;
        }
    }

    /// Applies a store's answer (rules 2 and 13).
    pub(super) fn got(&self, state: &mut State, page: usize, stored: Stored, content: Option<Content>) {
        let phase = state.destination.phase;
        let own = &mut state.destination.pages[page];
        let here = own.location == Location::Here;
        let same = own.getting == Some(stored) && own.location == Location::Stored(stored);
        let any = own.getting.is_some() && !here;
        let before_run = phase == DestinationPhase::Prepared;
        let claimed = same || any && !self.has(Rule::ClaimNamesLocation) || before_run;
        let claimed = claimed || !here && !self.has(Rule::InstallUnderClaim);
        if own.getting == Some(stored) || !self.has(Rule::ClaimNamesLocation) {
            own.getting = None;
        }
        match content {
            Some(content) if claimed => {
                let held = own.held;
                own.move_to(Location::Here, held);
                own.ram = Some(content);
                own.kept = Some(stored);
            }
            None if same && phase == DestinationPhase::Running && !state.destination.released => {
                self.name(state, stored.namespace);
            }
            _ => (),
        }
    }
}

impl DestinationPage {
    /// Gives the page a new location. Whoever still asks the old one has no claim any more.
    pub(super) fn move_to(&mut self, location: Location, held: bool) {
        self.location = location;
        self.held = held;
        self.ram = None;
        self.kept = None;
        self.getting = None;
        if location == Location::Here {
            self.arrived = true;
            self.demanded = false;
        }
    }

    /// The page is dropped: it is only in the store now.
    pub(super) fn evicted(&mut self, stored: Stored) {
        let held = self.held;
        self.move_to(Location::Stored(stored), held);
        self.eviction = Eviction::None;
    }
}
