//! What the source does.

use super::*;

impl Session {
    pub(super) fn source_steps(&self, state: &State, next: &mut Next<State>) {
        for page in 0..self.pages {
            if state.source.phase <= SourcePhase::Rounds {
                self.source_guest(state, page, next);
            }
            if state.source.is_alive() {
                self.source_evicts(state, page, next);
            }
            if state.network.connected {
                self.source_sends(state, page, next);
                self.source_locates(state, page, next);
            }
            self.source_puts(state, page, next);
        }
        self.source_attempts(state, next);
        self.source_names_entry(state, next);
        self.source_vacates(state, next);
    }

    /// The guest writes a resident page, or touches one that is in the home store.
    fn source_guest(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.source.pages[page];
        if own.ram.is_some() && state.left.writes > 0 {
            next.page("the guest writes at the source", page, |state| {
                state.left.writes -= 1;
                state.newest[page] += 1;
                let newest = state.newest[page];
                state.source.pages[page].dirtied(newest);
            });
        }
        if let (None, Some(generation)) = (own.ram, own.home) {
            let stored = Stored { namespace: Namespace::Home, generation };
            if let Some(content) = self.read(state, page, stored).filter(|_| !self.is_silent(state, Namespace::Home)) {
                next.page("the source reads the page back", page, |state| {
                    state.source.pages[page].ram = Some(content);
                });
            }
        }
    }

    /// Evictions at the source (rules 9, 21 and 22).
    fn source_evicts(&self, state: &State, page: usize, next: &mut Next<State>) {
        let source = &state.source;
        let own = &source.pages[page];
        if let Eviction::Checked(generation) = own.eviction {
            next.page("the source drops the page that was clean a moment ago", page, |state| {
                let own = &mut state.source.pages[page];
                own.home = Some(generation);
                own.ram = None;
                own.eviction = Eviction::None;
            });
        }
        let at_home = source.phase == SourcePhase::Home && !source.failed;
        let allowed = at_home || !self.has(Rule::NoEvictionFromConnect);
        if !allowed || own.ram.is_none() || own.eviction != Eviction::None {
            return;
        }
        let confirmed = self.confirmed(state, Namespace::Home);
        if own.home.is_some() && (confirmed || !self.has(Rule::CurrentCopyConfirmed)) {
            next.page("the source evicts a page whose copy is current", page, |state| {
                state.source.pages[page].ram = None;
            });
        }
        let absent = state.stores.namespaces[Namespace::Home as usize].state == NamespaceState::Absent;
        let absent = absent && !self.is_silent(state, Namespace::Home);
        if own.home.is_none() && state.left.home_puts > 0 && state.network.has_room_for_put() && (confirmed || absent) {
            next.page("the source evicts: puts the page into the home namespace", page, |state| {
                state.left.home_puts -= 1;
                self.create(state, Namespace::Home, false);
                state.source.home_generation += 1;
                let generation = state.source.home_generation;
                state.source.pages[page].eviction = Eviction::Putting(generation);
                let content = state.source.pages[page].ram.expect("the page is resident");
                state.network.put(Namespace::Home, page, generation, content);
            });
        }
    }

    /// Pages in rounds, and after *run* directly.
    fn source_sends(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.source.pages[page];
        let located = self.location(state, page);
        let told = located.is_some() && located == own.announced;
        let Some(content) = self.content(state, page) else { return };
        if own.sent || told || own.claimed.is_some() || state.network.bulk.is_full() {
            return;
        }
        let early = state.source.phase == SourcePhase::Connecting && !self.has(Rule::RoundsAfterConnect);
        if self.rounds && (state.source.phase == SourcePhase::Rounds || early) {
            next.page("the source sends the page in a round", page, |state| {
                state.source.pages[page].sent = true;
                state.source.pages[page].announced = None;
                state.network.bulk.push(OnLane::Page { page: page as u8, content });
            });
        }
        if state.source.phase == SourcePhase::Serving {
            next.page("the source sends the missing page", page, |state| {
                state.source.pages[page].sent = true;
                if self.nothing_fails() {
                    state.source.pages[page].pushed += 1;
                }
                state.network.bulk.push(OnLane::Page { page: page as u8, content });
            });
        }
    }

    /// *Located*: after the store has acknowledged, on the page's lane during a round, on control
    /// after *run* (rule 16).
    fn source_locates(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.source.pages[page];
        let mut located = self.location(state, page);
        if let Some(generation) = own.claimed.filter(|_| !self.has(Rule::LocatedAfterAcknowledgement)) {
            located = Some(Stored { namespace: state.source.attempt, generation });
        }
        let Some(stored) = located else { return };
        if own.announced == located || own.sent {
            return;
        }
        let held = own.ram.is_some();
        let in_round = state.source.phase == SourcePhase::Rounds;
        let on_lane = in_round && self.has(Rule::LocatedOnPagesLane);
        if on_lane && !state.network.bulk.is_full() {
            next.page("the source sends the page's location on its lane", page, |state| {
                state.source.pages[page].announced = located;
                state.network.bulk.push(OnLane::Located { page: page as u8, stored, held });
            });
        }
        let serving = state.source.phase == SourcePhase::Serving;
        if (serving || in_round && !on_lane) && !state.network.to_destination.is_full() {
            next.page("the source sends the page's location on control", page, |state| {
                state.source.pages[page].announced = located;
                state.network.to_destination.push(ToDestination::Located { page: page as u8, stored, held });
            });
        }
    }

    /// Puts into the attempt's namespace, in rounds and until *vacated* (rule 8).
    fn source_puts(&self, state: &State, page: usize, next: &mut Next<State>) {
        let source = &state.source;
        let own = &source.pages[page];
        let phase = source.phase == SourcePhase::Rounds || source.phase == SourcePhase::Serving && !source.vacated;
        let stored = own.attempt.is_some() || own.home.is_some() && !self.fetch;
        let free = !own.sent && own.claimed.is_none() && !stored;
        let Some(content) = own.ram.filter(|_| phase && free) else { return };
        if state.left.attempt_puts == 0 || source.attempt_lost || !state.network.has_room_for_put() {
            return;
        }
        if state.stores.namespaces[source.attempt as usize].state == NamespaceState::Creating {
            return;
        }
        next.page("the source puts the page into the attempt's namespace", page, |state| {
            state.left.attempt_puts -= 1;
            state.source.attempt_generation += 1;
            let generation = state.source.attempt_generation;
            state.source.pages[page].claimed = Some(generation);
            state.network.put(state.source.attempt, page, generation, content);
        });
    }

    /// The beginning of an attempt, its pause, and its failure before *run*.
    fn source_attempts(&self, state: &State, next: &mut Next<State>) {
        let phase = state.source.phase;
        if phase == SourcePhase::Home && state.left.attempts > 0 && state.destination.phase != DestinationPhase::Running
        {
            next.step("the source connects", |state| self.connect(state, false));
            if self.late_create {
                next.step("the source connects, and its `create` is late", |state| self.connect(state, true));
            }
        }
        let room = !state.network.to_destination.is_full();
        if phase == SourcePhase::Rounds && state.network.connected && room {
            next.step("the source pauses the guest and hands over", |state| self.hand_over(state));
        }
        let given_up = state.destination.phase == DestinationPhase::Dead || !state.network.connected;
        let cancels = state.left.cancels > 0;
        let before_run = (SourcePhase::Connecting..=SourcePhase::HandedOver).contains(&phase);
        if before_run && (cancels || given_up) {
            next.step("the attempt fails before *run*", |state| {
                state.left.cancels -= u8::from(!given_up);
                self.fail(state);
            });
        }
        if phase == SourcePhase::Serving && cancels && !self.has(Rule::RunIsFinal) {
            next.step("the source cancels after *run*", |state| {
                state.left.cancels -= 1;
                state.source.phase = SourcePhase::Home;
                state.source.failed = true;
            });
        }
    }

    /// The entry of the attempt's namespace, which is used once it is acknowledged (rule 15).
    fn source_names_entry(&self, state: &State, next: &mut Next<State>) {
        let room = state.network.connected && !state.network.to_destination.is_full();
        let phase = matches!(state.source.phase, SourcePhase::Rounds | SourcePhase::Serving);
        if state.source.entry == Entry::Unsent && phase && room {
            next.step("the source names the entry of the attempt's namespace", |state| {
                state.source.entry = Entry::Sent;
                state.network.to_destination.push(ToDestination::Entry);
            });
        }
    }

    fn connect(&self, state: &mut State, late: bool) {
        state.left.attempts -= 1;
        if state.source.failed && self.has(Rule::NamespacePerAttempt) {
            state.source.attempt = Namespace::SecondAttempt;
        }
        if state.source.failed {
            state.source.attempt_generation = 0;
            state.destination = Destination::new();
        }
        if self.has(Rule::MidEvictionMappedBack) {
            for page in &mut state.source.pages {
                page.eviction = Eviction::None;
            }
        }
        self.create(state, state.source.attempt, late);
        state.source.entry = if self.late_entry { Entry::Unsent } else { Entry::Acknowledged };
        state.network.connected = true;
        self.begin(state);
    }

    /// Sends the locations of all pages, in a new session and again after a cut.
    pub(super) fn begin(&self, state: &mut State) {
        state.source.phase = SourcePhase::Connecting;
        let mut home = [None; PAGES];
        let mut held = [true; PAGES];
        for page in 0..self.pages {
            let own = &mut state.source.pages[page];
            own.sent = false;
            home[page] = own.home.filter(|_| !self.fetch);
            held[page] = own.ram.is_some();
            own.announced = home[page].map(|generation| Stored { namespace: Namespace::Home, generation });
        }
        state.network.to_destination.push(ToDestination::Connect { home, held });
    }

    /// Pauses the guest and sends the difference between what was announced and the map (rules 4
    /// and 16).
    fn hand_over(&self, state: &mut State) {
        state.source.phase = SourcePhase::HandedOver;
        let mut changes = [Change::Same; PAGES];
        let mut held = [true; PAGES];
        for page in 0..self.pages {
            let located = self.location(state, page);
            let own = &mut state.source.pages[page];
            held[page] = own.ram.is_some();
            changes[page] = match located {
                _ if own.sent => Change::Same,
                Some(_) if located == own.announced => Change::Same,
                Some(_) if !self.has(Rule::PauseSendsLocations) => Change::Same,
                Some(stored) => Change::Stored(stored),
                None if self.forgetful && !self.has(Rule::ForgottenIsMissing) => Change::Forgotten,
                None => Change::Source,
            };
            if changes[page] != Change::Same {
                own.announced = located;
            }
        }
        state.network.to_destination.push(ToDestination::HandOver { changes, held });
    }

    /// Gives everything back, and forgets what the attempt made (rule 14).
    fn fail(&self, state: &mut State) {
        let taken_up_again = !self.has(Rule::NamespacePerAttempt);
        if self.has(Rule::FailedAttemptForgets) && !taken_up_again {
            state.stores.forget(state.source.attempt);
        }
        if !self.has(Rule::AndNothingElse) {
            state.stores.forget(Namespace::Home);
        }
        state.source.phase = SourcePhase::Home;
        state.source.failed = true;
        state.source.attempt_lost = false;
        for page in &mut state.source.pages {
            page.claimed = None;
            page.attempt = None;
            page.announced = None;
            page.sent = false;
        }
        state.network.end_lanes();
        state.network.old_lane = Queue::EMPTY;
        state.network.gets = [None; 2];
        let phase = state.destination.phase;
        state.destination = Destination::new();
        if phase == DestinationPhase::Dead {
            state.destination.phase = phase;
        }
    }

    /// *Vacated*, and what follows it (rule 17).
    fn source_vacates(&self, state: &State, next: &mut Next<State>) {
        let source = &state.source;
        let told = |page: usize| {
            let own = &source.pages[page];
            own.sent || own.announced.is_some() && own.announced == self.location(state, page)
        };
        let quiet = |page: usize| source.pages[page].claimed.is_none() && source.pages[page].eviction == Eviction::None;
        let done = (0..self.pages).all(|page| told(page) && quiet(page)) || !self.has(Rule::NoneWillFollow);
        let serving = source.phase == SourcePhase::Serving;
        let room = state.network.connected && !state.network.to_destination.is_full();
        if serving && done && room && !source.vacated {
            next.step("the source sends *vacated*", |state| {
                state.source.vacated = true;
                state.network.to_destination.push(ToDestination::Vacated);
            });
        }
        if serving && source.vacated && !self.has(Rule::OnlyReleasedFrees) {
            next.step("the source frees itself after *vacated*", |state| state.source.free());
        }
        let attempt = state.stores.namespaces[source.attempt as usize].state;
        if source.phase == SourcePhase::Freed
            && attempt == NamespaceState::Present
            && !self.has(Rule::SourceForgetsNothing)
        {
            next.step("the source forgets the attempt's namespace after *run*", |state| {
                state.stores.forget(state.source.attempt);
            });
        }
    }

    /// Delivers the first message on the control channel to the source.
    pub(super) fn source_receives(&self, state: &State, message: ToSource, next: &mut Next<State>) {
        match message {
            ToSource::Acknowledged => next.step("the source learns that the entry is acknowledged", |state| {
                state.network.to_source.pop();
                state.source.entry = Entry::Acknowledged;
            }),
            ToSource::Prepared => next.step("the source receives *prepared*", |state| {
                state.network.to_source.pop();
                if state.source.phase == SourcePhase::Connecting {
                    state.source.phase = SourcePhase::Rounds;
                }
            }),
            ToSource::Ready if state.network.to_destination.is_full() => (),
            ToSource::Ready => next.step("the source receives *ready* and sends *run*", |state| {
                state.network.to_source.pop();
                if state.source.phase == SourcePhase::HandedOver {
                    state.source.phase = SourcePhase::Serving;
                    state.network.to_destination.push(ToDestination::Run);
                }
            }),
            ToSource::Demand { page } => self.source_answers(state, page as usize, next),
            ToSource::Released => next.step("the source receives *released* and frees the RAM", |state| {
                if self.fetch && self.has(Rule::FetchForgetsAll) {
                    state.stores.forget(Namespace::Home);
                }
                if state.source.entry != Entry::Acknowledged && self.has(Rule::UnacknowledgedForgotten) {
                    state.stores.forget(state.source.attempt);
                }
                state.source.free();
                let lanes = (state.network.bulk, state.network.demands);
                state.network.end_lanes();
                (state.network.bulk, state.network.demands) = lanes;
            }),
            ToSource::Lacks { pages, named } => next.step("the source learns what the destination lacks", |state| {
                state.network.to_source.pop();
                state.source.vacated = false;
                if self.has(Rule::NeverLocatedAgain) {
                    self.source_gives_up(state, named);
                }
                for page in (0..self.pages).filter(|&page| pages[page]) {
                    state.source.pages[page].sent = false;
                    state.source.pages[page].announced = None;
                }
            }),
        }
    }

    /// Takes back every location in an entry that was named.
    fn source_gives_up(&self, state: &mut State, named: [bool; 4]) {
        let attempt = named[state.source.attempt as usize];
        state.source.attempt_lost |= attempt;
        for page in &mut state.source.pages {
            if attempt {
                page.attempt = None;
            }
            if named[Namespace::Home as usize] && page.ram.is_some() {
                page.home = None;
            }
        }
    }

    /// Answers a demand with the page if the source holds it (rule 1).
    fn source_answers(&self, state: &State, page: usize, next: &mut Next<State>) {
        let own = &state.source.pages[page];
        let in_a_store = own.claimed.is_some() || own.attempt.is_some();
        if in_a_store && !self.has(Rule::HeldPagesAreServed) {
            next.page("the source ignores the demand for a page that is claimed", page, |state| {
                state.network.to_source.pop();
            });
            return;
        }
        match self.content(state, page) {
            None => next.page("the source cannot answer the demand", page, |state| {
                state.network.to_source.pop();
                state.source.pages[page].announced = None;
                if !self.has(Rule::SentStaysSent) {
                    state.source.pages[page].sent = false;
                }
            }),
            Some(_) if state.network.demands.is_full() => (),
            Some(content) => next.page("the source answers the demand", page, |state| {
                state.network.to_source.pop();
                state.source.pages[page].sent |= self.has(Rule::AnsweredIsSent);
                state.network.demands.push(OnLane::Page { page: page as u8, content });
            }),
        }
    }

    /// Returns whether no fault is possible in this configuration. Only then may each page travel
    /// just once.
    fn nothing_fails(&self) -> bool {
        let faults = Budget { writes: 0, attempts: 0, home_puts: 0, own_puts: 0, attempt_puts: 0, ..self.budget };
        faults == Budget::default()
    }
}

impl Source {
    /// Returns whether the process runs and still belongs to the VM.
    pub(super) fn is_alive(&self) -> bool {
        self.phase <= SourcePhase::Serving
    }

    /// Frees the RAM. What the source knew is of no use any more.
    pub(super) fn free(&mut self) {
        self.phase = SourcePhase::Freed;
        for page in &mut self.pages {
            page.ram = None;
            page.claimed = None;
            page.eviction = Eviction::None;
        }
    }
}

impl SourcePage {
    /// Records a write: no copy is current any more, and an eviction is cancelled (rule 21).
    fn dirtied(&mut self, newest: Content) {
        self.ram = Some(newest);
        self.home = None;
        self.attempt = None;
        self.claimed = None;
        self.sent = false;
        if !matches!(self.eviction, Eviction::Checked(_)) {
            self.eviction = Eviction::None;
        }
    }
}

impl Network {
    pub(super) fn has_room_for_put(&self) -> bool {
        self.puts.iter().any(Option::is_none)
    }

    pub(super) fn put(&mut self, namespace: Namespace, page: usize, generation: Generation, content: Content) {
        let free = self.puts.iter_mut().find(|put| put.is_none()).expect("the caller has checked that there is room");
        *free = Some(Put { namespace, page: page as u8, generation, content, answer: PutAnswer::Requested });
    }

    /// Ends the link: what was on its way is lost.
    pub(super) fn end_lanes(&mut self) {
        self.connected = false;
        self.to_destination = Queue::EMPTY;
        self.to_source = Queue::EMPTY;
        self.bulk = Queue::EMPTY;
        self.demands = Queue::EMPTY;
    }
}

impl Stores {
    /// Forgets a namespace as a whole.
    pub(super) fn forget(&mut self, namespace: Namespace) {
        let kept = &mut self.namespaces[namespace as usize];
        kept.values = [None; PAGES];
        kept.older = [None; PAGES];
        kept.state = match kept.state {
            NamespaceState::Creating => NamespaceState::ForgottenCreating,
            _ => NamespaceState::Forgotten,
        };
    }
}
