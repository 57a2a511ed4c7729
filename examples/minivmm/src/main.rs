//! `minivmm`, the reference VMM: small but real, and the place to see how a VMM plugs into the migration crates. The
//! glue is `vmm/glue.rs`; everything else is what any VMM has.
#![deny(unsafe_code)]

mod bench;
mod broker;
mod check;
mod checkpoints;
mod cli;
mod client;
mod control;
mod demo;
mod encryption;
mod eval;
mod feature;
mod instance;
mod refresh;
mod report;
mod restart;
mod sealing;
mod vmm;
mod workload;

use std::{io::Write, path::Path, process::ExitCode, sync::Arc};

use clap::Parser;
use cli::{Cli, Command, Common, OnLinkLoss, Receive, Run, Workload, absolute};
use control::ControlSocket;
use instance::Instance;
use migration_kvm::ram::Backing;
use refresh::Place;
use sealing::Sealing;
use vmm::{HostOptions, Machine, MachineConfig, SerialTarget};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match &cli.command {
        Command::Run(args) => run(args),
        Command::Receive(args) => receive(args),
        Command::Ctl(args) => Ok(client::run(args)),
        Command::Feature(args) => Ok(feature::run(args)),
        Command::Broker(args) => Ok(broker::run(args)),
        Command::Workload(args) => workload(args),
        Command::Demo(args) => Ok(demo::run(args)),
        Command::Bench(args) => Ok(bench::run(args)),
        Command::Eval(args) => Ok(eval::run(args)),
        Command::Keygen(args) => encryption::keygen(args),
    };
    ExitCode::from(result.unwrap_or_else(|why| {
        eprintln!("minivmm: {why}");
        1
    }))
}

/// A wrong command line. Programs that asked for JSON get JSON.
fn usage(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args().any(|a| a == "--json");
    if wants_json && error.use_stderr() {
        let why = error.render().to_string();
        return ExitCode::from(client::usage(true, why.lines().next().unwrap_or("wrong command line")));
    }
    // best effort: there is nobody else to tell
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { 2 } else { 0 })
}

fn run(args: &Run) -> Result<u8, String> {
    if let Some(spec) = &args.workload
        && let Err(error) = workload::check_spec(spec)
    {
        eprintln!("minivmm: {error}");
        return Ok(2);
    }
    if let Some(path) = &args.restore {
        return restore(args, path);
    }
    if let Some(spec) = &args.workload {
        let least = workload::least_memory(spec, args.cpus).map_err(|e| format!("{spec}: {e}"))?;
        enough_memory(args.memory, least, &format!("the workload {spec} on {} vCPUs", args.cpus))?;
    }
    if let Some(path) = &args.kernel {
        let least = vmm::least_memory(path).map_err(|e| e.to_string())?;
        enough_memory(args.memory, least, &path.display().to_string())?;
    }
    let (backing, tracker) = (args.backing.unwrap_or(Backing::TransparentHuge), args.tracker.unwrap_or_default());
    let config = MachineConfig::new(args.memory, args.cpus, backing, tracker);
    let machine = Machine::new(config, &SerialTarget::from(args.common.serial.as_str())).map_err(|e| e.to_string())?;
    match (&args.kernel, &args.workload) {
        (Some(path), _) => machine.boot_file(path, &args.cmdline).map_err(|e| e.to_string())?,
        (None, Some(spec)) => machine.boot_workload(spec).map_err(|e| e.to_string())?,
        (None, None) => {}
    }
    let machine = Arc::new(machine);
    let instance = instance(&args.common)?;
    settle(&args.common, &instance)?;
    instance.own(machine.clone());
    instance.keep_ram()?;
    if args.paused {
        // whoever can ask already hears that it is
        machine.start(false).map_err(|e| e.to_string())?;
    }
    serve(&args.common, &instance)?;
    if !args.paused {
        machine.start(true).map_err(|e| e.to_string())?;
    }
    Ok(instance.wait_exit())
}

/// An error if there is less memory than `what` needs.
fn enough_memory(memory: u64, least: u64, what: &str) -> Result<(), String> {
    if memory >= least {
        return Ok(());
    }
    let mib = least.div_ceil(1 << 20);
    Err(format!("--memory of {memory} bytes is too little: {what} needs at least {mib} MiB (--memory {mib}M)"))
}

fn restore(args: &Run, path: &Path) -> Result<u8, String> {
    let instance = instance(&args.common)?;
    let host = HostOptions {
        serial: SerialTarget::from(args.common.serial.as_str()),
        backing: args.backing,
        tracker: args.tracker,
        pause_on_loss: false,
        shared_ram: args.common.broker.is_some(),
        cold: false,
    };
    settle(&args.common, &instance)?;
    let restart = args.restart.as_deref().map(serde_json::from_str).transpose();
    instance.restore(path, restart.map_err(|e| format!("--restart: {e}"))?, host, args.paused)?;
    serve(&args.common, &instance)?;
    Ok(instance.wait_exit())
}

fn receive(args: &Receive) -> Result<u8, String> {
    if let Err(why) = args.encryption.check() {
        eprintln!("minivmm: {why}");
        return Ok(2);
    }
    let security = args.encryption.security(None)?;
    let instance = instance(&args.common)?;
    let host = HostOptions {
        serial: SerialTarget::from(args.common.serial.as_str()),
        backing: args.backing,
        tracker: args.tracker,
        pause_on_loss: matches!(args.on_link_loss, OnLinkLoss::Pause),
        shared_ram: args.common.broker.is_some(),
        cold: args.cold,
    };
    settle(&args.common, &instance)?;
    if let Some(place) = &args.successor_of {
        let own = args.common.control.clone().ok_or("--successor-of needs --control")?;
        let plan = args.refresh.as_deref().map(serde_json::from_str).transpose();
        instance.succeed(own, place.clone(), plan.map_err(|e| format!("--refresh: {e}"))?);
    }
    if let Some(snapshot) = &args.restart_from {
        instance.has_snapshot(snapshot.clone());
    }
    let address = instance.receive(&args.listen, security, host, args.checkpoints.clone())?;
    if let Some(predecessor) = args.predecessor.as_deref() {
        let predecessor = serde_json::from_str(predecessor).map_err(|e| format!("--predecessor: {e}"))?;
        instance.succeeds_process(predecessor)?;
    }
    serve(&args.common, &instance)?;
    if args.successor_of.is_some() {
        return Ok(instance.wait_exit());
    }
    println!("listening {address}");
    // whoever reads the address may wait for it
    let _ = std::io::stdout().flush();
    Ok(instance.wait_exit())
}

fn instance(common: &Common) -> Result<Arc<Instance>, String> {
    Ok(Instance::new(common.broker.clone(), Sealing::load(common.seal.seal_key_file.as_deref())?))
}

/// Where this minivmm is to be found.
fn settle(common: &Common, instance: &Instance) -> Result<(), String> {
    let Some(control) = &common.control else { return Ok(()) };
    let serial = match common.serial.as_str() {
        word @ ("stdio" | "null") => word.to_owned(),
        file => absolute(file)?.display().to_string(),
    };
    instance.set_place(Place { control: absolute(control)?, serial, broker: common.broker.clone() });
    Ok(())
}

fn serve(common: &Common, instance: &Arc<Instance>) -> Result<(), String> {
    let Some(control) = &common.control else { return Ok(()) };
    ControlSocket::bind(&absolute(control)?).and_then(|s| s.serve(instance.clone())).map_err(|e| e.to_string())
}

fn workload(args: &Workload) -> Result<u8, String> {
    match (&args.emit, &args.out) {
        (Some(spec), Some(out)) => {
            let elf = match workload::elf(spec, args.cpus, vmm::host_tsc_khz().unwrap_or(0)) {
                Ok(elf) => elf,
                Err(error) => {
                    eprintln!("minivmm: {error}");
                    return Ok(2);
                }
            };
            std::fs::write(out, elf).map_err(|e| format!("{}: {e}", out.display()))?;
        }
        _ => {
            print!("{}", workload::listing());
        }
    }
    Ok(0)
}
