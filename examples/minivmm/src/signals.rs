//! Signals that would end a process that has a VM: see `docs/signals.md`.

use std::{
    fs, process,
    sync::{Arc, OnceLock},
    thread,
};

use minivmm_client::log;
use nix::sys::signal::{SigSet, Signal};
use vmm_sys_util::signal::register_signal_handler;

/// What is done at a signal that is to end the process.
type End = Box<dyn Fn(Asked) + Send + Sync>;

/// How a signal asks a process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// In order, with this status.
    ToEnd(u8),
    /// At once: the process is gone when this was handled.
    Again,
}

extern "C" fn nothing(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

/// A file that has reached its limit is an error of the write, for any command. (That a pipe has
/// lost its reader is one already: the runtime ignores SIGPIPE.)
pub(crate) fn survive_file_limits() {
    // it can be handled, so this does not fail; if it did, all would be as it is by default
    let _ = register_signal_handler(Signal::SIGXFSZ as libc::c_int, nothing);
}

/// SIGTERM, SIGINT and SIGHUP, once this process waits for them.
#[derive(Clone, Default)]
pub(crate) struct Signals {
    /// How to end with a VM, as soon as there can be one.
    orderly: Arc<OnceLock<End>>,
}

impl Signals {
    /// Waits for them from now on, on a thread of their own. To be called before there is any other
    /// thread: those inherit that these signals are not theirs.
    ///
    /// A signal that was ignored when the process began stays so, as `nohup` wants it.
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

    /// From now on the first signal does this, and a second one ends the process at once. Until
    /// then already the first one does.
    pub(crate) fn end_by(&self, end: impl Fn(Asked) + Send + Sync + 'static) {
        // it is said once
        let _ = self.orderly.set(Box::new(end));
    }
}

/// The signals that are ignored, a bit for each, from the lowest one for signal 1. None where that
/// cannot be known.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
