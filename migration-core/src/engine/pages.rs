//! Pages that do not go to a lane: they are put into a store while the guest runs, or copied in
//! memory while it is paused.

use std::io;

use super::rounds::Tracked;
use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    ram::GuestRam,
    report::{Event, Observer},
    store::PageContent,
    text::Chain,
    tracker::Rearm,
    vm::SourceVm,
};

/// The number of pages that are copied in one piece: as many as one frame takes.
const PIECE_PAGES: u64 = 256;

/// Returns the pages that may hold something else than zeros. Called after tracking has started, so
/// that a page that is touched later is dirty.
pub(super) fn populated(ram: &dyn GuestRam, observer: &dyn Observer) -> PageSet {
    let mut pages = PageSet::empty(ram.layout().pages());
    if let Err(error) = ram.populated(&mut pages) {
        observer.event(&Event::Warning(format!("holes are not known, all of RAM is sent: {}", Chain(&error))));
        pages = PageSet::full(pages.capacity());
    }
    pages
}

/// Returns the pages that are free now, if that is known. When to call: see
/// [`SourceVm::free_pages`].
pub(super) fn free<V: Tracked + ?Sized>(vm: &mut V, pages: u64, observer: &dyn Observer) -> PageSet {
    let mut free = PageSet::empty(pages);
    if let Err(error) = vm.free_pages(&mut free) {
        let why = format!("free pages are not known, they are sent like others: {}", Chain(&error));
        observer.event(&Event::Warning(why));
        free.clear();
    }
    free
}

/// Returns the pages that the guest has referenced lately, as far as that is known. When to call:
/// see [`SourceVm::referenced_pages`].
pub(super) fn referenced(vm: &mut dyn SourceVm, pages: u64, observer: &dyn Observer) -> PageSet {
    let mut referenced = PageSet::empty(pages);
    if let Err(error) = vm.referenced_pages(&mut referenced) {
        observer.event(&Event::Warning(format!("referenced pages are not known: {}", Chain(&error))));
        referenced.clear();
    }
    referenced
}

/// Puts those of `pages` that lie in `range` into a store. `rearm` is that of the tracker, or
/// `None` if the guest is paused and writes nothing.
pub(super) fn put(
    ram: &dyn GuestRam,
    range: PageRange,
    pages: &PageSet,
    rearm: Option<&dyn Rearm>,
    put: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
) -> Result<(), MigrationError> {
    if let Some(rearm) = rearm {
        rearm.before_read(range, pages)?;
    }
    let mut page = [0; PAGE_SIZE];
    for number in pages.ranges_in(range).flat_map(PageRange::pages) {
        // The page is copied first, because the guest may write between two reads of it.
        ram.slice(PageRange::new(number, 1))?.copy_to(&mut page);
        put(number, data_of(&page)).map_err(not_put)?;
    }
    Ok(())
}

pub(super) fn not_put(cause: io::Error) -> MigrationError {
    MigrationError::Store { step: "putting pages into the store", cause }
}

fn data_of(page: &[u8; PAGE_SIZE]) -> PageContent<'_> {
    page.iter().any(|&byte| byte != 0).then_some(page)
}

/// Copies of pages.
#[derive(Default)]
pub(super) struct Copied {
    ranges: Vec<PageRange>,
    /// The copied data, and room for more.
    data: Vec<u8>,
    len: usize,
}

impl Copied {
    /// Returns an empty value with room for this number of pages. The memory has been touched,
    /// because in a pause there is no time for page faults.
    pub(super) fn with_room(pages: u64) -> Self {
        // The allocator would not touch memory that is to hold zeros.
        Self { data: vec![1; pages as usize * PAGE_SIZE], ..Self::default() }
    }

    /// Copies `pages`. If the guest is paused, they are as they were at one moment, and `rearm` is
    /// `None`.
    pub(super) fn take(
        &mut self,
        ram: &dyn GuestRam,
        pages: &PageSet,
        rearm: Option<&dyn Rearm>,
    ) -> Result<(), MigrationError> {
        let end = self.len + pages.len() as usize * PAGE_SIZE;
        self.data.resize(self.data.len().max(end), 0);
        for run in pages.ranges() {
            if let Some(rearm) = rearm {
                rearm.before_read(run, pages)?;
            }
            for (_, _, mut piece) in ram.layout().split(run) {
                while piece.count > 0 {
                    let range = PageRange::new(piece.first, piece.count.min(PIECE_PAGES));
                    let bytes = range.count as usize * PAGE_SIZE;
                    ram.slice(range)?.copy_to(&mut self.data[self.len..self.len + bytes]);
                    self.len += bytes;
                    self.ranges.push(range);
                    piece = PageRange::new(range.end(), piece.count - range.count);
                }
            }
        }
        Ok(())
    }

    /// Returns the ranges, of at most 1 MiB each, with their data.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (PageRange, &[u8])> {
        let mut rest = &self.data[..];
        self.ranges.iter().map(move |&range| {
            let (data, behind) = rest.split_at(range.count as usize * PAGE_SIZE);
            rest = behind;
            (range, data)
        })
    }

    /// Returns the pages one by one, in the form that a store takes.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        let (pages, _) = self.data.as_chunks::<PAGE_SIZE>();
        self.ranges.iter().flat_map(|range| range.pages()).zip(pages).map(|(number, page)| (number, data_of(page)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{HeapRam, RamLayout, RamRegion, tracker::TrackerError};

    /// A [`Rearm`] that records the ranges that are re-armed.
    #[derive(Default)]
    pub(crate) struct Noted(pub(crate) Mutex<Vec<PageRange>>);

    impl Rearm for Noted {
        fn before_read(&self, range: PageRange, _: &PageSet) -> Result<(), TrackerError> {
            self.0.lock().unwrap().push(range);
            Ok(())
        }
    }

    /// Two regions. Every third page is zero; the last byte of the other pages identifies the page.
    fn ram() -> HeapRam {
        let regions = vec![RamRegion { gpa: 0, len: 700 << 12 }, RamRegion { gpa: 1 << 40, len: 20 << 12 }];
        let ram = HeapRam::new(RamLayout::new(regions).unwrap()).unwrap();
        for page in (0..720).filter(|page| page % 3 != 0) {
            let slice = ram.slice(PageRange::new(page, 1)).unwrap();
            slice.skip(PAGE_SIZE - 1).copy_from(&[mark(page)]);
        }
        ram
    }

    fn mark(page: u64) -> u8 {
        if page.is_multiple_of(3) { 0 } else { page as u8 | 1 }
    }

    #[test]
    fn copies_hold_what_was_taken_with_room_or_without() {
        let ram = ram();
        let (mut first, mut second) = (PageSet::empty(720), PageSet::empty(720));
        for range in [PageRange::new(3, 600), PageRange::new(690, 20)] {
            first.insert_range(range);
        }
        second.insert(719);
        let want: Vec<u64> = first.iter().chain(second.iter()).collect();
        for room in [0, 5, want.len() as u64, 1000] {
            let (mut copied, noted) = (Copied::with_room(room), Noted::default());
            // All of the room is touched.
            assert!(copied.data.len() == room as usize * PAGE_SIZE && copied.data.iter().all(|&byte| byte == 1));
            copied.take(&ram, &first, Some(&noted)).unwrap();
            copied.take(&ram, &second, None).unwrap();
            assert!(noted.0.into_inner().unwrap().into_iter().eq(first.ranges()));

            let pieces: Vec<_> = copied.pieces().collect();
            assert!(pieces.iter().flat_map(|(range, _)| range.pages()).eq(want.iter().copied()));
            for (range, data) in &pieces {
                assert!(range.count <= PIECE_PAGES && data.len() == range.count as usize * PAGE_SIZE);
                let last = data.chunks(PAGE_SIZE).map(|page| page[PAGE_SIZE - 1]);
                assert!(last.eq(range.pages().map(mark)), "{range:?}");
            }
            // Runs are cut at 256 pages, and at the border of the regions.
            assert!(pieces.iter().map(|(range, _)| range.count).eq([256, 256, 88, 10, 10, 1]));

            let pages: Vec<_> = copied.pages().collect();
            assert!(pages.iter().map(|&(page, _)| page).eq(want.iter().copied()));
            for (page, data) in pages {
                assert_eq!(data.map_or(0, |data| data[PAGE_SIZE - 1]), mark(page), "page {page}");
                assert_eq!(data.is_none(), mark(page) == 0, "page {page}");
            }
        }
    }

    #[test]
    fn pages_are_re_armed_before_they_are_put() {
        let (ram, noted, mut got) = (ram(), Noted::default(), Vec::new());
        let mut pages = PageSet::empty(720);
        [1, 5, 6, 100, 719].into_iter().for_each(|page| _ = pages.insert(page));
        let range = PageRange::new(5, 95);
        put(&ram, range, &pages, Some(&noted), &mut |page, data| {
            assert_eq!(*noted.0.lock().unwrap(), [range]);
            got.push((page, data.map(|data| data[PAGE_SIZE - 1])));
            Ok(())
        })
        .unwrap();
        assert_eq!(got, [(5, Some(5)), (6, None)]);
        let full = put(&ram, range, &pages, None, &mut |_, _| Err(io::ErrorKind::StorageFull.into()));
        assert!(matches!(full, Err(MigrationError::Store { .. })));
    }
}
