//! When a migration under way can be switched to post-copy, and what the user is told when it cannot.

use std::sync::{Arc, Mutex};

use migration_core::{
    MigrationError,
    engine::{Controller, NoPostCopy, SourceOptions, migrate},
    report::Outcome,
    strategy::{Done, Linear, Running, Strategy},
};

use crate::{
    HANG,
    destination::Destination,
    guest::Host,
    live::Link,
    post_copy::{guest, paged_description, paging},
};

type Answers = Arc<Mutex<Vec<Result<(), NoPostCopy>>>>;

/// Asks for post-copy at every step of a hand-over, after a pause that was in vain.
struct Asks {
    controller: Controller,
    answers: Answers,
    leaves: bool,
}

impl Asks {
    fn ask(&self) {
        self.answers.lock().unwrap().push(self.controller.post_copy());
    }
}

impl Strategy for Asks {
    fn name(&self) -> &'static str {
        "asks"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        self.ask();
        let pages = vm.start_tracking()?;
        let vm = vm.pause()?;
        self.ask();
        let vm = vm.resume()?;
        self.ask();
        let mut vm = vm.pause()?;
        if self.leaves {
            let vm = vm.hand_over(pages)?;
            self.ask();
            return vm.serve(&mut Linear::default());
        }
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        let vm = vm.hand_over(nothing)?;
        self.ask();
        vm.finish()
    }
}

/// The answers before the migration, in it, and after it.
fn asked(demand_lanes: u16, can: bool) -> Vec<Result<(), NoPostCopy>> {
    let paging = can.then(paging);
    let destination = Destination::of(HANG, |to| Host { description: paged_description(), to, paging });
    let (controller, commands) = Controller::new();
    let leaves = can && demand_lanes > 0;
    let mut asks = Asks { controller, answers: Answers::default(), leaves };
    asks.ask();
    let options = SourceOptions { demand_lanes, ..SourceOptions::default() };
    let link = Link::new(&destination, None);
    let report = migrate(&mut guest(), &link, &mut asks, &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    asks.ask();
    drop(destination.finish());
    asks.answers.lock().unwrap().clone()
}

#[test]
fn post_copy_is_refused_where_it_cannot_happen() {
    use NoPostCopy::*;
    assert_eq!(asked(1, true), [Err(NotYet), Ok(()), Err(TooLate), Ok(()), Err(TooLate), Err(Ended)]);
    let within = |why| [Err(NotYet), Err(why), Err(why), Err(why), Err(why), Err(Ended)];
    assert_eq!(asked(0, true), within(NoLanes));
    assert_eq!(asked(1, false), within(NotAgreed));
}
