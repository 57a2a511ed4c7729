//! One run: a working guest, a migration, and its cost. Also the runs without a migration for
//! comparison.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{ReadHalf, WriteHalf},
    page::{PageRange, RamLayout, RamRegion},
    ram::GuestRam,
    text::describe,
};
use migration_kvm::ram::{Backing, MappedRam};
use migration_transport::{Address, ConnectOptions, bind, connector};
use serde::Serialize;
use serde_json::Value;

pub(crate) use minivmm_client::report::ms;

use super::{
    encrypt::Way,
    guest::Guest,
    ours, postcopy,
    process::{Beyond, Folder, MemorySampler, Process, VcpuSampler, field, vcpu_seconds},
    qemu,
    tuning::Tuning,
};

/// The longest time in which a guest may fill its pages.
pub(crate) const FILL: Duration = Duration::from_secs(120);
/// The time for which the guest is observed before the migration, while the warmed memory is held.
/// A machine that is a VM itself reports free memory to its host after 2 s. The time is longer than
/// that, so no report of earlier memory is still to come.
pub(crate) const BEFORE: Duration = Duration::from_millis(2500);
/// The time for which the guest is observed after the migration, while the source's memory is
/// freed. Disturbances in this time count.
pub(crate) const AFTER: Duration = Duration::from_millis(300);
/// The bytes of a read or write of the bare copy.
const CHUNK: u64 = 1 << 20;

/// The VMM of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Vmm {
    Minivmm,
    Qemu,
}

/// The description of a run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Setup {
    pub(super) vmm: Vmm,
    /// The column or line of the table to which the run belongs.
    pub(super) label: String,
    pub(super) workload: String,
    /// Bytes of guest RAM.
    pub(super) memory: u64,
    pub(super) streams: u16,
    pub(super) impact: &'static str,
    /// `pre-copy`, `post-copy`, and for QEMU `post-copy-preempt`.
    pub(super) strategy: String,
    /// Whether the memory of both processes is read during the migration, which disturbs the times.
    pub(super) watch_memory: bool,
    /// Whether the guest's speed is measured before, during and after the migration.
    pub(super) watch_speed: bool,
    /// The link, and its protection.
    pub(super) way: Way,
    /// The options of the VMM.
    pub(super) tuning: Tuning,
}

/// The data that a VMM reports of a migration.
pub(crate) struct Moved {
    pub(super) total: Duration,
    pub(super) own_total_ms: Option<f64>,
    pub(super) own_downtime_ms: Option<f64>,
    pub(crate) report: Value,
}

/// The result of a run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    pub(super) setup: Setup,
    /// The time from the request to the answer that the migration is complete, measured by the
    /// client, in ms.
    pub(super) total_ms: f64,
    /// The total and the downtime that the VMM itself reports, in ms.
    pub(super) own_total_ms: Option<f64>,
    pub(super) own_downtime_ms: Option<f64>,
    /// The longest time between two readings of the guest's clock during and after the migration,
    /// in ms.
    pub(super) gap_ms: f64,
    /// The longest time between two readings before the migration, in ms.
    pub(super) gap_before_ms: f64,
    /// The CPU time of both processes in seconds: the source's until it has ended, the
    /// destination's until completion.
    pub(super) cpu_s: f64,
    pub(super) cpu_source_s: f64,
    pub(super) cpu_destination_s: f64,
    /// The part of the CPU time that vCPU threads used.
    pub(super) cpu_vcpu_s: f64,
    /// The guest's operations per second before the migration, and on average during it.
    pub(super) operations_before: f64,
    pub(super) operations_during: f64,
    /// The time for which the guest was slow, if it was measured.
    pub(super) speed: Option<postcopy::Speed>,
    /// The bytes of guest RAM in huge pages, at the source and at the destination.
    pub(super) huge_source: u64,
    pub(super) huge_destination: u64,
    /// The number of wrong pages that the guest found when it checked all of them at the end.
    pub(super) guest_errors: u64,
    /// The memory of source and destination beyond guest RAM, if it was measured.
    pub(super) beyond: Option<[Beyond; 2]>,
    /// The VMM's report.
    pub(super) report: Value,
}

enum Source {
    Ours(ours::Source),
    Qemu(qemu::Source, PathBuf),
}

enum Pair {
    Ours(ours::Pair),
    Qemu(qemu::Pair),
}

impl Source {
    fn start(folder: &Folder, setup: &Setup) -> Result<Self, String> {
        match setup.vmm {
            Vmm::Minivmm => ours::Source::start(folder, &setup.into()).map(Self::Ours),
            Vmm::Qemu => {
                let elf = ours::image(folder, &setup.workload)?;
                Ok(Self::Qemu(qemu::Source::start(folder, setup, &elf)?, elf))
            }
        }
    }

    fn process(&mut self) -> &mut Process {
        match self {
            Self::Ours(source) => &mut source.process,
            Self::Qemu(source, _) => &mut source.process,
        }
    }

    fn pair(self, folder: &Folder, setup: &Setup) -> Result<Pair, String> {
        Ok(match self {
            Self::Ours(source) => Pair::Ours(source.pair(folder, &setup.into())?),
            Self::Qemu(source, elf) => Pair::Qemu(source.pair(folder, setup, &elf)?),
        })
    }
}

impl Pair {
    fn processes(&mut self) -> (&mut Process, &mut Process) {
        match self {
            Self::Ours(pair) => (&mut pair.source, &mut pair.destination),
            Self::Qemu(pair) => (&mut pair.source, &mut pair.destination),
        }
    }

    fn migrate(&mut self) -> Result<Moved, String> {
        match self {
            Self::Ours(pair) => pair.migrate(),
            Self::Qemu(pair) => pair.migrate(),
        }
    }

    /// The source of minivmm ends by itself; QEMU's is told to quit.
    fn end_source(&mut self) -> Result<f64, String> {
        if let Self::Qemu(pair) = self {
            pair.end_source()?;
        }
        self.processes().0.wait()
    }
}

/// Returns the guest's operations per second between two readings.
fn rate(before: &guests::Board, after: &guests::Board, time: Duration) -> f64 {
    (after.operations.saturating_sub(before.operations) as f64 / time.as_secs_f64()).round()
}

/// Returns the bytes of RAM in huge pages.
fn huge(process: &Process, guest: &Guest) -> u64 {
    let ram = guest.ram();
    let mappings = process.mappings().unwrap_or_default();
    mappings.iter().filter(|m| m.range.start < ram.end && ram.start < m.range.end).map(|m| m.huge).sum()
}

/// Runs one migration.
pub(super) fn run(folder: &Folder, setup: &Setup) -> Result<Run, String> {
    let mut source = Source::start(folder, setup)?;
    let guest = Guest::find(source.process(), setup.memory, FILL)?;
    let huge_source = huge(source.process(), &guest);
    let mut pair = source.pair(folder, setup)?;
    let (from, to) = pair.processes();
    let (from_pid, to_pid) = (from.pid(), to.pid());
    let warm = warm(setup.memory)?;

    let (began, first) = (Instant::now(), guest.reset_gap()?);
    let speedometer = match setup.watch_speed {
        true => Some(postcopy::Speedometer::start(guest.peek(from_pid)?, to_pid, setup.memory)?),
        false => None,
    };
    thread::sleep(BEFORE);
    let before = guest.board()?;
    let operations_before = rate(&first, &before, began.elapsed());
    let gap_before_ms = ms(before.longest_gap());

    let watch = |pid| MemorySampler::start(pid, Duration::from_millis(5));
    let watched = if setup.watch_memory { Some((watch(from_pid)?, watch(to_pid)?)) } else { None };
    let sampler = VcpuSampler::start(from_pid)?;
    drop(warm);
    let (from, to) = pair.processes();
    let start = (from.cpu_seconds()?, to.cpu_seconds()?, vcpu_seconds(to_pid));
    let (began, first) = (Instant::now(), guest.reset_gap()?);
    let requested = Instant::now();
    let moved = pair.migrate()?;
    let (_, to) = pair.processes();
    let end = (to.cpu_seconds()?, vcpu_seconds(to_pid));

    let arrived = Guest::find(to, setup.memory, Duration::from_secs(10))?;
    let at_end = arrived.board()?;
    // the guest has worked until it was found
    let operations_during = rate(&first, &at_end, began.elapsed());
    let cpu_source_s = pair.end_source()? - start.0;
    let cpu_vcpu_s = sampler.finish() + (end.1 - start.2);
    let (_, to) = pair.processes();
    thread::sleep(AFTER);
    let after = arrived.board()?;
    let speed = speedometer.map(|s| s.wait(requested));
    let beyond = match watched {
        Some((at_source, at_destination)) => {
            Some([at_source.finish(&guest.ram())?, at_destination.finish(&arrived.ram())?])
        }
        None => None,
    };
    let huge_destination = huge(to, &arrived);
    let guest_errors = arrived.verify()?;
    if let Pair::Ours(pair) = &pair {
        // both ways to read the board must agree
        let status = pair.status()?;
        if status["workload"].is_null() {
            return Err(format!("the destination does not see the guest's board: {status}"));
        }
    }
    Ok(Run {
        setup: setup.clone(),
        total_ms: ms(moved.total),
        own_total_ms: moved.own_total_ms,
        own_downtime_ms: moved.own_downtime_ms,
        gap_ms: ms(after.longest_gap()),
        gap_before_ms,
        cpu_s: cpu_source_s + end.0 - start.1,
        cpu_source_s,
        cpu_destination_s: end.0 - start.1,
        cpu_vcpu_s,
        operations_before,
        operations_during,
        speed,
        huge_source,
        huge_destination,
        guest_errors,
        beyond,
        report: moved.report,
    })
}

fn ram(bytes: u64) -> Result<MappedRam, String> {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: bytes.next_multiple_of(2 << 20) }]);
    MappedRam::new(layout.map_err(|e| e.to_string())?, Backing::TransparentHuge).map_err(describe)
}

fn populate(ram: &MappedRam) -> Result<(), String> {
    ram.prefault(PageRange::new(0, ram.layout().pages())).map_err(describe)
}

/// Touches as much memory as a source and a destination of such a guest need, so that the host has
/// assigned it. If the machine has less to spare, touches that much. Held until it is dropped: free
/// memory returns to the host after a while, so it must be dropped just before the measurement.
pub(crate) fn warm(guest: u64) -> Result<MappedRam, String> {
    let available = field("/proc/meminfo".as_ref(), "MemAvailable");
    let available = available.and_then(|a| a.split(' ').next()?.parse::<u64>().ok()).unwrap_or(4 << 20) << 10;
    let memory = ram((guest * 5 / 2).min(available / 8 * 7))?;
    populate(&memory)?;
    Ok(memory)
}

/// A bulk copy over TCP inside this process.
struct BareCopy {
    from: MappedRam,
    to: MappedRam,
    lanes: Vec<(Box<dyn WriteHalf>, Box<dyn ReadHalf>)>,
}

impl BareCopy {
    /// Prepares the copy of `bytes` of incompressible memory over `streams` connections into fresh
    /// memory in huge pages.
    fn new(bytes: u64, streams: u64) -> Result<Self, String> {
        let (from, to) = (ram(bytes)?, ram(bytes)?);
        populate(&from)?;
        let mut word = 1u64;
        let mut block = vec![0; CHUNK as usize];
        for piece in block.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            piece.copy_from_slice(&word.to_le_bytes());
        }
        for at in (0..bytes / CHUNK).map(|n| n * CHUNK) {
            from.write(at, &block).map_err(|e| e.to_string())?;
        }
        let any: Address = "tcp:127.0.0.1:0".parse().map_err(|e| format!("{e}"))?;
        let mut listener = bind(&any).map_err(|e| format!("{any}: {e}"))?;
        let bound: Address = listener.address().parse().map_err(|e| format!("{e}"))?;
        let link = connector(&bound, ConnectOptions::default());
        let mut lanes = Vec::new();
        for _ in 0..streams {
            let near = link.connect().and_then(|c| c.split()).map_err(|e| format!("{bound}: {e}"))?;
            let far = listener.accept(Duration::from_secs(10)).map_err(|e| e.to_string())?.ok_or("nobody came")?;
            lanes.push((near.writer, far.split().map_err(|e| e.to_string())?.reader));
        }
        Ok(Self { from, to, lanes })
    }

    /// Copies all of it once, striped over the connections. Returns the time.
    fn run(&mut self) -> Result<Duration, String> {
        let (from, to): (&dyn GuestRam, &dyn GuestRam) = (&self.from, &self.to);
        let (chunks, streams) = (from.layout().bytes() / CHUNK, self.lanes.len());
        let begin = Instant::now();
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (lane, (writer, reader)) in self.lanes.iter_mut().enumerate() {
                let pieces = move || (lane as u64..chunks).step_by(streams).map(|n| n * CHUNK);
                threads.push(scope.spawn(move || -> Result<(), Error> {
                    pieces().try_for_each(|at| Ok(writer.write_all(&[], &[from.slice_at(at, CHUNK)?])?))
                }));
                threads.push(scope.spawn(move || -> Result<(), Error> {
                    pieces().try_for_each(|at| Ok(reader.read_ram(&[to.slice_at(at, CHUNK)?])?))
                }));
            }
            for thread in threads {
                let result = thread.join().map_err(|_| "a thread of the bare copy panicked")?;
                result.map_err(|e| format!("bare copy: {e}"))?;
            }
            Ok::<(), String>(())
        })?;
        Ok(begin.elapsed())
    }
}

/// The errors of the copy's threads.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// Returns the time of a bare copy into fresh memory in ms: the least time of any migration of as
/// much data on this machine.
pub(super) fn floor(bytes: u64, streams: u64) -> Result<f64, String> {
    let mut copy = BareCopy::new(bytes, streams)?;
    // the fresh memory was not touched yet, but the host has assigned it
    let warm = warm(bytes)?;
    thread::sleep(BEFORE);
    drop(warm);
    copy.run().map(ms)
}

/// Returns the longest gap of a guest that is not migrated, during `window`, beside a bulk copy
/// over `streams` streams (0: beside no copy).
pub(super) fn control(
    folder: &Folder,
    setup: &Setup,
    streams: u64,
    bytes: u64,
    window: Duration,
) -> Result<f64, String> {
    let mut source = Source::start(folder, setup)?;
    let guest = Guest::find(source.process(), setup.memory, FILL)?;
    let mut copy = if streams > 0 { Some(BareCopy::new(bytes, streams)?) } else { None };
    let warm = warm(setup.memory)?;
    thread::sleep(BEFORE);
    drop(warm);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let copies = copy.as_mut().map(|copy| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    copy.run()?;
                }
                Ok::<(), String>(())
            })
        });
        let watched = guest.reset_gap().and_then(|_| {
            thread::sleep(window);
            guest.board()
        });
        stop.store(true, Ordering::Release);
        if let Some(copies) = copies {
            copies.join().map_err(|_| "the copy panicked")??;
        }
        Ok(ms(watched?.longest_gap()))
    })
}
