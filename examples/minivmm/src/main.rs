//! A small reference VMM.
fn main() {}
