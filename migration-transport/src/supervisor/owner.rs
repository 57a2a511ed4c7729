//! The owner's part: it keeps the record at the broker true.

use std::{
    fmt,
    io::ErrorKind,
    iter,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::RestartRecord;
use crate::{BrokerClient, BrokerError, RamLease};

/// The VM whose RAM is at the broker, as its owner has it.
pub trait SupervisedVm {
    /// What the VM can go on from.
    type Saved;

    /// Leases the VM's RAM from this broker: see [`BrokerClient::lease`].
    ///
    /// # Errors
    /// Those of [`BrokerClient::lease`]; [`BrokerError::Files`] when RAM is in no memory files.
    fn lease(&self, broker: &BrokerClient) -> Result<RamLease, BrokerError>;

    /// Returns the metadata that has this record, at most 16 KiB.
    fn encode(&self, record: &RestartRecord<Self::Saved>) -> Vec<u8>;

    /// Returns what an earlier owner has left, if its metadata can be read.
    fn last_saved(&self, metadata: &[u8]) -> Option<Self::Saved>;
}

/// What changes in a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<S> {
    /// Nothing: the broker only has to have the RAM and the record.
    Nothing,
    /// Beside the owner, this process may run the VM from now on.
    MayRunIn(Vec<u8>),
    /// The VM may run there, beyond the reach of the fence; `None`: it may not any more.
    Elsewhere(Option<String>),
    /// The VM is at its owner, and nowhere else.
    Here,
    /// The guest has ended by itself.
    Ended,
    /// The VM can go on from this.
    Saved(S),
}

/// What the broker has, as it was when the owner asked it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerStatus<S> {
    /// The broker's socket.
    pub broker: Option<PathBuf>,
    /// Whether the broker has the VM's RAM.
    pub has_ram: bool,
    /// What the VM can go on from.
    pub saved: Option<S>,
}

/// The record of a VM, as its owner keeps it.
///
/// There are two locks. One is held while the broker is asked, which may take as long as the broker
/// is waited for. The other one guards a copy of the [status](Self::status), and is held for
/// copying only.
pub struct OwnerRecord<S> {
    talk: Mutex<Talk<S>>,
    shown: Mutex<OwnerStatus<S>>,
}

/// What the broker is told, and the connection on which it is.
struct Talk<S> {
    broker: Option<BrokerClient>,
    lease: Option<RamLease>,
    /// All but the holders.
    record: RestartRecord<S>,
    /// The owner, if it can be named.
    own: Option<Vec<u8>>,
    /// Another process that may have the VM by now.
    successor: Option<Vec<u8>>,
}

impl<S: Clone> Talk<S> {
    /// Returns the record that holds now.
    fn record(&self) -> RestartRecord<S> {
        // a process that cannot be named cannot be known to be dead: then nobody is named
        let holders = self.own.iter().flat_map(|own| iter::once(own).chain(&self.successor)).cloned();
        RestartRecord { holders: holders.collect(), ..self.record.clone() }
    }

    fn change(&mut self, change: Change<S>) {
        match change {
            Change::Nothing => {}
            Change::MayRunIn(process) => self.successor = Some(process),
            Change::Elsewhere(to) => self.record.elsewhere = to,
            Change::Here => {
                self.successor = None;
                self.record.elsewhere = None;
            }
            Change::Ended => self.record.ended = true,
            Change::Saved(saved) => self.record.saved = Some(saved),
        }
    }

    /// Has the broker know the record.
    fn tell(&mut self, vm: &dyn SupervisedVm<Saved = S>) -> Result<(), BrokerError> {
        let Some(broker) = &self.broker else { return Ok(()) };
        let metadata = vm.encode(&self.record());
        if self.lease.as_ref().is_some_and(|lease| lease.set_metadata(&metadata).is_ok()) {
            return Ok(());
        }
        // there was none, or its connection has broken, after which the broker takes the owner for
        // dead
        self.lease = None;
        let lease = vm.lease(broker)?;
        // an earlier owner's is of the same VM, and of this host
        if self.record.saved.is_none() {
            self.record.saved = vm.last_saved(lease.previous_metadata());
        }
        lease.set_metadata(&vm.encode(&self.record()))?;
        self.lease = Some(lease);
        Ok(())
    }

    fn status(&self) -> OwnerStatus<S> {
        OwnerStatus {
            broker: self.broker.as_ref().map(|broker| broker.path().to_owned()),
            has_ram: self.lease.is_some(),
            saved: self.record.saved.clone(),
        }
    }
}

impl<S: Clone> OwnerRecord<S> {
    /// Returns a record of a VM that nobody has saved. `broker` is the path of the broker's socket;
    /// without one, changes are only recorded. `own` is the owner as the supervisor's fence knows
    /// it; `None` if it cannot be named.
    pub fn new(broker: Option<PathBuf>, own: Option<Vec<u8>>) -> Self {
        let shown = OwnerStatus { broker: broker.clone(), has_ram: false, saved: None };
        let broker = broker.map(BrokerClient::new);
        let talk = Talk { broker, lease: None, record: RestartRecord::default(), own, successor: None };
        Self { talk: Mutex::new(talk), shown: Mutex::new(shown) }
    }

    /// Returns what the broker has. Waits for nobody.
    pub fn status(&self) -> OwnerStatus<S> {
        self.shown().clone()
    }

    /// From now on this broker is the VM's.
    pub fn set_broker(&self, broker: Option<PathBuf>) {
        let mut talk = self.talk();
        talk.broker = broker.map(BrokerClient::new);
        self.show(&talk);
    }

    /// Changes the record, and has the broker know it. Without a VM, the change is only recorded,
    /// and goes to the broker with the next one.
    ///
    /// # Errors
    /// Returns an error if the broker may not know it. The change stays recorded.
    pub fn update(&self, vm: Option<&dyn SupervisedVm<Saved = S>>, change: Change<S>) -> Result<(), BrokerError> {
        let mut talk = self.talk();
        talk.change(change);
        let told = vm.map_or(Ok(()), |vm| talk.tell(vm));
        self.show(&talk);
        told
    }

    /// As [`update`](Self::update), where the broker must not restart the VM without knowing the
    /// change. A broker that has ended restarts nothing, so that is no error.
    ///
    /// # Errors
    /// Returns an error if a broker that may restart the VM may not know the change.
    pub fn update_or_fail(
        &self,
        vm: Option<&dyn SupervisedVm<Saved = S>>,
        change: Change<S>,
    ) -> Result<(), BrokerError> {
        match self.update(vm, change) {
            Err(BrokerError::Link { cause, .. })
                if matches!(cause.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
            {
                Ok(())
            }
            told => told,
        }
    }

    /// Releases the RAM: the VM has ended well, or has moved away. If it has gone to a process of
    /// this host, that one leases it, unless it dies before; so the broker keeps it until then.
    ///
    /// # Errors
    /// Returns an error if the broker is gone, and the RAM with it.
    pub fn release(&self) -> Result<(), BrokerError> {
        let mut talk = self.talk();
        let passed_on = talk.successor.is_some() && talk.record.elsewhere.is_none();
        let lease = talk.lease.take().filter(|_| !passed_on);
        self.show(&talk);
        lease.map_or(Ok(()), RamLease::release)
    }

    /// Waits until nobody talks to the broker any more.
    fn talk(&self) -> MutexGuard<'_, Talk<S>> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, OwnerStatus<S>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, talk: &Talk<S>) {
        *self.shown() = talk.status();
    }
}

impl<S> fmt::Debug for OwnerRecord<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnerRecord").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_shows_its_broker() {
        let record = OwnerRecord::<()>::new(None, None);
        assert_eq!(record.status().broker, None);
        record.set_broker(Some("/run/broker".into()));
        assert_eq!(record.status().broker, Some("/run/broker".into()));
        record.set_broker(None);
        assert_eq!(record.status().broker, None);
    }
}
