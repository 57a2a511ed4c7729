//! Rounds under both kinds of dirty trackers: one that begins anew at a harvest, and one that
//! re-arms pages just before they are read. The guest writes at chosen moments of a round, and a
//! round ends early.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use migration_core::{
    GuestRam, HeapRam, MigrationError, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion, RamSlice,
    channel::{Channel, Closer, Connector, Halves, WriteHalf},
    engine::{Controller, SnapshotOptions, SourceOptions, migrate, snapshot},
    report::{Event, Observer, Outcome, Report},
    state::{Section, VmState},
    store::{MemoryVersions, PageContent, VersionStore},
    strategy::{Done, Linear, PreCopy, Running, Strategy},
    tracker::{DirtyTracker, Rearm, TrackerError},
    vm::{SourceVm, VmDescription, VmError},
    wire::LaneKind,
};

use crate::{
    HANG,
    destination::Destination,
    guest::{Arrived, Host, RecordedVm, checksums, description_of},
    live::Link,
    pager::Paging,
};

/// Pages of a stripe.
const STRIPE: u64 = 512;
const STRIPES: u64 = 4;
const PAGES: u64 = STRIPES * STRIPE;

/// A page of each stripe that the guest writes, and one that it never writes.
const WRITTEN: u64 = 7;
const QUIET: u64 = 8;

fn four_stripes() -> VmDescription {
    description_of(RamLayout::new(vec![RamRegion { gpa: 0, len: PAGES << 12 }]).unwrap())
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(PAGES);
    pages.into_iter().for_each(|page| _ = set.insert(page));
    set
}

/// The dirty bits of both kinds of trackers.
struct Bits {
    pages: Mutex<PageSet>,
    /// Whether pages were put back, or the lanes closed.
    over: Mutex<bool>,
    changed: Condvar,
}

impl Bits {
    fn mark(&self, page: u64) {
        self.pages.lock().unwrap().insert(page);
    }

    /// The migration ends: a lane that waits goes on.
    fn end(&self) {
        *self.over.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Waits until the engine has put pages back or closes the lane, whichever it does first.
    fn wait_end(&self) {
        let (_guard, waited) = self.changed.wait_timeout_while(self.over.lock().unwrap(), HANG, |over| !*over).unwrap();
        assert!(!waited.timed_out(), "hangs: the migration does not end");
    }
}

impl Rearm for Bits {
    fn before_read(&self, range: PageRange, pages: &PageSet) -> Result<(), TrackerError> {
        let mut bits = self.pages.lock().unwrap();
        for page in pages.iter().filter(|page| range.pages().contains(page)) {
            bits.remove_range(PageRange::new(page, 1));
        }
        Ok(())
    }
}

struct Tracker {
    bits: Arc<Bits>,
    /// Whether a harvest leaves the bits as they are until the pages are re-armed.
    rearming: bool,
    active: bool,
}

impl DirtyTracker for Tracker {
    fn name(&self) -> &'static str {
        "test"
    }

    fn is_active(&self) -> bool {
        self.active
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        if !std::mem::replace(&mut self.active, true) {
            let mut bits = self.bits.pages.lock().unwrap();
            // where pages are re-armed one by one, each counts as written until then
            *bits = if self.rearming { PageSet::full(PAGES) } else { PageSet::empty(PAGES) };
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        self.active = false;
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        let mut bits = self.bits.pages.lock().unwrap();
        into.union_with(&bits);
        if !self.rearming {
            bits.clear();
        }
        Ok(())
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        self.bits.pages.lock().unwrap().union_with(pages);
        self.bits.end();
    }

    fn rearm(&self) -> Option<Arc<dyn Rearm>> {
        self.rearming.then(|| self.bits.clone() as _)
    }
}

/// A VM with data in every stripe.
struct Tracked {
    vm: RecordedVm,
    tracker: Tracker,
    guest: Guest,
}

/// Writes guest memory and reports it to the VM's tracker, whichever that is.
#[derive(Clone)]
struct Guest {
    ram: Arc<HeapRam>,
    paused: Arc<AtomicBool>,
    bits: Arc<Bits>,
}

impl Guest {
    /// Writes a page, unless the guest is paused.
    fn write(&self, page: u64, byte: u8) {
        if self.paused.load(Ordering::SeqCst) {
            return;
        }
        let ram = &self.ram;
        ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[byte; PAGE_SIZE]);
        self.bits.mark(page);
    }
}

impl Tracked {
    fn new(rearming: bool) -> Self {
        let vm = RecordedVm::of(four_stripes(), &[], &[]);
        let pages = Mutex::new(PageSet::empty(PAGES));
        let bits = Arc::new(Bits { pages, over: Mutex::default(), changed: Condvar::new() });
        let guest = Guest { ram: vm.ram.clone(), paused: Arc::default(), bits: bits.clone() };
        (0..PAGES).for_each(|page| guest.write(page, 1 + (page / STRIPE) as u8));
        Self { vm, tracker: Tracker { bits, rearming, active: false }, guest }
    }

    /// Starts the tracker as a VMM does for a purpose of its own, with these pages written since.
    fn track(&mut self, written: &[u64]) {
        self.tracker().start().unwrap();
        self.guest.bits.pages.lock().unwrap().clear();
        written.iter().for_each(|&page| self.guest.write(page, 99));
    }
}

impl SourceVm for Tracked {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        self.vm.describe()
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        self.vm.iterate_state(budget)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.guest.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.guest.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.vm.save_state()
    }

    fn released(&mut self) {}
}

/// What happens before a frame of page data is written: its number is given, from 0.
type Hook = Arc<dyn Fn(u64) + Send + Sync>;

/// Calls a hook at each frame with page data on a bulk lane.
struct Hooked {
    link: Link,
    hook: Hook,
    frames: Arc<Mutex<u64>>,
    /// Is told when a bulk lane is closed.
    bits: Option<Arc<Bits>>,
}

impl Hooked {
    fn new(destination: &Destination, hook: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { link: Link::new(destination, None), hook: Arc::new(hook), frames: Arc::default(), bits: None }
    }
}

impl Connector for Hooked {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let inner = self.link.connect_as(kind)?;
        if kind != LaneKind::Bulk {
            return Ok(inner);
        }
        let (hook, frames, bits) = (self.hook.clone(), self.frames.clone(), self.bits.clone());
        Ok(Box::new(HookedChannel { inner, hook, frames, bits }))
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

struct HookedChannel {
    inner: Box<dyn Channel>,
    hook: Hook,
    frames: Arc<Mutex<u64>>,
    bits: Option<Arc<Bits>>,
}

impl Channel for HookedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let halves = self.inner.split()?;
        let writer = HookedWriter { inner: halves.writer, hook: self.hook, frames: self.frames };
        let closer = HookedCloser { inner: halves.closer, bits: self.bits };
        Ok(Halves { writer: Box::new(writer), closer: Box::new(closer), ..halves })
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

struct HookedCloser {
    inner: Box<dyn Closer>,
    bits: Option<Arc<Bits>>,
}

impl Closer for HookedCloser {
    fn close(&self) {
        self.inner.close();
        if let Some(bits) = &self.bits {
            bits.end();
        }
    }
}

struct HookedWriter {
    inner: Box<dyn WriteHalf>,
    hook: Hook,
    frames: Arc<Mutex<u64>>,
}

impl WriteHalf for HookedWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        if !slices.is_empty() {
            let mut frames = self.frames.lock().unwrap();
            let frame = *frames;
            *frames += 1;
            drop(frames);
            (self.hook)(frame);
        }
        self.inner.write_all(head, slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<std::time::Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }
}

/// Sends all of RAM once, notes what the harvest after it says, and leaves the rest to the
/// hand-over.
#[derive(Default)]
struct OneRound {
    asked: u64,
    sent: u64,
    harvested: PageSet,
    /// Whether what is left follows the hand-over, or goes in the pause.
    leaves: bool,
}

impl Strategy for OneRound {
    fn name(&self) -> &'static str {
        "one-round"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        let round = vm.send(&pages)?;
        (self.asked, self.sent) = (round.asked, round.sent);
        self.harvested = vm.harvest()?;
        let mut vm = vm.pause()?;
        if self.leaves {
            return vm.hand_over(self.harvested.clone())?.serve(&mut Linear::default());
        }
        vm.send_rest(self.harvested.clone())?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

fn destination(paged: bool) -> Destination {
    let paging = paged.then(|| Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() });
    Destination::of(HANG, |to| Host { description: four_stripes(), to, paging })
}

/// Both sides hold the same bytes.
fn assert_same(arrived: &Arrived, vm: &Tracked, what: &str) {
    let (there, here) = (arrived.pages(), checksums(&vm.vm.ram));
    let differ: Vec<_> = (0..PAGES).filter(|page| there.get(page) != here.get(page)).collect();
    assert!(differ.is_empty(), "{what}: pages {differ:?} differ");
}

fn completed(report: &Report, what: &str) {
    assert_eq!(report.outcome, Outcome::Completed, "{what}: {:?}", report.reason);
}

/// A page that is written after its stripe was read is reported, and no other one: a stripe that
/// was not re-armed would be reported whole, and one that was re-armed after it was read would hide
/// the write.
#[test]
fn a_round_re_arms_each_stripe_before_it_reads_it() {
    for rearming in [false, true] {
        let destination = destination(false);
        let mut vm = Tracked::new(rearming);
        let guest = vm.guest.clone();
        // the last stripe is written at the very beginning, long before it is read; the first one
        // after it was read
        let link = Hooked::new(&destination, move |frame| match frame {
            0 => guest.write((STRIPES - 1) * STRIPE + WRITTEN, 55),
            5 => guest.write(WRITTEN, 66),
            _ => {}
        });
        let mut strategy = OneRound::default();
        let report = migrate(&mut vm, &link, &mut strategy, &SourceOptions::default(), Controller::new().1);
        completed(&report, "re-arms");
        // without re-arming, a write before the read cannot be told from one after it
        let early = (!rearming).then_some((STRIPES - 1) * STRIPE + WRITTEN);
        assert_eq!(strategy.harvested, set([WRITTEN].into_iter().chain(early)), "re-arming: {rearming}");
        let (arrived, said) = destination.finish();
        assert_same(&arrived, &vm, &format!("re-arming: {rearming}: {said}"));
    }
}

/// Signals that the engine has taken in everything that was sent to it before.
#[derive(Default)]
struct Ticks {
    seen: Mutex<u64>,
    changed: Condvar,
}

impl Ticks {
    /// Waits until the engine has come back to its inputs after it has looked at them: three looks,
    /// of which the first may have begun before.
    fn pass(&self) {
        let seen = self.seen.lock().unwrap();
        let enough = *seen + 3;
        let (_seen, waited) = self.changed.wait_timeout_while(seen, HANG, |seen| *seen < enough).unwrap();
        assert!(!waited.timed_out(), "hangs: the engine says nothing of its progress");
    }
}

impl Observer for Ticks {
    fn event(&self, event: &Event) {
        if matches!(event, Event::Progress(_)) {
            *self.seen.lock().unwrap() += 1;
            self.changed.notify_all();
        }
    }
}

/// A round that the user stops in its middle: the pages that were not sent are unacknowledged, and
/// arrive later.
#[test]
fn a_round_that_ends_early_keeps_what_it_did_not_send() {
    for rearming in [false, true] {
        let destination = destination(true);
        let mut vm = Tracked::new(rearming);
        let (controller, commands) = Controller::new();
        let ticks = Arc::new(Ticks::default());
        let observer = ticks.clone();
        let link = Hooked::new(&destination, move |frame| {
            if frame == 1 {
                controller.post_copy().unwrap();
                ticks.pass();
            }
        });
        let mut strategy = OneRound { leaves: true, ..OneRound::default() };
        let options = SourceOptions { demand_lanes: 1, observer, ..SourceOptions::default() };
        let report = migrate(&mut vm, &link, &mut strategy, &options, commands);
        completed(&report, "ends early");
        let (asked, sent) = (strategy.asked, strategy.sent);
        assert!(0 < sent && sent < asked, "{sent} of {asked}");
        assert_eq!(strategy.harvested.len(), asked - sent, "re-arming: {rearming}");
        let (arrived, said) = destination.finish();
        assert_same(&arrived, &vm, &format!("re-arming: {rearming}: {said}"));
    }
}

/// That pages could follow the VM is no reason to stop a round.
#[test]
fn a_round_that_nobody_stops_sends_all() {
    let (destination, mut vm) = (destination(true), Tracked::new(false));
    let ticks = Arc::new(Ticks::default());
    let observer = ticks.clone();
    let link = Hooked::new(&destination, move |frame| {
        if frame == 1 {
            ticks.pass();
        }
    });
    let mut strategy = OneRound { leaves: true, ..OneRound::default() };
    let options = SourceOptions { demand_lanes: 1, observer, ..SourceOptions::default() };
    let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
    completed(&report, "nobody stops it");
    assert_eq!(strategy.sent, strategy.asked);
    drop(destination.finish());
}

/// A VMM that tracks for a purpose of its own finds every page that was written, whenever a
/// migration is cancelled: in a round, after rounds that were acknowledged, or in the pause.
#[test]
fn a_cancel_gives_the_vmm_its_dirty_bits_back() {
    let mut outcomes: HashMap<bool, u32> = HashMap::new();
    for rearming in [false, true] {
        for cancel_at in 0..14 {
            let what = format!("re-arming: {rearming}, cancelled at frame {cancel_at}");
            let destination = destination(false);
            let mut vm = Tracked::new(rearming);
            let before: Vec<_> = (0..STRIPES).map(|stripe| stripe * STRIPE + WRITTEN).collect();
            vm.track(&before);
            let (controller, commands) = Controller::new();
            let guest = vm.guest.clone();
            let written: Arc<Mutex<Vec<u64>>> = Arc::default();
            let during = written.clone();
            let bits = guest.bits.clone();
            let mut link = Hooked::new(&destination, move |frame| {
                let page = (frame % STRIPES) * STRIPE + 20 + frame / STRIPES;
                if !guest.paused.load(Ordering::SeqCst) {
                    guest.write(page, 77);
                    during.lock().unwrap().push(page);
                }
                if frame == cancel_at {
                    controller.cancel("the test");
                    guest.bits.wait_end();
                }
            });
            link.bits = Some(bits);
            let mut strategy = Rounds(2);
            let report = migrate(&mut vm, &link, &mut strategy, &SourceOptions::default(), commands);
            let cancelled = report.outcome == Outcome::Cancelled;
            *outcomes.entry(cancelled).or_default() += 1;
            if !cancelled {
                completed(&report, &what);
                drop(destination.finish());
                continue;
            }
            assert!(vm.tracker().is_active(), "{what}: the VMM's tracker was stopped");
            let mut dirty = PageSet::empty(PAGES);
            vm.tracker().harvest(&mut dirty).unwrap();
            for page in before.into_iter().chain(written.lock().unwrap().iter().copied()) {
                assert!(dirty.contains(page), "{what}: page {page} is not dirty any more: {dirty:?} {written:?}");
            }
            assert!(!dirty.contains(QUIET), "{what}: page {QUIET} was never written");
        }
    }
    assert!(outcomes.get(&true).is_some_and(|&cancelled| cancelled > 8), "{outcomes:?}");
}

/// Some rounds, and a hand-over.
pub(crate) struct Rounds(pub(crate) u32);

impl Strategy for Rounds {
    fn name(&self) -> &'static str {
        "rounds"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let mut pages = vm.start_tracking()?;
        for _ in 0..self.0 {
            vm.send(&pages)?;
            pages = vm.harvest()?;
        }
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

/// The same guest under the shipped strategy, with more lanes than one.
#[test]
fn writes_in_every_frame_arrive() {
    for rearming in [false, true] {
        let destination = destination(false);
        let mut vm = Tracked::new(rearming);
        let guest = vm.guest.clone();
        let link = Hooked::new(&destination, move |frame| {
            if frame < 40 {
                guest.write(frame * 97 % PAGES, frame as u8 | 1);
            }
        });
        let options = SourceOptions { streams: 2, ..SourceOptions::default() };
        let report = migrate(&mut vm, &link, &mut <PreCopy>::default(), &options, Controller::new().1);
        completed(&report, "every frame");
        let (arrived, said) = destination.finish();
        assert_same(&arrived, &vm, &format!("re-arming: {rearming}: {said}"));
    }
}

/// A store in memory during whose puts the guest writes, and which may fail.
struct Writing<'a> {
    store: MemoryVersions,
    guest: &'a Guest,
    puts: u64,
    fails_at: u64,
    written: Vec<u64>,
}

impl VersionStore for Writing<'_> {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.puts += 1;
        if self.puts == self.fails_at {
            return Err(io::Error::other("no room, as asked"));
        }
        if self.puts.is_multiple_of(100) && !self.guest.paused.load(Ordering::SeqCst) {
            // some pages that were put already, and some whose turn has not come
            let page = self.puts * 7 % PAGES;
            self.guest.write(page, 33);
            self.written.push(page);
        }
        self.store.put(page, data)
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.store.commit(number, state)
    }

    fn discard(&mut self) {
        self.store.discard();
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.store.latest()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        self.store.list()
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.store.read(pages, take)
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.store.restore(take)
    }
}

/// The same for a snapshot, complete or not.
#[test]
fn a_snapshot_gives_the_vmm_its_dirty_bits_back() {
    for rearming in [false, true] {
        for fails_at in [1, 300, 1500, 0] {
            let what = format!("re-arming: {rearming}, failing at put {fails_at}");
            let mut vm = Tracked::new(rearming);
            let before: Vec<_> = (0..STRIPES).map(|stripe| stripe * STRIPE + WRITTEN).collect();
            vm.track(&before);
            let guest = vm.guest.clone();
            let store = MemoryVersions::default();
            let mut store = Writing { store, guest: &guest, puts: 0, fails_at, written: Vec::new() };
            let result = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), Controller::new().1);
            assert_eq!(result.is_err(), fails_at != 0, "{what}: {result:?}");
            let mut dirty = PageSet::empty(PAGES);
            vm.tracker().harvest(&mut dirty).unwrap();
            for page in before.into_iter().chain(store.written) {
                assert!(dirty.contains(page), "{what}: page {page} is not dirty any more");
            }
            assert!(!dirty.contains(QUIET), "{what}: page {QUIET} was never written");
        }
    }
}
