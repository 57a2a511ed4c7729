//! Stores of versions, which are checkpoints of a VM or a snapshot.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
};

use bytes::Bytes;

use crate::{PAGE_SIZE, PageSet};

/// The content of a page of a version; `None` stands for zeros.
pub type PageContent<'a> = Option<&'a [u8; PAGE_SIZE]>;

/// The number of pages that [`VersionStore::restore`] reads at once: 1 MiB.
const RESTORE_PAGES: usize = 256;

/// A store of the RAM and the state of one VM at one moment: its *version*.
///
/// It is the second trait of stores. A [`PageStore`](super::PageStore) keeps the newest put of each
/// page, for readers that know its generation; nothing in it says that pages belong together. A
/// version is complete in itself: all its pages and its state are of one moment. Pages that were
/// put count only from their [commit](Self::commit) on, all of them or none, and until then the
/// version before stays. A store may keep one version only, such as a snapshot, or build each
/// version on the one before, such as checkpoints.
///
/// Pages are put in any order and any number of times; the last put of a page counts. They are read
/// back as a whole ([`restore`](Self::restore)) or at random ([`read`](Self::read)), so that a VM
/// can be started before all of its RAM was read. Zeros are a valid content here, and need no room.
///
/// Errors are those of the medium, with an [`ErrorKind`] on which the caller can act. After a
/// failed `put` or `commit` the caller [discards](Self::discard) the pages that were put.
///
/// The conformance suite checks an implementation: see `conformance::versions`.
///
/// # Example
///
/// ```
/// use migration_core::{PAGE_SIZE, store::{MemoryVersions, VersionStore}};
///
/// let mut store = MemoryVersions::default();
/// store.put(3, Some(&[7; PAGE_SIZE]))?;
/// store.put(4, None)?;
/// assert!(store.latest().is_none());
/// store.commit(1, b"state".as_slice().into())?;
///
/// // another process, later
/// assert_eq!(store.latest(), Some((1, b"state".as_slice().into())));
/// assert_eq!(store.list()?.iter().collect::<Vec<_>>(), [3, 4]);
/// let mut pages = Vec::new();
/// store.read(&[4], &mut |page, content| Ok(pages.push((page, content.is_some()))))?;
/// assert_eq!(pages, [(4, false)]);
/// # Ok::<(), std::io::Error>(())
/// ```
pub trait VersionStore: Send {
    /// Puts a page of the next version. If the page was put before since the last commit, `content`
    /// replaces that content.
    ///
    /// # Errors
    /// Returns an error if the page cannot be stored. The version then fails, and the last
    /// committed one stays.
    fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()>;

    /// Commits a version. It consists of all pages that were put since the last commit, of the
    /// pages of the version before that were not put since, and of `state`: an encoded
    /// [`VmState`](crate::state::VmState), or in a snapshot an encoded
    /// [`SavedVm`](crate::snapshot::SavedVm). When this returns, the version is as durable as the
    /// store can make it.
    ///
    /// # Errors
    /// Returns an error of the medium. The last committed version stays.
    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()>;

    /// Removes the pages that were put since the last commit.
    fn discard(&mut self);

    /// Returns the number and the state of the last committed version, or `None` if nothing was
    /// committed.
    fn latest(&self) -> Option<(u32, Bytes)>;

    /// Returns the pages that the last committed version has, including pages of zeros. The set is
    /// empty if nothing was committed. Its capacity is the number of the VM's pages, or just enough
    /// for the last page if the store does not know that number.
    ///
    /// # Errors
    /// Returns an error of the medium.
    fn list(&mut self) -> io::Result<PageSet>;

    /// Reads pages of the last committed version, and passes each of them to `take` once, in the
    /// order of `pages`. `pages` must ascend by page number.
    ///
    /// # Errors
    /// Returns [`ErrorKind::InvalidInput`] if the pages do not ascend, or if one of them is not in
    /// the version: such a page is missing, and not zeros. Also returns errors of the medium and of
    /// `take`. Pages that were passed to `take` before an error are valid.
    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()>;

    /// Passes every page of the last committed version to `take` in ascending order.
    ///
    /// # Errors
    /// Returns an error if a page cannot be read, or `take` fails. The VM must not be started then.
    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let mut run = Vec::with_capacity(RESTORE_PAGES);
        for page in self.list()?.iter() {
            run.push(page);
            if run.len() == RESTORE_PAGES {
                self.read(&run, take)?;
                run.clear();
            }
        }
        match run.is_empty() {
            true => Ok(()),
            false => self.read(&run, take),
        }
    }
}

impl<S: VersionStore + ?Sized> VersionStore for Box<S> {
    fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()> {
        (**self).put(page, content)
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        (**self).commit(number, state)
    }

    fn discard(&mut self) {
        (**self).discard();
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        (**self).latest()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        (**self).list()
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        (**self).read(pages, take)
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        (**self).restore(take)
    }
}

/// Checks the condition under which every store refuses a [`read`](VersionStore::read): pages that
/// do not ascend. An implementation calls this first.
///
/// # Errors
/// Returns [`ErrorKind::InvalidInput`] if the pages do not ascend.
pub fn check_version_read(pages: &[u64]) -> io::Result<()> {
    match pages.is_sorted_by(|a, b| a < b) {
        true => Ok(()),
        false => Err(io::Error::new(ErrorKind::InvalidInput, "the pages to be read do not ascend")),
    }
}

/// Returns the error of a [`read`](VersionStore::read) of a page that the version does not have.
pub fn not_in_version(page: u64) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, format!("page {page} is not in the version"))
}

type Pages = BTreeMap<u64, Option<Box<[u8; PAGE_SIZE]>>>;

/// A store of versions in memory. The versions are lost when this process ends.
#[derive(Default)]
pub struct MemoryVersions {
    staged: Pages,
    pages: Pages,
    latest: Option<(u32, Bytes)>,
}

impl VersionStore for MemoryVersions {
    fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()> {
        self.staged.insert(page, content.map(|content| Box::new(*content)));
        Ok(())
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.pages.append(&mut self.staged);
        self.latest = Some((number, state));
        Ok(())
    }

    fn discard(&mut self) {
        self.staged.clear();
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.latest.clone()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        let capacity = self.pages.last_key_value().map_or(0, |(&last, _)| last.saturating_add(1));
        let mut set = PageSet::empty(capacity);
        self.pages.keys().for_each(|&page| _ = set.insert(page));
        Ok(set)
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        check_version_read(pages)?;
        for &page in pages {
            let content = self.pages.get(&page).ok_or_else(|| not_in_version(page))?;
            take(page, content.as_deref())?;
        }
        Ok(())
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.pages.iter().try_for_each(|(&page, content)| take(page, content.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::conformance::versions::TestVersions, *};

    impl TestVersions for MemoryVersions {
        fn store(&mut self) -> &mut dyn VersionStore {
            self
        }
    }

    crate::version_store_conformance!(MemoryVersions::default);

    /// A store that reads as most stores do: it has no `restore` of its own.
    #[derive(Default)]
    struct Plain(MemoryVersions);

    impl VersionStore for Plain {
        fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()> {
            self.0.put(page, content)
        }

        fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
            self.0.commit(number, state)
        }

        fn discard(&mut self) {
            self.0.discard();
        }

        fn latest(&self) -> Option<(u32, Bytes)> {
            self.0.latest()
        }

        fn list(&mut self) -> io::Result<PageSet> {
            self.0.list()
        }

        fn read(
            &mut self,
            pages: &[u64],
            take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
        ) -> io::Result<()> {
            self.0.read(pages, take)
        }
    }

    #[test]
    fn a_store_that_can_list_and_read_can_restore() {
        let mut store: Box<dyn VersionStore> = Box::new(Plain::default());
        assert_eq!(store.latest(), None);
        store.put(1, Some(&[9; PAGE_SIZE])).unwrap();
        store.discard();
        for page in 0..2 * RESTORE_PAGES as u64 + 1 {
            store.put(page * 3, Some(&[page as u8 | 1; PAGE_SIZE])).unwrap();
        }
        store.commit(1, Bytes::from_static(b"state")).unwrap();
        assert_eq!(store.latest(), Some((1, Bytes::from_static(b"state"))));
        assert!(store.list().unwrap().iter().take(3).eq([0, 3, 6]));
        let mut read = Vec::new();
        let mut take = |page, content: PageContent<'_>| {
            read.push((page, content.map(|content| content[0])));
            Ok(())
        };
        store.read(&[3, 9], &mut take).unwrap();
        assert_eq!(read, [(3, Some(1)), (9, Some(3))]);
        let mut next = 0;
        let restored = store.restore(&mut |page, content| {
            assert_eq!((page, content), (next * 3, Some(&[next as u8 | 1; PAGE_SIZE])));
            next += 1;
            Ok(())
        });
        restored.unwrap();
        assert_eq!(next, 2 * RESTORE_PAGES as u64 + 1);
    }
}
