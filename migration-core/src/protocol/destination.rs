//! The destination's side of the protocol.

use std::time::Duration;

use bytes::Bytes;

use super::Violation;
use crate::{
    fence::Fenced,
    state::{MAX_STATE, Section},
    vm::VmId,
    wire::{Control, ErrorCode, Hello, Located, TablePart},
};

/// The phase of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationPhase {
    /// There is no VM.
    Empty,
    /// The VM is being built, or its lanes are not open yet.
    Preparing,
    /// Pages and state arrive.
    Receiving,
    /// The source has offered the VM. The last pages and the state are being loaded.
    Loading,
    /// Everything is loaded. The VM stays paused, without a time limit, until the source decides.
    Ready,
    /// The destination owns the VM.
    Running,
}

/// The action that follows from a frame of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Discard the present VM, if there is one, then build this one. Report the end of building
    /// with [`DestinationMachine::prepared`].
    Build {
        /// Whether a VM of an earlier, void epoch has to be discarded first.
        discard: bool,
        /// The new VM.
        hello: Box<Hello>,
    },
    /// Pass the piece to its device.
    LoadPiece(Section),
    /// Record that these pages will be missing when the VM runs.
    Missing {
        /// The first page of the bitmap.
        first: u64,
        /// One bit for each page.
        bitmap: Bytes,
    },
    /// Wait until the rounds up to this generation are in RAM. Then arm the pager if pages will be
    /// missing, and load the collected state. Report the end of loading with
    /// [`DestinationMachine::loaded`].
    Load {
        /// The generation of the last round.
        generation: u32,
        /// The encoded state.
        state: Vec<u8>,
        /// In post-copy: the number of missing pages, and the number of demand lanes.
        post_copy: Option<(u64, u16)>,
    },
    /// Own and start the VM. Answer with *running*, and on a reattached lane with the list of
    /// missing pages.
    Start {
        /// Whether its vCPUs are to run.
        running: bool,
    },
    /// The VM was started before. Only repeat the answer.
    AnswerRunning,
    /// Discard the VM.
    Discard(String),
    /// The session is over, and its source knows that the VM runs.
    Finish,
    /// Record these entries of the store table, and acknowledge them.
    StoreTable(TablePart),
    /// Record that these pages are in a store.
    Located(Located),
    /// When all bulk lanes were read up to the mark with this number, answer with *released* or
    /// with the list of missing pages.
    Vacated(u32),
    /// Record that, as the source has found, an entry of the store table has lost pages.
    EntryLost(u8),
    /// Do nothing.
    None,
    /// Answer with *pong*.
    Pong,
}

/// The action after the loss of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDestinationLoss {
    /// Discard the VM: the source owns it.
    Discard,
    /// Keep the VM paused: the destination does not know who owns it.
    Hold,
    /// Do nothing: the destination owns the VM, or there is none.
    Nothing,
}

/// The destination's state machine, for one VM after another.
#[derive(Clone, Debug)]
pub struct DestinationMachine {
    phase: DestinationPhase,
    vm: Option<VmId>,
    epoch: u32,
    /// Whether only this VM is accepted.
    awaits: bool,
    /// Whether a control lane is attached.
    attached: bool,
    state: Vec<u8>,
    run_vcpus: bool,
    post_copy: Option<(u64, u16)>,
    /// Whether a part of the list of missing pages has arrived, and its end has not.
    listing: bool,
    /// Whether no page is missing, or all missing pages have arrived, or the source is not needed
    /// for them.
    complete: bool,
    /// Whether pages may be in stores.
    stores: bool,
}

impl Default for DestinationMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationMachine {
    /// Returns a machine without a VM.
    pub fn new() -> Self {
        let (state, phase) = (Vec::new(), DestinationPhase::Empty);
        let (vm, epoch, awaits, attached) = (None, 0, false, false);
        Self {
            phase,
            vm,
            epoch,
            awaits,
            attached,
            state,
            run_vcpus: true,
            post_copy: None,
            complete: true,
            listing: false,
            stores: false,
        }
    }

    /// Records that pages of the VM that is being built may be in stores. Its source has agreed to
    /// this.
    pub fn allow_stores(&mut self) {
        self.stores = true;
    }

    /// Returns a machine that accepts only the VM `vm`, which has left this host under `epoch`.
    pub fn awaiting(vm: VmId, epoch: u32) -> Self {
        Self { awaits: true, ..Self::after(vm, epoch) }
    }

    /// Returns a machine for the VM `vm`, which was on this host under `epoch` and is not any more.
    /// The next attempt for it must have a higher epoch.
    pub fn after(vm: VmId, epoch: u32) -> Self {
        Self { vm: Some(vm), epoch, ..Self::new() }
    }

    /// Returns the phase of the destination.
    pub fn phase(&self) -> DestinationPhase {
        self.phase
    }

    /// Returns the epoch of the attempt under way, or of the last one.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the VM that is being received, held or run.
    pub fn vm(&self) -> Option<VmId> {
        self.vm
    }

    /// Returns whether pages may arrive now.
    pub fn accepts_pages(&self) -> bool {
        matches!(self.phase, DestinationPhase::Receiving | DestinationPhase::Loading)
    }

    /// Returns whether a new control lane may continue the session. Either no lane is attached, or
    /// the link of the present one is dead and the destination has not noticed it: the source
    /// reconnects because *it* noticed.
    pub fn may_reattach(&self, vm: VmId, epoch: u32) -> bool {
        self.vm == Some(vm)
            && self.epoch == epoch
            && matches!(self.phase, DestinationPhase::Ready | DestinationPhase::Running)
    }

    /// Handles a frame from the source, whose header has `epoch`.
    ///
    /// # Errors
    /// Returns an error if the frame is not permitted in the present phase. The caller sends the
    /// error to the source, ends the lane, and does what
    /// [`link_lost`](DestinationMachine::link_lost) returns.
    pub fn handle(&mut self, epoch: u32, frame: Control) -> Result<DestinationAction, Violation> {
        use DestinationPhase::*;
        let violation = |why| Violation::new(frame.name(), epoch, self.phase, why);
        if let Control::Hello(hello) = frame {
            return self.greet(epoch, hello);
        }
        if epoch != self.epoch || self.vm.is_none() {
            return Err(violation("it is of another epoch"));
        }
        match (frame, self.phase) {
            (Control::Ping, _) => Ok(DestinationAction::Pong),
            (Control::Piece(piece), Receiving) => Ok(DestinationAction::LoadPiece(piece)),
            (Control::State(chunk), Receiving) => {
                self.collect(&chunk)?;
                Ok(DestinationAction::None)
            }
            (Control::Missing { first, bitmap }, Receiving) if self.post_copy.is_none() => {
                self.listing = true;
                Ok(DestinationAction::Missing { first, bitmap })
            }
            (Control::PostCopy { missing, demand_lanes }, Receiving) if self.post_copy.is_none() => {
                self.post_copy = Some((missing, demand_lanes));
                (self.complete, self.listing) = (false, false);
                Ok(DestinationAction::None)
            }
            (Control::Offer { generation, state_bytes, running }, Receiving) => {
                if self.listing {
                    // otherwise a VM with missing pages would count as complete
                    return Err(Violation::new(
                        "offer",
                        epoch,
                        self.phase,
                        "the list of missing pages is not complete",
                    ));
                }
                if state_bytes != self.state.len() as u64 {
                    return Err(Violation::new("offer", epoch, self.phase, "the state is not complete"));
                }
                self.phase = Loading;
                self.run_vcpus = running;
                let (state, post_copy) = (std::mem::take(&mut self.state), self.post_copy);
                Ok(DestinationAction::Load { generation, state, post_copy })
            }
            (Control::StoreTable(part), Receiving | Running) if self.stores => Ok(DestinationAction::StoreTable(part)),
            (Control::Located(located), Receiving | Running) if self.stores => Ok(DestinationAction::Located(located)),
            // also before *run* is repeated: a source reports lost entries before it asks for the
            // list of missing pages
            (Control::EntryLost { entry }, Receiving | Ready | Running) if self.stores => {
                Ok(DestinationAction::EntryLost(entry))
            }
            (Control::Vacated { number }, Running) if self.stores && self.post_copy.is_some() => {
                Ok(DestinationAction::Vacated(number))
            }
            (Control::Run, Ready) => Ok(self.start()),
            (Control::Run, Running) => Ok(DestinationAction::AnswerRunning),
            (Control::Reattach(vm), Ready | Running) if self.vm == Some(vm) => {
                self.attached = true;
                Ok(DestinationAction::None)
            }
            (Control::Abandon, Preparing | Receiving | Loading | Ready) => {
                self.clear();
                Ok(DestinationAction::Discard("the source keeps the VM".into()))
            }
            (Control::Error { code, text }, Preparing | Receiving | Loading | Ready) => {
                self.clear();
                Ok(DestinationAction::Discard(format!("the source ended the attempt: {text} ({code:?})")))
            }
            (Control::Done, Running) if self.complete => Ok(DestinationAction::Finish),
            (frame, phase) => Err(Violation::new(frame.name(), epoch, phase, "it does not belong to this phase")),
        }
    }

    /// Records that the VM is built and that all lanes are open. `load` is the expected time to
    /// load the state. Returns the frame to send.
    ///
    /// # Errors
    /// Returns an error if no VM is being prepared.
    pub fn prepared(&mut self, load: Option<Duration>) -> Result<Control, Violation> {
        self.advance(DestinationPhase::Preparing, DestinationPhase::Receiving, "prepared")?;
        let load_us = load.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        Ok(Control::Prepared { load_us })
    }

    /// Records that pages are complete and the state is loaded. Returns the frame to send. From
    /// here on only the source decides on the VM, or a person
    /// ([`force_take_over`](DestinationMachine::force_take_over)).
    pub fn loaded(&mut self) -> Result<Control, Violation> {
        self.advance(DestinationPhase::Loading, DestinationPhase::Ready, "ready")?;
        Ok(Control::Ready)
    }

    /// Records that no page is missing any more, or none for which the source is needed, so that
    /// the source may be informed.
    ///
    /// # Errors
    /// Returns an error if the destination does not own the VM yet: until then the source may still
    /// change its decision.
    pub fn complete(&mut self) -> Result<(), Violation> {
        self.advance(DestinationPhase::Running, DestinationPhase::Running, "complete")?;
        self.complete = true;
        Ok(())
    }

    /// Records that the guest has ended by itself; `reason` says why. Returns the frame to send if
    /// the VM runs here with pages missing: they are not needed any more, and the source may free
    /// them.
    pub fn vm_ended(&mut self, reason: &str) -> Option<Control> {
        if !self.is_served() {
            return None;
        }
        self.complete = true;
        Some(Control::error(ErrorCode::VmEnded, format!("the VM has ended: {reason}")))
    }

    /// Returns whether no page of the VM is missing, or the source is not needed for those that
    /// are.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Returns whether the VM runs here with pages missing for which the source is needed.
    pub fn is_served(&self) -> bool {
        self.phase == DestinationPhase::Running && !self.complete
    }

    /// Records that the attempt has failed at the destination, with an error for the source.
    /// Returns what to do with the VM.
    pub fn failed(&mut self) -> OnDestinationLoss {
        self.link_lost()
    }

    /// Handles the loss of the control lane. Returns what to do with the VM.
    pub fn link_lost(&mut self) -> OnDestinationLoss {
        use DestinationPhase::*;
        self.attached = false;
        match self.phase {
            Empty | Running => OnDestinationLoss::Nothing,
            Ready => OnDestinationLoss::Hold,
            Preparing | Receiving | Loading => {
                self.clear();
                OnDestinationLoss::Discard
            }
        }
    }

    /// Records a person's statement that the source is dead and will never run the VM again. The
    /// destination becomes the owner, under a new epoch, so that a source that comes back is
    /// refused.
    ///
    /// # Errors
    /// Returns an error if no VM is held, if its source is still attached, or if pages are only at
    /// the source.
    pub fn force_take_over(&mut self) -> Result<DestinationAction, Violation> {
        // the only missing pages are in stores
        let without_source = self.complete || self.stores && matches!(self.post_copy, Some((0, _)));
        let why = match (self.phase, self.attached) {
            (DestinationPhase::Ready, false) if !without_source => "pages of this VM are only at its source",
            (DestinationPhase::Ready, false) => {
                self.epoch = self.epoch.saturating_add(1);
                self.complete = true;
                return Ok(self.start());
            }
            (DestinationPhase::Ready, true) => "the source is still connected: it decides",
            _ => "no complete VM is held here",
        };
        Err(Violation::new("adopt", self.epoch, self.phase, why))
    }

    /// Records that the source is dead for certain, and that the pages which were missing are in a
    /// store of this host. The destination owns the VM from then on, as after
    /// [`force_take_over`](Self::force_take_over). Changes nothing if the destination owns the VM
    /// already.
    ///
    /// # Errors
    /// Returns an error if no VM is held that has its state.
    pub fn take_over(&mut self, _source: Fenced) -> Result<DestinationAction, Violation> {
        match self.phase {
            DestinationPhase::Running => Ok(DestinationAction::None),
            DestinationPhase::Ready => {
                self.epoch = self.epoch.saturating_add(1);
                Ok(self.start())
            }
            phase => Err(Violation::new("inherit", self.epoch, phase, "no complete VM is held here")),
        }
    }

    fn greet(&mut self, epoch: u32, hello: Box<Hello>) -> Result<DestinationAction, Violation> {
        use DestinationPhase::*;
        let phase = self.phase;
        let violation = |code, why| Violation::new("hello", epoch, phase, why).with_code(code);
        if self.awaits && self.vm != Some(hello.vm.id) {
            return Err(violation(ErrorCode::Busy, "the return of another VM is awaited here"));
        }
        // a source that begins a new attempt has given up the last one, though the destination may
        // not have noticed that the link is dead
        let supersedes = self.vm == Some(hello.vm.id) && epoch > self.epoch;
        let discard = match self.phase {
            Running => return Err(violation(ErrorCode::Busy, "the destination runs a VM already")),
            Preparing | Receiving | Loading if supersedes => true,
            Preparing | Receiving | Loading => return Err(violation(ErrorCode::Busy, "another session is under way")),
            Ready if self.vm != Some(hello.vm.id) => {
                return Err(violation(ErrorCode::Busy, "a complete VM is held for its source"));
            }
            Ready => true,
            Empty => false,
        };
        // an epoch is void once a higher one was seen for the same VM
        if self.vm == Some(hello.vm.id) && epoch <= self.epoch {
            return Err(violation(ErrorCode::StaleEpoch, "the epoch is not above the last one"));
        }
        self.clear();
        (self.vm, self.epoch, self.phase, self.attached) = (Some(hello.vm.id), epoch, Preparing, true);
        Ok(DestinationAction::Build { discard, hello })
    }

    fn start(&mut self) -> DestinationAction {
        self.phase = DestinationPhase::Running;
        DestinationAction::Start { running: self.run_vcpus }
    }

    fn collect(&mut self, chunk: &Bytes) -> Result<(), Violation> {
        if self.state.len() + chunk.len() > MAX_STATE {
            return Err(Violation::new("state", self.epoch, self.phase, "the state is above its limit"));
        }
        self.state.extend_from_slice(chunk);
        Ok(())
    }

    fn advance(&mut self, from: DestinationPhase, to: DestinationPhase, frame: &'static str) -> Result<(), Violation> {
        if self.phase != from {
            return Err(Violation::new(frame, self.epoch, self.phase, "it does not belong to this phase"));
        }
        self.phase = to;
        Ok(())
    }

    /// Removes the VM, but keeps the last epoch.
    fn clear(&mut self) {
        self.phase = DestinationPhase::Empty;
        self.state = Vec::new();
        self.attached = false;
        (self.post_copy, self.complete, self.listing, self.stores) = (None, true, false, false);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        page::{RamLayout, RamRegion},
        vm::VmDescription,
        wire::Hello,
    };

    fn receiving() -> DestinationMachine {
        let mut machine = DestinationMachine::new();
        machine.handle(1, hello(1)).unwrap();
        machine.prepared(None).unwrap();
        machine
    }

    /// Otherwise a VM with missing pages would count as complete, and a person could take it over.
    #[test]
    fn an_offer_before_the_end_of_the_list_of_missing_pages_is_refused() {
        let missing = Control::Missing { first: 0, bitmap: Bytes::from_static(&[1; 8]) };
        let end = Control::PostCopy { missing: 1, demand_lanes: 1 };
        let offer = Control::Offer { generation: 1, state_bytes: 0, running: true };
        for with_end in [false, true] {
            let mut machine = receiving();
            machine.handle(1, missing.clone()).unwrap();
            if with_end {
                machine.handle(1, end.clone()).unwrap();
            }
            let loads = matches!(machine.handle(1, offer.clone()), Ok(DestinationAction::Load { .. }));
            assert_eq!(loads, with_end);
        }
        // the next attempt begins without a list
        let mut machine = receiving();
        machine.handle(1, missing).unwrap();
        assert_eq!(machine.link_lost(), OnDestinationLoss::Discard);
        assert!(!machine.listing);
    }

    const PHASES: [DestinationPhase; 6] = [
        DestinationPhase::Empty,
        DestinationPhase::Preparing,
        DestinationPhase::Receiving,
        DestinationPhase::Loading,
        DestinationPhase::Ready,
        DestinationPhase::Running,
    ];

    fn at(phase: DestinationPhase) -> DestinationMachine {
        DestinationMachine { phase, vm: Some(VmId([1; 16])), epoch: 5, attached: true, ..DestinationMachine::new() }
    }

    fn hello(vm: u8) -> Control {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 4096 }]).unwrap();
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        let vm = VmDescription { id: VmId([vm; 16]), layout, devices: Vec::new(), host_needs, config };
        Control::Hello(Box::new(Hello { features: 0, streams: 1, strategy: "any".into(), vm }))
    }

    /// Tests every frame in every phase: which frames are accepted, and which phase follows. All
    /// others are refused, and change nothing.
    #[test]
    fn a_frame_is_taken_only_in_its_phases_and_of_its_epoch() {
        use DestinationPhase::*;
        let bitmap = Bytes::from_static(&[1; 8]);
        let data = || Bytes::from_static(b"state");
        let piece = Section { name: "gpu".into(), instance: 0, version: 1, data: data() };
        let frames: [(Control, &[(DestinationPhase, DestinationPhase)]); 14] = [
            (Control::Ping, &PHASES.map(|phase| (phase, phase))),
            (Control::Piece(piece), &[(Receiving, Receiving)]),
            (Control::State(data()), &[(Receiving, Receiving)]),
            (Control::Missing { first: 0, bitmap }, &[(Receiving, Receiving)]),
            (Control::PostCopy { missing: 1, demand_lanes: 1 }, &[(Receiving, Receiving)]),
            (Control::Offer { generation: 1, state_bytes: 0, running: true }, &[(Receiving, Loading)]),
            (Control::Offer { generation: 1, state_bytes: 1, running: true }, &[]),
            (Control::Run, &[(Ready, Running), (Running, Running)]),
            (Control::Reattach(VmId([1; 16])), &[(Ready, Ready), (Running, Running)]),
            (Control::Reattach(VmId([2; 16])), &[]),
            (Control::Abandon, &[(Preparing, Empty), (Receiving, Empty), (Loading, Empty), (Ready, Empty)]),
            (
                Control::error(ErrorCode::Other, "why"),
                &[(Preparing, Empty), (Receiving, Empty), (Loading, Empty), (Ready, Empty)],
            ),
            (Control::Done, &[(Running, Running)]),
            (Control::Ready, &[]),
        ];
        for (frame, taken) in frames {
            for phase in PHASES {
                let mut machine = at(phase);
                let to = taken.iter().find(|(from, _)| *from == phase);
                assert_eq!(machine.handle(5, frame.clone()).is_ok(), to.is_some(), "{frame:?} {phase:?}");
                assert_eq!(machine.phase(), to.map_or(phase, |(_, to)| *to), "{frame:?} {phase:?}");
                for epoch in [4, 6] {
                    let mut machine = at(phase);
                    assert!(machine.handle(epoch, frame.clone()).is_err(), "{frame:?} {phase:?} of {epoch}");
                    assert_eq!(machine.phase(), phase);
                }
            }
            assert!(DestinationMachine::new().handle(0, frame.clone()).is_err(), "{frame:?} before a hello");
        }
    }

    #[test]
    fn frames_about_stores_are_taken_if_stores_are_agreed_on() {
        use DestinationPhase::*;
        let copy = crate::page_map::StoreCopy { entry: 0, generation: 1 };
        let located = Located { copy, held: true, runs: vec![crate::PageRange::new(0, 1)] };
        let frames: [(Control, &[DestinationPhase]); 4] = [
            (
                Control::StoreTable(TablePart {
                    number: 1,
                    gather_rate: None,
                    must_answer: true,
                    first: 0,
                    entries: Vec::new(),
                }),
                &[Receiving, Running],
            ),
            (Control::Located(located), &[Receiving, Running]),
            (Control::EntryLost { entry: 3 }, &[Receiving, Ready, Running]),
            (Control::Vacated { number: 1 }, &[Running]),
        ];
        for (frame, taken) in frames {
            for phase in PHASES {
                assert!(at(phase).handle(5, frame.clone()).is_err(), "{frame:?} {phase:?}: not agreed on");
                let mut machine = DestinationMachine { post_copy: Some((1, 1)), ..at(phase) };
                machine.allow_stores();
                assert_eq!(machine.handle(5, frame.clone()).is_ok(), taken.contains(&phase), "{frame:?} {phase:?}");
                assert_eq!(machine.phase(), phase);
            }
        }
        let mut whole = at(Running);
        whole.allow_stores();
        assert!(whole.handle(5, Control::Vacated { number: 1 }).is_err(), "nothing was left behind");
    }

    /// Rule 19: a person's statement is enough for a VM of which no page is only at its source.
    #[test]
    fn a_vm_whose_pages_are_in_stores_is_adopted() {
        for (stores, missing, adopted) in [(true, 0, true), (true, 1, false), (false, 0, false)] {
            let mut machine = DestinationMachine {
                stores,
                post_copy: Some((missing, 1)),
                complete: false,
                attached: false,
                ..at(DestinationPhase::Ready)
            };
            assert_eq!(machine.force_take_over().is_ok(), adopted, "{stores} {missing}");
            assert_eq!(machine.is_complete(), adopted);
        }
    }

    #[test]
    fn only_a_later_attempt_of_the_same_vm_takes_the_place_of_another() {
        use DestinationPhase::*;
        let says = |mut machine: DestinationMachine, vm, epoch| match machine.handle(epoch, hello(vm)) {
            Ok(DestinationAction::Build { discard, .. }) => {
                assert_eq!((machine.phase(), machine.epoch(), machine.vm()), (Preparing, epoch, Some(VmId([vm; 16]))));
                Ok(discard)
            }
            Ok(other) => panic!("{other:?}"),
            Err(violation) => Err(violation.code),
        };
        for (phase, another, stale, later) in [
            (Empty, Ok(false), Err(ErrorCode::StaleEpoch), Ok(false)),
            (Preparing, Err(ErrorCode::Busy), Err(ErrorCode::Busy), Ok(true)),
            (Receiving, Err(ErrorCode::Busy), Err(ErrorCode::Busy), Ok(true)),
            (Loading, Err(ErrorCode::Busy), Err(ErrorCode::Busy), Ok(true)),
            (Ready, Err(ErrorCode::Busy), Err(ErrorCode::StaleEpoch), Ok(true)),
            (Running, Err(ErrorCode::Busy), Err(ErrorCode::Busy), Err(ErrorCode::Busy)),
        ] {
            for epoch in [4, 5, 6] {
                assert_eq!(says(at(phase), 2, epoch), another, "{phase:?}, another VM, {epoch}");
                assert_eq!(says(at(phase), 1, epoch), if epoch > 5 { later } else { stale }, "{phase:?}, {epoch}");
            }
        }
        let awaiting = || DestinationMachine::awaiting(VmId([1; 16]), 5);
        assert_eq!(says(awaiting(), 2, 9), Err(ErrorCode::Busy));
        assert_eq!(says(awaiting(), 1, 5), Err(ErrorCode::StaleEpoch));
        assert_eq!(says(awaiting(), 1, 6), Ok(false));
        // this is also so after an attempt that has failed
        let mut machine = awaiting();
        machine.handle(6, hello(1)).unwrap();
        assert_eq!(machine.link_lost(), OnDestinationLoss::Discard);
        assert_eq!(says(machine.clone(), 2, 9), Err(ErrorCode::Busy));
        assert_eq!(says(machine, 1, 7), Ok(false));
    }

    struct Certain;

    impl crate::fence::Fence for Certain {
        fn fence(&self, _identity: &[u8]) -> Result<(), crate::fence::NotFenced> {
            Ok(())
        }
    }

    #[test]
    fn a_vm_that_is_held_is_reattached_adopted_or_inherited_and_no_other_one() {
        use DestinationPhase::*;
        let (vm, another) = (VmId([1; 16]), VmId([2; 16]));
        for phase in PHASES {
            let held = matches!(phase, Ready | Running);
            assert_eq!(at(phase).may_reattach(vm, 5), held, "{phase:?}");
            assert!(![(vm, 4), (vm, 6), (another, 5)].iter().any(|&(vm, epoch)| at(phase).may_reattach(vm, epoch)));
            assert_eq!(at(phase).accepts_pages(), matches!(phase, Receiving | Loading), "{phase:?}");

            // a person takes over a VM that is complete and has no source attached
            for (attached, complete) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut machine = DestinationMachine { attached, complete, run_vcpus: false, ..at(phase) };
                let adopts = phase == Ready && !attached && complete;
                let start = DestinationAction::Start { running: false };
                match machine.force_take_over() {
                    Ok(action) => assert!(adopts && action == start, "{phase:?}"),
                    Err(violation) => {
                        assert!(!adopts, "{phase:?} {violation}");
                        let lacks = violation.why.contains("only at its source");
                        assert_eq!(lacks, phase == Ready && !attached, "{violation}");
                        assert_eq!(violation.why.contains("connected"), phase == Ready && attached, "{violation}");
                    }
                }
                let after = if adopts { (Running, 6) } else { (phase, 5) };
                assert_eq!((machine.phase(), machine.epoch()), after);
                let served = DestinationMachine { attached, complete, ..at(phase) };
                assert_eq!(served.is_complete(), complete);
                assert_eq!(served.is_served(), phase == Running && !complete);
                assert_eq!(served.clone().vm_ended("it").is_some(), phase == Running && !complete);
                assert_eq!(served.clone().complete().is_ok(), phase == Running);
                assert_eq!(served.clone().handle(5, Control::Done).is_ok(), phase == Running && complete);
            }
            let mut machine = at(phase);
            let dead = Fenced::by(&Certain, b"").unwrap();
            assert_eq!(machine.take_over(dead).is_ok(), held, "{phase:?}");
            assert_eq!(
                (machine.phase(), machine.epoch() - 5),
                (if held { Running } else { phase }, (phase == Ready).into())
            );
            // a VM that is held or run outlives its link
            let mut machine = at(phase);
            let expected = match phase {
                Empty | Running => OnDestinationLoss::Nothing,
                Ready => OnDestinationLoss::Hold,
                _ => OnDestinationLoss::Discard,
            };
            assert_eq!(machine.link_lost(), expected);
            assert!(!machine.attached && (machine.phase() == phase) == (expected != OnDestinationLoss::Discard));
        }
    }

    #[test]
    fn a_state_may_be_as_large_as_its_limit() {
        for (len, fits) in [(10, true), (11, false), (12, false)] {
            let mut machine = DestinationMachine { state: vec![0; MAX_STATE - 10], ..at(DestinationPhase::Receiving) };
            assert_eq!(machine.handle(5, Control::State(Bytes::from(vec![0; len]))).is_ok(), fits, "{len}");
        }
    }
}
