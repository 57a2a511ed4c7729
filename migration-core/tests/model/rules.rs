//! The sentences of the design that can be taken out, one by one.

/// Makes the enum and the list of all its variants from one table: number of the rule, name,
/// sentence.
macro_rules! rules {
    ($($number:literal $name:ident $sentence:literal)+) => {
        /// A sentence of a rule. Its document comment is the sentence, in short.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Rule {
            $(#[doc = $sentence] $name),+
        }

        impl Rule {
            /// All sentences, in the order of their numbers.
            pub const ALL: &[Rule] = &[$(Rule::$name),+];

            /// Returns the number of the rule to which the sentence belongs.
            pub fn number(self) -> &'static str {
                match self {
                    $(Rule::$name => $number),+
                }
            }

            /// Returns the sentence, in short.
            pub fn sentence(self) -> &'static str {
                match self {
                    $(Rule::$name => $sentence),+
                }
            }
        }
    };
}

rules! {
    // Ownership, as DESIGN.md has it
    "–" RunIsFinal "Once *run* is sent the source never runs the guest again."
    // Pages
    "1" HeldPagesAreServed "Until *released* the source answers every demand for a page that it holds."
    "1" FailedPutUnclaims "A failed put makes the page unclaimed again."
    "1" HeldEndsAtArrival "At the destination *held* ends when the page arrives."
    "2" InstallUnderClaim "A page is installed only under a claim."
    "2" ClaimNamesLocation "The claim names the location: entry and generation."
    "2" NewestMessageReplaces "Before the hand-over the newest message replaces whatever the destination has."
    "2" LocatedOnlyForSource "From the hand-over on *located* changes only pages whose location is the source."
    "2" AskNewLocation "A waiting fault whose page becomes located is asked of the new location."
    "3" GenerationChecked "The reader knows the generation: a value with another one is missing."
    "3" MissingIsNotZero "A page that a store lacks is missing, never zeros."
    "4" ForgottenIsMissing "What a script forgets is missing at the destination, never zero."
    "4" HolesAskTheMap "Holes, snapshots and dumps ask the map: a page that is not resident is not therefore zero."
    "4" ReportsRelocateNothing "A tracker's report never changes a page that is in a store."
    "5" FreeIsNotRecorded "Free is a look, never recorded for a resident page."
    "5" LookComparesLocation "A look counts only if the page still has the location that it had when the look began."
    "5" LookUntouched "A look counts only if the page has not come back since."
    "5" ZeroIsAnnounced "A page that turned to zeros is announced, if an older location was announced."
    "6" InstalledOnce "A block whose pages differ is gathered in a buffer and installed once."
    "6" BuffersAreBounded "The number of such buffers is bounded."
    "6" WideningKeepsStores "Widening to a block never turns a location in a store into `Source`."
    "7" NoReadBeforeRun "Before *run* nothing that was read from a store is written into the destination's RAM."
    // Stores
    "8" OwnNamespaces "Each process writes only namespaces that it made."
    "8" NamespacePerAttempt "An attempt makes a namespace of its own; it does not take one up again."
    "9" NoDiscard "There is no discard of single pages."
    "9" CurrentCopyConfirmed "A copy counts as current only after the store has confirmed namespace and incarnation."
    "9" ReturnedPageIsProtected "A page that comes back and keeps its location is mapped write-protected."
    "9" WrittenReadAfterwards "Whether a page was written is read after it is out of the guest's reach."
    "9" TrackerKeepsItsBits "Reading it takes nothing from a migration's tracker."
    "10" NewerGenerationStays "A put never replaces a newer generation."
    "10" RepeatedUnderNewGeneration "A put whose outcome is unknown is repeated under a new generation."
    "10" AcknowledgementForClaim "An acknowledgement counts only for the generation that the page is still claimed for."
    "10" PutNeverCreates "A put into a namespace that was forgotten fails, and never creates it."
    "10" ForgottenIdsRemembered "A store remembers forgotten ids: a late `create` for one of them fails."
    "11" IncarnationOfPuts "A put returns the present incarnation; a change makes the pages unacknowledged."
    "11" ComparedBeforeReleased "The destination compares the incarnations before *released*."
    "11" AbsentIsChanged "An absent namespace counts as changed."
    "11" SilentIsChanged "A store that does not answer counts as changed for held pages."
    "11" DestinationRenews "From *run* on the destination renews every namespace to which it refers."
    "12" AllStoresAcknowledge "An entry with k stores acknowledges when all k have the page."
    "12" NextStoreAsked "A reader asks the next store when one lacks the page."
    "13" HeldBecomesSource "When an entry has lost something, held pages of it become `Source`."
    "13" NeverLocatedAgain "The source never again answers *located* for an entry that was named."
    "14" FailedAttemptForgets "An attempt that fails before *run* forgets the attempt's namespaces."
    "14" AndNothingElse "An attempt that fails before *run* forgets nothing else."
    "14" SourceForgetsNothing "After *run* the source forgets nothing."
    "14" ForgetAfterReleased "The destination forgets namespaces of earlier owners only after it has said *released*."
    "14" LocationsRefer "The destination forgets only what no page's location refers to."
    "14" KeptLocationsRefer "A page that is `Here` refers to the location that it keeps."
    "14" GetsRefer "A get under way refers to its namespace."
    "14" FetchForgetsAll "At *released* a source with `fetch` forgets the namespaces that it never named."
    "14" UnacknowledgedForgotten "At *released* the source forgets namespaces whose entries were never acknowledged."
    "14" NamedToSuccessor "What an owner still has to forget it names to its successor."
    "14" EndForgetsTable "Whoever ends a VM in order forgets every namespace of its table."
    "14" ExpiredAreListed "A command lists what has expired, and removes it."
    "14" StageOffBringsBack "`stage --off` first cancels evictions and brings back what is only there."
    // Sessions
    "15" EntryAcknowledged "An entry is used only after the destination has acknowledged it."
    "15" EntriesAreAppended "The table is only appended to: a number never changes its meaning."
    "15" OnlyReferredEntries "A new session's table has only entries to which pages refer."
    "15" OldestIsCopied "Before the table is full the owner copies the oldest entry's pages into its own namespace."
    "15" OneMigrationAtATime "No second migration starts before *released*."
    "16" LocatedAfterAcknowledgement "*Located* is sent after the store has acknowledged."
    "16" LocatedOnPagesLane "During a round *located* travels on the page's own lane."
    "16" RoundsAfterConnect "No round starts before the destination has acknowledged all locations."
    "16" PauseSendsLocations "The pause sends every page whose location changed."
    "16" PauseSendsHeld "The pause sends every page whose *held* changed."
    "17" NoneWillFollow "*Vacated* says that every page was sent or located, and that none will follow."
    "17" AnsweredIsSent "A page that answered a demand counts as sent."
    "17" SentStaysSent "A page that was sent stays sent when a demand for it crosses it."
    "17" MarkOnEveryLane "*Vacated* is answered when all lanes have been read up to its mark."
    "17" NoPageIsSource "The destination says *released* only if no page is `Source`."
    "17" OnlyReleasedFrees "Only *released* frees the source."
    "17" ReleasedIsRepeated "*Released* is repeated."
    "17" AskAgainAfterCut "When lanes end, every waiting fault is asked of its location again."
    "18" UnacknowledgedIsNeither "After a cut before *run*, what was not acknowledged counts as neither sent nor announced."
    "18" TableRepeated "After a reattachment the source repeats the table."
    "18" DestinationLists "After a cut after *run* the destination lists the pages whose location is `Source`."
    "18" OldLanesEnd "Before a reattachment is answered the old lanes are closed and their threads have ended."
    "18" GenerationsGoOn "After a reattachment generations go on above all that were used."
    "19" ReleasedWithoutSource "The destination decides *released* by itself when the source is gone."
    "20" PinnedPagesStay "What VMM and KVM touch while they save is never evicted."
    "20" ReadersAskTheMap "Every reader in the pause asks the map and passes over what is not `Here`."
    "20" FetchedBeforeThePause "With `fetch` stored pages are read before the pause begins."
    // Eviction
    "21" OutOfReachFirst "An eviction takes the page out of the guest's reach before it is put."
    "21" TouchCancels "A touch maps the page again and cancels the eviction."
    "21" FailedPutMapsBack "A failed put maps the page back."
    "21" BusyPageStays "A busy or pinned page stays."
    "22" NoEvictionFromConnect "From `connect` on the source evicts no page."
    "22" MidEvictionMappedBack "Pages in mid-eviction are mapped back before `connect` returns."
    // Staging, contents, hand-over
    "staging" SameIncarnation "A reattachment goes on only with the same incarnation."
    "staging" LaterRoundsNotSent "Pages of rounds after the last complete one count as not sent."
    "staging" OneConsumer "While a VM is staged its tracker has one consumer."
    "gang" ReferenceIsAtomic "`reference` returns what exists and holds it, in one step."
    "gang" ReferencesAreASet "References are a set, never a count."
    "gang" ReleasedByForget "A reference is released only by `forget` of its namespace."
    "gang" CopyIsHashed "Whoever claims a content hashes and puts one copy."
    "gang" ClaimHasLease "A claim has a lease."
    "gang" WaiterSendsDirectly "Whoever waits for a claim sends the page directly."
    "gang" HashConfirmed "A hash that the stored content does not confirm is never used."
    "hand-over" SuccessorRegistersFirst "The successor watches every page that is not `Here` before it touches any."
    "hand-over" PredecessorInstallsNothing "The predecessor drains its gets and installs nothing from the pause on."
    "hand-over" SuccessorOwnNamespace "The successor writes a namespace of its own."
    "hand-over" SuccessorForgetsInherited "The successor forgets the inherited namespaces."
}

/// The sentences that are in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules(u128);

impl Rules {
    /// Returns the design as it stands: every sentence is in force.
    pub fn all() -> Self {
        assert!(Rule::ALL.len() < 128, "one bit for each sentence");
        Rules(u128::MAX)
    }

    /// Returns these rules without the sentence `rule`.
    pub fn without(self, rule: Rule) -> Self {
        Rules(self.0 & !(1 << rule as u32))
    }

    /// Returns whether the sentence `rule` is in force.
    pub fn has(self, rule: Rule) -> bool {
        self.0 & (1 << rule as u32) != 0
    }
}
