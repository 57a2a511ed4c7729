//! Replaces the VMM process under a running VM, now or by a schedule (HyperFresh: Bagdi, Kugve and
//! Gopalan, APSys 2017).
//!
//! A VMM implements [`Predecessor`] and keeps one [`HandOvers`]. Then [`replace`] does the whole
//! sequence:
//!
//! 1. One successor is prepared at a time: a second request is refused.
//! 2. [`Successor::start`] starts the process and waits until it can receive. If that fails,
//!    nothing has changed for the VM.
//! 3. The control socket is ceded *before* the hand-over: the successor takes it over the moment
//!    it has the VM, and the predecessor must not remove it when it ends.
//! 4. The VM is handed over.
//! 5. If the successor owns the VM, the predecessor waits until it has the control socket, and may
//!    end. If the VM has stayed, all is rolled back: the successor is killed, and the control
//!    socket is the predecessor's again. If the owner is not known, the successor is left alone and
//!    watched.
//!
//! [`schedule`] does it when a [`RefreshPolicy`] says so. Only the last schedule counts. A
//! successor gets it with its command, and goes on with it.
//!
//! # Example
//!
//! ```no_run
//! use std::{
//!     path::{Path, PathBuf},
//!     process::Command,
//!     sync::Arc,
//!     time::Duration,
//! };
//!
//! use migration_core::vm::VmError;
//! use migration_kvm::{
//!     handover::{Attempt, NewSuccessor, NotReplaced, Predecessor, Replacement, HandOvers, VmOwner, replace},
//!     successor::Successor,
//! };
//!
//! struct Vmm {
//!     control: PathBuf,
//!     hand_overs: HandOvers<Duration>,
//! }
//!
//! impl Predecessor for Vmm {
//!     /// The interval of a schedule.
//!     type Plan = Duration;
//!     type Report = String;
//!
//!     fn hand_overs(&self) -> &HandOvers<Duration> {
//!         &self.hand_overs
//!     }
//!
//!     fn control(&self) -> Result<PathBuf, VmError> {
//!         Ok(self.control.clone())
//!     }
//!
//!     fn command(&self, new: &NewSuccessor<'_, Duration>) -> Result<Command, VmError> {
//!         let mut command = Command::new("/proc/self/exe");
//!         command.arg("--listen").arg(&new.endpoints.listen);
//!         command.arg("--control").arg(&new.endpoints.interim);
//!         command.arg("--successor-of").arg(&new.endpoints.control);
//!         Ok(command)
//!     }
//!
//!     fn cede_control(&self, _control: &Path) {}
//!
//!     fn reclaim_control(&self, _control: &Path) {}
//!
//!     fn hand_over(self: &Arc<Self>, successor: &Successor) -> Result<Attempt<String>, VmError> {
//!         // a migration by `HandOver` to `successor.endpoints().listen`
//!         # let _ = successor;
//!         Ok(Attempt { owner: VmOwner::Successor, report: "…".into() })
//!     }
//!
//!     fn wait_in_doubt(&self, _time: Duration) -> bool {
//!         false
//!     }
//!
//!     fn lost_with(&self, pid: u32) {
//!         eprintln!("the VM is lost with process {pid}");
//!     }
//!
//!     fn runs_on(&self, time: Duration) -> bool {
//!         std::thread::sleep(time);
//!         true
//!     }
//!
//!     fn not_replaced(&self, why: NotReplaced<'_, String>) {
//!         eprintln!("{why:?}");
//!     }
//! }
//!
//! let vmm = Arc::new(Vmm { control: "/run/vm.sock".into(), hand_overs: HandOvers::default() });
//! if let Replacement::Done { pid, .. } = replace(&vmm, &Duration::ZERO)? {
//!     println!("process {pid} runs the VM");
//! }
//! # Ok::<(), migration_kvm::handover::ReplaceError>(())
//! ```

mod policy;
mod schedule;

use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    thread,
    time::Duration,
};

use migration_core::vm::VmError;
use thiserror::Error;

pub use self::{
    policy::{Interval, MemoryGrowth, RefreshPolicy},
    schedule::{NotReplaced, schedule},
};
use crate::{
    fence::ProcessIdentity,
    successor::{DoubtEnd, Endpoints, Successor, SuccessorError},
};

/// How long a successor has to get ready, and to take over the control socket, by default.
const PATIENCE: Duration = Duration::from_secs(20);

/// A VMM process that can be replaced by a successor. The methods are called by [`replace`] and
/// [`schedule`], on the thread that called [`replace`] or on one of their own.
pub trait Predecessor: Send + Sync + 'static {
    /// What a user asks for: which program, which schedule.
    type Plan: Clone + Send + Sync + 'static;
    /// What the VMM reports of a hand-over.
    type Report: Send + 'static;

    /// Returns the record of successors and schedules, of which a VMM has one.
    fn hand_overs(&self) -> &HandOvers<Self::Plan>;

    /// Returns the path of the control socket, at which a successor will be found.
    ///
    /// # Errors
    /// Returns an error if there is none, or the VM cannot be handed over now.
    fn control(&self) -> Result<PathBuf, VmError>;

    /// Returns the command that starts this successor. It says which descriptors are inherited.
    ///
    /// # Errors
    /// Returns an error if something that the command needs is missing.
    fn command(&self, new: &NewSuccessor<'_, Self::Plan>) -> Result<Command, VmError>;

    /// Leaves the control socket to the successor: the VMM does not remove it when it ends.
    fn cede_control(&self, control: &Path);

    /// Takes the control socket back, since the VM has stayed.
    fn reclaim_control(&self, control: &Path);

    /// Hands the VM over to the successor, at its socket [`listen`](Endpoints::listen). Returns
    /// when the migration has ended, or is in doubt.
    ///
    /// # Errors
    /// Returns an error if no migration has begun. The VM is here.
    fn hand_over(self: &Arc<Self>, successor: &Successor) -> Result<Attempt<Self::Report>, VmError>;

    /// Waits for at most `time` while the owner of the VM is not known. Returns whether it is still
    /// not known.
    fn wait_in_doubt(&self, time: Duration) -> bool;

    /// Reports that the VM is lost: the successor, process `pid`, died when it was about to run it,
    /// or just after.
    fn lost_with(&self, pid: u32);

    /// Waits for `time`, or until this process shall end. Returns whether it runs on.
    fn runs_on(&self, time: Duration) -> bool;

    /// Reports that the VMM was not replaced although its schedule said so. It is tried again.
    fn not_replaced(&self, why: NotReplaced<'_, Self::Report>);

    /// Returns how long a successor has to get ready, and to take over the control socket: 20 s.
    fn patience(&self) -> Duration {
        PATIENCE
    }
}

/// What the command that starts a successor has to say.
#[derive(Clone, Copy, Debug)]
pub struct NewSuccessor<'a, P> {
    /// The sockets at which both processes meet.
    pub endpoints: &'a Endpoints,
    /// Which process this one is. The successor [watches](crate::successor::watch_predecessor) it.
    pub predecessor: &'a ProcessIdentity,
    /// What the user asked for.
    pub plan: &'a P,
    /// The schedule that the successor goes on with, if there is one.
    pub schedule: Option<&'a P>,
}

/// Who owns the VM after an attempt to hand it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmOwner {
    /// The successor runs it.
    Successor,
    /// It has stayed, and runs on here.
    Predecessor,
    /// That is not known: the link broke after the successor was told to run it.
    InDoubt,
}

/// What became of an attempt to hand the VM over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt<R> {
    /// Who owns the VM.
    pub owner: VmOwner,
    /// The VMM's report.
    pub report: R,
}

/// What became of a replacement.
#[derive(Debug)]
pub enum Replacement<R> {
    /// The successor has the VM and the control socket. This process may end.
    Done {
        /// The successor's process.
        pid: u32,
        /// The VMM's report.
        report: R,
    },
    /// The successor may have the VM. It is watched until that is known.
    InDoubt {
        /// The VMM's report.
        report: R,
        /// Why it is not watched, if there is no thread for that: then nobody notices that it dies.
        unwatched: Option<io::Error>,
    },
    /// The VM runs on here, and the successor was killed.
    RolledBack(R),
}

/// Why a VMM was not replaced. The VM runs on here, and nothing is left of a successor.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplaceError {
    /// One at a time: try again when the present one has taken over or failed.
    #[error("a successor is being prepared already")]
    Busy,
    /// There is no successor.
    #[error(transparent)]
    Successor(#[from] SuccessorError),
    /// The VMM refused, or its part failed.
    #[error(transparent)]
    Vmm(#[from] VmError),
    /// There is no thread for the schedule.
    #[error("no thread")]
    NoThread(#[source] io::Error),
}

/// The successors and schedules of a VMM. `P` is a [`Predecessor::Plan`].
#[derive(Debug)]
pub struct HandOvers<P> {
    /// Held while a successor is prepared and takes over.
    preparing: Mutex<()>,
    schedule: Mutex<Scheduled<P>>,
}

/// The last schedule.
#[derive(Debug)]
struct Scheduled<P> {
    /// The number of there have been.
    number: u64,
    plan: Option<P>,
}

impl<P> Default for HandOvers<P> {
    fn default() -> Self {
        Self { preparing: Mutex::default(), schedule: Mutex::new(Scheduled { number: 0, plan: None }) }
    }
}

impl<P: Clone> HandOvers<P> {
    /// Returns the schedule that counts.
    pub fn scheduled(&self) -> Option<P> {
        self.last().plan.clone()
    }

    fn last(&self) -> MutexGuard<'_, Scheduled<P>> {
        // it is replaced whole
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the caller the one who prepares a successor.
    fn begin(&self) -> Result<MutexGuard<'_, ()>, ReplaceError> {
        match self.preparing.try_lock() {
            Ok(guard) => Ok(guard),
            // it guards no data
            Err(TryLockError::Poisoned(guard)) => Ok(guard.into_inner()),
            Err(TryLockError::WouldBlock) => Err(ReplaceError::Busy),
        }
    }

    /// Waits until no successor is prepared.
    fn wait(&self) -> MutexGuard<'_, ()> {
        self.preparing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Replaces the VMM by a successor now. See the [module](self) for the sequence.
///
/// # Errors
/// Returns an error if no hand-over has begun: another successor is prepared, this one does not get
/// ready, or the VMM refuses. The VM runs on here, and nothing is left of the successor.
pub fn replace<V: Predecessor>(vmm: &Arc<V>, plan: &V::Plan) -> Result<Replacement<V::Report>, ReplaceError> {
    let hand_overs = vmm.hand_overs();
    let _one_at_a_time = hand_overs.begin()?;
    let control = vmm.control()?;
    let mut successor = start(&**vmm, &control, plan, hand_overs.scheduled().as_ref())?;
    vmm.cede_control(&control);
    let attempt = vmm.hand_over(&successor);
    match attempt {
        Ok(Attempt { owner: VmOwner::Successor, report }) => {
            Ok(Replacement::Done { pid: successor.has_taken_over(), report })
        }
        Ok(Attempt { owner: VmOwner::InDoubt, report }) => {
            successor.may_own_vm();
            Ok(Replacement::InDoubt { report, unwatched: watch(vmm, successor).err() })
        }
        Ok(Attempt { owner: VmOwner::Predecessor, report }) => {
            drop(successor);
            vmm.reclaim_control(&control);
            Ok(Replacement::RolledBack(report))
        }
        Err(why) => {
            drop(successor);
            vmm.reclaim_control(&control);
            Err(why.into())
        }
    }
}

fn start<V: Predecessor>(
    vmm: &V,
    control: &Path,
    plan: &V::Plan,
    schedule: Option<&V::Plan>,
) -> Result<Successor, ReplaceError> {
    let endpoints = Endpoints::beside(control);
    let predecessor = ProcessIdentity::own();
    let predecessor = predecessor.map_err(|cause| SuccessorError::Identity { process: "this process", cause })?;
    let new = NewSuccessor { endpoints: &endpoints, predecessor: &predecessor, plan, schedule };
    let mut command = vmm.command(&new)?;
    Ok(Successor::start(&mut command, endpoints, vmm.patience())?)
}

/// Watches a successor that may have the VM, on a thread of its own.
fn watch<V: Predecessor>(vmm: &Arc<V>, successor: Successor) -> io::Result<()> {
    let vmm = vmm.clone();
    let body = move || {
        let pid = successor.pid();
        if successor.watch_doubt(|time| vmm.wait_in_doubt(time)) == DoubtEnd::Lost {
            vmm.lost_with(pid);
        }
    };
    // without a thread the body is dropped, and the successor with it, which is not killed by that
    thread::Builder::new().name("in doubt".into()).spawn(body).map(drop)
}
