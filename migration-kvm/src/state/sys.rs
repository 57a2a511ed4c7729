//! The ioctls that kvm-ioctls lacks, or offers only as unsafe functions, and the bytes of plain structs.
//! The only unsafe code of [`state`](super).

use std::{io, os::fd::AsRawFd, ptr, slice};

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_dtable, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};

/// Bytes of the XSAVE area that every KVM takes (`struct kvm_xsave`).
pub(super) const XSAVE_SIZE: usize = 4096;
/// Bytes that [`xsave2`] and [`set_xsave`] hand to KVM at least, whatever size was probed: a process that asks for more
/// XSTATE components *after* the probe makes KVM's area larger. AMX, the largest that Linux knows, ends at 11,008.
const XSAVE_ROOM: usize = 16 << 10;
/// Bytes of the header of `struct kvm_nested_state`.
pub(super) const NESTED_HEADER: usize = 128;
/// Most bytes of nested state: the header and two VMCS pages (VMX); SVM needs one page.
pub(super) const MAX_NESTED: usize = NESTED_HEADER + 2 * 4096;
/// The guest's shadow stack pointer as a register of `KVM_GET_ONE_REG` (Linux 6.18).
const REG_GUEST_SSP: u64 = 0x2030_0003_0000_0000;

/// A plain struct of KVM's interface.
///
/// # Safety
/// Without padding, without pointers, and valid for every bit pattern.
pub(super) unsafe trait Pod: Copy + Default {}

// SAFETY (all of them): bindgen made them from the kernel's headers; the kernel spells out all padding as fields, all
// fields are integers or arrays or structs of integers.
macro_rules! pod {
    ($($t:ty = $size:expr),* $(,)?) => {$(
        // SAFETY: see above; a change of the size would mean a change of the kernel's interface.
        unsafe impl Pod for $t {}
        const _: () = assert!(size_of::<$t>() == $size);
    )*};
}

pod! {
    kvm_regs = 144,
    kvm_sregs = 312,
    Sregs2 = 320,
    kvm_xcrs = 392,
    kvm_debugregs = 128,
    kvm_vcpu_events = 64,
    kvm_mp_state = 4,
    kvm_clock_data = 48,
    kvm_pit_state2 = 112,
}

/// `struct kvm_sregs2`, which kvm-bindings lacks: the segment and control registers, with the page directory pointers
/// of PAE paging, and without the pending interrupt, which the events hold as well.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Sregs2 {
    pub cs: kvm_segment,
    pub ds: kvm_segment,
    pub es: kvm_segment,
    pub fs: kvm_segment,
    pub gs: kvm_segment,
    pub ss: kvm_segment,
    pub tr: kvm_segment,
    pub ldt: kvm_segment,
    pub gdt: kvm_dtable,
    pub idt: kvm_dtable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    pub flags: u64,
    pub pdptrs: [u64; 4],
}

/// The bytes of a struct.
pub(super) fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a `Pod` has no padding, so all its bytes are initialised; the slice borrows `value`.
    unsafe { slice::from_raw_parts(ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The struct of these bytes; none if they are not exactly as many as it has.
pub(super) fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked, any bit pattern is a `T`, and the read needs no alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
}

const READ: u64 = 2;
const WRITE: u64 = 1;

/// The number of a KVM ioctl whose argument has `size` bytes.
const fn kvm(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// # Safety
/// `arg` must be valid for what the ioctl `request` reads and writes.
unsafe fn ioctl<F: AsRawFd, T>(fd: &F, request: u64, arg: *mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for `arg`; the descriptor lives as long as `fd` is borrowed.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request, arg) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `KVM_GET_SREGS2`.
pub(super) fn sregs2(vcpu: &VcpuFd) -> io::Result<Sregs2> {
    let mut sregs = Sregs2::default();
    // SAFETY: KVM writes one `struct kvm_sregs2`, which `Sregs2` is.
    unsafe { ioctl(vcpu, kvm(READ, 0xcc, size_of::<Sregs2>()), &mut sregs) }.map(|()| sregs)
}

/// `KVM_SET_SREGS2`.
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &Sregs2) -> io::Result<()> {
    let mut sregs = *sregs;
    // SAFETY: KVM reads one `struct kvm_sregs2`, which `Sregs2` is.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xcd, size_of::<Sregs2>()), &mut sregs) }
}

/// `struct kvm_pre_fault_memory`, which KVM counts down as it goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PreFault {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) padding: [u64; 5],
}

/// `KVM_PRE_FAULT_MEMORY`.
pub(super) fn pre_fault(vcpu: &VcpuFd, range: &mut PreFault) -> io::Result<()> {
    // SAFETY: KVM reads and writes one `struct kvm_pre_fault_memory`, which `PreFault` is; it maps guest memory, which it does
    // for any guest that runs.
    unsafe { ioctl(vcpu, kvm(READ | WRITE, 0xd5, size_of::<PreFault>()), range) }
}

/// A zeroed buffer that is large enough for KVM's XSAVE area of `size` bytes. Of words, as KVM's struct is aligned.
fn xsave_room(size: usize) -> Vec<u64> {
    vec![0; size.max(XSAVE_ROOM).div_ceil(8)]
}

/// The XSAVE area of `size` bytes: `KVM_GET_XSAVE2`, or `KVM_GET_XSAVE` where `xsave2` says that the other is absent.
pub(super) fn xsave(vcpu: &VcpuFd, size: usize, xsave2: bool) -> io::Result<Vec<u8>> {
    let mut room = xsave_room(size);
    let number = if xsave2 { 0xcf } else { 0xa4 };
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes; KVM_GET_XSAVE2 writes as many as KVM_CAP_XSAVE2 says, which is the probed
    // size, or more if the process asked for components since; `XSAVE_ROOM` covers all that exist.
    unsafe { ioctl(vcpu, kvm(READ, number, XSAVE_SIZE), room.as_mut_ptr()) }?;
    // SAFETY: `room` holds at least `size` initialised bytes.
    Ok(unsafe { slice::from_raw_parts(room.as_ptr().cast::<u8>(), size) }.to_vec())
}

/// `KVM_SET_XSAVE`: `area`, and zeros behind it; `size` is what KVM was probed to take.
pub(super) fn set_xsave(vcpu: &VcpuFd, area: &[u8], size: usize) -> io::Result<()> {
    let mut room = xsave_room(area.len().max(size));
    // SAFETY: `room` holds at least as many bytes as `area`.
    unsafe { slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), area.len()) }.copy_from_slice(area);
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, at least 4096: the probed size, or what `XSAVE_ROOM` covers.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xa5, XSAVE_SIZE), room.as_mut_ptr()) }
}

/// The vCPU's TSC offset in ticks: what is added to the host's TSC (modulo 2^64).
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let mut attr = kvm_device_attr { addr: ptr::from_mut(&mut offset) as u64, ..Default::default() };
    // SAFETY: KVM reads `attr` (group and attribute 0: the TSC offset) and writes a u64 to its address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xe2, size_of::<kvm_device_attr>()), &mut attr) }.map(|()| offset)
}

/// Sets what [`tsc_offset`] returns.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let mut attr = kvm_device_attr { addr: ptr::from_ref(&offset) as u64, ..Default::default() };
    // SAFETY: KVM reads `attr` (group and attribute 0: the TSC offset) and a u64 at its address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xe1, size_of::<kvm_device_attr>()), &mut attr) }
}

/// `KVM_GET_NESTED_STATE`.
pub(super) fn nested(vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
    let mut room = vec![0u8; MAX_NESTED];
    room[4..8].copy_from_slice(&(MAX_NESTED as u32).to_ne_bytes());
    // SAFETY: KVM writes at most as many bytes as the header's size field (offset 4) says, which is all of `room`.
    unsafe { ioctl(vcpu, kvm(READ | WRITE, 0xbe, NESTED_HEADER), room.as_mut_ptr()) }?;
    room.truncate(nested_size(&room).clamp(NESTED_HEADER, MAX_NESTED));
    Ok(room)
}

/// What the size field of nested state says; 0 if there is none.
pub(super) fn nested_size(state: &[u8]) -> usize {
    state.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, |b| u32::from_ne_bytes(b) as usize)
}

/// `KVM_SET_NESTED_STATE`.
pub(super) fn set_nested(vcpu: &VcpuFd, state: &[u8]) -> io::Result<()> {
    if state.len() < NESTED_HEADER || nested_size(state) != state.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut room = state.to_vec();
    // A format says which page(s) follow the header, whatever the size says: give KVM room for the larger.
    room.resize(MAX_NESTED.max(state.len()), 0);
    // SAFETY: KVM reads the header and at most two pages behind it; `room` has all of that.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xbf, NESTED_HEADER), room.as_mut_ptr()) }
}

#[repr(C)]
struct OneReg {
    id: u64,
    addr: u64,
}

/// The guest's shadow stack pointer.
pub(super) fn guest_ssp(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let mut reg = OneReg { id: REG_GUEST_SSP, addr: ptr::from_mut(&mut value) as u64 };
    // SAFETY: KVM reads `reg`, whose id says that the register has 64 bits, and writes a u64 to its address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xab, size_of::<OneReg>()), &mut reg) }.map(|()| value)
}

/// Sets what [`guest_ssp`] returns.
pub(super) fn set_guest_ssp(vcpu: &VcpuFd, value: u64) -> io::Result<()> {
    let mut reg = OneReg { id: REG_GUEST_SSP, addr: ptr::from_ref(&value) as u64 };
    // SAFETY: KVM reads `reg`, whose id says that the register has 64 bits, and a u64 at its address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xac, size_of::<OneReg>()), &mut reg) }
}

/// Bytes of one interrupt controller's state in `struct kvm_irqchip`.
pub(super) const CHIP_SIZE: usize = 512;

/// `struct kvm_irqchip` with its union as bytes.
#[repr(C)]
struct Chip {
    id: u32,
    pad: u32,
    data: [u8; CHIP_SIZE],
}

/// `KVM_GET_IRQCHIP` of the chip `id` (PIC master, PIC slave, IOAPIC).
pub(super) fn chip(vm: &VmFd, id: u32) -> io::Result<[u8; CHIP_SIZE]> {
    let mut chip = Chip { id, pad: 0, data: [0; CHIP_SIZE] };
    // SAFETY: KVM reads and writes one `struct kvm_irqchip`, which `Chip` is.
    unsafe { ioctl(vm, kvm(READ | WRITE, 0x62, size_of::<Chip>()), &mut chip) }.map(|()| chip.data)
}

/// `KVM_SET_IRQCHIP` of the chip `id`.
pub(super) fn set_chip(vm: &VmFd, id: u32, data: &[u8; CHIP_SIZE]) -> io::Result<()> {
    let mut chip = Chip { id, pad: 0, data: *data };
    // SAFETY: KVM reads one `struct kvm_irqchip`, which `Chip` is. (Its number says "read", a slip of the interface.)
    unsafe { ioctl(vm, kvm(READ, 0x63, size_of::<Chip>()), &mut chip) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_read_back() {
        let regs = kvm_regs { rip: 1 << 63, rflags: 2, ..Default::default() };
        assert_eq!(from_bytes::<kvm_regs>(bytes_of(&regs)), Some(regs));
        assert_eq!(from_bytes::<kvm_regs>(&bytes_of(&regs)[1..]), None);
        assert_eq!(from_bytes::<kvm_mp_state>(&[0; 5]), None);
    }

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(kvm(READ, 0xcf, XSAVE_SIZE), 0x9000_aecf);
        assert_eq!(kvm(READ | WRITE, 0x62, size_of::<Chip>()), 0xc208_ae62);
    }
}
