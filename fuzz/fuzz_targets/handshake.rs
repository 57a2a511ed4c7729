//! Fuzzes both sides of a handshake, with arbitrary bytes from the other side.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::handshake::check(input));
