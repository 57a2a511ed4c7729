//! Fail-safe post-copy at the destination. Checkpoints are sent back while the source is alive, and
//! the VM continues here when the source is dead.

use std::time::Instant;

use super::{protection::CheckpointLane, *};
use crate::{channel::WriteHalf, engine::lane::Lane, fence::Fenced};

/// The interval between two checks whether a lost source is dead.
const WATCH: Duration = Duration::from_millis(10);
/// The longest interval between two attempts to fail over, after attempts that have failed: an
/// attempt may have to read a whole checkpoint.
const WATCH_REFUSED: Duration = Duration::from_secs(2);
/// The factor by which this side waits longer than the source before it asks its fence.
const LAST: u32 = 4;

/// The two halves of a checkpoint lane.
pub(super) struct CheckpointHalves {
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) writer: Box<dyn WriteHalf>,
}

impl VmEntry {
    /// Serves a lane on which checkpoints are sent back, until its link is lost.
    pub(super) fn checkpoints(
        &self,
        session: &Session,
        protection: &Protection,
        link: u32,
        halves: CheckpointHalves,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let CheckpointHalves { reader, writer } = halves;
        let lane = Lane::for_checkpoints(session.ram.clone(), writer, peer.to_owned(), self.common.bytes.clone());
        let wait_running = || session.wait_running(link);
        let served = CheckpointLane { lane, reader, sequence: 0 }.run(protection, &wait_running);
        let Err(error) = served else { return Ok(()) };
        if let MigrationError::VmEnded(reason) = &error {
            self.vm_ended(reason);
            return Ok(());
        }
        let cut = session.lane_lost(link, error.code(), &describe(&error));
        if cut || !matches!(error, MigrationError::Link { .. }) {
            return Err(error);
        }
        Ok(())
    }

    /// Watches a lost link of a protected VM, and fails over as soon as the source is dead for
    /// certain and no page is only there.
    ///
    /// If a network cut lasts, each side would fence the other one. The source does so first, and
    /// this side waits longer, so that they do not fence each other.
    pub(super) fn watch_source(self: &Arc<Self>, session: &Arc<Session>, link: u32) {
        let Some(protection) = &session.protection else { return };
        let Some((detect, identity)) = lock(&protection.source).clone() else { return };
        let (lost, patience, mut refused) = (Instant::now(), detect.saturating_mul(LAST), None);
        let (mut pause, mut next) = (WATCH, lost);
        while session.stays_lost(link, WATCH) {
            if self.common.stop.load(Ordering::Relaxed) || self.finished.load(Ordering::Relaxed) {
                return;
            }
            if Instant::now() < next || lost.elapsed() < patience && !self.common.options.fence.is_dead(&identity) {
                continue;
            }
            let survived = self.fail_over(session, protection, &identity);
            pause = (2 * pause).min(WATCH_REFUSED);
            next = Instant::now() + pause;
            match survived {
                Ok(()) => {
                    self.finished.store(true, Ordering::Relaxed);
                    return self.report_phase();
                }
                Err(why) if refused.as_ref() != Some(&why) => {
                    let what = format!("the source is lost, and the VM still depends on it: {why}");
                    self.common.options.observer.event(&Event::Warning(what));
                    refused = Some(why);
                }
                Err(_) => {}
            }
        }
    }

    /// Makes sure that the source is dead and takes over the VM, unless the source has pages that
    /// are nowhere else.
    ///
    /// # Errors
    /// Returns the reason why the fail-over is not possible. It may be tried again.
    fn fail_over(
        self: &Arc<Self>,
        session: &Arc<Session>,
        protection: &Protection,
        identity: &[u8],
    ) -> Result<(), String> {
        let missing = session.missing().ok_or("nothing was handed over")?;
        let vm = lock(&self.state).machine.vm().ok_or("no VM is held")?;
        let layout = session.ram.layout();
        let mut store = None;
        if !missing.is_complete() {
            let stores = self.common.options.forward.as_ref().ok_or("it has pages that are nowhere else")?;
            let opened = stores
                .open(vm, session.epoch, layout.pages())
                .map_err(|e| format!("its forward checkpoint: {}", Chain(&e)))?;
            let (_, state) = opened.latest().ok_or("its forward checkpoint is not complete")?;
            if state != *lock(&protection.state) {
                return Err("its forward checkpoint is of another moment".into());
            }
            store = Some(opened);
        }
        let dead = Fenced::by(&*self.common.options.fence, identity).map_err(|e| e.to_string())?;
        let mut state = lock(&self.state);
        let action = state.machine.take_over(dead).map_err(|e| e.to_string())?;
        drop(state);
        self.start_and_adopt(session, &action);
        // first the pages, because a checkpoint that is under way may wait for one of them
        if let Some(store) = &mut store {
            missing
                .fill(layout, &mut **store)
                .map_err(|e| format!("taking pages from its forward checkpoint: {}", Chain(&e)))?;
        }
        self.notify(vm, Notice::LinkFound);
        // the protection ends because no other host will restart the VM
        self.unprotect(protection);
        if let Some(stores) = &self.common.options.forward {
            stores.done(vm, session.epoch);
        }
        Ok(())
    }

    pub(super) fn unprotect(&self, protection: &Protection) {
        if let Err(error) = protection.end() {
            self.common
                .options
                .observer
                .event(&Event::Warning(format!("ending the VM's protection: {}", Chain(&error))));
        }
    }
}
