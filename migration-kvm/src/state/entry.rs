//! Finds the pages that vCPUs touch as soon as they run. After a hand-over by post-copy, a guest
//! would wait for these pages one after the other.

use migration_core::{GuestRam, PAGE_SIZE, PageSet, state::VmState};

use super::{VCPU_SECTION, VcpuState};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// The bits of a page-table entry that hold the address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;

/// MSRs with the address of memory that KVM writes when it loads or runs a vCPU: clock,
/// asynchronous page faults, stolen time, end of interrupt. Their low bits are flags.
const MEMORY_MSRS: [u32; 6] = [0x11, 0x12, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];

/// Adds to `into` the pages that the vCPUs of a saved state need first. These are the pages of
/// their code, stacks and descriptor tables, of the page tables that lead there, and of memory that
/// KVM itself writes: about ten to twenty per vCPU. Meant for
/// [`SourceVm::entry_pages`](migration_core::vm::SourceVm::entry_pages).
///
/// The result is a hint. It leaves out vCPUs whose section cannot be decoded and addresses outside
/// RAM. With paging other than that of 64-bit mode it has only addresses that need no translation.
pub fn entry_pages(state: &VmState, ram: &dyn GuestRam, into: &mut PageSet) {
    for section in state.sections.iter().filter(|section| section.name == VCPU_SECTION) {
        if let Ok(vcpu) = VcpuState::decode(&section.data) {
            Entry { ram, into }.vcpu(&vcpu);
        }
    }
}

struct Entry<'a> {
    ram: &'a dyn GuestRam,
    into: &'a mut PageSet,
}

/// The paging mode of a vCPU.
#[derive(Clone, Copy)]
struct Paging {
    cr3: u64,
    levels: u32,
}

impl Entry<'_> {
    fn vcpu(&mut self, vcpu: &VcpuState) {
        for msr in vcpu.msrs.iter().filter(|msr| MEMORY_MSRS.contains(&msr.index) && msr.data & 1 == 1) {
            self.physical(msr.data & !0x3f);
        }
        let s = vcpu.sregs.plain(&vcpu.events);
        let paging = match (s.cr0 & CR0_PAGING != 0, s.efer & EFER_LONG_MODE != 0) {
            (false, _) => None,
            (true, true) => Some(Paging { cr3: s.cr3, levels: if s.cr4 & CR4_FIVE_LEVELS != 0 { 5 } else { 4 } }),
            (true, false) => return self.physical(s.cr3),
        };
        let page = PAGE_SIZE as u64;
        let code = [vcpu.regs.rip, vcpu.regs.rip.wrapping_add(page)];
        // a stack grows down, and return addresses are above the stack pointer
        let stack = [vcpu.regs.rsp, vcpu.regs.rsp.wrapping_sub(page), vcpu.regs.rsp.wrapping_add(page)];
        let ends =
            [s.gdt, s.idt].into_iter().flat_map(|table| [table.base, table.base.wrapping_add(table.limit.into())]);
        // an unused segment has base 0
        let bases = [s.tr, s.fs, s.gs].into_iter().map(|segment| segment.base).filter(|&base| base != 0);
        for linear in code.into_iter().chain(stack).chain(ends).chain(bases) {
            match paging {
                None => self.physical(linear),
                Some(paging) => self.walk(paging, linear),
            }
        }
    }

    /// Adds the page tables that lead to the linear address, and the page at that address.
    fn walk(&mut self, Paging { cr3, levels }: Paging, linear: u64) {
        let mut table = cr3 & ADDRESS;
        for level in (0..levels).rev() {
            self.physical(table);
            let shift = 12 + 9 * level;
            let mut entry = [0; 8];
            if self.ram.read(table + (linear >> shift & 0x1ff) * 8, &mut entry).is_err() {
                return;
            }
            let entry = u64::from_le_bytes(entry);
            if entry & PRESENT == 0 {
                return;
            }
            if level == 0 || (entry & LARGE != 0 && level <= 2) {
                let within = (1 << shift) - 1;
                return self.physical((entry & ADDRESS & !within) | (linear & within));
            }
            table = entry & ADDRESS;
        }
    }

    fn physical(&mut self, gpa: u64) {
        if let Some(page) = self.ram.layout().page_of(gpa) {
            self.into.insert(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use migration_core::{HeapRam, RamLayout, RamRegion};
    use proptest::prelude::*;

    use super::*;

    fn ram() -> HeapRam {
        HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }]).unwrap()).unwrap()
    }

    fn found(ram: &HeapRam, paging: Paging, linear: u64) -> Vec<u64> {
        let mut into = PageSet::empty(256);
        Entry { ram, into: &mut into }.walk(paging, linear);
        into.iter().collect()
    }

    #[test]
    fn a_walk_notes_tables_and_page() {
        let ram = ram();
        let entry = |table: u64, index: u64, value: u64| {
            ram.write(table * 4096 + index * 8, &value.to_le_bytes()).unwrap();
        };
        // the table indices of 0xffff_8000_0020_1000 are 256, 0, 1, 1
        entry(1, 256, 2 << 12 | PRESENT);
        entry(2, 0, 3 << 12 | PRESENT);
        entry(3, 1, 4 << 12 | PRESENT);
        entry(4, 1, 77 << 12 | PRESENT | 1 << 63);
        let paging = Paging { cr3: 1 << 12, levels: 4 };
        assert_eq!(found(&ram, paging, 0xffff_8000_0020_1abc), [1, 2, 3, 4, 77]);
        assert_eq!(found(&ram, paging, 0xffff_8000_0020_2000), [1, 2, 3, 4]);
        // a large page, and paging with five levels
        entry(3, 2, LARGE | PRESENT);
        assert_eq!(found(&ram, paging, 0xffff_8000_0040_5000), [1, 2, 3, 5]);
        entry(9, 0, 1 << 12 | PRESENT);
        assert_eq!(found(&ram, Paging { cr3: 9 << 12, levels: 5 }, 0x8000_0020_1000), [1, 2, 3, 4, 9, 77]);
        // tables outside RAM
        entry(2, 1, 1 << 40 | PRESENT);
        assert_eq!(found(&ram, paging, 0xffff_8000_4000_0000), [1, 2]);
        assert!(found(&ram, Paging { cr3: !0, levels: 4 }, 5).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_the_guest_has_written_it_ends(words in prop::collection::vec(any::<u64>(), 512), cr3 in any::<u64>(), linear in any::<u64>(), levels in 4u32..6) {
            let ram = ram();
            let memory = &ram;
            for (at, word) in words.iter().enumerate() {
                memory.write(at as u64 * 8, &(word & 0xff_ffff).to_le_bytes()).unwrap();
            }
            let into = found(&ram, Paging { cr3: cr3 & 0x1_ffff, levels }, linear);
            prop_assert!(into.len() <= 6);
        }
    }
}
