//! Guest RAM as the type that rust-vmm's crates take. This is the only unsafe code of minivmm.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use migration_core::GuestRam;
use migration_kvm::tracker::{GuestSlots, MAX_SLOT_BYTES, SlotError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// The same memory as a `GuestMemoryMmap`, for as long as it is borrowed. Used to load a kernel
/// before the guest runs.
pub(super) struct Alias<'a> {
    memory: GuestMemoryMmap,
    _ram: &'a dyn GuestRam,
}

impl<'a> Alias<'a> {
    pub(super) fn new(ram: &'a dyn GuestRam) -> Result<Self, String> {
        let mut regions = Vec::new();
        for (index, region) in ram.layout().regions().iter().enumerate() {
            let address = ram.host_address(index).as_ptr();
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: `GuestRam` promises that the region is mapped there, whole, for as long as
            // `ram` lives, which this object borrows; a region built from a raw address does not
            // unmap it when dropped.
            let mapping = unsafe { MmapRegion::build_raw(address, region.len as usize, prot, flags) };
            let mapping = mapping.map_err(|e| e.to_string())?;
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(region.gpa)).ok_or("an address overflows")?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| e.to_string())?;
        Ok(Self { memory, _ram: ram })
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

/// The environment variable with which tests limit the bytes of a memory slot, so that small VMs
/// have many slots.
const SLOT_SIZE: &str = "MINIVMM_SLOT_SIZE";

/// Gives all of guest RAM to a new VM, in memory slots so small that KVM does not occupy a core for
/// long when it sets one.
pub(super) fn install_slots(vm: &VmFd, ram: Arc<dyn GuestRam>) -> Result<Arc<GuestSlots>, String> {
    let most = match std::env::var(SLOT_SIZE) {
        Ok(size) => minivmm_client::values::size(&size).map_err(|why| format!("{SLOT_SIZE}: {why}"))?,
        Err(_) => MAX_SLOT_BYTES,
    };
    // SAFETY: the VM was created by the caller and has no slots yet; `Machine` drops its vCPUs and
    // VM before its last reference to RAM, and the slots keep one too.
    let slots = unsafe { GuestSlots::in_pieces(ram, 0, most) }.map_err(|e: SlotError| e.to_string())?;
    slots.install(vm).map_err(|e| format!("setting memory slots: {e}"))?;
    Ok(Arc::new(slots))
}
