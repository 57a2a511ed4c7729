//! A receiver for a VMM with an event loop: host and VMs belong to the loop's thread.

use std::{
    marker::PhantomData,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, ThreadId},
};

use migration_core::{
    GuestRam,
    engine::{ReceiverEvent, ReceiverOptions, ReceiverQueue},
    pager::Pager,
    report::Outcome,
    state::{Section, VmState},
    strategy::{Linear, PostCopy, PreCopy},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
    wire::LaneKind,
};

use crate::{
    HANG, VM,
    channels::{Door, pair},
    guest::{ArrivingVm, Host, RecordedVm, checksums, description},
    live::{Link, OnceNoticed},
    one_attempt::source,
    post_copy::{guest, paged_description, paging},
};

/// Finds out whether it is called by any other thread than its own.
struct LoopHost {
    host: Host,
    thread: ThreadId,
}

/// Cannot be sent to another thread.
struct LoopVm {
    vm: ArrivingVm,
    thread: ThreadId,
    _not_send: PhantomData<Rc<()>>,
}

fn is_here(thread: ThreadId) {
    assert_eq!(thread::current().id(), thread, "called by another thread than the loop's");
}

impl DestinationHost for LoopHost {
    type Vm = LoopVm;

    fn build(&self, vm: &VmDescription) -> Result<LoopVm, VmError> {
        is_here(self.thread);
        Ok(LoopVm { vm: self.host.build(vm)?, thread: self.thread, _not_send: PhantomData })
    }
}

impl DestinationVm for LoopVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        is_here(self.thread);
        self.vm.ram()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        is_here(self.thread);
        self.vm.pager()
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        is_here(self.thread);
        self.vm.vcpu_threads()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        is_here(self.thread);
        self.vm.load_piece(piece)
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        is_here(self.thread);
        self.vm.load_state(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        is_here(self.thread);
        self.vm.start(running)
    }
}

impl Drop for LoopVm {
    fn drop(&mut self) {
        is_here(self.thread);
    }
}

struct World {
    queue: ReceiverQueue<LoopHost>,
    door: mpsc::Sender<Option<crate::channels::End>>,
    woken: mpsc::Receiver<()>,
    started: mpsc::Receiver<crate::guest::Arrived>,
}

impl World {
    fn new(description: VmDescription, paged: bool) -> Self {
        let ((door, ends), (to, started), (wake, woken)) = (mpsc::channel(), mpsc::channel(), mpsc::channel());
        let host = Host { description, to, paging: paged.then(paging) };
        let host = LoopHost { host, thread: thread::current().id() };
        let options = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
        let queue = ReceiverQueue::new(host, Box::new(Door(ends)), options, move || {
            // a loop that has ended is not woken
            let _ = wake.send(());
        });
        Self { queue: queue.unwrap(), door, woken, started }
    }

    /// The event loop, until there is an event.
    fn event(&mut self) -> ReceiverEvent<LoopVm> {
        loop {
            if let Some(event) = self.queue.next() {
                return event;
            }
            self.woken.recv_timeout(HANG).expect("the loop is woken when something happens");
        }
    }
}

#[test]
fn the_loops_thread_does_all_that_is_the_vmms() {
    let mut world = World::new(paged_description(), true);
    let (foreign, there) = pair();
    foreign.outgoing.write(b"GET / HTTP/1.1").unwrap();
    world.door.send(Some(there)).unwrap();
    let failed = match world.event() {
        ReceiverEvent::AttemptFailed(failed) => failed.why,
        _ => panic!("something else has happened"),
    };
    assert!(failed.contains("does not speak this protocol"), "{failed}");
    // the link is lost when pages follow the VM
    let link = Link::to(world.door.clone(), Some(((LaneKind::Bulk, 0, false), 3000)));
    let lost = Arc::new(AtomicBool::new(false));
    let noticed = lost.clone();
    let link = OnceNoticed { link, noticed: move || noticed.load(Ordering::SeqCst) };
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    let ended = source(strategy, link, guest());
    let mut seen = Vec::new();
    let mut arrived = None;
    loop {
        match world.event() {
            ReceiverEvent::Arrived(vm) => {
                assert!(vm.id == VM && vm.epoch == 1 && vm.not_started.is_none());
                arrived = Some(vm.vm);
                seen.push("arrived");
            }
            ReceiverEvent::LinkLost(VM) => {
                seen.push("lost");
                lost.store(true, Ordering::SeqCst);
            }
            ReceiverEvent::LinkFound(VM) => seen.push("found"),
            ReceiverEvent::Ended(Ok(())) => break,
            _ => panic!("something else has happened after {seen:?}"),
        }
    }
    // the VM is the loop's, as what it built it
    let vm: LoopVm = arrived.unwrap();
    is_here(vm.thread);
    assert_eq!(seen[..3], ["arrived", "lost", "found"], "{seen:?}");
    let (report, source_vm) = ended.recv_timeout(HANG).unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert_eq!(world.started.recv_timeout(HANG).unwrap().pages(), checksums(&source_vm.ram));
}

/// Threads that wait for an answer learn that none will come.
#[test]
fn a_loop_that_ends_in_the_middle_of_an_attempt_leaves_nobody_waiting() {
    let world = World::new(description(), false);
    let ended = source(<PreCopy>::default(), Link::to(world.door.clone(), None), RecordedVm::new());
    // it is asked to build the VM, and does not
    world.woken.recv_timeout(HANG).unwrap();
    drop(world);
    let (report, _vm) = ended.recv_timeout(HANG).unwrap();
    assert_eq!(report.outcome, Outcome::Failed, "{:?}", report.reason);
}
