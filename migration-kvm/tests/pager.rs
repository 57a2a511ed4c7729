//! The pager on every backing, over real userfaultfd.
//!
//! Without userfaultfd, huge pages or /dev/kvm a trial that needs it is ignored and says why; with MIGRATION_REQUIRE_KVM=1 it fails instead.

use std::{
    fs, io,
    process::ExitCode,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit};
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion, RamSlice,
    pager::{Fault, Installed, Pager},
    tracker::DirtyTracker,
};
use migration_kvm::{
    pager::{PagerError, UserFaultPager},
    ram::{Backing, MappedRam},
    tracker::{GuestSlots, Modes, UserFault, WriteProtect, features},
};

type Outcome = Result<(), Failed>;
type Check = fn(Backing) -> Outcome;

/// Far longer than anything takes: an end for waits that must not need one.
const LONG: Duration = Duration::from_secs(600);

struct World {
    ram: Arc<MappedRam>,
    fault: Arc<UserFault>,
    pager: UserFaultPager,
}

impl World {
    /// Two regions of 4 MiB.
    fn new(backing: Backing) -> Result<Self, Failed> {
        Self::with_regions(backing, [0x40_0000, 0x40_0000])
    }

    fn with_regions(backing: Backing, len: [u64; 2]) -> Result<Self, Failed> {
        let second = 0x100_0000 + len[0] % 0x20_0000;
        let regions = vec![RamRegion { gpa: 0, len: len[0] }, RamRegion { gpa: second, len: len[1] }];
        let ram = Arc::new(MappedRam::new(RamLayout::new(regions)?, backing)?);
        let fault = Arc::new(UserFault::new()?);
        let pager = UserFaultPager::new(ram.clone(), fault.clone())?;
        Ok(Self { ram, fault, pager })
    }

    fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    fn all(&self) -> PageSet {
        PageSet::full(self.pages())
    }

    fn memory(&self) -> &dyn GuestRam {
        &*self.ram
    }

    /// What `page` holds; sleeps while it is missing.
    fn read(&self, page: u64) -> Result<Vec<u8>, Failed> {
        let mut bytes = vec![0; PAGE_SIZE];
        let gpa = self.ram.layout().gpa_of(page).ok_or("no such page")?;
        self.memory().read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, page: u64, bytes: &[u8]) -> Outcome {
        let gpa = self.ram.layout().gpa_of(page).ok_or("no such page")?;
        Ok(self.memory().write(gpa, bytes)?)
    }

    fn install(&self, range: PageRange, salt: u64) -> io::Result<Installed> {
        self.pager.install(range, &mut |slices| {
            fill(slices, range, salt);
            Ok(())
        })
    }

    fn holds(&self, range: PageRange, salt: u64) -> Outcome {
        range.pages().try_for_each(|page| {
            let same = self.read(page)? == contents(page, salt);
            ensure(same, || format!("page {page} does not hold what {salt} wrote"))
        })
    }

    fn zeros(&self, range: PageRange) -> Outcome {
        range.pages().try_for_each(|page| {
            let zero = self.read(page)?.iter().all(|&b| b == 0);
            ensure(zero, || format!("page {page} is not zero"))
        })
    }

    /// The block of pages that is installed together with `page`.
    fn block(&self, page: u64) -> PageRange {
        let granule = self.pager.granule();
        PageRange::new(page / granule * granule, granule)
    }

    /// Runs `body` while a thread answers faults by `answer`.
    fn serve<R>(&self, answer: impl Fn(Fault) -> io::Result<()> + Sync, body: impl FnOnce() -> R) -> Result<R, Failed> {
        thread::scope(|scope| {
            let server = scope.spawn(|| -> Result<(), String> {
                loop {
                    let mut faults = Vec::new();
                    self.pager.wait(LONG, &mut faults).map_err(|e| e.to_string())?;
                    if faults.is_empty() {
                        return Ok(());
                    }
                    faults.into_iter().try_for_each(&answer).map_err(|e| e.to_string())?;
                }
            });
            let stop = Stop(&self.pager);
            let result = body();
            drop(stop);
            server.join().map_err(|_| "the server panicked")??;
            Ok(result)
        })
    }
}

struct Stop<'a>(&'a UserFaultPager);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.wake_waiters();
    }
}

fn contents(page: u64, salt: u64) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u64 / 8).map(|i| (page << 32 | salt << 16 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_ne_bytes).collect()
}

fn fill(slices: &[RamSlice<'_>], range: PageRange, salt: u64) {
    let mut pages = range.pages();
    for &slice in slices {
        let mut rest = slice;
        while !rest.is_empty() {
            rest.copy_from(&contents(pages.next().unwrap_or(u64::MAX), salt));
            rest = rest.skip(PAGE_SIZE);
        }
    }
    assert_eq!(pages.next(), None, "less room than pages");
}

fn ensure(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what().into()) }
}

fn expect(got: Installed, pages: u64, duplicates: u64) -> Outcome {
    let want = Installed { pages, duplicates };
    ensure(got == want, || format!("{got:?} instead of {want:?}"))
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(first, count)
}

/// Who touches a missing page sleeps until it is installed, and is reported with page and thread.
fn touching_sleeps(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    for page in [0, 1500, 2047] {
        let (done, thread_id) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| -> Outcome {
            let toucher = scope.spawn(|| {
                // SAFETY: takes no argument and cannot fail.
                thread_id.store(unsafe { libc::gettid() } as u64, Ordering::SeqCst);
                let bytes = world.read(page).map_err(|e| format!("{e:?}"));
                done.store(true, Ordering::SeqCst);
                bytes
            });
            let mut faults = Vec::new();
            world.pager.wait(LONG, &mut faults)?;
            let known = world.fault.features() & features::THREAD_ID != 0;
            let thread = known.then_some(thread_id.load(Ordering::SeqCst) as u32);
            ensure(faults.len() == 1 && world.block(faults[0].page) == world.block(page), || format!("{faults:?}"))?;
            ensure(faults[0].thread == thread, || format!("{faults:?}, not thread {thread:?}"))?;
            ensure(!done.load(Ordering::SeqCst), || "read a missing page".into())?;
            world.pager.wake(page)?; // only makes it touch the page again
            faults.clear();
            world.pager.wait(LONG, &mut faults)?;
            ensure(faults.len() == 1, || format!("after a wake: {faults:?}"))?;
            expect(world.install(world.block(page), 1)?, world.pager.granule(), 0)?;
            let bytes = toucher.join().map_err(|_| "the toucher panicked")??;
            ensure(bytes == contents(page, 1), || "wrong contents".into())
        })?;
    }
    let mut faults = Vec::new();
    world.pager.wait(Duration::ZERO, &mut faults)?;
    ensure(faults.is_empty(), || format!("{faults:?} although all are answered"))
}

/// A write to a missing page lands on top of its contents.
fn writes_wait_too(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    let answer = |fault: Fault| world.install(world.block(fault.page), 3).map(|_| ());
    world.serve(answer, || world.write(700, b"written"))??;
    let mut want = contents(700, 3);
    want[..7].copy_from_slice(b"written");
    ensure(world.read(700)? == want, || "the write is lost, or tore the page".into())?;
    world.install(world.block(700), 4)?;
    ensure(world.read(700)? == want, || "a late copy came over it".into())
}

/// Of two that install the same page at the same time, one wins, with all of its contents.
fn racing_installs(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    for turn in 0..world.pages() / 512 {
        let block = if world.pager.granule() == 1 { range(turn * 512 + 100, 60) } else { range(turn * 512, 512) };
        let barrier = Barrier::new(2);
        let install = |salt: u64| {
            world.pager.install(block, &mut |slices| {
                barrier.wait(); // both are at it
                fill(slices, block, salt);
                Ok(())
            })
        };
        let (a, b) = thread::scope(|scope| {
            let a = scope.spawn(|| install(1));
            let b = install(2);
            (a.join().map_err(|_| "panicked"), b)
        });
        let (a, b) = (a??, b?);
        let first_won = a.pages != 0;
        expect(a, if first_won { block.count } else { 0 }, if first_won { 0 } else { block.count })?;
        expect(b, a.duplicates, a.pages)?;
        world.holds(block, if first_won { 1 } else { 2 })?;
        expect(world.install(block, 3)?, 0, block.count)?;
        world.holds(block, if first_won { 1 } else { 2 })?;
    }
    Ok(())
}

/// Pages that are there keep what they hold, also inside a range that is installed later.
fn duplicates_keep_their_contents(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    let granule = world.pager.granule();
    if granule == 1 {
        expect(world.install(range(3, 4), 1)?, 4, 0)?;
        expect(world.install(range(9, 1), 1)?, 1, 0)?;
        expect(world.install(range(0, 16), 2)?, 11, 5)?;
        expect(world.install(range(500, 12), 1)?, 12, 0)?;
        expect(world.install(range(0, 512), 3)?, 512 - 28, 28)?;
        for (first, count, salt) in [(0, 3, 2), (3, 4, 1), (7, 2, 2), (9, 1, 1), (10, 6, 2), (16, 484, 3), (500, 12, 1)]
        {
            world.holds(range(first, count), salt)?;
        }
    } else {
        expect(world.install(range(0, 512), 1)?, 512, 0)?;
        expect(world.install(range(0, 512), 2)?, 0, 512)?;
        world.holds(range(0, 512), 1)?;
    }
    expect(world.install(range(512, 512), 1)?, 512, 0)?;
    expect(world.install(range(512, 512), 2)?, 0, 512)?;
    expect(world.pager.install_zeros(range(0, 1024))?, 0, 1024)?;
    world.holds(range(512, 512), 1)?;
    let missing = world.pager.missing();
    ensure(missing == world.pages() - 1024, || format!("{missing} pages missing"))
}

fn zeros(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    // stale contents, dropped by arming
    world.pages_of(|page| world.write(page, &contents(page, 9)))?;
    world.pager.arm(&world.all())?;
    let granule = world.pager.granule();
    expect(world.install(world.block(600), 1)?, granule, 0)?;
    // leaves a half-filled page behind
    let failed = world.pager.install(world.block(1700), &mut |slices| {
        slices[0].take(100).copy_from(&[7; 100]);
        Err(io::ErrorKind::ConnectionReset.into())
    });
    ensure(failed.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset), || "no error".into())?;
    // somebody else wrote to the file meanwhile
    if let Some(alias) = world.ram.alias()? {
        let gpa = world.ram.layout().gpa_of(100).ok_or("no page")?;
        (&alias as &dyn GuestRam).write(gpa, b"garbage")?;
    }
    let toucher = thread::scope(|scope| -> Result<(), Failed> {
        let toucher = scope.spawn(|| world.read(1700).map_err(|e| format!("{e:?}")));
        let mut faults = Vec::new();
        world.pager.wait(LONG, &mut faults)?;
        let all = world.pages();
        expect(world.pager.install_zeros(range(0, all))?, all - granule, granule)?;
        let bytes = toucher.join().map_err(|_| "the toucher panicked")??;
        ensure(bytes.iter().all(|&b| b == 0), || "not zero".into())
    });
    toucher?;
    world.pages_of(|page| if world.block(page) == world.block(600) { Ok(()) } else { world.zeros(range(page, 1)) })?;
    world.holds(world.block(600), 1)?;
    world.pager.disarm()?;
    world.write(3, b"like any memory")
}

impl World {
    fn pages_of(&self, each: impl FnMut(u64) -> Outcome) -> Outcome {
        self.ram.layout().all().pages().try_for_each(each)
    }
}

/// What is not missing stays as it is: contents, holes, and contents that only the file has.
fn others_are_left_alone(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.write(600, &contents(600, 5))?;
    let hidden = world.ram.alias()?;
    if let Some(alias) = &hidden {
        let gpa = world.ram.layout().gpa_of(1100).ok_or("no page")?;
        (alias as &dyn GuestRam).write(gpa, &contents(1100, 6))?;
    }
    let mut missing = PageSet::empty(world.pages());
    missing.insert_range(range(1536, 512));
    world.pager.arm(&missing)?;
    let reported = Mutex::new(Vec::new());
    let answer = |fault: Fault| {
        reported.lock().map_err(|_| io::ErrorKind::Other)?.push(fault.page);
        world.install(world.block(fault.page), 1).map(|_| ())
    };
    world.serve(answer, || -> Outcome {
        world.holds(range(600, 1), 5)?;
        if hidden.is_some() {
            world.holds(range(1100, 1), 6)?;
        }
        thread::scope(|scope| {
            let touchers: Vec<_> =
                (0..3).map(|_| scope.spawn(|| world.zeros(range(1024, 64)).map_err(|e| format!("{e:?}")))).collect();
            touchers.into_iter().try_for_each(|t| t.join().map_err(|_| "panicked".to_owned())?)
        })?;
        // a page that is discarded while the watch lasts, as by a balloon
        world.ram.discard(world.block(600))?;
        world.zeros(world.block(600))?;
        world.write(1030, &contents(1030, 8))?;
        world.holds(range(1030, 1), 8)?;
        // an installed one too
        world.holds(range(1540, 1), 1)?;
        world.ram.discard(world.block(1540))?;
        world.zeros(world.block(1540))?;
        Ok(())
    })??;
    let reported = reported.into_inner().map_err(|_| "poisoned")?;
    let only_missing = reported.iter().all(|&p| missing.contains(p)) && !reported.is_empty();
    ensure(only_missing, || format!("reported {reported:?}"))
}

/// Arming drops stale contents of exactly what is missing.
fn stale_pages_are_dropped(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pages_of(|page| world.write(page, &contents(page, 9)))?;
    let granule = world.pager.granule();
    let mut missing = PageSet::empty(world.pages());
    for first in (granule..world.pages()).step_by(3 * granule as usize) {
        missing.insert_range(range(first, granule));
    }
    world.pager.arm(&missing)?;
    let answer = |fault: Fault| world.install(world.block(fault.page), 1).map(|_| ());
    let checked = world.serve(answer, || {
        world.pages_of(|page| world.holds(range(page, 1), if missing.contains(page) { 1 } else { 9 }))
    })?;
    checked?;
    ensure(world.pager.missing() == 0, || "some are missing still".into())?;
    world.pager.disarm()?;
    world.pages_of(|page| world.holds(range(page, 1), if missing.contains(page) { 1 } else { 9 }))
}

/// When contents do not arrive, nothing is installed, and who sleeps sleeps on.
fn a_failed_fill_leaves_it_missing(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    let block = if world.pager.granule() == 1 { range(40, 64) } else { range(0, 512) };
    thread::scope(|scope| -> Outcome {
        let toucher = scope.spawn(|| world.read(50).map_err(|e| format!("{e:?}")));
        let mut faults = Vec::new();
        world.pager.wait(LONG, &mut faults)?;
        for _ in 0..3 {
            let result = world.pager.install(block, &mut |slices| {
                slices[0].take(11 * PAGE_SIZE + 5).copy_from(&[0xaa; 11 * PAGE_SIZE + 5]);
                Err(io::Error::other("cut"))
            });
            ensure(result.is_err(), || "no error".into())?;
            ensure(world.pager.missing() == world.pages(), || "something was installed".into())?;
            ensure(!toucher.is_finished(), || "read a missing page".into())?;
            // it asks again when it is told to
            world.pager.wake(50)?;
            faults.clear();
            world.pager.wait(LONG, &mut faults)?;
            ensure(faults.len() == 1, || format!("{faults:?}"))?;
        }
        expect(world.install(block, 2)?, block.count, 0)?;
        let bytes = toucher.join().map_err(|_| "the toucher panicked")??;
        ensure(bytes == contents(50, 2), || "wrong contents".into())
    })?;
    world.holds(block, 2)
}

/// One that waits for another's claim takes over when that one fails.
fn a_duplicate_outlives_the_failure_of_the_first(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    let block = if world.pager.granule() == 1 { range(8, 8) } else { range(0, 512) };
    let (begun, second_filled) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| -> Outcome {
        let first = scope.spawn(|| {
            world.pager.install(block, &mut |slices| {
                begun.wait();
                slices[0].take(99).copy_from(&[1; 99]);
                second_filled.wait();
                Err(io::Error::other("cut"))
            })
        });
        begun.wait();
        let second = world.pager.install(block, &mut |slices| {
            fill(slices, block, 2);
            second_filled.wait();
            Ok(())
        })?;
        ensure(first.join().map_err(|_| "panicked")?.is_err(), || "no error".into())?;
        expect(second, block.count, 0)
    })?;
    world.holds(block, 2)
}

/// A range over the border of two regions; aligned stretches of pages that are not aligned in the host's memory.
fn across_regions(backing: Backing) -> Outcome {
    let world = World::with_regions(backing, [0x20_5000, 0x40_3000])?;
    world.pager.arm(&world.all())?;
    expect(world.install(range(515, 6), 1)?, 6, 0)?;
    expect(world.install(range(512, 512), 2)?, 506, 6)?;
    expect(world.install(range(1024, 512), 3)?, 512, 0)?;
    expect(world.install(range(0, 512), 4)?, 512, 0)?;
    let rest = world.pages() - 1536;
    expect(world.pager.install_zeros(range(500, world.pages() - 500))?, rest, 1036)?;
    for (first, count, salt) in [(0, 512, 4), (512, 3, 2), (515, 6, 1), (521, 503, 2), (1024, 512, 3)] {
        world.holds(range(first, count), salt)?;
    }
    world.zeros(range(1536, rest))?;
    world.pager.disarm()?;
    Ok(())
}

/// Kilobytes of transparent huge pages in the mapping that `address` lies in.
fn huge_kilobytes(address: u64) -> Result<u64, Failed> {
    let (smaps, mut inside) = (fs::read_to_string("/proc/self/smaps")?, false);
    for line in smaps.lines() {
        let head = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = head.map(|(a, b)| (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)));
        if let Some((Ok(start), Ok(end))) = bounds {
            inside = (start..end).contains(&address);
        } else if let Some(rest) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            return Ok(rest.trim().trim_end_matches(" kB").parse()?);
        }
    }
    Err("no such mapping".into())
}

/// 2 MiB installed at once are one huge page; also next to pages installed one by one.
fn huge_blocks_stay_huge(backing: Backing) -> Outcome {
    let control = World::new(backing)?;
    control.ram.warm(range(0, 512))?;
    if huge_kilobytes(control.ram.host_address(0).as_ptr() as u64)? == 0 {
        eprintln!("the host has no free huge page: huge_blocks_stay_huge checks contents only");
    }
    let possible = huge_kilobytes(control.ram.host_address(0).as_ptr() as u64)? != 0;
    let world = World::new(backing)?;
    if world.fault.features() & features::MOVE == 0 {
        eprintln!("userfaultfd has no MOVE: huge_blocks_stay_huge checks contents only");
    }
    let possible = possible && world.fault.features() & features::MOVE != 0;
    // stale small pages in one of them, and a stale huge page in another
    world.write(1024, b"stale")?;
    world.pager.arm(&world.all())?;
    expect(world.install(range(600, 1), 1)?, 1, 0)?;
    for (first, pages, duplicates) in [(0, 512, 0), (512, 511, 1), (1536, 512, 0), (1024, 512, 0)] {
        expect(world.install(range(first, 512), 2)?, pages, duplicates)?;
    }
    for index in 0..2 {
        let huge = huge_kilobytes(world.ram.host_address(index).as_ptr() as u64)?;
        ensure(huge >= 2048 || !possible, || format!("region {index}: {huge} kB of huge pages"))?;
    }
    world.pages_of(|page| world.holds(range(page, 1), if page == 600 { 1 } else { 2 }))?;
    world.pager.disarm()?;
    Ok(())
}

/// A write-protecting tracker on the same userfaultfd sees writes to pages after they were installed.
fn beside_a_tracker(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    let mut tracker = WriteProtect::new(world.ram.clone(), world.fault.clone());
    let whole = if matches!(backing, Backing::Hugetlb | Backing::TransparentHuge) { 512 } else { 1 };
    let harvest = |tracker: &mut WriteProtect| -> Result<PageSet, Failed> {
        let mut dirty = PageSet::empty(world.pages());
        tracker.harvest(&mut dirty)?;
        Ok(dirty)
    };
    let seen = |dirty: &PageSet, page: u64, what: &str| {
        let block = range(page / whole * whole, whole);
        let mut others = dirty.clone();
        others.remove_range(block);
        ensure(dirty.contains(page) && others.is_empty(), || format!("{what}: page {page}, got {dirty:?}"))
    };
    world.write(100, b"stale")?;
    tracker.start()?;
    harvest(&mut tracker)?;
    let mut missing = world.all();
    missing.remove_range(range(1024, 512)); // holes
    world.pager.arm(&missing)?;
    let answer = |fault: Fault| world.install(world.block(fault.page), 1).map(|_| ());
    world.serve(answer, || -> Outcome {
        harvest(&mut tracker)?;
        world.write(30, b"written while missing")?;
        let dirty = harvest(&mut tracker)?;
        ensure(dirty.contains(30), || format!("the page is new, {dirty:?}"))?;
        for first in [0, 512] {
            world.install(range(first, 512), 1)?;
        }
        world.pager.install_zeros(range(1536, 512))?;
        harvest(&mut tracker)?;
        ensure(harvest(&mut tracker)?.is_empty(), || "nothing was written".into())?;
        world.holds(range(40, 1), 1)?;
        world.zeros(range(1600, 1))?;
        for page in [31, 40, 900, 1600] {
            world.write(page, b"written after")?;
            seen(&harvest(&mut tracker)?, page, "installed")?;
            world.write(page, b"once more")?;
            seen(&harvest(&mut tracker)?, page, "again")?;
        }
        world.write(1030, b"into a hole")?;
        let dirty = harvest(&mut tracker)?;
        ensure(dirty.contains(1030), || format!("a hole, {dirty:?}"))
    })??;
    // from here on nobody answers faults: holes must read by themselves
    world.pager.disarm()?;
    world.zeros(range(1100, 1))?;
    harvest(&mut tracker)?;
    harvest(&mut tracker)?;
    world.write(70, b"after the watch")?;
    seen(&harvest(&mut tracker)?, 70, "disarmed")?;
    tracker.stop()?;
    world.write(71, b"free")
}

/// A tracker that comes and goes while pages are missing leaves them missing.
fn a_tracker_comes_and_goes(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    let mut tracker = WriteProtect::new(world.ram.clone(), world.fault.clone());
    let answer = |fault: Fault| world.install(world.block(fault.page), 1).map(|_| ());
    world.serve(answer, || -> Outcome {
        for page in [100, 600, 1100] {
            tracker.start()?;
            tracker.harvest(&mut world.all())?;
            world.holds(range(page, 1), 1)?;
            tracker.harvest(&mut world.all())?;
            tracker.stop()?;
            world.holds(range(page + 512 / world.pager.granule(), 1), 1)?;
        }
        Ok(())
    })??;
    ensure(world.pager.missing() > 0, || "nothing is missing any more".into())
}

/// The marks that write-protection leaves where no page is do not count as pages.
fn protected_holes_are_missing(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.pager.arm(&world.all())?;
    for (index, region) in world.ram.layout().regions().iter().enumerate() {
        let address = world.ram.host_address(index);
        world.fault.register(address.as_ptr() as u64, region.len, Modes::WRITE_PROTECT)?;
        world.fault.uffd().write_protect(address.as_ptr().cast(), region.len as usize)?;
    }
    expect(world.pager.install_zeros(range(0, 512))?, 512, 0)?;
    expect(world.install(range(512, 512), 1)?, 512, 0)?;
    expect(world.install(world.block(1030), 1)?, world.pager.granule(), 0)?;
    expect(world.pager.install_zeros(range(1024, 1024))?, 1024 - world.pager.granule(), world.pager.granule())?;
    world.zeros(range(0, 512))?;
    world.holds(range(512, 512), 1)?;
    world.holds(range(1030, 1), 1)?;
    world.zeros(range(1536, 512))?;
    world.pager.disarm()?;
    Ok(())
}

/// What does not fit is refused, and changes nothing.
fn refusals(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    let granule = world.pager.granule();
    ensure(granule == if backing == Backing::Hugetlb { 512 } else { 1 }, || format!("granule {granule}"))?;
    ensure(world.pager.arm(&PageSet::full(7)).is_err(), || "a set of another VM".into())?;
    if granule > 1 {
        let mut half = PageSet::empty(world.pages());
        half.insert_range(range(0, 256));
        ensure(world.pager.arm(&half).is_err(), || "half a huge page".into())?;
    }
    world.pager.disarm()?;
    world.pager.arm(&world.all())?;
    ensure(world.pager.arm(&world.all()).is_err(), || "armed twice".into())?;
    let refused = world.pager.disarm().map_err(|e| e.to_string());
    ensure(refused.as_ref().is_err_and(|e| e.contains("2048 pages are missing")), || format!("{refused:?}"))?;
    let invalid = |result: io::Result<Installed>, what: PageRange| {
        let kind = result.as_ref().map_err(io::Error::kind);
        ensure(kind == Err(io::ErrorKind::InvalidInput), || format!("{what:?}: {result:?}"))
    };
    let mut bad = vec![(0, 0), (2048, 512), (1536, 1024), (u64::MAX, 1), (1, u64::MAX), (u64::MAX - 511, 512)];
    if granule > 1 {
        bad.extend([(0, 1), (1, 512)]);
    }
    for (first, count) in bad {
        let bad = range(first, count);
        let install = world.pager.install(bad, &mut |_| Err(io::Error::other("called")));
        invalid(install, bad)?;
        invalid(world.pager.install_zeros(bad), bad)?;
    }
    let crossing = if granule == 1 { range(500, 20) } else { range(0, 1024) };
    invalid(world.install(crossing, 1), crossing)?;
    ensure(world.pager.wake(2048).is_err() && world.pager.wake(u64::MAX).is_err(), || "woke outside RAM".into())?;
    ensure(world.pager.missing() == world.pages(), || "something was installed".into())?;
    world.pager.wake_waiters();
    world.pager.wait(LONG, &mut Vec::new())?;
    world.pager.wait(LONG, &mut Vec::new())?;
    for first in (0..world.pages()).step_by(512) {
        world.install(range(first, 512), 1)?;
    }
    world.pager.disarm()?;
    world.pager.disarm()?;
    // after the end all are duplicates, and lanes are still emptied
    let mut called = false;
    let late = world.pager.install(range(0, 512), &mut |_| {
        called = true;
        Ok(())
    })?;
    expect(late, 0, 512)?;
    ensure(called, || "the contents were left on the lane".into())?;
    // and a second life, on the same memory
    world.pager.arm(&world.all())?;
    expect(world.install(range(0, 512), 2)?, 512, 0)?;
    world.holds(range(0, 512), 2)
}

/// Features that a backing needs are asked for by name.
fn lacking_features(backing: Backing) -> Outcome {
    let ram = World::new(backing)?.ram.clone();
    let minor = features::MINOR_SHMEM | features::MINOR_HUGETLBFS;
    let fault = Arc::new(UserFault::with_features(features::USEFUL & !minor)?);
    match UserFaultPager::new(ram, fault) {
        Ok(_) if backing.is_shared() => Err("a pager without minor faults".into()),
        Err(PagerError::Lacks { bits, .. }) if backing.is_shared() && bits & minor != 0 => Ok(()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Four threads touch pages at random while two read faults and two install, on demand and in order.
fn stress(backing: Backing) -> Outcome {
    const ZERO_EVERY: u64 = 7;
    let world = World::new(backing)?;
    world.pages_of(|page| world.write(page, b"stale"))?;
    world.pager.arm(&world.all())?;
    let (granule, installed) = (world.pager.granule(), AtomicU64::new(0));
    let is_zero = |page: u64| (page / granule).is_multiple_of(ZERO_EVERY);
    let count = |result: io::Result<Installed>| -> Result<(), String> {
        installed.fetch_add(result.map_err(|e| e.to_string())?.pages, Ordering::Relaxed);
        Ok(())
    };
    let demand = |page: u64| {
        let block = world.block(page);
        count(if is_zero(page) { world.pager.install_zeros(block) } else { world.install(block, 1) })
    };
    let push = |run: PageRange| {
        count(world.pager.install(run, &mut |slices| {
            let pages = run.pages().flat_map(|p| if is_zero(p) { vec![0; PAGE_SIZE] } else { contents(p, 1) });
            let (bytes, mut at) = (pages.collect::<Vec<u8>>(), 0);
            for slice in slices {
                slice.copy_from(&bytes[at..]);
                at += slice.len();
            }
            Ok(())
        }))
    };
    let check = |mut random: u64| -> Result<(), String> {
        for _ in 0..1500 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = random % world.pages();
            let bytes = world.read(page).map_err(|e| format!("{e:?}"))?;
            let right = if is_zero(page) { bytes.iter().all(|&b| b == 0) } else { bytes == contents(page, 1) };
            if !right {
                return Err(format!("page {page} is wrong"));
            }
        }
        Ok(())
    };
    thread::scope(|scope| -> Outcome {
        let (sender, receiver) = mpsc::channel::<u64>();
        let wait = |sender: mpsc::Sender<u64>| -> Result<(), String> {
            loop {
                let mut faults = Vec::new();
                world.pager.wait(LONG, &mut faults).map_err(|e| e.to_string())?;
                if faults.is_empty() {
                    return Ok(());
                }
                faults.iter().for_each(|f| sender.send(f.page).unwrap_or(()));
            }
        };
        let mut others = Vec::new();
        for sender in [sender.clone(), sender] {
            others.push(scope.spawn(move || wait(sender)));
        }
        others.push(scope.spawn(move || receiver.into_iter().try_for_each(demand)));
        let stop = Stop(&world.pager);
        let touchers: Vec<_> = (1..5u64).map(|seed| scope.spawn(move || check(seed * 0x1234_5678_9abc))).collect();
        let step = granule.max(16);
        for first in (0..world.pages()).step_by(step as usize) {
            push(range(first, step))?;
        }
        for toucher in touchers {
            toucher.join().map_err(|_| "a toucher panicked")??;
        }
        drop(stop);
        others.into_iter().try_for_each(|t| t.join().map_err(|_| "panicked".to_owned())?)?;
        Ok(())
    })?;
    let installed = installed.into_inner();
    ensure(installed == world.pages(), || format!("{installed} pages installed of {}", world.pages()))?;
    world.pager.disarm()?;
    Ok(())
}

/// A vCPU, and KVM reading its page tables, sleep for missing pages like any thread.
fn a_guest_runs_on_missing_pages(backing: Backing) -> Outcome {
    const CODE: u64 = 0x1000;
    const TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
    const DOORBELL: u64 = 0x1000_0000;
    /// `rcx` times: add `[rdi]` to `rax`, advance `rdi` by `rsi`. Then store `rax` at `[rbx]`, where no memory is.
    const PROGRAM: [u8; 16] =
        [0x48, 0x03, 0x07, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0x48, 0x89, 0x03, 0xeb, 0xfe];

    let world = World::new(backing)?;
    let layout = world.ram.layout().clone();
    let data = layout.region_pages(1).ok_or("no second region")?;
    let image = MappedRam::new(layout.clone(), Backing::Anonymous)?;
    let source: &dyn GuestRam = &image;
    source.write(CODE, &PROGRAM)?;
    // present, writable, user, accessed, dirty
    let entry = |to: u64| (to | 0x67).to_le_bytes();
    source.write(TABLES[0], &entry(TABLES[1]))?;
    source.write(TABLES[1], &entry(TABLES[2]))?;
    for i in 0..512 {
        source.write(TABLES[2] + i * 8, &entry(i << 21 | 0x80))?;
    }
    for page in data.pages() {
        source.write(layout.gpa_of(page).ok_or("no page")?, &page.pow(3).to_le_bytes())?;
    }

    let vm = Arc::new(Kvm::new()?.create_vm()?);
    // SAFETY: the VM is new and goes before the RAM does; nothing else keeps it alive.
    let slots = unsafe { GuestSlots::of_regions(world.ram.clone(), 0)? };
    slots.install(&vm)?;
    world.pager.arm(&world.all())?;
    let answer = |fault: Fault| {
        let block = world.block(fault.page);
        let copy = &mut |slices: &[RamSlice<'_>]| {
            let mut bytes = vec![0; block.bytes() as usize];
            let from = source.slice(block).map_err(io::Error::other)?;
            from.copy_to(&mut bytes);
            slices.iter().for_each(|slice| slice.copy_from(&bytes));
            Ok(())
        };
        world.pager.install(block, copy).map(|_| ())
    };
    let sum = world.serve(answer, || -> Result<u64, Failed> {
        let mut vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        let segment = |selector, type_, l| {
            let (limit, present, dpl, s, g) = (u32::MAX, 1, 3, 1, 1);
            kvm_segment { limit, selector, type_, present, dpl, db: 1 - l, s, l, g, ..kvm_segment::default() }
        };
        // ring 3: it runs natively also where ring 0 is interpreted
        sregs.cs = segment(0x33, 0xb, 1);
        let flat = segment(0x2b, 3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, TABLES[0], 0x620, 0xd01);
        vcpu.set_sregs(&sregs)?;
        let rdi = layout.gpa_of(data.first).ok_or("no page")?;
        let (rip, rflags, rbx, rcx, rsi) = (CODE, 2, DOORBELL, data.count, PAGE_SIZE as u64);
        vcpu.set_regs(&kvm_regs { rip, rflags, rbx, rcx, rdi, rsi, ..kvm_regs::default() })?;
        match vcpu.run()? {
            VcpuExit::MmioWrite(DOORBELL, bytes) => Ok(u64::from_le_bytes(bytes.try_into()?)),
            other => Err(format!("unexpected exit {other:?}").into()),
        }
    })??;
    let want: u64 = data.pages().map(|page| page.pow(3)).sum();
    ensure(sum == want, || format!("the guest read a sum of {sum}, not {want}"))?;
    let still = world.pager.missing();
    // code, tables and data; more only as far as a huge page has
    ensure(still > 0 || world.pager.granule() > 1, || "who touched the rest?".into())
}

/// Prints what a page costs, by the pages of a call. No assertion.
fn cost(backing: Backing) -> Outcome {
    const PAGES: u64 = 16 << 8;
    for step in [1, 16, 512] {
        for turn in ["cold", "warm"] {
            let world = World::with_regions(backing, [PAGES << 12, 0x20_0000])?;
            if step < world.pager.granule() {
                continue;
            }
            let data = vec![0x5a; PAGE_SIZE * step as usize];
            world.pager.arm(&world.all())?;
            let start = Instant::now();
            for first in (0..PAGES).step_by(step as usize) {
                world.pager.install(range(first, step), &mut |slices| {
                    slices.iter().for_each(|s| s.copy_from(&data));
                    Ok(())
                })?;
            }
            let each = start.elapsed().as_secs_f64() * 1e6 / PAGES as f64;
            eprintln!("{backing}: {step} pages a call, {turn}: {each:.2} µs a page");
        }
    }
    Ok(())
}

/// Huge pages that the trials need: they may run in parallel.
const HUGE_PAGES: u64 = 80;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Raises the reserve of huge pages, and puts it back when dropped.
struct HugePages(u64);

impl HugePages {
    fn reserve() -> Result<Self, String> {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok();
        let before = read().ok_or("cannot read the number of huge pages")?;
        let this = Self(before);
        fs::write(NR_HUGEPAGES, (before + HUGE_PAGES).to_string()).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        if read() == Some(before + HUGE_PAGES) { Ok(this) } else { Err("not enough memory in 2 MiB pieces".into()) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, self.0.to_string());
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|v| v == "1");
    let huge = if arguments.list { Err("only listed".to_owned()) } else { HugePages::reserve() };
    let user_fault = UserFault::new().map(|fault| fault.features()).map_err(|e| e.to_string());
    let no_kvm = Kvm::new().err().map(|e| format!("/dev/kvm: {e}"));
    let mut trials = Vec::new();
    let mut add = |name: &str, backing: Backing, needs: u64, run: Check| {
        let name = format!("{backing}/{name}");
        let missing = match (&user_fault, &huge) {
            (Err(why), _) => Some(why.clone()),
            (Ok(has), _) if needs & !has != 0 => Some(format!("userfaultfd lacks features {:#x}", needs & !has)),
            (_, Err(why)) if backing == Backing::Hugetlb => Some(why.clone()),
            _ if name.ends_with("a_guest_runs_on_missing_pages") => no_kvm.clone(),
            _ => None,
        };
        trials.push(match missing {
            Some(why) if required && !arguments.list => Trial::test(name, move || Err(why.into())),
            Some(why) => {
                eprintln!("{name} is ignored: {why}");
                Trial::test(name, || Ok(())).with_ignored_flag(true)
            }
            None => Trial::test(name, move || run(backing)),
        });
    };
    let everywhere: [(&str, Check); 12] = [
        ("touching_sleeps", touching_sleeps),
        ("writes_wait_too", writes_wait_too),
        ("racing_installs", racing_installs),
        ("duplicates_keep_their_contents", duplicates_keep_their_contents),
        ("zeros", zeros),
        ("others_are_left_alone", others_are_left_alone),
        ("stale_pages_are_dropped", stale_pages_are_dropped),
        ("a_failed_fill_leaves_it_missing", a_failed_fill_leaves_it_missing),
        ("a_duplicate_outlives_the_failure_of_the_first", a_duplicate_outlives_the_failure_of_the_first),
        ("refusals", refusals),
        ("lacking_features", lacking_features),
        ("stress", stress),
    ];
    for backing in Backing::ALL {
        let needs = match backing {
            Backing::Anonymous | Backing::TransparentHuge => 0,
            Backing::Memfd => features::MISSING_SHMEM | features::MINOR_SHMEM,
            Backing::Hugetlb => features::MISSING_HUGETLBFS | features::MINOR_HUGETLBFS,
        };
        for (name, run) in everywhere {
            add(name, backing, needs, run);
        }
        add("beside_a_tracker", backing, needs | features::WRITE_TRACKING, beside_a_tracker);
        add("a_tracker_comes_and_goes", backing, needs | features::WRITE_TRACKING, a_tracker_comes_and_goes);
        add("protected_holes_are_missing", backing, needs | features::WRITE_TRACKING, protected_holes_are_missing);
        add("a_guest_runs_on_missing_pages", backing, needs, a_guest_runs_on_missing_pages);
        if backing != Backing::Hugetlb {
            add("across_regions", backing, needs, across_regions);
        }
    }
    add("huge_blocks_stay_huge", Backing::TransparentHuge, 0, huge_blocks_stay_huge);
    for backing in Backing::ALL {
        trials.push(Trial::test(format!("{backing}/cost"), move || cost(backing)).with_ignored_flag(true));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(huge);
    conclusion.exit_code()
}
