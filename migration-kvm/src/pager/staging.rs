//! Memory beside guest RAM, in which contents are assembled.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use migration_core::{GuestRam, PageRange, RamLayout, RamRegion, RamSlice};

use crate::ram::{Backing, HUGE_PAGE_SIZE, MappedRam};

/// Buffers kept for reuse, 2 MiB each: as many as lanes usually install at once.
const KEPT: usize = 8;

/// A pool of [`Staging`] buffers. It maps another one when none is free, and waits for one only if the process has run out of
/// memory or descriptors. The first one is mapped beforehand, so that a page can always be installed.
pub(super) struct Pool {
    backing: Backing,
    buffers: Mutex<Buffers>,
    returned: Condvar,
}

#[derive(Default)]
struct Buffers {
    free: Vec<MappedRam>,
    /// How many are in use.
    used: usize,
}

impl Pool {
    /// Of transparent huge pages if `huge` and the kernel can.
    pub(super) fn new(huge: bool) -> Self {
        let backing = if huge { Backing::TransparentHuge } else { Backing::Anonymous };
        // without it the first one that is taken says why
        let buffers = Buffers { free: map(backing).into_iter().collect(), used: 0 };
        Self { backing, buffers: Mutex::new(buffers), returned: Condvar::new() }
    }

    /// A buffer for the calling thread.
    ///
    /// # Errors
    /// When no buffer can be mapped, and none is in use that would come back.
    pub(super) fn take(&self) -> io::Result<Staging<'_>> {
        let mut buffers = self.lock();
        while buffers.free.is_empty() {
            match map(self.backing) {
                Ok(buffer) => buffers.free.push(buffer),
                Err(error) if buffers.used == 0 => return Err(error),
                Err(_) => buffers = self.returned.wait(buffers).unwrap_or_else(PoisonError::into_inner),
            }
        }
        let buffer = buffers.free.pop();
        buffers.used += 1;
        Ok(Staging { pool: self, buffer })
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
        let mut buffers = self.pool.lock();
        buffers.used -= 1;
        if buffers.free.len() < KEPT {
            buffers.free.extend(self.buffer.take());
        }
        drop(buffers);
        self.pool.returned.notify_one();
    }
}
