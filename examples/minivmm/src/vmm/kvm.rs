//! A machine on KVM: memory slots, irqchip, vCPUs, their state and their trackers.

use std::{io, sync::Arc};

use bytes::Bytes;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use migration_core::{
    GuestRam, spawner::StdSpawner, state::VmState, text::describe, tracker::DirtyTracker, vm::VmError,
};
use migration_kvm::{
    probe::Probe,
    state::{self, HostNeeds, Irqchip, VCPU_SECTION, VM_SECTION, VcpuSaver},
    tracker::{DirtyRing, EnabledRing, GuestSlots, Parts, TrackerKind, UserFault, build},
    vcpu::{IoHandler, KickSignal, RingFull, VcpuHost, Vcpus},
};
use minivmm_client::log::Logged;

use super::{
    alias::install_slots,
    boot,
    devices::{Bus, SERIAL_GSI},
    machine::Processors,
};

/// The interrupt controllers of the VM.
const IRQCHIP: Irqchip = Irqchip::Full;

pub(super) struct KvmProcessors {
    // vCPUs are the first field, so that they end before the VM and its memory go away
    vcpus: Arc<Vcpus>,
    saver: Arc<VcpuSaver>,
    vm: Arc<VmFd>,
    slots: Arc<GuestSlots>,
    ring: Option<EnabledRing>,
    kind: TrackerKind,
    fault: Option<Arc<UserFault>>,
    needs: Bytes,
    tsc_khz: u64,
}

impl IoHandler for Bus {
    fn port_write(&self, port: u16, data: &[u8]) {
        self.write(port, data);
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.read(port, data);
    }
}

impl KvmProcessors {
    /// Builds everything that takes time. Slots are built before the irqchip, and the irqchip
    /// before the vCPUs.
    pub(super) fn new(
        kvm: &Kvm,
        ram: Arc<dyn GuestRam>,
        cpus: u32,
        wanted: TrackerKind,
        fault: Option<Arc<UserFault>>,
        bus: Arc<Bus>,
        line: &vmm_sys_util::eventfd::EventFd,
    ) -> Result<Self, String> {
        let ioctl = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
        let kind = Probe::new(kvm).choose(wanted).map_err(describe)?;
        let vm = Arc::new(kvm.create_vm().map_err(ioctl("creating a VM"))?);
        let ring = (kind == TrackerKind::DirtyRing)
            .then(|| DirtyRing::enable(vm.clone(), 65_536))
            .transpose()
            .map_err(describe)?;
        let slots = install_slots(&vm, ram)?;
        vm.create_irq_chip().map_err(ioctl("creating the irqchip"))?;
        vm.create_pit2(kvm_pit_config::default()).map_err(ioctl("creating the timer"))?;
        vm.register_irqfd(line, SERIAL_GSI).map_err(ioctl("wiring the serial port's interrupt"))?;
        let mut saver = VcpuSaver::probe(kvm, &vm).map_err(describe)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("asking for CPUID"))?;
        let mut fds = Vec::new();
        for index in 0..cpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(ioctl("creating a vCPU"))?;
            let mut cpuid = cpuid.clone();
            set_topology(cpuid.as_mut_slice(), index, cpus);
            vcpu.set_cpuid2(&cpuid).map_err(ioctl("setting CPUID"))?;
            if let Some(ring) = &ring {
                ring.collector().add_vcpu(&vcpu).map_err(describe)?;
            }
            fds.push(vcpu);
        }
        let first = fds.first().ok_or("a VM needs a vCPU")?;
        saver.learn(first).map_err(describe)?;
        let needs = HostNeeds::of(kvm, &vm, first, IRQCHIP).map_err(describe)?.encode();
        let tsc_khz = first.get_tsc_khz().map_or(0, u64::from);
        let collect = ring.as_ref().map(|ring| {
            let collector = ring.collector();
            let collect = move || collector.collect().map(drop).map_err(describe);
            Box::new(collect) as RingFull
        });
        let starting = |e: io::Error| format!("starting vCPU threads: {e}");
        let host = VcpuHost {
            memory: slots.clone(),
            io: bus,
            ring_full: collect,
            signal: KickSignal::install(libc::SIGUSR1).map_err(starting)?,
            spawner: Arc::new(StdSpawner),
            observer: Arc::new(Logged),
        };
        let vcpus = Vcpus::new(fds, host).map_err(starting)?;
        let (vcpus, saver) = (Arc::new(vcpus), Arc::new(saver));
        Ok(Self { vcpus, saver, vm, slots, ring, kind, fault, needs: needs.into(), tsc_khz })
    }
}

/// Sets the topology that a vCPU reports: it is number `index` of a package of `cpus` cores without
/// hyperthreads. KVM's supported values describe the topology of the host CPU that happened to
/// answer.
fn set_topology(entries: &mut [kvm_cpuid_entry2], index: u32, cpus: u32) {
    // APIC IDs are below the next power of two
    let ids = cpus.next_power_of_two();
    let bits = ids.trailing_zeros();
    for entry in entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | ids << 16 | index << 24;
                // HTT: the number of IDs above is valid
                entry.edx = entry.edx & !(1 << 28) | u32::from(cpus > 1) << 28;
            }
            // Intel's caches: all CPUs share those of the third level and beyond, and share no
            // others
            4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (ids - 1) << 26;
            }
            0xb | 0x1f => {
                (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                    0 => (0, 1, 0x100),
                    1 => (bits, cpus, 0x201),
                    n => (0, 0, n & 0xff),
                };
                entry.edx = index;
            }
            // AMD's counterparts of 1, 4 and 0xb
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (cpus - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
}

impl Processors for KvmProcessors {
    fn perform(&self, _spec: &str) -> Result<(), String> {
        Err("vCPUs run the workloads' kernel".into())
    }

    fn boot(&self, entry: u64, start_info: u64) -> Result<(), String> {
        // the other vCPUs wait for the first one's INIT, as at power-on
        let set = move |index: usize, vcpu: &mut VcpuFd| {
            if index != 0 {
                return Ok(());
            }
            let mut sregs = vcpu.get_sregs()?;
            let regs = boot::entry_state(entry, start_info, &mut sregs);
            vcpu.set_sregs(&sregs)?;
            vcpu.set_regs(&regs)
        };
        let done = self.vcpus.on_each(set).map_err(describe)?;
        done.into_iter()
            .collect::<Result<(), kvm_ioctls::Error>>()
            .map_err(|e| format!("setting the boot CPU's registers: {e}"))
    }

    fn run(&self) {
        self.vcpus.run();
    }

    fn pause(&self) -> Result<(), VmError> {
        Ok(self.vcpus.pause()?)
    }

    fn hold(&self, held: bool) {
        self.vcpus.hold(held);
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.vcpus.throttle(percent).map_err(|e| VmError::because("starting the throttle", e))
    }

    fn save(&self, into: &mut VmState) -> Result<(), VmError> {
        into.sections.push(state::save_vm(&self.saver, &self.vm, IRQCHIP)?);
        let saver = self.saver.clone();
        // every exit was completed when the vCPUs stopped
        let save = move |index: usize, vcpu: &mut VcpuFd| state::save_vcpu(vcpu, index as u32, &saver, |_| false);
        for section in self.vcpus.on_each(save)? {
            into.sections.push(section?);
        }
        Ok(())
    }

    fn load(&self, from: &VmState) -> Result<(), VmError> {
        let missing = |name: &str, n: usize| VmError::new(format!("the state has no section {name} {n}"));
        let vm = from.find(VM_SECTION, 0).ok_or_else(|| missing(VM_SECTION, 0))?;
        let clock = Arc::new(state::load_clock(&self.vm, vm)?);
        let (saver, sections, its_clock) = (self.saver.clone(), from.clone(), clock.clone());
        let load = move |index: usize, vcpu: &mut VcpuFd| -> Result<(), VmError> {
            let section = sections.find(VCPU_SECTION, index as u32).ok_or_else(|| missing(VCPU_SECTION, index))?;
            state::load_vcpu(vcpu, section, &saver, &its_clock)?;
            Ok(())
        };
        let loaded = self.vcpus.on_each(load)?;
        loaded.into_iter().collect::<Result<(), _>>()?;
        Ok(state::load_vm(&self.vm, vm, IRQCHIP, &clock)?)
    }

    fn host_needs(&self) -> Bytes {
        self.needs.clone()
    }

    fn tracker(&self) -> Result<Box<dyn DirtyTracker>, String> {
        let (vm, slots) = (self.vm.clone(), self.slots.clone());
        let parts = Parts { vm, slots, user_fault: self.fault.clone(), ring: self.ring.as_ref() };
        build(self.kind, parts).map_err(describe)
    }

    fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    fn threads(&self) -> Vec<u32> {
        self.vcpus.thread_ids().to_vec()
    }

    fn end_watch(&self) -> Box<dyn FnOnce() -> Option<String> + Send> {
        Box::new(self.vcpus.end_watch())
    }

    fn end(&self) -> Option<String> {
        self.vcpus.end()
    }

    fn pre_fault(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.vcpus.on_first(move |vcpu| state::pre_fault(vcpu, gpa, len)).map_err(io::Error::other)?
    }

    fn shut_down(&self) {
        self.vcpus.shut_down();
    }
}
