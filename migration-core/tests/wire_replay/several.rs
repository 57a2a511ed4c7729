//! A receiver of several VMs: each has a session of its own, and none is in another one's way.

use std::{
    collections::HashMap,
    sync::{Arc, Barrier, Mutex, mpsc},
    thread,
    time::Instant,
};

use migration_core::{
    HeapRam,
    engine::{Receiver, ReceiverOptions, VmStatus},
    protocol::DestinationPhase,
    report::Outcome,
    strategy::{Linear, PostCopy, PreCopy},
    vm::{DestinationHost, VmDescription, VmError, VmId},
    wire::{Control, ErrorCode, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG, VM,
    bounds::{OTHER, end, greet, hello_of},
    channels::{Door, End},
    destination::{Destination, Log, said},
    guest::{Arrived, ArrivingVm, RecordedVm, checksums},
    live::Link,
    one_attempt::source,
    pager::HeapPager,
    post_copy::{DURING, paged_description, paging},
    streams::{feed, frames, stream},
};

const THIRD: VmId = VmId(*b"a third guest...");

/// Builds any VM that it knows by its id.
struct AnyHost {
    started: HashMap<VmId, mpsc::Sender<Arrived>>,
    paged: bool,
    /// Where all builds of a test meet.
    meet: Option<Barrier>,
}

impl DestinationHost for AnyHost {
    type Vm = ArrivingVm;

    fn build(&self, vm: &VmDescription) -> Result<ArrivingVm, VmError> {
        let to = self.started.get(&vm.id).ok_or_else(|| VmError::new("nobody knows this VM"))?.clone();
        if let Some(meet) = &self.meet {
            meet.wait();
        }
        let ram = Arc::new(HeapRam::new(vm.layout.clone()).unwrap());
        let pager = self.paged.then(|| Arc::new(HeapPager::new(ram.clone(), &paging())));
        let arrived = Arrived { ram, state: None, pieces: 0, running: false, pager };
        Ok(ArrivingVm { arrived: Some(arrived), to })
    }
}

struct World {
    destination: Destination,
    /// The VMs that have started, by id.
    started: HashMap<VmId, mpsc::Receiver<Arrived>>,
    /// Which VMs have arrived, and under which epoch.
    arrivals: mpsc::Receiver<(VmId, u32)>,
}

impl World {
    fn new(max_vms: usize, ids: &[VmId], paged: bool, meet: Option<Barrier>) -> Self {
        let ((door, ends), (log_tx, log)) = (mpsc::channel(), mpsc::channel());
        let channel = |&id: &VmId| {
            let (to, started) = mpsc::channel();
            ((id, to), (id, started))
        };
        let (senders, started): (HashMap<_, _>, HashMap<_, _>) = ids.iter().map(channel).unzip();
        let host = AnyHost { started: senders, paged, meet };
        let (tx, arrivals) = mpsc::channel();
        let observer = Arc::new(Log(Mutex::new(log_tx)));
        let options = ReceiverOptions { max_vms, observer, idle_timeout: HANG, ..ReceiverOptions::default() };
        let receiver = Receiver::new(host, move |arrived| tx.send((arrived.id, arrived.epoch)).unwrap(), options);
        let handle = receiver.handle();
        let thread = Some(thread::spawn(move || receiver.run(&mut Door(ends))));
        let (_unused, nothing) = mpsc::channel();
        Self { destination: Destination { door, handle, thread, arrived: nothing, log }, started, arrivals }
    }

    fn link(&self) -> Link {
        Link::to(self.destination.door.clone(), None)
    }

    /// Waits until the receiver has forgotten this VM.
    fn forgotten(&self, vm: VmId) {
        let deadline = Instant::now() + HANG;
        while self.destination.handle.vm(vm).is_some() {
            assert!(Instant::now() < deadline, "{:?}", self.destination.handle.vms());
            thread::yield_now();
        }
    }

    fn phase(&self, vm: VmId) -> Option<DestinationPhase> {
        self.destination.handle.vm(vm).map(|vm| vm.phase())
    }
}

fn guest(id: VmId) -> RecordedVm {
    let before = [(0, id.0[0]), (7, id.0[15]), (200, 1)];
    RecordedVm::of(VmDescription { id, ..paged_description() }, &before, &DURING)
}

/// As [`greet`], under any epoch.
fn greet_under(destination: &Destination, epoch: u32, hello: &Control) -> End {
    let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
    destination.connect(&[&preamble[..], &hello.encode(0, 0, epoch)].concat())
}

fn hang_up(control: &End) {
    control.outgoing.update(|state| state.ended = true);
}

fn is_welcome(control: &End) {
    let answer = said(control);
    assert!(matches!(answer, Some(Control::Welcome(_))), "{answer:?}");
}

/// They are built at the same time: none waits for another one, and no lock is held meanwhile.
#[test]
fn several_vms_arrive_at_the_same_time() {
    let ids: Vec<_> = (1..=4).map(|n| VmId([n; 16])).collect();
    let world = World::new(ids.len(), &ids, true, Some(Barrier::new(ids.len())));
    let sources: Vec<_> = ids
        .iter()
        .enumerate()
        .map(|(n, &id)| {
            let post_copy = PostCopy { order: Box::new(Linear::default()) };
            match n % 2 {
                0 => source(<PreCopy>::default(), world.link(), guest(id)),
                _ => source(post_copy, world.link(), guest(id)),
            }
        })
        .collect();
    for (id, ended) in ids.iter().zip(sources) {
        let (report, vm) = ended.recv_timeout(HANG).unwrap();
        assert_eq!(report.outcome, Outcome::Completed, "{id}: {:?}", report.reason);
        let arrived = world.started[id].recv_timeout(HANG).unwrap();
        world.forgotten(*id);
        assert_eq!(arrived.pages(), checksums(&vm.ram), "{id}");
    }
    let mut arrivals: Vec<_> = world.arrivals.try_iter().collect();
    arrivals.sort_unstable_by_key(|(id, _)| id.0);
    assert_eq!(arrivals, ids.iter().map(|&id| (id, 1)).collect::<Vec<_>>());
    assert_eq!(world.destination.handle.vms(), []);
}

#[test]
fn a_vm_that_is_held_stays_held_while_others_come_and_go() {
    let world = World::new(3, &[VM, OTHER, THIRD], false, None);
    let good = stream("pre-copy");
    let control = frames(&good.lanes[0]);
    let cut = control[control.len() - 3];
    feed(&world.destination, &good, &|lane, bytes| {
        if lane == 0 {
            bytes.truncate(cut);
        }
    });
    let held = VmStatus { id: VM, phase: DestinationPhase::Ready, epoch: 1 };
    for (id, epoch) in [(OTHER, 1), (THIRD, 1)] {
        let (report, _vm) = source(<PreCopy>::default(), world.link(), guest(id)).recv_timeout(HANG).unwrap();
        assert_eq!(report.outcome, Outcome::Completed, "{id}: {:?}", report.reason);
        assert_eq!(world.arrivals.recv_timeout(HANG).unwrap(), (id, epoch));
        world.forgotten(id);
        assert_eq!(world.destination.handle.vms(), [held]);
    }
    // its source is dead, says a person
    world.destination.handle.vm(VM).unwrap().force_take_over().unwrap();
    assert_eq!(world.arrivals.recv_timeout(HANG).unwrap(), (VM, 2));
    assert!(world.started[&VM].recv_timeout(HANG).unwrap().running);
    world.forgotten(VM);
    // they were ready here: what is left of their sources is refused, for as long as the receiver
    // lives
    for id in [VM, OTHER, THIRD] {
        let (code, text) = end(&greet(&world.destination, &hello_of(id, 0, 1)));
        assert_eq!(code, ErrorCode::StaleEpoch, "{id}: {text}");
    }
}

#[test]
fn an_attempt_that_was_never_ready_leaves_nothing_behind() {
    let world = World::new(2, &[OTHER], false, None);
    for _ in 0..3 {
        let control = greet(&world.destination, &hello_of(OTHER, 0, 1));
        is_welcome(&control);
        assert_eq!(world.phase(OTHER), Some(DestinationPhase::Preparing));
        hang_up(&control);
        world.forgotten(OTHER);
    }
}

#[test]
fn there_is_room_for_so_many_vms_and_once_for_each() {
    let world = World::new(2, &[VM, OTHER, THIRD], false, None);
    let first = greet(&world.destination, &hello_of(VM, 0, 1));
    is_welcome(&first);
    let second = greet(&world.destination, &hello_of(OTHER, 0, 1));
    is_welcome(&second);
    let (code, text) = end(&greet(&world.destination, &hello_of(THIRD, 0, 1)));
    assert!(code == ErrorCode::Busy && text.contains("as many VMs as it takes at once"), "{code:?}: {text}");
    // a second source of a VM that is on its way
    let (code, text) = end(&greet(&world.destination, &hello_of(OTHER, 0, 1)));
    assert!(code == ErrorCode::Busy && text.contains("another session is under way"), "{code:?}: {text}");
    // unless it is the same source, which has given its last attempt up
    let again = greet_under(&world.destination, 2, &hello_of(OTHER, 0, 1));
    is_welcome(&again);
    assert_eq!(said(&second), None, "its lane ends");
    // the other VM has not noticed anything
    assert_eq!(world.phase(VM), Some(DestinationPhase::Preparing));
    hang_up(&again);
    world.forgotten(OTHER);
    let third = greet(&world.destination, &hello_of(THIRD, 0, 1));
    is_welcome(&third);
    [first, third].iter().for_each(hang_up);
}
