//! Successors as real processes: this test's program starts itself. What is handed over is one
//! byte.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio, exit},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use migration_core::{
    engine::{Receiver as VmReceiver, ReceiverOptions},
    text::describe,
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
};
use migration_kvm::{
    fence::ProcessIdentity,
    handover::{
        Attempt, HandOvers, Interval, NewSuccessor, NotReplaced, Predecessor, ReplaceError, Replacement, VmOwner,
        replace, schedule,
    },
    successor::{Endpoints, PredecessorEnd, Successor, SuccessorError, take_control, watch_predecessor},
};
use tempfile::TempDir;

/// Says to this program that it is a successor, and of which kind.
const KIND: &str = "SUCCESSOR_KIND";
const CONTROL: &str = "SUCCESSOR_CONTROL";
const INTERIM: &str = "SUCCESSOR_INTERIM";
const LISTEN: &str = "SUCCESSOR_LISTEN";
/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(60);

/// What a successor does, and what a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Takes the VM over.
    Takes,
    /// Ends before it can receive.
    Ends,
    /// Is never ready.
    Hangs,
    /// Does not take the VM.
    Refuses,
    /// Takes the VM, and dies before it answers.
    Dies,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Takes, Self::Ends, Self::Hangs, Self::Refuses, Self::Dies];

    fn name(self) -> String {
        format!("{self:?}")
    }
}

/// The body of a successor; of a process that is none, an empty test.
#[test]
fn as_a_successor() {
    let Ok(name) = env::var(KIND) else { return };
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name).expect("a kind");
    let path = |variable| PathBuf::from(env::var_os(variable).expect("a path"));
    match kind {
        Kind::Ends => exit(3),
        Kind::Hangs => loop {
            std::thread::park();
        },
        Kind::Takes | Kind::Refuses | Kind::Dies => {}
    }
    let listener = UnixListener::bind(path(LISTEN)).unwrap();
    let _control = UnixListener::bind(path(INTERIM)).unwrap();
    let (mut predecessor, _) = listener.accept().unwrap();
    predecessor.read_exact(&mut [0]).unwrap();
    match kind {
        Kind::Takes => {
            predecessor.write_all(b"y").unwrap();
            take_control(&path(INTERIM), &path(CONTROL)).unwrap();
            exit(0);
        }
        Kind::Refuses => predecessor.write_all(b"n").unwrap(),
        _ => exit(1),
    }
    loop {
        // until it is killed
        std::thread::park();
    }
}

/// A VMM, and what it is asked and told.
struct Vmm {
    folder: TempDir,
    hand_overs: HandOvers<Kind>,
    patience: Duration,
    events: Mutex<Sender<String>>,
}

impl Vmm {
    fn new(patience: Duration) -> (Arc<Self>, Receiver<String>) {
        let folder = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(folder.path().join("control")).unwrap());
        let (events, heard) = mpsc::channel();
        (Arc::new(Self { folder, hand_overs: HandOvers::default(), patience, events: Mutex::new(events) }), heard)
    }

    fn say(&self, event: impl Into<String>) {
        // a test that has seen enough does not listen any more
        let _ = self.events.lock().unwrap().send(event.into());
    }

    fn endpoints(&self) -> Endpoints {
        Endpoints::beside(&self.folder.path().join("control"))
    }

    /// Checks that nothing is left of a successor.
    fn is_alone(&self) {
        let left: Vec<_> = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["control"]);
    }
}

impl Predecessor for Vmm {
    type Plan = Kind;
    type Report = &'static str;

    fn hand_overs(&self) -> &HandOvers<Kind> {
        &self.hand_overs
    }

    fn control(&self) -> Result<PathBuf, VmError> {
        Ok(self.endpoints().control)
    }

    fn command(&self, new: &NewSuccessor<'_, Kind>) -> Result<Command, VmError> {
        self.say(format!("{:?}, then {:?}", new.plan, new.schedule));
        assert_eq!(*new.predecessor, ProcessIdentity::own().unwrap());
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["as_a_successor", "--exact", "--nocapture"]).env(KIND, new.plan.name());
        let Endpoints { control, interim, listen } = new.endpoints;
        command.env(CONTROL, control).env(INTERIM, interim).env(LISTEN, listen);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command)
    }

    fn cede_control(&self, _control: &Path) {
        self.say("cedes");
    }

    fn reclaim_control(&self, _control: &Path) {
        self.say("reclaims");
    }

    fn hand_over(self: &Arc<Self>, successor: &Successor) -> Result<Attempt<&'static str>, VmError> {
        let refused = replace(self, &Kind::Takes).unwrap_err();
        assert!(matches!(refused, ReplaceError::Busy), "{refused}");
        let mut socket = UnixStream::connect(&successor.endpoints().listen).unwrap();
        socket.write_all(b"v").unwrap();
        let mut answer = [0];
        let owner = match (socket.read_exact(&mut answer), answer[0]) {
            (Ok(()), b'y') => VmOwner::Successor,
            (Ok(()), _) => VmOwner::Predecessor,
            (Err(_), _) => VmOwner::InDoubt,
        };
        Ok(Attempt { owner, report: "a byte" })
    }

    fn wait_in_doubt(&self, _time: Duration) -> bool {
        true
    }

    fn lost_with(&self, pid: u32) {
        self.say(format!("lost with {pid}"));
    }

    fn runs_on(&self, time: Duration) -> bool {
        if time >= Duration::from_secs(1) {
            self.say("backs off");
        }
        true
    }

    fn not_replaced(&self, why: NotReplaced<'_, &'static str>) {
        self.say(format!("{why:?}"));
    }

    fn patience(&self) -> Duration {
        self.patience
    }
}

#[test]
fn a_successor_takes_the_vm_and_the_control_socket() {
    let (vmm, heard) = Vmm::new(LONG);
    let before = fs::metadata(vmm.endpoints().control).unwrap();
    match replace(&vmm, &Kind::Takes).unwrap() {
        Replacement::Done { pid, report } => assert!(pid != std::process::id() && report == "a byte"),
        other => panic!("{other:?}"),
    }
    assert_eq!([heard.recv().unwrap(), heard.recv().unwrap()], ["Takes, then None", "cedes"]);
    vmm.is_alone();
    use std::os::unix::fs::MetadataExt as _;
    assert_ne!(fs::metadata(vmm.endpoints().control).unwrap().ino(), before.ino(), "it is the old socket");
}

#[test]
fn without_a_successor_nothing_changes() {
    let (vmm, heard) = Vmm::new(LONG);
    let why = replace(&vmm, &Kind::Ends).unwrap_err();
    assert!(matches!(why, ReplaceError::Successor(SuccessorError::Ended { .. })), "{why}");
    let (impatient, _heard) = Vmm::new(Duration::from_millis(1));
    let why = replace(&impatient, &Kind::Hangs).unwrap_err();
    assert!(matches!(why, ReplaceError::Successor(SuccessorError::NotReady { .. })), "{why}");
    let started = Successor::start(&mut Command::new("/nowhere/vmm"), vmm.endpoints(), LONG);
    assert!(describe(started.unwrap_err()).starts_with("starting /nowhere/vmm: "));
    vmm.is_alone();
    impatient.is_alone();
    // the control socket was never given away
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["Ends, then None"]);
}

#[test]
fn a_successor_that_does_not_take_the_vm_is_rolled_back() {
    let (vmm, heard) = Vmm::new(LONG);
    let replaced = replace(&vmm, &Kind::Refuses).unwrap();
    assert!(matches!(replaced, Replacement::RolledBack("a byte")), "{replaced:?}");
    vmm.is_alone();
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["Refuses, then None", "cedes", "reclaims"]);
}

#[test]
fn a_successor_that_dies_with_the_vm_is_noticed() {
    let (vmm, heard) = Vmm::new(LONG);
    let replaced = replace(&vmm, &Kind::Dies).unwrap();
    assert!(matches!(replaced, Replacement::InDoubt { unwatched: None, .. }), "{replaced:?}");
    let events: Vec<_> = heard.iter().take(3).collect();
    assert_eq!(events[..2], ["Dies, then None", "cedes"]);
    assert!(events[2].starts_with("lost with "), "{events:?}");
}

#[test]
fn what_is_no_socket_of_this_user_is_left_alone() {
    let (vmm, _heard) = Vmm::new(LONG);
    let interim = vmm.endpoints().interim;
    fs::write(&interim, "a file").unwrap();
    let why = replace(&vmm, &Kind::Takes).unwrap_err();
    assert!(matches!(why, ReplaceError::Successor(SuccessorError::NotOurs { .. })), "{why}");
    assert_eq!(fs::read_to_string(&interim).unwrap(), "a file");
    // a socket that an earlier process left is removed
    fs::remove_file(&interim).unwrap();
    drop(UnixListener::bind(&interim).unwrap());
    assert!(matches!(replace(&vmm, &Kind::Takes).unwrap(), Replacement::Done { .. }));
}

#[test]
fn only_the_last_schedule_counts_and_a_successor_goes_on_with_it() {
    let (vmm, heard) = Vmm::new(LONG);
    // dropped when its thread ends
    let (alive, first_ended) = mpsc::channel::<()>();
    let never = move || {
        let _alive = &alive;
        Box::new(Interval::new(LONG)) as _
    };
    schedule(&vmm, Kind::Ends, never).unwrap();
    assert_eq!(vmm.hand_overs.scheduled(), Some(Kind::Ends));
    schedule(&vmm, Kind::Takes, || Box::new(Interval::new(Duration::ZERO))).unwrap();
    first_ended.recv().unwrap_err();
    assert_eq!([heard.recv().unwrap(), heard.recv().unwrap()], ["Takes, then Some(Takes)", "cedes"]);
}

#[test]
fn a_schedule_that_fails_backs_off_and_tries_again() {
    let (vmm, heard) = Vmm::new(LONG);
    schedule(&vmm, Kind::Ends, || Box::new(Interval::new(Duration::ZERO))).unwrap();
    let mut events = heard.iter();
    for _ in 0..2 {
        assert_eq!(events.next().unwrap(), "Ends, then Some(Ends)");
        assert!(events.next().unwrap().starts_with("Refused("));
        assert_eq!(events.next().unwrap(), "backs off");
    }
    // ends the first one
    schedule(&vmm, Kind::Takes, || Box::new(Interval::new(LONG))).unwrap();
}

/// A host on which no VM is built.
struct Nowhere;

impl DestinationHost for Nowhere {
    type Vm = Box<dyn DestinationVm + Send>;

    fn build(&self, _vm: &VmDescription) -> Result<Self::Vm, VmError> {
        Err(VmError::new("no VM is built here"))
    }
}

#[test]
fn a_successor_notices_that_its_predecessor_is_dead() {
    let receiver = VmReceiver::new(Nowhere, drop, ReceiverOptions::default()).handle();
    let mut predecessor = Command::new("sleep").arg("1000").spawn().unwrap();
    let identity = ProcessIdentity::of(predecessor.id()).unwrap().encode();
    let mut looks = 0;
    let ended = watch_predecessor(&receiver, &identity, |_| {
        looks += 1;
        if looks == 3 {
            predecessor.kill().unwrap();
        }
        true
    });
    predecessor.wait().unwrap();
    assert_eq!(ended.unwrap(), PredecessorEnd::NothingCame);
    assert!(looks >= 3);
    // one that lives is watched until the VM is not awaited any more
    let own = ProcessIdentity::own().unwrap().encode();
    assert_eq!(watch_predecessor(&receiver, &own, |_| false).unwrap(), PredecessorEnd::NotAwaited);
}
