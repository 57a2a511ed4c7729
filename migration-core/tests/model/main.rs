//! The rules of the design as an executable model, and a checker that explores every state of it.
//!
//! `docs/model.md` says what is modelled, how to run it, and what happens without each sentence of
//! the rules.
#![forbid(unsafe_code)]

mod blocks;
mod configurations;
mod contents;
mod eviction;
mod experiments;
mod free;
mod hops;
mod pause;
mod replicas;
mod rules;
mod search;
mod session;
mod staging;
mod successor;
mod table;

use configurations::{Configuration, combinations, large, small};
use experiments::{Expected, experiment};
use rules::{Rule, Rules};
use search::{Counterexample, Violation};
use session::Session;
use std::time::Instant;

/// More states than any configuration has that runs with the other tests.
const SMALL: usize = 400_000;

/// More states than any of the large configurations has. Each takes some 400 bytes.
const LARGE: usize = 8_000_000;

#[test]
fn no_property_is_broken_with_all_rules() {
    for configuration in small() {
        holds(&configuration, SMALL);
    }
}

#[test]
#[ignore = "takes minutes and gigabytes"]
fn no_property_is_broken_at_length() {
    for configuration in large() {
        holds(&configuration, LARGE);
    }
}

#[test]
fn no_two_events_break_a_property() {
    explore_combinations(2, Rules::all(), SMALL);
}

#[test]
#[ignore = "takes minutes"]
fn no_three_events_break_a_property_at_length() {
    explore_combinations(3, Rules::all(), SMALL);
}

#[test]
fn every_sentence_is_needed_or_covered() {
    for &rule in Rule::ALL {
        let experiment = experiment(rule);
        let found = explore(experiment.configuration, experiment.rules(rule));
        let expected = match experiment.expected {
            Expected::Broken(violation) | Expected::CoveredBy(_, violation) => Some(violation),
            Expected::Nothing => None,
        };
        assert_eq!(violation(&found), expected, "without {rule:?} in \"{}\"", experiment.configuration);
        if let Expected::CoveredBy(other, _) = experiment.expected {
            let alone = explore(experiment.configuration, Rules::all().without(rule));
            assert_eq!(violation(&alone), None, "{other:?} covers for {rule:?}");
        }
    }
}

#[test]
#[ignore = "takes minutes"]
fn two_events_break_nothing_without_what_is_not_needed_at_length() {
    for &rule in Rule::ALL {
        if !matches!(experiment(rule).expected, Expected::Broken(_)) {
            println!("without {rule:?}:");
            explore_combinations(2, Rules::all().without(rule), LARGE);
        }
    }
}

#[test]
#[ignore = "prints the counterexamples, and checks nothing"]
fn print_counterexamples() {
    for &rule in Rule::ALL {
        let experiment = experiment(rule);
        println!("\n{} {rule:?}: {}", rule.number(), rule.sentence());
        match explore(experiment.configuration, experiment.rules(rule)) {
            Some(counterexample) => println!("  \"{}\": {counterexample}", experiment.configuration),
            None => println!("  \"{}\": nothing is broken", experiment.configuration),
        }
    }
}

#[test]
fn the_documentation_names_every_sentence_and_every_configuration() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/model.md");
    let text = std::fs::read_to_string(path).expect("docs/model.md can be read");
    for &rule in Rule::ALL {
        let experiment = experiment(rule);
        let start = format!("| {} | `{rule:?}` |", rule.number());
        let row = text.lines().find(|line| line.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("docs/model.md has no row that begins with {start}"));
        let end = format!("| {} |", experiment.configuration);
        assert!(row.ends_with(&end), "the row of {rule:?} ends with {end}");
        assert!(row.contains(outcome(experiment.expected)), "the row of {rule:?} names the outcome");
    }
    for configuration in small().iter().chain(&large()) {
        let cell = format!("| {} |", configuration.name);
        assert!(text.contains(&cell), "docs/model.md describes \"{}\"", configuration.name);
    }
}

/// Returns the word for an outcome that the table in `docs/model.md` uses.
fn outcome(expected: Expected) -> &'static str {
    match expected {
        Expected::Nothing => "**nothing**",
        Expected::Broken(violation) | Expected::CoveredBy(_, violation) => match violation {
            Violation::WrongContent => "**wrong content**",
            Violation::ContentLost => "**content lost**",
            Violation::TwoOwners => "**two owners**",
            Violation::Stuck => "**stuck**",
            Violation::LeftOver => "**left over**",
            Violation::SentTwice => "**sent twice**",
            Violation::BoundExceeded => "**bound exceeded**",
        },
    }
}

/// Explores the configuration with all rules.
fn holds(configuration: &Configuration, limit: usize) {
    let start = Instant::now();
    let explored = configuration.explore(Rules::all(), limit);
    let name = configuration.name;
    println!("{name}: {} states in {:.1} s", explored.states, start.elapsed().as_secs_f32());
    if let Some(counterexample) = explored.counterexample {
        panic!("\"{name}\": {counterexample}");
    }
    assert!(!explored.truncated, "\"{name}\" has more than {limit} states");
}

/// Explores the session with every combination of `events` kinds of events.
fn explore_combinations(events: u32, rules: Rules, limit: usize) {
    let mut states = 0;
    for session in combinations(events).map(|session| Session { rules, ..session }) {
        let explored = search::explore(&session, limit);
        states += explored.states;
        if let Some(counterexample) = explored.counterexample {
            panic!("{session:?}: {counterexample}");
        }
        assert!(!explored.truncated, "{session:?} has more than {limit} states");
    }
    println!("combinations of {events} kinds of events: {states} states");
}

/// Explores a small configuration with some of the rules.
fn explore(name: &str, rules: Rules) -> Option<Counterexample> {
    let all = small();
    let configuration = all.iter().find(|configuration| configuration.name == name);
    let configuration = configuration.unwrap_or_else(|| panic!("there is no configuration \"{name}\""));
    let explored = configuration.explore(rules, SMALL);
    let complete = explored.counterexample.is_some() || !explored.truncated;
    assert!(complete, "\"{name}\" has more than {SMALL} states");
    explored.counterexample
}

fn violation(found: &Option<Counterexample>) -> Option<Violation> {
    found.as_ref().map(|counterexample| counterexample.violation)
}
