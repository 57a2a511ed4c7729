//! The control socket: requests and answers, a JSON object a line.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

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
    pub(crate) bandwidth_bits: u64,
    pub(crate) timeout_us: u64,
    /// cancel, stop or post-copy.
    pub(crate) on_timeout: String,
    pub(crate) push_order: String,
    pub(crate) demand_lanes: u16,
    pub(crate) whole_huge_pages: bool,
    pub(crate) fail_safe: Option<Protect>,
    pub(crate) impact: String,
    pub(crate) checksum: bool,
    pub(crate) encryption: Encryption,
    pub(crate) progress: bool,
}

impl MigrateRequest {
    /// Without limits or choices, and not encrypted.
    pub(crate) fn plain(to: impl ToString, strategy: &str, streams: u16) -> Self {
        Self {
            to: to.to_string(),
            strategy: strategy.into(),
            streams,
            downtime_limit_us: 300_000,
            bandwidth_bits: 0,
            timeout_us: 0,
            on_timeout: "cancel".into(),
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

/// A line of an answer.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// How far a migration is; more lines follow.
    Progress(Value),
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
        thread::Builder::new().name("control".into()).spawn(move || {
            for client in listener.incoming().flatten() {
                let instance = instance.clone();
                let served = thread::Builder::new().name("client".into()).spawn(move || {
                    // a client that went away has nobody to be told
                    let _ = serve_client(client, &instance);
                });
                if let Err(error) = served {
                    eprintln!("minivmm: control: {error}");
                }
            }
        })?;
        Ok(())
    }
}

fn serve_client(client: UnixStream, instance: &Arc<Instance>) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(io::Read::take(client.try_clone()?, MAX_REQUEST)).read_line(&mut line)?;
    let mut say = {
        let mut client = client.try_clone()?;
        move |answer: &Answer| -> io::Result<()> {
            let mut line = serde_json::to_vec(answer)?;
            line.push(b'\n');
            client.write_all(&line)
        }
    };
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(error) => return say(&Answer::Failed(format!("not a request: {error}"))),
    };
    let quit = matches!(request, Request::Quit);
    let result = instance.handle(request, &mut |progress| {
        // the migration goes on without its client
        let _ = say(&Answer::Progress(progress));
    });
    let said = match result {
        Ok(value) => say(&Answer::Done(value)),
        Err(why) => say(&Answer::Failed(why)),
    };
    if quit {
        instance.exit(0);
    }
    instance.answered();
    said
}

/// Sends a request and returns the last answer; `progress` is called for the lines before it.
pub(crate) fn ask(path: &Path, request: &Request, mut progress: impl FnMut(&Value)) -> Result<Value, String> {
    let context = |e: io::Error| format!("control socket {}: {e}", path.display());
    let mut server = UnixStream::connect(path).map_err(context)?;
    let mut line = serde_json::to_vec(request).map_err(|e| e.to_string())?;
    line.push(b'\n');
    server.write_all(&line).map_err(context)?;
    for line in BufReader::new(server).lines() {
        let line = line.map_err(context)?;
        match serde_json::from_str(&line).map_err(|e| format!("answer of {}: {e}", path.display()))? {
            Answer::Progress(value) => progress(&value),
            Answer::Done(value) => return Ok(value),
            Answer::Failed(why) => return Err(why),
        }
    }
    Err(format!("{} closed the connection without an answer", path.display()))
}
