//! A [`Fence`] for two VMMs on one host: kills the other one's process through a descriptor of it,
//! and waits for its end.

use std::{
    fs, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use migration_core::{
    codec::{DecodeError, Reader, Writer},
    engine::ReceiverHandle,
    fence::{Fence, Fenced, NotFenced},
    protocol::Violation,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use thiserror::Error;

/// How long the end of a killed process may take: its memory is freed first.
const LONGEST_END: Duration = Duration::from_secs(30);
const VERSION: u8 = 1;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A process of this or another host: which boot of which host, which PID namespace, its number and
/// when it started, so that a number that was given anew is not mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessIdentity {
    boot: [u8; 36],
    namespace: u64,
    pid: u32,
    started: u64,
}

impl ProcessIdentity {
    /// Returns the calling process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Returns the process that has this number now, in the caller's PID namespace.
    ///
    /// # Errors
    /// `NotFound` when there is none; else when `/proc` cannot be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        // first what fails without `/proc`: there, no process seems to have this number
        let (boot, namespace) = (boot_id()?, namespace()?);
        let started = started(pid)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { boot, namespace, pid, started })
    }

    /// Returns the form in which it travels, for
    /// [`identity`](migration_core::vm::DestinationVm::identity).
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(VERSION).bytes(&self.boot).u64(self.namespace).u32(self.pid).u64(self.started);
        w.into_bytes()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// Returns an error if the bytes are something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let version = r.u8("version")?;
        if version != VERSION {
            return Err(DecodeError::invalid("version", format!("{version} is not known")));
        }
        let identity = Self {
            boot: r.array("boot")?,
            namespace: r.u64("namespace")?,
            pid: r.u32("pid")?,
            started: r.u64("start")?,
        };
        r.finish()?;
        Ok(identity)
    }
}

/// Ends a process of this host, whose identity is an encoded [`ProcessIdentity`]. Needs the right
/// to kill it. Of other hosts it knows nothing, and says so.
///
/// The peer names the process: link two VMMs by it only where a peer may end any process that this
/// one may.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessFence;

impl Fence for ProcessFence {
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced> {
        let Some((process, pid)) = find(identity)? else { return Ok(()) };
        match pidfd_send_signal(&process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => return Err(NotFenced(format!("killing process {pid}: {e}"))),
        }
        if has_ended(&process, LONGEST_END)? {
            return Ok(());
        }
        Err(NotFenced(format!("process {pid} was killed, but does not end")))
    }

    fn is_dead(&self, identity: &[u8]) -> bool {
        match find(identity) {
            Ok(None) => true,
            Ok(Some((process, _))) => has_ended(&process, Duration::ZERO).unwrap_or(false),
            Err(_) => false,
        }
    }
}

/// Why a VM that a dead process has brought here does not run here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TakeOverError {
    /// The process is not dead for certain.
    #[error("the process that had the VM")]
    NotFenced(#[from] NotFenced),
    /// The VM is not here as a whole.
    #[error(transparent)]
    NotHere(#[from] Violation),
}

/// Takes over a VM that another process of this host has brought here as a whole, and had not yet
/// given up. `identity` is that process's encoded [`ProcessIdentity`]. The process is killed if it
/// lives, so call this only if it [is dead](Fence::is_dead) or must end.
///
/// # Errors
/// Returns an error if the process does not end, or no complete VM is held here.
pub fn take_over_from(receiver: &ReceiverHandle, identity: &[u8]) -> Result<(), TakeOverError> {
    receiver.take_over(Fenced::by(&ProcessFence, identity)?)?;
    Ok(())
}

/// Returns a descriptor of the process that `identity` names, and its number; `None` if it has
/// ended.
fn find(identity: &[u8]) -> Result<Option<(OwnedFd, u32)>, NotFenced> {
    let other =
        ProcessIdentity::decode(identity).map_err(|e| NotFenced(format!("its identity is none of a process: {e}")))?;
    let unknown = |e: io::Error| NotFenced(format!("processes of this host cannot be told apart: {e}"));
    if other.boot != boot_id().map_err(unknown)? || other.namespace != namespace().map_err(unknown)? {
        return Err(NotFenced("it is on another host, or in another PID namespace".into()));
    }
    if other.pid == std::process::id() {
        return Err(NotFenced("it claims to be this very process".into()));
    }
    let raw = i32::try_from(other.pid).ok().and_then(Pid::from_raw);
    let pid = raw.ok_or_else(|| NotFenced(format!("{} is no process number", other.pid)))?;
    // first the descriptor, then the look: what is looked at is then what the descriptor is of, or
    // has ended
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return Ok(None),
        Err(e) => return Err(NotFenced(format!("process {}: {e}", other.pid))),
    };
    let same = is_it(&process, started(other.pid).map_err(unknown)?, &other)?;
    Ok(same.then_some((process, other.pid)))
}

/// Returns whether a process, with the start that `/proc` gives for its number, is the one that
/// `identity` names. If not, that one has ended, and its number is another's now, or nobody's.
fn is_it(process: &OwnedFd, started: Option<u64>, identity: &ProcessIdentity) -> Result<bool, NotFenced> {
    match started {
        Some(started) => Ok(started == identity.started),
        None if has_ended(process, Duration::ZERO)? => Ok(false),
        // the processes of other users are invisible with the mount option `hidepid`: nobody may
        // take them for dead
        None => Err(NotFenced(format!("process {} lives, and /proc does not show it (hidepid?)", identity.pid))),
    }
}

/// Returns whether every thread of the process has ended within this time: no vCPU runs then.
fn has_ended(process: &OwnedFd, within: Duration) -> Result<bool, NotFenced> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(NotFenced(format!("waiting for the end of a process: {e}"))),
        }
    }
}

fn boot_id() -> io::Result<[u8; 36]> {
    let id = fs::read(BOOT_ID).map_err(at(BOOT_ID))?;
    id.first_chunk().copied().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, BOOT_ID))
}

fn namespace() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    const OWN: &str = "/proc/self/ns/pid";
    Ok(fs::metadata(OWN).map_err(at(OWN))?.ino())
}

/// Says which file an error is about, and what is the matter in a jail.
fn at(path: &str) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| {
        let help = if error.kind() == io::ErrorKind::NotFound { " (is /proc mounted?)" } else { "" };
        io::Error::new(error.kind(), format!("{path}: {error}{help}"))
    }
}

/// When a process started, in ticks since boot; `None` if there is none of this number, or it has
/// ended and is only not waited for yet.
fn started(pid: u32) -> io::Result<Option<u64>> {
    let path = format!("/proc/{pid}/stat");
    let stat = match fs::read_to_string(&path) {
        Ok(stat) => stat,
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(e) => return Err(at(&path)(e)),
    };
    // the name before it may hold anything, parentheses and blanks included
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    match (fields.first(), fields.get(19).and_then(|f| f.parse().ok())) {
        (Some(&"X"), _) => Ok(None),
        (_, Some(started)) => Ok(Some(started)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {stat}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn identity_of(child: &Child) -> ProcessIdentity {
        ProcessIdentity::of(child.id()).unwrap()
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_process_is_dead_when_the_fence_returns() {
        let mut child = sleeper();
        let identity = identity_of(&child).encode();
        assert!(!ProcessFence.is_dead(&identity));
        ProcessFence.fence(&identity).unwrap();
        assert!(ProcessFence.is_dead(&identity));
        // it has ended, though its parent has not waited for it
        ProcessFence.fence(&identity).unwrap();
        assert!(!child.wait().unwrap().success());
        ProcessFence.fence(&identity).unwrap();
    }

    #[test]
    fn others_are_left_alone() {
        let mut child = sleeper();
        let identity = identity_of(&child);
        // its number was somebody else's before
        let earlier = ProcessIdentity { started: identity.started - 1, ..identity };
        ProcessFence.fence(&earlier.encode()).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it lives");
        let elsewhere = ProcessIdentity { boot: [b'0'; 36], ..identity };
        ProcessFence.fence(&elsewhere.encode()).unwrap_err();
        ProcessFence.fence(&ProcessIdentity::own().unwrap().encode()).unwrap_err();
        ProcessFence.fence(b"").unwrap_err();
        ProcessFence.fence(&ProcessIdentity { pid: 0, ..identity }.encode()).unwrap_err();
        assert!(child.try_wait().unwrap().is_none(), "it lives");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// As with `hidepid`, where `/proc` has nothing about the processes of other users.
    #[test]
    fn a_process_that_is_hidden_does_not_count_as_dead() {
        let mut child = sleeper();
        let identity = identity_of(&child);
        let pid = Pid::from_raw(identity.pid as i32).unwrap();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert!(is_it(&process, Some(identity.started), &identity).unwrap());
        assert!(!is_it(&process, Some(identity.started + 1), &identity).unwrap());
        assert!(is_it(&process, None, &identity).unwrap_err().to_string().contains("hidepid"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_it(&process, None, &identity).unwrap());
    }

    #[test]
    fn an_identity_travels() {
        let own = ProcessIdentity::own().unwrap();
        assert_eq!(own, ProcessIdentity::of(std::process::id()).unwrap());
        assert_eq!(own.pid, std::process::id());
        assert_eq!(own.boot[..], fs::read(BOOT_ID).unwrap()[..36]);
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap();
        assert_eq!(namespace.to_str().unwrap(), format!("pid:[{}]", own.namespace));
        let mut bytes = own.encode();
        assert_eq!(ProcessIdentity::decode(&bytes).unwrap(), own);
        for end in 0..bytes.len() {
            assert!(ProcessIdentity::decode(&bytes[..end]).is_err());
        }
        bytes.push(0);
        assert!(ProcessIdentity::decode(&bytes).is_err());
        bytes.pop();
        bytes[0] += 1;
        assert!(ProcessIdentity::decode(&bytes).unwrap_err().to_string().contains("2 is not known"));
        // no process has this number
        assert_eq!(ProcessIdentity::of(i32::MAX as u32).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_refusal_says_why_and_nobody_counts_as_dead() {
        let own = ProcessIdentity::own().unwrap();
        for (identity, why) in [
            (ProcessIdentity { boot: [b'0'; 36], ..own }, "another host"),
            (ProcessIdentity { namespace: own.namespace + 1, ..own }, "another PID namespace"),
            (own, "this very process"),
            (ProcessIdentity { pid: 0, ..own }, "0 is no process number"),
            (ProcessIdentity { pid: u32::MAX, ..own }, "4294967295 is no process number"),
        ] {
            let error = ProcessFence.fence(&identity.encode()).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert!(!ProcessFence.is_dead(&identity.encode()), "{why}");
        }
        let error = ProcessFence.fence(b"?").unwrap_err();
        assert!(error.to_string().contains("its identity is none of a process"), "{error}");
        // of this host and boot, and not there any more
        let gone = ProcessIdentity { pid: i32::MAX as u32, ..own };
        assert!(ProcessFence.is_dead(&gone.encode()));
        ProcessFence.fence(&gone.encode()).unwrap();
    }

    /// A name may look like the fields after it.
    #[test]
    fn the_start_of_a_process_is_found_whatever_its_name_is() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("a) X 1 (b");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = Command::new(&program).arg("1000").spawn().unwrap();
        let found = started(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let own = started(std::process::id()).unwrap().unwrap();
        assert!(found.unwrap().is_some_and(|child| child >= own), "{own}");
        assert_eq!(started(i32::MAX as u32).unwrap(), None);
    }

    #[test]
    fn errors_name_the_file_and_what_may_be_missing() {
        let error = at("/proc/x")(io::ErrorKind::NotFound.into());
        assert_eq!(error.to_string(), "/proc/x: entity not found (is /proc mounted?)");
        let error = at("/proc/x")(io::ErrorKind::PermissionDenied.into());
        assert_eq!(error.to_string(), "/proc/x: permission denied");
    }
}
