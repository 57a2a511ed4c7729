//! Recorded streams: recording them, feeding them, and what must come of it.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
};

use migration_core::{
    channel::{Channel, Connector},
    engine::{Controller, SourceOptions, migrate},
    protocol::DestinationPhase,
    report::Outcome,
    state::VmState,
    strategy::{PreCopy, StopAndCopy, Strategy},
    wire::{Control, Header, LaneKind, Preamble, SessionToken},
};

use crate::{
    VM,
    channels::{End, pair},
    destination::{Destination, said},
    guest::{Arrived, RecordedVm, state},
};
/// What a source sent: the control lane, then the bulk lanes.
#[derive(Clone)]
pub(crate) struct Stream {
    pub(crate) lanes: Vec<Vec<u8>>,
}

pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/streams/v1")
}

pub(crate) fn recording() -> bool {
    std::env::var_os("RECORD_STREAMS").is_some()
}

/// Records a stream where that is asked for, and reads it.
pub(crate) fn stream(name: &str) -> Stream {
    static RECORDED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut recorded = RECORDED.lock().unwrap();
    if recording() && !recorded.iter().any(|n| n == name) {
        record(name);
        recorded.push(name.to_owned());
    }
    drop(recorded);
    let lanes = ["control", "bulk-0", "bulk-1"].map(|lane| fs::read(folder().join(name).join(lane)).unwrap());
    Stream { lanes: lanes.to_vec() }
}

pub(crate) fn record(name: &str) {
    let destination = Destination::new();
    let link = Recorder::new(&destination);
    let mut strategy: Box<dyn Strategy> = match name {
        "pre-copy" => Box::new(<PreCopy>::default()),
        _ => Box::new(StopAndCopy),
    };
    let options = SourceOptions { payload_crc: name == "stop-and-copy-crc", ..SourceOptions::default() };
    let report = migrate(&mut RecordedVm::new(), &link, &mut *strategy, &options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, _) = destination.finish();
    let folder = folder().join(name);
    fs::create_dir_all(&folder).unwrap();
    for (lane, bytes) in ["control", "bulk-0", "bulk-1"].iter().zip(link.recorded()) {
        fs::write(folder.join(lane), bytes).unwrap();
    }
    fs::write(folder.join("state"), state().encode()).unwrap();
    let pages: String = arrived.pages().iter().map(|(page, crc)| format!("{page} {crc:08x}\n")).collect();
    fs::write(folder.join("ram.txt"), pages).unwrap();
}

pub(crate) struct Recorder {
    pub(crate) door: mpsc::Sender<Option<End>>,
    pub(crate) taps: Mutex<Vec<Arc<Mutex<Vec<u8>>>>>,
}

impl Recorder {
    pub(crate) fn new(destination: &Destination) -> Self {
        Self { door: destination.door.clone(), taps: Mutex::default() }
    }

    /// What was sent on each lane, in the order in which they were opened.
    pub(crate) fn recorded(self) -> Vec<Vec<u8>> {
        self.taps.into_inner().unwrap().iter().map(|tap| tap.lock().unwrap().clone()).collect()
    }
}

impl Connector for Recorder {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        let (mut here, there) = pair();
        let tap = Arc::new(Mutex::new(Vec::new()));
        self.taps.lock().unwrap().push(tap.clone());
        here.tap = Some(tap);
        self.door.send(Some(there)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(here))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

/// Where the frames of a lane begin, and its end.
pub(crate) fn frames(lane: &[u8]) -> Vec<usize> {
    let mut at = vec![Preamble::LEN];
    while let Some(header) = lane[at[at.len() - 1]..].first_chunk() {
        let header = Header::decode(header).unwrap();
        at.push(at[at.len() - 1] + Header::LEN + header.body as usize + header.payload as usize);
    }
    at
}

/// Changes the header at `at`.
pub(crate) fn with_header(lane: &mut [u8], at: usize, change: impl FnOnce(&mut Header)) {
    let place: &mut [u8; Header::LEN] = (&mut lane[at..at + Header::LEN]).try_into().unwrap();
    let mut header = Header::decode(place).unwrap();
    change(&mut header);
    *place = header.encode();
}

/// Makes the sequence numbers of a lane right.
pub(crate) fn renumber(lane: &mut [u8]) {
    let starts = frames(lane);
    for (sequence, &at) in starts[..starts.len() - 1].iter().enumerate() {
        with_header(lane, at, |h| h.sequence = sequence as u32);
    }
}

impl Stream {
    /// The same stream as an attempt with another epoch.
    pub(crate) fn epoch(mut self, epoch: u32) -> Self {
        let lane = &mut self.lanes[0];
        let starts = frames(lane);
        for &at in &starts[..starts.len() - 1] {
            with_header(lane, at, |h| h.number = epoch);
        }
        self
    }

    /// A bulk lane's bytes, in this session.
    pub(crate) fn bulk(&self, index: usize, token: SessionToken) -> Vec<u8> {
        let mut bytes = self.lanes[1 + index].clone();
        let mut preamble = Preamble::decode(bytes.first_chunk().unwrap()).unwrap();
        preamble.session = token;
        bytes[..Preamble::LEN].copy_from_slice(&preamble.encode());
        bytes
    }
}

/// Spoils the bytes of a lane: its number, its bytes.
pub(crate) type Spoil<'a> = &'a dyn Fn(usize, &mut Vec<u8>);

pub(crate) fn as_recorded(_lane: usize, _bytes: &mut Vec<u8>) {}

/// How a receiver took a stream.
pub(crate) struct Fed {
    pub(crate) token: Option<SessionToken>,
    /// What it said on the control lane behind *welcome*.
    pub(crate) words: Vec<Control>,
    /// Whether the control lane was as recorded, and the receiver has read all of it.
    pub(crate) heard: bool,
}

/// Feeds a stream whose bytes `spoil` may change, and waits until the receiver is done with it.
/// Lanes that end early do so without a word.
pub(crate) fn feed(destination: &Destination, stream: &Stream, spoil: Spoil<'_>) -> Fed {
    let (mut control, mut token) = (stream.lanes[0].clone(), None);
    spoil(0, &mut control);
    let whole = control.len() >= stream.lanes[0].len();
    let unchanged = control == stream.lanes[0];
    let control = destination.connect(&control);
    if !whole {
        control.outgoing.update(|s| s.ended = true);
    }
    let mut words = Vec::new();
    let mut bulk = Vec::new();
    while let Some(frame) = said(&control) {
        if let Control::Welcome(welcome) = frame {
            token = Some(welcome.session);
            for index in 0..stream.lanes.len() - 1 {
                let recorded = stream.bulk(index, welcome.session);
                let mut bytes = recorded.clone();
                spoil(1 + index, &mut bytes);
                let lane = destination.connect(&bytes);
                if bytes.len() < recorded.len() {
                    lane.outgoing.update(|s| s.ended = true);
                }
                if bytes.get(..Preamble::LEN) != recorded.get(..Preamble::LEN) {
                    // refused; the source has more patience than this test, so it opens the lane
                    // rightly and gives up
                    lane.outgoing.update(|s| s.ended = true);
                    drop(lane.outgoing.wait("the refusal of a lane", |s| s.unread));
                    let again = destination.connect(&recorded[..Preamble::LEN]);
                    again.outgoing.update(|s| s.ended = true);
                    bulk.push(again);
                }
                bulk.push(lane);
            }
        } else {
            words.push(frame);
        }
        if destination.handle.phase() == DestinationPhase::Running {
            // all is decided: what is left on the lane is read, then it ends
            control.outgoing.update(|s| s.ended = true);
        }
    }
    // the machine has been told of the loss when the receiver lets go of the lane
    control.outgoing.update(|s| s.ended = true);
    let left = control.outgoing.wait("the end of the control lane", |s| s.unread).bytes.len();
    for lane in bulk {
        lane.outgoing.update(|s| s.ended = true);
    }
    Fed { token, words, heard: unchanged && left == 0 }
}

pub(crate) fn check(name: &str, arrived: &Arrived) {
    let folder = folder().join(name);
    let state = fs::read(folder.join("state")).unwrap();
    assert_eq!(arrived.state.as_ref().map(VmState::encode), Some(state), "{name}: the state");
    let expected = fs::read_to_string(folder.join("ram.txt")).unwrap();
    let pages: String = arrived.pages().iter().map(|(page, crc)| format!("{page} {crc:08x}\n")).collect();
    assert_eq!(pages, expected, "{name}: RAM");
    assert!(arrived.running);
}

/// Feeds a spoilt stream, then checks that the receiver says what is wrong, listens on, and takes a
/// good one. Returns all that it said, or nothing if the stream was whole up to the hand-over.
pub(crate) fn spoilt(name: &str, good: &Stream, what: &str, spoil: Spoil<'_>) -> String {
    let destination = Destination::new();
    let Fed { token, heard, .. } = feed(&destination, good, spoil);
    let refused = match destination.handle.phase() {
        DestinationPhase::Empty | DestinationPhase::Ready => {
            assert!(destination.arrived.try_recv().is_err(), "{what}: a VM runs");
            feed(&destination, &good.clone().epoch(2), &as_recorded);
            true
        }
        DestinationPhase::Running if heard => false,
        DestinationPhase::Running => {
            // the hand-over went well and only its last word was lost: the source is told again
            let mut lane = Preamble::new(LaneKind::Reattach, 0, token.unwrap()).encode().to_vec();
            for (sequence, frame) in [Control::Reattach(VM), Control::Run, Control::Done].iter().enumerate() {
                lane.extend(frame.encode(0, sequence as u32, 1));
            }
            let control = destination.connect(&lane);
            drop(control.outgoing.wait("the answer to a reattach", |s| s.unread));
            false
        }
        phase => panic!("{what}: left in {phase:?}"),
    };
    let (arrived, said) = destination.finish();
    check(name, &arrived);
    assert!(!refused || !said.is_empty(), "{what}: no event");
    if refused { said } else { String::new() }
}

#[test]
pub(crate) fn recorded_streams_arrive() {
    for (name, pieces) in [("pre-copy", 1), ("stop-and-copy-crc", 0)] {
        let stream = stream(name);
        let destination = Destination::new();
        let fed = feed(&destination, &stream, &as_recorded);
        let mut names: Vec<_> = fed.words.iter().map(Control::name).filter(|n| *n != "round received").collect();
        // a destination that loads for long says more than once that it lives
        names.dedup();
        assert_eq!(names, ["prepared", "pong", "ready", "running"], "{name}");
        let (arrived, _) = destination.finish();
        check(name, &arrived);
        assert_eq!(arrived.pieces, pieces, "{name}");
    }
}
