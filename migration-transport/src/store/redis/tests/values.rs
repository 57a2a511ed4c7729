//! What lies in the server: runs, whatever they are put over, and values that were altered.

use std::collections::BTreeMap;

use super::*;

/// Random numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// Returns some ascending numbers below 80, in runs of any length.
    fn pages(&mut self) -> Vec<u64> {
        let density = 1 + self.below(8);
        let start = self.below(80);
        let end = (start + 1 + self.below(40)).min(80);
        let mut pages: Vec<_> = (start..end).filter(|_| self.below(8) < density).collect();
        if pages.is_empty() {
            pages.push(start);
        }
        pages
    }
}

#[test]
fn runs_that_are_put_over_each_other_leave_the_newest_of_each_page() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    let mut random = Random(7);
    let mut newest = BTreeMap::new();
    for _ in 0..300 {
        let generation = 1 + random.below(60) as u32;
        let pages = random.pages();
        let taken = put(&test.store, of, generation, &pages).unwrap().taken;
        for (&page, taken) in pages.iter().zip(taken) {
            let old = newest.get(&page).copied().unwrap_or(0);
            assert_eq!(taken, old <= generation, "page {page}, generation {generation} over {old}");
            newest.insert(page, generation.max(old));
        }
        let wanted: Vec<_> = random.pages().into_iter().filter(|page| newest.contains_key(page)).collect();
        let wanted: Vec<_> = wanted.iter().map(|page| PageToGet { page: *page, generation: newest[page] }).collect();
        if !wanted.is_empty() {
            let mut got = 0;
            let urgency = if random.below(2) == 0 { Urgency::Fault } else { Urgency::Prefetch };
            test.store
                .get(of, &wanted, urgency, soon(), &mut |page, data| {
                    assert!(data.page() == Some(&value(page, newest[&page])), "page {page}");
                    got += 1;
                })
                .unwrap();
            assert_eq!(got, wanted.len());
        }
    }
    // the room is that of the pages, and nothing of the puts is left beside them
    let blocks: std::collections::BTreeSet<_> = newest.keys().map(|page| page / BLOCK_PAGES).collect();
    let used = newest.len() as u64 * SLOT_BYTES as u64 + blocks.len() as u64 * blocks::BLOCK_OVERHEAD;
    assert_eq!(test.store.room(), (4 << 20) - used);
    let keys = &test.store.servers.parts()[0];
    assert_eq!(test.keys(0, &keys.block_start()).len(), blocks.len());
    assert_eq!(test.keys(0, &keys.stage_start("*")), [""; 0]);
    test.store.forget(of).unwrap();
    assert_eq!(test.store.room(), 4 << 20);
    assert_eq!(test.keys(0, &keys.block_start()), [""; 0]);
}

#[test]
fn a_long_run_is_put_and_read_whole() {
    let Some(test) = InServer::on_unix() else { return };
    let options = RedisPageStoreOptions { prefix: "long".into(), ..Default::default() };
    let store = open(&test.url, &options);
    let of = create(&store, 1);
    let pages: Vec<_> = (100..4196).collect();
    assert_eq!(put(&store, of, 3, &pages).unwrap().taken, vec![true; pages.len()]);
    assert_eq!(get(&store, of, 3, &pages).unwrap(), pages);
    // each in a block of its own
    let sparse: Vec<_> = (0..4096).map(|page| 10_000 + 16 * page).collect();
    put(&store, of, 4, &sparse).unwrap();
    assert_eq!(get(&store, of, 4, &sparse).unwrap(), sparse);
}

#[test]
fn values_that_were_altered_are_missing_and_can_be_put_anew() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    let (part, keys) = test.store.part(of.id);
    let key = keys.block(of.id, 0);
    let all: Vec<_> = (0..16).collect();
    put(&test.store, of, 1, &all).unwrap();
    let replayed = test.read(part, &key);
    put(&test.store, of, 2, &all).unwrap();
    put(&test.store, of, 2, &[40]).unwrap();
    let good = test.read(part, &key);
    let other = test.read(part, &keys.block(of.id, 2));
    let long = [&good[..], &[7; 100_000]].concat();
    let altered = [
        (&replayed[..], 0),
        (&other, 0),
        (&good[..0], 0),
        (&good[..DIRECTORY_BYTES - 1], 0),
        (&good[..DIRECTORY_BYTES + 3 * SLOT_BYTES], 3),
        (&good[..good.len() - 70], 15),
        (&vec![0xff; good.len()][..], 0),
        (&vec![0; good.len()][..], 0),
        (b"x", 0),
    ];
    for (bytes, left) in altered {
        test.write(part, &key, bytes);
        assert_eq!(get(&test.store, of, 2, &all).unwrap().len(), left, "{} bytes", bytes.len());
        for page in [0, 15] {
            // a few pages are read in another way than many
            let got = get(&test.store, of, 2, &[page]).unwrap();
            assert_eq!(got.len(), usize::from(page < left as u64), "{} bytes", bytes.len());
        }
    }
    // longer than any block is
    test.write(part, &key, &long);
    let result = get(&test.store, of, 2, &all);
    assert!(
        matches!(&result, Err(StoreError::Io { cause, .. }) if cause.kind() == ErrorKind::InvalidData),
        "{result:?}"
    );
    assert_eq!(get(&test.store, of, 2, &[3]).unwrap(), [3]);
    // except for generations that were forged, a new put replaces what was harmed
    for bytes in [&good[..100], &other, &good[..DIRECTORY_BYTES + 3 * SLOT_BYTES], b"x"] {
        test.write(part, &key, bytes);
        assert_eq!(put(&test.store, of, 3, &all).unwrap().taken, [true; 16]);
        assert_eq!(get(&test.store, of, 3, &all).unwrap(), all);
    }
    test.ask::<()>(part, redis::cmd("DEL").arg(&key));
    assert_eq!(get(&test.store, of, 3, &all).unwrap(), [0; 0]);
    // what has another type is an error, and leaves nothing behind
    test.ask::<()>(part, redis::cmd("SADD").arg(&key).arg("x"));
    assert!(put(&test.store, of, 4, &all).is_err());
    assert_eq!(test.keys(part, &keys.stage_start("*")), [""; 0]);
}

/// The comparison and the replacement are one step, whoever else puts.
#[test]
fn puts_of_several_users_do_not_mix() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    let generations = AtomicU32::new(1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = open(&test.url, &test.options);
                for _ in 0..50 {
                    let generation = generations.fetch_add(1, Ordering::Relaxed);
                    put(&store, of, generation, &[4, 5, 6, 40]).unwrap();
                }
            });
        }
    });
    let newest = generations.into_inner() - 1;
    assert_eq!(get(&test.store, of, newest, &[4, 5, 6, 40]).unwrap(), [4, 5, 6, 40]);
}

#[test]
fn blocks_of_a_namespace_whose_forgetter_has_crashed_are_removed_by_the_next_one() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    let pages: Vec<_> = (0..20).map(|block| 16 * block).collect();
    put(&test.store, of, 1, &pages).unwrap();
    let keys = &test.store.servers.parts()[0];
    let names = [keys.spaces(), keys.forgotten(), keys.space(of.id), keys.blocks(of.id), keys.used(), keys.dying()];
    let mut script = run_with_time(FORGET, &names.each_ref().map(String::as_str), 0);
    script.arg(of.id.to_string()).arg(&of.vm.0[..]).arg(1000).arg(10);
    test.store.run(0, &script).unwrap();
    assert_eq!(test.keys(0, &keys.block_start()).len(), 20);
    assert!(matches!(get(&test.store, of, 1, &pages), Err(StoreError::Absent(_))));
    assert_eq!(test.store.expired().unwrap(), []);
    assert_eq!(test.keys(0, &keys.block_start()), [""; 0]);
    assert_eq!(test.store.room(), 4 << 20);
}

#[test]
fn while_a_prefetch_hands_out_pages_anybody_can_use_the_store() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    let pages: Vec<_> = (0..200).collect();
    put(&test.store, of, 1, &pages).unwrap();
    let wanted: Vec<_> = pages.iter().map(|&page| PageToGet { page, generation: 1 }).collect();
    let mut got = 0;
    test.store
        .get(of, &wanted, Urgency::Prefetch, soon(), &mut |page, _| {
            if page == 40 {
                assert_eq!(get(&test.store, of, 1, &[7, 8]).unwrap(), [7, 8], "a prefetch inside of a prefetch");
                put(&test.store, of, 2, &[199]).unwrap();
                // another thread's fault does not wait for the prefetch
                thread::scope(|scope| {
                    let fault = scope.spawn(|| {
                        let wanted = [PageToGet { page: 199, generation: 2 }];
                        test.store.get(of, &wanted, Urgency::Fault, soon(), &mut |_, _| {})
                    });
                    fault.join().unwrap().unwrap();
                });
            }
            got += 1;
        })
        .unwrap_err();
    assert_eq!(got, 199, "page 199 has another generation by now");
}
