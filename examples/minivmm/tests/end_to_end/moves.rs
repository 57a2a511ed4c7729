//! VMs that move: on and on, and with every workload.

use std::fs;

use crate::common::{Lab, Outcome, Process, Suite, at_work, beats_in_order, ensure, ensure_says};

/// Small enough to be quick; `for` lets the guest check everything once more, at the destination,
/// and say when it has.
const WORKLOADS: [&str; 15] = [
    "idle:data=24M",
    "sleep:data=24M",
    "one-edge:size=24M,data=8M",
    "touch:size=16M,data=8M",
    "rate:percent=60,data=8M",
    "sequential:size=24M,data=8M",
    "random:size=24M,data=8M",
    "storm:size=24M,data=8M",
    "hot:size=8M,data=24M",
    "quicksort:size=16M,segment=64K,data=8M",
    "quicksort:regions=6,size=4M,slice=2ms,data=8M",
    "kv:percent=60,step=100ms,data=8M",
    "churn:size=24M,data=8M,interval=20ms",
    "log:size=16M,data=8M",
    "mix:size=32M,data=8M",
];

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("moves/a_to_b_to_c_to_a", a_to_b_to_c_to_a);
    for spec in WORKLOADS {
        let name =
            if spec.contains("regions") { "quicksort_of_regions" } else { spec.split(':').next().unwrap_or(spec) };
        suite.kvm(format!("moves/workload/{name}"), move |lab| every_page_is_right(lab, spec));
    }
    for (strategy, to) in [("pre-copy", "unix"), ("stop-and-copy", "unix"), ("stop-and-copy", "tcp")] {
        suite.kvm(format!("moves/{strategy}/{to}"), move |lab| strategy_over(lab, strategy, to));
    }
    suite.kvm("moves/another_backing_and_tracker", another_backing_and_tracker);
    suite.kvm("moves/across_the_hole_below_4_gib", across_the_hole);
    suite.anywhere("moves/software_guest", software_guest);
}

/// One file takes the serial output of all: no line is lost, none comes twice.
fn a_to_b_to_c_to_a(lab: &Lab) -> Outcome {
    let file = lab.path("serial");
    let serial = ["--serial", &lab.arg("serial")];
    let lines = || fs::read_to_string(&file).map(|text| text.lines().count());
    let mut at = lab.workload("a", "hot:size=8M,serial=1,every=10ms", &serial)?;
    let mut addresses = Vec::new();
    // the last two are fresh processes: at A's control socket, and at B's address
    for (epoch, (name, listen)) in (1u64..).zip([
        ("b", "tcp:127.0.0.1:0".to_owned()),
        ("c", format!("unix:{}", lab.arg("c.migration"))),
        ("a", "tcp:127.0.0.1:0".to_owned()),
        ("b", String::new()),
    ]) {
        let listen = if listen.is_empty() { addresses.first().cloned().unwrap_or_default() } else { listen };
        let before = lines()?;
        let next = lab.receive_at(name, &listen, &serial)?;
        addresses.push(next.address.clone());
        let report = at.migrate_well(&next.address, &[])?;
        ensure(report["epoch"] == epoch, || format!("epoch {epoch} is due: {report}"))?;
        at = next;
        let status = at.wait_until("the guest works", at_work)?;
        ensure(status["epoch"] == epoch, || format!("epoch {epoch} is due: {status}"))?;
        at.works()?;
        crate::common::wait_for("more lines", || Ok((lines()? > before + 2).then_some(())))?;
    }
    at.ask(&["pause"])?;
    let text = fs::read_to_string(&file)?;
    at.quit()?;
    let beats = beats_in_order(&text, "ready hot")?;
    ensure(beats > 8, || format!("only {} lines", beats))
}

fn every_page_is_right(lab: &Lab, spec: &str) -> Outcome {
    let mut source = lab.workload("source", &format!("{spec},for=1500ms"), &["--cpus", "2"])?;
    let destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    let status =
        destination.wait_until("the guest has checked everything", |s| s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0 && status["workload"]["first_error"].is_null(), || format!("{status}"))?;
    ensure(status["workload"]["cpus_online"] == 2, || format!("{status}"))?;
    destination.quit()
}

fn strategy_over(lab: &Lab, strategy: &str, to: &str) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &[])?;
    let listen = if to == "unix" { format!("unix:{}", lab.arg("listener")) } else { "tcp:127.0.0.1:0".into() };
    let destination = lab.receive_at("destination", &listen, &[])?;
    let report = source.migrate_well(&destination.address, &["--strategy", strategy, "--checksum"])?;
    ensure(report["strategy"] == strategy, || format!("{report}"))?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    destination.quit()
}

fn another_backing_and_tracker(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--backing", "memfd", "--tracker", "dirty-ring"])?;
    let mut destination = lab.receive("destination", &["--backing", "anon", "--tracker", "write-protect"])?;
    source.migrate_well(&destination.address, &[])?;
    destination.works()?;
    let status = destination.status()?;
    ensure(status["backing"] == "anon", || format!("{status}"))?;
    ensure_says(status["tracker"].as_str().unwrap_or(""), "write-protect")?;
    let last = lab.receive("last", &[])?;
    destination.migrate_well(&last.address, &[])?;
    last.works()?;
    last.quit()
}

/// RAM below and above: most of it is never touched, and costs nothing.
fn across_the_hole(lab: &Lab) -> Outcome {
    let options = ["--memory", "5G", "--workload", "touch:size=8M", "--paused"];
    let mut source = lab.run("source", &options)?;
    let destination = lab.receive("destination", &[])?;
    let report = source.migrate_well(&destination.address, &[])?;
    ensure(report["ram_bytes"] == 5u64 << 30, || format!("{report}"))?;
    ensure(report["pages"]["hole"].as_u64() > Some(5 << 17), || format!("{report}"))?;
    // both ends of both pieces can be read, nothing in between
    for (gpa, good) in [
        (0u64, true),
        ((3 << 30) - 4096, true),
        (3 << 30, false),
        (4 << 30, true),
        ((6 << 30) - 4096, true),
        (6 << 30, false),
    ] {
        let out = lab.arg("page");
        let answer = destination.ctl(&["memory", "--gpa", &gpa.to_string(), "--len", "4096", "--out", &out])?;
        ensure((answer.code == Some(0)) == good, || format!("{gpa:#x}: {answer:?}"))?;
    }
    destination.ask(&["resume"])?;
    destination.wait_until("the guest works", at_work)?;
    destination.quit()
}

fn software_guest(lab: &Lab) -> Outcome {
    let options = ["--memory", "64M", "--cpus", "2", "--workload", "hot:size=8M"];
    let mut source = Process::software(lab, "source", "run", &options)?;
    source.says("a software guest takes the place")?;
    let status = source.wait_until("the guest works", at_work)?;
    ensure(status["software_guest"] == true, || format!("{status}"))?;
    let mut destination = Process::software(lab, "destination", "receive", &["--listen", "tcp:127.0.0.1:0"])?;
    source.migrate_well(&destination.address, &[])?;
    destination.works()?;
    ensure(destination.status()?["software_guest"] == true, || "it became a real one".into())?;
    // and on, paused
    destination.ask(&["pause"])?;
    let last = Process::software(lab, "last", "receive", &["--listen", "tcp:127.0.0.1:0"])?;
    destination.migrate_well(&last.address, &["--strategy", "stop-and-copy"])?;
    ensure(last.status()?["state"] == "paused", || "it does not stay paused".into())?;
    last.ask(&["resume"])?;
    last.works()?;
    last.quit()
}
