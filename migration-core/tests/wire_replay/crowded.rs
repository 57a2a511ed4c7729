//! A receiver that cannot accept another connection, and one that waits for its source only so
//! long.

use std::{
    io,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{Channel, Listener},
    engine::{ReceiveError, Receiver, ReceiverHandle, ReceiverOptions},
    protocol::DestinationPhase,
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    wire::{Control, ErrorCode, FEATURE_POST_COPY, LaneKind, Preamble, SEALED_MAGIC, SessionToken},
};

use crate::{
    HANG, VM,
    bounds::{end, hello_of},
    channels::{Door, End, Pipe, pair},
    destination::{Destination, Log, said},
    guest::{Arrived, Host, description},
    sessions::{lane, token_of},
    streams::{check, frames, stream},
};

fn host(to: mpsc::Sender<Arrived>) -> Host {
    Host { description: description(), to, paging: None }
}

/// Why no connection can be accepted, and for how long.
#[derive(Default)]
struct Shortage {
    /// Until this one ends.
    until_ended: Option<Arc<Pipe>>,
    /// How many connections in a row cannot be accepted.
    refusals: u64,
}

/// A listener whose process has no descriptors for a while.
struct Exhausted {
    door: Door,
    shortage: Arc<Mutex<Shortage>>,
    /// What waits, and cannot be accepted.
    waiting: Option<Box<dyn Channel>>,
}

impl Exhausted {
    fn is_exhausted(&self) -> bool {
        let shortage = self.shortage.lock().unwrap();
        shortage.refusals > 0 || shortage.until_ended.as_ref().is_some_and(|pipe| !pipe.lock().ended)
    }
}

impl Listener for Exhausted {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        if self.waiting.is_none() {
            self.waiting = self.door.accept(timeout)?;
        }
        Ok(if self.is_exhausted() { None } else { self.waiting.take() })
    }

    fn address(&self) -> String {
        self.door.address()
    }

    fn trouble(&mut self) -> Option<io::Error> {
        (self.waiting.is_some() && self.is_exhausted()).then(|| io::Error::other("too many open files"))
    }

    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        let mut shortage = self.shortage.lock().unwrap();
        shortage.refusals = shortage.refusals.saturating_sub(1);
        self.waiting.take()
    }
}

fn exhausted() -> (Destination, Arc<Mutex<Shortage>>) {
    let ((door, ends), shortage) = (mpsc::channel(), Arc::<Mutex<Shortage>>::default());
    let listener = Exhausted { door: Door(ends), shortage: shortage.clone(), waiting: None };
    (Destination::behind(listener, door, host), shortage)
}

fn hello() -> Vec<u8> {
    lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello_of(VM, 0, 2)])
}

#[test]
fn a_connection_that_has_sent_nothing_gives_way_to_one_that_cannot_be_accepted() {
    let (destination, shortage) = exhausted();
    let silent = destination.connect(&[]);
    // one behind it, which is read: so the silent one has been accepted
    let foreign = destination.connect(&[0xff; Preamble::LEN]);
    drop(foreign.outgoing.wait("the refusal of what is no source", |state| state.unread));
    shortage.lock().unwrap().until_ended = Some(silent.incoming.clone());
    let control = destination.connect(&hello());
    assert!(matches!(said(&control), Some(Control::Welcome(_))), "the source is refused");
    assert!(silent.incoming.lock().ended);
}

#[test]
fn a_connection_that_cannot_be_accepted_is_refused_and_the_user_is_told_once() {
    let (mut destination, shortage) = exhausted();
    for _ in 0..2 {
        shortage.lock().unwrap().refusals = 3;
        for _ in 0..3 {
            let (code, text) = end(&destination.connect(&hello()));
            assert!(code == ErrorCode::Resources && text.ends_with("too many open files"), "{code:?}: {text}");
        }
        // one that is accepted: from then on the next shortage is another one
        let foreign = destination.connect(&[0xff; Preamble::LEN]);
        drop(foreign.outgoing.wait("the refusal of what is no source", |state| state.unread));
    }
    destination.handle.stop();
    let _ = destination.door.send(None);
    destination.thread.take().unwrap().join().unwrap().unwrap_err();
    let told: Vec<_> = destination.log.try_iter().collect();
    let warned = told.iter().filter(|line| line.starts_with("no connection can be accepted")).count();
    let refused = told.iter().filter(|line| line.starts_with("the destination cannot take another")).count();
    assert_eq!((warned, refused), (2, 6), "{told:?}");
}

#[test]
fn a_session_fails_that_waits_for_a_lane_that_cannot_be_accepted() {
    let (destination, shortage) = exhausted();
    let control = destination.connect(&hello());
    let token = token_of(&control);
    let _first = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
    shortage.lock().unwrap().refusals = 1;
    let _second = destination.connect(&Preamble::new(LaneKind::Bulk, 1, token).encode());
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Resources && text.contains("too many open files"), "{code:?}: {text}");
}

/// Starts a thread, and waits until the receiver has heard of a VM: before that, the receiver does
/// not look at its patience again.
#[derive(Default)]
struct Paced(OnceLock<ReceiverHandle>);

impl Spawner for Paced {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>> {
        let thread = StdSpawner.spawn(role, impact, name, body)?;
        let deadline = Instant::now() + HANG;
        while self.0.get().unwrap().phase() == DestinationPhase::Empty {
            assert!(Instant::now() < deadline, "hangs: no hello is taken");
            thread::yield_now();
        }
        Ok(thread)
    }
}

/// Counts how often no connection came.
struct Ticking(Door, Arc<AtomicU64>);

impl Listener for Ticking {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let accepted = self.0.accept(timeout)?;
        self.1.fetch_add(u64::from(accepted.is_none()), Ordering::SeqCst);
        Ok(accepted)
    }

    fn address(&self) -> String {
        self.0.address()
    }
}

/// A receiver with this patience, at which a source has arrived whose *done* is still to come.
struct Served {
    destination: Destination,
    idle: Arc<AtomicU64>,
    control: End,
    _lanes: Vec<End>,
    done: Vec<u8>,
}

impl Served {
    fn new(patience: Duration) -> Self {
        let good = stream("pre-copy");
        let starts = frames(&good.lanes[0]);
        let (all, done) = good.lanes[0].split_at(starts[starts.len() - 2]);
        let ((door, ends), (log_tx, log), (to, arrived)) = (mpsc::channel(), mpsc::channel(), mpsc::channel());
        let (control, there) = pair();
        control.outgoing.write(all).unwrap();
        door.send(Some(there)).unwrap();
        let (paced, idle) = (Arc::new(Paced::default()), Arc::<AtomicU64>::default());
        let options = ReceiverOptions {
            patience: Some(patience),
            idle_timeout: HANG,
            observer: Arc::new(Log(Mutex::new(log_tx))),
            spawner: paced.clone(),
            ..ReceiverOptions::default()
        };
        let receiver = Receiver::new(host(to), drop, options);
        let handle = receiver.handle();
        assert!(paced.0.set(handle.clone()).is_ok());
        let mut listener = Ticking(Door(ends), idle.clone());
        let thread = Some(thread::spawn(move || receiver.run(&mut listener)));
        let destination = Destination { door, handle, thread, arrived, log };
        let mut lanes = Vec::new();
        loop {
            match said(&control).expect("the lane goes on") {
                Control::Welcome(welcome) => {
                    lanes.extend((0..2).map(|index| destination.connect(&good.bulk(index, welcome.session))));
                }
                Control::Running => break,
                _ => {}
            }
        }
        Self { destination, idle, control, _lanes: lanes, done: done.to_vec() }
    }
}

#[test]
fn a_vm_whose_source_says_no_more_is_ready_when_the_patience_ends() {
    check("pre-copy", &Served::new(Duration::from_millis(500)).destination.finish().0);
}

#[test]
fn a_source_has_the_time_to_say_that_it_is_done() {
    let served = Served::new(10 * HANG);
    let (before, deadline) = (served.idle.load(Ordering::SeqCst), Instant::now() + HANG);
    while served.idle.load(Ordering::SeqCst) < before + 3 {
        assert!(Instant::now() < deadline, "the receiver does not look for connections");
        thread::yield_now();
    }
    served.control.outgoing.write(&served.done).expect("the lane is open");
    check("pre-copy", &served.destination.finish().0);
}

#[test]
fn without_a_source_the_patience_ends() {
    let ((_door, ends), (to, _arrived)) = (mpsc::channel(), mpsc::channel());
    let options = ReceiverOptions { patience: Some(Duration::ZERO), ..ReceiverOptions::default() };
    let ended = Receiver::new(host(to), drop, options).run(&mut Door(ends));
    assert!(matches!(ended, Err(ReceiveError::TimedOut(Duration::ZERO))), "{ended:?}");
}

/// Waits until the receiver has taken all bytes of each connection, and so many of them are closed.
fn await_closed(ends: &[End], count: usize) {
    let closed = || ends.iter().filter(|end| end.incoming.lock().ended).count();
    for end in ends {
        drop(end.outgoing.wait("a preamble to be read", |state| state.bytes.is_empty() || state.unread));
    }
    let deadline = Instant::now() + HANG;
    while closed() < count {
        assert!(Instant::now() < deadline, "{} of {} are closed", closed(), ends.len());
        thread::yield_now();
    }
    // no further one is
    (0..1000).for_each(|_| thread::yield_now());
    assert_eq!(closed(), count, "of {}", ends.len());
}

/// Connections that begin a session, and those that come back to one, have few places until they
/// have said with what. Who knows no session has the places of those that begin one.
#[test]
fn those_that_do_not_say_what_they_want_have_few_places() {
    let destination = Destination::new();
    let preamble = |kind, token| Preamble::new(kind, 0, token).encode();
    let greetings: Vec<_> =
        (0..20).map(|_| destination.connect(&preamble(LaneKind::Control, SessionToken::default()))).collect();
    await_closed(&greetings, 4);
    drop(greetings);
    let unknown: Vec<_> =
        (0..20).map(|_| destination.connect(&preamble(LaneKind::Reattach, SessionToken([3; 16])))).collect();
    await_closed(&unknown, 4);
    drop(unknown);
    let control = destination.connect(&hello());
    let token = token_of(&control);
    // whoever has read the token on the way begins no session by it
    let greetings: Vec<_> = (0..20).map(|_| destination.connect(&preamble(LaneKind::Control, token))).collect();
    await_closed(&greetings, 4);
    drop(greetings);
    let returning: Vec<_> = (0..12).map(|_| destination.connect(&preamble(LaneKind::Reattach, token))).collect();
    await_closed(&returning, 4);
    assert!(!control.incoming.lock().ended);
}

/// Lanes of a session take none of these places.
#[test]
fn a_session_may_have_many_lanes() {
    let destination = Destination::new();
    let hello = lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello_of(VM, 0, 40)]);
    let control = destination.connect(&hello);
    let token = token_of(&control);
    let _lanes: Vec<_> =
        (0..40).map(|index| destination.connect(&Preamble::new(LaneKind::Bulk, index, token).encode())).collect();
    let answer = said(&control);
    assert!(matches!(answer, Some(Control::Prepared { .. })), "{answer:?}");
}

/// It would lose the answer on some transports if the connection ended while data is unread.
#[test]
fn a_source_that_encrypts_is_refused_and_read_to_its_end() {
    let destination = Destination::new();
    let mut bytes = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode().to_vec();
    bytes[..SEALED_MAGIC.len()].copy_from_slice(&SEALED_MAGIC);
    bytes.extend([7; 1000]);
    let control = destination.connect(&bytes);
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Security && text.contains("encrypted"), "{code:?}: {text}");
    let state = control.outgoing.wait("all of it to be read", |state| state.bytes.is_empty() || state.unread);
    assert_eq!(state.bytes.len(), 0);
    drop(state);
    control.outgoing.update(|state| state.ended = true);
    drop(control.outgoing.wait("the end of the connection", |state| state.unread));
    // and who sends without end is not read for ever
    let endless = destination.connect(&[&bytes[..], &[7; 100_000]].concat());
    drop(endless.outgoing.wait("the end of the connection", |state| state.unread));
}

/// Keeps the roles that threads assume.
#[derive(Default)]
struct Roles(Mutex<Vec<Role>>);

impl Spawner for Roles {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>> {
        StdSpawner.spawn(role, impact, name, body)
    }

    fn assume(&self, role: Role, _impact: GuestImpact) {
        self.0.lock().unwrap().push(role);
    }
}

/// The thread of a connection is started for pages in volume.
#[test]
fn a_thread_takes_the_role_of_the_lane_that_it_serves() {
    let roles = Arc::new(Roles::default());
    let options = ReceiverOptions { spawner: roles.clone(), idle_timeout: HANG, ..ReceiverOptions::default() };
    let destination = Destination::with(options, |to| Host { paging: Some(crate::post_copy::paging()), ..host(to) });
    let hello = hello_of(VM, FEATURE_POST_COPY, 2);
    let control = destination.connect(&lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello]));
    let token = token_of(&control);
    let connect = |kind, index| {
        let end = destination.connect(&Preamble::new(kind, index, token).encode());
        drop(end.outgoing.wait("a preamble to be read", |state| state.bytes.is_empty()));
        end
    };
    let _bulk = [connect(LaneKind::Bulk, 0), connect(LaneKind::Bulk, 1)];
    assert!(matches!(said(&control), Some(Control::Prepared { .. })));
    assert_eq!(*roles.0.lock().unwrap(), [Role::Control]);
    let _demand = connect(LaneKind::Demand, 0);
    let deadline = Instant::now() + HANG;
    while *roles.0.lock().unwrap() != [Role::Control, Role::Demand] {
        assert!(Instant::now() < deadline, "{:?}", roles.0.lock().unwrap());
        thread::yield_now();
    }
}
