//! The place at which clients find the VM, and the successor that takes this process's place there
//! (HyperFresh).

use migration_kvm::successor::{PredecessorEnd, take_control, watch_predecessor};

use super::*;

impl Instance {
    /// Sets the place at which clients find this minivmm.
    pub(crate) fn set_place(&self, place: Place) {
        self.lock().place = Some(place);
    }

    /// Returns the place of this minivmm if its VM can be handed over to a successor there.
    /// Otherwise returns the reason.
    pub(crate) fn can_be_succeeded(&self) -> Result<Place, String> {
        let place = self.lock().place.clone();
        let place = place.ok_or("refresh: a successor is reached by the control socket, and there is none")?;
        match self.home("refresh")?.cannot_hand_over() {
            Some(why) => Err(format!("refresh: {why}")),
            None => Ok(place),
        }
    }

    /// Makes this process a successor. When it has the VM, its control socket `own` moves to
    /// `place`, and `plan` continues.
    pub(crate) fn succeed(&self, own: PathBuf, place: PathBuf, plan: Option<Plan>) {
        self.lock().succeeds = Some((own, place, plan));
    }

    /// Watches the predecessor of this successor. When the predecessor is dead, the successor takes
    /// over the VM, or ends if the VM has not come.
    pub(crate) fn succeeds_process(self: &Arc<Self>, predecessor: Vec<u8>) -> Result<(), String> {
        let Some(receiver) = self.lock().receiver.clone() else { return Ok(()) };
        let instance = self.clone();
        let watch = move || {
            let awaits = |time| instance.goes_on(time) && instance.lock().role == Role::Incoming;
            match watch_predecessor(&receiver, &predecessor, awaits) {
                Ok(PredecessorEnd::NotAwaited) => {}
                Ok(PredecessorEnd::NothingCame) => {
                    log!("the VMM to be replaced has died, and its VM did not come");
                    instance.exit(1);
                }
                Err(why) => log!("the VM is complete here, and does not run: {}", Chain(&why)),
            }
        };
        thread::Builder::new().name("watch".into()).spawn(watch).map(drop).map_err(|e| format!("no thread: {e}"))
    }

    /// Waits while the VM is in doubt, for at most `time`. Returns whether it is still in doubt
    /// then.
    pub(crate) fn in_doubt(&self, time: Duration) -> bool {
        self.wait_while(time, |state| state.role == Role::InDoubt).role == Role::InDoubt
    }

    /// Records that the VM is lost with the process that had it.
    pub(crate) fn vm_lost_with(&self, pid: u32) {
        self.lock().lost(&format!("process {pid} died when it was about to run the VM, or just after"));
        self.changed.notify_all();
    }

    pub(super) fn take_place(self: &Arc<Self>) {
        let Some((own, path, plan)) = self.lock().succeeds.take() else { return };
        if let Err(why) = take_control(&own, &path) {
            log!("the control socket stays at {}: {}: {why}", own.display(), path.display());
            return;
        }
        let socket = OwnSocket::at(path.clone());
        let mut state = self.lock();
        state.remove.retain(|socket| socket.path != own);
        state.remove.push(socket);
        if let Some(place) = &mut state.place {
            place.control = path;
        }
        drop(state);
        if let Some(plan) = plan
            && let Err(why) = refresh::schedule(self, plan)
        {
            log!("it is not replaced again: {why}");
        }
    }
}
