//! What is asked of the kernel for a range of pages, for RAM of any kind.

use std::os::fd::BorrowedFd;

use migration_core::{GuestRam, PageRange, RamLayout};

use super::{
    Backing, RamError,
    map::{self, Advice},
};

/// The memory file of a region.
pub(super) struct RegionFile<'a> {
    pub(super) file: BorrowedFd<'a>,
    /// The byte of the file at which the region begins.
    pub(super) offset: u64,
}

/// Gives the kernel advice about the memory of `range`. `what` names that in errors.
pub(super) fn advise(ram: &dyn GuestRam, range: PageRange, advice: Advice, what: &'static str) -> Result<(), RamError> {
    check(ram.layout(), range)?;
    for (_, _, piece) in ram.layout().split(range) {
        let slice = ram.slice(piece).map_err(|_| outside(range))?;
        map::advise(slice, advice).map_err(RamError::system(what))?;
    }
    Ok(())
}

/// Frees the memory of `range`, which then reads as zeros. `file` returns the memory file of a region
/// of shared memory.
pub(super) fn discard<'a>(
    ram: &dyn GuestRam,
    backing: Backing,
    range: PageRange,
    file: impl Fn(usize) -> Option<RegionFile<'a>>,
) -> Result<(), RamError> {
    if !backing.is_shared() {
        return advise(ram, range, Advice::Drop, "free memory");
    }
    check(ram.layout(), range)?;
    for (region, offset, piece) in ram.layout().split(range) {
        if let Some(RegionFile { file, offset: begin }) = file(region) {
            map::punch_hole(file, begin + offset, piece.bytes()).map_err(RamError::system("punch a hole"))?;
        }
    }
    Ok(())
}

fn check(layout: &RamLayout, range: PageRange) -> Result<(), RamError> {
    let inside = range.first.checked_add(range.count).is_some_and(|end| end <= layout.pages());
    if inside { Ok(()) } else { Err(outside(range)) }
}

fn outside(range: PageRange) -> RamError {
    RamError::Outside { first: range.first, count: range.count }
}
