//! Logs, stdout, serial files and disks that take nothing, signals, and words of strangers: a VM
//! runs on through all of it.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixListener,
    path::PathBuf,
    process::Stdio,
    thread,
};

use libtest_mimic::Failed;
use migration_core::wire::{Control, ErrorCode, Header, LaneKind, Preamble};
use nix::sys::{signal::Signal, stat::Mode};

use crate::common::{Client, Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, usage_with_stdout, wait_for};
use crate::{faults::relay_to, post_copy::post_copy_at};

/// A line a beat on the serial port.
const TALKS: [&str; 4] = ["--memory", "64M", "--workload", "sleep:serial=1"];
/// What a hostile peer says: it would set the title of a terminal, begin a line of the log, and
/// turn text around.
const EVIL: &str = "sorry\x1b]0;owned\x07\nminivmm: all is well\u{202e}\u{9b}31m";
const ESCAPED: &str = r"sorry\u{1b}]0;owned\u{7}\nminivmm: all is well\u{202e}\u{9b}31m";

pub(crate) fn add(suite: &mut Suite) {
    for how in ["full", "closed", "undrained"] {
        suite.kvm(format!("output/log/{how}/receiver"), move |lab| receiver_logs(lab, how));
        suite.post_copy(format!("output/log/{how}/post_copy_source"), "anon", move |lab| source_logs(lab, how));
    }
    suite.anywhere("output/stdout", stdout_is_closed_or_full);
    suite.kvm("output/serial/full", serial_is_full);
    suite.kvm("output/serial/fifo", serial_is_a_fifo);
    suite.anywhere("output/serial/refused", serial_is_refused);
    suite.kvm("output/file_limit", file_limit);
    suite.kvm("output/signals/run_and_receive", signals_end_in_order);
    suite.kvm("output/signals/feature", a_second_signal_ends_a_feature);
    suite.anywhere("output/signals/broker", signals_end_a_broker);
    suite.kvm("output/words/of_a_destination", words_of_a_destination);
    suite.kvm("output/words/of_a_source", words_of_a_source);
    suite.anywhere("output/words/at_the_control_socket", words_at_the_control_socket);
}

/// A stderr that takes nothing, and what keeps it that way.
fn broken(how: &str) -> Result<(Stdio, Option<std::io::PipeReader>), Failed> {
    if how == "full" {
        return Ok((File::options().write(true).open("/dev/full")?.into(), None));
    }
    let (reader, writer) = std::io::pipe()?;
    if how == "closed" {
        return Ok((writer.into(), None));
    }
    // filled through another opening, as this end must wait when it is full
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
    let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_NONBLOCK;
    let mut end = File::from(nix::fcntl::open(path.as_str(), flags, Mode::empty())?);
    while end.write(&[b'x'; 4096]).is_ok() {}
    Ok((writer.into(), Some(reader)))
}

/// Somebody who talks nonsense, which is a line of the log; it has been read when this returns.
fn talk_nonsense(address: &str) -> Outcome {
    let mut peer = TcpStream::connect(address.trim_start_matches("tcp:"))?;
    peer.write_all(&[0x55; Preamble::LEN])?;
    // the end may come as a reset
    let _ = peer.read_to_end(&mut Vec::new());
    Ok(())
}

/// A destination goes on to accept, to refuse and to receive, and the VM that came goes on.
fn receiver_logs(lab: &Lab, how: &str) -> Outcome {
    let (stderr, _reader) = broken(how)?;
    let destination = Process::with_stderr(lab, "destination", "receive", &["--listen", "tcp:127.0.0.1:0"], stderr)?;
    for _ in 0..20 {
        talk_nonsense(&destination.address)?;
    }
    let mut source = lab.workload("source", "hot:size=1M", &[])?;
    // an attempt that is lost under way, which is a line of the log as well
    let (relay, address) = relay_to(&destination)?;
    relay.cut_after(1 << 20);
    let failed = source.migrate(&address, &[])?;
    ensure(failed.json["outcome"] == "failed", || format!("{failed:?}"))?;
    source.retry_well(&destination.address, &[])?;
    destination.wait_state("running")?;
    destination.works()?;
    destination.quit()
}

/// A source that has lost its link says so, and the pages that are only there follow all the same.
fn source_logs(lab: &Lab, how: &str) -> Outcome {
    let (stderr, _reader) = broken(how)?;
    let args = ["--memory", "64M", "--workload", "hot:size=1M,data=32M", "--backing", "anon"];
    let mut source = Process::with_stderr(lab, "source", "run", &args, stderr)?;
    source.wait_until("the guest works", at_work)?;
    let destination = lab.receive("destination", &[])?;
    let (relay, address) = relay_to(&destination)?;
    relay.cut_after(8 << 20);
    let client = source.start_migrate(&address, &post_copy_at("100Mbit"))?;
    wait_for("the link is cut", || Ok((relay.relayed() >= 8 << 20).then_some(())))?;
    destination.says("link to")?;
    relay.restore();
    let answer = client.answer()?;
    ensure(answer.code == Some(0) && answer.json["recoveries"].as_u64() >= Some(1), || format!("{answer:?}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A reader that has gone is nobody's fault; a disk that is full is said, and is a failure.
fn stdout_is_closed_or_full(lab: &Lab) -> Outcome {
    let key = lab.arg("key");
    for (number, args) in [&["workload", "--list"][..], &["--help"], &["keygen", "--out", &key]].iter().enumerate() {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let (code, stderr) = usage_with_stdout(args, writer)?;
        ensure(code == Some(0) && stderr.is_empty(), || format!("{args:?}, closed: {code:?}: {stderr}"))?;
        if number == 2 {
            fs::remove_file(&key)?;
            fs::remove_file(lab.path("key.pub"))?;
        }
        let (code, stderr) = usage_with_stdout(args, File::options().write(true).open("/dev/full")?)?;
        ensure(code == Some(1), || format!("{args:?}, full: {code:?}: {stderr}"))?;
        ensure_says(&stderr, "minivmm: stdout: No space left on device")?;
        ensure(stderr.lines().count() == 1, || format!("{args:?}: {stderr}"))?;
    }
    Ok(())
}

/// The guest goes on, and what is lost is counted; one line of the log says it.
fn serial_is_full(lab: &Lab) -> Outcome {
    let process = lab.run("source", &[&TALKS[..], &["--serial", "/dev/full"]].concat())?;
    let fails = |status: &serde_json::Value| {
        let serial = &status["serial"];
        serial["to"] == "/dev/full"
            && serial["failure"].as_str().is_some_and(|why| why.contains("No space left"))
            && serial["pending_bytes"].as_u64() > Some(20)
            && serial["bytes"].as_u64() >= serial["pending_bytes"].as_u64()
    };
    process.wait_until("output is kept", fails)?;
    process.works()?;
    process.says("serial output to /dev/full")?;
    let said = process.stderr();
    ensure(said.matches("serial output to /dev/full").count() == 1, || said.clone())?;
    process.quit()
}

/// Nobody reads it at first.
fn serial_is_a_fifo(lab: &Lab) -> Outcome {
    let fifo = lab.path("fifo");
    nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600))?;
    let serial = ["--serial", &lab.arg("fifo")];
    let destination = lab.receive("destination", &serial)?;
    let mut source = lab.run("source", &[&TALKS[..], &serial].concat())?;
    source.wait_until("the guest works", at_work)?;
    let mut reader = File::open(&fifo)?;
    let mut first = [0; 5];
    reader.read_exact(&mut first)?;
    ensure(&first == b"ready", || format!("{first:?}"))?;
    source.migrate_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// What cannot be written to is refused before anything else happens.
fn serial_is_refused(lab: &Lab) -> Outcome {
    let _socket = UnixListener::bind(lab.path("socket"))?;
    fs::create_dir(lab.path("folder"))?;
    for (what, words) in [
        ("missing/folder/serial", "No such file or directory"),
        ("folder", "Is a directory"),
        ("socket", "a socket cannot be opened as a file"),
    ] {
        let serial = lab.arg(what);
        for command in
            [&["run", "--memory", "64M", "--workload", "hot"][..], &["receive", "--listen", "tcp:127.0.0.1:0"]]
        {
            let (code, stderr) = usage_with_stdout(&[command, &["--serial", &serial]].concat(), Stdio::null())?;
            ensure(code == Some(1), || format!("{command:?} {what}: {code:?}: {stderr}"))?;
            ensure_says(&stderr, &format!("serial file {serial}: {words}"))?;
        }
    }
    Ok(())
}

/// Files that must not grow are errors, and not the end of the VM.
fn file_limit(lab: &Lab) -> Outcome {
    let serial = lab.path("serial");
    fs::write(&serial, vec![b'.'; 1 << 20])?;
    let to = lab.arg("serial");
    let args = [&TALKS[..], &["--serial", &to]].concat();
    let process = Process::with_file_limit(lab, "source", "run", &args, 16)?;
    process.wait_until("the guest works", at_work)?;
    let too_large = |s: &serde_json::Value| s["serial"]["failure"].as_str().is_some_and(|w| w.contains("too large"));
    process.wait_until("serial output is kept", too_large)?;
    let snapshot = process.ctl(&["snapshot", "--out", &lab.arg("snapshot")])?;
    ensure(snapshot.code == Some(1), || format!("{snapshot:?}"))?;
    ensure_says(snapshot.reason(), "too large")?;
    let dump = process.ctl(&["memory", "--gpa", "0", "--len", "1048576", "--out", &lab.arg("dump")])?;
    ensure(dump.code == Some(1), || format!("{dump:?}"))?;
    ensure_says(&dump.stdout, "too large")?;
    process.works()?;
    process.quit()
}

/// Those that are ignored from the beginning stay so: a shell ignores SIGINT for what it runs in
/// the background.
fn ends(process: &mut Process, signal: Signal, gone: &[PathBuf]) -> Outcome {
    process.signal(signal)?;
    let status = process.ended()?;
    ensure(status.code() == Some(128 + signal as i32), || format!("{signal}: {status}"))?;
    for path in gone {
        ensure(!path.exists(), || format!("{signal} left {}", path.display()))?;
    }
    Ok(())
}

/// The signals that end a process, but for those that this one was started to ignore.
fn ending_signals() -> Result<Vec<Signal>, Failed> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).ok_or("no mask of signals")?;
    let ignored = u64::from_str_radix(mask.trim(), 16)?;
    let all = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    Ok(all.into_iter().filter(|&signal| ignored >> (signal as u32 - 1) & 1 == 0).collect())
}

fn signals_end_in_order(lab: &Lab) -> Outcome {
    for signal in ending_signals()? {
        let mut source = lab.workload("source", "hot:size=1M", &[])?;
        let listen = lab.path("listen");
        let mut destination = lab.receive_at("destination", &format!("unix:{}", lab.arg("listen")), &[])?;
        ensure(listen.exists(), || "it does not listen".into())?;
        let control = destination.socket().to_owned();
        ends(&mut destination, signal, &[control, listen])?;
        // a client that waits is answered
        let silent = TcpListener::bind("127.0.0.1:0")?;
        let client = source.start_migrate(&format!("tcp:{}", silent.local_addr()?), &[])?;
        source.wait_state("outgoing")?;
        let control = source.socket().to_owned();
        ends(&mut source, signal, &[control])?;
        let answer = client.answer()?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        ensure_says(&answer.stdout, "this minivmm or its thread ends")?;
    }
    Ok(())
}

fn signals_end_a_broker(lab: &Lab) -> Outcome {
    for signal in ending_signals()? {
        let mut broker = lab.broker("broker")?;
        let socket = broker.socket().to_owned();
        ensure(socket.exists(), || "it does not listen".into())?;
        ends(&mut broker, signal, &[socket])?;
    }
    Ok(())
}

/// The first one waits until the guest is at home, which it never is here; the second one does not.
fn a_second_signal_ends_a_feature(lab: &Lab) -> Outcome {
    let serial = lab.arg("serial");
    let mut home = lab.workload("home", "hot:size=1M", &["--backing", "memfd", "--serial", &serial])?;
    let mut feature = home.start_feature(&["--do", "check", "--hold", "1h"])?;
    home.wait_state("lent")?;
    home.kill()?;
    feature.signal(Signal::SIGTERM)?;
    let lives_on = |feature: &Client| home.status().is_ok_and(|s| s["pid"] == feature.pid() && s["state"] == "running");
    wait_for("the borrower is the guest's home", || Ok(lives_on(&feature).then_some(())))?;
    let pid = feature.pid().to_string();
    let sockets = || -> Result<Vec<PathBuf>, Failed> {
        let paths = fs::read_dir(lab.path("."))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Failed>>()?;
        let name = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("home"));
        let of_this = |path: &PathBuf| name(path) && path.to_string_lossy().contains(&pid);
        Ok(paths.into_iter().filter(|path| of_this(path) || *path == home.socket()).collect())
    };
    ensure(sockets()?.iter().any(|path| path == home.socket()), || "there is no control socket".into())?;
    feature.signal(Signal::SIGTERM)?;
    wait_for("it ends at once", || Ok(feature.has_ended()?.then_some(())))?;
    let left = sockets()?;
    ensure(left.is_empty(), || format!("left: {left:?}"))
}

/// No byte of it can do anything to a terminal.
fn harmless(text: &str) -> Outcome {
    let bad = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
    ensure(!text.contains(bad), || format!("raw: {text:?}"))?;
    ensure(!text.lines().any(|line| line == "minivmm: all is well"), || format!("a line of the peer's: {text:?}"))
}

/// What a peer was sent.
type Heard = thread::JoinHandle<std::io::Result<Vec<u8>>>;

/// A destination that answers the first frame with an error, and the bytes that it was sent before
/// that.
fn evil_destination() -> Result<(SocketAddr, Heard), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let body = move || {
        let (mut source, _) = listener.accept()?;
        let mut said = vec![0; Preamble::LEN + Header::LEN];
        source.read_exact(&mut said)?;
        let header = said[Preamble::LEN..].first_chunk().and_then(|bytes| Header::decode(bytes).ok());
        let header = header.ok_or(std::io::ErrorKind::InvalidData)?;
        said.resize(Preamble::LEN + Header::LEN + header.body as usize, 0);
        source.read_exact(&mut said[Preamble::LEN + Header::LEN..])?;
        source.write_all(&Control::error(ErrorCode::Other, EVIL).encode(0, 0, header.number))?;
        // until the source has gone
        let _ = source.read_to_end(&mut Vec::new());
        Ok(said)
    };
    Ok((address, thread::spawn(body)))
}

fn read_frame(from: &mut TcpStream) -> Result<Control, Failed> {
    let mut bytes = [0; Header::LEN];
    from.read_exact(&mut bytes)?;
    let header = Header::decode(&bytes)?;
    let mut body = vec![0; header.body as usize];
    from.read_exact(&mut body)?;
    Ok(Control::decode(&header, &body)?)
}

fn words_of_a_destination(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "hot:size=1M", &[])?;
    // for people
    let (address, peer) = evil_destination()?;
    let (stdout, stderr) = (lab.path("answer"), source.stderr());
    let control = source.socket().display().to_string();
    let args = ["ctl", "--control", &control, "migrate", "--to", &format!("tcp:{address}")];
    let (code, said) = usage_with_stdout(&args, File::create(&stdout)?)?;
    peer.join().map_err(|_| "the peer panicked")??;
    let answer = fs::read_to_string(&stdout)?;
    ensure(code == Some(1), || format!("{code:?}: {answer}{said}"))?;
    ensure_says(&answer, ESCAPED)?;
    [&answer, &said, &stderr, &source.stderr()].iter().try_for_each(|text| harmless(text))?;
    // the status for people has the report
    let (_, said) = usage_with_stdout(&["ctl", "--control", &control, "status"], File::create(&stdout)?)?;
    let answer = fs::read_to_string(&stdout)?;
    ensure_says(&answer, ESCAPED)?;
    harmless(&(answer + &said))?;
    // programs get it as it came, and no byte below a space
    let (address, peer) = evil_destination()?;
    let answer = source.migrate(&format!("tcp:{address}"), &[])?;
    peer.join().map_err(|_| "the peer panicked")??;
    ensure_says(answer.reason(), EVIL)?;
    ensure(!answer.stdout.trim_end().bytes().any(|b| b < b' '), || format!("{:?}", answer.stdout))?;
    source.works()?;
    source.quit()
}

/// A real source's hello, its lanes, and then an error.
fn words_of_a_source(lab: &Lab) -> Outcome {
    let source = lab.workload("source", "hot:size=1M", &[])?;
    let (address, peer) = evil_destination()?;
    source.migrate(&format!("tcp:{address}"), &[])?;
    let hello = peer.join().map_err(|_| "the peer panicked")??;
    let destination = lab.receive("destination", &[])?;
    let mut evil = TcpStream::connect(destination.address.trim_start_matches("tcp:"))?;
    evil.write_all(&hello)?;
    let Control::Welcome(welcome) = read_frame(&mut evil)? else { return Err("no welcome".into()) };
    let mut lanes = Vec::new();
    for index in 0..welcome.streams {
        let mut lane = TcpStream::connect(destination.address.trim_start_matches("tcp:"))?;
        lane.write_all(&Preamble::new(LaneKind::Bulk, index, welcome.session).encode())?;
        lanes.push(lane);
    }
    evil.write_all(&Control::error(ErrorCode::Other, EVIL).encode(0, 1, 1))?;
    destination.says(ESCAPED)?;
    harmless(&destination.stderr())?;
    destination.quit()?;
    source.quit()
}

/// Whoever listens there may not be a minivmm.
fn words_at_the_control_socket(lab: &Lab) -> Outcome {
    let socket = lab.path("socket");
    let listener = UnixListener::bind(&socket)?;
    let text = serde_json::to_string(EVIL)?;
    let answers = [format!("{{\"failed\":{text}}}\n"), format!("{{\"done\":{{{text}:{text}}}}}\n")];
    let server = thread::spawn(move || -> std::io::Result<()> {
        for answer in answers {
            let (mut client, _) = listener.accept()?;
            let mut byte = [0];
            while byte != *b"\n" {
                client.read_exact(&mut byte)?;
            }
            client.write_all(answer.as_bytes())?;
        }
        Ok(())
    });
    for expected in [1, 0] {
        let stdout = lab.path("answer");
        let args = ["ctl", "--control", &socket.display().to_string(), "status"];
        let (code, stderr) = usage_with_stdout(&args, File::create(&stdout)?)?;
        let shown = fs::read_to_string(&stdout)? + &stderr;
        ensure(code == Some(expected), || format!("{code:?}: {shown}"))?;
        ensure_says(&shown, ESCAPED)?;
        harmless(&shown)?;
    }
    server.join().map_err(|_| "the server panicked")??;
    Ok(())
}
