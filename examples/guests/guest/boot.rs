//! Everything that runs in ring 0, in assembly: the PVH entry, the start of further CPUs, and the
//! traps from ring 3.
//!
//! Some versions of KVM interpret ring 0, at about a million instructions per second. Ring 0
//! therefore does as little as possible: the assembler computes the page tables, descriptors, task
//! segments and interrupt table, and the image contains them complete. A CPU loads them with about
//! 40 instructions and goes to ring 3, where all Rust code runs. Ring 3 may do three things that
//! the processor forbids there. Each of them raises #GP, and the handler looks at the instruction:
//!
//! | instruction in ring 3 | what the handler does |
//! |---|---|
//! | `out dx, al` and `in al, dx` | the same, in ring 0 |
//! | `hlt` | sleeps until the next interrupt (of the LAPIC timer) |
//! | `cli` | causes a triple fault, which ends the guest |
//!
//! Any other exception becomes a call of `trap_report` in ring 3. The code uses only instructions
//! that simple interpreters implement (no `rdtscp`, `cmpxchg16b`, `xrstor`).
//!
//! The accessed and dirty bits of all tables are set from the start, so page walks never write to
//! the tables: the guest's dirty pages are those of its workload. `ltr` sets the busy bit of a
//! descriptor once per CPU.
//!
//! | address | section | content |
//! |---|---|---|
//! | 0x100000 | .board | the state that the guest reports (`layout.rs`) |
//! | 0x101000 | .params | the parameters from the VMM (`layout.rs`) |
//! | 0x102000 | .paging | PML4, PDPT, page directories of GiB 0 (RAM) and GiB 3 (only the LAPIC); ring 3 adds those for the other RAM |
//! | 0x106000 | .descriptors | GDT, at +0x400 a task segment per CPU, at +0x1000 the IDT |
//! | 0x108000 | .ring0 | a stub of 16 bytes per vector, then code |

use core::arch::global_asm;

use crate::layout::{BOARD_MAGIC, MAX_CPUS, PARAMS_MAGIC};

/// The address to which the 16-bit start code of a CPU is copied: below 1 MiB and page aligned. The
/// SIPI's vector is its page number.
pub const TRAMPOLINE: u64 = 0x8000;
/// The vector of the LAPIC timer.
pub const TIMER_VECTOR: u32 = 0x40;
/// The vector of spurious interrupts. Its low four bits are set, as old LAPICs require.
pub const SPURIOUS_VECTOR: u32 = 0x4f;

/// A ring-0 stack never holds more than two interrupt frames.
const KERNEL_STACK: usize = 1024;
const USER_STACK: usize = 32 * 1024;

unsafe extern "C" {
    /// The first byte of the trampoline in the image.
    pub static trampoline_start: u8;
    /// The first byte after the trampoline.
    pub static trampoline_end: u8;
    /// The first byte after the image, page aligned (link.ld).
    pub static image_end: u8;
}

#[repr(align(4096))]
struct Stacks<const BYTES: usize>(#[allow(dead_code)] core::cell::UnsafeCell<[[u8; BYTES]; MAX_CPUS]>);
// SAFETY: only the assembly below uses the stacks, and each CPU uses its own.
unsafe impl<const BYTES: usize> Sync for Stacks<BYTES> {}

#[unsafe(no_mangle)]
static kernel_stacks: Stacks<KERNEL_STACK> = Stacks(core::cell::UnsafeCell::new([[0; KERNEL_STACK]; MAX_CPUS]));
#[unsafe(no_mangle)]
static user_stacks: Stacks<USER_STACK> = Stacks(core::cell::UnsafeCell::new([[0; USER_STACK]; MAX_CPUS]));

// The two pages of `layout.rs`, and the ELF note by which a loader finds the 32-bit entry
// (XEN_ELFNOTE_PHYS32_ENTRY = 18). Its descriptor is 8 bytes long, as Linux's is, because QEMU
// reads 8 bytes.
global_asm!(
    ".section .board, \"aw\", @progbits",
    ".quad {board_magic}",
    ".balign 4096",
    ".section .params, \"aw\", @progbits",
    ".quad {params_magic}",
    ".balign 4096",
    ".section .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad pvh_entry",
    board_magic = const BOARD_MAGIC,
    params_magic = const PARAMS_MAGIC,
);

// The tables. 0x27 = present, writable, user, accessed; 0xe7 = these, dirty, 2 MiB page; 0xff =
// these, not cached.
global_asm!(
    ".section .paging, \"aw\", @progbits",
    "pml4:",
    ".quad 0x103027",
    ".balign 4096",
    "pdpt:",
    ".quad 0x104027, 0, 0, 0x105027",
    ".balign 4096",
    ".set i, 0",
    ".rept 512",
    ".quad (i << 21) + 0xe7",
    ".set i, i + 1",
    ".endr",
    ".fill 0x1f7, 8, 0",
    ".quad 0xfee000ff",
    ".balign 4096",
    "",
    ".section .descriptors, \"aw\", @progbits",
    ".quad 0",
    ".quad 0x00af9b000000ffff", // 0x08 ring 0, 64-bit code
    ".quad 0x00cf93000000ffff", // 0x10 ring 0, data
    ".quad 0x00cf9b000000ffff", // 0x18 ring 0, 32-bit code
    ".quad 0x00cff3000000ffff", // 0x20 ring 3, data
    ".quad 0x00affb000000ffff", // 0x28 ring 3, 64-bit code
    ".set i, 0",
    ".rept {cpus}", // 0x30 + 16 × CPU: its task segment, 0x67 + 1 bytes
    ".quad 0x67 + ((0x106400 + 128 * i) << 16) + (0x89 << 40), 0",
    ".set i, i + 1",
    ".endr",
    ".org 0x400",
    ".set i, 0",
    ".rept {cpus}",
    ".long 0",
    ".quad kernel_stacks + (i + 1) * {kernel_stack}",
    ".fill 90, 1, 0",
    ".word 104", // no I/O bitmap: every port access of ring 3 traps
    ".balign 128",
    ".set i, i + 1",
    ".endr",
    ".org 0x1000",
    ".set i, 0",
    ".rept 0x50", // interrupt gates to the stubs
    ".quad (0x8000 + 16 * i) + (0x08 << 16) + (0x8e00 << 32) + (0x10 << 48), 0",
    ".set i, i + 1",
    ".endr",
    cpus = const MAX_CPUS,
    kernel_stack = const KERNEL_STACK,
);

// The stubs. Each leaves the vector and an error code on the stack; vectors without an error code
// push a 0.
global_asm!(
    ".section .ring0, \"ax\", @progbits",
    ".code64",
    ".set i, 0",
    ".rept 0x50",
    ".balign 16",
    ".if i == 13",
    "jmp general_protection",
    ".elseif i == 0x40",
    "jmp timer_interrupt",
    ".elseif i == 0x4f",
    "iretq",
    ".else",
    ".if (i != 8) && (i != 10) && (i != 11) && (i != 12) && (i != 14) && (i != 17) && (i != 21) && (i != 29) && (i != 30)",
    "push 0",
    ".endif",
    "push i",
    "jmp trap",
    ".endif",
    ".set i, i + 1",
    ".endr",
    ".balign 16",
    "",
    // On the stack: error code, rip, cs, rflags, rsp, ss.
    "general_protection:",
    "test byte ptr [rsp + 16], 3",
    "jz die",
    "push rbx",
    "mov rbx, [rsp + 16]",
    "movzx ebx, byte ptr [rbx]",
    "cmp bl, 0xee",
    "je 2f",
    "cmp bl, 0xf4",
    "je 4f",
    "cmp bl, 0xec",
    "je 3f",
    "cmp bl, 0xfa",
    "je die",
    "pop rbx",
    "push 13",
    "jmp trap",
    "2: out dx, al",
    "jmp 5f",
    "3: in al, dx",
    "jmp 5f",
    // `sti` takes effect after the next instruction, so no interrupt can come between `sti` and
    // `hlt`.
    "4: sti",
    "hlt",
    "cli",
    "5: inc qword ptr [rsp + 16]",
    "pop rbx",
    "add rsp, 8",
    "iretq",
    "",
    "timer_interrupt:",
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    "",
    // On the stack: vector, error code, rip, cs, rflags, rsp, ss. Returns into trap_report(vector,
    // error code, rip, cr2) in ring 3, on the stack that was in use, below the red zone.
    "trap:",
    "test byte ptr [rsp + 24], 3",
    "jz die",
    "pop rdi",
    "pop rsi",
    "mov rdx, [rsp]",
    "mov rcx, cr2",
    "lea rax, [rip + trap_report]",
    "mov [rsp], rax",
    "mov rax, [rsp + 24]",
    "sub rax, 256",
    "and rax, -16",
    "sub rax, 8",
    "mov [rsp + 24], rax",
    "iretq",
    "",
    // Without an interrupt table the next exception shuts the CPU down, and the VMM sees that.
    "die:",
    "lidt [rip + no_table]",
    "ud2",
    "hlt",
    "jmp die",
    ".balign 8",
    "no_table: .word 0",
    ".quad 0",
);

// The entries of the first and of further CPUs. Both jump to `enter` in 32-bit protected mode
// without paging: edi = CPU, ebp = hvm_start_info (first CPU only).
global_asm!(
    ".section .ring0, \"ax\", @progbits",
    ".code32",
    ".balign 16",
    ".globl pvh_entry",
    "pvh_entry:",
    "cli",
    "cld",
    "mov ebp, ebx",
    "xor edi, edi",
    // A BIOS may have left the legacy interrupt controllers unmasked; their vectors would look like
    // exceptions.
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    "enter:",
    "lgdt [gdt_pointer]",
    "mov eax, 0x102000",
    "mov cr3, eax",
    "mov eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100", // EFER.LME
    "wrmsr",
    "mov eax, 0x80000033", // PG, NE, ET, MP, PE
    "mov cr0, eax",
    ".byte 0xea", // jmp 0x08:enter64, which the assembler does not take in Intel syntax
    ".long enter64",
    ".word 0x08",
    "",
    ".code64",
    "enter64:",
    "xor eax, eax",
    "mov ss, eax",
    "mov eax, edi",
    "shl eax, 10",
    "lea rsp, [rax + kernel_stacks + {kernel_stack}]",
    "mov eax, 0x23",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "lidt [idt_pointer]",
    "mov eax, edi",
    "shl eax, 4",
    "add eax, 0x30",
    "ltr ax",
    // The frame: ss, rsp (as after a call: 8 below a multiple of 16), rflags with IF, cs, rip.
    "mov eax, edi",
    "imul eax, eax, {user_stack}",
    "lea rax, [rax + user_stacks + {user_stack} - 8]",
    "push 0x23",
    "push rax",
    "push 0x202",
    "push 0x2b",
    "lea rax, [rip + guest_main]",
    "push rax",
    "mov esi, ebp",
    "iretq",
    "",
    ".balign 8",
    "gdt_pointer: .word 0x30 + 16 * {cpus} - 1",
    ".quad 0x106000",
    "idt_pointer: .word 0x50 * 16 - 1",
    ".quad 0x107000",
    "",
    // A further CPU after INIT and SIPI. It reads its number from its LAPIC: KVM reports the id
    // correctly there, which is not certain for CPUID.
    ".code32",
    "further_cpu:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov edi, dword ptr ds:[0xfee00020]",
    "shr edi, 24",
    "xor ebp, ebp",
    "cmp edi, {cpus}",
    "jb enter",
    "6: hlt",
    "jmp 6b",
    "",
    // Real mode, copied to TRAMPOLINE: cs = TRAMPOLINE / 16, so the code uses only absolute
    // addresses below 64 KiB.
    ".balign 8",
    ".globl trampoline_start, trampoline_end",
    ".code16",
    "trampoline_start:",
    "jmp 7f",
    ".balign 8",
    ".word 0x30 + 16 * {cpus} - 1", // trampoline_start + 8
    ".long 0x106000",
    "7: cli",
    "cld",
    "xor ax, ax",
    "mov ds, ax",
    "lgdt ds:[{trampoline} + 8]",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // jmp dword 0x18:further_cpu
    ".long further_cpu",
    ".word 0x18",
    "trampoline_end:",
    ".code64",
    kernel_stack = const KERNEL_STACK,
    user_stack = const USER_STACK,
    cpus = const MAX_CPUS,
    trampoline = const TRAMPOLINE,
);

const _: () = assert!(KERNEL_STACK == 1 << 10, "enter64 shifts by 10");
