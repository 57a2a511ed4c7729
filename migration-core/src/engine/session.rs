//! What the lanes of one session share at the destination.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{control::ControlWriter, handle::lock};
use crate::{
    MigrationError,
    channel::Closer,
    codec::DecodeError,
    ram::GuestRam,
    wire::{Control, ErrorCode, SessionToken},
};

/// One attempt of a source, from its hello on.
pub(super) struct Session {
    pub(super) token: SessionToken,
    pub(super) epoch: u32,
    pub(super) lanes: u16,
    pub(super) payload_crc: bool,
    pub(super) ram: Arc<dyn GuestRam>,
    control: Mutex<ControlWriter>,
    lane_state: Mutex<LaneState>,
    changed: Condvar,
    /// Set when the state is about to be loaded: no page may arrive from then on.
    sealed: AtomicBool,
    closers: Mutex<Vec<Arc<dyn Closer>>>,
}

struct LaneState {
    attached: Vec<bool>,
    /// The last generation that each lane has completed.
    ended: Vec<u32>,
    announced: u32,
    failed: Option<String>,
}

impl Session {
    pub(super) fn new(
        (token, epoch): (SessionToken, u32),
        lanes: u16,
        payload_crc: bool,
        ram: Arc<dyn GuestRam>,
        control: ControlWriter,
        closer: Arc<dyn Closer>,
    ) -> Self {
        let count = usize::from(lanes);
        let lane_state = LaneState { attached: vec![false; count], ended: vec![0; count], announced: 0, failed: None };
        Self {
            token,
            epoch,
            lanes,
            payload_crc,
            ram,
            control: Mutex::new(control),
            lane_state: Mutex::new(lane_state),
            changed: Condvar::new(),
            sealed: AtomicBool::new(false),
            closers: Mutex::new(vec![closer]),
        }
    }

    pub(super) fn say(&self, frame: &Control) -> Result<(), MigrationError> {
        lock(&self.control).send(self.epoch, frame)
    }

    /// A new control lane takes the lost one's place.
    pub(super) fn replace_control(&self, control: ControlWriter, closer: Arc<dyn Closer>) {
        *lock(&self.control) = control;
        lock(&self.closers).push(closer);
    }

    /// A lane introduces itself.
    pub(super) fn attach(&self, index: u16, closer: Arc<dyn Closer>) -> Result<(), MigrationError> {
        let mut state = lock(&self.lane_state);
        match state.attached.get_mut(usize::from(index)) {
            Some(attached) if !*attached => *attached = true,
            _ => return Err(DecodeError::invalid("lane index", format!("lane {index} is unknown or taken")).into()),
        }
        lock(&self.closers).push(closer);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn wait_attached(&self, timeout: Duration) -> Result<(), MigrationError> {
        self.wait_for(timeout, "the source to open its lanes", |s| s.attached.iter().all(|&a| a))
    }

    /// Waits until every lane has completed `generation`, however long that takes: the lanes' own time-outs bound it.
    pub(super) fn wait_round(&self, generation: u32) -> Result<(), MigrationError> {
        self.wait_for(Duration::MAX, "the last pages", |s| s.ended.iter().all(|&e| e >= generation))
    }

    /// A lane has completed a round; when it is the last one to do so, the source is told.
    pub(super) fn lane_ended(&self, index: u16, generation: u32) -> Result<(), MigrationError> {
        let mut state = lock(&self.lane_state);
        if let Some(ended) = state.ended.get_mut(usize::from(index)) {
            *ended = generation;
        }
        let all = state.ended.iter().copied().min().unwrap_or(0);
        if all > state.announced {
            state.announced = all;
            // under the lock, so that announcements go out in order and before *ready*
            self.say(&Control::RoundReceived { generation: all })?;
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn seal(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// A lane has failed: tells the source, and ends the session.
    pub(super) fn fail(&self, code: ErrorCode, why: &str) {
        let mut state = lock(&self.lane_state);
        if state.failed.is_none() {
            state.failed = Some(why.to_owned());
            drop(state);
            self.changed.notify_all();
            // best effort: if the source does not hear it, it notices the closed lanes
            let _ = self.say(&Control::error(code, why));
        }
        self.close();
    }

    /// Why a lane failed, if one did.
    pub(super) fn failure(&self) -> Option<String> {
        lock(&self.lane_state).failed.clone()
    }

    /// Ends all lanes.
    pub(super) fn close(&self) {
        for closer in lock(&self.closers).iter() {
            closer.close();
        }
    }

    fn wait_for(&self, timeout: Duration, what: &str, done: impl Fn(&LaneState) -> bool) -> Result<(), MigrationError> {
        let waiting = |state: &mut LaneState| state.failed.is_none() && !done(state);
        let guard = lock(&self.lane_state);
        let guard = if timeout == Duration::MAX {
            self.changed.wait_while(guard, waiting).unwrap_or_else(|e| e.into_inner())
        } else {
            self.changed.wait_timeout_while(guard, timeout, waiting).unwrap_or_else(|e| e.into_inner()).0
        };
        let cause = match &guard.failed {
            Some(why) => std::io::Error::other(why.clone()),
            None if done(&guard) => return Ok(()),
            None => std::io::Error::new(std::io::ErrorKind::TimedOut, format!("waited {timeout:?} for {what}")),
        };
        Err(MigrationError::link("the source")(cause))
    }
}
