//! ELF files for the boot loader: small guests, and wrong ones.

/// Where the code of the small guests lies.
const CODE: u64 = 0x20_0000;
const CODE_OFFSET: usize = 0x1000;
const NOTE_OFFSET: usize = 0x200;

/// `lidt [table]`, `ud2`: no handler, so a triple fault. The table is the zeros behind.
pub(crate) fn triple_fault() -> Vec<u8> {
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend((CODE as u32 + 16).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.resize(32, 0);
    elf(&code, CODE, true)
}

/// `cli`, `hlt`, and back to the `hlt`.
pub(crate) fn halt_for_ever() -> Vec<u8> {
    elf(&[0xfa, 0xf4, 0xeb, 0xfd], CODE, true)
}

pub(crate) fn without_note() -> Vec<u8> {
    elf(&[0xf4], CODE, false)
}

pub(crate) fn outside_ram() -> Vec<u8> {
    elf(&[0xf4], 1 << 40, true)
}

pub(crate) fn truncated_code() -> Vec<u8> {
    let mut file = halt_for_ever();
    file.truncate(CODE_OFFSET + 1);
    file
}

pub(crate) fn truncated_headers() -> Vec<u8> {
    let mut file = halt_for_ever();
    file.truncate(100);
    file
}

/// An ELF64 with one segment at `address`, where its entry is, and a PVH entry note if wished.
fn elf(code: &[u8], address: u64, pvh: bool) -> Vec<u8> {
    let mut note = Vec::new();
    // name size, descriptor size, type XEN_ELFNOTE_PHYS32_ENTRY
    [4u32, 8, 18].iter().for_each(|word| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(address.to_le_bytes());

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // executable, x86-64, version 1
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // entry, program headers, section headers
    [address, 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    // sizes of header and program header, number of those, no section headers
    [64u16, 56, 1 + u16::from(pvh), 0, 0, 0].iter().for_each(|half| file.extend(half.to_le_bytes()));
    let mut header = |kind: u32, flags: u32, offset: usize, address: u64, size: usize, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for word in [offset as u64, address, address, size as u64, size as u64, align] {
            file.extend(word.to_le_bytes());
        }
    };
    header(1, 7, CODE_OFFSET, address, code.len(), 0x1000);
    header(4, 4, NOTE_OFFSET, 0, note.len(), 4);
    file.resize(NOTE_OFFSET, 0);
    file.extend(note);
    file.resize(CODE_OFFSET, 0);
    file.extend(code);
    file
}
