//! The encoding of page sets, in frames of the control lane and in a section of the VM's state.

use bytes::Bytes;

use super::{Control, MAX_BODY, STATE_CHUNK};
use crate::{codec::DecodeError, page_set::PageSet};

/// Returns the frames that list the pages of a set.
pub(crate) fn missing_frames(pages: &PageSet) -> Vec<Control> {
    let words_each = STATE_CHUNK as u64 / 8;
    let all = pages.capacity().div_ceil(64);
    let (mut frames, mut at) = (Vec::new(), 0);
    while let Some(page) = pages.first_from(at) {
        let first = page / 64 / words_each * words_each;
        let mut words = vec![0; words_each.min(all - first) as usize];
        pages.copy_words(first, &mut words);
        let bitmap = encode_bitmap(&words);
        debug_assert!(bitmap.len() < MAX_BODY);
        frames.push(Control::Missing { first: first * 64, bitmap });
        at = (first + words_each) * 64;
    }
    frames
}

/// Returns the encoding of the words of a page set.
pub(crate) fn encode_bitmap(words: &[u64]) -> Bytes {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Adds the pages of a received bitmap to `pages`. Bit 0 of the bitmap stands for page `first`.
pub(crate) fn add_missing(pages: &mut PageSet, first: u64, bitmap: &[u8]) -> Result<(), DecodeError> {
    let words: Vec<u64> =
        bitmap.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default())).collect();
    let last = words.iter().rposition(|&w| w != 0).map(|i| i as u64 * 64 + 63 - u64::from(words[i].leading_zeros()));
    let Some(last) = last else { return Ok(()) };
    if first.checked_add(last).is_none_or(|last| last >= pages.capacity()) {
        return Err(DecodeError::invalid("bitmap", format!("page {first}+{last} is outside RAM")));
    }
    pages.insert_bitmap(first, last + 1, &words);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PageRange;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_set_arrives_as_it_was_sent(
            runs in prop::collection::vec((0u64..17_000_000, 1u64..200_000), 0..4), more in 0u64..65,
        ) {
            let capacity = 17_000_000 + more;
            let mut set = PageSet::empty(capacity);
            runs.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
            let mut arrived = PageSet::empty(capacity);
            for frame in missing_frames(&set) {
                let Control::Missing { first, bitmap } = frame else { panic!("another frame") };
                prop_assert!(bitmap.len() <= STATE_CHUNK && bitmap.iter().any(|&byte| byte != 0));
                add_missing(&mut arrived, first, &bitmap).unwrap();
            }
            prop_assert_eq!(arrived, set);
        }
    }

    #[test]
    fn pages_outside_ram_are_no_missing_pages() {
        let mut set = PageSet::empty(100);
        add_missing(&mut set, 64, &encode_bitmap(&[1 << 35, 0])).unwrap();
        assert!(set.iter().eq([99]));
        for (first, word) in [(64, 1 << 36), (100, 1), (u64::MAX, 2)] {
            assert!(add_missing(&mut set, first, &encode_bitmap(&[word])).is_err(), "{first}");
        }
    }
}
