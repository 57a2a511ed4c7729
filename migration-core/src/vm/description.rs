//! The description of a VM for the destination, and estimates of its state.

use std::time::Duration;

use bytes::Bytes;

use crate::{device::DeviceKind, page::RamLayout, vm_id::VmId};

/// The description of a VM, which the source sends before any RAM moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDescription {
    /// The identity of the VM.
    pub id: VmId,
    /// The regions of the VM's RAM in guest physical address space.
    pub layout: RamLayout,
    /// The devices of the VM and their versions.
    pub devices: Vec<DeviceKind>,
    /// The features that the vCPUs need of the host (CPUID, XCR0, TSC, MSRs), in an encoding that
    /// the VMM chooses, such as `HostNeeds` of migration-kvm. Empty if there are none.
    pub host_needs: Bytes,
    /// The configuration from which the VMM builds the same machine. This crate does not interpret
    /// it.
    pub config: Bytes,
}

/// The expected size of a section of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionEstimate {
    /// The section's [name](crate::state::Section::name).
    pub name: String,
    /// The number of the section among those of the same name.
    pub instance: u32,
    /// The size of the section's data in bytes.
    pub bytes: u64,
}

/// The expected size of the state that is saved in the pause, and the time to save it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateEstimate {
    /// The sections that [`SourceVm::save_state`](super::SourceVm::save_state) would return now,
    /// without the bytes that [`iterate_state`](super::SourceVm::iterate_state) reports as pending.
    /// Sections that are small and never grow may be left out.
    pub sections: Vec<SectionEstimate>,
    /// The time to save the sections, or `None` if it is not known.
    pub save_time: Option<Duration>,
}

impl StateEstimate {
    /// Returns the sum of the sizes of all sections in bytes.
    pub fn bytes(&self) -> u64 {
        self.sections.iter().fold(0, |sum, section| sum.saturating_add(section.bytes))
    }
}
