//! The VM's RAM at a broker, and what the broker is told for the time after this process: before another process may run the VM,
//! and not after.

use std::{iter, sync::PoisonError};

use migration_transport::BrokerError;

use super::*;
use crate::{control, restart::Will};

/// What a broker has of the VM.
pub(super) struct Kept {
    broker: Option<BrokerClient>,
    deposit: Option<Deposit>,
    will: Will,
    /// This process, if it can be named.
    own: Option<Vec<u8>>,
    /// Another one that may have the VM by now.
    heir: Option<Vec<u8>>,
}

impl Kept {
    pub(super) fn at(broker: Option<PathBuf>) -> Mutex<Self> {
        let own = ProcessIdentity::own().ok().map(|own| own.encode());
        let broker = broker.map(BrokerClient::new);
        Mutex::new(Self { broker, deposit: None, will: Will::default(), own, heir: None })
    }

    /// What is to be known now.
    fn note(&self) -> Vec<u8> {
        // who cannot be named cannot be told dead: then nobody is named
        let holders = self.own.iter().flat_map(|own| iter::once(own).chain(&self.heir)).cloned().collect();
        Will { holders, ..self.will.clone() }.encode()
    }
}

impl Instance {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the broker, if there is one, keep the VM's RAM.
    pub(crate) fn keep_ram(&self) -> Result<(), String> {
        self.tell_broker(|_| {}).map_err(|e| e.to_string())
    }

    /// Where the broker is, if there is one.
    pub(super) fn broker(&self) -> Option<PathBuf> {
        self.kept().broker.as_ref().map(|broker| broker.path().to_owned())
    }

    /// Where it is, if it has the VM's RAM; and from what the VM can be restarted.
    pub(crate) fn kept_by(&self) -> (Option<PathBuf>, Option<Saved>) {
        let kept = self.kept();
        let broker = kept.deposit.as_ref().and(kept.broker.as_ref()).map(|broker| broker.path().to_owned());
        let snapshot = broker.as_ref().and(kept.will.snapshot.clone());
        (broker, snapshot)
    }

    /// From now on this broker is the VM's.
    pub(super) fn set_broker(&self, broker: Option<PathBuf>) {
        self.kept().broker = broker.map(BrokerClient::new);
    }

    /// The VM has ended well or moved away: the broker need not keep it. If it has gone to a process of this host that one deposits it,
    /// unless it dies before: so what is there stays until then.
    pub(super) fn forget_ram(&self) {
        let mut kept = self.kept();
        let inherited = kept.heir.is_some() && kept.will.elsewhere.is_none();
        if let Some(deposit) = kept.deposit.take().filter(|_| !inherited)
            && let Err(error) = deposit.forget()
        {
            log!("{error}");
        }
    }

    /// Changes what is to be known after this process, and has the broker know it. If the VM is borrowed that is its home's to do.
    fn tell_broker(&self, change: impl FnOnce(&mut Kept)) -> Result<(), BrokerError> {
        let state = self.lock();
        if state.lender.is_some() {
            return Ok(());
        }
        let (machine, place) = (state.machine.clone(), state.place.clone());
        drop(state);
        let mut guard = self.kept();
        let kept = &mut *guard;
        change(kept);
        if let Some(place) = place {
            (kept.will.control, kept.will.serial) = (Some(place.control), place.serial);
            kept.will.seal_key = self.seal_key();
        }
        let (Some(broker), Some(machine)) = (&kept.broker, machine) else { return Ok(()) };
        if kept.deposit.as_ref().is_some_and(|deposit| deposit.note(&kept.note()).is_ok()) {
            return Ok(());
        }
        // there was none, or its connection has broken, after which the broker takes this process for dead
        kept.deposit = None;
        let deposit = machine.deposit(broker)?;
        // it is of the same VM, and of this host
        let last = Will::decode(deposit.last_note()).ok().and_then(|last| last.snapshot);
        kept.will.snapshot = kept.will.snapshot.take().or(last);
        deposit.note(&kept.note())?;
        kept.deposit = Some(deposit);
        Ok(())
    }

    /// As [`tell_broker`](Self::tell_broker), where the VM must not be restarted by a broker that has not heard of it. One that has
    /// ended restarts nothing.
    fn must_tell_broker(&self, change: impl FnOnce(&mut Kept)) -> Result<(), String> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match self.tell_broker(change) {
            Err(BrokerError::Link { cause, .. }) if matches!(cause.kind(), ConnectionRefused | NotFound) => Ok(()),
            told => told.map_err(|e| format!("the broker would not know where the VM is, and might restart it: {e}")),
        }
    }

    /// The VM is about to leave for `to`: for the process `heir`, or nobody knows for which one.
    pub(super) fn leaves_for(&self, to: &Address, heir: Option<Vec<u8>>) -> Result<(), String> {
        match heir {
            Some(heir) => self.may_be_at(heir, to),
            None => self.is_elsewhere(Some(to.to_string())),
        }
    }

    /// Beside this process that one may have the VM, which is reached there.
    pub(super) fn may_be_at(&self, process: Vec<u8>, to: &Address) -> Result<(), String> {
        match self.lender() {
            Some(_) => self.is_elsewhere(Some(to.to_string())),
            None => self.must_tell_broker(|kept| kept.heir = Some(process)),
        }
    }

    /// The VM may run where its processes cannot be told dead.
    pub(super) fn is_elsewhere(&self, to: Option<String>) -> Result<(), String> {
        match self.lender() {
            Some(lender) => control::ask_peer(&lender, &Request::Elsewhere { to }).map(drop),
            None => self.must_tell_broker(|kept| kept.will.elsewhere = to),
        }
    }

    /// It has not left.
    pub(super) fn stays(&self) {
        let told = match self.lender() {
            Some(_) => self.is_elsewhere(None),
            None => self.must_tell_broker(|kept| (kept.heir, kept.will.elsewhere) = (None, None)),
        };
        if let Err(why) = told {
            log!("the VM is not restarted if it is lost now: {why}");
        }
    }

    /// The guest has come to its end.
    pub(super) fn guest_ended(&self) {
        if let Err(why) = self.must_tell_broker(|kept| kept.will.ended = true) {
            log!("{why}");
        }
    }

    /// This is a whole snapshot of the VM, to go on from.
    pub(crate) fn has_snapshot(&self, snapshot: Saved) {
        let file = snapshot.file.clone();
        let told = match self.lender() {
            Some(lender) => control::ask_peer(&lender, &Request::Saved { snapshot }).map(drop),
            None => self.tell_broker(|kept| kept.will.snapshot = Some(snapshot)).map_err(|e| e.to_string()),
        };
        if let Err(why) = told {
            log!("the VM is not restarted from {}: {why}", file.display());
        }
    }

    /// Whose broker is to know, if the VM is borrowed from a home that has one.
    fn lender(&self) -> Option<PathBuf> {
        self.lock().lender.clone()
    }
}
