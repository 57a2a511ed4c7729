//! The verbs of a strategy, and the rounds.

use super::{switch_over::Rest, *};
use crate::{
    page_map::PageMap,
    strategy::{Destination, Place, Portion, Put, Until, Wake},
};

impl Verbs for Engine<'_> {
    fn pages(&self) -> u64 {
        self.report.pages.total
    }

    fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        if self.staging.is_some() && self.rounds.is_tracking() {
            // An eviction has failed: what is staged stays staged.
            return self.harvest();
        }
        // No page was read yet, unless tracking has begun before. What the guest writes during this
        // call need not be tracked.
        if self.report.demand_lanes > 0 && !self.rounds.is_tracking() {
            let referenced = pages::referenced(self.vm, self.report.pages.total, &*self.options.observer);
            self.heat_up(&referenced, REFERENCED);
        }
        let pages = self.rounds.start(self.vm)?;
        self.report.pages.hole = self.rounds.counts().holes;
        Ok(pages)
    }

    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        self.send_round(pages, true)
    }

    fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        self.collect()?;
        self.seen_written.clear();
        Ok(self.rounds.due())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.vm.throttle(percent).map_err(MigrationError::vm("throttling the guest"))?;
        self.guest.throttle = percent;
        self.report.throttle_percent = self.report.throttle_percent.max(percent);
        Ok(())
    }

    fn link(&self) -> Link {
        self.known()
    }

    fn switch_over_wanted(&self) -> bool {
        lock(&self.requests).switch_over_wanted
    }

    fn expect_downtime(&mut self, prediction: Duration) {
        self.report.predicted_downtime = Some(prediction);
    }

    fn stalled(&mut self, why: &str) {
        self.report.stalled = Some(why.to_owned());
    }

    fn wait(&mut self, until: Until) -> Result<Wake, MigrationError> {
        self.wait_until(until)
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.pause_guest()
    }

    fn resume(&mut self) -> Result<(), MigrationError> {
        self.go_on()
    }

    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.offer(pages, Rest::Sent)
    }

    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError> {
        if self.machine.phase() == SourcePhase::Copying {
            self.offer(missing, Rest::LeftBehind)?;
        } else if !missing.is_empty() {
            let why = format!("{} pages are to be left behind, but the state was sent already", missing.len());
            return Err(MigrationError::Blocked(why));
        }
        self.run()
    }

    fn missing_at_hand_over(&self) -> u64 {
        self.rounds.map().at_source()
    }

    fn put(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        match portion.place {
            Place::Destination => {
                let mut now = pages.clone();
                now.keep_first(portion.most);
                let round = self.send(&now)?;
                now.subtract(self.rounds.map().unsent());
                pages.subtract(&now);
                Ok(Put { round, failed: None })
            }
            _ => self.put_pages(pages, portion),
        }
    }

    fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        self.connect_to(to)
    }

    fn report(&mut self, error: &MigrationError) {
        self.options.observer.event(&Event::Warning(describe(error)));
    }

    fn locations(&self) -> Result<PageMap, MigrationError> {
        Ok(self.rounds.map().clone())
    }

    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        self.serve_all(order)
    }
}

impl Engine<'_> {
    /// Sends a round while the guest runs. The round may end early if `may_end_early` is set;
    /// otherwise all of its pages are sent.
    pub(super) fn send_round(&mut self, pages: &PageSet, may_end_early: bool) -> Result<Round, MigrationError> {
        let pages = Arc::new(pages.clone());
        self.send_pieces()?;
        let began = Instant::now();
        let (generation, stop) = self.begin_round(&pages)?;
        let far = began + Duration::from_secs(1 << 30);
        let deadline = self.deadline().filter(|_| may_end_early).unwrap_or(far);
        let (mut lanes, mut stopped, mut received) = (0, Vec::new(), false);
        while lanes < self.report.streams || !received {
            let until = if stop.load(Ordering::Relaxed) { far } else { deadline };
            match self.next_input(until)? {
                Some(Input::Lane(Ok(done))) => {
                    lanes += 1;
                    stopped.extend(done.stopped_at.map(|at| (done.lane, at)));
                }
                Some(Input::Control(epoch, frame)) => {
                    received |= self.frame(epoch, frame)? == SourceEvent::RoundReceived(generation);
                }
                _ => {}
            }
            if may_end_early && self.round_is_over() {
                stop.store(true, Ordering::Relaxed);
            }
        }
        let round = self.end_round(generation, &pages, &stopped, began)?;
        self.learn(round.sent, round.wire_bytes, round.time);
        Ok(round)
    }

    /// Collects the pages that were written since the last harvest. Returns those of them that are
    /// not free now.
    pub(super) fn collect(&mut self) -> Result<PageSet, MigrationError> {
        let Harvest { written, pages, time } = self.rounds.harvest(self.vm)?;
        self.fail_safe.saved.subtract(&written);
        let since = time.as_secs_f64();
        if !self.guest.paused && since > 0.0 {
            self.report.dirty_pages_per_second = Some(pages.len() as f64 / since);
        }
        if self.report.demand_lanes > 0 {
            if self.guest.paused {
                // The guest is paused, and the pages are added to the heat only when it runs again.
                self.post_copy.dirtied_last = pages.clone();
            } else {
                self.heat_up(&pages, DIRTIED);
            }
        }
        Ok(pages)
    }

    /// Starts a round on the lanes. Returns the generation of the round, and the flag that stops it
    /// early.
    pub(super) fn begin_round(&mut self, pages: &Arc<PageSet>) -> Result<(u32, Arc<AtomicBool>), MigrationError> {
        if self.strategy.shares_ram {
            return Err(MigrationError::Blocked("RAM is shared with the destination: no page moves".into()));
        }
        let generation = self.machine.begin_round()?;
        let stop = Arc::new(AtomicBool::new(false));
        self.lanes_done = 0;
        self.measured.reading = Duration::ZERO;
        self.measured.counters.round_sent.store(0, Ordering::Relaxed);
        if self.report.rounds.is_empty() {
            self.begin_progress();
        }
        self.measured.pages_due = self.measured.pages_due.saturating_add(pages.len());
        let (wire_bytes, time) = (self.measured.counters.wire_bytes.load(Ordering::Relaxed), Duration::ZERO);
        let round = RoundReport { pages: pages.len(), wire_bytes, time, throttle_percent: self.guest.throttle };
        self.report.rounds.push(round);
        self.prolong_pause(pages.len());
        let rearm = self.rounds.begin(self.vm.tracker(), pages, self.guest.paused)?;
        for lane in &self.peer.lanes {
            let job = Job { generation, pages: pages.clone(), rearm: rearm.clone(), stop: stop.clone() };
            // A lane that has ended has reported why, in an input.
            let _ = lane.send(Work::Round(job));
        }
        Ok((generation, stop))
    }

    /// Completes a round that has arrived at the destination, except for the stripes that were not
    /// sent. `stopped` has the lanes that ended early, each with the first stripe that it did not
    /// send.
    pub(super) fn end_round(
        &mut self,
        generation: u32,
        pages: &PageSet,
        stopped: &[(u16, u64)],
        began: Instant,
    ) -> Result<Round, MigrationError> {
        let mut sent = pages.clone();
        for &(lane, at) in stopped {
            for stripe in stripes(lane, self.report.streams, sent.capacity()).filter(|&s| s >= at) {
                sent.remove_range(stripe_pages(stripe));
            }
        }
        self.rounds.arrived(&sent)?;
        let time = began.elapsed();
        let now = self.measured.counters.wire_bytes.load(Ordering::Relaxed);
        let mut wire_bytes = 0;
        if let Some(round) = self.report.rounds.last_mut() {
            wire_bytes = now.saturating_sub(round.wire_bytes);
            (round.wire_bytes, round.time) = (wire_bytes, time);
            self.options.observer.event(&Event::RoundEnded(*round));
        }
        self.measured.pages_due = self.measured.pages_due.saturating_sub(pages.len() - sent.len());
        Ok(Round { generation, asked: pages.len(), sent: sent.len(), wire_bytes, time })
    }

    /// Adds `by` to the heat of pages that the guest has used.
    pub(super) fn heat_up(&mut self, pages: &PageSet, by: u8) {
        self.post_copy.heat.resize(self.report.pages.total as usize, 0);
        for page in pages.iter() {
            if let Some(heat) = self.post_copy.heat.get_mut(page as usize) {
                *heat = heat.saturating_add(by);
            }
        }
    }

    /// Returns the longest acceptable downtime, as it was set last.
    pub(super) fn downtime_limit(&self) -> Duration {
        lock(&self.requests).downtime_limit.unwrap_or(self.options.downtime_limit)
    }

    /// Returns whether the round is to end before all of it is sent.
    pub(super) fn round_is_over(&self) -> bool {
        let post_copy = self.post_copy.wanted && self.report.demand_lanes > 0;
        post_copy || self.switch_over_wanted() || self.timed_out() || self.is_commanded()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.options.timeout.filter(|_| !self.is_idly_staged()).map(|t| self.start + t)
    }

    pub(super) fn timed_out(&self) -> bool {
        self.deadline().is_some_and(|d| Instant::now() >= d)
    }
}
