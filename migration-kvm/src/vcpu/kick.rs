//! Getting a vCPU thread out of `KVM_RUN`, without ever losing a kick.
//!
//! The kick is a *standard* signal, as QEMU's is. The kernel keeps a real-time signal in a queue, and refuses it (`EAGAIN`) when
//! the user has as many pending as `RLIMIT_SIGPENDING` permits, which may be none. A standard signal that is pending is one bit: it
//! needs no memory, and cannot be refused. And it is unblocked by every thread that is kicked: a thread inherits the mask
//! of whoever started the process.

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

/// Runs on the vCPU's own thread: if it is about to enter `KVM_RUN`, the flag makes that return at once; if it is inside,
/// the signal itself does.
extern "C" fn handler(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by `Registered::new` on this thread to a byte of the vCPU's mapping, and reset to null before that
        // goes away; the handler runs on this thread, so it cannot run in between.
        unsafe { flag.write_volatile(1) };
    }
}

/// The signal by which vCPU threads of this process are kicked. A VMM chooses it, once.
///
/// It has to be a standard signal that nothing else in the process uses, for example `SIGUSR1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KickSignal(i32);

impl KickSignal {
    /// Installs the handler of `signal`, unless it is installed already. To be called before the first
    /// vCPU thread: without the handler the signal ends the process.
    ///
    /// # Errors
    /// When it is a real-time signal, which may be refused when it is sent, or the kernel does not let it
    /// be handled.
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

    /// Kicks the thread with this number, which may have ended.
    pub(super) fn kick(self, thread: u32) {
        // SAFETY: sends a signal that has a handler to a thread of this process, if there is one.
        // It fails only if there is none, and then there is nobody to kick.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, self.0) };
    }
}

/// This thread can be kicked as long as this lives; it must not outlive the vCPU.
pub(super) struct Registered(());

impl Registered {
    /// # Errors
    /// When the signal cannot be unblocked: the vCPU could not be stopped.
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
