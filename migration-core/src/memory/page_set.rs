//! Sets of pages, as bitmaps over a [`RamLayout`](crate::RamLayout)'s page numbers.
//!
//! A set is a list of *chunks* of 128 MiB of RAM. A chunk of which no page or every page is a
//! member has no bitmap. So the memory of a set, and the time of a pass over it, depend on the
//! parts of RAM in which members and other pages mix, and not on the size of RAM. Copies share
//! their bitmaps until one of them changes.

use std::{fmt, sync::Arc};

use crate::page::PageRange;

const BITS: u64 = u64::BITS as u64;
/// The number of words of a chunk's bitmap, which fills one page of memory. In tests of this crate
/// chunks are small, so that a set has many of them.
const CHUNK_WORDS: usize = if cfg!(test) { 2 } else { 512 };
/// The number of pages of a chunk.
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * BITS;

type Words = [u64; CHUNK_WORDS];

/// A set of pages of a VM with a given number of pages.
///
/// Numbers at or beyond [`capacity`](PageSet::capacity) are never members. Inserting one does
/// nothing, so a number from an untrusted peer can do no harm.
///
/// A set takes 16 bytes for each 128 MiB of RAM, and 4 KiB more for each 128 MiB of which some
/// pages are members and others are not.
///
/// ```
/// use migration_core::{PageRange, PageSet};
/// let mut dirty = PageSet::empty(1000);
/// dirty.insert_range(PageRange::new(10, 5));
/// dirty.remove(12);
/// assert_eq!(dirty.len(), 4);
/// let runs: Vec<_> = dirty.ranges().map(|r| (r.first, r.count)).collect();
/// assert_eq!(runs, [(10, 2), (13, 2)]);
/// ```
#[derive(Default, Clone, PartialEq, Eq)]
pub struct PageSet {
    chunks: Vec<Chunk>,
    capacity: u64,
    members: u64,
}

/// The members among [`CHUNK_PAGES`] consecutive pages; the last chunk of a set may have fewer.
#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    Empty,
    Full,
    /// At least one page is a member, and at least one is not. Bits of pages that do not exist are
    /// zero.
    Mixed {
        members: u32,
        words: Arc<Words>,
    },
}

impl Chunk {
    /// Returns the chunk of `size` pages of which `members` pages are members: those whose bits in
    /// `words` are set.
    fn of(members: u64, size: u64, words: Arc<Words>) -> Self {
        match members {
            0 => Chunk::Empty,
            all if all == size => Chunk::Full,
            // `members` is at most `CHUNK_PAGES`
            some => Chunk::Mixed { members: some as u32, words },
        }
    }

    /// Returns whether both chunks share one bitmap in memory: one is an unchanged copy of the
    /// other.
    fn shares(&self, other: &Self) -> bool {
        match (self, other) {
            (Chunk::Mixed { words: a, .. }, Chunk::Mixed { words: b, .. }) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    fn members(&self, size: u64) -> u64 {
        match self {
            Chunk::Empty => 0,
            Chunk::Full => size,
            Chunk::Mixed { members, .. } => u64::from(*members),
        }
    }

    /// Returns the bitmap of a chunk of `size` pages.
    fn into_words(self, size: u64) -> Arc<Words> {
        match self {
            Chunk::Empty => Arc::new([0; CHUNK_WORDS]),
            Chunk::Full => {
                let mut words = [0; CHUNK_WORDS];
                masks(0, size).for_each(|(index, mask)| words[index] = mask);
                Arc::new(words)
            }
            Chunk::Mixed { words, .. } => words,
        }
    }
}

impl PageSet {
    /// Returns the empty set for a VM with `capacity` pages.
    pub fn empty(capacity: u64) -> Self {
        Self { chunks: vec![Chunk::Empty; capacity.div_ceil(CHUNK_PAGES) as usize], capacity, members: 0 }
    }

    /// Returns the set of all pages of a VM with `capacity` pages.
    pub fn full(capacity: u64) -> Self {
        Self { chunks: vec![Chunk::Full; capacity.div_ceil(CHUNK_PAGES) as usize], capacity, members: capacity }
    }

    /// Returns the number of pages of the VM. All members are below this number.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Returns the number of pages in the set. Takes constant time, because the number is stored.
    pub fn len(&self) -> u64 {
        self.members
    }

    /// Returns whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.members == 0
    }

    /// Removes all pages except the first `most` ones.
    pub(crate) fn keep_first(&mut self, most: u64) {
        if self.members <= most {
            return;
        }
        let first_beyond = self.iter().nth(usize::try_from(most).unwrap_or(usize::MAX));
        if let Some(first) = first_beyond {
            self.remove_range(PageRange::new(first, self.capacity() - first));
        }
    }

    /// Returns whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        if page >= self.capacity {
            return false;
        }
        match &self.chunks[(page / CHUNK_PAGES) as usize] {
            Chunk::Empty => false,
            Chunk::Full => true,
            Chunk::Mixed { words, .. } => {
                let bit = page % CHUNK_PAGES;
                words[(bit / BITS) as usize] >> (bit % BITS) & 1 != 0
            }
        }
    }

    /// Adds `page`. Returns whether it was added, which is so if it is below the capacity and was
    /// not a member before.
    pub fn insert(&mut self, page: u64) -> bool {
        let before = self.members;
        self.set_range(PageRange::new(page, 1), true);
        self.members != before
    }

    /// Removes `page`. Returns whether it was a member.
    pub fn remove(&mut self, page: u64) -> bool {
        let before = self.members;
        self.set_range(PageRange::new(page, 1), false);
        self.members != before
    }

    /// Adds every page of `range` that is below the capacity.
    pub fn insert_range(&mut self, range: PageRange) {
        self.set_range(range, true);
    }

    /// Removes every page of `range`.
    pub fn remove_range(&mut self, range: PageRange) {
        self.set_range(range, false);
    }

    /// Returns the number of pages of `range` that are members.
    pub fn count_in(&self, range: PageRange) -> u64 {
        let count = |(index, first, end): (usize, u64, u64)| match &self.chunks[index] {
            Chunk::Empty => 0,
            Chunk::Full => end - first,
            Chunk::Mixed { members, .. } if end - first == CHUNK_PAGES => u64::from(*members),
            Chunk::Mixed { words, .. } => count_masked(words, first, end),
        };
        pieces(range, self.capacity).map(count).sum()
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.chunks.fill(Chunk::Empty);
        self.members = 0;
    }

    /// Adds every page of `other`. Members of `other` beyond this set's capacity are ignored.
    pub fn union_with(&mut self, other: &PageSet) {
        if self.capacity != other.capacity {
            return other.ranges().for_each(|range| self.insert_range(range));
        }
        self.combine(other, |a, b| match (a, b) {
            (Chunk::Full, _) | (_, Chunk::Empty) => Combined::First,
            (_, Chunk::Full) | (Chunk::Empty, _) => Combined::Second,
            _ if a.shares(b) => Combined::First,
            _ => Combined::Words(|a, b| a | b),
        });
    }

    /// Removes every page of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        if self.capacity != other.capacity {
            return other.ranges().for_each(|range| self.remove_range(range));
        }
        self.combine(other, |a, b| match (a, b) {
            (Chunk::Empty, _) | (_, Chunk::Empty) => Combined::First,
            (_, Chunk::Full) => Combined::Empty,
            _ if a.shares(b) => Combined::Empty,
            _ => Combined::Words(|a, b| a & !b),
        });
    }

    /// Removes every page that is not in `other`.
    pub fn intersect_with(&mut self, other: &PageSet) {
        if self.capacity != other.capacity {
            let mut same = PageSet::empty(self.capacity);
            same.union_with(other);
            return self.intersect_with(&same);
        }
        self.combine(other, |a, b| match (a, b) {
            (Chunk::Empty, _) | (_, Chunk::Full) => Combined::First,
            (_, Chunk::Empty) => Combined::Empty,
            (Chunk::Full, _) => Combined::Second,
            _ if a.shares(b) => Combined::First,
            _ => Combined::Words(|a, b| a & b),
        });
    }

    /// Returns the pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges().flat_map(PageRange::pages)
    }

    /// Returns the maximal runs of pages in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.ranges_in(PageRange::new(0, self.capacity))
    }

    /// Returns the maximal runs of pages inside `within` in ascending order.
    pub fn ranges_in(&self, within: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let (mut at, end) = (within.first, within.end().min(self.capacity));
        std::iter::from_fn(move || {
            let first = self.next(at, end, true)?;
            let stop = self.next(first, end, false).unwrap_or(end);
            at = stop;
            Some(PageRange::new(first, stop - first))
        })
    }

    /// Returns the first page of `within` that is in the set.
    pub fn first_in(&self, within: PageRange) -> Option<u64> {
        self.next(within.first, within.end().min(self.capacity), true)
    }

    /// Returns the last page of `within` that is in the set.
    pub fn last_in(&self, within: PageRange) -> Option<u64> {
        self.previous(within.end().min(self.capacity), within.first, true)
    }

    /// Returns the first page of the set at or after `page`.
    pub fn first_from(&self, page: u64) -> Option<u64> {
        self.next(page, self.capacity, true)
    }

    /// Returns the last page of the set before `page`.
    pub fn last_below(&self, page: u64) -> Option<u64> {
        self.previous(page.min(self.capacity), 0, true)
    }

    /// Returns the run of at most `most` pages of the set that begins with `page`, or `None` if
    /// `page` is not in the set or `most` is 0.
    ///
    /// ```
    /// use migration_core::{PageRange, PageSet};
    /// let mut set = PageSet::empty(100);
    /// set.insert_range(PageRange::new(10, 20));
    /// assert_eq!(set.run_at(25, 64), Some(PageRange::new(25, 5)));
    /// assert_eq!(set.run_before(25, 8), Some(PageRange::new(17, 8)));
    /// assert_eq!(set.run_at(30, 64), None);
    /// ```
    pub fn run_at(&self, page: u64, most: u64) -> Option<PageRange> {
        if most == 0 || !self.contains(page) {
            return None;
        }
        let end = page.saturating_add(most).min(self.capacity);
        let stop = self.next(page, end, false).unwrap_or(end);
        Some(PageRange::new(page, stop - page))
    }

    /// Returns the run of at most `most` pages of the set that ends just below `page`, or `None` if
    /// `page - 1` is not in the set or `most` is 0.
    pub fn run_before(&self, page: u64, most: u64) -> Option<PageRange> {
        if most == 0 || !page.checked_sub(1).is_some_and(|last| self.contains(last)) {
            return None;
        }
        let start = page.saturating_sub(most);
        let first = self.previous(page, start, false).map_or(start, |gap| gap + 1);
        Some(PageRange::new(first, page - first))
    }

    /// Copies the bits of the pages from page `64 * first` on into `words`. Page `64 * first` is
    /// bit 0 of the first word. Bits of pages that do not exist are zero.
    ///
    /// ```
    /// use migration_core::{PageRange, PageSet};
    /// let mut set = PageSet::empty(200);
    /// set.insert_range(PageRange::new(66, 64));
    /// let mut words = [0; 3];
    /// set.copy_words(1, &mut words);
    /// assert_eq!(words, [u64::MAX << 2, 3, 0]);
    /// ```
    pub fn copy_words(&self, first: u64, words: &mut [u64]) {
        words.fill(0);
        let from = first.saturating_mul(BITS);
        let within = PageRange::new(from, (words.len() as u64).saturating_mul(BITS));
        for (index, low, high) in pieces(within, self.capacity) {
            // both are multiples of 64, except at the end of RAM
            let at = ((index as u64 * CHUNK_PAGES + low - from) / BITS) as usize;
            match &self.chunks[index] {
                Chunk::Empty => {}
                Chunk::Full => {
                    let start = (low / BITS) as usize;
                    masks(low, high).for_each(|(word, mask)| words[at + word - start] = mask);
                }
                Chunk::Mixed { words: bits, .. } => {
                    let bits = &bits[(low / BITS) as usize..high.div_ceil(BITS) as usize];
                    words[at..at + bits.len()].copy_from_slice(bits);
                }
            }
        }
    }

    /// Adds the pages whose bits are set in `bitmap`. Bit 0 stands for page `first`, and the bitmap
    /// covers `count` pages: the form in which KVM returns the dirty log of a memory slot. Bits
    /// beyond `count`, and words missing in `bitmap`, are ignored.
    pub fn insert_bitmap(&mut self, first: u64, count: u64, bitmap: &[u64]) {
        let count = count.min((bitmap.len() as u64).saturating_mul(BITS));
        for (index, low, high) in pieces(PageRange::new(first, count), self.capacity) {
            // the position in `bitmap` of the bit for the first page of this piece
            let from = index as u64 * CHUNK_PAGES + low - first;
            let words = &bitmap[(from / BITS) as usize..(from + high - low).div_ceil(BITS) as usize];
            if matches!(self.chunks[index], Chunk::Full) || words.iter().all(|&word| word == 0) {
                continue;
            }
            self.change(index, low, high, |word, mask, bits| {
                let page = word as u64 * BITS + u64::from(mask.trailing_zeros());
                bits | bits_from(bitmap, from + page - low) << (page % BITS) & mask
            });
        }
    }

    /// Returns the number of pages of chunk `index`.
    fn size(&self, index: usize) -> u64 {
        CHUNK_PAGES.min(self.capacity - index as u64 * CHUNK_PAGES)
    }

    fn set_range(&mut self, range: PageRange, member: bool) {
        for (index, low, high) in pieces(range, self.capacity) {
            let size = self.size(index);
            let uniform = if member { Chunk::Full } else { Chunk::Empty };
            if high - low == size {
                self.replace(index, uniform);
            } else if self.chunks[index] != uniform {
                self.change(index, low, high, |_, mask, bits| if member { bits | mask } else { bits & !mask });
            }
        }
    }

    /// Changes the words of chunk `index` that hold the bits `low` to `high`. `change` receives the
    /// number of a word, the mask of those bits in the word, and the word, and returns the new
    /// word. It changes no bits outside the mask.
    fn change(&mut self, index: usize, low: u64, high: u64, change: impl Fn(usize, u64, u64) -> u64) {
        let size = self.size(index);
        let chunk = std::mem::replace(&mut self.chunks[index], Chunk::Empty);
        let before = chunk.members(size);
        let mut words = chunk.into_words(size);
        let bits = Arc::make_mut(&mut words);
        let (mut removed, mut added) = (0, 0);
        for (word, mask) in masks(low, high) {
            let new = change(word, mask, bits[word]);
            removed += u64::from((bits[word] & mask).count_ones());
            added += u64::from((new & mask).count_ones());
            bits[word] = new;
        }
        let after = before - removed + added;
        self.members = self.members - before + after;
        self.chunks[index] = Chunk::of(after, size, words);
    }

    fn replace(&mut self, index: usize, chunk: Chunk) {
        let size = self.size(index);
        self.members = self.members - self.chunks[index].members(size) + chunk.members(size);
        self.chunks[index] = chunk;
    }

    /// Replaces each chunk as `how` says for this chunk and the chunk of `other` at the same
    /// position. `other` must have the capacity of this set.
    fn combine(&mut self, other: &PageSet, how: impl Fn(&Chunk, &Chunk) -> Combined) {
        for (index, theirs) in other.chunks.iter().enumerate() {
            match how(&self.chunks[index], theirs) {
                Combined::First => {}
                Combined::Empty => self.replace(index, Chunk::Empty),
                Combined::Second => self.replace(index, theirs.clone()),
                Combined::Words(of) => {
                    let theirs = theirs.clone().into_words(self.size(index));
                    self.change(index, 0, self.size(index), |word, _, bits| of(bits, theirs[word]));
                }
            }
        }
    }

    /// Returns the smallest page number at or after `at`, below `end`, whose membership is
    /// `member`.
    fn next(&self, mut at: u64, end: u64, member: bool) -> Option<u64> {
        while at < end {
            let base = at - at % CHUNK_PAGES;
            let stop = (base + CHUNK_PAGES).min(end);
            match (&self.chunks[(at / CHUNK_PAGES) as usize], member) {
                (Chunk::Full, true) | (Chunk::Empty, false) => return Some(at),
                (Chunk::Full, false) | (Chunk::Empty, true) => {}
                (Chunk::Mixed { words, .. }, _) => {
                    if let Some(found) = next_in(words, at - base, stop - base, member) {
                        return Some(base + found);
                    }
                }
            }
            at = stop;
        }
        None
    }

    /// Returns the largest page number at or after `from`, below `before`, whose membership is
    /// `member`. `before` is at most the capacity.
    fn previous(&self, mut before: u64, from: u64, member: bool) -> Option<u64> {
        while from < before {
            let base = (before - 1) / CHUNK_PAGES * CHUNK_PAGES;
            let start = base.max(from);
            match (&self.chunks[(base / CHUNK_PAGES) as usize], member) {
                (Chunk::Full, true) | (Chunk::Empty, false) => return Some(before - 1),
                (Chunk::Full, false) | (Chunk::Empty, true) => {}
                (Chunk::Mixed { words, .. }, _) => {
                    if let Some(found) = previous_in(words, before - base, start - base, member) {
                        return Some(base + found);
                    }
                }
            }
            before = start;
        }
        None
    }
}

/// The result of combining two chunks.
enum Combined {
    Empty,
    First,
    Second,
    Words(fn(u64, u64) -> u64),
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {}:", self.len(), self.capacity)?;
        for r in self.ranges().take(8) {
            write!(f, " {}+{}", r.first, r.count)?;
        }
        f.write_str(if self.ranges().nth(8).is_some() { " …)" } else { ")" })
    }
}

/// Splits the part of `range` below `capacity` by chunks. Returns for each chunk its index, and the
/// first page and the end of the part, counted from the chunk's first page. No part is empty.
fn pieces(range: PageRange, capacity: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let (mut at, end) = (range.first, range.end().min(capacity));
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let base = at - at % CHUNK_PAGES;
        let stop = (base + CHUNK_PAGES).min(end);
        let piece = ((base / CHUNK_PAGES) as usize, at - base, stop - base);
        at = stop;
        Some(piece)
    })
}

/// Returns the index of each word of a chunk that holds bits from `first` to `end`, with the mask
/// of those bits in the word.
fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / BITS..end.div_ceil(BITS)).map(move |index| {
        let low = first.saturating_sub(index * BITS);
        let high = (end - index * BITS).min(BITS);
        (index as usize, u64::MAX >> (BITS - high) & (u64::MAX << low))
    })
}

fn count_masked(words: &Words, first: u64, end: u64) -> u64 {
    masks(first, end).map(|(word, mask)| u64::from((words[word] & mask).count_ones())).sum()
}

/// Returns the 64 bits of `bitmap` from bit `at` on. Bits beyond its end are zero.
fn bits_from(bitmap: &[u64], at: u64) -> u64 {
    let (index, shift) = ((at / BITS) as usize, at % BITS);
    let word = |index: usize| bitmap.get(index).copied().unwrap_or(0);
    match shift {
        0 => word(index),
        _ => word(index) >> shift | word(index + 1) << (BITS - shift),
    }
}

/// Returns the first bit at or after `at`, below `end`, whose value is `member`.
fn next_in(words: &Words, at: u64, end: u64, member: bool) -> Option<u64> {
    let flip = if member { 0 } else { u64::MAX };
    masks(at, end).find_map(|(index, mask)| {
        let found = (words[index] ^ flip) & mask;
        (found != 0).then(|| index as u64 * BITS + u64::from(found.trailing_zeros()))
    })
}

/// Returns the last bit at or after `from`, below `before`, whose value is `member`.
fn previous_in(words: &Words, before: u64, from: u64, member: bool) -> Option<u64> {
    let flip = if member { 0 } else { u64::MAX };
    (from / BITS..before.div_ceil(BITS)).rev().find_map(|index| {
        let low = from.saturating_sub(index * BITS);
        let high = (before - index * BITS).min(BITS);
        let found = (words[index as usize] ^ flip) & (u64::MAX >> (BITS - high)) & (u64::MAX << low);
        (found != 0).then(|| index * BITS + (BITS - 1 - u64::from(found.leading_zeros())))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn build(capacity: u64, ranges: &[(u64, u64)]) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut model) = (PageSet::empty(capacity), BTreeSet::new());
        for &(first, count) in ranges {
            set.insert_range(PageRange::new(first, count));
            model.extend((first..first + count).filter(|&p| p < capacity));
        }
        (set, model)
    }

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0u64..400, 0u64..150), 0..6)
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(capacity in 0u64..500, a in ranges(), b in ranges(), probe in 0u64..600) {
            let (set_a, model_a) = build(capacity, &a);
            let (set_b, model_b) = build(capacity, &b);
            prop_assert_eq!(set_a.len(), model_a.len() as u64);
            prop_assert_eq!(set_a.contains(probe), model_a.contains(&probe));
            prop_assert!(set_a.iter().eq(model_a.iter().copied()));
            let (mut or, mut minus, mut and) = (set_a.clone(), set_a.clone(), set_a.clone());
            or.union_with(&set_b);
            minus.subtract(&set_b);
            and.intersect_with(&set_b);
            prop_assert!(or.iter().eq(model_a.union(&model_b).copied()));
            prop_assert!(minus.iter().eq(model_a.difference(&model_b).copied()));
            prop_assert!(and.iter().eq(model_a.intersection(&model_b).copied()));
            // with a copy of itself, which shares its bitmaps
            let (mut or, mut minus, mut and) = (set_a.clone(), set_a.clone(), set_a.clone());
            or.union_with(&set_a);
            minus.subtract(&set_a);
            and.intersect_with(&set_a);
            prop_assert!(or == set_a && and == set_a && minus == PageSet::empty(capacity));
            let within = PageRange::new(probe / 2, 90);
            prop_assert_eq!(set_a.count_in(within), model_a.range(within.pages()).count() as u64);
            prop_assert!(set_a.ranges_in(within).flat_map(PageRange::pages)
                .eq(model_a.range(within.pages()).copied()));
        }

        #[test]
        fn runs_are_maximal(capacity in 1u64..500, a in ranges()) {
            let (set, _) = build(capacity, &a);
            let runs: Vec<_> = set.ranges().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].first));
            prop_assert!(runs.iter().all(|r| r.count > 0));
        }

        #[test]
        fn finds_what_a_set_finds(
            capacity in 0u64..500, a in ranges(), page in 0u64..600, count in 0u64..200, far in any::<u64>(),
        ) {
            let (set, model) = build(capacity, &a);
            for page in [page, far] {
                prop_assert_eq!(set.first_from(page), model.range(page..).next().copied());
                prop_assert_eq!(set.last_below(page), model.range(..page).next_back().copied());
                let within = PageRange::new(page, count);
                prop_assert_eq!(set.first_in(within), model.range(within.pages()).next().copied());
                prop_assert_eq!(set.last_in(within), model.range(within.pages()).next_back().copied());
                let up = (page..page.saturating_add(count)).take_while(|p| model.contains(p)).count() as u64;
                prop_assert_eq!(set.run_at(page, count), (up > 0).then(|| PageRange::new(page, up)));
                let down = (page.saturating_sub(count)..page).rev().take_while(|p| model.contains(p)).count() as u64;
                prop_assert_eq!(set.run_before(page, count), (down > 0).then(|| PageRange::new(page - down, down)));
            }
        }

        #[test]
        fn bitmaps_land_at_their_offset(first in 0u64..200, count in 0u64..200, words in prop::collection::vec(any::<u64>(), 0..5)) {
            let mut set = PageSet::empty(300);
            set.insert_bitmap(first, count, &words);
            for page in 0..300u64 {
                let bit = page.checked_sub(first).filter(|&b| b < count);
                let want = bit.is_some_and(|b| words.get((b / 64) as usize).is_some_and(|w| w >> (b % 64) & 1 != 0));
                prop_assert_eq!(set.contains(page), want, "page {}", page);
            }
        }
    }

    proptest! {
        #[test]
        fn words_are_those_of_the_bitmap(capacity in 0u64..500, a in ranges(), first in 0u64..9, count in 0usize..9) {
            let (set, _) = build(capacity, &a);
            let mut words = vec![7; count];
            set.copy_words(first, &mut words);
            for (word, bit) in (0..count as u64).flat_map(|word| (0..64).map(move |bit| (word, bit))) {
                let page = (first + word) * 64 + bit;
                prop_assert_eq!(words[word as usize] >> bit & 1 != 0, set.contains(page), "page {}", page);
            }
        }

        #[test]
        fn a_copy_does_not_change_with_its_original(a in ranges(), b in ranges()) {
            let (mut set, model) = build(500, &a);
            let copy = set.clone();
            b.iter().for_each(|&(first, count)| set.remove_range(PageRange::new(first, count)));
            prop_assert!(copy.iter().eq(model.iter().copied()));
        }
    }

    #[test]
    fn a_uniform_chunk_has_no_bitmap() {
        let mixed = |set: &PageSet| set.chunks.iter().filter(|chunk| matches!(chunk, Chunk::Mixed { .. })).count();
        let capacity = 10 * CHUNK_PAGES + 5;
        let mut set = PageSet::empty(capacity);
        set.insert_range(PageRange::new(CHUNK_PAGES - 1, 3 * CHUNK_PAGES));
        assert_eq!((mixed(&set), set.chunks.len()), (2, 11));
        set.insert(0);
        set.insert_range(PageRange::new(1, CHUNK_PAGES - 2));
        assert_eq!(mixed(&set), 1, "the first chunk is full");
        set.remove_range(PageRange::new(4 * CHUNK_PAGES - 2, 1));
        set.insert_bitmap(4 * CHUNK_PAGES - 2, 2, &[3]);
        assert_eq!(mixed(&set), 0);
        set.insert_range(PageRange::new(10 * CHUNK_PAGES, 5));
        assert_eq!((mixed(&set), set.len()), (0, 4 * CHUNK_PAGES + 5), "the last chunk is shorter");
        set.subtract(&PageSet::full(capacity));
        assert_eq!(set, PageSet::empty(capacity));
    }

    #[test]
    fn full_has_all_and_no_more() {
        for n in [0, 1, 63, 64, 65, 128, 1000] {
            let mut set = PageSet::full(n);
            assert_eq!(set.len(), n);
            assert!(!set.contains(n) && !set.insert(n) && !set.insert(n + 1) && !set.remove(n));
            assert_eq!(set, PageSet::full(n));
        }
    }
}
