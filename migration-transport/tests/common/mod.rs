//! A VM without a CPU: a thread that writes RAM on the heap and marks the pages that it writes.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    engine::{Receiver, ReceiverHandle, ReceiverOptions},
    report::{Event, Observer},
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    state::{Section, VmState},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError, VmId},
};

/// The guest. While it runs, it increments a counter in each page, in order, again and again.
pub struct Guest {
    ram: Arc<HeapRam>,
    bitmap: Arc<DirtyBitmap>,
    state: Mutex<(bool, bool)>,
    changed: Condvar,
    /// The next page to write; the guest's only register.
    pub at: AtomicU64,
    idle: AtomicBool,
    pub throttle: AtomicU32,
}

pub fn layout() -> RamLayout {
    let regions = vec![RamRegion { gpa: 0, len: 3 << 20 }, RamRegion { gpa: 16 << 20, len: 1 << 20 }];
    RamLayout::new(regions).unwrap()
}

impl Guest {
    fn new() -> Arc<Self> {
        Self::of(Arc::new(HeapRam::new(layout()).unwrap()), DirtyBitmap::new(layout()))
    }

    fn of(ram: Arc<HeapRam>, bitmap: Arc<DirtyBitmap>) -> Arc<Self> {
        let (at, throttle) = (AtomicU64::new(0), AtomicU32::new(0));
        let state = Mutex::new((false, false));
        Arc::new(Self { ram, bitmap, state, changed: Condvar::new(), at, idle: AtomicBool::new(true), throttle })
    }

    fn run(self: Arc<Self>) -> JoinHandle<()> {
        thread::spawn(move || {
            loop {
                let mut state = self.state.lock().unwrap();
                while !state.0 && !state.1 {
                    self.idle.store(true, Ordering::SeqCst);
                    self.changed.notify_all();
                    state = self.changed.wait(state).unwrap();
                }
                if state.1 {
                    return;
                }
                self.idle.store(false, Ordering::SeqCst);
                drop(state);
                for _ in 0..64 {
                    self.step();
                }
                thread::yield_now();
            }
        })
    }

    fn step(&self) {
        let layout = layout();
        let page = self.at.load(Ordering::SeqCst) % layout.pages();
        let gpa = layout.gpa_of(page).unwrap();
        let ram = &self.ram;
        let mut count = [0; 8];
        ram.read(gpa, &mut count).unwrap();
        ram.write(gpa, &(u64::from_le_bytes(count) + 1).to_le_bytes()).unwrap();
        self.bitmap.mark_page(page);
        self.at.fetch_add(1, Ordering::SeqCst);
    }

    pub fn set_running(&self, running: bool) {
        self.state.lock().unwrap().0 = running;
        self.changed.notify_all();
        if !running {
            let mut state = self.state.lock().unwrap();
            while !self.idle.load(Ordering::SeqCst) {
                state = self.changed.wait(state).unwrap();
            }
        }
    }

    pub fn is_running(&self) -> bool {
        self.state.lock().unwrap().0
    }

    /// Checks that every page was written as often as the position implies, so that there is
    /// exactly one edge.
    pub fn check(&self) {
        let (at, pages) = (self.at.load(Ordering::SeqCst), layout().pages());
        let ram = &self.ram;
        for page in 0..pages {
            let mut bytes = [0; PAGE_SIZE];
            ram.slice(PageRange::new(page, 1)).unwrap().copy_to(&mut bytes);
            let count = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            assert_eq!(count, at / pages + u64::from(page < at % pages), "page {page} at step {at}");
            let rest = if page % 3 == 0 { 0 } else { page as u8 | 1 };
            assert!(bytes[8..].iter().all(|&b| b == rest), "page {page}");
        }
    }
}

/// The VM at its source.
pub struct TestVm {
    pub guest: Arc<Guest>,
    tracker: BitmapTracker,
    thread: Option<JoinHandle<()>>,
    pub failing_saves: u32,
    /// Whether it reports all pages as free and then an error.
    pub confused: bool,
    pub released: bool,
    pub doubt: bool,
    /// The files that it gives as the memory files of its RAM.
    pub files: Vec<File>,
    /// Called when the guest has been paused.
    #[allow(dead_code, reason = "not every test looks")]
    pub on_pause: Option<Box<dyn FnMut() + Send>>,
    /// Called when the guest is about to be handed over.
    #[allow(dead_code, reason = "not every test looks")]
    pub on_doubt: Option<Box<dyn FnMut() + Send>>,
    /// Whether the user has paused it, so that it does not run at the destination either.
    pub paused_by_user: bool,
    /// The additional bytes of state that it saves in the pause.
    #[allow(dead_code, reason = "few tests need a large state")]
    pub large_state: usize,
    /// The number of pieces of device state sent in this attempt.
    pieces: u64,
}

impl TestVm {
    /// Makes a running VM. Two of three pages are not zero.
    pub fn new() -> Self {
        let guest = Guest::new();
        let ram = &guest.ram;
        for page in (0..layout().pages()).filter(|p| p % 3 != 0) {
            let fill = [page as u8 | 1; PAGE_SIZE - 8];
            ram.write(layout().gpa_of(page).unwrap() + 8, &fill).unwrap();
        }
        let tracker = BitmapTracker::new(guest.bitmap.clone());
        let thread = Some(guest.clone().run());
        guest.set_running(true);
        let (failing_saves, confused, released, doubt, files, pieces) = (0, false, false, false, Vec::new(), 0);
        let (on_pause, on_doubt, paused_by_user) = (None, None, false);
        Self {
            guest,
            tracker,
            thread,
            failing_saves,
            confused,
            released,
            doubt,
            files,
            on_pause,
            on_doubt,
            paused_by_user,
            large_state: 0,
            pieces,
        }
    }

    pub fn tracks(&self) -> bool {
        self.tracker.is_active()
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        self.guest.state.lock().unwrap().1 = true;
        self.guest.changed.notify_all();
        self.thread.take().map(JoinHandle::join);
    }
}

impl SourceVm for TestVm {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        Ok(VmDescription { id: VmId([3; 16]), layout: layout(), devices: Vec::new(), host_needs, config })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.guest.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        if self.confused {
            into.insert_range(layout().all());
            return Err(VmError::new("the balloon has burst"));
        }
        Ok(())
    }

    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        if self.files.is_empty() {
            return Err(VmError::new("its RAM is private: it would have to be a memfd"));
        }
        Ok(self.files.iter().map(AsFd::as_fd).collect())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.pieces = 0;
        Ok(())
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        self.pieces += 1;
        let data = Bytes::from(vec![self.pieces as u8; budget.min(100_000)]);
        Ok((vec![Section { name: "gpu".into(), instance: 0, version: 1, data }], 1))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.guest.set_running(false);
        if let Some(paused) = &mut self.on_pause {
            paused();
        }
        Ok(())
    }

    fn starts_running(&self) -> bool {
        !self.paused_by_user
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert!(!self.doubt, "a VM that may run elsewhere is resumed");
        self.guest.set_running(true);
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.guest.throttle.store(percent.into(), Ordering::SeqCst);
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        if self.failing_saves > 0 {
            self.failing_saves -= 1;
            return Err(VmError::new("the device is busy"));
        }
        let data = Bytes::copy_from_slice(&self.guest.at.load(Ordering::SeqCst).to_le_bytes());
        let cpu = Section { name: "cpu".into(), instance: 0, version: 1, data };
        let data = Bytes::copy_from_slice(&self.pieces.to_le_bytes());
        let gpu = Section { name: "gpu".into(), instance: 0, version: 1, data };
        let data = Bytes::from(vec![0; self.large_state]);
        let disk = Section { name: "disk".into(), instance: 0, version: 1, data };
        Ok(VmState { sections: vec![cpu, gpu, disk] })
    }

    fn owner_in_doubt(&mut self) {
        self.doubt = true;
        if let Some(doubt) = &mut self.on_doubt {
            doubt();
        }
    }

    fn released(&mut self) {
        self.released = true;
    }
}

/// The VM at its destination.
pub struct Arriving {
    pub guest: Arc<Guest>,
    fail: bool,
    /// The time that it takes to load the state.
    loading: Duration,
    pieces: u64,
}

impl DestinationVm for Arriving {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.guest.ram.clone()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.pieces += 1;
        let whole = piece.name == "gpu" && piece.data.iter().all(|&b| b == self.pieces as u8);
        if whole { Ok(()) } else { Err(VmError::new("pieces are out of order")) }
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        if self.fail {
            return Err(VmError::new("the state is refused, as asked"));
        }
        thread::sleep(self.loading);
        let gpu = state.find("gpu", 0).ok_or_else(|| VmError::new("no gpu"))?;
        if gpu.data[..] != self.pieces.to_le_bytes() {
            return Err(VmError::new("pieces are missing"));
        }
        let cpu = state.find("cpu", 0).ok_or_else(|| VmError::new("no cpu"))?;
        let at = cpu.data.first_chunk().ok_or_else(|| VmError::new("short"))?;
        self.guest.at.store(u64::from_le_bytes(*at), Ordering::SeqCst);
        Ok(())
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        // check the memory before anything writes it
        self.guest.check();
        self.guest.set_running(running);
        Ok(())
    }
}

/// Makes VMs and returns those that arrive.
pub struct TestHost {
    pub failing_loads: AtomicU32,
    /// The time that its VMs take to load their state.
    pub loading: Duration,
    pub arrived: mpsc::Sender<Arc<Guest>>,
    /// The guest whose RAM is shared within this process, in place of the files.
    pub shared: Option<Arc<Guest>>,
}

impl TestHost {
    pub fn new(failing_loads: u32) -> (Self, mpsc::Receiver<Arc<Guest>>) {
        let (tx, arrived) = mpsc::channel();
        let failing_loads = AtomicU32::new(failing_loads);
        (Self { failing_loads, loading: Duration::ZERO, arrived: tx, shared: None }, arrived)
    }

    /// Makes a receiver of its VMs.
    pub fn receiver(self, options: ReceiverOptions) -> Receiver {
        let to = self.arrived.clone();
        Receiver::new(self, move |arrived| drop(to.send(arrived.vm.guest)), options)
    }

    fn arriving(&self, guest: Arc<Guest>) -> Arriving {
        let one_less = |loads: u32| loads.checked_sub(1);
        let fail = self.failing_loads.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok();
        Arriving { guest, fail, loading: self.loading, pieces: 0 }
    }
}

impl DestinationHost for TestHost {
    type Vm = Arriving;

    fn build(&self, vm: &VmDescription) -> Result<Arriving, VmError> {
        if vm.layout != layout() {
            return Err(VmError::new("another layout"));
        }
        Ok(self.arriving(Guest::new()))
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Arriving, VmError> {
        let Some(source) = &self.shared else { return Err(VmError::new("nobody shares RAM with this host")) };
        assert_eq!(files.len(), vm.layout.regions().len());
        Ok(self.arriving(Guest::of(source.ram.clone(), source.bitmap.clone())))
    }
}

/// Counts threads, so that a test can check that all have ended.
#[derive(Default)]
#[allow(dead_code, reason = "not every test counts")]
pub struct CountingSpawner {
    pub running: Arc<AtomicU32>,
}

impl Spawner for CountingSpawner {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<Box<dyn Joiner>> {
        let running = self.running.clone();
        running.fetch_add(1, Ordering::SeqCst);
        let body = Box::new(move || {
            body();
            running.fetch_sub(1, Ordering::SeqCst);
        });
        StdSpawner.spawn(role, impact, name, body)
    }
}

/// Records events for the messages of failing tests.
#[derive(Default)]
#[allow(dead_code, reason = "not every test looks")]
pub struct Log(pub Mutex<Vec<String>>);

impl Observer for Log {
    fn event(&self, event: &Event) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

/// The time for which a destination waits for its peers, unless a test sets another one.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// A receiver on a thread of its own.
pub struct Destination {
    pub handle: ReceiverHandle,
    pub arrived: mpsc::Receiver<Arc<Guest>>,
    thread: Option<JoinHandle<()>>,
}

impl Destination {
    pub fn start(listener: Box<dyn migration_core::channel::Listener>, failing_loads: u32) -> Self {
        Self::sharing(listener, failing_loads, None)
    }

    /// Starts a destination whose host takes over this guest's RAM.
    pub fn sharing(
        listener: Box<dyn migration_core::channel::Listener>,
        failing_loads: u32,
        shared: Option<Arc<Guest>>,
    ) -> Self {
        let (mut host, arrived) = TestHost::new(failing_loads);
        host.shared = shared;
        Self::with(host, arrived, listener, IDLE_TIMEOUT)
    }

    /// Starts a destination that waits longer for its peers than any test takes.
    #[allow(dead_code, reason = "not every test waits")]
    pub fn patient(listener: Box<dyn migration_core::channel::Listener>) -> Self {
        Self::with_idle_timeout(listener, Duration::from_secs(3600))
    }

    /// Starts a destination with this idle time-out.
    #[allow(dead_code, reason = "not every test waits")]
    pub fn with_idle_timeout(listener: Box<dyn migration_core::channel::Listener>, idle_timeout: Duration) -> Self {
        let (host, arrived) = TestHost::new(0);
        Self::with(host, arrived, listener, idle_timeout)
    }

    /// Starts a destination whose VMs take this time to load their state.
    #[allow(dead_code, reason = "not every test waits")]
    pub fn loading_for(listener: Box<dyn migration_core::channel::Listener>, loading: Duration) -> Self {
        let (mut host, arrived) = TestHost::new(0);
        host.loading = loading;
        Self::with(host, arrived, listener, IDLE_TIMEOUT)
    }

    fn with(
        host: TestHost,
        arrived: mpsc::Receiver<Arc<Guest>>,
        mut listener: Box<dyn migration_core::channel::Listener>,
        idle_timeout: Duration,
    ) -> Self {
        let options = ReceiverOptions { idle_timeout, ..ReceiverOptions::default() };
        let receiver = host.receiver(options);
        let handle = receiver.handle();
        let thread = thread::spawn(move || {
            // the test that stops the receiver expects the error
            let _ = receiver.run(&mut *listener);
        });
        Self { handle, arrived, thread: Some(thread) }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.handle.stop();
        self.thread.take().map(JoinHandle::join);
    }
}
