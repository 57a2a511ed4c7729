//! Getting a vCPU thread out of `KVM_RUN`, without ever losing a kick. Beside `alias`, the only unsafe code of minivmm.
//!
//! The kick is a *standard* signal, as QEMU's is. The kernel keeps a real-time signal in a queue, and refuses it (`EAGAIN`) when
//! the user has as many pending as `RLIMIT_SIGPENDING` permits, which may be none. A standard signal that is pending is one bit: it
//! needs no memory, and cannot be refused. And it is unblocked by every thread that is kicked: a thread inherits the mask
//! of whoever started the process.

use std::{cell::Cell, io, sync::OnceLock, thread::JoinHandle};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, register_signal_handler, unblock_signal};

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// The signal that kicks.
pub(super) const SIGNAL: i32 = libc::SIGUSR1;

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

/// Installs the handler, once a process; before the first thread that may be kicked: without it the signal ends the process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| register_signal_handler(SIGNAL, handler).map_err(|e| e.errno()));
    installed.map_err(io::Error::from_raw_os_error)
}

/// This thread can be kicked as long as this lives; it must not outlive the vCPU.
pub(super) struct Registered(());

impl Registered {
    /// # Errors
    /// When the signal cannot be unblocked: the vCPU could not be stopped.
    pub(super) fn new(vcpu: &mut VcpuFd) -> Result<Self, String> {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        let registered = Self(());
        unblock_signal(SIGNAL).map_err(|e| format!("unblocking signal {SIGNAL}, which stops a vCPU: {e}"))?;
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

/// Kicks the thread. It may have ended.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    // fails only for a thread that has ended, which needs no kick
    let _ = thread.kill(SIGNAL);
}
