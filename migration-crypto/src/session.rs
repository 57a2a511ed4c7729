//! Sessions: what a first channel has agreed on, and every further one must prove to know.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    Suite,
    handshake::{Agreed, HandshakeError},
    secret::Secret,
};

/// Sessions that a destination remembers. It receives one VM at a time; what is beyond that are attempts that failed.
const MAX_SESSIONS: usize = 64;

/// A session, as both sides know it.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) id: [u8; 16],
    pub(crate) suite: Suite,
    /// Keys the handshakes of further channels.
    pub(crate) resumption: Secret,
}

impl Session {
    pub(crate) fn new(agreed: &Agreed) -> Self {
        let mut id = [0; 16];
        agreed.secret.expand(&[b"session id"], &mut id);
        Self { id, suite: agreed.suite, resumption: agreed.secret.derive(&[b"further channels"]) }
    }
}

/// A session at its source, which counts the channels.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) session: Session,
    pub(crate) opened: u32,
}

/// The sessions of a destination, the one used last at the end.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Vec<Known>>);

#[derive(Debug)]
struct Known {
    session: Session,
    seen: Seen,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Vec<Known>> {
        // no code that can panic runs under this lock
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a session whose source has proved that it is here. The one that was not used for longest makes room.
    pub(crate) fn insert(&self, session: Session) {
        let mut known = self.lock();
        if known.len() >= MAX_SESSIONS {
            known.remove(0);
        }
        known.push(Known { session, seen: Seen::default() });
    }

    pub(crate) fn find(&self, id: &[u8; 16]) -> Result<Session, HandshakeError> {
        let known = self.lock();
        let found = known.iter().find(|known| known.session.id == *id);
        found.map(|known| known.session.clone()).ok_or(HandshakeError::UnknownSession)
    }

    /// Notes that a channel's first message was authentic; each is taken once.
    pub(crate) fn accept(&self, id: &[u8; 16], counter: u32) -> Result<(), HandshakeError> {
        let mut known = self.lock();
        let at = known.iter().position(|known| known.session.id == *id).ok_or(HandshakeError::UnknownSession)?;
        if !known[at].seen.take(counter) {
            return Err(HandshakeError::UnknownSession);
        }
        known[at..].rotate_left(1);
        Ok(())
    }
}

/// Which counters have come.
#[derive(Debug, Default)]
struct Seen {
    newest: u32,
    /// Bit *n*: `newest - n` has come. What comes further behind is not taken: channels are opened one after another.
    bits: u64,
}

impl Seen {
    fn take(&mut self, counter: u32) -> bool {
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
    fn each_counter_is_taken_once() {
        let mut seen = Seen::default();
        let fresh: Vec<bool> = [1, 2, 2, 5, 4, 4, 3, 1, 200, 5, 199, 137, 136].map(|n| seen.take(n)).into();
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
