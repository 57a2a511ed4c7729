//! vCPU threads: run, stop and throttle vCPUs, and work on stopped ones.
//!
//! A VMM with a run loop of its own needs none of this. Other VMMs pass their vCPUs to [`Vcpus`],
//! with an [`IoHandler`] for the ports and addresses of their devices, and a [`KickSignal`].
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
//! # How a vCPU is stopped
//! A vCPU may run if the VMM wants it (`run`), no hold and no throttle stops it, and the VM has not
//! ended. To change one of these, a thread takes the lock, changes it, sets `stop`, and kicks.
//!
//! A kick is never lost. Its handler sets `immediate_exit`. The vCPU thread clears that flag
//! *before* it reads `stop` for the last time before `KVM_RUN`. So there are two cases:
//! 1. The signal comes before the flag is cleared. Then the thread finds `stop` set.
//! 2. The signal comes later. Then it leaves the flag set, or interrupts `KVM_RUN` itself.
//!
//! `stop` is cleared only under the lock and only while vCPUs may run. So a thread that wakes up
//! late from an earlier stop does not clear the `stop` of a pause.
//!
//! Every wait for a vCPU ends after [`MAX_WAIT`] with an error that names the vCPU and its
//! activity. Until then a vCPU that should stop is kicked again and again. A vCPU that is late
//! stops, or does its work, as soon as it can; [`Vcpus::run`] cancels the stop.

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
    text::describe,
};

mod doing;
#[allow(unsafe_code)]
mod kick;

use doing::{Activities, KICK_AGAIN};
pub use doing::{Doing, MAX_WAIT, VcpuError};
pub use kick::KickSignal;

use crate::{state, tracker::GuestSlots};

/// The period in which a throttled guest runs and rests once. It is short, so that users do not
/// notice single rests.
const THROTTLE_PERIOD: Duration = Duration::from_millis(5);
/// The longest single rest, even for a guest that ran for too long before.
const LONGEST_REST: Duration = Duration::from_millis(9);
/// The largest rest that is carried over to later periods. A host that was busy for a while should
/// not slow the guest down for long afterwards.
const MAX_CARRIED_REST: Duration = Duration::from_millis(100);

/// The interval at which another thread tries to get a vCPU that its own thread has not released
/// yet.
const RETRY_INTERVAL: Duration = Duration::from_micros(100);

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

struct Control {
    /// Whether the VMM or a migration lets the vCPUs run.
    run: bool,
    /// Whether the vCPUs are held because pages that they need cannot arrive.
    held: bool,
    /// Whether the throttle makes the vCPUs rest at the moment.
    rest: bool,
    throttle: u8,
    exit: bool,
    /// The reason why the VM has ended.
    end: Option<String>,
    jobs: Vec<VecDeque<Job>>,
    /// For each thread, whether it is outside the run loop.
    stopped: Vec<bool>,
    /// For each thread, whether it has released its vCPU for ever.
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
    /// Signals the end of the VM or of this object only. Threads that wait for that are not woken
    /// by other changes.
    ended: Condvar,
    /// Each vCPU is locked by its thread while it runs, and by any thread that works on it. `None`
    /// after the thread has ended.
    vcpus: Vec<Mutex<Option<VcpuFd>>>,
    /// Checked before every entry into the guest.
    stop: AtomicBool,
    doing: Activities,
    /// The operating system's ids of the threads; 0 before a thread has begun and after it has
    /// ended.
    threads: Vec<AtomicU32>,
    signal: KickSignal,
    io: Arc<dyn IoHandler>,
    /// Called if a dirty ring is full.
    ring_full: Option<RingFull>,
    spawner: Arc<dyn Spawner>,
    observer: Arc<dyn Observer>,
    /// The guest memory, which stays mapped for as long as a vCPU exists, even one whose thread
    /// does not end.
    _memory: Arc<GuestSlots>,
}

/// A function that collects full dirty rings. An error ends the VM.
pub type RingFull = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The devices behind ports and addresses. The methods are called on the vCPUs' threads, by several
/// at once. A pause waits for every call.
pub trait IoHandler: Send + Sync {
    /// Handles the guest's write of `data` to a port.
    fn port_write(&self, port: u16, data: &[u8]);

    /// Handles the guest's read of a port. Bytes of `data` that are not written read as zeros. (On
    /// a PC, a port without a device reads as ones.)
    fn port_read(&self, port: u16, data: &mut [u8]);

    /// Handles the guest's write of `data` to an address outside RAM. The default ignores it.
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let _ = (gpa, data);
    }

    /// Handles the guest's read of an address outside RAM. The default returns all ones.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let _ = gpa;
        data.fill(0xff);
    }

    /// Handles any other exit, except those for which KVM's documentation allows only one response.
    ///
    /// # Errors
    /// An error ends the VM for this reason. The default always fails.
    fn other(&self, vcpu: usize, exit: &VcpuExit<'_>) -> Result<(), String> {
        let _ = vcpu;
        Err(format!("unexpected exit {exit:?}"))
    }
}

/// The environment of the vCPUs.
pub struct VcpuHost {
    /// The guest memory as KVM has it. It stays mapped for as long as a vCPU exists.
    pub memory: Arc<GuestSlots>,
    /// The devices.
    pub io: Arc<dyn IoHandler>,
    /// The function that collects full dirty rings, if there are any.
    pub ring_full: Option<RingFull>,
    /// The signal that stops vCPUs.
    pub signal: KickSignal,
    /// Starts the threads, with [`Role::Vcpu`].
    pub spawner: Arc<dyn Spawner>,
    /// Receives a warning about a thread that does not end.
    pub observer: Arc<dyn Observer>,
}

/// All vCPUs of a VM, each with a thread of its own.
pub struct Vcpus {
    shared: Arc<Shared>,
    /// The threads that could be started.
    threads: Mutex<Vec<Box<dyn Joiner>>>,
    throttler: Mutex<Option<Box<dyn Joiner>>>,
    /// The id of the throttler's thread.
    throttles: Arc<Mutex<Option<ThreadId>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        // a panic cannot leave the fields inconsistent: each change is one assignment
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

    /// Returns a stopped vCPU for use by another thread than its own.
    fn stopped_vcpu(&self, index: usize) -> Result<MutexGuard<'_, Option<VcpuFd>>, VcpuError> {
        let began = Instant::now();
        loop {
            match self.vcpus[index].try_lock() {
                Ok(vcpu) => return Ok(vcpu),
                // as in `vcpu`
                Err(TryLockError::Poisoned(e)) => return Ok(e.into_inner()),
                Err(TryLockError::WouldBlock) if began.elapsed() < MAX_WAIT => thread::sleep(RETRY_INTERVAL),
                Err(TryLockError::WouldBlock) => return Err(self.stuck(index, "stop")),
            }
        }
    }

    fn vcpu(&self, index: usize) -> MutexGuard<'_, Option<VcpuFd>> {
        // a panic does not matter: KVM's part is as the last ioctl left it
        self.vcpus[index].lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Vcpus {
    /// Starts a thread for each vCPU. No vCPU runs before [`run`](Self::run) is called.
    ///
    /// # Errors
    /// Fails if a thread cannot be started or does not begin, or if `vcpus` is empty.
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
            doing: Activities::new(count),
            threads: (0..count).map(|_| AtomicU32::new(0)).collect(),
            signal,
            io,
            ring_full,
            spawner: spawner.clone(),
            observer,
            _memory: memory,
        });
        // if a later thread cannot be started, dropping this ends the earlier ones
        let (throttler, throttles) = (Mutex::default(), Arc::default());
        let started = Self { shared: shared.clone(), threads: Mutex::default(), throttler, throttles };
        let (tx, begun) = mpsc::channel();
        for index in 0..count {
            let (shared, tx) = (shared.clone(), tx.clone());
            let body = move || {
                shared.threads[index].store(nix::unistd::gettid().as_raw().unsigned_abs(), Ordering::SeqCst);
                // the receiver waits below
                let _ = tx.send(());
                thread_main(index, &shared);
            };
            let name = format!("vcpu-{index}");
            let thread = spawner.spawn(Role::Vcpu, GuestImpact::default(), &name, Box::new(body))?;
            started.threads.lock().unwrap_or_else(|e| e.into_inner()).push(thread);
        }
        for _ in 0..count {
            begun.recv_timeout(MAX_WAIT).map_err(|_| io::Error::other("a vCPU's thread does not begin"))?;
        }
        Ok(started)
    }

    /// Returns the operating system's thread ids in the order of the vCPUs; 0 for a thread that has
    /// ended.
    pub fn thread_ids(&self) -> Vec<u32> {
        self.shared.threads.iter().map(|id| id.load(Ordering::SeqCst)).collect()
    }

    /// Lets the vCPUs run.
    pub fn run(&self) {
        let mut control = self.shared.lock();
        control.run = true;
        self.shared.stop.store(!control.may_run(), Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// Holds the vCPUs, or ends the hold. A hold is independent of [`pause`](Self::pause) and of
    /// the throttle. The call does not wait, and kicks each vCPU once, which is enough because no
    /// kick is lost.
    pub fn hold(&self, held: bool) {
        let mut control = self.shared.lock();
        control.held = held;
        self.shared.stop.store(!control.may_run(), Ordering::SeqCst);
        if held {
            self.kick_all();
        }
        self.shared.changed.notify_all();
    }

    /// Stops the vCPUs. Returns when none of them is in the guest any more.
    ///
    /// # Errors
    /// Fails if a vCPU does not stop in time. It stops as soon as it can. All others stay stopped
    /// until [`run`](Self::run) is called.
    pub fn pause(&self) -> Result<(), VcpuError> {
        let mut control = self.shared.lock();
        control.run = false;
        self.kick_all();
        let (began, mut kicked) = (Instant::now(), Instant::now());
        while let Some(late) = control.stopped.iter().position(|&stopped| !stopped) {
            if began.elapsed() >= MAX_WAIT {
                return Err(self.shared.stuck(late, "stop"));
            }
            control = self.shared.wait_for(control, KICK_AGAIN);
            if kicked.elapsed() >= KICK_AGAIN {
                kicked = Instant::now();
                self.kick_others(&control.stopped);
            }
        }
        Ok(())
    }

    /// Does `work` on all vCPUs at the same time. Returns the results in the order of the vCPUs,
    /// which should be stopped: a running vCPU does the work when it stops. The work on the first
    /// vCPU is done by the calling thread, because waking another thread for it, and being woken
    /// again, would cost about as much as the work.
    ///
    /// # Errors
    /// Fails if the threads have ended, or if a vCPU does not begin the work in time. That vCPU
    /// then never does it.
    pub fn on_each<T: Send + 'static>(
        &self,
        work: impl Fn(usize, &mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, VcpuError> {
        self.on_vcpus_below(usize::MAX, work)
    }

    /// Does `work` on the first vCPU, like [`on_each`](Self::on_each).
    ///
    /// # Errors
    /// Fails like [`on_each`](Self::on_each).
    pub fn on_first<T: Send + 'static>(
        &self,
        work: impl Fn(&mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<T, VcpuError> {
        self.on_vcpus_below(1, move |_, vcpu| work(vcpu))?.pop().ok_or(VcpuError::Ended)
    }

    fn on_vcpus_below<T: Send + 'static>(
        &self,
        end: usize,
        work: impl Fn(usize, &mut VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, VcpuError> {
        let work = Arc::new(work);
        // once this is set, no thread begins the work any more
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
                        // the receiver waits below, or has given up
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
        // no thread ends while it still has work: see `thread_main`
        let others = results.into_iter().map(|(index, rx)| {
            rx.recv_timeout(MAX_WAIT.saturating_sub(began.elapsed())).map_err(|why| match why {
                mpsc::RecvTimeoutError::Timeout => self.shared.stuck(index, "begin the work on its state"),
                mpsc::RecvTimeoutError::Disconnected => VcpuError::Ended,
            })
        });
        let results = iter::once(first).chain(others).collect::<Result<Vec<_>, _>>();
        if results.is_err() {
            given_up.store(true, Ordering::SeqCst);
        }
        results
    }

    /// Lets the vCPUs run `100 - percent` percent of the time. 0 ends the throttle.
    ///
    /// # Errors
    /// Fails if the throttle's thread cannot be started.
    pub fn throttle(self: &Arc<Self>, percent: u8) -> io::Result<()> {
        self.shared.lock().throttle = percent.min(99);
        self.shared.changed.notify_all();
        let mut throttler = self.throttler.lock().unwrap_or_else(|e| e.into_inner());
        if percent == 0 {
            let thread = throttler.take();
            drop(throttler);
            // the thread ends by itself at once
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

    /// Returns the reason why the VM has ended, or `None` if it has not.
    pub fn end(&self) -> Option<String> {
        self.shared.lock().end.clone()
    }

    /// Returns a function that waits until the VM has ended by itself or this object is shut down.
    /// The function returns the reason if the VM has ended, and stops its other vCPUs.
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

    /// Kicks the threads that are not marked in `done`.
    fn kick_others(&self, done: &[bool]) {
        let late = self.shared.threads.iter().zip(done).filter(|(_, done)| !**done);
        late.for_each(|(thread, _)| self.kick(thread));
    }

    fn kick(&self, thread: &AtomicU32) {
        match thread.load(Ordering::SeqCst) {
            // the thread has not begun or has ended, so it is not in the guest
            0 => {}
            id => self.shared.signal.kick(id),
        }
    }

    /// Waits until all threads have released their vCPUs. Returns for each whether it has.
    fn wait_ended(&self) -> Vec<bool> {
        let (began, mut kicked) = (Instant::now(), Instant::now());
        let mut control = self.shared.lock();
        // if a thread could not be started, later ones do not exist
        let threads = self.threads.lock().unwrap_or_else(|e| e.into_inner()).len();
        while control.ended.iter().take(threads).any(|ended| !ended) && began.elapsed() < MAX_WAIT {
            control = self.shared.wait_for(control, KICK_AGAIN);
            if kicked.elapsed() >= KICK_AGAIN {
                kicked = Instant::now();
                self.kick_others(&control.ended);
            }
        }
        control.ended.clone()
    }

    /// Ends all threads, and thereby the vCPUs.
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
            // the throttler's thread itself may drop the last reference
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
                // the thread never enters the guest again, and the memory that it may still access
                // stays mapped
                let what = format!("{}; its thread is abandoned", self.shared.stuck(index, "end"));
                self.shared.observer.event(&Event::Warning(what));
            }
        }
    }
}

/// Records that a vCPU's thread has released it, also after a panic. Nobody waits for the thread
/// any more, and the VM has ended.
struct Ending<'a> {
    index: usize,
    shared: &'a Shared,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let Self { index, shared } = *self;
        // the last vCPU closes the VM
        drop(shared.vcpu(index).take());
        let mut control = shared.lock();
        if !control.exit {
            control.end.get_or_insert_with(|| format!("the thread of vCPU {index} has died"));
        }
        shared.doing.set(index, Doing::Ended);
        // the id of an ended thread may be used for another one
        shared.threads[index].store(0, Ordering::SeqCst);
        (control.stopped[index], control.ended[index]) = (true, true);
        // dropping the jobs informs the threads that wait for them
        let dropped = std::mem::take(&mut control.jobs[index]);
        drop(control);
        drop(dropped);
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
        // the vCPU was stopped for some time: the guest's clock informs its watchdogs
        state::note_pause(vcpu);
        let end = run(index, vcpu, shared);
        drop(guard);
        if let Some(end) = end {
            shared.lock().end.get_or_insert(end);
            shared.changed.notify_all();
            shared.ended.notify_all();
        }
    }
    // before the vCPU is closed
    drop(registered);
}

/// Does the jobs of other threads until the vCPU may run, and returns the vCPU. Returns `None` if
/// the thread should end.
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

/// Runs the guest until the vCPU should stop. Returns the reason if the VM has ended.
fn run(index: usize, vcpu: &mut VcpuFd, shared: &Shared) -> Option<String> {
    loop {
        // clear the flag first, then read `stop`: see the documentation of the module
        vcpu.set_kvm_immediate_exit(0);
        // the signal handler runs on this same thread, so only the compiler could reorder the two
        compiler_fence(Ordering::SeqCst);
        if shared.stop.load(Ordering::SeqCst) {
            return complete_io(index, vcpu, shared);
        }
        if let Err(end) = step(index, vcpu, shared) {
            return Some(end);
        }
    }
}

/// Completes the last exit by entering KVM once more. For a port read, for example, KVM then puts
/// the value into the register. Returns the reason if the VM has ended.
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
    let why = end.or_else(|| completed.err().map(describe))?;
    Some(format!("{why} on vCPU {index}{}", place(vcpu)))
}

/// Enters the guest once and handles the exit. An error ends the VM.
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

/// Lets the vCPUs rest for their share of every period until the throttle ends.
///
/// On a busy host this thread wakes up late, and the vCPUs run for longer than planned. So the
/// length of a rest depends on the time that they really ran. No rest is longer than
/// [`LONGEST_REST`]; the rest of it is carried over.
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
        // no division by zero, because the throttle is at most 99
        owed = (owed + ran.mul_f64(share / (1.0 - share))).min(MAX_CARRIED_REST);
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

/// Waits for `time`, or until the throttle changes. Returns how long it waited.
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
