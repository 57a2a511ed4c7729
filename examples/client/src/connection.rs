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

/// The reason why a request has no result. The text does not repeat the cause.
#[derive(Debug, Error)]
pub enum AskError {
    /// The socket cannot be connected to, written or read.
    #[error("control socket {}", path.display())]
    Socket {
        /// The path of the socket.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The server shows no sign of life. The requested action may still happen.
    #[error(
        "the minivmm at {} does not answer within {patience:?}: it may be stopped or stuck; what was asked for may still \
         happen (--answer-timeout sets how long to wait)",
        path.display()
    )]
    Silent {
        /// The path of the socket.
        path: PathBuf,
        /// The time for which the client has waited.
        patience: Duration,
    },
    /// The server has closed the connection. The requested action may still happen.
    #[error("{} closed the connection without an answer", path.display())]
    Closed {
        /// The path of the socket.
        path: PathBuf,
    },
    /// The server's line is not an answer of a minivmm.
    #[error("answer of {}", path.display())]
    Answer {
        /// The path of the socket.
        path: PathBuf,
        /// The error in the line.
        source: serde_json::Error,
    },
    /// The request cannot be written as JSON: a path in it is not Unicode.
    #[error(transparent)]
    Request(serde_json::Error),
    /// The server has refused the request, or has failed. Contains the server's reason.
    #[error("{0}")]
    Failed(String),
}

/// Returns the text, for programs whose errors are texts.
impl From<AskError> for String {
    fn from(error: AskError) -> Self {
        describe(error)
    }
}

/// Sends a request and returns the result, however long it takes. Calls `progress` for each line of
/// progress before the result.
///
/// # Errors
/// Returns an error in the cases of [`AskError`].
pub fn ask(path: &Path, request: &Request, mut progress: impl FnMut(&Value)) -> Result<Value, AskError> {
    let server = UnixStream::connect(path).map_err(|source| AskError::Socket { path: path.to_owned(), source })?;
    converse(path, server, request, None, &mut |value| value.into_iter().for_each(&mut progress))
}

/// Sends a request as [`ask`] does, to a server that shows signs of life. Returns an error if the
/// server shows none for `patience`, because it is stopped or stuck. Calls `alive` for each line
/// before the last one, with the progress if the line has any.
///
/// # Errors
/// Returns an error in the cases of [`AskError`].
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

/// The longest time without a sign of life of another minivmm, for a request of a process that has
/// a VM.
const PEER_PATIENCE: Duration = Duration::from_secs(10);

/// Sends a request as [`ask`] does, to another minivmm, from a process that has a VM. Returns an
/// error if the other minivmm shows no sign of life for 10 s, because it is stopped.
///
/// # Errors
/// Returns an error in the cases of [`AskError`].
pub fn ask_peer(path: &Path, request: &Request) -> Result<Value, AskError> {
    ask_within(path, request, PEER_PATIENCE, &mut |_| {})
}

/// Connects to a socket within `patience`. Connecting waits while the server has not accepted too
/// many other clients, and has no time-out of its own.
fn connect_within(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let (tx, rx) = mpsc::channel();
    let socket = path.to_owned();
    // a thread that connects too late ends with this process
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
    // a time-out of zero would be refused
    let bound = |left: Duration| Some(left.max(Duration::from_millis(1)));
    server.set_write_timeout(patience.and_then(bound)).map_err(context)?;
    server.write_all(&line).map_err(context)?;
    let began = Instant::now();
    let mut server = BufReader::new(server);
    loop {
        // A short request must be answered within `patience`. During a long one, no silence may be
        // longer than that.
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
