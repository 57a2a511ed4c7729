//! Agile migration: cold pages of a VM are in a page store that both hosts reach, and stay there.
//! Only the working set moves, with the locations of the cold pages.
//!
//! The program needs the right to handle page faults of the kernel, as post-copy does, and Linux
//! 6.8.

use std::sync::Arc;

use migration_core::{
    engine::ReceiverOptions,
    store::{MemoryPageStore, PageStore},
    strategy::{Agile, push_order::MultiPivot},
    working_set::ResidentLimit,
};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

const MIB: u64 = 1 << 20;

fn main() -> Outcome {
    // in production this is a server, or a folder that both hosts mount: see docs/stores.md
    let rack: Arc<dyn PageStore> = Arc::new(MemoryPageStore::new("rack-7", 512 * MIB));
    let options = ReceiverOptions { stores: vec![rack.clone()], ..ReceiverOptions::default() };
    let destination = Destination::listen_with(&"tcp:127.0.0.1:0".parse()?, None, options)?;

    // the guest has filled 128 MiB and works on 8 MiB of them
    let vm = Vm::start(&VmOptions::workload("hot:size=8M,data=128M"))?;
    vm.wait_at_work()?;
    vm.keep_cold_pages(vec![rack], ResidentLimit::Bytes(64 * MIB))?;
    let paging = vm.wait_cold(64 * MIB)?;
    println!("{} MiB are cold, {} MiB resident", paging.cold_bytes / MIB, paging.resident_bytes / MIB);

    let report = vm.migrate(destination.address(), &mut Agile { order: Box::new(MultiPivot::default()) })?;

    show(&report);
    // the guest also checks its cold pages, which come from the store
    check(&destination.wait()?)
}
