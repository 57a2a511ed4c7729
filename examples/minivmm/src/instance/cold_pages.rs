//! Puts cold pages of the VM that is at home here into one of the process's page stores.

use migration_core::{text::describe, working_set::ResidentLimit};
use migration_kvm::swapper::PagingStatus;
use serde_json::{Value, json};

use super::Instance;
use crate::{
    page_stores,
    vmm::{ColdPages, Machine},
};

impl Instance {
    /// Puts cold pages of the VM into the page store named `store` from now on.
    pub(crate) fn keep_cold_pages(&self, store: &str, limit: ResidentLimit) -> Result<(), String> {
        let failed = |why: String| format!("--cold-store {store}: {why}");
        let opened = self.page_stores.for_cold_pages(store, &self.sealing).map_err(|e| failed(describe(e)))?;
        let machine = self.home("--cold-store")?;
        let cold = ColdPages { stores: vec![opened], owner: page_stores::owner(), limit };
        machine.page_out(cold).map_err(|e| failed(e.to_string()))
    }

    pub(super) fn set_resident_limit(&self, limit: ResidentLimit) -> Result<Value, String> {
        let machine = self.home("resident-limit")?;
        machine.set_resident_limit(limit).map_err(|e| format!("resident-limit: {}", describe(e)))?;
        Ok(json!({"limit": limit.to_string()}))
    }
}

/// Returns what `status` reports about cold pages, or null if they go to no page store.
pub(super) fn paging(machine: Option<&Machine>) -> Value {
    let paging = machine.and_then(Machine::paging);
    paging.map_or(Value::Null, |paging| to_json(&paging))
}

fn to_json(paging: &PagingStatus) -> Value {
    let p99 = paging.fetch_latency.quantile(0.99);
    json!({
        "store": paging.stores.join(","), "references": paging.references, "limit": paging.limit.to_string(),
        "resident_bytes": paging.resident_bytes, "cold_bytes": paging.cold_bytes,
        "working_set_bytes": paging.working_set_bytes, "limit_bytes": paging.limit_bytes,
        "evicted_pages": paging.evicted_pages, "fetched_pages": paging.fetched_pages,
        "fetch_p99_us": p99.map(|time| (time.as_secs_f64() * 1e7).round() / 10.0),
        "waiting_pages": paging.waiting_pages, "lost_pages": paging.lost_pages, "problem": paging.problem,
    })
}
