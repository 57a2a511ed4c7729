use std::{
    os::unix::fs::symlink,
    sync::{Barrier, atomic::AtomicUsize, atomic::Ordering},
    thread,
};

use super::*;

fn names(folder: &Path) -> Vec<OsString> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// Leaves a socket file on which nothing listens.
fn leave_stale(path: &Path) {
    drop(net::UnixListener::bind(path).unwrap());
}

#[test]
fn a_lock_on_the_folder_keeps_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    leave_stale(&path);
    let held = File::open(folder.path()).unwrap();
    held.lock().unwrap();
    let listener = listen_private(&path).unwrap();
    net::UnixStream::connect(&path).unwrap();
    drop((listener, held));
    assert_eq!(names(folder.path()), ["s"]);
}

#[test]
fn links_and_files_are_neither_followed_nor_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (path, elsewhere) = (folder.path().join("s"), folder.path().join("elsewhere"));
    for there in [false, true] {
        if there {
            fs::write(&elsewhere, "precious").unwrap();
        }
        symlink(&elsewhere, &path).unwrap();
        assert_eq!(listen_private(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(elsewhere.exists(), there);
        fs::remove_file(&path).unwrap();
    }
    fs::write(&path, "precious").unwrap();
    assert_eq!(listen_private(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(names(folder.path()).len(), 2);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(listen_private(&folder.path().join("none/s")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn of_many_that_find_a_stale_socket_one_listens() {
    for _ in 0..100 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        leave_stale(&path);
        let (start, ready) = (Barrier::new(4), Barrier::new(4));
        let listening = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let bound = listen_private(&path);
                    ready.wait();
                    if bound.is_ok() {
                        listening.fetch_add(1, Ordering::Relaxed);
                        net::UnixStream::connect(&path).unwrap();
                    }
                    ready.wait();
                });
            }
        });
        assert_eq!(listening.into_inner(), 1);
        assert_eq!(names(folder.path()), ["s"]);
    }
}

#[test]
fn a_planted_lock_keeps_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lock) = (folder.path().join("s"), folder.path().join(".s.lock"));
    let victim = folder.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let plants: [&dyn Fn(); 4] = [
        &|| symlink("/no/such/file", &lock).unwrap(),
        &|| fs::hard_link(&victim, &lock).unwrap(),
        &|| fs::create_dir(&lock).unwrap(),
        &|| fs::write(&lock, "").unwrap(),
    ];
    for plant in plants {
        leave_stale(&path);
        plant();
        let held = File::open(&lock).ok();
        if let Some(held) = held.as_ref().filter(|_| lock.is_file()) {
            fs::set_permissions(&lock, Permissions::from_mode(0o644)).unwrap();
            held.lock().unwrap();
        }
        let _listener = listen_private(&path).unwrap();
        net::UnixStream::connect(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::remove_file(&lock).or_else(|_| fs::remove_dir(&lock)).unwrap();
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    // a lock file of this user that was left by a crash is used and removed
    leave_stale(&path);
    OpenOptions::new().write(true).create_new(true).mode(MODE).open(&lock).unwrap();
    let _listener = listen_private(&path).unwrap();
    assert!(!lock.exists());
}

/// It is possible to listen at every path to which a client can connect, even if no longer name
/// fits in the folder.
#[test]
fn the_longest_paths() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().as_os_str().len() + 2;
    for name in [1, 2, 9, 20, 40] {
        let middle = folder.path().join("m".repeat(UNIX_PATH_MAX - own - name));
        fs::create_dir(&middle).unwrap();
        let path = middle.join("s".repeat(name));
        assert_eq!(path.as_os_str().len(), UNIX_PATH_MAX);
        let _listener = listen_private(&path).unwrap();
        net::UnixStream::connect(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o7777, MODE);
        assert_eq!(names(&middle).len(), 1);
        // a path that is too long is refused, and no file is left
        assert!(listen_private(&middle.join("s".repeat(name + 1))).is_err());
        assert_eq!(names(&middle).len(), 1);
    }
}
