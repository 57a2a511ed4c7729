//! `minivmm broker`: keeps the RAM of VMs, and shows what is kept.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use migration_core::vm::VmId;
use migration_kvm::spawner::KvmSpawner;
use migration_transport::{AtomicFile, BrokerClient, BrokerOptions, RamBroker, SocketOptions, UnixListener};
use serde_json::{Value, json};

use crate::{cli::Broker, restart::Restarter};

/// Bytes that are looked at, and written, at once.
const PIECE: usize = 64 << 10;

/// Runs the command; the exit status.
pub(crate) fn run(args: &Broker) -> u8 {
    let answer = match (&args.listen, &args.at) {
        (Some(path), _) => serve(path, args),
        (None, Some(path)) => ask(args, &BrokerClient::new(path)),
        (None, None) => Err("--listen or --at is missing".into()),
    };
    match answer {
        Ok(answer) if args.json => println!("{answer}"),
        Ok(answer) => print!("{}", lines(&answer)),
        Err(why) if args.json => {
            println!("{}", json!({"error": why}));
            return 1;
        }
        Err(why) => {
            eprintln!("minivmm: {why}");
            return 1;
        }
    }
    0
}

/// Until the process ends.
fn serve(path: &Path, args: &Broker) -> Result<Value, String> {
    let mut listener = UnixListener::bind(path, SocketOptions::default()).map_err(|e| e.to_string())?;
    println!("listening unix:{}", path.display());
    // whoever reads the address may wait for it
    let _ = io::stdout().flush();
    let bereft = args.restart.then(|| Arc::new(Restarter::new(path, args.json)) as _);
    let broker =
        RamBroker::new(BrokerOptions { spawner: Arc::new(KvmSpawner::default()), bereft, ..BrokerOptions::default() });
    broker.serve(&mut listener, &AtomicBool::new(false)).map_err(|e| e.to_string())?;
    Ok(Value::Null)
}

fn ask(args: &Broker, broker: &BrokerClient) -> Result<Value, String> {
    if let Some(vm) = args.forget {
        broker.forget(vm).map_err(|e| e.to_string())?;
        return Ok(json!({"vm": vm.to_string(), "forgotten": true}));
    }
    if let (Some(vm), Some(out)) = (args.dump, &args.out) {
        return dump(broker, vm, out);
    }
    let kept = broker.list().map_err(|e| e.to_string())?;
    let kept: Vec<Value> = kept
        .into_iter()
        .map(|kept| {
            let state = if kept.owned { "owned" } else { "lost" };
            json!({"vm": kept.id.to_string(), "state": state, "pid": kept.pid, "backing": kept.label, "bytes": kept.bytes})
        })
        .collect();
    Ok(json!({"kept": kept}))
}

/// Writes RAM to a sparse file of mode 0600, each byte at its guest physical address. The file is
/// there when it is complete.
fn dump(broker: &BrokerClient, vm: VmId, out: &Path) -> Result<Value, String> {
    let ram = broker.withdraw(vm).map_err(|e| e.to_string())?;
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

/// The answer for a person: a line for each VM that is kept, or for each field.
fn lines(answer: &Value) -> String {
    let line = |vm: &Value| {
        let text = |key: &str| vm[key].as_str().unwrap_or("-").to_owned();
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
        (None, Some(fields)) => fields.iter().map(|(key, value)| format!("{key:<32}{value}\n")).collect(),
        (None, None) => String::new(),
    }
}
