//! Post-copy: hand the VM over first, then move each page once. And the hybrid of it and pre-copy.

use super::{Done, PushOrder, Running, Strategy};
use crate::MigrationError;

/// Post-copy (Hines, Deshpande and Gopalan, VEE 2009 and OSR 2009): the guest runs at the
/// destination as soon as its vCPUs and devices are there. Pages that it touches come at once, all
/// others are pushed meanwhile, in an order that can be replaced. No page moves twice, whatever the
/// guest writes.
pub struct PostCopy {
    /// In which order pages are pushed.
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

/// Pre-copy for some rounds, then post-copy of what was dirtied meanwhile (section 3.4 of the OSR
/// paper): fewer faults than post-copy, and an end that does not depend on how fast the guest
/// writes.
pub struct Hybrid {
    /// Rounds before the hand-over, 1 or more.
    pub rounds: u32,
    /// In which order pages are pushed after it.
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
