//! PVH boot: an ELF64 with an entry note, loaded to its physical addresses, and a start-info page.

use std::{fs::File, io, path::Path};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::{KernelLoader, elf::{Elf, PvhBootCapability}};
use migration_core::{GuestRam, codec::Writer};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

/// Where the start info lies, with memory map and command line behind it: below the legacy areas, away from the pages
/// that guests use to start further CPUs.
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x7000;
/// Longest command line: up to the end of its page.
const MAX_COMMAND_LINE: usize = 0xfff;
/// The end of conventional memory; above it a PC has its legacy areas.
const CONVENTIONAL_END: u64 = 0x9fc00;
const HIGH_START: u64 = 0x10_0000;

/// A kernel cannot be loaded.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    #[error("{file}: {cause}")]
    File { file: String, cause: io::Error },
    #[error("{file} is no ELF64 that can be loaded into {memory} bytes of guest RAM: {cause}")]
    Elf { file: String, memory: u64, cause: String },
    #[error("{0} has no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote(String),
    #[error("the command line has {0} bytes, more than {MAX_COMMAND_LINE}")]
    CommandLine(usize),
    #[error("guest RAM is too small for the start info")]
    TooSmall,
}

/// Loads an ELF file into guest RAM; the address of its PVH entry.
pub(crate) fn load_file(path: &Path, ram: &dyn GuestRam, memory: &GuestMemoryMmap) -> Result<u64, BootError> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|cause| BootError::File { file: name.clone(), cause })?;
    load(&name, &mut file, ram, memory)
}

/// Loads an ELF from any source.
pub(crate) fn load<F>(name: &str, file: &mut F, ram: &dyn GuestRam, memory: &GuestMemoryMmap) -> Result<u64, BootError>
where
    F: io::Read + vm_memory::ReadVolatile + io::Seek,
{
    let wrong = |cause: String| BootError::Elf { file: name.to_owned(), memory: ram.layout().bytes(), cause };
    let loaded = Elf::load(memory, None, file, None).map_err(|e| wrong(e.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.0),
        _ => Err(BootError::NoPvhNote(name.to_owned())),
    }
}

/// Writes start info, memory map and command line; the start info's address.
pub(crate) fn write_start_info(ram: &dyn GuestRam, cmdline: &str) -> Result<u64, BootError> {
    if cmdline.len() > MAX_COMMAND_LINE || cmdline.contains('\0') {
        return Err(BootError::CommandLine(cmdline.len()));
    }
    let mut map: Vec<(u64, u64)> = Vec::new();
    for region in ram.layout().regions() {
        let end = region.gpa + region.len;
        if region.gpa == 0 {
            map.push((0, CONVENTIONAL_END.min(end)));
            if end > HIGH_START {
                map.push((HIGH_START, end - HIGH_START));
            }
        } else {
            map.push((region.gpa, region.len));
        }
    }
    let mut info = Writer::new();
    // struct hvm_start_info, version 1: magic, version, flags, number of modules, modules, command line, RSDP, map
    info.u32(0x336e_c578).u32(1).u32(0).u32(0).u64(0).u64(COMMAND_LINE).u64(0);
    info.u64(MEMORY_MAP).count(map.len()).u32(0);
    let mut entries = Writer::new();
    for (address, size) in map {
        // struct hvm_memmap_table_entry: address, size, type (1 is RAM), reserved
        entries.u64(address).u64(size).u32(1).u32(0);
    }
    let write = |gpa, bytes: &[u8]| ram.write(gpa, bytes).map_err(|_| BootError::TooSmall);
    write(START_INFO, &info.into_bytes())?;
    write(MEMORY_MAP, &entries.into_bytes())?;
    write(COMMAND_LINE, cmdline.as_bytes())?;
    write(COMMAND_LINE + cmdline.len() as u64, &[0])?;
    Ok(START_INFO)
}

/// The registers of the boot CPU at a PVH entry: 32-bit protected mode, flat segments, paging off, `ebx` at the start info.
pub(crate) fn entry_state(entry: u64, start_info: u64, sregs: &mut kvm_sregs) -> kvm_regs {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let (code, data) = (flat(8, 11), flat(0x10, 3));
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 11, s: 0, db: 0, g: 0, ..code };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x31, 0, 0, 0);
    kvm_regs { rip: entry, rbx: start_info, rflags: 2, ..kvm_regs::default() }
}
