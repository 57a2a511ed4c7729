//! Whose directory it is.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, fstat, fstatfs, openat, unlinkat},
    process::geteuid,
};

use crate::{atomic_file::unpredictable_name, file_errors::at};

/// Refuses the directory `dir`, which is open as `handle`, if it belongs to somebody else, who can
/// change what is in it. Returns its mode.
///
/// It may belong to this user or to root. On a file system that gives all that a user makes to
/// somebody else, it may also belong to whoever gets what this process makes there.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] when it belongs to somebody else; what the file system says.
pub(super) fn check(handle: &File, dir: &Path) -> io::Result<u32> {
    check_where(handle, dir, maps_users(handle))
}

/// As [`check`], where `maps_users` says whether the file system maps users to others.
fn check_where(handle: &File, dir: &Path, maps_users: bool) -> io::Result<u32> {
    let found = handle.metadata().map_err(at(dir))?;
    let ours = [0, geteuid().as_raw()].contains(&found.uid());
    if ours || (maps_users && owner_of_new_files(handle).is_ok_and(|uid| uid == found.uid())) {
        return Ok(found.mode() & 0o7777);
    }
    let why = format!("this directory belongs to another user (uid {})", found.uid());
    Err(at(dir)(io::Error::new(ErrorKind::PermissionDenied, why)))
}

/// Returns whether the directory is on NFS: its server decides for each client whom files belong
/// to. An export with `root_squash` gives what root makes to nobody's user, `all_squash` does it
/// for all.
///
/// Other file systems with foreign owners do not count. One that is mounted for a user (`vfat` with
/// `uid=`, FUSE) gives that user everything, also a directory that this user has put there to be
/// found; and that user can change it.
fn maps_users(handle: &File) -> bool {
    fstatfs(handle).is_ok_and(|found| found.f_type == libc::NFS_SUPER_MAGIC)
}

/// Makes a file in the directory, and returns whom it belongs to. The file is gone then.
fn owner_of_new_files(handle: &File) -> io::Result<u32> {
    let name = unpredictable_name();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(handle, &name, flags, Mode::from_raw_mode(0o600))?;
    let found = fstat(&file);
    unlinkat(handle, &name, AtFlags::empty())?;
    Ok(found?.st_uid)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, chown},
        thread,
    };

    use nix::unistd::{Uid, setfsuid};
    use tempfile::TempDir;

    use super::*;

    const NOBODY: u32 = 65534;
    const STRANGER: u32 = 54321;

    /// Returns a directory with mode 0700 that belongs to `uid`, below one that everybody can look
    /// into.
    fn belongs_to(uid: u32) -> (TempDir, File) {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), Permissions::from_mode(0o755)).unwrap();
        let dir = parent.path().join("vm");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        chown(&dir, Some(uid), None).unwrap();
        let handle = File::open(dir).unwrap();
        (parent, handle)
    }

    /// Does `work` on a thread whose files belong to `uid`, and which has no more rights there than
    /// that user: what an NFS server makes of a user that it squashes.
    fn squashed<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let body = || {
                setfsuid(Uid::from_raw(uid));
                work()
            };
            scope.spawn(body).join().unwrap()
        })
    }

    fn refused(checked: io::Result<u32>) {
        let error = checked.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("another user"), "{error}");
    }

    #[test]
    fn where_users_are_mapped_the_owner_of_new_files_may_own_the_directory() {
        if !geteuid().is_root() {
            return eprintln!("without directories of another owner: that needs root");
        }
        let (parent, handle) = belongs_to(NOBODY);
        let dir = parent.path().join("vm");
        assert_eq!(squashed(NOBODY, || check_where(&handle, &dir, true)).unwrap(), 0o700);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "nothing is left of the look");
        // a file system that is known to map nobody, such as one that is mounted for a user
        refused(squashed(NOBODY, || check_where(&handle, &dir, false)));
        assert!(!maps_users(&handle));
        refused(squashed(NOBODY, || check(&handle, &dir)));
    }

    #[test]
    fn where_users_are_mapped_a_directory_of_somebody_else_is_refused() {
        if !geteuid().is_root() {
            return eprintln!("without directories of another owner: that needs root");
        }
        let (parent, handle) = belongs_to(STRANGER);
        let dir = parent.path().join("vm");
        // this user's files keep their owner there
        refused(check_where(&handle, &dir, true));
        // they get another one, which cannot write there
        refused(squashed(NOBODY, || check_where(&handle, &dir, true)));
        // or can
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        refused(squashed(NOBODY, || check_where(&handle, &dir, true)));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "nothing is left of the look");
    }
}
