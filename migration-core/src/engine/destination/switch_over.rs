//! The destination's part of the switch-over: the guest's pause, and the steps that follow it.
//!
//! 1. **Wait for the last round**. It may still be under way on other lanes than the offer.
//! 2. **Seal**: from here on no page of a round may arrive.
//! 3. **Arm the pager** for the missing pages, before anything is loaded: loading accesses RAM.
//! 4. **Load the state.** This may wait for missing pages, which the source is already sending.
//! 5. **Become ready**, and then send *ready*: if sending it fails, the source may have received it
//!    nevertheless.
//! 6. **Start the guest** when the source sends *run*, and then answer with *running*.

use super::{control_lane::Flow, missing::Turn, *};

/// The offer of a source.
pub(super) struct Offered {
    /// The generation of the last round.
    pub(super) generation: u32,
    /// The encoded state.
    pub(super) state: Vec<u8>,
    /// In post-copy, the number of missing pages and the number of demand lanes.
    pub(super) post_copy: Option<(u64, u16)>,
}

impl VmEntry {
    /// Executes steps 1 to 5.
    pub(super) fn load(
        self: &Arc<Self>,
        session: &Arc<Session>,
        attachment: u64,
        offered: Offered,
    ) -> Result<Flow, MigrationError> {
        let Offered { generation, state: bytes, post_copy } = offered;
        if session.shared {
            self.common.options.spawner.begin_switch_over();
        }
        let loading = session.loads();
        session.wait_round(generation, self.common.options.idle_timeout, &self.common.bytes)?;
        session.seal(generation)?;
        if let Some((announced, lanes)) = post_copy {
            // before anything is loaded, because loading accesses RAM
            self.arm(session, attachment, generation, announced, lanes)?;
        } else if session.map.read(|map| !map.missing().is_empty()) {
            return Err(DecodeError::invalid("offer", "pages are in stores, and post-copy was not announced").into());
        }
        let mut vm_state = VmState::decode(&bytes)?;
        let log = if session.shared { dirty_log::take(&mut vm_state, session.ram.layout().pages())? } else { None };
        // The state of the entry is not locked meanwhile: this may wait for a missing page, and
        // that wait may end only by a newer attempt, which needs the lock.
        let loaded = match session.vm.borrow() {
            Some(mut vm) => {
                // loading also writes to RAM
                let continued = log.map_or(Ok(()), |log| vm.vm().continue_log(&log));
                continued.and_then(|()| vm.vm().load_state(&vm_state))
            }
            None => Err(no_longer_here()),
        };
        let loaded = loaded.map_err(MigrationError::vm("loading the state"));
        if self.common.options.forward.is_some()
            && let Some(protection) = &session.protection
        {
            *lock(&protection.state) = bytes.into();
        }
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            return Ok(Flow::End);
        }
        loaded?;
        drop(loading);
        // ready before *ready* is sent: if sending it fails, the source may have received it
        // nevertheless
        let ready = state.machine.loaded()?;
        state.was_ready = true;
        drop(state);
        // A source that has gone may have sent the reason before, while the state was loaded. That
        // frame must still be read, and it decides. If there is none, the end of the lane decides.
        let _ = session.send_control(&ready);
        self.report_phase();
        Ok(Flow::Continue)
    }

    /// Executes step 6.
    pub(super) fn run(&self, session: &Arc<Session>, attachment: u64, running: bool) -> Result<(), MigrationError> {
        let started = self.start(session, running);
        let answered = if session.shared {
            // The first moments of the guest count, and the guest does not wait for the remaining
            // work. For the same reason this thread gives up its priority, on a core for which a
            // vCPU may have been woken.
            let answered = self.answer(session, attachment);
            self.common.options.spawner.end_switch_over();
            self.common.options.spawner.assume(Role::Control, GuestImpact::Balanced);
            self.arrived(session.id, started);
            answered
        } else {
            self.arrived(session.id, started);
            self.answer(session, attachment)
        };
        answered?;
        self.report_phase();
        Ok(())
    }

    /// Prepares the VM to run without the missing pages in the source's list.
    ///
    /// # Errors
    /// Returns an error if the list is not the one that was announced, if demand lanes are not open
    /// in time, or if the pager or the protection fails.
    pub(super) fn arm(
        &self,
        session: &Arc<Session>,
        attachment: u64,
        last: u32,
        announced: u64,
        lanes: u16,
    ) -> Result<(), MigrationError> {
        session.wait_demand(lanes, self.common.options.idle_timeout)?;
        drop(self.current(attachment)?);
        let pager = session.pager.clone().ok_or_else(|| DecodeError::invalid("post-copy", "it is not agreed on"))?;
        let pages = std::mem::take(&mut *lock(&session.listed));
        if pages.len() != announced || lanes == 0 {
            let why = format!("{} are listed, {announced} announced, with {lanes} demand lanes", pages.len());
            return Err(DecodeError::invalid("missing pages", why).into());
        }
        if !is_whole(&pages, pager.block_pages()) {
            return Err(DecodeError::invalid("missing pages", "not whole huge pages").into());
        }
        let left = session.map.change(|map| map.leave_behind(&pages));
        left.map_err(|error| DecodeError::invalid("missing pages", error.to_string()))?;
        pager.arm(&session.map).map_err(MigrationError::vm("watching for missing pages"))?;
        if let Some(protection) = &session.protection {
            protection.begin()?;
        }
        let missing = Missing::new(pager, session.map.clone(), last + 1, lanes, self.common.bytes.clone());
        let missing = Arc::new(missing.with_gatherer(session.gatherer.clone()));
        session.set_missing(&missing)?;
        if session.gatherer.is_some() && missing.is_complete() {
            // no page is missing after all
            missing.end();
        }
        Ok(())
    }

    /// Starts the thread of a demand lane that handles faults as soon as pages are missing. With
    /// the first lane, also starts the thread that waits until no page is missing. The threads are
    /// started here, and not during the pause.
    pub(super) fn await_faults(self: &Arc<Self>, session: &Arc<Session>, lane: u16) -> Result<(), MigrationError> {
        let (entry, faulted) = (self.clone(), session.clone());
        let body = Box::new(move || {
            let watched = faulted.wait_missing().map_or(Ok(()), |missing| missing.watch(lane.into()));
            if let Err(error) = watched {
                let why = format!("faults are not served any more: {}", Chain(&error));
                entry.common.options.observer.event(&Event::Warning(why));
            }
        });
        self.watcher(Role::Demand, "mig-fault", body)?;
        if lane > 0 {
            return Ok(());
        }
        self.await_gathering(session)?;
        let (entry, session) = (self.clone(), session.clone());
        let body = Box::new(move || {
            match (session.wait_missing(), &session.gatherer) {
                (Some(missing), _) => entry.see_to(&session, &missing),
                // no page refers to the stores that the source has named (rule 14)
                (None, Some(gatherer)) if session.is_running() => entry.forget_namespaces(gatherer),
                (None, _) => {}
            }
        });
        self.watcher(Role::Control, "mig-missing", body)
    }

    /// Waits until no page is missing, and answers each *vacated* of the source.
    fn see_to(&self, session: &Session, missing: &Missing) {
        let mut complete = false;
        loop {
            match missing.wait_turn(complete) {
                Turn::Complete => {
                    complete = true;
                    self.all_there(session, missing);
                    missing.pager.collapse_huge_pages();
                }
                Turn::Vacated => self.answer_vacated(session, missing),
                Turn::Over => {
                    // the namespaces are forgotten if the VM has ended, or if all pages are here
                    // (rule 14)
                    let all = missing.is_complete() && session.is_released();
                    let gatherer = session.gatherer.as_ref().filter(|_| session.has_guest_ended() || all);
                    return gatherer.map_or((), |gatherer| self.forget_namespaces(gatherer));
                }
            }
            let Some(gatherer) = &session.gatherer else { return };
            if complete && gatherer.is_released() {
                return self.forget_namespaces(gatherer);
            }
        }
    }

    pub(super) fn watcher(&self, role: Role, name: &str, body: Box<dyn FnOnce() + Send>) -> Result<(), MigrationError> {
        let ended = Arc::new(AtomicBool::new(false));
        let ending = ended.clone();
        let body = Box::new(move || {
            body();
            ending.store(true, Ordering::Release);
        });
        let thread = self.common.spawn(self.number, role, name, body);
        let thread = thread.map_err(|cause| MigrationError::Thread { role: "the session", cause })?;
        lock(&self.watchers).push(Watcher { thread, ended });
        Ok(())
    }

    /// Joins the threads of a VM whose session is over.
    pub(super) fn join_watchers(&self) {
        let watchers = std::mem::take(&mut *lock(&self.watchers));
        for watcher in watchers {
            watcher.thread.join();
        }
    }

    /// Handles the arrival of the last missing page.
    pub(super) fn all_there(&self, session: &Session, missing: &Missing) {
        if let Err(error) = missing.pager.disarm() {
            self.common.options.observer.event(&Event::Warning(format!("all pages are there, but: {}", Chain(&error))));
        }
        if session.gatherer.is_some() {
            // with stores, the source asks
            return;
        }
        let mut state = lock(&self.state);
        // before *run* the source may still take the VM back: it is informed when the VM has
        // started
        if state.machine.complete().is_ok() {
            drop(state);
            // best effort: a source that does not receive this connects again and asks
            let _ = session.report_complete(missing);
            self.report_phase();
        }
    }

    /// Answers *run* with *running*, when the VM runs here. Sends nothing if a newer control lane
    /// speaks for the session: the answer is also sent on that lane.
    pub(super) fn answer(&self, session: &Session, attachment: u64) -> Result<(), MigrationError> {
        if lock(&self.state).attachment != attachment {
            return Ok(());
        }
        session.report_running()?;
        if let Some(missing) = session.missing()
            && session.gatherer.is_none()
            && missing.is_complete()
        {
            // before the report is sent, because the source may answer it at once
            self.current(attachment)?.machine.complete()?;
            session.report_complete(&missing)?;
        }
        Ok(())
    }

    /// Takes ownership of the VM without a message of its source.
    pub(super) fn take(&self, session: Option<Arc<Session>>, action: &DestinationAction) {
        match session {
            Some(session) => {
                self.start_and_adopt(&session, action);
                self.gather_alone(&session);
            }
            None => self.finished.store(true, Ordering::Relaxed),
        }
    }

    /// Starts the VM if `action` is to start it, and passes the VM to the callback that receives
    /// it.
    pub(super) fn start_and_adopt(&self, session: &Session, action: &DestinationAction) {
        if let DestinationAction::Start { running } = *action {
            let started = self.start(session, running);
            self.arrived(session.id, started);
        }
    }

    /// Starts the VM. The caller passes it to the callback that receives it.
    fn start(&self, session: &Session, running: bool) -> Option<Started> {
        let mut vm = session.vm.take()?;
        let failed = vm.vm().start(running).err();
        if let Some(missing) = session.missing() {
            missing.set_vcpus(vm.vm().vcpu_threads());
        }
        if let Some(gatherer) = &session.gatherer {
            gatherer.run();
            if let Some(missing) = session.missing().filter(|_| session.has_lost_lane()) {
                missing.ask_stores_again();
            }
        }
        session.set_running();
        Some(Started { vm, failed })
    }

    /// Passes a VM that was started to the callback that receives it, and delivers the notices that
    /// have waited for that.
    fn arrived(&self, id: VmId, started: Option<Started>) {
        if let Some(Started { vm, failed }) = started {
            let why = |error: &VmError| format!("the VM is owned here but could not be started: {}", Chain(error));
            let unstarted = failed.as_ref().map(why);
            let epoch = lock(&self.state).machine.epoch();
            vm.arrived(id, epoch, failed);
            self.warn(unstarted);
        }
        self.notices.open(|notice| self.common.host.notify(id, notice));
    }

    /// Sends a notice to the host, after the VM has arrived.
    pub(super) fn notify(&self, vm: VmId, notice: Notice) {
        self.notices.add(notice, |notice| self.common.host.notify(vm, notice));
    }
}

/// A VM that was started here.
struct Started {
    vm: Box<dyn AnyVm>,
    /// The reason why the VM could not be started, if so.
    failed: Option<VmError>,
}
