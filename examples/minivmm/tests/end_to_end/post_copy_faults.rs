//! Post-copy over links that break, and with peers that die: no page is lost, and the VM has one
//! owner.

use libtest_mimic::Failed;
use migration_transport::{Bandwidth, Relay};

use crate::{
    common::{Client, Lab, Outcome, Process, Suite, at_work, ensure, wait_for},
    faults::{last_frames, random, relay_to},
    post_copy::{faulted, number, post_copy_at},
};

/// Cuts before the hand-over, and after it: a third of those once more. A trial takes about half a
/// second.
const EARLY_SEEDS: u64 = 8;
const LATE_SEEDS: u64 = 200;
const BACKINGS: [&str; 4] = ["anon", "thp", "memfd", "hugetlb"];

const GUEST: &str = "random:size=16M";
/// Bytes before the hand-over: about 12 KiB of state a CPU, and the list of missing pages.
const EARLY: u64 = 8 << 10;
/// More bytes than that, and fewer than the pages of the guest take.
const LATE: std::ops::Range<u64> = 256 << 10..14 << 20;

pub(crate) fn add(suite: &mut Suite) {
    for seed in 0..EARLY_SEEDS {
        suite.post_copy(format!("post_copy/faults/cut_before_the_hand_over/{seed}"), "anon", move |lab| {
            cut_before(lab, seed)
        });
    }
    for seed in 0..LATE_SEEDS {
        let backing = BACKINGS[(seed % 4) as usize];
        suite.post_copy(format!("post_copy/faults/cut_in_post_copy/{backing}/{seed}"), backing, move |lab| {
            cut_after(lab, seed, backing)
        });
    }
    suite.post_copy("post_copy/faults/cut_around_the_hand_over", "anon", cut_around);
    suite.post_copy("post_copy/faults/status_while_the_link_is_cut", "anon", status_while_cut);
    for policy in ["run", "pause"] {
        suite.post_copy(format!("post_copy/faults/without_a_link/{policy}"), "anon", move |lab| {
            without_a_link(lab, policy)
        });
    }
    suite.post_copy("post_copy/faults/destination_dies", "anon", destination_dies);
    suite.post_copy("post_copy/faults/source_dies", "anon", source_dies);
}

fn guest(lab: &Lab, cpus: &str, backing: &str) -> Result<Process, Failed> {
    lab.workload("source", GUEST, &["--cpus", cpus, "--backing", backing])
}

/// Waits for the end of the migration, and mends the network when it is cut.
fn mended(relay: &Relay, cut: u64, client: &mut Client) -> Outcome {
    wait_for("the migration ends", || {
        if relay.relayed() >= cut {
            relay.restore();
        }
        Ok(client.has_ended()?.then_some(()))
    })
}

fn cut_before(lab: &Lab, seed: u64) -> Outcome {
    let mut source = guest(lab, "2", "anon")?;
    let before = source.resources()?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let cut = random(seed) % EARLY;
    relay.cut_after(cut);
    let options = post_copy_at("300Mbit");
    let mut client = source.start_migrate(&address, &options)?;
    mended(&relay, cut, &mut client)?;
    let answer = client.answer()?;
    let told = || format!("cut after {cut}: {answer:?}");
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed" && !answer.reason().is_empty(), told)?;
    source.works()?;
    source.is_back_at(&before)?;
    let there = destination.status()?["state"].clone();
    ensure(there == "incoming" || there == "ready", || format!("two owners: the destination is {there}"))?;
    let report = source.retry_well(&destination.address, &options)?;
    faulted(&report)?;
    destination.works()?;
    destination.quit()
}

fn cut_after(lab: &Lab, seed: u64, backing: &str) -> Outcome {
    let mut source = guest(lab, ["1", "4"][(seed / 4 % 2) as usize], backing)?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let mut cuts = vec![LATE.start + random(seed) % (LATE.end - LATE.start)];
    if seed.is_multiple_of(3) {
        // once more, among what is left; the beginnings of a few new connections are a few hundred
        // bytes
        cuts[0] = LATE.start + random(seed) % (LATE.end - LATE.start) / 2;
        cuts.push(random(seed + 100) % ((LATE.end - cuts[0]) / 2));
    }
    relay.cut_after(cuts[0]);
    let lanes = ["1", "2"][(seed / 8 % 2) as usize];
    let mut options = vec!["--strategy", "post-copy", "--bandwidth", "300Mbit", "--demand-lanes", lanes];
    if seed.is_multiple_of(5) {
        options.push("--checksum");
    }
    if seed / 16 % 2 == 1 {
        options.extend(["--huge", "whole"]);
    }
    let mut client = source.start_migrate(&address, &options)?;
    wait_for("the link is cut", || Ok((relay.relayed() >= cuts[0]).then_some(())))?;
    // the VM runs there, and its control socket works
    let there = destination.status()?;
    ensure(there["state"] == "running", || format!("seed {seed}, cut after {cuts:?}: {there}"))?;
    ensure(!client.has_ended()?, || "the migration has ended without all pages".into())?;
    let end = match cuts.get(1) {
        Some(again) => {
            relay.restore();
            let end = relay.relayed() + again;
            relay.cut_after(*again);
            end
        }
        None => cuts[0],
    };
    mended(&relay, end, &mut client)?;
    let answer = client.answer()?;
    let report = &answer.json;
    let told = || format!("seed {seed}, cut after {cuts:?}: {answer:?}");
    ensure(answer.code == Some(0) && report["outcome"] == "completed", told)?;
    ensure(report["recoveries"].as_u64() >= Some(cuts.len() as u64), told)?;
    // what was under way when the link was cut was sent again
    let sent = ["entry", "pushed", "demanded"].iter().map(|kind| number(report, "pages", kind)).sum::<u64>();
    ensure(sent >= number(report, "pages", "distinct"), told)?;
    source.ended_well()?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    // every page of the work area, read once more by the guest
    let operations = |status: &serde_json::Value| status["workload"]["operations"].as_u64().unwrap_or(0);
    let before = operations(&destination.status()?);
    destination.wait_until("another pass", |s| operations(s) > before + 2 * (16 << 8))?;
    destination.works()?;
    destination.quit()
}

/// A guest that does not run: each byte up to the hand-over is the same each time, but for pings.
const STILL: [&str; 7] = ["--memory", "64M", "--workload", "hot:size=8M", "--paused", "--backing", "anon"];
const IN_ORDER: [&str; 6] = ["--strategy", "post-copy", "--streams", "1", "--demand-lanes", "1"];

/// What came of a migration whose link was cut after so many bytes.
#[derive(Debug, PartialEq)]
enum End {
    /// The source has it back.
    AtTheSource,
    /// It is at the destination; and how many recoveries that took.
    Moved(u64),
}

/// A pair that lives on until its VM has moved.
struct Pair<'a> {
    lab: &'a Lab,
    count: u32,
    ends: Option<(Process, Process)>,
}

impl Pair<'_> {
    fn cut(&mut self, cut: u64) -> Result<End, Failed> {
        let (mut source, destination) = match self.ends.take() {
            Some(ends) => ends,
            None => {
                self.count += 1;
                let name = |end: &str| format!("{end}-{}", self.count);
                (self.lab.run(&name("source"), &STILL)?, self.lab.receive(&name("destination"), &[])?)
            }
        };
        let answer = wait_for("the destination is free", || {
            let (relay, address) = relay_to(&destination)?;
            relay.cut_after(cut);
            let mut client = source.start_migrate(&address, &IN_ORDER)?;
            mended(&relay, cut, &mut client)?;
            let answer = client.answer()?;
            Ok((!answer.reason().contains("another session is under way")).then_some(answer))
        })?;
        let told = || format!("cut after {cut}: {answer:?}");
        if answer.json["outcome"] == "failed" {
            ensure(source.status()?["state"] == "paused", told)?;
            self.ends = Some((source, destination));
            return Ok(End::AtTheSource);
        }
        ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", told)?;
        source.ended_well()?;
        destination.wait_state("paused")?;
        destination.ask(&["resume"])?;
        destination.wait_until("the guest works", at_work)?;
        destination.works()?;
        destination.quit()?;
        let recoveries = answer.json["recoveries"].as_u64().ok_or("no recoveries")?;
        Ok(End::Moved(recoveries))
    }
}

/// Finds the byte at which the source gives the VM away, and cuts at all places around it.
fn cut_around(lab: &Lab) -> Outcome {
    let mut pair = Pair { lab, count: 0, ends: None };
    let (mut kept, mut given) = (0, 64 << 10);
    ensure(matches!(pair.cut(given)?, End::Moved(_)), || format!("the hand-over needs more than {given} bytes"))?;
    while given - kept > 1 {
        let middle = kept.midpoint(given);
        match pair.cut(middle)? {
            End::AtTheSource => kept = middle,
            End::Moved(_) => given = middle,
        }
    }
    let [run, running, _] = last_frames();
    for after in [0, 1, run / 2, run - 1, run, run + 1, run + running - 1, run + running] {
        // a migration that stood still for a second has sent a ping too: its hand-over comes some
        // bytes later, and a cut before it is no cut at this place. Were the VM there as well, the
        // next one would be refused
        let ends = (0..5).map(|_| pair.cut(given + after)).find(|end| !matches!(end, Ok(End::AtTheSource)));
        let end = ends.unwrap_or(Ok(End::AtTheSource))?;
        ensure(matches!(end, End::Moved(1..)), || format!("{after} bytes after the hand-over: {end:?}"))?;
    }
    Ok(())
}

/// A VM that runs at the destination, and whose other pages are at a source that cannot be reached.
struct Separated {
    source: Process,
    destination: Process,
    relay: Relay,
    client: Client,
}

fn separated(lab: &Lab) -> Result<Separated, Failed> {
    let source = guest(lab, "4", "anon")?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    let cut = 2 << 20;
    relay.cut_after(cut);
    let client = source.start_migrate(&address, &post_copy_at("300Mbit"))?;
    wait_for("the link is cut", || Ok((relay.relayed() >= cut).then_some(())))?;
    destination.wait_state("running")?;
    Ok(Separated { source, destination, relay, client })
}

fn status_while_cut(lab: &Lab) -> Outcome {
    let Separated { mut source, destination, relay, client } = separated(lab)?;
    // the CPUs wait for pages that do not come: they can be stopped all the same
    for (command, state) in [("pause", "paused"), ("resume", "running"), ("pause", "paused")] {
        let answer = destination.start_ctl(&[command])?.answer()?;
        ensure(answer.code == Some(0), || format!("{command}: {answer:?}"))?;
        ensure(destination.status()?["state"] == state, || format!("not {state} after {command}"))?;
    }
    // in doubt or not, it is not the source's
    let answer = client.answer()?;
    ensure(answer.code == Some(4) && answer.json["outcome"] == "in-doubt", || format!("{answer:?}"))?;
    ensure(answer.reason().contains("pages"), || format!("{answer:?}"))?;
    source.wait_state("in-doubt")?;
    for late in ["cancel", "resume", "pause"] {
        let answer = source.ctl(&[late])?;
        ensure(answer.code == Some(1), || format!("{late} in doubt: {answer:?}"))?;
    }
    ensure(destination.status()?["state"] == "paused", || "not paused any more".into())?;
    // no doubt any more, though it takes its time
    relay.set_bandwidth(Bandwidth::from_bits_per_second(20_000_000));
    relay.restore();
    source.wait_state("outgoing")?;
    relay.set_bandwidth(Bandwidth::UNLIMITED);
    source.ended_well()?;
    let status = destination.status()?;
    ensure(status["state"] == "paused" && status["workload"]["errors"] == 0, || format!("{status}"))?;
    destination.ask(&["resume"])?;
    destination.works()?;
    destination.quit()
}

/// A guest that has what it works on runs without its source, unless it shall not.
fn without_a_link(lab: &Lab, policy: &str) -> Outcome {
    let mut source = lab.workload("source", "hot:size=1M,data=32M", &["--backing", "anon"])?;
    let destination = lab.receive("destination", &["--on-link-loss", policy])?;
    let (relay, address) = relay_to(&destination)?;
    relay.cut_after(8 << 20);
    let client = source.start_migrate(&address, &post_copy_at("100Mbit"))?;
    wait_for("the link is cut", || Ok((relay.relayed() >= 8 << 20).then_some(())))?;
    destination.says("link to")?;
    let beats = || Ok::<_, Failed>(destination.status()?["workload"]["heartbeats"].as_u64().unwrap_or(0));
    // so many looks in a row that find it moving, or standing
    let (mut looks, mut last) = (0, beats()?);
    wait_for(&format!("the guest does what {policy} says"), || {
        let now = beats()?;
        looks = if (now != last) == (policy == "run") { looks + 1 } else { 0 };
        last = now;
        Ok((looks >= 5).then_some(()))
    })?;
    relay.restore();
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["recoveries"].as_u64() >= Some(1), || format!("{answer:?}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

fn destination_dies(lab: &Lab) -> Outcome {
    let mut source = guest(lab, "2", "anon")?;
    let mut destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &post_copy_at("50Mbit"))?;
    destination.wait_state("running")?;
    destination.kill()?;
    let beats = source.status()?["workload"]["heartbeats"].clone();
    let answer = client.answer()?;
    ensure(answer.code == Some(4) && answer.json["outcome"] == "in-doubt", || format!("{answer:?}"))?;
    ensure(!answer.reason().is_empty(), || format!("{answer:?}"))?;
    source.wait_state("in-doubt")?;
    for late in ["cancel", "resume", "pause", "post-copy", "adopt"] {
        let answer = source.ctl(&[late])?;
        ensure(answer.code == Some(1), || format!("{late} in doubt: {answer:?}"))?;
    }
    let answer = source.migrate("tcp:127.0.0.1:1", &[])?;
    ensure(answer.code == Some(1), || format!("a VM in doubt moves: {answer:?}"))?;
    let status = source.status()?;
    ensure(status["state"] == "in-doubt", || format!("{status}"))?;
    ensure(status["workload"]["heartbeats"] == beats, || format!("the guest runs at the source: {beats}, {status}"))?;
    let answer = source.ask(&["quit"])?;
    ensure(answer["state"] == "ended", || format!("{answer}"))?;
    source.ended_well()
}

fn source_dies(lab: &Lab) -> Outcome {
    let Separated { mut source, destination, relay, client } = separated(lab)?;
    relay.restore();
    source.kill()?;
    client.kill();
    drop(relay);
    // its CPUs come to rest one by one; who asks is answered, now and later
    let beats = |status: &serde_json::Value| status["workload"]["heartbeats"].clone();
    let mut last = destination.status()?;
    destination.wait_until("its CPUs wait for pages", |status| {
        let same = beats(status) == beats(&last);
        last = status.clone();
        same
    })?;
    let status = destination.status()?;
    ensure(status["state"] == "running" && status["cpus"] == 4, || format!("{status}"))?;
    let answer = destination.ctl(&["adopt"])?;
    ensure(answer.code == Some(1), || format!("adopted without its pages: {answer:?}"))?;
    destination.quit()
}
