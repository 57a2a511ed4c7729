//! Both sides of a handshake, with arbitrary bytes for the other one.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::handshake::check(input));
