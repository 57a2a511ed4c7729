//! Hand-over on one machine: RAM stays in place, and only the state moves.

use super::{Done, Running, Strategy};
use crate::MigrationError;

/// Replaces the process that runs a VM, as HyperFresh does (Bagdi et al. 2017, Doddamani et al.,
/// VEE 2019) and Orthus (Zhang et al., ASPLOS 2019). Their co-mapping of the VM's memory, and all
/// other slow work at the successor, is done when the RAM is [shared](Strategy::shares_ram), while
/// the guest runs. So the pause only moves the state of vCPUs and devices, whatever the size of RAM
/// and however fast the guest writes.
///
/// HyperFresh replaces a nested hypervisor by hypercalls of its host. This strategy replaces a VMM
/// by memory files.
#[derive(Clone, Copy, Debug, Default)]
pub struct HandOver;

impl Strategy for HandOver {
    fn name(&self) -> &'static str {
        "handover"
    }

    fn shares_ram(&self) -> bool {
        true
    }

    fn migrate(&mut self, vm: Running<'_>) -> Result<Done, MigrationError> {
        let vm = vm.pause()?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}
