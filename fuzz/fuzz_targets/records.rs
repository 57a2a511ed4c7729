//! Fuzzes a stream of records that is changed in transit: the receiver must get a prefix of what
//! was sent.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::records::check(input));
