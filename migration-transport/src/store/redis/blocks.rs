//! Runs of pages as one value of the server.
//!
//! A namespace lies in **blocks**: pages 16 · *n* to 16 · *n* + 15 are block *n*. A block is one
//! value. So page and namespace alone say where a page is, however runs were cut, and a run takes
//! one value for 16 of its pages.
//!
//! ```text
//! block      directory, then slots in the order in which pages came
//! directory  16 entries of 8 bytes, one for each page of the block
//! entry      generation u32 · length of the value u16 · slot u8 · 1, or zeros for no page
//! slot       trailer (32 bytes) · value · zeros up to 4192 bytes
//! ```
//!
//! Numbers are little-endian. A slot takes the longest value, so that a page is replaced in its
//! place. Nothing of what comes back from the server is believed: a page whose entry, length or
//! trailer is wrong is missing.

use std::{
    io::{self, Write},
    ops::Range,
};

use migration_core::{
    store::{PageToGet, PageToPut, Trailer, limits::MAX_VALUE_BYTES},
    vm::VmId,
};

/// Pages of a block.
pub(super) const BLOCK_PAGES: u64 = 16;
/// Bytes of an entry of the directory.
const ENTRY_BYTES: usize = 8;
/// Bytes of a directory.
pub(super) const DIRECTORY_BYTES: usize = BLOCK_PAGES as usize * ENTRY_BYTES;
/// Bytes of a slot.
pub(super) const SLOT_BYTES: usize = Trailer::BYTES + MAX_VALUE_BYTES;
/// Bytes of a full block.
pub(super) const MAX_BLOCK_BYTES: usize = DIRECTORY_BYTES + BLOCK_PAGES as usize * SLOT_BYTES;
/// Bytes that a block takes in the server beside its slots: the directory, the key, and the
/// server's own structures. The latter are an estimate.
pub(super) const BLOCK_OVERHEAD: u64 = DIRECTORY_BYTES as u64 + 320;

static ZEROS: [u8; MAX_VALUE_BYTES] = [0; MAX_VALUE_BYTES];

/// The pages of a request that lie in one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The number of the block.
    pub(super) block: u64,
    /// Which of the request's pages they are.
    pub(super) pages: Range<usize>,
}

/// Cuts ascending page numbers at the ends of blocks.
pub(super) fn pieces(pages: impl Iterator<Item = u64>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (at, page) in pages.enumerate() {
        let block = page / BLOCK_PAGES;
        match pieces.last_mut() {
            Some(piece) if piece.block == block => piece.pages.end = at + 1,
            _ => pieces.push(Piece { block, pages: at..at + 1 }),
        }
    }
    pieces
}

/// Returns the place of a page in its block.
pub(super) fn index(page: u64) -> u8 {
    (page % BLOCK_PAGES) as u8
}

/// Writes the block that has exactly these pages of one generation, in this order.
///
/// # Errors
/// Returns an error if `out` does.
pub(super) fn write_block(out: &mut impl Write, vm: VmId, generation: u32, pages: &[PageToPut<'_>]) -> io::Result<()> {
    out.write_all(&directory(generation, pages))?;
    for page in pages {
        out.write_all(&Trailer::new(vm, page.page, generation, page.value).encode())?;
        out.write_all(page.value)?;
        out.write_all(&ZEROS[page.value.len()..])?;
    }
    Ok(())
}

fn directory(generation: u32, pages: &[PageToPut<'_>]) -> [u8; DIRECTORY_BYTES] {
    let mut directory = [0; DIRECTORY_BYTES];
    for (slot, page) in pages.iter().enumerate() {
        let at = usize::from(index(page.page)) * ENTRY_BYTES;
        let entry = &mut directory[at..at + ENTRY_BYTES];
        entry[..4].copy_from_slice(&generation.to_le_bytes());
        entry[4..6].copy_from_slice(&(page.value.len() as u16).to_le_bytes());
        entry[6..].copy_from_slice(&[slot as u8, 1]);
    }
    directory
}

/// Returns the value of a page in a block that the server has handed out, if its trailer proves it.
pub(super) fn value_in_block<'a>(block: &'a [u8], vm: VmId, wanted: &PageToGet) -> Option<&'a [u8]> {
    let (directory, slots) = block.split_at_checked(DIRECTORY_BYTES)?;
    let at = usize::from(index(wanted.page)) * ENTRY_BYTES;
    let &[_, _, _, _, low, high, slot, 1] = directory.get(at..at + ENTRY_BYTES)? else { return None };
    let start = usize::from(slot) * SLOT_BYTES;
    let end = start + Trailer::BYTES + usize::from(u16::from_le_bytes([low, high]));
    value_in_slot(slots.get(start..end)?, vm, wanted)
}

/// Returns the value of a page in its slot, without the zeros at its end, if its trailer proves it.
pub(super) fn value_in_slot<'a>(slot: &'a [u8], vm: VmId, wanted: &PageToGet) -> Option<&'a [u8]> {
    let (trailer, value) = slot.split_first_chunk()?;
    let good =
        value.len() <= MAX_VALUE_BYTES && Trailer::decode(trailer).proves(vm, wanted.page, wanted.generation, value);
    good.then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([1; 16]);

    #[test]
    fn requests_are_cut_at_the_ends_of_blocks() {
        let piece = |block, pages| Piece { block, pages };
        assert_eq!(pieces([15, 16, 17, 31, 64].into_iter()), [piece(0, 0..1), piece(1, 1..4), piece(4, 4..5)]);
        assert_eq!(pieces([].into_iter()), []);
    }

    fn block_len(pages: usize) -> usize {
        DIRECTORY_BYTES + pages * SLOT_BYTES
    }

    /// Returns the block of some pages, as it is sent.
    fn block(pages: &[PageToPut<'_>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_block(&mut bytes, VM, 7, pages).unwrap();
        assert_eq!(bytes.len(), block_len(pages.len()));
        bytes
    }

    #[test]
    fn a_page_of_a_block_is_found_whatever_its_length() {
        let (long, short) = ([9; MAX_VALUE_BYTES], [8; 1]);
        let pages = [PageToPut { page: 33, value: &long }, PageToPut { page: 47, value: &short }];
        let block = block(&pages);
        let find = |page, generation| value_in_block(&block, VM, &PageToGet { page, generation });
        assert_eq!(find(33, 7), Some(&long[..]));
        assert_eq!(find(47, 7), Some(&short[..]));
        assert_eq!((find(47, 6), find(34, 7), find(31, 7)), (None, None, None));
        assert_eq!(value_in_block(&block, VmId([2; 16]), &PageToGet { page: 33, generation: 7 }), None);
    }

    #[test]
    fn a_block_that_was_altered_in_any_way_yields_no_wrong_page() {
        let value = [9; 4096];
        let pages = [32, 33].map(|page| PageToPut { page, value: &value });
        let good = block(&pages);
        let wanted = [32, 33].map(|page| PageToGet { page, generation: 7 });
        for at in (0..DIRECTORY_BYTES + Trailer::BYTES).chain([DIRECTORY_BYTES + SLOT_BYTES]) {
            for bits in [1, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= bits;
                for page in &wanted {
                    let found = value_in_block(&bad, VM, page);
                    assert!(found.is_none_or(|found| found == value), "byte {at}");
                }
            }
        }
        let end = block_len(1) + Trailer::BYTES + value.len();
        for len in (0..good.len()).step_by(61) {
            let found = value_in_block(&good[..len], VM, &wanted[1]);
            assert_eq!(found.is_some(), len >= end, "{len} bytes");
        }
    }
}
