//! Trials that use all of it at once: a guest, many threads, and what it costs.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit};
use libtest_mimic::Failed;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, RamSlice,
    page_map::PageCopy,
    pager::{Fault, Installed, Pager},
};
use migration_kvm::{
    ram::{Backing, MappedRam},
    tracker::GuestSlots,
};

use crate::world::{LONG, Outcome, Stop, World, contents, ensure, range};

/// Four threads touch pages at random while two read faults and two install, on demand and in
/// order.
pub fn stress(backing: Backing) -> Outcome {
    const ZERO_EVERY: u64 = 7;
    let world = World::new(backing)?;
    world.pages_of(|page| world.write(page, b"stale"))?;
    world.arm(&world.all())?;
    let (block_pages, installed) = (world.pager.block_pages(), AtomicU64::new(0));
    let is_zero = |page: u64| (page / block_pages).is_multiple_of(ZERO_EVERY);
    let count = |result: io::Result<Installed>| -> Result<(), String> {
        installed.fetch_add(result.map_err(|e| e.to_string())?.pages, Ordering::Relaxed);
        Ok(())
    };
    let demand = |page: u64| {
        let block = world.block(page);
        count(if is_zero(page) { world.pager.install_zeros(block) } else { world.install(block, 1) })
    };
    let push = |run: PageRange| {
        count(world.pager.install(run, PageCopy::Source, &mut |slices| {
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
        let step = block_pages.max(16);
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
pub fn a_guest_runs_on_missing_pages(backing: Backing) -> Outcome {
    const CODE: u64 = 0x1000;
    const TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
    const DOORBELL: u64 = 0x1000_0000;
    /// `rcx` times: add `[rdi]` to `rax`, advance `rdi` by `rsi`. Then store `rax` at `[rbx]`,
    /// where no memory is.
    const PROGRAM: [u8; 16] =
        [0x48, 0x03, 0x07, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0x48, 0x89, 0x03, 0xeb, 0xfe];

    let world = World::new(backing)?;
    let layout = world.ram.layout().clone();
    let data = layout.region_pages(1).ok_or("no second region")?;
    let image = MappedRam::new(layout.clone(), Backing::Anonymous)?;
    let source = &image;
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
    world.arm(&world.all())?;
    let answer = |fault: Fault| {
        let block = world.block(fault.page);
        let copy = &mut |slices: &[RamSlice<'_>]| {
            let mut bytes = vec![0; block.bytes() as usize];
            let from = source.slice(block).map_err(io::Error::other)?;
            from.copy_to(&mut bytes);
            slices.iter().for_each(|slice| slice.copy_from(&bytes));
            Ok(())
        };
        world.pager.install(block, PageCopy::Source, copy).map(|_| ())
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
    ensure(still > 0 || world.pager.block_pages() > 1, || "who touched the rest?".into())
}

/// Prints what a page costs, by the pages of a call. No assertion.
pub fn cost(backing: Backing) -> Outcome {
    const PAGES: u64 = 16 << 8;
    for step in [1, 16, 512] {
        for turn in ["cold", "warm"] {
            let world = World::with_regions(backing, [PAGES << 12, 0x20_0000])?;
            if step < world.pager.block_pages() {
                continue;
            }
            let data = vec![0x5a; PAGE_SIZE * step as usize];
            world.arm(&world.all())?;
            let start = Instant::now();
            for first in (0..PAGES).step_by(step as usize) {
                world.pager.install(range(first, step), PageCopy::Source, &mut |slices| {
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
