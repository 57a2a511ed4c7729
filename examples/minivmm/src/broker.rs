//! `minivmm broker`: keeps the RAM of VMs, and shows the RAM that is kept.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use migration_core::{
    text::{Escaped, describe},
    vm::VmId,
};
use migration_kvm::{fence::ProcessFence, spawner::LinuxSpawner};
use migration_transport::{
    AtomicFile, BrokerClient, BrokerOptions, RamBroker, SocketOptions, UnixListener, supervisor::Supervisor,
};
use minivmm_client::{ctl::fail, log};
use serde_json::{Value, json};

use crate::{
    cli::Broker,
    restart::Restarter,
    signals::{Asked, Signals},
};

/// The number of bytes that are examined and written at once.
const PIECE: usize = 64 << 10;

/// Runs the command. Returns the exit status.
pub(crate) fn run(args: &Broker, signals: Option<&Signals>) -> u8 {
    let answer = match (&args.listen, &args.at) {
        (Some(path), _) => return serve(path, args, signals),
        (None, Some(path)) => ask(args, &BrokerClient::new(path)),
        (None, None) => Err("--listen or --at is missing".into()),
    };
    match answer {
        Ok(answer) if args.json => out!("{answer}"),
        Ok(answer) => log::print(&lines(&answer)),
        Err(why) => return fail(args.json, &why),
    }
    0
}

/// Serves until a signal ends the process. Returns the exit status.
fn serve(path: &Path, args: &Broker, signals: Option<&Signals>) -> u8 {
    let ended = Arc::new((AtomicBool::new(false), AtomicU8::new(0)));
    if let Some(signals) = signals {
        let ends = ended.clone();
        let socket = path.to_owned();
        signals.end_by(move |asked| match asked {
            Asked::ToEnd(status) => {
                ends.1.store(status, Ordering::Relaxed);
                ends.0.store(true, Ordering::Release);
            }
            // the file may be gone already
            Asked::Again => drop(fs::remove_file(&socket)),
        });
    }
    match serve_until(path, args, &ended.0) {
        Ok(()) => ended.1.load(Ordering::Relaxed),
        Err(why) => fail(args.json, &why),
    }
}

fn serve_until(path: &Path, args: &Broker, ended: &AtomicBool) -> Result<(), String> {
    let mut listener = UnixListener::bind(path, SocketOptions::default()).map_err(|e| e.to_string())?;
    log::announce(format!("listening unix:{}\n", path.display()));
    let restarter = || Supervisor::new(path, Arc::new(ProcessFence), Restarter::new(path, args.json));
    let owner_gone = args.restart.then(|| Arc::new(restarter()) as _);
    let broker = RamBroker::new(BrokerOptions {
        spawner: Arc::new(LinuxSpawner::default()),
        owner_gone,
        ..BrokerOptions::default()
    });
    broker.serve(&mut listener, ended).map_err(describe)
}

fn ask(args: &Broker, broker: &BrokerClient) -> Result<Value, String> {
    if let Some(vm) = args.forget {
        broker.forget(vm).map_err(describe)?;
        return Ok(json!({"vm": vm.to_string(), "forgotten": true}));
    }
    if let (Some(vm), Some(out)) = (args.dump, &args.out) {
        return dump(broker, vm, out);
    }
    let kept = broker.list().map_err(describe)?;
    let kept: Vec<Value> = kept
        .into_iter()
        .map(|kept| {
            let state = if kept.owned { "owned" } else { "lost" };
            json!({"vm": kept.id.to_string(), "state": state, "pid": kept.pid, "backing": kept.label, "bytes": kept.bytes})
        })
        .collect();
    Ok(json!({"kept": kept}))
}

/// Writes the RAM of a VM to a sparse file of mode 0600, each byte at its guest physical address.
/// The file appears when it is complete.
fn dump(broker: &BrokerClient, vm: VmId, out: &Path) -> Result<Value, String> {
    let ram = broker.retrieve(vm).map_err(describe)?;
    let context = |e: io::Error| format!("{}: {e}", out.display());
    let new = AtomicFile::create(out).map_err(|e| e.to_string())?;
    let file = new.file();
    let mut written = 0;
    let mut end = 0;
    let mut piece = vec![0; PIECE];
    for (memory, region) in ram.files.into_iter().map(File::from).zip(ram.layout.regions()) {
        for at in (0..region.len).step_by(PIECE) {
            let bytes = &mut piece[..PIECE.min((region.len - at) as usize)];
            memory.read_exact_at(bytes, at).map_err(|e| format!("the VM's RAM: {e}"))?;
            if bytes.iter().any(|&byte| byte != 0) {
                file.write_all_at(bytes, region.gpa + at).map_err(context)?;
                written += bytes.len();
            }
        }
        end = region.gpa + region.len;
    }
    file.set_len(end).map_err(context)?;
    new.commit().map_err(|e| e.to_string())?;
    let bytes = ram.layout.bytes();
    Ok(json!({"vm": vm.to_string(), "out": out, "backing": ram.label, "ram_bytes": bytes, "written_bytes": written}))
}

/// Returns the answer as text: a line for each VM that is kept, or for each field.
fn lines(answer: &Value) -> String {
    let line = |vm: &Value| {
        let text = |key: &str| Escaped(vm[key].as_str().unwrap_or("-")).to_string();
        format!(
            "{}  {:<6} process {:<8} {:<8} {} bytes\n",
            text("vm"),
            text("state"),
            vm["pid"],
            text("backing"),
            vm["bytes"]
        )
    };
    match (answer["kept"].as_array(), answer.as_object()) {
        (Some(kept), _) => kept.iter().map(line).collect(),
        (None, Some(fields)) => {
            fields.iter().map(|(key, value)| format!("{key:<32}{}\n", Escaped(&value.to_string()))).collect()
        }
        (None, None) => String::new(),
    }
}
