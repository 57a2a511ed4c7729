//! vCPU threads: run, stop, throttle, and work on vCPUs that stand still.
//!
//! A VMM that has its own run loop needs none of this. One that has not gives [`Vcpus`] its vCPUs, an
//! [`IoHandler`] for the ports and addresses behind which its devices are, and a [`KickSignal`].
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use migration_core::{report::NoObserver, spawner::StdSpawner};
//! # use migration_kvm::{tracker::GuestSlots, vcpu::{IoHandler, KickSignal, VcpuHost, Vcpus}};
//! # fn example(
//! #     fds: Vec<kvm_ioctls::VcpuFd>, memory: Arc<GuestSlots>, devices: Arc<dyn IoHandler>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let host = VcpuHost {
//!     memory,
//!     io: devices,
//!     ring_full: None,
//!     signal: KickSignal::install(libc::SIGUSR1)?,
//!     spawner: Arc::new(StdSpawner),
//!     observer: Arc::new(NoObserver),
//! };
//! let vcpus = Arc::new(Vcpus::new(fds, host)?);
//! vcpus.run();
//! vcpus.throttle(50)?;
//! vcpus.pause()?;
//! let registers = vcpus.on_each(|_, vcpu| vcpu.get_regs())?;
//! # let _ = registers;
//! # Ok(())
//! # }
//! ```
//!
//! A vCPU runs while it may: the user wants it (`run`), no throttle holds it, and the VM has not ended. Whoever changes
//! that does so under the lock, then sets `stop` and kicks. A kick is never lost: its handler sets `immediate_exit`, and
//! the thread clears that flag *before* it looks at `stop` for the last time before `KVM_RUN`. So a signal that comes before
//! the flag is cleared finds `stop` set, and one that comes later leaves the flag set, or interrupts `KVM_RUN` itself.
//!
//! `stop` is cleared only under the lock and only while vCPUs may run. So no thread, woken late from an earlier stop, takes
//! back the stop of a pause.
//!
//! Every wait for a vCPU ends after [`MOST_WAIT`] with an error that names the vCPU and what it does. Until then a vCPU that
//! was to stop is kicked again and again. One that is late stops, or works, when it can; [`Vcpus::run`] takes the stop back.

use std::{
    collections::VecDeque,
    io, iter,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicBool, AtomicU32, Ordering, compiler_fence},
        mpsc,
    },
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use migration_core::{
    report::{Event, Observer},
    spawner::{GuestImpact, Joiner, Role, Spawner},
};

mod doing;
#[allow(unsafe_code)]
mod kick;

pub use doing::{Doing, MOST_WAIT, VcpuError};
use doing::{Doings, KICK_AGAIN};
pub use kick::KickSignal;

use crate::{state, tracker::GuestSlots};

/// A throttled guest runs and rests within this time: short, so that a rest is not felt as a gap.
const THROTTLE_PERIOD: Duration = Duration::from_millis(5);
/// Not even a guest that ran for too long rests for longer than this at a time.
const LONGEST_REST: Duration = Duration::from_millis(9);
/// Rest that is owed beyond this is waived: a host that was busy for a while does not slow the guest down for long after.
const MOST_OWED: Duration = Duration::from_millis(100);

/// A vCPU that is in use by its own thread is looked at again after this time. Only one that should be stopped and is not.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

struct Control {
    /// The user, or a migration, lets the vCPUs run.
    run: bool,
    /// Pages that they need cannot come.
    held: bool,
    /// A throttle holds them, for a moment.
    rest: bool,
    throttle: u8,
    exit: bool,
    /// Why the VM has ended.
    end: Option<String>,
    jobs: Vec<VecDeque<Job>>,
    /// Which threads are not inside the run loop.
    stopped: Vec<bool>,
    /// Which threads have let go of their vCPU.
    ended: Vec<bool>,
}

impl Control {
    fn may_run(&self) -> bool {
        self.run && !self.held && !self.rest && !self.exit && self.end.is_none()
    }
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    /// The VM has ended, or is taken apart: who waits for that alone is not woken by all else.
    ended: Condvar,
    /// Held by a vCPU's thread while that runs, and by whoever works on it; empty when the thread has ended.
    vcpus: Vec<Mutex<Option<VcpuFd>>>,
    /// Looked at before every entry into the guest.
    stop: AtomicBool,
    doing: Doings,
    /// The operating system's numbers of the threads; 0 before one has begun.
    threads: Vec<AtomicU32>,
    signal: KickSignal,
    io: Arc<dyn IoHandler>,
    /// Called when a dirty ring is full.
    ring_full: Option<RingFull>,
    spawner: Arc<dyn Spawner>,
    observer: Arc<dyn Observer>,
    /// Guest memory: it stays mapped for as long as there is a vCPU, even one that does not end when it should.
    _memory: Arc<GuestSlots>,
}

/// Collects a dirty ring that is full. An error ends the VM.
pub type RingFull = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Devices, behind ports and addresses. Called on the vCPUs' threads, by several at once; a pause waits
/// for every call.
pub trait IoHandler: Send + Sync {
    /// The guest has written `data` to a port.
    fn port_write(&self, port: u16, data: &[u8]);

    /// The guest reads a port. What is not filled in reads as zeros; a PC's bus floats high where nothing
    /// is.
    fn port_read(&self, port: u16, data: &mut [u8]);

    /// The guest has written `data` to an address outside RAM. Ignored by default.
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let _ = (gpa, data);
    }

    /// The guest reads an address outside RAM. All ones by default.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let _ = gpa;
        data.fill(0xff);
    }

    /// An exit that is none of those above, and none that KVM's documentation leaves only one answer to.
    ///
    /// # Errors
    /// Ends the VM, for this reason. That is the default.
    fn other(&self, vcpu: usize, exit: &VcpuExit<'_>) -> Result<(), String> {
        let _ = vcpu;
        Err(format!("unexpected exit {exit:?}"))
    }
}

/// What vCPUs need besides themselves.
pub struct VcpuHost {
    /// Guest memory, as KVM has it. It stays mapped for as long as there is a vCPU.
    pub memory: Arc<GuestSlots>,
    /// Devices.
    pub io: Arc<dyn IoHandler>,
    /// Collects the dirty ring, if there is one.
    pub ring_full: Option<RingFull>,
    /// Stops vCPUs.
    pub signal: KickSignal,
    /// Starts their threads, with [`Role::Vcpu`].
    pub spawner: Arc<dyn Spawner>,
    /// Is told of a thread that does not end.
    pub observer: Arc<dyn Observer>,
}

/// All vCPUs of a VM, each on a thread of its own.
pub struct Vcpus {
    shared: Arc<Shared>,
    /// Those that could be started.
    threads: Mutex<Vec<Box<dyn Joiner>>>,
    throttler: Mutex<Option<Box<dyn Joiner>>>,
    /// The throttler's thread.
    throttles: Arc<Mutex<Option<ThreadId>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        // the fields do not depend on each other beyond one assignment
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
        self.changed.wait(guard).unwrap_or_else(|e| e.into_inner())
    }

    fn wait_for<'a>(&self, guard: MutexGuard<'a, Control>, time: Duration) -> MutexGuard<'a, Control> {
        self.changed.wait_timeout(guard, time).unwrap_or_else(|e| e.into_inner()).0
    }

    fn stuck(&self, vcpu: usize, what: &'static str) -> VcpuError {
        VcpuError::Stuck { vcpu, what, doing: self.doing.get(vcpu) }
    }

    /// A vCPU that is stopped, for another thread than its own.
    fn stopped_vcpu(&self, index: usize) -> Result<MutexGuard<'_, Option<VcpuFd>>, VcpuError> {
        let began = Instant::now();
        loop {
            match self.vcpus[index].try_lock() {
                Ok(vcpu) => return Ok(vcpu),
                // as in `vcpu`
                Err(TryLockError::Poisoned(e)) => return Ok(e.into_inner()),
                Err(TryLockError::WouldBlock) if began.elapsed() < MOST_WAIT => thread::sleep(LOOK_AGAIN),
                Err(TryLockError::WouldBlock) => return Err(self.stuck(index, "stop")),
            }
        }
    }

    fn vcpu(&self, index: usize) -> MutexGuard<'_, Option<VcpuFd>> {
        // KVM's part of it is as the last ioctl left it
        self.vcpus[index].lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Vcpus {
    /// Starts a thread for each vCPU. None runs before [`run`](Self::run) is called.
    ///
    /// # Errors
    /// When a thread cannot be had or does not begin, or there is no vCPU.
    pub fn new(vcpus: Vec<VcpuFd>, host: VcpuHost) -> io::Result<Self> {
        if vcpus.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a VM needs a vCPU"));
        }
        let (count, vcpus) = (vcpus.len(), vcpus.into_iter().map(|vcpu| Mutex::new(Some(vcpu))).collect());
        let VcpuHost { memory, io, ring_full, signal, spawner, observer } = host;
        let control = Control {
            run: false,
            held: false,
            rest: false,
            throttle: 0,
            exit: false,
            end: None,
            jobs: (0..count).map(|_| VecDeque::new()).collect(),
            stopped: vec![false; count],
            ended: vec![false; count],
        };
        let shared = Arc::new(Shared {
            control: Mutex::new(control),
            changed: Condvar::new(),
            ended: Condvar::new(),
            vcpus,
            stop: AtomicBool::new(true),
            doing: Doings::new(count),
            threads: (0..count).map(|_| AtomicU32::new(0)).collect(),
            signal,
            io,
            ring_full,
            spawner: spawner.clone(),
            observer,
            _memory: memory,
        });
        // if a thread cannot be had, dropping this ends those that were started
        let (throttler, throttles) = (Mutex::default(), Arc::default());
        let started = Self { shared: shared.clone(), threads: Mutex::default(), throttler, throttles };
        let (tx, begun) = mpsc::channel();
        for index in 0..count {
            let (shared, tx) = (shared.clone(), tx.clone());
            let body = move || {
                shared.threads[index].store(nix::unistd::gettid().as_raw().unsigned_abs(), Ordering::SeqCst);
                // the other end waits right below
                let _ = tx.send(());
                thread_main(index, &shared);
            };
            let name = format!("vcpu-{index}");
            let thread = spawner.spawn(Role::Vcpu, GuestImpact::default(), &name, Box::new(body))?;
            started.threads.lock().unwrap_or_else(|e| e.into_inner()).push(thread);
        }
        for _ in 0..count {
            begun.recv_timeout(MOST_WAIT).map_err(|_| io::Error::other("a vCPU's thread does not begin"))?;
        }
        Ok(started)
    }

    /// Returns the operating system's numbers of the threads, in the vCPUs' order; 0 for one that has ended.
    pub fn thread_ids(&self) -> Vec<u32> {
        self.shared.threads.iter().map(|id| id.load(Ordering::SeqCst)).collect()
    }

    /// Lets them run.
    pub fn run(&self) {
        let mut control = self.shared.lock();
        control.run = true;
        self.shared.stop.store(!control.may_run(), Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// Holds them beside all else, or ends that; waits for none, and so kicks them once: a kick is not lost.
    pub fn hold(&self, held: bool) {
        let mut control = self.shared.lock();
        control.held = held;
        self.shared.stop.store(!control.may_run(), Ordering::SeqCst);
        if held {
            self.kick_all();
        }
        self.shared.changed.notify_all();
    }

    /// Stops them; returns when none is in the guest any more.
    ///
    /// # Errors
    /// When one does not stop. It stops as soon as it can, and the others have stopped, until [`run`](Self::run) is called.
    pub fn pause(&self) -> Result<(), VcpuError> {
        let mut control = self.shared.lock();
        control.run = false;
        self.kick_all();
        let (began, mut kicked) = (Instant::now(), Instant::now());
        while let Some(late) = control.stopped.iter().position(|&stopped| !stopped) {
            if began.elapsed() >= MOST_WAIT {
                return Err(self.shared.stuck(late, "stop"));
            }
            control = self.shared.wait_for(control, KICK_AGAIN);
            if kicked.elapsed() >= KICK_AGAIN {
                kicked = Instant::now();
                self.kick_where(&control.stopped);
            }
        }
        Ok(())
    }

    /// Does `work` on all vCPUs at once; the results are in the vCPUs' order. They must be stopped: a vCPU that runs gets to it
    /// when it stops. The first one's is done here and now: a thread that has to be woken for it, and to wake this one, would
    /// cost about as much as the work.
    ///
    /// # Errors
    /// When the threads have ended, or a vCPU does not get to it: then it never does.
    pub fn on_each<T: Send + 'static>(
        &self,
        work: impl Fn(usize, &mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, VcpuError> {
        self.on_those_below(usize::MAX, work)
    }

    /// As [`on_each`](Self::on_each), on the first one's.
    pub fn on_first<T: Send + 'static>(
        &self,
        work: impl Fn(&mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<T, VcpuError> {
        self.on_those_below(1, move |_, vcpu| work(vcpu))?.pop().ok_or(VcpuError::Ended)
    }

    fn on_those_below<T: Send + 'static>(
        &self,
        end: usize,
        work: impl Fn(usize, &mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, VcpuError> {
        let work = Arc::new(work);
        // once this is set, no thread begins with it any more
        let given_up = Arc::new(AtomicBool::new(false));
        let mut results = Vec::new();
        {
            let mut control = self.shared.lock();
            if control.exit || control.ended.contains(&true) {
                return Err(VcpuError::Ended);
            }
            for (index, jobs) in control.jobs.iter_mut().enumerate().take(end).skip(1) {
                let (tx, rx) = mpsc::channel();
                let (work, given_up) = (work.clone(), given_up.clone());
                jobs.push_back(Box::new(move |vcpu| {
                    if !given_up.load(Ordering::SeqCst) {
                        // the other end waits below, or has given up
                        let _ = tx.send(work(index, vcpu));
                    }
                }));
                results.push((index, rx));
            }
        }
        if !results.is_empty() {
            self.shared.changed.notify_all();
        }
        let began = Instant::now();
        let first = match self.shared.stopped_vcpu(0) {
            Ok(mut vcpu) => vcpu.as_mut().map(|vcpu| work(0, vcpu)).ok_or(VcpuError::Ended),
            Err(stuck) => Err(stuck),
        };
        // a thread that still has work does not end: see `thread_main`
        let others = results.into_iter().map(|(index, rx)| {
            rx.recv_timeout(MOST_WAIT.saturating_sub(began.elapsed())).map_err(|why| match why {
                mpsc::RecvTimeoutError::Timeout => self.shared.stuck(index, "get to work on its state"),
                mpsc::RecvTimeoutError::Disconnected => VcpuError::Ended,
            })
        });
        let results = iter::once(first).chain(others).collect::<Result<Vec<_>, _>>();
        if results.is_err() {
            given_up.store(true, Ordering::SeqCst);
        }
        results
    }

    /// Lets them run `100 - percent` of the time.
    pub fn throttle(self: &Arc<Self>, percent: u8) -> io::Result<()> {
        self.shared.lock().throttle = percent.min(99);
        self.shared.changed.notify_all();
        let mut throttler = self.throttler.lock().unwrap_or_else(|e| e.into_inner());
        if percent == 0 {
            let thread = throttler.take();
            drop(throttler);
            // it ends by itself, at once
            thread.into_iter().for_each(|thread| thread.join());
        } else if throttler.is_none() {
            let vcpus = Arc::downgrade(self);
            let (shared, throttles) = (self.shared.clone(), self.throttles.clone());
            let body = move || {
                *throttles.lock().unwrap_or_else(|e| e.into_inner()) = Some(thread::current().id());
                throttle_main(&shared, || {
                    vcpus.upgrade().is_some_and(|v| {
                        v.kick_all();
                        true
                    })
                })
            };
            let spawner = &self.shared.spawner;
            *throttler = Some(spawner.spawn(Role::Vcpu, GuestImpact::default(), "throttle", Box::new(body))?);
        }
        Ok(())
    }

    /// Why the VM has ended, if it has.
    pub fn end(&self) -> Option<String> {
        self.shared.lock().end.clone()
    }

    /// Waits until the VM has ended by itself (`Some`), or is taken apart. Stops the other vCPUs of a VM that has ended.
    pub fn end_watch(self: &Arc<Self>) -> impl FnOnce() -> Option<String> + Send + 'static {
        let (shared, vcpus) = (self.shared.clone(), Arc::downgrade(self));
        move || {
            let mut control = shared.lock();
            while control.end.is_none() && !control.exit {
                control = shared.ended.wait(control).unwrap_or_else(|e| e.into_inner());
            }
            let end = control.end.clone();
            drop(control);
            if let (Some(_), Some(vcpus)) = (&end, vcpus.upgrade()) {
                vcpus.kick_all();
            }
            end
        }
    }

    fn kick_all(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.threads.iter().for_each(|thread| self.kick(thread));
    }

    /// Kicks those again that are not there yet.
    fn kick_where(&self, there: &[bool]) {
        let late = self.shared.threads.iter().zip(there).filter(|(_, there)| !**there);
        late.for_each(|(thread, _)| self.kick(thread));
    }

    fn kick(&self, thread: &AtomicU32) {
        match thread.load(Ordering::SeqCst) {
            // it has not begun or has ended, and is not in the guest
            0 => {}
            id => self.shared.signal.kick(id),
        }
    }

    /// Waits until all threads have let go of their vCPUs; those that do not.
    fn wait_ended(&self) -> Vec<bool> {
        let (began, mut kicked) = (Instant::now(), Instant::now());
        let mut control = self.shared.lock();
        // if a thread could not be started, the ones after it are not there
        let threads = self.threads.lock().unwrap_or_else(|e| e.into_inner()).len();
        while control.ended.iter().take(threads).any(|ended| !ended) && began.elapsed() < MOST_WAIT {
            control = self.shared.wait_for(control, KICK_AGAIN);
            if kicked.elapsed() >= KICK_AGAIN {
                kicked = Instant::now();
                self.kick_where(&control.ended);
            }
        }
        control.ended.clone()
    }

    /// Ends all threads, and with them the vCPUs.
    pub fn shut_down(&self) {
        self.shared.lock().exit = true;
        self.kick_all();
        self.shared.changed.notify_all();
        self.shared.ended.notify_all();
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shut_down();
        let throttler = self.throttler.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(throttler) = throttler
            // the last reference may be dropped by the throttler itself
            && *self.throttles.lock().unwrap_or_else(|e| e.into_inner()) != Some(thread::current().id())
        {
            throttler.join();
        }
        let ended = self.wait_ended();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(|e| e.into_inner()));
        for (index, thread) in threads.into_iter().enumerate() {
            if ended.get(index) == Some(&true) {
                thread.join();
            } else {
                // it never enters the guest again, and has what it may still touch
                let what = format!("{}; its thread is left behind", self.shared.stuck(index, "end"));
                self.shared.observer.event(&Event::Warning(what));
            }
        }
    }
}

/// Notes that a vCPU's thread has let go of it, also when it panics: nobody waits for it any more, and the VM has ended.
struct Ending<'a> {
    index: usize,
    shared: &'a Shared,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let Self { index, shared } = *self;
        // the VM goes with the last one
        drop(shared.vcpu(index).take());
        let mut control = shared.lock();
        if !control.exit {
            control.end.get_or_insert_with(|| format!("the thread of vCPU {index} has died"));
        }
        shared.doing.set(index, Doing::Ended);
        // the number of a thread that has ended may become another's
        shared.threads[index].store(0, Ordering::SeqCst);
        (control.stopped[index], control.ended[index]) = (true, true);
        // whoever waits for them hears that nothing comes of them
        let never_done = std::mem::take(&mut control.jobs[index]);
        drop(control);
        drop(never_done);
        shared.changed.notify_all();
        shared.ended.notify_all();
    }
}

fn thread_main(index: usize, shared: &Shared) {
    let _ending = Ending { index, shared };
    let registered = match shared.vcpu(index).as_mut().map(|vcpu| kick::Registered::new(vcpu, shared.signal)) {
        Some(Ok(registered)) => registered,
        Some(Err(why)) => {
            shared.lock().end.get_or_insert(why);
            return;
        }
        None => return,
    };
    while let Some(mut guard) = wait_to_run(index, shared) {
        let Some(vcpu) = guard.as_mut() else { break };
        // it stood still, for whatever reason: its clock tells its watchdogs
        state::note_pause(vcpu);
        let end = run(index, vcpu, shared);
        drop(guard);
        if let Some(end) = end {
            shared.lock().end.get_or_insert(end);
            shared.changed.notify_all();
            shared.ended.notify_all();
        }
    }
    // before the vCPU goes
    drop(registered);
}

/// Does what others want done to the vCPU, until it may run; `None` when it shall end.
fn wait_to_run(index: usize, shared: &Shared) -> Option<MutexGuard<'_, Option<VcpuFd>>> {
    let mut control = shared.lock();
    control.stopped[index] = true;
    shared.doing.set(index, Doing::Stopped);
    shared.changed.notify_all();
    loop {
        if let Some(job) = control.jobs[index].pop_front() {
            drop(control);
            shared.doing.set(index, Doing::Job);
            if let Some(vcpu) = shared.vcpu(index).as_mut() {
                job(vcpu);
            }
            shared.doing.set(index, Doing::Stopped);
            control = shared.lock();
        } else if control.exit {
            return None;
        } else if control.may_run() {
            break;
        } else {
            control = shared.wait(control);
        }
    }
    control.stopped[index] = false;
    shared.stop.store(false, Ordering::SeqCst);
    drop(control);
    Some(shared.vcpu(index))
}

/// Runs the guest until somebody wants the vCPU to stop, or the VM ends for the reason returned.
fn run(index: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Option<String> {
    loop {
        // first the flag, then the look at `stop`: see the top of the file
        vcpu.set_kvm_immediate_exit(0);
        // the other party is a signal handler of this same thread: only the compiler could swap the two
        compiler_fence(Ordering::SeqCst);
        if shared.stop.load(Ordering::SeqCst) {
            return complete_io(index, vcpu, shared);
        }
        if let Err(end) = step(index, vcpu, shared) {
            return Some(end);
        }
    }
}

/// An exit that was handled here is complete only when KVM was entered once more: at a port read, for example, it then
/// puts the value into the register.
fn complete_io(index: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Option<String> {
    let mut end = None;
    shared.doing.set(index, Doing::Completing);
    let completed = state::complete_io(vcpu, |exit| match handle(index, exit, shared) {
        Ok(()) => true,
        Err(why) => {
            end = Some(why);
            false
        }
    });
    let why = end.or_else(|| completed.err().map(|e| e.to_string()))?;
    Some(format!("{why} on vCPU {index}{}", place(vcpu)))
}

/// Enters the guest once, and handles the exit. An error ends the VM.
fn step(index: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Result<(), String> {
    shared.doing.set(index, Doing::Guest);
    let why = match vcpu.run() {
        Ok(exit) => match handle(index, exit, shared) {
            Ok(()) => return Ok(()),
            Err(why) => why,
        },
        // a kick, or an application processor that was started by its INIT
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
        Err(e) => format!("KVM_RUN: {e}"),
    };
    Err(format!("{why} on vCPU {index}{}", place(vcpu)))
}

fn handle(index: usize, exit: VcpuExit<'_>, shared: &Shared) -> Result<(), String> {
    shared.doing.set(
        index,
        match exit {
            VcpuExit::IoOut(port, _) => Doing::Write(port),
            VcpuExit::IoIn(port, _) => Doing::Read(port),
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => Doing::RingFull,
            _ => Doing::Exit,
        },
    );
    match exit {
        VcpuExit::IoOut(port, data) => shared.io.port_write(port, data),
        VcpuExit::IoIn(port, data) => shared.io.port_read(port, data),
        VcpuExit::MmioRead(gpa, data) => shared.io.mmio_read(gpa, data),
        VcpuExit::MmioWrite(gpa, data) => shared.io.mmio_write(gpa, data),
        VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr => {}
        VcpuExit::Shutdown => return Err("triple fault".into()),
        VcpuExit::SystemEvent(kind, _) => return Err(format!("system event {kind}")),
        VcpuExit::FailEntry(reason, _) => return Err(format!("cannot enter the guest: hardware reason {reason:#x}")),
        VcpuExit::InternalError => return Err("KVM internal error".into()),
        VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
            if let Some(Err(why)) = shared.ring_full.as_ref().map(|collect| collect()) {
                return Err(format!("the dirty ring is full and cannot be emptied: {why}"));
            }
        }
        other => return shared.io.other(index, &other),
    }
    Ok(())
}

const KVM_EXIT_DIRTY_RING_FULL: u32 = 31;

fn place(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map_or_else(|_| String::new(), |regs| format!(" at rip {:#x}", regs.rip))
}

/// Lets the vCPUs rest for their share of every period, until the throttle is lifted.
///
/// On a busy host this thread wakes up late, and the vCPUs have run for longer than they should: what they ran, not what
/// they were to run, decides how long they rest. No rest is longer than [`LONGEST_REST`]; what is left of it is owed.
fn throttle_main(shared: &Shared, kick_all: impl Fn() -> bool) {
    let mut control = shared.lock();
    let mut owed = Duration::ZERO;
    loop {
        let share = f64::from(control.throttle) / 100.0;
        if share == 0.0 || control.exit {
            control.rest = false;
            shared.changed.notify_all();
            return;
        }
        // a paused guest rests anyway
        control.rest = false;
        shared.changed.notify_all();
        let ran;
        (control, ran) = sleep(shared, control, THROTTLE_PERIOD.mul_f64(1.0 - share));
        // the throttle is at most 99
        owed = (owed + ran.mul_f64(share / (1.0 - share))).min(MOST_OWED);
        control.rest = true;
        drop(control);
        if !kick_all() {
            return;
        }
        let rested;
        (control, rested) = sleep(shared, shared.lock(), owed.min(LONGEST_REST));
        owed = owed.saturating_sub(rested);
    }
}

/// Waits for so long, or until the throttle changes; and how long it was.
fn sleep<'a>(
    shared: &'a Shared,
    mut control: MutexGuard<'a, Control>,
    time: Duration,
) -> (MutexGuard<'a, Control>, Duration) {
    let (throttle, began) = (control.throttle, Instant::now());
    while control.throttle == throttle && !control.exit {
        let left = time.saturating_sub(began.elapsed());
        if left.is_zero() {
            break;
        }
        control = shared.changed.wait_timeout(control, left).unwrap_or_else(|e| e.into_inner()).0;
    }
    (control, began.elapsed())
}
