//! The recorded stream `post-copy`: a round while the guest runs, then pages that are left behind.
//! Some of them are touched while the state is loaded, so they come on the demand lane; the others
//! are pushed.

use std::{fs, thread};

use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    engine::{Controller, SourceOptions, migrate},
    protocol::DestinationPhase,
    report::Outcome,
    strategy::{Hybrid, Linear},
    vm::VmDescription,
    wire::{Bulk, Content, Control, Extent, Header, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG, VM,
    channels::End,
    destination::{Destination, said},
    guest::{Arrived, Host, RecordedVm, checksums, description_of, state},
    hostile::positions,
    pager::Paging,
    streams::{Fed, Recorder, Spoil, Stream, as_recorded, check, folder, frames, recording},
};

const NAME: &str = "post-copy";
const LANES: [&str; 4] = ["control", "bulk-0", "bulk-1", "demand-0"];
/// As which the pages move that were left behind.
pub(crate) const GENERATION: u32 = 2;

const BEFORE: [(u64, u8); 6] = [(0, 1), (1, 2), (2, 3), (511, 4), (512, 5), (543, 6)];
/// These pages are left behind.
pub(crate) const DURING: [(u64, u8); 9] =
    [(1, 0), (2, 9), (3, 10), (100, 11), (511, 12), (512, 0), (513, 13), (530, 14), (543, 15)];

pub(crate) fn paged_description() -> VmDescription {
    let regions = vec![RamRegion { gpa: 0, len: 520 << 12 }, RamRegion { gpa: 1 << 30, len: 24 << 12 }];
    description_of(RamLayout::new(regions).unwrap())
}

pub(crate) fn paging() -> Paging {
    let faults = vec![vec![513], vec![3, 513], vec![543]];
    Paging { block_pages: 1, faults, touched: vec![3, 513, 543] }
}

pub(crate) fn guest() -> RecordedVm {
    RecordedVm::of(paged_description(), &BEFORE, &DURING)
}

pub(crate) fn destination() -> Destination {
    Destination::of(HANG, |to| Host { description: paged_description(), to, paging: Some(paging()) })
}

fn record() {
    let destination = destination();
    let link = Recorder::new(&destination);
    let mut strategy = Hybrid { rounds: 1, order: Box::new(Linear::default()) };
    let options = SourceOptions { payload_crc: true, demand_lanes: 1, ..SourceOptions::default() };
    let report = migrate(&mut guest(), &link, &mut strategy, &options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, _) = destination.finish();
    let folder = folder().join(NAME);
    fs::create_dir_all(&folder).unwrap();
    for (lane, bytes) in LANES.iter().zip(link.recorded()) {
        fs::write(folder.join(lane), bytes).unwrap();
    }
    fs::write(folder.join("state"), state().encode()).unwrap();
    let pages: String = arrived.pages().iter().map(|(page, crc)| format!("{page} {crc:08x}\n")).collect();
    fs::write(folder.join("ram.txt"), pages).unwrap();
}

/// The recording, made anew where that is asked for.
pub(crate) fn recorded() -> Stream {
    static RECORDED: std::sync::Once = std::sync::Once::new();
    if recording() {
        RECORDED.call_once(record);
    }
    Stream { lanes: LANES.map(|lane| fs::read(folder().join(NAME).join(lane)).unwrap()).to_vec() }
}

/// Where the part of a lane begins that the source sends only when it has heard something: *done*,
/// or pages that were left behind.
fn second_part(recorded: &[u8], lane: usize) -> usize {
    let starts = frames(recorded);
    let (end, starts) = starts.split_last().unwrap();
    let header = |at: usize| Header::decode(recorded[at..].first_chunk().unwrap()).unwrap();
    let later = |&at: &usize| if lane == 0 { header(at).kind == 0x0b } else { header(at).number == GENERATION };
    starts.iter().copied().find(later).unwrap_or(*end)
}

/// The same for a lane whose bytes were changed.
fn split(recorded: &[u8], lane: usize, mut bytes: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let at = second_part(recorded, lane);
    let at = if recorded.starts_with(&bytes) || bytes.starts_with(&recorded[..at]) {
        at
    } else {
        (at + bytes.len()).saturating_sub(recorded.len())
    };
    let rest = bytes.split_off(at.min(bytes.len()));
    (bytes, rest)
}

/// A lane whose second part is held back.
struct Lane {
    end: End,
    rest: Vec<u8>,
    ends: bool,
}

impl Lane {
    fn open(destination: &Destination, recorded: &[u8], lane: usize, bytes: Vec<u8>) -> Self {
        let ends = bytes.len() < recorded.len();
        let (first, rest) = split(recorded, lane, bytes);
        let end = destination.connect(&first);
        if ends && rest.is_empty() {
            end.outgoing.update(|s| s.ended = true);
        }
        Self { end, rest, ends }
    }

    /// Whether the lane took it: one that the destination has closed takes nothing any more.
    fn go_on(&mut self) -> bool {
        let taken = self.end.outgoing.write(&std::mem::take(&mut self.rest)).is_ok();
        if self.ends {
            self.end.outgoing.update(|s| s.ended = true);
        }
        taken
    }
}

/// Feeds the stream, as [`feed`](crate::streams::feed) does, with each part of it when it is due.
/// The destination has not heard all when the link ended for it first: also after it has said
/// *complete*, which a lane may make happen that ended a moment before.
pub(crate) fn feed(destination: &Destination, stream: &Stream, spoil: Spoil<'_>) -> Fed {
    let mut bytes = stream.lanes[0].clone();
    spoil(0, &mut bytes);
    let unchanged = bytes == stream.lanes[0];
    let mut control = Lane::open(destination, &stream.lanes[0], 0, bytes);
    let (mut token, mut words, mut bulk, mut demand) = (None, Vec::new(), Vec::new(), Vec::new());
    let mut taken = true;
    while let Some(frame) = said(&control.end) {
        match frame {
            Control::Welcome(welcome) => {
                token = Some(welcome.session);
                for index in 1..stream.lanes.len() {
                    let recorded = stream.bulk(index - 1, welcome.session);
                    let mut bytes = recorded.clone();
                    spoil(index, &mut bytes);
                    let refused = bytes.get(..Preamble::LEN) != recorded.get(..Preamble::LEN);
                    let mut lane = Lane::open(destination, &recorded, index, bytes);
                    if refused {
                        // the source has more patience than this test, so it opens the lane rightly
                        // and gives up
                        lane.end.outgoing.update(|s| s.ended = true);
                        drop(lane.end.outgoing.wait("the refusal of a lane", |s| s.unread));
                        lane.end = destination.connect(&recorded[..Preamble::LEN]);
                        lane.end.outgoing.update(|s| s.ended = true);
                    }
                    if index < 3 {
                        bulk.push(lane);
                        continue;
                    }
                    demand.push(thread::spawn(move || {
                        let asked = lane
                            .end
                            .incoming
                            .wait("a request", |s| !s.bytes.is_empty() || s.closed || s.ended || s.deaf);
                        drop(asked);
                        lane.go_on();
                        lane
                    }));
                }
                continue;
            }
            Control::Running => bulk.iter_mut().for_each(|lane| _ = lane.go_on()),
            Control::Complete(_) => {
                taken = control.go_on();
                control.end.outgoing.update(|s| s.ended = true);
            }
            _ => {}
        }
        words.push(frame);
    }
    control.end.outgoing.update(|s| s.ended = true);
    let left = control.end.outgoing.wait("the end of the control lane", |s| s.unread).bytes.len();
    // nobody answers on a lane whose session is over, so that the end comes from here
    for lane in &bulk {
        lane.end.outgoing.update(|s| s.ended = true);
    }
    for lane in demand {
        lane.join().unwrap().end.outgoing.update(|s| s.ended = true);
    }
    Fed { token, words, heard: unchanged && taken && left == 0 }
}

/// Pages of the guest as they are when it is paused, in one frame.
pub(crate) fn pages(pages: &[u64], sequence: u32, generation: u32) -> Vec<u8> {
    let mut vm = guest();
    vm.write_more();
    let ram = &vm.ram;
    let mut data = vec![0; pages.len() * PAGE_SIZE];
    for (page, data) in pages.iter().zip(data.chunks_mut(PAGE_SIZE)) {
        ram.slice(PageRange::new(*page, 1)).unwrap().copy_to(data);
    }
    let extent = |&page| Extent { range: PageRange::new(page, 1), content: Content::Plain };
    let frame = Bulk::Pages { extents: pages.iter().map(extent).collect(), payload_crc: crc32fast::hash(&data) };
    [frame.encode(0, sequence, generation), data].concat()
}

/// What an honest source does whose link was lost behind *run*: comes back, and sends what is
/// missing.
pub(crate) fn come_back(destination: &Destination, token: SessionToken, epoch: u32) {
    let mut lane = Preamble::new(LaneKind::Reattach, 0, token).encode().to_vec();
    for (sequence, frame) in [Control::Reattach(VM), Control::Run].iter().enumerate() {
        lane.extend(frame.encode(0, sequence as u32, epoch));
    }
    let control = destination.connect(&lane);
    assert_eq!(said(&control), Some(Control::Running));
    let mut missing = PageSet::empty(paged_description().layout.pages());
    let mut lanes = Vec::new();
    loop {
        match said(&control) {
            Some(Control::Missing { first, bitmap }) => {
                for (word, bytes) in (0..).zip(bitmap.chunks(8)) {
                    let bits = u64::from_le_bytes(bytes.try_into().unwrap());
                    missing.insert_bitmap(first + 64 * word, 64, &[bits]);
                }
            }
            Some(Control::PostCopy { missing: count, .. }) => {
                assert_eq!(missing.len(), count);
                assert!(DURING.len() as u64 >= count && missing.iter().all(|p| DURING.iter().any(|d| d.0 == p)));
                let preamble = Preamble::new(LaneKind::Bulk, 0, token).encode();
                let pages = pages(&missing.iter().collect::<Vec<_>>(), 0, GENERATION);
                lanes.push(destination.connect(&[&preamble[..], &pages].concat()));
                lanes.push(destination.connect(&Preamble::new(LaneKind::Demand, 0, token).encode()));
            }
            Some(Control::Complete(_)) => break,
            other => panic!("{other:?} for a source that has come back"),
        }
    }
    control.outgoing.write(&Control::Done.encode(0, 2, epoch)).unwrap();
    drop(control.outgoing.wait("the end of the session", |s| s.unread));
}

/// The VM has arrived, whole, each missing page once.
pub(crate) fn check_paged(arrived: &Arrived) -> u64 {
    check(NAME, arrived);
    let pager = arrived.pager.as_ref().unwrap();
    assert_eq!(pager.installed(), DURING.len() as u64);
    pager.check()
}

/// As [`spoilt`](crate::streams::spoilt). Behind the hand-over nothing is given up: the source
/// comes back.
fn spoilt(good: &Stream, what: &str, spoil: Spoil<'_>) -> String {
    let destination = destination();
    let Fed { token, words, heard } = feed(&destination, good, spoil);
    let complete = |words: &[Control]| words.iter().any(|word| matches!(word, Control::Complete(_)));
    let heard = complete(&words) && heard;
    let refused = match destination.handle.phase() {
        DestinationPhase::Empty | DestinationPhase::Ready => {
            assert!(destination.arrived.try_recv().is_err(), "{what}: a VM runs");
            let words = feed(&destination, &good.clone().epoch(2), &as_recorded).words;
            assert!(complete(&words), "{what}: then {words:?}");
            true
        }
        DestinationPhase::Running if heard => false,
        DestinationPhase::Running => {
            come_back(&destination, token.unwrap(), 1);
            false
        }
        phase => panic!("{what}: left in {phase:?}"),
    };
    let (arrived, said) = destination.finish();
    check_paged(&arrived);
    assert!(!refused || !said.is_empty(), "{what}: no event");
    said
}

#[test]
fn the_recorded_stream_arrives() {
    let destination = destination();
    let said = feed(&destination, &recorded(), &as_recorded).words;
    let mut names: Vec<_> = said.iter().map(Control::name).filter(|n| *n != "round received").collect();
    // a destination that loads for long says more than once that it lives
    names.dedup();
    assert_eq!(names, ["prepared", "pong", "ready", "running", "complete"]);
    let Some(Control::Complete(summary)) = said.last() else { unreachable!() };
    // how many faults are read before their pages come is a matter of time
    assert!(summary.count > 0 && summary.duplicates == 0, "{summary:?}");
    let (arrived, _) = destination.finish();
    assert_eq!(check_paged(&arrived), 0);
    assert_eq!(arrived.pieces, 1);
}

/// Page data carries checksums here: no flipped byte goes unnoticed, and none is lost.
#[test]
fn a_flipped_byte_anywhere() {
    let good = recorded();
    for (lane, at) in places(&good) {
        spoilt(&good, &format!("byte {at} of {} is flipped", LANES[lane]), &|l, bytes| {
            if l == lane {
                bytes[at] ^= 0x41;
            }
        });
    }
}

#[test]
fn cut_after_any_byte() {
    let good = recorded();
    for (lane, at) in places(&good) {
        spoilt(&good, &format!("{} is cut after {at} bytes", LANES[lane]), &|l, bytes| {
            if l == lane {
                bytes.truncate(at);
            }
        });
    }
}

/// Many bytes of the part that other streams do not have, and some of what they have too.
fn places(stream: &Stream) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for lane in 0..stream.lanes.len() {
        let starts = frames(&stream.lanes[lane]);
        let of = |at: usize| starts[starts.partition_point(|&s| s <= at).saturating_sub(1)];
        for at in positions(stream, lane) {
            let kind = stream.lanes[lane][of(at)];
            let post_copy =
                if lane == 0 { (0x11..=0x13).contains(&kind) } else { at >= second_part(&stream.lanes[lane], lane) };
            if at % if post_copy { 3 } else { 17 } == 0 {
                places.push((lane, at));
            }
        }
    }
    places
}

#[test]
fn replayed_and_reordered_frames() {
    let good = recorded();
    for (lane, name) in LANES.iter().enumerate() {
        let starts = frames(&good.lanes[lane]);
        let count = starts.len() - 1;
        // behind *done* nothing is read
        let last = if lane == 0 { count - 1 } else { count };
        for i in 0..last {
            let frame = good.lanes[lane][starts[i]..starts[i + 1]].to_vec();
            spoilt(&good, &format!("frame {i} of {name} comes twice"), &|l, bytes| {
                if l == lane {
                    drop(bytes.splice(starts[i + 1]..starts[i + 1], frame.iter().copied()));
                }
            });
            if i + 1 < count {
                spoilt(&good, &format!("frames {i} and {} of {name} are swapped", i + 1), &|l, bytes| {
                    if l == lane {
                        bytes[starts[i]..starts[i + 2]].rotate_left(frame.len());
                    }
                });
            }
        }
    }
}

/// The pages that were left behind have arrived, as they were; nothing else was sent.
pub(crate) fn check_by_hand(arrived: &Arrived) {
    let mut vm = guest();
    vm.write_more();
    let mut expected = checksums(&vm.ram);
    expected.retain(|page, _| DURING.iter().any(|d| d.0 == *page));
    assert_eq!(arrived.pages(), expected);
    arrived.pager.as_ref().unwrap().check();
}
