//! Post-copy: the guest moves first. A page that the guest touches is sent immediately, all other
//! pages are pushed meanwhile, and no page is sent twice.
//!
//! The program needs the right to handle page faults of the kernel: root, `/dev/userfaultfd`, or
//! `vm.unprivileged_userfaultfd`.

use migration_core::strategy::{PostCopy, push_order::MultiPivot};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

fn main() -> Outcome {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
    let vm = Vm::start(&VmOptions::workload("random:size=64M,data=64M"))?;
    vm.wait_at_work()?;

    let report = vm.migrate(destination.address(), &mut PostCopy { order: Box::new(MultiPivot::default()) })?;

    show(&report);
    println!("{} pages were pushed, {} demanded by the guest", report.pages.pushed, report.pages.demanded);
    check(&destination.wait()?)
}
