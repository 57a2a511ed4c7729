//! Fuzzes both protocol machines with any sequence of frames, commands, losses and replays.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::protocol::check(input));
