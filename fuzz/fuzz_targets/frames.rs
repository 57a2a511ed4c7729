//! Fuzzes preambles, headers and frames of both kinds of lane: input that decodes must encode to
//! the same bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::frames::check(input));
