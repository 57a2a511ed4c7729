//! A `minivmm` that runs or receives, and the clients that talk to it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
};

use libtest_mimic::Failed;
use serde_json::Value;

use super::{Lab, Outcome, ensure, layout, read_text, wait_for};

fn minivmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
    command.stdin(Stdio::null()).env_remove("MINIVMM_SOFTWARE_GUEST").env_remove("MINIVMM_SLOT_SIZE");
    command
}

/// What tells a process how large its memory slots are.
fn slots(most: Option<&'static str>) -> Option<(&'static str, &'static str)> {
    most.map(|most| ("MINIVMM_SLOT_SIZE", most))
}

/// `minivmm` by a shell that first does this: `umask 0`.
pub(crate) fn minivmm_after(shell: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("{shell}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_minivmm")]);
    command.stdin(Stdio::null()).env_remove("MINIVMM_SOFTWARE_GUEST");
    command
}

/// A child that does not outlive its trial.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `minivmm run` or `minivmm receive`, ready for `ctl`; or `minivmm broker`.
pub(crate) struct Process {
    guard: Guard,
    name: String,
    socket: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Options of every migration in its lab.
    secure: Vec<String>,
    /// The most bytes of a memory slot, if it is not the usual number.
    slots: Option<&'static str>,
    /// Where it listens.
    pub(crate) address: String,
}

/// How the scheduler treats a thread.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scheduling {
    name: String,
    pub(crate) policy: i64,
    nice: i64,
}

/// What a client printed, and how it ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) json: Value,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A `ctl` or a `feature` under way.
pub(crate) struct Client {
    guard: Guard,
    /// What it prints; a pipe might fill up.
    stdout: File,
    stderr: File,
}

impl Process {
    /// Starts it and waits until it is ready, which its control socket and, of a receiver, its
    /// first line show.
    pub(super) fn start(
        lab: &Lab,
        name: &str,
        command: &str,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Self, Failed> {
        let mut program = minivmm();
        program.envs(env.iter().copied());
        Self::start_by(lab, program, &lab.path(name), &[&[name, command], args].concat())
    }

    /// As [`start`](Self::start), with another stderr than a file.
    pub(crate) fn with_stderr(
        lab: &Lab,
        name: &str,
        command: &str,
        args: &[&str],
        stderr: Stdio,
    ) -> Result<Self, Failed> {
        let mut program = minivmm();
        program.stderr(stderr);
        Self::launch(lab, program, &lab.path(name), &[&[name, command], args].concat())
    }

    /// As [`start`](Self::start), where no file may grow beyond this many blocks of the shell's.
    pub(crate) fn with_file_limit(
        lab: &Lab,
        name: &str,
        command: &str,
        args: &[&str],
        blocks: u32,
    ) -> Result<Self, Failed> {
        let program = minivmm_after(&format!("ulimit -f {blocks}"));
        Self::start_by(lab, program, &lab.path(name), &[&[name, command], args].concat())
    }

    /// As [`start`](Self::start), by a program that may see `control` as another path than `name`
    /// in the lab. `args` begin with name and command.
    pub(super) fn start_by(lab: &Lab, mut program: Command, control: &Path, args: &[&str]) -> Result<Self, Failed> {
        let name = args.first().ok_or("a name is missing")?;
        program.stderr(File::create(lab.path(&format!("{name}.stderr")))?);
        Self::launch(lab, program, control, args)
    }

    fn launch(lab: &Lab, mut program: Command, control: &Path, args: &[&str]) -> Result<Self, Failed> {
        let [name, command, args @ ..] = args else { return Err("a name and a command are missing".into()) };
        let (name, command) = (*name, *command);
        let (socket, stdout, stderr) =
            (lab.path(name), lab.path(&format!("{name}.stdout")), lab.path(&format!("{name}.stderr")));
        let controlled = command != "broker";
        let control = if controlled { &["--control".as_ref(), control.as_os_str()][..] } else { &[] };
        let secure = lab.secure.clone();
        let child = program
            .arg(command)
            .args(args)
            .args(secure.iter().filter(|_| command == "receive"))
            .args(control)
            .envs(slots(lab.slots))
            .stdout(File::create(&stdout)?)
            .spawn()?;
        let (name, guard, address) = (name.to_owned(), Guard(child), String::new());
        let slots = lab.slots;
        let mut this = Self { guard, name, socket, stdout, stderr, secure, slots, address };
        wait_for(&format!("{} is ready", this.name.clone()), || {
            if let Some(status) = this.guard.0.try_wait()? {
                return Err(format!("{} ended with {status}: {}", this.name, this.stderr()).into());
            }
            let line = read_text(&this.stdout);
            let listens = command == "run" || line.contains('\n');
            Ok((listens && (this.socket.exists() || !controlled)).then_some(()))
        })?;
        if command != "run" {
            let text = this.stdout();
            let (address, others) =
                text.strip_prefix("listening ").and_then(|l| l.split_once('\n')).unwrap_or_default();
            // a name stands for several
            let well = !address.is_empty() && others.lines().all(|line| line.starts_with("bound "));
            ensure(well, || format!("not an address: {text:?}"))?;
            address.clone_into(&mut this.address);
        }
        Ok(this)
    }

    /// As [`Lab::run`] and [`Lab::receive`], as a software guest.
    pub(crate) fn software(lab: &Lab, name: &str, command: &str, args: &[&str]) -> Result<Self, Failed> {
        Self::start(lab, name, command, args, &[("MINIVMM_SOFTWARE_GUEST", "1")])
    }

    pub(crate) fn stdout(&self) -> String {
        read_text(&self.stdout)
    }

    pub(crate) fn stderr(&self) -> String {
        read_text(&self.stderr)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.guard.0.id()
    }

    /// Where its control socket is.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends it this signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) -> Outcome {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }

    /// As a power cut would.
    pub(crate) fn kill(&mut self) -> Outcome {
        self.guard.0.kill()?;
        self.guard.0.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> Result<ExitStatus, Failed> {
        let ended = wait_for(&format!("{} ends", self.name), || Ok(self.guard.0.try_wait()?));
        ended.map_err(|why| {
            let (status, threads) = (self.status(), self.threads());
            format!("{why:?}; its status: {status:?}; its threads: {threads:?}; stderr: {}", self.stderr()).into()
        })
    }

    /// It ends by itself, with status 0, and its control socket is gone.
    pub(crate) fn ended_well(&mut self) -> Outcome {
        let status = self.ended()?;
        ensure(status.success(), || format!("{} ended with {status}: {}", self.name, self.stderr()))?;
        ensure(!self.socket.exists(), || format!("{} left its control socket", self.name))
    }

    /// `ctl`, whatever comes of it.
    pub(crate) fn ctl(&self, args: &[&str]) -> Result<Answer, Failed> {
        self.start_ctl(args)?.answer()
    }

    /// `ctl` that must succeed.
    pub(crate) fn ask(&self, args: &[&str]) -> Result<Value, Failed> {
        let answer = self.ctl(args)?;
        ensure(answer.code == Some(0), || format!("{}: ctl {args:?}: {answer:?}", self.name))?;
        Ok(answer.json)
    }

    /// `ctl adopt`, as soon as it has seen that its source is gone.
    pub(crate) fn adopt(&self) -> Result<Value, Failed> {
        wait_for("the VM is adopted", || {
            let answer = self.ctl(&["adopt"])?;
            Ok((answer.code == Some(0)).then_some(answer.json))
        })
    }

    /// The status, which is never long in coming: a trial does not wait for it for ever.
    pub(crate) fn status(&self) -> Result<Value, Failed> {
        let answer = self.start_ctl(&["status"])?.answer().map_err(|why| format!("{}: status: {why:?}", self.name))?;
        ensure(answer.code == Some(0), || format!("{}: ctl status: {answer:?}", self.name))?;
        Ok(answer.json)
    }

    /// Polls the status; what it is once it is as wished.
    pub(crate) fn wait_until(&self, what: &str, mut wished: impl FnMut(&Value) -> bool) -> Result<Value, Failed> {
        let mut last = Value::Null;
        wait_for(what, || {
            last = self.status()?;
            Ok(wished(&last).then(|| last.clone()))
        })
        .map_err(|e| format!("{}: {e:?}; the last status: {last}; stderr: {}", self.name, self.stderr()).into())
    }

    /// Waits until its log has these words: the log is written by a thread of its own.
    pub(crate) fn says(&self, words: &str) -> Outcome {
        wait_for("words in the log", || Ok(self.stderr().contains(words).then_some(())))
            .map_err(|e| format!("{}: `{words}`: {e:?}; stderr: {}", self.name, self.stderr()).into())
    }

    pub(crate) fn wait_state(&self, state: &str) -> Result<Value, Failed> {
        self.wait_until(state, |status| status["state"] == state)
    }

    /// Its guest runs here: it works on, and has found nothing wrong.
    pub(crate) fn works(&self) -> Outcome {
        let beats = |status: &Value| status["workload"]["heartbeats"].as_u64();
        let before = self.status()?;
        ensure(before["state"] == "running", || format!("{} is not running: {before}", self.name))?;
        let after = self.wait_until("the guest beats", |s| beats(s) > beats(&before))?;
        ensure(after["workload"]["errors"] == 0, || format!("{}: the guest found errors: {after}", self.name))
    }

    /// `ctl migrate`, to its end.
    pub(crate) fn migrate(&self, to: &str, args: &[&str]) -> Result<Answer, Failed> {
        self.ctl(&self.migration(to, args))
    }

    fn migration<'a>(&'a self, to: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        let secure: Vec<&str> = self.secure.iter().map(String::as_str).collect();
        [&["migrate", "--to", to], args, &secure].concat()
    }

    /// Migrates, which must succeed, and waits for the end of this process; the report.
    pub(crate) fn migrate_well(&mut self, to: &str, args: &[&str]) -> Result<Value, Failed> {
        let answer = self.migrate(to, args)?;
        let why = |answer: &Answer| format!("{}: {answer:?}; stderr: {}", self.name, self.stderr());
        ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", || why(&answer))?;
        self.ended_well()?;
        Ok(answer.json)
    }

    /// As [`migrate_well`](Process::migrate_well), while the destination may not yet have noticed
    /// that an earlier attempt is dead.
    pub(crate) fn retry_well(&mut self, to: &str, args: &[&str]) -> Result<Value, Failed> {
        let answer = wait_for("the destination is free", || {
            let answer = self.migrate(to, args)?;
            let busy = answer.json["reason"].as_str().is_some_and(|r| r.contains("another session is under way"));
            Ok((!busy).then_some(answer))
        })?;
        let why = |answer: &Answer| format!("{}: {answer:?}; stderr: {}", self.name, self.stderr());
        ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", || why(&answer))?;
        self.ended_well()?;
        Ok(answer.json)
    }

    /// `ctl migrate`, without waiting for it.
    pub(crate) fn start_migrate(&self, to: &str, args: &[&str]) -> Result<Client, Failed> {
        self.start_ctl(&self.migration(to, args))
    }

    /// `ctl`, without waiting for it.
    pub(crate) fn start_ctl(&self, args: &[&str]) -> Result<Client, Failed> {
        Client::start(minivmm().args(["ctl", "--json", "--control"]).arg(&self.socket).args(args))
    }

    /// `minivmm feature`, which borrows its VM, without waiting for it.
    pub(crate) fn start_feature(&self, args: &[&str]) -> Result<Client, Failed> {
        let mut command = minivmm();
        command.args(["feature", "--json", "--attach"]).arg(&self.socket).args(args).envs(slots(self.slots));
        Client::start(&mut command)
    }

    /// `minivmm feature`, to its end: its status, what it printed a trip, and its stderr.
    pub(crate) fn feature(&self, args: &[&str]) -> Result<(Option<i32>, Vec<Value>, String), Failed> {
        self.start_feature(args)?.trips()
    }

    /// A part of guest RAM, by `ctl memory`.
    pub(crate) fn memory(&self, lab: &Lab, gpa: u64, len: u64) -> Result<Vec<u8>, Failed> {
        let file = lab.path(&format!("{}.memory", self.name));
        self.ask(&[
            "memory",
            "--gpa",
            &format!("{gpa:#x}"),
            "--len",
            &len.to_string(),
            "--out",
            &file.display().to_string(),
        ])?;
        Ok(fs::read(file)?)
    }

    /// The pages that the workload works on: address and bytes. It must be in one piece.
    pub(crate) fn work_area(&self, lab: &Lab) -> Result<(u64, u64), Failed> {
        let board = self.memory(lab, layout::BOARD_ADDRESS, layout::PAGE_SIZE)?;
        let word = |n: usize| {
            let at = layout::board::WORK_RANGES + 8 * n;
            u64::from_le_bytes(std::array::from_fn(|i| board[at + i]))
        };
        ensure(word(1) > 0 && word(3) == 0, || "the work area is not in one piece".into())?;
        Ok((word(0), word(1) * layout::PAGE_SIZE))
    }

    /// Its threads by name, and how many descriptors it has open, when no client is served.
    pub(crate) fn resources(&self) -> Result<(BTreeMap<String, usize>, usize), Failed> {
        wait_for("no client is served", || {
            let threads = self.threads()?;
            let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count();
            // a thread has the process's name until it gives itself another one
            let settled = !threads.contains_key("client") && threads.get("minivmm") == Some(&1);
            Ok(settled.then_some((threads, descriptors)))
        })
    }

    /// How many threads of each name there are.
    pub(crate) fn threads(&self) -> Result<BTreeMap<String, usize>, Failed> {
        let mut threads = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let name = read_text(&task?.path().join("comm"));
            // a thread that ended meanwhile has no name any more
            if !name.is_empty() {
                *threads.entry(name.trim().to_owned()).or_insert(0) += 1;
            }
        }
        Ok(threads)
    }

    /// How the scheduler treats its threads, and their names: the policy's number, and the
    /// niceness.
    pub(crate) fn scheduling(&self) -> Result<Vec<Scheduling>, Failed> {
        let mut all = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let stat = read_text(&task?.path().join("stat"));
            // a thread that ended meanwhile has nothing to say; a name may contain anything
            let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
            let fields: Vec<&str> = rest.split_whitespace().collect();
            // proc(5) counts from 1, and these begin with its third
            let field =
                |n: usize| fields.get(n - 3).and_then(|f| f.parse().ok()).ok_or(format!("no field {n}: {stat}"));
            let name = name.split_once('(').map_or(name, |(_, name)| name).to_owned();
            all.push(Scheduling { name, policy: field(41)?, nice: field(19)? });
        }
        all.sort();
        Ok(all)
    }

    /// Everything is as it was before a migration: threads, descriptors.
    pub(crate) fn is_back_at(&self, before: &(BTreeMap<String, usize>, usize)) -> Outcome {
        let mut now = Default::default();
        wait_for("threads and descriptors are given back", || {
            now = self.resources()?;
            Ok((now == *before).then_some(()))
        })
        .map_err(|_| format!("{}: threads and descriptors were {before:?} and are {now:?}", self.name).into())
    }

    /// `ctl quit`, and the end.
    pub(crate) fn quit(mut self) -> Outcome {
        let answer = self.ask(&["quit"])?;
        ensure(answer["state"] == "ended", || format!("{answer}"))?;
        self.ended_well()
    }
}

impl Client {
    pub(crate) fn pid(&self) -> u32 {
        self.guard.0.id()
    }

    /// Sends it this signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) -> Outcome {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool, Failed> {
        Ok(self.guard.0.try_wait()?.is_some())
    }

    /// Waits for its answer.
    pub(crate) fn answer(self) -> Result<Answer, Failed> {
        Answer::new(self.output()?)
    }

    /// Any command, from this directory.
    pub(crate) fn start_in(folder: &Path, args: &[&str]) -> Result<Self, Failed> {
        Self::start(minivmm().args(args).current_dir(folder))
    }

    fn start(command: &mut Command) -> Result<Self, Failed> {
        let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let child = command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?).spawn()?;
        Ok(Self { guard: Guard(child), stdout, stderr })
    }

    /// Waits for the end of a command that must succeed.
    pub(crate) fn succeeds(self) -> Outcome {
        let output = self.output()?;
        ensure(output.status.success(), || format!("{output:?}"))
    }

    /// Waits for the end of a `feature`: its status, what it printed a trip, and its stderr.
    pub(crate) fn trips(self) -> Result<(Option<i32>, Vec<Value>, String), Failed> {
        let output = self.output()?;
        let trips = String::from_utf8(output.stdout)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok((output.status.code(), trips, String::from_utf8(output.stderr)?))
    }

    /// Waits for its end.
    fn output(mut self) -> Result<Output, Failed> {
        let status = wait_for("a client ends", || Ok(self.guard.0.try_wait()?))?;
        let read = |mut file: File| -> Result<Vec<u8>, Failed> {
            let mut bytes = Vec::new();
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        Ok(Output { status, stdout: read(self.stdout)?, stderr: read(self.stderr)? })
    }

    /// Kills the client, not the migration.
    pub(crate) fn kill(self) {
        drop(self);
    }
}

impl Answer {
    /// Checks what holds in every case: exactly one JSON object on stdout.
    fn new(output: Output) -> Result<Self, Failed> {
        let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        let json: Value = serde_json::from_str(&stdout)
            .map_err(|e| format!("not one JSON value: {e}: {stdout:?}; {}; stderr: {stderr}", output.status))?;
        ensure(json.is_object(), || format!("not an object: {stdout}"))?;
        Ok(Self { code: output.status.code(), json, stdout, stderr })
    }

    pub(crate) fn reason(&self) -> &str {
        self.json["reason"].as_str().unwrap_or("")
    }
}

/// `minivmm` with any arguments and this stdout, whatever comes of it: status, stderr.
pub(crate) fn usage_with_stdout(args: &[&str], stdout: impl Into<Stdio>) -> Result<(Option<i32>, String), Failed> {
    let output = minivmm().args(args).stdout(stdout).stderr(Stdio::piped()).output()?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

/// `minivmm` with any arguments, whatever comes of it: status, stdout, stderr.
pub(crate) fn usage(args: &[&str]) -> Result<(Option<i32>, String, String), Failed> {
    let output = minivmm().args(args).output()?;
    Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
}
