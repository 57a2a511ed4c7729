//! `minivmm bench --slots`: measures how long KVM holds a core while it sets memory slots. Also a
//! process that only does that.

use std::{
    io::{BufRead, BufReader, Write},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use kvm_ioctls::Kvm;
use migration_core::{GuestRam, PAGE_SHIFT, RamLayout, RamRegion, text::describe};
use migration_kvm::{
    ram::{Backing, MappedRam},
    tracker::{GuestSlots, MAX_SLOT_BYTES, SlotError},
};
use minivmm_client::log;
use serde::Serialize;
use serde_json::json;

use super::{
    Bench, GIB,
    figures::{Machine, median},
    measure::ms,
    output::{self, Table, machine},
    process::{Folder, Process, field, program},
    tell,
};

/// The section of the Markdown file into which the figures are written.
const SECTION: &str = "slots";
/// The sizes of the VM's RAM in GiB.
const SIZES: [u64; 5] = [1, 16, 64, 256, 2048];
/// The size in GiB above which a VM in one slot is measured only on request.
const LARGEST: u64 = 256;
/// The number of VMs that are built for each kind.
const REPEAT: u32 = 3;
/// The kernel memory of a VM in bytes for each page of 4 KiB in its slots.
pub(super) const BYTES_A_PAGE: u64 = 9;
const SPARE: u64 = 2 * GIB;
/// The line that a process prints before it occupies a core.
const BUSY: &str = "busy";

/// A VM of a size, and its number of slots.
#[derive(Debug, Serialize)]
struct Row {
    bytes: u64,
    slots: usize,
    /// The longest call in ms.
    longest_ms: f64,
    /// The sum of all calls for a VM in ms; the median of the runs.
    sum_ms: f64,
}

pub(super) fn sparse(bytes: u64) -> Result<Arc<dyn GuestRam>, String> {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: bytes }]).map_err(|e| e.to_string())?;
    Ok(Arc::new(MappedRam::new(layout, Backing::Anonymous).map_err(describe)?))
}

pub(super) fn kvm() -> Result<Kvm, String> {
    Kvm::new().map_err(|e| format!("/dev/kvm: {e}"))
}

/// Gives all of `ram` to a new VM, in memory slots of at most `most` bytes, and frees the VM.
/// Returns the time for each slot.
fn time_slots(kvm: &Kvm, ram: Arc<dyn GuestRam>, most: u64) -> Result<Vec<Duration>, String> {
    let vm = kvm.create_vm().map_err(|e| format!("creating a VM: {e}"))?;
    // SAFETY: the VM is new, and ends in this function, before `slots`, which keeps the RAM.
    let slots = unsafe { GuestSlots::in_pieces(ram, 0, most) }.map_err(|e: SlotError| e.to_string())?;
    let (mut times, mut began) = (Vec::new(), Instant::now());
    for set in slots.installing(&vm) {
        set.map_err(|e| format!("setting a memory slot: {e}"))?;
        times.push(began.elapsed());
        began = Instant::now();
    }
    drop(vm);
    Ok(times)
}

fn measure(bytes: u64, most: u64, repeat: u32) -> Result<Row, String> {
    let (kvm, ram) = (kvm()?, sparse(bytes)?);
    let runs = (0..repeat).map(|_| time_slots(&kvm, ram.clone(), most)).collect::<Result<Vec<_>, _>>()?;
    let longest = runs.iter().flatten().max().copied().unwrap_or_default();
    let sums = runs.iter().map(|run| ms(run.iter().sum()));
    let slots = runs.first().map_or(0, Vec::len);
    Ok(Row { bytes, slots, longest_ms: ms(longest), sum_ms: median(sums).unwrap_or_default() })
}

/// Returns whether the machine has enough memory for what KVM allocates for such a VM.
fn fits(bytes: u64) -> bool {
    let available = field("/proc/meminfo".as_ref(), "MemAvailable").and_then(|f| f.split(' ').next()?.parse().ok());
    available.is_none_or(|kib: u64| (kib << 10) > (bytes >> PAGE_SHIFT) * BYTES_A_PAGE + SPARE)
}

pub(super) fn name(bytes: u64) -> String {
    if bytes >= GIB { format!("{} GiB", bytes / GIB) } else { format!("{} KiB", bytes >> 10) }
}

/// Runs the measurement and prints the table.
pub(super) fn bench(args: &Bench) -> Result<bool, String> {
    if let Some(path) = &args.markdown {
        output::check_section(path, SECTION)?;
    }
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { REPEAT });
    let (bar, mut rows, mut raw) = (ProgressBar::hidden(), Vec::new(), Vec::new());
    let (unit, small) = (args.unit, MAX_SLOT_BYTES / GIB * args.unit);
    for size in SIZES {
        let bytes = size * unit;
        let mut row = vec![name(bytes)];
        for most in [u64::MAX, small] {
            let long = most == u64::MAX && size > LARGEST;
            if long && !args.long_calls || !fits(bytes) {
                row.extend(["-".into(), "-".into()]);
                continue;
            }
            tell(&bar, &format!("{}, {}", name(bytes), if most == small { "slots of 16 GiB" } else { "one slot" }));
            let measured = measure(bytes, most, if size > LARGEST { 1 } else { repeat })?;
            row.extend([measured.longest_ms, measured.sum_ms].map(|ms| format!("{ms:.2}")));
            raw.push(measured);
        }
        rows.push(row);
    }
    let title = "Setting a VM's memory slots (ms)".into();
    let head = vec!["RAM", "one slot, longest call", "sum", "slots of 16 GiB, longest call", "sum"];
    let (table, here) = (Table { title, head, rows }, machine(&Machine::here(None)));
    if args.json {
        out!("{}", json!({ "machine": here, "rows": raw }));
    } else {
        log::print(&format!("{here}\n\n{}", table.text()));
    }
    if let Some(path) = &args.markdown {
        let by = "_Written by `minivmm bench --slots --markdown`; do not edit by hand._";
        let text = format!("{by}\n\n{here}.\n\n{}", table.markdown());
        output::write_section(path, SECTION, &text)?;
    }
    Ok(true)
}

/// Occupies a core in the kernel: sets a memory slot of `bytes` bytes, at least once and until
/// `time` has passed. Prints a line first.
pub(super) fn occupy(bytes: u64, time: Duration) -> Result<bool, String> {
    let (kvm, ram) = (kvm()?, sparse(bytes)?);
    // the reader may have ended
    let _ = writeln!(std::io::stdout(), "{BUSY}");
    let began = Instant::now();
    loop {
        time_slots(&kvm, ram.clone(), u64::MAX)?;
        if began.elapsed() >= time {
            return Ok(true);
        }
    }
}

/// A process that [occupies](occupy) a core.
pub(super) struct Occupied(Process);

impl Occupied {
    /// Starts the process. Returns when it is about to call the kernel.
    pub(super) fn start(folder: &Folder, bytes: u64, time: Duration) -> Result<Self, String> {
        let mut command = Command::new(program()?);
        let (bytes, time) = (bytes.to_string(), format!("{}us", time.as_micros()));
        command.args(["bench", "--occupy", &bytes, "--for", &time]);
        let mut process = Process::start("kernel-work", command, folder.path("kernel-work.log"))?;
        let mut line = String::new();
        BufReader::new(process.output()?).read_line(&mut line).map_err(|e| format!("kernel-work: {e}"))?;
        if line.trim() == BUSY {
            return Ok(Self(process));
        }
        process.check()?;
        Err(format!("kernel-work says {line:?}"))
    }

    /// Waits until the process has ended.
    pub(super) fn wait(mut self) -> Result<(), String> {
        self.0.wait().map(drop)
    }
}
