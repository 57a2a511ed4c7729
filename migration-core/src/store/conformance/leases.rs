//! Checks of the rules about leases, and about forgetting.

use std::time::Duration;

use super::{
    DESTINATION, LEASE, Purpose, Record, SOURCE, TestStore, create, expect_empty, expect_pages, left, put, record,
};

/// Checks that a namespace whose lease has ended is unchanged: it can be read, written and renewed.
pub fn rule_14_a_lease_that_has_ended_deletes_nothing(test: &mut dyn TestStore) {
    let (id, incarnation) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1]);
    test.advance(100 * LEASE);
    assert_eq!(test.store().expired().expect("the store lists"), [(id.id, record(Purpose::Home))]);
    // neither listing it nor the start of another process deletes it
    test.crash_user();
    assert_eq!(test.store().expired().expect("the store lists").len(), 1);
    expect_pages(test, id, &[(1, 1)], &[]);
    assert_eq!(put(test, id, 2, &[2]).taken, [true]);
    assert_eq!(test.store().renew(id, SOURCE, LEASE).expect("it is renewed"), incarnation);
    assert_eq!(test.store().expired().expect("the store lists"), []);
    expect_pages(test, id, &[(1, 1), (2, 2)], &[]);
}

/// Checks that `expired` returns exactly the namespaces whose lease has ended, in ascending order,
/// with their records.
pub fn rule_14_expired_namespaces_are_listed_with_their_records(test: &mut dyn TestStore) {
    let (home, _) = create(test, 1, Purpose::Home);
    let (stage, _) = create(test, 2, Purpose::Stage);
    let (attempt, _) = create(test, 3, Purpose::Attempt);
    assert_eq!(test.store().expired().expect("the store lists"), []);
    test.store().renew(stage, DESTINATION, 3 * LEASE).expect("it is renewed");
    test.advance(LEASE - Duration::from_secs(1));
    assert_eq!(test.store().expired().expect("the store lists"), []);

    test.advance(Duration::from_secs(2));
    let mut ended = vec![(home.id, record(Purpose::Home)), (attempt.id, record(Purpose::Attempt))];
    ended.sort_by_key(|(id, _)| *id);
    assert_eq!(test.store().expired().expect("the store lists"), ended);

    test.advance(2 * LEASE);
    ended.push((stage.id, Record { owner: DESTINATION, ..record(Purpose::Stage) }));
    ended.sort_by_key(|(id, _)| *id);
    assert_eq!(test.store().expired().expect("the store lists"), ended);
}

/// Checks that a late renewal or `create` with a shorter lease does not shorten a lease.
pub fn rule_14_a_lease_is_never_shortened(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    test.store().renew(id, SOURCE, 10 * LEASE).expect("a long lease is granted");
    test.store().renew(id, SOURCE, LEASE).expect("a short lease is granted");
    test.store().create(id.id, &record(Purpose::Home), LEASE).expect("a repeated create succeeds");
    test.advance(9 * LEASE);
    assert_eq!(test.store().expired().expect("the store lists"), []);
    test.advance(2 * LEASE);
    assert_eq!(test.store().expired().expect("the store lists").len(), 1);
    // a repeated create counts as a use of the namespace: it extends the lease
    test.store().create(id.id, &record(Purpose::Home), LEASE).expect("a repeated create succeeds");
    assert_eq!(test.store().expired().expect("the store lists"), []);
}

/// Checks that `forget` may be repeated, and may be called for a namespace that never existed.
pub fn rule_14_to_forget_twice_is_harmless(test: &mut dyn TestStore) {
    let room = test.store().room();
    let (kept, _) = create(test, 1, Purpose::Home);
    let (id, _) = create(test, 2, Purpose::Attempt);
    put(test, id, 1, &[1]);
    for _ in 0..3 {
        test.store().forget(id).expect("it is forgotten");
    }
    assert_eq!(left(test), [(kept.id, record(Purpose::Home))]);
    test.store().forget(kept).expect("it is forgotten");
    expect_empty(test, room);
}
