//! The source after the hand-over. It streams missing pages: it answers demands, and pushes the
//! other pages over the direct link and through stores. If the link is lost, it waits until the
//! link is restored. It ends when the destination has released it.

use std::time::Duration;

use super::{
    Simulation,
    link::{Message, link_error},
    stores::VM,
};
use crate::{
    MigrationError, PageRange,
    protocol::SourcePhase,
    store::limits::MAX_RUN_PAGES,
    strategy::{Linear, PushOrder, push_order::checked_next},
    text::describe,
};

/// The time that it takes to restore a lost link.
const RECONNECTS: Duration = Duration::from_millis(100);

impl Simulation {
    pub(super) fn serve_all(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        order.begin(self.source.map.unclaimed(), &self.source.heat);
        while self.serves() {
            let Err(error) = self.push(order) else { continue };
            if self.source.dead {
                return Err(error);
            }
            self.attempt.recoveries += 1;
            // an error leaves the state as it is
            while self.serves() && self.repeat_run().is_err() {}
        }
        Ok(())
    }

    fn serves(&self) -> bool {
        self.source.machine.phase() == SourcePhase::Serving && !self.source.dead
    }

    fn push(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        while self.source.machine.phase() == SourcePhase::Serving {
            if let Some(error) = self.source.failure.take() {
                return Err(error);
            }
            if !self.network.connected {
                return Err(link_error());
            }
            for page in std::mem::take(&mut self.source.demanded) {
                order.fault(page);
            }
            self.announce(&crate::PageSet::empty(self.config.pages))?;
            if self.push_next(order)? {
                continue;
            }
            let all_sent = self.source.map.unclaimed().is_empty() && self.source.puts.is_empty();
            if all_sent && !self.source.vacated && self.source.map.unannounced().is_empty() {
                self.source.vacated = true;
                self.send_message(Message::Vacated)?;
                continue;
            }
            if !self.step(self.next_free_lane()) {
                // all pages were sent and nothing is under way, so the wait would never end
                return Err(link_error());
            }
        }
        Ok(())
    }

    /// Pushes one run, if a lane is free: over the direct link first, then through a store. Returns
    /// whether it pushed a run.
    fn push_next(&mut self, order: &mut dyn PushOrder) -> Result<bool, MigrationError> {
        let most = self.config.chunk.max(1);
        if self.network.to_destination.free_at <= self.clock {
            let Some(range) = self.next_push(order, most) else { return Ok(false) };
            self.source.map.claim(range)?;
            self.send_pages(range, false)?;
            return Ok(true);
        }
        if self.network.to_stores.free_at > self.clock {
            return Ok(false);
        }
        let Some(entry) = self.store_lane(order) else { return Ok(false) };
        let Some(range) = self.next_push(order, most.min(MAX_RUN_PAGES as u64)) else { return Ok(false) };
        self.start_put(entry, range)?;
        Ok(true)
    }

    /// Returns the entry into which the next pages are put, if the direct link leaves egress for
    /// it.
    fn store_lane(&mut self, order: &dyn PushOrder) -> Option<u8> {
        if let Some(error) = self.source.put_failure.take() {
            self.attempt.reported.push(describe(&error));
        }
        let entries = order.through().iter().filter_map(|place| self.entry_for(place));
        let open: Vec<_> = entries.filter(|entry| !self.source.failing.contains(entry)).collect();
        // the entries take turns
        let turn = usize::try_from(self.requests).unwrap_or(0) % open.len().max(1);
        open.get(turn).copied().filter(|_| self.egress_for_stores() > 0.0)
    }

    /// Returns the time at which the next lane is free, if pages wait for one.
    fn next_free_lane(&self) -> Option<Duration> {
        let lanes = [self.network.to_destination.free_at, self.network.to_stores.free_at];
        let waits = !self.source.map.unclaimed().is_empty();
        lanes.into_iter().filter(|&at| waits && at > self.clock).min()
    }

    /// Returns the next run of `order`. An invalid run is reported, and replaced by the next run in
    /// ascending order.
    fn next_push(&mut self, order: &mut dyn PushOrder, most: u64) -> Option<PageRange> {
        let unsent = self.source.map.unclaimed();
        match checked_next(order, unsent, most) {
            Ok(range) => range,
            Err(why) => {
                let (range, why) = (Linear::default().next(unsent, most), why.to_string());
                if self.broken.last() != Some(&why) {
                    self.broken.push(why);
                }
                range
            }
        }
    }

    /// Answers a demand of the destination, whose guest waits for a page. The source answers for
    /// every page that it holds, also for one that is being put into a store or is in one.
    pub(super) fn demanded(&mut self, page: u64) -> Result<(), MigrationError> {
        for range in self.source.map.claim_block(page, 1) {
            self.send_pages(range, true)?;
        }
        self.source.demanded.push(page);
        Ok(())
    }

    /// Makes a new connection. The destination answers whether it runs the VM, and which pages are
    /// missing.
    pub(super) fn repeat_run(&mut self) -> Result<(), MigrationError> {
        self.pass(RECONNECTS);
        if self.source.dead {
            return Err(link_error());
        }
        self.network.connected = true;
        self.destination.reattached = true;
        self.source.failure = None;
        self.source.resumed = false;
        self.source.listed.clear();
        for frame in self.source.machine.reattach(VM)? {
            self.send_message(Message::Control(frame))?;
        }
        self.wait_for(|sim| sim.source.resumed || sim.source.machine.phase() == SourcePhase::Completed)
    }
}
