//! The scripts that a server runs, and the names of its keys.
//!
//! A store has one part, in a cluster 16 of them. The names of all keys of a part begin with
//! `{PREFIX:PART}`, so that a cluster keeps them on one server.
//!
//! | key | what it holds |
//! |---|---|
//! | `store` | the random value of the incarnation |
//! | `spaces` | a sorted set: the ids of all namespaces, by the end of their leases in milliseconds since 1970 |
//! | `forgotten` | a sorted set: forgotten ids, by the time until which they are remembered |
//! | `used` | bytes that all pages take |
//! | `dying` | a set: forgotten ids of which blocks are left |
//! | `space:ID` | a hash: `record`, `lease` (the longest that was granted, in milliseconds), `bytes` of its pages |
//! | `blocks:ID` | a set: the numbers of its blocks |
//! | `block:ID:NUMBER` | a block: see blocks.rs |
//! | `stage:CONNECTION:N` | a block that is put, inside of one transaction |
//!
//! A script answers with a list of strings. The first one says how it went: `ok`, `absent`, `vm`
//! (the record names another VM), `damaged`, and what a script has beside these.
//!
//! Scripts are sent with each call: they are short beside what they move, and a server that has
//! forgotten one would refuse it in the middle of a transaction.

use migration_core::store::{NamespaceId, PageToGet, StoreError, Trailer};
use redis::{Cmd, Value};

use super::{
    blocks::{BLOCK_PAGES, Piece, SLOT_BYTES, index},
    cluster::slot_of,
    fail::{Fail, parse},
};

/// Begins every script that needs the time.
const NOW: &str = "local time = redis.call('TIME')
local function now(offset) return time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(offset) end
";
pub(super) const CREATE: &str = include_str!("lua/create.lua");
pub(super) const RENEW: &str = include_str!("lua/renew.lua");
pub(super) const FORGET: &str = include_str!("lua/forget.lua");
pub(super) const EXPIRED: &str = include_str!("lua/expired.lua");
pub(super) const SWEEP: &str = include_str!("lua/sweep.lua");
pub(super) const PUT: &str = include_str!("lua/put.lua");
pub(super) const READ: &str = include_str!("lua/read.lua");

/// Begins the command that runs a script. Its arguments follow.
pub(super) fn run(script: &str, keys: &[&str]) -> Cmd {
    let mut command = redis::cmd("EVAL");
    command.arg(script).arg(keys.len()).arg(keys);
    command
}

/// As [`run`], for a script that needs the time. Its first argument follows: the offset of the
/// clock.
pub(super) fn run_with_time(script: &str, keys: &[&str], clock_offset: u64) -> Cmd {
    let mut command = run(&format!("{NOW}{script}"), keys);
    command.arg(clock_offset);
    command
}

/// Returns the command that reads some pages of a block.
pub(super) fn read_pages(keys: &Keys, id: NamespaceId, piece: &Piece, pages: &[PageToGet]) -> Cmd {
    let indices: Vec<u8> = pages[piece.pages.clone()].iter().map(|page| index(page.page)).collect();
    let mut command = run(READ, &[&keys.block(id, piece.block)]);
    command.arg(SLOT_BYTES).arg(BLOCK_PAGES).arg(Trailer::BYTES).arg(indices);
    command
}

/// The names of the keys of a part.
pub(super) struct Keys {
    /// What all names begin with.
    start: String,
    slot: u32,
}

impl Keys {
    pub(super) fn new(prefix: &str, part: &str) -> Self {
        let tag = format!("{prefix}:{part}");
        Self { slot: slot_of(&tag), start: format!("{{{tag}}}:") }
    }

    /// Returns the slot of all keys in a cluster.
    pub(super) fn slot(&self) -> u32 {
        self.slot
    }

    fn name(&self, rest: &str) -> String {
        format!("{}{rest}", self.start)
    }

    pub(super) fn store(&self) -> String {
        self.name("store")
    }

    pub(super) fn spaces(&self) -> String {
        self.name("spaces")
    }

    pub(super) fn forgotten(&self) -> String {
        self.name("forgotten")
    }

    pub(super) fn used(&self) -> String {
        self.name("used")
    }

    pub(super) fn dying(&self) -> String {
        self.name("dying")
    }

    /// Returns what the names of spaces begin with.
    pub(super) fn space_start(&self) -> String {
        self.name("space:")
    }

    pub(super) fn space(&self, id: NamespaceId) -> String {
        self.name(&format!("space:{id}"))
    }

    /// Returns what the names of sets of blocks begin with.
    pub(super) fn blocks_start(&self) -> String {
        self.name("blocks:")
    }

    pub(super) fn blocks(&self, id: NamespaceId) -> String {
        self.name(&format!("blocks:{id}"))
    }

    /// Returns what the names of blocks begin with.
    pub(super) fn block_start(&self) -> String {
        self.name("block:")
    }

    pub(super) fn block(&self, id: NamespaceId, number: u64) -> String {
        self.name(&format!("block:{id}:{number}"))
    }

    /// Returns what the names of what a connection stages begin with.
    pub(super) fn stage_start(&self, connection: impl std::fmt::Display) -> String {
        self.name(&format!("stage:{connection}:"))
    }
}

/// What a script has answered. Nothing of it was checked.
#[derive(Debug)]
pub(super) struct Answer(Vec<Vec<u8>>);

impl Answer {
    pub(super) fn new(answer: Value) -> Result<Self, Fail> {
        parse(answer).map(Self)
    }

    /// Returns how it went.
    pub(super) fn status(&self) -> &str {
        self.0.first().and_then(|status| str::from_utf8(status).ok()).unwrap_or_default()
    }

    /// Returns what follows the status.
    pub(super) fn items(&self) -> &[Vec<u8>] {
        self.0.get(1..).unwrap_or_default()
    }

    /// Returns one of the items; nothing if there are fewer.
    pub(super) fn item(&self, at: usize) -> &[u8] {
        self.items().get(at).map_or(&[], |item| item)
    }

    /// Returns an item that is a decimal number; 0 if it is none.
    pub(super) fn number(&self, at: usize) -> u64 {
        str::from_utf8(self.item(at)).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }

    /// Returns the error that several scripts can answer with.
    pub(super) fn error(&self, store: &str, namespace: NamespaceId) -> StoreError {
        match self.status() {
            "absent" => StoreError::Absent(namespace),
            "vm" => StoreError::OtherVm(namespace),
            "forgotten" => StoreError::Forgotten(namespace),
            _ => StoreError::Damaged {
                what: format!("namespace {namespace} in {store}"),
                cause: "the server's database lacks keys of the store, or answers what no script says".into(),
            },
        }
    }
}
