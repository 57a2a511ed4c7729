//! Forward checkpoints. The pages that the destination will lack are put into a store before the
//! hand-over, so that the source may die after it.

use super::*;
use crate::{
    engine::pages::not_put,
    store::{PageContent, VersionStore},
};

/// The most passes over the memory of the running guest. Each pass puts the pages that were written
/// during the one before.
const PASSES: usize = 3;
/// The passes end when at most this number of pages is left for the pause.
const FEW: u64 = 1024;

impl Engine<'_> {
    fn checkpoint_store(&self) -> Option<Arc<Mutex<dyn VersionStore>>> {
        self.options.fail_safe.as_ref()?.forward.clone()
    }

    /// Puts the pages of the forward checkpoint while the guest runs, before anything is sent.
    pub(super) fn put_checkpoint(&mut self) -> Result<(), MigrationError> {
        let Some(store) = self.checkpoint_store() else { return Ok(()) };
        let mut pages = self.start_tracking()?;
        for _ in 0..PASSES {
            self.put(&store, &pages)?;
            let harvest = self.rounds.harvest(self.vm)?;
            self.fail_safe.saved.subtract(&harvest.written);
            pages = harvest.pages;
            if pages.len() <= FEW {
                break;
            }
        }
        Ok(())
    }

    /// Completes the forward checkpoint while the guest is paused: puts the remaining pages that
    /// were written after they were put, and commits.
    pub(super) fn put_rest_of_checkpoint(&mut self) -> Result<(), MigrationError> {
        let Some(store) = self.checkpoint_store() else { return Ok(()) };
        let mut pages = self.rounds.map().unclaimed().clone();
        pages.subtract(&self.fail_safe.saved);
        self.put(&store, &pages)?;
        lock(&store).commit(1, self.fail_safe.handed_over.clone()).map_err(not_put)
    }

    fn put(&mut self, store: &Mutex<dyn VersionStore>, pages: &PageSet) -> Result<(), MigrationError> {
        let rearm = self.rounds.rearm(self.vm.tracker(), self.guest.paused);
        for stripe in RoundDriver::stripes(pages) {
            let mut put_one = |number, data: PageContent<'_>| {
                lock(store).put(number, data)?;
                self.fail_safe.saved.insert(number);
                Ok(())
            };
            self.rounds.read(stripe, pages, rearm.as_deref(), &mut put_one)?;
            self.heed()?;
            self.within_pause()?;
        }
        Ok(())
    }
}
