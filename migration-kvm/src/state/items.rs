//! The encoding of a state as a list of tagged items. The list begins with the number of items
//! (`u32`). Each item has a tag (`u16`), a length (`u32`) and its bytes. The number makes it
//! possible to recognize a list that was cut between two items.
//!
//! A later version adds items with new tags. A tag without [`OPTIONAL`] means that the state is
//! wrong without the item, so a reader that does not know the tag refuses the whole state. A reader
//! ignores an unknown item whose tag has [`OPTIONAL`].

use migration_core::codec::{DecodeError, Reader, Writer};

use super::{
    StateError,
    sys::{self, Pod},
};

/// The bit in the tags of items that a reader may ignore if it does not know them.
pub const OPTIONAL: u16 = 0x8000;
/// The largest number of items in a list; there are about twenty kinds.
const MAX_ITEMS: usize = 256;
/// The largest length of an item in bytes. The largest items are the XSAVE area (11 KiB with AMX)
/// and 4096 MSRs (48 KiB).
const MAX_ITEM: usize = 64 << 10;

/// Writes a list of items.
pub(super) struct ItemWriter {
    count: usize,
    items: Writer,
}

impl ItemWriter {
    pub(super) fn new() -> Self {
        Self { count: 0, items: Writer::new() }
    }

    pub(super) fn bytes(&mut self, tag: u16, bytes: &[u8]) {
        self.count += 1;
        self.items.u16(tag).blob(bytes);
    }

    pub(super) fn pod<T: Pod>(&mut self, tag: u16, value: &T) {
        self.bytes(tag, sys::bytes_of(value));
    }

    pub(super) fn u32(&mut self, tag: u16, value: u32) {
        self.bytes(tag, &value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, tag: u16, value: u64) {
        self.bytes(tag, &value.to_le_bytes());
    }

    /// Adds an item that `write` fills.
    pub(super) fn with(&mut self, tag: u16, write: impl FnOnce(&mut Writer)) {
        let mut w = Writer::new();
        write(&mut w);
        self.bytes(tag, &w.into_bytes());
    }

    pub(super) fn finish(self) -> Vec<u8> {
        let mut w = Writer::new();
        w.count(self.count).bytes(&self.items.into_bytes());
        w.into_bytes()
    }
}

/// A list of items with different tags. Items are taken out by tag, and [`finish`](Items::finish)
/// checks what is left.
pub(super) struct Items<'a>(Vec<(u16, &'a [u8])>);

impl<'a> Items<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let mut r = Reader::new(bytes);
        let mut items: Vec<(u16, &[u8])> = Vec::new();
        for _ in 0..r.count(MAX_ITEMS, "number of items")? {
            let tag = r.u16("item tag")?;
            let bytes = r.blob(MAX_ITEM, "item")?;
            if items.iter().any(|(t, _)| *t == tag) {
                return Err(StateError::DuplicateItem { tag });
            }
            items.push((tag, bytes));
        }
        r.finish()?;
        Ok(Self(items))
    }

    pub(super) fn take(&mut self, tag: u16) -> Option<&'a [u8]> {
        let at = self.0.iter().position(|(t, _)| *t == tag)?;
        Some(self.0.swap_remove(at).1)
    }

    pub(super) fn need(&mut self, tag: u16, name: &'static str) -> Result<&'a [u8], StateError> {
        self.take(tag).ok_or(StateError::MissingItem { name })
    }

    pub(super) fn take_pod<T: Pod>(&mut self, tag: u16, name: &'static str) -> Result<Option<T>, StateError> {
        self.take(tag).map(|bytes| pod(bytes, name)).transpose()
    }

    pub(super) fn need_pod<T: Pod>(&mut self, tag: u16, name: &'static str) -> Result<T, StateError> {
        pod(self.need(tag, name)?, name)
    }

    /// Takes an item and decodes it with `read`, which must read all of it.
    pub(super) fn take_with<T>(
        &mut self,
        tag: u16,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, StateError> {
        let Some(bytes) = self.take(tag) else { return Ok(None) };
        let mut r = Reader::new(bytes);
        let value = read(&mut r)?;
        r.finish()?;
        Ok(Some(value))
    }

    pub(super) fn take_u32(&mut self, tag: u16, name: &'static str) -> Result<Option<u32>, StateError> {
        self.take_with(tag, |r| r.u32(name))
    }

    pub(super) fn take_u64(&mut self, tag: u16, name: &'static str) -> Result<Option<u64>, StateError> {
        self.take_with(tag, |r| r.u64(name))
    }

    /// Checks that no unknown item without [`OPTIONAL`] is left.
    pub(super) fn finish(self) -> Result<(), StateError> {
        let unknown: Vec<u16> = self.0.iter().map(|(tag, _)| *tag).filter(|tag| tag & OPTIONAL == 0).collect();
        if unknown.is_empty() { Ok(()) } else { Err(StateError::UnknownItems { tags: unknown }) }
    }
}

fn pod<T: Pod>(bytes: &[u8], name: &'static str) -> Result<T, StateError> {
    sys::from_bytes(bytes).ok_or(StateError::ItemSize { name, found: bytes.len(), expected: size_of::<T>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_items() {
        let mut w = ItemWriter::new();
        w.u32(7, 1);
        w.u32(9 | OPTIONAL, 2);
        let bytes = w.finish();
        let items = Items::parse(&bytes).unwrap();
        assert!(matches!(items.finish(), Err(StateError::UnknownItems { tags }) if tags == [7]));
        let mut items = Items::parse(&bytes).unwrap();
        assert_eq!(items.take_u32(7, "seven").unwrap(), Some(1));
        items.finish().unwrap();
    }

    #[test]
    fn duplicates_and_claims_are_refused() {
        let mut w = ItemWriter::new();
        w.u32(7, 1);
        w.u32(7, 1);
        assert!(matches!(Items::parse(&w.finish()), Err(StateError::DuplicateItem { tag: 7 })));
        let claim = [1, 0, 0, 0, 7, 0, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(Items::parse(&claim), Err(StateError::Decode(DecodeError::TooLong { .. }))));
        let mut many = ItemWriter::new();
        (0..=MAX_ITEMS as u16).for_each(|tag| many.bytes(tag, &[]));
        assert!(Items::parse(&many.finish()).is_err());
    }
}
