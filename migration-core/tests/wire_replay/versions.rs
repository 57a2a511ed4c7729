//! Peers of other versions of the wire format: which version is taken, and what a peer without a
//! common one is told.

use std::{
    sync::{Arc, Mutex, mpsc},
    thread,
};

use migration_core::{
    engine::{Controller, SourceOptions, migrate},
    protocol::DestinationPhase,
    report::{Outcome, Report},
    strategy::StopAndCopy,
    wire::{Control, ErrorCode, LaneKind, OLDEST_VERSION, Preamble, SessionToken, VERSION, Welcome},
};

use crate::{
    HANG,
    destination::{Destination, said},
    post_copy::guest,
    serving::{Ends, lane},
    sessions::hello,
};

/// The first bytes of a source that speaks these versions.
fn source_of(oldest: u16, newest: u16) -> Vec<u8> {
    let preamble = Preamble { oldest, newest, ..Preamble::new(LaneKind::Control, 0, SessionToken::default()) };
    [&preamble.encode()[..], &hello(1).encode(0, 0, 1)].concat()
}

#[test]
fn the_newest_common_version_is_taken() {
    for (oldest, newest) in [(OLDEST_VERSION, VERSION), (OLDEST_VERSION, VERSION + 8), (0, VERSION)] {
        let destination = Destination::new();
        let control = destination.connect(&source_of(oldest, newest));
        match said(&control) {
            Some(Control::Welcome(welcome)) => assert_eq!(welcome.version, VERSION, "{oldest} to {newest}"),
            other => panic!("{other:?} to a source of versions {oldest} to {newest}"),
        }
    }
}

#[test]
fn an_older_or_newer_source_is_told_both_windows_and_the_next_source_is_served() {
    let destination = Destination::new();
    // a later build, an earlier one, and a window that is none
    for (oldest, newest) in [(VERSION + 1, VERSION + 2), (0, OLDEST_VERSION - 1), (VERSION + 2, VERSION)] {
        let control = destination.connect(&source_of(oldest, newest));
        let Some(Control::Error { code: ErrorCode::Version, text }) = said(&control) else {
            panic!("a source of versions {oldest} to {newest} is not refused");
        };
        assert!(text.contains(&format!("versions {oldest} to {newest}")), "{text}");
        assert!(text.contains(&format!("{OLDEST_VERSION} to {VERSION}")), "{text}");
        assert_eq!(said(&control), None, "the lane is closed");
    }
    assert_eq!(destination.handle.phase(), DestinationPhase::Empty);
    let control = destination.connect(&source_of(OLDEST_VERSION, VERSION));
    assert!(matches!(said(&control), Some(Control::Welcome(_))));
}

/// Returns how an attempt ends whose hello gets this answer, and what the source's VMM was asked to
/// do.
fn answered(answer: &Control, epoch: u32) -> (Report, Vec<&'static str>) {
    let (tx, lanes) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let vm = guest();
    let calls = vm.calls.clone();
    thread::spawn(move || {
        let (mut vm, link) = (vm, Ends { to: Mutex::new(tx), refuses: Arc::default() });
        let report = migrate(&mut vm, &link, &mut StopAndCopy, &SourceOptions::default(), Controller::new().1);
        // a test that has failed does not listen
        let _ = end.send(report);
    });
    let control = lane(&lanes, LaneKind::Control);
    assert_eq!(said(&control).map(|word| word.name()), Some("hello"));
    control.outgoing.write(&answer.encode(0, 0, epoch)).unwrap();
    control.outgoing.update(|state| state.ended = true);
    let report = ended.recv_timeout(HANG).expect("the attempt ends");
    let calls = calls.lock().unwrap().clone();
    (report, calls)
}

#[test]
fn a_source_that_is_refused_for_its_version_keeps_its_vm_and_tells_its_user() {
    let text = "the source speaks versions 1 to 1, this destination 2 to 3";
    let (report, calls) = answered(&Control::error(ErrorCode::Version, text), 0);
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.is_some_and(|reason| reason.contains(text)));
    assert!(!calls.contains(&"released"), "{calls:?}");
}

#[test]
fn a_version_that_was_not_offered_ends_the_attempt() {
    for version in [OLDEST_VERSION - 1, VERSION + 1] {
        let welcome = Welcome { version, features: 0, streams: 1, session: SessionToken([7; 16]) };
        let (report, calls) = answered(&Control::Welcome(welcome), 1);
        assert_eq!(report.outcome, Outcome::Failed);
        let reason = report.reason.unwrap_or_default();
        assert!(reason.contains(&format!("it chose version {version}")), "{reason}");
        assert!(!calls.contains(&"released"), "{calls:?}");
    }
}
