//! `minivmm bench`: compares minivmm and QEMU on this machine in one run.
//!
//! | file | content |
//! |---|---|
//! | process.rs | child processes, and what `/proc` reports of them |
//! | guest.rs | the guest's board, read from outside in the same way for every VMM |
//! | ours.rs, qemu.rs | the two VMMs |
//! | tuning.rs | their options |
//! | measure.rs | one run, the bare copy, the guest that is not migrated |
//! | postcopy.rs | post-copy: its runs, and the time for which the guest is slow |
//! | encrypt.rs | encryption: its runs, tables and targets |
//! | records.rs | the record layer and the ciphers alone, on one core |
//! | handover/ | hand-overs on one host |
//! | slots.rs | the time that KVM needs to set memory slots |
//! | scale.rs | the costs that grow with the size of RAM |
//! | stores/ | the clients of page stores, without a VM |
//! | samples.rs | the guest's speed over time |
//! | figures.rs | medians, ratios, targets |
//! | output.rs | tables, JSON, Markdown |

pub(crate) mod encrypt;
pub(crate) mod figures;
pub(crate) mod guest;
mod handover;
pub(crate) mod measure;
pub(crate) mod ours;
pub(crate) mod output;
mod postcopy;
pub(crate) mod process;
mod qemu;
mod records;
pub(crate) mod samples;
#[allow(unsafe_code)]
mod scale;
#[allow(unsafe_code)]
mod slots;
mod stores;
pub(crate) mod tuning;

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use figures::{Control, Figures, Floor};
use indicatif::{ProgressBar, ProgressStyle};
use measure::{Run, Setup, Vmm};
use minivmm_client::log;
use minivmm_client::values::{duration, size};
use process::Folder;
use tuning::Tuning;

pub(crate) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The data of a guest for each GiB of its RAM, in MiB.
const DATA: u64 = 700;
/// The sizes in MiB of the memory that the guest writes continuously.
const HOT: [u64; 3] = [0, 64, 512];
/// The number of runs of each kind.
const REPEAT: u32 = 5;
/// The number of attempts for each run.
const ATTEMPTS: usize = 2;
/// The time for which a guest that is not migrated is observed: about the time of a migration.
const CONTROL: Duration = Duration::from_millis(600);

/// The options of `minivmm bench`.
#[derive(clap::Args, Debug)]
pub struct Bench {
    /// One run of each kind instead of five, and only the comparisons with QEMU; with --handover, a
    /// few hand-overs of some guests.
    #[arg(long)]
    quick: bool,
    /// Runs of each kind; the figures are their medians. Default: 5, and 100 hand-overs.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "quick")]
    repeat: Option<u32>,
    /// Measure only this part; can be given several times.
    #[arg(long, value_name = "MODE")]
    only: Vec<Mode>,
    /// Measure guests of 1, 2, 4 and 8 GiB, too.
    #[arg(long)]
    sizes: bool,
    /// Measure only post-copy, compared with QEMU's, with and without preemption.
    #[arg(long, conflicts_with_all = ["only", "sizes"])]
    post_copy: bool,
    /// Measure only encryption, compared with plain text and with QEMU's TLS. `--markdown` then
    /// writes between the lines `<!-- encrypt:begin -->` and `<!-- encrypt:end -->`.
    #[arg(long, conflicts_with_all = ["only", "sizes", "post_copy"])]
    encrypt: bool,
    /// With --encrypt, measure only the ciphers and the record layer on one core, without
    /// migrations.
    #[arg(long, requires = "encrypt")]
    records: bool,
    /// Measure only hand-overs on one host, by the guest's own clock, compared with other ways to
    /// move the VM.
    #[arg(long, conflicts_with_all = ["only", "sizes", "post_copy", "encrypt"])]
    handover: bool,
    /// With --handover, measure only hand-overs beside a process whose system call holds a core for
    /// seconds, and without that process.
    #[arg(long, requires = "handover", conflicts_with = "part")]
    beside_kernel_work: bool,
    /// Measure only the time that KVM needs to set the memory slots of a VM, in one slot and in
    /// slots of 16 GiB. Run it alone: each call holds a core.
    #[arg(long, conflicts_with_all = ["only", "sizes", "post_copy", "encrypt", "handover"])]
    slots: bool,
    /// With --slots, measure 2 TiB in one slot, too: a system call of about 10 s that cannot be
    /// interrupted and during which nothing else runs on its core.
    #[arg(long, requires = "slots")]
    long_calls: bool,
    /// Measure only the costs that grow with the size of RAM: set-up, pause, memory and harvests of
    /// VMs of 1 to 256 GiB with the same data. RAM is sparse.
    #[arg(long, conflicts_with_all = ["only", "sizes", "post_copy", "encrypt", "handover", "slots"])]
    scale: bool,
    /// Measure only the clients of page stores, without a VM: a Valkey or Redis server on a Unix
    /// socket, and sparse files compared with `dd`. `--markdown` then writes between the lines
    /// `<!-- stores:begin -->` and `<!-- stores:end -->`.
    #[arg(long, conflicts_with_all = ["only", "sizes", "post_copy", "encrypt", "handover", "slots", "scale"])]
    stores: bool,
    /// Occupy a core: set a memory slot of this size repeatedly. Used by the measurement of
    /// hand-overs and by tests.
    #[arg(long, hide = true, value_name = "SIZE", value_parser = size)]
    occupy: Option<u64>,
    /// The time for which the core is occupied; the last call may take longer.
    #[arg(long = "for", hide = true, requires = "occupy", default_value = "1s", value_parser = duration)]
    occupy_for: Duration,
    /// Measure only this part of hand-overs; can be given several times.
    #[arg(long, hide = true, requires = "handover")]
    part: Vec<handover::Part>,
    /// The number of bytes that stand for a GiB, to test the measurement of hand-overs, slots or
    /// stores.
    #[arg(long, hide = true, default_value = "1G", value_parser = size)]
    unit: u64,
    /// The strategy of minivmm in the comparison with QEMU's post-copy, to test the measurement.
    #[arg(long, hide = true, default_value = postcopy::PLAIN)]
    strategy: String,
    /// Print all figures and all single values as one JSON object.
    #[arg(long)]
    json: bool,
    /// Do not run QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// Do not run minivmm.
    #[arg(long, hide = true, conflicts_with = "no_qemu")]
    no_minivmm: bool,
    /// Write the figures into this Markdown file, between the lines `<!-- bench:begin -->` and
    /// `<!-- bench:end -->`; those of hand-overs between `<!-- handover:begin -->` and `<!--
    /// handover:end -->`.
    #[arg(long, value_name = "FILE", alias = "write")]
    markdown: Option<PathBuf>,
    /// Exit with status 1 if a figure misses its target.
    #[arg(long)]
    strict: bool,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// A bare copy of the same amount of data, the limit for any migration.
    Floor,
    /// A guest that is not migrated.
    Control,
    /// One stream, compared with QEMU's plain migration.
    Plain,
    /// Four streams, compared with four of QEMU's multifd channels.
    Multifd,
    /// The effects of `--guest-impact low` and `fast`.
    Impact,
    /// Memory beyond the guest's RAM.
    Memory,
    /// Guests of 1, 2, 4 and 8 GiB.
    Sizes,
    /// Post-copy, compared with QEMU's, with and without preemption.
    PostCopy,
}

/// Runs the bench. Returns the exit status.
pub fn run(args: &Bench) -> u8 {
    let result = match args {
        Bench { encrypt: true, .. } => encrypt::bench(args),
        Bench { stores: true, .. } => stores::bench(args),
        _ => bench(args),
    };
    match result {
        Ok(good) => u8::from(args.strict && !good),
        Err(why) => {
            note!("minivmm bench: {why}");
            1
        }
    }
}

impl Bench {
    fn wants(&self, mode: Mode) -> bool {
        if self.post_copy {
            return mode == Mode::PostCopy;
        }
        match (self.only.is_empty(), mode) {
            (false, _) => self.only.contains(&mode) || (mode == Mode::Sizes && self.sizes),
            (true, Mode::Sizes) => self.sizes,
            // its figures have a section of their own
            (true, Mode::PostCopy) => false,
            (true, Mode::Plain | Mode::Multifd | Mode::Floor) => true,
            (true, _) => !self.quick,
        }
    }
}

/// Returns the workload that writes `hot` MiB continuously, beside its data.
fn workload(hot: u64, data: u64) -> String {
    match hot {
        0 => format!("idle:data={data}M"),
        _ => format!("hot:size={hot}M,data={data}M"),
    }
}

/// A step of the bench.
enum Step {
    Floor(u64),
    Control(u64, u64),
    Run(Setup),
}

/// Returns all steps in their order. Kinds that are compared alternate.
fn steps(args: &Bench, vmms: &[Vmm]) -> Vec<Step> {
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { REPEAT });
    let setup = |vmm, label: &str, hot, gib: u64, streams, impact, watch_memory| {
        let workload = workload(hot, DATA * gib);
        let (label, strategy) = (label.into(), "pre-copy".into());
        let way = encrypt::Way::default();
        Setup {
            vmm,
            label,
            workload,
            memory: gib * GIB,
            streams,
            impact,
            strategy,
            watch_memory,
            watch_speed: false,
            way,
            tuning: Tuning::AsItComes,
        }
    };
    let mut steps = Vec::new();
    let ours = vmms.contains(&Vmm::Minivmm);
    for _ in 0..repeat {
        if args.wants(Mode::Floor) {
            steps.extend([1, 2, 4].map(Step::Floor));
        }
    }
    for _ in 0..repeat {
        if args.wants(Mode::Control) {
            steps.extend([0, 64].into_iter().flat_map(|hot| [0, 1, 4].map(|streams| Step::Control(hot, streams))));
        }
    }
    for hot in HOT {
        for _ in 0..repeat {
            for (mode, label, streams) in [(Mode::Plain, "plain", 1), (Mode::Multifd, "multifd", 4)] {
                if !args.wants(mode) {
                    continue;
                }
                for tuning in Tuning::ALL {
                    let tuned = |&vmm: &Vmm| {
                        let plain = setup(vmm, label, hot, 1, streams, "balanced", false);
                        Step::Run(Setup { label: tuning.label(label), tuning, ..plain })
                    };
                    steps.extend(vmms.iter().map(tuned));
                }
            }
        }
    }
    for hot in HOT {
        for _ in 0..repeat {
            if args.wants(Mode::PostCopy) {
                let setups = postcopy::setups(vmms, &workload(hot, DATA), GIB, &args.strategy);
                steps.extend(setups.into_iter().map(Step::Run));
            }
        }
    }
    for _ in 0..repeat {
        if args.wants(Mode::Impact) && ours {
            let impacts = ["low", "balanced", "fast"];
            steps.extend(impacts.map(|i| Step::Run(setup(Vmm::Minivmm, "impact", 64, 1, 2, i, false))));
        }
    }
    if args.wants(Mode::Memory) {
        for hot in [0, 512] {
            steps.extend(vmms.iter().map(|&vmm| Step::Run(setup(vmm, "memory", hot, 1, 4, "balanced", true))));
        }
    }
    for _ in 0..repeat {
        if args.wants(Mode::Sizes) && ours {
            steps.extend([1, 2, 4, 8].map(|gib| Step::Run(setup(Vmm::Minivmm, "sizes", 0, gib, 4, "balanced", false))));
        }
    }
    steps
}

/// Runs the measurement. Returns whether every figure meets its target.
fn bench(args: &Bench) -> Result<bool, String> {
    if !std::path::Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm here, and a comparison of software guests would say nothing".into());
    }
    if let Some(bytes) = args.occupy {
        return slots::occupy(bytes, args.occupy_for);
    }
    if args.slots {
        return slots::bench(args);
    }
    if args.scale {
        return scale::bench(args);
    }
    if args.handover {
        return handover::bench(args);
    }
    if let Some(path) = &args.markdown {
        output::check_markdown(path)?;
    }
    let version = qemu::version();
    let mut vmms = Vec::new();
    if !args.no_minivmm {
        vmms.push(Vmm::Minivmm);
    }
    match &version {
        Some(_) if !args.no_qemu => vmms.push(Vmm::Qemu),
        None if !args.no_qemu => note!("qemu-system-x86_64 is not installed: measuring minivmm alone"),
        _ => {}
    }
    let folder = Folder::new()?;
    let steps = steps(args, &vmms);
    let bar = ProgressBar::new(steps.len() as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut figures = Figures::new(version.filter(|_| vmms.contains(&Vmm::Qemu)));
    for step in &steps {
        match step {
            Step::Floor(streams) => {
                tell(&bar, &format!("bare copy, {streams} streams"));
                let ms = attempt(&bar, &mut figures.failures, || measure::floor(DATA * MIB, *streams))?;
                figures.floors.push(Floor { streams: *streams, mib: DATA, ms });
            }
            Step::Control(hot, streams) => {
                let vmm = vmms.first().copied().unwrap_or(Vmm::Minivmm);
                let setup = Setup {
                    vmm,
                    label: "control".into(),
                    workload: workload(*hot, DATA),
                    memory: GIB,
                    streams: 0,
                    impact: "balanced",
                    strategy: "pre-copy".into(),
                    watch_memory: false,
                    watch_speed: false,
                    way: encrypt::Way::default(),
                    tuning: Tuning::AsItComes,
                };
                tell(&bar, &format!("control, {}, beside {streams} copies", setup.workload));
                let gap_ms = attempt(&bar, &mut figures.failures, || {
                    measure::control(&folder, &setup, *streams, DATA * MIB, CONTROL)
                })?;
                figures.controls.push(Control { workload: setup.workload, vmm, streams: *streams, gap_ms });
            }
            Step::Run(setup) => {
                let who = figures::name(setup.vmm);
                tell(&bar, &format!("{}: {who}, {} streams, {}", setup.label, setup.streams, setup.workload));
                let run: Run = attempt(&bar, &mut figures.failures, || measure::run(&folder, setup))?;
                if run.guest_errors > 0 {
                    return Err(format!(
                        "{who}: the guest found {} wrong pages after {}",
                        run.guest_errors, setup.label
                    ));
                }
                let fast = run.speed.map_or(String::new(), |s| format!(", until 90 % {:.0} ms", s.figure()));
                tell(&bar, &format!("    total {:.0} ms, gap {:.1} ms{fast}", run.total_ms, run.gap_ms));
                figures.runs.push(run);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        out!("{}", output::json(&figures));
    } else {
        log::print(&output::text(&figures));
    }
    if let Some(path) = &args.markdown {
        output::write_markdown(path, &figures)?;
    }
    Ok(figures.within_targets())
}

/// Shows the current step on a progress bar, or on lines if there is no terminal.
pub(crate) fn tell(bar: &ProgressBar, what: &str) {
    if bar.is_hidden() {
        note!("{what}");
    } else {
        bar.set_message(what.to_owned());
    }
}

/// Repeats a failed attempt, and records the reason, which is part of the result.
pub(crate) fn attempt<T>(
    bar: &ProgressBar,
    failures: &mut Vec<String>,
    mut what: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let mut tried = 1;
    loop {
        match what() {
            Err(why) if tried < ATTEMPTS => {
                bar.suspend(|| log!("once more, as this failed: {why}"));
                failures.push(why);
                tried += 1;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: Bench,
    }

    fn parse(line: &[&str]) -> Bench {
        Line::try_parse_from([&["bench"], line].concat()).unwrap().bench
    }

    fn runs(line: &[&str]) -> Vec<(Vmm, String, u64)> {
        let steps = steps(&parse(line), &[Vmm::Minivmm, Vmm::Qemu]);
        let run = |s: Step| if let Step::Run(s) = s { Some((s.vmm, s.label, s.memory / GIB)) } else { None };
        steps.into_iter().filter_map(run).collect()
    }

    #[test]
    fn what_is_compared_alternates() {
        let all = runs(&["--quick"]);
        assert_eq!(all.len(), 3 * 8);
        assert!(
            all.chunks(2).all(|pair| pair[0].0 == Vmm::Minivmm && pair[1].0 == Vmm::Qemu && pair[0].1 == pair[1].1)
        );
        assert_eq!(runs(&["--only", "plain", "--repeat", "3"]).len(), 3 * 3 * 4);
        let sizes = runs(&["--only", "sizes", "--repeat", "1"]);
        assert_eq!(sizes.iter().map(|s| s.2).collect::<Vec<_>>(), [1, 2, 4, 8]);
        assert!(!runs(&[]).iter().any(|s| s.1 == "sizes") && runs(&["--sizes"]).iter().any(|s| s.1 == "sizes"));
        let post_copy = runs(&["--post-copy", "--repeat", "2"]);
        assert_eq!(post_copy.len(), 3 * 2 * 5);
        assert!(post_copy.iter().all(|s| s.1.starts_with("post-copy") && s.2 == 1));
        assert!(!runs(&[]).iter().any(|s| s.1.starts_with("post-copy")));
    }

    #[test]
    fn every_workload_is_one() {
        for hot in HOT {
            guests::check_spec(&workload(hot, DATA)).unwrap();
        }
    }
}
