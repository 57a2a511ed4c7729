//! A destination that holds a VM which its source has not given away: who may start it there.

use migration_core::{
    fence::{Fence, Fenced, NotFenced},
    protocol::DestinationPhase,
    wire::{Control, LaneKind, SessionToken},
};

use crate::{
    HANG, VM,
    destination::{Destination, said},
    sessions::lane,
    streams::{check, feed, frames, stream},
};

/// Makes certain that the source is dead.
pub(crate) struct Certain;

impl Fence for Certain {
    fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
        Ok(())
    }
}

pub(crate) fn dead() -> Fenced {
    Fenced::by(&Certain, b"").unwrap()
}

/// Up to *ready*; then the link was lost. And the session's token.
fn held() -> (Destination, SessionToken) {
    let (destination, good) = (Destination::new(), stream("pre-copy"));
    let control = frames(&good.lanes[0]);
    let cut = control[control.len() - 3];
    let fed = feed(&destination, &good, &|lane, bytes| {
        if lane == 0 {
            bytes.truncate(cut);
        }
    });
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready);
    (destination, fed.token.unwrap())
}

#[test]
fn a_vm_that_is_held_starts_when_its_source_is_said_or_known_to_be_dead() {
    for person in [true, false] {
        let (destination, _) = held();
        let handle = destination.handle.clone();
        assert!(destination.arrived.try_recv().is_err(), "it does not start by itself");
        let epoch = handle.epoch();
        if person {
            handle.force_take_over().unwrap()
        } else {
            handle.take_over(dead()).unwrap()
        }
        // so that its source is refused if it comes back after all
        assert_eq!((handle.phase(), handle.epoch()), (DestinationPhase::Running, epoch + 1));
        assert!(handle.force_take_over().is_err(), "it runs already");
        // there is nobody to wait for
        check("pre-copy", &destination.finish().0);
    }
}

#[test]
fn a_link_that_was_replaced_says_nothing_of_the_one_in_its_place() {
    let (destination, token) = held();
    let over = || destination.log.recv_timeout(HANG).expect("a link has ended");
    let come_back = || {
        let frames = [Control::Reattach(VM), Control::Ping];
        let control = destination.connect(&lane(LaneKind::Reattach, 0, token, 1, &frames));
        assert_eq!(said(&control), Some(Control::Pong));
        control
    };
    over();
    let _first = come_back();
    let _second = come_back();
    // the end of the first one is known here, and the source is still connected
    over();
    let why = destination.handle.force_take_over().unwrap_err().to_string();
    assert!(why.contains("connected"), "{why}");
}

#[test]
fn where_no_vm_is_held_none_starts() {
    let destination = Destination::new();
    assert!(destination.handle.force_take_over().is_err() && destination.handle.take_over(dead()).is_err());
    assert_eq!(destination.handle.phase(), DestinationPhase::Empty);
}
