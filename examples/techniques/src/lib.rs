//! The code that the programs in `src/bin` share: it prints the cost of a migration and checks the
//! guest. Each program shows one way to migrate a VM, to be read and changed.
//!
//! | program | technique |
//! |---|---|
//! | `pre_copy` | pages move in rounds while the guest runs |
//! | `post_copy` | the guest moves first, its pages follow |
//! | `agile` | the working set moves, and cold pages stay in a page store |
//! | `quick_eviction` | a copy is kept in a page store, and on a command only dirty pages move |
//! | `scatter_gather` | post-copy whose pages go through two page stores, so that the source is free soon |
//! | `hand_over` | a process takes over a VM from another process of its host, and no page moves |
//! | `snapshot` | the VM is written to a file while it runs, and another VM continues from there |
//! | `encrypted` | every channel is encrypted and authenticated |
//! | `own_strategy` | a custom strategy |
//! | `own_push_order` | post-copy in a custom push order |
//! | `own_convergence` | pre-copy with a custom convergence policy |
//! | `simulated` | the same strategy as `own_strategy`, without a VM, over a link that breaks |
//!
//! `cargo run -p techniques --bin pre_copy` runs one. All but the last run a VM on KVM. Without KVM
//! they run a software guest, threads that write the same pages.
#![forbid(unsafe_code)]

use std::error::Error;

use migration_core::report::Report;
use minivmm::Vm;

/// The result of a program's `main`.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Prints the cost of a migration.
pub fn show(report: &Report) {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let downtime = report.downtime.map_or(f64::NAN, ms);
    println!(
        "{}: {:.0} ms in all, {} rounds, {:.1} MiB on the wire, downtime {downtime:.1} ms",
        report.strategy,
        ms(report.total),
        report.rounds.len(),
        report.wire_bytes as f64 / f64::from(1 << 20),
    );
}

/// Checks that a guest continues to work where it is now, and that each of its pages holds what the
/// guest has written there.
///
/// # Errors
/// Returns an error if the guest does not work, or if a page is wrong.
pub fn check(vm: &Vm) -> Outcome {
    vm.wait_works_on()?;
    match vm.verify()? {
        0 => {
            println!("the guest works on, and all its pages are right");
            Ok(())
        }
        wrong => Err(format!("the guest has found {wrong} wrong pages").into()),
    }
}
