//! The verbs of a strategy, and the tokens that enforce their order.

use std::time::Duration;

use super::{Destination, Link, Place, Portion, PushOrder, Put, Round, StillMissing, Until, Wake};
use crate::{MigrationError, page_map::PageMap, page_set::PageSet};

/// The operations of an engine. Strategies call them through the tokens, which enforce their order.
///
/// An engine that has no page stores, or that is connected before a strategy begins, does not have
/// to implement the methods with a default. A default either returns an error that says why it
/// refuses, or does nothing.
///
/// A user's cancel, and the end of the guest, are final. The verb that finds such an event returns
/// the error, and so does every later verb. So a strategy that continues after an error cannot miss
/// it.
pub trait Verbs {
    /// Returns the number of pages of the VM.
    fn pages(&self) -> u64;
    /// Starts dirty tracking. Returns the pages that may hold data which the guest needs, except
    /// those that stay in stores.
    fn start_tracking(&mut self) -> Result<PageSet, MigrationError>;
    /// Sends pages of the running guest to the destination. See [`Running::send`].
    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError>;
    /// Returns all unsent pages: those that were written since the last harvest, and those that no
    /// earlier verb has sent. Pages that are free now are left out.
    fn harvest(&mut self) -> Result<PageSet, MigrationError>;
    /// Slows the vCPUs down by `percent` percent.
    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError>;
    /// Returns the measurements of the link.
    fn link(&self) -> Link;
    /// Returns whether the user has requested to switch over now, however much is left to send.
    fn switch_over_wanted(&self) -> bool {
        false
    }
    /// Records the downtime that the strategy expects. It is reported beside the real downtime.
    fn expect_downtime(&mut self, prediction: Duration);
    /// Records why the downtime limit is not kept, or why the strategy does not try to keep it any
    /// more. The reason is reported. Does nothing by default.
    fn stalled(&mut self, why: &str) {
        let _ = why;
    }
    /// Reports an error after which the strategy continues. Does nothing by default.
    fn report(&mut self, error: &MigrationError) {
        let _ = error;
    }
    /// Connects to a destination and builds the VM there. See [`Running::connect`].
    fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked(format!("this engine is connected already, and cannot connect to {to}")))
    }
    /// Puts pages of the running guest into a place. See [`Running::put`].
    fn put(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        let _ = pages;
        Err(no_places(portion.place))
    }
    /// Waits until one of the conditions of `until` holds. See [`Running::wait`].
    fn wait(&mut self, until: Until) -> Result<Wake, MigrationError> {
        let _ = until;
        Err(MigrationError::Blocked("this engine cannot wait for commands, times or dirty pages".into()))
    }
    /// Returns the location of each page, as the source knows it.
    fn locations(&self) -> Result<PageMap, MigrationError> {
        Err(MigrationError::Blocked("this engine does not say where pages are".into()))
    }
    /// Stops the vCPUs and the devices.
    fn pause(&mut self) -> Result<(), MigrationError>;
    /// Lets the vCPUs and the devices run again.
    fn resume(&mut self) -> Result<(), MigrationError>;
    /// Saves the state and sends it, with `pages` and with all pages that were dirtied up to the
    /// save.
    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError>;
    /// Hands the ownership over. `missing` are pages that the destination does not have yet. Every
    /// other page that is neither acknowledged, nor located in a store, nor zero is missing as
    /// well.
    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError>;
    /// Returns the number of pages that were only at the source at the hand-over.
    fn missing_at_hand_over(&self) -> u64;
    /// Streams missing pages: answers the destination's faults, and pushes all other pages in
    /// `order`, until the destination has *released* the source. See [`HandedOver::serve`].
    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError>;
    /// Commits the pages and the state in the store. Only an engine that puts pages into a store
    /// can.
    fn commit(&mut self) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked("pages go to a destination: there is no store to commit".into()))
    }
}

/// Returns the error of an engine that cannot put pages into `place`.
fn no_places(place: &Place) -> MigrationError {
    MigrationError::Blocked(format!("this engine sends pages in rounds only, and cannot put them elsewhere: {place}"))
}

/// The token of a guest that runs at the source.
pub struct Running<'a> {
    verbs: &'a mut dyn Verbs,
}

impl<'a> Running<'a> {
    /// Returns the token with which the engine calls a strategy.
    pub fn new(verbs: &'a mut dyn Verbs) -> Self {
        Self { verbs }
    }

    /// Returns the number of pages of the VM.
    pub fn pages(&self) -> u64 {
        self.verbs.pages()
    }

    /// Starts dirty tracking. Returns all pages of RAM except those that were never touched, those
    /// that the guest has reported [free](crate::vm::SourceVm::free_pages), and, if the strategy
    /// [keeps](super::Strategy::keeps_stored_pages) stored pages in their stores, those of which a
    /// store has the newest content.
    ///
    /// # Errors
    /// Returns an error if the tracker fails.
    pub fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        self.verbs.start_tracking()
    }

    /// Sends `pages` to the destination while the guest runs. Returns when the destination holds
    /// them. Returns early, with the pages sent so far, when the time-out of the migration passes.
    ///
    /// # Errors
    /// Returns an error if the link is lost or the destination refuses.
    pub fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        self.verbs.send(pages)
    }

    /// Puts pages of the running guest into a place, and removes from `pages` those that the place
    /// has acknowledged. [`send`](Self::send) is the case in which the place is the destination.
    ///
    /// Returns early, with the pages put so far, when a [command](Until::command) has come, when
    /// the time-out of the migration passes, or when the limit of the portion is reached. The
    /// command itself is returned by the next [`wait`](Self::wait).
    ///
    /// A page that the guest writes after it was read is part of the next harvest, whether or not
    /// it was acknowledged. If the store later loses its pages, they are part of the next harvest
    /// too, and the next put begins a new namespace.
    ///
    /// ```
    /// use std::time::Duration;
    /// use migration_core::{MigrationError, strategy::{Place, Running, Until, Wake}};
    ///
    /// /// Keeps a copy of the running VM in a store until a command comes. Moves at most 20,000 pages
    /// /// a second.
    /// fn stage(vm: &mut Running<'_>, stage: &Place) -> Result<Wake, MigrationError> {
    ///     let mut dirty = vm.start_tracking()?;
    ///     loop {
    ///         vm.put(&mut dirty, stage.at_most(20_000))?.or_keep_for_later();
    ///         match vm.wait(Until::command().or_after(Duration::from_secs(1)))? {
    ///             Wake::Time => dirty = vm.harvest()?,
    ///             command => return Ok(command),
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// Returns an error if the link is lost, if the user cancels, or if there is no such place. A
    /// failure of a store is not an error of this call: see [`Put::failed`].
    pub fn put<'p>(&mut self, pages: &mut PageSet, portion: impl Into<Portion<'p>>) -> Result<Put, MigrationError> {
        self.verbs.put(pages, portion.into())
    }

    /// Waits until one of the conditions of `until` holds. Keeps the link alive during the wait. So
    /// a strategy never polls and never sleeps.
    ///
    /// # Errors
    /// Returns [`MigrationError::Cancelled`] if the user cancels, [`MigrationError::VmEnded`] if
    /// the guest ends, [`MigrationError::Blocked`] if nothing would ever end the wait, and an error
    /// if the link is lost.
    pub fn wait(&mut self, until: Until) -> Result<Wake, MigrationError> {
        if until.is_never() {
            return Err(MigrationError::Blocked("the strategy waits for nothing: that would be for ever".into()));
        }
        self.verbs.wait(until)
    }

    /// Connects to a destination: queries its capabilities, builds the VM there, and sends the
    /// locations of all pages that are in stores. Returns when the destination has acknowledged all
    /// locations. The guest runs during the call, and its pages stay tracked.
    ///
    /// Only a strategy that [connects by itself](super::Strategy::connects_itself) calls this; for
    /// all others the engine is connected before the strategy begins.
    ///
    /// # Errors
    /// Returns an error if the destination cannot be reached or refuses. Nothing has changed then.
    /// The strategy may [report](Self::report) the error, wait for another command, and connect
    /// again.
    pub fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        self.verbs.connect(to)
    }

    /// Returns all pages that the destination does not have in their last state: those that were
    /// written since the last harvest (or since tracking began), that a round which ended early did
    /// not send, or that were never passed to [`send`](Self::send) or [`put`](Self::put). Pages
    /// that are free now are left out. A free page that the guest uses again and writes is part of
    /// the next harvest.
    ///
    /// # Errors
    /// Returns an error if the tracker fails.
    pub fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        self.verbs.harvest()
    }

    /// Slows the vCPUs down, so that they run only `100 - percent` percent of the time.
    ///
    /// # Errors
    /// Returns an error if the VMM cannot throttle the vCPUs.
    pub fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.verbs.throttle(percent)
    }

    /// Returns the measurements of the link.
    pub fn link(&self) -> Link {
        self.verbs.link()
    }

    /// Returns the location of the newest content of each page, as the source knows it now.
    ///
    /// # Errors
    /// Returns [`MigrationError::Blocked`] if the engine does not provide the locations.
    pub fn locations(&self) -> Result<PageMap, MigrationError> {
        self.verbs.locations()
    }

    /// Returns whether the user has requested to switch over now, however much is left to send.
    /// Rounds end early then. A strategy that [can](super::Strategy::can_switch_over) switch over
    /// on request checks this after each round.
    pub fn switch_over_wanted(&self) -> bool {
        self.verbs.switch_over_wanted()
    }

    /// Records the downtime that is expected if the guest is paused now. It is reported beside the
    /// real downtime.
    pub fn expect_downtime(&mut self, prediction: Duration) {
        self.verbs.expect_downtime(prediction);
    }

    /// Records why the downtime limit is not kept, with the figures. The reason is reported.
    pub fn stalled(&mut self, why: &str) {
        self.verbs.stalled(why);
    }

    /// Reports an error after which the strategy continues to the observers of the migration.
    pub fn report(&mut self, error: &MigrationError) {
        self.verbs.report(error);
    }

    /// Gives up. The engine undoes everything, and the guest continues at the source.
    ///
    /// # Errors
    /// Always returns [`MigrationError::GaveUp`].
    pub fn cancel(self, why: impl Into<String>) -> Result<Done, MigrationError> {
        Err(MigrationError::GaveUp(why.into()))
    }

    /// Ends a snapshot. The store has all pages and the state of one moment, and keeps them
    /// permanently. The guest continues.
    ///
    /// # Errors
    /// Returns [`MigrationError::Store`] if the store fails, and [`MigrationError::Blocked`] in a
    /// migration, which has no store to commit.
    pub fn commit(self) -> Result<Done, MigrationError> {
        self.verbs.commit()?;
        Ok(Done(()))
    }

    /// Pauses the guest. From here on, nothing waits for a store until the guest runs again.
    ///
    /// # Errors
    /// Returns an error if the VMM cannot pause the guest.
    pub fn pause(self) -> Result<Paused<'a>, MigrationError> {
        self.verbs.pause()?;
        Ok(Paused { verbs: self.verbs })
    }
}

/// The token of a guest that is paused at the source. The source owns it.
pub struct Paused<'a> {
    verbs: &'a mut dyn Verbs,
}

impl<'a> Paused<'a> {
    /// Saves the state, and sends it together with `pages`, with the pages that were dirtied since
    /// the last harvest, and with the pages that saving the state dirtied.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved, or the link is lost.
    pub fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.verbs.send_rest(pages)
    }

    /// Resumes the guest at the source.
    ///
    /// # Errors
    /// Returns an error if the VMM cannot resume the guest.
    pub fn resume(self) -> Result<Running<'a>, MigrationError> {
        self.verbs.resume()?;
        Ok(Running { verbs: self.verbs })
    }

    /// Makes the destination the owner. `missing` are the pages that the destination does not have
    /// in their last state. If nothing was [sent](Self::send_rest) since the pause, the state is
    /// sent first, and the pages that were dirtied since the last harvest are missing too.
    ///
    /// The locations of pages that are in stores are sent with it, if they have changed since they
    /// were announced. `missing` need not contain such pages. Free pages are never missing: they
    /// read as zeros at the destination.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved, the link is lost, or the destination does not
    /// get ready. The source owns the guest then.
    pub fn hand_over(self, missing: PageSet) -> Result<HandedOver<'a>, MigrationError> {
        self.verbs.hand_over(missing)?;
        Ok(HandedOver { verbs: self.verbs })
    }

    /// Returns the empty set of pages, for [`hand_over`](Paused::hand_over).
    pub fn no_pages(&self) -> PageSet {
        PageSet::empty(self.verbs.pages())
    }
}

/// The token of a VM that the destination owns.
pub struct HandedOver<'a> {
    verbs: &'a mut dyn Verbs,
}

impl HandedOver<'_> {
    /// Ends a migration in which no page is only at the source.
    ///
    /// Pages may still be in stores. The engine then waits until the destination has *released* the
    /// source, as [`serve`](Self::serve) does.
    ///
    /// # Errors
    /// Returns [`StillMissing`] if pages are only at the source after all. The engine then streams
    /// the missing pages.
    pub fn finish(self) -> Result<Done, StillMissing> {
        match self.verbs.missing_at_hand_over() {
            0 => Ok(Done(())),
            pages => Err(StillMissing { pages }),
        }
    }

    /// Streams missing pages. Sends the pages on which the destination faults at once, and moves
    /// the other pages in `order`: over the direct link first, and with the egress that the direct
    /// link leaves, into the stores that the order [names](PushOrder::through). If the link is
    /// lost, waits until it is restored.
    ///
    /// Returns when the destination has *released* the source: the destination has every page, or
    /// one or more stores have confirmed that they still hold the pages that it does not have. The
    /// destination may then continue to gather pages from stores, for which it does not need the
    /// source.
    ///
    /// # Errors
    /// Returns an error if it is certain that the destination cannot continue.
    pub fn serve(self, order: &mut dyn PushOrder) -> Result<Done, MigrationError> {
        self.verbs.serve(order)?;
        Ok(Done(()))
    }
}

/// The proof that a strategy has completed. Only [`HandedOver`] and a [commit](Running::commit)
/// make one.
#[derive(Debug)]
pub struct Done(());
