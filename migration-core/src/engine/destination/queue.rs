//! A receiver for a VMM with an event loop, whose thread executes all calls of the VMM.

use std::{collections::VecDeque, os::fd::OwnedFd};

use bytes::Bytes;

use super::*;
use crate::{
    PageSet,
    ram::GuestRam,
    state::Section,
    vm::{CheckpointedVm, FailedAttempt, VmDescription},
};

/// A receiver whose host and VMs belong to one thread, the thread of the VMM's event loop.
///
/// The receiver's own threads move pages. To call the host or a VM (to build it, to load its state,
/// to start it) they queue a request, call the waker, and wait. The loop then calls
/// [`next`](Self::next), which executes the requests on the loop's thread and returns the events.
/// So the host and its VMs need to be neither `Send` nor `Sync`. The guest's pause includes the
/// time until the loop calls `next`, so the loop has to call it promptly.
///
/// The waker is called from any thread, also while `next` runs. It writes to an eventfd that the
/// loop polls, or wakes the loop in another way. migration-transport has such a waker, `Wakeup`.
///
/// Dropping the queue stops the receiver and waits for its threads. A VM that has not arrived is
/// discarded.
pub struct ReceiverQueue<H: DestinationHost> {
    handle: ReceiverHandle,
    requests: mpsc::Receiver<Request<H>>,
    here: Here<H>,
    thread: Option<Box<dyn Joiner>>,
}

/// An event of a [`ReceiverQueue`].
#[derive(Debug)]
pub enum ReceiverEvent<V> {
    /// A VM is owned here and was started. In post-copy pages of it are still missing.
    Arrived(Arrived<V>),
    /// The link to the source of this VM is lost. [`DestinationHost::link_lost`] was called before.
    LinkLost(VmId),
    /// The link is back, or is not needed any more. [`DestinationHost::link_found`] was called
    /// before.
    LinkFound(VmId),
    /// An attempt has failed. [`DestinationHost::attempt_failed`] was called before.
    AttemptFailed(FailedAttempt),
    /// The receiver has ended, with the result of [`Receiver::run`]. This is the last event.
    Ended(Result<(), ReceiveError>),
}

/// A call that the loop's thread executes.
type Request<H> = Box<dyn FnOnce(&mut Here<H>) + Send>;

/// The data that belong to the loop's thread.
struct Here<H: DestinationHost> {
    host: H,
    vms: HashMap<u64, H::Vm>,
    built: u64,
    events: VecDeque<ReceiverEvent<H::Vm>>,
}

/// The end of the queue that the other threads use.
struct Requests<H: DestinationHost> {
    queue: mpsc::Sender<Request<H>>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl<H: DestinationHost> Clone for Requests<H> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), wake: self.wake.clone() }
    }
}

impl<H: DestinationHost + 'static> Requests<H> {
    /// Queues a call for the loop's thread.
    fn send(&self, request: impl FnOnce(&mut Here<H>) + Send + 'static) {
        // if the loop has ended, the VMs are gone as well
        if self.queue.send(Box::new(request)).is_ok() {
            (self.wake)();
        }
    }

    /// Queues a call for the loop's thread, and waits for the result.
    ///
    /// # Errors
    /// Returns an error if the loop has ended.
    fn call<R: Send + 'static>(&self, request: impl FnOnce(&mut Here<H>) -> R + Send + 'static) -> Result<R, VmError> {
        let (tx, result) = mpsc::sync_channel(1);
        self.send(move |here| {
            // the thread that has sent the request waits
            let _ = tx.send(request(here));
        });
        result.recv().map_err(|_| VmError::new("the VMM's event loop has ended"))
    }
}

/// The host on the receiver's threads: queues all calls.
struct RemoteHost<H: DestinationHost>(Requests<H>);

/// A VM on the receiver's threads: queues all calls.
struct RemoteVm<H: DestinationHost + 'static> {
    requests: Requests<H>,
    number: u64,
    ram: Arc<dyn GuestRam>,
    /// Whether the loop drops the VM when this is dropped.
    discard: bool,
}

impl<H: DestinationHost + 'static> RemoteHost<H> {
    fn built(&self, build: impl FnOnce(&H) -> Result<H::Vm, VmError> + Send + 'static) -> Result<RemoteVm<H>, VmError> {
        let built = self.0.call(move |here| {
            let vm = build(&here.host)?;
            let (number, ram) = (here.built, vm.ram());
            here.built += 1;
            here.vms.insert(number, vm);
            Ok::<_, VmError>((number, ram))
        });
        let (number, ram) = built??;
        Ok(RemoteVm { requests: self.0.clone(), number, ram, discard: true })
    }
}

impl<H: DestinationHost + 'static> DestinationHost for RemoteHost<H> {
    type Vm = RemoteVm<H>;

    fn build(&self, vm: &VmDescription) -> Result<RemoteVm<H>, VmError> {
        let vm = vm.clone();
        self.built(move |host| host.build(&vm))
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<RemoteVm<H>, VmError> {
        let vm = vm.clone();
        self.built(move |host| host.build_shared(&vm, files))
    }

    fn link_lost(&self, vm: VmId) {
        self.0.send(move |here| {
            here.host.link_lost(vm);
            here.events.push_back(ReceiverEvent::LinkLost(vm));
        });
    }

    fn link_found(&self, vm: VmId) {
        self.0.send(move |here| {
            here.host.link_found(vm);
            here.events.push_back(ReceiverEvent::LinkFound(vm));
        });
    }

    fn attempt_failed(&self, failed: &FailedAttempt) {
        let failed = failed.clone();
        self.0.send(move |here| {
            here.host.attempt_failed(&failed);
            here.events.push_back(ReceiverEvent::AttemptFailed(failed));
        });
    }
}

impl<H: DestinationHost + 'static> RemoteVm<H> {
    fn call<R: Send + 'static>(&self, request: impl FnOnce(&mut H::Vm) -> R + Send + 'static) -> Result<R, VmError> {
        let number = self.number;
        let called = self.requests.call(move |here| here.vms.get_mut(&number).map(request));
        called?.ok_or_else(no_longer_here)
    }
}

impl<H: DestinationHost + 'static> Drop for RemoteVm<H> {
    fn drop(&mut self) {
        if self.discard {
            let number = self.number;
            // executed before the request to build the next VM, because requests are executed in
            // order
            self.requests.send(move |here| drop(here.vms.remove(&number)));
        }
    }
}

impl<H: DestinationHost + 'static> DestinationVm for RemoteVm<H> {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        let piece = piece.clone();
        self.call(move |vm| vm.load_piece(&piece))?
    }

    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        let dirty = dirty.clone();
        self.call(move |vm| vm.continue_log(&dirty))?
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        self.call(|vm| vm.estimate_load()).ok()?
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        let state = state.clone();
        self.call(move |vm| vm.load_state(&state))?
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        self.call(|vm| vm.pager()).ok()?
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.call(|vm| vm.vcpu_threads()).unwrap_or_default()
    }

    fn identity(&self) -> Bytes {
        self.call(|vm| vm.identity()).unwrap_or_default()
    }

    fn protected(&mut self) -> Option<Box<dyn CheckpointedVm>> {
        self.call(|vm| vm.protected()).ok()?
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.call(move |vm| vm.start(running))?
    }
}

impl<H: DestinationHost + 'static> ReceiverQueue<H> {
    /// Starts a receiver at `listener` that builds its VMs on `host`, on the thread that calls
    /// [`next`](Self::next). `wake` is called whenever a request or an event was queued.
    ///
    /// # Errors
    /// Returns an error if the thread that accepts connections cannot be started.
    pub fn new(
        host: H,
        mut listener: Box<dyn Listener>,
        options: ReceiverOptions,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (queue, requests) = mpsc::channel();
        let here = Here { host, vms: HashMap::new(), built: 0, events: VecDeque::new() };
        let remote = Requests { queue, wake: Arc::new(wake) };
        let arrived = |arrived: Arrived<RemoteVm<H>>| {
            let Arrived { mut vm, id, epoch, not_started } = arrived;
            vm.discard = false;
            let number = vm.number;
            vm.requests.send(move |here| {
                if let Some(vm) = here.vms.remove(&number) {
                    here.events.push_back(ReceiverEvent::Arrived(Arrived { vm, id, epoch, not_started }));
                }
            });
        };
        let spawner = options.spawner.clone();
        let receiver = Receiver::new(RemoteHost(remote.clone()), arrived, options);
        let handle = receiver.handle();
        let body = Box::new(move || {
            let ended = receiver.run(&mut *listener);
            drop(receiver);
            remote.send(move |here| here.events.push_back(ReceiverEvent::Ended(ended)));
        });
        let thread = spawner.spawn(Role::Control, GuestImpact::Balanced, "mig-accept", body)?;
        Ok(Self { handle, requests, here, thread: Some(thread) })
    }

    /// Returns a handle for this thread and for other ones.
    pub fn handle(&self) -> ReceiverHandle {
        self.handle.clone()
    }

    /// Executes the queued requests until there is an event, and returns the event. Returns `None`
    /// if the queue is empty: the waker is called when a request or an event is queued. The method
    /// does not wait, except in the methods of the host and its VMs.
    #[allow(clippy::should_implement_trait, reason = "more events may follow `None`")]
    pub fn next(&mut self) -> Option<ReceiverEvent<H::Vm>> {
        loop {
            if let Some(event) = self.here.events.pop_front() {
                return Some(event);
            }
            let request = self.requests.try_recv().ok()?;
            request(&mut self.here);
        }
    }

    /// Returns the host.
    pub fn host(&self) -> &H {
        &self.here.host
    }
}

impl<H: DestinationHost> Drop for ReceiverQueue<H> {
    fn drop(&mut self) {
        self.handle.stop();
        // the threads that wait for an answer get an error
        drop(std::mem::replace(&mut self.requests, mpsc::channel().1));
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}
