//! The verbs, and the tokens that keep their order.

use std::time::Duration;

use super::{Destination, Link, Place, Portion, PushOrder, Put, Round, StillMissing, Until, Wake};
use crate::{MigrationError, page_map::PageMap, page_set::PageSet};

/// What an engine can do. Strategies use it through the tokens, which keep the order.
///
/// An engine that has no page stores, or that is connected before a strategy begins, needs none of
/// the methods with a default implementation: each of those refuses, and says why, or does nothing.
///
/// A user's cancel, and the end of the guest, are final: the verb that learns of it returns the
/// error, and so does every later one. So a strategy that goes on after an error cannot miss them.
pub trait Verbs {
    /// Returns how many pages the VM has.
    fn pages(&self) -> u64;
    /// Starts dirty tracking. Returns the pages that may hold data which the guest needs, without
    /// those that stay in stores.
    fn start_tracking(&mut self) -> Result<PageSet, MigrationError>;
    /// Sends pages of the running guest to the destination.
    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError>;
    /// Returns all pages that are unsent: written since the last harvest, or not sent before,
    /// whoever forgot them. Pages that are free now are not among them.
    fn harvest(&mut self) -> Result<PageSet, MigrationError>;
    /// Slows the vCPUs down.
    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError>;
    /// Returns what is known of the link.
    fn link(&self) -> Link;
    /// Returns whether the user has asked to switch over now, whatever is left to send.
    fn switch_over_wanted(&self) -> bool {
        false
    }
    /// Records the downtime that the strategy expects, to be reported beside the real one.
    fn expect_downtime(&mut self, prediction: Duration);
    /// Records why the downtime limit is not kept, or why the strategy stopped trying to, to be
    /// reported. Does nothing by default.
    fn stalled(&mut self, why: &str) {
        let _ = why;
    }
    /// Reports an error after which the strategy goes on. Does nothing by default.
    fn report(&mut self, error: &MigrationError) {
        let _ = error;
    }
    /// Connects to a destination and builds the VM there. See [`Running::connect`].
    fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked(format!("this engine is connected already, and cannot connect to {to}")))
    }
    /// Puts pages of the running guest somewhere. See [`Running::put`].
    fn put(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        let _ = pages;
        Err(no_places(portion.place))
    }
    /// Waits. See [`Running::wait`].
    fn wait(&mut self, until: Until) -> Result<Wake, MigrationError> {
        let _ = until;
        Err(MigrationError::Blocked("this engine cannot wait for commands, times or dirty pages".into()))
    }
    /// Returns where each page is, as the source knows it.
    fn locations(&self) -> Result<PageMap, MigrationError> {
        Err(MigrationError::Blocked("this engine does not say where pages are".into()))
    }
    /// Stops vCPUs and devices.
    fn pause(&mut self) -> Result<(), MigrationError>;
    /// Lets them go on.
    fn resume(&mut self) -> Result<(), MigrationError>;
    /// Saves the state and sends it with `pages` and all that was dirtied up to the save.
    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError>;
    /// Hands ownership over. `missing` are pages that the destination does not have yet. Every
    /// other page that is neither acknowledged, nor located in a store, nor zero is missing as
    /// well.
    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError>;
    /// Returns how many pages the hand-over has left at the source and nowhere else.
    fn missing_at_hand_over(&self) -> u64;
    /// Serves the destination's faults and pushes all else in an order, until the destination has
    /// *released* the source. See [`HandedOver::serve`].
    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError>;
    /// Makes what the store has got final. Only an engine that puts pages into a store can.
    fn commit(&mut self) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked("pages go to a destination: there is no store to commit".into()))
    }
}

/// Returns the error of an engine that cannot put pages anywhere.
fn no_places(place: &Place) -> MigrationError {
    MigrationError::Blocked(format!("this engine sends pages in rounds only, and cannot put them elsewhere: {place}"))
}

/// The guest runs at the source.
pub struct Running<'a> {
    verbs: &'a mut dyn Verbs,
}

impl<'a> Running<'a> {
    /// Makes the token with which the engine calls a strategy.
    pub fn new(verbs: &'a mut dyn Verbs) -> Self {
        Self { verbs }
    }

    /// Returns how many pages the VM has.
    pub fn pages(&self) -> u64 {
        self.verbs.pages()
    }

    /// Starts dirty tracking. Returns all of RAM but the pages that were never touched, those that
    /// the guest has reported [free](crate::vm::SourceVm::free_pages), and those of which a store
    /// has the newest content, if the strategy [keeps](super::Strategy::keeps_stored_pages) them
    /// there.
    ///
    /// # Errors
    /// Returns an error if the tracker fails.
    pub fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        self.verbs.start_tracking()
    }

    /// Sends `pages` to the destination while the guest runs, and returns when the destination
    /// holds them. Returns early, with what it did, when the time-out of the migration passes.
    ///
    /// # Errors
    /// Returns an error if the link is lost or the destination refuses.
    pub fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        self.verbs.send(pages)
    }

    /// Puts pages of the running guest into a place, and removes from `pages` those that the place
    /// has acknowledged. [`send`](Self::send) is the case "to the destination".
    ///
    /// Returns early, with what it did, when a [command](Until::command) has come, when the
    /// time-out of the migration passes, or when the limit of the portion is reached. The command
    /// itself is returned by the next [`wait`](Self::wait).
    ///
    /// A page that the guest writes after it was read is part of the next harvest, whether or not
    /// it was acknowledged. If the store later loses what it has, the pages are part of the next
    /// harvest too, and the next put begins a new namespace.
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
    /// store that fails is no error of this call: see [`Put::failed`].
    pub fn put<'p>(&mut self, pages: &mut PageSet, portion: impl Into<Portion<'p>>) -> Result<Put, MigrationError> {
        self.verbs.put(pages, portion.into())
    }

    /// Waits until something happens, and keeps the link alive meanwhile. So a strategy never polls
    /// and never sleeps.
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

    /// Connects to a destination: asks for what it supports, builds the VM there, and sends the
    /// locations of all pages that are in stores. Returns when the destination has acknowledged all
    /// locations. The guest runs meanwhile, and its pages stay tracked.
    ///
    /// Only a strategy that [connects by itself](super::Strategy::connects_itself) calls this; for
    /// all others the engine is connected before the strategy begins.
    ///
    /// # Errors
    /// Returns an error if the destination is not reached or refuses. Nothing has changed then: the
    /// strategy may [report](Self::report) the error, wait for another command, and connect again.
    pub fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        self.verbs.connect(to)
    }

    /// Returns all pages that the destination does not have in their last state: written since the
    /// last harvest (or since tracking began), not sent by a round that ended early, or never
    /// passed to [`send`](Self::send) or [`put`](Self::put). Pages that are free now are left out:
    /// one that the guest takes back and writes is part of the next harvest.
    ///
    /// # Errors
    /// Returns an error if the tracker fails.
    pub fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        self.verbs.harvest()
    }

    /// Lets the vCPUs run only `100 - percent` of the time.
    ///
    /// # Errors
    /// Returns an error if the VMM fails to.
    pub fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.verbs.throttle(percent)
    }

    /// Returns what is known of the link.
    pub fn link(&self) -> Link {
        self.verbs.link()
    }

    /// Returns where the newest content of each page is, as the source knows it now.
    ///
    /// # Errors
    /// Returns [`MigrationError::Blocked`] if the engine does not say.
    pub fn locations(&self) -> Result<PageMap, MigrationError> {
        self.verbs.locations()
    }

    /// Returns whether the user has asked to switch over now, whatever is left to send. Rounds end
    /// early then, so a strategy that [can](super::Strategy::can_switch_over) looks at this after
    /// each.
    pub fn switch_over_wanted(&self) -> bool {
        self.verbs.switch_over_wanted()
    }

    /// Records the downtime that is expected if the guest is paused now.
    pub fn expect_downtime(&mut self, prediction: Duration) {
        self.verbs.expect_downtime(prediction);
    }

    /// Records why the downtime limit is not kept, with the figures.
    pub fn stalled(&mut self, why: &str) {
        self.verbs.stalled(why);
    }

    /// Reports an error after which the strategy goes on, to whoever observes the migration.
    pub fn report(&mut self, error: &MigrationError) {
        self.verbs.report(error);
    }

    /// Gives up. The engine gives everything back.
    ///
    /// # Errors
    /// Always returns [`MigrationError::GaveUp`].
    pub fn cancel(self, why: impl Into<String>) -> Result<Done, MigrationError> {
        Err(MigrationError::GaveUp(why.into()))
    }

    /// Ends a snapshot: the store has all pages and the state of one moment, and keeps them for
    /// good. The guest runs on.
    ///
    /// # Errors
    /// Returns [`MigrationError::Store`] when the store fails, and [`MigrationError::Blocked`] in a
    /// migration, which has no store to commit.
    pub fn commit(self) -> Result<Done, MigrationError> {
        self.verbs.commit()?;
        Ok(Done(()))
    }

    /// Pauses the guest. From here on no store is waited for until it runs again.
    ///
    /// # Errors
    /// Returns an error if the VMM fails to.
    pub fn pause(self) -> Result<Paused<'a>, MigrationError> {
        self.verbs.pause()?;
        Ok(Paused { verbs: self.verbs })
    }
}

/// The guest is paused at the source, which owns it.
pub struct Paused<'a> {
    verbs: &'a mut dyn Verbs,
}

impl<'a> Paused<'a> {
    /// Saves the state, and sends it together with `pages`, with what was dirtied since the last
    /// harvest, and with what saving the state dirtied.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved, or the link is lost.
    pub fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.verbs.send_rest(pages)
    }

    /// Lets the guest run again, at the source.
    ///
    /// # Errors
    /// Returns an error if the VMM fails to.
    pub fn resume(self) -> Result<Running<'a>, MigrationError> {
        self.verbs.resume()?;
        Ok(Running { verbs: self.verbs })
    }

    /// Makes the destination the owner. `missing` are the pages that it does not have in their last
    /// state. If nothing was [sent](Self::send_rest) since the pause, the state goes first, and
    /// what was dirtied since the last harvest is missing too.
    ///
    /// The locations of pages that are in stores go with it, as far as they have changed since they
    /// were announced: such pages need not be named. Free pages are never missing: they read as
    /// zeros there.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved, the link is lost, or the destination does not
    /// get ready. The guest is the source's then.
    pub fn hand_over(self, missing: PageSet) -> Result<HandedOver<'a>, MigrationError> {
        self.verbs.hand_over(missing)?;
        Ok(HandedOver { verbs: self.verbs })
    }

    /// Returns the empty set of pages, for [`hand_over`](Paused::hand_over).
    pub fn no_pages(&self) -> PageSet {
        PageSet::empty(self.verbs.pages())
    }
}

/// The destination owns the VM.
pub struct HandedOver<'a> {
    verbs: &'a mut dyn Verbs,
}

impl HandedOver<'_> {
    /// Ends a migration that left no page at the source alone.
    ///
    /// Pages may still be in stores: the engine then waits until the destination has *released* the
    /// source, as [`serve`](Self::serve) does.
    ///
    /// # Errors
    /// Returns [`StillMissing`] when pages are only at the source after all. The engine then serves
    /// them.
    pub fn finish(self) -> Result<Done, StillMissing> {
        match self.verbs.missing_at_hand_over() {
            0 => Ok(Done(())),
            pages => Err(StillMissing { pages }),
        }
    }

    /// Gives the destination the pages that it faults on, at once, and moves the others in this
    /// order: over the direct link first, and with the egress that it leaves into the stores that
    /// the order [names](PushOrder::through). A lost link is waited out.
    ///
    /// Returns when the destination has *released* the source: it has every page, or has one or
    /// more stores confirm that they still hold it. It may then go on to gather pages from stores,
    /// for which it does not need the source.
    ///
    /// # Errors
    /// Returns an error if it is certain that the destination cannot go on.
    pub fn serve(self, order: &mut dyn PushOrder) -> Result<Done, MigrationError> {
        self.verbs.serve(order)?;
        Ok(Done(()))
    }
}

/// Proof that a strategy came to its end: only [`HandedOver`] and a [commit](Running::commit) make
/// one.
#[derive(Debug)]
pub struct Done(());
