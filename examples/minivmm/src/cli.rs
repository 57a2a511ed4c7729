//! The command line.

use std::{iter, path::PathBuf, str::FromStr, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use migration_core::vm::VmId;
use migration_kvm::{ram::Backing, tracker::TrackerKind};
use migration_transport::Address;
use minivmm_client::{
    Saved,
    ctl::Ctl,
    encryption::{Encryption, Keygen},
    values::{absolute_address, duration, size, unix_path, vm_id},
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
    #[cfg(feature = "bench")]
    Demo(bench::Demo),
    /// Measure, side by side with QEMU where it is installed.
    #[cfg(feature = "bench")]
    Bench(bench::Bench),
    /// Measure our techniques beside what their papers have.
    #[cfg(feature = "bench")]
    Eval(bench::Eval),
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
                absolute_address(&to).map(Self::Migrate).map_err(String::from)
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

/// What a guest with missing pages does without its source.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OnLinkLoss {
    Run,
    Pause,
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

/// Reads a backing, and lists them all in the help and in errors.
pub(crate) fn backing() -> impl TypedValueParser<Value = Backing> {
    PossibleValuesParser::new(Backing::ALL.map(Backing::name)).try_map(|name| name.parse::<Backing>())
}

/// Reads a kind of tracker, and lists them all in the help and in errors.
pub(crate) fn tracker() -> impl TypedValueParser<Value = TrackerKind> {
    let kinds = iter::once(TrackerKind::Auto).chain(TrackerKind::ALL);
    PossibleValuesParser::new(kinds.map(TrackerKind::name)).try_map(|name| name.parse::<TrackerKind>())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
