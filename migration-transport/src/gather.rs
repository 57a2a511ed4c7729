//! A position in a head and a list of guest memory slices, which advances as data is sent or
//! received.

use migration_core::RamSlice;

/// The data that is left to transfer: first `head`, then the slices.
#[derive(Clone, Debug)]
pub(crate) struct Gather<'a> {
    head: &'a [u8],
    slices: &'a [RamSlice<'a>],
    /// The number of bytes of `slices[0]` that are done; always less than its length.
    skip: usize,
    remaining: usize,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(head: &'a [u8], slices: &'a [RamSlice<'a>]) -> Self {
        let remaining = slices.iter().fold(head.len(), |sum, slice| sum.saturating_add(slice.len()));
        let mut gather = Self { head, slices, skip: 0, remaining };
        gather.drop_finished(); // leading empty slices
        gather
    }

    pub(crate) fn remaining(&self) -> usize {
        self.remaining
    }

    pub(crate) fn head(&self) -> &'a [u8] {
        self.head
    }

    /// Returns the remaining slices without empty ones.
    pub(crate) fn slices(&self) -> impl Iterator<Item = RamSlice<'a>> + '_ {
        let first = self.slices.first().map(|slice| slice.skip(self.skip));
        first.into_iter().chain(self.slices.iter().skip(1).copied()).filter(|slice| !slice.is_empty())
    }

    /// Advances by `bytes`, at most to the end.
    pub(crate) fn advance(&mut self, bytes: usize) {
        let bytes = bytes.min(self.remaining);
        self.remaining -= bytes;
        let of_head = bytes.min(self.head.len());
        self.head = &self.head[of_head..];
        self.skip += bytes - of_head;
        self.drop_finished();
    }

    fn drop_finished(&mut self) {
        while let Some((first, rest)) = self.slices.split_first()
            && self.skip >= first.len()
        {
            self.skip -= first.len();
            self.slices = rest;
        }
    }

    /// Returns the next `bytes` bytes as a head and slices, and advances past them.
    pub(crate) fn take(&mut self, bytes: usize) -> (&'a [u8], Vec<RamSlice<'a>>) {
        let head = &self.head[..bytes.min(self.head.len())];
        let mut left = bytes - head.len();
        let mut slices = Vec::new();
        for slice in self.slices() {
            if left == 0 {
                break;
            }
            let part = slice.take(left);
            left -= part.len();
            slices.push(part);
        }
        self.advance(bytes - left);
        (head, slices)
    }

    /// Passes the next `bytes` bytes to `sink` in pieces, and advances past them.
    pub(crate) fn copy_out(&mut self, bytes: usize, mut sink: impl FnMut(&[u8])) {
        let mut scratch = [0; 4096];
        let mut left = bytes.min(self.remaining);
        while left > 0 {
            let piece = if self.head.is_empty() {
                let Some(slice) = self.slices().next() else { return };
                let piece = slice.take(left.min(scratch.len()));
                piece.copy_to(&mut scratch);
                &scratch[..piece.len()]
            } else {
                &self.head[..left.min(self.head.len())]
            };
            sink(piece);
            left -= piece.len();
            let done = piece.len();
            self.advance(done);
        }
    }

    /// Copies `bytes` into the next guest memory, and advances past it.
    pub(crate) fn copy_in(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(slice) = self.slices().next() else { return };
            slice.copy_from(bytes);
            let done = slice.len().min(bytes.len());
            bytes = &bytes[done..];
            self.advance(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use migration_core::GuestRam;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::ram;

    #[test]
    fn empty_slices_are_passed_over() {
        let ram = ram(1);
        let empty = ram.slice_at(0, 0).unwrap();
        let full = ram.slice_at(0, 3).unwrap();
        let slices = [empty, full, empty, empty, full, empty];
        let mut gather = Gather::new(b"", &slices);
        assert_eq!((gather.remaining(), gather.slices().count()), (6, 2));
        gather.advance(3);
        assert_eq!((gather.remaining(), gather.slices().count()), (3, 1));
        gather.advance(100);
        assert_eq!((gather.remaining(), gather.slices().count()), (0, 0));
        assert_eq!(Gather::new(b"", &[empty, empty]).slices().count(), 0);
    }

    proptest! {
        #[test]
        fn any_split_keeps_every_byte(lens in prop::collection::vec(0u64..300, 0..20), head in 0usize..200,
                                      steps in prop::collection::vec(1usize..500, 1..10)) {
            let memory = ram(4);
            let bytes: Vec<u8> = (0..4096 * 4u32).map(|i| (i * 7 / 3) as u8).collect();
            memory.write(0, &bytes).unwrap();
            let (head, mut expected) = (&bytes[..head], bytes[..head].to_vec());
            let mut at = 0;
            let slices: Vec<_> = lens.iter().map(|&len| {
                let slice = memory.slice_at(at, len).unwrap();
                expected.extend_from_slice(&bytes[at as usize..][..len as usize]);
                at += len + 11;
                slice
            }).collect();
            let mut gather = Gather::new(head, &slices);
            let mut copied = gather.clone();
            let (mut by_take, mut by_copy) = (Vec::new(), Vec::new());
            for step in steps.iter().cycle() {
                if gather.remaining() == 0 { break; }
                let (head, parts) = gather.take(*step);
                by_take.extend_from_slice(head);
                for part in parts {
                    let mut buf = vec![0; part.len()];
                    part.copy_to(&mut buf);
                    by_take.extend(buf);
                }
                copied.copy_out(*step, |piece| by_copy.extend_from_slice(piece));
                prop_assert_eq!(copied.remaining(), gather.remaining());
            }
            prop_assert_eq!(&by_take, &expected);
            prop_assert_eq!(&by_copy, &expected);
        }
    }
}
