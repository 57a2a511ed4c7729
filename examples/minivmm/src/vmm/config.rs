//! The configuration of a machine, in a form that is sent to destinations.

use migration_core::{
    PAGE_SIZE, RamLayout, RamRegion,
    codec::{DecodeError, Reader, Writer},
    vm::VmId,
};
use migration_kvm::{ram::Backing, tracker::TrackerKind};

/// The end of RAM below 4 GiB. Further RAM lies above 4 GiB.
const HOLE_START: u64 = 3 << 30;
const HOLE_END: u64 = 4 << 30;
/// The most vCPUs of a machine. The guests' board has records for this number.
pub(crate) const MAX_CPUS: u32 = 16;
/// The version of the encoding.
const VERSION: u32 = 1;

/// The configuration of a machine that a source has and a destination builds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MachineConfig {
    pub(crate) id: VmId,
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: u32,
    pub(crate) backing: Backing,
    pub(crate) tracker: TrackerKind,
    /// Whether the guest consists of threads instead of vCPUs.
    pub(crate) software: bool,
}

impl MachineConfig {
    pub(crate) fn new(memory_bytes: u64, cpus: u32, backing: Backing, tracker: TrackerKind) -> Self {
        use std::hash::{BuildHasher, RandomState};
        // The ID is unique enough for the VMs of a test host: it consists of keys drawn by the
        // operating system, and of the process ID.
        let (a, b) = (RandomState::new().hash_one(std::process::id()), RandomState::new().hash_one(0));
        let mut id = [0; 16];
        id[..8].copy_from_slice(&a.to_le_bytes());
        id[8..].copy_from_slice(&b.to_le_bytes());
        Self { id: VmId(id), memory_bytes, cpus, backing, tracker, software: false }
    }

    /// Returns the layout of RAM from address 0, with the usual hole below 4 GiB.
    pub(crate) fn layout(&self) -> Result<RamLayout, String> {
        let low = self.memory_bytes.min(HOLE_START);
        let mut regions = vec![RamRegion { gpa: 0, len: low }];
        if self.memory_bytes > low {
            regions.push(RamRegion { gpa: HOLE_END, len: self.memory_bytes - low });
        }
        RamLayout::new(regions).map_err(|e| format!("{} bytes of memory: {e}", self.memory_bytes))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(VERSION).bytes(&self.id.0).u64(self.memory_bytes).u32(self.cpus);
        w.text(self.backing.name()).text(self.tracker.name()).bool(self.software);
        w.into_bytes()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let version = r.u32("configuration version")?;
        if version != VERSION {
            return Err(DecodeError::invalid("configuration version", format!("{version}, not {VERSION}")));
        }
        let (id, memory_bytes, cpus) = (VmId(r.array("id")?), r.u64("memory")?, r.u32("cpus")?);
        if !(1..=MAX_CPUS).contains(&cpus) || memory_bytes == 0 || !memory_bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Err(DecodeError::invalid("configuration", format!("{cpus} CPUs, {memory_bytes} bytes")));
        }
        let invalid = |field| move |e: migration_kvm::ram::UnknownName| DecodeError::invalid(field, e.to_string());
        let backing = r.text(32, "backing")?.parse().map_err(invalid("backing"))?;
        let tracker = r.text(32, "tracker")?.parse().map_err(invalid("tracker"))?;
        let software = r.bool("software guest")?;
        r.finish()?;
        Ok(Self { id, memory_bytes, cpus, backing, tracker, software })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_travel_and_nonsense_is_refused() {
        let config = MachineConfig::new(6 << 30, 4, Backing::Memfd, TrackerKind::DirtyRing);
        let bytes = config.encode();
        assert_eq!(MachineConfig::decode(&bytes), Ok(config.clone()));
        assert_eq!(config.layout().unwrap().pages(), 6 << 18);
        assert_eq!(config.layout().unwrap().regions().len(), 2);
        for end in 0..bytes.len() {
            assert!(MachineConfig::decode(&bytes[..end]).is_err());
        }
        let wrong = MachineConfig { cpus: 17, ..config };
        assert!(MachineConfig::decode(&wrong.encode()).is_err());
    }
}
