//! Files that appear when they are complete, for contents that are no secret.

use std::{
    fs, io,
    io::Write as _,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use migration_transport::AtomicFile;

/// Writes a file, which appears when it is complete. An existing file stays until then. Symbolic
/// links are followed. If the target is not a regular file, or if stdout or stderr writes to it (as
/// for `/dev/stdout`), the bytes are written to it directly.
///
/// # Errors
/// Returns an error, which contains the path, if the file cannot be written.
pub fn write(out: &Path, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let context = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", out.display()));
    let file = match fs::metadata(out) {
        Ok(found) if !found.is_file() || is_open(&found) => return fs::write(out, bytes).map_err(context),
        Ok(_) => fs::canonicalize(out).map_err(context)?,
        Err(_) => out.to_owned(),
    };
    let new = AtomicFile::create_shared(&file)?;
    new.file().write_all(bytes.as_ref()).map_err(context)?;
    new.commit()
}

/// Returns whether stdout or stderr writes to this file.
fn is_open(file: &fs::Metadata) -> bool {
    let is = |stream: io::Result<nix::sys::stat::FileStat>| {
        stream.is_ok_and(|stream| (stream.st_dev, stream.st_ino) == (file.dev(), file.ino()))
    };
    let stat = |stream: std::os::fd::BorrowedFd<'_>| nix::sys::stat::fstat(stream).map_err(io::Error::from);
    is(stat(io::stdout().as_fd())) || is(stat(io::stderr().as_fd()))
}
