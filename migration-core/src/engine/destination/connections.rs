//! The open connections of a receiver: what each has shown of itself, and which one gives way when
//! there are too many.
//!
//! Whoever has proved nothing holds one of a few places, and only until somebody else needs it. A
//! connection leaves these places when it names the session that is under way here, or when its
//! hello is accepted: from then on the session bounds how many there are.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::channel::Closer;

/// Connections that may be open at once of which nothing is known. With one more, the oldest is
/// closed: a peer in good faith introduces itself in a round trip, the newest one is the one that
/// may still do so.
pub(super) const MAX_SILENT: usize = 64;
/// Connections that may be open at once that have said that they begin a session, and whose hello
/// has not come or is not accepted yet. They have places of their own, so that those who say
/// nothing cannot close them.
pub(super) const MAX_GREETING: usize = 16;

/// Connections that may be open at once that name the session which is under way here, and have not
/// said yet with what they come back to it.
pub(super) const MAX_RETURNING: usize = 8;

/// What a connection has shown of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing yet.
    Silent,
    /// That it wants to begin a session.
    Greeting,
    /// That it wants to go on with the session that is under way here.
    Returning,
    /// That it belongs to the session that is under way here.
    Identified,
    /// It was closed here, for this reason; its thread is about to end.
    Closed(&'static str),
}

struct Connection {
    closer: Arc<dyn Closer>,
    stage: Stage,
    /// When it came to its stage.
    since: Instant,
}

/// All connections that are open.
#[derive(Default)]
pub(super) struct Connections {
    /// Numbers ascend in the order in which connections came.
    open: HashMap<u64, Connection>,
    /// The receiver has ended: no connection is wanted any more.
    ended: bool,
}

impl Connections {
    /// Enters a connection that has just come. False if none is wanted any more.
    pub(super) fn enter(&mut self, id: u64, closer: Arc<dyn Closer>) -> bool {
        if self.ended {
            return false;
        }
        self.open.insert(id, Connection { closer, stage: Stage::Silent, since: Instant::now() });
        self.make_room(Stage::Silent, MAX_SILENT);
        true
    }

    /// A connection has shown what it is. False if it was closed meanwhile.
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

    /// Why this connection was closed here, if it was.
    pub(super) fn why_closed(&self, id: u64) -> Option<&'static str> {
        match self.open.get(&id)?.stage {
            Stage::Closed(why) => Some(why),
            _ => None,
        }
    }

    /// Its thread has ended.
    pub(super) fn remove(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// Closes those that have not come to the next stage for so long, however many bytes they have
    /// sent.
    pub(super) fn close_overdue(&mut self, limit: Duration) {
        for connection in self.open.values_mut() {
            let unknown = matches!(connection.stage, Stage::Silent | Stage::Greeting | Stage::Returning);
            if unknown && connection.since.elapsed() >= limit {
                connection.close("it has not introduced itself in time");
            }
        }
    }

    /// Closes the oldest connection of which nothing is known, as its descriptor or its thread is
    /// needed: one that came before the connection `newest`, if that is given. False if there is
    /// none.
    pub(super) fn close_oldest_silent(&mut self, newest: Option<u64>) -> bool {
        self.close_oldest(Stage::Silent, newest)
    }

    /// Closes everything, and takes nothing in any more.
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
        // too late
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
        // only the one that is identified may take its time
        assert_eq!(ends.iter().filter(|end| !closed(end)).count(), 1);
    }
}
