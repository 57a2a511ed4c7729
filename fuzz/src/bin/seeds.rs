//! Writes the seed corpora, made by the real encoders: `cargo run --bin seeds` in `fuzz/`.

use std::{fs, io, path::Path};

use bytes::Bytes;
use migration_core::{
    PageRange, RamLayout, RamRegion,
    device::DeviceKind,
    page_map::StoreCopy,
    paged_memory::{EntryStore, StoreEntry},
    state::{Section, VmState},
    store::{Incarnation, Namespace},
    vm::{VmDescription, VmId},
    wire::{
        Bulk, Checkpoint, Content, Control, ErrorCode, Extent, FRAME_KINDS, FaultSummary, Hello, LaneKind, Located,
        Preamble, SessionToken, TablePart, Welcome,
    },
};
use migration_fuzz::{
    handshake,
    receiver::{self, NO_ROUND, PAGER, REPAIR, TOKEN, TOUCH},
};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, seeds) in [
        ("frames", frames()),
        ("protocol", protocol()),
        ("state", states()),
        ("receiver", receiver()),
        ("handshake", handshakes()),
        ("records", records()),
    ] {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder)?;
        for (name, bytes) in seeds {
            if name.starts_with("post copy") {
                let running = if name.ends_with("twice") { 2 } else { 1 };
                // its patience is short: on a busy machine it may run out
                let reaches = (0..20).any(|_| receiver::check(&bytes) == (running, true));
                assert!(reaches, "{name} does not reach its end");
            }
            fs::write(folder.join(name.replace(' ', "-")), bytes)?;
        }
    }
    Ok(())
}

/// First messages of each kind of peer, and answers.
fn handshakes() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for kind in 0..4u8 {
        let recorded = handshake::first_message(kind);
        seeds.push((format!("source {kind}"), [&[kind][..], &recorded].concat()));
    }
    seeds.push((
        "plain".into(),
        [&[0][..], &Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode()].concat(),
    ));
    let refusal = Control::error(ErrorCode::Security, "no").encode(0, 0, 0);
    seeds.push(("refused".into(), [&[handshake::SOURCE][..], &refusal].concat()));
    seeds.push(("answer".into(), [&[handshake::SOURCE][..], b"SEAL\x51\0\0\0", &[9; 81]].concat()));
    seeds
}

fn records() -> Vec<Seed> {
    let seed = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    vec![
        seed("all well", &[0; 16]),
        seed("flipped", &[0, 0, 1, 70, 0, 0]),
        seed("dropped before a key", &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0]),
        seed("repeated", &[0, 0, 3, 0, 0, 0]),
        seed("cut", &[0, 0, 4, 3]),
    ]
}

/// A name and an input.
type Seed = (String, Vec<u8>);

fn hello(features: u32, streams: u16) -> Control {
    let regions = vec![RamRegion { gpa: 0, len: 600 << 12 }, RamRegion { gpa: 1 << 30, len: 40 << 12 }];
    let layout = RamLayout::new(regions).expect("a layout");
    let devices = vec![DeviceKind { name: "gpu".into(), instance: 0, oldest: 1, version: 1 }];
    let (host_needs, config) = (Bytes::from_static(b"needs"), Bytes::from_static(b"config"));
    let vm = VmDescription { id: VmId([7; 16]), layout, devices, host_needs, config };
    Control::Hello(Box::new(Hello { features, streams, strategy: "pre-copy".into(), vm }))
}

fn piece() -> Control {
    Control::Piece(Section { name: "gpu".into(), instance: 0, version: 1, data: Bytes::from_static(b"piece") })
}

fn state() -> VmState {
    let vcpu = Section { name: "vcpu".into(), instance: 0, version: 1, data: Bytes::from_static(b"registers") };
    let vm = Section { name: "vm".into(), instance: 0, version: 1, data: Bytes::new() };
    VmState { sections: vec![vcpu, vm] }
}

fn pages(extents: &[(u64, u64, Content)], crc: bool) -> (Bulk, Vec<u8>) {
    let extents: Vec<Extent> = extents
        .iter()
        .map(|&(first, count, content)| Extent { range: PageRange::new(first, count), content })
        .collect();
    let data = vec![5; Bulk::Pages { extents: extents.clone(), payload_crc: 0 }.payload()];
    (Bulk::Pages { extents, payload_crc: if crc { crc32fast::hash(&data) } else { 0 } }, data)
}

/// Preambles, and a frame of every kind in the table of the wire format.
///
/// Bytes 1 and 2 say what it is, 4 that checksums are repaired.
fn frames() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for kind in [LaneKind::Control, LaneKind::Bulk, LaneKind::Reattach, LaneKind::Demand, LaneKind::Checkpoint] {
        let bytes = Preamble::new(kind, 1, SessionToken([9; 16])).encode();
        seeds.push((format!("preamble {kind:?}").to_lowercase(), [&[4], &bytes[..]].concat()));
    }
    let store = EntryStore { name: "rack-7".into(), incarnation: Incarnation([2; 16]) };
    let entry = StoreEntry::new(Namespace::new([1; 16]), vec![store]).expect("an entry");
    let copy = StoreCopy { entry: 0, generation: 6 };
    let control = [
        hello(1, 4),
        Control::Welcome(Welcome { version: 1, features: 0, streams: 4, session: SessionToken([9; 16]) }),
        Control::Prepared { load_us: Some(1500) },
        Control::RoundReceived { generation: 3 },
        piece(),
        Control::State(Bytes::from(state().encode())),
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
        Control::Missing { first: 128, bitmap: Bytes::from(vec![5; 16]) },
        Control::PostCopy { missing: 8, demand_lanes: 2 },
        Control::Complete(FaultSummary { count: 3, ..FaultSummary::default() }),
        Control::StoreTable(TablePart { number: 2, gather_rate: None, must_answer: true, first: 0, entries: vec![entry] }),
        Control::StoreTableReceived { number: 2 },
        Control::Located(Located { copy, held: true, runs: vec![PageRange::new(3, 2), PageRange::new(700, 1)] }),
        Control::Vacated { number: 1 },
        Control::Released(FaultSummary { count: 3, ..FaultSummary::default() }),
        Control::EntryLost { entry: 1 },
    ];
    for frame in control {
        seeds.push((frame.name().to_owned(), [&[5], &frame.encode(0, 0, 2)[..]].concat()));
    }
    let (data, _) = pages(&[(1, 2, Content::Plain), (7, 300, Content::Zero), (400, 1, Content::Plain)], true);
    for (name, frame) in [
        ("pages", data),
        ("round end", Bulk::RoundEnd { pages: 303 }),
        ("request", Bulk::Request { pages: vec![513, 3] }),
        ("vacated on a lane", Bulk::Vacated { number: 1 }),
    ] {
        seeds.push((name.to_owned(), [&[6], &frame.encode(0, 0, 2)[..]].concat()));
    }
    let identity = Bytes::from_static(b"host");
    for (name, frame) in [
        ("every", Checkpoint::Every { interval_us: 7, detect_us: 8, identity: identity.clone() }),
        ("identity", Checkpoint::Identity(identity)),
        ("checkpoint state", Checkpoint::State(Bytes::from(state().encode()))),
        ("commit", Checkpoint::Commit { pages: 3, state_bytes: 5 }),
        ("committed", Checkpoint::Committed),
    ] {
        seeds.push((name.to_owned(), [&[6], &frame.encode(0, 2)[..]].concat()));
    }
    for kind in FRAME_KINDS {
        let has_seed = seeds.iter().any(|(_, bytes)| bytes[0] & 3 != 0 && bytes[1] == kind.code);
        assert!(has_seed, "no seed of {kind:?}");
    }
    seeds
}

/// See `world.rs` for what the bytes mean.
fn protocol() -> Vec<Seed> {
    let course = [2, 1, 4, 7, 10, 7, 0, 0, 0, 4, 4, 4, 10, 7, 0];
    let seed = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    vec![
        seed("pair completes", &[&course[..], &[4, 7, 0, 4]].concat()),
        seed("pair loses run", &[&course[..], &[12, 0, 4, 4, 7]].concat()),
        seed("pair loses running", &[&course[..], &[4, 12, 0, 4, 4, 7]].concat()),
        seed("pair cancelled and again", &[2, 1, 4, 7, 15, 4, 12, 0, 4, 7, 10, 7, 0, 0, 0]),
        seed("pair adopted", &[&course[..14], &[19, 2, 0]].concat()),
        seed("pair with replays", &[&course[..], &[16, 0, 17, 1, 18, 2, 4, 7]].concat()),
        // hello, prepared, state, offer of as much, loaded, run
        seed("destination", &[0, 0, 1, 0, 1, 0, 4, 0, 0, 5, 3, 1, 0, 0, 6, 1, 3, 0, 1, 5, 0, 0, 8, 1]),
        // welcome, prepared, a round, offer, ready, run, running
        seed("source", &[1, 1, 0, 1, 1, 1, 0, 1, 2, 1, 6, 7, 0, 1, 7, 1, 8, 0, 1, 9, 1]),
    ]
}

fn states() -> Vec<Seed> {
    #[cfg_attr(not(feature = "kvm"), allow(unused_mut))]
    let mut seeds = vec![
        ("vm state".to_owned(), [&[0], &state().encode()[..]].concat()),
        ("empty state".to_owned(), [&[0], &VmState::default().encode()[..]].concat()),
    ];
    #[cfg(feature = "kvm")]
    seeds.extend(kvm::seeds());
    seeds
}

fn receiver() -> Vec<Seed> {
    let lane = |kind, index, frames: &[Vec<u8>]| {
        [&Preamble::new(kind, index, SessionToken::default()).encode()[..], &frames.concat()].concat()
    };
    let input = |flags: u8, lanes: &[Vec<u8>]| {
        let mut bytes = vec![flags];
        for lane in lanes {
            bytes.extend((lane.len() as u16).to_le_bytes());
            bytes.extend(lane);
        }
        bytes
    };
    let control = |features: u32, streams: u16, generation: u32| {
        let state = state().encode();
        let frames = [
            hello(features, streams),
            Control::Ping,
            piece(),
            Control::State(Bytes::from(state.clone())),
            Control::Offer { generation, state_bytes: state.len() as u64, running: true },
            Control::Run,
            Control::Done,
        ];
        let frames: Vec<_> = frames.iter().enumerate().map(|(i, f)| f.encode(0, i as u32, 1)).collect();
        lane(LaneKind::Control, 0, &frames)
    };
    let bulk = |index: u16, extents: &[(u64, u64, Content)], crc: bool| {
        let (frame, data) = pages(extents, crc);
        let end = Bulk::RoundEnd { pages: extents.iter().map(|e| e.1).sum() };
        lane(LaneKind::Bulk, index, &[frame.encode(0, 0, 1), data, end.encode(0, 1, 1)])
    };
    let both = REPAIR | TOKEN;
    let zeros = |at| [(at, 3, Content::Zero)];
    let reattach: Vec<_> = [Control::Reattach(VmId([7; 16])), Control::Run, Control::Done]
        .iter()
        .enumerate()
        .map(|(i, f)| f.encode(0, i as u32, 1))
        .collect();
    let reattach = lane(LaneKind::Reattach, 0, &reattach);
    let first = bulk(0, &[(0, 1, Content::Plain), (3, 2, Content::Zero)], false);
    vec![
        ("two lanes".into(), input(both, &[control(0, 2, 1), first.clone(), bulk(1, &zeros(512), false)])),
        ("one lane crc".into(), input(both, &[control(1, 1, 1), bulk(0, &[(599, 2, Content::Plain)], true)])),
        ("zeros only".into(), input(both, &[control(0, 1, 1), bulk(0, &zeros(0), false)])),
        ("reattach".into(), input(both, &[control(0, 1, 1), bulk(0, &zeros(0), false), reattach])),
        ("no lanes".into(), input(both, &[control(0, 1, 0)])),
        ("unrepaired".into(), input(0, &[control(0, 1, 1), first])),
    ]
    .into_iter()
    .chain(post_copy(&lane, &input))
    .collect()
}

/// The receiver behind a hand-over: pages 0, 3, 4 and 599 are missing.
fn post_copy(
    lane: &dyn Fn(LaneKind, u16, &[Vec<u8>]) -> Vec<u8>,
    input: &dyn Fn(u8, &[Vec<u8>]) -> Vec<u8>,
) -> Vec<Seed> {
    let mut bitmap = vec![0; 80];
    [0, 3, 4, 599].iter().for_each(|page| bitmap[page / 8] |= 1u8 << (page % 8));
    let control = |kind: LaneKind, frames: &[Control]| {
        let frames: Vec<_> = frames.iter().enumerate().map(|(i, f)| f.encode(0, i as u32, 1)).collect();
        lane(kind, 0, &frames)
    };
    let handed_over = |generation: u32, features: u32, done: &[Control]| {
        let state = state().encode();
        let frames = [
            hello(features, 1),
            Control::Missing { first: 0, bitmap: Bytes::from(bitmap.clone()) },
            Control::PostCopy { missing: 4, demand_lanes: 1 },
            Control::State(Bytes::from(state.clone())),
            Control::Offer { generation, state_bytes: state.len() as u64, running: true },
            Control::Run,
        ];
        control(LaneKind::Control, &[&frames[..], done].concat())
    };
    let back = control(LaneKind::Reattach, &[Control::Reattach(VmId([7; 16])), Control::Run, Control::Done]);
    let end = Bulk::RoundEnd { pages: 0 }.encode(0, 0, 1);
    let served = |kind, generation, sequence, extents: &[(u64, u64, Content)], crc| {
        let (frame, data) = pages(extents, crc);
        let round = if sequence > 0 { end.clone() } else { Vec::new() };
        lane(kind, 0, &[round, frame.encode(0, sequence, generation), data])
    };
    let (plain, zeros) = ([(0, 1, Content::Plain), (599, 1, Content::Zero)], [(3, 2, Content::Zero)]);
    let bulk = |generation, sequence| served(LaneKind::Bulk, generation, sequence, &zeros, false);
    let demand = |generation, crc| served(LaneKind::Demand, generation, 0, &plain, crc);
    let nothing = |kind| lane(kind, 0, &[]);
    let flags = REPAIR | TOKEN | PAGER;
    let done = [Control::Done];
    let first = [handed_over(1, 2, &[]), bulk(2, 1), nothing(LaneKind::Demand)];
    let second = [back, bulk(2, 0), demand(2, false)];
    vec![
        ("post copy".into(), input(flags, &[handed_over(1, 2, &done), bulk(2, 1), demand(2, false)])),
        ("post copy touched".into(), input(flags | TOUCH, &[handed_over(1, 2, &done), bulk(2, 1), demand(2, false)])),
        ("post copy crc".into(), {
            let bulk = served(LaneKind::Bulk, 2, 1, &zeros, true);
            input(flags, &[handed_over(1, 3, &done), bulk, demand(2, true)])
        }),
        ("post copy without rounds".into(), {
            input(flags | NO_ROUND, &[handed_over(0, 2, &done), bulk(1, 0), demand(1, false)])
        }),
        ("post copy twice".into(), input(flags, &[first, second].concat())),
    ]
}

#[cfg(feature = "kvm")]
mod kvm {
    use kvm_bindings::{
        kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
        kvm_vcpu_events, kvm_xcrs,
    };
    use migration_core::codec::Writer;
    use migration_kvm::state::{CpuidBits, HostNeeds, Irqchip, KvmState, Msr, Register, SpecialRegs, VcpuState};

    use super::Seed;

    pub(super) fn seeds() -> Vec<Seed> {
        let cpuid = vec![
            kvm_cpuid_entry2 { function: 0, eax: 1, ebx: 0x756e_6547, ..Default::default() },
            kvm_cpuid_entry2 { function: 1, ecx: 1 << 26, ..Default::default() },
        ];
        let vcpu = VcpuState {
            cpuid: cpuid.clone(),
            tsc_khz: Some(2_000_000),
            tsc_offset: Some(1 << 40),
            regs: kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() },
            sregs: SpecialRegs::Plain(kvm_sregs::default()),
            xsave: vec![0; 4096],
            xcrs: Some(kvm_xcrs { nr_xcrs: 1, ..Default::default() }),
            debug_regs: Some(kvm_debugregs::default()),
            lapic: Some(Box::new([0; 1024])),
            mp_state: kvm_mp_state::default(),
            events: kvm_vcpu_events::default(),
            msrs: vec![Msr { index: 0x10, data: 5 }, Msr { index: 0x6e0, data: 6 }],
            unread_msrs: vec![0x11],
            nested: None,
            ssp: None,
        };
        let needs = HostNeeds {
            cpuid,
            own_cpuid: vec![CpuidBits { leaf: 1, subleaf: 0, register: Register::Ecx, bits: 1 << 31 }],
            xcr0: 7,
            xsave_size: 832,
            tsc_khz: Some(2_000_000),
            msrs: vec![0x10, 0x6e0],
            feature_msrs: Vec::new(),
            irqchip: Irqchip::Full,
            nested: false,
            caps: vec![3, 55],
        };
        // only KVM makes such a state, so it is written item by item; its own encoder has the last
        // word
        let mut items = Writer::new();
        items.count(6).u16(1).blob(&[2]);
        for chip in 2..5 {
            items.u16(chip).blob(&[0; 512]);
        }
        items.u16(5).blob(&[0; size_of::<kvm_pit_state2>()]).u16(6).blob(&[0; size_of::<kvm_clock_data>()]);
        let full = KvmState::decode(&items.into_bytes()).expect("a state with all chips").encode();
        let split = KvmState::decode(&[1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]).expect("a state without chips").encode();
        let seed = |name: &str, kind: u8, bytes: Vec<u8>| (name.to_owned(), [&[kind], &bytes[..]].concat());
        vec![
            seed("vcpu", 1, vcpu.encode()),
            seed("vm full", 2, full),
            seed("vm split", 2, split),
            seed("host needs", 3, needs.encode()),
        ]
    }
}
