//! The whole receiver under arbitrary bytes on all its lanes.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = migration_fuzz::receiver::check(input);
});
