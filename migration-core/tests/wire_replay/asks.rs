//! A strategy that asks its controller something at every step.

use migration_core::{
    MigrationError,
    engine::Controller,
    strategy::{Done, Linear, Running, Strategy},
};

/// Asks at every step of a hand-over, after a pause that was in vain.
pub struct Asks<A> {
    pub controller: Controller,
    /// What is asked.
    pub question: fn(&Controller) -> A,
    /// The answers so far.
    pub answers: Vec<A>,
    pub can_switch_over: bool,
    /// Whether all pages are left behind, to be sent after the hand-over.
    pub leaves: bool,
}

impl<A> Asks<A> {
    pub fn ask(&mut self) {
        self.answers.push((self.question)(&self.controller));
    }
}

impl<A: Send> Strategy for Asks<A> {
    fn name(&self) -> &'static str {
        "asks"
    }

    fn can_switch_over(&self) -> bool {
        self.can_switch_over
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        self.ask();
        let pages = vm.start_tracking()?;
        let vm = vm.pause()?;
        self.ask();
        let vm = vm.resume()?;
        self.ask();
        let mut vm = vm.pause()?;
        if self.leaves {
            let vm = vm.hand_over(pages)?;
            self.ask();
            return vm.serve(&mut Linear::default());
        }
        vm.send_rest(pages)?;
        let nothing = vm.no_pages();
        let vm = vm.hand_over(nothing)?;
        self.ask();
        Ok(vm.finish()?)
    }
}
