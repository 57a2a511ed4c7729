//! For how long, and with how much, an attempt may hold the one session of a receiver: in
//! proportion to what it has sent.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{
    codec::DecodeError,
    wire::{Control, STATE_CHUNK},
};

/// The slowest link, in bytes of page data a second, on which an attempt earns its time as fast as
/// it uses it up.
const LEAST_RATE: u64 = 1 << 20;
/// An attempt ends when it has held the session for this many times what it has earned, though
/// nobody else asks.
const END_FACTOR: u32 = 16;
/// Pings that may come at once, and in a second: a source sends four a second at the most.
const PING_BURST: u64 = 1000;
const PINGS_A_SECOND: u64 = 100;
/// Bytes of device state that may come in pieces while the guest runs: a device may send what has
/// changed again and again.
const PIECES_PER_RAM: u64 = 4;
const LEAST_PIECES: u64 = 1 << 30;

/// What an attempt has done for its place.
pub(in crate::engine) struct Allowance {
    begun: Instant,
    /// Without a page.
    grace: Duration,
    /// Whether the source may put all of RAM into a store before it sends the first page (a
    /// forward checkpoint). If nobody else asks, it has the time for that.
    puts_ahead: bool,
    ram_bytes: u64,
    /// Bytes of page data that have come.
    received: AtomicU64,
    pings: AtomicU64,
    piece_bytes: AtomicU64,
    lists: AtomicU64,
}

impl Allowance {
    pub(in crate::engine) fn new(ram_bytes: u64, grace: Duration, puts_ahead: bool) -> Self {
        Self {
            begun: Instant::now(),
            grace,
            puts_ahead,
            ram_bytes,
            received: AtomicU64::new(0),
            pings: AtomicU64::new(0),
            piece_bytes: AtomicU64::new(0),
            lists: AtomicU64::new(0),
        }
    }

    /// Page data has come.
    pub(in crate::engine) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How long the attempt may hold the session while another source wants it. Pages that come
    /// again do not earn more than all of RAM does once.
    fn earned(&self) -> Duration {
        self.earned_by(self.received.load(Ordering::Relaxed))
    }

    fn earned_by(&self, bytes: u64) -> Duration {
        self.grace + Duration::from_secs(bytes.min(self.ram_bytes) / LEAST_RATE)
    }

    /// Whether another source may take the session.
    pub(in crate::engine) fn is_used_up(&self) -> bool {
        self.begun.elapsed() > self.earned()
    }

    /// Whether the attempt must end in any case.
    pub(in crate::engine) fn is_exceeded(&self) -> bool {
        let earned = if self.puts_ahead { self.earned_by(self.ram_bytes) } else { self.earned() };
        self.begun.elapsed() > earned.saturating_mul(END_FACTOR)
    }

    /// A frame has come, for a VM of so many pages.
    ///
    /// # Errors
    /// When it is one too many.
    pub(in crate::engine) fn frame(&self, frame: &Control, pages: u64) -> Result<(), DecodeError> {
        match frame {
            Control::Ping => self.ping(),
            Control::Piece(piece) => self.piece(piece.data.len()),
            Control::Missing { .. } => self.list(pages),
            _ => Ok(()),
        }
    }

    /// A ping has come.
    fn ping(&self) -> Result<(), DecodeError> {
        let pings = self.pings.fetch_add(1, Ordering::Relaxed);
        let most = PING_BURST + PINGS_A_SECOND.saturating_mul(self.begun.elapsed().as_secs());
        if pings < most { Ok(()) } else { Err(DecodeError::invalid("ping", format!("more than {most} of them"))) }
    }

    /// A piece of device state has come.
    fn piece(&self, bytes: usize) -> Result<(), DecodeError> {
        let limit = self.ram_bytes.saturating_mul(PIECES_PER_RAM).saturating_add(LEAST_PIECES);
        let len = self.piece_bytes.fetch_add(bytes as u64, Ordering::Relaxed).saturating_add(bytes as u64);
        if len <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "pieces of device state", len, limit }) }
    }

    /// A part of the list of missing pages has come.
    fn list(&self, pages: u64) -> Result<(), DecodeError> {
        let limit = pages.div_ceil(STATE_CHUNK as u64 * 8);
        let len = self.lists.fetch_add(1, Ordering::Relaxed) + 1;
        if len <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "parts of a list of pages", len, limit }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Section;

    const HOUR: Duration = Duration::from_secs(3600);

    fn after(time: Duration, received: u64) -> Allowance {
        let allowance = Allowance::new(1 << 30, Duration::from_secs(60), false);
        allowance.received(received);
        Allowance { begun: Instant::now().checked_sub(time).unwrap(), ..allowance }
    }

    #[test]
    fn time_is_earned_by_pages_up_to_all_of_ram() {
        assert!(!after(Duration::from_secs(30), 0).is_used_up());
        assert!(after(Duration::from_secs(90), 0).is_used_up());
        assert!(!after(Duration::from_secs(90), 0).is_exceeded());
        assert!(after(HOUR, 0).is_exceeded());
        // 512 MiB earn 512 s
        assert!(!after(Duration::from_secs(500), 512 << 20).is_used_up());
        assert!(after(Duration::from_secs(600), 512 << 20).is_used_up());
        // the same pages over and over
        assert!(after(Duration::from_secs(1100), u64::MAX).is_used_up());
        assert!(!after(HOUR, u64::MAX).is_exceeded() && after(6 * HOUR, u64::MAX).is_exceeded());
        // a forward checkpoint comes before the first page
        let ahead = |time| Allowance { puts_ahead: true, ..after(time, 0) };
        assert!(ahead(Duration::from_secs(90)).is_used_up());
        assert!(!ahead(HOUR).is_exceeded() && ahead(6 * HOUR).is_exceeded());
    }

    #[test]
    fn what_carries_nothing_is_counted() {
        let allowance = after(Duration::ZERO, 0);
        let pings = (0..1_000_000).take_while(|_| allowance.ping().is_ok()).count() as u64;
        // a second or two may have passed
        assert!((PING_BURST..1_000_000).contains(&pings), "{pings}");
        let all = (4 << 30) + LEAST_PIECES;
        assert!(allowance.piece(all as usize).is_ok() && allowance.piece(1).is_err());
        let each = STATE_CHUNK as u64 * 8;
        assert!(allowance.list(each).is_ok() && allowance.list(each).is_err() && allowance.list(3 * each).is_ok());
    }

    #[test]
    fn frames_that_carry_something_for_free_are_looked_at() {
        let allowance = || after(HOUR, 0);
        let data = vec![0; 9].into();
        let piece = Control::Piece(Section { name: "gpu".into(), instance: 0, version: 1, data });
        let list = Control::Missing { first: 0, bitmap: vec![1; 8].into() };
        for (frame, used_up) in [
            (Control::Ping, Allowance { pings: AtomicU64::new(u64::MAX / 2), ..allowance() }),
            (piece, Allowance { piece_bytes: AtomicU64::new((4 << 30) + LEAST_PIECES - 8), ..allowance() }),
            (list, Allowance { lists: AtomicU64::new(1), ..allowance() }),
        ] {
            assert!(allowance().frame(&frame, 100).is_ok(), "{}", frame.name());
            assert!(used_up.frame(&frame, 100).is_err(), "{}", frame.name());
            assert!(used_up.frame(&Control::Run, 100).is_ok());
        }
    }
}
