//! The command line of `minivmm ctl`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use migration_core::working_set::ResidentLimit;
use migration_transport::{Address, Bandwidth};

use crate::{
    Impact, StoreSpec, StrategyKind, TimeoutAction, Trigger,
    encryption::Encryption,
    values::{FailSafe, duration, fail_safe, number},
};

/// Send a command to a running minivmm.
#[derive(Debug, Args)]
pub struct Ctl {
    /// Control socket of the minivmm.
    #[arg(long, value_name = "SOCK", global = true)]
    pub(super) control: Option<PathBuf>,
    /// Print exactly one JSON object.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// How long the minivmm may take to answer. For commands that may take long (migrate, recover,
    /// refresh, snapshot, memory, cancel, post-copy, switch-over, pause, resume), how long it may
    /// be silent.
    #[arg(long, value_name = "TIME", default_value = "10s", global = true, value_parser = duration)]
    pub(super) answer_timeout: Duration,
    #[command(subcommand)]
    pub(super) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum CtlCommand {
    /// Show the state of the VM and of a migration.
    Status,
    /// Stop the vCPUs, also while a migration copies pages. The VM then stays paused where it
    /// arrives, or here if the migration fails.
    Pause,
    /// Let the vCPUs run, also while a migration copies pages.
    Resume,
    /// Cancel the current migration. Returns when everything is freed.
    Cancel,
    /// State that the source is dead, and run the VM that is held here.
    Adopt,
    /// End the process, and the VM with it.
    Quit,
    /// Copy guest RAM to a file.
    Memory(Memory),
    /// Write the VM as it is at one moment to a file while it runs. `run --restore` starts it from
    /// there.
    Snapshot(Snapshot),
    /// Migrate the VM.
    Migrate(Box<Migrate>),
    /// Replace this VMM while its VM runs: it starts a successor that takes over the VM, the path
    /// of the control socket and the serial port (HyperFresh).
    Refresh(Refresh),
    /// Switch a migration that copies pages to post-copy: the VM is handed over, and the rest
    /// follows.
    PostCopy,
    /// Switch over a migration that copies pages now: the guest is paused and everything left is
    /// sent, however long that takes. A hybrid hands over now, and the rest follows.
    SwitchOver,
    /// Change the limits of the current migration at once, or the downtime limit of a snapshot.
    /// `status` shows them.
    Tune(Tune),
    /// Change how much of the RAM of a VM that was run with --cold-store stays resident. With off,
    /// all pages are read back from the store.
    ResidentLimit {
        /// A size such as 512M; auto for the working set; off for no limit.
        #[arg(value_name = "SIZE|auto|off")]
        limit: ResidentLimit,
    },
    /// At a source that has lost its link after the hand-over: reconnect at this address, and wait
    /// like `migrate`.
    Recover(Recover),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct Tune {
    /// New bandwidth limit, such as 10Gbit or 100MB/s; 0 or unlimited for no limit.
    #[arg(long)]
    pub(super) bandwidth: Option<Bandwidth>,
    /// New limit of the downtime.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) downtime_limit: Option<Duration>,
}

#[derive(Debug, Args)]
pub(super) struct Refresh {
    /// Repeat at this interval; the first refresh is after this time.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) every: Option<Duration>,
    /// Refresh when the VMM's own memory exceeds a size, as in rss>500M.
    #[arg(long, value_name = "rss>SIZE", conflicts_with = "every")]
    pub(super) when: Option<Trigger>,
    /// Program of the successor, such as a new build; by default the program that runs here.
    #[arg(long, value_name = "BINARY")]
    pub(super) exec: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Recover {
    /// Address of the destination.
    #[arg(long, value_name = "URL")]
    pub(super) to: Address,
    /// Show progress.
    #[arg(long)]
    pub(super) progress: bool,
}

#[derive(Debug, Args)]
pub(super) struct Snapshot {
    /// The file to write. An existing file is replaced when the snapshot is complete.
    #[arg(long, value_name = "FILE")]
    pub(super) out: PathBuf,
    /// The longest acceptable pause.
    #[arg(long, default_value = "100ms", value_parser = duration)]
    pub(super) downtime_limit: Duration,
    /// After this time the guest is paused for as long as the snapshot takes. 0 continues while
    /// further passes shorten the pause.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub(super) timeout: Duration,
    /// How much the guest may be disturbed.
    #[arg(long, default_value = "balanced")]
    pub(super) guest_impact: Impact,
    /// Show progress on stderr.
    #[arg(long)]
    pub(super) progress: bool,
}

#[derive(Debug, Args)]
pub(super) struct Memory {
    /// Guest physical address, decimal or 0x….
    #[arg(long, value_parser = number)]
    pub(super) gpa: u64,
    /// Number of bytes.
    #[arg(long, value_parser = number)]
    pub(super) len: u64,
    /// The file to write.
    #[arg(long)]
    pub(super) out: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub(super) struct Migrate {
    /// Address at which a minivmm receives: tcp:HOST:PORT or unix:PATH.
    #[arg(long, value_name = "URL")]
    pub(super) to: Address,
    /// Strategy: pre-copy, stop-and-copy, post-copy, hybrid[:rounds=N], scatter-gather[:replicas=N]
    /// through page stores, agile (pages in a --cold-store stay there), or handover to a process on
    /// this host (unix:PATH) that takes over the RAM in place.
    #[arg(long, default_value = "pre-copy")]
    pub(super) strategy: StrategyKind,
    /// In post-copy, the order in which pages are pushed for which the guest does not wait: linear,
    /// bubbling, multi-pivot[:k=7,dir=dual], hot-first or random.
    #[arg(long, default_value = "multi-pivot", value_parser = push_order)]
    pub(super) push_order: String,
    /// Number of connections for pages for which the guest waits; 0 excludes post-copy.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=16))]
    pub(super) demand_lanes: u16,
    /// In post-copy, what a fault on a transparent huge page fetches.
    #[arg(long, default_value = "split")]
    pub(super) huge: Huge,
    /// Number of connections for pages.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(super) streams: u16,
    /// The longest acceptable downtime. If it cannot be kept, however long the migration goes on,
    /// the action of --on-timeout is taken at once.
    #[arg(long, default_value = "300ms", value_parser = duration)]
    pub(super) downtime_limit: Duration,
    /// In the pause, the longest time without a reaction of the destination. After it the guest
    /// runs on here, and the migration has failed. By default four times the downtime limit, but at
    /// least 2s.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) pause_limit: Option<Duration>,
    /// The longest pause if the destination makes progress. By default ten times the predicted
    /// downtime or the downtime limit, but at least 10s, and more if much memory is sent in the
    /// pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) pause_total: Option<Duration>,
    /// Bandwidth limit, such as 10Gbit or 100MB/s; 0 for no limit.
    #[arg(long, default_value = "0")]
    pub(super) bandwidth: Bandwidth,
    /// Time limit until the hand-over; 0 for no limit.
    #[arg(long, default_value = "0", value_parser = duration)]
    pub(super) timeout: Duration,
    /// Action after the time limit, or earlier, as soon as it is certain that the downtime limit
    /// cannot be kept: cancel, stop (switch over whatever the downtime), or post-copy.
    #[arg(long, default_value = "cancel")]
    pub(super) on_timeout: TimeoutAction,
    /// How long the destination may take until it has built the VM, and may be silent until then.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub(super) setup_timeout: Duration,
    /// In post-copy, protect the VM against the death of its destination (reverse), of its source
    /// (forward), or of either: none|reverse|forward|both[:interval=100ms,detect=1s,dir=D]. Both
    /// ends must run on one host, because a death cannot be distinguished from a cut link across
    /// hosts.
    #[arg(long, default_value = "none", value_parser = fail_safe)]
    pub(super) fail_safe: FailSafe,
    /// How much the guest may be disturbed.
    #[arg(long, default_value = "balanced")]
    pub(super) guest_impact: Impact,
    /// Checksum of page data, in addition to TCP's own.
    #[arg(long)]
    pub(super) checksum: bool,
    #[command(flatten)]
    pub(super) encryption: Encryption,
    /// Page store, beside those with which the VM was started (`run --store`). The destination must
    /// know a store of the same name. May be repeated.
    #[arg(long = "store", value_name = "NAME=URL")]
    pub(super) stores: Vec<StoreSpec>,
    /// Name of a page store through which pages go in scatter-gather; by default all stores. May be
    /// repeated.
    #[arg(long, value_name = "NAME")]
    pub(super) through: Vec<String>,
    /// In scatter-gather, limit of what the destination reads from page stores while nobody waits for
    /// it, such as 1Gbit; 0 for no limit.
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub(super) gather_rate: Bandwidth,
    /// Show progress on stderr.
    #[arg(long)]
    pub(super) progress: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Huge {
    /// A fault fetches the whole huge page, which stays a huge page.
    Whole,
    /// A fault fetches 4 KiB.
    Split,
}

/// Checks a push order, so that an invalid order is a usage error. The control socket transfers the
/// order as text.
fn push_order(text: &str) -> Result<String, String> {
    migration_core::strategy::push_order::parse(text).map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        _ctl: Ctl,
    }

    #[test]
    fn the_command_line_is_consistent() {
        Line::command().debug_assert();
    }
}
