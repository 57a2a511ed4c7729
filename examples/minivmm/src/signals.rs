//! Handles the signals that would end a process that has a VM: see `docs/signals.md`.

use std::{
    fs, process,
    sync::{Arc, OnceLock},
    thread,
};

use minivmm_client::log;
use nix::sys::signal::{SigSet, Signal};
use vmm_sys_util::signal::register_signal_handler;

/// The action at a signal that is to end the process.
type End = Box<dyn Fn(Asked) + Send + Sync>;

/// The way in which a signal asks a process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// In order, with this exit status.
    ToEnd(u8),
    /// Immediately: the process exits as soon as this was handled.
    Again,
}

extern "C" fn nothing(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

/// Makes a write to a file that has reached its size limit fail with an error, in any command. (A
/// write to a pipe without a reader fails already, because the runtime ignores SIGPIPE.)
pub(crate) fn survive_file_limits() {
    // This signal can be handled, so the call does not fail. If it did, the default action would
    // remain.
    let _ = register_signal_handler(Signal::SIGXFSZ as libc::c_int, nothing);
}

/// SIGTERM, SIGINT and SIGHUP, for which a thread of this process waits.
#[derive(Clone, Default)]
pub(crate) struct Signals {
    /// The action of a process with a VM, set as soon as the process may have one.
    orderly: Arc<OnceLock<End>>,
}

impl Signals {
    /// Starts a thread that waits for these signals from now on. Must be called before there is any
    /// other thread, because other threads inherit that these signals are blocked.
    ///
    /// A signal that was ignored when the process began stays ignored, as `nohup` requires.
    pub(crate) fn wait() -> Result<Self, String> {
        let mut signals = SigSet::empty();
        let ignored = ignored();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            if ignored >> (signal as u32 - 1) & 1 == 0 {
                signals.add(signal);
            }
        }
        signals.thread_block().map_err(|e| format!("signals: {e}"))?;
        let this = Self::default();
        let waits = this.clone();
        let body = move || {
            let mut asked = false;
            while let Ok(signal) = signals.wait() {
                let status = 128 + signal as u8;
                let end = waits.orderly.get();
                if let Some(end) = end.filter(|_| !asked) {
                    log!("{signal}: this minivmm ends");
                    end(Asked::ToEnd(status));
                    asked = true;
                    continue;
                }
                end.iter().for_each(|end| end(Asked::Again));
                process::exit(log::finish(status, false).into());
            }
        };
        thread::Builder::new().name("signals".into()).spawn(body).map_err(|e| format!("signals: no thread: {e}"))?;
        Ok(this)
    }

    /// Sets the action `end`. From now on the first signal runs `end`, and a second one ends the
    /// process immediately. Before this call, the first signal ends the process immediately.
    pub(crate) fn end_by(&self, end: impl Fn(Asked) + Send + Sync + 'static) {
        // this is called once, so the cell is empty
        let _ = self.orderly.set(Box::new(end));
    }
}

/// Returns the set of ignored signals. The lowest bit stands for signal 1. Returns 0 if the set
/// cannot be determined.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
