//! What happens without each sentence.

use crate::rules::{Rule, Rules};
use crate::search::Violation;

/// A run without a sentence.
#[derive(Clone, Copy, Debug)]
pub struct Experiment {
    /// The name of the configuration.
    pub configuration: &'static str,
    pub expected: Expected,
}

/// What the run must find.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// Without the sentence this property is broken.
    Broken(Violation),
    /// Without the sentence nothing is broken, because another one covers for it. Without both this
    /// property is broken.
    CoveredBy(Rule, Violation),
    /// Without the sentence nothing is broken. It is there for another reason, which
    /// `docs/model.md` gives.
    Nothing,
}

impl Experiment {
    /// Returns the rules of the run that must find something.
    pub fn rules(&self, without: Rule) -> Rules {
        let rules = Rules::all().without(without);
        match self.expected {
            Expected::CoveredBy(other, _) => rules.without(other),
            _ => rules,
        }
    }
}

/// Returns the experiment for the sentence `rule`.
pub fn experiment(rule: Rule) -> Experiment {
    use Rule::*;
    use Violation::*;
    match rule {
        RunIsFinal => breaks("cancel", TwoOwners),
        // Pages
        HeldPagesAreServed => covered("quiet", AskNewLocation, Stuck),
        AskNewLocation => covered("quiet", HeldPagesAreServed, Stuck),
        FailedPutUnclaims => breaks("slow stores", Stuck),
        HeldEndsAtArrival => breaks("store partly lost", ContentLost),
        InstallUnderClaim => breaks("evictions", WrongContent),
        ClaimNamesLocation => breaks("evictions", WrongContent),
        NewestMessageReplaces | LocatedOnlyForSource => breaks("cancel", ContentLost),
        GenerationChecked => breaks("store partly lost", WrongContent),
        MissingIsNotZero => breaks("store lost", WrongContent),
        ForgottenIsMissing => breaks("cancel", ContentLost),
        HolesAskTheMap => breaks("snapshot", WrongContent),
        ReportsRelocateNothing => breaks("eviction", WrongContent),
        FreeIsNotRecorded | LookComparesLocation | LookUntouched | ZeroIsAnnounced => {
            breaks("free pages", WrongContent)
        }
        InstalledOnce => breaks("blocks", WrongContent),
        BuffersAreBounded => breaks("blocks", BoundExceeded),
        WideningKeepsStores => breaks("blocks", Stuck),
        NoReadBeforeRun => breaks("cancel", ContentLost),
        // Stores
        OwnNamespaces => breaks("evictions", ContentLost),
        NamespacePerAttempt => breaks("second attempt", ContentLost),
        NoDiscard => breaks("quiet", ContentLost),
        CurrentCopyConfirmed => breaks("store lost", ContentLost),
        ReturnedPageIsProtected | WrittenReadAfterwards => breaks("eviction", ContentLost),
        TrackerKeepsItsBits => breaks("eviction", WrongContent),
        NewerGenerationStays | RepeatedUnderNewGeneration => breaks("second attempt", ContentLost),
        AcknowledgementForClaim => breaks("cancel", ContentLost),
        PutNeverCreates | ForgottenIdsRemembered => breaks("cancel", LeftOver),
        IncarnationOfPuts => nothing("attempt lost"),
        ComparedBeforeReleased => breaks("attempt lost", ContentLost),
        AbsentIsChanged => breaks("namespace removed", ContentLost),
        SilentIsChanged => breaks("store silent", ContentLost),
        DestinationRenews => breaks("three hosts", ContentLost),
        AllStoresAcknowledge | NextStoreAsked => breaks("replicas", ContentLost),
        HeldBecomesSource => breaks("attempt lost", Stuck),
        NeverLocatedAgain => nothing("attempt lost"),
        FailedAttemptForgets => breaks("cancel", LeftOver),
        AndNothingElse => breaks("evictions", ContentLost),
        SourceForgetsNothing | LocationsRefer => breaks("quiet", ContentLost),
        ForgetAfterReleased => breaks("quiet", SentTwice),
        KeptLocationsRefer => covered("quiet", CurrentCopyConfirmed, ContentLost),
        GetsRefer => nothing("evictions"),
        FetchForgetsAll => breaks("fetch", LeftOver),
        UnacknowledgedForgotten => breaks("late entry", LeftOver),
        NamedToSuccessor | EndForgetsTable => breaks("three hosts", LeftOver),
        ExpiredAreListed => breaks("owner crashes", LeftOver),
        StageOffBringsBack => breaks("eviction", ContentLost),
        // Sessions
        EntryAcknowledged => breaks("late entry", ContentLost),
        EntriesAreAppended => breaks("table", WrongContent),
        OnlyReferredEntries | OldestIsCopied => breaks("table", Stuck),
        OneMigrationAtATime => breaks("three hosts", ContentLost),
        LocatedAfterAcknowledgement => breaks("quiet", ContentLost),
        LocatedOnPagesLane => breaks("cancel", ContentLost),
        RoundsAfterConnect => breaks("evictions", ContentLost),
        PauseSendsLocations => breaks("cancel", ContentLost),
        PauseSendsHeld => breaks("store lost", ContentLost),
        NoneWillFollow | MarkOnEveryLane => breaks("quiet", SentTwice),
        AnsweredIsSent | SentStaysSent => breaks("fetch, store lost", Stuck),
        NoPageIsSource => breaks("attempt lost", ContentLost),
        OnlyReleasedFrees => breaks("quiet", ContentLost),
        ReleasedIsRepeated => breaks("cut", Stuck),
        TableRepeated => nothing("late entry"),
        AskAgainAfterCut | DestinationLists => nothing("cut"),
        UnacknowledgedIsNeither | OldLanesEnd | GenerationsGoOn => breaks("cut", ContentLost),
        ReleasedWithoutSource => breaks("source crashes", Stuck),
        PinnedPagesStay | ReadersAskTheMap => breaks("pause", Stuck),
        FetchedBeforeThePause => breaks("snapshot", Stuck),
        // Eviction
        OutOfReachFirst => breaks("evictions", ContentLost),
        TouchCancels => breaks("eviction", ContentLost),
        FailedPutMapsBack => nothing("eviction"),
        BusyPageStays => breaks("pinned", ContentLost),
        NoEvictionFromConnect | MidEvictionMappedBack => breaks("store lost", ContentLost),
        // Staging, contents, hand-over
        SameIncarnation => nothing("staging"),
        LaterRoundsNotSent | OneConsumer => breaks("staging", WrongContent),
        ReferenceIsAtomic => breaks("shared contents", ContentLost),
        ReferencesAreASet => breaks("lost answers", LeftOver),
        ReleasedByForget => breaks("two pages, one content", ContentLost),
        CopyIsHashed => covered("shared contents", HashConfirmed, WrongContent),
        HashConfirmed => breaks("damaged content", WrongContent),
        ClaimHasLease => covered("claimer crashes", WaiterSendsDirectly, Stuck),
        WaiterSendsDirectly => covered("claimer crashes", ClaimHasLease, Stuck),
        SuccessorRegistersFirst | PredecessorInstallsNothing => breaks("successor", WrongContent),
        SuccessorOwnNamespace => breaks("successor", ContentLost),
        SuccessorForgetsInherited => breaks("successor", LeftOver),
    }
}

fn breaks(configuration: &'static str, violation: Violation) -> Experiment {
    Experiment { configuration, expected: Expected::Broken(violation) }
}

fn covered(configuration: &'static str, other: Rule, violation: Violation) -> Experiment {
    Experiment { configuration, expected: Expected::CoveredBy(other, violation) }
}

fn nothing(configuration: &'static str) -> Experiment {
    Experiment { configuration, expected: Expected::Nothing }
}
