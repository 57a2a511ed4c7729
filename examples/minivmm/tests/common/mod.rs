//! Drives the real `minivmm` as child processes, through nothing but its command line.

mod huge_pages;
mod page_server;
mod process;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

pub(crate) use guests::layout;
pub(crate) use huge_pages::HugePages;
use libtest_mimic::{Failed, Trial};
use migration_kvm::tracker::UserFault;
pub(crate) use page_server::PageServer;
pub(crate) use process::{Answer, Client, Process, minivmm_after, usage, usage_with_stdout};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) type Outcome = Result<(), Failed>;

/// How long anything may take that must come: far longer than it does, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Trials, and why those that need KVM cannot run.
pub(crate) struct Suite {
    pub(crate) trials: Vec<Trial>,
    no_kvm: Option<String>,
    no_userfaultfd: Option<String>,
    no_huge_pages: Option<String>,
    no_page_servers: Option<String>,
    required: bool,
}

impl Suite {
    pub(crate) fn new(no_huge_pages: Option<String>) -> Self {
        let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let no_kvm = kvm.err().map(|e| format!("/dev/kvm cannot be used: {e}"));
        let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|v| v == "1");
        let no_userfaultfd = no_userfaultfd();
        let no_page_servers = PageServer::missing();
        Self { trials: Vec::new(), no_kvm, no_userfaultfd, no_huge_pages, no_page_servers, required }
    }

    /// The trials that `add` adds need something more, of which this says that it is missing.
    pub(crate) fn unless(&mut self, missing: Option<String>, add: impl FnOnce(&mut Self)) {
        let before = self.no_kvm.clone();
        self.no_kvm = before.clone().or(missing);
        add(self);
        self.no_kvm = before;
    }

    /// A trial that runs everywhere.
    pub(crate) fn anywhere(&mut self, name: &str, run: fn(&Lab) -> Outcome) {
        self.trials.push(Trial::test(name, move || run(&Lab::new()?)));
    }

    /// A trial that needs KVM.
    pub(crate) fn kvm(&mut self, name: impl Into<String>, run: impl FnOnce(&Lab) -> Outcome + Clone + Send + 'static) {
        self.add(name.into(), self.no_kvm.clone(), run);
    }

    /// A trial that needs KVM, and for hugetlb reserved huge pages.
    pub(crate) fn kvm_backed(
        &mut self,
        name: impl Into<String>,
        backing: &str,
        run: impl FnOnce(&Lab) -> Outcome + Clone + Send + 'static,
    ) {
        self.add(name.into(), self.no_kvm.clone().or_else(|| self.no_backing(backing)), run);
    }

    /// Why there is no memory with this backing.
    fn no_backing(&self, backing: &str) -> Option<String> {
        self.no_huge_pages.clone().filter(|_| backing == "hugetlb")
    }

    /// A trial in which a guest runs while pages of it are missing, in memory with this backing.
    pub(crate) fn post_copy(
        &mut self,
        name: impl Into<String>,
        backing: &str,
        run: impl FnOnce(&Lab) -> Outcome + Clone + Send + 'static,
    ) {
        let missing = self.no_kvm.clone().or_else(|| self.no_userfaultfd.clone());
        self.add(name.into(), missing.or_else(|| self.no_backing(backing)), run);
    }

    /// A trial of post-copy that starts servers for page stores. It is ignored where none is
    /// installed; with `MIGRATION_REQUIRE_REDIS=1` it fails.
    pub(crate) fn with_page_servers(
        &mut self,
        name: impl Into<String>,
        run: impl FnOnce(&Lab) -> Outcome + Clone + Send + 'static,
    ) {
        let required = std::env::var_os("MIGRATION_REQUIRE_REDIS").is_some_and(|value| value == "1");
        let name = name.into();
        match self.no_page_servers.clone() {
            Some(why) if !required => {
                eprintln!("{name} is ignored: {why}");
                self.trials.push(Trial::test(name, || Ok(())).with_ignored_flag(true));
            }
            Some(why) => self.trials.push(Trial::test(name, move || Err(why.into()))),
            None => self.post_copy(name, "anon", run),
        }
    }

    fn add(
        &mut self,
        name: String,
        missing: Option<String>,
        run: impl FnOnce(&Lab) -> Outcome + Clone + Send + 'static,
    ) {
        if also_encrypted(&name) {
            let run = run.clone();
            self.trial(format!("{name}/encrypted"), missing.clone(), move || run(&Lab::encrypted()?));
        }
        if also_in_small_slots(&name) {
            let run = run.clone();
            self.trial(format!("{name}/in_small_slots"), missing.clone(), move || run(&Lab::in_small_slots()?));
        }
        self.trial(name, missing, move || run(&Lab::new()?));
    }

    fn trial(&mut self, name: String, missing: Option<String>, run: impl FnOnce() -> Outcome + Send + 'static) {
        self.trials.push(match missing {
            Some(why) if self.required => Trial::test(name, move || Err(why.into())),
            Some(why) => {
                eprintln!("{name} is ignored: {why}");
                Trial::test(name, || Ok(())).with_ignored_flag(true)
            }
            None => Trial::test(name, run),
        });
    }
}

/// Whether a trial runs once more with VMs that have many memory slots a RAM region, as VMs with
/// terabytes have: each tracker, each technique, and what copies RAM out.
fn also_in_small_slots(name: &str) -> bool {
    match name.split('/').collect::<Vec<_>>()[..] {
        ["one_edge", tracker, backing, "2_streams", "4_cpus"] => each_tracker_once(tracker, backing),
        ["hand_over", "memfd" | "hugetlb", "4", "random"] | ["hand_over", "paused"] => true,
        ["post_copy", "workload", "random"] | ["post_copy", "huge_pages", "whole"] => true,
        ["balloon", "there_and_back", "thp"] | ["snapshot", "restored_vm_moves"] => true,
        ["ephemeral", "other_techniques_afterwards"] | ["scatter_gather", "two_stores"] => true,
        _ => false,
    }
}

/// Of all trackers and backings, pairs in which each occurs once.
fn each_tracker_once(tracker: &str, backing: &str) -> bool {
    let pairs =
        [("dirty-log", "anon"), ("manual-protect", "thp"), ("dirty-ring", "memfd"), ("write-protect", "hugetlb")];
    pairs.contains(&(tracker, backing))
}

/// Whether a trial runs once more with all its migrations encrypted: of every kind some, as all
/// would take too long; none that counts the bytes of plain frames.
fn also_encrypted(name: &str) -> bool {
    let seed = |seed: &str| seed.parse::<u32>().is_ok_and(|seed| seed.is_multiple_of(8));
    match name.split('/').collect::<Vec<_>>()[..] {
        ["one_edge", tracker, backing, "2_streams", "4_cpus"] => each_tracker_once(tracker, backing),
        ["moves", "workload", spec] => ["hot", "quicksort", "kv", "log"].contains(&spec),
        ["moves", what, ..] => what != "software_guest" && what != "across_the_hole_below_4_gib",
        ["convergence", what] => what != "cancelled_at_the_timeout",
        ["faults", "cut_while_the_guest_runs", last] => seed(last),
        ["faults", "destination_dies"] => true,
        ["post_copy", "one_edge", .., "2_lanes", _] | ["post_copy", "workload", _] => true,
        ["post_copy", "faults", "cut_before_the_hand_over" | "cut_in_post_copy", .., last] => seed(last),
        ["post_copy", "faults", "cut_around_the_hand_over"] => false,
        ["post_copy", "faults", ..] | ["post_copy", "huge_pages", "whole"] => true,
        ["post_copy", "switch", how] => ["by_the_user", "at_the_timeout"].contains(&how),
        ["post_copy", "a_to_b_to_c_to_a" | "another_backing" | "pause_at_the_destination"] => true,
        ["fail_safe", "destination_killed" | "source_killed", _, "4_cpus", _] => true,
        ["fail_safe", "nobody_dies", "memfd"] | ["fail_safe", "link_lost_and_found"] => true,
        ["contract", "cancel", "dirty-log"] | ["contract", "client_dies"] => true,
        ["balloon", "there_and_back", "thp"] => true,
        ["snapshot", "restored_vm_moves"] | ["broker", "ram_moves_with_its_vm"] => true,
        ["scatter_gather", "moves", "file", "sealed", "anon"] | ["scatter_gather", "two_stores"] => true,
        _ => false,
    }
}

/// Why no faults can be served that occur in the kernel, as those of vCPUs do.
fn no_userfaultfd() -> Option<String> {
    UserFault::new().err().map(|e| format!("userfaultfd cannot be used: {e}"))
}

/// A folder of a trial's own, with its sockets and files; removed at its end.
pub(crate) struct Lab {
    folder: TempDir,
    /// What both sides of every migration are told beside what the trial says.
    secure: Vec<String>,
    /// The most bytes of a memory slot of any VM, if it is not the usual number.
    slots: Option<&'static str>,
}

impl Lab {
    fn new() -> Result<Self, Failed> {
        let folder = tempfile::Builder::new().prefix("minivmm-test-").tempdir()?;
        Ok(Self { folder, secure: Vec::new(), slots: None })
    }

    /// Where RAM is in memory slots of a few pages each: an odd number of them, so that runs of
    /// pages reach over their ends.
    fn in_small_slots() -> Result<Self, Failed> {
        Ok(Self { slots: Some("748K"), ..Self::new()? })
    }

    /// Where all migrations are encrypted.
    fn encrypted() -> Result<Self, Failed> {
        let mut lab = Self::new()?;
        let key = lab.key("lab-key")?;
        lab.secure = ["--encrypt", "aes256-gcm", "--psk-file", &key].map(str::to_owned).into();
        Ok(lab)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a key; its path.
    pub(crate) fn key(&self, name: &str) -> Result<String, Failed> {
        let file = self.arg(name);
        let (code, stdout, stderr) = usage(&["keygen", "--out", &file])?;
        ensure(code == Some(0) && stdout.starts_with("public "), || format!("{code:?}: {stdout}{stderr}"))?;
        Ok(file)
    }

    /// The path as an argument.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `minivmm run …`, ready for `ctl`.
    pub(crate) fn run(&self, name: &str, args: &[&str]) -> Result<Process, Failed> {
        Process::start(self, name, "run", args, &[])
    }

    /// `minivmm run` of a built-in workload in 64 MiB, at work.
    pub(crate) fn workload(&self, name: &str, spec: &str, args: &[&str]) -> Result<Process, Failed> {
        let source = self.run(name, &[&["--memory", "64M", "--workload", spec], args].concat())?;
        source.wait_until("the guest works", at_work)?;
        Ok(source)
    }

    /// A command of `minivmm` by another program, which sees the control socket at this path.
    /// `args` begin with name and command.
    pub(crate) fn start_by(&self, program: Command, control: &Path, args: &[&str]) -> Result<Process, Failed> {
        Process::start_by(self, program, control, args)
    }

    /// `minivmm receive` at a TCP port of its own choice.
    pub(crate) fn receive(&self, name: &str, args: &[&str]) -> Result<Process, Failed> {
        self.receive_at(name, "tcp:127.0.0.1:0", args)
    }

    /// `minivmm broker`.
    pub(crate) fn broker(&self, name: &str) -> Result<Process, Failed> {
        self.broker_with(name, &[])
    }

    pub(crate) fn broker_with(&self, name: &str, args: &[&str]) -> Result<Process, Failed> {
        let listen = format!("unix:{}", self.arg(name));
        Process::start(self, name, "broker", &[&["--listen", &listen], args].concat(), &[])
    }

    pub(crate) fn receive_at(&self, name: &str, listen: &str, args: &[&str]) -> Result<Process, Failed> {
        Process::start(self, name, "receive", &[&["--listen", listen], args].concat(), &[])
    }
}

/// The guest is in its workload's loop, or has been all the time that it was to be.
pub(crate) fn at_work(status: &Value) -> bool {
    let workload = &status["workload"];
    workload["state"] == "finished" || workload["state"] == "running" && workload["heartbeats"].as_u64() > Some(0)
}

/// Looks until `look` finds something. Its error, or the lack of a find for a long time, ends the
/// trial.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>, Failed>) -> Result<T, Failed> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(format!("waited {PATIENCE:?} for this: {what}").into());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Fails a trial, with what it says, unless the condition holds.
pub(crate) fn ensure(condition: bool, why: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(why().into()) }
}

/// Fails a trial unless the text contains the words. A serial file begins with `first`, and has
/// each beat once and in order; how many there are. The last one may be on its way.
pub(crate) fn beats_in_order(text: &str, first: &str) -> Result<u64, Failed> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut lines = whole.lines();
    ensure(lines.next() == Some(first), || format!("the first line is missing in {text}"))?;
    let mut beats = 0;
    for line in lines {
        beats += 1;
        ensure(line == format!("beat {beats}"), || format!("`{line}` where `beat {beats}` is due"))?;
    }
    Ok(beats)
}

pub(crate) fn ensure_says(text: &str, words: &str) -> Outcome {
    ensure(text.contains(words), || format!("`{words}` is missing in: {text}"))
}

fn read_text(path: &Path) -> String {
    // a file that nobody has written yet is empty
    std::fs::read_to_string(path).unwrap_or_default()
}
