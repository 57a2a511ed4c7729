//! Pre-copy: sends RAM while the guest runs, then repeatedly the pages that the guest wrote since,
//! until few are left.

use super::{Convergence, Done, Linear, ModelConvergence, Next, PushOrder, Running, Strategy, Wanted};
use crate::MigrationError;

/// Iterative pre-copy (Clark et al., NSDI 2005; the baseline of every paper in `docs/`), with a
/// convergence policy that can be replaced.
pub struct PreCopy<C = ModelConvergence> {
    /// The policy that decides after each round.
    pub convergence: C,
    /// The order in which pages are pushed if the user or the policy switches the migration to
    /// post-copy.
    pub order: Box<dyn PushOrder>,
}

impl<C: Default> Default for PreCopy<C> {
    fn default() -> Self {
        Self { convergence: C::default(), order: Box::new(Linear::default()) }
    }
}

impl<C: Convergence> Strategy for PreCopy<C> {
    fn name(&self) -> &'static str {
        "pre-copy"
    }

    fn can_switch_over(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        if let Next::GiveUp(why) = self.convergence.begin(&vm.link()) {
            vm.stalled(&why);
            return vm.cancel(why);
        }
        let mut pages = vm.start_tracking()?;
        loop {
            let round = vm.send(&pages)?;
            pages = vm.harvest()?;
            if vm.switch_over_wanted() {
                // nothing can be predicted before the bandwidth is known
                let link = vm.link();
                if link.bytes_per_second > 0.0 {
                    vm.expect_downtime(link.predict(pages.len()));
                }
                break;
            }
            let next = self.convergence.judge(&round, &pages, &vm.link());
            if let Some(why) = self.convergence.stalled() {
                vm.stalled(why);
            }
            match next {
                Next::Round => {}
                Next::Throttle(percent) => vm.throttle(percent)?,
                Next::SwitchOver(Wanted { downtime }) => {
                    vm.expect_downtime(downtime);
                    break;
                }
                Next::PostCopy => return vm.pause()?.hand_over(pages)?.serve(&mut *self.order),
                Next::GiveUp(why) => return vm.cancel(why),
            }
        }
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}
