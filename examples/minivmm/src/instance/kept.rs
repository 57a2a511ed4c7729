//! The VM's RAM at a broker, and what the broker is told for the time after this process: before
//! another process may run the VM, and not after.

use migration_transport::{
    BrokerError, RamLease,
    supervisor::{Change, OwnerStatus, RestartRecord, SupervisedVm},
};

use super::*;
use crate::{control, restart::StoredRecord};

/// The VM, as its broker is told of it.
struct AtBroker {
    machine: Arc<Machine>,
    place: Option<Place>,
    seal_key: Option<PathBuf>,
}

impl SupervisedVm for AtBroker {
    type Saved = Saved;

    fn lease(&self, broker: &BrokerClient) -> Result<RamLease, BrokerError> {
        self.machine.lease_ram(broker)
    }

    fn encode(&self, record: &RestartRecord<Saved>) -> Vec<u8> {
        StoredRecord::new(record, self.place.as_ref(), self.seal_key.clone()).encode()
    }

    fn last_saved(&self, metadata: &[u8]) -> Option<Saved> {
        StoredRecord::decode(metadata).ok().and_then(|last| last.snapshot)
    }
}

impl Instance {
    /// Has the broker, if there is one, keep the VM's RAM.
    pub(crate) fn keep_ram(&self) -> Result<(), String> {
        self.report_broker(Change::Nothing).map_err(describe)
    }

    /// Where the broker is, if there is one. Waits for nobody.
    pub(super) fn broker(&self) -> Option<PathBuf> {
        self.kept.status().broker
    }

    /// Where it is, if it has the VM's RAM; and from what the VM can be restarted. Waits for
    /// nobody.
    pub(crate) fn kept_by(&self) -> (Option<PathBuf>, Option<Saved>) {
        let OwnerStatus { broker, has_ram, saved } = self.kept.status();
        let broker = broker.filter(|_| has_ram);
        let saved = saved.filter(|_| broker.is_some());
        (broker, saved)
    }

    /// From now on this broker is the VM's.
    pub(super) fn set_broker(&self, broker: Option<PathBuf>) {
        self.kept.set_broker(broker);
    }

    /// The VM has ended well or moved away.
    pub(super) fn forget_ram(&self) {
        if let Err(error) = self.kept.release() {
            log!("{}", Chain(&error));
        }
    }

    /// What the broker is told of, if there is a VM.
    fn at_broker(&self) -> Option<AtBroker> {
        let state = self.lock();
        let (machine, place) = (state.machine.clone()?, state.place.clone());
        drop(state);
        Some(AtBroker { machine, place, seal_key: self.seal_key() })
    }

    /// Changes what is to be known after this process, and has the broker know it. If the VM is
    /// borrowed that is its home's to do.
    fn report_broker(&self, change: Change<Saved>) -> Result<(), BrokerError> {
        if self.lender().is_some() {
            return Ok(());
        }
        self.kept.update(self.at_broker().as_ref().map(|vm| vm as _), change)
    }

    /// As [`report_broker`](Self::report_broker) for a VM that is not borrowed, where it must not be
    /// restarted by a broker that has not heard of it.
    fn must_tell_broker(&self, change: Change<Saved>) -> Result<(), String> {
        let told = self.kept.update_or_fail(self.at_broker().as_ref().map(|vm| vm as _), change);
        told.map_err(|e| format!("the broker would not know where the VM is, and might restart it: {}", Chain(&e)))
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
        self.is_or_may_be(Some(to.to_string()), Change::MayRunIn(process))
    }

    /// The VM may run where its processes cannot be told dead.
    pub(super) fn is_elsewhere(&self, to: Option<String>) -> Result<(), String> {
        self.is_or_may_be(to.clone(), Change::Elsewhere(to))
    }

    /// Has the lender know that the VM may run at `to`, or else the broker know of this change.
    fn is_or_may_be(&self, to: Option<String>, change: Change<Saved>) -> Result<(), String> {
        match self.lender() {
            Some(lender) => control::ask_peer(&lender, &Request::Elsewhere { to }).map(drop),
            None => self.must_tell_broker(change),
        }
    }

    /// It has not left.
    pub(super) fn stays(&self) {
        let told = self.is_or_may_be(None, Change::Here);
        if let Err(why) = told {
            log!("the VM is not restarted if it is lost now: {why}");
        }
    }

    /// The guest has come to its end.
    pub(super) fn guest_ended(&self) {
        // if the VM is borrowed, its home learns it from the report
        if self.lender().is_none()
            && let Err(why) = self.must_tell_broker(Change::Ended)
        {
            log!("{why}");
        }
    }

    /// This is a whole snapshot of the VM, to go on from.
    pub(crate) fn has_snapshot(&self, snapshot: Saved) {
        let file = snapshot.file.clone();
        let told = match self.lender() {
            Some(lender) => control::ask_peer(&lender, &Request::Saved { snapshot }).map(drop),
            None => self.report_broker(Change::Saved(snapshot)).map_err(describe),
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
        let instance = Instance::new(Some(path.clone()), Sealing::default(), PageStores::default());
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
