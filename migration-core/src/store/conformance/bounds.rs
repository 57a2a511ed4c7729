//! Checks of the bounds of what a store accepts, and of the time that a call may take.

use std::time::{Duration, Instant};

use super::{
    LEASE, MAX_LEASE, PAGE_SIZE, PageToGet, PageToPut, Purpose, SOURCE, StoreError, TestStore, Urgency, VM, create,
    expect_pages, put, record, soon, try_put, value, value_of_len,
};
use crate::{
    page::MAX_PAGES,
    store::{
        Namespace, VmNamespace,
        limits::{MAX_NAMESPACES, MAX_RUN_PAGES, MAX_VALUE_BYTES},
    },
};

/// Checks that runs and values that are too long, empty, or out of order are refused, and that no
/// part of them is stored.
pub fn bounds_runs_and_values_are_limited(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let room = test.store().room();
    let page = value(1, 1);
    let too_many: Vec<_> = (0..=MAX_RUN_PAGES as u64).collect();
    for bad in [&[][..], &[2, 1], &[1, 1], &[MAX_PAGES], &[u64::MAX], &too_many] {
        let run: Vec<_> = bad.iter().map(|&number| PageToPut { page: number, value: &page }).collect();
        assert!(matches!(test.store().put(id, 1, &run), Err(StoreError::BadRun(_))), "put of {} pages", bad.len());
        let run: Vec<_> = bad.iter().map(|&page| PageToGet { page, generation: 1 }).collect();
        let got = test.store().get(id, &run, Urgency::Fault, soon(), &mut |_, _| panic!("a page is handed out"));
        assert!(matches!(got, Err(StoreError::BadRun(_))), "get of {} pages", bad.len());
    }
    let long = value_of_len(2, 1, MAX_VALUE_BYTES + 1);
    for bad in [&[][..], &long] {
        let run = [PageToPut { page: 1, value: &page }, PageToPut { page: 2, value: bad }];
        let refused = test.store().put(id, 1, &run);
        assert!(matches!(refused, Err(StoreError::BadValue { page: 2, .. })), "{refused:?}");
    }
    assert_eq!(test.store().room(), room);
    expect_pages(test, id, &[], &[(1, 1), (2, 1)]);
}

/// Checks that leases of zero, or above the longest lease, are refused.
pub fn bounds_leases_are_limited(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let new = introduce_many(test, 0);
    for bad in [Duration::ZERO, MAX_LEASE + Duration::from_nanos(1), Duration::MAX] {
        let refused = test.store().renew(id, SOURCE, bad);
        assert!(matches!(refused, Err(StoreError::BadLease(_))), "{refused:?}");
        let refused = test.store().create(new.id, &record(Purpose::Home), bad);
        assert!(matches!(refused, Err(StoreError::BadLease(_))), "{refused:?}");
    }
    test.store().renew(id, SOURCE, MAX_LEASE).expect("the longest lease is granted");
}

/// Checks that the number of namespaces is limited, and that the store keeps serving the existing
/// ones.
pub fn bounds_namespaces_are_limited(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1]);
    let limit = test.max_namespaces().min(MAX_NAMESPACES) as u32;
    let ids: Vec<_> = (0..limit).map(|number| introduce_many(test, number)).collect();
    for &id in &ids[1..] {
        test.store().create(id.id, &record(Purpose::Attempt), LEASE).expect("the limit is not reached");
    }
    let refused = test.store().create(ids[0].id, &record(Purpose::Attempt), LEASE);
    assert!(matches!(refused, Err(StoreError::TooMany { .. })), "{refused:?}");
    test.store().create(id.id, &record(Purpose::Home), LEASE).expect("a repeated create is no new namespace");
    assert_eq!(put(test, id, 2, &[1]).taken, [true]);
    test.store().forget(ids[1]).expect("it is forgotten");
    test.store().create(ids[0].id, &record(Purpose::Attempt), LEASE).expect("there is a free one");
}

/// Introduces one of many names. Returns the reference to its namespace.
fn introduce_many(test: &mut dyn TestStore, number: u32) -> VmNamespace {
    let mut secret = [0xee; 16];
    secret[..4].copy_from_slice(&number.to_le_bytes());
    let name = Namespace::new(secret);
    test.introduce(&name, VM);
    name.of(VM)
}

/// Checks that a put for which there is no room changes nothing, and that present pages can be read
/// and replaced.
pub fn bounds_a_full_store_takes_a_put_whole_or_not_at_all(test: &mut dyn TestStore) {
    let empty = test.store().room();
    let (id, _) = create(test, 1, Purpose::Home);
    let mut full = None;
    for first in (0..1 << 16).step_by(16) {
        let pages: Vec<_> = (first..first + 16).collect();
        match try_put(test, id, 1, &pages) {
            Ok(stored) => assert_eq!(stored.taken, [true; 16]),
            Err(StoreError::NoRoom { needed, room }) => {
                assert!(needed > room && needed >= 16 * PAGE_SIZE as u64, "{needed} bytes needed of {room}");
                full = Some(pages);
                break;
            }
            Err(error) => panic!("a put failed: {error}"),
        }
    }
    let refused: Vec<_> = full.expect("the store has no limit of 64 MiB").iter().map(|&page| (page, 1)).collect();
    expect_pages(test, id, &[], &refused);
    let room = test.store().room();
    assert!(refused[0].0 >= 16, "not even 16 pages have room");
    assert_eq!(put(test, id, 2, &[0, 1, 2, 3, 4, 5, 6, 7]).taken, [true; 8], "pages can be replaced");
    assert_eq!(test.store().room(), room);
    expect_pages(test, id, &[(0, 2), (7, 2), (8, 1), (15, 1)], &[]);
    test.store().forget(id).expect("it is forgotten");
    assert_eq!(test.store().room(), empty);
}

/// Checks that a get whose deadline has passed returns no page, and that its error says that a
/// retry can help.
pub fn bounds_a_get_ends_at_its_deadline(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1]);
    let wanted = [PageToGet { page: 1, generation: 1 }];
    let passed = Instant::now();
    let result = test.store().get(id, &wanted, Urgency::Prefetch, passed, &mut |_, _| panic!("a page is handed out"));
    assert!(matches!(&result, Err(error @ StoreError::TimedOut) if error.can_retry()), "{result:?}");
}

/// Checks that the receiver of a page may use the store during the call of `take`, also for the
/// same page, and also after the store has looked for a page that is missing.
pub fn bounds_no_lock_is_held_while_pages_are_handed_out(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[1, 2, 10]);
    let store = test.store();
    let wanted = [0, 1, 2, 10].map(|page| PageToGet { page, generation: 1 });
    let mut got = Vec::new();
    let newer = value(1, 2);
    let result = store.get(id, &wanted, Urgency::Fault, soon(), &mut |page, _| {
        got.push(page);
        if page != 1 {
            store.put(id, 2, &[PageToPut { page: 1, value: &newer }]).expect("a put inside a get");
            store.renew(id, SOURCE, LEASE).expect("a renewal inside a get");
        }
    });
    // page 1 is missing too if the store has looked for it after the put
    assert!(matches!(result, Err(StoreError::Missing { first: 0, .. })), "{result:?}");
    assert!(got.contains(&2) && got.contains(&10), "{got:?}");
    expect_pages(test, id, &[(1, 2), (2, 1), (10, 1)], &[]);
}
