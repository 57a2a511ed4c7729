//! Whatever comes in whatever order: one owner, complete VMs only, epochs that never go back.
//!
//! The sequences and what must hold after each step are those of the fuzz target `protocol`; here
//! they run with every `cargo test`, from random bytes.

#[path = "machine_props/world.rs"]
mod world;

use migration_core::protocol::SourcePhase;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_destination_alone(input in prop::collection::vec(any::<u8>(), 0..400)) {
        world::lone_destination(&input);
    }

    #[test]
    fn a_source_alone(input in prop::collection::vec(any::<u8>(), 0..400)) {
        world::lone_source(&input);
    }

    #[test]
    fn a_pair_over_a_bad_link(input in prop::collection::vec(any::<u8>(), 0..600)) {
        world::pair(&input);
    }
}

/// The sequences do lead somewhere: one without accidents completes, and so does one that loses the
/// link at *run*.
#[test]
fn an_honest_course_completes() {
    // events: 0 source, 4 to the destination, 7 to the source, 10 destination, 12 the link is lost
    let until_run = [1, 4, 7, 10, 7, 0, 0, 0, 4, 4, 4, 10, 7, 0];
    let completed = |rest: &[u8]| world::pair(&[&until_run[..], rest].concat());
    assert_eq!(completed(&[4, 7]), SourcePhase::Completed);
    assert_eq!(completed(&[12]), SourcePhase::Completed, "run is lost");
    assert_eq!(completed(&[4, 12]), SourcePhase::Completed, "running is lost");
    assert_eq!(world::pair(&until_run[..until_run.len() - 1]), SourcePhase::Ready);
}
