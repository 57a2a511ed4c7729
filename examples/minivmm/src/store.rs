//! `minivmm store`: handles namespaces in a page store whose owners have crashed or could not reach
//! the store.

use clap::Args;
use migration_core::{
    store::{NamespaceId, PageStore, Record, StoreError, VmNamespace},
    text::describe,
};
use migration_transport::NamedStore;
use minivmm_client::{ctl::fail, log};
use serde_json::{Value, json};

/// List or remove the namespaces of a page store whose lease has ended. Nothing else removes them:
/// their owners have crashed, or could not reach the store.
#[derive(Debug, Args)]
pub struct Store {
    /// List them with their owners. URL is memory:, file:DIR, redis://HOST:PORT/DB, rediss://…,
    /// redis+unix:PATH or redis-cluster://HOST:PORT,…
    #[arg(
        long,
        value_name = "NAME=URL",
        required_unless_present = "remove_expired",
        conflicts_with = "remove_expired"
    )]
    list_expired: Option<NamedStore>,
    /// Remove them with all of their pages. First make sure that no VM needs them: a host that could
    /// not reach the store for long has not renewed its lease.
    #[arg(long, value_name = "NAME=URL")]
    remove_expired: Option<NamedStore>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command. Returns the exit status, 1 if something was not removed.
pub(crate) fn run(args: &Store) -> u8 {
    let (named, remove) = match (&args.list_expired, &args.remove_expired) {
        (Some(named), _) => (named, false),
        (None, Some(named)) => (named, true),
        (None, None) => return fail(args.json, "--list-expired or --remove-expired is missing"),
    };
    let found = match named.open().and_then(|store| expired(&*store, remove)) {
        Ok(found) => found,
        Err(error) => return fail(args.json, &format!("page store {}: {}", named.name, describe(error))),
    };
    if args.json {
        out!("{}", as_json(&named.name, &found));
    } else {
        log::print(&lines(&found));
    }
    u8::from(remove && found.iter().any(|one| !one.removed))
}

/// A namespace whose lease has ended.
struct Expired {
    id: NamespaceId,
    record: Record,
    removed: bool,
}

/// Returns the namespaces whose lease has ended, and removes each if `remove` is set. A namespace
/// that the store refuses to remove stays, and is returned as not removed. An error that a retry
/// can resolve ends the command.
fn expired(store: &dyn PageStore, remove: bool) -> Result<Vec<Expired>, StoreError> {
    let one = |(id, record): (NamespaceId, Record)| {
        let removed = match remove.then(|| store.forget(VmNamespace { id, vm: record.vm })) {
            Some(Err(error)) if error.can_retry() => return Err(error),
            Some(Err(error)) => {
                log!("namespace {id}: {}", describe(error));
                false
            }
            Some(Ok(())) => true,
            None => false,
        };
        Ok(Expired { id, record, removed })
    };
    store.expired()?.into_iter().map(one).collect()
}

fn as_json(name: &str, found: &[Expired]) -> Value {
    let one = |Expired { id, record, removed }: &Expired| {
        json!({
            "id": id.to_string(),
            "vm": record.vm.to_string(),
            "purpose": record.purpose.to_string(),
            "owner": record.owner.as_str(),
            "removed": removed,
        })
    };
    json!({"store": name, "expired": found.iter().map(one).collect::<Vec<_>>()})
}

fn lines(found: &[Expired]) -> String {
    if found.is_empty() {
        return "nothing has expired\n".into();
    }
    let one = |Expired { id, record, removed }: &Expired| {
        let removed = if *removed { ", removed" } else { "" };
        format!("{id}  VM {}, {}, of {}{removed}\n", record.vm, record.purpose, record.owner)
    };
    found.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use migration_core::{
        store::{ManualClock, MemoryPageStore, Namespace, Owner, Purpose},
        vm::VmId,
    };

    use super::*;

    #[test]
    fn what_has_expired_is_listed_and_removed_and_nothing_else() {
        let clock = Arc::new(ManualClock::default());
        let store = MemoryPageStore::with_clock("rack-7", 1 << 20, clock.clone());
        let record = Record {
            vm: VmId([1; 16]),
            purpose: Purpose::Attempt,
            owner: Owner::new("host-7").expect("the text is printable"),
        };
        let [gone, kept] = [1, 2].map(|number| Namespace::new([number; 16]).id());
        store.create(gone, &record, Duration::from_secs(60)).expect("it is created");
        store.create(kept, &record, Duration::from_secs(600)).expect("it is created");
        assert_eq!(lines(&expired(&store, true).expect("the store lists")), "nothing has expired\n");
        clock.advance(Duration::from_secs(100));

        let found = expired(&store, false).expect("the store lists");
        assert_eq!(lines(&found), format!("{gone}  VM {}, attempt, of host-7\n", record.vm));
        let removed = as_json("rack-7", &expired(&store, true).expect("the store removes"));
        let expected = json!({
            "id": gone.to_string(),
            "vm": record.vm.to_string(),
            "purpose": "attempt",
            "owner": "host-7",
            "removed": true,
        });
        assert_eq!(removed, json!({"store": "rack-7", "expired": [expected]}));
        assert_eq!(store.record(gone).expect("the store answers"), None);
        assert_eq!(store.record(kept).expect("the store answers"), Some(record));
        assert!(expired(&store, false).expect("the store lists").is_empty());
    }
}
