//! Scatter-gather: post-copy in which pages can wait in intermediaries, so that the source is
//! released soon.

use super::{Done, Place, PushOrder, Running, Strategy, push_order::Through};
use crate::MigrationError;

/// Scatter-gather (Deshpande et al., "Fast Server Deprovisioning through Scatter-Gather Live
/// Migration of Virtual Machines", Cloud 2014, sections IV.A and IV.B; "Scatter-Gather Live
/// Migration of Virtual Machines", TCC 2015). The guest runs at the destination at once. Its pages
/// fill the direct link. With the bandwidth that the source has beyond that, it puts pages into
/// intermediaries. The source is released as soon as every page is elsewhere, however slow the
/// destination is. The destination then gathers the remaining pages by itself.
///
/// A page that the guest touches comes from the source while the source has it, and from its
/// intermediary afterwards. An order that sends the hot pages first keeps the time short in which
/// the guest is slow.
///
/// The strategy needs page stores: those of the [simulator](crate::sim), or those of
/// [`SourceOptions::stores`](crate::engine::SourceOptions::stores).
pub struct ScatterGather {
    order: Through<Box<dyn PushOrder>>,
}

impl ScatterGather {
    /// Returns the strategy with these intermediaries, which are names of page stores. Each page is
    /// put into one of them, in turn. `order` says which pages move first.
    pub fn new<S: Into<String>>(intermediaries: impl IntoIterator<Item = S>, order: impl PushOrder + 'static) -> Self {
        let places = intermediaries.into_iter().map(|store| Place::attempt([store])).collect();
        Self { order: Through::new(places, Box::new(order)) }
    }

    /// Returns the strategy with `replicas` copies of each page, each copy in another intermediary.
    /// So no page is lost if an intermediary fails after the source was released. Returns `None` if
    /// there are fewer intermediaries than copies, or if `replicas` is 0.
    ///
    /// ```
    /// use migration_core::strategy::{Linear, ScatterGather, Strategy};
    /// let pairs = ScatterGather::replicated(["a", "b", "c"], 2, Linear::default()).unwrap();
    /// let places: Vec<_> = pairs.stores().iter().map(ToString::to_string).collect();
    /// assert_eq!(places, ["attempt in a and b", "attempt in b and c", "attempt in c and a"]);
    /// assert!(ScatterGather::replicated(["a"], 2, Linear::default()).is_none());
    /// ```
    pub fn replicated<S: Into<String>>(
        intermediaries: impl IntoIterator<Item = S>,
        replicas: usize,
        order: impl PushOrder + 'static,
    ) -> Option<Self> {
        let names: Vec<String> = intermediaries.into_iter().map(Into::into).collect();
        let count = names.len();
        if replicas == 0 || count < replicas {
            return None;
        }
        // if every store gets every page, one place is enough
        let places = if replicas == count { 1 } else { count };
        let place = |first: usize| Place::attempt((first..first + replicas).map(|at| names[at % count].clone()));
        Some(Self { order: Through::new((0..places).map(place).collect(), Box::new(order)) })
    }
}

impl Strategy for ScatterGather {
    fn name(&self) -> &'static str {
        "scatter-gather"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn stores(&self) -> Vec<Place> {
        self.order.through().to_vec()
    }

    fn keeps_stored_pages(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        vm.pause()?.hand_over(all)?.serve(&mut self.order)
    }
}
