//! The program `minivmm`: the commands of the library, and the measurements, unless they are not
//! built in.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use minivmm::command;

/// A small VMM that demonstrates the migration crates.
#[derive(Debug, Parser)]
#[command(name = "minivmm", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Vmm(Box<command::Command>),
    /// Show a complete migration between two processes, with a table of what happened.
    #[cfg(feature = "bench")]
    Demo(bench::Demo),
    /// Measure, and compare with QEMU if it is installed.
    #[cfg(feature = "bench")]
    Bench(bench::Bench),
    /// Measure the techniques, and compare the figures with those of their papers.
    #[cfg(feature = "bench")]
    Eval(bench::Eval),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return command::wrong_command_line(&error),
    };
    command::survive_file_limits();
    match &cli.command {
        #[cfg(feature = "bench")]
        Command::Vmm(vmm) => command::run(vmm, bench::push_order),
        #[cfg(not(feature = "bench"))]
        Command::Vmm(vmm) => command::run(vmm, command::no_push_orders),
        #[cfg(feature = "bench")]
        Command::Demo(args) => command::finish(bench::demo(args)),
        #[cfg(feature = "bench")]
        Command::Bench(args) => command::finish(bench::bench(args)),
        #[cfg(feature = "bench")]
        Command::Eval(args) => command::finish(bench::eval(args)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
