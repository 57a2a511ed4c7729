//! Checkpoints of a VM that runs elsewhere, and where they are kept.
//!
//! A checkpoint is the set of pages that were written since the one before, and the state of vCPUs and devices, all of one
//! moment. The first one builds on what RAM held when the VM was handed over. Increments come page by page; each is
//! applied whole or not at all: what was put counts only from its [commit](CheckpointStore::commit) on.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;

use crate::{PAGE_SIZE, fence::Fence, vm::VmId};

/// A page of a checkpoint; `None` stands for zeros.
pub type PageData<'a> = Option<&'a [u8; PAGE_SIZE]>;

/// Keeps the checkpoints of one VM, merged into the last one; or a single one, which is a snapshot.
pub trait CheckpointStore: Send {
    /// Takes a page of the next checkpoint. If it was put before since the last commit, this is its newer content.
    ///
    /// # Errors
    /// When it cannot be kept. The checkpoint then fails, and the last committed one stays.
    fn put(&mut self, page: u64, data: PageData<'_>) -> io::Result<()>;

    /// Everything that was put since the last commit, and `state` (an encoded [`VmState`](crate::state::VmState), in a snapshot an
    /// encoded [`SavedVm`](crate::snapshot::SavedVm)), are checkpoint `number` from now on: as durable as the store makes anything when this returns.
    ///
    /// # Errors
    /// The last committed checkpoint stays.
    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()>;

    /// Forgets what was put since the last commit.
    fn discard(&mut self);

    /// Number and state of the last committed checkpoint.
    fn latest(&self) -> Option<(u32, Bytes)>;

    /// Hands out every page of the last committed checkpoint, those of earlier ones that it did not replace included, in
    /// ascending order.
    ///
    /// # Errors
    /// When one cannot be read, or `take` fails: the VM must not be started then.
    fn restore(&mut self, take: &mut dyn FnMut(u64, PageData<'_>) -> io::Result<()>) -> io::Result<()>;
}

impl<S: CheckpointStore + ?Sized> CheckpointStore for Box<S> {
    fn put(&mut self, page: u64, data: PageData<'_>) -> io::Result<()> {
        (**self).put(page, data)
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

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageData<'_>) -> io::Result<()>) -> io::Result<()> {
        (**self).restore(take)
    }
}

/// Where a destination finds the forward checkpoint of a VM whose source has died.
pub trait ForwardStores: Send + Sync {
    /// The store into which the source of this VM, of `pages` pages, has put what it left behind in the attempt with this
    /// epoch.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    fn open(&self, vm: VmId, epoch: u32, pages: u64) -> io::Result<Box<dyn CheckpointStore>>;

    /// It is not needed any more, if there is one.
    fn done(&self, vm: VmId, epoch: u32);
}

/// Protects a VM against the death of one side while the source still has pages that the destination lacks.
///
/// *Reverse* checkpoints (PostCopyFT: Fernando, Terner, Gopalan and Yang, INFOCOM 2019) go back from the destination at
/// intervals; if it dies the VM runs on at the source, from the last one (the first is the hand-over itself), and nobody has
/// seen output of anything later. A *forward* checkpoint (V-Recover, by the same group) is put into a store that both sides
/// reach before the hand-over; if the source dies the destination takes from there what it lacks, and loses nothing.
#[derive(Clone)]
pub struct FailSafe {
    /// From the end of one reverse checkpoint to the beginning of the next.
    pub interval: Duration,
    /// How long the other side may be silent (half a second at the least), or its link lost, before it counts as dead. Safety
    /// does not depend on it: the fence is asked before anything restarts.
    pub detect: Duration,
    /// Where reverse checkpoints are kept, of this attempt only; `None` for none.
    pub reverse: Option<Arc<Mutex<dyn CheckpointStore>>>,
    /// Where the forward checkpoint goes, of this attempt only; `None` for none. It has to outlive this host.
    pub forward: Option<Arc<Mutex<dyn CheckpointStore>>>,
    /// Makes certain that the destination is dead.
    pub fence: Arc<dyn Fence>,
}

impl FailSafe {
    /// Reverse checkpoints in memory, every 100 ms.
    pub fn in_memory(fence: Arc<dyn Fence>) -> Self {
        Self {
            interval: Duration::from_millis(100),
            detect: Duration::from_secs(1),
            reverse: Some(Arc::new(Mutex::new(MemoryStore::default()))),
            forward: None,
            fence,
        }
    }
}

type Pages = BTreeMap<u64, Option<Box<[u8; PAGE_SIZE]>>>;

/// Checkpoints in memory: they die with this process, which is the side that the VM would be restarted on.
#[derive(Default)]
pub struct MemoryStore {
    staged: Pages,
    pages: Pages,
    latest: Option<(u32, Bytes)>,
}

impl CheckpointStore for MemoryStore {
    fn put(&mut self, page: u64, data: PageData<'_>) -> io::Result<()> {
        self.staged.insert(page, data.map(|data| Box::new(*data)));
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

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageData<'_>) -> io::Result<()>) -> io::Result<()> {
        self.pages.iter().try_for_each(|(&page, data)| take(page, data.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(store: &mut dyn CheckpointStore) -> Vec<(u64, u8)> {
        let mut pages = Vec::new();
        store
            .restore(&mut |page, data| {
                pages.push((page, data.map_or(0, |data| data[7])));
                Ok(())
            })
            .unwrap();
        pages
    }

    #[test]
    fn a_checkpoint_counts_from_its_commit_on() {
        counts_from_its_commit_on(MemoryStore::default());
        counts_from_its_commit_on(Box::new(MemoryStore::default()));
    }

    fn counts_from_its_commit_on(mut store: impl CheckpointStore) {
        store.put(3, Some(&[1; PAGE_SIZE])).unwrap();
        store.put(9, None).unwrap();
        assert!(store.latest().is_none() && contents(&mut store).is_empty());
        store.commit(1, Bytes::from_static(b"one")).unwrap();
        assert_eq!(contents(&mut store), [(3, 1), (9, 0)]);
        // the next one is cut in the middle
        store.put(3, Some(&[2; PAGE_SIZE])).unwrap();
        store.put(4, Some(&[2; PAGE_SIZE])).unwrap();
        store.discard();
        assert_eq!(contents(&mut store), [(3, 1), (9, 0)]);
        // and comes again
        store.put(9, Some(&[3; PAGE_SIZE])).unwrap();
        store.commit(3, Bytes::from_static(b"three")).unwrap();
        assert_eq!(contents(&mut store), [(3, 1), (9, 3)]);
        assert_eq!(store.latest(), Some((3, Bytes::from_static(b"three"))));
    }
}
