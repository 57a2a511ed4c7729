//! An encrypted migration: both sides have a key, prove that to each other, and encrypt every
//! channel (AES-256-GCM).
//!
//! `minivmm keygen` makes a file with a key, and `Psk::load` reads it. Separate keys of each side
//! and TLS certificates are also supported.

use migration_core::{engine::ReceiverOptions, strategy::PreCopy};
use migration_crypto::{Credentials, Psk, Security, Suite};
use minivmm::{Destination, MigrateOptions, Vm, VmOptions};
use techniques::{Outcome, check, show};

fn main() -> Outcome {
    let mut key = [0; 32];
    getrandom::fill(&mut key)?;
    let security = || Security { suites: vec![Suite::Aes256Gcm], ..Security::new(Credentials::Psk(Psk::new(key))) };

    let at = "tcp:127.0.0.1:0".parse()?;
    let destination = Destination::listen_with(&at, Some(security()), ReceiverOptions::default())?;
    let vm = Vm::start(&VmOptions::workload("hot:size=16M,data=64M"))?;
    vm.wait_at_work()?;
    let stranger = vm.migrate(destination.address(), &mut <PreCopy>::default());
    println!("without the key: {}", stranger.err().ok_or("a source without the key was accepted")?);

    let options = MigrateOptions { security: Some(security()), ..MigrateOptions::default() };
    let report = vm.migrate_with(destination.address(), &mut <PreCopy>::default(), &options)?;

    show(&report);
    check(&destination.wait()?)
}
