//! The command line.

use std::{
    fmt, iter,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use migration_core::{engine::OnTimeout, spawner::GuestImpact, vm::VmId};
use migration_kvm::{ram::Backing, tracker::TrackerKind};
use migration_transport::{Address, Bandwidth};
use serde::{Deserialize, Serialize};

use crate::{
    encryption::{Encryption, Keygen},
    refresh::Trigger,
    sealing::Saved,
};

/// A small VMM that shows the migration crates at work.
#[derive(Debug, Parser)]
#[command(name = "minivmm", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a VM.
    Run(Run),
    /// Receive a VM; everything about it comes from the source.
    Receive(Receive),
    /// Talk to a running minivmm.
    Ctl(Ctl),
    /// Borrow a running VM for something that its VMM does not do, and give it back (ephemeral virtualization).
    Feature(Feature),
    /// Keep the RAM of VMs, so that it outlives a minivmm that dies; or look at what is kept.
    Broker(Broker),
    /// The built-in workloads.
    Workload(Workload),
    /// A migration between two processes, from start to end, with a table of what happened.
    Demo(Demo),
    /// Measure, side by side with QEMU where it is installed.
    Bench(crate::bench::Bench),
    /// Measure our techniques beside what their papers have.
    Eval(crate::eval::Eval),
    /// Make a key for encrypted migrations.
    Keygen(Keygen),
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Guest RAM, such as 512M or 4G.
    #[arg(long, default_value = "1G", value_parser = size, conflicts_with = "restore")]
    pub(crate) memory: u64,
    /// vCPUs.
    #[arg(
        long,
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=16),
        conflicts_with = "restore"
    )]
    pub(crate) cpus: u32,
    /// An ELF64 with a PVH entry note.
    #[arg(
        long,
        value_name = "ELF",
        conflicts_with_all = ["workload", "restore"],
        required_unless_present_any = ["workload", "restore"]
    )]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, requires = "kernel", default_value = "")]
    pub(crate) cmdline: String,
    /// A built-in workload, NAME[:k=v,…]; see `minivmm workload --list`.
    #[arg(long, value_name = "NAME[:k=v,…]", conflicts_with = "restore")]
    pub(crate) workload: Option<String>,
    /// A snapshot (`ctl snapshot`): the VM goes on as it was, and is the same VM. See to it that no other instance of it
    /// runs on the same disks and addresses.
    #[arg(long, value_name = "FILE")]
    pub(crate) restore: Option<PathBuf>,
    /// Of a broker: which VM the snapshot is of, and by which key it is sealed.
    #[arg(long, hide = true, requires = "restore", value_name = "JSON")]
    pub(crate) restart: Option<String>,
    /// The most RAM that the VM of a snapshot may have; this host's memory if not given.
    #[arg(long, requires = "restore", value_name = "SIZE", value_parser = size)]
    pub(crate) max_memory: Option<u64>,
    /// Do not start the vCPUs.
    #[arg(long)]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) common: Common,
    /// How guest RAM is backed; thp if not given, of a restored VM as it was.
    #[arg(long, value_parser = backing())]
    pub(crate) backing: Option<Backing>,
    /// How dirty pages are found; auto if not given, of a restored VM as it was.
    #[arg(long, value_parser = tracker())]
    pub(crate) tracker: Option<TrackerKind>,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Where the serial port goes: stdio, null, or a file that is appended to (a FIFO, too). It is never waited for: output
    /// that cannot be written is kept, up to 1 MiB, and then dropped and counted in `ctl status`.
    #[arg(long, default_value = "null", value_name = "stdio|null|FILE")]
    pub(crate) serial: String,
    /// Path of the control socket.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: Option<PathBuf>,
    /// A broker (`minivmm broker`) that keeps the VM's RAM if this process dies. Needs --backing memfd or hugetlb.
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    pub(crate) broker: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) seal: Seal,
}

#[derive(Debug, Args)]
pub(crate) struct Seal {
    /// A key (`minivmm keygen`) by which snapshots and the folders of checkpoints are sealed: who has the files can neither read nor
    /// change them, and what is not sealed by it is not taken.
    #[arg(long, value_name = "F")]
    pub(crate) seal_key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Feature {
    /// The control socket of the minivmm at which the VM is at home. Its RAM must be memfd or hugetlb.
    #[arg(long, value_name = "SOCK")]
    pub(crate) attach: PathBuf,
    /// What to do with the VM: a snapshot to a file ({trip} in its name is the number of the trip), a pre-copy migration to another
    /// host (encrypted by --encrypt), or a check of its memory.
    #[arg(long = "do", value_name = "snapshot:FILE|migrate:URL|check")]
    pub(crate) work: Work,
    /// Keep the VM at least so long.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration)]
    pub(crate) hold: Duration,
    /// Again and again, so long from one beginning to the next. End it with SIGINT or SIGTERM: the VM is given back first.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) every: Option<Duration>,
    /// So many times, then end.
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) times: Option<u32>,
    /// The VM's home asks for it back when it has been away for so long; a minute more than --hold if not given.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) within: Option<Duration>,
    #[command(flatten)]
    pub(crate) encryption: Encryption,
    #[command(flatten)]
    pub(crate) seal: Seal,
    /// Print a JSON object a trip, and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a VM is borrowed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Snapshot(String),
    Migrate(Address),
    Check,
}

impl FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("snapshot", file)) if !file.is_empty() => Ok(Self::Snapshot(file.into())),
            Some(("migrate", url)) => {
                let to = url.parse().map_err(|e| format!("{url}: {e}"))?;
                // the VM's home is told where it goes
                absolute_address(&to).map(Self::Migrate)
            }
            None if text == "check" => Ok(Self::Check),
            _ => Err(format!("{text}: snapshot:FILE, migrate:URL or check is meant")),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Broker {
    /// Be the broker, at unix:PATH, until this process ends; what is kept goes with it.
    #[arg(
        long,
        value_name = "unix:PATH",
        value_parser = unix_path,
        required_unless_present = "at",
        conflicts_with_all = ["at", "list", "dump", "forget"]
    )]
    pub(crate) listen: Option<PathBuf>,
    /// Of a VM whose VMM has died, start another one, from the last snapshot (`ctl snapshot`, `feature --do snapshot`), once no
    /// process is left that may run the VM. What is done is printed.
    #[arg(long, requires = "listen")]
    pub(crate) restart: bool,
    /// The broker to ask.
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    pub(crate) at: Option<PathBuf>,
    /// List what it keeps.
    #[arg(long, requires = "at")]
    pub(crate) list: bool,
    /// Write the RAM of a VM to a file, each byte at its guest physical address.
    #[arg(long, value_name = "VM", requires = "at", requires = "out", value_parser = vm_id, conflicts_with = "list")]
    pub(crate) dump: Option<VmId>,
    /// The file to write.
    #[arg(long, value_name = "FILE", requires = "dump")]
    pub(crate) out: Option<PathBuf>,
    /// Free the RAM of a VM whose owner is gone.
    #[arg(long, value_name = "VM", requires = "at", value_parser = vm_id, conflicts_with_all = ["list", "dump"])]
    pub(crate) forget: Option<VmId>,
    /// Print exactly one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Where to listen: tcp:HOST:PORT (port 0 picks one) or unix:PATH. Prints `listening URL`, and
    /// for a host name a line `bound URL` for each of its addresses.
    #[arg(long, value_name = "URL")]
    pub(crate) listen: Address,
    #[command(flatten)]
    pub(crate) common: Common,
    /// The most RAM that an arriving VM may have, such as 256G; this host's memory if not given. A VM with more is refused
    /// before any memory is mapped for it.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_memory: Option<u64>,
    /// How guest RAM is backed; as at the source if not given.
    #[arg(long, value_parser = backing())]
    pub(crate) backing: Option<Backing>,
    /// In post-copy, what the guest does while the link to its source is lost: run, where it needs no page that is missing, or
    /// pause altogether.
    #[arg(long, default_value = "run")]
    pub(crate) on_link_loss: OnLinkLoss,
    /// A folder in which sources put forward checkpoints (`--fail-safe forward:dir=D`).
    #[arg(long, value_name = "D")]
    pub(crate) checkpoints: Option<PathBuf>,
    /// How dirty pages are found when the VM moves on; as at the source if not given.
    #[arg(long, value_parser = tracker())]
    pub(crate) tracker: Option<TrackerKind>,
    #[command(flatten)]
    pub(crate) encryption: Encryption,
    /// In a hand-over, leave page tables empty, so that the guest faults on each page: to measure what filling them is worth.
    #[arg(long, hide = true)]
    pub(crate) cold: bool,
    /// With the VM, its control socket gets this path.
    #[arg(long, hide = true, value_name = "SOCK")]
    pub(crate) successor_of: Option<PathBuf>,
    /// When to refresh again.
    #[arg(long, hide = true, value_name = "JSON")]
    pub(crate) refresh: Option<String>,
    /// The process that has the VM.
    #[arg(long, hide = true, value_name = "JSON")]
    pub(crate) predecessor: Option<String>,
    /// The last snapshot of the VM.
    #[arg(long, hide = true, value_name = "FILE|JSON")]
    pub(crate) restart_from: Option<Saved>,
}

#[derive(Debug, Args)]
pub(crate) struct Ctl {
    /// The control socket of the minivmm to talk to.
    #[arg(long, value_name = "SOCK", global = true)]
    pub(crate) control: Option<PathBuf>,
    /// Print exactly one JSON object.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How long the minivmm may take to answer; for commands that may take long (migrate, recover, refresh, snapshot,
    /// memory, cancel, post-copy, switch-over, pause, resume), how long it may show no sign of life.
    #[arg(long, value_name = "TIME", default_value = "10s", global = true, value_parser = duration)]
    pub(crate) answer_timeout: Duration,
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// What the VM and a migration do.
    Status,
    /// Stop the vCPUs. While a migration copies pages, too: the VM then stays paused where it arrives, or here if the
    /// migration fails.
    Pause,
    /// Let them run, also while a migration copies pages.
    Resume,
    /// Cancel the migration under way; returns when everything is given back.
    Cancel,
    /// State that the source is dead, and run the VM that is held here.
    Adopt,
    /// End the process, and the VM with it.
    Quit,
    /// Copy guest RAM to a file.
    Memory(Memory),
    /// Write the VM as it is at one moment to a file, while it runs on; `run --restore` goes on from there.
    Snapshot(Snapshot),
    /// Move the VM.
    Migrate(Box<Migrate>),
    /// Replace this VMM under its running VM: a successor, started by itself, takes over the VM, the control socket's path and the
    /// serial port (HyperFresh).
    Refresh(Refresh),
    /// Switch a migration that copies pages to post-copy: the VM is handed over, the rest follows.
    PostCopy,
    /// Switch a migration that copies pages over now: the guest is paused and all that is left is sent, however long that
    /// takes. A hybrid hands over now, and the rest follows.
    SwitchOver,
    /// Change the limits of the migration under way, at once; of a snapshot, the downtime limit. `status` shows them.
    Tune(Tune),
    /// At a source that has lost its link after the hand-over: reconnect there, and wait as `migrate` does.
    Recover(Recover),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Tune {
    /// Most bandwidth from now on, such as 10Gbit or 100MB/s; 0 or unlimited for no limit.
    #[arg(long)]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// The longest downtime that is acceptable from now on.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) downtime_limit: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct Refresh {
    /// Again and again, so long from one to the next; the first in so long.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) every: Option<Duration>,
    /// Whenever the VMM has more memory of its own, as in rss>500M.
    #[arg(long, value_name = "rss>SIZE", conflicts_with = "every")]
    pub(crate) when: Option<Trigger>,
    /// The successor's program, such as a new build; the one that runs here if not given.
    #[arg(long, value_name = "BINARY")]
    pub(crate) exec: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// Where the destination listens.
    #[arg(long, value_name = "URL")]
    pub(crate) to: Address,
    /// Show progress.
    #[arg(long)]
    pub(crate) progress: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The file; one that is there is replaced once the snapshot is complete.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// The longest pause that is acceptable.
    #[arg(long, default_value = "100ms", value_parser = duration)]
    pub(crate) downtime_limit: Duration,
    /// After this time the guest is paused for as long as it takes; 0 to go on as long as that helps.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// How much the guest may be disturbed.
    #[arg(long, default_value = "balanced")]
    pub(crate) guest_impact: Impact,
    /// Show progress on stderr.
    #[arg(long)]
    pub(crate) progress: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Memory {
    /// Guest physical address, decimal or 0x….
    #[arg(long, value_parser = number)]
    pub(crate) gpa: u64,
    /// Bytes.
    #[arg(long, value_parser = number)]
    pub(crate) len: u64,
    /// File to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

/// How a VM moves, as users write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StrategyKind {
    PreCopy,
    StopAndCopy,
    PostCopy,
    Hybrid { rounds: u32 },
    HandOver,
}

impl FromStr for StrategyKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rounds = |text: &str| {
            let rounds = text.strip_prefix("rounds=").and_then(|n| n.parse().ok()).filter(|n| (1..=100).contains(n));
            rounds.ok_or_else(|| format!("{text}: rounds=1 to rounds=100 is meant"))
        };
        match text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest))) {
            ("pre-copy", None) => Ok(Self::PreCopy),
            ("stop-and-copy", None) => Ok(Self::StopAndCopy),
            ("post-copy", None) => Ok(Self::PostCopy),
            ("handover", None) => Ok(Self::HandOver),
            ("hybrid", None) => Ok(Self::Hybrid { rounds: 1 }),
            ("hybrid", Some(rest)) => Ok(Self::Hybrid { rounds: rounds(rest)? }),
            _ => Err("pre-copy, stop-and-copy, post-copy, hybrid[:rounds=N] or handover is meant".into()),
        }
    }
}

impl fmt::Display for StrategyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PreCopy => f.write_str("pre-copy"),
            Self::StopAndCopy => f.write_str("stop-and-copy"),
            Self::PostCopy => f.write_str("post-copy"),
            Self::HandOver => f.write_str("handover"),
            Self::Hybrid { rounds } => write!(f, "hybrid:rounds={rounds}"),
        }
    }
}

/// What a guest with missing pages does without its source.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OnLinkLoss {
    Run,
    Pause,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Huge {
    /// A fault fetches the whole huge page, which stays one.
    Whole,
    /// A fault fetches 4 KiB.
    Split,
}

/// `None` for no protection. (clap takes an `Option` that it can read for an option that may be left out.)
pub(crate) type FailSafe = Option<Protect>;

/// How a VM is protected in post-copy.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Protect {
    /// Against the death of the destination.
    pub(crate) reverse: bool,
    /// Against that of the source.
    pub(crate) forward: bool,
    /// From one checkpoint to the next, in microseconds.
    pub(crate) interval_us: u64,
    /// Without a link for so many microseconds, the other side counts as dead.
    pub(crate) detect_us: u64,
    /// Where checkpoints are kept: for forward ones, where the destination has them too. Else in memory.
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TimeoutAction {
    Cancel,
    Stop,
    PostCopy,
}

impl From<TimeoutAction> for OnTimeout {
    fn from(action: TimeoutAction) -> Self {
        match action {
            TimeoutAction::Cancel => OnTimeout::Cancel,
            TimeoutAction::Stop => OnTimeout::Stop,
            TimeoutAction::PostCopy => OnTimeout::PostCopy,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Impact {
    Low,
    Balanced,
    Fast,
}

impl From<Impact> for GuestImpact {
    fn from(impact: Impact) -> Self {
        match impact {
            Impact::Low => GuestImpact::Low,
            Impact::Balanced => GuestImpact::Balanced,
            Impact::Fast => GuestImpact::Fast,
        }
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Migrate {
    /// Where a minivmm receives: tcp:HOST:PORT or unix:PATH.
    #[arg(long, value_name = "URL")]
    pub(crate) to: Address,
    /// How it moves: pre-copy, stop-and-copy, post-copy, hybrid[:rounds=N], or, to a process of this machine (unix:PATH) that
    /// takes over RAM where it is, handover.
    #[arg(long, default_value = "pre-copy")]
    pub(crate) strategy: StrategyKind,
    /// In post-copy, in which order pages are pushed that nobody waits for: linear, bubbling,
    /// multi-pivot[:k=7,dir=dual], hot-first or random.
    #[arg(long, default_value = "multi-pivot", value_parser = push_order)]
    pub(crate) push_order: String,
    /// Connections for pages that the guest waits for; 0 rules post-copy out.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=16))]
    pub(crate) demand_lanes: u16,
    /// In post-copy, what a fault on a transparent huge page fetches.
    #[arg(long, default_value = "split")]
    pub(crate) huge: Huge,
    /// Connections for pages.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(crate) streams: u16,
    /// The longest downtime that is acceptable. Where it cannot be kept, however long the migration goes on, what
    /// --on-timeout says is done at once.
    #[arg(long, default_value = "300ms", value_parser = duration)]
    pub(crate) downtime_limit: Duration,
    /// The longest time in the pause without a sign of life from the destination: after it the guest runs on here, and the
    /// migration has failed. Four times the downtime limit, but at least 2s, if not given.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) pause_limit: Option<Duration>,
    /// The longest pause, although the destination makes progress. Ten times the predicted downtime or the downtime limit, but at
    /// least 10s, if not given; more where much memory moves in the pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) pause_total: Option<Duration>,
    /// Most bandwidth, such as 10Gbit or 100MB/s; 0 for no limit.
    #[arg(long, default_value = "0")]
    pub(crate) bandwidth: Bandwidth,
    /// How long it may take until the hand-over; 0 for ever.
    #[arg(long, default_value = "0", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// What happens then, or sooner, as soon as it is certain that the downtime limit cannot be kept: cancel, stop (switch over
    /// whatever the downtime), or post-copy.
    #[arg(long, default_value = "cancel")]
    pub(crate) on_timeout: TimeoutAction,
    /// How long the destination may take until it has built the VM, and be silent until then.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub(crate) setup_timeout: Duration,
    /// In post-copy, protect the VM against the death of its destination (reverse), of its source (forward), or of either:
    /// none|reverse|forward|both[:interval=100ms,detect=1s,dir=D]. Both ends run on one host: nobody can tell a death
    /// from a cut across hosts.
    #[arg(long, default_value = "none", value_parser = fail_safe)]
    pub(crate) fail_safe: FailSafe,
    /// How much the guest may be disturbed.
    #[arg(long, default_value = "balanced")]
    pub(crate) guest_impact: Impact,
    /// Checksum of page data, beside TCP's own.
    #[arg(long)]
    pub(crate) checksum: bool,
    #[command(flatten)]
    pub(crate) encryption: Encryption,
    /// Show progress on stderr.
    #[arg(long)]
    pub(crate) progress: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Workload {
    /// List them.
    #[arg(long, conflicts_with = "emit", required_unless_present = "emit")]
    pub(crate) list: bool,
    /// Write one as an ELF that any VMM with PVH boot runs.
    #[arg(long, value_name = "NAME[:k=v,…]", requires = "out")]
    pub(crate) emit: Option<String>,
    /// The file to write.
    #[arg(long, value_name = "ELF")]
    pub(crate) out: Option<PathBuf>,
    /// vCPUs that the ELF shall use.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) cpus: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Guest RAM.
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(crate) memory: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) cpus: u32,
    /// The workload that moves.
    #[arg(long, default_value = "hot:size=64M,data=700M")]
    pub(crate) workload: String,
}

/// Reads a backing, and lists them all in the help and in errors.
pub(crate) fn backing() -> impl TypedValueParser<Value = Backing> {
    PossibleValuesParser::new(Backing::ALL.map(Backing::name)).try_map(|name| name.parse::<Backing>())
}

/// Reads a kind of tracker, and lists them all in the help and in errors.
pub(crate) fn tracker() -> impl TypedValueParser<Value = TrackerKind> {
    let kinds = iter::once(TrackerKind::Auto).chain(TrackerKind::ALL);
    PossibleValuesParser::new(kinds.map(TrackerKind::name)).try_map(|name| name.parse::<TrackerKind>())
}

/// The path of a Unix socket, as `unix:PATH`.
fn unix_path(text: &str) -> Result<PathBuf, String> {
    match text.parse() {
        // processes have working directories of their own
        Ok(Address::Unix(path)) => std::path::absolute(path).map_err(|e| format!("{text}: {e}")),
        Ok(Address::Tcp { .. }) => Err(format!("{text}: memory passes through unix:PATH only")),
        Err(error) => Err(error.to_string()),
    }
}

/// The path for another process, whose working directory may be another one.
pub(crate) fn absolute(path: impl AsRef<Path>) -> Result<PathBuf, String> {
    let path = path.as_ref();
    std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The address for another process, whose working directory may be another one.
pub(crate) fn absolute_address(address: &Address) -> Result<Address, String> {
    match address {
        Address::Tcp { .. } => Ok(address.clone()),
        // read again, since it may have become too long for a socket
        Address::Unix(path) => {
            let absolute = Address::Unix(absolute(path)?).to_string();
            absolute.parse().map_err(|e| format!("{address}: {e}"))
        }
    }
}

/// A VM, by the 32 hexadecimal digits that `status` and `broker --list` show.
fn vm_id(text: &str) -> Result<VmId, String> {
    let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let id = u128::from_str_radix(text, 16).ok().filter(|_| digits);
    id.map(|id| VmId(id.to_be_bytes())).ok_or_else(|| format!("{text}: a VM is named by 32 hexadecimal digits"))
}

/// Bytes, with K, M, G or T (binary).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return Err(format!("{text}: a size is a number with K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text}: not a size"))?;
    number.checked_mul(1 << shift).filter(|&n| n > 0).ok_or_else(|| format!("{text}: zero, or too large"))
}

/// A number, decimal or 0x….
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{text}: {e}"))
}

/// A duration with ms, s or m; a number alone is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let number: f64 = digits.parse().map_err(|_| format!("{text}: not a duration"))?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(format!("{text}: a duration is a number with us, ms, s, m or h")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|e| format!("{text}: {e}"))
}

/// How the VM is protected, as users write it.
pub(crate) fn fail_safe(text: &str) -> Result<FailSafe, String> {
    let (name, options) = text.split_once(':').unwrap_or((text, ""));
    let (reverse, forward) = match name {
        "none" if options.is_empty() => return Ok(None),
        "reverse" => (true, false),
        "forward" => (false, true),
        "both" => (true, true),
        _ => {
            return Err(format!(
                "{text}: none, reverse, forward or both, with [:interval=100ms,detect=1s,dir=D], is meant"
            ));
        }
    };
    let mut protect = Protect { reverse, forward, interval_us: 100_000, detect_us: 1_000_000, dir: None };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').ok_or_else(|| format!("{option}: KEY=VALUE is meant"))?;
        let time = || {
            let us = u64::try_from(duration(value)?.as_micros()).ok().filter(|us| (1..=3_600_000_000).contains(us));
            us.ok_or_else(|| format!("{option}: between 1us and 1h"))
        };
        match key {
            "interval" => protect.interval_us = time()?,
            "detect" => protect.detect_us = time()?,
            // the server uses it: its working directory may be another one
            "dir" => protect.dir = Some(std::path::absolute(value).map_err(|e| format!("{option}: {e}"))?),
            _ => return Err(format!("{key}: interval, detect and dir are known")),
        }
    }
    if protect.forward && protect.dir.is_none() {
        return Err(format!(
            "{text}: a forward checkpoint needs dir=D, a folder that the destination has as --checkpoints D"
        ));
    }
    Ok(Some(protect))
}

/// Checked here, so that a wrong one is a usage error; kept as text, as which it goes through the control socket.
fn push_order(text: &str) -> Result<String, String> {
    migration_core::strategy::push_order::parse(text).map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn protection() {
        assert_eq!(fail_safe("none"), Ok(None));
        let reverse = Protect { reverse: true, forward: false, interval_us: 100_000, detect_us: 1_000_000, dir: None };
        assert_eq!(fail_safe("reverse"), Ok(Some(reverse.clone())));
        let given = fail_safe("both:interval=20ms,detect=300ms,dir=/d");
        let both =
            Protect { forward: true, interval_us: 20_000, detect_us: 300_000, dir: Some("/d".into()), ..reverse };
        assert_eq!(given, Ok(Some(both)));
        for bad in [
            "",
            "none:interval=1s",
            "sideways",
            "reverse:interval",
            "reverse:interval=0",
            "reverse:often=1s",
            "forward",
        ] {
            assert!(fail_safe(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn units() {
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("0").is_err() && size("").is_err() && size("1X").is_err() && size("99999999999T").is_err());
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("-1s").is_err() && duration("5 parsecs").is_err());
        assert_eq!(number("0x100000"), Ok(1 << 20));
        assert!(number("zz").is_err());
        assert_eq!(vm_id("0102030405060708090a0b0c0d0e0f10").map(|VmId(id)| id[15]), Ok(16));
        assert!(vm_id("+102030405060708090a0b0c0d0e0f10").is_err() && vm_id("12").is_err());
        assert_eq!(unix_path("unix:/b"), Ok("/b".into()));
        let here = std::env::current_dir().unwrap();
        let address = |text: &str| absolute_address(&text.parse().unwrap());
        assert_eq!(address("unix:sock"), Ok(Address::Unix(here.join("sock"))));
        assert_eq!(address("unix:/b"), Ok(Address::Unix("/b".into())));
        assert_eq!(address("tcp:h:1").unwrap().to_string(), "tcp:h:1");
        // for a person in this directory it was short enough
        assert!(address(&format!("unix:{}", "x".repeat(107))).unwrap_err().contains("at most 107 bytes"));
        assert!(unix_path("tcp:h:1").is_err() && unix_path("/b").is_err());
    }
}
