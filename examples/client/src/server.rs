//! The server's end of a control socket: a thread for each client, limits for clients that send
//! nothing, and an answer for clients that cannot be served.
//!
//! When the process has no descriptor or no thread left, a client gets an error and its connection
//! is closed. A descriptor is kept in reserve for that ([`Shortage`]).

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use migration_transport::Shortage;
use serde_json::Value;

use crate::{Answer, Request, Wishes};

/// The longest request line in bytes. A request has a few hundred bytes.
const MAX_REQUEST: u64 = 64 << 10;
/// The interval at which a client of a long request gets a sign of life: several times within the
/// shortest time limit that is useful for a client.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// The part of a server that handles the requests of clients.
pub trait Serve: Send + Sync + 'static {
    /// Records that a request has arrived. [`answered`](Self::answered) follows when its client has
    /// the answer, or has gone.
    fn asked(&self);

    /// Handles a request, and returns the result or the reason of a failure. Each value that is
    /// passed to `progress` is sent to the client immediately.
    ///
    /// # Errors
    /// Returns an error if the request fails. The error is the reason for the client.
    fn handle(self: &Arc<Self>, request: Request, progress: &mut dyn FnMut(Value)) -> Result<Value, String>;

    /// Called when the client of [`Request::Quit`] has its answer.
    fn quit(&self);

    /// Records that a client has its answer, or has gone.
    fn answered(&self);
}

/// Limits for the clients of a control socket.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most clients at once, including those that wait for the end of a migration.
    pub clients: usize,
    /// The most clients that have not sent their request yet. Beyond this number, the connection of
    /// the oldest one is closed.
    pub silent: usize,
    /// The longest time until a request has arrived, and the longest time in which a client reads
    /// nothing of its answer.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 128, silent: 32, patience: Duration::from_secs(10) }
    }
}

/// The longest time in which a refused client may send its request. A client that writes to a
/// closed socket would not read the reason.
const LAST_REQUEST: Duration = Duration::from_millis(200);
/// The shortest interval between two log lines about refused clients.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// The clients that are served.
struct Clients {
    limits: Limits,
    count: AtomicUsize,
    /// The clients that have not sent their request yet, the oldest one first.
    silent: Mutex<VecDeque<Arc<UnixStream>>>,
}

/// Counts a client until this is dropped.
struct Counted(Arc<Clients>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves clients until the listener fails.
pub fn serve<S: Serve>(listener: &UnixListener, server: &Arc<S>, limits: Limits) {
    let clients = Arc::new(Clients { limits, count: AtomicUsize::new(0), silent: Mutex::default() });
    if let Err(error) = listener.set_nonblocking(true) {
        return log!("control: no client is served: {error}");
    }
    let (mut shortage, mut told) = (Shortage::new(), None);
    loop {
        let refused = match shortage.accept_within(&[listener.as_fd()], Duration::MAX, |_| listener.accept()) {
            Ok(Some((client, _))) => clients.begin(client, server),
            Ok(None) => shortage.take().map_or(Ok(()), |error| {
                let why = format!("this minivmm can accept no client: {error}");
                if let Some((client, _)) = shortage.accept_to_refuse(1, |_| listener.accept()) {
                    refuse(&client, &why);
                }
                Err(why)
            }),
            Err(error) => return log!("control: no client is served any more: {error}"),
        };
        if let Err(why) = refused
            && told.is_none_or(|at: Instant| at.elapsed() >= TELL_AGAIN)
        {
            told = Some(Instant::now());
            log!("control: {why}");
        }
    }
}

impl Clients {
    fn silent(&self) -> MutexGuard<'_, VecDeque<Arc<UnixStream>>> {
        // a panic leaves no item incomplete in this list
        self.silent.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Serves a client on a separate thread, or returns the reason why the client is not served.
    fn begin<S: Serve>(self: &Arc<Self>, client: UnixStream, server: &Arc<S>) -> Result<(), String> {
        let client = Arc::new(client);
        let mut silent = self.silent();
        if silent.len() >= self.limits.silent || self.count.load(Ordering::SeqCst) >= self.limits.clients {
            match silent.pop_front() {
                Some(oldest) => let_go(&oldest, "no request came, and others wait"),
                None => {
                    drop(silent);
                    let why = format!("{} clients are served already", self.limits.clients);
                    refuse(&client, &why);
                    return Err(why);
                }
            }
        }
        silent.push_back(client.clone());
        drop(silent);
        self.count.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(self.clone());
        let (served, server) = (client.clone(), server.clone());
        let body = move || {
            // a client that has gone cannot be informed
            let _ = serve_client(&served, &server, &counted.0);
        };
        thread::Builder::new().name("client".into()).spawn(body).map(drop).map_err(|error| {
            self.heard(&client);
            let why = format!("this minivmm has no thread for another client: {error}");
            refuse(&client, &why);
            why
        })
    }

    /// Removes a client from those that have not sent their request yet.
    fn heard(&self, client: &Arc<UnixStream>) {
        self.silent().retain(|other| !Arc::ptr_eq(other, client));
    }
}

/// Sends the reason, and closes the connection in both directions.
fn let_go(client: &UnixStream, why: &str) {
    // best effort: the client may have gone
    let _ = client.set_write_timeout(Some(LAST_REQUEST)).and_then(|()| say(client, &Answer::Failed(why.into())));
    let _ = client.shutdown(std::net::Shutdown::Both);
}

/// Answers a client that is not served.
fn refuse(client: &UnixStream, why: &str) {
    let _ = read_request(client, LAST_REQUEST);
    let_go(client, why);
}

fn say(mut client: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    client.write_all(&line)
}

/// Returns the request: a line, or everything before the end of the stream.
fn read_request(mut client: &UnixStream, within: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + within;
    let (mut line, mut piece) = (Vec::new(), [0; 4096]);
    while (line.len() as u64) < MAX_REQUEST {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.set_read_timeout(Some(left))?;
        match client.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => line.extend_from_slice(&piece[..n]),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
            Err(e) => return Err(e),
        }
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            break;
        }
    }
    Ok(line)
}

fn serve_client<S: Serve>(client: &Arc<UnixStream>, server: &Arc<S>, clients: &Clients) -> io::Result<()> {
    let patience = clients.limits.patience;
    let line = read_request(client, patience);
    clients.heard(client);
    client.set_write_timeout(Some(patience))?;
    let line = match line {
        Ok(line) => line,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            return say(client, &Answer::Failed(format!("no request came within {patience:?}")));
        }
        Err(error) => return Err(error),
    };
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(error) => return say(client, &Answer::Failed(format!("not a request: {error}"))),
    };
    // every request is a JSON object
    let wishes: Wishes = serde_json::from_slice(&line).unwrap_or_default();
    let quit = matches!(request, Request::Quit);
    server.asked();
    let answers = Answers { client, gone: Mutex::new(false) };
    let answer = match handle(&answers, server, request, wishes) {
        Ok(value) => Answer::Done(value),
        Err(why) => Answer::Failed(why),
    };
    let said = if answers.say(&answer) { Ok(()) } else { client.shutdown(std::net::Shutdown::Both) };
    if quit {
        server.quit();
    }
    server.answered();
    said
}

/// Handles a request. Meanwhile sends signs of life to the client of a long request, if the client
/// wishes that.
fn handle<S: Serve>(answers: &Answers<'_>, server: &Arc<S>, request: Request, wishes: Wishes) -> Result<Value, String> {
    thread::scope(|scope| {
        // dropped when the request is done
        let (_done, ended) = mpsc::channel::<()>();
        if wishes.alive && request.takes_long() {
            let alive = move || {
                // The first one is sent immediately. A client that is interrupted then knows that
                // its request has arrived.
                while answers.say(&Answer::Alive) && ended.recv_timeout(ALIVE_EVERY) == Err(RecvTimeoutError::Timeout) {
                }
            };
            let started = thread::Builder::new().name("client".into()).spawn_scoped(scope, alive);
            started.map_err(|error| format!("this minivmm has no thread for the request: {error}"))?;
        }
        server.handle(request, &mut |progress| {
            // the migration continues without its client
            let _ = answers.say(&Answer::Progress(progress));
        })
    })
}

/// Writes answers to a client from several threads.
struct Answers<'a> {
    client: &'a UnixStream,
    /// Whether the client has read nothing for too long. Such a client has half a line, and another
    /// line would be useless.
    gone: Mutex<bool>,
}

impl Answers<'_> {
    /// Sends an answer. Returns whether the client has accepted it.
    fn say(&self, answer: &Answer) -> bool {
        let mut gone = self.gone.lock().unwrap_or_else(|e| e.into_inner());
        *gone = *gone || say(self.client, answer).is_err();
        !*gone
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use serde_json::json;

    use super::*;

    /// A server without a VM.
    struct Empty;

    impl Serve for Empty {
        fn asked(&self) {}

        fn handle(self: &Arc<Self>, request: Request, _: &mut dyn FnMut(Value)) -> Result<Value, String> {
            match request {
                Request::Status => Ok(json!({"state": "ended"})),
                other => Err(format!("there is no VM for {other:?}")),
            }
        }

        fn quit(&self) {}

        fn answered(&self) {}
    }

    fn socket(limits: Limits) -> (tempfile::TempDir, impl Fn() -> UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || serve(&listener, &Arc::new(Empty), limits));
        (folder, move || UnixStream::connect(&path).unwrap())
    }

    /// Returns the answer that a client gets in the end.
    fn told(client: &UnixStream) -> Value {
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn status(mut client: UnixStream) -> Value {
        client.write_all(b"{\"command\":\"status\"}\n").unwrap();
        told(&client)
    }

    fn why(answer: &Value) -> &str {
        answer["failed"].as_str().unwrap_or_default()
    }

    #[test]
    fn the_oldest_silent_client_makes_room() {
        let limits = Limits { silent: 3, patience: Duration::from_secs(3600), ..Limits::default() };
        let (_folder, connect) = socket(limits);
        let silent: Vec<_> = (0..5).map(|_| connect()).collect();
        for oldest in &silent[..2] {
            assert!(why(&told(oldest)).contains("no request came"));
        }
        // a client that sends a request replaces a silent one, and its own place is free afterwards
        assert!(status(connect())["done"].is_object());
        assert!(why(&told(&silent[2])).contains("others wait"));
        for patient in [connect(), silent[3].try_clone().unwrap(), silent[4].try_clone().unwrap()] {
            assert!(status(patient)["done"].is_object());
        }
    }

    #[test]
    fn a_client_that_sends_no_whole_request_is_given_up() {
        let limits = Limits { patience: Duration::from_millis(50), ..Limits::default() };
        let (_folder, connect) = socket(limits);
        let mut half = connect();
        half.write_all(b"{\"command\":").unwrap();
        for client in [connect(), half] {
            assert!(why(&told(&client)).contains("within 50ms"));
        }
    }

    #[test]
    fn only_who_asks_gets_signs_of_life() {
        let (_folder, connect) = socket(Limits::default());
        let lines = |request: &[u8]| {
            let mut client = connect();
            client.write_all(request).unwrap();
            BufReader::new(client).lines().map(Result::unwrap).collect::<Vec<_>>()
        };
        // there is no VM, so the answer is immediate
        let old = lines(b"{\"command\":\"pause\"}\n");
        assert!(old.len() == 1 && old[0].starts_with("{\"failed\""), "{old:?}");
        let new = lines(b"{\"command\":\"pause\",\"alive\":true}\n");
        assert_eq!((new[0].as_str(), &new[1..]), ("\"alive\"", &old[..]));
        // a short request is answered before the first sign of life would be sent
        let status = lines(b"{\"command\":\"status\",\"alive\":true}\n");
        assert!(status.len() == 1 && status[0].starts_with("{\"done\""), "{status:?}");
    }

    #[test]
    fn one_client_too_many_hears_why() {
        let (_folder, connect) = socket(Limits { clients: 0, ..Limits::default() });
        assert_eq!(why(&status(connect())), "0 clients are served already");
    }
}
