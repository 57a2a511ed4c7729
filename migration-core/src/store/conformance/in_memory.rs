//! The store in memory, as a store under test.

use std::{sync::Arc, time::Duration};

use super::{Harm, TestStore};
use crate::store::{ManualClock, MemoryPageStore, NamespaceId, PageStore};

/// A [`MemoryPageStore`] of 4 MiB with a clock that the suite advances. Wrappers are tested around
/// it.
pub struct InMemory {
    store: Arc<MemoryPageStore>,
    clock: Arc<ManualClock>,
}

impl Default for InMemory {
    fn default() -> Self {
        let clock = Arc::new(ManualClock::default());
        Self { store: Arc::new(MemoryPageStore::with_clock("memory", 4 << 20, clock.clone())), clock }
    }
}

impl InMemory {
    /// Returns another handle of the store.
    pub fn shared(&self) -> Arc<MemoryPageStore> {
        Arc::clone(&self.store)
    }
}

impl TestStore for InMemory {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    fn lose_everything(&mut self) {
        self.store.lose_everything();
    }

    fn harm(&mut self, namespace: NamespaceId, page: u64, harm: Harm) -> bool {
        match harm {
            Harm::Lose => self.store.lose_page(namespace, page),
            Harm::Damage => self.store.damage_page(namespace, page),
            Harm::LoseTrailer => self.store.lose_trailer(namespace, page),
            Harm::MixUp(other) => self.store.mix_up_pages(namespace, other, page),
        }
    }
}
