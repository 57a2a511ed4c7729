//! Post-copy: hands the VM over first, then moves each page once. Also its combination with
//! pre-copy.

use super::{Done, PushOrder, Running, Strategy};
use crate::MigrationError;

/// Post-copy (Hines, Deshpande and Gopalan, VEE 2009 and OSR 2009). The guest runs at the
/// destination as soon as its vCPUs and devices are there. Pages that it touches are sent at once.
/// All other pages are pushed in an order that can be replaced. No page moves twice, whatever the
/// guest writes.
pub struct PostCopy {
    /// The order in which pages are pushed.
    pub order: Box<dyn PushOrder>,
}

impl Strategy for PostCopy {
    fn name(&self) -> &'static str {
        "post-copy"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        vm.pause()?.hand_over(pages)?.serve(&mut *self.order)
    }
}

/// Pre-copy for some rounds, then post-copy of the pages that were dirtied in the last one (section
/// 3.4 of the OSR paper). It has fewer faults than post-copy, and its end does not depend on how
/// fast the guest writes.
pub struct Hybrid {
    /// The number of rounds before the hand-over, 1 or more.
    pub rounds: u32,
    /// The order in which pages are pushed after the hand-over.
    pub order: Box<dyn PushOrder>,
}

impl Strategy for Hybrid {
    fn name(&self) -> &'static str {
        "hybrid"
    }

    fn can_switch_over(&self) -> bool {
        true
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut pages = vm.start_tracking()?;
        for _ in 0..self.rounds {
            if vm.link().post_copy_wanted || vm.switch_over_wanted() {
                break;
            }
            vm.send(&pages)?;
            pages = vm.harvest()?;
        }
        vm.pause()?.hand_over(pages)?.serve(&mut *self.order)
    }
}
