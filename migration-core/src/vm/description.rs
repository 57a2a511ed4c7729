//! What identifies a VM, what its destination must know of it, and how large its state is.

use std::{fmt, time::Duration};

use bytes::Bytes;

use crate::{device::DeviceKind, page::RamLayout};

/// Identifies a VM for as long as it lives, on whatever host: 16 bytes that no other VM has, such as a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct VmId(pub [u8; 16]);

/// 32 hexadecimal digits.
impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What the source tells about its VM before any RAM moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDescription {
    /// Which VM it is.
    pub id: VmId,
    /// Where its RAM lies.
    pub layout: RamLayout,
    /// Its devices, with their versions.
    pub devices: Vec<DeviceKind>,
    /// What its vCPUs need of the host (CPUID, XCR0, TSC, MSRs), encoded by whoever understands it (migration-kvm's
    /// `HostNeeds`); empty if nothing.
    pub host_needs: Bytes,
    /// What the VMM needs to build the same machine; only the VMM understands it.
    pub config: Bytes,
}

/// How large a section of state is expected to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionEstimate {
    /// The section's [name](crate::state::Section::name).
    pub name: String,
    /// Which of several of that name.
    pub instance: u32,
    /// Bytes of data.
    pub bytes: u64,
}

/// What saving a VM's state in the pause is expected to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateEstimate {
    /// The sections that [`SourceVm::save_state`](super::SourceVm::save_state) would return now, without what
    /// [`iterate_state`](super::SourceVm::iterate_state) reports as pending. Sections that are small and never grow may be left out.
    pub sections: Vec<SectionEstimate>,
    /// How long saving them takes; `None` if that is not known.
    pub save_time: Option<Duration>,
}

impl StateEstimate {
    /// Returns the bytes of all sections together.
    pub fn bytes(&self) -> u64 {
        self.sections.iter().fold(0, |sum, section| sum.saturating_add(section.bytes))
    }
}
