//! The session of one attempt: the state that all of its lanes share at the destination.

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    allowance::Allowance, fetchers::Gatherer, host::AnyVm, missing::Missing, place::Place, protection::Protection,
};
use crate::{
    MigrationError, PageSet,
    channel::{Closer, WriteHalf},
    codec::DecodeError,
    engine::control::ControlWriter,
    lock::lock,
    page_map::PageMap,
    pager::Pager,
    ram::GuestRam,
    shared_map::SharedPageMap,
    vm::VmId,
    wire::{Control, ErrorCode, MAX_DEMAND_LANES, SessionToken, missing_frames},
};

/// The interval between the signs of life of a destination that loads the VM: a fraction of the
/// time for which a source waits ([`PauseLimits`](crate::engine::PauseLimits)).
const ALIVE: Duration = Duration::from_millis(250);

/// The longest time to send the reason to a source that loses the session.
const LAST_WORD: Duration = Duration::from_millis(200);

/// The session of one attempt of a source, from its hello on.
pub(super) struct Session {
    pub(super) token: SessionToken,
    /// The identity of the VM.
    pub(super) id: VmId,
    /// The address of the source.
    pub(super) peer: String,
    pub(super) epoch: u32,
    pub(super) lanes: u16,
    pub(super) payload_crc: bool,
    /// Whether RAM is shared with the source. No page may arrive in that case.
    pub(super) shared: bool,
    pub(super) ram: Arc<dyn GuestRam>,
    /// The VM, until it is started or discarded. It is in use while its state is loaded, which may
    /// wait for missing pages.
    pub(super) vm: Place<Box<dyn AnyVm>>,
    /// Reports faults on missing pages and installs the pages, if post-copy is agreed on.
    pub(super) pager: Option<Arc<dyn Pager>>,
    /// Takes checkpoints of the VM, if checkpoints are agreed on.
    pub(super) protection: Option<Arc<Protection>>,
    /// Fetches pages from stores, if stores are agreed on.
    pub(super) gatherer: Option<Arc<Gatherer>>,
    /// The list of missing pages, which arrives in parts. It is moved to `map` when all rounds
    /// before the hand-over have arrived.
    pub(super) listed: Mutex<PageSet>,
    /// The location of each page: the pages that rounds have brought, the missing pages, and those
    /// of the missing pages that have arrived since.
    pub(super) map: Arc<SharedPageMap>,
    /// Limits the time of the session until the VM is offered.
    pub(super) allowance: Allowance,
    /// Whether the VM is being loaded. This is done by the thread that reads the control lane,
    /// which cannot answer the source meanwhile.
    loading: AtomicBool,
    told: Mutex<Told>,
    /// The writer of the control lane, with the number of its link.
    control: Mutex<(u32, ControlWriter)>,
    /// The last generation that was announced to the source. Locked while an announcement is sent,
    /// so that announcements are sent in order.
    announced: Mutex<u32>,
    /// Locked for short times only, never while data is read or written.
    lane_state: Mutex<LaneState>,
    changed: Condvar,
}

/// The reports that were sent on the present control lane. Locked while a report is sent, so that
/// *complete* is sent once, and after *running* and the reports that belong to *running*.
#[derive(Default)]
struct Told {
    running: bool,
    complete: bool,
    /// The report that replaces *complete*: the VM has ended. It stays set, and is sent on every
    /// control lane.
    ended: Option<Control>,
}

struct LaneState {
    control: Arc<dyn Closer>,
    /// The closers of the bulk lanes; `None` for a lane that is not attached yet.
    attached: Vec<Option<Arc<dyn Closer>>>,
    /// The demand lanes; `None` for a lane that is not attached yet. Each keeps its writer until
    /// the missing pages are known.
    demand: Vec<Option<DemandLane>>,
    checkpoint: Option<Arc<dyn Closer>>,
    missing: Option<Arc<Missing>>,
    /// Whether *prepared* was sent, which reports to the source that all its lanes are open.
    prepared: bool,
    /// Whether the VM runs here.
    running: bool,
    /// Whether the guest has ended here by itself. Missing pages are not needed any more.
    guest_ended: bool,
    /// For each lane, the last generation of which it has begun to receive pages (`started`), and
    /// the last generation that it has completed (`ended`).
    started: Vec<u32>,
    ended: Vec<u32>,
    /// The number of the *vacated* whose marks were not read on all lanes yet (`vacated`), and for
    /// each lane the number of the last mark that was read (`marks`).
    vacated: Option<u32>,
    marks: Vec<u32>,
    /// Whether the state is about to be loaded or was loaded. No page of a round may arrive any
    /// more.
    sealed: bool,
    /// The number of the present link: the number of control lanes that have replaced another one.
    /// Every other lane belongs to one link.
    link: u32,
    /// Whether a lane of the present link has ended.
    lost: bool,
    /// The last generation that all lanes have completed and that was announced to the source.
    complete: u32,
    /// The reason why the session is over. No thread waits for an event of the session any more.
    over: Option<String>,
}

impl LaneState {
    fn closers(&self) -> Vec<Arc<dyn Closer>> {
        let demand = self.demand.iter().flatten().map(|lane| &lane.closer);
        self.attached.iter().flatten().chain(demand).chain(&self.checkpoint).chain([&self.control]).cloned().collect()
    }
}

struct DemandLane {
    closer: Arc<dyn Closer>,
    writer: Option<Box<dyn WriteHalf>>,
}

/// The time for which the VM is being loaded. It ends when this is dropped: see [`Session::loads`].
pub(super) struct Loading<'a>(&'a AtomicBool);

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// The parameters that source and destination have agreed on.
pub(super) struct Agreed {
    pub(super) token: SessionToken,
    pub(super) id: VmId,
    pub(super) peer: String,
    pub(super) epoch: u32,
    pub(super) lanes: u16,
    pub(super) payload_crc: bool,
    /// Whether RAM is shared with the source. No page may arrive in that case.
    pub(super) shared: bool,
    /// The longest time without progress of the attempt.
    pub(super) grace: Duration,
}

/// The VM that is to be received, and the parts that its VMM provides for it.
pub(super) struct Built {
    pub(super) vm: Box<dyn AnyVm>,
    /// Reports faults on missing pages and installs the pages, if post-copy is agreed on.
    pub(super) pager: Option<Arc<dyn Pager>>,
    /// Takes checkpoints of the VM, if checkpoints are agreed on.
    pub(super) protection: Option<Arc<Protection>>,
    /// The location of each page.
    pub(super) map: Arc<SharedPageMap>,
    /// Fetches pages from stores, if stores are agreed on.
    pub(super) gatherer: Option<Arc<Gatherer>>,
}

impl Session {
    pub(super) fn new(agreed: Agreed, built: Built, control: ControlWriter, closer: Arc<dyn Closer>) -> Self {
        let Agreed { token, id, peer, epoch, lanes, payload_crc, shared, grace } = agreed;
        let Built { mut vm, pager, protection, map, gatherer } = built;
        let count = usize::from(lanes);
        let ram = vm.vm().ram();
        let listed = Mutex::new(PageSet::empty(ram.layout().pages()));
        let allowance = Allowance::new(ram.layout().bytes(), grace, protection.is_some());
        let lane_state = LaneState {
            control: closer,
            attached: vec![None; count],
            demand: (0..MAX_DEMAND_LANES).map(|_| None).collect(),
            checkpoint: None,
            missing: None,
            prepared: false,
            running: false,
            guest_ended: false,
            started: vec![0; count],
            ended: vec![0; count],
            vacated: None,
            marks: vec![0; count],
            sealed: false,
            link: 0,
            lost: false,
            complete: 0,
            over: None,
        };
        Self {
            token,
            id,
            peer,
            epoch,
            lanes,
            payload_crc,
            shared,
            ram,
            vm: Place::new(vm),
            pager,
            protection,
            gatherer,
            listed,
            map,
            allowance,
            loading: AtomicBool::new(false),
            told: Mutex::default(),
            control: Mutex::new((0, control)),
            announced: Mutex::new(0),
            lane_state: Mutex::new(lane_state),
            changed: Condvar::new(),
        }
    }

    pub(super) fn send_control(&self, frame: &Control) -> Result<(), MigrationError> {
        lock(&self.control).1.send(self.epoch, frame)
    }

    /// Sends the source the reason why it loses the session, if this is possible at once. The
    /// source may be one that does not read.
    pub(super) fn last_word(&self, code: ErrorCode, why: &str) {
        let Ok(mut control) = self.control.try_lock() else { return };
        if control.1.set_idle_timeout(LAST_WORD).is_ok() {
            // best effort: the source also notices that the link ends
            let _ = control.1.send(self.epoch, &Control::error(code, why));
        }
    }

    /// Marks the VM as being loaded until the guard is dropped.
    pub(super) fn loads(&self) -> Loading<'_> {
        self.loading.store(true, Ordering::Relaxed);
        Loading(&self.loading)
    }

    /// Sends *pong* every [`ALIVE`] while the VM is being loaded, which may take long. Otherwise
    /// the source, whose guest is paused, could not distinguish loading from a dead destination.
    /// Returns when the session is over, or when the VM runs.
    pub(super) fn keep_alive(&self) {
        loop {
            let waiting = |s: &mut LaneState| s.over.is_none() && !s.running;
            let guard = lock(&self.lane_state);
            let mut waited = self.changed.wait_timeout_while(guard, ALIVE, waiting).unwrap_or_else(|e| e.into_inner());
            if !waiting(&mut waited.0) {
                return;
            }
            drop(waited);
            let mut control = lock(&self.control);
            // Checked under the lock under which *ready* is sent. *Ready* is sent only after
            // loading has ended, so no *pong* is sent after it.
            if self.loading.load(Ordering::Relaxed) {
                // best effort: other threads notice a source that has gone
                let _ = control.1.send(self.epoch, &Control::Pong);
            }
        }
    }

    /// Replaces the lost control lane by a new one, and closes all other lanes of the lost link.
    pub(super) fn replace_control(&self, control: ControlWriter, closer: Arc<dyn Closer>) {
        let mut state = lock(&self.lane_state);
        let lost = std::mem::replace(&mut state.control, closer);
        (state.link, state.lost) = (state.link + 1, false);
        state.vacated = None;
        state.marks.fill(0);
        let link = state.link;
        // another thread may still be writing to it
        lost.close();
        for lane in state.attached.iter_mut().filter_map(Option::take) {
            lane.close();
        }
        for lane in state.demand.iter_mut().filter_map(Option::take) {
            lane.closer.close();
        }
        if let Some(lane) = state.checkpoint.take() {
            lane.close();
        }
        // wakes the threads that wait for the end of the lost link
        self.changed.notify_all();
        drop(state);
        let mut told = lock(&self.told);
        *told = Told { ended: told.ended.take(), ..Told::default() };
        *lock(&self.control) = (link, control);
    }

    /// Sends *running*, which reports that the VM runs here. On a control lane that was reattached,
    /// the list of the pages that only the source has follows. If the VM has ended, or the source
    /// is not needed any more, that report follows instead.
    pub(super) fn report_running(&self) -> Result<(), MigrationError> {
        let mut told = lock(&self.told);
        self.send_control(&Control::Running)?;
        told.running = true;
        if let Some(ended) = &told.ended {
            self.send_control(ended)?;
            told.complete = true;
            return Ok(());
        }
        let Some(missing) = self.missing() else { return Ok(()) };
        if self.is_released() {
            told.complete = true;
            return self.send_control(&Control::Released(missing.summary()));
        }
        if lock(&self.lane_state).link == 0 {
            return self.send_lost_entries();
        }
        if self.gatherer.is_some() || missing.needs_source() {
            self.send_list()?;
        }
        Ok(())
    }

    /// Sends the list of the pages that only the source has, if *running* was sent before. The list
    /// is sent as a whole: no list for another link is sent between its frames.
    pub(super) fn list_missing(&self) -> Result<(), MigrationError> {
        let told = lock(&self.told);
        if told.running { self.send_list() } else { Ok(()) }
    }

    fn send_list(&self) -> Result<(), MigrationError> {
        self.send_lost_entries()?;
        let given_up = self.given_up();
        let pages = self.map.read(|map| {
            let mut pages = map.source_pages();
            given_up.into_iter().for_each(|entry| pages.union_with(&map.held_in(entry)));
            pages
        });
        for frame in missing_frames(&pages) {
            self.send_control(&frame)?;
        }
        self.send_control(&Control::PostCopy { missing: pages.len(), demand_lanes: 0 })
    }

    /// Sends the source the entries that have lost pages or were given up. The source may not know
    /// of them, because the loss was found before the VM ran here or while the link was lost.
    fn send_lost_entries(&self) -> Result<(), MigrationError> {
        let mut entries = self.map.read(PageMap::lost_entries);
        entries.extend(self.given_up());
        entries.sort_unstable();
        entries.dedup();
        entries.into_iter().try_for_each(|entry| self.send_control(&Control::EntryLost { entry }))
    }

    /// Returns the entries whose stores do not answer. The source is to send those of their pages
    /// that it holds.
    fn given_up(&self) -> Vec<u8> {
        self.gatherer.as_ref().map_or_else(Vec::new, |gatherer| gatherer.given_up())
    }

    /// Reports to the source that no page is missing any more. If *running* was not sent yet,
    /// nothing is sent now: the report follows *running*.
    pub(super) fn report_complete(&self, missing: &Missing) -> Result<(), MigrationError> {
        let mut told = lock(&self.told);
        if !told.running || told.complete || self.gatherer.is_some() {
            return Ok(());
        }
        told.complete = true;
        self.send_control(&Control::Complete(missing.summary()))
    }

    /// Reports to the source that it is not needed any more. If *running* was not sent yet, nothing
    /// is sent now: the report follows *running*.
    pub(super) fn report_released(&self, missing: &Missing) -> Result<(), MigrationError> {
        let mut told = lock(&self.told);
        if !told.running || told.complete {
            return Ok(());
        }
        told.complete = true;
        self.send_control(&Control::Released(missing.summary()))
    }

    /// Sends a frame that the source accepts only after *running*. Before that, nothing is sent.
    pub(super) fn send_running(&self, frame: &Control) -> Result<(), MigrationError> {
        let told = lock(&self.told);
        if told.running { self.send_control(frame) } else { Ok(()) }
    }

    /// Returns whether the source was released.
    pub(super) fn is_released(&self) -> bool {
        self.gatherer.as_ref().is_some_and(|gatherer| gatherer.is_released())
    }

    pub(super) fn gatherer(&self) -> Result<&Arc<Gatherer>, DecodeError> {
        self.gatherer.as_ref().ok_or_else(|| DecodeError::invalid("stores", "they are not agreed on"))
    }

    /// Records that the source has vacated, and has reported that with this number.
    pub(super) fn vacated(&self, number: u32) {
        self.if_all_marked(|state| state.vacated = Some(number));
    }

    /// Records that a lane was read up to the mark of this number.
    pub(super) fn marked(&self, index: u16, number: u32) {
        self.if_all_marked(|state| {
            if let Some(mark) = state.marks.get_mut(usize::from(index)) {
                *mark = number;
            }
        });
    }

    fn if_all_marked(&self, change: impl FnOnce(&mut LaneState)) {
        let mut state = lock(&self.lane_state);
        change(&mut state);
        let all = state.vacated.is_some_and(|number| state.marks.iter().all(|&mark| mark == number));
        if !all {
            return;
        }
        state.vacated = None;
        let missing = state.missing.clone();
        drop(state);
        if let Some(missing) = missing {
            missing.vacated();
        }
    }

    /// Reports to the source with this frame that the VM has ended. If *running* was not sent yet,
    /// nothing is sent now: the frame follows *running*.
    pub(super) fn report_ended(&self, ended: Control) -> Result<(), MigrationError> {
        lock(&self.lane_state).guest_ended = true;
        let mut told = lock(&self.told);
        let now = told.running && !told.complete;
        told.complete |= now;
        let said = if now { self.send_control(&ended) } else { Ok(()) };
        told.ended = Some(ended);
        said
    }

    /// Records that the guest has ended here by itself, when the source needs no report of it.
    pub(super) fn guest_has_ended(&self) {
        lock(&self.lane_state).guest_ended = true;
    }

    /// Returns whether the guest has ended here by itself.
    pub(super) fn has_guest_ended(&self) -> bool {
        lock(&self.lane_state).guest_ended
    }

    /// Handles the end of a lane of `link`. Returns whether the whole link was ended because of
    /// that.
    ///
    /// Pages that were under way on the lane may be lost. The source does not notice this, because
    /// it does not read bulk lanes. So while pages are missing, the whole link is ended: the source
    /// then connects again and receives the list of the pages to send again.
    pub(super) fn lane_lost(&self, link: u32, code: ErrorCode, why: &str) -> bool {
        let mut state = lock(&self.lane_state);
        if state.link != link || state.over.is_some() {
            return false;
        }
        let first = !std::mem::replace(&mut state.lost, true);
        self.changed.notify_all();
        // with stores, the marks on the lanes are needed until the source is released
        let lacks = match (&self.gatherer, &state.missing) {
            (Some(gatherer), Some(_)) => !gatherer.is_released(),
            (None, Some(missing)) => !missing.is_complete(),
            (_, None) => false,
        };
        // a source that was informed of the guest's end closes its lanes after *done*
        let cut = first && state.sealed && lacks && !state.guest_ended;
        let lanes = state.closers();
        let missing = state.missing.clone().filter(|_| first);
        drop(state);
        if let Some(missing) = missing {
            missing.ask_stores_again();
        }
        if cut {
            let mut control = lock(&self.control);
            // the source may have come back meanwhile
            if control.0 == link {
                // best effort: a source that does not receive this notices the closed lanes
                let _ = control.1.send(self.epoch, &Control::error(code, why));
            }
            drop(control);
            lanes.iter().for_each(|lane| lane.close());
        }
        cut
    }

    /// Attaches a demand lane to the session. Returns the number of its link.
    ///
    /// # Errors
    /// Returns an error if the session is over, if post-copy is not agreed on, if `index` is
    /// unknown or taken, or if requests cannot be sent on the lane.
    pub(super) fn attach_demand(
        &self,
        index: u16,
        closer: Arc<dyn Closer>,
        writer: Box<dyn WriteHalf>,
    ) -> Result<u32, MigrationError> {
        let mut state = lock(&self.lane_state);
        if let Some(why) = &state.over {
            return Err(DecodeError::invalid("session", format!("it is over: {why}")).into());
        }
        if self.pager.is_none() {
            return Err(DecodeError::invalid("lane kind", "post-copy is not agreed on").into());
        }
        let link = state.link;
        let missing = state.missing.clone();
        let Some(place @ None) = state.demand.get_mut(usize::from(index)) else {
            let why = format!("demand lane {index} is unknown or taken");
            return Err(DecodeError::invalid("lane index", why).into());
        };
        let (writer, at_once) = if missing.is_some() { (None, Some(writer)) } else { (Some(writer), None) };
        *place = Some(DemandLane { closer, writer });
        self.changed.notify_all();
        drop(state);
        if let (Some(missing), Some(writer)) = (missing, at_once) {
            missing.attach(index, writer).map_err(MigrationError::link("the source"))?;
        }
        Ok(link)
    }

    /// Attaches a checkpoint lane to the session. Returns the protection that serves it, and the
    /// number of its link.
    ///
    /// # Errors
    /// Returns an error if the session is over, if checkpoints are not agreed on, or if there is a
    /// checkpoint lane already.
    pub(super) fn attach_checkpoint(&self, closer: Arc<dyn Closer>) -> Result<(Arc<Protection>, u32), MigrationError> {
        let mut state = lock(&self.lane_state);
        if let Some(why) = &state.over {
            return Err(DecodeError::invalid("session", format!("it is over: {why}")).into());
        }
        let Some(protection) = &self.protection else {
            return Err(DecodeError::invalid("lane kind", "checkpoints are not agreed on").into());
        };
        if state.checkpoint.is_some() {
            return Err(DecodeError::invalid("lane kind", "there is a checkpoint lane already").into());
        }
        state.checkpoint = Some(closer);
        Ok((protection.clone(), state.link))
    }

    /// Records that the VM runs here.
    pub(super) fn set_running(&self) {
        lock(&self.lane_state).running = true;
        self.changed.notify_all();
    }

    /// Waits until the VM has been started, or the session is over.
    pub(super) fn wait_started(&self) {
        let waiting = |s: &mut LaneState| s.over.is_none() && !s.running;
        drop(self.changed.wait_while(lock(&self.lane_state), waiting).unwrap_or_else(|e| e.into_inner()));
    }

    /// Waits until the VM runs, until this link is lost or replaced, or until the session is over.
    /// Returns the missing pages if the VM runs and the link is the present one.
    pub(super) fn wait_running(&self, link: u32) -> Option<Arc<Missing>> {
        let waiting = |s: &mut LaneState| s.over.is_none() && s.link == link && !s.running && !s.lost;
        let guard = self.changed.wait_while(lock(&self.lane_state), waiting).unwrap_or_else(|e| e.into_inner());
        guard.missing.clone().filter(|_| guard.running && guard.link == link)
    }

    /// Returns the number of the present link.
    pub(super) fn link(&self) -> u32 {
        lock(&self.lane_state).link
    }

    /// Waits until a newer link replaces this one or the session is over, but for at most `time`.
    /// Returns whether neither has happened.
    pub(super) fn stays_lost(&self, link: u32, time: Duration) -> bool {
        let waiting = |s: &mut LaneState| s.over.is_none() && s.link == link;
        let guard = lock(&self.lane_state);
        let mut waited = self.changed.wait_timeout_while(guard, time, waiting).unwrap_or_else(|e| e.into_inner());
        waiting(&mut waited.0)
    }

    /// Sets the missing pages. From now on pages that arrive go through the pager, and faults are
    /// requested from the source.
    ///
    /// # Errors
    /// Returns an error if a lane of the present link has ended, or if requests cannot be sent on a
    /// demand lane.
    pub(super) fn set_missing(&self, missing: &Arc<Missing>) -> Result<(), MigrationError> {
        let mut state = lock(&self.lane_state);
        if state.lost {
            let cause = std::io::Error::new(std::io::ErrorKind::NotConnected, "a lane has ended already");
            return Err(MigrationError::link("the source")(cause));
        }
        state.missing = Some(missing.clone());
        self.changed.notify_all();
        let lanes = state.demand.iter_mut().enumerate();
        let writers: Vec<_> = lanes.filter_map(|(i, lane)| Some((i, lane.as_mut()?.writer.take()?))).collect();
        drop(state);
        for (index, writer) in writers {
            missing.attach(index as u16, writer).map_err(MigrationError::link("the source"))?;
        }
        Ok(())
    }

    /// Returns whether the VM runs here.
    pub(super) fn is_running(&self) -> bool {
        lock(&self.lane_state).running
    }

    /// Returns whether a lane of the present link has ended.
    pub(super) fn has_lost_lane(&self) -> bool {
        lock(&self.lane_state).lost
    }

    /// Waits until pages are missing. Returns `None` if the VM runs without missing pages, or the
    /// session is over.
    pub(super) fn wait_missing(&self) -> Option<Arc<Missing>> {
        let waiting = |s: &mut LaneState| s.over.is_none() && s.missing.is_none() && !s.running;
        let guard = self.changed.wait_while(lock(&self.lane_state), waiting);
        guard.unwrap_or_else(|e| e.into_inner()).missing.clone()
    }

    pub(super) fn missing(&self) -> Option<Arc<Missing>> {
        lock(&self.lane_state).missing.clone()
    }

    pub(super) fn wait_demand(&self, lanes: u16, timeout: Duration) -> Result<(), MigrationError> {
        let there = |s: &LaneState| s.demand.iter().take(usize::from(lanes)).all(Option::is_some);
        self.wait_for(timeout, "the source to open its demand lanes", there)
    }

    /// Attaches a bulk lane to the session. Returns the number of its link.
    ///
    /// # Errors
    /// Returns an error if the session is over, or if `index` is unknown or taken.
    pub(super) fn attach(&self, index: u16, closer: Arc<dyn Closer>) -> Result<u32, MigrationError> {
        let mut state = lock(&self.lane_state);
        if let Some(why) = &state.over {
            return Err(DecodeError::invalid("session", format!("it is over: {why}")).into());
        }
        match state.attached.get_mut(usize::from(index)) {
            Some(place @ None) => *place = Some(closer),
            _ => return Err(DecodeError::invalid("lane index", format!("lane {index} is unknown or taken")).into()),
        }
        self.changed.notify_all();
        Ok(state.link)
    }

    pub(super) fn wait_attached(&self, timeout: Duration) -> Result<(), MigrationError> {
        self.wait_for(timeout, "the source to open its lanes", |s| s.attached.iter().all(Option::is_some))
    }

    /// Sends *prepared*, which reports to the source that all its lanes are open.
    pub(super) fn report_prepared(&self, prepared: &Control) -> Result<(), MigrationError> {
        self.send_control(prepared)?;
        lock(&self.lane_state).prepared = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until *prepared* was sent.
    pub(super) fn wait_prepared(&self, timeout: Duration) -> Result<(), MigrationError> {
        self.wait_for(timeout, "the lanes to be ready", |s| s.prepared)
    }

    /// Waits until every lane has completed `generation`. This may take any time, provided that
    /// `bytes` grows within each `idle`.
    pub(super) fn wait_round(&self, generation: u32, idle: Duration, bytes: &AtomicU64) -> Result<(), MigrationError> {
        loop {
            let before = bytes.load(Ordering::Relaxed);
            let waited = self.wait_for(idle, "the last pages", |s| s.complete >= generation);
            if waited.is_ok() || self.over().is_some() || bytes.load(Ordering::Relaxed) == before {
                return waited;
            }
        }
    }

    /// Records that a lane is about to receive pages of `generation` into RAM.
    ///
    /// # Errors
    /// Returns an error if RAM is shared, or if the state is about to be loaded or was loaded.
    pub(super) fn lane_starts(&self, index: u16, generation: u32) -> Result<(), MigrationError> {
        if self.shared {
            return Err(DecodeError::invalid("pages", "RAM is shared, no page moves").into());
        }
        let mut state = lock(&self.lane_state);
        if state.sealed {
            let why = format!("pages of round {generation} after the VM was offered");
            return Err(DecodeError::invalid("generation", why).into());
        }
        if let Some(started) = state.started.get_mut(usize::from(index)) {
            *started = generation;
        }
        Ok(())
    }

    /// Records that a lane has completed a round. When the last lane has completed it, the round is
    /// announced to the source.
    pub(super) fn lane_ended(&self, index: u16, generation: u32) -> Result<(), MigrationError> {
        if let Some(ended) = lock(&self.lane_state).ended.get_mut(usize::from(index)) {
            *ended = generation;
        }
        let mut announced = lock(&self.announced);
        let all = lock(&self.lane_state).ended.iter().copied().min().unwrap_or(0);
        if all > *announced {
            *announced = all;
            self.send_control(&Control::RoundReceived { generation: all })?;
            // only after the announcement, so that *ready* is sent after it
            lock(&self.lane_state).complete = all;
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Forbids lanes to write pages of rounds into RAM any more, because the state is about to be
    /// loaded. RAM must have its contents of the end of `generation`.
    ///
    /// # Errors
    /// Returns an error if a lane has begun to receive pages of a later round.
    pub(super) fn seal(&self, generation: u32) -> Result<(), MigrationError> {
        let mut state = lock(&self.lane_state);
        state.sealed = true;
        if state.started.iter().any(|&started| started > generation) {
            let why = format!("pages of a round after {generation}, the last one by the offer");
            return Err(DecodeError::invalid("generation", why).into());
        }
        Ok(())
    }

    pub(super) fn is_sealed(&self) -> bool {
        lock(&self.lane_state).sealed
    }

    /// Sends the source the reason why a lane has failed, and ends the session.
    pub(super) fn fail(&self, code: ErrorCode, why: &str) {
        // locked over both steps: another lane that fails must not close the control lane before
        // the reason is sent
        let mut control = lock(&self.control);
        if self.end(why) {
            // best effort: a source that does not receive this notices the closed lanes
            let _ = control.1.send(self.epoch, &Control::error(code, why));
        }
        drop(control);
        self.close(why);
    }

    /// Returns the reason why the session is over, if it is.
    pub(super) fn over(&self) -> Option<String> {
        lock(&self.lane_state).over.clone()
    }

    /// Ends the session and all its lanes.
    pub(super) fn close(&self, why: &str) {
        self.end(why);
        let state = lock(&self.lane_state);
        state.closers().iter().for_each(|lane| lane.close());
        if let Some(missing) = &state.missing {
            missing.close();
        }
        if let Some(gatherer) = &self.gatherer {
            gatherer.end();
        }
    }

    /// Ends the session, and frees the VM if it was not started. Returns whether there was such a
    /// VM.
    pub(super) fn discard(&self, why: &str) -> bool {
        self.close(why);
        // a thread that loads the state may wait for a page that will not arrive
        if let Some(pager) = &self.pager {
            pager.give_up();
        }
        let there = self.vm.take().is_some();
        if let Some(protection) = &self.protection {
            protection.give_up();
        }
        there
    }

    /// Marks the session as over: from now on no thread waits and no lane attaches. Returns false
    /// if the session was over before; the first reason is kept.
    fn end(&self, why: &str) -> bool {
        let mut state = lock(&self.lane_state);
        let first = state.over.is_none();
        if first {
            state.over = Some(why.to_owned());
            self.changed.notify_all();
        }
        first
    }

    fn wait_for(&self, timeout: Duration, what: &str, done: impl Fn(&LaneState) -> bool) -> Result<(), MigrationError> {
        let waiting = |state: &mut LaneState| state.over.is_none() && !done(state);
        let guard = lock(&self.lane_state);
        let guard = self.changed.wait_timeout_while(guard, timeout, waiting).unwrap_or_else(|e| e.into_inner()).0;
        let cause = match &guard.over {
            Some(why) => std::io::Error::other(why.clone()),
            None if done(&guard) => return Ok(()),
            None => std::io::Error::new(std::io::ErrorKind::TimedOut, format!("waited {timeout:?} for {what}")),
        };
        Err(MigrationError::link("the source")(cause))
    }
}
