//! What a snapshot of a VM holds beside its pages: everything that is needed to build, load and
//! start it.

use crate::{
    codec::{DecodeError, Reader, Writer},
    state::{MAX_SECTION, MAX_SECTIONS, MAX_STATE, Section, VmState},
    vm::VmDescription,
    wire::{decode_vm, encode_vm},
};

/// Version of the encoding.
const VERSION: u32 = 1;

/// A VM at one moment, without its pages. In a [`VersionStore`](crate::store::VersionStore) it
/// takes the place of the state that is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedVm {
    /// From what it is built.
    pub vm: VmDescription,
    /// The epoch that owned it: who restores it owns it under a higher one.
    pub epoch: u32,
    /// Whether its guest ran, or was paused by its user.
    pub running: bool,
    /// Pieces of device state that were saved while the guest ran, in order.
    pub pieces: Vec<Section>,
    /// The state at that moment.
    pub state: VmState,
}

impl SavedVm {
    /// Returns the form in which it is kept.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(VERSION).u32(self.epoch).bool(self.running);
        encode_vm(&self.vm, &mut w);
        w.count(self.pieces.len());
        for piece in &self.pieces {
            piece.encode(&mut w);
        }
        w.blob(&self.state.encode());
        w.into_bytes()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// Returns an error if it is of another version, a length is above its limit, or the bytes are
    /// something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let version = r.u32("snapshot version")?;
        if version != VERSION {
            return Err(DecodeError::invalid("snapshot version", format!("{version}, only {VERSION} is known")));
        }
        let (epoch, running) = (r.u32("epoch")?, r.bool("running")?);
        let vm = decode_vm(&mut r)?;
        let mut pieces = Vec::new();
        for _ in 0..r.count(MAX_SECTIONS, "number of pieces")? {
            pieces.push(Section::decode_piece(&mut r, MAX_SECTION)?);
        }
        let state = VmState::decode(r.blob(MAX_STATE, "state")?)?;
        r.finish()?;
        Ok(Self { vm, epoch, running, pieces, state })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{RamLayout, RamRegion, device::DeviceKind, vm::VmId};

    fn saved() -> SavedVm {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }]).unwrap();
        let devices = vec![DeviceKind { name: "serial".into(), instance: 0, oldest: 1, version: 3 }];
        let section = |n: u8| Section { name: "gpu".into(), instance: 0, version: 1, data: vec![n; 9].into() };
        SavedVm {
            vm: VmDescription { id: VmId([7; 16]), layout, devices, host_needs: "n".into(), config: "c".into() },
            epoch: 5,
            running: true,
            pieces: vec![section(1), section(2)],
            state: VmState { sections: vec![section(3)] },
        }
    }

    #[test]
    fn round_trip() {
        let bytes = saved().encode();
        assert_eq!(SavedVm::decode(&bytes), Ok(saved()));
        assert!((0..bytes.len()).all(|end| SavedVm::decode(&bytes[..end]).is_err()));
        let newer = [&2u32.to_le_bytes(), &bytes[4..]].concat();
        assert!(SavedVm::decode(&newer).unwrap_err().to_string().contains("only 1 is known"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), flip in any::<prop::sample::Index>()) {
            let _ = SavedVm::decode(&bytes);
            let mut flipped = saved().encode();
            let at = flip.index(flipped.len());
            flipped[at] ^= bytes.first().copied().unwrap_or(1);
            let _ = SavedVm::decode(&flipped);
        }
    }
}
