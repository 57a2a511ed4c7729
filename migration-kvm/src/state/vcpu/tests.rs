use kvm_bindings::{kvm_dtable, kvm_segment};

use super::*;
use crate::testing;

const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A VM with one vCPU, and what saves it.
struct Guest {
    vcpu: VcpuFd,
    saver: VcpuSaver,
    vm: VmFd,
    kvm: Kvm,
}

impl Guest {
    fn new() -> Option<Self> {
        let kvm = testing::kvm()?;
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let saver = VcpuSaver::probe(&kvm, &vm).unwrap();
        Some(Self { vcpu, saver, vm, kvm })
    }
}

#[test]
fn what_kvm_lacks_is_named() {
    let Some(Guest { vcpu, mut saver, vm, kvm }) = Guest::new() else { return };
    let has = |cap| vm.check_extension_raw(cap) > 0;
    let clock = vm.check_extension_int(Cap::AdjustClock);
    let parts = [
        (has(Cap::Xsave2 as _), "KVM_GET_XSAVE2 (XSAVE areas above 4 KiB)"),
        (has(200), "KVM_GET_SREGS2 (PAE page directory pointers)"),
        (has(Cap::Xcrs as _), "KVM_GET_XCRS"),
        (has(Cap::Debugregs as _), "KVM_GET_DEBUGREGS"),
        (has(Cap::NestedState as _), "KVM_GET_NESTED_STATE (nested virtualisation)"),
        (has(kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES.into()), "KVM_VCPU_TSC_OFFSET"),
        (host_tsc_khz(&kvm).is_some(), "KVM_GET_TSC_KHZ"),
        (has(Cap::TscControl as _), "TSC scaling (KVM_CAP_TSC_CONTROL)"),
        (has(Cap::KvmclockCtrl as _), "KVM_KVMCLOCK_CTRL"),
        (clock > 0, "KVM_GET_CLOCK"),
        (clock & kvm_bindings::KVM_CLOCK_REALTIME as i32 != 0, "KVM_CLOCK_REALTIME"),
    ];
    for (present, name) in parts {
        assert_eq!(saver.unsupported().contains(&name.to_owned()), !present, "{name}");
    }
    let probed = [saver.xsave2, saver.sregs2, saver.xcrs, saver.debug_regs, saver.nested, saver.tsc_offset];
    assert_eq!(probed, [0, 1, 2, 3, 4, 5].map(|at| parts[at].0));
    assert_eq!(saver.xsave_size, usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap().max(XSAVE_SIZE));
    assert_eq!((saver.host_khz, saver.guest_khz), (host_tsc_khz(&kvm), None));
    // what is offered and still cannot be read
    let before = saver.unsupported().len();
    saver.learn(&vcpu).unwrap();
    assert_eq!(saver.guest_khz, vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0));
    assert!(saver.tsc_offset == (parts[5].0 && sys::tsc_offset(&vcpu).is_ok()));
    let nested = sys::nested(&vcpu).map_err(|e| e.raw_os_error());
    assert!(saver.nested == (parts[4].0 && nested != Err(Some(libc::EINVAL))));
    let learned = usize::from(probed[4] != saver.nested) + usize::from(probed[5] != saver.tsc_offset);
    assert_eq!(saver.unsupported().len() - before, learned);
    assert!(saver.msrs().indices().contains(&KERNEL_GS_BASE));
}

#[test]
fn a_kvm_that_lacks_parts_saves_and_loads_the_others() {
    let Some(Guest { vcpu, saver, .. }) = Guest::new() else { return };
    let old = VcpuSaver { xsave2: false, sregs2: false, xcrs: false, debug_regs: false, ..saver.clone() };
    let mut state = saver.save(&vcpu).unwrap();
    let SpecialRegs::WithPdptrs(sregs) = &mut state.sregs else {
        return eprintln!("skipped: this KVM has the older form only");
    };
    (sregs.cr2, sregs.fs.base) = (0x1234_5000, 0x5678_9000);
    let saved = plain(sregs, &state.events);
    // the newer form into a KVM that has only the older one
    old.load(&vcpu, &state, &ClockLoaded::none()).unwrap();
    assert_eq!(vcpu.get_sregs().unwrap(), saved);
    let plainly = old.save(&vcpu).unwrap();
    assert_eq!(plainly.sregs, SpecialRegs::Plain(saved));
    assert_eq!((plainly.xcrs, plainly.debug_regs), (None, None));
    assert_eq!(plainly.xsave[..XSAVE_SIZE], state.xsave[..XSAVE_SIZE]);
    // the older form into a KVM that has the newer one
    let Some(Guest { vcpu, saver, .. }) = Guest::new() else { return };
    saver.load(&vcpu, &plainly, &ClockLoaded::none()).unwrap();
    assert_eq!(vcpu.get_sregs().unwrap(), saved);
    assert!(saver.save(&vcpu).unwrap().xcrs.is_some());
}

#[test]
fn an_exit_request_is_as_it_was_after_io_was_completed() {
    let Some(Guest { mut vcpu, .. }) = Guest::new() else { return };
    for before in [0, 1] {
        vcpu.set_kvm_immediate_exit(before);
        complete_io(&mut vcpu, |_| unreachable!("nothing is pending")).unwrap();
        assert_eq!(vcpu.get_kvm_run().immediate_exit, before);
    }
}

#[test]
fn cpuid_is_set_unless_it_is_there() {
    let Some(Guest { vcpu, .. }) = Guest::new() else { return };
    let now = |vcpu: &VcpuFd| vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
    let mut entries = now(&vcpu);
    let error = set_cpuid(&vcpu, &vec![entries[0]; KVM_MAX_CPUID_ENTRIES + 1]).unwrap_err();
    assert!(error.to_string().contains("257 CPUID entries"), "{error}");
    // the brand string
    let brand = entries.iter_mut().find(|entry| entry.function == 0x8000_0002).unwrap();
    brand.eax ^= 1;
    set_cpuid(&vcpu, &entries).unwrap();
    assert!(cpuid::same_but_for_dynamic_bits(&now(&vcpu), &entries));
}

#[test]
fn another_frequency_is_an_error_unless_it_is_nearly_the_same() {
    let Some(Guest { vcpu, vm, .. }) = Guest::new() else { return };
    let Some(here) = khz(&vcpu) else { return eprintln!("skipped: this KVM does not tell") };
    set_tsc_khz(&vcpu, here).unwrap();
    set_tsc_khz(&vcpu, here + here / 10_000).unwrap();
    if !vm.check_extension(Cap::TscControl) {
        let error = set_tsc_khz(&vcpu, here / 2).unwrap_err();
        assert!(error.to_string().contains("KVM_SET_TSC_KHZ"), "{error}");
    }
}

/// All fields of the plain form are converted, and the bitmap has the interrupt that is being
/// injected.
#[test]
fn special_registers_have_a_plain_form() {
    let segment = |selector| kvm_segment { selector, base: 7, limit: 9, ..Default::default() };
    let table = |base| kvm_dtable { base, limit: 3, ..Default::default() };
    let newer = Sregs2 {
        cs: segment(1),
        ds: segment(2),
        es: segment(3),
        fs: segment(4),
        gs: segment(5),
        ss: segment(6),
        tr: segment(7),
        ldt: segment(8),
        gdt: table(9),
        idt: table(10),
        cr0: 11,
        cr2: 12,
        cr3: 13,
        cr4: 14,
        cr8: 15,
        efer: 16,
        apic_base: 17,
        ..Default::default()
    };
    let mut older = kvm_sregs {
        cs: segment(1),
        ds: segment(2),
        es: segment(3),
        fs: segment(4),
        gs: segment(5),
        ss: segment(6),
        tr: segment(7),
        ldt: segment(8),
        gdt: table(9),
        idt: table(10),
        cr0: 11,
        cr2: 12,
        cr3: 13,
        cr4: 14,
        cr8: 15,
        efer: 16,
        apic_base: 17,
        interrupt_bitmap: [0; 4],
    };
    let both = [SpecialRegs::WithPdptrs(newer), SpecialRegs::Plain(older)];
    assert_eq!(both.each_ref().map(SpecialRegs::cr4), [14; 2]);
    let mut events = kvm_vcpu_events::default();
    both.iter().for_each(|form| assert_eq!(form.plain(&events), older));
    for (nr, word, bit) in [(0x41, 1, 1), (0xff, 3, 63), (5, 0, 5)] {
        events.interrupt.nr = nr;
        (events.interrupt.injected, events.interrupt.soft) = (1, 0);
        older.interrupt_bitmap = [0; 4];
        older.interrupt_bitmap[word] = 1 << bit;
        assert_eq!(both[0].plain(&events), older, "{nr}");
        // a software interrupt belongs to its instruction, and an interrupt that is not
        // injected is not in the bitmap
        older.interrupt_bitmap = [0; 4];
        for (injected, soft) in [(1, 1), (0, 0), (0, 1)] {
            (events.interrupt.injected, events.interrupt.soft) = (injected, soft);
            assert_eq!(both[0].plain(&events), older, "{nr} {injected} {soft}");
        }
    }
}

#[test]
fn an_xsave_area_is_cut_only_where_it_is_empty() {
    let mut area = vec![1; XSAVE_SIZE];
    assert_eq!(fit_xsave(&area, XSAVE_SIZE).unwrap(), area);
    assert_eq!(fit_xsave(&area, XSAVE_SIZE + 64).unwrap(), area);
    area.resize(XSAVE_SIZE + 64, 0);
    assert_eq!(fit_xsave(&area, XSAVE_SIZE).unwrap(), vec![1; XSAVE_SIZE]);
    area[XSAVE_SIZE + 63] = 1;
    assert!(matches!(fit_xsave(&area, XSAVE_SIZE), Err(StateError::Unfit { .. })));
}

/// The address and miscellaneous registers of a machine-check bank are saved where there is an
/// error, and else would cost time.
#[test]
fn of_banks_with_an_error_all_registers_are_saved() {
    const STATUS: u32 = 0x405;
    let Some(Guest { vcpu, saver, .. }) = Guest::new() else { return };
    let state = saver.save(&vcpu).unwrap();
    assert_eq!([STATUS + 1, STATUS + 2].map(|index| state.msr(index)), [None, None]);
    let error = Msr { index: STATUS, data: 1 << 63 };
    if !msrs::write(&vcpu, &[error]).unwrap().is_empty() {
        return eprintln!("skipped: this KVM has no such bank");
    }
    let state = saver.save(&vcpu).unwrap();
    assert_eq!(state.msr(STATUS), Some(error.data));
    assert!([STATUS + 1, STATUS + 2].iter().all(|&index| state.msr(index).is_some()));
    assert_eq!(state.msr(STATUS + 5), None, "of another bank");
}
