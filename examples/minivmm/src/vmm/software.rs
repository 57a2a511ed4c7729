//! A software guest, for hosts without KVM: threads that write the same RAM, keep the same board,
//! and migrate through the same traits. It executes no guest code. Of the requested workload it
//! does only what matters to a migration: it writes the same number of pages at the same rate, and
//! checks that each page still holds what was last written there.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use guests::{
    layout::{self, board},
    spec::Spec,
};
use migration_core::{
    GuestRam, PAGE_SIZE,
    codec::{Reader, Writer},
    state::{Section, VmState},
    text::describe,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::VmError,
};
use migration_kvm::{
    ram::MappedRam,
    tracker::{TrackerKind, UserFault, WriteProtect},
    vcpu::{Doing, MAX_WAIT, VcpuError},
};

use super::machine::Processors;

const PLAN_SECTION: &str = "software";
const CPU_SECTION: &str = "software-cpu";
/// The version of both sections.
const VERSION: u32 = 2;
/// The frequency of the software guest's time stamp counter, in ticks per microsecond.
const TICKS_PER_US: u64 = 1000;
/// The first page that workloads use. Below it lie the board and the pages that a kernel would
/// have.
const FIRST_PAGE: u64 = (4 << 20) / PAGE_SIZE as u64;
/// The number of pages that a thread writes before it rests, if its workload runs at full speed.
const BURST: u64 = 16;
/// A bound of the steps of a thread. It is more than any thread ever does, and far from an
/// overflow.
const MAX_STEPS: u64 = 1 << 60;
/// The rest of a thread between bursts. A fast loop would leave no core for the migration that the
/// guest is to demonstrate.
const REST: Duration = Duration::from_micros(50);

/// The work of the threads, which moves with their state. It reduces the workloads of the real
/// guest to the pages that they write and the rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Plan {
    /// The page number of the first thread's first page. The pages of the other threads follow.
    first: u64,
    /// The number of pages of each thread. With 0, a thread only counts heartbeats.
    pages: u64,
    /// The number of pages that all threads together write per second. 0 means full speed.
    per_second: u64,
}

impl Plan {
    /// Returns the plan for a workload, and the number of pages from [`FIRST_PAGE`] on that are to
    /// be filled with the workload's data.
    fn of(spec: &str, cpus: u64, ram_pages: u64) -> Result<(Self, u64), String> {
        let spec = Spec::parse(spec).map_err(|_| "the workload is not known".to_owned())?;
        let free = ram_pages.saturating_sub(FIRST_PAGE);
        if free < 8 * cpus {
            return Err(format!("a software guest of {cpus} CPUs needs more than {ram_pages} pages of memory"));
        }
        let to_pages = |bytes: u64| bytes / PAGE_SIZE as u64;
        let data = to_pages(spec.value("data")).min(free - free / 8);
        let beside = free - data;
        let work = match spec.info.name {
            "idle" | "sleep" => 0,
            "rate" | "kv" => beside * spec.value("percent") / 100,
            _ => to_pages(spec.area()).min(beside),
        };
        let plan = Self { first: FIRST_PAGE + data, pages: work / cpus, per_second: spec.value("pages") };
        Ok((plan, data))
    }

    fn fits(&self, cpus: u64, ram_pages: u64) -> bool {
        let end = self.pages.checked_mul(cpus).and_then(|pages| pages.checked_add(self.first));
        self.first >= FIRST_PAGE && end.is_some_and(|end| end <= ram_pages)
    }
}

/// Returns the address of a thread's figures on the board.
fn record(cpu: usize) -> u64 {
    layout::BOARD_ADDRESS + (board::RECORDS + cpu * board::RECORD_SIZE) as u64
}

struct Control {
    plan: Plan,
    run: bool,
    held: bool,
    exit: bool,
    /// Whether each thread has stopped.
    stopped: Vec<bool>,
    throttle: u32,
}

impl Control {
    fn may_run(&self) -> bool {
        self.run && !self.held && !self.exit
    }
}

struct Shared {
    ram: Arc<MappedRam>,
    /// The dirty log for hosts whose kernel cannot track writes of this process.
    bitmap: Arc<DirtyBitmap>,
    control: Mutex<Control>,
    changed: Condvar,
    stop: AtomicBool,
    /// The number of steps that each thread has done: its only register.
    steps: Vec<AtomicU64>,
    start: Instant,
}

pub(super) struct SoftwareProcessors {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    kind: TrackerKind,
    fault: Option<Arc<UserFault>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        let ram = &self.ram;
        // `Plan::of` or `Plan::fits` has checked every address that is used here
        let _ = ram.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn set_word(&self, gpa: u64, value: u64) {
        let ram = &self.ram;
        let _ = ram.write(gpa, &value.to_le_bytes());
        // after the write: see `DirtyBitmap::mark`
        self.bitmap.mark(gpa, 8);
    }

    /// Adds to a figure of the thread's record, which no other thread writes.
    fn count(&self, cpu: usize, field: usize, by: u64) {
        let at = record(cpu) + field as u64;
        self.set_word(at, self.word(at).wrapping_add(by));
    }

    /// Writes the next page of the thread's area. Before that, checks that the page holds what was
    /// last written there: the number of times that the thread has gone through its area.
    fn step(&self, cpu: usize, plan: &Plan) {
        let step = self.steps[cpu].load(Ordering::SeqCst);
        let (lap, page) = (step / plan.pages, step % plan.pages);
        let gpa = self.ram.layout().gpa_of(plan.first + cpu as u64 * plan.pages + page).unwrap_or(0);
        let found = self.word(gpa);
        if found != lap {
            self.count(cpu, layout::record::ERRORS, 1);
            let first = layout::BOARD_ADDRESS + board::FIRST_ERROR as u64;
            if self.word(first) == 0 {
                for (n, value) in (0u64..).zip([layout::fault::STALE, gpa, lap, found]) {
                    self.set_word(first + 8 * n, value);
                }
            }
        }
        self.set_word(gpa, lap + 1);
        self.steps[cpu].store(step + 1, Ordering::SeqCst);
        self.count(cpu, layout::record::OPERATIONS, 1);
    }

    /// Fills a page with words that do not compress.
    fn fill(&self, page: u64) {
        let mut bytes = [0; PAGE_SIZE];
        let mut seed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for word in bytes.chunks_exact_mut(8) {
            // This is a xorshift generator. Its seed is never 0 here, because page 0 is never
            // filled.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            word.copy_from_slice(&seed.to_le_bytes());
        }
        let ram = &self.ram;
        if let Some(gpa) = ram.layout().gpa_of(page) {
            let _ = ram.write(gpa, &bytes);
            self.bitmap.mark(gpa, PAGE_SIZE as u64);
        }
    }
}

impl SoftwareProcessors {
    pub(super) fn new(
        ram: Arc<MappedRam>,
        cpus: u32,
        kind: TrackerKind,
        fault: Option<Arc<UserFault>>,
    ) -> io::Result<Self> {
        let bitmap = DirtyBitmap::new(ram.layout().clone());
        let stopped = vec![false; cpus as usize];
        let control = Control { held: false, plan: Plan::default(), run: false, exit: false, stopped, throttle: 0 };
        let shared = Arc::new(Shared {
            ram,
            bitmap,
            control: Mutex::new(control),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            steps: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
            start: Instant::now(),
        });
        // if a thread cannot be started, dropping this ends those that were started
        let mut started = Self { shared: shared.clone(), threads: Vec::new(), kind, fault };
        for cpu in 0..cpus as usize {
            let shared = shared.clone();
            let thread = thread::Builder::new().name(format!("software-cpu-{cpu}"));
            started.threads.push(thread.spawn(move || thread_main(cpu, &shared))?);
        }
        Ok(started)
    }
}

fn thread_main(cpu: usize, shared: &Shared) {
    loop {
        let mut control = shared.lock();
        control.stopped[cpu] = true;
        shared.changed.notify_all();
        while !control.may_run() && !control.exit {
            control = shared.changed.wait(control).unwrap_or_else(|e| e.into_inner());
        }
        if control.exit {
            return;
        }
        control.stopped[cpu] = false;
        let plan = control.plan;
        shared.stop.store(false, Ordering::SeqCst);
        drop(control);
        work(cpu, &plan, shared);
    }
}

/// Works until the thread is to stop.
fn work(cpu: usize, plan: &Plan, shared: &Shared) {
    let record = record(cpu);
    let per_second = plan.per_second as f64 / shared.steps.len() as f64;
    let (mut last, mut due) = (shared.start.elapsed(), 0.0);
    while !shared.stop.load(Ordering::SeqCst) {
        let now = shared.start.elapsed();
        due = if plan.per_second == 0 { BURST as f64 } else { due + (now - last).as_secs_f64() * per_second };
        // work that a long rest has left undone stays undone, as it would on a CPU
        due = due.min(256.0);
        while plan.pages > 0 && due >= 1.0 && !shared.stop.load(Ordering::Relaxed) {
            shared.step(cpu, plan);
            due -= 1.0;
        }
        shared.count(cpu, layout::record::HEARTBEATS, 1);
        let gap = (now - last).as_micros() as u64 * TICKS_PER_US;
        if gap > shared.word(record + layout::record::LONGEST_GAP as u64) {
            shared.set_word(record + layout::record::LONGEST_GAP as u64, gap);
        }
        last = now;
        let control = shared.lock();
        if control.may_run() {
            // a pause ends the rest
            let rest = REST * 100 / (100 - control.throttle.min(99));
            drop(shared.changed.wait_timeout(control, rest));
        }
    }
}

impl Processors for SoftwareProcessors {
    fn perform(&self, spec: &str) -> Result<(), String> {
        let cpus = self.shared.steps.len() as u64;
        let (plan, data) = Plan::of(spec, cpus, self.shared.ram.layout().pages())?;
        (FIRST_PAGE..FIRST_PAGE + data).for_each(|page| self.shared.fill(page));
        self.shared.lock().plan = plan;
        let set = |field: usize, value| self.shared.set_word(layout::BOARD_ADDRESS + field as u64, value);
        set(board::VERSION, u64::from(layout::BOARD_VERSION) | cpus << 32);
        set(board::STATE, layout::state::RUNNING);
        set(board::TSC_KHZ, TICKS_PER_US * 1000);
        set(board::MAGIC, layout::BOARD_MAGIC);
        Ok(())
    }

    fn boot(&self, _entry: u64, _start_info: u64) -> Result<(), String> {
        Err("a software guest runs no kernel".into())
    }

    fn run(&self) {
        let mut control = self.shared.lock();
        control.run = true;
        // this also cancels the stop of a thread that was late to stop
        self.shared.stop.store(!control.may_run(), Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    fn pause(&self) -> Result<(), VmError> {
        let mut control = self.shared.lock();
        control.run = false;
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        let late = |control: &mut Control| control.stopped.contains(&false);
        let waited = self.shared.changed.wait_timeout_while(control, MAX_WAIT, late);
        let (control, _) = waited.unwrap_or_else(|e| e.into_inner());
        match control.stopped.iter().position(|&stopped| !stopped) {
            // the thread waits for a page, because there is nothing else that it could wait for
            Some(vcpu) => Err(VcpuError::Stuck { vcpu, what: "stop", doing: Doing::Guest }.into()),
            None => Ok(()),
        }
    }

    fn hold(&self, held: bool) {
        let mut control = self.shared.lock();
        control.held = held;
        let runs = control.may_run();
        self.shared.stop.store(!runs, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.shared.lock().throttle = percent.into();
        self.shared.changed.notify_all();
        Ok(())
    }

    fn save(&self, into: &mut VmState) -> Result<(), VmError> {
        let mut add = |name: &str, instance, words: &[u64]| {
            let mut w = Writer::new();
            for &word in words {
                w.u64(word);
            }
            into.sections.push(Section { name: name.into(), instance, version: VERSION, data: w.into_bytes().into() });
        };
        let plan = self.shared.lock().plan;
        add(PLAN_SECTION, 0, &[plan.first, plan.pages, plan.per_second]);
        for (instance, steps) in (0u32..).zip(&self.shared.steps) {
            add(CPU_SECTION, instance, &[steps.load(Ordering::SeqCst)]);
        }
        Ok(())
    }

    fn load(&self, from: &VmState) -> Result<(), VmError> {
        let [first, pages, per_second] = words(from, PLAN_SECTION, 0)?;
        let plan = Plan { first, pages, per_second };
        let (cpus, ram) = (self.shared.steps.len() as u64, self.shared.ram.layout().pages());
        // a machine that never had a workload has no plan
        if plan != Plan::default() && !plan.fits(cpus, ram) {
            return Err(VmError::new(format!("the software guest's plan does not fit into {ram} pages: {plan:?}")));
        }
        for (instance, steps) in (0u32..).zip(&self.shared.steps) {
            let [done] = words(from, CPU_SECTION, instance)?;
            if done > MAX_STEPS {
                return Err(VmError::new(format!("software CPU {instance} cannot have done {done} steps")));
            }
            steps.store(done, Ordering::SeqCst);
        }
        self.shared.lock().plan = plan;
        Ok(())
    }

    fn host_needs(&self) -> Bytes {
        Bytes::new()
    }

    fn tracker(&self) -> Result<Box<dyn DirtyTracker>, String> {
        match (self.kind, self.fault.clone()) {
            (TrackerKind::Auto | TrackerKind::WriteProtect, Some(fault)) => {
                Ok(Box::new(WriteProtect::new(self.shared.ram.clone(), fault)))
            }
            (TrackerKind::WriteProtect, None) => Err(UserFault::new().err().map_or_else(String::new, describe)),
            // the kinds that need KVM, and hosts that do not permit userfaultfd
            _ => Ok(Box::new(BitmapTracker::new(self.shared.bitmap.clone()))),
        }
    }

    fn threads(&self) -> Vec<u32> {
        Vec::new()
    }

    fn tsc_khz(&self) -> u64 {
        TICKS_PER_US * 1000
    }

    fn end_watch(&self) -> Box<dyn FnOnce() -> Option<String> + Send> {
        let shared = self.shared.clone();
        Box::new(move || {
            let mut control = shared.lock();
            while !control.exit {
                control = shared.changed.wait(control).unwrap_or_else(|e| e.into_inner());
            }
            None
        })
    }

    fn end(&self) -> Option<String> {
        None
    }

    fn pre_fault(&self, _gpa: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn shut_down(&self) {
        self.shared.lock().exit = true;
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }
}

/// Returns the words of a section.
fn words<const N: usize>(state: &VmState, name: &str, instance: u32) -> Result<[u64; N], VmError> {
    let section = state.find(name, instance);
    let section = section.ok_or_else(|| VmError::new(format!("the state has no section {name} {instance}")))?;
    if section.version != VERSION {
        return Err(VmError::version(name, section.version, VERSION, VERSION));
    }
    let malformed = |e| VmError::because(format!("state of {name} {instance}"), e);
    let (mut r, mut words) = (Reader::new(&section.data), [0; N]);
    for word in &mut words {
        *word = r.u64("word").map_err(malformed)?;
    }
    r.finish().map_err(malformed)?;
    Ok(words)
}

impl Drop for SoftwareProcessors {
    fn drop(&mut self) {
        self.shut_down();
        let began = Instant::now();
        for (cpu, thread) in self.threads.drain(..).enumerate() {
            while !thread.is_finished() && began.elapsed() < MAX_WAIT {
                thread::sleep(REST);
            }
            if thread.is_finished() {
                let _ = thread.join();
            } else {
                // the thread waits for a page, and keeps everything that it may still touch
                log!("the thread of software CPU {cpu} does not end, and is left behind");
            }
        }
    }
}
