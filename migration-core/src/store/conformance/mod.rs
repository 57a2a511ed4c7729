//! Checks whether a [`PageStore`] keeps the rules of page stores, and in [`versions`] whether a
//! [`VersionStore`](super::VersionStore) does what its users rely on. Needs the feature
//! `test-utils`.
//!
//! There is a function for each rule, which panics if the store breaks the rule. To test a store,
//! implement [`TestStore`] for the code that makes and harms it.
//! [`page_store_conformance!`](crate::page_store_conformance) then writes a test for each function:
//!
//! ```
//! mod tests {
//!     use migration_core::store::conformance::InMemory;
//!
//!     migration_core::page_store_conformance!(InMemory::default);
//! }
//! ```

mod attempts;
mod bounds;
mod in_memory;
mod leases;
mod model;
mod names;
mod pages;
pub mod versions;

use std::time::{Duration, Instant};

pub use attempts::*;
pub use bounds::*;
pub use in_memory::InMemory;
pub use leases::*;
pub use model::*;
pub use names::*;
pub use pages::*;

use super::{
    Incarnation, Namespace, NamespaceId, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, StoreError, Stored,
    Urgency, VmNamespace,
    limits::{MAX_LEASE, MAX_NAMESPACES},
};
use crate::{PAGE_SIZE, vm_id::VmId};

/// A store under test. It is new and empty, and has no other users.
///
/// It has room for at least 1 MiB and at most 64 MiB.
pub trait TestStore {
    /// Returns the store.
    fn store(&self) -> &dyn PageStore;

    /// Introduces a name to a store that needs it, such as one that seals pages. Called before the
    /// suite creates the namespace.
    fn introduce(&mut self, name: &Namespace, vm: VmId) {
        let _ = (name, vm);
    }

    /// Returns the largest number of namespaces that the store keeps, if the test has set it to
    /// fewer than [`MAX_NAMESPACES`].
    fn max_namespaces(&self) -> usize {
        MAX_NAMESPACES
    }

    /// Advances the store's clock.
    fn advance(&mut self, by: Duration);

    /// Makes a process that uses the store crash, and another one open the store. Does nothing for
    /// a store that lives in the process itself.
    fn crash_user(&mut self) {}

    /// Makes the store lose everything that it keeps, in a way that it notices.
    fn lose_everything(&mut self);

    /// Harms a page that is in the store, in a way that the store does not notice. Returns whether
    /// this was possible.
    fn harm(&mut self, namespace: NamespaceId, page: u64, harm: Harm) -> bool;
}

/// A damage of a page in a store that the store does not notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// The page is lost.
    Lose,
    /// A bit of the value changes.
    Damage,
    /// The trailer is lost. A table of trailers reads as zeros at its place.
    LoseTrailer,
    /// The value and the trailer of the page are replaced by those of this other page, which is in
    /// the store too.
    MixUp(u64),
}

/// Writes a test for each rule. The argument is a function or a closure without arguments that
/// returns a new [`TestStore`]. After the word `optional` it returns an `Option`: the tests do
/// nothing if it is `None`, for example because a server is not installed.
#[macro_export]
macro_rules! page_store_conformance {
    (optional $make:expr) => {
        $crate::page_store_conformance! { @tests $make =>
            rule_03_a_page_comes_back_as_it_was_put
            rule_03_an_absent_page_is_missing_and_never_zeros
            rule_03_another_generation_is_missing
            rule_03_a_harmed_page_is_missing
            rule_03_a_new_put_heals_a_harmed_page
            rule_03_zeros_are_never_put
            rule_08_a_store_does_not_ask_who_the_owner_is
            rule_09_a_namespace_keeps_only_the_newest_put_of_a_page
            rule_09_a_namespace_is_forgotten_as_a_whole
            rule_10_a_put_never_replaces_a_newer_generation
            rule_10_the_comparison_is_made_for_each_page
            rule_10_a_repeated_put_counts_as_taken
            rule_10_readers_may_cut_runs_as_they_like
            rule_10_a_put_never_creates_a_namespace
            rule_10_a_put_into_a_forgotten_namespace_fails
            rule_10_a_late_create_of_a_forgotten_namespace_fails
            rule_10_a_create_that_arrives_after_its_forget_fails
            rule_10_forgotten_ids_are_not_remembered_for_ever
            rule_10_delayed_repeated_and_reordered_messages_are_harmless
            rule_11_every_answer_has_the_present_incarnation
            rule_11_a_loss_changes_the_incarnation
            rule_11_a_crash_of_a_user_loses_nothing
            rule_14_a_lease_that_has_ended_deletes_nothing
            rule_14_expired_namespaces_are_listed_with_their_records
            rule_14_a_lease_is_never_shortened
            rule_14_to_forget_twice_is_harmless
            rule_14_nothing_is_left_after_success
            rule_14_a_failed_attempt_leaves_only_what_was_there_before
            rule_14_what_a_crashed_source_leaves_is_listed
            rule_14_what_a_crashed_destination_leaves_is_listed
            rule_24_a_record_says_whose_a_namespace_is
            rule_24_a_namespace_of_another_vm_is_not_taken_over
            rule_24_a_namespace_is_for_the_vm_of_its_record_only
            bounds_runs_and_values_are_limited
            bounds_leases_are_limited
            bounds_namespaces_are_limited
            bounds_a_full_store_takes_a_put_whole_or_not_at_all
            bounds_a_get_ends_at_its_deadline
            bounds_no_lock_is_held_while_pages_are_handed_out
        }
    };
    (@tests $make:expr => $($rule:ident)*) => {
        $(
            #[test]
            fn $rule() {
                if let ::core::option::Option::Some(mut test) = ($make)() {
                    $crate::store::conformance::$rule(&mut test);
                }
            }
        )*
    };
    ($make:expr) => {
        $crate::page_store_conformance! { optional || ::core::option::Option::Some(($make)()) }
    };
}

const VM: VmId = VmId([0x11; 16]);
const OTHER_VM: VmId = VmId([0x22; 16]);
const SOURCE: Owner = owner("source");
const DESTINATION: Owner = owner("destination");
const LEASE: Duration = Duration::from_secs(60);

const fn owner(text: &str) -> Owner {
    match Owner::new(text) {
        Ok(owner) => owner,
        Err(_) => panic!("an owner is printable"),
    }
}

/// Introduces the name of namespace `number`. Returns the reference to the namespace.
fn introduce(test: &mut dyn TestStore, number: u8, vm: VmId) -> VmNamespace {
    let name = Namespace::new([number; 16]);
    test.introduce(&name, vm);
    name.of(vm)
}

fn record(purpose: Purpose) -> Record {
    Record { vm: VM, purpose, owner: SOURCE }
}

/// Creates namespace `number` of the source.
fn create(test: &mut dyn TestStore, number: u8, purpose: Purpose) -> (VmNamespace, Incarnation) {
    let id = introduce(test, number, VM);
    let incarnation = test.store().create(id.id, &record(purpose), LEASE).expect("a new namespace is created");
    (id, incarnation)
}

/// Returns the value of a page in a generation. No two values are equal, and none has only zeros.
fn value(page: u64, generation: u32) -> Vec<u8> {
    value_of_len(page, generation, PAGE_SIZE)
}

fn value_of_len(page: u64, generation: u32, len: usize) -> Vec<u8> {
    let mut random = Random::new(page.wrapping_mul(0x1_0000_0000) ^ u64::from(generation));
    let mut value: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    value.truncate(len);
    value[0] |= 1;
    value
}

fn try_put(test: &dyn TestStore, id: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
    let values: Vec<_> = pages.iter().map(|&page| value(page, generation)).collect();
    let run: Vec<_> = pages.iter().zip(&values).map(|(&page, value)| PageToPut { page, value }).collect();
    test.store().put(id, generation, &run)
}

fn put(test: &dyn TestStore, id: VmNamespace, generation: u32, pages: &[u64]) -> Stored {
    try_put(test, id, generation, pages).expect("pages are put")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Reads pages, and checks that each is returned at most once, was requested, and has the value
/// that was put. Returns the numbers of the pages that were returned.
fn try_read(test: &dyn TestStore, id: VmNamespace, pages: &[(u64, u32)]) -> (Vec<u64>, Result<(), StoreError>) {
    let wanted: Vec<_> = pages.iter().map(|&(page, generation)| PageToGet { page, generation }).collect();
    let mut got = Vec::new();
    let result = test.store().get(id, &wanted, Urgency::Fault, soon(), &mut |page, data| {
        let asked = pages.iter().find(|asked| asked.0 == page);
        let &(_, generation) = asked.unwrap_or_else(|| panic!("page {page} is handed out, and was not asked for"));
        assert!(data.bytes() == value(page, generation), "page {page} is not what was put in generation {generation}");
        assert!(!got.contains(&page), "page {page} is handed out twice");
        got.push(page);
    });
    got.sort_unstable();
    (got, result)
}

/// Asserts that exactly these of the pages are in the store, in these generations.
fn expect_pages(test: &dyn TestStore, id: VmNamespace, present: &[(u64, u32)], absent: &[(u64, u32)]) {
    let mut all = [present, absent].concat();
    all.sort_unstable();
    let (got, result) = try_read(test, id, &all);
    let numbers = |pages: &[(u64, u32)]| pages.iter().map(|page| page.0).collect::<Vec<_>>();
    assert_eq!(got, numbers(present), "pages that the store has");
    match result {
        Ok(()) => assert!(absent.is_empty(), "pages {absent:?} are not said to be missing"),
        Err(StoreError::Missing { namespace, count, first }) => {
            let missing = numbers(absent);
            assert_eq!((namespace, count, Some(&first)), (id.id, missing.len() as u64, missing.iter().min()));
        }
        Err(error) => panic!("reading failed: {error}"),
    }
}

/// Returns the namespaces that are left in the store after all leases have ended.
fn left(test: &mut dyn TestStore) -> Vec<(NamespaceId, Record)> {
    test.advance(MAX_LEASE + LEASE);
    test.store().expired().expect("expired namespaces are listed")
}

/// Asserts that the store keeps nothing, and that its room is what it was.
fn expect_empty(test: &mut dyn TestStore, room: u64) {
    assert_eq!(left(test), [], "namespaces that are left");
    assert_eq!(test.store().room(), room, "room of the empty store");
}

/// A generator of random numbers that are the same in each run (splitmix64).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Returns a number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_rule_has_a_test() {
        let list = include_str!("mod.rs");
        let files = [
            include_str!("attempts.rs"),
            include_str!("bounds.rs"),
            include_str!("leases.rs"),
            include_str!("model.rs"),
            include_str!("names.rs"),
            include_str!("pages.rs"),
        ];
        let rules = files.iter().flat_map(|file| file.split("\npub fn ").skip(1));
        let names: Vec<_> = rules.filter_map(|rule| rule.split('(').next()).collect();
        assert_eq!(names.len(), 39);
        for name in names {
            assert!(list.contains(&format!("            {name}\n")), "{name} is not in the list");
        }
        let versions = include_str!("versions.rs");
        for rule in versions.split("\npub fn ").skip(1) {
            let name = rule.split('(').next().unwrap_or_default();
            assert!(versions.contains(&format!("            {name}\n")), "{name} is not in the list");
        }
    }
}
