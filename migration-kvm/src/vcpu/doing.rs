//! What each vCPU is doing, for those that wait for one in vain.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use migration_core::vm::VmError;
use thiserror::Error;

/// The longest time that any call waits for a vCPU: to stop, to do some work, or to end. A vCPU answers within 50 µs; a host
/// that stands still for seconds must not fail a pause.
pub const MOST_WAIT: Duration = Duration::from_secs(10);
/// A vCPU that has not stopped after this time is kicked again, and so on until it has.
pub(super) const KICK_AGAIN: Duration = Duration::from_millis(20);

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Doing {
    /// It has not begun yet.
    Starting,
    /// It waits until the vCPU may run.
    Stopped,
    /// It works on the vCPU for another thread.
    Job,
    /// It executes the guest.
    Guest,
    /// The guest has written this port.
    Write(u16),
    /// The guest has read this port.
    Read(u16),
    /// It collects the dirty ring, which was full.
    RingFull,
    /// It handles another exit of the guest.
    Exit,
    /// It lets KVM complete the last exit.
    Completing,
    /// It has ended.
    Ended,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Doing::Starting => "its thread has not begun",
            Doing::Stopped => "it is stopped",
            Doing::Job => "it saves or loads its state",
            Doing::Guest => "it executes the guest",
            Doing::Write(port) => return write!(f, "it handles a write to port {port:#x}"),
            Doing::Read(port) => return write!(f, "it handles a read of port {port:#x}"),
            Doing::RingFull => "it collects the dirty ring",
            Doing::Exit => "it handles an exit",
            Doing::Completing => "it completes an exit",
            Doing::Ended => "its thread has ended",
        };
        f.write_str(text)
    }
}

/// What every vCPU is doing: written by its own thread, read by any other one without a lock.
pub(super) struct Doings(Vec<AtomicU32>);

const PORT: u32 = 16;

impl Doings {
    pub(super) fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| AtomicU32::new(0)).collect())
    }

    /// Notes what a vCPU does from now on.
    pub(super) fn set(&self, vcpu: usize, doing: Doing) {
        let word = match doing {
            Doing::Starting => 0,
            Doing::Stopped => 1,
            Doing::Job => 2,
            Doing::Guest => 3,
            Doing::Write(port) => 4 | u32::from(port) << PORT,
            Doing::Read(port) => 5 | u32::from(port) << PORT,
            Doing::RingFull => 6,
            Doing::Exit => 7,
            Doing::Completing => 8,
            Doing::Ended => 9,
        };
        if let Some(place) = self.0.get(vcpu) {
            // it is for messages; the locks order everything else
            place.store(word, Ordering::Relaxed);
        }
    }

    /// What a vCPU was last said to do.
    pub(super) fn get(&self, vcpu: usize) -> Doing {
        let word = self.0.get(vcpu).map_or(0, |place| place.load(Ordering::Relaxed));
        let port = (word >> PORT) as u16;
        match word & ((1 << PORT) - 1) {
            0 => Doing::Starting,
            1 => Doing::Stopped,
            2 => Doing::Job,
            3 => Doing::Guest,
            4 => Doing::Write(port),
            5 => Doing::Read(port),
            6 => Doing::RingFull,
            8 => Doing::Completing,
            9 => Doing::Ended,
            _ => Doing::Exit,
        }
    }
}

/// Why nothing came of a wait for a vCPU.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuError {
    /// The threads of the vCPUs have ended.
    #[error("the vCPUs' threads have ended")]
    Ended,
    /// A vCPU did not answer within [`MOST_WAIT`].
    #[error("vCPU {vcpu} does not {what} within {} s: {doing}", MOST_WAIT.as_secs())]
    Stuck {
        /// The vCPU's number.
        vcpu: usize,
        /// What it was to do.
        what: &'static str,
        /// What it does instead.
        doing: Doing,
    },
}

impl From<VcpuError> for VmError {
    fn from(error: VcpuError) -> Self {
        VmError::new(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vcpu_does_is_read_as_it_was_noted() {
        let doings = Doings::new(2);
        use Doing::*;
        for doing in [Starting, Stopped, Job, Guest, Write(0xffff), Read(0x3f8), RingFull, Exit, Completing, Ended] {
            doings.set(1, doing);
            assert_eq!((doings.get(0), doings.get(1)), (Starting, doing));
        }
        let stuck = VcpuError::Stuck { vcpu: 3, what: "stop", doing: Write(0x3f8) };
        assert_eq!(stuck.to_string(), "vCPU 3 does not stop within 10 s: it handles a write to port 0x3f8");
    }
}
