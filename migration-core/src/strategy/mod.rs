//! Strategies: in which order the pages and the ownership of a VM move.
//!
//! A [`Strategy`] is a short script over *verbs*. It holds a token: [`Running`] while the guest
//! runs, [`Paused`] while it does not, [`HandedOver`] when the destination owns it. Tokens are
//! moved, not copied, so only a running VM can be paused, only a paused one can resume or be handed
//! over, and nothing resumes after a hand-over. The verbs themselves are the object-safe trait
//! [`Verbs`], which the [engine](crate::engine) implements over real channels and the
//! [simulator](crate::sim) in virtual time: a strategy runs on both unchanged.
//!
//! | token | verbs |
//! |---|---|
//! | [`Running`] | [`start_tracking`](Running::start_tracking), [`send`](Running::send), [`put`](Running::put), [`harvest`](Running::harvest), [`wait`](Running::wait), [`connect`](Running::connect), [`throttle`](Running::throttle), [`pause`](Running::pause), [`commit`](Running::commit), [`cancel`](Running::cancel) |
//! | [`Paused`] | [`send_rest`](Paused::send_rest), [`resume`](Paused::resume), [`hand_over`](Paused::hand_over) |
//! | [`HandedOver`] | [`serve`](HandedOver::serve), [`finish`](HandedOver::finish) |
//!
//! Pages go to a [`Place`]: over the direct link to the destination, or into
//! [page stores](crate::store). [`Running::put`], [`Running::wait`], [`Running::connect`] and
//! [`Running::locations`] are not in every engine: one that lacks them refuses with the reason.

mod agile;
mod convergence;
mod hand_over;
mod place;
mod post_copy;
mod precopy;
pub mod push_order;
mod quick_eviction;
mod scatter_gather;
mod snapshot;
mod stop_and_copy;
mod verbs;

use std::time::Duration;

pub use agile::Agile;
pub use convergence::{Convergence, ModelConvergence, Next, Wanted};
pub use hand_over::HandOver;
pub use place::{Destination, Place, Portion, Put, Until, Wake};
pub use post_copy::{Hybrid, PostCopy};
pub use precopy::PreCopy;
pub use push_order::{HotFirst, Linear, PushOrder};
pub use quick_eviction::{Finish, QuickEviction};
pub use scatter_gather::ScatterGather;
pub use snapshot::Snapshot;
pub use stop_and_copy::StopAndCopy;
pub use verbs::{Done, HandedOver, Paused, Running, Verbs};

pub use crate::error::StillMissing;
use crate::{MigrationError, spawner::GuestImpact};

/// A way to migrate a VM.
pub trait Strategy: Send {
    /// Its name, as users write it.
    fn name(&self) -> &'static str;

    /// Returns whether it hands the VM over with pages missing: a destination that cannot serve
    /// them is then refused before any page moves.
    fn needs_post_copy(&self) -> bool {
        false
    }

    /// Returns whether it ends by a [commit](Running::commit): only an engine that puts pages into
    /// a store runs it, and a migration refuses it before anything else is done.
    fn needs_store(&self) -> bool {
        false
    }

    /// Returns the places in stores into which it puts pages, now or after the hand-over. An engine
    /// that has no such store, or whose destination has none, refuses the strategy before anything
    /// moves.
    fn stores(&self) -> Vec<Place> {
        Vec::new()
    }

    /// Returns whether pages that are in stores when the migration begins stay there, and only
    /// their locations move. Otherwise they are read and sent, as all other pages.
    fn keeps_stored_pages(&self) -> bool {
        false
    }

    /// Returns whether the strategy [connects](Running::connect) by itself, because the destination
    /// is named later. Otherwise the engine is connected before [`migrate`](Self::migrate) is
    /// called.
    fn connects_itself(&self) -> bool {
        false
    }

    /// Returns whether source and destination, on one machine, share the VM's RAM, so that no page
    /// moves. The destination maps it before [`migrate`](Self::migrate) is called; where that
    /// cannot be, the migration is refused then.
    fn shares_ram(&self) -> bool {
        false
    }

    /// Returns whether the user can force its switch-over: it then ends its rounds as soon as
    /// [`Running::switch_over_wanted`] says so. Where this is `false` the user is refused.
    fn can_switch_over(&self) -> bool {
        false
    }

    /// Moves the VM. Comes back with [`Done`] when the destination runs it.
    ///
    /// # Errors
    /// Pass on what the verbs return. The engine then does what the protocol says about ownership:
    /// until the hand-over it gives everything back and the guest runs on.
    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError>;
}

/// What one [`Running::send`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// Its number, from 1.
    pub generation: u32,
    /// Pages that were to be sent.
    pub asked: u64,
    /// Pages that the destination holds now. Less than `asked` if a deadline came first; the rest
    /// is part of the next harvest.
    pub sent: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// From the first byte to the destination's acknowledgement.
    pub time: Duration,
}

/// What is known of the link and the session, to judge by. The default knows nothing, and allows no
/// downtime.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Bytes a second that the link carries, by the last rounds; 0 before the first.
    pub bytes_per_second: f64,
    /// Wire bytes per page sent, zero pages included, in the last rounds.
    pub bytes_per_page: f64,
    /// Seconds that a page takes beside its way over the link, in the last rounds: reading it,
    /// finding that it is zero.
    pub seconds_per_page: f64,
    /// The part of the downtime that depends neither on pages nor on the bandwidth: pausing,
    /// saving, loading, and two [round trips](Self::round_trip).
    pub fixed_downtime: Duration,
    /// The shortest round trip that was seen.
    pub round_trip: Duration,
    /// The number of round trips were looked at.
    pub round_trips: u32,
    /// Bytes of state that only the pause can move.
    pub state_bytes: u64,
    /// Bytes of state that devices have still to send in pieces, while the guest runs or else in
    /// the pause.
    pub pending_bytes: u64,
    /// The longest downtime that is acceptable.
    pub downtime_limit: Duration,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// Whether the time that the user allowed has passed.
    pub timed_out: bool,
    /// What to do then, or as soon as it is certain that the limit cannot be kept: `true` stops the
    /// guest whatever the downtime, `false` gives up.
    pub stop_on_timeout: bool,
    /// In the same case, before all else: hand the guest over and let the rest follow, if the
    /// destination can [serve missing pages](Self::can_post_copy).
    pub post_copy_on_timeout: bool,
    /// How much the guest may be disturbed.
    pub impact: GuestImpact,
    /// Whether the destination can serve missing pages.
    pub can_post_copy: bool,
    /// Whether the user has asked to hand over now and let the rest follow, or has set that as what
    /// a time-out does.
    pub post_copy_wanted: bool,
}

impl Link {
    /// The downtime to expect if the guest were paused now with `pages` pages to send.
    pub fn predict(&self, pages: u64) -> Duration {
        let pending = self.transfer(self.pending_bytes as f64);
        self.floor().saturating_add(pending).saturating_add(self.pages_time(pages))
    }

    /// Returns the part of the predicted downtime that `pages` pages are to blame for. It is what
    /// another round or a throttle can lower.
    pub fn pages_time(&self, pages: u64) -> Duration {
        if pages == 0 {
            return Duration::ZERO;
        }
        if self.bytes_per_second <= 0.0 {
            return NEVER;
        }
        let seconds = pages as f64 * (self.bytes_per_page / self.bytes_per_second + self.seconds_per_page);
        Duration::try_from_secs_f64(seconds).unwrap_or(NEVER).min(NEVER)
    }

    /// Returns the downtime that is left when no page is dirty and no piece of state is pending.
    /// Neither another round nor a throttle can lower it.
    pub fn floor(&self) -> Duration {
        self.fixed_downtime.saturating_add(self.state_time())
    }

    /// Returns the part of the [floor](Self::floor) that the state takes on the link; nothing as
    /// long as the bandwidth is unknown.
    pub fn state_time(&self) -> Duration {
        self.transfer(self.state_bytes as f64)
    }

    /// Returns the time that so many bytes take on the link; nothing as long as the bandwidth is
    /// unknown.
    fn transfer(&self, bytes: f64) -> Duration {
        if self.bytes_per_second <= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(bytes / self.bytes_per_second).unwrap_or(NEVER).min(NEVER)
    }
}

/// Longer than any migration; small enough to be added to.
const NEVER: Duration = Duration::from_secs(1 << 40);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PageRange, PageSet};

    const PAGES: u64 = 100;

    /// A VM that notes what a strategy does to it. Pages 5 to 9 are dirty after each round.
    #[derive(Default)]
    struct Noted {
        calls: Vec<String>,
        link: Link,
        /// After so many rounds the user has asked to switch over.
        wanted_after: usize,
        rounds: usize,
    }

    impl Noted {
        fn note(&mut self, what: impl Into<String>) -> Result<(), MigrationError> {
            self.calls.push(what.into());
            Ok(())
        }
    }

    impl Verbs for Noted {
        fn pages(&self) -> u64 {
            PAGES
        }

        fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
            Ok(PageSet::full(PAGES))
        }

        fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
            self.rounds += 1;
            self.note(format!("send {}", pages.len()))?;
            Ok(Round { asked: pages.len(), sent: pages.len(), ..Round::default() })
        }

        fn harvest(&mut self) -> Result<PageSet, MigrationError> {
            let mut dirty = PageSet::empty(PAGES);
            dirty.insert_range(PageRange::new(5, 5));
            Ok(dirty)
        }

        fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
            self.note(format!("throttle {percent}"))
        }

        fn link(&self) -> Link {
            self.link
        }

        fn switch_over_wanted(&self) -> bool {
            self.rounds >= self.wanted_after
        }

        fn expect_downtime(&mut self, prediction: Duration) {
            self.calls.push(format!("expect {prediction:?}"));
        }

        fn stalled(&mut self, why: &str) {
            self.calls.push(format!("stalled: {}", why.split(" of ").next().unwrap_or_default()));
        }

        fn pause(&mut self) -> Result<(), MigrationError> {
            self.note("pause")
        }

        fn resume(&mut self) -> Result<(), MigrationError> {
            self.note("resume")
        }

        fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
            self.note(format!("send the rest, {}", pages.len()))
        }

        fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError> {
            self.note(format!("hand over without {} of {}", missing.len(), missing.capacity()))
        }

        fn missing_at_hand_over(&self) -> u64 {
            0
        }

        fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
            self.note(format!("serve {}", order.name()))
        }
    }

    /// What a strategy does, and whether it came to its end.
    fn done(strategy: &mut dyn Strategy, mut vm: Noted) -> (Vec<String>, bool) {
        assert_eq!(Running::new(&mut vm).pages(), PAGES);
        let done = strategy.migrate(Running::new(&mut vm)).is_ok();
        (vm.calls, done)
    }

    fn linear() -> Box<dyn PushOrder> {
        Box::new(Linear::default())
    }

    #[test]
    fn each_strategy_does_what_it_is_named_after() {
        type Row = (Box<dyn Strategy>, &'static str, [bool; 2], &'static [&'static str]);
        let strategies: [Row; 5] = [
            (
                Box::new(StopAndCopy),
                "stop-and-copy",
                [false, false],
                &["pause", "send the rest, 100", "hand over without 0 of 100"],
            ),
            (Box::new(HandOver), "handover", [false, false], &["pause", "hand over without 0 of 100"]),
            (
                Box::new(PostCopy { order: linear() }),
                "post-copy",
                [false, true],
                &["pause", "hand over without 100 of 100", "serve linear"],
            ),
            (
                Box::new(Hybrid { rounds: 2, order: linear() }),
                "hybrid",
                [true, true],
                &["send 100", "send 5", "pause", "hand over without 5 of 100", "serve linear"],
            ),
            (
                Box::new(PreCopy::<ModelConvergence>::default()),
                "pre-copy",
                [true, false],
                &["send 100", "expect 0ns", "pause", "send the rest, 5", "hand over without 0 of 100"],
            ),
        ];
        for (mut strategy, name, [switches_over, post_copies], calls) in strategies {
            assert_eq!(strategy.name(), name);
            assert_eq!(
                (strategy.can_switch_over(), strategy.needs_post_copy()),
                (switches_over, post_copies),
                "{name}"
            );
            let link = Link { bytes_per_second: 1e9, downtime_limit: Duration::from_secs(1), ..Link::default() };
            let (did, done) = done(&mut *strategy, Noted { link, wanted_after: usize::MAX, ..Noted::default() });
            assert!(done && did == calls, "{name}: {did:?}");
        }
    }

    #[test]
    fn a_switch_over_that_is_asked_for_ends_the_rounds() {
        let (fixed_downtime, downtime_limit) = (Duration::from_millis(7), Duration::from_secs(1));
        let link = Link { fixed_downtime, downtime_limit, bytes_per_page: 1e6, ..Link::default() };
        let wanted = |link| Noted { link, wanted_after: 1, ..Noted::default() };
        let pre_copy = || PreCopy::<ModelConvergence>::default();
        let rest = ["pause", "send the rest, 5", "hand over without 0 of 100"];
        let (did, _) = done(&mut pre_copy(), wanted(link));
        assert_eq!(did, [&["send 100"][..], &rest].concat(), "nothing is predicted before the bandwidth is known");
        let (did, _) = done(&mut pre_copy(), wanted(Link { bytes_per_second: 1e9, ..link }));
        assert_eq!(did, [&["send 100", "expect 12ms"][..], &rest].concat());
        let (did, _) = done(&mut Hybrid { rounds: 9, order: linear() }, wanted(link));
        assert_eq!(did, ["send 100", "pause", "hand over without 5 of 100", "serve linear"]);
        let post_copy = Link { post_copy_wanted: true, ..link };
        for strategy in [&mut pre_copy() as &mut dyn Strategy, &mut Hybrid { rounds: 1, order: linear() }] {
            let (did, _) = done(strategy, Noted { link: post_copy, wanted_after: usize::MAX, ..Noted::default() });
            assert_eq!(did[did.len() - 3], "pause");
            assert_eq!(did[did.len() - 1], "serve linear");
        }
    }

    #[test]
    fn a_strategy_that_gives_up_says_why_and_leaves_the_guest() {
        let link =
            Link { fixed_downtime: Duration::from_secs(2), downtime_limit: Duration::from_secs(1), ..Link::default() };
        let vm = Noted { link, wanted_after: usize::MAX, ..Noted::default() };
        let (did, done) = done(&mut PreCopy::<ModelConvergence>::default(), vm);
        assert!(!done && did == ["stalled: a downtime"], "{did:?}");
    }

    #[test]
    fn an_engine_that_lacks_a_verb_says_so() {
        let mut vm = Noted::default();
        let mut vm = Running::new(&mut vm);
        let stage = Place::stage(["rack-7"]);
        let mut pages = PageSet::full(PAGES);
        let refused = [
            vm.put(&mut pages, stage.at_most(5)).map(|put| put.round.sent).unwrap_err(),
            vm.wait(Until::command()).unwrap_err(),
            vm.wait(Until::default()).unwrap_err(),
            vm.connect(&Destination::named("host-2")).unwrap_err(),
            vm.locations().unwrap_err(),
        ]
        .map(|error| error.to_string());
        let words = ["stage in rack-7", "cannot wait", "waits for nothing", "host-2", "where pages are"];
        for (text, word) in refused.iter().zip(words) {
            assert!(text.starts_with("blocked: ") && text.contains(word), "{text}");
        }
        assert_eq!(pages.len(), PAGES, "nothing was put");
        let error = vm.commit().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("no store to commit"), "{error}");
    }
}
