//! Places to which pages can move, conditions for which a strategy waits, and the results of verbs.

use std::time::Duration;

use super::Round;
use crate::{
    MigrationError,
    store::{Purpose, StoreError},
};

/// A place to which pages can move.
///
/// ```
/// use migration_core::strategy::Place;
/// let stage = Place::stage(["rack-7", "rack-9"]);
/// assert_eq!(stage.to_string(), "stage in rack-7 and rack-9");
/// let some = stage.at_most(2000);
/// assert_eq!((some.place, some.most), (&stage, 2000));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The RAM of the destination, over the direct link.
    Destination,
    /// One namespace in each of these stores, which together are one entry of the store table.
    Stores {
        /// The names of the stores. Each page is put into every one of them, and counts as put when
        /// all of them have it. To spread pages over stores instead, use several places.
        names: Vec<String>,
        /// The purpose of the namespace. It decides how long the namespace lives: a namespace of an
        /// [attempt](Purpose::Attempt) is forgotten if the attempt fails before the hand-over.
        purpose: Purpose,
    },
}

impl Place {
    /// Returns the place for pages that one migration puts into stores temporarily.
    pub fn attempt<S: Into<String>>(stores: impl IntoIterator<Item = S>) -> Self {
        Self::Stores { names: stores.into_iter().map(Into::into).collect(), purpose: Purpose::Attempt }
    }

    /// Returns the place for a copy of the VM that is kept ready. It outlives attempts that fail.
    pub fn stage<S: Into<String>>(stores: impl IntoIterator<Item = S>) -> Self {
        Self::Stores { names: stores.into_iter().map(Into::into).collect(), purpose: Purpose::Stage }
    }

    /// Returns this place with a limit of `most` pages for each put. The other pages stay in the
    /// set.
    pub fn at_most(&self, most: u64) -> Portion<'_> {
        Portion { place: self, most }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Destination => f.write_str("the destination"),
            Self::Stores { names, purpose } => write!(f, "{purpose} in {}", names.join(" and ")),
        }
    }
}

/// A place and the number of pages that may move there in one [put](super::Running::put).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portion<'a> {
    /// The place.
    pub place: &'a Place,
    /// The largest number of pages of one put.
    pub most: u64,
}

/// Converts a place without a limit.
impl<'a> From<&'a Place> for Portion<'a> {
    fn from(place: &'a Place) -> Self {
        Self { place, most: u64::MAX }
    }
}

/// The result of one [put](super::Running::put).
///
/// Pages that were not acknowledged are still in the set that was passed, and still count as unsent
/// in the engine. So no page is lost, whichever of the two methods is used.
#[derive(Debug)]
#[must_use = "a store may have failed: see `or_keep_for_later` and `or_fail`"]
pub struct Put {
    /// The pages that were put.
    pub round: Round,
    /// The first failure of a store, if there was one. Pages whose put failed are still in the set.
    pub failed: Option<MigrationError>,
}

impl Put {
    /// Returns what was put, and ignores a failure of a store. The pages whose put failed stay in
    /// the set, for a later put or for the hand-over. The engine has reported the failure.
    pub fn or_keep_for_later(self) -> Round {
        self.round
    }

    /// Returns what was put, if no store failed.
    ///
    /// # Errors
    /// Returns the failure of the store.
    pub fn or_fail(self) -> Result<Round, MigrationError> {
        self.failed.map_or(Ok(self.round), Err)
    }
}

/// The destination of a migration, as the user has named it in a command.
///
/// Only the name is known here. The engine finds the address. So a peer cannot make a host connect
/// to an address that the peer chooses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination(String);

impl Destination {
    /// Returns the destination with the name `name`.
    pub fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Returns the name of the destination.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The conditions that end a [wait](super::Running::wait). The first one that holds ends it.
///
/// ```
/// use std::time::Duration;
/// use migration_core::strategy::Until;
/// let until = Until::command().or_after(Duration::from_secs(2)).or_dirty(1000);
/// assert!(until.command && until.dirty == Some(1000));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Until {
    /// Whether a command of the user that names the destination ends the wait.
    pub command: bool,
    /// The time after the beginning of the wait that ends it.
    pub time: Option<Duration>,
    /// The number of pages written since the last harvest that ends the wait.
    pub dirty: Option<u64>,
}

impl Until {
    /// Returns the condition that a command has come.
    pub fn command() -> Self {
        Self { command: true, ..Self::default() }
    }

    /// Returns the condition that `time` has passed since the wait began.
    pub fn after(time: Duration) -> Self {
        Self { time: Some(time), ..Self::default() }
    }

    /// Returns the condition that the guest has written `pages` pages since the last harvest.
    pub fn dirty(pages: u64) -> Self {
        Self { dirty: Some(pages), ..Self::default() }
    }

    /// Adds the condition that `time` has passed since the wait began.
    pub fn or_after(self, time: Duration) -> Self {
        Self { time: Some(time), ..self }
    }

    /// Adds the condition that the guest has written `pages` pages since the last harvest.
    pub fn or_dirty(self, pages: u64) -> Self {
        Self { dirty: Some(pages), ..self }
    }

    /// Returns whether no condition can end the wait.
    pub fn is_never(&self) -> bool {
        *self == Self::default()
    }
}

/// The reason why a [wait](super::Running::wait) ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wake {
    /// The user has commanded that the VM moves to this destination. Each command is returned once.
    Command(Destination),
    /// The time has passed.
    Time,
    /// The guest has written at least the number of pages of the condition. These pages are in the
    /// next harvest.
    Dirty,
}

impl MigrationError {
    /// Returns a function that wraps an error of the page store named `store`.
    pub fn page_store(store: &str) -> impl FnOnce(StoreError) -> Self {
        let store = store.to_owned();
        move |cause| Self::PageStore { store, cause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::NamespaceId;

    #[test]
    fn a_failed_put_is_an_error_only_for_who_asks() {
        let failed = || Put {
            round: Round { asked: 9, sent: 4, ..Round::default() },
            failed: Some(MigrationError::page_store("rack-7")(StoreError::Absent(NamespaceId([1; 16])))),
        };
        assert_eq!(failed().or_keep_for_later().sent, 4);
        let text = failed().or_fail().unwrap_err().to_string();
        assert!(text.contains("page store rack-7"), "{text}");
        let whole = Put { round: Round { sent: 9, ..Round::default() }, failed: None };
        assert_eq!(whole.or_fail().unwrap().sent, 9);
    }

    #[test]
    fn a_wait_for_nothing_is_found_out() {
        assert!(Until::default().is_never());
        for until in [Until::command(), Until::after(Duration::ZERO), Until::dirty(0)] {
            assert!(!until.is_never(), "{until:?}");
        }
    }
}
