//! The commands of the program `minivmm`.
//!
//! A program that adds commands or push orders of its own flattens [`Command`] into its command
//! line, as `main.rs` does.

use std::{path::Path, process::ExitCode, sync::Arc};

use migration_core::{
    engine::RestoreOptions,
    text::{Chain, describe},
    working_set::ResidentLimit,
};
use migration_kvm::ram::Backing;
use minivmm_client::{StoreSpec, ctl, encryption, log, values::absolute, whole_file};
use nix::errno::Errno;

use crate::{
    BuildError, Guest, Vm, VmOptions, broker,
    cli::{Common, OnLinkLoss, Receive, Run, Workload},
    control::ControlSocket,
    feature,
    instance::{Arrival, Instance},
    page_stores::PageStores,
    refresh::Place,
    sealing::Sealing,
    signals::{self, Signals},
    store,
    vmm::{self, HostOptions, SerialTarget},
};
pub use crate::{cli::Command, instance::PushOrders};

/// Runs a command, and returns the exit status of the process. Clients of the VM may choose the
/// push orders that `more` knows, in addition to the built-in ones.
pub fn run(command: &Command, more: PushOrders) -> ExitCode {
    let result = match command {
        Command::Run(args) => with_a_vm(|signals| run_vm(args, signals, more)),
        Command::Receive(args) => with_a_vm(|signals| receive(args, signals, more)),
        Command::Ctl(args) => Ok(ctl::run(args)),
        Command::Feature(args) => with_a_vm(|signals| Ok(feature::run(args, signals))),
        Command::Broker(args) if args.listen.is_some() => with_a_vm(|signals| Ok(broker::run(args, Some(signals)))),
        Command::Broker(args) => Ok(broker::run(args, None)),
        Command::Workload(args) => workload(args),
        Command::Keygen(args) => encryption::keygen(args).map_err(String::from),
        Command::Store(args) => Ok(store::run(args)),
    };
    let status = result.unwrap_or_else(|why| {
        log!("{why}");
        1
    });
    // the exit status of a VMM reports the fate of its VM, whether or not output was lost
    let output_counts = !matches!(command, Command::Run(_) | Command::Receive(_));
    ExitCode::from(log::finish(status, output_counts))
}

/// Returns `None` for every name. For programs that have no push orders of their own.
pub fn no_push_orders(_name: &str) -> Option<Box<dyn migration_core::strategy::PushOrder>> {
    None
}

/// Writes the remaining output of a command, and returns the exit status of the process.
pub fn finish(status: u8) -> ExitCode {
    ExitCode::from(log::finish(status, true))
}

/// Makes a write to a file that has reached its size limit fail with an error. Without this call, a
/// signal would end the process.
pub fn survive_file_limits() {
    signals::survive_file_limits();
}

/// Prepares a process that will have a VM, or will keep RAM of VMs, and runs `command`. The process
/// must not have another thread yet.
fn with_a_vm(command: impl FnOnce(&Signals) -> Result<u8, String>) -> Result<u8, String> {
    let signals = Signals::wait()?;
    log::start();
    command(&signals)
}

/// Reports a wrong command line, and returns the exit status of the process. The report is JSON if
/// the arguments contain `--json`.
pub fn wrong_command_line(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args().any(|a| a == "--json");
    if wants_json && error.use_stderr() {
        let why = error.render().to_string();
        let status = ctl::usage(true, why.lines().next().unwrap_or("wrong command line"));
        return ExitCode::from(log::finish(status, true));
    }
    let status = if error.use_stderr() { 2 } else { 0 };
    if let Err(why) = error.print()
        && status == 0
    {
        log::stdout_failed(why.raw_os_error().map_or(Errno::EIO, Errno::from_raw));
    }
    ExitCode::from(log::finish(status, true))
}

fn run_vm(args: &Run, signals: &Signals, more: PushOrders) -> Result<u8, String> {
    if let Some(path) = &args.restore {
        return restore(args, path, signals, more);
    }
    let guest = match (&args.kernel, &args.workload) {
        (Some(file), _) => Some(Guest::Kernel { file: file.clone(), cmdline: args.cmdline.clone() }),
        (None, Some(spec)) => Some(Guest::Workload(spec.clone())),
        (None, None) => None,
    };
    let vm = Vm::build(&VmOptions {
        memory: args.memory,
        cpus: args.cpus,
        backing: args.backing.unwrap_or(Backing::TransparentHuge),
        tracker: args.tracker.unwrap_or_default(),
        guest,
        serial: SerialTarget::from(args.common.serial.as_str()),
    });
    let machine = match vm {
        Ok(vm) => vm.machine,
        Err(error) => {
            log!("{}", Chain(&error));
            return Ok(if matches!(error, BuildError::Workload(_)) { 2 } else { 1 });
        }
    };
    let instance = instance(&args.common, signals, more)?;
    settle(&args.common, &instance)?;
    instance.own(machine.clone());
    keep_cold_pages(args, &instance)?;
    instance.keep_ram()?;
    if args.paused {
        // the VM is paused before the control socket is served, so that every client sees it paused
        machine.start(false).map_err(|e| e.to_string())?;
    }
    serve(&args.common, &instance)?;
    if !args.paused {
        machine.start(true).map_err(|e| e.to_string())?;
    }
    Ok(instance.wait_exit())
}

fn keep_cold_pages(args: &Run, instance: &Instance) -> Result<(), String> {
    let Some(store) = &args.cold_store else { return Ok(()) };
    instance.keep_cold_pages(store, args.resident_limit.unwrap_or(ResidentLimit::Auto))
}

fn restore(args: &Run, path: &Path, signals: &Signals, more: PushOrders) -> Result<u8, String> {
    let instance = instance(&args.common, signals, more)?;
    let host = HostOptions {
        serial: serial(&args.common)?,
        backing: args.backing,
        tracker: args.tracker,
        pause_on_loss: false,
        shared_ram: args.common.broker.is_some(),
        cold: false,
    };
    settle(&args.common, &instance)?;
    let restart = args.restart.as_deref().map(serde_json::from_str).transpose();
    let restart = restart.map_err(|e| format!("--restart: {e}"))?;
    let max_ram_bytes = match restart {
        // the VM ran on this host when it was saved, so its RAM needs no limit
        Some(_) => u64::MAX,
        None => max_memory(args.max_memory)?,
    };
    let options = RestoreOptions { max_ram_bytes, paused: args.paused, ..RestoreOptions::default() };
    instance.restore(path, restart, host, options)?;
    keep_cold_pages(args, &instance)?;
    serve(&args.common, &instance)?;
    Ok(instance.wait_exit())
}

fn receive(args: &Receive, signals: &Signals, more: PushOrders) -> Result<u8, String> {
    if let Err(why) = args.encryption.check() {
        log!("{why}");
        return Ok(2);
    }
    let security = args.encryption.security(None)?;
    let instance = instance(&args.common, signals, more)?;
    let host = HostOptions {
        serial: serial(&args.common)?,
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
    let max_memory = match args.successor_of {
        // the VM's RAM is on this host already, so its RAM needs no limit
        Some(_) => Arrival::SHARED.max_memory,
        None => max_memory(args.max_memory)?,
    };
    // the successor of a VMM maps the VM's pages where they are, so none come through page stores
    let through_stores = args.successor_of.is_none();
    let arrival = Arrival { checkpoints: args.checkpoints.clone(), max_memory, through_stores };
    let listening = instance.receive(&args.listen, security, host, arrival)?;
    if let Some(predecessor) = args.predecessor.as_deref() {
        let predecessor = serde_json::from_str(predecessor).map_err(|e| format!("--predecessor: {e}"))?;
        instance.succeeds_process(predecessor)?;
    }
    serve(&args.common, &instance)?;
    if args.successor_of.is_some() {
        return Ok(instance.wait_exit());
    }
    // the addresses that a host name resolves to
    let bound: String = listening.bound.iter().map(|bound| format!("bound {bound}\n")).collect();
    log::announce(format!("listening {}\n{bound}", listening.address));
    Ok(instance.wait_exit())
}

/// Returns the most RAM, in bytes, that a VM from outside may have: the size that the user allows,
/// or else the size of this host's memory.
fn max_memory(allowed: Option<u64>) -> Result<u64, String> {
    match allowed {
        Some(bytes) => Ok(bytes),
        None => nix::sys::sysinfo::sysinfo()
            .map(|host| host.ram_total())
            .map_err(|e| format!("the size of this host's memory: {e}; it can be given by --max-memory")),
    }
}

fn instance(common: &Common, signals: &Signals, more: PushOrders) -> Result<Arc<Instance>, String> {
    let sealing = Sealing::load(common.seal.seal_key_file.as_deref())?;
    let stores = common.stores.iter().map(StoreSpec::absolute).collect::<Result<Vec<_>, _>>()?;
    let stores = PageStores::new(&stores).map_err(describe)?;
    let instance = Instance::new(common.broker.clone(), sealing, stores);
    instance.knows_push_orders(more);
    let ends = instance.clone();
    signals.end_by(move |asked| ends.end_by_signal(asked));
    Ok(instance)
}

/// Returns the target of the serial port of a VM that will arrive. The target is checked now, and
/// not after the VM has moved.
fn serial(common: &Common) -> Result<SerialTarget, String> {
    let target = SerialTarget::from(common.serial.as_str());
    target.check().map_err(|e| e.to_string())?;
    Ok(target)
}

/// Records the place at which clients find this minivmm.
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
            let elf = match guests::elf(spec, args.cpus, vmm::host_tsc_khz().unwrap_or(0)) {
                Ok(elf) => elf,
                Err(error) => {
                    log!("{error}");
                    return Ok(2);
                }
            };
            whole_file::write(out, &elf).map_err(|e| e.to_string())?;
        }
        _ => {
            log::print(&guests::listing());
        }
    }
    Ok(0)
}
