//! A hand-over between two processes of one host that share the VM's memory file, while a page is
//! in a store.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Successor {
    pub rules: Rules,
    pub writes: u8,
}

/// Who runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Predecessor,
    /// The guest is paused. The state goes to the successor.
    Paused,
    Successor,
    /// The VM was ended in order.
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Location {
    Here,
    /// In the predecessor's namespace (0) or the successor's (1), under a generation.
    Stored(usize, u8),
}

/// A put that is under way: namespace, generation, content, and which process waits for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Put {
    namespace: usize,
    generation: u8,
    content: u8,
    waits: bool,
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    newest: u8,
    phase: Phase,
    /// What the shared memory file has. `None` is a hole, which reads as zeros.
    file: Option<u8>,
    location: Location,
    /// A get of the predecessor that is under way.
    old_get: Option<(usize, u8)>,
    old_put: Option<Put>,
    new_put: Option<Put>,
    /// The generations that each process has used.
    generations: [u8; 2],
    /// The newest put of each namespace; `None` once it is forgotten.
    stores: [Option<Option<(u8, u8)>>; 2],
    /// The successor watches the pages that are not `Here`.
    registered: bool,
    zeros: bool,
    evictions: u8,
}

impl Successor {
    fn read(&self, state: &State, namespace: usize, generation: u8) -> Option<u8> {
        let value = state.stores[namespace].flatten();
        value.filter(|value| value.0 == generation).map(|value| value.1)
    }

    /// The guest and the evictions of the process that runs it.
    fn owner(&self, state: &State, next: &mut Next<State>) {
        let process = usize::from(state.phase == Phase::Successor);
        let own = if process == 1 && self.rules.has(Rule::SuccessorOwnNamespace) { 1 } else { 0 };
        let put = if process == 1 { state.new_put } else { state.old_put };
        match state.location {
            Location::Here => {
                if state.newest <= self.writes {
                    next.step("the guest writes", |state| {
                        state.newest += 1;
                        state.file = Some(state.newest);
                        let put = if process == 1 { &mut state.new_put } else { &mut state.old_put };
                        if let Some(put) = put {
                            put.waits = false;
                        }
                    });
                }
                if let (Some(content), None, true) = (state.file, put, state.evictions > 0) {
                    next.step("the owner evicts: puts the page", |state| {
                        state.evictions -= 1;
                        state.generations[process] += 1;
                        let generation = state.generations[process];
                        let put = Some(Put { namespace: own, generation, content, waits: true });
                        if process == 1 {
                            state.new_put = put;
                        } else {
                            state.old_put = put;
                        }
                    });
                }
            }
            Location::Stored(namespace, generation) if process == 0 => {
                if state.old_get.is_none() {
                    next.step("the predecessor asks the store for the page", |state| {
                        state.old_get = Some((namespace, generation));
                    });
                }
            }
            Location::Stored(namespace, generation) => {
                if !state.registered {
                    next.step("the guest touches the page, which nobody watches", |state| state.zeros = true);
                } else if let Some(content) = self.read(state, namespace, generation) {
                    next.step("the successor reads the page from the store", |state| {
                        state.file = Some(content);
                        state.location = Location::Here;
                    });
                }
            }
        }
    }

    /// Messages of both processes that are under way.
    fn messages(&self, state: &State, next: &mut Next<State>) {
        if let Some((namespace, generation)) = state.old_get {
            let content = self.read(state, namespace, generation);
            let runs = state.phase == Phase::Predecessor;
            next.step("the answer to the predecessor's get arrives", |state| {
                state.old_get = None;
                let installs = runs && state.location == Location::Stored(namespace, generation);
                let late = !runs && !self.rules.has(Rule::PredecessorInstallsNothing);
                if installs || late {
                    state.file = content.or(state.file);
                }
                if installs {
                    state.location = Location::Here;
                }
            });
        }
        for process in 0..2 {
            let Some(put) = (if process == 1 { state.new_put } else { state.old_put }) else { continue };
            next.step("the store applies a put, and its answer arrives", |state| {
                let place = &mut state.stores[put.namespace];
                let applied = match place {
                    Some(value) => {
                        if value.is_none_or(|value| value.0 < put.generation) {
                            *value = Some((put.generation, put.content));
                        }
                        true
                    }
                    None => false,
                };
                let runs = match process {
                    0 => state.phase == Phase::Predecessor,
                    _ => state.phase == Phase::Successor,
                };
                if applied && put.waits && runs {
                    state.location = Location::Stored(put.namespace, put.generation);
                    state.file = None;
                }
                if process == 1 {
                    state.new_put = None;
                } else {
                    state.old_put = None;
                }
            });
        }
    }

    fn hand_over(&self, state: &State, next: &mut Next<State>) {
        match state.phase {
            Phase::Predecessor => next.step("the predecessor pauses the guest", |state| state.phase = Phase::Paused),
            Phase::Paused => {
                let drained = state.old_get.is_none();
                if drained || !self.rules.has(Rule::PredecessorInstallsNothing) {
                    next.step("the successor runs the guest", |state| {
                        state.phase = Phase::Successor;
                        state.registered = self.rules.has(Rule::SuccessorRegistersFirst);
                        if let Some(put) = &mut state.old_put {
                            put.waits = false;
                        }
                    });
                }
            }
            Phase::Successor => {
                if !state.registered {
                    next.step("the successor watches the pages that are elsewhere", |state| state.registered = true);
                }
                let referred = matches!(state.location, Location::Stored(0, _));
                let old = state.stores[0].is_some();
                if old && !referred && self.rules.has(Rule::SuccessorOwnNamespace) {
                    next.step("the successor forgets the inherited namespace", |state| state.stores[0] = None);
                }
                next.step("the VM is ended in order", |state| {
                    state.phase = Phase::Ended;
                    state.stores[1] = None;
                    if self.rules.has(Rule::SuccessorForgetsInherited) {
                        state.stores[0] = None;
                    }
                });
            }
            Phase::Ended => (),
        }
    }
}

impl Model for Successor {
    type State = State;

    fn initial(&self) -> State {
        State {
            newest: 1,
            phase: Phase::Predecessor,
            file: Some(1),
            location: Location::Here,
            old_get: None,
            old_put: None,
            new_put: None,
            generations: [0; 2],
            stores: [Some(None); 2],
            registered: false,
            zeros: false,
            evictions: 3,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        if matches!(state.phase, Phase::Predecessor | Phase::Successor) {
            self.owner(state, next);
        }
        self.messages(state, next);
        self.hand_over(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.phase == Phase::Ended {
            return None;
        }
        let newest = Some(state.newest);
        match state.location {
            _ if state.zeros => Some(Violation::WrongContent),
            Location::Here if state.file != newest => Some(Violation::WrongContent),
            Location::Stored(namespace, generation) if self.read(state, namespace, generation) != newest => {
                Some(Violation::ContentLost)
            }
            _ => None,
        }
    }

    fn settled(&self, state: &State) -> bool {
        state.phase == Phase::Ended
    }

    fn clean(&self, state: &State) -> bool {
        state.stores == [None; 2]
    }
}
