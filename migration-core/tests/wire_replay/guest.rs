//! The guest that was recorded, at its source and where it arrives.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, mpsc},
    time::Instant,
};

use bytes::Bytes;
use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    device::DeviceKind,
    paged_memory::PagedMemory,
    pager::Pager,
    state::{Section, VmState},
    store::Urgency,
    tracker::{BitmapTracker, DirtyBitmap, DirtyTracker},
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError},
};

use crate::{
    HANG, VM,
    pager::{HeapPager, Paging},
};
/// Three stripes, so that both lanes have some, and a hole in the address space.
pub(crate) fn layout() -> RamLayout {
    let regions = vec![RamRegion { gpa: 0, len: 600 << 12 }, RamRegion { gpa: 1 << 30, len: 680 << 12 }];
    RamLayout::new(regions).unwrap()
}

/// What the guest writes: a page's number and the byte that it is full of, before the migration and
/// while it runs.
pub(crate) const BEFORE: [(u64, u8); 6] = [(0, 1), (1, 2), (511, 3), (512, 4), (600, 5), (1279, 6)];
pub(crate) const DURING: [(u64, u8); 3] = [(1, 0), (513, 7), (600, 8)];

pub(crate) struct RecordedVm {
    description: VmDescription,
    during: &'static [(u64, u8)],
    pub(crate) ram: Arc<HeapRam>,
    pub(crate) dirty: Arc<DirtyBitmap>,
    pub(crate) tracker: BitmapTracker,
    pub(crate) wrote: bool,
    /// The pages that it has referenced, if that can be told.
    pub(crate) referenced: Option<&'static [u64]>,
    /// The pages that are free once it has written.
    pub(crate) free: &'static [u64],
    /// Called when *run* is about to be sent.
    pub(crate) in_doubt: Option<Box<dyn FnMut() + Send>>,
    /// Its memory, if pages of it are in stores, and the pages that it touches before its last
    /// writes.
    pub(crate) memory: Option<Arc<PagedMemory>>,
    pub(crate) touches: &'static [u64],
    /// Whether a thread of the test may write its pages. None does from a pause on.
    pub(crate) writing: Arc<Mutex<bool>>,
    /// What the engine has done with it that cannot be undone: `resume`, `released`.
    pub(crate) calls: Arc<Mutex<Vec<&'static str>>>,
}

impl RecordedVm {
    pub(crate) fn new() -> Self {
        Self::of(description(), &BEFORE, &DURING)
    }

    pub(crate) fn of(description: VmDescription, before: &[(u64, u8)], during: &'static [(u64, u8)]) -> Self {
        let dirty = DirtyBitmap::new(description.layout.clone());
        let tracker = BitmapTracker::new(dirty.clone());
        let ram = Arc::new(HeapRam::new(description.layout.clone()).unwrap());
        let (wrote, referenced, calls) = (false, Some(&[][..]), Arc::default());
        let (free, in_doubt) = (&[][..], None);
        let (memory, touches) = (None, &[][..]);
        let vm = Self {
            description,
            during,
            ram,
            dirty,
            tracker,
            wrote,
            referenced,
            free,
            in_doubt,
            memory,
            touches,
            writing: Arc::default(),
            calls,
        };
        before.iter().for_each(|&(page, byte)| vm.write(page, byte));
        vm
    }

    pub(crate) fn write(&self, page: u64, byte: u8) {
        write(&self.ram, &self.dirty, page, byte);
    }

    pub(crate) fn ram_pages(&self) -> u64 {
        self.description.layout.pages()
    }

    /// Writes once, at the first occasion after tracking began.
    pub(crate) fn write_more(&mut self) {
        if !std::mem::replace(&mut self.wrote, true) {
            if let Some(memory) = &self.memory {
                let pages = self.touches.iter().chain(self.during.iter().map(|(page, _)| page));
                let deadline = Instant::now() + HANG;
                pages.for_each(|&page| _ = memory.fetch(PageRange::new(page, 1), Urgency::Fault, deadline).unwrap());
            }
            self.during.iter().for_each(|&(page, byte)| self.write(page, byte));
        }
    }
}

/// Fills a page of the guest's with this byte.
pub(crate) fn write(ram: &HeapRam, dirty: &DirtyBitmap, page: u64, byte: u8) {
    ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[byte; PAGE_SIZE]);
    dirty.mark_page(page);
}

impl SourceVm for RecordedVm {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        Ok(self.description.clone())
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn paged_memory(&self) -> Option<Arc<PagedMemory>> {
        self.memory.clone()
    }

    fn referenced_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        assert!(!self.tracker.is_active(), "pages may have been read already");
        let referenced = self.referenced.ok_or_else(|| VmError::new("nobody has looked"))?;
        referenced.iter().for_each(|&page| _ = into.insert(page));
        Ok(())
    }

    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let free = self.free.iter().filter(|_| self.wrote);
        free.for_each(|&page| _ = into.insert(page));
        Ok(())
    }

    fn owner_in_doubt(&mut self) {
        if let Some(in_doubt) = &mut self.in_doubt {
            in_doubt();
        }
    }

    fn iterate_state(&mut self, _budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        Ok((vec![piece()], 0))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        *self.writing.lock().unwrap() = false;
        // the guest's last writes
        self.write_more();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.calls.lock().unwrap().push("resume");
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        Ok(state())
    }

    fn released(&mut self) {
        self.calls.lock().unwrap().push("released");
    }
}

pub(crate) fn description() -> VmDescription {
    description_of(layout())
}

pub(crate) fn description_of(layout: RamLayout) -> VmDescription {
    let gpu = DeviceKind { name: "gpu".into(), instance: 1, oldest: 1, version: 2 };
    let (host_needs, config) = (Bytes::from_static(b"needs"), Bytes::from_static(b"config"));
    VmDescription { id: VM, layout, devices: vec![gpu], host_needs, config }
}

pub(crate) fn piece() -> Section {
    Section { name: "gpu".into(), instance: 1, version: 2, data: Bytes::from_static(b"a piece") }
}

/// The name of pieces that take space and nothing else.
pub(crate) const FILLER: &str = "filler";

pub(crate) fn state() -> VmState {
    let section = |name: &str, instance, data| Section { name: name.into(), instance, version: 1, data };
    VmState {
        sections: vec![
            section("vcpu", 0, Bytes::from_static(b"registers of vCPU 0")),
            section("vcpu", 1, Bytes::from_static(b"registers of vCPU 1")),
            section("vm", 0, Bytes::new()),
        ],
    }
}

/// A VM that arrived: its RAM, the state that was loaded, and how many pieces came before.
pub(crate) struct Arrived {
    pub(crate) ram: Arc<HeapRam>,
    pub(crate) state: Option<VmState>,
    pub(crate) pieces: usize,
    pub(crate) running: bool,
    /// What serves its missing pages.
    pub(crate) pager: Option<Arc<HeapPager>>,
}

impl Arrived {
    /// The pages that are not zero, and their checksums.
    pub(crate) fn pages(&self) -> BTreeMap<u64, u32> {
        checksums(&self.ram)
    }
}

/// The pages that are not zero, and their checksums.
pub(crate) fn checksums(ram: &HeapRam) -> BTreeMap<u64, u32> {
    let mut bytes = vec![0; PAGE_SIZE];
    let mut checksum = |page| {
        let slice = ram.slice(PageRange::new(page, 1)).unwrap();
        slice.copy_to(&mut bytes);
        (page, crc32fast::hash(&bytes))
    };
    let is_zero = |page: &u64| ram.slice(PageRange::new(*page, 1)).unwrap().is_zero();
    (0..ram.layout().pages()).filter(|page| !is_zero(page)).map(&mut checksum).collect()
}

pub(crate) struct ArrivingVm {
    pub(crate) arrived: Option<Arrived>,
    pub(crate) to: mpsc::Sender<Arrived>,
}

impl DestinationVm for ArrivingVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.arrived.as_ref().unwrap().ram.clone()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        let pager = self.arrived.as_ref().unwrap().pager.clone();
        pager.map(|pager| pager as Arc<dyn Pager>)
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        vec![1]
    }

    fn load_piece(&mut self, loaded: &Section) -> Result<(), VmError> {
        if *loaded != piece() && loaded.name != FILLER {
            return Err(VmError::new("an unknown piece"));
        }
        self.arrived.as_mut().unwrap().pieces += 1;
        Ok(())
    }

    fn load_state(&mut self, loaded: &VmState) -> Result<(), VmError> {
        if loaded.find("vcpu", 0).is_none() {
            return Err(VmError::new("the state has no vCPU"));
        }
        if let Some(pager) = &self.arrived.as_ref().unwrap().pager {
            // loading the state touches RAM
            pager.touch()?;
        }
        self.arrived.as_mut().unwrap().state = Some(loaded.clone());
        Ok(())
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        let mut arrived = self.arrived.take().unwrap();
        arrived.running = running;
        // a test that does not look has dropped the other end
        let _ = self.to.send(arrived);
        Ok(())
    }
}

/// Builds the VM of this description, and hands those that are started to the test.
pub(crate) struct Host {
    pub(crate) description: VmDescription,
    pub(crate) to: mpsc::Sender<Arrived>,
    pub(crate) paging: Option<Paging>,
}

impl DestinationHost for Host {
    type Vm = ArrivingVm;

    fn build(&self, vm: &VmDescription) -> Result<ArrivingVm, VmError> {
        if *vm != self.description {
            return Err(VmError::new("another VM than the one recorded"));
        }
        let ram = Arc::new(HeapRam::new(vm.layout.clone()).unwrap());
        let pager = self.paging.as_ref().map(|paging| Arc::new(HeapPager::new(ram.clone(), paging)));
        let arrived = Arrived { ram, state: None, pieces: 0, running: false, pager };
        Ok(ArrivingVm { arrived: Some(arrived), to: self.to.clone() })
    }
}
