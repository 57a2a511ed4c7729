//! `minivmm bench --encrypt`: measures the cost of encryption, compared with migration in plain
//! text and with QEMU's TLS with a pre-shared key.

use std::{ffi::OsStr, fmt, process::Command};

use indicatif::{ProgressBar, ProgressStyle};
use migration_core::text::describe;
use migration_crypto::keys;
use minivmm_client::log;
use serde::Serialize;
use serde_json::json;

use super::{
    Bench, DATA, GIB, REPEAT, attempt,
    figures::{Machine, median, name},
    measure::{self, Run, Setup, Vmm},
    output::{self, Table},
    process::Folder,
    qemu, records, tell,
    tuning::Tuning,
    workload,
};
use minivmm_client::encryption::{Encrypt, Encryption, Library};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "encrypt";
/// The numbers of connections. With one, QEMU uses its plain mode; with more, multifd.
const STREAMS: [u16; 2] = [1, 4];
const TEN_GIGABIT: u64 = 10_000_000_000;

/// The largest allowed ratio of our encrypted total to our plain total, on loopback and on a link
/// of 10 Gbit/s.
const LOOPBACK_TARGET: f64 = 1.6;
const LINK_TARGET: f64 = 1.05;
/// The largest allowed ratio of our encrypted total to QEMU's best total in plain text, and with
/// TLS.
const QEMU_PLAIN_TARGET: f64 = 1.0;
const QEMU_TLS_TARGET: f64 = 0.5;
/// The smallest allowed ratio of the record layer's rate to the rate of the cipher alone.
const RECORD_TARGET: f64 = 0.9;

/// The link over which a run migrates, and its protection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Way {
    pub(crate) cipher: Cipher,
    pub(crate) link: Link,
}

/// The cipher of a run. With [`Aes256`](Self::Aes256), QEMU's TLS uses its default cipher; with
/// [`Aes128`](Self::Aes128), the bench tells it to use that one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cipher {
    #[default]
    None,
    Aes256,
    Aes128,
    ChaCha20,
    Aes256Rust,
    ChaCha20Rust,
}

impl Cipher {
    const OURS: [Self; 6] =
        [Self::None, Self::Aes256, Self::Aes128, Self::ChaCha20, Self::Aes256Rust, Self::ChaCha20Rust];

    /// Returns the options of both sides. Makes a key if there is none yet.
    pub(super) fn encryption(self, folder: &Folder) -> Result<Encryption, String> {
        let (encrypt, cipher_library) = match self {
            Self::None => return Ok(Encryption::default()),
            Self::Aes256 => (Encrypt::Aes256Gcm, Library::Fastest),
            Self::Aes128 => (Encrypt::Aes128Gcm, Library::Fastest),
            Self::ChaCha20 => (Encrypt::ChaCha20Poly1305, Library::Fastest),
            Self::Aes256Rust => (Encrypt::Aes256Gcm, Library::Rust),
            Self::ChaCha20Rust => (Encrypt::ChaCha20Poly1305, Library::Rust),
        };
        let key = folder.path("psk");
        if !key.exists() {
            keys::generate(&key).map_err(describe)?;
        }
        Ok(Encryption { encrypt, psk_file: Some(key), cipher_library, ..Encryption::default() })
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "plain",
            Self::Aes256 => "aes256-gcm",
            Self::Aes128 => "aes128-gcm",
            Self::ChaCha20 => "chacha20-poly1305",
            Self::Aes256Rust => "aes256-gcm, all in Rust",
            Self::ChaCha20Rust => "chacha20-poly1305, all in Rust",
        })
    }
}

/// The link between source and destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Link {
    /// Loopback without a limit.
    #[default]
    Loopback,
    /// A link to the destination's network namespace, at the rate of its [`Shaper`].
    Shaped,
    /// Loopback, with both tools limited to 10 Gbit/s. Used where no namespace can be made.
    Limited,
}

impl Link {
    /// Returns the destination's address.
    pub(crate) fn host(self) -> &'static str {
        if self == Self::Shaped { Shaper::THERE } else { "127.0.0.1" }
    }

    /// Returns the limit that a tool is given in bit/s, or 0 for none.
    pub(super) fn limit_bits(self) -> u64 {
        if self == Self::Limited { TEN_GIGABIT } else { 0 }
    }

    /// Returns a command that runs `program` at the destination's end of the link.
    pub(super) fn command(self, program: &OsStr) -> Command {
        if self != Self::Shaped {
            return Command::new(program);
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", Shaper::NAMESPACE]).arg(program);
        command
    }

    fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Shaped => "10 Gbit/s (veth and tbf, the destination in a network namespace)",
            Self::Limited => "10 Gbit/s (each tool's own limit, over loopback)",
        }
    }
}

/// A network namespace at the other end of a link with a given rate. Removed when it is dropped.
pub(crate) struct Shaper;

impl Shaper {
    pub(crate) const NAMESPACE: &str = "minivmm-bench";
    const HERE: &str = "10.213.77.1";
    const THERE: &str = "10.213.77.2";

    /// Makes a link with this rate, written as `tc` expects it.
    pub(crate) fn new(rate: &str) -> Result<Self, String> {
        let run = |line: &str| -> Result<(), String> {
            let mut words = line.split(' ');
            let program = words.next().unwrap_or_default();
            let output = Command::new(program).args(words).output().map_err(|e| format!("{program}: {e}"))?;
            let why = String::from_utf8_lossy(&output.stderr);
            if output.status.success() { Ok(()) } else { Err(format!("{line}: {}", why.trim())) }
        };
        let (namespace, here, there) = (Self::NAMESPACE, Self::HERE, Self::THERE);
        // a bench that was killed may have left a namespace; if not, the command fails
        let _ = run(&format!("ip netns del {namespace}"));
        run(&format!("ip netns add {namespace}"))?;
        // from here on, the namespace is removed in any case
        let shaper = Self;
        run(&format!("ip link add mvbench0 type veth peer name mvbench1 netns {namespace}"))?;
        run(&format!("ip addr add {here}/30 dev mvbench0"))?;
        run("ip link set mvbench0 up")?;
        run(&format!("ip -n {namespace} addr add {there}/30 dev mvbench1"))?;
        run(&format!("ip -n {namespace} link set mvbench1 up"))?;
        run(&format!("ip -n {namespace} link set lo up"))?;
        run(&format!("tc qdisc add dev mvbench0 root tbf rate {rate} burst 2mb latency 10ms"))?;
        Ok(shaper)
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        // the link is removed with the namespace
        let _ = Command::new("ip").args(["netns", "del", Self::NAMESPACE]).output();
    }
}

/// Returns all runs in their order. Each round has one run of each kind.
fn setups(vmms: &[Vmm], link: Link, repeat: u32) -> Vec<Setup> {
    let setup = |vmm, streams, cipher, tuning| Setup {
        vmm,
        label: "encrypt".into(),
        workload: workload(0, DATA),
        memory: GIB,
        streams,
        impact: "balanced",
        strategy: "pre-copy".into(),
        watch_memory: false,
        watch_speed: false,
        way: Way { cipher, link },
        tuning,
    };
    let mut round = Vec::new();
    for tuning in Tuning::ALL {
        let compared = [Cipher::None, tuning.cipher()];
        for vmm in vmms {
            let all_ours = (*vmm, link, tuning) == (Vmm::Minivmm, Link::Loopback, Tuning::AsItComes);
            let ciphers = if all_ours { &Cipher::OURS[..] } else { &compared[..] };
            for &cipher in ciphers {
                // kinds that are not compared run with one number of streams only
                let streams = if compared.contains(&cipher) { &STREAMS[..] } else { &STREAMS[1..] };
                round.extend(streams.iter().map(|&streams| setup(*vmm, streams, cipher, tuning)));
            }
        }
    }
    (0..repeat).flat_map(|_| round.clone()).collect()
}

/// A figure and its target.
#[derive(Clone, Debug, Serialize)]
struct Target {
    what: String,
    value: f64,
    /// Whether the target is the smallest value that is allowed, rather than the largest.
    at_least: bool,
    target: f64,
    met: bool,
}

/// A VMM, a link, and a set of options.
#[derive(Clone, Copy, Debug)]
struct Kind {
    vmm: Vmm,
    link: Link,
    tuning: Tuning,
}

#[derive(Debug, Serialize)]
struct Figures {
    machine: Machine,
    rates: Vec<records::Rates>,
    runs: Vec<Run>,
    failures: Vec<String>,
}

impl Figures {
    fn of(&self, kind: Kind, cipher: Cipher, streams: u16) -> Vec<&Run> {
        let Kind { vmm, link, tuning } = kind;
        let wanted = |r: &&Run| {
            let setup = &r.setup;
            (setup.vmm, setup.way, setup.tuning, setup.streams) == (vmm, Way { cipher, link }, tuning, streams)
        };
        self.runs.iter().filter(wanted).collect()
    }

    fn total(&self, kind: Kind, cipher: Cipher, streams: u16) -> Option<f64> {
        median(self.of(kind, cipher, streams).iter().map(|r| r.total_ms))
    }

    /// Returns the smallest median total over the numbers of streams.
    fn best(&self, kind: Kind, cipher: Cipher) -> Option<f64> {
        STREAMS.into_iter().filter_map(|n| self.total(kind, cipher, n)).min_by(f64::total_cmp)
    }

    fn links(&self) -> Vec<Link> {
        let all = [Link::Loopback, Link::Shaped, Link::Limited];
        all.into_iter().filter(|&link| self.runs.iter().any(|r| r.setup.way.link == link)).collect()
    }

    fn targets(&self) -> Vec<Target> {
        let mut all = Vec::new();
        let mut add = |what: String, value: Option<f64>, at_least, target: f64| {
            let good = |value| if at_least { value >= target } else { value <= target };
            all.extend(value.map(|value| Target { what, value, at_least, target, met: good(value) }));
        };
        let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
        let of_each = self.links().into_iter().flat_map(|link| Tuning::ALL.map(|tuning| (link, tuning)));
        for (link, tuning) in of_each {
            let [ours, theirs] = [Vmm::Minivmm, Vmm::Qemu].map(|vmm| Kind { vmm, link, tuning });
            let cipher = tuning.cipher();
            let secure = self.best(ours, cipher);
            let what = |beside: &str| format!("{}, {cipher}, {}, beside {beside}", tuning.label("total"), link.name());
            let plain_target = if link == Link::Loopback { LOOPBACK_TARGET } else { LINK_TARGET };
            add(what("our own plain"), ratio(secure, self.best(ours, Cipher::None)), false, plain_target);
            if link == Link::Loopback {
                let plain = self.best(theirs, Cipher::None);
                add(what("QEMU's best plain mode"), ratio(secure, plain), false, QEMU_PLAIN_TARGET);
            }
            let tls = self.best(theirs, cipher);
            add(what("QEMU's best mode with TLS"), ratio(secure, tls), false, QEMU_TLS_TARGET);
        }
        if let Some(rates) = self.rates.iter().find(|r| r.suite == "aes256-gcm") {
            let what = |what: &str| format!("records of 64 KiB, {}, beside the bare cipher: {what}", rates.suite);
            let shares = rates.shares();
            for (n, name) in ["sealing warm memory", "sealing cold memory", "opening"].into_iter().enumerate() {
                add(what(name), shares.map(|s| s[n]), true, RECORD_TARGET);
            }
        }
        all
    }

    fn tables(&self) -> Vec<Table> {
        let rows = self.targets().into_iter().map(|t| {
            let (bound, met) = (if t.at_least { "≥" } else { "≤" }, if t.met { "met" } else { "missed" });
            vec![t.what, output::times(Some(t.value)), format!("{bound} {}×", t.target), met.into()]
        });
        let head = vec!["figure", "ratio", "target", ""];
        let mut all =
            vec![Table { title: "Targets (of the better number of streams each)".into(), head, rows: rows.collect() }];
        all.extend(self.links().into_iter().map(|link| self.totals(link)));
        all.extend([self.one_core()]);
        all.retain(|table| !table.rows.is_empty());
        all
    }

    /// Returns the table of totals over a link.
    fn totals(&self, link: Link) -> Table {
        let mut rows = Vec::new();
        for (tuning, vmm) in Tuning::ALL.into_iter().flat_map(|t| [(t, Vmm::Minivmm), (t, Vmm::Qemu)]) {
            let kind = Kind { vmm, link, tuning };
            for (cipher, streams) in Cipher::OURS.into_iter().flat_map(|c| STREAMS.map(|n| (c, n))) {
                let runs = self.of(kind, cipher, streams);
                if runs.is_empty() {
                    continue;
                }
                let how = match (vmm, cipher) {
                    (Vmm::Qemu, Cipher::Aes256) => "TLS, pre-shared key".to_owned(),
                    (Vmm::Qemu, Cipher::Aes128) => "TLS, pre-shared key, aes128-gcm by its priority".to_owned(),
                    _ => cipher.to_string(),
                };
                let spread = |of: &dyn Fn(&Run) -> f64| output::spread(&runs.iter().map(|r| of(r)).collect::<Vec<_>>());
                let plain = self.total(kind, Cipher::None, streams);
                let beside = self.total(kind, cipher, streams).and_then(|t| Some(t / plain?));
                rows.push(vec![
                    format!("{} · {how}", tuning.label(name(vmm))),
                    streams.to_string(),
                    spread(&|r| r.total_ms),
                    output::times(beside),
                    spread(&|r| r.gap_ms),
                    spread(&|r| r.cpu_s * 1e3),
                    spread(&|r| (r.cpu_s - r.cpu_vcpu_s) * 1e3),
                ]);
            }
        }
        let head =
            ["tool · cipher", "streams", "total, client", "of its plain", "guest's longest gap", "CPU", "beside vCPUs"];
        let title = format!("Totals, {} (median (least–most), ms)", link.name());
        Table { title, head: head.to_vec(), rows }
    }

    /// Returns the table of the ciphers and the record layer, on one core.
    fn one_core(&self) -> Table {
        let gb = |rate: f64| format!("{rate:.1}");
        let three = |of: &dyn Fn(&records::Records) -> f64, rates: &records::Rates| {
            rates.records.iter().map(|r| gb(of(r))).collect::<Vec<_>>().join(" / ")
        };
        let rows = self.rates.iter().map(|r| {
            vec![
                format!("{} · {}", r.library, r.suite),
                gb(r.seal_warm),
                three(&|r| r.seal_warm, r),
                gb(r.seal_cold),
                three(&|r| r.seal_cold, r),
                gb(r.open_warm),
                three(&|r| r.open_warm, r),
            ]
        });
        Table {
            title: "One core, GB/s: the bare cipher in pieces of 64 KiB, and records of 64 KiB / 256 KiB / 1 MiB"
                .into(),
            head: vec!["library · cipher", "seal warm", "records", "seal cold", "records", "copy and open", "records"],
            rows: rows.collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n", output::machine(&self.machine));
        self.tables().iter().for_each(|table| text += &format!("\n{}", table.text()));
        self.failures.iter().for_each(|failure| text += &format!("\nfailed and run again: {failure}\n"));
        text
    }

    fn markdown(&self) -> String {
        let mut text = String::from("_Written by `minivmm bench --encrypt --markdown`; do not edit by hand._\n\n");
        text += &format!("{}.\n", output::machine(&self.machine));
        self.tables().iter().for_each(|table| text += &format!("\n{}", table.markdown()));
        for failure in &self.failures {
            text += &format!("\nFailed and run again: {}\n", failure.replace('\n', " "));
        }
        text
    }
}

/// Runs the measurement. Returns whether every figure meets its target.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    if args.records {
        let rates = records::measure()?;
        let figures = Figures { machine: Machine::here(None), rates, runs: Vec::new(), failures: Vec::new() };
        return show(args, &figures);
    }
    let version = qemu::version().filter(|_| !args.no_qemu);
    let mut vmms = vec![Vmm::Minivmm];
    match &version {
        Some(_) => vmms.push(Vmm::Qemu),
        None if !args.no_qemu => note!("qemu-system-x86_64 is not installed: measuring minivmm alone"),
        None => {}
    }
    let folder = Folder::new()?;
    let shaper =
        Shaper::new("10gbit").inspect_err(|why| note!("no network namespace, so each tool limits itself: {why}"));
    let link = if shaper.is_ok() { Link::Shaped } else { Link::Limited };
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { REPEAT });
    let setups = [Link::Loopback, link].map(|link| setups(&vmms, link, repeat)).concat();
    let bar = ProgressBar::new(1 + setups.len() as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    tell(&bar, "ciphers and records on one core");
    let rates = records::measure()?;
    bar.inc(1);
    let mut figures = Figures { machine: Machine::here(version), rates, runs: Vec::new(), failures: Vec::new() };
    for setup in &setups {
        let (who, Way { cipher, link }) = (name(setup.vmm), setup.way);
        tell(&bar, &format!("{who}, {} streams, {cipher}, {}", setup.streams, link.name()));
        let run = attempt(&bar, &mut figures.failures, || measure::run(&folder, setup))?;
        if run.guest_errors > 0 {
            return Err(format!("{who}: the guest found {} wrong pages after {cipher}", run.guest_errors));
        }
        tell(&bar, &format!("    total {:.0} ms, gap {:.1} ms", run.total_ms, run.gap_ms));
        figures.runs.push(run);
        bar.inc(1);
    }
    bar.finish_and_clear();
    show(args, &figures)
}

/// Prints the figures and writes the requested files. Returns whether every figure meets its
/// target.
fn show(args: &Bench, figures: &Figures) -> Result<bool, String> {
    let targets = figures.targets();
    if args.json {
        out!("{}", json!({"figures": figures, "targets": targets}));
    } else {
        log::print(&figures.text());
    }
    if let Some(path) = &args.markdown {
        output::write_section(path, SECTION, &figures.markdown())?;
    }
    Ok(targets.iter().all(|target| target.met))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_have_one_of_each_kind() {
        let all = setups(&[Vmm::Minivmm, Vmm::Qemu], Link::Loopback, 3);
        assert_eq!(all.len(), 3 * (2 * 2 + 4 + 2 * 2 + 2 * 2 * 2));
        let kind = |s: &Setup| (s.vmm, s.way, s.streams, s.tuning);
        assert!(all[..20].iter().enumerate().all(|(n, one)| all[..n].iter().all(|other| kind(other) != kind(one))));
        assert_eq!(setups(&[Vmm::Minivmm], Link::Shaped, 1).len(), 8);
    }

    #[test]
    fn a_link_says_where_the_destination_is() {
        let command = Link::Shaped.command("program".as_ref());
        assert_eq!(command.get_program(), "ip");
        assert_eq!(command.get_args().last(), Some("program".as_ref()));
        assert_eq!(Link::Loopback.command("program".as_ref()).get_program(), "program");
        assert_eq!((Link::Limited.limit_bits(), Link::Shaped.limit_bits()), (TEN_GIGABIT, 0));
    }

    #[test]
    fn options_are_as_users_write_them() {
        let folder = Folder::new().unwrap();
        assert!(!Cipher::None.encryption(&folder).unwrap().arguments().contains(&"--psk-file".to_owned()));
        let secure = Cipher::ChaCha20Rust.encryption(&folder).unwrap();
        secure.check().unwrap();
        let line = secure.arguments().join(" ");
        assert!(line.starts_with("--encrypt chacha20-poly1305 --psk-file "), "{line}");
        assert!(line.ends_with("--cipher-library rust"), "{line}");
    }
}
