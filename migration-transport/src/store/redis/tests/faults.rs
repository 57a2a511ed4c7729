//! Servers that are gone, silent, full, read-only, or that refuse.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{fail::Fail, *};
use crate::TlsFiles;

#[test]
fn a_server_that_was_started_anew_has_another_incarnation_and_is_found_again() {
    let Some(mut server) = Server::start(&[]) else { return };
    let store = open(&server.url(), &small());
    let of = namespace(7);
    let before = store.create(of.id, &record(), LEASE).unwrap();
    put(&store, of, 1, &[1]).unwrap();
    server.start_again();
    let deadline = soon();
    let lost = loop {
        match put(&store, of, 2, &[1]) {
            Err(error) if error.can_retry() => assert!(Instant::now() < deadline, "{error:?}"),
            other => break other.unwrap_err(),
        }
        thread::sleep(Duration::from_millis(2));
    };
    assert!(matches!(lost, StoreError::Absent(_)), "{lost:?}");
    assert!(matches!(store.renew(of, record().owner, LEASE), Err(StoreError::Absent(_))));
    assert!(matches!(get(&store, of, 1, &[1]), Err(StoreError::Absent(_))));
    assert_ne!(store.create(of.id, &record(), LEASE).unwrap(), before);
    // data that comes back from a disk does not hide the start
    assert_ne!(incarnation(&[5; 16], [1; 16]), incarnation(&[5; 16], [2; 16]));
}

#[test]
fn connections_that_were_closed_while_they_were_idle_are_replaced() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    put(&test.store, of, 1, &[1, 2]).unwrap();
    get(&test.store, of, 1, &[1, 2]).unwrap();
    for round in 2..5 {
        // all of them, that of the question too
        let _ = test.store.ask::<()>(0, redis::cmd("CLIENT").arg("KILL").arg("SKIPME").arg("no"));
        put(&test.store, of, round, &[1, 2]).unwrap();
        assert_eq!(get(&test.store, of, round, &[1, 2]).unwrap(), [1, 2]);
    }
}

#[test]
fn a_server_that_is_gone_can_be_asked_again() {
    let Some(mut server) = Server::start(&[]) else { return };
    let store = open(&server.url(), &small());
    let of = create(&store, 7);
    server.kill();
    let wanted = [PageToGet { page: 1, generation: 1 }];
    for _ in 0..3 {
        let lost = store.renew(of, record().owner, LEASE).unwrap_err();
        assert!(lost.can_retry(), "{lost:?}");
        let lost = store.get(of, &wanted, Urgency::Fault, soon(), &mut |_, _| {}).unwrap_err();
        assert!(lost.can_retry(), "{lost:?}");
    }
    assert_eq!(store.room(), 0);
    let health = store.health();
    assert!(matches!(&health[..], [RedisHealth { memory: Err(error), .. }] if error.can_retry()), "{health:?}");
}

#[test]
fn a_silent_server_costs_the_deadline_and_no_more() {
    let Some(server) = Server::start(&[]) else { return };
    let store = open(&server.url(), &small());
    let of = create(&store, 7);
    put(&store, of, 1, &[1]).unwrap();
    get(&store, of, 1, &[1]).unwrap();
    let pid = Pid::from_raw(server.pid);
    kill(pid, Signal::SIGSTOP).unwrap();
    for urgency in [Urgency::Fault, Urgency::Prefetch] {
        let wanted = [PageToGet { page: 1, generation: 1 }];
        let deadline = Instant::now() + Duration::from_millis(20);
        let result =
            store.get(of, &wanted, urgency, deadline, &mut |_, _| panic!("a page of a server that is stopped"));
        assert!(matches!(&result, Err(error @ StoreError::TimedOut) if error.can_retry()), "{result:?}");
    }
    // the time-out of the store is that of calls without a deadline
    let impatient = RedisPageStoreOptions { timeout: Duration::from_millis(20), ..small() };
    let error = RedisPageStore::open(&server.url(), "server", impatient).map(drop).unwrap_err();
    assert!(error.can_retry(), "{error:?}");
    kill(pid, Signal::SIGCONT).unwrap();
    assert_eq!(get(&store, of, 1, &[1]).unwrap(), [1]);
}

/// The crate `redis` waits without limit for a server on a Unix socket to accept.
#[test]
fn a_server_that_accepts_nobody_costs_the_deadline_and_no_more() {
    let Some(server) = Server::start(&["--tcp-backlog", "1"]) else { return };
    let store = open(&server.url(), &small());
    let of = create(&store, 7);
    put(&store, of, 1, &[1]).unwrap();
    let pid = Pid::from_raw(server.pid);
    kill(pid, Signal::SIGSTOP).unwrap();
    let queued = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&SockAddr::unix(server.file("socket")).unwrap()).ok()?;
        Some(socket)
    };
    let queue: Vec<_> = iter::from_fn(queued).collect();
    let wanted = [PageToGet { page: 1, generation: 1 }];
    let fault = |deadline| store.get(of, &wanted, Urgency::Fault, deadline, &mut |_, _| {});
    let result = fault(Instant::now() + Duration::from_millis(20));
    assert!(matches!(result, Err(StoreError::TimedOut)), "{result:?}");
    // one attempt to connect is under way, and there is no other
    let result = fault(soon());
    assert!(matches!(&result, Err(error) if error.can_retry()), "{result:?}");
    kill(pid, Signal::SIGCONT).unwrap();
    drop(queue);
    let deadline = soon();
    while let Err(error) = fault(deadline) {
        assert!(error.can_retry() && Instant::now() < deadline, "{error:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn calls_that_a_signal_interrupts_are_made_again() {
    let Some(test) = InServer::on_unix() else { return };
    let interrupted = |times: u32| {
        let mut calls = 0;
        test.store.servers.with(test.store.target(0), 0, |connection| {
            calls += 1;
            match calls <= times {
                true => Err(Fail::asking(ErrorKind::Interrupted.into())),
                false => connection.ask::<String>(&redis::cmd("PING"), wait()),
            }
        })
    };
    assert_eq!(interrupted(3).unwrap(), "PONG");
    let error = interrupted(u32::MAX).unwrap_err();
    assert!(error.can_retry(), "{error:?}");
}

#[test]
fn a_server_that_does_not_keep_pages_is_refused() {
    for (args, why) in [
        (["--maxmemory-policy", "allkeys-lru"], "noeviction"),
        (["--replicaof", "127.0.0.1 1"], "replica"),
        (["--cluster-enabled", "yes"], "redis-cluster"),
    ] {
        let Some(server) = Server::start(&args) else { return };
        let deadline = soon();
        let refused = loop {
            match RedisPageStore::open(&server.url(), "server", RedisPageStoreOptions::default()) {
                Err(error) if error.can_retry() => assert!(Instant::now() < deadline, "{error:?}"),
                other => break other.map(drop).unwrap_err(),
            }
            thread::sleep(Duration::from_millis(2));
        };
        assert!(format!("{refused:?}").contains(why), "{refused:?}");
    }
}

#[test]
fn a_server_that_becomes_a_replica_takes_no_puts() {
    let Some(test) = InServer::on_unix() else { return };
    let of = create(&test.store, 1);
    put(&test.store, of, 1, &[1]).unwrap();
    test.ask::<()>(0, redis::cmd("REPLICAOF").arg("127.0.0.1").arg("1"));
    for result in [put(&test.store, of, 2, &[1]).map(drop), test.store.renew(of, record().owner, LEASE).map(drop)] {
        let error = result.unwrap_err();
        let is_read_only =
            matches!(&error, StoreError::Io { cause, .. } if cause.kind() == ErrorKind::ReadOnlyFilesystem);
        assert!(is_read_only && !error.can_retry(), "{error:?}");
    }
    test.ask::<()>(0, redis::cmd("REPLICAOF").arg("NO").arg("ONE"));
    assert_eq!(get(&test.store, of, 1, &[1]).unwrap(), [1]);
    put(&test.store, of, 2, &[1]).unwrap();
}

#[test]
fn a_server_without_memory_takes_a_put_whole_or_not_at_all() {
    let Some(server) = Server::start(&["--maxmemory", "16mb"]) else { return };
    let options = RedisPageStoreOptions { limit: None, ..small() };
    let store = open(&server.url(), &options);
    let of = create(&store, 1);
    let memory = |store: &RedisPageStore| store.health()[0].memory.as_ref().map(|memory| *memory).unwrap();
    assert_eq!(memory(&store).most_bytes, 16 << 20);
    let run = |first: u64| (first..first + 64).collect::<Vec<_>>();
    let full = (0..64).map(|at| run(at * 64)).find_map(|pages| Some((put(&store, of, 1, &pages).err()?, pages)));
    let (error, refused) = full.expect("16 MiB do not take 4096 pages");
    assert!(matches!(error, StoreError::NoRoom { needed, .. } if needed > 64 * PAGE_SIZE as u64), "{error:?}");
    assert!(!error.can_retry());
    assert_eq!(get(&store, of, 1, &refused).unwrap(), [0; 0]);
    assert_eq!(get(&store, of, 1, &run(0)).unwrap(), run(0));
    store.forget(of).unwrap();
    let of = create(&store, 2);
    put(&store, of, 1, &run(0)).unwrap();
    assert!(store.room() > 4 << 20, "{} bytes of room", store.room());
}

#[test]
fn a_password_is_asked_for_and_never_shown() {
    let Some(server) = Server::start(&["--requirepass", "open-sesame"]) else { return };
    let with = |password: Option<&str>| RedisUrl { password: password.map(str::to_owned), ..server.url() };
    let store = open(&with(Some("open-sesame")), &small());
    let of = create(&store, 1);
    put(&store, of, 1, &[1]).unwrap();
    assert!(!format!("{store:?}").contains("open-sesame"), "{store:?}");
    for password in [None, Some("close-sesame")] {
        let refused = RedisPageStore::open(&with(password), "server", small()).map(drop).unwrap_err();
        let is_refusal =
            matches!(&refused, StoreError::Io { cause, .. } if cause.kind() == ErrorKind::PermissionDenied);
        assert!(is_refusal && !refused.can_retry(), "{refused:?}");
        assert!(!format!("{refused:?}").contains("sesame"), "{refused:?}");
    }
    let user = RedisUrl { user: Some("default".into()), database: 3, ..with(Some("open-sesame")) };
    assert_eq!(open(&user, &small()).record(of.id).unwrap(), None, "another database");
}

#[test]
fn tls_proves_both_sides() {
    let (Some(server), Some(other)) = (Server::start_with_tls(), Server::start_with_tls()) else { return };
    let files = server.url().tls.unwrap();
    let url = |tls| RedisUrl { tls: Some(tls), ..server.url() };
    let store = open(&url(files.clone()), &small());
    create(&store, 1);
    let strange = other.url().tls.unwrap();
    let wrong = [
        // an authority that did not issue the server's certificate
        TlsFiles { ca: strange.ca.clone(), ..files.clone() },
        // a client that shows nothing, and one that shows what another authority has issued
        TlsFiles { identity: None, ..files.clone() },
        TlsFiles { identity: strange.identity.clone(), ..files.clone() },
    ];
    for tls in wrong {
        let refused = RedisPageStore::open(&url(tls.clone()), "server", small()).map(drop);
        assert!(refused.is_err(), "{tls:?}");
    }
    for name in ["none", "log"] {
        let broken = TlsFiles { ca: Some(server.file(name)), identity: None };
        let refused = RedisPageStore::open(&url(broken), "server", small()).map(drop).unwrap_err();
        assert!(!refused.can_retry() && format!("{refused:?}").contains(name), "{refused:?}");
    }
    // a server that speaks no TLS, and a client that speaks none
    let refused = RedisPageStore::open(&RedisUrl { tls: None, ..server.url() }, "server", small()).map(drop);
    assert!(refused.is_err());
}
