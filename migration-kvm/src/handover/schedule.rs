//! When a VMM is replaced by itself.

use std::{io, sync::Arc, thread, time::Duration};

use super::{Predecessor, RefreshPolicy, ReplaceError, Replacement, replace};

/// How often a policy is asked.
const TICK: Duration = Duration::from_millis(100);
/// How long a VMM waits after an attempt that failed, before it asks its policy again.
const BACK_OFF: Duration = Duration::from_secs(1);

/// Why a VMM that was due was not replaced.
#[derive(Debug)]
pub enum NotReplaced<'a, R> {
    /// The hand-over failed or is in doubt.
    HandOver(&'a R),
    /// No hand-over has begun.
    Refused(&'a ReplaceError),
    /// The policy cannot find out whether it is time.
    Policy(&'a io::Error),
}

/// Replaces the VMM when a policy says so, on a thread of its own. `policy` makes the policy, and
/// makes it anew after an attempt that failed, so that an interval begins again.
///
/// The schedule takes the place of an earlier one. It ends when the VMM has been replaced; the
/// successor then goes on with it, since [`NewSuccessor`](super::NewSuccessor) has `plan`.
///
/// # Errors
/// Returns an error if the VM cannot be handed over at all, or there is no thread. Waits for a
/// successor that is being prepared first: it was told of the schedule before.
pub fn schedule<V: Predecessor>(
    vmm: &Arc<V>,
    plan: V::Plan,
    policy: impl Fn() -> Box<dyn RefreshPolicy> + Send + 'static,
) -> Result<(), ReplaceError> {
    let number = {
        let hand_overs = vmm.hand_overs();
        let _until_none_is_prepared = hand_overs.wait();
        vmm.control()?;
        let mut last = hand_overs.last();
        last.number += 1;
        last.plan = Some(plan.clone());
        last.number
    };
    let vmm = vmm.clone();
    let body = move || run(&vmm, number, &plan, &policy);
    thread::Builder::new().name("refresh".into()).spawn(body).map(drop).map_err(ReplaceError::NoThread)
}

fn run<V: Predecessor>(vmm: &Arc<V>, number: u64, plan: &V::Plan, policy: &dyn Fn() -> Box<dyn RefreshPolicy>) {
    let mut present = policy();
    while vmm.runs_on(TICK) && vmm.hand_overs().last().number == number {
        match present.due() {
            Ok(false) => continue,
            Ok(true) => match replace(vmm, plan) {
                Ok(Replacement::Done { .. }) => return,
                Ok(Replacement::InDoubt { report, .. } | Replacement::RolledBack(report)) => {
                    vmm.not_replaced(NotReplaced::HandOver(&report));
                }
                Err(why) => vmm.not_replaced(NotReplaced::Refused(&why)),
            },
            Err(error) => vmm.not_replaced(NotReplaced::Policy(&error)),
        }
        present = policy();
        if !vmm.runs_on(BACK_OFF) {
            return;
        }
    }
}
