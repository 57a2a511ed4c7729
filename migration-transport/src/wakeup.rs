//! Wakes an event loop through a descriptor that it polls.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd that is readable when there is work to do, for loops that poll descriptors. It is the
/// waker of a [`ReceiverQueue`](migration_core::engine::ReceiverQueue).
///
/// The loop must call [`clear`](Self::clear) first and then do all the work. Work that arrives in
/// between makes the eventfd readable again.
#[derive(Debug)]
pub struct Wakeup(Arc<OwnedFd>);

impl Wakeup {
    /// Makes an eventfd that is not readable yet. It does not block, and is closed on exec.
    ///
    /// # Errors
    /// Fails if the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Returns a function that makes the eventfd readable, from any thread.
    pub fn waker(&self) -> impl Fn() + Send + Sync + use<> {
        let fd = self.0.clone();
        move || {
            // ignored: fails only if the counter is full, and then it is readable already
            let _ = rustix::io::write(&*fd, &1u64.to_ne_bytes());
        }
    }

    /// Makes the eventfd unreadable.
    pub fn clear(&self) {
        // ignored: fails only if it is unreadable already
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        io::{FdFlags, fcntl_getfd},
    };

    use super::*;

    #[test]
    fn it_is_readable_from_a_wake_up_until_it_is_cleared() {
        let wakeup = Wakeup::new().unwrap();
        let readable = || {
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&wakeup, PollFlags::IN)], Some(&at_once)).unwrap() == 1
        };
        assert!(fcntl_getfd(&wakeup).unwrap().contains(FdFlags::CLOEXEC));
        assert!(!readable());
        // does not wait
        wakeup.clear();
        let wake = wakeup.waker();
        wake();
        wake();
        assert!(readable());
        wakeup.clear();
        assert!(!readable());
    }
}
