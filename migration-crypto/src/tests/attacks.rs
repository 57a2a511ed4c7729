//! Attacks that must fail.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use migration_core::channel::ReadHalf;

use super::*;

/// The action of an attacker on the link. It gets the number of each write and may change its
/// bytes.
type Meddle = Arc<Mutex<dyn FnMut(usize, &mut Vec<u8>) + Send>>;

/// A connector whose writes pass through `meddle`, numbered over all channels. Each handshake
/// message and each group of records is one write.
struct Meddling {
    inner: memory::MemoryConnector,
    meddle: Meddle,
    count: Arc<Mutex<usize>>,
}

struct MeddlingChannel(Box<dyn Channel>, Meddle, Arc<Mutex<usize>>);

struct MeddlingWriter(Box<dyn WriteHalf>, Meddle, Arc<Mutex<usize>>);

impl Connector for Meddling {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(MeddlingChannel(self.inner.connect()?, self.meddle.clone(), self.count.clone())))
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

impl Channel for MeddlingChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let halves = self.0.split()?;
        Ok(Halves { writer: Box::new(MeddlingWriter(halves.writer, self.1, self.2)), ..halves })
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

impl WriteHalf for MeddlingWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        assert!(slices.is_empty(), "guest memory goes out unsealed");
        let mut bytes = head.to_vec();
        let mut count = self.2.lock().unwrap();
        (self.1.lock().unwrap())(*count, &mut bytes);
        *count += 1;
        drop(count);
        self.0.write_all(&bytes, &[])
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_idle_timeout(timeout)
    }
}

/// Makes a pair with `meddle` on the link between them.
fn meddled(source: Security, destination: Security, meddle: impl FnMut(usize, &mut Vec<u8>) + Send + 'static) -> Pair {
    let mut pair = Pair::new(source, destination);
    let meddling = Meddling { inner: pair.plain.clone(), meddle: Arc::new(Mutex::new(meddle)), count: Arc::default() };
    pair.connector = pair.source.connector(Box::new(meddling));
    pair
}

#[test]
fn wrong_keys_are_refused_and_both_sides_know_why() {
    for (source, destination, what) in [
        (psk(1), psk(2), "its key is another one"),
        (statics(1, 2), statics(2, 3), "its static key"),
        (statics(1, 3), statics(2, 1), "its static key"),
        (statics(4, 2), statics(2, 1), "its static key"),
    ] {
        let (here, there) = Pair::new(source, destination).open(LaneKind::Control);
        let (here, there) = (here.err().unwrap(), there.err().unwrap());
        assert!(matches!(why(&there), HandshakeError::WrongKey(_)), "{there}");
        assert!(matches!(why(&here), HandshakeError::Refused { code: ErrorCode::Security, .. }), "{here}");
        assert!(here.to_string().contains("not the one expected"), "{here}");
        assert!(here.to_string().contains(what), "{here}");
    }
}

#[test]
fn an_impostor_of_the_destination_is_found_out() {
    // the impostor lets every source in: it answers in the place of a destination that has the key
    let (plain, mut listener) = memory::link(1 << 20);
    let source = SecureConnector::new(Box::new(plain), psk(1));
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut halves = listener.accept(Duration::from_secs(60)).unwrap().unwrap().split().unwrap();
            halves.reader.read_exact(&mut [0; Preamble::LEN + 50]).unwrap();
            let mut answer = b"SEAL\x51\0\0\0".to_vec();
            answer.extend([7; 0x51]);
            halves.writer.write_all(&answer, &[]).unwrap();
            let _ = halves.reader.read_exact(&mut [0; 1000]);
        });
        let error = source.connect().err().unwrap();
        assert!(matches!(why(&error), HandshakeError::WrongKey(_)), "{error}");
    });
}

#[test]
fn other_kinds_of_credentials_are_named() {
    let (here, there) = Pair::new(psk(1), statics(1, 2)).open(LaneKind::Control);
    assert!(matches!(why(&there.err().unwrap()), HandshakeError::Credentials { .. }));
    let here = here.err().unwrap().to_string();
    assert!(here.contains("uses a pre-shared key, this destination expects a static key"), "{here}");
}

#[test]
fn ciphers_must_agree() {
    let only = |suite| Security { suites: vec![suite], ..psk(1) };
    let (here, there) = Pair::new(only(Suite::Aes256Gcm), only(Suite::ChaCha20Poly1305)).open(LaneKind::Control);
    assert!(matches!(why(&there.err().unwrap()), HandshakeError::Suites { .. }));
    let here = here.err().unwrap().to_string();
    assert!(here.contains("offers aes256-gcm, this destination takes chacha20-poly1305"), "{here}");
}

#[test]
fn offers_are_bounded() {
    for (count, taken) in [(16, true), (17, false)] {
        let source = Security { suites: vec![Suite::Aes256Gcm; count], ..psk(1) };
        let (here, there) = Pair::new(source, psk(1)).open(LaneKind::Control);
        assert_eq!(here.is_ok(), taken, "{count} ciphers");
        if let Err(error) = there {
            assert!(matches!(why(&error), HandshakeError::Malformed("offer")), "{error}");
        }
    }
}

#[test]
fn a_plain_source_is_informed() {
    let mut pair = Pair::new(psk(1), psk(1));
    let mut here = pair.plain.connect().unwrap().split().unwrap();
    let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
    assert_eq!(preamble[..8], MAGIC);
    here.writer.write_all(&preamble, &[]).unwrap();
    here.writer.write_all(&pattern(5000), &[]).unwrap();
    thread::scope(|scope| {
        let there = scope.spawn(|| accept(&mut pair.listener));
        let mut header = [0; Header::LEN];
        here.reader.read_exact(&mut header).unwrap();
        let header = Header::decode(&header).unwrap();
        let mut body = vec![0; header.body as usize];
        here.reader.read_exact(&mut body).unwrap();
        let Control::Error { code, text } = Control::decode(&header, &body).unwrap() else { panic!("no refusal") };
        assert_eq!(code, ErrorCode::Security);
        assert!(text.contains("takes only encrypted migrations"), "{text}");
        drop(here);
        assert!(matches!(why(&there.join().unwrap().err().unwrap()), HandshakeError::PlainPeer));
    });
}

#[test]
fn other_protocols_and_versions_are_refused() {
    let mut pair = Pair::new(psk(1), psk(1));
    let mut bytes = pattern(Preamble::LEN);
    for (magic, expected) in [(*b"GET / HT", "Unidentified"), (migration_core::wire::SEALED_MAGIC, "Version(")] {
        bytes[..8].copy_from_slice(&magic);
        let mut here = pair.plain.connect().unwrap().split().unwrap();
        here.writer.write_all(&bytes, &[]).unwrap();
        drop(here);
        let error = accept(&mut pair.listener).err().unwrap();
        assert!(format!("{:?}", why(&error)).starts_with(expected), "{error:?}");
    }
}

#[test]
fn lanes_need_a_session() {
    let mut pair = Pair::new(psk(1), psk(1));
    let error = pair.connector.connect_as(LaneKind::Bulk).err().unwrap();
    assert!(matches!(why(&error), HandshakeError::NoSession));
    // take the link's channel that was opened for the failed lane
    drop(accept(&mut pair.listener));
    pair.open_well(LaneKind::Control);
    // a destination that was restarted has no sessions
    pair.listener = {
        let (plain, listener) = memory::link(1 << 20);
        pair.connector = pair.source.connector(Box::new(plain));
        SecureListener::new(Box::new(listener), psk(1))
    };
    let (here, there) = pair.open(LaneKind::Reattach);
    assert!(matches!(why(&there.err().unwrap()), HandshakeError::UnknownSession));
    assert!(matches!(why(&here.err().unwrap()), HandshakeError::Refused { code: ErrorCode::UnknownSession, .. }));
}

#[test]
fn any_flipped_bit_of_a_handshake_is_noticed() {
    // The source's writes for a channel are the first message, the empty record, and the record
    // with the first byte.
    for lane in [LaneKind::Control, LaneKind::Bulk] {
        let first = if lane == LaneKind::Control { 0 } else { 3 };
        let len = Arc::new(Mutex::new(0));
        let seen = len.clone();
        let note = move |n, bytes: &mut Vec<u8>| {
            if n == first {
                *seen.lock().unwrap() = bytes.len()
            }
        };
        let mut pair = meddled(psk(1), psk(1), note);
        // kept, because dropping them would write closing records
        let _control = pair.open_well(LaneKind::Control);
        let _lane = (lane != LaneKind::Control).then(|| pair.open_well(lane));
        let len = *len.lock().unwrap();
        assert!(len > Preamble::LEN);
        for bit in (0..len * 8).step_by(3) {
            // a greater length in the preface would only make the destination wait
            if (32 * 8..34 * 8).contains(&bit) {
                continue;
            }
            let mut pair = meddled(psk(1), psk(1), move |n, bytes| {
                if n == first {
                    bytes[bit / 8] ^= 1 << (bit % 8)
                }
            });
            let _control = (lane != LaneKind::Control).then(|| pair.open_well(LaneKind::Control));
            let (here, there) = pair.open(lane);
            assert!(here.is_err() && there.is_err(), "bit {bit}");
        }
    }
}

#[test]
fn a_replayed_handshake_opens_nothing() {
    for (lane, first) in [(LaneKind::Control, 0), (LaneKind::Bulk, 3)] {
        let kept: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let keep = kept.clone();
        let mut pair = meddled(psk(1), psk(1), move |_, bytes| keep.lock().unwrap().push(bytes.clone()));
        // kept, because dropping them would write closing records
        let _control = pair.open_well(LaneKind::Control);
        let _lane = (lane != LaneKind::Control).then(|| pair.open_well(lane));
        let replay: Vec<u8> = kept.lock().unwrap()[first..first + 3].concat();
        let mut again = pair.plain.connect().unwrap().split().unwrap();
        again.writer.write_all(&replay, &[]).unwrap();
        drop(again);
        assert!(accept(&mut pair.listener).is_err());
    }
}

#[test]
fn records_that_are_changed_replayed_dropped_or_moved_end_the_lane() {
    type Attack = fn(usize, &mut Vec<u8>, &mut Vec<Vec<u8>>);
    let attacks: [(&str, Attack); 6] = [
        ("flip", |n, bytes, _| {
            if n == 4 {
                bytes[8] ^= 1
            }
        }),
        ("replay", |n, bytes, before| {
            if n == 4 {
                bytes.clone_from(&before[3])
            }
        }),
        ("drop", |n, bytes, _| {
            if n == 4 {
                bytes.clear()
            }
        }),
        ("from the handshake", |n, bytes, before| {
            if n == 4 {
                bytes.clone_from(&before[2])
            }
        }),
        ("cut short", |n, bytes, _| {
            if n == 4 {
                bytes.truncate(bytes.len() - 1)
            }
        }),
        ("twice", |n, bytes, _| {
            if n == 4 {
                bytes.extend(bytes.clone())
            }
        }),
    ];
    for (name, attack) in attacks {
        let mut before = Vec::new();
        let mut pair = meddled(psk(1), psk(1), move |n, bytes| {
            let sent = bytes.clone();
            attack(n, bytes, &mut before);
            before.push(sent);
        });
        let (mut here, mut there) = pair.open_well(LaneKind::Control);
        for word in [b"aaaa", b"bbbb", b"cccc", b"dddd"] {
            here.writer.write_all(word, &[]).unwrap();
        }
        drop(here);
        let mut got = Vec::new();
        let mut word = [0; 4];
        let error = loop {
            match there.reader.read_exact(&mut word) {
                Ok(()) => got.extend(word),
                Err(error) => break error,
            }
        };
        assert!(b"aaaabbbbcccc".starts_with(&got), "{name}: {got:?}");
        assert_eq!(got.len() / 4, if name == "twice" { 2 } else { 1 }, "{name}");
        assert!(!error.to_string().contains("closed the connection"), "{name}: {error}");
        // the lane does not work after that either
        assert!(there.reader.read_exact(&mut word).is_err(), "{name}");
    }
}

#[test]
fn records_of_another_lane_or_session_are_refused() {
    // an attacker puts a record of one lane into another lane
    for (first, second) in [
        (LaneKind::Control, LaneKind::Bulk),
        (LaneKind::Bulk, LaneKind::Bulk),
        (LaneKind::Bulk, LaneKind::Demand),
        (LaneKind::Control, LaneKind::Control),
    ] {
        let kept: Arc<Mutex<Option<Vec<u8>>>> = Arc::default();
        let swap = kept.clone();
        let skip = if first == LaneKind::Control { 0 } else { 3 };
        let mut pair = meddled(psk(1), psk(1), move |n, bytes| match n.checked_sub(skip) {
            // the fourth record of the first lane replaces that of the second
            Some(6) => *swap.lock().unwrap() = Some(bytes.clone()),
            Some(7) => bytes.clone_from(swap.lock().unwrap().as_ref().unwrap()),
            _ => {}
        });
        let _control = (first != LaneKind::Control).then(|| pair.open_well(LaneKind::Control));
        let (mut a, _a) = pair.open_well(first);
        let (mut b, mut b_there) = pair.open_well(second);
        a.writer.write_all(b"from one", &[]).unwrap();
        b.writer.write_all(b"from two", &[]).unwrap();
        let error = b_there.reader.read_exact(&mut [0; 8]).unwrap_err();
        assert!(error.to_string().contains("not authentic"), "{error}");
    }
}

#[test]
fn nothing_of_guest_memory_is_readable_on_the_wire() {
    let kept: Arc<Mutex<Vec<u8>>> = Arc::default();
    let keep = kept.clone();
    let mut pair = meddled(psk(1), psk(1), move |_, bytes| keep.lock().unwrap().extend_from_slice(bytes));
    let (mut here, mut there) = pair.open_well(LaneKind::Control);
    let memory = ram(16);
    let bytes = pattern(16 * 4096);
    memory.write(0, &bytes).unwrap();
    here.writer.write_all(b"head", &[memory.slice_at(0, 16 * 4096).unwrap()]).unwrap();
    let mut got = vec![0; 4 + bytes.len()];
    there.reader.read_exact(&mut got).unwrap();
    let wire = kept.lock().unwrap();
    let runs: std::collections::HashSet<&[u8]> = wire.windows(16).collect();
    assert!(bytes.windows(16).all(|run| !runs.contains(run)));
}

/// A record that is opened directly into guest memory leaves nothing there unless it is authentic.
/// Neither do the records after it.
#[test]
fn guest_memory_gets_nothing_of_a_changed_record() {
    const RECORD: usize = crate::record::MIN_PLAINTEXT;
    for backend in [crate::aead::best(), &RustCrypto] {
        let security = || Security { record_bytes: RECORD, backend, ..psk(1) };
        let mut sent = 0;
        let mut pair = meddled(security(), security(), move |_, bytes| {
            // change the second of three large records
            if bytes.len() > RECORD {
                sent += 1;
                if sent == 2 {
                    bytes[RECORD / 2] ^= 1;
                }
            }
        });
        let (mut here, mut there) = pair.open_well(LaneKind::Control);
        let (from, to) = (ram(48), ram(48));
        let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&from, &to);
        let bytes = pattern(3 * RECORD);
        from.write(0, &bytes).unwrap();
        here.writer.write_all(b"", &[from.slice_at(0, 3 * RECORD as u64).unwrap()]).unwrap();
        let error = there.reader.read_ram(&[to.slice_at(0, 3 * RECORD as u64).unwrap()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        let mut got = vec![0xff; 3 * RECORD];
        to.read(0, &mut got).unwrap();
        assert!(got[..RECORD] == bytes[..RECORD], "the first was authentic");
        assert!(got[RECORD..].iter().all(|&byte| byte == 0), "guest memory holds what is not authentic");
        assert!(there.reader.read_ram(&[to.slice_at(0, 1).unwrap()]).is_err());
    }
}

/// Counts the reads of the destination. During a handshake each is of one byte.
struct Counted<T>(T, Arc<AtomicUsize>);

impl Listener for Counted<memory::MemoryListener> {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let channel = self.0.accept(timeout)?;
        Ok(channel.map(|channel| Box::new(Counted(channel, self.1.clone())) as Box<dyn Channel>))
    }

    fn address(&self) -> String {
        self.0.address()
    }
}

impl Channel for Counted<Box<dyn Channel>> {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let halves = self.0.split()?;
        Ok(Halves { reader: Box::new(Counted(halves.reader, self.1)), ..halves })
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

impl ReadHalf for Counted<Box<dyn ReadHalf>> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.1.fetch_add(1, Ordering::AcqRel);
        self.0.read_exact(buf)
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.0.read_ram(slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_idle_timeout(timeout)
    }
}

/// Sends `first` at once and then the bytes of `rest` one by one, until the destination gives up.
/// Returns the destination's error and how many bytes of `rest` it read.
fn send_slowly(first: Vec<u8>, rest: &[u8]) -> (io::Error, usize) {
    let (plain, listener) = memory::link(1 << 20);
    let (asked, ended) = (Arc::new(AtomicUsize::new(0)), AtomicBool::new(false));
    let security = Security { handshake_timeout: Duration::from_millis(300), ..psk(1) };
    let mut listener = SecureListener::new(Box::new(Counted(listener, asked.clone())), security);
    let mut slow = plain.connect().unwrap().split().unwrap();
    let before = first.len() + 1;
    thread::scope(|scope| {
        scope.spawn(|| {
            slow.writer.write_all(&first, &[]).unwrap();
            // the destination's time has begun when it asks for the first of them
            while asked.load(Ordering::Acquire) < before && !ended.load(Ordering::Acquire) {
                thread::yield_now();
            }
            for byte in rest {
                thread::sleep(Duration::from_millis(30));
                if ended.load(Ordering::Acquire) || slow.writer.write_all(&[*byte], &[]).is_err() {
                    break;
                }
            }
        });
        let error = accept(&mut listener).err().unwrap();
        ended.store(true, Ordering::Release);
        (error, asked.load(Ordering::Acquire).saturating_sub(before))
    })
}

#[test]
fn a_byte_at_a_time_does_not_buy_time() {
    let (error, taken) = send_slowly(Vec::new(), &pattern(Preamble::LEN));
    assert!(matches!(why(&error), HandshakeError::TimedOut), "{error}");
    assert!(taken < Preamble::LEN - 4, "{taken} bytes were waited for");
}

#[test]
fn a_replayed_message_buys_neither_time_nor_memory() {
    let kept: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let keep = kept.clone();
    let mut pair = meddled(psk(1), psk(1), move |_, bytes| keep.lock().unwrap().push(bytes.clone()));
    drop(pair.open_well(LaneKind::Control));
    let first = kept.lock().unwrap()[0].clone();
    // the header of the first record claims a megabyte
    let mut record = (crate::record::MAX_PLAINTEXT as u32).to_le_bytes().to_vec();
    record.extend([0; 200]);
    let (error, taken) = send_slowly(first.clone(), &record);
    assert!(matches!(why(&error), HandshakeError::TimedOut), "{error}");
    assert!(taken < crate::record::OVERHEAD, "{taken} bytes were waited for");
    // the same bytes all at once
    let mut again = pair.plain.connect().unwrap().split().unwrap();
    again.writer.write_all(&[first, record].concat(), &[]).unwrap();
    let error = accept(&mut pair.listener).err().unwrap();
    assert!(matches!(why(&error), HandshakeError::Malformed(_)), "{error}");
}
