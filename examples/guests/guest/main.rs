//! The guest program: it has no operating system, only workloads that dirty memory in known ways
//! and check it.
//!
//! It boots by the PVH protocol in minivmm and in QEMU (`-kernel`), starts the other CPUs, and runs
//! one workload. The parameter page, which `guests::elf` writes, or `workload=…` on the command
//! line selects the workload. The guest reports on the board, the page at 1 MiB: heartbeats,
//! operations, errors, and the longest gap between two heartbeats, which is the downtime that the
//! guest saw. `layout.rs` has all offsets, `spec.rs` all workloads.
//!
//! | file | content |
//! |---|---|
//! | boot.rs | ring 0, in assembly |
//! | platform.rs | clock, serial port, LAPIC |
//! | memory.rs | RAM, areas of pages |
//! | balloon.rs | the pages that the guest does not need |
//! | cpu.rs | heartbeat, counters, errors |
//! | page.rs | the contents of pages |
//! | writers.rs, touches.rs, programs.rs, regions.rs, churn.rs | the workloads |

#![no_std]
#![no_main]

mod balloon;
mod boot;
mod churn;
mod cpu;
mod layout;
mod memory;
mod page;
mod platform;
mod programs;
mod regions;
mod spec;
mod touches;
mod writers;

use core::cell::UnsafeCell;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cpu::{Barrier, Cpu, Fault, board_write, cpus_online, give_up};
use layout::{MAX_CPUS, MAX_SPEC, PAGE_SIZE, PARAMS_ADDRESS, board, fault, params, state};
use memory::{Area, Loader};
use page::{check, fill, load, mix};
use spec::{LEAST_AREA, LEAST_RAM, Spec};

/// The part of a workload that runs on one CPU.
trait Workload {
    /// Whether the workload measures its accesses to pages.
    const MEASURES: bool = false;

    /// Returns the CPU's part of the workload's area.
    fn part(area: &Area, index: usize, count: usize) -> Area {
        area.part(index, count)
    }

    /// Returns the frequency in Hz of the LAPIC timer, or `None` if the workload needs no timer.
    fn timer_hz(_spec: &Spec<'_>) -> Option<u64> {
        None
    }

    /// Fills this CPU's part of the workload's area.
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self;

    /// Works for a moment: at most about ten microseconds pass between two beats.
    fn step(&mut self, cpu: &mut Cpu);

    /// Checks everything once more, at the end.
    fn finish(&mut self, _cpu: &mut Cpu) {}
}

/// What the first CPU has determined, for all CPUs.
struct Plan {
    spec: Spec<'static>,
    /// The pages of the workload.
    work: Area,
    /// The pages that are filled once.
    data: Area,
    cpus: usize,
    started: u64,
}

/// A value that the first CPU sets once, before any other CPU reads it.
struct Once<T>(AtomicBool, UnsafeCell<Option<T>>);
// SAFETY: the flag is set after the value, and only the first CPU sets it.
unsafe impl<T: Sync> Sync for Once<T> {}

impl<T> Once<T> {
    const fn new() -> Self {
        Once(AtomicBool::new(false), UnsafeCell::new(None))
    }

    fn set(&self, value: T) {
        // SAFETY: only the first CPU calls this, once, and no CPU reads the value before the flag
        // is set.
        unsafe { *self.1.get() = Some(value) };
        self.0.store(true, Ordering::Release);
    }

    fn wait(&self) -> &T {
        loop {
            if self.0.load(Ordering::Acquire) {
                // SAFETY: the flag is set, so the value is there and does not change any more.
                if let Some(value) = unsafe { &*self.1.get() } {
                    return value;
                }
            }
            core::hint::spin_loop();
        }
    }
}

static PLAN: Once<Plan> = Once::new();
static TEXT: Once<([u8; MAX_SPEC], usize)> = Once::new();
static FILLED: Barrier = Barrier::new();
static FINISHED: Barrier = Barrier::new();
static ERRORS: AtomicU32 = AtomicU32::new(0);

/// The entry of every CPU, called by boot.rs.
#[unsafe(no_mangle)]
extern "sysv64" fn guest_main(index: u64, start_info: u64) -> ! {
    let index = index as usize;
    if index == 0 {
        PLAN.set(set_up(start_info));
    } else {
        cpu::come_online();
    }
    let plan = PLAN.wait();
    if index >= plan.cpus {
        // This CPU came up too late to get a part.
        loop {
            platform::halt();
        }
    }
    let mut cpu = Cpu::new(index, plan.cpus, plan.spec.value("seed"));
    match plan.spec.info.name {
        "idle" => run::<writers::Idle>(&mut cpu, plan),
        "sleep" => run::<writers::Sleep>(&mut cpu, plan),
        "one-edge" => run::<writers::OneEdge>(&mut cpu, plan),
        "touch" => run::<writers::Touch>(&mut cpu, plan),
        "rate" => run::<writers::Rate>(&mut cpu, plan),
        "sequential" => run::<touches::Sequential>(&mut cpu, plan),
        "random" => run::<touches::Random>(&mut cpu, plan),
        "storm" => run::<touches::Storm>(&mut cpu, plan),
        "hot" => run::<writers::Hot>(&mut cpu, plan),
        "quicksort" if plan.spec.value("regions") != 0 => run::<regions::Sorters>(&mut cpu, plan),
        "quicksort" => run::<programs::Quicksort>(&mut cpu, plan),
        "kv" => run::<programs::KeyValue>(&mut cpu, plan),
        "churn" => run::<churn::Churn>(&mut cpu, plan),
        "log" => run::<programs::Log>(&mut cpu, plan),
        _ => run::<programs::Mix>(&mut cpu, plan),
    }
}

/// Reads what the loader and the VMM have written, divides RAM, and starts the other CPUs.
fn set_up(start_info: u64) -> Plan {
    let started = platform::now();
    cpu::set_up_board();
    cpu::come_online();
    board_write(board::TSC_KHZ, platform::settle_clock(load(PARAMS_ADDRESS + params::TSC_KHZ as u64)));
    let setup = |expected, found| Fault { kind: fault::SETUP, address: start_info, expected, found };
    let Some(loader) = Loader::read(start_info) else { give_up(setup(1, 0)) };
    TEXT.set(spec_text(&loader));
    let (text, length) = TEXT.wait();
    let text = core::str::from_utf8(&text[..*length]).unwrap_or("?");
    let Ok(spec) = Spec::parse(text) else {
        let _ = writeln!(platform::serial(), "bad workload: {text}");
        give_up(setup(2, *length as u64))
    };
    let mut ram = loader.ram();
    if spec.value("balloon") != 0 {
        balloon::set_up(&mut ram);
    }
    let wanted = (load(PARAMS_ADDRESS + params::CPUS as u64) as u32 as usize).clamp(1, MAX_CPUS);
    let (work, data) = lay_out(&spec, ram);
    if ram.pages() < LEAST_RAM || work.pages() < LEAST_AREA * wanted as u64 {
        give_up(setup(3, ram.pages()));
    }
    for (place, area) in [(board::WORK_RANGES, &work), (board::DATA_RANGES, &data)] {
        area.ranges().iter().enumerate().for_each(|(n, word)| board_write(place + 8 * n, *word));
    }
    let cpus = start_cpus(wanted);
    Plan { spec, work, data, cpus, started }
}

/// Returns the spec from the parameter page or else from the command line, or the spec of an idle
/// guest if neither has one.
fn spec_text(loader: &Loader) -> ([u8; MAX_SPEC], usize) {
    let mut text = [0; MAX_SPEC];
    let length = (load(PARAMS_ADDRESS + params::SPEC_LENGTH as u64) as u32 as usize).min(MAX_SPEC);
    if length != 0 {
        for (at, byte) in text[..length].iter_mut().enumerate() {
            // SAFETY: the parameter page is a page of the image, and the spec is within it.
            *byte = unsafe { ((PARAMS_ADDRESS as usize + params::SPEC + at) as *const u8).read_volatile() };
        }
        return (text, length);
    }
    let mut line = [0; MAX_SPEC];
    let length = loader.command_line(&mut line);
    let spec =
        line[..length].split(|byte| *byte == b' ').find_map(|word| word.strip_prefix(b"workload=")).unwrap_or(b"idle");
    text[..spec.len()].copy_from_slice(spec);
    (text, spec.len())
}

/// Divides RAM between the workload and the data pages.
fn lay_out(spec: &Spec<'_>, mut ram: Area) -> (Area, Area) {
    let shares = spec.shares(ram.pages());
    if shares.data_first {
        let data = ram.take(shares.data);
        return (ram.take(shares.work), data);
    }
    let work = ram.take(shares.work);
    (work, ram.take(shares.data))
}

/// Starts the other CPUs and returns the number of all CPUs.
///
/// The waits are those that real hardware needs. A CPU that is not up after them does not take
/// part.
fn start_cpus(wanted: usize) -> usize {
    if wanted > 1 {
        // The CPU's own LAPIC is enabled first. This also makes KVM rebuild its map of LAPICs:
        // until then the vCPU that was created last may be missing in the map, and an INIT for it
        // would be lost.
        platform::enable_lapic();
        platform::place_trampoline();
        (1..wanted).for_each(platform::send_init);
        platform::spin(10_000);
        (1..wanted).for_each(platform::send_startup);
        platform::spin(200);
        (1..wanted).for_each(platform::send_startup);
        let deadline = platform::now() + platform::ticks(60_000_000);
        while cpus_online() < wanted && platform::now() < deadline {
            core::hint::spin_loop();
        }
        if cpus_online() < wanted {
            let _ = writeln!(platform::serial(), "only {} of {wanted} CPUs came up", cpus_online());
        }
    }
    cpus_online().min(wanted)
}

/// The data pages of a CPU, and the progress of a verification.
struct Data {
    part: Area,
    seed: u64,
    next: u64,
}

impl Data {
    /// The number of pages between two beats: this takes about five microseconds.
    const SLICE: u64 = 8;

    fn fill(cpu: &mut Cpu, part: Area, seed: u64) -> Data {
        for page in 0..part.pages() {
            let address = part.address(page);
            fill(address, mix(address, seed));
            cpu.beat();
        }
        Data { part, seed, next: 0 }
    }

    /// Checks some pages. Returns true if these were the last.
    fn verify(&mut self, cpu: &mut Cpu) -> bool {
        let end = (self.next + Self::SLICE).min(self.part.pages());
        for page in self.next..end {
            let address = self.part.address(page);
            cpu.check(check(address, mix(address, self.seed), 0));
        }
        cpu.verified(end - self.next);
        cpu.beat();
        self.next = if end == self.part.pages() { 0 } else { end };
        self.next == 0
    }
}

/// Runs a workload on one CPU.
fn run<W: Workload>(cpu: &mut Cpu, plan: &'static Plan) -> ! {
    let spec = &plan.spec;
    let mut data = Data::fill(cpu, plan.data.part(cpu.index, cpu.count), mix(spec.value("seed"), 0xda7a));
    let mut work = W::prepare(cpu, W::part(&plan.work, cpu.index, cpu.count), spec);
    if W::MEASURES {
        cpu.measure_accesses();
    }
    let sleeps = W::timer_hz(spec);
    FILLED.wait(cpu);
    let start = platform::now();
    if cpu.index == 0 {
        board_write(board::FILL_TICKS, start - plan.started);
        let _ = writeln!(platform::serial(), "ready {}", spec.info.name);
        board_write(board::STATE, state::RUNNING);
    }
    if let Some(hz) = sleeps {
        platform::start_timer(hz);
    }
    cpu.restart();
    let every =
        if cpu.index == 0 && spec.value("serial") == 1 { platform::ticks(spec.value("every").max(1)) } else { 0 };
    let (mut line, mut next_line) = (0u64, start + every);
    let after = |key| match spec.value(key) {
        0 => u64::MAX,
        time => start.saturating_add(platform::ticks(time)),
    };
    let (end, crash) = (after("for"), after("crash"));
    loop {
        let now = cpu.beat();
        if now >= crash {
            platform::shut_down();
        }
        if now >= end {
            finish(cpu, plan, &mut work, &mut data);
        }
        if every != 0 && now >= next_line {
            line += 1;
            // After a gap the lines continue at their pace; those of the gap are not printed later.
            next_line = (next_line + every).max(now);
            let _ = writeln!(platform::serial(), "beat {line}");
        }
        if cpu.verify_wanted() {
            if data.verify(cpu) {
                cpu.verify_done();
            }
            if sleeps.is_some() && cpu.verify_wanted() {
                continue; // Asleep between slices it would take for ever.
            }
        }
        work.step(cpu);
    }
}

/// Checks everything, reports the result, and sleeps for ever.
fn finish<W: Workload>(cpu: &mut Cpu, plan: &Plan, work: &mut W, data: &mut Data) -> ! {
    work.finish(cpu);
    data.next = 0;
    while !data.verify(cpu) {}
    ERRORS.fetch_add(cpu.errors().min(1_000_000) as u32, Ordering::AcqRel);
    FINISHED.wait(cpu);
    if cpu.index == 0 {
        let errors = ERRORS.load(Ordering::Acquire);
        let _ = writeln!(platform::serial(), "finished {} errors {errors}", plan.spec.info.name);
        board_write(board::STATE, state::FINISHED);
    }
    loop {
        platform::halt();
    }
}

/// Called by boot.rs in ring 3 after an exception.
#[unsafe(no_mangle)]
extern "sysv64" fn trap_report(vector: u64, code: u64, rip: u64, cr2: u64) -> ! {
    give_up(Fault { kind: fault::TRAP, address: rip, expected: vector << 32 | code, found: cr2 })
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let line = info.location().map_or(0, |place| place.line());
    let _ = writeln!(platform::serial_by_force(), "{info}");
    give_up(Fault { kind: fault::PANIC, address: u64::from(line), expected: 0, found: 0 })
}
