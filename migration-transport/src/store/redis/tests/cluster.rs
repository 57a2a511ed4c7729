//! A cluster of three masters: where namespaces lie, and what happens if one moves or dies.

use super::{
    servers::{MASTERS, cluster},
    *,
};

/// Returns a namespace of which the server of this number has the part.
fn on_master(store: &RedisPageStore, url: &RedisUrl) -> VmNamespace {
    let addresses: Vec<_> = url.servers.iter().map(ToString::to_string).collect();
    let part = |of: VmNamespace| store.servers.part_of(of.id);
    let server = |of: VmNamespace| {
        let target = store.target(part(of));
        store.servers.address_of(target.part)
    };
    (0..=255).map(namespace).find(|of| addresses.contains(&server(*of))).unwrap()
}

#[test]
fn namespaces_are_spread_over_all_masters() {
    let Some(test) = InServer::in_cluster() else { return };
    let health = test.store.health();
    assert_eq!(health.len(), MASTERS);
    assert!(health.iter().all(|server| server.memory.is_ok()), "{health:?}");
    let spaces: Vec<_> = (0..18).map(|number| create(&test.store, number)).collect();
    for of in &spaces {
        put(&test.store, *of, 1, &[1, 2, 3, 4, 50]).unwrap();
    }
    for of in &spaces {
        assert_eq!(get(&test.store, *of, 1, &[1, 2, 3, 4, 50]).unwrap(), [1, 2, 3, 4, 50]);
    }
    let mut servers: Vec<_> =
        spaces.iter().map(|of| test.store.servers.address_of(test.store.servers.part_of(of.id))).collect();
    servers.sort();
    servers.dedup();
    assert_eq!(servers.len(), MASTERS);
}

#[test]
fn calls_follow_a_namespace_that_has_moved_and_others_go_on_when_a_master_dies() {
    let Some(mut masters) = Cluster::start() else { return };
    let options = RedisPageStoreOptions { prefix: "moves".into(), ..small() };
    let store = open(&masters.url(), &options);
    let url = |at: usize| masters.0[at].url();
    let (first, second) = (on_master(&store, &url(0)), on_master(&store, &url(1)));
    let before = store.create(first.id, &record(), LEASE).unwrap();
    store.create(second.id, &record(), LEASE).unwrap();
    put(&store, first, 1, &[1]).unwrap();
    put(&store, second, 1, &[1]).unwrap();

    // the slot of the first one's part goes to the third master, with nothing in it
    let keys = &store.servers.parts()[store.servers.part_of(first.id)];
    let target: String = masters.0[2].ask(&cluster("MYID"));
    masters.0[0].ask::<()>(&redis::cmd("FLUSHALL"));
    for server in [2, 0, 1] {
        masters.0[server].ask::<()>(cluster("SETSLOT").arg(keys.slot()).arg("NODE").arg(&target));
    }
    let lost = put(&store, first, 2, &[1]).unwrap_err();
    assert!(matches!(lost, StoreError::Absent(_)), "{lost:?}");
    let after = store.create(first.id, &record(), LEASE).unwrap();
    assert_ne!(after, before, "to have moved counts as a loss");
    put(&store, first, 3, &[1]).unwrap();
    assert_eq!(get(&store, first, 3, &[1]).unwrap(), [1]);

    masters.0[1].kill();
    let lost = put(&store, second, 2, &[1]).unwrap_err();
    assert!(lost.can_retry(), "{lost:?}");
    let lost = get(&store, second, 1, &[1]).unwrap_err();
    assert!(lost.can_retry(), "{lost:?}");
    assert_eq!(get(&store, first, 3, &[1]).unwrap(), [1]);
    put(&store, first, 4, &[1]).unwrap();
    let health = store.health();
    assert_eq!(health.iter().filter(|server| server.memory.is_err()).count(), 1, "{health:?}");
}

#[test]
fn a_server_that_is_alone_is_no_cluster() {
    let Some(server) = Server::start(&[]) else { return };
    server.ask::<()>(&redis::cmd("PING"));
    let url = RedisUrl { cluster: true, ..server.url() };
    let refused = RedisPageStore::open(&url, "server", small()).map(drop).unwrap_err();
    assert!(!refused.can_retry() && format!("{refused:?}").contains("cluster"), "{refused:?}");
}
