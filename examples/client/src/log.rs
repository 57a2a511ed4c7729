//! Everything that a minivmm writes to stdout and stderr.
//!
//! A process that has a VM must not wait for the reader of its log, and must not end because there
//! is no reader. So lines go into a bounded queue, and one thread writes them. That thread may wait
//! for a pipe without limit. A line that does not fit, or cannot be written, is dropped and
//! counted. The next line that can be written reports the number of dropped lines.
//!
//! - `log!` and `note!` write a line to stderr through the queue. `log!` puts `minivmm: ` before
//!   the line.
//! - [`announce`] writes a line to stdout through a queue of its own, for processes that have a VM
//!   or keep its RAM.
//! - `out!` and [`print()`] write to stdout immediately, for commands that have nothing else to do.
//!
//! Lines on stderr are escaped as a whole, so that text of a peer cannot begin a line or control a
//! terminal. Text for stdout is escaped where it is made for people, and is JSON elsewhere.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::VecDeque,
    fmt,
    io::{self, IsTerminal},
    os::fd::AsFd,
    panic,
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    report::{Event, Observer},
    text::Escaped,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// The most bytes that wait to be written: a burst of thousands of lines, and little compared to a
/// VM.
const MAX_BYTES: usize = 256 << 10;
/// The longest time that the end of the process waits for queued lines.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Writes a line to stderr, with `minivmm: ` before it. Never waits, never panics.
#[macro_export]
macro_rules! log {
    ($($text:tt)*) => { $crate::log::line("minivmm: ", format_args!($($text)*)) };
}

/// Writes a line of a command's progress to stderr, without a prefix. Never waits, never panics.
#[macro_export]
macro_rules! note {
    ($($text:tt)*) => { $crate::log::line("", format_args!($($text)*)) };
}

/// Writes a line to stdout, for a command that has no VM. Never panics.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => { $crate::log::print(&format!("{}\n", format_args!($($text)*))) };
}

/// Whether stdout accepts no more output, because its reader has gone or a write failed.
static STDOUT_CLOSED: AtomicBool = AtomicBool::new(false);
/// Whether a write to stdout failed although its reader has not gone.
static STDOUT_FAILED: AtomicBool = AtomicBool::new(false);

static STDERR: Queue = Queue::new(Sink::Stderr);
static STDOUT: Queue = Queue::new(Sink::Stdout);

/// Prepares stdout and stderr of a process that will have a VM. The writing threads exist before
/// there is a line to write, and a thread that panics does not wait for a pipe.
pub fn start() {
    STDERR.start(&mut STDERR.lock());
    STDOUT.start(&mut STDOUT.lock());
    panic::set_hook(Box::new(|panic| {
        log!("{panic}");
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            trace.to_string().lines().for_each(|frame| note!("{frame}"));
        }
    }));
}

/// Queues a line for stderr.
pub fn line(prefix: &str, text: fmt::Arguments<'_>) {
    STDERR.push(format!("{prefix}{}\n", Escaped(&text.to_string())));
}

/// Queues a line for stderr that stands out on a terminal, with its detail.
pub fn heading(what: &str, detail: &str) {
    let detail = Escaped(detail);
    STDERR.push(if io::stderr().is_terminal() {
        format!("\x1b[1m{what}\x1b[0m {detail}\n")
    } else {
        format!("{what} {detail}\n")
    });
}

/// Queues text for stdout.
pub fn announce(text: String) {
    STDOUT.push(text);
}

/// Writes text to stdout. If the reader has gone, the text is dropped. Any other failure is logged
/// once, and makes [`finish`] return a status of failure.
pub fn print(text: &str) {
    if !STDOUT_CLOSED.load(Ordering::Relaxed)
        && let Err(error) = write_all(&io::stdout(), text.as_bytes())
    {
        stdout_failed(error);
    }
}

/// Records a failure to write to stdout.
pub fn stdout_failed(error: Errno) {
    STDOUT_CLOSED.store(true, Ordering::Relaxed);
    // a reader that closes the pipe, such as `head`, does not want the rest
    if error != Errno::EPIPE && !STDOUT_FAILED.swap(true, Ordering::Relaxed) {
        log!("stdout: {}", io::Error::from(error));
    }
}

/// Waits a short time for queued lines at the end of the process. Returns the exit status, which
/// becomes 1 if stdout failed and `output_counts` says that the output is the command's work.
pub fn finish(status: u8, output_counts: bool) -> u8 {
    let deadline = Instant::now() + LAST_LINES;
    STDOUT.flush(deadline);
    STDERR.flush(deadline);
    if output_counts && status == 0 && STDOUT_FAILED.load(Ordering::Relaxed) { 1 } else { status }
}

/// The target of lines.
enum Sink {
    Stdout,
    Stderr,
    #[cfg(test)]
    Test(fn(&[u8]) -> Result<(), Errno>),
}

impl Sink {
    /// Writes all bytes, or fails. May wait without limit.
    fn write(&self, bytes: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Stderr => write_all(&io::stderr(), bytes),
            Self::Stdout => write_all(&io::stdout(), bytes).inspect_err(|&error| stdout_failed(error)),
            #[cfg(test)]
            Self::Test(write) => write(bytes),
        }
    }

    /// Returns whether a write would probably not wait.
    fn is_ready(&self) -> bool {
        match self {
            Self::Stderr => wait_writable(&io::stderr(), PollTimeout::ZERO),
            Self::Stdout => wait_writable(&io::stdout(), PollTimeout::ZERO),
            #[cfg(test)]
            Self::Test(_) => true,
        }
    }
}

fn wait_writable(file: &impl AsFd, timeout: PollTimeout) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
}

/// Writes all bytes without the locks and buffers of the standard library, so that a thread that
/// waits here delays no other thread.
fn write_all(file: &impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match nix::unistd::write(file, bytes) {
            Ok(0) => return Err(Errno::EIO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::EINTR) => {}
            // another process has made the file non-blocking
            Err(Errno::EAGAIN) => drop(wait_writable(file, PollTimeout::NONE)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Text that waits, and the number of lines that are lost if the text is lost.
struct Entry {
    text: String,
    lines: u64,
}

impl Entry {
    fn dropped(lines: u64) -> Self {
        Self { text: format!("minivmm: {lines} lines of output were dropped here\n"), lines }
    }
}

struct Waiting {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// The number of lines that were dropped and are not reported yet.
    dropped: u64,
    /// Whether the last write failed.
    failing: bool,
    /// Whether an entry is being written.
    busy: bool,
    /// Whether there is a writing thread.
    writer: bool,
}

impl Waiting {
    fn put(&mut self, entry: Entry) {
        self.bytes += entry.text.len();
        self.entries.push_back(entry);
    }

    /// Returns the next text to write. After a failed write, a report of the lost lines precedes
    /// the next line. If no line waits, the report is written alone, unless the last write failed.
    fn next(&mut self) -> Option<Entry> {
        let next = self.entries.pop_front();
        self.bytes -= next.as_ref().map_or(0, |entry| entry.text.len());
        match next {
            Some(entry) if self.failing && self.dropped > 0 => {
                let mut both = Entry::dropped(std::mem::take(&mut self.dropped));
                both.text += &entry.text;
                both.lines += entry.lines;
                Some(both)
            }
            None if !self.failing && self.dropped > 0 => Some(Entry::dropped(std::mem::take(&mut self.dropped))),
            next => next,
        }
    }
}

struct Queue {
    sink: Sink,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    const fn new(sink: Sink) -> Self {
        let waiting =
            Waiting { entries: VecDeque::new(), bytes: 0, dropped: 0, failing: false, busy: false, writer: false };
        Self { sink, waiting: Mutex::new(waiting), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // only an allocation could panic while the lock is held
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn push(&'static self, text: String) {
        let mut waiting = self.lock();
        let note = (waiting.dropped > 0 && !waiting.failing).then(|| Entry::dropped(waiting.dropped));
        let needed = text.len() + note.as_ref().map_or(0, |note| note.text.len());
        if waiting.bytes + needed > MAX_BYTES {
            waiting.dropped += 1;
        } else {
            if let Some(note) = note {
                waiting.dropped = 0;
                waiting.put(note);
            }
            waiting.put(Entry { text, lines: 1 });
        }
        self.start(&mut waiting);
        drop(waiting);
        self.changed.notify_all();
    }

    /// Starts the writing thread, unless it runs. Without the thread, lines wait for the end of the
    /// process.
    fn start(&'static self, waiting: &mut Waiting) {
        if !waiting.writer {
            waiting.writer = thread::Builder::new().name("log".into()).spawn(|| self.write()).is_ok();
        }
    }

    /// Runs the writing thread.
    fn write(&self) {
        let mut waiting = self.lock();
        loop {
            if !self.write_next(waiting) {
                waiting = self.lock();
                while waiting.entries.is_empty() && (waiting.dropped == 0 || waiting.failing) {
                    waiting = self.changed.wait(waiting).unwrap_or_else(|e| e.into_inner());
                }
            } else {
                waiting = self.lock();
            }
        }
    }

    /// Writes the next text. Returns whether there was one.
    fn write_next(&self, mut waiting: MutexGuard<'_, Waiting>) -> bool {
        let Some(entry) = waiting.next() else { return false };
        waiting.busy = true;
        drop(waiting);
        let written = self.sink.write(entry.text.as_bytes());
        let mut waiting = self.lock();
        waiting.busy = false;
        waiting.failing = written.is_err();
        if waiting.failing {
            waiting.dropped += entry.lines;
        }
        drop(waiting);
        self.changed.notify_all();
        true
    }

    /// Waits until everything is written, or until `deadline`.
    fn flush(&self, deadline: Instant) {
        let mut waiting = self.lock();
        while !waiting.writer && !waiting.entries.is_empty() && self.sink.is_ready() {
            // no thread could be started
            self.write_next(waiting);
            waiting = self.lock();
        }
        while waiting.writer && (waiting.busy || !waiting.entries.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            waiting = self.changed.wait_timeout(waiting, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

/// Logs warnings. For components that need an observer for nothing else.
#[derive(Debug)]
pub struct Logged;

impl Observer for Logged {
    fn event(&self, event: &Event) {
        if let Event::Warning(what) = event {
            log!("{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    /// The behaviour of a test sink, and the lines that it has accepted.
    struct Pretended {
        state: Mutex<(Mode, Vec<String>)>,
        changed: Condvar,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Mode {
        Takes,
        Fails,
        Wedged,
    }

    impl Pretended {
        fn new(mode: Mode) -> Self {
            Self { state: Mutex::new((mode, Vec::new())), changed: Condvar::new() }
        }

        fn write(&self, bytes: &[u8]) -> Result<(), Errno> {
            let mut state = self.state.lock().unwrap();
            while state.0 == Mode::Wedged {
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap();
            }
            if state.0 == Mode::Fails {
                return Err(Errno::ENOSPC);
            }
            state.1.extend(String::from_utf8(bytes.to_vec()).unwrap().lines().map(str::to_owned));
            Ok(())
        }

        fn become_(&self, mode: Mode) {
            self.state.lock().unwrap().0 = mode;
            self.changed.notify_all();
        }

        fn taken(&self) -> Vec<String> {
            self.state.lock().unwrap().1.clone()
        }
    }

    fn generous() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_wedged_pipe_stops_nobody_and_the_lines_that_are_lost_are_counted() {
        static PIPE: LazyLock<Pretended> = LazyLock::new(|| Pretended::new(Mode::Wedged));
        static QUEUE: Queue = Queue::new(Sink::Test(|bytes| PIPE.write(bytes)));
        let line = format!("{}\n", "x".repeat(1023));
        let sent = 3 * MAX_BYTES as u64 / 1024;
        (0..sent).for_each(|_| QUEUE.push(line.clone()));
        assert!(QUEUE.lock().bytes <= MAX_BYTES);
        // the end of the process does not wait without limit either
        QUEUE.flush(Instant::now());
        PIPE.become_(Mode::Takes);
        QUEUE.flush(generous());
        QUEUE.push("the next one\n".into());
        QUEUE.flush(generous());
        let taken = PIPE.taken();
        let dropped: Vec<u64> =
            taken.iter().filter_map(|l| l.strip_prefix("minivmm: ")?.split(' ').next()?.parse().ok()).collect();
        let whole = taken.iter().filter(|l| l.starts_with('x')).count() as u64;
        assert!(whole >= MAX_BYTES as u64 / 1024, "{whole} of {sent}");
        assert_eq!(whole + dropped.iter().sum::<u64>(), sent, "{dropped:?}");
        assert_eq!(taken.last().unwrap(), "the next one");
    }

    /// The pipe accepts one line after lines were dropped. The report of those lines needs room,
    /// too.
    #[test]
    fn what_is_said_of_dropped_lines_needs_room_too() {
        static QUEUE: Queue = Queue::new(Sink::Stderr);
        // no thread writes
        QUEUE.lock().writer = true;
        let waiting = || {
            let waiting = QUEUE.lock();
            (waiting.bytes, waiting.dropped)
        };
        let line = format!("{}\n", "x".repeat(1023));
        (0..MAX_BYTES / 1024 + 3).for_each(|_| QUEUE.push(line.clone()));
        assert_eq!(waiting(), (MAX_BYTES, 3));
        QUEUE.lock().next();
        QUEUE.push(line);
        assert_eq!(waiting(), (MAX_BYTES - 1024, 4));
        QUEUE.push("short\n".into());
        let (bytes, dropped) = waiting();
        assert!(bytes <= MAX_BYTES && dropped == 0, "{bytes} {dropped}");
    }

    #[test]
    fn a_full_disk_loses_lines_and_says_how_many_when_there_is_room_again() {
        static DISK: LazyLock<Pretended> = LazyLock::new(|| Pretended::new(Mode::Fails));
        static QUEUE: Queue = Queue::new(Sink::Test(|bytes| DISK.write(bytes)));
        for text in ["one\n", "two\n", "three\n"] {
            QUEUE.push(text.into());
            QUEUE.flush(generous());
        }
        DISK.become_(Mode::Takes);
        QUEUE.push("four\n".into());
        QUEUE.flush(generous());
        assert_eq!(DISK.taken(), ["minivmm: 3 lines of output were dropped here", "four"]);
    }
}
