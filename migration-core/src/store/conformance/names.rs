//! Checks of the rules about namespaces: their creation and use, and what the store reports about
//! its losses.

use super::{
    DESTINATION, LEASE, MAX_LEASE, OTHER_VM, Purpose, Record, SOURCE, StoreError, TestStore, VM, VmNamespace, create,
    expect_empty, expect_pages, introduce, left, put, record, try_put, try_read,
};

/// Checks that puts and gets succeed whatever owner is recorded: the name keeps other processes
/// out, not the store.
pub fn rule_08_a_store_does_not_ask_who_the_owner_is(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Attempt);
    put(test, id, 1, &[1]);
    test.store().renew(id, DESTINATION, LEASE).expect("the destination renews");
    // after *run* the source still writes its attempt namespace
    assert_eq!(put(test, id, 2, &[2]).taken, [true]);
    test.store().renew(id, SOURCE, LEASE).expect("the source renews");
    expect_pages(test, id, &[(1, 1), (2, 2)], &[]);
}

/// Checks that `forget` removes every page of a namespace, frees their room, and changes no other
/// namespace.
pub fn rule_09_a_namespace_is_forgotten_as_a_whole(test: &mut dyn TestStore) {
    let (kept, _) = create(test, 1, Purpose::Home);
    put(test, kept, 1, &[1, 2]);
    let room = test.store().room();
    let (id, _) = create(test, 2, Purpose::Attempt);
    put(test, id, 1, &[1, 2, 3]);
    assert!(test.store().room() < room, "pages take room");
    test.store().forget(id).expect("it is forgotten");
    assert_eq!(test.store().room(), room);
    let (got, result) = try_read(test, id, &[(1, 1)]);
    assert!(got.is_empty() && matches!(result, Err(StoreError::Absent(absent)) if absent == id.id), "{result:?}");
    expect_pages(test, kept, &[(1, 1), (2, 1)], &[]);
}

/// Checks that a put into a namespace that does not exist fails, and does not create the namespace.
pub fn rule_10_a_put_never_creates_a_namespace(test: &mut dyn TestStore) {
    let id = introduce(test, 1, VM);
    let room = test.store().room();
    let refused = try_put(test, id, 1, &[1]);
    assert!(matches!(refused, Err(StoreError::Absent(absent)) if absent == id.id), "{refused:?}");
    let renewed = test.store().renew(id, SOURCE, LEASE);
    assert!(matches!(renewed, Err(StoreError::Absent(_))), "{renewed:?}");
    assert_eq!(test.store().record(id.id).expect("the store answers"), None);
    expect_empty(test, room);
}

/// Checks that a put that arrives after `forget` fails, and does not bring the namespace back.
pub fn rule_10_a_put_into_a_forgotten_namespace_fails(test: &mut dyn TestStore) {
    let room = test.store().room();
    let (id, _) = create(test, 1, Purpose::Attempt);
    put(test, id, 1, &[1]);
    test.store().forget(id).expect("it is forgotten");
    for generation in [1, 2] {
        let refused = try_put(test, id, generation, &[1, 2]);
        assert!(matches!(refused, Err(StoreError::Absent(_))), "{refused:?}");
    }
    assert_eq!(test.store().record(id.id).expect("the store answers"), None);
    expect_empty(test, room);
}

/// Checks that a `create` that was delayed until after `forget` fails for one lease, the longest
/// that was granted.
pub fn rule_10_a_late_create_of_a_forgotten_namespace_fails(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Attempt);
    test.store().renew(id, SOURCE, 10 * LEASE).expect("a long lease is granted");
    test.store().renew(id, SOURCE, LEASE).expect("a short lease is granted");
    test.store().forget(id).expect("it is forgotten");
    for step in [0, 1, 8] {
        test.advance(step * LEASE);
        let late = test.store().create(id.id, &record(Purpose::Attempt), LEASE);
        assert!(matches!(late, Err(StoreError::Forgotten(gone)) if gone == id.id), "{late:?} after {step} leases more");
        assert!(matches!(try_put(test, id, 7, &[1]), Err(StoreError::Absent(_))));
    }
    // this is also so after another process has opened the store
    test.crash_user();
    let late = test.store().create(id.id, &record(Purpose::Attempt), LEASE);
    assert!(matches!(late, Err(StoreError::Forgotten(_))), "{late:?}");
    assert_eq!(left(test), []);
}

/// Checks that a `create` fails that arrives after the `forget` of its namespace. The caller has
/// forgotten the namespace because the answer to `create` was lost.
pub fn rule_10_a_create_that_arrives_after_its_forget_fails(test: &mut dyn TestStore) {
    let id = introduce(test, 1, VM);
    test.store().forget(id).expect("an unknown namespace is forgotten");
    let late = test.store().create(id.id, &record(Purpose::Attempt), LEASE);
    assert!(matches!(late, Err(StoreError::Forgotten(_))), "{late:?}");
    assert_eq!(left(test), []);
}

/// Checks that forgotten ids do not accumulate: after the longest lease they are not remembered any
/// more.
pub fn rule_10_forgotten_ids_are_not_remembered_for_ever(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Attempt);
    test.store().forget(id).expect("it is forgotten");
    test.advance(MAX_LEASE + LEASE);
    test.store().create(id.id, &record(Purpose::Attempt), LEASE).expect("the id was remembered for long enough");
    // no page of the earlier namespace is left
    expect_pages(test, id, &[], &[(1, 1)]);
}

/// Checks that `create`, `put` and `renew` return the same incarnation of a namespace as long as
/// nothing is lost, whatever happens to other namespaces.
pub fn rule_11_every_answer_has_the_present_incarnation(test: &mut dyn TestStore) {
    let (id, incarnation) = create(test, 1, Purpose::Home);
    let (other, _) = create(test, 2, Purpose::Attempt);
    assert_eq!(put(test, id, 1, &[1]).incarnation, incarnation);
    assert_eq!(put(test, id, 0, &[1]).incarnation, incarnation, "of a put that took nothing");
    assert_eq!(test.store().renew(id, SOURCE, LEASE).expect("it is renewed"), incarnation);
    let again = test.store().create(id.id, &record(Purpose::Home), LEASE);
    assert_eq!(again.expect("a repeated create succeeds"), incarnation);
    test.store().forget(other).expect("it is forgotten");
    create(test, 3, Purpose::Home);
    let present = test.store().renew(id, SOURCE, LEASE).expect("it is renewed");
    assert_eq!(present, incarnation, "to forget another namespace is no loss");
}

/// Checks that after a loss namespaces are absent, and that new ones get another incarnation, a
/// different one after each loss.
pub fn rule_11_a_loss_changes_the_incarnation(test: &mut dyn TestStore) {
    let mut seen = Vec::new();
    for _ in 0..3 {
        let (id, incarnation) = create(test, 1, Purpose::Home);
        assert!(!seen.contains(&incarnation), "an incarnation comes twice");
        seen.push(incarnation);
        put(test, id, 1, &[1]);
        test.lose_everything();
        assert!(matches!(try_put(test, id, 2, &[1]), Err(StoreError::Absent(_))));
        assert!(matches!(test.store().renew(id, SOURCE, LEASE), Err(StoreError::Absent(_))));
        assert_eq!(test.store().record(id.id).expect("the store answers"), None);
        // the writer's repeated create reaches the store: the incarnation shows that the page is
        // lost
        let incarnation = test.store().create(id.id, &record(Purpose::Home), LEASE).expect("it is created anew");
        assert!(!seen.contains(&incarnation), "a loss does not change the incarnation");
        assert_eq!(put(test, id, 3, &[2]).incarnation, incarnation);
        expect_pages(test, id, &[(2, 3)], &[(1, 1)]);
        test.lose_everything();
    }
}

/// Checks that a crash of a process that used the store loses nothing that the store has
/// acknowledged, and does not change the incarnation.
pub fn rule_11_a_crash_of_a_user_loses_nothing(test: &mut dyn TestStore) {
    let (id, incarnation) = create(test, 1, Purpose::Stage);
    put(test, id, 1, &[1, 2]);
    put(test, id, 2, &[2, 3]);
    test.crash_user();
    expect_pages(test, id, &[(1, 1), (2, 2), (3, 2)], &[]);
    assert_eq!(test.store().renew(id, DESTINATION, LEASE).expect("it is renewed"), incarnation);
    assert_eq!(put(test, id, 1, &[2]).taken, [false]);
}

/// Checks that the record is the one that `create` was given, with the owner of the last renewal.
pub fn rule_24_a_record_says_whose_a_namespace_is(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Stage);
    assert_eq!(test.store().record(id.id).expect("the store answers"), Some(record(Purpose::Stage)));
    test.store().renew(id, DESTINATION, LEASE).expect("it is renewed");
    let now = Record { owner: DESTINATION, ..record(Purpose::Stage) };
    assert_eq!(test.store().record(id.id).expect("the store answers"), Some(now));
    // a late create does not restore the earlier owner
    test.store().create(id.id, &record(Purpose::Stage), LEASE).expect("a repeated create succeeds");
    assert_eq!(test.store().record(id.id).expect("the store answers"), Some(now));
}

/// Checks that a `create` for another VM or purpose does not change an existing namespace.
pub fn rule_24_a_namespace_of_another_vm_is_not_taken_over(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1]);
    let others = [Record { vm: OTHER_VM, ..record(Purpose::Home) }, record(Purpose::Attempt)];
    for other in others {
        let refused = test.store().create(id.id, &other, LEASE);
        assert!(refused.is_err(), "{other:?}");
    }
    assert_eq!(test.store().record(id.id).expect("the store answers"), Some(record(Purpose::Home)));
    expect_pages(test, id, &[(1, 1)], &[]);
}

/// Checks that a caller which knows the id, but has another VM than the record's, can do nothing
/// with a namespace.
pub fn rule_24_a_namespace_is_for_the_vm_of_its_record_only(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1]);
    let other = VmNamespace { vm: OTHER_VM, ..id };
    let (got, read) = try_read(test, other, &[(1, 1)]);
    assert!(got.is_empty(), "a page of another VM is handed out");
    let store = test.store();
    let results = [
        ("get", read),
        ("put", try_put(test, other, 2, &[1]).map(drop)),
        ("renew", store.renew(other, DESTINATION, MAX_LEASE).map(drop)),
        ("forget", store.forget(other)),
    ];
    for (call, result) in results {
        // a wrapper may refuse the call before the store does
        let refused = matches!(result, Err(StoreError::OtherVm(_) | StoreError::NoKey(_)));
        assert!(refused, "{call} for another VM: {result:?}");
    }
    assert_eq!(store.record(id.id).expect("the store answers"), Some(record(Purpose::Home)));
    expect_pages(test, id, &[(1, 1)], &[]);
    test.advance(2 * LEASE);
    assert_eq!(test.store().expired().expect("the store lists").len(), 1, "the lease was extended");
}
