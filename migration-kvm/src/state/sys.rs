//! The ioctls that kvm-ioctls lacks or offers only as unsafe functions, and conversions between
//! plain structs and bytes. All unsafe code of [`state`](super) is in this module.

use std::{io, os::fd::AsRawFd, ptr, slice};

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_dtable, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};

/// The size of the XSAVE area that every KVM accepts (`struct kvm_xsave`), in bytes.
pub(super) const XSAVE_SIZE: usize = 4096;
/// The smallest buffer in bytes that [`xsave`] and [`set_xsave`] pass to KVM, whatever size was
/// probed. A process that requests more XSTATE components *after* the probe makes KVM's area
/// larger. AMX, the largest component that Linux knows, ends at 11,008.
const XSAVE_ROOM: usize = 16 << 10;
/// The length of the header of `struct kvm_nested_state` in bytes.
pub(super) const NESTED_HEADER: usize = 128;
/// The largest nested state in bytes: the header and two VMCS pages (VMX). SVM needs one page.
pub(super) const MAX_NESTED: usize = NESTED_HEADER + 2 * 4096;
/// The guest's shadow stack pointer as a register of `KVM_GET_ONE_REG` (Linux 6.18).
const REG_GUEST_SSP: u64 = 0x2030_0003_0000_0000;

/// A plain struct of KVM's interface.
///
/// # Safety
/// The type must have no padding and no pointers, and every bit pattern must be a valid value.
pub(super) unsafe trait Pod: Copy + Default {}

// SAFETY (all of them): bindgen made these types from the kernel's headers. The kernel declares all
// padding as fields, and all fields are integers, or arrays or structs of integers.
macro_rules! pod {
    ($($t:ty = $size:expr),* $(,)?) => {$(
        // SAFETY: see above. The assertion fails if the kernel's interface changes.
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

/// `struct kvm_sregs2`, which kvm-bindings lacks. It has the segment and control registers and the
/// page directory pointers of PAE paging. The pending interrupt is not in it, because the vCPU's
/// events have it, too.
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

/// Returns the bytes of a struct.
pub(super) fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a `Pod` has no padding, so all its bytes are initialized. The slice borrows `value`.
    unsafe { slice::from_raw_parts(ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Returns the struct with these bytes, or `None` if their number is wrong.
pub(super) fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked, any bit pattern is a `T`, and the read needs no alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
}

const READ: u64 = 2;
const WRITE: u64 = 1;

/// Returns the number of a KVM ioctl whose argument has `size` bytes.
const fn kvm(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// Performs the ioctl `request`.
///
/// # Safety
/// `arg` must be valid for what `request` reads and writes.
unsafe fn ioctl<F: AsRawFd, T>(fd: &F, request: u64, arg: *mut T) -> io::Result<()> {
    // SAFETY: the caller guarantees `arg`, and the descriptor is open as long as `fd` is borrowed.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request, arg) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns the registers of `KVM_GET_SREGS2`.
pub(super) fn sregs2(vcpu: &VcpuFd) -> io::Result<Sregs2> {
    let mut sregs = Sregs2::default();
    // SAFETY: KVM writes one `struct kvm_sregs2`, which `Sregs2` is.
    unsafe { ioctl(vcpu, kvm(READ, 0xcc, size_of::<Sregs2>()), &mut sregs) }.map(|()| sregs)
}

/// Sets the registers with `KVM_SET_SREGS2`.
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &Sregs2) -> io::Result<()> {
    let mut sregs = *sregs;
    // SAFETY: KVM reads one `struct kvm_sregs2`, which `Sregs2` is.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xcd, size_of::<Sregs2>()), &mut sregs) }
}

/// `struct kvm_pre_fault_memory`. KVM advances `gpa` and reduces `size` as it maps pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PreFault {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) padding: [u64; 5],
}

/// Maps guest memory with `KVM_PRE_FAULT_MEMORY`.
pub(super) fn pre_fault(vcpu: &VcpuFd, range: &mut PreFault) -> io::Result<()> {
    // SAFETY: KVM reads and writes one `struct kvm_pre_fault_memory`, which `PreFault` is. It maps
    // guest memory like for any running guest.
    unsafe { ioctl(vcpu, kvm(READ | WRITE, 0xd5, size_of::<PreFault>()), range) }
}

/// Returns a zeroed buffer that is large enough for KVM's XSAVE area of `size` bytes. It consists
/// of `u64` values because KVM's struct has that alignment.
fn xsave_room(size: usize) -> Vec<u64> {
    vec![0; size.max(XSAVE_ROOM).div_ceil(8)]
}

/// Returns the XSAVE area of `size` bytes, read with `KVM_GET_XSAVE2` if `xsave2` is set and with
/// `KVM_GET_XSAVE` otherwise.
pub(super) fn xsave(vcpu: &VcpuFd, size: usize, xsave2: bool) -> io::Result<Vec<u8>> {
    let mut room = xsave_room(size);
    let number = if xsave2 { 0xcf } else { 0xa4 };
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes. KVM_GET_XSAVE2 writes the number of bytes that
    // KVM_CAP_XSAVE2 returns. That is the probed size, or more if the process has requested
    // components since; `XSAVE_ROOM` is enough for all that exist.
    unsafe { ioctl(vcpu, kvm(READ, number, XSAVE_SIZE), room.as_mut_ptr()) }?;
    // SAFETY: `room` holds at least `size` initialized bytes.
    Ok(unsafe { slice::from_raw_parts(room.as_ptr().cast::<u8>(), size) }.to_vec())
}

/// Sets the XSAVE area with `KVM_SET_XSAVE`: `area`, followed by zeros. `size` is the probed size.
pub(super) fn set_xsave(vcpu: &VcpuFd, area: &[u8], size: usize) -> io::Result<()> {
    let mut room = xsave_room(area.len().max(size));
    // SAFETY: `room` holds at least as many bytes as `area`.
    unsafe { slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), area.len()) }.copy_from_slice(area);
    // SAFETY: KVM reads the number of bytes that KVM_CAP_XSAVE2 returns, at least 4096. That is the
    // probed size, or at most `XSAVE_ROOM`.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xa5, XSAVE_SIZE), room.as_mut_ptr()) }
}

/// Returns the vCPU's TSC offset in ticks: the number that is added to the host's TSC, modulo 2^64.
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let mut attr = kvm_device_attr { addr: ptr::from_mut(&mut offset) as u64, ..Default::default() };
    // SAFETY: KVM reads `attr` (group and attribute 0: the TSC offset) and writes a u64 to its
    // address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xe2, size_of::<kvm_device_attr>()), &mut attr) }.map(|()| offset)
}

/// Sets the vCPU's TSC offset, see [`tsc_offset`].
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let mut attr = kvm_device_attr { addr: ptr::from_ref(&offset) as u64, ..Default::default() };
    // SAFETY: KVM reads `attr` (group and attribute 0: the TSC offset) and a u64 at its address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xe1, size_of::<kvm_device_attr>()), &mut attr) }
}

/// Returns the nested state (`KVM_GET_NESTED_STATE`).
pub(super) fn nested(vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
    let mut room = vec![0u8; MAX_NESTED];
    room[4..8].copy_from_slice(&(MAX_NESTED as u32).to_ne_bytes());
    // SAFETY: KVM writes at most the number of bytes in the header's size field (offset 4), which
    // is the length of `room`.
    unsafe { ioctl(vcpu, kvm(READ | WRITE, 0xbe, NESTED_HEADER), room.as_mut_ptr()) }?;
    room.truncate(nested_size(&room).clamp(NESTED_HEADER, MAX_NESTED));
    Ok(room)
}

/// Returns the size field of a nested state, or 0 if the state is too short for one.
pub(super) fn nested_size(state: &[u8]) -> usize {
    state.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, |b| u32::from_ne_bytes(b) as usize)
}

/// Sets the nested state with `KVM_SET_NESTED_STATE`.
///
/// # Errors
/// Fails with `EINVAL` if the size field does not match, and with KVM's errors.
pub(super) fn set_nested(vcpu: &VcpuFd, state: &[u8]) -> io::Result<()> {
    if state.len() < NESTED_HEADER || nested_size(state) != state.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut room = state.to_vec();
    // the format decides how many pages follow the header, whatever the size field is, so give KVM
    // room for the most
    room.resize(MAX_NESTED.max(state.len()), 0);
    // SAFETY: KVM reads the header and at most two pages after it, and `room` has all of that.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xbf, NESTED_HEADER), room.as_mut_ptr()) }
}

#[repr(C)]
struct OneReg {
    id: u64,
    addr: u64,
}

/// Returns the guest's shadow stack pointer.
pub(super) fn guest_ssp(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let mut reg = OneReg { id: REG_GUEST_SSP, addr: ptr::from_mut(&mut value) as u64 };
    // SAFETY: KVM reads `reg`, whose id says that the register has 64 bits, and writes a u64 to its
    // address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xab, size_of::<OneReg>()), &mut reg) }.map(|()| value)
}

/// Sets the guest's shadow stack pointer.
pub(super) fn set_guest_ssp(vcpu: &VcpuFd, value: u64) -> io::Result<()> {
    let mut reg = OneReg { id: REG_GUEST_SSP, addr: ptr::from_ref(&value) as u64 };
    // SAFETY: KVM reads `reg`, whose id says that the register has 64 bits, and a u64 at its
    // address.
    unsafe { ioctl(vcpu, kvm(WRITE, 0xac, size_of::<OneReg>()), &mut reg) }
}

/// The size of one interrupt controller's state in `struct kvm_irqchip`, in bytes.
pub(super) const CHIP_SIZE: usize = 512;

/// `struct kvm_irqchip` with its union as bytes.
#[repr(C)]
struct Chip {
    id: u32,
    pad: u32,
    data: [u8; CHIP_SIZE],
}

/// Returns the state of the chip `id` (PIC master, PIC slave or IOAPIC), read with
/// `KVM_GET_IRQCHIP`.
pub(super) fn chip(vm: &VmFd, id: u32) -> io::Result<[u8; CHIP_SIZE]> {
    let mut chip = Chip { id, pad: 0, data: [0; CHIP_SIZE] };
    // SAFETY: KVM reads and writes one `struct kvm_irqchip`, which `Chip` is.
    unsafe { ioctl(vm, kvm(READ | WRITE, 0x62, size_of::<Chip>()), &mut chip) }.map(|()| chip.data)
}

/// Sets the state of the chip `id` with `KVM_SET_IRQCHIP`.
pub(super) fn set_chip(vm: &VmFd, id: u32, data: &[u8; CHIP_SIZE]) -> io::Result<()> {
    let mut chip = Chip { id, pad: 0, data: *data };
    // SAFETY: KVM reads one `struct kvm_irqchip`, which `Chip` is. (The kernel's number of this
    // ioctl says "read" by mistake.)
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
