//! Pages that do not go to a lane: into a store while the guest runs, or into memory while it stands still.

use std::io;

use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    checkpoint::PageData,
    ram::GuestRam,
    report::{Event, Observer},
    tracker::Rearm,
    vm::SourceVm,
};

/// Pages of a piece of a copy: as many as one frame takes.
const PIECE_PAGES: u64 = 256;

/// The pages that may hold something else than zeros. Asked after tracking has started: a page that is touched later is dirty.
pub(super) fn populated(ram: &dyn GuestRam, observer: &dyn Observer) -> PageSet {
    let mut pages = PageSet::empty(ram.layout().pages());
    if let Err(error) = ram.populated(&mut pages) {
        observer.event(&Event::Warning(format!("holes are not known, all of RAM is sent: {error}")));
        pages = PageSet::full(pages.capacity());
    }
    pages
}

/// The pages that are free now, if that is known. When to ask: see [`SourceVm::free_pages`].
pub(super) fn free(vm: &mut dyn SourceVm, pages: u64, observer: &dyn Observer) -> PageSet {
    let mut free = PageSet::empty(pages);
    if let Err(error) = vm.free_pages(&mut free) {
        let why = format!("free pages are not known, they are sent like others: {error}");
        observer.event(&Event::Warning(why));
        free.clear();
    }
    free
}

/// Puts those of `pages` that lie in `range` into a store. `rearm` is the tracker's, `None` if the guest is paused: it
/// writes nothing then.
pub(super) fn put(
    ram: &dyn GuestRam,
    range: PageRange,
    pages: &PageSet,
    rearm: Option<&dyn Rearm>,
    put: &mut dyn FnMut(u64, PageData<'_>) -> io::Result<()>,
) -> Result<(), MigrationError> {
    if let Some(rearm) = rearm {
        rearm.before_read(range, pages)?;
    }
    let mut page = [0; PAGE_SIZE];
    for number in pages.ranges_in(range).flat_map(PageRange::pages) {
        // into a copy first: the guest may write between two looks
        ram.slice(PageRange::new(number, 1))?.copy_to(&mut page);
        put(number, data_of(&page)).map_err(not_put)?;
    }
    Ok(())
}

pub(super) fn not_put(cause: io::Error) -> MigrationError {
    MigrationError::Store { step: "putting pages into the store", cause }
}

fn data_of(page: &[u8; PAGE_SIZE]) -> PageData<'_> {
    page.iter().any(|&byte| byte != 0).then_some(page)
}

/// Pages as they were at one moment.
#[derive(Default)]
pub(super) struct Copied {
    ranges: Vec<PageRange>,
    /// What was copied, and room for more.
    data: Vec<u8>,
    len: usize,
}

impl Copied {
    /// With room for so many pages, which has been touched: in a pause there is no time for page faults.
    pub(super) fn with_room(pages: u64) -> Self {
        // zeros would not be touched
        Self { data: vec![1; pages as usize * PAGE_SIZE], ..Self::default() }
    }

    /// Copies `pages` of a guest that is paused.
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

    /// Ranges of at most 1 MiB and their data.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (PageRange, &[u8])> {
        let mut rest = &self.data[..];
        self.ranges.iter().map(move |&range| {
            let (data, behind) = rest.split_at(range.count as usize * PAGE_SIZE);
            rest = behind;
            (range, data)
        })
    }

    /// The pages one by one, as a store takes them.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u64, PageData<'_>)> {
        let (pages, _) = self.data.as_chunks::<PAGE_SIZE>();
        self.ranges.iter().flat_map(|range| range.pages()).zip(pages).map(|(number, page)| (number, data_of(page)))
    }
}
