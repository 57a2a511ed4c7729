//! Tests of every dirty tracker on every backing, on real KVM with a guest of a few instructions.
//!
//! Without /dev/kvm a trial is ignored with the reason. With MIGRATION_REQUIRE_KVM=1 it fails
//! instead.

use std::{fs, process::ExitCode, sync::Arc};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use libtest_mimic::{Arguments, Failed, Trial};
use migration_core::{
    GuestRam, PageRange, PageSet, RamLayout, RamRegion,
    text::describe,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker, UnionTracker},
};
use migration_kvm::{
    probe::Probe,
    ram::{Backing, MappedRam},
    tracker::{
        DirtyRing, EnabledRing, GuestSlots, MAX_SLOT_BYTES, ManualProtect, Parts, RingCollector, TrackerKind,
        UserFault, WriteProtect, build,
    },
};

type Outcome = Result<(), Failed>;
type Check = fn() -> Outcome;

/// The guest physical address of the region that the guest writes. Code and page tables are below
/// it.
const DATA: u64 = 0x40_0000;
const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
/// An address that is mapped for the guest but has no memory. A write to it ends a run.
const DOORBELL: u64 = 0x1000_0000;

/// Repeats `rcx` times: write `al` to `[rdi]`, advance `rdi` by `rsi`. Then writes to the doorbell
/// at `[rbx]`.
const PROGRAM: [u8; 14] = [0x88, 0x07, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf6, 0x88, 0x03, 0xeb, 0xfe];

/// The sizes of memory slots. The second is so small that the data region has many slots, and odd,
/// so that runs of pages cross the borders of slots.
const SLOTS: [(&str, u64); 2] = [("", MAX_SLOT_BYTES), ("_in_many_slots", 53 << 12)];

/// A VM with one vCPU, which writes bytes to given pages.
struct Guest {
    // declared in the order in which they must be dropped: the memory last
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    ring: Option<EnabledRing>,
    collector: Option<Arc<RingCollector>>,
    full_exits: u32,
    slots: Arc<GuestSlots>,
    ram: Arc<MappedRam>,
}

impl Guest {
    fn new(backing: Backing, ring_entries: Option<u32>) -> Result<Self, Failed> {
        Self::in_slots(MAX_SLOT_BYTES, backing, ring_entries)
    }

    /// Makes a VM with memory slots of at most `most` bytes.
    fn in_slots(most: u64, backing: Backing, ring_entries: Option<u32>) -> Result<Self, Failed> {
        // an odd number of pages, so that page numbers and the slots' bits have different
        // alignments
        let odd = if backing == Backing::Hugetlb { [0x20_0000, 0x80_0000] } else { [0x20_5000, 0x80_0000 - 0x3000] };
        let regions = vec![RamRegion { gpa: 0, len: odd[0] }, RamRegion { gpa: DATA, len: odd[1] }];
        let ram = Arc::new(MappedRam::new(RamLayout::new(regions)?, backing)?);
        let vm = Arc::new(Kvm::new()?.create_vm()?);
        // SAFETY: the VM is new, `Guest` drops it before the RAM, and nothing else keeps it alive.
        let slots = Arc::new(unsafe { GuestSlots::in_pieces(ram.clone(), 3, most)? });
        slots.install(&vm)?;
        let ring = ring_entries.map(|entries| DirtyRing::enable(vm.clone(), entries)).transpose()?;
        let vcpu = vm.create_vcpu(0)?;
        let collector = ring.as_ref().map(EnabledRing::collector);
        if let Some(collector) = &collector {
            collector.add_vcpu(&vcpu)?;
        }
        let memory = &ram;
        memory.write(CODE, &PROGRAM)?;
        // present, writable, user, accessed and dirty, so that the page walk itself dirties nothing
        let entry = |to: u64| (to | 0x67).to_le_bytes();
        memory.write(PML4, &entry(PDPT))?;
        memory.write(PDPT, &entry(PD))?;
        for i in 0..512 {
            memory.write(PD + i * 8, &entry(i << 21 | 0x80))?;
        }
        let mut sregs = vcpu.get_sregs()?;
        let segment = |selector, type_, l| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..kvm_segment::default()
        };
        // ring 3, which runs natively also where ring 0 is interpreted
        sregs.cs = segment(0x33, 0xb, 1);
        let data = segment(0x2b, 3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620;
        sregs.efer = 0xd01;
        vcpu.set_sregs(&sregs)?;
        Ok(Self { vcpu, vm, ring, collector, full_exits: 0, slots, ram })
    }

    /// Makes the guest write one byte to each of `count` pages of the data region: page `first` and
    /// then every `stride`-th page.
    fn write(&mut self, first: u64, stride: u64, count: u64) -> Result<PageSet, Failed> {
        let base = self.ram.layout().page_of(DATA).ok_or("no data region")?;
        let regs = kvm_regs {
            rip: CODE,
            rflags: 2,
            rax: 0x5a,
            rbx: DOORBELL,
            rcx: count,
            rdi: DATA + first * 0x1000 + 8,
            rsi: stride * 0x1000,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs)?;
        loop {
            match self.vcpu.run()? {
                VcpuExit::MmioWrite(DOORBELL, _) => break,
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    self.full_exits += 1;
                    self.collector.as_ref().ok_or("ring full without a ring")?.collect()?;
                }
                other => return Err(format!("unexpected exit {other:?}").into()),
            }
        }
        // let KVM complete the write to the doorbell, so that the registers can be set again
        self.vcpu.set_kvm_immediate_exit(1);
        let finished = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        if finished.as_ref().err().map(|e| e.errno()) != Some(libc::EINTR) {
            return Err(format!("the doorbell did not finish: {finished:?}").into());
        }
        let mut pages = PageSet::empty(self.ram.layout().pages());
        (0..count).for_each(|i| pages.insert_range(PageRange::new(base + first + i * stride, 1)));
        Ok(pages)
    }

    fn tracker(&self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, Failed> {
        let (vm, slots) = (self.vm.clone(), self.slots.clone());
        Ok(build(kind, Parts { vm, slots, user_fault: None, ring: self.ring.as_ref() })?)
    }

    fn data(&self) -> PageRange {
        self.ram.layout().region_pages(1).unwrap_or(PageRange::new(0, 0))
    }
}

/// Returns the pages of the data region that a harvest reports. Re-arms all reported pages, like
/// sending them would.
fn harvest(guest: &Guest, tracker: &mut dyn DirtyTracker) -> Result<PageSet, Failed> {
    let all = guest.ram.layout().all();
    let mut dirty = PageSet::empty(all.count);
    tracker.harvest(&mut dirty)?;
    if let Some(rearm) = tracker.rearm() {
        rearm.before_read(all, &dirty)?;
    }
    Ok(only_data(guest, dirty))
}

fn only_data(guest: &Guest, mut pages: PageSet) -> PageSet {
    pages.remove_range(PageRange::new(0, guest.data().first));
    pages
}

fn ensure(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what().into()) }
}

/// Checks that exactly the written pages are reported. If the tracker sees huge pages, all pages of
/// the huge pages that were written may be reported.
fn same(guest: &Guest, what: &str, got: &PageSet, want: &PageSet, block_pages: u64) -> Outcome {
    let mut allowed = PageSet::empty(want.capacity());
    for page in want.iter() {
        let data = guest.data().first;
        allowed.insert_range(PageRange::new(data + (page - data) / block_pages * block_pages, block_pages));
    }
    let (mut lost, mut extra) = (want.clone(), got.clone());
    lost.subtract(got);
    extra.subtract(&allowed);
    ensure(lost.is_empty() && extra.is_empty(), || format!("{what}: lost {lost:?}, too many {extra:?}"))
}

fn block_pages(kind: TrackerKind, backing: Backing) -> u64 {
    if kind == TrackerKind::WriteProtect && backing.may_be_huge() { 512 } else { 1 }
}

fn ring_entries(kind: TrackerKind) -> Option<u32> {
    (kind == TrackerKind::DirtyRing).then_some(4096)
}

/// Tests a tracker over populated memory, with memory slots of at most this size.
fn contract(kind: TrackerKind, backing: Backing, slots: u64) -> Outcome {
    let mut guest = Guest::in_slots(slots, backing, ring_entries(kind))?;
    ensure(slots == MAX_SLOT_BYTES || guest.slots.slots().len() > 3, || format!("{:?}", guest.slots.slots()))?;
    let block_pages = block_pages(kind, backing);
    guest.ram.prefault(guest.ram.layout().all())?;
    guest.write(0, 1, 2000)?;
    let mut tracker = guest.tracker(kind)?;
    let none = PageSet::empty(guest.ram.layout().pages());
    ensure(!tracker.is_active() && tracker.name() == kind.name(), || "active too early".into())?;
    ensure(tracker.harvest(&mut none.clone()).is_err(), || "harvest before start".into())?;
    tracker.stop()?;
    tracker.start()?;
    tracker.start()?;
    ensure(tracker.is_active(), || "not active".into())?;
    harvest(&guest, &mut *tracker)?; // what was dirty from the start, where the tracker says so
    same(&guest, "nothing was written", &harvest(&guest, &mut *tracker)?, &none, 1)?;

    let written = guest.write(5, 3, 40)?;
    same(&guest, "guest writes", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    same(&guest, "reported once", &harvest(&guest, &mut *tracker)?, &none, 1)?;
    let written = guest.write(5, 3, 40)?;
    // huge pages are split by now, except those of a file
    let split = if backing == Backing::TransparentHuge { 1 } else { block_pages };
    same(&guest, "the same pages again", &harvest(&guest, &mut *tracker)?, &written, split)?;
    // a harvest arms the pages that it reports, and needs no empty harvest in between
    let written = guest.write(5, 3, 40)?;
    same(&guest, "and again at once", &harvest(&guest, &mut *tracker)?, &written, split)?;
    let last = guest.data().count - 1;
    let written = guest.write(last, 1, 1)?;
    same(&guest, "the last page", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;

    let mut back = none.clone();
    back.insert_range(PageRange::new(guest.data().first + 77, 3));
    tracker.mark_dirty(&back);
    let mut written = guest.write(600, 1, 2)?;
    written.union_with(&back);
    same(&guest, "put back", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    same(&guest, "put back is reported once", &harvest(&guest, &mut *tracker)?, &none, 1)?;

    if kind == TrackerKind::WriteProtect {
        guest.ram.write(DATA + 0x30_0ff8, b"from the host")?;
        let mut written = none.clone();
        written.insert_range(PageRange::new(guest.data().first + 0x300, 2));
        same(&guest, "host writes", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    }

    tracker.mark_dirty(&back);
    tracker.stop()?;
    tracker.stop()?;
    guest.write(100, 1, 50)?;
    ensure(tracker.harvest(&mut none.clone()).is_err(), || "harvest after stop".into())?;
    tracker.start()?;
    harvest(&guest, &mut *tracker)?;
    let written = guest.write(1, 2, 700)?;
    same(&guest, "after a new start", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    drop(tracker);
    guest.write(0, 1, 2000)?;
    Ok(())
}

/// Memory that was never touched is not reported, but the first write to it is.
fn holes(kind: TrackerKind, backing: Backing) -> Outcome {
    let mut guest = Guest::new(backing, ring_entries(kind))?;
    let block_pages = if backing.may_be_huge() { 512 } else { 1 };
    let mut tracker = guest.tracker(kind)?;
    tracker.start()?;
    let none = PageSet::empty(guest.ram.layout().pages());
    let mut populated = none.clone();
    guest.ram.populated(&mut populated)?;
    same(&guest, "tracking populates nothing", &only_data(&guest, populated), &none, 1)?;
    same(&guest, "holes at start", &harvest(&guest, &mut *tracker)?, &none, 1)?;
    let written = guest.write(513, 5, 20)?;
    same(&guest, "writes into holes", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    let written = guest.write(514, 5, 20)?;
    same(&guest, "writes beside them", &harvest(&guest, &mut *tracker)?, &written, block_pages)?;
    same(&guest, "nothing more", &harvest(&guest, &mut *tracker)?, &none, 1)
}

/// With manual protection a page is dirty until it is re-armed, and only the given pages are
/// re-armed.
fn rearm_is_exact(backing: Backing, slots: u64) -> Outcome {
    let mut guest = Guest::in_slots(slots, backing, None)?;
    guest.ram.prefault(guest.ram.layout().all())?;
    let mut tracker = ManualProtect::new(guest.vm.clone(), guest.slots.clone());
    tracker.start()?;
    let all = guest.ram.layout().all();
    let read = |tracker: &mut ManualProtect| -> Result<PageSet, Failed> {
        let mut dirty = PageSet::empty(all.count);
        tracker.harvest(&mut dirty)?;
        Ok(only_data(&guest, dirty))
    };
    let first = read(&mut tracker)?;
    let probe = Probe::new(&Kvm::new()?);
    if probe.manual_protect_initially_set() {
        ensure(first.len() == guest.data().count, || format!("populated pages start dirty: {first:?}"))?;
    }
    harvest(&guest, &mut tracker)?;
    let written = guest.write(30, 1, 100)?;
    let rearm = tracker.rearm().ok_or("manual protection re-arms")?;
    for _ in 0..2 {
        let mut dirty = PageSet::empty(all.count);
        tracker.harvest(&mut dirty)?;
        same(&guest, "dirty until re-armed", &only_data(&guest, dirty), &written, 1)?;
    }
    // every second page of a range that covers only a part, and whose ends share words with other
    // pages
    let base = guest.data().first;
    let mut some = PageSet::empty(all.count);
    (0..100).step_by(2).for_each(|i| some.insert_range(PageRange::new(base + 30 + i, 1)));
    let range = PageRange::new(base + 45, 50);
    rearm.before_read(range, &some)?;
    let mut left = written.clone();
    some.ranges_in(range).for_each(|run| left.remove_range(run));
    let mut dirty = PageSet::empty(all.count);
    tracker.harvest(&mut dirty)?;
    same(&guest, "only what was named is re-armed", &only_data(&guest, dirty), &left, 1)?;
    // a write after the re-arming is reported
    let again = guest.write(46, 1, 1)?;
    left.union_with(&again);
    let mut dirty = PageSet::empty(all.count);
    tracker.harvest(&mut dirty)?;
    same(&guest, "a write after re-arming", &only_data(&guest, dirty), &left, 1)?;
    tracker.stop()?;
    ensure(rearm.before_read(all, &left).is_err(), || "re-armed a stopped tracker".into())
}

/// With a ring much smaller than the number of written pages, the vCPU stops when the ring is full,
/// and no page is lost.
fn a_full_ring_loses_nothing() -> Outcome {
    let mut guest = Guest::new(Backing::Anonymous, Some(1024))?;
    let ring = guest.ring.as_ref().ok_or("no ring")?;
    ensure(ring.entries() == 1024, || format!("{} entries", ring.entries()))?;
    let mut tracker = DirtyRing::new(ring, guest.slots.clone());
    let rival = guest.tracker(TrackerKind::DirtyRing)?;
    tracker.start()?;
    let written = guest.write(0, 1, 2040)?;
    ensure(guest.full_exits > 0, || "the ring never filled up".into())?;
    same(&guest, "all of it", &harvest(&guest, &mut tracker)?, &written, 1)?;
    drop(rival); // was never started: must not stop the other
    let written = guest.write(7, 1, 30)?;
    same(&guest, "afterwards", &harvest(&guest, &mut tracker)?, &written, 1)?;
    ensure(guest.tracker(TrackerKind::DirtyRing)?.start().is_err(), || "two trackers on one ring".into())?;
    // the VM has no dirty log any more, and starting it fails
    let log = guest.tracker(TrackerKind::DirtyLog)?.start();
    ensure(log.is_err(), || "a dirty log beside the ring".into())
}

fn ring_sizes_are_checked() -> Outcome {
    let vm = Arc::new(Kvm::new()?.create_vm()?);
    ensure(DirtyRing::enable(vm.clone(), 1000).is_err(), || "not a power of two".into())?;
    ensure(DirtyRing::enable(vm.clone(), 1).is_err(), || "too small".into())?;
    let _vcpu = vm.create_vcpu(0)?;
    let late = DirtyRing::enable(vm, 4096).map(|_| ()).map_err(describe);
    ensure(late.as_ref().is_err_and(|e| e.contains("a vCPU exists")), || format!("{late:?}"))
}

/// Uses two trackers of different kinds on one VM, one after the other, and a union with the VMM's
/// own bitmap.
fn trackers_follow_each_other() -> Outcome {
    let mut guest = Guest::new(Backing::Memfd, None)?;
    guest.ram.prefault(guest.ram.layout().all())?;
    for kind in [TrackerKind::ManualProtect, TrackerKind::DirtyLog, TrackerKind::WriteProtect, TrackerKind::DirtyLog] {
        let bitmap = DirtyBitmap::new(guest.ram.layout().clone());
        let own = Box::new(BitmapTracker::new(bitmap.clone()));
        let mut tracker = UnionTracker::new(vec![guest.tracker(kind)?, own]);
        tracker.start()?;
        harvest(&guest, &mut tracker)?;
        let mut written = guest.write(3, 4, 90)?;
        bitmap.mark(DATA + 0x10_0000, 1);
        written.insert(guest.data().first + 0x100);
        same(&guest, kind.name(), &harvest(&guest, &mut tracker)?, &written, block_pages(kind, Backing::Memfd))?;
        let none = PageSet::empty(written.capacity());
        same(&guest, kind.name(), &harvest(&guest, &mut tracker)?, &none, 1)?;
    }
    Ok(())
}

/// A tracker that is stopped or dropped leaves the VM as it was: without a log, and for another
/// tracker to use.
fn nothing_is_left_of_a_tracker() -> Outcome {
    for kind in [TrackerKind::ManualProtect, TrackerKind::DirtyLog, TrackerKind::DirtyRing, TrackerKind::WriteProtect] {
        for dropped in [false, true] {
            let mut guest = Guest::new(Backing::Anonymous, ring_entries(kind))?;
            guest.ram.prefault(guest.ram.layout().all())?;
            let fault = Arc::new(UserFault::new()?);
            let parts = |guest: &Guest| Parts {
                vm: guest.vm.clone(),
                slots: guest.slots.clone(),
                user_fault: Some(fault.clone()),
                ring: None,
            };
            let mut tracker = match guest.ring.as_ref() {
                Some(ring) => build(kind, Parts { ring: Some(ring), ..parts(&guest) })?,
                None => build(kind, parts(&guest))?,
            };
            tracker.start()?;
            guest.write(0, 1, 20)?;
            let rearm = tracker.rearm();
            let slot = guest.slots.slots()[0];
            let has_log = |guest: &Guest| guest.vm.get_dirty_log(slot.slot, slot.len as usize).is_ok();
            let logs = matches!(kind, TrackerKind::ManualProtect | TrackerKind::DirtyLog);
            ensure(has_log(&guest) == logs, || format!("{kind}: a log while it is active"))?;
            if !dropped {
                tracker.stop()?;
            }
            drop(tracker);
            ensure(!has_log(&guest), || format!("{kind}: a log is left (dropped: {dropped})"))?;
            ensure(
                rearm.is_none_or(|rearm| {
                    rearm.before_read(guest.data(), &PageSet::full(guest.ram.layout().pages())).is_err()
                }),
                || format!("{kind}: pages can be re-armed (dropped: {dropped})"),
            )?;
            // another tracker of this kind can be started
            let mut next = match guest.ring.as_ref() {
                Some(ring) => build(kind, Parts { ring: Some(ring), ..parts(&guest) })?,
                None => build(kind, parts(&guest))?,
            };
            next.start()?;
            harvest(&guest, &mut *next)?;
            let written = guest.write(30, 1, 20)?;
            same(&guest, kind.name(), &harvest(&guest, &mut *next)?, &written, 1)?;
        }
    }
    Ok(())
}

/// The kernel may unmap a written page of a file (here it is told to). The write must be reported
/// all the same.
fn an_unmapped_page_is_still_dirty() -> Outcome {
    let guest = Guest::new(Backing::Memfd, None)?;
    guest.ram.prefault(guest.ram.layout().all())?;
    let fault = Arc::new(UserFault::new()?);
    let mut tracker = WriteProtect::new(guest.ram.clone(), fault);
    tracker.start()?;
    harvest(&guest, &mut tracker)?;
    let memory = &guest.ram;
    memory.write(DATA + 0x5000, b"x")?;
    let page = memory.slice_at(DATA + 0x5000, 0x1000)?;
    // SAFETY: inside the mapping. On a shared file this unmaps the page and keeps its contents.
    let unmapped = unsafe { libc::madvise(page.as_ptr().cast(), 0x1000, libc::MADV_DONTNEED) };
    ensure(unmapped == 0, || "madvise failed".into())?;
    let mut want = PageSet::empty(guest.ram.layout().pages());
    want.insert(guest.data().first + 5);
    let block_pages = block_pages(TrackerKind::WriteProtect, Backing::Memfd);
    same(&guest, "unmapped after the write", &harvest(&guest, &mut tracker)?, &want, block_pages)
}

fn probe_agrees() -> Outcome {
    let probe = Probe::new(&Kvm::new()?);
    eprintln!("{probe}");
    let kind = probe.choose(TrackerKind::Auto)?;
    let guest = Guest::new(Backing::Anonymous, None)?;
    guest.tracker(kind)?.start()?;
    Ok(())
}

/// The number of huge pages that the trials need. They may run in parallel.
const HUGE_PAGES: u64 = 64;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Raises the reserve of huge pages, and restores it when dropped.
struct HugePages(Option<u64>);

impl HugePages {
    fn reserve() -> Result<Self, String> {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok();
        let before = read().ok_or("cannot read the number of huge pages")?;
        fs::write(NR_HUGEPAGES, (before + HUGE_PAGES).to_string()).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        let this = Self(Some(before));
        if read() == Some(before + HUGE_PAGES) {
            Ok(this)
        } else {
            Err("not enough free memory in 2 MiB pieces".into())
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            let _ = fs::write(NR_HUGEPAGES, before.to_string());
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|v| v == "1");
    let (huge, no_huge) = match HugePages::reserve() {
        Ok(huge) if !arguments.list => (Some(huge), None),
        Ok(_) => (None, None),
        Err(why) => (None, Some(why)),
    };
    let kvm = Kvm::new();
    let probe = kvm.as_ref().ok().map(Probe::new);
    let mut trials = Vec::new();
    let mut add = |name: String, kind: TrackerKind, backing: Backing, run: Box<dyn FnOnce() -> Outcome + Send>| {
        let missing = match (&kvm, &probe) {
            (Err(error), _) => Some(format!("/dev/kvm: {error}")),
            (_, Some(probe)) => probe.choose(kind).err().map(|e| e.to_string()),
            _ => None,
        };
        let missing = missing.or_else(|| no_huge.clone().filter(|_| backing == Backing::Hugetlb));
        trials.push(match missing {
            Some(why) if required => Trial::test(name, move || Err(why.into())),
            Some(why) => {
                eprintln!("{name} is ignored: {why}");
                Trial::test(name, || Ok(())).with_ignored_flag(true)
            }
            None => Trial::test(name, run),
        });
    };
    for kind in TrackerKind::ALL {
        for backing in Backing::ALL {
            for (name, slots) in SLOTS {
                let run = Box::new(move || contract(kind, backing, slots));
                add(format!("{kind}/{backing}/contract{name}"), kind, backing, run);
            }
            add(format!("{kind}/{backing}/holes"), kind, backing, Box::new(move || holes(kind, backing)));
        }
    }
    for backing in Backing::ALL {
        let kind = TrackerKind::ManualProtect;
        for (name, slots) in SLOTS {
            let run = Box::new(move || rearm_is_exact(backing, slots));
            add(format!("{kind}/{backing}/rearm_is_exact{name}"), kind, backing, run);
        }
    }
    let one: [(&str, TrackerKind, Check); 6] = [
        ("nothing_is_left_of_a_tracker", TrackerKind::WriteProtect, nothing_is_left_of_a_tracker),
        ("a_full_ring_loses_nothing", TrackerKind::DirtyRing, a_full_ring_loses_nothing),
        ("ring_sizes_are_checked", TrackerKind::DirtyRing, ring_sizes_are_checked),
        ("trackers_follow_each_other", TrackerKind::WriteProtect, trackers_follow_each_other),
        ("an_unmapped_page_is_still_dirty", TrackerKind::WriteProtect, an_unmapped_page_is_still_dirty),
        ("probe_agrees", TrackerKind::Auto, probe_agrees),
    ];
    for (name, kind, run) in one {
        add(name.into(), kind, Backing::Memfd, Box::new(run));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(huge);
    conclusion.exit_code()
}
