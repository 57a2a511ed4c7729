//! The control socket: requests and answers, a JSON object a line.

mod accept;

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use accept::Limits;
use migration_transport::listen_private;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    cli::Protect,
    encryption::Encryption,
    instance::{Instance, LendRequest},
    refresh::Plan,
    sealing::Saved,
};

/// Longest request line: a request is a few hundred bytes.
const MAX_REQUEST: u64 = 64 << 10;
/// How often a client of a long request gets a sign of life: several times within the shortest patience that makes sense.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// What a client asks.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub(crate) enum Request {
    Status,
    Pause,
    Resume,
    Cancel,
    Adopt,
    Quit,
    /// The server writes the file itself, so that memory does not go through JSON.
    Memory {
        gpa: u64,
        len: u64,
        out: PathBuf,
    },
    Snapshot(SnapshotRequest),
    Migrate(Box<MigrateRequest>),
    Refresh(Plan),
    /// What a borrower has to know of the VM's home.
    Place,
    Lend(LendRequest),
    /// To a borrower.
    GiveBack,
    /// From a borrower: it does not need the dirty log any more.
    StopLog,
    /// From a borrower.
    Gone {
        report: Value,
        status: u8,
    },
    /// From a borrower: the guest may run there from now on, or only at the borrower.
    Elsewhere {
        to: Option<String>,
    },
    /// From a borrower: a whole snapshot.
    Saved {
        snapshot: Saved,
    },
    PostCopy,
    SwitchOver,
    /// What is not given stays as it is; 0 bits for no limit.
    Tune {
        bandwidth_bits: Option<u64>,
        downtime_limit_us: Option<u64>,
    },
    Recover {
        to: String,
        progress: bool,
    },
}

/// Everything about a snapshot. The server writes the file itself.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct SnapshotRequest {
    pub(crate) out: PathBuf,
    pub(crate) downtime_limit_us: u64,
    pub(crate) timeout_us: u64,
    pub(crate) impact: String,
    pub(crate) progress: bool,
}

/// Everything about a migration, in plain numbers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct MigrateRequest {
    pub(crate) to: String,
    pub(crate) strategy: String,
    pub(crate) streams: u16,
    pub(crate) downtime_limit_us: u64,
    pub(crate) pause_limit_us: Option<u64>,
    pub(crate) pause_total_us: Option<u64>,
    pub(crate) bandwidth_bits: u64,
    pub(crate) timeout_us: u64,
    /// cancel, stop or post-copy.
    pub(crate) on_timeout: String,
    #[serde(default = "default_setup_timeout_us")]
    pub(crate) setup_timeout_us: u64,
    pub(crate) push_order: String,
    pub(crate) demand_lanes: u16,
    pub(crate) whole_huge_pages: bool,
    pub(crate) fail_safe: Option<Protect>,
    pub(crate) impact: String,
    pub(crate) checksum: bool,
    pub(crate) encryption: Encryption,
    pub(crate) progress: bool,
}

impl Request {
    /// Whether it may take long, as it waits for a guest or copies memory. The server then gives signs of life.
    pub(crate) fn takes_long(&self) -> bool {
        !matches!(self, Self::Status | Self::Adopt | Self::Quit | Self::Tune { .. } | Self::Place)
    }
}

/// A request of a client that does not know the option.
fn default_setup_timeout_us() -> u64 {
    60_000_000
}

impl MigrateRequest {
    /// Without limits or choices, and not encrypted.
    pub(crate) fn plain(to: impl ToString, strategy: &str, streams: u16) -> Self {
        Self {
            to: to.to_string(),
            strategy: strategy.into(),
            streams,
            downtime_limit_us: 300_000,
            pause_limit_us: None,
            pause_total_us: None,
            bandwidth_bits: 0,
            timeout_us: 0,
            on_timeout: "cancel".into(),
            setup_timeout_us: default_setup_timeout_us(),
            push_order: "linear".into(),
            demand_lanes: 0,
            whole_huge_pages: false,
            impact: "balanced".into(),
            fail_safe: None,
            checksum: false,
            encryption: Encryption::default(),
            progress: false,
        }
    }
}

/// What a client's request says of how it is to be answered. A server that does not know a wish takes
/// no notice of it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Wishes {
    /// Whether the client of a request that takes long is to get signs of life.
    #[serde(default)]
    pub(crate) alive: bool,
}

impl Request {
    /// Returns the line of this request, with or without the wish for signs of life.
    fn line(&self, alive: bool) -> Result<Vec<u8>, String> {
        let mut request = serde_json::to_value(self).map_err(|e| e.to_string())?;
        if alive {
            request["alive"] = Value::Bool(true);
        }
        let mut line = serde_json::to_vec(&request).map_err(|e| e.to_string())?;
        line.push(b'\n');
        Ok(line)
    }
}

/// A line of an answer.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// How far a migration is; more lines follow.
    Progress(Value),
    /// The request is being worked on; more lines follow. Only for a client that has
    /// [asked](Wishes::alive) for it: others do not know this line.
    Alive,
    /// The result; the last line.
    Done(Value),
    /// What failed; the last line.
    Failed(String),
}

/// A bound control socket, removed with its path when dropped.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds `path`, for this user alone (mode 0600 whatever the umask); a socket file on which
    /// nobody listens is replaced.
    ///
    /// The file appears only when it can be connected to: a socket is bound before it listens, so
    /// it gets its name last.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let context = |e: io::Error| io::Error::new(e.kind(), format!("control socket {}: {e}", path.display()));
        let listener = listen_private(path).map_err(context)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves clients on threads of their own, until the process ends.
    pub(crate) fn serve(self, instance: Arc<Instance>) -> io::Result<()> {
        instance.remove_at_exit(self.path);
        let listener = self.listener;
        let body = move || accept::serve(&listener, &instance, Limits::default());
        thread::Builder::new().name("control".into()).spawn(body)?;
        Ok(())
    }
}

/// Sends a request and returns the last answer, whenever it comes; `progress` is called for the lines before it.
pub(crate) fn ask(path: &Path, request: &Request, mut progress: impl FnMut(&Value)) -> Result<Value, String> {
    let context = |e: io::Error| format!("control socket {}: {e}", path.display());
    let server = UnixStream::connect(path).map_err(context)?;
    converse(path, server, request, None, &mut |value| value.into_iter().for_each(&mut progress))
}

/// As [`ask`], of a server that shows signs of life: one that is stopped or stuck is given up after `patience`. `alive` is
/// called for each line before the last one; some have progress.
pub(crate) fn ask_within(
    path: &Path,
    request: &Request,
    patience: Duration,
    alive: &mut dyn FnMut(Option<&Value>),
) -> Result<Value, String> {
    let server = connect_within(path, patience).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => no_answer(path, patience),
        _ => format!("control socket {}: {error}", path.display()),
    })?;
    converse(path, server, request, Some(patience), alive)
}

/// How long another minivmm may show no sign of life when a VM's process asks it something.
const PEER_PATIENCE: Duration = Duration::from_secs(10);

/// As [`ask`], of another minivmm, by a process that has a VM: one that is stopped is given up.
pub(crate) fn ask_peer(path: &Path, request: &Request) -> Result<Value, String> {
    ask_within(path, request, PEER_PATIENCE, &mut |_| {})
}

fn no_answer(path: &Path, patience: Duration) -> String {
    format!(
        "the minivmm at {} does not answer within {patience:?}: it may be stopped or stuck; what was asked for may still \
         happen (--answer-timeout sets how long to wait)",
        path.display()
    )
}

/// Connecting waits while too many others do that the server has not accepted, and has no time-out of its own.
fn connect_within(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let (tx, rx) = mpsc::channel();
    let socket = path.to_owned();
    // a thread that comes too late goes with this process
    thread::Builder::new().name("connect".into()).spawn(move || tx.send(UnixStream::connect(socket)))?;
    rx.recv_timeout(patience).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn converse(
    path: &Path,
    mut server: UnixStream,
    request: &Request,
    patience: Option<Duration>,
    alive: &mut dyn FnMut(Option<&Value>),
) -> Result<Value, String> {
    let late = |e: &io::Error| matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    let context = |e: io::Error| match patience.filter(|_| late(&e)) {
        Some(patience) => no_answer(path, patience),
        None => format!("control socket {}: {e}", path.display()),
    };
    let line = request.line(patience.is_some() && request.takes_long())?;
    // zero would be refused as an argument
    let bound = |left: Duration| Some(left.max(Duration::from_millis(1)));
    server.set_write_timeout(patience.and_then(bound)).map_err(context)?;
    server.write_all(&line).map_err(context)?;
    let began = Instant::now();
    let mut server = BufReader::new(server);
    loop {
        // a short request is answered in time; during a long one no silence lasts longer than that
        let left = patience.map(|most| if request.takes_long() { most } else { most.saturating_sub(began.elapsed()) });
        server.get_ref().set_read_timeout(left.and_then(bound)).map_err(context)?;
        let mut line = String::new();
        if server.read_line(&mut line).map_err(context)? == 0 {
            return Err(format!("{} closed the connection without an answer", path.display()));
        }
        match serde_json::from_str(&line).map_err(|e| format!("answer of {}: {e}", path.display()))? {
            Answer::Progress(value) => alive(Some(&value)),
            Answer::Alive => alive(None),
            Answer::Done(value) => return Ok(value),
            Answer::Failed(why) => return Err(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// One of each kind that takes long.
    fn requests() -> Vec<Request> {
        let snapshot = SnapshotRequest {
            out: "s".into(),
            downtime_limit_us: 1,
            timeout_us: 2,
            impact: "low".into(),
            progress: true,
        };
        let saved = Saved { file: "s".into(), key: Some("k".into()) };
        vec![
            Request::Pause,
            Request::Cancel,
            Request::Snapshot(snapshot),
            Request::Migrate(Box::new(MigrateRequest::plain("unix:x", "hybrid", 3))),
            Request::Refresh(Plan::default()),
            Request::Gone { report: json!({"outcome": "lost"}), status: 5 },
            Request::Elsewhere { to: None },
            Request::Saved { snapshot: saved },
            Request::Recover { to: "unix:x".into(), progress: false },
        ]
    }

    #[test]
    fn a_server_that_does_not_know_signs_of_life_understands_who_asks_for_them() {
        for request in requests() {
            assert!(request.takes_long());
            let line = request.line(true).unwrap();
            let value: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(value["alive"], true);
            // as an earlier server reads it
            let read: Request = serde_json::from_slice(&line).unwrap();
            assert_eq!(format!("{read:?}"), format!("{request:?}"));
            assert!(serde_json::from_slice::<Wishes>(&line).unwrap().alive);
        }
    }

    #[test]
    fn a_client_that_does_not_ask_gets_no_signs_of_life() {
        for request in requests() {
            let line = request.line(false).unwrap();
            let value: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(value, serde_json::to_value(&request).unwrap());
            assert!(!serde_json::from_slice::<Wishes>(&line).unwrap().alive);
        }
    }
}
