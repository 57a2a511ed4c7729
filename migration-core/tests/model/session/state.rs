//! Everything that can change while a VM whose pages are partly in stores moves from one host to
//! another.

/// The model has at most this many pages.
pub const PAGES: usize = 2;

/// The content of a page: the number of the guest's write that made it. 0 is a page of zeros.
pub type Content = u8;

/// The number of a put within its namespace. The first one is 1.
pub type Generation = u8;

/// The namespaces. Each is written by one process for one purpose.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Namespace {
    /// Cold pages that the source evicted while the VM ran there.
    Home,
    /// What the source's first attempt puts into a store.
    Attempt,
    /// What its second attempt puts into a store.
    SecondAttempt,
    /// Cold pages that the destination evicts after *run*.
    Own,
}

impl Namespace {
    /// All namespaces.
    pub const ALL: [Namespace; 4] = [Namespace::Home, Namespace::Attempt, Namespace::SecondAttempt, Namespace::Own];

    /// Returns whether an attempt wrote this namespace.
    pub fn is_attempt(self) -> bool {
        matches!(self, Namespace::Attempt | Namespace::SecondAttempt)
    }
}

/// One copy of a page in a store: entry and generation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Stored {
    /// The entry's namespace.
    pub namespace: Namespace,
    /// The generation under which it was put.
    pub generation: Generation,
}

/// Where the newest content of a page is, as the destination knows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Location {
    /// In the RAM of the destination.
    Here,
    /// At the source, which delivers it.
    Source,
    /// In a store.
    Stored(Stored),
}

/// How far an eviction is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Eviction {
    /// There is none.
    None,
    /// The page is out of the guest's reach, and its put is under way.
    Putting(Generation),
    /// Without rule 21: the put has succeeded and the page was clean. It is dropped in the next
    /// step.
    Checked(Generation),
}

/// The phases of the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum SourcePhase {
    /// It runs the VM. No migration is under way.
    Home,
    /// It has sent the locations, and waits for *prepared*. The guest runs.
    Connecting,
    /// It may send pages in rounds. The guest runs.
    Rounds,
    /// The guest is paused, and the hand-over is sent.
    HandedOver,
    /// *Run* is sent. It never runs the guest again, and delivers the missing pages.
    Serving,
    /// It has been told *released*, and has freed the RAM.
    Freed,
    /// It has crashed.
    Dead,
}

/// One page at the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SourcePage {
    /// What is in RAM.
    pub ram: Option<Content>,
    /// Its location in the home namespace, or the one that it keeps there while it is resident.
    pub home: Option<Generation>,
    /// Its location in the attempt's namespace, acknowledged by the store.
    pub attempt: Option<Generation>,
    /// The put into the attempt's namespace that is under way.
    pub claimed: Option<Generation>,
    /// How far its eviction is.
    pub eviction: Eviction,
    /// It was sent to the destination, and not written since.
    pub sent: bool,
    /// The location that the destination was last told.
    pub announced: Option<Stored>,
    /// How often it was sent after *run*. Counted only where nothing fails.
    pub pushed: u8,
}

/// How far the source is with the entry of the attempt's namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    Unsent,
    Sent,
    Acknowledged,
}

/// The source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Source {
    pub phase: SourcePhase,
    pub pages: [SourcePage; PAGES],
    /// The attempt's namespace.
    pub attempt: Namespace,
    /// The attempt's entry in the store table.
    pub entry: Entry,
    /// The newest generation in the home namespace.
    pub home_generation: Generation,
    /// The newest generation in the attempt's namespace.
    pub attempt_generation: Generation,
    /// The attempt's entry was named: it has lost something.
    pub attempt_lost: bool,
    /// *Vacated* is sent, and not answered.
    pub vacated: bool,
    /// An attempt has failed before *run*.
    pub failed: bool,
}

/// The phases of the destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum DestinationPhase {
    /// It has not heard of the VM, or has discarded it.
    Absent,
    /// It has built the VM.
    Prepared,
    /// It has everything for *run*.
    Ready,
    /// It runs the guest.
    Running,
    /// It has crashed.
    Dead,
}

/// One page at the destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DestinationPage {
    /// What is in RAM.
    pub ram: Option<Content>,
    pub location: Location,
    /// The location that it keeps while it is `Here` and unwritten.
    pub kept: Option<Stored>,
    /// The source still has this content in its RAM.
    pub held: bool,
    /// It was `Here` once. The rules do not need this; the properties do.
    pub arrived: bool,
    /// A fault has asked the source.
    pub demanded: bool,
    /// A fault has asked a store.
    pub getting: Option<Stored>,
    pub eviction: Eviction,
}

/// The destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Destination {
    pub phase: DestinationPhase,
    pub pages: [DestinationPage; PAGES],
    /// Its table has the entry of the attempt's namespace.
    pub knows_attempt: bool,
    /// The newest generation in its own namespace.
    pub generation: Generation,
    /// *Vacated* has come, and is not answered.
    pub vacated: bool,
    /// It has said *released*, or decided it.
    pub released: bool,
    /// The entries that were named because they have lost something.
    pub named: [bool; 4],
}

/// One namespace in its store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Kept {
    pub state: NamespaceState,
    /// The incarnation of the store when the namespace was made, as the entry carries it.
    pub incarnation: u8,
    /// The newest put of each page: generation and content.
    pub values: [Option<(Generation, Content)>; PAGES],
    /// The put before it, to which a store may fall back. Recorded only where that can happen.
    pub older: [Option<(Generation, Content)>; PAGES],
}

/// Whether a namespace exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NamespaceState {
    Absent,
    /// A `create` is on its way.
    Creating,
    Present,
    Forgotten,
    /// It was forgotten while a `create` for it was on its way.
    ForgottenCreating,
}

/// The stores.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stores {
    /// The present incarnation of each store.
    pub incarnations: [u8; 2],
    /// The stores that do not answer any more.
    pub silent: [bool; 2],
    pub namespaces: [Kept; 4],
    /// Without rule 9: a discard of one page that is on its way.
    pub discard: Option<(Namespace, u8)>,
}

/// A put that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Put {
    pub namespace: Namespace,
    pub page: u8,
    pub generation: Generation,
    pub content: Content,
    pub answer: PutAnswer,
}

/// How far a put is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum PutAnswer {
    /// It is on its way to the store.
    Requested,
    /// It is stored. The answer carries the incarnation.
    Stored(u8),
    /// It was refused. The answer carries the incarnation.
    Refused(u8),
}

/// A get that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Get {
    pub page: u8,
    pub stored: Stored,
    /// `Some` once the store has answered: with the content, or that it lacks the page.
    pub answer: Option<Option<Content>>,
}

/// A message on the control channel to the destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ToDestination {
    /// The entry of the attempt's namespace.
    Entry,
    Connect {
        home: [Option<Generation>; PAGES],
        held: [bool; PAGES],
    },
    Located {
        page: u8,
        stored: Stored,
        held: bool,
    },
    HandOver {
        changes: [Change; PAGES],
        held: [bool; PAGES],
    },
    Run,
    Vacated,
}

/// What the hand-over says of one page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Change {
    /// It is as it was announced.
    Same,
    /// It is missing: the source delivers it.
    Source,
    /// It is in a store.
    Stored(Stored),
    /// Nothing is said of it, although it was neither sent nor announced (only without rule 4).
    Forgotten,
}

/// A message on the control channel to the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ToSource {
    /// The destination has the attempt's entry.
    Acknowledged,
    Prepared,
    Ready,
    Demand {
        page: u8,
    },
    Released,
    /// The answer to *vacated* if something is lacking, or a loss that the destination found.
    Lacks {
        pages: [bool; PAGES],
        named: [bool; 4],
    },
}

/// A message on a lane.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OnLane {
    Page { page: u8, content: Content },
    Located { page: u8, stored: Stored, held: bool },
}

/// A bounded queue of messages that stay in order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Queue<T, const N: usize>([Option<T>; N]);

impl<T: Copy, const N: usize> Queue<T, N> {
    pub const EMPTY: Self = Queue([None; N]);

    pub fn first(&self) -> Option<T> {
        self.0[0]
    }

    pub fn is_empty(&self) -> bool {
        self.0[0].is_none()
    }

    pub fn is_full(&self) -> bool {
        self.0[N - 1].is_some()
    }

    pub fn pop(&mut self) {
        self.0[0] = None;
        self.0.rotate_left(1);
    }

    /// Appends a message. The caller has checked that there is room.
    pub fn push(&mut self, message: T) {
        let end = self.0.iter().position(Option::is_none).expect("the sender has checked that there is room");
        self.0[end] = Some(message);
    }
}

/// What is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Network {
    pub connected: bool,
    pub to_destination: Queue<ToDestination, 3>,
    pub to_source: Queue<ToSource, 3>,
    /// The bulk lane.
    pub bulk: Queue<OnLane, 2>,
    /// The lane that answers demands.
    pub demands: Queue<OnLane, 2>,
    /// A lane of before a cut whose thread still reads (only without rule 18).
    pub old_lane: Queue<OnLane, 2>,
    pub puts: [Option<Put>; 3],
    pub gets: [Option<Get>; 2],
}

/// How often each thing may still happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Budget {
    pub writes: u8,
    /// Evictions with a put at the source, at the destination, and puts of the attempt.
    pub home_puts: u8,
    pub own_puts: u8,
    pub attempt_puts: u8,
    /// Attempts, and requests to cancel one before *run*.
    pub attempts: u8,
    pub cancels: u8,
    pub cuts: u8,
    /// Stores that restart and have lost everything, or the newest put of one page.
    pub restarts: u8,
    pub partial_losses: u8,
    /// Namespaces that a person removes although they are in use.
    pub removals: u8,
    /// Stores that fall silent.
    pub silences: u8,
    /// Puts whose outcome the writer does not learn, puts that fail, gets that are given up and
    /// answered late.
    pub unknown_puts: u8,
    pub failed_puts: u8,
    pub late_gets: u8,
    pub source_crashes: u8,
    pub destination_crashes: u8,
}

impl Budget {
    /// The number of kinds of events.
    pub const KINDS: u32 = 16;

    /// Returns the budget in which each event of `set` may happen. Puts of an attempt may happen
    /// twice, and there is one attempt more than `set` has.
    pub fn of(set: u32) -> Self {
        let bit = |kind: u32| (set >> kind & 1) as u8;
        Budget {
            writes: bit(0),
            home_puts: bit(1),
            own_puts: bit(2),
            attempt_puts: 2 * bit(3),
            attempts: 1 + bit(4),
            cancels: bit(5),
            cuts: bit(6),
            restarts: bit(7),
            partial_losses: bit(8),
            removals: bit(9),
            silences: bit(10),
            unknown_puts: bit(11),
            failed_puts: bit(12),
            late_gets: bit(13),
            source_crashes: bit(14),
            destination_crashes: bit(15),
        }
    }
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// What the guest wrote last into each page.
    pub newest: [Content; PAGES],
    /// A fault that no rule can prevent has lost the newest content.
    pub excused: [bool; PAGES],
    pub source: Source,
    pub destination: Destination,
    pub stores: Stores,
    pub network: Network,
    pub left: Budget,
}

impl State {
    /// Returns the state before anything has happened: every page is in the source's RAM.
    pub fn new(left: Budget) -> Self {
        let source_page = SourcePage {
            ram: Some(1),
            home: None,
            attempt: None,
            claimed: None,
            eviction: Eviction::None,
            sent: false,
            announced: None,
            pushed: 0,
        };
        let source = Source {
            phase: SourcePhase::Home,
            pages: [source_page; PAGES],
            attempt: Namespace::Attempt,
            entry: Entry::Unsent,
            home_generation: 0,
            attempt_generation: 0,
            attempt_lost: false,
            vacated: false,
            failed: false,
        };
        let kept = Kept { state: NamespaceState::Absent, incarnation: 0, values: [None; PAGES], older: [None; PAGES] };
        State {
            newest: [1; PAGES],
            excused: [false; PAGES],
            source,
            destination: Destination::new(),
            stores: Stores { incarnations: [0; 2], silent: [false; 2], namespaces: [kept; 4], discard: None },
            network: Network {
                connected: false,
                to_destination: Queue::EMPTY,
                to_source: Queue::EMPTY,
                bulk: Queue::EMPTY,
                demands: Queue::EMPTY,
                old_lane: Queue::EMPTY,
                puts: [None; 3],
                gets: [None; 2],
            },
            left,
        }
    }
}

impl Destination {
    /// Returns a destination that has not heard of the VM.
    pub fn new() -> Self {
        let page = DestinationPage {
            ram: None,
            location: Location::Source,
            kept: None,
            held: true,
            arrived: false,
            demanded: false,
            getting: None,
            eviction: Eviction::None,
        };
        Destination {
            phase: DestinationPhase::Absent,
            pages: [page; PAGES],
            knows_attempt: false,
            generation: 0,
            vacated: false,
            released: false,
            named: [false; 4],
        }
    }
}
