//! Guests that run at their destination before their pages are there: every order of the push,
//! every number of lanes, backing and number of CPUs, after no rounds, one, or three; asked for at
//! the start, on the way, and at a timeout.

use serde_json::Value;

use crate::{
    common::{Lab, Outcome, Process, Suite, at_work, ensure, ensure_says},
    one_edge::only_edges,
};

const ORDERS: [&str; 5] = ["linear", "bubbling", "multi-pivot", "hot-first", "random"];
const BACKINGS: [&str; 4] = ["anon", "thp", "memfd", "hugetlb"];
const CPUS: [usize; 2] = [1, 4];
const LANES: [&str; 2] = ["1", "2"];
const STRATEGIES: [&str; 3] = ["post-copy", "hybrid:rounds=1", "hybrid:rounds=3"];

/// The guests' work areas of 24 MiB take about half a second: they fault a lot.
pub(crate) const SLOW: [&str; 2] = ["--bandwidth", "400Mbit"];
/// So slow that a trial can do something before the last page has arrived.
const SLOWER: [&str; 4] = post_copy_at("80Mbit");

/// Post-copy over a link that is no faster than this.
pub(crate) const fn post_copy_at(bandwidth: &str) -> [&str; 4] {
    ["--strategy", "post-copy", "--bandwidth", bandwidth]
}

/// Guests that notice a wrong page at once, and with `for`, each one that is wrong at its end.
const WORKLOADS: [&str; 7] = [
    "touch:size=16M,data=8M",
    "random:size=24M,data=8M",
    "storm:size=24M,data=8M",
    "quicksort:regions=6,size=4M,slice=2ms,data=8M",
    "kv:percent=60,step=100ms,data=8M",
    "churn:size=24M,data=8M",
    "mix:size=32M,data=8M",
];

pub(crate) fn add(suite: &mut Suite) {
    // every order on every backing; every two values of two other parameters meet somewhere
    for (i, order) in ORDERS.into_iter().enumerate() {
        for (j, backing) in BACKINGS.into_iter().enumerate() {
            let way = Way {
                order,
                backing,
                cpus: CPUS[(i + j) % 2],
                lanes: LANES[(i + j / 2) % 2],
                strategy: STRATEGIES[(2 * i + j) % 3],
                slow: (i / 2 + j) % 2 == 0,
            };
            let Way { cpus, lanes, .. } = way;
            let strategy = way.strategy.replace(":rounds=", "_");
            let name = format!("post_copy/one_edge/{strategy}/{order}/{backing}/{lanes}_lanes/{cpus}_cpus");
            suite.post_copy(name, backing, move |lab| one_edge(lab, way));
        }
    }
    for (n, spec) in WORKLOADS.into_iter().enumerate() {
        let name = spec.split(':').next().unwrap_or(spec);
        suite.post_copy(format!("post_copy/workload/{name}"), "anon", move |lab| every_page_is_right(lab, spec, n));
    }
    for huge in ["whole", "split"] {
        suite.post_copy(format!("post_copy/huge_pages/{huge}"), "thp", move |lab| huge_pages(lab, huge));
    }
    suite.post_copy("post_copy/a_to_b_to_c_to_a", "thp", a_to_b_to_c_to_a);
    suite.post_copy("post_copy/across_the_hole_below_4_gib", "anon", across_the_hole);
    suite.post_copy("post_copy/another_backing", "hugetlb", another_backing);
    suite.post_copy("post_copy/paused_stays_paused", "anon", paused_stays_paused);
    suite.post_copy("post_copy/status_at_any_time", "anon", status_at_any_time);
    suite.post_copy("post_copy/pause_at_the_destination", "anon", pause_at_the_destination);
    suite.post_copy("post_copy/no_further_before_it_is_complete", "anon", no_further);
    suite.post_copy("post_copy/switch/by_the_user", "anon", switched_by_the_user);
    suite.post_copy("post_copy/switch/at_the_timeout", "thp", switched_at_the_timeout);
    suite.post_copy("post_copy/switch/without_demand_lanes", "anon", no_switch_without_lanes);
    suite.post_copy("post_copy/switch/without_a_migration", "anon", no_switch_without_a_migration);
    suite.post_copy("post_copy/no_demand_lanes", "anon", no_demand_lanes);
    suite.post_copy("post_copy/cancel_comes_too_late", "anon", cancel_comes_too_late);
}

#[derive(Clone, Copy)]
struct Way {
    order: &'static str,
    backing: &'static str,
    cpus: usize,
    lanes: &'static str,
    strategy: &'static str,
    slow: bool,
}

/// A number of the report, by its path of two names.
pub(crate) fn number(report: &Value, group: &str, name: &str) -> u64 {
    report[group][name].as_u64().unwrap_or(u64::MAX)
}

/// What holds of every migration that ended in post-copy, and was not disturbed: each page that was
/// left behind moved once.
pub(crate) fn moved_each_page_once(report: &Value) -> Outcome {
    let pages = |name: &str| number(report, "pages", name);
    ensure(report["outcome"] == "completed" && report["reason"].is_null(), || format!("{report}"))?;
    let left = pages("pushed") + pages("demanded");
    let after = pages("entry") + left;
    ensure(pages("prepaged") <= pages("pushed"), || format!("{report}"))?;
    if left == 0 && report["strategy"] == "hybrid" {
        // the guest has hardly been scheduled in the last round
        return ensure(report["faults"].is_null(), || format!("no page was left behind: {report}"));
    }
    ensure(report["faults"].is_object(), || format!("no faults are told: {report}"))?;
    ensure(number(report, "faults", "duplicates") == 0, || format!("pages came twice: {report}"))?;
    ensure(report["recoveries"] == 0, || format!("the link was lost: {report}"))?;
    let rounds = report["round_details"].as_array().into_iter().flatten();
    let in_rounds: u64 = rounds.map(|round| round["pages"].as_u64().unwrap_or(0)).sum();
    ensure(pages("plain") + pages("zero") == in_rounds + after, || format!("{in_rounds} in rounds: {report}"))?;
    let faults = |name: &str| number(report, "faults", name);
    ensure(faults("vcpu") <= faults("count") && faults("network") <= pages("demanded"), || format!("{report}"))?;
    let us = ["p50_us", "p90_us", "p99_us", "p999_us", "max_us"].map(faults);
    ensure(us.is_sorted() && us[4] < u64::MAX, || format!("{report}"))?;
    if report["strategy"] == "post-copy" {
        ensure(pages("distinct") == after, || format!("all pages were left behind: {report}"))?;
        ensure(pages("distinct") + pages("hole") >= pages("total"), || format!("{report}"))?;
        ensure(report["rounds"] == 0, || format!("{report}"))?;
    }
    Ok(())
}

/// The guest waited for pages, if only for some that were on their way.
fn waited(report: &Value) -> Outcome {
    let good = (1..u64::MAX).contains(&number(report, "faults", "count"));
    ensure(good, || format!("nobody waited for a page: {report}"))
}

/// The guest waited for pages that were sent for that reason.
pub(crate) fn faulted(report: &Value) -> Outcome {
    let good = [("faults", "count"), ("faults", "network"), ("pages", "demanded")]
        .into_iter()
        .all(|(group, name)| (1..u64::MAX).contains(&number(report, group, name)));
    ensure(good, || format!("nobody waited for a page: {report}"))
}

fn one_edge(lab: &Lab, way: Way) -> Outcome {
    let Way { order, backing, cpus, lanes, strategy, slow } = way;
    let options = ["--cpus", &cpus.to_string(), "--backing", backing];
    let mut source = lab.workload("source", "one-edge:size=24M", &options)?;
    let (start, len) = source.work_area(lab)?;
    let before = source.memory(lab, start, len)?;
    let destination = lab.receive("destination", &[])?;
    let mut options = vec!["--strategy", strategy, "--push-order", order, "--demand-lanes", lanes];
    if slow {
        options.extend(SLOW);
    }
    let report = source.migrate_well(&destination.address, &options)?;
    moved_each_page_once(&report)?;
    let pivots = !matches!(order, "linear" | "random");
    ensure(pivots || number(&report, "pages", "prepaged") == 0, || format!("{order} has no pivots: {report}"))?;
    let (name, rounds) = strategy.split_once(":rounds=").unwrap_or((strategy, "0"));
    ensure(report["strategy"] == name, || format!("{report}"))?;
    ensure(report["rounds"].as_u64() == rounds.parse().ok(), || format!("{rounds} rounds: {report}"))?;
    ensure(report["demand_lanes"].as_u64() == lanes.parse().ok(), || format!("{report}"))?;
    if slow {
        waited(&report)?;
    }
    // few huge pages are soon all on their way; and a guest that goes upwards may wait for the next
    // push each time
    if slow && name == "post-copy" && backing != "hugetlb" && order != "linear" {
        faulted(&report)?;
    }
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    let status = destination.status()?;
    ensure(status["backing"] == backing && status["cpus"] == cpus, || format!("{status}"))?;
    destination.ask(&["pause"])?;
    let after = destination.memory(lab, start, len)?;
    destination.quit()?;
    only_edges(&before, &after, cpus)
}

fn every_page_is_right(lab: &Lab, spec: &str, n: usize) -> Outcome {
    let mut source = lab.workload("source", &format!("{spec},for=1500ms"), &["--cpus", "2"])?;
    let destination = lab.receive("destination", &[])?;
    let options = [&["--strategy", "post-copy", "--push-order", ORDERS[n % 5], "--checksum"], &SLOW[..]].concat();
    let report = source.migrate_well(&destination.address, &options[..if n.is_multiple_of(2) { 7 } else { 4 }])?;
    moved_each_page_once(&report)?;
    let status =
        destination.wait_until("the guest has checked everything", |s| s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0 && status["workload"]["first_error"].is_null(), || format!("{status}"))?;
    ensure(status["workload"]["cpus_online"] == 2, || format!("{status}"))?;
    destination.quit()
}

/// 256 MiB in transparent huge pages, as far as the host gives them.
fn huge_pages(lab: &Lab, huge: &str) -> Outcome {
    let guest = ["--memory", "256M", "--cpus", "2", "--workload", "random:size=160M", "--backing", "thp"];
    let mut source = lab.run("source", &guest)?;
    source.wait_until("the guest works", at_work)?;
    let destination = lab.receive("destination", &[])?;
    let options = ["--strategy", "post-copy", "--huge", huge, "--bandwidth", "1Gbit"];
    let report = source.migrate_well(&destination.address, &options)?;
    moved_each_page_once(&report)?;
    faulted(&report)?;
    // a block that is asked for comes whole, but for the pages of it that were pushed
    let per_fault = number(&report, "pages", "demanded") / number(&report, "faults", "network");
    ensure((per_fault > 1) == (huge == "whole"), || format!("{per_fault} pages a fault: {report}"))?;
    destination.works()?;
    destination.quit()
}

fn a_to_b_to_c_to_a(lab: &Lab) -> Outcome {
    let options = ["--cpus", "2", "--tracker", "write-protect"];
    let mut at = lab.workload("a", "random:size=24M,data=8M", &options)?;
    for (epoch, (next, strategy)) in
        (1u64..).zip([("b", "post-copy"), ("c", "hybrid:rounds=1"), ("a", "post-copy"), ("b", "pre-copy")])
    {
        let next = lab.receive(next, &[])?;
        let report = at.migrate_well(&next.address, &["--strategy", strategy])?;
        ensure(report["epoch"] == epoch, || format!("epoch {epoch} is due: {report}"))?;
        if strategy == "pre-copy" {
            ensure(report["faults"].is_null(), || format!("faults in pre-copy: {report}"))?;
        } else {
            moved_each_page_once(&report)?;
        }
        at = next;
        let status = at.wait_until("the guest works", at_work)?;
        ensure(status["epoch"] == epoch, || format!("epoch {epoch} is due: {status}"))?;
        at.works()?;
    }
    at.quit()
}

/// RAM below and above, most of it never touched: such pages are not missing, and a touch of one
/// does not wait for the source.
fn across_the_hole(lab: &Lab) -> Outcome {
    let options = ["--memory", "5G", "--workload", "random:size=24M", "--backing", "anon"];
    let mut source = lab.run("source", &options)?;
    source.wait_until("the guest works", at_work)?;
    let destination = lab.receive("destination", &[])?;
    let report = source.migrate_well(&destination.address, &[&["--strategy", "post-copy"], &SLOW[..]].concat())?;
    moved_each_page_once(&report)?;
    faulted(&report)?;
    ensure(number(&report, "pages", "hole") > 5 << 17, || format!("{report}"))?;
    for gpa in [0x3000_0000u64, (3 << 30) - 4096, 4 << 30, (6 << 30) - 4096] {
        ensure(destination.memory(lab, gpa, 4096)? == [0; 4096], || format!("{gpa:#x} is not empty"))?;
    }
    destination.works()?;
    destination.quit()
}

/// Neither side has what the other has: hugetlb fetches whole huge pages, whatever the source sends
/// otherwise.
fn another_backing(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--backing", "anon"])?;
    let mut middle = lab.receive("middle", &["--backing", "hugetlb"])?;
    let options = [&["--strategy", "post-copy"], &SLOW[..]].concat();
    let report = source.migrate_well(&middle.address, &options)?;
    moved_each_page_once(&report)?;
    waited(&report)?;
    ensure((number(&report, "pages", "distinct")).is_multiple_of(512), || format!("not whole huge pages: {report}"))?;
    middle.works()?;
    let last = lab.receive("last", &["--backing", "memfd"])?;
    let report = middle.migrate_well(&last.address, &options)?;
    moved_each_page_once(&report)?;
    waited(&report)?;
    last.works()?;
    last.quit()
}

fn paused_stays_paused(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--cpus", "2"])?;
    source.ask(&["pause"])?;
    let before = source.status()?["workload"]["heartbeats"].clone();
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &SLOWER)?;
    destination.wait_state("paused")?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    moved_each_page_once(&answer.json)?;
    source.ended_well()?;
    let after = destination.status()?;
    ensure(after["state"] == "paused" && after["workload"]["heartbeats"] == before, || format!("{before}, {after}"))?;
    ensure(destination.ask(&["resume"])?["state"] == "running", || "no answer to resume".into())?;
    destination.works()?;
    destination.quit()
}

/// The board may be missing itself: there is a status all the same.
fn status_at_any_time(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--cpus", "4"])?;
    let destination = lab.receive("destination", &[])?;
    let mut client = source.start_migrate(&destination.address, &SLOWER)?;
    let mut running = 0;
    while !client.has_ended()? {
        let (here, there) = (source.ctl(&["status"])?, destination.status()?);
        // the source may have ended meanwhile
        ensure(here.code != Some(0) || here.json["state"] != "in-doubt", || format!("{here:?}"))?;
        let good = ["incoming", "ready", "running"].iter().any(|state| there["state"] == *state);
        ensure(good, || format!("{there}"))?;
        if there["state"] == "running" {
            running += 1;
            ensure(there["cpus"] == 4 && there["memory_bytes"] == 64 << 20, || format!("{there}"))?;
        } else {
            ensure(running == 0, || format!("it ran before: {there}"))?;
        }
    }
    let answer = client.answer()?;
    moved_each_page_once(&answer.json)?;
    ensure(running > 0, || "the status was never asked for in post-copy".into())?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// While the guest's CPUs wait for pages they can be stopped, and go on.
fn pause_at_the_destination(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--cpus", "4"])?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &SLOWER)?;
    destination.wait_state("running")?;
    let mut pauses = 0;
    while source.ctl(&["status"])?.json["state"] == "outgoing" {
        for (command, state) in [("pause", "paused"), ("resume", "running")] {
            destination.ask(&[command])?;
            ensure(destination.status()?["state"] == state, || format!("not {state} after {command}"))?;
        }
        pauses += 1;
    }
    ensure(pauses > 0, || "never paused".into())?;
    let answer = client.answer()?;
    moved_each_page_once(&answer.json)?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A VM that lacks pages cannot move on: what is missing would be taken for empty.
fn no_further(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M,data=8M", &[])?;
    let mut middle = lab.receive("middle", &[])?;
    let last = lab.receive("last", &[])?;
    let client = source.start_migrate(&middle.address, &post_copy_at("50Mbit"))?;
    middle.wait_state("running")?;
    for strategy in ["pre-copy", "post-copy", "stop-and-copy"] {
        let answer = middle.migrate(&last.address, &["--strategy", strategy])?;
        ensure(source.status()?["state"] == "outgoing", || format!("{strategy}: it took too long"))?;
        ensure(answer.code == Some(1), || format!("{strategy}: {answer:?}"))?;
        ensure_says(answer.reason(), "missing")?;
    }
    let answer = client.answer()?;
    moved_each_page_once(&answer.json)?;
    source.ended_well()?;
    middle.works()?;
    middle.migrate_well(&last.address, &[])?;
    last.works()?;
    last.quit()
}

/// A guest that writes faster than the network carries, as in `convergence`, and whose user does
/// not mind.
const HOPELESS: [&str; 6] = ["--bandwidth", "500Mbit", "--guest-impact", "low", "--downtime-limit", "20ms"];

fn switched_by_the_user(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=32M", &["--cpus", "2"])?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &HOPELESS)?;
    source.wait_until("a second round", |s| s["migration"]["round"].as_u64() >= Some(2))?;
    source.ask(&["post-copy"])?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", || format!("{answer:?}"))?;
    let report = answer.json;
    ensure(report["strategy"] == "pre-copy" && report["rounds"].as_u64() >= Some(2), || format!("{report}"))?;
    waited(&report)?;
    ensure(report["recoveries"] == 0 && number(&report, "faults", "duplicates") == 0, || format!("{report}"))?;
    source.ended_well()?;
    destination.works()?;
    // in the middle of the first round, whose rest is left behind
    let (mut source, last) = (destination, lab.receive("last", &[])?);
    let client = source.start_migrate(&last.address, &[&HOPELESS[2..], &SLOWER[2..]].concat())?;
    source.wait_until("it moves", |s| s["migration"]["round_sent"].as_u64() > Some(0))?;
    source.ask(&["post-copy"])?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["rounds"] == 1, || format!("{answer:?}"))?;
    waited(&answer.json)?;
    source.ended_well()?;
    last.works()?;
    last.quit()
}

fn switched_at_the_timeout(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=32M", &["--cpus", "2", "--backing", "thp"])?;
    let destination = lab.receive("destination", &[])?;
    let options = [&HOPELESS[..], &["--timeout", "1s", "--on-timeout", "post-copy"]].concat();
    let report = source.migrate_well(&destination.address, &options)?;
    waited(&report)?;
    ensure(report["strategy"] == "pre-copy" && report["recoveries"] == 0, || format!("{report}"))?;
    destination.works()?;
    destination.quit()
}

/// The wish is refused for this reason.
fn no_switch(source: &Process, words: &str) -> Outcome {
    let answer = source.ctl(&["post-copy"])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.json["error"].as_str().unwrap_or(""), words)
}

/// The wish is refused, and does not change the migration: it ends as it would have, or at its
/// timeout.
fn no_switch_without_lanes(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "touch:size=24M,data=24M,mode=read", &[])?;
    let before = source.resources()?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &[&["--demand-lanes", "0"], &SLOWER[2..]].concat())?;
    source.wait_state("outgoing")?;
    no_switch(&source, "demand lanes are off")?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    let report = answer.json;
    ensure(report["faults"].is_null() && report["demand_lanes"] == 0, || format!("{report}"))?;
    // a guest that writes little needs few rounds: none was cut short
    ensure(report["rounds"].as_u64() <= Some(4), || format!("the wish broke the rounds off: {report}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()?;

    let source = lab.workload("hopeless", "hot:size=32M", &[])?;
    let destination = lab.receive("other", &[])?;
    let options = [&HOPELESS[..], &["--demand-lanes", "0", "--timeout", "1s", "--on-timeout", "post-copy"]].concat();
    let answer = source.migrate(&destination.address, &options)?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "not converged in time")?;
    source.works()?;
    source.is_back_at(&before)?;
    source.quit()?;
    destination.quit()
}

fn no_switch_without_a_migration(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "random:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    for process in [&source, &destination] {
        no_switch(process, "no migration is under way")?;
    }
    source.works()?;
    source.quit()?;
    destination.quit()
}

/// The migration is refused for this reason, and the guest runs on as if nothing had been.
fn is_refused(source: &Process, destination: &Process, options: &[&str], words: &str) -> Outcome {
    let before = source.resources()?;
    let answer = source.migrate(&destination.address, options)?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), words)?;
    source.works()?;
    source.is_back_at(&before)
}

fn no_demand_lanes(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    for strategy in ["post-copy", "hybrid", "hybrid:rounds=3"] {
        let options = ["--strategy", strategy, "--demand-lanes", "0"];
        is_refused(&source, &destination, &options, "demand lanes are off")?;
        destination.wait_state("incoming")?;
    }
    moved_each_page_once(&source.retry_well(&destination.address, &["--strategy", "post-copy"])?)?;
    destination.works()?;
    destination.quit()
}

/// After the hand-over there is nothing to cancel; the VM arrives.
fn cancel_comes_too_late(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &SLOWER)?;
    destination.wait_state("running")?;
    for late in ["pause", "resume"] {
        let answer = source.ctl(&[late])?;
        ensure(answer.code == Some(1), || format!("{late} after the hand-over: {answer:?}"))?;
    }
    no_switch(&source, "too late")?;
    let answer = source.ctl(&["cancel"])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.json["error"].as_str().unwrap_or(""), "too late")?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    moved_each_page_once(&answer.json)?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}
