//! Other ways to move the same VM: our pre-copy between two processes of this machine, and a QEMU
//! that is replaced under its VM.

use std::thread;

use super::{
    figures::{Means, Other},
    plan::Guests,
};
use crate::bench::{
    guest::Guest,
    measure::{AFTER, BEFORE, FILL, Moved, ms, warm},
    ours::{self, Options, Source},
    process::Folder,
    qemu::Replaced,
};

/// Returns the result when the guest was found in its new process.
fn finish(means: Means, moved: &Moved, arrived: &Guest) -> Result<Other, String> {
    let gap_ms = ms(arrived.board()?.longest_gap());
    match arrived.verify()? {
        0 => {}
        wrong => return Err(format!("the guest found {wrong} wrong pages after {}", means.name())),
    }
    Ok(Other { means, gap_ms, total_ms: ms(moved.total), downtime_ms: moved.own_downtime_ms })
}

/// Migrates the guest with the default options of `ctl migrate`.
pub(super) fn pre_copy(folder: &Folder, guests: &Guests) -> Result<Other, String> {
    let options = Options { strategy: "pre-copy".into(), streams: 2, ..guests.options() };
    let mut source = Source::start(folder, &options)?;
    let guest = Guest::find(&mut source.process, options.memory, FILL)?;
    let mut pair = source.pair(folder, &options)?;
    let warm = warm(options.memory)?;
    thread::sleep(BEFORE);
    drop(warm);
    guest.reset_gap()?;
    let moved = pair.migrate()?;
    let arrived = Guest::find(&mut pair.destination, options.memory, FILL)?;
    pair.source.wait()?;
    thread::sleep(AFTER);
    finish(Means::PreCopy, &moved, &arrived)
}

/// Replaces a QEMU under its VM.
pub(super) fn qemu_cpr(folder: &Folder, guests: &Guests) -> Result<Other, String> {
    let elf = ours::image(folder, &guests.workload)?;
    let mut old = Replaced::start(folder, guests.memory, &elf)?;
    let guest = Guest::find(&mut old.process, guests.memory, FILL)?;
    let mut new = old.successor(folder)?;
    thread::sleep(BEFORE);
    guest.reset_gap()?;
    let moved = old.hand_over(&mut new)?;
    let arrived = Guest::find(&mut new.process, guests.memory, FILL)?;
    old.end()?;
    old.process.wait()?;
    thread::sleep(AFTER);
    finish(Means::QemuCpr, &moved, &arrived)
}
