//! The VMM is replaced under its running VM: the successor is started by itself, and found at the
//! same place.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, path::Path};

use serde_json::Value;

use crate::common::{Lab, Outcome, Process, Suite, beats_in_order, ensure, ensure_says, usage, wait_for};

pub(crate) fn add(suite: &mut Suite) {
    for cpus in ["1", "4"] {
        suite.kvm(format!("refresh/again_and_again/{cpus}"), move |lab| again_and_again(lab, cpus));
    }
    suite.kvm("refresh/another_build", another_build);
    suite.kvm("refresh/every", |lab| by_policy(lab, &["--every", "200ms"]));
    suite.kvm("refresh/when_memory_has_grown", |lab| by_policy(lab, &["--when", "rss>64K"]));
    suite.kvm("refresh/only_the_last_schedule_counts", only_the_last_schedule_counts);
    suite.kvm("refresh/two_at_once", two_at_once);
    suite.kvm("refresh/refused", refused);
}

/// Whoever has the VM in the end is not a child of this process: it is told to end, however the
/// trial goes.
struct Last(String);

impl Last {
    fn of(lab: &Lab) -> Self {
        Self(lab.arg("vmm"))
    }
}

impl Drop for Last {
    fn drop(&mut self) {
        // it may have ended; or be about to be replaced, and its successor does not hear this
        let _ = wait_for("its control socket to go", || {
            let _ = usage(&["ctl", "--control", &self.0, "quit"]);
            Ok((!Path::new(&self.0).exists()).then_some(()))
        });
    }
}

fn guest(lab: &Lab, args: &[&str]) -> Result<Process, libtest_mimic::Failed> {
    let serial = lab.arg("serial");
    lab.workload("vmm", "random:size=16M,serial=1,every=5ms", &[args, &["--serial", &serial]].concat())
}

fn pid(value: &Value) -> u64 {
    value["pid"].as_u64().unwrap_or(0)
}

fn serial_is_whole(lab: &Lab) -> Outcome {
    let beats = beats_in_order(&fs::read_to_string(lab.path("serial"))?, "ready random")?;
    ensure(beats > 2, || "hardly a line".into())
}

fn again_and_again(lab: &Lab, cpus: &str) -> Outcome {
    let mut first = guest(lab, &["--backing", "memfd", "--cpus", cpus])?;
    let last = Last::of(lab);
    let mut before = u64::from(first.pid());
    for epoch in 1..=5 {
        let report = first.ask(&["refresh"])?;
        ensure(report["outcome"] == "completed" && report["memory_copied_bytes"] == 0, || format!("{report}"))?;
        let status = first.status()?;
        ensure(pid(&report) != before && pid(&report) == pid(&status), || format!("{report} {status}"))?;
        ensure(status["epoch"] == epoch && status["state"] == "running", || format!("{status}"))?;
        before = pid(&status);
        if epoch == 1 {
            // its control socket is the successor's
            ensure(first.ended()?.success(), || "the first one failed".into())?;
        }
    }
    first.works()?;
    drop(last);
    wait_for("the control socket to go", || Ok((!lab.path("vmm").exists()).then_some(())))?;
    serial_is_whole(lab)
}

/// A copy stands for a new build.
fn another_build(lab: &Lab) -> Outcome {
    let first = guest(lab, &["--backing", "memfd"])?;
    let last = Last::of(lab);
    let build = lab.path("build");
    fs::copy(format!("/proc/{}/exe", first.pid()), &build)?;
    let report = first.ask(&["refresh", "--exec", &lab.arg("build")])?;
    let exe = fs::read_link(format!("/proc/{}/exe", pid(&report)))?;
    ensure(exe == build.canonicalize()?, || format!("{} runs", exe.display()))?;
    first.works()?;
    drop(last);
    serial_is_whole(lab)
}

fn by_policy(lab: &Lab, policy: &[&str]) -> Outcome {
    let first = guest(lab, &["--backing", "memfd"])?;
    let last = Last::of(lab);
    let answer = first.ask(&[&["refresh"], policy].concat())?;
    ensure(answer["scheduled"] == true, || format!("{answer}"))?;
    // between two that succeed each other there may be a moment in which a question is not answered
    wait_for("three successors", || {
        Ok(first.status().ok().and_then(|s| s["epoch"].as_u64()).filter(|&epoch| epoch >= 3))
    })?;
    let status = wait_for("an answer", || Ok(first.status().ok().filter(|s| s["workload"].is_object())))?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    drop(last);
    serial_is_whole(lab)
}

/// A later schedule takes the place of an earlier one, and one successor that is asked for in
/// between keeps to it.
fn only_the_last_schedule_counts(lab: &Lab) -> Outcome {
    let first = guest(lab, &["--backing", "memfd"])?;
    let last = Last::of(lab);
    for every in ["3s", "1h"] {
        ensure(first.ask(&["refresh", "--every", every])?["scheduled"] == true, || "not scheduled".into())?;
    }
    // the earlier one would be due long before these lines are written
    let said =
        || -> Result<usize, libtest_mimic::Failed> { Ok(fs::read_to_string(lab.path("serial"))?.lines().count()) };
    let before = said()?;
    wait_for("the guest has gone on for a while", || Ok((said()? > before + 800).then_some(())))?;
    ensure(first.status()?["epoch"] == 0, || "the earlier schedule counts".into())?;
    let report = first.ask(&["refresh"])?;
    let command = fs::read(format!("/proc/{}/cmdline", pid(&report)))?;
    ensure_says(&String::from_utf8_lossy(&command), &(3600 * 1_000_000u64).to_string())?;
    drop(last);
    serial_is_whole(lab)
}

/// The second is refused while the first one's successor gets ready, and leaves that alone.
fn two_at_once(lab: &Lab) -> Outcome {
    let mut first = guest(lab, &["--backing", "memfd"])?;
    let last = Last::of(lab);
    let (slow, gate) = (lab.path("slow"), lab.path("gate"));
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU)?;
    let script = format!("#!/bin/sh\nread -r go <{}\nexec /proc/{}/exe \"$@\"\n", gate.display(), first.pid());
    fs::write(&slow, script)?;
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o700))?;
    let client = first.start_ctl(&["refresh", "--exec", &lab.arg("slow")])?;
    // it opens once its successor reads from it
    let mut go = fs::OpenOptions::new().write(true).open(&gate)?;
    let second = first.ctl(&["refresh"])?;
    ensure(second.code == Some(1), || format!("{second:?}"))?;
    ensure_says(second.reason(), "a successor is being prepared")?;
    first.works()?;
    go.write_all(b"go\n")?;
    let report = client.answer()?;
    ensure(report.code == Some(0), || format!("{report:?}"))?;
    ensure(pid(&report.json) == pid(&first.status()?), || format!("{report:?}"))?;
    ensure(first.ended()?.success(), || "the first one failed".into())?;
    first.works()?;
    drop(last);
    serial_is_whole(lab)
}

fn refused(lab: &Lab) -> Outcome {
    let private = lab.workload("private", "hot:size=8M", &["--backing", "thp"])?;
    let answer = private.ctl(&["refresh"])?;
    ensure(answer.code != Some(0), || "private RAM was shared".into())?;
    ensure_says(answer.reason(), "memfd")?;
    private.works()?;
    private.quit()?;

    let vmm = guest(lab, &["--backing", "memfd"])?;
    let last = Last::of(lab);
    let bad: [(&str, &str); 3] =
        [("/nowhere/minivmm", "/nowhere/minivmm"), ("/bin/false", "ended"), ("/bin/true", "ended")];
    for (exec, words) in bad {
        let answer = vmm.ctl(&["refresh", "--exec", exec])?;
        ensure(answer.code != Some(0), || format!("{exec} took over"))?;
        ensure_says(answer.reason(), words)?;
        vmm.works()?;
    }
    let report = vmm.ask(&["refresh"])?;
    ensure(pid(&report) != u64::from(vmm.pid()), || format!("{report}"))?;
    vmm.works()?;
    drop(last);
    serial_is_whole(lab)
}
