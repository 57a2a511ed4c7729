//! Child processes that end with the bench, and what `/proc` reports of them.

use std::{
    fs::{self, DirBuilder, File},
    io,
    ops::Range,
    os::unix::fs::{DirBuilderExt as _, FileExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};

/// The clock ticks per second in `/proc/PID/stat`, which the kernel's ABI fixes for x86-64.
const TICKS_PER_SECOND: f64 = 100.0;
/// The interval at which the vCPU threads' CPU time is read during a migration.
const VCPU_PERIOD: Duration = Duration::from_millis(5);
/// The longest time in which a process may end.
const END: Duration = Duration::from_secs(20);

/// The number of names that are tried for a folder. Other users may have made folders with some of
/// them.
const FOLDERS: u32 = 1000;

/// A new folder for sockets and files that only this user can enter. Removed when it is dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Result<Self, String> {
        Self::named("bench")
    }

    /// Makes a folder with `purpose` in its name.
    pub(crate) fn named(purpose: &str) -> Result<Self, String> {
        let parent = std::env::temp_dir();
        for number in 0..FOLDERS {
            let path = parent.join(format!("minivmm-{purpose}-{}-{number}", std::process::id()));
            // fails if the name exists, even as a link
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(format!("{}: {error}", path.display())),
            }
        }
        Err(format!("{}: {FOLDERS} names for a new folder are taken", parent.display()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // what may remain is a socket or two among the temporary files
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Returns the path of the measured minivmm, which is this program.
pub(crate) fn program() -> Result<PathBuf, String> {
    std::env::current_exe().map_err(|e| format!("the own program: {e}"))
}

/// A child process. Killed when it is dropped.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`. Its stderr goes to `log`.
    pub(super) fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self, String> {
        let file = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file).spawn();
        let child = child.map_err(|e| format!("starting {name} ({:?}): {e}", command.get_program()))?;
        Ok(Self { child, name: name.into(), log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the process's standard output, once.
    pub(super) fn output(&mut self) -> Result<std::process::ChildStdout, String> {
        self.child.stdout.take().ok_or_else(|| format!("{}: no output", self.name))
    }

    /// Returns an error with the exit status if the process has ended.
    pub(super) fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended(status)),
            Err(e) => Err(format!("{}: {e}", self.name)),
        }
    }

    fn ended(&self, status: ExitStatus) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        format!("{} ended ({status}): {}", self.name, said.trim())
    }

    /// Returns the CPU seconds that all present and past threads of the process have used.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, String> {
        let path = format!("/proc/{}/stat", self.pid());
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        // the second field, the name in parentheses, may contain any character
        let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or("").split(' ').collect();
        let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok()).ok_or(format!("{path}: no field {n}"));
        Ok((ticks(11)? + ticks(12)?) as f64 / TICKS_PER_SECOND)
    }

    /// Waits until the process ends by itself. Returns the CPU seconds of its whole life. No other
    /// thread may reap a child meanwhile.
    pub(crate) fn wait(&mut self) -> Result<f64, String> {
        let reaped = || {
            let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(|e| format!("getrusage: {e}"))?;
            let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            Ok::<f64, String>(microseconds as f64 / 1e6)
        };
        let (before, deadline) = (reaped()?, Instant::now() + END);
        loop {
            match self.child.try_wait().map_err(|e| format!("{}: {e}", self.name))? {
                Some(status) if status.success() => return Ok(reaped()? - before),
                Some(status) => return Err(self.ended(status)),
                None if Instant::now() > deadline => return Err(format!("{} does not end", self.name)),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Returns the mappings of the process, with the resident bytes of each.
    pub(super) fn mappings(&self) -> Result<Vec<Mapping>, String> {
        mappings(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A mapping of a process.
#[derive(Debug, Clone)]
pub(super) struct Mapping {
    pub(super) range: Range<u64>,
    pub(super) writable: bool,
    pub(super) resident: u64,
    pub(super) huge: u64,
}

/// Returns the mappings without their resident bytes, from `/proc/PID/maps`, which is much faster.
pub(super) fn maps(pid: u32) -> Result<Vec<Mapping>, String> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    Ok(parse_mappings(&text))
}

/// Returns the mappings, from `/proc/PID/smaps`.
pub(super) fn mappings(pid: u32) -> Result<Vec<Mapping>, String> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    Ok(parse_mappings(&text))
}

fn parse_mappings(text: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(key) = first.strip_suffix(':') {
            let bytes = words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10;
            match (key, all.last_mut()) {
                ("Rss", Some(mapping)) => mapping.resident = bytes,
                ("AnonHugePages", Some(mapping)) => mapping.huge = bytes,
                _ => {}
            }
        } else if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            let writable = words.next().is_some_and(|p| p.starts_with("rw"));
            all.push(Mapping { range: start..end, writable, resident: 0, huge: 0 });
        }
    }
    all
}

/// Returns the peak memory of a process in bytes.
pub(super) fn high_water(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Returns whether this is the name of a vCPU thread in minivmm or in QEMU.
fn is_vcpu(name: &str) -> bool {
    let name = name.trim().to_ascii_lowercase();
    name.starts_with("vcpu") || (name.starts_with("cpu ") && name.ends_with("/kvm"))
}

/// The CPU time of a process's vCPU threads, with one open file for each thread.
struct VcpuClock {
    files: Vec<(File, f64)>,
}

impl VcpuClock {
    fn open(pid: u32) -> Self {
        let mut files = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if is_vcpu(&name)
                && let Ok(file) = File::open(task.path().join("schedstat"))
            {
                files.push((file, 0.0));
            }
        }
        let mut clock = Self { files };
        clock.read();
        clock
    }

    /// Returns the seconds so far. A thread that has ended keeps its last value.
    fn read(&mut self) -> f64 {
        for (file, seconds) in &mut self.files {
            let mut text = [0; 64];
            if let Ok(length) = file.read_at(&mut text, 0)
                && let Some(word) = text[..length].split(|b| *b == b' ').next()
                && let Some(nanoseconds) = std::str::from_utf8(word).ok().and_then(|w| w.parse::<u64>().ok())
            {
                *seconds = nanoseconds as f64 / 1e9;
            }
        }
        self.files.iter().map(|(_, seconds)| seconds).sum()
    }
}

/// Returns the vCPU seconds of a process so far.
pub(crate) fn vcpu_seconds(pid: u32) -> f64 {
    VcpuClock::open(pid).read()
}

/// Samples the vCPU time of a process that may end meanwhile.
pub(crate) struct VcpuSampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<f64>>,
}

impl VcpuSampler {
    pub(crate) fn start(pid: u32) -> Result<Self, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut clock = VcpuClock::open(pid);
        let seen = stop.clone();
        let body = move || {
            let first = clock.read();
            while !seen.load(Ordering::Acquire) {
                thread::sleep(VCPU_PERIOD);
                clock.read();
            }
            clock.read() - first
        };
        let thread = thread::Builder::new().name("sampler".into()).spawn(body).map_err(|e| e.to_string())?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Returns the vCPU seconds since the start.
    pub(crate) fn finish(mut self) -> f64 {
        self.end().unwrap_or(0.0)
    }

    fn end(&mut self) -> Option<f64> {
        self.stop.store(true, Ordering::Release);
        self.thread.take()?.join().ok()
    }
}

impl Drop for VcpuSampler {
    fn drop(&mut self) {
        self.end();
    }
}

/// Samples the memory of a process beyond its guest's RAM.
pub(super) struct MemorySampler {
    pid: u32,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(Vec<Vec<Mapping>>, u64)>>,
}

impl MemorySampler {
    /// Takes a sample every `period`. A sample costs milliseconds, so it is not used in timed runs.
    pub(super) fn start(pid: u32, period: Duration) -> Result<Self, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let body = move || {
            let (mut looks, mut high) = (Vec::new(), 0);
            while !seen.load(Ordering::Acquire) {
                match mappings(pid) {
                    Ok(look) if look.iter().any(|m| m.resident > 0) => looks.push(look),
                    // the process is ending or has ended
                    _ => break,
                }
                high = high.max(high_water(pid).unwrap_or(0));
                thread::sleep(period);
            }
            (looks, high)
        };
        let thread = thread::Builder::new().name("sampler".into()).spawn(body).map_err(|e| e.to_string())?;
        Ok(Self { pid, stop, thread: Some(thread) })
    }

    /// Returns the peak of the memory outside `ram`, and the peak memory of the process less the
    /// largest resident part of RAM.
    pub(super) fn finish(self, ram: &Range<u64>) -> Result<Beyond, String> {
        self.finish_where(|range| range.start < ram.end && ram.start < range.end)
    }

    /// Returns the same for guest RAM in the mappings for which `is_ram` returns `true`.
    pub(super) fn finish_where(mut self, is_ram: impl Fn(&Range<u64>) -> bool) -> Result<Beyond, String> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().ok_or("no sampler")?;
        let (looks, high) = thread.join().map_err(|_| "the sampler panicked")?;
        if looks.is_empty() {
            return Err(format!("process {} was never seen", self.pid));
        }
        let sum = |look: &[Mapping], within: bool| {
            look.iter().filter(|m| is_ram(&m.range) == within).map(|m| m.resident).sum::<u64>()
        };
        let peak = looks.iter().map(|look| sum(look, false)).max().unwrap_or(0);
        let guest = looks.iter().map(|look| sum(look, true)).max().unwrap_or(0);
        let first = looks.first().map_or(0, |look| sum(look, false));
        Ok(Beyond { peak, first, high_water: high.saturating_sub(guest), looks: looks.len() })
    }
}

impl Drop for MemorySampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // a sampler that panicked has no result
            let _ = thread.join();
        }
    }
}

/// The memory of a process beyond its guest's RAM, in bytes.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct Beyond {
    /// The largest value of all samples.
    pub(super) peak: u64,
    /// The value before the migration.
    pub(super) first: u64,
    /// The kernel's peak less the guest's resident RAM: an upper bound.
    pub(super) high_water: u64,
    /// The number of samples.
    pub(super) looks: usize,
}

/// Returns the first line of a file that starts with `key`, without the key and the colon.
pub(crate) fn field(path: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let text = "7f0000000000-7f0040000000 rw-p 00000000 00:00 0 \nSize: 1048576 kB\nRss:    900 kB\n\
                    AnonHugePages:  512 kB\nVmFlags: rd wr\n55d0-55e0 r--p 00000000 fe:00 12  /x: y\nRss: 4 kB\n";
        let all = parse_mappings(text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].range, 0x7f00_0000_0000..0x7f00_4000_0000);
        assert_eq!((all[0].writable, all[0].resident, all[0].huge), (true, 900 << 10, 512 << 10));
        assert_eq!((all[1].writable, all[1].resident), (false, 4 << 10));
    }

    #[test]
    fn own_process_is_seen() {
        let pid = std::process::id();
        assert!(high_water(pid).unwrap() > 0);
        assert!(mappings(pid).unwrap().iter().any(|m| m.resident > 0));
        // not this process: threads of other tests would be counted
        let mut command = Command::new("sleep");
        command.arg("60");
        let child = Process::start("sleep", command, "/dev/null".into()).unwrap();
        assert_eq!(vcpu_seconds(child.pid()), 0.0, "it has no vCPU");
        assert!(is_vcpu("CPU 0/KVM\n") && is_vcpu("vcpu-3") && is_vcpu("vCPU 1") && !is_vcpu("multifdsend_0"));
    }
}
