//! Tests of channels between peers that trust each other.

use migration_transport::{Bandwidth, Limited};

use super::*;

fn both_ways((mut here, mut there): (Halves, Halves)) {
    let words = pattern(3_000_001);
    let mut got = vec![0; words.len()];
    for (writer, reader) in [(&mut here.writer, &mut there.reader), (&mut there.writer, &mut here.reader)] {
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&words, &[]).unwrap());
            reader.read_exact(&mut got[..1000]).unwrap();
            reader.read_exact(&mut got[1000..]).unwrap();
        });
        assert!(got == words);
        got.fill(0);
    }
}

#[test]
fn every_lane_of_a_session_works() {
    let securities = [
        (psk(1), psk(1)),
        (statics(1, 2), statics(2, 1)),
        (Security { suites: vec![Suite::ChaCha20Poly1305], ..psk(1) }, Security { backend: &RustCrypto, ..psk(1) }),
        (Security { suites: vec![Suite::Aes128Gcm], ..psk(1) }, psk(1)),
    ];
    for (source, destination) in securities {
        let mut pair = Pair::new(source, destination);
        for kind in [
            LaneKind::Control,
            LaneKind::Bulk,
            LaneKind::Demand,
            LaneKind::Checkpoint,
            LaneKind::Reattach,
            LaneKind::Bulk,
        ] {
            both_ways(pair.open_well(kind));
        }
        // a new attempt, with a new session
        both_ways(pair.open_well(LaneKind::Control));
        both_ways(pair.open_well(LaneKind::Bulk));
    }
}

#[test]
fn a_session_goes_on_over_another_connector() {
    let mut pair = Pair::new(psk(1), psk(1));
    pair.open_well(LaneKind::Control);
    pair.connector = pair.source.connector(Box::new(pair.plain.clone()));
    both_ways(pair.open_well(LaneKind::Reattach));
}

#[test]
fn guest_memory_of_any_shape_arrives() {
    let security = || Security { record_bytes: 1, ..psk(1) };
    let mut pair = Pair::new(security(), security());
    let (mut here, mut there) = pair.open_well(LaneKind::Control);
    let (from, to) = (ram(100), ram(100));
    let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&from, &to);
    let bytes = pattern(100 * 4096);
    from.write(0, &bytes).unwrap();
    let at = |ram: &'static [(u64, u64)]| ram;
    let sent = at(&[(0, 0), (3, 70_000), (70_003, 0), (70_003, 1), (90_000, 150_000), (300_000, 4096)]);
    let slices: Vec<RamSlice<'_>> = sent.iter().map(|&(gpa, len)| from.slice_at(gpa, len).unwrap()).collect();
    let head = pattern(65_537);
    let total: u64 = sent.iter().map(|(_, len)| len).sum();
    thread::scope(|scope| {
        scope.spawn(|| here.writer.write_all(&head, &slices).unwrap());
        let mut got = vec![0; head.len()];
        there.reader.read_exact(&mut got).unwrap();
        assert!(got == head);
        let (first, second) = (to.slice_at(5, 100_000).unwrap(), to.slice_at(200_000, total - 100_000).unwrap());
        there.reader.read_ram(&[first, second]).unwrap();
    });
    let expected: Vec<u8> =
        sent.iter().flat_map(|&(gpa, len)| bytes[gpa as usize..(gpa + len) as usize].to_vec()).collect();
    let mut got = vec![0; total as usize];
    to.read(5, &mut got[..100_000]).unwrap();
    to.read(200_000, &mut got[100_000..]).unwrap();
    assert!(got == expected);
}

#[test]
fn keys_change_under_way() {
    let limits = KeyLimits { records: 2, bytes: 100_000, keys: u32::MAX };
    let security = || Security { limits, record_bytes: 1, ..psk(1) };
    let mut pair = Pair::new(security(), security());
    both_ways(pair.open_well(LaneKind::Control));
}

#[test]
fn a_used_up_lane_ends_and_says_so() {
    let limits = KeyLimits { records: 2, bytes: u64::MAX, keys: 2 };
    let mut pair = Pair::new(Security { limits, ..psk(1) }, psk(1));
    let (mut here, mut there) = pair.open_well(LaneKind::Control);
    // the empty record and the record with the first byte were two
    here.writer.write_all(b"ab", &[]).unwrap();
    here.writer.write_all(b"cd", &[]).unwrap();
    let error = here.writer.write_all(b"ef", &[]).unwrap_err();
    assert!(error.to_string().contains("used up"), "{error}");
    let mut got = [0; 4];
    there.reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abcd");
    // other sessions are not affected
    both_ways(Pair::new(psk(1), psk(1)).open_well(LaneKind::Control));
}

#[test]
fn an_end_in_order_differs_from_a_cut() {
    let mut pair = Pair::new(psk(1), psk(1));
    let (here, mut there) = pair.open_well(LaneKind::Control);
    drop(here);
    let end = there.reader.read_exact(&mut [0]).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    assert!(end.to_string().contains("closed the connection"), "{end}");
    // a second read returns the same
    assert_eq!(there.reader.read_exact(&mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    let (here, mut there) = pair.open_well(LaneKind::Bulk);
    here.closer.close();
    drop(here);
    let cut = there.reader.read_exact(&mut [0]).unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    assert!(cut.to_string().contains("cut off"), "{cut}");
}

#[test]
fn deadlines_of_writes_hold_before_and_after_the_handshake() {
    let mut pair = Pair::new(psk(1), psk(1));
    let write = |halves: &mut Halves, deadline: Option<Instant>| {
        halves.writer.set_deadline(deadline);
        halves.writer.write_all(b"word", &[]).map_err(|error| error.kind())
    };
    let past = Some(Instant::now());
    let (mut here, mut there) = pair.open_well(LaneKind::Control);
    // the destination's writer was not used before
    for halves in [&mut there, &mut here] {
        assert_eq!(write(halves, past), Err(io::ErrorKind::TimedOut));
    }
    // a deadline that is withdrawn leaves a working channel if no write was begun
    let (mut here, mut there) = pair.open_well(LaneKind::Control);
    for halves in [&mut there, &mut here] {
        halves.writer.set_deadline(past);
        assert_eq!(write(halves, None), Ok(()));
    }
    // a deadline that has passed does not prevent the closing record
    here.writer.set_deadline(past);
    drop(here);
    let mut word = [0; 4];
    there.reader.read_exact(&mut word).unwrap();
    let end = there.reader.read_exact(&mut word).unwrap_err();
    assert!(end.get_ref().is_some_and(|why| why.to_string().contains("closed the connection")), "{end:?}");
}

#[test]
fn a_limit_on_the_bandwidth_below_is_known_above() {
    let mut pair = Pair::new(psk(1), psk(1));
    let limited = Limited::new(Box::new(pair.plain.clone()), Bandwidth::from_bits_per_second(1));
    pair.connector = pair.source.connector(Box::new(limited));
    let (here, there) = pair.open_well(LaneKind::Control);
    assert!(here.writer.ahead_of_limit() > Duration::ZERO);
    assert_eq!(there.writer.ahead_of_limit(), Duration::ZERO);
}

#[test]
fn idle_timeouts_and_closers_work_before_and_after_the_handshake() {
    let mut pair = Pair::new(psk(1), psk(1));
    let _silent = pair.plain.connect().unwrap();
    let mut halves = pair.listener.accept(Duration::from_secs(60)).unwrap().unwrap().split().unwrap();
    halves.reader.set_idle_timeout(Some(Duration::from_millis(20))).unwrap();
    let error = halves.reader.read_exact(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    assert!(halves.writer.write_all(b"x", &[]).is_err());

    let (mut here, there) = pair.open_well(LaneKind::Control);
    here.reader.set_idle_timeout(Some(Duration::from_millis(20))).unwrap();
    assert_eq!(here.reader.read_exact(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    drop(there);

    let _silent = pair.plain.connect().unwrap();
    let mut halves = pair.listener.accept(Duration::from_secs(60)).unwrap().unwrap().split().unwrap();
    thread::scope(|scope| {
        let reader = &mut halves.reader;
        let waits = scope.spawn(move || reader.read_exact(&mut [0]));
        halves.closer.close();
        assert!(waits.join().unwrap().is_err());
    });
}
