//! A stream of records that is changed on its way: what is handed out is the beginning of what was
//! sent.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::records::check(input));
