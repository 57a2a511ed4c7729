//! The source's side of the protocol.

use std::time::Duration;

use super::Violation;
use crate::{
    fence::Fenced,
    wire::{Control, ErrorCode, FaultSummary, Welcome},
};

/// The phase of an attempt at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourcePhase {
    /// The hello was sent.
    Greeting,
    /// The destination has built the VM; lanes are being opened.
    Welcomed,
    /// Pages and state are sent.
    Copying,
    /// Everything was sent; the destination loads it.
    Offered,
    /// The destination is ready to run the VM. This is the last phase in which the source owns the
    /// VM.
    Ready,
    /// *run* was sent, or is about to be sent, so the VM may run at the destination. It never runs
    /// at the source again.
    InDoubt,
    /// The destination runs the VM, but misses pages that the source has.
    Serving,
    /// The destination runs the VM and has all its pages; or it ran the VM, which has ended.
    Completed,
    /// The attempt has ended, and the source owns the VM.
    Ended,
}

/// The meaning of a frame from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Open the lanes.
    Welcomed(Welcome),
    /// All lanes are open: begin to send.
    Prepared {
        /// The time that the destination expects to need for loading the state.
        load: Option<Duration>,
    },
    /// Rounds up to this generation have arrived at the destination.
    RoundReceived(u32),
    /// The VM can be handed over.
    Ready,
    /// The VM runs at the destination. Send *done* if the destination has all pages.
    Running,
    /// After a reattachment: these pages are missing at the destination, possibly among others.
    Missing {
        /// The first page of the bitmap.
        first: u64,
        /// One bit for each page.
        bitmap: bytes::Bytes,
    },
    /// After a reattachment: the list of missing pages is complete. Continue to send them.
    Resume {
        /// The number of missing pages.
        missing: u64,
    },
    /// The destination has all pages. Send *done*.
    Complete(FaultSummary),
    /// The destination does not need the source any more, though pages may still be in stores. Send
    /// *done*.
    Released(FaultSummary),
    /// The destination has the part of the store table with this number, and has read everything
    /// that was sent before it.
    TableReceived(u32),
    /// The destination has found that an entry of the store table has lost pages.
    EntryLost(u8),
    /// The destination has ended the attempt.
    Refused(ErrorCode, String),
    /// The VM that was handed over has ended at the destination by itself; the text says why. Send
    /// *done*, and free the VM's memory here.
    VmEnded(String),
    /// The peer is alive.
    Pong,
}

/// The action after the loss of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSourceLoss {
    /// The source owns the VM: roll everything back and resume the VM.
    Resume,
    /// The destination may own the VM, or owns it and misses pages: reconnect with the same epoch
    /// and repeat *run*, until it succeeds.
    Reconnect,
    /// The hand-over is complete; nothing is lost. No action is needed.
    Nothing,
}

/// The source's state machine of one attempt to move a VM.
#[derive(Clone, Debug)]
pub struct SourceMachine {
    epoch: u32,
    phase: SourcePhase,
    /// The last generation that was announced to the destination, and the last one that it has
    /// acknowledged.
    sent: u32,
    received: u32,
    /// Whether pages will be missing at the destination when it runs the VM.
    post_copy: bool,
    /// Whether pages may be in stores. The destination then sends *released* instead of *complete*.
    stores: bool,
    /// The number of times that *vacated* was sent.
    vacated: u32,
}

impl SourceMachine {
    /// Returns a machine at the start of an attempt. Every attempt for a VM has a higher epoch than
    /// all attempts before it.
    pub fn new(epoch: u32) -> Self {
        Self { epoch, phase: SourcePhase::Greeting, sent: 0, received: 0, post_copy: false, stores: false, vacated: 0 }
    }

    /// Returns the epoch of this attempt.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Records that both sides have agreed that pages may be in stores.
    pub fn allow_stores(&mut self) {
        self.stores = true;
    }

    /// Returns the phase of the attempt.
    pub fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// Returns whether the VM may run at the source. This is false from *run* on, unless the
    /// destination is fenced and the VM is restarted.
    pub fn owns(&self) -> bool {
        !matches!(self.phase, SourcePhase::InDoubt | SourcePhase::Serving | SourcePhase::Completed)
    }

    /// Handles a frame from the destination, whose header has `epoch`.
    ///
    /// # Errors
    /// Returns an error if the frame is not permitted in the present phase. The attempt then ends
    /// as if the link were lost.
    pub fn handle(&mut self, epoch: u32, frame: Control) -> Result<SourceEvent, Violation> {
        use SourcePhase::*;
        let violation = |why| Violation::new(frame.name(), epoch, self.phase, why);
        // a destination that refuses the lane before it has read the hello does not know the epoch
        let unread = epoch == 0 && self.phase == Greeting && matches!(frame, Control::Error { .. });
        if epoch != self.epoch && !unread {
            return Err(violation("it is of another epoch"));
        }
        match (&frame, self.phase) {
            (Control::Pong, _) => Ok(SourceEvent::Pong),
            // the pages that the destination misses are not needed any more; before *run* the guest
            // is at the source
            (Control::Error { code: ErrorCode::VmEnded, text }, InDoubt | Serving) => {
                self.phase = Completed;
                Ok(SourceEvent::VmEnded(text.clone()))
            }
            (Control::Error { code, text }, _) => {
                if self.owns() {
                    self.phase = Ended;
                }
                Ok(SourceEvent::Refused(*code, text.clone()))
            }
            (Control::Welcome(welcome), Greeting) => {
                self.phase = Welcomed;
                Ok(SourceEvent::Welcomed(welcome.clone()))
            }
            (&Control::Prepared { load_us }, Welcomed) => {
                self.phase = Copying;
                Ok(SourceEvent::Prepared { load: load_us.map(Duration::from_micros) })
            }
            (&Control::RoundReceived { generation }, Copying | Offered) => {
                if generation <= self.received || generation > self.sent {
                    return Err(violation("no such round is under way"));
                }
                self.received = generation;
                Ok(SourceEvent::RoundReceived(generation))
            }
            (Control::Ready, Offered) => {
                self.phase = Ready;
                Ok(SourceEvent::Ready)
            }
            (Control::Running, InDoubt) => {
                self.phase = if self.post_copy { Serving } else { Completed };
                Ok(SourceEvent::Running)
            }
            // the answer to a repeated *run*, of which an earlier one had arrived too
            (Control::Running, Serving | Completed) => Ok(SourceEvent::Running),
            (Control::Missing { first, bitmap }, Serving) => {
                Ok(SourceEvent::Missing { first: *first, bitmap: bitmap.clone() })
            }
            (&Control::PostCopy { missing, .. }, Serving) => Ok(SourceEvent::Resume { missing }),
            (Control::Complete(summary), Serving) if !self.stores => {
                self.phase = Completed;
                Ok(SourceEvent::Complete(*summary))
            }
            (Control::Released(summary), Serving) if self.stores => {
                self.phase = Completed;
                Ok(SourceEvent::Released(*summary))
            }
            (&Control::StoreTableReceived { number }, Copying | Serving) if self.stores => {
                Ok(SourceEvent::TableReceived(number))
            }
            (&Control::EntryLost { entry }, Copying | Offered | Ready | InDoubt | Serving) if self.stores => {
                Ok(SourceEvent::EntryLost(entry))
            }
            _ => Err(violation("it does not belong to this phase")),
        }
    }

    /// Begins the next round. Returns the number of its generation, which counts from 1.
    pub fn begin_round(&mut self) -> Result<u32, Violation> {
        self.must_be(SourcePhase::Copying, "round")?;
        self.sent += 1;
        Ok(self.sent)
    }

    /// Records that the VM will be handed over with `missing` pages at the source. Returns the
    /// frame that ends their list, and the generation with which they will be sent.
    pub fn post_copy(&mut self, missing: u64, demand_lanes: u16) -> Result<(Control, u32), Violation> {
        self.must_be(SourcePhase::Copying, "post-copy")?;
        self.post_copy = true;
        Ok((Control::PostCopy { missing, demand_lanes }, self.sent + 1))
    }

    /// Records that every page was sent or located, and that no page will follow unless the
    /// destination requests it. Returns the frame to send. The answer is *released*, or the list of
    /// missing pages.
    ///
    /// # Errors
    /// Returns an error if missing pages are not being streamed, or if pages in stores were not
    /// agreed on.
    pub fn vacated(&mut self) -> Result<Control, Violation> {
        self.must_be(SourcePhase::Serving, "vacated")?;
        if !self.stores {
            return Err(Violation::new("vacated", self.epoch, self.phase, "pages in stores are not agreed on"));
        }
        self.vacated = self.vacated.saturating_add(1);
        Ok(Control::Vacated { number: self.vacated })
    }

    /// Records that everything that moves before the hand-over was sent. Returns the offer to send.
    pub fn offer(&mut self, state_bytes: u64, running: bool) -> Result<Control, Violation> {
        self.must_be(SourcePhase::Copying, "offer")?;
        self.phase = SourcePhase::Offered;
        Ok(Control::Offer { generation: self.sent, state_bytes, running })
    }

    /// Passes the point of no return: after this call the VM may run at the destination, whether or
    /// not *run* arrives there. Returns the frame to send.
    pub fn run(&mut self) -> Result<Control, Violation> {
        self.must_be(SourcePhase::Ready, "run")?;
        self.phase = SourcePhase::InDoubt;
        Ok(Control::Run)
    }

    /// Returns the frames to send on a new control lane while the VM is in doubt or missing pages
    /// are streamed. The answer is *running*, in post-copy followed by the list of missing pages,
    /// or an error that changes nothing.
    pub fn reattach(&self, vm: crate::vm::VmId) -> Result<[Control; 2], Violation> {
        if self.phase != SourcePhase::Serving {
            self.must_be(SourcePhase::InDoubt, "reattach")?;
        }
        Ok([Control::Reattach(vm), Control::Run])
    }

    /// Makes the source the owner again, because the destination is dead for certain. The VM is in
    /// the state of a checkpoint, and has a new epoch, so that nothing of this attempt counts any
    /// more. Returns the new epoch.
    ///
    /// # Errors
    /// Returns an error before *run*, because nothing has to be restarted, and after *complete*,
    /// because the source has nothing to restart.
    pub fn restart(&mut self, _destination: Fenced) -> Result<u32, Violation> {
        if self.phase != SourcePhase::Serving {
            self.must_be(SourcePhase::InDoubt, "restart")?;
        }
        self.phase = SourcePhase::Ended;
        self.epoch = self.epoch.saturating_add(1);
        Ok(self.epoch)
    }

    /// Ends the attempt at the source's request. Returns the frame to send to the destination, or
    /// `None` if it is too late because the source does not own the VM any more.
    pub fn abandon(&mut self) -> Option<Control> {
        if !self.owns() {
            return None;
        }
        self.phase = SourcePhase::Ended;
        Some(Control::Abandon)
    }

    /// Handles the loss of the link, or a violation of the protocol by the peer. Returns what to
    /// do.
    pub fn link_lost(&mut self) -> OnSourceLoss {
        match self.phase {
            SourcePhase::InDoubt | SourcePhase::Serving => OnSourceLoss::Reconnect,
            SourcePhase::Completed => OnSourceLoss::Nothing,
            _ => {
                self.phase = SourcePhase::Ended;
                OnSourceLoss::Resume
            }
        }
    }

    fn must_be(&self, phase: SourcePhase, command: &'static str) -> Result<(), Violation> {
        if self.phase == phase {
            return Ok(());
        }
        Err(Violation::new(command, self.epoch, self.phase, "it does not belong to this phase"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::{Fence, NoFence, NotFenced};

    struct Certain;

    impl Fence for Certain {
        fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
            Ok(())
        }
    }

    fn dead() -> Fenced {
        Fenced::by(&Certain, b"").unwrap()
    }

    fn at(phase: SourcePhase) -> SourceMachine {
        SourceMachine { phase, ..SourceMachine::new(7) }
    }

    #[test]
    fn only_what_may_run_elsewhere_is_restarted_and_only_behind_a_fence() {
        assert!(Fenced::by(&NoFence, b"").is_err());
        use SourcePhase::*;
        for phase in [Greeting, Welcomed, Copying, Offered, Ready, Completed, Ended] {
            assert!(at(phase).restart(dead()).is_err(), "{phase:?}");
        }
        for phase in [InDoubt, Serving] {
            let mut machine = at(phase);
            assert!(!machine.owns());
            assert_eq!(machine.restart(dead()), Ok(8));
            assert!(machine.owns());
            // frames of a destination that turns out to be alive are refused
            assert!(machine.handle(7, Control::Running).is_err());
            assert!(machine.run().is_err() && machine.restart(dead()).is_err());
        }
    }

    const PHASES: [SourcePhase; 9] = [
        SourcePhase::Greeting,
        SourcePhase::Welcomed,
        SourcePhase::Copying,
        SourcePhase::Offered,
        SourcePhase::Ready,
        SourcePhase::InDoubt,
        SourcePhase::Serving,
        SourcePhase::Completed,
        SourcePhase::Ended,
    ];

    /// Tests every frame in every phase: which frames are accepted, and which phase follows. All
    /// others are refused, and change nothing.
    #[test]
    fn a_frame_is_taken_only_in_its_phases_and_of_its_epoch() {
        use SourcePhase::*;
        let welcome = Welcome { version: 1, features: 0, streams: 1, session: crate::wire::SessionToken([1; 16]) };
        let ends = |phase| if at(phase).owns() { Ended } else { phase };
        let ended = |phase| if matches!(phase, InDoubt | Serving) { Completed } else { ends(phase) };
        let frames: [(Control, &[(SourcePhase, SourcePhase)]); 13] = [
            (Control::Pong, &PHASES.map(|phase| (phase, phase))),
            (Control::error(ErrorCode::VmEnded, "why"), &PHASES.map(|phase| (phase, ended(phase)))),
            (Control::error(ErrorCode::Other, "why"), &PHASES.map(|phase| (phase, ends(phase)))),
            (Control::Welcome(welcome), &[(Greeting, Welcomed)]),
            (Control::Prepared { load_us: Some(3) }, &[(Welcomed, Copying)]),
            (Control::RoundReceived { generation: 3 }, &[(Copying, Copying), (Offered, Offered)]),
            (Control::RoundReceived { generation: 1 }, &[]),
            (Control::RoundReceived { generation: 4 }, &[]),
            (Control::Ready, &[(Offered, Ready)]),
            (Control::Running, &[(InDoubt, Completed), (Serving, Serving), (Completed, Completed)]),
            (Control::PostCopy { missing: 1, demand_lanes: 1 }, &[(Serving, Serving)]),
            (Control::Complete(FaultSummary::default()), &[(Serving, Completed)]),
            (Control::Ping, &[]),
        ];
        for (frame, taken) in frames {
            for phase in PHASES {
                let machine = || SourceMachine { sent: 3, received: 1, ..at(phase) };
                let mut of_it = machine();
                let to = taken.iter().find(|(from, _)| *from == phase);
                assert_eq!(of_it.handle(7, frame.clone()).is_ok(), to.is_some(), "{frame:?} {phase:?}");
                assert_eq!(of_it.phase(), to.map_or(phase, |(_, to)| *to), "{frame:?} {phase:?}");
                for epoch in [0, 6, 8] {
                    // a destination that has not read the hello may refuse it
                    let refuses = epoch == 0 && phase == Greeting && matches!(frame, Control::Error { .. });
                    let mut machine = machine();
                    assert_eq!(machine.handle(epoch, frame.clone()).is_ok(), refuses, "{frame:?} {phase:?} {epoch}");
                    assert_eq!(machine.phase(), if refuses { Ended } else { phase });
                }
            }
        }
        let with_stores: [(Control, &[SourcePhase], SourcePhase); 3] = [
            (Control::Released(FaultSummary::default()), &[Serving], Completed),
            (Control::StoreTableReceived { number: 1 }, &[Copying, Serving], Copying),
            (Control::EntryLost { entry: 1 }, &[Copying, Offered, Ready, InDoubt, Serving], Copying),
        ];
        for (frame, taken, to) in with_stores {
            for phase in PHASES {
                assert!(at(phase).handle(7, frame.clone()).is_err(), "{frame:?} {phase:?}: not agreed on");
                let mut machine = SourceMachine { stores: true, ..at(phase) };
                assert_eq!(machine.handle(7, frame.clone()).is_ok(), taken.contains(&phase), "{frame:?} {phase:?}");
                let ends = to == Completed && phase == Serving;
                assert_eq!(machine.phase(), if ends { Completed } else { phase }, "{frame:?} {phase:?}");
            }
        }
        let complete = Control::Complete(FaultSummary::default());
        assert!(SourceMachine { stores: true, ..at(Serving) }.handle(7, complete).is_err(), "it says *released*");
        let mut lacks = SourceMachine { post_copy: true, ..at(InDoubt) };
        lacks.handle(7, Control::Running).unwrap();
        assert_eq!(lacks.phase(), Serving);
        let refused = at(Ready).handle(7, Control::error(ErrorCode::State, "why"));
        assert_eq!(refused, Ok(SourceEvent::Refused(ErrorCode::State, "why".into())));
        let ended = at(Serving).handle(7, Control::error(ErrorCode::VmEnded, "why"));
        assert_eq!(ended, Ok(SourceEvent::VmEnded("why".into())));
    }

    #[test]
    fn a_side_says_that_it_has_vacated_while_it_serves() {
        for phase in PHASES {
            assert!(at(phase).vacated().is_err(), "{phase:?}: not agreed on");
            let mut machine = SourceMachine { stores: true, ..at(phase) };
            assert_eq!(machine.vacated().is_ok(), phase == SourcePhase::Serving, "{phase:?}");
        }
        let mut machine = at(SourcePhase::Serving);
        machine.allow_stores();
        assert_eq!(machine.vacated(), Ok(Control::Vacated { number: 1 }));
        assert_eq!(machine.vacated(), Ok(Control::Vacated { number: 2 }));
    }

    #[test]
    fn a_vm_that_may_run_elsewhere_is_not_resumed() {
        use SourcePhase::*;
        for phase in PHASES {
            let (expected, after) = match phase {
                InDoubt | Serving => (OnSourceLoss::Reconnect, phase),
                Completed => (OnSourceLoss::Nothing, phase),
                _ => (OnSourceLoss::Resume, Ended),
            };
            let mut machine = at(phase);
            assert_eq!((machine.link_lost(), machine.phase()), (expected, after), "{phase:?}");
            let owns = expected == OnSourceLoss::Resume;
            let mut machine = at(phase);
            assert_eq!(
                (machine.owns(), machine.abandon().is_some(), machine.phase()),
                (owns, owns, after),
                "{phase:?}"
            );
            let reattaches = matches!(phase, InDoubt | Serving);
            assert_eq!(at(phase).reattach(crate::vm::VmId([1; 16])).is_ok(), reattaches, "{phase:?}");
            assert_eq!(at(phase).run().is_ok(), phase == Ready, "{phase:?}");
            assert_eq!(at(phase).begin_round().ok(), (phase == Copying).then_some(1), "{phase:?}");
        }
    }
}
