//! A successor: the process that takes the place of a VMM under its running VM.
//!
//! The two processes meet at three sockets ([`Endpoints`]). The predecessor starts the successor,
//! waits until it can receive, and hands the VM over ([`Successor`]). With the VM the successor
//! [takes over](take_control) the control socket, so that clients find the VM at the same path all
//! the time. While it waits for the VM, the successor [watches](watch_predecessor) whether its
//! predecessor lives.
//!
//! ```text
//! predecessor                                 successor
//! start(command)
//!                                             listens at `listen`
//!                                             listens at `interim`: it can receive
//! hands the VM over at `listen`  ───────────► runs the VM
//!                                             renames `interim` to `control`
//! has_taken_over(): `interim` is gone
//! ```
//!
//! This module manages processes and sockets. It needs Linux, but no KVM. The hand-over itself is a
//! migration by [`HandOver`](migration_core::strategy::HandOver); [`handover`](crate::handover)
//! joins both, and says when to do it.

mod watch;

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use rustix::process::geteuid;
use thiserror::Error;

pub use self::watch::{PredecessorEnd, watch_predecessor};
use crate::fence::ProcessIdentity;

/// How often the sockets and the state of a successor are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// The longest time for which a caller is asked to wait at once.
const TICK: Duration = Duration::from_millis(100);

/// The sockets at which a VMM and its successor meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The control socket of the VM's owner. The successor takes it over with the VM.
    pub control: PathBuf,
    /// The successor's control socket until then. It appears when the successor can receive, so a
    /// successor binds it after [`listen`](Self::listen).
    pub interim: PathBuf,
    /// The socket at which the successor awaits the VM.
    pub listen: PathBuf,
}

impl Endpoints {
    /// Returns paths in the folder of `control` that no other process uses. They end in `.c` and
    /// `.l` and the number of the calling process.
    pub fn beside(control: &Path) -> Self {
        let beside = |kind: char| {
            let mut path = control.as_os_str().to_owned();
            path.push(format!(".{kind}{}", std::process::id()));
            PathBuf::from(path)
        };
        Self { control: control.to_owned(), interim: beside('c'), listen: beside('l') }
    }

    /// Removes what a process left that had this process's number before.
    fn clear(&self) -> Result<(), SuccessorError> {
        for path in [&self.interim, &self.listen] {
            if is_own_socket(path)? {
                fs::remove_file(path).map_err(endpoint(path))?;
            }
        }
        Ok(())
    }
}

/// Gives a successor the control socket of its predecessor. Call it in the successor as soon as the
/// VM runs there. The path always has a socket: the rename replaces one by the other.
///
/// # Errors
/// Returns an error if the file system refuses. The successor then stays at `interim`.
pub fn take_control(interim: &Path, control: &Path) -> io::Result<()> {
    fs::rename(interim, control)
}

/// Why there is no successor. The VM is not concerned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SuccessorError {
    /// Its program cannot be started.
    #[error("starting {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// It has ended by itself.
    #[error("the successor {} has ended ({status}) before it could receive", program.display())]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// It does not get ready. It was killed.
    #[error("the successor {} does not receive after {patience:?}", program.display())]
    NotReady {
        /// The program.
        program: PathBuf,
        /// How long it had.
        patience: Duration,
    },
    /// The path of an endpoint is taken. Whoever listens there would get the VM.
    #[error("{} is no socket of this user", path.display())]
    NotOurs {
        /// The path.
        path: PathBuf,
    },
    /// The path of an endpoint cannot be looked at, or not be freed.
    #[error("{}", path.display())]
    Endpoint {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The identity of a process cannot be read.
    #[error("the identity of {process}")]
    Identity {
        /// Which process: "this process" or "the successor".
        process: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

/// How a doubt about the owner of the VM has ended, as far as the predecessor can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoubtEnd {
    /// The owner is known: the VMM has said so.
    Resolved,
    /// The successor has failed, and the VM is lost with it: it could run nowhere else.
    Lost,
    /// The successor has ended in order, after it gave the VM to yet another process.
    PassedOn,
}

/// A successor that is ready to receive.
///
/// Dropping it rolls back: the process is killed, and its sockets are removed. That ends when the
/// VM [may run there](Self::may_own_vm).
#[derive(Debug)]
pub struct Successor {
    process: Process,
    identity: ProcessIdentity,
    patience: Duration,
}

impl Successor {
    /// Starts a successor, and waits until it can receive.
    ///
    /// `command` has the program and all that it needs to know of `endpoints`. The successor
    /// inherits the descriptors that `command` says: those of stdin, stdout and stderr by default.
    /// It has `patience` to bind [`Endpoints::interim`], which must be a socket of this user.
    ///
    /// # Errors
    /// Returns an error if it cannot be started, ends, or does not get ready in time. It is killed
    /// then, and nothing is left of it.
    pub fn start(command: &mut Command, endpoints: Endpoints, patience: Duration) -> Result<Self, SuccessorError> {
        let program = PathBuf::from(command.get_program());
        endpoints.clear()?;
        let child = match command.spawn() {
            Ok(child) => child,
            Err(cause) => return Err(SuccessorError::Start { program, cause }),
        };
        let mut process = Process { child, program, endpoints, may_own_vm: false };
        process.wait_ready(patience)?;
        let identity = ProcessIdentity::of(process.child.id());
        let identity = identity.map_err(|cause| SuccessorError::Identity { process: "the successor", cause })?;
        Ok(Self { process, identity, patience })
    }

    /// Returns the number of the process.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Returns which process it is.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Returns its sockets.
    pub fn endpoints(&self) -> &Endpoints {
        &self.process.endpoints
    }

    /// Records that the VM may run in the successor, which is therefore not killed any more.
    pub fn may_own_vm(&mut self) {
        self.process.may_own_vm = true;
    }

    /// Waits until the successor, which runs the VM, has taken over the control socket, but no
    /// longer than the time that it had to get ready. Returns the number of its process.
    pub fn has_taken_over(mut self) -> u32 {
        self.may_own_vm();
        self.process.wait_control_taken(self.patience);
        self.pid()
    }

    /// Watches the successor while it is not known who owns the VM. `in_doubt` waits for at most
    /// the time that it is given, and returns whether that is still so.
    pub fn watch_doubt(mut self, mut in_doubt: impl FnMut(Duration) -> bool) -> DoubtEnd {
        self.may_own_vm();
        while in_doubt(TICK) {
            match self.process.child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) if !status.success() => return DoubtEnd::Lost,
                Ok(Some(_)) | Err(_) => return DoubtEnd::PassedOn,
            }
        }
        self.process.wait_control_taken(self.patience);
        DoubtEnd::Resolved
    }
}

/// The successor's process, from its start on.
#[derive(Debug)]
struct Process {
    child: Child,
    program: PathBuf,
    endpoints: Endpoints,
    may_own_vm: bool,
}

impl Process {
    fn wait_ready(&mut self, patience: Duration) -> Result<(), SuccessorError> {
        let deadline = Instant::now() + patience;
        while !is_own_socket(&self.endpoints.interim)? {
            let ended = self.child.try_wait().map_err(endpoint(&self.endpoints.interim))?;
            let program = || self.program.clone();
            if let Some(status) = ended {
                return Err(SuccessorError::Ended { program: program(), status });
            }
            if Instant::now() >= deadline {
                return Err(SuccessorError::NotReady { program: program(), patience });
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn wait_control_taken(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.endpoints.interim.exists() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        // the successor has ceased to listen there, or is about to
        let _ = fs::remove_file(&self.endpoints.listen);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.may_own_vm {
            return;
        }
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
        for path in [&self.endpoints.interim, &self.endpoints.listen] {
            // it may not have got as far as this
            let _ = fs::remove_file(path);
        }
    }
}

fn endpoint(path: &Path) -> impl FnOnce(io::Error) -> SuccessorError + use<> {
    let path = path.to_owned();
    |cause| SuccessorError::Endpoint { path, cause }
}

/// Returns whether there is a socket of this user.
///
/// # Errors
/// Returns an error if something else is there.
fn is_own_socket(path: &Path) -> Result<bool, SuccessorError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() && found.uid() == geteuid().as_raw() => Ok(true),
        Ok(_) => Err(SuccessorError::NotOurs { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(endpoint(path)(error)),
    }
}
