//! The figures as tables, Markdown and JSON.

use std::{fmt::Write, fs, path::Path};

use minivmm_client::whole_file;
use serde_json::{Value, json};

use super::{
    figures::{Figure, Figures, Machine, NOISE, belongs, median, name},
    measure::{Run, Vmm},
    postcopy,
};

/// The name of the section of the Markdown file, which its first and last line contain.
const SECTION: &str = "bench";

/// A table and its title.
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) head: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    /// Returns the table with aligned columns, the first to the left, the others to the right.
    pub(crate) fn text(&self) -> String {
        let head: Vec<String> = self.head.iter().map(|h| (*h).to_owned()).collect();
        let all = || std::iter::once(&head).chain(&self.rows);
        let width = |n: usize| all().filter_map(|r| r.get(n)).map(|c| c.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let mut text = format!("{}\n", self.title);
        for row in all() {
            let mut line = String::new();
            for (n, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = if n == 0 { write!(line, "  {cell:<width$}") } else { write!(line, "  {cell:>width$}") };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Returns the table in Markdown.
    pub(crate) fn markdown(&self) -> String {
        let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
        let mut text = format!("### {}\n\n", self.title);
        text += &line(self.head.clone());
        text += &line((0..self.head.len()).map(|n| if n == 0 { "---" } else { "---:" }).collect());
        for row in &self.rows {
            text += &line(row.iter().map(String::as_str).collect());
        }
        text
    }
}

pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if v.abs() < 100.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.0}"),
    }
}

pub(crate) fn times(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{v:.2}×"))
}

/// Formats the median of several runs, with the smallest and the largest value.
pub(crate) fn spread(values: &[f64]) -> String {
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, m), v| (l.min(*v), m.max(*v)));
    match values.len() {
        0 => "-".into(),
        1 => number(median(values.iter().copied())),
        _ => format!("{} ({}–{})", number(median(values.iter().copied())), number(Some(least)), number(Some(most))),
    }
}

/// Returns all tables for which there are figures.
fn tables(figures: &Figures) -> Vec<Table> {
    let mut all = Vec::new();
    let runs = |keep: &dyn Fn(&&Run) -> bool| figures.runs.iter().filter(keep).cloned().collect::<Vec<Run>>();
    let comparisons = figures.comparisons();
    for (mode, title) in [
        ("plain-careful", "1 stream against QEMU's plain pre-copy, both set up with care (median (least–most), ms)"),
        ("multifd-careful", "4 streams against QEMU's multifd, both set up with care (median (least–most), ms)"),
        ("plain", "1 stream against QEMU's plain pre-copy, both as they come (median (least–most), ms)"),
        ("multifd", "4 streams against QEMU's multifd with 4 channels, both as they come (median (least–most), ms)"),
        (postcopy::PLAIN, "Post-copy, 2 streams, against QEMU's plain post-copy (median (least–most), ms)"),
        (postcopy::PREEMPT, "The same runs against QEMU's post-copy with preemption (median (least–most), ms)"),
        (postcopy::CAREFUL, "After one pass of pre-copy, against QEMU's with preemption (median (least–most), ms)"),
    ] {
        let mut rows = Vec::new();
        for c in comparisons.iter().filter(|c| c.mode == mode) {
            let of = |vmm| {
                let own = |r: &&Run| belongs(r, mode) && r.setup.workload == c.workload && r.setup.vmm == vmm;
                spread(&runs(&own).iter().filter_map(|r| c.figure.of(r)).collect::<Vec<_>>())
            };
            let verdict = match c.good {
                Some(true) => "met",
                Some(false) => "missed",
                None => "",
            };
            rows.push(vec![
                format!("{} · {}", c.workload, c.figure.name()),
                of(Vmm::Minivmm),
                of(Vmm::Qemu),
                times(c.ratio),
                c.target.map_or(String::new(), |t| format!("≤ {t:.1}×")),
                verdict.into(),
            ]);
        }
        let head = vec!["guest · figure", "minivmm", "QEMU", "ratio", "target", ""];
        all.push(Table { title: title.into(), head, rows });
    }
    all.extend(beside(figures));
    all.retain(|table| !table.rows.is_empty());
    all
}

/// Returns the tables that compare nothing.
fn beside(figures: &Figures) -> Vec<Table> {
    let mut all = Vec::new();
    let floor = |streams| figures.floors.iter().filter(|f| f.streams == streams).collect::<Vec<_>>();
    let rows = [1, 2, 4].map(floor).into_iter().filter(|f| !f.is_empty()).map(|f| {
        let ms: Vec<f64> = f.iter().map(|f| f.ms).collect();
        let rate = median(ms.iter().copied()).map(|ms| f[0].mib as f64 * 1.048_576 / ms);
        vec![f[0].streams.to_string(), spread(&ms), rate.map_or("-".into(), |r| format!("{r:.2}"))]
    });
    all.push(Table {
        title: "Floor: a bare copy of 700 MiB over TCP into fresh warm huge pages".into(),
        head: vec!["streams", "ms", "GB/s"],
        rows: rows.collect(),
    });

    let mut rows: Vec<Vec<String>> = Vec::new();
    for control in &figures.controls {
        let key = match control.streams {
            0 => format!("{} · beside nothing", control.workload),
            1 => format!("{} · beside a copy, 1 stream", control.workload),
            n => format!("{} · beside a copy, {n} streams", control.workload),
        };
        if !rows.iter().any(|r| r[0] == key) {
            let same = |c: &&super::figures::Control| c.workload == control.workload && c.streams == control.streams;
            rows.push(vec![key, spread(&figures.controls.iter().filter(same).map(|c| c.gap_ms).collect::<Vec<_>>())]);
        }
    }
    all.push(Table {
        title: "Control: the longest gap of a guest that stays where it is".into(),
        head: vec!["guest", "gap, ms"],
        rows,
    });

    let mut rows = Vec::new();
    for impact in ["low", "balanced", "fast"] {
        let of = |figure: &dyn Fn(&Run) -> f64| {
            let wanted = |r: &&Run| r.setup.label == "impact" && r.setup.impact == impact;
            figures.runs.iter().filter(wanted).map(figure).collect::<Vec<f64>>()
        };
        if of(&|r| r.total_ms).is_empty() {
            continue;
        }
        let kept = median(of(&|r| 100.0 * r.operations_during / r.operations_before.max(1.0)));
        rows.push(vec![
            impact.to_owned(),
            spread(&of(&|r| r.total_ms)),
            spread(&of(&|r| r.gap_ms)),
            number(median(of(&|r| r.operations_before / 1e6))),
            number(median(of(&|r| r.operations_during / 1e6))),
            kept.map_or("-".into(), |k| format!("{k:.0} %")),
        ]);
    }
    all.push(Table {
        title: "What --guest-impact trades: 64 MiB written all the time, 2 streams".into(),
        head: vec!["impact", "total, ms", "gap, ms", "Mop/s before", "during", "kept"],
        rows,
    });

    let limits = figures.limits().into_iter().map(|l| {
        let limit = l.limit.map_or(String::new(), |m| format!("≤ {m:.0}"));
        let verdict = match (l.limit, l.good) {
            (None, _) => "",
            (_, true) => "met",
            (_, false) => "missed",
        };
        vec![l.what, number(Some(l.value)), limit, verdict.into()]
    });
    all.push(Table {
        title: "Peak memory beyond guest RAM, 4 streams".into(),
        head: vec!["process", "MiB", "limit", ""],
        rows: limits.collect(),
    });

    let sizes = figures.sizes();
    let rows = sizes.iter().map(|(gib, ms)| {
        vec![gib.to_string(), (gib * 700).to_string(), number(Some(*ms)), number(Some(ms / *gib as f64))]
    });
    let growth = figures.growth().map_or(String::new(), |g| {
        let verdict = if g <= 1.0 + NOISE { "met" } else { "missed" };
        format!(": a GiB of the largest takes {g:.2}× that of the smallest, target ≤ {:.1}×, {verdict}", 1.0 + NOISE)
    });
    all.push(Table {
        title: format!("minivmm, idle guests with data in proportion, 4 streams{growth}"),
        head: vec!["GiB", "data, MiB", "total, ms", "ms a GiB"],
        rows: rows.collect(),
    });
    all
}

/// Describes the machine in one line.
pub(crate) fn machine(m: &Machine) -> String {
    let qemu = m.qemu.as_ref().map_or(String::new(), |q| format!(", QEMU {q}"));
    let build = if m.optimised { "" } else { " (not optimised: use a release build)" };
    format!(
        "{}: {} ({} CPUs), {}, Linux {}, minivmm {}{build}{qemu}",
        m.date, m.cpu, m.cpus, m.memory, m.kernel, m.minivmm
    )
}

/// Returns the figures as aligned tables.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = format!("{}\n", machine(&figures.machine));
    for table in tables(figures) {
        text += &format!("\n{}", table.text());
    }
    for failure in &figures.failures {
        text += &format!("\nfailed and run again: {failure}\n");
    }
    text
}

/// Returns the figures and all single values as JSON.
pub(super) fn json(figures: &Figures) -> Value {
    json!({
        "machine": figures.machine,
        "comparisons": figures.comparisons(),
        "limits": figures.limits(),
        "growth": figures.growth(),
        "within_targets": figures.within_targets(),
        "floors": figures.floors,
        "controls": figures.controls,
        "runs": figures.runs,
        "failures": figures.failures,
    })
}

/// Returns the section of the Markdown file.
fn markdown(figures: &Figures) -> String {
    let mut text = String::from("_Written by `minivmm bench --markdown`; do not edit by hand._\n\n");
    text += &format!("{}.\n", machine(&figures.machine));
    for table in tables(figures) {
        text += &format!("\n{}", table.markdown());
    }
    for failure in &figures.failures {
        text += &format!("\nFailed and run again: {}\n", failure.replace('\n', " "));
    }
    text += "\n### Every run\n\n";
    text += "Times in ms, in the order of the runs; CPU is that of both processes, with the part of the vCPU threads; huge pages in MiB.\n\n";
    // a column of its own, if any run measured the speed
    let speeds = figures.runs.iter().any(|r| r.speed.is_some());
    text += "| kind | VMM | guest | GiB | streams | impact | total | own | gap | own downtime | gap before | CPU | vCPU | Mop/s before | during | huge, source | destination |";
    text += if speeds { " until 90 % | speed after, % |\n" } else { "\n" };
    text += "|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|";
    text += if speeds { "---:|---:|\n" } else { "\n" };
    for run in &figures.runs {
        let s = &run.setup;
        let speed = match &run.speed {
            Some(s) => {
                let until = s.until_fast_ms.map_or(format!("> {:.0}", s.watched_ms), |ms| number(Some(ms)));
                [until, format!("{:.0}", 100.0 * s.rate_after / s.rate_before.max(1.0))]
            }
            None => ["-".into(), "-".into()],
        };
        let cells = [
            s.label.clone(),
            name(s.vmm).into(),
            s.workload.clone(),
            (s.memory >> 30).to_string(),
            s.streams.to_string(),
            if s.vmm == Vmm::Minivmm { s.impact.into() } else { "-".into() },
            number(Some(run.total_ms)),
            number(Figure::OwnTotal.of(run)),
            number(Some(run.gap_ms)),
            number(Figure::OwnDowntime.of(run)),
            number(Some(run.gap_before_ms)),
            number(Some(run.cpu_s * 1e3)),
            number(Some(run.cpu_vcpu_s * 1e3)),
            number(Some(run.operations_before / 1e6)),
            number(Some(run.operations_during / 1e6)),
            (run.huge_source >> 20).to_string(),
            (run.huge_destination >> 20).to_string(),
        ];
        let cells = cells.into_iter().chain(speed.into_iter().filter(|_| speeds));
        text += &format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    }
    text
}

/// Returns the text before and after a section, including its first and last line.
fn frame<'a>(path: &Path, text: &'a str, section: &str) -> Result<(&'a str, &'a str), String> {
    let (begin, end) = (format!("<!-- {section}:begin -->"), format!("<!-- {section}:end -->"));
    let parts = || {
        let first = text.find(&begin)? + begin.len();
        Some((&text[..first], &text[first + text[first..].find(&end)?..]))
    };
    parts()
        .ok_or_else(|| format!("{}: needs the lines {begin} and {end}, between which the figures go", path.display()))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Checks that a section can be written into a file. Called before the measurement, which takes
/// minutes.
pub(crate) fn check_section(path: &Path, section: &str) -> Result<(), String> {
    frame(path, &read(path)?, section)?;
    fs::OpenOptions::new().append(true).open(path).map(drop).map_err(|e| format!("{}: {e}", path.display()))
}

/// Replaces a section of a Markdown file.
pub(crate) fn write_section(path: &Path, section: &str, text: &str) -> Result<(), String> {
    let whole = read(path)?;
    let (before, after) = frame(path, &whole, section)?;
    write_file(path, format!("{before}\n{}\n{after}", text.trim_end()))
}

/// Checks that the bench can write its figures into a file.
pub(super) fn check_markdown(path: &Path) -> Result<(), String> {
    check_section(path, SECTION)
}

/// Writes the figures into a Markdown file.
pub(super) fn write_markdown(path: &Path, figures: &Figures) -> Result<(), String> {
    write_section(path, SECTION, &markdown(figures))
}

/// Writes a file atomically.
pub(crate) fn write_file(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), String> {
    whole_file::write(path, bytes).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = vec![vec!["a".into(), "1.5".into()], vec!["long name".into(), "≤ 12".into()]];
        let table = Table { title: "T".into(), head: vec!["x", "y"], rows };
        assert_eq!(table.text(), "T\n  x             y\n  a           1.5\n  long name  ≤ 12\n");
        assert!(table.markdown().contains("| x | y |\n| --- | ---: |\n| a | 1.5 |\n"));
    }

    #[test]
    fn the_section_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.md");
        fs::write(&path, "no markers").unwrap();
        assert!(check_markdown(&path).is_err());
        fs::write(&path, "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n").unwrap();
        check_markdown(&path).unwrap();
        for _ in 0..2 {
            write_markdown(&path, &Figures::new(None)).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("before\n<!--") && text.ends_with("-->\nafter\n") && !text.contains("old"));
        assert_eq!(text.matches("<!-- bench:begin -->").count(), 1);
    }

    #[test]
    fn spreads() {
        assert_eq!(spread(&[]), "-");
        assert_eq!(spread(&[2.0]), "2.0");
        assert_eq!(spread(&[1.0, 200.0, 3.0]), "3.0 (1.0–200)");
    }
}
