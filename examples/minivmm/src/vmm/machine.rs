//! A machine: RAM, processors, devices, and the requests of its user.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use guests::Board;
use kvm_ioctls::Kvm;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet,
    device::DeviceSet,
    state::VmState,
    text::{Chain, describe},
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker, TrackerError, UnionTracker},
    vm::{SectionEstimate, StateEstimate, VmError, VmId},
};
use migration_kvm::{
    pager::UserFaultPager,
    ram::{Backing, MappedRam},
    spawner::PriorityBoost,
    state::{HostNeeds, VCPU_SECTION},
    tracker::UserFault,
};
use migration_transport::{BrokerClient, BrokerError, RamLease};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    alias::Alias,
    balloon::{Balloon, BalloonDevice, Discard},
    boot::{self, BootError},
    config::MachineConfig,
    devices::{Bus, SerialDevice, SerialOutput, SerialTarget},
    kvm::KvmProcessors,
    measured::Measured,
    paging::Paging,
    software::SoftwareProcessors,
};

/// The guest physical address at which the built-in workloads keep their figures.
pub(super) const BOARD: u64 = 0x10_0000;

/// The approximate size of a vCPU's state in bytes: the data of `KVM_GET_XSAVE2` and of a few
/// hundred MSRs. This and the following estimates are used until the VM's state was saved, or
/// loaded, for the first time.
const VCPU_BYTES: u64 = 12 << 10;
/// The approximate times of saving and of loading a vCPU, including the time until its thread
/// begins. vCPUs are saved in parallel, unless cores are scarce.
const VCPU_SAVE: Duration = Duration::from_micros(100);
const VCPU_LOAD: Duration = Duration::from_micros(250);

/// The longest time that a migration waits for the end of the previous one.
const LAST_MIGRATION: Duration = Duration::from_secs(2);

/// The time after a hand-over for which the guest keeps its priority. The process that the guest
/// comes from takes 60 to 90 ms for each GiB to end.
const AFTERWARDS: Duration = Duration::from_millis(200);

/// The longest time that a hand-over waits for page tables to be filled. This is enough for 8 GiB
/// on a machine that has other work.
const WARMING: Duration = Duration::from_secs(10);

/// The time in which a process that has handed its VM over unmaps the VM's RAM. This is enough for
/// 2 to 4 GiB.
const COOLING: Duration = Duration::from_secs(1);

/// The reason why a VM cannot be built here, or why its kernel cannot be loaded.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct MachineError(String);

impl From<BootError> for MachineError {
    fn from(error: BootError) -> Self {
        machine_error(error)
    }
}

/// Returns an error whose reason is the text of `error`.
pub(super) fn machine_error(error: impl std::error::Error) -> MachineError {
    MachineError(describe(error))
}

/// The processors that execute the guest: vCPUs of KVM, or threads in their place.
pub(super) trait Processors: Send + Sync {
    /// Prepares a built-in workload in place of a kernel.
    fn perform(&self, spec: &str) -> Result<(), String>;
    /// Prepares the boot CPU to enter at `entry`.
    fn boot(&self, entry: u64, start_info: u64) -> Result<(), String>;
    /// Lets the processors run.
    fn run(&self);
    /// Stops the processors. Returns when none runs.
    ///
    /// # Errors
    /// Returns an error if a processor does not stop in time. [`run`](Self::run) then cancels the
    /// stop, also for that processor.
    fn pause(&self) -> Result<(), VmError>;
    /// Holds the processors, whether or not they run otherwise, or ends that. Does not wait for a
    /// processor, because the processor may wait for a page.
    fn hold(&self, held: bool);
    /// Slows the processors down.
    fn throttle(&self, percent: u8) -> Result<(), VmError>;
    /// Adds the state of the processors and of the VM to `into`.
    fn save(&self, into: &mut VmState) -> Result<(), VmError>;
    /// Loads the state of the processors and of the VM.
    fn load(&self, from: &VmState) -> Result<(), VmError>;
    /// Returns what the processors need of a host.
    fn host_needs(&self) -> Bytes;
    /// Returns a tracker of the processors' writes.
    fn tracker(&self) -> Result<Box<dyn DirtyTracker>, String>;
    /// Returns the frequency of the processors' TSC in kHz, or 0 if it is unknown.
    fn tsc_khz(&self) -> u64;
    /// Returns the operating system's IDs of the threads that run vCPUs.
    fn threads(&self) -> Vec<u32>;
    /// Returns a function that waits until the guest has ended by itself, or the machine is shut
    /// down (`None`).
    fn end_watch(&self) -> Box<dyn FnOnce() -> Option<String> + Send>;
    /// Returns the reason why the guest has ended, if it has.
    fn end(&self) -> Option<String>;
    /// Fills the page tables that the processors use for this memory, before the guest arrives.
    fn pre_fault(&self, gpa: u64, len: u64) -> io::Result<()>;
    /// Frees the threads and the vCPUs.
    fn shut_down(&self);
}

pub(crate) struct Machine {
    pub(super) config: MachineConfig,
    // fields are dropped in order: the processors must end before their memory goes away
    pub(super) processors: Box<dyn Processors>,
    /// The swapper, for a machine that has been at home here from the beginning and has cold pages.
    pub(super) paging: OnceLock<Paging>,
    devices: Mutex<DeviceSet>,
    tracker: Mutex<Option<Box<dyn DirtyTracker>>>,
    tracker_is_back: Condvar,
    tracker_name: &'static str,
    pub(super) ram: Arc<MappedRam>,
    /// The log of the VMM's own writes: the start info, and any write that a device with DMA would
    /// do.
    writes: Arc<DirtyBitmap>,
    pub(super) bus: Arc<Bus>,
    standing: Mutex<Standing>,
    /// Whether the user has paused the machine, as in `standing`. It can be read without the lock
    /// of `standing`, whose holder may wait for a vCPU.
    paused: AtomicBool,
    /// The vCPU priority boost of a guest that comes from another process of this machine.
    preferred: Mutex<Option<PriorityBoost>>,
    /// The userfaultfd that the write-protecting tracker and the pager share. `None` if this host
    /// does not permit one.
    pub(super) fault: Option<Arc<UserFault>>,
    /// The pager. The balloon shares it, because the balloon must not discard pages while some are
    /// missing.
    pager: Arc<OnceLock<Arc<UserFaultPager>>>,
    /// The measured times of saving and loading the state. A host that builds the VM again shares
    /// them.
    pub(super) measured: Arc<Measured>,
}

/// The parties that want the machine to be stopped. The machine runs only while no party does.
/// Every change is made together with its effect on the processors, under one lock, so that a
/// user's `resume` cannot start a machine that a migration has stopped.
#[derive(Default)]
struct Standing {
    /// Whether the user wants the machine to be stopped.
    by_user: bool,
    /// Whether a migration that is about to hand over the VM wants the machine to be stopped.
    by_migration: bool,
    /// Whether the VM may run at the destination. While this is set, the VM does not run here.
    given_up: bool,
}

impl Standing {
    /// Returns an error if the user's request `wish` comes in the middle of a hand-over.
    fn refuse(&self, wish: &str) -> Result<(), String> {
        match (self.given_up, self.by_migration) {
            (true, _) => Err(format!("{wish}: the VM may run at its destination")),
            (false, true) => Err(format!("{wish}: the VM is being handed over")),
            _ => Ok(()),
        }
    }
}

/// The state of the machine for `status`.
pub(crate) struct Snapshot {
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) backing: &'static str,
    pub(crate) tracker: &'static str,
    pub(crate) paused: bool,
    pub(crate) software: bool,
    pub(crate) workload: Option<Board>,
    pub(crate) warnings: Vec<String>,
    pub(crate) serial: SerialOutput,
}

/// Returns the reason why a broker cannot keep RAM that is private to a process.
pub(super) fn not_kept(backing: Backing) -> String {
    format!("a broker keeps no {backing} memory: use --backing memfd or hugetlb")
}

impl Machine {
    /// Builds a machine. Without KVM, the machine is a software guest, and the log reports that.
    pub(crate) fn new(config: MachineConfig, serial: &SerialTarget) -> Result<Self, MachineError> {
        let layout = config.layout().map_err(MachineError)?;
        let ram = MappedRam::new(layout, config.backing).map_err(|e| MachineError(describe(e)))?;
        Self::around(ram, config, serial)
    }

    /// Builds a machine in RAM that another process shares with this one. The guest may still use
    /// the RAM in that process.
    pub(super) fn in_shared_ram(
        files: Vec<OwnedFd>,
        config: MachineConfig,
        serial: &SerialTarget,
        cold: bool,
    ) -> Result<Self, MachineError> {
        let layout = config.layout().map_err(MachineError)?;
        let ram = MappedRam::from_memory_files(layout, files, config.backing);
        let machine = Self::around(ram.map_err(|e| MachineError(describe(e)))?, config, serial)?;
        if !cold {
            machine.prefault();
        }
        Ok(machine)
    }

    /// Fills page tables for a guest that runs elsewhere in this RAM, and is about to arrive.
    pub(super) fn prefault(&self) {
        let mut pre_faults = true;
        let mut fill = |range: PageRange| {
            // fills the page tables of KVM and of this process; if KVM cannot do that, only the
            // latter
            pre_faults = pre_faults && self.pre_fault(range);
            if pre_faults { Ok(()) } else { self.ram.prefault_for_reading(range) }
        };
        if let Err(error) = self.ram.prefault_shared_by(WARMING, &mut fill) {
            log!("the guest will be slow at first: {}", Chain(&error));
        }
    }

    fn pre_fault(&self, range: PageRange) -> bool {
        let gpa = self.ram.layout().gpa_of(range.first);
        gpa.is_some_and(|gpa| self.processors.pre_fault(gpa, range.bytes()).is_ok())
    }

    /// Unmaps the RAM without disturbing the guest, which runs elsewhere in the same RAM.
    pub(crate) fn let_go(&self) {
        // RAM that is still mapped after that is unmapped when the process ends
        if let Err(error) = self.ram.unmap_shared_in_pieces(COOLING) {
            log!("{}", Chain(&error));
        }
    }

    fn preferred(&self) -> MutexGuard<'_, Option<PriorityBoost>> {
        self.preferred.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives the vCPUs priority over other threads on their cores.
    pub(super) fn prefer(&self) {
        let mut preferred = self.preferred();
        // the changes of the last boost are rolled back first
        drop(preferred.take());
        *preferred = Some(PriorityBoost::first(&self.processors.threads()));
    }

    /// Ends the priority of the vCPUs soon, because the guest runs here now.
    pub(super) fn prefer_no_longer(self: &Arc<Self>) {
        if self.preferred().is_none() {
            return;
        }
        let machine = Arc::downgrade(self);
        let rest = move || {
            thread::sleep(AFTERWARDS);
            let preferred = machine.upgrade().and_then(|machine| machine.preferred().take());
            drop(preferred);
        };
        if thread::Builder::new().name("preferred".into()).spawn(rest).is_err() {
            drop(self.preferred().take());
        }
    }

    /// Returns a boost with which the vCPUs are scheduled sooner while it lives.
    pub(super) fn sooner(&self) -> PriorityBoost {
        PriorityBoost::sooner(&self.processors.threads())
    }

    fn around(ram: MappedRam, mut config: MachineConfig, serial: &SerialTarget) -> Result<Self, MachineError> {
        let (layout, ram) = (ram.layout().clone(), Arc::new(ram));
        let line = EventFd::new(EFD_NONBLOCK).map_err(|e| MachineError(format!("an eventfd: {e}")))?;
        let bus_line = line.try_clone().map_err(|e| MachineError(format!("an eventfd: {e}")))?;
        let pager: Arc<OnceLock<Arc<UserFaultPager>>> = Arc::default();
        let balloon = Balloon::new(ram.clone(), discard(ram.clone(), pager.clone()));
        let bus = Bus::new(serial, bus_line, balloon).map_err(|e| MachineError(e.to_string()))?;
        let writes = DirtyBitmap::new(layout);
        let fault = UserFault::new().ok().map(Arc::new);
        let kvm = match open_kvm() {
            _ if config.software => None,
            Ok(kvm) => Some(kvm),
            Err(why) => {
                log!("{why}; a software guest takes the place of the real one");
                config.software = true;
                None
            }
        };
        let processors: Box<dyn Processors> = match &kvm {
            Some(kvm) => {
                let made = KvmProcessors::new(
                    kvm,
                    ram.clone(),
                    config.cpus,
                    config.tracker,
                    fault.clone(),
                    bus.clone(),
                    &line,
                );
                Box::new(made.map_err(MachineError)?)
            }
            None => {
                let made = SoftwareProcessors::new(ram.clone(), config.cpus, config.tracker, fault.clone());
                Box::new(made.map_err(|e| MachineError(format!("starting the software guest's threads: {e}")))?)
            }
        };
        let parts = vec![
            processors.tracker().map_err(MachineError)?,
            Box::new(BitmapTracker::new(writes.clone())) as Box<dyn DirtyTracker>,
        ];
        let tracker = UnionTracker::new(parts);
        let (tracker_name, tracker) = (tracker.name(), Mutex::new(Some(Box::new(tracker) as _)));
        let devices = Mutex::new(DeviceSet::new(vec![
            Box::new(SerialDevice(bus.clone())),
            Box::new(BalloonDevice(bus.balloon.clone())),
        ]));
        let standing = Mutex::default();
        Ok(Self {
            config,
            processors,
            paging: OnceLock::new(),
            devices,
            tracker,
            tracker_is_back: Condvar::new(),
            tracker_name,
            ram,
            writes,
            bus,
            standing,
            paused: AtomicBool::new(false),
            preferred: Mutex::default(),
            fault,
            pager,
            measured: Arc::default(),
        })
    }

    /// Loads a kernel from a file.
    pub(crate) fn boot_file(&self, path: &Path, cmdline: &str) -> Result<(), MachineError> {
        if self.config.software {
            let why = "a software guest runs no kernel: only KVM does; give it a --workload";
            return Err(MachineError(why.into()));
        }
        let alias = Alias::new(&*self.ram).map_err(MachineError)?;
        let entry = boot::load_file(path, &*self.ram, alias.memory())?;
        self.enter(entry, cmdline)
    }

    /// Loads a built-in workload.
    pub(crate) fn boot_workload(&self, spec: &str) -> Result<(), MachineError> {
        let elf = guests::elf(spec, self.config.cpus, self.processors.tsc_khz());
        let elf = elf.map_err(|e| MachineError(e.to_string()))?;
        if self.config.software {
            return self.processors.perform(spec).map_err(MachineError);
        }
        let alias = Alias::new(&*self.ram).map_err(MachineError)?;
        let mut file = io::Cursor::new(elf);
        let entry = boot::load("the workload", &mut file, &*self.ram, alias.memory());
        self.enter(entry?, "")
    }

    fn enter(&self, entry: u64, cmdline: &str) -> Result<(), MachineError> {
        let start_info = boot::write_start_info(&*self.ram, cmdline)?;
        self.processors.boot(entry, start_info).map_err(MachineError)
    }

    /// Starts the guest, or leaves it paused.
    pub(crate) fn start(&self, running: bool) -> Result<(), MachineError> {
        let mut standing = self.standing();
        standing.by_user = !running;
        self.settle(&standing);
        Ok(())
    }

    /// Starts a guest that has arrived, possibly not for the first time, or leaves it paused.
    pub(super) fn arrive(&self, running: bool) {
        let mut standing = self.standing();
        // discards the state that an earlier stay has left
        *standing = Standing { by_user: !running, ..Standing::default() };
        self.settle(&standing);
    }

    pub(crate) fn pause_by_user(&self) -> Result<(), String> {
        let mut standing = self.standing();
        standing.refuse("pause")?;
        let was_paused = std::mem::replace(&mut standing.by_user, true);
        let paused = self.processors.pause();
        standing.by_user = was_paused || paused.is_ok();
        self.settle(&standing);
        paused.map_err(|why| format!("pause: {}; the VM is as it was", Chain(&why)))
    }

    pub(crate) fn resume_by_user(&self) -> Result<(), String> {
        if let Some(end) = self.processors.end() {
            return Err(format!("resume: the VM has ended: {end}"));
        }
        let mut standing = self.standing();
        standing.refuse("resume")?;
        standing.by_user = false;
        self.settle(&standing);
        Ok(())
    }

    /// Stops the machine for a hand-over.
    ///
    /// # Errors
    /// Returns [`VmError::ended`] if the guest has ended by itself, because there is nothing to
    /// move then. Returns an error if a vCPU does not stop. [`go_on`](Machine::go_on) rolls back
    /// what has happened.
    pub(super) fn stop(&self) -> Result<(), VmError> {
        let mut standing = self.standing();
        if standing.given_up {
            return Err(VmError::new("the VM may run at its destination"));
        }
        standing.by_migration = true;
        let paused = self.processors.pause();
        match self.processors.end() {
            Some(end) => Err(VmError::ended(end)),
            None => paused,
        }
    }

    /// Rolls back [`stop`](Machine::stop).
    pub(super) fn go_on(&self) -> Result<(), VmError> {
        let mut standing = self.standing();
        if standing.given_up {
            return Err(VmError::new("the VM may run at the destination, never here again"));
        }
        standing.by_migration = false;
        self.settle(&standing);
        Ok(())
    }

    /// Restarts the machine here from this state and from RAM, because the destination is dead. The
    /// machine runs unless its user has paused it.
    pub(super) fn restart(&self, state: &VmState) -> Result<(), VmError> {
        self.load(state)?;
        self.bus.leave_out_what_is_written();
        self.devices().resume()?;
        let mut standing = self.standing();
        (standing.given_up, standing.by_migration) = (false, false);
        self.settle(&standing);
        Ok(())
    }

    /// Records that the VM may run at the destination from now on.
    pub(super) fn give_up(&self) {
        self.standing().given_up = true;
    }

    /// Publishes whether the user has paused the machine, and lets the processors run if no party
    /// wants the machine to be stopped.
    fn settle(&self, standing: &Standing) {
        self.paused.store(standing.by_user, Ordering::SeqCst);
        if !(standing.by_user || standing.by_migration || standing.given_up) {
            self.processors.run();
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Returns an error if this host cannot run a VM with these needs.
    pub(super) fn check_host(config: &MachineConfig, needs: &[u8]) -> Result<(), VmError> {
        if config.software {
            return Ok(());
        }
        let kvm = open_kvm().map_err(|why| VmError::new(format!("the VM needs KVM: {why}")))?;
        let needs = HostNeeds::decode(needs).map_err(|e| VmError::because("the VM's needs", e))?;
        needs.check(&kvm).map_err(|mismatches| {
            let list: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
            VmError::new(format!("this host cannot run the VM: {}", list.join("; ")))
        })
    }

    pub(super) fn devices(&self) -> MutexGuard<'_, DeviceSet> {
        self.devices.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Saves the state of the machine, and records the time and the sizes.
    pub(super) fn save(&self) -> Result<VmState, VmError> {
        let began = Instant::now();
        let mut state = VmState::default();
        self.processors.save(&mut state)?;
        let of_processors = state.clone();
        self.devices().save(&mut state)?;
        self.measured.saved(&of_processors, began.elapsed());
        Ok(state)
    }

    /// Loads the state of the machine, and records the time.
    pub(super) fn load(&self, state: &VmState) -> Result<(), VmError> {
        let began = Instant::now();
        self.processors.load(state)?;
        self.devices().load(state)?;
        self.measured.loaded(began.elapsed());
        Ok(())
    }

    /// Returns an estimate of saving the state in the pause: the same as the last time.
    pub(super) fn estimate_state(&self) -> StateEstimate {
        let mut estimate = self.measured.last_save().unwrap_or_else(|| {
            let vcpu = |instance| SectionEstimate { name: VCPU_SECTION.into(), instance, bytes: VCPU_BYTES };
            let sections = (0..self.config.cpus).map(vcpu).collect();
            StateEstimate { sections, save_time: Some(VCPU_SAVE * self.config.cpus) }
        });
        // devices know the size of their present state
        estimate.sections.extend(self.devices().estimates());
        estimate
    }

    /// Returns an estimate of the time of loading the state here: the same as before.
    pub(super) fn estimate_load(&self) -> Duration {
        self.measured.load_time().unwrap_or(VCPU_LOAD * self.config.cpus)
    }

    /// Returns the ID of the VM.
    pub(crate) fn id(&self) -> VmId {
        self.config.id
    }

    /// Has a broker keep the machine's RAM. Returns the lease.
    pub(crate) fn lease_ram(&self, broker: &BrokerClient) -> Result<RamLease, BrokerError> {
        let backing = self.config.backing;
        let files = self.ram.memory_files().map_err(|_| BrokerError::Files(not_kept(backing)))?;
        broker.lease(self.config.id, self.ram.layout(), backing.name(), &files)
    }

    /// Returns the machine's RAM.
    pub(crate) fn ram(&self) -> &MappedRam {
        &self.ram
    }

    /// Returns the number of pages of RAM.
    pub(crate) fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    /// Returns the pager, which serves missing pages. If this host does not permit one, logs the
    /// reason as a warning and returns `None`.
    pub(super) fn pager(&self) -> Option<Arc<UserFaultPager>> {
        let made = match &self.fault {
            Some(fault) => UserFaultPager::new(self.ram.clone(), fault.clone()).map_err(describe),
            None => Err(UserFault::new().err().map_or_else(String::new, describe)),
        };
        match made {
            Ok(pager) => Some(self.pager.get_or_init(|| Arc::new(pager)).clone()),
            Err(why) => {
                log!("no post-copy to here: {why}");
                None
            }
        }
    }

    /// Returns the reason why the machine cannot move, if pages are missing: the next host would
    /// take them for empty pages.
    pub(super) fn blocked(&self) -> Option<String> {
        let missing = self.pager.get().map_or(0, |pager| pager.missing());
        (missing > 0)
            .then(|| format!("{missing} pages of the VM are missing: they are on their way from its last host"))
    }

    /// Returns the reason why the machine cannot be handed over to another process of this host, if
    /// it cannot.
    pub(crate) fn cannot_hand_over(&self) -> Option<String> {
        let private =
            || Some(format!("its RAM is private to this process: {}", Chain(&self.ram.memory_files().err()?)));
        self.blocked().or_else(|| self.is_paged()).or_else(private)
    }

    /// Returns the reason why no other process of this host may use the RAM, if cold pages go to a
    /// page store.
    pub(super) fn is_paged(&self) -> Option<String> {
        let why = "its cold pages go to a page store, which another process that uses its RAM would not notice";
        self.paging.get().map(|_| why.into())
    }

    /// Returns whether the page at this address can be read without waiting for it to arrive.
    fn is_here(&self, gpa: u64) -> bool {
        let page = self.ram.layout().page_of(gpa);
        self.pager.get().zip(page).is_none_or(|(pager, page)| !pager.is_missing(page))
    }

    /// Returns whether the user has paused the machine. Does not wait.
    pub(super) fn is_paused_by_user(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Returns a function that waits until the guest has ended by itself, and then returns the
    /// reason, or until the machine is shut down.
    pub(crate) fn wait_end(&self) -> Box<dyn FnOnce() -> Option<String> + Send> {
        self.processors.end_watch()
    }

    /// Returns the reason why the guest has ended by itself, if it has.
    pub(crate) fn end(&self) -> Option<String> {
        self.processors.end()
    }

    /// Frees everything that the machine has, except its memory.
    pub(super) fn shut_down(&self) {
        self.processors.shut_down();
        self.end_paging();
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut page = [0; PAGE_SIZE];
        let ram = &self.ram;
        let board = self.is_here(BOARD).then(|| ram.read(BOARD, &mut page).ok()).flatten();
        let workload = board.and_then(|()| Board::parse(&page));
        Snapshot {
            cpus: self.config.cpus,
            memory_bytes: self.config.memory_bytes,
            backing: self.config.backing.name(),
            tracker: self.tracker_name,
            paused: self.is_paused_by_user(),
            software: self.config.software,
            workload,
            warnings: self.bus.warnings(),
            serial: self.bus.serial_output(),
        }
    }

    /// Checks that `len` bytes from guest physical address `gpa` on are RAM.
    pub(crate) fn check_ram(&self, gpa: u64, len: u64) -> Result<(), String> {
        let end = gpa.checked_add(len).ok_or("the address overflows")?;
        let mut at = gpa;
        // regions are in ascending order
        for region in self.ram.layout().regions() {
            if region.gpa <= at && at < region.gpa + region.len {
                at = end.min(region.gpa + region.len);
            }
        }
        if at == end { Ok(()) } else { Err(format!("there is no RAM at {at:#x}")) }
    }

    /// Copies guest memory to a file, in pieces.
    pub(crate) fn dump(&self, gpa: u64, len: u64, mut to: &File) -> Result<(), String> {
        let ram = &self.ram;
        let mut piece = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let bytes = piece.len().min((len - at) as usize);
            let from = gpa.checked_add(at).ok_or("the address overflows")?;
            ram.read(from, &mut piece[..bytes]).map_err(|e| e.to_string())?;
            to.write_all(&piece[..bytes]).map_err(|e| e.to_string())?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// Takes the tracker for a migration. [`put_tracker`](Machine::put_tracker) gives it back.
    /// Waits for a short time if the checkpoints of the last migration are just ending.
    pub(super) fn take_tracker(&self) -> Box<dyn DirtyTracker> {
        let guard = self.tracker.lock().unwrap_or_else(|e| e.into_inner());
        let waited = self.tracker_is_back.wait_timeout_while(guard, LAST_MIGRATION, |tracker| tracker.is_none());
        waited.unwrap_or_else(|e| e.into_inner()).0.take().unwrap_or_else(|| Box::new(Absent))
    }

    /// Puts the tracker back. A tracker that still tracks for the VMM is kept. Otherwise a new one
    /// is made for the next migration.
    pub(super) fn put_tracker(&self, tracker: Box<dyn DirtyTracker>) {
        if tracker.name() == ABSENT {
            // another migration has the tracker
            return;
        }
        let tracker = if tracker.is_active() { Ok(tracker) } else { self.make_tracker() };
        *self.tracker.lock().unwrap_or_else(|e| e.into_inner()) = tracker.ok();
        self.tracker_is_back.notify_all();
    }

    fn make_tracker(&self) -> Result<Box<dyn DirtyTracker>, String> {
        let parts = vec![self.processors.tracker()?, Box::new(BitmapTracker::new(self.writes.clone())) as _];
        Ok(Box::new(UnionTracker::new(parts)))
    }

    /// Returns the pages that were written since the last call, here and wherever else the guest
    /// has run meanwhile. The first call returns all of RAM, and every write is logged from then
    /// on.
    pub(crate) fn dirty_since_last_time(&self) -> Result<PageSet, TrackerError> {
        let mut tracker = self.take_tracker();
        let mut dirty = PageSet::empty(self.pages());
        let harvested = if tracker.is_active() {
            harvest_anew(&mut *tracker, &mut dirty)
        } else {
            let started = tracker.start().and_then(|()| harvest_anew(&mut *tracker, &mut dirty));
            dirty = PageSet::full(self.pages());
            started
        };
        if harvested.is_err() {
            tracker.mark_dirty(&dirty);
        }
        self.put_tracker(tracker);
        harvested.map(|()| dirty)
    }

    /// Stops the dirty log.
    pub(crate) fn stop_log(&self) -> Result<(), TrackerError> {
        let mut tracker = self.take_tracker();
        let stopped = tracker.stop();
        self.put_tracker(tracker);
        stopped
    }

    /// Continues the dirty log of another VMM, which contains the pages `dirty`, while no vCPU
    /// runs.
    pub(super) fn continue_log(&self, dirty: &PageSet) -> Result<(), TrackerError> {
        let mut tracker = self.take_tracker();
        // a tracker may begin with all pages dirty; nothing writes yet
        let mut none = PageSet::empty(self.pages());
        let started = tracker.start().and_then(|()| harvest_anew(&mut *tracker, &mut none));
        tracker.mark_dirty(dirty);
        self.put_tracker(tracker);
        started
    }
}

/// Harvests dirty pages, and immediately re-arms a tracker that is re-armed page by page.
fn harvest_anew(tracker: &mut dyn DirtyTracker, dirty: &mut PageSet) -> Result<(), TrackerError> {
    tracker.harvest(dirty)?;
    let Some(rearm) = tracker.rearm() else { return Ok(()) };
    dirty.ranges().try_for_each(|range| rearm.before_read(range, dirty))
}

/// Returns the function with which the balloon discards the pages that the guest does not need.
fn discard(ram: Arc<MappedRam>, pager: Arc<OnceLock<Arc<UserFaultPager>>>) -> Discard {
    Box::new(move |runs| {
        // another process may have taken a huge page that was given back when the guest needs it
        // again
        let may = ram.backing() != Backing::Hugetlb && pager.get().is_none_or(|pager| pager.missing() == 0);
        let runs = if may { runs } else { &[] };
        runs.iter().try_for_each(|&run| ram.discard(run)).map_err(describe)
    })
}

/// The replacement for a tracker that another migration has.
pub(super) struct Absent;

const ABSENT: &str = "none";

impl Absent {
    fn error() -> TrackerError {
        TrackerError::new(ABSENT, "another migration has the tracker")
    }
}

impl DirtyTracker for Absent {
    fn name(&self) -> &'static str {
        ABSENT
    }

    fn is_active(&self) -> bool {
        false
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        Err(Self::error())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        Ok(())
    }

    fn harvest(&mut self, _into: &mut PageSet) -> Result<(), TrackerError> {
        Err(Self::error())
    }

    fn mark_dirty(&mut self, _pages: &PageSet) {}
}

/// Opens KVM, unless it is missing, not accessible, or not wanted.
fn open_kvm() -> Result<Kvm, String> {
    if std::env::var_os("MINIVMM_SOFTWARE_GUEST").is_some() {
        return Err("MINIVMM_SOFTWARE_GUEST is set".into());
    }
    Kvm::new().map_err(|e| format!("/dev/kvm cannot be used: {e}"))
}

/// Returns the frequency, in kHz, of the TSC that guests on this host see.
pub(crate) fn host_tsc_khz() -> Option<u64> {
    let vm = open_kvm().ok()?.create_vm().ok()?;
    vm.create_vcpu(0).ok()?.get_tsc_khz().ok().map(u64::from)
}
