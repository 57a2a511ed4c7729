//! The figures as tables and Markdown.

use super::{
    Part,
    figures::Figures,
    plan::{HISTORY_ORDERS, INTERVALS, ORDERS, PROTECTED, WORKLOADS},
    run::Run,
};
use crate::bench::{
    figures::median,
    output::{Table, machine, spread, times},
};

/// A figure of a run, if the run has it.
type Of = fn(&Run) -> Option<f64>;

/// The latencies of a fault, by the guest's clock and in the report.
const LATENCIES: [(&str, Of, Of); 5] = [
    ("p50", |r| r.access("p50"), |r| r.number("/faults/p50_us")),
    ("p90", |r| r.access("p90"), |r| r.number("/faults/p90_us")),
    ("p99", |r| r.access("p99"), |r| r.number("/faults/p99_us")),
    ("p999", |r| r.access("p999"), |r| r.number("/faults/p999_us")),
    ("max", |r| r.access("max"), |r| r.number("/faults/max_us")),
];

fn network(run: &Run) -> Option<f64> {
    run.number("/faults/network")
}

/// Formats a number with two decimals, or with three digits.
fn exact(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// Returns the table of the faults of a part's orders, each compared with the first order.
fn faults(figures: &Figures, part: Part, orders: &[&'static str], title: &str) -> Table {
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        for order in orders {
            let of = |figure: Of| spread(&figures.values(part, workload.name, order, figure));
            let ratio = median(figures.ratios(part, workload.name, [order, orders[0]], network));
            rows.push(vec![
                format!("{} · {order}", workload.name),
                of(network),
                of(|r| r.number("/faults/count")),
                of(Run::left_behind),
                of(Run::share),
                times(ratio),
            ]);
        }
    }
    rows.retain(|row| row[1] != "-");
    let head = vec!["workload · order", "network faults", "all faults", "pages left behind", "network, %", "of linear"];
    Table { title: title.into(), head, rows }
}

/// Returns all tables for which there are figures.
fn tables(figures: &Figures) -> Vec<Table> {
    let mut all = vec![
        targets(figures),
        faults(
            figures,
            Part::Faults,
            &ORDERS,
            "Network faults by push order: post-copy, 1 Gbit/s (median (least–most))",
        ),
        faults(
            figures,
            Part::Hybrid,
            &HISTORY_ORDERS,
            "The same after one round of pre-copy, which is the history of hot-first: hybrid, 1 Gbit/s (median (least–most))",
        ),
        storm(figures),
        latency(figures),
        fail_safe(figures),
        balloon(figures),
    ];
    all.retain(|table| !table.rows.is_empty());
    all
}

/// Returns the targets, and whether each is met.
fn targets(figures: &Figures) -> Table {
    let verdicts = figures.verdicts().into_iter().map(|v| {
        let met = if v.met { "met" } else { "missed" };
        let (value, limit) = (exact(v.value), exact(v.limit));
        vec![v.what.into(), format!("{value} {}", v.unit), format!("≤ {limit} {}", v.unit), v.beside.into(), met.into()]
    });
    Table {
        title: "Targets (medians)".into(),
        head: vec!["figure", "measured", "target", "paper", ""],
        rows: verdicts.collect(),
    }
}

/// Formats the median of a figure over the repetitions of a run, with the smallest and the largest
/// value.
fn spread_of(figures: &Figures, part: Part, guest: &str, kind: &str, figure: Of) -> String {
    spread(&figures.values(part, guest, kind, figure))
}

/// Returns the times of faults when four vCPUs need the same pages.
fn storm(figures: &Figures) -> Table {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, guest, report) in LATENCIES {
        let of = |kind, figure| spread_of(figures, Part::Storm, "storm", kind, figure);
        rows.push(vec![name.into(), of("migrates", guest), of("migrates", report), of("stays", guest)]);
    }
    let gap: Of = |r| Some(r.gap_ms * 1e3);
    let of = |kind| spread_of(figures, Part::Storm, "storm", kind, gap);
    rows.push(vec!["longest gap".into(), of("migrates"), "-".into(), of("stays")]);
    rows.retain(|row| row[1] != "-");
    Table {
        title: "Storm: four vCPUs that need the same pages, 1 Gbit/s (µs, median (least–most))".into(),
        head: vec!["", "guest's clock", "report", "guest that stays"],
        rows,
    }
}

/// Returns the time of a fault beside a push and beside none.
fn latency(figures: &Figures) -> Table {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, guest, report) in LATENCIES {
        let of = |kind, figure| spread_of(figures, Part::Latency, "random", kind, figure);
        rows.push(vec![name.into(), of("push", guest), of("idle", guest), of("push", report), of("idle", report)]);
    }
    rows.retain(|row| row[1] != "-");
    Table {
        title: "A fault's latency beside a push at full rate, and beside none: 4 KiB pages, no limit (µs, median (least–most))"
            .into(),
        head: vec!["", "guest's clock, push", "idle", "report, push", "idle"],
        rows,
    }
}

/// Returns the cost of reverse checkpoints, by their interval.
fn fail_safe(figures: &Figures) -> Table {
    let mut rows = Vec::new();
    for (guest, _) in PROTECTED {
        for interval in INTERVALS {
            let of = |figure: Of| spread_of(figures, Part::FailSafe, guest, interval, figure);
            let total: Of = |r| r.number("/total_ms");
            rows.push(vec![
                format!("{guest} · {interval}"),
                of(|r| r.number("/checkpoints/count")),
                of(|r| Some(r.number("/checkpoints/bytes")? / 1e6)),
                of(total),
                times(median(figures.ratios(Part::FailSafe, guest, [interval, INTERVALS[0]], total))),
                of(|r| r.number("/downtime_ms")),
                of(|r| Some(r.gap_ms)),
                of(|r| r.kept),
            ]);
        }
    }
    rows.retain(|row| row[3] != "-");
    Table {
        title: "Fail-safe: reverse checkpoints in memory, by interval, 1 Gbit/s (median (least–most))".into(),
        head: vec![
            "guest · interval",
            "checkpoints",
            "MB in them",
            "total, ms",
            "of none",
            "downtime, ms",
            "longest gap, ms",
            "guest's speed meanwhile, %",
        ],
        rows,
    }
}

/// Returns the savings of a balloon.
fn balloon(figures: &Figures) -> Table {
    let mut rows = Vec::new();
    for strategy in ["pre-copy", "post-copy"] {
        for balloon in ["off", "on"] {
            let of = |figure: Of| spread_of(figures, Part::Balloon, strategy, balloon, figure);
            let bytes = |r: &Run| r.number("/wire_bytes");
            rows.push(vec![
                format!("{strategy} · balloon {balloon}"),
                of(|r| Some(r.number("/wire_bytes")? / 1e6)),
                times(median(figures.ratios(Part::Balloon, strategy, [balloon, "off"], bytes))),
                of(|r| r.number("/pages/free")),
                of(|r| r.number("/total_ms")),
                of(|r| r.number("/downtime_ms")),
            ]);
        }
    }
    rows.retain(|row| row[1] != "-");
    Table {
        title: "Self-ballooning: churn over 512 MiB of which a quarter is in use, 1 Gbit/s (median (least–most))"
            .into(),
        head: vec!["strategy · guest", "MB moved", "of balloon off", "free pages", "total, ms", "downtime, ms"],
        rows,
    }
}

/// Describes the machine, its load, and the runs.
fn head(figures: &Figures) -> String {
    let (least, most) = figures.loads();
    let repeats = figures.runs.iter().map(|r| r.step.repeat + 1).max().unwrap_or(0);
    format!(
        "{}. Load before a run {least:.2}–{most:.2}; runs of each kind: {repeats}; seed {}",
        machine(&figures.machine),
        figures.seed
    )
}

/// Returns the figures as aligned tables.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = format!("{}\n", head(figures));
    for table in tables(figures) {
        text += &format!("\n{}", table.text());
    }
    for failure in &figures.failures {
        text += &format!("\nfailed and run again: {failure}\n");
    }
    text
}

/// Returns the section of the Markdown file. `images` are titles and files.
pub(super) fn markdown(figures: &Figures, images: &[(&str, String)]) -> String {
    let mut text = String::from("_Written by `minivmm eval post-copy --markdown`; do not edit by hand._\n\n");
    text += &format!("{}.\n", head(figures));
    for table in tables(figures) {
        text += &format!("\n{}", table.markdown());
    }
    for (title, file) in images {
        text += &format!("\n![{title}]({file})\n");
    }
    for failure in &figures.failures {
        text += &format!("\nFailed and run again: {}\n", failure.replace('\n', " "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::figures::test_util, *};

    #[test]
    fn every_part_has_its_table() {
        let figures = test_util::figures(2, |step| if step.kind == "linear" { 100 } else { 25 });
        let text = text(&figures);
        let lines = ["quicksort · multi-pivot", "random · hot-first", "longest gap", "post-copy · balloon on"];
        for line in lines {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        let multi_pivot = text.lines().find(|l| l.contains("quicksort · multi-pivot")).unwrap();
        assert!(multi_pivot.ends_with("0.25×"), "{multi_pivot}");
        assert_eq!(tables(&figures).len(), 7);
        let page = markdown(&figures, &[("A plot", "plots/a.svg".into())]);
        assert!(page.contains("![A plot](plots/a.svg)"));
    }

    #[test]
    fn what_was_not_measured_has_none() {
        let mut figures = test_util::figures(1, |_| 10);
        figures.runs.retain(|r| r.step.part == Part::Storm);
        assert_eq!(tables(&figures).len(), 2, "the targets and the storm");
    }
}
