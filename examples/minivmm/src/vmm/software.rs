//! A software guest, for hosts without KVM: threads that write the same RAM, keep the same board, and migrate through the
//! same traits. It executes no guest code; it does what the workload `hot` does, whatever workload was asked for.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use migration_core::{
    GuestRam, PAGE_SIZE,
    codec::{Reader, Writer},
    state::{Section, VmState},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::VmError,
};
use migration_kvm::{
    ram::MappedRam,
    tracker::{TrackerKind, UserFault, WriteProtect},
};

use super::machine::Processors;
use crate::workload::layout;

const SECTION: &str = "software-cpu";
/// Ticks a microsecond, the software guest's time stamp counter.
const TICKS_PER_US: u64 = 1000;
/// Pages that each thread works on.
const AREA_PAGES: u64 = 1024;

/// Where a thread's figures lie on the board.
fn record(cpu: usize) -> u64 {
    layout::BOARD_ADDRESS + (layout::board::RECORDS + cpu * layout::board::RECORD_SIZE) as u64
}

struct Control {
    run: bool,
    exit: bool,
    stopped: usize,
}

struct Shared {
    ram: Arc<MappedRam>,
    /// Used when the kernel cannot track for us.
    bitmap: Arc<DirtyBitmap>,
    control: Mutex<Control>,
    changed: Condvar,
    stop: AtomicBool,
    throttle: AtomicU64,
    /// Steps that each thread has done: its only register.
    steps: Vec<AtomicU64>,
    start: Instant,
}

pub(super) struct SoftwareProcessors {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    kind: TrackerKind,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        let ram: &dyn GuestRam = &*self.ram;
        // every address used here lies in the first megabytes, checked by `boot`
        let _ = ram.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn set_word(&self, gpa: u64, value: u64) {
        let ram: &dyn GuestRam = &*self.ram;
        let _ = ram.write(gpa, &value.to_le_bytes());
        self.bitmap.mark(gpa, 8);
    }

    fn area(&self, cpu: usize) -> u64 {
        (4 << 20) + cpu as u64 * AREA_PAGES * PAGE_SIZE as u64
    }

    /// Writes the next page of the thread's area, after checking that it holds what was written last.
    fn step(&self, cpu: usize) {
        let step = self.steps[cpu].load(Ordering::SeqCst);
        let (lap, page) = (step / AREA_PAGES, step % AREA_PAGES);
        let gpa = self.area(cpu) + page * PAGE_SIZE as u64;
        let record = record(cpu);
        if self.word(gpa) != lap {
            self.set_word(record + layout::record::ERRORS as u64, self.word(record + layout::record::ERRORS as u64) + 1);
        }
        self.set_word(gpa, lap + 1);
        self.steps[cpu].store(step + 1, Ordering::SeqCst);
        self.set_word(record + layout::record::OPERATIONS as u64, step + 1);
        self.set_word(record + layout::record::HEARTBEATS as u64, step + 1);
    }
}

impl SoftwareProcessors {
    pub(super) fn new(ram: Arc<MappedRam>, cpus: u32, kind: TrackerKind) -> Self {
        let bitmap = DirtyBitmap::new(ram.layout().clone());
        let shared = Arc::new(Shared {
            ram,
            bitmap,
            control: Mutex::new(Control { run: false, exit: false, stopped: 0 }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            throttle: AtomicU64::new(0),
            steps: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
            start: Instant::now(),
        });
        let thread = |cpu: usize| {
            let shared = shared.clone();
            thread::spawn(move || thread_main(cpu, &shared))
        };
        let threads = (0..cpus as usize).map(thread).collect();
        Self { shared, threads, kind }
    }
}

fn thread_main(cpu: usize, shared: &Shared) {
    let record = record(cpu);
    loop {
        let mut control = shared.lock();
        control.stopped += 1;
        shared.changed.notify_all();
        while !control.run && !control.exit {
            control = shared.changed.wait(control).unwrap_or_else(|e| e.into_inner());
        }
        if control.exit {
            return;
        }
        control.stopped -= 1;
        shared.stop.store(false, Ordering::SeqCst);
        drop(control);
        let mut last = shared.start.elapsed();
        while !shared.stop.load(Ordering::SeqCst) {
            for _ in 0..16 {
                shared.step(cpu);
            }
            let now = shared.start.elapsed();
            let gap = (now - last).as_micros() as u64 * TICKS_PER_US;
            if gap > shared.word(record + layout::record::LONGEST_GAP as u64) {
                shared.set_word(record + layout::record::LONGEST_GAP as u64, gap);
            }
            last = now;
            let percent = shared.throttle.load(Ordering::Relaxed);
            // a fast loop would leave no core for the migration that it is to show
            thread::sleep(Duration::from_micros(50 + 20 * percent));
        }
    }
}

impl Processors for SoftwareProcessors {
    fn boot(&self, _entry: u64, _start_info: u64) -> Result<(), String> {
        let cpus = self.shared.steps.len();
        let end = self.shared.area(cpus);
        if self.shared.ram.layout().page_of(end).is_none() {
            return Err(format!("a software guest of {cpus} CPUs needs more than {end} bytes of memory"));
        }
        self.shared.set_word(layout::BOARD_ADDRESS, layout::BOARD_MAGIC);
        self.shared.set_word(layout::BOARD_ADDRESS + 8, u64::from(layout::BOARD_VERSION) | (cpus as u64) << 32);
        self.shared.set_word(layout::BOARD_ADDRESS + 0x10, 1);
        self.shared.set_word(layout::BOARD_ADDRESS + 0x18, TICKS_PER_US * 1000);
        Ok(())
    }

    fn run(&self) {
        self.shared.lock().run = true;
        self.shared.changed.notify_all();
    }

    fn pause(&self) {
        let mut control = self.shared.lock();
        control.run = false;
        self.shared.stop.store(true, Ordering::SeqCst);
        while control.stopped < self.threads.len() {
            control = self.shared.changed.wait(control).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.shared.throttle.store(percent.into(), Ordering::Relaxed);
        Ok(())
    }

    fn save(&self, into: &mut VmState) -> Result<(), VmError> {
        for (instance, steps) in (0u32..).zip(&self.shared.steps) {
            let mut w = Writer::new();
            w.u64(steps.load(Ordering::SeqCst));
            into.sections.push(Section { name: SECTION.into(), instance, version: 1, data: w.into_bytes().into() });
        }
        Ok(())
    }

    fn load(&self, from: &VmState) -> Result<(), VmError> {
        for (instance, steps) in (0u32..).zip(&self.shared.steps) {
            let section = from.find(SECTION, instance);
            let section = section.ok_or_else(|| VmError::new(format!("the state has no section {SECTION} {instance}")))?;
            let mut r = Reader::new(&section.data);
            let malformed = |e| VmError::because("state of a software CPU", e);
            steps.store(r.u64("steps").map_err(malformed)?, Ordering::SeqCst);
            r.finish().map_err(malformed)?;
        }
        Ok(())
    }

    fn host_needs(&self) -> Bytes {
        Bytes::new()
    }

    fn tracker(&self) -> Result<Box<dyn DirtyTracker>, String> {
        match (self.kind, UserFault::new()) {
            (TrackerKind::Auto | TrackerKind::WriteProtect, Ok(user_fault)) => {
                Ok(Box::new(WriteProtect::new(self.shared.ram.clone(), Arc::new(user_fault))))
            }
            (TrackerKind::WriteProtect, Err(e)) => Err(e.to_string()),
            // the kinds that need KVM, and hosts that do not permit userfaultfd
            _ => Ok(Box::new(BitmapTracker::new(self.shared.bitmap.clone()))),
        }
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

    fn shut_down(&self) {
        self.shared.lock().exit = true;
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }
}

impl Drop for SoftwareProcessors {
    fn drop(&mut self) {
        self.shut_down();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
