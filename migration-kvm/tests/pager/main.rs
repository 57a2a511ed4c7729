//! The pager on every backing, over real userfaultfd.
//!
//! Without userfaultfd, huge pages or /dev/kvm a trial that needs it is ignored and says why; with
//! MIGRATION_REQUIRE_KVM=1 it fails instead.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    process::ExitCode,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use kvm_ioctls::Kvm;
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet,
    page_map::PageCopy,
    pager::{Fault, Installed, Pager},
    tracker::DirtyTracker,
};
use migration_kvm::{
    pager::{PagerError, UserFaultPager},
    ram::{Backing, MappedRam},
    tracker::{Modes, UserFault, WriteProtect, features},
};

mod load;
mod own_ram;
mod world;

use load::{a_guest_runs_on_missing_pages, cost, stress};
use own_ram::ram_of_the_vmms_own;
use world::{HugePages, LONG, Outcome, World, contents, ensure, expect, fill, range};

type Check = fn(Backing) -> Outcome;

/// Who touches a missing page sleeps until it is installed, and is reported with page and thread.
fn touching_sleeps(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.arm(&world.all())?;
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
            expect(world.install(world.block(page), 1)?, world.pager.block_pages(), 0)?;
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
    world.arm(&world.all())?;
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
    world.arm(&world.all())?;
    for turn in 0..world.pages() / 512 {
        let block = if world.pager.block_pages() == 1 { range(turn * 512 + 100, 60) } else { range(turn * 512, 512) };
        let barrier = Barrier::new(2);
        let install = |salt: u64| {
            world.pager.install(block, PageCopy::Source, &mut |slices| {
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
    world.arm(&world.all())?;
    let block_pages = world.pager.block_pages();
    if block_pages == 1 {
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
    world.arm(&world.all())?;
    let block_pages = world.pager.block_pages();
    expect(world.install(world.block(600), 1)?, block_pages, 0)?;
    // leaves a half-filled page behind
    let failed = world.pager.install(world.block(1700), PageCopy::Source, &mut |slices| {
        slices[0].take(100).copy_from(&[7; 100]);
        Err(io::ErrorKind::ConnectionReset.into())
    });
    ensure(failed.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset), || "no error".into())?;
    // somebody else wrote to the file meanwhile
    if let Some(alias) = world.ram.alias()? {
        let gpa = world.ram.layout().gpa_of(100).ok_or("no page")?;
        alias.write(gpa, b"garbage")?;
    }
    let toucher = thread::scope(|scope| -> Result<(), Failed> {
        let toucher = scope.spawn(|| world.read(1700).map_err(|e| format!("{e:?}")));
        let mut faults = Vec::new();
        world.pager.wait(LONG, &mut faults)?;
        let all = world.pages();
        expect(world.pager.install_zeros(range(0, all))?, all - block_pages, block_pages)?;
        let bytes = toucher.join().map_err(|_| "the toucher panicked")??;
        ensure(bytes.iter().all(|&b| b == 0), || "not zero".into())
    });
    toucher?;
    world.pages_of(|page| if world.block(page) == world.block(600) { Ok(()) } else { world.zeros(range(page, 1)) })?;
    world.holds(world.block(600), 1)?;
    world.pager.disarm()?;
    world.write(3, b"like any memory")
}

/// What is not missing stays as it is: contents, holes, and contents that only the file has.
fn others_are_left_alone(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.write(600, &contents(600, 5))?;
    let hidden = world.ram.alias()?;
    if let Some(alias) = &hidden {
        let gpa = world.ram.layout().gpa_of(1100).ok_or("no page")?;
        alias.write(gpa, &contents(1100, 6))?;
    }
    let mut missing = PageSet::empty(world.pages());
    missing.insert_range(range(1536, 512));
    world.arm(&missing)?;
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
    let block_pages = world.pager.block_pages();
    let mut missing = PageSet::empty(world.pages());
    for first in (block_pages..world.pages()).step_by(3 * block_pages as usize) {
        missing.insert_range(range(first, block_pages));
    }
    world.arm(&missing)?;
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
    world.arm(&world.all())?;
    let block = if world.pager.block_pages() == 1 { range(40, 64) } else { range(0, 512) };
    thread::scope(|scope| -> Outcome {
        let toucher = scope.spawn(|| world.read(50).map_err(|e| format!("{e:?}")));
        let mut faults = Vec::new();
        world.pager.wait(LONG, &mut faults)?;
        for _ in 0..3 {
            let result = world.pager.install(block, PageCopy::Source, &mut |slices| {
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
    world.arm(&world.all())?;
    let block = if world.pager.block_pages() == 1 { range(8, 8) } else { range(0, 512) };
    let (begun, second_filled) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| -> Outcome {
        let first = scope.spawn(|| {
            world.pager.install(block, PageCopy::Source, &mut |slices| {
                begun.wait();
                slices[0].take(99).copy_from(&[1; 99]);
                second_filled.wait();
                Err(io::Error::other("cut"))
            })
        });
        begun.wait();
        let second = world.pager.install(block, PageCopy::Source, &mut |slices| {
            fill(slices, block, 2);
            second_filled.wait();
            Ok(())
        })?;
        ensure(first.join().map_err(|_| "panicked")?.is_err(), || "no error".into())?;
        expect(second, block.count, 0)
    })?;
    world.holds(block, 2)
}

/// A range over the border of two regions; aligned stretches of pages that are not aligned in the
/// host's memory.
fn across_regions(backing: Backing) -> Outcome {
    let world = World::with_regions(backing, [0x20_5000, 0x40_3000])?;
    world.arm(&world.all())?;
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

/// Kilobytes of transparent huge pages in the mapping that `address` lies in, of this kind of
/// memory.
fn huge_kilobytes(address: u64, kind: &str) -> Result<u64, Failed> {
    let (smaps, mut inside) = (fs::read_to_string("/proc/self/smaps")?, false);
    for line in smaps.lines() {
        let head = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = head.map(|(a, b)| (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)));
        if let Some((Ok(start), Ok(end))) = bounds {
            inside = (start..end).contains(&address);
        } else if let Some(rest) = line.strip_prefix(kind).filter(|_| inside) {
            return Ok(rest.trim().trim_end_matches(" kB").parse()?);
        }
    }
    Err("no such mapping".into())
}

/// 2 MiB installed at once are one huge page; also next to pages installed one by one.
fn huge_blocks_stay_huge(backing: Backing) -> Outcome {
    let control = World::new(backing)?;
    control.ram.prefault(range(0, 512))?;
    let huge = |ram: &MappedRam, index| huge_kilobytes(ram.host_address(index).as_ptr() as u64, "AnonHugePages:");
    let possible = huge(&control.ram, 0)? != 0;
    if !possible {
        eprintln!("the host has no free huge page: huge_blocks_stay_huge checks contents only");
    }
    let world = World::new(backing)?;
    if world.fault.features() & features::MOVE == 0 {
        eprintln!("userfaultfd has no MOVE: huge_blocks_stay_huge checks contents only");
    }
    let possible = possible && world.fault.features() & features::MOVE != 0;
    // stale small pages in one of them, and a stale huge page in another
    world.write(1024, b"stale")?;
    world.arm(&world.all())?;
    expect(world.install(range(600, 1), 1)?, 1, 0)?;
    for (first, pages, duplicates) in [(0, 512, 0), (512, 511, 1), (1536, 512, 0), (1024, 512, 0)] {
        expect(world.install(range(first, 512), 2)?, pages, duplicates)?;
    }
    // beside the page that came alone, all of them
    for (index, least) in [(0, 2048), (1, 4096)] {
        let huge = huge(&world.ram, index)?;
        ensure(huge >= least || !possible, || format!("region {index}: {huge} kB of huge pages"))?;
    }
    world.pages_of(|page| world.holds(range(page, 1), if page == 600 { 1 } else { 2 }))?;
    world.pager.disarm()?;
    Ok(())
}

/// Where the kernel may use them for shared memory, there are huge pages for whoever maps the
/// files; to install pages does not depend on it.
fn shared_huge_pages(backing: Backing) -> Outcome {
    let control = World::new(backing)?;
    control.ram.prefault(range(0, 512))?;
    let possible = backing.may_be_huge() && control.ram.assemble_huge_pages(range(0, 512)).is_ok();
    if !possible {
        eprintln!("the host has no huge pages for shared memory: shared_huge_pages checks contents only");
    }
    let huge = |ram: &MappedRam| -> Outcome {
        let huge = huge_kilobytes(ram.host_address(0).as_ptr() as u64, "ShmemPmdMapped:")?;
        ensure(huge >= 2048 || !possible, || format!("{huge} kB of huge pages"))
    };
    let world = World::new(backing)?;
    world.ram.prefault(range(0, 512))?;
    huge(&world.ram)?;
    world.write(7, b"shared")?;
    let files = world.ram.memory_files()?.iter().map(|file| file.try_clone_to_owned()).collect::<Result<_, _>>()?;
    let other = MappedRam::from_memory_files(world.ram.layout().clone(), files, backing)?;
    other.prefault_for_reading(range(0, 512))?;
    huge(&other)?;
    let mut there = [0; 6];
    other.read(7 << 12, &mut there)?;
    ensure(&there == b"shared", || format!("{there:?}"))?;
    drop(other);
    // stale pages inside a huge one, and all of another one
    world.arm(&world.all())?;
    for first in (0..world.pages()).step_by(256) {
        expect(world.install(range(first, 256), 2)?, 256, 0)?;
    }
    world.holds(range(0, 512), 2)?;
    world.pager.disarm()?;
    Ok(())
}

/// A write-protecting tracker on the same userfaultfd sees writes to pages after they were
/// installed.
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
    world.arm(&missing)?;
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
    world.arm(&world.all())?;
    let mut tracker = WriteProtect::new(world.ram.clone(), world.fault.clone());
    let answer = |fault: Fault| world.install(world.block(fault.page), 1).map(|_| ());
    world.serve(answer, || -> Outcome {
        for page in [100, 600, 1100] {
            tracker.start()?;
            tracker.harvest(&mut world.all())?;
            world.holds(range(page, 1), 1)?;
            tracker.harvest(&mut world.all())?;
            tracker.stop()?;
            world.holds(range(page + 512 / world.pager.block_pages(), 1), 1)?;
        }
        Ok(())
    })??;
    ensure(world.pager.missing() > 0, || "nothing is missing any more".into())
}

/// The marks that write-protection leaves where no page is do not count as pages.
fn protected_holes_are_missing(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.arm(&world.all())?;
    for (index, region) in world.ram.layout().regions().iter().enumerate() {
        let address = world.ram.host_address(index);
        world.fault.register(address.as_ptr() as u64, region.len, Modes::WRITE_PROTECT)?;
        world.fault.uffd().write_protect(address.as_ptr().cast(), region.len as usize)?;
    }
    expect(world.pager.install_zeros(range(0, 512))?, 512, 0)?;
    expect(world.install(range(512, 512), 1)?, 512, 0)?;
    expect(world.install(world.block(1030), 1)?, world.pager.block_pages(), 0)?;
    expect(world.pager.install_zeros(range(1024, 1024))?, 1024 - world.pager.block_pages(), world.pager.block_pages())?;
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
    let block_pages = world.pager.block_pages();
    ensure(block_pages == if backing == Backing::Hugetlb { 512 } else { 1 }, || format!("block_pages {block_pages}"))?;
    ensure(world.arm(&PageSet::full(7)).is_err(), || "a set of another VM".into())?;
    if block_pages > 1 {
        let mut half = PageSet::empty(world.pages());
        half.insert_range(range(0, 256));
        ensure(world.arm(&half).is_err(), || "half a huge page".into())?;
    }
    world.pager.disarm()?;
    world.arm(&world.all())?;
    ensure(world.arm(&world.all()).is_err(), || "armed twice".into())?;
    let refused = world.pager.disarm().map_err(|e| e.to_string());
    ensure(refused.as_ref().is_err_and(|e| e.contains("2048 pages are missing")), || format!("{refused:?}"))?;
    let invalid = |result: io::Result<Installed>, what: PageRange| {
        let kind = result.as_ref().map_err(io::Error::kind);
        ensure(kind == Err(io::ErrorKind::InvalidInput), || format!("{what:?}: {result:?}"))
    };
    let mut bad = vec![(0, 0), (2048, 512), (1536, 1024), (u64::MAX, 1), (1, u64::MAX), (u64::MAX - 511, 512)];
    if block_pages > 1 {
        bad.extend([(0, 1), (1, 512)]);
    }
    for (first, count) in bad {
        let bad = range(first, count);
        let install = world.pager.install(bad, PageCopy::Source, &mut |_| Err(io::Error::other("called")));
        invalid(install, bad)?;
        invalid(world.pager.install_zeros(bad), bad)?;
    }
    let crossing = if block_pages == 1 { range(500, 20) } else { range(0, 1024) };
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
    let late = world.pager.install(range(0, 512), PageCopy::Source, &mut |_| {
        called = true;
        Ok(())
    })?;
    expect(late, 0, 512)?;
    ensure(called, || "the contents were left on the lane".into())?;
    // and a second life, on the same memory
    world.arm(&world.all())?;
    expect(world.install(range(0, 512), 2)?, 512, 0)?;
    world.holds(range(0, 512), 2)
}

/// Pages that somebody else has put there, of which the pager does not know: they count as
/// duplicates, keep what they hold where nobody else sees it, and are missing no more.
fn pages_of_another_handler_are_duplicates(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.arm(&world.all())?;
    let step = world.pager.block_pages();
    let theirs = vec![7u8; step as usize * PAGE_SIZE];
    let put = |first: u64| -> Outcome {
        let (region, offset) = world.ram.layout().locate(first).ok_or("no such page")?;
        let address = world.ram.host_address(region).as_ptr() as u64 + offset;
        // `struct uffdio_copy`, and UFFDIO_COPY
        let mut copy = [address, theirs.as_ptr() as u64, theirs.len() as u64, 0, 0];
        // SAFETY: the kernel reads `theirs`, and writes missing guest memory and `copy`.
        let failed = unsafe { libc::ioctl(world.fault.as_fd().as_raw_fd(), 0xc028_aa03, copy.as_mut_ptr()) };
        ensure(failed == 0, || format!("UFFDIO_COPY: {}", io::Error::last_os_error()))
    };
    let is_missing = |page, expected| {
        ensure(world.pager.is_missing(page) == expected, || format!("{page} is missing: {}", !expected))
    };
    // alone, in the middle of others, and at their head
    for (at, run) in [(0, range(0, step)), (520, range(512, 512)), (1024, range(1024, 512))] {
        let (at, salt) = (at / step * step, at);
        put(at)?;
        is_missing(at, true)?;
        let before = world.pager.missing();
        expect(world.install(run, salt)?, run.count - step, step)?;
        ensure(world.pager.missing() == before - run.count, || "they are missing still".into())?;
        is_missing(at, false)?;
        let same = world.read(at)? == theirs[..PAGE_SIZE];
        ensure(same || backing.is_shared(), || format!("page {at} was overwritten"))?;
        let rest = run.pages().filter(|page| !range(at, step).pages().contains(page));
        rest.into_iter().try_for_each(|page| world.holds(range(page, 1), salt))?;
    }
    // several at once, beside one that the pager has installed
    let first = 1536;
    put(first)?;
    if step == 1 {
        world.pager.install_zeros(range(first + 1, 1))?;
        put(first + 3)?;
        expect(world.install(range(first, 8), 9)?, 5, 3)?;
        put(first + 9)?;
        put(first + 11)?;
        expect(world.pager.install_zeros(range(first + 8, 8))?, 6, 2)
    } else {
        expect(world.pager.install_zeros(range(first, step))?, 0, step)
    }
}

/// Who gives up has no missing pages any more, and nobody waits for one.
fn giving_up_ends_the_watch(backing: Backing) -> Outcome {
    let world = World::new(backing)?;
    world.arm(&world.all())?;
    let first = world.block(0);
    world.install(first, 1)?;
    world.pager.give_up();
    ensure(world.pager.missing() == 0, || format!("{} are missing", world.pager.missing()))?;
    world.holds(first, 1)?;
    world.zeros(range(1024, 1))?;
    // and it can be done anew, not only once
    world.pager.give_up();
    world.arm(&world.all())?;
    ensure(world.pager.missing() == world.pages(), || format!("{} are missing", world.pager.missing()))?;
    world.pager.give_up();
    Ok(())
}

/// Blocks that arrived in pieces become huge pages in the end, if all of them was missing.
fn settling_makes_huge_pages(backing: Backing) -> Outcome {
    let control = World::new(backing)?;
    (0..512).try_for_each(|page| control.write(page, b"x"))?;
    let possible = control.ram.assemble_huge_pages(range(0, 512)).is_ok();
    if !possible {
        eprintln!("the host assembles no huge pages: settling_makes_huge_pages checks contents only");
    }
    let world = World::new(backing)?;
    let mut missing = world.all();
    missing.remove(700);
    world.arm(&missing)?;
    // blocks 0 and 3 whole, block 1 but for a page that is nobody's, nothing of block 2
    for page in (0..1024).chain(1536..2048).filter(|&page| page != 700) {
        expect(world.install(range(page, 1), 1)?, 1, 0)?;
    }
    world.pager.collapse_huge_pages();
    for index in 0..2 {
        let huge = huge_kilobytes(world.ram.host_address(index).as_ptr() as u64, "AnonHugePages:")?;
        ensure(huge == 2048 || !possible, || format!("region {index}: {huge} kB of huge pages"))?;
    }
    world.holds(range(0, 700), 1)?;
    world.holds(range(1536, 512), 1)?;
    world.pager.install_zeros(range(1024, 512))?;
    Ok(world.pager.disarm()?)
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
    let everywhere: [(&str, Check); 15] = [
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
        ("pages_of_another_handler_are_duplicates", pages_of_another_handler_are_duplicates),
        ("giving_up_ends_the_watch", giving_up_ends_the_watch),
        ("lacking_features", lacking_features),
        ("stress", stress),
        ("ram_of_the_vmms_own", ram_of_the_vmms_own),
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
    add("settling_makes_huge_pages", Backing::TransparentHuge, 0, settling_makes_huge_pages);
    let shared = features::MISSING_SHMEM | features::MINOR_SHMEM;
    add("shared_huge_pages", Backing::Memfd, shared, shared_huge_pages);
    for backing in Backing::ALL {
        trials.push(Trial::test(format!("{backing}/cost"), move || cost(backing)).with_ignored_flag(true));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(huge);
    conclusion.exit_code()
}
