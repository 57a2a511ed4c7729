//! `minivmm feature`: a feature VMM borrows a VM from its home VMM, uses the VM, and returns it.
//! Between two trips the VM stays built here, in standby.

use std::{
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    engine::ephemeral::{Active, Standby},
    fence::Fence,
    text::Chain,
};
use migration_kvm::{
    fence::{ProcessFence, ProcessIdentity},
    lending::{Answer, fetch},
};
use migration_transport::{Address, bind};
use minivmm_client::{
    Impact, LendRequest, MigrateRequest, Request, SnapshotRequest, StrategyKind, ctl,
    encryption::Encrypt,
    log, report,
    values::{absolute, micros},
};
use serde_json::{Value, json};

use crate::{
    check::Checker,
    cli::{Feature, Work},
    control::{ControlSocket, ask_peer},
    instance::{Fate, Instance},
    page_stores::PageStores,
    refresh::Place,
    sealing::Sealing,
    signals::{Asked, Signals},
    vmm::{HostOptions, SerialTarget, Tenant},
};

/// The longest time until the guest arrives, from the request.
const COMING: Duration = Duration::from_secs(30);
/// The longest time of a trip, in addition to the time for which the guest is held.
const WITHIN: Duration = Duration::from_secs(60);
/// The number of attempts to return the guest to an owner that does not take it, and their
/// interval.
const RETURNS: u32 = 10;
const RETRY: Duration = Duration::from_millis(500);
/// The interval of the checks whether a home VMM that is being replaced has been replaced.
const LOOK_AT_HOME: Duration = Duration::from_millis(20);

/// Runs the command. Returns the exit status.
pub(crate) fn run(args: &Feature, signals: &Signals) -> u8 {
    match Borrower::new(args).and_then(|borrower| borrower.run(signals)) {
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
        log::announce(format!("{trip}\n"));
    } else {
        log::announce(ctl::lines(trip));
    }
}

/// A feature VMM, which borrows a VM.
struct Borrower<'a> {
    args: &'a Feature,
    instance: Arc<Instance>,
    /// The control socket of the home VMM.
    attach: PathBuf,
    /// The target of the VM's serial port.
    serial: String,
    control: PathBuf,
    listen: PathBuf,
    checker: Checker,
}

/// The end of a trip.
enum End {
    /// The guest is at its home VMM again.
    Home(Standby<Tenant>),
    /// This process has nothing more to do, and ends with this exit status.
    Over(u8),
}

/// The home VMM of the VM.
struct Owner {
    identity: Vec<u8>,
    broker: Option<PathBuf>,
    /// Whether its VM is leaving for another host.
    leaving: bool,
}

/// The guest with the report of its arrival, or the standby VM without the guest and the reason.
type Borrowed = Result<(Active<Tenant>, Value), (Standby<Tenant>, String)>;

/// Returns the place of the VM's home. A home that ended before it could answer has left its place
/// to a successor, so a failed request is repeated once.
fn place_of(home: &Path) -> Result<Value, String> {
    let place = || ask_peer(home, &Request::Place);
    place().or_else(|_| place()).map_err(|why| format!("feature: {why}"))
}

impl<'a> Borrower<'a> {
    fn new(args: &'a Feature) -> Result<Self, String> {
        match &args.work {
            // nothing is borrowed for work that is impossible with these keys
            Work::Migrate(to) => drop(args.encryption.security(Some(to))?),
            Work::Snapshot(_) | Work::Check if args.encryption.encrypt != Encrypt::None => {
                return Err("--encrypt goes with --do migrate:URL, nothing else leaves this host".into());
            }
            Work::Snapshot(_) | Work::Check => args.encryption.check()?,
        }
        let attach = absolute(&args.attach)?;
        let beside = |what: &str| {
            let mut path = attach.clone().into_os_string();
            path.push(format!(".{what}{}", process::id()));
            PathBuf::from(path)
        };
        let (control, listen) = (beside("f"), beside("g"));
        let home = place_of(&attach)?;
        let serial = home["serial"].as_str().unwrap_or("null").to_owned();
        // files that are sealed at home are sealed here as well
        let key = args.seal.seal_key_file.clone().or_else(|| home["seal_key"].as_str().map(PathBuf::from));
        let instance = Instance::new(None, Sealing::load(key.as_deref())?, PageStores::default());
        Ok(Self { args, instance, attach, serial, control, listen, checker: Checker::default() })
    }

    fn ask(&self, request: &Request) -> Result<Value, String> {
        ask_peer(&self.attach, request).map_err(|why| format!("feature: {why}"))
    }

    fn run(mut self, signals: &Signals) -> Result<u8, String> {
        let serial = self.serial.clone();
        self.end_on_signals(signals);
        let target = SerialTarget::from(serial.as_str());
        target.check().map_err(|e| format!("feature: {e}"))?;
        let host = HostOptions {
            serial: target,
            backing: None,
            tracker: None,
            pause_on_loss: false,
            shared_ram: false,
            cold: false,
        };
        self.instance.borrows();
        self.instance.set_place(Place { control: self.control.clone(), serial, broker: None });
        ControlSocket::bind(&self.control).and_then(|s| s.serve(self.instance.clone())).map_err(|e| e.to_string())?;
        let mut dormant = Standby::new(Tenant::expecting(host));
        let mut status = 0;
        for number in 1.. {
            let began = Instant::now();
            let (trip, end) = self.trip(dormant, number)?;
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
            if !self.instance.goes_on(every.saturating_sub(began.elapsed())) {
                break;
            }
        }
        if self.args.work == Work::Check
            && let Err(why) = self.stop_log()
        {
            log!("the dirty log of the VM goes on, and slows it down a little: {why}");
        }
        self.instance.exit(status);
        Ok(self.instance.wait_exit())
    }

    /// Makes one trip: borrows the guest, does the work, and returns the guest.
    fn trip(&mut self, dormant: Standby<Tenant>, number: u32) -> Result<(Value, End), String> {
        let (guest, lent, owner) = self.borrow(dormant)?;
        let began = Instant::now();
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
        if let Fate::Here = self.instance.fate() {
            self.instance.hold(self.args.hold.saturating_sub(began.elapsed()));
        }
        trip["held_ms"] = json!(began.elapsed().as_secs_f64() * 1e3);
        let back = trip["borrow"]["back"].as_str().and_then(|back| back.parse().ok());
        let (end, returned) = self.give_back(guest, back.as_ref(), &owner);
        trip["return"] = returned;
        Ok((trip, end))
    }

    /// Waits for the guest, and has its owner hand it over. Returns the guest, the report of the
    /// hand-over, and the owner's identity. If the owner is replaced meanwhile, its successor is
    /// asked.
    fn borrow(&self, mut dormant: Standby<Tenant>) -> Result<(Active<Tenant>, Value, Vec<u8>), String> {
        let deadline = Instant::now() + COMING;
        let mut owner = self.owner()?;
        loop {
            let why = match self.borrow_from(&owner, dormant)? {
                Ok((guest, report)) => return Ok((guest, report, owner.identity)),
                Err((back, why)) => {
                    dormant = back;
                    why
                }
            };
            owner = self.next_owner(&owner, deadline).ok_or(why)?;
        }
    }

    fn owner(&self) -> Result<Owner, String> {
        let home = place_of(&self.attach)?;
        let identity = serde_json::from_value(home["identity"].clone()).map_err(|e| format!("feature: {e}"))?;
        let broker = home["broker"].as_str().map(PathBuf::from);
        Ok(Owner { identity, broker, leaving: home["leaving"] == true })
    }

    /// Returns the owner to ask after `refused` has refused: the process that has replaced it, or
    /// the same process, if its VM was leaving and now stays.
    fn next_owner(&self, refused: &Owner, deadline: Instant) -> Option<Owner> {
        let mut was_leaving = false;
        while Instant::now() < deadline {
            let found = self.owner().ok()?;
            if found.identity != refused.identity || was_leaving && !found.leaving {
                return Some(found);
            }
            if !found.leaving {
                return None;
            }
            was_leaving = true;
            thread::sleep(LOOK_AT_HOME);
        }
        None
    }

    /// Has the home VMM stop the dirty log, which no process reads any more.
    fn stop_log(&self) -> Result<(), String> {
        let owner = self.owner()?;
        let asked = self.ask(&Request::StopLog);
        let asked = asked.or_else(|why| {
            self.next_owner(&owner, Instant::now() + COMING).ok_or(why)?;
            self.ask(&Request::StopLog)
        });
        asked.map(drop)
    }

    fn borrow_from(&self, owner: &Owner, dormant: Standby<Tenant>) -> Result<Borrowed, String> {
        self.instance.borrows_from(&self.attach, owner.broker.clone());
        let listen = Address::Unix(self.listen.clone());
        let mut listener = bind(&listen).map_err(|e| format!("{listen}: {e}"))?;
        let identity = ProcessIdentity::own().map_err(|e| format!("feature: {e}"))?;
        let within = self.args.within.unwrap_or(self.args.hold.saturating_add(WITHIN));
        let request = Request::Lend(LendRequest {
            to: listener.address(),
            control: self.control.clone(),
            lender: Some(owner.identity.clone()),
            borrower: identity.encode(),
            pid: process::id(),
            within_us: micros(within),
        });
        let awaiting = dormant.await_guest(self.instance.visit_options(COMING));
        let attach = self.attach.clone();
        let ask = move || {
            let answer = ask_peer(&attach, &request);
            Answer { has_left: answer.as_ref().is_ok_and(|report| report["outcome"] == "completed"), answer }
        };
        let fetched = fetch(awaiting, &mut *listener, owner.identity.clone(), COMING, ask);
        let fetched = fetched.map_err(|e| format!("feature: no thread: {e}"))?;
        let answer = fetched.answer.unwrap_or_else(|| Err("the VM's home does not answer".into()));
        Ok(match (fetched.guest, answer) {
            (Ok(guest), Ok(report)) => Ok((guest, report)),
            // The guest is here nevertheless. Its owner may be gone, and then the guest cannot be
            // returned.
            (Ok(guest), Err(why)) => Ok((guest, report::not_begun("handover", &why))),
            (Err((dormant, _)), Ok(report)) => {
                let reason = report["reason"].as_str().unwrap_or("the VM's home gives no reason");
                Err((dormant, format!("the VM was not lent: {reason}")))
            }
            (Err((dormant, error)), Err(why)) => {
                Err((dormant, format!("the VM was not lent ({}): {why}", Chain(&error))))
            }
        })
    }

    fn snapshot(&self, file: &str) -> Result<(Value, Option<String>), String> {
        let request = SnapshotRequest {
            out: absolute(file)?,
            downtime_limit: Duration::from_millis(100),
            timeout: Duration::from_secs(60),
            impact: Impact::Balanced,
            progress: false,
        };
        Ok(judged(self.instance.snapshot(&request, &mut |_| {})?))
    }

    fn migrate(&self, to: &Address) -> Result<(Value, Option<String>), String> {
        let encryption = self.args.encryption.clone();
        let request = MigrateRequest { encryption, ..MigrateRequest::plain(to.clone(), StrategyKind::PreCopy, 2) };
        Ok(judged(self.instance.migrate(&request, &mut |_| {})?))
    }

    /// Hands the guest back. If its owner has died, or does not take the guest, this process is the
    /// guest's home from now on.
    fn give_back(&self, mut guest: Active<Tenant>, to: Option<&Address>, owner: &[u8]) -> (End, Value) {
        let mut last = report::not_begun("handover", "its home has not said where it takes the VM back");
        for _ in 0..RETURNS {
            match self.instance.fate() {
                Fate::Here => {}
                // the home VMM ends as after a migration, or an end, of a guest that runs there
                Fate::Moved(report) => return (self.gone(report, 0), Value::Null),
                Fate::Ended => {
                    let report = report::not_begun("handover", "the guest has ended by itself");
                    return (self.gone(report.clone(), 5), report);
                }
            }
            if let Some(to) = to {
                let (gone, report) = self.instance.return_guest(guest, to, owner);
                last = report;
                guest = match gone {
                    Some(Ok(dormant)) => return (End::Home(dormant), last),
                    Some(Err(guest)) => guest,
                    None => return (End::Over(5), last),
                };
            }
            if ProcessFence.is_dead(owner) {
                log!("the VM's home has died; it stays here, at {}", self.attach.display());
                self.instance.inherit_place(&self.control, &self.attach);
                return (self.serve(guest), last);
            }
            thread::sleep(RETRY);
        }
        let why = last["reason"].as_str().unwrap_or_default().to_owned();
        log!("the VM's home does not take it back; it stays here, at {}: {why}", self.control.display());
        (self.serve(guest), last)
    }

    /// Reports to the home VMM that the guest will not return.
    fn gone(&self, report: Value, status: u8) -> End {
        if let Err(why) = self.ask(&Request::Gone { report, status }) {
            log!("the VM's home is not told that it has gone: {why}");
        }
        End::Over(status)
    }

    /// Serves as the guest's home until this process is to end.
    fn serve(&self, _guest: Active<Tenant>) -> End {
        self.instance.stay();
        End::Over(self.instance.wait_exit())
    }

    /// Makes a signal end the command after the guest has returned home. A second signal ends the
    /// command immediately.
    fn end_on_signals(&self, signals: &Signals) {
        let (instance, listen) = (self.instance.clone(), self.listen.clone());
        signals.end_by(move |asked| match asked {
            Asked::ToEnd(status) => {
                log!("ends as soon as the VM is at home");
                instance.exit(status);
            }
            Asked::Again => {
                instance.end_by_signal(asked);
                // this file exists during a trip only
                let _ = std::fs::remove_file(&listen);
            }
        });
    }
}

impl Drop for Borrower<'_> {
    fn drop(&mut self) {
        for path in [&self.control, &self.listen] {
            // the files may be gone already
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Returns a report, with the reason if the work has not completed.
fn judged(report: Value) -> (Value, Option<String>) {
    let wrong = (report["outcome"] != "completed").then(|| report["reason"].as_str().unwrap_or("no reason").to_owned());
    (report, wrong)
}
