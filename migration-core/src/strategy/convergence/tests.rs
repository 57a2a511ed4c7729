use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn link(limit_ms: u64) -> Link {
    Link {
        bytes_per_second: 1e9,
        bytes_per_page: 4096.0,
        fixed_downtime: 2 * MS,
        round_trip: MS / 10,
        round_trips: 1,
        state_bytes: 10_000,
        downtime_limit: Duration::from_millis(limit_ms),
        elapsed: Duration::from_secs(1),
        ..Link::default()
    }
}

fn dirty(pages: u64) -> PageSet {
    let mut set = PageSet::empty(1 << 22);
    set.insert_range(crate::PageRange::new(0, pages));
    set
}

fn round(sent: u64) -> Round {
    Round { generation: 1, asked: sent, sent, wire_bytes: sent * 4096, time: 100 * MS }
}

/// Passes the same round to the model repeatedly, until the model ends the rounds. Returns the
/// number of rounds and the last decision.
fn rounds_of(model: &mut ModelConvergence, sent: u64, left: u64, link: &Link) -> (usize, Next) {
    for rounds in 1..1000 {
        match model.judge(&round(sent), &dirty(left), link) {
            Next::Round | Next::Throttle(_) => {}
            end => return (rounds, end),
        }
    }
    panic!("no end of rounds");
}

#[test]
fn a_quiet_guest_is_switched_over_at_once() {
    let next = ModelConvergence::default().judge(&round(100_000), &dirty(10), &link(300));
    assert!(matches!(next, Next::SwitchOver(Wanted { downtime }) if downtime < 3 * MS), "{next:?}");
}

#[test]
fn a_stall_throttles_within_bounds_then_gives_up_with_the_figures() {
    let mut model = ModelConvergence::default();
    let (mut throttle, mut at_most) = (0, 0);
    let why = loop {
        match model.judge(&round(100_000), &dirty(100_000), &link(50)) {
            Next::Throttle(percent) => {
                assert!(percent > throttle && percent <= 99);
                throttle = percent;
            }
            Next::Round => {
                assert_eq!(throttle, 99);
                at_most += 1;
            }
            Next::GiveUp(why) => break why,
            other => panic!("{other:?}"),
        }
    };
    assert!((1..=HOPELESS_STALLS).contains(&at_most), "{at_most}");
    for word in ["100000 pages", "412 ms of the 50 ms allowed", "throttled by 99 %", "no new minimum"] {
        assert!(why.contains(word), "{why}: {word}");
    }
    assert_eq!(model.stalled(), Some(&*why));
}

#[test]
fn a_stall_does_what_the_user_chose() {
    let stop = Link { stop_on_timeout: true, ..link(50) };
    let post_copy = Link { post_copy_on_timeout: true, can_post_copy: true, ..link(50) };
    let cannot = Link { can_post_copy: false, ..post_copy };
    let end = |link: &Link| {
        let mut model = ModelConvergence::default();
        let (_, end) = rounds_of(&mut model, 100_000, 100_000, link);
        assert!(model.stalled().is_some_and(|why| why.contains("not converging")));
        end
    };
    assert!(matches!(end(&stop), Next::SwitchOver(Wanted { downtime }) if downtime > 400 * MS));
    assert_eq!(end(&post_copy), Next::PostCopy);
    assert!(matches!(end(&cannot), Next::GiveUp(_)));
}

#[test]
fn a_time_out_gives_up_only_what_is_not_within_the_limit() {
    let late = |limit| Link { timed_out: true, ..link(limit) };
    let judge = |link: &Link| ModelConvergence::default().judge(&round(100_000), &dirty(100_000), link);
    assert!(matches!(judge(&late(50)), Next::GiveUp(why) if why.contains("not converged in time")));
    assert!(matches!(judge(&Link { stop_on_timeout: true, ..late(50) }), Next::SwitchOver(_)));
    assert!(matches!(judge(&late(500)), Next::SwitchOver(_)), "it is within the limit");
}

#[test]
fn a_stall_within_the_limit_ends_without_a_time_out() {
    for impact in [GuestImpact::Low, GuestImpact::Balanced, GuestImpact::Fast] {
        let mut model = ModelConvergence::default();
        let (rounds, end) = rounds_of(&mut model, 100_000, 100_000, &Link { impact, ..link(1000) });
        assert!(rounds < 20 && matches!(end, Next::SwitchOver(_)), "{impact:?}: {rounds}, {end:?}");
        assert_eq!(model.stalled(), None);
    }
}

/// The fixed costs, the round trips or the state alone are above the limit, and nothing is dirty.
#[test]
fn a_limit_below_the_floor_ends_at_once_with_its_parts() {
    let slow_vmms = Link { fixed_downtime: 120 * MS, ..link(4) };
    let far = Link { fixed_downtime: 1002 * MS, round_trip: 500 * MS, round_trips: FLOOR_LOOKS, ..link(300) };
    let large = Link { state_bytes: 1_000_000_000, round_trips: FLOOR_LOOKS, ..link(300) };
    for (link, parts) in [
        (slow_vmms, ["of 4 ms", "takes 120 ms", "120 ms to pause, save and load"]),
        (far, ["of 300 ms", "takes 1002 ms", "1000 ms for two round trips"]),
        (large, ["of 300 ms", "takes 1002 ms", "1000 ms for 1000000000 bytes of state"]),
    ] {
        for left in [0, 10, 1000] {
            let (rounds, Next::GiveUp(why)) = rounds_of(&mut ModelConvergence::default(), 100_000, left, &link) else {
                panic!("goes on");
            };
            assert!(rounds <= 2, "{rounds}");
            parts.iter().for_each(|part| assert!(why.contains(part), "{why}: {part}"));
            let choice = Link { post_copy_on_timeout: true, can_post_copy: true, ..link };
            assert_eq!(rounds_of(&mut ModelConvergence::default(), 100_000, left, &choice).1, Next::PostCopy);
            // the guest is stopped, but only after the rounds that are worth their time
            let choice = Link { stop_on_timeout: true, ..link };
            let (rounds, end) = rounds_of(&mut ModelConvergence::default(), 2 * left, left, &choice);
            assert!(rounds <= 4 && matches!(end, Next::SwitchOver(_)), "{rounds}: {end:?}");
        }
    }
}

#[test]
fn what_the_vmms_say_is_known_before_the_first_round() {
    let unknown = |limit| Link { bytes_per_second: 0.0, fixed_downtime: 120 * MS, ..link(limit) };
    let begin = |link: &Link| ModelConvergence::default().begin(link);
    assert!(matches!(begin(&unknown(4)), Next::GiveUp(why) if why.contains("120 ms")));
    assert_eq!(begin(&unknown(300)), Next::Round);
    assert_eq!(begin(&Link { stop_on_timeout: true, ..unknown(4) }), Next::Round);
    assert_eq!(begin(&Link { post_copy_on_timeout: true, can_post_copy: true, ..unknown(4) }), Next::Round);
    // one slow round trip may be an exception
    let far = Link { fixed_downtime: 1002 * MS, round_trip: 500 * MS, ..unknown(300) };
    assert_eq!(begin(&far), Next::Round);
}

#[test]
fn a_link_that_is_slow_at_first_is_looked_at_again() {
    let mut model = ModelConvergence::default();
    let slow = Link { fixed_downtime: 1002 * MS, round_trip: 500 * MS, ..link(300) };
    for _ in 1..FLOOR_LOOKS {
        assert_eq!(model.judge(&round(1000), &dirty(5), &slow), Next::Round);
    }
    assert!(matches!(model.clone().judge(&round(5), &dirty(5), &slow), Next::GiveUp(_)));
    assert!(matches!(model.judge(&round(5), &dirty(5), &link(300)), Next::SwitchOver(_)));
}

#[test]
fn dirty_pages_that_are_few_against_the_limit_are_not_throttled() {
    // the guest dirties 1 MiB in each round, at 1 GB/s and at 1 Gbit/s, within a limit of 300 ms
    for bytes_per_second in [1e9, 125e6] {
        let link = Link { bytes_per_second, ..link(300) };
        let mut model = ModelConvergence::default();
        let (rounds, end) = rounds_of(&mut model, 256, 256, &link);
        assert!(rounds <= 3 && matches!(end, Next::SwitchOver(_)), "{rounds}: {end:?}");
        assert_eq!(model.throttle, 0);
    }
    // pages that take half of the limit are worth a gentle throttle
    let next = ModelConvergence::default().judge(&round(40_000), &dirty(40_000), &link(300));
    assert!(matches!(next, Next::Throttle(1..=80)), "{next:?}");
}

#[test]
fn pending_pieces_count_and_are_given_rounds_without_a_throttle() {
    let pending = |bytes| Link { pending_bytes: bytes, ..link(50) };
    let mut model = ModelConvergence::default();
    for bytes in [1_000_000_000, 500_000_000, 200_000_000, 80_000_000] {
        assert!(pending(bytes).predict(0) > 50 * MS);
        assert_eq!(model.judge(&round(100), &dirty(100), &pending(bytes)), Next::Round);
    }
    assert!(matches!(model.judge(&round(100), &dirty(100), &pending(0)), Next::SwitchOver(_)));
    // pending state that does not shrink is no reason to throttle the guest
    let mut model = ModelConvergence::default();
    let (rounds, end) = rounds_of(&mut model, 100, 100, &pending(1_000_000_000));
    assert!(rounds <= 12 && matches!(&end, Next::GiveUp(why) if why.contains("1000000000 bytes of device state")));
    assert_eq!(model.throttle, 0);
}

#[test]
fn a_chance_that_was_missed_once_is_taken_the_next_time() {
    let mut model = ModelConvergence::default();
    let link = link(50);
    assert_eq!(model.judge(&round(100_000), &dirty(10_000), &link), Next::Round, "within, and better things to come");
    assert!(matches!(model.judge(&round(10_000), &dirty(50_000), &link), Next::Throttle(_)), "above it after all");
    assert!(matches!(model.judge(&round(50_000), &dirty(10_000), &link), Next::SwitchOver(_)));
}

#[test]
fn the_throttle_leaves_half_of_what_a_good_round_needs() {
    let stronger = |throttle, shrink, most| {
        let mut model = ModelConvergence { throttle, stalls: 7, ..ModelConvergence::default() };
        assert_eq!((model.stronger(shrink, most), model.stalls), (Next::Throttle(model.throttle), 0));
        model.throttle
    };
    // a guest that dirties as many pages as are sent keeps a quarter of its time
    let by_need = [(0, 1.0), (75, 1.0), (0, 0.625), (0, 4.0)].map(|(throttle, shrink)| stronger(throttle, shrink, 99));
    assert_eq!(by_need, [75, 93, 60, 93]);
    // the throttle grows by at least 5 percent, and stays within its bounds
    assert_eq!(
        [stronger(0, 0.26, 99), stronger(40, 0.26, 99), stronger(97, 1.0, 99), stronger(0, 1.0, 60)],
        [5, 45, 99, 60]
    );
}

#[test]
fn only_a_clear_gain_is_a_new_minimum() {
    let (mut model, link) = (ModelConvergence::default(), link(300));
    for (round, (left, stalls)) in (1..).zip([(100, 0), (95, 1), (91, 2), (86, 0), (120, 1)]) {
        model.note(&Prediction::of(left, &link), &link);
        assert_eq!((model.rounds, model.stalls), (round, stalls), "{left}");
    }
    assert_eq!(model.best, 86 * PAGE_SIZE as u64);
}

#[test]
fn how_good_is_good_enough_depends_on_what_the_guest_may_feel() {
    let good = |impact| ModelConvergence::good_enough(&Link { impact, ..link(300) });
    assert_eq!([GuestImpact::Low, GuestImpact::Balanced, GuestImpact::Fast].map(good), [100 * MS, 6 * MS, 6 * MS]);
}

/// Returns the next step of a model in the state `seen`, by one of its three decisions.
fn next_of(
    way: fn(&mut ModelConvergence, f64, &Prediction, &Link) -> Next,
    mut seen: ModelConvergence,
    (shrink, left): (f64, u64),
    link: &Link,
) -> &'static str {
    match way(&mut seen, shrink, &Prediction::of(left, link), link) {
        Next::Round => "round",
        Next::Throttle(_) => "throttle",
        Next::SwitchOver(_) => "switch-over",
        Next::PostCopy => "post-copy",
        Next::GiveUp(_) => "give up",
    }
}

fn seen(rounds: u32, stalls: u32, throttle: u8) -> ModelConvergence {
    ModelConvergence { rounds, stalls, throttle, ..ModelConvergence::default() }
}

#[test]
fn within_the_limit_rounds_go_on_while_they_help() {
    let next = |seen, shrink, left| next_of(ModelConvergence::within, seen, (shrink, left), &link(1000));
    assert_eq!(next(seen(MAX_ROUNDS - 1, MAX_STALLS - 1, 0), 0.5, 50_000), "round");
    assert_eq!(next(seen(MAX_ROUNDS, 0, 0), 0.5, 50_000), "switch-over");
    assert_eq!(next(seen(1, MAX_STALLS, 0), 0.5, 50_000), "switch-over");
    assert_eq!(next(ModelConvergence { lost: true, ..seen(1, 0, 0) }, 0.5, 50_000), "switch-over");
    // one part in twenty of the limit is 50 ms: 12,208 pages
    assert_eq!([12_207, 12_208].map(|left| next(seen(1, 0, 0), 0.51, left)), ["switch-over", "throttle"]);
    assert_eq!([79, 80].map(|throttle| next(seen(1, 0, throttle), 0.51, 50_000)), ["throttle", "switch-over"]);
}

#[test]
fn above_the_limit_there_is_an_end_too() {
    let next = |seen, shrink, left| next_of(ModelConvergence::above, seen, (shrink, left), &link(50));
    assert_eq!(next(seen(MAX_ROUNDS_ABOVE_LIMIT - 1, HOPELESS_STALLS, 99), 0.5, 50_000), "round");
    assert_eq!(next(seen(MAX_ROUNDS_ABOVE_LIMIT, 0, 0), 0.5, 50_000), "give up");
    assert_eq!(
        [98, 99].map(|throttle| next(seen(1, HOPELESS_STALLS, throttle), 0.51, 50_000)),
        ["throttle", "give up"]
    );
    assert_eq!(next(seen(1, HOPELESS_STALLS - 1, 99), 0.51, 50_000), "round");
    // nothing is dirty, but the pending state takes too long
    let pending = Link { pending_bytes: 1_000_000_000, ..link(50) };
    for (stalls, what) in [(HOPELESS_STALLS - 1, "round"), (HOPELESS_STALLS, "give up")] {
        assert_eq!(next_of(ModelConvergence::above, seen(1, stalls, 0), (0.0, 0), &pending), what);
    }
}

#[test]
fn above_the_floor_a_stop_is_made_as_short_as_the_link_allows() {
    // the floor is 2.01 ms; 246 pages take half of it
    let stop = Link { stop_on_timeout: true, ..link(1) };
    let next = |seen, shrink, left, link: &Link| next_of(ModelConvergence::floor_above, seen, (shrink, left), link);
    let helps = || seen(MAX_ROUNDS - 1, MAX_STALLS - 1, 0);
    assert_eq!([245, 246, 10_000].map(|left| next(helps(), 0.5, left, &stop)), ["switch-over", "round", "round"]);
    assert_eq!(next(helps(), 0.51, 10_000, &stop), "switch-over");
    assert_eq!(next(seen(MAX_ROUNDS, 0, 0), 0.5, 10_000, &stop), "switch-over");
    assert_eq!(next(seen(1, MAX_STALLS, 0), 0.5, 10_000, &stop), "switch-over");
    assert_eq!(next(helps(), 0.5, 10_000, &link(1)), "give up");
    let post_copy = Link { post_copy_on_timeout: true, can_post_copy: true, ..stop };
    assert_eq!(next(helps(), 0.5, 10_000, &post_copy), "post-copy");
    assert_eq!(next(helps(), 0.5, 10_000, &Link { can_post_copy: false, ..post_copy }), "round");
    assert_eq!(next(helps(), 0.5, 10_000, &Link { post_copy_on_timeout: false, ..post_copy }), "round");
    // a round trip that is too long is measured more than once, and after more than one round
    let far = Link { fixed_downtime: 1002 * MS, round_trip: 500 * MS, round_trips: FLOOR_LOOKS, ..link(300) };
    let looked = |floor_looks| ModelConvergence { floor_looks, ..ModelConvergence::default() };
    assert_eq!([0, 1].map(|looks| next(looked(looks), 1.0, 5, &far)), ["round", "give up"]);
    let few = Link { round_trips: FLOOR_LOOKS - 1, ..far };
    assert_eq!([1, 2, 3].map(|looks| next(looked(looks), 1.0, 5, &few)), ["round", "round", "give up"]);
}

#[test]
fn a_limit_that_is_just_kept_is_kept() {
    let exact = Link { fixed_downtime: 2 * MS, round_trip: Duration::ZERO, state_bytes: 0, ..link(2) };
    assert_eq!(ModelConvergence::default().begin(&exact), Next::Round);
    let next = ModelConvergence::default().judge(&round(1000), &dirty(1000), &exact);
    assert!(matches!(next, Next::Throttle(_)), "pages are to blame, and not the floor: {next:?}");
    let unknown = Link { bytes_per_second: 0.0, ..link(1) };
    let Next::GiveUp(why) = ModelConvergence::default().begin(&unknown) else { panic!("goes on") };
    assert!(why.contains("as long as 10000 bytes of state take"), "{why}");
}

#[test]
fn pieces_of_state_are_given_rounds_only_while_they_become_clearly_less() {
    let pending = |bytes| Link { pending_bytes: bytes, ..link(1000) };
    let judge = |model: &ModelConvergence, bytes| model.clone().judge(&round(40_000), &dirty(40_000), &pending(bytes));
    let mut model = ModelConvergence::default();
    assert_eq!(model.judge(&round(40_000), &dirty(40_000), &pending(500_000_000)), Next::Round);
    assert_eq!(judge(&model, 474_999_999), Next::Round);
    for bytes in [475_000_000, 500_000_000, 600_000_000, 0] {
        assert!(matches!(judge(&model, bytes), Next::Throttle(_)), "{bytes}");
    }
    model.rounds = MAX_ROUNDS - 2;
    assert_eq!(judge(&model, 100_000_000), Next::Round);
    model.rounds = MAX_ROUNDS - 1;
    assert!(matches!(judge(&model, 100_000_000), Next::SwitchOver(_)));
}

/// A policy that decides nothing by itself.
struct Any;

impl Convergence for Any {
    fn judge(&mut self, _: &Round, _: &PageSet, _: &Link) -> Next {
        Next::Round
    }
}

#[test]
fn a_policy_that_says_nothing_of_the_limit_keeps_it() {
    assert_eq!((Any.begin(&link(300)), Any.stalled()), (Next::Round, None));
}

#[test]
fn milliseconds_have_the_decimals_that_mean_something() {
    let shown = |us| ms(Duration::from_micros(us));
    assert_eq!(
        [0, 1, 100, 1000, 1500, 12_340, 300_000].map(shown),
        ["0 ms", "0.001 ms", "0.1 ms", "1 ms", "1.5 ms", "12.34 ms", "300 ms"]
    );
}

/// A link and a guest, of which the rounds are calculated.
#[derive(Clone, Debug)]
struct World {
    bytes_per_second: f64,
    round_trip: Duration,
    vmms: Duration,
    state_bytes: u64,
    pages: u64,
    dirtied: f64,
    working_set: u64,
    limit: Duration,
    timeout: Option<Duration>,
    impact: GuestImpact,
    stop: bool,
    post_copy: bool,
    can_post_copy: bool,
}

/// Returns numbers of any magnitude, from 0 to 10 to the power of `most`.
fn any_size(most: f64) -> impl Strategy<Value = f64> {
    prop_oneof![1 => Just(0.0), 9 => (0.0..most).prop_map(|power| 10f64.powf(power))]
}

fn micros(power: f64) -> impl Strategy<Value = Duration> {
    any_size(power).prop_map(|us| Duration::from_micros(us as u64))
}

fn worlds() -> impl Strategy<Value = World> {
    let network = ((4.0..10.5f64).prop_map(|power| 10f64.powf(power)), micros(6.6), micros(5.5), any_size(7.5));
    let guest = (1u64..1 << 22, any_size(7.0), 1u64..1 << 22);
    let impacts = prop_oneof![Just(GuestImpact::Low), Just(GuestImpact::Balanced), Just(GuestImpact::Fast)];
    let user = (micros(6.5), prop::option::weighted(0.3, micros(8.0)), impacts, any::<(bool, bool, bool)>());
    (network, guest, user).prop_map(|(network, guest, user)| World {
        bytes_per_second: network.0,
        round_trip: network.1,
        vmms: network.2,
        state_bytes: network.3 as u64,
        pages: guest.0,
        dirtied: guest.1,
        working_set: guest.2.min(guest.0),
        limit: user.0,
        timeout: user.1,
        impact: user.2,
        stop: user.3.0,
        post_copy: user.3.1,
        can_post_copy: user.3.2,
    })
}

impl World {
    fn link(&self, rounds: u32, elapsed: Duration) -> Link {
        Link {
            bytes_per_second: if rounds == 0 { 0.0 } else { self.bytes_per_second },
            bytes_per_page: 4096.0,
            fixed_downtime: self.vmms + 2 * self.round_trip,
            round_trip: self.round_trip,
            round_trips: rounds + 1,
            state_bytes: self.state_bytes,
            downtime_limit: self.limit,
            elapsed,
            timed_out: self.timeout.is_some_and(|timeout| elapsed >= timeout),
            stop_on_timeout: self.stop,
            post_copy_on_timeout: self.post_copy,
            can_post_copy: self.can_post_copy,
            impact: self.impact,
            ..Link::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_link_and_guest_the_rounds_end_and_no_chance_is_given_away(world in worlds()) {
        let mut model = ModelConvergence::default();
        let (mut elapsed, mut throttle, mut sent) = (Duration::ZERO, 0, world.pages);
        let begin = model.begin(&world.link(0, elapsed));
        prop_assert!(begin == Next::Round || world.vmms > world.limit && !world.stop);
        for rounds in 1.. {
            prop_assert!(rounds <= MAX_ROUNDS_ABOVE_LIMIT + 30, "no end");
            let time = sent as f64 * 4096.0 / world.bytes_per_second + world.round_trip.as_secs_f64();
            elapsed += Duration::from_secs_f64(time);
            let rate = world.dirtied * (1.0 - f64::from(throttle) / 100.0);
            let left = ((rate * time) as u64).min(world.working_set);
            let link = world.link(rounds, elapsed);
            let (downtime, within) = (link.predict(left), link.predict(left) <= world.limit);
            match model.judge(&round(sent), &dirty(left), &link) {
                Next::Round => {}
                Next::Throttle(percent) => {
                    prop_assert!(percent > throttle && percent <= 99);
                    prop_assert!(link.floor() <= world.limit, "it cannot help");
                    prop_assert!(!within || link.pages_time(left) >= world.limit / SUBSTANTIAL, "nothing to blame");
                    throttle = percent;
                }
                Next::SwitchOver(wanted) => {
                    prop_assert_eq!(wanted.downtime, downtime);
                    prop_assert!(within || world.stop);
                    prop_assert_eq!(model.stalled().is_some(), !within);
                    break;
                }
                Next::PostCopy => {
                    prop_assert!(world.post_copy && world.can_post_copy && !within);
                    prop_assert!(model.stalled().is_some());
                    break;
                }
                Next::GiveUp(why) => {
                    prop_assert!(!(within || world.stop || world.post_copy && world.can_post_copy));
                    // if all pages that the guest ever writes fit into the limit, it was wrong to
                    // give up
                    prop_assert!(link.predict(world.working_set) > world.limit, "given away: {}", why);
                    prop_assert!(why.contains(&ms(world.limit)), "{}", why);
                    break;
                }
            }
            sent = left;
        }
    }
}
