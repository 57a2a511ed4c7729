//! Tests of the machine inside one process: it boots, stops, moves to a second machine and
//! continues.
//!
//! RAM is copied here by hand, and the traits are called in the engine's order: what fails here is
//! the VMM's fault, not the engine's. Tests that need KVM say so and pass where it is missing.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests print what they measure or leave out")]

use std::{
    io::{Cursor, Read},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use guests::{Board, State};
use kvm_ioctls::Kvm;
use migration_core::{
    GuestRam, PageRange,
    state::VmState,
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription},
};
use migration_kvm::{ram::Backing, tracker::TrackerKind};

use super::{Host, HostOptions, Machine, MachineConfig, MachineSource, SerialTarget, alias::Alias, boot};

const MEMORY: u64 = 64 << 20;
/// The longest time to wait for what a guest does within milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

fn no_kvm() -> bool {
    let missing = Kvm::new().is_err();
    if missing {
        eprintln!("skipped: no KVM");
    }
    missing
}

fn config(cpus: u32) -> MachineConfig {
    MachineConfig::new(MEMORY, cpus, Backing::Anonymous, TrackerKind::Auto)
}

fn machine(cpus: u32, spec: &str) -> Arc<Machine> {
    let machine = Machine::new(config(cpus), &SerialTarget::Null).unwrap();
    machine.boot_workload(spec).unwrap();
    Arc::new(machine)
}

fn software(cpus: u32, spec: &str) -> Arc<Machine> {
    let machine = Machine::new(MachineConfig { software: true, ..config(cpus) }, &SerialTarget::Null).unwrap();
    machine.boot_workload(spec).unwrap();
    Arc::new(machine)
}

fn board(machine: &Machine) -> Board {
    machine.snapshot().workload.expect("the board's page has lost its magic word")
}

#[track_caller]
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        // the guest needs the core
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until every CPU has done more work.
#[track_caller]
fn works(machine: &Machine) {
    let before = board(machine);
    until("the guest works", || {
        let now = board(machine);
        now.state == State::Running
            && now.cpus_online == machine.config.cpus
            && now.operations > before.operations + 1000 * u64::from(machine.config.cpus)
    });
    let now = board(machine);
    assert_eq!((now.errors, now.first_error), (0, None));
}

/// Returns a destination.
fn host(serial: SerialTarget) -> Host {
    let backing = Some(Backing::Memfd);
    Host::new(HostOptions { serial, backing, tracker: None, pause_on_loss: false, shared_ram: true, cold: false })
}

fn copy_ram(from: &dyn GuestRam, to: &dyn GuestRam) {
    assert_eq!(from.layout(), to.layout());
    let mut page = [0; 4096];
    for number in from.layout().all().pages() {
        let range = PageRange::new(number, 1);
        from.slice(range).unwrap().copy_to(&mut page);
        if page != [0; 4096] {
            to.slice(range).unwrap().copy_from(&page);
        }
    }
}

/// Moves a machine in the engine's order. Returns the destination's machine.
fn migrate(source: &mut MachineSource, serial: SerialTarget) -> Arc<Machine> {
    let mut vm = host(serial).build(&source.describe().unwrap()).unwrap();
    source.pause().unwrap();
    let state = source.save_state().unwrap().encode();
    copy_ram(&*source.ram(), &*vm.ram());
    vm.load_state(&VmState::decode(&state).unwrap()).unwrap();
    source.owner_in_doubt();
    vm.start(source.starts_running()).unwrap();
    source.released();
    vm.0
}

fn moves_twice(first: Arc<Machine>) {
    first.start(true).unwrap();
    works(&first);
    let mut source = MachineSource::new(first.clone());
    let second = migrate(&mut source, SerialTarget::Null);
    let at_rest = board(&first);
    works(&second);
    assert!(board(&second).operations > at_rest.operations);
    let third = migrate(&mut MachineSource::new(second), SerialTarget::Null);
    works(&third);
    // the first one never ran again
    assert_eq!(board(&first).heartbeats, at_rest.heartbeats);
    assert!(source.resume().is_err());
    assert!(first.resume_by_user().is_err());
}

#[test]
fn a_guest_goes_on_in_another_machine() {
    if !no_kvm() {
        moves_twice(machine(1, "one-edge:size=16M"));
    }
}

#[test]
fn four_cpus_go_on_in_another_machine() {
    if !no_kvm() {
        moves_twice(machine(4, "random:size=16M"));
    }
}

#[test]
fn a_software_guest_goes_on_in_another_machine() {
    for spec in ["one-edge:size=16M", "rate:pages=50000", "hot:size=8M,data=16M"] {
        moves_twice(software(2, spec));
    }
}

#[test]
fn estimates_go_by_what_saving_and_loading_took_before() {
    let first = software(1, "idle:data=1M");
    first.start(true).unwrap();
    let mut source = MachineSource::new(first);
    let guessed = source.estimate_state().unwrap();
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    // as after a snapshot, or after a migration that has failed
    source.resume().unwrap();
    let estimate = source.estimate_state().unwrap();
    assert_ne!(estimate.save_time, guessed.save_time);
    let devices = source.machine.devices().estimates();
    let of_processors = state.sections.iter().filter(|s| s.name.starts_with("software"));
    let saved: Vec<_> = of_processors.map(|s| (s.name.clone(), s.instance, s.data.len() as u64)).collect();
    let expected = saved.iter().cloned().chain(devices.into_iter().map(|d| (d.name, d.instance, d.bytes)));
    let estimated = estimate.sections.into_iter().map(|s| (s.name, s.instance, s.bytes));
    assert!(!saved.is_empty() && estimated.eq(expected), "{saved:?}");

    let host = host(SerialTarget::Null);
    let description = source.describe().unwrap();
    let mut vm = host.build(&description).unwrap();
    let guessed = vm.estimate_load();
    vm.load_state(&state).unwrap();
    // the attempt fails, and its source tries again
    drop(vm);
    let again = host.build(&description).unwrap().estimate_load();
    assert_ne!(again, guessed);
    // nothing is known about another VM
    let mut other = MachineSource::new(software(1, "idle:data=1M"));
    assert_eq!(host.build(&other.describe().unwrap()).unwrap().estimate_load(), guessed);
}

#[test]
fn a_software_guest_takes_no_kernel_and_no_nonsense() {
    let machine = software(1, "idle:data=1M");
    let refused = machine.boot_file(Path::new("/dev/null"), "").unwrap_err().to_string();
    assert!(refused.contains("--workload"), "{refused}");
    let mut source = MachineSource::new(machine.clone());
    let good = source.save_state().unwrap();
    // the plan's first page, then the first thread's steps
    for (index, word) in [(0, 1), (0, u64::MAX), (1, u64::MAX)] {
        let mut state = good.clone();
        let data = &mut state.sections[index].data;
        let mut bytes = data.to_vec();
        bytes[..8].copy_from_slice(&word.to_le_bytes());
        *data = bytes.into();
        let refused = machine.processors.load(&state);
        assert!(refused.is_err(), "section {index} with {word:#x}");
    }
}

#[test]
fn a_paused_machine_stays_paused() {
    if no_kvm() {
        return;
    }
    let first = machine(2, "hot:size=4M");
    first.start(true).unwrap();
    works(&first);
    first.pause_by_user().unwrap();
    let second = migrate(&mut MachineSource::new(first), SerialTarget::Null);
    assert!(second.snapshot().paused);
    let before = board(&second);
    assert_eq!(board(&second).heartbeats, before.heartbeats);
    second.resume_by_user().unwrap();
    works(&second);
}

#[test]
fn a_failed_attempt_gives_everything_back() {
    if no_kvm() {
        return;
    }
    let machine = machine(2, "hot:size=4M");
    machine.start(true).unwrap();
    works(&machine);
    let threads = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|t| {
                let name = std::fs::read_to_string(t.ok()?.path().join("comm")).ok()?;
                name.starts_with("throttle").then_some(())
            })
            .count()
    };
    for _ in 0..3 {
        let mut source = MachineSource::new(machine.clone());
        let host = host(SerialTarget::Null);
        let vm = host.build(&source.describe().unwrap()).unwrap();
        let ram = Arc::downgrade(&vm.ram());
        source.throttle(50).unwrap();
        source.pause().unwrap();
        // requests of a user in the middle of a hand-over
        assert!(machine.resume_by_user().is_err() && machine.pause_by_user().is_err());
        let mut state = source.save_state().unwrap();
        state.sections.truncate(1);
        let mut vm = vm;
        assert!(vm.load_state(&state).is_err());
        drop(vm);
        assert_eq!(ram.strong_count(), 0, "a discarded machine keeps its memory");
        source.throttle(0).unwrap();
        source.resume().unwrap();
        drop(source);
        works(&machine);
    }
    // no other test of this process throttles for as long as this waits
    until("the throttle's thread ends", || threads() == 0);
}

#[test]
fn a_configuration_for_another_layout_is_refused() {
    if no_kvm() {
        return;
    }
    let mut source = MachineSource::new(machine(1, "idle:data=1M"));
    let honest = source.describe().unwrap();
    let host = host(SerialTarget::Null);
    let huge = MachineConfig { memory_bytes: 1 << 45, ..config(1) };
    let hostile = VmDescription { config: huge.encode().into(), ..honest.clone() };
    assert!(host.build(&hostile).map(drop).unwrap_err().to_string().contains("layout"));
    assert!(host.build(&honest).is_ok());
}

#[test]
fn a_throttle_slows_the_guest_and_delays_no_pause() {
    if no_kvm() {
        return;
    }
    let machine = machine(1, "hot:size=4M");
    machine.start(true).unwrap();
    works(&machine);
    let mut source = MachineSource::new(machine.clone());
    let share = |percent| {
        machine.processors.throttle(percent).unwrap();
        let before = board(&machine).operations;
        thread::sleep(Duration::from_millis(300));
        board(&machine).operations - before
    };
    // on a busy host a single measurement may give any result
    until("a throttled guest does less", || {
        let (free, throttled) = (share(0), share(95));
        throttled > 0 && throttled < free / 3
    });
    for _ in 0..50 {
        source.pause().unwrap();
        let rest = board(&machine).heartbeats;
        thread::sleep(Duration::from_millis(2));
        assert_eq!(board(&machine).heartbeats, rest, "it runs in a pause");
        source.resume().unwrap();
    }
    source.throttle(0).unwrap();
    works(&machine);
}

/// Returns an ELF with one segment at `address` and `notes` PVH notes, each in a header of its own,
/// after a note of another kind.
fn elf(code: &[u8], address: u64, notes: usize) -> Vec<u8> {
    let halves = |v: &[u16]| v.iter().flat_map(|h| h.to_le_bytes()).collect::<Vec<_>>();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(halves(&[2, 62, 1, 0]));
    [address, 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend(halves(&[0, 0, 64, 56, 2 + notes as u16, 0, 0, 0]));
    let mut header = |kind: u32, offset: u64, address: u64, size: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        [offset, address, address, size, size, 4].iter().for_each(|word| file.extend(word.to_le_bytes()));
    };
    header(1, 0x1000, address, code.len() as u64);
    (0..notes).for_each(|_| header(4, 0x400, 0, 20));
    header(4, 0x500, 0, 20);
    for (at, kind) in [(0x400, 18u32), (0x500, 5)] {
        file.resize(at, 0);
        [4, 4, kind].iter().for_each(|word| file.extend(word.to_le_bytes()));
        file.extend(b"Xen\0");
        file.extend((address as u32).to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

const CODE: u64 = 0x20_0000;

fn load(image: &[u8]) -> Result<u64, String> {
    let machine = Machine::new(MachineConfig { software: true, ..config(1) }, &SerialTarget::Null).unwrap();
    let alias = Alias::new(&*machine.ram).unwrap();
    boot::load("a file", &mut Cursor::new(image), &*machine.ram, alias.memory()).map_err(|e| e.to_string())
}

#[test]
fn wrong_kernels_are_named_with_what_is_wrong() {
    let good = elf(&[0xf4; 64], CODE, 1);
    assert_eq!(load(&good), Ok(CODE));
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    // the offset of the fields of the first program header
    let segment = |field: usize, value: u64| patched(64 + field, &value.to_le_bytes());
    for (file, why) in [
        (vec![], "ELF header"),
        (b"#!/bin/sh\n".repeat(20), "does not begin like an ELF"),
        (patched(4, &[1]), "class 1"),
        (patched(5, &[2]), "byte order 2"),
        (patched(18, &183u16.to_le_bytes()), "machine 183"),
        (patched(54, &32u16.to_le_bytes()), "program headers of 32 bytes"),
        (patched(32, &u64::MAX.to_le_bytes()), "program headers"),
        (good[..100].to_vec(), "program headers"),
        (good[..0x1001].to_vec(), "ends before segment 0"),
        (segment(8, u64::MAX), "ends before segment 0"),
        (segment(24, 1 << 40), "does not lie in RAM"),
        (segment(24, u64::MAX), "wraps around"),
        (segment(40, 1 << 40), "does not lie in RAM"),
        (segment(24, 0x7000), "where the start info goes"),
        (segment(24, CODE + 0x1000), "lies in none of its segments"),
        (patched(64 + 56 + 32, &(1u64 << 40).to_le_bytes()), "of notes"),
        (elf(&[0xf4], CODE, 0), "no PVH entry note"),
    ] {
        let error = load(&file).unwrap_err();
        assert!(error.contains("a file") && error.contains(why), "{error}: not {why}");
    }
    // whichever part is missing and whichever byte is wrong, the loader returns
    for at in 0..0x520 {
        let _ = load(&good[..at]);
        let _ = load(&patched(at, &[0xff]));
    }
}

#[test]
fn a_triple_fault_ends_the_machine() {
    if no_kvm() {
        return;
    }
    let machine = Machine::new(config(2), &SerialTarget::Null).unwrap();
    // lidt [the zeros after the code]; ud2
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend((CODE as u32 + 16).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.resize(32, 0);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), elf(&code, CODE, 1)).unwrap();
    machine.boot_file(file.path(), "a command line").unwrap();
    let end = machine.wait_end();
    machine.start(true).unwrap();
    let end = end().unwrap();
    assert!(end.contains("triple fault") && end.contains("vCPU 0"), "{end}");
    assert!(machine.resume_by_user().unwrap_err().contains("triple fault"));
    let mut source = MachineSource::new(Arc::new(machine));
    let refused = source.pause().unwrap_err().to_string();
    assert!(refused.contains("triple fault"), "{refused}");
}

#[test]
fn vcpus_stop_although_the_signal_was_blocked_by_whoever_started_the_process() {
    if no_kvm() {
        return;
    }
    // the vCPUs' threads inherit the blocked signals
    nix::sys::signal::SigSet::all().thread_block().unwrap();
    let machine = machine(2, "hot:size=4M");
    machine.start(true).unwrap();
    works(&machine);
    machine.pause_by_user().unwrap();
    let paused = board(&machine).heartbeats;
    assert_eq!(board(&machine).heartbeats, paused);
    machine.resume_by_user().unwrap();
    works(&machine);
}

/// Returns a machine of two CPUs, the first of which prints often.
fn printing() -> Arc<Machine> {
    let machine = machine(2, "hot:size=4M,serial=1,every=1ms");
    machine.start(true).unwrap();
    works(&machine);
    machine
}

#[test]
fn a_vcpu_that_does_not_stop_fails_the_pause_and_nothing_else() {
    if no_kvm() {
        return;
    }
    let machine = printing();
    let stuck = machine.bus.block();
    let mut why = String::new();
    until("the first vCPU prints", || match machine.pause_by_user() {
        Ok(()) => {
            machine.resume_by_user().unwrap();
            false
        }
        Err(error) => {
            why = error;
            true
        }
    });
    assert!(why.contains("vCPU 0 does not stop within 10 s: it handles a write to port 0x3f8"), "{why}");
    // a migration fails in the same way, and status requests are answered meanwhile
    let mut source = MachineSource::new(machine.clone());
    let (mut answers, mut refused) = (0, None);
    thread::scope(|scope| {
        let pause = scope.spawn(|| source.pause());
        while !pause.is_finished() {
            let status = machine.snapshot();
            assert!(!status.paused && status.warnings.concat().contains("in use"), "{:?}", status.warnings);
            answers += 1;
        }
        refused = pause.join().unwrap().err();
    });
    assert!(answers > 1 && refused.unwrap().to_string().contains("vCPU 0 does not stop"));
    source.resume().unwrap();
    drop(stuck);
    works(&machine);
    // the failed pause has left no effect
    machine.pause_by_user().unwrap();
    assert!(machine.snapshot().paused);
    machine.resume_by_user().unwrap();
    works(&migrate(&mut source, SerialTarget::Null));
}

#[test]
fn a_vcpu_that_does_not_end_holds_nobody_up() {
    if no_kvm() {
        return;
    }
    let machine = printing();
    let bus = machine.bus.clone();
    let stuck = bus.block();
    until("the first vCPU prints", || machine.pause_by_user().is_err() || machine.resume_by_user().is_err());
    machine.shut_down();
    drop(machine);
    // what the thread still uses still exists
    drop(stuck);
}

#[test]
fn serial_output_that_cannot_be_written_moves_with_the_machine() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let full = SerialTarget::from("/dev/full");
    let first = Machine::new(MachineConfig { software: true, ..config(1) }, &full).unwrap();
    let first = Arc::new(first);
    let say = |machine: &Machine, text: &str| text.bytes().for_each(|b| machine.bus.write(0x3f8, &[b]));
    say(&first, "not lost, ");
    assert!(first.snapshot().warnings.concat().contains("/dev/full"));
    let target = SerialTarget::from(file.path().to_str().unwrap());
    let second = migrate(&mut MachineSource::new(first.clone()), target);
    say(&second, "in order");
    // the first machine does not write this output any more
    assert_eq!(first.snapshot().warnings.len(), 1);
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "not lost, in order");
    assert_eq!(second.snapshot().warnings, Vec::<String>::new());
}

#[test]
fn serial_output_that_nobody_reads_stops_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // opened for both directions, so that neither open waits
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let machine =
        Machine::new(MachineConfig { software: true, ..config(1) }, &SerialTarget::from(path.to_str().unwrap()));
    let machine = machine.unwrap();
    // a pipe holds 64 KiB, and the rest waits here
    let text: Vec<u8> = (0..100_000u32).map(|n| b'a' + (n % 23) as u8).collect();
    text.iter().for_each(|&b| machine.bus.write(0x3f8, &[b]));
    assert!(machine.snapshot().warnings.concat().contains("nobody reads it"));
    let mut read: Vec<u8> = Vec::new();
    while read.len() < text.len() {
        let mut piece = vec![0; 4096];
        let n = reader.read(&mut piece).unwrap();
        read.extend(&piece[..n]);
        // a status request makes the next attempt
        machine.snapshot();
    }
    assert!(read == text);
    assert_eq!(machine.snapshot().warnings, Vec::<String>::new());
}

/// Not a test: prints measurements.
/// `cargo test --release -p minivmm latencies -- --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn latencies() {
    if no_kvm() {
        return;
    }
    println!("{:<28}{:>22}{:>22}{:>22}{:>22}", "µs, median / 90 % / worst", "pause", "save", "build", "load");
    for (cpus, spec, throttle) in [
        (1, "hot:size=16M", 0),
        (1, "idle:data=1M", 0),
        (1, "sleep", 0),
        (1, "hot:size=16M", 80),
        (4, "sleep", 0),
        (4, "hot:size=16M", 0),
        (16, "sleep", 0),
    ] {
        let machine = machine(cpus, spec);
        machine.start(true).unwrap();
        until("the guest runs", || board(&machine).state == State::Running);
        let mut source = MachineSource::new(machine.clone());
        source.throttle(throttle).unwrap();
        let [mut pause, mut save, mut build, mut load] = [const { Vec::new() }; 4];
        for round in 0..200 {
            let began = Instant::now();
            source.pause().unwrap();
            pause.push(began.elapsed());
            let began = Instant::now();
            let state = source.save_state().unwrap();
            save.push(began.elapsed());
            if round % 20 == 0 {
                let host = host(SerialTarget::Null);
                let began = Instant::now();
                let mut vm = host.build(&source.describe().unwrap()).unwrap();
                build.push(began.elapsed());
                copy_ram(&*source.ram(), &*vm.ram());
                let began = Instant::now();
                vm.load_state(&state).unwrap();
                load.push(began.elapsed());
            }
            source.resume().unwrap();
            thread::sleep(Duration::from_millis(3));
        }
        let figures = [pause, save, build, load].map(|mut times: Vec<Duration>| {
            times.sort();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_micros();
            format!("{:>22}", format!("{} / {} / {}", at(0.5), at(0.9), at(1.0)))
        });
        println!("{:<28}{}", format!("{cpus} × {spec}, {throttle} %"), figures.concat());
        source.throttle(0).unwrap();
    }
}

#[test]
fn the_workloads_image_loads() {
    assert!(load(&guests::elf("idle", 1, 0).unwrap()).is_ok());
}
