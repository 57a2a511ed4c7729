//! The encoding of every frame.

use std::fs;

use bytes::Bytes;
use migration_core::{
    PageRange,
    page_map::StoreCopy,
    paged_memory::{EntryStore, StoreEntry},
    store::{Incarnation, Namespace},
    wire::{
        Bulk, Checkpoint, Content, Control, ErrorCode, Extent, FEATURE_PAYLOAD_CRC, FaultSummary, Header, Hello,
        LaneKind, Located, Preamble, SessionToken, TablePart, Welcome,
    },
};

use crate::{
    VM,
    guest::{description, piece, state},
    streams::{folder, recording},
};
/// One of each frame, with every field set.
pub(crate) fn samples() -> Vec<(String, Vec<u8>)> {
    let token = SessionToken(*b"a session token.");
    let hello = Hello { features: FEATURE_PAYLOAD_CRC, streams: 4, strategy: "pre-copy".into(), vm: description() };
    let control = [
        Control::Hello(Box::new(hello)),
        Control::Welcome(Welcome { version: 1, features: FEATURE_PAYLOAD_CRC, streams: 4, session: token }),
        Control::Prepared { load_us: None },
        Control::RoundReceived { generation: 3 },
        Control::Piece(piece()),
        Control::State(Bytes::from(state().encode())),
        Control::Offer { generation: 4, state_bytes: 5, running: true },
        Control::Ready,
        Control::Run,
        Control::Running,
        Control::Done,
        Control::Abandon,
        Control::Reattach(VM),
        Control::error(ErrorCode::Mismatch, "no AVX-512"),
        Control::Ping,
        Control::Pong,
    ];
    let extent = |first, count, content| Extent { range: PageRange::new(first, count), content };
    let extents = vec![extent(1, 2, Content::Plain), extent(7, 300, Content::Zero), extent(510, 1, Content::Plain)];
    let bulk =
        [("pages", Bulk::Pages { extents, payload_crc: 0xdead_beef }), ("round end", Bulk::RoundEnd { pages: 303 })];
    let preamble = |kind| (format!("preamble {kind:?}"), Preamble::new(kind, 2, token).encode().to_vec());
    let preambles = [LaneKind::Control, LaneKind::Bulk, LaneKind::Reattach].map(preamble);
    let control = control.iter().map(|f| (f.name().to_owned(), f.encode(0, 17, 3)));
    let bulk = bulk.iter().map(|(name, f)| ((*name).to_owned(), f.encode(0, 18, 4)));
    // what was added later stands at the end, so that the lines before it stay as they are
    let summary =
        FaultSummary { count: 1, vcpu: 2, p50_us: 3, p90_us: 4, p99_us: 5, p999_us: 6, max_us: 7, duplicates: 8 };
    let post_copy = [
        Control::Missing { first: 128, bitmap: Bytes::from_static(&[1, 2, 3, 4, 5, 6, 7, 8]) },
        Control::PostCopy { missing: 13, demand_lanes: 2 },
        Control::Complete(summary),
    ];
    let post_copy = post_copy.map(|f| (f.name().to_owned(), f.encode(0, 19, 3)));
    let request = ("request".to_owned(), Bulk::Request { pages: vec![513, 3] }.encode(0, 20, 5));
    let every =
        Checkpoint::Every { interval_us: 100_000, detect_us: 1_000_000, identity: Bytes::from_static(b"source") };
    let checkpoints = [
        ("every", every),
        ("identity", Checkpoint::Identity(Bytes::from_static(b"destination"))),
        ("checkpoint state", Checkpoint::State(Bytes::from_static(b"state"))),
        ("commit", Checkpoint::Commit { pages: 7, state_bytes: 5 }),
        ("committed", Checkpoint::Committed),
    ];
    let checkpoints = checkpoints.map(|(name, f)| (name.to_owned(), f.encode(21, 6)));
    let later = [preamble(LaneKind::Demand)].into_iter().chain(post_copy).chain([request]);
    let later = later.chain([preamble(LaneKind::Checkpoint)]).chain(checkpoints);
    let prepared = Control::Prepared { load_us: Some(1500) }.encode(0, 22, 3);
    let later = later.chain([("prepared, with a time to load".to_owned(), prepared)]).chain(stores());
    preambles.into_iter().chain(control).chain(bulk).chain(later).collect()
}

/// What is said about pages in stores.
fn stores() -> Vec<(String, Vec<u8>)> {
    let store = |name: &str, byte| EntryStore { name: name.into(), incarnation: Incarnation([byte; 16]) };
    let replicated = vec![store("rack-7", 2), store("rack-8", 3)];
    let entries = [(1, replicated), (4, vec![store("home", 5)])];
    let entries = entries.map(|(byte, stores)| StoreEntry::new(Namespace::new([byte; 16]), stores).unwrap());
    let located = Located {
        copy: StoreCopy { entry: 1, generation: 6 },
        held: true,
        runs: vec![PageRange::new(3, 2), PageRange::new(700, 1)],
    };
    let frames = [
        Control::StoreTable(TablePart {
            number: 2,
            gather_rate: None,
            must_answer: true,
            first: 0,
            entries: entries.to_vec(),
        }),
        Control::StoreTableReceived { number: 2 },
        Control::Located(located),
        Control::Vacated { number: 1 },
        Control::Released(FaultSummary { count: 1, max_us: 7, ..FaultSummary::default() }),
        Control::EntryLost { entry: 1 },
    ];
    let frames = frames.iter().map(|f| (f.name().to_owned(), f.encode(0, 23, 3)));
    let mark = ("vacated, on a bulk lane".to_owned(), Bulk::Vacated { number: 1 }.encode(0, 24, 5));
    frames.chain([mark]).collect()
}

#[test]
pub(crate) fn every_frame_is_encoded_as_it_always_was() {
    let file = folder().join("frames.txt");
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let lines: String = samples().iter().map(|(name, bytes)| format!("{name}: {}\n", hex(bytes))).collect();
    if recording() {
        fs::create_dir_all(folder()).unwrap();
        fs::write(&file, &lines).unwrap();
    }
    let golden = fs::read_to_string(&file).unwrap();
    for (line, expected) in lines.lines().zip(golden.lines()) {
        assert_eq!(line, expected);
    }
    assert_eq!(lines.lines().count(), golden.lines().count());
    let code = |code| Control::error(code, "").encode(0, 0, 0)[Header::LEN];
    use ErrorCode::*;
    let first = [Other, Version, Protocol, Busy, Mismatch, State, Resources, Cancelled, UnknownSession];
    let codes = first.into_iter().chain([StaleEpoch, Security, VmEnded]);
    assert!(codes.map(code).eq(0..12), "error codes keep their numbers");
}
