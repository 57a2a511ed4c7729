//! Quick eviction: a copy of the VM is kept ready in a store, and on a command only what is dirty
//! moves.

use std::time::Duration;

use super::{Done, Place, PushOrder, Running, Strategy, Until, Wake};
use crate::MigrationError;

/// Quick eviction (Fernando et al., "Quick Eviction of Virtual Machines Through Proactive Live
/// Snapshots", UCC 2016, section III): the running VM is staged in a store, in increments that a
/// threshold and a transfer limit space. A command names the destination. What the store does not
/// have yet then moves, and the source is free.
///
/// In the paper the VM then goes on as in pre-copy, so that a guest that writes much is down for
/// seconds, and a VM that is staged at a third host moves a second time from there. This one ends
/// with post-copy: the pause carries no page, and the destination reads the stage itself. The
/// increments are never a consistent state of their own, and nothing resumes from one.
///
/// A store that fails does not end the protection: pages that it lacks are put later, or move in
/// the end. Neither does a destination that refuses: the next command may name another one.
///
/// The engine runs it by [`stage`](crate::engine::stage), and the [simulator](crate::sim) as any
/// other strategy.
pub struct QuickEviction {
    /// Where the copy is kept: a [stage](Place::stage).
    pub stage: Place,
    /// The time between two increments.
    pub interval: Duration,
    /// The fewest pages of an increment. With fewer dirty pages it is left out.
    pub threshold: u64,
    /// The most pages of an increment. The others are part of the next one.
    pub most: u64,
    /// What becomes of the pages that are dirty when the guest is paused.
    pub finish: Finish,
    /// In which order pages are pushed that only the source has.
    pub order: Box<dyn PushOrder>,
}

/// What becomes of the pages that the copy of a VM lacks when the VM moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Finish {
    /// They follow when the guest runs at the destination. The pause carries no page.
    #[default]
    PostCopy,
    /// They are sent in the pause: the guest never waits for one of them afterwards. It still reads
    /// staged pages from the store.
    Stop,
}

impl Strategy for QuickEviction {
    fn name(&self) -> &'static str {
        "quick-eviction"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        vec![self.stage.clone()]
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn connects_itself(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        // only what is not staged already
        let mut dirty = vm.start_tracking()?;
        loop {
            if dirty.len() >= self.threshold {
                vm.put(&mut dirty, self.stage.at_most(self.most))?.or_keep_for_later();
            }
            if let Wake::Command(to) = vm.wait(Until::command().or_after(self.interval))? {
                match vm.connect(&to) {
                    Ok(()) => break,
                    Err(error) => vm.report(&error),
                }
            }
            dirty = vm.harvest()?;
        }
        let dirty = vm.harvest()?;
        let mut vm = vm.pause()?;
        let missing = match self.finish {
            Finish::PostCopy => dirty,
            Finish::Stop => {
                vm.send_rest(dirty)?;
                vm.no_pages()
            }
        };
        vm.hand_over(missing)?.serve(&mut *self.order)
    }
}
