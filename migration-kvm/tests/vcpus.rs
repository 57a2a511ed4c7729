//! Tests of vCPU threads on a real KVM: they run, stop, rest, end, and do work for other threads.
//!
//! Without /dev/kvm a trial is ignored with the reason. With MIGRATION_REQUIRE_KVM=1 it fails
//! instead.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{GuestRam, RamLayout, RamRegion, report::NoObserver, spawner::StdSpawner};
use migration_kvm::{
    ram::{Backing, MappedRam},
    tracker::GuestSlots,
    vcpu::{IoHandler, KickSignal, VcpuError, VcpuHost, Vcpus},
};

type Test = Result<(), Failed>;

/// `l: out 0x10, al; jmp l`
const WRITES: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// `l: jmp l`: never causes an exit
const SPINS: &[u8] = &[0xeb, 0xfe];
/// `in al, 0x10; out 0x10, al; hlt`
const READS: &[u8] = &[0xe4, 0x10, 0xe6, 0x10, 0xf4];
/// `mov ds:[0x8000], al; hlt`: an address beyond RAM
const STORES: &[u8] = &[0xa2, 0x00, 0x80, 0xf4];
/// The address of the code.
const CODE: u64 = 0x1000;
/// Much longer than any step takes.
const LONG: Duration = Duration::from_secs(60);

/// Counts the guest's writes.
#[derive(Default)]
struct Ports {
    writes: AtomicU64,
    last: Mutex<BTreeMap<u64, Vec<u8>>>,
    changed: Condvar,
}

impl Ports {
    fn note(&self, at: u64, data: &[u8]) {
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.last.lock().unwrap().insert(at, data.to_vec());
        self.changed.notify_all();
    }

    /// Waits until the guest has written more than `count` times.
    fn wait_above(&self, count: u64) -> Result<u64, Failed> {
        let last = self.last.lock().unwrap();
        let few = |_: &mut BTreeMap<_, _>| self.writes.load(Ordering::SeqCst) <= count;
        let (guard, waited) = self.changed.wait_timeout_while(last, LONG, few).unwrap();
        drop(guard);
        if waited.timed_out() { Err("the guest does not write".into()) } else { Ok(self.writes.load(Ordering::SeqCst)) }
    }
}

impl IoHandler for Ports {
    fn port_write(&self, port: u16, data: &[u8]) {
        self.note(port.into(), data);
    }

    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(gpa, data);
    }
}

struct World {
    vcpus: Arc<Vcpus>,
    ports: Arc<Ports>,
    // dropped last
    _vm: VmFd,
}

/// Makes a VM whose vCPUs execute `code` in real mode.
fn world(count: u64, code: &[u8]) -> Result<World, Failed> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 0x4000 }])?;
    let ram: Arc<dyn GuestRam> = Arc::new(MappedRam::new(layout, Backing::Anonymous)?);
    ram.write(CODE, code)?;
    // SAFETY: the slots keep the memory, and the vCPUs and their VM keep the slots.
    let slots = Arc::new(unsafe { GuestSlots::of_regions(ram, 0)? });
    slots.install(&vm)?;
    let mut fds = Vec::new();
    for index in 0..count {
        let vcpu = vm.create_vcpu(index)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs)?;
        fds.push(vcpu);
    }
    let ports = Arc::<Ports>::default();
    let host = VcpuHost {
        memory: slots,
        io: ports.clone(),
        ring_full: None,
        signal: KickSignal::install(libc::SIGUSR1)?,
        spawner: Arc::new(StdSpawner),
        observer: Arc::new(NoObserver),
    };
    Ok(World { vcpus: Arc::new(Vcpus::new(fds, host)?), ports, _vm: vm })
}

fn main() {
    let arguments = Arguments::from_args();
    let kvm = Kvm::new();
    let required = std::env::var("MIGRATION_REQUIRE_KVM").is_ok_and(|v| v == "1");
    if let Err(e) = &kvm {
        println!("no /dev/kvm ({e}): tests that need it are {}", if required { "failed" } else { "ignored" });
    }
    let ignored = kvm.is_err() && !required;
    let mut trials = vec![Trial::test("real_time_signals_are_refused", real_time_signals_are_refused)];
    for (name, test) in [
        ("none_runs_before_it_is_told_to", none_runs_before_it_is_told_to as fn() -> Test),
        ("a_pause_stops_all", a_pause_stops_all),
        ("no_kick_is_lost", no_kick_is_lost),
        ("work_is_done_on_stopped_vcpus_in_order", work_is_done_on_stopped_vcpus_in_order),
        ("a_throttled_guest_goes_on", a_throttled_guest_goes_on),
        ("a_throttle_does_not_run_a_paused_guest", a_throttle_does_not_run_a_paused_guest),
        ("a_held_guest_stands_still", a_held_guest_stands_still),
        ("an_exit_that_ends_the_vm_stops_all", an_exit_that_ends_the_vm_stops_all),
        ("devices_are_read_and_written", devices_are_read_and_written),
        ("vcpus_that_are_shut_down_answer_nothing", vcpus_that_are_shut_down_answer_nothing),
    ] {
        trials.push(Trial::test(name, test).with_ignored_flag(ignored));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn ensure(holds: bool, what: &str) -> Test {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn real_time_signals_are_refused() -> Test {
    for signal in [0, -1, libc::SIGRTMIN(), libc::SIGRTMAX(), 1000] {
        ensure(KickSignal::install(signal).is_err(), "a signal that may be refused when it is sent")?;
    }
    Ok(())
}

fn none_runs_before_it_is_told_to() -> Test {
    let world = world(2, WRITES)?;
    // work is done on all of them, which would not happen on a running vCPU
    world.vcpus.on_each(|_, vcpu| vcpu.get_regs().unwrap().rip)?;
    ensure(world.ports.writes.load(Ordering::SeqCst) == 0, "a guest runs that was not started")?;
    let ids = world.vcpus.thread_ids();
    ensure(ids.len() == 2 && ids[0] != ids[1] && !ids.contains(&0), "each has a thread of its own")?;
    world.vcpus.run();
    world.ports.wait_above(1000).map(drop)
}

fn a_pause_stops_all() -> Test {
    for code in [WRITES, SPINS] {
        let world = world(4, code)?;
        for _ in 0..50 {
            world.vcpus.run();
            world.vcpus.pause()?;
            let before = world.ports.writes.load(Ordering::SeqCst);
            let places = world.vcpus.on_each(|_, vcpu| vcpu.get_regs().unwrap().rip)?;
            let again = world.vcpus.on_each(|_, vcpu| vcpu.get_regs().unwrap().rip)?;
            ensure(places == again, "a paused vCPU moves")?;
            ensure(world.ports.writes.load(Ordering::SeqCst) == before, "a paused guest writes")?;
        }
    }
    Ok(())
}

fn no_kick_is_lost() -> Test {
    // pauses at any moment of the entry into the guest: a lost kick would make a pause fail after
    // ten seconds
    let world = world(2, SPINS)?;
    for n in 0..2000u32 {
        world.vcpus.run();
        (0..n % 97).for_each(|_| std::hint::spin_loop());
        world.vcpus.pause()?;
    }
    Ok(())
}

fn work_is_done_on_stopped_vcpus_in_order() -> Test {
    let world = world(3, WRITES)?;
    world.vcpus.run();
    world.ports.wait_above(10)?;
    world.vcpus.pause()?;
    ensure(world.vcpus.on_each(|index, _| index)? == [0, 1, 2], "in another order")?;
    ensure(world.vcpus.on_first(|vcpu| vcpu.get_regs().unwrap().rip)? >= CODE, "the first one is elsewhere")?;
    Ok(())
}

fn a_throttled_guest_goes_on() -> Test {
    let world = world(2, WRITES)?;
    world.vcpus.run();
    for percent in [50, 99, 0, 80] {
        world.vcpus.throttle(percent)?;
        let now = world.ports.writes.load(Ordering::SeqCst);
        world.ports.wait_above(now + 1000)?;
    }
    world.vcpus.pause()?;
    world.vcpus.throttle(0)?;
    Ok(())
}

fn a_throttle_does_not_run_a_paused_guest() -> Test {
    let world = world(1, WRITES)?;
    world.vcpus.run();
    world.ports.wait_above(10)?;
    world.vcpus.throttle(70)?;
    world.vcpus.pause()?;
    let before = world.ports.writes.load(Ordering::SeqCst);
    // rests of the throttle begin and end meanwhile
    for _ in 0..20 {
        world.vcpus.throttle(60)?;
        world.vcpus.throttle(70)?;
        thread::yield_now();
    }
    ensure(world.ports.writes.load(Ordering::SeqCst) == before, "a paused guest writes")?;
    world.vcpus.throttle(0)?;
    Ok(())
}

fn a_held_guest_stands_still() -> Test {
    let world = world(1, WRITES)?;
    world.vcpus.run();
    world.ports.wait_above(10)?;
    world.vcpus.hold(true);
    // the vCPU is stopped once work can be done on it
    world.vcpus.on_each(|_, _| ())?;
    let before = world.ports.writes.load(Ordering::SeqCst);
    world.vcpus.run();
    world.vcpus.on_each(|_, _| ())?;
    ensure(world.ports.writes.load(Ordering::SeqCst) == before, "a guest that is held writes")?;
    world.vcpus.hold(false);
    world.ports.wait_above(before).map(drop)
}

fn an_exit_that_ends_the_vm_stops_all() -> Test {
    // with an interrupt descriptor table of length 0, the first exception is a triple fault
    let world = world(2, SPINS)?;
    let triple_fault = |index: usize, vcpu: &mut kvm_ioctls::VcpuFd| {
        if index == 1 {
            let mut sregs = vcpu.get_sregs().unwrap();
            sregs.idt.limit = 0;
            vcpu.set_sregs(&sregs).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            // the code is followed by zeros, and after the end of RAM nothing can be executed
            regs.rip = 0x3fff;
            vcpu.set_regs(&regs).unwrap();
        }
    };
    world.vcpus.on_each(triple_fault)?;
    let watch = world.vcpus.end_watch();
    world.vcpus.run();
    let end = watch().ok_or("it ends without a reason")?;
    ensure(end.contains("on vCPU 1"), &end)?;
    ensure(world.vcpus.end().as_deref() == Some(&*end), "another reason")?;
    world.vcpus.pause()?;
    Ok(())
}

fn devices_are_read_and_written() -> Test {
    let reads = world(1, READS)?;
    reads.vcpus.run();
    reads.ports.wait_above(0)?;
    ensure(reads.ports.last.lock().unwrap().get(&0x10) == Some(&vec![0x5a]), "another value than the device's")?;
    let stores = world(1, STORES)?;
    stores.vcpus.run();
    stores.ports.wait_above(0)?;
    ensure(stores.ports.last.lock().unwrap().contains_key(&0x8000), "the store does not reach the handler")
}

fn vcpus_that_are_shut_down_answer_nothing() -> Test {
    let world = world(2, WRITES)?;
    world.vcpus.run();
    world.ports.wait_above(10)?;
    world.vcpus.shut_down();
    let answer = world.vcpus.on_each(|_, _| ());
    ensure(answer == Err(VcpuError::Ended), "threads that end do some work")?;
    let other: fn(&Ports, &VcpuExit<'_>) -> Result<(), String> = |ports, exit| ports.other(0, exit);
    ensure(other(&world.ports, &VcpuExit::Debug(Default::default())).is_err(), "an exit that nobody expects")
}
