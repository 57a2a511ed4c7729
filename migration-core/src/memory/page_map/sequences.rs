//! Tests with sequences of changes that random tests rarely contain.

use super::*;

const PAGES: u64 = 100;
const COPY: StoreCopy = StoreCopy { entry: 2, generation: 7 };

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(PAGES);
    pages.into_iter().for_each(|page| {
        set.insert(page);
    });
    set
}

/// Returns a map in which `pages` are `Here`, written by the guest, and also in a store.
fn stored(pages: PageRange) -> PageMap {
    let mut map = PageMap::new(PAGES);
    map.dirtied(&set(pages.pages())).unwrap();
    map.put_started(pages, COPY).unwrap();
    assert_eq!(map.put_done(pages, COPY), [pages]);
    map
}

/// A page that is sent although a store has it is `Here` at the destination after the hand-over.
#[test]
fn a_page_that_was_sent_all_the_same_is_not_missing() {
    let mut map = stored(PageRange::new(5, 2));
    map.sending(&set([5])).unwrap();
    assert!(map.unannounced().iter().eq([5, 6]));
    map.acknowledged(&set([5])).unwrap();
    assert!(map.unannounced().iter().eq([6]));
    map.leave_behind(&set([])).unwrap();
    assert_eq!([5, 6].map(|page| map.location(page)), [Location::Here, Location::Store(COPY)]);
    assert!(map.missing().iter().eq([6]));
}

#[test]
fn an_entry_that_has_lost_pages_is_named() {
    let mut map = stored(PageRange::new(5, 2));
    assert!(map.lost_entries().is_empty());
    map.entry_lost(COPY.entry);
    map.entry_lost(1);
    assert_eq!(map.lost_entries(), [1, COPY.entry]);
}

#[test]
fn the_first_pages_that_nobody_has_claimed_are_listed_up_to_a_number() {
    let mut map = PageMap::new(PAGES);
    let runs = [PageRange::new(3, 2), PageRange::new(10, 4), PageRange::new(20, 3)];
    map.leave_behind(&set(runs.into_iter().flat_map(PageRange::pages))).unwrap();
    for run in runs {
        map.located(run, COPY, false);
    }
    let listed = |map: &PageMap, most| -> Vec<PageRange> {
        let found = map.unfetched_runs(PageRange::new(0, PAGES), most);
        found.into_iter().map(|(run, copy)| (copy == COPY).then_some(run).unwrap()).collect()
    };
    assert_eq!(listed(&map, 100), runs);
    assert_eq!(listed(&map, 9), runs);
    assert_eq!(listed(&map, 8), [runs[0], runs[1], PageRange::new(20, 2)]);
    assert_eq!(listed(&map, 6), runs[..2]);
    assert_eq!(listed(&map, 5), [runs[0], PageRange::new(10, 3)]);
    assert_eq!(listed(&map, 1), [PageRange::new(3, 1)]);
    map.claim_stored(PageRange::new(10, 4), COPY).unwrap();
    assert_eq!(listed(&map, 5), [runs[0], runs[2]]);
}
