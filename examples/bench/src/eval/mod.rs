//! `minivmm eval`: compares our techniques with the measurements of their papers, on this machine,
//! in one run.
//!
//! | file | content |
//! |---|---|
//! | run.rs | one migration between two processes, and the reports of both sides and of the guest |
//! | plan.rs | the migrations and their order |
//! | encryption/ | the cost of ciphers |
//! | handover.rs | hand-overs: the operations that are measured |
//! | timeline.rs | the guest's speed during an operation |
//! | speed.rs | the timelines as SVG |
//! | withhold.rs | a push order that pushes nothing at first: the idle link |
//! | figures.rs | medians over runs, and the targets |
//! | tables.rs | the figures as tables |
//! | plot.rs | the figures as SVG |

mod encryption;
mod figures;
mod handover;
mod plan;
mod plot;
mod run;
mod speed;
mod tables;
mod timeline;
mod withhold;

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use encryption::EncryptionEval;
use figures::Figures;
use handover::Handover;
use indicatif::{ProgressBar, ProgressStyle};
use migration_core::strategy::PushOrder;
use minivmm_client::log;
use serde_json::json;

use crate::bench::{attempt, figures::Machine, output, process::Folder, tell};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "eval";

/// Compare our techniques with the measurements of their papers.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(subcommand)]
    what: Technique,
}

#[derive(Debug, Subcommand)]
enum Technique {
    /// Network faults by push order, self-ballooning, a storm of faults, the latency of a fault,
    /// and the cost of fail-safe post-copy.
    PostCopy(PostCopy),
    /// The guest's speed while its VMM is replaced, and while pre-copy moves it.
    Handover(Handover),
    /// The cost of ciphers, by strategy, workload, link and core.
    Encryption(EncryptionEval),
}

/// The options of `minivmm eval post-copy`.
#[derive(Debug, Args)]
struct PostCopy {
    /// One run of each kind instead of several.
    #[arg(long)]
    quick: bool,
    /// Runs of each kind; figures are their medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100), conflicts_with = "quick")]
    repeat: u32,
    /// Measure only this part; can be given several times.
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
    /// The seed of the guests' data and of the push order `random`.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    #[command(flatten)]
    files: Files,
}

/// The files into which figures and plots are written.
#[derive(Debug, Args)]
struct Files {
    /// Write all figures and all single values as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the figures into this Markdown file, between the lines `<!-- eval:begin -->` and `<!--
    /// eval:end -->`.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write the plots into this folder. By default they are written into `plots` beside the
    /// Markdown file, if there is one.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Files {
    /// Returns the folder for the plots, if any. Makes it if it is missing.
    fn plots(&self) -> Result<Option<PathBuf>, String> {
        let folder = self.plots_folder();
        if let Some(folder) = &folder {
            fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        }
        Ok(folder)
    }

    fn plots_folder(&self) -> Option<PathBuf> {
        let beside = |markdown: &PathBuf| markdown.parent().map(|folder| folder.join("plots"));
        self.out.clone().or_else(|| self.markdown.as_ref().and_then(beside))
    }
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum Part {
    /// Network faults of each push order.
    Faults,
    /// The same after a round of pre-copy, which gives `hot-first` a history.
    Hybrid,
    /// Four vCPUs that need the same pages.
    Storm,
    /// A fault beside a push at full rate, and beside none.
    Latency,
    /// The cost of reverse checkpoints, at several intervals.
    FailSafe,
    /// The bytes with and without a balloon.
    Balloon,
}

/// Runs an evaluation. Returns the exit status.
pub fn run(args: &Eval) -> u8 {
    match measure(&args.what) {
        Ok(()) => 0,
        Err(why) => {
            note!("minivmm eval: {why}");
            1
        }
    }
}

/// Returns a push order that only measurements need, by its name; `None` for any other name.
pub fn push_order(text: &str) -> Option<Box<dyn PushOrder>> {
    Some(Box::new(withhold::parse(text)?))
}

fn measure(technique: &Technique) -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm here, and the figures of software guests would say nothing".into());
    }
    match technique {
        Technique::PostCopy(args) => post_copy(args),
        Technique::Handover(args) => handover::handover(args),
        Technique::Encryption(args) => encryption::eval(args),
    }
}

fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Returns the path of `file` for a link in the Markdown file: relative to that file's folder, if
/// possible.
fn reference(markdown: &Path, file: &Path) -> String {
    let folder = markdown.parent().unwrap_or(Path::new(""));
    file.strip_prefix(folder).unwrap_or(file).display().to_string()
}

fn post_copy(args: &PostCopy) -> Result<(), String> {
    if let Some(path) = &args.files.markdown {
        output::check_section(path, SECTION)?;
    }
    let plots = args.files.plots()?;
    let steps = plan::steps(&args.only, if args.quick { 1 } else { args.repeat }, args.seed);
    let folder = Folder::new()?;
    let bar = ProgressBar::new(steps.len() as u64);
    bar.set_style(style());
    let mut figures = Figures::new(Machine::here(None), args.seed);
    for step in &steps {
        tell(&bar, &step.to_string());
        let run = attempt(&bar, &mut figures.failures, || run::run(&folder, step))?;
        if run.guest_errors > 0 {
            return Err(format!("the guest found {} wrong pages after {step}", run.guest_errors));
        }
        tell(&bar, &format!("    {}", run.brief()));
        figures.runs.push(run);
        bar.inc(1);
    }
    bar.finish_and_clear();
    log::print(&tables::text(&figures));
    if let Some(path) = &args.files.json {
        let all = json!({"machine": figures.machine, "seed": figures.seed, "verdicts": figures.verdicts(),
            "failures": figures.failures, "runs": figures.runs});
        output::write_file(path, format!("{all:#}\n"))?;
    }
    let mut images = Vec::new();
    if let Some(folder) = &plots {
        for plot in plot::all(&figures)? {
            let path = folder.join(plot.file);
            output::write_file(&path, plot.svg)?;
            images.push((plot.title, path));
        }
    }
    if let Some(path) = &args.files.markdown {
        let images = images.iter().map(|(title, file)| (*title, reference(path, file))).collect::<Vec<_>>();
        output::write_section(path, SECTION, &tables::markdown(&figures, &images))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        eval: Eval,
    }

    fn parse(line: &[&str]) -> Result<PostCopy, clap::Error> {
        match Line::try_parse_from([&["eval", "post-copy"], line].concat())?.eval.what {
            Technique::PostCopy(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn command_lines() {
        let args = parse(&["--quick", "--only", "storm", "--only", "hybrid"]).unwrap();
        assert!(args.quick && args.only == [Part::Storm, Part::Hybrid] && args.files.plots_folder().is_none());
        assert!(parse(&["--quick", "--repeat", "3"]).is_err() && parse(&["--only", "weather"]).is_err());
        let args = parse(&["--markdown", "docs/post-copy.md"]).unwrap();
        assert_eq!(args.files.plots_folder(), Some("docs/plots".into()));
        let args = parse(&["--markdown", "a.md", "--out", "b"]).unwrap();
        assert_eq!(args.files.plots_folder(), Some("b".into()));
        let line = ["eval", "handover", "--memory", "256M", "--out", "b"];
        assert!(matches!(Line::try_parse_from(line).unwrap().eval.what, Technique::Handover(_)));
        let line = ["eval", "encryption", "--quick", "--only", "writer-64", "--csv", "a.csv"];
        assert!(matches!(Line::try_parse_from(line).unwrap().eval.what, Technique::Encryption(_)));
        assert!(Line::try_parse_from(["eval", "encryption", "--quick", "--repeat", "3"]).is_err());
    }

    #[test]
    fn files_are_referred_to_from_the_page() {
        assert_eq!(reference("docs/post-copy.md".as_ref(), "docs/plots/a.svg".as_ref()), "plots/a.svg");
        assert_eq!(reference("post-copy.md".as_ref(), "plots/a.svg".as_ref()), "plots/a.svg");
        assert_eq!(reference("docs/post-copy.md".as_ref(), "/tmp/a.svg".as_ref()), "/tmp/a.svg");
    }

    #[test]
    fn the_order_of_measurements_has_a_name() {
        assert_eq!(push_order("withhold:faults=5").unwrap().name(), "withhold");
        for other in ["multi-pivot:k=3", "withhold", "withhold:faults=x", "best"] {
            assert!(push_order(other).is_none(), "{other}");
        }
    }
}
