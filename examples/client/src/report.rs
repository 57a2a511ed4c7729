//! Migrations as JSON, and as lines for people.

use std::{path::Path, time::Duration};

use guests::Board;
use migration_core::{
    MigrationError,
    engine::{Gathering, SnapshotReport},
    report::{CheckpointCounts, Outcome, PageCounts, Progress, Report, RoundReport, Rounds, StoreReport},
    text::{Escaped, describe},
};
use serde_json::{Value, json};

/// Returns a time in milliseconds, with three decimals.
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Returns the report of a migration as JSON: the fields that `docs/` name, and more.
pub fn to_json(report: &Report) -> Value {
    let seconds = report.total.as_secs_f64();
    let mbps = if seconds > 0.0 { report.wire_bytes as f64 * 8.0 / 1e6 / seconds } else { 0.0 };
    let mut pages = pages_to_json(&report.pages);
    pages["entry"] = json!(report.pages.entry);
    pages["pushed"] = json!(report.pages.pushed);
    pages["prepaged"] = json!(report.pages.prepaged);
    pages["demanded"] = json!(report.pages.demanded);
    pages["direct"] = json!(report.pages.direct);
    pages["stored"] = json!(report.pages.stored);
    pages["cold"] = json!(report.pages.cold);
    json!({
        "strategy": report.strategy,
        "outcome": report.outcome.as_str(),
        "reason": report.reason,
        "epoch": report.epoch,
        "total_ms": ms(report.total),
        // the source is free when the migration has ended
        "eviction_ms": (report.outcome == Outcome::Completed).then(|| ms(report.total)),
        "setup_ms": ms(report.setup),
        "prepare_ms": ms(report.setup),
        "downtime_ms": report.downtime.map(ms),
        "predicted_downtime_ms": report.predicted_downtime.map(ms),
        "stalled": report.stalled,
        "downtime_limit_ms": ms(report.downtime_limit),
        "forced_switch_over": report.forced_switch_over,
        "rounds": report.rounds.len(),
        "round_details": rounds_to_json(&report.rounds),
        "rounds_left_out": left_out_to_json(&report.rounds),
        "streams": report.streams,
        "wire_bytes": report.wire_bytes,
        "downtime_bytes": report.downtime_bytes,
        "memory_copied_bytes": report.page_bytes,
        "mbps": (mbps * 10.0).round() / 10.0,
        "ram_bytes": report.ram_bytes,
        "state_bytes": report.state_bytes,
        "pages": pages,
        "stores": report.stores.iter().map(store_to_json).collect::<Vec<_>>(),
        "faults": (report.pages.pushed + report.pages.demanded > 0).then(|| json!({
            "count": report.faults.served.count,
            "vcpu": report.faults.served.vcpu,
            "network": report.faults.network,
            "p50_us": report.faults.served.p50_us,
            "p90_us": report.faults.served.p90_us,
            "p99_us": report.faults.served.p99_us,
            "p999_us": report.faults.served.p999_us,
            "max_us": report.faults.served.max_us,
            "duplicates": report.faults.served.duplicates,
        })),
        "demand_lanes": report.demand_lanes,
        "recoveries": report.recoveries,
        "checkpoints": checkpoints_to_json(&report.checkpoints),
        "dirty_pages_per_second": report.dirty_pages_per_second.map(f64::round),
        "throttle_percent": report.throttle_percent,
    })
}

fn store_to_json(store: &StoreReport) -> Value {
    json!({"name": store.name, "pages": store.pages, "bytes": store.bytes, "failed": store.failed})
}

/// Returns the missing pages of a VM, and where they are, as JSON.
pub fn gathering_to_json(gathering: &Gathering) -> Value {
    let Gathering { missing_pages, source, stores, faults } = gathering;
    json!({"missing_pages": missing_pages, "source": source, "stores": stores, "faults": faults})
}

/// Returns the rounds that are kept individually: the first and the last ones.
fn rounds_to_json(rounds: &Rounds) -> Vec<Value> {
    let round = |r: &RoundReport| json!({"pages": r.pages, "wire_bytes": r.wire_bytes, "ms": ms(r.time), "throttle_percent": r.throttle_percent});
    rounds.iter().map(round).collect()
}

/// Returns the sum of the rounds between them, or null if there are none.
fn left_out_to_json(rounds: &Rounds) -> Value {
    let sum = rounds.left_out();
    if sum.count == 0 {
        return Value::Null;
    }
    json!({
        "count": sum.count, "pages": sum.pages, "wire_bytes": sum.wire_bytes, "ms": ms(sum.time),
        "throttle_percent": sum.throttle_percent,
    })
}

/// Returns the page counts that every migration and snapshot has.
fn pages_to_json(pages: &PageCounts) -> Value {
    json!({
        "total": pages.total, "zero": pages.zero, "hole": pages.hole, "free": pages.free, "plain": pages.plain,
        "distinct": pages.distinct,
    })
}

/// Returns the report of a snapshot, whether the snapshot was taken or not.
pub fn snapshot_to_json(result: &Result<SnapshotReport, MigrationError>, out: &Path) -> Value {
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            let outcome = if matches!(error, MigrationError::Cancelled(_)) { "cancelled" } else { "failed" };
            return json!({
                "strategy": "snapshot", "outcome": outcome, "reason": describe(error), "out": out, "total_ms": null,
                "downtime_ms": null, "rounds": null, "ram_bytes": null, "state_bytes": null, "copied_pages": null,
                "pages": null, "throttle_percent": null,
            });
        }
    };
    json!({
        "strategy": "snapshot",
        "outcome": "completed",
        "reason": null,
        "out": out,
        "total_ms": ms(report.total),
        "downtime_ms": ms(report.downtime),
        "rounds": report.rounds.len(),
        "round_details": rounds_to_json(&report.rounds),
        "rounds_left_out": left_out_to_json(&report.rounds),
        "ram_bytes": report.pages.total << migration_core::PAGE_SHIFT,
        "state_bytes": report.state_bytes,
        "copied_pages": report.copied,
        "pages": pages_to_json(&report.pages),
        "throttle_percent": report.throttle_percent,
    })
}

/// Returns the report of a migration that did not begin.
pub fn not_begun(strategy: &str, reason: &str) -> Value {
    json!({
        "strategy": strategy, "outcome": "failed", "reason": reason, "total_ms": null, "eviction_ms": null, "setup_ms": null, "prepare_ms": null,
        "downtime_ms": null, "predicted_downtime_ms": null, "rounds": null, "streams": null, "wire_bytes": null,
        "memory_copied_bytes": null, "ram_bytes": null, "state_bytes": null, "pages": null, "stores": null, "dirty_pages_per_second": null, "throttle_percent": null,
    })
}

/// Returns the accesses of the guest to pages that took long, in microseconds, or null if its
/// workload does not measure them.
pub fn accesses_to_json(board: &Board) -> Value {
    let Some(accesses) = &board.accesses else { return Value::Null };
    let us = |ticks: u64| (board.time(ticks).as_secs_f64() * 1e7).round() / 10.0;
    let permille = |n: u64| accesses.permille(n).map(us);
    json!({
        "above": us(accesses.limit),
        "count": accesses.count(),
        "p50": permille(500),
        "p90": permille(900),
        "p99": permille(990),
        "p999": permille(999),
        "max": (accesses.count() > 0).then(|| us(accesses.longest)),
    })
}

/// Returns the exit status of `migrate` for an outcome, by its name.
pub fn exit_status(outcome: &str) -> u8 {
    match outcome {
        "completed" => 0,
        "cancelled" => 3,
        "in-doubt" => 4,
        "lost" | "ended" => 5,
        "restarted" => 6,
        _ => 1,
    }
}

fn checkpoints_to_json(counts: &CheckpointCounts) -> Value {
    json!({"protected": counts.protected, "count": counts.count, "bytes": counts.bytes})
}

/// Returns the progress of a migration as JSON.
pub fn progress_to_json(p: &Progress, checkpoints: &CheckpointCounts) -> Value {
    json!({
        "phase": format!("{:?}", p.phase).to_lowercase(),
        "round": p.round,
        "round_pages": p.round_pages,
        "round_sent": p.round_sent,
        "remaining_pages": p.round_pages.saturating_sub(p.round_sent),
        "pages_per_second": p.pages_per_second.round(),
        "wire_bytes": p.wire_bytes,
        "mbps": (p.bytes_per_second * 8.0 / 1e6).round(),
        "dirty_pages_per_second": p.dirty_pages_per_second.map(f64::round),
        "expected_downtime_ms": p.expected_downtime.map(ms),
        "least_downtime_ms": p.least_downtime.map(ms),
        "throttle_percent": p.throttle_percent,
        "elapsed_ms": ms(p.elapsed),
        "eta_ms": p.eta.map(ms),
        "round_eta_ms": p.round_eta.map(ms),
        "share_done": (p.share_done * 1e4).round() / 1e4,
        "downtime_limit_ms": ms(p.downtime_limit),
        "checkpoints": checkpoints_to_json(checkpoints),
    })
}

/// Returns a report as aligned lines.
pub fn to_lines(report: &Value) -> String {
    let text = |v: &Value| match v {
        Value::Null => "-".to_owned(),
        Value::String(s) => Escaped(s).to_string(),
        other => Escaped(&other.to_string()).to_string(),
    };
    let mut rows = Vec::new();
    let mut line = |name: &str, value: String| rows.push((name.to_owned(), value));
    for (key, unit) in [
        ("strategy", ""),
        ("outcome", ""),
        ("reason", ""),
        ("total_ms", " ms"),
        ("eviction_ms", " ms"),
        ("setup_ms", " ms"),
        ("downtime_ms", " ms"),
        ("predicted_downtime_ms", " ms"),
        ("stalled", ""),
        ("downtime_limit_ms", " ms"),
        ("rounds", ""),
        ("streams", ""),
        ("wire_bytes", ""),
        ("ram_bytes", ""),
        ("state_bytes", ""),
        ("mbps", " Mbit/s"),
        ("dirty_pages_per_second", ""),
        ("throttle_percent", " %"),
    ] {
        match &report[key] {
            Value::Null => {}
            value => line(&key.trim_end_matches("_ms").replace('_', " "), format!("{}{unit}", text(value))),
        }
    }
    if let Some(pages) = report["pages"].as_object() {
        let pages: Vec<String> = pages.iter().map(|(k, v)| format!("{} {}", Escaped(k), text(v))).collect();
        line("pages", pages.join(", "));
    }
    for store in report["stores"].as_array().into_iter().flatten() {
        let failed = store["failed"].as_str().map(|why| format!(", failed: {}", Escaped(why))).unwrap_or_default();
        line(&format!("store {}", text(&store["name"])), format!("{} pages{failed}", text(&store["pages"])));
    }
    aligned(&rows)
}

/// Returns names and values in two columns, with at least two spaces between them.
pub fn aligned(rows: &[(String, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 2;
    rows.iter().map(|(name, value)| format!("{name:<width$}{value}\n")).collect()
}
