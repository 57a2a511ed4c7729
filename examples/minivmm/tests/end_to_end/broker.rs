//! RAM that outlives its VMM at a broker, to be looked at; and VMMs that outlive their broker.

use std::fs;

use libtest_mimic::Failed;
use nix::{sys::signal::Signal, unistd::Pid};
use serde_json::Value;

use crate::{
    common::{Lab, Outcome, Process, Suite, ensure, ensure_says, usage, wait_for},
    peers::all_stopped,
};

const GUEST: &str = "random:size=16M";

pub(crate) fn add(suite: &mut Suite) {
    for backing in ["memfd", "hugetlb"] {
        suite.kvm_backed(format!("broker/ram_of_a_killed_vmm/{backing}"), backing, move |lab| killed(lab, backing));
    }
    suite.kvm("broker/ram_moves_with_its_vm", moves);
    suite.kvm("broker/killed", broker_killed);
    suite.kvm("broker/stopped", broker_stopped);
    suite.kvm("broker/refused", refused);
}

/// A guest whose RAM is at the broker.
fn kept(lab: &Lab, name: &str, broker: &Process, backing: &str) -> Result<Process, Failed> {
    let vm = lab.workload(name, GUEST, &["--backing", backing, "--broker", &broker.address])?;
    ensure(vm.status()?["kept_by"] == lab.arg("broker"), || format!("{:?}", vm.status()))?;
    Ok(vm)
}

/// `minivmm broker` as a client: its answer.
pub(crate) fn ask(broker: &Process, args: &[&str]) -> Result<(Option<i32>, Value), Failed> {
    let (code, stdout, stderr) = usage(&[&["broker", "--json", "--at", &broker.address], args].concat())?;
    let json = serde_json::from_str(&stdout).map_err(|e| format!("{args:?}: {e}: {stdout:?} {stderr}"))?;
    Ok((code, json))
}

/// What it keeps: VM, state and process of each.
pub(crate) fn kept_vms(broker: &Process) -> Result<Vec<(String, String, u64)>, Failed> {
    let (code, list) = ask(broker, &["--list"])?;
    let kept = list["kept"].as_array().filter(|_| code == Some(0)).ok_or_else(|| format!("{code:?} {list}"))?;
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    Ok(kept.iter().map(|k| (text(&k["vm"]), text(&k["state"]), k["pid"].as_u64().unwrap_or(0))).collect())
}

pub(crate) fn vm_name(vm: &Process) -> Result<String, Failed> {
    Ok(vm.status()?["vm"].as_str().ok_or("no name")?.to_owned())
}

fn killed(lab: &Lab, backing: &str) -> Outcome {
    let broker = lab.broker("broker")?;
    let mut vm = kept(lab, "vm", &broker, backing)?;
    let (id, pid) = (vm_name(&vm)?, u64::from(vm.pid()));
    ensure(kept_vms(&broker)? == [(id.clone(), "owned".into(), pid)], || format!("{:?}", kept_vms(&broker)))?;
    let (code, answer) = ask(&broker, &["--forget", &id])?;
    ensure(code == Some(1), || format!("{answer}"))?;
    ensure_says(&answer.to_string(), "lives")?;
    let (area, len) = vm.work_area(lab)?;
    // so that it can be compared
    vm.ask(&["pause"])?;
    let expected = vm.memory(lab, 0, 64 << 20)?;
    vm.kill()?;
    wait_for(
        "the broker has noticed",
        || Ok((kept_vms(&broker)? == [(id.clone(), "lost".into(), pid)]).then_some(())),
    )?;
    let out = lab.arg("dump");
    let (code, answer) = ask(&broker, &["--dump", &id, "--out", &out])?;
    ensure(code == Some(0) && answer["backing"] == backing, || format!("{answer}"))?;
    ensure(answer["written_bytes"].as_u64() >= Some(len), || format!("{answer}"))?;
    let found = fs::read(&out)?;
    let same =
        |from: u64, len: u64| found[from as usize..][..len as usize] == expected[from as usize..][..len as usize];
    ensure(found.len() == expected.len() && same(area, len), || "the guest's pages are other ones".into())?;
    ensure(found == expected, || "the rest of RAM is another one".into())?;
    let (code, answer) = ask(&broker, &["--forget", &id])?;
    ensure(code == Some(0) && kept_vms(&broker)?.is_empty(), || format!("{answer}"))?;
    let (code, answer) = ask(&broker, &["--dump", &id, "--out", &out])?;
    ensure(code == Some(1), || format!("{answer}"))?;
    // who ends well takes its RAM along
    let vm = kept(lab, "other", &broker, backing)?;
    vm.quit()?;
    ensure(kept_vms(&broker)?.is_empty(), || format!("{:?}", kept_vms(&broker)))
}

fn moves(lab: &Lab) -> Outcome {
    let broker = lab.broker("broker")?;
    let mut source = kept(lab, "source", &broker, "memfd")?;
    let mut there = lab.receive("there", &["--broker", &broker.address])?;
    let (id, pid) = (vm_name(&source)?, u64::from(there.pid()));
    source.migrate_well(&there.address, &[])?;
    let owned = || (id.clone(), "owned".to_owned(), pid);
    wait_for("it is the destination's", || Ok((kept_vms(&broker)? == [owned()]).then_some(())))?;
    there.works()?;
    // a snapshot and its RAM are of the same VM
    let snapshot = lab.arg("snapshot");
    there.ask(&["snapshot", "--out", &snapshot])?;
    there.kill()?;
    let restored = lab.run("restored", &["--restore", &snapshot, "--broker", &broker.address])?;
    let pid = u64::from(restored.pid());
    let owned = || (id.clone(), "owned".to_owned(), pid);
    wait_for("it is the restored one's", || Ok((kept_vms(&broker)? == [owned()]).then_some(())))?;
    restored.works()?;
    restored.quit()?;
    ensure(kept_vms(&broker)?.is_empty(), || format!("{:?}", kept_vms(&broker)))
}

/// Nothing depends on the broker but what it keeps.
fn broker_killed(lab: &Lab) -> Outcome {
    let mut broker = lab.broker("broker")?;
    let vm = kept(lab, "vm", &broker, "memfd")?;
    broker.kill()?;
    vm.works()?;
    // its socket file is replaced
    let broker = lab.broker("broker")?;
    let other = kept(lab, "other", &broker, "memfd")?;
    other.quit()?;
    vm.works()?;
    vm.quit()
}

/// While its VM's owner waits for the broker, it says how it is.
fn broker_stopped(lab: &Lab) -> Outcome {
    let broker = lab.broker("broker")?;
    let mut source = kept(lab, "source", &broker, "memfd")?;
    let destination = lab.receive("destination", &["--backing", "memfd"])?;
    let pid = Pid::from_raw(i32::try_from(broker.pid())?);
    broker.signal(Signal::SIGSTOP)?;
    ensure(all_stopped(pid), || "it goes on".into())?;
    let client = source.start_migrate(&destination.address, &[])?;
    // it leaves only when the broker knows that, for which it has a few seconds
    let status = source.wait_state("outgoing")?;
    ensure(status["kept_by"] == lab.arg("broker"), || format!("{status}"))?;
    ensure(destination.status()?["state"] == "incoming", || "it has left".into())?;
    broker.signal(Signal::SIGCONT)?;
    // whoever had waited with `status` would have outlasted the patience with the broker
    client.succeeds()?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

fn refused(lab: &Lab) -> Outcome {
    let broker = lab.broker("broker")?;
    let run = ["run", "--memory", "64M", "--workload", GUEST, "--broker"];
    let (code, _, stderr) = usage(&[&run[..], &[&broker.address]].concat())?;
    ensure(code == Some(1), || format!("{code:?} {stderr}"))?;
    ensure_says(&stderr, "use --backing memfd or hugetlb")?;
    let nobody = format!("unix:{}", lab.arg("nobody"));
    let (code, _, stderr) = usage(&[&run[..], &[&nobody, "--backing", "memfd"]].concat())?;
    ensure(code == Some(1), || format!("{code:?} {stderr}"))?;
    ensure_says(&stderr, "the RAM broker at unix:")?;
    for wrong in [&["broker"][..], &["broker", "--list"], &["broker", "--at", "tcp:h:1", "--list"]] {
        let (code, _, stderr) = usage(wrong)?;
        ensure(code == Some(2), || format!("{wrong:?}: {code:?} {stderr}"))?;
    }
    // private memory stays at its source
    let source = lab.workload("source", GUEST, &["--backing", "anon"])?;
    let there = lab.receive("there", &["--broker", &broker.address])?;
    let answer = source.migrate(&there.address, &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "use --backing memfd or hugetlb")?;
    source.works()?;
    source.quit()?;
    there.quit()?;
    ensure(kept_vms(&broker)?.is_empty(), || format!("{:?}", kept_vms(&broker)))
}
