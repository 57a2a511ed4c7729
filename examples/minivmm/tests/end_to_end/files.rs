//! Files and sockets of a VM: their modes under any umask, and what others have put into the way.

use std::{
    fs::{self, File, Permissions},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
        net::UnixListener,
    },
    path::Path,
};

use libtest_mimic::Failed;
use nix::unistd::geteuid;

use crate::{
    common::{Client, Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, minivmm_after, usage, wait_for},
    snapshot::{Small, snapshot_well},
};

/// Guest memory that is written out.
const DUMP: [&str; 5] = ["memory", "--gpa", "0x100000", "--len", "0x100000"];
/// A user that is neither root nor the one of the tests.
const STRANGER: u32 = 54321;

pub(crate) fn add(suite: &mut Suite) {
    suite.kvm("files/modes_under_umask_0", modes_under_umask_0);
    suite.kvm("files/sockets", sockets);
    suite.kvm("files/dumps", dumps);
    let missing = (!geteuid().is_root()).then(|| "to mount a small file system needs root".into());
    suite.unless(missing, |suite| suite.kvm("files/dump_disk_full", dump_disk_full));
    suite.kvm("files/relative_addresses", relative_addresses);
    suite.anywhere("files/keys", keys);
    suite.anywhere("files/emitted", emitted);
}

fn mode(path: &Path) -> Result<u32, Failed> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

fn ensure_private(lab: &Lab, names: &[&str]) -> Outcome {
    names.iter().try_for_each(|name| {
        let found = mode(&lab.path(name))?;
        ensure(found == 0o600, || format!("{name} has mode {found:04o}"))
    })
}

fn names(folder: &Path) -> Result<Vec<String>, Failed> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names = fs::read_dir(folder)?.map(name).collect::<Result<Vec<_>, Failed>>()?;
    names.sort();
    Ok(names)
}

/// `minivmm` under a umask that takes nothing away. `args` begin with name and command.
fn start(lab: &Lab, args: &[&str]) -> Result<Process, Failed> {
    lab.start_by(minivmm_after("umask 0"), &lab.path(args[0]), args)
}

fn run(lab: &Lab, name: &str) -> Result<Process, Failed> {
    let vm = start(lab, &[name, "run", "--memory", "64M", "--workload", "random:size=8M", "--backing", "memfd"])?;
    vm.wait_until("the guest works", at_work)?;
    Ok(vm)
}

/// Everything that a guest's memory can be had by belongs to its owner alone.
fn modes_under_umask_0(lab: &Lab) -> Outcome {
    let mut vm = run(lab, "vm")?;
    let listen = format!("unix:{}", lab.arg("listen"));
    let destination = start(lab, &["destination", "receive", "--listen", &listen])?;
    let broker = start(lab, &["broker", "broker", "--listen", &format!("unix:{}", lab.arg("broker"))])?;
    vm.ask(&[&DUMP[..], &["--out", &lab.arg("dump")]].concat())?;
    snapshot_well(&vm, &lab.arg("snapshot"))?;
    let status = minivmm_after("umask 0").args(["keygen", "--out", &lab.arg("key")]).output()?;
    ensure(status.status.success(), || format!("{status:?}"))?;
    ensure_private(lab, &["vm", "destination", "listen", "broker", "dump", "snapshot", "key"])?;
    ensure(mode(&lab.path("key.pub"))? == 0o644, || "a public key that others can change".into())?;
    let checkpoints = lab.path("checkpoints");
    fs::create_dir(&checkpoints)?;
    let protect = format!("reverse:interval=20ms,dir={}", checkpoints.display());
    let args = ["--strategy", "post-copy", "--fail-safe", &protect, "--bandwidth", "20Mbit"];
    let client = vm.start_migrate(&listen, &args)?;
    let found = wait_for("there are checkpoints", || {
        let Some(folder) = names(&checkpoints)?.first().map(|name| checkpoints.join(name)) else { return Ok(None) };
        let committed = folder.join("latest").exists();
        Ok(committed.then_some(folder))
    })?;
    ensure(mode(&found)? == 0o700, || "a folder that others can enter".into())?;
    for name in names(&found)? {
        // those of earlier checkpoints may go meanwhile
        let Ok(found) = mode(&found.join(&name)) else { continue };
        ensure(found == 0o600, || format!("{name} has mode {found:04o}"))?;
    }
    client.answer()?;
    vm.ended_well()?;
    drop(broker);
    destination.quit()
}

/// What is planted beside a socket does not matter, and nobody else can keep it from being made.
fn sockets(lab: &Lab) -> Outcome {
    fs::create_dir(lab.path("s"))?;
    let (folder, listen) = (lab.path("s"), format!("unix:{}", lab.arg("s/listen")));
    // a lock on the folder, a stale socket, and what stands where minivmm used to put the socket
    // first
    let held = File::open(&folder)?;
    held.lock()?;
    drop(UnixListener::bind(lab.path("s/listen"))?);
    let control = lab.path("s/control");
    drop(UnixListener::bind(&control)?);
    symlink("/no/such/file", lab.path("s/.control.lock"))?;
    let receiver = lab.start_by(
        minivmm_after(&format!("umask 0; ln -s /no/such/file {}/.$$", folder.display())),
        &control,
        &["s/control", "receive", "--listen", &listen],
    )?;
    ensure_private(lab, &["s/control", "s/listen"])?;
    let mut expected = [&format!(".{}", receiver.pid()), ".control.lock", "control", "listen"].map(str::to_owned);
    expected.sort();
    let found = || -> Result<Vec<String>, Failed> {
        // without what the trial itself keeps there
        Ok(names(&folder)?.into_iter().filter(|name| !name.contains(".std")).collect())
    };
    ensure(found()? == expected, || format!("{:?}", found()))?;
    // a second one does not get it, and leaves nothing
    let second = lab.start_by(minivmm_after("umask 0"), &control, &["second", "run", "--workload", "idle"]);
    ensure_says(&format!("{:?}", second.err()), "another process listens there")?;
    ensure(found()? == expected, || format!("{:?}", found()))?;
    // what is no socket stays
    fs::write(lab.path("file"), "precious")?;
    let third = lab.start_by(minivmm_after("umask 0"), &lab.path("file"), &["third", "run", "--workload", "idle"]);
    ensure_says(&format!("{:?}", third.err()), "no socket")?;
    ensure(fs::read(lab.path("file"))? == b"precious", || "a file was overwritten".into())?;
    receiver.quit()
}

/// A dump is whole or not there, and goes through no link.
fn dumps(lab: &Lab) -> Outcome {
    let vm = run(lab, "vm")?;
    let folder = lab.path("d");
    fs::create_dir(&folder)?;
    let out = lab.arg("d/dump");
    let dump = |gpa: &str, len: &str| vm.ctl(&["memory", "--gpa", gpa, "--len", len, "--out", &out]);
    // what is asked for is looked at before anything is made, or replaced
    for there in [false, true] {
        if there {
            fs::write(&out, "precious")?;
        }
        for (gpa, len) in [("0x4000000", "1"), ("0", "0x4000001"), ("0xffffffffffffffff", "2")] {
            let answer = dump(gpa, len)?;
            ensure(answer.code == Some(1), || format!("{answer:?}"))?;
            ensure(names(&folder)?.len() == usize::from(there), || format!("{gpa} {len}: {:?}", names(&folder)))?;
        }
        ensure(!there || fs::read(&out)? == b"precious", || "a file was overwritten".into())?;
    }
    fs::remove_file(&out)?;
    let (victim, unfinished) = (lab.path("victim"), lab.path("d/dump.new"));
    fs::write(&victim, "untouched")?;
    for link in [fs::hard_link::<&Path, &Path>, symlink] {
        link(&victim, &unfinished)?;
        let answer = dump("0", "0x100000")?;
        ensure(answer.code == Some(0), || format!("{answer:?}"))?;
        ensure_private(lab, &["d/dump"])?;
        ensure(fs::metadata(&out)?.len() == 1 << 20 && fs::metadata(&out)?.nlink() == 1, || "not whole".into())?;
        ensure(names(&folder)? == ["dump", "dump.new"], || format!("{:?}", names(&folder)))?;
        fs::remove_file(&unfinished)?;
        // in place of the dump itself
        fs::remove_file(&out)?;
        link(&victim, Path::new(&out))?;
        let is_link = fs::symlink_metadata(&out)?.is_symlink();
        let answer = dump("0", "0x1000")?;
        ensure(answer.code == Some(i32::from(is_link)), || format!("{answer:?}"))?;
        fs::remove_file(&out)?;
        ensure(fs::read(&victim)? == b"untouched", || "it was written through a link".into())?;
    }
    if geteuid().is_root() {
        fs::write(&out, "a stranger's")?;
        chown(&out, Some(STRANGER), None)?;
        let answer = dump("0", "0x1000")?;
        ensure_says(answer.json["error"].as_str().unwrap_or(""), "another user")?;
        ensure(names(&folder)? == ["dump"] && fs::read(&out)? == b"a stranger's", || "it was replaced".into())?;
    }
    vm.works()?;
    vm.quit()
}

/// What cannot be completed leaves nothing.
fn dump_disk_full(lab: &Lab) -> Outcome {
    let small = Small::mount(lab, "1M,mode=0700")?.ok_or("no small file system can be mounted")?;
    let folder = &small.0;
    let vm = run(lab, "vm")?;
    let out = lab.arg("small/dump");
    fs::write(&out, "precious")?;
    let answer = vm.ctl(&["memory", "--gpa", "0", "--len", "0x2000000", "--out", &out])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.json["error"].as_str().unwrap_or(""), "No space left")?;
    ensure(names(folder)? == ["dump"] && fs::read(&out)? == b"precious", || format!("{:?}", names(folder)))?;
    let elf = lab.arg("small/elf");
    fs::write(lab.path("small/filler"), vec![1; (1 << 20) - (16 << 10)])?;
    let (code, _, stderr) = usage(&["workload", "--emit", "hot:size=8M", "--out", &elf])?;
    ensure(code == Some(1), || format!("{code:?}"))?;
    ensure_says(&stderr, "No space left")?;
    ensure(names(folder)? == ["dump", "filler"], || format!("{:?}", names(folder)))?;
    vm.works()?;
    vm.quit()?;
    small.unmount()
}

/// A relative path is one of the client's working directory, not of the server's.
fn relative_addresses(lab: &Lab) -> Outcome {
    let (here, there) = (lab.path("here"), lab.path("there"));
    fs::create_dir(&here)?;
    fs::create_dir(&there)?;
    let mut program = minivmm_after("umask 0");
    program.current_dir(&there);
    let mut source = lab.start_by(
        program,
        &lab.path("source"),
        &["source", "run", "--memory", "64M", "--workload", "random:size=8M"],
    )?;
    source.wait_until("the guest works", at_work)?;
    let mut program = minivmm_after("umask 0");
    program.current_dir(&here);
    let destination =
        lab.start_by(program, &lab.path("destination"), &["destination", "receive", "--listen", "unix:sock"])?;
    ensure(here.join("sock").exists(), || "it does not listen where it was started".into())?;
    let control = lab.arg("source");
    let ctl = ["ctl", "--json", "--control", &control];
    // nothing is known of `recover` but where it would go
    let answer = Client::start_in(&here, &[&ctl[..], &["migrate", "--to", "unix:sock"]].concat())?.answer()?;
    ensure(answer.code == Some(0) && answer.json["outcome"] == "completed", || format!("{answer:?}"))?;
    source.ended_well()?;
    destination.works()?;
    destination.quit()
}

/// A key is read only from a file of its reader.
fn keys(lab: &Lab) -> Outcome {
    let (key, link) = (lab.key("key")?, lab.arg("link"));
    symlink(&key, &link)?;
    let tried = |file: &str| usage(&["receive", "--listen", "tcp:127.0.0.1:0", "--seal-key-file", file]);
    let sealed = |file: &str, why: &str| -> Outcome {
        let (code, _, stderr) = tried(file)?;
        ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
        ensure_says(&stderr, why)
    };
    let psk = |file: &str, why: &str| -> Outcome {
        let args = ["receive", "--listen", "tcp:127.0.0.1:0", "--encrypt", "aes256-gcm", "--psk-file", file];
        let (code, _, stderr) = usage(&args)?;
        ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
        ensure_says(&stderr, why)
    };
    for (file, why) in [(link.as_str(), "symbolic link"), ("/dev/null", "not a regular file")] {
        sealed(file, why)?;
        psk(file, why)?;
    }
    fs::set_permissions(&key, Permissions::from_mode(0o640))?;
    sealed(&key, "0640")?;
    fs::set_permissions(&key, Permissions::from_mode(0o600))?;
    if geteuid().is_root() {
        chown(&key, Some(STRANGER), None)?;
        sealed(&key, "another user (uid 54321)")?;
        psk(&key, "another user (uid 54321)")?;
    }
    // a pair of which one half is taken is not made
    fs::write(lab.path("half.pub"), "taken")?;
    let (code, ..) = usage(&["keygen", "--out", &lab.arg("half")])?;
    ensure(code == Some(1) && !lab.path("half").exists(), || "half a pair is left".into())
}

/// An ELF is no secret: links are followed, and what is no file gets the bytes.
fn emitted(lab: &Lab) -> Outcome {
    let (out, link) = (lab.arg("elf"), lab.arg("link"));
    fs::write(&out, "old")?;
    symlink(&out, &link)?;
    for to in [link.as_str(), "/dev/null"] {
        let (code, _, stderr) = usage(&["workload", "--emit", "idle", "--out", to])?;
        ensure(code == Some(0), || stderr)?;
    }
    ensure(fs::symlink_metadata(&link)?.is_symlink(), || "the link was replaced".into())?;
    ensure(fs::read(&out)?.starts_with(b"\x7fELF"), || "not an ELF".into())?;
    ensure(!lab.path("elf.new").exists(), || "an unfinished file is left".into())
}
