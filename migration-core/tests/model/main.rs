//! The rules of the design as an executable model, and a checker that explores it.
//!
//! See `docs/model.md`.
#![forbid(unsafe_code)]

mod rules;
mod search;
mod session;

use rules::Rules;
use search::explore;
use session::{Budget, Session};

#[test]
fn try_one() {
    let budget = Budget { writes: 2, attempts: 1, attempt_puts: 1, ..Budget::default() };
    let model = Session {
        rules: Rules::all(), pages: 1, stores: 1, rounds: true, fetch: false, forgetful: false, late_create: false, budget,
    };
    let start = std::time::Instant::now();
    let explored = explore(&model, 3_000_000);
    println!("{} states, {} in {:?}", explored.states, explored.truncated, start.elapsed());
    if let Some(counterexample) = explored.counterexample {
        panic!("{counterexample}");
    }
}
