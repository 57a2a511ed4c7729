//! Restarts VMs whose VMM has died, from the last state that was saved of them.
//!
//! The owner of a VM leaves a [`RestartRecord`] with the [`RamBroker`](crate::RamBroker), as the
//! metadata of its RAM lease: what the VM goes on from, and *every* process that may run it. It
//! keeps the record true by an [`OwnerRecord`]: before another process can get the VM, the broker
//! knows, and if the broker cannot be told, the VM does not leave.
//!
//! A [`Supervisor`] in the broker's process is notified when an owner has gone. It restarts the VM
//! when all of these hold:
//!
//! 1. The record allows it: the guest has not ended by itself, and cannot run on another host.
//! 2. Every process that may run the VM is dead, as a [`Fence`] knows for certain. A connection
//!    that is closed is no proof.
//! 3. No other process has taken the lease meanwhile. This is looked at *after* the processes were
//!    found dead: a process that is dead by then takes no lease any more.
//! 4. The VM was not restarted [too often](MAX_RESTARTS).
//!
//! Nothing here needs KVM. What the saved state is, and how a VMM is started from it, is said by a
//! [`RestartVmm`].
//!
//! # Example
//!
//! ```
//! use std::{
//!     io,
//!     process::{Child, Command},
//!     sync::Arc,
//! };
//!
//! use migration_core::{
//!     fence::Fence,
//!     text::describe,
//!     vm::{VmError, VmId},
//! };
//! use migration_transport::{
//!     BrokerOptions, RamBroker,
//!     supervisor::{NotRestarted, RestartRecord, RestartVmm, Supervisor},
//! };
//!
//! /// Restarts from a snapshot, whose path is all that the owner leaves.
//! struct FromSnapshot;
//!
//! impl RestartVmm for FromSnapshot {
//!     type Saved = String;
//!
//!     fn decode(&self, metadata: &[u8]) -> Result<RestartRecord<String>, VmError> {
//!         let saved = String::from_utf8(metadata.to_vec());
//!         let saved = saved.map_err(|e| VmError::because("the record", e))?;
//!         Ok(RestartRecord { saved: Some(saved), ..RestartRecord::default() })
//!     }
//!
//!     fn start(&self, _vm: VmId, saved: &String) -> io::Result<Child> {
//!         Command::new("my-vmm").arg("--restore").arg(saved).spawn()
//!     }
//!
//!     fn restarted(&self, vm: VmId, saved: &String, pid: u32) {
//!         println!("{vm} runs in process {pid}, from {saved}");
//!     }
//!
//!     fn lost(&self, vm: VmId, why: &NotRestarted) {
//!         println!("{vm} is lost: {}", describe(why));
//!     }
//! }
//!
//! fn broker(path: &str, fence: Arc<dyn Fence>) -> Arc<RamBroker> {
//!     let supervisor = Supervisor::new(path, fence, FromSnapshot);
//!     RamBroker::new(BrokerOptions { owner_gone: Some(Arc::new(supervisor)), ..BrokerOptions::default() })
//! }
//! ```

mod owner;
mod record;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    fence::Fence,
    vm::{VmError, VmId},
};

pub use self::{
    owner::{Change, OwnerRecord, OwnerStatus, SupervisedVm},
    record::{NotRestarted, RestartRecord},
};
use crate::{BrokerClient, BrokerError, OwnerGone, RetainedRam};

/// Most restarts of a VM within [`RESTART_PERIOD`]. A VM that is lost again stays lost: to go on
/// from its saved state kills it.
pub const MAX_RESTARTS: usize = 5;
/// The time over which restarts of a VM are counted.
pub const RESTART_PERIOD: Duration = Duration::from_secs(60);
/// How often processes are looked at that are to be dead, and one that is to have the VM.
const LOOK: Duration = Duration::from_millis(20);

/// How VMs of one kind of VMM are restarted.
pub trait RestartVmm: Send + Sync + 'static {
    /// What a VM goes on from, with all that its process has to be told. It is shown as the name of
    /// the saved state.
    type Saved: fmt::Display + Send + 'static;

    /// Reads the metadata that an owner has left.
    ///
    /// # Errors
    /// Returns an error if it is no record. The VM is not restarted.
    fn decode(&self, metadata: &[u8]) -> Result<RestartRecord<Self::Saved>, VmError>;

    /// Starts a process that restores the VM, and leases its RAM from the broker.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    fn start(&self, vm: VmId, saved: &Self::Saved) -> io::Result<Child>;

    /// Reports that the VM runs again, in process `pid`.
    fn restarted(&self, vm: VmId, saved: &Self::Saved, pid: u32);

    /// Reports that the VM has no owner any more and was not restarted.
    fn lost(&self, vm: VmId, why: &NotRestarted);
}

/// Restarts the VMs of one broker. It is the [`OwnerGone`] of that broker.
pub struct Supervisor<R>(Arc<Shared<R>>);

struct Shared<R> {
    broker: BrokerClient,
    fence: Arc<dyn Fence>,
    vmm: R,
    /// When which VM was restarted lately.
    restarts: Mutex<BTreeMap<[u8; 16], Vec<Instant>>>,
}

impl<R: RestartVmm> Supervisor<R> {
    /// Returns a supervisor for the broker whose socket is at `broker`. `fence` knows the processes
    /// that records name.
    pub fn new(broker: impl Into<PathBuf>, fence: Arc<dyn Fence>, vmm: R) -> Self {
        let broker = BrokerClient::new(broker);
        Self(Arc::new(Shared { broker, fence, vmm, restarts: Mutex::default() }))
    }
}

impl<R> fmt::Debug for Supervisor<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor").field("broker", &self.0.broker).finish_non_exhaustive()
    }
}

impl<R: RestartVmm> OwnerGone for Supervisor<R> {
    /// Restarts the VM on a thread of its own, which ends when the new process does.
    fn owner_gone(&self, ram: &RetainedRam, metadata: &[u8]) {
        let (shared, ram, metadata) = (self.0.clone(), ram.clone(), metadata.to_vec());
        let vm = ram.id;
        let body = move || match shared.restart(&ram, &metadata) {
            Ok(Some(mut child)) => drop(child.wait()),
            Ok(None) => {}
            Err(why) => shared.vmm.lost(vm, &why),
        };
        if let Err(error) = thread::Builder::new().name("restart".into()).spawn(body) {
            self.0.vmm.lost(vm, &NotRestarted::NoThread(error));
        }
    }
}

impl<R: RestartVmm> Shared<R> {
    /// Returns the VM's new process; `None` if another process owns the VM already.
    fn restart(&self, ram: &RetainedRam, metadata: &[u8]) -> Result<Option<Child>, NotRestarted> {
        let record = self.vmm.decode(metadata).map_err(NotRestarted::Record)?;
        let saved = record.restartable()?;
        // a successor that was about to get the VM may have it, and lease it, and die; or be about
        // to end
        loop {
            // first this look: a process that is dead by then leases nothing any more
            let all_dead = record.all_dead(&*self.fence);
            if self.owner(ram.id)? != Owner::Dead(ram.pid) {
                return Ok(None);
            }
            if all_dead {
                break;
            }
            thread::sleep(LOOK);
        }
        self.count(ram.id)?;
        let mut child = self.vmm.start(ram.id, saved).map_err(NotRestarted::Start)?;
        loop {
            if let Some(status) = child.try_wait().map_err(NotRestarted::Start)? {
                return Err(NotRestarted::Failed { saved: saved.to_string(), status });
            }
            if self.owner(ram.id)? == Owner::Lives(child.id()) {
                break;
            }
            thread::sleep(LOOK);
        }
        self.vmm.restarted(ram.id, saved, child.id());
        Ok(Some(child))
    }

    fn owner(&self, vm: VmId) -> Result<Owner, BrokerError> {
        let retained = self.broker.list()?.into_iter().find(|retained| retained.id == vm);
        Ok(match retained {
            Some(retained) if retained.owned => Owner::Lives(retained.pid),
            Some(retained) => Owner::Dead(retained.pid),
            None => Owner::None,
        })
    }

    /// Records that a VM is restarted now, unless that has happened too often.
    fn count(&self, VmId(vm): VmId) -> Result<(), NotRestarted> {
        let mut restarts = self.restarts.lock().unwrap_or_else(PoisonError::into_inner);
        restarts.retain(|_, times| {
            times.retain(|at| at.elapsed() < RESTART_PERIOD);
            !times.is_empty()
        });
        let times = restarts.entry(vm).or_default();
        if times.len() >= MAX_RESTARTS {
            return Err(NotRestarted::TooOften);
        }
        times.push(Instant::now());
        Ok(())
    }
}

/// Who owns a VM, as the broker knows it: the process that has, or had, the lease.
#[derive(PartialEq)]
enum Owner {
    Lives(u32),
    Dead(u32),
    None,
}
