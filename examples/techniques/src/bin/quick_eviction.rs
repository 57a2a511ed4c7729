//! Quick eviction: a copy of the running VM is kept ready in a page store. When the VM must leave
//! its host, its destination is named, and only dirty pages move over the link.
//!
//! The store is in the memory of this process, which contains both ends. In production the store is
//! on another host (`FilePageStore`, `RedisPageStore`), and the pages in it are sealed. The program
//! needs what `post_copy` needs.

use std::{num::NonZeroU64, sync::Arc, thread, time::Duration};

use migration_core::{
    engine::{Controller, ReceiverOptions, SourceOptions, SourceStores},
    store::{MemoryPageStore, Owner, PageStore, RateLimited},
    strategy::{self, Finish, Place, QuickEviction, push_order::MultiPivot},
};
use migration_crypto::random_namespace;
use migration_transport::{ConnectOptions, connector};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

/// The VM is evicted when fewer dirty pages than this are left. A guest that writes always leaves
/// some.
const FEW_PAGES: u64 = 8192;

fn main() -> Outcome {
    let rack = Arc::new(MemoryPageStore::new("rack-7", 512 << 20));
    let stores: Vec<Arc<dyn PageStore>> = vec![rack.clone()];
    let options = ReceiverOptions { stores, ..ReceiverOptions::default() };
    let destination = Destination::listen_with(&"tcp:127.0.0.1:0".parse()?, None, options)?;
    let vm = Vm::start(&VmOptions::workload("hot:size=8M,data=128M"))?;
    vm.wait_at_work()?;

    // the budget holds for as long as the VM is protected
    let budget = NonZeroU64::new(500 << 20);
    let stores = SourceStores {
        stores: vec![Arc::new(RateLimited::new(rack, budget))],
        new_namespace: Arc::new(|| random_namespace().expect("the operating system has random bytes")),
        owner: Owner::new("the example quick_eviction")?,
        lease: Duration::from_secs(600),
        gather_rate: None,
    };
    let source = SourceOptions { stores: Some(stores), ..SourceOptions::default() };
    let mut quick = QuickEviction {
        stage: Place::stage(["rack-7"]),
        interval: Duration::from_millis(20),
        threshold: 256,
        most: 16_384,
        finish: Finish::PostCopy,
        order: Box::new(MultiPivot::default()),
    };
    let (controller, commands) = Controller::new();
    let report = thread::scope(|scope| {
        let protected = scope.spawn(|| vm.protect(&mut quick, &source, commands));
        let is_ready = || controller.staging().is_some_and(|copy| copy.increments > 5 && copy.dirty_pages < FEW_PAGES);
        while !protected.is_finished() && !is_ready() {
            thread::sleep(Duration::from_millis(5));
        }
        if let Some(copy) = controller.staging() {
            println!("{} increments, {} pages staged, {} dirty", copy.increments, copy.staged_pages, copy.dirty_pages);
        }
        // the destination of the VM becomes known only now
        let to = destination.address();
        let link = connector(to, ConnectOptions::default());
        // if the protection has ended, its report says why
        let _ = controller.evict(strategy::Destination::named(to.to_string()), link.into());
        protected.join()
    });
    let report = report.map_err(|_| "the thread has panicked")??;

    show(&report);
    let direct = report.pages.pushed + report.pages.demanded + report.pages.entry;
    println!("{direct} pages came over the link, all others from the store");
    check(&destination.wait()?)
}
