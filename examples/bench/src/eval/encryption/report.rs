//! Medians of the measurements, as tables, Markdown and CSV, and compared with the paper.

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    plan::{self, Cell, Core, Kind, Names, Net, cipher_name},
    run::{LIMIT, Means, Outcome, Run},
};
use crate::bench::{
    encrypt::Cipher,
    figures::{Machine, median},
    output::{Table, machine, number},
};

/// All measurements.
pub(super) struct Figures {
    pub(super) machine: Machine,
    pub(super) seed: u32,
    pub(super) runs: Vec<Run>,
    /// The errors of failed attempts. Each attempt was repeated once.
    pub(super) failures: Vec<String>,
    /// The parts that this machine cannot measure, with the reasons.
    pub(super) left_out: Vec<String>,
    pub(super) took_s: f64,
    estimate_s: f64,
    shaped: bool,
    caged: bool,
    unit: u64,
}

/// The medians of each figure of a kind, over the runs that completed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Medians {
    #[serde(skip)]
    pub(super) cell: Cell,
    #[serde(flatten)]
    pub(super) names: Names,
    pub(super) runs: usize,
    pub(super) ended: usize,
    pub(super) total_ms: Option<f64>,
    pub(super) downtime_ms: Option<f64>,
    pub(super) gap_ms: Option<f64>,
    pub(super) kept_percent: Option<f64>,
    pub(super) wire_bytes: Option<f64>,
    pub(super) cpu_source_s: Option<f64>,
    pub(super) cpu_destination_s: Option<f64>,
}

/// A finding of the paper, and our measurement.
pub(super) struct Finding {
    pub(super) what: &'static str,
    /// The finding of Hu et al. 2015, copied from the paper.
    pub(super) paper: &'static str,
    pub(super) ours: String,
}

const COLUMNS: [&str; 25] = [
    "cipher",
    "strategy",
    "workload",
    "link",
    "core",
    "repeat",
    "outcome",
    "total_ms",
    "downtime_ms",
    "predicted_downtime_ms",
    "gap_ms",
    "before_per_s",
    "during_per_s",
    "kept_percent",
    "wire_bytes",
    "cpu_source_s",
    "cpu_destination_s",
    "cpu_vcpu_s",
    "load",
    "seed",
    "date",
    "cpu",
    "cpus",
    "kernel",
    "minivmm",
];

/// Quotes a cell of a CSV file.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

impl Figures {
    pub(super) fn new(machine: Machine, seed: u32, means: &Means, estimate_s: f64, left_out: Vec<String>) -> Self {
        Self {
            machine,
            seed,
            runs: Vec::new(),
            failures: Vec::new(),
            left_out,
            took_s: 0.0,
            estimate_s: estimate_s.round(),
            shaped: means.shaped,
            caged: means.caged,
            unit: means.unit,
        }
    }

    /// Returns the medians of each kind, in the order of the plan.
    pub(super) fn medians(&self) -> Vec<Medians> {
        let mut all = Vec::new();
        for cell in plan::cells(false) {
            let runs: Vec<&Run> = self.runs.iter().filter(|r| r.cell == cell).collect();
            if runs.is_empty() {
                continue;
            }
            let ended = || runs.iter().filter(|r| r.outcome == Outcome::Completed);
            let of = |figure: fn(&Run) -> Option<f64>| median(ended().filter_map(|r| figure(r)));
            all.push(Medians {
                cell,
                names: cell.names(),
                runs: runs.len(),
                ended: ended().count(),
                total_ms: of(|r| r.total_ms),
                downtime_ms: of(|r| r.downtime_ms),
                gap_ms: of(|r| r.gap_ms),
                kept_percent: of(|r| r.kept_percent),
                wire_bytes: of(|r| r.wire_bytes),
                cpu_source_s: of(|r| r.cpu_source_s),
                cpu_destination_s: of(|r| r.cpu_destination_s),
            });
        }
        all
    }

    /// Returns the links and cores that were measured.
    pub(super) fn places(&self) -> Vec<(Net, Core)> {
        let all = Core::ALL.into_iter().flat_map(|core| Net::ALL.map(|net| (net, core)));
        all.filter(|&(net, core)| self.runs.iter().any(|r| (r.cell.net, r.cell.core) == (net, core))).collect()
    }

    /// Describes the measurement in sentences.
    pub(super) fn how(&self) -> Vec<String> {
        let repeats = self.runs.iter().map(|r| r.repeat + 1).max().unwrap_or(0);
        let link = match self.shaped {
            true => "a link of 1 Gbit/s to a network namespace (veth and tbf), where the destination is",
            false => "loopback, over which each migration keeps to 1 Gbit/s by itself",
        };
        let core = match self.caged {
            true => "Each end, its vCPU included, has a full or half a core by a control group.",
            false => "Each end has of the cores what the scheduler gives.",
        };
        let mut all = vec![
            format!(
                "Guests of 1 GiB with one vCPU, {} kinds of migration, runs of each kind: {repeats}, seed {}.",
                self.medians().len(),
                self.seed
            ),
            format!("Two connections; unlimited is loopback, 1gbit is {link}."),
            core.into(),
            "Writer and reader touch pages of so many MiB in random order at full speed; compute sorts in 256 MiB; with stream the guest has 256 MiB \
             that it leaves alone, and a TCP stream of the eval's own goes the migration's way, at full speed, outside of the cores of the two ends."
                .into(),
            "Kept is the guest's speed (of stream: the stream's) from request to completion, in percent of that in the seconds before; the gap is the \
             longest time between two looks of the guest at its clock. Bytes are those before encryption."
                .into(),
            format!(
                "A migration that has not handed over after {} s is cancelled, and counts as not ended. Medians are over the runs that ended.",
                LIMIT.as_secs()
            ),
            format!("It took {:.0} s; {:.0} s were expected.", self.took_s, self.estimate_s),
        ];
        if self.unit != crate::bench::MIB {
            all.push(format!("A trial of the measurement itself: {} bytes stand for each MiB.", self.unit));
        }
        all
    }

    /// Returns the median ratio of a figure to its value without encryption, over runs that differ
    /// in the cipher only.
    fn beside_none(&self, of: fn(&Medians) -> Option<f64>, wanted: impl Fn(&Cell) -> bool) -> Option<f64> {
        let all = self.medians();
        let shares = all.iter().filter(|m| wanted(&m.cell)).filter_map(|m| {
            let plain = Cell { cipher: Cipher::None, ..m.cell };
            let plain = all.iter().find(|other| other.cell == plain).and_then(of).filter(|v| *v > 0.0)?;
            Some(of(m)? / plain)
        });
        median(shares)
    }

    /// Returns the paper's findings with our measurements.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let all = self.medians();
        let aes = |cell: &Cell| matches!(cell.cipher, Cipher::Aes128 | Cipher::Aes256);
        let rate = |m: &Medians| Some(m.wire_bytes? / 1e3 / m.total_ms.filter(|ms| *ms > 0.0)?);
        let change = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:+.1} %", 100.0 * (s - 1.0)));
        let range = |of: fn(&Medians) -> Option<f64>, unit: &str, wanted: &dyn Fn(&Cell) -> bool| {
            let values: Vec<f64> = all.iter().filter(|m| wanted(&m.cell)).filter_map(of).collect();
            let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, m), v| (l.min(*v), m.max(*v)));
            if values.is_empty() {
                "-".into()
            } else {
                format!("{}–{} {unit}", number(Some(least)), number(Some(most)))
            }
        };
        let kept = |kind: Kind| {
            let of = |strategy: &'static str| {
                // without a limit the migration and the stream share only the cores
                let shares = |cell: &Cell| kind != Kind::Stream || cell.net == Net::Gigabit;
                let wanted = |m: &&Medians| m.cell.work.kind == kind && m.cell.strategy == strategy && shares(&m.cell);
                let value = median(all.iter().filter(wanted).filter_map(|m| m.kept_percent));
                value.map_or("-".into(), |v| format!("{v:.0} %"))
            };
            format!("kept under pre-copy {}, post-copy {}, hybrid {}", of("pre-copy"), of("post-copy"), of("hybrid"))
        };
        let large =
            |r: &&Run| r.cell.work.kind == Kind::Writer && r.cell.work.mib >= 128 && r.cell.strategy == "pre-copy";
        let writers: Vec<&Run> = self.runs.iter().filter(large).collect();
        let late = writers.iter().filter(|r| r.outcome == Outcome::NotEnded).count();
        let ciphers = plan::CIPHERS.into_iter().filter(|cipher| *cipher != Cipher::None);
        let slowest = ciphers.filter_map(|cipher| {
            let wanted =
                |m: &&Medians| m.cell.cipher == cipher && (m.cell.net, m.cell.core) == (Net::Unlimited, Core::Full);
            Some((cipher, median(all.iter().filter(wanted).filter_map(rate))?))
        });
        let slowest = slowest.min_by(|a, b| a.1.total_cmp(&b.1));
        let predicted =
            self.runs.iter().filter_map(|r| Some(r.predicted_downtime_ms? / r.downtime_ms.filter(|ms| *ms > 0.0)?));
        let predicted = median(predicted);
        let pre_copy = |cell: &Cell| cell.strategy == "pre-copy";
        let finding = |what, paper, ours| Finding { what, paper, ours };
        vec![
            finding(
                "AES, fast hosts (ours: full cores): total beside none",
                "about 0",
                change(self.beside_none(|m| m.total_ms, |c| aes(c) && c.core == Core::Full)),
            ),
            finding(
                "AES, a slow host (ours: half cores): bandwidth beside none",
                "-12 to -15 %",
                change(self.beside_none(|m| Some(m.wire_bytes? / m.total_ms?), |c| aes(c) && c.core == Core::Half)),
            ),
            finding(
                "The slowest cipher's rate (ours: median, unlimited, full cores)",
                "3DES: 15–21 MB/s",
                slowest.map_or("-".into(), |(cipher, rate)| format!("{}: {rate:.0} MB/s", cipher_name(cipher))),
            ),
            finding(
                "Pre-copy of a writer to 128 MB or more",
                "3DES: not ended after 30 minutes",
                match writers.len() {
                    0 => "-".into(),
                    all => format!("{late} of {all} not ended after {} s, with any cipher", LIMIT.as_secs()),
                },
            ),
            finding(
                "Downtime of pre-copy, none and AES",
                "200–600 ms",
                range(|m| m.downtime_ms, "ms", &|c| pre_copy(c) && c.cipher != Cipher::ChaCha20),
            ),
            finding(
                "Downtime of pre-copy, the slowest cipher (ours: chacha20-poly1305)",
                "3DES: 1000–2500 ms",
                range(|m| m.downtime_ms, "ms", &|c| pre_copy(c) && c.cipher == Cipher::ChaCha20),
            ),
            finding(
                "Downtime of post-copy, all ciphers",
                "always below 10 ms",
                range(|m| m.downtime_ms, "ms", &|c| c.strategy == "post-copy"),
            ),
            finding(
                "Network applications (ours: stream over 1 Gbit/s)",
                "suffer more under post-copy",
                kept(Kind::Stream),
            ),
            finding("CPU-bound applications (ours: compute)", "suffer more under pre-copy", kept(Kind::Compute)),
            finding(
                "The estimate of the downtime beside the downtime",
                "wrong: counts compressed pages as full ones",
                predicted.map_or("-".into(), |share| format!("{share:.2}× (median)")),
            ),
        ]
    }

    /// Returns a table of medians for each link and core.
    pub(super) fn tables(&self) -> Vec<Table> {
        let medians = self.medians();
        let table = |(net, core)| {
            let rows = medians.iter().filter(|m| (m.cell.net, m.cell.core) == (net, core)).map(|m| {
                vec![
                    [m.names.workload.as_str(), &m.names.strategy, &m.names.cipher].join(" · "),
                    if m.ended < m.runs { format!("{} of {}", m.ended, m.runs) } else { "all".into() },
                    number(m.total_ms),
                    number(m.downtime_ms),
                    number(m.gap_ms),
                    number(m.kept_percent),
                    number(m.wire_bytes.map(|b| b / 1e6)),
                    number(m.cpu_source_s.map(|s| s * 1e3)),
                    number(m.cpu_destination_s.map(|s| s * 1e3)),
                ]
            });
            let head = vec![
                "workload · strategy · cipher",
                "ended",
                "total, ms",
                "downtime, ms",
                "longest gap, ms",
                "kept, %",
                "MB",
                "CPU source, ms",
                "destination, ms",
            ];
            Table { title: format!("Link {net}, core {core} (medians)"), head, rows: rows.collect() }
        };
        self.places().into_iter().map(table).collect()
    }

    /// Returns the table that compares our findings with the paper's.
    pub(super) fn comparison(&self) -> Table {
        let rows = self.findings().into_iter().map(|f| vec![f.what.into(), f.paper.into(), f.ours]);
        let head = vec!["", "Hu et al. 2015", "here"];
        Table { title: "What the paper found, and what is found here".into(), head, rows: rows.collect() }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("{}\n\n{}\n", machine(&self.machine), self.how().join("\n"));
        self.tables().iter().chain([&self.comparison()]).for_each(|table| text += &format!("\n{}", table.text()));
        self.left_out.iter().for_each(|what| text += &format!("\nleft out: {what}\n"));
        self.failures.iter().for_each(|failure| text += &format!("\nfailed and run again: {failure}\n"));
        text
    }

    /// Returns the section of the Markdown file.
    pub(super) fn markdown(&self) -> String {
        let mut text = String::from("_Written by `minivmm eval encryption --markdown`; do not edit by hand._\n\n");
        text += &format!("{}.\n\n{}\n", machine(&self.machine), self.how().join("\n"));
        [self.comparison()].iter().chain(&self.tables()).for_each(|table| text += &format!("\n{}", table.markdown()));
        self.left_out.iter().for_each(|what| text += &format!("\nLeft out: {}.\n", what.replace('\n', " ")));
        for failure in &self.failures {
            text += &format!("\nFailed and run again: {}\n", failure.replace('\n', " "));
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let findings = self.findings();
        let findings = findings.iter().map(|f| json!({"what": f.what, "paper": f.paper, "here": f.ours}));
        json!({
            "machine": self.machine,
            "seed": self.seed,
            "how": self.how(),
            "estimate_s": self.estimate_s,
            "took_s": self.took_s,
            "left_out": self.left_out,
            "failures": self.failures,
            "findings": findings.collect::<Vec<_>>(),
            "medians": self.medians(),
            "runs": self.runs,
        })
    }

    /// Returns the CSV file: the names of the columns, then a line for each run.
    pub(super) fn csv(&self) -> String {
        let figure = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        let mut text = format!("{}\n", COLUMNS.join(","));
        for run in &self.runs {
            let machine = &self.machine;
            let names = run.names.all().map(str::to_owned);
            let rest: [String; COLUMNS.len() - 5] = [
                (run.repeat + 1).to_string(),
                run.outcome.name().into(),
                figure(run.total_ms),
                figure(run.downtime_ms),
                figure(run.predicted_downtime_ms),
                figure(run.gap_ms),
                figure(Some(run.before)),
                figure(run.during),
                figure(run.kept_percent),
                figure(run.wire_bytes),
                figure(run.cpu_source_s),
                figure(run.cpu_destination_s),
                figure(run.cpu_vcpu_s),
                figure(Some(run.load)),
                self.seed.to_string(),
                machine.date.clone(),
                machine.cpu.clone(),
                machine.cpus.to_string(),
                machine.kernel.clone(),
                machine.minivmm.into(),
            ];
            let cells: Vec<String> = names.iter().chain(&rest).map(|cell| quoted(cell)).collect();
            text += &format!("{}\n", cells.join(","));
        }
        text
    }
}

#[cfg(test)]
pub(super) mod test_util {
    use super::*;

    /// Returns one run of each kind. Runs with a cipher take twice as long, and those of the
    /// largest writers do not end.
    pub(in crate::eval::encryption) fn figures() -> Figures {
        let means = Means { shaped: true, caged: true, unit: crate::bench::MIB, seed: 7 };
        let left_out = vec!["a <part>, as \"it\" & that".into()];
        let mut figures = Figures::new(Machine::here(None), 7, &means, 100.0, left_out);
        for cell in plan::cells(false) {
            let ends = !(cell.strategy == "pre-copy" && cell.work.kind == Kind::Writer && cell.work.mib == 768);
            let some = |value: f64| ends.then_some(value);
            let total = if cell.cipher == Cipher::None { 1000.0 } else { 2000.0 };
            figures.runs.push(Run {
                cell,
                names: cell.names(),
                repeat: 0,
                load: 0.5,
                outcome: if ends { Outcome::Completed } else { Outcome::NotEnded },
                total_ms: some(total),
                downtime_ms: some(5.0),
                predicted_downtime_ms: some(6.0),
                gap_ms: Some(7.0),
                before: 100.0,
                during: Some(80.0),
                kept_percent: Some(80.0),
                wire_bytes: Some(200e6),
                cpu_source_s: some(0.5),
                cpu_destination_s: some(0.25),
                cpu_vcpu_s: some(0.1),
                guest_errors: 0,
                report: json!({"outcome": "completed"}),
            });
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_has_a_cell_for_each_column() {
        let mut figures = test_util::figures();
        figures.machine.cpu = "plain".into();
        let csv = figures.csv();
        let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert_eq!(columns.len(), 1 + figures.runs.len());
        assert!(columns.iter().all(|n| *n == COLUMNS.len()));
        assert_eq!(quoted("Core, \"2\""), "\"Core, \"\"2\"\"\"");
        assert!(csv.lines().any(|line| line.contains("writer-768,unlimited,full,1,not-ended,,,")));
    }

    #[test]
    fn ciphers_are_compared_with_none_of_the_same_kind() {
        let figures = test_util::figures();
        let findings = figures.findings();
        let ours = |what: &str| findings.iter().find(|f| f.what.starts_with(what)).unwrap().ours.clone();
        assert_eq!(ours("AES, fast"), "+100.0 %");
        assert_eq!(ours("AES, a slow"), "-50.0 %");
        assert_eq!(ours("Pre-copy of a writer"), "16 of 32 not ended after 60 s, with any cipher");
        assert_eq!(ours("Downtime of post-copy"), "5.0–5.0 ms");
        assert_eq!(ours("The estimate"), "1.20× (median)");
        assert_eq!(figures.medians().len(), 384);
    }

    #[test]
    fn what_has_not_ended_is_a_result() {
        let figures = test_util::figures();
        let tables = figures.tables();
        assert_eq!(tables.len(), 4);
        let text = tables[0].text();
        let line = text.lines().find(|line| line.contains("writer-768 · pre-copy · none")).unwrap();
        assert!(line.contains("0 of 1") && line.ends_with(" -"), "{line}");
        let page = figures.markdown();
        assert!(page.contains("Link 1gbit, core half") && page.contains("| Hu et al. 2015 |"));
        let json = figures.json();
        assert_eq!(
            (json["runs"].as_array().map(Vec::len), json["medians"][0]["cipher"].as_str()),
            (Some(384), Some("none"))
        );
    }
}
