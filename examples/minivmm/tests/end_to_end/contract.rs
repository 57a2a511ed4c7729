//! What outside scripts rely on, line by line.

use std::fs;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::{
    common::{Answer, Lab, Outcome, Suite, at_work, ensure, ensure_says, layout, usage, wait_for},
    elf,
    faults::relay_to,
};

pub(crate) fn add(suite: &mut Suite) {
    suite.anywhere("contract/wrong_command_lines", wrong_command_lines);
    suite.anywhere("contract/nobody_at_the_socket", nobody_at_the_socket);
    suite.anywhere("contract/workloads_are_listed_and_emitted", workloads_are_listed);
    suite.kvm("contract/status", status);
    suite.kvm("contract/migrate_report", migrate_report);
    suite.kvm("contract/migrate_that_never_began", never_began);
    suite.kvm("contract/progress_goes_to_stderr", progress);
    suite.kvm("contract/pause_and_resume", pause_and_resume);
    suite.kvm("contract/memory", memory);
    suite.kvm("contract/client_dies", client_dies);
    suite.kvm("contract/defaults", defaults);
    for tracker in ["dirty-log", "manual-protect", "dirty-ring", "write-protect"] {
        suite.kvm(format!("contract/cancel/{tracker}"), move |lab| cancel(lab, tracker));
    }
    suite.kvm("contract/serial_is_appended_to", serial_is_appended_to);
    suite.kvm("contract/emitted_kernel_runs", emitted_kernel);
    suite.kvm("contract/triple_fault", triple_fault);
    suite.kvm("contract/halted_for_ever", halted_for_ever);
    suite.kvm("contract/wrong_kernels", wrong_kernels);
}

fn wrong_command_lines(lab: &Lab) -> Outcome {
    let socket = lab.arg("nobody");
    let ctl = ["ctl", "--control", &socket, "--json"];
    for args in [
        vec!["ctl", "--json"],
        vec!["ctl", "--json", "status"],
        vec!["ctl", "--json", "migrate", "--to", "tcp:127.0.0.1:1"],
        [&ctl[..], &["dance"]].concat(),
        [&ctl[..], &["migrate"]].concat(),
        [&ctl[..], &["migrate", "--to", "somewhere"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--streams", "0"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--streams", "129"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--downtime-limit", "soon"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--bandwidth", "much"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--on-timeout", "panic"]].concat(),
        [&ctl[..], &["migrate", "--to", "tcp:127.0.0.1:1", "--strategy", "teleport"]].concat(),
        [&ctl[..], &["memory", "--gpa", "zero", "--len", "1", "--out", "x"]].concat(),
    ] {
        let (code, stdout, stderr) = usage(&args)?;
        ensure(code == Some(2), || format!("{args:?}: status {code:?}, {stdout} {stderr}"))?;
        let json: Value = serde_json::from_str(&stdout).map_err(|e| format!("{args:?}: {e}: {stdout:?}"))?;
        ensure(json["error"].as_str().is_some_and(|why| !why.is_empty()), || format!("{args:?}: {json}"))?;
    }
    // people are told on stderr
    for args in [
        vec!["run", "--memory", "64M"],
        vec!["run", "--memory", "64X", "--workload", "idle"],
        vec!["run", "--cpus", "17", "--workload", "idle"],
        vec!["run", "--workload", "no-such-workload"],
        vec!["run", "--workload", "hot:size=lots"],
        vec!["receive", "--listen", "nowhere"],
        vec!["ctl", "--control", &socket, "dance"],
        vec!["ctl", "status"],
    ] {
        let (code, stdout, stderr) = usage(&args)?;
        let good = code == Some(2) && stdout.is_empty() && !stderr.is_empty();
        ensure(good, || format!("{args:?}: status {code:?}, {stdout:?} {stderr:?}"))?;
    }
    Ok(())
}

fn nobody_at_the_socket(lab: &Lab) -> Outcome {
    let socket = lab.arg("nobody");
    for command in [vec!["status"], vec!["quit"], vec!["migrate", "--to", "tcp:127.0.0.1:1"]] {
        let (code, stdout, _) = usage(&[&["ctl", "--json", "--control", &socket], &command[..]].concat())?;
        let json: Value = serde_json::from_str(&stdout)?;
        ensure(code == Some(1), || format!("{command:?}: status {code:?}"))?;
        let why = json["error"].as_str().or(json["reason"].as_str()).unwrap_or("");
        ensure_says(why, &socket)?;
    }
    Ok(())
}

fn workloads_are_listed(lab: &Lab) -> Outcome {
    let (code, list, _) = usage(&["workload", "--list"])?;
    ensure(code == Some(0), || list.clone())?;
    let names =
        ["idle", "sleep", "one-edge", "touch", "sequential", "rate", "random", "storm", "hot", "quicksort", "kv"];
    for name in names.into_iter().chain(["churn", "log", "mix"]) {
        ensure(list.lines().any(|line| line.split_whitespace().next() == Some(name)), || format!("no {name}: {list}"))?;
    }
    let out = lab.arg("hot.elf");
    let (code, stdout, stderr) = usage(&["workload", "--emit", "hot:size=8M", "--out", &out])?;
    ensure(code == Some(0) && stdout.is_empty(), || stderr)?;
    ensure(fs::read(&out)?.starts_with(b"\x7fELF"), || "not an ELF".into())?;
    let (code, ..) = usage(&["workload", "--emit", "no-such-workload", "--out", &out])?;
    ensure(code == Some(2), || format!("status {code:?}"))
}

/// Every field of `status`, with its type; `guest` says whether there is a VM with a workload.
fn has_status_fields(status: &Value, guest: bool) -> Outcome {
    let fields = status.as_object().ok_or("not an object")?;
    for name in ["state", "epoch", "pid", "cpus", "memory_bytes", "backing", "tracker", "migration", "workload"] {
        ensure(fields.contains_key(name), || format!("`{name}` is missing in {status}"))?;
    }
    let mut good = status["state"].is_string() && status["epoch"].is_u64() && status["pid"].is_u64();
    if guest {
        let workload = &status["workload"];
        good &= ["cpus", "memory_bytes"].iter().all(|name| status[name].is_u64());
        good &= ["backing", "tracker"].iter().all(|name| status[name].is_string());
        good &= ["heartbeats", "operations", "errors"].iter().all(|name| workload[name].is_u64());
        good &= workload["longest_gap_us"].is_f64();
        let latency = &workload["access_latency_us"];
        good &= latency.is_null() || latency["count"].is_u64();
        good &=
            ["p50", "p90", "p99", "p999", "max"].iter().all(|name| latency[name].is_null() || latency[name].is_f64());
    } else {
        good &= ["cpus", "memory_bytes", "backing", "tracker", "workload"].iter().all(|name| status[name].is_null());
    }
    ensure(good, || format!("a field of another type in {status}"))
}

fn status(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "hot:size=32M", &["--cpus", "2", "--backing", "memfd"])?;
    let status = source.status()?;
    has_status_fields(&status, true)?;
    ensure(status["state"] == "running" && status["migration"].is_null(), || format!("{status}"))?;
    ensure(status["pid"] == source.pid() && status["epoch"] == 0, || format!("{status}"))?;
    ensure(status["cpus"] == 2 && status["memory_bytes"] == 64 << 20, || format!("{status}"))?;
    ensure(status["backing"] == "memfd", || format!("{status}"))?;

    source.ask(&["pause"])?;
    ensure(source.status()?["state"] == "paused", || "not paused".into())?;
    source.ask(&["resume"])?;

    let destination = lab.receive("destination", &[])?;
    let status = destination.status()?;
    has_status_fields(&status, false)?;
    ensure(status["state"] == "incoming", || format!("{status}"))?;

    let client = source.start_migrate(&destination.address, &["--bandwidth", "50Mbit"])?;
    let status = source.wait_until("it moves", |s| s["state"] == "outgoing" && s["migration"].is_object())?;
    has_status_fields(&status, true)?;
    ensure(destination.status()?["state"] == "incoming", || "the destination is not incoming".into())?;
    let answer = source.ctl(&["adopt"])?;
    let why = answer.json["error"].as_str().unwrap_or("");
    ensure(answer.code == Some(1) && !why.is_empty(), || format!("adopt: {answer:?}"))?;
    let second = source.migrate(&destination.address, &[])?;
    ensure(second.code == Some(1), || format!("a second migration at a time: {second:?}"))?;
    source.ask(&["cancel"])?;
    ensure(client.answer()?.code == Some(3), || "not cancelled".into())?;
    let status = source.status()?;
    ensure(status["state"] == "running" && status["migration"]["outcome"] == "cancelled", || format!("{status}"))?;
    source.quit()?;
    destination.quit()
}

/// Every field of a migration's report, with its type.
fn has_report_fields(report: &Value, nullable: &[&str]) -> Outcome {
    let is = |name: &str, test: fn(&Value) -> bool| {
        let value = report.as_object().and_then(|fields| fields.get(name));
        let value = value.ok_or_else(|| format!("`{name}` is missing in {report}"))?;
        let good = if nullable.contains(&name) { value.is_null() } else { test(value) };
        ensure(good, || format!("`{name}` is of another type in {report}"))
    };
    for name in ["strategy", "outcome", "reason"] {
        is(name, Value::is_string)?;
    }
    for name in ["total_ms", "setup_ms", "downtime_ms", "predicted_downtime_ms"] {
        is(name, Value::is_f64)?;
    }
    for name in ["rounds", "streams", "wire_bytes", "ram_bytes", "state_bytes", "throttle_percent"] {
        is(name, Value::is_u64)?;
    }
    is("dirty_pages_per_second", Value::is_number)?;
    is("pages", Value::is_object)?;
    for name in ["total", "zero", "hole", "plain", "distinct"] {
        ensure(report["pages"][name].is_u64(), || format!("`pages.{name}` is missing in {report}"))?;
    }
    Ok(())
}

fn migrate_report(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=8M,data=16M", &[])?;
    let mut middle = lab.receive("middle", &[])?;
    let report = source.migrate_well(&middle.address, &[])?;
    has_report_fields(&report, &["reason"])?;
    ensure(report["strategy"] == "pre-copy" && report["streams"] == 2, || format!("{report}"))?;
    let number = |name: &str| report[name].as_u64().unwrap_or(0);
    let pages = |name: &str| report["pages"][name].as_u64().unwrap_or(0);
    ensure(number("ram_bytes") == 64 << 20 && pages("total") == 64 << 8, || format!("{report}"))?;
    ensure(pages("plain") * 4096 < number("wire_bytes"), || format!("{report}"))?;
    ensure(pages("distinct") <= pages("plain") + pages("zero"), || format!("{report}"))?;
    ensure(pages("distinct") + pages("hole") >= pages("total"), || format!("{report}"))?;
    ensure(number("rounds") >= 2 && number("state_bytes") > 0, || format!("{report}"))?;

    let last = lab.receive("last", &[])?;
    let report = middle.migrate_well(&last.address, &["--strategy", "stop-and-copy", "--streams", "1"])?;
    has_report_fields(&report, &["reason", "predicted_downtime_ms", "dirty_pages_per_second"])?;
    last.works()?;
    last.quit()
}

fn never_began(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "hot:size=8M", &[])?;
    let before = source.resources()?;
    let folder = lab.arg("no-such-listener");
    // a connection refused, a name that does not exist, a socket that is not there
    for to in ["tcp:127.0.0.1:1", "tcp:no-such-host.invalid:7", &format!("unix:{folder}")] {
        let answer = source.migrate(to, &[])?;
        ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{to}: {answer:?}"))?;
        ensure(!answer.reason().is_empty() && answer.json["downtime_ms"].is_null(), || format!("{to}: {answer:?}"))?;
        source.works()?;
    }
    source.is_back_at(&before)?;
    for idle in ["cancel", "adopt"] {
        let answer = source.ctl(&[idle])?;
        ensure(answer.code == Some(1), || format!("{idle}: {answer:?}"))?;
    }
    let nobody = lab.receive("nobody", &[])?;
    let answer = nobody.migrate("tcp:127.0.0.1:1", &[])?;
    let nulls = ["total_ms", "setup_ms", "downtime_ms", "predicted_downtime_ms", "rounds", "wire_bytes", "pages"];
    ensure(answer.code == Some(1) && nulls.iter().all(|name| answer.json[name].is_null()), || format!("{answer:?}"))?;
    source.quit()?;
    nobody.quit()
}

fn progress(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "touch:size=8M,data=16M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let answer = source.migrate(&destination.address, &["--progress", "--bandwidth", "400Mbit"])?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    ensure(answer.stdout.lines().count() == 1, || answer.stdout.clone())?;
    ensure_says(&answer.stderr, "round")?;
    source.ended_well()?;
    destination.quit()
}

fn pause_and_resume(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=16M", &[])?;
    ensure(source.ask(&["pause"])?["state"] == "paused", || "no answer to pause".into())?;
    let beats = |status: &Value| status["workload"]["heartbeats"].clone();
    let before = source.status()?;
    let destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    let after = destination.status()?;
    ensure(after["state"] == "paused" && beats(&after) == beats(&before), || format!("{before}, then {after}"))?;
    ensure(destination.ask(&["resume"])?["state"] == "running", || "no answer to resume".into())?;
    destination.works()?;
    // once more, with one that never ran
    let mut asleep = lab.run("asleep", &["--memory", "64M", "--workload", "hot:size=8M", "--paused"])?;
    ensure(asleep.status()?["state"] == "paused", || "it is not paused".into())?;
    let other = lab.receive("other", &[])?;
    asleep.migrate_well(&other.address, &[])?;
    ensure(other.status()?["state"] == "paused", || "it does not stay paused".into())?;
    other.ask(&["resume"])?;
    other.wait_until("the guest works", at_work)?;
    other.quit()?;
    destination.quit()
}

fn memory(lab: &Lab) -> Outcome {
    let vm = lab.workload("vm", "idle:data=8M", &[])?;
    let out = lab.arg("out");
    let decimal = layout::BOARD_ADDRESS.to_string();
    let hex = format!("{:#x}", layout::BOARD_ADDRESS);
    for (gpa, len) in [(decimal.as_str(), "8"), (hex.as_str(), "0x8")] {
        vm.ask(&["memory", "--gpa", gpa, "--len", len, "--out", &out])?;
        ensure(fs::read(&out)? == layout::BOARD_MAGIC.to_le_bytes(), || format!("not the board at {gpa}"))?;
    }
    for (gpa, len) in [("0x4000000", "1"), ("0", "0x4000001"), ("0xffffffffffffffff", "2")] {
        let answer = vm.ctl(&["memory", "--gpa", gpa, "--len", len, "--out", &out])?;
        ensure(answer.code == Some(1) && answer.json["error"].is_string(), || format!("{gpa} {len}: {answer:?}"))?;
    }
    let answer = vm.ctl(&["memory", "--gpa", "0", "--len", "1", "--out", "/no/such/folder/file"])?;
    ensure_says(answer.json["error"].as_str().unwrap_or(""), "/no/such/folder/file")?;
    vm.quit()
}

fn client_dies(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "touch:size=8M,data=24M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let client = source.start_migrate(&address, &["--bandwidth", "500Mbit", "--progress"])?;
    wait_for("it moves", || Ok((relay.relayed() > 1 << 20).then_some(())))?;
    client.kill();
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

fn defaults(lab: &Lab) -> Outcome {
    let vm = lab.run("vm", &["--workload", "idle:data=1M"])?;
    let status = vm.status()?;
    let good = status["memory_bytes"] == 1 << 30 && status["cpus"] == 1 && status["backing"] == "thp";
    ensure(good && status["tracker"] != "auto", || format!("{status}"))?;
    vm.quit()
}

/// `cancel` returns when everything is given back, at any point; a retry then succeeds.
fn cancel(lab: &Lab, tracker: &str) -> Outcome {
    let mut source = lab.workload("source", "hot:size=32M", &["--tracker", tracker])?;
    let destination = lab.receive("destination", &[])?;
    let (before, before_there) = (source.resources()?, destination.resources()?);
    // while pages move, and when the guest is throttled
    let moments: [fn(&Value) -> bool; 3] = [
        |s| s["state"] == "outgoing",
        |s| s["migration"]["wire_bytes"].as_u64() > Some(1 << 20),
        |s| s["migration"]["throttle_percent"].as_u64() > Some(0),
    ];
    for moment in moments {
        let client = wait_for("the destination is free", || {
            let mut client = source.start_migrate(&destination.address, &["--bandwidth", "200Mbit"])?;
            let reached = wait_for("the moment to cancel", || {
                let (ended, reached) = (client.has_ended()?, moment(&source.status()?));
                Ok((ended || reached).then_some(!ended))
            })?;
            Ok(reached.then_some(client))
        })?;
        let answer = source.ctl(&["cancel"])?;
        let threads = source.threads()?;
        let left: Vec<_> = threads.keys().filter(|n| n.starts_with("mig-") || *n == "throttle").collect();
        ensure(left.is_empty(), || format!("threads are left: {left:?}"))?;
        let client = client.answer()?;
        if client.reason().contains("another session is under way") {
            continue;
        }
        ensure(answer.code == Some(0) && answer.json["outcome"] == "cancelled", || format!("{answer:?}"))?;
        ensure(client.code == Some(3) && client.json["outcome"] == "cancelled", || format!("{client:?}"))?;
        has_report_fields(&client.json, &nulls_of(&client))?;
        source.works()?;
        source.is_back_at(&before)?;
        destination.wait_state("incoming")?;
        destination.is_back_at(&before_there)?;
    }
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// What does not apply to a migration that was cancelled early.
fn nulls_of(answer: &Answer) -> Vec<&'static str> {
    let may_be = ["downtime_ms", "predicted_downtime_ms", "dirty_pages_per_second"];
    may_be.into_iter().filter(|name| answer.json[name].is_null()).collect()
}

fn serial_is_appended_to(lab: &Lab) -> Outcome {
    let file = lab.path("serial");
    fs::write(&file, "before\n")?;
    let vm = lab.run(
        "vm",
        &["--memory", "64M", "--workload", "idle:data=1M,serial=1,every=5ms", "--serial", &lab.arg("serial")],
    )?;
    let text = wait_for("some lines", || {
        let text = fs::read_to_string(&file)?;
        Ok((text.lines().count() > 4).then_some(text))
    })?;
    ensure(text.starts_with("before\nready idle\nbeat 1\nbeat 2\n"), || text.clone())?;
    vm.quit()?;
    let (code, _, stderr) = usage(&["run", "--workload", "idle", "--serial", "/no/such/folder/file"])?;
    ensure(code == Some(1), || format!("status {code:?}"))?;
    ensure_says(&stderr, "/no/such/folder/file")
}

fn emitted_kernel(lab: &Lab) -> Outcome {
    let elf = lab.arg("guest.elf");
    let (code, ..) = usage(&["workload", "--emit", "random:size=8M", "--out", &elf, "--cpus", "2"])?;
    ensure(code == Some(0), || "no ELF".into())?;
    let options = ["--memory", "64M", "--cpus", "2", "--kernel", &elf, "--cmdline", "nothing in particular"];
    let mut source = lab.run("source", &options)?;
    source.wait_until("the guest works", at_work)?;
    let destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

fn kernel(lab: &Lab, name: &str, bytes: &[u8]) -> Result<String, Failed> {
    fs::write(lab.path(name), bytes)?;
    Ok(lab.arg(name))
}

fn triple_fault(lab: &Lab) -> Outcome {
    let file = kernel(lab, "triple-fault.elf", &elf::triple_fault())?;
    let mut vm = lab.run("vm", &["--memory", "64M", "--kernel", &file, "--paused"])?;
    let _ = vm.ctl(&["resume"]);
    let status = vm.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", vm.stderr()))?;
    ensure_says(&vm.stderr(), "triple fault on vCPU 0 at rip 0x200007")?;
    // the same after a move
    let mut source = lab.run("source", &["--memory", "64M", "--kernel", &file, "--paused"])?;
    let mut destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    let _ = destination.ctl(&["resume"]);
    let status = destination.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", destination.stderr()))?;
    ensure_says(&destination.stderr(), "triple fault")
}

fn halted_for_ever(lab: &Lab) -> Outcome {
    let file = kernel(lab, "halt.elf", &elf::halt_for_ever())?;
    let mut source = lab.run("source", &["--memory", "64M", "--kernel", &file])?;
    let status = source.status()?;
    ensure(status["state"] == "running" && status["workload"].is_null(), || format!("{status}"))?;
    let destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    ensure(destination.status()?["state"] == "running", || "it does not run".into())?;
    destination.ask(&["pause"])?;
    destination.ask(&["resume"])?;
    destination.quit()
}

fn wrong_kernels(lab: &Lab) -> Outcome {
    let wrong: [(&str, Vec<u8>, &str); 6] = [
        ("no-elf", b"#!/bin/sh\necho hello\n".repeat(50), "is no ELF64"),
        ("empty", Vec::new(), "is no ELF64"),
        ("no-note", elf::without_note(), "has no PVH entry note"),
        ("truncated-headers", elf::truncated_headers(), "is no ELF64 that can be loaded"),
        ("truncated-code", elf::truncated_code(), "is no ELF64 that can be loaded"),
        ("outside-ram", elf::outside_ram(), "is no ELF64 that can be loaded into 67108864 bytes"),
    ];
    for (name, bytes, words) in wrong {
        let file = kernel(lab, name, &bytes)?;
        let (code, stdout, stderr) = usage(&["run", "--memory", "64M", "--kernel", &file])?;
        ensure(code == Some(1) && stdout.is_empty(), || format!("{name}: status {code:?}, {stdout:?} {stderr:?}"))?;
        ensure_says(&stderr, &format!("{file} {words}"))?;
    }
    let (code, _, stderr) = usage(&["run", "--memory", "64M", "--kernel", "/no/such/file"])?;
    ensure(code == Some(1), || format!("status {code:?}"))?;
    ensure_says(&stderr, "/no/such/file")?;
    let long = "x".repeat(5000);
    let file = kernel(lab, "halt.elf", &elf::halt_for_ever())?;
    let (code, _, stderr) = usage(&["run", "--memory", "64M", "--kernel", &file, "--cmdline", &long])?;
    ensure(code == Some(1), || format!("status {code:?}"))?;
    ensure_says(&stderr, "command line")
}
