//! The client's end of a control socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use migration_core::text::describe;
use serde_json::Value;
use thiserror::Error;

use crate::{Answer, Request};

/// Why a request has no result. What it displays does not repeat its cause.
#[derive(Debug, Error)]
pub enum AskError {
    /// The socket cannot be connected to, written or read.
    #[error("control socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The server shows no sign of life. What was asked for may still happen.
    #[error(
        "the minivmm at {} does not answer within {patience:?}: it may be stopped or stuck; what was asked for may still \
         happen (--answer-timeout sets how long to wait)",
        path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The server has closed the connection. What was asked for may still happen.
    #[error("{} closed the connection without an answer", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The server's line is no answer of a minivmm.
    #[error("answer of {}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The request cannot be written as JSON: a path in it is not Unicode.
    #[error(transparent)]
    Request(serde_json::Error),
    /// The server has refused the request, or has failed: the reason in its own words.
    #[error("{0}")]
    Failed(String),
}

/// For programs whose errors are texts.
impl From<AskError> for String {
    fn from(error: AskError) -> Self {
        describe(error)
    }
}

/// Sends a request and returns the result, whenever it comes. `progress` is called for each line of
/// progress before it.
///
/// # Errors
/// See [`AskError`].
pub fn ask(path: &Path, request: &Request, mut progress: impl FnMut(&Value)) -> Result<Value, AskError> {
    let server = UnixStream::connect(path).map_err(|source| AskError::Socket { path: path.to_owned(), source })?;
    converse(path, server, request, None, &mut |value| value.into_iter().for_each(&mut progress))
}

/// As [`ask`], of a server that shows signs of life: one that is stopped or stuck is given up after
/// `patience`. `alive` is called for each line before the last one; some have progress.
///
/// # Errors
/// See [`AskError`].
pub fn ask_within(
    path: &Path,
    request: &Request,
    patience: Duration,
    alive: &mut dyn FnMut(Option<&Value>),
) -> Result<Value, AskError> {
    let server = connect_within(path, patience).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => AskError::Silent { path: path.to_owned(), patience },
        _ => AskError::Socket { path: path.to_owned(), source },
    })?;
    converse(path, server, request, Some(patience), alive)
}

/// How long another minivmm may show no sign of life when a VM's process asks it something.
const PEER_PATIENCE: Duration = Duration::from_secs(10);

/// As [`ask`], of another minivmm, by a process that has a VM: one that is stopped is given up
/// after 10 s.
///
/// # Errors
/// See [`AskError`].
pub fn ask_peer(path: &Path, request: &Request) -> Result<Value, AskError> {
    ask_within(path, request, PEER_PATIENCE, &mut |_| {})
}

/// Connects. Connecting waits while too many others do that the server has not accepted, and has no
/// time-out of its own.
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
) -> Result<Value, AskError> {
    let late = |e: &io::Error| matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    let context = |source: io::Error| match patience.filter(|_| late(&source)) {
        Some(patience) => AskError::Silent { path: path.to_owned(), patience },
        None => AskError::Socket { path: path.to_owned(), source },
    };
    let line = request.line(patience.is_some() && request.takes_long()).map_err(AskError::Request)?;
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
            return Err(AskError::Closed { path: path.to_owned() });
        }
        let answer = serde_json::from_str(&line);
        match answer.map_err(|source| AskError::Answer { path: path.to_owned(), source })? {
            Answer::Progress(value) => alive(Some(&value)),
            Answer::Alive => alive(None),
            Answer::Done(value) => return Ok(value),
            Answer::Failed(why) => return Err(AskError::Failed(why)),
        }
    }
}
