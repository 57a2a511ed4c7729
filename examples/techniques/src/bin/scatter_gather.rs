//! Scatter-gather over two page stores: post-copy whose pages go into the stores when the direct
//! link has no room for them. The source is free as soon as each page is somewhere else, and the
//! destination gathers the remaining pages without it.
//!
//! The stores are in the memory of this process, which contains both ends. In production they are
//! on other hosts (`FilePageStore`, `RedisPageStore`), and the pages in them are sealed. The
//! program needs what `post_copy` needs.

use std::{sync::Arc, time::Duration};

use migration_core::{
    engine::{ReceiverOptions, SourceOptions, SourceStores},
    store::{MemoryPageStore, Owner, PageStore},
    strategy::{ScatterGather, push_order::HotFirst},
};
use migration_crypto::{Psk, Sealed, Suite, aead, random_namespace};
use minivmm::{Destination, MigrateOptions, Vm, VmOptions};
use techniques::{Outcome, check, show};

fn main() -> Outcome {
    let mut key = [0; 32];
    getrandom::fill(&mut key)?;
    // each end opens the stores itself, and the ends share only the names and a key
    let racks = ["rack-7", "rack-8"].map(|name| Arc::new(MemoryPageStore::new(name, 256 << 20)));
    let sealed = |rack: &Arc<MemoryPageStore>| -> Arc<dyn PageStore> {
        Arc::new(Sealed::new(rack.clone(), Psk::new(key), Suite::Aes256Gcm, aead::best()))
    };
    let stores = || racks.iter().map(sealed).collect();

    let options = ReceiverOptions { stores: stores(), ..ReceiverOptions::default() };
    let destination = Destination::listen_with(&"tcp:127.0.0.1:0".parse()?, None, options)?;
    let vm = Vm::start(&VmOptions::workload("random:size=64M,data=64M"))?;
    vm.wait_at_work()?;

    let stores = SourceStores {
        stores: stores(),
        new_namespace: Arc::new(|| random_namespace().expect("the operating system has random bytes")),
        owner: Owner::new("the example scatter_gather")?,
        lease: Duration::from_secs(600),
        gather_rate: None,
    };
    let source = SourceOptions { stores: Some(stores), ..SourceOptions::default() };
    let options = MigrateOptions { source, references: true, ..MigrateOptions::default() };
    let mut strategy = ScatterGather::new(["rack-7", "rack-8"], HotFirst::default());
    let report = vm.migrate_with(destination.address(), &mut strategy, &options)?;

    show(&report);
    println!("{} pages came directly, {} went through stores:", report.pages.direct, report.pages.stored);
    for store in &report.stores {
        println!("  {}: {} MiB", store.name, store.bytes >> 20);
    }
    // the source is not needed any more
    drop(vm);
    check(&destination.wait()?)
}
