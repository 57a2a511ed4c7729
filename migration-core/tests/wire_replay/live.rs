//! Both engines over channels in memory, in post-copy.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    RamLayout, RamRegion,
    channel::{Channel, Connector},
    engine::{Controller, HugePages, Migration, SourceOptions, migrate},
    report::{Outcome, Report},
    strategy::{
        Hybrid, Linear, PostCopy, Strategy,
        push_order::{DIRTIED, REFERENCED},
    },
    vm::VmDescription,
    wire::{Control, Header, LaneKind, Preamble},
};

use crate::{
    HANG, VM,
    channels::{Cut, End, pair},
    common::Told,
    destination::{Destination, Log},
    guest::{Host, RecordedVm, checksums, description_of},
    pager::Paging,
    post_copy,
    streams::frames,
};

const BEFORE: [(u64, u8); 8] = [(0, 1), (1, 2), (3, 3), (200, 4), (511, 5), (512, 6), (513, 7), (600, 8)];
const DURING: [(u64, u8); 3] = [(3, 0), (200, 9), (601, 10)];
const FAULTS: [&[u64]; 4] = [&[3], &[600, 513], &[3], &[511]];

/// RAM that ends in the middle of a huge page, or does not.
fn small() -> VmDescription {
    let regions = vec![RamRegion { gpa: 0, len: 520 << 12 }, RamRegion { gpa: 1 << 30, len: 100 << 12 }];
    description_of(RamLayout::new(regions).unwrap())
}

fn huge() -> VmDescription {
    let regions = vec![RamRegion { gpa: 0, len: 512 << 12 }, RamRegion { gpa: 1 << 30, len: 512 << 12 }];
    description_of(RamLayout::new(regions).unwrap())
}

/// Which lane of its kind, from 0, and whether what the destination says on it is meant.
pub(crate) type Direction = (LaneKind, usize, bool);

/// Connects to the destination; one direction of one lane may end after some bytes.
pub(crate) struct Link {
    door: mpsc::Sender<Option<End>>,
    cut: Option<(Direction, usize)>,
    opened: Mutex<HashMap<LaneKind, usize>>,
    taps: Mutex<HashMap<Direction, Arc<Mutex<Vec<u8>>>>>,
    cuts: Mutex<Vec<Arc<Cut>>>,
}

impl Link {
    pub(crate) fn new(destination: &Destination, cut: Option<(Direction, usize)>) -> Self {
        Self::to(destination.door.clone(), cut)
    }

    pub(crate) fn to(door: mpsc::Sender<Option<End>>, cut: Option<(Direction, usize)>) -> Self {
        Self { door, cut, opened: Mutex::default(), taps: Mutex::default(), cuts: Mutex::default() }
    }

    /// The bytes that were sent in one direction.
    pub(crate) fn sent(&self, direction: Direction) -> Vec<u8> {
        let taps = self.taps.lock().unwrap();
        taps.get(&direction).map(|tap| tap.lock().unwrap().clone()).unwrap_or_default()
    }
}

impl Connector for Link {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        unreachable!("the engine says what a lane is for")
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let mut opened = self.opened.lock().unwrap();
        let number = opened.entry(kind).or_default();
        let (mut here, mut there) = pair();
        for (end, backwards) in [(&mut here, false), (&mut there, true)] {
            let direction = (kind, *number, backwards);
            let tap = Arc::default();
            self.taps.lock().unwrap().insert(direction, Arc::clone(&tap));
            end.tap = Some(tap);
            if let Some((_, after)) = self.cut.filter(|(cut, _)| *cut == direction) {
                let cut = Arc::new(Cut::new(after));
                end.cut = Some(cut.clone());
                self.cuts.lock().unwrap().push(cut);
            }
        }
        *number += 1;
        self.door.send(Some(there)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(here))
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

/// Comes back to a session only when the destination has noticed that the link was lost.
pub(crate) struct OnceNoticed<F> {
    pub(crate) link: Link,
    pub(crate) noticed: F,
}

impl<F: Fn() -> bool + Send + Sync> Connector for OnceNoticed<F> {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let deadline = Instant::now() + HANG;
        while kind == LaneKind::Reattach && !(self.noticed)() {
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::yield_now();
        }
        self.link.connect_as(kind)
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

/// One migration: the report, the source's VM, and whether the link was cut.
fn run(destination: &Destination, link: Link, vm: RecordedVm, options: SourceOptions) -> (Report, RecordedVm, Link) {
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    run_by(strategy, destination, link, vm, options)
}

/// As [`run`], by any strategy.
pub(crate) fn run_by<C: Connector + 'static>(
    mut strategy: impl Strategy + 'static,
    destination: &Destination,
    link: C,
    mut vm: RecordedVm,
    options: SourceOptions,
) -> (Report, RecordedVm, C) {
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
        // a test that hangs has gone
        let _ = tx.send((report, vm, link));
    });
    let ended = rx.recv_timeout(HANG);
    ended.unwrap_or_else(|_| panic!("the source hangs; destination {:?}", destination.handle.phase()))
}

fn destination(description: VmDescription, block_pages: u64) -> Destination {
    // who loads the state waits for the first faults, so that they come on the demand lane in every
    // run
    let faults: Vec<_> = FAULTS.iter().map(|pages| pages.to_vec()).collect();
    let paging = Paging { block_pages, touched: faults.concat(), faults };
    Destination::of(HANG, |to| Host { description, to, paging: Some(paging) })
}

fn options(payload_crc: bool, huge: HugePages) -> SourceOptions {
    SourceOptions { payload_crc, huge, demand_lanes: 1, ..SourceOptions::default() }
}

#[test]
fn each_page_arrives_once() {
    for payload_crc in [false, true] {
        for (description, block_pages, split) in [
            (small(), 1, HugePages::Split),
            (small(), 1, HugePages::Whole),
            (huge(), 512, HugePages::Split),
            (huge(), 512, HugePages::Whole),
        ] {
            let what = format!("crc {payload_crc}, block_pages {block_pages}, {split:?}");
            let destination = destination(description.clone(), block_pages);
            let link = Link::new(&destination, None);
            let vm = RecordedVm::of(description, &BEFORE, &DURING);
            let (report, vm, link) = run(&destination, link, vm, options(payload_crc, split));
            assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
            let handle = destination.handle.clone();
            let (arrived, said) = destination.finish();
            // the destination counts every frame, and knows no lane before its preamble; the source
            // counts preambles, too, but its threads may not have counted the last of what they
            // wrote
            let taps = link.taps.lock().unwrap();
            let bytes: usize = taps.values().map(|tap| tap.lock().unwrap().len()).sum();
            let frames = bytes - taps.len() / 2 * Preamble::LEN;
            assert_eq!(handle.wire_bytes(), frames as u64, "{what}: {said}");
            assert!(report.wire_bytes <= bytes as u64, "{what}: {said}");
            assert_eq!(arrived.pages(), checksums(&vm.ram), "{what}: {said}");
            let pager = arrived.pager.unwrap();
            // but for holes, all of RAM was left behind
            let all = report.pages.distinct;
            assert_eq!((pager.check(), pager.installed()), (0, all), "{what}: {said}");
            assert_eq!(report.recoveries, 0, "{what}: {said}");
            assert_eq!(report.pages.zero + report.pages.plain, all, "{what}: sent once");
        }
    }
}

#[test]
fn the_order_is_told_what_the_guest_has_used() {
    for referenced in [Some(&[0, 3, 1 << 40][..]), None] {
        let (destination, mut vm, heat) = (post_copy::destination(), post_copy::guest(), Arc::default());
        vm.referenced = referenced;
        let (tx, log) = mpsc::channel();
        let observer = Arc::new(Log(Mutex::new(tx)));
        let options = SourceOptions { observer, ..options(false, HugePages::Split) };
        // a round, for which the engine reads all pages
        let mut strategy = Hybrid { rounds: 1, order: Box::new(Told(Arc::clone(&heat), Linear::default())) };
        let link = Link::new(&destination, None);
        let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        let mut expected = vec![0; vm.ram_pages() as usize];
        post_copy::DURING.iter().for_each(|&(page, _)| expected[page as usize] += DIRTIED);
        referenced.iter().for_each(|_| [0, 3].iter().for_each(|&page: &usize| expected[page] += REFERENCED));
        assert_eq!(*heat.lock().unwrap(), expected);
        drop((options, destination.finish()));
        let told: Vec<String> = log.iter().collect();
        assert_eq!(told.iter().any(|w| w.contains("nobody has looked")), referenced.is_none(), "{told:?}");
    }
}

#[test]
fn a_migration_of_its_own_thread_gives_its_vm_and_its_report_back_once() {
    for waits in [true, false] {
        let destination = post_copy::destination();
        let (notify, notified) = mpsc::channel();
        let notify = Box::new(move || notify.send(()).unwrap());
        let strategy = Box::new(PostCopy { order: Box::new(Linear::default()) });
        let link = Arc::new(Link::new(&destination, None));
        let (vm, options) = (Box::new(post_copy::guest()), options(false, HugePages::Split));
        let Ok(mut migration) = Migration::start(vm, link, strategy, options, notify) else { panic!("no thread") };
        let ended = if waits {
            migration.wait(HANG)
        } else {
            notified.recv_timeout(HANG).unwrap();
            migration.try_take()
        };
        let (mut vm, report) = ended.expect("it has ended");
        assert_eq!((report.outcome, vm.describe().unwrap().id), (Outcome::Completed, VM));
        assert!(migration.try_take().is_none() && migration.wait(Duration::ZERO).is_none());
        drop(destination.finish());
    }
}

/// Whichever lane ends, wherever: before *run* the VM stays, and moves with the next attempt;
/// behind it, no page is lost.
#[test]
fn cut_in_the_post_copy_phase() {
    let mut recovered = 0;
    for (description, block_pages) in [(small(), 1), (huge(), 512)] {
        let undisturbed = destination(description.clone(), block_pages);
        let vm = RecordedVm::of(description.clone(), &BEFORE, &DURING);
        let link = Link::new(&undisturbed, None);
        let (_, _, link) = run(&undisturbed, link, vm, options(false, HugePages::Split));
        drop(undisturbed.finish());
        let length = |direction: &Direction, sent: &[u8]| {
            if *direction != (LaneKind::Control, 0, false) {
                return sent.len();
            }
            // but for *done*: the source is gone then, and the destination listens for it on; and
            // but for all pings after the first, which a slow run has and the next one may not have
            let kind = |at: &&usize| Header::decode(sent[**at..].first_chunk().unwrap()).unwrap().kind;
            let (starts, ping) = (frames(sent), Control::Ping.encode(0, 0, 1)[0]);
            let pings = starts[..starts.len() - 1].iter().filter(|at| kind(at) == ping).count();
            starts[starts.len() - 2] - (pings - 1) * Header::LEN
        };
        let taps = link.taps.lock().unwrap();
        let lengths: Vec<_> = taps.iter().map(|(lane, tap)| (*lane, length(lane, &tap.lock().unwrap()))).collect();
        for (direction, len) in lengths {
            let step = if direction.0 == LaneKind::Control { len / 24 } else { len / 9 };
            for after in (1..len).step_by(step.max(1)) {
                let what = format!("{direction:?} is cut after {after} of {len} bytes");
                let destination = destination(description.clone(), block_pages);
                let link = Link::new(&destination, Some((direction, after)));
                let vm = RecordedVm::of(description.clone(), &BEFORE, &DURING);
                let (mut report, mut vm, _) = run(&destination, link, vm, options(true, HugePages::Split));
                recovered += report.recoveries;
                if report.outcome == Outcome::Failed {
                    assert!(destination.arrived.try_recv().is_err(), "{what}: it runs twice");
                    let again = SourceOptions { last_epoch: report.epoch, ..options(true, HugePages::Split) };
                    (report, vm, _) = run(&destination, Link::new(&destination, None), vm, again);
                }
                assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
                let (arrived, said) = destination.finish();
                assert_eq!(arrived.pages(), checksums(&vm.ram), "{what}: {said}");
                arrived.pager.unwrap().check();
            }
        }
    }
    assert!(recovered > 10, "only {recovered} cuts came behind the hand-over");
}
