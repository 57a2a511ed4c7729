//! The wire format, version 1. `docs/wire.md` specifies it; this module is its only implementation.
//! [`FRAME_KINDS`] is the table of frames, and [`limits`](crate::limits) has all bounds.
//!
//! A lane is one channel. The source opens it with a [`Preamble`]. Then both sides send frames: a
//! [`Header`] of 32 bytes, a body whose meaning depends on the header's kind, and for
//! [`Bulk::Pages`] the raw page data. No memory is allocated by a length before the length was
//! compared with its bound.

mod bulk;
mod checkpoint;
mod control;
mod kinds;
mod page_list;
mod stores;

pub use bulk::{Bulk, Content, Extent};
pub use checkpoint::Checkpoint;
pub use control::{Control, ErrorCode, FaultSummary, Hello, Welcome};
pub(crate) use control::{decode_vm, encode_vm};
pub use kinds::{FRAME_KINDS, FrameKind, Lanes, Sender, frame_kind};
pub(crate) use page_list::{add_missing, encode_bitmap, missing_frames};
pub(crate) use stores::located_frames;
pub use stores::{Located, TablePart};

use crate::codec::{DecodeError, Reader, Writer};
pub use crate::limits::{
    MAX_BODY, MAX_CONFIG, MAX_DEMAND_LANES, MAX_DEVICES, MAX_ERROR_TEXT, MAX_EXTENTS, MAX_IDENTITY, MAX_PAYLOAD,
    MAX_REQUESTS, MAX_STRATEGY_NAME, MAX_STREAMS, STATE_CHUNK,
};

/// The oldest version of the wire format that this build speaks.
pub const OLDEST_VERSION: u16 = 1;
/// The newest version of the wire format that this build speaks.
pub const VERSION: u16 = 1;
/// The first bytes of every lane.
pub const MAGIC: [u8; 8] = *b"LIVEMIGR";
/// The first bytes of an encrypted lane, in place of [`MAGIC`]. The bytes after them have the
/// format of migration-crypto.
pub const SEALED_MAGIC: [u8; 8] = *b"LIVESEAL";

/// Feature bit: page data carries a CRC-32. Costs a copy of every page at the source.
pub const FEATURE_PAYLOAD_CRC: u32 = 1;
/// Feature bit: the VM may be handed over before all its pages have moved. The destination then
/// requests the missing pages on demand lanes. The destination grants the feature if it has a
/// [`Pager`](crate::pager::Pager).
pub const FEATURE_POST_COPY: u32 = 2;
/// Feature bit: in post-copy, pages move in aligned blocks of [`HUGE_BLOCK`] pages, because the
/// destination's RAM cannot be split further. The destination grants it together with
/// [`FEATURE_POST_COPY`].
pub const FEATURE_HUGE_BLOCKS: u32 = 4;
/// Feature bit: while pages are missing at the destination, it sends checkpoints of the running VM
/// back on a checkpoint lane, and holds the VM's output until they are committed. Granted only
/// together with [`FEATURE_POST_COPY`].
pub const FEATURE_CHECKPOINTS: u32 = 8;
/// Feature bit: source and destination are on one machine and share the VM's RAM. The memory files
/// of the RAM follow the hello, one file for each region, and no page moves. Excludes all other
/// bits.
pub const FEATURE_SHARED_RAM: u32 = 16;
/// Feature bit: pages may be in page stores. The source announces their locations, and streams
/// missing pages to the destination until the destination has *released* it. The destination grants
/// the feature together with [`FEATURE_POST_COPY`], if it was started with page stores.
pub const FEATURE_STORES: u32 = 32;
/// Every feature bit that this build knows.
pub const FEATURES: u32 = FEATURE_PAYLOAD_CRC
    | FEATURE_POST_COPY
    | FEATURE_HUGE_BLOCKS
    | FEATURE_CHECKPOINTS
    | FEATURE_SHARED_RAM
    | FEATURE_STORES;
/// The number of pages of a huge page.
pub const HUGE_BLOCK: u64 = 512;

/// The purpose of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneKind {
    /// The first lane of a session: small, ordered frames in both directions.
    Control,
    /// Pages. A session has one or more of these lanes.
    Bulk,
    /// A new control lane for a session whose first one was lost.
    Reattach,
    /// Pages for which the guest at the destination waits: requests in one direction, pages in the
    /// other.
    Demand,
    /// Checkpoints of the VM, from the destination that runs it.
    Checkpoint,
}

impl LaneKind {
    /// Returns the number of the kind on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::Control => 0,
            Self::Bulk => 1,
            Self::Reattach => 2,
            Self::Demand => 3,
            Self::Checkpoint => 4,
        }
    }

    /// Returns the kind with the number `code`.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Control,
            1 => Self::Bulk,
            2 => Self::Reattach,
            3 => Self::Demand,
            4 => Self::Checkpoint,
            _ => return None,
        })
    }
}

/// A token that identifies a session, and proves that a further lane belongs to it. The destination
/// chooses it at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct SessionToken(pub [u8; 16]);

/// The first bytes that the source sends on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The oldest version that the source speaks.
    pub oldest: u16,
    /// The newest version that the source speaks.
    pub newest: u16,
    /// The purpose of the lane.
    pub kind: LaneKind,
    /// The number of the lane among the lanes of its kind.
    pub index: u16,
    /// The session to which the lane belongs; zeros on the first lane, which has no session yet.
    pub session: SessionToken,
}

impl Preamble {
    /// The length of an encoded preamble in bytes.
    pub const LEN: usize = 36;

    /// Returns the preamble of a lane of this build.
    pub fn new(kind: LaneKind, index: u16, session: SessionToken) -> Self {
        Self { oldest: OLDEST_VERSION, newest: VERSION, kind, index, session }
    }

    /// Returns the encoded preamble.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.bytes(&MAGIC)
            .u16(self.oldest)
            .u16(self.newest)
            .u8(self.kind.code())
            .u8(0)
            .u16(self.index)
            .bytes(&self.session.0);
        let mut bytes = [0; Self::LEN];
        bytes[..32].copy_from_slice(&w.into_bytes());
        let crc = crc32fast::hash(&bytes[..32]);
        bytes[32..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes a preamble. Does not check the range of versions: see [`negotiate`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let magic: [u8; 8] = r.array("magic")?;
        if magic == SEALED_MAGIC {
            return Err(DecodeError::invalid(
                "magic",
                "this destination takes only plain migrations, the source wants an encrypted one: encrypt at both ends, with \
                 the same kind of key, or at neither",
            ));
        }
        if magic != MAGIC {
            return Err(DecodeError::invalid("magic", "the peer does not speak this protocol"));
        }
        let (oldest, newest) = (r.u16("oldest version")?, r.u16("newest version")?);
        let code = r.u8("lane kind")?;
        let unknown = || DecodeError::invalid("lane kind", format!("unknown kind {code}"));
        let kind = LaneKind::from_code(code).ok_or_else(unknown)?;
        if r.u8("reserved")? != 0 {
            return Err(DecodeError::invalid("reserved", "not zero"));
        }
        let (index, session) = (r.u16("lane index")?, SessionToken(r.array("session")?));
        if r.u32("crc")? != crc32fast::hash(&bytes[..32]) {
            return Err(DecodeError::Checksum { field: "preamble" });
        }
        Ok(Self { oldest, newest, kind, index, session })
    }
}

/// Returns the newest version that is in both ranges, or `None` if there is none.
pub fn negotiate(oldest: u16, newest: u16) -> Option<u16> {
    let version = newest.min(VERSION);
    (version >= oldest.max(OLDEST_VERSION)).then_some(version)
}

/// The header of a frame, which precedes the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the frame's [kind](FrameKind).
    pub kind: u8,
    /// The VM to which the frame belongs, for receivers that host several VMs; 0 for the only one.
    pub vm: u32,
    /// The position of the frame in its lane and direction, from 0, so that a replayed or lost
    /// frame is noticed.
    pub sequence: u32,
    /// The epoch on a control lane, or the generation (round) on a bulk lane.
    pub number: u32,
    /// The length of the body in bytes.
    pub body: u32,
    /// The number of bytes of page data after the body.
    pub payload: u32,
    /// The CRC-32 of the body.
    pub body_crc: u32,
}

impl Header {
    /// The length of an encoded header in bytes.
    pub const LEN: usize = 32;

    /// Returns the encoded header.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u8(self.kind).u8(0).u16(0).u32(self.vm).u32(self.sequence).u32(self.number);
        w.u32(self.body).u32(self.payload).u32(self.body_crc);
        let mut bytes = [0; Self::LEN];
        bytes[..28].copy_from_slice(&w.into_bytes());
        let crc = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes a header, and checks that its lengths are within their bounds.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let kind = r.u8("kind")?;
        if r.u8("flags")? != 0 || r.u16("reserved")? != 0 {
            return Err(DecodeError::invalid("flags", "not zero"));
        }
        let (vm, sequence, number) = (r.u32("vm")?, r.u32("sequence")?, r.u32("number")?);
        let (body, payload, body_crc) = (r.u32("body length")?, r.u32("payload length")?, r.u32("body crc")?);
        if r.u32("header crc")? != crc32fast::hash(&bytes[..28]) {
            return Err(DecodeError::Checksum { field: "header" });
        }
        for (field, len, limit) in [("body", body, MAX_BODY), ("payload", payload, MAX_PAYLOAD)] {
            if len as usize > limit {
                return Err(DecodeError::TooLong { field, len: len.into(), limit: limit as u64 });
            }
        }
        Ok(Self { kind, vm, sequence, number, body, payload, body_crc })
    }

    /// Checks that `body` has the length and the checksum of this header.
    pub fn check_body(&self, body: &[u8]) -> Result<(), DecodeError> {
        if body.len() != self.body as usize || crc32fast::hash(body) != self.body_crc {
            return Err(DecodeError::Checksum { field: "body" });
        }
        Ok(())
    }
}

/// Returns header and body of a frame, without page data.
pub(crate) fn frame(kind: u8, vm: u32, sequence: u32, number: u32, payload: u32, body: &[u8]) -> Vec<u8> {
    // this crate makes all bodies; they are bounded by MAX_BODY, far below u32::MAX
    let header =
        Header { kind, vm, sequence, number, body: body.len() as u32, payload, body_crc: crc32fast::hash(body) };
    let mut bytes = Vec::with_capacity(Header::LEN + body.len());
    bytes.extend_from_slice(&header.encode());
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(at in 0usize..32 * 8) {
            let header = Header { kind: 3, vm: 1, sequence: 2, number: 3, body: 4, payload: 5, body_crc: 6 };
            let mut bytes = header.encode();
            prop_assert_eq!(Header::decode(&bytes), Ok(header));
            bytes[at / 8] ^= 1 << (at % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn any_flipped_bit_of_a_preamble_is_noticed(at in 0usize..Preamble::LEN * 8, token: [u8; 16], index: u16) {
            let preamble = Preamble::new(LaneKind::Bulk, index, SessionToken(token));
            let mut bytes = preamble.encode();
            prop_assert_eq!(Preamble::decode(&bytes), Ok(preamble));
            bytes[at / 8] ^= 1 << (at % 8);
            prop_assert!(Preamble::decode(&bytes).is_err());
        }
    }

    #[test]
    fn version_windows() {
        assert_eq!(negotiate(1, 1), Some(1));
        assert_eq!(negotiate(1, 9), Some(1));
        assert_eq!(negotiate(2, 9), None);
        assert_eq!(negotiate(0, 0), None);
    }

    #[test]
    fn oversized_lengths_are_refused_before_allocation() {
        let mut header = Header { kind: 0, vm: 0, sequence: 0, number: 0, body: u32::MAX, payload: 0, body_crc: 0 };
        assert!(matches!(Header::decode(&header.encode()), Err(DecodeError::TooLong { .. })));
        (header.body, header.payload) = (0, u32::MAX);
        assert!(matches!(Header::decode(&header.encode()), Err(DecodeError::TooLong { .. })));
    }

    #[test]
    fn lane_kinds_keep_their_numbers() {
        use LaneKind::*;
        assert_eq!([Control, Bulk, Reattach, Demand, Checkpoint].map(LaneKind::code), [0, 1, 2, 3, 4]);
        assert!((0..=u8::MAX).all(|code| LaneKind::from_code(code).is_none_or(|kind| kind.code() == code)));
        assert_eq!((0..=u8::MAX).filter_map(LaneKind::from_code).count(), 5);
    }
}
