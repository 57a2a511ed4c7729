//! Stores of versions: checkpoints of a VM, or a snapshot.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
};

use bytes::Bytes;

use crate::{PAGE_SIZE, PageSet};

/// The content of a page of a version; `None` stands for zeros.
pub type PageContent<'a> = Option<&'a [u8; PAGE_SIZE]>;

/// Pages that [`VersionStore::restore`] reads at once: 1 MiB.
const RESTORE_PAGES: usize = 256;

/// Keeps the RAM and the state of one VM as of one moment: its *version*.
///
/// It is the second trait of stores. A [`PageStore`](super::PageStore) keeps the newest put of each
/// page, for others who know its generation; nothing in it says that pages belong together. A
/// version is complete in itself: all its pages and its state are of one moment. What was put
/// counts only from its [commit](Self::commit) on, whole or not at all, and until then the version
/// before it stays. A store may keep one version only, such as a snapshot, or build each version on
/// the one before, such as checkpoints.
///
/// Pages are put in any order and any number of times; the last put counts. They are read back as a
/// whole ([`restore`](Self::restore)) or at random ([`read`](Self::read)), so that a VM can be
/// started before all of its RAM was read. Zeros are a content like any other here, and take no
/// room.
///
/// Errors are those of the medium, with an [`ErrorKind`] that the caller can act on. After a failed
/// `put` or `commit` the caller [discards](Self::discard) what was put.
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
    /// Takes a page of the next version. If it was put before since the last commit, this is its
    /// newer content.
    ///
    /// # Errors
    /// Returns an error if the page cannot be kept. The version then fails, and the last committed
    /// one stays.
    fn put(&mut self, page: u64, content: PageContent<'_>) -> io::Result<()>;

    /// Makes a version of everything that was put since the last commit, of the pages of the
    /// version before that were not put since, and of `state`: an encoded
    /// [`VmState`](crate::state::VmState), or in a snapshot an encoded
    /// [`SavedVm`](crate::snapshot::SavedVm). It is as durable as the store makes anything when
    /// this returns.
    ///
    /// # Errors
    /// Returns what the medium says. The last committed version stays.
    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()>;

    /// Forgets what was put since the last commit.
    fn discard(&mut self);

    /// Returns number and state of the last committed version.
    fn latest(&self) -> Option<(u32, Bytes)>;

    /// Returns which pages the last committed version has, those of zeros included. The set is
    /// empty if nothing was committed. Its capacity is the number of the VM's pages, or just enough
    /// for the last page if the store does not know that number.
    ///
    /// # Errors
    /// Returns what the medium says.
    fn list(&mut self) -> io::Result<PageSet>;

    /// Reads pages of the last committed version, which ascend by page number, and hands each of
    /// them to `take` once, in this order.
    ///
    /// # Errors
    /// Returns [`ErrorKind::InvalidInput`] if the pages do not ascend or one of them is not in the
    /// version: it is missing, and not zeros. Returns what the medium says, and what `take`
    /// returns. What was handed out before an error is good.
    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()>;

    /// Hands out every page of the last committed version in ascending order.
    ///
    /// # Errors
    /// Returns an error if a page cannot be read, or `take` fails: the VM must not be started then.
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

/// Checks what every store refuses in a [`read`](VersionStore::read): pages that do not ascend. An
/// implementation calls it first.
///
/// # Errors
/// Returns [`ErrorKind::InvalidInput`].
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

/// Keeps versions in memory. They die with this process.
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

    /// Reads as most stores do: without a `restore` of its own.
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
