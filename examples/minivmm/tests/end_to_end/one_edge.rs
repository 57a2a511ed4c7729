//! QEMU's migration test, on every tracker, number of streams, backing and number of CPUs.
//!
//! The guest increments the first word of each page in address order, over and over, so at any
//! instant each CPU's part has exactly one place where the value drops by one. A page that was
//! lost, or came late, makes another.

use crate::common::{Lab, Outcome, Suite, at_work, ensure, layout::PAGE_SIZE};

const TRACKERS: [&str; 4] = ["dirty-log", "manual-protect", "dirty-ring", "write-protect"];
const STREAMS: [&str; 3] = ["1", "2", "8"];
const BACKINGS: [&str; 4] = ["anon", "thp", "memfd", "hugetlb"];
const CPUS: [usize; 2] = [1, 4];

pub(crate) fn add(suite: &mut Suite) {
    for tracker in TRACKERS {
        for backing in BACKINGS {
            for streams in STREAMS {
                for cpus in CPUS {
                    let name = format!("one_edge/{tracker}/{backing}/{streams}_streams/{cpus}_cpus");
                    let run = move |lab: &Lab| one_edge(lab, tracker, backing, streams, cpus);
                    suite.kvm_backed(name, backing, run);
                }
            }
        }
    }
}

fn one_edge(lab: &Lab, tracker: &str, backing: &str, streams: &str, cpus: usize) -> Outcome {
    let cpus_text = cpus.to_string();
    let options = ["--cpus", &cpus_text, "--tracker", tracker, "--backing", backing];
    let mut source = lab.workload("source", "one-edge:size=24M", &options)?;
    let (start, len) = source.work_area(lab)?;
    let before = source.memory(lab, start, len)?;
    let destination = lab.receive("destination", &[])?;
    // a busy host may keep no shorter downtime
    let options = ["--streams", streams, "--downtime-limit", "10s"];
    let report = source.migrate_well(&destination.address, &options)?;
    ensure(report["streams"].as_u64() == streams.parse().ok(), || format!("{report}"))?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    let status = destination.status()?;
    ensure(status["backing"] == backing && status["cpus"] == cpus, || format!("{status}"))?;
    let used = status["tracker"].as_str().unwrap_or("");
    ensure(used.contains(tracker), || format!("tracker {used} where {tracker} was asked for"))?;

    destination.ask(&["pause"])?;
    let after = destination.memory(lab, start, len)?;
    destination.quit()?;
    only_edges(&before, &after, cpus)
}

/// Each CPU's part of the work area has at most one edge, and each page of it changed in its first
/// word only.
pub(crate) fn only_edges(before: &[u8], after: &[u8], cpus: usize) -> Outcome {
    let pages: Vec<&[u8]> = after.chunks(PAGE_SIZE as usize).collect();
    let cut = |n: usize| pages.len() * n / cpus;
    for cpu in 0..cpus {
        has_one_edge(&pages[cut(cpu)..cut(cpu + 1)]).map_err(|why| format!("CPU {cpu}: {why}"))?;
    }
    for (n, (before, after)) in before.chunks(PAGE_SIZE as usize).zip(pages).enumerate() {
        ensure(before[8..] == after[8..], || format!("page {n} changed beyond its first word"))?;
    }
    Ok(())
}

/// Read in a circle, as the guest writes, the pages' words drop by one (modulo a byte) in exactly
/// one place: where the guest is, or, if it has just finished a pass, nowhere.
fn has_one_edge(pages: &[&[u8]]) -> Result<(), String> {
    let word = |page: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| page[i]));
    let mut edges = Vec::new();
    for (n, pair) in pages.windows(2).enumerate() {
        let (left, right) = (word(pair[0]), word(pair[1]));
        if left > 0xff || right > 0xff {
            return Err(format!("page {n} or the next one holds more than a byte: {left:#x}, {right:#x}"));
        }
        if left != right {
            if left != (right + 1) & 0xff {
                return Err(format!("between pages {n} and {} the value goes from {left} to {right}", n + 1));
            }
            edges.push(n);
        }
    }
    if edges.len() <= 1 { Ok(()) } else { Err(format!("edges after pages {edges:?}")) }
}
