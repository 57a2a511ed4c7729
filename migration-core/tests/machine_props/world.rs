//! Sequences of inputs for the protocol machines, read from bytes, and what must hold after each.
//! Shared by the proptest `machine_props` and the fuzz target `protocol`.

use std::collections::VecDeque;

use bytes::Bytes;
use migration_core::{
    RamLayout, RamRegion,
    protocol::{
        DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss, OnSourceLoss, SourceEvent,
        SourceMachine, SourcePhase,
    },
    state::Section,
    vm::{VmDescription, VmId},
    wire::{Control, ErrorCode, FaultSummary, Hello, SessionToken, Welcome},
};

const VM: VmId = VmId([1; 16]);
const STRANGER: VmId = VmId([2; 16]);
/// The state that the honest source sends, in two pieces.
const STATE: &[u8] = b"the state";

/// Reads one choice after another; zeros behind the end.
struct Choices<'a>(std::slice::Iter<'a, u8>);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    /// An index below `len`, which is not 0.
    fn below(&mut self, len: usize) -> usize {
        usize::from(self.byte()) % len
    }

    /// A small number, and now and then one at the end of the scale.
    fn number(&mut self) -> u32 {
        match self.byte() {
            255 => u32::MAX,
            254 => u32::MAX - 1,
            n => u32::from(n % 8),
        }
    }

    /// Any frame, of either side.
    fn frame(&mut self) -> Control {
        match self.byte() % 19 {
            0 => hello(if self.byte().is_multiple_of(4) { STRANGER } else { VM }),
            1 => welcome(),
            2 => Control::Prepared { load_us: None },
            3 => Control::RoundReceived { generation: self.number() },
            4 => Control::Piece(Section { name: "gpu".into(), instance: 0, version: 1, data: Bytes::new() }),
            5 => Control::State(Bytes::from(vec![0; self.below(8)])),
            6 => {
                let (generation, state_bytes) = (self.number(), u64::from(self.number()));
                Control::Offer { generation, state_bytes, running: self.byte().is_multiple_of(2) }
            }
            7 => Control::Ready,
            8 => Control::Run,
            9 => Control::Running,
            10 => Control::Done,
            11 => Control::Abandon,
            12 => Control::Reattach(if self.byte().is_multiple_of(4) { STRANGER } else { VM }),
            13 => Control::error(ErrorCode::Other, "no"),
            14 => Control::Ping,
            15 => Control::Missing { first: 64 * u64::from(self.number()), bitmap: Bytes::from(vec![1; 8]) },
            16 => Control::PostCopy { missing: u64::from(self.number()), demand_lanes: 1 },
            17 => Control::Complete(FaultSummary::default()),
            _ => Control::Pong,
        }
    }
}

fn hello(id: VmId) -> Control {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 4096 }]).expect("one page is a layout");
    let vm = VmDescription { id, layout, devices: Vec::new(), host_needs: Bytes::new(), config: Bytes::new() };
    Control::Hello(Box::new(Hello { features: 0, streams: 1, strategy: "any".into(), vm }))
}

fn welcome() -> Control {
    Control::Welcome(Welcome { version: 1, features: 0, streams: 1, session: SessionToken([1; 16]) })
}

/// Feeds a destination with frames from anybody, in any order, and checks what it alone must keep.
pub fn lone_destination(input: &[u8]) {
    let mut choices = Choices(input.iter());
    let mut machine = DestinationMachine::new();
    // what a host would have: a VM being received, and whether it is complete
    let (mut built, mut complete) = (false, false);
    let mut collected = 0;
    while choices.0.len() > 0 {
        let (before, epoch, vm) = (machine.phase(), machine.epoch(), machine.vm());
        match choices.byte() % 8 {
            0..=3 => {
                let (number, frame) = (choices.number(), choices.frame());
                let number = if choices.byte().is_multiple_of(4) { number } else { machine.epoch() };
                if let Control::State(chunk) = &frame {
                    collected += chunk.len();
                }
                match machine.handle(number, frame) {
                    Ok(DestinationAction::Build { discard, hello }) => {
                        assert_eq!(discard, built, "a VM that is held is discarded, and only such a one");
                        assert!(vm != Some(hello.vm.id) || number > epoch, "an epoch is used twice");
                        (built, complete, collected) = (true, false, 0);
                    }
                    Ok(DestinationAction::Load { state, .. }) => {
                        assert_eq!(before, DestinationPhase::Receiving);
                        assert!(state.len() <= collected, "state out of nowhere");
                    }
                    Ok(DestinationAction::Start { .. }) => {
                        assert!(complete && before == DestinationPhase::Ready, "starts a VM that is not complete");
                    }
                    Ok(DestinationAction::AnswerRunning) => assert_eq!(before, DestinationPhase::Running),
                    Ok(DestinationAction::Discard(_)) => {
                        assert_ne!(before, DestinationPhase::Running, "discards a VM that it owns");
                        (built, complete) = (false, false);
                    }
                    Ok(_) => {}
                    Err(_) => assert_eq!(machine.phase(), before, "a refused frame changes nothing"),
                }
            }
            4 => drop(machine.prepared(None)),
            5 => complete |= machine.loaded().is_ok(),
            6 => {
                if machine.link_lost() == OnDestinationLoss::Discard {
                    assert!(!matches!(before, DestinationPhase::Ready | DestinationPhase::Running));
                    (built, complete) = (false, false);
                }
            }
            _ => {
                if machine.force_take_over().is_ok() {
                    assert!(complete && before == DestinationPhase::Ready, "adopts a VM that is not complete");
                }
            }
        }
        let after = machine.phase();
        if before == DestinationPhase::Running {
            assert_eq!(after, before, "gives up a VM that it owns");
        }
        if matches!(after, DestinationPhase::Ready | DestinationPhase::Running) {
            assert!(built && complete, "{after:?} without a complete VM");
        }
        assert_eq!(after != DestinationPhase::Empty, built, "{after:?}: the machine and its host disagree");
        assert!(machine.vm() != vm || machine.epoch() >= epoch, "the epoch went backwards");
    }
}

/// Feeds a source with frames from anybody, in any order, and checks what it alone must keep.
pub fn lone_source(input: &[u8]) {
    let mut choices = Choices(input.iter());
    let mut machine = SourceMachine::new(choices.number());
    let (epoch, mut gone, mut sent) = (machine.epoch(), false, 0);
    while choices.0.len() > 0 {
        let (before, owned) = (machine.phase(), machine.owns());
        match choices.byte() % 12 {
            0..=5 => {
                let (number, frame) = (choices.number(), choices.frame());
                let number = if choices.byte().is_multiple_of(4) { number } else { epoch };
                match machine.handle(number, frame) {
                    Ok(SourceEvent::RoundReceived(generation)) => {
                        assert!((1..=sent).contains(&generation), "a round that was not sent has arrived");
                    }
                    Ok(SourceEvent::Running) => assert!(gone, "runs elsewhere without having been handed over"),
                    Ok(SourceEvent::Refused(..)) => assert_eq!(machine.owns(), owned, "a refusal moves ownership"),
                    Ok(_) => assert_eq!(number, epoch, "a frame of another epoch counts"),
                    Err(_) => assert_eq!(machine.phase(), before, "a refused frame changes nothing"),
                }
            }
            6 => sent = machine.begin_round().unwrap_or(sent),
            7 => drop(machine.offer(0, true)),
            8 => {
                if machine.run().is_ok() {
                    assert_eq!(before, SourcePhase::Ready, "hands over to a destination that is not ready");
                    gone = true;
                }
            }
            9 => assert_eq!(machine.reattach(VM).is_ok(), before == SourcePhase::InDoubt),
            10 => assert_eq!(machine.abandon().is_some(), owned),
            _ => {
                let expected = match before {
                    SourcePhase::InDoubt => OnSourceLoss::Reconnect,
                    SourcePhase::Completed => OnSourceLoss::Nothing,
                    _ => OnSourceLoss::Resume,
                };
                assert_eq!(machine.link_lost(), expected);
            }
        }
        assert_eq!(machine.owns(), !gone, "owns after run, or lost the VM without run");
        assert_eq!(machine.epoch(), epoch);
    }
}

/// An honest source and an honest destination over a link that loses, ends, and repeats whatever
/// was ever sent on it.
struct Pair {
    source: SourceMachine,
    destination: DestinationMachine,
    source_dead: bool,
    /// What is under way on the control lane; `None` when the source, or the destination, has no
    /// lane.
    to_destination: Option<VecDeque<(u32, Control)>>,
    to_source: Option<VecDeque<(u32, Control)>>,
    /// Everything that was ever sent to the destination: a replay takes from here.
    sent: Vec<(u32, Control)>,
    answered: Vec<(u32, Control)>,
    /// The epoch whose state was loaded at the destination.
    complete: Option<u32>,
    /// The epoch in which the destination began to load a whole state.
    loading: Option<u32>,
    pieces: usize,
    /// Whether the present attempt has said that it leaves pages behind. Every attempt with an even
    /// epoch does.
    listed: bool,
    handed_over: bool,
}

fn leaves_pages_behind(epoch: u32) -> bool {
    epoch.is_multiple_of(2)
}

/// Plays an honest pair over a bad link: the first byte is the first epoch, the others are events.
/// Returns where the source stands in the end.
pub fn pair(input: &[u8]) -> SourcePhase {
    let mut choices = Choices(input.iter());
    let mut pair = Pair::new(choices.number().clamp(1, u32::MAX - 1000));
    while choices.0.len() > 0 {
        pair.event(&mut choices);
        pair.check();
    }
    pair.finish()
}

impl Pair {
    fn new(epoch: u32) -> Self {
        let mut pair = Self {
            source: SourceMachine::new(epoch),
            destination: DestinationMachine::new(),
            source_dead: false,
            to_destination: None,
            to_source: None,
            sent: Vec::new(),
            answered: Vec::new(),
            complete: None,
            loading: None,
            pieces: 0,
            listed: false,
            handed_over: false,
        };
        pair.greet();
        pair
    }

    fn greet(&mut self) {
        (self.to_destination, self.to_source) = (Some(VecDeque::new()), Some(VecDeque::new()));
        (self.pieces, self.listed) = (0, false);
        self.send_control(hello(VM));
    }

    fn send_control(&mut self, frame: Control) {
        let sent = (self.source.epoch(), frame);
        self.sent.push(sent.clone());
        if let Some(lane) = &mut self.to_destination {
            lane.push_back(sent);
        }
    }

    fn answer(&mut self, epoch: u32, frame: Control) {
        self.answered.push((epoch, frame.clone()));
        if let Some(lane) = &mut self.to_source {
            lane.push_back((epoch, frame));
        }
    }

    fn event(&mut self, choices: &mut Choices<'_>) {
        match choices.byte() % 20 {
            // the honest course is likelier than all accidents together
            0..=3 => self.source_step(),
            4..=6 => self.deliver_to_destination(),
            7..=9 => self.deliver_to_source(),
            10 | 11 => self.destination_step(),
            12 => {
                self.source_loss();
                self.destination_loss();
            }
            13 => self.source_loss(),
            14 => self.destination_loss(),
            15 => self.cancel(),
            16 => {
                // on a lane of its own: what the machine refuses costs the session nothing
                let (epoch, frame) = self.sent[choices.below(self.sent.len())].clone();
                // the engine lets a reattach through only if the machine says so, and nothing but
                // these two otherwise
                let first = match frame {
                    Control::Hello(_) => true,
                    Control::Reattach(vm) => self.destination.may_reattach(vm, epoch),
                    _ => false,
                };
                if first {
                    self.destination_takes(epoch, frame);
                }
            }
            17 => {
                // Once more on the session's own lane. Nothing there overtakes what was sent before
                // it: what is still on its way is delivered in its turn.
                let under_way = self.to_destination.as_ref().map_or(0, VecDeque::len);
                let delivered = self.sent.len() - under_way;
                if self.to_destination.is_some() && delivered > 0 {
                    let (epoch, frame) = self.sent[choices.below(delivered)].clone();
                    if !self.destination_takes(epoch, frame) {
                        self.destination_loss();
                    }
                }
            }
            18 if !self.answered.is_empty() => {
                let (epoch, frame) = self.answered[choices.below(self.answered.len())].clone();
                if self.to_source.is_some() {
                    self.source_takes(epoch, frame);
                }
            }
            18 => {}
            _ => match choices.byte() % 4 {
                0 => {
                    // the state cannot be loaded, or the VM not be built
                    let epoch = self.destination.epoch();
                    if self.destination.failed() == OnDestinationLoss::Discard {
                        self.answer(epoch, Control::error(ErrorCode::State, "no"));
                        (self.complete, self.loading) = (None, None);
                    }
                }
                1 => drop(self.destination.handle(choices.number(), hello(STRANGER))),
                2 if choices.byte().is_multiple_of(8) => {
                    self.source_dead = true;
                    self.source_loss();
                    self.destination_loss();
                    let whole = self.destination.phase() == DestinationPhase::Ready
                        && !leaves_pages_behind(self.destination.epoch());
                    assert_eq!(self.destination.force_take_over().is_ok(), whole, "only a complete VM is adopted");
                }
                _ => drop(self.destination.force_take_over().map(|_| {
                    // a person states that the source is dead, so it is
                    self.source_dead = true;
                })),
            },
        }
    }

    /// What a source that means to finish does next.
    fn source_step(&mut self) {
        if self.source_dead {
            return;
        }
        match self.source.phase() {
            SourcePhase::Copying if self.pieces < 2 => {
                self.source.begin_round().expect("copying");
                let (head, tail) = STATE.split_at(4);
                self.send_control(Control::State(Bytes::from_static(if self.pieces == 0 { head } else { tail })));
                self.pieces += 1;
            }
            SourcePhase::Copying if leaves_pages_behind(self.source.epoch()) && !self.listed => {
                let (end, _) = self.source.post_copy(1, 1).expect("copying");
                self.listed = true;
                self.send_control(Control::Missing { first: 0, bitmap: Bytes::from(vec![1; 8]) });
                self.send_control(end);
            }
            SourcePhase::Copying => {
                let offer = self.source.offer(STATE.len() as u64, true).expect("copying");
                self.send_control(offer);
            }
            SourcePhase::Ready => {
                let run = self.source.run().expect("ready");
                self.handed_over = true;
                self.send_control(run);
            }
            SourcePhase::InDoubt | SourcePhase::Serving if self.to_destination.is_none() => {
                // a new lane; what was under way on the old one is lost, for the destination too
                (self.to_destination, self.to_source) = (Some(VecDeque::new()), Some(VecDeque::new()));
                for frame in self.source.reattach(VM).expect("in doubt or serving") {
                    self.send_control(frame);
                }
            }
            SourcePhase::Completed => self.send_control(Control::Done),
            SourcePhase::Ended => {
                self.source = SourceMachine::new(self.source.epoch() + 1);
                self.greet();
            }
            SourcePhase::Greeting
            | SourcePhase::Welcomed
            | SourcePhase::Offered
            | SourcePhase::InDoubt
            | SourcePhase::Serving => {}
        }
    }

    fn destination_step(&mut self) {
        let epoch = self.destination.epoch();
        match self.destination.phase() {
            DestinationPhase::Preparing => {
                if let Ok(prepared) = self.destination.prepared(None) {
                    self.answer(epoch, prepared);
                }
            }
            DestinationPhase::Loading if self.loading == Some(epoch) => {
                let ready = self.destination.loaded().expect("loading");
                self.complete = Some(epoch);
                self.answer(epoch, ready);
            }
            DestinationPhase::Running if self.destination.is_served() => {
                // the last page has come
                self.destination.complete().expect("running");
                self.answer(epoch, Control::Complete(FaultSummary::default()));
            }
            _ => {}
        }
    }

    fn deliver_to_destination(&mut self) {
        let next = self.to_destination.as_mut().and_then(VecDeque::pop_front);
        if let Some((epoch, frame)) = next {
            if let Control::Reattach(vm) = frame
                && !self.destination.may_reattach(vm, epoch)
            {
                return self.answer(epoch, Control::error(ErrorCode::UnknownSession, "not here"));
            }
            if !self.destination_takes(epoch, frame) {
                self.destination_loss();
            }
        }
    }

    /// Whether the destination accepted the frame.
    fn destination_takes(&mut self, epoch: u32, frame: Control) -> bool {
        match self.destination.handle(epoch, frame) {
            Ok(action) => {
                match action {
                    DestinationAction::Build { .. } => {
                        (self.complete, self.loading) = (None, None);
                        self.answer(epoch, welcome());
                    }
                    DestinationAction::Load { state, .. } => self.loading = (state == STATE).then_some(epoch),
                    DestinationAction::Start { .. } | DestinationAction::AnswerRunning => {
                        self.answer(epoch, Control::Running);
                        if self.destination.is_served() {
                            self.answer(epoch, Control::PostCopy { missing: 1, demand_lanes: 0 });
                        } else if leaves_pages_behind(epoch) {
                            self.answer(epoch, Control::Complete(FaultSummary::default()));
                        }
                    }
                    DestinationAction::Discard(_) => (self.complete, self.loading) = (None, None),
                    DestinationAction::Pong => self.answer(epoch, Control::Pong),
                    // pages in stores are not agreed on
                    DestinationAction::StoreTable(_)
                    | DestinationAction::Located(_)
                    | DestinationAction::Vacated(_)
                    | DestinationAction::EntryLost(_)
                    | DestinationAction::LoadPiece(_)
                    | DestinationAction::Missing { .. }
                    | DestinationAction::Finish
                    | DestinationAction::None => {}
                }
                true
            }
            Err(violation) => {
                self.answer(epoch, Control::error(violation.code, violation.to_string()));
                false
            }
        }
    }

    fn deliver_to_source(&mut self) {
        let next = self.to_source.as_mut().and_then(VecDeque::pop_front);
        if let Some((epoch, frame)) = next {
            self.source_takes(epoch, frame);
        }
    }

    fn source_takes(&mut self, epoch: u32, frame: Control) {
        if !self.source_dead && !matches!(self.source.handle(epoch, frame), Ok(event) if !refused(&event)) {
            self.source_loss();
        }
    }

    fn source_loss(&mut self) {
        (self.to_destination, self.to_source) = (None, None);
        if !self.source_dead {
            self.source.link_lost();
        }
    }

    fn destination_loss(&mut self) {
        // what the source has sent on this lane is not read any more
        if let Some(lane) = &mut self.to_destination {
            lane.clear();
        }
        if self.destination.link_lost() == OnDestinationLoss::Discard {
            (self.complete, self.loading) = (None, None);
        }
    }

    fn cancel(&mut self) {
        if self.source_dead {
            return;
        }
        let owned = self.source.owns();
        let abandon = self.source.abandon();
        assert_eq!(abandon.is_some(), owned);
        if let Some(abandon) = abandon {
            self.send_control(abandon);
            (self.to_source, self.to_destination) = (None, self.to_destination.take());
        }
    }

    /// What must hold after every event.
    fn check(&self) {
        let there = self.destination.phase();
        let epoch = self.source.epoch();
        let here = self.source.owns() && !self.source_dead;
        assert!(!(here && there == DestinationPhase::Running), "two owners");
        if matches!(there, DestinationPhase::Ready | DestinationPhase::Running) {
            assert!(self.complete.is_some(), "{there:?} without a complete VM");
        }
        if matches!(self.source.phase(), SourcePhase::InDoubt | SourcePhase::Serving) && !self.source_dead {
            assert!(
                matches!(there, DestinationPhase::Ready | DestinationPhase::Running),
                "the VM is lost: in doubt here, {there:?} there"
            );
            assert_eq!(self.complete, Some(epoch), "in doubt about another epoch than the one that is held");
        }
        if self.source.phase() == SourcePhase::Completed && !self.source_dead {
            assert_eq!(there, DestinationPhase::Running, "completed, but it runs nowhere");
            assert!(!self.destination.is_served(), "the source may go, but pages are only there");
        }
    }

    /// Over a link that works again, a source that is in doubt gets its answer.
    fn finish(mut self) -> SourcePhase {
        if !matches!(self.source.phase(), SourcePhase::InDoubt | SourcePhase::Serving) || self.source_dead {
            return self.source.phase();
        }
        self.source_loss();
        self.source_step();
        for _ in 0..2 {
            self.deliver_to_destination();
        }
        self.destination_step();
        while self.to_source.as_ref().is_some_and(|lane| !lane.is_empty()) {
            self.deliver_to_source();
        }
        self.check();
        assert_eq!(self.source.phase(), SourcePhase::Completed, "the doubt stays although the link is back");
        self.source.phase()
    }
}

fn refused(event: &SourceEvent) -> bool {
    matches!(event, SourceEvent::Refused(..))
}
