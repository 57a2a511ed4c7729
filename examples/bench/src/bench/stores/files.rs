//! The store of sparse files, beside `dd` with blocks of the same size.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use migration_core::{PAGE_SIZE, text::describe};
use migration_transport::{FilePageStore, FilePageStoreOptions};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use super::{
    super::{
        figures::median,
        output::{Table, number},
        process::Folder,
    },
    Pages, RUN_BYTES, Space, TARGET_FILES, Target,
};

/// What the store and `dd` reach in MB/s.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    what: &'static str,
    store_mb_per_s: f64,
    dd_mb_per_s: f64,
    /// Whether it has a target. A gather out of the system's cache has none: it checks and copies
    /// each page, and `dd` does neither.
    has_target: bool,
}

impl Row {
    pub(super) fn target(&self) -> Option<Target> {
        let is = Some(self.store_mb_per_s / self.dd_mb_per_s);
        let what = format!("files, {}: part of dd", self.what);
        self.has_target.then_some(Target { what, is, bound: TARGET_FILES, at_least: true })
    }
}

/// MB/s of writing as many bytes, and of reading them.
struct Pass {
    write: f64,
    read: f64,
}

/// Both write and read as much, in turn. With `synchronise` each run is on the disk before the next
/// one begins, and is read from there.
pub(super) fn measure(folder: &Folder, pages: &mut Pages, repeat: u32) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for synchronise in [false, true] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..repeat {
            ours.push(in_store(&folder.path("pages"), synchronise, pages)?);
            theirs.push(by_dd(&folder.path("file"), synchronise, pages)?);
        }
        let middle = |passes: &[Pass], of: fn(&Pass) -> f64| median(passes.iter().map(of)).unwrap_or_default();
        let row = |what, of: fn(&Pass) -> f64, has_target| Row {
            what,
            store_mb_per_s: middle(&ours, of),
            dd_mb_per_s: middle(&theirs, of),
            has_target,
        };
        let [put, gathered] = match synchronise {
            false => ["put", "gathered from the cache"],
            true => ["put, synchronised", "gathered from the disk"],
        };
        rows.extend([row(put, |pass| pass.write, true), row(gathered, |pass| pass.read, synchronise)]);
    }
    Ok(rows)
}

fn in_store(folder: &Path, synchronise: bool, pages: &mut Pages) -> Result<Pass, String> {
    let options = FilePageStoreOptions { synchronise, ..Default::default() };
    let store = FilePageStore::open(folder, "bench", options).map_err(describe)?;
    let space = Space::create(&store)?;
    let put = space.put(pages, 1)?;
    if synchronise {
        let files = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        files.filter_map(Result::ok).try_for_each(|file| leave_cache(&file.path()))?;
    }
    let gathered = space.gather(pages, 1)?;
    space.forget().map_err(describe)?;
    fs::remove_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mb = |rate: f64| rate * PAGE_SIZE as f64 / 1e6;
    Ok(Pass { write: mb(put), read: mb(gathered) })
}

/// Writes a file that was not there, as the store does, and reads it.
fn by_dd(file: &Path, synchronise: bool, pages: &Pages) -> Result<Pass, String> {
    let bytes = pages.count() * PAGE_SIZE as u64;
    let count = bytes / RUN_BYTES as u64;
    let dd = |from: &str, to: &str, more: &[&str]| {
        let mut command = Command::new("dd");
        command.args([format!("if={from}"), format!("of={to}"), format!("bs={RUN_BYTES}"), format!("count={count}")]);
        let begin = Instant::now();
        let ended = command.args(more).stdin(Stdio::null()).stderr(Stdio::null()).status();
        let time = begin.elapsed().as_secs_f64();
        match ended {
            Ok(status) if status.success() => Ok(bytes as f64 / time / 1e6),
            Ok(status) => Err(format!("dd ended ({status})")),
            Err(error) => Err(format!("dd: {error}")),
        }
    };
    let name = file.to_str().ok_or("the folder for temporary files has no name in UTF-8")?;
    let write = dd("/dev/zero", name, if synchronise { &["oflag=dsync"] } else { &[] })?;
    if synchronise {
        leave_cache(file)?;
    }
    let read = dd(name, "/dev/null", &[])?;
    fs::remove_file(file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(Pass { write, read })
}

/// Lets the system read a file from its disk again. What is not yet written stays in the cache.
fn leave_cache(path: &Path) -> Result<(), String> {
    let failed = |e: String| format!("{}: {e}", path.display());
    let file = fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|e| failed(e.to_string()))
}

pub(super) fn table(rows: &[Row]) -> Table {
    let row = |row: &Row| {
        let part = row.store_mb_per_s / row.dd_mb_per_s;
        let figures = [row.store_mb_per_s, row.dd_mb_per_s].map(|figure| number(Some(figure)));
        vec![row.what.to_owned(), figures[0].clone(), figures[1].clone(), format!("{part:.2}")]
    };
    Table {
        title: "Sparse files, and dd with blocks of 2 MiB (MB/s)".into(),
        head: vec!["", "store", "dd", "ratio"],
        rows: rows.iter().map(row).collect(),
    }
}
