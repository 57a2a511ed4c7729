//! Threads, which only the VMM creates.

use std::{io, thread};

/// What a thread is for, so that the VMM can give it a priority, an affinity and a seccomp filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Hands a VM over to another process of this machine: does little, asleep while the guest runs; and from
    /// [`begin_switch_over`](Spawner::begin_switch_over) to [`end_switch_over`](Spawner::end_switch_over) the guest waits for all of it.
    /// Not for a real-time policy beyond that: it sleeps until another thread wakes it, and some kernels leave a real-time
    /// thread that is woken on a core behind another process's system call there, however long that is.
    HandOver,
    /// Serves faults of a running guest; urgent.
    Demand,
    /// Moves pages in volume; may be slowed down for the guest's sake.
    Bulk,
    /// Runs a strategy or reads a control lane; mostly asleep, but a VM that is paused waits for it.
    Control,
    /// Has no hurry.
    Background,
    /// Runs a vCPU, or decides when vCPUs rest.
    Vcpu,
}

/// How much a migration may disturb the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestImpact {
    /// Threads that move pages yield to vCPUs whenever both want a core, and the guest is hardly throttled.
    Low,
    /// Moves pages at normal priority; throttles a guest that writes faster than its pages can be sent.
    #[default]
    Balanced,
    /// The migration first.
    Fast,
}

/// Waits for a thread that a [`Spawner`] started.
pub trait Joiner: Send {
    /// Blocks until the thread has ended.
    fn join(self: Box<Self>);
}

/// Starts threads for the SDK. The SDK has no other way to start one.
pub trait Spawner: Send + Sync {
    /// Runs `body` on a new thread.
    ///
    /// # Errors
    /// When no thread can be had; the migration then fails and the source's guest runs on.
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>>;

    /// The calling thread, which this spawner has started, has this role from now on: what a connection is for is known
    /// only once its peer has said so. Does nothing by default.
    fn assume(&self, role: Role, impact: GuestImpact) {
        let _ = (role, impact);
    }

    /// A guest is about to be paused for a hand-over, or is paused: it waits for the threads of this spawner that have the role
    /// [`Role::HandOver`]. Does nothing by default.
    fn begin_switch_over(&self) {}

    /// It does not wait for them any more, whatever came of the hand-over. May be called without, or more often than,
    /// [`begin_switch_over`](Self::begin_switch_over). Does nothing by default.
    fn end_switch_over(&self) {}
}

/// A [`Spawner`] of plain threads, without priorities.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdSpawner;

impl Spawner for StdSpawner {
    fn spawn(
        &self,
        _role: Role,
        _impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>> {
        let handle = thread::Builder::new().name(name.to_owned()).spawn(body)?;
        Ok(Box::new(StdJoiner(handle)))
    }
}

/// A [`Joiner`] over a thread of the standard library.
#[derive(Debug)]
pub struct StdJoiner(pub thread::JoinHandle<()>);

impl Joiner for StdJoiner {
    fn join(self: Box<Self>) {
        // a panic on that thread was a bug and has been printed by its hook; there is nothing to add to it here
        let _ = self.0.join();
    }
}
