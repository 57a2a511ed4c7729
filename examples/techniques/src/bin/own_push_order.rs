//! A custom push order, which decides the pages that post-copy sends next among those that the
//! guest has not requested.
//!
//! This order begins with the last page of RAM. The program needs what `post_copy` needs.

use migration_core::{
    PageRange, PageSet,
    strategy::{PostCopy, PushOrder},
};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

struct Descending;

impl PushOrder for Descending {
    fn name(&self) -> &'static str {
        "descending"
    }

    fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {}

    fn fault(&mut self, _page: u64) {}

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        let last = unsent.last_below(unsent.capacity())?;
        unsent.run_before(last + 1, most)
    }
}

fn main() -> Outcome {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
    let vm = Vm::start(&VmOptions::workload("sequential:size=64M,data=64M"))?;
    vm.wait_at_work()?;

    let report = vm.migrate(destination.address(), &mut PostCopy { order: Box::new(Descending) })?;

    show(&report);
    println!("{} pages were pushed, {} demanded by the guest", report.pages.pushed, report.pages.demanded);
    check(&destination.wait()?)
}
