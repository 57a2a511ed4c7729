//! minivmm itself, as child processes driven through their control sockets.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    measure::{Moved, Setup},
    process::{Folder, Process},
};
use crate::control::{MigrateRequest, Request, ask};

/// How long a process may take until its control socket is there.
const READY: Duration = Duration::from_secs(30);

/// A minivmm with the guest.
pub(super) struct Source {
    pub(super) process: Process,
    socket: PathBuf,
}

/// Two minivmms: the guest runs in one, the other waits.
pub(super) struct Pair {
    pub(super) source: Process,
    pub(super) destination: Process,
    source_socket: PathBuf,
    destination_socket: PathBuf,
    url: String,
    streams: u16,
    impact: &'static str,
    strategy: String,
}

fn minivmm(name: &'static str, folder: &Folder, args: &[&str]) -> Result<Process, String> {
    let exe = std::env::current_exe().map_err(|e| format!("the own program: {e}"))?;
    let mut command = Command::new(exe);
    command.args(args);
    Process::start(name, command, folder.path(&format!("{name}.log")))
}

/// Waits until the control socket answers.
fn ready(process: &mut Process, socket: &std::path::Path) -> Result<(), String> {
    let deadline = Instant::now() + READY;
    while let Err(why) = ask(socket, &Request::Status, |_| {}) {
        process.check()?;
        if Instant::now() > deadline {
            return Err(why);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Source {
    pub(super) fn start(folder: &Folder, setup: &Setup) -> Result<Self, String> {
        let socket = folder.path("source");
        let (memory, control) = (setup.memory.to_string(), socket.to_string_lossy().into_owned());
        let args = ["run", "--memory", &memory, "--workload", setup.workload.as_str(), "--control", &control];
        let mut process = minivmm("minivmm-source", folder, &[&args[..], &["--backing", "thp"]].concat())?;
        ready(&mut process, &socket)?;
        let status = ask(&socket, &Request::Status, |_| {})?;
        if status["software_guest"] == true {
            return Err("minivmm has no KVM and runs its software guest, which is no match for QEMU".into());
        }
        Ok(Self { process, socket })
    }

    /// Starts the destination.
    pub(super) fn pair(self, folder: &Folder, setup: &Setup) -> Result<Pair, String> {
        let destination_socket = folder.path("destination");
        let control = destination_socket.to_string_lossy().into_owned();
        let args = ["receive", "--listen", "tcp:127.0.0.1:0", "--control", &control];
        let mut destination = minivmm("minivmm-destination", folder, &args)?;
        let mut line = String::new();
        let output = destination.output()?;
        BufReader::new(output).read_line(&mut line).map_err(|e| format!("the destination's output: {e}"))?;
        let Some(url) = line.trim().strip_prefix("listening ").map(str::to_owned) else {
            destination.check()?;
            return Err(format!("the destination says {line:?} instead of where it listens"));
        };
        ready(&mut destination, &destination_socket)?;
        Ok(Pair {
            source: self.process,
            destination,
            source_socket: self.socket,
            destination_socket,
            url,
            streams: setup.streams,
            impact: setup.impact,
            strategy: setup.strategy.clone(),
        })
    }
}

impl Pair {
    /// Migrates; returns when the source says that it is complete.
    pub(super) fn migrate(&mut self) -> Result<Moved, String> {
        let request = MigrateRequest {
            fail_safe: None,
            to: self.url.clone(),
            strategy: self.strategy.clone(),
            streams: self.streams,
            downtime_limit_us: 300_000,
            bandwidth_bits: 0,
            timeout_us: 0,
            on_timeout: "cancel".into(),
            push_order: "linear".into(),
            demand_lanes: 2,
            whole_huge_pages: false,
            impact: self.impact.into(),
            checksum: false,
            progress: false,
        };
        let start = Instant::now();
        let report = ask(&self.source_socket, &Request::Migrate(request), |_| {})?;
        let total = start.elapsed();
        if report["outcome"] != "completed" {
            return Err(format!("the migration is {}: {}", report["outcome"], report["reason"]));
        }
        let ms = |key: &str| report[key].as_f64();
        Ok(Moved { total, own_total_ms: ms("total_ms"), own_downtime_ms: ms("downtime_ms"), report })
    }

    /// What the destination says of itself.
    pub(super) fn status(&self) -> Result<Value, String> {
        ask(&self.destination_socket, &Request::Status, |_| {})
    }
}
