//! Sequences of inputs for the protocol machines.

#[path = "../../migration-core/tests/machine_props/world.rs"]
mod world;

/// The first byte says which world: a destination alone, a source alone, or both over a bad link.
pub fn check(input: &[u8]) {
    match input {
        [0, rest @ ..] => world::lone_destination(rest),
        [1, rest @ ..] => world::lone_source(rest),
        [_, rest @ ..] => drop(world::pair(rest)),
        [] => {}
    }
}
