//! A page store in a Valkey or Redis server.

mod link;
mod scripts;
#[cfg(test)]
mod tests;

use std::{
    fmt, iter,
    time::{Duration, Instant},
};

use ::redis::{ScriptInvocation, cmd, pipe};
use migration_core::{
    store::{
        Incarnation, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Purpose, Record, StoreError,
        Stored, Trailer, Urgency, VmNamespace, check_get, check_lease, check_put,
        limits::{MAX_FORGOTTEN, MAX_NAMESPACES, MAX_VALUE_BYTES, UNSEEN_LEASE},
    },
    vm::VmId,
};

use link::{Link, ServerInfo};
use scripts::{Answer, Keys, Scripts};

/// Pages of a prefetch in flight: 256 KiB. A fault that reaches the server waits for no more.
const PREFETCH_PAGES: usize = 64;
/// Pages of a fault in flight: 1 MiB.
const FAULT_PAGES: usize = 256;
/// Bytes that a page takes in the server beside its value and trailer: its field, and the server's
/// own structures. An estimate.
const ENTRY_BYTES: u64 = 96;

/// How a [`RedisPageStore`] works. All users of a store choose the same.
#[derive(Clone, Debug)]
pub struct RedisPageStoreOptions {
    /// Most bytes that all pages may take; `None` for what the server has.
    pub limit: Option<u64>,
    /// The longest time that the server may take to answer, or to accept a connection. The deadline
    /// of a `get` can shorten it.
    pub timeout: Duration,
    /// Most namespaces, at most [`MAX_NAMESPACES`].
    pub max_namespaces: usize,
    /// What the names of all keys begin with. Stores with different prefixes can share a database.
    pub prefix: String,
}

impl Default for RedisPageStoreOptions {
    fn default() -> Self {
        let timeout = Duration::from_secs(10);
        Self { limit: None, timeout, max_namespaces: MAX_NAMESPACES, prefix: "migration".to_owned() }
    }
}

/// Keeps pages in a Valkey or Redis server (version 5 or later), for several users on several
/// hosts.
///
/// Every call is one script, or one pipeline of reads, on the server: comparison and replacement
/// are one step. There are three connections: one for faults, one for prefetches, and one for
/// everything else. A prefetch asks for 256 KiB at a time. A connection that fails is made anew by
/// the next call, at the earliest after a pause that grows from 50 ms to 5 s; until then calls fail
/// with an error that [can be retried](StoreError::can_retry).
///
/// The incarnation is made of the server's run id and of a random key in the database. So every
/// restart of the server, and every loss of the database, counts as a loss of all pages, also if
/// the server reads its data back from a disk. A server whose policy may evict keys is refused: set
/// `maxmemory-policy` to `noeviction`. Leases run on the server's clock.
///
/// Whoever has the server can read and replace a VM's memory: wrap the store in
/// `migration_crypto::Sealed` if that matters. It can also answer with values of any length, which
/// are read before they are refused: use servers that you run.
///
/// # Example
///
/// ```no_run
/// use migration_core::store::PageStore;
/// use migration_transport::{RedisPageStore, RedisPageStoreOptions};
///
/// let options = RedisPageStoreOptions::default();
/// let store = RedisPageStore::open("redis://10.0.0.7:6379/0", "rack-7", options)?;
/// println!("room for {} MiB", store.room() >> 20);
/// # Ok::<(), migration_core::store::StoreError>(())
/// ```
pub struct RedisPageStore {
    name: String,
    options: RedisPageStoreOptions,
    keys: Keys,
    scripts: Scripts,
    faults: Link,
    prefetches: Link,
    others: Link,
    /// How far tests have moved the server's clock, in milliseconds.
    #[cfg(test)]
    clock: std::sync::atomic::AtomicU64,
}

impl RedisPageStore {
    /// Connects to the server at `url`: `redis://[:PASSWORD@]HOST:PORT/DB`, or
    /// `redis+unix:///PATH?db=DB` for a Unix socket. `name` is the name under which both sides have
    /// configured the store.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if the URL makes no sense, the server cannot be reached, does not
    /// let this user in, or may evict keys. [`StoreError::can_retry`] says which of these may pass.
    pub fn open(url: &str, name: impl Into<String>, options: RedisPageStoreOptions) -> Result<Self, StoreError> {
        let link = || Link::new(url);
        let store = Self {
            name: name.into(),
            keys: Keys::new(&options.prefix),
            scripts: Scripts::new(),
            faults: link()?,
            prefetches: link()?,
            others: link()?,
            options,
            #[cfg(test)]
            clock: Default::default(),
        };
        store.others.with(store.options.timeout, |_, _| Ok(()))?;
        Ok(store)
    }

    #[cfg(test)]
    fn clock_offset(&self) -> u64 {
        self.clock.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(not(test))]
    fn clock_offset(&self) -> u64 {
        0
    }

    /// Runs a script that answers with a status and a list.
    fn run(
        &self,
        prepare: impl for<'s> FnOnce(&'s Scripts, &Keys) -> ScriptInvocation<'s>,
    ) -> Result<(Answer, [u8; 16]), StoreError> {
        self.others.with(self.options.timeout, |connection, server| {
            let answer: Vec<Vec<u8>> = prepare(&self.scripts, &self.keys).invoke(connection)?;
            Ok((Answer::new(answer), server.run_id))
        })
    }

    /// Reads up to a few hundred pages. The link is free again when this returns.
    fn fetch(
        &self,
        link: &Link,
        namespace: VmNamespace,
        pages: &[PageToGet],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StoreError::TimedOut);
        }
        let mut pipe = pipe();
        pipe.cmd("HGET").arg(self.keys.space(namespace.id)).arg("record");
        let wanted = pipe.cmd("HMGET").arg(self.keys.pages(namespace.id));
        pages.iter().for_each(|page| _ = wanted.arg(page.page));
        type Reply = (Option<Vec<u8>>, Vec<Option<Vec<u8>>>);
        let reply = link.with(left.min(self.options.timeout), |connection, _| pipe.query::<Reply>(connection));
        let (record, values) = match reply {
            Err(error) if error.can_retry() && Instant::now() >= deadline => return Err(StoreError::TimedOut),
            other => other?,
        };
        match self.decode_record(namespace.id, record)? {
            None => Err(StoreError::Absent(namespace.id)),
            Some(record) if record.vm != namespace.vm => Err(StoreError::OtherVm(namespace.id)),
            Some(_) => Ok(values),
        }
    }

    fn decode_record(&self, id: NamespaceId, bytes: Option<Vec<u8>>) -> Result<Option<Record>, StoreError> {
        let Some(bytes) = bytes else { return Ok(None) };
        let damaged = |cause: Box<dyn std::error::Error + Send + Sync>| StoreError::Damaged {
            what: format!("the record of namespace {id} in {}", self.name),
            cause,
        };
        match bytes.first_chunk() {
            Some(record) if bytes.len() == Record::BYTES => {
                Record::decode(record).map(Some).map_err(|cause| damaged(cause.into()))
            }
            _ => Err(damaged("it has another length".into())),
        }
    }

    fn info(&self) -> Result<ServerInfo, StoreError> {
        self.others.with(self.options.timeout, |connection, _| ServerInfo::ask(connection))
    }

    fn find_room(&self) -> Result<u64, StoreError> {
        let Some(limit) = self.options.limit else { return Ok(self.info()?.room()) };
        let used = self.others.with(self.options.timeout, |connection, _| {
            cmd("GET").arg(self.keys.used()).query::<Option<u64>>(connection)
        })?;
        Ok(limit.saturating_sub(used.unwrap_or(0)))
    }
}

/// Returns the incarnation: it changes if the random key or the server does.
fn incarnation(random: &[u8], run_id: [u8; 16]) -> Incarnation {
    let mut bytes = run_id;
    iter::zip(&mut bytes, random).for_each(|(byte, random)| *byte ^= random);
    Incarnation(bytes)
}

/// Returns the value, if it is the one that the trailer before it proves.
fn checked<'a>(bytes: &'a [u8], vm: VmId, wanted: &PageToGet) -> Option<&'a [u8]> {
    let (trailer, value) = bytes.split_first_chunk()?;
    let good =
        value.len() <= MAX_VALUE_BYTES && Trailer::decode(trailer).proves(vm, wanted.page, wanted.generation, value);
    good.then_some(value)
}

/// Rounds up, so that no lease ends too early.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

impl PageStore for RedisPageStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn room(&self) -> u64 {
        self.find_room().unwrap_or(0)
    }

    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        let limit = self.options.max_namespaces.min(MAX_NAMESPACES);
        let (answer, run_id) = self.run(|scripts, keys| {
            let mut call = scripts.create.key(keys.store());
            call.key(keys.spaces()).key(keys.forgotten()).key(keys.space(namespace));
            call.arg(&namespace.0[..]).arg(&record.encode()[..]).arg(millis(lease)).arg(self.clock_offset());
            call.arg(&Incarnation::random().0[..]).arg(limit);
            call
        })?;
        match answer.status() {
            "ok" => Ok(incarnation(answer.item(0), run_id)),
            "occupied" => Err(StoreError::Occupied(namespace)),
            "many" => Err(StoreError::TooMany { what: "namespaces", limit }),
            _ => Err(answer.error(&self.name, namespace)),
        }
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        // the script takes the owner out of this record, and the rest out of the one that is there
        let record = Record { vm: namespace.vm, purpose: Purpose::Home, owner };
        let (answer, run_id) = self.run(|scripts, keys| {
            let mut call = scripts.renew.key(keys.store());
            call.key(keys.spaces()).key(keys.space(namespace.id));
            call.arg(&namespace.id.0[..]).arg(&record.encode()[..]).arg(millis(lease)).arg(self.clock_offset());
            call
        })?;
        match answer.status() {
            "ok" => Ok(incarnation(answer.item(0), run_id)),
            _ => Err(answer.error(&self.name, namespace.id)),
        }
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        let (answer, run_id) = self.run(|scripts, keys| {
            let mut call = scripts.put.key(keys.store());
            call.key(keys.space(namespace.id)).key(keys.pages(namespace.id)).key(keys.used());
            call.arg(&namespace.vm.0[..]).arg(generation);
            // above what a double of the server's Lua can count, there is no limit
            call.arg(self.options.limit.unwrap_or(1 << 53).min(1 << 53)).arg(ENTRY_BYTES);
            for &PageToPut { page, value } in pages {
                let trailer = Trailer::new(namespace.vm, page, generation, value).encode();
                call.arg(page).arg([&trailer[..], value].concat());
            }
            call
        })?;
        match answer.status() {
            "ok" if answer.item(1).len() == pages.len() => {
                let taken = answer.item(1).iter().map(|&taken| taken == b'1').collect();
                Ok(Stored { incarnation: incarnation(answer.item(0), run_id), taken })
            }
            "room" => Err(StoreError::NoRoom { needed: answer.number(0), room: answer.number(1) }),
            _ => Err(answer.error(&self.name, namespace.id)),
        }
    }

    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        let (link, most) = match urgency {
            Urgency::Fault => (&self.faults, FAULT_PAGES),
            Urgency::Prefetch => (&self.prefetches, PREFETCH_PAGES),
        };
        let mut missing = Vec::new();
        for piece in pages.chunks(most) {
            let values = self.fetch(link, namespace, piece, deadline)?;
            let values = values.iter().map(Option::as_deref).chain(iter::repeat(None));
            for (wanted, value) in piece.iter().zip(values) {
                match value.and_then(|value| checked(value, namespace.vm, wanted)) {
                    Some(value) => take(wanted.page, PageData::new(value)),
                    None => missing.push(wanted.page),
                }
            }
        }
        StoreError::left_out(namespace.id, missing)
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        let bytes = self.others.with(self.options.timeout, |connection, _| {
            cmd("HGET").arg(self.keys.space(namespace)).arg("record").query(connection)
        })?;
        self.decode_record(namespace, bytes)
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        let (answer, _) = self.run(|scripts, keys| {
            let mut call = scripts.forget.key(keys.spaces());
            call.key(keys.forgotten()).key(keys.space(namespace.id)).key(keys.pages(namespace.id)).key(keys.used());
            call.arg(&namespace.id.0[..]).arg(&namespace.vm.0[..]).arg(millis(UNSEEN_LEASE)).arg(self.clock_offset());
            call.arg(MAX_FORGOTTEN);
            call
        })?;
        match answer.status() {
            "ok" => Ok(()),
            "many" => Err(StoreError::TooMany { what: "forgotten ids", limit: MAX_FORGOTTEN }),
            _ => Err(answer.error(&self.name, namespace.id)),
        }
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        let (answer, _) = self.run(|scripts, keys| {
            let mut call = scripts.expired.key(keys.spaces());
            call.arg(self.clock_offset()).arg(MAX_NAMESPACES);
            call
        })?;
        let mut ended = Vec::new();
        for bytes in answer.items() {
            let Ok(id) = <[u8; 16]>::try_from(&bytes[..]).map(NamespaceId) else { continue };
            // it may have been forgotten since
            ended.extend(self.record(id)?.map(|record| (id, record)));
        }
        ended.sort_by_key(|(id, _)| *id);
        Ok(ended)
    }
}

impl fmt::Debug for RedisPageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisPageStore")
            .field("name", &self.name)
            .field("server", &self.others.shown())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
