//! The open connections of a receiver, their stages, and the choice of the connection that is
//! closed if there are too many.
//!
//! The number of unidentified connections is bounded. If there are too many, the oldest one is
//! closed. A connection does not count as unidentified any more when it names a current session, or
//! when its hello is accepted. From then on the session bounds the number of its connections.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::channel::Closer;

/// The largest number of open connections that have sent nothing. If there is one more, the oldest
/// is closed: an honest peer introduces itself within a round trip, so the newest one may still do
/// so.
pub(super) const MAX_SILENT: usize = 64;
/// The largest number of open connections that begin a session and whose hello is not accepted yet.
/// They are counted separately, so that connections that send nothing cannot displace them.
pub(super) const MAX_GREETING: usize = 16;

/// The largest number of open connections that name a current session, and whose first frame has
/// not arrived yet.
pub(super) const MAX_RETURNING: usize = 8;

/// What is known about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing: it has sent nothing yet.
    Silent,
    /// It wants to begin a session.
    Greeting,
    /// It wants to continue a current session.
    Returning,
    /// It belongs to a current session.
    Identified,
    /// This side has closed it, for this reason. Its thread is about to end.
    Closed(&'static str),
}

struct Connection {
    closer: Arc<dyn Closer>,
    stage: Stage,
    /// The time at which the connection reached its stage.
    since: Instant,
}

/// All connections that are open.
#[derive(Default)]
pub(super) struct Connections {
    /// The connections by number. A newer connection has a higher number.
    open: HashMap<u64, Connection>,
    /// Whether the receiver has ended, so that no connection is accepted any more.
    ended: bool,
}

impl Connections {
    /// Adds a connection that was just accepted. Returns false if the receiver has ended.
    pub(super) fn enter(&mut self, id: u64, closer: Arc<dyn Closer>) -> bool {
        if self.ended {
            return false;
        }
        self.open.insert(id, Connection { closer, stage: Stage::Silent, since: Instant::now() });
        self.make_room(Stage::Silent, MAX_SILENT);
        true
    }

    /// Moves a connection to its next stage. Returns false if it was closed in between.
    pub(super) fn advance(&mut self, id: u64, stage: Stage) -> bool {
        let Some(connection) = self.open.get_mut(&id) else { return false };
        if matches!(connection.stage, Stage::Closed(_)) {
            return false;
        }
        (connection.stage, connection.since) = (stage, Instant::now());
        self.make_room(Stage::Greeting, MAX_GREETING);
        self.make_room(Stage::Returning, MAX_RETURNING);
        true
    }

    /// Returns the reason why this side has closed the connection, if it has.
    pub(super) fn why_closed(&self, id: u64) -> Option<&'static str> {
        match self.open.get(&id)?.stage {
            Stage::Closed(why) => Some(why),
            _ => None,
        }
    }

    /// Removes a connection whose thread ends.
    pub(super) fn remove(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// Closes unidentified connections that have been in their stage for longer than `limit`,
    /// however many bytes they have sent.
    pub(super) fn close_overdue(&mut self, limit: Duration) {
        for connection in self.open.values_mut() {
            let unknown = matches!(connection.stage, Stage::Silent | Stage::Greeting | Stage::Returning);
            if unknown && connection.since.elapsed() >= limit {
                connection.close("it has not introduced itself in time");
            }
        }
    }

    /// Closes the oldest connection that has sent nothing, because its descriptor or its thread is
    /// needed. If `newest` is given, the connection must be older than that one. Returns false if
    /// there is none.
    pub(super) fn close_oldest_silent(&mut self, newest: Option<u64>) -> bool {
        self.close_oldest(Stage::Silent, newest)
    }

    /// Closes all connections, and accepts none any more.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.open.values().for_each(|connection| connection.closer.close());
    }

    fn make_room(&mut self, stage: Stage, most: usize) {
        if self.open.values().filter(|connection| connection.stage == stage).count() > most {
            self.close_oldest(stage, None);
        }
    }

    fn close_oldest(&mut self, stage: Stage, newest: Option<u64>) -> bool {
        let older = |id: u64| newest.is_none_or(|newest| id < newest);
        let at_stage = self.open.iter_mut().filter(|(id, connection)| connection.stage == stage && older(**id));
        let oldest = at_stage.min_by_key(|(id, connection)| (connection.since, **id));
        let Some((_, connection)) = oldest else { return false };
        connection.close("it has not introduced itself, and others need its place");
        true
    }
}

impl Connection {
    fn close(&mut self, why: &'static str) {
        self.stage = Stage::Closed(why);
        self.closer.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Default)]
    struct End(AtomicBool);

    impl Closer for End {
        fn close(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn enter(connections: &mut Connections, id: u64) -> Arc<End> {
        let end = Arc::new(End::default());
        assert!(connections.enter(id, end.clone()));
        end
    }

    #[test]
    fn the_oldest_silent_one_gives_way_and_never_one_that_has_shown_something() {
        let mut connections = Connections::default();
        let lane = enter(&mut connections, 0);
        assert!(connections.advance(0, Stage::Identified));
        let hello = enter(&mut connections, 1);
        assert!(connections.advance(1, Stage::Greeting));
        let silent: Vec<_> = (2..1002).map(|id| enter(&mut connections, id)).collect();
        let open = |end: &Arc<End>| !end.0.load(Ordering::Relaxed);
        assert!(open(&lane) && open(&hello));
        let left: Vec<_> = silent.iter().map(open).collect();
        assert!(left[..1000 - MAX_SILENT].iter().all(|open| !open), "the older ones are closed");
        assert!(left[1000 - MAX_SILENT..].iter().all(|open| *open), "the newest ones stay");
        assert!(connections.why_closed(2).is_some() && connections.why_closed(1001).is_none());
        // it was closed before
        assert!(!connections.advance(2, Stage::Identified));
        assert!(connections.advance(1001, Stage::Identified));
    }

    #[test]
    fn none_gives_way_to_itself_or_to_an_older_one() {
        let mut connections = Connections::default();
        let ends: Vec<_> = (0..3).map(|id| enter(&mut connections, id)).collect();
        assert!(connections.advance(0, Stage::Identified));
        assert!(!connections.close_oldest_silent(Some(1)));
        assert!(connections.close_oldest_silent(Some(2)));
        assert!(!connections.close_oldest_silent(Some(2)));
        assert!(connections.close_oldest_silent(None));
        let closed: Vec<_> = ends.iter().map(|end| end.0.load(Ordering::Relaxed)).collect();
        assert_eq!(closed, [false, true, true]);
    }

    #[test]
    fn one_that_has_ended_has_no_place_to_give() {
        let mut connections = Connections::default();
        let _end = enter(&mut connections, 0);
        connections.remove(0);
        assert!(!connections.close_oldest_silent(None));
    }

    #[test]
    fn greetings_have_places_of_their_own() {
        let mut connections = Connections::default();
        let ends: Vec<_> = (0..100)
            .map(|id| {
                let end = enter(&mut connections, id);
                assert!(connections.advance(id, Stage::Greeting));
                end
            })
            .collect();
        let open = ends.iter().filter(|end| !end.0.load(Ordering::Relaxed)).count();
        assert_eq!(open, MAX_GREETING);
        assert!(!ends[99].0.load(Ordering::Relaxed));
    }

    #[test]
    fn whoever_is_not_identified_has_a_deadline() {
        let mut connections = Connections::default();
        let (silent, hello, lane) =
            (enter(&mut connections, 0), enter(&mut connections, 1), enter(&mut connections, 2));
        assert!(connections.advance(1, Stage::Greeting) && connections.advance(2, Stage::Identified));
        connections.close_overdue(Duration::from_secs(3600));
        let open = |end: &Arc<End>| !end.0.load(Ordering::Relaxed);
        assert!(open(&silent) && open(&hello));
        connections.close_overdue(Duration::ZERO);
        assert!(!open(&silent) && !open(&hello) && open(&lane));
        connections.end();
        assert!(!open(&lane));
        assert!(!connections.enter(3, Arc::new(End::default())));
    }

    #[test]
    fn those_that_come_back_have_few_places_until_they_say_with_what() {
        let mut connections = Connections::default();
        let ends: Vec<_> = (0..2 * MAX_RETURNING as u64).map(|id| enter(&mut connections, id)).collect();
        for id in 0..ends.len() as u64 {
            assert!(connections.advance(id, Stage::Returning));
        }
        let closed = |end: &Arc<End>| end.0.load(Ordering::Relaxed);
        assert_eq!(ends.iter().filter(|end| closed(end)).count(), MAX_RETURNING);
        let last = ends.len() as u64 - 1;
        assert!(connections.advance(last, Stage::Identified));
        connections.close_overdue(Duration::ZERO);
        // the time limit does not apply to the identified connection
        assert_eq!(ends.iter().filter(|end| !closed(end)).count(), 1);
    }
}
