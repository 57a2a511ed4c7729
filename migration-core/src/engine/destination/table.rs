//! The table of a receiver's VMs, with a bounded number of entries.
//!
//! A receiver of one VM has one permanent entry for whichever VM comes. A receiver of several VMs
//! adds an entry when it accepts a hello. It removes the entry when the attempt has failed, or when
//! the source knows that the VM runs here. After that it keeps the epoch of a VM that was *ready*
//! here. Other epochs need not be kept: before *ready* the source cannot have given the VM away, so
//! a repeated hello is harmless.

use std::collections::VecDeque;

use super::{attempt::Greeted, introduce::ControlLane, *};
use crate::wire::Hello;

/// The largest number of epochs that are kept of VMs without an entry. One more removes the oldest:
/// if the old source of that VM comes back, it is then treated like a new one.
const MAX_EPOCHS: usize = 4096;

/// The part of a receiver that its entries share.
pub(super) struct Common {
    pub(super) options: ReceiverOptions,
    pub(super) host: Arc<dyn AnyHost>,
    pub(super) stop: AtomicBool,
    pub(super) bytes: Arc<AtomicU64>,
    pub(super) connections: Mutex<Connections>,
    /// Threads that are reserved for lanes.
    pub(super) reserved: Mutex<AllParked>,
    /// Reports how many lanes can be accepted. `None` if there is no listener yet, or if the
    /// listener does not report this.
    pub(super) room: Mutex<Option<Arc<dyn Room>>>,
}

/// The inner part of a receiver.
pub(super) struct Destination {
    pub(super) common: Arc<Common>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    entries: Vec<Arc<VmEntry>>,
    /// Entries that were removed, and whose threads may still run.
    leaving: Vec<Arc<VmEntry>>,
    /// The epochs of VMs that were *ready* here and have no entry any more. The oldest is first.
    epochs: VecDeque<(VmId, u32)>,
    /// The number of entries so far.
    numbers: u64,
}

/// A VM that is received, held, or served here.
pub(super) struct VmEntry {
    pub(super) common: Arc<Common>,
    /// A number that no other entry of the receiver has.
    pub(super) number: u64,
    /// Never locked before the table. Locked after it for short times.
    pub(super) state: Mutex<State>,
    /// The notices to the host about the VM.
    pub(super) notices: Notices,
    /// Lets one attempt at a time build the VM.
    pub(super) turns: Turns,
    /// The threads of the entry's sessions, without those of lanes.
    pub(super) watchers: Mutex<Vec<Watcher>>,
    /// Whether the VM runs here and its source knows that or is dead.
    pub(super) finished: AtomicBool,
}

/// The changing state of an entry.
pub(super) struct State {
    pub(super) machine: DestinationMachine,
    pub(super) session: Option<Arc<Session>>,
    /// The number of control lanes so far. Only the last one speaks for the session.
    pub(super) attachment: u64,
    /// Whether the VM was *ready* here in any attempt.
    pub(super) was_ready: bool,
}

/// A thread of a session.
pub(super) struct Watcher {
    pub(super) thread: Box<dyn Joiner>,
    /// Whether the thread has done its work and ends at once.
    pub(super) ended: Arc<AtomicBool>,
}

/// A session and its entry.
pub(super) struct Found {
    pub(super) entry: Arc<VmEntry>,
    pub(super) session: Arc<Session>,
}

impl Destination {
    pub(super) fn new(host: Arc<dyn AnyHost>, options: ReceiverOptions) -> Self {
        let options = ReceiverOptions { observer: Guarded::around(&options.observer), ..options };
        let only = match options.awaits {
            Some((vm, epoch)) => Some(DestinationMachine::awaiting(vm, epoch)),
            None => (options.max_vms <= 1).then(DestinationMachine::new),
        };
        let common = Arc::new(Common {
            options,
            host,
            stop: AtomicBool::new(false),
            bytes: Arc::default(),
            connections: Mutex::default(),
            reserved: Mutex::default(),
            room: Mutex::default(),
        });
        let mut table = Table::default();
        if let Some(machine) = only {
            let entry = table.entry(&common, machine);
            table.entries.push(entry);
        }
        Self { common, table: Mutex::new(table) }
    }

    /// Returns the entry if this is a receiver of one VM.
    pub(super) fn single(&self) -> Option<Arc<VmEntry>> {
        if self.is_single() { self.only() } else { None }
    }

    /// Returns the entry if there is exactly one now.
    pub(super) fn only(&self) -> Option<Arc<VmEntry>> {
        match &lock(&self.table).entries[..] {
            [entry] => Some(entry.clone()),
            _ => None,
        }
    }

    fn is_single(&self) -> bool {
        self.common.options.max_vms <= 1 || self.common.options.awaits.is_some()
    }

    /// Returns all entries.
    pub(super) fn entries(&self) -> Vec<Arc<VmEntry>> {
        lock(&self.table).entries.clone()
    }

    /// Returns the entry of this VM.
    pub(super) fn entry(&self, vm: VmId) -> Option<Arc<VmEntry>> {
        lock(&self.table).entries.iter().find(|entry| entry.vm() == Some(vm)).cloned()
    }

    /// Returns whether an attempt to receive this VM under a later epoch is under way.
    pub(super) fn has_newer(&self, vm: VmId, epoch: u32) -> bool {
        self.entry(vm).is_some_and(|entry| {
            let state = lock(&entry.state);
            state.machine.epoch() > epoch && state.machine.phase() != DestinationPhase::Empty
        })
    }

    /// Returns the session of this token.
    ///
    /// # Errors
    /// Returns an error if no session has the token.
    pub(super) fn find(&self, token: SessionToken) -> Result<Found, MigrationError> {
        let table = lock(&self.table);
        let found = table.entries.iter().find_map(|entry| {
            let session = lock(&entry.state).session.clone().filter(|session| session.token == token)?;
            Some(Found { entry: entry.clone(), session })
        });
        found.ok_or_else(|| DecodeError::invalid("session", "no such session is under way here").into())
    }

    /// Returns the sessions whose lanes are not complete yet.
    pub(super) fn preparing(&self) -> Vec<Arc<Session>> {
        let preparing = |entry: &Arc<VmEntry>| {
            let state = lock(&entry.state);
            let (phase, epoch) = (state.machine.phase(), state.machine.epoch());
            let session = state.session.clone().filter(|session| session.epoch == epoch);
            session.filter(|_| phase == DestinationPhase::Preparing)
        };
        lock(&self.table).entries.iter().filter_map(preparing).collect()
    }

    /// Serves a source that begins an attempt, until its control lane ends.
    pub(super) fn attempt(
        &self,
        epoch: u32,
        hello: Box<Hello>,
        mut lane: ControlLane,
        peer: &str,
    ) -> Result<(), MigrationError> {
        self.make_room(hello.vm.id);
        match self.greet(epoch, hello) {
            Ok((entry, greeted)) => entry.attempt(greeted, lane, peer),
            Err(violation) => {
                lane.control.send(epoch, &Control::error(violation.code, violation.to_string()))?;
                Err(violation.into())
            }
        }
    }

    /// Ends an attempt that has made too little progress, if there is no place for this VM.
    fn make_room(&self, vm: VmId) {
        let why = "the attempt has made too little progress for the time it took, and another source wants to come";
        let entries = self.entries();
        let has_place = |entry: &Arc<VmEntry>| entry.vm() == Some(vm);
        if entries.len() < self.common.options.max_vms || entries.iter().any(has_place) {
            return;
        }
        // it is enough to end one of them
        let _ = entries.iter().any(|entry| entry.end_attempt(why, Allowance::is_used_up));
    }

    /// Passes the hello to the entry of this VM, or to a new one.
    fn greet(&self, epoch: u32, hello: Box<Hello>) -> Result<(Arc<VmEntry>, Greeted), Violation> {
        let (id, mut table) = (hello.vm.id, lock(&self.table));
        let single = self.is_single();
        if !single {
            table.remove_those_that_are_over();
        }
        let known = table.entries.iter().find(|entry| single || entry.vm() == Some(id)).cloned();
        let entry = match known {
            Some(entry) => entry,
            None if table.entries.len() >= self.common.options.max_vms => {
                let why = "the destination receives and holds as many VMs as it takes at once";
                return Err(Violation::new("hello", epoch, DestinationPhase::Empty, why).with_code(ErrorCode::Busy));
            }
            None => {
                let kept = table.epochs.iter().find(|(vm, _)| *vm == id);
                let machine =
                    kept.map_or_else(DestinationMachine::new, |&(vm, epoch)| DestinationMachine::after(vm, epoch));
                table.entry(&self.common, machine)
            }
        };
        let mut state = lock(&entry.state);
        let action = state.machine.handle(epoch, Control::Hello(hello))?;
        state.attachment += 1;
        let greeted = Greeted { epoch, attachment: state.attachment, action };
        drop(state);
        if !table.entries.iter().any(|known| Arc::ptr_eq(known, &entry)) {
            table.entries.push(entry.clone());
        }
        Ok((entry, greeted))
    }

    /// Removes the entries that are over, if this is a receiver of several VMs, and joins the
    /// threads of removed entries that have ended.
    pub(super) fn sweep(&self) {
        if self.is_single() {
            return;
        }
        let mut table = lock(&self.table);
        table.remove_those_that_are_over();
        let mut leaving = std::mem::take(&mut table.leaving);
        drop(table);
        leaving.retain(|entry| {
            entry.close("its source knows that the VM runs here");
            !entry.joined_watchers()
        });
        lock(&self.table).leaving.append(&mut leaving);
    }

    /// Closes all connections, discards the VMs that are not owned here, and joins all threads.
    pub(super) fn close(&self, accepting: &mut Accepting) {
        let entries = {
            let table = lock(&self.table);
            [&table.entries[..], &table.leaving[..]].concat()
        };
        entries.iter().for_each(|entry| entry.close("the receiver has ended"));
        lock(&self.common.connections).end();
        accepting.join();
        entries.iter().for_each(|entry| entry.join_watchers());
    }
}

impl Table {
    /// Creates an entry, which is not in the table yet.
    fn entry(&mut self, common: &Arc<Common>, machine: DestinationMachine) -> Arc<VmEntry> {
        self.numbers += 1;
        Arc::new(VmEntry {
            common: common.clone(),
            number: self.numbers,
            state: Mutex::new(State { machine, session: None, attachment: 0, was_ready: false }),
            notices: Notices::default(),
            turns: Turns::default(),
            watchers: Mutex::default(),
            finished: AtomicBool::new(false),
        })
    }

    fn remove_those_that_are_over(&mut self) {
        let (over, staying) = std::mem::take(&mut self.entries).into_iter().partition(|entry| entry.is_over());
        self.entries = staying;
        for entry in &over {
            self.keep_epoch(entry);
        }
        self.leaving.extend(over);
    }

    fn keep_epoch(&mut self, entry: &VmEntry) {
        let state = lock(&entry.state);
        let Some(vm) = state.machine.vm() else { return };
        let known = self.epochs.iter().position(|(known, _)| *known == vm);
        if !state.was_ready && known.is_none() {
            return;
        }
        known.map(|known| self.epochs.remove(known));
        self.epochs.push_back((vm, state.machine.epoch()));
        if self.epochs.len() > MAX_EPOCHS {
            self.epochs.pop_front();
        }
    }
}

impl VmEntry {
    /// Returns the VM of the last attempt.
    pub(super) fn vm(&self) -> Option<VmId> {
        lock(&self.state).machine.vm()
    }

    /// Returns whether no VM is received, held or served any more.
    fn is_over(&self) -> bool {
        self.finished.load(Ordering::Relaxed) || lock(&self.state).machine.phase() == DestinationPhase::Empty
    }

    /// Ends the session of the entry, and discards the VM if it is not owned here.
    fn close(&self, why: &str) {
        let (session, owned) = {
            let state = lock(&self.state);
            (state.session.clone(), state.machine.phase() == DestinationPhase::Running)
        };
        match session {
            // missing pages stay missing, so that no thread reads them as zeros
            Some(session) if owned => {
                // another thread may be starting the VM, after the decision of a person
                self.notices.wait_open();
                session.close(why);
            }
            Some(session) => drop(session.discard(why)),
            None => {}
        }
    }

    /// Joins the threads of the entry's sessions if all of them have ended. Returns whether they
    /// have ended.
    fn joined_watchers(&self) -> bool {
        let ended = lock(&self.watchers).iter().all(|watcher| watcher.ended.load(Ordering::Acquire));
        if ended {
            self.join_watchers();
        }
        ended
    }
}
