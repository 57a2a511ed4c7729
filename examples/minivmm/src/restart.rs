//! A VM whose VMM has died goes on from its last snapshot: what its owner leaves with the RAM broker for that, and the broker's
//! part in it. No process that may still run the VM is left by then.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::{fence::Fence, text::Escaped, vm::VmId};
use migration_kvm::fence::ProcessFence;
use migration_transport::{Bereft, BrokerClient, KeptRam};
use minivmm_client::{Saved, log};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::sealing::Restart;

/// Processes that are to be dead, and one that is to have the VM, are looked at this often.
const LOOK: Duration = Duration::from_millis(20);
/// A VM that is lost again after so many restarts within [`A_WHILE`] stays so: going on from its snapshot kills it.
const MOST_RESTARTS: usize = 5;
const A_WHILE: Duration = Duration::from_secs(60);

/// What the owner of a VM leaves with the broker.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct Will {
    /// The last whole one.
    pub(crate) snapshot: Option<Saved>,
    /// What its VMM seals by.
    #[serde(default)]
    pub(crate) seal_key: Option<PathBuf>,
    /// Where the VM is to be found again.
    pub(crate) control: Option<PathBuf>,
    pub(crate) serial: String,
    /// Every process that may run it, by its encoded identity.
    pub(crate) holders: Vec<Vec<u8>>,
    /// Where it may run as well, or instead, though nobody can tell from here.
    pub(crate) elsewhere: Option<String>,
    /// The guest has come to its end, by itself.
    pub(crate) ended: bool,
}

impl Will {
    pub(crate) fn encode(&self) -> Vec<u8> {
        // a path that is no text is left out of what can be restarted
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(crate) fn decode(note: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(note).map_err(|e| format!("what its owner left makes no sense: {e}"))
    }

    /// The snapshot to go on from, unless the VM must not be restarted, or cannot.
    fn last_snapshot(&self) -> Result<&Saved, String> {
        if self.ended {
            return Err("its guest has ended by itself".into());
        }
        if let Some(to) = &self.elsewhere {
            return Err(format!("it was on its way to {to}, and may run there"));
        }
        if self.holders.is_empty() {
            return Err("it is not known which process ran it".into());
        }
        self.snapshot.as_ref().ok_or_else(|| "no snapshot of it was taken".into())
    }

    fn all_dead(&self) -> bool {
        self.holders.iter().all(|holder| ProcessFence.is_dead(holder))
    }
}

/// Restarts the VMs of one broker.
pub(crate) struct Restarter(Arc<Shared>);

struct Shared {
    broker: BrokerClient,
    json: bool,
    /// When which VM was restarted lately.
    restarts: Mutex<BTreeMap<[u8; 16], Vec<Instant>>>,
}

impl Restarter {
    /// For the broker at this socket; says what it does as JSON, a line for each VM, or in words.
    pub(crate) fn new(broker: &Path, json: bool) -> Self {
        Self(Arc::new(Shared { broker: BrokerClient::new(broker), json, restarts: Mutex::default() }))
    }
}

impl Bereft for Restarter {
    fn lost(&self, ram: &KeptRam, note: &[u8]) {
        let (vm, shared, ram, will) = (ram.id, self.0.clone(), ram.clone(), Will::decode(note));
        let body = move || match will.and_then(|will| shared.restart(&ram, &will)) {
            Ok(Some(mut child)) => drop(child.wait()),
            Ok(None) => {}
            Err(why) => shared.say_lost(vm, &why),
        };
        if let Err(error) = thread::Builder::new().name("restart".into()).spawn(body) {
            self.0.say_lost(vm, &format!("no thread: {error}"));
        }
    }
}

impl Shared {
    /// The VM's new process, or none if the VM is somebody's already.
    fn restart(&self, ram: &KeptRam, will: &Will) -> Result<Option<Child>, String> {
        let snapshot = will.last_snapshot()?;
        // the successor that was about to get the VM may have it, and deposit it, and die; or be about to end
        loop {
            // first this look: who is dead by then deposits nothing any more
            let all_dead = will.all_dead();
            if self.owner(ram.id)? != Owner::Dead(ram.pid) {
                return Ok(None);
            }
            if all_dead {
                break;
            }
            thread::sleep(LOOK);
        }
        self.count(ram.id)?;
        let mut child = self.start(ram.id, snapshot, will).map_err(|e| format!("starting another minivmm: {e}"))?;
        loop {
            if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("restoring {} has failed ({status})", snapshot.file.display()));
            }
            if self.owner(ram.id)? == Owner::Lives(child.id()) {
                break;
            }
            thread::sleep(LOOK);
        }
        if self.json {
            let (vm, pid) = (ram.id.to_string(), child.id());
            log::announce(format!(
                "{}\n",
                json!({"event": "restarted", "vm": vm, "pid": pid, "snapshot": snapshot.file})
            ));
        } else {
            let (file, pid) = (snapshot.file.display().to_string(), child.id());
            log::announce(format!("restarted {} from {}: process {pid}\n", ram.id, Escaped(&file)));
        }
        Ok(Some(child))
    }

    fn owner(&self, vm: VmId) -> Result<Owner, String> {
        let kept = self.broker.list().map_err(|e| e.to_string())?.into_iter().find(|kept| kept.id == vm);
        Ok(match kept {
            Some(kept) if kept.owned => Owner::Lives(kept.pid),
            Some(kept) => Owner::Dead(kept.pid),
            None => Owner::None,
        })
    }

    /// Notes that a VM is restarted now, unless that has happened too often.
    fn count(&self, VmId(vm): VmId) -> Result<(), String> {
        let mut restarts = self.restarts.lock().unwrap_or_else(PoisonError::into_inner);
        restarts.retain(|_, times| {
            times.retain(|at| at.elapsed() < A_WHILE);
            !times.is_empty()
        });
        let times = restarts.entry(vm).or_default();
        if times.len() >= MOST_RESTARTS {
            return Err(format!("it was restarted {MOST_RESTARTS} times within {A_WHILE:?}"));
        }
        times.push(Instant::now());
        Ok(())
    }

    fn start(&self, vm: VmId, snapshot: &Saved, will: &Will) -> std::io::Result<Child> {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("/proc/self/exe");
        // what is typed at the broker's terminal is not for it, and neither is its serial port
        command.process_group(0);
        let serial = if will.serial == "stdio" { "null" } else { &will.serial };
        command.arg("run").arg("--restore").arg(&snapshot.file).arg("--serial").arg(serial);
        command.arg("--broker").arg(format!("unix:{}", self.broker.path().display()));
        // whoever keeps the file may put another VM's in its place
        let restart = Restart { vm: vm.0, key: snapshot.key.clone() };
        command.arg("--restart").arg(serde_json::to_string(&restart)?);
        if let Some(key) = &will.seal_key {
            command.arg("--seal-key-file").arg(key);
        }
        if let Some(control) = &will.control {
            command.arg("--control").arg(control);
        }
        command.spawn()
    }

    fn say_lost(&self, vm: VmId, why: &str) {
        if self.json {
            log::announce(format!("{}\n", json!({"event": "lost", "vm": vm.to_string(), "reason": why})));
        } else {
            log::announce(format!("lost {vm}: {}\n", Escaped(why)));
        }
    }
}

/// Whose a VM is, as the broker knows it; with the process that deposited it.
#[derive(PartialEq)]
enum Owner {
    Lives(u32),
    Dead(u32),
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_not_be_restarted_is_not() {
        let snapshot = Saved { file: "/s".into(), key: Some("/k".into()) };
        let whole =
            Will { snapshot: Some(snapshot.clone()), holders: vec![vec![1]], serial: "null".into(), ..Will::default() };
        assert_eq!(Will::decode(&whole.encode()), Ok(whole.clone()));
        assert_eq!(whole.last_snapshot(), Ok(&snapshot));
        // nobody can tell whether a process of this identity lives
        assert!(!whole.all_dead());
        for (will, words) in [
            (Will { ended: true, ..whole.clone() }, "by itself"),
            (Will { elsewhere: Some("tcp:h:1".into()), ..whole.clone() }, "may run there"),
            (Will { holders: vec![], ..whole.clone() }, "not known"),
            (Will { snapshot: None, ..whole }, "no snapshot"),
        ] {
            assert!(will.last_snapshot().unwrap_err().contains(words), "{will:?}");
        }
        assert!(Will::decode(b"").is_err());
    }

    #[test]
    fn a_vm_that_is_lost_again_and_again_stays_so() {
        let shared = Restarter::new(Path::new("/nowhere"), false).0;
        for _ in 0..MOST_RESTARTS {
            shared.count(VmId([1; 16])).unwrap();
        }
        assert!(shared.count(VmId([1; 16])).unwrap_err().contains("5 times"));
        shared.count(VmId([2; 16])).unwrap();
    }
}
