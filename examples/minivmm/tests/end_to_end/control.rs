//! What a user can do and hears while a migration runs, and when it cannot: limits, a forced
//! switch-over, a pause, servers that are something else, a minivmm that does not answer.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

use libtest_mimic::Failed;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{Client, Lab, Outcome, Process, Suite, ensure, ensure_says, usage, wait_for};

pub(crate) fn add(suite: &mut Suite) {
    for encrypted in [false, true] {
        let name = if encrypted { "encrypted" } else { "plain" };
        suite.kvm(format!("control/cancel_at_1_kbit/{name}"), move |lab| cancel_at_1_kbit(lab, encrypted));
        suite.kvm(format!("control/strangers/{name}"), move |lab| strangers(lab, encrypted));
    }
    suite.kvm("control/tune", tune);
    suite.kvm("control/switch_over", switch_over);
    suite.kvm("control/nothing_to_change", nothing_to_change);
    suite.kvm("control/pause_travels", pause_travels);
    suite.kvm("control/pause_stays_after_a_cancel", pause_stays);
    suite.kvm("control/a_second_migration_hears_of_the_first", second_migration);
    suite.kvm("control/interrupted", interrupted);
    suite.kvm("control/stopped_server", stopped_server);
    suite.kvm("control/an_address_once", address_once);
    suite.kvm("control/columns", columns);
    suite.kvm("control/small_memory", small_memory);
    suite.anywhere("control/values_are_listed", values_are_listed);
}

/// A rate at which no trial waits for the end of a migration.
const CRAWL: &str = "1kbit";

fn is_copying(status: &Value) -> bool {
    status["migration"]["phase"] == "copying" && status["migration"]["round"].as_u64() >= Some(1)
}

/// A guest with a migration under way that would take for ever.
fn crawling(lab: &Lab, extra: &[&str]) -> Result<(Process, Process, Client), Failed> {
    let source = lab.workload("source", "hot:size=8M,data=24M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &[&["--bandwidth", CRAWL], extra].concat())?;
    source.wait_until("pages are copied", is_copying)?;
    Ok((source, destination, client))
}

/// Ends a migration, after which everything is as it was.
fn cancelled(source: Process, destination: Process, client: Client) -> Outcome {
    let answer = source.ask(&["cancel"])?;
    ensure(answer["outcome"] == "cancelled", || format!("{answer}"))?;
    ensure(client.answer()?.code == Some(3), || "not cancelled".into())?;
    source.works()?;
    source.quit()?;
    destination.quit()
}

fn time_ms(report: &Value, key: &str) -> Result<f64, Failed> {
    report[key].as_f64().ok_or_else(|| format!("no {key} in {report}").into())
}

/// The setup, several rounds' worth of control frames and the cancel itself are far more bytes than
/// 1 kbit/s lets pass in the time that a client waits for a sign of life. So it would not end well
/// if they waited for the limit.
fn cancel_at_1_kbit(lab: &Lab, encrypted: bool) -> Outcome {
    let key = lab.key("key")?;
    let secure = ["--encrypt", "aes256-gcm", "--psk-file", &key];
    let secure = if encrypted { &secure[..] } else { &[] };
    let source = lab.workload("source", "hot:size=8M,data=24M", &[])?;
    let before = source.resources()?;
    let destination = lab.receive("destination", secure)?;
    let args = [&["--bandwidth", CRAWL], secure].concat();
    let client = source.start_migrate(&destination.address, &args)?;
    let status = source.wait_until("pages are copied", is_copying)?;
    ensure(status["migration"]["bandwidth_bits"] == 1000, || format!("{status}"))?;
    source.ask(&["cancel"])?;
    let report = client.answer()?;
    ensure(report.code == Some(3), || format!("{report:?}"))?;
    // the hello, preambles and handshakes would take half a minute and more
    ensure(time_ms(&report.json, "setup_ms")? < 20_000.0, || format!("the setup waited: {}", report.json))?;
    source.works()?;
    source.is_back_at(&before)?;
    // the destination has ended its session: it takes the next one at once
    let mut source = source;
    source.retry_well(&destination.address, secure)?;
    destination.works()?;
    destination.quit()
}

fn tune(lab: &Lab) -> Outcome {
    let (mut source, destination, client) = crawling(lab, &["--downtime-limit", "40ms"])?;
    let answer = source.ask(&["tune", "--downtime-limit", "900ms"])?;
    ensure(answer["downtime_limit_ms"] == 900.0 && answer["bandwidth_bits"] == 1000, || format!("{answer}"))?;
    let status = source.status()?;
    ensure(status["migration"]["downtime_limit_ms"] == 900.0, || format!("{status}"))?;
    let answer = source.ask(&["tune", "--bandwidth", "unlimited"])?;
    ensure(answer["downtime_limit_ms"] == 900.0 && answer["bandwidth_bits"].is_null(), || format!("{answer}"))?;
    // at the old rate this would take days
    let report = client.answer()?;
    ensure(report.code == Some(0), || format!("{report:?}"))?;
    let json = &report.json;
    ensure(json["downtime_limit_ms"] == 900.0 && json["bandwidth_bits"].is_null(), || format!("{json}"))?;
    ensure(json["forced_switch_over"] == false, || format!("{json}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A limit that no pause can keep, and nothing that ends the rounds: the user does.
fn switch_over(lab: &Lab) -> Outcome {
    let mut source = lab.workload("source", "hot:size=16M,data=16M", &[])?;
    let destination = lab.receive("destination", &[])?;
    let client = source.start_migrate(&destination.address, &["--bandwidth", "1Mbit", "--downtime-limit", "10s"])?;
    source.wait_until("pages are copied", is_copying)?;
    // asked for while the rest would take minutes: so it is the rest that moves faster then
    source.ask(&["switch-over"])?;
    source.ask(&["tune", "--bandwidth", "0"])?;
    let report = client.answer()?;
    ensure(report.code == Some(0) && report.json["forced_switch_over"] == true, || format!("{report:?}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// Where a wish makes no sense, the answer says why, and nothing changes.
fn nothing_to_change(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "hot:size=8M,data=24M", &[])?;
    let why = source.ctl(&["tune", "--downtime-limit", "1s"])?.json["error"].clone();
    ensure(why == "tune: no migration is under way", || format!("{why}"))?;
    let (code, _, stderr) = usage(&["ctl", "--control", &lab.arg("source"), "tune"])?;
    ensure(code == Some(2) && stderr.contains("--downtime-limit"), || format!("{code:?}: {stderr}"))?;
    for command in ["switch-over", "post-copy", "cancel"] {
        let answer = source.ctl(&[command])?;
        ensure(answer.code == Some(1), || format!("{command}: {answer:?}"))?;
        ensure_says(&answer.json.to_string(), &format!("{command}: no migration is under way"))?;
    }
    let destination = lab.receive("destination", &[])?;
    let args = ["--bandwidth", CRAWL, "--strategy", "stop-and-copy", "--downtime-limit", "2m"];
    let client = source.start_migrate(&destination.address, &args)?;
    source.wait_until("it is paused", |s| s["migration"]["phase"] == "offered")?;
    for (command, words) in [
        (&["switch-over"][..], "switches over by itself"),
        (&["tune", "--downtime-limit", "1s"], "too late"),
        (&["pause"], "is being handed over"),
    ] {
        let answer = source.ctl(command)?;
        ensure(answer.code == Some(1), || format!("{command:?}: {answer:?}"))?;
        ensure_says(&answer.json.to_string(), words)?;
    }
    // its bandwidth can be changed all the same
    source.ask(&["tune", "--bandwidth", "2kbit"])?;
    cancelled(source, destination, client)
}

fn pause_travels(lab: &Lab) -> Outcome {
    let (mut source, destination, client) = crawling(lab, &[])?;
    source.ask(&["pause"])?;
    let status = source.status()?;
    ensure(status["state"] == "outgoing" && status["paused"] == true, || format!("{status}"))?;
    source.ask(&["resume"])?;
    ensure(source.status()?["paused"] == false, || "it is paused still".into())?;
    source.ask(&["pause"])?;
    source.ask(&["tune", "--bandwidth", "unlimited"])?;
    ensure(client.answer()?.code == Some(0), || "it did not move".into())?;
    source.ended_well()?;
    destination.wait_state("paused")?;
    destination.ask(&["resume"])?;
    destination.works()?;
    destination.quit()
}

fn pause_stays(lab: &Lab) -> Outcome {
    let (source, destination, client) = crawling(lab, &[])?;
    source.ask(&["pause"])?;
    source.ask(&["cancel"])?;
    ensure(client.answer()?.code == Some(3), || "not cancelled".into())?;
    ensure(source.status()?["state"] == "paused", || "it runs".into())?;
    source.ask(&["resume"])?;
    source.works()?;
    source.quit()?;
    destination.quit()
}

fn second_migration(lab: &Lab) -> Outcome {
    let (source, destination, client) = crawling(lab, &[])?;
    let file = lab.arg("snapshot");
    let socket = lab.arg("source");
    for (command, key) in
        [(&["migrate", "--to", "tcp:127.0.0.1:1"][..], "reason"), (&["snapshot", "--out", &file], "reason")]
    {
        let answer = source.ctl(command)?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        let why = answer.json[key].as_str().unwrap_or("");
        for words in [
            &format!("a pre-copy migration to {} has been under way for", destination.address),
            "(copying, round 1)",
            &format!("`minivmm ctl --control {socket} cancel` cancels it"),
        ] {
            ensure_says(why, words)?;
        }
    }
    cancelled(source, destination, client)
}

fn interrupted(lab: &Lab) -> Outcome {
    let (source, destination, first) = crawling(lab, &[])?;
    first.signal(Signal::SIGINT)?;
    let answer = first.answer()?;
    ensure(answer.code == Some(130) && answer.json["outcome"] == "under-way", || format!("{answer:?}"))?;
    for words in ["the migration goes on", &format!("ctl --control {} cancel` ends it", lab.arg("source"))] {
        ensure_says(answer.reason(), words)?;
    }
    let status = source.status()?;
    ensure(status["state"] == "outgoing", || format!("it has ended: {status}"))?;
    source.ask(&["cancel"])?;
    source.works()?;
    source.quit()?;
    destination.quit()
}

/// Waits until a process does what it was sent a signal for.
fn wait_process_state(pid: u32, states: &str) -> Outcome {
    wait_for("the process's state changes", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        Ok(state.is_some_and(|state| states.contains(state)).then_some(()))
    })
}

fn stopped_server(lab: &Lab) -> Outcome {
    let (source, destination, client) = crawling(lab, &["--answer-timeout", "6s"])?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(source.pid())?);
    nix::sys::signal::kill(pid, Signal::SIGSTOP)?;
    wait_process_state(source.pid(), "T")?;
    let answers = [
        source.ctl(&["status", "--answer-timeout", "200ms"]),
        source.ctl(&["cancel", "--answer-timeout", "200ms"]),
        // the one that waits for its end notices it, too
        client.answer(),
    ];
    nix::sys::signal::kill(pid, Signal::SIGCONT)?;
    for answer in answers {
        let answer = answer?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        ensure_says(&answer.json.to_string(), "does not answer within")?;
    }
    // what was asked for meanwhile happens
    source.wait_until("it is cancelled", |s| s["state"] == "running")?;
    source.works()?;
    source.quit()?;
    destination.quit()
}

/// Something that listens and is no migration destination; its address.
fn listener(serve: fn(&mut TcpStream) -> std::io::Result<()>) -> Result<String, Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp:{}", listener.local_addr()?);
    // it goes with the trial's process
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // whoever connected may have gone
            let _ = serve(&mut stream);
        }
    });
    Ok(address)
}

fn http(stream: &mut TcpStream) -> std::io::Result<()> {
    let _ = stream.read(&mut [0; 100])?;
    stream.write_all(b"HTTP/1.1 400 Bad Request\r\nServer: \x1b[31mred\r\n\r\n")
}

fn ssh(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")?;
    silent(stream)
}

fn mail(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"220 \x1b[31m\r\n")?;
    silent(stream)
}

fn echo(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut other = stream.try_clone()?;
    std::io::copy(&mut other, stream).map(drop)
}

/// Reads all there is, and says nothing.
fn silent(stream: &mut TcpStream) -> std::io::Result<()> {
    std::io::copy(stream, &mut std::io::sink()).map(drop)
}

fn closes(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.read(&mut [0; 8]).map(drop)
}

type Server = fn(&mut TcpStream) -> std::io::Result<()>;

fn strangers(lab: &Lab, encrypted: bool) -> Outcome {
    let key = lab.key("key")?;
    let secure = ["--encrypt", "aes256-gcm", "--psk-file", &key];
    let secure = if encrypted { &secure[..] } else { &[] };
    let source = lab.workload("source", "sleep", &[])?;
    for (server, all) in [
        (http as Server, &["is not a migration destination", "HTTP server", "HTTP/1.1 400 Bad Request"][..]),
        (ssh, &["is not a migration destination", "SSH server", "SSH-2.0-OpenSSH_9.2p1 Debian-2"]),
        (echo, &["is not a migration destination", "echo server"]),
        (mail, &["is not a migration destination", "220 \\u{1b}[31m"]),
        (closes, &["closed the connection"]),
        (
            silent,
            if encrypted {
                &["did not finish the handshake in time"]
            } else {
                &["silent for the setup time-out of 1s"]
            },
        ),
    ] {
        let address = listener(server)?;
        // those that answer may take their time on a busy machine
        let timeout = if all[0].contains("time") { "1s" } else { "20s" };
        let answer = source.migrate(&address, &[&["--setup-timeout", timeout], secure].concat())?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        for words in all {
            ensure_says(answer.reason(), words)?;
        }
        ensure(!answer.reason().chars().any(char::is_control), || format!("raw: {:?}", answer.reason()))?;
        once(answer.reason(), &address)?;
    }
    source.works()?;
    source.quit()
}

/// The text names the address, and does not repeat it; not without its scheme either.
fn once(text: &str, address: &str) -> Outcome {
    let bare = address.split_once(':').map_or(address, |(_, bare)| bare);
    ensure(text.matches(bare).count() == 1, || format!("not once {address}: {text}"))
}

fn address_once(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "sleep", &[])?;
    let nobody = format!("unix:{}", lab.arg("nobody"));
    for address in ["tcp:127.0.0.1:1", "tcp:[::1]:1", "tcp:localhost:1", "tcp:no-such-host.invalid:7", &nobody] {
        let answer = source.migrate(address, &[])?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        once(answer.reason(), address)?;
    }
    // and where somebody is refused, both sides say so
    let key = lab.key("key")?;
    let destination = lab.receive("destination", &["--encrypt", "aes256-gcm", "--psk-file", &key])?;
    let answer = source.migrate(&destination.address, &[])?;
    ensure_says(answer.reason(), "takes only encrypted migrations")?;
    let said = wait_for("the destination says so", || {
        Ok(Some(destination.stderr()).filter(|text| text.contains("takes only encrypted migrations")))
    })?;
    ensure(said.matches("127.0.0.1").count() == 1, || said.clone())?;
    source.quit()?;
    destination.quit()
}

fn columns(lab: &Lab) -> Outcome {
    let (source, destination, client) = crawling(lab, &[])?;
    let (code, stdout, stderr) = usage(&["ctl", "--control", &lab.arg("source"), "status"])?;
    ensure(code == Some(0), || stderr)?;
    let value = stdout.find("copying").ok_or("no phase")?;
    let column = value - stdout[..value].rfind('\n').map_or(0, |at| at + 1);
    for line in stdout.lines() {
        let (name, rest) = line.split_at_checked(column).ok_or_else(|| format!("a short line: {line}"))?;
        ensure(name.ends_with("  ") && !rest.starts_with(' '), || format!("columns collide: {line:?} in {stdout}"))?;
    }
    ensure_says(&stdout, "migration.dirty_pages_per_second")?;
    cancelled(source, destination, client)
}

fn small_memory(lab: &Lab) -> Outcome {
    let out = lab.arg("hot.elf");
    let (code, _, stderr) = usage(&["workload", "--emit", "hot:size=1M", "--out", &out])?;
    ensure(code == Some(0), || stderr)?;
    for (memory, what) in [
        ("4K", &["--workload", "sleep"][..]),
        ("2M", &["--workload", "hot:size=1M"]),
        ("2M", &["--workload", "churn", "--cpus", "4"]),
        ("1M", &["--kernel", &out]),
    ] {
        let (code, _, stderr) = usage(&[&["run", "--memory", memory], what].concat())?;
        ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
        let needed = stderr.split_once("needs at least ").and_then(|(_, rest)| rest.split_once(" MiB"));
        let (mib, _) = needed.ok_or_else(|| format!("{memory} {what:?}: {stderr}"))?;
        if what[0] == "--kernel" {
            // it is loaded; what the guest needs beside that only the guest knows
            continue;
        }
        // so much is enough indeed
        let source = lab.run("source", &[&["--memory", &format!("{mib}M")], what].concat())?;
        source.wait_until("the guest works", crate::common::at_work)?;
        source.quit()?;
    }
    Ok(())
}

fn values_are_listed(_lab: &Lab) -> Outcome {
    for command in ["run", "receive"] {
        let (code, help, _) = usage(&[command, "--help"])?;
        ensure(code == Some(0), || help.clone())?;
        for (option, values) in [
            ("--backing", &["anon", "thp", "memfd", "hugetlb"][..]),
            ("--tracker", &["auto", "dirty-log", "manual-protect", "dirty-ring", "write-protect"]),
        ] {
            let (code, _, stderr) = usage(&[command, option, "wood"])?;
            ensure(code == Some(2), || format!("{code:?}"))?;
            let described = help.split_once(option).map_or("", |(_, rest)| rest);
            for text in [described, &stderr] {
                let listed = text.split_once("[possible values: ").and_then(|(_, rest)| rest.split_once(']'));
                let (listed, _) = listed.ok_or_else(|| format!("{option} lists nothing: {text}"))?;
                let all = values.iter().all(|value| listed.split(", ").any(|one| one == *value));
                ensure(all, || format!("{option} lists {listed}"))?;
            }
        }
    }
    Ok(())
}
