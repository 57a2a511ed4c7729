//! A source that serves missing pages, and a destination that is not honest: what it says is
//! refused or does nothing, and the source keeps VM and pages until an honest one has them all.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use migration_core::{
    PAGE_SIZE,
    channel::{Channel, Connector},
    engine::{Controller, SourceOptions, migrate},
    report::{Outcome, Report},
    strategy::{Hybrid, Linear},
    wire::{
        Bulk, Content, Control, FEATURE_POST_COPY, FaultSummary, Header, LaneKind, MAX_REQUESTS, Preamble,
        SessionToken, VERSION, Welcome,
    },
};

use crate::{
    HANG, VM,
    channels::{End, pair},
    destination::said,
    guest::{RecordedVm, checksums},
    post_copy::{DURING, GENERATION, guest},
    refusals::missing,
};

/// Gives the other end of each lane to the test.
pub(crate) struct Ends {
    pub(crate) to: Mutex<mpsc::Sender<(LaneKind, End)>>,
    /// No bulk lane can be opened.
    pub(crate) refuses: Arc<AtomicBool>,
}

impl Connector for Ends {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        unreachable!("the engine says what a lane is for")
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        if kind == LaneKind::Bulk && self.refuses.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (here, there) = pair();
        self.to.lock().unwrap().send((kind, there)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(here))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

/// The destination, played by the test.
struct Peer {
    lanes: mpsc::Receiver<(LaneKind, End)>,
    ended: mpsc::Receiver<(Report, RecordedVm)>,
    calls: Arc<Mutex<Vec<&'static str>>>,
    refuses: Arc<AtomicBool>,
    control: End,
    bulk: Option<End>,
    demand: Option<End>,
    /// Frames said on the control lane, and on the demand lane.
    words: u32,
    requests: u32,
    /// Pages that have come, and their checksums.
    have: BTreeMap<u64, u32>,
}

impl Peer {
    /// Up to the offer: all but the pages that are left behind has come.
    fn offered() -> Self {
        let (tx, lanes) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let vm = guest();
        let calls = vm.calls.clone();
        let refuses = Arc::new(AtomicBool::new(false));
        let refused = refuses.clone();
        thread::spawn(move || {
            let (mut vm, link) = (vm, Ends { to: Mutex::new(tx), refuses: refused });
            let mut strategy = Hybrid { rounds: 1, order: Box::new(Linear::default()) };
            let options = SourceOptions { streams: 1, demand_lanes: 1, ..SourceOptions::default() };
            let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
            // a test that has failed does not listen
            let _ = end.send((report, vm));
        });
        let control = lane(&lanes, LaneKind::Control);
        let mut peer = Self {
            lanes,
            ended,
            calls,
            refuses,
            control,
            bulk: None,
            demand: None,
            words: 0,
            requests: 0,
            have: BTreeMap::new(),
        };
        peer.hear("hello");
        let session = SessionToken([7; 16]);
        peer.send_control(&Control::Welcome(Welcome {
            version: VERSION,
            features: FEATURE_POST_COPY,
            streams: 1,
            session,
        }));
        peer.open();
        peer.send_control(&Control::Prepared { load_us: None });
        peer.hear("ping");
        peer.send_control(&Control::Pong);
        while !peer.take_pages(false) {}
        peer.send_control(&Control::RoundReceived { generation: 1 });
        peer.hear("offer");
        peer
    }

    /// *run* has come: the source will never run the VM again.
    fn in_doubt() -> Self {
        let mut peer = Self::offered();
        peer.send_control(&Control::Ready);
        peer.hear("run");
        peer
    }

    fn serving() -> Self {
        let mut peer = Self::in_doubt();
        peer.send_control(&Control::Running);
        peer
    }

    fn send_control(&mut self, frame: &Control) {
        self.say_as(frame, 1);
    }

    fn say_as(&mut self, frame: &Control, epoch: u32) {
        // the lane may be closed already, when what was said before was refused
        let _ = self.control.outgoing.write(&frame.encode(0, self.words, epoch));
        self.words += 1;
    }

    /// Reads up to this frame.
    fn hear(&self, name: &str) {
        while said(&self.control).unwrap_or_else(|| panic!("the lane ends before {name}")).name() != name {}
    }

    /// The source opens its other lanes.
    fn open(&mut self) {
        self.bulk = Some(lane(&self.lanes, LaneKind::Bulk));
        self.demand = Some(lane(&self.lanes, LaneKind::Demand));
        self.requests = 0;
    }

    fn request(&mut self, pages: &[u64], generation: u32) {
        let bytes = Bulk::Request { pages: pages.to_vec() }.encode(0, self.requests, generation);
        self.requests += 1;
        let _ = self.demand.as_ref().unwrap().outgoing.write(&bytes);
    }

    /// Takes a frame of pages; whether it ends a round.
    fn take_pages(&mut self, demand: bool) -> bool {
        let end = if demand { &self.demand } else { &self.bulk }.as_ref().unwrap();
        let bytes = take(end, Header::LEN);
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        let body = take(end, header.body as usize);
        let Bulk::Pages { extents, .. } = Bulk::decode(&header, &body, guest().ram_pages()).unwrap() else {
            return true;
        };
        let data = take(end, header.payload as usize);
        let mut data = data.chunks(PAGE_SIZE);
        for extent in extents {
            for page in extent.range.pages() {
                if extent.content == Content::Zero {
                    self.have.remove(&page);
                } else {
                    self.have.insert(page, crc32fast::hash(data.next().unwrap()));
                }
            }
        }
        false
    }

    /// The source comes back, and has been told of nothing yet.
    fn back(&mut self) {
        self.control = lane(&self.lanes, LaneKind::Reattach);
        assert_eq!(said(&self.control), Some(Control::Reattach(VM)));
        assert_eq!(said(&self.control), Some(Control::Run));
        self.words = 0;
        self.send_control(&Control::Running);
    }

    /// The source still has everything, and an honest destination gets it.
    fn gets_served(mut self, what: &str) -> Report {
        assert!(self.calls.lock().unwrap().is_empty(), "{what}: {:?}", self.calls);
        self.back();
        self.send_control(&missing(DURING.map(|(page, _)| page)));
        self.send_control(&Control::PostCopy { missing: DURING.len() as u64, demand_lanes: 0 });
        self.open();
        self.ends_well(what)
    }

    /// Takes all pages that were left behind.
    fn ends_well(mut self, what: &str) -> Report {
        let mut vm = guest();
        vm.write_more();
        let expected = checksums(&vm.ram);
        while self.have != expected {
            self.take_pages(false);
        }
        assert!(self.calls.lock().unwrap().is_empty(), "{what}: {:?}", self.calls);
        self.send_control(&Control::Complete(FaultSummary::default()));
        self.hear("done");
        let (report, vm) = self.ended.recv_timeout(HANG).unwrap_or_else(|_| panic!("{what}: the source hangs"));
        assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
        assert_eq!(*vm.calls.lock().unwrap(), ["released"], "{what}");
        report
    }
}

/// The next lane that the source opens, behind its preamble.
/// Takes the next lane that the source opens, which is of this kind, up to its first frame.
pub(crate) fn lane(lanes: &mpsc::Receiver<(LaneKind, End)>, kind: LaneKind) -> End {
    let (is, end) = lanes.recv_timeout(HANG).unwrap_or_else(|_| panic!("hangs: no {kind:?} lane"));
    assert_eq!(is, kind);
    let preamble = take(&end, Preamble::LEN);
    assert_eq!(Preamble::decode(preamble.first_chunk().unwrap()).unwrap().kind, kind);
    end
}

pub(crate) fn take(end: &End, len: usize) -> Vec<u8> {
    drop(end.incoming.wait("something of the source", |s| s.closed || s.ended || s.bytes.len() >= len));
    let mut bytes = vec![0; len];
    end.incoming.read(&mut bytes, None).expect("the lane goes on");
    bytes
}

type Says = Box<dyn Fn(&mut Peer) + Sync>;

/// Each of these ends the link. It makes no difference whether *running* was said before.
#[test]
fn what_is_refused() {
    let control = |frame: Control| -> Says { Box::new(move |peer| peer.send_control(&frame)) };
    let request = |pages: Vec<u64>, generation| -> Says { Box::new(move |peer| peer.request(&pages, generation)) };
    let demand = |bytes: Vec<u8>| -> Says {
        Box::new(move |peer| peer.demand.as_ref().unwrap().outgoing.write(&bytes).unwrap_or_default())
    };
    let pages = guest().ram_pages();
    let too_many = || {
        let mut body = (MAX_REQUESTS as u32 + 1).to_le_bytes().to_vec();
        (0..=MAX_REQUESTS).for_each(|_| body.extend(3u64.to_le_bytes()));
        let header = Bulk::Request { pages: vec![3] }.encode(0, 0, GENERATION);
        let mut header = Header::decode(header.first_chunk().unwrap()).unwrap();
        (header.body, header.body_crc) = (body.len() as u32, crc32fast::hash(&body));
        [&header.encode()[..], &body].concat()
    };
    let cases: Vec<(&str, Says)> = vec![
        ("a page outside RAM", request(vec![3, pages], GENERATION)),
        ("a page far outside RAM", request(vec![u64::MAX], GENERATION)),
        ("pages of a round", request(vec![3], GENERATION - 1)),
        ("pages of a later generation", request(vec![3], GENERATION + 1)),
        ("pages of no generation", request(vec![3], 0)),
        ("too many pages at once", demand(too_many())),
        ("pages on a demand lane", demand(Bulk::RoundEnd { pages: 0 }.encode(0, 0, GENERATION))),
        ("data on a demand lane", demand(crate::post_copy::pages(&[3], 0, GENERATION))),
        ("a control frame on a demand lane", demand(Control::Running.encode(0, 0, 1))),
        ("a frame out of sequence", demand(Bulk::Request { pages: vec![3] }.encode(0, 1, GENERATION))),
        ("no frame at all", demand(vec![0xff; Header::LEN])),
        (
            "the end of the demand lane",
            Box::new(|peer| peer.demand.as_ref().unwrap().outgoing.update(|s| s.ended = true)),
        ),
        ("ready again", control(Control::Ready)),
        ("a round again", control(Control::RoundReceived { generation: 1 })),
        ("a source's frame", control(Control::Run)),
        ("an error", control(Control::error(migration_core::wire::ErrorCode::Other, "no wish to go on"))),
        ("another epoch", Box::new(|peer| peer.say_as(&Control::Pong, 2))),
        (
            "a frame of another kind",
            Box::new(|peer| {
                peer.control.outgoing.write(&Bulk::RoundEnd { pages: 0 }.encode(0, peer.words, 1)).unwrap_or_default();
            }),
        ),
    ];
    let refused = |start: fn() -> Peer, what: &str, says: &Says| {
        let mut peer = start();
        says(&mut peer);
        let report = peer.gets_served(what);
        assert_eq!(report.recoveries, 1, "{what}");
    };
    // each mostly waits
    thread::scope(|scope| {
        for (what, says) in &cases {
            for start in [Peer::in_doubt, Peer::serving] {
                scope.spawn(move || refused(start, what, says));
            }
        }
    });
    // while the VM is the source's, it ends the attempt
    for (what, says) in &cases[..11] {
        let mut peer = Peer::offered();
        says(&mut peer);
        let (report, vm) = peer.ended.recv_timeout(HANG).unwrap_or_else(|_| panic!("{what}: the source hangs"));
        assert_eq!(report.outcome, Outcome::Failed, "{what}");
        assert_eq!(*vm.calls.lock().unwrap(), ["resume"], "{what}");
    }
}

/// What is not there any more is not sent, and does no harm.
#[test]
fn what_does_nothing() {
    let mut peer = Peer::offered();
    // before anything is pushed; 0 was sent in a round, 4 never held anything
    peer.request(&[0, 4, 3, 3], GENERATION);
    peer.request(&[], GENERATION);
    peer.request(&[3, 0, 513], GENERATION);
    for _ in 0..2 {
        peer.take_pages(true);
    }
    assert!(peer.have.contains_key(&3) && peer.have.contains_key(&513) && !peer.have.contains_key(&4));
    peer.send_control(&Control::Ready);
    peer.hear("run");
    peer.send_control(&Control::Running);
    // a list that nobody has asked for
    peer.send_control(&missing([0, 1]));
    peer.send_control(&Control::PostCopy { missing: 2, demand_lanes: 0 });
    peer.send_control(&Control::Pong);
    peer.send_control(&Control::Running);
    let report = peer.ends_well("requests in vain");
    assert_eq!((report.recoveries, report.pages.demanded, report.faults.network), (0, 2, 2));
    assert_eq!(report.pages.demanded + report.pages.pushed, DURING.len() as u64, "each page once");
}

/// After a loss the source believes no list that cannot be: neither more than it left behind, nor
/// less than it has not sent.
#[test]
fn lists_that_cannot_be() {
    let all = || missing(DURING.map(|(page, _)| page));
    let post_copy = |missing| Control::PostCopy { missing, demand_lanes: 0 };
    let word = |first| Control::Missing { first, bitmap: vec![1; 8].into() };
    let complete = || Control::Complete(FaultSummary::default());
    let count = DURING.len() as u64;
    for (what, says) in [
        ("a page that was sent in a round", vec![all(), missing([0]), post_copy(count + 1)]),
        ("a page that was never touched", vec![all(), missing([4]), post_copy(count + 1)]),
        ("a page outside RAM", vec![all(), word(576), post_copy(count + 1)]),
        ("a page far outside RAM", vec![word(u64::MAX - 63), post_copy(1)]),
        ("half a word", vec![Control::Missing { first: 0, bitmap: vec![1; 7].into() }]),
        ("less than the announced", vec![all(), post_copy(count + 1)]),
        ("more than the announced", vec![all(), post_copy(count - 1)]),
        ("far less than the announced", vec![all(), post_copy(u64::MAX)]),
        ("not a page that was never sent", vec![missing([1, 2, 3]), post_copy(3), complete()]),
        ("nothing", vec![post_copy(0), complete()]),
        ("complete without a page", vec![complete()]),
    ] {
        let mut peer = Peer::in_doubt();
        // nothing was pushed yet
        peer.control.outgoing.update(|s| s.ended = true);
        for _ in 0..2 {
            peer.back();
            says.iter().for_each(|frame| peer.send_control(frame));
        }
        let report = peer.gets_served(what);
        assert!(report.recoveries <= 3, "{what}: {}", report.recoveries);
    }
    // said once more, what was sent and lost is believed
    let mut peer = Peer::serving();
    peer.control.outgoing.update(|s| s.ended = true);
    peer.back();
    peer.send_control(&all());
    peer.send_control(&post_copy(count));
    peer.open();
    peer.control.outgoing.update(|s| s.ended = true);
    assert_eq!(peer.gets_served("lost twice").recoveries, 2);
}

/// What was sent and is listed nevertheless, since it arrives late, is not listed again: the source
/// knows that it may be there.
#[test]
fn pages_that_arrive_behind_the_list() {
    let mut peer = Peer::serving();
    let mut vm = guest();
    vm.write_more();
    let expected = checksums(&vm.ram);
    while peer.have != expected {
        peer.take_pages(false);
    }
    peer.refuses.store(true, Ordering::Relaxed);
    peer.control.outgoing.update(|s| s.ended = true);
    peer.back();
    peer.send_control(&missing(DURING.map(|(page, _)| page)));
    peer.send_control(&Control::PostCopy { missing: DURING.len() as u64, demand_lanes: 0 });
    // no page goes out on this link
    peer.back();
    peer.ends_well("late pages");
}
