//! The mode of a socket's file under every umask. The test needs a process of its own, because the
//! umask belongs to the process.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
};

use migration_transport::{SocketOptions, UnixListener, listen_private};
use nix::sys::stat::{Mode, umask};

#[test]
fn a_socket_is_its_owners_under_every_umask() {
    let folder = tempfile::tempdir().unwrap();
    for mask in [0, 0o022, 0o077, 0o177, 0o277, 0o400, 0o777] {
        umask(Mode::from_bits_truncate(mask));
        for own in [true, false] {
            let path = folder.path().join(format!("{mask:o}-{own}"));
            let _listeners = match own {
                true => (Some(UnixListener::bind(&path, SocketOptions::default()).unwrap()), None),
                false => (None, Some(listen_private(&path).unwrap())),
            };
            let mode = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode, 0o600, "umask {mask:o}");
            UnixStream::connect(&path).unwrap();
        }
    }
}
