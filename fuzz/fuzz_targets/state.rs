//! Fuzzes the state of a VM, and the sections and host needs of migration-kvm.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| migration_fuzz::state::check(input));
