//! A snapshot: the state of the VM at one moment is written to a file while the VM runs. Another VM
//! continues from there.

use std::{env, fs};

use minivmm::{Vm, VmOptions};
use techniques::{Outcome, check};

fn main() -> Outcome {
    let file = env::temp_dir().join(format!("snapshot-{}", std::process::id()));
    let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
    vm.wait_at_work()?;

    let report = vm.snapshot(&file)?;

    println!("snapshot: {:.0?} in all, the guest was paused for {:.1?}", report.total, report.downtime);
    vm.wait_works_on()?;
    // only one instance of the VM may run
    drop(vm);
    let restored = Vm::restore(&file);
    fs::remove_file(&file)?;
    check(&restored?)
}
