//! Finds referenced pages with the kernel's idle page tracking.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    ptr,
    sync::Arc,
};

use migration_core::{GuestRam, PAGE_SHIFT, PageSet};

/// The file with a bit for each page frame. A user sets the bit to mark the frame idle. The kernel
/// clears it when it finds that the frame was referenced.
const BITMAP: &str = "sys/kernel/mm/page_idle/bitmap";
/// The file with a 64-bit entry for each page of this process.
const PAGEMAP: &str = "proc/self/pagemap";
/// The file with 64 bits of flags for each page frame.
const FLAGS: &str = "proc/kpageflags";

/// In an entry of the page map: whether the page is in memory, and the number of its frame.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Frame flag: the frame is on an LRU list of reclaimable memory. Other frames cannot be marked
/// idle.
const LRU: u64 = 1 << 5;
/// Frame flag: the frame is part of a larger page, but not its first frame.
const COMPOUND_TAIL: u64 = 1 << 16;

/// The number of page frames in a word of the bitmap.
const WORD: u64 = u64::BITS as u64;
/// The number of pages that are looked up at once: 128 MiB of RAM, for which the buffers take three
/// quarters of a MiB.
const PIECE: u64 = 1 << 15;

/// Finds the pages of guest RAM that were referenced (read or written) since the object was made.
/// For [`SourceVm::referenced_pages`](migration_core::vm::SourceVm::referenced_pages).
///
/// References by devices and by this process count like those by vCPUs, so ask before pages are
/// sent. Pages that came into memory meanwhile count, too. A page is missed if it is not mapped in
/// this process (a page of a memory file that only another process uses). It may also be missed if
/// the processor had its translation cached all the time.
///
/// For a page larger than 4 KiB, such as a transparent huge page, the kernel keeps a single mark,
/// so all of it counts as referenced or none. If only the end of such a page is RAM, it does not
/// count as referenced. hugetlb pages have no mark and are never reported.
///
/// The kernel must have idle page tracking (CONFIG_IDLE_PAGE_TRACKING), and the process needs root
/// and CAP_SYS_ADMIN. The marks belong to the whole host: two users of them disturb each other.
///
/// For scattered pages of 4 KiB, marking takes about 50 ms per GiB and reading the marks 80 to 120
/// ms per GiB; for huge pages a quarter of that. The kernel needs additional time to check all
/// mappings of a page, which has not been measured.
pub struct IdlePages {
    ram: Arc<dyn GuestRam>,
    files: Files,
}

impl IdlePages {
    /// Checks whether the kernel has idle page tracking and this process may use it.
    ///
    /// # Errors
    /// Returns the reason why it cannot be used.
    pub fn offered() -> io::Result<()> {
        let here = 0u8;
        Files::open(Path::new("/"))?.frames(ptr::from_ref(&here) as u64 >> PAGE_SHIFT, 1, 0).map(drop)
    }

    /// Marks all pages of `ram` as idle.
    ///
    /// # Errors
    /// Fails like [`offered`](Self::offered), or if the kernel refuses a mark. Some pages may then
    /// stay marked, which does no harm.
    pub fn watch(ram: Arc<dyn GuestRam>) -> io::Result<Self> {
        Self::watch_by(Path::new("/"), ram)
    }

    /// Marks all pages of `ram` as idle, like [`watch`](Self::watch), with the kernel's files under
    /// `root`.
    fn watch_by(root: &Path, ram: Arc<dyn GuestRam>) -> io::Result<Self> {
        let this = Self { ram, files: Files::open(root)? };
        // other bits of a word are zero here, and the kernel ignores zeros and the inner frames of
        // larger pages
        this.each_word(|word, frames| {
            this.files
                .bitmap
                .write_all_at(&bits(frames).to_ne_bytes(), word * 8)
                .map_err(failed("marking pages as idle"))
        })?;
        Ok(this)
    }

    /// Adds to `into` the pages that are not idle any more. Pages stay reported in later calls.
    ///
    /// # Errors
    /// Fails if the kernel refuses to return the marks. `into` may then have some of the pages.
    pub fn referenced(&self, into: &mut PageSet) -> io::Result<()> {
        let mut last = (0, false);
        self.each_word(|word, frames| {
            let mut idle = [0; 8];
            self.files.bitmap.read_exact_at(&mut idle, word * 8).map_err(failed("looking for idle pages"))?;
            let busy = bits(frames) & !u64::from_ne_bytes(idle);
            if busy == 0 {
                return Ok(());
            }
            let (first, end) = (frames[0].0, frames[frames.len() - 1].0 + 1);
            let flags = &mut [0; WORD as usize * 8][..(end - first) as usize * 8];
            self.files.flags.read_exact_at(flags, first * 8).map_err(failed("reading page flags"))?;
            let (flags, _) = flags.as_chunks();
            for &(frame, page) in frames {
                let flags = u64::from_ne_bytes(flags[(frame - first) as usize]);
                let referenced = if flags & COMPOUND_TAIL == 0 {
                    flags & LRU != 0 && busy >> (frame % WORD) & 1 != 0
                } else {
                    // counts like the first frame of its page, if all frames between them are RAM
                    last == (frame - 1, true)
                };
                if referenced {
                    into.insert(page);
                }
                last = (frame, referenced);
            }
            Ok(())
        })
    }

    /// Calls `look` for every word of the bitmap that has frames of RAM. `look` gets the number of
    /// the word, and the frames in it with their page numbers in ascending order of frames.
    fn each_word(&self, mut look: impl FnMut(u64, &[(u64, u64)]) -> io::Result<()>) -> io::Result<()> {
        let layout = self.ram.layout();
        for index in 0..layout.regions().len() {
            let Some(pages) = layout.region_pages(index) else { continue };
            let host = self.ram.host_address(index).as_ptr() as u64 >> PAGE_SHIFT;
            let mut at = 0;
            while at < pages.count {
                // up to an address that no huge page crosses
                let count = (PIECE - (host + at) % PIECE).min(pages.count - at);
                let frames = self.files.frames(host + at, count, pages.first + at)?;
                let mut words = frames.chunk_by(|a, b| a.0 / WORD == b.0 / WORD);
                words.try_for_each(|frames| look(frames[0].0 / WORD, frames))?;
                at += count;
            }
        }
        Ok(())
    }
}

struct Files {
    bitmap: File,
    pagemap: File,
    flags: File,
}

impl Files {
    fn open(root: &Path) -> io::Result<Self> {
        let mounted = root.join("proc/self").exists() && root.join("sys/kernel").exists();
        let open = |file: &str, writes: bool| {
            OpenOptions::new().read(true).write(writes).open(root.join(file)).map_err(|error| {
                let why = match error.kind() {
                    io::ErrorKind::NotFound if !mounted => "/proc or /sys is not mounted".into(),
                    io::ErrorKind::NotFound => "the kernel lacks it (CONFIG_IDLE_PAGE_TRACKING)".into(),
                    io::ErrorKind::PermissionDenied => "it needs root and CAP_SYS_ADMIN".into(),
                    _ => error.to_string(),
                };
                io::Error::new(error.kind(), format!("/{file}: {why}"))
            })
        };
        Ok(Self { bitmap: open(BITMAP, true)?, pagemap: open(PAGEMAP, false)?, flags: open(FLAGS, false)? })
    }

    /// Returns the frames of those pages that are in memory, each with its page number in RAM, in
    /// ascending order of frames. The pages are `count` pages of this process from number `host`
    /// on; the page number of the first one is `page`.
    fn frames(&self, host: u64, count: u64, page: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut bytes = vec![0; count as usize * 8];
        self.pagemap.read_exact_at(&mut bytes, host * 8).map_err(failed("reading the page map"))?;
        let entries = bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry));
        let present = entries.zip(page..).filter(|(entry, _)| entry & PRESENT != 0);
        let mut frames: Vec<_> = present.map(|(entry, page)| (entry & FRAME, page)).collect();
        frames.sort_unstable();
        if frames.first().is_some_and(|(frame, _)| *frame == 0) {
            // no process has frame 0, so the kernel hides the numbers
            let hidden = io::Error::new(io::ErrorKind::PermissionDenied, "the kernel hides them without CAP_SYS_ADMIN");
            return Err(failed("page frames")(hidden));
        }
        Ok(frames)
    }
}

/// Returns a mask with the bits of these frames, which must be in one word of the bitmap.
fn bits(frames: &[(u64, u64)]) -> u64 {
    frames.iter().fold(0, |bits, (frame, _)| bits | 1 << (frame % WORD))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use migration_core::{PAGE_SIZE, PageRange, RamLayout, RamRegion};
    use tempfile::TempDir;

    use super::*;
    use crate::ram::{Backing, MappedRam};

    /// The number of page frames of the simulated host.
    const FRAMES: u64 = 2048;

    /// Files with the kernel's formats, and RAM in regions of 200 and 100 pages.
    struct Kernel {
        root: TempDir,
        ram: Arc<MappedRam>,
    }

    impl Kernel {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for (file, bytes) in [(BITMAP, FRAMES / 8), (FLAGS, FRAMES * 8)] {
                let path = root.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, vec![0; bytes as usize]).unwrap();
            }
            fs::create_dir_all(root.path().join("proc/self")).unwrap();
            fs::write(root.path().join(PAGEMAP), []).unwrap();
            let regions = vec![RamRegion { gpa: 0, len: 200 << 12 }, RamRegion { gpa: 1 << 30, len: 100 << 12 }];
            let ram = MappedRam::new(RamLayout::new(regions).unwrap(), Backing::Anonymous).unwrap();
            let this = Self { root, ram: Arc::new(ram) };
            (0..300).for_each(|page| this.entry(page, 1 << 62));
            this
        }

        fn word(&self, file: &str, word: u64, change: impl FnOnce(u64) -> u64) -> u64 {
            let path = self.root.path().join(file);
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut bytes = [0; 8];
            // reading beyond the end of the file leaves zeros
            let _ = file.read_at(&mut bytes, word * 8).unwrap();
            let value = change(u64::from_ne_bytes(bytes));
            file.write_all_at(&value.to_ne_bytes(), word * 8).unwrap();
            value
        }

        fn entry(&self, page: u64, entry: u64) {
            let (region, offset) = self.ram.layout().locate(page).unwrap();
            let host = self.ram.host_address(region).as_ptr() as u64 + offset;
            self.word(PAGEMAP, host >> PAGE_SHIFT, |_| entry);
        }

        /// Maps the page to this frame.
        fn map(&self, page: u64, frame: u64, flags: u64) {
            self.entry(page, PRESENT | 3 << 55 | frame);
            self.word(FLAGS, frame, |_| flags);
        }

        /// Marks the frame as not idle: it was referenced, or could not be marked.
        fn busy(&self, frame: u64) {
            self.word(BITMAP, frame / WORD, |word| word & !(1 << (frame % WORD)));
        }

        fn idle(&self) -> Vec<u64> {
            let words = |word| self.word(BITMAP, word, |bits| bits);
            (0..FRAMES).filter(|frame| words(frame / WORD) >> (frame % WORD) & 1 != 0).collect()
        }

        fn watch(&self) -> io::Result<IdlePages> {
            IdlePages::watch_by(self.root.path(), self.ram.clone())
        }
    }

    fn referenced(idle: &IdlePages) -> Vec<u64> {
        let mut pages = PageSet::empty(300);
        idle.referenced(&mut pages).unwrap();
        pages.iter().collect()
    }

    #[test]
    fn pages_that_were_referenced_are_reported() {
        let kernel = Kernel::new();
        // Frame 5 is like the zero page, which cannot be marked. Frame 69 has two pages. Frames of
        // the second region are in words of their own, because a plain file forgets earlier marks
        // in a word.
        for (page, frame) in [(0, 70), (1, 69), (7, 2047), (8, 5), (42, 69), (199, 63), (200, 128), (299, 1000)] {
            kernel.map(page, frame, if frame == 5 { 0 } else { LRU });
        }
        let idle = kernel.watch().unwrap();
        assert_eq!(kernel.idle(), [5, 63, 69, 70, 128, 1000, 2047]);
        [5, 69, 128].into_iter().for_each(|frame| kernel.busy(frame));
        assert_eq!(referenced(&idle), [1, 42, 200]);
        kernel.map(9, 71, LRU);
        kernel.entry(200, 0);
        assert_eq!(referenced(&idle), [1, 9, 42], "page 9 has come into memory, and page 200 has left it");
    }

    #[test]
    fn larger_pages_are_reported_as_a_whole() {
        let kernel = Kernel::new();
        // a page of 128 frames in three words of the bitmap, the end of another one, and 4 frames
        // that are not reclaimable
        let heads = [(10, 1024, 128, LRU), (202, 514, 2, LRU | COMPOUND_TAIL), (210, 600, 4, 0)];
        for (first, frame, count, head) in heads {
            for n in 0..count {
                let tail = head & LRU | COMPOUND_TAIL;
                kernel.map(first + n, frame + n, if n == 0 { head } else { tail });
            }
        }
        kernel.map(220, 1024 + 128, LRU);
        let idle = kernel.watch().unwrap();
        // the kernel marks only the first frames of reclaimable pages
        kernel.idle().into_iter().filter(|frame| ![1024, 1152].contains(frame)).for_each(|frame| kernel.busy(frame));
        assert!(referenced(&idle).is_empty());
        kernel.busy(1024);
        assert_eq!(referenced(&idle), (10..138).collect::<Vec<_>>());
    }

    #[test]
    fn errors_name_what_is_missing() {
        let why = |kernel: &Kernel| kernel.watch().err().unwrap().to_string();
        let kernel = Kernel::new();
        fs::remove_file(kernel.root.path().join(BITMAP)).unwrap();
        assert!(why(&kernel).ends_with("page_idle/bitmap: the kernel lacks it (CONFIG_IDLE_PAGE_TRACKING)"));
        // as in a jail without /sys
        fs::remove_dir_all(kernel.root.path().join("sys")).unwrap();
        assert!(why(&kernel).ends_with("page_idle/bitmap: /proc or /sys is not mounted"));
        let kernel = Kernel::new();
        kernel.map(3, 0, 0);
        assert!(why(&kernel).contains("CAP_SYS_ADMIN"));
        let kernel = Kernel::new();
        fs::write(kernel.root.path().join(PAGEMAP), [0; 64]).unwrap();
        assert!(why(&kernel).contains("reading the page map"));
        // a frame that cannot exist: the file system of the bitmap decides which step fails
        let kernel = Kernel::new();
        kernel.entry(3, PRESENT | FRAME);
        assert!(kernel.watch().and_then(|idle| idle.referenced(&mut PageSet::empty(300))).is_err());
    }

    /// Uses the real page map and flags with a simulated bitmap in which no frame is idle.
    #[test]
    fn the_kernels_own_page_map_is_read_correctly() {
        let kernel = Kernel::new();
        for file in [PAGEMAP, FLAGS] {
            let path = kernel.root.path().join(file);
            fs::remove_file(&path).unwrap();
            symlink(Path::new("/").join(file), path).unwrap();
        }
        for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd] {
            let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 32 << 20 }]).unwrap();
            let ram = Arc::new(MappedRam::new(layout, backing).unwrap());
            ram.prefault(ram.layout().all()).unwrap();
            let idle = match IdlePages::watch_by(kernel.root.path(), ram) {
                Ok(idle) => idle,
                Err(why) => return eprintln!("ignored: {why}"),
            };
            // as large as for a host with 4 TiB
            let bitmap = File::create(kernel.root.path().join(BITMAP)).unwrap();
            bitmap.set_len(1 << 27).unwrap();
            let mut pages = PageSet::empty(8192);
            idle.referenced(&mut pages).unwrap();
            // the last pages may not be on an LRU list yet
            assert!(pages.len() > 8000, "{backing}: {pages:?}");
        }
    }

    /// Uses the real idle page tracking where the kernel has it.
    #[test]
    fn idle_page_tracking_of_this_kernel_works() {
        if let Err(why) = IdlePages::offered() {
            return eprintln!("ignored: {why}");
        }
        // more pages than the processor has cached translations
        let (pages, touched) = (16_384, PageRange::new(100, 200));
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: pages << 12 }]).unwrap();
        let ram = Arc::new(MappedRam::new(layout, Backing::Anonymous).unwrap());
        ram.prefault(ram.layout().all()).unwrap();
        let idle = IdlePages::watch(ram.clone()).unwrap();
        ram.slice(touched).unwrap().copy_to(&mut vec![0; touched.count as usize * PAGE_SIZE]);
        let mut found = PageSet::empty(pages);
        idle.referenced(&mut found).unwrap();
        let hits = found.count_in(touched);
        assert!(hits > touched.count / 2 && found.len() - hits < pages / 10, "{hits} of {touched:?}: {found:?}");
    }
}
