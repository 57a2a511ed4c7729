use super::PushOrder;
use crate::{page::PageRange, page_set::PageSet, strategy::Place};

/// Another order, whose pages may also move through stores.
///
/// ```
/// use migration_core::strategy::{Place, PushOrder, push_order::{HotFirst, Through}};
/// let order = Through::new(vec![Place::attempt(["a"]), Place::attempt(["b"])], HotFirst::default());
/// assert_eq!((order.name(), order.through().len()), ("hot-first", 2));
/// ```
#[derive(Clone, Debug)]
pub struct Through<P> {
    places: Vec<Place>,
    order: P,
}

impl<P: PushOrder> Through<P> {
    /// Returns an order that chooses pages as `order` does. Pages for which the direct link has no
    /// room are put into `places` in turn.
    pub fn new(places: Vec<Place>, order: P) -> Self {
        Self { places, order }
    }
}

impl<P: PushOrder> PushOrder for Through<P> {
    fn name(&self) -> &'static str {
        self.order.name()
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        self.order.begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        self.order.fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        self.order.next(unsent, most)
    }

    fn prepaged(&self) -> bool {
        self.order.prepaged()
    }

    fn through(&self) -> &[Place] {
        &self.places
    }
}
