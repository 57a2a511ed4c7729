//! The command line.

use std::{iter, path::PathBuf, str::FromStr, time::Duration};

use clap::{
    Args, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use migration_core::{vm::VmId, working_set::ResidentLimit};
use migration_kvm::{ram::Backing, tracker::TrackerKind};
use migration_transport::Address;
use minivmm_client::{
    Saved, StoreSpec,
    ctl::Ctl,
    encryption::{Encryption, Keygen},
    values::{absolute_address, duration, size, unix_path, vm_id},
};

use crate::store::Store;

/// A command of `minivmm`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM.
    Run(Run),
    /// Receive a VM. Its configuration comes from the source.
    Receive(Receive),
    /// Send a command to a running minivmm.
    Ctl(Ctl),
    /// Borrow a running VM for a feature that its own VMM lacks, and return it (ephemeral
    /// virtualization).
    Feature(Feature),
    /// Keep the RAM of VMs, so that it outlives a minivmm that dies, or examine kept RAM.
    Broker(Broker),
    /// List the built-in workloads, or write one to a file.
    Workload(Workload),
    /// Make a key for encrypted migrations.
    Keygen(Keygen),
    /// List or remove what crashed owners have left in a page store.
    Store(Store),
}

#[derive(Debug, Args)]
pub struct Run {
    /// Size of guest RAM, such as 512M or 4G.
    #[arg(long, default_value = "1G", value_parser = size, conflicts_with = "restore")]
    pub(crate) memory: u64,
    /// Number of vCPUs.
    #[arg(
        long,
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=16),
        conflicts_with = "restore"
    )]
    pub(crate) cpus: u32,
    /// Guest kernel: an ELF64 with a PVH entry note.
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
    /// Built-in workload, NAME[:k=v,…]; see `minivmm workload --list`.
    #[arg(long, value_name = "NAME[:k=v,…]", conflicts_with = "restore")]
    pub(crate) workload: Option<String>,
    /// Snapshot to start (`ctl snapshot`). The VM continues as the same VM, so make sure that no
    /// other instance of it runs on the same disks and addresses.
    #[arg(long, value_name = "FILE")]
    pub(crate) restore: Option<PathBuf>,
    /// Set by a broker: the VM of the snapshot, and the key with which it is sealed.
    #[arg(long, hide = true, requires = "restore", value_name = "JSON")]
    pub(crate) restart: Option<String>,
    /// The most RAM that the VM of a snapshot may have; by default this host's memory.
    #[arg(long, requires = "restore", value_name = "SIZE", value_parser = size)]
    pub(crate) max_memory: Option<u64>,
    /// Do not start the vCPUs.
    #[arg(long)]
    pub(crate) paused: bool,
    /// Page store, one of --store, that keeps pages which the guest does not use.
    #[arg(long, value_name = "NAME")]
    pub(crate) cold_store: Option<String>,
    /// How much of the RAM stays resident: a size such as 512M; auto for the working set, which is the
    /// default; off for all of it.
    #[arg(long, value_name = "SIZE|auto|off", requires = "cold_store")]
    pub(crate) resident_limit: Option<ResidentLimit>,
    #[command(flatten)]
    pub(crate) common: Common,
    /// Kind of memory for guest RAM; by default thp, or that of the restored VM.
    #[arg(long, value_parser = backing())]
    pub(crate) backing: Option<Backing>,
    /// How dirty pages are found; by default auto, or as in the restored VM.
    #[arg(long, value_parser = tracker())]
    pub(crate) tracker: Option<TrackerKind>,
}

#[derive(Debug, Args)]
pub struct Common {
    /// Destination of the serial port's output: stdio, null, or a file to append to (or a FIFO).
    /// minivmm never waits for it: up to 1 MiB of output that cannot be written is kept, and then
    /// the oldest is dropped and counted in `ctl status`.
    #[arg(long, default_value = "null", value_name = "stdio|null|FILE")]
    pub(crate) serial: String,
    /// Path of the control socket.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: Option<PathBuf>,
    /// Broker (`minivmm broker`) that keeps the VM's RAM if this process dies. Needs --backing
    /// memfd or hugetlb.
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    pub(crate) broker: Option<PathBuf>,
    /// Page store through which the VM's pages may go, such as rack-7=file:DIR. The other end of a
    /// migration names it, too, with a URL of its own. URLs: memory:, file:DIR,
    /// redis://HOST:PORT/DB, redis+unix:PATH. May be repeated.
    #[arg(long = "store", value_name = "NAME=URL")]
    pub(crate) stores: Vec<StoreSpec>,
    #[command(flatten)]
    pub(crate) seal: Seal,
}

#[derive(Debug, Args)]
pub struct Seal {
    /// Key file (`minivmm keygen`) with which snapshots, folders of checkpoints and pages in page
    /// stores are sealed.
    /// Nobody can read or change them without the key, and unsealed ones are refused.
    #[arg(long, value_name = "F")]
    pub(crate) seal_key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Feature {
    /// Control socket of the VM's home minivmm. The VM's RAM must be memfd or hugetlb.
    #[arg(long, value_name = "SOCK")]
    pub(crate) attach: PathBuf,
    /// What to do with the VM: write a snapshot to a file ({trip} in its name is the number of the
    /// trip), migrate it by pre-copy to another host (encrypted with --encrypt), or check its
    /// memory.
    #[arg(long = "do", value_name = "snapshot:FILE|migrate:URL|check")]
    pub(crate) work: Work,
    /// Keep the VM for at least this time.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration)]
    pub(crate) hold: Duration,
    /// Repeat at this interval. End it with SIGINT or SIGTERM; the VM is returned first.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) every: Option<Duration>,
    /// End after this number of repetitions.
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) times: Option<u32>,
    /// The VM's home requests it back after this time; by default a minute more than --hold.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) within: Option<Duration>,
    #[command(flatten)]
    pub(crate) encryption: Encryption,
    #[command(flatten)]
    pub(crate) seal: Seal,
    /// Print one JSON object for each trip, and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The purpose for which a VM is borrowed.
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
                // absolute, because the VM's home gets the address, too
                absolute_address(&to).map(Self::Migrate).map_err(String::from)
            }
            None if text == "check" => Ok(Self::Check),
            _ => Err(format!("{text}: snapshot:FILE, migrate:URL or check is meant")),
        }
    }
}

#[derive(Debug, Args)]
pub struct Broker {
    /// Run as the broker at unix:PATH until this process ends. The RAM that it keeps is then freed.
    #[arg(
        long,
        value_name = "unix:PATH",
        value_parser = unix_path,
        required_unless_present = "at",
        conflicts_with_all = ["at", "list", "dump", "forget"]
    )]
    pub(crate) listen: Option<PathBuf>,
    /// Restart a VM whose VMM has died from its last snapshot (`ctl snapshot`, `feature --do
    /// snapshot`), once no process is left that may run the VM. Each restart is printed.
    #[arg(long, requires = "listen")]
    pub(crate) restart: bool,
    /// Broker to send a command to.
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    pub(crate) at: Option<PathBuf>,
    /// List the kept RAM.
    #[arg(long, requires = "at")]
    pub(crate) list: bool,
    /// Write the RAM of a VM to a file, each byte at its guest physical address.
    #[arg(long, value_name = "VM", requires = "at", requires = "out", value_parser = vm_id, conflicts_with = "list")]
    pub(crate) dump: Option<VmId>,
    /// The file to write.
    #[arg(long, value_name = "FILE", requires = "dump")]
    pub(crate) out: Option<PathBuf>,
    /// Free the RAM of a VM whose owner is dead.
    #[arg(long, value_name = "VM", requires = "at", value_parser = vm_id, conflicts_with_all = ["list", "dump"])]
    pub(crate) forget: Option<VmId>,
    /// Print exactly one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub struct Receive {
    /// Address to listen at: tcp:HOST:PORT (port 0 chooses a free port) or unix:PATH. Prints
    /// `listening URL`, and for a host name a line `bound URL` for each of its addresses.
    #[arg(long, value_name = "URL")]
    pub(crate) listen: Address,
    #[command(flatten)]
    pub(crate) common: Common,
    /// The most RAM that an arriving VM may have, such as 256G; by default this host's memory. A VM
    /// with more is refused before any memory is mapped for it.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_memory: Option<u64>,
    /// Kind of memory for guest RAM; by default that of the source.
    #[arg(long, value_parser = backing())]
    pub(crate) backing: Option<Backing>,
    /// In post-copy, what the guest does while the link to its source is lost: run until it needs a
    /// missing page, or pause.
    #[arg(long, default_value = "run")]
    pub(crate) on_link_loss: OnLinkLoss,
    /// Folder into which sources put forward checkpoints (`--fail-safe forward:dir=D`).
    #[arg(long, value_name = "D")]
    pub(crate) checkpoints: Option<PathBuf>,
    /// How dirty pages are found in the next migration of the VM; by default as at the source.
    #[arg(long, value_parser = tracker())]
    pub(crate) tracker: Option<TrackerKind>,
    #[command(flatten)]
    pub(crate) encryption: Encryption,
    /// In a hand-over, leave page tables empty, so that the guest faults on each page. For
    /// measurements of the benefit of filling them.
    #[arg(long, hide = true)]
    pub(crate) cold: bool,
    /// Path that the control socket gets when the VM arrives.
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
pub struct Workload {
    /// List the workloads.
    #[arg(long, conflicts_with = "emit", required_unless_present = "emit")]
    pub(crate) list: bool,
    /// Write a workload as an ELF that any VMM with PVH boot can run.
    #[arg(long, value_name = "NAME[:k=v,…]", requires = "out")]
    pub(crate) emit: Option<String>,
    /// The file to write.
    #[arg(long, value_name = "ELF")]
    pub(crate) out: Option<PathBuf>,
    /// Number of vCPUs that the ELF uses.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) cpus: u32,
}

/// Parses a backing. The help and errors list all backings.
pub(crate) fn backing() -> impl TypedValueParser<Value = Backing> {
    PossibleValuesParser::new(Backing::ALL.map(Backing::name)).try_map(|name| name.parse::<Backing>())
}

/// Parses a kind of tracker. The help and errors list all kinds.
pub(crate) fn tracker() -> impl TypedValueParser<Value = TrackerKind> {
    let kinds = iter::once(TrackerKind::Auto).chain(TrackerKind::ALL);
    PossibleValuesParser::new(kinds.map(TrackerKind::name)).try_map(|name| name.parse::<TrackerKind>())
}
