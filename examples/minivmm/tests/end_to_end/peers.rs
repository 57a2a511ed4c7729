//! Peers that are silent, slow, or strangers: nobody's VM stands still for them, and nobody is kept
//! out.

use std::{
    io::Write,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use libtest_mimic::Failed;
use migration_core::wire::Control;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    common::{Lab, Outcome, Process, Suite, ensure, ensure_says, wait_for},
    faults::{middle_of, relay_to},
};

pub(crate) fn add(suite: &mut Suite) {
    for (name, strategy) in [("pre_copy", "pre-copy"), ("stop_and_copy", "stop-and-copy"), ("post_copy", "post-copy")] {
        suite.kvm(format!("peers/stopped_in_the_pause/{name}"), move |lab| stopped_in_the_pause(lab, strategy));
    }
    suite.kvm("peers/past_strangers/plain", |lab| past_strangers(lab, &[]));
    suite.kvm("peers/past_strangers/encrypted", |lab| {
        past_strangers(lab, &["--encrypt", "aes128-gcm", "--psk-file", &lab.key("key")?])
    });
    suite.kvm("peers/in_doubt_past_strangers", in_doubt_past_strangers);
    suite.kvm("peers/more_memory_than_allowed", more_memory_than_allowed);
}

/// Connections to a destination that say nothing, or one byte.
fn strangers(to: &Process, count: usize, says: &[u8]) -> Result<Vec<TcpStream>, Failed> {
    let target: SocketAddr = to.address.trim_start_matches("tcp:").parse()?;
    let connect = |_| {
        let mut stream = TcpStream::connect(target)?;
        // one that gave way to a later one is closed
        let _ = stream.write_all(says);
        Ok(stream)
    };
    (0..count).map(connect).collect()
}

fn past_strangers(lab: &Lab, options: &[&str]) -> Outcome {
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    let destination = lab.receive("destination", options)?;
    let held = [strangers(&destination, 110, b"")?, strangers(&destination, 110, b"L")?];
    source.migrate_well(&destination.address, &[options, &["--streams", "8"]].concat())?;
    destination.works()?;
    drop(held);
    destination.quit()
}

/// The link is cut at *run*; when it is back, strangers hold all places that they can have.
fn in_doubt_past_strangers(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.cut_where(|bytes| middle_of(&Control::Run, bytes));
    let client = source.start_migrate(&address, &[])?;
    source.wait_state("in-doubt")?;
    let held = strangers(&destination, 192, b"L")?;
    relay.restore();
    source.ended_well()?;
    drop(client);
    destination.wait_state("running")?;
    destination.works()?;
    drop(held);
    destination.quit()
}

fn more_memory_than_allowed(lab: &Lab) -> Outcome {
    let mut source = lab.run("source", &["--memory", "64M", "--workload", "random:size=8M"])?;
    let small = lab.receive("small", &["--max-memory", "32M"])?;
    let answer = source.migrate(&small.address, &[])?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "this destination takes 33554432")?;
    source.works()?;
    small.wait_state("incoming")?;
    let large = lab.receive("large", &["--max-memory", "64M"])?;
    source.migrate_well(&large.address, &[])?;
    large.works()?;
    large.quit()?;
    small.quit()
}

/// Waits until all threads of a process that was sent SIGSTOP have stopped: until then they go on.
pub(crate) fn all_stopped(pid: Pid) -> bool {
    let stopped = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // behind the name, which is in parentheses
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    let all = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        Ok(tasks.is_ok_and(|tasks| tasks.flatten().all(stopped)).then_some(()))
    };
    wait_for("the process has stopped", all).is_ok()
}

/// The destination is stopped when the offer comes, with the guest paused. The guest runs on at the
/// source; a destination that wakes later has nothing.
fn stopped_in_the_pause(lab: &Lab, strategy: &str) -> Outcome {
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let pid = Pid::from_raw(i32::try_from(destination.pid())?);
    let stopped = Arc::new(AtomicBool::new(false));
    let at = stopped.clone();
    relay.cut_where(move |bytes| {
        let offer = Control::Offer { generation: 0, state_bytes: 0, running: true };
        if middle_of(&offer, bytes).is_some() && kill(pid, Signal::SIGSTOP).is_ok() {
            at.store(all_stopped(pid), Ordering::SeqCst);
        }
        None
    });
    let before = source.resources()?;
    let answer = source.migrate(&address, &["--strategy", strategy, "--pause-limit", "1s"])?;
    ensure(stopped.load(Ordering::SeqCst), || "there was no offer".into())?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "the guest was paused for")?;
    ensure_says(answer.reason(), "was silent for 1s")?;
    source.works()?;
    source.is_back_at(&before)?;
    destination.signal(Signal::SIGCONT)?;
    // what it had received meanwhile ends with the source's word that it keeps the VM
    destination.wait_state("incoming")?;
    source.works()?;
    drop(relay);
    source.retry_well(&destination.address, &["--strategy", strategy])?;
    destination.works()?;
    destination.quit()
}
