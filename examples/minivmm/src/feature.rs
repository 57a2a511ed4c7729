//! `minivmm feature`: a VMM with a feature borrows a VM from the one at which it is at home, uses it, and gives it back.
//! Between two trips the VM stays built here, at rest.

use std::{
    path::PathBuf,
    process,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use migration_core::engine::ephemeral::{Dormant, Resident};
use migration_kvm::fence::ProcessFence;
use migration_transport::{Address, bind};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use crate::{
    check::Checker,
    cli::{Feature, Work},
    client,
    control::{ControlSocket, MigrateRequest, Request, SnapshotRequest, ask},
    instance::{Instance, LendRequest},
    refresh::Place,
    report,
    vmm::{HostOptions, SerialTarget, Tenant},
};

/// How long the guest may take to come, once it was asked for.
const COMING: Duration = Duration::from_secs(30);
/// How long a trip may take beyond the time for which the guest is held.
const WITHIN: Duration = Duration::from_secs(60);
/// How often an owner that does not take its guest back is tried again, and at which intervals.
const RETURNS: u32 = 10;
const RETRY: Duration = Duration::from_millis(500);

/// Runs the command; the exit status.
pub(crate) fn run(args: &Feature) -> u8 {
    match Borrower::new(args).and_then(|borrower| borrower.run()) {
        Ok(status) => status,
        Err(why) => {
            let report = json!({"feature": name(&args.work), "outcome": "failed", "reason": why});
            show(args, &report);
            1
        }
    }
}

fn name(work: &Work) -> &'static str {
    match work {
        Work::Snapshot(_) => "snapshot",
        Work::Migrate(_) => "migrate",
        Work::Check => "check",
    }
}

fn show(args: &Feature, trip: &Value) {
    if args.json {
        println!("{trip}");
    } else {
        print!("{}", client::lines("", trip));
    }
}

/// A VMM that borrows.
struct Borrower<'a> {
    args: &'a Feature,
    instance: Arc<Instance>,
    control: PathBuf,
    listen: PathBuf,
    checker: Checker,
}

/// How a trip has ended.
enum End {
    /// The guest is at home again.
    Home(Dormant<Tenant>),
    /// This process has nothing to do any more, and ends with this status.
    Over(u8),
}

impl<'a> Borrower<'a> {
    fn new(args: &'a Feature) -> Result<Self, String> {
        let beside = |what: &str| {
            let mut path = args.attach.clone().into_os_string();
            path.push(format!(".{what}{}", process::id()));
            PathBuf::from(path)
        };
        let (control, listen) = (beside("f"), beside("g"));
        Ok(Self { args, instance: Instance::new(None), control, listen, checker: Checker::default() })
    }

    fn run(mut self) -> Result<u8, String> {
        let attach = |why: String| format!("feature: {why}");
        let home = ask(&self.args.attach, &Request::Place, |_| {}).map_err(attach)?;
        let serial = home["serial"].as_str().unwrap_or("null").to_owned();
        let owner: Vec<u8> = serde_json::from_value(home["identity"].clone()).map_err(|e| format!("feature: {e}"))?;
        self.end_on_signals()?;
        let host = HostOptions {
            serial: SerialTarget::from(serial.as_str()),
            backing: None,
            tracker: None,
            pause_on_loss: false,
            shared_ram: false,
        };
        self.instance.borrows();
        self.instance.set_place(Place { control: self.control.clone(), serial, broker: None });
        ControlSocket::bind(&self.control).and_then(|s| s.serve(self.instance.clone())).map_err(|e| e.to_string())?;
        let mut dormant = Dormant::new(Tenant::expecting(host));
        let mut status = 0;
        for number in 1.. {
            let began = Instant::now();
            let (trip, end) = self.trip(dormant, number, &owner)?;
            show(self.args, &trip);
            match end {
                End::Home(back) => dormant = back,
                End::Over(status) => return Ok(status),
            }
            if trip["outcome"] != "completed" {
                status = 1;
            }
            let every = self.args.every.filter(|_| self.args.times.is_none_or(|times| number < times));
            let Some(every) = every else { break };
            if !self.instance.runs_on(every.saturating_sub(began.elapsed())) {
                break;
            }
        }
        self.instance.exit(status);
        Ok(self.instance.wait_exit())
    }

    /// There and back, once.
    fn trip(&mut self, dormant: Dormant<Tenant>, number: u32, owner: &[u8]) -> Result<(Value, End), String> {
        let (guest, lent) = self.borrow(dormant)?;
        let began = Instant::now();
        let back: Address = lent["back"].as_str().unwrap_or_default().parse().map_err(|e| format!("feature: {e}"))?;
        let machine = guest.vm().machine().cloned().ok_or("feature: no machine came")?;
        self.instance.visited(&machine, guest.epoch());
        let done = match &self.args.work {
            Work::Snapshot(file) => self.snapshot(&file.replace("{trip}", &number.to_string())),
            Work::Migrate(to) => self.migrate(to),
            Work::Check => self.checker.check(&machine),
        };
        let (result, wrong) = done.unwrap_or_else(|why| (Value::Null, Some(why)));
        let mut trip = json!({
            "feature": name(&self.args.work), "trip": number, "outcome": if wrong.is_some() { "failed" } else { "completed" },
            "reason": wrong, "result": result, "borrow": lent, "return": null, "held_ms": null,
        });
        if matches!(self.args.work, Work::Migrate(_)) && trip["outcome"] == "completed" {
            // it is not to come back: whoever had it at home ends, as after a migration of its own
            let told = ask(&self.args.attach, &Request::Gone { report: result, status: 0 }, |_| {});
            if let Err(why) = told {
                eprintln!("minivmm: the VM's home is not told that it has gone: {why}");
            }
            return Ok((trip, End::Over(0)));
        }
        self.instance.hold(self.args.hold.saturating_sub(began.elapsed()));
        trip["held_ms"] = json!(began.elapsed().as_secs_f64() * 1e3);
        let (end, returned) = self.give_back(guest, &back, owner);
        trip["return"] = returned;
        Ok((trip, end))
    }

    /// Waits for the guest, and has its owner hand it over; the report of that.
    fn borrow(&self, dormant: Dormant<Tenant>) -> Result<(Resident<Tenant>, Value), String> {
        // of a process of this number that has died
        let _ = std::fs::remove_file(&self.listen);
        let listen = Address::Unix(self.listen.clone());
        let mut listener = bind(&listen).map_err(|e| format!("{listen}: {e}"))?;
        let identity = migration_kvm::fence::ProcessIdentity::own().map_err(|e| format!("feature: {e}"))?;
        let within = self.args.within.unwrap_or(self.args.hold.saturating_add(WITHIN));
        let request = Request::Lend(LendRequest {
            to: listener.address(),
            control: self.control.clone(),
            borrower: identity.encode(),
            pid: process::id(),
            within_us: u64::try_from(within.as_micros()).unwrap_or(u64::MAX),
        });
        let awaiting = dormant.await_guest(self.instance.visit_options(COMING));
        let (handle, attach) = (awaiting.handle(), self.args.attach.clone());
        let (tx, answer) = mpsc::channel();
        let asks = move || {
            let answer = ask(&attach, &request, |_| {});
            if answer.as_ref().map_or(true, |report| report["outcome"] != "completed") {
                // nothing will come, unless it has
                handle.stop();
            }
            // who asked may have given up
            let _ = tx.send(answer);
        };
        thread::Builder::new().name("borrow".into()).spawn(asks).map_err(|e| format!("feature: no thread: {e}"))?;
        let came = awaiting.wait_for_guest(&mut *listener);
        let _ = std::fs::remove_file(&self.listen);
        let answer = answer.recv_timeout(COMING).map_err(|_| "feature: the VM's home does not answer".to_owned());
        match (came, answer) {
            (Ok(guest), Ok(Ok(report))) => Ok((guest, report)),
            // it is here all the same, and its owner is gone: there is no way back
            (Ok(guest), Ok(Err(why)) | Err(why)) => {
                Ok((guest, json!({"outcome": "completed", "reason": why, "back": "unix:/nowhere"})))
            }
            (Err(_), Ok(Ok(report))) => {
                let reason = report["reason"].as_str().unwrap_or("the VM's home gives no reason");
                Err(format!("the VM was not lent: {reason}"))
            }
            (Err(_), Ok(Err(why))) => Err(format!("the VM was not lent: {why}")),
            (Err((_, error)), Err(_)) => Err(format!("the VM did not come: {error}")),
        }
    }

    fn snapshot(&self, file: &str) -> Result<(Value, Option<String>), String> {
        let request = SnapshotRequest {
            out: std::path::absolute(file).map_err(|e| format!("{file}: {e}"))?,
            downtime_limit_us: 100_000,
            timeout_us: 60_000_000,
            impact: "balanced".into(),
            progress: false,
        };
        self.instance.snapshot(&request, &mut |_| {}).map(judged)
    }

    fn migrate(&self, to: &Address) -> Result<(Value, Option<String>), String> {
        self.instance.migrate(&MigrateRequest::plain(to, "pre-copy", 2), &mut |_| {}).map(judged)
    }

    /// Hands the guest back. If its owner has died, this is its home from now on.
    fn give_back(&self, mut guest: Resident<Tenant>, to: &Address, owner: &[u8]) -> (End, Value) {
        let mut last = Value::Null;
        for _ in 0..RETURNS {
            if self.instance.guest_has_ended() {
                // its home would wait for ever
                let report = report::not_begun("handover", "the guest has ended by itself");
                if let Err(why) = ask(&self.args.attach, &Request::Gone { report: report.clone(), status: 5 }, |_| {}) {
                    eprintln!("minivmm: the VM's home is not told that its guest has ended: {why}");
                }
                return (End::Over(5), report);
            }
            let (gone, report) = self.instance.return_guest(guest, to, owner);
            guest = match gone {
                Ok(dormant) => return (End::Home(dormant), report),
                Err(guest) => guest,
            };
            last = report;
            if dead(owner) {
                eprintln!("minivmm: the VM's home has died; it stays here, at {}", self.args.attach.display());
                self.instance.inherit_place(&self.control, &self.args.attach);
                return (End::Over(self.serve(&guest)), last);
            }
            thread::sleep(RETRY);
        }
        let why = last["reason"].as_str().unwrap_or_default().to_owned();
        eprintln!("minivmm: the VM's home does not take it back; it stays here, at {}: {why}", self.control.display());
        (End::Over(self.serve(&guest)), last)
    }

    /// Is the guest's home.
    fn serve(&self, _guest: &Resident<Tenant>) -> u8 {
        self.instance.wait_exit()
    }

    /// SIGINT and SIGTERM end the command, but not before the guest is at home; a second one ends it at once.
    fn end_on_signals(&self) -> Result<(), String> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block().map_err(|e| format!("feature: {e}"))?;
        let instance = self.instance.clone();
        let body = move || {
            let mut second = false;
            while let Ok(signal) = signals.wait() {
                let status = 128 + signal as u8;
                if second {
                    process::exit(status.into());
                }
                second = true;
                eprintln!("minivmm: ends as soon as the VM is at home");
                instance.exit(status);
            }
        };
        thread::Builder::new().name("signals".into()).spawn(body).map(drop).map_err(|e| e.to_string())
    }
}

impl Drop for Borrower<'_> {
    fn drop(&mut self) {
        for path in [&self.control, &self.listen] {
            // they may be gone
            let _ = std::fs::remove_file(path);
        }
    }
}

fn dead(owner: &[u8]) -> bool {
    use migration_core::fence::Fence;
    ProcessFence.is_dead(owner)
}

/// A report, and what it says is wrong.
fn judged(report: Value) -> (Value, Option<String>) {
    let wrong = (report["outcome"] != "completed").then(|| report["reason"].as_str().unwrap_or("no reason").to_owned());
    (report, wrong)
}
