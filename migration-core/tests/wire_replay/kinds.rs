//! The table of frame kinds: each kind has a recorded frame, and a seed of the fuzz target
//! `frames`.

use std::{collections::BTreeSet, fs, path::Path};

use migration_core::wire::{Bulk, Checkpoint, Control, FRAME_KINDS, Header, Lanes, frame_kind};

use crate::golden::samples;

/// Pages of the VM that the seeds are about.
const PAGES: u64 = 1 << 20;

/// Returns the kinds of the table that are not among these numbers.
fn absent(codes: &BTreeSet<u8>) -> Vec<&'static str> {
    FRAME_KINDS.iter().filter(|kind| !codes.contains(&kind.code)).map(|kind| kind.name).collect()
}

/// Decodes one frame with the decoder of its lanes; returns its number.
fn decode(name: &str, bytes: &[u8]) -> u8 {
    let (head, rest) = bytes.split_first_chunk().unwrap_or_else(|| panic!("{name} is shorter than a header"));
    let header = Header::decode(head).unwrap();
    let body = rest.get(..header.body as usize).unwrap_or_else(|| panic!("{name} ends in its body"));
    let kind = frame_kind(header.kind).unwrap_or_else(|| panic!("{name} is of no kind"));
    let decoded = match kind.lanes {
        Lanes::Control => Control::decode(&header, body).map(drop),
        Lanes::Bulk => Bulk::decode(&header, body, PAGES).map(drop),
        Lanes::Checkpoint => Checkpoint::decode(&header, body).map(drop),
    };
    assert_eq!(decoded, Ok(()), "{name}");
    header.kind
}

#[test]
fn every_kind_has_a_recorded_frame() {
    let frames = samples().into_iter().filter(|(name, _)| !name.starts_with("preamble"));
    let codes = frames.map(|(name, bytes)| decode(&name, &bytes)).collect();
    assert_eq!(absent(&codes), [""; 0]);
}

/// The seeds are made by `cargo run --bin seeds` in `fuzz/`.
#[test]
fn every_kind_has_a_fuzz_seed() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = project.join("fuzz/corpus/frames");
    if !folder.exists() {
        // a packaged crate has no seeds
        return assert!(!project.join("DESIGN.md").exists());
    }
    let mut codes = BTreeSet::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let (what, frame) = bytes.split_first().unwrap();
        // 0 in the lowest two bits is a preamble
        if what & 3 != 0 {
            codes.insert(decode(&path.display().to_string(), frame));
        }
    }
    assert_eq!(absent(&codes), [""; 0]);
}
