//! Quick eviction: keeps a copy of the VM ready in a store, so that on a command only the dirty
//! pages move.

use std::time::Duration;

use super::{Done, Place, PushOrder, Running, Strategy, Until, Wake};
use crate::MigrationError;

/// Quick eviction (Fernando et al., "Quick Eviction of Virtual Machines Through Proactive Live
/// Snapshots", UCC 2016, section III). The running VM is staged in a store, in increments that are
/// limited by a threshold and a transfer limit. A command names the destination. The pages that the
/// store does not have yet then move, and the source is free.
///
/// In the paper the VM then continues as in pre-copy. So a guest that writes much is down for
/// seconds, and a VM that is staged at a third host moves a second time from there. This strategy
/// ends with post-copy: the pause moves no page, and the destination reads the stage itself. The
/// increments are never a consistent state of their own, and nothing resumes from one.
///
/// A store that fails does not end the protection: pages that it does not have are put later, or
/// move at the end. A destination that refuses does not end it either: the next command may name
/// another one.
///
/// The engine runs this strategy by [`stage`](crate::engine::stage). The [simulator](crate::sim)
/// runs it like any other strategy.
pub struct QuickEviction {
    /// The place of the copy: a [stage](Place::stage).
    pub stage: Place,
    /// The time between two increments.
    pub interval: Duration,
    /// The smallest number of pages of an increment. An increment with fewer dirty pages is
    /// skipped.
    pub threshold: u64,
    /// The largest number of pages of an increment. The others are part of the next one.
    pub most: u64,
    /// How the pages move that are dirty when the guest is paused.
    pub finish: Finish,
    /// The order in which pages are pushed that only the source has.
    pub order: Box<dyn PushOrder>,
}

/// How the pages move that are not in the copy of a VM when the VM moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Finish {
    /// The pages follow when the guest runs at the destination. The pause moves no page.
    #[default]
    PostCopy,
    /// The pages are sent in the pause, so the guest never waits for one of them afterwards. It
    /// still reads staged pages from the store.
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
        // pages that are staged already are not among these
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
