//! Memory beside guest RAM, in which contents are assembled.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use migration_core::{GuestRam, PageRange, RamLayout, RamRegion, RamSlice};

use crate::ram::{Backing, HUGE_PAGE_SIZE, MappedRam};

/// Buffers kept for reuse, 2 MiB each: as many as lanes usually install at once.
const KEPT: usize = 8;

/// A pool of [`Staging`] buffers; it never waits for one, but maps another.
pub(super) struct Pool {
    backing: Backing,
    free: Mutex<Vec<MappedRam>>,
}

impl Pool {
    /// Of transparent huge pages if `huge` and the kernel can.
    pub(super) fn new(huge: bool) -> Self {
        let backing = if huge { Backing::TransparentHuge } else { Backing::Anonymous };
        Self { backing, free: Mutex::default() }
    }

    pub(super) fn take(&self) -> io::Result<Staging<'_>> {
        let kept = self.lock().pop();
        let buffer = match kept {
            Some(buffer) => buffer,
            None => {
                let whole = RamRegion { gpa: 0, len: HUGE_PAGE_SIZE };
                let layout = RamLayout::new(vec![whole]).map_err(io::Error::other)?;
                MappedRam::new(layout, self.backing).map_err(io::Error::other)?
            }
        };
        Ok(Staging { pool: self, buffer: Some(buffer) })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<MappedRam>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// 2 MiB of private memory that belong to one thread, aligned to 2 MiB.
pub(super) struct Staging<'a> {
    pool: &'a Pool,
    /// `None` only while it is dropped.
    buffer: Option<MappedRam>,
}

impl Staging<'_> {
    /// The memory of `range`, as page numbers of the buffer.
    pub(super) fn slice(&self, range: PageRange) -> io::Result<RamSlice<'_>> {
        let ram: &dyn GuestRam = self.buffer.as_ref().ok_or(io::ErrorKind::NotFound)?;
        ram.slice(range).map_err(io::Error::other)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        let mut free = self.pool.lock();
        if free.len() < KEPT {
            free.extend(self.buffer.take());
        }
    }
}
