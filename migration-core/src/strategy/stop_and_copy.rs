//! Stop-and-copy: pauses the guest, then sends all of its RAM.

use super::{Done, Running, Strategy};
use crate::MigrationError;

/// Moves a VM that is paused during the whole migration. Of all strategies it has the shortest
/// total time and the longest downtime.
#[derive(Clone, Copy, Debug, Default)]
pub struct StopAndCopy;

impl Strategy for StopAndCopy {
    fn name(&self) -> &'static str {
        "stop-and-copy"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        // tracking finds the pages that saving the state dirties
        let pages = vm.start_tracking()?;
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}
