//! Pages that the guest does not need: they do not travel, and those that it takes back do.

use std::time::Duration;

use migration_core::{
    PageRange,
    sim::{Dirtying, Owner, SimConfig, Simulation, Touching},
    strategy::{Hybrid, Linear, PostCopy, PreCopy, StopAndCopy, Strategy},
};

const PAGES: u64 = 2048;

fn strategies() -> Vec<Box<dyn Strategy>> {
    vec![
        Box::new(<PreCopy>::default()),
        Box::new(StopAndCopy),
        Box::new(PostCopy { order: Box::new(Linear::default()) }),
        Box::new(Hybrid { rounds: 2, order: Box::new(Linear::default()) }),
    ]
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Half of RAM is free before the migration begins.
fn half_free() -> SimConfig {
    SimConfig { pages: PAGES, chunk: 64, freeing: vec![(Duration::ZERO, PageRange::new(1000, 1024))], ..<_>::default() }
}

/// A guest that takes pages back and frees others all the time: every one of its pages is in either
/// state many times, in the middle of rounds, between them, and between a harvest and the look at
/// what is free.
fn busy() -> SimConfig {
    let freeing = (0..40_000).map(|i| (Duration::from_micros(7 * i), PageRange::new(i * 61 % 1900, 40))).collect();
    let writes = (0..40_000).map(|i| (Duration::from_micros(7 * i + 3), PageRange::new(i * 89 % 1950, 23))).collect();
    let dirtying = Dirtying::Script(writes);
    let touching = Touching::Random { pages_per_second: 100_000.0 };
    SimConfig { freeing, dirtying, touching, downtime_limit: ms(20), timeout: Some(ms(200)), ..half_free() }
}

#[test]
fn free_pages_do_not_travel() {
    for (which, mut strategy) in strategies().into_iter().enumerate() {
        let mut sim = Simulation::new(half_free());
        let attempt = sim.attempt(&mut *strategy);
        assert!(attempt.error.is_none(), "{which}: {:?}", attempt.error);
        assert_eq!(sim.broken(), &[] as &[String], "{which}");
        assert_eq!(sim.owner(), Owner::Destination);
        assert!(attempt.skipped >= 1024, "{which}: {attempt:?}");
        // 1024 pages and the one that saving the state dirties
        assert!(attempt.rounds.iter().sum::<u64>() <= 1026, "{which}: {attempt:?}");
        let all = Simulation::new(SimConfig { freeing: Vec::new(), ..half_free() }).attempt(&mut *strategy);
        assert_eq!(all.skipped, 0);
        assert!(attempt.total < all.total * 6 / 10, "{which}: {:?} against {:?}", attempt.total, all.total);
    }
}

#[test]
fn pages_that_are_taken_back_arrive() {
    for (which, mut strategy) in strategies().into_iter().enumerate() {
        let mut sim = Simulation::new(SimConfig { stop_on_timeout: true, ..busy() });
        let attempt = sim.attempt(&mut *strategy);
        assert!(attempt.error.is_none(), "{which}: {:?}", attempt.error);
        assert!(attempt.skipped > 0, "{which}: {attempt:?}");
        assert_eq!(sim.broken(), &[] as &[String], "{which}");
    }
}

/// Pages that were owed and became free are not owed any more, wherever the link was lost.
#[test]
fn a_lost_link_loses_no_page() {
    for (which, mut strategy) in strategies().into_iter().enumerate() {
        for cut in (1..400).step_by(9) {
            let mut sim = Simulation::new(SimConfig { stop_on_timeout: true, cuts: vec![cut], ..busy() });
            for _ in 0..3 {
                let attempt = sim.attempt(&mut *strategy);
                assert_eq!(sim.broken(), &[] as &[String], "{which}, cut after {cut}");
                if sim.owner() == Owner::Destination {
                    break;
                }
                assert!(attempt.error.is_some() && sim.guest_runs());
            }
            assert_eq!(sim.owner(), Owner::Destination, "{which}, cut after {cut}");
        }
    }
}
