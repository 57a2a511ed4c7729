//! What saving and loading this VM's state took before: the next time takes about as much.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use migration_core::{
    state::VmState,
    vm::{SectionEstimate, StateEstimate},
};

/// Figures of one VM. Migrations and snapshots that end without a hand-over leave them behind, and
/// so does an attempt to receive the VM.
#[derive(Default)]
pub(super) struct Measured(Mutex<Figures>);

#[derive(Default)]
struct Figures {
    saved: Option<StateEstimate>,
    loaded: Option<Duration>,
}

impl Measured {
    /// The processors' part of the state was `state`; with the devices' part it took `time` to
    /// save.
    pub(super) fn saved(&self, state: &VmState, time: Duration) {
        let sections = state.sections.iter();
        let sections = sections.map(|section| SectionEstimate {
            name: section.name.clone(),
            instance: section.instance,
            bytes: section.data.len() as u64,
        });
        self.figures().saved = Some(StateEstimate { sections: sections.collect(), save_time: Some(time) });
    }

    /// It took `time` to load the state. The shortest one counts: in post-copy others wait for a
    /// page meanwhile, and that is not what loading takes.
    pub(super) fn loaded(&self, time: Duration) {
        let mut figures = self.figures();
        figures.loaded = Some(figures.loaded.map_or(time, |before| before.min(time)));
    }

    /// The last time that the state was saved, if it was: the processors' sections, and the time of
    /// all.
    pub(super) fn last_save(&self) -> Option<StateEstimate> {
        self.figures().saved.clone()
    }

    /// How long loading takes, if that is known.
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
