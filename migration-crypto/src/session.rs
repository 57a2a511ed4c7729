//! Sessions: the secret on which the first channel agreed, and which every further channel must
//! know.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    Suite,
    handshake::{Agreed, HandshakeError},
    secret::Secret,
};

/// The largest number of sessions that a destination remembers. It receives one VM at a time, so
/// more than a few are failed attempts.
const MAX_SESSIONS: usize = 64;

/// A session, as both sides know it.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) id: [u8; 16],
    pub(crate) suite: Suite,
    /// The secret that keys the handshakes of further channels.
    pub(crate) resumption: Secret,
}

impl Session {
    pub(crate) fn new(agreed: &Agreed) -> Self {
        let mut id = [0; 16];
        agreed.secret.expand(&[b"session id"], &mut id);
        Self { id, suite: agreed.suite, resumption: agreed.secret.derive(&[b"further channels"]) }
    }
}

/// A session at the source.
#[derive(Debug)]
pub(crate) struct SourceState {
    pub(crate) session: Session,
    /// The number of channels opened after the first.
    pub(crate) opened: u32,
}

/// The sessions of a destination, in the order of their last use, the most recent at the end.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Vec<Remembered>>);

#[derive(Debug)]
struct Remembered {
    session: Session,
    window: ReplayWindow,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Vec<Remembered>> {
        // no code that can panic runs under this lock
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session whose source has proved that it is present. If the list is full, the session
    /// that was unused for the longest time is removed.
    pub(crate) fn insert(&self, session: Session) {
        let mut known = self.lock();
        if known.len() >= MAX_SESSIONS {
            known.remove(0);
        }
        known.push(Remembered { session, window: ReplayWindow::default() });
    }

    pub(crate) fn find(&self, id: &[u8; 16]) -> Result<Session, HandshakeError> {
        let known = self.lock();
        let found = known.iter().find(|known| known.session.id == *id);
        found.map(|known| known.session.clone()).ok_or(HandshakeError::UnknownSession)
    }

    /// Records that the first message of channel `counter` was authentic. Each counter is accepted
    /// once.
    pub(crate) fn accept(&self, id: &[u8; 16], counter: u32) -> Result<(), HandshakeError> {
        let mut known = self.lock();
        let at = known.iter().position(|known| known.session.id == *id).ok_or(HandshakeError::UnknownSession)?;
        if !known[at].window.accept(counter) {
            return Err(HandshakeError::UnknownSession);
        }
        known[at..].rotate_left(1);
        Ok(())
    }
}

/// The counters that were accepted (an anti-replay window, as in RFC 4303, 3.4.3).
#[derive(Debug, Default)]
struct ReplayWindow {
    newest: u32,
    /// Bit *n* is set if `newest - n` was accepted. Counters further back than 63 are refused,
    /// which loses nothing because a source opens its channels one after another.
    bits: u64,
}

impl ReplayWindow {
    /// Returns whether `counter` is new, and records it.
    fn accept(&mut self, counter: u32) -> bool {
        if counter > self.newest {
            let ahead = counter - self.newest;
            self.bits = self.bits.checked_shl(ahead).unwrap_or(0) | 1;
            self.newest = counter;
            return true;
        }
        let behind = self.newest - counter;
        let bit = 1u64.checked_shl(behind).unwrap_or(0);
        let fresh = bit != 0 && self.bits & bit == 0;
        self.bits |= bit;
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: u8) -> Session {
        Session { id: [id; 16], suite: Suite::Aes256Gcm, resumption: Secret::new([id; 32]) }
    }

    #[test]
    fn each_counter_is_accepted_once() {
        let mut window = ReplayWindow::default();
        let fresh: Vec<bool> = [1, 2, 2, 5, 4, 4, 3, 1, 200, 5, 199, 137, 136].map(|n| window.accept(n)).into();
        let due = [true, true, false, true, true, false, true, false, true, false, true, true, false];
        assert_eq!(fresh, due);
    }

    #[test]
    fn the_number_of_sessions_is_bounded_and_the_used_ones_stay() {
        let sessions = Sessions::default();
        for id in 0..MAX_SESSIONS as u8 {
            sessions.insert(session(id));
        }
        sessions.accept(&[0; 16], 1).unwrap();
        sessions.insert(session(200));
        assert!(sessions.find(&[0; 16]).is_ok() && sessions.find(&[200; 16]).is_ok());
        assert!(matches!(sessions.find(&[1; 16]), Err(HandshakeError::UnknownSession)));
        assert!(matches!(sessions.accept(&[0; 16], 1), Err(HandshakeError::UnknownSession)));
        assert_eq!(sessions.lock().len(), MAX_SESSIONS);
    }
}
