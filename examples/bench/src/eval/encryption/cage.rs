//! A part of a core for a process, by a control group.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Microseconds after which a process that has used up its part goes on: short, as its guest stands
/// still until then, but several of the slices (5 ms) that the kernel gives out.
const PERIOD: u64 = 20_000;

/// A control group; gone with this, which is to live longer than its processes.
pub(super) struct Cage(PathBuf);

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

impl Cage {
    /// A group of that name with so many percent of a core, of version 2 or 1, whichever the host
    /// has.
    pub(super) fn new(name: &str, percent: u64) -> Result<Self, String> {
        let root = Path::new("/sys/fs/cgroup");
        let second = root.join("cgroup.controllers").exists();
        let parent = if second { root.to_owned() } else { root.join("cpu") };
        let folder = parent.join(format!("minivmm-eval-{}-{name}", std::process::id()));
        fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let cage = Self(folder);
        let quota = PERIOD * percent / 100;
        if second {
            // where the controller is on already, that need not be allowed
            let on = write(&parent.join("cgroup.subtree_control"), "+cpu");
            write(&cage.0.join("cpu.max"), &format!("{quota} {PERIOD}")).map_err(|why| on.err().unwrap_or(why))?;
        } else {
            write(&cage.0.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
            write(&cage.0.join("cpu.cfs_quota_us"), &quota.to_string())?;
        }
        Ok(cage)
    }

    /// Puts a process with all its threads in.
    pub(super) fn hold(&self, pid: u32) -> Result<(), String> {
        write(&self.0.join("cgroup.procs"), &pid.to_string())
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        // one that is left over holds nobody
        let _ = fs::remove_dir(&self.0);
    }
}
