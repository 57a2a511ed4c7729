//! Pre-copy: pages are sent in rounds while the guest runs, until few are left. The guest is then
//! paused for the rest.

use migration_core::strategy::PreCopy;
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

fn main() -> Outcome {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
    let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
    vm.wait_at_work()?;

    let report = vm.migrate(destination.address(), &mut <PreCopy>::default())?;

    show(&report);
    check(&destination.wait()?)
}
