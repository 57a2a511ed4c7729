//! Memory beside guest RAM, in which contents are assembled.

use std::{
    collections::BTreeMap,
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use migration_core::{
    GuestRam, PageRange, RamLayout, RamRegion, RamSlice,
    patience::{Holder, PATIENCE, StillHeld, wait_until},
};

use crate::ram::{Backing, HUGE_PAGE_SIZE, MappedRam};

/// Buffers kept for reuse, 2 MiB each: as many as lanes usually install at once.
const KEPT: usize = 8;

/// Maps a new buffer.
type MapBuffer = dyn Fn() -> io::Result<MappedRam> + Send + Sync;

/// A pool of [`Staging`] buffers. It maps another one when none is free, and waits for one only if
/// the process has run out of memory or descriptors. The first one is mapped beforehand, so that a
/// page can always be installed.
pub(super) struct Pool {
    map: Box<MapBuffer>,
    /// The longest wait for a buffer of another thread.
    patience: Duration,
    /// Held for moving buffers only, never while memory is mapped or unmapped.
    buffers: Mutex<Buffers>,
    returned: Condvar,
}

#[derive(Default)]
struct Buffers {
    free: Vec<MappedRam>,
    /// Those in use, by the number of their use.
    used: BTreeMap<u64, Holder>,
    /// Number of the next use.
    next: u64,
}

impl Buffers {
    fn hold(&mut self, pages: PageRange) -> u64 {
        let number = self.next;
        self.next += 1;
        self.used.insert(number, Holder::this_thread(pages));
        number
    }
}

impl Pool {
    /// Of transparent huge pages if `huge` and the kernel can.
    pub(super) fn new(huge: bool) -> Self {
        let backing = if huge { Backing::TransparentHuge } else { Backing::Anonymous };
        Self::of(Box::new(move || map(backing)), PATIENCE)
    }

    fn of(map: Box<MapBuffer>, patience: Duration) -> Self {
        // without it the first one that is taken says why
        let buffers = Buffers { free: map().into_iter().collect(), ..Buffers::default() };
        Self { map, patience, buffers: Mutex::new(buffers), returned: Condvar::new() }
    }

    /// Returns a buffer for the calling thread, which is about to install `pages`.
    ///
    /// # Errors
    /// When no buffer can be mapped, and none is in use that would come back; or, of kind
    /// `TimedOut`, when none came back in time: the error names the threads that have them.
    pub(super) fn take(&self, pages: PageRange) -> io::Result<Staging<'_>> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(buffer) = self.take_free(pages) {
                return Ok(buffer);
            }
            let error = match (self.map)() {
                Ok(buffer) => {
                    let number = self.lock().hold(pages);
                    return Ok(Staging { pool: self, number, buffer: Some(buffer) });
                }
                Err(error) => error,
            };
            let buffers = self.lock();
            // one may have come back while this thread tried to map another one
            if !buffers.free.is_empty() {
                continue;
            }
            if buffers.used.is_empty() {
                return Err(error);
            }
            if wait_until(&self.returned, buffers, deadline).is_none() {
                let buffers = self.lock();
                let held = StillHeld::new("a buffer", pages, self.patience, buffers.used.values(), Some(error));
                return Err(io::Error::new(io::ErrorKind::TimedOut, held));
            }
        }
    }

    fn take_free(&self, pages: PageRange) -> Option<Staging<'_>> {
        let mut buffers = self.lock();
        let buffer = buffers.free.pop()?;
        let number = buffers.hold(pages);
        Some(Staging { pool: self, number, buffer: Some(buffer) })
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn map(backing: Backing) -> io::Result<MappedRam> {
    let whole = RamRegion { gpa: 0, len: HUGE_PAGE_SIZE };
    let layout = RamLayout::new(vec![whole]).map_err(io::Error::other)?;
    MappedRam::new(layout, backing).map_err(io::Error::other)
}

/// 2 MiB of private memory that belong to one thread, aligned to 2 MiB.
pub(super) struct Staging<'a> {
    pool: &'a Pool,
    /// Of this use of the buffer.
    number: u64,
    /// `None` only while it is dropped.
    buffer: Option<MappedRam>,
}

impl Staging<'_> {
    /// The memory of `range`, as page numbers of the buffer.
    pub(super) fn slice(&self, range: PageRange) -> io::Result<RamSlice<'_>> {
        let ram = self.buffer.as_ref().ok_or(io::ErrorKind::NotFound)?;
        ram.slice(range).map_err(io::Error::other)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        let mut buffers = self.pool.lock();
        buffers.used.remove(&self.number);
        if buffers.free.len() < KEPT {
            buffers.free.extend(self.buffer.take());
        }
        drop(buffers);
        // one that is not kept is unmapped when this returns, after the lock was let go
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        error::Error as _,
        sync::{
            Arc, OnceLock, Weak,
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        thread,
    };

    use super::*;

    const PAGES: PageRange = PageRange { first: 512, count: 7 };

    fn no_memory() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOMEM)
    }

    /// Maps one buffer, and fails after that.
    fn only_one() -> Box<MapBuffer> {
        let mapped = AtomicUsize::new(0);
        Box::new(move || match mapped.fetch_add(1, Ordering::SeqCst) {
            0 => map(Backing::Anonymous),
            _ => Err(no_memory()),
        })
    }

    #[test]
    fn memory_is_mapped_while_others_can_take_and_return_buffers() {
        let itself = Arc::new(OnceLock::<Weak<Pool>>::new());
        let mapped = Arc::new(AtomicUsize::new(0));
        let (pool, count) = (itself.clone(), mapped.clone());
        let map = move || {
            if let Some(pool) = pool.get().and_then(Weak::upgrade) {
                assert!(pool.buffers.try_lock().is_ok(), "the pool is locked while memory is mapped");
                count.fetch_add(1, Ordering::SeqCst);
            }
            map(Backing::Anonymous)
        };
        let pool = Arc::new(Pool::of(Box::new(map), PATIENCE));
        itself.set(Arc::downgrade(&pool)).unwrap();
        let first = pool.take(PAGES).unwrap();
        let second = pool.take(PAGES).unwrap();
        drop((first, second));
        assert_eq!(mapped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_wait_for_a_buffer_ends_and_names_who_has_it() {
        let pool = Pool::of(only_one(), Duration::from_millis(1));
        let holder = thread::Builder::new().name("mig-lane-3".into());
        thread::scope(|scope| {
            let (taken, is_taken) = mpsc::channel();
            let (done, is_done) = mpsc::channel::<()>();
            let pool = &pool;
            let hold = move || {
                let _buffer = pool.take(PAGES).unwrap();
                taken.send(()).unwrap();
                let _ = is_done.recv();
            };
            holder.spawn_scoped(scope, hold).unwrap();
            is_taken.recv().unwrap();
            let error = pool.take(PageRange::new(0, 1)).err().unwrap();
            drop(done);
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let text = error.to_string();
            assert!(text.contains("mig-lane-3 has had one for pages 512+7"), "{text}");
            assert!(text.starts_with("pages 0+1: a buffer"), "{text}");
            let cause = error.source().unwrap().to_string();
            assert!(!text.contains(&cause), "{text} repeats {cause}");
        });
        // and nothing of the wait is left
        assert!(pool.take(PAGES).is_ok());
    }

    #[test]
    fn a_buffer_that_comes_back_ends_the_wait_of_another_thread() {
        let pool = Pool::of(only_one(), PATIENCE);
        let first = pool.take(PAGES).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| pool.take(PAGES).is_ok());
            drop(first);
            assert!(second.join().unwrap());
        });
    }

    #[test]
    fn without_any_buffer_the_error_says_so_at_once() {
        let pool = Pool::of(Box::new(|| Err(no_memory())), PATIENCE);
        let error = pool.take(PAGES).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn some_buffers_are_kept_and_each_use_is_recorded() {
        let pool = Pool::new(false);
        let counts = || {
            let buffers = pool.lock();
            (buffers.used.len(), buffers.free.len())
        };
        let mut all: Vec<_> = (0..KEPT + 2).map(|_| pool.take(PAGES).unwrap()).collect();
        assert_eq!(counts(), (KEPT + 2, 0));
        drop(all.remove(1));
        assert_eq!(counts(), (KEPT + 1, 1));
        drop(all);
        assert_eq!(counts(), (0, KEPT));
    }
}
