//! A source whose link is lost after the hand-over: how it looks for its destination, and when it
//! takes the VM back because that is dead.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    MigrationError, PAGE_SIZE, PageSet,
    channel::{Channel, Closer, Connector, Halves},
    checkpoint::FailSafe,
    engine::{Controller, ReceiverOptions, SourceOptions, migrate},
    report::{Event, Observer, Outcome, Report},
    store::{MemoryVersions, PageContent, VersionStore},
    strategy::{Done, Linear, PostCopy, Running, Strategy},
    tracker::DirtyTracker,
    vm::SourceVm,
    wire::{Control, FEATURE_CHECKPOINTS, FEATURE_POST_COPY, LaneKind, SessionToken, VERSION, Welcome},
};

use crate::{
    HANG,
    destination::{Destination, said},
    ended::Held,
    guest::{Host, checksums, state},
    live::{Direction, Link},
    pager::Paging,
    post_copy::{guest, paged_description},
    protected::{Arbiter, DESTINATION, NEVER, ProtectedHost, ProtectedSource, Seen, WRITTEN_THERE, later_state},
    serving::{Ends, lane},
};

/// The first push ends the link: no page that was left behind arrives before it is lost.
const AT_THE_FIRST_PUSH: Option<(Direction, usize)> = Some(((LaneKind::Bulk, 0, false), 3000));

type Hook = Arc<dyn Fn() + Send + Sync>;

/// A link that is lost for some attempts to reconnect.
struct Lost {
    link: Link,
    /// How many attempts fail.
    refusals: AtomicU32,
    /// How long each attempt could have waited.
    attempts: Mutex<Vec<Duration>>,
    /// Called before an attempt fails.
    at_refusal: Option<Hook>,
    /// Called when the first control lane is closed here.
    at_close: Option<Hook>,
}

impl Lost {
    fn new(destination: &Destination, refusals: u32) -> Self {
        Self::cut(destination, refusals, AT_THE_FIRST_PUSH)
    }

    fn cut(destination: &Destination, refusals: u32, cut: Option<(Direction, usize)>) -> Self {
        Self {
            link: Link::new(destination, cut),
            refusals: refusals.into(),
            attempts: Mutex::default(),
            at_refusal: None,
            at_close: None,
        }
    }

    fn attempts(&self) -> Vec<Duration> {
        self.attempts.lock().unwrap().clone()
    }
}

impl Connector for Lost {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let channel = self.link.connect_as(kind)?;
        match (&self.at_close, kind) {
            (Some(hook), LaneKind::Control) => Ok(Box::new(Watched(channel, hook.clone()))),
            _ => Ok(channel),
        }
    }

    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        if kind == LaneKind::Reattach {
            self.attempts.lock().unwrap().push(timeout);
            let left = self.refusals.load(Ordering::SeqCst);
            if left > 0 {
                self.refusals.store(left - 1, Ordering::SeqCst);
                if let Some(hook) = &self.at_refusal {
                    hook();
                }
                return Err(io::ErrorKind::HostUnreachable.into());
            }
        }
        self.connect_as(kind)
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

/// A channel that reports when it is closed here.
struct Watched(Box<dyn Channel>, Hook);

impl Channel for Watched {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let halves = self.0.split()?;
        Ok(Halves { closer: Box::new(WatchedCloser(halves.closer, self.1)), ..halves })
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

struct WatchedCloser(Box<dyn Closer>, Hook);

impl Closer for WatchedCloser {
    fn close(&self) {
        self.0.close();
        (self.1)();
    }
}

/// What the source's observer was told.
#[derive(Default)]
struct Told {
    warnings: Mutex<Vec<String>>,
    /// Why the VM was in doubt, each time that this was told.
    in_doubt: Mutex<Vec<String>>,
    /// Whether a checkpoint was committed.
    checkpoint: Arc<AtomicBool>,
}

impl Observer for Told {
    fn event(&self, event: &Event) {
        match event {
            Event::Warning(why) => self.warnings.lock().unwrap().push(why.clone()),
            Event::InDoubt(report) => {
                assert_eq!(report.outcome, Outcome::InDoubt);
                self.in_doubt.lock().unwrap().push(report.reason.clone().unwrap_or_default());
            }
            Event::Checkpoint(counts) if counts.count > 0 => self.checkpoint.store(true, Ordering::SeqCst),
            _ => {}
        }
    }
}

/// A destination that can take checkpoints. Unless it `stops` for them, none succeeds.
fn destination(stops: bool) -> Destination {
    let options = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
    Destination::with(options, |to| {
        let paging = Some(Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() });
        let host = Host { description: paged_description(), to, paging };
        ProtectedHost { host, seen: Arc::<Seen>::default(), stops }
    })
}

type Store = Arc<Mutex<MemoryVersions>>;

/// One checkpoint, at the hand-over.
fn fail_safe(fence: Arc<Arbiter>, detect: Duration, store: &Store) -> FailSafe {
    FailSafe { interval: NEVER, detect, reverse: Some(store.clone()), forward: None, fence }
}

struct Ended {
    report: Report,
    vm: ProtectedSource,
    link: Lost,
    told: Arc<Told>,
    /// Whether the strategy has heard that all pages are there, if it was told anything.
    served: Option<bool>,
}

/// A post-copy that keeps what it is told at its end.
struct Serves {
    order: Held,
    served: Option<bool>,
}

impl Strategy for Serves {
    fn name(&self) -> &'static str {
        "serves"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        let done = vm.pause()?.hand_over(all)?.serve(&mut self.order);
        self.served = Some(done.is_ok());
        done
    }
}

impl Ended {
    fn reason(&self) -> &str {
        self.report.reason.as_deref().unwrap_or_default()
    }

    fn calls(&self) -> Vec<&'static str> {
        self.vm.vm.calls.lock().unwrap().clone()
    }

    fn warnings(&self) -> Vec<String> {
        self.told.warnings.lock().unwrap().clone()
    }
}

/// A post-copy. With `held`, no page is pushed before the first checkpoint was committed.
fn run_with(
    (controller, commands): (Controller, migration_core::engine::Commands),
    link: Lost,
    mut vm: ProtectedSource,
    options: SourceOptions,
    held: bool,
) -> Ended {
    let told = Arc::<Told>::default();
    let may_push = if held { told.checkpoint.clone() } else { Arc::new(AtomicBool::new(true)) };
    let observer = told.clone();
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        let options = SourceOptions { streams: 1, demand_lanes: 1, observer, ..options };
        let mut strategy = Serves { order: Held(may_push), served: None };
        let report = migrate(&mut vm, &link, &mut strategy, &options, commands);
        // a test that hangs has gone
        let _ = tx.send((report, vm, link, strategy.served));
        drop(controller);
    });
    let (report, vm, link, served) = rx.recv_timeout(HANG).expect("the source ends");
    Ended { report, vm, link, told, served }
}

fn run(link: Lost, vm: ProtectedSource, options: SourceOptions, held: bool) -> Ended {
    run_with(Controller::new(), link, vm, options, held)
}

fn protected(fail_safe: FailSafe) -> SourceOptions {
    SourceOptions { fail_safe: Some(fail_safe), ..SourceOptions::default() }
}

/// The guest's RAM at the hand-over.
fn handed_over() -> std::collections::BTreeMap<u64, u32> {
    let mut vm = guest();
    vm.write_more();
    checksums(&vm.ram)
}

#[test]
fn without_a_checkpoint_the_vm_restarts_as_it_was_at_the_hand_over() {
    // its death is known, or it stays away
    for (dead, detect) in [(true, NEVER), (false, Duration::ZERO)] {
        let (destination, fence) = (destination(false), Arbiter::new(dead, &[]));
        let options = protected(fail_safe(fence.clone(), detect, &Store::default()));
        let ended = run(Lost::new(&destination, u32::MAX), ProtectedSource::new(guest()), options, false);
        assert_eq!((ended.report.outcome, ended.report.epoch), (Outcome::Restarted, 2), "{}", ended.reason());
        assert!(ended.reason().ends_with("the VM runs on here, as it was at the hand-over"), "{}", ended.reason());
        // neither resumed nor given away
        assert_eq!(ended.calls(), ["restart"]);
        assert_ne!(ended.served, Some(true), "its strategy takes it for moved");
        assert_eq!(ended.vm.restarted, [state()]);
        assert_eq!(checksums(&ended.vm.vm.ram), handed_over());
        assert!(!ended.vm.vm.tracker.is_active(), "the tracker goes on");
        assert_eq!((fence.fenced(), ended.warnings()), (vec![DESTINATION], Vec::new()));
    }
}

#[test]
fn the_vm_restarts_from_its_last_checkpoint_and_everything_is_dirty() {
    let (destination, fence) = (destination(true), Arbiter::new(true, &[]));
    let options = protected(fail_safe(fence, NEVER, &Store::default()));
    let mut vm = ProtectedSource::new(guest());
    // its VMM tracks for a purpose of its own
    vm.tracker().start().unwrap();
    let mut ended = run(Lost::new(&destination, u32::MAX), vm, options, true);
    assert_eq!(ended.report.outcome, Outcome::Restarted, "{}", ended.reason());
    assert!(ended.reason().ends_with("as it was at checkpoint 1"), "{}", ended.reason());
    assert_eq!((ended.calls(), &ended.vm.restarted[..]), (vec!["restart"], &[later_state()][..]));
    let mut expected = handed_over();
    expected.insert(WRITTEN_THERE.0, crc32fast::hash(&[WRITTEN_THERE.1; PAGE_SIZE]));
    assert_eq!(checksums(&ended.vm.vm.ram), expected);
    assert!(ended.report.checkpoints.protected && ended.report.checkpoints.count == 1);
    assert_eq!(ended.served, Some(false));
    let mut dirty = PageSet::empty(ended.vm.vm.ram_pages());
    ended.vm.tracker().harvest(&mut dirty).unwrap();
    assert_eq!(dirty.len(), ended.vm.vm.ram_pages());
}

#[test]
fn a_fence_that_fails_is_asked_again_and_each_reason_is_told_once() {
    let (destination, fence) = (destination(false), Arbiter::new(true, &["no answer", "no answer", "no", "no"]));
    let detect = Duration::from_millis(700);
    let options = protected(fail_safe(fence.clone(), detect, &Store::default()));
    let ended = run(Lost::new(&destination, u32::MAX), ProtectedSource::new(guest()), options, false);
    assert_eq!(ended.report.outcome, Outcome::Restarted, "{}", ended.reason());
    let refused =
        |why: &str| format!("the VM is not restarted from its last checkpoint: the other side is not fenced: {why}");
    assert_eq!(ended.warnings(), [refused("no answer"), refused("no")]);
    assert_eq!(fence.fenced(), [DESTINATION]);
    // a side that may be dead is not waited for as long as one that is only slow
    let attempts = ended.link.attempts();
    assert!(attempts.len() == 5 && attempts[1..].iter().all(|&time| time == detect), "{attempts:?}");
}

/// A store whose checkpoint cannot be read.
struct Unreadable;

impl VersionStore for Unreadable {
    fn put(&mut self, _page: u64, _content: PageContent<'_>) -> io::Result<()> {
        Ok(())
    }

    fn commit(&mut self, _number: u32, _state: Bytes) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self) {}

    fn latest(&self) -> Option<(u32, Bytes)> {
        None
    }

    fn list(&mut self) -> io::Result<PageSet> {
        Err(io::Error::other("the disk is gone"))
    }

    fn read(
        &mut self,
        _pages: &[u64],
        _take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        Err(io::Error::other("the disk is gone"))
    }
}

#[test]
fn a_vm_that_cannot_be_restarted_is_lost_and_released() {
    let readable = fail_safe(Arbiter::new(true, &[]), NEVER, &Store::default());
    let unreadable = FailSafe { reverse: Some(Arc::new(Mutex::new(Unreadable))), ..readable.clone() };
    for (fail_safe, restarts, why) in
        [(readable, false, "restarting the VM: no vCPU starts"), (unreadable, true, "the disk is gone")]
    {
        let destination = destination(false);
        let vm = ProtectedSource { restarts, ..ProtectedSource::new(guest()) };
        let ended = run(Lost::new(&destination, u32::MAX), vm, protected(fail_safe), false);
        assert_eq!(ended.report.outcome, Outcome::Lost, "{}", ended.reason());
        let reason = ended.reason();
        assert!(reason.contains("and its VM is lost: ") && reason.ends_with(why), "{reason}");
        assert_eq!(ended.calls(), ["released"]);
    }
}

#[test]
fn a_destination_that_is_only_out_of_reach_keeps_the_vm() {
    let (destination, fence) = (destination(true), Arbiter::new(false, &[]));
    let options = protected(fail_safe(fence.clone(), NEVER, &Store::default()));
    let ended = run(Lost::new(&destination, 3), ProtectedSource::new(guest()), options, false);
    assert_eq!(ended.report.outcome, Outcome::Completed, "{}", ended.reason());
    assert_eq!((ended.calls(), fence.fenced()), (vec!["released"], Vec::new()));
    assert_eq!((ended.link.attempts().len(), ended.report.recoveries, ended.served), (4, 1, Some(true)));
    let (arrived, told) = destination.finish();
    let there = arrived.pages();
    assert!(handed_over().iter().all(|(page, content)| there.get(page) == Some(content)), "{told}");
}

#[test]
fn attempts_become_longer_and_whoever_waits_is_told_once_that_the_vm_is_in_doubt() {
    for (in_doubt_grace, told) in [(Duration::ZERO, 1), (NEVER, 0)] {
        let destination = destination(false);
        let options = SourceOptions { in_doubt_grace, ..SourceOptions::default() };
        let ended = run(Lost::new(&destination, 3), ProtectedSource::new(guest()), options, false);
        assert_eq!(ended.report.outcome, Outcome::Completed, "{}", ended.reason());
        let in_doubt = ended.told.in_doubt.lock().unwrap().clone();
        assert_eq!(in_doubt.len(), told);
        // it runs there already
        assert!(in_doubt.iter().all(|why| why.ends_with("are kept here")), "{in_doubt:?}");
        let attempts = ended.link.attempts();
        // the first one follows the round trips of this host
        let longest = Duration::from_secs(2).max(attempts[0]);
        let grown = |attempt: u32| (attempts[0] * 2u32.pow(attempt)).min(longest);
        assert_eq!(attempts, (0..4).map(grown).collect::<Vec<_>>());
        drop(destination.finish());
    }
}

/// Moves the VM although the link on which it began is never found again.
fn recovers(lost: impl FnOnce(Lost, Hook) -> Lost) -> (Ended, Arc<Lost>) {
    let destination = destination(false);
    let elsewhere = Arc::new(Lost::cut(&destination, 0, None));
    let (controller, commands) = Controller::new();
    let (user, there) = (controller.clone(), Mutex::new(Some(elsewhere.clone())));
    let tell: Hook = Arc::new(move || {
        if let Some(there) = there.lock().unwrap().take() {
            user.recover(there);
        }
    });
    let link = lost(Lost::new(&destination, u32::MAX), tell);
    let options = SourceOptions { in_doubt_grace: Duration::ZERO, ..SourceOptions::default() };
    let ended = run_with((controller, commands), link, ProtectedSource::new(guest()), options, false);
    assert_eq!(ended.report.outcome, Outcome::Completed, "{}", ended.reason());
    drop(destination.finish());
    (ended, elsewhere)
}

#[test]
fn a_user_who_knows_where_the_destination_is_begins_a_new_series_of_attempts() {
    // told at the second attempt that is in vain
    let (ended, elsewhere) = recovers(|lost, tell| {
        let count = AtomicU32::new(0);
        let second = move || {
            if count.fetch_add(1, Ordering::SeqCst) == 1 {
                tell();
            }
        };
        Lost { at_refusal: Some(Arc::new(second)), ..lost }
    });
    let attempts = ended.link.attempts();
    assert_eq!((attempts.len(), elsewhere.attempts()), (2, vec![attempts[0]]), "{attempts:?}");
    // who asks wants to hear how that goes
    assert_eq!(ended.told.in_doubt.lock().unwrap().len(), 2);
}

#[test]
fn a_user_who_speaks_while_the_link_ends_is_heard_at_once() {
    let (ended, elsewhere) = recovers(|lost, tell| Lost { at_close: Some(tell), ..lost });
    assert_eq!((ended.link.attempts().len(), elsewhere.attempts().len()), (0, 1));
}

#[test]
fn a_checkpoint_of_something_else_is_not_mistaken_for_one_of_this_vm() {
    let destination = destination(true);
    let store = Store::default();
    store.lock().unwrap().commit(1, Bytes::new()).unwrap();
    for forward in [false, true] {
        let mut fail_safe = fail_safe(Arbiter::new(true, &[]), NEVER, &store);
        if forward {
            (fail_safe.forward, fail_safe.reverse) = (fail_safe.reverse, None);
        }
        let ended = run(Lost::new(&destination, 0), ProtectedSource::new(guest()), protected(fail_safe), false);
        assert_eq!(ended.report.outcome, Outcome::Failed);
        assert!(ended.reason().contains("holds a checkpoint already"), "{}", ended.reason());
    }
}

#[test]
fn a_destination_that_takes_no_checkpoints_is_refused() {
    let options = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
    let destination = Destination::with(options, |to| {
        let paging = Some(Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() });
        Host { description: paged_description(), to, paging }
    });
    let options = protected(fail_safe(Arbiter::new(true, &[]), NEVER, &Store::default()));
    let ended = run(Lost::new(&destination, 0), ProtectedSource::new(guest()), options, false);
    assert_eq!((ended.report.outcome, ended.calls()), (Outcome::Failed, Vec::new()));
    assert!(ended.reason().contains("the destination cannot send checkpoints"), "{}", ended.reason());
}

/// A VM whose destination nobody could end is not handed over.
#[test]
fn a_destination_that_does_not_introduce_itself_gets_no_vm() {
    let (tx, lanes) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    thread::spawn(move || {
        let link = Ends { to: Mutex::new(tx), refuses: Arc::default() };
        let fail_safe = fail_safe(Arbiter::new(true, &[]), NEVER, &Store::default());
        let setup_timeout = Duration::from_secs(2);
        let options = SourceOptions { streams: 1, demand_lanes: 1, setup_timeout, ..protected(fail_safe) };
        let mut strategy = PostCopy { order: Box::new(Linear::default()) };
        let report = migrate(&mut ProtectedSource::new(guest()), &link, &mut strategy, &options, Controller::new().1);
        // a test that has failed does not listen
        let _ = end.send(report);
    });
    let control = lane(&lanes, LaneKind::Control);
    let session = SessionToken([7; 16]);
    let features = FEATURE_POST_COPY | FEATURE_CHECKPOINTS;
    let welcome = Welcome { version: VERSION, features, streams: 1, session };
    assert_eq!(said(&control).map(|word| word.name()), Some("hello"));
    control.outgoing.write(&Control::Welcome(welcome).encode(0, 0, 1)).unwrap();
    let _lanes = [LaneKind::Bulk, LaneKind::Demand, LaneKind::Checkpoint].map(|kind| lane(&lanes, kind));
    control.outgoing.write(&Control::Prepared { load_us: None }.encode(0, 1, 1)).unwrap();
    let report = ended.recv_timeout(HANG).expect("the source ends");
    let reason = report.reason.unwrap_or_default();
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(reason.contains("the destination to introduce itself"), "{reason}");
}

/// A destination that hears *abandon* knows that nothing went wrong.
#[test]
fn a_user_who_cancels_gives_the_attempt_up_in_so_many_words() {
    let destination = destination(true);
    let (controller, commands) = Controller::new();
    controller.cancel("another time");
    let link = Lost::new(&destination, 0);
    let ended = run_with((controller, commands), link, ProtectedSource::new(guest()), SourceOptions::default(), false);
    assert_eq!(ended.report.outcome, Outcome::Cancelled, "{}", ended.reason());
    // before anything was opened
    assert!(destination.log.try_recv().is_err() && ended.calls().is_empty());

    let (controller, commands) = Controller::new();
    let user = controller.clone();
    let mut strategy = Cancels(user);
    let link = Link::new(&destination, None);
    let options = SourceOptions { streams: 1, ..SourceOptions::default() };
    let report = migrate(&mut ProtectedSource::new(guest()), &link, &mut strategy, &options, commands);
    assert_eq!((report.outcome, report.reason.as_deref()), (Outcome::Cancelled, Some("cancelled: another time")));
    let mut told = Vec::new();
    while !told.iter().any(|line: &String| line == "the source keeps the VM") {
        told.push(destination.log.recv_timeout(HANG).unwrap_or_else(|_| panic!("it was told only {told:?}")));
    }
    drop(controller);
}

/// Its user cancels before its first round.
struct Cancels(Controller);

impl Strategy for Cancels {
    fn name(&self) -> &'static str {
        "cancels"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        self.0.cancel("another time");
        vm.send(&pages)?;
        vm.cancel("the strategy has not heard of it")
    }
}
