//! Blocks of two pages whose locations differ (rule 6). One page of each block is in a store, the
//! other at the source.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

const BLOCKS: usize = 2;
const PARTS: usize = 2;
/// How many blocks may be gathered at once.
const BUFFERS: usize = 1;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub rules: Rules,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Location {
    Here,
    Source,
    Stored,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Block {
    locations: [Location; PARTS],
    /// A fault waits for the block.
    faulted: bool,
    served: bool,
    /// The buffer that gathers the block: which parts it has.
    buffer: Option<[bool; PARTS]>,
    /// A request for each part is on its way.
    asked: [bool; PARTS],
    /// The page is mapped at the destination, with content or as zeros.
    mapped: [Option<bool>; PARTS],
    /// The second page is put into a store while the block is gathered.
    relocated: bool,
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    blocks: [Block; BLOCKS],
    /// A push of the second page of the first block is on its way.
    pushed: bool,
    sent: bool,
    over: bool,
}

impl Blocks {
    /// Returns whether the source has the page in its RAM. The first page of each block is only in
    /// the store.
    fn source_has(part: usize) -> bool {
        part == 1
    }

    fn gather(&self, state: &State, at: usize, next: &mut Next<State>) {
        let block = state.blocks[at];
        if !block.faulted && !block.served {
            next.page("the guest faults on a block", at, |state| state.blocks[at].faulted = true);
        }
        let used = state.blocks.iter().filter(|block| block.buffer.is_some()).count();
        let free = used < BUFFERS || !self.rules.has(Rule::BuffersAreBounded);
        if block.faulted && block.buffer.is_none() && free {
            next.page("the destination takes a buffer for the block", at, |state| {
                state.over |= used >= BUFFERS;
                state.blocks[at].buffer = Some([false; PARTS]);
                if !self.rules.has(Rule::WideningKeepsStores) {
                    state.blocks[at].locations = [Location::Source; PARTS];
                }
            });
        }
        let Some(buffer) = block.buffer else { return };
        for part in (0..PARTS).filter(|&part| !buffer[part]) {
            if !block.asked[part] {
                next.page("a part is asked of its location", at, |state| state.blocks[at].asked[part] = true);
                continue;
            }
            let answers = block.locations[part] == Location::Stored || Self::source_has(part);
            if answers {
                next.page("a part arrives in the buffer", at, |state| self.part_arrives(state, at, part));
            }
        }
    }

    fn part_arrives(&self, state: &mut State, at: usize, part: usize) {
        let block = &mut state.blocks[at];
        let Some(buffer) = &mut block.buffer else { return };
        buffer[part] = true;
        if self.rules.has(Rule::InstalledOnce) {
            if buffer.iter().all(|&has| has) {
                block.mapped = [Some(true); PARTS];
            }
        } else {
            // the kernel maps the whole block: what has not come yet is zeros
            let gathered = *buffer;
            block.mapped = gathered.map(Some);
        }
        if block.mapped.iter().all(Option::is_some) {
            block.faulted = false;
            block.served = true;
            block.buffer = None;
            block.locations = [Location::Here; PARTS];
        }
    }

    /// The source pushes the second page of the first block, or locates it in a store, on its own.
    fn source(&self, state: &State, next: &mut Next<State>) {
        let first = state.blocks[0];
        if first.locations[1] == Location::Source && !state.sent {
            next.page("the source pushes a page of the block", 0, |state| {
                state.sent = true;
                state.pushed = true;
            });
        }
        if state.pushed {
            next.page("the pushed page arrives", 0, |state| {
                state.pushed = false;
                let gathering = state.blocks[0].buffer.is_some_and(|buffer| !buffer[1]);
                if gathering {
                    self.part_arrives(state, 0, 1);
                }
                // without a buffer it is dropped: the page stays `Source`, and *vacated* is
                // answered with it
            });
        }
        if first.locations[1] == Location::Source && !first.relocated {
            next.page("a page of the block is located in a store", 0, |state| {
                state.blocks[0].relocated = true;
                state.blocks[0].locations[1] = Location::Stored;
            });
        }
    }
}

impl Model for Blocks {
    type State = State;

    fn initial(&self) -> State {
        let block = Block {
            locations: [Location::Stored, Location::Source],
            faulted: false,
            served: false,
            buffer: None,
            asked: [false; PARTS],
            mapped: [None; PARTS],
            relocated: false,
        };
        State { blocks: [block; BLOCKS], pushed: false, sent: false, over: false }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        for at in 0..BLOCKS {
            self.gather(state, at, next);
        }
        self.source(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.over {
            return Some(Violation::BoundExceeded);
        }
        let zeros = state.blocks.iter().any(|block| block.mapped.contains(&Some(false)));
        zeros.then_some(Violation::WrongContent)
    }

    fn settled(&self, state: &State) -> bool {
        state.blocks.iter().all(|block| block.served)
    }
}
