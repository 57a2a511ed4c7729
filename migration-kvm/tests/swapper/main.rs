//! The swapper on every backing, over real userfaultfd.
//!
//! Without userfaultfd or /dev/kvm a trial that needs it is ignored and says why; with
//! MIGRATION_REQUIRE_KVM=1 it fails instead.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kvm_ioctls::Kvm;
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{
    PageRange, PageSet,
    page_map::Location,
    paged_memory::FetchError,
    store::{MemoryPageStore, Namespace, Owner, PageStore},
    working_set::ResidentLimit,
};
use migration_kvm::{
    pager::EvictionError,
    ram::{BackedRam, Backing},
    swapper::{ReferenceKind, Stepped, Swapper, SwapperError, SwapperOptions, SwapperParts},
    tracker::{UserFault, features},
};

mod guest;
mod moves;
mod world;

use guest::a_guest_runs_while_its_pages_come_and_go;
use moves::{
    a_guest_writes_while_its_cold_pages_move, agile_leaves_cold_pages_in_their_store,
    other_strategies_send_cold_pages_without_bringing_them_back,
};
use world::{LONG, Outcome, Pin, VM, World, contents, ensure, expected, is_hole, is_zero, options};

type Check = fn(Backing) -> Outcome;

/// What was evicted takes no memory, and comes back as it was.
fn pages_go_and_come_back(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    let all = world.pages();
    let taken = world.step()?;
    ensure(taken.taken > 2000 && taken.evicted == 0, || format!("{taken:?}: the first step only takes"))?;
    world.evict_all()?;
    let status = world.swapper.status();
    ensure(status.evicted_pages == all - 40 && status.zero_pages >= 30, || format!("{status:?}"))?;
    ensure(status.cold_bytes == (all - 40) << 12 && status.resident_bytes < 64 << 12, || format!("{status:?}"))?;
    let populated = world.populated()?;
    ensure(populated < 64, || format!("{populated} pages take memory"))?;
    world.all_unchanged()?;
    world.nobody_waits();
    let status = world.swapper.status();
    ensure(status.cold_bytes == 0 && status.lost_pages == 0, || format!("{status:?}"))?;
    ensure(status.fetched_pages == all - 40, || format!("{status:?}"))?;
    // with neighbours: sixteen pages come for one fault
    ensure(status.faults < all / 8 && status.fetch_latency.count() >= all / 16 - 4, || format!("{status:?}"))?;
    // and again, after they were written
    (0..all).try_for_each(|page| world.write(page, &contents(page, 2)))?;
    world.evict_all()?;
    ensure(world.populated()? < 64, || "pages stay".into())?;
    (0..all).rev().try_for_each(|page| ensure(world.read(page)? == contents(page, 2), || format!("page {page}")))?;
    world.nobody_waits();
    world.swapper.disarm()?;
    (0..all).try_for_each(|page| ensure(world.read(page)? == contents(page, 2), || format!("page {page}")))
}

/// Threads write and verify pages of their own while pages come and go.
fn nothing_is_lost_while_pages_come_and_go(backing: Backing) -> Outcome {
    const THREADS: u64 = 3;
    let world = World::new(backing, options())?;
    let all = world.pages();
    let (stop, errors) = (AtomicBool::new(false), AtomicU64::new(0));
    let work = |number: u64| -> Outcome {
        let mut versions = vec![0u64; all as usize];
        let mut random = 0x1234_5678_9abc_def1u64 * (number + 1);
        while !stop.load(Ordering::SeqCst) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // most accesses go to a few pages, some to all
            let page = if random.is_multiple_of(8) { random >> 8 } else { (random >> 8) % 300 } % (all / THREADS)
                * THREADS
                + number;
            let version = &mut versions[page as usize];
            ensure(world.read(page)? == expected(page, *version), || format!("page {page} in version {version}"))?;
            *version += 1;
            world.write(page, &contents(page, *version))?;
        }
        (number..all - THREADS).step_by(THREADS as usize).try_for_each(|page| {
            let version = versions[page as usize];
            ensure(world.read(page)? == expected(page, version), || format!("page {page} in version {version}"))
        })
    };
    thread::scope(|scope| -> Outcome {
        let run = |number| {
            let outcome = work(number);
            errors.fetch_add(u64::from(outcome.is_err()), Ordering::SeqCst);
            outcome.map_err(|e| format!("{e:?}"))
        };
        let threads: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || run(number))).collect();
        let stepped = (|| -> Outcome {
            loop {
                world.step()?;
                let status = world.swapper.status();
                if status.evicted_pages > 3 * all && status.kept_pages > 20 && status.fetched_pages > all
                    || errors.load(Ordering::SeqCst) != 0
                {
                    return Ok(());
                }
            }
        })();
        stop.store(true, Ordering::SeqCst);
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        stepped
    })
}

/// A page that is touched while it is on probation, or while it is put, stays with what was written.
fn a_touch_cancels_the_eviction(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    let taken = world.step()?.taken;
    world.write(7, &contents(7, 1))?;
    world.unchanged(8)?;
    // a store that is slow does not delay whoever touches a page that is being put
    world.store.puts.close();
    thread::scope(|scope| -> Outcome {
        let stepping = scope.spawn(|| world.step().map_err(|e| format!("{e:?}")));
        world.store.puts.await_waiter();
        let read = world.read(20)? == contents(20, 0);
        let written = world.write(21, &contents(21, 1));
        // nobody answers a fault meanwhile
        let out = world.swapper.pager().out_of_reach().map(|moves| moves.pages());
        world.store.puts.open();
        let out = out.ok_or("RAM is not watched")?;
        ensure(read, || "page 20 does not hold what it did".into())?;
        written?;
        // but for zeros, which are dropped when they are read
        ensure(out.len() > taken - 20, || format!("{} pages are out of reach of {taken}", out.len()))?;
        ensure(![7, 8, 20, 21].into_iter().any(|page| out.contains(page)), || format!("{out:?}"))?;
        let stepped = stepping.join().map_err(|_| "the step panicked")??;
        ensure(stepped.evicted + stepped.zeros == taken - 4 && stepped.failed == 0, || format!("{stepped:?}"))
    })?;
    for page in [7, 8, 20, 21] {
        let location = world.swapper.map().read(|map| map.location(page));
        ensure(location == Location::Here, || format!("page {page} is {location:?}"))?;
    }
    ensure(world.swapper.status().kept_pages >= 2, || format!("{:?}", world.swapper.status()))?;
    let version = |page| u64::from(page == 7 || page == 21);
    (0..world.pages()).try_for_each(|page| {
        ensure(world.read(page)? == expected(page, version(page)), || format!("page {page} is wrong"))
    })
}

/// A put that fails gives all pages back, and is repeated later under another generation.
fn a_store_that_fails_costs_no_page(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    world.store.fail_puts.store(true, Ordering::SeqCst);
    world.step()?;
    let failed = world.step()?;
    ensure(failed.failed > 0 && failed.evicted == 0, || format!("{failed:?}"))?;
    let (cold, out) = world.swapper.map().read(|map| (map.in_store().len(), map.being_evicted().len()));
    ensure((cold, out) == (0, 0), || format!("{cold} pages are cold, {out} out of reach"))?;
    // the store is left alone for a while, and longer each time
    for wait in [Duration::from_millis(900), Duration::from_millis(50)] {
        let stepped = world.step_after(wait)?;
        ensure(stepped == Stepped::default(), || format!("{stepped:?}"))?;
    }
    let status = world.swapper.status();
    ensure(status.failed_puts == 1 && status.problem.is_some_and(|why| why.contains("rack-7")), || "no word".into())?;
    (0..40).try_for_each(|page| world.write(page, &contents(page, 1)))?;
    world.store.fail_puts.store(false, Ordering::SeqCst);
    world.evict_all()?;
    let version = |page| u64::from(page < 40);
    (0..world.pages()).try_for_each(|page| {
        ensure(world.read(page)? == expected(page, version(page)), || format!("page {page} is wrong"))
    })
}

/// Whoever touches a page waits for as long as the store does not answer, and never reads zeros.
fn a_guest_waits_for_a_silent_store(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    world.evict_all()?;
    world.store.fail_gets.store(true, Ordering::SeqCst);
    let (done, gets) = (AtomicBool::new(false), world.store.gets.load(Ordering::SeqCst));
    thread::scope(|scope| -> Outcome {
        let toucher = scope.spawn(|| {
            let same = world.unchanged(1000).map_err(|e| format!("{e:?}"));
            done.store(true, Ordering::SeqCst);
            same
        });
        // it is asked again and again
        while world.store.gets.load(Ordering::SeqCst) < gets + 3 {
            thread::yield_now();
        }
        let early = done.load(Ordering::SeqCst);
        let status = world.swapper.status();
        world.store.fail_gets.store(false, Ordering::SeqCst);
        toucher.join().map_err(|_| "the toucher panicked")??;
        ensure(!early && status.waiting_pages == 1 && status.failed_fetches >= 2, || format!("{early}, {status:?}"))
    })?;
    world.nobody_waits();
    world.all_unchanged()
}

/// Rule 11: a store that has lost pages is found out, and gets no page of that namespace any more.
fn a_store_that_loses_pages_is_found_out(backing: Backing) -> Outcome {
    let world = World::new(backing, SwapperOptions { most: 1 << 20, ..options() })?;
    world.step()?;
    let evicted = world.step()?.evicted;
    world.store.lose_everything();
    let failed = world.step()?;
    ensure(failed.failed > 0 && failed.evicted == 0, || format!("{failed:?}"))?;
    let status = world.swapper.status();
    ensure(evicted > 0 && status.lost_pages == evicted, || format!("{evicted} evicted: {status:?}"))?;
    // the others go into a new namespace
    world.evict_all()?;
    let (old, new) = world.swapper.map().read(|map| {
        let entries = map.entries();
        (entries.clone(), map.in_store().len())
    });
    ensure(old == [0, 1] && new > evicted, || format!("entries {old:?}, {new} pages"))?;
    let lost = world.swapper.map().read(|map| {
        let lost = |page: &u64| matches!(map.location(*page), Location::Store(copy) if copy.entry == 0);
        (0..world.pages()).filter(lost).collect::<Vec<_>>()
    });
    ensure(lost.len() as u64 == evicted, || format!("{} pages are lost", lost.len()))?;
    // whoever asks for one is told so, and gets no zeros
    let fetched = world.swapper.bring_back(Instant::now() + LONG);
    ensure(matches!(fetched, Err(FetchError::Lost { entry: 0, .. })), || format!("{fetched:?}"))?;
    let others = (0..world.pages()).filter(|page| !lost.contains(page) && !lost.contains(&(page / 16 * 16)));
    others.into_iter().try_for_each(|page| world.unchanged(page))
}

/// Rule 22: as long as somebody holds evictions, all that is in RAM stays there, within reach.
fn nothing_is_evicted_while_it_is_held(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    world.step()?;
    world.store.puts.close();
    thread::scope(|scope| -> Outcome {
        let stepping = scope.spawn(|| world.step().map_err(|e| format!("{e:?}")));
        world.store.puts.await_waiter();
        // does not wait for the store
        let held = world.swapper.hold()?;
        let out = world.swapper.map().read(|map| map.being_evicted().len());
        world.store.puts.open();
        let stepped = stepping.join().map_err(|_| "the step panicked")??;
        ensure(out == 0 && stepped.evicted == 0, || format!("{out} pages out of reach, {stepped:?}"))?;
        for _ in 0..2 {
            let stepped = world.step()?;
            ensure(stepped == Stepped::default(), || format!("{stepped:?}"))?;
        }
        let (cold, out) = world.swapper.map().read(|map| (map.in_store().len(), map.being_evicted().len()));
        ensure((cold, out) == (0, 0), || format!("{cold} pages are cold, {out} out of reach"))?;
        let again = world.swapper.hold()?;
        drop(held);
        ensure(world.step()? == Stepped::default(), || "one of two was dropped".into())?;
        drop(again);
        ensure(world.step()?.taken > 0, || "nothing is taken any more".into())
    })?;
    world.evict_all()?;
    world.all_unchanged()
}

/// In the pause of a migration no page comes back, and nobody waits for a store to see to that.
fn no_page_comes_back_in_a_pause(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    world.evict_all()?;
    let held = world.swapper.hold()?;
    held.no_page_comes_back();
    let cold = || world.swapper.map().read(|map| map.in_store().len());
    let before = cold();
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Outcome {
        let toucher = scope.spawn(|| {
            let same = world.unchanged(1000).map_err(|e| format!("{e:?}"));
            done.store(true, Ordering::SeqCst);
            same
        });
        while world.swapper.status().waiting_pages == 0 {
            thread::yield_now();
        }
        let fetched = world.swapper.bring_back(Instant::now() + LONG);
        let early = done.load(Ordering::SeqCst);
        let still = cold();
        held.pages_come_back();
        toucher.join().map_err(|_| "the toucher panicked")??;
        ensure(matches!(fetched, Err(FetchError::Install { .. })), || format!("{fetched:?}"))?;
        ensure(!early && still == before, || format!("{still} pages are cold of {before}"))
    })?;
    drop(held);
    world.nobody_waits();
    ensure(world.swapper.status().failed_fetches == 0, || format!("{:?}", world.swapper.status()))?;
    world.all_unchanged()
}

/// Rule 20: pages that are named, and pages that a device has pinned, stay.
fn pinned_pages_stay(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    let mut pinned = PageSet::empty(world.pages());
    pinned.insert_range(PageRange::new(500, 50));
    world.swapper.set_pinned(pinned);
    // the kernel says which private pages a device has in use
    let device = if backing.is_shared() { None } else { Some(1300) };
    let pin = device.map(|page| Pin::new(&world.ram, page)).transpose();
    let pin = match pin {
        Ok(pin) => pin,
        Err(why) => {
            eprintln!("{backing}: no page is pinned by a device: {why}");
            None
        }
    };
    for _ in 0..6 {
        world.step()?;
    }
    let here = world.swapper.map().read(|map| {
        let mut here = map.here().clone();
        here.subtract(map.being_evicted());
        here
    });
    let mut stay: Vec<u64> = (500..550).collect();
    stay.extend(pin.as_ref().and(device));
    let found: Vec<u64> = here.iter().filter(|&page| !is_hole(page)).collect();
    // a huge page that cannot be split stays whole
    let more = found.len() > stay.len() && backing == Backing::TransparentHuge && pin.is_some();
    ensure(found == stay || more, || format!("{found:?} stay instead of {stay:?}"))?;
    world.all_unchanged()
}

/// A limit by hand is kept: neither more nor much less is resident.
fn a_limit_is_kept(backing: Backing) -> Outcome {
    const LIMIT: u64 = 4 << 20;
    let world = World::new(backing, SwapperOptions { limit: ResidentLimit::Off, most: 1 << 20, ..options() })?;
    ensure(world.step()? == Stepped::default(), || "there is no limit".into())?;
    world.swapper.set_limit(ResidentLimit::Bytes(LIMIT));
    for _ in 0..20 {
        world.step()?;
    }
    let status = world.swapper.status();
    let resident = status.resident_bytes;
    ensure((LIMIT - LIMIT / 8..=LIMIT).contains(&resident), || format!("{status:?}"))?;
    ensure(status.limit_bytes == Some(LIMIT) && status.working_set_bytes.is_none(), || format!("{status:?}"))?;
    // what comes back goes again
    world.all_unchanged()?;
    for _ in 0..20 {
        world.step()?;
    }
    let resident = world.swapper.status().resident_bytes;
    ensure(resident <= LIMIT, || format!("{resident} bytes are resident"))?;
    world.swapper.set_limit(ResidentLimit::Off);
    ensure(world.step()? == Stepped::default(), || "there is no limit any more".into())?;
    let out = world.swapper.map().read(|map| map.being_evicted().len());
    ensure(out == 0, || format!("{out} pages are out of reach"))
}

/// An automatic limit follows the estimate: it falls while the guest is idle, and rises when it works.
fn an_automatic_limit_follows_the_guest(backing: Backing) -> Outcome {
    let world = World::new(backing, SwapperOptions { limit: ResidentLimit::Auto, ..options() })?;
    let interval = Duration::from_secs(2);
    let working_set = || world.swapper.status().working_set_bytes.ok_or_else(|| Failed::from("no estimate"));
    for _ in 0..30 {
        world.step_after(interval)?;
    }
    let idle = working_set()?;
    let resident = world.swapper.status().resident_bytes;
    ensure(idle < 3 << 20 && resident <= idle + (idle >> 4), || format!("{idle} estimated, {resident} resident"))?;
    for turn in 0..10 {
        // other pages each time, so that some of them are cold
        let pages = (0..world.pages()).filter(|page| page % 16 == turn);
        pages.into_iter().try_for_each(|page| world.unchanged(page))?;
        world.step_after(interval)?;
    }
    let busy = working_set()?;
    ensure(busy > idle, || format!("{busy} bytes after {idle}"))?;
    world.all_unchanged()
}

/// All pages can be brought back, and then nothing is left: neither in the store nor of the watch.
fn everything_can_be_brought_back(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    world.evict_all()?;
    ensure(world.swapper.disarm().is_err(), || "pages are missing".into())?;
    let names = world.store.names.lock().map_err(|_| "poisoned")?.clone();
    ensure(names.len() == 1 && world.store.record(names[0])?.is_some(), || format!("{names:?}"))?;
    let cold = world.swapper.status().cold_bytes >> 12;
    let back = world.swapper.bring_back(Instant::now() + LONG)?;
    ensure(back == cold, || format!("{back} pages came back of {cold}"))?;
    let step = world.step()?;
    ensure(step.taken > 0, || "evictions go on until the watch ends".into())?;
    let held = world.swapper.hold()?;
    world.swapper.disarm()?;
    let failed = world.swapper.forget_all();
    ensure(failed.is_empty(), || format!("{failed:?}"))?;
    ensure(world.store.record(names[0])?.is_none(), || "the namespace is still there".into())?;
    drop(held);
    // without a watch no page is taken out of reach
    let step = world.step()?;
    ensure(step.taken == 0, || format!("{step:?}"))?;
    world.all_unchanged()
}

/// Pages that are written in each interval are not taken, as long as there are others.
fn written_pages_are_not_taken(backing: Backing) -> Outcome {
    let half = ResidentLimit::Bytes(4 << 20);
    let options = SwapperOptions { limit: ResidentLimit::Off, ..options() };
    let world = World::with_source(backing, options, ReferenceKind::Writes)?;
    let hot = || (0..300u64).filter(|&page| !is_hole(page) && !is_zero(page));
    let work = || hot().try_for_each(|page| world.write(page, &expected(page, 0)));
    // the first step begins the first interval
    world.step()?;
    work()?;
    world.step()?;
    world.swapper.set_limit(half);
    for _ in 0..2 {
        work()?;
        world.step()?;
    }
    let status = world.swapper.status();
    ensure(status.references == "writes" && status.resident_bytes <= 9 << 20, || format!("{status:?}"))?;
    ensure(status.evicted_pages > 900 && status.kept_pages == 0, || format!("{status:?}"))?;
    let gone = world.swapper.map().read(|map| hot().filter(|&page| map.missing().contains(page)).count());
    ensure(gone == 0, || format!("{gone} pages are gone that were written: {status:?}"))?;
    world.all_unchanged()
}

/// What cannot be evicted is refused with the reason, and leaves nothing.
fn refusals(backing: Backing) -> Outcome {
    let ram = World::new(backing, options())?.ram.clone();
    let store = Arc::new(MemoryPageStore::new("rack-7", 64 << 20));
    let make = |fault: UserFault, stores: Vec<Arc<dyn PageStore>>| -> Result<Option<SwapperError>, Failed> {
        let fault = Arc::new(fault);
        let parts = SwapperParts {
            vm: VM,
            ram: BackedRam::of(ram.clone())?,
            references: ReferenceKind::Faults.open(ram.clone(), fault.clone())?,
            fault,
            stores,
            new_namespace: Arc::new(|| Namespace::new([9; 16])),
            owner: Owner::new("a trial")?,
        };
        Ok(Swapper::new(parts, options()).err())
    };
    let error = make(UserFault::new()?, Vec::new())?;
    ensure(matches!(error, Some(SwapperError::NoStore)), || format!("{error:?}"))?;
    let without_move = UserFault::with_features(features::USEFUL & !features::MOVE)?;
    let error = make(without_move, vec![store.clone()])?;
    let refused = matches!(&error, Some(SwapperError::Eviction(EvictionError::NoMove(of))) if *of == backing);
    ensure(refused != backing.is_shared(), || format!("{error:?}"))?;
    // the store has forgotten this id
    store.forget(Namespace::new([9; 16]).of(VM))?;
    let error = make(UserFault::new()?, vec![store])?;
    ensure(matches!(error, Some(SwapperError::Store(_))), || format!("{error:?}"))
}

/// Pages of hugetlb memory are refused.
fn hugetlb_is_refused(_: Backing) -> Outcome {
    match World::new(Backing::Hugetlb, options()) {
        Ok(_) => Err("hugetlb is evicted".into()),
        // it may be RAM itself that cannot be had
        Err(why) => ensure(format!("{why:?}").contains("huge"), || format!("{why:?}")),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|v| v == "1");
    let user_fault = UserFault::new().map(|fault| fault.features()).map_err(|e| e.to_string());
    let no_kvm = Kvm::new().err().map(|e| format!("/dev/kvm: {e}"));
    let mut trials = Vec::new();
    let mut add = |name: &str, backing: Backing, needs: u64, run: Check| {
        let name = format!("{backing}/{name}");
        let missing = match &user_fault {
            Err(why) => Some(why.clone()),
            Ok(has) if needs & !has != 0 => Some(format!("userfaultfd lacks features {:#x}", needs & !has)),
            Ok(_) if name.contains("guest_runs") => no_kvm.clone(),
            Ok(_) => None,
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
    let everywhere: [(&str, Check); 17] = [
        ("pages_go_and_come_back", pages_go_and_come_back),
        ("nothing_is_lost_while_pages_come_and_go", nothing_is_lost_while_pages_come_and_go),
        ("a_touch_cancels_the_eviction", a_touch_cancels_the_eviction),
        ("a_store_that_fails_costs_no_page", a_store_that_fails_costs_no_page),
        ("a_guest_waits_for_a_silent_store", a_guest_waits_for_a_silent_store),
        ("a_store_that_loses_pages_is_found_out", a_store_that_loses_pages_is_found_out),
        ("nothing_is_evicted_while_it_is_held", nothing_is_evicted_while_it_is_held),
        ("no_page_comes_back_in_a_pause", no_page_comes_back_in_a_pause),
        ("pinned_pages_stay", pinned_pages_stay),
        ("a_limit_is_kept", a_limit_is_kept),
        ("an_automatic_limit_follows_the_guest", an_automatic_limit_follows_the_guest),
        ("everything_can_be_brought_back", everything_can_be_brought_back),
        ("refusals", refusals),
        ("a_guest_runs_while_its_pages_come_and_go", a_guest_runs_while_its_pages_come_and_go),
        ("a_guest_writes_while_its_cold_pages_move", a_guest_writes_while_its_cold_pages_move),
        ("agile_leaves_cold_pages_in_their_store", agile_leaves_cold_pages_in_their_store),
        (
            "other_strategies_send_cold_pages_without_bringing_them_back",
            other_strategies_send_cold_pages_without_bringing_them_back,
        ),
    ];
    for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd] {
        let needs = match backing {
            Backing::Memfd => features::MISSING_SHMEM | features::MINOR_SHMEM,
            _ => features::MOVE,
        };
        for (name, run) in everywhere {
            add(name, backing, needs, run);
        }
        let needs = needs | features::WRITE_TRACKING;
        add("written_pages_are_not_taken", backing, needs, written_pages_are_not_taken);
    }
    add("hugetlb_is_refused", Backing::Hugetlb, 0, hugetlb_is_refused);
    libtest_mimic::run(&arguments, trials).exit_code()
}
