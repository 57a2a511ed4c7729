//! The VMM: a machine of vCPUs, RAM and a serial port, and the glue that lets it migrate.

#[allow(unsafe_code)]
mod alias;
mod balloon;
mod boot;
mod config;
mod devices;
mod glue;
mod kvm;
mod machine;
mod measured;
mod paging;
mod protect;
mod software;
#[cfg(test)]
mod tests;

pub(crate) use boot::least_memory;
pub(crate) use config::MachineConfig;
pub use devices::SerialTarget;
pub(crate) use glue::{Host, HostOptions, MachineSource, Tenant};
pub use machine::MachineError;
pub(crate) use machine::{Machine, Snapshot, host_tsc_khz};
pub(crate) use paging::ColdPages;
