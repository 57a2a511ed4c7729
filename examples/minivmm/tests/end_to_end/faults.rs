//! Links that break, processes that die, peers that talk nonsense. Whatever happens, the VM has
//! exactly one owner.

use std::{
    io::Write,
    net::{Shutdown, SocketAddr, TcpStream},
    sync::OnceLock,
    thread,
    time::Duration,
};

use libtest_mimic::Failed;
use migration_core::wire::{Control, Header};
use migration_transport::Relay;
use serde_json::Value;

use crate::common::{Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, wait_for};

const RUNNING_SEEDS: u64 = 12;
const PAUSED_SEEDS: u64 = 8;

pub(crate) fn add(suite: &mut Suite) {
    for seed in 0..RUNNING_SEEDS {
        suite.kvm(format!("faults/cut_while_the_guest_runs/{seed}"), move |lab| cut_running(lab, seed));
    }
    for seed in 0..PAUSED_SEEDS {
        suite.kvm(format!("faults/cut_near_the_end/{seed}"), move |lab| cut_near_the_end(lab, seed));
    }
    suite.kvm("faults/destination_dies", destination_dies);
    suite.kvm("faults/source_dies_when_ready", source_dies);
    suite.kvm("faults/in_doubt", in_doubt);
    suite.kvm("faults/garbage", garbage);
    suite.kvm("faults/no_huge_pages", no_huge_pages);
    suite.kvm("faults/too_much_memory", too_much_memory);
    suite.kvm("faults/disk_full", disk_full);
}

pub(crate) fn relay_to(process: &Process) -> Result<(Relay, String), Failed> {
    let target: SocketAddr = process.address.trim_start_matches("tcp:").parse()?;
    let relay = Relay::new(target)?;
    let address = relay.address().to_string();
    Ok((relay, address))
}

/// Pseudo-random: the same in every run.
pub(crate) fn random(seed: u64) -> u64 {
    let word = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 7
}

/// Waits for a moment between nothing and `most`: it is what is tried.
pub(crate) fn a_while(seed: u64, most: Duration) {
    thread::sleep(most.mul_f64((random(seed) % 60_000) as f64 / 60_000.0));
}

const RUNNING_GUEST: &str = "random:size=8M";
/// Without huge pages, which are there or not as the host's memory is: the same pages are touched
/// each time.
const PAUSED_GUEST: [&str; 7] = ["--memory", "64M", "--workload", "hot:size=8M", "--paused", "--backing", "anon"];
/// One stream, one round: every byte is in its place.
const IN_ORDER: [&str; 4] = ["--strategy", "stop-and-copy", "--streams", "1"];

/// Bytes of a whole migration of the guest that runs, more or less.
fn bytes_while_running(lab: &Lab) -> Result<u64, Failed> {
    static BYTES: OnceLock<u64> = OnceLock::new();
    measured(&BYTES, lab, || lab.workload("measured-source", RUNNING_GUEST, &[]), &[])
}

/// Bytes of a whole migration of the guest that is paused: always the same, but for pings. Only a
/// migration that stood still for a second sends one.
fn bytes_while_paused(lab: &Lab) -> Result<u64, Failed> {
    static BYTES: OnceLock<u64> = OnceLock::new();
    measured(&BYTES, lab, || lab.run("measured-source", &PAUSED_GUEST), &IN_ORDER)
}

/// Measures once.
fn measured(
    bytes: &OnceLock<u64>,
    lab: &Lab,
    source: impl FnOnce() -> Result<Process, Failed>,
    options: &[&str],
) -> Result<u64, Failed> {
    if let Some(bytes) = bytes.get() {
        return Ok(*bytes);
    }
    let mut source = source()?;
    let destination = lab.receive("measured-destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    source.migrate_well(&address, options)?;
    // the last frame has arrived when nobody receives any more
    wait_for("the session's end", || Ok((!destination.threads()?.contains_key("receive")).then_some(())))?;
    let relayed = relay.relayed();
    destination.quit()?;
    Ok(*bytes.get_or_init(|| relayed))
}

/// Bytes of the frames after *ready*: *run*, *running*, *done*.
pub(crate) fn last_frames() -> [u64; 3] {
    [Control::Run, Control::Running, Control::Done].map(|frame| frame.encode(0, 0, 1).len() as u64)
}

fn cut_running(lab: &Lab, seed: u64) -> Outcome {
    let cut = random(seed) % bytes_while_running(lab)?;
    let source = lab.workload("source", RUNNING_GUEST, &[])?;
    cut_at(lab, source, cut, &[])
}

fn cut_near_the_end(lab: &Lab, seed: u64) -> Outcome {
    let tail: u64 = last_frames().iter().sum();
    // from the middle of *ready* to the very last byte
    let cut = bytes_while_paused(lab)? - 1 - random(seed) % (tail + 10);
    let source = lab.run("source", &PAUSED_GUEST)?;
    cut_at(lab, source, cut, &IN_ORDER)
}

/// Cuts all links after so many bytes, mends the network, and sees who has the VM.
fn cut_at(lab: &Lab, mut source: Process, cut: u64, options: &[&str]) -> Outcome {
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let state = source.status()?["state"].clone();
    relay.cut_after(cut);
    let mut client = source.start_migrate(&address, options)?;
    wait_for("the migration ends", || {
        if relay.relayed() >= cut {
            // a source in doubt needs the network to come back
            relay.restore();
        }
        Ok(client.has_ended()?.then_some(()))
    })?;
    let answer = client.answer()?;
    match answer.json["outcome"].as_str() {
        Some("completed") => ensure(answer.code == Some(0), || format!("{answer:?}"))?,
        Some("failed") => {
            ensure(answer.code == Some(1) && !answer.reason().is_empty(), || format!("{answer:?}"))?;
            ensure(source.status()?["state"] == state, || "the source does not have it back".into())?;
            let there = destination.status()?["state"].clone();
            ensure(there == "incoming" || there == "ready", || format!("two owners: the destination is {there}"))?;
            if state == "running" {
                source.works()?;
            }
            source.retry_well(&destination.address, options)?;
        }
        _ => return Err(format!("cut after {cut}: {answer:?}").into()),
    }
    source.ended_well()?;
    ensure(destination.status()?["state"] == state, || format!("the destination is not {state}"))?;
    destination.ctl(&["resume"])?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    destination.quit()
}

fn destination_dies(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=32M", &["--cpus", "2"])?;
    let before = source.resources()?;
    let mut doomed = lab.receive("doomed", &[])?;
    let client = source.start_migrate(&doomed.address, &["--bandwidth", "50Mbit"])?;
    source.wait_until("it moves", |s| s["migration"]["wire_bytes"].as_u64() > Some(1 << 20))?;
    doomed.kill()?;
    let answer = client.answer()?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure(!answer.reason().is_empty(), || format!("{answer:?}"))?;
    source.works()?;
    source.is_back_at(&before)?;
    let destination = lab.receive("destination", &[])?;
    source.migrate_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// A pair with a dead link: *ready* has arrived at the source, its *run* not at the destination.
struct Separated {
    source: Process,
    destination: Process,
    relay: Relay,
    client: crate::common::Client,
}

fn separated(lab: &Lab) -> Result<Separated, Failed> {
    let source = lab.run("source", &PAUSED_GUEST)?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.cut_where(|bytes| middle_of(&Control::Run, bytes));
    let client = source.start_migrate(&address, &IN_ORDER)?;
    destination.wait_state("ready")?;
    source.wait_state("in-doubt")?;
    Ok(Separated { source, destination, relay, client })
}

/// The middle of a frame like this one, if these bytes hold one.
pub(crate) fn middle_of(frame: &Control, bytes: &[u8]) -> Option<usize> {
    let frame = frame.encode(0, 0, 1);
    let header = |bytes: &[u8]| Header::decode(bytes.try_into().ok()?).ok();
    let is_one = |bytes: &[u8]| header(bytes).is_some_and(|header| header.kind == frame[0]);
    let start = bytes.windows(Header::LEN).position(is_one)?;
    Some(start + frame.len() / 2)
}

fn source_dies(lab: &Lab) -> Outcome {
    let Separated { mut source, destination, relay, client } = separated(lab)?;
    source.kill()?;
    client.kill();
    drop(relay);
    let adopted = destination.adopt()?;
    // the source's epoch is void; the VM was paused, and stays so
    ensure(adopted["epoch"] == 2 && adopted["state"] == "paused", || format!("{adopted}"))?;
    destination.wait_state("paused")?;
    destination.ask(&["resume"])?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    let answer = destination.ctl(&["adopt"])?;
    ensure(answer.code == Some(1), || format!("adopted twice: {answer:?}"))?;
    destination.quit()
}

fn in_doubt(lab: &Lab) -> Outcome {
    let Separated { mut source, destination, relay, client } = separated(lab)?;
    let answer = client.answer()?;
    ensure(answer.code == Some(4) && answer.json["outcome"] == "in-doubt", || format!("{answer:?}"))?;
    ensure(!answer.reason().is_empty(), || format!("{answer:?}"))?;
    source.wait_state("in-doubt")?;
    for late in ["cancel", "resume", "pause"] {
        let answer = source.ctl(&[late])?;
        ensure(answer.code == Some(1), || format!("{late} in doubt: {answer:?}"))?;
    }
    ensure(destination.status()?["state"] == "ready", || "the destination is not ready".into())?;
    relay.restore();
    source.ended_well()?;
    destination.wait_state("paused")?;
    destination.ask(&["resume"])?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    destination.quit()
}

fn garbage(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    let mut destination = lab.receive("destination", &[])?;
    let target: SocketAddr = destination.address.trim_start_matches("tcp:").parse()?;
    // what a real source says first
    let opening = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let client = source.start_migrate(&format!("tcp:{}", listener.local_addr()?), &[])?;
        let (mut stream, _) = listener.accept()?;
        let mut bytes = vec![0; 256];
        std::io::Read::read_exact(&mut stream, &mut bytes)?;
        drop(stream);
        let answer = client.answer()?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        bytes
    };
    let silent = TcpStream::connect(target)?;
    let mut half = TcpStream::connect(target)?;
    half.write_all(&opening[..7])?;
    for seed in 0..40u64 {
        let mut stream = TcpStream::connect(target)?;
        let noise: Vec<u8> = (0..1 + random(seed) % 4096).map(|n| random(seed << 13 | n) as u8).collect();
        let bytes = match seed % 4 {
            // noise; noise after a good beginning; a beginning with a wrong bit; a beginning that
            // ends
            0 => noise,
            1 => [&opening[..40], &noise].concat(),
            2 => {
                let mut bytes = opening.clone();
                bytes[(random(seed) % 200) as usize] ^= 1 << (seed % 8);
                bytes
            }
            _ => opening[..(random(seed) % 256) as usize].to_vec(),
        };
        // the listener may hang up before it has read everything
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
    }
    let status = destination.status()?;
    ensure(status["state"] == "incoming", || format!("{status}"))?;
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    drop((silent, half));
    wait_for("bad peers are reported", || Ok((!destination.stderr().is_empty()).then_some(())))?;
    ensure(!destination.stderr().contains("panic"), || destination.stderr())?;
    // the listener is closed, the VM can move on
    let last = lab.receive("last", &[])?;
    destination.migrate_well(&last.address, &[])?;
    last.works()?;
    last.quit()
}

/// The destination refuses: its reason arrives, the guest runs on.
fn is_refused(source: &Process, destination: &Process, words: &str) -> Outcome {
    let before = source.status()?["state"].clone();
    let answer = source.migrate(&destination.address, &[])?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), words)?;
    let is = |state: &Value, status: Value| ensure(status["state"] == *state, || format!("{status}"));
    is(&before, source.status()?)?;
    is(&Value::from("incoming"), destination.status()?)
}

fn no_huge_pages(lab: &Lab) -> Outcome {
    // more than any test reserves
    let mut source = lab.run("source", &["--memory", "8G", "--workload", "random:size=8M"])?;
    source.wait_until("the guest works", at_work)?;
    let destination = lab.receive("destination", &["--backing", "hugetlb"])?;
    let before = source.resources()?;
    is_refused(&source, &destination, "huge pages of 2 MiB needed")?;
    source.works()?;
    source.is_back_at(&before)?;
    let other = lab.receive("other", &["--backing", "thp"])?;
    source.migrate_well(&other.address, &[])?;
    other.works()?;
    destination.quit()?;
    other.quit()
}

fn too_much_memory(lab: &Lab) -> Outcome {
    let source = lab.run("source", &["--memory", "128M", "--workload", "idle:data=1M", "--paused"])?;
    let destination = lab.receive("destination", &["--max-memory", "96M"])?;
    is_refused(&source, &destination, "this destination takes")?;
    // and it takes another
    let mut other = lab.workload("other", "random:size=8M", &[])?;
    other.retry_well(&destination.address, &[])?;
    destination.works()?;
    source.quit()?;
    destination.quit()
}

/// /dev/full is a disk without room.
fn disk_full(lab: &Lab) -> Outcome {
    let spec = "hot:size=8M,serial=1,every=5ms";
    let mut source = lab.workload("source", spec, &["--serial", "/dev/full"])?;
    let full = |status: &Value| status["warnings"].to_string().contains("/dev/full");
    source.wait_until("the warning", full)?;
    source.works()?;
    let mut middle = lab.receive("middle", &["--serial", "/dev/full"])?;
    source.migrate_well(&middle.address, &[])?;
    middle.wait_until("the warning", full)?;
    middle.works()?;
    let last = lab.receive("last", &["--serial", &lab.arg("serial")])?;
    middle.migrate_well(&last.address, &[])?;
    wait_for("a line", || Ok(std::fs::read_to_string(lab.path("serial"))?.contains("beat").then_some(())))?;
    let status = last.status()?;
    ensure(status["warnings"] == serde_json::json!([]), || format!("{status}"))?;
    last.works()?;
    last.quit()
}
