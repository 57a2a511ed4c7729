//! Ephemeral virtualization: the home VMM of a VM lends the VM to a feature VMM, and gets it back.

use migration_core::{
    channel::Listener,
    engine::ephemeral::{Active, Standby},
    text::Chain,
};
use migration_kvm::lending::{self, Absence, AbsenceEnd, GivenBack, HomeVmm, Journey, TakeOverError};

use super::*;
use crate::{control, vmm::Tenant};

/// The borrower that has the guest.
pub(super) struct Lent {
    request: LendRequest,
    absence: Absence,
    /// The address at which the guest is taken back.
    back: String,
}

impl Lent {
    pub(super) fn to_json(&self) -> Value {
        let ms = u64::try_from(self.absence.elapsed().as_millis()).unwrap_or(u64::MAX);
        let overdue = self.absence.is_overdue();
        json!({"pid": self.request.pid, "control": self.request.control, "for_ms": ms, "overdue": overdue})
    }
}

impl Instance {
    /// Lends the guest. Returns when the borrower runs the guest. The answer contains the address
    /// at which the guest is taken back.
    pub(crate) fn lend(self: &Arc<Self>, request: LendRequest) -> Result<Value, String> {
        let to: Address = request.to.parse().map_err(|e| format!("{}: {e}", request.to))?;
        let borrower = request.borrower.clone();
        let place = self.lock().place.clone();
        let place = place.ok_or("lend: the guest is asked back by the control socket, and there is none")?;
        // the borrower expects the VM from a process whose death it can detect
        let own = ProcessIdentity::own().map_err(|e| format!("lend: {e}"))?.encode();
        if request.lender.as_ref().is_some_and(|lender| *lender != own) {
            return Err("lend: another process has the VM since the request was written".into());
        }
        drop(self.wait_while(LAST_ANSWERS, |state| state.lent.is_some()));
        let machine = self.home("lend")?;
        if let Some(why) = machine.cannot_hand_over() {
            return Err(format!("lend: {why}"));
        }
        let (controller, commands) = Controller::new();
        let (tx, updates) = mpsc::channel();
        let mut state = self.lock();
        if state.role != Role::Home {
            return Err(format!("lend: this minivmm is {}", state.role.name()));
        }
        state.lends += 1;
        let number = state.lends;
        state.begin(Role::Outgoing, controller, tx);
        let absence = Absence::new(borrower.clone(), Duration::from_micros(request.within_us));
        state.lent = Some(Lent { request, absence: absence.clone(), back: String::new() });
        drop(state);
        // from here on nobody else begins a migration, and what follows may wait, as in
        // `migrate_to`
        let way_back = self.way_back(&place, number);
        let told = way_back.and_then(|way_back| self.may_be_at(borrower, &to).map(|()| way_back));
        let (back, mut listener) = told.map_err(|why| {
            self.not_begun();
            format!("lend: {why}")
        })?;
        if let Some(lent) = &mut self.lock().lent {
            lent.back = listener.address();
        }
        let resident = Active::new(Tenant::of(machine), self.last_epoch());
        let instance = self.clone();
        let body = move || {
            let journey = Journey {
                to: &*connector(&to, ConnectOptions::default()),
                source: &instance.source_options(),
                commands,
                back: &mut *listener,
                receiver: instance.receiver_options(Arrival::SHARED),
            };
            let home: Arc<dyn HomeVmm> = instance.clone();
            let end = absence.run(&home, resident, journey);
            // no guest comes to this address any more; the next borrower gets another one
            let _ = std::fs::remove_file(&back);
            instance.keep_at_exit(&back);
            instance.absence_ended(end);
        };
        self.spawn("lend", body)?;
        Ok(await_end(updates, false, &mut |_| {})?)
    }

    /// Returns the path at which the guest comes back, and the listener there.
    fn way_back(&self, place: &Place, number: u64) -> Result<(PathBuf, Box<dyn Listener>), String> {
        let mut back = place.control.clone().into_os_string();
        back.push(format!(".b{}.{number}", std::process::id()));
        let back = PathBuf::from(back);
        let listener = bind(&Address::Unix(back.clone())).map_err(|e| format!("{}: {e}", back.display()))?;
        self.remove_at_exit(back.clone());
        Ok((back, listener))
    }

    fn absence_ended(&self, end: AbsenceEnd<Tenant>) {
        match end {
            AbsenceEnd::Stayed { report, .. } => {
                self.lock().lent = None;
                self.ended(&report);
            }
            AbsenceEnd::Returned(guest) => {
                self.stays();
                let mut state = self.lock();
                state.epoch = guest.epoch();
                (state.role, state.lent) = (Role::Home, None);
                drop(state);
                self.changed.notify_all();
            }
            AbsenceEnd::Lost(why) => {
                self.lock().lost(&format!("its guest was lent, and does not come back: {}", Chain(&why)));
                self.changed.notify_all();
            }
            // `gone` has handled this end
            AbsenceEnd::Gone => {}
        }
    }

    /// Handles the report of a borrower that the guest will not come back, because the guest moved
    /// elsewhere or has ended.
    pub(crate) fn gone(&self, report: Value, status: u8) -> Result<Value, String> {
        let mut state = self.lock();
        if state.role != Role::Lent {
            return Err(format!("gone: this minivmm is {}", state.role.name()));
        }
        state.role = Role::Ended;
        let why = report["reason"].as_str().unwrap_or_default().to_owned();
        state.last = Some(report);
        if status != 0 {
            let pid = state.lent.as_ref().map(|lent| lent.request.pid).unwrap_or_default();
            drop(state);
            log!("the VM has ended in process {pid}, which had borrowed it and says why: {why}");
            self.guest_ended();
            state = self.lock();
        }
        let lent = state.lent.take();
        drop(state);
        if let Some(lent) = lent {
            lent.absence.end();
        }
        self.exit(status);
        Ok(json!({"state": "ended"}))
    }

    // ---- the borrower's side
    // -----------------------------------------------------------------------------------

    /// Makes this minivmm a borrower, which runs VMs of other minivmms from time to time.
    pub(crate) fn borrows(&self) {
        self.lock().role = Role::Standby;
    }

    /// Records that the VM belongs to the minivmm at the control socket `lender`, which has this
    /// broker.
    pub(crate) fn borrows_from(&self, lender: &Path, broker: Option<PathBuf>) {
        self.lock().lender = broker.is_some().then(|| lender.to_owned());
        self.set_broker(broker);
    }

    /// Returns the options for receiving a guest.
    pub(crate) fn visit_options(self: &Arc<Self>, patience: Duration) -> ReceiverOptions {
        ReceiverOptions { patience: Some(patience), ..self.receiver_options(Arrival::SHARED) }
    }

    /// Records that a guest is here for a limited time.
    pub(crate) fn visited(self: &Arc<Self>, machine: &Arc<Machine>, epoch: u32) {
        let mut state = self.lock();
        let known = state.machine.as_ref().is_some_and(|known| Arc::ptr_eq(known, machine));
        state.epoch = epoch;
        if known {
            // the guest has been running since before this call, so it may have ended
            state.role = state.at_home();
        }
        drop(state);
        if !known {
            self.own(machine.clone());
        }
        self.changed.notify_all();
    }

    /// Handles the request of the owner to give the guest back.
    pub(crate) fn give_back(&self) -> Result<Value, String> {
        let mut state = self.lock();
        match state.role {
            // the guest may have come just now, or may be on its way
            Role::Home | Role::Saving | Role::Outgoing | Role::Standby => {}
            role => return Err(format!("give back: this minivmm is {}", role.name())),
        }
        state.asked_back = true;
        drop(state);
        self.changed.notify_all();
        Ok(json!({"asked": true}))
    }

    /// Waits for `time` with a guest, unless the guest is requested back or the process is to end.
    pub(crate) fn hold(&self, time: Duration) {
        drop(self.wait_while(time, |state| !state.asked_back && state.exit.is_none()));
    }

    /// Waits until no migration or snapshot of the guest is under way or in doubt, and returns the
    /// guest's fate.
    pub(crate) fn fate(&self) -> Fate {
        let mut state = self.lock();
        loop {
            match state.role {
                Role::Moved => return Fate::Moved(state.last.clone().unwrap_or_default()),
                Role::Ended => return Fate::Ended,
                Role::Outgoing | Role::InDoubt | Role::Saving => {
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                }
                Role::Home | Role::Incoming | Role::Lent | Role::Standby => return Fate::Here,
            }
        }
    }

    /// Records that the guest stays here, for whatever reason. Even a signal that came before does
    /// not end this process now.
    pub(crate) fn stay(&self) {
        let mut state = self.lock();
        if state.role == Role::Home {
            state.exit = None;
        }
    }

    /// Hands the guest back to `to`, where its owner waits for it. Returns the VM, unless it is
    /// lost, and the report.
    pub(crate) fn return_guest(
        self: &Arc<Self>,
        guest: Active<Tenant>,
        to: &Address,
        owner: &[u8],
    ) -> (Option<Returned>, Value) {
        let (controller, commands) = Controller::new();
        let (tx, _updates) = mpsc::channel();
        let mut state = self.lock();
        if state.role != Role::Home {
            // another request was faster
            let report = report::not_begun("handover", &format!("this minivmm is {}", state.role.name()));
            return (Some(Err(guest)), report);
        }
        state.begin(Role::Outgoing, controller, tx);
        drop(state);
        let in_doubt = || self.lock().role == Role::InDoubt;
        let (link, options) = (connector(to, ConnectOptions::default()), self.source_options());
        let (gone, report) = match lending::give_back(guest, link, options, commands, owner, in_doubt) {
            Ok(GivenBack::AtHome(dormant, report)) => (Ok(dormant), report),
            Ok(GivenBack::Stayed(guest, report)) => (Err(guest), report),
            Ok(GivenBack::HomeDied) => {
                let mut state = self.lock();
                state.lost("its owner died when it was about to run the VM again, or just after");
                let report = state.last.clone().unwrap_or_default();
                drop(state);
                self.changed.notify_all();
                return (None, report);
            }
            Ok(GivenBack::Unknown) => {
                return (None, report::not_begun("handover", "the thread that returns the guest has died"));
            }
            Err((guest, error)) => {
                self.not_begun();
                return (Some(Err(guest)), report::not_begun("handover", &format!("return: no thread: {error}")));
            }
        };
        let mut state = self.lock();
        state.epoch = report.epoch;
        match (&gone, state.role) {
            (Ok(_), _) => (state.role, state.asked_back) = (Role::Standby, false),
            (Err(_), Role::Outgoing | Role::InDoubt) => state.role = state.at_home(),
            (Err(_), _) => {}
        }
        let report = report::to_json(&report);
        state.end(report.clone());
        drop(state);
        self.changed.notify_all();
        (Some(gone), report)
    }

    /// Stops the dirty log, which the borrower does not need any more.
    pub(crate) fn stop_log(&self) -> Result<Value, String> {
        self.home("stop log")?.stop_log().map_err(|e| format!("stop log: {}", Chain(&e)))?;
        Ok(json!({"log": false}))
    }

    /// Makes this minivmm the guest's home after the owner has died. Clients find it at the owner's
    /// control socket.
    pub(crate) fn inherit_place(self: &Arc<Self>, own: &Path, owners: &Path) {
        self.succeed(own.to_owned(), owners.to_owned(), None);
        self.take_place();
        let broker = self.broker();
        let mut state = self.lock();
        state.lender = None;
        if let Some(place) = &mut state.place {
            place.broker = broker;
        }
        drop(state);
        if let Err(why) = self.keep_ram() {
            not_kept(&why);
        }
    }
}

impl HomeVmm for Instance {
    fn detached(&self, report: &Report) {
        let mut state = self.lock();
        let mut report = report::to_json(report);
        report["back"] = json!(state.lent.as_ref().map(|lent| &lent.back));
        state.role = Role::Lent;
        state.end(report);
        drop(state);
        self.changed.notify_all();
    }

    fn is_in_doubt(&self) -> bool {
        self.lock().role == Role::InDoubt
    }

    fn lost_in_doubt(&self) {
        let pid = self.lock().lent.as_ref().map(|lent| lent.request.pid);
        self.vm_lost_with(pid.unwrap_or_default());
    }

    fn overdue(&self) {
        let asked = self.lock().lent.as_ref().map(|lent| (lent.request.pid, lent.request.control.clone()));
        let Some((pid, control)) = asked else { return };
        log!("process {pid} is late to give the VM back, and is asked to");
        let ask = move || {
            if let Err(why) = control::ask_peer(&control, &Request::GiveBack) {
                log!("process {pid} does not give the VM back: {why}");
            }
        };
        // the borrower may never answer, so the request is sent on a separate thread
        if let Err(error) = thread::Builder::new().name("ask back".into()).spawn(ask) {
            log!("it cannot be asked: {error}");
        }
    }

    fn not_taken_over(&self, why: &TakeOverError) {
        log!("the VM is complete here, and does not run: {}", Chain(why));
    }

    fn unwatched(&self, why: &std::io::Error) {
        log!("nobody sees whether the borrower dies: {why}");
    }
}

/// The standby VM whose guest has left, or the active VM whose guest is still here.
pub(crate) type Returned = Result<Standby<Tenant>, Active<Tenant>>;

/// The fate of a guest.
pub(crate) enum Fate {
    Here,
    /// The guest has moved elsewhere. Contains the report.
    Moved(Value),
    Ended,
}

impl State {
    /// Records that the VM is lost, and ends the process.
    pub(super) fn lost(&mut self, why: &str) {
        log!("the VM is lost: {why}");
        let mut report = report::not_begun("handover", why);
        report["outcome"] = json!("lost");
        self.tell(report);
        self.role = Role::Ended;
        self.exit.get_or_insert(5);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, Permissions},
        os::unix::{fs::PermissionsExt, net::UnixListener},
    };

    use migration_kvm::{ram::Backing, tracker::TrackerKind};

    use super::*;
    use crate::vmm::{MachineConfig, SerialTarget};

    #[test]
    fn status_is_told_while_the_way_back_waits_for_a_file_system() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let instance = Instance::new(None, Sealing::default(), PageStores::default());
        instance.set_place(Place { control: path("control"), serial: "null".into(), broker: None });
        let config = MachineConfig::new(64 << 20, 1, Backing::Memfd, TrackerKind::Auto);
        let machine = Machine::new(MachineConfig { software: true, ..config }, &SerialTarget::Null).unwrap();
        instance.own(Arc::new(machine));
        // the socket of a process that has ended, which another process is just replacing
        let back = format!("control.b{}.1", std::process::id());
        drop(UnixListener::bind(path(&back)).unwrap());
        let lock = File::create(path(&format!(".{back}.lock"))).unwrap();
        lock.set_permissions(Permissions::from_mode(0o600)).unwrap();
        lock.lock().unwrap();
        let request = LendRequest {
            to: format!("unix:{}", path("nobody").display()),
            control: path("borrower"),
            lender: None,
            borrower: ProcessIdentity::own().unwrap().encode(),
            pid: std::process::id(),
            within_us: 1,
        };
        let lender = instance.clone();
        let lending = thread::spawn(move || lender.lend(request));
        while instance.status()["state"] != "outgoing" {
            thread::yield_now();
        }
        drop(lock);
        // if `status` had waited for the lock of the socket, the error would be about that
        let report = lending.join().unwrap().unwrap();
        assert_eq!(report["outcome"], "failed", "{report}");
        assert_eq!(instance.status()["state"], "running");
    }
}
