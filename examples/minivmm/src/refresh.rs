//! HyperFresh in minivmm: what its successor is started with, and how its VM is handed over. The
//! rest is [`migration_kvm::handover`].

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

/// Where a minivmm is found, and what its successor needs to be found there.
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
        // without encryption: the files themselves pass between two processes of this machine
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
        // the name that it was started by may lead elsewhere by now: that is an upgrade, which
        // `--exec` is for
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
            // the broker may have forgotten about this process before it hears of the successor
            command.arg("--restart-from").arg(snapshot.argument().map_err(|e| e.to_string())?);
        }
        if let Some(schedule) = new.schedule {
            command.arg("--refresh").arg(serde_json::to_string(schedule).map_err(|e| e.to_string())?);
        }
        Ok(command)
    }
}

/// The error as clients see it: what the VMM itself refuses says already what was asked for.
fn told(error: &ReplaceError) -> String {
    match error {
        ReplaceError::Vmm(why) => describe(why),
        why => format!("refresh: {}", Chain(why)),
    }
}

/// Hands the VM to a successor. Returns when that has taken over (this process then ends), or with
/// the VM still here.
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

/// Refreshes when the plan's trigger says so, and no longer when an earlier one's did; a successor
/// goes on with that. Without a trigger, now.
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
