//! Where the VM is found, and who takes this process's place there: HyperFresh.

use std::sync::TryLockError;

use super::*;

impl Instance {
    /// Where this minivmm is found.
    pub(crate) fn set_place(&self, place: Place) {
        self.lock().place = Some(place);
    }

    /// Where this minivmm is found, if its VM can be handed over to a successor that is to be found there; else why not.
    pub(crate) fn succession(&self) -> Result<Place, String> {
        let place = self.lock().place.clone();
        let place = place.ok_or("refresh: a successor is reached by the control socket, and there is none")?;
        match self.home("refresh")?.cannot_hand_over() {
            Some(why) => Err(format!("refresh: {why}")),
            None => Ok(place),
        }
    }

    /// As [`succession`](Self::succession), for the one successor that may take over until the guard is dropped.
    pub(crate) fn begin_succession(&self) -> Result<(Place, MutexGuard<'_, ()>), String> {
        let guard = match self.succession.try_lock() {
            Ok(guard) => guard,
            // it guards no data
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return Err("refresh: a successor is being prepared already".into()),
        };
        Ok((self.succession()?, guard))
    }

    /// From now on this VMM is replaced as planned, and not as it was planned before; the plan's number.
    ///
    /// # Errors
    /// When it cannot be replaced, or has been meanwhile.
    pub(crate) fn plan_succession(&self, plan: &Plan) -> Result<u64, String> {
        // a successor that is being prepared was told of the plan before
        let _until_it_is_known = self.succession.lock().unwrap_or_else(|e| e.into_inner());
        self.succession()?;
        let mut state = self.lock();
        state.schedule = (state.schedule.0 + 1, Some(plan.clone()));
        Ok(state.schedule.0)
    }

    /// The plan for this VMM's replacement, with its number.
    pub(crate) fn planned_succession(&self) -> (u64, Option<Plan>) {
        self.lock().schedule.clone()
    }

    /// This process is a successor: with the VM its control socket `own` goes to `place`, and the plan goes on.
    pub(crate) fn succeed(&self, own: PathBuf, place: PathBuf, plan: Option<Plan>) {
        self.lock().succeeds = Some((own, place, plan));
    }

    /// A successor has nothing to wait for once its predecessor is dead: it inherits the VM, or ends.
    pub(crate) fn succeeds_process(self: &Arc<Self>, predecessor: Vec<u8>) -> Result<(), String> {
        let instance = self.clone();
        let watch = move || {
            while instance.runs_on(TICK) {
                let state = instance.lock();
                let (role, receiver) = (state.role, state.receiver.clone());
                drop(state);
                let Some(receiver) = receiver.filter(|_| role == Role::Incoming) else { return };
                if !ProcessFence.is_dead(&predecessor) {
                    continue;
                }
                match receiver.phase() {
                    DestinationPhase::Ready => inherit(&receiver, &predecessor),
                    DestinationPhase::Empty => {
                        log!("the VMM to be replaced has died, and its VM did not come");
                        instance.exit(1);
                    }
                    // it runs, or what has come is about to be discarded
                    _ => {}
                }
            }
        };
        thread::Builder::new().name("watch".into()).spawn(watch).map(drop).map_err(|e| format!("no thread: {e}"))
    }

    /// Until it is known what has become of the VM: whether it is in doubt still, after so long.
    pub(crate) fn in_doubt(&self, time: Duration) -> bool {
        self.wait_while(time, |state| state.role == Role::InDoubt).role == Role::InDoubt
    }

    /// The VM is lost with the process that had it.
    pub(crate) fn lost_with(&self, pid: u32) {
        self.lock().lost(&format!("process {pid} died when it was about to run the VM, or just after"));
        self.changed.notify_all();
    }

    pub(super) fn take_place(self: &Arc<Self>) {
        let Some((own, path, plan)) = self.lock().succeeds.take() else { return };
        if let Err(why) = std::fs::rename(&own, &path) {
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
