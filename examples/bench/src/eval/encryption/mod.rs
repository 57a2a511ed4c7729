//! `minivmm eval encryption`: the cost of ciphers, after Hu et al. 2015: by strategy, workload,
//! link and core.
//!
//! | file | content |
//! |---|---|
//! | plan.rs | the migrations and their order |
//! | run.rs | one migration |
//! | cage.rs | a limit on the CPU time of a process |
//! | stream.rs | a stream beside the migration |
//! | report.rs | medians, tables, CSV, and the paper's findings |
//! | html.rs | all figures as one page |

mod cage;
mod html;
mod plan;
mod report;
mod run;
mod stream;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use cage::Cage;
use clap::Args;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use minivmm_client::log;
use minivmm_client::values::size;
use plan::{Cell, Core, Kind, Net};
use report::Figures;
use run::Means;

use super::SECTION;
use crate::bench::{attempt, encrypt::Shaper, figures::Machine, output, process::Folder, tell};

/// The options of `minivmm eval encryption`.
#[derive(Debug, Args)]
pub(super) struct EncryptionEval {
    /// Run a part of it once: without aes128-gcm, with 256 MiB of data, without a stream, on full
    /// cores.
    #[arg(long)]
    quick: bool,
    /// Runs of each kind; figures are their medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100), conflicts_with = "quick")]
    repeat: u32,
    /// The seed of the guests' data.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Measure only this: a cipher, strategy, workload (`writer-64`, or `writer` for all sizes),
    /// link or core. Can be given several times.
    #[arg(long, value_name = "WORD")]
    only: Vec<String>,
    /// Write all figures and all single values as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every run as a line of a CSV file.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write all tables and plots into one HTML page that needs no other file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the medians into this Markdown file, between the lines `<!-- eval:begin -->` and `<!--
    /// eval:end -->`.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The number of bytes that stand for a MiB, to test the measurement.
    #[arg(long, hide = true, default_value = "1M", value_parser = size)]
    unit: u64,
}

/// Finds out what this machine can do, and removes the rest from the plan. Returns the reasons.
fn means(args: &EncryptionEval, cells: &mut Vec<Cell>) -> (Means, Option<Shaper>, Vec<String>) {
    let mut left_out = Vec::new();
    let caged = ["source", "destination"].iter().try_for_each(|name| Cage::new(name, Core::Half.percent()).map(drop));
    if let Err(why) = &caged {
        left_out.push(format!(
            "half cores (and a full one is what the scheduler gives), as no control group can be made: {why}"
        ));
        cells.retain(|cell| cell.core != Core::Half);
    }
    // no namespace is made unless a run needs it
    let needed = cells.iter().any(|cell| cell.net == Net::Gigabit);
    let shaper = needed.then(|| Shaper::new("1gbit")).transpose();
    if let Err(why) = &shaper {
        left_out.push(format!("the stream over 1 Gbit/s (and migrations keep to that by themselves), as there is no network namespace: {why}"));
        cells.retain(|cell| (cell.work.kind, cell.net) != (Kind::Stream, Net::Gigabit));
    }
    let means = Means { shaped: shaper.is_ok(), caged: caged.is_ok(), unit: args.unit, seed: args.seed };
    (means, shaper.ok().flatten(), left_out)
}

fn write(path: Option<&Path>, text: impl FnOnce() -> Result<String, String>) -> Result<(), String> {
    let Some(path) = path else { return Ok(()) };
    output::write_file(path, text()?)
}

/// Checks that the files can be written, before hours are spent on their content.
fn check_files(args: &EncryptionEval) -> Result<(), String> {
    for path in [&args.json, &args.csv, &args.html].into_iter().flatten() {
        let open = fs::OpenOptions::new().append(true).create(true).open(path);
        open.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    args.markdown.as_ref().map_or(Ok(()), |path| output::check_section(path, SECTION))
}

pub(super) fn eval(args: &EncryptionEval) -> Result<(), String> {
    check_files(args)?;
    let mut cells = plan::cells(args.quick);
    plan::keep(&mut cells, &args.only)?;
    // the link exists until the end
    let (means, _link, left_out) = means(args, &mut cells);
    left_out.iter().for_each(|what| note!("left out: {what}"));
    let repeats = if args.quick { 1 } else { args.repeat };
    let estimate = cells.iter().map(Cell::seconds).sum::<f64>() * f64::from(repeats);
    let runs = cells.len() * repeats as usize;
    let about = HumanDuration(std::time::Duration::from_secs_f64(estimate));
    note!("{runs} migrations, about {about:#} in all; each has {} s", run::LIMIT.as_secs());
    let bar = ProgressBar::new(runs as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len}, {eta} left, {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let began = Instant::now();
    let mut figures = Figures::new(Machine::here(None), args.seed, &means, estimate, left_out);
    let result = measure(&bar, &cells, repeats, &means, args.csv.as_deref(), &mut figures);
    figures.took_s = began.elapsed().as_secs_f64().round();
    bar.finish_and_clear();
    log::print(&figures.text());
    write(args.json.as_deref(), || Ok(format!("{:#}\n", figures.json())))?;
    write(args.html.as_deref(), || html::page(&figures))?;
    if let Some(path) = &args.markdown {
        output::write_section(path, SECTION, &figures.markdown())?;
    }
    result
}

/// Does all runs, which may take hours, and writes the result of each at once. A run that fails
/// twice is left out and becomes an error at the end.
fn measure(
    bar: &ProgressBar,
    cells: &[Cell],
    repeats: u32,
    means: &Means,
    csv: Option<&Path>,
    figures: &mut Figures,
) -> Result<(), String> {
    let folder = Folder::new()?;
    let mut failed = 0;
    for repeat in 0..repeats {
        for cell in cells {
            tell(bar, &format!("{cell} ({})", repeat + 1));
            match attempt(bar, &mut figures.failures, || run::run(&folder, cell, repeat, means)) {
                Ok(run) => {
                    tell(bar, &format!("    {}", run.brief()));
                    let wrong = run.guest_errors;
                    figures.runs.push(run);
                    write(csv, || Ok(figures.csv()))?;
                    if wrong > 0 {
                        return Err(format!("the guest found {wrong} wrong pages after {cell}"));
                    }
                }
                Err(why) => {
                    figures.left_out.push(format!("{cell} ({}), as it failed again: {why}", repeat + 1));
                    failed += 1;
                }
            }
            bar.inc(1);
        }
    }
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of the migrations failed twice")) }
}
