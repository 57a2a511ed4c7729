//! Ephemeral virtualization: a VM is borrowed by a VMM that has a feature, and given back.

use std::{fs, time::Duration};

use libtest_mimic::Failed;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    broker::{ask, kept_vms},
    common::{Client, Lab, Outcome, Process, Suite, beats_in_order, ensure, ensure_says, usage, wait_for},
    elf,
    fail_safe::checks_all,
    faults::a_while,
};

const GUEST: &str = "random:size=16M,serial=1,every=5ms";
const BACKINGS: [&str; 2] = ["memfd", "hugetlb"];
/// Round trips of each kind with a snapshot.
const TRIPS: usize = 13;
/// Moments at which a process is killed.
const KILLS: u64 = 12;
/// What some trips there and back take.
const SOME_TRIPS: Duration = Duration::from_millis(300);

/// Of a backing, with a number of vCPUs.
type Kind = fn(&Lab, &str, &str) -> Outcome;

pub(crate) fn add(suite: &mut Suite) {
    for backing in BACKINGS {
        for cpus in ["1", "4"] {
            for (kind, trial) in [("snapshots", snapshots as Kind), ("check", check)] {
                let name = format!("ephemeral/{kind}/{backing}/{cpus}_cpus");
                let run = move |lab: &Lab| trial(lab, backing, cpus);
                suite.kvm_backed(name, backing, run);
            }
        }
    }
    suite.kvm("ephemeral/migrate", migrate);
    suite.kvm("ephemeral/migrate_to_nowhere", migrate_to_nowhere);
    suite.kvm("ephemeral/migrate_encrypted", migrate_encrypted);
    suite.kvm("ephemeral/disk_full", disk_full);
    suite.kvm("ephemeral/refused", refused);
    suite.kvm("ephemeral/asked_back", asked_back);
    suite.kvm("ephemeral/late", late);
    suite.kvm("ephemeral/interrupted", interrupted);
    suite.kvm("ephemeral/guest_ends", guest_ends);
    suite.kvm("ephemeral/moved_away_by_a_user", moved_away_by_a_user);
    suite.kvm("ephemeral/home_dies_and_a_signal_comes", home_dies_and_a_signal_comes);
    suite.kvm("ephemeral/home_is_refreshed_between_trips", home_is_refreshed_between_trips);
    suite.kvm("ephemeral/home_is_refreshed_all_the_time", home_is_refreshed_all_the_time);
    suite.kvm("ephemeral/many_borrowers", many_borrowers);
    suite.kvm("ephemeral/from_another_directory", from_another_directory);
    suite.kvm("ephemeral/other_techniques_afterwards", other_techniques_afterwards);
    suite.kvm("ephemeral/borrower_dies", borrower_dies);
    suite.kvm("ephemeral/home_dies", home_dies);
}

fn home(lab: &Lab, args: &[&str]) -> Result<Process, Failed> {
    let serial = lab.arg("serial");
    lab.workload("home", GUEST, &[&["--serial", &serial][..], args].concat())
}

fn serial_is_whole(lab: &Lab) -> Outcome {
    serial_goes_on(lab, "ready random")
}

fn serial_goes_on(lab: &Lab, first: &str) -> Outcome {
    let beats = beats_in_order(&fs::read_to_string(lab.path("serial"))?, first)?;
    ensure(beats > 2, || "hardly a line".into())
}

fn at_home(home: &Process) -> Result<Value, Failed> {
    home.wait_until("the guest is at home", |s| s["state"] == "running")
}

/// A feature at work, with the guest.
fn lent(home: &Process, args: &[&str]) -> Result<Client, Failed> {
    let client = home.start_feature(args)?;
    home.wait_state("lent")?;
    Ok(client)
}

fn snapshots(lab: &Lab, backing: &str, cpus: &str) -> Outcome {
    let home = home(lab, &["--backing", backing, "--cpus", cpus])?;
    let work = format!("snapshot:{}-{{trip}}", lab.arg("snapshot"));
    let (code, trips, stderr) =
        home.feature(&["--do", &work, "--every", "1ms", "--times", &TRIPS.to_string(), "--within", "10m"])?;
    ensure(code == Some(0) && trips.len() == TRIPS, || format!("{code:?} {trips:?} {stderr}"))?;
    for trip in &trips {
        let told = || format!("{trip}");
        ensure(trip["outcome"] == "completed" && trip["result"]["outcome"] == "completed", told)?;
        for way in ["borrow", "return"] {
            ensure(trip[way]["outcome"] == "completed" && trip[way]["memory_copied_bytes"] == 0, told)?;
            ensure(trip[way]["downtime_ms"].as_f64() > Some(0.0), told)?;
        }
    }
    let status = at_home(&home)?;
    ensure(status["epoch"].as_u64() == Some(2 * TRIPS as u64), || format!("{status}"))?;
    checks_all(&home)?;
    home.quit()?;
    serial_is_whole(lab)?;
    for trip in 1..=TRIPS {
        let file = lab.arg(&format!("snapshot-{trip}"));
        let vm = lab.run("restored", &["--restore", &file, "--backing", "thp"])?;
        checks_all(&vm)?;
        vm.quit()?;
        fs::remove_file(file)?;
    }
    Ok(())
}

/// What changed at either VMM is in the log.
fn check(lab: &Lab, backing: &str, cpus: &str) -> Outcome {
    // slowly, so that pages change between two looks, and not all of them during one
    let spec = "rate:pages=2000,serial=1,every=5ms";
    let options = ["--backing", backing, "--cpus", cpus, "--serial", &lab.arg("serial")];
    let home = lab.workload("home", spec, &options)?;
    let (code, trips, stderr) =
        home.feature(&["--do", "check", "--every", "150ms", "--times", "6", "--hold", "20ms"])?;
    ensure(code == Some(0) && trips.len() == 6, || format!("{code:?} {trips:?} {stderr}"))?;
    for (n, trip) in trips.iter().enumerate() {
        let result = &trip["result"];
        let told = || format!("{n}: {result}");
        ensure(result["not_logged"] == 0 && result["workload_errors"] == 0, told)?;
        ensure(result["pages"] == (64 << 8) && result["zero"].as_u64() > Some(0), told)?;
        if n == 0 {
            ensure(result["logged"].is_null() && result["changed"] == 0, told)?;
        } else {
            // the guest writes all the time, and far from everywhere
            let (logged, changed) = (result["logged"].as_u64(), result["changed"].as_u64());
            ensure(changed > Some(0) && logged > Some(0) && logged < Some(64 << 8), told)?;
        }
    }
    at_home(&home)?;
    home.works()?;
    home.quit()?;
    serial_goes_on(lab, "ready rate")
}

fn migrate(lab: &Lab) -> Outcome {
    let mut home = home(lab, &["--backing", "memfd"])?;
    let there = lab.receive("there", &["--serial", &lab.arg("serial")])?;
    let (code, trips, stderr) = home.feature(&["--do", &format!("migrate:{}", there.address)])?;
    ensure(code == Some(0) && trips.len() == 1, || format!("{code:?} {trips:?} {stderr}"))?;
    ensure(trips[0]["result"]["strategy"] == "pre-copy" && trips[0]["return"].is_null(), || format!("{trips:?}"))?;
    home.ended_well()?;
    checks_all(&there)?;
    let status = there.status()?;
    ensure(status["epoch"] == 2 && status["backing"] == "memfd", || format!("{status}"))?;
    there.quit()?;
    serial_is_whole(lab)
}

fn migrate_to_nowhere(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let (code, trips, _) = home.feature(&["--do", &format!("migrate:unix:{}", lab.arg("nobody"))])?;
    ensure(code == Some(1) && trips[0]["outcome"] == "failed", || format!("{code:?} {trips:?}"))?;
    ensure(trips[0]["return"]["outcome"] == "completed", || format!("{trips:?}"))?;
    at_home(&home)?;
    checks_all(&home)?;
    home.quit()?;
    serial_is_whole(lab)
}

/// Out to a destination that takes only encrypted migrations. Without the key the guest goes home;
/// a key that will not do is found before it is borrowed.
fn migrate_encrypted(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    let secure = ["--encrypt", "aes256-gcm", "--psk-file", &key];
    let mut home = home(lab, &["--backing", "memfd"])?;
    let there = lab.receive("there", &[&secure[..], &["--serial", &lab.arg("serial")]].concat())?;
    let out = format!("migrate:{}", there.address);
    let reason = |trips: &[Value]| trips[0]["reason"].as_str().unwrap_or("").to_owned();
    let (code, trips, _) = home.feature(&["--do", &out])?;
    ensure(code == Some(1) && trips[0]["return"]["outcome"] == "completed", || format!("{code:?} {trips:?}"))?;
    ensure_says(&reason(&trips), "takes only encrypted migrations")?;
    let epoch = at_home(&home)?["epoch"].clone();
    for (work, options, words) in [
        (out.as_str(), &["--encrypt", "aes256-gcm", "--psk-file", "/no/such/key"][..], "No such file"),
        (out.as_str(), &["--encrypt", "aes256-gcm"][..], "--encrypt needs"),
        ("check", &secure[..], "--encrypt goes with --do migrate:URL"),
    ] {
        let (code, trips, _) = home.feature(&[&["--do", work], options].concat())?;
        ensure(code == Some(1), || format!("{code:?} {trips:?}"))?;
        ensure_says(&reason(&trips), words)?;
        ensure(home.status()?["epoch"] == epoch, || format!("it was lent all the same: {trips:?}"))?;
    }
    let (code, trips, stderr) = home.feature(&[&["--do", &out], &secure[..]].concat())?;
    ensure(code == Some(0) && trips[0]["result"]["outcome"] == "completed", || format!("{code:?} {trips:?} {stderr}"))?;
    home.ended_well()?;
    checks_all(&there)?;
    there.quit()?;
    serial_is_whole(lab)
}

fn disk_full(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let (code, trips, _) = home.feature(&["--do", "snapshot:/dev/full/snapshot"])?;
    ensure(code == Some(1) && trips[0]["outcome"] == "failed", || format!("{code:?} {trips:?}"))?;
    ensure_says(trips[0]["reason"].as_str().unwrap_or(""), "/dev/full")?;
    at_home(&home)?;
    checks_all(&home)?;
    home.quit()
}

fn refused(lab: &Lab) -> Outcome {
    let private = lab.workload("private", "hot:size=8M", &["--backing", "thp"])?;
    let (code, told, _) = private.feature(&["--do", "check"])?;
    ensure(code == Some(1), || format!("{told:?}"))?;
    ensure_says(told[0]["reason"].as_str().unwrap_or(""), "memory")?;
    private.works()?;
    private.quit()?;
    let (code, stdout, _) = usage(&["feature", "--json", "--attach", &lab.arg("nobody"), "--do", "check"])?;
    ensure(code == Some(1), || stdout.clone())?;
    ensure_says(&stdout, "nobody")?;
    let (code, _, stderr) = usage(&["feature", "--attach", &lab.arg("nobody"), "--do", "nothing"])?;
    ensure(code == Some(2), || stderr.clone())?;

    // whoever has no guest can do nothing with it
    let home = home(lab, &["--backing", "memfd"])?;
    let client = lent(&home, &["--do", "check", "--hold", "1h"])?;
    let there = lab.arg("there");
    for request in [
        &["pause"][..],
        &["resume"],
        &["snapshot", "--out", &there],
        &["migrate", "--to", "unix:/nowhere"],
        &["refresh"],
    ] {
        let answer = home.ctl(request)?;
        ensure(answer.code == Some(1), || format!("{request:?}: {answer:?}"))?;
        ensure(answer.stdout.contains("lent"), || format!("{request:?}: {answer:?}"))?;
    }
    let (code, told, _) = home.feature(&["--do", "check"])?;
    ensure(code == Some(1), || format!("{told:?}"))?;
    ensure_says(told[0]["reason"].as_str().unwrap_or(""), "lent")?;
    let status = home.status()?;
    ensure(status["lent"]["pid"] == client.pid() && status["lent"]["overdue"] == false, || format!("{status}"))?;
    client.signal(Signal::SIGTERM)?;
    client.answer()?;
    at_home(&home)?;
    home.works()?;
    home.quit()?;
    serial_is_whole(lab)
}

/// It would keep the guest for an hour, and gives it back when it is asked to.
fn asked_back(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let client = home.start_feature(&["--do", "check", "--hold", "1h", "--within", "200ms"])?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["return"]["outcome"] == "completed", || format!("{answer:?}"))?;
    home.says("late")?;
    let status = at_home(&home)?;
    ensure(status["lent"].is_null(), || format!("{status}"))?;
    home.works()?;
    home.quit()?;
    serial_is_whole(lab)
}

/// It cannot give the guest back for a while: the home says so, and waits.
fn late(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let mut client = None;
    for within in ["500ms", "2s", "8s", "30s"] {
        let mut borrower = home.start_feature(&["--do", "check", "--hold", "1h", "--within", within])?;
        let has_guest = || Ok::<_, Failed>(home.status()?["state"] == "lent");
        wait_for("it has the guest, or had it", || Ok((has_guest()? || borrower.has_ended()?).then_some(())))?;
        if !borrower.has_ended()? {
            borrower.signal(Signal::SIGSTOP)?;
            if has_guest()? {
                client = Some(borrower);
                break;
            }
            borrower.signal(Signal::SIGCONT)?;
        }
        // it was asked before it could be stopped
        borrower.answer()?;
        at_home(&home)?;
    }
    let client = client.ok_or("always too late")?;
    home.wait_until("the guest is overdue", |s| s["lent"]["overdue"] == true)?;
    ensure(home.status()?["state"] == "lent", || "nobody has the guest, or two have".into())?;
    client.signal(Signal::SIGCONT)?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    at_home(&home)?;
    home.works()?;
    home.quit()?;
    serial_is_whole(lab)
}

fn interrupted(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let client = lent(&home, &["--do", "check", "--hold", "1h", "--every", "1h"])?;
        client.signal(signal)?;
        let answer = client.answer()?;
        ensure(answer.code == Some(128 + signal as i32), || format!("{answer:?}"))?;
        at_home(&home)?;
        home.works()?;
    }
    home.quit()?;
    serial_is_whole(lab)
}

/// By itself, while it is away.
fn guest_ends(lab: &Lab) -> Outcome {
    let kernel = lab.arg("kernel");
    fs::write(&kernel, elf::triple_fault())?;
    let args = ["--memory", "64M", "--kernel", &kernel, "--paused", "--backing", "memfd"];
    let mut home = lab.run("home", &args)?;
    let mut client = lent(&home, &["--do", "check", "--hold", "1h"])?;
    let status = home.wait_state("lent")?;
    let borrower = status["lent"]["control"].as_str().unwrap_or("").to_owned();
    wait_for("the guest runs, and has ended", || {
        // the answer may be lost with the process
        let _ = usage(&["ctl", "--control", &borrower, "resume"])?;
        Ok(client.has_ended()?.then_some(()))
    })?;
    let answer = client.answer()?;
    ensure(answer.code == Some(5), || format!("{answer:?}"))?;
    ensure_says(&answer.stderr, "triple fault")?;
    let status = home.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", home.stderr()))
}

/// While it is borrowed somebody moves it from there: it does not come back, and its home ends
/// well.
fn moved_away_by_a_user(lab: &Lab) -> Outcome {
    let mut home = home(lab, &["--backing", "memfd"])?;
    let there = lab.receive("there", &["--serial", &lab.arg("serial")])?;
    let client = lent(&home, &["--do", "check", "--hold", "1h"])?;
    let status = home.wait_state("lent")?;
    let borrower = status["lent"]["control"].as_str().unwrap_or("").to_owned();
    wait_for("the guest moves", || {
        let (code, _, _) = usage(&["ctl", "--control", &borrower, "migrate", "--to", &there.address])?;
        Ok((code == Some(0)).then_some(()))
    })?;
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["return"].is_null(), || format!("{answer:?}"))?;
    home.ended_well()?;
    checks_all(&there)?;
    there.quit()?;
    serial_is_whole(lab)
}

/// The borrower was told to end, but not to take the guest along.
fn home_dies_and_a_signal_comes(lab: &Lab) -> Outcome {
    let mut home = home(lab, &["--backing", "memfd"])?;
    let mut client = lent(&home, &["--do", "check", "--hold", "1h"])?;
    home.kill()?;
    client.signal(Signal::SIGTERM)?;
    wait_for("the borrower is the guest's home", || {
        ensure(!client.has_ended()?, || "it has ended, and the guest with it".into())?;
        Ok(home.status().is_ok_and(|s| s["state"] == "running" && s["pid"] == client.pid()).then_some(()))
    })?;
    checks_all(&home)?;
    home.ask(&["quit"])?;
    wait_for("the borrower ends", || Ok(client.has_ended()?.then_some(())))?;
    serial_is_whole(lab)
}

fn home_is_refreshed_between_trips(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let client = home.start_feature(&["--do", "check", "--every", "500ms", "--times", "3"])?;
    home.wait_until("a trip is over", |s| s["state"] == "running" && s["epoch"].as_u64() >= Some(2))?;
    // it may just be away again
    let refreshed = wait_for("a successor", || {
        let answer = home.ctl(&["refresh"])?;
        Ok((answer.code == Some(0)).then_some(answer.json))
    })?;
    let (code, trips, stderr) = client.trips()?;
    ensure(code == Some(0) && trips.len() == 3, || format!("{code:?} {trips:?} {stderr}"))?;
    let status = at_home(&home)?;
    ensure(status["pid"] == refreshed["pid"], || format!("{status}"))?;
    successor_quits(lab, &home)
}

/// The home is no child of the trial by now.
fn successor_quits(lab: &Lab, home: &Process) -> Outcome {
    home.works()?;
    home.ask(&["quit"])?;
    wait_for("the control socket to go", || Ok((!lab.path("home").exists()).then_some(())))?;
    serial_is_whole(lab)
}

/// Trips begin at any moment of a refresh.
fn home_is_refreshed_all_the_time(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let mut client = home.start_feature(&["--do", "check", "--every", "600ms"])?;
    let mut refreshed = 0;
    let ended = wait_for("ten refreshes between trips", || {
        // it may just be away
        refreshed += usize::from(home.ctl(&["refresh"])?.code == Some(0));
        let ended = client.has_ended()?;
        Ok((ended || refreshed == 10).then_some(ended))
    })?;
    if !ended {
        client.signal(Signal::SIGTERM)?;
    }
    let (code, trips, stderr) = client.trips()?;
    let well = trips.iter().all(|trip| trip["outcome"] == "completed" && trip["return"]["outcome"] == "completed");
    ensure(code == Some(143) && !trips.is_empty() && well, || format!("{code:?} {trips:?} {stderr}"))?;
    at_home(&home)?;
    successor_quits(lab, &home)
}

/// They take turns, or are told that another one has the guest.
fn many_borrowers(lab: &Lab) -> Outcome {
    let home = home(lab, &["--backing", "memfd"])?;
    let clients: Vec<Client> = (0..4).map(|_| home.start_feature(&["--do", "check"])).collect::<Result<_, Failed>>()?;
    let mut served = 0;
    for client in clients {
        let (code, trips, stderr) = client.trips()?;
        if code == Some(0) {
            served += 1;
        } else {
            ensure(code == Some(1), || format!("{code:?} {trips:?} {stderr}"))?;
            ensure_says(trips[0]["reason"].as_str().unwrap_or(""), "lent")?;
        }
    }
    ensure(served > 0, || "nobody was served".into())?;
    at_home(&home)?;
    checks_all(&home)?;
    home.quit()?;
    serial_is_whole(lab)
}

/// The paths of both are relative to where they were started.
fn from_another_directory(lab: &Lab) -> Outcome {
    let (here, there) = (lab.path("here"), lab.path("there"));
    fs::create_dir(&here)?;
    fs::create_dir(&there)?;
    let args = ["run", "--memory", "64M", "--workload", GUEST, "--backing", "memfd", "--control", "c", "--serial", "s"];
    let _home = Client::start_in(&here, &args)?;
    wait_for("the guest runs", || Ok(here.join("c").exists().then_some(())))?;
    let (code, trips, stderr) =
        Client::start_in(&there, &["feature", "--attach", "../here/c", "--do", "check", "--json"])?.trips()?;
    ensure(code == Some(0), || format!("{code:?} {trips:?} {stderr}"))?;
    ensure(trips[0]["return"]["outcome"] == "completed", || format!("{trips:?}"))?;
    ensure(fs::read_dir(&there)?.next().is_none(), || "the borrower has left files in its directory".into())
}

/// A VM that was away is as good as any.
fn other_techniques_afterwards(lab: &Lab) -> Outcome {
    let mut home = home(lab, &["--backing", "memfd", "--cpus", "2"])?;
    let (code, trips, _) = home.feature(&["--do", "check", "--every", "1ms", "--times", "3"])?;
    ensure(code == Some(0), || format!("{trips:?}"))?;
    at_home(&home)?;
    home.ask(&["snapshot", "--out", &lab.arg("snapshot")])?;
    let mut next =
        lab.receive_at("next", &format!("unix:{}", lab.arg("next.listen")), &["--serial", &lab.arg("serial")])?;
    home.migrate_well(&next.address, &["--strategy", "handover"])?;
    let (code, trips, _) = next.feature(&["--do", "check", "--every", "1ms", "--times", "2"])?;
    ensure(code == Some(0), || format!("{trips:?}"))?;
    at_home(&next)?;
    let last = lab.receive("last", &["--serial", &lab.arg("serial")])?;
    next.migrate_well(&last.address, &["--strategy", "post-copy"])?;
    checks_all(&last)?;
    last.quit()?;
    serial_is_whole(lab)
}

fn borrower_dies(lab: &Lab) -> Outcome {
    let broker = lab.broker("broker")?;
    let (mut at_home_then, mut lost) = (0, 0);
    for kill in 0..KILLS {
        let serial = lab.arg("serial");
        let mut home =
            lab.workload("home", GUEST, &["--backing", "memfd", "--broker", &broker.address, "--serial", &serial])?;
        // it goes and comes all the time
        let client = home.start_feature(&["--do", "check", "--every", "1ms"])?;
        a_while(kill, SOME_TRIPS);
        client.signal(Signal::SIGKILL)?;
        drop(client);
        let ended = wait_for("it is known what became of the guest", || match home.status() {
            Ok(status) if status["state"] == "running" => Ok(Some(false)),
            Ok(_) => Ok(None),
            Err(_) => home.ended().map(|_| Some(true)),
        })?;
        if !ended {
            at_home_then += 1;
            checks_all(&home)?;
            home.quit()?;
            serial_is_whole(lab)?;
        } else {
            lost += 1;
            let status = home.ended()?;
            ensure(status.code() == Some(5), || format!("{status}: {}", home.stderr()))?;
            ensure_says(&home.stderr(), "the VM is lost")?;
            // its RAM is there to be looked at, and is not run
            let vm = wait_for("the broker has noticed", || {
                Ok(kept_vms(&broker)?.into_iter().find_map(|(vm, state, _)| (state == "lost").then_some(vm)))
            })?;
            let (code, answer) = ask(&broker, &["--forget", &vm])?;
            ensure(code == Some(0), || format!("{answer}"))?;
        }
        fs::remove_file(lab.path("serial"))?;
    }
    println!("of {KILLS} kills {at_home_then} met a guest at home, {lost} took it along");
    Ok(())
}

fn home_dies(lab: &Lab) -> Outcome {
    let (mut lives_on, mut lost) = (0, 0);
    for kill in 0..KILLS {
        let mut home = home(lab, &["--backing", "memfd"])?;
        let client = home.start_feature(&["--do", "check", "--every", "1ms"])?;
        a_while(1000 + kill, SOME_TRIPS);
        home.kill()?;
        // a borrower that has the guest is its home from then on, at the same place; one that has
        // not has nothing more to do
        let mut client = client;
        let lives = wait_for("it is known what became of the guest", || {
            if client.has_ended()? {
                return Ok(Some(false));
            }
            let status = home.status();
            Ok(status.is_ok_and(|s| s["state"] == "running" && s["pid"] == client.pid()).then_some(true))
        })?;
        if lives {
            lives_on += 1;
            checks_all(&home)?;
            home.ask(&["quit"])?;
            wait_for("the borrower ends", || Ok(client.has_ended()?.then_some(())))?;
            serial_is_whole(lab)?;
        } else {
            lost += 1;
        }
        fs::remove_file(lab.path("serial"))?;
        // what a killed process leaves
        let _ = fs::remove_file(lab.path("home"));
    }
    println!("of {KILLS} kills {lives_on} left the guest where it was, {lost} took it along");
    Ok(())
}
