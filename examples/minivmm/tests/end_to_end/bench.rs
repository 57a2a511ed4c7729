//! The measurements themselves: that they run, and that their figures are of what they say. Not
//! what the figures are.

use std::{fs, process::Command};

use serde_json::Value;

use crate::common::{Lab, Outcome, Suite, ensure, usage};

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("bench/hand_over", hand_over);
    suite.kvm("bench/slots", slots);
    suite.kvm("bench/scale", scale);
    let missing = ["valkey-server", "redis-server"].iter().all(|program| !is_installed(program));
    let why = missing.then(|| "neither valkey-server nor redis-server is installed".to_owned());
    suite.unless(why, |suite| suite.kvm("bench/stores", stores));
    suite.kvm("eval/hand_over", timelines);
    suite.kvm("eval/encryption", encryption);
}

/// Small guests, a few times each, and the parts whose course is their own.
fn hand_over(lab: &Lab) -> Outcome {
    let page = lab.path("page.md");
    fs::write(&page, "# Title\n<!-- handover:begin -->\n<!-- handover:end -->\nend\n")?;
    let args = ["bench", "--handover", "--quick", "--unit", "64M", "--json", "--markdown", &lab.arg("page.md")];
    let parts = ["--part", "sizes", "--part", "at-once", "--part", "recovery"];
    let (code, out, err) = usage(&[&args[..], &parts].concat())?;
    ensure(code == Some(0), || format!("{code:?}: {err}"))?;
    let figures: Value = serde_json::from_str(&out)?;
    let series = figures["series"].as_array().ok_or("no series")?;
    ensure(series.len() == 3, || out.clone())?;
    for series in series {
        let own = series["hand_overs"].as_array().ok_or("no hand-overs")?;
        ensure(own.len() == 8 && !series["stays"].as_array().is_none_or(Vec::is_empty), || format!("{series}"))?;
        for one in own {
            let (gap, downtime) = (one["gap_ms"].as_f64(), one["downtime_ms"].as_f64());
            // the guest sees more of it than the source: the way there and back
            ensure(gap > Some(0.0) && downtime > Some(0.0) && one["memory_copied_bytes"] == 0, || format!("{one}"))?;
        }
    }
    let recoveries = figures["recoveries"].as_array().ok_or("no recoveries")?;
    let warmed =
        |wanted| recoveries.iter().filter(|r| r["warmed"] == wanted && r["before"].as_f64() > Some(0.0)).count();
    ensure((warmed(true), warmed(false)) == (2, 2), || format!("{}", figures["recoveries"]))?;
    ensure(figures["failures"].as_array().is_some_and(Vec::is_empty), || format!("{}", figures["failures"]))?;
    let page = fs::read_to_string(page)?;
    ensure(page.contains("| 4 at once, sleep, 64 MiB |") && page.ends_with("-->\nend\n"), || page.clone())
}

/// Sizes that take KVM no time, in as many slots as large ones have.
fn slots(lab: &Lab) -> Outcome {
    let page = lab.path("page.md");
    fs::write(&page, "<!-- slots:begin -->\n<!-- slots:end -->\nend\n")?;
    let args = ["bench", "--slots", "--long-calls", "--unit", "64K", "--json", "--markdown", &lab.arg("page.md")];
    let (code, out, err) = usage(&args)?;
    ensure(code == Some(0), || format!("{code:?}: {err}"))?;
    let figures: Value = serde_json::from_str(&out)?;
    let rows = figures["rows"].as_array().ok_or("no rows")?;
    let slots: Vec<_> = rows.iter().filter_map(|row| row["slots"].as_u64()).collect();
    ensure(slots == [1, 1, 1, 1, 1, 4, 1, 16, 1, 128], || out.clone())?;
    let plausible = |row: &Value| row["longest_ms"].as_f64() > Some(0.0) && row["sum_ms"].as_f64() > Some(0.0);
    ensure(rows.iter().all(plausible), || out.clone())?;
    let page = fs::read_to_string(page)?;
    ensure(page.contains("| 16384 KiB |") && page.ends_with("-->\nend\n"), || page.clone())
}

/// Small guests: that each figure is there, and that no RAM counts as memory beyond it.
fn scale(lab: &Lab) -> Outcome {
    let page = lab.path("page.md");
    fs::write(&page, "<!-- scale:begin -->\n<!-- scale:end -->\nend\n")?;
    let args = ["bench", "--scale", "--quick", "--unit", "64M", "--json", "--markdown", &lab.arg("page.md")];
    let (code, out, err) = usage(&args)?;
    ensure(code == Some(0), || format!("{code:?}: {err}"))?;
    let figures: Value = serde_json::from_str(&out)?;
    let runs = figures["runs"].as_array().ok_or("no runs")?;
    ensure(runs.len() == 16, || out.clone())?;
    for run in runs {
        let positive =
            ["setup_ms", "prepare_ms", "downtime_ms", "total_ms"].iter().all(|key| run[key].as_f64() > Some(0.0));
        ensure(positive, || format!("{run}"))?;
    }
    let watched: Vec<_> = runs.iter().filter_map(|run| run["beyond"].as_array()).flatten().collect();
    ensure(
        watched.len() == 16 && watched.iter().all(|b| (1 << 18..64 << 20).contains(&b.as_u64().unwrap_or(0))),
        || format!("{watched:?}"),
    )?;
    ensure(figures["harvests"].as_array().is_some_and(|all| all.len() == 8), || out.clone())?;
    let page = fs::read_to_string(page)?;
    ensure(page.contains("| 4 GiB, manual-protect |") && page.ends_with("-->\nend\n"), || page.clone())
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Few pages: that all figures are there. Whether they are within their targets depends on the host.
fn stores(lab: &Lab) -> Outcome {
    let page = lab.path("page.md");
    fs::write(&page, "<!-- stores:begin -->\n<!-- stores:end -->\nend\n")?;
    let args = ["bench", "--stores", "--quick", "--unit", "4M", "--json", "--markdown", &lab.arg("page.md")];
    let (code, out, err) = usage(&args)?;
    ensure(code == Some(0), || format!("{code:?}: {err}"))?;
    let figures: Value = serde_json::from_str(&out)?;
    ensure(figures["pages"] == 1024, || out.clone())?;
    let rates = &figures["server"]["rates"];
    let positive = |value: &Value| value.as_f64() > Some(0.0);
    ensure(positive(&rates["put_pages_per_s"]) && positive(&rates["gather_pages_per_s"]), || out.clone())?;
    let faults = figures["server"]["faults"].as_array().ok_or("no faults")?;
    ensure(faults.len() == 7 && faults.iter().all(|beside| positive(&beside["p99_us"])), || out.clone())?;
    ensure(faults.last().is_some_and(|beside| beside["gather_pages_per_s"] == 0.0), || out.clone())?;
    let files = figures["files"].as_array().ok_or("no files")?;
    ensure(files.len() == 4 && files.iter().all(|row| positive(&row["store_mb_per_s"])), || out.clone())?;
    ensure(figures["targets"].as_array().is_some_and(|all| all.len() == 7), || out.clone())?;
    let page = fs::read_to_string(page)?;
    ensure(page.contains("| pages put (pages/s) |") && page.ends_with("-->\nend\n"), || page.clone())
}

fn timelines(lab: &Lab) -> Outcome {
    let (json, out) = (lab.arg("figures.json"), lab.arg("plots"));
    let (code, text, err) = usage(&["eval", "handover", "--memory", "64M", "--json", &json, "--out", &out])?;
    ensure(code == Some(0), || format!("{code:?}: {err}"))?;
    ensure(text.contains("refresh") && text.contains("pre-copy"), || text.clone())?;
    let figures: Value = serde_json::from_str(&fs::read_to_string(json)?)?;
    for timeline in figures["timelines"].as_array().ok_or("no timelines")? {
        let points = timeline["points"].as_array().map_or(0, Vec::len);
        ensure(points > 100 && timeline["report"]["outcome"] == "completed", || {
            format!("{points} points: {timeline}")
        })?;
    }
    ensure(fs::read_to_string(lab.path("plots").join("handover-speed.svg"))?.contains("</svg>"), || "no plot".into())
}

/// Two migrations of a small guest: what is written of them agrees.
fn encryption(lab: &Lab) -> Outcome {
    let (json, csv, html) = (lab.arg("figures.json"), lab.arg("runs.csv"), lab.arg("page.html"));
    let page = lab.path("page.md");
    fs::write(&page, "# Title\n<!-- eval:begin -->\n<!-- eval:end -->\nend\n")?;
    let markdown = lab.arg("page.md");
    let files = ["--json", &json, "--csv", &csv, "--html", &html, "--markdown", &markdown];
    let only = ["none", "aes256-gcm", "post-copy", "writer-256", "unlimited"].map(|word| ["--only", word]).concat();
    let (code, text, err) = usage(&[&["eval", "encryption", "--quick", "--unit", "64K"], &only[..], &files].concat())?;
    ensure(code == Some(0) && err.contains("2 migrations"), || format!("{code:?}: {err}"))?;
    ensure(text.contains("writer-256 · post-copy · aes256-gcm"), || text.clone())?;
    let figures: Value = serde_json::from_str(&fs::read_to_string(json)?)?;
    let runs = figures["runs"].as_array().ok_or("no runs")?;
    ensure(runs.len() == 2 && figures["failures"].as_array().is_some_and(Vec::is_empty), || format!("{figures}"))?;
    let (csv, html) = (fs::read_to_string(csv)?, fs::read_to_string(html)?);
    let mut lines = csv.lines();
    let columns: Vec<&str> = lines.next().ok_or("no columns")?.split(',').collect();
    for (run, line) in runs.iter().zip(lines.by_ref()) {
        // the machine's name, which may hold commas, comes after these
        for (column, cell) in columns.iter().zip(line.split(',')).take(5) {
            ensure(run[column] == cell, || format!("{column}: {line}: {run}"))?;
        }
        let total = columns.iter().position(|column| *column == "total_ms").and_then(|n| line.split(',').nth(n));
        ensure(total.and_then(|cell| cell.parse().ok()) == run["total_ms"].as_f64(), || format!("{line}: {run}"))?;
        ensure(run["outcome"] == "completed" && run["wire_bytes"].as_f64() > Some(15e6), || format!("{run}"))?;
        let cipher = run["cipher"].as_str().ok_or("no cipher")?;
        ensure(html.contains(&format!("<td>writer-256 · post-copy · {cipher}</td>")), || {
            format!("{cipher}: {html}")
        })?;
    }
    ensure(lines.next().is_none() && html.contains("<svg") && html.ends_with("</html>\n"), || csv.clone())?;
    let page = fs::read_to_string(page)?;
    ensure(page.contains("| writer-256 · post-copy · none |") && page.ends_with("-->\nend\n"), || page.clone())
}
