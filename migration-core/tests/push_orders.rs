//! What holds of every push order, and how many faults each one leaves to the guest.

use migration_core::{
    PageRange, PageSet,
    engine::STRIPE_PAGES,
    sim::{Owner, SimConfig, Simulation},
    strategy::{
        PostCopy, PushOrder,
        push_order::{Direction, KnownOrder},
    },
};
use proptest::prelude::*;

fn orders() -> impl Strategy<Value = KnownOrder> {
    let direction = prop_oneof![Just(Direction::Dual), Just(Direction::Forward), Just(Direction::Backward)];
    prop_oneof![
        Just(KnownOrder::Linear),
        Just(KnownOrder::Bubbling),
        Just(KnownOrder::HotFirst),
        (1usize..9, direction).prop_map(|(k, direction)| KnownOrder::MultiPivot { k, direction }),
        any::<u64>().prop_map(|seed| KnownOrder::Random { seed }),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest touches a page (modulo their number); if it was not sent yet, it is sent now.
    Touch(u64),
    Push {
        most: u64,
    },
    /// A page that was sent is to be sent again: its lane was lost.
    Lost(u64),
}

fn steps(losses: u32) -> impl Strategy<Value = Vec<Step>> {
    let most = || prop_oneof![1u64..20, Just(512), 1u64..3000];
    let step = prop_oneof![
        4 => any::<u64>().prop_map(Step::Touch),
        4 => most().prop_map(|most| Step::Push { most }),
        losses => any::<u64>().prop_map(Step::Lost),
    ];
    prop::collection::vec(step, 0..200)
}

/// Migrates by these steps, then to the end; checks what every order promises.
fn migrate(kind: KnownOrder, pages: u64, holes: &[(u64, u64)], heat: &[u8], steps: Vec<Step>, begin: bool) {
    let mut unsent = PageSet::full(pages);
    for &(first, count) in holes {
        unsent.remove_range(PageRange::new(first, count));
    }
    let mut order = kind.build();
    if begin {
        order.begin(&unsent, heat);
    }
    let push = |order: &mut Box<dyn PushOrder>, unsent: &mut PageSet, most: u64| {
        let Some(run) = order.next(unsent, most) else {
            assert!(unsent.is_empty(), "{kind}: ended with {unsent:?}");
            return false;
        };
        assert!((1..=most).contains(&run.count), "{kind}: {run:?} where {most} were asked for");
        assert_eq!(unsent.count_in(run), run.count, "{kind}: {run:?} was not all unsent");
        assert_eq!(run.first / STRIPE_PAGES, (run.end() - 1) / STRIPE_PAGES, "{kind}: {run:?} crosses stripes");
        unsent.remove_range(run);
        true
    };
    for step in steps {
        match step {
            Step::Touch(page) => {
                if unsent.remove(page % pages) || page % 7 == 0 {
                    // now and then for a page in flight, as well
                    order.fault(page % pages);
                }
            }
            Step::Push { most } => {
                push(&mut order, &mut unsent, most);
            }
            Step::Lost(page) => {
                unsent.insert(page % pages);
            }
        }
    }
    while push(&mut order, &mut unsent, 64) {}
}

proptest! {
    #[test]
    fn every_page_is_sent_once(
        kind in orders(),
        pages in prop_oneof![1u64..70, 1u64..20_000],
        holes in prop::collection::vec((0u64..20_000, 0u64..5_000), 0..5),
        heat in prop_oneof![Just(vec![]), prop::collection::vec(0u8..6, 0..20_000)],
        steps in steps(0),
        begin in any::<bool>(),
    ) {
        migrate(kind, pages, &holes, &heat, steps, begin);
    }

    #[test]
    fn pages_that_come_back_are_sent_again(kind in orders(), pages in 1u64..20_000, steps in steps(2)) {
        migrate(kind, pages, &[], &[3; 500], steps, true);
    }
}

/// A guest that reads these pages one after the other, while `budget` pages are pushed for each of
/// its reads: the faults that have to go over the network. A page is there as soon as it is pushed:
/// a link without latency, so the figures compare orders, and foretell nothing.
fn network_faults(kind: &str, pages: u64, reads: impl Iterator<Item = u64>, budget: u64) -> u64 {
    let mut unsent = PageSet::full(pages);
    let mut order = migration_core::strategy::push_order::parse(kind).unwrap();
    order.begin(&unsent, &[]);
    let mut faults = 0;
    for page in reads {
        if unsent.remove(page) {
            order.fault(page);
            faults += 1;
        }
        let mut left = budget;
        while left > 0 {
            let Some(run) = order.next(&unsent, left) else { return faults };
            unsent.remove_range(run);
            left -= run.count;
        }
    }
    faults
}

/// 32 processes with a region each, all scanned in turns: the papers' quicksort (32 of 16 MB).
fn interleaved(regions: u64, region: u64) -> impl Iterator<Item = u64> {
    (0..region).flat_map(move |page| (0..regions).map(move |r| r * region + page))
}

#[test]
fn pivots_follow_a_sequential_reader() {
    let pages = 32 * 4096;
    // from the middle of RAM to its end, then from its beginning
    let reads = || pages / 2..pages;
    for budget in [2, 4, 8] {
        let faults = |kind| network_faults(kind, pages, reads().chain(0..pages / 2), budget);
        let [linear, random] = ["linear", "random"].map(faults);
        let [bubbling, dual, forward] = ["bubbling", "multi-pivot", "multi-pivot:dir=forward"].map(faults);
        println!("{budget}: linear {linear}, random {random}, bubbling {bubbling}, dual {dual}, forward {forward}");
        assert!(linear > 1000 && bubbling < linear / 100 && dual < linear / 100 && forward < linear / 100);
    }
}

#[test]
fn pivots_follow_many_readers() {
    for budget in [1, 2, 4, 8] {
        let faults = |kind| network_faults(kind, 32 * 4096, interleaved(32, 4096), budget);
        let [linear, random, bubbling] = ["linear", "random", "bubbling"].map(faults);
        let [dual, forward, backward] =
            ["multi-pivot", "multi-pivot:dir=forward", "multi-pivot:dir=backward"].map(faults);
        println!("{budget}: linear {linear}, random {random}, bubbling {bubbling}");
        println!("{budget}: dual {dual}, forward {forward}, backward {backward}");
        assert!(dual <= linear / 3, "{budget} pages a read: {dual} faults, linear {linear}");
        assert!(forward <= linear / 3, "{budget} pages a read: {forward} faults, linear {linear}");
    }
}

/// An order that gives up after a few pages.
struct GivesUp(u32);

impl PushOrder for GivesUp {
    fn name(&self) -> &'static str {
        "gives-up"
    }

    fn begin(&mut self, _: &PageSet, _: &[u8]) {}

    fn fault(&mut self, _: u64) {}

    fn next(&mut self, unsent: &PageSet, _: u64) -> Option<PageRange> {
        self.0 = self.0.checked_sub(1)?;
        unsent.run_at(unsent.first_from(0)?, 1)
    }
}

#[test]
fn an_order_that_ends_early_is_told_of_and_the_vm_arrives_all_the_same() {
    let mut sim = Simulation::new(SimConfig { pages: 2000, ..SimConfig::default() });
    let attempt = sim.attempt(&mut PostCopy { order: Box::new(GivesUp(3)) });
    assert!(attempt.error.is_none(), "{attempt:?}");
    assert_eq!(sim.owner(), Owner::Destination);
    assert!(sim.broken()[0].contains("the push order gives-up chose nothing of 1997 pages"), "{:?}", sim.broken());
}
