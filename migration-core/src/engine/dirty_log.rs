//! The dirty log of a VMM that had started its tracker itself. The log moves with a VM whose RAM
//! stays in place.

use crate::{
    codec::DecodeError,
    page_set::PageSet,
    state::{MAX_SECTION, Section, VmState},
    wire::{add_missing, encode_bitmap},
};

const NAME: &str = "dirty-log";
const VERSION: u32 = 1;

/// The most pages of a VM whose log fits into one section: 512 GiB.
pub(crate) const MAX_PAGES: u64 = MAX_SECTION as u64 * 8;

/// Returns the state section for these pages. It has a bit for each page, without the zero words at
/// the end: at most 64 KiB for each 2 GiB of RAM.
pub(crate) fn section(pages: &PageSet) -> Section {
    let used = pages.last_below(pages.capacity()).map_or(0, |last| last / 64 + 1);
    let mut words = vec![0; used as usize];
    pages.copy_words(0, &mut words);
    Section { name: NAME.into(), instance: 0, version: VERSION, data: encode_bitmap(&words) }
}

/// Removes the log from the state of a VM with this number of pages. Returns the log, or `None` if
/// the state has none.
///
/// # Errors
/// Returns an error if the version of the log is unknown, or if the log has pages outside RAM.
pub(crate) fn take(state: &mut VmState, pages: u64) -> Result<Option<PageSet>, DecodeError> {
    let Some(at) = state.sections.iter().position(|s| s.name == NAME) else { return Ok(None) };
    let section = state.sections.remove(at);
    if section.version != VERSION {
        return Err(DecodeError::invalid(NAME, format!("version {} is not known", section.version)));
    }
    let most = (pages.div_ceil(64) * 8).min(MAX_SECTION as u64);
    if section.data.len() as u64 > most || !section.data.len().is_multiple_of(8) {
        return Err(DecodeError::invalid(NAME, format!("{} bytes for {pages} pages", section.data.len())));
    }
    let mut set = PageSet::empty(pages);
    add_missing(&mut set, 0, &section.data)?;
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(capacity in 1u64..1000, pages in prop::collection::vec(0u64..1000, 0..20)) {
            let mut set = PageSet::empty(capacity);
            for page in pages.into_iter().filter(|&page| page < capacity) {
                set.insert(page);
            }
            let mut state = VmState { sections: vec![section(&set)] };
            prop_assert_eq!(take(&mut state, capacity).unwrap(), Some(set));
            prop_assert!(state.sections.is_empty());
            prop_assert_eq!(take(&mut state, capacity).unwrap(), None);
        }

        #[test]
        fn arbitrary_bytes_never_panic(data in prop::collection::vec(any::<u8>(), 0..64), pages in 0u64..300, version in 0u32..3) {
            let mut state = VmState { sections: vec![Section { name: NAME.into(), instance: 0, version, data: data.into() }] };
            if let Ok(Some(set)) = take(&mut state, pages) {
                prop_assert!(set.iter().all(|page| page < pages));
            }
        }
    }

    #[test]
    fn pages_outside_ram_are_refused() {
        let log = |word: u64, bytes: usize| {
            let data = word.to_le_bytes().into_iter().cycle().take(bytes).collect::<Vec<_>>();
            VmState { sections: vec![Section { name: NAME.into(), instance: 0, version: VERSION, data: data.into() }] }
        };
        assert!(take(&mut log(1 << 9, 8), 10).unwrap().is_some());
        assert!(take(&mut log(1 << 10, 8), 10).is_err());
        assert!(take(&mut log(0, 16), 10).is_err());
        assert!(take(&mut log(0, 7), 10).is_err());
    }
}
