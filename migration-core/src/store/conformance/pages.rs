//! Checks of the rules about single pages.

use super::{
    Harm, PAGE_SIZE, PageToGet, PageToPut, Purpose, StoreError, TestStore, Urgency, create, expect_pages, put, soon,
    try_put, value, value_of_len,
};

/// Checks that a value is returned with every byte, whatever its length and the number of its page.
pub fn rule_03_a_page_comes_back_as_it_was_put(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let lengths = [(0, 1), (1, PAGE_SIZE - 1), (2, PAGE_SIZE), (3, PAGE_SIZE + 1), (1 << 28, PAGE_SIZE + 32)];
    for (at, &(page, len)) in lengths.iter().enumerate() {
        let generation = at as u32 + 1;
        let long = value_of_len(page, generation, len);
        let stored = test.store().put(id, generation, &[PageToPut { page, value: &long }]).expect("a value is put");
        assert_eq!(stored.taken, [true]);
    }
    for (at, &(page, len)) in lengths.iter().enumerate() {
        let generation = at as u32 + 1;
        let mut got = None;
        let wanted = [PageToGet { page, generation }];
        let result = test.store().get(id, &wanted, Urgency::Prefetch, soon(), &mut |number, data| {
            assert_eq!(number, page);
            assert_eq!(data.page().is_some(), len == PAGE_SIZE);
            got = Some(data.bytes().to_vec());
        });
        result.expect("the value is read");
        assert!(got.as_deref() == Some(&value_of_len(page, generation, len)[..]), "a value of {len} bytes has changed");
    }
    // shorter values replace longer ones
    let short = value_of_len(3, 9, 5);
    test.store().put(id, 9, &[PageToPut { page: 3, value: &short }]).expect("a short value is put");
    let mut got = Vec::new();
    let result =
        test.store().get(id, &[PageToGet { page: 3, generation: 9 }], Urgency::Fault, soon(), &mut |_, data| {
            got = data.bytes().to_vec();
        });
    result.expect("the short value is read");
    assert_eq!(got, short);
}

/// Checks that a page that was never put is reported as missing, and that the other pages of the
/// run are returned.
pub fn rule_03_an_absent_page_is_missing_and_never_zeros(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    expect_pages(test, id, &[], &[(0, 0), (1, 0), (40, 1)]);
    put(test, id, 1, &[2, 5]);
    expect_pages(test, id, &[(2, 1), (5, 1)], &[(1, 1), (3, 1), (4, 1), (6, 1), (1000, 1)]);
    // this is also so for generation 0, as which a hole of a table reads
    expect_pages(test, id, &[(2, 1)], &[(0, 0), (7, 0)]);
}

/// Checks that a page is returned only in the generation that the reader knows, so that a replay is
/// refused.
pub fn rule_03_another_generation_is_missing(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 5, &[7]);
    for generation in [0, 4, 6, u32::MAX] {
        expect_pages(test, id, &[], &[(7, generation)]);
    }
    put(test, id, 6, &[7]);
    expect_pages(test, id, &[], &[(7, 5)]);
    expect_pages(test, id, &[(7, 6)], &[]);
}

const HARMS: [Harm; 4] = [Harm::Lose, Harm::Damage, Harm::LoseTrailer, Harm::MixUp(2)];

/// Checks that a page that was lost, damaged or mixed up inside the store is missing, and that its
/// neighbours are not.
pub fn rule_03_a_harmed_page_is_missing(test: &mut dyn TestStore) {
    for (at, harm) in HARMS.into_iter().enumerate() {
        let (id, _) = create(test, at as u8 + 1, Purpose::Home);
        put(test, id, 3, &[1, 2, 3]);
        assert!(test.harm(id.id, 3, harm), "{harm:?}");
        expect_pages(test, id, &[(1, 3), (2, 3)], &[(3, 3)]);
    }
}

/// Checks that a harmed page can be put again under a later generation.
pub fn rule_03_a_new_put_heals_a_harmed_page(test: &mut dyn TestStore) {
    for (at, harm) in HARMS.into_iter().enumerate() {
        let (id, _) = create(test, at as u8 + 1, Purpose::Home);
        put(test, id, 3, &[1, 2, 3]);
        assert!(test.harm(id.id, 3, harm), "{harm:?}");
        assert_eq!(put(test, id, 4, &[3]).taken, [true], "{harm:?}");
        expect_pages(test, id, &[(1, 3), (2, 3), (3, 4)], &[]);
    }
}

/// Checks that a put with a page of zeros is refused, and that no part of it is stored.
pub fn rule_03_zeros_are_never_put(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let good = value(4, 1);
    for zeros in [&[0; PAGE_SIZE][..], &[0]] {
        let run = [PageToPut { page: 4, value: &good }, PageToPut { page: 5, value: zeros }];
        let refused = test.store().put(id, 1, &run);
        assert!(matches!(refused, Err(StoreError::Zeros(5))), "{refused:?}");
    }
    expect_pages(test, id, &[], &[(4, 1), (5, 1)]);
    let mut nearly = [0; PAGE_SIZE];
    nearly[PAGE_SIZE - 1] = 1;
    test.store().put(id, 1, &[PageToPut { page: 5, value: &nearly }]).expect("a byte is not zero");
}

/// Checks that a page needs the room of one page however often it is put, and that only the newest
/// put is kept.
pub fn rule_09_a_namespace_keeps_only_the_newest_put_of_a_page(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    put(test, id, 1, &[3, 4]);
    let room = test.store().room();
    for generation in 2..=20 {
        assert_eq!(put(test, id, generation, &[3, 4]).taken, [true, true]);
    }
    assert_eq!(test.store().room(), room, "replaced pages still take room");
    expect_pages(test, id, &[(3, 20), (4, 20)], &[]);
    expect_pages(test, id, &[], &[(3, 19), (4, 1)]);
}

/// Checks that a put that arrives after a newer one changes nothing, and reports this.
pub fn rule_10_a_put_never_replaces_a_newer_generation(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    assert_eq!(put(test, id, 5, &[8]).taken, [true]);
    for late in [4, 0, 1] {
        assert_eq!(put(test, id, late, &[8]).taken, [false], "generation {late} after 5");
        expect_pages(test, id, &[(8, 5)], &[]);
    }
    // generations are compared as unsigned numbers, also in the upper half of their range
    assert_eq!(put(test, id, u32::MAX, &[8]).taken, [true]);
    assert_eq!(put(test, id, u32::MAX - 1, &[8]).taken, [false]);
    expect_pages(test, id, &[(8, u32::MAX)], &[]);
}

/// Checks a put of which some pages are newer than those in the store and others are older, and
/// that namespaces do not mix.
pub fn rule_10_the_comparison_is_made_for_each_page(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let (other, _) = create(test, 2, Purpose::Attempt);
    put(test, id, 3, &[1, 4]);
    put(test, id, 7, &[2]);
    put(test, other, 9, &[1, 3]);
    assert_eq!(put(test, id, 5, &[1, 2, 3, 4]).taken, [true, false, true, true]);
    expect_pages(test, id, &[(1, 5), (2, 7), (3, 5), (4, 5)], &[]);
    expect_pages(test, other, &[(1, 9), (3, 9)], &[(2, 7), (4, 5)]);
}

/// Checks that a put that a network delivers twice is acknowledged both times in the same way.
pub fn rule_10_a_repeated_put_counts_as_taken(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let first = put(test, id, 5, &[1, 2]);
    assert_eq!(put(test, id, 5, &[1, 2]), first);
    expect_pages(test, id, &[(1, 5), (2, 5)], &[]);
}

/// Checks that namespace, page and generation alone identify a value, however the writer and the
/// reader divide pages into runs.
pub fn rule_10_readers_may_cut_runs_as_they_like(test: &mut dyn TestStore) {
    let (id, _) = create(test, 1, Purpose::Home);
    let pages: Vec<u64> = (100..164).collect();
    for (at, run) in pages.chunks(7).enumerate() {
        put(test, id, at as u32 + 1, run);
    }
    let located: Vec<_> = pages.iter().enumerate().map(|(at, &page)| (page, at as u32 / 7 + 1)).collect();
    for len in [1, 5, 64] {
        for run in located.chunks(len) {
            expect_pages(test, id, run, &[]);
        }
    }
    let odd: Vec<_> = located.iter().copied().filter(|(page, _)| page % 2 == 1).collect();
    expect_pages(test, id, &odd, &[(2, 1), (200, 3)]);
    assert!(matches!(try_put(test, id, 99, &[5, 4]), Err(StoreError::BadRun(_))));
}
