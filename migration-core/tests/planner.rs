//! The planner in the simulator: a migration ends, whatever the link and the guest, and its
//! predictions are those that come true.

use std::time::Duration;

use migration_core::{
    sim::{Attempt, Dirtying, Owner, SimConfig, Simulation},
    spawner::GuestImpact,
    strategy::PreCopy,
};
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);
/// More rounds than any pre-copy may have, the one in the pause included.
const MAX_ROUNDS: usize = 131;

fn run(config: SimConfig) -> (Attempt, Owner) {
    let mut sim = Simulation::new(config);
    let attempt = sim.attempt(&mut <PreCopy>::default());
    assert_eq!(sim.broken(), &[] as &[String]);
    assert!(sim.guest_runs());
    (attempt, sim.owner())
}

/// 15 MB of device state, which the destination takes 100 ms to load, over 1 Gbit/s.
fn large_state(limit: Duration) -> SimConfig {
    SimConfig {
        pages: 4096,
        state_bytes: 15_000_000,
        save_time: 20 * MS,
        load_time: 100 * MS,
        downtime_limit: limit,
        ..SimConfig::default()
    }
}

#[test]
fn the_downtime_of_a_vm_with_a_large_state_is_predicted() {
    let (attempt, owner) = run(large_state(500 * MS));
    assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
    let (predicted, actual) = (attempt.predicted_downtime.unwrap(), attempt.downtime.unwrap());
    // saving, loading, and 120 ms for the state on the link
    assert!(predicted >= 240 * MS, "{predicted:?}");
    let ratio = actual.as_secs_f64() / predicted.as_secs_f64();
    assert!((0.9..1.1).contains(&ratio), "predicted {predicted:?}, came {actual:?}");
    assert_eq!(attempt.throttle_percent, 0);
}

#[test]
fn a_limit_that_a_large_state_does_not_fit_into_is_what_the_user_decides() {
    let config = large_state(4 * MS);
    // what the VMMs say is enough to know it before any page moves
    let (attempt, owner) = run(config.clone());
    assert_eq!((owner, attempt.rounds.len(), attempt.downtime), (Owner::Source, 0, None));
    let why = attempt.error.unwrap().to_string();
    for word in ["a downtime of 4 ms cannot be kept", "15000000 bytes of state", "to pause, save and load"] {
        assert!(why.contains(word), "{why}: {word}");
    }
    let (attempt, owner) = run(SimConfig { stop_on_timeout: true, ..config.clone() });
    assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
    assert!(attempt.predicted_downtime >= Some(240 * MS) && attempt.stalled.is_some(), "{attempt:?}");
    let (attempt, owner) = run(SimConfig { post_copy_on_timeout: true, ..config });
    assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
    assert!(attempt.stalled.is_some_and(|why| why.contains("of 4 ms")));
}

#[test]
fn an_idle_guest_on_a_link_that_is_too_long_ends_after_a_few_rounds() {
    // two round trips of 400 ms, and one of 2 s
    for latency in [200 * MS, 1000 * MS] {
        let config = SimConfig { pages: 64, chunk: 64, latency, ..SimConfig::default() };
        let (attempt, owner) = run(config.clone());
        assert_eq!((owner, attempt.throttle_percent), (Owner::Source, 0));
        assert!(attempt.rounds.len() <= 5, "{:?}", attempt.rounds);
        let why = attempt.error.unwrap().to_string();
        assert!(why.contains("of 300 ms") && why.contains("two round trips"), "{why}");
        let (attempt, owner) = run(SimConfig { stop_on_timeout: true, ..config });
        assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
    }
}

#[test]
fn a_guest_that_never_converges_ends_without_a_time_out() {
    // at 80 % it still dirties all of RAM while it is sent
    let dirtying = Dirtying::Rate { pages_per_second: 1e7, working_set: 2048 };
    let impact = GuestImpact::Low;
    let config = SimConfig { pages: 2048, dirtying, impact, downtime_limit: 20 * MS, ..SimConfig::default() };
    let (attempt, owner) = run(config.clone());
    assert_eq!((owner, attempt.throttle_percent), (Owner::Source, 80));
    let why = attempt.error.unwrap().to_string();
    for word in ["not converging", "2048 pages", "of the 20 ms allowed", "throttled by 80 %"] {
        assert!(why.contains(word), "{why}: {word}");
    }
    for (stop_on_timeout, post_copy_on_timeout) in [(true, false), (false, true)] {
        let (attempt, owner) = run(SimConfig { stop_on_timeout, post_copy_on_timeout, ..config.clone() });
        assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
        assert!(attempt.stalled.is_some_and(|why| why.contains("not converging")));
    }
}

fn configs() -> impl Strategy<Value = SimConfig> {
    let link = (4.5..10.0f64, 0u64..6_000_000, 1u64..512);
    let guest = (1u64..2048, 0.0..7.0f64, 1u64..2048);
    let costs = (0usize..2_000_000, 0u64..50_000, 0u64..200_000);
    let impacts = prop_oneof![Just(GuestImpact::Low), Just(GuestImpact::Balanced), Just(GuestImpact::Fast)];
    let user = (prop_oneof![Just(0), 0u64..1000, 0u64..3_000_000], prop::option::of(0u64..60_000), impacts);
    let choice = prop_oneof![Just((false, false)), Just((true, false)), Just((false, true))];
    (link, guest, costs, user, choice).prop_map(|(link, guest, costs, user, choice)| SimConfig {
        bytes_per_second: 10f64.powf(link.0),
        // most links are short
        latency: Duration::from_micros(if link.1.is_multiple_of(4) { link.1 / 2 } else { link.1 % 2000 }),
        chunk: link.2,
        pages: guest.0,
        dirtying: Dirtying::Rate { pages_per_second: 10f64.powf(guest.1), working_set: guest.2 },
        state_bytes: costs.0,
        save_time: Duration::from_micros(costs.1),
        load_time: Duration::from_micros(costs.2),
        downtime_limit: Duration::from_micros(user.0),
        timeout: user.1.map(Duration::from_millis),
        impact: user.2,
        stop_on_timeout: choice.0,
        post_copy_on_timeout: choice.1,
        ..SimConfig::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_migration_ends_in_a_bounded_number_of_rounds(config in configs()) {
        let (attempt, owner) = run(config.clone());
        prop_assert!(attempt.rounds.len() <= MAX_ROUNDS, "{:?}", attempt.rounds);
        match &attempt.error {
            // a link without cuts: only the planner ends it
            Some(error) => {
                prop_assert_eq!(owner, Owner::Source);
                prop_assert!(!config.stop_on_timeout && !config.post_copy_on_timeout, "{}", error);
                prop_assert!(attempt.stalled.is_some() && error.to_string().contains("gave up"), "{}", error);
            }
            None => {
                prop_assert_eq!(owner, Owner::Destination);
                let within = attempt.predicted_downtime.is_none_or(|time| time <= config.downtime_limit);
                prop_assert!(within || config.stop_on_timeout && attempt.stalled.is_some(), "{:?}", attempt);
            }
        }
    }
}

#[test]
fn a_time_out_is_that_of_one_attempt() {
    // two seconds for all pages: the second attempt begins after two, and has as long as the first
    // one
    let timeout = Some(3000 * MS);
    let mut sim = Simulation::new(SimConfig { timeout, failing_loads: 1, ..SimConfig::default() });
    let attempts = [sim.attempt(&mut <PreCopy>::default()), sim.attempt(&mut <PreCopy>::default())];
    assert!(attempts[0].error.is_some() && attempts[0].total > 2000 * MS, "{attempts:?}");
    assert!(attempts[1].error.is_none(), "{attempts:?}");
    assert_eq!((sim.owner(), sim.broken()), (Owner::Destination, &[] as &[String]));
}

#[test]
fn a_round_ends_when_the_time_is_over() {
    let config = SimConfig { timeout: Some(1000 * MS), ..SimConfig::default() };
    let (attempt, owner) = run(config.clone());
    assert_eq!(owner, Owner::Source);
    assert!(attempt.rounds[0] < config.pages / 2 + config.chunk, "{attempt:?}");
    assert!(attempt.total < 1100 * MS, "{attempt:?}");
    // whoever chose to stop then has the rest in the pause
    let (attempt, owner) = run(SimConfig { stop_on_timeout: true, ..config.clone() });
    assert_eq!(owner, Owner::Destination, "{:?}", attempt.error);
    assert_eq!(attempt.rounds.iter().sum::<u64>(), config.pages, "{attempt:?}");
}
