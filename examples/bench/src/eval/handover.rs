//! `minivmm eval handover`: measures the guest's speed while its VMM is replaced, while another VMM
//! borrows the VM, and while pre-copy moves it.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::ProgressBar;
use minivmm_client::{Plan, Request, ask, values::size};
use serde_json::{Value, json};

use super::{
    Files, SECTION, reference, speed,
    timeline::{Act, Stage, Timeline},
};
use crate::bench::{
    MIB, attempt,
    figures::Machine,
    ours::{Options, Source, completed},
    output::{self, Table, machine, number},
    process::{Folder, program},
    tell,
    tuning::DEFAULT_LIMIT_MS,
};

const FILE: &str = "handover-speed.svg";
const TITLE: &str = "The guest's speed while its VMM is replaced, while it is borrowed, and while it is moved";

/// The longest time in which a VMM may end.
const END: Duration = Duration::from_secs(10);

/// The options of `minivmm eval handover`.
#[derive(Debug, Args)]
pub(super) struct Handover {
    /// RAM of the guest, which writes half of it continuously.
    #[arg(long, default_value = "1G", value_parser = size)]
    memory: u64,
    #[command(flatten)]
    files: Files,
}

/// The operations that are measured, each with a guest of its own.
const ACTS: [Act; 3] = [
    Act { name: "refresh", ready: refresh },
    Act { name: "borrowed, checked and given back", ready: ephemeral },
    Act { name: "pre-copy to another process", ready: pre_copy },
];

/// The time for which the guest stays with the VMM that borrows it.
const STAY: &str = "500ms";

/// A VMM that was replaced. The process that has the VM in the end is no child of this one, so it
/// is told to end when this is dropped.
struct Refreshed(Source);

impl Drop for Refreshed {
    fn drop(&mut self) {
        // it may have ended
        let _ = ask(&self.0.socket, &Request::Quit, |_| {});
        // it removes its control path at its end, when the next guest's VMM may have made the same
        // path
        let deadline = Instant::now() + END;
        while self.0.socket.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Replaces the VMM: `ctl refresh`.
fn refresh(_: &Folder, source: Source, _: &Options) -> Result<Stage, String> {
    let vm = Refreshed(source);
    let act = move || completed(ask(&vm.0.socket, &Request::Refresh(Plan::default()), |_| {})?);
    Ok(Stage { act: Box::new(act), destination: None })
}

/// Lets another VMM borrow the VM, check its memory and return it: `feature`.
fn ephemeral(_: &Folder, source: Source, _: &Options) -> Result<Stage, String> {
    let act = move || {
        // the closure borrows it, so that the process lives as long as the stage
        let source = &source;
        let mut borrower = Command::new(program()?);
        borrower.args(["feature", "--json", "--do", "check", "--hold", STAY, "--attach"]).arg(&source.socket);
        let output = borrower.output().map_err(|e| format!("starting the borrower: {e}"))?;
        let trip: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("the borrower's report: {e}"))?;
        if trip["outcome"] != "completed" || trip["return"]["outcome"] != "completed" {
            return Err(format!("the borrower: {trip}"));
        }
        let both = ["borrow", "return"].iter().filter_map(|way| trip[way]["downtime_ms"].as_f64()).sum::<f64>();
        Ok(json!({"outcome": trip["outcome"], "downtime_ms": both, "trip": trip}))
    };
    Ok(Stage { act: Box::new(act), destination: None })
}

/// Moves the same VM by pre-copy: `ctl migrate`.
fn pre_copy(folder: &Folder, source: Source, options: &Options) -> Result<Stage, String> {
    let mut pair = source.pair(folder, options)?;
    let destination = Some(pair.destination.pid());
    Ok(Stage { act: Box::new(move || Ok(pair.migrate()?.report)), destination })
}

pub(super) fn handover(args: &Handover) -> Result<(), String> {
    if let Some(path) = &args.files.markdown {
        output::check_section(path, SECTION)?;
    }
    let plots = args.files.plots()?;
    let options = guest(args.memory);
    let folder = Folder::new()?;
    let bar = ProgressBar::new(ACTS.len() as u64);
    bar.set_style(super::style());
    let (mut timelines, mut failures) = (Vec::new(), Vec::new());
    for act in &ACTS {
        tell(&bar, act.name);
        timelines.push(attempt(&bar, &mut failures, || act.timeline(&folder, &options))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let here = Machine::here(None);
    let table = table(&options, &timelines);
    out!("{}\n\n{}", machine(&here), table.text());
    if let Some(path) = &args.files.json {
        let all = json!({"machine": here, "guest": options, "timelines": timelines, "failures": failures});
        output::write_file(path, format!("{all:#}\n"))?;
    }
    let mut image = None;
    if let Some(folder) = plots {
        let path = folder.join(FILE);
        output::write_file(&path, speed::svg(&timelines)?)?;
        image = Some(path);
    }
    if let Some(path) = &args.files.markdown {
        let mut text = String::from("_Written by `minivmm eval handover --markdown`; do not edit by hand._\n\n");
        text += &format!("{}.\n\n{}", machine(&here), table.markdown());
        if let Some(image) = image {
            text += &format!("\n![{TITLE}]({})\n", reference(path, &image));
        }
        output::write_section(path, SECTION, &text)?;
    }
    Ok(())
}

/// Returns the guest with `memory` bytes of RAM.
fn guest(memory: u64) -> Options {
    Options {
        workload: format!("hot:size={}M,data={}M", memory / MIB / 2, memory / MIB * 700 / 1024),
        memory,
        cpus: 1,
        backing: "memfd",
        streams: 2,
        impact: "balanced",
        strategy: "pre-copy".into(),
        push_order: "linear".into(),
        bandwidth_bits: 0,
        fail_safe: "none".into(),
        downtime_limit_ms: DEFAULT_LIMIT_MS,
        way: Default::default(),
    }
}

fn table(options: &Options, timelines: &[Timeline]) -> Table {
    let rows = timelines.iter().map(|t| {
        let downtime = t.report["downtime_ms"].as_f64();
        vec![
            t.name.into(),
            number(Some(t.took_ms)),
            format!("{:.2}", t.gap_ms),
            downtime.map_or("-".into(), |ms| format!("{ms:.2}")),
            number(t.mean(0.0, t.took_ms)),
            number(t.mean(t.took_ms, t.took_ms + 100.0)),
            number(Some(t.lost_ms())),
        ]
    });
    let head = vec![
        "",
        "took, ms",
        "longest gap, ms",
        "downtime, ms",
        "speed meanwhile, %",
        "in the 100 ms after, %",
        "guest's time lost, ms",
    ];
    let title = format!("A guest in memory files, `{}`: one run each", options.workload);
    Table { title, head, rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::{super::timeline::test_util::timeline, *};

    #[test]
    fn every_timeline_has_its_line() {
        let options = guest(1 << 30);
        assert_eq!(options.workload, "hot:size=512M,data=700M");
        guests::check_spec(&options.workload).unwrap();
        let table = table(&options, &ACTS.map(|act| timeline(act.name, 200.0)));
        let text = table.text();
        let refresh = text.lines().find(|l| l.contains("refresh")).unwrap();
        for figure in ["200", "1.50", "0.70", "48.8", "100"] {
            assert!(refresh.contains(figure), "{figure} is missing in {refresh}");
        }
        assert!(text.contains("pre-copy"));
    }
}
