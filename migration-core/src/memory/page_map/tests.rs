//! Tests that compare the map with a table of pages: every change, on any page, in any order.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 300;
const BLOCK: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Zero,
    Here,
    Missing,
}

/// The state of one page.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    at: At,
    copy: Option<StoreCopy>,
    put: Option<StoreCopy>,
    held: bool,
    claimed: bool,
    left: bool,
    /// Whether the page was missing at the hand-over, at its source, and was never claimed or
    /// announced, so that the destination cannot have it.
    never: bool,
    unsent: bool,
    unannounced: bool,
    delivered: bool,
    /// Whether the page is out of the guest's reach.
    evicting: bool,
    /// Whether the destination looks for the page in a store.
    looked_up: bool,
}

const NEW: Page = Page {
    at: At::Zero,
    copy: None,
    put: None,
    held: false,
    claimed: false,
    left: false,
    never: false,
    unsent: false,
    unannounced: false,
    delivered: false,
    evicting: false,
    looked_up: false,
};

impl Page {
    fn is_missing(&self) -> bool {
        self.at == At::Missing
    }

    fn location(&self) -> Location {
        match (self.at, self.copy) {
            (At::Zero, _) => Location::Zero,
            (At::Here, _) => Location::Here,
            (At::Missing, None) => Location::Source,
            (At::Missing, Some(copy)) => Location::Store(copy),
        }
    }

    fn is_only_in_store(&self) -> bool {
        self.is_missing() && self.copy.is_some() && !self.held
    }

    /// Returns whether the page is missing, and is neither claimed nor being put.
    fn is_free(&self) -> bool {
        self.is_missing() && !self.claimed && self.put.is_none()
    }

    fn can_come_from_source(&self) -> bool {
        self.is_free() && (self.copy.is_none() || self.held)
    }

    /// Returns the page without its copy and its put.
    fn without_copy(self) -> Self {
        Page { copy: None, put: None, held: false, unannounced: false, delivered: false, ..self }
    }

    fn sent_again(self) -> Self {
        match (self.at, self.copy, self.put) {
            (At::Missing, Some(_), _) => Page { unannounced: true, claimed: false, ..self },
            (At::Missing, None, Some(_)) => self,
            _ => Page { at: At::Missing, claimed: false, evicting: false, ..self.without_copy() },
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Dirtied(PageRange),
    Free(PageRange),
    Sending(PageRange),
    Acknowledged(PageRange),
    Received(PageRange),
    Zeroed(PageRange),
    LeaveBehind(PageRange),
    Claim(PageRange),
    ClaimBlock(u64),
    Unclaim(PageRange),
    Arrived(PageRange),
    Lacking(PageRange),
    TakenBack,
    PutStarted(PageRange, StoreCopy),
    PutDone(PageRange, StoreCopy),
    PutFailed(PageRange, StoreCopy),
    PutZeros(PageRange, StoreCopy),
    Announced(PageRange),
    NothingAnnounced,
    Located(PageRange, StoreCopy, bool),
    ClaimStored(PageRange, StoreCopy),
    Populated(PageRange),
    Evicting(PageRange),
    MappedAgain(PageRange),
    Evicted(PageRange),
    EvictedZeros(PageRange),
    Returned(PageRange),
    EntryLost(u8),
    EntryReopened(u8),
    Lacks(PageRange),
    Released,
}

fn set(range: PageRange) -> PageSet {
    let mut set = PageSet::empty(PAGES);
    set.insert_range(range);
    set
}

/// Applies `change` to `map`. Returns the pages that the change reports.
fn apply(map: &mut PageMap, change: &Change) -> Result<Vec<u64>, MapError> {
    let pages = |runs: Vec<PageRange>| {
        let mut pages: Vec<u64> = runs.into_iter().flat_map(PageRange::pages).collect();
        pages.sort_unstable();
        pages
    };
    match *change {
        Change::Dirtied(range) => map.dirtied(&set(range))?,
        Change::Free(range) => map.free_for_now(&set(range)),
        Change::Sending(range) => map.sending(&set(range))?,
        Change::Acknowledged(range) => map.acknowledged(&set(range))?,
        Change::Received(range) => map.received(range)?,
        Change::Zeroed(range) => return map.zeroed(range).map(pages),
        Change::LeaveBehind(range) => map.leave_behind(&set(range))?,
        Change::Claim(range) => map.claim(range)?,
        Change::ClaimBlock(page) => return Ok(pages(map.claim_block(page, BLOCK))),
        Change::Unclaim(range) => map.unclaim(range)?,
        Change::Arrived(range) => map.arrived(range)?,
        Change::Lacking(range) => map.lacking(&set(range))?,
        Change::TakenBack => map.taken_back(),
        Change::PutStarted(range, copy) => map.put_started(range, copy)?,
        Change::PutDone(range, copy) => return Ok(pages(map.put_done(range, copy))),
        Change::PutFailed(range, copy) => return Ok(pages(map.put_failed(range, copy))),
        Change::PutZeros(range, copy) => return Ok(pages(map.put_found_zeros(range, copy))),
        Change::Announced(range) => map.announced(&set(range)),
        Change::NothingAnnounced => map.nothing_announced(),
        Change::Located(range, copy, held) => return Ok(pages(map.located(range, copy, held))),
        Change::ClaimStored(range, copy) => map.claim_stored(range, copy)?,
        Change::Populated(range) => map.populated(&set(range)),
        Change::Evicting(range) => map.evicting(range)?,
        Change::MappedAgain(range) => map.mapped_again(range),
        Change::Evicted(range) => map.evicted(range)?,
        Change::EvictedZeros(range) => map.evicted_zeros(range)?,
        Change::Returned(range) => map.returned(range)?,
        Change::EntryLost(entry) => {
            let loss = map.entry_lost(entry);
            return Ok(loss.at_source.iter().chain(loss.only_there.iter()).collect());
        }
        Change::EntryReopened(entry) => map.entry_reopened(entry)?,
        Change::Lacks(range) => map.lacks(&set(range))?,
        Change::Released => map.released()?,
    }
    Ok(Vec::new())
}

/// The answers of a map's queries about one page.
#[derive(Debug, PartialEq)]
struct View {
    location: Location,
    copy: Option<StoreCopy>,
    located: Option<(StoreCopy, bool)>,
    held: bool,
    claimed: bool,
    sets: [bool; 9],
}

impl View {
    fn of(page: &Page) -> Self {
        let (missing, stored) = (page.is_missing(), page.copy.is_some());
        Self {
            location: page.location(),
            copy: page.copy,
            located: page.copy.map(|copy| (copy, page.held || page.at == At::Here)),
            held: missing && (!stored || page.held),
            claimed: missing && page.claimed,
            sets: [
                missing,
                missing && stored,
                page.left,
                page.is_free() && !stored,
                page.is_free() && stored,
                page.unsent,
                page.unannounced,
                page.put.is_some(),
                page.evicting,
            ],
        }
    }

    fn of_map(map: &PageMap, page: u64, located: Option<(StoreCopy, bool)>) -> Self {
        let sets = [
            map.missing(),
            map.in_store(),
            map.missing_at_hand_over(),
            map.unclaimed(),
            map.unfetched(),
            map.unsent(),
            map.unannounced(),
            map.being_put(),
            map.being_evicted(),
        ];
        Self {
            location: map.location(page),
            copy: map.copy(page),
            located,
            held: map.is_held(page),
            claimed: map.is_claimed_in(PageRange::new(page, 1)),
            sets: sets.map(|set| set.contains(page)),
        }
    }
}

/// The reference model of the map: a table of pages.
struct Model {
    pages: Vec<Page>,
    lost: BTreeSet<u8>,
    handed_over: bool,
}

impl Model {
    fn all(&self) -> PageRange {
        PageRange::new(0, PAGES)
    }

    /// Returns `error` of the first page of `range` for which `bad` returns true, if there is one.
    fn none(
        &self,
        range: PageRange,
        error: impl Fn(u64) -> MapError,
        bad: impl Fn(&Page) -> bool,
    ) -> Result<(), MapError> {
        let found = range.pages().find(|&page| bad(&self.pages[page as usize]));
        found.map_or(Ok(()), |page| Err(error(page)))
    }

    /// Replaces each page of `range` for which `to` returns a new state. Returns the numbers of
    /// these pages.
    fn set(&mut self, range: PageRange, to: impl Fn(Page) -> Option<Page>) -> Vec<u64> {
        let mut changed = Vec::new();
        for page in range.pages() {
            if let Some(new) = to(self.pages[page as usize]) {
                self.pages[page as usize] = new;
                changed.push(page);
            }
        }
        changed
    }

    fn apply(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        match *change {
            Change::PutStarted(..) | Change::PutDone(..) | Change::PutFailed(..) | Change::PutZeros(..) => {
                self.put(change)
            }
            Change::Announced(_)
            | Change::NothingAnnounced
            | Change::Located(..)
            | Change::ClaimStored(..)
            | Change::Returned(_)
            | Change::EntryLost(_)
            | Change::EntryReopened(_)
            | Change::Released => self.store(change),
            Change::Populated(_)
            | Change::Evicting(_)
            | Change::MappedAgain(_)
            | Change::Evicted(_)
            | Change::EvictedZeros(_) => self.evict(change),
            Change::LeaveBehind(range) => self.leave_behind(range),
            Change::Lacking(_) | Change::Lacks(_) | Change::TakenBack => self.lack(change),
            Change::Claim(_) | Change::ClaimBlock(_) | Change::Unclaim(_) | Change::Arrived(_) => self.claim(change),
            _ => self.round(change),
        }
    }

    fn round(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        match *change {
            Change::Dirtied(range) => {
                self.none(range, MapError::LeftBehind, |page| page.left)?;
                self.set(range, |page| {
                    let written = Page { at: At::Here, unsent: true, ..page.without_copy() };
                    (!page.is_missing()).then_some(written)
                });
            }
            Change::Free(range) => {
                self.set(range, |page| {
                    let stale = page.looked_up && page.copy.is_none();
                    Some(Page { unsent: page.unsent && stale, ..page })
                });
            }
            Change::Sending(range) => {
                self.none(range, MapError::LeftBehind, |page| page.left)?;
                self.set(range, |page| {
                    let sending = Page { unsent: true, delivered: false, ..page };
                    Some(Page { unannounced: page.copy.is_some(), ..sending })
                });
            }
            Change::Acknowledged(range) => {
                self.none(range, MapError::NotSent, |page| !page.unsent)?;
                self.set(range, |page| {
                    let delivered = page.copy.is_some();
                    Some(Page { unsent: false, unannounced: false, delivered, looked_up: false, ..page })
                });
            }
            Change::Received(range) => {
                self.none(range, MapError::LeftBehind, |page| page.left)?;
                self.none(range, MapError::Evicting, |page| page.evicting)?;
                self.set(range, |page| Some(Page { at: At::Here, claimed: false, ..page.without_copy() }));
            }
            Change::Zeroed(range) => {
                self.none(range, MapError::LeftBehind, |page| page.left)?;
                self.none(range, MapError::Evicting, |page| page.evicting)?;
                let here = range.pages().filter(|&page| self.pages[page as usize].at == At::Here).collect();
                self.set(range, |page| Some(Page { at: At::Zero, claimed: false, ..page.without_copy() }));
                return Ok(here);
            }
            _ => unreachable!(),
        }
        Ok(Vec::new())
    }

    fn leave_behind(&mut self, range: PageRange) -> Result<Vec<u64>, MapError> {
        self.none(self.all(), MapError::Evicting, |page| page.evicting)?;
        self.none(range, MapError::LeftBehind, |page| page.left && !(page.is_free()))?;
        self.handed_over = true;
        self.set(range, |page| {
            let source =
                Page { at: At::Missing, claimed: false, unsent: false, looked_up: false, ..page.without_copy() };
            Some(Page { left: true, never: true, ..source })
        });
        self.set(self.all(), |page| {
            let stored = page.copy.is_some() && !page.delivered;
            let left = Page { left: true, unsent: false, ..page };
            let held = Page { at: At::Missing, held: true, put: None, ..left };
            stored.then_some(if page.at == At::Here { held } else { left })
        });
        Ok(Vec::new())
    }

    fn claim(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        let not_claimed = |page: &Page| !page.is_missing() || !page.claimed;
        match *change {
            Change::Claim(range) => {
                self.none(range, MapError::NotFree, |page| !page.can_come_from_source())?;
                self.set(range, |page| Some(Page { claimed: true, never: false, ..page }));
            }
            Change::ClaimBlock(at) => {
                let answered = |page: &Page| page.can_come_from_source() || page.is_missing() && page.put.is_some();
                let asked = self.pages[at as usize];
                if !answered(&asked) {
                    let again = asked.is_only_in_store() && asked.is_free() && !asked.delivered;
                    self.pages[at as usize].unannounced |= again;
                    return Ok(Vec::new());
                }
                let first = at / BLOCK * BLOCK;
                return Ok(self.set(PageRange::new(first, BLOCK.min(PAGES - first)), |page| {
                    let sent = Page { claimed: true, never: false, ..page.without_copy() };
                    answered(&page).then_some(sent)
                }));
            }
            Change::Unclaim(range) => {
                self.none(range, MapError::NotClaimed, not_claimed)?;
                self.set(range, |page| Some(Page { claimed: false, ..page }));
            }
            Change::Arrived(range) => {
                self.none(range, MapError::NotClaimed, not_claimed)?;
                self.set(range, |page| Some(Page { at: At::Here, claimed: false, ..page.without_copy() }));
            }
            _ => unreachable!(),
        }
        Ok(Vec::new())
    }

    fn lack(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        let cannot = |page: &Page| !page.left || page.is_only_in_store();
        match *change {
            Change::Lacks(range) => {
                self.none(range, MapError::NotLeftBehind, cannot)?;
                self.set(range, |page| Some(page.sent_again()));
            }
            Change::Lacking(range) => {
                self.none(range, MapError::NotLeftBehind, cannot)?;
                let outside = [PageRange::new(0, range.first), PageRange::new(range.end(), PAGES - range.end())];
                for part in outside {
                    self.none(part, MapError::NeverSent, |page| page.never)?;
                }
                for part in outside {
                    self.set(part, |page| {
                        let known = Page { unannounced: false, ..page };
                        let arrived = Page { at: At::Here, claimed: false, put: None, ..known };
                        let stored = page.is_missing() && page.copy.is_some();
                        page.left.then_some(if stored { known } else { arrived })
                    });
                }
                self.set(range, |page| Some(page.sent_again()));
            }
            Change::TakenBack => {
                self.set(self.all(), |page| {
                    let back = Page { left: false, never: false, claimed: false, put: None, ..page };
                    let back = Page { unannounced: page.copy.is_some(), unsent: page.copy.is_none(), ..back };
                    let here = Page { at: At::Here, held: false, ..back };
                    let stays = Page { unsent: page.unsent, ..back };
                    page.left.then_some(if page.is_only_in_store() { stays } else { here })
                });
                self.handed_over = false;
            }
            _ => unreachable!(),
        }
        Ok(Vec::new())
    }

    fn put(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        match *change {
            Change::PutStarted(_, copy) if self.lost.contains(&copy.entry) => Err(MapError::EntryLost(copy.entry)),
            Change::PutStarted(range, copy) => {
                let can = |page: &Page| {
                    let source = page.is_free() && page.copy.is_none();
                    page.put.is_none() && (page.at == At::Here || source)
                };
                self.none(range, MapError::CannotBePut, |page| !can(page))?;
                self.set(range, |page| Some(Page { put: Some(copy), ..page }));
                Ok(Vec::new())
            }
            Change::PutDone(_, copy) if self.lost.contains(&copy.entry) => Ok(Vec::new()),
            Change::PutDone(range, copy) => Ok(self.set(range, |page| {
                let held = page.is_missing();
                let done = Page { put: None, copy: Some(copy), held, unsent: false, delivered: false, ..page };
                (page.put == Some(copy)).then_some(Page { unannounced: true, ..done })
            })),
            Change::PutFailed(range, copy) => {
                Ok(self.set(range, |page| (page.put == Some(copy)).then_some(Page { put: None, ..page })))
            }
            Change::PutZeros(range, copy) => Ok(self.set(range, |page| {
                let zero = Page { at: At::Zero, unsent: false, ..page.without_copy() };
                (page.put == Some(copy) && page.at == At::Here && !page.evicting).then_some(zero)
            })),
            _ => unreachable!(),
        }
    }

    fn store(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        match *change {
            Change::Announced(range) => {
                self.set(range, |page| {
                    let (never, looked_up) = (page.never && page.copy.is_none(), page.looked_up || page.copy.is_some());
                    Some(Page { unannounced: false, never, looked_up, ..page })
                });
            }
            Change::NothingAnnounced => {
                self.set(self.all(), |page| {
                    let unannounced = page.copy.is_some();
                    let unsent = page.unsent || page.at == At::Here && page.copy.is_none();
                    Some(Page { unannounced, delivered: false, looked_up: false, unsent, ..page })
                });
            }
            Change::Located(range, copy, held) if !self.handed_over => {
                return Ok(self.set(range, |page| {
                    let new = Page { at: At::Missing, claimed: false, evicting: false, ..page.without_copy() };
                    Some(Page { copy: Some(copy), held, ..new })
                }));
            }
            Change::Located(_, copy, true) if self.lost.contains(&copy.entry) => {}
            Change::Located(range, copy, held) => {
                return Ok(self.set(range, |page| {
                    let source = page.is_missing() && page.copy.is_none() && page.put.is_none();
                    source.then_some(Page { copy: Some(copy), held, ..page })
                }));
            }
            Change::ClaimStored(range, copy) => {
                self.none(range, MapError::NotFree, |page| !page.is_free() || page.copy != Some(copy))?;
                self.set(range, |page| Some(Page { claimed: true, ..page }));
            }
            Change::Returned(range) => {
                self.none(range, MapError::NotClaimed, |page| !page.is_missing() || !page.claimed)?;
                self.none(range, MapError::NoCopy, |page| page.copy.is_none())?;
                self.set(range, |page| {
                    let here = Page { at: At::Here, held: false, claimed: false, ..page };
                    Some(Page { unannounced: !page.delivered, ..here })
                });
            }
            Change::EntryLost(entry) => return Ok(self.lose(entry)),
            Change::EntryReopened(entry) => {
                let there = |page: &Page| page.copy.is_some_and(|copy| copy.entry == entry);
                self.none(self.all(), |_| MapError::EntryLost(entry), there)?;
                self.lost.remove(&entry);
            }
            Change::Released => {
                self.none(self.all(), MapError::AtSource, |page| page.is_missing() && page.copy.is_none())?;
                self.set(self.all(), |page| Some(Page { held: false, ..page }));
            }
            _ => unreachable!(),
        }
        Ok(Vec::new())
    }

    fn evict(&mut self, change: &Change) -> Result<Vec<u64>, MapError> {
        match *change {
            Change::Populated(range) => {
                self.set(range, |page| (page.at == At::Zero).then_some(Page { at: At::Here, unsent: true, ..page }));
            }
            Change::Evicting(range) => {
                let can = |page: &Page| page.at == At::Here && !page.evicting && page.put.is_none();
                self.none(range, MapError::CannotBeEvicted, |page| !can(page))?;
                self.set(range, |page| Some(Page { evicting: true, ..page }));
            }
            Change::MappedAgain(range) => {
                self.set(range, |page| {
                    let mapped = Page { evicting: false, unsent: true, ..page.without_copy() };
                    page.evicting.then_some(mapped)
                });
            }
            Change::Evicted(range) => {
                let can = |page: &Page| page.at == At::Here && page.copy.is_some() && page.put.is_none();
                self.none(range, MapError::NoCopy, |page| !can(page))?;
                self.set(range, |page| {
                    let dropped = Page { at: At::Missing, held: false, claimed: false, unsent: false, ..page };
                    Some(Page { unannounced: !page.delivered, evicting: false, ..dropped })
                });
            }
            Change::EvictedZeros(range) => {
                self.none(range, MapError::CannotBeEvicted, |page| !page.evicting || page.put.is_some())?;
                self.set(range, |page| Some(Page { at: At::Zero, evicting: false, ..page.without_copy() }));
            }
            _ => unreachable!(),
        }
        Ok(Vec::new())
    }

    fn lose(&mut self, entry: u8) -> Vec<u64> {
        self.lost.insert(entry);
        let in_entry = |copy: Option<StoreCopy>| copy.is_some_and(|copy| copy.entry == entry);
        self.set(self.all(), |page| in_entry(page.put).then_some(Page { put: None, ..page }));
        let stored = |page: &Page, held| page.is_missing() && in_entry(page.copy) && page.held == held;
        let mut numbers = Vec::new();
        for held in [true, false] {
            numbers.extend((0..PAGES).filter(|&at| stored(&self.pages[at as usize], held)));
        }
        self.set(self.all(), |page| {
            let gone = Page { copy: None, held: false, unannounced: false, delivered: false, ..page };
            let unsent = page.unsent || page.at == At::Here && !page.delivered && !page.left;
            (in_entry(page.copy) && !page.is_only_in_store()).then_some(Page { unsent, ..gone })
        });
        numbers
    }

    /// Checks that `map` and the model agree on every page.
    fn check(&self, map: &PageMap) -> Result<(), TestCaseError> {
        let (mut never, mut at_source) = (0, 0);
        let mut located = BTreeMap::new();
        for run in map.located_runs(&PageSet::full(PAGES)) {
            run.pages.pages().for_each(|page| _ = located.insert(page, (run.copy, run.held)));
        }
        for (at, page) in (0..PAGES).zip(&self.pages) {
            prop_assert_eq!(View::of_map(map, at, located.get(&at).copied()), View::of(page), "page {}", at);
            never += u64::from(page.never);
            at_source += u64::from(page.location() == Location::Source);
        }
        prop_assert_eq!(map.never_claimed(), never);
        prop_assert_eq!(map.at_source(), at_source);
        prop_assert_eq!(map.source_pages().len(), at_source);
        let depends = |entry: &u8| {
            let depends = |page: &Page| page.is_missing() && page.held && page.copy.is_some_and(|c| c.entry == *entry);
            self.pages.iter().any(depends)
        };
        prop_assert_eq!(map.depends_on(), (0..3).filter(depends).collect::<Vec<u8>>());
        self.check_runs(map, PageRange::new(20, 90))
    }

    /// Checks that the runs that can be claimed are those of the model.
    fn check_runs(&self, map: &PageMap, within: PageRange) -> Result<(), TestCaseError> {
        let free = |copy| map.free_runs(within, copy, usize::MAX).into_iter().flat_map(PageRange::pages);
        let expected = |can: &dyn Fn(&Page) -> bool| {
            within.pages().filter(|&page| can(&self.pages[page as usize])).collect::<Vec<u64>>()
        };
        prop_assert_eq!(free(PageCopy::Source).collect::<Vec<u64>>(), expected(&Page::can_come_from_source));
        let copy = StoreCopy { entry: 1, generation: 1 };
        let stored = |page: &Page| page.is_free() && page.copy == Some(copy);
        prop_assert_eq!(free(PageCopy::Store(copy)).collect::<Vec<u64>>(), expected(&stored));
        Ok(())
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    // ranges begin and end at few places, so that changes meet
    let range =
        (0..30u64, 0..8u64).prop_map(|(first, count)| PageRange::new(10 * first, (5 * count).min(PAGES - 10 * first)));
    let copy = (0u8..3, 0u32..2).prop_map(|(entry, generation)| StoreCopy { entry, generation });
    // losses are rare: no put begins after one
    let change = (0..70, range, copy, any::<bool>()).prop_map(|(kind, range, copy, held)| match kind {
        0..3 => Change::Dirtied(range),
        3 => Change::Free(range),
        4..6 => Change::Sending(range),
        6..8 => Change::Acknowledged(range),
        8..10 => Change::Received(range),
        10 => Change::Zeroed(range),
        11..14 => Change::LeaveBehind(range),
        14..17 => Change::Claim(range),
        17..20 => Change::ClaimBlock(range.first),
        20..22 => Change::Unclaim(range),
        22..25 => Change::Arrived(range),
        25..27 => Change::Lacking(range),
        27 => Change::TakenBack,
        28..34 => Change::PutStarted(range, copy),
        34..40 => Change::PutDone(range, copy),
        40..43 => Change::PutFailed(range, copy),
        43..45 => Change::Announced(range),
        45 => Change::NothingAnnounced,
        46..50 => Change::Located(range, copy, held),
        50..53 => Change::ClaimStored(range, copy),
        53..55 => Change::Evicted(range),
        55..57 => Change::Returned(range),
        57 => Change::EntryLost(copy.entry),
        58 => Change::Lacks(range),
        59 => Change::Populated(range),
        60..63 => Change::Evicting(range),
        63..65 => Change::MappedAgain(range),
        65 => Change::EvictedZeros(range),
        66 => Change::Evicted(range),
        67 => Change::PutZeros(range, copy),
        68 => Change::EntryReopened(copy.entry),
        _ => Change::Released,
    });
    prop::collection::vec(change, 0..60)
}

proptest! {
    #[test]
    fn every_change_does_what_a_table_of_pages_says(changes in changes()) {
        let mut map = PageMap::new(PAGES);
        let mut model = Model { pages: vec![NEW; PAGES as usize], lost: BTreeSet::new(), handed_over: false };
        for change in &changes {
            prop_assert_eq!(apply(&mut map, change), model.apply(change), "{:?}", change);
            model.check(&map)?;
        }
    }

    #[test]
    fn a_run_of_zeros_names_what_has_to_be_cleared(data in 0..PAGES, zeros in 0..PAGES) {
        let mut map = PageMap::new(PAGES);
        let (data, zeros) = (PageRange::new(data, (PAGES - data).min(40)), PageRange::new(zeros, PAGES - zeros));
        map.received(data).unwrap();
        let cleared: Vec<u64> = map.zeroed(zeros).unwrap().into_iter().flat_map(PageRange::pages).collect();
        let both: Vec<u64> = data.pages().filter(|page| zeros.pages().contains(page)).collect();
        prop_assert_eq!(cleared, both);
    }
}
