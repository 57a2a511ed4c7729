//! `minivmm bench --handover`: measures, by the guest's clock, the effect of replacing the process
//! that runs a guest.
//!
//! | file | content |
//! |---|---|
//! | plan.rs | the guests |
//! | chain.rs | a VM that moves from process to process, and the speed of its guest afterwards |
//! | beside.rs | the same beside a process that holds a core in the kernel |
//! | others.rs | the same VM moved by pre-copy, and a QEMU that is replaced |
//! | figures.rs | percentiles and targets |
//! | tables.rs | tables, JSON, Markdown |

mod beside;
mod chain;
mod figures;
mod others;
mod plan;
mod tables;

use std::{fmt, time::Duration};

use chain::FOLLOWED;
use clap::ValueEnum;
use figures::{Figures, Means, Series};
use indicatif::{ProgressBar, ProgressStyle};
use migration_kvm::ram::Backing;
use minivmm_client::log;
use plan::Guests;

use super::{
    Bench, attempt,
    figures::Machine,
    measure::BEFORE,
    output,
    process::{Folder, field},
    qemu, tell,
};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "handover";
/// The number of hand-overs of each kind.
const HAND_OVERS: u32 = 100;
const QUICK: u32 = 8;
/// The sizes of the guests in GiB.
const SIZES: [u64; 4] = [1, 2, 4, 8];
/// The numbers of VMs that are handed over at once.
const AT_ONCE: [usize; 2] = [4, 8];
/// The number of moves in each other way, and of hand-overs after which the guest's speed is
/// measured.
const OTHERS: u32 = 5;
const RECOVERIES: u32 = 10;
/// The number of parts into which each kind is divided. The parts of all kinds alternate, so that a
/// slow period of the machine affects all kinds.
const TURNS: u32 = 4;
/// The memory in bytes that the rest of the machine may need while guests run.
const SPARE: u64 = 1 << 30;

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Idle guests of several sizes.
    Sizes,
    /// A guest that writes continuously.
    Hot,
    /// An idle guest in huge pages. Together with `recovery`, also the speed of one that writes.
    Huge,
    /// Several guests at once.
    AtOnce,
    /// Pre-copy, and the replacement of a QEMU.
    Others,
    /// The guest's speed after the hand-over.
    Recovery,
}

/// A step of the measurement.
enum Step {
    Series(Guests, u32),
    Other(Means),
    Recoveries(Guests, u32),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Series(guests, rounds) => {
                write!(f, "{}: {} hand-overs", guests.name(), *rounds as usize * guests.vms)
            }
            Self::Other(means) => f.write_str(means.name()),
            Self::Recoveries(guests, rounds) => {
                write!(
                    f,
                    "{}: speed after {rounds} hand-overs with page tables filled, and {rounds} without",
                    guests.name()
                )
            }
        }
    }
}

impl Step {
    /// Returns the approximate duration.
    fn time(&self) -> Duration {
        match self {
            Self::Series(guests, rounds) => guests.start_time() + guests.round_time() * *rounds,
            Self::Other(_) => BEFORE + Duration::from_secs(8),
            Self::Recoveries(guests, rounds) => guests.start_time() + (guests.round_time() + FOLLOWED) * 2 * *rounds,
        }
    }

    /// Returns the bytes of RAM that the step's guests need at the same time.
    fn bytes(&self) -> u64 {
        match self {
            Self::Series(guests, _) | Self::Recoveries(guests, _) => guests.bytes(),
            Self::Other(_) => 0,
        }
    }
}

/// Returns all steps in their order.
fn steps(args: &Bench, qemu: bool) -> Vec<Step> {
    let hand_overs = args.repeat.unwrap_or(if args.quick { QUICK } else { HAND_OVERS });
    let wants = |part| args.part.is_empty() || args.part.contains(&part);
    let (unit, quick) = (args.unit, args.quick);
    let mut kinds = Vec::new();
    if wants(Part::Sizes) {
        let sizes = if quick { &SIZES[..2] } else { &SIZES };
        kinds.extend(sizes.iter().map(|&times| Guests::idle(unit, times)));
    }
    if wants(Part::Hot) {
        kinds.push(Guests::hot(unit));
    }
    if wants(Part::Huge) {
        kinds.push(Guests::huge(unit));
    }
    if wants(Part::AtOnce) {
        let at_once = if quick { &AT_ONCE[..1] } else { &AT_ONCE };
        kinds.extend(at_once.iter().map(|&vms| Guests::sleeping(unit, vms)));
    }
    let turns = if hand_overs < 4 * TURNS { 1 } else { TURNS };
    let mut steps = Vec::new();
    for _ in 0..turns {
        let turn = |guests: &Guests| Step::Series(guests.clone(), guests.rounds(hand_overs.div_ceil(turns)));
        steps.extend(kinds.iter().map(turn));
    }
    if wants(Part::Others) {
        // the two kinds alternate
        for _ in 0..if quick { 1 } else { OTHERS.min(hand_overs) } {
            steps.push(Step::Other(Means::PreCopy));
            steps.extend(qemu.then_some(Step::Other(Means::QemuCpr)));
        }
    }
    if wants(Part::Recovery) {
        let rounds = if quick { 2 } else { RECOVERIES.min(hand_overs) };
        steps.push(Step::Recoveries(Guests::hot(unit), rounds));
        if wants(Part::Huge) {
            steps.push(Step::Recoveries(Guests::hot_huge(unit), rounds));
        }
    }
    steps
}

/// Returns why there is not enough memory of the kind that the guests need, or `None` if there is
/// enough.
fn too_little(step: &Step) -> Option<String> {
    let meminfo = |key| field("/proc/meminfo".as_ref(), key)?.split(' ').next()?.parse::<u64>().ok();
    if let Step::Series(guests, _) | Step::Recoveries(guests, _) = step
        && guests.backing == "hugetlb"
    {
        let (needed, free) = (guests.bytes().div_ceil(2 << 20), meminfo("HugePages_Free").unwrap_or(0));
        return (free < needed)
            .then(|| format!("{free} huge pages are free, and {needed} needed (sysctl vm.nr_hugepages)"));
    }
    let (needed, free) = (step.bytes() + SPARE, meminfo("MemAvailable")? << 10);
    (free < needed).then(|| format!("{} MiB of memory are free, and {} needed", free >> 20, needed >> 20))
}

/// Runs the measurement. Returns whether every figure meets its target.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if args.beside_kernel_work {
        return beside::bench(args);
    }
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    let version = qemu::version().filter(|_| !args.no_qemu);
    let mut figures = Figures::new(Machine::here(version.clone()));
    if version.is_none() && !args.no_qemu {
        figures.notes.push("QEMU's cpr-transfer: not measured: qemu-system-x86_64 is not installed".into());
    }
    let allowed = if Backing::Memfd.may_be_huge() { "allowed" } else { "not allowed" };
    figures.notes.push(format!("Transparent huge pages for a memfd: {allowed} (shmem_enabled)"));
    let steps = steps(args, version.is_some());
    let folder = Folder::new()?;
    let time: Duration = steps.iter().map(Step::time).sum();
    let bar = ProgressBar::new(time.as_millis() as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {percent}% {eta} left, {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    tell(&bar, &format!("about {} minutes", time.as_secs().div_ceil(60)));
    let mut begun = Duration::ZERO;
    for step in &steps {
        tell(&bar, &step.to_string());
        match too_little(step) {
            Some(why) => {
                // reported once, not for each part
                let what = format!("{step}: not measured: ");
                if !figures.notes.iter().any(|note| note.starts_with(&what)) {
                    figures.notes.push(what + &why);
                }
            }
            None => perform(args, &folder, step, &bar, begun, &mut figures)?,
        }
        begun += step.time();
        bar.set_position(begun.as_millis() as u64);
    }
    bar.finish_and_clear();
    if args.json {
        out!("{}", tables::json(&figures));
    } else {
        log::print(&tables::text(&figures));
    }
    if let Some(path) = &args.markdown {
        output::write_section(path, SECTION, &tables::markdown(&figures))?;
    }
    Ok(figures.within_targets())
}

fn perform(
    args: &Bench,
    folder: &Folder,
    step: &Step,
    bar: &ProgressBar,
    begun: Duration,
    figures: &mut Figures,
) -> Result<(), String> {
    match step {
        Step::Series(guests, rounds) => {
            let progress = |round| bar.set_position((begun + guests.round_time() * round).as_millis() as u64);
            let series = attempt(bar, &mut figures.failures, || series(folder, guests, *rounds, progress))?;
            let spread = series.spread(|h| h.gap_ms);
            tell(bar, &spread.map_or(String::new(), |s| format!("    gap p50 {:.2} ms, max {:.2} ms", s.p50, s.max)));
            figures.add(series);
        }
        Step::Other(Means::PreCopy) => {
            let other = attempt(bar, &mut figures.failures, || others::pre_copy(folder, &Guests::idle(args.unit, 1)))?;
            tell(bar, &format!("    gap {:.2} ms", other.gap_ms));
            figures.others.push(other);
        }
        Step::Other(Means::QemuCpr) => {
            // if this QEMU cannot do it, the other figures are still measured
            match attempt(bar, &mut figures.failures, || others::qemu_cpr(folder, &Guests::idle(args.unit, 1))) {
                Ok(other) => {
                    tell(bar, &format!("    gap {:.2} ms", other.gap_ms));
                    figures.others.push(other);
                }
                Err(why) => figures.notes.push(format!("QEMU's cpr-transfer: not measured: {why}")),
            }
        }
        Step::Recoveries(guests, rounds) => {
            let all = attempt(bar, &mut figures.failures, || recoveries(folder, guests, *rounds))?;
            figures.recoveries.extend(all);
        }
    }
    Ok(())
}

/// Hands guests over repeatedly.
fn series(folder: &Folder, guests: &Guests, rounds: u32, progress: impl Fn(u32)) -> Result<Series, String> {
    let mut chains = chain::start(folder, &guests.options(), guests.vms)?;
    let mut series = Series { guests: guests.clone(), hand_overs: Vec::new(), stays: Vec::new() };
    for n in 0..rounds {
        let round = chain::hand_over(folder, &mut chains, false)?;
        series.hand_overs.extend(round.each);
        if guests.stays_after(n) {
            series.stays.extend(chain::stay(&chains, round.window)?);
        }
        progress(n + 1);
    }
    chains.iter().try_for_each(chain::Chain::verify)?;
    Ok(series)
}

/// Measures a guest's speed after hand-overs, alternating between filled page tables and empty
/// ones.
fn recoveries(folder: &Folder, guests: &Guests, rounds: u32) -> Result<Vec<chain::Recovery>, String> {
    let mut chains = chain::start(folder, &guests.options(), 1)?;
    let mut all = Vec::new();
    for n in 0..2 * rounds {
        for chain in &mut chains {
            all.push(chain::recover(folder, chain, guests, n % 2 == 0)?);
        }
    }
    chains.iter().try_for_each(chain::Chain::verify)?;
    Ok(all)
}
