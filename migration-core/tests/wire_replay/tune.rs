//! What a user can change while a migration runs: its downtime limit, and when it switches over.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    MigrationError, PageSet,
    engine::{
        Commands, Controller, NoPostCopy, NoSwitchOver, NoTuning, SnapshotOptions, SourceOptions, migrate, snapshot,
    },
    report::{Event, Observer, Outcome, Report},
    store::MemoryVersions,
    strategy::{
        Convergence, Done, HandOver, Hybrid, Linear, Link as Known, Next, PostCopy, PreCopy, Round, Running,
        StopAndCopy, Strategy, Wanted,
    },
};

use crate::{
    HANG,
    asks::Asks,
    destination::Destination,
    guest::{Host, RecordedVm, checksums},
    live::Link,
    post_copy::{guest, paged_description, paging},
};

const TUNED: Duration = Duration::from_secs(7);

fn run(strategy: &mut dyn Strategy, vm: &mut RecordedVm, controller: (Controller, Commands)) -> Report {
    let paging = Some(paging()).filter(|_| strategy.needs_post_copy());
    let destination = Destination::of(HANG, |to| Host { description: paged_description(), to, paging });
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let report = migrate(vm, &Link::new(&destination, None), strategy, &options, controller.1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, said) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{said}");
    report
}

/// Never content; after its third round it acts as a user would at that moment.
struct Endless<F> {
    rounds: u32,
    act: F,
    limits: Arc<Mutex<Vec<Duration>>>,
}

impl<F: FnMut() -> Option<Next> + Send> Convergence for Endless<F> {
    fn judge(&mut self, _round: &Round, _dirty: &PageSet, link: &Known) -> Next {
        self.rounds += 1;
        self.limits.lock().unwrap().push(link.downtime_limit);
        assert!(self.rounds < 1000, "nothing ends it");
        let next = if self.rounds >= 3 { (self.act)() } else { None };
        next.unwrap_or(Next::Round)
    }
}

fn endless<F: FnMut() -> Option<Next> + Send>(act: F) -> PreCopy<Endless<F>> {
    let convergence = Endless { rounds: 0, act, limits: Arc::default() };
    PreCopy { convergence, order: Box::new(Linear::default()) }
}

#[test]
fn a_forced_switch_over_ends_rounds_that_would_never_end() {
    let (controller, commands) = Controller::new();
    let user = controller.clone();
    let mut strategy = endless(move || {
        assert_eq!(user.switch_over(), Ok(()));
        None
    });
    let report = run(&mut strategy, &mut guest(), (controller.clone(), commands));
    assert!(report.forced_switch_over);
    assert_eq!(strategy.convergence.rounds, 3, "the next round is the last one");
    assert_eq!(controller.switch_over(), Err(NoSwitchOver::Ended));
}

#[test]
fn a_forced_switch_over_of_a_hybrid_hands_over_and_serves() {
    let (controller, commands) = Controller::new();
    /// Asks as soon as it can be asked for.
    struct Forced(Hybrid, Controller);
    impl Strategy for Forced {
        fn name(&self) -> &'static str {
            "forced"
        }

        fn needs_post_copy(&self) -> bool {
            true
        }

        fn can_switch_over(&self) -> bool {
            self.0.can_switch_over()
        }

        fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError> {
            assert_eq!(self.1.switch_over(), Ok(()));
            self.0.migrate(vm)
        }
    }
    let hybrid = Hybrid { rounds: u32::MAX, order: Box::new(Linear::default()) };
    let report = run(&mut Forced(hybrid, controller.clone()), &mut guest(), (controller, commands));
    assert!(report.forced_switch_over && report.pages.pushed + report.pages.demanded > 0, "{report:?}");
}

#[test]
fn a_new_downtime_limit_holds_from_the_next_decision_on() {
    let (controller, commands) = Controller::new();
    let limits = Arc::<Mutex<Vec<Duration>>>::default();
    let user = controller.clone();
    let seen = limits.clone();
    let act = move || {
        assert_eq!(user.set_downtime_limit(TUNED), Ok(()));
        let tuned = seen.lock().unwrap().last() == Some(&TUNED);
        tuned.then_some(Next::SwitchOver(Wanted { downtime: Duration::ZERO }))
    };
    let convergence = Endless { rounds: 0, act, limits: limits.clone() };
    let mut strategy = PreCopy { convergence, order: Box::new(Linear::default()) };
    let report = run(&mut strategy, &mut guest(), (controller.clone(), commands));
    let default = SourceOptions::default().downtime_limit;
    assert_eq!(*limits.lock().unwrap(), [default, default, default, TUNED]);
    assert_eq!((report.downtime_limit, report.forced_switch_over), (TUNED, false));
    assert_eq!(controller.set_downtime_limit(TUNED), Err(NoTuning::Ended));
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    use NoSwitchOver::{Ended, NotYet, Strategy as NoRounds, TooLate};
    let late = Err(NoTuning::TooLate);
    for can in [true, false] {
        let (controller, commands) = Controller::new();
        let question = |user: &Controller| (user.switch_over(), user.set_downtime_limit(TUNED));
        let mut asks =
            Asks { controller: controller.clone(), question, answers: Vec::new(), can_switch_over: can, leaves: false };
        asks.ask();
        run(&mut asks, &mut guest(), (controller, commands));
        asks.ask();
        let running = if can { Ok(()) } else { Err(NoRounds) };
        let paused = Err(if can { TooLate } else { NoRounds });
        let expected = [
            (Err(NotYet), Ok(())),
            (running, Ok(())),
            (paused, late),
            (running, Ok(())),
            (paused, late),
            (Err(Ended), Err(NoTuning::Ended)),
        ];
        assert_eq!(asks.answers, expected);
    }
    let at_once: [&dyn Strategy; 3] = [&StopAndCopy, &HandOver, &PostCopy { order: Box::new(Linear::default()) }];
    assert!(at_once.iter().all(|strategy| !strategy.can_switch_over()));
    assert!(<PreCopy>::default().can_switch_over());
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Answer {
    post_copy: Result<(), NoPostCopy>,
    switch_over: Result<(), NoSwitchOver>,
    tuning: Result<(), NoTuning>,
}

/// Asks for everything while a snapshot is taken.
struct Curious {
    controller: Controller,
    answers: Mutex<Vec<Answer>>,
}

impl Observer for Curious {
    fn event(&self, event: &Event) {
        if matches!(event, Event::RoundEnded(_)) {
            let Self { controller, answers } = self;
            let answer = Answer {
                post_copy: controller.post_copy(),
                switch_over: controller.switch_over(),
                tuning: controller.set_downtime_limit(TUNED),
            };
            answers.lock().unwrap().push(answer);
        }
    }
}

#[test]
fn a_snapshot_can_be_tuned_and_refuses_what_moves_a_vm() {
    let (controller, commands) = Controller::new();
    let curious = Arc::new(Curious { controller: controller.clone(), answers: Mutex::default() });
    let options = SnapshotOptions { observer: curious.clone(), ..SnapshotOptions::default() };
    snapshot(&mut guest(), &mut MemoryVersions::default(), &options, commands).unwrap();
    let answers = curious.answers.lock().unwrap().clone();
    assert!(!answers.is_empty());
    let expected =
        Answer { post_copy: Err(NoPostCopy::Snapshot), switch_over: Err(NoSwitchOver::Snapshot), tuning: Ok(()) };
    assert!(answers.iter().all(|answer| *answer == expected), "{answers:?}");
    assert_eq!(controller.set_downtime_limit(TUNED), Err(NoTuning::Ended));
    assert_eq!(controller.post_copy(), Err(NoPostCopy::Ended));
}
