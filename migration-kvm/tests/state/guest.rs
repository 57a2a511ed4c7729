//! A guest that starts in ring 3 and counts in memory, in RAX and in the lanes of a vector
//! register. It stores the count to an MMIO address at intervals.

use std::{
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2, kvm_enable_cap, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use migration_core::state::Section;
use migration_kvm::state::{
    ClockLoaded, Irqchip, KvmState, SpecialRegs, StateError, VcpuSaver, VcpuState, load_clock, load_vcpu, load_vm,
    save_vcpu, save_vm,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub const RAM_SIZE: usize = 2 << 20;
pub const CODE: usize = 0x10000;
pub const READ_CODE: usize = 0x11000;
pub const COUNTERS: usize = 0x20000;
pub const MMIO: u64 = 0x40_0000;
pub const AVX2: u32 = 1 << 5;

/// `loop: inc qword [rdi]; vpaddq ymm0, ymm0, ymm1; inc rax; dec rcx; jnz loop; mov [rsi], rax; mov
/// rcx, rdx; jmp loop`
pub const COUNT: &[u8] = &[
    0x48, 0xff, 0x07, 0xc5, 0xfd, 0xd4, 0xc1, 0x48, 0xff, 0xc0, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0x48, 0x89, 0x06, 0x48,
    0x89, 0xd1, 0xeb, 0xe9,
];
/// The instruction `paddq xmm0, xmm1` in place of `vpaddq`, for a host without AVX2.
pub const PADDQ: [u8; 4] = [0x66, 0x0f, 0xd4, 0xc1];
/// `loop: mov rbx, [rsi]; add rbx, 1; mov [rsi], rbx; jmp loop`
pub const READ: &[u8] = &[0x48, 0x8b, 0x1e, 0x48, 0x83, 0xc3, 0x01, 0x48, 0x89, 0x1e, 0xeb, 0xf4];

pub struct Ram(*mut u8);

impl Ram {
    pub fn new() -> Self {
        // SAFETY: the kernel chooses the address of the new anonymous mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at.cast())
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= RAM_SIZE);
        // SAFETY: inside the mapping, and no vCPU runs while the tests write.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) }
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= RAM_SIZE);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping, and no vCPU runs while the tests read.
        unsafe { std::ptr::copy_nonoverlapping(self.0.add(at), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.read(at, 8).try_into().unwrap())
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping, and the VM is dropped before it (order of fields in
        // `Guest`).
        unsafe { libc::munmap(self.0.cast(), RAM_SIZE) };
    }
}

pub struct Guest {
    pub vcpus: Vec<VcpuFd>,
    pub saver: VcpuSaver,
    pub irqchip: Irqchip,
    pub vm: VmFd,
    pub ram: Ram,
    pub kvm: Kvm,
}

impl Guest {
    /// Makes a VM with RAM, interrupt chips and vCPUs, and without state.
    pub fn bare(vcpus: usize, irqchip: Irqchip) -> Self {
        let kvm = Kvm::new().expect("KVM is required");
        let vm = kvm.create_vm().unwrap();
        let ram = Ram::new();
        let region = kvm_userspace_memory_region {
            memory_size: RAM_SIZE as u64,
            userspace_addr: ram.0 as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM (both are in `Guest`, the VM first).
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        match irqchip {
            Irqchip::None => {}
            Irqchip::Split => {
                let cap = kvm_enable_cap { cap: Cap::SplitIrqchip as u32, args: [24, 0, 0, 0], ..Default::default() };
                vm.enable_cap(&cap).unwrap();
            }
            Irqchip::Full => {
                vm.create_irq_chip().unwrap();
                let _ = vm.create_pit2(Default::default());
            }
        }
        let vcpus = (0..vcpus).map(|i| vm.create_vcpu(i as u64).unwrap()).collect();
        let saver = VcpuSaver::probe(&kvm, &vm).unwrap();
        Self { vcpus, saver, irqchip, vm, ram, kvm }
    }

    /// Makes a VM that is ready to count.
    pub fn counting(vcpus: usize, irqchip: Irqchip, code: usize) -> Self {
        let mut guest = Self::bare(vcpus, irqchip);
        let avx2 = cpuid(&guest.kvm, 0).iter().any(|e| e.function == 7 && e.index == 0 && e.ebx & AVX2 != 0);
        for (at, entry) in [(0x1000, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x87), (0x3010, MMIO | 0x87)] {
            guest.ram.write(at, &entry.to_le_bytes());
        }
        guest.ram.write(CODE, COUNT);
        guest.ram.write(READ_CODE, READ);
        if !avx2 {
            guest.ram.write(CODE + 3, &PADDQ);
        }
        for (i, vcpu) in guest.vcpus.iter().enumerate() {
            let set = kvm_bindings::CpuId::from_entries(&cpuid(&guest.kvm, i as u32)).unwrap();
            vcpu.set_cpuid2(&set).unwrap();
            let mut state = guest.saver.save(vcpu).unwrap();
            start(&mut state, i, code as u64, avx2);
            // loaded by the crate itself, because setting the XSAVE area needs unsafe code
            // otherwise
            guest.saver.load(vcpu, &state, &ClockLoaded::none()).unwrap();
        }
        guest.saver.learn(&guest.vcpus[0]).unwrap();
        guest
    }

    /// Runs all vCPUs on their own threads for a while, stops them wherever they are, and saves
    /// each on its thread.
    pub fn run_and_save(&mut self, time: Duration) -> Vec<Section> {
        static HANDLER: Once = Once::new();
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        HANDLER.call_once(|| register_signal_handler(SIGRTMIN(), nothing).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = std::mem::take(&mut self.vcpus)
            .into_iter()
            .enumerate()
            .map(|(i, mut vcpu)| {
                let (stop, saver) = (stop.clone(), self.saver.clone());
                thread::spawn(move || {
                    loop {
                        match vcpu.run() {
                            Ok(VcpuExit::MmioWrite(MMIO, _)) => {}
                            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
                            other => panic!("unexpected exit {other:?}"),
                        }
                        if stop.load(Relaxed) {
                            break;
                        }
                    }
                    let section = save_vcpu(&mut vcpu, i as u32, &saver, |_| false).unwrap();
                    (vcpu, section)
                })
            })
            .collect();
        thread::sleep(time);
        stop.store(true, Relaxed);
        let mut sections = Vec::new();
        for thread in threads {
            while !thread.is_finished() {
                let _ = thread.kill(0);
                thread::sleep(Duration::from_millis(1));
            }
            let (vcpu, section) = thread.join().unwrap();
            self.vcpus.push(vcpu);
            sections.push(section);
        }
        sections
    }

    pub fn save_all(&mut self) -> (Section, Vec<Section>) {
        let saver = &self.saver;
        let vcpus =
            self.vcpus.iter_mut().enumerate().map(|(i, v)| save_vcpu(v, i as u32, saver, |_| false).unwrap()).collect();
        (save_vm(saver, &self.vm, self.irqchip).unwrap(), vcpus)
    }

    /// Makes a new VM with that state and a copy of `source`'s RAM.
    pub fn loaded(source: &Guest, vm: &Section, vcpus: &[Section]) -> Result<Self, StateError> {
        let mut guest = Self::bare(vcpus.len(), source.irqchip);
        guest.ram.write(0, &source.ram.read(0, RAM_SIZE));
        let clock = load_clock(&guest.vm, vm)?;
        for (vcpu, section) in guest.vcpus.iter_mut().zip(vcpus) {
            load_vcpu(vcpu, section, &guest.saver, &clock)?;
        }
        load_vm(&guest.vm, vm, guest.irqchip, &clock)?;
        guest.saver.learn(&guest.vcpus[0])?;
        Ok(guest)
    }

    /// Runs a vCPU until it stores its count. Returns the count.
    pub fn next_count(&mut self, vcpu: usize) -> u64 {
        loop {
            match self.vcpus[vcpu].run() {
                Ok(VcpuExit::MmioWrite(MMIO, data)) => return u64::from_le_bytes(data.try_into().unwrap()),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}

/// Returns the supported CPUID with the APIC id inserted, as a VMM would set it.
pub fn cpuid(kvm: &Kvm, id: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = kvm.get_supported_cpuid(256).unwrap().as_slice().to_vec();
    for e in &mut entries {
        match e.function {
            1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => e.edx = id,
            _ => {}
        }
    }
    entries
}

/// Sets a vCPU to the start of the program, in ring 3 of long mode.
pub fn start(state: &mut VcpuState, index: usize, rip: u64, avx2: bool) {
    let segment = |type_, selector, l| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    let (code, data) = (segment(0xb, 0x33, 1), segment(3, 0x2b, 0));
    let (cr0, cr3, cr4, efer) = (0x8001_0033, 0x1000, 0x620 | 0x4_0000, 0xd01);
    macro_rules! set {
        ($s:expr) => {{
            ($s.cs, $s.ds, $s.es, $s.fs, $s.gs, $s.ss) = (code, data, data, data, data, data);
            ($s.cr0, $s.cr3, $s.cr4, $s.efer) = (cr0, cr3, cr4, efer);
        }};
    }
    match &mut state.sregs {
        SpecialRegs::Plain(s) => set!(s),
        SpecialRegs::WithPdptrs(s) => set!(s),
    }
    let counter = (COUNTERS + index * 0x1000) as u64;
    let rounds = 200_000 + 1000 * index as u64;
    state.regs = kvm_regs {
        rip,
        rflags: 2,
        rdi: counter,
        rsi: MMIO,
        rcx: rounds,
        rdx: rounds,
        r8: 0x1111 * (index as u64 + 1),
        r15: u64::MAX - index as u64,
        ..Default::default()
    };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = if avx2 { 7 } else { 3 };
    state.xcrs = Some(xcrs);
    state.mp_state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    state.xsave[512..520].copy_from_slice(&xcrs.xcrs[0].value.to_le_bytes());
    for lane in 0..if avx2 { 4 } else { 2 } {
        set_lane(state, 1, lane, 1);
        // a register that the program does not use
        set_lane(state, 9, lane, 0xabcd_0000 + (index * 16 + lane) as u64);
    }
}

/// Returns the offset of a 64-bit lane of a YMM register in the XSAVE area.
pub fn lane_at(register: usize, lane: usize) -> usize {
    if lane < 2 { 160 + 16 * register + 8 * lane } else { 576 + 16 * register + 8 * (lane - 2) }
}

pub fn set_lane(state: &mut VcpuState, register: usize, lane: usize, value: u64) {
    let at = lane_at(register, lane);
    state.xsave[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

pub fn lane(state: &VcpuState, register: usize, lane: usize) -> u64 {
    let at = lane_at(register, lane);
    u64::from_le_bytes(state.xsave[at..at + 8].try_into().unwrap())
}

/// Decodes a state without the values that change by themselves: the TSC and the LAPIC timer's
/// current count.
pub fn at_rest(section: &Section) -> VcpuState {
    let mut state = VcpuState::decode(&section.data).unwrap();
    state.tsc_offset = None;
    state.msrs.iter_mut().filter(|msr| msr.index == 0x10).for_each(|msr| msr.data = 0);
    // the second VM determines itself what cannot be read, and the order may differ
    state.unread_msrs.sort_unstable();
    if let Some(lapic) = &mut state.lapic {
        lapic[0x390..0x394].fill(0);
    }
    state
}

pub fn vm_at_rest(section: &Section) -> KvmState {
    let mut state = KvmState::decode(&section.data).unwrap();
    state.clock = None;
    if let Some(pit) = &mut state.pit {
        pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    }
    state
}
