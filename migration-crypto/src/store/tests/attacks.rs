//! What somebody can do who has the shelf but not the key.

use super::*;

/// Opening or restoring it fails, and what was got before is authentic.
fn refused(shelf: &Shelf, genuine: &Contents, what: &str) -> io::Error {
    let (error, got) = shelf.read().expect_err(what);
    assert!(got.iter().all(|page| genuine.contains(page)), "{what}: {got:?}");
    assert!(got.is_sorted_by(|(a, _), (b, _)| a < b), "{what}: {got:?}");
    assert!(matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::PermissionDenied), "{what}: {error:?}");
    error
}

fn flip(shelf: &Shelf, at: usize, byte: usize) -> u64 {
    shelf.with(|shelved| {
        let (page, data) = &mut shelved.pages[at];
        data.get_or_insert_with(|| Box::new([0; PAGE_SIZE]))[byte] ^= 1;
        *page
    })
}

#[test]
fn every_changed_or_missing_page_is_refused() {
    let (_, shelf, genuine) = two_checkpoints();
    // seal pages: the top one, two of the next level, four of the lowest
    assert_eq!(shelf.len(), 1 + 2 + 4 + genuine.len());
    for at in 0..shelf.len() {
        for byte in [0, 11, 2000, PAGE_SIZE - 1] {
            let shelf = shelf.copy();
            let page = flip(&shelf, at, byte);
            let error = refused(&shelf, &genuine, "a changed bit");
            let own = page.checked_sub(Layout::new(TALL).vm().start);
            let name = own.map_or(format!("seal page {page}: "), |page| format!("page {page}: "));
            assert!(error.to_string().starts_with(&name), "{error}");
        }
        let [gone, zeros, twice] = [shelf.copy(), shelf.copy(), shelf.copy()];
        gone.with(|shelved| shelved.pages.remove(at));
        let error = refused(&gone, &genuine, "a page that is left out");
        assert!(error.to_string().contains("left it out"), "{error}");
        if zeros.with(|shelved| shelved.pages[at].1.take().is_some()) {
            refused(&zeros, &genuine, "zeros for data");
        }
        twice.with(|shelved| shelved.pages.insert(at, shelved.pages[at].clone()));
        refused(&twice, &genuine, "a page that is handed out twice");
    }
}

#[test]
fn zeros_may_be_handed_out_as_such() {
    let (_, shelf, genuine) = two_checkpoints();
    let zeros = |shelved: &mut Shelved| {
        for (_, data) in shelved.pages.iter_mut().filter(|(_, data)| data.is_none()) {
            *data = page(0);
        }
    };
    shelf.with(zeros);
    assert_eq!(shelf.read().unwrap(), genuine);
}

#[test]
fn exchanged_pages_are_refused() {
    let (_, shelf, genuine) = two_checkpoints();
    for a in 0..shelf.len() {
        for b in a + 1..shelf.len() {
            let [contents, places] = [shelf.copy(), shelf.copy()];
            places.with(|shelved| shelved.pages.swap(a, b));
            refused(&places, &genuine, "pages that do not ascend");
            let differ = contents.with(|Shelved { pages, .. }| {
                let other = pages[b].1.take();
                pages[b].1 = mem::replace(&mut pages[a].1, other);
                pages[a].1 != pages[b].1
            });
            if differ {
                refused(&contents, &genuine, "pages that have changed places");
            }
        }
    }
}

#[test]
fn replayed_pages_are_refused() {
    let (first, shelf, genuine) = two_checkpoints();
    let older: BTreeMap<_, _> = first.with(|shelved| shelved.pages.clone().into_iter().collect());
    let replaced: Vec<(usize, u64)> = shelf.with(|shelved| {
        let pages = shelved.pages.iter().enumerate();
        let replaced = pages.filter(|(_, (page, data))| older.get(page).is_some_and(|older| older != data));
        replaced.map(|(at, (page, _))| (at, *page)).collect()
    });
    // page 1, and on each level the seal page over it
    assert_eq!(replaced.len(), 4);
    for choice in 1u32..1 << replaced.len() {
        let shelf = shelf.copy();
        for (_, &(at, page)) in replaced.iter().enumerate().filter(|(bit, _)| choice & 1 << bit != 0) {
            shelf.with(|shelved| shelved.pages[at].1 = older[&page].clone());
        }
        refused(&shelf, &genuine, "pages of an older checkpoint");
    }
    // all pages of the older one under the newer state, and the other way round
    let [pages, states] = [shelf.copy(), shelf.copy()];
    pages.with(|shelved| shelved.pages = first.with(|first| first.pages.clone()));
    refused(&pages, &genuine, "all pages of an older checkpoint");
    states.with(|shelved| shelved.latest = first.with(|first| first.latest.clone()));
    refused(&states, &genuine, "the state of an older checkpoint");
}

#[test]
fn added_pages_are_refused() {
    let (_, shelf, genuine) = two_checkpoints();
    let end = SealedVersions::store_pages(TALL);
    let start = end - TALL;
    // beside others, under no seal page, beyond the last one, and seal pages that nothing needs
    for at in [start + 2, start + 8000, start + TALL - 2, end, u64::MAX, 3 + 5, 3 + 100] {
        for data in [None, page(3), page(0)] {
            let shelf = shelf.copy();
            shelf.with(|Shelved { pages, .. }| {
                let place = pages.partition_point(|(page, _)| *page < at);
                pages.insert(place, (at, data));
            });
            let error = refused(&shelf, &genuine, "a page that was not put");
            assert!(error.to_string().contains("was never put"), "{error}");
        }
    }
}

#[test]
fn a_store_that_hears_no_refusal_gains_nothing() {
    let (_, shelf, genuine) = two_checkpoints();
    for at in 0..shelf.len() {
        let shelf = shelf.copy();
        shelf.with(|shelved| shelved.stubborn = true);
        flip(&shelf, at, 9);
        refused(&shelf, &genuine, "a refused page");
    }
    // nor is what the caller has refused taken for restored
    shelf.with(|shelved| shelved.stubborn = true);
    let mut store = shelf.open().unwrap();
    let mut taken = 0;
    let error = store.restore(&mut |page, _| {
        taken += 1;
        if page < 5 { Ok(()) } else { Err(ErrorKind::OutOfMemory.into()) }
    });
    assert!(error.is_err());
    assert_eq!(taken, 3);
}

#[test]
fn states_are_refused_unless_they_are_whole_and_of_their_number() {
    let (_, shelf, genuine) = two_checkpoints();
    let (number, state) = shelf.latest().unwrap();
    let with = |number, state: &[u8]| {
        let shelf = shelf.copy();
        shelf.with(|shelved| shelved.latest = Some((number, Bytes::copy_from_slice(state))));
        assert!(shelf.open().is_err());
        refused(&shelf, &Vec::new(), "another state");
    };
    for at in 0..state.len() {
        with(number, &state[..at]);
        let mut changed = state.to_vec();
        changed[at] ^= 1;
        with(number, &changed);
    }
    with(number, &[&state[..], b"!"].concat());
    with(number + 1, &state);
    // in clear, and well formed: another number of pages
    let mut other = state.to_vec();
    other[29..37].copy_from_slice(&(TALL - 1).to_le_bytes());
    with(number, &other);
    assert_eq!(shelf.read().unwrap(), genuine);
}

#[test]
fn another_vm_or_store_is_refused() {
    let (_, shelf, genuine) = two_checkpoints();
    let other = |vm| {
        let other = Shelf::default();
        let inner = Box::new(other.clone());
        let mut store = SealedVersions::create(inner, TALL, &key(), vm, Suite::Aes256Gcm, aead::best()).unwrap();
        put(&mut store, &genuine);
        store.commit(2, state("two")).unwrap();
        other
    };
    let theirs = other(VmId([8; 16]));
    refused(&theirs, &Vec::new(), "another VM");
    // it may say that it is this one
    theirs.with(|shelved| {
        let mut state = shelved.latest.as_ref().unwrap().1.to_vec();
        state[13..29].copy_from_slice(&VM.0);
        shelved.latest = Some((2, state.into()));
    });
    refused(&theirs, &Vec::new(), "another VM");

    // another store of this VM: whole it is a checkpoint, but none of its pages fits
    let second = other(VM);
    assert_eq!(second.read().unwrap(), genuine);
    for at in 0..shelf.len() {
        let shelf = shelf.copy();
        let theirs = second.with(|second| second.pages[at].clone());
        let ours = shelf.with(|shelved| mem::replace(&mut shelved.pages[at], theirs.clone()));
        assert_eq!(ours.0, theirs.0);
        if ours != theirs {
            refused(&shelf, &genuine, "a page of another store");
        }
    }
}

#[test]
fn a_store_that_is_open_notices_too() {
    let (first, shelf, genuine) = two_checkpoints();
    let mut store = shelf.open().unwrap();
    assert_eq!(contents(&mut store), genuine);
    let now = shelf.with(|shelved| mem::replace(&mut shelved.pages, first.with(|first| first.pages.clone())));
    assert!(store.restore(&mut |_, _| Ok(())).is_err());
    shelf.with(|shelved| shelved.pages = now);
    assert_eq!(contents(&mut store), genuine);

    // the first put reads the seal pages; when one is not authentic, that is no checkpoint, but the
    // next one may be
    let mut store = shelf.open().unwrap();
    flip(&shelf, 1, 0);
    assert!(store.put(0, None).unwrap_err().to_string().contains("seal page 1"));
    flip(&shelf, 1, 0);
    assert!(store.put(0, None).unwrap_err().to_string().contains("must be discarded"));
    store.discard();
    put(&mut store, &[(0, None)]);
    store.commit(3, Bytes::new()).unwrap();
    let three = shelf.read().unwrap();
    assert_eq!((&three[0], &three[1..]), (&(0, None), &genuine[1..]));
}

type Attack<'a> = &'a dyn Fn(&Shelf);

/// Pages that are read at random are as safe as those that are restored in order.
#[test]
fn what_is_read_at_random_is_authentic_or_refused() {
    let (first, shelf, genuine) = two_checkpoints();
    let read = |shelf: &Shelf, pages: &[u64]| {
        let mut got = Vec::new();
        let result = shelf.open().and_then(|mut store| store.read(pages, &mut into(&mut got)));
        assert!(got.iter().all(|page| genuine.contains(page)), "{got:?}");
        result.map(|()| got)
    };
    let wanted = [1, 200, 300];
    let expected: Vec<_> = genuine.iter().filter(|(page, _)| wanted.contains(page)).cloned().collect();
    assert_eq!(read(&shelf, &wanted).unwrap(), expected);
    let at = |page| Layout::new(TALL).vm().start + page;
    let place =
        |shelf: &Shelf, page| shelf.with(|shelved| shelved.pages.iter().position(|(at, _)| *at == page).unwrap());

    let attacks: [(&str, Attack<'_>); 6] = [
        ("a changed bit", &|shelf| _ = flip(shelf, place(shelf, at(200)), 7)),
        ("a page that is left out", &|shelf| {
            let gone = place(shelf, at(300));
            shelf.with(|shelved| shelved.pages.remove(gone));
        }),
        ("a page that comes twice", &|shelf| {
            let twice = place(shelf, at(1));
            shelf.with(|shelved| shelved.pages.insert(twice, shelved.pages[twice].clone()));
        }),
        ("pages in another order", &|shelf| {
            let (a, b) = (place(shelf, at(1)), place(shelf, at(200)));
            shelf.with(|shelved| shelved.pages.swap(a, b));
        }),
        ("an older page", &|shelf| {
            let now = place(shelf, at(1));
            let then = first.with(|first| first.pages.iter().find(|(page, _)| *page == at(1)).cloned().unwrap());
            shelf.with(|shelved| shelved.pages[now] = then);
        }),
        ("a seal page that has changed", &|shelf| _ = flip(shelf, 2, 40)),
    ];
    for (what, attack) in attacks {
        for stubborn in [false, true] {
            let shelf = shelf.copy();
            shelf.with(|shelved| shelved.stubborn = stubborn);
            attack(&shelf);
            // a store that goes on after a refusal of the second copy has still handed out each
            // page once
            let harmless = |got| stubborn && got == expected;
            assert!(read(&shelf, &wanted).map_or(true, harmless), "{what}");
        }
    }
    // a page that has no seal is none of the version, whatever the store has there
    let added = shelf.copy();
    added.with(|Shelved { pages, .. }| pages.push((at(7), page(7))));
    assert_eq!(read(&added, &[7]).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(read(&shelf, &[TALL]).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(read(&shelf, &[u64::MAX]).unwrap_err().kind(), ErrorKind::InvalidInput);
}
