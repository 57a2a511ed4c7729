use proptest::prelude::*;

use super::*;
use crate::aead::RustCrypto;

const SMALL: KeyLimits = KeyLimits { records: 3, bytes: u64::MAX, keys: 4 };

fn secret(of: u8) -> Secret {
    Secret::new([of; 32])
}

fn sealer(limits: KeyLimits) -> RecordSealer {
    RecordSealer::new(Suite::Aes128Gcm, &RustCrypto, secret(1), limits).unwrap()
}

fn opener() -> RecordOpener {
    RecordOpener::new(Suite::Aes128Gcm, &RustCrypto, secret(1)).unwrap()
}

fn seal(sealer: &mut RecordSealer, plain: &[u8], last: bool) -> Result<Vec<u8>, RecordError> {
    let mut record = vec![0; plain.len() + OVERHEAD];
    record[HEADER_LEN..HEADER_LEN + plain.len()].copy_from_slice(plain);
    sealer.seal(&mut record, last).map(|()| record)
}

fn open(opener: &mut RecordOpener, record: &[u8]) -> Result<Vec<u8>, RecordError> {
    let (header, rest) = record.split_first_chunk().unwrap();
    let mut rest = rest.to_vec();
    if opener.sealed_len(header)? != rest.len() {
        return Err(RecordError::Truncated);
    }
    opener.open(header, &mut rest)?;
    rest.truncate(rest.len() - TAG_LEN);
    Ok(rest)
}

/// Returns four records under two keys, and the closing one.
fn stream() -> Vec<Vec<u8>> {
    let mut sealer = sealer(SMALL);
    let mut records: Vec<_> = (0..4).map(|n| seal(&mut sealer, &[n; 20], false).unwrap()).collect();
    records.push(seal(&mut sealer, b"", true).unwrap());
    records
}

#[test]
fn a_stream_opens_in_its_order_across_key_updates() {
    let mut opener = opener();
    for (n, record) in (0..).zip(stream()) {
        assert_eq!(u32::from_le_bytes(record[4..8].try_into().unwrap()), n / 3);
        let plain = open(&mut opener, &record).unwrap();
        assert_eq!(plain, if n < 4 { vec![n as u8; 20] } else { Vec::new() });
    }
    assert!(opener.ended());
}

#[test]
fn equal_records_look_different_under_every_counter_and_key() {
    let mut sealer = sealer(KeyLimits { keys: 100, ..SMALL });
    let records: Vec<_> =
        (0..100).map(|_| seal(&mut sealer, &[0; 32], false).unwrap()[HEADER_LEN..].to_vec()).collect();
    let distinct: std::collections::HashSet<_> = records.iter().collect();
    assert_eq!(distinct.len(), records.len());
}

#[test]
fn replayed_dropped_and_reordered_records_are_refused_and_nothing_opens_after() {
    let records = stream();
    for order in
        [vec![0, 0], vec![1], vec![0, 2], vec![0, 1, 0], vec![3], vec![0, 1, 2, 4], vec![0, 1, 2, 3, 2], vec![4]]
    {
        let mut opener = opener();
        let (last, good) = order.split_last().unwrap();
        for &at in good {
            open(&mut opener, &records[at]).unwrap();
        }
        let refused = open(&mut opener, &records[*last]);
        assert!(matches!(refused, Err(RecordError::NotAuthentic | RecordError::Key { .. })), "{order:?}: {refused:?}");
        for record in &records {
            assert_eq!(open(&mut opener, record), Err(RecordError::Broken));
        }
    }
}

#[test]
fn records_of_other_secrets_suites_and_directions_are_refused() {
    let record = &stream()[0];
    let others = [
        RecordOpener::new(Suite::Aes128Gcm, &RustCrypto, secret(2)),
        RecordOpener::new(Suite::Aes256Gcm, &RustCrypto, secret(1)),
        RecordOpener::new(Suite::ChaCha20Poly1305, &RustCrypto, secret(1)),
    ];
    for opener in others {
        assert_eq!(open(&mut opener.unwrap(), record), Err(RecordError::NotAuthentic));
    }
}

#[test]
fn any_flipped_bit_is_noticed() {
    for record in [&stream()[0], &stream()[3]] {
        let before = if record[4] == 0 { 0 } else { 3 };
        for bit in 0..record.len() * 8 {
            let mut opener = opener();
            for earlier in &stream()[..before] {
                open(&mut opener, earlier).unwrap();
            }
            let mut changed = record.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&mut opener, &changed).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn nothing_comes_after_the_last_record() {
    let mut sealer = sealer(SMALL);
    seal(&mut sealer, b"", true).unwrap();
    assert_eq!(seal(&mut sealer, b"x", false), Err(RecordError::AfterEnd));
    let mut opener = opener();
    for record in stream() {
        open(&mut opener, &record).unwrap();
    }
    assert_eq!(open(&mut opener, &stream()[0]), Err(RecordError::AfterEnd));
}

#[test]
fn keys_are_replaced_by_records_and_by_bytes_and_end() {
    let mut by_records = sealer(SMALL);
    for n in 0..12 {
        let record = seal(&mut by_records, b"x", false).unwrap();
        assert_eq!(record[4], n / 3);
    }
    for _ in 0..2 {
        let refused = seal(&mut by_records, b"x", false);
        assert!(matches!(refused, Err(RecordError::Exhausted | RecordError::Broken)));
    }
    let mut by_bytes = sealer(KeyLimits { records: u64::MAX, bytes: 100, keys: u32::MAX });
    let keys: Vec<_> = (0..6).map(|_| seal(&mut by_bytes, &[0; 60], false).unwrap()[4]).collect();
    assert_eq!(keys, [0, 0, 1, 1, 2, 2]);
}

#[test]
fn a_used_up_counter_ends_the_lane_instead_of_beginning_anew() {
    let mut sealer = sealer(KeyLimits { records: u64::MAX, bytes: u64::MAX, keys: 1 });
    sealer.keys.next = u64::MAX - 1;
    seal(&mut sealer, b"x", false).unwrap();
    assert_eq!(seal(&mut sealer, b"x", false), Err(RecordError::Exhausted));
    let mut sealer = self::sealer(KeyLimits { records: 1, ..KeyLimits::default() });
    sealer.keys.number = u32::MAX;
    seal(&mut sealer, b"x", false).unwrap();
    assert_eq!(seal(&mut sealer, b"x", false), Err(RecordError::Exhausted));
}

#[test]
fn lengths_are_bounded() {
    let opener = opener();
    let header = |first: u32| opener.sealed_len(&[first.to_le_bytes(), [0; 4]].concat().try_into().unwrap());
    assert_eq!(header(MAX_PLAINTEXT as u32), Ok(MAX_PLAINTEXT + TAG_LEN));
    assert_eq!(header(MAX_PLAINTEXT as u32 + 1), Err(RecordError::Header));
    assert_eq!(header(1 << 25), Err(RecordError::Header));
    assert_eq!(seal(&mut sealer(SMALL), &vec![0; MAX_PLAINTEXT + 1], false), Err(RecordError::Header));
}

proptest! {
    #[test]
    fn noise_never_opens(noise in prop::collection::vec(any::<u8>(), HEADER_LEN..200)) {
        prop_assert!(open(&mut opener(), &noise).is_err());
    }
}
