//! Snapshot: a pre-copy whose destination is a store, and whose guest continues where it is.

use super::{Convergence, Done, ModelConvergence, Next, Running, Strategy};
use crate::MigrationError;

/// The largest number of passes over the running guest's memory. After them the guest is paused,
/// however much is left.
const MAX_PASSES: usize = 30;

/// Puts all pages while the guest runs, then the pages that it wrote during that pass, as long as
/// their number shrinks. A pause makes all of them the state of one moment. The pause lasts only as
/// long as copying the remaining pages in memory takes: the store gets the copy after the guest has
/// resumed.
///
/// Used by [`snapshot`](crate::engine::snapshot). A migration refuses this strategy.
#[derive(Clone, Debug, Default)]
pub struct Snapshot<C = ModelConvergence> {
    /// The policy that decides after each pass.
    pub convergence: C,
}

impl<C: Convergence> Strategy for Snapshot<C> {
    fn name(&self) -> &'static str {
        "snapshot"
    }

    fn needs_store(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut pages = vm.start_tracking()?;
        for _ in 0..MAX_PASSES {
            let round = vm.send(&pages)?;
            pages = vm.harvest()?;
            match self.convergence.judge(&round, &pages, &vm.link()) {
                Next::Round => {}
                Next::Throttle(percent) => vm.throttle(percent)?,
                Next::GiveUp(why) => return vm.cancel(why),
                Next::SwitchOver(_) | Next::PostCopy => break,
            }
        }
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        vm.resume()?.commit()
    }
}
