//! The table of ownership: the link is cut after every single action, once and twice, and nothing
//! is ever lost.

use std::time::Duration;

use migration_core::{
    PageRange,
    protocol::DestinationPhase,
    sim::{Dirtying, Owner, SimConfig, Simulation, Touching},
    strategy::{HandOver, Hybrid, Linear, PostCopy, PreCopy, StopAndCopy, Strategy},
};

fn config(cuts: Vec<u64>) -> SimConfig {
    SimConfig {
        pages: 2048,
        chunk: 256,
        dirtying: Dirtying::Script(
            (1..40).map(|i| (Duration::from_millis(3 * i), PageRange::new(i * 37 % 2000, 48))).collect(),
        ),
        touching: Touching::Random { pages_per_second: 100_000.0 },
        cuts,
        ..SimConfig::default()
    }
}

fn strategies() -> Vec<Box<dyn Strategy>> {
    vec![
        Box::new(<PreCopy>::default()),
        Box::new(StopAndCopy),
        Box::new(PostCopy { order: Box::new(Linear::default()) }),
        Box::new(Hybrid { rounds: 1, order: Box::new(Linear::default()) }),
        Box::new(HandOver),
    ]
}

/// Runs attempts until the destination has the VM; checks what must hold after each.
fn settle(mut sim: Simulation, what: &str, which: usize) {
    for _ in 0..4 {
        let attempt = sim.attempt(&mut *strategies()[which]);
        assert_eq!(sim.broken(), &[] as &[String], "{what}");
        assert!(sim.guest_runs(), "{what}: nobody runs the guest");
        match sim.owner() {
            Owner::Destination => return assert!(attempt.error.is_none(), "{what}: {:?}", attempt.error),
            Owner::Source => {
                assert!(attempt.error.is_some(), "{what}: an attempt that failed says why");
                assert_eq!(sim.throttle_in_force(), 0, "{what}");
                assert!(!sim.is_tracking(), "{what}");
            }
            Owner::InDoubt => panic!("{what}: the doubt was not resolved"),
        }
    }
    panic!("{what}: did not complete");
}

fn actions_without_a_cut(which: usize) -> u64 {
    let mut sim = Simulation::new(config(Vec::new()));
    let attempt = sim.attempt(&mut *strategies()[which]);
    assert!(attempt.error.is_none(), "{:?}", attempt.error);
    assert_eq!(sim.broken(), &[] as &[String]);
    sim.actions()
}

#[test]
fn cut_after_every_action() {
    for which in 0..strategies().len() {
        let actions = actions_without_a_cut(which);
        assert!(actions > 16);
        for cut in 1..=actions {
            settle(Simulation::new(config(vec![cut])), &format!("strategy {which}, cut after {cut}"), which);
        }
    }
}

#[test]
fn cut_after_every_pair_of_actions() {
    for which in 0..strategies().len() {
        let actions = actions_without_a_cut(which);
        // the second cut falls into the hand-over, the reconnect, or the next attempt
        for first in actions.saturating_sub(14)..=actions {
            for second in first + 1..first + 60 {
                let what = format!("strategy {which}, cuts after {first} and {second}");
                settle(Simulation::new(config(vec![first, second])), &what, which);
            }
        }
    }
}

#[test]
fn a_source_that_dies_leaves_a_vm_that_can_be_adopted_or_nothing_is_pretended() {
    let actions = actions_without_a_cut(0);
    let mut adopted = 0;
    for cut in 1..=actions {
        let mut sim = Simulation::new(config(vec![cut]));
        sim.attempt(&mut *strategies()[0]);
        let held = sim.destination_phase() == DestinationPhase::Ready;
        let ran = sim.owner() == Owner::Destination;
        sim.kill_source();
        let took = sim.force_take_over();
        assert_eq!(took, held, "cut after {cut}: only a complete VM can be adopted");
        adopted += u32::from(took);
        assert_eq!(sim.guest_runs(), ran || took);
    }
    assert!(adopted > 0, "no cut left the destination ready");
}

#[test]
fn state_that_cannot_be_loaded_fails_k_times_then_succeeds() {
    for failing in 0..4 {
        let mut sim = Simulation::new(SimConfig { failing_loads: failing, ..config(Vec::new()) });
        for attempt in 0..=failing {
            let ended = sim.attempt(&mut *strategies()[0]);
            assert_eq!(ended.error.is_none(), attempt == failing, "{:?}", ended.error);
            assert!(sim.guest_runs());
            assert_eq!(sim.broken(), &[] as &[String]);
        }
    }
}

#[test]
fn a_guest_that_cannot_converge_is_throttled_or_left_where_it_is() {
    // 100,000 pages a second are 400 MB/s, over a link of 125 MB/s
    let dirtying = Dirtying::Rate { pages_per_second: 100_000.0, working_set: 60_000 };
    let limit = Duration::from_millis(100);
    let config = SimConfig { dirtying, downtime_limit: limit, ..SimConfig::default() };
    let mut sim = Simulation::new(config.clone());
    let attempt = sim.attempt(&mut <PreCopy>::default());
    assert!(attempt.error.is_none(), "{:?}", attempt.error);
    assert!(attempt.throttle_percent > 0);
    assert!(attempt.downtime.unwrap() <= limit, "{attempt:?}");

    let timeout = Some(Duration::from_secs(3));
    let unthrottled = SimConfig { timeout, downtime_limit: Duration::from_millis(4), ..config };
    let mut sim = Simulation::new(unthrottled.clone());
    let attempt = sim.attempt(&mut <PreCopy>::default());
    assert!(attempt.error.is_some_and(|e| e.to_string().contains("not converged in time")));
    assert_eq!((sim.owner(), sim.throttle_in_force()), (Owner::Source, 0));

    let mut sim = Simulation::new(SimConfig { stop_on_timeout: true, ..unthrottled });
    let attempt = sim.attempt(&mut <PreCopy>::default());
    assert!(attempt.error.is_none(), "{:?}", attempt.error);
    assert_eq!(sim.owner(), Owner::Destination);
}
