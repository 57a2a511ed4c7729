//! The figures of hand-overs as tables, Markdown and JSON.

use serde_json::{Value, json};

use super::{
    chain::{HandOver, Recovery, WINDOWS},
    figures::{Figures, Means, PAPERS, Series, Spread},
};
use crate::bench::{
    figures::median,
    output::{Table, machine, number, spread},
};

/// Formats milliseconds. Small values get two decimal places, because they are close to their
/// targets.
fn ms(value: Option<f64>) -> String {
    match value {
        Some(v) if v.abs() < 10.0 => format!("{v:.2}"),
        other => number(other),
    }
}

pub(super) fn three(spread: Option<Spread>) -> [String; 3] {
    [spread.map(|s| s.p50), spread.map(|s| s.p99), spread.map(|s| s.max)].map(ms)
}

/// Formats the smallest and the largest value of a number, or the value that all have.
fn same(values: &[u64]) -> String {
    match (values.iter().min(), values.iter().max()) {
        (Some(least), Some(most)) if least < most => format!("{least}–{most}"),
        (Some(all), _) => all.to_string(),
        _ => "-".into(),
    }
}

fn exact(series: &Series, of: impl Fn(&HandOver) -> u64) -> String {
    same(&series.hand_overs.iter().map(of).collect::<Vec<_>>())
}

fn tables(figures: &Figures) -> Vec<Table> {
    let verdicts = figures.verdicts().into_iter().map(|v| {
        let value = if v.unit == "ms" { ms(Some(v.value)) } else { number(Some(v.value)) };
        let met = if v.met { "met" } else { "missed" };
        vec![v.what, format!("{value} {}", v.unit), format!("≤ {:.0} {}", v.limit, v.unit), met.into()]
    });
    let mut all = vec![Table {
        title: "Targets".into(),
        head: vec!["guest's longest gap", "here", "target", ""],
        rows: verdicts.collect(),
    }];
    let gaps = figures.series.iter().map(|s| {
        let [p50, p99, max] = three(s.spread(|h| h.gap_ms));
        let [stay, _, stay_max] = three(s.stay());
        let [down, down_99, down_max] = three(s.spread(|h| h.downtime_ms));
        let count = s.hand_overs.len().to_string();
        vec![s.guests.name(), count, p50, p99, max, stay, stay_max, down, down_99, down_max]
    });
    all.push(Table {
        title:
            "The guest's longest gap in a hand-over, by its own clock, and the downtime as the source reports it (ms)"
                .into(),
        head: vec![
            "guest",
            "hand-overs",
            "gap, p50",
            "p99",
            "max",
            "stays where it is, p50",
            "max",
            "downtime, p50",
            "p99",
            "max",
        ],
        rows: gaps.collect(),
    });
    let prepared = figures.series.iter().map(|s| {
        let [p50, _, max] = three(s.spread(|h| h.prepare_ms));
        let [total, _, total_max] = three(s.spread(|h| h.total_ms));
        let (state, copied) = (exact(s, |h| h.state_bytes), exact(s, |h| h.memory_copied_bytes));
        vec![s.guests.name(), p50, max, total, total_max, state, copied]
    });
    all.push(Table {
        title: "What the successor prepares while the guest runs, and what moves".into(),
        head: vec![
            "guest",
            "prepare, ms, p50",
            "max",
            "total, client, p50",
            "max",
            "state, bytes",
            "memory copied, bytes",
        ],
        rows: prepared.collect(),
    });
    all.push(beside(figures));
    all.push(recovery(&figures.recoveries));
    all.retain(|table| !table.rows.is_empty());
    all
}

/// Returns the table of the other ways to move the VM.
fn beside(figures: &Figures) -> Table {
    let mut rows = Vec::new();
    if !figures.others.is_empty()
        && let Some(series) = figures.compared()
    {
        let of = |of: &dyn Fn(&HandOver) -> f64| spread(&series.values(of));
        let name = format!("hand-over ({})", series.guests.name());
        rows.push(vec![name, of(&|h| h.gap_ms), of(&|h| h.downtime_ms), of(&|h| h.total_ms)]);
    }
    for means in [Means::PreCopy, Means::QemuCpr] {
        let of = |of: &dyn Fn(&super::figures::Other) -> Option<f64>| {
            spread(&figures.others.iter().filter(|o| o.means == means).filter_map(of).collect::<Vec<_>>())
        };
        if figures.others.iter().any(|o| o.means == means) {
            let (gap, downtime) = (of(&|o| Some(o.gap_ms)), of(&|o| o.downtime_ms));
            rows.push(vec![means.name().into(), gap, downtime, of(&|o| Some(o.total_ms))]);
        }
    }
    if !rows.is_empty() {
        for (name, figure) in PAPERS {
            rows.push(vec![name.into(), "-".into(), number(Some(figure)), "-".into()]);
        }
    }
    Table {
        title: "The same VM by other means, in the same run (ms, median (least–most))".into(),
        head: vec!["", "guest's longest gap", "downtime, own figure", "total, client"],
        rows,
    }
}

fn recovery(recoveries: &[Recovery]) -> Table {
    let mut rows = Vec::new();
    let mut kinds: Vec<_> = recoveries.iter().map(|r| (&r.guest, r.warmed)).collect();
    kinds.sort_by_key(|&(guest, warmed)| (guest, !warmed));
    kinds.dedup();
    for (guest, warmed) in kinds {
        let own: Vec<_> = recoveries.iter().filter(|r| (&r.guest, r.warmed) == (guest, warmed)).collect();
        let tables = if warmed { "filled beforehand" } else { "not filled" };
        let mut row = vec![guest.clone(), tables.into(), own.len().to_string()];
        for n in 0..WINDOWS.len() {
            row.push(spread(&own.iter().map(|r| r.kept[n]).collect::<Vec<_>>()));
        }
        // a guest that did not become fast in the time of the measurement has no value
        row.push(spread(&own.iter().filter_map(|r| r.until_fast_ms).collect::<Vec<_>>()));
        row.push(number(median(own.iter().map(|r| r.before / 1e6))));
        rows.push(row);
    }
    Table {
        title: "The guest's speed right after a hand-over, hot over half of its RAM (% of that before, median (least–most))".into(),
        head: vec![
            "guest",
            "page tables",
            "hand-overs",
            "first 10 ms",
            "first 100 ms",
            "first second",
            "until 90 %, ms",
            "Mop/s before",
        ],
        rows,
    }
}

/// Returns the figures as aligned tables.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = format!("{}\n", machine(&figures.machine));
    for table in tables(figures) {
        text += &format!("\n{}", table.text());
    }
    for note in &figures.notes {
        text += &format!("\n{note}\n");
    }
    for failure in &figures.failures {
        text += &format!("\nfailed and run again: {failure}\n");
    }
    text
}

/// Returns the section of the Markdown file.
pub(super) fn markdown(figures: &Figures) -> String {
    let mut text = String::from("_Written by `minivmm bench --handover --markdown`; do not edit by hand._\n\n");
    text += &format!("{}.\n", machine(&figures.machine));
    for table in tables(figures) {
        text += &format!("\n{}", table.markdown());
    }
    for note in &figures.notes {
        text += &format!("\n{}\n", note.replace('\n', " "));
    }
    for failure in &figures.failures {
        text += &format!("\nFailed and run again: {}\n", failure.replace('\n', " "));
    }
    text
}

/// Returns the figures and all single values as JSON.
pub(super) fn json(figures: &Figures) -> Value {
    let summary = |s: &Series| {
        json!({
            "guests": s.guests.name(), "hand_overs": s.hand_overs.len(), "gap_ms": s.spread(|h| h.gap_ms),
            "stay_gap_ms": s.stay(), "downtime_ms": s.spread(|h| h.downtime_ms), "prepare_ms": s.spread(|h| h.prepare_ms),
            "total_ms": s.spread(|h| h.total_ms),
        })
    };
    let papers: Vec<_> = PAPERS.iter().map(|(name, figure)| json!({"paper": name, "downtime_ms": figure})).collect();
    json!({
        "machine": figures.machine,
        "summary": figures.series.iter().map(summary).collect::<Vec<_>>(),
        "verdicts": figures.verdicts(),
        "within_targets": figures.within_targets(),
        "papers": papers,
        "series": figures.series,
        "others": figures.others,
        "recoveries": figures.recoveries,
        "notes": figures.notes,
        "failures": figures.failures,
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            figures::{Other, test_util},
            plan::Guests,
        },
        *,
    };
    use crate::bench::figures::Machine;

    fn figures() -> Figures {
        let mut figures = Figures::new(Machine::here(None));
        figures.series.push(test_util::series(Guests::idle(1 << 30, 1), &[0.8, 0.7, 12.0]));
        figures.series.push(test_util::series(Guests::sleeping(1 << 30, 4), &[1.5, 1.6, 1.7, 9.0]));
        figures.others.push(Other { means: Means::PreCopy, gap_ms: 21.0, total_ms: 300.0, downtime_ms: Some(5.0) });
        let hand_over = test_util::hand_over(0, 0.9);
        for (warmed, kept) in [(true, [90.0, 95.0, 99.0]), (false, [10.0, 11.0, 15.0])] {
            figures.recoveries.push(Recovery {
                guest: "hot, 1 GiB".into(),
                warmed,
                before: 40e6,
                kept,
                until_fast_ms: None,
                hand_over: hand_over.clone(),
            });
        }
        figures.notes.push("QEMU's cpr-transfer: not measured: it is not installed".into());
        figures
    }

    #[test]
    fn everything_has_its_line() {
        let figures = figures();
        let text = text(&figures);
        for line in
            ["idle, 1 GiB: gap, p99", "4 at once, sleep, 1 GiB", "our pre-copy", "not filled", "80.0", "not measured"]
        {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        let missed = text.lines().find(|l| l.contains("idle, 1 GiB: gap, p99")).unwrap();
        assert!(missed.contains("12.0 ms") && missed.ends_with("missed"), "{missed}");
        assert_eq!(tables(&figures).len(), 5);
        assert_eq!(markdown(&figures).matches("### ").count(), 5);
        let json = json(&figures);
        assert_eq!(json["within_targets"], false);
        assert_eq!(json["series"][1]["hand_overs"].as_array().map(Vec::len), Some(4));
        assert_eq!(
            (&json["summary"][0]["gap_ms"]["max"], &json["others"][0]["means"]),
            (&json!(12.0), &json!("pre-copy"))
        );
    }

    #[test]
    fn what_was_not_measured_has_no_table() {
        assert!(tables(&Figures::new(Machine::here(None))).is_empty());
    }

    #[test]
    fn exact_numbers() {
        assert_eq!([same(&[]), same(&[0, 0]), same(&[3, 1, 2])], ["-", "0", "1–3"]);
    }
}
