//! What the simulator does with time: links, demands, and what the guest has of it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    PageRange, PageSet,
    sim::{Dirtying, Guest, GuestMemory, SimConfig, Simulation, Span, Touching},
    strategy::{Hybrid, Linear, PostCopy, PushOrder, StopAndCopy},
};

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
    for strategy in [&mut post_copy() as &mut dyn migration_core::strategy::Strategy, &mut StopAndCopy] {
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

/// An order that notes what it is told of heat.
struct Told(Arc<Mutex<Vec<u8>>>, Linear);

impl PushOrder for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        *self.0.lock().unwrap() = heat.to_vec();
        self.1.begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        self.1.fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        self.1.next(unsent, most)
    }
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
