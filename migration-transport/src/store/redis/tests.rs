//! The servers are real ones, started for the tests. Where none is installed, the tests say so and
//! do nothing; with `MIGRATION_REQUIRE_REDIS=1` they fail.

mod cluster;
mod faults;
mod servers;
mod values;

use std::{
    io::ErrorKind,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use migration_core::{
    PAGE_SIZE,
    store::{
        Namespace, Trailer,
        conformance::{Harm, TestStore},
    },
    vm::VmId,
};
use redis::FromRedisValue;

use self::servers::{Cluster, Server, wait};
use super::{
    blocks::{BLOCK_PAGES, DIRECTORY_BYTES, SLOT_BYTES, index},
    *,
};

const LEASE: Duration = Duration::from_secs(60);

/// Opens a store as soon as the server answers.
fn open(url: &RedisUrl, options: &RedisPageStoreOptions) -> RedisPageStore {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match RedisPageStore::open(url, "server", options.clone()) {
            Ok(store) => return store,
            Err(error) => assert!(error.can_retry() && Instant::now() < deadline, "{error:?}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn small() -> RedisPageStoreOptions {
    RedisPageStoreOptions { limit: Some(4 << 20), max_namespaces: 20, ..Default::default() }
}

/// A store in a server, or a cluster, that may be shared with other tests.
struct InServer {
    store: RedisPageStore,
    url: RedisUrl,
    options: RedisPageStoreOptions,
    _own: Option<Server>,
}

impl InServer {
    fn new(url: RedisUrl, own: Option<Server>) -> Self {
        static TESTS: AtomicU32 = AtomicU32::new(0);
        // servers are shared: each test has keys of its own
        let prefix = format!("test-{}", TESTS.fetch_add(1, Ordering::Relaxed));
        let options = RedisPageStoreOptions { prefix, ..small() };
        Self { store: open(&url, &options), url, options, _own: own }
    }

    /// A server of its own on a Unix socket.
    fn on_unix() -> Option<Self> {
        let server = Server::start(&[])?;
        Some(Self::new(server.url(), Some(server)))
    }

    fn with_tls() -> Option<Self> {
        static SHARED: OnceLock<Option<Server>> = OnceLock::new();
        let server = SHARED.get_or_init(Server::start_with_tls).as_ref()?;
        Some(Self::new(server.url(), None))
    }

    fn in_cluster() -> Option<Self> {
        Some(Self::new(Cluster::shared()?.url(), None))
    }

    fn ask<T: FromRedisValue>(&self, part: usize, command: &Cmd) -> T {
        self.store.servers.with(self.store.target(part), 0, |connection| connection.ask(command, wait())).unwrap()
    }

    fn read(&self, part: usize, key: &str) -> Vec<u8> {
        self.ask(part, redis::cmd("GET").arg(key))
    }

    fn write(&self, part: usize, key: &str, value: &[u8]) {
        self.ask(part, redis::cmd("SET").arg(key).arg(value))
    }

    /// Returns all keys of the store that begin like this.
    fn keys(&self, part: usize, start: &str) -> Vec<String> {
        self.ask(part, redis::cmd("KEYS").arg(format!("{start}*")))
    }
}

impl TestStore for InServer {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn max_namespaces(&self) -> usize {
        20
    }

    fn advance(&mut self, by: Duration) {
        self.store.clock.fetch_add(millis(by), Ordering::Relaxed);
    }

    fn crash_user(&mut self) {
        let clock = self.store.clock_offset();
        self.store = open(&self.url, &self.options);
        self.store.clock.store(clock, Ordering::Relaxed);
    }

    fn lose_everything(&mut self) {
        for part in 0..self.store.servers.parts().len() {
            for key in self.keys(part, &self.store.servers.parts()[part].block_start().replace("block:", "")) {
                self.ask::<()>(part, redis::cmd("DEL").arg(key));
            }
        }
    }

    fn harm(&mut self, id: NamespaceId, page: u64, harm: Harm) -> bool {
        let (part, keys) = self.store.part(id);
        let key = keys.block(id, page / BLOCK_PAGES);
        let mut block = self.read(part, &key);
        let entry = |page: u64| usize::from(index(page)) * 8;
        let slot = |block: &[u8], page: u64| DIRECTORY_BYTES + usize::from(block[entry(page) + 6]) * SLOT_BYTES;
        let at = slot(&block, page);
        match harm {
            Harm::Lose => block[entry(page)..entry(page) + 8].fill(0),
            Harm::Damage => block[at + 2000] ^= 1,
            Harm::LoseTrailer => block[at..at + Trailer::BYTES].fill(0),
            Harm::MixUp(other) => {
                let other = slot(&block, other);
                block.copy_within(other..other + SLOT_BYTES, at);
            }
        }
        self.write(part, &key, &block);
        true
    }
}

mod on_unix {
    migration_core::page_store_conformance!(optional super::InServer::on_unix);
}

mod with_tls {
    migration_core::page_store_conformance!(optional super::InServer::with_tls);
}

mod in_cluster {
    migration_core::page_store_conformance!(optional super::InServer::in_cluster);
}

fn record() -> Record {
    Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7").unwrap() }
}

fn namespace(number: u8) -> VmNamespace {
    Namespace::new([number; 16]).of(record().vm)
}

fn create(store: &RedisPageStore, number: u8) -> VmNamespace {
    let of = namespace(number);
    store.create(of.id, &record(), LEASE).unwrap();
    of
}

/// Returns the value of a page in a generation.
fn value(page: u64, generation: u32) -> [u8; PAGE_SIZE] {
    let mut value = [generation as u8 | 1; PAGE_SIZE];
    value[..8].copy_from_slice(&page.to_le_bytes());
    value[8..12].copy_from_slice(&generation.to_le_bytes());
    value
}

fn put(store: &RedisPageStore, of: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
    let values: Vec<_> = pages.iter().map(|&page| value(page, generation)).collect();
    let run: Vec<_> = pages.iter().zip(&values).map(|(&page, value)| PageToPut { page, value }).collect();
    store.put(of, generation, &run)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Reads pages of one generation. Returns the numbers of those that the store has, all of which are
/// as they were put.
fn get(store: &RedisPageStore, of: VmNamespace, generation: u32, pages: &[u64]) -> Result<Vec<u64>, StoreError> {
    let wanted: Vec<_> = pages.iter().map(|&page| PageToGet { page, generation }).collect();
    let mut got = Vec::new();
    let result = store.get(of, &wanted, Urgency::Prefetch, soon(), &mut |page, data| {
        assert!(data.page() == Some(&value(page, generation)), "page {page} is not as it was put");
        got.push(page);
    });
    match result {
        Ok(()) => assert_eq!(got, pages),
        Err(StoreError::Missing { count, .. }) => assert_eq!(count as usize + got.len(), pages.len()),
        Err(error) => return Err(error),
    }
    Ok(got)
}
