//! A custom strategy: a script of the operations of `migration_core::strategy`.
//!
//! This strategy sends all pages once while the guest runs, and hands the guest over. If too many
//! pages for the downtime limit were written meanwhile, these pages follow in post-copy.

use migration_core::{
    MigrationError,
    strategy::{Done, Linear, Running, Strategy},
};
use minivmm::{Destination, Vm, VmOptions};
use techniques::{Outcome, check, show};

struct OneRound;

impl Strategy for OneRound {
    fn name(&self) -> &'static str {
        "one-round"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        vm.send(&all)?;
        let written = vm.harvest()?;
        let link = vm.link();
        let downtime = link.predict(written.len());
        vm.expect_downtime(downtime);
        let mut vm = vm.pause()?;
        if downtime > link.downtime_limit && link.can_post_copy {
            return vm.hand_over(written)?.serve(&mut Linear::default());
        }
        vm.send_rest(written)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

fn main() -> Outcome {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse()?)?;
    let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
    vm.wait_at_work()?;

    let report = vm.migrate(destination.address(), &mut OneRound)?;

    show(&report);
    check(&destination.wait()?)
}
