//! `minivmm demo`: migrates a working guest between two processes and prints a table.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use minivmm_client::{MigrateRequest, Request, StrategyKind, ask, log, values::size};
use serde_json::Value;

use crate::bench::process::{Folder, program};

/// The options of `minivmm demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Guest RAM.
    #[arg(long, default_value = "1G", value_parser = size)]
    memory: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// The workload that moves.
    #[arg(long, default_value = "hot:size=64M,data=700M")]
    workload: String,
}

/// The longest time until the guest works.
const START: Duration = Duration::from_secs(60);

/// Runs the demo. Returns the exit status.
pub fn run(args: &Demo) -> u8 {
    match demo(args) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(why) => {
            note!("minivmm demo: {why}");
            1
        }
    }
}

/// A child process. Killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(args: &[&str]) -> Result<Process, String> {
    let child = Command::new(program()?).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    child.map(Process).map_err(|e| format!("starting a process: {e}"))
}

fn demo(args: &Demo) -> Result<bool, String> {
    let folder = Folder::named("demo")?;
    let (source_socket, destination_socket) = (folder.path("source"), folder.path("destination"));
    let text = |p: &Path| p.to_string_lossy().into_owned();
    let (memory, cpus) = (args.memory.to_string(), args.cpus.to_string());

    say("starting a source, with a guest that runs", &args.workload);
    let mut source = spawn(&[
        "run",
        "--memory",
        &memory,
        "--cpus",
        &cpus,
        "--workload",
        &args.workload,
        "--control",
        &text(&source_socket),
    ])?;
    say("starting a destination", "");
    let mut destination = spawn(&["receive", "--listen", "tcp:127.0.0.1:0", "--control", &text(&destination_socket)])?;
    let mut line = String::new();
    let out = destination.0.stdout.take().ok_or("no output of the destination")?;
    BufReader::new(out).read_line(&mut line).map_err(|e| e.to_string())?;
    let url = line.trim().strip_prefix("listening ").ok_or("the destination did not say where it listens")?.to_owned();
    say("it listens at", &url);

    wait_for(&source_socket, &mut source, |status| {
        status["workload"]["state"] == "running" && status["workload"]["heartbeats"].as_u64() > Some(100)
    })?;
    let before = ask(&source_socket, &Request::Status, |_| {})?;
    say("the guest works; migrating it", "");
    let to = url.parse().map_err(|e| format!("{url}: {e}"))?;
    let request = MigrateRequest { progress: true, ..MigrateRequest::plain(to, StrategyKind::PreCopy, 2) };
    let report = ask(&source_socket, &Request::Migrate(Box::new(request)), |p| {
        note!("  round {} · {} of {} pages", p["round"], p["round_sent"], p["round_pages"]);
    })?;
    if report["outcome"] != "completed" {
        return Err(format!("the migration {}: {}", report["outcome"], report["reason"]));
    }
    let ended = source.0.wait().map_err(|e| e.to_string())?;
    let at_arrival = ask(&destination_socket, &Request::Status, |_| {})?;
    wait_for(&destination_socket, &mut destination, |status| {
        status["workload"]["operations"].as_u64() > at_arrival["workload"]["operations"].as_u64()
    })?;
    let after = ask(&destination_socket, &Request::Status, |_| {})?;
    ask(&destination_socket, &Request::Quit, |_| {})?;

    let ms = |key: &str| report[key].as_f64().map_or("-".into(), |v| format!("{v:.1} ms"));
    let mib = |key: &str| report[key].as_f64().map_or("-".into(), |v| format!("{:.1} MiB", v / 1048576.0));
    let errors = after["workload"]["errors"].as_u64();
    out!("");
    for (name, value) in [
        ("strategy", report["strategy"].as_str().unwrap_or("-").to_owned()),
        ("guest RAM", mib("ram_bytes")),
        ("on the wire", mib("wire_bytes")),
        ("total time", ms("total_ms")),
        ("of it, preparing", ms("setup_ms")),
        ("downtime", ms("downtime_ms")),
        ("predicted downtime", ms("predicted_downtime_ms")),
        ("rounds", report["rounds"].to_string()),
        ("pages sent", format!("{} plain, {} zero", report["pages"]["plain"], report["pages"]["zero"])),
        ("pages never touched", report["pages"]["hole"].to_string()),
        ("throttle", format!("{} %", report["throttle_percent"])),
        ("guest operations before", before["workload"]["operations"].to_string()),
        ("guest operations after", after["workload"]["operations"].to_string()),
        (
            "guest's longest gap",
            after["workload"]["longest_gap_us"].as_f64().map_or("-".into(), |v| format!("{:.1} ms", v / 1e3)),
        ),
        ("errors the guest found", errors.map_or("-".into(), |e| e.to_string())),
        ("source's exit status", ended.code().map_or("-".into(), |c| c.to_string())),
    ] {
        out!("  {name:<26}{value:>14}");
    }
    let good = errors == Some(0) && ended.success();
    out!(
        "\n  {}",
        if good { "the guest runs on at the destination, and found every page as it left it" } else { "FAILED" }
    );
    Ok(good)
}

/// Requests the status until `done` returns `true`. Fails if the process ends first.
fn wait_for(socket: &Path, process: &mut Process, done: impl Fn(&Value) -> bool) -> Result<(), String> {
    let deadline = Instant::now() + START;
    loop {
        if let Ok(status) = ask(socket, &Request::Status, |_| {})
            && done(&status)
        {
            return Ok(());
        }
        if let Ok(Some(status)) = process.0.try_wait() {
            return Err(format!("a process ended: {status}"));
        }
        if Instant::now() > deadline {
            return Err("the guest does not get to work".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn say(what: &str, detail: &str) {
    log::heading(what, detail);
}
