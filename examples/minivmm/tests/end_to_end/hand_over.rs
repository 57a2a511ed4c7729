//! Hand-over between processes of one machine: RAM stays where it is.

use std::{fs, os::unix::net::UnixListener, time::Duration};

use libtest_mimic::Failed;

use super::faults::a_while;
use crate::common::{Client, Lab, Outcome, Process, Suite, at_work, beats_in_order, ensure, ensure_says, wait_for};

pub(crate) const HAND_OVER: [&str; 2] = ["--strategy", "handover"];
/// Workloads that find a page which is not what it was.
const WORKLOADS: [&str; 4] = [
    "random:size=24M,data=8M",
    "hot:size=8M,data=24M",
    "quicksort:size=16M,segment=64K,data=8M",
    "kv:percent=60,step=100ms,data=8M",
];
const KILLS: u64 = 38;
/// The whole time that a hand-over takes here.
const WHOLE: Duration = Duration::from_millis(60);
/// Processes that have the VM one after the other.
const CHAIN: u64 = 100;

pub(crate) fn add(suite: &mut Suite) {
    for backing in ["memfd", "hugetlb"] {
        for cpus in ["1", "4"] {
            for spec in WORKLOADS {
                let name = spec.split(':').next().unwrap_or(spec);
                let run = move |lab: &Lab| every_page_is_right(lab, spec, backing, cpus);
                let name = format!("hand_over/{backing}/{cpus}/{name}");
                suite.kvm_backed(name, backing, run);
            }
            let run = move |lab: &Lab| chain(lab, backing, cpus);
            suite.kvm_backed(format!("hand_over/chain/{backing}/{cpus}"), backing, run);
        }
    }
    suite.kvm("hand_over/paused", paused);
    suite.kvm("hand_over/across_the_hole_below_4_gib", across_the_hole);
    suite.kvm("hand_over/refused", refused);
    suite.kvm("hand_over/two_successors", two_successors);
    suite.kvm("hand_over/encrypted", encrypted);
    suite.kvm("hand_over/then_away", then_away);
    suite.kvm("hand_over/real_time_in_the_pause_only", real_time_in_the_pause_only);
    suite.kvm("hand_over/beside_kernel_work", beside_kernel_work);
    for seed in 0..KILLS {
        suite.kvm(format!("hand_over/successor_dies/{seed}"), move |lab| successor_dies(lab, seed));
        suite.kvm(format!("hand_over/predecessor_dies/{seed}"), move |lab| predecessor_dies(lab, seed));
    }
    suite.anywhere("hand_over/software_guest", software_guest);
}

pub(crate) fn successor(lab: &Lab, name: &str, args: &[&str]) -> Result<Process, Failed> {
    lab.receive_at(name, &format!("unix:{}", lab.arg(&format!("{name}.migration"))), args)
}

fn every_page_is_right(lab: &Lab, spec: &str, backing: &str, cpus: &str) -> Outcome {
    let options = ["--cpus", cpus, "--backing", backing];
    let mut at = lab.workload("vmm-0", &format!("{spec},for=2s"), &options)?;
    for n in 1..=3 {
        let next = successor(lab, &format!("vmm-{n}"), &[])?;
        let report = at.migrate_well(&next.address, &HAND_OVER)?;
        ensure(report["memory_copied_bytes"] == 0 && report["state_bytes"].as_u64() > Some(0), || format!("{report}"))?;
        ensure(report["prepare_ms"].is_number() && report["downtime_ms"].is_number(), || format!("{report}"))?;
        at = next;
    }
    let status = at.wait_until("the guest has checked everything", |s| s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0 && status["workload"]["first_error"].is_null(), || format!("{status}"))?;
    ensure(status["workload"]["cpus_online"].as_u64() == cpus.parse().ok(), || format!("{status}"))?;
    ensure(status["backing"] == backing, || format!("{status}"))?;
    at.quit()
}

/// From process to process; one file takes the serial output of all.
fn chain(lab: &Lab, backing: &str, cpus: &str) -> Outcome {
    let serial = ["--serial", &lab.arg("serial")];
    let options = [&["--backing", backing, "--cpus", cpus][..], &serial].concat();
    let mut at = lab.workload("vmm-0", "hot:size=8M,data=16M,serial=1,every=10ms", &options)?;
    for epoch in 1..=CHAIN {
        let next = successor(lab, &format!("vmm-{epoch}"), &serial)?;
        let report = at.migrate_well(&next.address, &HAND_OVER)?;
        ensure(report["epoch"] == epoch && report["memory_copied_bytes"] == 0, || format!("{report}"))?;
        at = next;
    }
    at.works()?;
    at.ask(&["pause"])?;
    let text = fs::read_to_string(lab.path("serial"))?;
    at.quit()?;
    let beats = beats_in_order(&text, "ready hot")?;
    ensure(beats > CHAIN, || format!("only {} lines", beats))
}

fn paused(lab: &Lab) -> Outcome {
    let options = ["--memory", "64M", "--workload", "hot:size=8M", "--paused", "--backing", "memfd"];
    let mut source = lab.run("source", &options)?;
    let before = source.memory(lab, 0, 64 << 20)?;
    let destination = successor(lab, "destination", &[])?;
    source.migrate_well(&destination.address, &HAND_OVER)?;
    ensure(destination.status()?["state"] == "paused", || "it does not stay paused".into())?;
    ensure(destination.memory(lab, 0, 64 << 20)? == before, || "RAM has changed".into())?;
    destination.ask(&["resume"])?;
    destination.wait_until("the guest works", at_work)?;
    destination.quit()
}

/// Two memory files.
fn across_the_hole(lab: &Lab) -> Outcome {
    let options = ["--memory", "5G", "--workload", "touch:size=8M", "--backing", "memfd"];
    let mut source = lab.run("source", &options)?;
    source.wait_until("the guest works", at_work)?;
    let destination = successor(lab, "destination", &[])?;
    source.migrate_well(&destination.address, &HAND_OVER)?;
    destination.works()?;
    // holes took no memory
    let out = std::process::Command::new("ps").args(["-o", "rss=", "-p", &destination.pid().to_string()]).output()?;
    let kib: u64 = String::from_utf8(out.stdout)?.trim().parse()?;
    ensure(kib < 512 << 10, || format!("{kib} KiB are resident"))?;
    destination.quit()
}

fn refused(lab: &Lab) -> Outcome {
    let destination = successor(lab, "destination", &[])?;
    let tcp = lab.receive("tcp", &[])?;
    let other = successor(lab, "other", &["--backing", "anon"])?;
    for backing in ["thp", "anon"] {
        let source = lab.workload(backing, "hot:size=8M", &["--backing", backing])?;
        let answer = source.migrate(&destination.address, &HAND_OVER)?;
        ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
        ensure(answer.json["downtime_ms"].is_null(), || format!("it was paused: {answer:?}"))?;
        ensure_says(answer.reason(), "--backing memfd or --backing hugetlb")?;
        source.works()?;
        source.quit()?;
    }
    let mut source = lab.workload("source", "hot:size=8M", &["--backing", "memfd"])?;
    let before = source.resources()?;
    let nobody = format!("unix:{}", lab.arg("nobody"));
    for (to, words) in [
        (&tcp.address, "Unix socket (unix:PATH)"),
        (&nobody, "cannot connect"),
        (&other.address, "--backing anon rules it out"),
    ] {
        let answer = source.migrate(to, &HAND_OVER)?;
        ensure(answer.code == Some(1) && answer.json["downtime_ms"].is_null(), || format!("{answer:?}"))?;
        ensure_says(answer.reason(), words)?;
        source.works()?;
        source.is_back_at(&before)?;
    }
    let protected = [&HAND_OVER[..], &["--fail-safe", "reverse"]].concat();
    let answer = source.migrate(&destination.address, &protected)?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "checkpoints")?;
    source.retry_well(&destination.address, &HAND_OVER)?;
    destination.works()?;
    tcp.quit()?;
    other.quit()?;
    destination.quit()
}

/// One that says nothing, and then another one: the VM goes to one at a time.
fn two_successors(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=8M", &["--backing", "memfd"])?;
    let silent = UnixListener::bind(lab.path("silent"))?;
    let first = source.start_migrate(&format!("unix:{}", lab.arg("silent")), &HAND_OVER)?;
    let (connection, _) = silent.accept()?;
    let other = successor(lab, "other", &[])?;
    let second = source.migrate(&other.address, &HAND_OVER)?;
    ensure(second.code == Some(1), || format!("{second:?}"))?;
    ensure_says(second.reason(), "a handover migration to")?;
    ensure_says(second.reason(), "has been under way")?;
    ensure(other.status()?["state"] == "incoming", || "the other one has something".into())?;
    drop((connection, silent));
    let first = first.answer()?;
    ensure(first.code == Some(1) && first.json["downtime_ms"].is_null(), || format!("{first:?}"))?;
    source.works()?;
    source.migrate_well(&other.address, &HAND_OVER)?;
    other.works()?;
    other.quit()
}

/// Open files travel over no secure channel: refused before the guest is paused, whichever side
/// encrypts.
fn encrypted(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    let secure = ["--encrypt", "aes256-gcm", "--psk-file", &key];
    let mut source = lab.workload("source", "hot:size=8M", &["--backing", "memfd"])?;
    let before = source.resources()?;
    let closed = successor(lab, "closed", &secure)?;
    for (options, words) in [
        ([&HAND_OVER[..], &secure].concat(), "no encrypted channel can carry"),
        (HAND_OVER.to_vec(), "takes only encrypted migrations"),
    ] {
        let answer = source.migrate(&closed.address, &options)?;
        ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
        ensure(answer.json["downtime_ms"].is_null(), || format!("it was paused: {answer:?}"))?;
        ensure_says(answer.reason(), words)?;
        source.works()?;
        source.is_back_at(&before)?;
    }
    closed.quit()?;
    let open = successor(lab, "open", &[])?;
    source.migrate_well(&open.address, &HAND_OVER)?;
    open.works()?;
    open.quit()
}

/// A VM that was handed over migrates like any other, and its dirty pages are seen.
fn then_away(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M,data=8M,for=3s", &["--backing", "memfd"])?;
    let mut middle = successor(lab, "middle", &[])?;
    source.migrate_well(&middle.address, &HAND_OVER)?;
    let last = lab.receive("last", &[])?;
    let report = middle.migrate_well(&last.address, &[])?;
    ensure(report["memory_copied_bytes"].as_u64() >= Some(8 << 20), || format!("{report}"))?;
    let status = last.wait_until("the guest has checked everything", |s| s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    last.quit()
}

/// Policies under which a thread goes before all others, whatever it does: `SCHED_FIFO`,
/// `SCHED_RR`, `SCHED_DEADLINE`.
const REAL_TIME: [i64; 3] = [1, 2, 6];

fn no_real_time_thread(process: &Process) -> Outcome {
    let threads = process.scheduling()?;
    let urgent = threads.iter().find(|thread| REAL_TIME.contains(&thread.policy));
    ensure(urgent.is_none(), || format!("{urgent:?} among {threads:?}"))
}

/// Before the pause and after it no thread is a real-time one: such a thread is not moved away from
/// a core that another process holds in the kernel. After a hand-over that failed, all threads are
/// as they were.
fn real_time_in_the_pause_only(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=8M", &["--backing", "memfd", "--cpus", "2"])?;
    let before = source.resources().and_then(|_| source.scheduling())?;
    let is_back = |source: &Process| {
        let mut now = Vec::new();
        let back = wait_for("threads are as they were", || {
            now = source.scheduling()?;
            Ok((now == before).then_some(()))
        });
        back.map_err(|_| Failed::from(format!("{before:?} have become {now:?}")))
    };
    // it fails while the successor builds the VM
    let other = successor(lab, "other", &["--backing", "anon"])?;
    ensure(source.migrate(&other.address, &HAND_OVER)?.code == Some(1), || "it is not refused".into())?;
    is_back(&source)?;
    no_real_time_thread(&other)?;
    other.quit()?;
    // it waits for a successor that says nothing
    let silent = UnixListener::bind(lab.path("silent"))?;
    let client = source.start_migrate(&format!("unix:{}", lab.arg("silent")), &HAND_OVER)?;
    let connection = silent.accept()?;
    wait_for("the control lane is read", || Ok(source.threads()?.contains_key("mig-control").then_some(())))?;
    (0..10).try_for_each(|_| no_real_time_thread(&source))?;
    drop((connection, silent));
    ensure(client.answer()?.code == Some(1), || "nobody took it".into())?;
    is_back(&source)?;
    let destination = successor(lab, "destination", &[])?;
    source.migrate_well(&destination.address, &HAND_OVER)?;
    destination.works()?;
    no_real_time_thread(&destination)?;
    destination.quit()
}

/// Another process holds a core in the kernel, for a while each time: hand-overs come to their end
/// all the same. Its memory slot takes 300 MiB of the kernel's memory, and no RAM.
fn beside_kernel_work(lab: &Lab) -> Outcome {
    let mut at = lab.workload("vmm-0", "hot:size=8M", &["--backing", "memfd", "--cpus", "2"])?;
    let mut work = Client::start_in(&std::env::temp_dir(), &["bench", "--occupy", "128G", "--for", "2s"])?;
    for n in 1.. {
        let next = successor(lab, &format!("vmm-{n}"), &[])?;
        at.migrate_well(&next.address, &HAND_OVER)?;
        next.works()?;
        at = next;
        if work.has_ended()? {
            break;
        }
    }
    work.succeeds()?;
    at.quit()
}

/// If it did not own the VM, that lives on where it was, and can be handed to another successor.
fn successor_dies(lab: &Lab, seed: u64) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--backing", "memfd"])?;
    let mut first = successor(lab, "first", &[])?;
    let client = source.start_migrate(&first.address, &HAND_OVER)?;
    a_while(seed, WHOLE);
    first.kill()?;
    // it had the VM, and took it along, or may have had it: the source says so, and never runs it
    // again
    let in_doubt = |source: &Process| -> Result<bool, Failed> { Ok(source.status()?["state"] == "in-doubt") };
    let outcome = wait_for("an end", || {
        let Ok(status) = source.status() else { return Ok(Some("completed")) };
        Ok(match status["state"].as_str() {
            Some("running") => Some("failed"),
            Some("in-doubt") => Some("in-doubt"),
            _ => None,
        })
    })?;
    match outcome {
        "failed" => {
            let answer = client.answer()?;
            ensure(answer.code == Some(1), || format!("{answer:?}"))?;
            source.works()?;
            no_real_time_thread(&source)?;
            let second = successor(lab, "second", &[])?;
            source.migrate_well(&second.address, &HAND_OVER)?;
            second.works()?;
            second.quit()
        }
        "in-doubt" => ensure(in_doubt(&source)?, || "it is in doubt no more".into()),
        _ => source.ended_well(),
    }
}

/// The VM is where its owner is, or was: the successor runs it, holds it until a person says that
/// the source is dead, or has nothing.
fn predecessor_dies(lab: &Lab, seed: u64) -> Outcome {
    let mut source = lab.workload("source", "random:size=24M", &["--backing", "memfd"])?;
    let destination = successor(lab, "destination", &[])?;
    let client = source.start_migrate(&destination.address, &HAND_OVER)?;
    a_while(seed.wrapping_add(1000), WHOLE);
    source.kill()?;
    drop(client);
    let state = wait_for("it is known what became of the VM", || {
        // in this order: it may become ready before its thread ends
        let receives = destination.threads()?.contains_key("mig-receive");
        let status = destination.status()?;
        Ok(match status["state"].as_str() {
            Some("running") => Some("running"),
            Some("ready") => Some("ready"),
            Some("incoming") if !receives => Some("incoming"),
            _ => None,
        })
    })?;
    match state {
        "running" => destination.works()?,
        "ready" => {
            destination.adopt()?;
            destination.works()?;
        }
        _ => {
            let answer = destination.ctl(&["adopt"])?;
            ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        }
    }
    destination.quit()
}

fn software_guest(lab: &Lab) -> Outcome {
    let options = ["--memory", "64M", "--cpus", "2", "--workload", "hot:size=8M", "--backing", "memfd"];
    let mut source = Process::software(lab, "source", "run", &options)?;
    source.wait_until("the guest works", at_work)?;
    let listen = format!("unix:{}", lab.arg("destination.migration"));
    let destination = Process::software(lab, "destination", "receive", &["--listen", &listen])?;
    source.migrate_well(&destination.address, &HAND_OVER)?;
    destination.works()?;
    destination.quit()
}
