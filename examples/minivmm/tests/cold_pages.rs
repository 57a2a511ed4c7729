//! VMs of which cold pages are in a page store: how they move, and what is refused.
//!
//! Without userfaultfd they are ignored and say why; with MIGRATION_REQUIRE_KVM=1 they fail instead.
//! Without KVM a software guest takes the place of the real one.

use std::{error::Error, sync::Arc, thread};

use migration_core::{
    engine::ReceiverOptions,
    report::Report,
    store::{MemoryPageStore, PageStore},
    strategy::{Agile, HandOver, PostCopy, PreCopy, Strategy, push_order::MultiPivot},
    text::describe,
    working_set::ResidentLimit,
};
use migration_kvm::{
    ram::Backing,
    tracker::{UserFault, features},
};
use minivmm::{Destination, Vm, VmOptions};

type Outcome = Result<(), Box<dyn Error>>;

const MIB: u64 = 1 << 20;

/// Returns whether this host can evict pages of private memory.
fn possible() -> bool {
    let why = match UserFault::new() {
        Ok(fault) if fault.features() & features::MOVE != 0 => return true,
        Ok(_) => "userfaultfd lacks MOVE".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("MIGRATION_REQUIRE_KVM").is_none_or(|v| v != "1"), "{why}");
    eprintln!("ignored: {why}");
    false
}

fn rack() -> Arc<dyn PageStore> {
    Arc::new(MemoryPageStore::new("rack-7", 512 * MIB))
}

/// Starts a guest that has filled 96 MiB, works on 4 of them, and has 32 MiB in the store.
fn half_cold(backing: Backing, rack: &Arc<dyn PageStore>) -> Result<Vm, Box<dyn Error>> {
    let options = VmOptions::workload("hot:size=4M,data=96M");
    let vm = Vm::start(&VmOptions { memory: 160 * MIB, backing, ..options })?;
    vm.wait_at_work()?;
    vm.keep_cold_pages(vec![rack.clone()], ResidentLimit::Bytes(64 * MIB))?;
    vm.wait_cold(32 * MIB)?;
    Ok(vm)
}

/// Moves such a guest, and lets it check all its pages where it is then.
fn moves(backing: Backing, strategy: &mut dyn Strategy) -> Result<Report, Box<dyn Error>> {
    let rack = rack();
    let options = ReceiverOptions { stores: vec![rack.clone()], ..ReceiverOptions::default() };
    let destination = Destination::listen_with(&"tcp:127.0.0.1:0".parse()?, None, options)?;
    let vm = half_cold(backing, &rack)?;
    let report = vm.migrate(destination.address(), strategy)?;
    let arrived = destination.wait()?;
    arrived.wait_works_on()?;
    assert_eq!(arrived.verify()?, 0, "wrong pages after {} on {backing}", strategy.name());
    Ok(report)
}

#[test]
fn agile_leaves_cold_pages_in_the_store() -> Outcome {
    if !possible() {
        return Ok(());
    }
    for backing in [Backing::TransparentHuge, Backing::Memfd] {
        let report = moves(backing, &mut Agile { order: Box::new(MultiPivot::default()) })?;
        assert!(report.wire_bytes < 80 * MIB, "{backing}: {} bytes", report.wire_bytes);
    }
    Ok(())
}

#[test]
fn other_strategies_send_cold_pages() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let report = moves(Backing::Anonymous, &mut <PreCopy>::default())?;
    assert!(report.wire_bytes > 96 * MIB, "{} bytes", report.wire_bytes);
    let report = moves(Backing::Memfd, &mut PostCopy { order: Box::new(MultiPivot::default()) })?;
    assert!(report.wire_bytes > 96 * MIB, "{} bytes", report.wire_bytes);
    Ok(())
}

#[test]
fn what_does_not_go_with_cold_pages_is_refused_until_they_are_back() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let vm = half_cold(Backing::Memfd, &rack())?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("snapshot");
    let refused = vm.snapshot(&file).map(|_| ()).map_err(describe);
    assert!(refused.as_ref().is_err_and(|why| why.contains("page store")), "{refused:?}");
    let socket = folder.path().join("socket");
    let destination = Destination::listen(&format!("unix:{}", socket.display()).parse()?)?;
    let refused = vm.migrate(destination.address(), &mut HandOver).map(|_| ()).map_err(describe);
    assert!(refused.as_ref().is_err_and(|why| why.contains("page store")), "{refused:?}");
    assert!(vm.keep_cold_pages(vec![rack()], ResidentLimit::Auto).is_err(), "a second swapper");

    vm.set_resident_limit(ResidentLimit::Off)?;
    while vm.paging().is_some_and(|paging| paging.cold_bytes > 0) {
        thread::yield_now();
    }
    vm.snapshot(&file)?;
    assert_eq!(vm.verify()?, 0);
    vm.forget_cold_pages();
    assert_eq!(Vm::restore(&file)?.verify()?, 0);
    Ok(())
}
