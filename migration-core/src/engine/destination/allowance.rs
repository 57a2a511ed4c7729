//! The limits of an attempt: the time for which it may occupy the place of a VM, and the amount of
//! data without pages that it may send, in proportion to the page data that it has sent.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{
    codec::DecodeError,
    wire::{Control, STATE_CHUNK},
};

/// The rate in bytes of page data per second at which an attempt earns as much time as it uses.
const LEAST_RATE: u64 = 1 << 20;
/// An attempt ends when it has used this many times the time that it has earned, even if no other
/// source waits.
const END_FACTOR: u32 = 16;
/// The largest number of pings at once, and per second. A source sends at most four per second.
const PING_BURST: u64 = 1000;
const PINGS_A_SECOND: u64 = 100;
/// The limit of device state in pieces while the guest runs: this many times RAM, plus a constant.
/// A device may send changed state again and again.
const PIECES_PER_RAM: u64 = 4;
const LEAST_PIECES: u64 = 1 << 30;
/// The largest number of reports per page, on average, of the store in which the page is: one for
/// each put, and one more after each loss of the link.
const LOCATIONS_PER_PAGE: u64 = 64;

/// The account of one attempt.
pub(in crate::engine) struct Allowance {
    begun: Instant,
    /// The time for an attempt that has sent no page.
    grace: Duration,
    /// Whether the source may put all of RAM into a store before it sends the first page (a forward
    /// checkpoint). It has the time for that if no other source waits.
    puts_ahead: bool,
    ram_bytes: u64,
    /// The bytes of page data that have arrived.
    received: AtomicU64,
    pings: AtomicU64,
    piece_bytes: AtomicU64,
    lists: AtomicU64,
    /// The number of pages whose store was reported.
    located: AtomicU64,
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
            located: AtomicU64::new(0),
        }
    }

    /// Adds page data that has arrived.
    pub(in crate::engine) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Returns the time that the attempt has earned. Pages that arrive again earn no more than all
    /// of RAM earns once.
    fn earned(&self) -> Duration {
        self.earned_by(self.received.load(Ordering::Relaxed))
    }

    fn earned_by(&self, bytes: u64) -> Duration {
        self.grace + Duration::from_secs(bytes.min(self.ram_bytes) / LEAST_RATE)
    }

    /// Returns whether another source may take the place.
    pub(in crate::engine) fn is_used_up(&self) -> bool {
        self.begun.elapsed() > self.earned()
    }

    /// Returns whether the attempt must end even if no other source waits.
    pub(in crate::engine) fn is_exceeded(&self) -> bool {
        let earned = if self.puts_ahead { self.earned_by(self.ram_bytes) } else { self.earned() };
        self.begun.elapsed() > earned.saturating_mul(END_FACTOR)
    }

    /// Counts a frame for a VM with `pages` pages of RAM.
    ///
    /// # Errors
    /// Returns an error if the frame exceeds a limit.
    pub(in crate::engine) fn frame(&self, frame: &Control, pages: u64) -> Result<(), DecodeError> {
        match frame {
            Control::Ping => self.ping(),
            Control::Piece(piece) => self.piece(piece.data.len()),
            Control::Missing { .. } => self.list(pages),
            // it is answered, like a ping
            Control::StoreTable(_) => self.ping(),
            Control::Located(located) => self.locate(located.pages(), pages),
            _ => Ok(()),
        }
    }

    /// Counts a ping.
    fn ping(&self) -> Result<(), DecodeError> {
        let pings = self.pings.fetch_add(1, Ordering::Relaxed);
        let most = PING_BURST + PINGS_A_SECOND.saturating_mul(self.begun.elapsed().as_secs());
        if pings < most { Ok(()) } else { Err(DecodeError::invalid("ping", format!("more than {most} of them"))) }
    }

    /// Counts a piece of device state.
    fn piece(&self, bytes: usize) -> Result<(), DecodeError> {
        let limit = self.ram_bytes.saturating_mul(PIECES_PER_RAM).saturating_add(LEAST_PIECES);
        let len = self.piece_bytes.fetch_add(bytes as u64, Ordering::Relaxed).saturating_add(bytes as u64);
        if len <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "pieces of device state", len, limit }) }
    }

    /// Counts a part of the list of missing pages.
    fn list(&self, pages: u64) -> Result<(), DecodeError> {
        let limit = pages.div_ceil(STATE_CHUNK as u64 * 8);
        let len = self.lists.fetch_add(1, Ordering::Relaxed) + 1;
        if len <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "parts of a list of pages", len, limit }) }
    }

    /// Counts a report of the store of `pages` pages, for a VM with `all` pages.
    fn locate(&self, pages: u64, all: u64) -> Result<(), DecodeError> {
        let limit = all.saturating_mul(LOCATIONS_PER_PAGE);
        let len = self.located.fetch_add(pages, Ordering::Relaxed).saturating_add(pages);
        if len <= limit { Ok(()) } else { Err(DecodeError::TooLong { field: "locations of pages", len, limit }) }
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
        // the same pages are sent again and again
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
        assert!(allowance.locate(100, 100).is_ok() && allowance.locate(64 * 100 - 100, 100).is_ok());
        assert!(allowance.locate(1, 100).is_err());
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
