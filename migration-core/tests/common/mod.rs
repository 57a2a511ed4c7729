//! What several test binaries use.

use std::sync::{Arc, Mutex};

use migration_core::{
    PageRange, PageSet,
    strategy::{Linear, PushOrder},
};

/// Keeps the heat of which it is told.
pub struct Told(pub Arc<Mutex<Vec<u8>>>, pub Linear);

impl PushOrder for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        *self.0.lock().unwrap() = heat.to_vec();
        self.1.begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        self.1.fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        self.1.next(unsent, most)
    }
}
