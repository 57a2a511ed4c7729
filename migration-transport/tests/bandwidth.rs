//! Tests that data sent while the guest runs keeps to the bandwidth limit, including device state.

#[allow(dead_code, reason = "these tests need a part of it")]
mod common;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

use common::{Destination, TestVm};
use migration_core::{
    engine::{Controller, SourceOptions, migrate},
    report::{Event, Observer, Outcome},
    strategy::PreCopy,
};
use migration_transport::{Bandwidth, Limited, Limiter, memory};

/// An observer that calls a function at every report of progress, with the number of the report and
/// the round.
struct Ticks<F>(AtomicU32, Mutex<F>);

impl<F: FnMut(u32, u32) + Send> Observer for Ticks<F> {
    fn event(&self, event: &Event) {
        if let Event::Progress(progress) = event {
            let tick = self.0.fetch_add(1, Ordering::Relaxed);
            (self.1.lock().unwrap())(tick, progress.round);
        }
    }
}

fn observing(ticks: impl FnMut(u32, u32) + Send + 'static) -> SourceOptions {
    let observer = Arc::new(Ticks(AtomicU32::new(0), Mutex::new(ticks)));
    SourceOptions { observer, ..SourceOptions::default() }
}

/// Makes a link with a limit so low that data that waits is never sent.
fn slow_link() -> (Limited<memory::MemoryConnector>, Limiter, Destination) {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let link = Limited::new(Box::new(connector), Bandwidth::from_bits_per_second(1));
    let limiter = link.limiter();
    (link, limiter, Destination::start(Box::new(listener), 0))
}

#[test]
fn device_state_waits_for_the_limit_while_the_guest_runs_and_hears_a_cancel() {
    let (link, _, _destination) = slow_link();
    let (controller, commands) = Controller::new();
    let options = observing(move |tick, _| {
        if tick == 3 {
            controller.cancel("that is enough");
        }
    });
    let report = migrate(&mut TestVm::new(), &link, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Cancelled, "{:?}", report.reason);
    // messages that set up the migration never wait, and a piece of this VM's device state has
    // 100,000 bytes
    assert!(report.state_bytes == 0 && report.wire_bytes < 10_000, "{report:?}");
}

#[test]
fn device_state_that_waits_goes_on_when_the_limit_is_raised() {
    let (link, limiter, destination) = slow_link();
    let (_controller, commands) = Controller::new();
    let overtaken = Arc::new(AtomicU32::new(u32::MAX));
    let seen = overtaken.clone();
    let options = observing(move |tick, round| {
        if tick == 3 {
            seen.store(round, Ordering::Relaxed);
            limiter.set_bandwidth(Bandwidth::UNLIMITED);
        }
    });
    let report = migrate(&mut TestVm::new(), &link, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(report.state_bytes > 100_000, "{report:?}");
    assert_eq!(overtaken.load(Ordering::Relaxed), 0, "pages were sent before device state");
    destination.arrived.recv().unwrap().set_running(false);
}

#[test]
fn a_switch_over_does_not_wait_for_the_limit_on_device_state() {
    let (link, limiter, destination) = slow_link();
    let (controller, commands) = Controller::new();
    let options = observing(move |tick, round| {
        if tick == 3 {
            controller.switch_over().unwrap();
        }
        // the lanes of the first round wait for the limit, as in every migration
        if round > 0 {
            limiter.set_bandwidth(Bandwidth::UNLIMITED);
        }
    });
    let report = migrate(&mut TestVm::new(), &link, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(report.forced_switch_over);
    destination.arrived.recv().unwrap().set_running(false);
}
