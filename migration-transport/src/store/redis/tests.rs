//! The server is a real one, started for each test. Where none is installed, the tests say so and
//! do nothing; with `MIGRATION_REQUIRE_REDIS=1` in the environment they fail.

use std::{
    env,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use ::redis::{Cmd, FromRedisValue};
use migration_core::{
    PAGE_SIZE,
    store::{
        Namespace,
        conformance::{Harm, TestStore},
    },
};
use tempfile::TempDir;

use super::*;

const LEASE: Duration = Duration::from_secs(60);

/// A server on a Unix socket. It ends with this.
struct Server {
    dir: TempDir,
    child: Child,
}

impl Server {
    /// Starts a server; `None` if there is none on this host.
    fn start(args: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        for program in ["redis-server", "valkey-server"] {
            let mut command = Command::new(program);
            command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]);
            command.arg(dir.path().join("socket")).args(args);
            command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if let Ok(child) = command.spawn() {
                return Some(Self { dir, child });
            }
        }
        let required = env::var_os("MIGRATION_REQUIRE_REDIS").is_some_and(|value| value == "1");
        assert!(!required, "neither redis-server nor valkey-server is installed");
        eprintln!("skipped: neither redis-server nor valkey-server is installed");
        None
    }

    fn url(&self) -> String {
        format!("redis+unix://{}", self.dir.path().join("socket").display())
    }

    /// Opens the store, as soon as the server answers.
    fn open(&self) -> RedisPageStore {
        let options = RedisPageStoreOptions { limit: Some(4 << 20), max_namespaces: 20, ..Default::default() };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match RedisPageStore::open(&self.url(), "server", options.clone()) {
                Ok(store) => return store,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store in a server of its own.
struct InServer {
    store: RedisPageStore,
    server: Server,
}

impl InServer {
    fn start() -> Option<Self> {
        let server = Server::start(&[])?;
        Some(Self { store: server.open(), server })
    }

    fn ask<T: FromRedisValue>(&self, command: &Cmd) -> T {
        let timeout = Duration::from_secs(60);
        self.store.others.with(timeout, |connection, _| command.query(connection)).unwrap()
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
        self.store = self.server.open();
        self.store.clock.store(clock, Ordering::Relaxed);
    }

    fn lose_everything(&mut self) {
        self.ask::<()>(&cmd("FLUSHALL"));
    }

    fn harm(&mut self, id: NamespaceId, page: u64, harm: Harm) -> bool {
        let key = self.store.keys.pages(id);
        let read = |page: u64| self.ask::<Vec<u8>>(cmd("HGET").arg(&key).arg(page));
        let value = match harm {
            Harm::Lose => return self.ask::<u64>(cmd("HDEL").arg(&key).arg(page)) == 1,
            Harm::Damage => {
                let mut value = read(page);
                value[2000] ^= 1;
                value
            }
            Harm::LoseTrailer => [&[0; Trailer::BYTES][..], &read(page)[Trailer::BYTES..]].concat(),
            Harm::MixUp(other) => read(other),
        };
        self.ask::<u64>(cmd("HSET").arg(&key).arg(page).arg(value));
        true
    }
}

migration_core::page_store_conformance!(optional InServer::start);

fn record() -> Record {
    Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7").unwrap() }
}

fn put(store: &dyn PageStore, of: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
    let value = [generation as u8; PAGE_SIZE];
    let run: Vec<_> = pages.iter().map(|&page| PageToPut { page, value: &value }).collect();
    store.put(of, generation, &run)
}

#[test]
fn a_server_that_was_started_anew_has_another_incarnation() {
    let Some(mut test) = InServer::start() else { return };
    let of = Namespace::new([7; 16]).of(record().vm);
    let before = test.store.create(of.id, &record(), LEASE).unwrap();
    put(&test.store, of, 1, &[1]).unwrap();
    test.server = Server::start(&[]).unwrap();
    test.store = test.server.open();
    assert!(matches!(put(&test.store, of, 2, &[1]), Err(StoreError::Absent(_))));
    assert_ne!(test.store.create(of.id, &record(), LEASE).unwrap(), before);
    // data that comes back from a disk does not hide the start
    assert_ne!(incarnation(&[5; 16], [1; 16]), incarnation(&[5; 16], [2; 16]));
}

#[test]
fn a_server_that_is_gone_can_be_asked_again() {
    let Some(mut test) = InServer::start() else { return };
    let of = Namespace::new([7; 16]).of(record().vm);
    test.store.create(of.id, &record(), LEASE).unwrap();
    test.server.child.kill().unwrap();
    test.server.child.wait().unwrap();
    let wanted = [PageToGet { page: 1, generation: 1 }];
    for _ in 0..3 {
        let lost = test.store.renew(of, record().owner, LEASE).unwrap_err();
        assert!(lost.can_retry(), "{lost:?}");
        let deadline = Instant::now() + Duration::from_secs(60);
        let lost = test.store.get(of, &wanted, Urgency::Fault, deadline, &mut |_, _| {}).unwrap_err();
        assert!(lost.can_retry(), "{lost:?}");
    }
    assert_eq!(test.store.room(), 0);
}

#[test]
fn a_server_that_may_evict_keys_is_refused() {
    let Some(server) = Server::start(&["--maxmemory-policy", "allkeys-lru"]) else { return };
    let deadline = Instant::now() + Duration::from_secs(60);
    let refused = loop {
        match RedisPageStore::open(&server.url(), "server", RedisPageStoreOptions::default()) {
            Err(error) if error.can_retry() || format!("{error:?}").contains("NotFound") => {
                assert!(Instant::now() < deadline, "{error:?}");
                thread::sleep(Duration::from_millis(2));
            }
            other => break other.map(drop).unwrap_err(),
        }
    };
    assert!(format!("{refused:?}").contains("noeviction"), "{refused:?}");
    assert!(!refused.can_retry());
}

/// The comparison and the replacement are one step, whoever else puts.
#[test]
fn puts_of_several_users_do_not_mix() {
    let Some(test) = InServer::start() else { return };
    let of = Namespace::new([7; 16]).of(record().vm);
    test.store.create(of.id, &record(), LEASE).unwrap();
    let generations = AtomicU32::new(1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = test.server.open();
                for _ in 0..50 {
                    let generation = generations.fetch_add(1, Ordering::Relaxed);
                    put(&store, of, generation, &[4, 5, 6]).unwrap();
                }
            });
        }
    });
    let newest = generations.into_inner() - 1;
    let wanted = [4, 5, 6].map(|page| PageToGet { page, generation: newest });
    let mut got = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    test.store.get(of, &wanted, Urgency::Prefetch, deadline, &mut |_, _| got += 1).unwrap();
    assert_eq!(got, 3);
}
