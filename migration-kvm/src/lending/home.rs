//! The home VMM's side.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{Connector, Listener},
    engine::{
        Commands, ReceiveError, ReceiverHandle, ReceiverOptions, SourceOptions,
        ephemeral::{Active, PersistentVm, Standby},
    },
    fence::Fence as _,
    protocol::DestinationPhase,
    report::Report,
};

use super::{TICK, TakeOverError};
use crate::fence::{ProcessFence, take_over_from};

/// What a home VMM is told while its guest is away, and what it is asked. None of the methods may
/// wait for the feature VMM.
pub trait HomeVmm: Send + Sync + 'static {
    /// The guest runs in the feature VMM now.
    fn detached(&self, report: &Report);

    /// Returns whether the hand-over to the feature VMM is
    /// [in doubt](migration_core::report::Event::InDoubt) now.
    fn is_in_doubt(&self) -> bool;

    /// The VM is lost: the feature VMM has died, and the guest may have run there already.
    /// [`Absence::run`] does not return after this.
    fn lost_in_doubt(&self);

    /// The guest should have been back by now: ask the feature VMM for it. Called once.
    fn overdue(&self);

    /// All of the guest has come back from a feature VMM that has died then, and it does not run.
    fn not_taken_over(&self, why: &TakeOverError);

    /// There is no thread that watches the feature VMM: nobody notices that it dies or is late.
    fn unwatched(&self, why: &io::Error);
}

/// How the guest goes, and how it comes back.
pub struct Journey<'a> {
    /// Where the feature VMM awaits the guest.
    pub to: &'a dyn Connector,
    /// How to hand it over.
    pub source: &'a SourceOptions,
    /// The commands of the hand-over's [`Controller`](migration_core::engine::Controller).
    pub commands: Commands,
    /// Where the guest comes back. The feature VMM has to be told.
    pub back: &'a mut dyn Listener,
    /// How to take it back.
    pub receiver: ReceiverOptions,
}

/// How an absence has ended.
#[derive(Debug)]
pub enum AbsenceEnd<V> {
    /// The guest did not leave.
    Stayed {
        /// The VM, which runs here.
        guest: Active<V>,
        /// Why it did not leave.
        report: Box<Report>,
    },
    /// The guest is back.
    Returned(Active<V>),
    /// It does not come back: the feature VMM has died, or the listener is broken.
    Lost(ReceiveError),
    /// It does not come back, as [`Absence::end`] has said.
    Gone,
}

/// One absence of a guest from its home. A clone is the same absence.
#[derive(Clone)]
pub struct Absence(Arc<Shared>);

struct Shared {
    feature: Vec<u8>,
    within: Duration,
    since: Instant,
    state: Mutex<State>,
}

struct State {
    stage: Stage,
    overdue: bool,
}

enum Stage {
    /// The guest is here, or on its way.
    Leaving,
    /// It is away, and taken back by this receiver.
    Away(ReceiverHandle),
    /// It is back, or has never left, or will never come.
    Over,
}

impl Absence {
    /// Returns an absence that begins now. `feature` is the feature VMM's encoded
    /// [`ProcessIdentity`](crate::fence::ProcessIdentity); the guest is overdue after `within`.
    pub fn new(feature: Vec<u8>, within: Duration) -> Self {
        let state = Mutex::new(State { stage: Stage::Leaving, overdue: false });
        Self(Arc::new(Shared { feature, within, since: Instant::now(), state }))
    }

    /// Returns the time since the absence began.
    pub fn elapsed(&self) -> Duration {
        self.0.since.elapsed()
    }

    /// Returns whether the guest should have been back by now, and is asked for.
    pub fn is_overdue(&self) -> bool {
        self.0.lock().overdue
    }

    /// Ends the absence: the feature VMM says that the guest has ended, or has moved elsewhere.
    pub fn end(&self) {
        let stage = std::mem::replace(&mut self.0.lock().stage, Stage::Over);
        if let Stage::Away(receiver) = stage {
            receiver.stop();
        }
    }

    /// Hands the guest over to the feature VMM, and waits until it is back. `home` is told when it
    /// has left. A thread watches the feature VMM meanwhile.
    pub fn run<V: PersistentVm>(
        &self,
        home: &Arc<dyn HomeVmm>,
        guest: Active<V>,
        journey: Journey<'_>,
    ) -> AbsenceEnd<V> {
        let (watched, vmm) = (self.0.clone(), home.clone());
        let watch = move || {
            while watched.watch(&*vmm) {
                thread::sleep(TICK);
            }
        };
        if let Err(error) = thread::Builder::new().name("lent".into()).spawn(watch) {
            home.unwatched(&error);
        }
        let (gone, report) = guest.relinquish(journey.to, journey.source, journey.commands);
        match gone {
            Ok(dormant) => self.wait_return(&**home, dormant, &report, journey.receiver, journey.back),
            Err(guest) => {
                self.0.lock().stage = Stage::Over;
                AbsenceEnd::Stayed { guest, report: Box::new(report) }
            }
        }
    }

    fn wait_return<V: PersistentVm>(
        &self,
        home: &dyn HomeVmm,
        dormant: Standby<V>,
        report: &Report,
        receiver: ReceiverOptions,
        back: &mut dyn Listener,
    ) -> AbsenceEnd<V> {
        let awaiting = dormant.await_guest(receiver);
        self.0.lock().stage = Stage::Away(awaiting.handle());
        home.detached(report);
        let returned = awaiting.wait_for_guest(back);
        let stage = std::mem::replace(&mut self.0.lock().stage, Stage::Over);
        match (returned, stage) {
            (_, Stage::Over) => AbsenceEnd::Gone,
            (Ok(guest), _) => AbsenceEnd::Returned(guest),
            (Err((_, why)), _) => AbsenceEnd::Lost(why),
        }
    }
}

impl fmt::Debug for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Absence").field("elapsed", &self.elapsed()).finish_non_exhaustive()
    }
}

/// What a look at the feature VMM asks for.
enum Due {
    Nothing,
    AskBack,
    /// The feature VMM is dead; this receiver awaits the guest.
    Orphaned(ReceiverHandle),
    LostInDoubt,
    Over,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // every field is replaced whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks once whether the feature VMM lives and whether it is late. Returns whether to go on.
    fn watch(&self, home: &dyn HomeVmm) -> bool {
        // first this look: a process that is dead by then does nothing any more
        let dead = ProcessFence.is_dead(&self.feature);
        match self.due(home, dead) {
            Due::Nothing => true,
            Due::AskBack => {
                home.overdue();
                true
            }
            Due::LostInDoubt => {
                home.lost_in_doubt();
                false
            }
            Due::Orphaned(receiver) => {
                match receiver.phase() {
                    // it had brought all of the VM, and is dead for certain
                    DestinationPhase::Ready => {
                        if let Err(why) = take_over_from(&receiver, &self.feature) {
                            home.not_taken_over(&why);
                        }
                    }
                    // an attempt to bring it back ends by itself, one way or the other
                    DestinationPhase::Preparing | DestinationPhase::Receiving | DestinationPhase::Loading => {}
                    DestinationPhase::Empty | DestinationPhase::Running => receiver.stop(),
                }
                true
            }
            Due::Over => false,
        }
    }

    fn due(&self, home: &dyn HomeVmm, dead: bool) -> Due {
        let mut state = self.lock();
        match &state.stage {
            Stage::Over => Due::Over,
            Stage::Away(receiver) if dead => Due::Orphaned(receiver.clone()),
            Stage::Away(_) if !state.overdue && self.since.elapsed() > self.within => {
                state.overdue = true;
                Due::AskBack
            }
            Stage::Leaving if dead => {
                drop(state);
                // else the hand-over ends by itself, one way or the other
                if home.is_in_doubt() { Due::LostInDoubt } else { Due::Nothing }
            }
            Stage::Leaving | Stage::Away(_) => Due::Nothing,
        }
    }
}
