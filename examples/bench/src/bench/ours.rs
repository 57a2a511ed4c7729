//! minivmm, as child processes that are controlled through their control sockets.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use migration_transport::Bandwidth;
use minivmm_client::{Impact, MigrateRequest, Request, ask, encryption::Encryption, values::fail_safe};
use serde_json::Value;

use super::{
    encrypt::{Link, Way},
    measure::{Moved, Setup},
    process::{Folder, Process, program},
};

/// The longest time until a process has its control socket.
const READY: Duration = Duration::from_secs(30);

/// The options of a VM and its migration.
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
    /// The bandwidth limit in bit/s, or 0 for none.
    pub(crate) bandwidth_bits: u64,
    /// The value of `--fail-safe`.
    pub(crate) fail_safe: String,
    /// The downtime limit in milliseconds.
    pub(crate) downtime_limit_ms: u64,
    /// The link, and its protection.
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
            downtime_limit_ms: setup.tuning.downtime_limit_ms(),
            way: setup.way,
        }
    }
}

impl Options {
    /// Returns the request that a client sends to migrate the VM to `to`.
    pub(super) fn request(&self, to: &str) -> Result<MigrateRequest, String> {
        let to = to.parse().map_err(|e| format!("{to}: {e}"))?;
        Ok(MigrateRequest {
            fail_safe: fail_safe(&self.fail_safe)?,
            bandwidth: Bandwidth::from_bits_per_second(self.bandwidth_bits),
            push_order: self.push_order.clone(),
            demand_lanes: 2,
            impact: Impact::from_str(self.impact, false)?,
            downtime_limit: Duration::from_millis(self.downtime_limit_ms),
            ..MigrateRequest::plain(to, self.strategy.parse()?, self.streams)
        })
    }
}

/// Returns the report if the migration has completed, and an error otherwise.
pub(crate) fn completed(report: Value) -> Result<Value, String> {
    match report["outcome"] == "completed" {
        true => Ok(report),
        false => Err(format!("the migration is {}: {}", report["outcome"], report["reason"])),
    }
}

/// A minivmm that runs the guest.
pub(crate) struct Source {
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
}

/// Two minivmms: one runs the guest, the other waits for it.
pub(crate) struct Pair {
    pub(crate) source: Process,
    pub(crate) destination: Process,
    source_socket: PathBuf,
    destination_socket: PathBuf,
    url: String,
    options: Options,
    encryption: Encryption,
}

fn minivmm(name: &str, folder: &Folder, link: Link, args: &[&str]) -> Result<Process, String> {
    let mut command = link.command(program()?.as_os_str());
    command.args(args);
    Process::start(&format!("minivmm-{name}"), command, folder.path(&format!("minivmm-{name}.log")))
}

/// Writes the image of a guest with one CPU to a file, for another VMM.
pub(super) fn image(folder: &Folder, workload: &str) -> Result<PathBuf, String> {
    let elf = folder.path("guest.elf");
    let written = Command::new(program()?).args(["workload", "--emit", workload, "--out"]).arg(&elf).output();
    let written = written.map_err(|e| format!("minivmm workload: {e}"))?;
    match written.status.success() {
        true => Ok(elf),
        false => Err(format!("minivmm workload: {}", String::from_utf8_lossy(&written.stderr).trim())),
    }
}

/// Starts a minivmm that receives at `listen`, at the other end of the link. Returns its control
/// socket and the address at which it listens, as it prints it.
pub(super) fn receiver(
    folder: &Folder,
    name: &str,
    listen: &str,
    link: Link,
    more: &[&str],
) -> Result<(Process, PathBuf, String), String> {
    let socket = folder.path(name);
    let control = socket.to_string_lossy().into_owned();
    let args = ["receive", "--listen", listen, "--control", &control];
    let mut process = minivmm(name, folder, link, &[&args[..], more].concat())?;
    let mut line = String::new();
    BufReader::new(process.output()?).read_line(&mut line).map_err(|e| format!("the {name}'s output: {e}"))?;
    let Some(url) = line.trim().strip_prefix("listening ").map(str::to_owned) else {
        process.check()?;
        return Err(format!("the {name} says {line:?} instead of where it listens"));
    };
    ready(&mut process, &socket)?;
    Ok((process, socket, url))
}

/// Waits until the control socket answers.
fn ready(process: &mut Process, socket: &std::path::Path) -> Result<(), String> {
    let deadline = Instant::now() + READY;
    while let Err(error) = ask(socket, &Request::Status, |_| {}) {
        process.check()?;
        if Instant::now() > deadline {
            return Err(error.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Source {
    pub(crate) fn start(folder: &Folder, options: &Options) -> Result<Self, String> {
        Self::named(folder, "source", options)
    }

    /// Starts it under this name, so that several can run.
    pub(crate) fn named(folder: &Folder, name: &str, options: &Options) -> Result<Self, String> {
        let socket = folder.path(name);
        let (memory, control) = (options.memory.to_string(), socket.to_string_lossy().into_owned());
        let args = ["run", "--memory", &memory, "--workload", options.workload.as_str(), "--control", &control];
        let cpus = options.cpus.to_string();
        let more = ["--cpus", &cpus, "--backing", options.backing];
        let mut process = minivmm(name, folder, Link::Loopback, &[&args[..], &more].concat())?;
        ready(&mut process, &socket)?;
        let status = ask(&socket, &Request::Status, |_| {})?;
        if status["software_guest"] == true {
            return Err("minivmm has no KVM and runs its software guest, which is no match for QEMU".into());
        }
        Ok(Self { process, socket })
    }

    /// Starts the destination.
    pub(crate) fn pair(self, folder: &Folder, options: &Options) -> Result<Pair, String> {
        let Way { cipher, link } = options.way;
        let encryption = cipher.encryption(folder)?;
        let secure = encryption.arguments();
        let secure: Vec<&str> = secure.iter().map(String::as_str).collect();
        let (destination, destination_socket, url) =
            receiver(folder, "destination", &format!("tcp:{}:0", link.host()), link, &secure)?;
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
    /// Migrates. Returns when the source reports completion.
    pub(crate) fn migrate(&mut self) -> Result<Moved, String> {
        let start = Instant::now();
        let report = self.attempt(Duration::ZERO)?;
        let total = start.elapsed();
        let report = completed(report)?;
        let ms = |key: &str| report[key].as_f64();
        Ok(Moved { total, own_total_ms: ms("total_ms"), own_downtime_ms: ms("downtime_ms"), report })
    }

    /// Requests the migration and returns the source's report, also of a failure. Cancels it if it
    /// has not handed over within `limit`, unless `limit` is zero.
    pub(crate) fn attempt(&mut self, limit: Duration) -> Result<Value, String> {
        let plain = self.options.request(&self.url)?;
        let request = MigrateRequest { encryption: self.encryption.clone(), timeout: limit, ..plain };
        Ok(ask(&self.source_socket, &Request::Migrate(Box::new(request)), |_| {})?)
    }

    /// Returns the destination's status.
    pub(crate) fn status(&self) -> Result<Value, String> {
        Ok(ask(&self.destination_socket, &Request::Status, |_| {})?)
    }
}
