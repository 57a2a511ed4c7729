//! Model-specific registers: the list of those to save, and how they are read and written although
//! KVM refuses some of them.

use std::io;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{
    StateError,
    cpuid::{self, Register},
    ioctl_error,
};

/// The largest number of MSRs in a vCPU's state. KVM lists about 150. A model with all
/// machine-check banks and counters has 500.
pub const MAX_MSRS: usize = 4096;

/// The largest number of MSRs that KVM reads or writes at once: it refuses as many as its header's
/// constant says.
const MAX_AT_ONCE: usize = KVM_MAX_MSR_ENTRIES - 1;

/// The time stamp counter.
pub(super) const IA32_TSC: u32 = 0x10;
/// The TSC value at which the LAPIC timer fires.
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_FEAT_CTL: u32 = 0x3a;
const IA32_PERF_GLOBAL_CTRL: u32 = 0x38f;
const AMD_PERF_GLOBAL_CTL: u32 = 0xc000_0301;
/// The MSRs with the capabilities of VMX, which decide what nested state is valid.
const VMX_CAPABILITIES: std::ops::RangeInclusive<u32> = 0x480..=0x491;
/// The MSRs of machine-check banks. `KVM_X86_SETUP_MCE` allows 32 banks of four registers.
const MC_BANKS: std::ops::Range<u32> = 0x400..0x400 + 4 * 32;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// The bits of this MSR that report a weakness and not a feature: RSBA and RRSBA.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;
const IA32_PERF_CAPABILITIES: u32 = 0x345;

/// MSRs that are saved whether or not KVM's list has them. The list leaves out MSRs that "always
/// exist" (memory types, machine check). It also leaves out MSRs of some features that the host's
/// processor has.
#[rustfmt::skip]
const MORE_MSRS: &[u32] = &[
    0x10, // TSC
    0x3a, // FEAT_CTL
    0x3b, // TSC_ADJUST
    0x48, // SPEC_CTRL
    0xe1, // UMWAIT_CONTROL
    0x122, // TSX_CTRL
    0x140, // MISC_FEATURES_ENABLES
    0x174, 0x175, 0x176, // SYSENTER_CS, _ESP, _EIP
    0x17a, 0x17b, // MCG_STATUS, MCG_CTL
    0x1a0, // MISC_ENABLE
    0x1c4, 0x1c5, // XFD, XFD_ERR
    0x1d9, // DEBUGCTL
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, // MTRR, variable ranges: base and mask
    0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f, //
    0x250, 0x258, 0x259, // MTRR, fixed ranges
    0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, //
    0x277, // PAT
    0x2ff, // MTRR_DEF_TYPE
    0x6e0, // TSC_DEADLINE
    0xd90, // BNDCFGS
    0xda0, // XSS
    0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, // STAR, LSTAR, CSTAR, SFMASK
    0xc000_0102, 0xc000_0103, // KERNEL_GS_BASE, TSC_AUX
    0xc001_0117, // VM_HSAVE_PA
    0xc001_011f, // VIRT_SPEC_CTRL
];

/// A model-specific register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msr {
    /// The number of the register.
    pub index: u32,
    /// The value of the register.
    pub data: u64,
}

/// The MSRs to save, in the order in which they are written when loading. It is the same for all
/// vCPUs of a VM, so make it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrList {
    listed: Vec<u32>,
    indices: Vec<u32>,
    unreadable: Vec<u32>,
}

impl MsrList {
    /// Returns the MSRs that this KVM lists and those that the list is known to leave out.
    ///
    /// # Errors
    /// Fails if KVM does not return its list.
    pub fn probe(kvm: &Kvm) -> Result<Self, StateError> {
        let mut listed = kvm.get_msr_index_list().map_err(ioctl_error("KVM_GET_MSR_INDEX_LIST"))?.as_slice().to_vec();
        listed.sort_unstable();
        listed.dedup();
        let mut indices = listed.clone();
        indices.extend(MORE_MSRS.iter().copied().chain(MC_BANKS.filter(|index| index % 4 < 2)));
        indices.sort_unstable();
        indices.dedup();
        // a stable sort, which keeps the order of the indices within a rank
        indices.sort_by_key(|index| rank(*index));
        Ok(Self { listed, indices, unreadable: Vec::new() })
    }

    /// Removes the MSRs that cannot be read from `vcpu`, so that later saves do not try them again.
    /// The vCPU's CPUID must be set before, because it decides what can be read.
    ///
    /// # Errors
    /// Fails if KVM reads no MSR at all.
    pub fn learn(&mut self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let (_, unreadable) = read(vcpu, &self.indices)?;
        self.indices.retain(|index| !unreadable.contains(index));
        self.unreadable.extend(unreadable);
        Ok(())
    }

    /// Returns the MSRs to save.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Returns the MSRs that [`learn`](MsrList::learn) removed.
    pub fn unreadable(&self) -> &[u32] {
        &self.unreadable
    }

    /// Returns whether KVM's own list has the MSR, or it is one of those that the list leaves out.
    pub fn has(&self, index: u32) -> bool {
        self.is_listed(index) || MORE_MSRS.contains(&index) || MC_BANKS.contains(&index)
    }

    /// Returns whether KVM's own list has the MSR.
    pub fn is_listed(&self, index: u32) -> bool {
        self.listed.binary_search(&index).is_ok()
    }
}

/// Returns the rank of an MSR in the order of writing:
/// - 0: MSRs that decide whether other state is valid. FEAT_CTL must allow VMX before CR4.VMXE can
///   be set, and nested state is checked against the VMX capabilities. They are written before the
///   segment and control registers.
/// - 1: the TSC, because the deadline is relative to it.
/// - 2: all other MSRs.
/// - 3: the MSRs that start performance counters, after all counters were set.
/// - 4: the TSC deadline, which arms the timer, or fires it at once if the deadline has passed.
pub(super) fn rank(index: u32) -> u8 {
    match index {
        IA32_FEAT_CTL => 0,
        index if VMX_CAPABILITIES.contains(&index) => 0,
        IA32_TSC => 1,
        IA32_PERF_GLOBAL_CTRL | AMD_PERF_GLOBAL_CTL => 3,
        IA32_TSC_DEADLINE => 4,
        _ => 2,
    }
}

/// Returns the address and miscellaneous registers of the machine-check banks in which an error is
/// logged: those whose status register in `msrs` is not zero. To read them for all banks would take
/// half of the time for all MSRs.
pub(super) fn more_of_banks(msrs: &[Msr]) -> Vec<u32> {
    let logged = |msr: &&Msr| MC_BANKS.contains(&msr.index) && msr.index % 4 == 1 && msr.data != 0;
    msrs.iter().filter(logged).flat_map(|msr| [msr.index + 1, msr.index + 2]).collect()
}

/// Returns whether the guest's CPUID says that a feature MSR exists. Returns `None` if the MSR is
/// no feature MSR. With `Some(false)` its value does not matter, because the guest was told that it
/// does not exist.
pub(super) fn is_feature(index: u32, cpuid: &[kvm_cpuid_entry2]) -> Option<bool> {
    let has = |leaf, register: Register, bit: u32| {
        cpuid::find(cpuid, leaf, 0).is_some_and(|entry| register.of(entry) >> bit & 1 != 0)
    };
    match index {
        IA32_ARCH_CAPABILITIES => Some(has(7, Register::Edx, 29)),
        IA32_PERF_CAPABILITIES => Some(has(1, Register::Ecx, 15)),
        index if VMX_CAPABILITIES.contains(&index) => Some(has(1, Register::Ecx, 5)),
        _ => None,
    }
}

/// Returns the feature MSRs with bits that this host does not have. KVM itself accepts any value of
/// them from a VMM.
pub(super) fn beyond_host(kvm: &Kvm, features: &[Msr]) -> Result<Vec<Msr>, StateError> {
    let Some(&guest) = features.iter().find(|msr| msr.index == IA32_ARCH_CAPABILITIES) else { return Ok(Vec::new()) };
    let mut here = from_entries(&[kvm_msr_entry { index: guest.index, ..Default::default() }])?;
    let read = kvm.get_msrs(&mut here).map_err(ioctl_error("KVM_GET_MSRS of features"))?;
    // an MSR that cannot be read does not exist here
    let here = here.as_slice().first().filter(|_| read == 1).map_or(0, |msr| msr.data);
    Ok(if guest.data & !here & !WEAKNESSES == 0 { Vec::new() } else { vec![guest] })
}

/// Reads MSRs. Also returns the numbers of those that could not be read.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<(Vec<Msr>, Vec<u32>), StateError> {
    let (mut found, mut skipped) = (Vec::with_capacity(indices.len()), Vec::new());
    let mut rest = indices;
    while !rest.is_empty() {
        // KVM stops at the first that it refuses
        let chunk = &rest[..rest.len().min(MAX_AT_ONCE)];
        let entries: Vec<_> = chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = from_entries(&entries)?;
        let done = vcpu.get_msrs(&mut msrs).map_err(ioctl_error("KVM_GET_MSRS"))?.min(chunk.len());
        found.extend(msrs.as_slice()[..done].iter().map(|e| Msr { index: e.index, data: e.data }));
        skipped.extend(chunk.get(done));
        rest = rest.get(done + usize::from(done < chunk.len())..).unwrap_or_default();
    }
    Ok((found, skipped))
}

/// Writes MSRs in the given order. Returns those that KVM refused.
pub(super) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<Vec<Msr>, StateError> {
    let mut skipped = Vec::new();
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MAX_AT_ONCE)];
        let entries: Vec<_> =
            chunk.iter().map(|msr| kvm_msr_entry { index: msr.index, data: msr.data, ..Default::default() }).collect();
        let done = vcpu.set_msrs(&from_entries(&entries)?).map_err(ioctl_error("KVM_SET_MSRS"))?.min(chunk.len());
        skipped.extend(chunk.get(done));
        rest = rest.get(done + usize::from(done < chunk.len())..).unwrap_or_default();
    }
    Ok(skipped)
}

/// Returns those of the refused MSRs whose present values differ from the saved ones. An MSR that
/// does not exist here counts as zero.
pub(super) fn still_wrong(vcpu: &VcpuFd, refused: &[Msr]) -> Result<Vec<Msr>, StateError> {
    if refused.is_empty() {
        return Ok(Vec::new());
    }
    let indices: Vec<u32> = refused.iter().map(|msr| msr.index).collect();
    let (now, _) = read(vcpu, &indices)?;
    let here = |index| now.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.data);
    Ok(refused.iter().copied().filter(|msr| here(msr.index) != msr.data).collect())
}

fn from_entries(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    // fails only above KVM_MAX_MSR_ENTRIES, and both callers stay below
    Msrs::from_entries(entries)
        .map_err(|_| StateError::Ioctl { what: "a list of MSRs", source: io::ErrorKind::InvalidInput.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_writing() {
        assert!(rank(IA32_FEAT_CTL) < rank(IA32_TSC));
        assert!(rank(IA32_TSC) < rank(0xc000_0103));
        assert!(rank(0xc000_0103) < rank(IA32_TSC_DEADLINE));
        assert_eq!(more_of_banks(&[Msr { index: 0x405, data: 1 }, Msr { index: 0x409, data: 0 }]), [0x406, 0x407]);
        assert_eq!(MORE_MSRS.iter().collect::<std::collections::HashSet<_>>().len(), MORE_MSRS.len());
    }

    /// The ranks on which the comments of `rank` and of loading rely.
    #[test]
    fn ranks() {
        for (rank, indices) in [
            (0, &[IA32_FEAT_CTL, 0x480, 0x488, 0x491][..]),
            (1, &[IA32_TSC]),
            (2, &[0x47f, 0x492, 0xc000_0080, 0x38e, 0x390, 0xc000_0300]),
            (3, &[IA32_PERF_GLOBAL_CTRL, AMD_PERF_GLOBAL_CTL]),
            (4, &[IA32_TSC_DEADLINE]),
        ] {
            indices.iter().for_each(|&index| assert_eq!(super::rank(index), rank, "{index:#x}"));
        }
    }

    #[test]
    fn msrs_of_features_exist_where_cpuid_says_so() {
        let entry = |function, ecx, edx| kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() };
        for (index, there, but) in [
            (IA32_ARCH_CAPABILITIES, entry(7, 0, 1 << 29), entry(7, !0, !(1 << 29))),
            (IA32_PERF_CAPABILITIES, entry(1, 1 << 15, 0), entry(1, !(1 << 15), !0)),
            (0x480, entry(1, 1 << 5, 0), entry(1, !(1 << 5), !0)),
            (0x491, entry(1, 1 << 5, 0), entry(1, !(1 << 5), !0)),
        ] {
            assert_eq!(is_feature(index, &[there]), Some(true), "{index:#x}");
            assert_eq!(is_feature(index, &[but]), Some(false), "{index:#x}");
            assert_eq!(is_feature(index, &[]), Some(false), "{index:#x}");
        }
        let all = [entry(1, !0, !0), entry(7, !0, !0)];
        assert_eq!([0x10, 0x47f, 0x492].map(|index| is_feature(index, &all)), [None; 3]);
    }

    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// No processor has this MSR.
    const NONE: u32 = 0x1234_5678;

    fn vcpu(kvm: &Kvm) -> (kvm_ioctls::VmFd, VcpuFd) {
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        (vm, vcpu)
    }

    #[test]
    fn a_list_knows_what_exists_and_learns_what_can_be_read() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let (_vm, vcpu) = vcpu(&kvm);
        let mut list = MsrList::probe(&kvm).unwrap();
        let before = list.indices().to_vec();
        assert!(before.is_sorted_by_key(|index| (rank(*index), *index)));
        let unique: std::collections::HashSet<_> = before.iter().collect();
        assert_eq!(unique.len(), before.len());
        for bank in 0..32 {
            let registers = (0x400 + 4 * bank..).take(4).map(|index| before.contains(&index));
            // the address and miscellaneous registers are read where there is an error
            let expected = (0x400 + 4 * bank..).take(4).zip([true, true, false, false]);
            let expected = expected.map(|(index, saved)| saved || list.is_listed(index));
            assert!(registers.eq(expected), "bank {bank}");
        }
        let listed = kvm.get_msr_index_list().unwrap();
        assert!(listed.as_slice().iter().all(|index| list.is_listed(*index) && list.has(*index)));
        assert!(MORE_MSRS.iter().chain(&[0x400, 0x403, 0x47f]).all(|index| list.has(*index)));
        assert!(!list.has(NONE) && !list.is_listed(NONE) && !list.is_listed(0x403));

        assert!(list.unreadable().is_empty());
        list.indices.insert(1, NONE);
        list.learn(&vcpu).unwrap();
        assert!(list.unreadable().contains(&NONE) && list.indices().contains(&IA32_TSC));
        let mut all = [list.indices(), list.unreadable()].concat();
        all.sort_unstable();
        let mut expected = [&before[..], &[NONE]].concat();
        expected.sort_unstable();
        assert_eq!(all, expected);
        let (read, skipped) = read(&vcpu, list.indices()).unwrap();
        assert_eq!((read.len(), skipped), (list.indices().len(), vec![]));
        // what was learned stays
        let unreadable = list.unreadable().to_vec();
        list.learn(&vcpu).unwrap();
        assert_eq!(list.unreadable(), unreadable);
    }

    /// KVM takes 255 MSRs at a time, and stops at the first that it refuses.
    #[test]
    fn msrs_are_read_and_written_beyond_those_that_kvm_refuses() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let (_vm, vcpu) = vcpu(&kvm);
        assert_eq!(write(&vcpu, &[]).unwrap(), []);
        assert_eq!(read(&vcpu, &[]).unwrap(), (vec![], vec![]));
        for length in [1, 254, 255, 256, 257, 600] {
            // at the ends of what is passed to KVM at once, and one after the other
            for refused in [&[][..], &[0], &[253], &[254], &[255], &[254, 255], &[254, 255, 509, 510, 511, 599]] {
                let refused: Vec<usize> = refused.iter().copied().filter(|at| *at < length).collect();
                let msr = |at: usize| match refused.contains(&at) {
                    true => Msr { index: NONE + at as u32, data: 5 },
                    false => Msr { index: KERNEL_GS_BASE, data: at as u64 },
                };
                let msrs: Vec<_> = (0..length).map(msr).collect();
                let not_written: Vec<_> = refused.iter().map(|&at| msr(at)).collect();
                assert_eq!(write(&vcpu, &msrs).unwrap(), not_written, "{length} {refused:?}");
                let last = (0..length).rev().find(|at| !refused.contains(at)).map(|at| at as u64);
                let indices: Vec<_> = msrs.iter().map(|msr| msr.index).collect();
                let (found, skipped) = read(&vcpu, &indices).unwrap();
                assert_eq!(skipped, not_written.iter().map(|msr| msr.index).collect::<Vec<_>>());
                assert_eq!(found.len(), length - refused.len());
                assert!(found.iter().all(|msr| msr.index == KERNEL_GS_BASE && Some(msr.data) == last));
            }
        }
    }

    #[test]
    fn what_kvm_refuses_is_wrong_unless_it_has_the_value() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let (_vm, vcpu) = vcpu(&kvm);
        assert_eq!(write(&vcpu, &[Msr { index: KERNEL_GS_BASE, data: 7 }]).unwrap(), []);
        let [same, other, none, wrong] =
            [(KERNEL_GS_BASE, 7), (KERNEL_GS_BASE, 8), (NONE, 0), (NONE, 1)].map(|(index, data)| Msr { index, data });
        assert_eq!(still_wrong(&vcpu, &[]).unwrap(), []);
        assert_eq!(still_wrong(&vcpu, &[same, none]).unwrap(), []);
        assert_eq!(still_wrong(&vcpu, &[none, other, same, wrong]).unwrap(), [other, wrong]);
    }

    #[test]
    fn features_beyond_the_host_are_found_and_weaknesses_are_none() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let mut here = from_entries(&[kvm_msr_entry { index: IA32_ARCH_CAPABILITIES, ..Default::default() }]).unwrap();
        // a host without the MSR has none of the features
        let here = if kvm.get_msrs(&mut here).unwrap() == 1 { here.as_slice()[0].data } else { 0 };
        let beyond = |data| {
            let msr = Msr { index: IA32_ARCH_CAPABILITIES, data };
            let found = beyond_host(&kvm, &[Msr { index: IA32_PERF_CAPABILITIES, data: !0 }, msr]).unwrap();
            assert!(found.is_empty() || found == [msr]);
            !found.is_empty()
        };
        assert!(!beyond(0) && !beyond(here) && !beyond(here | WEAKNESSES) && !beyond(WEAKNESSES));
        for bit in (0..64).map(|bit| 1 << bit).filter(|bit| (here | WEAKNESSES) & bit == 0) {
            assert!(beyond(bit) && beyond(here | bit), "{bit:#x}");
        }
        assert_eq!(beyond_host(&kvm, &[]).unwrap(), []);
        assert_eq!(beyond_host(&kvm, &[Msr { index: IA32_PERF_CAPABILITIES, data: !0 }]).unwrap(), []);
    }
}
