//! The current activity of each vCPU, for the errors of threads that waited for one too long.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use migration_core::vm::VmError;
use thiserror::Error;

/// The longest time that any call waits for a vCPU to stop, to do some work, or to end. A vCPU
/// usually answers within 50 µs, but a host that is blocked for seconds must not make a pause fail.
pub const MAX_WAIT: Duration = Duration::from_secs(10);
/// The interval at which a vCPU that has not stopped is kicked again.
pub(super) const KICK_AGAIN: Duration = Duration::from_millis(20);

/// The current activity of a vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Doing {
    /// The thread has not begun yet.
    Starting,
    /// The thread waits until the vCPU may run.
    Stopped,
    /// The thread works on the vCPU for another thread.
    Job,
    /// The thread executes the guest.
    Guest,
    /// The thread handles the guest's write to this port.
    Write(u16),
    /// The thread handles the guest's read of this port.
    Read(u16),
    /// The thread collects the dirty ring, which was full.
    RingFull,
    /// The thread handles another exit of the guest.
    Exit,
    /// The thread enters KVM to complete the last exit.
    Completing,
    /// The thread has ended.
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

/// The activity of every vCPU. Each vCPU's own thread writes it, and any thread can read it without
/// a lock.
pub(super) struct Activities(Vec<AtomicU32>);

const PORT: u32 = 16;

impl Activities {
    pub(super) fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| AtomicU32::new(0)).collect())
    }

    /// Sets the activity of a vCPU.
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
        if let Some(activity) = self.0.get(vcpu) {
            // relaxed, because it is only used for messages
            activity.store(word, Ordering::Relaxed);
        }
    }

    /// Returns the last activity of a vCPU.
    pub(super) fn get(&self, vcpu: usize) -> Doing {
        let word = self.0.get(vcpu).map_or(0, |activity| activity.load(Ordering::Relaxed));
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

/// The reason why waiting for a vCPU failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuError {
    /// The threads of the vCPUs have ended.
    #[error("the vCPUs' threads have ended")]
    Ended,
    /// A vCPU did not answer within [`MAX_WAIT`].
    #[error("vCPU {vcpu} does not {what} within {} s: {doing}", MAX_WAIT.as_secs())]
    Stuck {
        /// The number of the vCPU.
        vcpu: usize,
        /// The action for which it was waited.
        what: &'static str,
        /// The activity of the vCPU.
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
    fn an_activity_is_read_as_it_was_set() {
        let activities = Activities::new(2);
        use Doing::*;
        for doing in [Starting, Stopped, Job, Guest, Write(0xffff), Read(0x3f8), RingFull, Exit, Completing, Ended] {
            activities.set(1, doing);
            assert_eq!((activities.get(0), activities.get(1)), (Starting, doing));
        }
        let stuck = VcpuError::Stuck { vcpu: 3, what: "stop", doing: Write(0x3f8) };
        assert_eq!(stuck.to_string(), "vCPU 3 does not stop within 10 s: it handles a write to port 0x3f8");
    }
}
