//! HyperFresh in minivmm: the command line of a successor, and the hand-over of the VM to it. The
//! other steps are in [`migration_kvm::handover`].

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use migration_core::{
    text::{Chain, describe},
    vm::VmError,
};
use migration_kvm::{
    handover::{
        self, Attempt, HandOvers, Interval, MemoryGrowth, NewSuccessor, NotReplaced, Predecessor, RefreshPolicy,
        ReplaceError, Replacement, VmOwner,
    },
    successor::Successor,
};
use migration_transport::Address;
use minivmm_client::{MigrateRequest, Plan, StrategyKind, Trigger};
use serde_json::{Value, json};

use crate::instance::Instance;

/// The place at which clients find a minivmm, with the settings that its successor needs to take
/// that place.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) control: PathBuf,
    pub(crate) serial: String,
    pub(crate) broker: Option<PathBuf>,
}

impl Predecessor for Instance {
    type Plan = Plan;
    type Report = Value;

    fn hand_overs(&self) -> &HandOvers<Plan> {
        &self.hand_overs
    }

    fn control(&self) -> Result<PathBuf, VmError> {
        self.can_be_succeeded().map(|place| place.control).map_err(VmError::new)
    }

    fn command(&self, new: &NewSuccessor<'_, Plan>) -> Result<Command, VmError> {
        let place = self.can_be_succeeded().map_err(VmError::new)?;
        self.successor_command(&place, new).map_err(|why| VmError::new(format!("refresh: {why}")))
    }

    fn cede_control(&self, control: &Path) {
        self.keep_at_exit(control);
    }

    fn reclaim_control(&self, control: &Path) {
        self.remove_at_exit(control.to_owned());
    }

    fn hand_over(self: &Arc<Self>, successor: &Successor) -> Result<Attempt<Value>, VmError> {
        // The hand-over is not encrypted: the open files themselves pass between two processes of
        // this machine.
        let to = Address::Unix(successor.endpoints().listen.clone());
        let request = MigrateRequest::plain(to, StrategyKind::HandOver, 1);
        let report = self.migrate_to(Some(successor.identity().encode()), &request, &mut |_| {});
        let report = report.map_err(|refused| VmError::new(describe(refused)))?;
        let owner = match report["outcome"].as_str() {
            Some("completed") => VmOwner::Successor,
            Some("in-doubt") => VmOwner::InDoubt,
            _ => VmOwner::Predecessor,
        };
        Ok(Attempt { owner, report })
    }

    fn wait_in_doubt(&self, time: Duration) -> bool {
        self.in_doubt(time)
    }

    fn lost_with(&self, pid: u32) {
        self.vm_lost_with(pid);
    }

    fn runs_on(&self, time: Duration) -> bool {
        self.goes_on(time)
    }

    fn not_replaced(&self, why: NotReplaced<'_, Value>) {
        match why {
            NotReplaced::HandOver(report) => log!("refresh: {}", report["reason"]),
            NotReplaced::Refused(why) => log!("{}", told(why)),
            NotReplaced::Policy(error) => log!("refresh: {error}"),
        }
    }
}

impl Instance {
    fn successor_command(&self, place: &Place, new: &NewSuccessor<'_, Plan>) -> Result<Command, String> {
        // The name by which this process was started may refer to another file by now. To start
        // that file would be an upgrade, which is the purpose of `--exec`.
        let exec = new.plan.exec.as_deref().unwrap_or(Path::new("/proc/self/exe"));
        let mut command = Command::new(exec);
        command.arg("receive").arg("--listen").arg(format!("unix:{}", new.endpoints.listen.display()));
        command.arg("--control").arg(&new.endpoints.interim).arg("--successor-of").arg(&new.endpoints.control);
        let predecessor = serde_json::to_string(&new.predecessor.encode()).map_err(|e| e.to_string())?;
        command.arg("--predecessor").arg(predecessor).arg("--serial").arg(&place.serial);
        if let Some(broker) = &place.broker {
            command.arg("--broker").arg(format!("unix:{}", broker.display()));
        }
        if let Some(key) = self.seal_key() {
            command.arg("--seal-key-file").arg(key);
        }
        for store in self.page_stores().arguments() {
            command.arg("--store").arg(store);
        }
        if let (_, Some(snapshot)) = self.kept_by() {
            // the broker may have forgotten this process before the successor reports to it
            command.arg("--restart-from").arg(snapshot.argument().map_err(|e| e.to_string())?);
        }
        if let Some(schedule) = new.schedule {
            command.arg("--refresh").arg(serde_json::to_string(schedule).map_err(|e| e.to_string())?);
        }
        Ok(command)
    }
}

/// Returns the text of an error for clients. An error of the VMM itself already names the request.
fn told(error: &ReplaceError) -> String {
    match error {
        ReplaceError::Vmm(why) => describe(why),
        why => format!("refresh: {}", Chain(why)),
    }
}

/// Hands the VM to a successor. Returns when the successor has taken over, after which this process
/// ends, or when the VM is still here.
fn refresh(instance: &Arc<Instance>, plan: &Plan) -> Result<Value, String> {
    match handover::replace(instance, plan).map_err(|e| told(&e))? {
        Replacement::Done { pid, mut report } => {
            report["pid"] = json!(pid);
            Ok(report)
        }
        Replacement::InDoubt { report, unwatched } => {
            if let Some(error) = unwatched {
                log!("nobody sees whether the successor dies: {error}");
            }
            Ok(report)
        }
        Replacement::RolledBack(report) => Ok(report),
    }
}

/// Refreshes when the plan's trigger fires. The plan replaces an earlier one, and a successor
/// continues it. Without a trigger, refreshes now.
pub(crate) fn schedule(instance: &Arc<Instance>, plan: Plan) -> Result<Value, String> {
    let Some(trigger) = plan.trigger.clone() else { return refresh(instance, &plan) };
    let policy = move || -> Box<dyn RefreshPolicy> {
        match trigger {
            Trigger::Every(us) => Box::new(Interval::new(Duration::from_micros(us))),
            Trigger::Memory(limit) => Box::new(MemoryGrowth::above(limit)),
        }
    };
    handover::schedule(instance, plan, policy).map_err(|e| told(&e))?;
    Ok(json!({"scheduled": true, "pid": std::process::id()}))
}
