//! Small configurations, each of which can be explored completely.

use crate::blocks::Blocks;
use crate::contents::Contents;
use crate::eviction::Evicting;
use crate::free::Free;
use crate::hops::Hops;
use crate::pause::Pause;
use crate::replicas::Replicas;
use crate::rules::Rules;
use crate::search::{Explored, explore};
use crate::session::{Budget, Session};
use crate::staging::Staging;
use crate::successor::Successor;
use crate::table::Table;

/// A model with its bounds, and a name by which the documentation refers to it.
#[derive(Clone, Copy, Debug)]
pub struct Configuration {
    pub name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Session(Session),
    Hops(Hops),
    Contents(Contents),
    Table(Table),
    Evicting(Evicting),
    Replicas(Replicas),
    Blocks,
    Staging(Staging),
    Successor(Successor),
    Free(Free),
    Pause(Pause),
}

impl Configuration {
    /// Explores the configuration with these rules, up to `limit` states.
    pub fn explore(&self, rules: Rules, limit: usize) -> Explored {
        match self.kind {
            Kind::Session(model) => explore(&Session { rules, ..model }, limit),
            Kind::Hops(model) => explore(&Hops { rules, ..model }, limit),
            Kind::Contents(model) => explore(&Contents { rules, ..model }, limit),
            Kind::Table(model) => explore(&Table { rules, ..model }, limit),
            Kind::Evicting(model) => explore(&Evicting { rules, ..model }, limit),
            Kind::Replicas(model) => explore(&Replicas { rules, ..model }, limit),
            Kind::Blocks => explore(&Blocks { rules }, limit),
            Kind::Staging(model) => explore(&Staging { rules, ..model }, limit),
            Kind::Successor(model) => explore(&Successor { rules, ..model }, limit),
            Kind::Free(model) => explore(&Free { rules, ..model }, limit),
            Kind::Pause(model) => explore(&Pause { rules, ..model }, limit),
        }
    }
}

/// Returns the configurations that every run of the tests explores.
pub fn small() -> Vec<Configuration> {
    let mut all: Vec<Configuration> = sessions().map(|(name, kind)| Configuration { name, kind }).into();
    all.extend(others().map(|(name, kind)| Configuration { name, kind }));
    all
}

/// Returns the larger configurations, which take minutes.
pub fn large() -> Vec<Configuration> {
    let two_pages = Budget { writes: 1, attempt_puts: 1, own_puts: 1, cuts: 1, ..NOTHING };
    let lost = Budget { writes: 2, home_puts: 2, attempt_puts: 1, own_puts: 1, restarts: 1, ..NOTHING };
    let silent = Budget { writes: 1, home_puts: 1, silences: 1, ..lost };
    let back = Budget { silences: 1, late_gets: 1, unknown_puts: 1, ..two_pages };
    let slow =
        Budget { writes: 2, home_puts: 1, own_puts: 2, attempt_puts: 1, late_gets: 1, unknown_puts: 1, ..NOTHING };
    let cut = Budget { writes: 2, home_puts: 1, attempt_puts: 1, own_puts: 1, cuts: 2, source_crashes: 1, ..NOTHING };
    let again = Budget { attempts: 2, cancels: 1, attempt_puts: 2, destination_crashes: 1, ..NOTHING };
    let again = Budget { writes: 1, home_puts: 1, unknown_puts: 1, restarts: 1, ..again };
    [
        ("two pages at length", Session { pages: 2, rounds: false, ..session(two_pages) }),
        ("losses at length", Session { stores: 2, ..session(lost) }),
        ("silence at length", Session { stores: 2, ..session(silent) }),
        ("return at length", Session { stores: 2, returns: true, ..session(back) }),
        ("slow stores at length", session(slow)),
        ("cuts at length", session(cut)),
        ("attempts at length", Session { late_create: true, ..session(again) }),
    ]
    .map(|(name, model)| Configuration { name, kind: Kind::Session(model) })
    .into()
}

/// Returns every session with one page in which `events` kinds of events happen, each of them once
/// or twice. Variants that differ only in what cannot matter are left out.
pub fn combinations(events: u32) -> impl Iterator<Item = Session> {
    let sets = (0..1 << Budget::KINDS).filter(move |set: &u32| set.count_ones() == events);
    sets.flat_map(move |set| {
        let budget = Budget::of(set);
        let losses = budget.restarts + budget.silences + budget.partial_losses > 0;
        let fails = budget.cancels + budget.destination_crashes + budget.cuts > 0;
        let all = (0..32).map(move |bits: u32| Session {
            rounds: bits & 1 != 0,
            fetch: bits & 2 != 0,
            stores: if bits & 4 != 0 { 2 } else { 1 },
            late_entry: bits & 8 != 0,
            late_create: bits & 16 != 0,
            ..session(budget)
        });
        all.filter(move |session| {
            let fetch = !session.fetch || budget.home_puts > 0;
            let stores = session.stores == 1 || losses;
            let create = !session.late_create || fails;
            fetch && stores && create
        })
    })
}

const NOTHING: Budget = Budget {
    writes: 0,
    home_puts: 0,
    own_puts: 0,
    attempt_puts: 0,
    attempts: 1,
    cancels: 0,
    cuts: 0,
    restarts: 0,
    partial_losses: 0,
    removals: 0,
    silences: 0,
    unknown_puts: 0,
    failed_puts: 0,
    late_gets: 0,
    source_crashes: 0,
    destination_crashes: 0,
};
fn session(budget: Budget) -> Session {
    Session {
        rules: Rules::all(),
        pages: 1,
        stores: 1,
        rounds: true,
        fetch: false,
        forgetful: false,
        late_entry: false,
        late_create: false,
        returns: false,
        budget,
    }
}

fn sessions() -> [(&'static str, Kind); 17] {
    let with = |budget: Budget| session(budget);
    let quiet = Session { pages: 2, ..with(Budget { attempt_puts: 1, ..NOTHING }) };
    let cancel = with(Budget { writes: 1, attempt_puts: 1, cancels: 1, ..NOTHING });
    let again = Budget { writes: 1, attempts: 2, attempt_puts: 2, destination_crashes: 1, unknown_puts: 1, ..NOTHING };
    let slow = Budget { writes: 2, attempt_puts: 2, unknown_puts: 1, failed_puts: 1, late_gets: 1, ..NOTHING };
    let evict = with(Budget { writes: 1, home_puts: 1, own_puts: 1, attempt_puts: 1, cancels: 1, ..NOTHING });
    let home_loss = with(Budget { home_puts: 1, attempt_puts: 1, restarts: 1, ..NOTHING });
    let two_pages = with(Budget { attempt_puts: 1, own_puts: 1, failed_puts: 1, ..NOTHING });
    let entry = with(Budget { writes: 1, attempt_puts: 1, cuts: 1, ..NOTHING });
    let attempt_loss = with(Budget { attempt_puts: 1, restarts: 1, ..NOTHING });
    let silence = Budget { home_puts: 1, own_puts: 1, attempt_puts: 1, silences: 1, ..NOTHING };
    let partial = Budget { writes: 1, own_puts: 2, partial_losses: 1, ..NOTHING };
    let removal = with(Budget { home_puts: 1, attempt_puts: 1, own_puts: 1, removals: 1, ..NOTHING });
    let cut = with(Budget { writes: 1, attempt_puts: 2, cuts: 1, unknown_puts: 1, ..NOTHING });
    let crash = with(Budget { home_puts: 1, attempt_puts: 1, cuts: 1, source_crashes: 1, ..NOTHING });
    let fetch_loss = with(Budget { home_puts: 1, attempt_puts: 1, restarts: 1, silences: 1, ..NOTHING });
    let fetch = with(Budget { writes: 1, home_puts: 1, attempt_puts: 1, cancels: 1, ..NOTHING });
    [
        ("quiet", Kind::Session(quiet)),
        ("two pages", Kind::Session(Session { pages: 2, rounds: false, ..two_pages })),
        ("cancel", Kind::Session(Session { forgetful: true, late_create: true, ..cancel })),
        ("second attempt", Kind::Session(Session { late_create: true, ..with(again) })),
        ("slow stores", Kind::Session(with(slow))),
        ("evictions", Kind::Session(evict)),
        ("store lost", Kind::Session(home_loss)),
        ("attempt lost", Kind::Session(Session { rounds: false, ..attempt_loss })),
        ("store silent", Kind::Session(Session { stores: 2, rounds: false, ..with(silence) })),
        ("store comes back", Kind::Session(Session { stores: 2, returns: true, ..with(silence) })),
        ("store partly lost", Kind::Session(Session { rounds: false, ..with(partial) })),
        ("namespace removed", Kind::Session(removal)),
        ("cut", Kind::Session(cut)),
        ("late entry", Kind::Session(Session { late_entry: true, ..entry })),
        ("source crashes", Kind::Session(crash)),
        ("fetch, store lost", Kind::Session(Session { fetch: true, ..fetch_loss })),
        ("fetch", Kind::Session(Session { fetch: true, ..fetch })),
    ]
}

fn others() -> [(&'static str, Kind); 17] {
    let rules = Rules::all();
    let contents = Contents { rules, lost_answers: false, crash: false, corrupt: false, twin_pages: false };
    let pause = Pause { rules, fetch: false, snapshot: false };
    let eviction = Evicting { rules, writes: 2, puts: 2, device: false };
    [
        ("three hosts", Kind::Hops(Hops { rules, writes: 2, crash: false })),
        ("owner crashes", Kind::Hops(Hops { rules, writes: 1, crash: true })),
        ("shared contents", Kind::Contents(contents)),
        ("lost answers", Kind::Contents(Contents { lost_answers: true, ..contents })),
        ("claimer crashes", Kind::Contents(Contents { crash: true, ..contents })),
        ("damaged content", Kind::Contents(Contents { corrupt: true, ..contents })),
        ("two pages, one content", Kind::Contents(Contents { twin_pages: true, ..contents })),
        ("table", Kind::Table(Table { rules, shares: 4 })),
        ("eviction", Kind::Evicting(eviction)),
        ("pinned", Kind::Evicting(Evicting { device: true, ..eviction })),
        ("replicas", Kind::Replicas(Replicas { rules, writes: 1 })),
        ("blocks", Kind::Blocks),
        ("staging", Kind::Staging(Staging { rules, writes: 2, losses: 2, snapshot: true })),
        ("successor", Kind::Successor(Successor { rules, writes: 2 })),
        ("free pages", Kind::Free(Free { rules, uses: 2 })),
        ("pause", Kind::Pause(pause)),
        ("snapshot", Kind::Pause(Pause { snapshot: true, fetch: true, ..pause })),
    ]
}
