//! Encrypted migrations: they work as plain ones do, and whoever is not meant to take part does
//! not.

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use libtest_mimic::Failed;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;

use crate::{
    common::{Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, usage, wait_for},
    faults::relay_to,
    post_copy::{faulted, post_copy_at},
};

type Authority = CertifiedIssuer<'static, KeyPair>;

const CIPHERS: [&str; 3] = ["aes128-gcm", "aes256-gcm", "chacha20-poly1305"];
/// The streams that went by.
type Kept = Arc<Mutex<Vec<Vec<u8>>>>;

/// Bytes of a run that must not be seen on the wire.
const RUN: usize = 16;

pub(crate) fn add(suite: &mut Suite) {
    for cipher in CIPHERS {
        for strategy in ["pre-copy", "hybrid", "stop-and-copy"] {
            suite.kvm(format!("encrypted/{strategy}/{cipher}"), move |lab| moves(lab, strategy, cipher));
        }
        suite.post_copy(format!("encrypted/post-copy/{cipher}"), "anon", move |lab| post_copy(lab, cipher));
    }
    suite.kvm("encrypted/static_keys", static_keys);
    suite.kvm("encrypted/certificates", certificates);
    for seed in 0..8 {
        suite.post_copy(format!("encrypted/cut_in_post_copy/{seed}"), "anon", move |lab| cut(lab, seed));
    }
    suite.kvm("encrypted/wrong_key", wrong_key);
    suite.kvm("encrypted/wrong_cipher", wrong_cipher);
    suite.kvm("encrypted/plain_to_encrypted", plain_to_encrypted);
    suite.kvm("encrypted/encrypted_to_plain", encrypted_to_plain);
    suite.kvm("encrypted/key_files", key_files);
    suite.kvm("encrypted/nothing_is_readable", nothing_is_readable);
    suite.anywhere("encrypted/wrong_command_lines", wrong_command_lines);
}

fn moves(lab: &Lab, strategy: &str, cipher: &str) -> Outcome {
    let key = lab.key("key")?;
    let options = ["--encrypt", cipher, "--psk-file", &key];
    let mut source = lab.workload("source", "random:size=24M,for=1500ms", &["--cpus", "2"])?;
    let destination = lab.receive("destination", &options)?;
    let report = source.migrate_well(&destination.address, &[&options[..], &["--strategy", strategy]].concat())?;
    ensure(report["outcome"] == "completed", || format!("{report}"))?;
    let status =
        destination.wait_until("the guest has checked everything", |s| s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    destination.quit()
}

fn post_copy(lab: &Lab, cipher: &str) -> Outcome {
    let key = lab.key("key")?;
    let options = ["--encrypt", cipher, "--psk-file", &key];
    let mut source = lab.workload("source", "random:size=16M", &["--backing", "anon"])?;
    let destination = lab.receive("destination", &options)?;
    let slow = post_copy_at("300Mbit");
    let report = source.migrate_well(&destination.address, &[&options[..], &slow].concat())?;
    faulted(&report)?;
    destination.wait_until("the guest works", at_work)?;
    destination.works()?;
    destination.quit()
}

fn static_keys(lab: &Lab) -> Outcome {
    let (ours, theirs) = (lab.key("ours")?, lab.key("theirs")?);
    let (our_public, their_public) = (format!("{ours}.pub"), format!("{theirs}.pub"));
    let own =
        |own: &str, peer: &str| ["--encrypt", "aes256-gcm", "--static-key", own, "--peer-key", peer].map(str::to_owned);
    let there = own(&theirs, &our_public);
    let destination = lab.receive("destination", &there.each_ref().map(String::as_str))?;
    let mut source = lab.workload("source", "random:size=8M", &[])?;
    // one whose key nobody has pinned
    let stranger = lab.key("stranger")?;
    let answer = source.migrate(&destination.address, &own(&stranger, &their_public).each_ref().map(String::as_str))?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "not the one expected")?;
    source.works()?;
    source.migrate_well(&destination.address, &own(&ours, &their_public).each_ref().map(String::as_str))?;
    destination.works()?;
    destination.quit()
}

/// A folder with certificate and key for `name`, and whom to trust.
fn certified(lab: &Lab, folder: &str, name: &str, authority: &Authority) -> Result<String, Failed> {
    let path = lab.path(folder);
    fs::create_dir(&path)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, authority)?;
    fs::write(path.join("ca.pem"), authority.pem())?;
    fs::write(path.join("cert.pem"), certificate.pem())?;
    fs::write(path.join("key.pem"), key.serialize_pem())?;
    fs::set_permissions(path.join("key.pem"), PermissionsExt::from_mode(0o600))?;
    Ok(lab.arg(folder))
}

fn authority() -> Result<Authority, Failed> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn certificates(lab: &Lab) -> Outcome {
    let (ours, theirs) = (authority()?, authority()?);
    let there = certified(lab, "there", "127.0.0.1", &ours)?;
    let here = certified(lab, "here", "source", &ours)?;
    let elsewhere = certified(lab, "elsewhere", "192.0.2.1", &ours)?;
    let stranger = certified(lab, "stranger", "source", &theirs)?;
    let options = |dir| ["--encrypt", "tls", "--tls-dir", dir];
    // whom the source does not trust, who is another host, whom the destination does not trust
    refused(lab, &options(&there), &options(&stranger), "TLS: ", "TLS: ")?;
    refused(lab, &options(&elsewhere), &options(&here), "TLS: ", "TLS: ")?;
    fs::copy(lab.path("here").join("ca.pem"), lab.path("stranger").join("ca.pem"))?;
    refused(lab, &options(&there), &options(&stranger), "TLS: ", "TLS: ")?;
    let mut source = lab.workload("source", "random:size=16M", &["--backing", "anon"])?;
    let destination = lab.receive("destination", &options(&there))?;
    source.migrate_well(&destination.address, &options(&here))?;
    destination.works()?;
    destination.quit()
}

/// The link is cut in post-copy; every new lane belongs to the session that there was.
fn cut(lab: &Lab, seed: u64) -> Outcome {
    let key = lab.key("key")?;
    let options = ["--encrypt", "aes256-gcm", "--psk-file", &key];
    let mut source = lab.workload("source", "random:size=16M", &["--backing", "anon", "--cpus", "2"])?;
    let destination = lab.receive("destination", &options)?;
    let (relay, address) = relay_to(&destination)?;
    let cut = (256 << 10) + seed * (1 << 20);
    relay.cut_after(cut);
    let slow = post_copy_at("300Mbit");
    let mut client = source.start_migrate(&address, &[&options[..], &slow].concat())?;
    wait_for("the link is cut", || Ok((relay.relayed() >= cut).then_some(())))?;
    let there = destination.status()?;
    ensure(there["state"] == "running", || format!("cut after {cut}: {there}"))?;
    ensure(!client.has_ended()?, || "the migration has ended without all pages".into())?;
    relay.restore();
    let answer = client.answer()?;
    let told = || format!("cut after {cut}: {answer:?}");
    ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", told)?;
    ensure(answer.json["recoveries"].as_u64() >= Some(1), told)?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A migration that is refused: why, at both sides, and the guest runs on.
fn refused(lab: &Lab, there: &[&str], here: &[&str], reason: &str, told: &str) -> Result<Value, Failed> {
    let destination = lab.receive("destination", there)?;
    let source = lab.workload("source", "random:size=8M", &[])?;
    let before = source.resources()?;
    let answer = source.migrate(&destination.address, here)?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), reason)?;
    source.works()?;
    source.is_back_at(&before)?;
    destination.says(told)?;
    ensure(destination.status()?["state"] == "incoming", || format!("{:?}", destination.status()))?;
    source.quit()?;
    destination.quit()?;
    Ok(answer.json)
}

fn wrong_key(lab: &Lab) -> Outcome {
    let (ours, theirs) = (lab.key("ours")?, lab.key("theirs")?);
    let options = |key| ["--encrypt", "aes256-gcm", "--psk-file", key];
    refused(lab, &options(&theirs), &options(&ours), "not the one expected", "not the one expected").map(drop)
}

fn wrong_cipher(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    let options = |cipher| ["--encrypt", cipher, "--psk-file", &key];
    let why = "no cipher in common: the source offers aes128-gcm, this destination takes aes256-gcm";
    refused(lab, &options("aes256-gcm"), &options("aes128-gcm"), why, why).map(drop)
}

fn plain_to_encrypted(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    let why = "this destination takes only encrypted migrations";
    refused(lab, &["--encrypt", "aes256-gcm", "--psk-file", &key], &[], why, why).map(drop)
}

fn encrypted_to_plain(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    let why = "this destination takes only plain migrations";
    refused(lab, &[], &["--encrypt", "aes256-gcm", "--psk-file", &key], why, why).map(drop)
}

fn key_files(lab: &Lab) -> Outcome {
    let file = lab.key("key")?;
    let source = lab.workload("source", "idle", &[])?;
    let migrate = |file: &str| source.migrate("tcp:127.0.0.1:1", &["--encrypt", "aes256-gcm", "--psk-file", file]);
    fs::set_permissions(&file, PermissionsExt::from_mode(0o644))?;
    for (file, why) in [(file.as_str(), "others can read"), ("/no/such/key", "No such file")] {
        let answer = migrate(file)?;
        ensure(answer.code == Some(1), || format!("{answer:?}"))?;
        ensure_says(answer.reason(), why)?;
        let (code, _, stderr) =
            usage(&["receive", "--listen", "tcp:127.0.0.1:0", "--encrypt", "aes256-gcm", "--psk-file", file])?;
        ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
        ensure_says(&stderr, why)?;
    }
    let (code, _, stderr) = usage(&["keygen", "--out", &file])?;
    ensure(code == Some(1), || format!("{code:?}"))?;
    ensure_says(&stderr, "File exists")?;
    source.works()?;
    source.quit()
}

fn wrong_command_lines(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    for options in [
        &["--encrypt", "aes256-gcm"][..],
        &["--psk-file", &key],
        &["--encrypt", "tls", "--psk-file", &key],
        &["--encrypt", "aes256-gcm", "--static-key", &key],
        &["--encrypt", "aes256-gcm", "--psk-file", &key, "--tls-dir", "/tmp"],
        &["--encrypt", "rot13", "--psk-file", &key],
    ] {
        let (code, _, stderr) = usage(&[&["receive", "--listen", "tcp:127.0.0.1:0"], options].concat())?;
        ensure(code == Some(2) && !stderr.is_empty(), || format!("{options:?}: {code:?} {stderr}"))?;
        let migrate = ["ctl", "--control", "/no/such/socket", "migrate", "--to", "tcp:127.0.0.1:1"];
        let (code, ..) = usage(&[&migrate, options].concat())?;
        ensure(code == Some(2), || format!("{options:?}: {code:?}"))?;
    }
    Ok(())
}

/// Passes connections on, and keeps all that goes by.
fn tap(target: SocketAddr) -> Result<(String, Kept), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp:{}", listener.local_addr()?);
    let kept = Kept::default();
    let keep = kept.clone();
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(target) else { return };
            let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else { return };
            for (mut from, mut to) in [(near, far_too), (far, near_too)] {
                let keep = keep.clone();
                thread::spawn(move || {
                    let (mut chunk, mut all) = (vec![0; 1 << 16], Vec::new());
                    while let Ok(len @ 1..) = from.read(&mut chunk) {
                        all.extend_from_slice(&chunk[..len]);
                        if to.write_all(&chunk[..len]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(std::net::Shutdown::Both);
                    keep.lock().unwrap_or_else(PoisonError::into_inner).push(all);
                });
            }
        }
    });
    Ok((address, kept))
}

/// Runs of the memory that the guest works on, of which none is of a kind that anything could have
/// in it.
pub(crate) fn telling_runs(lab: &Lab, source: &Process) -> Result<HashSet<[u8; RUN]>, Failed> {
    let (at, len) = source.work_area(lab)?;
    let memory = source.memory(lab, at, len)?;
    let telling = |run: &&[u8; RUN]| run.iter().collect::<HashSet<_>>().len() >= 6;
    let runs: HashSet<_> = memory.as_chunks().0.iter().filter(telling).copied().collect();
    ensure(runs.len() > 100, || format!("only {} runs to look for", runs.len()))?;
    Ok(runs)
}

/// Whether any of the runs is in it, wherever.
pub(crate) fn holds_any(bytes: &[u8], runs: &HashSet<[u8; RUN]>) -> bool {
    bytes.windows(RUN).any(|run| runs.contains(run))
}

fn nothing_is_readable(lab: &Lab) -> Outcome {
    let key = lab.key("key")?;
    for encrypted in [true, false] {
        let options: &[&str] = if encrypted { &["--encrypt", "aes256-gcm", "--psk-file", &key] } else { &[] };
        let mut source = lab.workload("source", "hot:size=4M,data=4M", &["--backing", "anon"])?;
        source.ask(&["pause"])?;
        let marked = telling_runs(lab, &source)?;
        let destination = lab.receive("destination", options)?;
        let (address, kept) = tap(destination.address.trim_start_matches("tcp:").parse()?)?;
        source.migrate_well(&address, options)?;
        destination.quit()?;
        let streams = wait_for("all connections have ended", || {
            let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes: usize = kept.iter().map(Vec::len).sum();
            Ok((bytes > marked.len() * RUN).then(|| kept.clone()))
        })?;
        let seen = streams.iter().any(|stream| holds_any(stream, &marked));
        ensure(seen != encrypted, || format!("encrypted: {encrypted}, guest memory on the wire: {seen}"))?;
    }
    Ok(())
}
