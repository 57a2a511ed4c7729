//! Agile migration: the working set moves, and cold pages stay in the store where they are.

use super::{Done, PushOrder, Running, Strategy};
use crate::MigrationError;

/// Agile migration (Deshpande et al., "Agile Live Migration of Virtual Machines", IPDPS 2016,
/// sections III and IV.C): one live round of the pages that are resident, then post-copy of the
/// pages that were dirtied during the round. Of pages that were evicted to a store only the
/// locations move, and the destination reads the pages there.
///
/// A VM of which no page is in a store moves as with a [`Hybrid`](super::Hybrid) of one round. The
/// engine finds the pages that are in stores by
/// [`SourceVm::paged_memory`](crate::vm::SourceVm::paged_memory).
pub struct Agile {
    /// The order in which pages are pushed that were dirtied during the round.
    pub order: Box<dyn PushOrder>,
}

impl Strategy for Agile {
    fn name(&self) -> &'static str {
        "agile"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        // pages that are in a store are not among these
        let resident = vm.start_tracking()?;
        vm.send(&resident)?;
        let dirtied = vm.harvest()?;
        vm.pause()?.hand_over(dirtied)?.serve(&mut *self.order)
    }
}
