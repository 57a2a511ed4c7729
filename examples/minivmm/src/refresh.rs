//! HyperFresh: this process starts a successor, another build of itself maybe, which takes its VM over, and with it the path of
//! the control socket and the serial port.

use std::{
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use migration_kvm::{
    fence::ProcessIdentity,
    refresh::{Interval, MemoryGrowth, RefreshPolicy},
};
use migration_transport::Address;
use minivmm_client::{MigrateRequest, Plan, Saved, StrategyKind, Trigger};
use nix::unistd::geteuid;
use serde_json::{Value, json};

use crate::instance::Instance;

/// How long a successor may take until it can receive, and until it has taken its place.
const PATIENCE: Duration = Duration::from_secs(20);
/// Policies, and what a successor has done, are looked at this often.
const LOOK: Duration = Duration::from_millis(5);
const TICK: Duration = Duration::from_millis(100);

/// Where a minivmm is found, and what its successor needs to be found there.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) control: PathBuf,
    pub(crate) serial: String,
    pub(crate) broker: Option<PathBuf>,
}

/// A successor that has not taken over yet. Dropped, it is ended, unless it may have the VM.
struct Successor {
    child: Child,
    may_have_it: bool,
    /// Its control socket, until it takes the place of ours.
    control: PathBuf,
    listen: PathBuf,
}

impl Successor {
    /// Of this program, if one is given; it goes on with the schedule.
    fn start(
        place: &Place,
        seal_key: Option<&Path>,
        exec: Option<&Path>,
        schedule: Option<&Plan>,
        snapshot: Option<&Saved>,
    ) -> Result<Self, String> {
        let exec = match exec {
            Some(exec) => exec.to_owned(),
            // the name that it was started by may lead elsewhere by now: that is an upgrade, which `--exec` is for
            None => PathBuf::from("/proc/self/exe"),
        };
        let beside = |what: &str| {
            let mut path = place.control.clone().into_os_string();
            path.push(format!(".{what}{}", std::process::id()));
            PathBuf::from(path)
        };
        let (control, listen) = (beside("c"), beside("l"));
        // of a process that had this number before; another user's stays, and is an error
        for path in [&control, &listen] {
            if is_own_socket(path)? {
                std::fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))?;
            }
        }
        let mut command = Command::new(&exec);
        command.arg("receive").arg("--listen").arg(format!("unix:{}", listen.display()));
        command.arg("--control").arg(&control).arg("--successor-of").arg(&place.control);
        let own = ProcessIdentity::own().map_err(|e| format!("this process: {e}"))?.encode();
        command.arg("--predecessor").arg(serde_json::to_string(&own).map_err(|e| e.to_string())?);
        command.arg("--serial").arg(&place.serial);
        if let Some(broker) = &place.broker {
            command.arg("--broker").arg(format!("unix:{}", broker.display()));
        }
        if let Some(key) = seal_key {
            command.arg("--seal-key-file").arg(key);
        }
        if let Some(snapshot) = snapshot {
            // the broker may have forgotten about this process before it hears of the successor
            command.arg("--restart-from").arg(snapshot.argument().map_err(|e| e.to_string())?);
        }
        if let Some(schedule) = schedule {
            command.arg("--refresh").arg(serde_json::to_string(schedule).map_err(|e| e.to_string())?);
        }
        let child = command.spawn().map_err(|e| format!("starting {}: {e}", exec.display()))?;
        let mut successor = Self { child, may_have_it: false, control, listen };
        successor.wait_listening().map_err(|why| format!("the successor {} {why}", exec.display()))?;
        Ok(successor)
    }

    /// It listens before it has a control socket.
    fn wait_listening(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while !is_own_socket(&self.control)? {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("has ended ({status}) before it could receive"));
            }
            if Instant::now() >= deadline {
                return Err(format!("does not receive after {PATIENCE:?}"));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Which process it is.
    fn identity(&self) -> Result<Vec<u8>, String> {
        ProcessIdentity::of(self.child.id())
            .map(|identity| identity.encode())
            .map_err(|e| format!("the successor: {e}"))
    }

    /// It has the VM: waits until it has our place. Its number.
    fn let_go(mut self) -> u32 {
        self.may_have_it = true;
        self.take_place();
        self.child.id()
    }

    /// It may have the VM: waits until that is known, or it has died.
    fn in_doubt(mut self, instance: &Instance) {
        while instance.in_doubt(TICK) {
            match self.child.try_wait() {
                // if it ended well it has given the VM to yet another one
                Ok(Some(status)) if !status.success() => return instance.lost_with(self.child.id()),
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => return,
            }
        }
        self.take_place();
    }

    fn take_place(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.control.exists() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        // it has ceased to listen, or is about to
        let _ = std::fs::remove_file(&self.listen);
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if self.may_have_it {
            return;
        }
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
        for path in [&self.control, &self.listen] {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether there is a socket of this user. The successor makes its own ones; whoever is found at
/// another user's would get the VM.
fn is_own_socket(path: &Path) -> Result<bool, String> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() && found.uid() == geteuid().as_raw() => Ok(true),
        Ok(_) => Err(format!("finds {}, which is no socket of this user", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Hands the VM to a successor. Comes back when that has taken over (this process then ends), or with the VM still here.
pub(crate) fn refresh(instance: &Arc<Instance>, plan: &Plan) -> Result<Value, String> {
    let (place, _one_at_a_time) = instance.begin_succession()?;
    let (_, schedule) = instance.planned_succession();
    let (_, snapshot) = instance.kept_by();
    let seal_key = instance.seal_key();
    let exec = plan.exec.as_deref();
    let successor = Successor::start(&place, seal_key.as_deref(), exec, schedule.as_ref(), snapshot.as_ref());
    let mut successor = successor.map_err(|why| format!("refresh: {why}"))?;
    // the path is the successor's as soon as it has the VM
    instance.keep_at_exit(&place.control);
    let to = Address::Unix(successor.listen.clone());
    // without encryption: the files themselves pass between two processes of this machine
    let request = MigrateRequest::plain(to, StrategyKind::HandOver, 1);
    let moved = successor.identity().and_then(|heir| instance.migrate_to(Some(heir), &request, &mut |_| {}));
    if let Ok(report) = &moved
        && report["outcome"] == "completed"
    {
        let mut report = report.clone();
        report["pid"] = json!(successor.let_go());
        return Ok(report);
    }
    if moved.as_ref().is_ok_and(|report| report["outcome"] == "in-doubt") {
        successor.may_have_it = true;
        let doubtful = instance.clone();
        let wait = move || successor.in_doubt(&doubtful);
        if let Err(error) = thread::Builder::new().name("in doubt".into()).spawn(wait) {
            log!("nobody sees whether the successor dies: {error}");
        }
        return moved;
    }
    instance.remove_at_exit(place.control);
    moved
}

/// Refreshes when the plan's trigger says so, and no longer when an earlier one's did; a successor goes on with that. Without a
/// trigger, now.
pub(crate) fn schedule(instance: &Arc<Instance>, plan: Plan) -> Result<Value, String> {
    let Some(trigger) = plan.trigger.clone() else { return refresh(instance, &plan) };
    let number = instance.plan_succession(&plan)?;
    let policy = move || -> Box<dyn RefreshPolicy> {
        match trigger {
            Trigger::Every(us) => Box::new(Interval::new(Duration::from_micros(us))),
            Trigger::Memory(limit) => Box::new(MemoryGrowth::above(limit)),
        }
    };
    let instance = instance.clone();
    let body = move || {
        let mut present = policy();
        while instance.runs_on(TICK) && instance.planned_succession().0 == number {
            match present.due() {
                Ok(false) => continue,
                Ok(true) => match refresh(&instance, &plan) {
                    Ok(report) if report["outcome"] == "completed" => return,
                    Ok(report) => log!("refresh: {}", report["reason"]),
                    Err(why) => log!("{why}"),
                },
                Err(error) => log!("refresh: {error}"),
            }
            // from anew, not at once again
            present = policy();
            if !instance.runs_on(Duration::from_secs(1)) {
                return;
            }
        }
    };
    thread::Builder::new().name("refresh".into()).spawn(body).map_err(|e| format!("refresh: no thread: {e}"))?;
    Ok(json!({"scheduled": true, "pid": std::process::id()}))
}
