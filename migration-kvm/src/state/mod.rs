//! The state of vCPUs and VMs on x86-64. It is saved from KVM, encoded as [`Section`]s, and loaded
//! into another KVM.
//!
//! A VMM saves with [`save_vm`] and, on the thread of each vCPU, with [`save_vcpu`]. It loads in
//! this order:
//! 1. [`load_clock`], before any vCPU, because a vCPU's TSC offset is computed against the VM's
//!    clock.
//! 2. [`load_vcpu`], on the thread of each vCPU, in any order.
//! 3. [`load_vm`], which loads interrupt controllers and timer. Their pending interrupts are
//!    delivered to LAPICs, and loading a vCPU afterwards would overwrite these.
//!
//! Guest RAM must be accessible before that: KVM writes to the guest's clock pages when it loads
//! the MSRs with their addresses.
//!
//! Before any RAM is sent, [`HostNeeds`] checks whether the destination can load the state.

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

/// The name of the sections of vCPUs. The instance is the number of the vCPU.
pub const VCPU_SECTION: &str = "vcpu";
/// The name of the section with the VM's clock, interrupt controllers and timer.
pub const VM_SECTION: &str = "vm";
/// The version that is written, and the only one that is read. New items do not need a new version,
/// see [`OPTIONAL`].
pub const STATE_VERSION: u32 = 1;

/// The reason why state could not be saved, loaded or decoded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// KVM refused a request.
    #[error("{what}")]
    Ioctl {
        /// The name of the ioctl, or its purpose.
        what: &'static str,
        /// KVM's error.
        source: io::Error,
    },
    /// An exit occurred while the vCPU's instruction was completed, and the VMM's handler did not
    /// handle it; see [`complete_io`]. If the guest went on, the instruction would read undefined
    /// data from the device.
    #[error("the vCPU still waits for the VMM to handle an exit: {exit}")]
    IoPending {
        /// The exit.
        exit: String,
    },
    /// The section has another name.
    #[error("expected a section {expected}, found {found}")]
    WrongSection {
        /// The expected name.
        expected: &'static str,
        /// The name of the section.
        found: String,
    },
    /// The section has a version that this host does not know.
    #[error("state of {name} has version {found}, this host loads {STATE_VERSION}")]
    Version {
        /// The name of the section.
        name: &'static str,
        /// The version of the section.
        found: u32,
    },
    /// The bytes cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// An item has the wrong size.
    #[error("{name}: {found} bytes instead of {expected}")]
    ItemSize {
        /// The name of the item.
        name: &'static str,
        /// Its size in bytes.
        found: usize,
        /// The required size in bytes.
        expected: usize,
    },
    /// A required item is missing.
    #[error("the state has no {name}")]
    MissingItem {
        /// The name of the item.
        name: &'static str,
    },
    /// An item appears twice.
    #[error("item {tag:#x} appears twice")]
    DuplicateItem {
        /// The tag of the item.
        tag: u16,
    },
    /// The state has items that this version does not know and without which the state would be
    /// wrong. A newer version wrote it.
    #[error("the state needs parts that this version does not know: items {tags:x?}")]
    UnknownItems {
        /// The tags of the items.
        tags: Vec<u16>,
    },
    /// KVM refuses MSRs, and their present values differ from the saved ones.
    #[error("this KVM refuses MSRs that the guest uses: {}", list_msrs(.msrs))]
    MsrsRefused {
        /// The MSRs with their saved values.
        msrs: Vec<Msr>,
    },
    /// The state has a part for which this VM was not built, or lacks a part for which it was
    /// built.
    #[error("{what}")]
    Unfit {
        /// The reason, and what to do.
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

/// Returns a function that turns an error of kvm-ioctls into one with the name of the ioctl.
fn ioctl_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |error| StateError::Ioctl { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// Returns such a function for the ioctls of [`sys`].
fn io_error(what: &'static str) -> impl Fn(io::Error) -> StateError {
    move |source| StateError::Ioctl { what, source }
}

/// Saves vCPU number `index`, which must not run. Must be called on the vCPU's own thread.
///
/// The instruction at which the vCPU exited is completed first. Further exits of that instruction
/// are passed to `handle`, see [`complete_io`]. The VMM must have handled the first exit already,
/// as after every `KVM_RUN`.
///
/// # Errors
/// Fails with [`StateError::IoPending`] if `handle` did not handle an exit, and with KVM's errors.
pub fn save_vcpu(
    vcpu: &mut VcpuFd,
    index: u32,
    saver: &VcpuSaver,
    handle: impl FnMut(VcpuExit<'_>) -> bool,
) -> Result<Section, StateError> {
    complete_io(vcpu, handle)?;
    section(VCPU_SECTION, index, saver.save(vcpu)?.encode())
}

/// Loads a vCPU that has not run yet. Must be called on the vCPU's own thread, after [`load_clock`]
/// and before [`load_vm`].
///
/// # Errors
/// Fails if the section is not that of a vCPU or cannot be decoded, or if KVM refuses it. The state
/// of the vCPU is undefined then.
pub fn load_vcpu(
    vcpu: &mut VcpuFd,
    section: &Section,
    saver: &VcpuSaver,
    clock: &ClockLoaded,
) -> Result<LoadedVcpu, StateError> {
    saver.load(vcpu, &VcpuState::decode(data(section, VCPU_SECTION)?)?, clock)
}

/// Saves the VM's clock, interrupt controllers and timer. All vCPUs must be stopped. `irqchip` is
/// the kind that the VMM created.
///
/// # Errors
/// Fails if KVM refuses.
pub fn save_vm(saver: &VcpuSaver, vm: &VmFd, irqchip: Irqchip) -> Result<Section, StateError> {
    section(VM_SECTION, 0, KvmState::save(saver, vm, irqchip)?.encode())
}

/// Loads the VM's clock. Must be called before any [`load_vcpu`].
///
/// # Errors
/// Fails if the section is not that of the VM or cannot be decoded, or if KVM refuses it.
pub fn load_clock(vm: &VmFd, section: &Section) -> Result<ClockLoaded, StateError> {
    KvmState::decode(data(section, VM_SECTION)?)?.load_clock(vm)
}

/// Loads interrupt controllers and timer. Must be called after all calls of [`load_vcpu`] and
/// before any vCPU runs. `irqchip` is the kind that the VMM created here, which must be the same as
/// the saved one.
///
/// # Errors
/// Fails if the section is not that of the VM or cannot be decoded, if the VM has another irqchip,
/// or if KVM refuses.
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
