//! The handling of attempts that fail, and of VMs that end.

use super::*;
use crate::vm::FailedAttempt;

/// The result of [`VmEntry::give_up`].
pub(super) struct GivenUp {
    /// The phase of the protocol before.
    pub(super) phase: DestinationPhase,
    /// Whether no failed attempt will be reported to the host any more. If false, the thread that
    /// builds the VM reports it.
    pub(super) reported: bool,
}

impl VmEntry {
    /// Reports to the source that the guest has ended by itself.
    pub(super) fn vm_ended(&self, reason: &str) {
        let mut state = lock(&self.state);
        let ended = state.machine.vm_ended(reason);
        let Some(session) = state.session.clone() else { return };
        drop(state);
        match ended {
            // best effort: a source that does not receive this connects again
            Some(ended) => drop(session.report_ended(ended)),
            // the source is gone, and pages may still be in stores
            None if session.is_released() => session.guest_has_ended(),
            None => return,
        }
        if let Some(missing) = session.missing() {
            // no thread waits for pages any more
            missing.end();
        }
    }

    /// Sends a warning to the observer, if there is one. As for every event, the caller holds no
    /// lock, because an observer may use the [`ReceiverHandle`].
    pub(super) fn warn(&self, what: Option<String>) {
        if let Some(what) = what {
            self.common.options.observer.event(&Event::Warning(what));
        }
    }

    /// Ends the attempt that is under way if `must` returns true for its allowance and the VM is
    /// not complete. Returns whether the attempt was ended.
    pub(super) fn end_attempt(&self, why: &str, must: impl FnOnce(&Allowance) -> bool) -> bool {
        use DestinationPhase::{Loading, Preparing, Receiving};
        let state = lock(&self.state);
        // a newer attempt may have begun, which has no session yet
        let session = state.session.clone().filter(|session| session.epoch == state.machine.epoch());
        let Some(session) = session else { return false };
        if !matches!(state.machine.phase(), Preparing | Receiving | Loading) || !must(&session.allowance) {
            return false;
        }
        let attachment = state.attachment;
        drop(state);
        session.last_word(ErrorCode::Busy, why);
        self.lost(attachment, why);
        true
    }

    /// Ends the attempt that is under way if the VM is not complete. The source is informed, if
    /// that is possible at once.
    pub(super) fn give_up(&self, why: &str) -> GivenUp {
        use DestinationPhase::{Loading, Preparing, Receiving};
        let mut state = lock(&self.state);
        let phase = state.machine.phase();
        if !matches!(phase, Preparing | Receiving | Loading) {
            return GivenUp { phase, reported: true };
        }
        let epoch = state.machine.epoch();
        state.machine.link_lost();
        // as a result, the thread that builds or loads the VM finds that it does not speak for the
        // session any more
        state.attachment += 1;
        let given_up = state.session.take();
        drop(state);
        // the session may be that of an earlier attempt, if the VM of this one is being built
        let (earlier, given_up) = match given_up {
            Some(session) if session.epoch == epoch => (None, Some(session)),
            earlier => (earlier, None),
        };
        self.free_vm(earlier, why);
        let reported = given_up.is_some();
        if let Some(session) = &given_up {
            session.last_word(ErrorCode::Busy, why);
        }
        self.discard(given_up, why);
        GivenUp { phase, reported }
    }

    /// Handles the loss of the control lane of this attachment.
    pub(super) fn lost(&self, attachment: u64, why: &str) {
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            return;
        }
        let given_up = match state.machine.link_lost() {
            OnDestinationLoss::Discard => state.session.take(),
            OnDestinationLoss::Hold | OnDestinationLoss::Nothing => None,
        };
        // the loss of a source that is not needed is not reported (rule 19)
        let missing = state.session.as_ref().and_then(|session| session.missing());
        let needed = missing.as_ref().is_none_or(|missing| missing.needs_source());
        let served = state.machine.vm().filter(|_| needed && state.machine.is_served());
        drop(state);
        if let Some(missing) = missing {
            missing.ask_stores_again();
        }
        if let Some(vm) = served {
            self.notify(vm, Notice::LinkLost);
        }
        self.discard(given_up, why);
    }

    /// Handles the loss of the link of `session` while the state is loaded. The thread of the
    /// control lane does not notice the loss, because it loads the state and may wait for a page
    /// that was under way.
    pub(super) fn lost_while_loading(&self, session: &Arc<Session>, why: &str) {
        let mut state = lock(&self.state);
        let ours = state.session.as_ref().is_some_and(|present| Arc::ptr_eq(present, session));
        if !ours || state.machine.phase() != DestinationPhase::Loading {
            return;
        }
        state.machine.link_lost();
        // as a result, the thread that loads the state finds that it does not speak for the session
        // any more
        state.attachment += 1;
        let given_up = state.session.take();
        drop(state);
        self.discard(given_up, why);
    }

    /// Frees the VM of a failed attempt, and reports the failure.
    pub(super) fn discard(&self, given_up: Option<Arc<Session>>, why: &str) {
        let failed = given_up.as_ref().map(|session| FailedAttempt {
            peer: session.peer.clone(),
            vm: Some(session.id),
            why: why.to_owned(),
        });
        self.free_vm(given_up, why);
        self.report_phase();
        if let Some(failed) = failed {
            self.common.host.attempt_failed(&failed);
        }
    }

    /// Frees a VM that was being received or held, and ends its lanes.
    pub(super) fn free_vm(&self, given_up: Option<Arc<Session>>, why: &str) {
        if given_up.is_some_and(|session| session.discard(why)) {
            self.common.options.observer.event(&Event::Discarded(why.to_owned()));
        }
    }

    pub(super) fn report_phase(&self) {
        let phase = lock(&self.state).machine.phase();
        self.common.options.observer.event(&Event::Destination(phase));
    }
}
