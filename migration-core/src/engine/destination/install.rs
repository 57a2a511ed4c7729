//! The receiving end of a bulk or demand lane, which writes pages directly into guest RAM.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{missing::Missing, session::Session};
use crate::{
    MigrationError, PAGE_SIZE, PageRange,
    channel::ReadHalf,
    codec::DecodeError,
    engine::control::read_frame,
    page::STRIPE_PAGES,
    page_map::{MapError, PageCopy},
    ram::RamSlice,
    vm::VmError,
    wire::{Bulk, Content, Extent, Header, LaneKind},
};

pub(super) struct LaneReceiver {
    kind: LaneKind,
    pub(super) index: u16,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) peer: String,
    pub(super) session: Arc<Session>,
    pub(super) bytes: Arc<AtomicU64>,
    sequence: u32,
    /// The last generation that was completed.
    generation: u32,
    pages: u64,
    buffer: Vec<u8>,
}

impl LaneReceiver {
    pub(super) fn new(
        kind: LaneKind,
        index: u16,
        reader: Box<dyn ReadHalf>,
        peer: String,
        session: Arc<Session>,
        bytes: Arc<AtomicU64>,
    ) -> Self {
        Self { kind, index, reader, peer, session, bytes, sequence: 0, generation: 0, pages: 0, buffer: Vec::new() }
    }

    /// Receives frames until the lane ends. Returns the error with which the lane has ended. After
    /// the session was sealed, a lost link is no failure.
    pub(super) fn run(mut self) -> MigrationError {
        // between rounds a lane may be silent for any time: the time-out of the control lane
        // detects a dead source
        if let Err(cause) = self.reader.set_idle_timeout(None::<Duration>) {
            return MigrationError::link(&self.peer)(cause);
        }
        loop {
            if let Err(error) = self.frame() {
                return error;
            }
        }
    }

    fn frame(&mut self) -> Result<(), MigrationError> {
        let (header, body) = read_frame(&mut *self.reader, &mut self.sequence, &self.peer)?;
        let bytes = Header::LEN + body.len() + header.payload as usize;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let frame = Bulk::decode(&header, &body, self.session.ram.layout().pages())?;
        if let Some(missing) = self.session.missing()
            && header.number == missing.generation
        {
            if let (Bulk::Vacated { number }, LaneKind::Bulk) = (&frame, self.kind) {
                self.session.gatherer()?;
                self.session.marked(self.index, *number);
                return Ok(());
            }
            let Bulk::Pages { extents, payload_crc } = frame else {
                return Err(DecodeError::invalid("kind", "only pages come after the hand-over").into());
            };
            return self.install_missing(&missing, &extents, payload_crc, header.payload as usize);
        }
        if self.kind == LaneKind::Demand {
            let why = format!("pages of round {}, which were not asked for", header.number);
            return Err(DecodeError::invalid("generation", why).into());
        }
        if header.number != self.generation.wrapping_add(1) {
            let why = format!("pages of round {} after round {} was complete", header.number, self.generation);
            return Err(DecodeError::invalid("generation", why).into());
        }
        self.session.lane_starts(self.index, header.number)?;
        match frame {
            Bulk::Pages { extents, payload_crc } => {
                self.check_stripes(&extents)?;
                self.check_count(&extents)?;
                self.session.allowance.received(header.payload.into());
                if self.session.payload_crc {
                    self.install_checked(&extents, payload_crc, header.payload as usize)
                } else {
                    self.install(&extents)
                }
            }
            Bulk::RoundEnd { pages } if pages == self.pages => {
                (self.generation, self.pages) = (header.number, 0);
                self.session.lane_ended(self.index, header.number)
            }
            Bulk::Request { .. } => Err(DecodeError::invalid("kind", "requests go to the source").into()),
            Bulk::Vacated { .. } => Err(DecodeError::invalid("kind", "a source vacates after the hand-over").into()),
            Bulk::RoundEnd { pages } => {
                let why = format!("the round had {pages} pages, {} arrived", self.pages);
                Err(DecodeError::invalid("pages", why).into())
            }
        }
    }

    /// Checks that each page is on the lane of its stripe. On another lane, a page could be
    /// overtaken by an older copy of itself.
    fn check_stripes(&self, extents: &[Extent]) -> Result<(), MigrationError> {
        for e in extents {
            let (first, last) = (e.range.first / STRIPE_PAGES, (e.range.end() - 1) / STRIPE_PAGES);
            // with a single lane, every stripe belongs to it
            let own = self.session.lanes == 1
                || (first == last && first % u64::from(self.session.lanes) == u64::from(self.index));
            if !own {
                let why = format!("pages {}+{} do not belong to lane {}", e.range.first, e.range.count, self.index);
                return Err(DecodeError::invalid("extent", why).into());
            }
        }
        Ok(())
    }

    /// Checks that the round does not have more pages than RAM has. Each page is in a round at most
    /// once. A round with more pages might never end.
    fn check_count(&self, extents: &[Extent]) -> Result<(), DecodeError> {
        let pages = extents.iter().fold(self.pages, |pages, extent| pages.saturating_add(extent.range.count));
        let limit = self.session.ram.layout().pages();
        if pages <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "pages of a round", len: pages, limit }) }
    }

    fn install(&mut self, extents: &[Extent]) -> Result<(), MigrationError> {
        let ram = self.session.ram.clone();
        self.note(extents)?;
        let mut slices = Vec::with_capacity(extents.len());
        for extent in extents.iter().filter(|extent| extent.content == Content::Plain) {
            for (_, _, piece) in ram.layout().split(extent.range) {
                slices.push(ram.slice(piece)?);
            }
        }
        self.reader.read_ram(&slices).map_err(MigrationError::link(&self.peer))
    }

    /// Installs pages whose data have a checksum. The checksum is verified before the pages are
    /// written into RAM.
    fn install_checked(&mut self, extents: &[Extent], crc: u32, payload: usize) -> Result<(), MigrationError> {
        let buffer = self.read_checked(crc, payload)?;
        self.note(extents)?;
        let (ram, mut at) = (self.session.ram.clone(), 0);
        for extent in extents.iter().filter(|extent| extent.content == Content::Plain) {
            for (_, _, piece) in ram.layout().split(extent.range) {
                let bytes = piece.count as usize * PAGE_SIZE;
                ram.slice(piece)?.copy_from(&buffer[at..at + bytes]);
                at += bytes;
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Installs missing pages through the pager, because the guest runs in this memory after the
    /// hand-over.
    fn install_missing(
        &mut self,
        missing: &Missing,
        extents: &[Extent],
        crc: u32,
        payload: usize,
    ) -> Result<(), MigrationError> {
        extents.iter().try_for_each(|extent| missing.check(extent.range))?;
        let mut checked = None;
        if self.session.payload_crc {
            let buffer = self.read_checked(crc, payload)?;
            checked = Some((buffer, 0));
        }
        let layout = self.session.ram.layout().clone();
        for extent in extents {
            if extent.content == Content::Zero {
                let installed = missing.install(extent.range, |pager| pager.install_zeros(extent.range));
                installed.map_err(not_installed)?;
                continue;
            }
            for (_, _, piece) in layout.split(extent.range) {
                let mut first = piece.first;
                while first < piece.end() {
                    let end = piece.end().min((first / STRIPE_PAGES + 1) * STRIPE_PAGES);
                    let range = PageRange::new(first, end - first);
                    let (reader, mut lost) = (&mut self.reader, false);
                    let mut fill = |slices: &[RamSlice<'_>]| match &mut checked {
                        None => reader.read_ram(slices).inspect_err(|_| lost = true),
                        Some((buffer, at)) => {
                            for slice in slices {
                                slice.copy_from(&buffer[*at..*at + slice.len()]);
                                *at += slice.len();
                            }
                            Ok(())
                        }
                    };
                    let installed = missing.install(range, |pager| pager.install(range, PageCopy::Source, &mut fill));
                    let failed =
                        |cause| if lost { MigrationError::link(&self.peer)(cause) } else { not_installed(cause) };
                    installed.map_err(failed)?;
                    first = end;
                }
            }
        }
        if let Some((buffer, _)) = checked {
            self.buffer = buffer;
        }
        Ok(())
    }

    /// Reads `payload` bytes of page data into the buffer of this lane and returns the buffer,
    /// which the caller puts back.
    ///
    /// # Errors
    /// Returns an error if the link fails, or if the data do not have the checksum that the source
    /// has sent.
    fn read_checked(&mut self, crc: u32, payload: usize) -> Result<Vec<u8>, MigrationError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(payload, 0);
        self.reader.read_exact(&mut buffer).map_err(MigrationError::link(&self.peer))?;
        if crc32fast::hash(&buffer) != crc {
            return Err(DecodeError::Checksum { field: "page data" }.into());
        }
        Ok(buffer)
    }

    /// Records the pages of a frame of a round, and clears those that become zeros.
    fn note(&mut self, extents: &[Extent]) -> Result<(), MigrationError> {
        let to_clear = self.session.map.change(|map| {
            let mut to_clear = Vec::new();
            for extent in extents {
                match extent.content {
                    Content::Zero => to_clear.extend(map.zeroed(extent.range)?),
                    Content::Plain => map.received(extent.range)?,
                }
            }
            Ok::<_, MapError>(to_clear)
        });
        let to_clear = to_clear.map_err(|error| DecodeError::invalid("extent", error.to_string()))?;
        for run in to_clear {
            for (_, _, piece) in self.session.ram.layout().split(run) {
                self.session.ram.slice(piece)?.zero();
            }
        }
        self.pages += extents.iter().map(|extent| extent.range.count).sum::<u64>();
        Ok(())
    }
}

/// Returns the error for a pager that has failed, which is no failure of the link.
fn not_installed(cause: io::Error) -> MigrationError {
    MigrationError::Vm { step: "installing missing pages", cause: VmError::because("the pager", cause) }
}
