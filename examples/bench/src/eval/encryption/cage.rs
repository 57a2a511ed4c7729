//! A limit on the CPU time of a process, by a control group.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The period of the limit in microseconds. It is short, because a guest that has used up its part
/// stands still for the rest of it, but several of the kernel's slices of 5 ms.
const PERIOD: u64 = 20_000;

/// A control group, removed when it is dropped. Its processes must end before.
pub(super) struct Cage(PathBuf);

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

impl Cage {
    /// Makes a group with `percent` percent of a core, of version 2 or 1, whichever the host uses.
    pub(super) fn new(name: &str, percent: u64) -> Result<Self, String> {
        let root = Path::new("/sys/fs/cgroup");
        let second = root.join("cgroup.controllers").exists();
        let parent = if second { root.to_owned() } else { root.join("cpu") };
        let folder = parent.join(format!("minivmm-eval-{}-{name}", std::process::id()));
        fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let cage = Self(folder);
        let quota = PERIOD * percent / 100;
        if second {
            // fails without need if the controller is on already, so the result is ignored
            let on = write(&parent.join("cgroup.subtree_control"), "+cpu");
            write(&cage.0.join("cpu.max"), &format!("{quota} {PERIOD}")).map_err(|why| on.err().unwrap_or(why))?;
        } else {
            write(&cage.0.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
            write(&cage.0.join("cpu.cfs_quota_us"), &quota.to_string())?;
        }
        Ok(cage)
    }

    /// Moves a process with all its threads into the group.
    pub(super) fn hold(&self, pid: u32) -> Result<(), String> {
        write(&self.0.join("cgroup.procs"), &pid.to_string())
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        // an empty group that remains does no harm
        let _ = fs::remove_dir(&self.0);
    }
}
