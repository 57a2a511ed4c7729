//! Snapshots that are sealed: they serve as plain ones do, to who has the key, and to nobody else.
//! (Sealed checkpoints are among the trials of `fail_safe`.)

use std::fs;

use libtest_mimic::Failed;
use migration_core::store::VersionStore as _;
use migration_transport::SnapshotFile;

use crate::{
    common::{Lab, Outcome, Process, Suite, ensure, ensure_says, usage, wait_for},
    encrypted::{holds_any, telling_runs},
    fail_safe::checks_all,
    restart::Kept,
    snapshot::{restore, snapshot_well},
};

const GUEST: &str = "random:size=16M,serial=1,every=5ms";
/// One after the other.
const SNAPSHOTS: usize = 3;

pub(crate) fn add(suite: &mut Suite) {
    for backing in ["thp", "hugetlb"] {
        suite.kvm_backed(format!("sealed/restored/{backing}"), backing, move |lab| restored(lab, backing));
    }
    suite.kvm("sealed/nothing_is_readable", nothing_is_readable);
    suite.kvm("sealed/refused", refused);
    suite.kvm("sealed/restart", restart);
    suite.kvm("sealed/restart_from_a_borrowers_snapshot", restart_from_a_borrowers);
    suite.anywhere("sealed/key_files", key_files);
}

fn sealed_vm(lab: &Lab, guest: &str, args: &[&str]) -> Result<(Process, String), Failed> {
    let key = lab.key("seal-key")?;
    let vm = lab.workload("vm", guest, &[&["--seal-key-file", &key], args].concat())?;
    Ok((vm, key))
}

/// From each to the next: what goes on from a snapshot takes one, which is sealed as well.
fn restored(lab: &Lab, backing: &str) -> Outcome {
    let (mut vm, key) = sealed_vm(lab, GUEST, &["--backing", backing, "--cpus", "2"])?;
    for n in 0..SNAPSHOTS {
        let file = lab.arg(&format!("snapshot-{n}"));
        snapshot_well(&vm, &file)?;
        vm.kill()?;
        vm = restore(lab, &format!("vm-{n}"), &file, &["--seal-key-file", &key])?;
        checks_all(&vm)?;
    }
    vm.quit()
}

fn nothing_is_readable(lab: &Lab) -> Outcome {
    let (vm, key) = sealed_vm(lab, "hot:size=4M,data=4M", &["--backing", "anon"])?;
    vm.ask(&["pause"])?;
    let runs = telling_runs(lab, &vm)?;
    snapshot_well(&vm, &lab.arg("sealed"))?;
    vm.quit()?;
    let plain = restore(lab, "again", &lab.arg("sealed"), &["--paused", "--seal-key-file", &key])?;
    ensure(telling_runs(lab, &plain)? == runs, || "memory is another one".into())?;
    plain.quit()?;
    ensure(!holds_any(&fs::read(lab.path("sealed"))?, &runs), || "guest memory in a sealed snapshot".into())?;
    // and the look would have found it
    let vm = lab.workload("plain", "hot:size=4M,data=4M", &["--backing", "anon"])?;
    vm.ask(&["pause"])?;
    let runs = telling_runs(lab, &vm)?;
    snapshot_well(&vm, &lab.arg("in-clear"))?;
    vm.quit()?;
    ensure(holds_any(&fs::read(lab.path("in-clear"))?, &runs), || "no guest memory in a plain snapshot".into())
}

fn refused(lab: &Lab) -> Outcome {
    let (vm, key) = sealed_vm(lab, GUEST, &[])?;
    let (other, file, plain) = (lab.key("other-key")?, lab.arg("snapshot"), lab.arg("plain"));
    snapshot_well(&vm, &file)?;
    vm.quit()?;
    let vm = lab.workload("unsealed", GUEST, &[])?;
    snapshot_well(&vm, &plain)?;
    vm.quit()?;
    let refuses = |file: &str, args: &[&str], why: &str| -> Outcome {
        let (code, stdout, stderr) = usage(&[&["run", "--restore", file], args].concat())?;
        ensure(code == Some(1) && stdout.is_empty(), || format!("{why}: {code:?} {stdout} {stderr}"))?;
        ensure_says(&stderr, why)
    };
    refuses(&file, &[], "--seal-key-file")?;
    refuses(&file, &["--seal-key-file", &other], "not what was sealed with this key")?;
    refuses(&plain, &["--seal-key-file", &key], "not sealed")?;
    // all that whoever keeps the file can do: it is a whole snapshot, in which two pages have
    // changed places
    let mut store = SnapshotFile::open(&lab.path("snapshot"), u64::MAX)?;
    let mut pages = Vec::new();
    store.restore(&mut |page, data| {
        pages.push((page, data.copied()));
        Ok(())
    })?;
    let full: Vec<usize> = (0..pages.len()).filter(|&at| pages[at].1.is_some()).collect();
    let [one, two] = [full.len() - 2, full.len() - 1].map(|last| full[last]);
    (pages[one].1, pages[two].1) = (pages[two].1, pages[one].1);
    let mut forged = SnapshotFile::create(&lab.path("forged"), store.pages())?;
    for (page, data) in &pages {
        forged.put(*page, data.as_ref())?;
    }
    let (number, state) = store.latest().ok_or("no snapshot")?;
    forged.commit(number, state)?;
    refuses(&lab.arg("forged"), &["--seal-key-file", &key], "it was changed, or is of another time")?;
    let restored = restore(lab, "restored", &file, &["--seal-key-file", &key])?;
    checks_all(&restored)?;
    restored.quit()
}

/// The key goes with the VM: to a new process by the broker, to a successor, and to a borrower.
fn restart(lab: &Lab) -> Outcome {
    let key = lab.key("seal-key")?;
    let mut kept = Kept::with_snapshot(lab, &["--backing", "memfd", "--seal-key-file", &key])?;
    kept.vm.kill()?;
    let said = kept.said(0)?;
    ensure(said["event"] == "restarted" && said["snapshot"] == lab.arg("snapshot"), || format!("{said}"))?;
    kept.found("running")?;
    kept.vm.ask(&["refresh"])?;
    kept.found("running")?;
    kept.vm.ask(&["snapshot", "--out", &lab.arg("successors")])?;
    let (code, trips, stderr) = kept.vm.feature(&["--do", &format!("snapshot:{}", lab.arg("borrowers"))])?;
    ensure(code == Some(0), || format!("{trips:?} {stderr}"))?;
    for file in ["successors", "borrowers"] {
        let (code, _, stderr) = usage(&["run", "--restore", &lab.arg(file)])?;
        ensure(code == Some(1), || format!("{file}: not sealed: {stderr}"))?;
        ensure_says(&stderr, "--seal-key-file")?;
    }
    kept.ends_well(lab)
}

/// The one who sealed it says by which key.
fn restart_from_a_borrowers(lab: &Lab) -> Outcome {
    let (key, file) = (lab.key("seal-key")?, lab.arg("snapshot"));
    let mut kept = Kept::new(lab, &["--backing", "memfd"])?;
    let (code, trips, stderr) = kept.vm.feature(&["--do", &format!("snapshot:{file}"), "--seal-key-file", &key])?;
    ensure(code == Some(0), || format!("{trips:?} {stderr}"))?;
    wait_for("it is known at home", || Ok((kept.vm.status()?["restart_from"] == file).then_some(())))?;
    kept.vm.kill()?;
    let said = kept.said(0)?;
    ensure(said["event"] == "restarted", || format!("{said}"))?;
    kept.found("running")?;
    kept.ends_well(lab)
}

fn key_files(lab: &Lab) -> Outcome {
    let (code, _, stderr) = usage(&["run", "--workload", "idle", "--seal-key-file", &lab.arg("absent")])?;
    ensure(code == Some(1), || format!("{code:?} {stderr}"))?;
    ensure_says(&stderr, "absent")
}
