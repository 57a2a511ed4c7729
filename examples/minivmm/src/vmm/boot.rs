//! PVH boot: loads an ELF64 with an entry note to its physical addresses, and writes a start-info
//! page.

use std::{
    fs::File,
    io::{self, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::{KernelLoader, elf::Elf};
use migration_core::{GuestRam, RamLayout, codec::Writer};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

/// The address of the start info. The memory map and the command line follow it. These addresses
/// are below the legacy areas, and away from the pages that guests use to start further CPUs.
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x7000;
/// The longest command line in bytes: up to the end of its page.
const MAX_COMMAND_LINE: usize = 0xfff;
/// The end of start info, memory map and command line.
const START_INFO_END: u64 = 0x8000;
/// The size of a program header of an ELF64, in bytes.
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const PHYS32_ENTRY: usize = 18;
/// The most bytes of notes that are searched.
const MAX_NOTES: u64 = 1 << 20;
/// The end of conventional memory. Above it a PC has its legacy areas.
const CONVENTIONAL_END: u64 = 0x9fc00;
const HIGH_START: u64 = 0x10_0000;

/// The reason why a kernel cannot be loaded.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    #[error("{file}")]
    File {
        file: String,
        #[source]
        cause: io::Error,
    },
    #[error("{file} is no ELF64 that can be loaded into {memory} bytes of guest RAM: {cause}")]
    Elf { file: String, memory: u64, cause: String },
    #[error("{0} has no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote(String),
    #[error("the command line has {0} bytes, more than {MAX_COMMAND_LINE}")]
    CommandLine(usize),
    #[error("guest RAM is too small for the start info")]
    TooSmall,
}

/// Loads an ELF file into guest RAM. Returns the address of its PVH entry.
pub(crate) fn load_file(path: &Path, ram: &dyn GuestRam, memory: &GuestMemoryMmap) -> Result<u64, BootError> {
    let name = path.display().to_string();
    let failed = |cause| BootError::File { file: name.clone(), cause };
    let mut file = open(path).map_err(failed)?;
    load(&name, &mut file, ram, memory)
}

/// Opens a kernel. The kernel must be a regular file, because the writer of a FIFO is not waited
/// for.
fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Returns the number of bytes of RAM from address 0 that a kernel's segments need. Returns 0 for a
/// file that is not an ELF64 that can be loaded. The error of loading the file then gives the
/// reason.
pub(crate) fn least_memory(path: &Path) -> Result<u64, BootError> {
    let name = path.display().to_string();
    let wrong = |cause| BootError::File { file: name.clone(), cause };
    let mut file = open(path).map_err(wrong)?;
    let mut least = START_INFO_END;
    let checked = check(&mut file, None, &mut |end| least = least.max(end));
    Ok(checked.map_or(0, |_| least))
}

/// Loads an ELF from any source. Returns the address of its PVH entry. The crate's loader would
/// accept a file of another class or machine, and a segment that ends beyond RAM. So the headers
/// are checked here first, and the error names what is wrong.
pub(crate) fn load<F>(name: &str, file: &mut F, ram: &dyn GuestRam, memory: &GuestMemoryMmap) -> Result<u64, BootError>
where
    F: io::Read + vm_memory::ReadVolatile + io::Seek,
{
    let wrong = |cause: String| BootError::Elf { file: name.to_owned(), memory: ram.layout().bytes(), cause };
    let entry = check(file, Some(ram.layout()), &mut |_| {})
        .map_err(wrong)?
        .ok_or_else(|| BootError::NoPvhNote(name.to_owned()))?;
    Elf::load(memory, None, file, None).map_err(|e| wrong(e.to_string()))?;
    Ok(entry)
}

/// Returns the little-endian number of `N` bytes at `at`. The callers' slices are long enough.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(word)
}

/// Checks headers and segments. If `layout` is given, the segments must lie in its RAM. Returns the
/// PVH entry, if a note names one. Calls `ends` with the end of each segment.
fn check<F: io::Read + io::Seek>(
    file: &mut F,
    layout: Option<&RamLayout>,
    ends: &mut dyn FnMut(u64),
) -> Result<Option<u64>, String> {
    let length = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let mut read = |at: u64, bytes: usize, what: &str| {
        if at.checked_add(bytes as u64).is_none_or(|end| end > length) {
            return Err(format!("it has {length} bytes, its {what} would be {bytes} bytes at {at:#x}"));
        }
        let mut buffer = vec![0; bytes];
        let done = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut buffer));
        done.map(|()| buffer).map_err(|e| format!("reading its {what}: {e}"))
    };
    let header = read(0, 64, "ELF header")?;
    if header[..4] != *b"\x7fELF" {
        return Err("it does not begin like an ELF".into());
    }
    let (class, order, machine) = (header[4], header[5], number::<2>(&header, 18));
    if (class, order, machine) != (2, 1, 62) {
        return Err(format!(
            "class {class}, byte order {order}, machine {machine}, not 2 (64-bit), 1 (little), 62 (x86-64)"
        ));
    }
    let (table, size, count) = (number::<8>(&header, 32), number::<2>(&header, 54), number::<2>(&header, 56));
    if size != PROGRAM_HEADER as u64 {
        return Err(format!("program headers of {size} bytes, not {PROGRAM_HEADER}"));
    }
    let headers = read(table, PROGRAM_HEADER * count as usize, "program headers")?;
    let (mut segments, mut entry) = (Vec::new(), None);
    for (index, header) in headers.chunks_exact(PROGRAM_HEADER).enumerate() {
        let [offset, address, in_file, in_memory] = [8, 24, 32, 40].map(|at| number::<8>(header, at));
        match number::<4>(header, 0) {
            PT_LOAD if in_memory > 0 || in_file > 0 => {
                let place = format!("segment {index} ({in_memory:#x} bytes at {address:#x})");
                let end = address.checked_add(in_memory).ok_or_else(|| format!("{place} wraps around"))?;
                if in_file > in_memory || offset.checked_add(in_file).is_none_or(|end| end > length) {
                    return Err(format!(
                        "the file of {length} bytes ends before {place}, which has {in_file:#x} bytes there at {offset:#x}"
                    ));
                }
                ends(end);
                let is_ram =
                    |layout: &RamLayout| layout.regions().iter().any(|r| r.gpa <= address && end <= r.gpa + r.len);
                if !layout.is_none_or(is_ram) {
                    return Err(format!("{place} does not lie in RAM"));
                }
                if address < START_INFO_END && end > START_INFO {
                    let taken = format!("{START_INFO:#x} to {START_INFO_END:#x}");
                    return Err(format!("{place} lies where the start info goes, {taken}"));
                }
                segments.push(address..end);
            }
            // there may be several segments of notes, some with other notes, for example of the
            // linker
            PT_NOTE if entry.is_none() => {
                if in_file > MAX_NOTES {
                    return Err(format!("segment {index}: {in_file} bytes of notes, more than {MAX_NOTES}"));
                }
                entry = pvh_entry(&read(offset, in_file as usize, "notes")?);
            }
            _ => {}
        }
    }
    match entry {
        Some(entry) if !segments.iter().any(|s| s.contains(&entry)) => {
            Err(format!("its PVH entry {entry:#x} lies in none of its segments"))
        }
        entry => Ok(entry),
    }
}

/// Returns the entry that a note of XEN_ELFNOTE_PHYS32_ENTRY names. A malformed note ends the
/// search.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while notes.len() >= 12 {
        let [name, desc, kind] = [0, 4, 8].map(|at| number::<4>(notes, at) as usize);
        let body = &notes[12..];
        let start = name.checked_next_multiple_of(4)?;
        let value = body.get(start..start.checked_add(desc)?)?;
        if kind == PHYS32_ENTRY && body.get(..name)? == b"Xen\0" && value.len() >= 4 {
            return Some(number::<4>(value, 0));
        }
        notes = body.get(start + desc.checked_next_multiple_of(4)?..)?;
    }
    None
}

/// Writes start info, memory map and command line. Returns the address of the start info.
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
    // struct hvm_start_info, version 1: magic, version, flags, number of modules, modules, command
    // line, RSDP, map
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

/// Returns the registers of the boot CPU at a PVH entry: 32-bit protected mode, flat segments,
/// paging off, and the address of the start info in `ebx`.
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
