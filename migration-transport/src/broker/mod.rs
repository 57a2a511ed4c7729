//! A broker of guest RAM: it keeps descriptors of the memory files behind VMs, so that what they
//! hold outlives a VMM that dies.
//!
//! It saves the memory, and nothing else: the state of vCPUs and devices is in the VMM and in KVM
//! and dies with them. So what is kept is there to be looked at; a VM goes on only from a snapshot
//! or a checkpoint.

mod client;
mod message;
mod server;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use migration_core::{RamLayout, codec::DecodeError, vm::VmId};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use thiserror::Error;

pub use client::{BrokerClient, RamLease};
pub use server::{BrokerOptions, OwnerGone, RamBroker};

/// A broker did not do what it was asked for. What it displays does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// It cannot be reached, or went away, or does not answer.
    #[error("the RAM broker at unix:{}", path.display())]
    Link {
        /// Its socket.
        path: PathBuf,
        /// What happened.
        #[source]
        cause: io::Error,
    },
    /// It runs as another user, who would get the VM's memory.
    #[error("the RAM broker at unix:{} runs as user {uid}, not as this user or root", path.display())]
    OtherUser {
        /// Its socket.
        path: PathBuf,
        /// Who it runs as.
        uid: u32,
    },
    /// It refused, for this reason.
    #[error("the RAM broker: {0}")]
    Refused(String),
    /// What it said makes no sense.
    #[error("malformed data from the RAM broker")]
    Malformed(#[from] DecodeError),
    /// The files are not what the layout says.
    #[error("{0}")]
    Files(String),
}

/// RAM that a broker keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetainedRam {
    /// Of which VM.
    pub id: VmId,
    /// Bytes of RAM.
    pub bytes: u64,
    /// What its owner calls it, such as the backing.
    pub label: String,
    /// The process that has, or had, the lease.
    pub pid: u32,
    /// Whether that process still owns it: while it does, the connection of its lease is open.
    pub owned: bool,
}

/// RAM that was taken out of a broker, which keeps it all the same.
#[derive(Debug)]
pub struct RetrievedRam {
    /// Where it lies in the guest.
    pub layout: RamLayout,
    /// What its owner called it.
    pub label: String,
    /// A memory file for each region, of the region's length and sealed against another. If the VM
    /// runs, it writes there.
    pub files: Vec<OwnedFd>,
}

/// There is one memory file for each region, as long as it, which nobody can shorten: who maps it
/// is safe from SIGBUS.
fn check_files(layout: &RamLayout, files: &[OwnedFd]) -> Result<(), String> {
    let regions = layout.regions();
    if files.len() != regions.len() {
        return Err(format!("{} memory files for {} regions of RAM", files.len(), regions.len()));
    }
    for (index, (file, region)) in files.iter().zip(regions).enumerate() {
        let not_one = |e: rustix::io::Errno| format!("file {index} is no memory file: {e}");
        let seals = fcntl_get_seals(file.as_fd()).map_err(not_one)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(format!("memory file {index} is not sealed against shrinking and growing"));
        }
        let size = fstat(file.as_fd()).map_err(not_one)?.st_size;
        if u64::try_from(size) != Ok(region.len) {
            return Err(format!("memory file {index} has {size} bytes, its region {}", region.len));
        }
    }
    Ok(())
}
