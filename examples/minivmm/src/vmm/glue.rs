//! The glue: everything that a VMM implements so that its VMs can migrate. The README counts its
//! lines.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, PageSet,
    engine::ephemeral::PersistentVm,
    paged_memory::PagedMemory,
    pager::Pager,
    state::{Section, VmState},
    strategy::{HandOver, Strategy as _},
    tracker::DirtyTracker,
    vm::{CheckpointedVm, DestinationHost, DestinationVm, SourceVm, StateEstimate, VmDescription, VmError, VmId},
};
use migration_kvm::{
    ram::Backing,
    spawner::{PriorityBoost, lower_priority},
    state::entry_pages,
    swapper::Held,
    tracker::{IdlePages, TrackerKind},
};

use super::{
    Machine, MachineConfig, SerialTarget,
    machine::{Absent, not_kept},
    measured::Measured,
    protect::identity,
};

/// The machine as the source of a migration.
pub(crate) struct MachineSource {
    pub(super) machine: Arc<Machine>,
    pub(super) tracker: Box<dyn DirtyTracker>,
    /// The vCPU priority boost since RAM is shared with another process. With it, the guest runs
    /// before the work of that process.
    shared: OnceLock<PriorityBoost>,
    /// Whether the machine stays when its guest has left.
    stays: bool,
    /// Whether vCPUs have stopped, and devices were brought to rest. Only then do the devices have
    /// to be resumed, because a vCPU that has not stopped may be using one of them.
    at_rest: bool,
    /// The record of the pages that the guest references, or the reason why there is none. `None`
    /// if nobody needs the record.
    idle: Option<Result<IdlePages, String>>,
    /// A guard that prevents evictions while it lives, or the reason why there is none. `None` if
    /// the machine never evicts pages.
    held: Option<Result<Held, String>>,
}

impl MachineSource {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        let held = machine.hold_pages();
        let tracker = machine.take_tracker();
        Self { held, machine, tracker, shared: OnceLock::new(), stays: false, at_rest: false, idle: None }
    }

    /// Records the pages that the guest references from now on, if the kernel can report them.
    pub(crate) fn note_references(&mut self) {
        self.idle = Some(IdlePages::watch(self.machine.ram.clone()).map_err(|e| e.to_string()));
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()?.as_ref().ok()
    }

    /// Returns the source for a machine that stays when its guest leaves.
    fn lending(machine: Arc<Machine>) -> Self {
        let mut source = Self::new(machine);
        source.stays = true;
        source
    }
}

impl Drop for MachineSource {
    fn drop(&mut self) {
        self.machine.put_tracker(std::mem::replace(&mut self.tracker, Box::new(Absent)));
    }
}

impl SourceVm for MachineSource {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        let machine = &self.machine;
        Ok(VmDescription {
            id: machine.config.id,
            layout: machine.ram.layout().clone(),
            devices: machine.devices().kinds(),
            host_needs: machine.processors.host_needs(),
            config: machine.config.encode().into(),
        })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.machine.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut *self.tracker
    }

    fn paged_memory(&self) -> Option<Arc<PagedMemory>> {
        self.machine.paging.get().map(|paging| paging.swapper.memory().clone())
    }

    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        self.machine.bus.balloon.free_pages(into)
    }

    fn referenced_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        match &self.idle {
            None => Ok(()),
            Some(Ok(idle)) => idle.referenced(into).map_err(|e| VmError::new(e.to_string())),
            Some(Err(why)) => Err(VmError::new(why)),
        }
    }

    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        let needed = "a hand-over needs a VM that was run with --backing memfd or --backing hugetlb";
        self.shared.get_or_init(|| self.machine.sooner());
        self.machine.ram.memory_files().map_err(|e| VmError::because(needed, e))
    }

    fn blocked(&self, strategy: &str) -> Option<String> {
        let not_held = self.held.as_ref().and_then(|held| held.as_ref().err().cloned());
        let shares_ram = strategy == HandOver.name();
        let paged = || self.machine.is_paged().filter(|_| shares_ram);
        not_held.or_else(paged).or_else(|| self.machine.blocked()).or_else(|| self.machine.devices().blocked(strategy))
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.machine.devices().start()
    }

    fn estimate_state(&mut self) -> Option<StateEstimate> {
        Some(self.machine.estimate_state())
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        self.machine.devices().iterate(budget)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.machine.stop()?;
        self.at_rest = true;
        if let Some(held) = self.held() {
            held.no_page_comes_back();
        }
        self.machine.devices().quiesce()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if let Some(held) = self.held() {
            held.pages_come_back();
        }
        if std::mem::take(&mut self.at_rest) {
            self.machine.devices().resume()?;
        }
        self.machine.go_on()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.machine.processors.throttle(percent)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.machine.save()
    }

    fn entry_pages(&mut self, state: &VmState, into: &mut PageSet) {
        // entry pages are looked up in page tables, which may be in a page store, and no page is
        // read back now
        if self.machine.cold_pages() == 0 {
            entry_pages(state, &*self.machine.ram, into);
        }
    }

    fn starts_running(&self) -> bool {
        !self.machine.is_paused_by_user()
    }

    fn owner_in_doubt(&mut self) {
        self.machine.give_up();
    }

    fn identity(&self) -> Bytes {
        identity()
    }

    fn released(&mut self) {
        let shared = self.shared.take().is_some();
        if self.stays {
            // best effort: the log would slow down the guest, which is not here
            let _ = self.tracker.stop();
            return;
        }
        if shared {
            lower_priority();
        }
        self.machine.shut_down();
    }

    fn restart(&mut self, state: &VmState) -> Result<(), VmError> {
        self.machine.restart(state)
    }
}

/// The options of a destination, which override those of the source.
pub(crate) struct HostOptions {
    pub(crate) serial: SerialTarget,
    pub(crate) backing: Option<Backing>,
    pub(crate) tracker: Option<TrackerKind>,
    /// Whether no vCPU runs while the link is lost and pages are missing.
    pub(crate) pause_on_loss: bool,
    /// Whether the VM's RAM must be memory that other processes can map.
    pub(crate) shared_ram: bool,
    /// Whether the page tables of RAM that is handed over stay empty.
    pub(crate) cold: bool,
}

/// Builds machines for arriving VMs.
pub(crate) struct Host {
    options: HostOptions,
    last: Mutex<Last>,
}

/// The last machine that was built.
#[derive(Default)]
struct Last {
    /// The machine. The reference is weak, because a discarded machine must be freed at once.
    machine: Weak<Machine>,
    id: VmId,
    /// The measurements of the machine, for the next attempt to receive the VM.
    measured: Arc<Measured>,
}

impl Host {
    pub(crate) fn new(options: HostOptions) -> Self {
        Self { options, last: Mutex::default() }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, vm: &VmDescription, shared: Option<Vec<OwnedFd>>) -> Result<MachineDestination, VmError> {
        let config = MachineConfig::decode(&vm.config).map_err(|e| VmError::because("the VM's configuration", e))?;
        // the engine has checked this layout against its limits, but not that of the configuration
        if config.layout().ok().as_ref() != Some(&vm.layout) {
            return Err(VmError::new(format!(
                "a configuration of {} bytes for another RAM layout",
                config.memory_bytes
            )));
        }
        Machine::check_host(&config, &vm.host_needs)?;
        let backing = self.options.backing.unwrap_or(config.backing);
        if shared.is_some() && backing != config.backing {
            let why = format!("the VM's RAM is {}, and stays that: --backing {backing} rules it out", config.backing);
            return Err(VmError::new(why));
        }
        let tracker = self.options.tracker.unwrap_or(config.tracker);
        let config = MachineConfig { backing, tracker, ..config };
        if self.options.shared_ram && !config.backing.is_shared() {
            return Err(VmError::new(not_kept(config.backing)));
        }
        let is_shared = shared.is_some();
        let machine = match shared {
            None => Machine::new(config, &self.options.serial),
            Some(files) => Machine::in_shared_ram(files, config, &self.options.serial, self.options.cold),
        };
        let mut machine = machine.map_err(|e| VmError::because("building the VM", e))?;
        let mut last = self.last();
        if last.id == vm.id {
            machine.measured = last.measured.clone();
        }
        *last = Last { id: vm.id, measured: machine.measured.clone(), ..Last::default() };
        drop(last);
        let here = machine.devices().kinds();
        if let Some(why) = vm.devices.iter().find_map(|device| device.mismatch(&here)) {
            return Err(VmError::new(why));
        }
        let machine = Arc::new(machine);
        // the guest runs before the work of the process that it comes from
        if is_shared {
            machine.prefer();
        }
        self.last().machine = Arc::downgrade(&machine);
        Ok(MachineDestination(machine))
    }
}

impl DestinationHost for Host {
    type Vm = MachineDestination;

    fn build(&self, vm: &VmDescription) -> Result<MachineDestination, VmError> {
        self.make(vm, None)
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<MachineDestination, VmError> {
        self.make(vm, Some(files))
    }

    fn link_lost(&self, _vm: VmId) {
        let machine = self.last().machine.upgrade();
        if let Some(machine) = machine.filter(|_| self.options.pause_on_loss) {
            machine.processors.hold(true);
        }
    }

    fn link_found(&self, _vm: VmId) {
        let machine = self.last().machine.upgrade();
        if let Some(machine) = machine {
            machine.processors.hold(false);
        }
    }
}

/// The machine as the destination of a migration.
pub(crate) struct MachineDestination(pub(crate) Arc<Machine>);

impl DestinationVm for MachineDestination {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.0.ram.clone()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        Some(self.0.pager()?)
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.0.processors.threads()
    }

    fn identity(&self) -> Bytes {
        identity()
    }

    fn protected(&mut self) -> Option<Box<dyn CheckpointedVm>> {
        Some(Box::new(MachineSource::new(self.0.clone())))
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        Some(self.0.estimate_load())
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.0.devices().load_piece(piece)
    }

    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        self.0.continue_log(dirty).map_err(|e| VmError::because("going on with the dirty log", e))
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.0.load(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.0.devices().resume()?;
        self.0.arrive(running);
        self.0.prefer_no_longer();
        Ok(())
    }
}

/// A machine that stays when its guest leaves, and takes the guest back.
pub(crate) struct Tenant {
    machine: Option<Arc<Machine>>,
    /// The host that builds the machine for the guest's first visit.
    host: Option<Host>,
}

impl Tenant {
    /// Returns the tenant for a guest that is at home here.
    pub(crate) fn of(machine: Arc<Machine>) -> Self {
        Self { machine: Some(machine), host: None }
    }

    /// Returns the tenant for a guest that will arrive.
    pub(crate) fn expecting(options: HostOptions) -> Self {
        Self { machine: None, host: Some(Host::new(options)) }
    }

    /// Returns the machine, or `None` before the guest's first visit.
    pub(crate) fn machine(&self) -> Option<&Arc<Machine>> {
        self.machine.as_ref()
    }
}

impl PersistentVm for Tenant {
    type Coming = MachineDestination;

    fn id(&self) -> VmId {
        self.machine().map(|machine| machine.id()).unwrap_or_default()
    }

    fn leaving(&mut self) -> Box<dyn SourceVm> {
        let machine = self.machine.clone().expect("a guest that is here is in a machine");
        Box::new(MachineSource::lending(machine))
    }

    fn coming(&mut self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<MachineDestination, VmError> {
        if let Some(machine) = &self.machine {
            let here = machine.ram.is_in(&files).map_err(|e| VmError::because("the memory of the VM", e))?;
            if !here || machine.id() != vm.id {
                return Err(VmError::new("another VM is at home here, in other memory"));
            }
            machine.prefault();
            return Ok(MachineDestination(machine.clone()));
        }
        let host = self.host.as_ref().ok_or_else(|| VmError::new("no VM is built here"))?;
        let built = host.make(vm, Some(files))?;
        self.machine = Some(built.0.clone());
        Ok(built)
    }
}
