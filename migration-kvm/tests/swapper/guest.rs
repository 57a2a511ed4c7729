//! A vCPU whose pages are evicted while it runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use libtest_mimic::Failed;
use migration_core::{GuestRam, PAGE_SIZE};
use migration_kvm::{ram::Backing, tracker::GuestSlots};

use crate::world::{Outcome, World, ensure, options};

const CODE: u64 = 0x1000;
const TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
const DOORBELL: u64 = 0x1000_0000;
/// Passes that the guest makes over its data at least.
const PASSES: u64 = 20;

/// `rcx` times: add `[rdi]` to `rax`, add 1 to `[rdi]`, advance `rdi` by `rsi`. Then store `rax` at
/// `[rbx]`, where no memory is.
const PROGRAM: [u8; 19] = [
    0x48, 0x03, 0x07, // add rax, [rdi]
    0x48, 0xff, 0x07, // inc qword [rdi]
    0x48, 0x01, 0xf7, // add rdi, rsi
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf2, // jnz to the begin
    0x48, 0x89, 0x03, // mov [rbx], rax
    0xeb, 0xfe, // jmp to itself
];

/// The guest adds up a word of each page, and adds 1 to each word, again and again. Each sum tells
/// whether it has read what it wrote in the pass before.
pub fn a_guest_runs_while_its_pages_come_and_go(backing: Backing) -> Outcome {
    let world = World::new(backing, options())?;
    let layout = world.ram.layout().clone();
    let data = layout.region_pages(1).ok_or("no second region")?;
    world.ram.write(CODE, &PROGRAM)?;
    // present, writable, user, accessed, dirty
    let entry = |to: u64| (to | 0x67).to_le_bytes();
    world.ram.write(TABLES[0], &entry(TABLES[1]))?;
    world.ram.write(TABLES[1], &entry(TABLES[2]))?;
    for i in 0..512 {
        world.ram.write(TABLES[2] + i * 8, &entry(i << 21 | 0x80))?;
    }
    for page in data.pages() {
        world.ram.write(layout.gpa_of(page).ok_or("no page")?, &page.pow(3).to_le_bytes())?;
    }
    let vm = Arc::new(Kvm::new()?.create_vm()?);
    // SAFETY: the VM is new and goes before the RAM does; nothing else keeps it alive.
    let slots = unsafe { GuestSlots::of_regions(world.ram.clone(), 0)? };
    slots.install(&vm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    prepare(&vcpu)?;
    let begin = layout.gpa_of(data.first).ok_or("no page")?;
    let done = AtomicBool::new(false);
    let passes = thread::scope(|scope| -> Result<u64, Failed> {
        let steps = scope.spawn(|| -> Result<(), String> {
            while !done.load(Ordering::SeqCst) {
                world.step().map_err(|e| format!("{e:?}"))?;
            }
            Ok(())
        });
        let first: u64 = data.pages().map(|page| page.pow(3)).sum();
        let mut pass = 0;
        let run = loop {
            let sum = match run(&mut vcpu, begin, data.count) {
                Ok(sum) => sum,
                Err(error) => break Err(error),
            };
            let want = first + pass * data.count;
            if sum != want {
                break Err(format!("the guest read a sum of {sum} in pass {pass}, not {want}").into());
            }
            pass += 1;
            let status = world.swapper.status();
            if pass >= PASSES && status.fetched_pages > 2 * data.count || pass == 100_000 {
                break Ok(pass);
            }
        };
        done.store(true, Ordering::SeqCst);
        steps.join().map_err(|_| "the steps panicked")??;
        run
    })?;
    let status = world.swapper.status();
    ensure(status.fetched_pages > 2 * data.count, || format!("{status:?}"))?;
    data.pages().try_for_each(|page| {
        let want = (page.pow(3) + passes).to_le_bytes();
        ensure(world.read(page)?[..8] == want, || format!("page {page} after {passes} passes"))
    })
}

fn prepare(vcpu: &VcpuFd) -> Outcome {
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
    Ok(vcpu.set_sregs(&sregs)?)
}

/// Lets the guest make one pass over `count` pages. Returns its sum.
fn run(vcpu: &mut VcpuFd, begin: u64, count: u64) -> Result<u64, Failed> {
    let (rip, rflags, rbx, rcx, rdi, rsi) = (CODE, 2, DOORBELL, count, begin, PAGE_SIZE as u64);
    vcpu.set_regs(&kvm_regs { rip, rflags, rbx, rcx, rdi, rsi, ..kvm_regs::default() })?;
    match vcpu.run()? {
        VcpuExit::MmioWrite(DOORBELL, bytes) => Ok(u64::from_le_bytes(bytes.try_into()?)),
        other => Err(format!("unexpected exit {other:?}").into()),
    }
}
