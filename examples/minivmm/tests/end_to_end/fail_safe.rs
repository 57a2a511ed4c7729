//! Fail-safe post-copy: whichever side dies, the VM lives on, whole, and what it has said stands
//! once in its serial file.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use libtest_mimic::Failed;
use migration_core::wire::{Control, FaultSummary};
use serde_json::Value;

use crate::{
    common::{Lab, Outcome, Process, Suite, at_work, ensure, wait_for},
    faults::{middle_of, random, relay_to},
    post_copy::{number, post_copy_at},
};

const GUEST: &str = "random:size=16M,serial=1,every=5ms";
const BACKINGS: [&str; 4] = ["anon", "thp", "memfd", "hugetlb"];
/// Killed destinations in one trial, one after the other.
const KILLS: u64 = 10;
/// Slow enough that pages are missing for a second or two.
const LINK: [&str; 4] = post_copy_at("100Mbit");
/// For a migration that a death ends: no page is the last one before that.
const SLOW_LINK: [&str; 4] = post_copy_at("20Mbit");
/// As slow as may be where each page is a huge one.
const SLOW_LINK_FOR_HUGE_PAGES: [&str; 4] = post_copy_at("50Mbit");

fn slow_link_for(backing: &str) -> &'static [&'static str] {
    if backing == "hugetlb" { &SLOW_LINK_FOR_HUGE_PAGES } else { &SLOW_LINK }
}

pub(crate) fn add(suite: &mut Suite) {
    for (seed, backing) in BACKINGS.into_iter().chain(["thp"]).enumerate() {
        let cpus = ["1", "4"][seed % 2];
        suite.post_copy(format!("fail_safe/destination_killed/{backing}/{cpus}_cpus/{seed}"), backing, move |lab| {
            destinations_die(lab, seed as u64, backing, cpus)
        });
    }
    for (seed, backing) in BACKINGS.into_iter().chain(["thp"]).enumerate() {
        let cpus = ["4", "1"][seed % 2];
        suite.post_copy(format!("fail_safe/source_killed/{backing}/{cpus}_cpus/{seed}"), backing, move |lab| {
            sources_die(lab, seed as u64, backing, cpus)
        });
    }
    for backing in ["memfd", "hugetlb"] {
        suite.post_copy(format!("fail_safe/sealed/destination_killed/{backing}"), backing, move |lab| {
            lab.key(SEAL_KEY)?;
            destinations_die(lab, 7, backing, "2")
        });
        suite.post_copy(format!("fail_safe/sealed/source_killed/{backing}"), backing, move |lab| {
            lab.key(SEAL_KEY)?;
            sources_die(lab, 7, backing, "2")
        });
    }
    suite.post_copy("fail_safe/sealed/replayed", "anon", replayed);
    suite.post_copy("fail_safe/sealed/another_key", "anon", another_seal_key);
    suite.post_copy("fail_safe/source_killed_early", "anon", source_dies_early);
    suite.post_copy("fail_safe/source_killed_when_nothing_is_missing", "anon", source_dies_at_the_end);
    suite.post_copy("fail_safe/source_killed_without_a_forward_checkpoint", "anon", source_dies_unprotected);
    for backing in BACKINGS {
        suite.post_copy(format!("fail_safe/nobody_dies/{backing}"), backing, move |lab| nobody_dies(lab, backing));
    }
    suite.post_copy("fail_safe/slow_link", "hugetlb", slow_link);
    suite.post_copy("fail_safe/link_lost_and_found", "anon", link_lost_and_found);
    suite.post_copy("fail_safe/link_lost_for_good", "anon", link_lost_for_good);
    suite.post_copy("fail_safe/refused_without_demand_lanes", "anon", refused);
}

/// A trial that has this key keeps its checkpoints on disk, sealed.
const SEAL_KEY: &str = "seal-key";

fn sealing(lab: &Lab, key: &str) -> Vec<String> {
    let sealed = lab.path(key).exists();
    if sealed { vec!["--seal-key-file".into(), lab.arg(key)] } else { Vec::new() }
}

/// Both ends write to one file, as they would on shared storage.
fn source(lab: &Lab, backing: &str, cpus: &str) -> Result<Process, Failed> {
    let (serial, sealing) = (lab.arg("serial"), sealing(lab, SEAL_KEY));
    let options = ["--cpus", cpus, "--backing", backing, "--serial", &serial];
    let sealing = sealing.iter().map(String::as_str);
    lab.workload("source", GUEST, &options.into_iter().chain(sealing).collect::<Vec<_>>())
}

fn destination(lab: &Lab, name: &str) -> Result<Process, Failed> {
    destination_with(lab, name, SEAL_KEY)
}

fn destination_with(lab: &Lab, name: &str, seal_key: &str) -> Result<Process, Failed> {
    fs::create_dir_all(lab.path("checkpoints"))?;
    let (serial, checkpoints, sealing) = (lab.arg("serial"), lab.arg("checkpoints"), sealing(lab, seal_key));
    let options = ["--serial", &serial, "--checkpoints", &checkpoints];
    lab.receive(name, &options.into_iter().chain(sealing.iter().map(String::as_str)).collect::<Vec<_>>())
}

fn with<'a>(options: &[&'a str], fail_safe: &'a str) -> Vec<&'a str> {
    options.iter().copied().chain(["--fail-safe", fail_safe]).collect()
}

/// Every line stands in the file once, in order; how many there are.
fn lines_in_order(lab: &Lab) -> Result<u64, Failed> {
    let text = fs::read_to_string(lab.path("serial"))?;
    // the last one may be on its way
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let beats: Vec<u64> = whole.lines().filter_map(|l| l.strip_prefix("beat ")?.parse().ok()).collect();
    let first = beats.first().copied().unwrap_or(0);
    let wrong = beats.iter().zip(first..).find(|(found, expected)| **found != *expected);
    ensure(wrong.is_none(), || format!("lines are lost or repeated: found {:?}", wrong.map(|(f, e)| (*f, e))))?;
    let others: Vec<&str> = whole.lines().filter(|l| !l.starts_with("beat ") && !l.starts_with("ready ")).collect();
    ensure(others.is_empty(), || format!("torn lines: {others:?}"))?;
    Ok(beats.len() as u64)
}

fn operations(status: &Value) -> u64 {
    status["workload"]["operations"].as_u64().unwrap_or(0)
}

/// Has the guest check all its pages once more, each several times on average, without an error.
pub(crate) fn checks_all(process: &Process) -> Outcome {
    let before = operations(&process.status()?);
    process.wait_until("another pass", |s| operations(s) > before + 2 * (16 << 8))?;
    process.works()
}

fn destinations_die(lab: &Lab, seed: u64, backing: &str, cpus: &str) -> Outcome {
    let mut source = source(lab, backing, cpus)?;
    let mut lines = 0;
    for kill in 0..KILLS {
        let mut there = destination(lab, &format!("destination-{kill}"))?;
        let interval = ["reverse:interval=5ms", "reverse:interval=30ms"][(kill % 2) as usize];
        let kept = if lab.path(SEAL_KEY).exists() { format!(",dir={}", lab.arg("checkpoints")) } else { String::new() };
        let client =
            source.start_migrate(&there.address, &with(slow_link_for(backing), &format!("{interval}{kept}")))?;
        // as many checkpoints as chance has it; few where each has whole huge pages, or all pages
        // would be there before
        let most = if backing == "hugetlb" { 3 } else { [4, 12][(kill % 2 == 0) as usize] };
        let wished = random(seed * 100 + kill) % most;
        let counted = |s: &Value| s["migration"]["checkpoints"]["count"].as_u64().unwrap_or(0);
        let state = wait_for("the VM is protected", || {
            let status = source.status()?;
            let reached = status["migration"]["phase"] == "serving" && counted(&status) >= wished;
            Ok(reached.then_some(status))
        })?;
        // the first checkpoint is the hand-over itself, and is not in the store
        if !kept.is_empty() && wished > 0 {
            let sealed = folders(lab, "reverse")?.iter().all(|folder| is_sealed(folder));
            ensure(sealed, || "a checkpoint in clear".into())?;
        }
        there.kill()?;
        let answer = client.answer()?;
        let told = || format!("killed after {wished} checkpoints ({state}): {answer:?}");
        ensure(answer.code == Some(6) && answer.json["outcome"] == "restarted", told)?;
        ensure(number(&answer.json, "checkpoints", "count") >= wished, told)?;
        ensure(answer.json["epoch"].as_u64() == Some(2 * kill + 2), told)?;
        source.wait_state("running")?;
        checks_all(&source)?;
        lines = source_goes_on(lab, lines)?;
    }
    // and it can move all the same
    let there = destination(lab, "last")?;
    source.migrate_well(&there.address, &with(&["--strategy", "post-copy"], "reverse:interval=5ms"))?;
    there.wait_until("the guest works", at_work)?;
    checks_all(&there)?;
    source_goes_on(lab, lines)?;
    there.quit()
}

/// Where checkpoints of this kind are kept.
fn folders(lab: &Lab, kind: &str) -> Result<Vec<PathBuf>, Failed> {
    let all = fs::read_dir(lab.path("checkpoints"))?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(all.into_iter().filter(|path| path.extension().is_some_and(|found| found == kind)).collect())
}

/// Whether a checkpoint was committed there, and is sealed: its state says so.
fn is_sealed(folder: &Path) -> bool {
    fs::read(folder.join("latest")).is_ok_and(|state| state.windows(8).any(|word| word == b"LMSEALED"))
}

/// An older checkpoint of the same VM, by the same key, is not taken for the one that is needed.
fn replayed(lab: &Lab) -> Outcome {
    lab.key(SEAL_KEY)?;
    let mut source = source(lab, "anon", "1")?;
    let there = destination(lab, "destination")?;
    let (relay, address) = relay_to(&there)?;
    let protected = format!("forward:detect=50ms,dir={}", lab.arg("checkpoints"));
    // the VM is offered, and its checkpoint stays until that is known to have arrived
    relay.cut_where(|bytes| middle_of(&Control::Run, bytes));
    let first = source.start_migrate(&address, &with(&["--strategy", "post-copy"], &protected))?;
    there.wait_state("ready")?;
    let found = wait_for("a checkpoint", || Ok(folders(lab, "forward")?.into_iter().find(|found| is_sealed(found))))?;
    let older = lab.path("older");
    fs::create_dir_all(&older)?;
    for entry in fs::read_dir(&found)? {
        let path = entry?.path();
        fs::copy(&path, older.join(path.file_name().ok_or("no name")?))?;
    }
    relay.restore();
    // in doubt, if that took long
    first.answer()?;
    source.ended_well()?;
    let next = destination(lab, "next")?;
    let client = there.start_migrate(&next.address, &with(&SLOW_LINK, &protected))?;
    wait_for("the VM runs there", || Ok((there.status()?["migration"]["phase"] == "serving").then_some(())))?;
    let newer = folders(lab, "forward")?.pop().ok_or("no forward checkpoint")?;
    fs::remove_dir_all(&newer)?;
    fs::rename(older, &newer)?;
    let mut there = there;
    there.kill()?;
    client.kill();
    let said = "its forward checkpoint is of another moment";
    next.says(said)?;
    next.quit()
}

/// One after the other: each destination is the next source.
fn sources_die(lab: &Lab, seed: u64, backing: &str, cpus: &str) -> Outcome {
    let mut here = source(lab, backing, cpus)?;
    let mut lines = 0;
    for kill in 0..KILLS {
        let there = destination(lab, &format!("destination-{kill}"))?;
        let kind = ["both:interval=5ms", "forward:detect=500ms"][(kill % 2) as usize];
        let protected = format!("{kind},dir={}", lab.arg("checkpoints"));
        let mut client = here.start_migrate(&there.address, &with(slow_link_for(backing), &protected))?;
        let most = if backing == "hugetlb" { 3 } else { 12 };
        let wished = if kill % 2 == 0 { random(seed * 100 + kill) % most } else { 0 };
        wait_for("the VM is protected", || {
            let migration = &here.status()?["migration"];
            ensure(!client.has_ended()?, || format!("it ended too soon: {migration}"))?;
            let count = migration["checkpoints"]["count"].as_u64().unwrap_or(0);
            Ok((migration["phase"] == "serving" && count >= wished).then_some(()))
        })?;
        here.kill()?;
        client.kill();
        there.wait_until("the guest works", at_work)?;
        checks_all(&there)?;
        lines = source_goes_on(lab, lines)?;
        // what it was saved by is not needed any more
        wait_for("the forward checkpoint is removed", || {
            let mut left = fs::read_dir(lab.path("checkpoints"))?.filter_map(|e| e.ok());
            Ok((!left.any(|e| e.file_name().to_string_lossy().ends_with("forward"))).then_some(()))
        })?;
        here = there;
    }
    let last = destination(lab, "last")?;
    here.migrate_well(&last.address, &[])?;
    checks_all(&last)?;
    last.quit()
}

/// Before the hand-over the VM goes with its owner; nobody pretends that it lives.
fn source_dies_early(lab: &Lab) -> Outcome {
    let mut source = source(lab, "anon", "1")?;
    let there = destination(lab, "destination")?;
    let protected = format!("both:dir={}", lab.arg("checkpoints"));
    // rounds that take some seconds
    let options = ["--strategy", "hybrid:rounds=3", "--bandwidth", "20Mbit"];
    let client = source.start_migrate(&there.address, &with(&options, &protected))?;
    wait_for("pages move", || Ok((source.status()?["migration"]["round_sent"].as_u64() > Some(100)).then_some(())))?;
    source.kill()?;
    client.kill();
    there.says("is discarded")?;
    ensure(there.status()?["state"] == "incoming", || "a VM without an owner".into())?;
    there.quit()
}

/// It dies before it has heard that every page has arrived: what it left for the VM is removed all
/// the same.
fn source_dies_at_the_end(lab: &Lab) -> Outcome {
    let mut source = source(lab, "anon", "1")?;
    let there = destination(lab, "destination")?;
    let (relay, address) = relay_to(&there)?;
    let all_there = Arc::new(AtomicBool::new(false));
    let said = all_there.clone();
    relay.cut_where(move |bytes| {
        let place = middle_of(&Control::Complete(FaultSummary::default()), bytes);
        said.fetch_or(place.is_some(), Ordering::Relaxed);
        place
    });
    let protected = format!("forward:detect=60s,dir={}", lab.arg("checkpoints"));
    let client = source.start_migrate(&address, &with(&["--strategy", "post-copy"], &protected))?;
    wait_for("the destination has the last page", || Ok(all_there.load(Ordering::Relaxed).then_some(())))?;
    source.kill()?;
    client.kill();
    wait_for("the forward checkpoint is removed", || Ok(folders(lab, "forward")?.is_empty().then_some(())))?;
    checks_all(&there)?;
    source_goes_on(lab, 0)?;
    there.quit()
}

/// With reverse checkpoints only, pages that the source had are lost with it: the guest waits, and
/// its output is held.
fn source_dies_unprotected(lab: &Lab) -> Outcome {
    let mut source = source(lab, "anon", "1")?;
    let there = destination(lab, "destination")?;
    let client = source.start_migrate(&there.address, &with(&SLOW_LINK, "reverse:interval=5ms,detect=50ms"))?;
    wait_for("the VM runs there", || Ok((source.status()?["migration"]["phase"] == "serving").then_some(())))?;
    source.kill()?;
    client.kill();
    let said = "the VM still depends on it: its forward checkpoint";
    there.says(said)?;
    lines_in_order(lab)?;
    let answer = there.migrate("tcp:127.0.0.1:1", &[])?;
    ensure(answer.reason().contains("missing"), || format!("{answer:?}"))?;
    there.quit()
}

/// What cannot be opened is no checkpoint: the guest waits, as without one.
fn another_seal_key(lab: &Lab) -> Outcome {
    lab.key(SEAL_KEY)?;
    lab.key("another-key")?;
    let mut source = source(lab, "anon", "1")?;
    let there = destination_with(lab, "destination", "another-key")?;
    let protected = format!("forward:detect=50ms,dir={}", lab.arg("checkpoints"));
    let client = source.start_migrate(&there.address, &with(&SLOW_LINK, &protected))?;
    wait_for("the VM runs there", || Ok((source.status()?["migration"]["phase"] == "serving").then_some(())))?;
    source.kill()?;
    client.kill();
    let said = "the VM still depends on it: its forward checkpoint";
    there.says(said)?;
    there.says("not what was sealed with this key")?;
    lines_in_order(lab)?;
    there.quit()
}

/// Waits until the guest has said more; how many lines it has said.
fn source_goes_on(lab: &Lab, before: u64) -> Result<u64, Failed> {
    wait_for("the guest says more", || Ok(Some(lines_in_order(lab)?).filter(|&lines| lines > before + 2)))
}

/// A huge page takes as long as nearly half of what counts as silence: nobody is taken for dead,
/// and a vCPU that is taken out of its wait for each checkpoint, and comes back to it, faults once.
fn slow_link(lab: &Lab) -> Outcome {
    let mut source = source(lab, "hugetlb", "2")?;
    let there = destination(lab, "destination")?;
    let report = source.migrate_well(&there.address, &with(&SLOW_LINK, "reverse:interval=10ms,detect=2s"))?;
    ensure(report["recoveries"] == 0, || format!("{report}"))?;
    // two vCPUs, and as many threads of KVM and of the VMM, for each huge page of 64 MiB, is far
    // more than there can be
    ensure(number(&report, "faults", "count") <= 4 * 32, || format!("{report}"))?;
    checks_all(&there)?;
    lines_in_order(lab)?;
    there.quit()
}

fn nobody_dies(lab: &Lab, backing: &str) -> Outcome {
    let mut source = source(lab, backing, "2")?;
    let there = destination(lab, "destination")?;
    let report = source.migrate_well(&there.address, &with(&LINK, "reverse:interval=10ms"))?;
    ensure(number(&report, "checkpoints", "count") > 1, || format!("{report}"))?;
    ensure(number(&report, "checkpoints", "bytes") > 1 << 20, || format!("{report}"))?;
    there.wait_until("the guest works", at_work)?;
    checks_all(&there)?;
    let lines = lines_in_order(lab)?;
    source_goes_on(lab, lines)?;
    // the protection has ended with the migration: the tracker is free for the next one
    let mut there = there;
    let next = destination(lab, "next")?;
    there.migrate_well(&next.address, &[])?;
    checks_all(&next)?;
    lines_in_order(lab)?;
    next.quit()
}

fn link_lost_and_found(lab: &Lab) -> Outcome {
    let mut source = source(lab, "anon", "2")?;
    let there = destination(lab, "destination")?;
    let (relay, address) = relay_to(&there)?;
    relay.cut_after(3 << 20);
    let client = source.start_migrate(&address, &with(&LINK, "reverse:interval=5ms,detect=60s"))?;
    wait_for("the link is cut", || Ok((relay.relayed() >= 3 << 20).then_some(())))?;
    relay.restore();
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["recoveries"].as_u64() >= Some(1), || format!("{answer:?}"))?;
    source.ended_well()?;
    checks_all(&there)?;
    let lines = lines_in_order(lab)?;
    source_goes_on(lab, lines)?;
    there.quit()
}

/// A cut that lasts is taken for a death, and made one.
fn link_lost_for_good(lab: &Lab) -> Outcome {
    let source = source(lab, "anon", "2")?;
    let mut there = destination(lab, "destination")?;
    let (relay, address) = relay_to(&there)?;
    relay.cut_after(3 << 20);
    let client = source.start_migrate(&address, &with(&LINK, "reverse:interval=5ms,detect=200ms"))?;
    let answer = client.answer()?;
    ensure(answer.code == Some(6) && answer.json["outcome"] == "restarted", || format!("{answer:?}"))?;
    ensure(!there.ended()?.success(), || "two owners: the destination lives".into())?;
    checks_all(&source)?;
    let lines = lines_in_order(lab)?;
    source_goes_on(lab, lines)?;
    source.quit()
}

fn refused(lab: &Lab) -> Outcome {
    let source = source(lab, "anon", "1")?;
    let there = destination(lab, "destination")?;
    let answer = source.migrate(&there.address, &["--demand-lanes", "0", "--fail-safe", "reverse"])?;
    ensure(answer.code == Some(1) && answer.reason().contains("checkpoints"), || format!("{answer:?}"))?;
    source.works()?;
    source.quit()
}
