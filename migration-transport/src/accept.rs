//! Waits for connections. Bad peers and a lack of descriptors do not end the wait.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    thread,
    time::{Duration, Instant},
};

use migration_core::channel::Room;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// The pause after a failure for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(20);
/// The time for which a shortage must last before it is reported.
const REPORT_AFTER: Duration = Duration::from_millis(50);

/// A record of what a listener lacks to accept waiting connections, and a reserved descriptor for
/// that case.
///
/// A process without descriptors can neither accept a connection nor refuse it: the same connection
/// would stay in the queue. With the reserved descriptor, one connection at a time can be accepted
/// and informed why it is refused.
///
/// ```
/// use std::{os::fd::AsFd, os::unix::net::{UnixListener, UnixStream}, time::Duration};
///
/// use migration_transport::Shortage;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("socket");
/// let listener = UnixListener::bind(&path)?;
/// listener.set_nonblocking(true)?;
/// let mut shortage = Shortage::new();
/// # let client = UnixStream::connect(&path)?;
/// match shortage.accept_within(&[listener.as_fd()], Duration::from_millis(100), |_| listener.accept())? {
///     Some((connection, _)) => drop(connection), // serve it
///     None => {
///         if let Some(reason) = shortage.take()
///             && let Some((connection, _)) = shortage.accept_to_refuse(1, |_| listener.accept())
///         {
///             eprintln!("refused: {reason}"); // and inform the peer
///             drop(connection);
///         }
///     }
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Shortage {
    error: Option<io::Error>,
    /// The reserved descriptor. `None` while it is in use, or if none is available.
    reserved: Option<OwnedFd>,
}

impl Default for Shortage {
    fn default() -> Self {
        Self::new()
    }
}

impl Shortage {
    /// Makes a record without a shortage, and reserves a descriptor if one is available.
    pub fn new() -> Self {
        Self { error: None, reserved: reserve() }
    }

    /// Waits for a connection at any of the listening, non-blocking sockets `fds`. Calls `accept`
    /// with the index of a socket at which a connection waits, and returns its result, or `None` if
    /// `timeout` has passed.
    ///
    /// After a lack of descriptors or memory, `accept` is called again with short pauses. If the
    /// lack lasts, the call returns `None` before `timeout`, and [`take`](Self::take) then returns
    /// the reason.
    ///
    /// # Errors
    /// Fails if a listening socket is broken.
    pub fn accept_within<T>(
        &mut self,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
        accept: impl FnMut(usize) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if self.reserved.is_none() {
            self.reserved = reserve();
        }
        accept_from_any(fds, timeout, Some(&mut self.error), accept)
    }

    /// Returns the reason why no connection could be accepted since the last call, or `None` if
    /// there was no shortage.
    pub fn take(&mut self) -> Option<io::Error> {
        self.error.take()
    }

    /// Releases the reserved descriptor and calls `accept` with the indexes from 0 to `sockets`
    /// until it returns a connection. The caller should inform the peer that it is refused, and
    /// close the connection. The next [`accept_within`](Self::accept_within) reserves a descriptor
    /// again.
    pub fn accept_to_refuse<T>(&mut self, sockets: usize, accept: impl FnMut(usize) -> io::Result<T>) -> Option<T> {
        drop(self.reserved.take()?);
        (0..sockets).map(accept).find_map(Result::ok)
    }
}

/// Opens a descriptor to reserve. It needs no file, because a jail may have none.
fn reserve() -> Option<OwnedFd> {
    UnixDatagram::unbound().ok().map(OwnedFd::from)
}

/// Counts the available descriptors by opening them for a moment, up to the requested number.
pub(crate) struct Descriptors;

impl Room for Descriptors {
    fn channels(&self, wanted: usize) -> usize {
        let Some(first) = reserve() else { return 0 };
        let copies: Vec<_> = (1..wanted).map_while(|_| first.try_clone().ok()).collect();
        wanted.min(1 + copies.len())
    }
}

/// Waits for a connection at `fd`, a listening, non-blocking socket. Calls `accept` until it
/// returns a connection (`Some`), the listener breaks (`Err`) or `timeout` passes (`None`).
pub(crate) fn accept_within<T>(
    fd: BorrowedFd<'_>,
    timeout: Duration,
    mut accept: impl FnMut() -> io::Result<T>,
) -> io::Result<Option<T>> {
    accept_from_any(&[fd], timeout, None, |_| accept())
}

/// Waits for a connection at several sockets, like [`accept_within`]. `accept` gets the index of a
/// socket at which a connection waits. If a `shortage` is given, the reason why the host cannot
/// accept connections is stored there, and ends the wait unless the shortage is over in a moment.
fn accept_from_any<T>(
    fds: &[BorrowedFd<'_>],
    timeout: Duration,
    mut shortage: Option<&mut Option<io::Error>>,
    mut accept: impl FnMut(usize) -> io::Result<T>,
) -> io::Result<Option<T>> {
    // a time-out that is too long for `Instant` means no deadline
    let mut deadline = Instant::now().checked_add(timeout);
    let left =
        |deadline: Option<Instant>| deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
    loop {
        if let Some(index) = readable(fds, left(deadline))? {
            match accept(index) {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(e) => match reaction(&e) {
                    Reaction::Skip => {}
                    // the connection stays in the queue, so poll would return at once again
                    Reaction::BackOff => {
                        if let Some(shortage) = &mut shortage {
                            **shortage = Some(e);
                            deadline = Some(report_at(deadline, Instant::now()));
                        }
                        thread::sleep(PAUSE.min(left(deadline)));
                    }
                    Reaction::Fail => return Err(e),
                },
            }
        }
        if left(deadline).is_zero() {
            return Ok(None);
        }
    }
}

/// Returns when a shortage at the time `now` is reported, if it lasts.
fn report_at(deadline: Option<Instant>, now: Instant) -> Instant {
    let soon = now + REPORT_AFTER;
    deadline.map_or(soon, |at| at.min(soon))
}

/// Returns the index of a readable socket. Chooses one of several at random, so that a busy socket
/// does not keep others from being served.
fn readable(fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Option<usize>> {
    // rounded up, so that the last fraction of a millisecond is not spent in a busy loop
    let millis = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)) {
        Ok(_) => {
            // a socket with an error counts, too: accept returns the error
            let ready: Vec<_> = (0..fds.len()).filter(|&index| polled[index].any().unwrap_or(true)).collect();
            match ready[..] {
                [] => Ok(None),
                [one] => Ok(Some(one)),
                _ => Ok(Some(ready[RandomState::new().build_hasher().finish() as usize % ready.len()])),
            }
        }
        Err(Errno::EINTR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The reaction to an error of accept(2).
enum Reaction {
    /// Wait for the next connection.
    Skip,
    /// Try again after a pause.
    BackOff,
    /// Report that the listener is broken.
    Fail,
}

fn reaction(error: &io::Error) -> Reaction {
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        // accept(2) also returns errors that the new connection already had
        Errno::EAGAIN
        | Errno::EINTR
        | Errno::ECONNABORTED
        | Errno::ECONNRESET
        | Errno::EPROTO
        | Errno::ENETDOWN
        | Errno::ENETUNREACH
        | Errno::EHOSTDOWN
        | Errno::EHOSTUNREACH
        | Errno::ENONET
        | Errno::ENOPROTOOPT
        | Errno::ETIMEDOUT => Reaction::Skip,
        Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK | Errno::EOPNOTSUPP | Errno::EFAULT => Reaction::Fail,
        // no descriptors, no memory, refused by a security module, or unknown
        _ => Reaction::BackOff,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn a_connection_that_cannot_be_accepted_can_be_refused_again_and_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut shortage = Shortage::default();
        for _ in 0..3 {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let none = |_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE));
            assert!(shortage.accept_within(&[listener.as_fd()], Duration::MAX, none).unwrap().is_none());
            assert_eq!(shortage.take().unwrap().raw_os_error(), Some(libc::EMFILE));
            assert!(shortage.take().is_none());
            let (_, peer) = shortage.accept_to_refuse(1, |_| listener.accept()).unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
            // the reserved descriptor is released once, until it is reserved again
            assert!(shortage.accept_to_refuse(1, |_| Ok(())).is_none());
        }
    }

    #[test]
    fn errors_of_connections_are_skipped_and_those_of_the_listener_are_reported() {
        let reaction = |errno| reaction(&io::Error::from_raw_os_error(errno));
        for errno in [
            libc::EAGAIN,
            libc::EINTR,
            libc::ECONNABORTED,
            libc::ECONNRESET,
            libc::EPROTO,
            libc::ENETDOWN,
            libc::ENETUNREACH,
            libc::EHOSTDOWN,
            libc::EHOSTUNREACH,
            libc::ENONET,
            libc::ENOPROTOOPT,
            libc::ETIMEDOUT,
        ] {
            assert!(matches!(reaction(errno), Reaction::Skip), "{errno}");
        }
        for errno in [libc::EBADF, libc::EINVAL, libc::ENOTSOCK, libc::EOPNOTSUPP, libc::EFAULT] {
            assert!(matches!(reaction(errno), Reaction::Fail), "{errno}");
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::EPERM] {
            assert!(matches!(reaction(errno), Reaction::BackOff), "{errno}");
        }
    }

    #[test]
    fn a_shortage_that_lasts_is_reported_soon_and_not_after_the_time_out() {
        let now = Instant::now();
        assert_eq!(report_at(None, now), now + REPORT_AFTER);
        assert_eq!(report_at(Some(now + 2 * REPORT_AFTER), now), now + REPORT_AFTER);
        assert_eq!(report_at(Some(now + REPORT_AFTER / 2), now), now + REPORT_AFTER / 2);
    }

    #[test]
    fn a_lack_of_descriptors_and_bad_peers_do_not_end_the_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let errors = [libc::EMFILE, libc::ECONNABORTED, libc::ENFILE, libc::EINTR, libc::ENOMEM];
        let mut errors = errors.into_iter();
        let accepted = accept_within(listener.as_fd(), Duration::MAX, || match errors.next() {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(7),
        });
        assert_eq!(accepted.unwrap(), Some(7));
    }

    #[test]
    fn endless_errors_end_with_the_time_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for errno in [libc::EMFILE, libc::ECONNABORTED] {
            let accepted = accept_within(listener.as_fd(), Duration::from_millis(5), || {
                Err::<(), _>(io::Error::from_raw_os_error(errno))
            });
            assert!(accepted.unwrap().is_none());
        }
    }

    #[test]
    fn a_broken_listener_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        socket2::SockRef::from(&listener).shutdown(std::net::Shutdown::Both).unwrap();
        let accepted = accept_within(listener.as_fd(), Duration::MAX, || listener.accept());
        assert_eq!(accepted.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
