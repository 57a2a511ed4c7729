//! A place for a value of the VMM. A thread takes the value out to call it.

use std::{
    ops::{Deref, DerefMut},
    sync::{Condvar, Mutex},
};

use crate::lock::lock;

/// Holds a value until it is taken out permanently. A thread also takes the value out for a call,
/// so only one thread at a time calls it, and no lock is held during the call.
pub(in crate::engine) struct Place<T> {
    content: Mutex<Content<T>>,
    changed: Condvar,
}

enum Content<T> {
    Here(T),
    /// A thread has taken the value out for a call.
    InUse,
    Gone,
}

/// A value that was taken out for a call. Dropping this puts the value back.
pub(in crate::engine) struct InUse<'a, T> {
    place: &'a Place<T>,
    value: Option<T>,
}

impl<T> Place<T> {
    pub(in crate::engine) fn new(value: T) -> Self {
        Self { content: Mutex::new(Content::Here(value)), changed: Condvar::new() }
    }

    /// Takes the value out for a call. Waits first until no other thread calls it. Returns `None`
    /// if the value was taken out permanently.
    pub(in crate::engine) fn borrow(&self) -> Option<InUse<'_, T>> {
        let value = self.take_out(Content::InUse)?;
        Some(InUse { place: self, value: Some(value) })
    }

    /// Takes the value out permanently. Waits first until no other thread calls it. Returns `None`
    /// if the value was taken out permanently before.
    pub(in crate::engine) fn take(&self) -> Option<T> {
        self.take_out(Content::Gone)
    }

    fn take_out(&self, leave: Content<T>) -> Option<T> {
        let in_use = |content: &mut Content<T>| matches!(content, Content::InUse);
        let waited = self.changed.wait_while(lock(&self.content), in_use);
        let mut content = waited.unwrap_or_else(|e| e.into_inner());
        match std::mem::replace(&mut *content, leave) {
            Content::Here(value) => Some(value),
            Content::InUse | Content::Gone => {
                *content = Content::Gone;
                None
            }
        }
    }
}

impl<T> Deref for InUse<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("the value is put back only when this is dropped")
    }
}

impl<T> DerefMut for InUse<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("the value is put back only when this is dropped")
    }
}

impl<T> Drop for InUse<'_, T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            *lock(&self.place.content) = Content::Here(value);
            self.place.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn one_thread_at_a_time_has_the_value_and_it_goes_once() {
        let place = &Place::new(1);
        let mut used = place.borrow().unwrap();
        *used += 1;
        thread::scope(|scope| {
            let (tx, taken) = mpsc::channel();
            scope.spawn(move || tx.send(place.take()).unwrap());
            assert!(taken.try_recv().is_err(), "it is in use");
            drop(used);
            assert_eq!(taken.recv().unwrap(), Some(2));
        });
        assert!(place.borrow().is_none() && place.take().is_none());
    }

    #[test]
    fn a_call_that_panics_puts_the_value_back() {
        let place = Place::new(1);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _used = place.borrow();
            std::panic::resume_unwind(Box::new("a call"));
        }));
        assert!(panicked.is_err());
        assert_eq!(place.take(), Some(1));
    }
}
