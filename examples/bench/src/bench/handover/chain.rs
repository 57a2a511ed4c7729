//! A VM that is handed over from process to process, each of which ends behind it.

use std::{
    path::PathBuf,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use migration_kvm::ram::Backing;
use minivmm_client::{Request, ask};
use serde::Serialize;
use serde_json::Value;

use super::plan::Guests;
use crate::bench::{
    encrypt::Link,
    guest::Guest,
    measure::{AFTER, BEFORE, FILL, ms},
    ours::{Options, Source, completed, receiver},
    process::{Folder, Process},
    samples::{self, Sample},
};

/// What a process has done when it listens may not be over: the hand-over waits for so long.
const SETTLE: Duration = Duration::from_millis(50);

/// The VM, where it is now.
pub(super) struct Chain {
    name: String,
    options: Options,
    process: Process,
    socket: PathBuf,
    successors: u32,
    pub(super) guest: Guest,
}

/// A process that waits for the VM.
pub(super) struct Successor {
    process: Process,
    socket: PathBuf,
    request: Request,
}

/// One hand-over, as guest, source and client saw it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct HandOver {
    /// Which of the VMs that were handed over at once.
    pub(super) vm: usize,
    /// The guest's longest gap from the request until [`AFTER`] the end, which the end of the old
    /// process is part of.
    pub(super) gap_ms: f64,
    /// The same until the client had its answer.
    pub(super) gap_until_answer_ms: f64,
    /// From the request until that answer.
    pub(super) total_ms: f64,
    /// The source's report.
    pub(super) downtime_ms: f64,
    pub(super) prepare_ms: f64,
    pub(super) state_bytes: u64,
    pub(super) memory_copied_bytes: u64,
}

/// The guest's gaps while it stays where it is.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Stay {
    pub(super) vm: usize,
    pub(super) gap_ms: f64,
}

/// A round of hand-overs at once.
pub(super) struct Round {
    pub(super) each: Vec<HandOver>,
    /// How long the guests were watched.
    pub(super) window: Duration,
    /// The moment from which the first guest ran in its new process, by the source's report.
    pub(super) switched: Instant,
}

/// Starts so many VMs, and lets their host come to rest.
pub(super) fn start(folder: &Folder, options: &Options, vms: usize) -> Result<Vec<Chain>, String> {
    let backing: Backing = options.backing.parse().map_err(|e| format!("{e}"))?;
    let sources = (0..vms).map(|vm| Source::named(folder, &format!("vm{vm}-0"), options));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let chain = |(vm, Source { mut process, socket })| {
        let guest = Guest::shared(&mut process, options.memory, backing, FILL)?;
        Ok(Chain { name: format!("vm{vm}"), options: options.clone(), process, socket, successors: 0, guest })
    };
    let chains = sources.into_iter().enumerate().map(chain).collect::<Result<_, String>>()?;
    thread::sleep(BEFORE);
    Ok(chains)
}

impl Chain {
    /// Starts a process that waits for it; `cold`: one that does not fill page tables.
    pub(super) fn successor(&mut self, folder: &Folder, cold: bool) -> Result<Successor, String> {
        self.successors += 1;
        let name = format!("{}-{}", self.name, self.successors);
        let listen = format!("unix:{}", folder.path(&format!("{name}.ram")).display());
        let (process, socket, url) =
            receiver(folder, &name, &listen, Link::Loopback, if cold { &["--cold"] } else { &[] })?;
        Ok(Successor { process, socket, request: Request::Migrate(Box::new(self.options.request(&url)?)) })
    }

    /// Moves on to the successor; the process that it has left.
    fn follow(&mut self, to: Successor) -> Process {
        self.socket = to.socket;
        std::mem::replace(&mut self.process, to.process)
    }

    /// Lets the guest check all its pages.
    pub(super) fn verify(&self) -> Result<(), String> {
        match self.guest.verify()? {
            0 => Ok(()),
            wrong => Err(format!("the guest found {wrong} wrong pages after {} hand-overs", self.successors)),
        }
    }
}

/// What a client knows when it has its answer.
struct Answer {
    report: Value,
    asked: Instant,
    total: Duration,
    gap: Duration,
}

/// Hands all of them over at the same moment. The successors are there before: a process that
/// starts is no part of it.
pub(super) fn hand_over(folder: &Folder, chains: &mut [Chain], cold: bool) -> Result<Round, String> {
    let successors = chains.iter_mut().map(|chain| chain.successor(folder, cold)).collect::<Result<Vec<_>, _>>()?;
    thread::sleep(SETTLE);
    hand_over_to(chains, successors)
}

/// Hands each of them over to the successor that was started for it, all at the same moment.
pub(super) fn hand_over_to(chains: &mut [Chain], successors: Vec<Successor>) -> Result<Round, String> {
    chains.iter().try_for_each(|chain| chain.guest.reset_gap().map(drop))?;
    let (begin, began) = (Barrier::new(chains.len()), Instant::now());
    let one = |chain: &Chain, to: &Successor| {
        begin.wait();
        let asked = Instant::now();
        let report = ask(&chain.socket, &to.request, |_| {}).map_err(String::from).and_then(completed)?;
        Ok(Answer { report, asked, total: asked.elapsed(), gap: chain.guest.board()?.longest_gap() })
    };
    let answers: Vec<Answer> = thread::scope(|scope| {
        let one = &one;
        let all = chains.iter().zip(&successors).map(|(chain, to)| scope.spawn(move || one(chain, to)));
        // all of them, before the first is waited for
        let all: Vec<_> = all.collect();
        let result = |thread: thread::ScopedJoinHandle<'_, Result<Answer, String>>| {
            thread.join().map_err(|_| "a client panicked".to_owned())?
        };
        all.into_iter().map(result).collect::<Result<_, String>>()
    })?;
    thread::sleep(AFTER);
    let (mut each, mut switched) = (Vec::new(), None);
    for (vm, ((chain, to), answer)) in chains.iter_mut().zip(successors).zip(answers).enumerate() {
        chain.follow(to).wait()?;
        let Answer { report, asked, total, gap } = answer;
        let number = |key: &str| report[key].as_f64().ok_or_else(|| format!("no {key} in {report}"));
        let (downtime_ms, prepare_ms) = (number("downtime_ms")?, number("prepare_ms")?);
        switched.get_or_insert(asked + Duration::from_secs_f64((prepare_ms + downtime_ms) / 1e3));
        each.push(HandOver {
            vm,
            gap_ms: ms(chain.guest.board()?.longest_gap()),
            gap_until_answer_ms: ms(gap),
            total_ms: ms(total),
            downtime_ms,
            prepare_ms,
            state_bytes: number("state_bytes")? as u64,
            memory_copied_bytes: number("memory_copied_bytes")? as u64,
        });
    }
    Ok(Round { each, window: began.elapsed(), switched: switched.unwrap_or(began) })
}

/// Watches them for `window` without a hand-over.
pub(super) fn stay(chains: &[Chain], window: Duration) -> Result<Vec<Stay>, String> {
    chains.iter().try_for_each(|chain| chain.guest.reset_gap().map(drop))?;
    thread::sleep(window);
    let gap = |(vm, chain): (usize, &Chain)| Ok(Stay { vm, gap_ms: ms(chain.guest.board()?.longest_gap()) });
    chains.iter().enumerate().map(gap).collect()
}

/// Windows after a hand-over in which the guest's speed is looked at, in ms.
pub(super) const WINDOWS: [u64; 3] = [10, 100, 1000];
/// How long it is looked at, after the hand-over is over.
pub(super) const FOLLOWED: Duration = Duration::from_secs(3);
/// The speed before is that of so long before the request.
const USUAL: Duration = Duration::from_millis(300);
/// How often it is looked at.
const PERIOD: Duration = Duration::from_millis(1);

/// As fast as before: such a share of it, for so long.
const FAST: f64 = 0.9;
const STRETCH: Duration = Duration::from_millis(20);

/// How fast a guest is right after a hand-over.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Recovery {
    /// The guest.
    pub(super) guest: String,
    /// Whether the successor filled its page tables.
    pub(super) warmed: bool,
    /// Operations a second before it.
    pub(super) before: f64,
    /// In the first [`WINDOWS`] after it, as a share of that, in percent.
    pub(super) kept: [f64; 3],
    /// Milliseconds from the switch until it was as fast as before: [`FAST`] of that over
    /// [`STRETCH`]. `None` if it was not watched so long.
    pub(super) until_fast_ms: Option<f64>,
    pub(super) hand_over: HandOver,
}

/// Hands a guest over and follows its speed.
pub(super) fn recover(folder: &Folder, chain: &mut Chain, guests: &Guests, warmed: bool) -> Result<Recovery, String> {
    // another look at the board, as the chain moves meanwhile
    let backing: Backing = chain.options.backing.parse().map_err(|e| format!("{e}"))?;
    let eye = Guest::shared(&mut chain.process, chain.options.memory, backing, FILL)?;
    let began = Instant::now();
    let look = || eye.board().ok().map(|board| board.operations);
    let act = || {
        thread::sleep(USUAL);
        let round = hand_over(folder, std::slice::from_mut(chain), !warmed);
        thread::sleep(FOLLOWED);
        round
    };
    let (round, samples) = samples::during(PERIOD, look, act)?;
    let round = round?;
    let seen = recovery(&samples, began, &round, (guests.name(), warmed));
    seen.ok_or_else(|| "too few samples of the guest's speed".into())
}

fn recovery(samples: &[Sample], began: Instant, round: &Round, (guest, warmed): (String, bool)) -> Option<Recovery> {
    let hand_over = round.each.first()?.clone();
    // the successor's start is left out: it takes a core for a while
    let before = samples::rate(samples, samples.first()?.at.max(began), began + USUAL * 9 / 10)?;
    let after = |ms| samples::rate(samples, round.switched, round.switched + Duration::from_millis(ms));
    let [a, b, c] = WINDOWS.map(after);
    let share = |rate: f64| 100.0 * rate / before.max(1.0);
    let kept = [share(a?), share(b?), share(c?)];
    let until_fast_ms = until(samples, round.switched, FAST * before).map(ms);
    Some(Recovery { guest, warmed, before: before.round(), kept, until_fast_ms, hand_over })
}

/// How long after `from` a [`STRETCH`] begins in which the guest does so much a second.
fn until(samples: &[Sample], from: Instant, wanted: f64) -> Option<Duration> {
    let mut begin = from;
    while samples::rate(samples, begin, begin + STRETCH)? < wanted {
        begin += PERIOD;
    }
    Some(begin - from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_is_seen() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // 1000 operations a ms, from 500 on a tenth of it for a second, then as before
        let operations = |ms: u64| match ms {
            0..=500 => ms * 1000,
            501..=1500 => 500_000 + (ms - 500) * 100,
            _ => 600_000 + (ms - 1500) * 1000,
        };
        let samples: Vec<_> = (0..1700).map(|ms| Sample { at: at(ms), operations: operations(ms) }).collect();
        let each = vec![crate::bench::handover::figures::test_util::hand_over(0, 0.9)];
        let round = Round { each, window: Duration::from_millis(1700), switched: at(500) };
        let seen_in = |samples| recovery(samples, start, &round, ("hot".into(), false));
        let seen = seen_in(&samples).unwrap();
        assert_eq!((seen.before, seen.kept.map(f64::round), seen.warmed), (1e6, [10.0; 3], false));
        // the stretch that has nine tenths begins before the guest is fast
        let until_fast = seen.until_fast_ms.unwrap();
        assert!((997.0..=998.0).contains(&until_fast), "{until_fast}");
        assert!(seen_in(&samples[..1490]).is_none(), "not watched long enough");
        assert_eq!(seen_in(&samples[..1510]).unwrap().until_fast_ms, None);
    }
}
