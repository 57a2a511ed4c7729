//! The scripts that the server runs, and the names of its keys.
//!
//! | key | what it holds |
//! |---|---|
//! | `PREFIX:store` | the random value of the incarnation |
//! | `PREFIX:spaces` | a sorted set: the ids of all namespaces, by the end of their leases in milliseconds since 1970 |
//! | `PREFIX:forgotten` | a sorted set: forgotten ids, by the time until which they are remembered |
//! | `PREFIX:used` | bytes that all pages take |
//! | `PREFIX:space:ID` | a hash: `record`, `lease` (the longest that was granted, in milliseconds), `bytes` of its pages |
//! | `PREFIX:pages:ID` | a hash: page number → trailer and value |
//!
//! A script answers with a list of strings. The first one says how it went: `ok`, `absent`, `vm`
//! (the record names another VM), `damaged`, and what a script has beside these.

use ::redis::Script;
use migration_core::store::{NamespaceId, StoreError};

/// Begins every script that needs the time.
const NOW: &str = "local time = redis.call('TIME')
local function now(offset) return time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(offset) end
";

/// Keys: store, spaces, forgotten, space. Arguments: id, record, lease, clock offset, random value,
/// most namespaces. The first 17 bytes of a record are VM and purpose.
const CREATE: &str = "
local at = now(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', at)
if redis.call('ZSCORE', KEYS[3], ARGV[1]) then return {'forgotten'} end
local record = redis.call('HGET', KEYS[4], 'record')
local lease = tonumber(ARGV[3])
local ends = at + lease
if record then
  if string.sub(record, 1, 17) ~= string.sub(ARGV[2], 1, 17) then return {'occupied'} end
  lease = math.max(lease, tonumber(redis.call('HGET', KEYS[4], 'lease') or '0'))
  ends = math.max(ends, tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0'))
else
  if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[6]) then return {'many'} end
  redis.call('HSET', KEYS[4], 'record', ARGV[2])
end
redis.call('HSET', KEYS[4], 'lease', string.format('%.0f', lease))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[1])
redis.call('SETNX', KEYS[1], ARGV[5])
return {'ok', redis.call('GET', KEYS[1])}
";

/// Keys: store, spaces, space. Arguments: id, a record with the VM and the new owner, lease, clock
/// offset.
const RENEW: &str = "
local record = redis.call('HGET', KEYS[3], 'record')
if not record then return {'absent'} end
if string.sub(record, 1, 16) ~= string.sub(ARGV[2], 1, 16) then return {'vm'} end
local store = redis.call('GET', KEYS[1])
if not store then return {'damaged'} end
local lease = math.max(tonumber(ARGV[3]), tonumber(redis.call('HGET', KEYS[3], 'lease') or '0'))
local ends = math.max(now(ARGV[4]) + tonumber(ARGV[3]), tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0'))
redis.call('HSET', KEYS[3], 'record', string.sub(record, 1, 17) .. string.sub(ARGV[2], 18))
redis.call('HSET', KEYS[3], 'lease', string.format('%.0f', lease))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[1])
return {'ok', store}
";

/// Keys: store, space, pages, used. Arguments: VM, generation, limit, overhead of a page; then for
/// each page its number, and trailer and value. The generation stands at byte 24 of a trailer, the
/// lowest byte first. The first loop changes nothing.
const PUT: &str = "
local record = redis.call('HGET', KEYS[2], 'record')
if not record then return {'absent'} end
if string.sub(record, 1, 16) ~= ARGV[1] then return {'vm'} end
local store = redis.call('GET', KEYS[1])
if not store then return {'damaged'} end
local generation, overhead = tonumber(ARGV[2]), tonumber(ARGV[4])
local taken, added = {}, 0
for i = 5, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[3], ARGV[i])
  local newer = old and #old >= 28 and struct.unpack('<I4', old, 25) > generation
  if newer then
    taken[#taken + 1] = '0'
  else
    taken[#taken + 1] = '1'
    added = added + #ARGV[i + 1] + overhead
    if old then added = added - #old - overhead end
  end
end
local used, limit = tonumber(redis.call('GET', KEYS[4]) or '0'), tonumber(ARGV[3])
if added > 0 and used + added > limit then
  return {'room', string.format('%.0f', added), string.format('%.0f', math.max(limit - used, 0))}
end
for i = 5, #ARGV, 2 do
  if taken[(i - 3) / 2] == '1' then redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
end
if added ~= 0 then
  redis.call('INCRBY', KEYS[4], string.format('%.0f', added))
  redis.call('HINCRBY', KEYS[2], 'bytes', string.format('%.0f', added))
end
return {'ok', store, table.concat(taken)}
";

/// Keys: spaces, forgotten, space, pages, used. Arguments: id, VM, lease of an unknown id, clock
/// offset, most forgotten ids. A record that is damaged names no VM, and can be removed by anybody.
const FORGET: &str = "
local at = now(ARGV[4])
local record = redis.call('HGET', KEYS[3], 'record')
if record and #record >= 16 and string.sub(record, 1, 16) ~= ARGV[2] then return {'vm'} end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', at)
local remembered = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not remembered and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5]) then return {'many'} end
local lease = ARGV[3]
if record then
  lease = redis.call('HGET', KEYS[3], 'lease') or lease
  redis.call('DECRBY', KEYS[5], redis.call('HGET', KEYS[3], 'bytes') or '0')
end
local ends = math.max(at + tonumber(lease), tonumber(remembered or '0'))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
redis.call('UNLINK', KEYS[4])
return {'ok'}
";

/// Keys: spaces. Arguments: clock offset, most ids.
const EXPIRED: &str = "
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now(ARGV[1]), 'LIMIT', 0, ARGV[2])
table.insert(ids, 1, 'ok')
return ids
";

pub(super) struct Scripts {
    pub(super) create: Script,
    pub(super) renew: Script,
    pub(super) put: Script,
    pub(super) forget: Script,
    pub(super) expired: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let script = |code: &str| Script::new(&format!("{NOW}{code}"));
        Self {
            create: script(CREATE),
            renew: script(RENEW),
            put: Script::new(PUT),
            forget: script(FORGET),
            expired: script(EXPIRED),
        }
    }
}

/// The names of the keys.
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub(super) fn store(&self) -> String {
        format!("{}:store", self.prefix)
    }

    pub(super) fn spaces(&self) -> String {
        format!("{}:spaces", self.prefix)
    }

    pub(super) fn forgotten(&self) -> String {
        format!("{}:forgotten", self.prefix)
    }

    pub(super) fn used(&self) -> String {
        format!("{}:used", self.prefix)
    }

    pub(super) fn space(&self, id: NamespaceId) -> String {
        format!("{}:space:{id}", self.prefix)
    }

    pub(super) fn pages(&self, id: NamespaceId) -> String {
        format!("{}:pages:{id}", self.prefix)
    }
}

/// What a script has answered. Nothing of it was checked.
pub(super) struct Answer(Vec<Vec<u8>>);

impl Answer {
    pub(super) fn new(parts: Vec<Vec<u8>>) -> Self {
        Self(parts)
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
