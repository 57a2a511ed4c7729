//! `minivmm ctl`: asks a running minivmm, and shows the answer to a person or a program.

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

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use crate::{
    cli::{Ctl, CtlCommand, Huge, Impact, Migrate, Refresh, Snapshot, TimeoutAction, absolute},
    control::{MigrateRequest, Request, SnapshotRequest, ask_within},
    refresh::{Plan, Trigger},
    report,
};

/// Runs a `ctl` command; the exit status.
pub(crate) fn run(ctl: &Ctl) -> u8 {
    let Some(socket) = ctl.control.as_deref() else {
        return usage(ctl.json, "--control SOCK is missing");
    };
    let server = Server { socket, patience: ctl.answer_timeout, as_json: ctl.json };
    match &ctl.command {
        CtlCommand::Migrate(args) => {
            let request = match args.encryption.check().and_then(|()| migrate_request(args)) {
                Ok(request) => request,
                Err(why) => return usage(ctl.json, &why),
            };
            let strategy = request.strategy.clone();
            server.wait_for_end(&Request::Migrate(Box::new(request)), "migration", &strategy, args.progress)
        }
        CtlCommand::Snapshot(args) => match snapshot_request(args) {
            Ok(request) => server.wait_for_end(&Request::Snapshot(request), "snapshot", "snapshot", args.progress),
            Err(why) => usage(ctl.json, &why),
        },
        CtlCommand::Refresh(args) if args.every.is_none() && args.when.is_none() => match plan(args) {
            Ok(plan) => server.wait_for_end(&Request::Refresh(plan), "refresh", "handover", false),
            Err(why) => usage(ctl.json, &why),
        },
        CtlCommand::Recover(args) => {
            let request = Request::Recover { to: args.to.to_string(), progress: args.progress };
            server.wait_for_end(&request, "migration", "", args.progress)
        }
        other => {
            let request = match request(other) {
                Ok(request) => request,
                Err(why) => return usage(ctl.json, &why),
            };
            match ask_within(socket, &request, ctl.answer_timeout, &mut |_| {}) {
                Ok(answer) => {
                    if ctl.json {
                        println!("{answer}");
                    } else {
                        print!("{}", lines(&answer));
                    }
                    0
                }
                Err(why) => fail(ctl.json, &why),
            }
        }
    }
}

/// A wrong command line: status 2.
pub(crate) fn usage(as_json: bool, why: &str) -> u8 {
    if as_json {
        println!("{}", json!({"error": why, "outcome": "failed", "reason": why}));
    } else {
        eprintln!("minivmm: {why}");
    }
    2
}

fn fail(as_json: bool, why: &str) -> u8 {
    if as_json {
        println!("{}", json!({"error": why}));
    } else {
        eprintln!("minivmm: {why}");
    }
    1
}

fn request(command: &CtlCommand) -> Result<Request, String> {
    Ok(match command {
        CtlCommand::Status => Request::Status,
        CtlCommand::Pause => Request::Pause,
        CtlCommand::Resume => Request::Resume,
        CtlCommand::Cancel => Request::Cancel,
        CtlCommand::Adopt => Request::Adopt,
        CtlCommand::Quit => Request::Quit,
        CtlCommand::Memory(m) => {
            // the server writes the file: its working directory may be another one
            let out = absolute(&m.out)?;
            Request::Memory { gpa: m.gpa, len: m.len, out }
        }
        CtlCommand::Migrate(_) | CtlCommand::Recover(_) | CtlCommand::Snapshot(_) => {
            return Err("that waits for its end".into());
        }
        CtlCommand::PostCopy => Request::PostCopy,
        CtlCommand::SwitchOver => Request::SwitchOver,
        CtlCommand::Tune(args) => Request::Tune {
            // as in a migration's request
            bandwidth_bits: args.bandwidth.map(|bandwidth| bandwidth.bits_per_second().unwrap_or(0)),
            downtime_limit_us: args.downtime_limit.map(us),
        },
        CtlCommand::Refresh(args) => Request::Refresh(plan(args)?),
    })
}

fn plan(args: &Refresh) -> Result<Plan, String> {
    // as above
    let exec = args.exec.as_ref().map(absolute).transpose()?;
    let every = args.every.map(|time| Trigger::Every(us(time)));
    Ok(Plan { exec, trigger: every.or(args.when.clone()) })
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn impact(impact: Impact) -> String {
    match impact {
        Impact::Low => "low",
        Impact::Balanced => "balanced",
        Impact::Fast => "fast",
    }
    .into()
}

fn snapshot_request(args: &Snapshot) -> Result<SnapshotRequest, String> {
    Ok(SnapshotRequest {
        // as for `memory`
        out: absolute(&args.out)?,
        downtime_limit_us: us(args.downtime_limit),
        timeout_us: us(args.timeout),
        impact: impact(args.guest_impact),
        progress: args.progress,
    })
}

fn migrate_request(args: &Migrate) -> Result<MigrateRequest, String> {
    Ok(MigrateRequest {
        to: args.to.to_string(),
        strategy: args.strategy.to_string(),
        streams: args.streams,
        downtime_limit_us: us(args.downtime_limit),
        bandwidth_bits: args.bandwidth.bits_per_second().unwrap_or(0),
        timeout_us: us(args.timeout),
        on_timeout: match args.on_timeout {
            TimeoutAction::Cancel => "cancel",
            TimeoutAction::Stop => "stop",
            TimeoutAction::PostCopy => "post-copy",
        }
        .into(),
        setup_timeout_us: us(args.setup_timeout),
        push_order: args.push_order.clone(),
        demand_lanes: args.demand_lanes,
        whole_huge_pages: matches!(args.huge, Huge::Whole),
        impact: impact(args.guest_impact),
        fail_safe: args.fail_safe.clone(),
        checksum: args.checksum,
        // the server reads the keys
        encryption: args.encryption.absolute()?,
        progress: args.progress,
    })
}

/// Exit status of a command that was interrupted by SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

/// The minivmm that is asked, and how its answers are shown.
struct Server<'a> {
    socket: &'a Path,
    /// How long it may show no sign of life.
    patience: Duration,
    as_json: bool,
}

impl Server<'_> {
    /// Sends a request that ends when a migration or a snapshot (`what`) does, and tells how.
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
            Err(why) => (report::not_begun(strategy, &why), 1),
        };
        self.show(&report);
        status
    }

    fn show(&self, report: &Value) {
        if self.as_json {
            println!("{report}");
        } else {
            print!("{}", report::to_lines(report));
        }
    }

    /// From here on SIGINT ends this command with a word about what goes on without it.
    fn say_what_goes_on(&self, what: &'static str, strategy: &str, begun: Arc<AtomicBool>) -> Result<(), String> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        // threads that are started from here on inherit that
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
                println!("{report}");
            } else {
                eprintln!("\nminivmm: {why}");
            }
            std::process::exit(INTERRUPTED.into());
        };
        thread::Builder::new().name("signals".into()).spawn(body).map(drop).map_err(|e| format!("no thread: {e}"))
    }
}

/// Progress on stderr: a bar on a terminal, a line now and then elsewhere.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new(1);
        let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {percent:>3}% {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(Some(bar))
    }

    fn show(&self, p: &Value) {
        let number = |key: &str| p[key].as_f64().map_or("-".to_owned(), |n| format!("{n:.0}"));
        let message = format!(
            "round {} · {} Mbit/s · dirty {}/s · throttle {} % · downtime {} ms · left {} ms",
            number("round"),
            number("mbps"),
            number("dirty_pages_per_second"),
            number("throttle_percent"),
            number("expected_downtime_ms"),
            number("eta_ms"),
        );
        match &self.0 {
            Some(bar) => {
                bar.set_length(p["round_pages"].as_u64().unwrap_or(1).max(1));
                bar.set_position(p["round_sent"].as_u64().unwrap_or(0));
                bar.set_message(message);
            }
            None => eprintln!("{:>8} ms  {message}", number("elapsed_ms")),
        }
    }

    fn finish(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// A JSON value as aligned lines.
pub(crate) fn lines(value: &Value) -> String {
    fn add(rows: &mut Vec<(String, String)>, name: String, value: &Value) {
        match value {
            Value::Object(map) => {
                let prefix = if name.is_empty() { name } else { name + "." };
                map.iter().for_each(|(key, value)| add(rows, format!("{prefix}{key}"), value));
            }
            Value::String(text) => rows.push((name, text.clone())),
            Value::Null => rows.push((name, "-".into())),
            other => rows.push((name, other.to_string())),
        }
    }
    let mut rows = Vec::new();
    add(&mut rows, String::new(), value);
    report::aligned(&rows)
}
