//! Guests that end by themselves while they move: whoever is concerned hears it at once, and why.

use libtest_mimic::Failed;

use crate::{
    common::{Lab, Outcome, Process, Suite, at_work, ensure, ensure_says, wait_for},
    hand_over::{HAND_OVER, successor},
};

/// Ends a while after it began to work, which is long after its migration has begun, also on a busy
/// machine.
const GUEST: &str = "random:size=8M,data=40M,crash=12s";
/// So slow that it takes far longer than that.
const SLOW: [&str; 2] = ["--bandwidth", "4Mbit"];

/// Moments at which a guest ends that is on its way all the time: some of them are before a switch,
/// some after it, and some in it.
const MOMENTS: u64 = 8;
/// More hand-overs than there is time for.
const MOST: usize = 200;

pub(crate) fn add(suite: &mut Suite) {
    for moment in 0..MOMENTS {
        suite.kvm(format!("ended/while_handed_over/{moment}"), move |lab| while_handed_over(lab, moment));
        suite.kvm(format!("ended/while_lent/{moment}"), move |lab| while_lent(lab, moment));
    }
    suite.kvm("ended/in_pre_copy", in_pre_copy);
    suite.kvm("ended/without_a_client", without_a_client);
    suite.post_copy("ended/in_post_copy", "anon", |lab| in_post_copy(lab, &[]));
    suite.post_copy("ended/in_fail_safe_post_copy", "anon", |lab| in_post_copy(lab, &["--fail-safe", "reverse"]));
}

/// Both of them, as soon as the guest works.
fn pair(lab: &Lab) -> Result<(Process, Process), Failed> {
    let source = lab.run("source", &["--memory", "64M", "--workload", GUEST])?;
    let destination = lab.receive("destination", &[])?;
    source.wait_until("the guest works", at_work)?;
    Ok((source, destination))
}

fn has_crashed(process: &mut Process) -> Outcome {
    let status = process.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", process.stderr()))?;
    ensure_says(&process.stderr(), "the VM has ended: triple fault on vCPU 0")
}

fn in_pre_copy(lab: &Lab) -> Outcome {
    let (mut source, destination) = pair(lab)?;
    let answer = source.migrate(&destination.address, &SLOW)?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure(answer.reason().starts_with("the VM has ended: triple fault on vCPU 0"), || format!("{answer:?}"))?;
    has_crashed(&mut source)?;
    hears_of_it(lab, destination)
}

/// The destination knows why it has discarded what came, and takes another VM.
fn hears_of_it(lab: &Lab, destination: Process) -> Outcome {
    let heard = || {
        let said = destination.stderr();
        Ok(said.contains("the source ended the attempt: the VM has ended: triple fault on vCPU 0").then_some(()))
    };
    wait_for("the destination hears why", heard)?;
    destination.wait_state("incoming")?;
    lab.workload("other", "random:size=8M", &[])?.migrate_well(&destination.address, &[])?;
    destination.works()?;
    destination.quit()
}

/// Nobody waits for the migration: the process ends only after it has told the destination.
fn without_a_client(lab: &Lab) -> Outcome {
    let (mut source, destination) = pair(lab)?;
    let client = source.start_migrate(&destination.address, &SLOW)?;
    source.wait_until("it moves", |s| s["migration"]["wire_bytes"].as_u64() > Some(100_000))?;
    client.kill();
    has_crashed(&mut source)?;
    hears_of_it(lab, destination)
}

/// At the destination, while pages are missing there.
fn in_post_copy(lab: &Lab, options: &[&str]) -> Outcome {
    let (mut source, mut destination) = pair(lab)?;
    let args = [&SLOW[..], &["--strategy", "post-copy"], options].concat();
    let answer = source.migrate(&destination.address, &args)?;
    ensure(answer.code == Some(5) && answer.json["outcome"] == "ended", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "at the destination: the VM has ended: triple fault on vCPU 0")?;
    has_crashed(&mut destination)?;
    // it neither serves for ever nor runs the guest once more
    let status = source.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}", source.stderr()))
}

/// A guest that ends when it has worked for a few seconds, in memory that can be handed over.
fn on_its_way(lab: &Lab, moment: u64) -> Result<Process, Failed> {
    // the moments are a prime number of ms apart: none is as long as a hand-over
    let spec = format!("random:size=8M,crash={}ms", 3000 + 17 * moment);
    let home = lab.run("home", &["--memory", "64M", "--workload", &spec, "--backing", "memfd"])?;
    home.wait_until("the guest works", at_work)?;
    Ok(home)
}

/// From process to process, until it ends: whoever has it then says so, and the other one is free.
fn while_handed_over(lab: &Lab, moment: u64) -> Outcome {
    let mut at = on_its_way(lab, moment)?;
    for n in 1..=MOST {
        let next = successor(lab, &format!("vmm-{n}"), &[])?;
        let answer = at.migrate(&next.address, &HAND_OVER)?;
        if answer.code != Some(0) {
            has_crashed(&mut at)?;
            next.wait_state("incoming")?;
            let mut other = lab.workload("other", "random:size=8M", &["--backing", "memfd"])?;
            other.migrate_well(&next.address, &HAND_OVER)?;
            next.works()?;
            return next.quit();
        }
        at.ended_well()?;
        at = next;
    }
    Err("the guest does not end".into())
}

/// There and back again, until it ends: wherever it was, its home ends with it, and so does the
/// borrower, which waits for nothing.
fn while_lent(lab: &Lab, moment: u64) -> Outcome {
    let mut home = on_its_way(lab, moment)?;
    let (code, trips, stderr) =
        home.feature(&["--do", "check", "--every", "1ms", "--times", "100000", "--within", "10m"])?;
    let told = || format!("{code:?}: {stderr}: {:?}", trips.last());
    let status = home.ended()?;
    ensure(status.code() == Some(5), || format!("{status}: {}; {}", home.stderr(), told()))?;
    ensure_says(&home.stderr(), "the VM has ended")?;
    ensure(!stderr.contains("waited"), told)?;
    // at the borrower; or at home, which the borrower then does not find any more
    ensure(code == Some(5) && stderr.contains("triple fault") || code == Some(1), told)
}
