//! The command line of `minivmm ctl`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use migration_transport::{Address, Bandwidth};

use crate::{
    Impact, StrategyKind, TimeoutAction, Trigger,
    encryption::Encryption,
    values::{FailSafe, duration, fail_safe, number},
};

/// Talk to a running minivmm.
#[derive(Debug, Args)]
pub struct Ctl {
    /// The control socket of the minivmm to talk to.
    #[arg(long, value_name = "SOCK", global = true)]
    pub(super) control: Option<PathBuf>,
    /// Print exactly one JSON object.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// How long the minivmm may take to answer; for commands that may take long (migrate, recover, refresh, snapshot,
    /// memory, cancel, post-copy, switch-over, pause, resume), how long it may show no sign of life.
    #[arg(long, value_name = "TIME", default_value = "10s", global = true, value_parser = duration)]
    pub(super) answer_timeout: Duration,
    #[command(subcommand)]
    pub(super) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum CtlCommand {
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
pub(super) struct Tune {
    /// Most bandwidth from now on, such as 10Gbit or 100MB/s; 0 or unlimited for no limit.
    #[arg(long)]
    pub(super) bandwidth: Option<Bandwidth>,
    /// The longest downtime that is acceptable from now on.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) downtime_limit: Option<Duration>,
}

#[derive(Debug, Args)]
pub(super) struct Refresh {
    /// Again and again, so long from one to the next; the first in so long.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) every: Option<Duration>,
    /// Whenever the VMM has more memory of its own, as in rss>500M.
    #[arg(long, value_name = "rss>SIZE", conflicts_with = "every")]
    pub(super) when: Option<Trigger>,
    /// The successor's program, such as a new build; the one that runs here if not given.
    #[arg(long, value_name = "BINARY")]
    pub(super) exec: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Recover {
    /// Where the destination listens.
    #[arg(long, value_name = "URL")]
    pub(super) to: Address,
    /// Show progress.
    #[arg(long)]
    pub(super) progress: bool,
}

#[derive(Debug, Args)]
pub(super) struct Snapshot {
    /// The file; one that is there is replaced once the snapshot is complete.
    #[arg(long, value_name = "FILE")]
    pub(super) out: PathBuf,
    /// The longest pause that is acceptable.
    #[arg(long, default_value = "100ms", value_parser = duration)]
    pub(super) downtime_limit: Duration,
    /// After this time the guest is paused for as long as it takes; 0 to go on as long as that helps.
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
    /// Bytes.
    #[arg(long, value_parser = number)]
    pub(super) len: u64,
    /// File to write.
    #[arg(long)]
    pub(super) out: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub(super) struct Migrate {
    /// Where a minivmm receives: tcp:HOST:PORT or unix:PATH.
    #[arg(long, value_name = "URL")]
    pub(super) to: Address,
    /// How it moves: pre-copy, stop-and-copy, post-copy, hybrid[:rounds=N], or, to a process of this machine (unix:PATH) that
    /// takes over RAM where it is, handover.
    #[arg(long, default_value = "pre-copy")]
    pub(super) strategy: StrategyKind,
    /// In post-copy, in which order pages are pushed that nobody waits for: linear, bubbling,
    /// multi-pivot[:k=7,dir=dual], hot-first or random.
    #[arg(long, default_value = "multi-pivot", value_parser = push_order)]
    pub(super) push_order: String,
    /// Connections for pages that the guest waits for; 0 rules post-copy out.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=16))]
    pub(super) demand_lanes: u16,
    /// In post-copy, what a fault on a transparent huge page fetches.
    #[arg(long, default_value = "split")]
    pub(super) huge: Huge,
    /// Connections for pages.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(super) streams: u16,
    /// The longest downtime that is acceptable. Where it cannot be kept, however long the migration goes on, what
    /// --on-timeout says is done at once.
    #[arg(long, default_value = "300ms", value_parser = duration)]
    pub(super) downtime_limit: Duration,
    /// The longest time in the pause without a sign of life from the destination: after it the guest runs on here, and the
    /// migration has failed. Four times the downtime limit, but at least 2s, if not given.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) pause_limit: Option<Duration>,
    /// The longest pause, although the destination makes progress. Ten times the predicted downtime or the downtime limit, but at
    /// least 10s, if not given; more where much memory moves in the pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) pause_total: Option<Duration>,
    /// Most bandwidth, such as 10Gbit or 100MB/s; 0 for no limit.
    #[arg(long, default_value = "0")]
    pub(super) bandwidth: Bandwidth,
    /// How long it may take until the hand-over; 0 for ever.
    #[arg(long, default_value = "0", value_parser = duration)]
    pub(super) timeout: Duration,
    /// What happens then, or sooner, as soon as it is certain that the downtime limit cannot be kept: cancel, stop (switch over
    /// whatever the downtime), or post-copy.
    #[arg(long, default_value = "cancel")]
    pub(super) on_timeout: TimeoutAction,
    /// How long the destination may take until it has built the VM, and be silent until then.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub(super) setup_timeout: Duration,
    /// In post-copy, protect the VM against the death of its destination (reverse), of its source (forward), or of either:
    /// none|reverse|forward|both[:interval=100ms,detect=1s,dir=D]. Both ends run on one host: nobody can tell a death
    /// from a cut across hosts.
    #[arg(long, default_value = "none", value_parser = fail_safe)]
    pub(super) fail_safe: FailSafe,
    /// How much the guest may be disturbed.
    #[arg(long, default_value = "balanced")]
    pub(super) guest_impact: Impact,
    /// Checksum of page data, beside TCP's own.
    #[arg(long)]
    pub(super) checksum: bool,
    #[command(flatten)]
    pub(super) encryption: Encryption,
    /// Show progress on stderr.
    #[arg(long)]
    pub(super) progress: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Huge {
    /// A fault fetches the whole huge page, which stays one.
    Whole,
    /// A fault fetches 4 KiB.
    Split,
}

/// Checked here, so that a wrong one is a usage error; kept as text, as which it goes through the control socket.
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
