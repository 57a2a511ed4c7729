//! Runs each program, as a reader would.
//!
//! Without /dev/kvm those with a VM are ignored with the reason; with `MIGRATION_REQUIRE_KVM=1`
//! they fail instead.

use std::{
    fs::OpenOptions,
    process::{Command, ExitCode},
};

use libtest_mimic::{Arguments, Failed, Trial};
use migration_kvm::tracker::UserFault;

/// What a program needs of the host.
enum Needs {
    Nothing,
    Kvm,
    /// KVM, and to handle page faults of the kernel.
    PageFaults,
}

impl Needs {
    /// Why the host does not have it.
    fn missing(&self) -> Option<String> {
        let kvm = || OpenOptions::new().read(true).write(true).open("/dev/kvm").err();
        let no_kvm = || kvm().map(|e| format!("/dev/kvm cannot be used: {e}"));
        match self {
            Self::Nothing => None,
            Self::Kvm => no_kvm(),
            Self::PageFaults => no_kvm().or_else(|| UserFault::new().err().map(|e| e.to_string())),
        }
    }
}

fn run(program: &str) -> Result<(), Failed> {
    let output = Command::new(program).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Err(format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr)).into())
}

fn trial(name: &'static str, program: &'static str, needs: &Needs, required: bool) -> Trial {
    match needs.missing() {
        None => Trial::test(name, move || run(program)),
        Some(why) if required => Trial::test(name, move || Err(why.into())),
        Some(why) => {
            eprintln!("{name} is ignored: {why}");
            Trial::test(name, || Ok(())).with_ignored_flag(true)
        }
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // source, destination and guests of two programs are enough for a small machine
    arguments.test_threads.get_or_insert(2);
    let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|v| v == "1");
    let programs = [
        ("pre_copy", env!("CARGO_BIN_EXE_pre_copy"), Needs::Kvm),
        ("post_copy", env!("CARGO_BIN_EXE_post_copy"), Needs::PageFaults),
        ("agile", env!("CARGO_BIN_EXE_agile"), Needs::PageFaults),
        ("quick_eviction", env!("CARGO_BIN_EXE_quick_eviction"), Needs::PageFaults),
        ("scatter_gather", env!("CARGO_BIN_EXE_scatter_gather"), Needs::PageFaults),
        ("hand_over", env!("CARGO_BIN_EXE_hand_over"), Needs::Kvm),
        ("snapshot", env!("CARGO_BIN_EXE_snapshot"), Needs::Kvm),
        ("encrypted", env!("CARGO_BIN_EXE_encrypted"), Needs::Kvm),
        ("own_strategy", env!("CARGO_BIN_EXE_own_strategy"), Needs::Kvm),
        ("own_push_order", env!("CARGO_BIN_EXE_own_push_order"), Needs::PageFaults),
        ("own_convergence", env!("CARGO_BIN_EXE_own_convergence"), Needs::Kvm),
        ("simulated", env!("CARGO_BIN_EXE_simulated"), Needs::Nothing),
    ];
    let trials = programs.into_iter().map(|(name, program, needs)| trial(name, program, &needs, required)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
