//! What a strategy asks of the engine reaches the guest, and what it is told is so.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    MigrationError, PageRange,
    engine::{Controller, SourceOptions, migrate},
    report::{Outcome, Report},
    strategy::{Done, Running, Strategy},
};

use crate::{HANG, destination::Destination, guest::Host, live::Link, snapshots::Scripted};

/// What the strategy was told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    pages: u64,
    sent: Vec<u64>,
    dirty: Vec<u64>,
    timed_out: bool,
    whole: bool,
}

/// Throttles the guest twice, sends a round before and behind that, and hands over or gives up.
struct Throttles {
    gives_up: bool,
    told: Arc<Mutex<Told>>,
}

impl Strategy for Throttles {
    fn name(&self) -> &'static str {
        "throttles"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut told = Told { pages: vm.pages(), ..Told::default() };
        let mut pages = vm.start_tracking()?;
        for percent in [60, 30] {
            vm.throttle(percent)?;
            told.sent.push(vm.send(&pages)?.sent);
            pages = vm.harvest()?;
            told.dirty.push(pages.len());
        }
        told.timed_out = vm.link().timed_out;
        *self.told.lock().unwrap() = told;
        if self.gives_up {
            return vm.cancel("enough");
        }
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        let done = vm.hand_over(nothing)?.finish();
        self.told.lock().unwrap().whole = done.is_ok();
        Ok(done?)
    }
}

fn throttled(gives_up: bool, timeout: Option<Duration>) -> (Report, Told, Vec<u8>) {
    let mut vm = Scripted::new(64, 40);
    vm.free = PageRange::new(30, 5);
    vm.writes = vec![(2, 99), (3, 98)];
    let description = vm.description.clone();
    let destination = Destination::of(HANG, |to| Host { description, to, paging: None });
    let told = Arc::<Mutex<Told>>::default();
    let mut strategy = Throttles { gives_up, told: told.clone() };
    let options = SourceOptions { timeout, ..SourceOptions::default() };
    let link = Link::new(&destination, None);
    let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
    if !gives_up {
        drop(destination.finish());
    }
    let told = told.lock().unwrap().clone();
    (report, told, vm.throttled)
}

#[test]
fn a_throttle_reaches_the_guest_and_is_lifted_when_it_stays() {
    let (report, told, throttled) = throttled(true, None);
    assert_eq!((report.outcome, report.throttle_percent), (Outcome::Failed, 60));
    assert_eq!(throttled, [60, 30, 0]);
    let (sent, dirty) = (vec![35, 2], vec![2, 2]);
    assert_eq!(told, Told { pages: 64, sent, dirty, ..Told::default() });
}

#[test]
fn what_a_migration_counts_is_what_moved() {
    let (report, told, throttled) = throttled(false, None);
    assert_eq!((report.outcome, report.throttle_percent), (Outcome::Completed, 60));
    assert_eq!(throttled, [60, 30]);
    assert!(told.whole && !told.timed_out);
    let pages = report.pages;
    assert_eq!((pages.total, pages.hole, pages.free, pages.distinct), (64, 24, 5, 35));
    // the first pass, two pages in the second one and in the pause
    assert_eq!((pages.plain, pages.zero), (35 + 2 + 2, 0));
    let rounds: Vec<_> = report.rounds.iter().map(|round| (round.pages, round.throttle_percent)).collect();
    assert_eq!(rounds[..2], [(35, 60), (2, 30)]);
}

#[test]
fn a_strategy_is_told_when_its_time_is_over() {
    // the first round ends early then, and what it did not send is due again
    let (report, told, _) = throttled(false, Some(Duration::ZERO));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(told.timed_out && told.sent[0] <= 35 && told.whole, "{told:?}");
    let (report, told, _) = throttled(false, Some(Duration::from_secs(100_000)));
    assert_eq!(report.outcome, Outcome::Completed);
    assert!(!told.timed_out);
}
