//! Pages that the guest does not need never travel, and those that it takes back arrive.

use libtest_mimic::Failed;
use serde_json::Value;

use crate::common::{Lab, Outcome, Process, Suite, at_work, ensure, wait_for};

/// 128 MiB, all of it written once, of which an eighth to three eighths are in use.
const GUEST: &str = "churn:size=128M,pages=4000,interval=100ms";
/// Pages that it works on, less than four in a thousand for its ledgers.
const PAGES: u64 = 32_000;
/// Two and a half seconds of its work.
const WORK: u64 = 10_000;

pub(crate) fn add(suite: &mut Suite) {
    for strategy in ["pre-copy", "post-copy", "hybrid", "stop-and-copy"] {
        suite.kvm(format!("balloon/{strategy}"), move |lab| with_and_without(lab, strategy));
    }
    for backing in ["anon", "thp", "memfd"] {
        suite.kvm(format!("balloon/there_and_back/{backing}"), move |lab| there_and_back(lab, backing));
    }
    for (backing, tracker) in [("anon", "auto"), ("anon", "write-protect"), ("memfd", "auto")] {
        let name = format!("balloon/gives_memory_back/{backing}/{tracker}");
        suite.kvm(name, move |lab| gives_memory_back(lab, backing, tracker));
    }
    for tracker in ["dirty-log", "manual-protect", "dirty-ring", "write-protect"] {
        suite.kvm(format!("balloon/tracker/{tracker}"), move |lab| any_tracker(lab, tracker));
    }
}

fn number(status: &Value, what: &str, field: &str) -> u64 {
    status[what][field].as_u64().unwrap_or(0)
}

fn balloon(status: &Value, field: &str) -> u64 {
    number(&status["workload"], "balloon", field)
}

/// A guest at work, with its balloon inflated if it has one.
fn guest(lab: &Lab, name: &str, balloon_is: &str, args: &[&str]) -> Result<Process, Failed> {
    let spec = format!("{GUEST},balloon={balloon_is}");
    let source = lab.run(name, &[&["--memory", "192M", "--workload", &spec], args].concat())?;
    source.wait_until("the guest works", at_work)?;
    if balloon_is != "off" {
        source.wait_until("the balloon is inflated", |s| balloon(s, "inflations") > 0)?;
    } else {
        ensure(balloon(&source.status()?, "pages") == 0, || "it is off".into())?;
    }
    Ok(source)
}

/// The guest, which has just arrived, works on for a while and finds nothing wrong.
fn works_on(at: &Process) -> Outcome {
    let operations = |status: &Value| number(status, "workload", "operations");
    let arrived = at.status()?;
    ensure(arrived["workload"]["errors"] == 0, || format!("on arrival: {arrived}"))?;
    let later = at.wait_until("the guest works on", |s| operations(s) > operations(&arrived) + WORK)?;
    ensure(later["workload"]["errors"] == 0 && later["workload"]["first_error"].is_null(), || format!("{later}"))
}

/// Its balloon goes on as well: pages are taken back after the move, and written.
fn takes_back(at: &Process) -> Outcome {
    let arrived = at.status()?;
    let later = at.wait_until("memory is short", |s| balloon(s, "deflations") > balloon(&arrived, "deflations"))?;
    ensure(later["workload"]["errors"] == 0, || format!("{later}"))
}

fn with_and_without(lab: &Lab, strategy: &str) -> Outcome {
    let mut reports = Vec::new();
    for balloon_is in ["on", "off"] {
        let mut source = guest(lab, &format!("source-{balloon_is}"), balloon_is, &["--cpus", "2"])?;
        let destination = lab.receive(&format!("destination-{balloon_is}"), &[])?;
        reports.push(source.migrate_well(&destination.address, &["--strategy", strategy])?);
        works_on(&destination)?;
        if balloon_is == "on" {
            takes_back(&destination)?;
        }
        destination.quit()?;
    }
    let [with, without] = &reports[..] else { return Err("two reports".into()) };
    println!("{strategy}: {} bytes with the balloon, {} without", with["wire_bytes"], without["wire_bytes"]);
    let bytes = |report: &Value| report["wire_bytes"].as_u64().unwrap_or(0);
    ensure(bytes(with) > 0 && bytes(with) * 10 < bytes(without) * 7, || format!("{with}\nagainst\n{without}"))?;
    // what is in use at most, and 5 % of the rest, leave more than half
    ensure(number(with, "pages", "free") > PAGES / 2, || format!("{with}"))?;
    ensure(number(without, "pages", "free") == 0, || format!("{without}"))
}

fn there_and_back(lab: &Lab, backing: &str) -> Outcome {
    let mut a = guest(lab, "a", "on", &["--backing", backing])?;
    let mut b = lab.receive("b", &[])?;
    let there = a.migrate_well(&b.address, &[])?;
    ensure(number(&there, "pages", "free") > 0, || format!("{there}"))?;
    works_on(&b)?;
    let a = lab.receive("a", &[])?;
    let back = b.migrate_well(&a.address, &["--strategy", "post-copy"])?;
    // what never travelled was never touched there
    let (hole, free) = (number(&back, "pages", "hole"), number(&back, "pages", "free"));
    ensure(hole + free > PAGES / 2, || format!("{back}"))?;
    works_on(&a)?;
    takes_back(&a)?;
    a.quit()
}

/// The memory of free pages is the host's, and what is discarded while the guest moves, and where
/// it has just arrived, is nothing that anybody needs.
fn gives_memory_back(lab: &Lab, backing: &str, tracker: &str) -> Outcome {
    let mut a = guest(lab, "a", "discard", &["--backing", backing, "--tracker", tracker, "--cpus", "2"])?;
    let has_less =
        |at: &Process| wait_for("the host has the memory", || Ok((resident(at)? < PAGES * 3 / 4).then_some(())));
    has_less(&a)?;
    let mut b = lab.receive("b", &[])?;
    let slow = ["--bandwidth", "400Mbit"];
    a.migrate_well(&b.address, &slow)?;
    works_on(&b)?;
    takes_back(&b)?;
    let mut a = lab.receive("a", &[])?;
    b.migrate_well(&a.address, &[&slow[..], &["--strategy", "post-copy"]].concat())?;
    works_on(&a)?;
    takes_back(&a)?;
    has_less(&a)?;
    let b = lab.receive("b", &[])?;
    a.migrate_well(&b.address, &[&slow[..], &["--strategy", "hybrid"]].concat())?;
    works_on(&b)?;
    ensure(b.status()?["warnings"] == serde_json::json!([]), || "free pages keep their memory".into())?;
    b.quit()
}

/// Pages of memory that the process has.
fn resident(at: &Process) -> Result<u64, Failed> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", at.pid()))?;
    Ok(statm.split_whitespace().nth(1).ok_or("no statm")?.parse()?)
}

fn any_tracker(lab: &Lab, tracker: &str) -> Outcome {
    let mut source = guest(lab, "source", "on", &["--tracker", tracker])?;
    let destination = lab.receive("destination", &[])?;
    // slow enough for several rounds, in which pages are freed and taken back
    let report = source.migrate_well(&destination.address, &["--bandwidth", "400Mbit"])?;
    ensure(number(&report, "pages", "free") > 0, || format!("{report}"))?;
    works_on(&destination)?;
    destination.quit()
}
