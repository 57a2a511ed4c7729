//! Sessions made by hand.

use std::time::Duration;

use migration_core::{
    PAGE_SIZE, PageRange,
    protocol::DestinationPhase,
    wire::{Bulk, Content, Control, ErrorCode, Extent, Header, Hello, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG,
    channels::End,
    destination::{Destination, said},
    guest::{description, state},
    streams::{Fed, as_recorded, check, feed, frames, stream, with_header},
};
/// A whole session, sent again as it was, is refused: its epoch is void. The receiver is in the
/// middle of the next one.
#[test]
pub(crate) fn a_replayed_session_is_refused() {
    let good = stream("pre-copy");
    let destination = Destination::new();
    let control = frames(&good.lanes[0]);
    let cut = control[control.len() - 3];
    feed(&destination, &good, &|lane, bytes| {
        if lane == 0 {
            bytes.truncate(cut);
        }
    });
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready, "all but *run* and *done*");
    let Fed { token, words, .. } = feed(&destination, &good, &as_recorded);
    assert_eq!(token, None);
    assert!(matches!(&words[..], [Control::Error { code: ErrorCode::StaleEpoch, .. }]), "{words:?}");
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready, "the VM is still held");
    feed(&destination, &good.clone().epoch(2), &as_recorded);
    check("pre-copy", &destination.finish().0);
}

/// Numbers frames and puts a preamble before them.
pub(crate) fn lane(kind: LaneKind, index: u16, token: SessionToken, number: u32, frames: &[Control]) -> Vec<u8> {
    let mut bytes = Preamble::new(kind, index, token).encode().to_vec();
    for (sequence, frame) in frames.iter().enumerate() {
        bytes.extend(frame.encode(0, sequence as u32, number));
    }
    bytes
}

pub(crate) fn hello(streams: u16) -> Control {
    let hello = Hello { features: 0, streams, strategy: "by hand".into(), vm: description() };
    Control::Hello(Box::new(hello))
}

pub(crate) fn token_of(control: &End) -> SessionToken {
    match said(control) {
        Some(Control::Welcome(welcome)) => welcome.session,
        other => panic!("{other:?} instead of welcome"),
    }
}

/// A source whose host loses its power says nothing any more, on any lane. The next attempt must
/// not find it busy.
#[test]
pub(crate) fn a_source_that_falls_silent_behind_its_offer() {
    let destination = Destination::patient(Duration::from_millis(50));
    let offer = Control::Offer { generation: 1, state_bytes: 0, running: true };
    let control = destination.connect(&lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello(1), offer]));
    let token = token_of(&control);
    let bulk = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
    [&control, &bulk].iter().for_each(|end| end.outgoing.update(|s| s.silent = true));
    destination.log.recv_timeout(HANG).expect("the attempt ends");
}

/// No thread waits for lanes that may never come once nobody wants them any more.
#[test]
pub(crate) fn a_receiver_that_is_stopped_ends_at_once() {
    let mut destination = Destination::patient(Duration::from_hours(1));
    let lane = |epoch| lane(LaneKind::Control, 0, SessionToken::default(), epoch, &[hello(2)]);
    let superseded = destination.connect(&lane(1));
    token_of(&superseded);
    let control = destination.connect(&lane(2));
    let token = token_of(&control);
    assert_eq!(said(&superseded), None, "its lane is closed");
    let offered = destination.connect(&[]);
    // one behind it, which is read: so that one has been accepted as well
    let bulk = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
    drop(bulk.outgoing.wait("a preamble to be read", |s| s.bytes.is_empty()));
    let thread = destination.thread.take().unwrap();
    destination.handle.stop();
    // it may have seen that by itself already
    let _ = destination.door.send(None);
    drop(control.incoming.wait("the end of the receiver", |s| s.deaf));
    drop(offered.incoming.wait("the end of a lane that said nothing", |s| s.deaf));
    thread.join().unwrap().expect_err("stopped without a VM");
}

/// What cannot be decoded is answered with a code too, so that the source's user learns the reason.
#[test]
pub(crate) fn a_malformed_hello_is_answered() {
    let destination = Destination::new();
    let mut bytes = lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello(1)]);
    bytes.push(0);
    let body = bytes[Preamble::LEN + Header::LEN..].to_vec();
    with_header(&mut bytes, Preamble::LEN, |h| (h.body, h.body_crc) = (body.len() as u32, crc32fast::hash(&body)));
    let control = destination.connect(&bytes);
    let answer = said(&control);
    assert!(matches!(answer, Some(Control::Error { code: ErrorCode::Protocol, .. })), "{answer:?}");
}

/// A lane that is in the middle of a later round when the state is loaded could write into a VM
/// that runs.
#[test]
pub(crate) fn no_page_is_under_way_when_the_state_is_loaded() {
    let destination = Destination::new();
    let control = destination.connect(&lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello(1)]));
    let token = token_of(&control);
    let extent = |first| Extent { range: PageRange::new(first, 1), content: Content::Plain };
    let late = Bulk::Pages { extents: vec![extent(3), extent(5)], payload_crc: 0 };
    let mut bytes = Preamble::new(LaneKind::Bulk, 0, token).encode().to_vec();
    bytes.extend(Bulk::RoundEnd { pages: 0 }.encode(0, 0, 1));
    bytes.extend(late.encode(0, 1, 2));
    bytes.extend([9; PAGE_SIZE]);
    let bulk = destination.connect(&bytes);
    // the first page of the second round has been taken: the lane waits for the second one
    drop(bulk.outgoing.wait("half a frame", |s| s.bytes.is_empty() || s.unread));
    let state = state().encode();
    let offer = Control::Offer { generation: 1, state_bytes: state.len() as u64, running: true };
    for (sequence, frame) in [Control::State(state.into()), offer].iter().enumerate() {
        control.outgoing.write(&frame.encode(0, 1 + sequence as u32, 1)).unwrap();
    }
    while let Some(word) = said(&control) {
        assert_ne!(word, Control::Ready, "a page may still arrive");
    }
}

/// A lane that has gone mad after the VM was offered ends the session: its source hears why.
#[test]
pub(crate) fn nonsense_on_a_lane_of_a_vm_that_is_ready_is_refused() {
    let destination = Destination::new();
    let control = destination.connect(&lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello(1)]));
    let token = token_of(&control);
    let mut bytes = Preamble::new(LaneKind::Bulk, 0, token).encode().to_vec();
    bytes.extend(Bulk::RoundEnd { pages: 0 }.encode(0, 0, 1));
    let bulk = destination.connect(&bytes);
    let state = state().encode();
    let offer = Control::Offer { generation: 1, state_bytes: state.len() as u64, running: true };
    for (sequence, frame) in [Control::State(state.into()), offer].iter().enumerate() {
        control.outgoing.write(&frame.encode(0, 1 + sequence as u32, 1)).unwrap();
    }
    while said(&control).expect("the lane goes on") != Control::Ready {}
    bulk.outgoing.write(&[0xff; Header::LEN]).unwrap();
    let answer = said(&control);
    assert!(matches!(answer, Some(Control::Error { code: ErrorCode::Protocol, .. })), "{answer:?}");
    // which does not decide on the VM
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready);
}
