//! How the broker restarts a VM whose minivmm has died: the record that its owner leaves, and the
//! command that goes on from its last snapshot. [`migration_transport::supervisor`] says when.

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

/// What the owner of a VM leaves with the broker, as JSON that other builds read as well.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct StoredRecord {
    /// The last whole one.
    pub(crate) snapshot: Option<Saved>,
    /// The key by which its VMM seals.
    #[serde(default)]
    seal_key: Option<PathBuf>,
    /// Where the VM is to be found again.
    control: Option<PathBuf>,
    serial: String,
    /// Every process that may run it, by its encoded identity.
    holders: Vec<Vec<u8>>,
    /// Where it may run as well, or instead, though nobody can tell from here.
    elsewhere: Option<String>,
    /// The guest has come to its end, by itself.
    ended: bool,
}

impl StoredRecord {
    pub(crate) fn new(record: &RestartRecord<Saved>, place: Option<&Place>, seal_key: Option<PathBuf>) -> Self {
        let RestartRecord { saved, holders, elsewhere, ended } = record.clone();
        let (control, serial) = place.map(|place| (place.control.clone(), place.serial.clone())).unzip();
        Self { snapshot: saved, seal_key, control, serial: serial.unwrap_or_default(), holders, elsewhere, ended }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        // a path that is no text is left out of what can be restarted
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(crate) fn decode(metadata: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(metadata)
    }
}

/// A snapshot, and what the minivmm that goes on from it is told.
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

/// Restarts the VMs of one broker, and says so on stdout.
pub(crate) struct Restarter {
    broker: PathBuf,
    json: bool,
}

impl Restarter {
    /// For the broker at this socket; says what it does as JSON, a line for each VM, or in words.
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
        // what is typed at the broker's terminal is not for it, and neither is its serial port
        command.process_group(0);
        let serial = if saved.serial == "stdio" { "null" } else { &saved.serial };
        command.arg("run").arg("--restore").arg(&saved.snapshot.file).arg("--serial").arg(serial);
        command.arg("--broker").arg(format!("unix:{}", self.broker.display()));
        // whoever keeps the file may put another VM's in its place
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
