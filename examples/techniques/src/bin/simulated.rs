//! A strategy in the simulator: the real strategy and the real protocol run in virtual time,
//! without a VM. The link breaks after a given action, and the guest stays at its source. The
//! second attempt completes.

use std::time::Duration;

use migration_core::{
    MigrationError,
    sim::{Dirtying, Owner, SimConfig, Simulation},
    strategy::{Done, Running, Strategy},
};
use techniques::Outcome;

struct OneRound;

impl Strategy for OneRound {
    fn name(&self) -> &'static str {
        "one-round"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        vm.send(&all)?;
        let written = vm.harvest()?;
        let mut vm = vm.pause()?;
        vm.send_rest(written)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

fn main() -> Outcome {
    let mut world = Simulation::new(SimConfig {
        dirtying: Dirtying::Rate { pages_per_second: 10_000.0, working_set: 4096 },
        latency: Duration::from_millis(1),
        cuts: vec![200],
        ..SimConfig::default()
    });

    let broken = world.attempt(&mut OneRound);
    println!("first attempt: {}", broken.error.ok_or("the link has not broken")?);
    if world.owner() != Owner::Source || !world.guest_runs() {
        return Err("the guest does not run on at its source".into());
    }

    let attempt = world.attempt(&mut OneRound);
    if let Some(error) = attempt.error {
        return Err(error.into());
    }
    println!("second attempt: {:?} in all, downtime {:?}", attempt.total, attempt.downtime);
    if world.owner() == Owner::Destination && world.broken().is_empty() {
        return Ok(());
    }
    Err(format!("the simulation has found {:?}", world.broken()).into())
}
