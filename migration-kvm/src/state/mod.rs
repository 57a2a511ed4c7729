//! vCPU and VM state on x86-64: saved from KVM, encoded as [`Section`]s, loaded into another KVM.
//!
//! A VMM saves with [`save_vm`] and, on each vCPU's own thread, [`save_vcpu`]. It loads in this order:
//! 1. [`load_clock`], before any vCPU: a vCPU's TSC offset is computed against the VM's clock.
//! 2. [`load_vcpu`], on each vCPU's own thread, in any order among them.
//! 3. [`load_vm`]: interrupt controllers and timer. What they have pending is delivered into LAPICs, which the loading of
//!    a vCPU would overwrite.
//!
//! Guest RAM must be ready to be touched before: KVM writes its clock pages when it loads the MSRs that point to them.
//!
//! Before RAM moves, [`HostNeeds`] tells whether the destination can take all that.

use std::io;

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use migration_core::{codec::DecodeError, state::Section, vm::VmError};
use thiserror::Error;

mod cpuid;
mod entry;
mod items;
mod msrs;
mod needs;
mod pre_fault;
#[allow(unsafe_code)]
mod sys;
mod vcpu;
mod vm;

pub use cpuid::{CpuidBits, Register};
pub use entry::entry_pages;
pub use items::OPTIONAL;
pub use msrs::{MAX_MSRS, Msr, MsrList};
pub use needs::{HostNeeds, Mismatch, TSC_TOLERANCE_PPM};
pub use pre_fault::pre_fault;
pub use sys::Sregs2;
pub use vcpu::{LoadedVcpu, SpecialRegs, VcpuSaver, VcpuState, complete_io, note_pause};
pub use vm::{ClockLoaded, Irqchip, KvmState};

/// Name of the sections of vCPUs; the instance is the vCPU's number.
pub const VCPU_SECTION: &str = "vcpu";
/// Name of the section of the VM: its clock, interrupt controllers and timer.
pub const VM_SECTION: &str = "vm";
/// The version that is written, and the only one that is read. New items do not need a new version, see [`OPTIONAL`].
pub const STATE_VERSION: u32 = 1;

/// State could not be saved, loaded or understood.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// KVM refused something.
    #[error("{what}: {source}")]
    Ioctl {
        /// The ioctl, or what it was to do.
        what: &'static str,
        /// The reason it gave.
        source: io::Error,
    },
    /// Completing the vCPU's instruction took an exit that the VMM's handler did not handle; see [`complete_io`]. What
    /// the instruction would have read from the device is undefined if the guest goes on.
    #[error("the vCPU still waits for the VMM to handle an exit: {exit}")]
    IoPending {
        /// The exit.
        exit: String,
    },
    /// It is a section of something else.
    #[error("expected a section {expected}, found {found}")]
    WrongSection {
        /// The name that was expected.
        expected: &'static str,
        /// The section's name.
        found: String,
    },
    /// It was written in a version that is not known here.
    #[error("state of {name} has version {found}, this host loads {STATE_VERSION}")]
    Version {
        /// The section's name.
        name: &'static str,
        /// The version found.
        found: u32,
    },
    /// The bytes are not what they should be.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A part has not the size it must have.
    #[error("{name}: {found} bytes instead of {expected}")]
    ItemSize {
        /// The part.
        name: &'static str,
        /// How many bytes there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// A part that is always there is not there.
    #[error("the state has no {name}")]
    MissingItem {
        /// The part.
        name: &'static str,
    },
    /// A part appears twice.
    #[error("item {tag:#x} appears twice")]
    DuplicateItem {
        /// Its tag.
        tag: u16,
    },
    /// Parts that are not known here, and without which the state would be wrong: a newer version wrote it.
    #[error("the state needs parts that this version does not know: items {tags:x?}")]
    UnknownItems {
        /// Their tags.
        tags: Vec<u16>,
    },
    /// MSRs that this KVM does not take, and whose values here differ.
    #[error("this KVM refuses MSRs that the guest uses: {}", list_msrs(.msrs))]
    MsrsRefused {
        /// The registers, with the values that they should have.
        msrs: Vec<Msr>,
    },
    /// The state has a part for which this VM was not built, or the other way round.
    #[error("{what}")]
    Unfit {
        /// What does not fit, and what to do.
        what: String,
    },
}

impl From<StateError> for VmError {
    fn from(error: StateError) -> Self {
        Self::because("vCPU and VM state", error)
    }
}

fn list_msrs(msrs: &[Msr]) -> String {
    msrs.iter().map(|m| format!("{:#x} = {:#x}", m.index, m.data)).collect::<Vec<_>>().join(", ")
}

/// Turns an error of kvm-ioctls into one that names the ioctl.
fn ioctl_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |error| StateError::Ioctl { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// The same for the ioctls of [`sys`].
fn io_error(what: &'static str) -> impl Fn(io::Error) -> StateError {
    move |source| StateError::Ioctl { what, source }
}

/// Saves vCPU number `index`, which must not run. Call it on the vCPU's own thread.
///
/// The instruction at whose exit it stopped is completed first; the exits that this takes go to `handle`, as in
/// [`complete_io`]. The exit at which it stopped has been handled before, as ever.
///
/// # Errors
/// [`StateError::IoPending`] if `handle` did not handle an exit; what KVM refuses.
pub fn save_vcpu(
    vcpu: &mut VcpuFd,
    index: u32,
    saver: &VcpuSaver,
    handle: impl FnMut(VcpuExit<'_>) -> bool,
) -> Result<Section, StateError> {
    complete_io(vcpu, handle)?;
    section(VCPU_SECTION, index, saver.save(vcpu)?.encode())
}

/// Loads a vCPU that has not run yet. Call it on the vCPU's own thread, after [`load_clock`] and before [`load_vm`].
///
/// # Errors
/// When the section is not a vCPU's or not understood, or KVM refuses it. The vCPU is in no useful state then.
pub fn load_vcpu(
    vcpu: &mut VcpuFd,
    section: &Section,
    saver: &VcpuSaver,
    clock: &ClockLoaded,
) -> Result<LoadedVcpu, StateError> {
    saver.load(vcpu, &VcpuState::decode(data(section, VCPU_SECTION)?)?, clock)
}

/// Saves what the VM has beside vCPUs and RAM: its clock, interrupt controllers and timer. All vCPUs must be stopped.
///
/// `irqchip` is what the VMM created.
///
/// # Errors
/// When KVM refuses.
pub fn save_vm(saver: &VcpuSaver, vm: &VmFd, irqchip: Irqchip) -> Result<Section, StateError> {
    section(VM_SECTION, 0, KvmState::save(saver, vm, irqchip)?.encode())
}

/// Loads the VM's clock. Before any [`load_vcpu`].
///
/// # Errors
/// When the section is not the VM's or not understood, or KVM refuses it.
pub fn load_clock(vm: &VmFd, section: &Section) -> Result<ClockLoaded, StateError> {
    KvmState::decode(data(section, VM_SECTION)?)?.load_clock(vm)
}

/// Loads interrupt controllers and timer. After all [`load_vcpu`]s; no vCPU runs yet.
///
/// `irqchip` is what the VMM created here; the saved one must be the same.
///
/// # Errors
/// When the section is not the VM's or not understood, the VM has other controllers, or KVM refuses.
pub fn load_vm(vm: &VmFd, section: &Section, irqchip: Irqchip, _clock: &ClockLoaded) -> Result<(), StateError> {
    KvmState::decode(data(section, VM_SECTION)?)?.load_chips(vm, irqchip)
}

fn section(name: &'static str, instance: u32, data: Vec<u8>) -> Result<Section, StateError> {
    Ok(Section { name: name.to_owned(), instance, version: STATE_VERSION, data: data.into() })
}

fn data<'a>(section: &'a Section, expected: &'static str) -> Result<&'a [u8], StateError> {
    if section.name != expected {
        return Err(StateError::WrongSection { expected, found: section.name.clone() });
    }
    if section.version != STATE_VERSION {
        return Err(StateError::Version { name: expected, found: section.version });
    }
    Ok(&section.data)
}
