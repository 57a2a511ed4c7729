//! What the network, the stores and the hosts do by themselves: messages arrive, stores answer,
//! things fail.

use super::*;

impl Session {
    pub(super) fn network_steps(&self, state: &State, next: &mut Next<State>) {
        self.deliveries(state, next);
        for slot in 0..state.network.puts.len() {
            if let Some(put) = state.network.puts[slot] {
                self.put_steps(state, slot, put, next);
            }
        }
        for slot in 0..state.network.gets.len() {
            if let Some(get) = state.network.gets[slot] {
                self.get_steps(state, slot, get, next);
            }
        }
        self.late_messages(state, next);
        self.cuts(state, next);
        self.crashes(state, next);
        self.losses(state, next);
    }

    /// Delivers the first message of each channel.
    fn deliveries(&self, state: &State, next: &mut Next<State>) {
        let network = &state.network;
        let alive = state.destination.phase != DestinationPhase::Dead;
        let lanes_read = network.bulk.is_empty() && network.demands.is_empty();
        if let Some(message) = network.to_destination.first() {
            let in_order = match message {
                ToDestination::HandOver { .. } => lanes_read,
                ToDestination::Vacated => lanes_read || !self.has(Rule::MarkOnEveryLane),
                _ => true,
            };
            if in_order && alive && !network.to_source.is_full() {
                self.destination_receives(message, next);
            }
        }
        if let Some(message) = network.to_source.first()
            && state.source.is_alive()
        {
            self.source_receives(state, message, next);
        }
        if !alive {
            return;
        }
        if let Some(message) = network.bulk.first() {
            next.step("the destination reads its bulk lane", |state| {
                state.network.bulk.pop();
                self.read_lane(state, message, false);
            });
        }
        if let Some(message) = network.demands.first() {
            next.step("the destination reads its demand lane", |state| {
                state.network.demands.pop();
                self.read_lane(state, message, true);
            });
        }
        if let Some(message) = network.old_lane.first() {
            next.step("the thread of an old lane goes on", |state| {
                state.network.old_lane.pop();
                self.read_lane(state, message, false);
            });
        }
    }

    fn read_lane(&self, state: &mut State, message: OnLane, on_demand: bool) {
        match message {
            OnLane::Page { page, content } => self.arrived(state, page as usize, content, on_demand),
            OnLane::Located { page, stored, held } => self.located(state, page as usize, stored, held),
        }
    }

    /// A put is applied, answered, fails, or its writer gives it up without knowing its outcome
    /// (rule 10).
    fn put_steps(&self, state: &State, slot: usize, put: Put, next: &mut Next<State>) {
        let page = put.page as usize;
        let silent = self.is_silent(state, put.namespace);
        if put.answer == PutAnswer::Requested && silent {
            next.page("a put into a silent store fails at its deadline", page, |state| {
                state.network.puts[slot] = None;
                self.put_failed(state, put);
            });
        } else if put.answer == PutAnswer::Requested {
            next.page("the store applies a put", page, |state| self.apply_put(state, slot, put));
            if state.left.failed_puts > 0 {
                next.page("a put fails", page, |state| {
                    state.left.failed_puts -= 1;
                    state.network.puts[slot] = None;
                    self.put_failed(state, put);
                });
            }
        } else {
            next.page("the answer to a put arrives", page, |state| {
                state.network.puts[slot] = None;
                self.put_answered(state, put);
            });
        }
        if state.left.unknown_puts > 0 && self.waits_for(state, put) {
            next.page("the writer of a put stops waiting: its outcome is unknown", page, |state| {
                state.left.unknown_puts -= 1;
                self.put_failed(state, put);
                if !self.has(Rule::RepeatedUnderNewGeneration) {
                    self.take_back_generation(state, put);
                }
            });
        }
    }

    fn apply_put(&self, state: &mut State, slot: usize, put: Put) {
        let incarnation = self.incarnation(state, put.namespace);
        let kept = &mut state.stores.namespaces[put.namespace as usize];
        if !self.has(Rule::PutNeverCreates) {
            kept.state = NamespaceState::Present;
        }
        let mut answer = PutAnswer::Refused(incarnation);
        if kept.state == NamespaceState::Present {
            answer = PutAnswer::Stored(incarnation);
            let value = &mut kept.values[put.page as usize];
            let older = value.is_none_or(|(generation, _)| generation < put.generation);
            if self.budget.partial_losses > 0 {
                kept.older[put.page as usize] = *value;
            }
            if older || !self.has(Rule::NewerGenerationStays) {
                *value = Some((put.generation, put.content));
            }
        }
        let gone = match put.namespace {
            Namespace::Own => state.destination.phase != DestinationPhase::Running,
            _ => !state.source.is_alive() && self.has(Rule::OwnNamespaces),
        };
        state.network.puts[slot] = (!gone).then_some(Put { answer, ..put });
    }

    /// Returns the eviction that the put belongs to, if the namespace is one for evictions.
    fn eviction_of<'a>(&self, state: &'a mut State, put: Put) -> Option<&'a mut Eviction> {
        let page = put.page as usize;
        let running = state.destination.phase == DestinationPhase::Running;
        match put.namespace {
            Namespace::Own => Some(&mut state.destination.pages[page].eviction),
            Namespace::Home if running && !self.has(Rule::OwnNamespaces) => {
                Some(&mut state.destination.pages[page].eviction)
            }
            Namespace::Home => Some(&mut state.source.pages[page].eviction),
            _ => None,
        }
    }

    /// Returns whether the writer of the put still waits for it.
    fn waits_for(&self, state: &State, put: Put) -> bool {
        let mut state = *state;
        let claimed = state.source.pages[put.page as usize].claimed;
        match self.eviction_of(&mut state, put) {
            Some(eviction) => *eviction == Eviction::Putting(put.generation),
            None => put.namespace == state.source.attempt && claimed == Some(put.generation),
        }
    }

    /// The writer learns that a put has failed, or gives it up.
    fn put_failed(&self, state: &mut State, put: Put) {
        if !self.waits_for(state, put) {
            return;
        }
        match self.eviction_of(state, put) {
            Some(eviction) => *eviction = Eviction::None,
            None if self.has(Rule::FailedPutUnclaims) => state.source.pages[put.page as usize].claimed = None,
            None => (),
        }
    }

    /// Without rule 10: the next put uses the generation of this one again.
    fn take_back_generation(&self, state: &mut State, put: Put) {
        let newest = match put.namespace {
            Namespace::Home => &mut state.source.home_generation,
            Namespace::Own => &mut state.destination.generation,
            _ => &mut state.source.attempt_generation,
        };
        if *newest == put.generation {
            *newest -= 1;
        }
    }

    /// The answer arrives at the writer (rules 10 and 11).
    fn put_answered(&self, state: &mut State, put: Put) {
        let entry = state.stores.namespaces[put.namespace as usize].incarnation;
        let (stored, incarnation) = match put.answer {
            PutAnswer::Stored(incarnation) => (true, incarnation),
            PutAnswer::Refused(incarnation) => (false, incarnation),
            PutAnswer::Requested => unreachable!("an answer has come"),
        };
        let changed = incarnation != entry && self.has(Rule::IncarnationOfPuts);
        let waits = self.waits_for(state, put);
        if !stored || changed {
            self.put_failed(state, put);
            if changed && put.namespace == state.source.attempt {
                self.attempt_changed(state);
            }
            return;
        }
        let page = put.page as usize;
        let after_check = !self.has(Rule::OutOfReachFirst);
        if let Some(eviction) = self.eviction_of(state, put) {
            if !waits {
                return;
            }
            if after_check {
                *eviction = Eviction::Checked(put.generation);
                return;
            }
        }
        let at_destination = state.destination.phase == DestinationPhase::Running;
        match put.namespace {
            Namespace::Own => {
                let stored = Stored { namespace: put.namespace, generation: put.generation };
                state.destination.pages[page].evicted(stored);
            }
            Namespace::Home if at_destination && !self.has(Rule::OwnNamespaces) => {
                let stored = Stored { namespace: put.namespace, generation: put.generation };
                state.destination.pages[page].evicted(stored);
            }
            Namespace::Home => {
                let own = &mut state.source.pages[page];
                own.home = Some(put.generation);
                own.attempt = None;
                own.ram = None;
                own.eviction = Eviction::None;
            }
            _ => {
                let claimed_before = !self.has(Rule::AcknowledgementForClaim) && put.namespace == state.source.attempt;
                let own = &mut state.source.pages[page];
                if waits || claimed_before && own.attempt.is_none() {
                    own.claimed = None;
                    own.attempt = Some(put.generation);
                }
            }
        }
    }

    /// The attempt's store has another incarnation: its pages are unacknowledged at once (rule 11).
    fn attempt_changed(&self, state: &mut State) {
        state.source.attempt_lost = true;
        state.source.vacated = false;
        for page in &mut state.source.pages {
            page.attempt = None;
            if page.announced.is_some_and(|stored| stored.namespace.is_attempt()) {
                page.announced = None;
            }
        }
    }

    /// A get is answered, its answer arrives, or the reader stops waiting for it.
    fn get_steps(&self, state: &State, slot: usize, get: Get, next: &mut Next<State>) {
        let page = get.page as usize;
        let room = !(state.network.connected && state.network.to_source.is_full());
        match get.answer {
            None if self.is_silent(state, get.stored.namespace) && room => {
                next.page("a get from a silent store fails at its deadline", page, |state| {
                    state.network.gets[slot] = None;
                    self.got(state, page, get.stored, None);
                });
            }
            None if self.is_silent(state, get.stored.namespace) => (),
            None => next.page("the store answers a get", page, |state| {
                let answer = self.read(state, page, get.stored);
                state.network.gets[slot] = Some(Get { answer: Some(answer), ..get });
            }),
            Some(_) if !room => (),
            Some(content) => next.page("the answer to a get arrives", page, |state| {
                state.network.gets[slot] = None;
                self.got(state, page, get.stored, content);
                let installed = state.destination.pages[page].location == Location::Here;
                if installed && !self.has(Rule::NoDiscard) && state.destination.pages[page].kept.is_some() {
                    state.stores.discard = Some((get.stored.namespace, get.page));
                }
            }),
        }
        if state.left.late_gets > 0 && state.destination.pages[page].getting == Some(get.stored) {
            next.page("the reader of a get stops waiting", page, |state| {
                state.left.late_gets -= 1;
                state.destination.pages[page].getting = None;
            });
        }
    }

    /// A `create` and a discard that are on their way.
    fn late_messages(&self, state: &State, next: &mut Next<State>) {
        for namespace in Namespace::ALL {
            let forgotten = match state.stores.namespaces[namespace as usize].state {
                NamespaceState::Creating => false,
                NamespaceState::ForgottenCreating => true,
                _ => continue,
            };
            next.step("the store applies a late `create`", |state| {
                let refused = forgotten && self.has(Rule::ForgottenIdsRemembered);
                let kept = &mut state.stores.namespaces[namespace as usize];
                kept.state = if refused { NamespaceState::Forgotten } else { NamespaceState::Present };
            });
        }
        if let Some((namespace, page)) = state.stores.discard {
            next.page("the store discards the page", page as usize, |state| {
                state.stores.discard = None;
                state.stores.namespaces[namespace as usize].values[page as usize] = None;
            });
        }
    }

    /// The link is cut, and comes back (rule 18).
    fn cuts(&self, state: &State, next: &mut Next<State>) {
        let phase = state.source.phase;
        let migrating = (SourcePhase::Connecting..=SourcePhase::Serving).contains(&phase);
        if migrating && state.network.connected && state.left.cuts > 0 {
            next.step("the link is cut", |state| {
                state.left.cuts -= 1;
                self.cut(state);
            });
        }
        if migrating && !state.network.connected && state.destination.phase != DestinationPhase::Dead {
            next.step("the source reattaches", |state| self.reattach(state));
        }
    }

    fn cut(&self, state: &mut State) {
        let bulk = state.network.bulk;
        state.network.end_lanes();
        state.destination.vacated = false;
        if !self.has(Rule::OldLanesEnd) {
            state.network.old_lane = bulk;
        }
        if self.has(Rule::AskAgainAfterCut) {
            for page in &mut state.destination.pages {
                page.demanded = false;
            }
        }
    }

    fn reattach(&self, state: &mut State) {
        state.network.connected = true;
        if state.source.entry == Entry::Sent && self.has(Rule::TableRepeated) {
            state.source.entry = Entry::Unsent;
        }
        if !self.has(Rule::GenerationsGoOn) {
            state.source.attempt_generation = 0;
        }
        if state.source.phase <= SourcePhase::HandedOver {
            if self.has(Rule::UnacknowledgedIsNeither) || state.destination.phase == DestinationPhase::Absent {
                self.begin(state);
            } else {
                state.source.phase = SourcePhase::Rounds;
                state.destination.phase = DestinationPhase::Prepared;
            }
            return;
        }
        state.source.vacated = false;
        if state.destination.phase == DestinationPhase::Ready {
            state.network.to_destination.push(ToDestination::Run);
        }
        if state.destination.released && self.has(Rule::ReleasedIsRepeated) {
            state.network.to_source.push(ToSource::Released);
        }
        for page in (0..self.pages).filter(|_| self.has(Rule::DestinationLists)) {
            let listed = state.destination.pages[page].location == Location::Source;
            state.source.pages[page].sent = !listed;
            if listed {
                state.source.pages[page].announced = None;
            }
        }
    }

    /// The source crashes after the hand-over, or the destination before *run*.
    fn crashes(&self, state: &State, next: &mut Next<State>) {
        let phase = state.source.phase;
        if state.left.source_crashes > 0 && matches!(phase, SourcePhase::HandedOver | SourcePhase::Serving) {
            next.step("the source crashes", |state| {
                state.left.source_crashes -= 1;
                self.fault(state, |state| {
                    state.source.free();
                    state.source.phase = SourcePhase::Dead;
                    self.cut(state);
                    state.network.old_lane = Queue::EMPTY;
                });
            });
        }
        let before_run = matches!(state.destination.phase, DestinationPhase::Prepared | DestinationPhase::Ready);
        if state.left.destination_crashes > 0 && before_run && phase <= SourcePhase::HandedOver {
            next.step("the destination crashes", |state| {
                state.left.destination_crashes -= 1;
                self.cut(state);
                state.network.old_lane = Queue::EMPTY;
                state.network.gets = [None; 2];
                state.destination = Destination::new();
                state.destination.phase = DestinationPhase::Dead;
            });
        }
    }

    /// A store loses everything, or the newest put of one page (rules 3 and 11). Its incarnation
    /// changes.
    fn losses(&self, state: &State, next: &mut Next<State>) {
        if state.left.restarts > 0 {
            for store in 0..self.stores {
                next.step("a store restarts and is empty", |state| {
                    state.left.restarts -= 1;
                    self.fault(state, |state| self.restart(state, store));
                });
            }
        }
        if state.left.silences > 0 {
            for store in 0..self.stores {
                next.step("a store falls silent", |state| {
                    state.left.silences -= 1;
                    self.fault(state, |state| {
                        state.stores.silent[store] = true;
                        self.excuse_all_acknowledged(state, store);
                    });
                });
            }
        }
        for store in (0..self.stores).filter(|&store| self.returns && state.stores.silent[store]) {
            next.step("a silent store answers again", |state| state.stores.silent[store] = false);
        }
        self.removals(state, next);
        if state.left.partial_losses == 0 {
            return;
        }
        for (namespace, page) in Namespace::ALL.into_iter().flat_map(|namespace| [(namespace, 0), (namespace, 1)]) {
            let kept = &state.stores.namespaces[namespace as usize];
            if kept.values[page].is_none() {
                continue;
            }
            next.page("a store falls back to an older put of a page", page, |state| {
                state.left.partial_losses -= 1;
                self.fault(state, |state| {
                    state.stores.incarnations[self.store_of(namespace)] += 1;
                    let kept = &mut state.stores.namespaces[namespace as usize];
                    kept.values[page] = kept.older[page].take();
                    self.excuse_acknowledged(state, namespace, page);
                });
            });
        }
    }

    /// A person removes a namespace that is in use, against rule 14. The incarnation does not
    /// change.
    fn removals(&self, state: &State, next: &mut Next<State>) {
        for namespace in [Namespace::Home, Namespace::Attempt] {
            let present = state.stores.namespaces[namespace as usize].state == NamespaceState::Present;
            if state.left.removals == 0 || !present {
                continue;
            }
            next.step("a person removes a namespace that is in use", |state| {
                state.left.removals -= 1;
                self.fault(state, |state| {
                    state.stores.forget(namespace);
                    for page in 0..self.pages {
                        self.excuse_acknowledged(state, namespace, page);
                    }
                });
            });
        }
    }

    fn restart(&self, state: &mut State, store: usize) {
        state.stores.incarnations[store] += 1;
        for namespace in Namespace::ALL {
            let absent = state.stores.namespaces[namespace as usize].state == NamespaceState::Absent;
            if self.store_of(namespace) == store && !absent {
                state.stores.forget(namespace);
            }
        }
        self.excuse_all_acknowledged(state, store);
    }

    fn excuse_all_acknowledged(&self, state: &mut State, store: usize) {
        for namespace in Namespace::ALL {
            for page in (0..self.pages).filter(|_| self.store_of(namespace) == store) {
                self.excuse_acknowledged(state, namespace, page);
            }
        }
    }

    /// Excuses an eviction whose put had succeeded: the loss came after the acknowledgement, which
    /// is on its way. Excuses also a page that is only in the store since *released*.
    fn excuse_acknowledged(&self, state: &mut State, namespace: Namespace, page: usize) {
        let acknowledged = |put: &Put| {
            let same = put.namespace == namespace && put.page as usize == page && !namespace.is_attempt();
            same && matches!(put.answer, PutAnswer::Stored(_))
        };
        let under_way = state.network.puts.iter().flatten().any(acknowledged);
        let located = match state.destination.pages[page].location {
            Location::Stored(stored) => stored.namespace == namespace,
            _ => false,
        };
        if under_way || located && state.destination.released {
            state.excused[page] = true;
        }
    }
}
