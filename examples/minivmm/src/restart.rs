//! Restarts VMs for the broker when their minivmm has died. The owner of a VM leaves a restart
//! record with the broker, and the new process restores the VM from its last snapshot.
//! [`migration_transport::supervisor`] decides when a VM is restarted.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use migration_core::{
    text::{Escaped, describe},
    vm::{VmError, VmId},
};
use migration_transport::supervisor::{NotRestarted, RestartRecord, RestartVmm};
use minivmm_client::{Saved, log};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{refresh::Place, sealing::Restart};

/// The restart record that the owner of a VM leaves with the broker. Its encoding is JSON, which
/// other builds of minivmm read as well.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct StoredRecord {
    /// The last complete snapshot of the VM.
    pub(crate) snapshot: Option<Saved>,
    /// The key file with which the VM's owner seals files.
    #[serde(default)]
    seal_key: Option<PathBuf>,
    /// The control socket at which clients expect the VM.
    control: Option<PathBuf>,
    serial: String,
    /// The encoded identities of all processes that may run the VM.
    holders: Vec<Vec<u8>>,
    /// Another place where the VM may run, in addition or instead. The broker cannot determine
    /// whether it runs there.
    elsewhere: Option<String>,
    /// Whether the guest has ended by itself.
    ended: bool,
}

impl StoredRecord {
    pub(crate) fn new(record: &RestartRecord<Saved>, place: Option<&Place>, seal_key: Option<PathBuf>) -> Self {
        let RestartRecord { saved, holders, elsewhere, ended } = record.clone();
        let (control, serial) = place.map(|place| (place.control.clone(), place.serial.clone())).unzip();
        Self { snapshot: saved, seal_key, control, serial: serial.unwrap_or_default(), holders, elsewhere, ended }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        // A path that is not Unicode cannot be encoded. The record is then empty, and a VM with an
        // empty record is not restarted.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(crate) fn decode(metadata: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(metadata)
    }
}

/// A snapshot, with the settings of the minivmm that restores it.
pub(crate) struct Restorable {
    snapshot: Saved,
    seal_key: Option<PathBuf>,
    control: Option<PathBuf>,
    serial: String,
}

impl fmt::Display for Restorable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.snapshot.file.display().fmt(f)
    }
}

impl From<StoredRecord> for RestartRecord<Restorable> {
    fn from(stored: StoredRecord) -> Self {
        let StoredRecord { snapshot, seal_key, control, serial, holders, elsewhere, ended } = stored;
        let saved = snapshot.map(|snapshot| Restorable { snapshot, seal_key, control, serial });
        Self { saved, holders, elsewhere, ended }
    }
}

/// Restarts the VMs of one broker, and reports each restarted or lost VM on stdout.
pub(crate) struct Restarter {
    broker: PathBuf,
    json: bool,
}

impl Restarter {
    /// Returns a restarter for the broker at the socket `broker`. It reports one JSON object for
    /// each VM if `json` is set, and text otherwise.
    pub(crate) fn new(broker: &Path, json: bool) -> Self {
        Self { broker: broker.to_owned(), json }
    }
}

impl RestartVmm for Restarter {
    type Saved = Restorable;

    fn decode(&self, metadata: &[u8]) -> Result<RestartRecord<Restorable>, VmError> {
        StoredRecord::decode(metadata).map(Into::into).map_err(|e| VmError::new(describe(e)))
    }

    fn start(&self, vm: VmId, saved: &Restorable) -> io::Result<Child> {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("/proc/self/exe");
        // The new process is not in the process group of the broker's terminal, so signals from the
        // keyboard do not reach it. Its serial port does not use the broker's stdout either.
        command.process_group(0);
        let serial = if saved.serial == "stdio" { "null" } else { &saved.serial };
        command.arg("run").arg("--restore").arg(&saved.snapshot.file).arg("--serial").arg(serial);
        command.arg("--broker").arg(format!("unix:{}", self.broker.display()));
        // the file may have been replaced by the snapshot of another VM, so the VM's ID is passed
        let restart = Restart { vm: vm.0, key: saved.snapshot.key.clone() };
        command.arg("--restart").arg(serde_json::to_string(&restart)?);
        if let Some(key) = &saved.seal_key {
            command.arg("--seal-key-file").arg(key);
        }
        if let Some(control) = &saved.control {
            command.arg("--control").arg(control);
        }
        command.spawn()
    }

    fn restarted(&self, vm: VmId, saved: &Restorable, pid: u32) {
        if self.json {
            let vm = vm.to_string();
            let line = json!({"event": "restarted", "vm": vm, "pid": pid, "snapshot": saved.snapshot.file});
            log::announce(format!("{line}\n"));
        } else {
            log::announce(format!("restarted {vm} from {}: process {pid}\n", Escaped(&saved.to_string())));
        }
    }

    fn lost(&self, vm: VmId, why: &NotRestarted) {
        let why = describe(why);
        if self.json {
            log::announce(format!("{}\n", json!({"event": "lost", "vm": vm.to_string(), "reason": why})));
        } else {
            log::announce(format!("lost {vm}: {}\n", Escaped(&why)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_what_its_owner_left() {
        let saved = Some(Saved { file: "/s".into(), key: Some("/k".into()) });
        let record = RestartRecord { saved, holders: vec![vec![1]], elsewhere: None, ended: false };
        let place = Place { control: "/c".into(), serial: "null".into(), broker: None };
        let stored = StoredRecord::new(&record, Some(&place), Some("/k".into()));
        let read = StoredRecord::decode(&stored.encode()).unwrap();
        assert_eq!(read, stored);
        let read = RestartRecord::from(read);
        let saved = read.restartable().unwrap();
        assert_eq!((saved.to_string().as_str(), saved.serial.as_str()), ("/s", "null"));
        assert_eq!((saved.control.as_deref(), &read.holders), (Some(Path::new("/c")), &record.holders));
        assert!(StoredRecord::decode(b"").is_err());
    }
}
