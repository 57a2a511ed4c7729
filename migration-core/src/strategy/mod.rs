//! Strategies: the order in which the pages and the ownership of a VM move.
//!
//! A [`Strategy`] is a short script of *verbs*. It holds a token: [`Running`] while the guest runs,
//! [`Paused`] while it does not, [`HandedOver`] when the destination owns it. Tokens are moved, not
//! copied. So only a running VM can be paused, only a paused one can be resumed or handed over, and
//! nothing can be resumed after a hand-over. The verbs themselves are the object-safe trait
//! [`Verbs`]. The [engine](crate::engine) implements it over real channels, and the
//! [simulator](crate::sim) in virtual time. A strategy runs on both unchanged.
//!
//! | token | verbs |
//! |---|---|
//! | [`Running`] | [`start_tracking`](Running::start_tracking), [`send`](Running::send), [`put`](Running::put), [`harvest`](Running::harvest), [`wait`](Running::wait), [`connect`](Running::connect), [`throttle`](Running::throttle), [`pause`](Running::pause), [`commit`](Running::commit), [`cancel`](Running::cancel) |
//! | [`Paused`] | [`send_rest`](Paused::send_rest), [`resume`](Paused::resume), [`hand_over`](Paused::hand_over) |
//! | [`HandedOver`] | [`serve`](HandedOver::serve), [`finish`](HandedOver::finish) |
//!
//! Pages move to a [`Place`]: over the direct link to the destination, or into [page
//! stores](crate::store). Not every engine implements [`Running::put`], [`Running::wait`],
//! [`Running::connect`] and [`Running::locations`]. An engine without them returns an error that
//! says so.

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

/// A method of migrating a VM.
pub trait Strategy: Send {
    /// Returns the name of the strategy, as users write it.
    fn name(&self) -> &'static str;

    /// Returns whether the strategy hands the VM over with pages missing. A destination that cannot
    /// load missing pages on demand is then refused before any page moves.
    fn needs_post_copy(&self) -> bool {
        false
    }

    /// Returns whether the strategy ends with a [commit](Running::commit). Only an engine that puts
    /// pages into a store runs such a strategy. A migration refuses it before it does anything
    /// else.
    fn needs_store(&self) -> bool {
        false
    }

    /// Returns the places in stores into which the strategy puts pages, before or after the
    /// hand-over. An engine that has no such store, or whose destination has none, refuses the
    /// strategy before any page moves.
    fn stores(&self) -> Vec<Place> {
        Vec::new()
    }

    /// Returns whether pages that are in stores when the migration begins stay there, so that only
    /// their locations move. Otherwise they are read and sent like all other pages.
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
    /// moves. The destination maps the RAM before [`migrate`](Self::migrate) is called. If it
    /// cannot, the migration is refused at that point.
    fn shares_ram(&self) -> bool {
        false
    }

    /// Returns whether the user can force the switch-over of this strategy. The strategy then ends
    /// its rounds as soon as [`Running::switch_over_wanted`] returns `true`. If this is `false`, a
    /// user's command to switch over is refused.
    fn can_switch_over(&self) -> bool {
        false
    }

    /// Moves the VM. Returns [`Done`] when the destination runs it.
    ///
    /// # Errors
    /// Returns the errors of the verbs. The engine then acts as the protocol says about ownership:
    /// before the hand-over it undoes everything, and the guest continues at the source.
    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError>;
}

/// The result of one [`Running::send`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// The number of the round, from 1.
    pub generation: u32,
    /// The number of pages that were to be sent.
    pub asked: u64,
    /// The number of pages that the destination holds now. Less than `asked` if a deadline passed
    /// first. The other pages are part of the next harvest.
    pub sent: u64,
    /// The number of bytes on the wire.
    pub wire_bytes: u64,
    /// The time from the first byte to the destination's acknowledgement.
    pub time: Duration,
}

/// The measurements of the link and the settings of the session, from which a strategy decides. In
/// the default nothing is measured, and no downtime is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// The bandwidth of the link in bytes a second, measured in the last rounds; 0 before the first
    /// round.
    pub bytes_per_second: f64,
    /// The number of wire bytes per page sent in the last rounds. Zero pages are included.
    pub bytes_per_page: f64,
    /// The time per page in the last rounds, in seconds, beside its transfer over the link: to read
    /// the page and to find whether it is zero.
    pub seconds_per_page: f64,
    /// The part of the downtime that depends neither on pages nor on the bandwidth: pausing,
    /// saving, loading, and two [round trips](Self::round_trip).
    pub fixed_downtime: Duration,
    /// The shortest round trip that was measured.
    pub round_trip: Duration,
    /// The number of round trips that were measured.
    pub round_trips: u32,
    /// The number of bytes of state that only the pause can move.
    pub state_bytes: u64,
    /// The number of bytes of state that devices still have to send in pieces. The pieces move
    /// while the guest runs, or else in the pause.
    pub pending_bytes: u64,
    /// The longest acceptable downtime.
    pub downtime_limit: Duration,
    /// The time since the migration began.
    pub elapsed: Duration,
    /// Whether the time that the user allowed has passed.
    pub timed_out: bool,
    /// Whether to stop the guest whatever the downtime, when the time-out passes or as soon as it
    /// is certain that the limit cannot be kept. If `false`, the migration gives up.
    pub stop_on_timeout: bool,
    /// Whether to hand the guest over in these cases and let the other pages follow. Takes
    /// precedence over `stop_on_timeout` if the destination can [load missing
    /// pages](Self::can_post_copy).
    pub post_copy_on_timeout: bool,
    /// The limit of the disturbance of the guest.
    pub impact: GuestImpact,
    /// Whether the destination can load missing pages on demand.
    pub can_post_copy: bool,
    /// Whether the user has requested post-copy: to hand over now and let the other pages follow.
    /// Also set when the time-out has passed and the user has chosen this for a time-out.
    pub post_copy_wanted: bool,
}

impl Link {
    /// Returns the predicted downtime if the guest were paused now with `pages` pages to send.
    pub fn predict(&self, pages: u64) -> Duration {
        let pending = self.transfer(self.pending_bytes as f64);
        self.floor().saturating_add(pending).saturating_add(self.pages_time(pages))
    }

    /// Returns the part of the predicted downtime that is due to `pages` pages. Another round or a
    /// throttle can lower it.
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

    /// Returns the downtime that remains when no page is dirty and no piece of state is pending.
    /// Neither another round nor a throttle can lower it.
    pub fn floor(&self) -> Duration {
        self.fixed_downtime.saturating_add(self.state_time())
    }

    /// Returns the part of the [floor](Self::floor) that the state takes on the link, or zero while
    /// the bandwidth is unknown.
    pub fn state_time(&self) -> Duration {
        self.transfer(self.state_bytes as f64)
    }

    /// Returns the time that `bytes` bytes take on the link, or zero while the bandwidth is
    /// unknown.
    fn transfer(&self, bytes: f64) -> Duration {
        if self.bytes_per_second <= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(bytes / self.bytes_per_second).unwrap_or(NEVER).min(NEVER)
    }
}

/// A time that is longer than any migration, and small enough that sums with it do not overflow.
const NEVER: Duration = Duration::from_secs(1 << 40);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PageRange, PageSet};

    const PAGES: u64 = 100;

    /// A VM that records the calls of a strategy. Pages 5 to 9 are dirty after each round.
    #[derive(Default)]
    struct Noted {
        calls: Vec<String>,
        link: Link,
        /// The number of rounds after which the user has requested to switch over.
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

    /// Returns the calls of a strategy, and whether the strategy succeeded.
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
