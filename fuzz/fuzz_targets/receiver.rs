//! Fuzzes the whole receiver with arbitrary bytes on all of its lanes.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = migration_fuzz::receiver::check(input);
});
