//! The creation of threads, which is left to the VMM.

use std::{io, thread};

/// The purpose of a thread. The VMM can choose a priority, an affinity and a seccomp filter by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Hands a VM over to another process on this host. The thread mostly sleeps while the guest
    /// runs. From [`begin_switch_over`](Spawner::begin_switch_over) to
    /// [`end_switch_over`](Spawner::end_switch_over) the guest is paused, or about to be, and waits
    /// for it.
    ///
    /// A real-time policy is useful in that period only. The thread sleeps until another thread
    /// wakes it. Some kernels place a woken real-time thread on a core where another process is in
    /// a system call, and leave it waiting there until the call ends.
    HandOver,
    /// Serves the page faults of a running guest. Urgent.
    Demand,
    /// Moves most of the pages. May be slowed down for the guest's sake.
    Bulk,
    /// Runs a strategy or reads a control lane. The thread mostly sleeps, but a paused VM waits for
    /// it.
    Control,
    /// Does work that is not urgent.
    Background,
    /// Runs a vCPU, or throttles vCPUs.
    Vcpu,
}

/// The degree to which a migration may disturb the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestImpact {
    /// Threads that move pages yield to vCPUs whenever both want a core, and the guest is hardly
    /// throttled.
    Low,
    /// Threads that move pages have normal priority. A guest that writes faster than its pages can
    /// be sent is throttled.
    #[default]
    Balanced,
    /// The migration has priority over the guest.
    Fast,
}

/// The handle of a thread that a [`Spawner`] started. To drop it leaves the thread to itself.
pub trait Joiner: Send {
    /// Blocks until the thread has ended.
    fn join(self: Box<Self>);
}

/// Starts all threads that the migration crates need.
pub trait Spawner: Send + Sync {
    /// Runs `body` on a new thread.
    ///
    /// # Errors
    /// Fails if no thread can be created. The migration then fails and the source's guest runs on.
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>>;

    /// Changes the role of the calling thread, which this spawner has started. The role of a thread
    /// for a connection is known only after the peer has said what the connection is for. The
    /// default does nothing.
    fn assume(&self, role: Role, impact: GuestImpact) {
        let _ = (role, impact);
    }

    /// Announces that a guest is about to be paused for a hand-over or is paused already. The guest
    /// waits for the threads of this spawner with the role [`Role::HandOver`]. The default does
    /// nothing.
    fn begin_switch_over(&self) {}

    /// Announces that the guest does not wait for these threads any more, whether or not the
    /// hand-over succeeded. May be called without [`begin_switch_over`](Self::begin_switch_over)
    /// and more than once. The default does nothing.
    fn end_switch_over(&self) {}
}

/// A [`Spawner`] of threads of the standard library, without priorities.
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

/// A [`Joiner`] for a thread of the standard library.
#[derive(Debug)]
pub struct StdJoiner(pub thread::JoinHandle<()>);

impl Joiner for StdJoiner {
    fn join(self: Box<Self>) {
        // ignored: a panic on that thread is a bug, and the panic hook has printed it
        let _ = self.0.join();
    }
}
