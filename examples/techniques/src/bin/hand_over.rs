//! Hand-over: a new process takes over a VM from another process of its host. Both processes map
//! the same memory, so no page moves.
//!
//! The program starts itself a second time, as the process that takes over the VM.

use std::{
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use migration_core::strategy::HandOver;
use migration_kvm::ram::Backing;
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

fn main() -> Outcome {
    match env::args().nth(1) {
        None => old(),
        Some(socket) => new(&socket),
    }
}

/// Runs the process that has the VM.
fn old() -> Outcome {
    let memory = VmOptions { backing: Backing::Memfd, ..VmOptions::workload("hot:size=16M,data=64M") };
    let vm = Vm::start(&memory)?;
    vm.wait_at_work()?;
    // memory files can pass through a Unix socket only
    let socket = env::temp_dir().join(format!("hand-over-{}", std::process::id()));
    let mut new = Command::new(env::current_exe()?).arg(&socket).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(new.stdout.take().ok_or("no output")?).lines();
    let address = lines.next().ok_or("the new process does not listen")??;

    let report = vm.migrate(&address.parse()?, &mut HandOver)?;

    show(&report);
    for line in lines {
        println!("new process: {}", line?);
    }
    if new.wait()?.success() { Ok(()) } else { Err("the new process has failed".into()) }
}

/// Runs the process that takes over the VM.
fn new(socket: &str) -> Outcome {
    let destination = Destination::listen(&format!("unix:{socket}").parse()?)?;
    println!("{}", destination.address());
    let vm = destination.wait();
    std::fs::remove_file(socket)?;
    check(&vm?)
}
