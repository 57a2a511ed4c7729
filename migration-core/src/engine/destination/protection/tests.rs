//! Tests checkpoints with both peers, over channels that end.

use std::{
    collections::VecDeque,
    io,
    sync::{atomic::AtomicU64, mpsc},
    thread,
};

use super::*;
use crate::{
    HeapRam, PageRange, RamLayout, RamRegion, RamSlice,
    channel::WriteHalf,
    engine::{
        destination::missing::tests::arrive,
        handle::PeerInputs,
        source::checkpoint_receiver::tests::{Destination, Said, Script, checkpoint_receiver},
    },
    report::NoObserver,
    state::VmState,
    store::{MemoryVersions, PageContent, VersionStore},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
};

/// The reading half of one direction of a lane in memory. It ends when its time-out is removed.
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

/// The writing half of one direction. After each frame of pages, the guest writes to more pages of
/// its RAM.
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

/// The RAM of the guest at its destination. Each write puts another number into the page.
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
        self.ram.write(page << 12, &number.to_le_bytes()).unwrap();
        self.bitmap.mark_page(page);
    }

    fn contents(&self) -> Vec<u64> {
        let mut page = [0; 8];
        let read = |number: u64| {
            self.ram.read(number << 12, &mut page).unwrap();
            u64::from_le_bytes(page)
        };
        (0..16).map(read).collect()
    }
}

/// The calls of the VM, and the contents of RAM when the state was saved.
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
    /// The missing pages, which arrive during the second checkpoint.
    missing: Option<Arc<Missing>>,
}

impl CheckpointedVm for Guest {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn pause(&mut self) -> Result<(), VmError> {
        // a guest may write until it is paused
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
        // saving the state also writes to RAM
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

/// Returns the destination's end of a lane to a source, which keeps checkpoints until the lane is
/// dropped.
fn link(
    memory: &Arc<Memory>,
    store: &Arc<Mutex<MemoryVersions>>,
    interval: Duration,
) -> (CheckpointLane, thread::JoinHandle<()>) {
    let ((to_source, source_reads), (to_destination, reads)) = (pipe(Some(memory.clone())), pipe(None));
    let mut checkpoint_receiver = checkpoint_receiver(Some(store.clone()), Destination::default());
    (checkpoint_receiver.reader, checkpoint_receiver.writer) = (Box::new(source_reads), Box::new(to_destination));
    checkpoint_receiver.fail_safe.interval = interval;
    let kept = thread::spawn(move || {
        let (tx, _inputs) = mpsc::channel();
        checkpoint_receiver.run(PeerInputs::new(tx, Arc::default(), Arc::default()));
    });
    let lane = Lane::for_checkpoints(memory.ram.clone(), Box::new(to_source), "the source".into(), Arc::default());
    (CheckpointLane { lane, reader: Box::new(reads), sequence: 0 }, kept)
}

/// Returns the RAM with which the source would restart the guest: the pages that were handed over,
/// replaced by those in the store.
fn restored(store: &Mutex<MemoryVersions>, mut handed_over: Vec<u64>) -> Vec<u64> {
    let mut take = |page: u64, data: PageContent<'_>| {
        handed_over[page as usize] = data.map_or(0, |data| u64::from_le_bytes(*data.first_chunk().unwrap()));
        Ok(())
    };
    lock(store).restore(&mut take).unwrap();
    handed_over
}

#[test]
fn each_checkpoint_is_the_guest_of_one_moment() {
    let memory = Memory::new();
    let missing = Arc::new(crate::engine::destination::missing::tests::missing(1, &[(0, 16)]).0);
    let (protection, calls) = guest(&memory, Some(missing.clone()));
    // pages that the source has sent are not part of a checkpoint
    memory.write(1);
    protection.wanted.store(true, Ordering::Relaxed);
    protection.begin().unwrap();
    let handed_over = memory.contents();
    let store = Arc::new(Mutex::new(MemoryVersions::default()));
    let (mut lane, kept) = link(&memory, &store, Duration::from_micros(1));
    // the guest runs
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
    // only written pages were sent back: pages 2 and 3, and 5 to 9
    let mut pages = Vec::new();
    let mut take = |page, _: PageContent<'_>| {
        pages.push(page);
        Ok(())
    };
    lock(&store).restore(&mut take).unwrap();
    assert_eq!(pages, [2, 3, 5, 6, 7, 8, 9]);

    assert!(protection.protected.borrow().unwrap().vm.tracker().is_active());
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
    let store = Arc::new(Mutex::new(MemoryVersions::default()));

    // a pause that fails, a wrong answer, and a link that is lost during a checkpoint
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

    // after the VM was discarded, no output is left to be released
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
