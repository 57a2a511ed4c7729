//! What a VM needs of its host, compared with the state of its vCPU.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use libtest_mimic::Failed;
use migration_kvm::state::{
    ClockLoaded, CpuidBits, HostNeeds, Irqchip, KvmState, Mismatch, Msr, Register, VcpuSaver, VcpuState,
};

use super::{
    Test,
    guest::{CODE, Guest, cpuid},
};

const KERNEL_GS_BASE: u32 = 0xc000_0102;
const ADDRESS_SIZES: u32 = 0x8000_0008;

/// The MSRs with features, which `HostNeeds` lists with their values.
fn is_feature(msr: &Msr) -> bool {
    matches!(msr.index, 0x10a | 0x345 | 0x480..=0x491)
}

pub fn needs_are_those_of_the_vcpu() -> Test {
    for irqchip in [Irqchip::None, Irqchip::Split, Irqchip::Full] {
        let guest = Guest::counting(1, irqchip, CODE);
        let mut state = guest.saver.save(&guest.vcpus[0])?;
        state.msrs.iter_mut().filter(|msr| msr.index == KERNEL_GS_BASE).for_each(|msr| msr.data = 0x1000);
        guest.saver.load(&guest.vcpus[0], &state, &ClockLoaded::none())?;
        let state = guest.saver.save(&guest.vcpus[0])?;
        let needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], irqchip)?;
        same_registers(&needs, &state);
        assert_eq!((needs.irqchip, needs.nested), (irqchip, false));
        // some KVMs show the guest bits that they do not list
        assert!(needs.own_cpuid.iter().all(|own| own.leaf != 0 && own.leaf != ADDRESS_SIZES));
        let has = |cap: Cap| needs.caps.contains(&(cap as u32));
        assert_eq!(has(Cap::Irqchip), irqchip == Irqchip::Full);
        assert_eq!(has(Cap::SplitIrqchip), irqchip == Irqchip::Split);
        assert_eq!(has(Cap::Pit2), irqchip == Irqchip::Full && guest.vm.get_pit2().is_ok());
        assert_eq!(has(Cap::Xsave2), needs.xsave_size > 4096);
        assert!(!has(Cap::NestedState));
        for cap in [Cap::MpState, Cap::VcpuEvents, Cap::Xcrs, Cap::Debugregs, Cap::AdjustClock, Cap::ImmediateExit] {
            assert_eq!(has(cap), guest.vm.check_extension(cap), "{cap:?}");
        }
    }
    Ok(())
}

fn same_registers(needs: &HostNeeds, state: &VcpuState) {
    assert_eq!(needs.cpuid, state.cpuid);
    assert_eq!(needs.xcr0, state.xcrs.map_or(1, |xcrs| xcrs.xcrs[0].value));
    let area = state.cpuid.iter().find(|entry| entry.function == 0xd && entry.index == 0).map_or(0, |entry| entry.ecx);
    assert_eq!(needs.xsave_size, area.max(4096));
    assert_eq!(needs.tsc_khz, state.tsc_khz);
    assert!(needs.feature_msrs.iter().eq(state.msrs.iter().filter(|msr| is_feature(msr))));
    assert!(needs.msrs.contains(&KERNEL_GS_BASE));
    for msr in state.msrs.iter().filter(|msr| !is_feature(msr)) {
        assert_eq!(needs.msrs.contains(&msr.index), msr.data != 0, "{msr:x?}");
    }
}

/// What the VMM shows although the host does not have it is not checked.
pub fn what_the_vmm_adds_to_cpuid_is_its_own() -> Test {
    /// The needs of a VM with this CPUID.
    fn of(entries: &[kvm_cpuid_entry2]) -> Result<(Guest, HostNeeds), Failed> {
        let guest = Guest::bare(1, Irqchip::Split);
        guest.vcpus[0].set_cpuid2(&CpuId::from_entries(entries).unwrap())?;
        let needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], Irqchip::Split)?;
        Ok((guest, needs))
    }
    let plain = cpuid(&Kvm::new()?, 0);
    // some KVMs show the guest bits that they do not list
    let (_, usual) = of(&plain)?;
    let vendor = |entries: &mut [kvm_cpuid_entry2]| {
        let leaf = entries.iter_mut().find(|entry| entry.function == 0).unwrap();
        leaf.ebx = u32::from_le_bytes(*b"Nobo");
    };
    let addresses = |entries: &mut [kvm_cpuid_entry2]| {
        let leaf = entries.iter_mut().find(|entry| entry.function == ADDRESS_SIZES).unwrap();
        leaf.eax += 1;
    };
    let feature = |entries: &mut [kvm_cpuid_entry2]| {
        let leaf = entries.iter_mut().find(|entry| entry.function == 0x8000_0007).unwrap();
        leaf.edx |= 1 << 31;
    };
    let own = |leaf, register, bits| CpuidBits { leaf, subleaf: 0, register, bits };
    type Change<'a> = &'a dyn Fn(&mut [kvm_cpuid_entry2]);
    let changes: [(Change<'_>, CpuidBits); 3] = [
        (&vendor, own(0, Register::Ebx, !0)),
        (&addresses, own(ADDRESS_SIZES, Register::Eax, 0xff)),
        (&feature, own(0x8000_0007, Register::Edx, 1 << 31)),
    ];
    for (change, expected) in changes {
        let mut entries = plain.clone();
        change(&mut entries);
        let (guest, mut needs) = of(&entries)?;
        assert_eq!(needs.check(&guest.kvm), Ok(()));
        assert_eq!(needs.own_cpuid.len(), usual.own_cpuid.len() + 1);
        assert!(needs.own_cpuid.contains(&expected), "{:?}", needs.own_cpuid);
        needs.own_cpuid.retain(|own| *own != expected);
        assert_eq!(needs.own_cpuid, usual.own_cpuid);
        assert!(needs.check(&guest.kvm).is_err_and(|found| found.len() == 1));
    }
    Ok(())
}

pub fn what_just_fits_is_no_mismatch() -> Test {
    let guest = Guest::counting(1, Irqchip::Split, CODE);
    let mut needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], Irqchip::Split)?;
    let room = u32::try_from(guest.vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096);
    needs.xsave_size = room;
    assert_eq!(needs.check(&guest.kvm), Ok(()));
    needs.xsave_size = room + 1;
    assert_eq!(needs.check(&guest.kvm), Err(vec![Mismatch::XsaveSize { guest: room + 1, host: room }]));
    Ok(())
}

pub fn a_saved_vm_names_what_kvm_lacks() -> Test {
    let mut guest = Guest::counting(1, Irqchip::Full, CODE);
    let (vm, _) = guest.save_all();
    let state = KvmState::decode(&vm.data)?;
    assert!(!guest.saver.unsupported().is_empty());
    assert_eq!(state.unsupported(), guest.saver.unsupported());
    Ok(())
}

/// KVM sets a flag in the guest's clock page when the guest was stopped, so that the guest's
/// watchdogs do not fire.
pub fn a_loaded_guest_is_told_that_it_was_stopped() -> Test {
    const KVMCLOCK: u32 = 0x4b56_4d01;
    const PAGE: usize = 0x8000;
    const FLAGS: usize = 29;
    const STOPPED: u8 = 2;
    let mut guest = Guest::counting(1, Irqchip::Split, CODE);
    if !guest.vm.check_extension(Cap::KvmclockCtrl) {
        println!("skipped: this KVM has no KVM_KVMCLOCK_CTRL");
        return Ok(());
    }
    let mut state = guest.saver.save(&guest.vcpus[0])?;
    let clock = state.msrs.iter_mut().find(|msr| msr.index == KVMCLOCK).ok_or("no kvmclock")?;
    clock.data = PAGE as u64 | 1;
    guest.saver.load(&guest.vcpus[0], &state, &ClockLoaded::none())?;
    guest.next_count(0);
    assert_eq!(guest.ram.read(PAGE + FLAGS, 1)[0] & STOPPED, STOPPED);
    Ok(())
}

/// A VM may have interrupt controllers without a timer.
pub fn a_vm_without_a_timer_needs_and_saves_none() -> Test {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&CpuId::from_entries(&cpuid(&kvm, 0)).unwrap())?;
    let needs = HostNeeds::of(&kvm, &vm, &vcpu, Irqchip::Full)?;
    assert!(needs.caps.contains(&(Cap::Irqchip as u32)) && !needs.caps.contains(&(Cap::Pit2 as u32)));
    let state = KvmState::save(&VcpuSaver::probe(&kvm, &vm)?, &vm, Irqchip::Full)?;
    assert!(state.chips.is_some() && state.pit.is_none());
    Ok(())
}

/// What is wrong as a whole is found although every part of it is right.
pub fn cpuid_that_kvm_does_not_accept_is_a_mismatch() -> Test {
    let guest = Guest::counting(1, Irqchip::Split, CODE);
    let mut needs = HostNeeds::of(&guest.kvm, &guest.vm, &guest.vcpus[0], Irqchip::Split)?;
    let last = *needs.cpuid.last().ok_or("no entry")?;
    // more entries than KVM takes
    needs.cpuid.resize(257, last);
    let found = needs.check(&guest.kvm).unwrap_err();
    assert!(matches!(&found[..], [Mismatch::CpuidRefused(why)] if why == "too many entries"), "{found:?}");
    Ok(())
}
