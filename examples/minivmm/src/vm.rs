//! A VM in this process, for programs that try out a way to migrate.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use guests::{Board, WorkloadError, layout};
use migration_core::{
    GuestRam, MigrationError,
    channel::Listener,
    engine::{
        self, Commands, Controller, ReceiveError, Receiver, ReceiverHandle, ReceiverOptions, RestoreOptions,
        SnapshotOptions, SnapshotReport, SourceOptions,
    },
    report::{Outcome, Report},
    store::{Owner, PageStore},
    strategy::Strategy,
    working_set::ResidentLimit,
};
use migration_crypto::{SecureListener, Security, SourceSession};
use migration_kvm::{
    fence::ProcessFence, ram::Backing, spawner::LinuxSpawner, swapper::PagingStatus, tracker::TrackerKind,
};
use migration_transport::{Address, AddressError, ConnectOptions, SnapshotFile, bind, connector};
use minivmm_client::encryption::secured;
use thiserror::Error;

use crate::vmm::{
    self, ColdPages, Host, HostOptions, Machine, MachineConfig, MachineError, MachineSource, SerialTarget,
};

/// How often a guest's board is looked at while it is waited for.
const LOOK: Duration = Duration::from_millis(2);
/// How long a guest may take until it has done what it was asked for: far longer than it does, also
/// on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Who answers for what a VM of this kind puts into page stores.
const A_PROGRAM: Owner = match Owner::new("a program with a VM") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};

/// What a new VM is made of.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs, 1 to 16.
    pub cpus: u32,
    /// How RAM is backed. A [hand-over](migration_core::strategy::HandOver) needs memory that
    /// processes can share.
    pub backing: Backing,
    /// How dirty pages are found.
    pub tracker: TrackerKind,
    /// What it runs; `None` for nothing.
    pub guest: Option<Guest>,
    /// Where its serial port writes to.
    pub serial: SerialTarget,
}

impl Default for VmOptions {
    /// One vCPU, 256 MiB of RAM, and no guest.
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            cpus: 1,
            backing: Backing::TransparentHuge,
            tracker: TrackerKind::default(),
            guest: None,
            serial: SerialTarget::Null,
        }
    }
}

impl VmOptions {
    /// Returns the options of a VM that runs a built-in workload, `NAME[:key=value,…]` (see
    /// [`guests::listing`]).
    pub fn workload(spec: &str) -> Self {
        Self { guest: Some(Guest::Workload(spec.into())), ..Self::default() }
    }
}

/// What a VM runs.
#[derive(Clone, Debug)]
pub enum Guest {
    /// A built-in workload.
    Workload(String),
    /// An ELF64 with a PVH entry note.
    Kernel {
        /// The file.
        file: PathBuf,
        /// The kernel's command line.
        cmdline: String,
    },
}

/// Why a VM cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The workload is wrong.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The workload cannot run on these vCPUs, whatever memory there is.
    #[error("{spec}")]
    NeverEnough {
        /// The workload.
        spec: String,
        /// Why.
        source: WorkloadError,
    },
    /// The guest needs more memory.
    #[error("--memory of {memory} bytes is too little: {guest} needs at least {mib} MiB (--memory {mib}M)")]
    Memory {
        /// Bytes that the VM has.
        memory: u64,
        /// What does not fit.
        guest: String,
        /// MiB that it needs.
        mib: u64,
    },
    /// The host does not give what the VM needs, or the kernel cannot be loaded.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Why a VM has not moved. The report says what the migration has done until then.
#[derive(Debug, Error)]
#[error("the migration is {}: {}", report.outcome.as_str(), report.reason.as_deref().unwrap_or("no reason is known"))]
pub struct NotMoved {
    /// Its outcome says who has the VM now: unless it is *lost*, *ended* or *in doubt*, that is
    /// still this process, where the guest runs on.
    pub report: Box<Report>,
}

/// Why a destination cannot listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Not at this address.
    #[error(transparent)]
    Bind(#[from] std::io::Error),
    /// A listener names its address in a form that nobody can connect to.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// Why a guest has not done what it was asked for.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The guest is no built-in workload, or has not started.
    #[error("the guest is no built-in workload, or has not started")]
    NoBoard,
    /// It does not do it in time.
    #[error("the guest does not {wanted} within {PATIENCE:?}: {board:?}")]
    Late {
        /// What it was to do.
        wanted: &'static str,
        /// What it shows instead.
        board: Box<Board>,
    },
    /// It has ended by itself.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// Its cold pages go to no page store.
    #[error("cold pages of the guest go to no page store")]
    NotPaged,
    /// No thread reads its cold pages back. They come when they are touched.
    #[error("a thread that reads cold pages back")]
    NotBack(#[source] std::io::Error),
    /// Its pages do not go to the page stores in time.
    #[error("too few pages are in page stores after {PATIENCE:?}: {0:?}")]
    Warm(Box<PagingStatus>),
}

/// How a VM is migrated.
#[derive(Clone, Default)]
pub struct MigrateOptions {
    /// The engine's options.
    pub source: SourceOptions,
    /// What encrypts the channels; the destination has the same.
    pub security: Option<Security>,
    /// Whether the strategy is told which pages the guest reads, where the kernel can tell.
    pub references: bool,
}

/// A VM in this process. The guest ends when this is dropped.
///
/// On a host without KVM it is a software guest: threads that write the same pages at the same
/// rate, and execute no code.
pub struct Vm {
    pub(crate) machine: Arc<Machine>,
    /// The epoch of the last migration or snapshot that it comes from, or that has failed.
    epoch: AtomicU32,
}

impl Vm {
    /// Builds a VM and loads its guest, which does not run yet.
    ///
    /// # Errors
    /// When the workload is wrong, the memory too little, or the host lacks something.
    pub fn build(options: &VmOptions) -> Result<Self, BuildError> {
        let VmOptions { memory, cpus, backing, tracker, ref guest, ref serial } = *options;
        match guest {
            Some(Guest::Workload(spec)) => {
                guests::check_spec(spec)?;
                let least = guests::least_memory(spec, cpus);
                let least = least.map_err(|source| BuildError::NeverEnough { spec: spec.clone(), source })?;
                enough(memory, least, || format!("the workload {spec} on {cpus} vCPUs"))?;
            }
            Some(Guest::Kernel { file, .. }) => {
                let least = vmm::least_memory(file).map_err(MachineError::from)?;
                enough(memory, least, || file.display().to_string())?;
            }
            None => {}
        }
        let machine = Machine::new(MachineConfig::new(memory, cpus, backing, tracker), serial)?;
        match guest {
            Some(Guest::Workload(spec)) => machine.boot_workload(spec)?,
            Some(Guest::Kernel { file, cmdline }) => machine.boot_file(file, cmdline)?,
            None => {}
        }
        Ok(Self { machine: Arc::new(machine), epoch: AtomicU32::new(0) })
    }

    /// Builds a VM and runs it.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn start(options: &VmOptions) -> Result<Self, BuildError> {
        let vm = Self::build(options)?;
        vm.machine.start(true)?;
        Ok(vm)
    }

    /// Puts cold pages of the guest into page stores from now on, so that no more than `limit` stays
    /// in RAM. Each of the stores gets every page. The guest may run. Can be called once.
    ///
    /// # Errors
    /// When pages of this VM cannot be evicted, or a store does not take them.
    pub fn keep_cold_pages(&self, stores: Vec<Arc<dyn PageStore>>, limit: ResidentLimit) -> Result<(), MachineError> {
        self.machine.page_out(ColdPages { stores, owner: A_PROGRAM, limit })
    }

    /// Returns how much of the VM's memory is in RAM and in page stores; `None` unless cold pages go
    /// there.
    pub fn paging(&self) -> Option<PagingStatus> {
        self.machine.paging()
    }

    /// Changes the limit of what stays in RAM. Without one, all pages are read back in the background.
    ///
    /// # Errors
    /// When cold pages go to no page store.
    pub fn set_resident_limit(&self, limit: ResidentLimit) -> Result<(), GuestError> {
        self.machine.set_resident_limit(limit)
    }

    /// Removes the cold pages from their stores, because the VM is not needed any more. Never called
    /// when it was migrated: its destination reads them there.
    pub fn forget_cold_pages(&self) {
        self.machine.forget_cold_pages();
    }

    /// Waits until so many bytes are in page stores.
    ///
    /// # Errors
    /// When they do not get there.
    pub fn wait_cold(&self, bytes: u64) -> Result<PagingStatus, GuestError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.paging().ok_or(GuestError::NotPaged)?;
            if status.cold_bytes >= bytes {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(GuestError::Warm(Box::new(status)));
            }
            thread::sleep(LOOK);
        }
    }

    /// Moves the VM to the destination that listens at `to`. Returns when the destination has
    /// everything.
    ///
    /// # Errors
    /// When it has not moved: see [`NotMoved`].
    pub fn migrate(&self, to: &Address, strategy: &mut dyn Strategy) -> Result<Report, NotMoved> {
        self.migrate_with(to, strategy, &MigrateOptions::default())
    }

    /// As [`migrate`](Self::migrate), with options.
    ///
    /// # Errors
    /// As [`migrate`](Self::migrate).
    pub fn migrate_with(
        &self,
        to: &Address,
        strategy: &mut dyn Strategy,
        options: &MigrateOptions,
    ) -> Result<Report, NotMoved> {
        let link = connector(to, ConnectOptions::default());
        let session = options.security.clone().map(SourceSession::new);
        let link = secured(session.as_ref(), link);
        let mut source = MachineSource::new(self.machine.clone());
        if options.references {
            source.note_references();
        }
        let options = self.source_options(&options.source);
        let (_controller, commands) = Controller::new();
        self.moved(engine::migrate(&mut source, &*link, strategy, &options, commands))
    }

    /// Protects the VM in the page stores of `options`, until the controller of `commands` evicts it
    /// or ends that: see [`stage`](engine::stage). Returns when the destination has everything.
    ///
    /// # Errors
    /// When it has not moved: see [`NotMoved`].
    pub fn protect(
        &self,
        strategy: &mut dyn Strategy,
        options: &SourceOptions,
        commands: Commands,
    ) -> Result<Report, NotMoved> {
        let mut source = MachineSource::new(self.machine.clone());
        self.moved(engine::stage(&mut source, strategy, &self.source_options(options), commands))
    }

    fn source_options(&self, options: &SourceOptions) -> SourceOptions {
        let last_epoch = options.last_epoch.max(self.epoch.load(Ordering::Relaxed));
        SourceOptions { spawner: Arc::new(LinuxSpawner::default()), last_epoch, ..options.clone() }
    }

    fn moved(&self, report: Report) -> Result<Report, NotMoved> {
        self.epoch.store(report.epoch, Ordering::Relaxed);
        match report.outcome {
            Outcome::Completed => Ok(report),
            _ => Err(NotMoved { report: Box::new(report) }),
        }
    }

    /// Writes the VM as it is at one moment to a file, while it runs on.
    ///
    /// # Errors
    /// When the file cannot be written, or the VM cannot be saved; it runs on.
    pub fn snapshot(&self, file: &Path) -> Result<SnapshotReport, MigrationError> {
        let store = SnapshotFile::create(file, self.machine.pages());
        let mut store = store.map_err(|cause| MigrationError::Store { step: "making the snapshot's file", cause })?;
        let (_controller, commands) = Controller::new();
        let mut source = MachineSource::new(self.machine.clone());
        let options = SnapshotOptions { epoch: self.epoch.load(Ordering::Relaxed), ..SnapshotOptions::default() };
        engine::snapshot(&mut source, &mut store, &options, commands)
    }

    /// Builds the VM of a snapshot. Its guest runs on from there. See to it that no other instance
    /// of it runs.
    ///
    /// # Errors
    /// When the file cannot be read, or the VM cannot be built here.
    pub fn restore(file: &Path) -> Result<Self, MigrationError> {
        let options = RestoreOptions::default();
        let store = SnapshotFile::open(file, options.max_ram_bytes / layout::PAGE_SIZE);
        let mut store = store.map_err(|cause| MigrationError::Store { step: "opening the snapshot", cause })?;
        let restored = engine::restore(&mut store, &host(), &options)?;
        Ok(Self { machine: restored.vm.0, epoch: AtomicU32::new(restored.report.epoch) })
    }

    /// Returns what a built-in workload shows of itself; `None` of another guest, of one that has
    /// not started, and while the page with it is missing.
    pub fn board(&self) -> Option<Board> {
        self.machine.snapshot().workload
    }

    /// Waits until a built-in workload has filled its pages and works, and returns what it shows
    /// then.
    ///
    /// # Errors
    /// When it does not get to work.
    pub fn wait_at_work(&self) -> Result<Board, GuestError> {
        self.wait_until("get to work", |board| board.state == guests::State::Running && board.operations > 0)
    }

    /// Waits until a built-in workload has worked on, after what it shows now, and returns what it
    /// shows then.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_works_on(&self) -> Result<Board, GuestError> {
        let before = self.board().map_or(0, |board| board.operations);
        self.wait_until("work on", |board| board.operations > before)
    }

    /// Lets a built-in workload check all its pages, and returns how many it has found wrong in its
    /// life. Not for a VM whose migration is under way.
    ///
    /// # Errors
    /// When it does not do it.
    pub fn verify(&self) -> Result<u64, GuestError> {
        let next = self.wait_until("start", |_| true)?.verify_done + 1;
        let ram = self.machine.ram();
        let word = layout::BOARD_ADDRESS + layout::board::VERIFY as u64;
        ram.write(word, &next.to_le_bytes()).map_err(|_| GuestError::NoBoard)?;
        Ok(self.wait_until("verify its pages", |board| board.verify_done == next)?.errors)
    }

    fn wait_until(&self, wanted: &'static str, done: impl Fn(&Board) -> bool) -> Result<Board, GuestError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let board = self.board();
            if let Some(board) = board.filter(&done) {
                return Ok(board);
            }
            if let Some(why) = self.machine.end() {
                return Err(GuestError::Ended(why));
            }
            if Instant::now() >= deadline {
                let late = |board| GuestError::Late { wanted, board: Box::new(board) };
                return Err(board.map_or(GuestError::NoBoard, late));
            }
            thread::sleep(LOOK);
        }
    }
}

fn enough(memory: u64, least: u64, guest: impl FnOnce() -> String) -> Result<(), BuildError> {
    if memory >= least {
        return Ok(());
    }
    Err(BuildError::Memory { memory, guest: guest(), mib: least.div_ceil(1 << 20) })
}

/// Builds VMs that arrive as they were at their source.
fn host() -> Host {
    Host::new(HostOptions {
        serial: SerialTarget::Null,
        backing: None,
        tracker: None,
        pause_on_loss: false,
        shared_ram: false,
        cold: false,
    })
}

/// Waits for a VM to arrive.
pub struct Destination {
    address: Address,
    handle: ReceiverHandle,
    arrived: mpsc::Receiver<Vm>,
    receives: JoinHandle<Result<(), ReceiveError>>,
}

impl Destination {
    /// Listens at an address; port 0 takes any that is free.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn listen(at: &Address) -> Result<Self, ListenError> {
        Self::listen_with(at, None, ReceiverOptions::default())
    }

    /// As [`listen`](Self::listen), with options and encryption.
    ///
    /// # Errors
    /// As [`listen`](Self::listen).
    pub fn listen_with(
        at: &Address,
        security: Option<Security>,
        options: ReceiverOptions,
    ) -> Result<Self, ListenError> {
        let mut listener: Box<dyn Listener> = bind(at)?;
        let address = listener.address().parse()?;
        if let Some(security) = security {
            listener = Box::new(SecureListener::new(listener, security));
        }
        let (tx, arrived) = mpsc::channel();
        let options =
            ReceiverOptions { spawner: Arc::new(LinuxSpawner::default()), fence: Arc::new(ProcessFence), ..options };
        let receiver = Receiver::new(
            host(),
            move |arrived| {
                let vm = Vm { machine: arrived.vm.0, epoch: AtomicU32::new(arrived.epoch) };
                // whoever waited may have gone
                drop(tx.send(vm));
            },
            options,
        );
        let handle = receiver.handle();
        let receives = thread::Builder::new().name("receive".into());
        let receives = receives.spawn(move || receiver.run(&mut *listener))?;
        Ok(Self { address, handle, arrived, receives })
    }

    /// Returns where it listens, as a source names it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns what controls it while [`wait`](Self::wait) waits.
    pub fn handle(&self) -> ReceiverHandle {
        self.handle.clone()
    }

    /// Waits until the VM runs here. In post-copy its last pages are then still to come.
    ///
    /// # Errors
    /// When none comes.
    pub fn wait(self) -> Result<Vm, ReceiveError> {
        match self.arrived.recv() {
            // its thread goes on until the last page and its source's last word are there
            Ok(vm) => Ok(vm),
            // the thread has dropped the receiver, and with it the other end
            Err(mpsc::RecvError) => match self.receives.join() {
                Ok(Ok(())) => Err(ReceiveError::Stopped),
                Ok(Err(error)) => Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            },
        }
    }
}
