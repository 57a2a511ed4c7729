//! Checkpoints: both ends of them, over stores that fail and channels that end.

use std::{collections::VecDeque, sync::mpsc, thread};

use super::*;
use crate::{
    HeapRam, PageRange, RamLayout, RamRegion, RamSlice,
    checkpoint::{MemoryStore, PageData},
    engine::missing::tests::arrive,
    fence::NoFence,
    report::NoObserver,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
};

struct Script(VecDeque<u8>);

impl ReadHalf for Script {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        if self.0.len() < buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.iter_mut().for_each(|byte| *byte = self.0.pop_front().unwrap_or(0));
        Ok(())
    }

    fn read_ram(&mut self, _slices: &[RamSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl WriteHalf for Said {
    fn write_all(&mut self, head: &[u8], _slices: &[RamSlice<'_>]) -> io::Result<()> {
        lock(&self.0).extend_from_slice(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// What a destination sends, frame by frame.
#[derive(Default)]
struct Destination {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Destination {
    fn frame(mut self, frame: Checkpoint, number: u32) -> Self {
        self.bytes.extend(frame.encode(self.sequence, number));
        self.sequence += 1;
        self
    }

    fn pages(mut self, first: u64, count: u64, fill: u8, number: u32) -> Self {
        let extents = vec![Extent { range: PageRange::new(first, count), content: Content::Plain }];
        let frame = Bulk::Pages { extents, payload_crc: 0 };
        let payload = frame.payload();
        self.bytes.extend(frame.encode(0, self.sequence, number));
        self.bytes.extend(std::iter::repeat_n(fill, payload));
        self.sequence += 1;
        self
    }

    fn zeros(mut self, first: u64, count: u64, number: u32) -> Self {
        let extents = vec![Extent { range: PageRange::new(first, count), content: Content::Zero }];
        self.bytes.extend(Bulk::Pages { extents, payload_crc: 0 }.encode(0, self.sequence, number));
        self.sequence += 1;
        self
    }

    fn whole(self, number: u32) -> Self {
        let state = VmState::default().encode();
        let state_bytes = state.len() as u64;
        self.pages(3, 2, number as u8, number)
            .frame(Checkpoint::State(state.into()), number)
            .frame(Checkpoint::Commit { pages: 2, state_bytes }, number)
    }
}

/// Has a source of 16 pages read it: the checkpoint that counts then, its page 4, and why the lane ended.
fn kept(destination: Destination, wanted: bool) -> (Option<u32>, u8, MigrationError) {
    let store = Arc::new(Mutex::new(MemoryStore::default()));
    let reverse = wanted.then(|| store.clone() as Arc<Mutex<dyn CheckpointStore>>);
    let error = kept_in(reverse, destination);
    let mut page = 0;
    let mut store = lock(&store);
    let read = store.restore(&mut |number, data| {
        if number == 4 {
            page = data.map_or(0, |data| data[9]);
        }
        Ok(())
    });
    read.unwrap();
    (store.latest().map(|(number, _)| number), page, error)
}

/// A source of 16 pages, which keeps checkpoints there.
fn keeper(reverse: Option<Arc<Mutex<dyn CheckpointStore>>>, destination: Destination) -> Keeper {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 16 << 12 }]).unwrap();
    Keeper {
        reader: Box::new(Script(destination.bytes.into())),
        writer: Box::new(Said::default()),
        peer: "the destination".into(),
        ram: Arc::new(HeapRam::new(layout).unwrap()),
        fail_safe: FailSafe { reverse, ..FailSafe::in_memory(Arc::new(NoFence)) },
        identity: Bytes::new(),
        kept: Arc::default(),
        wire_bytes: Arc::default(),
        observer: Arc::new(NoObserver),
        sent: 0,
        zeros: PageSet::empty(16),
    }
}

/// Has a source of 16 pages, which keeps checkpoints there, read it: why the lane ended.
fn kept_in(reverse: Option<Arc<Mutex<dyn CheckpointStore>>>, destination: Destination) -> MigrationError {
    let (tx, inputs) = mpsc::channel();
    keeper(reverse, destination).run(PeerInputs::new(tx, Arc::default(), Arc::default()));
    let ended = inputs.iter().find_map(|input| match input {
        Input::Lane(Err(error)) => Some(error),
        _ => None,
    });
    ended.unwrap()
}

/// Counts what is put.
#[derive(Default)]
struct Counting(u64);

impl CheckpointStore for Counting {
    fn put(&mut self, _page: u64, _data: PageData<'_>) -> io::Result<()> {
        self.0 += 1;
        Ok(())
    }

    fn commit(&mut self, _number: u32, _state: Bytes) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self) {}

    fn latest(&self) -> Option<(u32, Bytes)> {
        None
    }

    fn restore(&mut self, _take: &mut dyn FnMut(u64, PageData<'_>) -> io::Result<()>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn pages_that_cost_a_peer_nothing_do_not_make_the_store_grow() {
    let state = || Bytes::from(VmState::default().encode());
    // checkpoint after checkpoint of zeros
    let mut destination = Destination::default();
    for number in 1..=100 {
        let commit = Checkpoint::Commit { pages: 16, state_bytes: state().len() as u64 };
        destination = destination.zeros(0, 16, number).frame(Checkpoint::State(state()), number).frame(commit, number);
    }
    // a page that was written in between counts again
    let destination = destination.pages(3, 1, 7, 101).zeros(3, 1, 101);
    let store = Arc::new(Mutex::new(Counting::default()));
    let error = kept_in(Some(store.clone()), destination);
    assert!(matches!(error, MigrationError::Link { .. }), "{error}");
    assert_eq!(lock(&store).0, 16 + 2);
}

#[test]
fn a_checkpoint_that_never_ends_is_refused() {
    for zero in [false, true] {
        let mut destination = Destination::default();
        for _ in 0..3 {
            destination = if zero { destination.zeros(0, 16, 1) } else { destination.pages(0, 16, 9, 1) };
        }
        let store = Arc::new(Mutex::new(Counting::default()));
        let error = kept_in(Some(store.clone()), destination);
        assert!(matches!(error, MigrationError::Malformed(DecodeError::TooLong { .. })), "{error}");
        assert!(lock(&store).0 <= 32);
    }
}

#[test]
fn checkpoints_are_kept_whole() {
    let introduced = || Destination::default().frame(Checkpoint::Identity(Bytes::from_static(b"it")), 0);
    let (number, page, error) = kept(introduced().whole(1).whole(2), true);
    assert_eq!((number, page), (Some(2), 2));
    assert!(matches!(error, MigrationError::Link { .. }), "{error}");
    // the third one ends before its commit
    let (number, page, _) = kept(introduced().whole(1).whole(2).pages(3, 2, 3, 3), true);
    assert_eq!((number, page), (Some(2), 2));
}

#[test]
fn what_is_kept_is_counted_and_acknowledged() {
    let destination = Destination::default().frame(Checkpoint::Identity(Bytes::from_static(b"it")), 0);
    let destination = destination.whole(1).whole(2);
    let bytes = destination.bytes.len() as u64;
    let said = Said::default();
    let keeper = Keeper {
        writer: Box::new(said.clone()),
        ..keeper(Some(Arc::new(Mutex::new(MemoryStore::default()))), destination)
    };
    let (kept, wire_bytes) = (keeper.kept.clone(), keeper.wire_bytes.clone());
    kept.handed_over.store(true, Ordering::Relaxed);
    let (tx, _inputs) = mpsc::channel();
    keeper.run(PeerInputs::new(tx, Arc::default(), Arc::default()));
    assert_eq!(kept.counts(), CheckpointCounts { protected: true, count: 2, bytes });
    assert!(kept.heard.load(Ordering::Relaxed));
    assert_eq!(lock(&kept.identity).as_deref(), Some(&b"it"[..]));
    let said = lock(&said.0).clone();
    assert_eq!(wire_bytes.load(Ordering::Relaxed), bytes + said.len() as u64);
    let (mut script, mut sequence, mut frames) = (Script(said.into()), 0, Vec::new());
    while let Ok((header, body)) = read_frame(&mut script, &mut sequence, "the source") {
        frames.push((header.number, Checkpoint::decode(&header, &body).unwrap()));
    }
    let (interval_us, detect_us) = (100_000, 1_000_000);
    let every = Checkpoint::Every { interval_us, detect_us, identity: Bytes::new() };
    assert_eq!(frames, [(0, every), (1, Checkpoint::Committed), (2, Checkpoint::Committed)]);
}

#[test]
fn a_checkpoint_may_be_as_large_as_its_limits() {
    // each page twice
    let state = Bytes::from(VmState::default().encode());
    let commit = Checkpoint::Commit { pages: 32, state_bytes: state.len() as u64 };
    let destination = Destination::default().pages(0, 16, 8, 1).pages(0, 16, 9, 1);
    let (number, page, _) = kept(destination.frame(Checkpoint::State(state), 1).frame(commit, 1), true);
    assert_eq!((number, page), (Some(1), 9));

    let chunk = |len| Checkpoint::State(Bytes::from(vec![0; len]));
    for (len, good) in [(10, true), (11, false), (12, false)] {
        let mut keeper = keeper(None, Destination::default().frame(chunk(len), 1));
        let mut incoming = Incoming { state: vec![0; MAX_STATE - 10], ..Incoming::default() };
        let (tx, _inputs) = mpsc::channel();
        let inputs = PeerInputs::new(tx, Arc::default(), Arc::default());
        assert_eq!(keeper.frame(&mut 0, &mut incoming, &inputs).is_ok(), good, "{len}");
        assert!(incoming.state.len() <= MAX_STATE);
    }
}

#[test]
fn nonsense_of_a_destination_is_refused_and_changes_nothing() {
    let state = || Bytes::from(VmState::default().encode());
    let commit = |pages| Checkpoint::Commit { pages, state_bytes: state().len() as u64 };
    let after = || Destination::default().whole(1);
    let bad = [
        ("outside RAM", after().pages(15, 2, 9, 2)),
        ("another's number", after().pages(4, 1, 9, 2).pages(4, 1, 9, 3)),
        ("number 0", after().pages(4, 1, 9, 0)),
        ("a page too few", after().pages(4, 1, 9, 2).frame(Checkpoint::State(state()), 2).frame(commit(2), 2)),
        ("no state", after().pages(4, 1, 9, 2).frame(commit(1), 2)),
        (
            "a state that is none",
            after()
                .pages(4, 1, 9, 2)
                .frame(Checkpoint::State(vec![0xff; 4].into()), 2)
                .frame(Checkpoint::Commit { pages: 1, state_bytes: 4 }, 2),
        ),
        ("a source's frame", after().frame(Checkpoint::Committed, 2)),
        ("a sequence number left out", Destination { sequence: 9, ..after() }.whole(2)),
    ];
    for (what, destination) in bad {
        let (number, page, error) = kept(destination, true);
        assert_eq!((number, page), (Some(1), 1), "{what}");
        assert!(matches!(error, MigrationError::Malformed(_)), "{what}: {error}");
    }
    let (number, _, error) = kept(after(), false);
    assert!(number.is_none() && matches!(error, MigrationError::Malformed(_)), "unasked: {error}");
}

// ---- both ends ---------------------------------------------------------------------------------------------------

/// A direction of a lane in memory. It ends when it may be silent for ever.
struct Pipe {
    from: mpsc::Receiver<Vec<u8>>,
    rest: Script,
    ends: bool,
}

impl ReadHalf for Pipe {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        while self.rest.0.len() < buf.len() && !self.ends {
            self.rest.0.extend(self.from.recv().map_err(|_| io::ErrorKind::UnexpectedEof)?);
        }
        self.rest.read_exact(buf)
    }

    fn read_ram(&mut self, _slices: &[RamSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.ends = timeout.is_none();
        Ok(())
    }
}

/// The other direction. The guest writes some more to its RAM after each frame of pages.
struct Tap(mpsc::Sender<Vec<u8>>, Option<Arc<Memory>>);

impl WriteHalf for Tap {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut bytes = head.to_vec();
        for slice in slices {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        if let Some(memory) = self.1.as_ref().filter(|_| !slices.is_empty()) {
            memory.write(5);
            memory.write(6);
        }
        self.0.send(bytes).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

fn pipe(memory: Option<Arc<Memory>>) -> (Tap, Pipe) {
    let (tx, from) = mpsc::channel();
    (Tap(tx, memory), Pipe { from, rest: Script(VecDeque::new()), ends: false })
}

/// RAM of the guest at its destination. Each write puts another number into the page.
struct Memory {
    ram: Arc<HeapRam>,
    bitmap: Arc<DirtyBitmap>,
    writes: AtomicU64,
}

impl Memory {
    fn new() -> Arc<Self> {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 16 << 12 }]).unwrap();
        let bitmap = DirtyBitmap::new(layout.clone());
        Arc::new(Self { ram: Arc::new(HeapRam::new(layout).unwrap()), bitmap, writes: AtomicU64::new(0) })
    }

    fn write(&self, page: u64) {
        let number = self.writes.fetch_add(1, Ordering::Relaxed) + 1;
        (&*self.ram as &dyn GuestRam).write(page << 12, &number.to_le_bytes()).unwrap();
        self.bitmap.mark_page(page);
    }

    fn contents(&self) -> Vec<u64> {
        let mut page = [0; 8];
        let read = |number: u64| {
            (&*self.ram as &dyn GuestRam).read(number << 12, &mut page).unwrap();
            u64::from_le_bytes(page)
        };
        (0..16).map(read).collect()
    }
}

/// What was called, and RAM when the state was saved.
#[derive(Default)]
struct Calls {
    said: Vec<&'static str>,
    released: Vec<Option<u64>>,
    moment: Vec<u64>,
    fails: bool,
}

struct Guest {
    memory: Arc<Memory>,
    tracker: BitmapTracker,
    calls: Arc<Mutex<Calls>>,
    output: u64,
    /// When it is saved for the second time no page is missing any more.
    missing: Option<Arc<Missing>>,
}

impl ProtectedVm for Guest {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn pause(&mut self) -> Result<(), VmError> {
        // the last words of a guest
        self.memory.write(7);
        let mut calls = lock(&self.calls);
        calls.said.push("pause");
        if calls.fails { Err(VmError::new("a vCPU does not stop")) } else { Ok(()) }
    }

    fn resume(&mut self) -> Result<(), VmError> {
        lock(&self.calls).said.push("resume");
        self.memory.write(8);
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        // saving writes, too
        self.memory.write(9);
        let mut calls = lock(&self.calls);
        calls.said.push("save");
        calls.moment = self.memory.contents();
        Ok(VmState::default())
    }

    fn hold_output(&mut self) {
        lock(&self.calls).said.push("hold");
    }

    fn output(&mut self) -> u64 {
        self.output += 1;
        if let Some(missing) = self.missing.as_ref().filter(|_| self.output == 2) {
            arrive(missing, PageRange::new(0, 16), Default::default());
        }
        self.output
    }

    fn release_output(&mut self, until: Option<u64>) {
        lock(&self.calls).released.push(until);
    }
}

fn guest(memory: &Arc<Memory>, missing: Option<Arc<Missing>>) -> (Protection, Arc<Mutex<Calls>>) {
    let calls = Arc::<Mutex<Calls>>::default();
    let tracker = BitmapTracker::new(memory.bitmap.clone());
    let guest = Guest { memory: memory.clone(), tracker, calls: calls.clone(), output: 0, missing };
    (
        Protection::new(Box::new(guest), Bytes::from_static(b"here"), memory.ram.clone(), Arc::new(NoObserver))
            .unwrap(),
        calls,
    )
}

/// The destination's end of a lane to a source, which keeps checkpoints there until it is dropped.
fn link(
    memory: &Arc<Memory>,
    store: &Arc<Mutex<MemoryStore>>,
    interval: Duration,
) -> (CheckpointLane, thread::JoinHandle<()>) {
    let ((to_source, source_reads), (to_destination, reads)) = (pipe(Some(memory.clone())), pipe(None));
    let mut keeper = keeper(Some(store.clone()), Destination::default());
    (keeper.reader, keeper.writer) = (Box::new(source_reads), Box::new(to_destination));
    keeper.fail_safe.interval = interval;
    let kept = thread::spawn(move || {
        let (tx, _inputs) = mpsc::channel();
        keeper.run(PeerInputs::new(tx, Arc::default(), Arc::default()));
    });
    let lane = Lane::for_checkpoints(memory.ram.clone(), Box::new(to_source), "the source".into(), Arc::default());
    (CheckpointLane { lane, reader: Box::new(reads), sequence: 0 }, kept)
}

/// RAM as the source would restart the guest with: what was handed over, and what the store has.
fn restored(store: &Mutex<MemoryStore>, mut handed_over: Vec<u64>) -> Vec<u64> {
    let mut take = |page: u64, data: PageData<'_>| {
        handed_over[page as usize] = data.map_or(0, |data| u64::from_le_bytes(*data.first_chunk().unwrap()));
        Ok(())
    };
    lock(store).restore(&mut take).unwrap();
    handed_over
}

#[test]
fn each_checkpoint_is_the_guest_of_one_moment() {
    let memory = Memory::new();
    let missing = Arc::new(crate::engine::missing::tests::missing(1, &[(0, 16)]).0);
    let (protection, calls) = guest(&memory, Some(missing.clone()));
    // what the source has sent is no news to it
    memory.write(1);
    protection.wanted.store(true, Ordering::Relaxed);
    protection.begin().unwrap();
    let handed_over = memory.contents();
    let store = Arc::new(Mutex::new(MemoryStore::default()));
    let (mut lane, kept) = link(&memory, &store, Duration::from_micros(1));
    // it runs
    memory.write(2);
    memory.write(3);
    let error = lane.run(&protection, &|| Some(missing.clone())).unwrap_err();
    assert!(matches!(error, MigrationError::Link { .. }), "{error}");
    drop(lane);
    kept.join().unwrap();
    assert_eq!(lock(&store).latest().unwrap().0, 2);
    assert_eq!(restored(&store, handed_over), lock(&calls).moment);
    assert_eq!(lock(&calls).said, ["hold", "pause", "save", "resume", "pause", "save", "resume"]);
    assert_eq!(*lock(&protection.source), Some((Duration::from_secs(1), Bytes::new())));
    // only what was written came back: pages 2 and 3, and 5 to 9
    let mut pages = Vec::new();
    let mut take = |page, _: PageData<'_>| {
        pages.push(page);
        Ok(())
    };
    lock(&store).restore(&mut take).unwrap();
    assert_eq!(pages, [2, 3, 5, 6, 7, 8, 9]);

    assert!(lock(&protection.protected).as_mut().unwrap().vm.tracker().is_active());
    protection.end().unwrap();
    assert_eq!(lock(&calls).released, [Some(1), Some(2), None]);
    protection.end().unwrap();
    assert_eq!(lock(&calls).released.len(), 3, "once is enough");
}

#[test]
fn what_a_checkpoint_did_not_bring_back_is_in_the_next_one() {
    let memory = Memory::new();
    let (protection, calls) = guest(&memory, None);
    protection.begin().unwrap();
    assert!(lock(&calls).said.is_empty(), "nothing is held where no checkpoints are wanted");
    let handed_over = memory.contents();
    memory.write(2);
    let store = Arc::new(Mutex::new(MemoryStore::default()));

    // a pause that fails, a wrong answer, and a link that is lost in the middle
    lock(&calls).fails = true;
    let (mut lane, kept) = link(&memory, &store, Duration::ZERO);
    lane.read().unwrap();
    let error = protection.checkpoint(&mut lane).unwrap_err();
    assert!(matches!(error, MigrationError::Vm { .. }), "{error}");
    assert_eq!(lock(&calls).said, ["pause", "resume"]);
    lock(&calls).fails = false;
    drop(lane);
    kept.join().unwrap();
    for answer in [Checkpoint::Committed.encode(0, 1), Checkpoint::Identity(Bytes::new()).encode(0, 3), Vec::new()] {
        let (to_source, source_reads) = pipe(Some(memory.clone()));
        let lane = Lane::for_checkpoints(memory.ram.clone(), Box::new(to_source), "the source".into(), Arc::default());
        let reader = Box::new(Script(answer.into()));
        assert!(protection.checkpoint(&mut CheckpointLane { lane, reader, sequence: 0 }).is_err());
        drop(source_reads);
    }
    assert!(lock(&calls).released.is_empty());

    let (mut lane, kept) = link(&memory, &store, Duration::ZERO);
    lane.read().unwrap();
    protection.checkpoint(&mut lane).unwrap();
    assert_eq!(restored(&store, handed_over), lock(&calls).moment);
    assert_eq!((lock(&store).latest().unwrap().0, lock(&calls).released.as_slice()), (5, &[Some(4)][..]));

    // once the VM is discarded there is nothing to take back or to release
    protection.give_up();
    protection.checkpoint(&mut lane).unwrap();
    protection.end().unwrap();
    assert_eq!(lock(&calls).released.len(), 1);
    drop(lane);
    kept.join().unwrap();
}

#[test]
fn a_source_that_wants_no_checkpoints_only_says_who_it_is() {
    let (memory, every) = (Memory::new(), |interval_us| Checkpoint::Every {
        interval_us,
        detect_us: 7,
        identity: Bytes::from_static(b"the source"),
    });
    for (first, more, wanted) in [
        (every(0).encode(0, 0), Vec::new(), false),
        (every(9).encode(0, 0), Checkpoint::Committed.encode(1, 1), true),
        (every(9).encode(0, 0), Destination { sequence: 1, ..Destination::default() }.pages(1, 1, 1, 1).bytes, true),
    ] {
        let (protection, calls) = guest(&memory, None);
        let said = Said::default();
        let lane =
            Lane::for_checkpoints(memory.ram.clone(), Box::new(said.clone()), "the source".into(), Arc::default());
        let silent = more.is_empty();
        let reader = Box::new(Script([first, more].concat().into()));
        let mut lane = CheckpointLane { lane, reader, sequence: 0 };
        let error = lane.run(&protection, &|| None).unwrap_err();
        assert_eq!(matches!(error, MigrationError::Link { .. }), silent, "{error}");
        assert_eq!(protection.wanted.load(Ordering::Relaxed), wanted);
        let source = Some((Duration::from_micros(7), Bytes::from_static(b"the source")));
        assert_eq!(*lock(&protection.source), source);
        assert_eq!(*lock(&said.0), Checkpoint::Identity(Bytes::from_static(b"here")).encode(0, 0));
        assert!(lock(&calls).said.is_empty());
    }
}
