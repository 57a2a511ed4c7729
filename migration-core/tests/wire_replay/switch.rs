//! When a migration under way can be switched to post-copy, and what the user is told when it
//! cannot.

use migration_core::{
    engine::{Controller, NoPostCopy, SourceOptions, migrate},
    report::Outcome,
};

use crate::{
    HANG,
    asks::Asks,
    destination::Destination,
    guest::Host,
    live::Link,
    post_copy::{guest, paged_description, paging},
};

/// The answers before the migration, in it, and after it.
fn asked(demand_lanes: u16, can: bool) -> Vec<Result<(), NoPostCopy>> {
    let paging = can.then(paging);
    let destination = Destination::of(HANG, |to| Host { description: paged_description(), to, paging });
    let (controller, commands) = Controller::new();
    let leaves = can && demand_lanes > 0;
    let question = Controller::post_copy;
    let mut asks = Asks { controller, question, answers: Vec::new(), can_switch_over: false, leaves };
    asks.ask();
    let options = SourceOptions { demand_lanes, ..SourceOptions::default() };
    let link = Link::new(&destination, None);
    let report = migrate(&mut guest(), &link, &mut asks, &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    asks.ask();
    drop(destination.finish());
    asks.answers
}

#[test]
fn post_copy_is_refused_where_it_cannot_happen() {
    use NoPostCopy::*;
    assert_eq!(asked(1, true), [Err(NotYet), Ok(()), Err(TooLate), Ok(()), Err(TooLate), Err(Ended)]);
    let within = |why| [Err(NotYet), Err(why), Err(why), Err(why), Err(why), Err(Ended)];
    assert_eq!(asked(0, true), within(NoLanes));
    assert_eq!(asked(1, false), within(NotAgreed));
}
