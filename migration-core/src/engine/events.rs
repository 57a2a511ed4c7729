//! Passes events to the VMM's observer. A panic of the observer ends neither a thread of the engine
//! nor a migration.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::report::{Event, Observer};

/// A wrapper around the observer that the VMM gave. Every engine wraps the observer of its options
/// before anything else happens, so that all events pass through here.
pub(super) struct Guarded(Arc<dyn Observer>);

impl Guarded {
    pub(super) fn around(observer: &Arc<dyn Observer>) -> Arc<dyn Observer> {
        Arc::new(Self(observer.clone()))
    }
}

impl Observer for Guarded {
    fn event(&self, event: &Event) {
        // The engine's own state is not affected by the panic: an observer gets only a shared
        // reference to an event that was made for it. The observer itself is responsible for its
        // own state after a panic.
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.0.event(event))) {
            // Dropping the payload could panic as well.
            std::mem::forget(payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("the payload panics too");
        }
    }

    #[derive(Default)]
    struct Panics(AtomicU32);

    impl Observer for Panics {
        fn event(&self, _event: &Event) {
            self.0.fetch_add(1, Ordering::Relaxed);
            std::panic::resume_unwind(Box::new(Bomb));
        }
    }

    #[test]
    fn an_observer_that_has_panicked_is_told_of_the_next_event() {
        let observer = Arc::new(Panics::default());
        let guarded = Guarded::around(&(observer.clone() as Arc<dyn Observer>));
        for text in ["one", "two"] {
            guarded.event(&Event::Warning(text.into()));
        }
        assert_eq!(observer.0.load(Ordering::Relaxed), 2);
    }
}
