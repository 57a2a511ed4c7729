//! The VM's RAM at a broker, and the restart record that the broker keeps for the time after this
//! process. A change of the record is reported before another process may run the VM, and not
//! after.

use migration_transport::{
    BrokerError, RamLease,
    supervisor::{Change, OwnerStatus, RestartRecord, SupervisedVm},
};

use super::*;
use crate::{control, restart::StoredRecord};

/// The VM as it is registered with its broker.
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
    /// Registers the VM's RAM with the broker, if there is one.
    pub(crate) fn keep_ram(&self) -> Result<(), String> {
        self.report_broker(Change::Nothing).map_err(describe)
    }

    /// Returns the broker's socket, if there is a broker. Does not wait.
    pub(super) fn broker(&self) -> Option<PathBuf> {
        self.kept.status().broker
    }

    /// Returns the broker's socket if the broker has the VM's RAM, and the snapshot from which the
    /// VM can be restarted. Does not wait.
    pub(crate) fn kept_by(&self) -> (Option<PathBuf>, Option<Saved>) {
        let OwnerStatus { broker, has_ram, saved } = self.kept.status();
        let broker = broker.filter(|_| has_ram);
        let saved = saved.filter(|_| broker.is_some());
        (broker, saved)
    }

    /// Makes this broker the VM's broker from now on.
    pub(super) fn set_broker(&self, broker: Option<PathBuf>) {
        self.kept.set_broker(broker);
    }

    /// Releases the VM's RAM at the broker. Called when the VM has ended orderly or moved away.
    pub(super) fn forget_ram(&self) {
        if let Err(error) = self.kept.release() {
            log!("{}", Chain(&error));
        }
    }

    /// Returns the VM for the broker, or `None` if there is no VM.
    fn at_broker(&self) -> Option<AtBroker> {
        let state = self.lock();
        let (machine, place) = (state.machine.clone()?, state.place.clone());
        drop(state);
        Some(AtBroker { machine, place, seal_key: self.seal_key() })
    }

    /// Changes the restart record, and reports the change to the broker. Does nothing if the VM is
    /// borrowed, because the VM's home reports the change then.
    fn report_broker(&self, change: Change<Saved>) -> Result<(), BrokerError> {
        if self.lender().is_some() {
            return Ok(());
        }
        self.kept.update(self.at_broker().as_ref().map(|vm| vm as _), change)
    }

    /// Changes the restart record as [`report_broker`](Self::report_broker) does, for a VM that is
    /// not borrowed. Fails if the broker does not learn of the change, because that broker might
    /// restart the VM while it runs elsewhere.
    fn must_tell_broker(&self, change: Change<Saved>) -> Result<(), String> {
        let told = self.kept.update_or_fail(self.at_broker().as_ref().map(|vm| vm as _), change);
        told.map_err(|e| format!("the broker would not know where the VM is, and might restart it: {}", Chain(&e)))
    }

    /// Reports that the VM is about to leave for `to`. `heir` is the process there, if it is known.
    pub(super) fn leaves_for(&self, to: &Address, heir: Option<Vec<u8>>) -> Result<(), String> {
        match heir {
            Some(heir) => self.may_be_at(heir, to),
            None => self.is_elsewhere(Some(to.to_string())),
        }
    }

    /// Reports that `process`, which is reached at `to`, may run the VM in addition to this
    /// process.
    pub(super) fn may_be_at(&self, process: Vec<u8>, to: &Address) -> Result<(), String> {
        self.is_or_may_be(Some(to.to_string()), Change::MayRunIn(process))
    }

    /// Reports that the VM may run at `to`, where nobody can determine here whether its processes
    /// are dead. `None` means that it may not run elsewhere any more.
    pub(super) fn is_elsewhere(&self, to: Option<String>) -> Result<(), String> {
        self.is_or_may_be(to.clone(), Change::Elsewhere(to))
    }

    /// Reports to the lender that the VM may run at `to`, or reports the change to the broker if
    /// the VM is not borrowed.
    fn is_or_may_be(&self, to: Option<String>, change: Change<Saved>) -> Result<(), String> {
        match self.lender() {
            Some(lender) => control::ask_peer(&lender, &Request::Elsewhere { to }).map(drop),
            None => self.must_tell_broker(change),
        }
    }

    /// Reports that the VM has not left.
    pub(super) fn stays(&self) {
        let told = self.is_or_may_be(None, Change::Here);
        if let Err(why) = told {
            log!("the VM is not restarted if it is lost now: {why}");
        }
    }

    /// Reports that the guest has ended.
    pub(super) fn guest_ended(&self) {
        // if the VM is borrowed, its home learns of the end from the report
        if self.lender().is_none()
            && let Err(why) = self.must_tell_broker(Change::Ended)
        {
            log!("{why}");
        }
    }

    /// Reports a complete snapshot of the VM, from which the VM can be restarted.
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

    /// Returns the control socket of the VM's home, if the VM is borrowed from a home that has a
    /// broker.
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
        // the request has arrived: the thread that waits for the answer holds its locks by now
        asked.read_exact(&mut [0]).unwrap();
        assert_eq!(instance.status()["kept_by"], Value::Null);
        assert_eq!(instance.broker(), Some(path));
        assert!(instance.handle(Request::Cancel, &mut |_| {}).unwrap_err().contains("no migration is under way"));
        assert_eq!(instance.handle(Request::Quit, &mut |_| {}).unwrap()["state"], "ended");
        drop((asked, listener));
        // Only now: after its time limit, the client would have returned another error.
        let why = teller.join().unwrap().unwrap_err();
        assert!(why.contains("closed the connection") || why.contains("reset"), "{why}");
    }
}
