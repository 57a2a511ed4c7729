//! The interfaces that a VMM implements: the VM at the source, the VM at the destination, the host
//! that builds it, and its devices.

mod description;
mod destination;
pub mod device;
mod source;
pub mod state;

pub use self::{
    description::{SectionEstimate, StateEstimate, VmDescription},
    destination::{Arrived, CheckpointedVm, DestinationHost, DestinationVm, FailedAttempt},
    source::SourceVm,
};
pub use crate::{vm_error::VmError, vm_id::VmId};
