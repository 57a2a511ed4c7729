//! Taking a lock that a thread which panicked may have held.

use std::sync::{Mutex, MutexGuard};

/// Locks, whether or not another thread panicked: what these locks guard is replaced whole, never
/// half-written.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
