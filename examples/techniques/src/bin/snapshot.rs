//! A snapshot: the VM is written to a file as it is at one moment, while it runs on. Another VM
//! goes on from there.

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
    // there must be only one of it
    drop(vm);
    let restored = Vm::restore(&file);
    fs::remove_file(&file)?;
    check(&restored?)
}
