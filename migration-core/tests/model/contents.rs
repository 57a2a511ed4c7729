//! Content that several VMs share (gang): claims, hashes, references and `forget`.
//!
//! Two VMs have one page each, with the same content at first. The content's hash is its number;
//! what a store keeps under a hash may be something else if a rule is missing.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

const VMS: usize = 2;
const CONTENTS: usize = 3;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    pub rules: Rules,
    /// Whether the answer to `reference` may be lost, so that the request is repeated.
    pub lost_answers: bool,
    /// Whether a VM that has claimed a content may crash.
    pub crash: bool,
    /// Whether the store may hand out other bytes than were put.
    pub corrupt: bool,
    /// Whether each VM has two pages with one content, and gives them up one by one.
    pub twin_pages: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// The page has no location.
    Unplaced,
    /// The store has answered that the content exists, without holding it (only without the atomic
    /// step).
    Exists(u8),
    /// The VM has claimed the content and copied and hashed the page. The copy is kept.
    Claimed {
        hash: u8,
        copy: u8,
    },
    /// The put of the claimed content is done.
    Located(u8),
    /// The page was sent directly.
    Sent,
    /// The destination has read the page.
    Read,
    /// The namespace is forgotten.
    Forgotten,
    Crashed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Vm {
    /// What the guest's page contains.
    page: u8,
    phase: Phase,
    /// The pages of this VM that still need the content (only with `twin_pages`).
    readers: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Content {
    /// What is stored under this hash.
    stored: Option<u8>,
    claimed: Option<u8>,
    /// How often each VM's namespace refers to it. The design's set has 0 or 1.
    references: [u8; VMS],
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    vms: [Vm; VMS],
    contents: [Content; CONTENTS],
    writes: u8,
    repeats: u8,
    wrong: bool,
    lost: bool,
}

impl Contents {
    fn refer(&self, content: &mut Content, vm: usize) {
        if self.rules.has(Rule::ReferencesAreASet) {
            content.references[vm] = 1;
        } else {
            content.references[vm] += 1;
        }
    }

    /// `reference`: returns whether the content exists, and holds it, in one step.
    fn reference(&self, state: &State, vm: usize, next: &mut Next<State>) {
        let hash = state.vms[vm].page;
        let content = &state.contents[hash as usize];
        if content.stored.is_some() && self.rules.has(Rule::ReferenceIsAtomic) {
            next.page("a VM refers to a content that exists", vm, |state| {
                self.refer(&mut state.contents[hash as usize], vm);
                state.vms[vm].phase = Phase::Located(hash);
            });
            if self.lost_answers && state.repeats > 0 {
                next.page("a VM refers to a content, and the answer is lost", vm, |state| {
                    state.repeats -= 1;
                    self.refer(&mut state.contents[hash as usize], vm);
                });
            }
        }
        if content.stored.is_some() && !self.rules.has(Rule::ReferenceIsAtomic) {
            next.page("a VM asks whether a content exists", vm, |state| {
                state.vms[vm].phase = Phase::Exists(hash);
            });
        }
        if content.stored.is_none() && content.claimed.is_none() {
            next.page("a VM claims a content, copies the page and hashes the copy", vm, |state| {
                state.contents[hash as usize].claimed = Some(vm as u8);
                state.vms[vm].phase = Phase::Claimed { hash, copy: hash };
            });
        }
        let waits = content.claimed.is_some();
        if !waits || self.rules.has(Rule::WaiterSendsDirectly) {
            next.page("a VM sends the page directly", vm, |state| state.vms[vm].phase = Phase::Sent);
        }
    }

    fn vm(&self, state: &State, vm: usize, next: &mut Next<State>) {
        let own = state.vms[vm];
        match own.phase {
            Phase::Unplaced => self.reference(state, vm, next),
            Phase::Exists(hash) => next.page("a VM refers to the content that it asked for", vm, |state| {
                self.refer(&mut state.contents[hash as usize], vm);
                state.vms[vm].phase = Phase::Located(hash);
            }),
            Phase::Claimed { hash, copy } => next.page("a VM puts the content that it claimed", vm, |state| {
                let put = if self.rules.has(Rule::CopyIsHashed) { copy } else { own.page };
                let content = &mut state.contents[hash as usize];
                content.claimed = None;
                content.stored = Some(put);
                self.refer(content, vm);
                let current = own.page == hash || !self.rules.has(Rule::CopyIsHashed);
                state.vms[vm].phase = if current { Phase::Located(hash) } else { Phase::Unplaced };
            }),
            Phase::Located(hash) => self.read(state, vm, hash, next),
            Phase::Sent | Phase::Read => next.page("a VM's namespace is forgotten", vm, |state| {
                state.vms[vm].phase = Phase::Forgotten;
                self.forget(state, vm);
            }),
            Phase::Forgotten | Phase::Crashed => (),
        }
        if matches!(own.phase, Phase::Unplaced | Phase::Exists(_) | Phase::Claimed { .. }) && state.writes > 0 {
            next.page("a guest writes", vm, |state| {
                state.writes -= 1;
                state.vms[vm].page = CONTENTS as u8 - 1;
                if let Phase::Exists(_) = own.phase {
                    state.vms[vm].phase = Phase::Unplaced;
                }
            });
        }
        if self.crash && matches!(own.phase, Phase::Claimed { .. }) {
            next.page("a VM that has claimed a content crashes", vm, |state| {
                state.vms[vm].phase = Phase::Crashed;
                self.forget(state, vm);
            });
        }
    }

    /// The destination reads the content of a located page.
    fn read(&self, state: &State, vm: usize, hash: u8, next: &mut Next<State>) {
        let stored = state.contents[hash as usize].stored;
        next.page("the destination reads the content", vm, |state| {
            state.vms[vm].readers -= 1;
            let confirmed = stored == Some(hash) || !self.rules.has(Rule::HashConfirmed);
            match stored {
                Some(content) if confirmed => state.wrong |= content != state.vms[vm].page,
                Some(_) => (), // the page is missing: the source, which holds it, is asked
                None => state.lost = true,
            }
            if !self.rules.has(Rule::ReleasedByForget) {
                state.contents[hash as usize].references[vm] = 0;
                self.collect(state);
            }
            if state.vms[vm].readers == 0 {
                state.vms[vm].phase = Phase::Read;
            }
        });
    }

    /// Forgets a VM's namespace. A set loses its member; a count is lowered by the one that the VM
    /// knows of.
    fn forget(&self, state: &mut State, vm: usize) {
        for content in &mut state.contents {
            content.references[vm] = content.references[vm].saturating_sub(1);
        }
        self.collect(state);
    }

    fn collect(&self, state: &mut State) {
        for content in &mut state.contents {
            if content.references == [0; VMS] {
                content.stored = None;
            }
        }
    }
}

impl Model for Contents {
    type State = State;

    fn initial(&self) -> State {
        let readers = if self.twin_pages { 2 } else { 1 };
        State {
            vms: [Vm { page: 1, phase: Phase::Unplaced, readers }; VMS],
            contents: [Content { stored: None, claimed: None, references: [0; VMS] }; CONTENTS],
            writes: 1,
            repeats: 1,
            wrong: false,
            lost: false,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        for vm in 0..VMS {
            self.vm(state, vm, next);
        }
        for hash in 0..CONTENTS {
            let claimer = state.contents[hash].claimed;
            let dead = claimer.is_some_and(|vm| state.vms[vm as usize].phase == Phase::Crashed);
            if dead && self.rules.has(Rule::ClaimHasLease) {
                next.step("the lease of a claim ends", |state| state.contents[hash].claimed = None);
            }
            if self.corrupt && state.contents[hash].stored == Some(hash as u8) && state.repeats > 0 {
                next.step("the store damages a content", |state| {
                    state.repeats -= 1;
                    state.contents[hash].stored = Some(0);
                });
            }
        }
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.wrong {
            return Some(Violation::WrongContent);
        }
        state.lost.then_some(Violation::ContentLost)
    }

    fn settled(&self, state: &State) -> bool {
        state.vms.iter().all(|vm| matches!(vm.phase, Phase::Forgotten | Phase::Crashed))
    }

    fn clean(&self, state: &State) -> bool {
        state.contents.iter().all(|content| content.stored.is_none())
    }
}
