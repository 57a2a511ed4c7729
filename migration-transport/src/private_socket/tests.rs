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

/// The last attempt waits for 10 s; this one for less.
#[test]
fn a_lock_that_is_never_released_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lock) = (folder.path().join("s"), folder.path().join(".s.lock"));
    let held = OpenOptions::new().write(true).create_new(true).mode(MODE).open(&lock).unwrap();
    held.lock().unwrap();
    let error = Lock::take(&path, Duration::from_millis(20)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let expected = format!("another process has held the lock (flock) of {} for 20ms", lock.display());
    assert_eq!(error.to_string(), expected);
    drop(held);
    let own = Lock::take(&path, Duration::ZERO).unwrap().unwrap();
    assert_eq!(identity(&lock).unwrap(), identity(&own.path).unwrap());
    drop(own);
    assert!(!lock.exists());
}

/// Only a file of this user that nobody else may open is a lock.
#[test]
fn what_others_may_hold_is_no_lock() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lock) = (folder.path().join("s"), folder.path().join(".s.lock"));
    nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
    // with a reader, a pipe can be opened for writing
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&lock).unwrap();
    assert!(Lock::take(&path, Duration::ZERO).unwrap().is_none());
    assert!(lock.exists());
    drop(reader);
    fs::remove_file(&lock).unwrap();
    OpenOptions::new().write(true).create_new(true).mode(MODE).open(&lock).unwrap();
    fs::set_permissions(&lock, Permissions::from_mode(0o601)).unwrap();
    assert!(Lock::take(&path, Duration::ZERO).unwrap().is_none());
    fs::set_permissions(&lock, Permissions::from_mode(MODE)).unwrap();
    if geteuid().is_root() {
        std::os::unix::fs::chown(&lock, Some(54321), None).unwrap();
        assert!(Lock::take(&path, Duration::ZERO).unwrap().is_none());
    } else {
        eprintln!("skipped in part: to give a file away needs root");
    }
}

#[test]
fn a_name_on_the_way_is_recognizable_where_there_is_room() {
    let room = UNIX_PATH_MAX - "/.s.01234567".len();
    let path = |folder: usize| Path::new("/").join("f".repeat(folder - 1)).join("s");
    let name = |path: &Path| unnamed(path, OsStr::new("s")).into_string().unwrap();
    let long = path(room);
    assert!(name(&long).starts_with(".s.") && name(&long).len() == ".s.01234567".len());
    assert_eq!(long.with_file_name(name(&long)).as_os_str().len(), UNIX_PATH_MAX);
    let too_long = path(room + 1);
    assert_eq!(name(&too_long).len(), ".01234567".len());
    assert_ne!(name(&long), name(&long));
}

#[test]
fn only_a_socket_that_nobody_serves_is_stale() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let removed = || remove_stale(&path).map_err(|error| error.kind());
    // none is there
    assert_eq!(removed(), Ok(()));
    fs::write(folder.path().join("file"), "").unwrap();
    assert!(remove_stale(&folder.path().join("file/s")).is_err());
    leave_stale(&path);
    assert_eq!(removed(), Ok(()));
    assert!(!path.exists());
    // a socket of another kind
    let datagram = net::UnixDatagram::bind(&path).unwrap();
    assert_eq!(removed(), Err(ErrorKind::AddrInUse));
    assert_eq!(listen_private(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
    drop(datagram);
    fs::remove_file(&path).unwrap();
    // a listener that does not accept, and whose queue is full
    let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    busy.listen(0).unwrap();
    let connect = || {
        let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        client.connect(&SockAddr::unix(&path).unwrap()).map(|()| client)
    };
    let waiting: Vec<_> = std::iter::repeat_with(connect).map_while(Result::ok).take(100).collect();
    assert!(waiting.len() < 100);
    assert_eq!(removed(), Err(ErrorKind::AddrInUse));
    assert!(path.exists());
    assert_eq!(names(folder.path()).len(), 2);
}

#[test]
fn a_path_without_a_name_is_refused() {
    for path in ["/", "..", "/tmp/.."] {
        assert_eq!(listen_private(Path::new(path)).unwrap_err().kind(), ErrorKind::InvalidInput, "{path}");
    }
}

/// Returns how many descriptors of this process are of the file at `path`, or of one that was there.
fn opened(path: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with(&*path.to_string_lossy())).count()
}

/// Whoever waits has opened a file that is removed by then. It locks the next one.
#[test]
fn a_lock_is_waited_for_and_is_the_file_that_has_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lock) = (folder.path().join("s"), folder.path().join(".s.lock"));
    let first = Lock::take(&path, Duration::ZERO).unwrap().unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(|| {
            let taken = Lock::take(&path, Duration::from_secs(60)).unwrap().unwrap();
            let there = identity(&lock).is_ok_and(|there| {
                let own = taken.file.metadata().unwrap();
                there == (own.dev(), own.ino())
            });
            (there, taken)
        });
        while opened(&lock) < 2 {
            thread::yield_now();
        }
        drop(first);
        assert!(second.join().unwrap().0);
    });
}

#[test]
fn a_link_or_a_pipe_is_no_lock_even_if_it_could_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lock) = (folder.path().join("s"), folder.path().join(".s.lock"));
    let own = folder.path().join("own");
    OpenOptions::new().write(true).create_new(true).mode(MODE).open(&own).unwrap();
    symlink(&own, &lock).unwrap();
    assert!(Lock::take(&path, Duration::ZERO).unwrap().is_none());
    fs::remove_file(&lock).unwrap();
    // a pipe without a reader would block whoever opens it for writing
    nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
    assert!(Lock::take(&path, Duration::ZERO).unwrap().is_none());
}

#[test]
fn a_socket_that_has_lost_its_first_name_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let unnamed = Unnamed { path: folder.path().join("none"), file: (0, 0) };
    assert_eq!(unnamed.rename(&folder.path().join("s")).unwrap_err().kind(), ErrorKind::NotFound);
}
