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
    use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
    use migration_core::{HeapRam, RamLayout, RamRegion, state::Section};
    use proptest::prelude::*;

    use super::{
        super::{Msr, SpecialRegs},
        *,
    };

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

    /// Makes a vCPU whose code is at 0x10_fff, stack at 0x20_008, descriptor tables from 0x30_000
    /// to 0x31_00f and from 0x40_000 to 0x40_fff, and FS at 0x50_000. GS is not used.
    fn vcpu(change: impl FnOnce(&mut kvm_sregs)) -> VcpuState {
        let mut sregs = kvm_sregs::default();
        (sregs.gdt.base, sregs.gdt.limit) = (0x30_000, 0x100f);
        (sregs.idt.base, sregs.idt.limit) = (0x40_000, 0xfff);
        sregs.tr = kvm_segment { base: 0x60_010, ..Default::default() };
        sregs.fs = kvm_segment { base: 0x50_000, ..Default::default() };
        change(&mut sregs);
        VcpuState {
            cpuid: Vec::new(),
            tsc_khz: None,
            tsc_offset: None,
            regs: kvm_regs { rip: 0x10_fff, rsp: 0x20_008, ..Default::default() },
            sregs: SpecialRegs::Plain(sregs),
            xsave: vec![0; 4096],
            xcrs: None,
            debug_regs: None,
            lapic: None,
            mp_state: Default::default(),
            events: Default::default(),
            msrs: Vec::new(),
            unread_msrs: Vec::new(),
            nested: None,
            ssp: None,
        }
    }

    /// Returns the pages that a VM with this vCPU needs first.
    fn entry(ram: &HeapRam, vcpu: &VcpuState) -> Vec<u64> {
        let section =
            |name: &str, data: Vec<u8>| Section { name: name.into(), instance: 0, version: 1, data: data.into() };
        // sections of something else, and what cannot be decoded, are left out
        let sections =
            vec![section("disk", vcpu.encode()), section(VCPU_SECTION, vec![1]), section(VCPU_SECTION, vcpu.encode())];
        let mut into = PageSet::empty(256);
        entry_pages(&VmState { sections: sections[..2].to_vec() }, ram, &mut into);
        assert!(into.is_empty());
        entry_pages(&VmState { sections }, ram, &mut into);
        into.iter().collect()
    }

    const CODE_STACK_TABLES: [u64; 10] = [0x10, 0x11, 0x1f, 0x20, 0x21, 0x30, 0x31, 0x40, 0x50, 0x60];

    #[test]
    fn without_paging_addresses_are_those_of_memory() {
        let ram = ram();
        assert_eq!(entry(&ram, &vcpu(|_| ())), CODE_STACK_TABLES);
        assert_eq!(entry(&ram, &vcpu(|s| s.gs.base = 0x70_000)), [&CODE_STACK_TABLES[..], &[0x70]].concat());
        // long mode counts only with paging
        assert_eq!(entry(&ram, &vcpu(|s| s.efer = EFER_LONG_MODE)), CODE_STACK_TABLES);
    }

    #[test]
    fn of_older_paging_only_the_tables_are_known() {
        let (ram, older) = (ram(), vcpu(|s| (s.cr0, s.cr3, s.efer) = (CR0_PAGING, 0x9_000, !EFER_LONG_MODE)));
        // what would be a table of 64-bit mode
        ram.write(0x9_000, &(7 << 12 | PRESENT).to_le_bytes()).unwrap();
        assert_eq!(entry(&ram, &older), [9]);
        assert_eq!(entry(&ram, &vcpu(|s| (s.cr0, s.cr3) = (CR0_PAGING, 0x9_000))), [9]);
    }

    #[test]
    fn with_four_or_five_levels_the_tables_are_walked() {
        for levels in [4, 5] {
            let ram = ram();
            // the table of page n leads to page n + 1, and the last one maps addresses as they are,
            // 0x80 pages higher
            let put = |table: u64, index: u64, to: u64| {
                ram.write(table * 4096 + index * 8, &(to << 12 | PRESENT).to_le_bytes()).unwrap();
            };
            (1..levels).for_each(|table| put(table, 0, table + 1));
            (0..0x80).for_each(|page| put(levels, page, page + 0x80));
            let long = vcpu(|s| {
                (s.cr0, s.cr3, s.efer) = (CR0_PAGING | 1, 0x1_000, EFER_LONG_MODE);
                s.cr4 = if levels == 5 { CR4_FIVE_LEVELS } else { !CR4_FIVE_LEVELS };
            });
            let mut expected: Vec<_> = (1..=levels).collect();
            expected.extend(CODE_STACK_TABLES.map(|page| page + 0x80));
            assert_eq!(entry(&ram, &long), expected, "{levels} levels");
        }
    }

    #[test]
    fn memory_that_kvm_writes_counts_where_it_is_turned_on() {
        let mut vcpu = vcpu(|_| ());
        for (at, index) in (0..).zip(MEMORY_MSRS) {
            // the flags above the lowest one are no part of the address
            vcpu.msrs.push(Msr { index, data: (0x80 + at) << 12 | 0x3f });
        }
        // turned off, and no such register
        let all = entry(&ram(), &vcpu);
        assert_eq!(all[CODE_STACK_TABLES.len()..], [0x80, 0x81, 0x82, 0x83, 0x84, 0x85]);
        vcpu.msrs.iter_mut().for_each(|msr| msr.data &= !1);
        vcpu.msrs.push(Msr { index: 0x4b56_4d05, data: 0x90_001 });
        assert_eq!(entry(&ram(), &vcpu), CODE_STACK_TABLES);
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
