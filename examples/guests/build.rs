//! Compiles the guest (`guest/`) into `OUT_DIR/guest.elf`.
//!
//! The guest is a separate program, without the standard library and linked to a fixed address.
//! `rustc` is called directly: a Cargo package would need a target specification or special flags,
//! and a second `cargo` inside the first.

use std::path::PathBuf;
use std::process::Command;
use std::{env, error::Error};

/// The flags that make the compiler of a Linux target produce a freestanding image. The guest does
/// not enable XCR0, so it is limited to the baseline's SSE2.
const FLAGS: &[&str] = &[
    "--crate-type=bin",
    "--crate-name=guest",
    "--edition=2024",
    "-Cpanic=abort",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Crelocation-model=static",
    "-Cforce-unwind-tables=no",
    "-Cstrip=debuginfo",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,noexecstack",
    "-Clink-arg=-Wl,-n",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    let target = env::var("TARGET")?;
    if !target.starts_with("x86_64-") || !target.contains("-linux-") {
        return Err(format!("the guest is for x86-64 Linux, not {target}").into());
    }
    let guest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guest");
    let elf = PathBuf::from(env::var("OUT_DIR")?).join("guest.elf");
    let status = Command::new(env::var("RUSTC")?)
        .args(FLAGS)
        .args(["--target", &target])
        .arg(format!("-Clink-arg=-Wl,-T,{}", guest.join("link.ld").display()))
        .arg("-o")
        .arg(&elf)
        .arg(guest.join("main.rs"))
        .status()?;
    if !status.success() {
        return Err(format!("compiling the guest failed ({status})").into());
    }
    Ok(())
}
