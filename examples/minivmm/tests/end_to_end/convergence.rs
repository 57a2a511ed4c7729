//! A guest that writes faster than the network carries.

use std::time::Duration;

use crate::{
    common::{Lab, Outcome, Suite, ensure, ensure_says},
    faults::relay_to,
};

/// 32 MiB, all of it written many times a second, where 500 Mbit/s take half a second for it.
const GUEST: &str = "hot:size=32M";
const LINK: [&str; 2] = ["--bandwidth", "500Mbit"];

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("convergence/throttled_and_moved", throttled_and_moved);
    suite.kvm("convergence/slow_answers_at_first", slow_answers_at_first);
    suite.kvm("convergence/cancelled_at_the_timeout", cancelled);
    suite.kvm("convergence/stopped_at_the_timeout", stopped);
}

fn throttled_and_moved(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", GUEST, &[])?;
    let destination = lab.receive("destination", &[])?;
    let report = source.migrate_well(&destination.address, &LINK)?;
    ensure(report["throttle_percent"].as_u64() > Some(0), || format!("not throttled: {report}"))?;
    // decided within the limit; how long it took in the end, this machine decides
    ensure(report["predicted_downtime_ms"].as_f64() <= Some(300.0), || format!("above the limit: {report}"))?;
    destination.works()?;
    destination.quit()
}

/// Round trips of 400 ms fit into no downtime of 300 ms. Once they are short, the migration comes to its end.
fn slow_answers_at_first(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=8M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.set_delay(Duration::from_millis(200));
    let client = source.start_migrate(&address, &[])?;
    source.wait_until("a second round", |s| s["migration"]["round"].as_u64() >= Some(2))?;
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
    let answer = source.migrate(&destination.address, &[&LINK[..], &hopeless("1ms")].concat())?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "not converged in time")?;
    ensure_says(answer.reason(), "of the 1 ms allowed")?;
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
    destination.works()?;
    destination.quit()
}
