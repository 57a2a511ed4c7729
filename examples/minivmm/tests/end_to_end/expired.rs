//! What crashed owners have left in a page store.

use std::time::Duration;

use migration_core::{
    store::{Namespace, Owner, PageStore, Purpose, Record},
    vm::VmId,
};
use migration_transport::{FilePageStore, FilePageStoreOptions};
use serde_json::{Value, json};

use crate::common::{Lab, Outcome, Suite, ensure, usage};

pub(crate) fn add(suite: &mut Suite) {
    suite.anywhere("store/expired", expired);
}

fn expired(lab: &Lab) -> Outcome {
    let store = FilePageStore::open(&lab.path("pages"), "rack-7", FilePageStoreOptions::default())?;
    let record = Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7")? };
    let [left, kept] = [1, 2].map(|number| Namespace::new([number; 16]).id());
    // it has ended before another process asks
    store.create(left, &record, Duration::from_micros(1))?;
    store.create(kept, &record, Duration::from_secs(3600))?;
    let url = format!("rack-7=file:{}", lab.arg("pages"));
    for (option, removed) in [("--list-expired", false), ("--remove-expired", true)] {
        let (code, out, err) = usage(&["store", option, &url, "--json"])?;
        ensure(code == Some(0), || format!("{code:?}: {err}"))?;
        let one = json!({
            "id": left.to_string(),
            "vm": record.vm.to_string(),
            "purpose": "home",
            "owner": "host-7",
            "removed": removed,
        });
        let answer: Value = serde_json::from_str(&out)?;
        ensure(answer == json!({"store": "rack-7", "expired": [one]}), || out)?;
    }
    let (code, out, err) = usage(&["store", "--list-expired", &url])?;
    ensure(code == Some(0) && out == "nothing has expired\n", || format!("{code:?}: {out}{err}"))?;
    ensure(store.record(left)?.is_none() && store.record(kept)? == Some(record), || "another one is gone".into())?;
    // neither a store that is not there, nor a wrong command line
    let (code, _, err) = usage(&["store", "--list-expired", "rack-7=file:/proc/none"])?;
    ensure(code == Some(1) && err.contains("rack-7"), || format!("{code:?}: {err}"))?;
    for wrong in [
        &["store"][..],
        &["store", "--list-expired", "rack-7"],
        &["store", "--list-expired", &url, "--remove-expired", &url],
    ] {
        let (code, ..) = usage(wrong)?;
        ensure(code == Some(2), || format!("{wrong:?}: {code:?}"))?;
    }
    Ok(())
}
