//! A page store in Valkey or Redis servers.

mod blocks;
mod cluster;
mod connection;
mod fail;
mod scripts;
mod server;
#[cfg(test)]
mod tests;
mod tls;
mod transfer;

use std::{
    fmt, iter,
    time::{Duration, Instant},
};

use migration_core::store::{
    Incarnation, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Purpose, Record, StoreError, Stored,
    Urgency, VmNamespace, check_get, check_lease, check_put,
    limits::{MAX_FORGOTTEN, MAX_NAMESPACES, UNSEEN_LEASE},
};
use redis::Cmd;

use self::{
    cluster::{Servers, Target},
    connection::{Settings, Wait},
    scripts::{Answer, CREATE, EXPIRED, FORGET, Keys, RENEW, SWEEP, run, run_with_time},
    server::Use,
    transfer::{Get, Put, decode_record},
};
use super::url::RedisUrl;

/// Pages of prefetches that one server has under way: 256 KiB. A fault that reaches the server
/// waits for no more.
const PREFETCH_PAGES: usize = 64;
/// Pages of a fault that one server has under way: 1 MiB.
const FAULT_PAGES: usize = 256;
/// Blocks of a forgotten namespace that are removed in one step, during which the server answers
/// nobody.
const SWEEP_BLOCKS: usize = 128;

/// How a [`RedisPageStore`] works. All users of a store choose the same.
#[derive(Clone, Debug)]
pub struct RedisPageStoreOptions {
    /// Most bytes that all pages may take; `None` for what the servers have. In a cluster, most
    /// bytes of each of its 16 parts.
    pub limit: Option<u64>,
    /// The longest time that a server may be silent. The deadline of a `get` can shorten it: no
    /// answer is then waited for after the deadline. An answer that arrives in small parts, each
    /// within that time, is read to its end.
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

/// Keeps pages in a Valkey or Redis server (version 5 or later), or in a cluster of them, for
/// several users on several hosts.
///
/// **Pages travel in runs.** 16 pages that follow each other are one value of the server. A put is
/// one transaction, in which the server compares all generations and copies no page. A get asks for
/// the next runs while it hands out the last ones.
///
/// **Faults have connections of their own**, and a server has at most 256 KiB of prefetches under
/// way for this store. Two threads that prefetch take turns. `take` may use the store; no lock is
/// held while it is called.
///
/// **Connections are made when they are needed**, and made anew when they have failed, at the
/// earliest after a pause that grows from 50 ms to 5 s. Until then calls fail with an error that
/// [can be retried](StoreError::can_retry). A connection that a server has closed while it was idle
/// is replaced without an error.
///
/// **In a cluster** a namespace lies on one server, and namespaces are spread evenly over 16 parts.
/// If parts move to another server, calls follow them; to have moved counts as a loss.
///
/// **The incarnation** is made of the server's run id and of a random key in the database. So every
/// restart of the server, and every loss of the database, counts as a loss of all pages, also if
/// the server reads its data back from a disk. A server whose policy may evict keys is refused: set
/// `maxmemory-policy` to `noeviction`. Replicas are refused. Leases run on the server's clock.
///
/// Whoever has the server can read and replace a VM's memory: wrap the store in
/// `migration_crypto::Sealed` if that matters. A page that is not as it was put is missing, whatever
/// a server answers. An answer is read as a whole before it is checked: use servers of your own.
///
/// The client is the crate `redis`. TLS is that of `rustls`; if the process has chosen no provider of
/// cryptography for `rustls`, [`open`](Self::open) chooses AWS-LC.
///
/// # Example
///
/// ```no_run
/// use migration_core::store::PageStore;
/// use migration_transport::{RedisPageStore, RedisPageStoreOptions, StoreUrl};
///
/// let StoreUrl::Redis(url) = "redis://10.0.0.7:6379/0".parse()? else { return Ok(()) };
/// let store = RedisPageStore::open(&url, "rack-7", RedisPageStoreOptions::default())?;
/// println!("room for {} MiB", store.room() >> 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RedisPageStore {
    name: String,
    url: RedisUrl,
    options: RedisPageStoreOptions,
    servers: Servers,
    /// How far tests have moved the servers' clock, in milliseconds.
    #[cfg(test)]
    clock: std::sync::atomic::AtomicU64,
}

/// How a server of a [`RedisPageStore`] is.
#[derive(Debug)]
pub struct RedisHealth {
    /// Its address.
    pub address: String,
    /// Its memory, or why it does not answer.
    pub memory: Result<RedisMemory, StoreError>,
}

/// The memory of a server, and how fast it has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedisMemory {
    /// Bytes in use, for whatever.
    pub used_bytes: u64,
    /// The limit that the server has, or else the memory of its host.
    pub most_bytes: u64,
    /// The time from the question to the answer, on a connection that existed before.
    pub round_trip: Duration,
}

impl RedisPageStore {
    /// Connects to the server, or to each server of the cluster. `name` is the name under which
    /// both sides have configured the store.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if a file for TLS is missing or wrong, or a server cannot be
    /// reached, does not let this user in, is a replica, or may evict keys.
    /// [`StoreError::can_retry`] says which of these may pass.
    ///
    /// # Panics
    /// Panics if the URL names no server.
    pub fn open(url: &RedisUrl, name: impl Into<String>, options: RedisPageStoreOptions) -> Result<Self, StoreError> {
        let tls = url.tls.as_ref().map(tls::certificates).transpose();
        let tls = tls.map_err(StoreError::io("reading the files for TLS"))?;
        assert!(!url.servers.is_empty(), "a store has at least one server");
        let settings = Settings {
            user: url.user.clone(),
            password: url.password.clone(),
            database: url.database,
            tls,
            cluster: url.cluster,
        };
        let store = Self {
            name: name.into(),
            url: url.clone(),
            servers: Servers::new(&url.servers, &options.prefix, settings),
            options,
            #[cfg(test)]
            clock: Default::default(),
        };
        store.servers.start(store.wait())?;
        Ok(store)
    }

    /// Asks each server how it is. Blocks for up to the time-out for each.
    pub fn health(&self) -> Vec<RedisHealth> {
        let ask = |server: std::sync::Arc<server::Server>| {
            let address = server.address.to_string();
            let memory = server.with(Use::Others, self.wait(), &mut |connection| {
                let start = Instant::now();
                let info = connection.ask_info(self.wait())?;
                let (used_bytes, most_bytes) = (info.used_bytes, info.most_bytes);
                Ok(RedisMemory { used_bytes, most_bytes, round_trip: start.elapsed() })
            });
            RedisHealth { memory: memory.map_err(|fail| fail.into_store_error(&address, 0)), address }
        };
        self.servers.all().into_iter().map(ask).collect()
    }

    #[cfg(test)]
    fn clock_offset(&self) -> u64 {
        self.clock.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(not(test))]
    fn clock_offset(&self) -> u64 {
        0
    }

    fn wait(&self) -> Wait {
        Wait::silence(self.options.timeout)
    }

    fn target(&self, part: usize) -> Target {
        Target { part, of: Use::Others, wait: self.wait() }
    }

    /// Returns the number and the keys of the part that has the namespace.
    fn part(&self, id: NamespaceId) -> (usize, &Keys) {
        let part = self.servers.part_of(id);
        (part, &self.servers.parts()[part])
    }

    /// Runs a script. Returns its answer, and the run id of the server.
    fn run(&self, part: usize, script: &Cmd) -> Result<(Answer, [u8; 16]), StoreError> {
        let wait = self.wait();
        self.servers.with(self.target(part), 0, |connection| {
            Ok((Answer::new(connection.ask(script, wait)?)?, connection.info.run_id))
        })
    }

    /// Sends a command that reads a key of a part.
    fn ask<T: redis::FromRedisValue>(&self, part: usize, command: &Cmd) -> Result<T, StoreError> {
        let wait = self.wait();
        self.servers.with(self.target(part), 0, |connection| connection.ask(command, wait))
    }

    /// Returns how many namespaces all parts but one have.
    fn namespaces_elsewhere(&self, part: usize) -> Result<usize, StoreError> {
        let mut count = 0;
        for other in (0..self.servers.parts().len()).filter(|other| *other != part) {
            let found: usize = self.ask(other, redis::cmd("ZCARD").arg(self.servers.parts()[other].spaces()))?;
            count += found.min(MAX_NAMESPACES);
        }
        Ok(count)
    }

    /// Removes what is left of forgotten namespaces, in steps, so that nobody waits for long.
    fn sweep(&self, part: usize) -> Result<(), StoreError> {
        let keys = &self.servers.parts()[part];
        let mut step = run(SWEEP, &[&keys.dying()]);
        step.arg(keys.blocks_start()).arg(keys.block_start()).arg(SWEEP_BLOCKS);
        while self.run(part, &step)?.0.number(0) == 1 {}
        Ok(())
    }

    fn find_room(&self) -> Result<u64, StoreError> {
        let wait = self.wait();
        let mut room = 0_u64;
        let Some(limit) = self.options.limit else {
            for server in self.servers.all() {
                let info = server.with(Use::Others, wait, &mut |connection| connection.ask_info(wait));
                let info = info.map_err(|fail| fail.into_store_error(&server.address.to_string(), 0))?;
                room = room.saturating_add(info.room());
            }
            return Ok(room);
        };
        for (part, keys) in self.servers.parts().iter().enumerate() {
            let used: Option<i64> = self.ask(part, redis::cmd("GET").arg(keys.used()))?;
            room += limit.saturating_sub(used.and_then(|used| u64::try_from(used).ok()).unwrap_or(0));
        }
        Ok(room)
    }
}

/// Returns the incarnation: it changes if the random key or the server does.
fn incarnation(random: &[u8], run_id: [u8; 16]) -> Incarnation {
    let mut bytes = run_id;
    iter::zip(&mut bytes, random).for_each(|(byte, random)| *byte ^= random);
    Incarnation(bytes)
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
        let (part, keys) = self.part(namespace);
        let here = limit.saturating_sub(self.namespaces_elsewhere(part)?);
        let names = [keys.store(), keys.spaces(), keys.forgotten(), keys.space(namespace)];
        let mut script = run_with_time(CREATE, &names.each_ref().map(String::as_str), self.clock_offset());
        script.arg(namespace.to_string()).arg(&record.encode()[..]).arg(millis(lease));
        script.arg(&Incarnation::random().0[..]).arg(here);
        let (answer, run_id) = self.run(part, &script)?;
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
        let (part, keys) = self.part(namespace.id);
        let names = [keys.store(), keys.spaces(), keys.space(namespace.id)];
        let mut script = run_with_time(RENEW, &names.each_ref().map(String::as_str), self.clock_offset());
        script.arg(namespace.id.to_string()).arg(&record.encode()[..]).arg(millis(lease));
        let (answer, run_id) = self.run(part, &script)?;
        match answer.status() {
            "ok" => Ok(incarnation(answer.item(0), run_id)),
            _ => Err(answer.error(&self.name, namespace.id)),
        }
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        let (part, keys) = self.part(namespace.id);
        let put = Put { keys, namespace, generation, pages, limit: self.options.limit.unwrap_or(u64::MAX) };
        let needed = pages.len() as u64 * blocks::SLOT_BYTES as u64;
        let wait = self.wait();
        let (answer, run_id) = self
            .servers
            .with(self.target(part), needed, |connection| Ok((put.run(connection, wait)?, connection.info.run_id)))?;
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
        let (of, window) = match urgency {
            Urgency::Fault => (Use::Faults, FAULT_PAGES),
            Urgency::Prefetch => (Use::Prefetches, PREFETCH_PAGES),
        };
        let wait = self.wait().until(deadline);
        if wait.is_over() {
            return Err(StoreError::TimedOut);
        }
        let (part, keys) = self.part(namespace.id);
        let mut get = Get::new(keys, &self.name, namespace, pages, window);
        let result =
            self.servers.with(Target { part, of, wait }, 0, |connection| get.run(connection, wait, &mut *take));
        match result {
            Err(error) if error.can_retry() && wait.is_over() => Err(StoreError::TimedOut),
            Err(error) => Err(error),
            Ok(()) => StoreError::left_out(namespace.id, get.missing),
        }
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        let (part, keys) = self.part(namespace);
        let record = self.ask(part, redis::cmd("HGET").arg(keys.space(namespace)).arg("record"))?;
        decode_record(&self.name, namespace, record)
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        let id = namespace.id;
        let (part, keys) = self.part(id);
        let names = [keys.spaces(), keys.forgotten(), keys.space(id), keys.blocks(id), keys.used(), keys.dying()];
        let mut script = run_with_time(FORGET, &names.each_ref().map(String::as_str), self.clock_offset());
        script.arg(id.to_string()).arg(&namespace.vm.0[..]).arg(millis(UNSEEN_LEASE)).arg(MAX_FORGOTTEN);
        let (answer, _) = self.run(part, &script)?;
        match answer.status() {
            "ok" => self.sweep(part),
            "many" => Err(StoreError::TooMany { what: "forgotten ids", limit: MAX_FORGOTTEN }),
            _ => Err(answer.error(&self.name, id)),
        }
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        let mut ended = Vec::new();
        for (part, keys) in self.servers.parts().iter().enumerate() {
            // a user may have crashed in the middle of a `forget`
            self.sweep(part)?;
            let mut script = run_with_time(EXPIRED, &[&keys.spaces()], self.clock_offset());
            script.arg(MAX_NAMESPACES).arg(keys.space_start());
            let (answer, _) = self.run(part, &script)?;
            for pair in answer.items().chunks_exact(2) {
                let id = str::from_utf8(&pair[0]).ok().filter(|digits| digits.len() == 32);
                let Some(id) = id.and_then(|digits| u128::from_str_radix(digits, 16).ok()) else { continue };
                let id = NamespaceId(id.to_be_bytes());
                let record = Some(pair[1].clone()).filter(|record| !record.is_empty());
                ended.extend(decode_record(&self.name, id, record)?.map(|record| (id, record)));
            }
        }
        ended.sort_by_key(|(id, _)| *id);
        Ok(ended)
    }
}

impl fmt::Debug for RedisPageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisPageStore")
            .field("name", &self.name)
            .field("url", &self.url)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
