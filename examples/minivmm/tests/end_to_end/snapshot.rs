//! Snapshots of guests that work, and VMs that go on from them.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::{
    common::{Answer, Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, usage, wait_for},
    fail_safe::checks_all,
};

const GUEST: &str = "random:size=16M,serial=1,every=5ms";
/// Writes all over its memory, faster than a snapshot keeps up with.
const BUSY: &str = "hot:size=32M";
/// Passes go on until it is clear that they do not help: a snapshot that takes its time.
const SLOWLY: [&str; 4] = ["--downtime-limit", "10ms", "--guest-impact", "low"];
const BACKINGS: [&str; 4] = ["anon", "thp", "memfd", "hugetlb"];
/// Snapshots of one guest, each of which is restored.
const SNAPSHOTS: usize = 5;

pub(crate) fn add(suite: &mut Suite) {
    for backing in BACKINGS {
        for cpus in ["1", "4"] {
            let name = format!("snapshot/restored/{backing}/{cpus}_cpus");
            let run = move |lab: &Lab| restored(lab, backing, cpus);
            suite.kvm_backed(name, backing, run);
        }
    }
    suite.kvm("snapshot/of_a_restored_vm", again_and_again);
    suite.kvm("snapshot/of_a_busy_guest", of_a_busy_guest);
    suite.kvm("snapshot/paused", paused);
    suite.kvm("snapshot/restored_vm_moves", restored_vm_moves);
    suite.kvm("snapshot/bad_files", bad_files);
    suite.kvm("snapshot/cancelled", cancelled);
    suite.kvm("snapshot/killed", killed);
    suite.kvm("snapshot/not_beside_a_migration", not_beside_a_migration);
    suite.kvm("snapshot/disk_full", disk_full);
    suite.anywhere("snapshot/software_guest", software_guest);
}

fn snapshot(process: &Process, out: &str, args: &[&str]) -> Result<Answer, Failed> {
    process.ctl(&[&["snapshot", "--out", out], args].concat())
}

/// Takes one, which must succeed, and leaves the guest at work; the report.
pub(crate) fn snapshot_well(process: &Process, out: &str) -> Result<Value, Failed> {
    let answer = snapshot(process, out, &[])?;
    let report = answer.json.clone();
    let told = || format!("{answer:?}; stderr: {}", process.stderr());
    ensure(answer.code == Some(0) && report["outcome"] == "completed", told)?;
    ensure(report["downtime_ms"].as_f64() > Some(0.0) && report["rounds"].as_u64() > Some(0), told)?;
    ensure(!PathBuf::from(format!("{out}.new")).exists(), || "an unfinished file is left".into())?;
    Ok(report)
}

pub(crate) fn restore(lab: &Lab, name: &str, from: &str, args: &[&str]) -> Result<Process, Failed> {
    lab.run(name, &[&["--restore", from, "--serial", &lab.arg(&format!("{name}.serial"))], args].concat())
}

/// Every line of a serial file follows the one before; the number in the first.
fn first_line(lab: &Lab, name: &str) -> Result<u64, Failed> {
    let text = fs::read_to_string(lab.path(&format!("{name}.serial")))?;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let beats: Vec<u64> = whole.lines().filter_map(|l| l.strip_prefix("beat ")?.parse().ok()).collect();
    let first = *beats.first().ok_or("nothing was said")?;
    let wrong = beats.iter().zip(first..).find(|(found, expected)| **found != *expected);
    ensure(wrong.is_none(), || format!("{name}: lines are lost or repeated: {wrong:?}"))?;
    Ok(first)
}

fn restored(lab: &Lab, backing: &str, cpus: &str) -> Outcome {
    let source = lab.workload("source", GUEST, &["--cpus", cpus, "--backing", backing, "--serial", "null"])?;
    let before = source.resources()?;
    let files: Vec<String> = (0..SNAPSHOTS).map(|n| lab.arg(&format!("snapshot-{n}"))).collect();
    let mut operations = Vec::new();
    for file in &files {
        let at = |status: Value| status["workload"]["operations"].as_u64().unwrap_or(0);
        let earliest = at(source.status()?);
        let report = snapshot_well(&source, file)?;
        ensure(report["pages"]["plain"].as_u64() >= Some(16 << 8), || format!("{report}"))?;
        operations.push((earliest, at(source.status()?)));
    }
    source.is_back_at(&before)?;
    checks_all(&source)?;
    source.quit()?;
    // whatever backed it, it is restored on what is asked for
    for (n, (file, (earliest, latest))) in files.iter().zip(operations).enumerate() {
        let other = [&[][..], &["--backing", "anon"], &["--backing", "memfd"]][n % 3];
        let vm = restore(lab, "restored", file, &[other, &["--paused"]].concat())?;
        let status = vm.status()?;
        let told = || format!("taken from {earliest} to {latest}: {status}");
        ensure(status["state"] == "paused" && status["cpus"].as_u64() == cpus.parse().ok(), told)?;
        ensure(status["memory_bytes"] == 64 << 20 && status["epoch"] == 1, told)?;
        ensure(status["backing"] == *other.get(1).unwrap_or(&backing), told)?;
        // the moment is one while it was taken
        let found = status["workload"]["operations"].as_u64().unwrap_or(0);
        ensure((earliest..=latest).contains(&found), told)?;
        vm.ask(&["resume"])?;
        checks_all(&vm)?;
        wait_for("it goes on to speak", || Ok(first_line(lab, "restored").ok()))?;
        vm.quit()?;
        fs::remove_file(lab.path("restored.serial"))?;
    }
    Ok(())
}

/// Nothing is lost or added on the way through many files; and a file is replaced by its successor.
fn again_and_again(lab: &Lab) -> Outcome {
    let file = lab.arg("snapshot");
    let mut vm = lab.workload("vm-0", GUEST, &["--serial", &lab.arg("vm-0.serial")])?;
    for n in 1..=5 {
        snapshot_well(&vm, &file)?;
        vm.kill()?;
        let name = format!("vm-{n}");
        vm = restore(lab, &name, &file, &[])?;
        ensure(vm.status()?["epoch"] == n, || format!("{:?}", vm.status()))?;
        checks_all(&vm)?;
        // what was not said yet at the time of the snapshot is said now, and nothing twice: the
        // next line is the next beat
        let last = fs::read_to_string(lab.path(&format!("vm-{}.serial", n - 1)))?;
        let said = last.lines().filter_map(|l| l.strip_prefix("beat ")?.parse::<u64>().ok()).max().unwrap_or(0);
        let first = wait_for("it goes on to speak", || Ok(first_line(lab, &name).ok()))?;
        ensure(first <= said + 1, || format!("lines between {said} and {first} are lost"))?;
    }
    vm.quit()
}

/// It does not converge by itself: the guest is slowed down, or waits longer in the end.
fn of_a_busy_guest(lab: &Lab) -> Outcome {
    let vm = lab.workload("vm", BUSY, &["--cpus", "2"])?;
    for (n, args) in [&[][..], &SLOWLY, &["--timeout", "1ms"]].into_iter().enumerate() {
        let file = lab.arg(&format!("snapshot-{n}"));
        let answer = snapshot(&vm, &file, args)?;
        ensure(answer.code == Some(0), || format!("{args:?}: {answer:?}"))?;
        vm.works()?;
        let restored = restore(lab, &format!("restored-{n}"), &file, &[])?;
        restored.works()?;
        restored.quit()?;
    }
    vm.quit()
}

/// A VM that its user has paused is restored as that.
fn paused(lab: &Lab) -> Outcome {
    let file = lab.arg("snapshot");
    let vm = lab.workload("vm", GUEST, &[])?;
    vm.ask(&["pause"])?;
    snapshot_well(&vm, &file)?;
    ensure(vm.status()?["state"] == "paused", || "the snapshot has resumed it".into())?;
    vm.quit()?;
    let vm = restore(lab, "restored", &file, &[])?;
    ensure(vm.status()?["state"] == "paused", || "it runs".into())?;
    vm.ask(&["resume"])?;
    checks_all(&vm)?;
    vm.quit()
}

fn restored_vm_moves(lab: &Lab) -> Outcome {
    let file = lab.arg("snapshot");
    let vm = lab.workload("vm", GUEST, &["--cpus", "2"])?;
    snapshot_well(&vm, &file)?;
    vm.quit()?;
    let mut restored = restore(lab, "restored", &file, &[])?;
    let there = lab.receive("there", &[])?;
    restored.migrate_well(&there.address, &["--strategy", "hybrid"])?;
    there.wait_until("the guest works", at_work)?;
    checks_all(&there)?;
    // and is saved where it has come to
    let file = lab.arg("second");
    snapshot_well(&there, &file)?;
    there.quit()?;
    let restored = restore(lab, "again", &file, &[])?;
    checks_all(&restored)?;
    restored.quit()
}

fn bad_files(lab: &Lab) -> Outcome {
    let file = lab.arg("snapshot");
    let vm = lab.workload("vm", GUEST, &[])?;
    snapshot_well(&vm, &file)?;
    vm.quit()?;
    let whole = fs::read(&file)?;
    let refused = |path: &str, why: &str| -> Outcome {
        let (code, stdout, stderr) = usage(&["run", "--restore", path])?;
        ensure(code == Some(1) && stdout.is_empty(), || format!("{why}: {code:?} {stdout} {stderr}"))?;
        ensure_says(&stderr, why)
    };
    let bad = lab.arg("bad");
    for (len, why) in
        [(0, "cut short"), (4095, "cut short"), (1 << 20, "are said to be"), (whole.len() - 1, "are said")]
    {
        fs::write(&bad, &whole[..len])?;
        refused(&bad, why)?;
    }
    // a bit of the header, of a page that holds data, of the table
    let data = whole[4096..].chunks(4096).position(|page| page.iter().any(|&byte| byte != 0)).ok_or("no data")?;
    for (at, why) in
        [(20, "header: checksum"), (4096 * (1 + data) + 77, "checksum"), (whole.len() - 9, "table: checksum")]
    {
        fs::write(&bad, &whole)?;
        let file = OpenOptions::new().write(true).open(&bad)?;
        file.write_all_at(&[whole[at] ^ 4], at as u64)?;
        refused(&bad, why)?;
    }
    fs::write(&bad, vec![7; 1 << 16])?;
    refused(&bad, "not a snapshot")?;
    refused(&lab.arg("absent"), "No such file")?;
    refused(&lab.arg("."), "not a regular file")?;
    for wrong in [["--memory", "1G"], ["--cpus", "2"], ["--workload", "idle"], ["--kernel", "x"]] {
        let (code, _, stderr) = usage(&[&["run", "--restore", &file], &wrong[..]].concat())?;
        ensure(code == Some(2), || format!("{wrong:?}: {code:?} {stderr}"))?;
    }
    let restored = restore(lab, "restored", &file, &[])?;
    checks_all(&restored)?;
    // nowhere to write to
    let answer = snapshot(&restored, &lab.arg("absent/snapshot"), &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "No such file")?;
    let answer = snapshot(&restored, &lab.arg("."), &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    restored.works()?;
    restored.quit()
}

/// A snapshot that is under way, of a guest at which it takes a while.
fn under_way(vm: &Process, out: &str) -> Result<crate::common::Client, Failed> {
    let client = vm.start_ctl(&[&["snapshot", "--out", out], &SLOWLY[..]].concat())?;
    let status = vm.wait_until("pages are put", |s| s["migration"]["phase"] == "copying")?;
    ensure(status["state"] == "running", || format!("{status}"))?;
    Ok(client)
}

const LARGE: [&str; 2] = ["--memory", "1G"];
const LARGE_AND_BUSY: &str = "hot:size=256M,data=512M";

fn large(lab: &Lab) -> Result<Process, Failed> {
    let vm = lab.run("vm", &[&["--workload", LARGE_AND_BUSY], &LARGE[..]].concat())?;
    vm.wait_until("the guest works", at_work)?;
    Ok(vm)
}

fn cancelled(lab: &Lab) -> Outcome {
    let (file, vm) = (lab.arg("snapshot"), large(lab)?);
    let before = vm.resources()?;
    let client = under_way(&vm, &file)?;
    // only one at a time
    let answer = snapshot(&vm, &lab.arg("other"), &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "a snapshot to ")?;
    vm.ask(&["cancel"])?;
    let answer = client.answer()?;
    ensure(answer.code == Some(3) && answer.json["outcome"] == "cancelled", || format!("{answer:?}"))?;
    ensure(!lab.path("snapshot").exists() && !lab.path("snapshot.new").exists(), || "something is left".into())?;
    vm.works()?;
    vm.is_back_at(&before)?;
    ensure(vm.status()?["warnings"].as_array().is_none_or(|w| w.is_empty()), || format!("{:?}", vm.status()))?;
    vm.quit()
}

/// A process that dies in the middle leaves the last snapshot, and does not stand in the way of the
/// next.
fn killed(lab: &Lab) -> Outcome {
    let (file, mut vm) = (lab.arg("snapshot"), large(lab)?);
    snapshot_well(&vm, &file)?;
    let whole = fs::metadata(&file)?;
    let client = under_way(&vm, &file)?;
    vm.kill()?;
    client.kill();
    ensure(lab.path("snapshot.new").exists(), || "it was complete before it was killed".into())?;
    ensure(fs::metadata(&file)?.modified()? == whole.modified()?, || "the last one was touched".into())?;
    let restored = restore(lab, "restored", &file, &[])?;
    restored.works()?;
    snapshot_well(&restored, &file)?;
    restored.quit()?;
    let restored = restore(lab, "again", &file, &[])?;
    restored.works()?;
    restored.quit()
}

fn not_beside_a_migration(lab: &Lab) -> Outcome {
    let source = lab.workload("source", GUEST, &[])?;
    let there = lab.receive("there", &[])?;
    let client = source.start_migrate(&there.address, &["--bandwidth", "20Mbit"])?;
    source.wait_until("pages move", |s| s["migration"]["round_sent"].as_u64() > Some(100))?;
    let answer = snapshot(&source, &lab.arg("snapshot"), &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "a pre-copy migration to")?;
    source.ask(&["cancel"])?;
    client.answer()?;
    snapshot_well(&source, &lab.arg("snapshot"))?;
    source.works()?;
    source.quit()?;
    there.quit()
}

/// A small file system, unmounted when dropped.
pub(crate) struct Small(pub(crate) PathBuf);

impl Small {
    /// `None` where one may not be mounted. `size` may have other options after it.
    pub(crate) fn mount(lab: &Lab, size: &str) -> Result<Option<Self>, Failed> {
        let path = lab.path("small");
        fs::create_dir(&path)?;
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "small"]).arg(&path).output()?;
        Ok(mounted.status.success().then_some(Self(path)))
    }

    /// Unmounts it, which nothing uses any more.
    pub(crate) fn unmount(self) -> Outcome {
        let unmounted = Command::new("umount").arg(&self.0).status()?;
        ensure(unmounted.success(), || "it cannot be unmounted".into())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // nothing uses it any more; a busy one is only hidden
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn disk_full(lab: &Lab) -> Outcome {
    let Some(small) = Small::mount(lab, "20M")? else {
        eprintln!("snapshot/disk_full shows nothing: a file system of its own may not be mounted here");
        return Ok(());
    };
    let file = small.0.join("snapshot").display().to_string();
    let vm = lab.workload("vm", GUEST, &[])?;
    // one fits, and the next one beside it does not
    snapshot_well(&vm, &file)?;
    // its thread has answered, and is about to end
    wait_for("the snapshot's thread to end", || Ok((!vm.threads()?.contains_key("snapshot")).then_some(())))?;
    let before = vm.resources()?;
    for _ in 0..3 {
        let answer = snapshot(&vm, &file, &[])?;
        ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
        ensure_says(answer.reason(), "make room")?;
        let names: Vec<_> = fs::read_dir(&small.0)?.filter_map(|e| Some(e.ok()?.file_name())).collect();
        ensure(names == ["snapshot"], || format!("{names:?} are left"))?;
        checks_all(&vm)?;
    }
    vm.is_back_at(&before)?;
    let restored = restore(lab, "restored", &file, &[])?;
    checks_all(&restored)?;
    restored.quit()?;
    // elsewhere there is room
    snapshot_well(&vm, &lab.arg("snapshot"))?;
    vm.quit()
}

fn software_guest(lab: &Lab) -> Outcome {
    let args = ["--memory", "64M", "--workload", "random:size=16M"];
    let vm = Process::software(lab, "vm", "run", &args)?;
    vm.wait_until("the guest works", at_work)?;
    snapshot_well(&vm, &lab.arg("snapshot"))?;
    vm.works()?;
    vm.quit()?;
    let restored = Process::software(lab, "restored", "run", &["--restore", &lab.arg("snapshot")])?;
    restored.wait_until("the guest works", at_work)?;
    restored.works()?;
    restored.quit()
}
