//! Snapshot: a pre-copy whose destination is a store, and whose guest runs on where it is.

use super::{Convergence, Done, ModelConvergence, Next, Running, Strategy};
use crate::MigrationError;

/// Passes over the running guest's memory, at most: then it is paused, however much is left.
const MAX_PASSES: usize = 30;

/// Puts all pages while the guest runs, and again those that it wrote meanwhile, as long as that
/// makes them fewer. The pause makes all of it one moment. It is as short as copying what is left
/// takes: the store gets the copy when the guest has gone on.
///
/// For [`snapshot`](crate::engine::snapshot): a migration refuses it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot<C = ModelConvergence> {
    /// Decides after each pass.
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
