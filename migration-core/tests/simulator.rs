//! What the simulator does with time and with the verbs: links, demands, waits, puts, and what the
//! guest has of it.

mod common;

use std::{sync::Arc, time::Duration};

use migration_core::{
    MigrationError,
    sim::{Dirtying, Guest, GuestMemory, Owner, SimConfig, Simulation, Span, StoreConfig, Touching},
    strategy::{
        Destination, Done, Hybrid, Linear, Place, PostCopy, Running, ScatterGather, StopAndCopy, Strategy, Until, Wake,
    },
};

use common::Told;

const MS: Duration = Duration::from_millis(1);

fn post_copy() -> PostCopy {
    PostCopy { order: Box::new(Linear::default()) }
}

#[test]
fn a_demand_does_not_wait_for_a_push_that_is_under_way() {
    // a chunk takes half a second
    let touching = Touching::Random { pages_per_second: 2_000.0 };
    let config =
        SimConfig { pages: 8192, bytes_per_second: 4e6, latency: MS, chunk: 512, touching, ..SimConfig::default() };
    let mut sim = Simulation::new(config);
    let attempt = sim.attempt(&mut post_copy());
    let report = sim.guest_report();
    assert!(attempt.faults > 50 && report.faults.count() == attempt.faults, "{attempt:?} {report:?}");
    // two ways over the link, and a page on it
    let typical = report.faults.quantile(0.5).unwrap();
    assert!(typical >= 3 * MS && typical < 5 * MS, "{typical:?}");
    assert_eq!(sim.broken(), &[] as &[String]);
}

#[test]
fn pushes_and_rounds_pay_the_latency_once() {
    // 128 chunks, which take 2.1 seconds on the link
    let config = SimConfig { latency: 50 * MS, ..SimConfig::default() };
    for strategy in [&mut post_copy() as &mut dyn Strategy, &mut StopAndCopy] {
        let total = Simulation::new(config.clone()).attempt(strategy).total;
        assert!(total > 2100 * MS && total < 3000 * MS, "{total:?}");
    }
}

#[test]
fn all_time_is_the_guests_or_is_waited() {
    let dirtying = Dirtying::Rate { pages_per_second: 5_000.0, working_set: 4_000 };
    let config = SimConfig { pages: 8192, bytes_per_second: 10e6, dirtying, ..SimConfig::default() };
    let mut sim = Simulation::new(config);
    let attempt = sim.attempt(&mut post_copy());
    let report = sim.guest_report();
    let accounted = report.ran + report.waited + attempt.downtime.unwrap();
    assert!(accounted.abs_diff(sim.now()) < 5 * MS, "{accounted:?} of {:?}, {report:?}", sim.now());
    assert!(report.waited > 100 * MS, "{report:?}");
}

#[test]
fn orders_are_told_which_pages_are_hot() {
    let heat = Arc::default();
    let dirtying = Dirtying::Rate { pages_per_second: 20_000.0, working_set: 100 };
    let config = SimConfig { pages: 4096, dirtying, ..SimConfig::default() };
    let order = Box::new(Told(Arc::clone(&heat), Linear::default()));
    Simulation::new(config).attempt(&mut Hybrid { rounds: 2, order });
    let heat = heat.lock().unwrap();
    assert!(heat[..100].iter().all(|&heat| heat > 0) && heat[100..4000].iter().all(|&heat| heat == 0));
}

/// Reads what it wrote a while ago, wherever it runs.
struct ReadsBack(u64);

impl Guest for ReadsBack {
    fn run(&mut self, span: Span, memory: &mut dyn GuestMemory) -> Duration {
        let step = Duration::from_micros(100);
        let mut at = step;
        while at <= span.time {
            let page = |n: u64| n * 7 % memory.pages();
            let (page, write) = if self.0.is_multiple_of(2) { (page(self.0), true) } else { (page(self.0 / 2), false) };
            if !memory.touch(page, write) {
                return at;
            }
            self.0 += 1;
            at += step;
        }
        span.time
    }
}

#[test]
fn a_guest_of_ones_own_reads_at_the_destination_what_it_wrote_at_the_source() {
    let config = SimConfig { pages: 4096, bytes_per_second: 10e6, chunk: 16, ..SimConfig::default() };
    let mut sim = Simulation::with_guest(config, Box::new(ReadsBack(0)));
    let attempt = sim.attempt(&mut Hybrid { rounds: 3, order: Box::new(Linear::default()) });
    assert!(attempt.error.is_none() && attempt.faults > 0, "{attempt:?}");
    assert_eq!(sim.broken(), &[] as &[String]);
}

/// Runs a closure as a strategy.
struct Script<F>(F);

impl<F: FnMut(Running<'_>) -> Result<Done, MigrationError> + Send> Strategy for Script<F> {
    fn name(&self) -> &'static str {
        "script"
    }

    fn stores(&self) -> Vec<Place> {
        vec![Place::stage(["a"])]
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError> {
        (self.0)(vm)
    }
}

fn with_store(dirtying: Dirtying) -> SimConfig {
    SimConfig { pages: 4096, chunk: 64, dirtying, stores: vec![StoreConfig::named("a")], ..SimConfig::default() }
}

#[test]
fn a_wait_ends_when_what_it_waits_for_happens() {
    let dirtying = Dirtying::Rate { pages_per_second: 10_000.0, working_set: 1_000 };
    let mut sim = Simulation::new(with_store(dirtying));
    sim.command(300 * MS, Destination::named("elsewhere"));
    let mut wakes = Vec::new();
    let mut script = Script(|mut vm: Running<'_>| {
        vm.start_tracking()?;
        wakes.push(vm.wait(Until::dirty(500).or_after(200 * MS))?);
        vm.harvest()?;
        wakes.push(vm.wait(Until::dirty(900).or_after(20 * MS))?);
        wakes.push(vm.wait(Until::command().or_after(20 * MS))?);
        wakes.push(vm.wait(Until::command().or_after(1000 * MS))?);
        // no other command is to come: a strategy that waits for one ends
        vm.wait(Until::command().or_after(20 * MS))?;
        vm.cancel("not reached")
    });
    let error = sim.attempt(&mut script).error.unwrap();
    assert!(matches!(error, MigrationError::Cancelled(_)), "{error}");
    let elsewhere = Wake::Command(Destination::named("elsewhere"));
    assert_eq!(wakes, [Wake::Dirty, Wake::Time, Wake::Time, elsewhere]);
    assert!(sim.now().abs_diff(300 * MS) < 5 * MS, "{:?}", sim.now());
}

#[test]
fn a_put_takes_what_was_acknowledged_out_of_the_set_and_ends_early_on_a_command() {
    let mut sim = Simulation::new(with_store(Dirtying::Idle));
    sim.command(10 * MS, Destination::named("elsewhere"));
    let mut seen = Vec::new();
    let mut script = Script(|mut vm: Running<'_>| {
        let stage = Place::stage(["a"]);
        let mut pages = vm.start_tracking()?;
        // 64 pages take 2 ms, so that the command comes in between
        let early = vm.put(&mut pages, &stage)?.or_fail()?;
        seen.push((early.asked, early.sent, pages.len()));
        assert!(matches!(vm.wait(Until::command())?, Wake::Command(_)));
        let some = vm.put(&mut pages, stage.at_most(100))?.or_fail()?;
        seen.push((some.asked, some.sent, pages.len()));
        let sent = vm.put(&mut pages, Place::Destination.at_most(1000))?.or_fail()?;
        seen.push((sent.asked, sent.sent, pages.len()));
        let map = vm.locations()?;
        assert_eq!((map.with_copies().len(), map.unsent().len()), (early.sent + some.sent, pages.len()));
        let rest = vm.harvest()?;
        vm.pause()?.hand_over(rest)?.serve(&mut Linear::default())
    });
    let attempt = sim.attempt(&mut script);
    assert!(attempt.error.is_none(), "{attempt:?}");
    let [(4096, early, left), (100, 100, then), (1000, 1000, last)] = seen[..] else { panic!("{seen:?}") };
    assert!((64..1000).contains(&early), "{early}");
    assert_eq!((left, then, last), (4096 - early, left - 100, then - 1000));
    assert_eq!(sim.missing(), early + 100);
    assert_eq!((sim.gather(1000 * MS), sim.broken()), (0, &[] as &[String]));
}

#[test]
fn a_store_that_is_full_takes_no_page_from_the_set() {
    let full = StoreConfig { pages: 100, ..StoreConfig::named("a") };
    let mut sim = Simulation::new(SimConfig { stores: vec![full], ..with_store(Dirtying::Idle) });
    let mut script = Script(|mut vm: Running<'_>| {
        let mut pages = vm.start_tracking()?;
        let put = vm.put(&mut pages, &Place::stage(["a"]))?;
        assert!(put.failed.is_some() && put.round.sent == 64 && pages.len() == 4096 - 64, "{put:?}");
        vm.put(&mut pages, &Place::stage(["a"]))?.or_fail()?;
        vm.cancel("not reached")
    });
    let attempt = sim.attempt(&mut script);
    assert!(matches!(attempt.error, Some(MigrationError::PageStore { .. })), "{attempt:?}");
    assert_eq!(sim.owner(), Owner::Source);
}

/// Rule 1: the source answers for a page that is on its way into a store.
#[test]
fn no_fault_waits_for_a_put() {
    // a put takes two seconds, and nearly all pages are put at once
    let slow = StoreConfig { latency: 1000 * MS, ..StoreConfig::named("a") };
    let touching = Touching::Random { pages_per_second: 5_000.0 };
    let config = SimConfig {
        bytes_per_second: 1e6,
        egress: Some(125e6),
        chunk: 16,
        touching,
        stores: vec![slow],
        ..with_store(Dirtying::Idle)
    };
    let mut sim = Simulation::new(config);
    let attempt = sim.attempt(&mut ScatterGather::new(["a"], Linear::default()));
    assert!(attempt.error.is_none() && attempt.put > 2000, "{attempt:?}");
    // a page takes 4 ms on the link: if faults waited for puts, there would be one or two of them
    assert!(attempt.faults > 200, "{attempt:?}");
    let typical = sim.guest_report().faults.quantile(0.5).unwrap();
    assert!(typical < 50 * MS, "{typical:?}");
}
