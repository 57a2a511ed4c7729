//! An attempt that comes to nothing, and a VM that ends.

use super::*;
use crate::vm::FailedAttempt;

/// What [`VmEntry::give_up`] has done.
pub(super) struct GivenUp {
    /// Where the protocol stood.
    pub(super) phase: DestinationPhase,
    /// Whether the host was told, or need not be. Else it is told when the VM has been built, for nobody.
    pub(super) reported: bool,
}

impl VmEntry {
    /// The guest has ended by itself.
    pub(super) fn vm_ended(&self, reason: &str) {
        let mut state = lock(&self.state);
        let Some(ended) = state.machine.vm_ended(reason) else { return };
        let Some(session) = state.session.clone() else { return };
        drop(state);
        // best effort: a source that does not hear it comes back and asks
        let _ = session.tell_ended(ended);
        if let Some(missing) = session.missing() {
            // nobody waits for pages any more
            missing.end();
        }
    }

    /// Tells the observer of this, if it has happened. Like every event, never under a lock: an observer may call the
    /// [`ReceiverHandle`].
    pub(super) fn warn(&self, what: Option<String>) {
        if let Some(what) = what {
            self.common.options.observer.event(&Event::Warning(what));
        }
    }

    /// Ends the attempt that is under way if `must` says so of what it has done, unless the VM is complete. Returns whether it
    /// did.
    pub(super) fn end_attempt(&self, why: &str, must: impl FnOnce(&Allowance) -> bool) -> bool {
        use DestinationPhase::{Loading, Preparing, Receiving};
        let state = lock(&self.state);
        // a newer attempt may have begun whose session is not there yet
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

    /// Ends the attempt that is under way, unless the VM is complete; its source is told, if that can be done at once.
    pub(super) fn give_up(&self, why: &str) -> GivenUp {
        use DestinationPhase::{Loading, Preparing, Receiving};
        let mut state = lock(&self.state);
        let phase = state.machine.phase();
        if !matches!(phase, Preparing | Receiving | Loading) {
            return GivenUp { phase, reported: true };
        }
        let epoch = state.machine.epoch();
        state.machine.link_lost();
        // whoever builds or loads the VM finds that it does not speak for the session any more
        state.attachment += 1;
        let given_up = state.session.take();
        drop(state);
        // the VM of an earlier attempt may be here still, and the one of this attempt be on its way
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

    /// The control lane of this attachment is gone.
    pub(super) fn lost(&self, attachment: u64, why: &str) {
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            return;
        }
        let given_up = match state.machine.link_lost() {
            OnDestinationLoss::Discard => state.session.take(),
            OnDestinationLoss::Hold | OnDestinationLoss::Nothing => None,
        };
        let served = state.machine.vm().filter(|_| state.machine.is_served());
        drop(state);
        if let Some(vm) = served {
            self.notify(vm, Notice::LinkLost);
        }
        self.discard(given_up, why);
    }

    /// The link of `session` is lost. Its control lane may not notice, since the thread that reads it loads the state, and
    /// waits for a page that was under way.
    pub(super) fn lost_while_loading(&self, session: &Arc<Session>, why: &str) {
        let mut state = lock(&self.state);
        let ours = state.session.as_ref().is_some_and(|present| Arc::ptr_eq(present, session));
        if !ours || state.machine.phase() != DestinationPhase::Loading {
            return;
        }
        state.machine.link_lost();
        // who loads finds that it does not speak for the session any more
        state.attachment += 1;
        let given_up = state.session.take();
        drop(state);
        self.discard(given_up, why);
    }

    /// The attempt has come to nothing.
    pub(super) fn discard(&self, given_up: Option<Arc<Session>>, why: &str) {
        let failed = given_up.as_ref().map(|session| FailedAttempt {
            peer: session.peer.clone(),
            vm: Some(session.id),
            why: why.to_owned(),
        });
        self.free_vm(given_up, why);
        self.tell_phase();
        if let Some(failed) = failed {
            self.common.host.attempt_failed(&failed);
        }
    }

    /// Frees the VM that was being received or held, and ends its lanes.
    pub(super) fn free_vm(&self, given_up: Option<Arc<Session>>, why: &str) {
        if given_up.is_some_and(|session| session.discard(why)) {
            self.common.options.observer.event(&Event::Discarded(why.to_owned()));
        }
    }

    pub(super) fn tell_phase(&self) {
        let phase = lock(&self.state).machine.phase();
        self.common.options.observer.event(&Event::Destination(phase));
    }
}
