//! The state of a vCPU: save, load, encode, decode.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_SUSPENDED, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use migration_core::codec::{DecodeError, Reader, Writer};

use super::{
    ClockLoaded, StateError, cpuid,
    cpuid::host_tsc_khz,
    io_error, ioctl_error,
    items::{ItemWriter, Items, OPTIONAL},
    msrs::{self, IA32_TSC, MAX_MSRS, Msr, MsrList, rank},
    needs::within_tolerance,
    sys::{self, MAX_NESTED, NESTED_HEADER, Sregs2, XSAVE_SIZE},
};

#[cfg(test)]
mod tests;

/// The number of bytes of the LAPIC's register page that KVM returns.
const LAPIC_SIZE: usize = 1024;
/// The largest size of an XSAVE area in bytes; with AMX it has 11,008.
const MAX_XSAVE: usize = 64 << 10;
/// The offset of the field in the XSAVE header with the components that are not in their initial
/// state.
const XSTATE_BV: usize = 512;
/// The largest number of exits for the completion of one instruction. A string instruction has up
/// to a page of bytes in flight.
const MAX_COMPLETING_EXITS: usize = 4096;
/// The bit of CR4 that turns on shadow stacks and indirect branch tracking.
const CR4_CET: u64 = 1 << 23;

const ITEM_CPUID: u16 = 1;
const ITEM_REGS: u16 = 2;
const ITEM_SREGS: u16 = 3;
const ITEM_SREGS2: u16 = 4;
const ITEM_XSAVE: u16 = 5;
const ITEM_XCRS: u16 = 6;
const ITEM_DEBUG_REGS: u16 = 7;
const ITEM_LAPIC: u16 = 8;
const ITEM_MP_STATE: u16 = 9;
const ITEM_EVENTS: u16 = 10;
const ITEM_MSRS: u16 = 11;
const ITEM_TSC_KHZ: u16 = 12;
const ITEM_NESTED: u16 = 13;
const ITEM_SSP: u16 = 14;
// optional, because the TSC itself is among the MSRs and the offset only makes it exact
const ITEM_TSC_OFFSET: u16 = 15 | OPTIONAL;
const ITEM_UNREAD_MSRS: u16 = 16 | OPTIONAL;

/// The segment and control registers, in the form that the source's KVM returned.
#[derive(Clone, Debug, PartialEq)]
pub enum SpecialRegs {
    /// The form of `KVM_GET_SREGS`.
    Plain(kvm_sregs),
    /// The form of `KVM_GET_SREGS2`. It includes the page directory pointers of PAE paging, which
    /// KVM reads from guest memory again if it is given the plain form.
    WithPdptrs(Sregs2),
}

impl SpecialRegs {
    fn cr4(&self) -> u64 {
        match self {
            Self::Plain(s) => s.cr4,
            Self::WithPdptrs(s) => s.cr4,
        }
    }

    /// Returns the older form.
    pub(super) fn plain(&self, events: &kvm_vcpu_events) -> kvm_sregs {
        match self {
            Self::Plain(s) => *s,
            Self::WithPdptrs(s) => plain(s, events),
        }
    }
}

/// The complete state of a vCPU. A part is absent if the source's KVM or VM does not have it.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// The CPUID entries that the guest sees; at most 256.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The frequency of the guest's TSC in kHz.
    pub tsc_khz: Option<u32>,
    /// The number of ticks that is added to the host's TSC, modulo 2^64. Present only if the
    /// guest's TSC has the host's frequency.
    pub tsc_offset: Option<u64>,
    /// The general registers, instruction pointer and flags.
    pub regs: kvm_regs,
    /// The segments, descriptor tables, control registers, EFER and APIC base.
    pub sregs: SpecialRegs,
    /// The FPU, SSE, AVX and further registers: an XSAVE area in the standard format.
    pub xsave: Vec<u8>,
    /// The extended control register XCR0.
    pub xcrs: Option<kvm_xcrs>,
    /// The debug registers DR0 to DR3, DR6 and DR7.
    pub debug_regs: Option<kvm_debugregs>,
    /// The registers of the local APIC; absent without an in-kernel one.
    pub lapic: Option<Box<[u8; LAPIC_SIZE]>>,
    /// The multiprocessing state: running, waiting for INIT or SIPI, or halted.
    pub mp_state: kvm_mp_state,
    /// The exceptions, interrupts and NMIs in flight, and system management mode.
    pub events: kvm_vcpu_events,
    /// The model-specific registers, in the order in which they are written.
    pub msrs: Vec<Msr>,
    /// The MSRs that the source's KVM lists or is known to have, but could not read.
    pub unread_msrs: Vec<u32>,
    /// The state of nested virtualisation: `struct kvm_nested_state`.
    pub nested: Option<Vec<u8>>,
    /// The shadow stack pointer; present if CR4.CET is set.
    pub ssp: Option<u64>,
}

/// What was skipped when a vCPU was loaded. All of it is harmless.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadedVcpu {
    /// The MSRs that KVM refused, with their saved values. Their present values are the same, or
    /// they do not exist here and were zero.
    pub skipped_msrs: Vec<Msr>,
    /// Whether the TSC was set through its offset, which is exact. Otherwise it was written. KVM
    /// then keeps the TSCs of vCPUs together that are written within a second, and the guest's TSC
    /// does not include the time since it was saved.
    pub tsc_by_offset: bool,
}

/// Saves and loads the vCPUs of a VM. It knows what this KVM offers, so nothing must be probed
/// during the pause.
#[derive(Clone, Debug)]
pub struct VcpuSaver {
    msrs: MsrList,
    xsave_size: usize,
    xsave2: bool,
    sregs2: bool,
    xcrs: bool,
    debug_regs: bool,
    nested: bool,
    tsc_offset: bool,
    host_khz: Option<u32>,
    guest_khz: Option<u32>,
    unsupported: Vec<String>,
}

impl VcpuSaver {
    /// Finds out what this KVM offers. Takes milliseconds, because a scratch VM is needed for the
    /// host's TSC frequency.
    ///
    /// # Errors
    /// Fails if KVM does not return its list of MSRs.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        const CAP_SREGS2: libc::c_ulong = 200;
        let mut unsupported = Vec::new();
        let mut has = |present: bool, what: &str| {
            if !present {
                unsupported.push(what.to_owned());
            }
            present
        };
        let xsave_size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        if xsave_size > MAX_XSAVE {
            // larger than any area that exists; the buffers and the encoding are too small for it
            return Err(StateError::Unfit { what: format!("this KVM has XSAVE areas of {xsave_size} bytes") });
        }
        let host_khz = host_tsc_khz(kvm);
        let mut saver = Self {
            msrs: MsrList::probe(kvm)?,
            xsave_size: xsave_size.max(XSAVE_SIZE),
            xsave2: has(xsave_size > 0, "KVM_GET_XSAVE2 (XSAVE areas above 4 KiB)"),
            sregs2: has(vm.check_extension_raw(CAP_SREGS2) > 0, "KVM_GET_SREGS2 (PAE page directory pointers)"),
            xcrs: has(vm.check_extension(Cap::Xcrs), "KVM_GET_XCRS"),
            debug_regs: has(vm.check_extension(Cap::Debugregs), "KVM_GET_DEBUGREGS"),
            nested: has(vm.check_extension_int(Cap::NestedState) > 0, "KVM_GET_NESTED_STATE (nested virtualisation)"),
            tsc_offset: has(
                vm.check_extension_raw(kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES.into()) > 0,
                "KVM_VCPU_TSC_OFFSET",
            ),
            host_khz,
            guest_khz: None,
            unsupported: Vec::new(),
        };
        has(host_khz.is_some(), "KVM_GET_TSC_KHZ");
        has(vm.check_extension(Cap::TscControl), "TSC scaling (KVM_CAP_TSC_CONTROL)");
        has(vm.check_extension(Cap::KvmclockCtrl), "KVM_KVMCLOCK_CTRL");
        let clock = vm.check_extension_int(Cap::AdjustClock);
        has(clock > 0, "KVM_GET_CLOCK");
        has(clock & kvm_bindings::KVM_CLOCK_REALTIME as i32 != 0, "KVM_CLOCK_REALTIME");
        saver.unsupported = unsupported;
        Ok(saver)
    }

    /// Finds out what cannot be read from a vCPU, so that later saves skip it for all vCPUs. CPUID
    /// and TSC frequency of `vcpu` must be set; they are the same for all vCPUs of a VM. Saves time
    /// in the pause. Call it once, before the pause.
    ///
    /// # Errors
    /// Fails if KVM reads no MSR at all.
    pub fn learn(&mut self, vcpu: &VcpuFd) -> Result<(), StateError> {
        self.msrs.learn(vcpu)?;
        self.guest_khz = khz(vcpu);
        if self.tsc_offset && sys::tsc_offset(vcpu).is_err() {
            self.tsc_offset = false;
            self.unsupported.push("KVM_VCPU_TSC_OFFSET".to_owned());
        }
        if self.nested && sys::nested(vcpu).is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            self.nested = false;
            self.unsupported.push("KVM_GET_NESTED_STATE (nested virtualisation)".to_owned());
        }
        Ok(())
    }

    /// Returns the MSRs that are saved.
    pub fn msrs(&self) -> &MsrList {
        &self.msrs
    }

    /// Returns the names of the parts of the state that this KVM does not have.
    pub fn unsupported(&self) -> &[String] {
        &self.unsupported
    }

    // The order of saving:
    // - The multiprocessing state first: to return it, KVM acts on a pending INIT or SIPI, which
    //   resets registers.
    // - The LAPIC before the events and the MSRs: reading it moves posted interrupts into it. If
    //   the deadline MSR were read first, a timer that fires in between would be lost: already
    //   cleared in the MSR, and not yet pending in the LAPIC.
    // - Events last: to return them, KVM collects NMIs that were queued meanwhile.
    //
    // All other parts do not change while the vCPU is stopped.
    /// Reads the complete state of a vCPU. The vCPU must not run and must have no pending I/O (see
    /// [`complete_io`]). Must be called on the vCPU's own thread.
    ///
    /// # Errors
    /// Fails if KVM refuses a part that it offers.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<VcpuState, StateError> {
        let mp_state = match vcpu.get_mp_state() {
            Ok(state) => state,
            // without an in-kernel LAPIC some KVMs have no such state: the vCPU runs
            Err(e) if e.errno() == libc::EINVAL => kvm_mp_state::default(),
            Err(e) => return Err(ioctl_error("KVM_GET_MP_STATE")(e)),
        };
        let regs = vcpu.get_regs().map_err(ioctl_error("KVM_GET_REGS"))?;
        let sregs = if self.sregs2 {
            SpecialRegs::WithPdptrs(sys::sregs2(vcpu).map_err(io_error("KVM_GET_SREGS2"))?)
        } else {
            SpecialRegs::Plain(vcpu.get_sregs().map_err(ioctl_error("KVM_GET_SREGS"))?)
        };
        let nested = match self.nested.then(|| sys::nested(vcpu)) {
            Some(Ok(nested)) => Some(nested),
            // some KVMs offer the capability but have no such state
            Some(Err(e)) if e.raw_os_error() == Some(libc::EINVAL) => None,
            Some(Err(e)) => return Err(io_error("KVM_GET_NESTED_STATE")(e)),
            None => None,
        };
        let ssp = match sregs.cr4() & CR4_CET {
            0 => None,
            _ => Some(sys::guest_ssp(vcpu).map_err(io_error("reading the shadow stack pointer"))?),
        };
        let xcrs = self.xcrs.then(|| vcpu.get_xcrs().map_err(ioctl_error("KVM_GET_XCRS"))).transpose()?;
        let xsave = sys::xsave(vcpu, self.xsave_size, self.xsave2).map_err(io_error("KVM_GET_XSAVE"))?;
        let debug_regs =
            self.debug_regs.then(|| vcpu.get_debug_regs().map_err(ioctl_error("KVM_GET_DEBUGREGS"))).transpose()?;
        let lapic = match vcpu.get_lapic() {
            Ok(lapic) => Some(Box::new(lapic.regs.map(|byte| byte as u8))),
            Err(e) if e.errno() == libc::EINVAL => None,
            Err(e) => return Err(ioctl_error("KVM_GET_LAPIC")(e)),
        };
        let (mut msrs, unread) = msrs::read(vcpu, self.msrs.indices())?;
        let more = msrs::more_of_banks(&msrs);
        if !more.is_empty() {
            msrs.extend(msrs::read(vcpu, &more)?.0);
        }
        let unread_msrs = self.msrs.unreadable().iter().copied().chain(unread).collect();
        let tsc_khz = self.guest_khz.or_else(|| khz(vcpu));
        // with scaling the offset is relative to the scaled TSC of this host, which has no meaning
        // on another host
        let unscaled = tsc_khz.is_some() && tsc_khz == self.host_khz;
        let tsc_offset = (self.tsc_offset && unscaled).then(|| sys::tsc_offset(vcpu).ok()).flatten();
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(ioctl_error("KVM_GET_CPUID2"))?;
        msrs.retain(|msr| msrs::is_feature(msr.index, cpuid.as_slice()) != Some(false));
        let events = vcpu.get_vcpu_events().map_err(ioctl_error("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
            tsc_offset,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            mp_state,
            events,
            msrs,
            unread_msrs,
            nested,
            ssp,
        })
    }

    // The order of loading, and the reasons:
    //  1. CPUID. KVM checks everything else against it: bits of CR4 and XCR0, components of XSAVE,
    //     MSRs.
    //  2. The TSC's frequency, before the TSC and its deadline: both are scaled by it when they are
    //     set.
    //  3. MSRs that decide what is valid: FEAT_CTL before CR4.VMXE, the VMX capabilities before
    //     nested state.
    //  4. Segment and control registers: CR4.OSXSAVE before XCR0 has a meaning, EFER.SVME and
    //     CR4.VMXE before nested state, the APIC base (xAPIC or x2APIC) before the LAPIC's
    //     registers, whose layout depends on it. Loading them also sets a boot vCPU at the reset
    //     vector running, so the multiprocessing state comes after them.
    //  5. Nested state. It may put the vCPU into guest mode, in which control registers have
    //     another meaning.
    //  6. General registers. Loading them drops a pending exception, so they precede the events.
    //  7. XCR0, then the XSAVE area, which KVM checks against what CPUID permits; before the MSRs,
    //     because XFD disables components.
    //  8. Debug registers.
    //  9. The LAPIC: before TSC_DEADLINE, which is ignored unless the LAPIC's timer is in deadline
    //     mode.
    // 10. MSRs: the TSC first (by its offset if both sides can), the deadline last, which arms the
    //     timer.
    // 11. The shadow stack pointer, which needs the control-flow MSRs.
    // 12. The multiprocessing state: SIPIs are recorded in the LAPIC, so after it.
    // 13. Events last: all of the above may raise, drop or deliver events; these are what is really
    //     pending.
    //
    // Finally the guest's clock is informed that the guest was stopped, so that the guest's
    // watchdogs do not fire.
    /// Loads a vCPU that has not run yet. Must be called on the vCPU's own thread.
    ///
    /// # Errors
    /// Fails if KVM refuses a part; the error names it. The state of the vCPU is undefined then.
    pub fn load(&self, vcpu: &VcpuFd, state: &VcpuState, clock: &ClockLoaded) -> Result<LoadedVcpu, StateError> {
        let mut loaded = LoadedVcpu::default();
        set_cpuid(vcpu, &state.cpuid)?;
        if let Some(khz) = state.tsc_khz {
            set_tsc_khz(vcpu, khz)?;
        }
        let by_offset = state.tsc_offset.filter(|_| self.tsc_offset && state.tsc_khz == self.host_khz);
        let by_offset = by_offset.and_then(|offset| clock.tsc_offset(offset, state.tsc_khz?));
        let mut msrs = state.msrs.clone();
        msrs.sort_by_key(|msr| rank(msr.index));
        msrs.retain(|msr| by_offset.is_none() || msr.index != IA32_TSC);
        let (first, rest) = msrs.split_at(msrs.partition_point(|msr| rank(msr.index) == 0));
        let mut skipped = msrs::write(vcpu, first)?;
        match (&state.sregs, self.sregs2) {
            (SpecialRegs::WithPdptrs(s), true) => sys::set_sregs2(vcpu, s).map_err(io_error("KVM_SET_SREGS2"))?,
            (SpecialRegs::WithPdptrs(s), false) => {
                vcpu.set_sregs(&plain(s, &state.events)).map_err(ioctl_error("KVM_SET_SREGS"))?;
            }
            (SpecialRegs::Plain(s), _) => vcpu.set_sregs(s).map_err(ioctl_error("KVM_SET_SREGS"))?,
        }
        if let Some(nested) = &state.nested {
            // without nesting and with VMX and SVM off the state is an empty header, which need not
            // be loaded
            if self.nested || nested.len() > NESTED_HEADER {
                sys::set_nested(vcpu, nested).map_err(io_error("KVM_SET_NESTED_STATE"))?;
            }
        }
        vcpu.set_regs(&state.regs).map_err(ioctl_error("KVM_SET_REGS"))?;
        if let Some(xcrs) = &state.xcrs {
            vcpu.set_xcrs(xcrs).map_err(ioctl_error("KVM_SET_XCRS"))?;
        }
        let area = fit_xsave(&state.xsave, self.xsave_size)?;
        sys::set_xsave(vcpu, area, self.xsave_size).map_err(io_error("KVM_SET_XSAVE"))?;
        if let Some(debug_regs) = &state.debug_regs {
            vcpu.set_debug_regs(debug_regs).map_err(ioctl_error("KVM_SET_DEBUGREGS"))?;
        }
        if let Some(lapic) = &state.lapic {
            let lapic = kvm_lapic_state { regs: lapic.map(|byte| byte as libc::c_char) };
            vcpu.set_lapic(&lapic).map_err(ioctl_error("KVM_SET_LAPIC (was the VM built with an irqchip?)"))?;
        }
        if let Some(offset) = by_offset {
            sys::set_tsc_offset(vcpu, offset).map_err(io_error("setting the TSC offset"))?;
            loaded.tsc_by_offset = true;
        }
        skipped.extend(msrs::write(vcpu, rest)?);
        loaded.skipped_msrs = skipped;
        let wrong = msrs::still_wrong(vcpu, &loaded.skipped_msrs)?;
        if !wrong.is_empty() {
            return Err(StateError::MsrsRefused { msrs: wrong });
        }
        if let Some(ssp) = state.ssp {
            sys::set_guest_ssp(vcpu, ssp).map_err(io_error("setting the shadow stack pointer"))?;
        }
        match vcpu.set_mp_state(state.mp_state) {
            Ok(()) => {}
            // as in `save`: without a LAPIC the vCPU just runs
            Err(e) if e.errno() == libc::EINVAL && state.lapic.is_none() && state.mp_state.mp_state == 0 => {}
            Err(e) => return Err(ioctl_error("KVM_SET_MP_STATE")(e)),
        }
        vcpu.set_vcpu_events(&state.events).map_err(ioctl_error("KVM_SET_VCPU_EVENTS"))?;
        note_pause(vcpu);
        Ok(loaded)
    }
}

/// Completes the instruction at whose I/O the vCPU exited. Only then are the registers those
/// between two instructions: after an exit for an MMIO read, the instruction pointer is still
/// before the instruction, and a vCPU that was saved there would repeat the read.
///
/// An instruction that accesses more than one place (a string instruction, an access across pages)
/// exits again. `handle` gets these exits, handles them like the VMM does while the guest runs, and
/// returns whether it did. It must not ignore an exit: the instruction would continue with whatever
/// is in the buffer.
///
/// # Errors
/// Fails with [`StateError::IoPending`] if `handle` returned false, and with KVM's errors.
pub fn complete_io(vcpu: &mut VcpuFd, mut handle: impl FnMut(VcpuExit<'_>) -> bool) -> Result<(), StateError> {
    // with `immediate_exit` KVM completes pending I/O and then returns before the guest runs
    let before = vcpu.get_kvm_run().immediate_exit;
    vcpu.set_kvm_immediate_exit(1);
    let result = (|| {
        for _ in 0..MAX_COMPLETING_EXITS {
            match vcpu.run() {
                Ok(exit) => {
                    let exit_text = format!("{exit:?}");
                    if !handle(exit) {
                        return Err(StateError::IoPending { exit: exit_text });
                    }
                }
                // EAGAIN: another vCPU has not started this one yet
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => return Ok(()),
                Err(e) => return Err(ioctl_error("KVM_RUN, to complete I/O")(e)),
            }
        }
        Err(StateError::IoPending { exit: format!("more than {MAX_COMPLETING_EXITS} exits for one instruction") })
    })();
    vcpu.set_kvm_immediate_exit(before);
    result
}

/// Informs the guest's clock that the guest did not run for a while, so that the guest's watchdogs
/// do not fire. Useful also for a VM that resumes on the same host. Has no effect if the guest does
/// not use the clock.
pub fn note_pause(vcpu: &VcpuFd) {
    // ignored: EINVAL (the guest does not use the clock) and ENOTTY (no such ioctl) are no errors
    // here
    let _ = vcpu.kvmclock_ctrl();
}

/// Sets CPUID unless the vCPU has it already. A VMM sets it when it builds the VM, and setting it
/// takes half of the time for loading a vCPU.
fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), StateError> {
    if let Ok(now) = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        && cpuid::same_but_for_dynamic_bits(now.as_slice(), entries)
    {
        return Ok(());
    }
    let cpuid = CpuId::from_entries(entries)
        .map_err(|_| StateError::Unfit { what: format!("{} CPUID entries are more than KVM takes", entries.len()) })?;
    vcpu.set_cpuid2(&cpuid).map_err(ioctl_error("KVM_SET_CPUID2 (must not differ once the vCPU has run)"))
}

/// Returns the frequency of a vCPU's TSC in kHz.
fn khz(vcpu: &VcpuFd) -> Option<u32> {
    vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0)
}

fn set_tsc_khz(vcpu: &VcpuFd, khz: u32) -> Result<(), StateError> {
    let now = vcpu.get_tsc_khz().unwrap_or(0);
    if now == khz {
        return Ok(());
    }
    match vcpu.set_tsc_khz(khz) {
        Ok(()) => Ok(()),
        Err(_) if within_tolerance(now, khz) => Ok(()),
        Err(e) => Err(ioctl_error("KVM_SET_TSC_KHZ (this host cannot give the guest's TSC frequency)")(e)),
    }
}

/// Returns the part of an XSAVE area that a KVM with areas of `size` bytes accepts.
fn fit_xsave(area: &[u8], size: usize) -> Result<&[u8], StateError> {
    match area.split_at_checked(size) {
        None => Ok(area),
        // the rest may be dropped if it is zero: its components are in their initial state
        Some((head, tail)) if tail.iter().all(|byte| *byte == 0) => Ok(head),
        Some(_) => Err(StateError::Unfit {
            what: format!("the guest uses an XSAVE area of more than {size} bytes, which this KVM does not have"),
        }),
    }
}

/// Converts segment and control registers to the plain form, for a KVM without the newer one.
fn plain(s: &Sregs2, events: &kvm_vcpu_events) -> kvm_sregs {
    let mut interrupt_bitmap = [0; 4];
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        let nr = usize::from(events.interrupt.nr);
        interrupt_bitmap[nr / 64] = 1 << (nr % 64);
    }
    kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap,
    }
}

impl VcpuState {
    /// Returns the encoding that is sent to the destination.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = ItemWriter::new();
        w.with(ITEM_CPUID, |w| write_cpuid(w, &self.cpuid));
        w.pod(ITEM_REGS, &self.regs);
        match &self.sregs {
            SpecialRegs::Plain(s) => w.pod(ITEM_SREGS, s),
            SpecialRegs::WithPdptrs(s) => w.pod(ITEM_SREGS2, s),
        }
        w.bytes(ITEM_XSAVE, &self.xsave);
        if let Some(xcrs) = &self.xcrs {
            w.pod(ITEM_XCRS, xcrs);
        }
        if let Some(debug_regs) = &self.debug_regs {
            w.pod(ITEM_DEBUG_REGS, debug_regs);
        }
        if let Some(lapic) = &self.lapic {
            w.bytes(ITEM_LAPIC, &lapic[..]);
        }
        w.pod(ITEM_MP_STATE, &self.mp_state);
        w.pod(ITEM_EVENTS, &self.events);
        w.with(ITEM_MSRS, |w| write_msrs(w, &self.msrs));
        if let Some(khz) = self.tsc_khz {
            w.u32(ITEM_TSC_KHZ, khz);
        }
        if let Some(nested) = &self.nested {
            w.bytes(ITEM_NESTED, nested);
        }
        if let Some(ssp) = self.ssp {
            w.u64(ITEM_SSP, ssp);
        }
        if let Some(offset) = self.tsc_offset {
            w.u64(ITEM_TSC_OFFSET, offset);
        }
        w.with(ITEM_UNREAD_MSRS, |w| {
            w.count(self.unread_msrs.len());
            self.unread_msrs.iter().for_each(|index| {
                w.u32(*index);
            });
        });
        w.finish()
    }

    /// Decodes what [`encode`](VcpuState::encode) returned.
    ///
    /// # Errors
    /// Fails if a part is missing, unknown or present twice, or has a wrong size or an invalid
    /// value.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut items = Items::parse(bytes)?;
        let cpuid = items.take_with(ITEM_CPUID, read_cpuid)?.ok_or(StateError::MissingItem { name: "CPUID" })?;
        let regs = items.need_pod(ITEM_REGS, "registers")?;
        let sregs = match items.take_pod(ITEM_SREGS2, "special registers 2")? {
            Some(sregs) => SpecialRegs::WithPdptrs(sregs),
            None => SpecialRegs::Plain(items.need_pod(ITEM_SREGS, "special registers")?),
        };
        let xsave = items.need(ITEM_XSAVE, "XSAVE area")?;
        if !(XSAVE_SIZE..=MAX_XSAVE).contains(&xsave.len()) || xsave.len() % 4 != 0 {
            return Err(DecodeError::invalid("XSAVE area", format!("it cannot have {} bytes", xsave.len())).into());
        }
        let xcrs: Option<kvm_xcrs> = items.take_pod(ITEM_XCRS, "XCRs")?;
        if let Some(xcrs) = &xcrs
            && xcrs.nr_xcrs as usize > xcrs.xcrs.len()
        {
            return Err(DecodeError::invalid("XCRs", format!("{} of them", xcrs.nr_xcrs)).into());
        }
        let debug_regs = items.take_pod(ITEM_DEBUG_REGS, "debug registers")?;
        let lapic = items.take_with(ITEM_LAPIC, |r| r.array::<LAPIC_SIZE>("LAPIC"))?.map(Box::new);
        let mp_state: kvm_mp_state = items.need_pod(ITEM_MP_STATE, "multiprocessing state")?;
        if mp_state.mp_state > KVM_MP_STATE_SUSPENDED {
            let reason = format!("{} is no such state", mp_state.mp_state);
            return Err(DecodeError::invalid("multiprocessing state", reason).into());
        }
        let events = items.need_pod(ITEM_EVENTS, "events")?;
        let msrs = items.take_with(ITEM_MSRS, read_msrs)?.ok_or(StateError::MissingItem { name: "MSRs" })?;
        let tsc_khz = items.take_u32(ITEM_TSC_KHZ, "TSC kHz")?;
        if tsc_khz == Some(0) {
            return Err(DecodeError::invalid("TSC kHz", "0").into());
        }
        let nested = items.take(ITEM_NESTED).map(<[u8]>::to_vec);
        if let Some(nested) = &nested
            && (!(NESTED_HEADER..=MAX_NESTED).contains(&nested.len()) || sys::nested_size(nested) != nested.len())
        {
            return Err(DecodeError::invalid("nested state", format!("{} bytes", nested.len())).into());
        }
        let ssp = items.take_u64(ITEM_SSP, "shadow stack pointer")?;
        let tsc_offset = items.take_u64(ITEM_TSC_OFFSET, "TSC offset")?;
        let unread_msrs = items.take_with(ITEM_UNREAD_MSRS, read_indices)?.unwrap_or_default();
        items.finish()?;
        Ok(Self {
            cpuid,
            tsc_khz,
            tsc_offset,
            regs,
            sregs,
            xsave: xsave.to_vec(),
            xcrs,
            debug_regs,
            lapic,
            mp_state,
            events,
            msrs,
            unread_msrs,
            nested,
            ssp,
        })
    }

    /// Returns the value of an MSR, if it is part of the state.
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data)
    }

    /// Returns the components of the XSAVE area that are not in their initial state (`XSTATE_BV`).
    pub fn xstate(&self) -> u64 {
        let bytes = self.xsave.get(XSTATE_BV..XSTATE_BV + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    }
}

pub(super) fn write_cpuid(w: &mut Writer, entries: &[kvm_cpuid_entry2]) {
    w.count(entries.len());
    for e in entries {
        w.u32(e.function).u32(e.index).u32(e.flags).u32(e.eax).u32(e.ebx).u32(e.ecx).u32(e.edx);
    }
}

pub(super) fn read_cpuid(r: &mut Reader<'_>) -> Result<Vec<kvm_cpuid_entry2>, DecodeError> {
    let count = r.count(KVM_MAX_CPUID_ENTRIES, "number of CPUID entries")?;
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for _ in 0..count {
        entries.push(kvm_cpuid_entry2 {
            function: r.u32("CPUID leaf")?,
            index: r.u32("CPUID subleaf")?,
            flags: r.u32("CPUID flags")?,
            eax: r.u32("CPUID EAX")?,
            ebx: r.u32("CPUID EBX")?,
            ecx: r.u32("CPUID ECX")?,
            edx: r.u32("CPUID EDX")?,
            ..Default::default()
        });
    }
    Ok(entries)
}

pub(super) fn write_msrs(w: &mut Writer, msrs: &[Msr]) {
    w.count(msrs.len());
    for msr in msrs {
        w.u32(msr.index).u64(msr.data);
    }
}

pub(super) fn read_msrs(r: &mut Reader<'_>) -> Result<Vec<Msr>, DecodeError> {
    let count = r.count(MAX_MSRS, "number of MSRs")?;
    let mut seen = std::collections::HashSet::new();
    let mut msrs = Vec::new();
    for _ in 0..count {
        let msr = Msr { index: r.u32("MSR")?, data: r.u64("MSR")? };
        if !seen.insert(msr.index) {
            return Err(DecodeError::invalid("MSR", format!("{:#x} appears twice", msr.index)));
        }
        msrs.push(msr);
    }
    Ok(msrs)
}

pub(super) fn read_indices(r: &mut Reader<'_>) -> Result<Vec<u32>, DecodeError> {
    let count = r.count(MAX_MSRS, "number of MSRs")?;
    (0..count).map(|_| r.u32("MSR")).collect()
}
