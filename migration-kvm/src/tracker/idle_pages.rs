//! Which pages were referenced, by the kernel's idle page tracking.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    ptr,
    sync::Arc,
};

use migration_core::{GuestRam, PAGE_SHIFT, PageSet};

/// A bit for each page frame: set by us to mark it idle, cleared by the kernel when it finds that it was referenced.
const BITMAP: &str = "sys/kernel/mm/page_idle/bitmap";
/// A word for each page of this process.
const PAGEMAP: &str = "proc/self/pagemap";
/// A word for each page frame.
const FLAGS: &str = "proc/kpageflags";

/// In an entry of the page map: the page is in memory, and in which frame.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Among a frame's flags: it is on one of the lists of memory that can be reclaimed. Others cannot be marked.
const LRU: u64 = 1 << 5;
/// It is a part of a larger page, and not its first.
const COMPOUND_TAIL: u64 = 1 << 16;

/// Page frames in a word of the bitmap.
const WORD: u64 = u64::BITS as u64;
/// Pages that are looked up at once: 128 MiB of RAM, for which three quarters of a MiB are needed.
const PIECE: u64 = 1 << 15;

/// Tells which pages of guest RAM were referenced, read or written, since it was made. For
/// [`SourceVm::referenced_pages`](migration_core::vm::SourceVm::referenced_pages).
///
/// References of vCPUs count, and so do those of devices and of this process: ask before pages are sent. Also pages count that came
/// into memory meanwhile. A page is missed if it is not mapped here (a memory file's, which only another process uses), and
/// may be if the processor had its translation cached all the time.
///
/// Of a page that is larger than 4 KiB, such as a transparent huge page, the kernel keeps a single mark: all of it was referenced,
/// or nothing. If only its end is RAM, it does not count as referenced. hugetlb pages have no mark: of those nothing is told.
///
/// It needs idle page tracking in the kernel (CONFIG_IDLE_PAGE_TRACKING), root, and CAP_SYS_ADMIN. The marks are the machine's: two
/// users of them disturb each other.
///
/// Scattered pages of 4 KiB take some 50 ms a GiB to mark and 80 to 120 ms to ask for, huge pages a quarter of that; and the time in
/// which the kernel walks to all that map a page, which has not been measured.
pub struct IdlePages {
    ram: Arc<dyn GuestRam>,
    files: Files,
}

impl IdlePages {
    /// Whether this kernel has what is needed, and lets us use it.
    ///
    /// # Errors
    /// Why not.
    pub fn offered() -> io::Result<()> {
        let here = 0u8;
        Files::open(Path::new("/"))?.frames(ptr::from_ref(&here) as u64 >> PAGE_SHIFT, 1, 0).map(drop)
    }

    /// Marks all pages of `ram` as idle.
    ///
    /// # Errors
    /// As [`offered`](Self::offered), or when the kernel fails. Pages may stay marked; that harms nobody.
    pub fn watch(ram: Arc<dyn GuestRam>) -> io::Result<Self> {
        Self::watch_by(Path::new("/"), ram)
    }

    /// As [`watch`](Self::watch), by the kernel's files under `root`.
    fn watch_by(root: &Path, ram: Arc<dyn GuestRam>) -> io::Result<Self> {
        let this = Self { ram, files: Files::open(root)? };
        // others' bits, and those of the inner parts of larger pages, the kernel leaves alone
        this.each_word(|word, frames| {
            this.files
                .bitmap
                .write_all_at(&bits(frames).to_ne_bytes(), word * 8)
                .map_err(failed("marking pages as idle"))
        })?;
        Ok(this)
    }

    /// Adds to `into` the pages that are not idle any more. What it has told it tells again.
    ///
    /// # Errors
    /// When the kernel fails; `into` may have some of the pages then.
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
                    // as the first frame of the page, with which all others up to here came
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

    /// Calls `look` for words of the bitmap that are about RAM, with the word's number, and the frames in it with their page
    /// numbers, ascending by frame.
    fn each_word(&self, mut look: impl FnMut(u64, &[(u64, u64)]) -> io::Result<()>) -> io::Result<()> {
        let layout = self.ram.layout();
        for index in 0..layout.regions().len() {
            let Some(pages) = layout.region_pages(index) else { continue };
            let host = self.ram.host_address(index).as_ptr() as u64 >> PAGE_SHIFT;
            let mut at = 0;
            while at < pages.count {
                // up to a border that no huge page crosses
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

    /// Of `count` pages of this process from number `host` on, those that are in memory: the frame, and the page's number if the first
    /// one's is `page`; ascending by frame.
    fn frames(&self, host: u64, count: u64, page: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut bytes = vec![0; count as usize * 8];
        self.pagemap.read_exact_at(&mut bytes, host * 8).map_err(failed("reading the page map"))?;
        let entries = bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry));
        let present = entries.zip(page..).filter(|(entry, _)| entry & PRESENT != 0);
        let mut frames: Vec<_> = present.map(|(entry, page)| (entry & FRAME, page)).collect();
        frames.sort_unstable();
        if frames.first().is_some_and(|(frame, _)| *frame == 0) {
            // no process gets frame 0
            let hidden = io::Error::new(io::ErrorKind::PermissionDenied, "the kernel hides them without CAP_SYS_ADMIN");
            return Err(failed("page frames")(hidden));
        }
        Ok(frames)
    }
}

/// The bits of these frames, which are all in one word.
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

    /// Page frames of the made-up machine.
    const FRAMES: u64 = 2048;

    /// Files as the kernel has them, and RAM of 200 and 100 pages.
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
            // beyond the end there are zeros
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

        /// The page is in this frame.
        fn map(&self, page: u64, frame: u64, flags: u64) {
            self.entry(page, PRESENT | 3 << 55 | frame);
            self.word(FLAGS, frame, |_| flags);
        }

        /// The frame is not idle: it was referenced, or could not be marked.
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
    fn pages_that_were_touched_are_told() {
        let kernel = Kernel::new();
        // the page of zeros among them, which cannot be marked, and the same frame for two pages. Those of the second region are in words
        // of their own: a plain file forgets what was marked in a word before
        for (page, frame) in [(0, 70), (1, 69), (7, 2047), (8, 5), (42, 69), (199, 63), (200, 128), (299, 1000)] {
            kernel.map(page, frame, if frame == 5 { 0 } else { LRU });
        }
        let idle = kernel.watch().unwrap();
        assert_eq!(kernel.idle(), [5, 63, 69, 70, 128, 1000, 2047]);
        [5, 69, 128].into_iter().for_each(|frame| kernel.busy(frame));
        assert_eq!(referenced(&idle), [1, 42, 200]);
        kernel.map(9, 71, LRU);
        kernel.entry(200, 0);
        assert_eq!(referenced(&idle), [1, 9, 42], "one has come into memory, and one has gone");
    }

    #[test]
    fn larger_pages_are_told_whole() {
        let kernel = Kernel::new();
        // over three words of the bitmap, 128 pages; the end of another one; 4 pages out of the reserve
        let heads = [(10, 1024, 128, LRU), (202, 514, 2, LRU | COMPOUND_TAIL), (210, 600, 4, 0)];
        for (first, frame, count, head) in heads {
            for n in 0..count {
                let tail = head & LRU | COMPOUND_TAIL;
                kernel.map(first + n, frame + n, if n == 0 { head } else { tail });
            }
        }
        kernel.map(220, 1024 + 128, LRU);
        let idle = kernel.watch().unwrap();
        // the kernel marks first frames only, of pages that it can reclaim
        kernel.idle().into_iter().filter(|frame| ![1024, 1152].contains(frame)).for_each(|frame| kernel.busy(frame));
        assert!(referenced(&idle).is_empty());
        kernel.busy(1024);
        assert_eq!(referenced(&idle), (10..138).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_missing_is_named() {
        let why = |kernel: &Kernel| kernel.watch().err().unwrap().to_string();
        let kernel = Kernel::new();
        fs::remove_file(kernel.root.path().join(BITMAP)).unwrap();
        assert!(why(&kernel).ends_with("page_idle/bitmap: the kernel lacks it (CONFIG_IDLE_PAGE_TRACKING)"));
        // as in a jail
        fs::remove_dir_all(kernel.root.path().join("sys")).unwrap();
        assert!(why(&kernel).ends_with("page_idle/bitmap: /proc or /sys is not mounted"));
        let kernel = Kernel::new();
        kernel.map(3, 0, 0);
        assert!(why(&kernel).contains("CAP_SYS_ADMIN"));
        let kernel = Kernel::new();
        fs::write(kernel.root.path().join(PAGEMAP), [0; 64]).unwrap();
        assert!(why(&kernel).contains("reading the page map"));
        // a frame that there cannot be: it depends on the file system of the bitmap which step fails
        let kernel = Kernel::new();
        kernel.entry(3, PRESENT | FRAME);
        assert!(kernel.watch().and_then(|idle| idle.referenced(&mut PageSet::empty(300))).is_err());
    }

    /// The real page map and flags beside a made-up bitmap, in which no frame is idle.
    #[test]
    fn real_frames_are_understood() {
        let kernel = Kernel::new();
        for file in [PAGEMAP, FLAGS] {
            let path = kernel.root.path().join(file);
            fs::remove_file(&path).unwrap();
            symlink(Path::new("/").join(file), path).unwrap();
        }
        for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd] {
            let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 32 << 20 }]).unwrap();
            let ram = Arc::new(MappedRam::new(layout, backing).unwrap());
            ram.warm(ram.layout().all()).unwrap();
            let idle = match IdlePages::watch_by(kernel.root.path(), ram) {
                Ok(idle) => idle,
                Err(why) => return eprintln!("ignored: {why}"),
            };
            // of a machine with 4 TiB
            let bitmap = File::create(kernel.root.path().join(BITMAP)).unwrap();
            bitmap.set_len(1 << 27).unwrap();
            let mut pages = PageSet::empty(8192);
            idle.referenced(&mut pages).unwrap();
            // the last ones may not be on a list yet
            assert!(pages.len() > 8000, "{backing}: {pages:?}");
        }
    }

    /// A real kernel's word, where it has one.
    #[test]
    fn this_kernel_agrees() {
        if let Err(why) = IdlePages::offered() {
            return eprintln!("ignored: {why}");
        }
        // more than the processor keeps translations of
        let (pages, touched) = (16_384, PageRange::new(100, 200));
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: pages << 12 }]).unwrap();
        let ram = Arc::new(MappedRam::new(layout, Backing::Anonymous).unwrap());
        ram.warm(ram.layout().all()).unwrap();
        let idle = IdlePages::watch(ram.clone()).unwrap();
        let memory: &dyn GuestRam = &*ram;
        memory.slice(touched).unwrap().copy_to(&mut vec![0; touched.count as usize * PAGE_SIZE]);
        let mut found = PageSet::empty(pages);
        idle.referenced(&mut found).unwrap();
        let hits = found.count_in(touched);
        assert!(hits > touched.count / 2 && found.len() - hits < pages / 10, "{hits} of {touched:?}: {found:?}");
    }
}
