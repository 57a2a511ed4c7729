//! A VM in this process, for programs that try out a migration technique.

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

/// The interval at which a guest's board is read while a caller waits for a change.
const LOOK: Duration = Duration::from_millis(2);
/// The longest time in which a guest must have done what was requested. Guests need far less time,
/// even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The owner that page stores record for the pages of such a VM.
const A_PROGRAM: Owner = match Owner::new("a program with a VM") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};

/// The configuration of a new VM.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// The size of RAM in bytes.
    pub memory: u64,
    /// The number of vCPUs, 1 to 16.
    pub cpus: u32,
    /// The kind of memory for RAM. A [hand-over](migration_core::strategy::HandOver) needs memory
    /// that processes can share.
    pub backing: Backing,
    /// The way in which dirty pages are found.
    pub tracker: TrackerKind,
    /// The guest, or `None` for no guest.
    pub guest: Option<Guest>,
    /// The target of the serial port's output.
    pub serial: SerialTarget,
}

impl Default for VmOptions {
    /// Returns options with one vCPU, 256 MiB of RAM, and no guest.
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

/// The guest that a VM runs.
#[derive(Clone, Debug)]
pub enum Guest {
    /// A built-in workload.
    Workload(String),
    /// An ELF64 kernel with a PVH entry note.
    Kernel {
        /// The path of the kernel.
        file: PathBuf,
        /// The kernel's command line.
        cmdline: String,
    },
}

/// The reason why a VM cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The workload's specification is invalid.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The workload cannot run on this number of vCPUs, whatever the size of RAM is.
    #[error("{spec}")]
    NeverEnough {
        /// The workload's specification.
        spec: String,
        /// The reason.
        source: WorkloadError,
    },
    /// The guest needs more memory.
    #[error("--memory of {memory} bytes is too little: {guest} needs at least {mib} MiB (--memory {mib}M)")]
    Memory {
        /// The size of the VM's RAM in bytes.
        memory: u64,
        /// The guest that does not fit.
        guest: String,
        /// The size of RAM that the guest needs, in MiB.
        mib: u64,
    },
    /// The host lacks something that the VM needs, or the kernel cannot be loaded.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The error of a migration that has not moved the VM. The report describes the migration.
#[derive(Debug, Error)]
#[error("the migration is {}: {}", report.outcome.as_str(), report.reason.as_deref().unwrap_or("no reason is known"))]
pub struct NotMoved {
    /// The report. Its outcome says which process has the VM: unless it is *lost*, *ended* or *in
    /// doubt*, this process still has the VM, and the guest continues to run here.
    pub report: Box<Report>,
}

/// The reason why a destination cannot listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The address cannot be bound.
    #[error(transparent)]
    Bind(#[from] std::io::Error),
    /// The listener's address has a form to which no source can connect.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// The reason why a guest has not done what was requested.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The guest is not a built-in workload, or has not started.
    #[error("the guest is no built-in workload, or has not started")]
    NoBoard,
    /// The guest has not done what was requested in time.
    #[error("the guest does not {wanted} within {PATIENCE:?}: {board:?}")]
    Late {
        /// What the guest was to do.
        wanted: &'static str,
        /// The board that the guest shows instead.
        board: Box<Board>,
    },
    /// The guest has ended by itself.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// The guest's cold pages go to no page store.
    #[error("cold pages of the guest go to no page store")]
    NotPaged,
    /// No thread could be started to read cold pages back. The guest still gets each page when it
    /// touches the page.
    #[error("a thread that reads cold pages back")]
    NotBack(#[source] std::io::Error),
    /// The guest's pages have not reached the page stores in time.
    #[error("too few pages are in page stores after {PATIENCE:?}: {0:?}")]
    Warm(Box<PagingStatus>),
}

/// The options of a migration.
#[derive(Clone, Default)]
pub struct MigrateOptions {
    /// The engine's options.
    pub source: SourceOptions,
    /// The encryption of the channels. The destination must have the same.
    pub security: Option<Security>,
    /// Whether the strategy learns which pages the guest reads, if the kernel can report them.
    pub references: bool,
}

/// A VM in this process. The guest ends when this is dropped.
///
/// On a host without KVM, the VM is a software guest: threads that write the same pages at the same
/// rate, but execute no code.
pub struct Vm {
    pub(crate) machine: Arc<Machine>,
    /// The epoch of the migration or snapshot that the VM comes from, or of a later migration that
    /// has failed.
    epoch: AtomicU32,
}

impl Vm {
    /// Builds a VM and loads its guest. The guest does not run yet.
    ///
    /// # Errors
    /// Returns an error if the workload is invalid, if the memory is too small, or if the host
    /// lacks something that the VM needs.
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

    /// Builds a VM and starts it.
    ///
    /// # Errors
    /// Returns the errors of [`build`](Self::build), and an error if the VM cannot be started.
    pub fn start(options: &VmOptions) -> Result<Self, BuildError> {
        let vm = Self::build(options)?;
        vm.machine.start(true)?;
        Ok(vm)
    }

    /// Puts cold pages of the guest into page stores from now on, so that at most `limit` stays in
    /// RAM. Every page goes into each of the stores. The guest may run already. May be called once.
    ///
    /// # Errors
    /// Returns an error if pages of this VM cannot be evicted, or if a store does not accept them.
    pub fn keep_cold_pages(&self, stores: Vec<Arc<dyn PageStore>>, limit: ResidentLimit) -> Result<(), MachineError> {
        self.machine.page_out(ColdPages { stores, owner: A_PROGRAM, limit })
    }

    /// Returns how much of the VM's memory is in RAM and in page stores. Returns `None` if cold
    /// pages go to no page store.
    pub fn paging(&self) -> Option<PagingStatus> {
        self.machine.paging()
    }

    /// Changes the limit of the memory that stays in RAM. Without a limit, all pages are read back
    /// in the background.
    ///
    /// # Errors
    /// Returns an error if cold pages go to no page store, or if no thread can be started that
    /// reads pages back.
    pub fn set_resident_limit(&self, limit: ResidentLimit) -> Result<(), GuestError> {
        self.machine.set_resident_limit(limit)
    }

    /// Removes the cold pages from their stores, because the VM is not needed any more. Must not be
    /// called after a migration, because the destination reads the pages from the stores.
    pub fn forget_cold_pages(&self) {
        self.machine.forget_cold_pages();
    }

    /// Waits until at least `bytes` bytes are in page stores, and returns the status then.
    ///
    /// # Errors
    /// Returns an error if cold pages go to no page store, or if too few bytes are there in time.
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

    /// Moves the VM to the destination that listens at `to`. Returns when the destination has the
    /// whole VM.
    ///
    /// # Errors
    /// Returns [`NotMoved`] if the VM has not moved. The report in it says which process has the
    /// VM.
    pub fn migrate(&self, to: &Address, strategy: &mut dyn Strategy) -> Result<Report, NotMoved> {
        self.migrate_with(to, strategy, &MigrateOptions::default())
    }

    /// Moves the VM as [`migrate`](Self::migrate) does, with options.
    ///
    /// # Errors
    /// Returns the errors of [`migrate`](Self::migrate).
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

    /// Protects the VM in the page stores of `options`, until the controller of `commands` evicts
    /// the VM or ends the protection: see [`stage`](engine::stage). Returns when the destination
    /// has the whole VM.
    ///
    /// # Errors
    /// Returns [`NotMoved`] if the VM has not moved. The report in it says which process has the
    /// VM.
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

    /// Writes the state of the VM at one moment to a file, while the VM continues to run.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written, or if the VM cannot be saved. The VM
    /// continues to run.
    pub fn snapshot(&self, file: &Path) -> Result<SnapshotReport, MigrationError> {
        let store = SnapshotFile::create(file, self.machine.pages());
        let mut store = store.map_err(|cause| MigrationError::Store { step: "making the snapshot's file", cause })?;
        let (_controller, commands) = Controller::new();
        let mut source = MachineSource::new(self.machine.clone());
        let options = SnapshotOptions { epoch: self.epoch.load(Ordering::Relaxed), ..SnapshotOptions::default() };
        engine::snapshot(&mut source, &mut store, &options, commands)
    }

    /// Builds the VM of a snapshot, whose guest continues from there. The caller must make sure
    /// that no other instance of the VM runs.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if the VM cannot be built here.
    pub fn restore(file: &Path) -> Result<Self, MigrationError> {
        let options = RestoreOptions::default();
        let store = SnapshotFile::open(file, options.max_ram_bytes / layout::PAGE_SIZE);
        let mut store = store.map_err(|cause| MigrationError::Store { step: "opening the snapshot", cause })?;
        let restored = engine::restore(&mut store, &host(), &options)?;
        Ok(Self { machine: restored.vm.0, epoch: AtomicU32::new(restored.report.epoch) })
    }

    /// Returns the board of a built-in workload. Returns `None` for another guest, for a guest that
    /// has not started, and while the page with the board is missing.
    pub fn board(&self) -> Option<Board> {
        self.machine.snapshot().workload
    }

    /// Waits until a built-in workload has filled its pages and works. Returns the board of the
    /// workload then.
    ///
    /// # Errors
    /// Returns an error if the guest shows no board, has ended, or does not work in time.
    pub fn wait_at_work(&self) -> Result<Board, GuestError> {
        self.wait_until("get to work", |board| board.state == guests::State::Running && board.operations > 0)
    }

    /// Waits until a built-in workload has done more work than at the time of the call. Returns the
    /// board of the workload then.
    ///
    /// # Errors
    /// Returns an error if the guest shows no board, has ended, or does not work in time.
    pub fn wait_works_on(&self) -> Result<Board, GuestError> {
        let before = self.board().map_or(0, |board| board.operations);
        self.wait_until("work on", |board| board.operations > before)
    }

    /// Lets a built-in workload check all of its pages. Returns the number of errors that the
    /// workload has found since it was first started. Must not be called while a migration of the
    /// VM is under way.
    ///
    /// # Errors
    /// Returns an error if the guest shows no board, has ended, or does not finish the check in
    /// time.
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

/// Returns a host that builds arriving VMs with the settings of their source.
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

/// A destination, which waits for a VM to arrive.
pub struct Destination {
    address: Address,
    handle: ReceiverHandle,
    arrived: mpsc::Receiver<Vm>,
    receives: JoinHandle<Result<(), ReceiveError>>,
}

impl Destination {
    /// Listens at an address. Port 0 chooses a free port.
    ///
    /// # Errors
    /// Returns an error if the address cannot be bound, or if no source could connect to it.
    pub fn listen(at: &Address) -> Result<Self, ListenError> {
        Self::listen_with(at, None, ReceiverOptions::default())
    }

    /// Listens as [`listen`](Self::listen) does, with options and encryption.
    ///
    /// # Errors
    /// Returns the errors of [`listen`](Self::listen).
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
                // the caller may have dropped the destination
                drop(tx.send(vm));
            },
            options,
        );
        let handle = receiver.handle();
        let receives = thread::Builder::new().name("receive".into());
        let receives = receives.spawn(move || receiver.run(&mut *listener))?;
        Ok(Self { address, handle, arrived, receives })
    }

    /// Returns the address at which the destination listens, as a source names it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns a handle that controls the destination while [`wait`](Self::wait) waits.
    pub fn handle(&self) -> ReceiverHandle {
        self.handle.clone()
    }

    /// Waits until the VM runs here, and returns the VM. In post-copy, its missing pages arrive
    /// later.
    ///
    /// # Errors
    /// Returns an error if no VM arrives.
    pub fn wait(self) -> Result<Vm, ReceiveError> {
        match self.arrived.recv() {
            // the thread continues until it has the last page and the last message of the source
            Ok(vm) => Ok(vm),
            // the thread has dropped the receiver, and with it the other end of the channel
            Err(mpsc::RecvError) => match self.receives.join() {
                Ok(Ok(())) => Err(ReceiveError::Stopped),
                Ok(Err(error)) => Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            },
        }
    }
}
