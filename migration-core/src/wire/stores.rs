//! The frames of the control lane about pages in stores.

use std::num::NonZeroU64;

use crate::{
    codec::{DecodeError, Reader, Writer},
    limits::{MAX_ENTRIES, MAX_ENTRY_STORES, MAX_LOCATED_RUNS, MAX_PAGES, MAX_STORE_NAME},
    page::PageRange,
    page_map::{LocatedRun, StoreCopy},
    paged_memory::{EntryStore, StoreEntry},
    store::{Incarnation, Namespace},
};

/// A part of the store table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePart {
    /// The number of the frame within a session. The acknowledgement has the same number.
    pub number: u32,
    /// The largest number of bytes a second that the destination reads from stores ahead of the
    /// guest, or `None` for no limit. The value of the last part counts.
    pub gather_rate: Option<NonZeroU64>,
    /// Whether the destination asks the stores of these entries before it acknowledges them, and
    /// refuses the VM if one of them does not answer. False if the source holds every page that is
    /// in these stores: then a store that fails costs nothing but time.
    pub must_answer: bool,
    /// The number of the first entry.
    pub first: u8,
    /// The entries. There may be none: the acknowledgement then only confirms that everything
    /// before was read.
    pub entries: Vec<StoreEntry>,
}

impl TablePart {
    pub(super) fn encode(&self, w: &mut Writer) {
        let rate = self.gather_rate.map_or(0, NonZeroU64::get);
        w.u32(self.number).u64(rate).bool(self.must_answer).u8(self.first).count(self.entries.len());
        for entry in &self.entries {
            w.bytes(entry.namespace().secret()).count(entry.stores().len());
            for store in entry.stores() {
                w.text(&store.name).bytes(&store.incarnation.0);
            }
        }
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let number = r.u32("number of the part")?;
        let gather_rate = NonZeroU64::new(r.u64("gather rate")?);
        let must_answer = r.bool("must answer")?;
        let first = r.u8("first entry")?;
        let count = r.count(MAX_ENTRIES, "number of entries")?;
        if usize::from(first) + count > MAX_ENTRIES {
            let why = format!("{count} from {first} on, and a table has at most {MAX_ENTRIES}");
            return Err(DecodeError::invalid("number of entries", why));
        }
        // the vector is not allocated by `count`: an entry has at least 20 bytes, and these may be
        // missing
        let mut entries = Vec::new();
        for _ in 0..count {
            let namespace = Namespace::new(r.array("namespace")?);
            let mut stores = Vec::new();
            for _ in 0..r.count(MAX_ENTRY_STORES, "number of stores")? {
                let name = r.text(MAX_STORE_NAME, "name of a store")?;
                stores.push(EntryStore { name, incarnation: Incarnation(r.array("incarnation")?) });
            }
            let entry = StoreEntry::new(namespace, stores);
            entries.push(entry.map_err(|error| DecodeError::invalid("entry", error.to_string()))?);
        }
        Ok(Self { number, gather_rate, must_answer, first, entries })
    }
}

/// The announcement that pages are in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The copy of the pages: the entry of the store table, and the generation of the put.
    pub copy: StoreCopy,
    /// Whether the source has the content in RAM as well, and answers demands for the pages.
    pub held: bool,
    /// The pages: at least one run. The runs ascend and are disjoint.
    pub runs: Vec<PageRange>,
}

impl Located {
    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Checks that the numbers of all pages are below `pages`.
    ///
    /// # Errors
    /// Returns an error if a number is not.
    pub fn check(&self, pages: u64) -> Result<(), DecodeError> {
        match self.runs.last() {
            // the runs ascend, so the last one is enough
            Some(run) if run.end() > pages => {
                let why = format!("pages {}+{} are outside RAM", run.first, run.count);
                Err(DecodeError::invalid("located pages", why))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn encode(&self, w: &mut Writer) {
        w.u8(self.copy.entry).u32(self.copy.generation).bool(self.held).count(self.runs.len());
        for run in &self.runs {
            // the count fits: runs are cut at 2^31 pages
            w.u64(run.first).u32(run.count as u32);
        }
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let copy = StoreCopy { entry: r.u8("entry")?, generation: r.u32("generation of a put")? };
        let held = r.bool("held")?;
        let count = r.count(MAX_LOCATED_RUNS, "number of runs")?;
        if count == 0 {
            return Err(DecodeError::invalid("number of runs", "none"));
        }
        let mut runs = Vec::with_capacity(count);
        let mut free = 0;
        for _ in 0..count {
            let run = PageRange::new(r.u64("first page")?, r.u32("page count")?.into());
            if run.count == 0 || run.first < free || run.end() > MAX_PAGES {
                let why = format!("pages {}+{} are empty or out of order, or no VM has them", run.first, run.count);
                return Err(DecodeError::invalid("run", why));
            }
            free = run.end();
            runs.push(run);
        }
        Ok(Self { copy, held, runs })
    }
}

/// The largest number of pages of a run, so that the count of a run fits into a frame.
const MAX_RUN_PAGES: u64 = 1 << 31;

/// Returns the frames that announce the locations of pages. Consecutive runs of the same copy in
/// `runs` share a frame.
pub(crate) fn located_frames(runs: &[LocatedRun]) -> Vec<Located> {
    let mut frames: Vec<Located> = Vec::new();
    for run in runs {
        for first in run.pages.pages().step_by(MAX_RUN_PAGES as usize) {
            let pages = PageRange::new(first, MAX_RUN_PAGES.min(run.pages.end() - first));
            match frames.last_mut() {
                Some(frame)
                    if (frame.copy, frame.held) == (run.copy, run.held)
                        && frame.runs.len() < MAX_LOCATED_RUNS
                        && frame.runs.last().is_some_and(|last| last.end() <= pages.first) =>
                {
                    frame.runs.push(pages);
                }
                _ => frames.push(Located { copy: run.copy, held: run.held, runs: vec![pages] }),
            }
        }
    }
    frames
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns a part that has every kind of content.
    pub(crate) fn part() -> TablePart {
        let store = |name: &str, byte| EntryStore { name: name.into(), incarnation: Incarnation([byte; 16]) };
        let entry = |byte, stores| StoreEntry::new(Namespace::new([byte; 16]), stores).unwrap();
        let entries = vec![entry(1, vec![store("rack-7", 2), store("rack-8", 3)]), entry(4, vec![store("home", 5)])];
        TablePart { number: 9, gather_rate: NonZeroU64::new(1 << 20), must_answer: true, first: 253, entries }
    }

    /// Returns the locations of the pages of one put.
    pub(crate) fn located() -> Located {
        let runs = vec![PageRange::new(3, 2), PageRange::new(5, 1), PageRange::new(200, 40)];
        Located { copy: StoreCopy { entry: 7, generation: 11 }, held: true, runs }
    }

    fn encoded(encode: impl FnOnce(&mut Writer)) -> Vec<u8> {
        let mut w = Writer::new();
        encode(&mut w);
        w.into_bytes()
    }

    #[test]
    fn a_table_is_checked_entry_by_entry() {
        let decode = |part: &TablePart| TablePart::decode(&mut Reader::new(&encoded(|w| part.encode(w))));
        assert_eq!(decode(&part()), Ok(part()));
        assert!(decode(&TablePart { first: 254, ..part() }).is_err(), "the last one would be the 256th");
        let bytes = encoded(|w| part().encode(w));
        for (at, byte) in [(12, 2), (14, 0xff), (34, 0), (34, 9), (38, 0), (42, b'x')] {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            let good = at == 42;
            assert_eq!(TablePart::decode(&mut Reader::new(&bytes)).is_ok(), good, "{byte} at {at}");
        }
    }

    #[test]
    fn runs_ascend_and_are_inside_ram() {
        let decode = |runs| {
            let bytes = encoded(|w| Located { runs, ..located() }.encode(w));
            Located::decode(&mut Reader::new(&bytes))
        };
        let run = PageRange::new;
        assert_eq!(decode(located().runs), Ok(located()));
        for bad in
            [vec![], vec![run(3, 0)], vec![run(3, 2), run(4, 1)], vec![run(MAX_PAGES, 1)], vec![run(u64::MAX, 1)]]
        {
            assert!(decode(bad.clone()).is_err(), "{bad:?}");
        }
        assert!(located().check(240).is_ok() && located().check(239).is_err());
        assert_eq!(located().pages(), 43);
    }

    proptest! {
        #[test]
        fn all_runs_are_said_once(runs in prop::collection::vec((0u64..9, 1u64..5, 0u8..2, any::<bool>()), 0..50)) {
            let mut first = 0;
            let runs: Vec<_> = runs
                .into_iter()
                .map(|(gap, count, entry, held)| {
                    let pages = PageRange::new(first + gap, count);
                    first = pages.end();
                    LocatedRun { pages, copy: StoreCopy { entry, generation: 1 }, held }
                })
                .collect();
            let frames = located_frames(&runs);
            let said = frames.iter().flat_map(|frame| {
                frame.runs.iter().map(|&pages| LocatedRun { pages, copy: frame.copy, held: frame.held })
            });
            prop_assert_eq!(said.collect::<Vec<_>>(), runs);
            for frame in frames {
                let bytes = encoded(|w| frame.encode(w));
                prop_assert_eq!(Located::decode(&mut Reader::new(&bytes)), Ok(frame));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = TablePart::decode(&mut Reader::new(&bytes));
            let _ = Located::decode(&mut Reader::new(&bytes));
        }
    }
}
