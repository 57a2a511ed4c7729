//! The VM's RAM at a broker, and what the broker is told for the time after this process: before another process may run the VM,
//! and not after.

use std::{
    iter,
    ops::{Deref, DerefMut},
    sync::PoisonError,
};

use migration_transport::BrokerError;

use super::*;
use crate::{control, restart::Will};

/// What a broker has of the VM.
///
/// There are two locks. One is held while the broker is asked, which may take as long as the broker
/// is waited for. The other one guards a copy of what `status` shows, and is held for copying only.
pub(super) struct Kept {
    talk: Mutex<Talk>,
    shown: Mutex<Shown>,
}

/// What the broker is told, and the connection on which it is.
struct Talk {
    broker: Option<BrokerClient>,
    deposit: Option<Deposit>,
    will: Will,
    /// This process, if it can be named.
    own: Option<Vec<u8>>,
    /// Another one that may have the VM by now.
    heir: Option<Vec<u8>>,
}

/// As it was when the broker was asked last.
#[derive(Clone, Default)]
struct Shown {
    broker: Option<PathBuf>,
    /// Whether the broker has the VM's RAM.
    has_ram: bool,
    snapshot: Option<Saved>,
}

impl Kept {
    pub(super) fn at(broker: Option<PathBuf>) -> Self {
        let own = ProcessIdentity::own().ok().map(|own| own.encode());
        let shown = Mutex::new(Shown { broker: broker.clone(), ..Shown::default() });
        let broker = broker.map(BrokerClient::new);
        let talk = Talk { broker, deposit: None, will: Will::default(), own, heir: None };
        Self { talk: Mutex::new(talk), shown }
    }

    /// Waits until nobody talks to the broker any more.
    fn talk(&self) -> Talking<'_> {
        let talk = self.talk.lock().unwrap_or_else(PoisonError::into_inner);
        Talking { talk, shown: &self.shown }
    }

    /// Waits for nobody.
    fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The right to talk to the broker. What comes of it is shown when this is dropped.
struct Talking<'a> {
    talk: MutexGuard<'a, Talk>,
    shown: &'a Mutex<Shown>,
}

impl Deref for Talking<'_> {
    type Target = Talk;

    fn deref(&self) -> &Talk {
        &self.talk
    }
}

impl DerefMut for Talking<'_> {
    fn deref_mut(&mut self) -> &mut Talk {
        &mut self.talk
    }
}

impl Drop for Talking<'_> {
    fn drop(&mut self) {
        let Talk { broker, deposit, will, .. } = &*self.talk;
        let shown = Shown {
            broker: broker.as_ref().map(|broker| broker.path().to_owned()),
            has_ram: deposit.is_some(),
            snapshot: will.snapshot.clone(),
        };
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    }
}

impl Talk {
    /// What is to be known now.
    fn note(&self) -> Vec<u8> {
        // who cannot be named cannot be told dead: then nobody is named
        let holders = self.own.iter().flat_map(|own| iter::once(own).chain(&self.heir)).cloned().collect();
        Will { holders, ..self.will.clone() }.encode()
    }
}

impl Instance {
    /// Has the broker, if there is one, keep the VM's RAM.
    pub(crate) fn keep_ram(&self) -> Result<(), String> {
        self.tell_broker(|_| {}).map_err(|e| e.to_string())
    }

    /// Where the broker is, if there is one. Waits for nobody.
    pub(super) fn broker(&self) -> Option<PathBuf> {
        self.kept.shown().broker
    }

    /// Where it is, if it has the VM's RAM; and from what the VM can be restarted. Waits for nobody.
    pub(crate) fn kept_by(&self) -> (Option<PathBuf>, Option<Saved>) {
        let Shown { broker, has_ram, snapshot } = self.kept.shown();
        let broker = broker.filter(|_| has_ram);
        let snapshot = snapshot.filter(|_| broker.is_some());
        (broker, snapshot)
    }

    /// From now on this broker is the VM's.
    pub(super) fn set_broker(&self, broker: Option<PathBuf>) {
        self.kept.talk().broker = broker.map(BrokerClient::new);
    }

    /// The VM has ended well or moved away: the broker need not keep it. If it has gone to a process of this host that one deposits it,
    /// unless it dies before: so what is there stays until then.
    pub(super) fn forget_ram(&self) {
        let mut kept = self.kept.talk();
        let inherited = kept.heir.is_some() && kept.will.elsewhere.is_none();
        if let Some(deposit) = kept.deposit.take().filter(|_| !inherited)
            && let Err(error) = deposit.forget()
        {
            log!("{error}");
        }
    }

    /// Changes what is to be known after this process, and has the broker know it. If the VM is borrowed that is its home's to do.
    fn tell_broker(&self, change: impl FnOnce(&mut Talk)) -> Result<(), BrokerError> {
        let state = self.lock();
        if state.lender.is_some() {
            return Ok(());
        }
        let (machine, place) = (state.machine.clone(), state.place.clone());
        drop(state);
        let mut talking = self.kept.talk();
        let kept = &mut *talking;
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
    fn must_tell_broker(&self, change: impl FnOnce(&mut Talk)) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixListener};

    use migration_kvm::{ram::Backing, tracker::TrackerKind};

    use super::*;
    use crate::vmm::{MachineConfig, SerialTarget};

    /// A software guest in memory that a broker can keep.
    fn machine() -> Arc<Machine> {
        let config =
            MachineConfig { software: true, ..MachineConfig::new(64 << 20, 1, Backing::Memfd, TrackerKind::Auto) };
        Arc::new(Machine::new(config, &SerialTarget::Null).unwrap())
    }

    #[test]
    fn what_status_cancel_and_quit_take_is_free_while_a_broker_does_not_answer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker");
        let listener = UnixListener::bind(&path).unwrap();
        let instance = Instance::new(Some(path.clone()), Sealing::load(None).unwrap());
        instance.own(machine());
        let teller = instance.clone();
        let teller = thread::spawn(move || teller.keep_ram());
        let (mut asked, _) = listener.accept().unwrap();
        // the request is here: whoever waits for the answer holds what is held for that time
        asked.read_exact(&mut [0]).unwrap();
        assert_eq!(instance.status()["kept_by"], Value::Null);
        assert_eq!(instance.broker(), Some(path));
        assert!(instance.handle(Request::Cancel, &mut |_| {}).unwrap_err().contains("no migration is under way"));
        assert_eq!(instance.handle(Request::Quit, &mut |_| {}).unwrap()["state"], "ended");
        drop((asked, listener));
        // only now: after its patience the client would have had another error
        let why = teller.join().unwrap().unwrap_err();
        assert!(why.contains("closed the connection") || why.contains("reset"), "{why}");
    }
}
