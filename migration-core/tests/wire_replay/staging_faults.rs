//! A VM that is protected in a page store: stores that fail, links that are cut, and users who
//! cancel.

use std::{
    io,
    sync::{Arc, Condvar, Mutex},
};

use migration_core::{
    channel::{Channel, Connector},
    engine::NoEviction,
    report::Outcome,
    strategy::Finish,
    wire::LaneKind,
};

use crate::{
    HANG,
    destination::Destination,
    live::{Direction, Link},
    staging::{DATA, Flaky, Staged, check, destination, there},
};

#[test]
fn a_store_that_fails_for_a_while_only_delays_the_copy() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    store.fail(true);
    staged.write(10, 77);
    let status = staged.until_staging("a failure is reported", |report| report.degraded.is_some());
    assert!(status.degraded.unwrap().why.contains("reaching it"));
    assert_eq!((status.staged_pages, status.dirty_pages), (DATA, 1));
    store.fail(false);
    let status = staged.until_whole(DATA + 1);
    assert!(status.degraded.is_none());
    assert_eq!(store.namespaces(), [1], "the same namespace serves on");
    staged.arrives(destination(vec![store.clone()]), &store);
}

/// Rule 11: what was put before is staged again, into a new namespace.
#[test]
fn a_store_that_loses_everything_gets_all_pages_again() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    store.lose_everything();
    staged.write(10, 77);
    staged.until_staging("the loss is reported", |report| report.degraded.is_some() && report.staged_pages == 0);
    staged.until_whole(DATA + 1);
    assert_eq!(store.namespaces(), [2]);
    staged.arrives(destination(vec![store.clone()]), &store);
}

#[test]
fn a_vm_is_evicted_while_its_store_fails_and_all_pages_come_from_here() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    store.fail(true);
    let destination = destination(vec![store.clone()]);
    staged.evict("host-2", Link::new(&destination, None));
    let (report, vm) = staged.end();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(report.pages.pushed + report.pages.demanded >= DATA - 10, "{report:?}");
    check(destination, &vm);
}

/// A put that hangs delays no command. What it has in hand comes from here.
#[test]
fn a_vm_is_evicted_while_a_put_hangs() {
    let store = Flaky::new();
    let staged = Staged::whole(&store, Finish::PostCopy);
    store.hang(true);
    staged.write(10, 77);
    store.wait_for_put();
    let destination = destination(vec![store.clone()]);
    staged.evict("host-2", Link::new(&destination, None));
    staged.until_released();
    store.hang(false);
    let (report, vm) = staged.end();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    check(destination, &vm);
}

/// Holds up whoever connects until the test opens it.
#[derive(Default)]
struct Gate {
    /// Whether somebody waits here, and whether the gate is open.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    /// Waits until somebody connects.
    fn until_reached(&self) {
        let waited = self.changed.wait_timeout_while(self.state.lock().unwrap(), HANG, |state| !state.0).unwrap();
        assert!(!waited.1.timed_out(), "nobody connects");
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, HANG, |state| !state.1).unwrap();
        assert!(!waited.1.timed_out(), "the test has forgotten the gate");
    }
}

/// Connects through a gate.
struct Held {
    link: Link,
    gate: Arc<Gate>,
}

impl Connector for Held {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.gate.pass();
        self.link.connect_as(kind)
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

/// A protected VM of which an eviction has begun and connects.
fn half_evicted(store: &Arc<Flaky>) -> (Staged, Destination, Arc<Gate>) {
    let staged = Staged::whole(store, Finish::PostCopy);
    let (first, gate) = (destination(vec![store.clone()]), Arc::<Gate>::default());
    staged.evict("host-1", Held { link: Link::new(&first, None), gate: gate.clone() });
    gate.until_reached();
    (staged, first, gate)
}

#[test]
fn a_cancel_ends_the_eviction_and_the_protection_goes_on() {
    let store = Flaky::new();
    let (staged, first, gate) = half_evicted(&store);
    let again = staged.controller.evict(there("host-3"), Arc::new(Link::new(&first, None)));
    assert_eq!(again, Err(NoEviction::UnderWay));
    staged.controller.cancel("enough");
    gate.open();
    assert_eq!(staged.until_failed("host-1"), "cancelled: enough");
    staged.write(10, 77);
    staged.until_whole(DATA + 1);
    assert_eq!(store.namespaces(), [1]);
    staged.arrives(destination(vec![store.clone()]), &store);
}

#[test]
fn an_eviction_ends_with_the_protection_and_with_the_guest() {
    for guest_ends in [false, true] {
        let store = Flaky::new();
        let (staged, first, gate) = half_evicted(&store);
        if guest_ends {
            staged.controller.vm_ended("powered off");
        } else {
            staged.controller.stage_off();
        }
        gate.open();
        let (report, vm) = staged.end();
        let (outcome, why) =
            if guest_ends { (Outcome::Failed, "powered off") } else { (Outcome::Cancelled, "not to be protected") };
        assert_eq!(report.outcome, outcome);
        assert!(report.reason.unwrap().contains(why));
        assert!(vm.calls.lock().unwrap().is_empty(), "it was never paused");
        assert_eq!(store.namespaces(), [] as [u8; 0]);
        assert!(first.arrived.try_recv().is_err());
    }
}

/// Wherever the link is cut: before *run* the VM is protected as before, and goes with the next
/// command; afterwards no page is lost.
#[test]
fn rule_18_cut_while_a_protected_vm_is_evicted() {
    let (mut failed, mut recovered) = (0, 0);
    let cuts: [(Direction, &[usize]); 5] = [
        ((LaneKind::Control, 0, false), &[60, 700, 5_000, 12_000, 17_000]),
        ((LaneKind::Control, 0, true), &[10, 100, 200, 250, 280, 300, 330]),
        ((LaneKind::Bulk, 1, false), &[10, 60, 4_000]),
        ((LaneKind::Demand, 0, false), &[10, 60, 4_000]),
        ((LaneKind::Demand, 0, true), &[10, 60, 100]),
    ];
    for finish in [Finish::PostCopy, Finish::Stop] {
        for (direction, lengths) in cuts {
            for &after in lengths {
                let what = format!("{finish:?}, {direction:?} is cut after {after} bytes");
                let store = Flaky::new();
                let staged = Staged::whole(&store, finish);
                let destination = destination(vec![store.clone()]);
                staged.evict("host-1", Link::new(&destination, Some((direction, after))));
                let ended = staged.until_decided();
                if ended {
                    let (report, vm) = staged.end();
                    assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
                    recovered += report.recoveries;
                    check(destination, &vm);
                    assert_eq!(store.namespaces(), [] as [u8; 0], "{what}");
                } else {
                    failed += 1;
                    assert!(destination.arrived.try_recv().is_err(), "{what}: it runs twice");
                    staged.arrives(destination, &store);
                }
            }
        }
    }
    assert!(failed > 3 && recovered > 0, "{failed} evictions failed, {recovered} were recovered");
}
