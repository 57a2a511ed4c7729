//! CPUID: which bits are features, the names of the bits, and which bits do not depend on the host.

use std::fmt;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

impl Register {
    pub(super) fn from_u8(value: u8) -> Option<Self> {
        [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx].into_iter().find(|r| *r as u8 == value)
    }

    /// Returns the value of the register in an entry.
    pub(super) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

/// A set of bits of a CPUID register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidBits {
    /// The leaf (EAX on input).
    pub leaf: u32,
    /// The subleaf (ECX on input).
    pub subleaf: u32,
    /// The register.
    pub register: Register,
    /// The bits.
    pub bits: u32,
}

/// A CPUID register in which each bit stands for a feature.
pub(super) struct Features {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    /// The bits that are not checked: those that a VMM or KVM sets whatever the host is, those that
    /// follow the guest's own settings, and those that KVM offers without listing them.
    pub(super) exempt: u32,
    /// The names of the bits from bit 0 on, separated by spaces. `-` stands for a bit without a
    /// name.
    names: &'static str,
}

impl Features {
    pub(super) fn name(&self, bit: u32) -> Option<&'static str> {
        self.names.split_ascii_whitespace().nth(bit as usize).filter(|name| *name != "-")
    }
}

const fn features(leaf: u32, subleaf: u32, register: Register, exempt: u32, names: &'static str) -> Features {
    Features { leaf, subleaf, register, exempt, names }
}

const fn bits<const N: usize>(bits: [u32; N]) -> u32 {
    let (mut mask, mut i) = (0, 0);
    while i < N {
        mask |= 1 << bits[i];
        i += 1;
    }
    mask
}

use Register::{Eax, Ebx, Ecx, Edx};

/// The leaf with the hypervisor's signature. If it is KVM's, the next leaf has KVM's features.
pub(super) const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// The leaf whose EAX has the number of bits of physical and virtual addresses.
pub(super) const ADDRESS_SIZES: u32 = 0x8000_0008;
/// The leaf that describes the XSAVE area.
pub(super) const XSTATE: u32 = 0xd;

pub(super) const FEATURES: &[Features] = &[
    // MONITOR follows MISC_ENABLE, and OSXSAVE follows CR4. KVM emulates the x2APIC and the TSC
    // deadline timer on every host, but older KVMs do not list the latter. The VMM sets the
    // hypervisor bit.
    features(
        1,
        0,
        Ecx,
        bits([3, 21, 24, 27, 31]),
        "SSE3 PCLMULQDQ DTES64 MONITOR DS-CPL VMX SMX EIST TM2 SSSE3 CNXT-ID SDBG FMA CX16 xTPR PDCM - PCID DCA SSE4.1 \
         SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES XSAVE OSXSAVE AVX F16C RDRAND hypervisor",
    ),
    // APIC follows the APIC base, and HTT is topology.
    features(
        1,
        0,
        Edx,
        bits([9, 28]),
        "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV PAT PSE36 PSN CLFSH - DS ACPI MMX FXSR SSE SSE2 \
         SS HTT TM IA64 PBE",
    ),
    // KVM itself provides the APIC timer that runs in all power states.
    features(6, 0, Eax, !0, ""),
    features(
        7,
        0,
        Ebx,
        0,
        "FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 FDP SMEP BMI2 ERMS INVPCID RTM PQM FPCSDS MPX PQE AVX512F AVX512DQ RDSEED \
         ADX SMAP AVX512_IFMA - CLFLUSHOPT CLWB PT AVX512PF AVX512ER AVX512CD SHA AVX512BW AVX512VL",
    ),
    // OSPKE follows CR4.
    features(
        7,
        0,
        Ecx,
        bits([4]),
        "PREFETCHWT1 AVX512_VBMI UMIP PKU OSPKE WAITPKG AVX512_VBMI2 SHSTK GFNI VAES VPCLMULQDQ AVX512_VNNI \
         AVX512_BITALG TME AVX512_VPOPCNTDQ - LA57 - - - - - RDPID KL BUS_LOCK CLDEMOTE - MOVDIRI MOVDIR64B ENQCMD \
         SGX_LC PKS",
    ),
    features(
        7,
        0,
        Edx,
        0,
        "- SGX_KEYS AVX512_4VNNIW AVX512_4FMAPS FSRM UINTR - - AVX512_VP2INTERSECT SRBDS_CTRL MD_CLEAR RTM_ALWAYS_ABORT \
         - RTM_FORCE_ABORT SERIALIZE HYBRID TSXLDTRK - PCONFIG ARCH_LBR IBT - AMX_BF16 AVX512_FP16 AMX_TILE AMX_INT8 \
         SPEC_CTRL STIBP L1D_FLUSH ARCH_CAPABILITIES CORE_CAPABILITIES SSBD",
    ),
    features(
        7,
        1,
        Eax,
        0,
        "SHA512 SM3 SM4 RAO_INT AVX_VNNI AVX512_BF16 LASS CMPCCXADD ARCHPERFMONEXT - FZRM FSRS FSRC - - - - FRED LKGS \
         WRMSRNS NMI_SRC AMX_FP16 HRESET AVX_IFMA - - LAM MSRLIST",
    ),
    features(7, 1, Edx, 0, "- - - - AVX_VNNI_INT8 AVX_NE_CONVERT - - AMX_COMPLEX - AVX_VNNI_INT16 - - - PREFETCHITI"),
    features(7, 2, Edx, 0, "PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO"),
    features(
        XSTATE,
        0,
        Eax,
        0,
        "x87 SSE AVX MPX-BNDREGS MPX-BNDCSR AVX512-opmask AVX512-ZMM_Hi256 AVX512-Hi16_ZMM - PKRU \
         - - - - - - - AMX-TILECFG AMX-TILEDATA APX",
    ),
    features(XSTATE, 0, Edx, 0, ""),
    features(XSTATE, 1, Eax, 0, "XSAVEOPT XSAVEC XGETBV1 XSAVES XFD"),
    features(XSTATE, 1, Ecx, 0, "- - - - - - - - - - - CET_U CET_S"),
    // The VMM implements MAP_GPA_RANGE, extended destinations of MSIs, and migration control.
    features(
        KVM_FEATURES,
        0,
        Eax,
        bits([15, 16, 17]),
        "kvm-clocksource kvm-nop-io-delay kvm-mmu-op kvm-clocksource2 kvm-async-pf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt - kvm-pv-tlb-flush kvm-async-pf-vmexit kvm-pv-send-ipi kvm-poll-control kvm-pv-sched-yield \
         kvm-async-pf-int kvm-msi-ext-dest-id kvm-hc-map-gpa-range kvm-migration-control - - - - - - \
         kvm-clocksource-stable",
    ),
    // CMP_LEGACY, EXTAPIC and TOPOEXT are topology.
    features(
        0x8000_0001,
        0,
        Ecx,
        bits([1, 3, 22]),
        "LAHF_LM CMP_LEGACY SVM EXTAPIC CR8_LEGACY ABM SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW IBS XOP SKINIT WDT - LWP \
         FMA4 TCE - NODEID_MSR - TBM TOPOEXT PERFCTR_CORE PERFCTR_NB - DBX PERFTSC PCX_L2I MONITORX ADDR_MASK_EXT",
    ),
    // APIC is exempt as in leaf 1.
    features(
        0x8000_0001,
        0,
        Edx,
        bits([9]),
        "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SYSCALL MTRR PGE MCA CMOV PAT PSE36 - MP NX - MMXEXT MMX FXSR FXSR_OPT \
         PDPE1GB RDTSCP - LM 3DNOWEXT 3DNOW",
    ),
    features(0x8000_0007, 0, Edx, 0, "TS FID VID TTP TM STC 100MHzSteps HwPstate InvariantTSC CPB"),
    features(
        ADDRESS_SIZES,
        0,
        Ebx,
        0,
        "CLZERO IRPERF XSAVEERPTR INVLPGB RDPRU - - - MCOMMIT WBNOINVD - - IBPB INT_WBINVD IBRS STIBP - STIBP_ALWAYS_ON \
         IBRS_SAME_MODE EFER_LMSLE_UNSUPPORTED - - - PPIN SSBD VIRT_SSBD SSB_NO CPPC PSFD BTC_NO IBPB_RET",
    ),
    features(
        0x8000_000a,
        0,
        Edx,
        0,
        "NPT LBRV SVML NRIPS TSC_SCALE VMCB_CLEAN FLUSHBYASID DECODEASSISTS - - PAUSEFILTER - PFTHRESHOLD AVIC - \
         V_VMSAVE_VMLOAD VGIF",
    ),
    features(
        0x8000_0021,
        0,
        Eax,
        0,
        "NO_NESTED_DATA_BP FSGS_NON_SERIAL LFENCE_RDTSC - - - NULL_SEL_CLR_BASE UPPER_ADDR_IGNORE AUTOIBRS \
         NO_SMM_CTL_MSR",
    ),
];

/// Returns the entry of a leaf and subleaf.
pub(super) fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == leaf && e.index == subleaf)
}

/// Returns the feature bits that `guest` has and `host` does not have, without the exempt ones.
pub(super) fn lacking<'a>(
    guest: &'a [kvm_cpuid_entry2],
    host: &'a [kvm_cpuid_entry2],
) -> impl Iterator<Item = (&'static Features, u32)> + 'a {
    let kvm = find(guest, KVM_SIGNATURE, 0).is_some_and(|e| (e.ebx, e.ecx, e.edx) == (0x4b4d_564b, 0x564b_4d56, 0x4d));
    FEATURES.iter().filter_map(move |f| {
        // with another signature the leaf has another meaning, which only the VMM and KVM need to
        // know
        if f.leaf == KVM_FEATURES && !kvm {
            return None;
        }
        let has = |entries| find(entries, f.leaf, f.subleaf).map_or(0, |e| f.register.of(e));
        let bits = has(guest) & !has(host) & !f.exempt;
        (bits != 0).then_some((f, bits))
    })
}

/// Returns what this KVM offers: the features that it supports in hardware, and those that it
/// emulates if a VMM requests them.
pub(super) fn offered(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let mut entries = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?.as_slice().to_vec();
    if let Ok(emulated) = kvm.get_emulated_cpuid(KVM_MAX_CPUID_ENTRIES) {
        add_emulated(&mut entries, emulated.as_slice());
    }
    Ok(entries)
}

/// Adds the bits that KVM emulates to those leaves of `entries` whose bits are features.
fn add_emulated(entries: &mut [kvm_cpuid_entry2], emulated: &[kvm_cpuid_entry2]) {
    for more in emulated {
        let is_feature = FEATURES.iter().any(|f| f.leaf == more.function && f.subleaf == more.index);
        match entries.iter_mut().find(|e| e.function == more.function && e.index == more.index) {
            Some(entry) if is_feature => {
                entry.eax |= more.eax;
                entry.ebx |= more.ebx;
                entry.ecx |= more.ecx;
                entry.edx |= more.edx;
            }
            _ => {}
        }
    }
}

/// Returns the TSC frequency of the host in kHz. Creates a scratch VM, because no other query works
/// with every KVM.
pub(super) fn host_tsc_khz(kvm: &Kvm) -> Option<u32> {
    let vm = kvm.create_vm().ok()?;
    vm.create_vcpu(0).ok()?.get_tsc_khz().ok().filter(|khz| *khz > 0)
}

/// Returns whether two CPUIDs are equal except for the bits that KVM itself changes while the guest
/// runs. These follow CR4, the APIC base, MISC_ENABLE and XCR0.
pub(super) fn same_but_for_dynamic_bits(a: &[kvm_cpuid_entry2], b: &[kvm_cpuid_entry2]) -> bool {
    let fixed = |e: &kvm_cpuid_entry2| {
        let mut e = *e;
        match (e.function, e.index) {
            (1, _) => {
                e.ecx &= !bits([3, 27]);
                e.edx &= !bits([9]);
            }
            (7, 0) => e.ecx &= !bits([4]),
            (XSTATE, 0 | 1) => e.ebx = 0,
            (0x8000_0001, _) => e.edx &= !bits([9]),
            _ => {}
        }
        e.padding = [0; 3];
        e
    };
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| fixed(a) == fixed(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_at_their_bits() {
        let name = |leaf, register, bit| {
            FEATURES.iter().find(|f| f.leaf == leaf && f.subleaf == 0 && f.register == register).unwrap().name(bit)
        };
        assert_eq!(name(1, Ecx, 28), Some("AVX"));
        assert_eq!(name(1, Ecx, 31), Some("hypervisor"));
        assert_eq!(name(1, Edx, 26), Some("SSE2"));
        assert_eq!(name(1, Edx, 31), Some("PBE"));
        assert_eq!(name(7, Ebx, 5), Some("AVX2"));
        assert_eq!(name(7, Ebx, 31), Some("AVX512VL"));
        assert_eq!(name(7, Ecx, 22), Some("RDPID"));
        assert_eq!(name(7, Ecx, 31), Some("PKS"));
        assert_eq!(name(7, Edx, 24), Some("AMX_TILE"));
        assert_eq!(name(7, Edx, 31), Some("SSBD"));
        assert_eq!(name(0x8000_0001, Edx, 27), Some("RDTSCP"));
        assert_eq!(name(0x8000_0001, Edx, 29), Some("LM"));
        assert_eq!(name(0x8000_0001, Ecx, 22), Some("TOPOEXT"));
        assert_eq!(name(0x8000_0007, Edx, 8), Some("InvariantTSC"));
        assert_eq!(name(0x8000_0008, Ebx, 12), Some("IBPB"));
        assert_eq!(name(0x8000_0008, Ebx, 24), Some("SSBD"));
        assert_eq!(name(KVM_FEATURES, Eax, 14), Some("kvm-async-pf-int"));
        assert_eq!(name(KVM_FEATURES, Eax, 24), Some("kvm-clocksource-stable"));
        assert_eq!(name(XSTATE, Eax, 9), Some("PKRU"));
        assert_eq!(name(XSTATE, Eax, 18), Some("AMX-TILEDATA"));
        assert_eq!(name(1, Ecx, 16), None);
    }

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn emulated_bits_are_added_to_features_only() {
        let mut entries = [
            entry(2, 0, [1; 4]),
            entry(1, 0, [0b0011; 4]),
            entry(7, 1, [4; 4]),
            entry(7, 0, [0; 4]),
            entry(7, 3, [8; 4]),
        ];
        let emulated = [
            entry(1, 0, [0b0101, 0b1001, 0b0111, 0b0011]),
            // numbers and not bits, a subleaf without features, and a leaf that is not there
            entry(2, 0, [6; 4]),
            entry(7, 3, [7; 4]),
            entry(0x8000_0001, 0, [!0; 4]),
            entry(7, 0, [0, 1 << 31, 2, 3]),
        ];
        add_emulated(&mut entries, &emulated);
        let expected = [
            entry(2, 0, [1; 4]),
            entry(1, 0, [0b0111, 0b1011, 0b0111, 0b0011]),
            entry(7, 1, [4; 4]),
            entry(7, 0, [0, 1 << 31, 2, 3]),
            entry(7, 3, [8; 4]),
        ];
        assert_eq!(entries, expected);
    }

    /// Changes each bit of each register, in every leaf with bits that do not count, and in one
    /// leaf without any.
    #[test]
    fn only_what_the_guest_changes_itself_does_not_count() {
        let dynamic = [
            (1, 0, [0, 0, bits([3, 27]), bits([9])]),
            (7, 0, [0, 0, bits([4]), 0]),
            (7, 1, [0; 4]),
            (XSTATE, 0, [0, !0, 0, 0]),
            (XSTATE, 1, [0, !0, 0, 0]),
            (XSTATE, 2, [0; 4]),
            (0x8000_0001, 0, [0, 0, 0, bits([9])]),
            (2, 0, [0; 4]),
        ];
        for (function, index, free) in dynamic {
            for (register, bit) in (0..4).flat_map(|register| (0..32).map(move |bit| (register, bit))) {
                for before in [0, !0] {
                    let (a, mut b) = ([before; 4], [before; 4]);
                    b[register] ^= 1 << bit;
                    let list = |registers| [entry(0, 0, [1; 4]), entry(function, index, registers)];
                    let same = same_but_for_dynamic_bits(&list(a), &list(b));
                    let what = format!("leaf {function:#x}.{index}, register {register}, bit {bit}");
                    assert_eq!(same, free[register] >> bit & 1 != 0, "{what}");
                }
            }
        }
        let one = entry(1, 0, [0; 4]);
        assert!(!same_but_for_dynamic_bits(&[one], &[one, one]) && same_but_for_dynamic_bits(&[one], &[one]));
        assert!(!same_but_for_dynamic_bits(&[one], &[entry(1, 1, [0; 4])]));
    }

    #[test]
    fn features_of_kvm_count_only_under_its_signature() {
        let kvm = entry(KVM_SIGNATURE, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
        let other = entry(KVM_SIGNATURE, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4e]);
        let guest =
            |signature| [signature, entry(KVM_FEATURES, 0, [1 << 15 | 1 << 5, 0, 0, 0]), entry(1, 0, [0, 0, 3, 0])];
        let found = |guest: &[kvm_cpuid_entry2]| -> Vec<_> {
            let host = [entry(1, 0, [0, 0, 1, 0])];
            lacking(guest, &host).map(|(f, bits)| (f.leaf, f.register, bits)).collect()
        };
        assert_eq!(found(&guest(kvm)), [(1, Ecx, 2), (KVM_FEATURES, Eax, 1 << 5)]);
        assert_eq!(found(&guest(other)), [(1, Ecx, 2)]);
    }
}
