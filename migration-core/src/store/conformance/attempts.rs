//! Checks of what complete attempts to migrate leave in a store: after success, after failure, and
//! after a crash of either side.
//!
//! The source keeps cold pages in a home namespace and puts more pages into an attempt namespace.
//! The destination renews both and makes a home namespace of its own.

use super::{
    DESTINATION, Incarnation, LEASE, NamespaceId, Purpose, Record, TestStore, VM, VmNamespace, create, expect_empty,
    expect_pages, introduce, left, put, record, try_put,
};

/// The two namespaces of an attempt, in which the store has the VM's pages.
struct Attempt {
    home: VmNamespace,
    attempt: VmNamespace,
    /// The incarnations of both namespaces.
    incarnations: [Incarnation; 2],
}

/// Begins an attempt: the source has put all pages.
fn begin(test: &mut dyn TestStore) -> Attempt {
    let (home, of_home) = create(test, 1, Purpose::Home);
    put(test, home, 1, &[1, 2, 3]);
    put(test, home, 2, &[3]);
    let (attempt, of_attempt) = create(test, 2, Purpose::Attempt);
    put(test, attempt, 1, &[10, 11]);
    put(test, attempt, 2, &[11, 12]);
    Attempt { home, attempt, incarnations: [of_home, of_attempt] }
}

/// Takes the VM over: the destination runs it, refers to both namespaces, and has checked the
/// incarnation.
fn take_over(test: &mut dyn TestStore, at: &Attempt) {
    for (id, known) in [at.home, at.attempt].into_iter().zip(at.incarnations) {
        let record = test.store().record(id.id).expect("the store answers");
        assert_eq!(record.map(|record| record.vm), Some(VM));
        let incarnation = test.store().renew(id, DESTINATION, LEASE).expect("the destination renews");
        assert_eq!(incarnation, known);
    }
    expect_pages(test, at.home, &[(1, 1), (2, 1), (3, 2)], &[]);
    expect_pages(test, at.attempt, &[(10, 1), (11, 2), (12, 2)], &[]);
}

/// Delivers requests of the source that were delayed for a long time.
fn deliver_late_requests(test: &mut dyn TestStore, at: &Attempt) {
    let late = test.store().create(at.attempt.id, &record(Purpose::Attempt), LEASE);
    assert!(late.is_err(), "a late create brings a namespace back");
    assert!(try_put(test, at.attempt, 2, &[12]).is_err(), "a late put is taken");
    assert!(test.store().renew(at.attempt, DESTINATION, LEASE).is_err(), "a late renewal succeeds");
}

/// Checks that after *released* the destination forgets the source's namespaces, and only its own
/// is left.
pub fn rule_14_nothing_is_left_after_success(test: &mut dyn TestStore) {
    let room = test.store().room();
    let at = begin(test);
    take_over(test, &at);
    let own = introduce(test, 3, VM);
    let own_record = Record { owner: DESTINATION, ..record(Purpose::Home) };
    test.store().create(own.id, &own_record, LEASE).expect("the destination makes a namespace");
    put(test, own, 1, &[1, 2]);
    // no page refers to them any more
    test.store().forget(at.home).expect("it is forgotten");
    test.store().forget(at.attempt).expect("it is forgotten");
    deliver_late_requests(test, &at);
    expect_pages(test, own, &[(1, 1), (2, 1)], &[]);
    assert_eq!(left(test), [(own.id, own_record)]);
    // the VM ends regularly
    test.store().forget(own).expect("it is forgotten");
    expect_empty(test, room);
}

/// Checks that a failed attempt forgets the namespace that it created, and that the home namespace
/// keeps all its pages.
pub fn rule_14_a_failed_attempt_leaves_only_what_was_there_before(test: &mut dyn TestStore) {
    let at = begin(test);
    test.store().forget(at.attempt).expect("it is forgotten");
    deliver_late_requests(test, &at);
    expect_pages(test, at.home, &[(1, 1), (2, 1), (3, 2)], &[]);
    // the next attempt uses another name
    let (next, _) = create(test, 3, Purpose::Attempt);
    put(test, next, 1, &[10]);
    test.store().forget(next).expect("it is forgotten");
    assert_eq!(left(test), [(at.home.id, record(Purpose::Home))]);
}

/// Checks that the namespaces of a source that has crashed are listed as its own, and can be
/// removed.
pub fn rule_14_what_a_crashed_source_leaves_is_listed(test: &mut dyn TestStore) {
    let room = test.store().room();
    let at = begin(test);
    test.crash_user();
    assert_eq!(test.store().expired().expect("the store lists"), [], "the leases have not ended");
    let mut expected = [(at.home.id, record(Purpose::Home)), (at.attempt.id, record(Purpose::Attempt))];
    expected.sort_by_key(|(id, _)| *id);
    remove_what_is_left(test, &expected, room);
}

/// Checks that the namespaces which a destination renewed before it crashed are listed as its own.
pub fn rule_14_what_a_crashed_destination_leaves_is_listed(test: &mut dyn TestStore) {
    let room = test.store().room();
    let at = begin(test);
    take_over(test, &at);
    test.crash_user();
    // the end of the lease deletes nothing: the pages are there for the host that takes over
    expect_pages(test, at.home, &[(1, 1), (2, 1), (3, 2)], &[]);
    let own = |purpose| Record { owner: DESTINATION, ..record(purpose) };
    let mut expected = [(at.home.id, own(Purpose::Home)), (at.attempt.id, own(Purpose::Attempt))];
    expected.sort_by_key(|(id, _)| *id);
    remove_what_is_left(test, &expected, room);
}

/// Removes what has expired, as a person's command does, and checks that it was what is expected.
fn remove_what_is_left(test: &mut dyn TestStore, expected: &[(NamespaceId, Record)], room: u64) {
    let found = left(test);
    assert_eq!(found, expected);
    for (id, record) in found {
        test.store().forget(VmNamespace { id, vm: record.vm }).expect("it is forgotten");
    }
    expect_empty(test, room);
}
