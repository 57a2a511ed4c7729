//! The host features that a VM's vCPUs need. A destination compares them with its own and can
//! refuse the VM before any RAM is sent.

use std::{error::Error, fmt};

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use migration_core::text::describe;

use super::{
    Irqchip, Msr, MsrList, StateError,
    cpuid::{self, ADDRESS_SIZES, CpuidBits, FEATURES, Register, XSTATE, host_tsc_khz, offered},
    ioctl_error,
    items::{ItemWriter, Items},
    msrs::{self, MAX_MSRS},
    sys::{self, NESTED_HEADER, XSAVE_SIZE},
    vcpu::{read_cpuid, read_indices, read_msrs, write_cpuid, write_msrs},
};

/// The largest difference of two TSC frequencies that count as equal, in parts per million. The
/// value is that of KVM: frequencies that are nominally equal are measured a little differently at
/// each boot.
pub const TSC_TOLERANCE_PPM: u32 = 250;

/// The largest number of capabilities; there are about ten.
const MAX_CAPS: usize = 256;
/// The largest number of CPUID registers in which the VMM has set bits of its own: those of
/// [`FEATURES`], with room for more.
const MAX_OWN: usize = 256;
const VERSION: u32 = 1;

const ITEM_VERSION: u16 = 0;
const ITEM_CPUID: u16 = 1;
const ITEM_OWN_CPUID: u16 = 2;
const ITEM_XCR0: u16 = 3;
const ITEM_XSAVE_SIZE: u16 = 4;
const ITEM_TSC_KHZ: u16 = 5;
const ITEM_MSRS: u16 = 6;
const ITEM_IRQCHIP: u16 = 7;
const ITEM_NESTED: u16 = 8;
const ITEM_CAPS: u16 = 9;
const ITEM_FEATURE_MSRS: u16 = 10;

/// The checked capabilities with their names.
const CAP_NAMES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::NestedState, "KVM_CAP_NESTED_STATE"),
];

/// The host features that a VM's vCPUs need.
#[derive(Clone, Debug, PartialEq)]
pub struct HostNeeds {
    /// The CPUID of vCPU 0. The destination may build the VM with it.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The bits of `cpuid` that the source's KVM does not offer either. The VMM has set them on its
    /// own responsibility, so they are not checked. Leaf 0 here means that the VMM shows another
    /// vendor than the host's.
    pub own_cpuid: Vec<CpuidBits>,
    /// XCR0 of vCPU 0: the components of the extended state that the guest has turned on.
    pub xcr0: u64,
    /// The size of the XSAVE area in bytes, for all components that CPUID permits.
    pub xsave_size: u32,
    /// The frequency of the guest's TSC in kHz, or `None` if the source's KVM does not report it.
    pub tsc_khz: Option<u32>,
    /// The MSRs that the guest uses: those that the source's KVM has and that are not zero.
    pub msrs: Vec<u32>,
    /// The MSRs that report features to the guest like CPUID does, with their values.
    pub feature_msrs: Vec<Msr>,
    /// The interrupt controllers that KVM emulates.
    pub irqchip: Irqchip,
    /// Whether the guest runs nested guests at this moment.
    pub nested: bool,
    /// The capabilities (numbers of `KVM_CAP_*`) without which the state cannot be loaded.
    pub caps: Vec<u32>,
}

/// The reason why a host cannot run a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mismatch {
    /// Querying this host's KVM failed.
    Probe(String),
    /// The guest's processor is of another vendor.
    Vendor {
        /// The vendor that the guest sees.
        guest: String,
        /// The vendor of the host.
        host: String,
    },
    /// The guest sees a feature that this host does not offer.
    Feature {
        /// The CPUID bit of the feature.
        bit: CpuidBits,
        /// The name of the feature, if known.
        name: Option<&'static str>,
    },
    /// The guest may use longer physical addresses than this host has.
    AddressBits {
        /// The number of address bits of the guest.
        guest: u8,
        /// The number of address bits of the host.
        host: u8,
    },
    /// The guest has turned on components of the extended state that this host does not have.
    Xcr0 {
        /// The components, as bits of XCR0.
        missing: u64,
    },
    /// The guest's extended state is larger than that of this host.
    XsaveSize {
        /// The size for the guest in bytes.
        guest: u32,
        /// The size of the host in bytes.
        host: u32,
    },
    /// The guest's TSC has another frequency, and this host cannot scale it.
    TscKhz {
        /// The guest's frequency in kHz.
        guest: u32,
        /// The host's frequency in kHz, or `None` if it does not report it.
        host: Option<u32>,
    },
    /// The guest uses an MSR that this host does not have.
    Msr(u32),
    /// The guest sees an MSR with features, and the MSR cannot have this value here.
    FeatureMsr(Msr),
    /// KVM lacks a capability.
    Capability {
        /// The number of the capability.
        number: u32,
        /// The name of the capability, if known.
        name: Option<&'static str>,
    },
    /// This KVM does not accept the guest's CPUID as a whole.
    CpuidRefused(String),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe(why) => write!(f, "a query of this host's KVM failed: {why}"),
            Self::Vendor { guest, host } => write!(f, "the guest's processor is of {guest}, this host's of {host}"),
            Self::Feature { bit: CpuidBits { leaf, subleaf, register, bits }, name } => {
                let name = name.unwrap_or("an unnamed feature");
                let bit = bits.trailing_zeros();
                write!(f, "this host lacks {name} (CPUID leaf {leaf:#x}, subleaf {subleaf}, {register} bit {bit})")
            }
            Self::AddressBits { guest, host } => {
                write!(f, "the guest may use {guest} bits of physical address, this host has {host}")
            }
            Self::Xcr0 { missing } => {
                let features = FEATURES.iter().find(|f| (f.leaf, f.register) == (XSTATE, Register::Eax));
                let name = |bit| features.and_then(|f| f.name(bit)).map_or(format!("bit {bit}"), str::to_owned);
                let names: Vec<String> = (0..64).filter(|bit| missing >> bit & 1 != 0).map(name).collect();
                write!(f, "this host lacks extended state that the guest has turned on in XCR0: {}", names.join(", "))
            }
            Self::XsaveSize { guest, host } => {
                write!(f, "the guest's extended state takes {guest} bytes, this host has room for {host}")
            }
            Self::TscKhz { guest, host } => {
                let host = host.map_or("of unknown frequency".to_owned(), |khz| format!("at {khz} kHz"));
                write!(f, "the guest's TSC runs at {guest} kHz, this host's {host}, and it cannot scale")
            }
            Self::Msr(index) => write!(f, "the guest uses MSR {index:#x}, which this host does not have"),
            Self::FeatureMsr(Msr { index, data }) => {
                write!(f, "the guest sees features in MSR {index:#x} = {data:#x} that this host does not offer")
            }
            Self::Capability { number, name } => match name {
                Some(name) => write!(f, "this KVM lacks {name}"),
                None => write!(f, "this KVM lacks capability {number}"),
            },
            Self::CpuidRefused(why) => write!(f, "this KVM does not accept the guest's CPUID: {why}"),
        }
    }
}

impl Error for Mismatch {}

/// Returns whether two TSC frequencies in kHz count as equal.
pub(super) fn within_tolerance(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(b) * u64::from(TSC_TOLERANCE_PPM)
}

impl HostNeeds {
    /// Returns what a VM needs. Queries its vCPU 0, whose CPUID must be set. The call blocks while
    /// that vCPU runs, so call it before, or on the vCPU's own thread.
    ///
    /// # Errors
    /// Fails if a query of KVM fails.
    pub fn of(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, irqchip: Irqchip) -> Result<Self, StateError> {
        let cpuid = vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl_error("KVM_GET_CPUID2"))?
            .as_slice()
            .to_vec();
        let host = offered(kvm).map_err(ioctl_error("KVM_GET_SUPPORTED_CPUID"))?;
        let mut own_cpuid: Vec<CpuidBits> = cpuid::lacking(&cpuid, &host)
            .map(|(f, bits)| CpuidBits { leaf: f.leaf, subleaf: f.subleaf, register: f.register, bits })
            .collect();
        if vendor(&cpuid) != vendor(&host) {
            own_cpuid.push(CpuidBits { leaf: 0, subleaf: 0, register: Register::Ebx, bits: !0 });
        }
        if address_bits(&cpuid) > address_bits(&host) {
            own_cpuid.push(CpuidBits { leaf: ADDRESS_SIZES, subleaf: 0, register: Register::Eax, bits: 0xff });
        }
        let mut xcr0 = 1;
        if vm.check_extension(Cap::Xcrs) {
            let xcrs = vcpu.get_xcrs().map_err(ioctl_error("KVM_GET_XCRS"))?;
            xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value);
        }
        let xsave_size = cpuid::find(&cpuid, XSTATE, 0).map_or(0, |e| e.ecx).max(XSAVE_SIZE as u32);
        let list = MsrList::probe(kvm)?;
        let (values, _) = msrs::read(vcpu, list.indices())?;
        let feature = |msr: &&Msr| msrs::is_feature(msr.index, &cpuid) == Some(true);
        let feature_msrs = values.iter().filter(feature).copied().collect();
        let used = |msr: &&Msr| msr.data != 0 && msrs::is_feature(msr.index, &cpuid) != Some(false);
        let msrs = values.iter().filter(used).map(|msr| msr.index).collect();
        let nested = sys::nested(vcpu).is_ok_and(|state| state.len() > NESTED_HEADER);
        let needed = |cap: Cap| match cap {
            Cap::Irqchip => irqchip == Irqchip::Full,
            Cap::Pit2 => irqchip == Irqchip::Full && vm.get_pit2().is_ok(),
            Cap::SplitIrqchip => irqchip == Irqchip::Split,
            Cap::Xsave2 => xsave_size as usize > XSAVE_SIZE,
            Cap::NestedState => nested,
            // parts that the source lacks are not saved, so they need not be loaded
            other => vm.check_extension(other),
        };
        let caps = CAP_NAMES.iter().filter(|(cap, _)| needed(*cap)).map(|(cap, _)| *cap as u32).collect();
        let tsc_khz = vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0);
        Ok(Self { cpuid, own_cpuid, xcr0, xsave_size, tsc_khz, msrs, feature_msrs, irqchip, nested, caps })
    }

    /// Checks whether the host of this KVM has everything that is needed. Takes milliseconds,
    /// because it creates a scratch VM.
    ///
    /// # Errors
    /// Returns everything that the host lacks.
    pub fn check(&self, kvm: &Kvm) -> Result<(), Vec<Mismatch>> {
        let probe = |e: &dyn Error| vec![Mismatch::Probe(describe(e))];
        let host = offered(kvm).map_err(|e| probe(&e))?;
        let list = MsrList::probe(kvm).map_err(|e| probe(&e))?;
        let vm = kvm.create_vm().map_err(|e| probe(&e))?;
        let mut found = self.check_cpuid(&host);
        let host_xcr0 = cpuid::find(&host, XSTATE, 0).map_or(1, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
        let missing = self.xcr0 & !host_xcr0;
        if missing != 0 {
            found.push(Mismatch::Xcr0 { missing });
        }
        let room = u32::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_SIZE as u32);
        if self.xsave_size > room {
            found.push(Mismatch::XsaveSize { guest: self.xsave_size, host: room });
        }
        if let Some(guest) = self.tsc_khz
            && !vm.check_extension(Cap::TscControl)
        {
            let host = host_tsc_khz(kvm);
            if !host.is_some_and(|host| within_tolerance(host, guest)) {
                found.push(Mismatch::TscKhz { guest, host });
            }
        }
        found.extend(self.msrs.iter().copied().filter(|index| !list.has(*index)).map(Mismatch::Msr));
        found.extend(self.caps.iter().copied().filter(|cap| vm.check_extension_raw((*cap).into()) <= 0).map(
            |number| {
                let name = CAP_NAMES.iter().find(|(cap, _)| *cap as u32 == number).map(|(_, name)| *name);
                Mismatch::Capability { number, name }
            },
        ));
        let beyond = msrs::beyond_host(kvm, &self.feature_msrs).map_err(|e| probe(&e))?;
        found.extend(beyond.into_iter().map(Mismatch::FeatureMsr));
        // only if there is no more specific reason
        if found.is_empty() {
            match self.try_features(&vm) {
                Ok(wrong) => found.extend(wrong.into_iter().map(Mismatch::FeatureMsr)),
                Err(why) => found.push(Mismatch::CpuidRefused(why)),
            }
        }
        if found.is_empty() { Ok(()) } else { Err(found) }
    }

    fn check_cpuid(&self, host: &[kvm_cpuid_entry2]) -> Vec<Mismatch> {
        let mut found = Vec::new();
        let own = |leaf, subleaf, register| {
            let own = self.own_cpuid.iter().filter(|o| (o.leaf, o.subleaf, o.register) == (leaf, subleaf, register));
            own.fold(0, |bits, o| bits | o.bits)
        };
        let (ours, theirs) = (vendor(host), vendor(&self.cpuid));
        if ours != theirs && own(0, 0, Register::Ebx) == 0 {
            found.push(Mismatch::Vendor { guest: theirs, host: ours });
        }
        for (f, bits) in cpuid::lacking(&self.cpuid, host) {
            let bits = bits & !own(f.leaf, f.subleaf, f.register);
            for bit in (0..32).filter(|bit| bits >> bit & 1 != 0) {
                let at = CpuidBits { leaf: f.leaf, subleaf: f.subleaf, register: f.register, bits: 1 << bit };
                found.push(Mismatch::Feature { bit: at, name: f.name(bit) });
            }
        }
        let (guest, here) = (address_bits(&self.cpuid), address_bits(host));
        if guest > here && own(ADDRESS_SIZES, 0, Register::Eax) == 0 {
            found.push(Mismatch::AddressBits { guest, host: here });
        }
        found
    }

    /// Sets CPUID and feature MSRs of a scratch vCPU. Returns the MSRs that it refuses.
    fn try_features(&self, vm: &VmFd) -> Result<Vec<Msr>, String> {
        let vcpu = vm.create_vcpu(0).map_err(describe)?;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| "too many entries".to_owned())?;
        vcpu.set_cpuid2(&cpuid).map_err(describe)?;
        let refused = msrs::write(&vcpu, &self.feature_msrs).map_err(describe)?;
        msrs::still_wrong(&vcpu, &refused).map_err(describe)
    }

    /// Returns the encoding that is sent to the destination.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = ItemWriter::new();
        w.u32(ITEM_VERSION, VERSION);
        w.with(ITEM_CPUID, |w| write_cpuid(w, &self.cpuid));
        w.with(ITEM_OWN_CPUID, |w| {
            w.count(self.own_cpuid.len());
            for own in &self.own_cpuid {
                w.u32(own.leaf).u32(own.subleaf).u8(own.register as u8).u32(own.bits);
            }
        });
        w.u64(ITEM_XCR0, self.xcr0);
        w.u32(ITEM_XSAVE_SIZE, self.xsave_size);
        if let Some(khz) = self.tsc_khz {
            w.u32(ITEM_TSC_KHZ, khz);
        }
        let numbers = |w: &mut ItemWriter, tag, numbers: &[u32]| {
            w.with(tag, |w| {
                w.count(numbers.len());
                numbers.iter().for_each(|n| {
                    w.u32(*n);
                });
            });
        };
        numbers(&mut w, ITEM_MSRS, &self.msrs);
        w.with(ITEM_FEATURE_MSRS, |w| write_msrs(w, &self.feature_msrs));
        w.bytes(ITEM_IRQCHIP, &[self.irqchip as u8]);
        w.bytes(ITEM_NESTED, &[self.nested.into()]);
        numbers(&mut w, ITEM_CAPS, &self.caps);
        w.finish()
    }

    /// Decodes what [`encode`](HostNeeds::encode) returned.
    ///
    /// # Errors
    /// Fails if a part is missing, unknown or present twice, or has a wrong size or an invalid
    /// value.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let missing = |name| StateError::MissingItem { name };
        let mut items = Items::parse(bytes)?;
        let version = items.take_u32(ITEM_VERSION, "version")?.ok_or(missing("version"))?;
        if version != VERSION {
            return Err(StateError::Version { name: "the needs of the host", found: version });
        }
        let cpuid = items.take_with(ITEM_CPUID, read_cpuid)?.ok_or(missing("CPUID"))?;
        let own_cpuid = items.take_with(ITEM_OWN_CPUID, |r| {
            let count = r.count(MAX_OWN, "CPUID bits of the VMM")?;
            let mut own = Vec::new();
            for _ in 0..count {
                let (leaf, subleaf, register) = (r.u32("CPUID leaf")?, r.u32("CPUID subleaf")?, r.u8("register")?);
                let register = Register::from_u8(register).ok_or_else(|| {
                    migration_core::codec::DecodeError::invalid("register", format!("{register} is no register"))
                })?;
                own.push(CpuidBits { leaf, subleaf, register, bits: r.u32("CPUID bits")? });
            }
            Ok(own)
        })?;
        let xcr0 = items.take_u64(ITEM_XCR0, "XCR0")?.ok_or(missing("XCR0"))?;
        let xsave_size = items.take_u32(ITEM_XSAVE_SIZE, "XSAVE size")?.ok_or(missing("XSAVE size"))?;
        let tsc_khz = items.take_u32(ITEM_TSC_KHZ, "TSC kHz")?;
        let msrs = items.take_with(ITEM_MSRS, read_indices)?.ok_or(missing("MSRs"))?;
        let feature_msrs = items.take_with(ITEM_FEATURE_MSRS, read_msrs)?.ok_or(missing("feature MSRs"))?;
        let irqchip = items.take_with(ITEM_IRQCHIP, |r| Irqchip::from_u8(r.u8("irqchip")?))?;
        let irqchip = irqchip.ok_or(missing("kind of irqchip"))?;
        let nested = items.take_with(ITEM_NESTED, |r| r.bool("nested"))?.ok_or(missing("nested"))?;
        let caps = items.take_with(ITEM_CAPS, |r| {
            let count = r.count(MAX_CAPS, "capabilities")?;
            (0..count).map(|_| r.u32("capability")).collect::<Result<Vec<_>, _>>()
        })?;
        items.finish()?;
        Ok(Self {
            cpuid,
            own_cpuid: own_cpuid.unwrap_or_default(),
            xcr0,
            xsave_size,
            tsc_khz,
            msrs,
            feature_msrs,
            irqchip,
            nested,
            caps: caps.ok_or(missing("capabilities"))?,
        })
    }
}

const _: () = assert!(FEATURES.len() + 2 <= MAX_OWN && MAX_MSRS >= 1024);

/// Returns the vendor's name in leaf 0.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let Some(e) = cpuid::find(entries, 0, 0) else { return String::new() };
    let bytes: Vec<u8> = [e.ebx, e.edx, e.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' }).collect()
}

/// Returns the number of bits of a physical address, or 36 if CPUID does not report it.
fn address_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    cpuid::find(entries, ADDRESS_SIZES, 0).map_or(36, |e| e.eax as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// Returns CPUID of a vendor with four characters, repeated, with address bits and features.
    fn cpuid(vendor: &[u8; 4], address_bits: u32, features: u32) -> Vec<kvm_cpuid_entry2> {
        let name = u32::from_le_bytes(*vendor);
        // in leaf 0 the order of the registers is EBX, EDX, ECX
        let other = u32::from_le_bytes(*b"1234");
        vec![
            entry(0, [9, name, other, name]),
            entry(1, [0, 0, features, 0]),
            // the number of bits of linear addresses follows
            entry(ADDRESS_SIZES, [48 << 8 | address_bits, 0, 0, 0]),
        ]
    }

    fn needs(cpuid: Vec<kvm_cpuid_entry2>, own: &[(u32, Register, u32)]) -> HostNeeds {
        let own = own.iter().map(|&(leaf, register, bits)| CpuidBits { leaf, subleaf: 0, register, bits });
        HostNeeds {
            cpuid,
            own_cpuid: own.collect(),
            xcr0: 1,
            xsave_size: XSAVE_SIZE as u32,
            tsc_khz: None,
            msrs: Vec::new(),
            feature_msrs: Vec::new(),
            irqchip: Irqchip::None,
            nested: false,
            caps: Vec::new(),
        }
    }

    #[test]
    fn what_the_guest_sees_is_compared_with_what_the_host_has() {
        use Register::{Eax, Ebx, Ecx};
        let host = cpuid(b"Good", 40, 0b0101);
        let found = |guest, own: &[_]| needs(guest, own).check_cpuid(&host);
        assert_eq!(found(host.clone(), &[]), []);
        assert_eq!(found(cpuid(b"Good", 39, 0b0001), &[]), []);

        let vendor = Mismatch::Vendor { guest: "EvilEvil1234".into(), host: "GoodGood1234".into() };
        assert_eq!(found(cpuid(b"Evil", 40, 0), &[]), [vendor]);
        assert_eq!(found(cpuid(b"Evil", 40, 0), &[(0, Ebx, !0)]), []);
        assert_eq!(found(cpuid(b"Evil", 40, 0), &[(0, Eax, !0), (1, Ebx, !0)]).len(), 1);

        assert_eq!(found(cpuid(b"Good", 41, 0), &[]), [Mismatch::AddressBits { guest: 41, host: 40 }]);
        assert_eq!(found(cpuid(b"Good", 41, 0), &[(ADDRESS_SIZES, Eax, 0xff)]), []);
        assert_eq!(found(cpuid(b"Good", 41, 0), &[(ADDRESS_SIZES, Ebx, 0xff)]).len(), 1);

        let feature = |bits, name| {
            let bit = CpuidBits { leaf: 1, subleaf: 0, register: Ecx, bits };
            Mismatch::Feature { bit, name: Some(name) }
        };
        let both = [feature(1 << 1, "PCLMULQDQ"), feature(1 << 5, "VMX")];
        assert_eq!(found(cpuid(b"Good", 40, 0b10_0011), &[]), both);
        // bits of the VMM's own, in two records
        assert_eq!(found(cpuid(b"Good", 40, 0b10_0011), &[(1, Ecx, 1 << 1)]), both[1..]);
        assert_eq!(found(cpuid(b"Good", 40, 0b10_0011), &[(1, Ecx, 1 << 1), (1, Ecx, 1 << 5)]), []);
        assert_eq!(found(cpuid(b"Good", 40, 0b10_0011), &[(1, Ecx, 0b10), (1, Ecx, 0b10)]), both[1..]);
    }

    #[test]
    fn vendors_and_addresses_are_read_from_their_leaves() {
        assert_eq!(vendor(&cpuid(b"Ab\n\0", 40, 0)), "Ab??Ab??1234");
        assert_eq!(vendor(&[]), "");
        assert_eq!(address_bits(&cpuid(b"Good", 46, 0)), 46);
        assert_eq!(address_bits(&[]), 36);
    }

    #[test]
    fn components_of_xcr0_have_names() {
        let text = |missing| Mismatch::Xcr0 { missing }.to_string();
        assert!(text(1 << 2 | 1 << 18).ends_with("XCR0: AVX, AMX-TILEDATA"), "{}", text(1 << 2 | 1 << 18));
        assert!(text(1 << 8 | 1 << 62).ends_with("XCR0: bit 8, bit 62"), "{}", text(1 << 8 | 1 << 62));
    }

    #[test]
    fn tolerance() {
        assert!(within_tolerance(2_600_000, 2_600_650));
        assert!(!within_tolerance(2_600_000, 2_600_700));
        assert!(within_tolerance(u32::MAX, u32::MAX));
        assert!(!within_tolerance(0, 2_600_000));
    }
}
