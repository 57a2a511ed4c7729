//! Which server has which namespace.
//!
//! The client of clusters in the crate `redis` is not used: it has one connection for each server,
//! so that a fault would wait for prefetches, and it repeats a call on other servers by itself. Each
//! server has a client of its own here, and a call is one step on one server.

use std::{
    iter,
    sync::{Arc, PoisonError, RwLock},
};

use migration_core::store::{NamespaceId, StoreError};
use redis::{FromRedisValue, Value};

use super::{
    connection::{Connection, Settings, Wait},
    fail::Fail,
    scripts::Keys,
    server::{Server, Use},
};
use crate::Address;

/// Slots of a cluster.
const SLOTS: u32 = 16_384;
/// Into how many parts the namespaces of a cluster fall. All users agree on it.
const PARTS: u32 = 16;
/// Most ranges of slots that a cluster has.
const MAX_RANGES: usize = 4096;
/// How often a call follows a namespace to another server.
const MAX_MOVES: u32 = 3;

/// The servers of a store. A namespace lies in one part of the store, and a part on one server.
pub(super) struct Servers {
    settings: Arc<Settings>,
    /// The servers that were named.
    seeds: Vec<Arc<Server>>,
    parts: Vec<Keys>,
    map: RwLock<Map>,
}

/// The server of each part.
#[derive(Clone)]
struct Map(Vec<Arc<Server>>);

/// What is asked of which server.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) part: usize,
    pub(super) of: Use,
    pub(super) wait: Wait,
}

impl Servers {
    /// Names servers, at least one. Nothing is opened yet.
    pub(super) fn new(addresses: &[Address], prefix: &str, settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let server = |address: &Address| Arc::new(Server::new(address.clone(), settings.clone()));
        let seeds: Vec<_> = addresses.iter().map(server).collect();
        let parts: Vec<_> = match settings.cluster {
            false => vec![Keys::new(prefix, "0")],
            true => (0..PARTS).map(|part| Keys::new(prefix, &tag(prefix, part))).collect(),
        };
        let map = Map(iter::repeat_n(seeds[0].clone(), parts.len()).collect());
        Self { settings, seeds, parts, map: RwLock::new(map) }
    }

    /// Learns where the parts are, and connects to each server.
    pub(super) fn start(&self, wait: Wait) -> Result<(), StoreError> {
        if self.settings.cluster {
            self.refresh(wait)?;
        }
        for server in self.all() {
            let connected = server.with(Use::Others, wait, &mut |_| Ok(()));
            connected.map_err(|fail| fail.into_store_error(&server.address.to_string(), 0))?;
        }
        Ok(())
    }

    /// Returns the keys of each part.
    pub(super) fn parts(&self) -> &[Keys] {
        &self.parts
    }

    /// Returns the part of a namespace.
    pub(super) fn part_of(&self, id: NamespaceId) -> usize {
        usize::from(id.0[0]) % self.parts.len()
    }

    /// Returns the servers that have parts, each once.
    pub(super) fn all(&self) -> Vec<Arc<Server>> {
        let mut all: Vec<Arc<Server>> = Vec::new();
        for server in self.map().0 {
            if !all.iter().any(|other| Arc::ptr_eq(other, &server)) {
                all.push(server);
            }
        }
        all
    }

    /// Returns the address of the server that has a part.
    #[cfg(test)]
    pub(super) fn address_of(&self, part: usize) -> String {
        self.map().0[part].address.to_string()
    }

    fn map(&self) -> Map {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls the server of a part, and follows the part if it has moved. `needed` is how many bytes
    /// the call stores.
    pub(super) fn with<T>(
        &self,
        target: Target,
        needed: u64,
        mut call: impl FnMut(&mut Connection) -> Result<T, Fail>,
    ) -> Result<T, StoreError> {
        let mut moves = 0;
        loop {
            let server = self.map.read().unwrap_or_else(PoisonError::into_inner).0[target.part].clone();
            let fail = match server.with(target.of, target.wait, &mut call) {
                Ok(done) => return Ok(done),
                Err(fail) => fail,
            };
            moves += 1;
            let may_have_moved = match &fail {
                Fail::Io { .. } => true,
                Fail::Answer(text) => ["MOVED ", "CLUSTERDOWN ", "READONLY "].iter().any(|code| text.starts_with(code)),
                Fail::Store(_) => false,
            };
            let follows = self.settings.cluster && may_have_moved && moves <= MAX_MOVES && !target.wait.is_over();
            // if nobody can be asked, the first failure is the one to report
            let _ = follows.then(|| self.refresh(target.wait));
            let now = self.map.read().unwrap_or_else(PoisonError::into_inner).0[target.part].clone();
            if !follows || Arc::ptr_eq(&now, &server) {
                return Err(fail.into_store_error(&server.address.to_string(), needed));
            }
        }
    }

    /// Asks one server after the other where all parts are.
    fn refresh(&self, wait: Wait) -> Result<(), StoreError> {
        let known: Vec<_> = self.all().into_iter().chain(self.seeds.iter().cloned()).collect();
        let mut failure = StoreError::TimedOut;
        for server in &known {
            if let Some(fail) = server.paused() {
                failure = fail.into_store_error(&server.address.to_string(), 0);
                continue;
            }
            match self.ask_map(server, &known, wait) {
                Ok(map) => {
                    *self.map.write().unwrap_or_else(PoisonError::into_inner) = map;
                    return Ok(());
                }
                Err(fail) => failure = fail.into_store_error(&server.address.to_string(), 0),
            }
        }
        Err(failure)
    }

    /// Asks on a connection of its own: a replica is asked as well, and never for anything else.
    fn ask_map(&self, server: &Server, known: &[Arc<Server>], wait: Wait) -> Result<Map, Fail> {
        let mut connection = server.greet(wait)?;
        let answer = connection.ask(redis::cmd("CLUSTER").arg("SLOTS"), wait)?;
        let Address::Tcp { host, .. } = &server.address else {
            return Err(Fail::nonsense("a cluster on a Unix socket"));
        };
        let ranges = ranges(answer, host).ok_or_else(|| Fail::nonsense("no map of its cluster"))?;
        let mut servers: Vec<Arc<Server>> = known.to_vec();
        let mut map = Vec::with_capacity(self.parts.len());
        for keys in &self.parts {
            let slot = keys.slot();
            let range = ranges.iter().find(|range| range.first <= slot && slot <= range.last);
            let address = &range.ok_or_else(|| Fail::Answer("CLUSTERDOWN a slot has no server".into()))?.master;
            let found = servers.iter().find(|server| server.address == *address).cloned();
            map.push(found.unwrap_or_else(|| {
                let new = Arc::new(Server::new(address.clone(), self.settings.clone()));
                servers.push(new.clone());
                new
            }));
        }
        Ok(Map(map))
    }
}

/// Slots and their server.
struct Range {
    first: u32,
    last: u32,
    master: Address,
}

/// Reads an answer to `CLUSTER SLOTS`. `host` is the host of a server that does not know its own.
fn ranges(answer: Value, host: &str) -> Option<Vec<Range>> {
    let ranges = list(answer)?;
    if ranges.len() > MAX_RANGES {
        return None;
    }
    let range = |range: Value| {
        let mut range = list(range)?.into_iter();
        let mut slot = || item::<u32>(&mut range).filter(|slot| *slot < SLOTS);
        let (first, last) = (slot()?, slot()?);
        let mut master = list(range.next()?)?.into_iter();
        let named = item::<Option<String>>(&mut master)?;
        let port = item::<u16>(&mut master).filter(|port| *port != 0)?;
        let host = named.filter(|name| !name.is_empty() && name != "?").unwrap_or_else(|| host.to_owned());
        Some(Range { first, last, master: Address::Tcp { host, port } })
    };
    ranges.into_iter().map(range).collect()
}

fn list(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(items) => Some(items),
        _ => None,
    }
}

/// Returns the next of some values, if it is one of this type.
fn item<T: FromRedisValue>(values: &mut impl Iterator<Item = Value>) -> Option<T> {
    redis::from_redis_value(values.next()?).ok()
}

/// Returns a text whose slot lies in this part of all slots, so that a cluster whose servers have
/// equal shares of the slots has equal shares of the parts.
fn tag(prefix: &str, part: u32) -> String {
    let texts = (0_u32..).map(|number| format!("{part}.{number}"));
    let mut fitting = texts.filter(|text| Keys::new(prefix, text).slot() / (SLOTS / PARTS) == part);
    fitting.next().unwrap_or_default()
}

/// Returns the slot of a key, of which only the part in braces counts (CRC-16/XMODEM).
pub(super) fn slot_of(tag: &str) -> u32 {
    let crc = tag.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| (crc << 1) ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
    });
    u32::from(crc) % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_cluster_specification() {
        assert_eq!(slot_of("123456789"), 0x31c3);
        assert_eq!(slot_of("foo"), 12_182);
    }

    #[test]
    fn parts_are_spread_evenly_over_the_slots() {
        for prefix in ["migration", "x"] {
            let slots: Vec<_> = (0..PARTS).map(|part| Keys::new(prefix, &tag(prefix, part)).slot()).collect();
            assert!(slots.iter().zip(0..).all(|(slot, part)| slot / 1024 == part), "{slots:?}");
        }
    }

    fn range(first: i64, last: i64, host: Value, port: i64) -> Value {
        let master = Value::Array(vec![host, Value::Int(port), Value::BulkString(b"id".to_vec())]);
        Value::Array(vec![Value::Int(first), Value::Int(last), master])
    }

    #[test]
    fn a_map_of_a_cluster_is_read_and_nonsense_is_not() {
        let named = || Value::BulkString(b"10.0.0.7".to_vec());
        let list = Value::Array(vec![range(0, 100, named(), 1), range(101, 16_383, Value::Nil, 2)]);
        let found = ranges(list, "seed").unwrap();
        assert_eq!((found[0].first, found[0].last), (0, 100));
        assert_eq!(found[0].master.to_string(), "tcp:10.0.0.7:1");
        assert_eq!(found[1].master.to_string(), "tcp:seed:2");
        let bad = [
            Value::Nil,
            Value::Array(vec![Value::Nil]),
            Value::Array(vec![range(0, 16_384, named(), 1)]),
            Value::Array(vec![range(-1, 5, named(), 1)]),
            Value::Array(vec![range(0, 5, named(), 0)]),
            Value::Array(vec![range(0, 5, named(), 65_536)]),
            Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(1)])]),
            Value::Array(vec![Value::Int(0); MAX_RANGES + 1]),
        ];
        for answer in bad {
            assert!(ranges(answer.clone(), "seed").is_none(), "{answer:?}");
        }
    }
}
