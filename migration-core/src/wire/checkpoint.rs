//! The frames of the checkpoint lane, in addition to [`Bulk::Pages`](super::Bulk::Pages). They
//! carry the state of the destination's VM back to the source.

use bytes::Bytes;

use super::{
    Header, frame,
    kinds::{
        CHECKPOINT_COMMIT as COMMIT, CHECKPOINT_COMMITTED as COMMITTED, CHECKPOINT_EVERY as EVERY,
        CHECKPOINT_IDENTITY as IDENTITY, CHECKPOINT_STATE as STATE,
    },
};
use crate::{
    codec::{DecodeError, Reader, Writer},
    limits::{MAX_IDENTITY, STATE_CHUNK},
};

/// A frame of the checkpoint lane. The header's `number` is the number of the checkpoint, from 1;
/// it is 0 before the first one. `S` frames come from the source, `D` frames from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checkpoint {
    /// S, the first frame: the interval of checkpoints, and the identity of the source.
    Every {
        /// The time from the end of one checkpoint to the beginning of the next in microseconds, or
        /// 0 if no checkpoints are wanted.
        interval_us: u64,
        /// The time without a link after which the other side counts as dead, in microseconds.
        detect_us: u64,
        /// The information about the source that a fence needs; at most [`MAX_IDENTITY`] bytes.
        identity: Bytes,
    },
    /// D, the first frame: the information about this host that a fence needs; at most
    /// [`MAX_IDENTITY`] bytes.
    Identity(Bytes),
    /// D: a piece of the encoded state. The pieces come in order, after the pages.
    State(Bytes),
    /// D: the checkpoint is complete.
    Commit {
        /// The number of pages that were sent for the checkpoint. A page counts each time.
        pages: u64,
        /// The number of bytes of state.
        state_bytes: u64,
    },
    /// S: the checkpoint is kept. The VM's output up to the checkpoint may leave.
    Committed,
}

impl Checkpoint {
    /// Returns whether frames of the kind `kind` are frames of this type.
    pub fn is_kind(kind: u8) -> bool {
        (EVERY..=COMMITTED).contains(&kind)
    }

    /// Returns header and body of the frame.
    pub fn encode(&self, sequence: u32, number: u32) -> Vec<u8> {
        let mut w = Writer::new();
        let kind = match self {
            Checkpoint::Every { interval_us, detect_us, identity } => {
                w.u64(*interval_us).u64(*detect_us).blob(identity);
                EVERY
            }
            Checkpoint::Identity(identity) => {
                w.blob(identity);
                IDENTITY
            }
            Checkpoint::State(chunk) => {
                w.bytes(chunk);
                STATE
            }
            Checkpoint::Commit { pages, state_bytes } => {
                w.u64(*pages).u64(*state_bytes);
                COMMIT
            }
            Checkpoint::Committed => COMMITTED,
        };
        frame(kind, 0, sequence, number, 0, &w.into_bytes())
    }

    /// Decodes the body of a frame whose header was read before.
    ///
    /// # Errors
    /// Returns an error if the frame is not one of a checkpoint lane, or a field is out of its
    /// bounds.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, DecodeError> {
        header.check_body(body)?;
        if header.payload != 0 {
            return Err(DecodeError::invalid("payload length", "only pages have a payload"));
        }
        let mut r = Reader::new(body);
        let frame = match header.kind {
            EVERY => Checkpoint::Every {
                interval_us: r.u64("interval")?,
                detect_us: r.u64("detection time")?,
                identity: identity(&mut r)?,
            },
            IDENTITY => Checkpoint::Identity(identity(&mut r)?),
            STATE => {
                let chunk = r.bytes(r.remaining().min(STATE_CHUNK), "state")?;
                Checkpoint::State(Bytes::copy_from_slice(chunk))
            }
            COMMIT => Checkpoint::Commit { pages: r.u64("pages")?, state_bytes: r.u64("state bytes")? },
            COMMITTED => Checkpoint::Committed,
            kind => return Err(DecodeError::invalid("kind", format!("{kind:#x} is no frame of a checkpoint lane"))),
        };
        r.finish()?;
        Ok(frame)
    }
}

fn identity(r: &mut Reader<'_>) -> Result<Bytes, DecodeError> {
    Ok(Bytes::copy_from_slice(r.blob(MAX_IDENTITY, "identity")?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<Checkpoint, DecodeError> {
        let header = Header::decode(bytes.first_chunk().unwrap())?;
        Checkpoint::decode(&header, &bytes[Header::LEN..])
    }

    #[test]
    fn round_trip() {
        for sample in [
            Checkpoint::Every { interval_us: 100_000, detect_us: 1, identity: Bytes::from_static(b"me") },
            Checkpoint::Identity(Bytes::from_static(b"host 7, process 12")),
            Checkpoint::State(Bytes::from_static(b"state")),
            Checkpoint::Commit { pages: 3, state_bytes: 5 },
            Checkpoint::Committed,
        ] {
            let bytes = sample.encode(4, 2);
            assert!(Checkpoint::is_kind(bytes[0]));
            assert_eq!(decode(&bytes), Ok(sample));
        }
        let long = Checkpoint::Identity(vec![0; MAX_IDENTITY + 1].into());
        assert!(decode(&long.encode(0, 0)).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(kind: u8, body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(&frame(kind, 0, 0, 0, 0, &body));
        }
    }
}
