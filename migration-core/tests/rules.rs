//! The numbered rules of the design, as far as the simulator can show them: one test for each,
//! named after it. The model in `tests/model` explores the same rules completely, with stores,
//! evictions and further hosts.

use std::time::Duration;

use migration_core::{
    MigrationError, PageRange, PageSet,
    page_map::{LocatedRun, Location, MapError, PageMap, StoreCopy},
    sim::{Attempt, Dirtying, FaultAt, Owner, SimConfig, Simulation, StoreConfig, StoreFault, Touching},
    strategy::{Destination, Done, Finish, Linear, Place, PostCopy, QuickEviction, Running, ScatterGather, Strategy},
};

const PAGES: u64 = 4096;

fn world() -> SimConfig {
    let dirtying = Dirtying::Rate { pages_per_second: 20_000.0, working_set: 500 };
    SimConfig { pages: PAGES, dirtying, ..SimConfig::default() }
}

fn moved(sim: &Simulation) {
    assert_eq!((sim.owner(), sim.broken()), (Owner::Destination, &[] as &[String]));
}

/// Runs a closure as a strategy.
struct Script<F>(F);

impl<F: FnMut(Running<'_>) -> Result<Done, MigrationError> + Send> Strategy for Script<F> {
    fn name(&self) -> &'static str {
        "script"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError> {
        (self.0)(vm)
    }
}

/// A demand for a page that was claimed for a push is answered by that push, and a page whose push
/// was lost can be claimed again.
#[test]
fn rule_1_a_failed_send_leaves_a_page_that_can_be_claimed() {
    let mut map = PageMap::new(PAGES);
    map.leave_behind(&PageSet::full(PAGES)).unwrap();
    map.claim(PageRange::new(10, 5)).unwrap();
    assert_eq!(map.claim_block(12, 1), [], "somebody sends it already");
    map.unclaim(PageRange::new(10, 5)).unwrap();
    assert_eq!(map.claim_block(12, 1), [PageRange::new(12, 1)]);
    // with the link cut after any action of post-copy, all pages arrive
    let touching = Touching::Random { pages_per_second: 50_000.0 };
    for cut in (40..200).step_by(7) {
        let mut sim = Simulation::new(SimConfig { pages: 512, chunk: 8, touching, cuts: vec![cut], ..world() });
        let attempt = sim.attempt(&mut PostCopy { order: Box::new(Linear::default()) });
        if attempt.error.is_some() {
            assert!(sim.attempt(&mut PostCopy { order: Box::new(Linear::default()) }).error.is_none());
        }
        moved(&sim);
    }
}

/// A page is claimed before it is installed, so a second copy never replaces a page that has
/// arrived.
#[test]
fn rule_2_a_late_copy_changes_nothing() {
    let mut map = PageMap::new(PAGES);
    map.leave_behind(&PageSet::full(PAGES)).unwrap();
    let page = PageRange::new(7, 1);
    map.claim(page).unwrap();
    assert_eq!(map.claim(page), Err(MapError::NotFree(7)), "a second copy while the first is installed");
    map.arrived(page).unwrap();
    assert_eq!(map.claim(page), Err(MapError::NotFree(7)), "a second copy behind the first");
    assert_eq!(map.location(7), Location::Here);
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(first, count)
}

fn copy(entry: u8, generation: u32) -> StoreCopy {
    StoreCopy { entry, generation }
}

/// The map of a source that has left everything behind, and has put pages 100 to 149 into entry 0.
fn half_put() -> PageMap {
    let mut map = PageMap::new(PAGES);
    map.leave_behind(&PageSet::full(PAGES)).unwrap();
    map.put_started(range(100, 50), copy(0, 1)).unwrap();
    assert_eq!(map.put_done(range(100, 50), copy(0, 1)), [range(100, 50)]);
    map
}

/// The source answers for every page that it holds: for one that is being put, and for one that a
/// store has.
#[test]
fn rule_1_a_demand_is_answered_whatever_a_store_has() {
    let mut map = half_put();
    map.put_started(range(200, 10), copy(0, 2)).unwrap();
    assert_eq!(map.claim_block(105, 1), [range(105, 1)]);
    assert_eq!(map.claim_block(205, 1), [range(205, 1)]);
    assert_eq!(map.claim_block(205, 1), [], "it was sent");
    // the put goes on without that page (rule 10)
    assert_eq!(map.put_done(range(200, 10), copy(0, 2)), [range(200, 5), range(206, 4)]);
}

/// An acknowledgement counts only for the generation for which the page is still claimed.
#[test]
fn rule_10_an_acknowledgement_counts_for_its_claim() {
    let mut map = PageMap::new(PAGES);
    map.dirtied(&PageSet::full(PAGES)).unwrap();
    map.put_started(range(0, 10), copy(0, 1)).unwrap();
    let mut written = PageSet::empty(PAGES);
    written.insert(4);
    map.dirtied(&written).unwrap();
    assert_eq!(map.put_done(range(0, 10), copy(0, 2)), [], "of another generation");
    assert_eq!(map.put_done(range(0, 10), copy(0, 1)), [range(0, 4), range(5, 5)]);
    assert!(map.unsent().contains(4) && !map.unsent().contains(5));
}

/// When an entry has lost pages, those that the source holds come from there.
#[test]
fn rule_13_pages_of_a_lost_entry_are_at_the_source_again() {
    let mut map = half_put();
    assert_eq!(map.location(120), Location::Store(copy(0, 1)));
    assert_eq!(map.entry_lost(0).at_source.len(), 50);
    assert_eq!((map.location(120), map.unclaimed().contains(120)), (Location::Source, true));
    assert_eq!(map.put_started(range(100, 1), copy(0, 2)), Err(MapError::EntryLost(0)));
    // at a destination, what was said before the loss changes nothing
    let mut map = PageMap::new(PAGES);
    map.leave_behind(&PageSet::full(PAGES)).unwrap();
    map.entry_lost(0);
    assert_eq!(map.located(range(7, 1), copy(0, 1), true), []);
    assert_eq!(map.location(7), Location::Source);
}

/// Only the difference between what was announced and the map is said.
#[test]
fn rule_16_the_difference_is_announced() {
    let mut map = half_put();
    let run = |first, count| LocatedRun { pages: range(first, count), copy: copy(0, 1), held: true };
    assert_eq!(map.located_runs(map.unannounced()), [run(100, 50)]);
    let mut said = PageSet::empty(PAGES);
    said.insert_range(range(100, 20));
    map.announced(&said);
    assert_eq!(map.located_runs(map.unannounced()), [run(120, 30)]);
    // after a cut the destination lists what it takes to be at the source
    let mut lacking = PageSet::full(PAGES);
    lacking.remove_range(range(100, 20));
    map.lacking(&lacking).unwrap();
    assert_eq!(map.unannounced().len(), 30);
}

/// The source is released only when no page is there alone; nobody asks it afterwards.
#[test]
fn rule_17_no_page_is_at_the_source_when_it_is_released() {
    let mut map = PageMap::new(PAGES);
    let mut left = PageSet::empty(PAGES);
    left.insert_range(range(10, 5));
    map.located(range(100, 50), copy(3, 1), true);
    map.leave_behind(&left).unwrap();
    assert_eq!((map.depends_on(), map.released()), (vec![3], Err(MapError::AtSource(10))));
    map.claim(range(10, 5)).unwrap();
    map.arrived(range(10, 5)).unwrap();
    map.released().unwrap();
    assert_eq!((map.depends_on(), map.is_held(120)), (vec![], false));
    // a loss afterwards gives the source nothing back
    let loss = map.entry_lost(3);
    assert_eq!((loss.at_source.len(), loss.only_there.len(), map.missing().len()), (0, 50, 50));
}

/// What a script forgets is missing or sent, never zero.
#[test]
fn rule_4_what_a_script_forgets_is_missing_and_never_zero() {
    let mut half = Script(|mut vm: Running<'_>| {
        let mut pages = vm.start_tracking()?;
        pages.remove_range(PageRange::new(0, PAGES / 2));
        vm.send(&pages)?;
        let vm = vm.pause()?;
        let nothing = vm.no_pages();
        vm.hand_over(nothing)?.serve(&mut Linear::default())
    });
    let mut sim = Simulation::new(world());
    assert!(sim.attempt(&mut half).error.is_none());
    moved(&sim);
    let mut nothing = Script(|mut vm: Running<'_>| {
        vm.start_tracking()?;
        let mut vm = vm.pause()?;
        let none = vm.no_pages();
        vm.send_rest(none)?;
        let none = vm.no_pages();
        Ok(vm.hand_over(none)?.finish()?)
    });
    let mut sim = Simulation::new(world());
    let attempt = sim.attempt(&mut nothing);
    assert!(attempt.error.is_none() && attempt.rounds == [PAGES], "{attempt:?}");
    moved(&sim);
}

/// That a page is free is a look: a page that the guest takes back between two rounds is sent.
#[test]
fn rule_5_free_is_a_look() {
    let ms = Duration::from_millis;
    let freeing = vec![(ms(0), PageRange::new(0, 1000)), (ms(40), PageRange::new(500, 1000))];
    let dirtying = Dirtying::Script((1..20).map(|n| (ms(5 * n), PageRange::new(50 * n, 60))).collect());
    let mut thrice = Script(|mut vm: Running<'_>| {
        let mut pages = vm.start_tracking()?;
        for _ in 0..3 {
            vm.send(&pages)?;
            pages = vm.harvest()?;
        }
        vm.pause()?.hand_over(pages)?.serve(&mut Linear::default())
    });
    let mut sim = Simulation::new(SimConfig { freeing, dirtying, ..world() });
    let attempt = sim.attempt(&mut thrice);
    assert!(attempt.error.is_none() && attempt.skipped > 0, "{attempt:?}");
    moved(&sim);
}

/// After a cut the destination lists what it lacks. A list that cannot be is an error, and changes
/// nothing.
#[test]
fn rule_18_the_list_after_a_cut_is_checked() {
    let mut map = PageMap::new(PAGES);
    let mut left = PageSet::empty(PAGES);
    left.insert_range(PageRange::new(100, 50));
    map.leave_behind(&left).unwrap();
    map.claim(PageRange::new(100, 20)).unwrap();
    // it cannot have pages that were never sent, and cannot lack others than those that were left
    // behind
    assert_eq!(map.lacking(&PageSet::empty(PAGES)), Err(MapError::NeverSent(120)));
    assert_eq!(map.lacking(&PageSet::full(PAGES)), Err(MapError::NotLeftBehind(0)));
    assert_eq!((map.missing().len(), map.unclaimed().len()), (50, 30));
    left.remove_range(PageRange::new(100, 5));
    map.lacking(&left).unwrap();
    assert_eq!((map.location(104), map.location(105)), (Location::Here, Location::Source));
    assert_eq!(map.unclaimed().len(), 45, "what was under way is sent again");
}

/// An attempt that fails before the hand-over gives everything back.
#[test]
fn rule_18_before_run_everything_counts_as_neither() {
    let mut map = PageMap::new(PAGES);
    map.dirtied(&PageSet::full(PAGES)).unwrap();
    map.acknowledged(&PageSet::full(PAGES)).unwrap();
    let mut left = PageSet::empty(PAGES);
    left.insert_range(PageRange::new(0, 9));
    map.leave_behind(&left).unwrap();
    assert_eq!(map.dirtied(&left), Err(MapError::LeftBehind(0)), "the guest runs elsewhere");
    map.taken_back();
    assert_eq!((map.location(0), map.unsent().len()), (Location::Here, 9));
}

/// A strategy that needs a store is refused before anything is done.
#[test]
fn a_migration_refuses_a_snapshot() {
    let mut sim = Simulation::new(world());
    let attempt = sim.attempt(&mut <migration_core::strategy::Snapshot>::default());
    assert!(attempt.error.unwrap().to_string().contains("snapshot puts pages into a store"));
    assert_eq!((sim.owner(), attempt.rounds.len(), attempt.downtime), (Owner::Source, 0, None));
}

// ---- pages in stores
// -----------------------------------------------------------------------------

fn staged(stores: &[&str]) -> QuickEviction {
    QuickEviction {
        stage: Place::stage(stores.iter().copied()),
        interval: Duration::from_millis(20),
        threshold: 1,
        most: PAGES,
        finish: Finish::PostCopy,
        order: Box::new(Linear::default()),
    }
}

fn with_stores(names: &[&str]) -> SimConfig {
    SimConfig { stores: names.iter().map(|&name| StoreConfig::named(name)).collect(), ..world() }
}

/// Runs a strategy that gets its command after half a second.
fn commanded(sim: &mut Simulation, strategy: &mut dyn Strategy) -> Attempt {
    sim.command(Duration::from_millis(500), Destination::named("destination"));
    sim.attempt(strategy)
}

/// A reader asks the next store of the entry when one has lost the page.
#[test]
fn rule_12_a_page_in_two_stores_survives_the_loss_of_one() {
    for (stores, lost) in [(&["a", "b"][..], false), (&["a"][..], true)] {
        let mut sim = Simulation::new(with_stores(&["a", "b"]));
        let attempt = commanded(&mut sim, &mut staged(stores));
        assert!(attempt.error.is_none() && sim.missing() > PAGES / 2, "{attempt:?}");
        sim.store_fault("a", StoreFault::LosesContent);
        assert_eq!(sim.gather(Duration::from_secs(10)) > 0, lost, "{stores:?}");
        moved(&sim);
    }
}

/// An attempt that fails before *run* forgets what it has put into stores, and nothing else.
#[test]
fn rule_14_a_failed_attempt_forgets_its_own_namespaces_only() {
    let idle = SimConfig { failing_loads: 1, dirtying: Dirtying::Idle, ..with_stores(&["a", "b"]) };
    let mut sim = Simulation::new(idle);
    let attempt = commanded(&mut sim, &mut staged(&["a"]));
    assert!(attempt.error.is_some() && attempt.put >= PAGES, "{attempt:?}");
    assert_eq!((sim.owner(), sim.namespaces()), (Owner::Source, 1));
    // it starts again with what is staged
    let attempt = commanded(&mut sim, &mut staged(&["a"]));
    assert!(attempt.error.is_none() && attempt.put <= 2, "{attempt:?}");
    assert_eq!(sim.gather(Duration::from_secs(10)), 0);
    assert_eq!(sim.namespaces(), 0, "the last owner forgets what it has taken over");
    moved(&sim);

    let mut sim = Simulation::new(SimConfig { failing_loads: 1, ..with_stores(&["a", "b"]) });
    let mut scatter = ScatterGather::new(["a", "b"], Linear::default());
    assert!(sim.attempt(&mut scatter).error.is_some());
    assert_eq!((sim.owner(), sim.namespaces()), (Owner::Source, 0));
}

/// The pause is as long with a store that takes a second to answer, or does not answer, as without
/// one.
#[test]
fn rule_20_the_pause_never_waits_for_a_store() {
    let downtime = |config: SimConfig| {
        let mut sim = Simulation::new(config);
        let attempt = commanded(&mut sim, &mut staged(&["a"]));
        assert!(attempt.error.is_none(), "{attempt:?}");
        moved(&sim);
        attempt.downtime.unwrap()
    };
    let usual = downtime(with_stores(&["a"]));
    let slow = StoreConfig { latency: Duration::from_millis(500), ..StoreConfig::named("a") };
    let fails = FaultAt { action: 40, store: "a".into(), fault: StoreFault::Fails };
    for config in
        [SimConfig { stores: vec![slow], ..world() }, SimConfig { store_faults: vec![fails], ..with_stores(&["a"]) }]
    {
        let downtime = downtime(config);
        assert!(downtime < usual + Duration::from_millis(5), "{downtime:?} against {usual:?}");
    }
}

/// No page is evicted while a VM is tracked.
#[test]
fn rule_22_no_page_is_evicted_during_a_migration() {
    let mut sim = Simulation::new(SimConfig { failing_loads: 1, ..with_stores(&["a"]) });
    assert_eq!(sim.evict(PageRange::new(1000, 100), &["a"]).unwrap(), 100);
    assert!(commanded(&mut sim, &mut staged(&["a"])).error.is_some());
    // it is still staged
    assert!(sim.is_tracking());
    assert!(sim.evict(PageRange::new(2000, 100), &["a"]).is_err());
}
