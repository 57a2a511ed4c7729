//! Measures hand-overs while another process holds a core in a system call for seconds, alternating
//! with hand-overs on a quiet machine.
//!
//! A kernel without preemption (`PREEMPT_NONE`, as on many servers) runs no other thread on that
//! core during the call. A thread that was woken there waits until the call ends, unless the
//! scheduler moves it to another core.

use std::{slice, thread, time::Duration};

use indicatif::ProgressBar;
use minivmm_client::log;
use serde::Serialize;
use serde_json::json;

use super::{
    chain::{self, Chain},
    figures::Spread,
    plan::Guests,
    tables::three,
};
use crate::bench::{
    Bench, GIB,
    figures::Machine,
    measure::ms,
    output::{self, Table, machine},
    process::Folder,
    slots::Occupied,
    tell,
};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "kernel-work";
/// The number of hand-overs of each kind.
const ROUNDS: u32 = 10;
const QUICK: u32 = 3;
/// The size of the memory slot that the other process sets. The call took 8 s where this was
/// measured.
const SLOT: u64 = 1 << 40;
/// The time from the other process's announcement until it is certainly in the kernel.
const BEGINS: Duration = Duration::from_millis(200);
/// The time for which a guest that is not handed over is observed.
const WATCHED: Duration = Duration::from_secs(1);

/// The load of the machine beside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Kind {
    Quiet,
    Beside,
    StaysBeside,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Quiet, Self::Beside, Self::StaysBeside];

    fn name(self) -> &'static str {
        match self {
            Self::Quiet => "hand-over, quiet machine",
            Self::Beside => "hand-over beside kernel work",
            Self::StaysBeside => "stays where it is, beside kernel work",
        }
    }
}

/// The result of one observation.
#[derive(Debug, Serialize)]
struct Seen {
    kind: Kind,
    gap_ms: f64,
    /// The total of a hand-over that succeeded.
    total_ms: Option<f64>,
    /// The error of a hand-over that failed.
    failed: Option<String>,
}

/// Runs the measurement and prints the table. Returns whether all hand-overs succeeded.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    let (folder, bar) = (Folder::new()?, ProgressBar::hidden());
    let guests = Guests::idle(args.unit.min(GIB) / 4, 1);
    let mut seen = Vec::new();
    let mut chain = None;
    for _ in 0..args.repeat.unwrap_or(if args.quick { QUICK } else { ROUNDS }) {
        for kind in Kind::ALL {
            let mut here = match chain.take() {
                Some(chain) => chain,
                None => chain::start(&folder, &guests.options(), 1)?.pop().ok_or("no VM was started")?,
            };
            let once = look(&folder, &mut here, kind)?;
            tell(&bar, &format!("{}: gap {:.1} ms", kind.name(), once.gap_ms));
            if once.failed.is_none() {
                here.verify()?;
                chain = Some(here);
            }
            seen.push(once);
        }
    }
    let (table, here) = (table(&seen, &guests), machine(&Machine::here(None)));
    if args.json {
        out!("{}", json!({ "machine": here, "seen": seen }));
    } else {
        log::print(&format!("{here}\n\n{}", table.text()));
    }
    if let Some(path) = &args.markdown {
        let by = "_Written by `minivmm bench --handover --beside-kernel-work --markdown`; do not edit by hand._";
        output::write_section(path, SECTION, &format!("{by}\n\n{here}.\n\n{}", table.markdown()))?;
    }
    Ok(seen.iter().all(|seen| seen.failed.is_none()))
}

fn look(folder: &Folder, chain: &mut Chain, kind: Kind) -> Result<Seen, String> {
    // the start of the successor is not measured
    let successor = if kind == Kind::StaysBeside { None } else { Some(chain.successor(folder, false)?) };
    let occupied =
        if kind == Kind::Quiet { None } else { Some(Occupied::start(folder, SLOT, Duration::from_millis(1))?) };
    thread::sleep(BEGINS);
    let mut seen = Seen { kind, gap_ms: 0.0, total_ms: None, failed: None };
    match successor {
        Some(successor) => match chain::hand_over_to(slice::from_mut(chain), vec![successor]) {
            Ok(round) => {
                let hand_over = round.each.first().ok_or("no hand-over")?;
                (seen.gap_ms, seen.total_ms) = (hand_over.gap_ms, Some(hand_over.total_ms));
            }
            Err(why) => (seen.gap_ms, seen.failed) = (ms(chain.guest.board()?.longest_gap()), Some(why)),
        },
        None => {
            let stays = chain::stay(slice::from_ref(chain), WATCHED)?;
            seen.gap_ms = stays.first().ok_or("no guest")?.gap_ms;
        }
    }
    occupied.map_or(Ok(()), Occupied::wait)?;
    Ok(seen)
}

fn table(seen: &[Seen], guests: &Guests) -> Table {
    let rows = Kind::ALL.map(|kind| {
        let own: Vec<_> = seen.iter().filter(|seen| seen.kind == kind).collect();
        let gaps: Vec<_> = own.iter().map(|seen| seen.gap_ms).collect();
        let totals: Vec<_> = own.iter().filter_map(|seen| seen.total_ms).collect();
        let [p50, _, max] = three(Spread::of(&gaps));
        let [total, _, total_max] = three(Spread::of(&totals));
        let failed = own.iter().filter(|seen| seen.failed.is_some()).count();
        vec![kind.name().into(), own.len().to_string(), failed.to_string(), p50, max, total, total_max]
    });
    Table {
        title: format!(
            "The guest's longest gap beside a process that holds a core in the kernel ({}, ms)",
            guests.name()
        ),
        head: vec!["", "times", "failed", "gap, p50", "max", "total, client, p50", "max"],
        rows: rows.into(),
    }
}
