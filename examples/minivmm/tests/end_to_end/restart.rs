//! A VM whose process is killed goes on from its last snapshot, by a broker; and one that may run
//! anywhere does not.

use std::{fs, time::Duration};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::{
    broker::{ask, kept_vms, vm_name},
    common::{Lab, Outcome, Process, Suite, ensure, ensure_says, wait_for},
    elf,
    faults::{a_while, relay_to},
    post_copy::post_copy_at,
};

const GUEST: &str = "random:size=16M,serial=1,every=5ms";
/// Moments of a refresh, and of trips to a borrower, at which one of two processes is killed.
const KILLS: u64 = 8;
/// About as long as a refresh takes, from the start of the successor's process on.
const REFRESH: Duration = Duration::from_millis(120);
const SOME_TRIPS: Duration = Duration::from_millis(300);

pub(crate) fn add(suite: &mut Suite) {
    for backing in ["memfd", "hugetlb"] {
        suite.kvm_backed(format!("restart/again_and_again/{backing}"), backing, move |lab| {
            again_and_again(lab, backing)
        });
    }
    for seed in 0..KILLS {
        for victim in [Victim::Owner, Victim::Other] {
            let name = format!("{victim:?}").to_lowercase();
            suite.kvm(format!("restart/refresh/{name}/{seed}"), move |lab| refresh(lab, seed, victim));
            suite.kvm(format!("restart/borrowed/{name}/{seed}"), move |lab| borrowed(lab, seed, victim));
        }
    }
    suite.kvm("restart/after_refreshes", after_refreshes);
    suite.kvm("restart/without_a_snapshot", without_a_snapshot);
    suite.kvm("restart/guest_that_ended", guest_that_ended);
    suite.kvm("restart/on_its_way_elsewhere", on_its_way_elsewhere);
    suite.kvm("restart/snapshot_is_gone", snapshot_is_gone);
    suite.kvm("restart/too_often", too_often);
}

/// Which of two processes is killed: the one that had the VM at first, or the other one.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Owner,
    Other,
}

/// A broker that restarts VMs, with one that it keeps, and of which there is a snapshot. Whatever
/// process has the VM is ended with it.
pub(crate) struct Kept {
    pub(crate) broker: Process,
    pub(crate) vm: Process,
}

impl Kept {
    pub(crate) fn new(lab: &Lab, args: &[&str]) -> Result<Self, Failed> {
        let broker = lab.broker_with("broker", &["--restart", "--json"])?;
        let options = ["--serial", &lab.arg("serial"), "--broker", &broker.address];
        let vm = lab.workload("vm", GUEST, &[&options[..], args].concat())?;
        Ok(Self { broker, vm })
    }

    pub(crate) fn with_snapshot(lab: &Lab, args: &[&str]) -> Result<Self, Failed> {
        let kept = Self::new(lab, args)?;
        kept.vm.ask(&["snapshot", "--out", &lab.arg("snapshot")])?;
        ensure(kept.vm.status()?["restart_from"] == lab.arg("snapshot"), || format!("{:?}", kept.vm.status()))?;
        Ok(kept)
    }

    /// The line in which the broker says what it did for the `nth` VM.
    pub(crate) fn said(&self, nth: usize) -> Result<Value, Failed> {
        let line = wait_for("the broker says something", || {
            // the first one is where it listens
            Ok(self.broker.stdout().lines().nth(1 + nth).map(str::to_owned))
        })?;
        serde_json::from_str(&line).map_err(|e| format!("{line:?}: {e}").into())
    }

    /// The VM is found again at its control socket.
    pub(crate) fn found(&self, state: &str) -> Result<Value, Failed> {
        wait_for("the VM is found", || {
            // nobody may be there for a moment
            Ok(self.vm.status().ok().filter(|status| status["state"] == state))
        })
    }

    /// It works, there is one of it, and it ends with all that is its.
    pub(crate) fn ends_well(&self, lab: &Lab) -> Outcome {
        // a borrower that was killed may have asked for it a moment before
        wait_for("it works", || Ok(self.vm.works().ok()))?;
        let status = self.vm.status()?;
        let pid = status["pid"].as_u64().ok_or("no process")?;
        wait_for("there is one owner", || Ok((owners(lab)? == [pid]).then_some(())))?;
        let id = vm_name(&self.vm)?;
        wait_for("the broker keeps it", || {
            Ok((kept_vms(&self.broker)? == [(id.clone(), "owned".into(), pid)]).then_some(()))
        })?;
        self.vm.ask(&["quit"])?;
        wait_for("nothing is kept", || Ok(kept_vms(&self.broker)?.is_empty().then_some(())))?;
        wait_for("nobody is left", || Ok(owners(lab)?.is_empty().then_some(())))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // no child of this process: it may have ended
        let _ = self.vm.ctl(&["quit"]);
    }
}

/// Processes that have a VM of this lab, or wait for one, or borrow it.
fn owners(lab: &Lab) -> Result<Vec<u64>, Failed> {
    let here = lab.path("").display().to_string();
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // it may have ended meanwhile
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<&[u8]> = command.split(|&byte| byte == 0).collect();
        let ours = words.iter().any(|word| word.starts_with(here.as_bytes()) || word.ends_with(here.as_bytes()));
        let has = matches!(words.get(1).copied(), Some(b"run" | b"receive" | b"feature"));
        if ours && has {
            pids.push(pid);
        }
    }
    Ok(pids)
}

fn again_and_again(lab: &Lab, backing: &str) -> Outcome {
    let mut kept = Kept::with_snapshot(lab, &["--backing", backing, "--cpus", "2"])?;
    kept.vm.kill()?;
    for nth in 0..3 {
        let said = kept.said(nth)?;
        ensure(said["event"] == "restarted" && said["snapshot"] == lab.arg("snapshot"), || format!("{said}"))?;
        let status = kept.found("running")?;
        ensure(status["pid"] == said["pid"] && status["backing"] == backing, || format!("{said} {status}"))?;
        ensure(status["restart_from"] == lab.arg("snapshot"), || format!("{status}"))?;
        kept.vm.works()?;
        if nth < 2 {
            kill(&said["pid"])?;
        }
    }
    kept.ends_well(lab)
}

fn kill(pid: &Value) -> Outcome {
    let pid = nix::unistd::Pid::from_raw(pid.as_i64().and_then(|pid| pid.try_into().ok()).ok_or("no process")?);
    Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?)
}

/// Whoever has the VM in the end, it is one process, at the VM's path.
fn refresh(lab: &Lab, seed: u64, victim: Victim) -> Outcome {
    let mut kept = Kept::with_snapshot(lab, &["--backing", "memfd"])?;
    let first = u64::from(kept.vm.pid());
    // one that goes well, so that the others would
    kept.vm.ask(&["refresh"])?;
    let first = wait_for("the second process is kept", || {
        let status = kept.vm.status().ok().filter(|status| !status["kept_by"].is_null());
        Ok(status.and_then(|status| status["pid"].as_u64()).filter(|&pid| pid != first))
    })?;
    // it would be taken for a successor
    kept.vm.ended()?;
    let mut client = kept.vm.start_ctl(&["refresh"])?;
    a_while(seed, REFRESH);
    match victim {
        // it may have handed the VM over, and have ended
        Victim::Owner => drop(kill(&first.into())),
        Victim::Other => {
            let successor = wait_for("a successor", || {
                let other = owners(lab)?.into_iter().find(|&pid| pid != first);
                Ok(if client.has_ended()? { Some(other) } else { other.map(Some) })
            })?;
            if let Some(pid) = successor {
                // it may have ended by now, or have the VM for long
                let _ = kill(&pid.into());
            }
        }
    }
    // it may not have begun
    wait_for("the refresh has ended", || Ok(client.has_ended()?.then_some(())))?;
    let status = kept.found("running")?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    kept.ends_well(lab)
}

/// Each successor knows the snapshot, however soon its predecessor ends.
fn after_refreshes(lab: &Lab) -> Outcome {
    let kept = Kept::with_snapshot(lab, &["--backing", "memfd"])?;
    kept.vm.ask(&["refresh", "--every", "100ms"])?;
    for epoch in 1..=8u64 {
        wait_for("a successor that is kept", || {
            let status = kept.vm.status().ok().filter(|status| status["epoch"].as_u64() >= Some(epoch));
            let Some(status) = status.filter(|status| !status["kept_by"].is_null()) else { return Ok(None) };
            ensure(status["restart_from"] == lab.arg("snapshot"), || format!("{status}"))?;
            Ok(Some(()))
        })?;
    }
    // no more of them; one that is about to take over cannot be asked
    wait_for("another plan", || Ok((kept.vm.ctl(&["refresh", "--every", "1h"])?.code == Some(0)).then_some(())))?;
    let status = kept.found("running")?;
    kill(&status["pid"])?;
    let said = kept.said(0)?;
    ensure(said["event"] == "restarted", || format!("{said}"))?;
    kept.found("running")?;
    kept.ends_well(lab)
}

/// The same, between a home and a borrower that takes snapshots.
fn borrowed(lab: &Lab, seed: u64, victim: Victim) -> Outcome {
    let mut kept = Kept::new(lab, &["--backing", "memfd"])?;
    let work = format!("snapshot:{}", lab.arg("snapshot"));
    let borrower = kept.vm.start_feature(&["--do", &work, "--every", "1ms"])?;
    wait_for("a first snapshot", || {
        Ok(kept.vm.status().ok().filter(|status| status["restart_from"] == lab.arg("snapshot")))
    })?;
    a_while(seed, SOME_TRIPS);
    match victim {
        Victim::Owner => {
            kept.vm.kill()?;
            // it lives on at its borrower, or in a new process
            kept.found("running")?;
            drop(borrower);
        }
        Victim::Other => borrower.kill(),
    }
    let status = kept.found("running")?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    kept.ends_well(lab)
}

/// It is killed, the broker says that it is lost and why, and keeps its RAM.
fn lost(lab: &Lab, kept: &Kept, id: &str, words: &str) -> Outcome {
    let said = kept.said(0)?;
    ensure(said["event"] == "lost" && said["vm"] == id, || format!("{said}"))?;
    ensure_says(said["reason"].as_str().unwrap_or_default(), words)?;
    ensure(kept_vms(&kept.broker)?.iter().any(|(vm, state, _)| vm == id && state == "lost"), || "not kept".into())?;
    ensure(owners(lab)?.is_empty(), || "it was restarted".into())?;
    let (code, answer) = ask(&kept.broker, &["--forget", id])?;
    ensure(code == Some(0), || format!("{answer}"))
}

fn without_a_snapshot(lab: &Lab) -> Outcome {
    let mut kept = Kept::new(lab, &["--backing", "memfd"])?;
    let id = vm_name(&kept.vm)?;
    ensure(kept.vm.status()?["restart_from"].is_null(), || "there is none".into())?;
    kept.vm.kill()?;
    lost(lab, &kept, &id, "no snapshot of it was taken")
}

fn snapshot_is_gone(lab: &Lab) -> Outcome {
    let mut kept = Kept::with_snapshot(lab, &["--backing", "memfd"])?;
    let id = vm_name(&kept.vm)?;
    fs::remove_file(lab.path("snapshot"))?;
    kept.vm.kill()?;
    lost(lab, &kept, &id, "has failed")
}

/// That is no accident.
fn guest_that_ended(lab: &Lab) -> Outcome {
    let broker = lab.broker_with("broker", &["--restart", "--json"])?;
    let kernel = lab.arg("kernel");
    fs::write(&kernel, elf::triple_fault())?;
    let options =
        ["--memory", "64M", "--kernel", &kernel, "--paused", "--backing", "memfd", "--broker", &broker.address];
    let vm = lab.run("vm", &options)?;
    let mut kept = Kept { broker, vm };
    let id = vm_name(&kept.vm)?;
    kept.vm.ask(&["snapshot", "--out", &lab.arg("snapshot")])?;
    // the answer may be lost with the process
    let _ = kept.vm.ctl(&["resume"]);
    let status = kept.vm.ended()?;
    ensure(status.code() == Some(5), || format!("{status}"))?;
    lost(lab, &kept, &id, "by itself")
}

/// Nobody can tell from here whether it runs there.
fn on_its_way_elsewhere(lab: &Lab) -> Outcome {
    let mut kept = Kept::with_snapshot(lab, &["--backing", "memfd"])?;
    let id = vm_name(&kept.vm)?;
    let there = lab.receive("there", &[])?;
    let (relay, address) = relay_to(&there)?;
    // one that fails changes nothing
    relay.cut();
    let answer = kept.vm.migrate(&address, &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    relay.restore();
    relay.cut_after(4 << 20);
    let client = kept.vm.start_migrate(&address, &post_copy_at("300Mbit"))?;
    there.wait_state("running")?;
    kept.vm.wait_state("in-doubt")?;
    kept.vm.kill()?;
    drop(client);
    let said = kept.said(0)?;
    ensure(said["event"] == "lost" && said["vm"] == id, || format!("{said}"))?;
    ensure_says(said["reason"].as_str().unwrap_or_default(), "may run there")
}

fn too_often(lab: &Lab) -> Outcome {
    let mut kept = Kept::with_snapshot(lab, &["--backing", "memfd"])?;
    let id = vm_name(&kept.vm)?;
    kept.vm.kill()?;
    for nth in 0..5 {
        let said = kept.said(nth)?;
        ensure(said["event"] == "restarted", || format!("{said}"))?;
        kill(&said["pid"])?;
    }
    let said = kept.said(5)?;
    ensure(said["event"] == "lost" && said["vm"] == id, || format!("{said}"))?;
    ensure_says(said["reason"].as_str().unwrap_or_default(), "5 times")
}
