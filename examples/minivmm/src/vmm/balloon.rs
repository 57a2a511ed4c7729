//! The balloon: a device with which the guest reports the pages that it does not need. The report
//! is a bitmap in guest RAM, and the guest writes the bitmap's address to a few ports.
//!
//! The guest sets the bit of a page that it does not need, and clears the bit before it uses the
//! page again. Neither needs an exit: the VMM reads the bitmap only when a migration asks for the
//! free pages. For a migration the bitmap is only a hint. Nothing is done to the pages, so the
//! guest need not wait for an answer. A page that the guest takes back just after the bitmap was
//! read is dirty as soon as the guest writes the page: see
//! [`SourceVm::free_pages`](migration_core::vm::SourceVm::free_pages). The guest's CPU keeps the
//! two stores in their order, and the VMM reads each word of the bitmap at once.
//!
//! A guest that also wants to give the memory to the host writes a range of frames into the slot of
//! its CPU, which lies after the bitmap, and the number of the slot to a port. The free pages in
//! the range are discarded before the vCPU continues, and the guest takes none of them back until
//! then. So no page is discarded that is in use again. A migration may be under way. It then reads
//! zeros from such a page, instead of contents that nobody needs, and a page that is written after
//! it was discarded is dirty for every tracker. But a page that arrives by post-copy must not be
//! discarded without the knowledge of the pager. So nothing is discarded while pages are missing.
//!
//! The ports are those of `layout::balloon`. The guest is not trusted: the address and the length
//! of the bitmap are checked against RAM before the device is on, and again when the state arrives
//! from another host. The *contents* of the bitmap can harm only the guest itself, which loses the
//! contents of pages that it wrongly reports as free.

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use guests::layout::balloon as ports;
use migration_core::{
    GuestRam, PAGE_SHIFT, PageRange, PageSet,
    codec::{Reader, Writer},
    device::Device,
    vm::VmError,
};

/// A function that gives the memory of pages back to the host.
pub(super) type Discard = Box<dyn Fn(&[PageRange]) -> Result<(), String> + Send + Sync>;

/// The balloon device.
pub(super) struct Balloon {
    ram: Arc<dyn GuestRam>,
    discard: Discard,
    registers: Mutex<Registers>,
    /// The reason why memory could not be given back, at the last attempt.
    failure: Mutex<Option<String>>,
}

/// The registers that the guest has written, and the resulting state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    /// The frame number of the bitmap's first page, then the number of frames that the bitmap
    /// covers: little endian.
    bytes: [u8; 8],
    /// One of the [`ports`]' states.
    state: u8,
}

/// A bitmap in RAM, with one bit for each frame from frame 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bitmap {
    gpa: u64,
    frames: u64,
}

impl Bitmap {
    /// Returns the number of bytes that are read for free pages: whole words.
    fn bytes(self) -> u64 {
        self.frames.div_ceil(64) * 8
    }

    /// Returns the bits of these frames, in whole words. The first bit is the first one of the word
    /// that contains the bit of the first frame.
    fn read(self, frames: PageRange, ram: &dyn GuestRam) -> Result<PageSet, VmError> {
        let (first, end) = (frames.first / 64, frames.end().min(self.frames).div_ceil(64));
        let mut bytes = vec![0; (end.saturating_sub(first) * 8) as usize];
        let outside = |e| VmError::because("the balloon's bitmap", e);
        ram.read(self.gpa + first * 8, &mut bytes).map_err(outside)?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default())).collect();
        let count = words.len() as u64 * 64;
        let mut set = PageSet::empty(count);
        set.insert_bitmap(0, count, &words);
        Ok(set)
    }

    /// Returns the pages among these frames that the guest does not need now.
    fn free(self, frames: PageRange, ram: &dyn GuestRam) -> Result<Vec<PageRange>, VmError> {
        let (bits, base) = (self.read(frames, ram)?, frames.first / 64 * 64);
        let (layout, mut free) = (ram.layout(), Vec::new());
        for (index, region) in layout.regions().iter().enumerate() {
            let Some(pages) = layout.region_pages(index) else { continue };
            let region_first = region.gpa >> PAGE_SHIFT;
            let first = frames.first.max(region_first);
            let end = frames.end().min(self.frames).min(region_first + pages.count);
            if first < end {
                let runs = bits.ranges_in(PageRange::new(first - base, end - first));
                free.extend(runs.map(|r| PageRange::new(pages.first + (base + r.first - region_first), r.count)));
            }
        }
        Ok(free)
    }

    /// Returns the bitmap that the registers name, or `None` if it is invalid. A bitmap must cover
    /// at least one frame and none beyond RAM, and the bitmap and the slots must lie in one piece
    /// of RAM.
    fn check(bytes: [u8; 8], ram: &dyn GuestRam) -> Option<Self> {
        let word = u64::from_le_bytes(bytes);
        let bitmap = Self { gpa: (word & 0xffff_ffff) << PAGE_SHIFT, frames: word >> 32 };
        let end = ram.layout().regions().last().map_or(0, |region| (region.gpa + region.len) >> PAGE_SHIFT);
        let bytes = bitmap.bytes() + ports::SLOTS * ports::SLOT_SIZE;
        ((1..=end).contains(&bitmap.frames) && ram.slice_at(bitmap.gpa, bytes).is_ok()).then_some(bitmap)
    }
}

impl Balloon {
    pub(super) fn new(ram: Arc<dyn GuestRam>, discard: Discard) -> Arc<Self> {
        Arc::new(Self { ram, discard, registers: Mutex::default(), failure: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // each register is one byte, so there is no intermediate state
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Handles a write of the guest to a port of the device.
    pub(super) fn write(&self, offset: u16, value: u8) {
        if offset == ports::DISCARD {
            let result = self.discard(value).map_err(|e| e.to_string());
            *self.failure.lock().unwrap_or_else(|e| e.into_inner()) = result.err();
            return;
        }
        let registers = &mut *self.lock();
        if let Some(byte) = registers.bytes.get_mut(usize::from(offset)) {
            // the address of the bitmap can change only while the device is off
            if registers.state != ports::ON {
                *byte = value;
            }
        } else if offset == ports::COMMAND {
            registers.state = match value {
                ports::ON if Bitmap::check(registers.bytes, &*self.ram).is_some() => ports::ON,
                ports::ON => ports::REFUSED,
                _ => ports::OFF,
            };
        }
    }

    /// Handles a read of the guest from a port of the device.
    pub(super) fn read(&self, offset: u16) -> u8 {
        let registers = self.lock();
        if offset == ports::COMMAND {
            return registers.state;
        }
        registers.bytes.get(usize::from(offset)).copied().unwrap_or(0xff)
    }

    /// Adds the pages that the guest does not need now to `into`.
    pub(super) fn free_pages(&self, into: &mut PageSet) -> Result<(), VmError> {
        if let Some(bitmap) = self.bitmap() {
            let free = bitmap.free(PageRange::new(0, bitmap.frames), &*self.ram)?;
            free.into_iter().for_each(|run| into.insert_range(run));
        }
        Ok(())
    }

    /// Returns a warning for the user if memory could not be given back.
    pub(super) fn warning(&self) -> Option<String> {
        let failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        failure.as_ref().map(|why| format!("free pages keep their memory: {why}"))
    }

    /// Returns the bitmap, if the guest uses one.
    fn bitmap(&self) -> Option<Bitmap> {
        let registers = *self.lock();
        if registers.state == ports::ON { Bitmap::check(registers.bytes, &*self.ram) } else { None }
    }

    /// Gives the memory of the free pages in the range of a slot back to the host. An invalid range
    /// counts as empty.
    fn discard(&self, slot: u8) -> Result<(), VmError> {
        let slot = u64::from(slot);
        let Some(bitmap) = self.bitmap().filter(|_| slot < ports::SLOTS) else { return Ok(()) };
        let mut words = [0; ports::SLOT_SIZE as usize];
        let at = bitmap.gpa + bitmap.bytes() + slot * ports::SLOT_SIZE;
        self.ram.read(at, &mut words).map_err(|e| VmError::because("a slot of the balloon", e))?;
        // the slot is read once, because the guest may write there meanwhile
        let [first, count] = [0, 8].map(|n| u64::from_le_bytes(std::array::from_fn(|i| words[n + i])));
        if first >= bitmap.frames || count == 0 || count > ports::MAX_DISCARD {
            return Ok(());
        }
        let free = bitmap.free(PageRange::new(first, count.min(bitmap.frames - first)), &*self.ram)?;
        (self.discard)(&free).map_err(VmError::new)
    }
}

/// The balloon as a device that migrates. The bitmap itself is guest RAM.
pub(super) struct BalloonDevice(pub(super) Arc<Balloon>);

impl Device for BalloonDevice {
    fn name(&self) -> &str {
        "balloon"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Bytes, VmError> {
        let Registers { bytes, state } = *self.0.lock();
        let mut w = Writer::new();
        w.bytes(&bytes).bytes(&[state]);
        Ok(w.into_bytes().into())
    }

    fn load(&mut self, _version: u32, data: &[u8]) -> Result<(), VmError> {
        let malformed = |e| VmError::because("state of the balloon", e);
        let mut r = Reader::new(data);
        let bytes = r.array("registers").map_err(malformed)?;
        let [state] = r.array("state").map_err(malformed)?;
        r.finish().map_err(malformed)?;
        let good = match state {
            ports::ON => Bitmap::check(bytes, &*self.0.ram).is_some(),
            other => matches!(other, ports::OFF | ports::REFUSED),
        };
        if !good {
            let why = format!("state of the balloon makes no sense: {state} with registers {bytes:x?}");
            return Err(VmError::new(why));
        }
        *self.0.lock() = Registers { bytes, state };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration_core::{HeapRam, RamLayout, RamRegion};

    use super::*;

    /// Returns a balloon with 1 MiB of RAM at 0 and 1 MiB at 2 MiB.
    fn balloon_with(discard: Discard) -> Arc<Balloon> {
        let regions = vec![RamRegion { gpa: 0, len: 1 << 20 }, RamRegion { gpa: 2 << 20, len: 1 << 20 }];
        Balloon::new(Arc::new(HeapRam::new(RamLayout::new(regions).unwrap()).unwrap()), discard)
    }

    fn balloon() -> Arc<Balloon> {
        balloon_with(Box::new(|_| Err("nobody asked for it".into())))
    }

    fn ask(balloon: &Balloon, frame: u32, frames: u32) -> u8 {
        balloon.write(ports::COMMAND, ports::OFF);
        for (at, byte) in (0..).zip(frame.to_le_bytes().into_iter().chain(frames.to_le_bytes())) {
            balloon.write(at, byte);
        }
        balloon.write(ports::COMMAND, ports::ON);
        balloon.read(ports::COMMAND)
    }

    fn free(balloon: &Balloon) -> Vec<u64> {
        let mut pages = PageSet::empty(512);
        balloon.free_pages(&mut pages).unwrap();
        pages.iter().collect()
    }

    #[test]
    fn bits_become_pages_on_both_sides_of_a_hole() {
        let balloon = balloon();
        assert_eq!(free(&balloon), [0; 0], "off");
        assert_eq!(ask(&balloon, 1, 700), ports::ON);
        assert_eq!(free(&balloon), [0; 0]);
        // frames 3, 255, 256 (in the hole), 512, 699, 700 (beyond the bitmap)
        for frame in [3u64, 255, 256, 512, 699, 700] {
            let (at, mut byte) = (0x1000 + frame / 8, [0]);
            balloon.ram.read(at, &mut byte).unwrap();
            balloon.ram.write(at, &[byte[0] | 1 << (frame % 8)]).unwrap();
        }
        assert_eq!(free(&balloon), [3, 255, 256, 443]);
        balloon.write(ports::COMMAND, ports::OFF);
        assert_eq!(free(&balloon), [0; 0]);
    }

    #[test]
    fn a_bitmap_outside_ram_is_refused() {
        let balloon = balloon();
        for (frame, frames) in [(1, 0), (1, 769), (1, u32::MAX), (256, 1), (511, 768), (768, 1), (u32::MAX, 768)] {
            assert_eq!(ask(&balloon, frame, frames), ports::REFUSED, "{frame} {frames}");
            assert_eq!(free(&balloon), [0; 0]);
        }
        assert_eq!(ask(&balloon, 255, 768), ports::ON);
        // the address of a bitmap that is in use does not change
        balloon.write(0, 7);
        assert_eq!(balloon.read(0), 255);
        assert_eq!(balloon.read(ports::COMMAND), ports::ON);
        assert_eq!(balloon.read(77), 0xff);
    }

    #[test]
    fn what_is_free_in_a_slots_range_is_discarded() {
        let gone = Arc::new(Mutex::new(Vec::new()));
        let list = gone.clone();
        let balloon = balloon_with(Box::new(move |runs| {
            list.lock().unwrap().extend(runs.iter().map(|r| (r.first, r.count)));
            Ok(())
        }));
        assert_eq!(ask(&balloon, 1, 768), ports::ON);
        for word in 0..12 {
            balloon.ram.write(0x1000 + 8 * word, &0x8000_0000_0000_0ff0u64.to_le_bytes()).unwrap();
        }
        let slots = 0x1000 + 96;
        let discard = |slot: u8, first: u64, count: u64| {
            let at = slots + u64::from(slot % 16) * ports::SLOT_SIZE;
            balloon.ram.write(at, &first.to_le_bytes()).unwrap();
            balloon.ram.write(at + 8, &count.to_le_bytes()).unwrap();
            balloon.write(ports::DISCARD, slot);
            std::mem::take(&mut *gone.lock().unwrap())
        };
        assert_eq!(discard(0, 6, 58), [(6, 6), (63, 1)]);
        assert_eq!(discard(15, 70, 60), [(70, 6), (127, 1)]);
        // ranges into the hole, out of the hole, and to the end of RAM
        assert_eq!(discard(3, 255, 200), [(255, 1)]);
        assert_eq!(discard(3, 300, 217), [(260, 1)]);
        assert_eq!(discard(3, 767, 4096), [(511, 1)]);
        for (slot, first, count) in
            [(0, 768, 1), (0, 0, 0), (0, 0, 4097), (0, u64::MAX, 4096), (0, 5, u64::MAX), (16, 6, 58)]
        {
            assert_eq!(discard(slot, first, count), [], "{slot} {first} {count}");
        }
        balloon.write(ports::COMMAND, ports::OFF);
        assert_eq!(discard(0, 6, 58), []);
        assert_eq!(balloon.warning(), None);
    }

    #[test]
    fn the_state_travels_and_nonsense_is_refused() {
        let (from, to) = (balloon(), balloon());
        assert_eq!(ask(&from, 512, 768), ports::ON);
        from.ram.write(2 << 20, &[0x10]).unwrap();
        to.ram.write(2 << 20, &[0x10]).unwrap();
        let state = BalloonDevice(from).save().unwrap();
        BalloonDevice(to.clone()).load(1, &state).unwrap();
        assert_eq!(free(&to), [4]);
        for wrong in [&state[..8], &[0; 10][..], &[0, 0, 0, 0, 0, 0, 0, 0, 9], &[0, 1, 0, 0, 1, 0, 0, 0, ports::ON]] {
            assert!(BalloonDevice(to.clone()).load(1, wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(free(&to), [4]);
    }
}
