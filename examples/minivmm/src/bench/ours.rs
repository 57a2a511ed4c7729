//! minivmm itself, as child processes driven through their control sockets.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    encrypt::{Link, Way},
    measure::{Moved, Setup},
    process::{Folder, Process},
};
use crate::{
    control::{MigrateRequest, Request, ask},
    encryption::Encryption,
};

/// How long a process may take until its control socket is there.
const READY: Duration = Duration::from_secs(30);

/// What runs, and how it moves.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Options {
    pub(crate) workload: String,
    /// Bytes of guest RAM.
    pub(crate) memory: u64,
    pub(crate) cpus: u32,
    pub(crate) backing: &'static str,
    pub(crate) streams: u16,
    pub(crate) impact: &'static str,
    pub(crate) strategy: String,
    pub(crate) push_order: String,
    /// Bits a second; 0 for no limit.
    pub(crate) bandwidth_bits: u64,
    /// As `--fail-safe` takes it.
    pub(crate) fail_safe: String,
    /// Over which link, and how protected.
    pub(crate) way: Way,
}

impl From<&Setup> for Options {
    fn from(setup: &Setup) -> Self {
        Self {
            workload: setup.workload.clone(),
            memory: setup.memory,
            cpus: 1,
            backing: "thp",
            streams: setup.streams,
            impact: setup.impact,
            strategy: setup.strategy.clone(),
            push_order: "linear".into(),
            bandwidth_bits: setup.way.link.limit_bits(),
            fail_safe: "none".into(),
            way: setup.way,
        }
    }
}

/// A minivmm with the guest.
pub(crate) struct Source {
    pub(crate) process: Process,
    socket: PathBuf,
}

/// Two minivmms: the guest runs in one, the other waits.
pub(crate) struct Pair {
    pub(crate) source: Process,
    pub(crate) destination: Process,
    source_socket: PathBuf,
    destination_socket: PathBuf,
    url: String,
    options: Options,
    encryption: Encryption,
}

fn minivmm(name: &'static str, folder: &Folder, link: Link, args: &[&str]) -> Result<Process, String> {
    let exe = std::env::current_exe().map_err(|e| format!("the own program: {e}"))?;
    let mut command = link.command(exe.as_os_str());
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
    pub(crate) fn start(folder: &Folder, options: &Options) -> Result<Self, String> {
        let socket = folder.path("source");
        let (memory, control) = (options.memory.to_string(), socket.to_string_lossy().into_owned());
        let args = ["run", "--memory", &memory, "--workload", options.workload.as_str(), "--control", &control];
        let cpus = options.cpus.to_string();
        let more = ["--cpus", &cpus, "--backing", options.backing];
        let mut process = minivmm("minivmm-source", folder, Link::Loopback, &[&args[..], &more].concat())?;
        ready(&mut process, &socket)?;
        let status = ask(&socket, &Request::Status, |_| {})?;
        if status["software_guest"] == true {
            return Err("minivmm has no KVM and runs its software guest, which is no match for QEMU".into());
        }
        Ok(Self { process, socket })
    }

    /// Starts the destination.
    pub(crate) fn pair(self, folder: &Folder, options: &Options) -> Result<Pair, String> {
        let destination_socket = folder.path("destination");
        let control = destination_socket.to_string_lossy().into_owned();
        let Way { cipher, link } = options.way;
        let encryption = cipher.encryption(folder)?;
        let listen = format!("tcp:{}:0", link.host());
        let args = ["receive", "--listen", &listen, "--control", &control];
        let secure = encryption.arguments();
        let secure: Vec<&str> = secure.iter().map(String::as_str).collect();
        let mut destination = minivmm("minivmm-destination", folder, link, &[&args[..], &secure].concat())?;
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
            options: options.clone(),
            encryption,
        })
    }
}

impl Pair {
    /// Migrates; returns when the source says that it is complete.
    pub(crate) fn migrate(&mut self) -> Result<Moved, String> {
        let Options { streams, impact, strategy, push_order, bandwidth_bits, fail_safe, .. } = &self.options;
        let request = MigrateRequest {
            fail_safe: crate::cli::fail_safe(fail_safe)?,
            to: self.url.clone(),
            strategy: strategy.clone(),
            streams: *streams,
            downtime_limit_us: 300_000,
            bandwidth_bits: *bandwidth_bits,
            timeout_us: 0,
            on_timeout: "cancel".into(),
            push_order: push_order.clone(),
            demand_lanes: 2,
            whole_huge_pages: false,
            impact: (*impact).into(),
            checksum: false,
            encryption: self.encryption.clone(),
            progress: false,
        };
        let start = Instant::now();
        let report = ask(&self.source_socket, &Request::Migrate(Box::new(request)), |_| {})?;
        let total = start.elapsed();
        if report["outcome"] != "completed" {
            return Err(format!("the migration is {}: {}", report["outcome"], report["reason"]));
        }
        let ms = |key: &str| report[key].as_f64();
        Ok(Moved { total, own_total_ms: ms("total_ms"), own_downtime_ms: ms("downtime_ms"), report })
    }

    /// What the destination says of itself.
    pub(crate) fn status(&self) -> Result<Value, String> {
        ask(&self.destination_socket, &Request::Status, |_| {})
    }
}
