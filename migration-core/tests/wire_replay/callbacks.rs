//! The VMM's methods at the destination call the receiver: it holds no lock that they need.

use std::{
    io,
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::Duration,
};

use migration_core::{
    GuestRam,
    engine::{Receiver, ReceiverHandle, ReceiverOptions, SourceOptions},
    pager::Pager,
    protocol::DestinationPhase,
    report::Outcome,
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    state::{Section, VmState},
    strategy::{Linear, PostCopy},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError, VmId},
    wire::LaneKind,
};

use crate::{
    HANG, VM,
    channels::Door,
    destination::{Destination, Log},
    guest::{ArrivingVm, Host, checksums},
    held::dead,
    live::{Link, OnceNoticed, run_by},
    post_copy::{guest, paged_description, paging},
    streams::{check, feed, frames, stream},
};

/// Calls the receiver, and keeps the phase that it was in at each callback.
#[derive(Clone, Default)]
struct Caller {
    handle: Arc<OnceLock<ReceiverHandle>>,
    seen: Arc<Mutex<Vec<(&'static str, DestinationPhase)>>>,
}

impl Caller {
    fn call(&self, callback: &'static str) {
        let handle = self.handle.get().expect("no source comes before it is set");
        let (phase, _epoch, _bytes) = (handle.phase(), handle.epoch(), handle.wire_bytes());
        assert!(handle.force_take_over().is_err(), "{callback}: nobody has said that the source is dead");
        self.seen.lock().unwrap().push((callback, phase));
    }

    fn seen(&self) -> Vec<(&'static str, DestinationPhase)> {
        self.seen.lock().unwrap().clone()
    }
}

impl Spawner for Caller {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>> {
        self.call("spawn");
        StdSpawner.spawn(role, impact, name, body)
    }
}

struct CallingHost {
    host: Host,
    caller: Caller,
}

struct CallingVm {
    vm: ArrivingVm,
    caller: Caller,
}

impl DestinationHost for CallingHost {
    type Vm = CallingVm;

    fn build(&self, vm: &VmDescription) -> Result<CallingVm, VmError> {
        self.caller.call("build");
        Ok(CallingVm { vm: self.host.build(vm)?, caller: self.caller.clone() })
    }

    fn link_lost(&self, vm: VmId) {
        assert_eq!(vm, VM);
        self.caller.call("link_lost");
    }

    fn link_found(&self, vm: VmId) {
        assert_eq!(vm, VM);
        self.caller.call("link_found");
    }
}

impl DestinationVm for CallingVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        self.caller.call("pager");
        self.vm.pager()
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        self.caller.call("estimate_load");
        None
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.caller.call("load_piece");
        self.vm.load_piece(piece)
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.caller.call("load_state");
        self.vm.load_state(state)
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.caller.call("vcpu_threads");
        self.vm.vcpu_threads()
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.caller.call("start");
        self.vm.start(running)
    }
}

fn destination(host: Host, arrived: mpsc::Receiver<crate::guest::Arrived>) -> (Destination, Caller) {
    let ((door, ends), (log_tx, log)) = (mpsc::channel(), mpsc::channel());
    let caller = Caller::default();
    let calling = CallingHost { host, caller: caller.clone() };
    let owner = caller.clone();
    let observer = Arc::new(Log(Mutex::new(log_tx)));
    let spawner = Arc::new(caller.clone());
    let options = ReceiverOptions { observer, spawner, idle_timeout: HANG, ..ReceiverOptions::default() };
    let receiver = Receiver::new(
        calling,
        move |arrived| {
            assert!(arrived.id == VM && arrived.not_started.is_none());
            owner.call("arrived");
            assert_eq!(owner.handle.get().unwrap().epoch(), arrived.epoch);
            // it is the very VM that was built
            let _: CallingVm = arrived.vm;
        },
        options,
    );
    let handle = receiver.handle();
    assert!(caller.handle.set(handle.clone()).is_ok());
    let thread = Some(thread::spawn(move || receiver.run(&mut Door(ends))));
    (Destination { door, handle, thread, arrived, log }, caller)
}

#[test]
fn every_method_of_the_vmm_may_call_the_receiver() {
    let (to, arrived) = mpsc::channel();
    let host = Host { description: paged_description(), to, paging: Some(paging()) };
    let (destination, caller) = destination(host, arrived);
    // the link is lost when pages follow the VM
    let link = Link::new(&destination, Some(((LaneKind::Bulk, 0, false), 3000)));
    let there = caller.clone();
    let noticed = move || there.seen().iter().any(|(callback, _)| *callback == "link_lost");
    let link = OnceNoticed { link, noticed };
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let (report, vm, _) = run_by(strategy, &destination, link, guest(), options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert_eq!(destination.finish().0.pages(), checksums(&vm.ram));
    use DestinationPhase::*;
    let seen = caller.seen();
    let at = |callback| seen.iter().filter(|(seen, _)| *seen == callback).map(|(_, phase)| *phase).collect::<Vec<_>>();
    for (callback, phase) in [
        ("build", Preparing),
        ("pager", Preparing),
        ("estimate_load", Preparing),
        ("load_state", Loading),
        ("start", Running),
        ("vcpu_threads", Running),
        ("arrived", Running),
        ("link_lost", Running),
    ] {
        assert_eq!(at(callback), [phase], "{callback}: {seen:?}");
    }
    // also when the first *run* was repeated
    assert!(!at("link_found").is_empty(), "{seen:?}");
    let place = |callback| seen.iter().position(|(seen, _)| *seen == callback);
    assert!(place("arrived") < place("link_lost") && place("link_lost") < place("link_found"), "{seen:?}");
}

/// On the thread of the one who decides.
#[test]
fn a_vm_that_a_person_decides_on_may_call_the_receiver_too() {
    for person in [true, false] {
        let (to, arrived) = mpsc::channel();
        let host = Host { description: crate::guest::description(), to, paging: None };
        let (destination, caller) = destination(host, arrived);
        let good = stream("pre-copy");
        let control = frames(&good.lanes[0]);
        let cut = control[control.len() - 3];
        feed(&destination, &good, &|lane, bytes| {
            if lane == 0 {
                bytes.truncate(cut);
            }
        });
        if person {
            destination.handle.force_take_over().unwrap();
        } else {
            destination.handle.take_over(dead()).unwrap();
        }
        let seen = caller.seen();
        assert!(seen.contains(&("load_piece", DestinationPhase::Receiving)), "{seen:?}");
        let last: Vec<_> = seen.iter().rev().map(|(callback, _)| *callback).take(2).collect();
        assert_eq!(last, ["arrived", "start"], "{seen:?}");
        check("pre-copy", &destination.finish().0);
    }
}
