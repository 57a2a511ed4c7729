//! Post-copy frames that are well formed and yet wrong, made by hand: what each side answers.

use bytes::Bytes;
use migration_core::{
    PageRange,
    protocol::DestinationPhase,
    wire::{
        Bulk, Content, Control, Extent, FEATURE_PAYLOAD_CRC, FEATURE_POST_COPY, Hello, LaneKind, Preamble, SessionToken,
    },
};

use crate::{
    channels::End,
    destination::{Destination, said},
    guest::state,
    held::dead,
    post_copy::{DURING, GENERATION, come_back, destination, paged_description, pages},
    sessions::token_of,
};

fn hello(features: u32) -> Control {
    Control::Hello(Box::new(Hello { features, streams: 1, strategy: "by hand".into(), vm: paged_description() }))
}

/// A session up to the round before the hand-over, in which nothing moved.
struct Session {
    destination: Destination,
    control: End,
    lanes: Vec<End>,
    token: SessionToken,
    said: u32,
}

impl Session {
    fn new(features: u32) -> Self {
        let destination = destination();
        let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
        let control = destination.connect(&[&preamble[..], &hello(features).encode(0, 0, 1)].concat());
        let token = token_of(&control);
        let end = Bulk::RoundEnd { pages: 0 }.encode(0, 0, 1);
        let bulk = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
        let mut session = Self { destination, control, lanes: vec![bulk], token, said: 1 };
        session.hear("prepared");
        session.lanes[0].outgoing.write(&end).unwrap();
        session.hear("round received");
        session
    }

    fn agreed() -> Self {
        let mut session = Self::new(FEATURE_POST_COPY | FEATURE_PAYLOAD_CRC);
        let demand = session.destination.connect(&Preamble::new(LaneKind::Demand, 0, session.token).encode());
        session.lanes.push(demand);
        session
    }

    fn send_control(&mut self, frame: &Control) {
        // the lane may be closed already, when what was said before was refused
        let _ = self.control.outgoing.write(&frame.encode(0, self.said, 1));
        self.said += 1;
    }

    fn hear(&mut self, name: &str) {
        // a destination that loads for long says that it lives
        let words = std::iter::repeat_with(|| said(&self.control)).find(|word| *word != Some(Control::Pong));
        let words: Vec<_> = words.into_iter().collect();
        assert!(matches!(&words[..], [Some(word)] if word.name() == name), "{words:?} instead of {name}");
    }

    fn list(&mut self, count: u64) {
        self.send_control(&missing(DURING.map(|(page, _)| page)));
        self.send_control(&Control::PostCopy { missing: count, demand_lanes: 1 });
    }

    fn offer(&mut self) {
        let state = state().encode();
        let offer = Control::Offer { generation: 1, state_bytes: state.len() as u64, running: true };
        self.send_control(&Control::State(Bytes::from(state)));
        self.send_control(&offer);
    }

    /// Up to *running*; the pages that loading the state needs have come.
    fn handed_over() -> Self {
        let mut session = Self::agreed();
        session.list(DURING.len() as u64);
        session.offer();
        drop(session.lanes[1].incoming.wait("a request", |s| !s.bytes.is_empty() || s.closed));
        session.lanes[1].outgoing.write(&pages(&[3, 513, 543], 0, GENERATION)).unwrap();
        session.hear("ready");
        session.send_control(&Control::Run);
        session.hear("running");
        session
    }

    /// What the destination says until it ends the lane: an error, for this reason.
    fn refused(&self, reason: &str) {
        let mut last = None;
        while let Some(word) = said(&self.control) {
            last = Some(word);
        }
        assert!(matches!(&last, Some(Control::Error { text, .. }) if text.contains(reason)), "{reason}: {last:?}");
        drop(self.control.outgoing.wait("the end of the control lane", |s| s.unread));
    }
}

pub(crate) fn missing<const N: usize>(pages: [u64; N]) -> Control {
    let mut bitmap = vec![0; 72];
    pages.iter().for_each(|page| bitmap[*page as usize / 8] |= 1 << (page % 8));
    Control::Missing { first: 0, bitmap: Bytes::from(bitmap) }
}

fn zeros(first: u64, count: u64, generation: u32) -> Vec<u8> {
    let extents = vec![Extent { range: PageRange::new(first, count), content: Content::Zero }];
    Bulk::Pages { extents, payload_crc: 0 }.encode(0, 0, generation)
}

#[test]
fn lists_that_are_wrong() {
    let word = |first| Control::Missing { first, bitmap: Bytes::from(vec![1; 8]) };
    for (reason, frames) in [
        ("outside RAM", vec![word(576)]),
        ("outside RAM", vec![word(u64::MAX - 63)]),
        ("whole words", vec![word(8)]),
        ("whole words", vec![Control::Missing { first: 0, bitmap: Bytes::from(vec![1; 7]) }]),
        ("missing", vec![Control::PostCopy { missing: 0, demand_lanes: 1 }, word(0)]),
        ("post-copy", vec![Control::PostCopy { missing: 0, demand_lanes: 1 }; 2]),
        ("demand lanes", vec![Control::PostCopy { missing: 0, demand_lanes: 17 }]),
        ("complete", vec![Control::Complete(Default::default())]),
    ] {
        let mut session = Session::agreed();
        frames.iter().for_each(|frame| session.send_control(frame));
        session.refused(reason);
        assert_eq!(session.destination.handle.phase(), DestinationPhase::Empty, "{reason}");
    }
}

#[test]
fn post_copy_that_was_not_agreed_on() {
    for frame in [missing([1]), Control::PostCopy { missing: 0, demand_lanes: 1 }] {
        let mut session = Session::new(FEATURE_PAYLOAD_CRC);
        session.send_control(&frame);
        session.refused("not agreed on");
    }
    let session = Session::new(FEATURE_PAYLOAD_CRC);
    let demand = session.destination.connect(&Preamble::new(LaneKind::Demand, 0, session.token).encode());
    drop(demand.outgoing.wait("the refusal of a demand lane", |s| s.unread));
    assert_eq!(session.destination.handle.phase(), DestinationPhase::Receiving, "the session goes on");
}

#[test]
fn counts_that_do_not_match() {
    for count in [0, 8, 10, u64::MAX] {
        let mut session = Session::agreed();
        session.list(count);
        session.offer();
        session.refused("announced");
    }
}

#[test]
fn pages_before_their_time() {
    // of the generation after the round, before the hand-over; on the demand lane, of any
    for (lane, generation, reason) in
        [(0, 2, "after 1, the last one"), (1, 1, "not asked for"), (1, 2, "not asked for")]
    {
        let mut session = Session::agreed();
        let bytes = if lane == 0 { zeros(1, 1, generation).tap(|b| renumber(b, 1)) } else { zeros(1, 1, generation) };
        session.lanes[lane].outgoing.write(&bytes).unwrap();
        if lane == 0 {
            drop(session.lanes[0].outgoing.wait("the page to be taken", |s| s.bytes.is_empty() || s.unread));
            let end = Bulk::RoundEnd { pages: 1 }.encode(0, 2, 2);
            session.lanes[0].outgoing.write(&end).unwrap();
            session.hear("round received");
            session.list(DURING.len() as u64);
            session.offer();
        }
        session.refused(reason);
    }
}

trait Tap: Sized {
    fn tap(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Tap for Vec<u8> {}

fn renumber(frame: &mut [u8], sequence: u32) {
    crate::streams::with_header(frame, 0, |h| h.sequence = sequence);
}

/// Behind the hand-over the VM stays whatever comes: the link ends, and the source comes back.
#[test]
fn pages_that_nobody_wants() {
    let request = Bulk::Request { pages: vec![1] }.encode(0, 1, GENERATION);
    let end = Bulk::RoundEnd { pages: 0 }.encode(0, 1, GENERATION);
    let again = pages(&[3], 1, GENERATION);
    for (reason, frame) in [
        ("were not left behind", zeros(0, 1, GENERATION).tap(|b| renumber(b, 1))),
        ("were not left behind", zeros(0, 544, GENERATION).tap(|b| renumber(b, 1))),
        // a hole, alone and behind pages that are missing
        ("were not left behind", zeros(4, 1, GENERATION).tap(|b| renumber(b, 1))),
        ("were not left behind", zeros(2, 3, GENERATION).tap(|b| renumber(b, 1))),
        ("were not left behind", pages(&[1, 4], 1, GENERATION)),
        ("extent", pages(&[1, 1], 1, GENERATION)),
        ("extent", pages(&[2, 1], 1, GENERATION)),
        ("sequence", zeros(1, 1, GENERATION)),
        ("outside RAM", zeros(543, 2, GENERATION).tap(|b| renumber(b, 1))),
        ("generation", zeros(1, 1, GENERATION + 1).tap(|b| renumber(b, 1))),
        ("generation", zeros(1, 1, 1).tap(|b| renumber(b, 1))),
        ("only pages", request),
        ("only pages", end),
        ("page data", pages(&[1], 1, GENERATION).tap(|b| *b.last_mut().unwrap() ^= 1)),
    ] {
        for lane in 0..2 {
            let session = Session::handed_over();
            session.lanes[lane].outgoing.write(&frame).unwrap();
            session.refused(reason);
            come_back(&session.destination, session.token, 1);
            crate::post_copy::check_by_hand(&session.destination.finish().0);
        }
    }
    // twice is harmless
    let mut session = Session::handed_over();
    session.lanes[1].outgoing.write(&again).unwrap();
    session.lanes[1].outgoing.write(&pages(&[1, 2, 3], 2, GENERATION)).unwrap();
    session.lanes[0].outgoing.write(&pages(&[1, 2, 100, 511, 512, 530], 1, GENERATION)).unwrap();
    session.hear("complete");
    session.send_control(&Control::Done);
    crate::post_copy::check_by_hand(&session.destination.finish().0);
}

#[test]
fn done_before_all_has_come() {
    let mut session = Session::handed_over();
    session.send_control(&Control::Done);
    session.refused("done");
    assert_eq!(session.destination.handle.phase(), DestinationPhase::Running);
    come_back(&session.destination, session.token, 1);
    crate::post_copy::check_by_hand(&session.destination.finish().0);
}

/// Its pages are only at its source: nobody else can have it.
#[test]
fn a_vm_that_lacks_pages_is_not_inherited() {
    let session = Session::handed_over();
    let handle = &session.destination.handle;
    assert!(handle.force_take_over().is_err());
    let why = handle.take_over(dead()).unwrap_err().to_string();
    assert!(why.contains("only at its source"), "{why}");
}
