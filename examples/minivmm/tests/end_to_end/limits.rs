//! Processes that have run out of what the kernel grants: queued signals, descriptors.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use libtest_mimic::Failed;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::{
    common::{Lab, Outcome, Process, Suite, ensure, ensure_says},
    post_copy::post_copy_at,
};

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("limits/no_queued_signals", no_queued_signals);
    suite.kvm("limits/no_descriptor_in_the_pause/pre_copy", |lab| {
        // all that this guest writes again and again takes less than the limit, however fast this
        // machine is
        no_descriptor(lab, &["--bandwidth", "100Mbit", "--downtime-limit", "2s"])
    });
    suite.post_copy("limits/no_descriptor_in_the_pause/hybrid", "anon", |lab| {
        no_descriptor(lab, &["--strategy", "hybrid:rounds=1", "--bandwidth", "100Mbit"])
    });
    suite.post_copy("limits/no_descriptor_in_post_copy", "anon", |lab| no_descriptor(lab, &post_copy_at("100Mbit")));
    suite.unless(Threads::missing(), |suite| suite.kvm("limits/no_thread_in_the_pause", no_thread));
    suite.kvm("limits/no_descriptor_for_a_client", no_descriptor_for_a_client);
    suite.kvm("limits/silent_clients", silent_clients);
}

/// Grants a process this much of something, for now.
fn grant(process: &Process, what: Resource, current: Option<u64>) -> Outcome {
    let pid = Pid::from_raw(i32::try_from(process.pid())?).ok_or("no process")?;
    let most = getrlimit(what).maximum;
    prlimit(Some(pid), what, Rlimit { current, maximum: most })?;
    Ok(())
}

/// The descriptors that it has are all it gets.
fn no_more_descriptors(process: &Process) -> Outcome {
    grant(process, Resource::Nofile, Some(3))
}

fn descriptors_again(process: &Process) -> Outcome {
    grant(process, Resource::Nofile, getrlimit(Resource::Nofile).current)
}

fn no_queued_signals(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=4M", &["--cpus", "2"])?;
    let destination = lab.receive("destination", &[])?;
    for process in [&source, &destination] {
        grant(process, Resource::Sigpending, Some(0))?;
    }
    source.ask(&["pause"])?;
    ensure(source.status()?["state"] == "paused", || "not paused".into())?;
    source.ask(&["resume"])?;
    source.works()?;
    // throttled, and cancelled
    let client = source.start_migrate(&destination.address, &["--bandwidth", "20Mbit"])?;
    source.wait_until("it moves", |s| s["migration"]["wire_bytes"].as_u64() > Some(1 << 20))?;
    source.ask(&["cancel"])?;
    ensure(client.answer()?.code == Some(3), || "not cancelled".into())?;
    source.works()?;
    source.retry_well(&destination.address, &[])?;
    destination.works()?;
    destination.ask(&["pause"])?;
    destination.ask(&["resume"])?;
    destination.works()?;
    destination.quit()
}

/// A migration that is under way when no descriptor is left, at both ends, needs none to its end.
fn no_descriptor(lab: &Lab, options: &[&str]) -> Outcome {
    let serial = lab.arg("serial");
    let spec = "random:size=8M,data=16M,serial=1,every=5ms";
    let mut source = lab.workload("source", spec, &["--serial", &serial])?;
    let destination = lab.receive("destination", &["--serial", &serial])?;
    let client = source.start_migrate(&destination.address, options)?;
    source.wait_until("it moves", |s| s["migration"]["wire_bytes"].as_u64() > Some(1 << 20))?;
    for process in [&source, &destination] {
        no_more_descriptors(process)?;
    }
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", || {
        format!("{answer:?}; {}; {}", source.stderr(), destination.stderr())
    })?;
    source.ended_well()?;
    descriptors_again(&destination)?;
    destination.works()?;
    destination.quit()
}

/// A control group that bounds how many threads there are, removed when it is empty.
struct Threads(PathBuf);

impl Threads {
    /// Where control groups that bound threads are made, if there is such a place.
    fn place() -> Result<&'static Path, String> {
        // version 1, and version 2 if the controller is on at its root
        let pids = Path::new("/sys/fs/cgroup/pids");
        if pids.is_dir() {
            return Ok(pids);
        }
        let root = Path::new("/sys/fs/cgroup");
        match fs::read_to_string(root.join("cgroup.subtree_control")) {
            Ok(on) if on.split_whitespace().any(|controller| controller == "pids") => Ok(root),
            _ => Err("no control group bounds the number of threads here".into()),
        }
    }

    fn missing() -> Option<String> {
        let name = format!("minivmm-test-{}-try", std::process::id());
        let tried = Self::place().and_then(|place| {
            let group = place.join(name);
            fs::create_dir(&group)
                .and_then(|()| fs::remove_dir(&group))
                .map_err(|why| format!("{}: {why}", group.display()))
        });
        tried.err()
    }

    fn of(process: &Process) -> Result<Self, Failed> {
        let this = Self(Self::place()?.join(format!("minivmm-test-{}", process.pid())));
        fs::create_dir(&this.0)?;
        fs::write(this.0.join("cgroup.procs"), process.pid().to_string())?;
        Ok(this)
    }

    /// The threads that there are now are all it gets.
    fn no_more(&self) -> Outcome {
        Ok(fs::write(self.0.join("pids.max"), "1")?)
    }

    fn again(&self) -> Outcome {
        Ok(fs::write(self.0.join("pids.max"), "max")?)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // a process that is still there keeps it
        let _ = fs::remove_dir(&self.0);
    }
}

/// A migration needs no thread that it does not have when it moves; and the end of the guest is
/// noticed at the destination.
fn no_thread(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "sleep:data=24M,crash=15s", &[])?;
    let mut destination = lab.receive("destination", &[])?;
    let (here, there) = (Threads::of(&source)?, Threads::of(&destination)?);
    let client = source.start_migrate(&destination.address, &["--bandwidth", "50Mbit"])?;
    source.wait_until("it moves", |s| s["migration"]["wire_bytes"].as_u64() > Some(1 << 20))?;
    here.no_more()?;
    there.no_more()?;
    let refused = destination.ctl(&["status"])?;
    ensure(refused.code == Some(1), || format!("{refused:?}"))?;
    ensure_says(&refused.stdout, "has no thread for another client")?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}; {}; {}", source.stderr(), destination.stderr()))?;
    source.ended_well()?;
    there.again()?;
    destination.works()?;
    let status = destination.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", destination.stderr()))?;
    ensure_says(&destination.stderr(), "the VM has ended: triple fault on vCPU 0")
}

fn no_descriptor_for_a_client(lab: &Lab) -> Outcome {
    let process = lab.workload("vm", "hot:size=4M", &[])?;
    let before = process.resources()?;
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count() as u64;
    // the few numbers that are free below are soon taken by clients that say nothing
    grant(&process, Resource::Nofile, Some(open + 4))?;
    let connect = |_| UnixStream::connect(lab.path("vm")).map_err(Failed::from);
    let silent: Vec<_> = (0..31).map(connect).collect::<Result<_, _>>()?;
    let refused = process.ctl(&["status"])?;
    ensure(refused.code == Some(1), || format!("{refused:?}"))?;
    ensure_says(&refused.stdout.to_lowercase(), "too many open files")?;
    // once, and not for each of them
    process.says("can accept no client")?;
    let told = process.stderr().matches("can accept no client").count();
    ensure(told == 1, || process.stderr())?;
    drop(silent);
    descriptors_again(&process)?;
    process.works()?;
    process.is_back_at(&before)?;
    process.quit()
}

/// More connections that say nothing than there are threads for: who asks is answered.
fn silent_clients(lab: &Lab) -> Outcome {
    let process = lab.workload("vm", "hot:size=4M", &[])?;
    let connect = |_| UnixStream::connect(lab.path("vm")).map_err(Failed::from);
    let silent: Vec<_> = (0..200).map(connect).collect::<Result<_, _>>()?;
    process.works()?;
    let threads = process.threads()?.get("client").copied().unwrap_or(0);
    ensure(threads <= 64, || format!("{threads} threads for clients that say nothing"))?;
    drop(silent);
    process.quit()
}
