//! Makes a vCPU thread leave `KVM_RUN`, without ever losing a kick.
//!
//! A kick is a *standard* signal, as in QEMU. The kernel keeps real-time signals in a queue, and
//! refuses one (`EAGAIN`) if the user has as many pending signals as `RLIMIT_SIGPENDING` permits,
//! which may be none. A pending standard signal is one bit: it needs no memory and cannot be
//! refused. Every vCPU thread unblocks the signal, because a thread inherits the signal mask of
//! whoever started the process.

use std::{
    cell::Cell,
    io,
    sync::{Mutex, PoisonError},
};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Handles the signal on the vCPU's own thread. If the thread is about to enter `KVM_RUN`, the flag
/// makes that return at once. If it is inside, the signal itself does.
extern "C" fn handler(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Registered::new` set the pointer on this thread to a byte of the vCPU's mapping,
        // and it is reset to null before the mapping ends. The handler runs on this thread, so not
        // between the two.
        unsafe { flag.write_volatile(1) };
    }
}

/// The signal that kicks vCPU threads of this process. A VMM chooses it once. It must be a standard
/// signal that nothing else in the process uses, for example `SIGUSR1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KickSignal(i32);

impl KickSignal {
    /// Installs the handler of `signal` if it is not installed yet. Must be called before the first
    /// vCPU thread exists: without the handler the signal ends the process.
    ///
    /// # Errors
    /// Fails if `signal` is a real-time signal, which the kernel may refuse to send, or if the
    /// kernel does not allow a handler for it.
    pub fn install(signal: i32) -> io::Result<Self> {
        static INSTALLED: Mutex<Vec<i32>> = Mutex::new(Vec::new());
        if !(1..libc::SIGRTMIN()).contains(&signal) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{signal} is no standard signal")));
        }
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !installed.contains(&signal) {
            register_signal_handler(signal, handler).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
            installed.push(signal);
        }
        Ok(Self(signal))
    }

    /// Kicks the thread with this number. The thread may have ended.
    pub(super) fn kick(self, thread: u32) {
        // SAFETY: sends a signal with a handler to a thread of this process. The call fails only if
        // there is no such thread, and then there is nothing to kick.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, self.0) };
    }
}

/// A registration of this thread for kicks. It must be dropped before the vCPU.
pub(super) struct Registered(());

impl Registered {
    /// Registers this thread, which runs `vcpu`.
    ///
    /// # Errors
    /// Fails if the signal cannot be unblocked. The vCPU could then not be stopped.
    pub(super) fn new(vcpu: &mut VcpuFd, signal: KickSignal) -> Result<Self, String> {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        let registered = Self(());
        let KickSignal(signal) = signal;
        unblock_signal(signal).map_err(|e| format!("unblocking signal {signal}, which stops a vCPU: {e}"))?;
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}
