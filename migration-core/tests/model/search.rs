//! A breadth-first search through every state that a model can reach.
//!
//! The search is exact: it keeps every state, and compares states, not only their hashes. It
//! answers three questions. Does a state break a property? Is there a state from which the end can
//! no longer be reached? Is there a state from which the end can be reached, but only with
//! something left over? The second and third need the graph of all steps, and a walk backwards
//! through it from the ends.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// What can go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// The guest reads content that is older than the newest, or zeros for a page that is missing.
    WrongContent,
    /// The newest content of a page cannot be obtained any more, and the fault that happened does
    /// not explain it.
    ContentLost,
    /// Two hosts run the guest.
    TwoOwners,
    /// The end cannot be reached any more: a fault waits for ever, or the source is never released.
    Stuck,
    /// The end is reached only with a namespace that nobody will forget, or without a record of
    /// one.
    LeftOver,
    /// A page travels twice although nothing failed.
    SentTwice,
    /// A bound of the design is exceeded.
    BoundExceeded,
}

/// A set of rules at work: an initial state, the steps that are possible, and the properties.
pub trait Model {
    /// Everything that can change.
    type State: Clone + Eq + Hash;

    /// Returns the state in which the search begins.
    fn initial(&self) -> Self::State;

    /// Adds to `next` every step that is possible in `state`.
    fn steps(&self, state: &Self::State, next: &mut Next<Self::State>);

    /// Brings `state` into one of several equal forms, for instance by sorting messages without an
    /// order.
    fn normalise(&self, _state: &mut Self::State) {}

    /// Returns the property that `state` breaks.
    fn violation(&self, state: &Self::State) -> Option<Violation>;

    /// Returns whether nothing is left to do for the VM: no fault waits, and every party that is
    /// alive is done.
    fn settled(&self, state: &Self::State) -> bool;

    /// Returns whether nothing is left over. Asked only of settled states.
    fn clean(&self, _state: &Self::State) -> bool {
        true
    }
}

/// One step: what happened, and to which page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Step {
    what: &'static str,
    page: Option<u8>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page {
            None => f.write_str(self.what),
            Some(page) => write!(f, "{} (page {page})", self.what),
        }
    }
}

/// The steps that are possible in one state.
pub struct Next<S> {
    from: S,
    found: Vec<(Step, S)>,
}

impl<S: Clone> Next<S> {
    /// Adds the step `what`, which makes `change`.
    pub fn step(&mut self, what: &'static str, change: impl FnOnce(&mut S)) {
        self.add(Step { what, page: None }, change);
    }

    /// Adds the step `what`, which happens to `page`.
    pub fn page(&mut self, what: &'static str, page: usize, change: impl FnOnce(&mut S)) {
        self.add(Step { what, page: Some(page as u8) }, change);
    }

    fn add(&mut self, step: Step, change: impl FnOnce(&mut S)) {
        let mut state = self.from.clone();
        change(&mut state);
        self.found.push((step, state));
    }
}

/// The shortest way to a violation.
pub struct Counterexample {
    /// The property that is broken at its end.
    pub violation: Violation,
    /// The steps from the initial state.
    pub steps: Vec<Step>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} after {} steps", self.violation, self.steps.len())?;
        for step in &self.steps {
            write!(f, "\n    {step}")?;
        }
        Ok(())
    }
}

/// What a search has found.
pub struct Explored {
    /// The number of different states.
    pub states: usize,
    /// Whether the search ended before it had seen all states, because there were more than it was
    /// allowed to keep.
    pub truncated: bool,
    /// The shortest counterexample.
    pub counterexample: Option<Counterexample>,
}

/// Explores all states of `model`, breadth first, up to `limit` states.
pub fn explore<M: Model>(model: &M, limit: usize) -> Explored {
    let mut graph = Graph::new(model);
    let mut broken = None;
    let mut at = 0;
    while at < graph.states.len() && broken.is_none() && graph.states.len() <= limit {
        for (_, state) in graph.successors(at) {
            let violation = model.violation(&state);
            let (id, new) = graph.insert(state, at);
            if new && let Some(violation) = violation {
                broken = Some((id, violation));
                break;
            }
        }
        at += 1;
    }
    let truncated = broken.is_none() && at < graph.states.len();
    if broken.is_none() && !truncated {
        let settled = |state: &M::State| model.settled(state);
        let clean = |state: &M::State| model.settled(state) && model.clean(state);
        broken = graph.cut_off_from(settled).map(|id| (id, Violation::Stuck));
        broken = broken.or_else(|| graph.cut_off_from(clean).map(|id| (id, Violation::LeftOver)));
    }
    let counterexample = broken.map(|(id, violation)| Counterexample { violation, steps: graph.way_to(id) });
    Explored { states: graph.states.len(), truncated, counterexample }
}

struct Graph<'a, M: Model> {
    model: &'a M,
    states: Vec<M::State>,
    parents: Vec<u32>,
    edges: Vec<(u32, u32)>,
    ids: HashMap<u64, u32, BuildHasherDefault<Mixer>>,
}

impl<'a, M: Model> Graph<'a, M> {
    fn new(model: &'a M) -> Self {
        let mut graph = Graph { model, states: vec![], parents: vec![], edges: vec![], ids: HashMap::default() };
        graph.insert(model.initial(), 0);
        graph.edges.clear();
        graph
    }

    fn successors(&self, at: usize) -> Vec<(Step, M::State)> {
        let mut next = Next { from: self.states[at].clone(), found: Vec::with_capacity(16) };
        self.model.steps(&self.states[at], &mut next);
        for (_, state) in &mut next.found {
            self.model.normalise(state);
        }
        next.found
    }

    /// Records that `state` follows the state `from`. Returns its number, and whether it is new.
    fn insert(&mut self, state: M::State, from: usize) -> (usize, bool) {
        let mut hasher = Mixer::default();
        state.hash(&mut hasher);
        let mut key = hasher.finish();
        let new = self.states.len() as u32;
        loop {
            let id = *self.ids.entry(key).or_insert(new);
            if id == new {
                self.states.push(state);
                self.parents.push(from as u32);
            } else if self.states[id as usize] != state {
                key = key.wrapping_add(1);
                continue;
            }
            self.edges.push((id, from as u32));
            return (id as usize, id == new);
        }
    }

    /// Returns the first state from which no state that is an `end` can be reached.
    fn cut_off_from(&mut self, end: impl Fn(&M::State) -> bool) -> Option<usize> {
        self.edges.sort_unstable();
        let mut reaches: Vec<bool> = self.states.iter().map(end).collect();
        let mut open: Vec<u32> = (0..self.states.len() as u32).filter(|&id| reaches[id as usize]).collect();
        while let Some(id) = open.pop() {
            let first = self.edges.partition_point(|&(to, _)| to < id);
            for &(_, from) in self.edges[first..].iter().take_while(|&&(to, _)| to == id) {
                if !reaches[from as usize] {
                    reaches[from as usize] = true;
                    open.push(from);
                }
            }
        }
        reaches.iter().position(|&reaches| !reaches)
    }

    fn way_to(&self, id: usize) -> Vec<Step> {
        let mut ids = vec![id];
        while ids[ids.len() - 1] != 0 {
            ids.push(self.parents[ids[ids.len() - 1]] as usize);
        }
        ids.reverse();
        let step = |pair: &[usize]| {
            let mut steps = self.successors(pair[0]).into_iter();
            steps.find(|(_, state)| *state == self.states[pair[1]]).expect("the parent has this successor").0
        };
        ids.windows(2).map(step).collect()
    }
}

/// A fast hash for small fields. The default one of the standard library would take most of the
/// time of a search.
#[derive(Default)]
struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        let folded = (self.0 ^ (self.0 >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        folded ^ (folded >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(7) ^ value).wrapping_mul(0xd6e8_feb8_6659_fd93);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}
