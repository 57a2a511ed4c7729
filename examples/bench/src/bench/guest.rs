//! Access to a guest from outside of its VMM: reads and writes the guest's board through
//! `/proc/PID/mem`, or through a mapping of its memory file.
//!
//! It works in the same way for every VMM and needs no help from one. The board is a page 1 MiB
//! after the start of guest RAM. It is searched for in every mapping of the process that is large
//! enough to be guest RAM. A memory file is the same for all processes that have had the VM.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    thread,
    time::{Duration, Instant},
};

use guests::{
    Board, State,
    layout::{BOARD_ADDRESS, board},
};
use migration_core::{
    page::{RamLayout, RamRegion},
    ram::GuestRam,
    text::Chain,
};
use migration_kvm::ram::{Backing, MappedRam};

use super::process::{Process, maps};

/// The interval between two reads while the bench waits for something.
const LOOK: Duration = Duration::from_millis(2);
/// The smallest size of the RAM below the hole of a guest with more than 3 GiB. Smaller guests have
/// one mapping.
const LOW: u64 = 2 << 30;

/// The largest size of the RAM below the hole, and so of a memory file.
const FILE: u64 = 3 << 30;

/// A guest, in the memory of a process or in memory that processes share.
pub(crate) struct Guest {
    memory: Memory,
    len: u64,
}

/// The place of the guest's RAM.
enum Memory {
    /// In a process, from host address `base` on.
    Process { file: File, base: u64 },
    /// In memory that is mapped into this process, too.
    Shared(MappedRam),
}

impl Memory {
    fn read(&self, gpa: u64, to: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Process { file, base } => file.read_exact_at(to, base + gpa).map_err(|e| e.to_string()),
            Self::Shared(ram) => ram.read(gpa, to).map_err(|e| e.to_string()),
        }
        .map_err(|why| format!("guest memory at {gpa:#x}: {why}"))
    }

    fn write(&self, gpa: u64, from: &[u8]) -> Result<(), String> {
        match self {
            Self::Process { file, base } => file.write_all_at(from, base + gpa).map_err(|e| e.to_string()),
            Self::Shared(ram) => ram.write(gpa, from).map_err(|e| e.to_string()),
        }
        .map_err(|why| format!("guest memory at {gpa:#x}: {why}"))
    }
}

/// Maps the memory file that holds the RAM of `pid` from address 0 on.
fn memory_file(pid: u32, len: u64, backing: Backing) -> Result<Option<MappedRam>, String> {
    let (folder, len) = (format!("/proc/{pid}/fd"), len.min(FILE));
    let context = |e: std::io::Error| format!("{folder}: {e}");
    let mut numbers = Vec::new();
    for entry in fs::read_dir(&folder).map_err(context)? {
        numbers.extend(entry.map_err(context)?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    // the RAM above the hole may have the same size; its file has a higher number
    numbers.sort_unstable();
    for number in numbers {
        let path = format!("{folder}/{number}");
        // a descriptor that is closed meanwhile was not the memory file
        let is_memory = fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
        if !is_memory || !fs::metadata(&path).is_ok_and(|file| file.size() == len) {
            continue;
        }
        let file = File::options().read(true).write(true).open(&path).map_err(|e| format!("{path}: {e}"))?;
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len }]).map_err(|e| e.to_string())?;
        let ram = MappedRam::from_memory_files(layout, vec![file.into()], backing);
        return ram.map(Some).map_err(|e| format!("{path}: {}", Chain(&e)));
    }
    Ok(None)
}

impl Guest {
    /// Waits until a guest of ours with `len` bytes of RAM works in `process`.
    pub(crate) fn find(process: &mut Process, len: u64, limit: Duration) -> Result<Self, String> {
        let start = Instant::now();
        let path = format!("/proc/{}/mem", process.pid());
        let open = || File::options().read(true).write(true).open(&path).map_err(|e| format!("{path}: {e}"));
        loop {
            process.check()?;
            for mapping in process.mappings()?.iter().filter(|m| m.writable) {
                if mapping.range.end - mapping.range.start < len.min(LOW) {
                    continue;
                }
                // two mappings may have become one; after half of the time the whole mapping is
                // searched
                let places = if start.elapsed() > limit / 2 { mapping.range.end - mapping.range.start } else { 1 };
                for base in (mapping.range.start..mapping.range.start + places).step_by(2 << 20) {
                    let guest = Self { memory: Memory::Process { file: open()?, base }, len };
                    if guest.works()? {
                        return Ok(guest);
                    }
                }
            }
            if start.elapsed() > limit {
                return Err(format!("no guest works in process {} after {limit:?}", process.pid()));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a guest of ours with `len` bytes of RAM in memory files works in `process`. The
    /// file need not be found again in the processes that take the VM over, and reading it costs
    /// these processes nothing.
    pub(crate) fn shared(process: &mut Process, len: u64, backing: Backing, limit: Duration) -> Result<Self, String> {
        let deadline = Instant::now() + limit;
        let mut guest = None;
        loop {
            process.check()?;
            if guest.is_none() {
                guest = memory_file(process.pid(), len, backing)?.map(|ram| Self { memory: Memory::Shared(ram), len });
            }
            if guest.as_ref().map_or(Ok(false), Self::works)? {
                return guest.ok_or_else(|| "no guest".into());
            }
            if Instant::now() > deadline {
                return Err(format!("no guest works in the memory files of process {} after {limit:?}", process.pid()));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns whether the guest has begun to work.
    fn works(&self) -> Result<bool, String> {
        match self.board() {
            Ok(board) if board.state == State::Failed => Err(format!("the guest failed: {:?}", board.first_error)),
            Ok(board) => Ok(board.state == State::Running && board.cpus_online > 0),
            // the memory of something else, or of a guest that has not begun
            Err(_) => Ok(false),
        }
    }

    /// Returns the addresses of the RAM below the hole in the process in which it was found. The
    /// range is empty for a memory file.
    pub(super) fn ram(&self) -> Range<u64> {
        match &self.memory {
            Memory::Process { base, .. } => *base..base + self.len,
            Memory::Shared(_) => 0..0,
        }
    }

    /// Returns access to the same guest while it moves.
    pub(super) fn peek(&self, pid: u32) -> Result<Peek, String> {
        Peek::open(pid, self.ram().start)
    }

    /// Returns the present content of the board.
    pub(crate) fn board(&self) -> Result<Board, String> {
        let mut page = [0; 4096];
        self.memory.read(BOARD_ADDRESS, &mut page)?;
        Board::parse(&page).ok_or_else(|| "no board where it was".into())
    }

    /// Writes a control word of the board.
    fn set(&self, word: usize, value: u64) -> Result<(), String> {
        self.memory.write(BOARD_ADDRESS + word as u64, &value.to_le_bytes())
    }

    fn wait(&self, what: &str, limit: Duration, done: impl Fn(&Board) -> bool) -> Result<Board, String> {
        let deadline = Instant::now() + limit;
        loop {
            let board = self.board()?;
            if done(&board) {
                return Ok(board);
            }
            if Instant::now() > deadline {
                return Err(format!("the guest does not {what}: {board:?}"));
            }
            thread::sleep(LOOK);
        }
    }

    /// Resets the guest's longest gap.
    pub(crate) fn reset_gap(&self) -> Result<Board, String> {
        let next = self.board()?.reset_seen + 1;
        self.set(board::CONTROL, next)?;
        self.wait("reset its gap", Duration::from_secs(10), |b| b.reset_seen == next)
    }

    /// Lets the guest check all its pages. Returns the number of wrong pages that it has found so
    /// far.
    pub(crate) fn verify(&self) -> Result<u64, String> {
        let next = self.board()?.verify_done + 1;
        self.set(board::VERIFY, next)?;
        let done = self.wait("verify its pages", Duration::from_secs(120), |b| b.verify_done == next)?;
        Ok(done.errors)
    }
}

/// Access to a guest that may be moving. It never touches a page that is not mapped: at a
/// destination, a read of such a page would make it a page of zeros, or would be a fault that the
/// guest did not cause.
pub(crate) struct Peek {
    memory: File,
    pages: File,
    base: u64,
}

impl Peek {
    fn open(pid: u32, base: u64) -> Result<Self, String> {
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).map_err(|e| format!("{path}: {e}"))
        };
        Ok(Self { memory: open("mem")?, pages: open("pagemap")?, base })
    }

    /// Returns the guest of ours with `len` bytes of RAM in process `pid`, if its board is mapped.
    pub(crate) fn find(pid: u32, len: u64) -> Option<Self> {
        let low = len.min(LOW);
        let mut peek = Self::open(pid, 0).ok()?;
        for mapping in maps(pid).ok()?.iter().filter(|m| m.writable) {
            // two neighbouring mappings may have become one
            let Some(last) = mapping.range.end.checked_sub(low) else { continue };
            for base in (mapping.range.start..=last).step_by(2 << 20) {
                peek.base = base;
                if peek.board().is_some_and(|board| board.cpus_online > 0) {
                    return Some(peek);
                }
            }
        }
        None
    }

    /// Returns the board, if it is mapped.
    pub(crate) fn board(&self) -> Option<Board> {
        const PRESENT: u64 = 1 << 63;
        let (mut entry, mut page) = ([0; 8], [0; 4096]);
        let at = self.base + BOARD_ADDRESS;
        self.pages.read_exact_at(&mut entry, at / 4096 * 8).ok()?;
        if u64::from_le_bytes(entry) & PRESENT == 0 {
            return None;
        }
        self.memory.read_exact_at(&mut page, at).ok()?;
        Board::parse(&page)
    }

    /// Returns the number of operations that the guest has done, if its board is mapped.
    pub(crate) fn operations(&self) -> Option<u64> {
        self.board().map(|board| board.operations)
    }
}
