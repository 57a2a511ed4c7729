//! Files that are no secret.

use std::{fs, io, io::Write as _, path::Path};

use migration_transport::AtomicFile;

/// Writes a file, which is there when it is complete; one that was there stays until then. A
/// symbolic link is followed, and what is no file, such as `/dev/stdout`, gets the bytes as they
/// are.
pub(crate) fn write(out: &Path, bytes: impl AsRef<[u8]>) -> Result<(), String> {
    let context = |e: io::Error| format!("{}: {e}", out.display());
    let file = match fs::metadata(out) {
        Ok(found) if !found.is_file() => return fs::write(out, bytes).map_err(context),
        Ok(_) => fs::canonicalize(out).map_err(context)?,
        Err(_) => out.to_owned(),
    };
    let new = AtomicFile::create_shared(&file).map_err(|e| e.to_string())?;
    new.file().write_all(bytes.as_ref()).map_err(context)?;
    new.commit().map_err(|e| e.to_string())
}
