//! Whatever comes in whatever order: one owner, complete VMs only, epochs that never go back.
//!
//! The sequences and what must hold after each step are those of the fuzz target `protocol`; here they run with every
//! `cargo test`, from random bytes.

#[path = "machine_props/world.rs"]
mod world;

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
