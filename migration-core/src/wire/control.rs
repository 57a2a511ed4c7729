//! The frames of the control lane.

use bytes::Bytes;

use super::{Header, Located, SessionToken, TablePart, frame, frame_kind, kinds};
use crate::{
    codec::{DecodeError, Reader, Writer},
    device::DeviceKind,
    limits::{
        MAX_CONFIG, MAX_DEMAND_LANES, MAX_DEVICES, MAX_ERROR_TEXT, MAX_REGIONS, MAX_SECTION_NAME, MAX_STRATEGY_NAME,
        MAX_STREAMS, STATE_CHUNK,
    },
    page::RamLayout,
    state::Section,
    vm::{VmDescription, VmId},
};

/// The reason why a side ends an attempt, as it is sent to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// A reason that no other code names.
    Other,
    /// The version windows do not overlap.
    Version,
    /// The peer broke the protocol.
    Protocol,
    /// The destination is busy with another VM or another session.
    Busy,
    /// The destination cannot run this VM.
    Mismatch,
    /// The VMM failed to save, build, load or start the VM.
    State,
    /// Memory, threads or descriptors are short.
    Resources,
    /// The user cancelled.
    Cancelled,
    /// The receiver does not know the session.
    UnknownSession,
    /// The epoch is not above the last one that the receiver has seen.
    StaleEpoch,
    /// The two sides do not agree on their identities, or on whether and how to encrypt.
    Security,
    /// The guest has ended by itself, so there is no VM any more. A destination sends it for a VM
    /// that runs there while pages are still missing.
    VmEnded,
}

const CODES: [ErrorCode; 12] = [
    ErrorCode::Other,
    ErrorCode::Version,
    ErrorCode::Protocol,
    ErrorCode::Busy,
    ErrorCode::Mismatch,
    ErrorCode::State,
    ErrorCode::Resources,
    ErrorCode::Cancelled,
    ErrorCode::UnknownSession,
    ErrorCode::StaleEpoch,
    ErrorCode::Security,
    ErrorCode::VmEnded,
];

impl ErrorCode {
    fn to_wire(self) -> u16 {
        CODES.iter().position(|&c| c == self).unwrap_or(0) as u16
    }

    fn from_wire(code: u16) -> Self {
        // a code of a later version still means an error
        CODES.get(usize::from(code)).copied().unwrap_or(ErrorCode::Other)
    }
}

/// The source's first frame: it describes what is to be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The feature bits that the source asks for.
    pub features: u32,
    /// The number of bulk lanes that the source wants to open.
    pub streams: u16,
    /// The name of the source's strategy, for messages.
    pub strategy: String,
    /// The description of the VM.
    pub vm: VmDescription,
}

/// The destination's answer to a hello, sent when the VM is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version of the protocol that both sides use from here on.
    pub version: u16,
    /// The feature bits that are granted.
    pub features: u32,
    /// The number of bulk lanes that the source must open.
    pub streams: u16,
    /// The token that goes into the preamble of each further lane.
    pub session: SessionToken,
}

/// Statistics of the faults on missing pages at the destination. Times are in microseconds, from
/// the moment at which a fault was read until its page was installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultSummary {
    /// The number of faults on missing pages.
    pub count: u64,
    /// The number of faults of threads that the VMM named as vCPUs.
    pub vcpu: u64,
    /// The median time.
    pub p50_us: u64,
    /// The 90th percentile.
    pub p90_us: u64,
    /// The 99th percentile.
    pub p99_us: u64,
    /// The 99.9th percentile.
    pub p999_us: u64,
    /// The longest time.
    pub max_us: u64,
    /// The number of pages that arrived although they were installed before.
    pub duplicates: u64,
}

impl FaultSummary {
    fn encode(&self, w: &mut Writer) {
        w.u64(self.count).u64(self.vcpu);
        w.u64(self.p50_us).u64(self.p90_us).u64(self.p99_us).u64(self.p999_us).u64(self.max_us).u64(self.duplicates);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut field = || r.u64("fault summary");
        Ok(Self {
            count: field()?,
            vcpu: field()?,
            p50_us: field()?,
            p90_us: field()?,
            p99_us: field()?,
            p999_us: field()?,
            max_us: field()?,
            duplicates: field()?,
        })
    }
}

/// A frame of the control lane. `S` frames come from the source, `D` frames from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// S: begins a session. The header carries the epoch of this attempt.
    Hello(Box<Hello>),
    /// D: the VM is built; lanes may be opened.
    Welcome(Welcome),
    /// D: all lanes of the session are open.
    Prepared {
        /// The time that loading the state will take, in microseconds, or `None` if it is not
        /// known.
        load_us: Option<u64>,
    },
    /// D: every page of the rounds up to this generation is in RAM.
    RoundReceived {
        /// The generation.
        generation: u32,
    },
    /// S: a piece of a device's state, sent while the guest runs.
    Piece(Section),
    /// S: a piece of the encoded [`crate::state::VmState`]. The pieces come in order.
    State(Bytes),
    /// S: everything was sent; the destination must load the state.
    Offer {
        /// The generation of the last round.
        generation: u32,
        /// The number of bytes of state.
        state_bytes: u64,
        /// Whether the guest is to run.
        running: bool,
    },
    /// D: all pages have arrived and the state is loaded.
    Ready,
    /// S: the destination owns the VM. The source will not run it again.
    Run,
    /// D: the destination owns the VM and has started it.
    Running,
    /// S: *running* has arrived, and the session is over.
    Done,
    /// S: the source keeps the VM; the destination must discard it.
    Abandon,
    /// S: resumes a session whose control lane was lost.
    Reattach(VmId),
    /// Both: the sender ends the attempt.
    Error {
        /// The kind of reason.
        code: ErrorCode,
        /// The reason in words, at most [`MAX_ERROR_TEXT`] bytes.
        text: String,
    },
    /// S: asks the destination for a sign of life.
    Ping,
    /// D: the answer to a ping.
    Pong,
    /// S, before the offer; D, after a reattachment: pages that the destination does not have.
    /// Pieces without such pages are not sent. [`Control::PostCopy`] ends the list.
    Missing {
        /// The first page of the bitmap; a multiple of 64.
        first: u64,
        /// One bit for each page, the least significant first. At most [`STATE_CHUNK`] bytes, and a
        /// multiple of 8.
        bitmap: Bytes,
    },
    /// S, before the offer; D, after a reattachment: the list of missing pages is complete.
    PostCopy {
        /// The number of missing pages.
        missing: u64,
        /// The number of demand lanes that the source has opened.
        demand_lanes: u16,
    },
    /// D: no page is missing any more. The source may free its memory.
    Complete(FaultSummary),
    /// S: entries of the store table.
    StoreTable(TablePart),
    /// D: this part of the store table has arrived, and everything that was sent before it.
    StoreTableReceived {
        /// The number of the part.
        number: u32,
    },
    /// S: these pages are in a store.
    Located(Located),
    /// S: every page was sent or located, and no page will follow unless the destination requests
    /// it. A mark with the same number is sent on every bulk lane.
    Vacated {
        /// The number of the frame within a session, from 1.
        number: u32,
    },
    /// D: the source is not needed any more: all missing pages are in stores. The source may free
    /// its memory.
    Released(FaultSummary),
    /// Both: an entry of the store table has lost pages. Those that the source holds come from the
    /// source.
    EntryLost {
        /// The number of the entry.
        entry: u8,
    },
}

impl Control {
    /// Returns the name of the frame, for messages.
    pub fn name(&self) -> &'static str {
        frame_kind(self.code()).map_or("frame", |kind| kind.name)
    }

    /// Returns the number of the frame in the [table](super::FRAME_KINDS).
    fn code(&self) -> u8 {
        match self {
            Control::Hello(_) => kinds::HELLO,
            Control::Welcome(_) => kinds::WELCOME,
            Control::Prepared { .. } => kinds::PREPARED,
            Control::RoundReceived { .. } => kinds::ROUND_RECEIVED,
            Control::Piece(_) => kinds::PIECE,
            Control::State(_) => kinds::STATE,
            Control::Offer { .. } => kinds::OFFER,
            Control::Ready => kinds::READY,
            Control::Run => kinds::RUN,
            Control::Running => kinds::RUNNING,
            Control::Done => kinds::DONE,
            Control::Abandon => kinds::ABANDON,
            Control::Reattach(_) => kinds::REATTACH,
            Control::Error { .. } => kinds::ERROR,
            Control::Ping => kinds::PING,
            Control::Pong => kinds::PONG,
            Control::Missing { .. } => kinds::MISSING,
            Control::PostCopy { .. } => kinds::POST_COPY,
            Control::Complete(_) => kinds::COMPLETE,
            Control::StoreTable(_) => kinds::STORE_TABLE,
            Control::StoreTableReceived { .. } => kinds::STORE_TABLE_RECEIVED,
            Control::Located(_) => kinds::LOCATED,
            Control::Vacated { .. } => kinds::VACATED,
            Control::Released(_) => kinds::RELEASED,
            Control::EntryLost { .. } => kinds::ENTRY_LOST,
        }
    }

    /// Returns an error frame. The text is cut to [`MAX_ERROR_TEXT`] bytes.
    pub fn error(code: ErrorCode, text: impl Into<String>) -> Self {
        let mut text = text.into();
        let mut end = text.len().min(MAX_ERROR_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        Control::Error { code, text }
    }

    /// Returns header and body of the frame.
    pub fn encode(&self, vm: u32, sequence: u32, epoch: u32) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Control::Hello(h) => {
                w.u32(h.features).u16(h.streams).text(&h.strategy);
                encode_vm(&h.vm, &mut w);
            }
            Control::Welcome(m) => _ = w.u16(m.version).u32(m.features).u16(m.streams).bytes(&m.session.0),
            // an unknown time is not sent
            Control::Prepared { load_us } => load_us.iter().for_each(|&time| _ = w.u64(time)),
            Control::RoundReceived { generation } => _ = w.u32(*generation),
            Control::Piece(s) => s.encode(&mut w),
            Control::State(chunk) => _ = w.bytes(chunk),
            Control::Offer { generation, state_bytes, running } => {
                w.u32(*generation).u64(*state_bytes).bool(*running);
            }
            Control::Reattach(id) => _ = w.bytes(&id.0),
            Control::Error { code, text } => _ = w.u16(code.to_wire()).text(text),
            Control::Missing { first, bitmap } => _ = w.u64(*first).bytes(bitmap),
            Control::PostCopy { missing, demand_lanes } => _ = w.u64(*missing).u16(*demand_lanes),
            Control::Complete(summary) | Control::Released(summary) => summary.encode(&mut w),
            Control::StoreTable(part) => part.encode(&mut w),
            Control::Located(located) => located.encode(&mut w),
            Control::StoreTableReceived { number } | Control::Vacated { number } => _ = w.u32(*number),
            Control::EntryLost { entry } => _ = w.u8(*entry),
            Control::Ready
            | Control::Run
            | Control::Running
            | Control::Done
            | Control::Abandon
            | Control::Ping
            | Control::Pong => {}
        }
        frame(self.code(), vm, sequence, epoch, 0, &w.into_bytes())
    }

    /// Decodes the body of a frame whose header was read before.
    ///
    /// # Errors
    /// Returns an error if the frame is not one of the control lane, or a field is out of its
    /// bounds.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, DecodeError> {
        header.check_body(body)?;
        if header.payload != 0 {
            return Err(DecodeError::invalid("payload length", "control frames have no payload"));
        }
        let mut r = Reader::new(body);
        let frame = match header.kind {
            kinds::HELLO => {
                let (features, streams) = (r.u32("features")?, r.u16("streams")?);
                if !(1..=MAX_STREAMS).contains(&streams) {
                    return Err(DecodeError::invalid("streams", format!("{streams} is not in 1..={MAX_STREAMS}")));
                }
                let strategy = r.text(MAX_STRATEGY_NAME, "strategy")?;
                Control::Hello(Box::new(Hello { features, streams, strategy, vm: decode_vm(&mut r)? }))
            }
            kinds::WELCOME => Control::Welcome(Welcome {
                version: r.u16("version")?,
                features: r.u32("features")?,
                streams: r.u16("streams")?,
                session: SessionToken(r.array("session")?),
            }),
            kinds::PREPARED if r.remaining() == 0 => Control::Prepared { load_us: None },
            kinds::PREPARED => Control::Prepared { load_us: Some(r.u64("time to load the state")?) },
            kinds::ROUND_RECEIVED => Control::RoundReceived { generation: r.u32("generation")? },
            kinds::PIECE => Control::Piece(Section::decode_piece(&mut r, STATE_CHUNK)?),
            kinds::STATE => {
                let chunk = r.bytes(r.remaining().min(STATE_CHUNK), "state")?;
                Control::State(Bytes::copy_from_slice(chunk))
            }
            kinds::OFFER => Control::Offer {
                generation: r.u32("generation")?,
                state_bytes: r.u64("state bytes")?,
                running: r.bool("running")?,
            },
            kinds::READY => Control::Ready,
            kinds::RUN => Control::Run,
            kinds::RUNNING => Control::Running,
            kinds::DONE => Control::Done,
            kinds::ABANDON => Control::Abandon,
            kinds::REATTACH => Control::Reattach(VmId(r.array("vm id")?)),
            kinds::ERROR => Control::Error {
                code: ErrorCode::from_wire(r.u16("error code")?),
                text: r.text(MAX_ERROR_TEXT, "error text")?,
            },
            kinds::PING => Control::Ping,
            kinds::PONG => Control::Pong,
            kinds::MISSING => {
                let first = r.u64("first page")?;
                let bitmap = r.bytes(r.remaining().min(STATE_CHUNK), "bitmap")?;
                if !first.is_multiple_of(64) || !bitmap.len().is_multiple_of(8) {
                    return Err(DecodeError::invalid("bitmap", "not made of whole words"));
                }
                Control::Missing { first, bitmap: Bytes::copy_from_slice(bitmap) }
            }
            kinds::POST_COPY => {
                let (missing, demand_lanes) = (r.u64("missing pages")?, r.u16("demand lanes")?);
                if demand_lanes > MAX_DEMAND_LANES {
                    let why = format!("{demand_lanes} is above {MAX_DEMAND_LANES}");
                    return Err(DecodeError::invalid("demand lanes", why));
                }
                Control::PostCopy { missing, demand_lanes }
            }
            kinds::COMPLETE => Control::Complete(FaultSummary::decode(&mut r)?),
            kinds::STORE_TABLE => Control::StoreTable(TablePart::decode(&mut r)?),
            kinds::STORE_TABLE_RECEIVED => Control::StoreTableReceived { number: r.u32("number of the part")? },
            kinds::LOCATED => Control::Located(Located::decode(&mut r)?),
            kinds::VACATED => Control::Vacated { number: r.u32("number of the mark")? },
            kinds::RELEASED => Control::Released(FaultSummary::decode(&mut r)?),
            kinds::ENTRY_LOST => Control::EntryLost { entry: r.u8("entry")? },
            kind => return Err(DecodeError::invalid("kind", format!("{kind:#x} is no frame of a control lane"))),
        };
        r.finish()?;
        Ok(frame)
    }
}

/// Encodes a VM's description, for the hello and for snapshots.
pub(crate) fn encode_vm(vm: &VmDescription, w: &mut Writer) {
    w.bytes(&vm.id.0);
    vm.layout.encode(w);
    w.count(vm.devices.len());
    for d in &vm.devices {
        w.text(&d.name).u32(d.instance).u32(d.oldest).u32(d.version);
    }
    w.blob(&vm.host_needs).blob(&vm.config);
}

/// Decodes a description that [`encode_vm`] wrote.
pub(crate) fn decode_vm(r: &mut Reader<'_>) -> Result<VmDescription, DecodeError> {
    let id = VmId(r.array("vm id")?);
    let layout = RamLayout::decode(r, MAX_REGIONS)?;
    let mut devices = Vec::new();
    for _ in 0..r.count(MAX_DEVICES, "number of devices")? {
        devices.push(DeviceKind {
            name: r.text(MAX_SECTION_NAME, "device name")?,
            instance: r.u32("device instance")?,
            oldest: r.u32("device oldest version")?,
            version: r.u32("device version")?,
        });
    }
    let host_needs = Bytes::copy_from_slice(r.blob(MAX_CONFIG, "host needs")?);
    let config = Bytes::copy_from_slice(r.blob(MAX_CONFIG, "configuration")?);
    Ok(VmDescription { id, layout, devices, host_needs, config })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        RamRegion,
        wire::stores::tests::{located, part},
    };

    /// Returns one frame of each kind.
    pub(crate) fn samples() -> Vec<Control> {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }]).unwrap();
        let device = DeviceKind { name: "serial".into(), instance: 0, oldest: 1, version: 2 };
        let vm = VmDescription {
            id: VmId([7; 16]),
            layout,
            devices: vec![device],
            host_needs: Bytes::from_static(b"needs"),
            config: Bytes::from_static(b"config"),
        };
        let section = Section { name: "gpu".into(), instance: 1, version: 1, data: Bytes::from_static(b"piece") };
        vec![
            Control::Hello(Box::new(Hello { features: 1, streams: 4, strategy: "pre-copy".into(), vm })),
            Control::Welcome(Welcome { version: 1, features: 0, streams: 4, session: SessionToken([9; 16]) }),
            Control::Prepared { load_us: None },
            Control::Prepared { load_us: Some(u64::MAX) },
            Control::RoundReceived { generation: 3 },
            Control::Piece(section),
            Control::State(Bytes::from_static(b"state")),
            Control::Offer { generation: 4, state_bytes: 5, running: true },
            Control::Ready,
            Control::Run,
            Control::Running,
            Control::Done,
            Control::Abandon,
            Control::Reattach(VmId([1; 16])),
            Control::error(ErrorCode::Mismatch, "no AVX-512"),
            Control::Ping,
            Control::Pong,
            Control::PostCopy { missing: 3, demand_lanes: MAX_DEMAND_LANES },
            Control::StoreTable(part()),
            Control::StoreTableReceived { number: 9 },
            Control::Located(located()),
            Control::Vacated { number: 2 },
            Control::Released(FaultSummary { count: 1, duplicates: 8, ..FaultSummary::default() }),
            Control::EntryLost { entry: 254 },
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Control, DecodeError> {
        let header = Header::decode(bytes.first_chunk().unwrap())?;
        Control::decode(&header, &bytes[Header::LEN..])
    }

    #[test]
    fn round_trip() {
        for frame in samples() {
            assert_eq!(decode(&frame.encode(0, 1, 2)), Ok(frame));
        }
    }

    #[test]
    fn truncation_and_trailing_bytes_are_refused() {
        for sample in samples() {
            let bytes = sample.encode(0, 1, 2);
            let body = &bytes[Header::LEN..];
            if matches!(sample, Control::State(_)) {
                continue;
            }
            // an empty body is the other valid form of *prepared*
            let least = usize::from(matches!(sample, Control::Prepared { .. }));
            for end in least..body.len() {
                assert!(decode(&frame(bytes[0], 0, 1, 2, 0, &body[..end])).is_err(), "{} at {end}", sample.name());
            }
            let mut longer = body.to_vec();
            longer.push(0);
            assert!(decode(&frame(bytes[0], 0, 1, 2, 0, &longer)).is_err(), "{}", sample.name());
        }
    }

    #[test]
    fn long_errors_are_cut_at_a_character() {
        let Control::Error { text, .. } = Control::error(ErrorCode::Other, "é".repeat(600)) else { unreachable!() };
        assert!(text.len() <= MAX_ERROR_TEXT && text.chars().all(|c| c == 'é'));
        // the limit lies within a character of this text
        let Control::Error { text, .. } = Control::error(ErrorCode::Other, "€".repeat(600)) else { unreachable!() };
        assert!(text.len() > MAX_ERROR_TEXT - 3 && text.len() <= MAX_ERROR_TEXT && text.chars().all(|c| c == '€'));
    }

    #[test]
    fn no_more_demand_lanes_than_there_can_be() {
        let frame = Control::PostCopy { missing: 3, demand_lanes: MAX_DEMAND_LANES + 1 };
        assert!(decode(&frame.encode(0, 1, 2)).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(kind in 0u8..0x1b, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&frame(kind, 0, 0, 0, 0, &body));
        }
    }
}
