//! Tests of receiving checkpoints, over stores that fail and channels that end.

use std::{collections::VecDeque, sync::mpsc};

use super::*;
use crate::{
    HeapRam, PageRange, RamLayout, RamRegion, RamSlice,
    fence::NoFence,
    report::NoObserver,
    store::{MemoryVersions, PageContent},
    wire::{Content, Extent},
};

pub(in crate::engine) struct Script(pub(in crate::engine) VecDeque<u8>);

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
pub(in crate::engine) struct Said(pub(in crate::engine) Arc<Mutex<Vec<u8>>>);

impl WriteHalf for Said {
    fn write_all(&mut self, head: &[u8], _slices: &[RamSlice<'_>]) -> io::Result<()> {
        lock(&self.0).extend_from_slice(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes that a destination sends, frame by frame.
#[derive(Default)]
pub(in crate::engine) struct Destination {
    pub(in crate::engine) bytes: Vec<u8>,
    pub(in crate::engine) sequence: u32,
}

impl Destination {
    fn frame(mut self, frame: Checkpoint, number: u32) -> Self {
        self.bytes.extend(frame.encode(self.sequence, number));
        self.sequence += 1;
        self
    }

    pub(in crate::engine) fn pages(mut self, first: u64, count: u64, fill: u8, number: u32) -> Self {
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

/// Lets a source of 16 pages read from `destination`. Returns the checkpoint that counts then, one
/// byte of its page 4, and the error that ended the lane.
fn kept(destination: Destination, wanted: bool) -> (Option<u32>, u8, MigrationError) {
    let store = Arc::new(Mutex::new(MemoryVersions::default()));
    let reverse = wanted.then(|| store.clone() as Arc<Mutex<dyn VersionStore>>);
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

/// Returns the receiver of a source of 16 pages, which stores checkpoints in `reverse`.
pub(in crate::engine) fn checkpoint_receiver(
    reverse: Option<Arc<Mutex<dyn VersionStore>>>,
    destination: Destination,
) -> CheckpointReceiver {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 16 << 12 }]).unwrap();
    CheckpointReceiver {
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

/// Lets a source of 16 pages, which stores checkpoints in `reverse`, read from `destination`.
/// Returns the error that ended the lane.
fn kept_in(reverse: Option<Arc<Mutex<dyn VersionStore>>>, destination: Destination) -> MigrationError {
    let (tx, inputs) = mpsc::channel();
    checkpoint_receiver(reverse, destination).run(PeerInputs::new(tx, Arc::default(), Arc::default()));
    let ended = inputs.iter().find_map(|input| match input {
        Input::Lane(Err(error)) => Some(error),
        _ => None,
    });
    ended.unwrap()
}

/// A store that counts the pages that are put.
#[derive(Default)]
struct Counting(u64);

impl VersionStore for Counting {
    fn put(&mut self, _page: u64, _data: PageContent<'_>) -> io::Result<()> {
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

    fn list(&mut self) -> io::Result<PageSet> {
        Ok(PageSet::default())
    }

    fn read(
        &mut self,
        _pages: &[u64],
        _take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn pages_that_cost_a_peer_nothing_do_not_make_the_store_grow() {
    let state = || Bytes::from(VmState::default().encode());
    // Many checkpoints of zeros follow each other.
    let mut destination = Destination::default();
    for number in 1..=100 {
        let commit = Checkpoint::Commit { pages: 16, state_bytes: state().len() as u64 };
        destination = destination.zeros(0, 16, number).frame(Checkpoint::State(state()), number).frame(commit, number);
    }
    // A page that was written in between counts again.
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
    // The third checkpoint ends before its commit.
    let (number, page, _) = kept(introduced().whole(1).whole(2).pages(3, 2, 3, 3), true);
    assert_eq!((number, page), (Some(2), 2));
}

#[test]
fn what_is_kept_is_counted_and_acknowledged() {
    let destination = Destination::default().frame(Checkpoint::Identity(Bytes::from_static(b"it")), 0);
    let destination = destination.whole(1).whole(2);
    let bytes = destination.bytes.len() as u64;
    let said = Said::default();
    let checkpoint_receiver = CheckpointReceiver {
        writer: Box::new(said.clone()),
        ..checkpoint_receiver(Some(Arc::new(Mutex::new(MemoryVersions::default()))), destination)
    };
    let (kept, wire_bytes) = (checkpoint_receiver.kept.clone(), checkpoint_receiver.wire_bytes.clone());
    kept.handed_over.store(true, Ordering::Relaxed);
    let (tx, _inputs) = mpsc::channel();
    checkpoint_receiver.run(PeerInputs::new(tx, Arc::default(), Arc::default()));
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
    // Each page is sent twice.
    let state = Bytes::from(VmState::default().encode());
    let commit = Checkpoint::Commit { pages: 32, state_bytes: state.len() as u64 };
    let destination = Destination::default().pages(0, 16, 8, 1).pages(0, 16, 9, 1);
    let (number, page, _) = kept(destination.frame(Checkpoint::State(state), 1).frame(commit, 1), true);
    assert_eq!((number, page), (Some(1), 9));

    let chunk = |len| Checkpoint::State(Bytes::from(vec![0; len]));
    for (len, good) in [(10, true), (11, false), (12, false)] {
        let mut checkpoint_receiver = checkpoint_receiver(None, Destination::default().frame(chunk(len), 1));
        let mut incoming = Incoming { state: vec![0; MAX_STATE - 10], ..Incoming::default() };
        let (tx, _inputs) = mpsc::channel();
        let inputs = PeerInputs::new(tx, Arc::default(), Arc::default());
        assert_eq!(checkpoint_receiver.frame(&mut 0, &mut incoming, &inputs).is_ok(), good, "{len}");
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
