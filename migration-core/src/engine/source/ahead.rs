//! Forward checkpoints: what the destination will lack is put into a store before the hand-over, so that the source may die
//! after it.

use super::*;
use crate::{
    checkpoint::{CheckpointStore, PageData},
    engine::pages::{self, not_put},
};

/// Passes over the running guest's memory, at most: each puts what was written during the one before.
const PASSES: usize = 3;
/// As few pages as these are left to the pause.
const FEW: u64 = 1024;

impl Engine<'_> {
    fn store_ahead(&self) -> Option<Arc<Mutex<dyn CheckpointStore>>> {
        self.options.fail_safe.as_ref()?.forward.clone()
    }

    /// While the guest runs, and before anything is sent.
    pub(super) fn put_ahead(&mut self) -> Result<(), MigrationError> {
        let Some(store) = self.store_ahead() else { return Ok(()) };
        let mut pages = self.start_tracking()?;
        for _ in 0..PASSES {
            self.put(&store, &pages)?;
            pages = self.tracking.harvest(self.vm.tracker())?;
            self.saved.subtract(&pages);
            if pages.len() <= FEW {
                break;
            }
        }
        Ok(())
    }

    /// While the guest is paused: what is left behind, and was written after it was put.
    pub(super) fn put_rest_ahead(&mut self) -> Result<(), MigrationError> {
        let Some(store) = self.store_ahead() else { return Ok(()) };
        let mut pages = self.map().unclaimed().clone();
        pages.subtract(&self.saved);
        self.put(&store, &pages)?;
        lock(&store).commit(1, self.handed_over.clone()).map_err(not_put)
    }

    fn put(&mut self, store: &Mutex<dyn CheckpointStore>, pages: &PageSet) -> Result<(), MigrationError> {
        // a paused guest writes nothing: there is nothing to re-arm for
        let rearm = if self.paused { None } else { self.tracking.rearm(self.vm.tracker()) };
        let ram = self.ram.clone();
        for stripe in stripes(0, 1, pages.capacity()) {
            let range = stripe_pages(stripe);
            if pages.count_in(range) == 0 {
                continue;
            }
            let mut put_one = |number, data: PageData<'_>| {
                lock(store).put(number, data)?;
                self.saved.insert(number);
                Ok(())
            };
            pages::put(&*ram, range, pages, rearm.as_deref(), &mut put_one)?;
            self.heed()?;
            self.within_pause()?;
        }
        Ok(())
    }
}
