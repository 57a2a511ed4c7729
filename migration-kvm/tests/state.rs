//! Tests of vCPU and VM state on a real KVM: the state is saved, loaded elsewhere and saved again,
//! the guest continues, and invalid states are refused.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2, kvm_mp_state, kvm_regs, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{state::Section, text::describe, vm::VmError};
use migration_kvm::state::{
    ClockLoaded, CpuidBits, HostNeeds, Irqchip, KvmState, Mismatch, Msr, Register, SpecialRegs, StateError, VcpuSaver,
    VcpuState, load_clock, load_vcpu, load_vm, save_vcpu, save_vm,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

#[path = "state/guest.rs"]
mod guest;
#[path = "state/needs.rs"]
mod needs;

use guest::{CODE, COUNTERS, Guest, MMIO, READ_CODE, at_rest, cpuid, lane, vm_at_rest};

type Test = Result<(), Failed>;

fn main() {
    let arguments = Arguments::from_args();
    let kvm = Kvm::new();
    let required = std::env::var("MIGRATION_REQUIRE_KVM").is_ok_and(|v| v == "1");
    if let Err(e) = &kvm {
        println!("no /dev/kvm ({e}): tests that need it are {}", if required { "failed" } else { "ignored" });
    }
    let ignored = kvm.is_err() && !required;
    let on_kvm = |name: &str, test: fn() -> Test| Trial::test(name, test).with_ignored_flag(ignored);
    let mut trials = vec![
        Trial::test("arbitrary_bytes_never_panic", arbitrary_bytes_never_panic),
        Trial::test("mutated_states_never_panic", mutated_states_never_panic),
        Trial::test("states_without_kvm_round_trip", states_without_kvm_round_trip),
        Trial::test("wrong_sections_are_refused", wrong_sections_are_refused),
    ];
    for (name, test) in [
        ("round_trip_1_vcpu_no_irqchip", (|| round_trip(1, Irqchip::None)) as fn() -> Test),
        ("round_trip_1_vcpu_split", || round_trip(1, Irqchip::Split)),
        ("round_trip_1_vcpu_full", || round_trip(1, Irqchip::Full)),
        ("round_trip_4_vcpus_split", || round_trip(4, Irqchip::Split)),
        ("round_trip_4_vcpus_full", || round_trip(4, Irqchip::Full)),
        ("cpuid_that_is_set_before_is_kept", cpuid_that_is_set_before_is_kept),
        ("mmio_read_is_completed_once", mmio_read_is_completed_once),
        ("read_across_pages_is_completed", read_across_pages_is_completed),
        ("waiting_vcpus_and_events_survive", waiting_vcpus_and_events_survive),
        ("armed_lapic_timer_survives", armed_lapic_timer_survives),
        ("msrs_survive", msrs_survive),
        ("chips_survive", chips_survive),
        ("clock_never_goes_back", clock_never_goes_back),
        ("wrong_irqchip_is_refused", wrong_irqchip_is_refused),
        ("impossible_msr_is_refused_at_load", impossible_msr_is_refused_at_load),
        ("own_needs_are_met", own_needs_are_met),
        ("impossible_needs_are_refused", impossible_needs_are_refused),
        ("needs_are_those_of_the_vcpu", needs::needs_are_those_of_the_vcpu),
        ("what_the_vmm_adds_to_cpuid_is_its_own", needs::what_the_vmm_adds_to_cpuid_is_its_own),
        ("what_just_fits_is_no_mismatch", needs::what_just_fits_is_no_mismatch),
        ("a_saved_vm_names_what_kvm_lacks", needs::a_saved_vm_names_what_kvm_lacks),
        ("a_loaded_guest_is_told_that_it_was_stopped", needs::a_loaded_guest_is_told_that_it_was_stopped),
        ("a_vm_without_a_timer_needs_and_saves_none", needs::a_vm_without_a_timer_needs_and_saves_none),
        ("cpuid_that_kvm_does_not_accept_is_a_mismatch", needs::cpuid_that_kvm_does_not_accept_is_a_mismatch),
        ("figures", figures),
    ] {
        trials.push(on_kvm(name, test));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn round_trip(vcpus: usize, irqchip: Irqchip) -> Test {
    let mut source = Guest::counting(vcpus, irqchip, CODE);
    let sections = source.run_and_save(Duration::from_millis(20));
    let vm = save_vm(&source.saver, &source.vm, irqchip)?;
    let mut destination = Guest::loaded(&source, &vm, &sections)?;

    let (vm_again, again) = destination.save_all();
    for (first, second) in sections.iter().zip(&again) {
        let (first, second) = (at_rest(first), at_rest(second));
        assert_eq!(first, second);
        assert_eq!(first.encode(), second.encode(), "not byte-identical");
        assert_eq!(VcpuState::decode(&first.encode())?, first);
    }
    assert_eq!(vm_at_rest(&vm).encode(), vm_at_rest(&vm_again).encode());

    for (i, section) in sections.iter().enumerate() {
        let before = at_rest(section);
        let avx2 = before.xcrs.unwrap().xcrs[0].value & 4 != 0;
        let first = destination.next_count(i);
        let second = destination.next_count(i);
        assert!(first >= before.regs.rax && second == first + before.regs.rdx, "{} {first} {second}", before.regs.rax);
        assert_eq!(destination.ram.u64(COUNTERS + i * 0x1000), second);
        let after = at_rest(&save_vcpu(&mut destination.vcpus[i], i as u32, &destination.saver, |_| false)?);
        assert_eq!(after.regs.rax, second);
        assert_eq!((after.regs.r8, after.regs.r15), (0x1111 * (i as u64 + 1), u64::MAX - i as u64));
        for l in 0..if avx2 { 4 } else { 2 } {
            assert_eq!(lane(&after, 0, l), second, "vCPU {i}, lane {l}");
            assert_eq!(lane(&after, 9, l), 0xabcd_0000 + (i * 16 + l) as u64);
        }
    }
    Ok(())
}

/// A VMM sets CPUID when it builds the VM. Loading must accept the bits in it that depend on the
/// guest.
fn cpuid_that_is_set_before_is_kept() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, CODE);
    let (vm, vcpus) = source.save_all();
    let mut destination = Guest::bare(1, Irqchip::Split);
    let set = kvm_bindings::CpuId::from_entries(&cpuid(&destination.kvm, 0)).unwrap();
    destination.vcpus[0].set_cpuid2(&set)?;
    let clock = load_clock(&destination.vm, &vm)?;
    load_vcpu(&mut destination.vcpus[0], &vcpus[0], &destination.saver, &clock)?;
    load_vm(&destination.vm, &vm, Irqchip::Split, &clock)?;
    destination.saver.learn(&destination.vcpus[0])?;
    let (_, again) = destination.save_all();
    assert_eq!(at_rest(&vcpus[0]), at_rest(&again[0]));
    Ok(())
}

/// A vCPU that exited for an MMIO read has not executed the instruction yet. Saving completes it
/// with the value from the VMM.
fn mmio_read_is_completed_once() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, READ_CODE);
    match source.vcpus[0].run()? {
        VcpuExit::MmioRead(MMIO, data) => data.copy_from_slice(&0x1234u64.to_le_bytes()),
        other => return Err(format!("unexpected exit {other:?}").into()),
    }
    let (vm, vcpus) = source.save_all();
    let state = VcpuState::decode(&vcpus[0].data)?;
    assert_eq!((state.regs.rbx, state.regs.rip), (0x1234, READ_CODE as u64 + 3));
    let mut ram = Guest::loaded(&source, &vm, &vcpus)?;
    assert_eq!(ram.next_count(0), 0x1235);
    Ok(())
}

/// A read across two pages exits twice. The second exit comes while the first is being completed.
fn read_across_pages_is_completed() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, READ_CODE);
    let across = MMIO + 0xffc;
    let mut regs = source.vcpus[0].get_regs()?;
    regs.rsi = across;
    source.vcpus[0].set_regs(&regs)?;
    match source.vcpus[0].run()? {
        VcpuExit::MmioRead(at, data) if at == across && data.len() == 4 => data.copy_from_slice(&[1, 2, 3, 4]),
        other => return Err(format!("unexpected exit {other:?}").into()),
    }
    let mut exits = 0;
    let section = save_vcpu(&mut source.vcpus[0], 0, &source.saver, |exit| match exit {
        VcpuExit::MmioRead(at, data) if at == across + 4 && data.len() == 4 => {
            data.copy_from_slice(&[5, 6, 7, 8]);
            exits += 1;
            true
        }
        _ => false,
    })?;
    let state = VcpuState::decode(&section.data)?;
    assert_eq!((exits, state.regs.rip, state.regs.rbx), (1, READ_CODE as u64 + 3, 0x0807_0605_0403_0201));

    // The next exit is the store, in two parts, too. If the VMM does not handle the second, it gets
    // an error.
    match source.vcpus[0].run()? {
        VcpuExit::MmioWrite(at, [2, 2, 3, 4]) if at == across => {}
        other => return Err(format!("unexpected exit {other:?}").into()),
    }
    let e = save_vcpu(&mut source.vcpus[0], 0, &source.saver, |_| false).unwrap_err();
    assert!(matches!(e, StateError::IoPending { .. }), "{e}");
    Ok(())
}

/// The state includes a vCPU that waits for its INIT, a pending NMI, and debug registers.
fn waiting_vcpus_and_events_survive() -> Test {
    let mut source = Guest::counting(3, Irqchip::Split, CODE);
    source.vcpus[1].set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED })?;
    source.vcpus[2].set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED })?;
    let mut debug = source.vcpus[0].get_debug_regs()?;
    (debug.db, debug.dr6) = ([0x1000, 0x2000, 0x3000, 0x4000], 0xffff_0ff1);
    source.vcpus[0].set_debug_regs(&debug)?;
    source.vcpus[2].nmi()?;
    let (vm, vcpus) = source.save_all();
    let mut destination = Guest::loaded(&source, &vm, &vcpus)?;
    let (_, again) = destination.save_all();
    for (first, second) in vcpus.iter().zip(&again) {
        assert_eq!(at_rest(first), at_rest(second));
    }
    let state = |i: usize| at_rest(&again[i]);
    assert_eq!(state(1).mp_state.mp_state, KVM_MP_STATE_UNINITIALIZED);
    assert_eq!(state(2).mp_state.mp_state, KVM_MP_STATE_HALTED);
    let nmi = state(2).events.nmi;
    assert!(nmi.pending > 0 || nmi.injected > 0, "{nmi:?}");
    assert_eq!(state(0).debug_regs, Some(debug));
    Ok(())
}

fn armed_lapic_timer_survives() -> Test {
    const TPR: usize = 0x80;
    const SVR: usize = 0xf0;
    const IRR_2: usize = 0x220;
    const LVT_TIMER: usize = 0x320;
    const INITIAL: usize = 0x380;
    const CURRENT: usize = 0x390;
    const DIVIDE: usize = 0x3e0;
    let reg = |state: &VcpuState, at: usize| {
        u32::from_le_bytes(state.lapic.as_ref().unwrap()[at..at + 4].try_into().unwrap())
    };
    for irqchip in [Irqchip::Split, Irqchip::Full] {
        let mut source = Guest::counting(1, irqchip, CODE);
        let mut state = source.saver.save(&source.vcpus[0])?;
        let mut set = |at: usize, value: u32| {
            state.lapic.as_mut().unwrap()[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        // One-shot, vector 0x41, 512 s at 1 GHz / 128. The priority keeps it pending, because the
        // guest has no handlers.
        set(TPR, 0xff);
        set(SVR, 0x1ff);
        set(LVT_TIMER, 0x41);
        set(DIVIDE, 0xa);
        set(INITIAL, 4_000_000_000);
        set(CURRENT, 4_000_000_000);
        if let SpecialRegs::WithPdptrs(s) = &mut state.sregs {
            s.cr8 = 0xf;
        } else if let SpecialRegs::Plain(s) = &mut state.sregs {
            s.cr8 = 0xf;
        }
        source.saver.load(&source.vcpus[0], &state, &ClockLoaded::none())?;
        let (vm, vcpus) = source.save_all();
        let saved = VcpuState::decode(&vcpus[0].data)?;
        assert!(reg(&saved, CURRENT) > 0, "{}", reg(&saved, CURRENT));
        assert_eq!(reg(&saved, IRR_2), 0);
        // This time does not count as running time of the guest: the timer starts again from the
        // saved count.
        thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        let mut destination = Guest::loaded(&source, &vm, &vcpus)?;
        let (_, again) = destination.save_all();
        let most = 1 + start.elapsed().as_nanos() / 128;
        let again = VcpuState::decode(&again[0].data)?;
        assert_eq!(reg(&again, INITIAL), 4_000_000_000);
        let (before, left) = (reg(&saved, CURRENT), reg(&again, CURRENT));
        assert!(left <= before && u128::from(before - left) <= most, "{left} after {before}, in at most {most}");
        // The same timer with 1 ms left fires.
        let mut soon = saved;
        soon.lapic.as_mut().unwrap()[CURRENT..CURRENT + 4].copy_from_slice(&7_812u32.to_le_bytes());
        let soon = Section { data: soon.encode().into(), ..vcpus[0].clone() };
        let mut destination = Guest::loaded(&source, &vm, &[soon])?;
        let after = loop {
            let after = destination.run_and_save(Duration::from_millis(5));
            let after = VcpuState::decode(&after[0].data)?;
            if reg(&after, IRR_2) != 0 {
                break after;
            }
        };
        assert_eq!(reg(&after, IRR_2), 1 << 1);
        assert_eq!(reg(&after, CURRENT), 0);
    }
    Ok(())
}

fn msrs_survive() -> Test {
    // KERNEL_GS_BASE, LSTAR, SFMASK, TSC_AUX, PAT, an MTRR, SYSENTER_EIP.
    let values = [
        (0xc000_0102, 0xffff_8000_1234_5000),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0084, 0x47700),
        (0xc000_0103, 3),
        (0x277, 0x0007_0406_0007_0406),
        (0x250, 0x0606_0606_0606_0606),
        (0x176, 0xffff_ffff_8200_0000),
    ];
    let mut source = Guest::counting(1, Irqchip::Split, CODE);
    let mut state = source.saver.save(&source.vcpus[0])?;
    let mut tried = 0;
    for (index, data) in values {
        if let Some(msr) = state.msrs.iter_mut().find(|msr| msr.index == index) {
            msr.data = data;
            tried += 1;
        }
    }
    assert!(tried >= 5, "only {tried}");
    source.saver.load(&source.vcpus[0], &state, &ClockLoaded::none())?;
    let (vm, vcpus) = source.save_all();
    let mut destination = Guest::loaded(&source, &vm, &vcpus)?;
    let (_, again) = destination.save_all();
    let again = VcpuState::decode(&again[0].data)?;
    for (index, data) in values {
        assert!(again.msr(index).is_none_or(|now| now == data), "{index:#x}");
    }
    Ok(())
}

fn chips_survive() -> Test {
    let mut source = Guest::counting(1, Irqchip::Full, CODE);
    source.vm.set_irq_line(5, true)?;
    let (vm, vcpus) = source.save_all();
    let mut state = KvmState::decode(&vm.data)?;
    // The redirection entry of line 5 (vector 0x55, masked, level), and the mask of a PIC.
    let chips = state.chips.as_mut().ok_or("no chips")?;
    chips.ioapic[24 + 8 * 5..24 + 8 * 6].copy_from_slice(&0x1_8055u64.to_le_bytes());
    chips.pic_master[2] = 0xfb;
    let vm = Section { data: state.encode().into(), ..vm };
    let mut destination = Guest::loaded(&source, &vm, &vcpus)?;
    let (again, _) = destination.save_all();
    let again = vm_at_rest(&again);
    let chips = again.chips.as_ref().ok_or("no chips")?;
    assert_eq!(chips.ioapic[24 + 8 * 5..24 + 8 * 5 + 4], 0x1_8055u32.to_le_bytes());
    assert_eq!(chips.pic_master[2], 0xfb);
    assert_eq!(again.encode(), vm_at_rest(&vm).encode());
    println!("absent here: {:?}", again.unsupported());
    Ok(())
}

fn clock_never_goes_back() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, CODE);
    thread::sleep(Duration::from_millis(30));
    let (vm, _) = source.save_all();
    let saved = KvmState::decode(&vm.data)?.clock.ok_or("no clock")?;
    let destination = Guest::bare(1, Irqchip::Split);
    load_clock(&destination.vm, &vm)?;
    let now = destination.vm.get_clock()?.clock;
    assert!(now >= saved.clock && now < saved.clock + 10_000_000_000, "{} {now}", saved.clock);
    Ok(())
}

fn wrong_irqchip_is_refused() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, CODE);
    let (vm, vcpus) = source.save_all();
    let mut other = Guest::bare(1, Irqchip::None);
    let clock = load_clock(&other.vm, &vm)?;
    let e = load_vm(&other.vm, &vm, Irqchip::None, &clock).unwrap_err();
    assert_eq!(e.to_string(), "the saved VM has a split irqchip, this one no irqchip");
    let e = load_vcpu(&mut other.vcpus[0], &vcpus[0], &other.saver, &clock).unwrap_err();
    assert!(describe(VmError::from(e)).contains("KVM_SET_LAPIC"));
    Ok(())
}

fn impossible_msr_is_refused_at_load() -> Test {
    let mut source = Guest::counting(1, Irqchip::Split, CODE);
    let (_, vcpus) = source.save_all();
    let mut state = VcpuState::decode(&vcpus[0].data)?;
    state.msrs.insert(0, Msr { index: 0x1234_5678, data: 9 });
    let destination = Guest::bare(1, Irqchip::Split);
    let e = destination.saver.load(&destination.vcpus[0], &state, &ClockLoaded::none()).unwrap_err();
    assert!(e.to_string().contains("0x12345678 = 0x9"), "{e}");
    // An MSR that does not exist here and was zero is ignored.
    state.msrs[0].data = 0;
    let loaded = destination.saver.load(&destination.vcpus[0], &state, &ClockLoaded::none())?;
    assert!(loaded.skipped_msrs.contains(&Msr { index: 0x1234_5678, data: 0 }));
    Ok(())
}

fn own_needs_are_met() -> Test {
    for irqchip in [Irqchip::None, Irqchip::Split, Irqchip::Full] {
        let mut guest = Guest::counting(2, irqchip, CODE);
        guest.run_and_save(Duration::from_millis(5));
        let needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], irqchip)?;
        assert_eq!(HostNeeds::decode(&needs.encode())?, needs);
        if let Err(found) = needs.check(&guest.kvm) {
            return Err(found.iter().map(|m| m.to_string()).collect::<Vec<_>>().join("; ").into());
        }
    }
    Ok(())
}

fn impossible_needs_are_refused() -> Test {
    let guest = Guest::counting(1, Irqchip::Split, CODE);
    let needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], Irqchip::Split)?;
    let refused = |change: &dyn Fn(&mut HostNeeds), reason: &str| {
        let mut needs = needs.clone();
        change(&mut needs);
        let found = HostNeeds::decode(&needs.encode()).unwrap().check(&guest.kvm).unwrap_err();
        let text: Vec<String> = found.iter().map(ToString::to_string).collect();
        println!("  {text:?}");
        assert!(text.iter().any(|t| t.contains(reason)), "{text:?} has no {reason}");
    };
    let leaf = |needs: &mut HostNeeds, leaf| needs.cpuid.iter().position(|e| e.function == leaf && e.index == 0);
    let host = cpuid(&guest.kvm, 0);
    let has_vmx = host.iter().any(|e| e.function == 1 && e.ecx & 1 << 6 != 0);
    if !has_vmx {
        refused(
            &|n| {
                let at = leaf(n, 1).unwrap();
                n.cpuid[at].ecx |= 1 << 6;
            },
            "this host lacks SMX (CPUID leaf 0x1, subleaf 0, ECX bit 6)",
        );
    }
    refused(&|n| n.msrs.push(0x1234_5678), "MSR 0x12345678");
    refused(&|n| n.feature_msrs = vec![Msr { index: 0x10a, data: 1 << 63 }], "MSR 0x10a = 0x8000000000000000");
    if !guest.vm.check_extension(Cap::TscControl) {
        refused(&|n| n.tsc_khz = n.tsc_khz.map(|khz| khz + khz / 1000), "TSC runs at");
        let mut near = needs.clone();
        near.tsc_khz = near.tsc_khz.map(|khz| khz + khz / 10_000);
        assert_eq!(near.check(&guest.kvm), Ok(()));
    }
    refused(&|n| n.xcr0 |= 1 << 18, "AMX-TILEDATA");
    refused(&|n| n.xsave_size = 1 << 20, "takes 1048576 bytes");
    refused(&|n| n.caps.push(0xffff), "lacks capability 65535");
    refused(
        &|n| {
            let at = leaf(n, 0).unwrap();
            n.cpuid[at].ebx = u32::from_le_bytes(*b"Nobo");
        },
        "processor is of Nobo",
    );
    refused(
        &|n| {
            let at = leaf(n, 0x8000_0008).unwrap();
            n.cpuid[at].eax |= 0xff;
        },
        "bits of physical address",
    );
    // Bits that the VMM sets on its own responsibility are not checked.
    let mut own = needs.clone();
    let at = leaf(&mut own, 0x8000_0007).unwrap();
    own.cpuid[at].edx |= 1 << 31;
    assert!(own.check(&guest.kvm).is_err_and(|f| matches!(f[..], [Mismatch::Feature { name: None, .. }])));
    own.own_cpuid.push(CpuidBits { leaf: 0x8000_0007, subleaf: 0, register: Register::Edx, bits: 1 << 31 });
    assert_eq!(own.check(&guest.kvm), Ok(()));
    Ok(())
}

fn figures() -> Test {
    const ROUNDS: u32 = 200;
    for irqchip in [Irqchip::None, Irqchip::Split] {
        let mut guest = Guest::counting(1, irqchip, CODE);
        let (vm, vcpus) = guest.save_all();
        let time = |what: &str, f: &mut dyn FnMut()| {
            f();
            let start = Instant::now();
            (0..ROUNDS).for_each(|_| f());
            println!("  {irqchip:?}: {what} {:.1} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS));
        };
        let state = VcpuState::decode(&vcpus[0].data)?;
        time("save a vCPU, with section", &mut || {
            drop(save_vcpu(&mut guest.vcpus[0], 0, &guest.saver, |_| false).unwrap())
        });
        time("save a vCPU, ioctls", &mut || drop(guest.saver.save(&guest.vcpus[0]).unwrap()));
        time("encode a vCPU", &mut || drop(state.encode()));
        time("decode a vCPU", &mut || drop(VcpuState::decode(&vcpus[0].data).unwrap()));
        time("save the VM", &mut || drop(save_vm(&guest.saver, &guest.vm, irqchip).unwrap()));
        let mut fresh = Guest::bare(1, irqchip);
        let clock = load_clock(&fresh.vm, &vm)?;
        let start = Instant::now();
        let loaded = load_vcpu(&mut fresh.vcpus[0], &vcpus[0], &fresh.saver, &clock)?;
        println!("  {irqchip:?}: first load {:.1} us; {loaded:?}", start.elapsed().as_secs_f64() * 1e6);
        time("load a vCPU that has its CPUID", &mut || {
            load_vcpu(&mut fresh.vcpus[0], &vcpus[0], &fresh.saver, &clock).unwrap();
        });
        let (sizes, read, unread) = (vcpus[0].data.len(), state.msrs.len(), state.unread_msrs.len());
        println!("  {irqchip:?}: section {sizes} bytes, {read} MSRs, unread {unread}: {:x?}", state.unread_msrs);
        println!("  {irqchip:?}: absent: {:?}", guest.saver.unsupported());
        println!("  {irqchip:?}: TSC offset {:?}, clock {:?}", state.tsc_offset, KvmState::decode(&vm.data)?.clock);
        let start = Instant::now();
        let needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], irqchip)?;
        let asked = start.elapsed();
        let _ = needs.check(&guest.kvm);
        println!(
            "  {irqchip:?}: needs: of {asked:?}, check {:?}, {} bytes",
            start.elapsed() - asked,
            needs.encode().len()
        );
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Invalid bytes from a peer.

fn made_up() -> (VcpuState, KvmState, HostNeeds) {
    let entry = kvm_cpuid_entry2 { function: 1, eax: 2, ..Default::default() };
    let vcpu = VcpuState {
        cpuid: vec![entry; 3],
        tsc_khz: Some(2_600_000),
        tsc_offset: Some(7),
        regs: kvm_regs { rip: 9, ..Default::default() },
        sregs: SpecialRegs::Plain(kvm_sregs::default()),
        xsave: vec![0; 4096],
        xcrs: Some(kvm_xcrs::default()),
        debug_regs: Some(Default::default()),
        lapic: Some(Box::new([5; 1024])),
        mp_state: Default::default(),
        events: Default::default(),
        msrs: vec![Msr { index: 0x10, data: 1 }, Msr { index: 0x6e0, data: 2 }],
        unread_msrs: vec![1, 2],
        nested: None,
        ssp: Some(3),
    };
    let mut w = migration_core::codec::Writer::new();
    w.count(1).u16(1).blob(&[1]);
    let vm = KvmState::decode(&w.into_bytes()).unwrap();
    let needs = HostNeeds {
        cpuid: vec![entry],
        own_cpuid: vec![CpuidBits { leaf: 1, subleaf: 0, register: Register::Ecx, bits: 5 }],
        xcr0: 7,
        xsave_size: 4096,
        tsc_khz: None,
        msrs: vec![1, 2, 3],
        feature_msrs: vec![Msr { index: 0x10a, data: 5 }],
        irqchip: Irqchip::Full,
        nested: true,
        caps: vec![55],
    };
    (vcpu, vm, needs)
}

fn states_without_kvm_round_trip() -> Test {
    let (mut vcpu, vm, needs) = made_up();
    assert_eq!(VcpuState::decode(&vcpu.encode())?, vcpu);
    assert_eq!(KvmState::decode(&vm.encode())?, vm);
    assert_eq!(HostNeeds::decode(&needs.encode())?, needs);
    let mut nested = vec![0; 128];
    nested[4..8].copy_from_slice(&128u32.to_ne_bytes());
    vcpu.nested = Some(nested);
    assert_eq!(VcpuState::decode(&vcpu.encode())?, vcpu);
    assert_eq!([0x10, 0x6e0, 0x11].map(|index| vcpu.msr(index)), [Some(1), Some(2), None]);
    vcpu.xsave[512..520].copy_from_slice(&0x1_0000_0203u64.to_le_bytes());
    assert_eq!(vcpu.xstate(), 0x1_0000_0203);
    type Change = fn(&mut VcpuState);
    // the largest valid values
    let last: [Change; 3] = [
        |s| s.mp_state.mp_state = 10,
        |s| s.xcrs.as_mut().unwrap().nr_xcrs = 16,
        |s| s.msrs = (0..4096).map(|index| Msr { index, data: 0 }).collect(),
    ];
    for change in last {
        let mut fits = vcpu.clone();
        change(&mut fits);
        assert_eq!(VcpuState::decode(&fits.encode())?, fits);
    }
    let sane: [(&str, Change); 8] = [
        ("XCRs", |s| s.xcrs.as_mut().unwrap().nr_xcrs = 17),
        ("CPUID", |s| s.cpuid = vec![Default::default(); 257]),
        ("MSRs", |s| s.msrs = (0..4097).map(|index| Msr { index, data: 0 }).collect()),
        ("appears twice", |s| s.msrs = vec![Msr { index: 1, data: 0 }; 2]),
        ("XSAVE", |s| s.xsave.truncate(4000)),
        ("multiprocessing", |s| s.mp_state.mp_state = 11),
        ("nested", |s| s.nested.as_mut().unwrap()[4] = 127),
        ("kHz", |s| s.tsc_khz = Some(0)),
    ];
    for (reason, change) in sane {
        let mut wrong = vcpu.clone();
        change(&mut wrong);
        let e = VcpuState::decode(&wrong.encode()).unwrap_err();
        assert!(e.to_string().contains(reason), "{e}");
    }
    Ok(())
}

fn wrong_sections_are_refused() -> Test {
    let (vcpu, ..) = made_up();
    let bytes = vcpu.encode();
    for len in 0..bytes.len() {
        assert!(VcpuState::decode(&bytes[..len]).is_err(), "{len}");
    }
    // Adds an item; the first byte is the number of items.
    let with = |item: &[u8]| {
        let mut more = bytes.clone();
        more[0] += 1;
        more.extend(item);
        VcpuState::decode(&more)
    };
    let e = with(&[0x77, 0, 0, 0, 0, 0]).unwrap_err();
    assert_eq!(e.to_string(), "the state needs parts that this version does not know: items [77]");
    assert_eq!(with(&[0x77, 0x80, 0, 0, 0, 0])?, vcpu);
    assert!(matches!(with(&[2, 0, 0, 0, 0, 0]), Err(StateError::DuplicateItem { tag: 2 })));

    let Ok(kvm) = Kvm::new() else { return Ok(()) };
    let vm = kvm.create_vm()?;
    let section = |name: &str, version| Section { name: name.into(), instance: 0, version, data: bytes.clone().into() };
    let e = load_clock(&vm, &section("vcpu", 1)).unwrap_err();
    assert_eq!(e.to_string(), "expected a section vm, found vcpu");
    let mut vcpu = vm.create_vcpu(0)?;
    let saver = VcpuSaver::probe(&kvm, &vm)?;
    let e = load_vcpu(&mut vcpu, &section("vcpu", 2), &saver, &ClockLoaded::none()).unwrap_err();
    assert_eq!(e.to_string(), "state of vcpu has version 2, this host loads 1");
    Ok(())
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

fn decode_all(bytes: &[u8]) {
    if let Ok(state) = VcpuState::decode(bytes) {
        assert_eq!(VcpuState::decode(&state.encode()).unwrap().encode(), state.encode());
    }
    if let Ok(state) = KvmState::decode(bytes) {
        assert_eq!(KvmState::decode(&state.encode()).unwrap().encode(), state.encode());
    }
    if let Ok(needs) = HostNeeds::decode(bytes) {
        assert_eq!(HostNeeds::decode(&needs.encode()).unwrap(), needs);
    }
}

fn arbitrary_bytes_never_panic() -> Test {
    runner(2000)
        .run(&prop::collection::vec(any::<u8>(), 0..300), |bytes| {
            decode_all(&bytes);
            Ok(())
        })
        .map_err(|e| io::Error::other(e.to_string()))?;
    Ok(())
}

fn mutated_states_never_panic() -> Test {
    let (vcpu, vm, needs) = made_up();
    let states = [vcpu.encode(), vm.encode(), needs.encode()];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
    let cut = prop::option::of(any::<prop::sample::Index>());
    runner(1000)
        .run(&(changes, cut), |(changes, cut)| {
            for state in &states {
                let mut bytes = state.clone();
                for (at, value) in &changes {
                    let at = at.index(bytes.len());
                    bytes[at] = *value;
                }
                if let Some(cut) = &cut {
                    bytes.truncate(cut.index(state.len()));
                }
                decode_all(&bytes);
            }
            Ok(())
        })
        .map_err(|e| io::Error::other(e.to_string()))?;
    Ok(())
}
