//! VMMs as real processes: this test's program starts itself. Each leases RAM from a broker, and
//! then waits for its death.

use std::{
    env, fs,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
};

use migration_core::{RamLayout, RamRegion, fence::NotFenced};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tempfile::TempDir;

use super::*;
use crate::{BrokerOptions, RamBroker, RamLease, SocketOptions, UnixListener};

const VM: VmId = VmId([7; 16]);
/// Says to this program that it is a VMM of this broker.
const BROKER: &str = "SUPERVISED_BROKER";
/// What its VM can go on from.
const SAVED: &str = "SUPERVISED_SAVED";

/// The VM of a VMM that only leases RAM. A record is text: what was saved, then the holders.
struct Vm;

impl SupervisedVm for Vm {
    type Saved = String;

    fn lease(&self, broker: &BrokerClient) -> Result<RamLease, BrokerError> {
        let file = memfd_create(c"ram", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&file, 0x1000).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)).unwrap();
        let file: OwnedFd = file;
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 0x1000 }]).unwrap();
        broker.lease(VM, &layout, "memfd", &[file.as_fd()])
    }

    fn encode(&self, record: &RestartRecord<String>) -> Vec<u8> {
        let holders = record.holders.iter().map(|holder| String::from_utf8(holder.clone()).unwrap());
        let elsewhere = record.elsewhere.clone().unwrap_or_default();
        let mut words = vec![record.saved.clone().unwrap_or_default(), elsewhere, record.ended.to_string()];
        words.extend(holders);
        words.join(" ").into_bytes()
    }

    fn last_saved(&self, metadata: &[u8]) -> Option<String> {
        decode(metadata).ok()?.saved
    }
}

fn decode(metadata: &[u8]) -> Result<RestartRecord<String>, VmError> {
    let text = String::from_utf8(metadata.to_vec()).map_err(|e| VmError::because("no text", e))?;
    let mut words = text.split(' ');
    let mut word = || words.next().ok_or_else(|| VmError::new("too short"));
    let some = |word: &str| (!word.is_empty()).then(|| word.to_owned());
    let (saved, elsewhere, ended) = (some(word()?), some(word()?), word()? == "true");
    Ok(RestartRecord { saved, elsewhere, ended, holders: words.map(|word| word.as_bytes().to_vec()).collect() })
}

/// Knows processes of this host by their numbers.
struct Pids;

impl Fence for Pids {
    fn fence(&self, _identity: &[u8]) -> Result<(), NotFenced> {
        Err(NotFenced("nobody is killed here".into()))
    }

    fn is_dead(&self, identity: &[u8]) -> bool {
        let pid = String::from_utf8(identity.to_vec()).unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.map_or(true, |status| status.contains("State:\tZ"))
    }
}

fn own() -> Vec<u8> {
    std::process::id().to_string().into_bytes()
}

/// The file by which a VMM says that the broker has its record.
fn owner_file(broker: &Path, pid: u32) -> PathBuf {
    broker.with_extension(pid.to_string())
}

/// Starts a VMM; `saved` is what its VM goes on from, or "fails" for one that ends.
fn start(broker: &BrokerClient, saved: &str) -> io::Result<Child> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["supervisor::tests::as_a_vmm", "--exact", "--nocapture"]);
    command.env(BROKER, broker.path()).env(SAVED, saved).stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

/// The body of a VMM; of a process that is none, an empty test.
#[test]
fn as_a_vmm() {
    let (Some(broker), Ok(saved)) = (env::var_os(BROKER), env::var(SAVED)) else { return };
    if saved == "fails" {
        std::process::exit(3);
    }
    let broker = PathBuf::from(broker);
    let record = OwnerRecord::new(Some(broker.clone()), Some(own()));
    record.update(Some(&Vm), Change::Saved(saved)).unwrap();
    fs::write(owner_file(&broker, std::process::id()), "").unwrap();
    loop {
        // until it is killed
        thread::park();
    }
}

/// Restarts such VMMs, and passes on what it is told.
struct Restarter {
    broker: BrokerClient,
    events: Mutex<Sender<Event>>,
}

#[derive(Debug)]
enum Event {
    Restarted(String, u32),
    Lost(String),
}

impl RestartVmm for Restarter {
    type Saved = String;

    fn decode(&self, metadata: &[u8]) -> Result<RestartRecord<String>, VmError> {
        decode(metadata)
    }

    fn start(&self, vm: VmId, saved: &String) -> io::Result<Child> {
        assert_eq!(vm, VM);
        start(&self.broker, saved)
    }

    fn restarted(&self, _vm: VmId, saved: &String, pid: u32) {
        self.events.lock().unwrap().send(Event::Restarted(saved.clone(), pid)).unwrap();
    }

    fn lost(&self, _vm: VmId, why: &NotRestarted) {
        self.events.lock().unwrap().send(Event::Lost(migration_core::text::describe(why))).unwrap();
    }
}

/// A broker with a supervisor.
struct Lab {
    folder: TempDir,
    broker: Arc<RamBroker>,
    client: BrokerClient,
    events: Receiver<Event>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let client = BrokerClient::new(folder.path().join("broker"));
        let (events, told) = mpsc::channel();
        let restarter = Restarter { broker: client.clone(), events: Mutex::new(events) };
        let supervisor = Supervisor::new(client.path(), Arc::new(Pids), restarter);
        let options = BrokerOptions { owner_gone: Some(Arc::new(supervisor)), ..BrokerOptions::default() };
        let (broker, stop) = (RamBroker::new(options), Arc::new(AtomicBool::new(false)));
        let mut listener = UnixListener::bind(client.path(), SocketOptions::default()).unwrap();
        let (serving, stopped) = (broker.clone(), stop.clone());
        let thread = Some(thread::spawn(move || serving.serve(&mut listener, &stopped).unwrap()));
        Self { folder, broker, client, events: told, stop, thread }
    }

    /// Waits until this process owns the VM, and the broker has its record.
    fn wait_owner(&self, pid: u32) {
        let file = owner_file(self.client.path(), pid);
        while !file.exists() {
            thread::yield_now();
        }
    }

    fn lost(&self) -> String {
        match self.events.recv().unwrap() {
            Event::Lost(why) => why,
            other => panic!("{other:?}"),
        }
    }

    /// Has this process own the VM.
    fn own(&self) -> OwnerRecord<String> {
        let record = OwnerRecord::new(Some(self.client.path().to_owned()), Some(own()));
        record.update(Some(&Vm), Change::Nothing).unwrap();
        record
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

fn kill(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_vm_is_restarted_when_its_owner_is_dead_but_not_for_ever() {
    let lab = Lab::new();
    let mut first = start(&lab.client, "snapshot").unwrap();
    lab.wait_owner(first.id());
    first.kill().unwrap();
    first.wait().unwrap();
    let mut owner = first.id();
    for _ in 0..MAX_RESTARTS {
        match lab.events.recv().unwrap() {
            Event::Restarted(saved, pid) => {
                assert!(saved == "snapshot" && pid != owner);
                owner = pid;
            }
            other => panic!("{other:?}"),
        }
        lab.wait_owner(owner);
        kill(owner);
    }
    assert_eq!(lab.lost(), "it was restarted 5 times within 60s");
}

#[test]
fn a_process_that_fails_to_restore_is_reported() {
    let lab = Lab::new();
    let record = OwnerRecord::new(Some(lab.client.path().to_owned()), Some(b"4194304".to_vec()));
    record.update(Some(&Vm), Change::Saved("fails".into())).unwrap();
    // no process has this number; dropping the record closes the connection
    drop(record);
    assert!(lab.lost().starts_with("restoring fails has failed (exit status: 3)"));
}

#[test]
fn what_must_not_be_restarted_is_not() {
    let lab = Lab::new();
    let changes = [
        (Change::Ended, "by itself"),
        (Change::Elsewhere(Some("tcp:host:1".into())), "may run there"),
        (Change::Nothing, "no snapshot"),
    ];
    for (change, words) in changes {
        let record = lab.own();
        record.update(Some(&Vm), change).unwrap();
        drop(record);
        let why = lab.lost();
        assert!(why.contains(words), "{why}");
        lab.client.forget(VM).unwrap();
    }
    let unnamed = OwnerRecord::new(Some(lab.client.path().to_owned()), None);
    unnamed.update(Some(&Vm), Change::MayRunIn(own())).unwrap();
    drop(unnamed);
    assert_eq!(lab.lost(), "it is not known which process ran it");
}

#[test]
fn a_vm_whose_holders_live_waits_and_goes_to_whoever_leases_it() {
    let lab = Lab::new();
    let first = lab.own();
    first.update(Some(&Vm), Change::Saved("snapshot".into())).unwrap();
    // this process lives: the supervisor waits for its death, and sees that the VM is owned again
    drop(first);
    let second = lab.own();
    assert_eq!(second.status().saved.as_deref(), Some("snapshot"), "it is the earlier owner's");
    second.release().unwrap();
    assert!(lab.broker.list().is_empty());
    assert!(lab.events.try_recv().is_err());
}

#[test]
fn a_record_has_all_who_may_run_the_vm() {
    let lab = Lab::new();
    let record = lab.own();
    let vm: Option<&dyn SupervisedVm<Saved = String>> = Some(&Vm);
    let holders = || {
        // a lease of the same VM gets the metadata of the one before
        let lease = Vm.lease(&lab.client).unwrap();
        decode(lease.previous_metadata()).unwrap().holders
    };
    record.update_or_fail(vm, Change::MayRunIn(b"1".to_vec())).unwrap();
    assert_eq!(holders(), [own(), b"1".to_vec()]);
    record.update_or_fail(vm, Change::Here).unwrap();
    assert_eq!(holders(), [own()]);
    // without a VM it is told with the next change
    record.update(None, Change::MayRunIn(b"2".to_vec())).unwrap();
    record.update(vm, Change::Nothing).unwrap();
    assert_eq!(holders(), [own(), b"2".to_vec()]);
    // a process of this host is about to lease it
    record.release().unwrap();
    assert_eq!(lab.broker.list().len(), 1);
    assert!(!record.status().has_ram);
}

#[test]
fn a_broker_that_has_ended_restarts_nothing_and_one_that_is_stuck_might() {
    let lab = Lab::new();
    let nobody = OwnerRecord::new(Some(lab.folder.path().join("nobody")), Some(own()));
    assert!(nobody.update(Some(&Vm), Change::Here).is_err());
    nobody.update_or_fail(Some(&Vm), Change::Here).unwrap();
    assert!(!nobody.status().has_ram);
    let stuck = lab.folder.path().join("stuck");
    let listener = std::os::unix::net::UnixListener::bind(&stuck).unwrap();
    let record = OwnerRecord::new(Some(stuck.clone()), Some(own()));
    thread::scope(|scope| {
        let told = scope.spawn(|| record.update_or_fail(Some(&Vm), Change::Here));
        let (asked, _) = listener.accept().unwrap();
        // the status does not wait for the broker
        assert_eq!(record.status(), OwnerStatus { broker: Some(stuck), has_ram: false, saved: None });
        drop((asked, listener));
        assert!(told.join().unwrap().is_err());
    });
}
