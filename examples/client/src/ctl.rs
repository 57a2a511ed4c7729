//! `minivmm ctl`: sends a command to a running minivmm, and shows the answer to a person or a
//! program.

mod args;

use std::{
    io::IsTerminal,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

pub use args::Ctl;
use args::{CtlCommand, Huge, Migrate, Refresh, Snapshot};
use indicatif::{ProgressBar, ProgressStyle};
use migration_core::text::{Escaped, describe};
use migration_transport::Bandwidth;
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use crate::{
    MigrateRequest, PageStoreOptions, Plan, Request, SnapshotRequest, StoreSpec, StrategyKind, Trigger, ask_within,
    log, report,
    values::{InvalidValue, absolute, absolute_address, micros},
};

/// Runs the command, and returns the exit status.
pub fn run(ctl: &Ctl) -> u8 {
    let Some(socket) = ctl.control.as_deref() else {
        return usage(ctl.json, "--control SOCK is missing");
    };
    let server = Server { socket, patience: ctl.answer_timeout, as_json: ctl.json };
    match &ctl.command {
        CtlCommand::Migrate(args) => {
            if let Err(error) = args.encryption.check() {
                return usage(ctl.json, &describe(error));
            }
            let request = match migrate_request(args) {
                Ok(request) => request,
                Err(error) => return usage(ctl.json, &error.to_string()),
            };
            let strategy = args.strategy.to_string();
            server.wait_for_end(&Request::Migrate(Box::new(request)), "migration", &strategy, args.progress)
        }
        CtlCommand::Snapshot(args) => match snapshot_request(args) {
            Ok(request) => server.wait_for_end(&Request::Snapshot(request), "snapshot", "snapshot", args.progress),
            Err(error) => usage(ctl.json, &error.to_string()),
        },
        CtlCommand::Refresh(args) if args.every.is_none() && args.when.is_none() => match plan(args) {
            Ok(plan) => server.wait_for_end(&Request::Refresh(plan), "refresh", "handover", false),
            Err(error) => usage(ctl.json, &error.to_string()),
        },
        CtlCommand::Recover(args) => {
            // the server connects, and its working directory may differ
            let to = match absolute_address(&args.to) {
                Ok(to) => to,
                Err(error) => return usage(ctl.json, &error.to_string()),
            };
            let request = Request::Recover { to, progress: args.progress };
            server.wait_for_end(&request, "migration", "", args.progress)
        }
        other => {
            let request = match request(other) {
                Ok(request) => request,
                Err(error) => return usage(ctl.json, &error.to_string()),
            };
            match ask_within(socket, &request, ctl.answer_timeout, &mut |_| {}) {
                Ok(answer) => {
                    if ctl.json {
                        out!("{answer}");
                    } else {
                        log::print(&lines(&answer));
                    }
                    0
                }
                Err(error) => fail(ctl.json, &describe(error)),
            }
        }
    }
}

/// Reports a wrong command line, and returns its exit status, 2.
pub fn usage(as_json: bool, why: &str) -> u8 {
    if as_json {
        out!("{}", json!({"error": why, "outcome": "failed", "reason": why}));
    } else {
        log!("{why}");
    }
    2
}

/// Reports a failure, and returns its exit status, 1.
pub fn fail(as_json: bool, why: &str) -> u8 {
    if as_json {
        out!("{}", json!({"error": why}));
    } else {
        log!("{why}");
    }
    1
}

fn request(command: &CtlCommand) -> Result<Request, InvalidValue> {
    Ok(match command {
        CtlCommand::Status => Request::Status,
        CtlCommand::Pause => Request::Pause,
        CtlCommand::Resume => Request::Resume,
        CtlCommand::Cancel => Request::Cancel,
        CtlCommand::Adopt => Request::Adopt,
        CtlCommand::Quit => Request::Quit,
        CtlCommand::Memory(m) => {
            // the server writes the file, and its working directory may differ
            let out = absolute(&m.out)?;
            Request::Memory { gpa: m.gpa, len: m.len, out }
        }
        CtlCommand::Migrate(_) | CtlCommand::Recover(_) | CtlCommand::Snapshot(_) => {
            return Err(InvalidValue::new("that waits for its end".into()));
        }
        CtlCommand::PostCopy => Request::PostCopy,
        CtlCommand::SwitchOver => Request::SwitchOver,
        CtlCommand::ResidentLimit { limit } => Request::ResidentLimit { limit: *limit },
        CtlCommand::Tune(args) => Request::Tune {
            // 0 means no limit, as in the request of a migration
            bandwidth_bits: args.bandwidth.map(|bandwidth| bandwidth.bits_per_second().unwrap_or(0)),
            downtime_limit_us: args.downtime_limit.map(micros),
        },
        CtlCommand::Refresh(args) => Request::Refresh(plan(args)?),
    })
}

fn plan(args: &Refresh) -> Result<Plan, InvalidValue> {
    // the server starts the program, and its working directory may differ
    let exec = args.exec.as_ref().map(absolute).transpose()?;
    let every = args.every.map(|time| Trigger::Every(micros(time)));
    Ok(Plan { exec, trigger: every.or(args.when.clone()) })
}

fn snapshot_request(args: &Snapshot) -> Result<SnapshotRequest, InvalidValue> {
    Ok(SnapshotRequest {
        // the server writes the file, and its working directory may differ
        out: absolute(&args.out)?,
        downtime_limit: args.downtime_limit,
        timeout: args.timeout,
        impact: args.guest_impact,
        progress: args.progress,
    })
}

fn migrate_request(args: &Migrate) -> Result<MigrateRequest, InvalidValue> {
    Ok(MigrateRequest {
        // the server connects, and its working directory may differ
        to: absolute_address(&args.to)?,
        strategy: args.strategy,
        streams: args.streams,
        downtime_limit: args.downtime_limit,
        pause_limit: args.pause_limit,
        pause_total: args.pause_total,
        bandwidth: args.bandwidth,
        timeout: args.timeout,
        on_timeout: args.on_timeout,
        setup_timeout: args.setup_timeout,
        push_order: args.push_order.clone(),
        demand_lanes: args.demand_lanes,
        whole_huge_pages: matches!(args.huge, Huge::Whole),
        impact: args.guest_impact,
        fail_safe: args.fail_safe.clone(),
        checksum: args.checksum,
        // the server reads the keys, and its working directory may differ
        encryption: args.encryption.absolute()?,
        page_stores: page_stores(args)?,
        progress: args.progress,
    })
}

fn page_stores(args: &Migrate) -> Result<PageStoreOptions, InvalidValue> {
    let used = !args.through.is_empty() || args.gather_rate != Bandwidth::UNLIMITED;
    if used && !matches!(args.strategy, StrategyKind::ScatterGather { .. }) {
        return Err(InvalidValue::new("--through and --gather-rate are options of --strategy scatter-gather".into()));
    }
    Ok(PageStoreOptions {
        // the server opens the stores, and its working directory may differ
        stores: args.stores.iter().map(StoreSpec::absolute).collect::<Result<_, _>>()?,
        through: args.through.clone(),
        gather_rate: args.gather_rate,
    })
}

/// The exit status of a command that was interrupted by SIGINT, as shells define it.
const INTERRUPTED: u8 = 130;

/// The minivmm that gets the requests, and the form in which its answers are shown.
struct Server<'a> {
    socket: &'a Path,
    /// The longest time without a sign of life of the server.
    patience: Duration,
    as_json: bool,
}

impl Server<'_> {
    /// Sends a request that ends when a migration or a snapshot (`what`) does, and shows the
    /// result. Returns the exit status.
    fn wait_for_end(&self, request: &Request, what: &'static str, strategy: &str, progress: bool) -> u8 {
        let begun = Arc::new(AtomicBool::new(false));
        if let Err(why) = self.say_what_goes_on(what, strategy, begun.clone()) {
            return fail(self.as_json, &why);
        }
        let bar = progress.then(Bar::new);
        let answer = ask_within(self.socket, request, self.patience, &mut |line| {
            begun.store(true, Ordering::Relaxed);
            if let (Some(bar), Some(p)) = (&bar, line) {
                bar.show(p);
            }
        });
        if let Some(bar) = bar {
            bar.finish();
        }
        let (report, status) = match answer {
            Ok(report) => {
                let status = report::exit_status(report["outcome"].as_str().unwrap_or("failed"));
                (report, status)
            }
            Err(error) => (report::not_begun(strategy, &describe(error)), 1),
        };
        self.show(&report);
        status
    }

    fn show(&self, report: &Value) {
        if self.as_json {
            out!("{report}");
        } else {
            log::print(&report::to_lines(report));
        }
    }

    /// Makes SIGINT end this command with a message about what continues without the command.
    fn say_what_goes_on(&self, what: &'static str, strategy: &str, begun: Arc<AtomicBool>) -> Result<(), String> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        // threads that are started from here on inherit the blocked signal
        signals.thread_block().map_err(|e| format!("SIGINT: {e}"))?;
        let socket = self.socket.display().to_string();
        let (as_json, mut report) = (self.as_json, report::not_begun(strategy, ""));
        let body = move || {
            if signals.wait().is_err() {
                return;
            }
            let ctl = |command: &str| format!("`minivmm ctl --control {socket} {command}`");
            let (cancel, status) = (ctl("cancel"), ctl("status"));
            let why = if begun.load(Ordering::Relaxed) {
                format!("interrupted: the {what} goes on; {cancel} ends it, {status} shows it")
            } else {
                format!("interrupted before the minivmm has answered: {status} shows whether the {what} has begun")
            };
            if as_json {
                (report["outcome"], report["reason"]) = (json!("under-way"), json!(why));
                out!("{report}");
            } else {
                note!("");
                log!("{why}");
            }
            std::process::exit(log::finish(INTERRUPTED, false).into());
        };
        thread::Builder::new().name("signals".into()).spawn(body).map(drop).map_err(|e| format!("no thread: {e}"))
    }
}

/// Progress on stderr: a bar on a terminal, or occasional lines elsewhere.
struct Bar(Option<ProgressBar>);

/// The number of steps of the whole bar.
const STEPS: u64 = 1000;

impl Bar {
    fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new(STEPS);
        let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {percent:>3}% {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(Some(bar))
    }

    fn show(&self, p: &Value) {
        let message = progress_line(p);
        let share = p["share_done"].as_f64().unwrap_or(0.0);
        match &self.0 {
            Some(bar) => {
                bar.set_position((share * STEPS as f64) as u64);
                bar.set_message(message);
            }
            None => {
                let elapsed = p["elapsed_ms"].as_f64().unwrap_or(0.0);
                note!("{elapsed:>8.0} ms  {:>3.0} %  {message}", (share * 100.0).floor());
            }
        }
    }

    fn finish(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Returns the text that shows a migration's progress. An unknown figure is a dash.
fn progress_line(p: &Value) -> String {
    let number = |key: &str| p[key].as_f64().map_or("-".to_owned(), |n| format!("{n:.0}"));
    let ms =
        |key: &str| p[key].as_f64().map(|ms| if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") });
    // in the first round the guest's write rate is unknown, so only the part that nothing can
    // shorten is shown
    let downtime = match (ms("expected_downtime_ms"), ms("least_downtime_ms")) {
        (Some(expected), _) => expected,
        (None, Some(least)) => format!("- (at least {least})"),
        (None, None) => "-".into(),
    };
    let left = p["eta_ms"].as_f64().map_or("-".to_owned(), |ms| format!("{:.1} s", ms / 1e3));
    format!(
        "round {} · {} Mbit/s · dirty {}/s · throttle {} % · downtime {downtime} · left {left}",
        number("round"),
        number("mbps"),
        number("dirty_pages_per_second"),
        number("throttle_percent"),
    )
}

/// Returns a JSON value as aligned lines.
pub fn lines(value: &Value) -> String {
    fn add(rows: &mut Vec<(String, String)>, name: String, value: &Value) {
        match value {
            Value::Object(map) => {
                let prefix = if name.is_empty() { name } else { name + "." };
                // the process at the socket may be any program
                map.iter().for_each(|(key, value)| add(rows, format!("{prefix}{}", Escaped(key)), value));
            }
            Value::String(text) => rows.push((name, Escaped(text).to_string())),
            Value::Null => rows.push((name, "-".into())),
            other => rows.push((name, Escaped(&other.to_string()).to_string())),
        }
    }
    let mut rows = Vec::new();
    add(&mut rows, String::new(), value);
    report::aligned(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_what_is_known_and_dashes_for_the_rest() {
        let first = json!({"round": 1, "mbps": 812.0, "dirty_pages_per_second": null, "throttle_percent": 0,
            "expected_downtime_ms": null, "least_downtime_ms": 3.25, "eta_ms": 12_345.6, "share_done": 0.1});
        let shown = "round 1 · 812 Mbit/s · dirty -/s · throttle 0 % · downtime - (at least 3.2 ms) · left 12.3 s";
        assert_eq!(progress_line(&first), shown);
        let later = json!({"round": 2, "mbps": 812.0, "dirty_pages_per_second": 99.6, "throttle_percent": 20,
            "expected_downtime_ms": 12.4, "least_downtime_ms": 3.25, "eta_ms": null});
        let shown = "round 2 · 812 Mbit/s · dirty 100/s · throttle 20 % · downtime 12 ms · left -";
        assert_eq!(progress_line(&later), shown);
        // progress from a server of an earlier build
        assert!(progress_line(&json!({"round": 1})).ends_with("downtime - · left -"));
    }
}
