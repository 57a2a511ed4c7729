//! Reading faults from a userfaultfd.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
    unistd::read,
};

use crate::tracker::UserFault;

/// `sizeof(struct uffd_msg)`.
const MESSAGE: usize = 32;
/// Messages taken in one go. No more, so that several handlers share a burst.
const BATCH: usize = 16;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE_PROTECT: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

/// A fault as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawFault {
    pub(super) address: u64,
    pub(super) kind: Kind,
    /// 0 without the feature THREAD_ID.
    pub(super) thread: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The page does not exist.
    Missing,
    /// It is in the file, but not mapped.
    Minor,
    WriteProtect,
}

/// The queue of faults, and a bell that ends the waiting for them.
pub(super) struct Faults {
    fault: Arc<UserFault>,
    /// Once rung it stays so.
    bell: EventFd,
}

impl Faults {
    pub(super) fn new(fault: Arc<UserFault>) -> io::Result<Self> {
        Ok(Self { fault, bell: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)? })
    }

    /// Makes [`next`](Self::next) return at once, now and in future.
    pub(super) fn ring(&self) {
        // fails only when the counter is full, and then it has been rung
        let _ = self.bell.write(1);
    }

    /// Waits for faults until `deadline` (`None`: for ever), and appends them. `false` when that
    /// passed or the bell was rung.
    pub(super) fn next(&self, deadline: Option<Instant>, into: &mut Vec<RawFault>) -> io::Result<bool> {
        loop {
            if !self.ready(deadline)? {
                return Ok(false);
            }
            let mut messages = [0; MESSAGE * BATCH];
            match read(self.fault.as_fd(), &mut messages) {
                // an event other than a fault is acknowledged by reading it
                Ok(n) => into.extend(messages[..n].as_chunks().0.iter().filter_map(parse)),
                // EAGAIN: another handler was faster
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !into.is_empty() {
                return Ok(true);
            }
        }
    }

    fn ready(&self, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            // rounded up, or the last millisecond would be spent spinning
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left.saturating_add(Duration::from_micros(999))).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [self.fault.as_fd(), self.bell.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if fds[1].any().unwrap_or(true) {
                return Ok(false);
            }
            let events = fds[0].revents().unwrap_or(PollFlags::empty());
            if events.contains(PollFlags::POLLIN) {
                return Ok(true);
            }
            if !events.is_empty() {
                return Err(io::Error::other("the userfaultfd is not usable"));
            }
        }
    }
}

fn parse(message: &[u8; MESSAGE]) -> Option<RawFault> {
    if message[0] != EVENT_PAGEFAULT {
        return None;
    }
    // event and 7 reserved bytes; then flags, address, and the thread's number
    let (words, _) = message.as_chunks::<8>();
    let word = |i: usize| u64::from_ne_bytes(words[i]);
    let kind = match word(1) {
        flags if flags & FLAG_WRITE_PROTECT != 0 => Kind::WriteProtect,
        flags if flags & FLAG_MINOR != 0 => Kind::Minor,
        _ => Kind::Missing,
    };
    let [a, b, c, d, ..] = words[3];
    Some(RawFault { address: word(2), kind, thread: u32::from_ne_bytes([a, b, c, d]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_kernel_lays_them_out() {
        let mut message = [0; MESSAGE];
        assert_eq!(parse(&message), None);
        message[0] = EVENT_PAGEFAULT;
        message[8] = 1 | 4; // a write, minor
        message[16..24].copy_from_slice(&0x7fff_1234_5000u64.to_ne_bytes());
        message[24..28].copy_from_slice(&77u32.to_ne_bytes());
        let fault = RawFault { address: 0x7fff_1234_5000, kind: Kind::Minor, thread: 77 };
        assert_eq!(parse(&message), Some(fault));
        message[8] = 1;
        assert_eq!(parse(&message), Some(RawFault { kind: Kind::Missing, ..fault }));
        message[8] = 1 | 2;
        assert_eq!(parse(&message), Some(RawFault { kind: Kind::WriteProtect, ..fault }));
    }
}
