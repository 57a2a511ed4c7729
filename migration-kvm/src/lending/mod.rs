//! A guest leaves its home for a while, and comes back (ephemeral virtualization; see
//! [`engine::ephemeral`](migration_core::engine::ephemeral)).
//!
//! Two VMMs hold a VM. At the *home VMM* it is at home; a *feature VMM* asks for its guest, does
//! something with it (a snapshot, a migration, introspection), and gives it back. The types
//! [`Active`] and [`Standby`] say who may run the guest. This module adds what two processes need
//! that may die at any moment:
//!
//! | | home VMM | feature VMM |
//! |---|---|---|
//! | way out | [`Absence::run`] hands the guest over | [`fetch`] waits for it |
//! | away | notices that the guest is overdue, or that the feature VMM has died | does its work |
//! | way back | takes the guest back, or takes it over | [`give_back`] hands it over |
//!
//! A process that dies with the guest loses it. One that dies after it has brought *all* of the
//! guest, but before it gave it up, is survived: the guest is complete on the other side, and is
//! taken over there, because a process of the same host can be known to be dead
//! ([`ProcessFence`]).
//!
//! Nothing here needs KVM. The VM is a [`PersistentVm`], which both VMMs build once.
//!
//! # Example
//! The home VMM, on a thread of its own:
//!
//! ```no_run
//! use std::{sync::Arc, time::Duration};
//!
//! use migration_core::{
//!     channel::{Connector, Listener},
//!     engine::{
//!         Controller, ReceiverOptions, SourceOptions,
//!         ephemeral::{PersistentVm, Active},
//!     },
//!     report::Report,
//! };
//! use migration_kvm::lending::{Absence, AbsenceEnd, HomeVmm, Journey, TakeOverError};
//!
//! struct Home;
//!
//! impl HomeVmm for Home {
//!     fn detached(&self, _report: &Report) {}
//!     fn is_in_doubt(&self) -> bool {
//!         false
//!     }
//!     fn lost_in_doubt(&self) {}
//!     fn overdue(&self) {}
//!     fn not_taken_over(&self, _why: &TakeOverError) {}
//!     fn unwatched(&self, _why: &std::io::Error) {}
//! }
//!
//! fn lend<V: PersistentVm>(
//!     guest: Active<V>,
//!     feature: Vec<u8>,
//!     to: &dyn Connector,
//!     back: &mut dyn Listener,
//! ) -> Option<Active<V>> {
//!     let (_controller, commands) = Controller::new();
//!     let journey = Journey {
//!         to,
//!         source: &SourceOptions::default(),
//!         commands,
//!         back,
//!         receiver: ReceiverOptions::default(),
//!     };
//!     let absence = Absence::new(feature, Duration::from_secs(60));
//!     match absence.run(&(Arc::new(Home) as _), guest, journey) {
//!         AbsenceEnd::Stayed { guest, .. } | AbsenceEnd::Returned(guest) => Some(guest),
//!         AbsenceEnd::Lost(why) => {
//!             eprintln!("the guest does not come back: {}", migration_core::text::describe(why));
//!             None
//!         }
//!         AbsenceEnd::Gone => None,
//!     }
//! }
//! ```
//!
//! [`Active`]: migration_core::engine::ephemeral::Active
//! [`Standby`]: migration_core::engine::ephemeral::Standby
//! [`PersistentVm`]: migration_core::engine::ephemeral::PersistentVm
//! [`ProcessFence`]: crate::fence::ProcessFence

mod feature;
mod home;

use std::time::Duration;

pub use self::{
    feature::{Answer, Fetched, GivenBack, fetch, give_back},
    home::{Absence, AbsenceEnd, HomeVmm, Journey},
};
pub use crate::fence::TakeOverError;

/// How often the other process is looked at.
const TICK: Duration = Duration::from_millis(100);
