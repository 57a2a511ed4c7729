//! Where the guest says which pages it does not need: a bitmap in its own RAM, and a few ports to say where that is.
//!
//! The guest sets the bit of a page that it does not need, and clears it before it uses the page again. Neither needs an
//! exit: the VMM looks at the bitmap when a migration wants to know, and only then. It is a hint and no more, nothing is
//! done to the pages, so no answer has to be waited for. A page that the guest takes back just after the look is dirty as
//! soon as it is written: see [`SourceVm::free_pages`](migration_core::vm::SourceVm::free_pages). The guest's CPU keeps the
//! two stores in their order, and the word that is read here is read at once.
//!
//! The ports are those of [`layout::balloon`]. The guest is not trusted: where the bitmap lies and how long it is are
//! checked against RAM before the device is on, and again when the state arrives from another host. What is *in* the
//! bitmap can do no harm but to the guest itself, which loses the contents of pages that it wrongly calls free.

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use migration_core::{
    GuestRam, PAGE_SHIFT, PageRange, PageSet,
    codec::{Reader, Writer},
    device::Device,
    vm::VmError,
};

use crate::workload::layout::balloon as ports;

/// The device.
pub(super) struct Balloon {
    ram: Arc<dyn GuestRam>,
    registers: Mutex<Registers>,
}

/// What the guest has written, and what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    /// Frame number of the bitmap's first page, then the number of frames it is for: little endian.
    bytes: [u8; 8],
    /// One of the [`ports`]' states.
    state: u8,
}

/// A bitmap that lies in RAM, bit by bit for the frames from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bitmap {
    gpa: u64,
    frames: u64,
}

impl Bitmap {
    /// Bytes that are looked at: whole words.
    fn bytes(self) -> u64 {
        self.frames.div_ceil(64) * 8
    }

    /// What the registers name, if it is good: some frames, none beyond RAM, all of the bitmap in one piece of RAM.
    fn check(bytes: [u8; 8], ram: &dyn GuestRam) -> Option<Self> {
        let word = u64::from_le_bytes(bytes);
        let bitmap = Self { gpa: (word & 0xffff_ffff) << PAGE_SHIFT, frames: word >> 32 };
        let end = ram.layout().regions().last().map_or(0, |region| (region.gpa + region.len) >> PAGE_SHIFT);
        let good = (1..=end).contains(&bitmap.frames) && ram.slice_at(bitmap.gpa, bitmap.bytes()).is_ok();
        good.then_some(bitmap)
    }
}

impl Balloon {
    pub(super) fn new(ram: Arc<dyn GuestRam>) -> Arc<Self> {
        Arc::new(Self { ram, registers: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // a byte each: there is no state in between
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The guest writes a port of the device.
    pub(super) fn write(&self, offset: u16, value: u8) {
        let registers = &mut *self.lock();
        if let Some(byte) = registers.bytes.get_mut(usize::from(offset)) {
            // where it looks changes only while it does not look
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

    /// The guest reads one.
    pub(super) fn read(&self, offset: u16) -> u8 {
        let registers = self.lock();
        if offset == ports::COMMAND {
            return registers.state;
        }
        registers.bytes.get(usize::from(offset)).copied().unwrap_or(0xff)
    }

    /// Adds the pages that the guest does not need now.
    pub(super) fn free_pages(&self, into: &mut PageSet) -> Result<(), VmError> {
        let registers = *self.lock();
        if registers.state != ports::ON {
            return Ok(());
        }
        let outside = || VmError::new("the balloon's bitmap is not in RAM");
        let bitmap = Bitmap::check(registers.bytes, &*self.ram).ok_or_else(outside)?;
        let mut bytes = vec![0; bitmap.bytes() as usize];
        self.ram.read(bitmap.gpa, &mut bytes).map_err(|e| VmError::because("the balloon's bitmap", e))?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default())).collect();
        let mut frames = PageSet::empty(bitmap.frames);
        frames.insert_bitmap(0, bitmap.frames, &words);
        let layout = self.ram.layout();
        for (index, region) in layout.regions().iter().enumerate() {
            let Some(pages) = layout.region_pages(index) else { continue };
            let first = region.gpa >> PAGE_SHIFT;
            for run in frames.ranges_in(PageRange::new(first, pages.count)) {
                into.insert_range(PageRange::new(pages.first + (run.first - first), run.count));
            }
        }
        Ok(())
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

    /// 1 MiB at 0, and 1 MiB at 2 MiB.
    fn balloon() -> Arc<Balloon> {
        let regions = vec![RamRegion { gpa: 0, len: 1 << 20 }, RamRegion { gpa: 2 << 20, len: 1 << 20 }];
        Balloon::new(Arc::new(HeapRam::new(RamLayout::new(regions).unwrap()).unwrap()))
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
        // frames 3, 255, 256 (in the hole), 512, 699, 700 (beyond what it is for)
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
        // what is in use stays where it is
        balloon.write(0, 7);
        assert_eq!(balloon.read(0), 255);
        assert_eq!(balloon.read(ports::PORTS - 1), ports::ON);
        assert_eq!(balloon.read(77), 0xff);
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
