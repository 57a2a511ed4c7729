//! Quick eviction, scatter-gather and agile in the simulator: with the link cut after every action,
//! with a store that fails or loses what it has after every action, and with random worlds. Nobody
//! ever reads an old page, or zeros for a page that is missing.

use std::time::Duration;

use migration_core::{
    MigrationError, PageRange,
    sim::{Dirtying, FaultAt, Owner, SimConfig, Simulation, StoreConfig, StoreFault, Touching},
    strategy::{
        Agile, Destination, Finish, HotFirst, Hybrid, Linear, Place, PostCopy, PreCopy, QuickEviction, ScatterGather,
        StopAndCopy, Strategy,
    },
};
use proptest::{prelude::*, strategy::Strategy as _};

const PAGES: u64 = 512;
const MS: Duration = Duration::from_millis(1);
/// More virtual time than any of these VMs needs to gather what is missing.
const LONG: Duration = Duration::from_secs(60);

/// The three systems, quick eviction with either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum System {
    QuickEviction(Finish),
    ScatterGather,
    Agile,
}

const SYSTEMS: [System; 4] = [
    System::QuickEviction(Finish::PostCopy),
    System::QuickEviction(Finish::Stop),
    System::ScatterGather,
    System::Agile,
];

impl System {
    fn strategy(self) -> Box<dyn Strategy> {
        match self {
            Self::QuickEviction(finish) => Box::new(QuickEviction {
                stage: Place::stage(["a"]),
                interval: 5 * MS,
                threshold: 16,
                most: 200,
                finish,
                order: Box::new(Linear::default()),
            }),
            Self::ScatterGather => Box::new(ScatterGather::new(["a", "b"], HotFirst::default())),
            Self::Agile => Box::new(Agile { order: Box::new(Linear::default()) }),
        }
    }
}

/// A slow destination, two stores, and a guest that writes and reads on either side.
fn world() -> SimConfig {
    SimConfig {
        pages: PAGES,
        bytes_per_second: 60e6,
        egress: Some(250e6),
        chunk: 32,
        dirtying: Dirtying::Rate { pages_per_second: 4_000.0, working_set: 100 },
        touching: Touching::Random { pages_per_second: 2_000.0 },
        stores: vec![StoreConfig::named("a"), StoreConfig::named("b")],
        destination: there(),
        ..SimConfig::default()
    }
}

fn there() -> Destination {
    Destination::named("host-2")
}

/// A VM at home. That of agile has cold pages in a store, unless the store failed meanwhile.
fn at_home(system: System, config: SimConfig) -> Simulation {
    let mut sim = Simulation::new(config);
    if system == System::Agile {
        let _ = sim.evict(PageRange::new(200, 250), &["a"]);
    }
    sim
}

/// Runs attempts until the destination has the VM. Checks what must hold after each.
fn move_it(sim: &mut Simulation, system: System, what: &str) {
    for _ in 0..5 {
        sim.command(20 * MS, there());
        let attempt = sim.attempt(&mut *system.strategy());
        assert_eq!(sim.broken(), &[] as &[String], "{what}");
        assert!(sim.guest_runs(), "{what}: nobody runs the guest");
        match sim.owner() {
            Owner::Destination => return assert!(attempt.error.is_none(), "{what}: {:?}", attempt.error),
            Owner::Source => assert!(attempt.error.is_some(), "{what}: an attempt that failed says why"),
            Owner::InDoubt => panic!("{what}: the doubt was not resolved"),
        }
    }
    panic!("{what}: did not complete");
}

/// The source is gone, and the destination gathers on. Returns how many pages stay missing.
fn gather(sim: &mut Simulation, what: &str) -> u64 {
    sim.kill_source();
    let missing = sim.gather(LONG);
    assert_eq!(sim.broken(), &[] as &[String], "{what}");
    missing
}

/// Returns the actions of a run without faults, up to the release and up to the end.
fn actions_of(system: System) -> (u64, u64) {
    let mut sim = at_home(system, world());
    move_it(&mut sim, system, "without a fault");
    let released = sim.actions();
    assert_eq!(gather(&mut sim, "without a fault"), 0);
    assert_eq!(sim.namespaces(), 0, "{system:?}: namespaces are left");
    (released, sim.actions())
}

#[test]
fn a_cut_after_any_action_loses_nothing() {
    for system in SYSTEMS {
        for cut in 1..=actions_of(system).0 {
            let what = format!("{system:?}, cut after {cut}");
            let mut sim = at_home(system, SimConfig { cuts: vec![cut], ..world() });
            move_it(&mut sim, system, &what);
            assert_eq!(gather(&mut sim, &what), 0, "{what}");
            assert_eq!(sim.namespaces(), 0, "{what}");
        }
    }
}

#[test]
fn two_cuts_lose_nothing() {
    for system in SYSTEMS {
        let released = actions_of(system).0;
        for first in (1..=released).step_by(3) {
            for second in (first + 1..first + 40).step_by(3) {
                let what = format!("{system:?}, cuts after {first} and {second}");
                let mut sim = at_home(system, SimConfig { cuts: vec![first, second], ..world() });
                move_it(&mut sim, system, &what);
                assert_eq!(gather(&mut sim, &what), 0, "{what}");
            }
        }
    }
}

fn fault(action: u64, fault: StoreFault) -> SimConfig {
    SimConfig { store_faults: vec![FaultAt { action, store: "a".into(), fault }], ..world() }
}

#[test]
fn a_store_that_fails_after_any_action_delays_only_pages_that_are_nowhere_else() {
    for system in SYSTEMS {
        for action in 1..=actions_of(system).1 {
            let what = format!("{system:?}, store a fails after {action}");
            let mut sim = at_home(system, fault(action, StoreFault::Fails));
            move_it(&mut sim, system, &what);
            let before = sim.checked_after().is_some_and(|checked| action <= checked);
            let missing = gather(&mut sim, &what);
            assert!(missing == 0 || system == System::Agile || !before, "{what}: {missing} pages are missing");
            sim.store_fault("a", StoreFault::Recovers);
            assert_eq!(sim.gather(LONG), 0, "{what}");
            assert_eq!(sim.broken(), &[] as &[String], "{what}");
        }
    }
}

#[test]
fn a_store_that_loses_its_content_before_the_release_costs_no_page_that_the_source_holds() {
    for system in SYSTEMS {
        for action in 1..=actions_of(system).1 {
            let what = format!("{system:?}, store a loses its content after {action}");
            let mut sim = at_home(system, fault(action, StoreFault::LosesContent));
            move_it(&mut sim, system, &what);
            let before = sim.checked_after().is_some_and(|checked| action <= checked);
            let missing = gather(&mut sim, &what);
            // what no RAM has is lost with the store: the guest waits for it, and reads no zeros
            assert!(missing == 0 || system == System::Agile || !before, "{what}: {missing} pages are missing");
        }
    }
}

#[test]
fn quick_eviction_moves_what_is_not_staged_when_the_command_comes() {
    let config = SimConfig { bytes_per_second: 20e6, pages: 8192, chunk: 256, ..world() };
    let mut sim = Simulation::new(config.clone());
    sim.command(1000 * MS, Destination::named("nowhere"));
    sim.command(2000 * MS, there());
    let mut quick = QuickEviction {
        stage: Place::stage(["a"]),
        interval: 50 * MS,
        threshold: 64,
        most: 4096,
        finish: Finish::PostCopy,
        order: Box::new(Linear::default()),
    };
    let attempt = sim.attempt(&mut quick);
    assert!(attempt.error.is_none(), "{attempt:?}");
    assert!(attempt.reported.iter().any(|why| why.contains("nowhere")), "{attempt:?}");
    let hybrid = Simulation::new(config).attempt(&mut Hybrid { rounds: 1, order: Box::new(Linear::default()) });
    let evicted = attempt.since_command.unwrap();
    assert!(evicted < hybrid.total / 10, "{evicted:?} against {:?}", hybrid.total);
    assert!(attempt.downtime.unwrap() < 20 * MS, "{attempt:?}");
    assert!(sim.missing() > 4000, "most pages are in the store");
    assert_eq!(gather(&mut sim, "quick eviction"), 0);
}

#[test]
fn scatter_gather_frees_the_source_whatever_the_destination_takes() {
    let eviction = |bytes_per_second| {
        let config = SimConfig { bytes_per_second, pages: 8192, chunk: 256, ..world() };
        let post = Simulation::new(config.clone()).attempt(&mut PostCopy { order: Box::new(Linear::default()) });
        let mut sim = Simulation::new(config);
        let scatter = sim.attempt(&mut *System::ScatterGather.strategy());
        assert!(scatter.error.is_none() && scatter.put > 0, "{scatter:?}");
        assert_eq!(gather(&mut sim, "scatter-gather"), 0);
        (scatter.total, post.total)
    };
    let [(fast, fast_post), (slow, slow_post)] = [60e6, 6e6].map(eviction);
    assert!(slow_post > 5 * fast_post, "{slow_post:?} against {fast_post:?}");
    assert!(slow < 2 * fast && slow < slow_post / 10, "{slow:?} against {fast:?}");
}

#[test]
fn agile_moves_the_working_set_and_reads_cold_pages_where_they_are() {
    let config = SimConfig { pages: 8192, chunk: 256, ..world() };
    let mut sim = Simulation::new(config.clone());
    let cold = sim.evict(PageRange::new(1000, 7000), &["b"]).unwrap();
    assert!(cold > 6900, "{cold}");
    let agile = sim.attempt(&mut *System::Agile.strategy());
    assert!(agile.error.is_none() && agile.put == 0, "{agile:?}");
    let hybrid = Simulation::new(config).attempt(&mut Hybrid { rounds: 1, order: Box::new(Linear::default()) });
    assert!(agile.total < hybrid.total / 4, "{:?} against {:?}", agile.total, hybrid.total);
    assert_eq!(gather(&mut sim, "agile"), 0);
}

/// Strategies that do not keep pages in stores read them and send them, before the pause.
#[test]
fn what_is_in_a_store_is_read_and_sent_by_strategies_that_do_not_keep_it_there() {
    for strategy in [&mut <PreCopy>::default() as &mut dyn Strategy, &mut StopAndCopy] {
        let mut sim = at_home(System::Agile, world());
        let attempt = sim.attempt(strategy);
        assert!(attempt.error.is_none(), "{attempt:?}");
        assert_eq!((sim.missing(), sim.broken()), (0, &[] as &[String]));

        // a store that fails: the pause does not begin, and another strategy can move the VM
        let mut sim = at_home(System::Agile, world());
        sim.store_fault("a", StoreFault::Fails);
        let attempt = sim.attempt(strategy);
        assert!(matches!(attempt.error, Some(MigrationError::PageStore { .. })), "{attempt:?}");
        assert_eq!((attempt.downtime, sim.owner()), (None, Owner::Source));
        move_it(&mut sim, System::Agile, "after a failed fetch");
        sim.store_fault("a", StoreFault::Recovers);
        assert_eq!(gather(&mut sim, "after a failed fetch"), 0);
    }
}

#[test]
fn a_strategy_that_would_lose_stored_pages_and_a_store_that_does_not_exist_are_refused() {
    let mut sim = at_home(System::Agile, world());
    let attempt = sim.attempt(&mut PostCopy { order: Box::new(Linear::default()) });
    assert!(attempt.error.unwrap().to_string().contains("pages are in stores"));
    let attempt = sim.attempt(&mut ScatterGather::new(["c"], Linear::default()));
    assert!(attempt.error.unwrap().to_string().contains("no page store c"));
    assert_eq!((sim.owner(), attempt.rounds.len()), (Owner::Source, 0));
}

/// Rule 19: a source that dies after it has located everything is no loss.
#[test]
fn a_source_that_dies_while_no_page_is_only_there_is_not_needed() {
    let mut released = 0;
    let system = System::ScatterGather;
    for cut in 1..=actions_of(system).0 {
        let mut sim = Simulation::new(SimConfig { dies_after: Some(cut), ..world() });
        sim.attempt(&mut *system.strategy());
        sim.kill_source();
        if sim.release_by_hand() {
            released += 1;
            assert_eq!(sim.gather(LONG), 0, "dead after {cut}");
        }
        assert_eq!(sim.broken(), &[] as &[String], "dead after {cut}");
    }
    assert!(released > 0);
}

/// Random worlds.
fn worlds() -> impl proptest::strategy::Strategy<Value = SimConfig> {
    let link = (1e6..3e8f64, 0u64..3_000, prop::option::of(1e6..6e8f64), 1u64..200);
    let guest = (8u64..700, 0.0..30_000f64, 1u64..700, 0.0..20_000f64);
    let store = (1e6..5e8f64, 0u64..3_000, prop_oneof![Just(1u64 << 30), 1u64..400]);
    let stores = prop::collection::vec(store, 2);
    let cuts = prop::collection::vec(1u64..400, 0..4);
    let kind = prop_oneof![Just(StoreFault::Fails), Just(StoreFault::LosesContent), Just(StoreFault::Recovers)];
    let faults = prop::collection::vec((1u64..400, any::<bool>(), kind), 0..4);
    (link, guest, stores, cuts, faults, 0u32..2).prop_map(|(link, guest, stores, cuts, faults, failing_loads)| {
        let name = |second| if second { "b" } else { "a" }.to_owned();
        let stores = stores.into_iter().zip([false, true]).map(|((bytes_per_second, latency, pages), second)| {
            StoreConfig { name: name(second), bytes_per_second, latency: Duration::from_micros(latency), pages }
        });
        let at = |(action, second, fault)| FaultAt { action, store: name(second), fault };
        SimConfig {
            pages: guest.0,
            bytes_per_second: link.0,
            latency: Duration::from_micros(link.1),
            egress: link.2.map(|egress| egress.max(link.0)),
            chunk: link.3,
            dirtying: Dirtying::Rate { pages_per_second: guest.1, working_set: guest.2 },
            touching: Touching::Random { pages_per_second: guest.3 },
            stores: stores.collect(),
            store_faults: faults.into_iter().map(at).collect(),
            cuts,
            failing_loads,
            destination: there(),
            ..SimConfig::default()
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The properties of `docs/model.md`: no wrong content, none lost that a rule protects, one
    /// owner, not stuck, nothing left over.
    #[test]
    fn no_world_breaks_a_property(
        config in worlds(),
        system in prop::sample::select(&SYSTEMS[..]),
        cold in (0u64..700, 0u64..700),
    ) {
        let mut sim = Simulation::new(config.clone());
        // any VM may have cold pages at home
        let _ = sim.evict(PageRange::new(cold.0, cold.1), &["b"]);
        let mut moved = false;
        for _ in 0..8 {
            sim.command(15 * MS, there());
            let attempt = sim.attempt(&mut *system.strategy());
            prop_assert_eq!(sim.broken(), &[] as &[String]);
            prop_assert!(sim.guest_runs());
            moved = sim.owner() == Owner::Destination;
            prop_assert_eq!(moved, attempt.error.is_none(), "{:?}", attempt);
            if moved {
                break;
            }
        }
        prop_assert!(moved, "eight attempts, and at most six faults");
        sim.kill_source();
        sim.gather(LONG);
        ["a", "b"].iter().for_each(|store| sim.store_fault(store, StoreFault::Recovers));
        let missing = sim.gather(LONG);
        prop_assert_eq!(sim.broken(), &[] as &[String]);
        let lost = config.store_faults.iter().any(|at| at.fault == StoreFault::LosesContent);
        prop_assert!(missing == 0 || lost, "{} pages are missing, and no store has lost any", missing);
    }
}

/// What an engine asks of a strategy before it begins.
#[test]
fn the_systems_say_what_they_need() {
    let names = SYSTEMS.map(|system| system.strategy().name());
    assert_eq!(names, ["quick-eviction", "quick-eviction", "scatter-gather", "agile"]);
    for system in SYSTEMS {
        let strategy = system.strategy();
        assert!(strategy.needs_post_copy(), "{system:?}");
        assert_eq!(strategy.connects_itself(), matches!(system, System::QuickEviction(_)));
        assert_eq!(strategy.stores().is_empty(), system == System::Agile, "{system:?}");
    }
}
