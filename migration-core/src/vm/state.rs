//! The state of a VM apart from its RAM: named sections with versions.

use bytes::Bytes;

use crate::codec::{DecodeError, Reader, Writer};
pub use crate::limits::{MAX_SECTION, MAX_SECTION_NAME, MAX_SECTIONS, MAX_STATE};

/// A named part of the state, such as the registers of one vCPU or the state of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The name of the part: `vcpu`, `irqchip`, `serial`, …; at most [`MAX_SECTION_NAME`] bytes.
    pub name: String,
    /// The number of the section among those of the same name, such as the index of the vCPU.
    pub instance: u32,
    /// The version of the encoding of `data`. A loader refuses versions that it does not know.
    pub version: u32,
    /// The encoded state; at most [`MAX_SECTION`] bytes.
    pub data: Bytes,
}

impl Section {
    pub(crate) fn encode(&self, w: &mut Writer) {
        w.text(&self.name).u32(self.instance).u32(self.version).blob(&self.data);
    }

    /// Decodes a piece of device state that was saved while the guest ran. The piece has at most
    /// `max_bytes` bytes of data.
    pub(crate) fn decode_piece(r: &mut Reader<'_>, max_bytes: usize) -> Result<Self, DecodeError> {
        Ok(Self {
            name: r.text(MAX_SECTION_NAME, "piece name")?,
            instance: r.u32("piece instance")?,
            version: r.u32("piece version")?,
            data: Bytes::copy_from_slice(r.blob(max_bytes, "piece data")?),
        })
    }
}

/// All sections of a VM, in the order in which they are loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmState {
    /// The sections.
    pub sections: Vec<Section>,
}

impl VmState {
    /// Returns the section with this name and instance, or `None` if there is none.
    pub fn find(&self, name: &str, instance: u32) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name && s.instance == instance)
    }

    /// Returns the number of bytes of all sections' data together.
    pub fn bytes(&self) -> usize {
        self.sections.iter().map(|s| s.data.len()).sum()
    }

    /// Returns the encoding that is sent to the destination.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.count(self.sections.len());
        for s in &self.sections {
            s.encode(&mut w);
        }
        w.into_bytes()
    }

    /// Decodes a state that [`encode`](VmState::encode) encoded.
    ///
    /// # Errors
    /// Returns an error if a length is above its limit, a section appears twice, the bytes end too
    /// early, or bytes are left.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > MAX_STATE {
            return Err(DecodeError::TooLong { field: "state", len: bytes.len() as u64, limit: MAX_STATE as u64 });
        }
        let mut r = Reader::new(bytes);
        let count = r.count(MAX_SECTIONS, "number of sections")?;
        let mut seen = std::collections::HashSet::new();
        let mut sections = Vec::new();
        for _ in 0..count {
            let name = r.text(MAX_SECTION_NAME, "section name")?;
            let (instance, version) = (r.u32("section instance")?, r.u32("section version")?);
            let data = Bytes::copy_from_slice(r.blob(MAX_SECTION, "section data")?);
            if !seen.insert((name.clone(), instance)) {
                return Err(DecodeError::invalid("section name", format!("{name} {instance} appears twice")));
            }
            sections.push(Section { name, instance, version, data });
        }
        r.finish()?;
        Ok(Self { sections })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(sections in prop::collection::vec(("[a-z]{0,9}", any::<u32>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..50)), 0..6)) {
            let mut state = VmState::default();
            for (name, instance, version, data) in sections {
                if state.find(&name, instance).is_none() {
                    state.sections.push(Section { name, instance, version, data: data.into() });
                }
            }
            prop_assert_eq!(VmState::decode(&state.encode()).unwrap(), state);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = VmState::decode(&bytes);
        }
    }

    #[test]
    fn lengths_above_their_limits_are_refused() {
        let mut w = Writer::new();
        w.count(1).text("x").u32(0).u32(0).u32(u32::MAX);
        assert!(matches!(VmState::decode(&w.into_bytes()), Err(DecodeError::TooLong { .. })));
        let s = Section { name: "a".into(), instance: 1, version: 1, data: Bytes::new() };
        let twice = VmState { sections: vec![s.clone(), s] }.encode();
        assert!(matches!(VmState::decode(&twice), Err(DecodeError::Invalid { .. })));
    }

    #[test]
    fn a_section_is_found_by_name_and_instance() {
        let section = |name: &str, instance| Section { name: name.into(), instance, version: 1, data: Bytes::new() };
        let state = VmState { sections: vec![section("a", 1), section("a", 2), section("b", 1)] };
        for (at, s) in state.sections.iter().enumerate() {
            assert!(std::ptr::eq(state.find(&s.name, s.instance).unwrap(), &state.sections[at]));
        }
        assert!(state.find("b", 2).is_none() && state.find("c", 1).is_none());
    }

    #[test]
    fn a_state_may_be_as_large_as_its_limit() {
        let section = |instance, len| Section { name: "x".into(), instance, version: 1, data: vec![0; len].into() };
        // the number of sections, and for each section the length of its name, the name, two
        // numbers and the length of its data
        let heads = 4 + 4 * (4 + 1 + 4 + 4 + 4);
        let mut sections: Vec<_> = (0..3).map(|i| section(i, MAX_SECTION)).collect();
        sections.push(section(3, MAX_STATE - 3 * MAX_SECTION - heads));
        let state = VmState { sections };
        let mut bytes = state.encode();
        assert_eq!(bytes.len(), MAX_STATE);
        assert!(VmState::decode(&bytes).is_ok());
        bytes.push(0);
        let too_long = DecodeError::TooLong { field: "state", len: MAX_STATE as u64 + 1, limit: MAX_STATE as u64 };
        assert_eq!(VmState::decode(&bytes), Err(too_long));
    }
}
