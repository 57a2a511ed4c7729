//! Dirty-page tracking: which pages were written since the last harvest.

use std::{
    error::Error,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    page::{PageRange, RamLayout},
    page_set::PageSet,
};

/// The error of a dirty tracker. The migration ends, and the guest continues at the source.
///
/// The displayed text does not include the cause. [`Chain`](crate::text::Chain) displays both.
#[derive(Debug)]
pub struct TrackerError {
    tracker: &'static str,
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl TrackerError {
    /// Returns an error of the tracker with this [name](DirtyTracker::name). `what` says what
    /// failed.
    pub fn new(tracker: &'static str, what: impl Into<String>) -> Self {
        Self { tracker, what: what.into(), cause: None }
    }

    /// Returns an error of the tracker with this name that was caused by `cause`.
    pub fn because(
        tracker: &'static str,
        what: impl Into<String>,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { tracker, what: what.into(), cause: Some(cause.into()) }
    }

    /// Returns the name of the tracker, see [`DirtyTracker::name`].
    pub fn tracker(&self) -> &'static str {
        self.tracker
    }
}

impl fmt::Display for TrackerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dirty tracker {}: {}", self.tracker, self.what)
    }
}

impl Error for TrackerError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as &(dyn Error + 'static))
    }
}

/// Reports the pages that were written by vCPUs, KVM, devices or the VMM.
///
/// Most VMs need several sources at once: see [`UnionTracker`].
///
/// A tracker may report pages that were not written, but must report all that were.
pub trait DirtyTracker: Send {
    /// Returns a short name, such as `dirty-log`.
    fn name(&self) -> &'static str;

    /// Returns whether writes are tracked now.
    fn is_active(&self) -> bool;

    /// Begins to track. Every write after the return is reported; earlier writes need not be. Does
    /// nothing if the tracker is active.
    fn start(&mut self) -> Result<(), TrackerError>;

    /// Ends tracking and forgets what was tracked, so that the guest runs at full speed. Does
    /// nothing if the tracker is not active.
    fn stop(&mut self) -> Result<(), TrackerError>;

    /// Adds all pages that were written since tracking started, or since the last harvest, to
    /// `into`. A write after this call is reported by the next one.
    ///
    /// A tracker with [`rearm`](DirtyTracker::rearm) reports a page in each harvest until the page
    /// is re-armed.
    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError>;

    /// Makes `pages` dirty again, so that the next harvest reports them. Used for pages that were
    /// harvested but did not arrive.
    fn mark_dirty(&mut self, pages: &PageSet);

    /// Returns the object that re-arms pages just before they are read, or `None` if a harvest
    /// re-arms at once. The later a page is re-armed, the fewer pages are sent twice.
    fn rearm(&self) -> Option<Arc<dyn Rearm>> {
        None
    }
}

/// Re-arms pages of a [`DirtyTracker`], from any thread.
pub trait Rearm: Send + Sync {
    /// Re-arms those pages of `pages` that lie in `range`, before they are read: later writes are
    /// reported again. `pages` was harvested. Other pages of the range must keep their state.
    fn before_read(&self, range: PageRange, pages: &PageSet) -> Result<(), TrackerError>;
}

/// A dirty bitmap that the VMM sets, for devices and threads of the VMM that write guest memory
/// without KVM's knowledge.
///
/// Give a clone of the `Arc` to each writer, and a [`BitmapTracker`] over it to the migration.
pub struct DirtyBitmap {
    layout: RamLayout,
    words: Vec<AtomicU64>,
}

impl DirtyBitmap {
    /// Returns a clean bitmap for RAM of this layout.
    pub fn new(layout: RamLayout) -> Arc<Self> {
        let words = (0..layout.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { layout, words })
    }

    /// Marks the pages of `len` bytes from guest physical address `gpa` as written. Call it *after*
    /// the write. Parts outside RAM are ignored.
    pub fn mark(&self, gpa: u64, len: u64) {
        let mut at = gpa & !0xfff;
        let end = gpa.saturating_add(len);
        while at < end {
            if let Some(page) = self.layout.page_of(at) {
                self.mark_page(page);
            }
            let Some(next) = at.checked_add(0x1000) else { break };
            at = next;
        }
    }

    /// Marks the page with this number as written.
    pub fn mark_page(&self, page: u64) {
        if let Some(word) = self.words.get((page / 64) as usize) {
            // Release: a thread that harvests the bit sees the write that came before it.
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    fn take(&self, into: &mut PageSet) {
        for (i, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::AcqRel);
                into.insert_bitmap(i as u64 * 64, 64, &[bits]);
            }
        }
    }
}

/// The [`DirtyTracker`] over a [`DirtyBitmap`]. Bits are set whether or not the tracker is active.
/// Starting the tracker clears them.
pub struct BitmapTracker {
    bitmap: Arc<DirtyBitmap>,
    active: bool,
}

impl BitmapTracker {
    /// Returns a tracker that harvests `bitmap`.
    pub fn new(bitmap: Arc<DirtyBitmap>) -> Self {
        Self { bitmap, active: false }
    }
}

impl DirtyTracker for BitmapTracker {
    fn name(&self) -> &'static str {
        "bitmap"
    }

    fn is_active(&self) -> bool {
        self.active
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        if !self.active {
            self.bitmap.take(&mut PageSet::empty(self.bitmap.layout.pages()));
            self.active = true;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        self.active = false;
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        self.bitmap.take(into);
        Ok(())
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        for page in pages.iter() {
            self.bitmap.mark_page(page);
        }
    }
}

/// Several trackers in one: a page is dirty if one of them reports it.
pub struct UnionTracker {
    name: &'static str,
    parts: Vec<Box<dyn DirtyTracker>>,
}

impl UnionTracker {
    /// Returns the union of `parts`. Its name is that of the first one, which should be the one
    /// that watches the vCPUs.
    pub fn new(parts: Vec<Box<dyn DirtyTracker>>) -> Self {
        Self { name: parts.first().map_or("none", |p| p.name()), parts }
    }
}

impl DirtyTracker for UnionTracker {
    fn name(&self) -> &'static str {
        self.name
    }

    fn is_active(&self) -> bool {
        self.parts.iter().any(|p| p.is_active())
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        let mut started = Ok(());
        for part in &mut self.parts {
            started = part.start();
            if started.is_err() {
                break;
            }
        }
        if started.is_err() {
            // if one part does not start, the others are stopped again, and the first error is
            // returned
            let _ = self.stop();
        }
        started
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        // every part is stopped; the first failure is returned
        self.parts.iter_mut().map(|p| p.stop()).fold(Ok(()), Result::and)
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        self.parts.iter_mut().try_for_each(|p| p.harvest(into))
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        // one part is enough, because the union reports the page then
        if let Some(first) = self.parts.first_mut() {
            first.mark_dirty(pages);
        }
    }

    fn rearm(&self) -> Option<Arc<dyn Rearm>> {
        let mut parts: Vec<_> = self.parts.iter().filter_map(|p| p.rearm()).collect();
        match parts.len() {
            0 | 1 => parts.pop(),
            _ => Some(Arc::new(RearmAll(parts))),
        }
    }
}

struct RearmAll(Vec<Arc<dyn Rearm>>);

impl Rearm for RearmAll {
    fn before_read(&self, range: PageRange, pages: &PageSet) -> Result<(), TrackerError> {
        self.0.iter().try_for_each(|r| r.before_read(range, pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::RamRegion;

    #[test]
    fn union_reports_what_any_part_saw() {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }]).unwrap();
        let (a, b) = (DirtyBitmap::new(layout.clone()), DirtyBitmap::new(layout.clone()));
        a.mark(0, 1);
        let mut union =
            UnionTracker::new(vec![Box::new(BitmapTracker::new(a.clone())), Box::new(BitmapTracker::new(b.clone()))]);
        assert_eq!(union.name(), "bitmap");
        union.start().unwrap();
        a.mark(0x1fff, 2);
        b.mark(0x5000, 0x1001);
        b.mark(u64::MAX - 1, 5);
        let mut dirty = PageSet::empty(256);
        union.harvest(&mut dirty).unwrap();
        assert!(dirty.iter().eq([1, 2, 5, 6]), "{dirty:?}");
        let mut again = PageSet::empty(256);
        union.mark_dirty(&dirty);
        union.harvest(&mut again).unwrap();
        assert_eq!(again, dirty);
        again.clear();
        union.harvest(&mut again).unwrap();
        assert!(again.is_empty());
    }

    #[test]
    fn a_write_marks_the_pages_that_it_touches() {
        let layout =
            RamLayout::new(vec![RamRegion { gpa: 0, len: 4 << 12 }, RamRegion { gpa: 1 << 32, len: 2 << 12 }]).unwrap();
        let bitmap = DirtyBitmap::new(layout);
        for (gpa, len, pages) in [
            (0x1000, 0x1000, &[1][..]),
            (0x1000, 0, &[]),
            (0x1fff, 1, &[1]),
            (0x1fff, 2, &[1, 2]),
            (0x3000, 0x2000, &[3]),
            ((1 << 32) - 1, 0x1002, &[4, 5]),
        ] {
            bitmap.mark(gpa, len);
            let mut dirty = PageSet::empty(6);
            bitmap.take(&mut dirty);
            assert!(dirty.iter().eq(pages.iter().copied()), "{gpa:#x} {len:#x}: {dirty:?}");
        }
    }

    /// A tracker that records its calls and can fail to start.
    struct Noted {
        fails: bool,
        active: Arc<AtomicU64>,
        rearmed: Option<Arc<AtomicU64>>,
    }

    impl DirtyTracker for Noted {
        fn name(&self) -> &'static str {
            "noted"
        }

        fn is_active(&self) -> bool {
            self.active.load(Ordering::Relaxed) != 0
        }

        fn start(&mut self) -> Result<(), TrackerError> {
            if self.fails {
                return Err(TrackerError::new("noted", "does not start"));
            }
            self.active.store(1, Ordering::Relaxed);
            Ok(())
        }

        fn stop(&mut self) -> Result<(), TrackerError> {
            self.active.store(0, Ordering::Relaxed);
            if self.fails { Err(TrackerError::new("noted", "does not stop")) } else { Ok(()) }
        }

        fn harvest(&mut self, _: &mut PageSet) -> Result<(), TrackerError> {
            Ok(())
        }

        fn mark_dirty(&mut self, _: &PageSet) {}

        fn rearm(&self) -> Option<Arc<dyn Rearm>> {
            self.rearmed.clone().map(|count| Arc::new(Counted(count)) as _)
        }
    }

    struct Counted(Arc<AtomicU64>);

    impl Rearm for Counted {
        fn before_read(&self, range: PageRange, _: &PageSet) -> Result<(), TrackerError> {
            self.0.fetch_add(range.count, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn a_union_starts_stops_and_re_arms_all_of_its_parts() {
        let (active, rearmed) = ([(); 3].map(|()| Arc::default()), [(); 2].map(|()| Arc::<AtomicU64>::default()));
        let part = |index: usize, fails| {
            let rearmed = rearmed.get(index).cloned();
            Box::new(Noted { fails, active: Arc::clone(&active[index]), rearmed }) as Box<dyn DirtyTracker>
        };
        let on = || active.each_ref().map(|a: &Arc<AtomicU64>| a.load(Ordering::Relaxed));
        let mut union = UnionTracker::new(vec![part(0, false), part(1, false), part(2, false)]);
        assert_eq!(union.name(), "noted");
        assert!(!union.is_active());
        union.start().unwrap();
        assert_eq!((union.is_active(), on()), (true, [1; 3]));
        union.rearm().unwrap().before_read(PageRange::new(4, 3), &PageSet::full(9)).unwrap();
        assert_eq!(rearmed.each_ref().map(|r| r.load(Ordering::Relaxed)), [3, 3]);
        union.stop().unwrap();
        assert_eq!((union.is_active(), on()), (false, [0; 3]));

        assert!(UnionTracker::new(vec![part(2, false)]).rearm().is_none());
        let one = UnionTracker::new(vec![part(0, false), part(2, false)]).rearm().unwrap();
        one.before_read(PageRange::new(4, 1), &PageSet::full(9)).unwrap();
        assert_eq!(rearmed.each_ref().map(|r| r.load(Ordering::Relaxed)), [4, 3]);

        // the part that did start is stopped, and the first error is returned
        let mut union = UnionTracker::new(vec![part(0, false), part(1, true), part(2, false)]);
        assert_eq!(union.start().unwrap_err().what, "does not start");
        assert_eq!(on(), [0; 3]);
        assert_eq!(union.stop().unwrap_err().what, "does not stop");
    }
}
