//! A guest that writes faster than the network carries.

use std::time::Duration;

use crate::{
    common::{Lab, Outcome, Suite, ensure, ensure_says},
    faults::relay_to,
};

/// 32 MiB, all of it written many times a second, where 500 Mbit/s take half a second for it.
const GUEST: &str = "hot:size=32M";
const LINK: [&str; 2] = ["--bandwidth", "500Mbit"];
/// What the link carries in a second.
const LINK_BYTES: f64 = 500e6 / 8.0;

/// Writes all of 32 MiB within half a second as well, but computes so much between two pages that
/// it cannot with a hundredth of its time. (`hot` can: a fast machine writes the area within 5 ms.)
const COMPUTING_GUEST: &str = "quicksort:size=32M";

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("convergence/throttled_and_moved", throttled_and_moved);
    suite.kvm("convergence/slow_answers_at_first", slow_answers_at_first);
    suite.kvm("convergence/cancelled_at_the_timeout", cancelled);
    suite.kvm("convergence/stopped_at_the_timeout", stopped);
    suite.kvm("convergence/a_limit_below_all_costs", below_all_costs);
    suite.kvm("convergence/a_link_that_is_too_long", too_long);
    suite.kvm("convergence/without_a_timeout", without_a_timeout);
    suite.kvm("convergence/a_small_guest_is_not_throttled", small);
}

fn throttled_and_moved(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", COMPUTING_GUEST, &[])?;
    let destination = lab.receive("destination", &[])?;
    let report = source.migrate_well(&destination.address, &LINK)?;
    // on a busy host it may write less than the link carries, and then there is nothing to throttle
    let written = report["dirty_pages_per_second"].as_f64().unwrap_or(f64::MAX) * 4096.0;
    let throttled = report["throttle_percent"].as_u64() > Some(0);
    ensure(throttled || written < LINK_BYTES, || format!("not throttled: {report}"))?;
    // decided within the limit; how long it took in the end, this machine decides
    ensure(report["predicted_downtime_ms"].as_f64() <= Some(300.0), || format!("above the limit: {report}"))?;
    destination.works()?;
    destination.quit()
}

/// Two round trips of a second fit into no downtime of 300 ms. If they become short while the first
/// round is under way, which takes two of them, the migration comes to its end.
fn slow_answers_at_first(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.set_delay(Duration::from_secs(1));
    let client = source.start_migrate(&address, &[])?;
    source.wait_until("a round", |s| s["migration"]["round"].as_u64() >= Some(1))?;
    relay.set_delay(Duration::ZERO);
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A limit for the downtime that is not to be had, and little time to find that out.
fn hopeless(limit: &str) -> [&str; 6] {
    ["--guest-impact", "low", "--downtime-limit", limit, "--timeout", "2s"]
}

fn cancelled(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", GUEST, &[])?;
    let destination = lab.receive("destination", &[])?;
    let before = source.resources()?;
    let answer = source.migrate(&destination.address, &[&LINK[..], &hopeless("20ms")].concat())?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "not converged in time")?;
    ensure_says(answer.reason(), "of the 20 ms allowed")?;
    source.works()?;
    source.is_back_at(&before)?;
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

fn stopped(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", GUEST, &[])?;
    let destination = lab.receive("destination", &[])?;
    // less than the state alone takes, however little a guest writes that gets no core
    let options = [&LINK[..], &hopeless("100us"), &["--on-timeout", "stop"]].concat();
    let report = source.migrate_well(&destination.address, &options)?;
    ensure(report["downtime_ms"].as_f64() > Some(0.1), || format!("within a limit that is impossible: {report}"))?;
    // not the guest's doing
    ensure(report["throttle_percent"] == 0, || format!("throttled for nothing: {report}"))?;
    ensure_says(report["stalled"].as_str().unwrap_or(""), "a downtime of 0.1 ms cannot be kept")?;
    destination.works()?;
    destination.quit()
}

/// Nothing is dirty, and a switch-over still takes longer than is allowed: said at once, with the
/// figures.
fn below_all_costs(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "idle:data=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let before = source.resources()?;
    let answer = source.migrate(&destination.address, &["--downtime-limit", "100us"])?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "a downtime of 0.1 ms cannot be kept")?;
    ensure_says(answer.reason(), "to pause, save and load")?;
    let few = answer.json["rounds"].as_u64() <= Some(5) && answer.json["throttle_percent"] == 0;
    ensure(few, || format!("it was tried again and again: {answer:?}"))?;
    source.works()?;
    source.is_back_at(&before)?;
    let choice = ["--downtime-limit", "100us", "--on-timeout", "post-copy"];
    let report = source.migrate_well(&destination.address, &choice)?;
    ensure(report["rounds"].as_u64() <= Some(5), || format!("{report}"))?;
    ensure_says(report["stalled"].as_str().unwrap_or(""), "of 0.1 ms cannot be kept")?;
    destination.works()?;
    destination.quit()
}

/// Two round trips of 400 ms do not fit into 300 ms, and nobody set a time-out.
fn too_long(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "idle:data=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.set_delay(Duration::from_millis(200));
    let answer = source.migrate(&address, &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "a downtime of 300 ms cannot be kept")?;
    ensure_says(answer.reason(), "for two round trips")?;
    ensure(answer.json["rounds"].as_u64() <= Some(8), || format!("{answer:?}"))?;
    relay.set_delay(Duration::ZERO);
    source.works()?;
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// The guest writes all of its memory faster than it is sent, even at the strongest throttle, and
/// nobody set a time-out.
fn without_a_timeout(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", GUEST, &[])?;
    let destination = lab.receive("destination", &[])?;
    let before = source.resources()?;
    let options = [&LINK[..], &["--guest-impact", "low", "--downtime-limit", "20ms"]].concat();
    let answer = source.migrate(&destination.address, &options)?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "not converging")?;
    ensure_says(answer.reason(), "of the 20 ms allowed")?;
    ensure(answer.json["throttle_percent"] == 80, || format!("{answer:?}"))?;
    source.works()?;
    source.is_back_at(&before)?;
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// What a guest of 1 MiB dirties is little against the limit: it is not slowed down for it.
fn small(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=1M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let report = source.migrate_well(&destination.address, &["--bandwidth", "1Gbit"])?;
    ensure(report["throttle_percent"] == 0, || format!("throttled: {report}"))?;
    ensure(report["predicted_downtime_ms"].as_f64() <= Some(300.0), || format!("above the limit: {report}"))?;
    destination.works()?;
    destination.quit()
}
