//! QEMU, controlled through its machine protocol (QMP).

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    encrypt::{Cipher, Link, Way},
    measure::{Moved, Setup},
    postcopy,
    process::{Folder, Process},
    tuning::Tuning,
};

const PROGRAM: &str = "qemu-system-x86_64";
/// The longest time to wait for an answer or an event.
const ANSWER: Duration = Duration::from_secs(60);
/// The bandwidth limit in bytes per second, which has no effect because it is so high.
const BANDWIDTH: u64 = 100_000_000_000;
/// The name of the user of the pre-shared key.
const TLS_USER: &str = "bench";

/// Returns QEMU's version line, or `None` if it is not installed.
pub(super) fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(|line| line.trim_start_matches("QEMU emulator version").trim().to_owned())
}

/// Makes a pre-shared key for QEMU's TLS. Returns the folder of its file.
fn tls_keys(folder: &Folder) -> Result<PathBuf, String> {
    let keys = folder.path("tls");
    std::fs::create_dir_all(&keys).map_err(|e| format!("{}: {e}", keys.display()))?;
    // the key need not be secret, because the traffic stays on this machine
    let line = format!("{TLS_USER}:{}\n", "5a".repeat(32));
    let file = keys.join("keys.psk");
    std::fs::write(&file, line).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(keys)
}

/// Two QEMUs: one runs the guest, the other waits for it.
pub(super) struct Pair {
    pub(super) source: Process,
    pub(super) destination: Process,
    source_qmp: Qmp,
    destination_qmp: Qmp,
    uri: String,
    post_copy: Option<Start>,
}

/// The moment at which post-copy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    AtOnce,
    /// After a pass over all memory, unless the migration is complete then.
    AfterAPass,
}

/// A QEMU that runs the guest and is not prepared for a migration.
pub(super) struct Source {
    pub(super) process: Process,
    qmp: Qmp,
}

fn start(
    folder: &Folder,
    name: &str,
    memory: u64,
    elf: &Path,
    link: Link,
    more: &[&str],
) -> Result<(Process, Qmp), String> {
    let (mut process, socket) = launch(folder, name, memory, elf, link, more)?;
    let qmp = Qmp::connect(&mut process, socket)?;
    Ok((process, qmp))
}

/// Starts a QEMU. Returns the process and its QMP socket, which may not exist yet.
fn launch(
    folder: &Folder,
    name: &str,
    memory: u64,
    elf: &Path,
    link: Link,
    more: &[&str],
) -> Result<(Process, PathBuf), String> {
    let socket = folder.path(&format!("{name}.qmp"));
    // the socket of an earlier run could be taken for this one's
    let _ = std::fs::remove_file(&socket);
    let mut command = link.command(PROGRAM.as_ref());
    command
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1", "-nodefaults", "-nographic"])
        .args(["-display", "none", "-serial", "none", "-monitor", "none", "-name", "bench,debug-threads=on"])
        .args(["-m", &format!("{}M", memory >> 20)])
        .arg("-kernel")
        .arg(elf)
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .args(more);
    Ok((Process::start(name, command, folder.path(&format!("{name}.log")))?, socket))
}

impl Source {
    pub(super) fn start(folder: &Folder, setup: &Setup, elf: &Path) -> Result<Self, String> {
        let (process, qmp) = start(folder, "qemu-source", setup.memory, elf, Link::Loopback, &[])?;
        Ok(Self { process, qmp })
    }

    /// Starts the destination and prepares both for the migration.
    pub(super) fn pair(self, folder: &Folder, setup: &Setup, elf: &Path) -> Result<Pair, String> {
        let mut more = vec!["-incoming", "defer"];
        // RAM must have the same name as at the source, which uses the default
        let populated = format!("memory-backend-ram,id=pc.ram,size={}M,prealloc=on", setup.memory >> 20);
        if setup.tuning.populates() {
            more.extend(["-object", &populated, "-machine", "memory-backend=pc.ram"]);
        }
        let (destination, mut destination_qmp) =
            start(folder, "qemu-destination", setup.memory, elf, setup.way.link, &more)?;
        let Way { cipher, link } = setup.way;
        let keys = if cipher == Cipher::None { None } else { Some(tls_keys(folder)?) };
        let mut source_qmp = self.qmp;
        let multifd = setup.streams > 1;
        let preempt = setup.strategy == postcopy::PREEMPT;
        let post_copy = (preempt || setup.strategy == postcopy::PLAIN).then_some(match setup.tuning {
            Tuning::AsItComes => Start::AtOnce,
            Tuning::Careful => Start::AfterAPass,
        });
        for (qmp, is_source) in [(&mut source_qmp, true), (&mut destination_qmp, false)] {
            qmp.call(
                "migrate-set-capabilities",
                json!({"capabilities": [
                    {"capability": "multifd", "state": multifd},
                    {"capability": "postcopy-ram", "state": post_copy.is_some()},
                    {"capability": "postcopy-preempt", "state": preempt},
                    {"capability": "auto-converge", "state": setup.tuning.auto_converge()},
                    {"capability": "events", "state": true},
                ]}),
            )?;
            if multifd {
                qmp.call("migrate-set-parameters", json!({"multifd-channels": setup.streams}))?;
            }
            if let Some(keys) = &keys {
                let (kind, id) = ("tls-creds-psk", "keys");
                let mut object = json!({"qom-type": kind, "id": id, "endpoint": "server", "dir": keys});
                if is_source {
                    object["endpoint"] = "client".into();
                    object["username"] = TLS_USER.into();
                }
                if cipher == Cipher::Aes128 {
                    object["priority"] = "NORMAL:-CIPHER-ALL:+AES-128-GCM".into();
                }
                qmp.call("object-add", object)?;
                qmp.call("migrate-set-parameters", json!({"tls-creds": id}))?;
            }
            if is_source {
                let most = match link.limit_bits() {
                    0 => BANDWIDTH,
                    bits => bits / 8,
                };
                let limits = json!({"max-bandwidth": most, "downtime-limit": setup.tuning.downtime_limit_ms()});
                qmp.call("migrate-set-parameters", limits)?;
            }
            if is_source && post_copy.is_some() {
                // 0 means no limit
                qmp.call("migrate-set-parameters", json!({"max-postcopy-bandwidth": 0}))?;
            }
        }
        destination_qmp.call("migrate-incoming", json!({"uri": format!("tcp:{}:0", link.host())}))?;
        let port = destination_qmp.call("query-migrate", json!({}))?;
        let port = port["socket-address"][0]["port"].as_str().map(str::to_owned);
        let port = port.ok_or("QEMU does not say at which port it listens")?;
        let uri = format!("tcp:{}:{port}", link.host());
        Ok(Pair { source: self.process, destination, source_qmp, destination_qmp, uri, post_copy })
    }
}

/// Returns whether an event reports the end of a migration.
fn has_ended(event: &Value) -> bool {
    event["event"] == "MIGRATION"
        && matches!(event["data"]["status"].as_str(), Some("completed" | "failed" | "cancelled"))
}

impl Pair {
    /// Migrates. Returns when the source reports completion and the guest runs at the destination.
    pub(super) fn migrate(&mut self) -> Result<Moved, String> {
        let start = Instant::now();
        self.source_qmp.call("migrate", json!({"uri": self.uri}))?;
        if self.post_copy == Some(Start::AtOnce) {
            self.source_qmp.call("migrate-start-postcopy", json!({}))?;
        }
        if self.post_copy == Some(Start::AfterAPass) && self.source_qmp.passed()? {
            // a migration that has ended meanwhile refuses this; its end is handled below
            let _ = self.source_qmp.call("migrate-start-postcopy", json!({}));
        }
        self.source_qmp.complete()?;
        self.destination_qmp.event(|e| e["event"] == "RESUME")?;
        self.source_qmp.moved(start.elapsed())
    }

    /// Ends the source.
    pub(super) fn end_source(&mut self) -> Result<(), String> {
        self.source_qmp.call("quit", json!({})).map(drop)
    }
}

/// A QEMU that will be replaced under its VM by the mode `cpr-transfer`, which keeps RAM in its
/// memory file.
pub(super) struct Replaced {
    pub(super) process: Process,
    qmp: Qmp,
    memory: u64,
    elf: PathBuf,
}

impl Replaced {
    /// Returns the arguments for RAM in a memory file. The mode needs other memory of QEMU in
    /// files, too.
    fn args(memory: u64) -> [String; 4] {
        let ram = format!("memory-backend-memfd,id=ram0,size={}M,share=on", memory >> 20);
        ["-object".into(), ram, "-machine".into(), "memory-backend=ram0,aux-ram-share=on".into()]
    }

    pub(super) fn start(folder: &Folder, memory: u64, elf: &Path) -> Result<Self, String> {
        let args = Self::args(memory);
        let (process, qmp) =
            start(folder, "qemu-source", memory, elf, Link::Loopback, &args.each_ref().map(String::as_str))?;
        Ok(Self { process, qmp, memory, elf: elf.to_owned() })
    }

    /// Starts the QEMU that takes over, and waits until it listens.
    pub(super) fn successor(&mut self, folder: &Folder) -> Result<Successor, String> {
        let channels = ["main", "cpr"].map(|name| {
            let path = folder.path(&format!("qemu-{name}.sock"));
            // the socket of an earlier run could be taken for this one's
            let _ = std::fs::remove_file(&path);
            json!({"channel-type": name, "addr": {"transport": "socket", "type": "unix", "path": path}})
        });
        let [main, cpr] = channels.each_ref().map(Value::to_string);
        let args = Self::args(self.memory);
        let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
        all.extend(["-incoming", &main, "-incoming", &cpr]);
        let (mut process, socket) = launch(folder, "qemu-destination", self.memory, &self.elf, Link::Loopback, &all)?;
        // it answers nothing until the state arrives, but it listens
        let deadline = Instant::now() + ANSWER;
        while !folder.path("qemu-cpr.sock").exists() {
            process.check()?;
            if Instant::now() > deadline {
                return Err("QEMU does not listen for the state of the one that it is to replace".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        let capabilities = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.qmp.call("migrate-set-capabilities", capabilities)?;
        self.qmp.call("migrate-set-parameters", json!({"mode": "cpr-transfer"}))?;
        Ok(Successor { process, socket, channels: json!(channels) })
    }

    /// Hands the VM over. Returns when it runs in the successor.
    pub(super) fn hand_over(&mut self, to: &mut Successor) -> Result<Moved, String> {
        let start = Instant::now();
        self.qmp.call("migrate", json!({"channels": to.channels}))?;
        let mut there = Qmp::connect(&mut to.process, to.socket.clone())?;
        self.qmp.complete()?;
        let deadline = Instant::now() + ANSWER;
        // the event may have come before the connection existed
        while there.call("query-status", json!({}))?["status"] != "running" {
            if Instant::now() > deadline {
                return Err("QEMU's migration is complete, but the guest does not run".into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.qmp.moved(start.elapsed())
    }

    /// Ends the QEMU whose VM has moved.
    pub(super) fn end(&mut self) -> Result<(), String> {
        self.qmp.call("quit", json!({})).map(drop)
    }
}

/// The QEMU that takes over.
pub(super) struct Successor {
    pub(super) process: Process,
    socket: PathBuf,
    channels: Value,
}

/// A connection to a QEMU.
struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Value>,
}

impl Qmp {
    /// Returns QEMU's report of a complete migration with this total.
    fn moved(&mut self, total: Duration) -> Result<Moved, String> {
        let report = self.call("query-migrate", json!({}))?;
        let ms = |key: &str| report[key].as_f64();
        Ok(Moved { total, own_total_ms: ms("total-time"), own_downtime_ms: ms("downtime"), report })
    }

    fn connect(process: &mut Process, path: PathBuf) -> Result<Self, String> {
        let deadline = Instant::now() + ANSWER;
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > deadline => return Err(format!("{}: {e}", path.display())),
                Err(_) => {
                    process.check()?;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        };
        let context = |e| format!("{}: {e}", path.display());
        stream.set_read_timeout(Some(ANSWER)).map_err(context)?;
        let reader = BufReader::new(stream.try_clone().map_err(context)?);
        let mut qmp = Self { reader, writer: stream, events: Vec::new() };
        qmp.line()?; // the greeting
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err("QEMU closed its control socket".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|e| format!("QEMU says {line:?}: {e}")),
            Err(e) => Err(format!("QEMU's control socket: {e}")),
        }
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).map_err(|e| format!("QEMU, {command}: {e}"))?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(format!("QEMU, {command}: {}", answer["error"]["desc"]));
            }
        }
    }

    /// Waits for the end of a migration.
    fn complete(&mut self) -> Result<(), String> {
        let end = self.event(has_ended)?;
        if end["data"]["status"] == "completed" {
            return Ok(());
        }
        let why = self.call("query-migrate", json!({}))?;
        Err(format!("QEMU's migration is {}: {}", end["data"]["status"], why["error-desc"]))
    }

    /// Waits until all memory was sent once. Returns whether the migration still runs.
    fn passed(&mut self) -> Result<bool, String> {
        let passed = |e: &Value| e["event"] == "MIGRATION_PASS" && e["data"]["pass"].as_u64() >= Some(2);
        let event = self.event(|e| passed(e) || has_ended(e))?;
        let ended = has_ended(&event);
        if ended {
            self.events.insert(0, event);
        }
        Ok(!ended)
    }

    /// Returns the next event for which `wanted` returns `true`. Drops other events.
    fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        loop {
            let event = if self.events.is_empty() { self.line()? } else { self.events.remove(0) };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }
}
