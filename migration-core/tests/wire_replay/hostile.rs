//! Everything that can be wrong with a stream.

use bytes::Bytes;
use migration_core::{
    PageRange,
    state::VmState,
    wire::{Bulk, Content, Control, Extent, Header, Preamble},
};

use crate::{
    guest::layout,
    streams::{Stream, frames, renumber, spoilt, stream, with_header},
};
/// Every bit of the format but page data without checksum is covered by one: no flipped byte goes
/// unnoticed.
#[test]
pub(crate) fn a_flipped_byte_anywhere() {
    let name = "stop-and-copy-crc";
    let good = stream(name);
    for lane in 0..good.lanes.len() {
        for at in positions(&good, lane) {
            let what = format!("byte {at} of lane {lane} is flipped");
            spoilt(name, &good, &what, &|l, bytes| {
                if l == lane {
                    bytes[at] ^= 0x41;
                }
            });
        }
    }
}

#[test]
pub(crate) fn cut_after_any_byte() {
    let name = "pre-copy";
    let good = stream(name);
    for lane in 0..good.lanes.len() {
        for at in positions(&good, lane) {
            spoilt(name, &good, &format!("lane {lane} is cut after {at} bytes"), &|l, bytes| {
                if l == lane {
                    bytes.truncate(at);
                }
            });
        }
    }
}

/// Every byte of preambles, headers and bodies, and some of page data.
pub(crate) fn positions(stream: &Stream, lane: usize) -> Vec<usize> {
    let bytes = &stream.lanes[lane];
    let starts = frames(bytes);
    let is_payload = |at: usize| {
        let start = starts.partition_point(|&s| s <= at).checked_sub(1).map(|i| starts[i]);
        start.is_some_and(|start| {
            let header = Header::decode(bytes[start..].first_chunk().unwrap()).unwrap();
            at >= start + Header::LEN + header.body as usize
        })
    };
    (0..bytes.len()).filter(|&at| !is_payload(at) || at % 509 == 0).collect()
}

#[test]
pub(crate) fn replayed_and_reordered_frames() {
    let name = "pre-copy";
    let good = stream(name);
    for lane in 0..good.lanes.len() {
        let starts = frames(&good.lanes[lane]);
        let count = starts.len() - 1;
        for i in 0..count {
            let frame = good.lanes[lane][starts[i]..starts[i + 1]].to_vec();
            let twice = |bytes: &mut Vec<u8>| drop(bytes.splice(starts[i + 1]..starts[i + 1], frame.iter().copied()));
            if lane == 0 && i == count - 1 {
                // behind *done* nothing is read
                continue;
            }
            let why = spoilt(name, &good, &format!("frame {i} of lane {lane} comes twice"), &|l, bytes| {
                if l == lane {
                    twice(bytes);
                }
            });
            let running = lane == 0 && i == count - 2;
            // what comes behind the end of the last round may find the VM running already, and its
            // lane closed
            let behind_the_end = lane != 0 && i == count - 1 && why.is_empty();
            assert!(running || behind_the_end || why.contains("sequence") || why.contains("link"), "{why}");
            if i + 1 < count {
                spoilt(name, &good, &format!("frames {i} and {} of lane {lane} are swapped", i + 1), &|l, bytes| {
                    if l == lane {
                        bytes[starts[i]..starts[i + 2]].rotate_left(frame.len());
                    }
                });
            }
        }
    }
}

/// What the event must say, which lane is changed, and how.
pub(crate) type Case = (&'static str, usize, Box<dyn Fn(&mut Vec<u8>)>);

/// With right checksums and sequence numbers, and yet wrong.
#[test]
pub(crate) fn well_formed_nonsense() {
    let name = "pre-copy";
    let good = stream(name);
    let control = frames(&good.lanes[0]);
    let kinds: Vec<u8> = control[..control.len() - 1].iter().map(|&at| good.lanes[0][at]).collect();
    let position = |kind: u8| control[kinds.iter().position(|&k| k == kind).unwrap()];
    let cases: Vec<Case> = vec![
        ("body: length 4294967295", 0, Box::new(move |b| with_header(b, Preamble::LEN, |h| h.body = u32::MAX))),
        ("payload: length 4294967295", 1, Box::new(|b| with_header(b, Preamble::LEN, |h| h.payload = u32::MAX))),
        ("no VM 7", 1, Box::new(|b| with_header(b, Preamble::LEN, |h| h.vm = 7))),
        ("generation", 1, Box::new(|b| with_header(b, Preamble::LEN, |h| h.number = 2))),
        ("magic", 0, Box::new(|b| b[..8].copy_from_slice(b"GET / HT"))),
        ("versions", 0, {
            Box::new(|b| {
                let mut preamble = Preamble::decode(b.first_chunk().unwrap()).unwrap();
                (preamble.oldest, preamble.newest) = (7, 9);
                b[..Preamble::LEN].copy_from_slice(&preamble.encode());
            })
        }),
        ("outside RAM", 1, Box::new(|b| replace(b, 0, &zeros(layout().pages() - 1, 2)))),
        ("do not belong to lane", 1, Box::new(|b| replace(b, 0, &zeros(512, 1)))),
        ("the round had", 1, Box::new(|b| replace(b, 0, &Bulk::RoundEnd { pages: 99 }))),
        (
            "no frame of a bulk lane",
            1,
            Box::new(|b| b.splice(Preamble::LEN.., Control::Run.encode(0, 0, 1)).for_each(drop)),
        ),
        ("state is not complete", 0, {
            // the state is left out
            let (from, to) = (position(0x06), position(0x07));
            Box::new(move |b| {
                b.drain(from..to);
                renumber(b);
            })
        }),
        ("place in phase", 0, {
            // *run* before *offer*
            let (offer, run, done) = (position(0x07), position(0x09), position(0x0b));
            Box::new(move |b| {
                b[offer..done].rotate_left(run - offer);
                renumber(b);
            })
        }),
        ("no vCPU", 0, {
            let (from, to) = (position(0x06), position(0x07));
            Box::new(move |b| {
                let empty = Control::State(Bytes::from(VmState::default().encode())).encode(0, 0, 1);
                b.splice(from..to, empty).for_each(drop);
                let offer = frames_until(b, 0x07);
                let end = offer + Header::LEN + 13;
                let bytes = Control::Offer { generation: 2, state_bytes: 4, running: true }.encode(0, 0, 1);
                b.splice(offer..end, bytes).for_each(drop);
                renumber(b);
            })
        }),
    ];
    for (expected, lane, change) in &cases {
        let why = spoilt(name, &good, expected, &|l, bytes| {
            if l == *lane {
                change(bytes);
            }
        });
        assert!(why.contains(expected), "{expected}: {why}");
    }
}

pub(crate) fn frames_until(lane: &[u8], kind: u8) -> usize {
    frames(lane).into_iter().find(|&at| lane[at] == kind).unwrap()
}

pub(crate) fn zeros(first: u64, count: u64) -> Bulk {
    let extents = vec![Extent { range: PageRange::new(first, count), content: Content::Zero }];
    Bulk::Pages { extents, payload_crc: 0 }
}

/// Puts `frame` at the place of a bulk lane's first one; what follows is out of sequence, but is
/// never read.
pub(crate) fn replace(lane: &mut Vec<u8>, index: usize, frame: &Bulk) {
    let starts = frames(lane);
    drop(lane.splice(starts[index]..starts[index + 1], frame.encode(0, index as u32, 1)));
}
