//! VMs in a jail: a folder of their own as root, with the devices that they need, and without
//! `/proc` and `/sys`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use libtest_mimic::Failed;
use nix::{
    sys::stat::{Mode, SFlag, mknod},
    unistd::geteuid,
};

use crate::{
    common::{Lab, Outcome, Process, Suite, at_work, ensure, ensure_says},
    fail_safe::checks_all,
};

const GUEST: &str = "random:size=16M,every=5ms";
/// What a jail has of this host's devices.
const DEVICES: [&str; 2] = ["kvm", "userfaultfd"];

pub(crate) fn add(suite: &mut Suite) {
    let missing = (!geteuid().is_root()).then(|| "chroot and mknod need root".into());
    suite.unless(missing, |suite| {
        for backing in ["thp", "anon", "memfd", "hugetlb"] {
            suite.kvm_backed(format!("jail/pre_copy/{backing}"), backing, move |lab| moves(lab, backing, "pre-copy"));
            suite.post_copy(format!("jail/post_copy/{backing}"), backing, move |lab| moves(lab, backing, "post-copy"));
        }
        suite.kvm("jail/every_address_of_a_name", every_address_of_a_name);
        suite.kvm("jail/what_needs_proc_says_so", what_needs_proc_says_so);
    });
}

/// The files that a program needs to start, by `ldd`.
fn libraries(program: &str) -> Result<Vec<PathBuf>, Failed> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Makes a jail of the lab's folder.
fn jail(lab: &Lab) -> Outcome {
    let program = env!("CARGO_BIN_EXE_minivmm");
    fs::create_dir(lab.path("dev"))?;
    fs::create_dir(lab.path("etc"))?;
    fs::write(lab.path("etc/hosts"), "127.0.0.1 several\n127.0.0.2 several\n::1 several\n")?;
    // without this, a name in that file has one address
    fs::write(lab.path("etc/host.conf"), "multi on\n")?;
    fs::copy(program, lab.path("program"))?;
    for library in libraries(program)? {
        let inside = lab.path(library.strip_prefix("/")?.to_str().ok_or("not text")?);
        fs::create_dir_all(inside.parent().ok_or("no folder")?)?;
        fs::copy(library, inside)?;
    }
    for device in DEVICES {
        let (outside, inside) = (Path::new("/dev").join(device), lab.path(&format!("dev/{device}")));
        // without the device there is a system call
        let Ok(found) = fs::metadata(outside) else { continue };
        let made = mknod(&inside, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, found.rdev());
        let opened = made.map_err(std::io::Error::from).and_then(|()| fs::File::open(&inside));
        opened.map_err(|why| format!("/dev/{device} in the jail: {why}"))?;
    }
    Ok(())
}

/// A command of `minivmm` in the jail. `args` begin with name and command.
fn start(lab: &Lab, args: &[&str]) -> Result<Process, Failed> {
    let mut program = Command::new("chroot");
    program.arg(lab.path("")).arg("/program").stdin(Stdio::null());
    lab.start_by(program, &Path::new("/").join(args[0]), args)
}

fn run(lab: &Lab, backing: &str) -> Result<Process, Failed> {
    let source = start(lab, &["source", "run", "--memory", "64M", "--workload", GUEST, "--backing", backing])?;
    source.wait_until("the guest works", at_work)?;
    Ok(source)
}

fn moves(lab: &Lab, backing: &str, strategy: &str) -> Outcome {
    jail(lab)?;
    let mut source = run(lab, backing)?;
    let destination = start(lab, &["destination", "receive", "--listen", "tcp:127.0.0.1:0"])?;
    let report = source.migrate_well(&destination.address, &["--strategy", strategy])?;
    ensure(report["pages"]["total"] == 64 << 8, || format!("{report}"))?;
    destination.works()?;
    checks_all(&destination)?;
    destination.quit()
}

/// A destination by a name is found at each of its addresses, and prints all that it has.
fn every_address_of_a_name(lab: &Lab) -> Outcome {
    jail(lab)?;
    let ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    for address in ["127.0.0.1", "127.0.0.2", "[::1]"] {
        if address.starts_with('[') && !ipv6 {
            eprintln!("without IPv6");
            continue;
        }
        let mut source = run(lab, "thp")?;
        let destination = start(lab, &["destination", "receive", "--listen", "tcp:several:0"])?;
        let port = destination.address.strip_prefix("tcp:several:").ok_or("another address")?.to_owned();
        crate::common::wait_for("every address is printed", || {
            let said = destination.stdout();
            Ok(said.contains(&format!("bound tcp:{address}:{port}\n")).then_some(()))
        })?;
        source.migrate_well(&format!("tcp:{address}:{port}"), &[])?;
        destination.works()?;
        destination.quit()?;
    }
    // and a source goes through them until one answers
    let mut source = run(lab, "thp")?;
    let destination = start(lab, &["destination", "receive", "--listen", "tcp:127.0.0.2:0"])?;
    let port = destination.address.rsplit_once(':').ok_or("no port")?.1.to_owned();
    source.migrate_well(&format!("tcp:several:{port}"), &[])?;
    destination.works()?;
    destination.quit()
}

/// What tells processes apart needs `/proc`.
fn what_needs_proc_says_so(lab: &Lab) -> Outcome {
    jail(lab)?;
    let vm = run(lab, "memfd")?;
    let answer = vm.ctl(&["refresh"])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "is /proc mounted?")?;
    vm.works()?;
    let tracker = start(lab, &["other", "run", "--memory", "16M", "--tracker", "write-protect", "--workload", "idle"]);
    let why = tracker.err().map(|why| format!("{why:?}")).unwrap_or_default();
    ensure_says(&why, "is /proc mounted?")?;
    vm.quit()
}
