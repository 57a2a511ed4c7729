//! Three hosts in turn own a VM with one page: who renews and who forgets the namespaces that they
//! leave (rules 11, 14 and 15).
//!
//! The session itself is one step here; `session` has its parts. Every owner evicts into a
//! namespace of its own. Leases end, hosts crash, and a person removes what has expired.

use crate::rules::{Rule, Rules};
use crate::search::{Model, Next, Violation};

const HOSTS: usize = 3;

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Hops {
    pub rules: Rules,
    /// How often the guest may write.
    pub writes: u8,
    /// Whether the present owner may crash.
    pub crash: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Location {
    Here,
    /// In the RAM of the host before.
    Source,
    /// In the namespace of this host.
    Stored(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Namespace {
    Absent,
    /// With its content.
    Present(u8),
    Gone,
}

/// What one host knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Host {
    ram: Option<u8>,
    /// The namespaces that it renews.
    renews: [bool; HOSTS],
    /// The namespaces that it still has to forget.
    forgets: [bool; HOSTS],
    alive: bool,
}

/// The whole state.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    newest: u8,
    owner: usize,
    location: Location,
    hosts: [Host; HOSTS],
    namespaces: [Namespace; HOSTS],
    /// The present owner does not need the host before it.
    released: bool,
    ended: bool,
    crashed: bool,
}

impl State {
    fn refers_to(&self, namespace: usize) -> bool {
        self.location == Location::Stored(namespace)
    }

    fn is_present(&self, namespace: usize) -> bool {
        matches!(self.namespaces[namespace], Namespace::Present(_))
    }
}

impl Hops {
    fn guest(&self, state: &State, next: &mut Next<State>) {
        let owner = state.owner;
        match state.location {
            Location::Here => {
                if state.newest <= self.writes {
                    next.step("the guest writes", |state| {
                        state.newest += 1;
                        state.hosts[owner].ram = Some(state.newest);
                    });
                }
                if state.namespaces[owner] != Namespace::Gone {
                    next.step("the owner evicts the page into its own namespace", |state| {
                        let content = state.hosts[owner].ram.take().expect("the page is here");
                        state.namespaces[owner] = Namespace::Present(content);
                        state.hosts[owner].renews[owner] = true;
                        state.hosts[owner].forgets[owner] = true;
                        state.location = Location::Stored(owner);
                    });
                }
            }
            Location::Source => {
                if let Some(content) = state.hosts[owner - 1].ram {
                    next.step("the owner receives the page from the host before", |state| {
                        state.hosts[owner].ram = Some(content);
                        state.location = Location::Here;
                    });
                }
            }
            Location::Stored(namespace) => {
                if let Namespace::Present(content) = state.namespaces[namespace] {
                    next.step("the owner reads the page from its store", |state| {
                        state.hosts[owner].ram = Some(content);
                        state.location = Location::Here;
                    });
                }
            }
        }
    }

    /// The next host takes over: the table, and what is still to be forgotten.
    fn migrate(&self, state: &mut State) {
        let from = state.owner;
        let to = from + 1;
        let before = state.hosts[from];
        state.owner = to;
        state.released = false;
        if state.location == Location::Here {
            state.location = Location::Source;
        }
        for namespace in 0..HOSTS {
            let refers = state.refers_to(namespace);
            let named = before.forgets[namespace] && self.rules.has(Rule::NamedToSuccessor);
            state.hosts[to].forgets[namespace] = refers || named;
            let renews = refers && self.rules.has(Rule::DestinationRenews);
            state.hosts[to].renews[namespace] = renews;
        }
    }

    /// The owner does not need the host before it any more, which frees everything and renews
    /// nothing.
    fn release(&self, state: &mut State) {
        state.released = true;
        let before = &mut state.hosts[state.owner - 1];
        before.ram = None;
        before.renews = [false; HOSTS];
        before.forgets = [false; HOSTS];
    }

    fn sessions(&self, state: &State, next: &mut Next<State>) {
        let owner = state.owner;
        let released = state.released || !self.rules.has(Rule::OneMigrationAtATime);
        if owner + 1 < HOSTS && released {
            next.step("the VM migrates to the next host", |state| self.migrate(state));
        }
        if !state.released && state.location != Location::Source {
            next.step("the owner says *released* to the host before", |state| self.release(state));
        }
        for namespace in 0..owner {
            let due = state.hosts[owner].forgets[namespace] && state.released;
            if due && !state.refers_to(namespace) {
                next.step("the owner forgets a namespace of an earlier owner", |state| {
                    state.namespaces[namespace] = Namespace::Gone;
                    state.hosts[owner].forgets[namespace] = false;
                    state.hosts[owner].renews[namespace] = false;
                });
            }
        }
        if state.released {
            next.step("the VM is ended in order", |state| {
                state.ended = true;
                for namespace in 0..HOSTS {
                    let of_table = state.hosts[owner].forgets[namespace];
                    if of_table && self.rules.has(Rule::EndForgetsTable) {
                        state.namespaces[namespace] = Namespace::Gone;
                    }
                }
                state.hosts[owner].renews = [false; HOSTS];
            });
        }
    }

    /// A person removes a namespace whose lease has ended, because nobody renews it.
    fn expired(&self, state: &State, next: &mut Next<State>) {
        for namespace in 0..HOSTS {
            let renewed = state.hosts.iter().any(|host| host.alive && host.renews[namespace]);
            let listed = state.crashed && self.rules.has(Rule::ExpiredAreListed) || !state.crashed && !state.ended;
            if state.is_present(namespace) && !renewed && listed {
                next.step("a person removes a namespace that has expired", |state| {
                    state.namespaces[namespace] = Namespace::Gone;
                });
            }
        }
    }
}

impl Model for Hops {
    type State = State;

    fn initial(&self) -> State {
        let host = Host { ram: None, renews: [false; HOSTS], forgets: [false; HOSTS], alive: true };
        let mut hosts = [host; HOSTS];
        hosts[0].ram = Some(1);
        State {
            newest: 1,
            owner: 0,
            location: Location::Here,
            hosts,
            namespaces: [Namespace::Absent; HOSTS],
            released: true,
            ended: false,
            crashed: false,
        }
    }

    fn steps(&self, state: &State, next: &mut Next<State>) {
        let runs = !state.ended && !state.crashed;
        if runs {
            self.guest(state, next);
            self.sessions(state, next);
        }
        if runs && self.crash {
            next.step("the owner crashes, and the VM with it", |state| {
                state.crashed = true;
                for host in &mut state.hosts {
                    host.alive = false;
                }
            });
        }
        self.expired(state, next);
    }

    fn violation(&self, state: &State) -> Option<Violation> {
        if state.ended || state.crashed {
            return None;
        }
        let newest = Some(state.newest);
        let obtained = match state.location {
            Location::Here => state.hosts[state.owner].ram == newest,
            Location::Source => state.hosts[state.owner - 1].ram == newest,
            Location::Stored(namespace) => state.namespaces[namespace] == Namespace::Present(state.newest),
        };
        (!obtained).then_some(Violation::ContentLost)
    }

    fn settled(&self, state: &State) -> bool {
        state.ended || state.crashed
    }

    fn clean(&self, state: &State) -> bool {
        (0..HOSTS).all(|namespace| !state.is_present(namespace))
    }
}
