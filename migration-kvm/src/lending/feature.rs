//! The feature VMM's side.

use std::{
    io,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use migration_core::{
    channel::{Connector, Listener},
    engine::{
        Commands, ReceiveError, ReceiverHandle, SourceOptions,
        ephemeral::{Active, Awaiting, PersistentVm, Standby},
    },
    fence::Fence as _,
    protocol::DestinationPhase,
    report::Report,
};

use super::TICK;
use crate::fence::{ProcessFence, take_over_from};

/// How often it is looked whether a guest that is late has come.
const LOOK: Duration = Duration::from_millis(5);

/// What the home VMM has answered.
#[derive(Clone, Debug)]
pub struct Answer<A> {
    /// Whether it says that the guest has left.
    pub has_left: bool,
    /// All that it says.
    pub answer: A,
}

/// What has come of a request for a guest.
#[derive(Debug)]
pub struct Fetched<V, A> {
    /// The guest; or the VM without it, and why it did not come.
    pub guest: Result<Active<V>, (Standby<V>, ReceiveError)>,
    /// What the home VMM has answered; `None` if it did not in time.
    pub answer: Option<A>,
}

/// Asks the home VMM for its guest, and waits for it.
///
/// `ask` asks on a thread of its own; its answer may come before or after the guest. If it refuses,
/// or cannot be reached, the wait ends as soon as no guest is on the way. If the home VMM, which
/// `home` names (an encoded [`ProcessIdentity`](crate::fence::ProcessIdentity)), has died after it
/// brought all of the guest, the guest is taken over. `patience` is how long the answer may come
/// after the guest.
///
/// # Errors
/// Returns an error if there is no thread that could ask. No guest is on the way then.
pub fn fetch<V: PersistentVm, A: Send + 'static>(
    awaiting: Awaiting<V>,
    listener: &mut dyn Listener,
    home: Vec<u8>,
    patience: Duration,
    ask: impl FnOnce() -> Answer<A> + Send + 'static,
) -> io::Result<Fetched<V, A>> {
    let handle = awaiting.handle();
    let (tx, answer) = mpsc::channel();
    let asks = move || {
        let Answer { has_left, answer } = ask();
        // the one who asked may have given up
        let _ = tx.send(answer);
        if !has_left {
            look_for_guest(&handle, &home);
        }
    };
    thread::Builder::new().name("borrow".into()).spawn(asks)?;
    let guest = awaiting.wait_for_guest(listener);
    Ok(Fetched { guest, answer: answer.recv_timeout(patience).ok() })
}

/// Waits until a guest whose home says that it has not left is here, or is not on its way.
fn look_for_guest(receiver: &ReceiverHandle, home: &[u8]) {
    loop {
        match receiver.phase() {
            DestinationPhase::Running => return,
            // nothing will come
            DestinationPhase::Empty => return receiver.stop(),
            // it has brought all of the VM, and is dead for certain; what fails is tried again
            DestinationPhase::Ready if ProcessFence.is_dead(home) => drop(take_over_from(receiver, home)),
            // its source decides
            _ => {}
        }
        thread::sleep(LOOK);
    }
}

/// What has come of giving a guest back.
#[derive(Debug)]
pub enum GivenBack<V> {
    /// The guest is at home.
    AtHome(Standby<V>, Box<Report>),
    /// It has stayed here, and runs.
    Stayed(Active<V>, Box<Report>),
    /// It is lost: the home VMM has died when it was about to run it, or just after.
    HomeDied,
    /// What has become of it is not known: the thread that hands it over has died.
    Unknown,
}

/// Hands a guest back to its home VMM, process `home`, which awaits it at `to`.
///
/// Returns when one of the two runs it, or it is lost. `is_in_doubt` returns whether the hand-over
/// is [in doubt](migration_core::report::Event::InDoubt) now.
///
/// # Errors
/// The guest, which runs on here, when there is no thread for it.
pub fn give_back<V: PersistentVm>(
    guest: Active<V>,
    to: Box<dyn Connector>,
    options: SourceOptions,
    commands: Commands,
    home: &[u8],
    mut is_in_doubt: impl FnMut() -> bool,
) -> Result<GivenBack<V>, (Active<V>, io::Error)> {
    let (give, given) = mpsc::channel();
    let (tx, returned) = mpsc::channel();
    // if it stays in doubt this never ends
    let body = move || {
        if let Ok(guest) = given.recv() {
            let guest: Active<V> = guest;
            // the one who waits for it may have seen the home VMM die
            let _ = tx.send(guest.relinquish(&*to, &options, commands));
        }
    };
    if let Err(error) = thread::Builder::new().name("return".into()).spawn(body) {
        return Err((guest, error));
    }
    if give.send(guest).is_err() {
        return Ok(GivenBack::Unknown);
    }
    loop {
        match returned.recv_timeout(TICK) {
            Ok((Ok(dormant), report)) => return Ok(GivenBack::AtHome(dormant, Box::new(report))),
            Ok((Err(guest), report)) => return Ok(GivenBack::Stayed(guest, Box::new(report))),
            Err(RecvTimeoutError::Disconnected) => return Ok(GivenBack::Unknown),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if is_in_doubt() && ProcessFence.is_dead(home) {
            return Ok(GivenBack::HomeDied);
        }
    }
}
