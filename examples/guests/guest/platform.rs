//! The machine as ring 3 sees it: clock, serial port, LAPIC, sleep and shutdown.

use core::arch::{asm, x86_64};
use core::fmt;
use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::boot::{SPURIOUS_VECTOR, TIMER_VECTOR, TRAMPOLINE, trampoline_end, trampoline_start};

const SERIAL_PORT: u16 = 0x3f8;

/// The page of the local APIC, mapped by boot.rs.
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_SPURIOUS: u64 = 0x0f0;
const LAPIC_COMMAND: u64 = 0x300;
const LAPIC_COMMAND_TARGET: u64 = 0x310;
const LAPIC_TIMER: u64 = 0x320;
const LAPIC_TIMER_COUNT: u64 = 0x380;
const LAPIC_TIMER_DIVIDE: u64 = 0x3e0;
/// The LAPIC timer of KVM (and of QEMU) counts nanoseconds.
const LAPIC_TIMER_HZ: u64 = 1_000_000_000;

/// The frequency that is assumed if nothing tells it. Only the pace of a few workloads depends on
/// it.
const DEFAULT_TSC_KHZ: u64 = 2_600_000;

static TSC_KHZ: AtomicU64 = AtomicU64::new(DEFAULT_TSC_KHZ);

/// Returns the time stamp counter.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: CR4.TSD is clear, and the instruction has no other effect.
    unsafe { x86_64::_rdtsc() }
}

/// Sets the frequency of the clock to `told` if it is not 0, else to that from CPUID, else to a
/// guess. Returns it in kHz.
pub fn settle_clock(told: u64) -> u64 {
    let khz = if told != 0 { told } else { cpuid_khz().unwrap_or(DEFAULT_TSC_KHZ) };
    TSC_KHZ.store(khz, Ordering::Relaxed);
    khz
}

fn cpuid(leaf: u32) -> x86_64::CpuidResult {
    // SAFETY: every x86-64 CPU has the instruction. (Newer compilers know that.)
    #[allow(unused_unsafe)]
    unsafe {
        x86_64::__cpuid(leaf)
    }
}

fn cpuid_khz() -> Option<u64> {
    let top = cpuid(0).eax;
    if top >= 0x15 {
        let leaf = cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    if cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = cpuid(0x4000_0010).eax;
        if khz != 0 {
            return Some(u64::from(khz));
        }
    }
    let mhz = if top >= 0x16 { cpuid(0x16).eax & 0xffff } else { 0 };
    (mhz != 0).then(|| u64::from(mhz) * 1000)
}

/// Converts microseconds to ticks of the clock.
pub fn ticks(microseconds: u64) -> u64 {
    (u128::from(microseconds) * u128::from(TSC_KHZ.load(Ordering::Relaxed)) / 1000) as u64
}

/// Waits without sleeping.
pub fn spin(microseconds: u64) {
    let end = now() + ticks(microseconds);
    while now() < end {
        core::hint::spin_loop();
    }
}

/// Sleeps until the next interrupt, or for ever if no timer runs.
pub fn halt() {
    // SAFETY: raises #GP in ring 3; the handler sleeps, changes no register, and continues after
    // the instruction.
    unsafe { asm!("hlt", options(nostack)) }
}

/// Ends the guest by a triple fault.
pub fn shut_down() -> ! {
    // SAFETY: raises #GP in ring 3, and the handler does not return.
    unsafe { asm!("cli", options(nostack, noreturn)) }
}

/// Writes a port.
pub fn write_port(port: u16, value: u8) {
    // SAFETY: raises #GP in ring 3; the handler does the same in ring 0. A port does not affect the
    // program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) }
}

/// Reads a port.
pub fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write_port`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) };
    value
}

/// The serial port, for `write!`. [`serial`] returns it.
pub struct Serial(());

static SERIAL_TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the serial port, so that only one CPU prints at a time.
pub fn serial() -> Serial {
    while SERIAL_TAKEN.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    Serial(())
}

/// Returns the serial port even if another CPU has it, for the last message of a guest that fails.
pub fn serial_by_force() -> Serial {
    SERIAL_TAKEN.store(true, Ordering::Relaxed);
    Serial(())
}

impl Drop for Serial {
    fn drop(&mut self) {
        SERIAL_TAKEN.store(false, Ordering::Release);
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Emulated ports accept a byte at any time; polling the status first would double the
        // exits.
        text.bytes().for_each(|byte| write_port(SERIAL_PORT, byte));
        Ok(())
    }
}

fn lapic_write(register: u64, value: u32) {
    // SAFETY: the LAPIC's page is mapped uncached and is not memory of the program.
    unsafe { write_volatile((LAPIC + register) as *mut u32, value) }
}

/// Enables this CPU's LAPIC.
pub fn enable_lapic() {
    lapic_write(LAPIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

/// Starts this CPU's LAPIC timer, so that [`halt`] returns `hz` times a second.
pub fn start_timer(hz: u64) {
    enable_lapic();
    lapic_write(LAPIC_TIMER_DIVIDE, 0b1011); // by 1
    lapic_write(LAPIC_TIMER, 1 << 17 | TIMER_VECTOR); // periodic
    lapic_write(LAPIC_TIMER_COUNT, (LAPIC_TIMER_HZ / hz.max(1)).min(u64::from(u32::MAX)) as u32);
}

/// Copies the 16-bit start code of further CPUs to an address that a SIPI can reach.
pub fn place_trampoline() {
    let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
    // SAFETY: both labels are around the code in the image. Nothing else in the guest uses the page
    // below 1 MiB, and what a loader left there (start info, command line) has been read.
    unsafe { core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, end as usize - start as usize) }
}

/// Sends INIT to the CPU with this APIC id.
pub fn send_init(cpu: usize) {
    send(cpu, 0x0000_4500);
}

/// Sends a start-up IPI, which starts the CPU at [`TRAMPOLINE`].
pub fn send_startup(cpu: usize) {
    send(cpu, 0x0000_4600 | (TRAMPOLINE >> 12) as u32);
}

fn send(cpu: usize, command: u32) {
    lapic_write(LAPIC_COMMAND_TARGET, (cpu as u32) << 24);
    lapic_write(LAPIC_COMMAND, command);
    // SAFETY: as in `lapic_write`. Bit 12 is set until the IPI is delivered.
    while unsafe { read_volatile((LAPIC + LAPIC_COMMAND) as *const u32) } & 1 << 12 != 0 {
        core::hint::spin_loop();
    }
}
