//! `minivmm` from end to end: real processes, real KVM, driven through the command line as a user's
//! scripts would.
//!
//! Without /dev/kvm, what needs it is ignored with the reason; with `MIGRATION_REQUIRE_KVM=1` it
//! fails instead.
//!
//! `MIGRATION_TEST_SHUFFLE=SEED` runs the trials in another order for each seed, so that other
//! trials run beside each other.

mod balloon;
mod bench;
mod broker;
mod cold_pages;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod control;
mod convergence;
mod elf;
mod encrypted;
mod ended;
mod ephemeral;
mod expired;
mod fail_safe;
mod faults;
mod files;
mod hand_over;
mod jail;
mod limits;
mod moves;
mod one_edge;
mod output;
mod peers;
mod post_copy;
mod post_copy_faults;
mod refresh;
mod restart;
mod scatter_gather;
mod sealed;
mod snapshot;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    process::ExitCode,
};

use common::{HugePages, Suite};
use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // source, destination and guests of two trials are enough for a small machine
    arguments.test_threads.get_or_insert(2);
    let huge_pages = if arguments.list { Err("only listed".into()) } else { HugePages::reserve() };
    let mut suite = Suite::new(huge_pages.as_ref().err().cloned());
    balloon::add(&mut suite);
    bench::add(&mut suite);
    broker::add(&mut suite);
    moves::add(&mut suite);
    contract::add(&mut suite);
    control::add(&mut suite);
    convergence::add(&mut suite);
    encrypted::add(&mut suite);
    ended::add(&mut suite);
    ephemeral::add(&mut suite);
    expired::add(&mut suite);
    fail_safe::add(&mut suite);
    faults::add(&mut suite);
    files::add(&mut suite);
    hand_over::add(&mut suite);
    limits::add(&mut suite);
    jail::add(&mut suite);
    one_edge::add(&mut suite);
    peers::add(&mut suite);
    output::add(&mut suite);
    post_copy::add(&mut suite);
    post_copy_faults::add(&mut suite);
    refresh::add(&mut suite);
    restart::add(&mut suite);
    cold_pages::add(&mut suite);
    scatter_gather::add(&mut suite);
    sealed::add(&mut suite);
    snapshot::add(&mut suite);
    if let Ok(seed) = std::env::var("MIGRATION_TEST_SHUFFLE") {
        shuffle(&mut suite.trials, &seed);
    }
    let conclusion = libtest_mimic::run(&arguments, suite.trials);
    drop(huge_pages);
    conclusion.exit_code()
}

/// Brings the trials into an order that only the seed and their names decide.
fn shuffle(trials: &mut [Trial], seed: &str) {
    trials.sort_by_cached_key(|trial| {
        let mut hasher = DefaultHasher::new();
        (seed, trial.name()).hash(&mut hasher);
        hasher.finish()
    });
    println!("trials in the order of MIGRATION_TEST_SHUFFLE={seed}");
}
