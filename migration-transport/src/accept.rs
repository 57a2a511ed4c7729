//! Waiting for connections, in a way that bad peers and a lack of descriptors do not end.

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

/// How long to leave a host alone that has run out of descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(20);
/// How long a shortage is waited out before whoever waits for connections hears of it.
const REPORT: Duration = Duration::from_millis(50);

/// What a listener lacks to accept the connections that wait, and a descriptor that is kept for that
/// case.
///
/// A process without descriptors can neither accept a connection nor refuse it: it would find the
/// same one waiting again and again. With the descriptor that is kept, one connection at a time can
/// be accepted and told why it is not served.
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
///     Some((connection, _)) => drop(connection), // to be served
///     None => {
///         if let Some(why) = shortage.take()
///             && let Some((connection, _)) = shortage.accept_to_refuse(1, |_| listener.accept())
///         {
///             eprintln!("to be told {why}");
///             drop(connection);
///         }
///     }
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Shortage {
    error: Option<io::Error>,
    /// `None` while it is in use, or none can be had.
    spare: Option<OwnedFd>,
}

impl Default for Shortage {
    fn default() -> Self {
        Self::new()
    }
}

impl Shortage {
    /// Nothing is lacking yet; a descriptor is kept if one can be had.
    pub fn new() -> Self {
        Self { error: None, spare: spare() }
    }

    /// Waits for a connection at any of the listening sockets `fds`, none of which blocks, and calls
    /// `accept` with the index of a socket at which one waits. Returns what `accept` has made of it,
    /// or `None` when `timeout` has passed.
    ///
    /// A lack of descriptors or memory is waited out for a moment: `accept` is called again, with short
    /// pauses. If it lasts, this returns `None` before `timeout`, and [`take`](Self::take) then
    /// returns what was lacking.
    ///
    /// # Errors
    /// When a listening socket is broken.
    pub fn accept_within<T>(
        &mut self,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
        accept: impl FnMut(usize) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if self.spare.is_none() {
            self.spare = spare();
        }
        accept_noting(fds, timeout, Some(&mut self.error), accept)
    }

    /// Returns why nothing could be accepted since this was last asked; `None` if nothing was lacking.
    pub fn take(&mut self) -> Option<io::Error> {
        self.error.take()
    }

    /// Gives up the descriptor that is kept, and calls `accept` with the indexes from 0 to `sockets`
    /// until it returns a connection, which is to be told that it is not served, and closed. The
    /// next [`accept_within`](Self::accept_within) takes a descriptor back.
    pub fn accept_to_refuse<T>(&mut self, sockets: usize, accept: impl FnMut(usize) -> io::Result<T>) -> Option<T> {
        drop(self.spare.take()?);
        (0..sockets).map(accept).find_map(Result::ok)
    }
}

/// A descriptor of no use, which can be had without any file: in a jail there may be none.
fn spare() -> Option<OwnedFd> {
    UnixDatagram::unbound().ok().map(OwnedFd::from)
}

/// Counts the descriptors that are left, by taking them for a moment: no more than are asked for.
pub(crate) struct Descriptors;

impl Room for Descriptors {
    fn channels(&self, wanted: usize) -> usize {
        let Some(first) = spare() else { return 0 };
        let copies: Vec<_> = (1..wanted).map_while(|_| first.try_clone().ok()).collect();
        wanted.min(1 + copies.len())
    }
}

/// Polls `fd`, a listening socket that does not block, and calls `accept` until it gives a connection (`Some`), the
/// listener breaks (`Err`) or `timeout` passes (`None`).
pub(crate) fn accept_within<T>(
    fd: BorrowedFd<'_>,
    timeout: Duration,
    mut accept: impl FnMut() -> io::Result<T>,
) -> io::Result<Option<T>> {
    accept_noting(&[fd], timeout, None, |_| accept())
}

/// As [`accept_within`], of several sockets; `accept` gets the index of the one at which somebody waits. Where there is a
/// `shortage`, what this host lacks to accept a connection is noted there, and ends the wait unless it is over in a moment.
fn accept_noting<T>(
    fds: &[BorrowedFd<'_>],
    timeout: Duration,
    mut shortage: Option<&mut Option<io::Error>>,
    mut accept: impl FnMut(usize) -> io::Result<T>,
) -> io::Result<Option<T>> {
    // a time-out beyond what `Instant` can hold is none
    let mut deadline = Instant::now().checked_add(timeout);
    let left =
        |deadline: Option<Instant>| deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
    loop {
        if let Some(index) = readable(fds, left(deadline))? {
            match accept(index) {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(e) => match verdict(&e) {
                    Verdict::Skip => {}
                    // the connection stays in the queue, so poll would return at once, again and again
                    Verdict::BackOff => {
                        if let Some(shortage) = &mut shortage {
                            **shortage = Some(e);
                            let soon = Instant::now() + REPORT;
                            deadline = Some(deadline.map_or(soon, |at| at.min(soon)));
                        }
                        thread::sleep(BACK_OFF.min(left(deadline)));
                    }
                    Verdict::Broken => return Err(e),
                },
            }
        }
        if left(deadline).is_zero() {
            return Ok(None);
        }
    }
}

/// Returns the index of one that is readable. Of several it is any: one that is always busy keeps
/// no other out.
fn readable(fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Option<usize>> {
    // rounded up, lest the last fraction of a millisecond is spent spinning
    let millis = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)) {
        Ok(_) => {
            // errors of a socket count as well: accept says what they are
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

enum Verdict {
    Skip,
    BackOff,
    Broken,
}

fn verdict(error: &io::Error) -> Verdict {
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        // accept(2) also passes on errors that the new connection has already had
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
        | Errno::ETIMEDOUT => Verdict::Skip,
        Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK | Errno::EOPNOTSUPP | Errno::EFAULT => Verdict::Broken,
        // no descriptors, no memory, refused by a security module, or unknown
        _ => Verdict::BackOff,
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
        let mut shortage = Shortage::new();
        for _ in 0..3 {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let none = |_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE));
            assert!(shortage.accept_within(&[listener.as_fd()], Duration::MAX, none).unwrap().is_none());
            assert_eq!(shortage.take().unwrap().raw_os_error(), Some(libc::EMFILE));
            assert!(shortage.take().is_none());
            let (_, peer) = shortage.accept_to_refuse(1, |_| listener.accept()).unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
            // it is given up once, until there is one again
            assert!(shortage.accept_to_refuse(1, |_| Ok(())).is_none());
        }
    }

    #[test]
    fn lack_of_descriptors_and_bad_peers_are_survived() {
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
