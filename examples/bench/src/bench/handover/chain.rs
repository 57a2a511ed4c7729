//! A VM that is handed over from process to process. Each process ends after its hand-over.

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

/// The time between the moment at which a process listens and the hand-over. Its start may have
/// left work that is not done yet.
const SETTLE: Duration = Duration::from_millis(50);

/// The VM, in its present process.
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

/// The measurements of one hand-over, from the guest, the source and the client.
#[derive(Debug, Clone, Serialize)]
pub(super) struct HandOver {
    /// The index of the VM among those that were handed over at once.
    pub(super) vm: usize,
    /// The guest's longest gap from the request until [`AFTER`] the end, in ms. This includes the
    /// end of the old process.
    pub(super) gap_ms: f64,
    /// The guest's longest gap from the request until the client's answer, in ms.
    pub(super) gap_until_answer_ms: f64,
    /// The time from the request until the client's answer, in ms.
    pub(super) total_ms: f64,
    /// The downtime in the source's report, in ms.
    pub(super) downtime_ms: f64,
    pub(super) prepare_ms: f64,
    pub(super) state_bytes: u64,
    pub(super) memory_copied_bytes: u64,
}

/// The gaps of a guest that is not handed over.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Stay {
    pub(super) vm: usize,
    pub(super) gap_ms: f64,
}

/// Several hand-overs at once.
pub(super) struct Round {
    pub(super) each: Vec<HandOver>,
    /// The time for which the guests were observed.
    pub(super) window: Duration,
    /// The moment at which the first guest ran in its new process, by the source's report.
    pub(super) switched: Instant,
}

/// Starts `vms` VMs and waits until the host is idle.
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
    /// Starts a process that waits for the VM. A `cold` one does not fill its page tables.
    pub(super) fn successor(&mut self, folder: &Folder, cold: bool) -> Result<Successor, String> {
        self.successors += 1;
        let name = format!("{}-{}", self.name, self.successors);
        let listen = format!("unix:{}", folder.path(&format!("{name}.ram")).display());
        let (process, socket, url) =
            receiver(folder, &name, &listen, Link::Loopback, if cold { &["--cold"] } else { &[] })?;
        Ok(Successor { process, socket, request: Request::Migrate(Box::new(self.options.request(&url)?)) })
    }

    /// Continues with the successor. Returns the old process.
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

/// The client's measurements of a hand-over.
struct Answer {
    report: Value,
    asked: Instant,
    total: Duration,
    gap: Duration,
}

/// Hands all VMs over at the same moment. Their successors are started before, which is not
/// measured.
pub(super) fn hand_over(folder: &Folder, chains: &mut [Chain], cold: bool) -> Result<Round, String> {
    let successors = chains.iter_mut().map(|chain| chain.successor(folder, cold)).collect::<Result<Vec<_>, _>>()?;
    thread::sleep(SETTLE);
    hand_over_to(chains, successors)
}

/// Hands each VM over to its successor, all at the same moment.
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
        // all requests are sent before the first answer is awaited
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

/// Observes the VMs for `window` without a hand-over.
pub(super) fn stay(chains: &[Chain], window: Duration) -> Result<Vec<Stay>, String> {
    chains.iter().try_for_each(|chain| chain.guest.reset_gap().map(drop))?;
    thread::sleep(window);
    let gap = |(vm, chain): (usize, &Chain)| Ok(Stay { vm, gap_ms: ms(chain.guest.board()?.longest_gap()) });
    chains.iter().enumerate().map(gap).collect()
}

/// The windows after a hand-over in which the guest's speed is measured, in ms.
pub(super) const WINDOWS: [u64; 3] = [10, 100, 1000];
/// The time for which the speed is measured after the hand-over.
pub(super) const FOLLOWED: Duration = Duration::from_secs(3);
/// The time before the request in which the usual speed is measured.
const USUAL: Duration = Duration::from_millis(300);
/// The interval between two readings.
const PERIOD: Duration = Duration::from_millis(1);

/// A guest is as fast as before if it reaches this share of its usual speed during [`STRETCH`].
const FAST: f64 = 0.9;
const STRETCH: Duration = Duration::from_millis(20);

/// The speed of a guest after a hand-over.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Recovery {
    /// The name of the guest.
    pub(super) guest: String,
    /// Whether the successor filled its page tables.
    pub(super) warmed: bool,
    /// Operations per second before the hand-over.
    pub(super) before: f64,
    /// The share of the usual speed in each of the [`WINDOWS`], in percent.
    pub(super) kept: [f64; 3],
    /// The time from the switch until the guest was as fast as before, in ms. `None` if it was not
    /// in the time of the measurement.
    pub(super) until_fast_ms: Option<f64>,
    pub(super) hand_over: HandOver,
}

/// Hands a guest over and measures its speed.
pub(super) fn recover(folder: &Folder, chain: &mut Chain, guests: &Guests, warmed: bool) -> Result<Recovery, String> {
    // a second access to the board, because the chain moves meanwhile
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
    // the successor's start is left out, because it occupies a core
    let before = samples::rate(samples, samples.first()?.at.max(began), began + USUAL * 9 / 10)?;
    let after = |ms| samples::rate(samples, round.switched, round.switched + Duration::from_millis(ms));
    let [a, b, c] = WINDOWS.map(after);
    let share = |rate: f64| 100.0 * rate / before.max(1.0);
    let kept = [share(a?), share(b?), share(c?)];
    let until_fast_ms = until(samples, round.switched, FAST * before).map(ms);
    Some(Recovery { guest, warmed, before: before.round(), kept, until_fast_ms, hand_over })
}

/// Returns the time from `from` until a [`STRETCH`] begins in which the guest does `wanted`
/// operations per second.
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
        // 1000 operations per ms, from 500 ms on a tenth of that for a second, then as before
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
        // the first stretch with nine tenths of the operations begins before the guest is fast
        let until_fast = seen.until_fast_ms.unwrap();
        assert!((997.0..=998.0).contains(&until_fast), "{until_fast}");
        assert!(seen_in(&samples[..1490]).is_none(), "not watched long enough");
        assert_eq!(seen_in(&samples[..1510]).unwrap().until_fast_ms, None);
    }
}
