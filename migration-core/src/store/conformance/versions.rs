//! Checks whether a [`VersionStore`] does what its users rely on.
//!
//! To test a store, implement [`TestVersions`].
//! [`version_store_conformance!`](crate::version_store_conformance) then writes a test for each
//! function:
//!
//! ```
//! mod tests {
//!     use migration_core::store::{MemoryVersions, VersionStore, conformance::versions::TestVersions};
//!
//!     #[derive(Default)]
//!     struct InMemory(MemoryVersions);
//!
//!     impl TestVersions for InMemory {
//!         fn store(&mut self) -> &mut dyn VersionStore {
//!             &mut self.0
//!         }
//!     }
//!
//!     migration_core::version_store_conformance!(InMemory::default);
//! }
//! ```

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
};

use bytes::Bytes;

use super::Random;
use crate::{PAGE_SIZE, store::VersionStore};

/// The number of pages of the VM under test. A store must accept pages below this number.
pub const VM_PAGES: u64 = 1000;

/// A store under test for a VM with [`VM_PAGES`] pages. It is new and empty.
pub trait TestVersions {
    /// Returns the store.
    fn store(&mut self) -> &mut dyn VersionStore;

    /// Returns whether the store accepts another version after a commit.
    fn takes_several(&self) -> bool {
        true
    }

    /// Makes the process that uses the store crash, and another one open the store. Does nothing,
    /// and returns `false`, if the store does not outlive its process, or has nothing to be opened
    /// before the first commit.
    fn reopen(&mut self) -> bool {
        false
    }
}

/// Writes a test for each function. The argument is a function or a closure without arguments that
/// returns a new [`TestVersions`].
#[macro_export]
macro_rules! version_store_conformance {
    ($make:expr) => {
        $crate::version_store_conformance! { @tests $make =>
            a_version_counts_from_its_commit_on
            what_was_discarded_was_never_put
            the_last_put_of_a_page_counts
            a_version_builds_on_the_one_before
            pages_are_read_at_random
            a_page_that_is_not_in_the_version_is_an_error
            an_error_of_the_reader_ends_the_reading
            a_version_outlives_the_process
            any_order_of_calls_keeps_versions_whole
        }
    };
    (@tests $make:expr => $($rule:ident)*) => {
        $(
            #[test]
            fn $rule() {
                $crate::store::conformance::versions::$rule(&mut ($make)());
            }
        )*
    };
}

/// The first byte of each page of a version; 0 stands for zeros.
type Contents = BTreeMap<u64, u8>;

fn put(test: &mut dyn TestVersions, page: u64, byte: u8) {
    let content = [byte; PAGE_SIZE];
    test.store().put(page, (byte != 0).then_some(&content)).expect("a page is put");
}

fn state(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// Reads pages, and checks that they are returned once, in order, and complete.
fn read(test: &mut dyn TestVersions, pages: &[u64]) -> (Contents, io::Result<()>) {
    let mut got = Vec::new();
    let result = test.store().read(pages, &mut |page, content| {
        let byte = content.map_or(0, |content| content[0]);
        assert!(content.is_none_or(|content| *content == [byte; PAGE_SIZE]), "page {page} is not whole");
        got.push((page, byte));
        Ok(())
    });
    let numbers: Vec<_> = got.iter().map(|(page, _)| *page).collect();
    assert_eq!(numbers, pages[..numbers.len()], "pages come once and in order");
    (got.into_iter().collect(), result)
}

/// Asserts that the version has exactly the expected pages, by each way of reading them.
fn expect(test: &mut dyn TestVersions, number: u32, text: &str, expected: &Contents) {
    assert_eq!(test.store().latest(), Some((number, state(text))));
    let pages: Vec<_> = expected.keys().copied().collect();
    let set = test.store().list().expect("the pages are listed");
    assert_eq!(set.iter().collect::<Vec<_>>(), pages);
    let (got, result) = read(test, &pages);
    result.expect("the pages are read");
    assert_eq!(got, *expected);
    let mut restored = Vec::new();
    let result = test.store().restore(&mut |page, content| {
        restored.push((page, content.map_or(0, |content| content[PAGE_SIZE - 1])));
        Ok(())
    });
    result.expect("the pages are restored");
    assert_eq!(restored, expected.iter().map(|(&page, &byte)| (page, byte)).collect::<Vec<_>>());
}

fn expect_nothing(test: &mut dyn TestVersions) {
    assert_eq!(test.store().latest(), None);
    assert!(test.store().list().expect("no page is listed").is_empty());
    test.store().restore(&mut |_, _| panic!("a page comes from nowhere")).expect("nothing is restored");
    test.store().read(&[], &mut |_, _| panic!("a page comes from nowhere")).expect("nothing is read");
}

/// Checks that before the commit there is nothing, and after it everything.
pub fn a_version_counts_from_its_commit_on(test: &mut dyn TestVersions) {
    expect_nothing(test);
    for (page, byte) in [(3, 1), (VM_PAGES - 1, 2), (0, 0)] {
        put(test, page, byte);
    }
    expect_nothing(test);
    test.store().commit(1, state("one")).expect("a version is committed");
    expect(test, 1, "one", &BTreeMap::from([(0, 0), (3, 1), (VM_PAGES - 1, 2)]));
}

/// Checks that a version that was interrupted leaves the version before unchanged.
pub fn what_was_discarded_was_never_put(test: &mut dyn TestVersions) {
    if !test.takes_several() {
        return;
    }
    put(test, 1, 9);
    test.store().discard();
    expect_nothing(test);
    put(test, 2, 1);
    test.store().commit(4, state("four")).expect("a version is committed");
    let first = BTreeMap::from([(2, 1)]);
    for byte in [7, 0] {
        put(test, 2, byte);
        put(test, 3, byte);
        expect(test, 4, "four", &first);
        test.store().discard();
        expect(test, 4, "four", &first);
    }
    test.store().commit(5, state("five")).expect("a version of nothing new is committed");
    expect(test, 5, "five", &first);
}

/// Checks that the last put counts if pages are put several times before the commit.
pub fn the_last_put_of_a_page_counts(test: &mut dyn TestVersions) {
    for (page, byte) in [(5, 1), (6, 1), (7, 0), (5, 2), (6, 0), (7, 3), (7, 4)] {
        put(test, page, byte);
    }
    test.store().commit(1, Bytes::new()).expect("a version is committed");
    expect(test, 1, "", &BTreeMap::from([(5, 2), (6, 0), (7, 4)]));
}

/// Checks that pages that were not put since the commit before stay, also over many versions.
pub fn a_version_builds_on_the_one_before(test: &mut dyn TestVersions) {
    if !test.takes_several() {
        return;
    }
    let mut expected = Contents::new();
    for number in 1..20u8 {
        for (page, byte) in [(number.into(), number), (500, number), (501, number % 2)] {
            put(test, page, byte);
            expected.insert(page, byte);
        }
        test.store().commit(number.into(), state("next")).expect("a version is committed");
        expect(test, number.into(), "next", &expected);
    }
}

/// Checks reads of any pages, in runs and alone, as a VM touches them that is started before its
/// RAM was read.
pub fn pages_are_read_at_random(test: &mut dyn TestVersions) {
    let byte = |page: u64| if page.is_multiple_of(5) { 0 } else { page as u8 | 1 };
    let pages: Vec<u64> = (0..VM_PAGES).filter(|page| page % 7 != 3).collect();
    pages.iter().for_each(|&page| put(test, page, byte(page)));
    test.store().commit(1, Bytes::new()).expect("a version is committed");
    let mut random = Random::new(11);
    for _ in 0..50 {
        let keep = 1 + random.below(20);
        let some: Vec<u64> = pages.iter().copied().filter(|_| random.below(keep) == 0).collect();
        let (got, result) = read(test, &some);
        result.expect("the pages are read");
        assert_eq!(got, some.iter().map(|&page| (page, byte(page))).collect());
    }
    for &page in pages.iter().rev().step_by(9) {
        let (got, result) = read(test, &[page]);
        result.expect("a page is read");
        assert_eq!(got, BTreeMap::from([(page, byte(page))]));
    }
}

/// Checks that a page that was never put is missing, and not zeros, and that lists that do not
/// ascend are refused.
pub fn a_page_that_is_not_in_the_version_is_an_error(test: &mut dyn TestVersions) {
    for page in [2, 3, 7] {
        put(test, page, 1);
    }
    test.store().commit(1, Bytes::new()).expect("a version is committed");
    for bad in [&[4][..], &[0, 2], &[2, 3, 4, 7], &[VM_PAGES], &[u64::MAX], &[3, 2], &[2, 2]] {
        let (got, result) = read_any(test, bad);
        assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::InvalidInput), "{bad:?}");
        assert!(got.iter().all(|page| [2, 3, 7].contains(page)), "{bad:?}: {got:?}");
    }
    expect(test, 1, "", &BTreeMap::from([(2, 1), (3, 1), (7, 1)]));
}

fn read_any(test: &mut dyn TestVersions, pages: &[u64]) -> (Vec<u64>, io::Result<()>) {
    let mut got = Vec::new();
    let result = test.store().read(pages, &mut |page, _| {
        got.push(page);
        Ok(())
    });
    (got, result)
}

/// Checks that an error of the reader ends the reading, so that refused pages do not count as read.
pub fn an_error_of_the_reader_ends_the_reading(test: &mut dyn TestVersions) {
    for page in 0..10 {
        put(test, page, 1);
    }
    test.store().commit(1, Bytes::new()).expect("a version is committed");
    let all: Vec<u64> = (0..10).collect();
    for whole in [true, false] {
        let mut count = 0;
        let mut take = |_: u64, _: Option<&[u8; PAGE_SIZE]>| {
            count += 1;
            if count < 4 { Ok(()) } else { Err(ErrorKind::OutOfMemory.into()) }
        };
        let result = match whole {
            true => test.store().restore(&mut take),
            false => test.store().read(&all, &mut take),
        };
        assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::OutOfMemory));
        assert_eq!(count, 4);
    }
}

/// Checks that another process finds the last version, and no page that was put after it.
pub fn a_version_outlives_the_process(test: &mut dyn TestVersions) {
    put(test, 3, 1);
    put(test, 9, 0);
    test.store().commit(6, state("six")).expect("a version is committed");
    let mut expected = BTreeMap::from([(3, 1), (9, 0)]);
    if !test.reopen() {
        return;
    }
    expect(test, 6, "six", &expected);
    if test.takes_several() {
        put(test, 3, 2);
        put(test, 4, 2);
        test.reopen();
        expect(test, 6, "six", &expected);
        put(test, 4, 7);
        test.store().commit(7, state("seven")).expect("a version is committed");
        test.reopen();
        expected.insert(4, 7);
        expect(test, 7, "seven", &expected);
    }
}

/// Checks random calls against a simple model.
pub fn any_order_of_calls_keeps_versions_whole(test: &mut dyn TestVersions) {
    if !test.takes_several() {
        return;
    }
    let mut random = Random::new(5);
    let (mut staged, mut committed, mut number) = (Contents::new(), None::<Contents>, 0);
    for _ in 0..300 {
        match random.below(12) {
            0 => {
                number += 1;
                test.store().commit(number, state("any")).expect("a version is committed");
                committed.get_or_insert_default().append(&mut staged);
            }
            1 => {
                test.store().discard();
                staged.clear();
            }
            2 if committed.is_some() && test.reopen() => staged.clear(),
            _ => {
                let (page, byte) = (random.below(20), random.below(3) as u8);
                put(test, page, byte);
                staged.insert(page, byte);
            }
        }
        match &committed {
            Some(committed) => expect(test, number, "any", committed),
            None => expect_nothing(test),
        }
    }
}
