//! A custom convergence policy, which decides when pre-copy ends its rounds.
//!
//! This policy stops when at least half as many pages were written in a round as the round has
//! sent, or after five rounds, as many tools do.

use migration_core::{
    PageSet,
    strategy::{Convergence, Linear, Link, Next, PreCopy, Round, Wanted},
};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

struct Halves;

impl Convergence for Halves {
    fn judge(&mut self, round: &Round, dirty: &PageSet, link: &Link) -> Next {
        println!("round {}: {} pages sent, {} written meanwhile", round.generation, round.sent, dirty.len());
        if round.generation < 5 && dirty.len() * 2 < round.sent {
            return Next::Round;
        }
        Next::SwitchOver(Wanted { downtime: link.predict(dirty.len()) })
    }
}

fn main() -> Outcome {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
    let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
    vm.wait_at_work()?;

    let mut strategy = PreCopy { convergence: Halves, order: Box::new(Linear::default()) };
    let report = vm.migrate(destination.address(), &mut strategy)?;

    show(&report);
    check(&destination.wait()?)
}
