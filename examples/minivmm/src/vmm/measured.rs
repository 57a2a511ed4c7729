//! The measured times of saving and loading this VM's state. The next time takes about as long.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use migration_core::{
    state::VmState,
    vm::{SectionEstimate, StateEstimate},
};

/// The measurements of one VM. Migrations and snapshots that end without a hand-over record them,
/// and so does an attempt to receive the VM.
#[derive(Default)]
pub(super) struct Measured(Mutex<Figures>);

#[derive(Default)]
struct Figures {
    saved: Option<StateEstimate>,
    loaded: Option<Duration>,
}

impl Measured {
    /// Records that saving the state took `time`, including the devices. `state` is the processors'
    /// part of the state.
    pub(super) fn saved(&self, state: &VmState, time: Duration) {
        let sections = state.sections.iter();
        let sections = sections.map(|section| SectionEstimate {
            name: section.name.clone(),
            instance: section.instance,
            bytes: section.data.len() as u64,
        });
        self.figures().saved = Some(StateEstimate { sections: sections.collect(), save_time: Some(time) });
    }

    /// Records that loading the state took `time`. The shortest time counts, because in post-copy
    /// other threads wait for pages meanwhile, and that is not part of loading.
    pub(super) fn loaded(&self, time: Duration) {
        let mut figures = self.figures();
        figures.loaded = Some(figures.loaded.map_or(time, |before| before.min(time)));
    }

    /// Returns the last save, if there was one: the sizes of the processors' sections, and the time
    /// for the whole state.
    pub(super) fn last_save(&self) -> Option<StateEstimate> {
        self.figures().saved.clone()
    }

    /// Returns the time that loading takes, if it is known.
    pub(super) fn load_time(&self) -> Option<Duration> {
        self.figures().loaded
    }

    fn figures(&self) -> MutexGuard<'_, Figures> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_save_and_the_shortest_load_count() {
        let measured = Measured::default();
        assert!(measured.last_save().is_none() && measured.load_time().is_none());
        let ms = Duration::from_millis;
        for (save, load) in [(3, 20), (5, 4), (2, 30)] {
            measured.saved(&VmState::default(), ms(save));
            measured.loaded(ms(load));
        }
        assert_eq!(measured.last_save().and_then(|save| save.save_time), Some(ms(2)));
        assert_eq!(measured.load_time(), Some(ms(4)));
    }
}
