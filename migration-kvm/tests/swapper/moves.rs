//! A VM of which pages are in a store moves from real memory to real memory, by both engines.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use bytes::Bytes;
use libtest_mimic::Failed;
use migration_core::{
    GuestRam, PAGE_SIZE,
    engine::{Controller, Receiver, ReceiverOptions, SourceOptions, migrate},
    paged_memory::PagedMemory,
    pager::Pager,
    report::{Outcome as Ending, Report},
    state::VmState,
    store::PageStore,
    strategy::{Agile, Hybrid, Linear, PostCopy, PreCopy, Strategy},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError},
};
use migration_kvm::{
    pager::UserFaultPager,
    ram::{Backing, MappedRam},
    swapper::Held,
    tracker::UserFault,
};
use migration_transport::memory;

use crate::world::{LONG, Outcome, VM, World, contents, ensure, expected, options};

/// Pages that are resident when the migration begins, that the guest writes at last, and that it
/// reads at last. The last two are in the store until then.
const RESIDENT: std::ops::Range<u64> = 20..60;
const WRITTEN: [u64; 3] = [25, 700, 1500];
const READ: u64 = 1800;

/// Threads that write memory until the VM is paused.
struct Writers {
    stop: AtomicBool,
    active: AtomicUsize,
    /// How many of them have written something.
    begun: AtomicUsize,
}

impl Writers {
    fn new(threads: usize) -> Self {
        Self { stop: AtomicBool::new(false), active: AtomicUsize::new(threads), begun: AtomicUsize::new(0) }
    }

    fn pause(&self) {
        self.stop.store(true, Ordering::SeqCst);
        while self.active.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
    }

    /// Writes pages at random, of all pages one in `threads`. Returns how often it has written each.
    fn write(&self, world: &World, dirty: &DirtyBitmap, [number, threads]: [u64; 2]) -> Result<Vec<u64>, String> {
        let mut versions = vec![0; world.pages() as usize];
        let mut random = 0x1234_5678_9abc_def1u64 * (number + 1);
        let (mut result, mut first) = (Ok(()), true);
        while !self.stop.load(Ordering::SeqCst) && result.is_ok() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = (random >> 8) % (world.pages() / threads) * threads + number;
            versions[page as usize] += 1;
            result = world.write(page, &contents(page, versions[page as usize])).map_err(|e| format!("{e:?}"));
            // after the write, as hardware does: a page that is read in between is reported later
            dirty.mark_page(page);
            if std::mem::take(&mut first) {
                self.begun.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.active.fetch_sub(1, Ordering::SeqCst);
        result.map(|()| versions)
    }
}

/// The VM at its source.
struct Source<'a> {
    world: &'a World,
    dirty: Arc<DirtyBitmap>,
    tracker: BitmapTracker,
    held: Held,
    /// What the guest does before it is paused. Without it, it makes a few accesses at last.
    writers: Option<&'a Writers>,
}

impl<'a> Source<'a> {
    fn new(world: &'a World) -> Result<Self, Failed> {
        let dirty = DirtyBitmap::new(world.ram.layout().clone());
        let tracker = BitmapTracker::new(dirty.clone());
        Ok(Self { world, dirty, tracker, held: world.swapper.hold()?, writers: None })
    }

    fn last_accesses(&self) -> Outcome {
        if let Some(writers) = self.writers {
            writers.pause();
            return Ok(());
        }
        for page in WRITTEN {
            self.world.write(page, &contents(page, 3))?;
            self.dirty.mark_page(page);
        }
        self.world.unchanged(READ)
    }
}

impl SourceVm for Source<'_> {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        let layout = self.world.ram.layout().clone();
        Ok(VmDescription { id: VM, layout, devices: Vec::new(), host_needs, config })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.world.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn paged_memory(&self) -> Option<Arc<PagedMemory>> {
        Some(self.world.swapper.memory().clone())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let done = self.last_accesses();
        self.held.no_page_comes_back();
        done.map_err(|error| VmError::new(format!("{error:?}")))
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.held.pages_come_back();
        Ok(())
    }

    fn throttle(&mut self, _: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        Ok(VmState { sections: Vec::new() })
    }

    fn released(&mut self) {}
}

/// Builds the VM at its destination, and hands out its RAM when it is started.
struct Host {
    backing: Backing,
    to: mpsc::Sender<Arc<MappedRam>>,
}

struct Target {
    ram: Arc<MappedRam>,
    pager: Arc<UserFaultPager>,
    to: mpsc::Sender<Arc<MappedRam>>,
}

impl DestinationHost for Host {
    type Vm = Target;

    fn build(&self, vm: &VmDescription) -> Result<Target, VmError> {
        let ram = MappedRam::new(vm.layout.clone(), self.backing).map_err(|e| VmError::because("map RAM", e))?;
        let ram = Arc::new(ram);
        let fault = UserFault::new().map_err(|e| VmError::because("userfaultfd", e))?;
        let pager = UserFaultPager::new(ram.clone(), Arc::new(fault)).map_err(|e| VmError::because("the pager", e))?;
        Ok(Target { ram, pager: Arc::new(pager), to: self.to.clone() })
    }
}

impl DestinationVm for Target {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn load_state(&mut self, _: &VmState) -> Result<(), VmError> {
        Ok(())
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        Some(self.pager.clone())
    }

    fn start(&mut self, _: bool) -> Result<(), VmError> {
        self.to.send(self.ram.clone()).map_err(|_| VmError::new("nobody looks"))
    }
}

/// Moves a VM. Returns the report and its RAM at the destination, when all of it is there.
fn moved(
    mut source: Source<'_>,
    backing: Backing,
    strategy: &mut dyn Strategy,
    stores: Vec<Arc<dyn PageStore>>,
) -> Result<(Report, Arc<MappedRam>), Failed> {
    let (connector, mut listener) = memory::link(memory::DEFAULT_CAPACITY);
    let (to, arrived) = mpsc::channel();
    let receiver_options = ReceiverOptions { idle_timeout: LONG, stores, ..ReceiverOptions::default() };
    let receiver = Receiver::new(Host { backing, to }, drop, receiver_options);
    let handle = receiver.handle();
    let receiving = thread::spawn(move || receiver.run(&mut listener));
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let report = migrate(&mut source, &connector, strategy, &options, Controller::new().1);
    // a receiver that waits for another source sees that none will come
    drop(connector);
    if report.outcome != Ending::Completed {
        handle.stop();
        let _ = receiving.join();
        return Err(format!("{:?}: {:?}", report.outcome, report.reason).into());
    }
    receiving.join().map_err(|_| "the receiver panicked")??;
    Ok((report, arrived.recv()?))
}

/// All pages but some are in the store.
fn cold_world(backing: Backing) -> Result<World, Failed> {
    let world = World::new(backing, options())?;
    world.evict_all()?;
    RESIDENT.into_iter().try_for_each(|page| world.write(page, &contents(page, 1)))?;
    world.nobody_waits();
    Ok(world)
}

fn check(world: &World, ram: &MappedRam) -> Outcome {
    let mut bytes = vec![0; PAGE_SIZE];
    for page in 0..world.pages() {
        ram.read(ram.layout().gpa_of(page).ok_or("no such page")?, &mut bytes)?;
        let want = match page {
            page if WRITTEN.contains(&page) => contents(page, 3),
            page if RESIDENT.contains(&page) => contents(page, 1),
            page => expected(page, 0),
        };
        ensure(bytes == want, || format!("page {page} does not hold at the destination what it did"))?;
    }
    Ok(())
}

/// The pages that were cold are in the store at the end, and nowhere in the source's memory.
fn still_cold(world: &World, cold: u64) -> Outcome {
    let status = world.swapper.status();
    // the guest has brought a few back, each with its neighbours
    ensure(status.cold_bytes + (48 << 12) >= cold, || format!("{cold} bytes were cold, then {status:?}"))
}

pub fn agile_leaves_cold_pages_in_their_store(backing: Backing) -> Outcome {
    let world = cold_world(backing)?;
    let cold = world.swapper.status().cold_bytes;
    let (report, ram) = moved(
        Source::new(&world)?,
        backing,
        &mut Agile { order: Box::new(Linear::default()) },
        vec![world.store.clone()],
    )?;
    check(&world, &ram)?;
    still_cold(&world, cold)?;
    ensure(report.pages.plain < 200, || format!("cold pages came from the source: {report:?}"))
}

pub fn other_strategies_send_cold_pages_without_bringing_them_back(backing: Backing) -> Outcome {
    let strategies: [Box<dyn Strategy>; 2] =
        [Box::<PreCopy>::default(), Box::new(PostCopy { order: Box::new(Linear::default()) })];
    for mut strategy in strategies {
        let world = cold_world(backing)?;
        let cold = world.swapper.status().cold_bytes;
        let (report, ram) = moved(Source::new(&world)?, backing, &mut *strategy, Vec::new())?;
        check(&world, &ram)?;
        still_cold(&world, cold)?;
        ensure(report.pages.plain << 12 >= cold, || format!("cold pages did not come from the source: {report:?}"))?;
    }
    Ok(())
}

/// Pages come back because the guest writes them, while they are read from the store and sent, or
/// their locations are. None of what it has written is lost.
pub fn a_guest_writes_while_its_cold_pages_move(backing: Backing) -> Outcome {
    const THREADS: u64 = 2;
    let strategies: [Box<dyn Strategy>; 3] = [
        Box::<PreCopy>::default(),
        Box::new(Agile { order: Box::new(Linear::default()) }),
        Box::new(Hybrid { rounds: 2, order: Box::new(Linear::default()) }),
    ];
    for mut strategy in strategies {
        let world = World::new(backing, options())?;
        world.evict_all()?;
        let writers = Writers::new(THREADS as usize);
        let source = Source { writers: Some(&writers), ..Source::new(&world)? };
        let dirty = source.dirty.clone();
        let (ram, versions) = thread::scope(|scope| -> Result<_, Failed> {
            let write = |number| writers.write(&world, &dirty, [number, THREADS]);
            let threads: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || write(number))).collect();
            while writers.begun.load(Ordering::SeqCst) < threads.len() {
                thread::yield_now();
            }
            let moved = moved(source, backing, &mut *strategy, vec![world.store.clone()]);
            // also if it has failed before the pause
            writers.pause();
            let mut versions = vec![0; world.pages() as usize];
            for thread in threads {
                let written = thread.join().map_err(|_| "a thread panicked")??;
                versions.iter_mut().zip(written).for_each(|(all, this)| *all += this);
            }
            Ok((moved?.1, versions))
        })?;
        let mut bytes = vec![0; PAGE_SIZE];
        for page in 0..world.pages() {
            ram.read(ram.layout().gpa_of(page).ok_or("no such page")?, &mut bytes)?;
            let version = versions[page as usize];
            let name = strategy.name();
            ensure(bytes == expected(page, version), || format!("{name}: page {page} is not in version {version}"))?;
        }
    }
    Ok(())
}
