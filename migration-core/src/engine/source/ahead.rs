//! Forward checkpoints: what the destination will lack is put into a store before the hand-over, so that the source may die
//! after it.

use super::*;
use crate::{PageRange, checkpoint::CheckpointStore, vm::VmError};

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
            pages.clear();
            self.vm.tracker().harvest(&mut pages)?;
            self.harvested.union_with(&pages);
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
        let mut pages = self.left.pages();
        pages.subtract(&self.saved);
        self.put(&store, &pages)?;
        lock(&store).commit(1, self.handed_over.clone()).map_err(not_put)
    }

    fn put(&mut self, store: &Mutex<dyn CheckpointStore>, pages: &PageSet) -> Result<(), MigrationError> {
        // a paused guest writes nothing: there is nothing to re-arm for
        let rearm = if self.paused { None } else { self.vm.tracker().rearm() };
        let (ram, mut page) = (self.ram.clone(), [0; PAGE_SIZE]);
        for stripe in stripes(0, 1, pages.capacity()) {
            let range = stripe_pages(stripe);
            if pages.count_in(range) == 0 {
                continue;
            }
            if let Some(rearm) = &rearm {
                rearm.before_read(range, pages)?;
            }
            for number in pages.ranges_in(range).flat_map(PageRange::pages) {
                let memory = ram.slice(PageRange::new(number, 1))?;
                // into a copy first: the guest may write between two looks
                memory.copy_to(&mut page);
                let data = page.iter().any(|&byte| byte != 0).then_some(&page);
                lock(store).put(number, data).map_err(not_put)?;
                self.saved.insert(number);
            }
            while let Some(input) = self.next_input(Instant::now())? {
                if let Input::Control(epoch, frame) = input {
                    self.frame(epoch, frame)?;
                }
            }
        }
        Ok(())
    }
}

fn not_put(cause: io::Error) -> MigrationError {
    MigrationError::Vm {
        step: "putting pages into the forward checkpoint",
        cause: VmError::because("the store", cause),
    }
}
