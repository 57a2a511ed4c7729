//! Wakes an event loop through a descriptor that it polls.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd that is readable when there is something to do, for loops that poll descriptors: the waker of a
/// [`ReceiverQueue`](migration_core::engine::ReceiverQueue).
///
/// The loop calls [`clear`](Self::clear) first, and then does all that there is to do: what comes in between makes it readable
/// again.
#[derive(Debug)]
pub struct Wakeup(Arc<OwnedFd>);

impl Wakeup {
    /// An eventfd that is not readable yet. It is non-blocking, and closed when the process executes another program.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Returns a function that makes it readable, from any thread.
    pub fn waker(&self) -> impl Fn() + Send + Sync + use<> {
        let fd = self.0.clone();
        move || {
            // fails only if it is readable as it is: its counter is full
            let _ = rustix::io::write(&*fd, &1u64.to_ne_bytes());
        }
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        // fails only if it is unreadable as it is
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
