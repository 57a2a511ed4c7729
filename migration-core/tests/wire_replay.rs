//! Recorded streams of wire version 1, replayed against the receiver; and everything that can be wrong with a stream.
//!
//! `streams/v1` holds, for each recording, the bytes that a source sent on its lanes (`control`, `bulk-0`, `bulk-1`), the
//! state that it saved (`state`) and checksums of the RAM that the destination must have (`ram.txt`). `frames.txt` holds
//! the encoding of every kind of frame. They are part of the format: a change that makes these tests fail needs a new
//! version of the wire format. Only for a version that nobody has used yet may they be made anew:
//! `RECORD_STREAMS=1 cargo test -p migration-core --test wire_replay`.
//!
//! The token of a session is drawn by the destination, so it is put into the preambles of recorded bulk lanes, whose
//! checksum is then made right again. Likewise, an attempt after another one needs a higher epoch in its control frames.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, RamLayout, RamRegion, RamSlice,
    channel::{Channel, Closer, Connector, Halves, Listener, ReadHalf, WriteHalf},
    device::DeviceKind,
    engine::{Controller, ReceiveError, Receiver, ReceiverHandle, ReceiverOptions, SourceOptions, migrate},
    protocol::DestinationPhase,
    report::{Event, Observer, Outcome},
    state::{Section, VmState},
    strategy::{PreCopy, StopAndCopy, Strategy},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError, VmId},
    wire::{
        Bulk, Content, Control, ErrorCode, Extent, FEATURE_PAYLOAD_CRC, Header, Hello, LaneKind, Preamble,
        SessionToken, Welcome,
    },
};

/// A test that waits longer than this has found a hang.
const HANG: Duration = Duration::from_secs(20);
const VM: VmId = VmId(*b"a recorded guest");

// ---- channels in memory ----------------------------------------------------------------------------------------------

/// One direction of a channel.
#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
}

#[derive(Default)]
struct PipeState {
    bytes: VecDeque<u8>,
    /// No byte will follow.
    ended: bool,
    /// Both ends are cut: what is left is lost.
    closed: bool,
    /// The reader is gone.
    unread: bool,
    /// Who wrote here does not read the other direction any more.
    deaf: bool,
    /// The peer has vanished without a word: nothing comes, not even an end.
    silent: bool,
}

impl Pipe {
    /// Locks, also while a test fails.
    fn lock(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn update(&self, change: impl FnOnce(&mut PipeState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn wait(&self, what: &str, done: impl Fn(&PipeState) -> bool) -> MutexGuard<'_, PipeState> {
        let (guard, waited) = self.changed.wait_timeout_while(self.lock(), HANG, |s| !done(s)).unwrap();
        if waited.timed_out() {
            drop(guard);
            panic!("hangs: {what}");
        }
        guard
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        if state.closed || state.unread {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.bytes.extend(bytes);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn read(&self, to: &mut [u8], idle: Option<Duration>) -> io::Result<()> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if state.bytes.len() >= to.len() {
                state.bytes.drain(..to.len()).zip(to).for_each(|(from, to)| *to = from);
                self.changed.notify_all();
                return Ok(());
            }
            if state.ended {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if state.silent && idle.is_some() {
                // no need to look at the clock: nothing will ever come
                return Err(io::ErrorKind::TimedOut.into());
            }
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// A channel: what this end receives, and what it sends.
struct End {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
    /// Gets a copy of what is sent, when a stream is recorded.
    tap: Option<Arc<Mutex<Vec<u8>>>>,
}

fn pair() -> (End, End) {
    let (a, b) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    (End { incoming: a.clone(), outgoing: b.clone(), tap: None }, End { incoming: b, outgoing: a, tap: None })
}

impl Channel for End {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let closer = Ends { pipes: [self.incoming.clone(), self.outgoing.clone()] };
        let reader = PipeReader { pipe: self.incoming, answers: self.outgoing.clone(), idle: None };
        let writer = PipeWriter { pipe: self.outgoing, tap: self.tap };
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        "memory".into()
    }
}

struct PipeReader {
    pipe: Arc<Pipe>,
    answers: Arc<Pipe>,
    idle: Option<Duration>,
}

impl ReadHalf for PipeReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.pipe.read(buf, self.idle)
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        for slice in slices {
            let mut bytes = vec![0; slice.len()];
            self.pipe.read(&mut bytes, self.idle)?;
            slice.copy_from(&bytes);
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        Ok(())
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.pipe.update(|s| s.unread = true);
        self.answers.update(|s| s.deaf = true);
    }
}

struct PipeWriter {
    pipe: Arc<Pipe>,
    tap: Option<Arc<Mutex<Vec<u8>>>>,
}

impl WriteHalf for PipeWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut bytes = head.to_vec();
        for slice in slices {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        if let Some(tap) = &self.tap {
            tap.lock().unwrap().extend_from_slice(&bytes);
        }
        self.pipe.write(&bytes)
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        self.pipe.update(|s| s.ended = true);
    }
}

struct Ends {
    pipes: [Arc<Pipe>; 2],
}

impl Closer for Ends {
    fn close(&self) {
        self.pipes.iter().for_each(|p| p.update(|s| s.closed = true));
    }
}

/// Accepts what is sent to it; `None` only wakes the receiver.
struct Door(mpsc::Receiver<Option<End>>);

impl Listener for Door {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let end = self.0.recv_timeout(timeout).unwrap_or(None);
        Ok(end.map(|end| Box::new(end) as Box<dyn Channel>))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

// ---- the guest -------------------------------------------------------------------------------------------------------

/// Three stripes, so that both lanes have some, and a hole in the address space.
fn layout() -> RamLayout {
    let regions = vec![RamRegion { gpa: 0, len: 600 << 12 }, RamRegion { gpa: 1 << 30, len: 680 << 12 }];
    RamLayout::new(regions).unwrap()
}

/// What the guest writes: a page's number and the byte that it is full of, before the migration and while it runs.
const BEFORE: [(u64, u8); 6] = [(0, 1), (1, 2), (511, 3), (512, 4), (600, 5), (1279, 6)];
const DURING: [(u64, u8); 3] = [(1, 0), (513, 7), (600, 8)];

struct RecordedVm {
    ram: Arc<HeapRam>,
    dirty: Arc<DirtyBitmap>,
    tracker: BitmapTracker,
    wrote: bool,
}

impl RecordedVm {
    fn new() -> Self {
        let dirty = DirtyBitmap::new(layout());
        let tracker = BitmapTracker::new(dirty.clone());
        let vm = Self { ram: Arc::new(HeapRam::new(layout()).unwrap()), dirty, tracker, wrote: false };
        BEFORE.iter().for_each(|&(page, byte)| vm.write(page, byte));
        vm
    }

    fn write(&self, page: u64, byte: u8) {
        let ram: &dyn GuestRam = &*self.ram;
        ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[byte; PAGE_SIZE]);
        self.dirty.mark_page(page);
    }

    /// Writes once, at the first occasion after tracking began.
    fn write_more(&mut self) {
        if !std::mem::replace(&mut self.wrote, true) {
            DURING.iter().for_each(|&(page, byte)| self.write(page, byte));
        }
    }
}

impl SourceVm for RecordedVm {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        Ok(description())
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn iterate_state(&mut self, _budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        Ok((vec![piece()], 0))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        // the guest's last writes
        self.write_more();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        Ok(state())
    }

    fn released(&mut self) {}
}

fn description() -> VmDescription {
    let gpu = DeviceKind { name: "gpu".into(), instance: 1, oldest: 1, version: 2 };
    let (host_needs, config) = (Bytes::from_static(b"needs"), Bytes::from_static(b"config"));
    VmDescription { id: VM, layout: layout(), devices: vec![gpu], host_needs, config }
}

fn piece() -> Section {
    Section { name: "gpu".into(), instance: 1, version: 2, data: Bytes::from_static(b"a piece") }
}

fn state() -> VmState {
    let section = |name: &str, instance, data| Section { name: name.into(), instance, version: 1, data };
    VmState {
        sections: vec![
            section("vcpu", 0, Bytes::from_static(b"registers of vCPU 0")),
            section("vcpu", 1, Bytes::from_static(b"registers of vCPU 1")),
            section("vm", 0, Bytes::new()),
        ],
    }
}

/// A VM that arrived: its RAM, the state that was loaded, and how many pieces came before.
struct Arrived {
    ram: Arc<HeapRam>,
    state: Option<VmState>,
    pieces: usize,
    running: bool,
}

impl Arrived {
    /// The pages that are not zero, and their checksums.
    fn pages(&self) -> BTreeMap<u64, u32> {
        let ram: &dyn GuestRam = &*self.ram;
        let mut bytes = vec![0; PAGE_SIZE];
        let mut checksum = |page| {
            let slice = ram.slice(PageRange::new(page, 1)).unwrap();
            slice.copy_to(&mut bytes);
            (page, crc32fast::hash(&bytes), slice.is_zero())
        };
        let pages = (0..layout().pages()).map(&mut checksum);
        pages.filter(|(.., zero)| !zero).map(|(page, crc, _)| (page, crc)).collect()
    }
}

struct ArrivingVm {
    arrived: Option<Arrived>,
    to: mpsc::Sender<Arrived>,
}

impl DestinationVm for ArrivingVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.arrived.as_ref().unwrap().ram.clone()
    }

    fn load_piece(&mut self, loaded: &Section) -> Result<(), VmError> {
        if *loaded != piece() {
            return Err(VmError::new("an unknown piece"));
        }
        self.arrived.as_mut().unwrap().pieces += 1;
        Ok(())
    }

    fn load_state(&mut self, loaded: &VmState) -> Result<(), VmError> {
        if loaded.find("vcpu", 0).is_none() {
            return Err(VmError::new("the state has no vCPU"));
        }
        self.arrived.as_mut().unwrap().state = Some(loaded.clone());
        Ok(())
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        let mut arrived = self.arrived.take().unwrap();
        arrived.running = running;
        // a test that does not look has dropped the other end
        let _ = self.to.send(arrived);
        Ok(())
    }
}

struct Host(mpsc::Sender<Arrived>);

impl DestinationHost for Host {
    fn build(&mut self, vm: &VmDescription) -> Result<Box<dyn DestinationVm>, VmError> {
        if *vm != description() {
            return Err(VmError::new("another VM than the one recorded"));
        }
        let ram = Arc::new(HeapRam::new(layout()).unwrap());
        let arrived = Arrived { ram, state: None, pieces: 0, running: false };
        Ok(Box::new(ArrivingVm { arrived: Some(arrived), to: self.0.clone() }))
    }

    fn adopted(&mut self, _vm: Box<dyn DestinationVm>) {}
}

// ---- a destination under test ----------------------------------------------------------------------------------------

struct Log(Mutex<mpsc::Sender<String>>);

impl Observer for Log {
    fn event(&self, event: &Event) {
        let text = match event {
            Event::BadPeer { why, .. } | Event::Discarded(why) | Event::Warning(why) => why,
            _ => return,
        };
        let _ = self.0.lock().unwrap().send(text.clone());
    }
}

struct Destination {
    door: mpsc::Sender<Option<End>>,
    handle: ReceiverHandle,
    thread: Option<thread::JoinHandle<Result<(), ReceiveError>>>,
    arrived: mpsc::Receiver<Arrived>,
    log: mpsc::Receiver<String>,
}

impl Destination {
    fn new() -> Self {
        Self::patient(HANG)
    }

    fn patient(idle_timeout: Duration) -> Self {
        let (door, ends) = mpsc::channel();
        let (arrived_tx, arrived) = mpsc::channel();
        let (log_tx, log) = mpsc::channel();
        let observer = Arc::new(Log(Mutex::new(log_tx)));
        let options = ReceiverOptions { observer, idle_timeout, ..ReceiverOptions::default() };
        let receiver = Receiver::new(Box::new(Host(arrived_tx)), options);
        let handle = receiver.handle();
        let thread = thread::spawn(move || receiver.run(&mut Door(ends)));
        Self { door, handle, thread: Some(thread), arrived, log }
    }

    fn connect(&self, bytes: &[u8]) -> End {
        let (here, there) = pair();
        here.outgoing.write(bytes).unwrap();
        self.door.send(Some(there)).unwrap();
        here
    }

    /// Waits until the receiver has ended with a VM; also returns all that it told its observer, in lines.
    fn finish(mut self) -> (Arrived, String) {
        // it may have seen the end by itself already
        let _ = self.door.send(None);
        self.thread.take().unwrap().join().unwrap().unwrap();
        let arrived = self.arrived.recv_timeout(HANG).expect("a VM has arrived");
        // its threads have ended: nothing more will come
        (arrived, self.log.try_iter().collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.stop();
            let _ = self.door.send(None);
            let ended = thread.join();
            if !thread::panicking() {
                ended.unwrap().expect_err("stopped without a VM");
            }
        }
    }
}

/// The next frame that the receiver says on a control lane; `None` at its end.
fn said(control: &End) -> Option<Control> {
    let bytes = |len: usize| {
        let mut bytes = vec![0; len];
        drop(
            control.incoming.wait("a word of the receiver", |s| s.closed || s.ended || s.deaf || s.bytes.len() >= len),
        );
        // what was said before the lane was closed still counts
        let mut state = control.incoming.lock();
        (state.bytes.len() >= len).then(|| {
            state.bytes.drain(..len).zip(&mut bytes).for_each(|(from, to)| *to = from);
            bytes
        })
    };
    let header = Header::decode(bytes(Header::LEN)?.first_chunk().unwrap()).unwrap();
    let body = bytes(header.body as usize)?;
    Some(Control::decode(&header, &body).unwrap())
}

// ---- recorded streams ------------------------------------------------------------------------------------------------

/// What a source sent: the control lane, then the bulk lanes.
#[derive(Clone)]
struct Stream {
    lanes: Vec<Vec<u8>>,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/streams/v1")
}

fn recording() -> bool {
    std::env::var_os("RECORD_STREAMS").is_some()
}

/// Records a stream where that is asked for, and reads it.
fn stream(name: &str) -> Stream {
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

fn record(name: &str) {
    let destination = Destination::new();
    let link = Recorder { door: destination.door.clone(), taps: Mutex::default() };
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
    let taps = link.taps.into_inner().unwrap();
    for (lane, tap) in ["control", "bulk-0", "bulk-1"].iter().zip(&taps) {
        fs::write(folder.join(lane), &*tap.lock().unwrap()).unwrap();
    }
    fs::write(folder.join("state"), state().encode()).unwrap();
    let pages: String = arrived.pages().iter().map(|(page, crc)| format!("{page} {crc:08x}\n")).collect();
    fs::write(folder.join("ram.txt"), pages).unwrap();
}

struct Recorder {
    door: mpsc::Sender<Option<End>>,
    taps: Mutex<Vec<Arc<Mutex<Vec<u8>>>>>,
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
fn frames(lane: &[u8]) -> Vec<usize> {
    let mut at = vec![Preamble::LEN];
    while let Some(header) = lane[at[at.len() - 1]..].first_chunk() {
        let header = Header::decode(header).unwrap();
        at.push(at[at.len() - 1] + Header::LEN + header.body as usize + header.payload as usize);
    }
    at
}

/// Changes the header at `at`.
fn with_header(lane: &mut [u8], at: usize, change: impl FnOnce(&mut Header)) {
    let place: &mut [u8; Header::LEN] = (&mut lane[at..at + Header::LEN]).try_into().unwrap();
    let mut header = Header::decode(place).unwrap();
    change(&mut header);
    *place = header.encode();
}

/// Makes the sequence numbers of a lane right.
fn renumber(lane: &mut [u8]) {
    let starts = frames(lane);
    for (sequence, &at) in starts[..starts.len() - 1].iter().enumerate() {
        with_header(lane, at, |h| h.sequence = sequence as u32);
    }
}

impl Stream {
    /// The same stream as an attempt with another epoch.
    fn epoch(mut self, epoch: u32) -> Self {
        let lane = &mut self.lanes[0];
        let starts = frames(lane);
        for &at in &starts[..starts.len() - 1] {
            with_header(lane, at, |h| h.number = epoch);
        }
        self
    }

    /// A bulk lane's bytes, in this session.
    fn bulk(&self, index: usize, token: SessionToken) -> Vec<u8> {
        let mut bytes = self.lanes[1 + index].clone();
        let mut preamble = Preamble::decode(bytes.first_chunk().unwrap()).unwrap();
        preamble.session = token;
        bytes[..Preamble::LEN].copy_from_slice(&preamble.encode());
        bytes
    }
}

/// Spoils the bytes of a lane: its number, its bytes.
type Spoil<'a> = &'a dyn Fn(usize, &mut Vec<u8>);

fn as_recorded(_lane: usize, _bytes: &mut Vec<u8>) {}

/// Feeds a stream whose bytes `spoil` may change, and waits until the receiver is done with it. Lanes that end early
/// do so without a word. Returns what the receiver said on the control lane behind *welcome*.
fn feed(destination: &Destination, stream: &Stream, spoil: Spoil<'_>) -> (Option<SessionToken>, Vec<Control>) {
    let (mut control, mut token) = (stream.lanes[0].clone(), None);
    spoil(0, &mut control);
    let whole = control.len() >= stream.lanes[0].len();
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
                    // refused; the source has more patience than this test, so it opens the lane rightly and gives up
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
    drop(control.outgoing.wait("the end of the control lane", |s| s.unread));
    for lane in bulk {
        lane.outgoing.update(|s| s.ended = true);
    }
    (token, words)
}

fn check(name: &str, arrived: &Arrived) {
    let folder = folder().join(name);
    let state = fs::read(folder.join("state")).unwrap();
    assert_eq!(arrived.state.as_ref().map(VmState::encode), Some(state), "{name}: the state");
    let expected = fs::read_to_string(folder.join("ram.txt")).unwrap();
    let pages: String = arrived.pages().iter().map(|(page, crc)| format!("{page} {crc:08x}\n")).collect();
    assert_eq!(pages, expected, "{name}: RAM");
    assert!(arrived.running);
}

/// Feeds a spoilt stream, then checks that the receiver says what is wrong, listens on, and takes a good one. Returns
/// all that it said, or nothing if the stream was whole up to the hand-over.
fn spoilt(name: &str, good: &Stream, what: &str, spoil: Spoil<'_>) -> String {
    let destination = Destination::new();
    let (token, _) = feed(&destination, good, spoil);
    let refused = match destination.handle.phase() {
        DestinationPhase::Empty | DestinationPhase::Ready => {
            assert!(destination.arrived.try_recv().is_err(), "{what}: a VM runs");
            feed(&destination, &good.clone().epoch(2), &as_recorded);
            true
        }
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
fn recorded_streams_arrive() {
    for (name, pieces) in [("pre-copy", 1), ("stop-and-copy-crc", 0)] {
        let stream = stream(name);
        let destination = Destination::new();
        let (_, said) = feed(&destination, &stream, &as_recorded);
        let names: Vec<_> = said.iter().map(Control::name).filter(|n| *n != "round received").collect();
        assert_eq!(names, ["prepared", "pong", "ready", "running"], "{name}");
        let (arrived, _) = destination.finish();
        check(name, &arrived);
        assert_eq!(arrived.pieces, pieces, "{name}");
    }
}

/// Every bit of the format but page data without checksum is covered by one: no flipped byte goes unnoticed.
#[test]
fn a_flipped_byte_anywhere() {
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
fn cut_after_any_byte() {
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
fn positions(stream: &Stream, lane: usize) -> Vec<usize> {
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
fn replayed_and_reordered_frames() {
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
            // what comes behind the end of the last round may find the VM running already, and its lane closed
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
type Case = (&'static str, usize, Box<dyn Fn(&mut Vec<u8>)>);

/// With right checksums and sequence numbers, and yet wrong.
#[test]
fn well_formed_nonsense() {
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

fn frames_until(lane: &[u8], kind: u8) -> usize {
    frames(lane).into_iter().find(|&at| lane[at] == kind).unwrap()
}

fn zeros(first: u64, count: u64) -> Bulk {
    let extents = vec![Extent { range: PageRange::new(first, count), content: Content::Zero }];
    Bulk::Pages { extents, payload_crc: 0 }
}

/// Puts `frame` at the place of a bulk lane's first one; what follows is out of sequence, but is never read.
fn replace(lane: &mut Vec<u8>, index: usize, frame: &Bulk) {
    let starts = frames(lane);
    drop(lane.splice(starts[index]..starts[index + 1], frame.encode(0, index as u32, 1)));
}

/// A whole session, sent again as it was, is refused: its epoch is void. The receiver is in the middle of the next one.
#[test]
fn a_replayed_session_is_refused() {
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
    let (token, words) = feed(&destination, &good, &as_recorded);
    assert_eq!(token, None);
    assert!(matches!(&words[..], [Control::Error { code: ErrorCode::StaleEpoch, .. }]), "{words:?}");
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready, "the VM is still held");
    feed(&destination, &good.clone().epoch(2), &as_recorded);
    check("pre-copy", &destination.finish().0);
}

/// Numbers frames and puts a preamble before them.
fn lane(kind: LaneKind, index: u16, token: SessionToken, number: u32, frames: &[Control]) -> Vec<u8> {
    let mut bytes = Preamble::new(kind, index, token).encode().to_vec();
    for (sequence, frame) in frames.iter().enumerate() {
        bytes.extend(frame.encode(0, sequence as u32, number));
    }
    bytes
}

fn hello(streams: u16) -> Control {
    let hello = Hello { features: 0, streams, strategy: "by hand".into(), vm: description() };
    Control::Hello(Box::new(hello))
}

fn token_of(control: &End) -> SessionToken {
    match said(control) {
        Some(Control::Welcome(welcome)) => welcome.session,
        other => panic!("{other:?} instead of welcome"),
    }
}

/// A source whose host loses its power says nothing any more, on any lane. The next attempt must not find it busy.
#[test]
fn a_source_that_falls_silent_behind_its_offer() {
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
fn a_receiver_that_is_stopped_ends_at_once() {
    let mut destination = Destination::patient(Duration::from_hours(1));
    let lane = |epoch| lane(LaneKind::Control, 0, SessionToken::default(), epoch, &[hello(2)]);
    let superseded = destination.connect(&lane(1));
    token_of(&superseded);
    let control = destination.connect(&lane(2));
    token_of(&control);
    assert_eq!(said(&superseded), None, "its lane is closed");
    let offered = destination.connect(&[]);
    let thread = destination.thread.take().unwrap();
    destination.handle.stop();
    destination.door.send(None).unwrap();
    drop(control.incoming.wait("the end of the receiver", |s| s.deaf));
    drop(offered.incoming.wait("the end of a lane that said nothing", |s| s.deaf));
    thread.join().unwrap().expect_err("stopped without a VM");
}

/// What cannot be decoded is answered with a code too, so that the source's user learns the reason.
#[test]
fn a_malformed_hello_is_answered() {
    let destination = Destination::new();
    let mut bytes = lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello(1)]);
    bytes.push(0);
    let body = bytes[Preamble::LEN + Header::LEN..].to_vec();
    with_header(&mut bytes, Preamble::LEN, |h| (h.body, h.body_crc) = (body.len() as u32, crc32fast::hash(&body)));
    let control = destination.connect(&bytes);
    let answer = said(&control);
    assert!(matches!(answer, Some(Control::Error { code: ErrorCode::Protocol, .. })), "{answer:?}");
}

/// A lane that is in the middle of a later round when the state is loaded could write into a VM that runs.
#[test]
fn no_page_is_under_way_when_the_state_is_loaded() {
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

// ---- golden frames ---------------------------------------------------------------------------------------------------

/// One of each frame, with every field set.
fn samples() -> Vec<(String, Vec<u8>)> {
    let token = SessionToken(*b"a session token.");
    let hello = Hello { features: FEATURE_PAYLOAD_CRC, streams: 4, strategy: "pre-copy".into(), vm: description() };
    let control = [
        Control::Hello(Box::new(hello)),
        Control::Welcome(Welcome { version: 1, features: FEATURE_PAYLOAD_CRC, streams: 4, session: token }),
        Control::Prepared,
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
    let lanes = [LaneKind::Control, LaneKind::Bulk, LaneKind::Reattach];
    let preambles = lanes.map(|kind| (format!("preamble {kind:?}"), Preamble::new(kind, 2, token).encode().to_vec()));
    let control = control.iter().map(|f| (f.name().to_owned(), f.encode(0, 17, 3)));
    let bulk = bulk.iter().map(|(name, f)| ((*name).to_owned(), f.encode(0, 18, 4)));
    preambles.into_iter().chain(control).chain(bulk).collect()
}

#[test]
fn every_frame_is_encoded_as_it_always_was() {
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
    let codes = [Other, Version, Protocol, Busy, Mismatch, State, Resources, Cancelled, UnknownSession, StaleEpoch];
    assert!(codes.into_iter().map(code).eq(0..10), "error codes keep their numbers");
}
